//! D13: the primary's disk fails and the service goes on through a member of S.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use std::collections::BTreeMap;
use world::story::*;
use world::*;

const SIZE: u64 = 1 << 20;

fn pair(seed: u64, modes: &[Mode], policy: OnPeerLoss) -> World {
    let mut w = World::new(seed, modes, policy, &[SIZE], true);
    for n in 0..modes.len() {
        w.start(n);
    }
    let all: Vec<usize> = (0..modes.len()).collect();
    w.until("the copies agree", 4000, |w| w.settled(&all));
    w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
    w
}

/// Writes of one block each, stamped; the newest acknowledged one of a block wins.
#[derive(Default)]
struct Blocks {
    issued: BTreeMap<u64, Vec<(RequestId, u8)>>,
    next: u8,
}

impl Blocks {
    fn write(&mut self, w: &mut World, count: usize) {
        for _ in 0..count {
            let block = w.rng.below(32);
            self.next = self.next.wrapping_add(1).max(1);
            let request = w.write(0, 0, block * BLOCK, vec![self.next; BLOCK as usize], false);
            self.issued
                .entry(block)
                .or_default()
                .push((request, self.next));
            let steps = w.rng.below(6) as usize;
            w.steps(steps);
        }
    }

    fn answered(&self, w: &World) -> bool {
        self.issued
            .values()
            .flatten()
            .all(|(r, _)| w.status_of(0, *r).is_some())
    }

    /// The values a block may have: the newest acknowledged, or an unacknowledged one issued after it.
    fn legal(&self, w: &World, block: u64) -> Vec<u8> {
        let mut legal = vec![0];
        for (request, value) in self.issued.get(&block).into_iter().flatten() {
            if w.status_of(0, *request) == Some(Status::Ok) {
                legal.clear();
            }
            legal.push(*value);
        }
        legal
    }

    fn check(&self, w: &World, holder: usize) {
        for block in self.issued.keys() {
            let at = (block * BLOCK) as usize;
            let held = w.nodes[holder].disk.data[0][at];
            let legal = self.legal(w, *block);
            assert!(
                legal.contains(&held),
                "block {block} holds {held}, one of {legal:?} was acknowledged"
            );
        }
    }

    fn check_durable(&self, w: &World, holder: usize) {
        for block in self.issued.keys() {
            let at = (block * BLOCK) as usize;
            let held = w.nodes[holder].disk.durable[0][at];
            let legal = self.legal(w, *block);
            assert!(
                legal.contains(&held),
                "block {block} durably holds {held}, one of {legal:?} was acknowledged"
            );
        }
    }

    fn failures(&self, w: &World) -> usize {
        self.issued
            .values()
            .flatten()
            .filter(|(r, _)| w.status_of(0, *r) != Some(Status::Ok))
            .count()
    }
}

/// What the primary reads through the server is what was acknowledged.
fn reads_back(w: &mut World, blocks: &Blocks) {
    for block in blocks.issued.keys() {
        let request = w.read(0, 0, block * BLOCK, BLOCK as u32);
        w.until("the read is answered", 20_000, |w| {
            w.status_of(0, request).is_some()
        });
        assert_eq!(w.status_of(0, request), Some(Status::Ok));
        let bytes = w.read_bytes(0, request);
        assert!(
            bytes.iter().all(|b| *b == bytes[0]),
            "a block is read whole"
        );
        let legal = blocks.legal(w, *block);
        assert!(
            legal.contains(&bytes[0]),
            "block {block} reads {}, legal {legal:?}",
            bytes[0]
        );
    }
}

/// Everything written is flushed, and the server heard that it is stable: its window names none of it any more, so
/// only its bits still say what the failed disk lacks.
fn stable(w: &mut World) {
    let flush = w.flush(0);
    w.until("the flush is answered", 20_000, |w| {
        w.status_of(0, flush).is_some()
    });
    w.steps(400);
}

