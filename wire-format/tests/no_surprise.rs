//! What decoders do with bytes of any kind: the same value back, an error, never a panic and never more memory than
//! stated.

mod common;

use common::sample::{Sample, all, any_sample};
use holdfast_wire_format::frame::{FrameKind, HEADER_LENGTH, MAX_PAYLOAD};
use holdfast_wire_format::frame_codec::*;
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts the bytes that each thread holds, and the most it held.
struct Counting;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static MOST: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    HELD.with(|held| {
        held.set(held.get() + bytes);
        MOST.with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator; the counters are constant-initialised thread
// locals without destructors, so touching them allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same one.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same one.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes held at once by `work` above what was held before, its result included.
fn held_by<T>(work: impl FnOnce() -> T) -> (i64, T) {
    let before = HELD.with(Cell::get);
    MOST.with(|most| most.set(before));
    let result = work();
    (MOST.with(Cell::get) - before, result)
}

/// Decodes as the product does, without the copies `Sample` makes, and returns the most bytes held.
fn decoding(sample: &Sample, bytes: &[u8]) -> i64 {
    use holdfast_wire_format::{
        activity_log, bitmap_page, locator, superblock, time_index, undo_record,
    };
    let frame = || {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER_LENGTH>() else {
            return 0;
        };
        let (held, header) = held_by(|| decode_header(header));
        assert_eq!(held, 0, "a header needs no memory");
        match header {
            Ok(header) if !header.kind.carries_data() => {
                held_by(|| decode_body(header.kind, payload).ok()).0
            }
            _ => 0,
        }
    };
    if let Sample::Frame(..) = sample {
        return frame();
    }
    let Ok(block) = <&[u8; 4096]>::try_from(bytes) else {
        return 0;
    };
    match sample {
        Sample::Frame(..) => unreachable!("done above"),
        Sample::Superblock(_) => held_by(|| superblock::decode(block).ok()).0,
        Sample::Page {
            volume, peer, page, ..
        } => held_by(|| bitmap_page::decode_page(block, *volume, *peer, *page).is_ok()).0,
        Sample::Summary {
            volume,
            peer,
            number,
            ..
        } => held_by(|| bitmap_page::decode_summary(block, *volume, *peer, *number).is_ok()).0,
        Sample::LogBlock(_) => held_by(|| activity_log::decode(block).ok()).0,
        Sample::UndoHead(_) => held_by(|| undo_record::decode_head(block).ok()).0,
        Sample::UndoRecord(_) => held_by(|| undo_record::decode_record(block).ok()).0,
        Sample::TimeIndex(_) => held_by(|| time_index::decode(block).ok()).0,
        Sample::Locator(_, size) => held_by(|| locator::Locator::decode(block, *size).ok()).0,
    }
}

/// What the documentation of the decoders states, in bytes.
fn bound(sample: &Sample) -> i64 {
    match sample {
        Sample::Frame(..) => 16 << 10,
        Sample::Superblock(_) => 4 << 10,
        Sample::LogBlock(_) => 12 << 10,
        Sample::UndoRecord(_) | Sample::TimeIndex(_) => 4 << 10,
        Sample::Page { .. }
        | Sample::Summary { .. }
        | Sample::UndoHead(_)
        | Sample::Locator(..) => 0,
    }
}

fn within_bound(name: &str, sample: &Sample, bytes: &[u8]) {
    let held = decoding(sample, bytes);
    assert!(
        held <= bound(sample),
        "{name}: {held} bytes were held, {} are allowed",
        bound(sample)
    );
}

#[test]
fn the_fullest_of_everything_stays_within_the_stated_memory() {
    for (name, sample) in all() {
        let bytes = sample.encode();
        within_bound(&name, &sample, &bytes);
    }
    // Counts that promise more than there is.
    for kind in FrameKind::ALL.iter().filter(|kind| !kind.carries_data()) {
        for fill in [0x00, 0x01, 0x7f, 0xff] {
            for length in [0, 1, 4, 16, 17, 18, 20, 64, 4096, MAX_PAYLOAD as usize] {
                let payload = vec![fill; length];
                let (held, _) = held_by(|| decode_body(*kind, &payload).ok());
                assert!(
                    held <= 16 << 10,
                    "{kind:?}: {held} bytes for {length} of {fill:#x}"
                );
            }
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    for (name, sample) in all() {
        let mut bytes = sample.encode();
        for bit in 0..sample.meaningful(&bytes) * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(sample.decode_as(&bytes).is_err(), "{name}: bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn what_was_cut_short_is_noticed() {
    for (name, sample) in all() {
        let bytes = sample.encode();
        for length in 0..bytes.len() {
            assert!(
                sample.decode_as(&bytes[..length]).is_err(),
                "{name}: {length} bytes"
            );
        }
        if let Sample::Frame(header, _) = &sample
            && !header.kind.carries_data()
        {
            // A body is refused by itself, too, not only by its checksum. Only a hello may end earlier, before its
            // sixth or its seventh section.
            let payload = &bytes[HEADER_LENGTH..];
            let before = |section: usize| {
                (header.kind == FrameKind::Hello).then(|| {
                    (1..section).fold(18, |at, _| {
                        at + 2 + usize::from(u16::from_le_bytes([payload[at], payload[at + 1]]))
                    })
                })
            };
            let ends = [before(6), before(7)];
            for length in (0..payload.len()).filter(|length| !ends.contains(&Some(*length))) {
                assert!(
                    decode_body(header.kind, &payload[..length]).is_err(),
                    "{name}: {length} bytes of payload"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_was_written_is_read(sample in any_sample()) {
        prop_assert_eq!(sample.decode_as(&sample.encode()), Ok(sample));
    }

    /// Bytes are changed and their checksums made right again: an error or some value, which is then written as
    /// exactly these bytes (so no two encodings of one value are accepted, and nothing unknown is dropped).
    #[test]
    fn changed_bytes_are_refused_or_mean_exactly_themselves(
        sample in any_sample(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = sample.encode();
        let length = sample.meaningful(&bytes);
        for (at, value) in changes {
            bytes[at.index(length)] = value;
        }
        sample.reseal(&mut bytes);
        within_bound("changed", &sample, &bytes);
        if let Ok(read) = sample.decode_as(&bytes) {
            let version = matches!(&read, Sample::Superblock(_) | Sample::Locator(..));
            // A hello may have more in its sections than this version reads, and metadata may be of an older version.
            let hello = matches!(&read, Sample::Frame(header, _) if header.kind == FrameKind::Hello);
            if !hello && !version {
                prop_assert_eq!(read.encode(), bytes);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(
        sample in any_sample(),
        mut bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..600),
            proptest::collection::vec(any::<u8>(), 4096),
            proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xff)], 4096),
        ],
        keep in 0..16usize,
    ) {
        // Behind the right magic and with the right checksum, or not.
        let whole = sample.encode();
        let keep = keep.min(bytes.len()).min(whole.len());
        bytes[..keep].copy_from_slice(&whole[..keep]);
        sample.reseal(&mut bytes);
        within_bound("arbitrary", &sample, &bytes);
        let _ = sample.decode_as(&bytes);
    }

    #[test]
    fn bodies_of_arbitrary_bytes_do_no_harm(
        kind in prop::sample::select(FrameKind::ALL),
        bytes in proptest::collection::vec(any::<u8>(), 0..6000),
    ) {
        let (held, _) = held_by(|| decode_body(kind, &bytes).ok());
        prop_assert!(held <= 16 << 10, "{} bytes", held);
    }

    /// What the encoder gives out, the decoder takes; what it would not take is not given out.
    #[test]
    fn only_what_can_be_read_is_sent(
        kind in prop::sample::select(FrameKind::ALL),
        (_, body) in common::strategies::any_body(),
    ) {
        match encode_body_for(kind, &body) {
            Ok(bytes) => prop_assert_eq!(decode_body(kind, &bytes), Ok(body)),
            Err(_) => prop_assert!(!kind.carries(&body)),
        }
    }
}
