//! Examples of everything that has a byte layout, and strategies that make more of them.
#![allow(dead_code)]

use holdfast_wire_format::activity_log::{CONTEXT, ExtentKey, LogBlock, UPDATES};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{KNOWN_FEATURES, WIRE_VERSION, WIRE_VERSION_MIN};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::undo_record::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

pub const PAYLOAD: &[u8] = b"the bytes sent, stored and checksummed are the same bytes";

pub fn header() -> FrameHeader {
    FrameHeader {
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
        log_incomplete: true,
        position: 4711,
        issued: 4712,
        target_of: GenerationId(0xa003),
        target_source: 2,
        before_resync: (GenerationId(0xa001), 99),
        undo_intact: true,
        in_sync: SlotSet(0b011),
        in_sync_version: 12,
        in_sync_pending: SlotSet(0b111),
        volumes: (0..2)
            .map(|n| VolumeFacts {
                index: VolumeIndex(n),
                volume: Uuid(0x5000 + u128::from(n)),
                disk: Uuid(0x6000 + u128::from(n)),
                size: 1 << 40,
                sector_size: 4096,
                grain_shift: 12,
                blank: n == 1,
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
        version_min: WIRE_VERSION_MIN,
        version_max: WIRE_VERSION,
        features_required: 0,
        features_supported: KNOWN_FEATURES,
        facts,
    }
}

/// One body for each kind that has one, with the name of its golden file.
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
            Body::Acks {
                runs: vec![(0, 3)],
            },
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
            Body::ResyncDone { position: 2001 },
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
            Body::PromoteRequest { epoch },
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
        ("grow", K::Grow, Body::Grow { size: 1 << 41 }),
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
    (n % 5 != 0).then_some(ExtentKey {
        volume: VolumeIndex((n % 64) as u16),
        extent: n * 1000,
    })
}

/// As full as a transaction gets.
pub fn log_block() -> LogBlock {
    LogBlock {
        sequence: 0x0102_0304_0506_0708,
        slots: 1024,
        updates: (0..UPDATES as u32).map(|n| (n as u16 * 16, key(n))).collect(),
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
                    OldContent::Saved { crc: n * 0x0101_0101 }
                },
            })
            .collect(),
    }
}

// --- more of them -------------------------------------------------------------------------------------------

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid)
}
fn generation_id() -> impl Strategy<Value = GenerationId> {
    any::<u64>().prop_map(GenerationId)
}
fn incarnation() -> impl Strategy<Value = Incarnation> {
    any::<u64>().prop_map(Incarnation)
}
fn volume() -> impl Strategy<Value = VolumeIndex> {
    (0..MAX_VOLUMES as u16).prop_map(VolumeIndex)
}
fn slot_or_none() -> impl Strategy<Value = u8> {
    prop_oneof![0..8u8, Just(Epoch::NO_OWNER)]
}
fn slots() -> impl Strategy<Value = SlotSet> {
    any::<u8>().prop_map(SlotSet)
}
fn epoch() -> impl Strategy<Value = Epoch> {
    prop_oneof![
        Just(Epoch::NONE),
        (1..=u64::MAX, 0..8u8).prop_map(|(number, owner)| Epoch { number, owner })
    ]
}
/// UTF-8 of at most `cap` bytes.
fn text(cap: usize) -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..=cap / 4).prop_map(|chars| chars.into_iter().collect())
}
fn any_generation() -> impl Strategy<Value = Generation> {
    (
        generation_id(),
        generation_id(),
        any::<u64>(),
        epoch(),
        select(GenerationCause::ALL),
        slot_or_none(),
    )
        .prop_map(|(id, parent, fork_position, epoch, cause, maker)| Generation {
            id,
            parent,
            fork_position,
            epoch,
            cause,
            maker,
        })
}
fn copy_flags() -> impl Strategy<Value = CopyFlags> {
    any::<[bool; 6]>().prop_map(
        |[unclean, was_primary, zeroed, rolled_back, undo_lost, solo]| CopyFlags {
            unclean,
            was_primary,
            zeroed,
            rolled_back,
            undo_lost,
            solo,
        },
    )
}

