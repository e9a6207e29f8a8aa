//! The fixed part of every frame.
//!
//! ```text
//! 0   magic "HFR1" | 4 version u8 | 5 kind u8 | 6 flags u8 | 7 zero u8
//! 8   payload length u32 | 12 payload crc u32 | 16 service tag u64
//! 24  volume u16 | 26 epoch owner u8 | 27 zero u8 | 28 length u32
//! 32  epoch number u64 | 40 generation u64 | 48 incarnation u64
//! 56  position u64 | 64 dependency u64 | 72 stable position u64 | 80 offset u64
//! 88  zero 20 | 108 crc u32 over bytes 0..108
//! ```

use super::{FrameError, WIRE_VERSION, WIRE_VERSION_MIN};
use crate::bytes::{Fault, Reader, pack, unpack};
use crate::frame::*;
use crate::ids::*;
use crate::shared::*;

const MAGIC: [u8; 4] = *b"HFR1";
const CRC_AT: usize = HEADER_LENGTH - 4;

/// The bytes of a header.
pub fn encode_header(h: &FrameHeader) -> [u8; HEADER_LENGTH] {
    let mut b = [0u8; HEADER_LENGTH];
    b[0..4].copy_from_slice(&MAGIC);
    b[4] = h.version;
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
    let (version, kind) = (b[4], FrameKind::from_code(b[5]));
    let spoken = (WIRE_VERSION_MIN..=WIRE_VERSION).contains(&version);
    // What two nodes say before they agreed, or because they do not agree, is understood in any version.
    let understood = spoken || version != 0 && kind.is_some_and(FrameKind::precedes_agreement);
    if !understood {
        return Err(FrameError::Version(version));
    }
    let kind = kind.ok_or(FrameError::Kind(b[5]))?;
    let header = header_fields(version, kind, &b[6..CRC_AT]).map_err(FrameError::Header)?;
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

fn header_fields(version: u8, kind: FrameKind, bytes: &[u8]) -> Result<FrameHeader, Fault> {
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
        version,
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
