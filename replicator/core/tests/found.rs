//! Defects that lost writes, or gave two copies the right to them, each in the smallest story that shows it. All were
//! found by the simulator; these stay when its seeds come to mean something else.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::frame::FrameKind;
use holdfast_wire_format::frame_codec::{decode_header, encode_header};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::*;
use world::*;

const SIZE: u64 = 1 << 20;

fn copies(seed: u64, modes: &[Mode], policy: OnPeerLoss) -> World {
    let mut w = World::new(seed, modes, policy, &[SIZE], true);
    let all: Vec<usize> = (0..modes.len()).collect();
    for n in &all {
        w.start(*n);
    }
    w.until("the copies agree", 4000, |w| w.settled(&all));
    w
}

fn pair(seed: u64) -> World {
    copies(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Suspend)
}

fn role(w: &World, n: usize) -> Option<Role> {
    w.nodes[n].core.as_ref().map(|c| c.status(w.now).role)
}

fn epoch(w: &World, n: usize) -> Epoch {
    let core = w.nodes[n].core.as_ref().expect("a process");
    core.status(w.now).epoch
}

fn same(w: &World, a: usize, b: usize) {
    let (x, y) = (&w.nodes[a].disk.data[0], &w.nodes[b].disk.data[0]);
    if let Some(at) = x.iter().zip(y).position(|(x, y)| x != y) {
        panic!("copies {a} and {b} differ at byte {at}");
    }
}

/// C1: copy 1 was promoted over the unreachable primary 0 and writes. Copy 2, not in S, raised its gate for that and
/// knows nothing more. What copy 0 hears of it must end its right to go on.
#[test]
fn an_epoch_told_by_a_third_copy_ends_the_right_to_go_on() {
    let mut told = 0;
    for seed in 0..20 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let mut w = copies(seed, &modes, OnPeerLoss::Suspend);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        ok(w.promote(1, false));
        // Before copy 2 hears of the new S.
        cut(&mut w, 1, 2);
        assert_eq!(epoch(&w, 2).number, 2, "it raised its gate");
        written(&mut w, 1, 1, 2);
        w.drop_link(0, 2, "a blip");
        w.until("copy 0 heard of it", 20_000, |w| epoch(w, 0).number == 2);
        let in_sync = |n: usize| w.nodes[n].core.as_ref().map(|c| c.status(w.now).in_sync);
        if in_sync(2).is_some_and(|s| !s.contains(Slot(0))) {
            continue;
        }
        told += 1;
        w.crash(1, false);
        cut(&mut w, 0, 2);
        w.promote(0, false).expect_err("copy 1 went on without it");
        w.crash(0, true);
        w.start(0);
        w.promote(0, false).expect_err("nor after a restart");
    }
    assert!(told > 10, "{told} of 20 runs tell the story");
}

/// D8: copy 1 fills copy 2, and copy 0 begins to fill copy 1 with what that one lost. Blocks that copy 1 has read and
/// sent already change under it; no copy may end with the old ones and nobody knowing.
#[test]
fn a_copy_that_is_being_filled_fills_nobody() {
    for seed in 0..60 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let mut w = copies(seed, &modes, OnPeerLoss::Suspend);
        // A slow one, so that the second resync meets the first.
        w.tuning.resync_chunk_bytes = 16 << 10;
        w.tuning.resync_window_bytes = 16 << 10;
        ok(w.promote(0, false));
        for at in 0..120 {
            write(&mut w, 0, at * 2, 1 + at as u8);
        }
        let some = 100 + w.rng.below(300) as usize;
        w.steps(some);
        for n in 0..3 {
            w.crash(n, n > 0);
        }
        w.start(1);
        w.start(2);
        w.cut.push((0, 2));
        w.until("copy 1 fills copy 2", 20_000, |w| {
            on_disk(w, 2).state == CopyState::Inconsistent
        });
        let some = w.rng.below(60) as usize;
        w.steps(some);
        w.start(0);
        w.until("copy 0 fills copy 1", 20_000, |w| {
            on_disk(w, 1).state == CopyState::Inconsistent
        });
        for _ in 0..w.rng.below(400) {
            w.step();
            let Some(core) = &w.nodes[1].core else {
                continue;
            };
            let (probe, toward) = (core.probe(), core.probe_peer(Slot(2)));
            assert!(
                probe.state != CopyState::Inconsistent
                    || toward.is_none_or(|(relation, _)| !relation.contains("source")),
                "seed {seed}: copy 1 is being filled and fills copy 2 ({toward:?})"
            );
        }
        w.cut.clear();
        w.until("all are whole", 400_000, |w| {
            w.up_to_date(0)
                && w.up_to_date(1)
                && on_disk(w, 2).state == CopyState::Complete
                && w.settled(&[0, 1, 2])
        });
        same(&w, 0, 1);
        same(&w, 0, 2);
    }
}

