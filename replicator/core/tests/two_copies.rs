//! Two and three copies in a small deterministic world: the ordinary life of a service.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::{Slot, SlotSet, VolumeIndex};
use holdfast_wire_format::metadata::*;
use world::*;

const SIZE: u64 = 1 << 20;

fn pair(seed: u64, policy: OnPeerLoss) -> World {
    let mut w = World::new(
        seed,
        &[Mode::Sync, Mode::Sync],
        policy,
        &[SIZE, SIZE / 2],
        true,
    );
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w
}

/// Random overlapping writes and flushes on the primary `n`; returns those issued.
fn load(w: &mut World, n: usize, count: usize) -> Vec<RequestId> {
    let mut requests = Vec::new();
    for _ in 0..count {
        let volume = w.rng.below(2) as u16;
        let size = if volume == 0 { SIZE } else { SIZE / 2 };
        let length = (1 + w.rng.below(16)) * 512;
        let offset = w.rng.below((size / 16 - length) / 512) * 512
            + if w.rng.chance(50) { size / 2 } else { 0 };
        let fill = w.rng.next() as u8;
        if w.rng.chance(10) {
            let request = w.flush(n);
            requests.push(request);
        } else {
            let fua = w.rng.chance(5);
            requests.push(w.write(n, volume, offset, vec![fill; length as usize], fua));
        }
        let steps = w.rng.below(8) as usize;
        w.steps(steps);
    }
    requests
}

fn all_ok(w: &mut World, n: usize, requests: &[RequestId]) {
    let requests = requests.to_vec();
    w.until("every request completes", 100_000, |w| {
        requests.iter().all(|r| w.status_of(n, *r).is_some())
    });
    for request in requests {
        assert_eq!(w.status_of(n, request), Some(Status::Ok), "{request:?}");
    }
}

fn same(w: &World, a: usize, b: usize) {
    for v in 0..w.nodes[a].disk.data.len() {
        let (x, y) = (&w.nodes[a].disk.data[v], &w.nodes[b].disk.data[v]);
        if let Some(at) = x.iter().zip(y).position(|(x, y)| x != y) {
            panic!("volume {v} differs at byte {at}");
        }
    }
}

fn in_sync_again(w: &mut World, slots: &[usize]) {
    let slots = slots.to_vec();
    w.until("in sync again", 400_000, |w| {
        w.settled(&slots) && slots.iter().all(|n| w.up_to_date(*n))
    });
}

/// The value each written sector must have: a model of what was acknowledged.
struct History {
    writes: Vec<(RequestId, u16, u64, Vec<u8>)>,
}

impl History {
    fn new() -> History {
        History { writes: Vec::new() }
    }

    fn load(&mut self, w: &mut World, n: usize, count: usize) {
        for _ in 0..count {
            let volume = w.rng.below(2) as u16;
            let size = if volume == 0 { SIZE } else { SIZE / 2 };
            let length = (1 + w.rng.below(16)) * 512;
            let offset = w.rng.below((size / 16 - length) / 512) * 512
                + if w.rng.chance(50) { size / 2 } else { 0 };
            if w.rng.chance(10) {
                w.flush(n);
            } else {
                let fua = w.rng.chance(5);
                let stamp = w.next_request.to_le_bytes();
                let bytes: Vec<u8> = stamp
                    .iter()
                    .copied()
                    .cycle()
                    .take(length as usize)
                    .collect();
                let request = w.write(n, volume, offset, bytes.clone(), fua);
                self.writes.push((request, volume, offset, bytes));
            }
            let steps = w.rng.below(8) as usize;
            w.steps(steps);
        }
    }

    /// Every sector holds the last acknowledged value or one of a write that was not acknowledged before it,
    /// or was in flight beside it.
    fn check(&self, w: &World, issuer: usize, holder: usize) {
        let mut legal: std::collections::BTreeMap<(u16, u64), Vec<Vec<u8>>> = Default::default();
        for (request, volume, offset, bytes) in &self.writes {
            let acknowledged = w.status_of(issuer, *request) == Some(Status::Ok);
            for (i, sector) in bytes.chunks(512).enumerate() {
                let values = legal
                    .entry((*volume, offset / 512 + i as u64))
                    .or_insert_with(|| vec![vec![0; 512]]);
                if acknowledged {
                    // Earlier ones were issued before it: overlap order makes it win.
                    values.clear();
                }
                values.push(sector.to_vec());
            }
        }
        for ((volume, sector), values) in legal {
            let at = (sector * 512) as usize;
            let held = &w.nodes[holder].disk.data[volume as usize][at..at + 512];
            assert!(
                values.iter().any(|v| v == held),
                "volume {volume} sector {sector}: an acknowledged write is lost"
            );
        }
    }
}

