//! Three copies, each defect in the smallest story that shows it: who is in S, who may be promoted, and who fills whom
//! when a third copy knows something that the other two do not. All were found by the simulator.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::*;
use world::*;

const SIZE: u64 = 1 << 20;
const FOLLOWED: [Mode; 3] = [Mode::Sync, Mode::Sync, Mode::Async];

fn copies(seed: u64, modes: &[Mode]) -> World {
    together(seed, modes, OnPeerLoss::Suspend, SIZE)
}

fn blank_disk(w: &mut World, n: usize, seed: u64) {
    let mut fresh = World::new(
        seed + 1_000_000,
        &w.modes.clone(),
        OnPeerLoss::Suspend,
        &[SIZE],
        false,
    );
    std::mem::swap(&mut w.nodes[n].disk, &mut fresh.nodes[n].disk);
}

/// C1, D13: the primary's disk failed and it goes on through one of two members of S. The other gets nothing any more,
/// and neither a promotion there nor the server's agreement may make up for it.
#[test]
fn a_member_that_a_diskless_primary_left_behind_is_not_promoted() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 3]);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.nodes[0].broken = true;
        written(&mut w, 0, 1, 2);
        // The write that met the failure was on its way to both; this one goes through the server alone.
        written(&mut w, 0, 2, 2);
        let server = (1..3)
            .find(|n| on_disk(&w, *n).in_sync == SlotSet::only(Slot(*n as u8)))
            .expect("one of them serves");
        let other = 3 - server;
        assert!(!holds(&w, other, 2, 2), "seed {seed}: nothing tells it");
        w.crash(0, false);
        if let Ok(text) = w.promote(other, false) {
            assert!(holds(&w, other, 2, 2), "seed {seed}: {text}");
            continue;
        }
        w.until("the two agree", 100_000, |w| w.settled(&[1, 2]));
        ok(w.promote(server, false));
        assert!(holds(&w, server, 2, 2), "seed {seed}");
    }
}

/// C1: S names slots. A new disk in the slot of a member, filled by a copy outside S, is no member: the primary that
/// stopped uncleanly is not filled from it.
#[test]
fn a_new_disk_in_the_slot_of_a_member_is_no_member() {
    for seed in 0..20 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 2);
        // Copies 0 and 1 alone have it, and only copy 0 keeps it.
        written(&mut w, 0, 1, 2);
        w.crash(0, false);
        w.crash(1, false);
        blank_disk(&mut w, 1, seed);
        w.start(1);
        w.until("copy 2 fills the new disk", 100_000, |w| {
            on_disk(w, 1).state == CopyState::Complete && w.settled(&[1, 2])
        });
        w.cut.clear();
        w.start(0);
        w.until("all are whole", 400_000, |w| {
            w.settled(&[0, 1, 2]) && w.up_to_date(0)
        });
        ok(w.promote(0, false));
        assert!(holds(&w, 0, 1, 2), "seed {seed}: it was acknowledged");
    }
}

/// C1: copy 2 was told S = {1}. Copy 0 came back to S since, and cannot be reached by copy 2: the agreement of copy 1
/// alone is not enough, for copy 0 may be promoted too.
#[test]
fn every_member_that_any_of_them_knows_is_asked() {
    let mut reached = 0;
    for seed in 0..20 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 1);
        cut(&mut w, 0, 2);
        for n in 0..3 {
            w.crash(n, true);
        }
        for n in 0..3 {
            w.start(n);
        }
        w.until("copy 0 is back in S", 400_000, |w| {
            w.settled(&[1, 2]) && w.settled(&[0, 1]) && w.up_to_date(0)
        });
        if on_disk(&w, 0).in_sync.contains(Slot(0)) {
            reached += 1;
            w.promote(2, false)
                .expect_err("copy 0 is in S and was not asked");
        }
    }
    assert!(reached > 0);
}