/// D2, C1: the superseded primary meets its successor and loses power at any step of that. What it durably knows of the
/// newer epoch never looks like a right to go on.
#[test]
fn a_superseded_primary_never_goes_on_alone() {
    let mut step = 0;
    let mut knew = 0;
    loop {
        let mut w = pair(step as u64);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        cut(&mut w, 0, 1);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 2);
        w.cut.clear();
        w.steps(step);
        let over = w.settled(&[0, 1]) && w.up_to_date(0) && on_disk(&w, 0).in_sync.len() == 2;
        if over || step > 600 {
            break;
        }
        w.crash(0, true);
        w.crash(1, true);
        let superblock = on_disk(&w, 0);
        knew += usize::from(superblock.epoch_gate.owner == 1);
        if superblock.in_sync.contains(Slot(0)) && superblock.state == CopyState::UpToDate {
            let old = superblock.epoch_gate.number == 1;
            let filled = on_disk(&w, 1).in_sync.contains(Slot(0));
            w.start(0);
            if w.promote(0, false).is_ok() {
                assert!(!old && filled, "step {step}: it goes on without write 2");
            }
        } else {
            w.start(0);
            w.promote(0, false)
                .expect_err("a copy that is not in S goes on");
        }
        step += 1;
    }
    assert!(knew > 5, "the crash comes after the epoch was learned, too");
}

/// C1: power fails at any step of a planned promotion. Of two copies that then stand alone, at most one may go on
/// without force: the promoting one raises its own gate durably before it asks.
#[test]
fn at_most_one_copy_goes_on_alone_after_half_a_promotion() {
    for promoting in [0, 1] {
        for step in 0.. {
            let mut w = pair(step as u64 * 2 + promoting as u64);
            // The other copy owned the epoch before.
            ok(w.promote(1 - promoting, false));
            ok(w.command(1 - promoting, Command::Demote));
            w.until("both are secondary", 4000, |w| w.settled(&[0, 1]));
            let admin = w.admin(promoting, Command::Promote { force: false });
            w.steps(step);
            let over = w.nodes[promoting].admin.contains_key(&admin);
            w.crash(0, true);
            w.crash(1, true);
            cut(&mut w, 0, 1);
            w.start(0);
            w.start(1);
            let went_on: Vec<usize> = (0..2).filter(|n| w.promote(*n, false).is_ok()).collect();
            assert!(
                went_on.len() < 2,
                "step {step} of the promotion of copy {promoting}: both go on alone"
            );
            if over || step > 300 {
                break;
            }
        }
    }
}

/// C3: whatever is lost at any step of a promotion, a copy serves in no epoch that it would have forgotten after a
/// power cut.
#[test]
fn a_primary_has_its_epoch_on_the_disk() {
    let mut served = 0;
    for step in 0..120 {
        for policy in [OnPeerLoss::Suspend, OnPeerLoss::Continue] {
            let modes = [Mode::Sync, Mode::Sync];
            let mut w = copies(step, &modes, policy);
            let admin = w.admin(0, Command::Promote { force: false });
            w.steps(step as usize);
            w.drop_link(0, 1, "a blip");
            for _ in 0..4000 {
                if role(&w, 0) == Some(Role::Primary) || w.nodes[0].admin.contains_key(&admin) {
                    break;
                }
                w.step();
            }
            if role(&w, 0) == Some(Role::Primary) {
                served += 1;
                let number = epoch(&w, 0).number;
                let durable = on_disk(&w, 0);
                assert_eq!(durable.epoch_gate.number, number, "step {step}, {policy:?}");
                let newest = durable.generations.last().expect("a generation");
                assert_eq!(newest.epoch.number, number, "step {step}, {policy:?}");
            }
        }
    }
    assert!(served > 100, "{served} promotions came to their end");
}

