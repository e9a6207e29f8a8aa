//! The story that undo tests begin with: a pair whose target fell behind, and a resync that is cut.

pub use super::story::{noticed, on_disk};
use super::*;
use holdfast_replicator_core::status::UndoStatus;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::undo_record::{FIRST_RECORD, UndoRecord, decode_head, decode_record};

pub const SIZE: u64 = 1 << 20;
pub const UNDO: u64 = 4 << 20;
/// The copy that is filled, and its source.
pub const TARGET: usize = 1;
pub const SOURCE: usize = 0;

pub type Content = Vec<Vec<u8>>;

/// A random write, zero, discard or flush on primary `n`.
pub fn one(w: &mut World, n: usize) -> RequestId {
    let volume = w.rng.below(2) as u16;
    let size = if volume == 0 { SIZE } else { SIZE / 2 };
    let length = (1 + w.rng.below(24)) * 512;
    let offset =
        w.rng.below((size / 4 - length) / 512) * 512 + if w.rng.chance(50) { size / 2 } else { 0 };
    let chance = w.rng.below(100);
    if chance < 8 {
        w.flush(n)
    } else if chance < 25 {
        zero(w, n, volume, offset, length)
    } else {
        let stamp = w.next_request.to_le_bytes();
        let bytes = stamp
            .iter()
            .copied()
            .cycle()
            .take(length as usize)
            .collect();
        let fua = w.rng.chance(5);
        w.write(n, volume, offset, bytes, fua)
    }
}

pub fn zero(w: &mut World, n: usize, volume: u16, offset: u64, length: u64) -> RequestId {
    let request = RequestId(w.next_request);
    w.next_request += 1;
    let event = Event::Zero {
        request,
        volume: VolumeIndex(volume),
        offset,
        length,
        unmap: w.rng.chance(50),
        fua: false,
    };
    w.event(n, event);
    request
}

pub fn load(w: &mut World, n: usize, count: usize) {
    let mut requests = Vec::new();
    for _ in 0..count {
        requests.push(one(w, n));
        let steps = w.rng.below(8) as usize;
        w.steps(steps);
    }
    w.until("every request completes", 100_000, |w| {
        requests
            .iter()
            .all(|r| w.status_of(n, *r) == Some(Status::Ok))
    });
}

pub fn cut(w: &mut World) {
    w.cut.push((SOURCE, TARGET));
    w.drop_link(SOURCE, TARGET, "cut");
}

pub fn state(w: &World, n: usize) -> CopyState {
    w.nodes[n]
        .core
        .as_ref()
        .expect("it runs")
        .status(w.now)
        .state
}

pub fn has_undo_head(w: &World, n: usize) -> bool {
    let offset = Layout::of(&on_disk(w, n)).expect("a layout").undo_offset;
    let block = w.nodes[n].disk.meta.get(&(0, offset));
    block.is_some_and(|b| decode_head(b.as_slice().try_into().expect("4 KiB")).is_ok())
}

pub fn differs(a: &Content, b: &Content) -> Option<(usize, usize)> {
    a.iter()
        .zip(b)
        .enumerate()
        .find_map(|(v, (a, b))| a.iter().zip(b).position(|(a, b)| a != b).map(|at| (v, at)))
}

pub fn same(w: &World) {
    let [a, b] = [SOURCE, TARGET].map(|n| &w.nodes[n].disk.data);
    assert_eq!(differs(a, b), None, "the copies differ");
}

pub fn in_sync_again(w: &mut World) {
    w.until("in sync again", 400_000, |w| {
        w.settled(&[SOURCE, TARGET]) && w.up_to_date(SOURCE) && w.up_to_date(TARGET)
    });
    same(w);
}

/// A pair whose target was cut off, killed, or lost power, and is behind; and what it holds.
pub fn behind(seed: u64, undo: u64, prepare: impl FnOnce(&mut World)) -> (World, Content) {
    behind_of(&[Mode::Sync, Mode::Sync], seed, undo, prepare)
}

/// The same with further copies, which follow the source.
pub fn behind_of(
    modes: &[Mode],
    seed: u64,
    undo: u64,
    prepare: impl FnOnce(&mut World),
) -> (World, Content) {
    let volumes = [SIZE, SIZE / 2];
    let mut w = World::with_undo(seed, modes, OnPeerLoss::Continue, &volumes, true, undo);
    w.tear_metadata = true;
    w.tuning.resync_chunk_bytes = 16 << 10;
    w.tuning.resync_window_bytes = 64 << 10;
    prepare(&mut w);
    let all: Vec<usize> = (0..modes.len()).collect();
    for n in &all {
        w.start(*n);
    }
    w.until("the copies agree", 4000, |w| w.settled(&all));
    w.promote(SOURCE, false).unwrap_or_else(|e| panic!("{e}"));
    load(&mut w, SOURCE, 40);
    match seed % 3 {
        0 => cut(&mut w),
        cause => {
            w.cut.push((SOURCE, TARGET));
            w.crash(TARGET, cause == 1);
            w.start(TARGET);
        }
    }
    load(&mut w, SOURCE, 25);
    w.steps(200);
    let content = w.nodes[TARGET].disk.data.clone();
    w.nodes[TARGET].notices.clear();
    (w, content)
}