/// C1: who follows a primary asynchronously has left S, durably, before that primary serves.
#[test]
fn members_leave_s_before_an_asynchronous_copy_serves() {
    for seed in 0..20 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        ok(w.command(0, Command::Demote));
        w.until("copy 2 has everything", 100_000, |w| {
            w.settled(&[0, 1, 2]) && holds(w, 2, 1, 1)
        });
        ok(w.promote(2, false));
        for n in 0..2 {
            let in_sync = on_disk(&w, n).in_sync;
            assert!(
                !in_sync.contains(Slot(n as u8)),
                "seed {seed}: copy {n} counts itself to {in_sync:?}"
            );
        }
    }
}

/// D7: a write that is parked, and so on the disk of the primary alone, reaches copy 2 by a resync. Copy 1, a member of
/// S, never gets it; when the primary is gone, copy 2 has to know.
#[test]
fn what_a_resync_brought_is_known_toward_members_too() {
    for seed in 0..20 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        let parked = write(&mut w, 0, 1, 2);
        w.steps(200);
        assert_eq!(w.status_of(0, parked), None, "seed {seed}");
        w.drop_link(0, 2, "a blip");
        w.until("the block is there", 100_000, |w| holds(w, 2, 1, 2));
        w.crash(0, false);
        w.until("copies 1 and 2 are equal", 400_000, |w| {
            let equal = w.nodes[1].disk.data == w.nodes[2].disk.data;
            let one = w.settled(&[1, 2]) && on_disk(w, 2).state == CopyState::Complete;
            if one {
                assert!(equal, "seed {seed}: nobody knows that they differ");
            } else if w.settled(&[1, 2]) && on_disk(w, 2).state == CopyState::Inconsistent {
                // Nothing leads further without a promotion or a new meeting.
                return true;
            }
            one
        });
        w.start(0);
        w.cut.clear();
        w.until("all are whole", 400_000, |w| {
            w.settled(&[0, 1, 2]) && w.up_to_date(1)
        });
        ok(w.promote(1, false));
        w.until("all follow", 400_000, |w| w.settled(&[0, 1, 2]));
        let flush = w.flush(1);
        w.until("flushed", 100_000, |w| w.status_of(1, flush).is_some());
        for n in [0, 2] {
            assert!(
                w.nodes[1].disk.data == w.nodes[n].disk.data,
                "seed {seed}: copy {n} differs"
            );
        }
    }
}

/// D7: copy 2 was killed in the middle of a full copy. When it goes on, what had come and was not flushed is found to be equal and not
/// sent again; it is what copy 1, in the middle of a resync from the same primary, lacks. Copy 2 goes on filling copy 1 when the
/// primary is gone, and has to know.
#[test]
fn what_came_before_a_resync_went_on_is_known_toward_a_third_copy() {
    // In another extent of the log than what copy 0 wrote.
    let far = 2050..2058;
    let (mut reached, mut compared) = (0, 0);
    for seed in 0..40 {
        let mut w = World::new(seed, &FOLLOWED, OnPeerLoss::Suspend, &[16 << 20], true);
        // They never met: neither has a list toward the other, and all is compared.
        w.cut.push((1, 2));
        for n in 0..3 {
            w.start(n);
        }
        w.until("they agree with copy 0", 4000, |w| {
            w.settled(&[0, 1]) && w.settled(&[0, 2])
        });
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        w.until("copy 2 has it", 100_000, |w| holds(w, 2, 1, 1));
        cut(&mut w, 0, 2);
        // Copy 0 becomes a target of copy 1, and gets nowhere.
        w.crash(0, false);
        w.start(0);
        w.until("copy 0 is a target", 100_000, |w| {
            on_disk(w, 0).state == CopyState::Inconsistent
        });
        cut(&mut w, 0, 1);
        w.crash(1, false);
        w.start(1);
        ok(w.promote(1, false));
        for block in far.clone() {
            written(&mut w, 1, block, 5);
        }
        w.crash(1, false);
        w.start(1);
        mend(&mut w, 1, 2);
        w.until("what copy 1 wrote came to copy 2", 400_000, |w| {
            far.clone().all(|block| holds(w, 2, block, 5))
        });
        if on_disk(&w, 2).state != CopyState::Inconsistent {
            continue;
        }
        w.crash(2, false);
        w.start(2);
        w.until("copy 2 is whole", 400_000, |w| {
            on_disk(w, 2).state == CopyState::Complete
        });
        let source = w.nodes[1].core.as_ref().expect("a process");
        compared += source.status(w.now).counters.resync_equal_bytes;
        mend(&mut w, 0, 1);
        let goal = on_disk(&w, 1).generations.last().expect("one").id;
        w.until("copy 0 is its target, too", 400_000, |w| {
            on_disk(w, 0).target_of == goal
        });
        cut(&mut w, 0, 1);
        cut(&mut w, 1, 2);
        if far.clone().all(|block| holds(&w, 0, block, 5)) {
            continue;
        }
        mend(&mut w, 0, 2);
        w.until("copy 2 fills copy 0", 400_000, |w| {
            on_disk(w, 0).state == CopyState::Complete && w.settled(&[0, 2])
        });
        reached += 1;
        assert!(
            w.nodes[0].disk.data == w.nodes[2].disk.data,
            "seed {seed}: nobody knows that they differ"
        );
    }
    assert!(
        reached > 10 && compared > 0,
        "reached {reached} times, {compared} bytes compared"
    );
}