pub fn any_header() -> impl Strategy<Value = FrameHeader> {
    (
        (select(FrameKind::ALL), any::<[bool; 3]>(), 0..=MAX_PAYLOAD, any::<u32>()),
        (any::<u64>(), volume(), epoch(), generation_id(), incarnation()),
        (any::<[u64; 3]>(), 0..u64::MAX - u64::from(u32::MAX), any::<u32>()),
    )
        .prop_map(|(first, second, third)| {
            let (kind, [fua, unmap, failed], payload_length, payload_crc) = first;
            let (service_tag, volume, epoch, generation, incarnation) = second;
            let ([position, dependency, stable_position], offset, length) = third;
            FrameHeader {
                kind,
                flags: FrameFlags { fua, unmap, failed },
                payload_length,
                payload_crc: if payload_length == 0 { 0 } else { payload_crc },
                service_tag,
                volume,
                epoch,
                generation,
                incarnation,
                position,
                dependency,
                stable_position,
                offset,
                length: if kind.carries_data() { payload_length } else { length },
            }
        })
}

fn any_volume_facts() -> impl Strategy<Value = VolumeFacts> {
    (volume(), uuid(), uuid(), any::<u64>(), any::<u32>(), any::<u8>(), any::<bool>()).prop_map(
        |(index, volume, disk, size, sector_size, grain_shift, blank)| VolumeFacts {
            index,
            volume,
            disk,
            size,
            sector_size,
            grain_shift,
            blank,
        },
    )
}

fn any_peer_facts() -> impl Strategy<Value = PeerFacts> {
    (any::<[bool; 2]>(), uuid(), any::<[u64; 7]>()).prop_map(|([known, full_copy], disk, n)| {
        PeerFacts {
            known,
            disk,
            attach_counter: n[0],
            incarnation: Incarnation(n[1]),
            bitmap_base: GenerationId(n[2]),
            bits: n[3],
            bytes: n[4],
            known_durable_generation: GenerationId(n[5]),
            known_durable_position: n[6],
            full_copy,
        }
    })
}

fn any_facts() -> impl Strategy<Value = Facts> {
    (
        (0..8u8, uuid(), epoch(), select(CopyState::ALL), copy_flags(), any::<[bool; 4]>()),
        (select(Mode::ALL), select(OnPeerLoss::ALL), any::<[u64; 8]>(), slot_or_none()),
        (slots(), slots(), vec(any_generation(), 0..=MAX_GENERATIONS)),
        (vec(any_volume_facts(), 0..=MAX_VOLUMES), any_peer_facts()),
    )
        .prop_map(|(first, second, third, (volumes, about_peer))| {
            let (slot, disk, epoch, state, flags, bits) = first;
            let (mode, on_peer_loss, n, target_source) = second;
            let (in_sync, in_sync_pending, generations) = third;
            Facts {
                slot: Slot(slot),
                disk,
                attach_counter: n[0],
                incarnation: Incarnation(n[1]),
                epoch,
                state,
                flags,
                is_primary: bits[0],
                unclean_start: bits[1],
                mode,
                on_peer_loss,
                generations,
                generations_cut: bits[2],
                position: n[2],
                issued: n[3],
                target_of: GenerationId(n[4]),
                target_source,
                before_resync: (GenerationId(n[5]), n[6]),
                undo_intact: bits[3],
                in_sync,
                in_sync_version: n[7],
                in_sync_pending,
                volumes,
                about_peer,
            }
        })
}

pub fn any_hello() -> impl Strategy<Value = Hello> {
    (
        (uuid(), 0..8u8, uuid(), text(64)),
        (any::<u8>(), any::<u8>(), any::<u64>(), any::<u64>()),
        any_facts(),
    )
        .prop_map(|((node, slot, service, software), versions, facts)| Hello {
            node,
            slot: Slot(slot),
            service,
            software,
            version_min: versions.0,
            version_max: versions.1,
            features_required: versions.2,
            features_supported: versions.3,
            facts,
        })
}

fn runs() -> impl Strategy<Value = Vec<(u64, u64)>> {
    vec((1..1000u64, 0..1000u64), 0..=MAX_ACK_RUNS).prop_map(|steps| {
        let mut next = 0;
        let mut runs = Vec::new();
        for (gap, length) in steps {
            runs.push((next + gap, next + gap + length));
            next += gap + length;
        }
        runs
    })
}

