//! Facts to start from, and short ways to change them.

use crate::handshake::*;
use holdfast_wire_format::frame::{Facts, PeerFacts, VolumeFacts};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

pub const GB: u64 = 1 << 30;

pub fn generation(
    id: u64,
    parent: u64,
    fork: Position,
    cause: GenerationCause,
    maker: u8,
) -> Generation {
    Generation {
        id: GenerationId(id),
        parent: GenerationId(parent),
        fork_position: fork,
        epoch: Epoch {
            number: id,
            owner: maker,
        },
        cause,
        maker,
    }
}

/// Two copies of one service, slot 0 was promoted (generation 2) and both hold everything up to position 10.
pub fn pair() -> (Facts, Facts) {
    (copy(0, 1), copy(1, 0))
}

fn disk(slot: u8) -> Uuid {
    Uuid(100 + u128::from(slot))
}

fn copy(slot: u8, peer: u8) -> Facts {
    Facts {
        slot: Slot(slot),
        disk: disk(slot),
        attach_counter: 5,
        incarnation: Incarnation(50 + u64::from(slot)),
        epoch: Epoch {
            number: 2,
            owner: 0,
        },
        state: CopyState::UpToDate,
        flags: CopyFlags {
            unclean: true,
            was_primary: slot == 0,
            ..CopyFlags::default()
        },
        is_primary: false,
        unclean_start: false,
        mode: Mode::Sync,
        on_peer_loss: OnPeerLoss::Suspend,
        generations: vec![
            generation(1, 0, 0, GenerationCause::Created, 0),
            generation(2, 1, 0, GenerationCause::Promotion, 0),
        ],
        generations_cut: false,
        position: 10,
        issued: 10,
        target_of: GenerationId(0),
        target_source: 0xff,
        before_resync: (GenerationId(0), 0),
        undo_intact: false,
        follows_third: false,
        in_sync: SlotSet(0b11),
        in_sync_version: 3,
        in_sync_pending: SlotSet::EMPTY,
        volumes: vec![VolumeFacts {
            index: VolumeIndex(0),
            volume: Uuid(7),
            name: "data".into(),
            disk: disk(slot),
            size: GB,
            sector_size: 4096,
            grain_shift: 12,
            blank: false,
            room: 0,
        }],
        about_peer: PeerFacts {
            known: true,
            disk: disk(peer),
            attach_counter: 5,
            incarnation: Incarnation(50 + u64::from(peer)),
            bitmap_base: GenerationId(2),
            bits: 0,
            bytes: 0,
            known_durable_generation: GenerationId(2),
            known_durable_position: 8,
            full_copy: false,
        },
    }
}

/// Stopped uncleanly and started again.
pub fn crash(f: &mut Facts) {
    f.unclean_start = true;
    f.is_primary = false;
    f.attach_counter += 1;
    f.incarnation = Incarnation(f.incarnation.0 + 1000);
    f.position = f.position.saturating_sub(1).max(8);
    f.issued = f.position;
}

/// Went on in a generation of its own.
pub fn goes_on(f: &mut Facts, id: u64, fork: Position, cause: GenerationCause) {
    let parent = f.generations.last().expect("a history").id.0;
    f.generations
        .push(generation(id, parent, fork, cause, f.slot.0));
    f.epoch = Epoch {
        number: id,
        owner: f.slot.0,
    };
    f.in_sync = SlotSet::only(f.slot);
    f.in_sync_version += 1;
    f.is_primary = true;
    f.flags.was_primary = true;
    f.state = CopyState::UpToDate;
    f.position = 0;
    f.issued = 0;
}

pub fn writes(f: &mut Facts, count: u64) {
    f.position += count;
    f.issued = f.position;
    f.about_peer.bits += count;
    f.about_peer.bytes += count * 4096;
}

/// The middle of a resync from `source` toward `goal`.
pub fn becomes_target(f: &mut Facts, source: u8, goal: u64) {
    f.before_resync = (f.generations.last().expect("a history").id, f.position);
    f.state = CopyState::Inconsistent;
    f.target_of = GenerationId(goal);
    f.target_source = source;
    f.undo_intact = true;
    f.is_primary = false;
}

pub fn record(owner: u8, generation: u64, in_sync: u8) -> StoreRecord {
    StoreRecord {
        epoch: Epoch { number: 9, owner },
        generation: GenerationId(generation),
        in_sync: SlotSet(in_sync),
        version: 9,
        copies: vec![],
    }
}

/// The plan of a decision that must be a copy by `row`.
#[track_caller]
pub fn plan(d: &Decision, row: Row) -> CopyPlan {
    assert_eq!(d.row, row, "{d:?}");
    match d.outcome {
        Outcome::Copy(plan) => plan,
        _ => panic!("not a copy: {d:?}"),
    }
}