/// D1, D7 in semi-sync mode: what one lost session brought is still being applied when the next is lost, too. The
/// writes that completed because they were received are there after the primary is gone.
#[test]
fn two_lost_sessions_lose_nothing_that_was_received() {
    for seed in 0..200 {
        let modes = [Mode::SemiSync, Mode::SemiSync];
        let mut w = copies(seed, &modes, OnPeerLoss::Suspend);
        ok(w.promote(0, false));
        let mut requests = Vec::new();
        for round in 0..3 {
            for at in 0..6 {
                let fill = (round * 6 + at + 1) as u8;
                requests.push((at, fill, write(&mut w, 0, at, fill)));
            }
            let some = w.rng.below(30) as usize;
            w.steps(some);
            w.drop_link(0, 1, "a blip");
            let some = w.rng.below(12) as usize;
            w.steps(some);
        }
        let done: Vec<(u64, u8)> = requests
            .iter()
            .filter(|r| w.status_of(0, r.2) == Some(Status::Ok))
            .map(|r| (r.0, r.1))
            .collect();
        w.crash(0, true);
        if w.promote(1, false).is_err() {
            continue;
        }
        for (at, fill) in done {
            let held = w.nodes[1].disk.data[0][(at * BLOCK) as usize];
            assert!(held >= fill, "seed {seed} block {at}: {held}, not {fill}");
        }
    }
}

/// C1: each copy decides by its own record of the policy, so it is not changed on one side alone.
#[test]
fn the_policy_is_not_changed_on_one_side() {
    for n in 0..2 {
        let mut w = pair(n as u64);
        ok(w.promote(0, false));
        let change = |force| Command::SetOnPeerLoss {
            policy: OnPeerLoss::Continue,
            force,
        };
        w.command(n, change(false))
            .expect_err("the other copy goes by the old one");
        assert_eq!(on_disk(&w, n).on_peer_loss, OnPeerLoss::Suspend);
    }
}

/// C1: a copy that is stopping is not promoted, and one that is promoting stops only when that is over.
#[test]
fn nobody_is_promoted_while_it_stops() {
    for step in 0..60 {
        let mut w = pair(step);
        let first = w.admin(0, Command::Detach);
        w.steps((step % 20) as usize);
        let second = w.admin(0, Command::Promote { force: false });
        w.until("both are answered", 20_000, |w| {
            let answered = |a| w.nodes[0].admin.contains_key(a);
            answered(&first) && (answered(&second) || role(w, 0) == Some(Role::Detached))
        });
        let detached = w.nodes[0].admin.get(&first).is_some_and(|r| r.is_ok());
        if detached {
            assert_eq!(role(&w, 0), Some(Role::Detached), "step {step}");
        }
        let mut w = pair(step);
        let first = w.admin(0, Command::Promote { force: false });
        w.steps((step % 40) as usize);
        let second = w.admin(0, Command::Detach);
        w.until("both are answered", 20_000, |w| {
            let answered = |a| w.nodes[0].admin.contains_key(a);
            (answered(&first) || role(w, 0) == Some(Role::Detached)) && answered(&second)
        });
        let stopped = w.nodes[0].admin[&second].is_ok();
        assert_eq!(role(&w, 0) == Some(Role::Detached), stopped, "step {step}");
        if stopped {
            assert!(!on_disk(&w, 0).flags.unclean, "step {step}: a clean stop");
        }
    }
}