/// D7: a parked write is on the disks of the primary and of copy 2 when the primary is demoted. "All of it is durable" is true of
/// those two alone: copy 1, a member of S that cannot be reached, lacks it, and copy 2 has to know when the primary is gone.
#[test]
fn what_a_lost_member_lacks_is_known_after_a_demotion() {
    for modes in [[Mode::Sync; 3], FOLLOWED] {
        for seed in 0..20 {
            let mut w = copies(seed, &modes);
            ok(w.promote(0, false));
            written(&mut w, 0, 1, 1);
            cut(&mut w, 0, 1);
            cut(&mut w, 1, 2);
            let parked = write(&mut w, 0, 40, 2);
            w.steps(300);
            assert_eq!(w.status_of(0, parked), None, "seed {seed}");
            ok(w.command(0, Command::Demote));
            w.until("copy 2 has it", 100_000, |w| holds(w, 2, 40, 2));
            w.steps(300);
            w.crash(0, false);
            w.cut.clear();
            agree(&mut w, 1, 2);
            assert!(
                w.nodes[1].disk.data == w.nodes[2].disk.data,
                "seed {seed}: nobody knows that they differ"
            );
        }
    }
}

/// C2: copy 0 lost power and with it what it had acknowledged; the primary, copy 2, is not there. A blank copy that copy 0
/// fills did not lose power, and must not pass for one that lacks nothing.
#[test]
fn who_lost_power_admits_nobody_while_the_owner_is_away() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 3]);
        ok(w.promote(2, false));
        written(&mut w, 2, 1, 1);
        cut(&mut w, 0, 2);
        cut(&mut w, 1, 2);
        w.crash(0, true);
        w.crash(1, false);
        blank_disk(&mut w, 1, seed);
        w.start(0);
        w.start(1);
        w.until("copy 1 is filled", 400_000, |w| {
            on_disk(w, 1).state != CopyState::Blank
                && on_disk(w, 1).state != CopyState::Inconsistent
                && w.settled(&[0, 1])
        });
        w.promote(1, false)
            .expect_err("it may lack what copy 0 lost");
    }
}