#[test]
fn a_fresh_pair_needs_no_copy_and_mirrors() {
    for seed in 0..20 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        assert!(
            w.nodes[0].notices.iter().all(|n| n.kind != "resync-source"),
            "nothing was copied"
        );
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        w.promote(1, false).unwrap_err();
        let requests = load(&mut w, 0, 100);
        all_ok(&mut w, 0, &requests);
        w.until("quiet", 50_000, |w| w.settled(&[0, 1]));
        same(&w, 0, 1);
    }
}

#[test]
fn killed_primary_promoted_secondary_loses_nothing_and_comes_back() {
    for seed in 0..60 {
        for power in [false, true] {
            let mut w = pair(seed, OnPeerLoss::Suspend);
            w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
            let mut history = History::new();
            history.load(&mut w, 0, 80);
            w.crash(0, power);
            let result = w.promote(1, false);
            result.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            history.check(&w, 0, 1);
            let requests = load(&mut w, 1, 60);
            all_ok(&mut w, 1, &requests);
            w.start(0);
            let requests = load(&mut w, 1, 60);
            all_ok(&mut w, 1, &requests);
            in_sync_again(&mut w, &[0, 1]);
            same(&w, 0, 1);
            let copied = w.nodes[1]
                .core
                .as_ref()
                .unwrap()
                .status(w.now)
                .counters
                .resync_bytes;
            assert!(copied > 0, "the old primary was resynced");
            // And back again, planned.
            w.command(1, Command::Demote)
                .unwrap_or_else(|e| panic!("{e}"));
            w.promote(0, false)
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let requests = load(&mut w, 0, 30);
            all_ok(&mut w, 0, &requests);
            w.until("quiet", 50_000, |w| w.settled(&[0, 1]));
            same(&w, 0, 1);
        }
    }
}

#[test]
fn killed_secondary_parks_writes_under_suspend_and_returns() {
    for seed in 100..140 {
        for power in [false, true] {
            let mut w = pair(seed, OnPeerLoss::Suspend);
            w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
            let mut requests = load(&mut w, 0, 50);
            w.crash(1, power);
            requests.extend(load(&mut w, 0, 20));
            let last = *requests.last().unwrap();
            w.steps(200);
            assert_eq!(w.status_of(0, last), None, "nothing completes alone");
            w.start(1);
            all_ok(&mut w, 0, &requests);
            in_sync_again(&mut w, &[0, 1]);
            same(&w, 0, 1);
        }
    }
}

#[test]
fn killed_secondary_is_dropped_under_continue_and_returns() {
    for seed in 200..240 {
        let mut w = pair(seed, OnPeerLoss::Continue);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let mut requests = load(&mut w, 0, 50);
        w.crash(1, seed % 2 == 0);
        requests.extend(load(&mut w, 0, 20));
        all_ok(&mut w, 0, &requests);
        w.start(1);
        let requests = load(&mut w, 0, 20);
        all_ok(&mut w, 0, &requests);
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
        // Alone, it may not take over: the primary may have gone on.
        w.crash(0, false);
        w.promote(1, false).unwrap_err();
        w.promote(1, true).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn cut_links_at_random_moments() {
    for seed in 300..400 {
        let policy = if seed % 2 == 0 {
            OnPeerLoss::Suspend
        } else {
            OnPeerLoss::Continue
        };
        let mut w = pair(seed, policy);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let mut requests = Vec::new();
        for _ in 0..6 {
            requests.extend(load(&mut w, 0, 15));
            w.drop_link(0, 1, "cut");
            let steps = w.rng.below(60) as usize;
            w.steps(steps);
        }
        all_ok(&mut w, 0, &requests);
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
    }
}

#[test]
fn both_killed_and_started_in_either_order() {
    for seed in 400..460 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let mut history = History::new();
        history.load(&mut w, 0, 60);
        let (first, second) = if seed % 2 == 0 { (0, 1) } else { (1, 0) };
        w.crash(first, seed % 3 == 0);
        w.steps((seed % 7) as usize);
        w.crash(second, seed % 3 == 0);
        w.start(second);
        w.start(first);
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
        if seed % 3 != 0 {
            history.check(&w, 0, 0);
        }
        let n = (seed % 2) as usize;
        w.promote(n, false)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let requests = load(&mut w, n, 20);
        all_ok(&mut w, n, &requests);
    }
}

#[test]
fn clean_stop_and_start_copies_nothing() {
    for seed in 500..520 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let requests = load(&mut w, 0, 60);
        all_ok(&mut w, 0, &requests);
        for n in [0, 1] {
            w.command(n, Command::Detach)
                .unwrap_or_else(|e| panic!("{e}"));
            w.steps(50);
            w.crash(n, true);
        }
        same(&w, 0, 1);
        for n in [0, 1] {
            w.nodes[n].notices.clear();
            w.start(n);
        }
        in_sync_again(&mut w, &[0, 1]);
        assert!(
            w.nodes
                .iter()
                .all(|n| n.notices.iter().all(|n| n.kind != "resync-source")),
            "nothing was copied"
        );
    }
}

