//! One block of the activity log: a transaction of 4096 bytes.
//!
//! ```text
//! 0   magic u32 | 4 crc u32 over bytes 8..
//! 8   sequence u64 | 16 slots u16 | 18 updates u16 | 20 context start u16 | 22 context count u16
//! 24  64 updates of 12 bytes: slot u16, zero u16, then an entry
//! 792 412 context entries of 8 bytes: volume u16, used u8 (0 or 1), zero u8, extent u32
//! ```
//!
//! A transaction says what changes, and beside that what a rotating part of the slots holds, so that the last
//! `slots / CONTEXT` (rounded up) transactions together say all of it.

use crate::ids::VolumeIndex;

/// Most updates in one transaction.
pub const UPDATES: usize = 64;
/// Context entries in one transaction.
pub const CONTEXT: usize = 412;
/// Most slots of an activity log.
pub const MAX_SLOTS: usize = 65_535;

const MAGIC: u32 = 0x4c41_4648; // "HFAL"
const UPDATES_AT: usize = 24;
const CONTEXT_AT: usize = UPDATES_AT + UPDATES * 12;
const _: () = assert!(CONTEXT_AT + CONTEXT * 8 <= 4096);

/// An extent of a volume of the service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ExtentKey {
    pub volume: VolumeIndex,
    pub extent: u32,
}

/// What one transaction says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogBlock {
    /// +1 with every transaction, from 1.
    pub sequence: u64,
    /// Slots of the log.
    pub slots: u16,
    /// What these slots hold from here on.
    pub updates: Vec<(u16, Option<ExtentKey>)>,
    /// What the slots from `context_start` on (wrapping around) hold, updates included.
    pub context_start: u16,
    pub context: Vec<Option<ExtentKey>>,
}

/// Why a block is no transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no whole transaction of an activity log: {0}")]
pub struct NotALogBlock(pub &'static str);

fn put_key(bytes: &mut [u8], key: Option<ExtentKey>) {
    if let Some(key) = key {
        bytes[0..2].copy_from_slice(&key.volume.0.to_le_bytes());
        bytes[2] = 1;
        bytes[4..8].copy_from_slice(&key.extent.to_le_bytes());
    }
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}
fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// The bytes of a transaction.
///
/// # Panics
/// More updates or context entries than fit.
pub fn encode(t: &LogBlock) -> [u8; 4096] {
    assert!(
        t.updates.len() <= UPDATES && t.context.len() <= CONTEXT,
        "a transaction larger than its block"
    );
    let mut b = [0u8; 4096];
    b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    b[8..16].copy_from_slice(&t.sequence.to_le_bytes());
    b[16..18].copy_from_slice(&t.slots.to_le_bytes());
    b[18..20].copy_from_slice(&(t.updates.len() as u16).to_le_bytes());
    b[20..22].copy_from_slice(&t.context_start.to_le_bytes());
    b[22..24].copy_from_slice(&(t.context.len() as u16).to_le_bytes());
    for (i, (slot, key)) in t.updates.iter().enumerate() {
        let at = UPDATES_AT + i * 12;
        b[at..at + 2].copy_from_slice(&slot.to_le_bytes());
        put_key(&mut b[at + 4..at + 12], *key);
    }
    for (i, key) in t.context.iter().enumerate() {
        put_key(&mut b[CONTEXT_AT + i * 8..CONTEXT_AT + i * 8 + 8], *key);
    }
    let crc = crc32fast::hash(&b[8..]);
    b[4..8].copy_from_slice(&crc.to_le_bytes());
    b
}

fn take_key(b: &[u8]) -> Result<Option<ExtentKey>, NotALogBlock> {
    let (volume, used, zero, extent) = (u16_at(b, 0), b[2], b[3], u32_at(b, 4));
    match (used, zero) {
        (1, 0) if (volume as usize) < crate::ids::MAX_VOLUMES => Ok(Some(ExtentKey {
            volume: VolumeIndex(volume),
            extent,
        })),
        (0, 0) if volume == 0 && extent == 0 => Ok(None),
        _ => Err(NotALogBlock("an entry is malformed")),
    }
}

/// The transaction in a block. Allocates at most 64 updates and 412 context entries (12 KiB).
///
/// # Errors
/// A block that never was a transaction, is torn or flipped, or names slots that do not exist.
pub fn decode(b: &[u8; 4096]) -> Result<LogBlock, NotALogBlock> {
    if u32_at(b, 0) != MAGIC {
        return Err(NotALogBlock("it does not begin as one"));
    }
    if u32_at(b, 4) != crc32fast::hash(&b[8..]) {
        return Err(NotALogBlock("its checksum does not match"));
    }
    let mut sequence = [0u8; 8];
    sequence.copy_from_slice(&b[8..16]);
    let sequence = u64::from_le_bytes(sequence);
    let (slots, updates, start, count) =
        (u16_at(b, 16), u16_at(b, 18), u16_at(b, 20), u16_at(b, 22));
    if updates as usize > UPDATES
        || count as usize > CONTEXT
        || count > slots
        || (slots > 0 && start >= slots)
    {
        return Err(NotALogBlock("its counts are out of range"));
    }
    let mut block = LogBlock {
        sequence,
        slots,
        context_start: start,
        ..LogBlock::default()
    };
    let unused = [
        &b[UPDATES_AT + updates as usize * 12..CONTEXT_AT],
        &b[CONTEXT_AT + count as usize * 8..],
    ];
    if unused.iter().any(|part| part.iter().any(|byte| *byte != 0)) {
        return Err(NotALogBlock("unused bytes are not zero"));
    }
    for i in 0..updates as usize {
        let at = UPDATES_AT + i * 12;
        let slot = u16_at(b, at);
        if slot >= slots || u16_at(b, at + 2) != 0 {
            return Err(NotALogBlock("an update names a slot that does not exist"));
        }
        block.updates.push((slot, take_key(&b[at + 4..at + 12])?));
    }
    for i in 0..count as usize {
        block
            .context
            .push(take_key(&b[CONTEXT_AT + i * 8..CONTEXT_AT + i * 8 + 8])?);
    }
    Ok(block)
}
