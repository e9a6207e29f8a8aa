//! Frames waiting to be sent on one stream, gathered into few large pieces.

use crate::api::Payload;
use bytes::{Bytes, BytesMut};
use send_wrapper::SendWrapper;
use std::collections::VecDeque;

/// Shared payloads from this size on are handed to QUIC as they are. Below they are gathered: QUIC walks through its
/// list of unacknowledged pieces for every packet it fills, so the list is kept short.
const ZERO_COPY_FROM: usize = 16 << 10;
/// The same for buffers of this thread. Higher: a small one goes back at once, and the client that waits for memory with it.
const LOCAL_ZERO_COPY_FROM: usize = 64 << 10;
/// Size of the pieces that copies are gathered into.
const PIECE: usize = 64 << 10;
/// Most bytes handed to QUIC at once; what one frame needs may exceed it.
const BATCH: usize = 256 << 10;

enum Piece {
    Ready(Bytes),
    Local(Box<dyn AsRef<[u8]>>),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Ready(bytes) => bytes.len(),
            Piece::Local(buffer) => (**buffer).as_ref().len(),
        }
    }
}

/// A buffer of this thread in the hands of QUIC. All of QUIC runs on this thread (`quic`), so it is looked at and
/// dropped here only; elsewhere the wrapper would panic.
struct Held(SendWrapper<Box<dyn AsRef<[u8]>>>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        (**self.0).as_ref()
    }
}

/// Unsent bytes, oldest first.
#[derive(Default)]
pub(crate) struct SendQueue {
    pieces: VecDeque<Piece>,
    /// Newest bytes: headers and small payloads.
    tail: BytesMut,
    /// Everything queued and not yet [`Self::accepted`] by QUIC.
    bytes: usize,
}

impl SendQueue {
    /// Bytes waiting, those of a batch under way included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Nothing is left to make a batch of.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.tail.is_empty()
    }

    pub fn push(&mut self, header: &[u8], payload: Payload) {
        self.bytes += header.len() + payload.len();
        if self.tail.capacity() - self.tail.len() < header.len() {
            self.seal();
            self.tail.reserve(PIECE);
        }
        self.tail.extend_from_slice(header);
        match payload {
            Payload::None => {}
            Payload::Inline(bytes) if bytes.len() < ZERO_COPY_FROM => self.copy(&bytes),
            Payload::Inline(bytes) => self.append(Piece::Ready(bytes.into())),
            Payload::Shared(bytes) if bytes.len() < ZERO_COPY_FROM => self.copy(&bytes),
            Payload::Shared(bytes) => self.append(Piece::Ready(bytes)),
            Payload::Local(buffer) if (*buffer).as_ref().len() >= LOCAL_ZERO_COPY_FROM => {
                self.append(Piece::Ready(Bytes::from_owner(Held(SendWrapper::new(
                    buffer,
                )))));
            }
            // Copied when QUIC has room: until then the one buffer that disk and wire share is enough.
            Payload::Local(buffer) => self.append(Piece::Local(buffer)),
        }
    }

    fn copy(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.tail.len() == self.tail.capacity() {
                self.seal();
                self.tail.reserve(PIECE);
            }
            let room = (self.tail.capacity() - self.tail.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            self.tail.extend_from_slice(now);
            bytes = later;
        }
    }

    fn append(&mut self, piece: Piece) {
        self.seal();
        self.pieces.push_back(piece);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.pieces
                .push_back(Piece::Ready(self.tail.split().freeze()));
        }
    }

    /// Moves the oldest bytes to `batch`, about [`BATCH`] of them.
    pub fn take_batch(&mut self, batch: &mut Vec<Bytes>) {
        self.seal();
        let mut taken = 0;
        let mut joined = BytesMut::new();
        while taken < BATCH
            && let Some(piece) = self.pieces.pop_front()
        {
            match piece {
                // A header before or between copied payloads joins them, so that QUIC gets one long piece.
                Piece::Ready(bytes)
                    if bytes.len() < 1024
                        && (!joined.is_empty()
                            || matches!(self.pieces.front(), Some(Piece::Local(_)))) =>
                {
                    taken += bytes.len();
                    self.join(&mut joined, &bytes, taken, batch);
                }
                Piece::Ready(bytes) => {
                    taken += bytes.len();
                    flush(&mut joined, batch);
                    batch.push(bytes);
                }
                Piece::Local(buffer) => {
                    let bytes = (*buffer).as_ref();
                    taken += bytes.len();
                    self.join(&mut joined, bytes, taken, batch);
                }
            }
        }
        flush(&mut joined, batch);
    }

    /// Copies `bytes` behind what is joined, or begins a new piece with room for what follows of this batch, of which `taken` bytes are
    /// taken (these included), and no more: QUIC holds a piece as a whole until its last byte is acknowledged, and counts only the bytes in it.
    fn join(&self, joined: &mut BytesMut, bytes: &[u8], taken: usize, batch: &mut Vec<Bytes>) {
        if joined.capacity() - joined.len() < bytes.len() {
            flush(joined, batch);
            let most = PIECE.min(bytes.len() + BATCH.saturating_sub(taken));
            let mut room = bytes.len();
            for piece in &self.pieces {
                if room >= most {
                    break;
                }
                room += piece.len();
            }
            joined.reserve(room.min(most).max(bytes.len()));
        }
        joined.extend_from_slice(bytes);
    }

    /// QUIC took so many bytes of a batch.
    pub fn accepted(&mut self, bytes: usize) {
        self.bytes -= bytes;
    }

    /// Forgets everything: the session is over.
    pub fn clear(&mut self) {
        *self = SendQueue::default();
    }
}

