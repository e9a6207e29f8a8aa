//! Growing a volume while it is in use: every copy, or none that anybody sees.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use world::story::on_disk;
use world::*;

const OLD: u64 = 1 << 20;
const NEW: u64 = 2 << 20;

fn copies(seed: u64, modes: &[Mode], policy: OnPeerLoss) -> World {
    let mut w = World::new(seed, modes, policy, &[OLD, OLD], true);
    for n in 0..modes.len() {
        w.start(n);
    }
    let all: Vec<usize> = (0..modes.len()).collect();
    w.until("the copies agree", 4000, |w| w.settled(&all));
    w
}

fn grow(volume: u16) -> Command {
    Command::Grow {
        volume: VolumeIndex(volume),
        size: NEW,
    }
}

fn size(w: &World, n: usize, volume: u16) -> u64 {
    let core = w.nodes[n].core.as_ref().expect("it runs");
    core.status(w.now).volumes[volume as usize].size
}

fn written(w: &mut World, n: usize, volume: u16, block: u64, fill: u8) {
    let bytes = vec![fill; BLOCK as usize];
    let request = w.write(n, volume, block * BLOCK, bytes, false);
    w.until("the write completes", 40_000, |w| {
        w.status_of(n, request).is_some()
    });
    assert_eq!(w.status_of(n, request), Some(Status::Ok));
}

fn flushed(w: &mut World) {
    let request = w.flush(0);
    w.until("the flush", 40_000, |w| w.status_of(0, request).is_some());
    assert_eq!(w.status_of(0, request), Some(Status::Ok));
}

fn ok(result: AdminResult) -> String {
    match result {
        Ok(text) => text,
        Err(refusal) => panic!("{refusal}"),
    }
}

/// What differs between the disks of two copies.
fn differs(w: &World, a: usize, b: usize) -> bool {
    w.nodes[a].disk.data != w.nodes[b].disk.data
}

#[test]
fn all_copies_grow_while_the_application_writes_and_the_primary_is_the_last() {
    for (seed, modes) in [
        vec![Mode::Sync; 2],
        vec![Mode::Sync, Mode::Async],
        vec![Mode::Sync, Mode::SemiSync],
        vec![Mode::Sync, Mode::Sync, Mode::Async],
    ]
    .into_iter()
    .cycle()
    .take(40)
    .enumerate()
    {
        let volume = (seed % 2) as u16;
        let mut w = copies(seed as u64, &modes, OnPeerLoss::Suspend);
        ok(w.promote(0, false));
        written(&mut w, 0, volume, OLD / BLOCK - 1, 1);
        let admin = w.admin(0, grow(volume));
        let mut block = 0;
        while !w.nodes[0].admin.contains_key(&admin) {
            // D7: nobody can write behind the end of a copy.
            let primary = size(&w, 0, volume);
            for n in 1..modes.len() {
                assert!(size(&w, n, volume) >= primary, "seed {seed}");
            }
            if block < 60 {
                let bytes = vec![7; BLOCK as usize];
                w.write(0, volume, block * BLOCK, bytes, block % 3 == 0);
                block += 1;
            }
            w.steps(3);
        }
        let text = ok(w.nodes[0].admin[&admin].clone());
        assert!(text.contains(&NEW.to_string()), "{text}");
        for n in 0..modes.len() {
            assert_eq!(size(&w, n, volume), NEW, "seed {seed}");
            assert_eq!(w.nodes[n].resized, [(volume, NEW)], "seed {seed}");
            assert_eq!(size(&w, n, 1 - volume), OLD, "the other volume");
        }
        written(&mut w, 0, volume, OLD / BLOCK, 9);
        written(&mut w, 0, volume, NEW / BLOCK - 1, 8);
        flushed(&mut w);
        for n in 1..modes.len() {
            w.until("all copies are the same", 40_000, |w| !differs(w, 0, n));
        }
        // And it is so after a start, too.
        for n in 0..modes.len() {
            w.crash(n, true);
        }
        for n in 0..modes.len() {
            w.start(n);
            assert_eq!(size(&w, n, volume), NEW, "seed {seed}");
        }
    }
}

#[test]
fn a_growth_that_one_copy_has_no_room_for_changes_nothing() {
    for short in 0..3 {
        let mut w = copies(
            7,
            &[Mode::Sync, Mode::Sync, Mode::Async],
            OnPeerLoss::Suspend,
        );
        ok(w.promote(0, false));
        w.nodes[short].no_room = true;
        let refusal = w.command(0, grow(0)).unwrap_err().to_string();
        assert!(refusal.contains("the device is too small"), "{refusal}");
        assert!(refusal.contains("old size on every copy"), "{refusal}");
        w.steps(400);
        for n in 0..3 {
            assert_eq!(size(&w, n, 0), OLD, "copy {n}");
        }
        written(&mut w, 0, 0, 3, 3);
        // Its device was enlarged: the same command goes through.
        w.nodes[short].no_room = false;
        ok(w.command(0, grow(0)));
        for n in 0..3 {
            assert_eq!(size(&w, n, 0), NEW, "copy {n}");
        }
    }
}