/// A promotion waits for a copy that ended its session to meet again, and that copy dies before it does. With no link up
/// nothing else would wake this one: it asks to be woken, and decides.
#[test]
fn a_promotion_does_not_wait_for_ever_for_a_copy_that_was_about_to_meet_again() {
    for seed in 0..20 {
        let modes = [Mode::Sync, Mode::Sync];
        let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &[SIZE], true);
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        ok(w.promote(0, false));
        w.cut.push((0, 1));
        w.admin(0, Command::Demote);
        ok(w.command(
            1,
            Command::SetMode {
                peer: Slot(0),
                mode: Mode::SemiSync,
            },
        ));
        w.crash(0, false);
        let admin = w.admin(1, Command::Promote { force: true });
        for _ in 0..100 {
            if w.nodes[1].admin.contains_key(&admin) {
                break;
            }
            let core = w.nodes[1].core.as_ref().expect("a process");
            let waits = core.deadline().is_some() || !w.nodes[1].pending.is_empty();
            assert!(waits, "seed {seed}: nothing wakes it");
            w.step();
        }
        w.until("the promotion is answered", 20_000, |w| {
            w.nodes[1].admin.contains_key(&admin)
        });
    }
}

/// D1: two copies join S at once. When the first is in, nothing may complete without the second one either.
#[test]
fn two_that_join_at_once_are_both_waited_for() {
    let mut both = 0;
    for seed in 0..40 {
        let mut w = World::new(seed, &[Mode::Sync; 3], OnPeerLoss::Continue, &[SIZE], true);
        for n in 0..3 {
            w.start(n);
        }
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1, 2]));
        ok(w.promote(0, false));
        for n in 1..3 {
            cut(&mut w, 0, n);
        }
        written(&mut w, 0, 1, 1);
        w.cut.clear();
        for at in 0..4000 {
            if at % 7 == 0 {
                write(&mut w, 0, at % 64, 2);
            }
            w.step();
            let core = w.nodes[0].core.as_ref().expect("a process");
            let status = core.status(w.now);
            let joining: Vec<Slot> = [Slot(1), Slot(2)]
                .into_iter()
                .filter(|slot| {
                    let (relation, _) = core.probe_peer(*slot).expect("a peer");
                    relation.contains("joining")
                })
                .collect();
            both += usize::from(joining.len() == 2);
            for slot in joining {
                let counted = status.in_sync.union(status.in_sync_pending);
                assert!(
                    counted.contains(slot),
                    "seed {seed}: {slot:?} is not waited for"
                );
            }
        }
    }
    assert!(both > 0, "the case was reached");
}

/// D1: a member had acknowledged a write that waits for another one. It was lost then, and a member that never got the write
/// filled it: what it acknowledged in a session that is over counts no more, even if it had flushed it.
#[test]
fn an_acknowledgement_ends_with_its_session() {
    for seed in 0..20 {
        let mut w = copies(seed, &[Mode::Sync; 3]);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        let request = write(&mut w, 0, 1, 2);
        w.until("copy 2 has it", 100_000, |w| holds(w, 2, 1, 2));
        if seed % 2 == 1 {
            w.flush(0);
            w.steps(300);
        }
        w.deliver_all();
        w.crash(2, false);
        w.cut.push((0, 2));
        w.start(2);
        w.until("copy 1 fills copy 2", 100_000, |w| {
            w.settled(&[1, 2]) && w.up_to_date(2) && !holds(w, 2, 1, 2)
        });
        mend(&mut w, 0, 1);
        w.until("copy 1 is filled", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(1) && holds(w, 1, 1, 2)
        });
        w.steps(200);
        assert!(
            w.status_of(0, request).is_none() || holds(&w, 2, 1, 2),
            "seed {seed}: it completes, and copy 2, which is in S, lost it"
        );
        w.cut.clear();
        w.until("it completes once copy 2 is back", 100_000, |w| {
            w.status_of(0, request).is_some() && w.settled(&[0, 1, 2]) && w.up_to_date(2)
        });
        for n in 0..3 {
            assert!(holds(&w, n, 1, 2), "seed {seed}: copy {n}");
        }
    }
}

