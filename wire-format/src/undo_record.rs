//! The undo log of a resync target (D12): what blocks held before they were first overwritten.
//!
//! The log is in the undo area of the lead volume and speaks of all volumes of the service. The area's first
//! block is the head; records follow from byte 4096 on, each a header of 4096 bytes and its data, padded to
//! 4096. The head is written once, before the first overwrite of the resync, and zeroed when the log is
//! dropped, so a torn head is one that nothing depends on yet or any more.
//!
//! ```text
//! head:    0 magic u32 | 4 crc u32 over bytes 8.. | 8 session u64 | 16 target generation u64
//!          24 generation u64 | 32 position u64 | 40 state u8 | 41 zero
//! record:  0 magic u32 | 4 crc u32 over bytes 8.. | 8 session u64 | 16 target generation u64
//!          24 sequence u64 | 32 entries u16 | 34 zero 30
//!          64 128 entries of 24 bytes: offset u64, length u32, data crc u32, volume u16, flags u8, zero 5
//! ```

use crate::bytes::{Fault, Reader, Writer};
use crate::ids::*;
use crate::metadata::CopyState;
use crate::shared::volume_of;
use std::ops::Range;

/// Bytes of the head, of a record's header, and the unit of every size in the log.
pub const UNDO_BLOCK: usize = 4096;
/// Place of the first record in the undo area.
pub const FIRST_RECORD: u64 = UNDO_BLOCK as u64;
/// Most entries of one record.
pub const MAX_UNDO_ENTRIES: usize = 128;
/// Most bytes one entry stands for.
pub const MAX_UNDO_LENGTH: u32 = 1 << 20;
/// Most bytes of data behind one header.
pub const MAX_UNDO_DATA: u64 = 4 << 20;

const HEAD_MAGIC: u32 = 0x4855_4648; // "HFUH"
const RECORD_MAGIC: u32 = 0x5255_4648; // "HFUR"
const ENTRIES_AT: usize = 64;
const ENTRY_LENGTH: usize = 24;
/// The old content was all zero; no data is stored.
const ZERO: u8 = 1;
/// Offsets and lengths are whole sectors of the smallest size.
const UNIT: u64 = 512;

const _: () = assert!(ENTRIES_AT + MAX_UNDO_ENTRIES * ENTRY_LENGTH <= UNDO_BLOCK);

/// Why a block is no head or record. After the last record of a session this is what the log ends with; in
/// place of the head it means that there is no undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UndoError {
    #[error("the undo log does not go on here")]
    Absent,
    #[error("a block of the undo log is torn or damaged: its checksum does not match")]
    Crc,
    #[error("a block of the undo log is malformed: {0}")]
    Malformed(&'static str),
    #[error(
        "the saved content of volume {volume} at byte {offset} is damaged: the resync can't be undone; bring back its source"
    )]
    Data { volume: u16, offset: u64 },
    #[error("an undo record can't hold this: {0}")]
    Unencodable(&'static str),
}

/// What the log undoes, and to where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UndoHead {
    /// Unique among the sessions of this disk, never 0: a record of an earlier one never passes for one of
    /// this. The sequence of the superblock that began the resync is such a number.
    pub session: u64,
    /// Generation the resync goes towards.
    pub target_of: GenerationId,
    /// Generation and position that rolling back returns to.
    pub returns_to: (GenerationId, Position),
    /// State of the copy at that point.
    pub returns_state: CopyState,
}

/// One range of a volume before it was overwritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UndoEntry {
    pub volume: VolumeIndex,
    /// Bytes from the start of the volume, a multiple of 512.
    pub offset: u64,
    /// Bytes, a multiple of 512, 512..=[`MAX_UNDO_LENGTH`].
    pub length: u32,
    pub content: OldContent,
}

/// What a range held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OldContent {
    /// Data behind the record's header, with this CRC-32.
    Saved { crc: u32 },
    /// Zeroes, which take no space in the log.
    Zero,
}