#[test]
fn verify_finds_what_differs_and_only_that() {
    for seed in 600..610 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let requests = load(&mut w, 0, 60);
        all_ok(&mut w, 0, &requests);
        w.command(0, Command::Verify { volume: None })
            .unwrap_or_else(|e| panic!("{e}"));
        w.nodes[1].disk.data[0][100_000] ^= 1;
        w.nodes[1].disk.durable[0][100_000] ^= 1;
        w.command(0, Command::Verify { volume: None }).unwrap_err();
        w.command(0, Command::Disconnect { peer: None })
            .unwrap_or_else(|e| panic!("{e}"));
        w.steps(50);
        w.command(0, Command::Connect { peer: None })
            .unwrap_or_else(|e| panic!("{e}"));
        w.command(1, Command::Connect { peer: None })
            .unwrap_or_else(|e| panic!("{e}"));
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
        w.command(0, Command::Verify { volume: None })
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_verify_may_follow_at_once_on_one_that_was_ended() {
    for seed in 625..665 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let requests = load(&mut w, 0, 20);
        all_ok(&mut w, 0, &requests);
        for round in 0..8 {
            let ended = w.admin(0, Command::Verify { volume: None });
            let steps = w.rng.below(25) as usize;
            w.steps(steps);
            w.admin(0, Command::StopVerify);
            // Reads and replies of the ended one come now, and are none of this one's.
            let text = w
                .command(0, Command::Verify { volume: None })
                .unwrap_or_else(|e| panic!("seed {seed}, round {round}: {e}"));
            assert!(text.contains("equal"), "{text}");
            assert!(w.nodes[0].admin.contains_key(&ended) || w.settled(&[0, 1]));
        }
        assert!(w.settled(&[0, 1]), "the link did not end (seed {seed})");
        for node in &w.nodes {
            assert!(node.notices.iter().all(|n| n.kind != "link-down"));
        }
    }
}

/// Volumes that a verify could not read: of copy 1 as it says itself, and as copy 0 says.
fn unread(w: &World) -> (bool, usize) {
    let status = |n: usize| w.nodes[n].core.as_ref().unwrap().status(w.now);
    (
        status(1).volumes.iter().any(|volume| volume.unread),
        status(0).peers[0].unread.len(),
    )
}

