//! What the losing side wrote alone is saved before it is overwritten (rows 15 and 16 of `docs/handshake.md`).

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::metadata::*;
use world::resync::{SIZE, noticed, on_disk, one, state};
use world::*;

/// The side that loses, and the one that went on.
const LOSES: usize = 0;
const WINS: usize = 1;

/// Writes that complete while the link is cut.
fn alone(w: &mut World, n: usize, count: usize) {
    let requests: Vec<RequestId> = (0..count)
        .map(|_| {
            let request = one(w, n);
            w.steps(4);
            request
        })
        .collect();
    w.until("every request completes", 100_000, |w| {
        requests
            .iter()
            .all(|r| w.status_of(n, *r) == Some(Status::Ok))
    });
}

/// An asynchronous copy was forced while the primary, which was ahead of it, was away: row 15. What the primary holds.
fn forced_behind(seed: u64, prepare: impl FnOnce(&mut World)) -> (World, Vec<Vec<u8>>) {
    let modes = [Mode::Sync, Mode::Async];
    let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &[SIZE, SIZE / 2], true);
    prepare(&mut w);
    w.start(LOSES);
    w.start(WINS);
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    w.promote(LOSES, false).unwrap_or_else(|e| panic!("{e}"));
    alone(&mut w, LOSES, 20);
    w.until("it follows", 100_000, |w| w.settled(&[0, 1]));
    w.steps(100);
    w.cut.push((LOSES, WINS));
    w.drop_link(LOSES, WINS, "cut");
    alone(&mut w, LOSES, 12);
    w.crash(LOSES, false);
    w.steps(50);
    w.promote(WINS, true).unwrap_or_else(|e| panic!("{e}"));
    alone(&mut w, WINS, 6);
    let held = w.nodes[LOSES].disk.data.clone();
    w.start(LOSES);
    w.cut.clear();
    (w, held)
}

/// Every byte in which the copies differed is in what was kept, as the losing side had it.
fn holds_all(w: &World, kept: &Saved, mine: &[Vec<u8>], theirs: &[Vec<u8>], what: &str) {
    for (volume, (mine, theirs)) in mine.iter().zip(theirs).enumerate() {
        let mut saved = vec![false; mine.len()];
        for (v, offset, bytes) in kept.1.iter().filter(|p| p.0 as usize == volume) {
            let range = *offset as usize..*offset as usize + bytes.len();
            assert_eq!(
                mine[range.clone()],
                bytes[..],
                "{what}: volume {v} at {offset}"
            );
            saved[range].fill(true);
        }
        for at in 0..mine.len() {
            assert!(
                mine[at] == theirs[at] || saved[at],
                "{what}: byte {at} of volume {volume} is lost"
            );
        }
    }
    let bytes: u64 = kept.1.iter().map(|p| p.2.len() as u64).sum();
    assert_eq!(bytes, kept.0.bytes, "{what}");
    assert_eq!(
        w.nodes[LOSES].bufs.len(),
        0,
        "{what}: buffers are given back"
    );
}

fn kept(w: &World) -> Vec<&Saved> {
    let saved = w.nodes[LOSES].surplus.iter();
    saved.filter(|s| s.2 == Some(true)).collect()
}

fn filled(w: &mut World) {
    w.until("both are one", 400_000, |w| {
        w.settled(&[0, 1])
            && matches!(
                on_disk(w, LOSES).state,
                CopyState::UpToDate | CopyState::Complete
            )
    });
    w.until("and quiet", 100_000, |w| {
        w.nodes.iter().all(|n| n.pending.is_empty())
    });
    assert!(w.nodes[LOSES].disk.data == w.nodes[WINS].disk.data);
}

#[test]
fn row_15_saves_what_may_have_been_acknowledged() {
    for seed in 0..20 {
        let (mut w, held) = forced_behind(seed, |_| ());
        let theirs = w.nodes[WINS].disk.data.clone();
        filled(&mut w);
        let what = format!("seed {seed}");
        assert!(noticed(&w, LOSES, "surplus-saved"), "{what}");
        let kept = kept(&w);
        assert_eq!(kept.len(), 1, "{what}");
        holds_all(&w, kept[0], &held, &theirs, &what);
    }
}

