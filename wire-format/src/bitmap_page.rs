//! One page of a dirty bitmap, and one block of its summary: 4096 bytes each.
//!
//! ```text
//! 0  magic u32 | 4 crc u32 over bytes 8.. | 8 volume u16 | 10 peer slot u8 | 11 zero u8 | 12 number u32 (low bits) | 16 content
//! ```

use crate::ids::VolumeIndex;

/// Words of bits in one page.
pub const PAGE_WORDS: usize = 510;
/// Bits in one page.
pub const BITS_PER_PAGE: usize = PAGE_WORDS * 64;
/// Pages whose summary bytes share one block.
pub const SUMMARY_ENTRIES: usize = 4080;

/// Highest summary entry with a meaning.
const SUMMARY_MOST: u8 = 2;
const PAGE_MAGIC: u32 = 0x4850_4248; // "HBPH"
const SUMMARY_MAGIC: u32 = 0x4853_4248; // "HBSH"

/// Why a page or summary block does not count: take everything it stands for as set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a block of the dirty bitmap is damaged or belongs elsewhere")]
pub struct Damaged;

fn seal(magic: u32, volume: VolumeIndex, peer: u8, number: u64, block: &mut [u8; 4096]) {
    block[0..4].copy_from_slice(&magic.to_le_bytes());
    block[8..10].copy_from_slice(&volume.0.to_le_bytes());
    block[10] = peer;
    block[12..16].copy_from_slice(&(number as u32).to_le_bytes());
    let crc = crc32fast::hash(&block[8..]);
    block[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn check(
    magic: u32,
    volume: VolumeIndex,
    peer: u8,
    number: u64,
    block: &[u8; 4096],
) -> Result<(), Damaged> {
    let mut expected = [0u8; 16];
    expected[0..4].copy_from_slice(&magic.to_le_bytes());
    expected[4..8].copy_from_slice(&crc32fast::hash(&block[8..]).to_le_bytes());
    expected[8..10].copy_from_slice(&volume.0.to_le_bytes());
    expected[10] = peer;
    expected[12..16].copy_from_slice(&(number as u32).to_le_bytes());
    if block[..16] == expected {
        Ok(())
    } else {
        Err(Damaged)
    }
}

/// The bytes of a page. Bit `i` is bit `i % 64` of word `i / 64`.
pub fn encode_page(
    volume: VolumeIndex,
    peer: u8,
    page: u64,
    words: &[u64; PAGE_WORDS],
) -> [u8; 4096] {
    let mut block = [0u8; 4096];
    for (bytes, word) in block[16..].chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    seal(PAGE_MAGIC, volume, peer, page, &mut block);
    block
}

/// The words of a page. Allocates nothing.
///
/// # Errors
/// A torn, flipped or misplaced page.
pub fn decode_page(
    block: &[u8; 4096],
    volume: VolumeIndex,
    peer: u8,
    page: u64,
) -> Result<[u64; PAGE_WORDS], Damaged> {
    check(PAGE_MAGIC, volume, peer, page, block)?;
    let mut words = [0u64; PAGE_WORDS];
    for (word, bytes) in words.iter_mut().zip(block[16..].chunks_exact(8)) {
        let mut value = [0u8; 8];
        value.copy_from_slice(bytes);
        *word = u64::from_le_bytes(value);
    }
    Ok(words)
}

/// The bytes of a summary block, one per page: 0 clean (the page's content counts for nothing), 1 some bits set
/// (the page says which), 2 all set. Missing entries at the end are zero.
pub fn encode_summary(volume: VolumeIndex, peer: u8, number: u64, entries: &[u8]) -> [u8; 4096] {
    assert!(
        entries.len() <= SUMMARY_ENTRIES,
        "a summary block holds {SUMMARY_ENTRIES} entries"
    );
    let mut block = [0u8; 4096];
    block[16..16 + entries.len()].copy_from_slice(entries);
    seal(SUMMARY_MAGIC, volume, peer, number, &mut block);
    block
}

/// The entries of a summary block. Allocates nothing.
///
/// # Errors
/// A torn, flipped or misplaced block, or an entry that means nothing.
pub fn decode_summary(
    block: &[u8; 4096],
    volume: VolumeIndex,
    peer: u8,
    number: u64,
) -> Result<[u8; SUMMARY_ENTRIES], Damaged> {
    check(SUMMARY_MAGIC, volume, peer, number, block)?;
    let mut entries = [0u8; SUMMARY_ENTRIES];
    entries.copy_from_slice(&block[16..]);
    if entries.iter().any(|entry| *entry > SUMMARY_MOST) {
        return Err(Damaged);
    }
    Ok(entries)
}
