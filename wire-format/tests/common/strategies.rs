//! Strategies: everything that may be encoded.

use holdfast_wire_format::activity_log::{CONTEXT, ExtentKey, LogBlock, UPDATES};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{WIRE_VERSION, WIRE_VERSION_MIN};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::time_index::{MAX_TIMES, TimeEntry, TimeIndexBlock};
use holdfast_wire_format::undo_record::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

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
        .prop_map(
            |(id, parent, fork_position, epoch, cause, maker)| Generation {
                id,
                parent,
                fork_position,
                epoch,
                cause,
                maker,
            },
        )
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
        (
            select(FrameKind::ALL),
            any::<[bool; 3]>(),
            0..=MAX_PAYLOAD,
            any::<u32>(),
        ),
        (WIRE_VERSION_MIN..=WIRE_VERSION, 1..=u8::MAX),
        (
            any::<u64>(),
            volume(),
            epoch(),
            generation_id(),
            incarnation(),
        ),
        (
            any::<[u64; 3]>(),
            0..u64::MAX - u64::from(u32::MAX),
            any::<u32>(),
        ),
    )
        .prop_map(|(first, (spoken, any_version), second, third)| {
            let (kind, [fua, unmap, failed], payload_length, payload_crc) = first;
            let (service_tag, volume, epoch, generation, incarnation) = second;
            let ([position, dependency, stable_position], offset, length) = third;
            FrameHeader {
                // What precedes agreement is read in any version.
                version: if kind.precedes_agreement() {
                    any_version
                } else {
                    spoken
                },
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
                length: if kind.carries_data() {
                    payload_length
                } else {
                    length
                },
            }
        })
}

fn any_volume_facts() -> impl Strategy<Value = VolumeFacts> {
    (
        volume(),
        uuid(),
        "[a-z0-9ä._-]{0,31}",
        uuid(),
        any::<u64>(),
        any::<u32>(),
        any::<u8>(),
        any::<bool>(),
    )
        .prop_map(
            |(index, volume, name, disk, size, sector_size, grain_shift, blank)| VolumeFacts {
                index,
                volume,
                name,
                disk,
                size,
                sector_size,
                grain_shift,
                blank,
                room: size.saturating_add(u64::from(grain_shift)),
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
        (
            0..8u8,
            uuid(),
            epoch(),
            select(CopyState::ALL),
            copy_flags(),
            any::<[bool; 5]>(),
        ),
        (
            select(Mode::ALL),
            select(OnPeerLoss::ALL),
            any::<[u64; 8]>(),
            slot_or_none(),
        ),
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
                follows_third: bits[4],
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
        (volume(), any::<u64>(), any::<u8>(), words).prop_map(
            |(volume, page, grain_shift, words)| (
                K::Bitmap,
                Body::Bitmap {
                    volume,
                    page,
                    grain_shift,
                    words
                }
            )
        ),
        (select(GoodbyeCode::ALL), text(1024))
            .prop_map(|(code, text)| (K::Goodbye, Body::Goodbye { code, text })),
        (select(vec![K::WriteAck, K::ResyncAck]), runs())
            .prop_map(|(kind, runs)| (kind, Body::Acks { runs })),
        any::<[u64; 2]>().prop_map(|[position, resync_sequence]| (
            K::FlushAck,
            Body::FlushAck {
                position,
                resync_sequence
            }
        )),
        (any::<u64>(), slots())
            .prop_map(|(position, equal)| (K::ResyncDone, Body::ResyncDone { position, equal })),
        (slots(), any::<u64>())
            .prop_map(|(set, version)| (K::InSync, Body::InSync { set, version })),
        (epoch(), slots(), any::<bool>()).prop_map(|(epoch, in_sync, force)| (
            K::PromoteRequest,
            Body::PromoteRequest {
                epoch,
                in_sync,
                force
            }
        )),
        (epoch(), any::<bool>(), text(1024)).prop_map(|(epoch, accepted, reason)| (
            K::PromoteReply,
            Body::PromoteReply {
                epoch,
                accepted,
                reason
            }
        )),
        any_generation()
            .prop_map(|generation| (K::NewGeneration, Body::NewGeneration { generation })),
        generation_id()
            .prop_map(|generation| (K::GenerationAck, Body::GenerationAck { generation })),
        (any::<u64>(), any::<u128>())
            .prop_map(|(sequence, digest)| (K::VerifyRequest, Body::Verify { sequence, digest })),
        (any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(sequence, equal, failed)| (
            K::VerifyReply,
            Body::VerifyReply {
                sequence,
                equal,
                failed
            }
        )),
        (select(GenerationCause::ALL), any::<u64>()).prop_map(|(generation_cause, position)| (
            K::DiskLost,
            Body::DiskLost {
                generation_cause,
                position
            }
        )),
        (any::<u64>(), select(GrowStep::ALL), text(1024))
            .prop_map(|(size, step, text)| (K::Grow, Body::Grow { size, step, text })),
    ]
}

fn any_peer_record() -> impl Strategy<Value = PeerRecord> {
    (
        any::<[bool; 2]>(),
        0..8u8,
        0..3u8,
        uuid(),
        uuid(),
        any::<[u64; 5]>(),
    )
        .prop_map(
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
            (
                size.max(sector_size),
                sector,
                grain,
                extent,
                al,
                undo,
                journal,
            )
        })
}
const MIN_GRAIN: u8 = 12;

