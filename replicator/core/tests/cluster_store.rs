//! Copies whose record is in a register that all of them change by compare-and-swap: lost answers, late swaps, two that want the
//! same epoch, disks that the record does not know (`docs/cluster-store.md`).

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::*;
use world::*;

const SIZE: u64 = 1 << 20;

fn copies(seed: u64, modes: &[Mode], policy: OnPeerLoss, lost: u64) -> World {
    let mut w = World::with_register(seed, modes, policy, &[SIZE], lost);
    let all: Vec<usize> = (0..modes.len()).collect();
    for n in &all {
        w.start(*n);
    }
    w.until("the copies agree", 100_000, |w| w.settled(&all));
    w
}

fn set(slots: &[u8]) -> SlotSet {
    slots
        .iter()
        .fold(SlotSet::EMPTY, |set, slot| set.with(Slot(*slot)))
}

/// The whole of a pair's life: promoted, degraded, joined again, moved, whatever share of the store's answers is lost.
#[test]
fn a_pair_lives_with_a_register_that_loses_answers() {
    for lost in [0, 30, 60] {
        for seed in 0..15 {
            let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, lost);
            ok(w.promote(0, false));
            assert_eq!(w.record().epoch.owner, 0, "seed {seed}");
            assert_eq!(w.record().in_sync, set(&[0, 1]), "seed {seed}");
            written(&mut w, 0, 1, 1);
            cut(&mut w, 0, 1);
            written(&mut w, 0, 2, 2);
            assert_eq!(w.record().in_sync, set(&[0]), "seed {seed}: D1");
            w.cut.clear();
            w.until("copy 1 is in S again", 400_000, |w| {
                w.record().in_sync == set(&[0, 1]) && w.up_to_date(1)
            });
            assert!(holds(&w, 1, 2, 2), "seed {seed}");
            ok(w.command(0, Command::Demote));
            ok(w.promote(1, false));
            assert_eq!(w.record().epoch.owner, 1, "seed {seed}");
            written(&mut w, 1, 3, 3);
            assert!(holds(&w, 0, 3, 3), "seed {seed}");
        }
    }
}

/// D1, D18: as long as nobody knows whether S is without the lost copy, nothing completes without it.
#[test]
fn nothing_completes_while_an_outcome_is_unknown() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 0);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.register.as_mut().unwrap().cut.push(0);
        cut(&mut w, 0, 1);
        let request = write(&mut w, 0, 2, 2);
        w.steps(3000);
        assert_eq!(w.status_of(0, request), None, "seed {seed}");
        w.register.as_mut().unwrap().cut.clear();
        w.until("the write completes", 100_000, |w| {
            w.status_of(0, request).is_some()
        });
        assert_eq!(w.record().in_sync, set(&[0]), "seed {seed}");
    }
}

/// C1: the primary can't reach the store, the other copy is promoted: what the old primary was asked for meanwhile never completes.
#[test]
fn a_promoted_member_ends_the_right_of_a_primary_that_is_cut_off() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 20);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.register.as_mut().unwrap().cut.push(0);
        cut(&mut w, 0, 1);
        let request = write(&mut w, 0, 1, 9);
        w.steps(200);
        ok(w.promote(1, false));
        assert!(holds(&w, 1, 1, 1), "seed {seed}");
        written(&mut w, 1, 2, 2);
        w.steps(500);
        assert_eq!(w.status_of(0, request), None, "seed {seed}: split brain");
        w.register.as_mut().unwrap().cut.clear();
        w.cut.clear();
        w.until("both are equal", 400_000, |w| {
            w.record().in_sync == set(&[0, 1]) && w.up_to_date(0) && w.settled(&[0, 1])
        });
        assert_ne!(w.status_of(0, request), Some(Status::Ok), "seed {seed}");
        assert!(holds(&w, 0, 1, 1) && holds(&w, 0, 2, 2), "seed {seed}");
    }
}

