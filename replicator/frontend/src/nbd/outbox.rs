//! Answers on their way to the socket, gathered so that one send carries many.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::volume::Buffer;

use super::wire::ReplyHead;

/// What follows a reply's head.
pub(super) enum Body<B> {
    Nothing,
    /// A read's bytes, sent from the volume's own memory.
    Buffer(B),
    Bytes(Vec<u8>),
}

impl<B: Buffer> Body<B> {
    fn as_slice(&self) -> &[u8] {
        match self {
            Body::Nothing => &[],
            Body::Buffer(buffer) => buffer.as_slice(),
            Body::Bytes(bytes) => bytes,
        }
    }
}

struct Reply<B> {
    head: ReplyHead,
    body: Body<B>,
    /// Payload bytes that count against the connection's limit until this is sent.
    charge: u64,
}

/// Replies in the order they will be sent.
pub(super) struct Outbox<B> {
    replies: VecDeque<Reply<B>>,
    /// Bytes of the front reply that are sent already.
    sent: usize,
}

impl<B: Buffer> Outbox<B> {
    pub fn new(capacity: usize) -> Self {
        Outbox {
            replies: VecDeque::with_capacity(capacity),
            sent: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.replies.len()
    }

    pub fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    pub fn push(&mut self, head: ReplyHead, body: Body<B>, charge: u64) {
        self.replies.push_back(Reply { head, body, charge });
    }

    /// Fills `slices` from the first unsent byte on; returns how many it filled.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.sent;
        let mut filled = 0;
        for reply in &self.replies {
            for part in [reply.head.as_slice(), reply.body.as_slice()] {
                if skip >= part.len() {
                    skip -= part.len();
                    continue;
                }
                let Some(slice) = slices.get_mut(filled) else {
                    return filled;
                };
                *slice = IoSlice::new(&part[skip..]);
                skip = 0;
                filled += 1;
            }
        }
        filled
    }

    /// The first `n` unsent bytes are sent. Returns the charge of the replies that are complete with them.
    pub fn sent(&mut self, n: usize) -> u64 {
        self.sent += n;
        let mut freed = 0;
        while let Some(front) = self.replies.front() {
            let length = front.head.as_slice().len() + front.body.as_slice().len();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            freed += front.charge;
            self.replies.pop_front();
        }
        assert!(
            !self.replies.is_empty() || self.sent == 0,
            "more bytes reported sent than were gathered"
        );
        freed
    }
}