fn flush(joined: &mut BytesMut, batch: &mut Vec<Bytes>) {
    if !joined.is_empty() {
        batch.push(joined.split().freeze());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::rc::Rc;

    struct Counted(Rc<Vec<u8>>);

    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    /// A large buffer of this thread reaches QUIC as it is, and comes back when QUIC lets go of it; a small one comes back at once.
    #[test]
    fn large_local_buffers_are_not_copied() {
        for (length, copied) in [
            (LOCAL_ZERO_COPY_FROM - 1, true),
            (LOCAL_ZERO_COPY_FROM, false),
        ] {
            let buffer = Rc::new(vec![7; length]);
            let mut queue = SendQueue::default();
            queue.push(&[1; 112], Payload::Local(Box::new(Counted(buffer.clone()))));
            let mut batch = Vec::new();
            queue.take_batch(&mut batch);
            assert_eq!(batch.iter().map(Bytes::len).sum::<usize>(), 112 + length);
            let same = batch.iter().any(|piece| piece.as_ptr() == buffer.as_ptr());
            assert_eq!(same, !copied, "{length}");
            assert_eq!(Rc::strong_count(&buffer), if copied { 1 } else { 2 });
            drop(batch);
            assert_eq!(Rc::strong_count(&buffer), 1);
        }
    }

    /// A frame that leaves alone takes no more memory than it has bytes, however long QUIC holds it.
    #[test]
    fn copies_have_the_room_they_need() {
        for frames in [1, 2, 100] {
            let mut queue = SendQueue::default();
            for _ in 0..frames {
                queue.push(&[1; 112], Payload::Local(Box::new(vec![7; 4096])));
            }
            let mut batch = Vec::new();
            while !queue.is_empty() {
                queue.take_batch(&mut batch);
            }
            let (mut bytes, mut room) = (0, 0);
            for piece in batch {
                bytes += piece.len();
                room += piece.try_into_mut().expect("the only handle").capacity();
            }
            assert_eq!(bytes, frames * 4208);
            assert!(room <= bytes + bytes / 8, "{room} bytes for {bytes}");
        }
    }

    proptest! {
        /// Whatever the mixture, the bytes come out in order and are counted.
        #[test]
        fn order_and_count(frames in proptest::collection::vec((0..4u8, 0..40_000usize), 1..40)) {
            let mut queue = SendQueue::default();
            let mut expected = Vec::new();
            for (number, (kind, length)) in frames.into_iter().enumerate() {
                let header = [number as u8; 112];
                let body = vec![!(number as u8); length];
                expected.extend_from_slice(&header);
                let payload = match kind {
                    0 => Payload::None,
                    1 => Payload::Inline(body.clone()),
                    2 => Payload::Local(Box::new(body.clone())),
                    _ => Payload::Shared(body.clone().into()),
                };
                if kind != 0 {
                    expected.extend_from_slice(&body);
                }
                queue.push(&header, payload);
            }
            prop_assert_eq!(queue.bytes(), expected.len());
            let mut sent = Vec::new();
            while !queue.is_empty() {
                let mut batch = Vec::new();
                queue.take_batch(&mut batch);
                prop_assert!(!batch.is_empty());
                for piece in batch {
                    prop_assert!(!piece.is_empty());
                    queue.accepted(piece.len());
                    sent.extend_from_slice(&piece);
                }
            }
            prop_assert_eq!(sent, expected);
            prop_assert_eq!(queue.bytes(), 0);
        }
    }
}