#[test]
fn a_growth_wants_a_primary_every_copy_and_a_larger_size() {
    let mut w = copies(3, &[Mode::Sync; 2], OnPeerLoss::Continue);
    let refused = |w: &mut World, n: usize, size: u64, why: &str| {
        let command = Command::Grow {
            volume: VolumeIndex(0),
            size,
        };
        let refusal = w.command(n, command).unwrap_err().to_string();
        assert!(refusal.contains(why), "{refusal}");
    };
    refused(&mut w, 0, NEW, "this copy is secondary");
    ok(w.promote(0, false));
    refused(&mut w, 0, OLD - 512, "can only grow");
    refused(&mut w, 0, OLD + 100, "whole sectors");
    refused(&mut w, 0, 1 << 61, "no metadata can describe");
    w.crash(1, false);
    refused(&mut w, 0, NEW, "copy 1 is not connected and whole");
    assert_eq!(size(&w, 0, 0), OLD);
}

/// Either copy dies at any moment of a growth, with a power cut and torn metadata or without: each has the old or the new size,
/// they meet, end with one size, and what was acknowledged is there.
#[test]
fn a_crash_at_any_moment_leaves_copies_that_meet_and_finish_the_growth() {
    let (mut old, mut new, mut mixed) = (0, 0, 0);
    for seed in 0..400 {
        let volume = (seed % 2) as u16;
        let modes: &[Mode] = if seed % 3 == 0 {
            &[Mode::Sync, Mode::Sync, Mode::Async]
        } else {
            &[Mode::Sync, Mode::Sync]
        };
        let all: Vec<usize> = (0..modes.len()).collect();
        let mut w = copies(seed, modes, OnPeerLoss::Suspend);
        w.tear_metadata = seed % 4 < 2;
        ok(w.promote(0, false));
        written(&mut w, 0, volume, 5, 1);
        flushed(&mut w);
        let admin = w.admin(0, grow(volume));
        let steps = w.rng.below(90) as usize;
        w.steps(steps);
        let victims: Vec<usize> = match w.rng.below(4) {
            0 => vec![0],
            1 => vec![1],
            2 => vec![modes.len() - 1],
            _ => all.clone(),
        };
        let power = w.rng.chance(50);
        for n in &victims {
            w.crash(*n, power);
        }
        if !victims.contains(&0) {
            w.until("the growth is answered", 40_000, |w| {
                w.nodes[0].admin.contains_key(&admin)
            });
        }
        for n in &victims {
            w.start(*n);
        }
        let sizes: Vec<u64> = all.iter().map(|n| size(&w, *n, volume)).collect();
        match (sizes.contains(&OLD), sizes.contains(&NEW)) {
            (true, true) => mixed += 1,
            (true, false) => old += 1,
            _ => new += 1,
        }
        w.until("they meet", 100_000, |w| w.settled(&all));
        let grown = size(&w, 0, volume);
        for n in &all {
            assert_eq!(size(&w, *n, volume), grown, "seed {seed}: {sizes:?}");
        }
        // One that lived on may have been about to take it.
        assert!(grown == NEW || !sizes.contains(&NEW), "seed {seed}");
        if victims.contains(&0) {
            w.until("it may be promoted", 100_000, |w| w.up_to_date(0));
            ok(w.promote(0, false));
        }
        written(&mut w, 0, volume, grown / BLOCK - 1, 4);
        flushed(&mut w);
        for n in &all[1..] {
            let behind = (grown as usize).min(w.nodes[*n].disk.data[volume as usize].len());
            w.until("all copies are the same", 100_000, |w| {
                let data = |n: usize| &w.nodes[n].disk.data[volume as usize][..behind];
                data(0) == data(*n)
            });
            assert!(
                w.nodes[*n].disk.data[volume as usize][5 * BLOCK as usize] == 1,
                "seed {seed}"
            );
        }
        // Whatever came of it, the same command makes it whole.
        w.until("they are whole", 100_000, |w| w.settled(&all));
        ok(w.command(0, grow(volume)));
        for n in &all {
            assert_eq!(size(&w, *n, volume), NEW, "seed {seed}");
        }
    }
    assert!(
        old > 20 && new > 20 && mixed > 5,
        "{old} old, {new} new, {mixed} mixed"
    );
}

