//! A copy is filled: who else it agrees with meanwhile, who takes it into S afterwards, and what others make of its position.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::*;
use world::*;

const SIZE: u64 = 1 << 20;

/// D17: copy 2 follows copy 0, and copy 1 is promoted by force and fills it. What it had of copy 0's order of writes is over: promoted
/// itself it counts on from where copy 1 was.
#[test]
fn a_primary_that_was_superseded_is_left_by_whom_the_newer_one_fills() {
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend, SIZE);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        cut(&mut w, 1, 2);
        for block in 10..18 {
            write(&mut w, 0, block, 2);
        }
        w.until("copy 2 has them", 100_000, |w| {
            (10..18).all(|block| holds(w, 2, block, 2))
        });
        ok(w.promote(1, true));
        mend(&mut w, 1, 2);
        w.until("copy 1 fills copy 2", 100_000, |w| {
            w.settled(&[1, 2]) && w.up_to_date(2)
        });
        ok(w.command(1, Command::Demote));
        ok(w.promote(2, false));
        written(&mut w, 2, 3, 3);
        assert!(holds(&w, 1, 3, 3), "seed {seed}");
    }
}

/// D1, D8: copies 1 and 2 agree, and copy 0 begins to fill copy 1, which is a mixture until that ends. Copy 2 is not to count on it.
#[test]
fn who_is_filled_by_a_follower_agrees_with_nobody_else() {
    let mut met = 0;
    for seed in 0..40 {
        let mut w = together(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend, SIZE);
        ok(w.promote(2, false));
        written(&mut w, 2, 1, 1);
        cut(&mut w, 0, 1);
        w.crash(1, false);
        ok(w.command(2, Command::Demote));
        w.start(1);
        w.until("copies 1 and 2 agree", 100_000, |w| {
            w.settled(&[1, 2]) && w.up_to_date(1)
        });
        // Copy 0 does not know that copy 1 is whole again: it fills it once more.
        w.cut.clear();
        let mut filled = false;
        for _ in 0..3000 {
            w.step();
            if on_disk(&w, 1).state == CopyState::Inconsistent {
                filled = true;
                assert!(
                    !w.settled(&[1, 2]),
                    "seed {seed}: copy 2 agrees with a mixture"
                );
            }
        }
        met += u32::from(filled);
    }
    assert!(met > 5, "met {met} times");
}

/// C2: the owner's disk was replaced, and copy 2 fills the new one. It lost power, and copy 0, a member of S as well, may have what it lost:
/// the owner does not count as one that has everything.
#[test]
fn who_lost_power_takes_nobody_into_s_while_another_member_may_have_more() {
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::SemiSync; 3], OnPeerLoss::Suspend, SIZE);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 1);
        w.crash(0, false);
        w.crash(2, true);
        w.crash(1, false);
        let fresh = World::new(seed + 1000, &w.modes, OnPeerLoss::Suspend, &[SIZE], false);
        w.nodes[1].disk = fresh.nodes.into_iter().nth(1).expect("three").disk;
        w.start(1);
        w.start(2);
        w.until("copy 2 fills the new disk", 100_000, |w| {
            w.settled(&[1, 2]) && on_disk(w, 1).state == CopyState::Complete
        });
        w.steps(500);
        let in_sync = on_disk(&w, 2).in_sync;
        assert!(!in_sync.contains(Slot(1)), "seed {seed}: {in_sync:?}");
    }
}

/// C1: the primary stopped uncleanly and knows a lower position than it had when it fills its follower. That one went back on purpose, and
/// says so: others recorded more of it, and would take its disk for a restored backup (row 5).
#[test]
fn who_is_filled_up_to_a_lower_position_says_that_it_went_back() {
    let mut lower = 0;
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::Sync, Mode::Async], OnPeerLoss::Continue, SIZE);
        ok(w.promote(0, false));
        for block in 0..6 {
            written(&mut w, 0, block, 1);
        }
        w.until("copy 1 has them", 100_000, |w| holds(w, 1, 5, 1));
        let held = |w: &World| {
            let superblock = on_disk(w, 1);
            superblock
                .position
                .saturating_sub(superblock.generation_base)
        };
        w.steps(500);
        w.crash(0, false);
        w.start(0);
        w.until("copy 0 fills copy 1", 100_000, |w| {
            on_disk(w, 1).state == CopyState::Inconsistent
        });
        let (generation, before) = on_disk(&w, 1).before_resync;
        w.until("copy 1 is whole", 100_000, |w| {
            w.settled(&[0, 1]) && on_disk(w, 1).state == CopyState::Complete
        });
        let same = on_disk(&w, 1).generations.last().map(|g| g.id) == Some(generation);
        if same && held(&w) < before {
            lower += 1;
            assert!(on_disk(&w, 1).flags.rolled_back, "seed {seed}");
        }
    }
    assert!(lower > 5, "lower {lower} times");
}