/// One record's header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoRecord {
    /// That of the head.
    pub session: u64,
    /// That of the head.
    pub target_of: GenerationId,
    /// 1 for the first record of the session, then +1 each.
    pub sequence: u64,
    /// 1..=[`MAX_UNDO_ENTRIES`], in the order of their data.
    pub entries: Vec<UndoEntry>,
}

impl UndoEntry {
    /// Bytes of data behind the header.
    pub fn stored(&self) -> u64 {
        match self.content {
            OldContent::Saved { .. } => self.length.into(),
            OldContent::Zero => 0,
        }
    }

    /// Whether `data` is what was saved.
    ///
    /// # Errors
    /// Another length or checksum.
    pub fn check_data(&self, data: &[u8]) -> Result<(), UndoError> {
        let whole = match self.content {
            OldContent::Saved { crc } => {
                data.len() == self.length as usize && crc32fast::hash(data) == crc
            }
            OldContent::Zero => data.is_empty(),
        };
        if whole {
            Ok(())
        } else {
            Err(UndoError::Data {
                volume: self.volume.0,
                offset: self.offset,
            })
        }
    }
}

impl UndoRecord {
    /// Where the data of each entry is, in bytes from the record's header; empty for zeroes.
    pub fn data_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.entries.iter().scan(UNDO_BLOCK as u64, |next, entry| {
            let start = *next;
            *next += entry.stored();
            Some(start..*next)
        })
    }

    /// Bytes of header, data and padding: the next record begins this far behind.
    pub fn size(&self) -> u64 {
        let data: u64 = self.entries.iter().map(UndoEntry::stored).sum();
        UNDO_BLOCK as u64 + data.next_multiple_of(UNDO_BLOCK as u64)
    }

    /// True if `self` is the record that follows `sequence` in the session of that head.
    pub fn follows(&self, head: &UndoHead, sequence: u64) -> bool {
        self.session == head.session
            && self.target_of == head.target_of
            && Some(self.sequence) == sequence.checked_add(1)
    }
}

fn seal(w: Writer) -> [u8; UNDO_BLOCK] {
    let content = w.into_vec();
    let mut block = [0; UNDO_BLOCK];
    block[..content.len()].copy_from_slice(&content);
    let crc = crc32fast::hash(&block[8..]);
    block[4..8].copy_from_slice(&crc.to_le_bytes());
    block
}

fn open(block: &[u8; UNDO_BLOCK], magic: u32) -> Result<Reader<'_>, UndoError> {
    if block[..4] != magic.to_le_bytes() {
        return Err(UndoError::Absent);
    }
    if block[4..8] != crc32fast::hash(&block[8..]).to_le_bytes() {
        return Err(UndoError::Crc);
    }
    Ok(Reader::new(&block[8..]))
}

/// The bytes of the head. A block of zeroes in its place means that there is no undo.
pub fn encode_head(head: &UndoHead) -> [u8; UNDO_BLOCK] {
    let mut w = Writer::with_capacity(64);
    w.u32(HEAD_MAGIC);
    w.u32(0); // The checksum, put in by `seal`.
    w.u64(head.session);
    w.u64(head.target_of.0);
    w.u64(head.returns_to.0.0);
    w.u64(head.returns_to.1);
    w.u8(head.returns_state.code());
    seal(w)
}

/// The head in a block. Allocates nothing.
///
/// # Errors
/// [`UndoError::Absent`] where no log was begun or it was dropped; anything else for a block that is torn or
/// damaged. Either way there is no undo.
pub fn decode_head(block: &[u8; UNDO_BLOCK]) -> Result<UndoHead, UndoError> {
    let mut r = open(block, HEAD_MAGIC)?;
    head(&mut r).map_err(UndoError::Malformed)
}

fn head(r: &mut Reader) -> Result<UndoHead, Fault> {
    let head = UndoHead {
        session: r.u64()?,
        target_of: GenerationId(r.u64()?),
        returns_to: (GenerationId(r.u64()?), r.u64()?),
        returns_state: CopyState::from_code(r.u8()?).ok_or("the state of the copy is unknown")?,
    };
    let rest = r.remaining();
    r.zero(rest)?;
    if head.session == 0 {
        return Err("session 0 never exists");
    }
    Ok(head)
}