/// The link is back; `steps` things happen while the primary writes on.
pub fn resync_for(w: &mut World, steps: usize) {
    w.cut.clear();
    for step in 0..steps {
        w.step();
        if step % 9 == 0 && w.nodes[SOURCE].core.is_some() {
            one(w, SOURCE);
        }
    }
}

/// Whether the resync ended: the copy is at a later point of its source then.
pub fn ended(w: &World) -> bool {
    noticed(w, TARGET, "resync-complete") || state(w, TARGET) == CopyState::Complete
}

pub fn force(w: &mut World) {
    w.promote(TARGET, true).unwrap_or_else(|e| panic!("{e}"));
}

/// D12: exactly the old point, in the cache and on the platter.
pub fn is_old(w: &World, old: &Content, what: &str) {
    let disk = &w.nodes[TARGET].disk;
    assert_eq!(differs(&disk.data, old), None, "{what}: not the old point");
    assert_eq!(differs(&disk.durable, old), None, "{what}: not durably");
}

/// D7: every block in which the copies differ has a bit on one side or the other, the restored ones too.
pub fn known(w: &World, what: &str) {
    known_between(w, SOURCE, TARGET, what);
}

/// The same of any two copies that run.
pub fn known_between(w: &World, first: usize, second: usize, what: &str) {
    let marked = |n: usize, other: usize, volume: usize, offset: u64| {
        let core = w.nodes[n].core.as_ref().expect("it runs");
        let volume = VolumeIndex(volume as u16);
        core.marked(Slot(other as u8), volume, offset, BLOCK)
    };
    for volume in 0..w.nodes[first].disk.data.len() {
        let [a, b] = [first, second].map(|n| w.nodes[n].disk.data[volume].chunks(BLOCK as usize));
        for (block, (a, b)) in a.zip(b).enumerate() {
            let offset = block as u64 * BLOCK;
            let known =
                marked(first, second, volume, offset) || marked(second, first, volume, offset);
            assert!(
                a == b || known,
                "{what}: block {block} of volume {volume} differs and is not marked"
            );
        }
    }
}

/// The old primary comes back, its writes past the fork are given up, and both are one again.
pub fn old_primary_returns(w: &mut World) {
    load(w, TARGET, 10);
    let kept = w.nodes[TARGET].disk.data.clone();
    w.crash(SOURCE, false);
    w.cut.clear();
    w.start(SOURCE);
    w.until("split brain", 20_000, |w| {
        noticed(w, SOURCE, "split-brain") && w.nodes.iter().all(|n| n.wants.is_empty())
    });
    let discard_mine = Command::ResolveSplitBrain { discard_mine: true };
    w.command(SOURCE, discard_mine)
        .unwrap_or_else(|e| panic!("{e}"));
    w.command(TARGET, Command::Connect { peer: None })
        .unwrap_or_else(|e| panic!("{e}"));
    in_sync_again(w);
    assert_eq!(differs(&w.nodes[TARGET].disk.data, &kept), None);
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Cut {
    Link,
    Kill,
    Power,
    /// Killed, resumed, and lost power in the second attempt.
    Twice,
}

/// How the world stands when the resync was cut; false if it had ended before.
pub fn interrupt(w: &mut World, how: Cut) -> bool {
    match how {
        Cut::Link => cut(w),
        Cut::Kill | Cut::Power => {
            w.cut.push((SOURCE, TARGET));
            w.crash(TARGET, how == Cut::Power);
            w.start(TARGET);
        }
        Cut::Twice => {
            w.crash(TARGET, false);
            w.start(TARGET);
            resync_for(w, 60);
            if ended(w) {
                return false;
            }
            w.cut.push((SOURCE, TARGET));
            w.crash(TARGET, true);
            w.start(TARGET);
        }
    }
    !ended(w)
}

/// The records of the target's undo log as they are on its disk, with their places in the metadata area.
pub fn undo_records(w: &World) -> Vec<(u64, UndoRecord)> {
    let area = Layout::of(&on_disk(w, TARGET))
        .expect("a layout")
        .undo_offset;
    let mut found = Vec::new();
    let mut at = area + FIRST_RECORD;
    while let Some(block) = w.nodes[TARGET].disk.meta.get(&(0, at))
        && let Ok(record) = decode_record(block.as_slice().try_into().expect("4 KiB"))
    {
        let size = record.size();
        found.push((at, record));
        at += size;
    }
    found
}

/// Where the head of the target's undo log is in its metadata area.
pub fn undo_head_at(w: &World) -> u64 {
    Layout::of(&on_disk(w, TARGET))
        .expect("a layout")
        .undo_offset
}

/// What the target says of its way back.
pub fn undo(w: &World) -> UndoStatus {
    let core = w.nodes[TARGET].core.as_ref().expect("it runs");
    core.status(w.now)
        .undo
        .expect("it is in the middle of a resync")
}

/// The target lost its source in the middle of a resync, after so many steps of it; `None` if it had not begun or is
/// over.
pub fn left_alone(
    seed: u64,
    undo: u64,
    steps: usize,
    prepare: impl FnOnce(&mut World),
) -> Option<(World, Content)> {
    let (mut w, old) = behind(seed, undo, prepare);
    resync_for(&mut w, steps);
    cut(&mut w);
    (state(&w, TARGET) == CopyState::Inconsistent).then_some((w, old))
}
