//! The bytes of frames.
//!
//! ```text
//! 0   magic "HFR1" | 4 version u8 | 5 kind u8 | 6 flags u8 | 7 zero u8
//! 8   payload length u32 | 12 payload crc u32 | 16 service tag u64
//! 24  volume u16 | 26 epoch owner u8 | 27 zero u8 | 28 length u32
//! 32  epoch number u64 | 40 generation u64 | 48 incarnation u64
//! 56  position u64 | 64 dependency u64 | 72 stable position u64 | 80 offset u64
//! 88  zero 20 | 108 crc u32 over bytes 0..108
//! ```

use crate::bytes::{Fault, Reader, Writer, pack, shorten, unpack};
use crate::frame::*;
use crate::ids::*;
use crate::shared::*;

/// Newest wire version this program speaks.
pub const WIRE_VERSION: u8 = 1;
/// Oldest wire version this program still speaks: the one before `WIRE_VERSION`, if there was one.
pub const WIRE_VERSION_MIN: u8 = 1;
/// Features of this program, one bit each. Version 1 has none.
pub const KNOWN_FEATURES: u64 = 0;

const MAGIC: [u8; 4] = *b"HFR1";
const CRC_AT: usize = HEADER_LENGTH - 4;
const TEXT_CAP: usize = 1024;
const NAME_CAP: usize = 64;

/// Why bytes are no frame. The link is closed with the reason; nothing of the frame was applied, and
/// everything acknowledged before it stands (D14).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error(
        "the bytes received are not a Holdfast frame; nothing was applied; check that the configured address and port belong to a Holdfast node"
    )]
    Magic,
    #[error(
        "the header's checksum does not match: it was damaged between the nodes; nothing was applied; if it repeats, check network card and memory"
    )]
    HeaderCrc,
    #[error(
        "the frame is of wire version {0}, this side speaks {WIRE_VERSION_MIN} to {WIRE_VERSION}; nothing was applied; upgrade the older node"
    )]
    Version(u8),
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    #[error("the payload of {0} bytes is larger than allowed")]
    TooLong(u32),
    #[error(
        "the payload does not have the length and checksum its header announced: it was damaged between the nodes; nothing of it was applied; if it repeats, check network card and memory"
    )]
    PayloadCrc,
    #[error("the header is malformed: {0}")]
    Header(&'static str),
    #[error("the payload of a {kind:?} frame is malformed: {fault}")]
    Body {
        kind: FrameKind,
        fault: &'static str,
    },
    #[error("a {kind:?} frame cannot carry this body ({fault}): it was not sent; this is a defect")]
    Unencodable {
        kind: FrameKind,
        fault: &'static str,
    },
    #[error(transparent)]
    Incompatible(#[from] VersionError),
}

/// Two versions that cannot talk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    #[error(
        "the peer speaks wire versions {theirs_min} to {theirs_max}, this node {WIRE_VERSION_MIN} to {WIRE_VERSION}; upgrade the older one by one version at a time"
    )]
    Version { theirs_min: u8, theirs_max: u8 },
    #[error("the peer requires features this version does not have ({0:#x}); upgrade this node")]
    Features(u64),
}

impl Hello {
    /// A hello with this version's numbers and empty facts, to be filled in by the caller.
    pub fn new(node: Uuid, slot: Slot, service: Uuid, facts: Facts) -> Hello {
        Hello {
            node,
            slot,
            service,
            software: concat!("holdfast ", env!("CARGO_PKG_VERSION")).to_owned(),
            version_min: WIRE_VERSION_MIN,
            version_max: WIRE_VERSION,
            features_required: 0,
            features_supported: KNOWN_FEATURES,
            facts,
        }
    }

    /// Whether this side can talk to the sender, and in which version.
    ///
    /// # Errors
    /// No version in common, or a feature this side lacks.
    pub fn negotiate(&self) -> Result<u8, VersionError> {
        negotiate(self.version_min, self.version_max, self.features_required)
    }
}

fn negotiate(theirs_min: u8, theirs_max: u8, required: u64) -> Result<u8, VersionError> {
    let version = theirs_max.min(WIRE_VERSION);
    if version < theirs_min || version < WIRE_VERSION_MIN {
        return Err(VersionError::Version {
            theirs_min,
            theirs_max,
        });
    }
    let missing = required & !KNOWN_FEATURES;
    if missing != 0 {
        return Err(VersionError::Features(missing));
    }
    Ok(version)
}

