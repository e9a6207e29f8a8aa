//! The mode of replication is changed, or is not the same on both sides: what a copy had in its memory alone is never counted as if
//! it had been on its disk.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::{ok, write, written};
use world::*;

fn pair(seed: u64, modes: &[Mode; 2]) -> World {
    let mut w = World::new(seed, modes, OnPeerLoss::Suspend, &[1 << 20], true);
    w.start(0);
    w.start(1);
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    ok(w.promote(0, false));
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    w
}

fn set_mode(w: &mut World, n: usize, mode: Mode) {
    let peer = Slot(1 - n as u8);
    ok(w.command(n, Command::SetMode { peer, mode }));
}

/// Everything goes on but the disk of copy 1, until nothing else is to be done.
fn without_its_disk(w: &mut World) {
    for _ in 0..200 {
        w.deliver_all();
        if w.nodes[0].pending.is_empty() {
            return;
        }
        w.finish_first(0);
    }
}

/// The write was acknowledged, and copy 1 has it in memory alone.
fn in_memory_alone(w: &mut World, fill: u8) -> bool {
    let request = write(w, 0, 3, fill);
    without_its_disk(w);
    w.status_of(0, request) == Some(Status::Ok) && !world::story::holds(w, 1, 3, fill)
}

fn not_promoted_alone(w: &mut World, what: &str) {
    w.crash(0, false);
    let refusal = w.promote(1, false).expect_err(what).to_string();
    assert!(refusal.contains("memory alone"), "{what}: {refusal}");
}

/// D1, C2: the primary was told that its peer is written to semi-synchronously, and the peer was not: then it counts as any
/// synchronous copy, to itself and to the primary.
#[test]
fn a_copy_that_was_not_told_acknowledges_what_is_on_its_disk() {
    for seed in 0..20 {
        let mut w = pair(seed, &[Mode::Sync; 2]);
        set_mode(&mut w, 0, Mode::SemiSync);
        w.steps(300);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        assert!(!in_memory_alone(&mut w, 7), "seed {seed}");
        w.steps(100);
        // It may be promoted after a stop, since it lost nothing.
        w.crash(1, false);
        w.crash(0, false);
        w.start(1);
        ok(w.promote(1, false));
        assert!(world::story::holds(&w, 1, 3, 7), "seed {seed}");
    }
}

/// C2: told by both sides, it acknowledges from memory, and knows after an unclean stop that it did.
#[test]
fn a_copy_that_acknowledged_from_memory_is_not_promoted_alone_after_it_stopped() {
    let mut w = pair(1, &[Mode::Sync; 2]);
    set_mode(&mut w, 0, Mode::SemiSync);
    set_mode(&mut w, 1, Mode::SemiSync);
    w.steps(300);
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    assert!(in_memory_alone(&mut w, 7));
    w.crash(1, false);
    w.start(1);
    not_promoted_alone(&mut w, "it lost what it had acknowledged");
}

/// C2: another mode, told to it while it runs or in the configuration of its next start, changes nothing about what it had in its
/// memory before.
#[test]
fn another_mode_does_not_make_a_copy_forget_what_its_memory_held() {
    for told_while_it_runs in [false, true] {
        let mut w = pair(2, &[Mode::SemiSync; 2]);
        assert!(in_memory_alone(&mut w, 7));
        if told_while_it_runs {
            let peer = Slot(0);
            let mode = Mode::Sync;
            w.admin(1, Command::SetMode { peer, mode });
            // Its superblock lands, the data does not.
            let data = |action: &Action| matches!(action, Action::DiskWrite { .. });
            for _ in 0..20 {
                w.deliver_all();
                if let Some(at) = w.nodes[1].pending.iter().position(|a| !data(a)) {
                    w.finish(1, at);
                }
            }
            assert!(!world::story::holds(&w, 1, 3, 7));
        }
        w.crash(1, false);
        w.modes = vec![Mode::Sync; 2];
        w.start(1);
        // Nor does one more stop.
        w.crash(1, false);
        w.start(1);
        not_promoted_alone(&mut w, "it lost what it had acknowledged");
    }
}

/// Once it was filled again it is as good as any synchronous copy.
#[test]
fn a_copy_that_was_filled_in_sync_mode_forgets_the_mode_of_before() {
    let mut w = pair(3, &[Mode::SemiSync; 2]);
    assert!(in_memory_alone(&mut w, 7));
    w.crash(1, false);
    w.modes = vec![Mode::Sync; 2];
    set_mode(&mut w, 0, Mode::Sync);
    w.start(1);
    w.until("it is whole", 40_000, |w| {
        w.settled(&[0, 1]) && w.up_to_date(1)
    });
    written(&mut w, 0, 4, 8);
    w.crash(1, false);
    w.crash(0, false);
    w.start(1);
    ok(w.promote(1, false));
    assert!(world::story::holds(&w, 1, 3, 7));
    assert!(world::story::holds(&w, 1, 4, 8));
}