/// D10: two copies become targets at once, and each leaves S with a generation of its own. Both hear of both, in order,
/// whatever state their meetings are in, and nobody's history has a hole.
#[test]
fn generations_that_begin_during_a_meeting_are_told() {
    for seed in 0..60 {
        let mut w = World::new(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend, &[SIZE], true);
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.cut.push((1, 2));
        w.start(2);
        w.until("the third agrees", 4000, |w| w.settled(&[0, 2]));
        ok(w.promote(0, false));
        w.cut.clear();
        w.until("all are whole", 400_000, |w| {
            (0..3).all(|n| w.up_to_date(n)) && w.settled(&[0, 1, 2])
        });
        written(&mut w, 0, 1, 1);
        for at in 0..4 {
            write(&mut w, 0, at, 2);
        }
        let some = w.rng.below(30) as usize;
        w.steps(some);
        w.drop_link(0, 1, "a blip");
        w.drop_link(0, 2, "a blip");
        w.until("all are whole", 400_000, |w| {
            (0..3).all(|n| w.up_to_date(n)) && w.settled(&[0, 1, 2])
        });
        written(&mut w, 0, 5, 3);
        for n in 0..3 {
            let bad = w.nodes[n].notices.iter().find(|n| n.kind == "bad-frame");
            assert!(bad.is_none(), "seed {seed}: {bad:?}");
            let generations = on_disk(&w, n).generations;
            for pair in generations.windows(2) {
                assert_eq!(
                    pair[1].parent, pair[0].id,
                    "seed {seed}: copy {n} has a hole"
                );
            }
            assert_eq!(generations, on_disk(&w, 0).generations, "seed {seed}");
        }
    }
}

/// D7: a full copy marks every block of the target, and these marks are in memory only. The source that loses power
/// in the middle of it goes on with every block, not with what it happened to have saved.
#[test]
fn a_full_copy_whose_source_restarts_leaves_no_block_out() {
    for seed in 0..40 {
        let modes = [Mode::Sync, Mode::Sync];
        let mut w = World::new(seed, &modes, OnPeerLoss::Continue, &[SIZE, SIZE / 2], false);
        w.tuning.resync_chunk_bytes = 64 << 10;
        for n in 0..2 {
            // No write ever comes to most blocks: what the copies held before differs.
            for volume in 0..2 {
                w.nodes[n].disk.data[volume].fill(0x10 + n as u8);
                w.nodes[n].disk.durable[volume].fill(0x10 + n as u8);
            }
            w.start(n);
        }
        ok(w.promote(0, true));
        w.until("the copy begins", 40_000, |w| {
            on_disk(w, 1).state == CopyState::Inconsistent
        });
        let some = w.rng.below(120) as usize;
        w.steps(some);
        w.crash(0, true);
        w.start(0);
        w.until("all is whole", 400_000, |w| {
            w.up_to_date(0)
                && w.settled(&[0, 1])
                && matches!(
                    on_disk(w, 1).state,
                    CopyState::Complete | CopyState::UpToDate
                )
        });
        assert_eq!(w.nodes[0].disk.data, w.nodes[1].disk.data, "seed {seed}");
    }
}

/// A copy that is no member of S is asked to be promoted before anybody ever was: refused, and nothing breaks.
#[test]
fn a_follower_is_refused_before_the_first_epoch() {
    for seed in 0..20 {
        let modes = [Mode::Sync, Mode::Sync, Mode::Async];
        let mut w = copies(seed, &modes, OnPeerLoss::Suspend);
        ok(w.command(2, Command::Invalidate));
        w.until("it is whole again", 20_000, |w| {
            on_disk(w, 2).state == CopyState::Complete && w.settled(&[0, 2])
        });
        w.promote(2, false).expect_err("it is not in S");
        ok(w.promote(0, false));
    }
}

