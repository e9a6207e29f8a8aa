//! What is fuzzed: each target takes any bytes and panics if a decoder of the wire format breaks a promise.
//!
//! Checksums would keep almost all changed inputs away from what lies behind them, so every input is tried twice: as
//! it is, and with its checksums made right. The functions are also run by an ordinary test of the workspace
//! (`wire-format/tests/fuzz_targets.rs`), so that they keep building and holding.

use holdfast_wire_format::frame::{Body, FrameKind, HEADER_LENGTH};
use holdfast_wire_format::frame_codec::*;
use holdfast_wire_format::ids::{MAX_PEERS, VolumeIndex};
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::{activity_log, bitmap_page, superblock, time_index, undo_record};
use std::ops::Range;

/// Takes an input; panics if a promise is broken.
pub type Target = fn(&[u8]);

/// Every target and its name.
pub const TARGETS: [(&str, Target); 4] = [
    ("frames", frames),
    ("bodies", bodies),
    ("superblock", superblocks),
    ("blocks", blocks),
];

/// Input of `blocks`: which structure, then its 4096 bytes (for a locator, the size of the backing behind them).
pub const BLOCKS: [&str; 7] = [
    "bitmap-page",
    "bitmap-summary",
    "activity-log",
    "undo-head",
    "undo-record",
    "time-index",
    "locator",
];

/// The page or summary that a block of `blocks` is read as.
const VOLUME: VolumeIndex = VolumeIndex(0x21);
const PEER: u8 = 5;
const PAGE: u64 = 0x1_0203_0405;
const SUMMARY: u64 = 0x0203_0405;