/// The bytes of a record's header. Its data follows where [`UndoRecord::data_ranges`] says.
///
/// # Errors
/// [`UndoError::Unencodable`] for anything [`decode_record`] would refuse: no entries or too many, offsets and
/// lengths out of range, too much data.
pub fn encode_record(record: &UndoRecord) -> Result<[u8; UNDO_BLOCK], UndoError> {
    if record.entries.len() > MAX_UNDO_ENTRIES {
        return Err(UndoError::Unencodable("it has too many entries"));
    }
    let mut w = Writer::with_capacity(UNDO_BLOCK);
    w.u32(RECORD_MAGIC);
    w.u32(0); // The checksum, put in by `seal`.
    w.u64(record.session);
    w.u64(record.target_of.0);
    w.u64(record.sequence);
    w.u16(record.entries.len() as u16);
    w.zero(ENTRIES_AT - w.len());
    for entry in &record.entries {
        let (crc, flags) = match entry.content {
            OldContent::Saved { crc } => (crc, 0),
            OldContent::Zero => (0, ZERO),
        };
        w.u64(entry.offset);
        w.u32(entry.length);
        w.u32(crc);
        w.u16(entry.volume.0);
        w.u8(flags);
        w.zero(5);
    }
    let block = seal(w);
    match decode_record(&block) {
        Ok(_) => Ok(block),
        Err(UndoError::Malformed(why)) => Err(UndoError::Unencodable(why)),
        Err(other) => Err(other),
    }
}

/// The header of a record. Allocates at most 128 entries, 4 KiB. Whether it belongs to the session and is next
/// in it, [`UndoRecord::follows`] says.
///
/// # Errors
/// [`UndoError::Absent`] where no record was ever written; anything else for one that is torn or damaged.
pub fn decode_record(block: &[u8; UNDO_BLOCK]) -> Result<UndoRecord, UndoError> {
    let mut r = open(block, RECORD_MAGIC)?;
    record(&mut r).map_err(UndoError::Malformed)
}

fn record(r: &mut Reader) -> Result<UndoRecord, Fault> {
    let session = r.u64()?;
    let target_of = GenerationId(r.u64()?);
    let sequence = r.u64()?;
    let count = usize::from(r.u16()?);
    r.zero(30)?;
    if session == 0 || sequence == 0 {
        return Err("session 0 and sequence 0 never exist");
    }
    if count == 0 || count > MAX_UNDO_ENTRIES {
        return Err("it has no entries or too many");
    }
    let mut entries = Vec::with_capacity(count);
    let mut data = 0;
    for _ in 0..count {
        let entry = entry(r)?;
        data += entry.stored();
        entries.push(entry);
    }
    if data > MAX_UNDO_DATA {
        return Err("it has more data than one record may have");
    }
    let rest = r.remaining();
    r.zero(rest)?;
    Ok(UndoRecord {
        session,
        target_of,
        sequence,
        entries,
    })
}

fn entry(r: &mut Reader) -> Result<UndoEntry, Fault> {
    let offset = r.u64()?;
    let length = r.u32()?;
    let crc = r.u32()?;
    let volume = volume_of(r.u16()?)?;
    let zero = r.flags(ZERO)? != 0;
    r.zero(5)?;
    if length == 0 || length > MAX_UNDO_LENGTH {
        return Err("the length of an entry is out of range");
    }
    if !offset.is_multiple_of(UNIT) || !u64::from(length).is_multiple_of(UNIT) {
        return Err("an entry is not made of whole sectors");
    }
    if offset.checked_add(length.into()).is_none() {
        return Err("an entry ends beyond what a volume can hold");
    }
    if zero && crc != 0 {
        return Err("an entry of zeroes has a checksum");
    }
    let content = if zero {
        OldContent::Zero
    } else {
        OldContent::Saved { crc }
    };
    Ok(UndoEntry {
        volume,
        offset,
        length,
        content,
    })
}