/// A body with a kind that carries it.
pub fn any_body() -> impl Strategy<Value = (FrameKind, Body)> {
    use FrameKind as K;
    let empty: Vec<FrameKind> = K::ALL
        .iter()
        .copied()
        .filter(|kind| kind.carries(&Body::Empty))
        .collect();
    let words = prop_oneof![Just(Vec::new()), vec(any::<u64>(), BITMAP_WORDS)];
    prop_oneof![
        select(empty).prop_map(|kind| (kind, Body::Empty)),
        any_hello().prop_map(|hello| (K::Hello, Body::Hello(Box::new(hello)))),
        (volume(), any::<u64>(), any::<u8>(), words).prop_map(|(volume, page, grain_shift, words)| (
            K::Bitmap,
            Body::Bitmap { volume, page, grain_shift, words }
        )),
        (select(GoodbyeCode::ALL), text(1024))
            .prop_map(|(code, text)| (K::Goodbye, Body::Goodbye { code, text })),
        (select(vec![K::WriteAck, K::ResyncAck]), runs())
            .prop_map(|(kind, runs)| (kind, Body::Acks { runs })),
        any::<[u64; 2]>().prop_map(|[position, resync_sequence]| (
            K::FlushAck,
            Body::FlushAck { position, resync_sequence }
        )),
        any::<u64>().prop_map(|position| (K::ResyncDone, Body::ResyncDone { position })),
        (slots(), any::<u64>())
            .prop_map(|(set, version)| (K::InSync, Body::InSync { set, version })),
        epoch().prop_map(|epoch| (K::PromoteRequest, Body::PromoteRequest { epoch })),
        (epoch(), any::<bool>(), text(1024)).prop_map(|(epoch, accepted, reason)| (
            K::PromoteReply,
            Body::PromoteReply { epoch, accepted, reason }
        )),
        any_generation()
            .prop_map(|generation| (K::NewGeneration, Body::NewGeneration { generation })),
        generation_id()
            .prop_map(|generation| (K::GenerationAck, Body::GenerationAck { generation })),
        (any::<u64>(), any::<u128>())
            .prop_map(|(sequence, digest)| (K::VerifyRequest, Body::Verify { sequence, digest })),
        (any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(sequence, equal, failed)| (
            K::VerifyReply,
            Body::VerifyReply { sequence, equal, failed }
        )),
        (select(GenerationCause::ALL), any::<u64>()).prop_map(|(generation_cause, position)| (
            K::DiskLost,
            Body::DiskLost { generation_cause, position }
        )),
        any::<u64>().prop_map(|size| (K::Grow, Body::Grow { size })),
    ]
}

fn any_peer_record() -> impl Strategy<Value = PeerRecord> {
    (any::<[bool; 2]>(), 0..8u8, 0..3u8, uuid(), uuid(), any::<[u64; 5]>()).prop_map(
        |([in_use, full_copy], slot, mode, node, disk, n)| PeerRecord {
            in_use,
            slot,
            node,
            disk,
            attach_counter: n[0],
            incarnation: Incarnation(n[1]),
            bitmap_base: GenerationId(n[2]),
            known_durable_generation: GenerationId(n[3]),
            known_durable_position: n[4],
            mode,
            full_copy,
        },
    )
}

/// Values that make a layout, and the layout they make.
pub fn any_sizes() -> impl Strategy<Value = (u64, u32, u8, u8, u32, u64, u64)> {
    (
        (0..=60u32, any::<u64>()),
        select(vec![512u32, 4096]),
        MIN_GRAIN..=24u8,
        20..=30u8,
        8..=4096u32,
        0..1u64 << 40,
        0..1u64 << 30,
    )
        .prop_map(|((bits, n), sector, grain, extent, al, undo, journal)| {
            let top = 1u64 << bits;
            let sector_size = u64::from(sector);
            let size = (top + n % top).min(1 << 60) / sector_size * sector_size;
            let fits = |extent: u8| (size.max(1) - 1) >> extent <= u64::from(u32::MAX);
            let extent = (extent..=30).find(|e| fits(*e)).unwrap_or(30);
            (size.max(sector_size), sector, grain, extent, al, undo, journal)
        })
}
const MIN_GRAIN: u8 = 12;