pub fn any_superblock() -> impl Strategy<Value = Superblock> {
    (
        (
            any_sizes(),
            any::<[u128; 4]>(),
            any::<[u64; 12]>(),
            text(63),
            text(63),
        ),
        (
            volume(),
            any::<u16>(),
            0..8u8,
            epoch(),
            select(CopyState::ALL),
            copy_flags(),
        ),
        (
            slot_or_none(),
            select(Mode::ALL),
            select(OnPeerLoss::ALL),
            slots(),
            slots(),
        ),
        (
            vec(any_generation(), 0..=MAX_GENERATIONS),
            any::<[bool; 2]>(),
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
            let (
                data_size,
                sector_size,
                grain_shift,
                extent_shift,
                al_blocks,
                undo_size,
                journal_size,
            ) = sizes;
            let (volume_index, volume_count, slot, epoch_gate, state, flags) = second;
            let (target_source, mode, on_peer_loss, in_sync, in_sync_pending) = third;
            let (generations, [generations_cut, log_incomplete], volume_disks, peers) = fourth;
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
                room: 0,
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
                log_incomplete,
                volume_disks,
                peers: peers.try_into().unwrap(),
                features_incompatible: 0,
                features_read_only: n[10],
                features_compatible: n[11],
            }
        })
}

fn any_key() -> impl Strategy<Value = Option<ExtentKey>> {
    proptest::option::of(
        (volume(), any::<u32>()).prop_map(|(volume, extent)| ExtentKey { volume, extent }),
    )
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
    (
        1..=u64::MAX,
        generation_id(),
        generation_id(),
        any::<u64>(),
        select(CopyState::ALL),
    )
        .prop_map(
            |(session, target_of, generation, position, returns_state)| UndoHead {
                session,
                target_of,
                returns_to: (generation, position),
                returns_state,
            },
        )
}

fn any_undo_entry() -> impl Strategy<Value = UndoEntry> {
    (
        volume(),
        0..1u64 << 50,
        1..=64u32,
        any::<u32>(),
        any::<bool>(),
    )
        .prop_map(|(volume, sector, sectors, crc, zero)| UndoEntry {
            volume,
            offset: sector * 512,
            length: sectors * 512,
            content: if zero {
                OldContent::Zero
            } else {
                OldContent::Saved { crc }
            },
        })
}

pub fn any_undo_record() -> impl Strategy<Value = UndoRecord> {
    (
        1..=u64::MAX,
        generation_id(),
        1..=u64::MAX,
        vec(any_undo_entry(), 1..=MAX_UNDO_ENTRIES),
    )
        .prop_map(|(session, target_of, sequence, entries)| UndoRecord {
            session,
            target_of,
            sequence,
            entries,
        })
}

pub fn any_time_index() -> impl Strategy<Value = TimeIndexBlock> {
    (
        1..=u64::MAX,
        1..=u64::MAX,
        vec((1..1u64 << 50, any::<u64>()), 1..=MAX_TIMES),
    )
        .prop_map(|(sequence, generation, steps)| {
            let mut position = 0;
            let entries = steps
                .into_iter()
                .map(|(step, time_ms)| {
                    position += step;
                    TimeEntry { position, time_ms }
                })
                .collect();
            TimeIndexBlock {
                sequence,
                generation: GenerationId(generation),
                entries,
            }
        })
}

/// A locator and the size of its backing.
pub fn any_locator() -> impl Strategy<Value = (Locator, u64)> {
    (
        uuid(),
        0..1u64 << 40,
        0..1u64 << 20,
        any::<[u64; 2]>(),
        4096..1u64 << 40,
    )
        .prop_map(|(volume, offset, size, zero, behind)| {
            let (area_offset, area_size) = (offset * 4096, size * 4096);
            let from = zero[0] % (area_offset + 1);
            let to = from + zero[1] % (area_offset - from + 1);
            let locator = Locator {
                volume,
                area_offset,
                area_size,
                zero: (from, to),
            };
            (locator, area_offset + area_size + behind)
        })
}