/// D11: a force is for want of anything better, not beside it. The asynchronous copy lacks what the member of S that is
/// connected holds, and the two last met when neither had anything.
#[test]
fn a_force_beside_a_connected_copy_that_holds_more_is_refused_and_names_it() {
    let mut refused = 0;
    for seed in 0..30 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 2);
        // Copies 0 and 1 alone have it.
        written(&mut w, 0, 1, 2);
        w.crash(0, seed % 2 == 0);
        w.steps(2000);
        match w.promote(2, true) {
            Err(refusal) => {
                refused += 1;
                assert!(
                    refusal.next.contains("romote copy 1"),
                    "seed {seed}: {refusal}"
                );
            }
            Ok(text) => assert!(holds(&w, 2, 1, 2), "seed {seed}: {text}"),
        }
        // The better one is promoted, and fills the other.
        ok(w.promote(1, true));
        assert!(holds(&w, 1, 1, 2), "seed {seed}");
        w.until("copy 2 has it, too", 100_000, |w| holds(w, 2, 1, 2));
    }
    assert!(refused > 10, "refused {refused} times");
}

/// D11: what an asynchronous copy received from its lost primary and keeps for a person who forces it does not keep it from being
/// filled by a copy that holds more, nor that one from being promoted.
#[test]
fn what_is_kept_for_a_force_is_given_up_when_another_copy_fills_it() {
    let mut reached = 0;
    for seed in 0..30 {
        let mut w = copies(seed, &FOLLOWED);
        ok(w.promote(0, false));
        for block in 0..8 {
            written(&mut w, 0, block, 1);
        }
        w.crash(0, seed % 2 == 0);
        w.steps(2000);
        w.drop_link(1, 2, "a blip");
        w.until("they meet", 40_000, |w| w.settled(&[1, 2]));
        reached +=
            usize::from(noticed(&w, 2, "resync-target") && noticed(&w, 2, "received-dropped"));
        ok(w.promote(1, false));
        w.until("copy 2 has everything", 100_000, |w| {
            (0..8).all(|block| holds(w, 2, block, 1))
        });
    }
    assert!(reached > 10, "reached {reached} times");
}

/// C1, D13: a copy joined S while another member was away, and then the primary's disk failed. If it went on through the new member,
/// the one that is away, which knows of no third copy, could be promoted without what completed there.
#[test]
fn a_server_that_a_member_never_heard_of_does_not_go_on_without_it() {
    let (mut promoted, mut aware) = (0, 0);
    for seed in 0..40 {
        let mut w = copies(seed, &[Mode::Sync; 3]);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        // Copy 1 is filled anew, so it is not in S for a while; when it joins, copy 2 is away, or connected again.
        w.crash(1, true);
        let mut requests: Vec<_> = (4..40).map(|block| write(&mut w, 0, block, 3)).collect();
        w.start(1);
        let heard = |w: &World| !on_disk(w, 2).in_sync.contains(Slot(1));
        w.until("copy 2 hears that copy 1 left S", 100_000, |w| {
            heard(w) || (w.settled(&[0, 1, 2]) && w.up_to_date(1))
        });
        if !heard(&w) {
            continue;
        }
        cut(&mut w, 0, 2);
        cut(&mut w, 1, 2);
        w.until("copy 1 joins", 100_000, |w| w.up_to_date(1));
        if seed % 2 == 0 {
            w.cut.clear();
            w.until("all agree", 100_000, |w| w.settled(&[0, 1, 2]));
            written(&mut w, 0, 1, 2);
            cut(&mut w, 0, 2);
            cut(&mut w, 1, 2);
        }
        w.nodes[0].broken = true;
        requests.push(write(&mut w, 0, 2, 9));
        let first_flush = w.flush(0);
        w.until("the flush is answered", 100_000, |w| {
            w.status_of(0, first_flush).is_some()
        });
        let done = w.status_of(0, requests[requests.len() - 1]) == Some(Status::Ok);
        aware += u32::from(done);
        w.crash(0, false);
        w.crash(1, false);
        w.steps(100);
        if w.promote(2, false).is_ok() {
            promoted += 1;
            assert!(!done || holds(&w, 2, 2, 9), "seed {seed}");
        }
    }
    assert!(
        promoted > 10 && aware > 10,
        "{promoted} promoted, {aware} went on"
    );
}