#[test]
fn a_disk_that_a_verify_could_not_read_is_remembered_until_one_has_read_everything() {
    for seed in 610..620 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let requests = load(&mut w, 0, 60);
        all_ok(&mut w, 0, &requests);
        assert_eq!(unread(&w), (false, 0));
        w.nodes[1].bad = Some((0, w.rng.below(SIZE)));
        let refusal = w.command(0, Command::Verify { volume: None }).unwrap_err();
        assert!(refusal.what.contains("could not read"), "{refusal}");
        assert_eq!(unread(&w), (true, 1));
        for n in [0, 1] {
            let said = |notice: &&Notice| notice.kind == "verify-unreadable";
            assert!(
                w.nodes[n].notices.iter().any(|notice| said(&notice)),
                "copy {n}"
            );
            // In S as before: nothing is lost that another copy does not have.
            let status = w.nodes[n].core.as_ref().unwrap().status(w.now);
            assert_eq!(status.in_sync, SlotSet(0b11));
        }
        // Not as long as the block is bad, and not by a verify that a person ends.
        w.command(0, Command::Verify { volume: None }).unwrap_err();
        w.nodes[1].bad = None;
        let half = w.admin(0, Command::Verify { volume: None });
        w.steps(3);
        w.command(0, Command::StopVerify)
            .unwrap_or_else(|e| panic!("{e}"));
        if w.nodes[0].admin.get(&half).is_some_and(Result::is_err) {
            // The other copy may have read all that it was asked for by then.
            assert_eq!(unread(&w).1, 1);
        }
        w.command(0, Command::Verify { volume: None })
            .unwrap_or_else(|e| panic!("{e}"));
        w.until("the last digest is compared", 1000, |w| {
            unread(w) == (false, 0)
        });
    }
}

#[test]
fn what_was_known_of_unreadable_disks_is_recalled_after_a_restart() {
    let mut w = pair(620, OnPeerLoss::Suspend);
    w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
    let all = [VolumeIndex(0), VolumeIndex(60)];
    w.nodes[1].core.as_mut().unwrap().recall_unread(&all, &[]);
    let of_peer = [(Slot(1), all.to_vec()), (Slot(5), all.to_vec())];
    w.nodes[0]
        .core
        .as_mut()
        .unwrap()
        .recall_unread(&[], &of_peer);
    assert_eq!(unread(&w), (true, 1));
    w.command(0, Command::Verify { volume: None })
        .unwrap_or_else(|e| panic!("{e}"));
    w.until("all was read", 1000, |w| unread(w) == (false, 0));
}

#[test]
fn a_lag_from_before_the_attach_is_told_as_such() {
    let mut w = pair(621, OnPeerLoss::Continue);
    w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
    let older = |w: &World| {
        let peer = w.nodes[0]
            .core
            .as_ref()
            .unwrap()
            .status(w.now)
            .peers
            .remove(0);
        (peer.lag_from_before, peer.dirty_bytes > 0)
    };
    w.crash(1, false);
    let requests = load(&mut w, 0, 5);
    all_ok(&mut w, 0, &requests);
    // It saw them itself.
    assert_eq!(older(&w), (false, true));
    w.crash(0, false);
    w.start(0);
    w.steps(20);
    assert_eq!(older(&w), (true, true));
    w.start(1);
    in_sync_again(&mut w, &[0, 1]);
    assert_eq!(older(&w), (false, false));
}

#[test]
fn a_blank_copy_is_filled_while_the_service_runs() {
    for seed in 700..720 {
        let mut w = World::new(
            seed,
            &[Mode::Sync, Mode::Sync],
            OnPeerLoss::Continue,
            &[SIZE, SIZE / 2],
            false,
        );
        w.nodes[0].disk.data[0][12345] = 9;
        w.nodes[0].disk.durable[0][12345] = 9;
        w.start(0);
        w.start(1);
        w.steps(100);
        w.promote(0, false).unwrap_err();
        w.promote(0, true).unwrap_or_else(|e| panic!("{e}"));
        for n in [0, 1] {
            w.command(n, Command::Connect { peer: None })
                .unwrap_or_else(|e| panic!("{e}"));
        }
        let requests = load(&mut w, 0, 200);
        all_ok(&mut w, 0, &requests);
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
    }
}

#[test]
fn a_third_asynchronous_copy_follows() {
    for seed in 800..830 {
        let mut w = World::new(
            seed,
            &[Mode::Sync, Mode::Sync, Mode::Async],
            OnPeerLoss::Suspend,
            &[SIZE, SIZE / 2],
            true,
        );
        for n in 0..3 {
            w.start(n);
        }
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1, 2]));
        w.promote(0, false)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut history = History::new();
        history.load(&mut w, 0, 60);
        w.drop_link(0, 2, "cut");
        history.load(&mut w, 0, 20);
        w.until("quiet", 100_000, |w| w.settled(&[0, 1, 2]));
        same(&w, 0, 1);
        same(&w, 0, 2);
        history.load(&mut w, 0, 20);
        w.crash(0, seed % 2 == 0);
        w.promote(1, false)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        history.check(&w, 0, 1);
        let requests = load(&mut w, 1, 30);
        all_ok(&mut w, 1, &requests);
        w.start(0);
        w.until("quiet", 400_000, |w| {
            w.settled(&[0, 1, 2]) && w.up_to_date(0)
        });
        same(&w, 0, 1);
        same(&w, 1, 2);
    }
}