/// D14: who gives up its writes is not what those that it agreed with took it for. They meet it anew, and one of them fills it.
#[test]
fn who_gives_up_its_writes_meets_everybody_anew() {
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::Sync; 3], OnPeerLoss::Continue, SIZE);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        cut(&mut w, 0, 2);
        written(&mut w, 0, 2, 2);
        ok(w.promote(1, true));
        w.until("copy 2 follows copy 1", 100_000, |w| {
            w.settled(&[1, 2]) && w.up_to_date(2)
        });
        written(&mut w, 1, 3, 3);
        mend(&mut w, 0, 1);
        w.until("split brain", 100_000, |w| noticed(w, 1, "split-brain"));
        ok(w.command(1, Command::Demote));
        cut(&mut w, 0, 1);
        assert!(w.settled(&[1, 2]), "seed {seed}");
        ok(w.command(1, Command::ResolveSplitBrain { discard_mine: true }));
        w.until("copy 2 fills copy 1", 100_000, |w| {
            w.settled(&[1, 2])
                && matches!(
                    on_disk(w, 1).state,
                    CopyState::Complete | CopyState::UpToDate
                )
        });
    }
}

/// D14: the writes of copy 1 are given up, and copy 2 fills it. A person who says so once more in the midst of that changes nothing: what is
/// on its way is what this copy waits for.
#[test]
fn who_is_being_filled_has_nothing_left_to_give_up() {
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::Sync; 3], OnPeerLoss::Continue, SIZE);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        cut(&mut w, 1, 2);
        written(&mut w, 0, 2, 2);
        w.until("copy 2 follows", 100_000, |w| {
            w.settled(&[0, 2]) && w.up_to_date(2) && holds(w, 2, 2, 2)
        });
        ok(w.promote(1, true));
        written(&mut w, 1, 3, 3);
        mend(&mut w, 0, 1);
        w.until("split brain", 100_000, |w| noticed(w, 1, "split-brain"));
        ok(w.command(1, Command::Demote));
        cut(&mut w, 0, 1);
        w.crash(0, false);
        let discard = Command::ResolveSplitBrain { discard_mine: true };
        ok(w.command(1, discard.clone()));
        mend(&mut w, 1, 2);
        w.until("copy 2 fills copy 1", 100_000, |w| {
            on_disk(w, 1).state == CopyState::Inconsistent
        });
        let refused = w.command(1, discard);
        w.until("copy 1 is whole", 100_000, |w| {
            w.settled(&[1, 2])
                && matches!(
                    on_disk(w, 1).state,
                    CopyState::Complete | CopyState::UpToDate
                )
        });
        let refused = refused.expect_err("nothing is left").to_string();
        assert!(refused.contains("being filled"), "{refused}");
        assert!(!noticed(&w, 1, "bad-frame"), "seed {seed}");
        assert!(holds(&w, 1, 2, 2) && !holds(&w, 1, 3, 3), "seed {seed}");
    }
}

/// D14: copy 1 was primary, and a newer one takes it over. Copy 2 followed it and is not to be taken for a follower any more: what it still
/// says is of an order of writes that is over.
#[test]
fn a_primary_that_is_superseded_leaves_its_followers() {
    for seed in 0..40 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let mut w = together(seed, &modes, OnPeerLoss::Suspend, SIZE);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 1);
        cut(&mut w, 0, 1);
        cut(&mut w, 0, 2);
        for block in 10..18 {
            write(&mut w, 1, block, 2);
        }
        w.flush(1);
        ok(w.promote(0, false));
        mend(&mut w, 0, 1);
        w.until("copy 0 fills copy 1", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(1)
        });
        assert!(!noticed(&w, 1, "bad-frame"), "seed {seed}");
        mend(&mut w, 0, 2);
        w.until("all follow", 400_000, |w| w.settled(&[0, 1, 2]));
        for n in 1..3 {
            assert!(
                holds(&w, n, 1, 1) && !holds(&w, n, 10, 2),
                "seed {seed}: {n}"
            );
        }
    }
}

/// Two histories that have nothing in common: a person gives up one of them, as row 17 says, also that of the only member of its S.
#[test]
fn an_unrelated_copy_is_invalidated_and_filled() {
    for seed in 0..10 {
        let mut w = together(seed, &[Mode::Sync; 2], OnPeerLoss::Suspend, SIZE);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.crash(1, false);
        cut(&mut w, 0, 1);
        let fresh = World::new(seed + 1000, &w.modes, OnPeerLoss::Suspend, &[SIZE], false);
        w.nodes[1].disk = fresh.nodes.into_iter().nth(1).expect("two").disk;
        w.start(1);
        ok(w.promote(1, true));
        written(&mut w, 1, 2, 2);
        ok(w.command(1, Command::Demote));
        mend(&mut w, 0, 1);
        w.until("they refuse each other", 100_000, |w| {
            let status = w.nodes[1].core.as_ref().expect("a process").status(w.now);
            status.peers[0].handshake.starts_with("Row 17")
        });
        ok(w.command(1, Command::Invalidate));
        ok(w.command(0, Command::Connect { peer: None }));
        w.until("it is filled", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(1)
        });
        assert!(holds(&w, 1, 1, 1) && !holds(&w, 1, 2, 2), "seed {seed}");
    }
}
