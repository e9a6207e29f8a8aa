//! Where internal metadata is: the last whole block of a backing that has data and metadata.
//!
//! ```text
//! 0   magic "HFLOCATE" | 8 version u32 | 12 zero 12 | 24 volume id u128
//! 40  area offset u64 | 48 area size u64 | 56 zeroed from u64 | 64 zeroed to u64
//! 72  crc u32 over bytes 0..72 | 76 zero
//! ```
//!
//! All of it lies in the first 512 bytes of the block, so that a write of it is never torn; the rest of the block
//! is written as zeroes and not looked at.

use crate::bytes::{Fault, Reader, Writer};
use crate::ids::Uuid;
use crate::layout::BLOCK;

/// On-disk version written, and the newest one understood.
pub const LOCATOR_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"HFLOCATE";
const CRC_AT: usize = 72;
/// What one write puts on any disk whole or not at all.
const WHOLE: usize = 512;

/// What the last block of a backing with internal metadata says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Locator {
    pub volume: Uuid,
    /// Byte offset of the metadata area in the backing, a multiple of 4096.
    pub area_offset: u64,
    /// Bytes of the area, a multiple of 4096.
    pub area_size: u64,
    /// From here up to there the volume was grown over what was no data before; it is zeroed before it is used, and this
    /// is empty (both 0) from then on.
    pub zero: (u64, u64),
}

/// Why a block is no locator that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LocatorError {
    #[error("there is no Holdfast metadata at its end")]
    Absent,
    #[error("the locator at its end is damaged or belongs to another size: {0}")]
    Damaged(&'static str),
    #[error(
        "the metadata at its end was placed by a newer version of Holdfast (format {found}, this one understands {LOCATOR_VERSION}); \
         use that version or a newer one"
    )]
    Newer { found: u32 },
}

impl Locator {
    /// Where the locator of a backing of `size` bytes is; none if it has no whole block.
    pub fn offset(size: u64) -> Option<u64> {
        (size - size % BLOCK).checked_sub(BLOCK)
    }

    /// The bytes of the block.
    pub fn encode(&self) -> [u8; BLOCK as usize] {
        let mut w = Writer::with_capacity(CRC_AT);
        w.put(&MAGIC);
        w.u32(LOCATOR_VERSION);
        w.zero(12);
        w.u128(self.volume.0);
        w.u64(self.area_offset);
        w.u64(self.area_size);
        w.u64(self.zero.0);
        w.u64(self.zero.1);
        let mut block = [0; BLOCK as usize];
        block[..CRC_AT].copy_from_slice(&w.into_vec());
        let crc = crc32fast::hash(&block[..CRC_AT]);
        block[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// What the block says of a backing of `size` bytes. Allocates nothing.
    ///
    /// # Errors
    /// Something else is there, it is damaged, its area does not fit before it, or it is of a newer version.
    pub fn decode(block: &[u8; BLOCK as usize], size: u64) -> Result<Locator, LocatorError> {
        if block[..8] != MAGIC {
            return Err(LocatorError::Absent);
        }
        if block[CRC_AT..CRC_AT + 4] != crc32fast::hash(&block[..CRC_AT]).to_le_bytes() {
            return Err(LocatorError::Damaged("its checksum does not match"));
        }
        // Only after the checksum, and before anything else: as in a superblock (D16).
        let found = u32::from_le_bytes([block[8], block[9], block[10], block[11]]);
        if found > LOCATOR_VERSION {
            return Err(LocatorError::Newer { found });
        }
        fields(block, size).map_err(LocatorError::Damaged)
    }
}

fn fields(block: &[u8; BLOCK as usize], size: u64) -> Result<Locator, Fault> {
    let mut r = Reader::new(&block[8..CRC_AT]);
    if r.u32()? == 0 {
        return Err("version 0 never existed");
    }
    r.zero(12)?;
    let locator = Locator {
        volume: Uuid(r.u128()?),
        area_offset: r.u64()?,
        area_size: r.u64()?,
        zero: (r.u64()?, r.u64()?),
    };
    Reader::new(&block[CRC_AT + 4..WHOLE]).zero(WHOLE - CRC_AT - 4)?;
    let whole_blocks =
        locator.area_offset.is_multiple_of(BLOCK) && locator.area_size.is_multiple_of(BLOCK);
    let end = locator.area_offset.checked_add(locator.area_size);
    let inside = end.is_some_and(|end| Locator::offset(size).is_some_and(|last| end <= last));
    if !whole_blocks || !inside {
        return Err("its area does not lie before it");
    }
    if locator.zero.0 > locator.zero.1 || locator.zero.1 > locator.area_offset {
        return Err("what is to be zeroed does not lie before its area");
    }
    Ok(locator)
}