/// A demoted primary and an asynchronous copy that has everything: the service moves there and back as planned.
#[test]
fn a_service_moves_to_an_asynchronous_copy_and_back_as_planned() {
    for seed in 830..860 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let sizes = [SIZE, SIZE / 2];
        let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &sizes, true);
        for n in 0..3 {
            w.start(n);
        }
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1, 2]));
        w.promote(0, false)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut history = History::new();
        history.load(&mut w, 0, 60);
        for (from, to) in [(0, 2), (2, 0)] {
            // While the primary serves, and while one that is in sync is away, the copy is not to be promoted.
            assert!(w.promote(to, false).is_err(), "seed {seed}");
            w.command(from, Command::Demote)
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            if seed % 3 == 0 && to == 2 {
                w.crash(1, false);
                w.until("it is missed", 100_000, |w| {
                    let status = w.nodes[2].core.as_ref().unwrap().status(w.now);
                    status.peers[1].link != holdfast_replicator_core::status::LinkState::Established
                });
                assert!(w.promote(2, false).is_err(), "seed {seed}");
                w.start(1);
            }
            w.until("everybody has everything", 400_000, |w| {
                w.settled(&[0, 1, 2])
            });
            w.promote(to, to == 0 && seed % 2 == 0)
                .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            history.check(&w, from, to);
            let in_sync = w.nodes[to].core.as_ref().unwrap().status(w.now).in_sync;
            assert!(to == 0 || in_sync == SlotSet::only(Slot(2)), "seed {seed}");
            assert!(to == 2 || !in_sync.contains(Slot(2)), "seed {seed}");
            let requests = load(&mut w, to, 30);
            all_ok(&mut w, to, &requests);
            history = History::new();
            w.until("quiet", 400_000, |w| w.settled(&[0, 1, 2]));
            same(&w, 0, 1);
            same(&w, 1, 2);
        }
        in_sync_again(&mut w, &[0, 1]);
    }
}

#[test]
fn semi_sync_survives_the_kill_of_the_primary() {
    for seed in 900..940 {
        let mut w = World::new(
            seed,
            &[Mode::SemiSync, Mode::SemiSync],
            OnPeerLoss::Suspend,
            &[SIZE, SIZE / 2],
            true,
        );
        w.start(0);
        w.start(1);
        w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let mut history = History::new();
        history.load(&mut w, 0, 80);
        w.crash(0, true);
        w.promote(1, false)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        history.check(&w, 0, 1);
    }
}

/// A primary that was superseded counted further than the new one: after its resync it stands where that one is.
#[test]
fn a_superseded_primary_does_not_look_ahead_of_its_source() {
    for seed in 0..20 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(1, false).unwrap_or_else(|e| panic!("{e}"));
        w.until("healthy", 20_000, |w| w.settled(&[0, 1]));
        w.cut.push((0, 1));
        w.drop_link(0, 1, "cut");
        for block in 0..40 {
            w.write(1, 0, block * BLOCK, vec![1; BLOCK as usize], false);
        }
        w.steps(2000);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        w.cut.clear();
        in_sync_again(&mut w, &[0, 1]);
        let full = SIZE + SIZE / 2;
        let copied = |w: &World| {
            let notices = w.nodes[0].notices.iter();
            notices
                .filter(|n| n.kind == "resync-source")
                .map(|n| n.text.clone())
                .collect::<Vec<_>>()
        };
        assert!(
            copied(&w).iter().all(|t| !t.contains(&full.to_string())),
            "by the bitmap alone: {:?}",
            copied(&w)
        );
        w.drop_link(0, 1, "a blip");
        in_sync_again(&mut w, &[0, 1]);
        let status = w.nodes[0].core.as_ref().unwrap().status(w.now);
        assert_eq!(status.role, Role::Primary, "it goes on serving");
        for n in 0..2 {
            assert!(
                w.nodes[n]
                    .notices
                    .iter()
                    .all(|n| !n.text.contains("back in time")),
                "nobody takes the other for an old disk"
            );
        }
    }
}