/// Two members want the epoch and can't see each other: the register gives it to one.
#[test]
fn one_of_two_that_want_to_be_primary_is() {
    for seed in 0..40 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 30);
        cut(&mut w, 0, 1);
        let first = w.admin(0, Command::Promote { force: false });
        let second = w.admin(1, Command::Promote { force: false });
        w.until("both are answered", 200_000, |w| {
            w.nodes[0].admin.contains_key(&first) && w.nodes[1].admin.contains_key(&second)
        });
        let owner = w.record().epoch.owner as usize;
        let answers = [&w.nodes[0].admin[&first], &w.nodes[1].admin[&second]];
        // One that was promoted and then superseded counts as promoted, and completes nothing.
        assert!(answers[owner].is_ok(), "seed {seed}: {answers:?}");
        let other = write(&mut w, 1 - owner, 1, 7);
        written(&mut w, owner, 1, 1);
        w.steps(2000);
        assert_ne!(
            w.status_of(1 - owner, other),
            Some(Status::Ok),
            "seed {seed}"
        );
    }
}

/// A process ends while its change of S is on its way; whatever becomes of that, the next process knows S, and no late swap of the
/// old one changes it any more.
#[test]
fn a_swap_of_a_process_that_is_gone_settles_before_the_next_one_meets_anybody() {
    let mut late = 0;
    for seed in 0..60 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 0);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        write(&mut w, 0, 2, 2);
        w.until("the change is on its way", 20_000, |w| {
            let swap = |a: &Action| matches!(a, Action::StoreSwap { .. });
            w.nodes[0].pending.iter().any(swap)
        });
        w.crash(0, false);
        late += w.register.as_ref().unwrap().late.len();
        w.start(0);
        w.until("attached", 20_000, |w| {
            let mine = w.record().copies.iter().find(|c| c.slot == Slot(0));
            mine.is_some_and(|c| c.attach_counter == 2)
        });
        let settled = w.record().in_sync;
        w.until("nothing is late", 20_000, |w| {
            w.register.as_ref().unwrap().late.is_empty()
        });
        assert_eq!(w.record().in_sync, settled, "seed {seed}");
        w.cut.clear();
        ok(w.promote(0, false));
        w.until("both are in S", 400_000, |w| {
            w.record().in_sync == set(&[0, 1])
        });
        assert!(holds(&w, 0, 1, 1) && holds(&w, 1, 1, 1), "seed {seed}");
        assert_eq!(w.nodes[0].disk.data, w.nodes[1].disk.data, "seed {seed}");
    }
    assert!(late > 0, "the case was reached");
}

/// An old image of a member's disk is attached once more: it is no member, and never promoted unasked.
#[test]
fn a_disk_that_went_back_in_time_leaves_s_when_it_is_attached() {
    for seed in 0..10 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 20);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.crash(1, false);
        let old = w.nodes[1].disk.clone();
        w.start(1);
        w.until("copy 1 is back", 400_000, |w| {
            w.settled(&[0, 1]) && w.record().in_sync == set(&[0, 1])
        });
        written(&mut w, 0, 1, 2);
        w.crash(0, false);
        w.crash(1, false);
        w.nodes[1].disk = old;
        w.start(1);
        w.until("the record knows", 20_000, |w| {
            w.record().in_sync == set(&[0])
        });
        w.promote(1, false)
            .expect_err("it lacks what was acknowledged");
        w.start(0);
        ok(w.promote(0, false));
        w.until("both are in S", 400_000, |w| {
            w.record().in_sync == set(&[0, 1])
        });
        assert!(holds(&w, 1, 1, 2), "seed {seed}");
    }
}

/// The same, and nobody else is in S: S is never empty, and a person decides.
#[test]
fn the_only_member_s_disk_went_back_in_time() {
    for seed in 0..10 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 0);
        ok(w.promote(0, false));
        cut(&mut w, 0, 1);
        written(&mut w, 0, 1, 1);
        assert_eq!(w.record().in_sync, set(&[0]));
        w.crash(0, false);
        let old = w.nodes[0].disk.clone();
        w.start(0);
        w.until("attached", 20_000, |w| {
            let mine = w.record().copies.iter().find(|c| c.slot == Slot(0));
            mine.is_some_and(|c| c.attach_counter == 2)
        });
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 2);
        w.crash(0, false);
        w.nodes[0].disk = old;
        w.start(0);
        let answer = w.promote(0, false);
        answer.expect_err("it lacks what was acknowledged");
        assert_eq!(w.record().in_sync, set(&[0]), "seed {seed}");
        ok(w.promote(0, true));
        written(&mut w, 0, 1, 3);
    }
}

