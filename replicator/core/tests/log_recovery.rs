//! A run that kept no activity log, and a log whose ring is damaged: every block counts as different until both that is
//! known durably and the ring can be believed again (D7).

mod world;

use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::*;
use world::*;

const SIZE: u64 = 1 << 20;

/// A primary stopped uncleanly in the middle of writes, its peer away.
fn stopped_primary(seed: u64, activity_log: bool) -> World {
    let modes = [Mode::Sync, Mode::Sync];
    let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &[SIZE], true);
    w.tuning.activity_log = activity_log;
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w.promote(0, false).unwrap();
    for _ in 0..20 {
        let offset = w.rng.below(SIZE / 512) * 512;
        let fill = w.rng.next() as u8;
        w.write(0, 0, offset, vec![fill; 512], false);
        let steps = w.rng.below(8) as usize;
        w.steps(steps);
    }
    w.crash(0, true);
    w.crash(1, true);
    w
}

/// Attaches and stops again uncleanly a few times, each after a few steps.
fn restarted(w: &mut World) {
    for _ in 0..3 {
        w.start(0);
        let steps = w.rng.below(60) as usize;
        w.steps(steps);
        w.crash(0, true);
    }
    w.start(0);
    w.until("attached", 2000, |w| {
        w.nodes[0].core.as_ref().unwrap().probe().attached
    });
}

fn every_block_is_marked(w: &World, why: &str) {
    let core = w.nodes[0].core.as_ref().unwrap();
    for offset in (0..SIZE).step_by(512) {
        assert!(
            core.marked(Slot(1), VolumeIndex(0), offset, 512),
            "D7: byte {offset} is not marked after {why}"
        );
    }
}

fn superblock(w: &World) -> Superblock {
    [0, 4096]
        .iter()
        .filter_map(|at| w.nodes[0].disk.meta.get(&(0, *at)))
        .filter_map(|bytes| {
            holdfast_wire_format::superblock::decode(bytes.as_slice().try_into().unwrap()).ok()
        })
        .max_by_key(|sb| sb.sequence)
        .unwrap()
}

/// Every sector that differs is known to differ, and the two end equal.
fn converges(w: &mut World) {
    w.start(1);
    w.until("in sync again", 400_000, |w| {
        w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
    });
    assert!(w.nodes[0].disk.data == w.nodes[1].disk.data);
}

#[test]
fn a_run_without_a_log_is_not_forgotten_by_one_with_it() {
    for seed in 0..60 {
        let mut w = stopped_primary(seed, false);
        w.tuning.activity_log = true;
        restarted(&mut w);
        every_block_is_marked(&w, "a run that kept no activity log");
        converges(&mut w);
    }
}

#[test]
fn a_log_stands_for_the_run_that_kept_it() {
    // The other way round the log is all that is needed: no full copy.
    let mut w = stopped_primary(7, true);
    w.tuning.activity_log = false;
    w.start(0);
    w.until("attached", 2000, |w| {
        w.nodes[0].core.as_ref().unwrap().probe().attached
    });
    assert!(superblock(&w).log_incomplete);
    w.crash(0, true);
    w.start(0);
    every_block_is_marked(&w, "an unclean stop of a run without a log");
    converges(&mut w);
}

#[test]
fn a_damaged_ring_is_emptied_only_behind_its_marks() {
    for seed in 0..60 {
        let mut w = stopped_primary(seed, true);
        let sb = superblock(&w);
        let ring = Layout::of(&sb).unwrap().activity_log_offset;
        for block in 0..u64::from(sb.al_blocks) {
            if block < 2 || w.rng.chance(50) {
                let block = (0, ring + block * 4096);
                w.nodes[0].disk.meta.insert(block, vec![0x5a; 4096]);
            }
        }
        restarted(&mut w);
        every_block_is_marked(&w, "the ring was damaged");
        w.until("the marks are durable", 2000, |w| {
            !superblock(w).log_incomplete
        });
        // And the next unclean stop costs what its own log says, with the marks kept.
        w.crash(0, true);
        w.start(0);
        every_block_is_marked(&w, "the marks were durable");
        assert!(!superblock(&w).log_incomplete);
        converges(&mut w);
    }
}