/// Neither copy was zeroed: once a person picked one, the other is filled without being told to connect again.
#[test]
fn two_blank_copies_go_on_when_one_was_picked() {
    let mut w = World::new(
        3,
        &[Mode::Sync, Mode::Sync],
        OnPeerLoss::Suspend,
        &[SIZE, SIZE / 2],
        false,
    );
    w.start(0);
    w.start(1);
    w.steps(3000);
    w.promote(0, false).unwrap_err();
    w.promote(0, true).unwrap_or_else(|e| panic!("{e}"));
    in_sync_again(&mut w, &[0, 1]);
}

#[test]
fn more_generations_than_a_superblock_holds() {
    for policy in [OnPeerLoss::Suspend, OnPeerLoss::Continue] {
        let mut w = pair(41, policy);
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        // Each return of the other copy begins a generation, the last ones while it is a target already.
        for round in 0..MAX_GENERATIONS + 6 {
            let requests = load(&mut w, 0, 4);
            w.crash(1, false);
            w.steps(50);
            w.start(1);
            all_ok(&mut w, 0, &requests);
            in_sync_again(&mut w, &[0, 1]);
            same(&w, 0, 1);
            assert!(w.nodes[1].core.is_some(), "round {round}: the copy halted");
        }
    }
}

/// A copy that lags gets a long row of flushes, each of which depends on the one before and none of which the disk need carry out.
#[test]
fn d3_a_long_row_of_flushes_waits_behind_one_write() {
    let modes = [Mode::Async, Mode::Async];
    let sizes = [SIZE, SIZE / 2];
    let mut w = World::new(1, &modes, OnPeerLoss::Continue, &sizes, true);
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w.promote(0, true).unwrap();
    let write = w.write(0, 0, 0, vec![1; 512], false);
    let mut flushes = vec![w.flush(0)];
    let is_write = |action: &Action| matches!(action, Action::DiskWrite { .. });
    w.until("the copy writes", 10_000, |w| {
        w.status_of(0, write).is_some() && w.nodes[1].pending.iter().any(is_write)
    });
    // Its disk takes its time.
    let at = w.nodes[1].pending.iter().position(is_write).unwrap();
    let held = w.nodes[1].pending.remove(at);
    for _ in 0..20_000 {
        let last = *flushes.last().unwrap();
        w.until("the flush completes", 10_000, |w| {
            w.status_of(0, last).is_some()
        });
        flushes.push(w.flush(0));
    }
    w.until("all of it arrived", 100_000, |w| {
        w.wires.values().all(|wire| wire.is_empty())
    });
    w.nodes[1].pending.push(held);
    w.until("the copy has everything", 100_000, |w| {
        w.nodes[0].core.as_ref().unwrap().status(w.now).peers[0].unacknowledged_bytes == 0
            && w.nodes[1].core.as_ref().unwrap().status(w.now).position
                == w.nodes[0].core.as_ref().unwrap().status(w.now).position
    });
    all_ok(&mut w, 0, &flushes);
    same(&w, 0, 1);
}

/// An asynchronous copy holds what it received until that is stable everywhere. If everybody else is gone and a person forces it,
/// it goes on with all it received, and its bits name what that may put it ahead by (D3, D7).
#[test]
fn a_forced_asynchronous_copy_has_everything_it_received() {
    for seed in 0..40 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let sizes = [SIZE, SIZE / 2];
        let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &sizes, true);
        for n in 0..3 {
            w.start(n);
        }
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1, 2]));
        w.promote(0, false).unwrap();
        let writes: Vec<_> = (0..30)
            .map(|i| w.write(0, i as u16 % 2, i * 512, vec![7; 512], false))
            .collect();
        w.until("all of it arrived", 20_000, |w| {
            writes.iter().all(|r| w.status_of(0, *r).is_some())
                && w.wires.values().all(|wire| wire.is_empty())
        });
        let held = |w: &World| {
            (0..30)
                .filter(|i| w.nodes[2].disk.data[i % 2][i * 512] == 7)
                .count()
        };
        assert_eq!(held(&w), 0, "seed {seed}: applied before it was stable");
        w.crash(0, true);
        w.crash(1, true);
        // A person who only asks gets a refusal, and nothing is lost by that.
        w.promote(2, false).unwrap_err();
        w.promote(2, true).unwrap();
        assert_eq!(held(&w), 30, "seed {seed}");
        let requests = load(&mut w, 2, 20);
        w.start(0);
        w.start(1);
        all_ok(&mut w, 2, &requests);
        w.until("everybody follows", 400_000, |w| w.settled(&[0, 1, 2]));
        same(&w, 0, 2);
        same(&w, 1, 2);
    }
}