fn seal(bytes: &mut [u8], at: usize, over: Range<usize>) {
    let crc = crc32fast::hash(&bytes[over]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A stream of frames, read as the link reads it: header, as much payload as it says, and so on.
pub fn frames(input: &[u8]) {
    stream(input);
    let mut sealed = input.to_vec();
    let mut at = 0;
    while let Some(rest) = sealed
        .get_mut(at..)
        .filter(|rest| rest.len() >= HEADER_LENGTH)
    {
        let length = u32::from_le_bytes([rest[8], rest[9], rest[10], rest[11]]) as usize;
        let end = HEADER_LENGTH + length.min(rest.len() - HEADER_LENGTH);
        if end > HEADER_LENGTH {
            seal(rest, 12, HEADER_LENGTH..end);
        }
        seal(rest, HEADER_LENGTH - 4, 0..HEADER_LENGTH - 4);
        at += end;
    }
    stream(&sealed);
}

fn stream(mut input: &[u8]) {
    while let Some((head, rest)) = input.split_first_chunk::<HEADER_LENGTH>() {
        // The first bad frame ends a session.
        let Ok(header) = decode_header(head) else {
            return;
        };
        assert_eq!(&encode_header(&header), head, "a header has one encoding");
        let Some((payload, rest)) = rest.split_at_checked(header.payload_length as usize) else {
            return;
        };
        if check_payload(&header, payload).is_err() {
            return;
        }
        if !header.kind.carries_data() {
            body(header.kind, payload);
        }
        input = rest;
    }
}

/// The first byte is the kind, the rest a payload.
pub fn bodies(input: &[u8]) {
    if let Some((code, payload)) = input.split_first()
        && let Some(kind) = FrameKind::from_code(*code)
    {
        body(kind, payload);
    }
}

fn body(kind: FrameKind, payload: &[u8]) {
    let Ok(body) = decode_body(kind, payload) else {
        return;
    };
    assert!(
        kind.carries(&body),
        "{kind:?} came back with the body of another kind"
    );
    let bytes = encode_body_for(kind, &body).expect("what was read can be sent");
    if let Body::Hello(hello) = &body {
        // It may have had more in its sections; what was read of it stays, and what both make of it is the same.
        assert_eq!(decode_body(kind, &bytes).as_ref(), Ok(&body));
        let (ours, theirs) = (Versions::OURS, hello.versions());
        assert_eq!(agree(ours, theirs).ok(), agree(theirs, ours).ok());
        if let Ok(agreed) = hello.negotiate() {
            assert!((WIRE_VERSION_MIN..=WIRE_VERSION).contains(&agreed.version));
        }
    } else {
        assert_eq!(bytes, payload, "a body has one encoding");
    }
}

/// Two slots of 4096 bytes; missing bytes are zero.
pub fn superblocks(input: &[u8]) {
    let mut slots = [[0; superblock::SUPERBLOCK_LENGTH]; 2];
    for (slot, bytes) in slots
        .iter_mut()
        .zip(input.chunks(superblock::SUPERBLOCK_LENGTH))
    {
        slot[..bytes.len()].copy_from_slice(bytes);
    }
    choose(&slots);
    for slot in &mut slots {
        seal(slot, 8, 12..4096);
    }
    choose(&slots);
}

fn choose(slots: &[[u8; superblock::SUPERBLOCK_LENGTH]; 2]) {
    let Ok((chosen, at)) = superblock::choose(&slots[0], &slots[1]) else {
        return;
    };
    // D16: it is that slot, and no whole one is newer.
    assert_eq!(superblock::decode(&slots[at]).as_ref(), Ok(&chosen));
    for other in slots.iter().flat_map(superblock::decode) {
        assert!(other.sequence <= chosen.sequence);
    }
    let again = superblock::encode(&chosen).expect("what was read can be written");
    assert_eq!(superblock::decode(&again).as_ref(), Ok(&chosen));
    // Places never overflow and stay in the area.
    let layout = Layout::of(&chosen).expect("checked by decode");
    let last = layout.bitmap_page_offset(MAX_PEERS - 1, layout.pages - 1);
    assert!(last < layout.undo_offset && layout.undo_offset <= layout.journal_offset);
    assert!(layout.journal_records_offset() <= layout.reserve_offset);
    assert!(layout.reserve_offset <= layout.total);
}

/// One block of the structure that the first byte names.
pub fn blocks(input: &[u8]) {
    let Some((which, rest)) = input.split_first() else {
        return;
    };
    let name = BLOCKS[usize::from(*which) % BLOCKS.len()];
    let mut block = [0; 4096];
    let length = rest.len().min(4096);
    block[..length].copy_from_slice(&rest[..length]);
    let mut size = [0; 8];
    for (byte, from) in size.iter_mut().zip(rest.iter().skip(4096)) {
        *byte = *from;
    }
    one_block(name, &block, u64::from_le_bytes(size));
    match name {
        "locator" => seal(&mut block, 72, 0..72),
        _ => seal(&mut block, 4, 8..4096),
    }
    one_block(name, &block, u64::from_le_bytes(size));
}

fn one_block(name: &str, block: &[u8; 4096], size: u64) {
    let again = match name {
        "bitmap-page" => bitmap_page::decode_page(block, VOLUME, PEER, PAGE)
            .ok()
            .map(|words| bitmap_page::encode_page(VOLUME, PEER, PAGE, &words)),
        "bitmap-summary" => bitmap_page::decode_summary(block, VOLUME, PEER, SUMMARY)
            .ok()
            .map(|entries| bitmap_page::encode_summary(VOLUME, PEER, SUMMARY, &entries)),
        "activity-log" => activity_log::decode(block).ok().map(|t| {
            assert!(t.updates.iter().all(|(slot, _)| *slot < t.slots));
            activity_log::encode(&t)
        }),
        "undo-head" => undo_record::decode_head(block)
            .ok()
            .map(|head| undo_record::encode_head(&head)),
        "undo-record" => undo_record::decode_record(block).ok().map(|record| {
            assert!(record.size() <= 4096 + undo_record::MAX_UNDO_DATA);
            let end = record.data_ranges().last().map_or(0, |range| range.end);
            assert!(end <= record.size());
            undo_record::encode_record(&record).expect("what was read can be written")
        }),
        "time-index" => time_index::decode(block)
            .ok()
            .map(|index| time_index::encode(&index).expect("what was read can be written")),
        "locator" => Locator::decode(block, size).ok().map(|locator| {
            assert!(Some(locator.area_offset + locator.area_size) <= Locator::offset(size));
            let mut again = locator.encode();
            // Behind the first sector anything may be left of an earlier write.
            again[512..].copy_from_slice(&block[512..]);
            again
        }),
        other => unreachable!("{other} is not in the list"),
    };
    if let Some(again) = again {
        assert!(&again == block, "{name}: it has one encoding");
    }
}