#[test]
fn the_service_goes_on_without_the_primarys_disk() {
    for mode in [Mode::Sync, Mode::SemiSync] {
        for policy in [OnPeerLoss::Suspend, OnPeerLoss::Continue] {
            for seed in 0..25 {
                let mut w = pair(seed, &[mode, mode], policy);
                let mut blocks = Blocks::default();
                blocks.write(&mut w, 20);
                w.nodes[0].broken = true;
                blocks.write(&mut w, 40);
                w.until("every write is answered", 100_000, |w| blocks.answered(w));
                assert_eq!(blocks.failures(&w), 0, "no write failed (seed {seed})");
                let flush = w.flush(0);
                w.until("the flush is answered", 20_000, |w| {
                    w.status_of(0, flush).is_some()
                });
                assert_eq!(w.status_of(0, flush), Some(Status::Ok));
                reads_back(&mut w, &blocks);
                // FUA only: nothing that completed is in the server's cache alone.
                blocks.check_durable(&w, 1);
                let status = w.nodes[1].core.as_ref().unwrap().status(w.now);
                assert_eq!(status.in_sync, SlotSet::only(Slot(1)));
                assert!(
                    w.nodes[1].notices.iter().any(|n| n.kind == "disk-lost"),
                    "the server says that it holds the only current data"
                );
            }
        }
    }
}

#[test]
fn a_disk_is_left_on_request_while_another_copy_can_serve() {
    for seed in 0..25 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        // Only a primary goes on through another copy.
        let refusal = w.command(1, Command::DetachDisk).unwrap_err();
        assert!(refusal.what.contains("is secondary"), "{refusal}");
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 30);
        let text = w
            .command(0, Command::DetachDisk)
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(text.contains("through copy 1"), "{text}");
        blocks.write(&mut w, 30);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        assert_eq!(blocks.failures(&w), 0, "no write failed (seed {seed})");
        reads_back(&mut w, &blocks);
        blocks.check_durable(&w, 1);
        // Nothing new was given to the disk that was left; what was on its way may have arrived.
        let status = w.nodes[0].core.as_ref().unwrap().status(w.now);
        assert_eq!(status.state, CopyState::Failed);
        // Who serves for it knows, and does not call the pair whole.
        let status = w.nodes[1].core.as_ref().unwrap().status(w.now);
        assert_eq!(status.peers[0].state, Some(CopyState::Failed));
        w.steps(200);
        let arrived = w.nodes[0].disk.data.clone();
        blocks.write(&mut w, 30);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        assert_eq!(w.nodes[0].disk.data, arrived, "seed {seed}");
        let refusal = w.command(0, Command::DetachDisk).unwrap_err();
        assert!(refusal.what.contains("already"), "{refusal}");
        // As after any failure: the service moves, the disk comes back as a target.
        w.command(0, Command::Demote)
            .unwrap_or_else(|e| panic!("{e}"));
        w.promote(1, false).unwrap_or_else(|e| panic!("{e}"));
        w.crash(0, false);
        w.start(0);
        w.nodes[1].wants = vec![Slot(0)];
        w.until("both are up to date", 400_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        assert_eq!(w.nodes[0].disk.data, w.nodes[1].disk.data);
        blocks.check(&w, 0);
    }
}

#[test]
fn a_disk_is_not_left_where_no_other_copy_can_serve() {
    let mut w = pair(7, &[Mode::Sync, Mode::Sync], OnPeerLoss::Continue);
    w.crash(1, false);
    let first = w.write(0, 0, 0, vec![1; 4096], false);
    w.until("alone", 20_000, |w| w.status_of(0, first).is_some());
    let refusal = w.command(0, Command::DetachDisk).unwrap_err();
    assert!(refusal.what.contains("no other copy"), "{refusal}");
    let second = w.write(0, 0, 0, vec![2; 4096], false);
    w.until("it goes on", 20_000, |w| w.status_of(0, second).is_some());
    assert_eq!(w.status_of(0, second), Some(Status::Ok));
}

#[test]
fn the_service_moves_to_the_server_and_the_repaired_disk_follows() {
    for seed in 0..25 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 20);
        w.nodes[0].broken = true;
        blocks.write(&mut w, 20);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        if seed % 2 == 0 {
            stable(&mut w);
        }
        w.command(0, Command::Demote)
            .unwrap_or_else(|e| panic!("{e}"));
        w.promote(1, false).unwrap_or_else(|e| panic!("{e}"));
        blocks.check(&w, 1);
        // The disk answers again, with its old data: it must come back as a target, never as current (D13).
        w.crash(0, false);
        w.nodes[0].broken = false;
        w.start(0);
        w.nodes[1].wants = vec![Slot(0)];
        w.until("both are up to date", 400_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        assert_eq!(
            w.nodes[0].disk.data, w.nodes[1].disk.data,
            "the copies are equal"
        );
        blocks.check(&w, 0);
    }
}

