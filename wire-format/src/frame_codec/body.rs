//! What the payload of a frame says, where it is not raw block data.

use super::FrameError;
use super::hello::{incompatible, put_hello, take_hello};
use crate::bytes::{Fault, Reader, Writer, pack, shorten, unpack};
use crate::frame::*;
use crate::ids::*;
use crate::shared::*;

const TEXT_CAP: usize = 1024;

impl FrameKind {
    /// Sent without knowing what the other node speaks: understood in any version, and sent in the oldest one.
    pub const fn precedes_agreement(self) -> bool {
        matches!(self, FrameKind::Hello | FrameKind::Goodbye)
    }

    /// The payload is raw block data.
    pub const fn carries_data(self) -> bool {
        matches!(
            self,
            FrameKind::Write | FrameKind::ResyncData | FrameKind::ReadReply
        )
    }

    /// Frames of this kind have such a body. `Empty` is the body of kinds whose header says all.
    pub const fn carries(self, body: &Body) -> bool {
        use FrameKind as K;
        match body {
            Body::Empty => matches!(
                self,
                K::BitmapEnd
                    | K::Ready
                    | K::Zero
                    | K::Flush
                    | K::ReceivedAck
                    | K::Heartbeat
                    | K::ResyncZero
                    | K::CompleteAck
                    | K::Demoted
                    | K::DiskLostAck
                    | K::ReadRequest
            ),
            Body::Hello(_) => matches!(self, K::Hello),
            Body::Bitmap { .. } => matches!(self, K::Bitmap),
            Body::Goodbye { .. } => matches!(self, K::Goodbye),
            Body::Acks { .. } => matches!(self, K::WriteAck | K::ResyncAck),
            Body::FlushAck { .. } => matches!(self, K::FlushAck),
            Body::ResyncDone { .. } => matches!(self, K::ResyncDone),
            Body::InSync { .. } => matches!(self, K::InSync),
            Body::PromoteRequest { .. } => matches!(self, K::PromoteRequest),
            Body::PromoteReply { .. } => matches!(self, K::PromoteReply),
            Body::NewGeneration { .. } => matches!(self, K::NewGeneration),
            Body::GenerationAck { .. } => matches!(self, K::GenerationAck),
            Body::Verify { .. } => matches!(self, K::VerifyRequest),
            Body::VerifyReply { .. } => matches!(self, K::VerifyReply),
            Body::DiskLost { .. } => matches!(self, K::DiskLost),
            Body::Grow { .. } => matches!(self, K::Grow),
        }
    }
}

/// The bytes of a body for a frame of that kind, checked: what [`decode_body`] would refuse is not sent.
///
/// # Errors
/// [`FrameError::Unencodable`] for a body that the kind does not carry, or one over a cap.
pub fn encode_body_for(kind: FrameKind, body: &Body) -> Result<Vec<u8>, FrameError> {
    let fault = |fault| FrameError::Unencodable { kind, fault };
    if !kind.carries(body) {
        return Err(fault("the kind and the body do not belong together"));
    }
    let bytes = encode_body(body);
    match decode_body(kind, &bytes) {
        Ok(_) => Ok(bytes),
        Err(FrameError::Body { fault: why, .. }) => Err(fault(why)),
        Err(_) => Err(fault("the other node could not read it")),
    }
}

/// The bytes of a body; empty for [`Body::Empty`]. Texts for a person are cut to their cap. That the body
/// belongs to the frame's kind and keeps its caps is up to the caller; [`encode_body_for`] checks it.
pub fn encode_body(body: &Body) -> Vec<u8> {
    let mut w = Writer::with_capacity(64);
    match body {
        Body::Empty => {}
        Body::Hello(hello) => put_hello(&mut w, hello),
        Body::Bitmap {
            volume,
            page,
            grain_shift,
            words,
        } => {
            w.u16(volume.0);
            w.u8(*grain_shift);
            w.zero(5);
            w.u64(*page);
            w.u32(words.len() as u32);
            for word in words {
                w.u64(*word);
            }
        }
        Body::Goodbye { code, text } => {
            w.u8(code.code());
            put_text(&mut w, text, TEXT_CAP);
        }
        Body::Acks { runs } => {
            w.u32(runs.len() as u32);
            for (first, last) in runs {
                w.u64(*first);
                w.u64(*last);
            }
        }
        Body::FlushAck {
            position,
            resync_sequence,
        } => {
            w.u64(*position);
            w.u64(*resync_sequence);
        }
        Body::ResyncDone { position, equal } => {
            w.u64(*position);
            w.u8(equal.0);
        }
        Body::InSync { set, version } => {
            w.u8(set.0);
            w.u64(*version);
        }
        Body::PromoteRequest {
            epoch,
            in_sync,
            force,
        } => {
            put_epoch(&mut w, *epoch);
            w.u8(in_sync.0);
            w.u8(pack([*force]));
        }
        Body::PromoteReply {
            epoch,
            accepted,
            reason,
        } => {
            put_epoch(&mut w, *epoch);
            w.u8(u8::from(*accepted));
            put_text(&mut w, reason, TEXT_CAP);
        }
        Body::NewGeneration { generation } => put_generation(&mut w, generation),
        Body::GenerationAck { generation } => w.u64(generation.0),
        Body::Verify { sequence, digest } => {
            w.u64(*sequence);
            w.u128(*digest);
        }
        Body::VerifyReply {
            sequence,
            equal,
            failed,
        } => {
            w.u64(*sequence);
            w.u8(pack([*equal, *failed]));
        }
        Body::DiskLost {
            generation_cause,
            position,
        } => {
            w.u8(generation_cause.code());
            w.u64(*position);
        }
        Body::Grow { size, step, text } => {
            w.u64(*size);
            w.u8(step.code());
            put_text(&mut w, text, TEXT_CAP);
        }
    }
    w.into_vec()
}