pub fn any_superblock() -> impl Strategy<Value = Superblock> {
    (
        (any_sizes(), any::<[u128; 4]>(), any::<[u64; 12]>(), text(63), text(63)),
        (volume(), any::<u16>(), 0..8u8, epoch(), select(CopyState::ALL), copy_flags()),
        (slot_or_none(), select(Mode::ALL), select(OnPeerLoss::ALL), slots(), slots()),
        (
            vec(any_generation(), 0..=MAX_GENERATIONS),
            any::<bool>(),
            vec(uuid(), 0..=MAX_VOLUMES),
            vec(any_peer_record(), MAX_PEERS),
        ),
    )
        .prop_filter("2^60 bytes with extents of 2^30 at most", |(first, ..)| {
            let (size, sector, grain, extent, al, undo, journal) = first.0;
            Layout::new(size, sector, grain, extent, al, undo, journal).is_ok()
        })
        .prop_map(|(first, second, third, fourth)| {
            let (sizes, u, n, service_name, volume_name) = first;
            let (data_size, sector_size, grain_shift, extent_shift, al_blocks, undo_size, journal_size) =
                sizes;
            let (volume_index, volume_count, slot, epoch_gate, state, flags) = second;
            let (target_source, mode, on_peer_loss, in_sync, in_sync_pending) = third;
            let (generations, generations_cut, volume_disks, peers) = fourth;
            Superblock {
                sequence: n[0],
                service: Uuid(u[0]),
                volume: Uuid(u[1]),
                volume_index,
                volume_count,
                service_name,
                volume_name,
                node: Uuid(u[2]),
                slot: Slot(slot),
                disk: Uuid(u[3]),
                data_size,
                sector_size,
                grain_shift,
                extent_shift,
                al_blocks,
                undo_size,
                journal_size,
                area_size: n[1],
                attach_counter: n[2],
                incarnation: Incarnation(n[3]),
                epoch_gate,
                state,
                flags,
                target_of: GenerationId(n[4]),
                target_source,
                before_resync: (GenerationId(n[5]), n[6]),
                mode,
                on_peer_loss,
                in_sync,
                in_sync_version: n[7],
                in_sync_pending,
                position: n[8],
                generation_base: n[9],
                generations,
                generations_cut,
                volume_disks,
                peers: peers.try_into().unwrap(),
                features_incompatible: 0,
                features_read_only: n[10],
                features_compatible: n[11],
            }
        })
}

fn any_key() -> impl Strategy<Value = Option<ExtentKey>> {
    proptest::option::of((volume(), any::<u32>()).prop_map(|(volume, extent)| ExtentKey { volume, extent }))
}

pub fn any_log_block() -> impl Strategy<Value = LogBlock> {
    (1..=u16::MAX, any::<u64>()).prop_flat_map(|(slots, sequence)| {
        (
            vec((0..slots, any_key()), 0..=UPDATES),
            0..slots,
            vec(any_key(), 0..=CONTEXT.min(slots as usize)),
        )
            .prop_map(move |(updates, context_start, context)| LogBlock {
                sequence,
                slots,
                updates,
                context_start,
                context,
            })
    })
}

pub fn any_undo_head() -> impl Strategy<Value = UndoHead> {
    (1..=u64::MAX, generation_id(), generation_id(), any::<u64>(), select(CopyState::ALL)).prop_map(
        |(session, target_of, generation, position, returns_state)| UndoHead {
            session,
            target_of,
            returns_to: (generation, position),
            returns_state,
        },
    )
}

fn any_undo_entry() -> impl Strategy<Value = UndoEntry> {
    (volume(), 0..1u64 << 50, 1..=64u32, any::<u32>(), any::<bool>()).prop_map(
        |(volume, sector, sectors, crc, zero)| UndoEntry {
            volume,
            offset: sector * 512,
            length: sectors * 512,
            content: if zero { OldContent::Zero } else { OldContent::Saved { crc } },
        },
    )
}

pub fn any_undo_record() -> impl Strategy<Value = UndoRecord> {
    (1..=u64::MAX, generation_id(), 1..=u64::MAX, vec(any_undo_entry(), 1..=MAX_UNDO_ENTRIES)).prop_map(
        |(session, target_of, sequence, entries)| UndoRecord {
            session,
            target_of,
            sequence,
            entries,
        },
    )
}

// --- checksums ----------------------------------------------------------------------------------------------

/// Puts the right checksum into the four bytes at `at`, computed over `over`.
fn reseal(bytes: &mut [u8], at: usize, over: std::ops::Range<usize>) {
    let crc = crc32fast::hash(&bytes[over]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}
pub fn reseal_header(bytes: &mut [u8]) {
    let at = HEADER_LENGTH - 4;
    reseal(bytes, at, 0..at);
}
pub fn reseal_superblock(bytes: &mut [u8]) {
    reseal(bytes, 8, 12..4096);
}
/// Pages, summaries, log blocks, undo heads and records.
pub fn reseal_block(bytes: &mut [u8]) {
    reseal(bytes, 4, 8..4096);
}