#[test]
fn the_old_disk_is_no_source_even_if_the_diskless_machine_died() {
    for seed in 0..25 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 20);
        w.nodes[0].broken = true;
        blocks.write(&mut w, 20);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        if seed % 3 == 0 {
            stable(&mut w);
        }
        w.crash(0, true);
        w.nodes[0].broken = false;
        if seed % 2 == 0 {
            // Alone it is refused: the newest epoch's owner is itself.
            w.cut.push((0, 1));
            w.start(0);
            w.promote(0, false).unwrap_err();
            w.cut.clear();
        } else {
            w.start(0);
        }
        w.until("both are up to date", 400_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        assert_eq!(
            w.nodes[0].disk.data, w.nodes[1].disk.data,
            "the copies are equal"
        );
        blocks.check(&w, 1);
    }
}

#[test]
fn requests_wait_while_the_server_is_away() {
    for seed in 0..40 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 10);
        w.nodes[0].broken = true;
        blocks.write(&mut w, 10);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        // In flight when the link, or the whole server with its disk cache, goes.
        blocks.write(&mut w, 10);
        let restart = seed % 2 == 1;
        if restart {
            w.crash(1, true);
        } else {
            w.drop_link(0, 1, "cable");
        }
        blocks.write(&mut w, 10);
        let read = w.read(0, 0, 0, BLOCK as u32);
        if restart {
            w.start(1);
        }
        w.until("every request is answered", 100_000, |w| {
            blocks.answered(w) && w.status_of(0, read).is_some()
        });
        assert_eq!(blocks.failures(&w), 0, "nothing failed (seed {seed})");
        assert_eq!(w.status_of(0, read), Some(Status::Ok));
        reads_back(&mut w, &blocks);
        blocks.check_durable(&w, 1);
    }
}

#[test]
fn a_server_that_lost_its_cache_before_it_took_over_ends_the_service() {
    let mut seen = false;
    for seed in 0..60 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 20);
        w.nodes[0].broken = true;
        let steps = w.rng.below(12) as usize;
        blocks.write(&mut w, 2);
        w.steps(steps);
        w.crash(1, true);
        w.start(1);
        w.steps(3000);
        let failed = w.nodes[0].notices.iter().any(|n| n.kind == "volume-failed");
        seen |= failed;
        blocks.write(&mut w, 2);
        w.until("answered one way or the other", 100_000, |w| {
            blocks.answered(w)
        });
        if blocks.failures(&w) == 0 {
            blocks.check(&w, 1);
        }
        if failed {
            let request = w.write(0, 0, 0, vec![1; 4096], false);
            assert_eq!(w.status_of(0, request), Some(Status::Io));
            w.command(0, Command::Demote)
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }
    assert!(seen, "the case was reached");
}

#[test]
fn without_a_copy_that_could_serve_errors_are_told() {
    let mut w = pair(5, &[Mode::Sync, Mode::Sync], OnPeerLoss::Continue);
    w.crash(1, false);
    let first = w.write(0, 0, 0, vec![1; 4096], false);
    w.until("alone", 20_000, |w| w.status_of(0, first).is_some());
    w.nodes[0].broken = true;
    let second = w.write(0, 0, 0, vec![2; 4096], false);
    w.until("answered", 20_000, |w| w.status_of(0, second).is_some());
    assert_eq!(w.status_of(0, second), Some(Status::Io));
}

#[test]
fn a_third_copy_follows_once_the_service_moved() {
    for seed in 0..10 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let mut w = pair(seed, &modes, OnPeerLoss::Suspend);
        w.until("the third agrees", 50_000, |w| w.settled(&[0, 1, 2]));
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 20);
        w.nodes[0].broken = true;
        blocks.write(&mut w, 20);
        w.until("every write is answered", 100_000, |w| blocks.answered(w));
        w.command(0, Command::Demote)
            .unwrap_or_else(|e| panic!("{e}"));
        w.promote(1, false).unwrap_or_else(|e| panic!("{e}"));
        w.until("the third follows the new primary", 400_000, |w| {
            w.settled(&[1, 2])
        });
        let flush = w.flush(1);
        w.until("flushed", 20_000, |w| w.status_of(1, flush).is_some());
        w.until("the third has it all", 20_000, |w| {
            w.nodes[1].disk.data == w.nodes[2].disk.data
        });
        blocks.check(&w, 2);
    }
}

