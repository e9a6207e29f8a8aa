//! One value of everything that has a byte layout, with as many different bytes in it as it may have.

use holdfast_wire_format::activity_log::{CONTEXT, ExtentKey, LogBlock, UPDATES};
use holdfast_wire_format::bitmap_page::{PAGE_WORDS, SUMMARY_ENTRIES};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::time_index::{MAX_TIMES, TimeEntry, TimeIndexBlock};
use holdfast_wire_format::undo_record::*;

pub const PAYLOAD: &[u8] = b"the bytes sent, stored and checksummed are the same bytes";

pub fn header() -> FrameHeader {
    FrameHeader {
        version: 1,
        kind: FrameKind::Write,
        flags: FrameFlags {
            fua: true,
            unmap: false,
            failed: false,
        },
        payload_length: PAYLOAD.len() as u32,
        payload_crc: holdfast_wire_format::frame_codec::payload_crc(PAYLOAD),
        service_tag: 0x1112_1314_1516_1718,
        volume: VolumeIndex(3),
        epoch: Epoch {
            number: 0x2122_2324_2526_2728,
            owner: 2,
        },
        generation: GenerationId(0x3132_3334_3536_3738),
        incarnation: Incarnation(0x4142_4344_4546_4748),
        position: 0x5152_5354_5556_5758,
        dependency: 0x5152_5354_5556_5700,
        stable_position: 0x5152_5354_5556_5000,
        offset: 0x0061_6263_6465_6000,
        length: PAYLOAD.len() as u32,
    }
}

pub fn generation(n: u64) -> Generation {
    Generation {
        id: GenerationId(0xa000 + n),
        parent: GenerationId(if n == 0 { 0 } else { 0xa000 + n - 1 }),
        fork_position: n * 1000,
        epoch: if n == 0 {
            Epoch::NONE
        } else {
            Epoch {
                number: n,
                owner: (n % 8) as u8,
            }
        },
        cause: GenerationCause::ALL[n as usize % GenerationCause::ALL.len()],
        maker: (n % 8) as u8,
    }
}