fn metadata(a: &Action) -> bool {
    matches!(a, Action::MetaWrite { .. })
}

/// Everything happens but what the disk of that copy is to do of this kind.
fn without(
    w: &mut World,
    n: usize,
    kind: fn(&Action) -> bool,
    limit: usize,
    mut done: impl FnMut(&World) -> bool,
) {
    for _ in 0..limit {
        if done(w) {
            return;
        }
        let held: Vec<Action>;
        (held, w.nodes[n].pending) = std::mem::take(&mut w.nodes[n].pending)
            .into_iter()
            .partition(kind);
        w.step();
        w.nodes[n].pending.extend(held);
    }
    panic!("never came");
}

/// A copy is still writing down one size when its primary, which gave that growth up, is told to grow further, and there is room
/// since an earlier try: the command is answered, and done when it is given again.
#[test]
fn a_larger_size_is_asked_for_while_a_smaller_one_is_written_down() {
    let mut met = 0;
    for seed in 0..60 {
        let mut w = copies(
            seed,
            &[Mode::Sync, Mode::Sync, Mode::Async],
            OnPeerLoss::Suspend,
        );
        ok(w.promote(0, false));
        // The third has no room: the second keeps what it made.
        w.nodes[2].no_room = true;
        w.command(0, grow(1)).unwrap_err();
        w.nodes[2].no_room = false;
        w.steps(400);
        let smaller = Command::Grow {
            volume: VolumeIndex(1),
            size: OLD + (OLD / 2),
        };
        let first = w.admin(0, smaller);
        w.until("it writes it down", 4000, |w| writes_size(w, 1));
        if writes_size(&w, 2) || size(&w, 2, 1) > OLD {
            continue;
        }
        met += 1;
        w.drop_link(0, 2, "a blip");
        without(&mut w, 1, metadata, 4000, |w| {
            w.nodes[0].admin.contains_key(&first) && w.settled(&[0, 2])
        });
        w.nodes[0].admin[&first].clone().unwrap_err();
        let second = w.admin(0, grow(1));
        let mut left = 300;
        without(&mut w, 1, metadata, 400, |_| {
            left -= 1;
            left == 0
        });
        w.until("the growth is answered", 40_000, |w| {
            w.nodes[0].admin.contains_key(&second)
        });
        // (It meets the primary anew before it is asked again.)
        w.until("they agree", 40_000, |w| w.settled(&[0, 1, 2]));
        ok(w.command(0, grow(1)));
        for n in 0..3 {
            assert_eq!(size(&w, n, 1), NEW, "seed {seed}");
        }
    }
    assert!(met > 5, "{met}");
}

/// A copy is still writing down one size when the service moves, and the next primary, to which it was connected all the time, asks
/// for more: once the first is written down it goes on to the larger one by itself, and answers.
#[test]
fn the_next_primary_asks_for_more_while_a_smaller_size_is_written_down() {
    let slow = 1;
    let mut met = 0;
    for seed in 0..40 {
        let mut w = copies(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend);
        ok(w.promote(0, false));
        // The primary has no room: the others keep what they made.
        w.nodes[0].no_room = true;
        w.command(0, grow(1)).unwrap_err();
        w.nodes[0].no_room = false;
        w.steps(400);
        let smaller = Command::Grow {
            volume: VolumeIndex(1),
            size: OLD + (OLD / 2),
        };
        let first = w.admin(0, smaller);
        without(&mut w, slow, superblock_of_the_second, 4000, |w| {
            writes_size(w, slow)
        });
        let demoted = w.admin(0, Command::Demote);
        without(&mut w, slow, superblock_of_the_second, 4000, |w| {
            w.nodes[0].admin.contains_key(&demoted)
        });
        ok(w.nodes[0].admin[&demoted].clone());
        w.nodes[0].admin[&first].clone().unwrap_err();
        without(&mut w, slow, superblock_of_the_second, 4000, |w| {
            w.settled(&[2, 0])
        });
        let promoted = w.admin(2, Command::Promote { force: false });
        without(&mut w, slow, superblock_of_the_second, 4000, |w| {
            w.nodes[2].admin.contains_key(&promoted)
        });
        ok(w.nodes[2].admin[&promoted].clone());
        without(&mut w, slow, superblock_of_the_second, 4000, |w| {
            w.settled(&[2, 0]) && w.settled(&[2, 1])
        });
        let second = w.admin(2, grow(1));
        let mut left = 400;
        without(&mut w, slow, superblock_of_the_second, 500, |_| {
            left -= 1;
            left == 0
        });
        assert!(
            writes_size(&w, slow) && size(&w, slow, 1) == OLD,
            "seed {seed}"
        );
        assert!(!w.nodes[2].admin.contains_key(&second));
        w.until("the growth is answered", 40_000, |w| {
            w.nodes[2].admin.contains_key(&second)
        });
        ok(w.nodes[2].admin[&second].clone());
        for n in 0..3 {
            assert_eq!(size(&w, n, 1), NEW, "seed {seed}, copy {n}");
        }
        met += usize::from(w.nodes[slow].resized == [(1, OLD + OLD / 2), (1, NEW)]);
    }
    assert!(met > 5, "{met}");
}