/// The same, but its primary comes back first: what it kept is the primary's to send again.
#[test]
fn what_an_asynchronous_copy_kept_is_given_up_when_its_primary_returns() {
    for seed in 0..40 {
        let modes = [Mode::Async, Mode::Async];
        let sizes = [SIZE, SIZE / 2];
        let mut w = World::new(seed, &modes, OnPeerLoss::Continue, &sizes, true);
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.promote(0, true).unwrap();
        for round in 0..4 {
            let requests = load(&mut w, 0, 20);
            if round % 2 == 0 {
                w.drop_link(0, 1, "cut");
            } else {
                w.crash(0, true);
                w.start(0);
                w.until("primary again", 40_000, |w| w.settled(&[0, 1]));
                w.promote(0, true).unwrap();
                continue;
            }
            all_ok(&mut w, 0, &requests);
            w.until("quiet", 400_000, |w| w.settled(&[0, 1]));
        }
        let requests = load(&mut w, 0, 20);
        let flush = w.flush(0);
        all_ok(&mut w, 0, &requests);
        all_ok(&mut w, 0, &[flush]);
        w.until("quiet", 400_000, |w| {
            w.settled(&[0, 1])
                && w.nodes[1].core.as_ref().unwrap().status(w.now).position
                    == w.nodes[0].core.as_ref().unwrap().status(w.now).position
        });
        w.command(1, Command::Detach).unwrap();
        same(&w, 0, 1);
    }
}

/// Writes parked for a lost copy go on when it returns as a target, before it is whole, and the status says so.
#[test]
fn parked_ends_when_writes_complete_again() {
    for seed in 0..20 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap();
        let requests = load(&mut w, 0, 20);
        all_ok(&mut w, 0, &requests);
        w.crash(1, true);
        let write = w.write(0, 0, 0, vec![9; 512], false);
        let parked = |w: &World| w.nodes[0].core.as_ref().unwrap().status(w.now).parked;
        w.until("parked", 1000, parked);
        assert_eq!(w.status_of(0, write), None);
        w.start(1);
        w.until("the write completes", 100_000, |w| {
            w.status_of(0, write).is_some()
        });
        assert!(!parked(&w), "seed {seed}: writes complete and are parked");
        let told = |kind: &str| w.nodes[0].notices.iter().filter(|n| n.kind == kind).count();
        assert_eq!((told("parked"), told("unparked")), (1, 1));
        in_sync_again(&mut w, &[0, 1]);
        same(&w, 0, 1);
    }
}

/// Three copies of one `create`: whichever two meet first, all of them read zero, and nothing is copied or refused.
#[test]
fn three_blank_copies_of_one_create_agree() {
    for third in [Mode::Sync, Mode::Async] {
        for seed in 0..60 {
            let modes = [Mode::Sync, Mode::Sync, third];
            let sizes = [SIZE, SIZE / 2];
            let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &sizes, true);
            for n in 0..3 {
                w.start(n);
                let steps = w.rng.below(40) as usize;
                w.steps(steps);
            }
            w.until("the copies agree", 8000, |w| w.settled(&[0, 1, 2]));
            for n in 0..3 {
                let copied = w.nodes[n]
                    .notices
                    .iter()
                    .find(|x| x.kind == "resync-source");
                assert!(copied.is_none(), "seed {seed}: {copied:?}");
            }
            w.promote(0, false).unwrap();
            let requests = load(&mut w, 0, 20);
            all_ok(&mut w, 0, &requests);
        }
    }
}