/// The body of a frame of this kind; check the payload first ([`check_payload`]). Allocates at most 16 KiB,
/// whatever the bytes: every count and length is held against its cap before anything is allocated for it.
///
/// # Errors
/// Bytes that are not exactly what [`encode_body`] makes for that kind (a `Hello` may have more, of a later
/// version). [`FrameError::Incompatible`] if a `Hello` can't be read and its version says why.
pub fn decode_body(kind: FrameKind, payload: &[u8]) -> Result<Body, FrameError> {
    let mut r = Reader::new(payload);
    body(kind, &mut r)
        .and_then(|body| r.end().map(|()| body))
        .map_err(|fault| match incompatible(kind, payload) {
            Some(why) => why.into(),
            None => FrameError::Body { kind, fault },
        })
}

fn body(kind: FrameKind, r: &mut Reader) -> Result<Body, Fault> {
    Ok(match kind {
        FrameKind::Hello => Body::Hello(Box::new(take_hello(r)?)),
        FrameKind::Bitmap => {
            let volume = volume_of(r.u16()?)?;
            let grain_shift = r.u8()?;
            r.zero(5)?;
            let page = r.u64()?;
            let count = r.u32()? as usize;
            if count != 0 && count != BITMAP_WORDS {
                return Err("a page of bits has another length");
            }
            let words = (0..count).map(|_| r.u64()).collect::<Result<_, _>>()?;
            Body::Bitmap {
                volume,
                page,
                grain_shift,
                words,
            }
        }
        FrameKind::Goodbye => {
            let code = GoodbyeCode::from_code(r.u8()?).ok_or("the reason is unknown")?;
            Body::Goodbye {
                code,
                text: take_text(r, TEXT_CAP)?,
            }
        }
        FrameKind::WriteAck | FrameKind::ResyncAck => {
            let count = r.u32()? as usize;
            if count > MAX_ACK_RUNS {
                return Err("too many runs");
            }
            let mut runs = Vec::with_capacity(count);
            let mut above = None;
            for _ in 0..count {
                let (first, last) = (r.u64()?, r.u64()?);
                if above.is_some_and(|above| first <= above)
                    || first > last
                    || last == u64::MAX
                    || last - first > 1 << 24
                {
                    return Err("runs are sorted, disjoint and bounded");
                }
                above = Some(last);
                runs.push((first, last));
            }
            Body::Acks { runs }
        }
        FrameKind::FlushAck => Body::FlushAck {
            position: r.u64()?,
            resync_sequence: r.u64()?,
        },
        FrameKind::ResyncDone => Body::ResyncDone {
            position: r.u64()?,
            equal: SlotSet(r.u8()?),
        },
        FrameKind::InSync => Body::InSync {
            set: SlotSet(r.u8()?),
            version: r.u64()?,
        },
        FrameKind::PromoteRequest => Body::PromoteRequest {
            epoch: take_epoch(r)?,
            in_sync: SlotSet(r.u8()?),
            force: r.flags(1)? == 1,
        },
        FrameKind::PromoteReply => {
            let epoch = take_epoch(r)?;
            let accepted = r.flags(1)? == 1;
            Body::PromoteReply {
                epoch,
                accepted,
                reason: take_text(r, TEXT_CAP)?,
            }
        }
        FrameKind::NewGeneration => Body::NewGeneration {
            generation: take_generation(r)?,
        },
        FrameKind::GenerationAck => Body::GenerationAck {
            generation: GenerationId(r.u64()?),
        },
        FrameKind::VerifyRequest => Body::Verify {
            sequence: r.u64()?,
            digest: r.u128()?,
        },
        FrameKind::VerifyReply => {
            let sequence = r.u64()?;
            let [equal, failed] = unpack(r.flags(0b11)?);
            Body::VerifyReply {
                sequence,
                equal,
                failed,
            }
        }
        FrameKind::DiskLost => Body::DiskLost {
            generation_cause: crate::metadata::GenerationCause::from_code(r.u8()?)
                .ok_or("the cause is unknown")?,
            position: r.u64()?,
        },
        FrameKind::Grow => Body::Grow {
            size: r.u64()?,
            step: GrowStep::from_code(r.u8()?).ok_or("the step of a growth is unknown")?,
            text: take_text(r, TEXT_CAP)?,
        },
        FrameKind::Write | FrameKind::ResyncData | FrameKind::ReadReply => {
            return Err("it carries block data, not a body");
        }
        FrameKind::BitmapEnd
        | FrameKind::Ready
        | FrameKind::Zero
        | FrameKind::Flush
        | FrameKind::ReceivedAck
        | FrameKind::Heartbeat
        | FrameKind::ResyncZero
        | FrameKind::CompleteAck
        | FrameKind::Demoted
        | FrameKind::DiskLostAck
        | FrameKind::ReadRequest => Body::Empty,
    })
}

pub(super) fn put_text(w: &mut Writer, text: &str, cap: usize) {
    let text = shorten(text, cap);
    w.u16(text.len() as u16);
    w.put(text.as_bytes());
}

pub(super) fn take_text(r: &mut Reader, cap: usize) -> Result<String, Fault> {
    let length = usize::from(r.u16()?);
    r.text(length, cap)
}

pub(super) fn put_epoch(w: &mut Writer, epoch: Epoch) {
    w.u64(epoch.number);
    w.u8(epoch.owner);
}

pub(super) fn take_epoch(r: &mut Reader) -> Result<Epoch, Fault> {
    let number = r.u64()?;
    epoch_of(number, r.u8()?)
}