pub fn hello() -> Hello {
    let facts = Facts {
        slot: Slot(1),
        disk: Uuid(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        attach_counter: 17,
        incarnation: Incarnation(0xfeed),
        epoch: Epoch {
            number: 5,
            owner: 1,
        },
        state: CopyState::Inconsistent,
        flags: CopyFlags {
            unclean: true,
            was_primary: false,
            zeroed: true,
            rolled_back: false,
            undo_lost: true,
            solo: false,
        },
        is_primary: false,
        unclean_start: true,
        mode: Mode::SemiSync,
        on_peer_loss: OnPeerLoss::Continue,
        generations: (0..3).map(generation).collect(),
        generations_cut: true,
        position: 4711,
        issued: 4712,
        target_of: GenerationId(0xa003),
        target_source: 2,
        before_resync: (GenerationId(0xa001), 99),
        undo_intact: true,
        follows_third: false,
        in_sync: SlotSet(0b011),
        in_sync_version: 12,
        in_sync_pending: SlotSet(0b111),
        volumes: (0..2)
            .map(|n| VolumeFacts {
                index: VolumeIndex(n),
                volume: Uuid(0x5000 + u128::from(n)),
                name: ["data", "redo-log"][usize::from(n)].to_owned(),
                disk: Uuid(0x6000 + u128::from(n)),
                size: 1 << 40,
                sector_size: 4096,
                grain_shift: 12,
                blank: n == 1,
                room: (1 << 40) + u64::from(n) * (1 << 38),
            })
            .collect(),
        about_peer: PeerFacts {
            known: true,
            disk: Uuid(0x7777),
            attach_counter: 3,
            incarnation: Incarnation(0xbeef),
            bitmap_base: GenerationId(0xa001),
            bits: 100,
            bytes: 409_600,
            known_durable_generation: GenerationId(0xa002),
            known_durable_position: 1234,
            full_copy: true,
        },
    };
    Hello {
        node: Uuid(0x99),
        slot: Slot(1),
        service: Uuid(0x88),
        software: "holdfast 0.1.0".to_owned(),
        version_min: 1,
        version_max: 2,
        features_required: 0,
        features_supported: 0x8000_0000_0000_0005,
        facts,
    }
}

/// One body for each kind that has one (`Bitmap` has two forms), with a name.
pub fn bodies() -> Vec<(&'static str, FrameKind, Body)> {
    use FrameKind as K;
    let epoch = Epoch {
        number: 6,
        owner: 1,
    };
    vec![
        ("hello", K::Hello, Body::Hello(Box::new(hello()))),
        (
            "bitmap",
            K::Bitmap,
            Body::Bitmap {
                volume: VolumeIndex(2),
                page: 0x1_0000_0002,
                grain_shift: 13,
                words: (0..BITMAP_WORDS as u64).map(|n| n << 40 | n).collect(),
            },
        ),
        (
            "bitmap_all_set",
            K::Bitmap,
            Body::Bitmap {
                volume: VolumeIndex(0),
                page: 7,
                grain_shift: 12,
                words: Vec::new(),
            },
        ),
        (
            "goodbye",
            K::Goodbye,
            Body::Goodbye {
                code: GoodbyeCode::SplitBrain,
                text: "both copies were written to \u{2014} pick one".to_owned(),
            },
        ),
        (
            "write_ack",
            K::WriteAck,
            Body::Acks {
                runs: vec![(1, 5), (7, 7), (1000, 2000)],
            },
        ),
        (
            "resync_ack",
            K::ResyncAck,
            Body::Acks { runs: vec![(0, 3)] },
        ),
        (
            "flush_ack",
            K::FlushAck,
            Body::FlushAck {
                position: 2000,
                resync_sequence: 31,
            },
        ),
        (
            "resync_done",
            K::ResyncDone,
            Body::ResyncDone {
                position: 2001,
                equal: SlotSet(0b110),
            },
        ),
        (
            "in_sync",
            K::InSync,
            Body::InSync {
                set: SlotSet(0b101),
                version: 13,
            },
        ),
        (
            "promote_request",
            K::PromoteRequest,
            Body::PromoteRequest {
                epoch,
                in_sync: SlotSet(0b110),
                force: true,
            },
        ),
        (
            "promote_reply",
            K::PromoteReply,
            Body::PromoteReply {
                epoch,
                accepted: false,
                reason: "a newer epoch was accepted".to_owned(),
            },
        ),
        (
            "new_generation",
            K::NewGeneration,
            Body::NewGeneration {
                generation: generation(4),
            },
        ),
        (
            "generation_ack",
            K::GenerationAck,
            Body::GenerationAck {
                generation: GenerationId(0xa004),
            },
        ),
        (
            "verify_request",
            K::VerifyRequest,
            Body::Verify {
                sequence: 8,
                digest: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
            },
        ),
        (
            "verify_reply",
            K::VerifyReply,
            Body::VerifyReply {
                sequence: 8,
                equal: false,
                failed: true,
            },
        ),
        (
            "disk_lost",
            K::DiskLost,
            Body::DiskLost {
                generation_cause: GenerationCause::DiskLost,
                position: 4000,
            },
        ),
        (
            "grow",
            K::Grow,
            Body::Grow {
                size: 1 << 41,
                step: GrowStep::Refused,
                text: "the device is too small".to_owned(),
            },
        ),
    ]
}

/// As full as a superblock gets.
pub fn superblock() -> Superblock {
    let (data_size, undo_size, journal_size) = (1 << 40, 64 << 20, 1 << 20);
    let layout = Layout::new(data_size, 4096, 12, 22, 64, undo_size, journal_size).unwrap();
    Superblock {
        sequence: 42,
        service: Uuid(0x88),
        volume: Uuid(0x5001),
        volume_index: VolumeIndex(1),
        volume_count: 64,
        service_name: "n".repeat(63),
        volume_name: "data".to_owned(),
        node: Uuid(0x99),
        slot: Slot(1),
        disk: Uuid(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        data_size,
        room: 0,
        sector_size: 4096,
        grain_shift: 12,
        extent_shift: 22,
        al_blocks: 64,
        undo_size,
        journal_size,
        area_size: layout.total,
        attach_counter: 17,
        incarnation: Incarnation(0xfeed),
        epoch_gate: Epoch {
            number: 5,
            owner: 1,
        },
        state: CopyState::UpToDate,
        flags: CopyFlags {
            unclean: true,
            was_primary: true,
            zeroed: false,
            rolled_back: true,
            undo_lost: false,
            solo: true,
        },
        target_of: GenerationId(0xa003),
        target_source: 2,
        before_resync: (GenerationId(0xa001), 99),
        mode: Mode::Async,
        on_peer_loss: OnPeerLoss::Continue,
        in_sync: SlotSet(0b011),
        in_sync_version: 12,
        in_sync_pending: SlotSet(0b111),
        position: 4711,
        generation_base: 4000,
        generations: (0..MAX_GENERATIONS as u64).map(generation).collect(),
        generations_cut: true,
        log_incomplete: true,
        volume_disks: (0..MAX_VOLUMES as u128).map(|n| Uuid(0x6000 + n)).collect(),
        peers: std::array::from_fn(|n| PeerRecord {
            in_use: n != 6,
            slot: n as u8 + u8::from(n >= 1),
            node: Uuid(0x9000 + n as u128),
            disk: Uuid(0x9100 + n as u128),
            attach_counter: n as u64,
            incarnation: Incarnation(0x9200 + n as u64),
            bitmap_base: GenerationId(0xa001),
            known_durable_generation: GenerationId(0xa002),
            known_durable_position: 1234,
            mode: (n % 3) as u8,
            full_copy: n == 2,
        }),
        features_incompatible: 0,
        features_read_only: 0,
        features_compatible: 0x8000_0000_0000_0001,
    }
}

fn key(n: u32) -> Option<ExtentKey> {
    (!n.is_multiple_of(5)).then_some(ExtentKey {
        volume: VolumeIndex((n % 64) as u16),
        extent: n * 1000,
    })
}

/// As full as a transaction gets.
pub fn log_block() -> LogBlock {
    LogBlock {
        sequence: 0x0102_0304_0506_0708,
        slots: 1024,
        updates: (0..UPDATES as u32)
            .map(|n| (n as u16 * 16, key(n)))
            .collect(),
        context_start: 700,
        context: (0..CONTEXT as u32).map(key).collect(),
    }
}

pub fn undo_head() -> UndoHead {
    UndoHead {
        session: 42,
        target_of: GenerationId(0xa003),
        returns_to: (GenerationId(0xa001), 99),
        returns_state: CopyState::UpToDate,
    }
}

pub fn undo_record() -> UndoRecord {
    UndoRecord {
        session: 42,
        target_of: GenerationId(0xa003),
        sequence: 7,
        entries: (0..MAX_UNDO_ENTRIES as u32)
            .map(|n| UndoEntry {
                volume: VolumeIndex((n % 64) as u16),
                offset: u64::from(n) << 20,
                length: 4096 + n % 2 * 512,
                content: if n % 3 == 0 {
                    OldContent::Zero
                } else {
                    OldContent::Saved {
                        crc: n * 0x0101_0101,
                    }
                },
            })
            .collect(),
    }
}

pub fn page_words() -> [u64; PAGE_WORDS] {
    std::array::from_fn(|n| (n as u64 + 1).wrapping_mul(0x0102_0408_1020_4081))
}

pub fn summary_entries() -> [u8; SUMMARY_ENTRIES] {
    std::array::from_fn(|n| (n % 7 % 3) as u8)
}

pub fn time_index() -> TimeIndexBlock {
    TimeIndexBlock {
        sequence: 0x0102_0304_0506_0708,
        generation: GenerationId(0x3132_3334_3536_3738),
        entries: (1..=MAX_TIMES as u64)
            .map(|n| TimeEntry {
                position: n * 0x0101_0101,
                // A clock that was set back once.
                time_ms: 1_700_000_000_000 + n * 200 - n / 100 * 5_000,
            })
            .collect(),
    }
}

/// And the size of its backing.
pub fn locator() -> (Locator, u64) {
    let locator = Locator {
        volume: Uuid(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        area_offset: 0x0102_0304_0506_7000,
        area_size: 0x0807_0605_0000,
        zero: (0x0011_2233_4455_6600, 0x0012_2233_4455_6600),
    };
    (locator, 0x0203_0405_0607_0801)
}