/// D1, D7: two copies were promoted with one epoch number, apart from each other, and the one that wrote nothing becomes
/// the target of the other. What the other sends it later and loses with the link is remembered as lost.
#[test]
fn a_primary_that_fills_another_primary_does_not_take_it_for_its_own() {
    for seed in 0..10 {
        let mut w = copies(seed, &[Mode::Sync, Mode::Sync], OnPeerLoss::Continue);
        ok(w.promote(1, false));
        written(&mut w, 1, 1, 1);
        cut(&mut w, 0, 1);
        written(&mut w, 1, 2, 2);
        w.crash(1, false);
        w.start(1);
        ok(w.promote(1, false));
        ok(w.promote(0, true));
        assert_eq!(epoch(&w, 0).number, epoch(&w, 1).number, "the same number");
        w.cut.clear();
        w.until("copy 0 follows", 40_000, |w| {
            role(w, 0) == Some(Role::Secondary) && w.settled(&[0, 1])
        });
        let lost = write(&mut w, 1, 5, 9);
        w.drop_link(0, 1, "a blip");
        w.until("it completes without copy 0", 40_000, |w| {
            w.status_of(1, lost).is_some()
        });
        assert_eq!(w.status_of(1, lost), Some(Status::Ok));
        w.until("copy 0 is back", 40_000, |w| w.settled(&[0, 1]));
        w.steps(2000);
        same(&w, 0, 1);
    }
}

/// D14: resync data, or a write mirrored to a target, of a generation that was never announced (its sender is defective) ends the
/// session, and changes nothing.
#[test]
fn data_of_another_generation_is_refused_by_a_target() {
    of_another_generation(FrameKind::ResyncData);
    of_another_generation(FrameKind::Write);
}

fn of_another_generation(kind: FrameKind) {
    let mut reached = 0;
    for seed in 0..20 {
        let mut w = pair(seed);
        ok(w.promote(0, false));
        w.crash(1, true);
        for at in 0..16 {
            write(&mut w, 0, at, 3);
        }
        w.start(1);
        w.until("it is a target", 20_000, |w| {
            w.nodes[1].notices.iter().any(|n| n.kind == "resync-target")
        });
        let mut changed = false;
        for round in 0..20_000 {
            if round % 16 == 0 && round < 800 {
                write(&mut w, 0, 17 + round / 16, 4);
            }
            let wire = w.wires.get_mut(&(0, 1)).and_then(|wire| wire.front_mut());
            if let Some((header, body)) = wire
                && let bytes = header.as_slice().try_into().expect("a header")
                && let Ok(mut decoded) = decode_header(bytes)
                && decoded.kind == kind
                && !changed
            {
                changed = true;
                decoded.generation = GenerationId(decoded.generation.0 ^ 1);
                *header = encode_header(&decoded).to_vec();
                body.fill(0xee);
            }
            w.step();
            let data = &w.nodes[1].disk.data[0];
            assert!(!data.contains(&0xee), "seed {seed}: it was written");
            if w.settled(&[0, 1]) && w.up_to_date(1) {
                break;
            }
        }
        let refused = |n: &Notice| n.kind == "bad-frame" && n.text.contains("not announced");
        if changed {
            reached += 1;
            assert!(w.nodes[1].notices.iter().any(refused), "seed {seed}");
            w.until("whole all the same", 100_000, |w| {
                w.settled(&[0, 1])
                    && w.up_to_date(1)
                    && w.nodes[0].disk.data == w.nodes[1].disk.data
            });
        }
    }
    assert!(reached > 10, "reached {reached} times");
}

/// D1: a flush is on its way when the link breaks, and nothing else: the copies meet, nothing is to be copied, and the flush is answered.
#[test]
fn a_flush_whose_session_ended_is_answered_though_nothing_is_copied() {
    let mut met = 0;
    for seed in 0..200 {
        let mut w = pair(seed);
        ok(w.promote(0, false));
        written(&mut w, 0, 1, 1);
        for _ in 0..2 {
            let flush = w.flush(0);
            w.until("the flush", 20_000, |w| w.status_of(0, flush).is_some());
        }
        w.steps(200);
        let flush = w.flush(0);
        let some = w.rng.below(6) as usize;
        w.steps(some);
        let before = w.nodes[0].notices.len();
        w.drop_link(0, 1, "a blip");
        w.until("the flush is answered", 20_000, |w| {
            w.status_of(0, flush) == Some(Status::Ok)
        });
        let nothing = |n: &Notice| n.kind == "handshake" && n.text.contains("Row 9");
        met += u32::from(w.nodes[0].notices[before..].iter().any(nothing));
    }
    assert!(met > 2, "{met}");
}
