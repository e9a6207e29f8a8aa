//! The target of a resync stays promotable (D11, D12): real cores, resyncs and rollbacks cut at every step.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock;
use holdfast_wire_format::undo_record::decode_head;
use world::*;

const SIZE: u64 = 1 << 20;
const UNDO: u64 = 4 << 20;
/// The copy that is filled, and its source.
const TARGET: usize = 1;
const SOURCE: usize = 0;

type Content = Vec<Vec<u8>>;

/// A random write, zero, discard or flush on primary `n`.
fn one(w: &mut World, n: usize) -> RequestId {
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

fn zero(w: &mut World, n: usize, volume: u16, offset: u64, length: u64) -> RequestId {
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

fn load(w: &mut World, n: usize, count: usize) {
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

fn cut(w: &mut World) {
    w.cut.push((SOURCE, TARGET));
    w.drop_link(SOURCE, TARGET, "cut");
}

fn state(w: &World, n: usize) -> CopyState {
    w.nodes[n]
        .core
        .as_ref()
        .expect("it runs")
        .status(w.now)
        .state
}

fn noticed(w: &World, n: usize, kind: &str) -> bool {
    w.nodes[n].notices.iter().any(|notice| notice.kind == kind)
}

/// The newer superblock of a copy's lead volume, as it is on the disk.
fn on_disk(w: &World, n: usize) -> Superblock {
    let slot = |offset| -> [u8; 4096] {
        let block = &w.nodes[n].disk.meta[&(0, offset)];
        block.as_slice().try_into().expect("4 KiB")
    };
    superblock::choose(&slot(0), &slot(4096))
        .expect("a superblock")
        .0
}

fn has_undo_head(w: &World, n: usize) -> bool {
    let offset = Layout::of(&on_disk(w, n)).expect("a layout").undo_offset;
    let block = w.nodes[n].disk.meta.get(&(0, offset));
    block.is_some_and(|b| decode_head(b.as_slice().try_into().expect("4 KiB")).is_ok())
}

fn differs(a: &Content, b: &Content) -> Option<(usize, usize)> {
    a.iter()
        .zip(b)
        .enumerate()
        .find_map(|(v, (a, b))| a.iter().zip(b).position(|(a, b)| a != b).map(|at| (v, at)))
}

fn same(w: &World) {
    let [a, b] = [SOURCE, TARGET].map(|n| &w.nodes[n].disk.data);
    assert_eq!(differs(a, b), None, "the copies differ");
}

fn in_sync_again(w: &mut World) {
    w.until("in sync again", 400_000, |w| {
        w.settled(&[SOURCE, TARGET]) && w.up_to_date(SOURCE) && w.up_to_date(TARGET)
    });
    same(w);
}

/// A pair whose target was cut off, killed, or lost power, and is behind; and what it holds.
fn behind(seed: u64, undo: u64, prepare: impl FnOnce(&mut World)) -> (World, Content) {
    let modes = [Mode::Sync, Mode::Sync];
    let volumes = [SIZE, SIZE / 2];
    let mut w = World::with_undo(seed, &modes, OnPeerLoss::Continue, &volumes, true, undo);
    w.tear_metadata = true;
    w.tuning.resync_chunk_bytes = 16 << 10;
    w.tuning.resync_window_bytes = 64 << 10;
    prepare(&mut w);
    w.start(SOURCE);
    w.start(TARGET);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
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
fn resync_for(w: &mut World, steps: usize) {
    w.cut.clear();
    for step in 0..steps {
        w.step();
        if step % 9 == 0 && w.nodes[SOURCE].core.is_some() {
            one(w, SOURCE);
        }
    }
}

/// Whether the resync ended: the copy is at a later point of its source then.
fn ended(w: &World) -> bool {
    noticed(w, TARGET, "resync-complete") || state(w, TARGET) == CopyState::Complete
}

fn force(w: &mut World) {
    w.promote(TARGET, true).unwrap_or_else(|e| panic!("{e}"));
}

/// D12: exactly the old point, in the cache and on the platter.
fn is_old(w: &World, old: &Content, what: &str) {
    let disk = &w.nodes[TARGET].disk;
    assert_eq!(differs(&disk.data, old), None, "{what}: not the old point");
    assert_eq!(differs(&disk.durable, old), None, "{what}: not durably");
}

/// D7: every block in which the copies differ has a bit on one side or the other, the restored ones too.
fn known(w: &World, what: &str) {
    let marked = |n: usize, other: usize, volume: usize, offset: u64| {
        let core = w.nodes[n].core.as_ref().expect("it runs");
        let volume = VolumeIndex(volume as u16);
        core.marked(Slot(other as u8), volume, offset, BLOCK)
    };
    for volume in 0..w.nodes[TARGET].disk.data.len() {
        let [a, b] = [SOURCE, TARGET].map(|n| w.nodes[n].disk.data[volume].chunks(BLOCK as usize));
        for (block, (a, b)) in a.zip(b).enumerate() {
            let offset = block as u64 * BLOCK;
            let known =
                marked(SOURCE, TARGET, volume, offset) || marked(TARGET, SOURCE, volume, offset);
            assert!(
                a == b || known,
                "{what}: block {block} of volume {volume} differs and is not marked"
            );
        }
    }
}

/// The old primary comes back, its writes past the fork are given up, and both are one again.
fn old_primary_returns(w: &mut World) {
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
enum Cut {
    Link,
    Kill,
    Power,
    /// Killed, resumed, and lost power in the second attempt.
    Twice,
}

/// How the world stands when the resync was cut; false if it had ended before.
fn interrupt(w: &mut World, how: Cut) -> bool {
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

#[test]
fn d12_forced_after_a_cut_resync_the_target_is_at_its_old_point() {
    let mut rolled_back = 0;
    for how in [Cut::Link, Cut::Kill, Cut::Power, Cut::Twice] {
        for seed in 0..3 {
            for steps in (seed as usize..420).step_by(20) {
                let (mut w, old) = behind(seed, UNDO, |_| ());
                resync_for(&mut w, steps);
                if !interrupt(&mut w, how) {
                    continue;
                }
                force(&mut w);
                let back = noticed(&w, TARGET, "rolled-back");
                // A copy flushes before it becomes a target. One that lost power before that has only lost what no
                // disk owed it.
                if back || matches!(how, Cut::Link | Cut::Kill) {
                    is_old(
                        &w,
                        &old,
                        &format!("seed {seed}, {how:?} after {steps} steps"),
                    );
                }
                if back {
                    known(&w, &format!("seed {seed}, {how:?} after {steps} steps"));
                    rolled_back += 1;
                    assert!(
                        !has_undo_head(&w, TARGET),
                        "a second rollback would undo more"
                    );
                }
                if steps % 5 == 0 {
                    old_primary_returns(&mut w);
                }
            }
        }
    }
    assert!(rolled_back > 100, "{rolled_back} rollbacks");
}