/// The failed disk's own log names only what was hot before it failed: what was written afterwards to other extents is
/// named by the server's bits alone (D7).
#[test]
fn the_server_knows_what_the_failed_disk_lacks() {
    const EXTENT: u64 = 4 << 20;
    for case in 0..4 {
        let mut w = World::new(
            case,
            &[Mode::Sync, Mode::Sync],
            OnPeerLoss::Suspend,
            &[3 * EXTENT],
            true,
        );
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        let write = |w: &mut World, offset: u64| {
            let request = w.write(0, 0, offset, vec![7; BLOCK as usize], false);
            w.until("the write is answered", 20_000, |w| {
                w.status_of(0, request).is_some()
            });
            assert_eq!(w.status_of(0, request), Some(Status::Ok));
        };
        write(&mut w, 0);
        w.nodes[0].broken = true;
        write(&mut w, 8 * BLOCK);
        write(&mut w, EXTENT + 3 * BLOCK);
        // Trimmed from the server's window, or still in it.
        if case % 2 == 0 {
            stable(&mut w);
        }
        // The primary is asked to stop, or its machine dies.
        if case / 2 == 0 {
            w.command(0, Command::Demote)
                .unwrap_or_else(|e| panic!("{e}"));
        }
        w.crash(0, false);
        w.nodes[0].broken = false;
        w.start(0);
        w.nodes[1].wants = vec![Slot(0)];
        w.until("both are up to date", 400_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        assert!(
            w.nodes[0].disk.data == w.nodes[1].disk.data,
            "the copies are equal (case {case})"
        );
    }
}

/// D7: a member of S is cut off and lacks a write when the primary's disk fails. What the server holds is not stable, whatever it
/// flushed: it remembers what that member lacks.
#[test]
fn a_member_that_is_away_is_remembered_by_the_server() {
    for seed in 0..20 {
        let mut w = pair(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend);
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 2);
        cut(&mut w, 1, 2);
        let parked = write(&mut w, 0, 40, 2);
        w.until("the server has it", 20_000, |w| holds(w, 1, 40, 2));
        w.nodes[0].broken = true;
        w.flush(0);
        w.until("the server goes on with it", 100_000, |w| {
            w.status_of(0, parked).is_some()
        });
        w.crash(0, false);
        w.cut.clear();
        agree(&mut w, 1, 2);
        assert!(
            holds(&w, 2, 40, 2),
            "seed {seed}: nobody knows that it lacks it"
        );
    }
}

/// D11: what serves for a primary without a disk alone holds current data, and is not given up.
#[test]
fn the_server_of_a_primary_without_a_disk_is_not_invalidated() {
    for seed in 0..10 {
        let mut w = pair(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend);
        written(&mut w, 0, 1, 1);
        w.nodes[0].broken = true;
        written(&mut w, 0, 2, 2);
        let server = (1..3)
            .find(|n| on_disk(&w, *n).in_sync == SlotSet::only(Slot(*n as u8)))
            .expect("one of them serves");
        w.command(server, Command::Invalidate)
            .expect_err("it alone has block 2");
        written(&mut w, 0, 3, 3);
        w.crash(0, false);
        ok(w.promote(server, false));
        assert!(
            holds(&w, server, 2, 2) && holds(&w, server, 3, 3),
            "seed {seed}"
        );
    }
}

/// Both disks fail at once, and nobody has taken over: what waits ends with an error when the primary is demoted, as it was told.
#[test]
fn demotion_ends_what_waits_when_both_disks_failed() {
    for seed in 0..40 {
        let mut w = pair(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend);
        let mut blocks = Blocks::default();
        blocks.write(&mut w, 20);
        w.nodes[0].broken = true;
        let steps = w.rng.below(30) as usize;
        w.steps(steps);
        w.nodes[1].broken = true;
        blocks.write(&mut w, 10);
        w.steps(2000);
        let demoted = w.command(0, Command::Demote);
        demoted.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        w.until("every write is answered", 20_000, |w| blocks.answered(w));
        // A person repairs both; whatever was acknowledged is there.
        for n in 0..2 {
            w.crash(n, false);
            w.nodes[n].broken = false;
            w.start(n);
        }
        w.until("the copies agree", 100_000, |w| w.settled(&[0, 1]));
        // Alone in S, the server is the one; else either may be.
        let heir = w.rng.below(2) as usize;
        if w.promote(heir, false).is_err() {
            let promoted = w.promote(1, false);
            promoted.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
        w.until("they are equal", 100_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        blocks.check(&w, 0);
        blocks.check(&w, 1);
    }
}