/// D13: the primary's disk fails; requests go on once the record names the server alone, and not before.
#[test]
fn a_primary_without_a_disk_goes_on_once_the_record_names_its_server() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 2], OnPeerLoss::Continue, 20);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.register.as_mut().unwrap().cut.push(0);
        w.nodes[0].broken = true;
        let request = write(&mut w, 0, 2, 2);
        w.steps(1000);
        if seed % 2 == 0 {
            // They meet again before the record says it: the server has taken over, and still is not alone in S.
            let register = w.register.as_mut().unwrap();
            register.cut.clear();
            register.read_only = true;
            w.drop_link(0, 1, "a blip");
            w.steps(1000);
        }
        let record = w.record().in_sync;
        let answered = w.status_of(0, request);
        assert!(answered.is_none() || record == set(&[1]), "seed {seed}");
        w.register.as_mut().unwrap().cut.clear();
        w.register.as_mut().unwrap().read_only = false;
        written(&mut w, 0, 3, 3);
        assert_eq!(w.record().in_sync, set(&[1]), "seed {seed}");
        w.crash(0, false);
        ok(w.promote(1, false));
        assert!(holds(&w, 1, 3, 3) && holds(&w, 1, 1, 1), "seed {seed}");
    }
}

/// The register lost commits (C13): nothing is promoted by it.
#[test]
fn a_register_that_went_back_in_time_promotes_nobody() {
    let mut w = copies(1, &[Mode::Sync; 2], OnPeerLoss::Continue, 0);
    let old = w.record().clone();
    ok(w.promote(0, false));
    written(&mut w, 0, 1, 1);
    w.crash(0, false);
    w.register.as_mut().unwrap().record = Some(old);
    let refusal = w.promote(1, false).expect_err("the store is behind");
    assert!(refusal.what.contains("back in time"), "{refusal}");
}

/// A semi-synchronous copy that stopped uncleanly had acknowledged what was in its memory alone: it leaves S as it is attached.
#[test]
fn a_semi_synchronous_copy_that_stopped_uncleanly_leaves_s() {
    for seed in 0..10 {
        let modes = [Mode::SemiSync, Mode::SemiSync];
        let mut w = copies(seed, &modes, OnPeerLoss::Continue, 20);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.crash(0, true);
        w.crash(1, true);
        w.start(1);
        w.until("the record knows", 20_000, |w| {
            w.record().in_sync == set(&[0])
        });
        w.promote(1, false)
            .expect_err("it may lack what it had acknowledged");
        w.start(0);
        ok(w.promote(0, false));
        w.until("both are in S", 400_000, |w| {
            w.record().in_sync == set(&[0, 1])
        });
    }
}

/// Three copies: S is changed beside a follower that stays, which holds the generation before the record names it (D10).
#[test]
fn three_copies_and_one_of_them_is_lost() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 3], OnPeerLoss::Continue, 30);
        ok(w.promote(0, false));
        w.until("all are in S", 400_000, |w| {
            w.record().in_sync == set(&[0, 1, 2])
        });
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 2);
        cut(&mut w, 1, 2);
        written(&mut w, 0, 2, 2);
        // The one that stays may have to meet again, and joins.
        w.until("copy 1 is in S", 400_000, |w| {
            w.record().in_sync == set(&[0, 1])
        });
        w.crash(0, false);
        w.promote(2, false).expect_err("it is not in S");
        ok(w.promote(1, false));
        assert!(holds(&w, 1, 2, 2), "seed {seed}");
        written(&mut w, 1, 3, 3);
        w.cut.clear();
        w.start(0);
        w.until("all are in S", 1_000_000, |w| {
            w.record().in_sync == set(&[0, 1, 2]) && w.settled(&[0, 1, 2])
        });
        for n in 0..3 {
            assert!(holds(&w, n, 2, 2) && holds(&w, n, 3, 3), "seed {seed}: {n}");
        }
    }
}
