//! One block of the journal's index from positions to times: 4096 bytes.
//!
//! The journal area begins with a ring of these blocks ([`crate::layout::Layout::time_index_offset`]); behind
//! them are records as in the undo log, kept longer. The block with sequence `n` is block `n` modulo the ring's
//! length, so the newest block is the one with the highest sequence, and the last that is not full is written anew
//! in place: a torn write of it loses its entries, never those before. Only volumes with
//! [`crate::superblock::FEATURE_JOURNAL`] have one.
//!
//! ```text
//! 0   magic u32 | 4 crc u32 over bytes 8..
//! 8   sequence u64 | 16 generation u64 | 24 count u16 | 26 zero 6
//! 32  254 entries of 16 bytes: position u64, time u64
//! ```

use crate::bytes::{Fault, Reader, Writer};
use crate::ids::{GenerationId, Position};

/// Most entries in one block.
pub const MAX_TIMES: usize = 254;

const MAGIC: u32 = 0x4954_4648; // "HFTI"
const ENTRIES_AT: usize = 32;
const ENTRY_LENGTH: usize = 16;
const _: () = assert!(ENTRIES_AT + MAX_TIMES * ENTRY_LENGTH == 4096);

/// When a position was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeEntry {
    /// Counted from the beginning of the generation.
    pub position: Position,
    /// Milliseconds since 1970 (UTC), as the clock of the primary said. It may be earlier than the entry before:
    /// clocks are set back.
    pub time_ms: u64,
}

/// Entries of one generation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimeIndexBlock {
    /// +1 with every block, from 1.
    pub sequence: u64,
    /// The generation the positions belong to, not 0.
    pub generation: GenerationId,
    /// 1..=[`MAX_TIMES`], by rising position.
    pub entries: Vec<TimeEntry>,
}

/// Why a block is none of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no whole block of the index of times: {0}")]
pub struct NotATimeIndex(pub &'static str);

/// The bytes of a block.
///
/// # Errors
/// What [`decode`] would refuse: no entries or too many, positions that do not rise, sequence or generation 0.
pub fn encode(block: &TimeIndexBlock) -> Result<[u8; 4096], NotATimeIndex> {
    if block.entries.len() > MAX_TIMES {
        return Err(NotATimeIndex("it has too many entries"));
    }
    let mut w = Writer::with_capacity(4096);
    w.u32(MAGIC);
    w.u32(0); // The checksum, put in at the end.
    w.u64(block.sequence);
    w.u64(block.generation.0);
    w.u16(block.entries.len() as u16);
    w.zero(ENTRIES_AT - w.len());
    for entry in &block.entries {
        w.u64(entry.position);
        w.u64(entry.time_ms);
    }
    let mut bytes = [0; 4096];
    bytes[..w.len()].copy_from_slice(&w.into_vec());
    let crc = crc32fast::hash(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    decode(&bytes).map(|_| bytes)
}

/// What a block says. Allocates at most 254 entries (4 KiB).
///
/// # Errors
/// A block that was never written, or is torn or damaged.
pub fn decode(bytes: &[u8; 4096]) -> Result<TimeIndexBlock, NotATimeIndex> {
    if bytes[..4] != MAGIC.to_le_bytes() {
        return Err(NotATimeIndex("it does not begin as one"));
    }
    if bytes[4..8] != crc32fast::hash(&bytes[8..]).to_le_bytes() {
        return Err(NotATimeIndex("its checksum does not match"));
    }
    fields(&mut Reader::new(&bytes[8..])).map_err(NotATimeIndex)
}

fn fields(r: &mut Reader) -> Result<TimeIndexBlock, Fault> {
    let sequence = r.u64()?;
    let generation = GenerationId(r.u64()?);
    let count = usize::from(r.u16()?);
    r.zero(6)?;
    if sequence == 0 || generation.0 == 0 {
        return Err("sequence 0 and generation 0 never exist");
    }
    if count == 0 || count > MAX_TIMES {
        return Err("it has no entries or too many");
    }
    let mut entries: Vec<TimeEntry> = Vec::with_capacity(count);
    for _ in 0..count {
        let entry = TimeEntry {
            position: r.u64()?,
            time_ms: r.u64()?,
        };
        if entries
            .last()
            .is_some_and(|before| before.position >= entry.position)
        {
            return Err("the positions do not rise");
        }
        entries.push(entry);
    }
    let rest = r.remaining();
    r.zero(rest)?;
    Ok(TimeIndexBlock {
        sequence,
        generation,
        entries,
    })
}

/// The last entry at or before a time, over any blocks of one generation: the position to go back to. Clocks are
/// set back, so the one with the highest position counts, not the first that fits.
pub fn position_at<'a>(
    blocks: impl IntoIterator<Item = &'a TimeIndexBlock>,
    generation: GenerationId,
    time_ms: u64,
) -> Option<Position> {
    blocks
        .into_iter()
        .filter(|block| block.generation == generation)
        .flat_map(|block| &block.entries)
        .filter(|entry| entry.time_ms <= time_ms)
        .map(|entry| entry.position)
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(sequence: u64, generation: u64, entries: &[(u64, u64)]) -> TimeIndexBlock {
        TimeIndexBlock {
            sequence,
            generation: GenerationId(generation),
            entries: entries
                .iter()
                .map(|(position, time_ms)| TimeEntry {
                    position: *position,
                    time_ms: *time_ms,
                })
                .collect(),
        }
    }

    #[test]
    fn what_is_no_index_is_neither_written_nor_read() {
        let too_many: Vec<_> = (1..=MAX_TIMES as u64 + 1).map(|n| (n, 0)).collect();
        for wrong in [
            block(0, 7, &[(1, 1)]),
            block(1, 0, &[(1, 1)]),
            block(1, 7, &[]),
            block(1, 7, &[(2, 1), (2, 2)]),
            block(1, 7, &[(3, 1), (2, 2)]),
            block(1, 7, &too_many),
        ] {
            assert!(encode(&wrong).is_err(), "{wrong:?}");
        }
        assert!(encode(&block(1, 7, &too_many[..MAX_TIMES])).is_ok());
        assert!(decode(&[0; 4096]).is_err());
    }

    #[test]
    fn a_time_names_the_last_position_before_it_though_the_clock_was_set_back() {
        let blocks = [
            block(1, 7, &[(10, 1000), (20, 1200)]),
            block(2, 7, &[(30, 900), (40, 1400)]),
            block(3, 8, &[(5, 1)]),
        ];
        let at = |time| position_at(&blocks, GenerationId(7), time);
        assert_eq!(at(899), None);
        assert_eq!(at(900), Some(30));
        assert_eq!(at(1399), Some(30));
        assert_eq!(at(5000), Some(40));
    }
}
