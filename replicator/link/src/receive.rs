//! From the bytes of a stream to frames: header, room for the payload, payload, CRC.

use crate::api::{LinkHandler, Received};
use bytes::{Buf, Bytes};
use crc32fast::Hasher;
use holdfast_wire_format::frame::{FrameHeader, HEADER_LENGTH, MAX_PAYLOAD, service_tag};
use holdfast_wire_format::frame_codec::{check_payload, decode_header};
use holdfast_wire_format::ids::Uuid;
use std::future::Future;

enum Target<B> {
    Control(Vec<u8>),
    Data { buffer: B, filled: usize },
}

struct Payload<B> {
    header: FrameHeader,
    target: Target<B>,
    /// Over what has arrived, while it is still in the processor's cache.
    crc: Hasher,
}

enum State<B> {
    Header {
        bytes: [u8; HEADER_LENGTH],
        filled: usize,
    },
    Payload(Payload<B>),
}

/// A frame under way.
pub(crate) struct Receiver<B> {
    service: Uuid,
    state: State<B>,
}

fn at_header<B>() -> State<B> {
    State::Header {
        bytes: [0; HEADER_LENGTH],
        filled: 0,
    }
}

impl<B: AsMut<[u8]> + 'static> Receiver<B> {
    pub fn new(service: Uuid) -> Self {
        Receiver {
            service,
            state: at_header(),
        }
    }

    /// The stream may end here.
    pub fn between_frames(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// Takes bytes from `chunk` up to the end of one frame. `None`: the chunk is used up first. `waiting` wraps the wait for memory.
    ///
    /// # Errors
    /// What is wrong with the frame. Nothing of it was delivered, and nothing more must be fed.
    pub async fn feed<H, W>(
        &mut self,
        chunk: &mut Bytes,
        handler: &H,
        waiting: W,
    ) -> Result<Option<(FrameHeader, Received<B>)>, String>
    where
        H: LinkHandler<Buf = B>,
        W: AsyncFnOnce(std::pin::Pin<&mut dyn Future<Output = B>>) -> B,
    {
        if let State::Header { bytes, filled } = &mut self.state {
            let take = (HEADER_LENGTH - *filled).min(chunk.len());
            chunk.copy_to_slice(&mut bytes[*filled..*filled + take]);
            *filled += take;
            if *filled < HEADER_LENGTH {
                return Ok(None);
            }
            let header = decode_header(bytes).map_err(|e| e.to_string())?;
            self.check(&header)?;
            let length = header.payload_length as usize;
            if length == 0 {
                check_payload(&header, &[]).map_err(|e| e.to_string())?;
                self.state = at_header();
                return Ok(Some((header, Received::None)));
            }
            let target = if header.kind.carries_data() {
                let allocation = std::pin::pin!(handler.alloc(self.service, &header, length));
                let mut buffer = waiting(allocation).await;
                assert!(
                    buffer.as_mut().len() >= length,
                    "alloc gives at least what was asked for"
                );
                Target::Data { buffer, filled: 0 }
            } else {
                Target::Control(Vec::with_capacity(length))
            };
            self.state = State::Payload(Payload {
                header,
                target,
                crc: Hasher::new(),
            });
        }
        let State::Payload(payload) = &mut self.state else {
            unreachable!("a header was completed above")
        };
        if !payload.fill(chunk) {
            return Ok(None);
        }
        let State::Payload(done) = std::mem::replace(&mut self.state, at_header()) else {
            unreachable!("it was a payload a line ago")
        };
        let crc = done.crc.finalize();
        if crc != done.header.payload_crc {
            return Err(format!(
                "the payload of {:?} at position {} has CRC {crc:08x}, and its header says {:08x}",
                done.header.kind, done.header.position, done.header.payload_crc
            ));
        }
        let received = match done.target {
            Target::Control(bytes) => Received::Control(bytes),
            Target::Data { buffer, .. } => Received::Data(buffer),
        };
        Ok(Some((done.header, received)))
    }

    fn check(&self, header: &FrameHeader) -> Result<(), String> {
        if header.service_tag != service_tag(self.service) {
            return Err(format!(
                "{:?} carries service tag {:016x} on the stream of service {}",
                header.kind, header.service_tag, self.service
            ));
        }
        // The codec checks this too; memory is asked for by this number, so it is worth a second look.
        if header.payload_length > MAX_PAYLOAD {
            return Err(format!(
                "{:?} claims {} bytes of payload",
                header.kind, header.payload_length
            ));
        }
        Ok(())
    }
}

impl<B: AsMut<[u8]>> Payload<B> {
    /// Copies what belongs to this payload; true when it is complete.
    fn fill(&mut self, chunk: &mut Bytes) -> bool {
        let length = self.header.payload_length as usize;
        match &mut self.target {
            Target::Control(bytes) => {
                let part = chunk.split_to((length - bytes.len()).min(chunk.len()));
                self.crc.update(&part);
                bytes.extend_from_slice(&part);
                bytes.len() == length
            }
            Target::Data { buffer, filled } => {
                let take = (length - *filled).min(chunk.len());
                let part = &mut buffer.as_mut()[*filled..*filled + take];
                chunk.copy_to_slice(part);
                self.crc.update(part);
                *filled += take;
                *filled == length
            }
        }
    }
}