/// D14, C1: a primary that hears of a newer epoch is none from then on, for the other side of that meeting too: a copy that follows the
/// newer primary is not taken from it.
#[test]
fn a_superseded_primary_does_not_take_the_follower_of_another() {
    let mut reached = 0;
    for seed in 0..20 {
        let mut w = together(seed, &[Mode::Sync; 3], OnPeerLoss::Continue, SIZE);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        cut(&mut w, 0, 2);
        written(&mut w, 0, 2, 2);
        w.drop_link(1, 2, "a blip");
        w.until("the others agree", 40_000, |w| w.settled(&[1, 2]));
        ok(w.promote(1, true));
        w.until("copy 2 follows copy 1", 40_000, |w| w.settled(&[1, 2]));
        // Copies 0 and 2 see each other again; copies 0 and 1 do not.
        mend(&mut w, 0, 2);
        w.steps(4000);
        let met = |n: &Notice| n.kind == "handshake" && n.text.contains("Row 16");
        reached += usize::from(w.nodes[2].notices.iter().any(met));
        assert_ne!(on_disk(&w, 2).state, CopyState::Inconsistent, "seed {seed}");
        assert!(w.settled(&[1, 2]), "seed {seed}");
    }
    assert!(reached > 10, "reached {reached} times");
}

/// C1, C2: copy 2 lost power, and with it what it had acknowledged from its memory. Copy 0 has everything and came to S while copy 2 was
/// away. Copy 1, the primary of before, is in the middle of a resync from copy 0: copy 2 does not finish it, or the two would
/// pass for whole.
#[test]
fn who_lost_power_fills_nobody_while_another_member_may_have_more() {
    let mut reached = 0;
    for seed in 0..60 {
        let mut w = copies(seed, &[Mode::SemiSync; 3]);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 1);
        // Copy 0 leaves S as a target, and gets no further.
        w.crash(0, true);
        w.start(0);
        w.until("copy 0 is a target", 100_000, |w| {
            !on_disk(w, 1).in_sync.contains(Slot(0))
        });
        cut(&mut w, 0, 1);
        cut(&mut w, 0, 2);
        w.until("copies 1 and 2 agree", 100_000, |w| w.settled(&[1, 2]));
        written(&mut w, 1, 2, 2);
        let flush = w.flush(1);
        w.until("flushed", 100_000, |w| w.status_of(1, flush).is_some());
        w.crash(2, true);
        if holds(&w, 2, 2, 2) {
            continue;
        }
        mend(&mut w, 0, 1);
        w.until("copy 0 is back in S", 400_000, |w| w.up_to_date(0));
        w.crash(1, false);
        w.start(1);
        w.until("copy 0 fills copy 1", 400_000, |w| {
            on_disk(w, 1).state == CopyState::Inconsistent
        });
        cut(&mut w, 0, 1);
        w.crash(0, false);
        w.start(0);
        w.start(2);
        mend(&mut w, 0, 2);
        w.steps(2000);
        reached += 1;
        let promoted = w.promote(2, false);
        assert!(
            promoted.is_err() || holds(&w, 2, 2, 2),
            "seed {seed}: it was acknowledged, and flushed"
        );
        // Who has it goes on, and all get it.
        w.cut.clear();
        ok(w.promote(0, true));
        w.until("all follow", 400_000, |w| {
            w.settled(&[0, 1, 2]) && w.up_to_date(1) && w.up_to_date(2)
        });
        for n in 0..3 {
            assert!(holds(&w, n, 2, 2), "seed {seed}: copy {n}");
        }
    }
    assert!(reached > 5, "reached {reached} times");
}