/// A list of generations that is no chain is refused, and `invalidate` leads out of it, as the refusal says (row 1).
#[test]
fn invalidate_ends_a_broken_history() {
    let mut w = pair(3, OnPeerLoss::Continue);
    w.promote(0, false).unwrap();
    let requests = load(&mut w, 0, 30);
    all_ok(&mut w, 0, &requests);
    w.command(1, Command::Detach).unwrap();
    w.crash(1, false);
    for at in [0, 4096] {
        let bytes = w.nodes[1].disk.meta.get_mut(&(0, at)).unwrap();
        let mut sb =
            holdfast_wire_format::superblock::decode(bytes.as_slice().try_into().unwrap()).unwrap();
        if let Some(last) = sb.generations.last_mut() {
            last.parent = holdfast_wire_format::ids::GenerationId(0xbad);
        }
        *bytes = holdfast_wire_format::superblock::encode(&sb)
            .unwrap()
            .to_vec();
    }
    w.start(1);
    w.until("refused", 20_000, |w| {
        w.nodes[1]
            .notices
            .iter()
            .any(|n| n.text.contains("is broken"))
    });
    w.command(1, Command::Invalidate).unwrap();
    w.command(1, Command::Connect { peer: None }).unwrap();
    w.command(0, Command::Connect { peer: None }).unwrap();
    in_sync_again(&mut w, &[0, 1]);
    same(&w, 0, 1);
}

/// Row 16, C1: two copies that were promoted without each other's generation. One still had to wait for the other with
/// everything it wrote; that one was promoted after it, and goes on. What the first wrote completed nowhere, and does not come
/// back.
#[test]
fn a_copy_that_could_complete_nothing_is_the_target() {
    for seed in 0..20 {
        let mut w = pair(seed, OnPeerLoss::Suspend);
        w.promote(0, false).unwrap();
        let requests = load(&mut w, 0, 10);
        all_ok(&mut w, 0, &requests);
        w.command(0, Command::Demote).unwrap();
        // Copy 0 agrees to the epoch of copy 1, and never hears of its generation.
        let admin = w.admin(1, Command::Promote { force: false });
        w.until("copy 0 agreed", 20_000, |w| {
            let core = w.nodes[0].core.as_ref().unwrap();
            core.status(w.now).epoch.number == 2
        });
        w.until("copy 1 has its generation", 20_000, |w| {
            superblock_of(w, 1).generations.len() > superblock_of(w, 0).generations.len()
        });
        if superblock_of(&w, 0).generations.last() == superblock_of(&w, 1).generations.last() {
            continue;
        }
        w.cut.push((0, 1));
        w.drop_link(0, 1, "cut");
        w.until("copy 1 serves", 20_000, |w| {
            w.nodes[1].admin.contains_key(&admin)
        });
        let lost = w.write(1, 0, 0, vec![77; 4096], false);
        w.steps(200);
        assert_eq!(w.status_of(1, lost), None, "seed {seed}: it is parked");
        w.promote(0, false).unwrap();
        w.cut.clear();
        w.until("they settle", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(1)
        });
        let role = w.nodes[0].core.as_ref().unwrap().status(w.now).role;
        assert_eq!(role, Role::Primary, "seed {seed}: the newer one serves on");
        assert_ne!(w.status_of(1, lost), Some(Status::Ok));
        for n in 0..2 {
            let block = &w.nodes[n].disk.data[0][..4096];
            assert!(block != [77; 4096], "seed {seed}: copy {n}");
        }
    }
}

fn superblock_of(w: &World, n: usize) -> Superblock {
    world::story::on_disk(w, n)
}

/// C1, D11: the one copy that is left of S is not invalidated, whatever it was told of the other before.
#[test]
fn the_last_member_of_s_that_is_connected_is_not_invalidated() {
    for seed in 0..10 {
        let mut w = World::new(seed, &[Mode::Sync; 2], OnPeerLoss::Suspend, &[SIZE], true);
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let write = w.write(0, 0, 8192, vec![7; 4096], false);
        w.until("it completes", 20_000, |w| w.status_of(0, write).is_some());
        w.crash(0, seed % 2 == 0);
        let refusal = w.command(1, Command::Invalidate).unwrap_err();
        assert!(
            refusal
                .what
                .contains("no other copy that has every acknowledged write"),
            "seed {seed}: {refusal}"
        );
        // Beside the other one it may be.
        w.start(0);
        w.until("they agree", 40_000, |w| w.settled(&[0, 1]));
        w.command(1, Command::Invalidate)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        w.until("it is filled", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(1)
        });
    }
}