/// Killed, without power or without a link at any step of it: saved anew, and never overwritten before it was.
#[test]
fn row_15_saves_before_it_overwrites() {
    let mut cuts = 0;
    for steps in 0..120 {
        let (mut w, held) = forced_behind(steps % 4, |_| ());
        let theirs = w.nodes[WINS].disk.data.clone();
        w.steps(steps as usize);
        if w.nodes[LOSES].surplus.is_empty() {
            continue;
        }
        if kept(&w).is_empty() {
            assert!(
                w.nodes[LOSES].disk.data == held,
                "step {steps}: overwritten"
            );
            assert_eq!(on_disk(&w, LOSES).target_of.0, 0, "step {steps}");
            cuts += 1;
        }
        match steps % 3 {
            0 => w.drop_link(LOSES, WINS, "cut"),
            how => {
                w.crash(LOSES, how == 1);
                w.start(LOSES);
            }
        }
        filled(&mut w);
        let kept = kept(&w);
        assert!(!kept.is_empty(), "step {steps}: nothing was kept");
        holds_all(&w, kept[0], &held, &theirs, &format!("step {steps}"));
    }
    assert!(cuts > 10, "{cuts} saves were cut");
}

/// What can't be saved is said, and how much it is; the copies become one all the same.
#[test]
fn row_15_says_what_it_does_not_save() {
    for (seed, bytes, full, reason) in [
        (1, 4096, false, "at most 4096 bytes"),
        (2, 0, false, "turned off"),
        (3, 1 << 30, true, "no space is left"),
    ] {
        let (mut w, _) = forced_behind(seed, |w| {
            w.tuning.surplus_bytes = bytes;
            w.nodes[LOSES].surplus_full = full;
        });
        filled(&mut w);
        assert!(kept(&w).is_empty() && !noticed(&w, LOSES, "surplus-saved"));
        let notices = &w.nodes[LOSES].notices;
        let said = notices.iter().find(|n| n.kind == "surplus-not-saved");
        let said = said.expect("it is said");
        assert_eq!(said.level, Level::Error);
        assert!(
            said.text.contains(reason) && said.text.contains("blocks"),
            "{}",
            said.text
        );
    }
}

/// Both went on alone; a person picks.
fn split(seed: u64, prepare: impl FnOnce(&mut World)) -> World {
    let modes = [Mode::Sync, Mode::Sync];
    let mut w = World::new(seed, &modes, OnPeerLoss::Continue, &[SIZE, SIZE / 2], true);
    prepare(&mut w);
    w.start(LOSES);
    w.start(WINS);
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    w.promote(LOSES, false).unwrap_or_else(|e| panic!("{e}"));
    alone(&mut w, LOSES, 20);
    w.cut.push((LOSES, WINS));
    w.drop_link(LOSES, WINS, "cut");
    alone(&mut w, LOSES, 12);
    w.promote(WINS, true).unwrap_or_else(|e| panic!("{e}"));
    alone(&mut w, WINS, 6);
    w.crash(LOSES, false);
    w.start(LOSES);
    w.cut.clear();
    w.until("split brain", 20_000, |w| {
        noticed(w, LOSES, "split-brain") && w.nodes.iter().all(|n| n.wants.is_empty())
    });
    w
}

#[test]
fn row_16_saves_what_a_person_gives_up() {
    for seed in 0..10 {
        let mut w = split(seed, |_| ());
        let held = w.nodes[LOSES].disk.data.clone();
        let theirs = w.nodes[WINS].disk.data.clone();
        let discard = Command::ResolveSplitBrain { discard_mine: true };
        let said = w.command(LOSES, discard).unwrap_or_else(|e| panic!("{e}"));
        assert!(said.contains("was saved to /saved/"), "{said}");
        holds_all(&w, kept(&w)[0], &held, &theirs, &format!("seed {seed}"));
        assert_eq!(state(&w, LOSES), CopyState::Blank);
        w.command(WINS, Command::Connect { peer: None })
            .unwrap_or_else(|e| panic!("{e}"));
        filled(&mut w);
    }
}

/// A person is asked again where it can't be saved: nothing is discarded meanwhile.
#[test]
fn row_16_refuses_to_discard_what_it_cannot_save() {
    for (seed, bytes, full) in [(1, 4096, false), (2, 1 << 30, true)] {
        let mut w = split(seed, |w| {
            w.tuning.surplus_bytes = bytes;
            w.nodes[LOSES].surplus_full = full;
        });
        let held = w.nodes[LOSES].disk.data.clone();
        let before = state(&w, LOSES);
        let discard = Command::ResolveSplitBrain { discard_mine: true };
        let refused = w.command(LOSES, discard).expect_err("it is not saved");
        assert!(
            refused.to_string().contains("Nothing was discarded"),
            "{refused}"
        );
        assert!(refused.to_string().contains("surplus_bytes"), "{refused}");
        w.steps(200);
        assert_eq!(state(&w, LOSES), before);
        assert!(w.nodes[LOSES].disk.data == held);
    }
    // Told not to save, it does not.
    let mut w = split(3, |w| w.tuning.surplus_bytes = 0);
    let discard = Command::ResolveSplitBrain { discard_mine: true };
    w.command(LOSES, discard).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(state(&w, LOSES), CopyState::Blank);
}