/// The superblock of the second volume is on its way to that copy's disk.
fn writes_size(w: &World, n: usize) -> bool {
    w.nodes[n].pending.iter().any(superblock_of_the_second)
}

fn superblock_of_the_second(a: &Action) -> bool {
    matches!(a, Action::MetaWrite { place, .. } if place.volume.0 == 1 && place.offset <= 4096)
}

/// The primary is demoted in the middle of a growth, when the other copy is about to take the new size: the copies meet again by
/// themselves and end with one size, whoever serves next (D7: nobody writes behind the end of another).
#[test]
fn a_growth_that_its_primary_gives_up_is_finished_by_those_who_heard_of_it() {
    let mut finished = 0;
    for seed in 0..60 {
        let mut w = copies(
            seed,
            &[Mode::Sync, Mode::Sync, Mode::Async],
            OnPeerLoss::Suspend,
        );
        ok(w.promote(0, false));
        let volume = if seed < 30 { seed % 2 } else { 1 } as u16;
        let admin = w.admin(0, grow(volume));
        if seed < 30 {
            let some = w.rng.below(60) as usize;
            w.steps(some);
        } else {
            // The other one has just begun to write it down.
            w.until("it writes it down", 4000, |w| writes_size(w, 1));
        }
        if seed % 3 == 0 {
            // Only the growth ends: one copy goes away for a moment.
            w.drop_link(0, 2, "a blip");
        } else {
            ok(w.command(0, Command::Demote));
            let next = if seed % 3 == 1 { 1 } else { 0 };
            w.until("it may be promoted", 40_000, |w| w.settled(&[0, 1, 2]));
            ok(w.promote(next, false));
        }
        w.until("the growth is answered", 40_000, |w| {
            w.nodes[0].admin.contains_key(&admin)
        });
        w.steps(2000);
        w.until("they agree", 40_000, |w| w.settled(&[0, 1, 2]));
        let sizes = [0, 1, 2].map(|n| size(&w, n, volume));
        assert!(
            sizes.iter().all(|s| *s == sizes[0]),
            "seed {seed}: {sizes:?}"
        );
        finished += u32::from(sizes[0] == NEW);
        let primary = if seed % 3 == 1 { 1 } else { 0 };
        written(&mut w, primary, volume, sizes[0] / BLOCK - 1, 4);
        let bad = |n: &Node| n.notices.iter().any(|n| n.kind == "bad-frame");
        assert!(!w.nodes.iter().any(bad), "seed {seed}");
    }
    assert!(finished > 10, "{finished}");
}

/// A copy that had made room is gone before the others take the size: nobody is told that every copy has it.
#[test]
fn a_growth_is_done_only_where_every_copy_has_the_size() {
    let (mut done, mut refused) = (0, 0);
    for seed in 0..150 {
        let mut w = copies(seed, &[Mode::Sync; 3], OnPeerLoss::Suspend);
        ok(w.promote(0, false));
        let admin = w.admin(0, grow(0));
        let steps = w.rng.below(60) as usize;
        if seed < 100 {
            w.steps(steps);
        } else {
            // The first is slow with its room, and the last has long made it.
            for _ in 0..steps + 100 {
                let room = |a: &Action| matches!(a, Action::MakeRoom { .. });
                let held = w.nodes[1].pending.iter().position(room);
                let held = held.map(|at| w.nodes[1].pending.remove(at));
                w.step();
                w.nodes[1].pending.extend(held);
            }
        }
        w.crash(2, false);
        w.until("the growth is answered", 40_000, |w| {
            w.nodes[0].admin.contains_key(&admin)
        });
        match &w.nodes[0].admin[&admin] {
            Ok(text) => {
                done += 1;
                assert_eq!(on_disk(&w, 2).data_size, NEW, "seed {seed}: {text}");
            }
            Err(_) => refused += 1,
        }
    }
    assert!(done > 10 && refused > 10, "{done} done, {refused} refused");
}