/// The bytes of a header.
pub fn encode_header(h: &FrameHeader) -> [u8; HEADER_LENGTH] {
    let mut b = [0u8; HEADER_LENGTH];
    b[0..4].copy_from_slice(&MAGIC);
    // What is sent before anything is negotiated goes out as the oldest peer reads it.
    b[4] = match h.kind {
        FrameKind::Hello | FrameKind::Goodbye => WIRE_VERSION_MIN,
        _ => WIRE_VERSION,
    };
    b[5] = h.kind.code();
    b[6] = pack([h.flags.fua, h.flags.unmap, h.flags.failed]);
    b[8..12].copy_from_slice(&h.payload_length.to_le_bytes());
    b[12..16].copy_from_slice(&h.payload_crc.to_le_bytes());
    b[16..24].copy_from_slice(&h.service_tag.to_le_bytes());
    b[24..26].copy_from_slice(&h.volume.0.to_le_bytes());
    b[26] = h.epoch.owner;
    b[28..32].copy_from_slice(&h.length.to_le_bytes());
    for (i, value) in [
        h.epoch.number,
        h.generation.0,
        h.incarnation.0,
        h.position,
        h.dependency,
        h.stable_position,
        h.offset,
    ]
    .into_iter()
    .enumerate()
    {
        b[32 + i * 8..40 + i * 8].copy_from_slice(&value.to_le_bytes());
    }
    let crc = crc32fast::hash(&b[..CRC_AT]);
    b[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    b
}

/// The header in these bytes. Allocates nothing.
///
/// # Errors
/// Anything that is not exactly what [`encode_header`] makes.
pub fn decode_header(b: &[u8; HEADER_LENGTH]) -> Result<FrameHeader, FrameError> {
    if b[..4] != MAGIC {
        return Err(FrameError::Magic);
    }
    if b[CRC_AT..] != crc32fast::hash(&b[..CRC_AT]).to_le_bytes() {
        return Err(FrameError::HeaderCrc);
    }
    if !(WIRE_VERSION_MIN..=WIRE_VERSION).contains(&b[4]) {
        return Err(FrameError::Version(b[4]));
    }
    let kind = FrameKind::from_code(b[5]).ok_or(FrameError::Kind(b[5]))?;
    let header = header_fields(kind, &b[6..CRC_AT]).map_err(FrameError::Header)?;
    if header.payload_length > MAX_PAYLOAD {
        return Err(FrameError::TooLong(header.payload_length));
    }
    if header.payload_length == 0 && header.payload_crc != 0 {
        return Err(FrameError::Header(
            "it has no payload, but a checksum of one",
        ));
    }
    if header.offset.checked_add(header.length.into()).is_none() {
        return Err(FrameError::Header(
            "its range ends beyond what a volume can hold",
        ));
    }
    if kind.carries_data() && header.payload_length != header.length {
        return Err(FrameError::Header(
            "a data frame's payload is not as long as its range",
        ));
    }
    Ok(header)
}

fn header_fields(kind: FrameKind, bytes: &[u8]) -> Result<FrameHeader, Fault> {
    let mut r = Reader::new(bytes);
    let [fua, unmap, failed] = unpack(r.flags(0b111)?);
    r.zero(1)?;
    let payload_length = r.u32()?;
    let payload_crc = r.u32()?;
    let service_tag = r.u64()?;
    let volume = volume_of(r.u16()?)?;
    let owner = r.u8()?;
    r.zero(1)?;
    let length = r.u32()?;
    let epoch = epoch_of(r.u64()?, owner)?;
    let header = FrameHeader {
        kind,
        flags: FrameFlags { fua, unmap, failed },
        payload_length,
        payload_crc,
        service_tag,
        volume,
        epoch,
        generation: GenerationId(r.u64()?),
        incarnation: Incarnation(r.u64()?),
        position: r.u64()?,
        dependency: r.u64()?,
        stable_position: r.u64()?,
        offset: r.u64()?,
        length,
    };
    r.zero(20)?;
    Ok(header)
}

/// The checksum of a payload, as it stands in the header.
pub fn payload_crc(payload: &[u8]) -> u32 {
    if payload.is_empty() {
        0
    } else {
        crc32fast::hash(payload)
    }
}

/// Whether this payload is the one the header speaks of.
///
/// # Errors
/// Another length or checksum.
pub fn check_payload(header: &FrameHeader, payload: &[u8]) -> Result<(), FrameError> {
    if payload.len() != header.payload_length as usize || payload_crc(payload) != header.payload_crc
    {
        return Err(FrameError::PayloadCrc);
    }
    Ok(())
}

impl FrameKind {
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
        Body::ResyncDone { position } => w.u64(*position),
        Body::InSync { set, version } => {
            w.u8(set.0);
            w.u64(*version);
        }
        Body::PromoteRequest { epoch } => put_epoch(&mut w, *epoch),
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
        Body::Grow { size } => w.u64(*size),
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

/// What the first bytes of a `Hello` say, which no version changes: a node too far apart is told apart from
/// one that sends nonsense.
fn incompatible(kind: FrameKind, payload: &[u8]) -> Option<VersionError> {
    if kind != FrameKind::Hello {
        return None;
    }
    let mut r = Reader::new(payload);
    let (min, max, required) = (r.u8().ok()?, r.u8().ok()?, r.u64().ok()?);
    negotiate(min, max, required).err()
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
            if count != 0 && count != crate::bitmap_page::PAGE_WORDS {
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
        FrameKind::ResyncDone => Body::ResyncDone { position: r.u64()? },
        FrameKind::InSync => Body::InSync {
            set: SlotSet(r.u8()?),
            version: r.u64()?,
        },
        FrameKind::PromoteRequest => Body::PromoteRequest {
            epoch: take_epoch(r)?,
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
        FrameKind::Grow => Body::Grow { size: r.u64()? },
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

fn put_text(w: &mut Writer, text: &str, cap: usize) {
    let text = shorten(text, cap);
    w.u16(text.len() as u16);
    w.put(text.as_bytes());
}

fn take_text(r: &mut Reader, cap: usize) -> Result<String, Fault> {
    let length = usize::from(r.u16()?);
    r.text(length, cap)
}

fn put_epoch(w: &mut Writer, epoch: Epoch) {
    w.u64(epoch.number);
    w.u8(epoch.owner);
}

fn take_epoch(r: &mut Reader) -> Result<Epoch, Fault> {
    let number = r.u64()?;
    epoch_of(number, r.u8()?)
}

/// The first 18 bytes of a `Hello` and what is in its sections never change: a later version appends to a
/// section or adds one at the end, and its neighbour leaves that unread. What must not be left unread is a
/// required feature.
fn section(w: &mut Writer, fill: impl FnOnce(&mut Writer)) {
    let mut inner = Writer::with_capacity(256);
    fill(&mut inner);
    let bytes = inner.into_vec();
    w.u16(bytes.len() as u16);
    w.put(&bytes);
}

fn put_hello(w: &mut Writer, h: &Hello) {
    w.u8(h.version_min);
    w.u8(h.version_max);
    w.u64(h.features_required);
    w.u64(h.features_supported);
    section(w, |w| {
        w.u128(h.node.0);
        w.u8(h.slot.0);
        w.u128(h.service.0);
        put_text(w, &h.software, NAME_CAP);
    });
    section(w, |w| put_facts(w, &h.facts));
    section(w, |w| {
        w.u16(h.facts.generations.len() as u16);
        for generation in &h.facts.generations {
            put_generation(w, generation);
        }
    });
    section(w, |w| {
        w.u16(h.facts.volumes.len() as u16);
        for v in &h.facts.volumes {
            w.u16(v.index.0);
            w.u128(v.volume.0);
            w.u128(v.disk.0);
            w.u64(v.size);
            w.u32(v.sector_size);
            w.u8(v.grain_shift);
            w.u8(u8::from(v.blank));
        }
    });
    section(w, |w| put_about(w, &h.facts.about_peer));
}

/// The next section; what a later version appended to it is left unread.
fn open<'a>(r: &mut Reader<'a>) -> Result<Reader<'a>, Fault> {
    let length = usize::from(r.u16()?);
    Ok(Reader::new(r.take(length)?))
}

fn take_hello(r: &mut Reader) -> Result<Hello, Fault> {
    let (version_min, version_max) = (r.u8()?, r.u8()?);
    let (features_required, features_supported) = (r.u64()?, r.u64()?);
    let mut s = open(r)?;
    let (node, slot, service) = (Uuid(s.u128()?), slot_of(s.u8()?)?, Uuid(s.u128()?));
    let software = take_text(&mut s, NAME_CAP)?;
    let mut facts = take_facts(&mut open(r)?)?;
    let mut s = open(r)?;
    let count = usize::from(s.u16()?);
    if count > crate::metadata::MAX_GENERATIONS {
        return Err("too many generations");
    }
    for _ in 0..count {
        facts.generations.push(take_generation(&mut s)?);
    }
    let mut s = open(r)?;
    let count = usize::from(s.u16()?);
    if count > MAX_VOLUMES {
        return Err("too many volumes");
    }
    for _ in 0..count {
        facts.volumes.push(VolumeFacts {
            index: volume_of(s.u16()?)?,
            volume: Uuid(s.u128()?),
            disk: Uuid(s.u128()?),
            size: s.u64()?,
            sector_size: s.u32()?,
            grain_shift: s.u8()?,
            blank: s.flags(1)? == 1,
        });
    }
    facts.about_peer = take_about(&mut open(r)?)?;
    // Sections of a later version.
    while r.remaining() > 0 {
        open(r)?;
    }
    Ok(Hello {
        node,
        slot,
        service,
        software,
        version_min,
        version_max,
        features_required,
        features_supported,
        facts,
    })
}

fn put_facts(w: &mut Writer, f: &Facts) {
    w.u8(f.slot.0);
    w.u128(f.disk.0);
    w.u64(f.attach_counter);
    w.u64(f.incarnation.0);
    put_epoch(w, f.epoch);
    w.u8(f.state.code());
    w.u8(copy_flags_code(f.flags));
    w.u8(pack([
        f.is_primary,
        f.unclean_start,
        f.generations_cut,
        f.undo_intact,
    ]));
    w.u8(f.mode.code());
    w.u8(f.on_peer_loss.code());
    w.u64(f.position);
    w.u64(f.issued);
    w.u64(f.target_of.0);
    w.u8(f.target_source);
    w.u64(f.before_resync.0.0);
    w.u64(f.before_resync.1);
    w.u8(f.in_sync.0);
    w.u64(f.in_sync_version);
    w.u8(f.in_sync_pending.0);
}

fn take_facts(r: &mut Reader) -> Result<Facts, Fault> {
    let slot = slot_of(r.u8()?)?;
    let disk = Uuid(r.u128()?);
    let attach_counter = r.u64()?;
    let incarnation = Incarnation(r.u64()?);
    let epoch = take_epoch(r)?;
    let state =
        crate::metadata::CopyState::from_code(r.u8()?).ok_or("the state of the copy is unknown")?;
    let flags = take_copy_flags(r)?;
    let [is_primary, unclean_start, generations_cut, undo_intact] = unpack(r.flags(0b1111)?);
    let mode = crate::metadata::Mode::from_code(r.u8()?).ok_or("the mode is unknown")?;
    let on_peer_loss =
        crate::metadata::OnPeerLoss::from_code(r.u8()?).ok_or("the policy is unknown")?;
    Ok(Facts {
        slot,
        disk,
        attach_counter,
        incarnation,
        epoch,
        state,
        flags,
        is_primary,
        unclean_start,
        mode,
        on_peer_loss,
        generations: Vec::new(),
        generations_cut,
        position: r.u64()?,
        issued: r.u64()?,
        target_of: GenerationId(r.u64()?),
        target_source: slot_or_none(r.u8()?)?,
        before_resync: (GenerationId(r.u64()?), r.u64()?),
        undo_intact,
        in_sync: SlotSet(r.u8()?),
        in_sync_version: r.u64()?,
        in_sync_pending: SlotSet(r.u8()?),
        volumes: Vec::new(),
        about_peer: PeerFacts::default(),
    })
}

fn put_about(w: &mut Writer, p: &PeerFacts) {
    w.u8(pack([p.known, p.full_copy]));
    w.u128(p.disk.0);
    w.u64(p.attach_counter);
    w.u64(p.incarnation.0);
    w.u64(p.bitmap_base.0);
    w.u64(p.bits);
    w.u64(p.bytes);
    w.u64(p.known_durable_generation.0);
    w.u64(p.known_durable_position);
}

fn take_about(r: &mut Reader) -> Result<PeerFacts, Fault> {
    let [known, full_copy] = unpack(r.flags(0b11)?);
    Ok(PeerFacts {
        known,
        full_copy,
        disk: Uuid(r.u128()?),
        attach_counter: r.u64()?,
        incarnation: Incarnation(r.u64()?),
        bitmap_base: GenerationId(r.u64()?),
        bits: r.u64()?,
        bytes: r.u64()?,
        known_durable_generation: GenerationId(r.u64()?),
        known_durable_position: r.u64()?,
    })
}
