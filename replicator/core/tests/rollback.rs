//! Rollbacks that are cut, refused, or impossible (D11, D12): what a target promises of its way back, it keeps; what it
//! can't keep it says.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::{Slot, VolumeIndex};
use holdfast_wire_format::metadata::*;
use world::resync::*;
use world::*;

/// A forced promotion is under way for so many steps; whether it was answered meanwhile.
fn rolling_back(w: &mut World, steps: usize) -> bool {
    let admin = w.admin(TARGET, Command::Promote { force: true });
    for _ in 0..steps {
        if w.nodes[TARGET].admin.contains_key(&admin) {
            return true;
        }
        w.step();
    }
    w.nodes[TARGET].admin.contains_key(&admin)
}

/// The copy that was forced while it rolled back, is back at its old point and takes writes there.
fn forced_to_old(w: &mut World, old: &Content, what: &str) {
    w.nodes[TARGET].notices.clear();
    force(w);
    is_old(w, old, what);
    known(w, what);
    // If it was killed between the record that it is back and the end of the log, the log stays, and counts for nothing.
    assert!(
        !noticed(w, TARGET, "rolled-back") || !has_undo_head(w, TARGET),
        "{what}: a second rollback would undo more"
    );
}

/// Whether the target is being promoted now: the rollback began.
fn promoting(w: &World) -> bool {
    let core = w.nodes[TARGET].core.as_ref().expect("it runs");
    core.status(w.now).role == Role::Promoting
}

/// Every step of a rollback, with the process killed or the power cut there: done again after the restart, it leads to
/// the same point. Some are cut a second time.
#[test]
fn d12_a_rollback_cut_at_any_step_is_done_again() {
    let mut cuts = 0;
    for power in [false, true] {
        for seed in 0..3 {
            for steps in (seed as usize..).step_by(3) {
                let (mut w, old) =
                    left_alone(seed, UNDO, 190, |_| ()).expect("it is in the middle");
                let what = format!("seed {seed}, power {power}, step {steps}");
                if rolling_back(&mut w, steps) {
                    break;
                }
                w.crash(TARGET, power);
                w.start(TARGET);
                if steps % 4 == 1 {
                    let again = w.rng.below(60) as usize;
                    rolling_back(&mut w, again);
                    w.crash(TARGET, !power);
                    w.start(TARGET);
                }
                if on_disk(&w, TARGET).flags.was_primary {
                    // Promoted, and killed before it said so: back at the old point already.
                    is_old(&w, &old, &what);
                    continue;
                }
                known(&w, &what);
                let refused = w.promote(TARGET, false).expect_err("it needs force");
                if state(&w, TARGET) == CopyState::Inconsistent {
                    assert!(undo(&w).intact, "{what}: {}", undo(&w).why_lost);
                    assert!(refused.to_string().contains("undo is intact"), "{refused}");
                }
                forced_to_old(&mut w, &old, &what);
                cuts += 1;
                if steps % 5 == 0 {
                    old_primary_returns(&mut w);
                }
            }
        }
    }
    assert!(cuts > 60, "{cuts} rollbacks were cut");
}

/// The same as `left_alone`, and what came by then is flushed: the source has cleared its bits for it (D8), so that after a
/// rollback only the target's own bits name those blocks.
fn left_alone_flushed(seed: u64, steps: usize) -> Option<World> {
    let (mut w, _) = behind(seed, UNDO, |_| ());
    resync_for(&mut w, steps);
    w.command(SOURCE, Command::PauseResync)
        .unwrap_or_else(|e| panic!("{e}"));
    w.until("the source lets go", 40_000, |w| {
        let core = w.nodes[SOURCE].core.as_ref().expect("it runs");
        let resync = core.status(w.now).peers[0].resync;
        resync.is_none_or(|r| r.done_bytes > 0 && w.wires.values().all(|wire| wire.is_empty()))
            && w.nodes.iter().all(|n| n.pending.is_empty())
    });
    cut(&mut w);
    (state(&w, TARGET) == CopyState::Inconsistent).then_some(w)
}

/// Blocks that the target put back and that only its own bits name.
fn named_by_the_target_alone(w: &World) -> usize {
    let marked = |n: usize, other: usize, volume: usize, block: usize| {
        let core = w.nodes[n].core.as_ref().expect("it runs");
        let (slot, volume) = (Slot(other as u8), VolumeIndex(volume as u16));
        core.marked(slot, volume, block as u64 * BLOCK, BLOCK)
    };
    let mut alone = 0;
    for volume in 0..2 {
        let [a, b] = [SOURCE, TARGET].map(|n| w.nodes[n].disk.data[volume].chunks(BLOCK as usize));
        for (block, (a, b)) in a.zip(b).enumerate() {
            alone += usize::from(a != b && !marked(SOURCE, TARGET, volume, block));
        }
    }
    alone
}

/// Nothing was hot at the target: its bits from the undo log are all that names what was put back (D7).
#[test]
fn d7_what_was_put_back_is_marked() {
    let mut alone = 0;
    for round in 0..8 {
        // Of these seeds the target was cut off and never killed.
        let Some(mut w) = left_alone_flushed(round * 3, 90 + round as usize * 20) else {
            continue;
        };
        force(&mut w);
        known(&w, &format!("round {round}"));
        alone += named_by_the_target_alone(&w);
        old_primary_returns(&mut w);
    }
    assert!(alone > 20, "{alone} blocks were named by the target alone");
}

/// The source comes back after half a rollback, or after a whole one: what was put back is marked durably (D7), also where
/// the source has let go of it, so it is filled again.
#[test]
fn d7_a_source_that_returns_after_half_a_rollback_fills_it_again() {
    let mut filled = 0;
    for power in [false, true] {
        for steps in (0..).step_by(2) {
            let seed = steps as u64 % 3;
            let mut w = left_alone_flushed(seed, 150).expect("it is in the middle");
            if rolling_back(&mut w, steps) {
                break;
            }
            w.crash(TARGET, power);
            w.start(TARGET);
            if on_disk(&w, TARGET).flags.was_primary {
                continue;
            }
            known(&w, &format!("power {power}, step {steps}"));
            w.cut.clear();
            w.command(SOURCE, Command::ResumeResync)
                .unwrap_or_else(|e| panic!("{e}"));
            load(&mut w, SOURCE, 5);
            in_sync_again(&mut w);
            filled += 1;
        }
    }
    assert!(filled > 20, "{filled} were filled");
}

/// The link is back in the middle of a rollback: nothing of the source lands before the rollback is over. Then both went
/// on from the old point, and the one that wrote nothing there yet gives way.
#[test]
fn d11_a_link_that_returns_during_a_rollback_waits_for_its_end() {
    let mut met = 0;
    for steps in (0..).step_by(3) {
        let seed = steps as u64 % 3;
        let (mut w, old) = left_alone(seed, UNDO, 190, |_| ()).expect("it is in the middle");
        let admin = w.admin(TARGET, Command::Promote { force: true });
        w.steps(steps);
        if w.nodes[TARGET].admin.contains_key(&admin) {
            break;
        }
        if !promoting(&w) {
            continue;
        }
        w.cut.clear();
        w.until("it is answered", 20_000, |w| {
            w.nodes[TARGET].admin.contains_key(&admin)
        });
        assert!(w.nodes[TARGET].admin[&admin].is_ok(), "step {steps}");
        is_old(&w, &old, &format!("step {steps}"));
        known(&w, &format!("step {steps}"));
        in_sync_again(&mut w);
        met += 1;
    }
    assert!(met > 10, "{met} met in a rollback");
}

/// A person asks for other things while a rollback is under way.
#[test]
fn d11_a_pending_rollback_refuses_what_would_cross_it() {
    let mut stopped = 0;
    for steps in 0..80 {
        let seed = steps as u64 % 3;
        let (mut w, old) = left_alone(seed, UNDO, 190, |_| ()).expect("it is in the middle");
        let admin = w.admin(TARGET, Command::Promote { force: true });
        w.steps(steps);
        if w.nodes[TARGET].admin.contains_key(&admin) {
            break;
        }
        if !promoting(&w) {
            continue;
        }
        for force in [false, true] {
            let second = w.admin(TARGET, Command::Promote { force });
            let refused = w.nodes[TARGET].admin[&second].as_ref().expect_err("twice");
            assert!(refused.to_string().contains("under way"), "{refused}");
        }
        for command in [Command::Demote, Command::Invalidate] {
            let second = w.admin(TARGET, command);
            assert!(w.nodes[TARGET].admin[&second].is_err(), "step {steps}");
        }
        // The replicator stops: in order, with the way back intact.
        w.command(TARGET, Command::Detach)
            .unwrap_or_else(|e| panic!("{e}"));
        let over = w.nodes[TARGET].admin[&admin].is_ok();
        w.crash(TARGET, true);
        w.start(TARGET);
        if over || on_disk(&w, TARGET).flags.was_primary {
            is_old(&w, &old, &format!("step {steps}"));
            continue;
        }
        forced_to_old(&mut w, &old, &format!("step {steps}"));
        stopped += 1;
    }
    assert!(stopped > 20, "{stopped} rollbacks were stopped");
}

/// An undo area that is too small for the resync: the resync goes on, the copy says so, and whatever it promised before
/// and after a crash at any step, it kept.
#[test]
fn d12_a_full_undo_never_promises_what_it_cannot_keep() {
    let (mut back, mut refused) = (0, 0);
    for how in [Cut::Link, Cut::Kill, Cut::Power] {
        for size in [48 << 10, 160 << 10, 400 << 10] {
            for steps in (20..420).step_by(17) {
                let seed = steps as u64 % 3;
                let what = format!("{how:?} after {steps} steps, undo of {size} bytes");
                let (mut w, old) = behind(seed, size, |_| ());
                resync_for(&mut w, steps);
                if !interrupt(&mut w, how) || state(&w, TARGET) != CopyState::Inconsistent {
                    continue;
                }
                let said = undo(&w);
                assert_eq!(said.intact, said.why_lost.is_empty(), "{what}");
                match w.promote(TARGET, true) {
                    Ok(_) => {
                        assert!(said.intact, "{what}: {}", said.why_lost);
                        is_old(&w, &old, &what);
                        known(&w, &what);
                        back += 1;
                    }
                    Err(refusal) => {
                        assert!(!said.intact, "{what}: {refusal}");
                        assert!(refusal.to_string().contains("undo"), "{what}: {refusal}");
                        assert!(on_disk(&w, TARGET).flags.undo_lost, "{what}");
                        assert!(noticed(&w, TARGET, "undo-lost"), "{what}");
                        if how == Cut::Link {
                            assert!(said.why_lost.contains("full"), "{}", said.why_lost);
                        }
                        refused += 1;
                        w.cut.clear();
                        in_sync_again(&mut w);
                    }
                }
            }
        }
    }
    assert!(back > 20 && refused > 20, "{back} back, {refused} refused");
}

/// The same, configured to stop the resync then: the primary goes on, the way back stays, and a person decides.
#[test]
fn d12_a_full_undo_stops_the_resync_where_it_is_told_to() {
    for seed in 0..12 {
        let (mut w, old) = behind(seed, 64 << 10, |w| w.tuning.undo_full_pauses = true);
        resync_for(&mut w, 30);
        w.until("it is full", 20_000, |w| noticed(w, TARGET, "undo-full"));
        load(&mut w, SOURCE, 10);
        w.until("both know", 20_000, |w| {
            w.sessions.is_empty() && w.nodes[TARGET].pending.is_empty()
        });
        assert_eq!(state(&w, TARGET), CopyState::Inconsistent);
        assert!(undo(&w).intact, "{}", undo(&w).why_lost);
        known(&w, "stopped");
        if seed.is_multiple_of(2) {
            forced_to_old(&mut w, &old, &format!("seed {seed}"));
            continue;
        }
        w.command(TARGET, Command::ResumeResync)
            .unwrap_or_else(|e| panic!("{e}"));
        w.until("it knows that there is no way back", 20_000, |w| {
            on_disk(w, TARGET).flags.undo_lost
        });
        assert!(undo(&w).why_lost.contains("a person"), "{:?}", undo(&w));
        in_sync_again(&mut w);
    }
}

/// How a disk damages what was durable.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Damage {
    /// A bit of the log's head, or of a record's header that is not the last.
    Head,
    Header,
    /// That header reads zero.
    HeaderGone,
    /// It holds another record of the same log.
    HeaderMisdirected,
    /// A bit of what was saved, or it holds what another record saved.
    Data,
    DataMisdirected,
}

/// Does it; false if this log has nothing to damage like that.
fn damage(w: &mut World, how: Damage) -> bool {
    let records = undo_records(w);
    if records.len() < 3 {
        return false;
    }
    let middle = records.len() / 2;
    let head = undo_head_at(w);
    let meta = &mut w.nodes[TARGET].disk.meta;
    let stored: Vec<u64> = records
        .iter()
        .filter(|(_, r)| r.entries.iter().any(|e| e.stored() >= 4096))
        .map(|(at, _)| at + 4096)
        .collect();
    let flip = |block: &mut Vec<u8>| block[100] ^= 4;
    match how {
        Damage::Head => flip(meta.get_mut(&(0, head)).expect("it is there")),
        Damage::Header => flip(meta.get_mut(&(0, records[middle].0)).expect("it is there")),
        Damage::HeaderGone => {
            meta.insert((0, records[middle].0), vec![0; 4096]);
        }
        Damage::HeaderMisdirected => {
            let other = meta[&(0, records[0].0)].clone();
            meta.insert((0, records[middle].0), other);
        }
        Damage::Data => match stored.first() {
            Some(at) => flip(meta.get_mut(&(0, *at)).expect("it is there")),
            None => return false,
        },
        Damage::DataMisdirected => {
            let [first, .., last] = stored.as_slice() else {
                return false;
            };
            let (a, b) = (meta[&(0, *first)].clone(), meta[&(0, *last)].clone());
            if a == b {
                return false;
            }
            meta.insert((0, *first), b);
        }
    }
    true
}

/// Damage to the log is found, nothing damaged is put back, no rollback is claimed, and the source still fills the copy.
#[test]
fn d12_a_damaged_undo_is_found_and_never_applied() {
    use Damage::*;
    for how in [
        Head,
        Header,
        HeaderGone,
        HeaderMisdirected,
        Data,
        DataMisdirected,
    ] {
        let mut tried = 0;
        for seed in 0..9 {
            for steps in [150, 230, 310] {
                let Some((mut w, old)) = left_alone(seed, UNDO, steps, |_| ()) else {
                    continue;
                };
                w.crash(TARGET, seed.is_multiple_of(2));
                if !damage(&mut w, how) {
                    continue;
                }
                tried += 1;
                let what = format!("{how:?}, seed {seed}, {steps} steps");
                w.start(TARGET);
                w.steps(20);
                let of_data = matches!(how, Data | DataMisdirected);
                assert_eq!(undo(&w).intact, of_data, "{what}: {}", undo(&w).why_lost);
                assert_eq!(noticed(&w, TARGET, "undo-lost"), !of_data, "{what}");
                let refused = w.promote(TARGET, true).expect_err(&what).to_string();
                assert!(refused.contains("undo"), "{what}: {refused}");
                assert!(
                    !of_data || !refused.contains("no data changed"),
                    "{what}: blocks before the damaged one were put back"
                );
                w.steps(50);
                assert_eq!(state(&w, TARGET), CopyState::Inconsistent, "{what}");
                assert!(!undo(&w).intact && on_disk(&w, TARGET).flags.undo_lost);
                assert!(undo(&w).why_lost.contains("damaged"), "{:?}", undo(&w));
                known(&w, &what);
                // Found once, it is not forgotten.
                w.crash(TARGET, true);
                w.start(TARGET);
                w.steps(20);
                w.promote(TARGET, true).expect_err(&what);
                assert!(noticed(&w, TARGET, "undo-lost") && !undo(&w).why_lost.is_empty());
                assert_ne!(differs(&w.nodes[TARGET].disk.data, &old), None, "{what}");
                w.cut.clear();
                in_sync_again(&mut w);
            }
        }
        assert!(tried >= 3, "{how:?} was tried {tried} times");
    }
}

/// A resync begins while the log of the one before is still there (Complete, and S does not have the copy yet): a forced
/// copy returns to where the second one began, not the first.
#[test]
fn d12_a_second_resync_has_its_own_way_back() {
    let (mut kept, mut back) = (0, 0);
    for how in [Cut::Link, Cut::Kill, Cut::Power] {
        for round in 0..24 {
            let (mut w, first) = behind(round % 3, UNDO, |_| ());
            w.cut.clear();
            w.until("it is complete", 40_000, |w| {
                on_disk(w, TARGET).state == CopyState::Complete
            });
            cut(&mut w);
            kept += usize::from(has_undo_head(&w, TARGET));
            if round % 2 == 0 {
                w.crash(TARGET, round % 4 == 0);
                w.start(TARGET);
            }
            w.nodes[TARGET].notices.clear();
            load(&mut w, SOURCE, 25);
            w.steps(100);
            let second = w.nodes[TARGET].disk.data.clone();
            assert_ne!(differs(&first, &second), None);
            resync_for(&mut w, 60 + round as usize * 11);
            if !interrupt(&mut w, how) || state(&w, TARGET) != CopyState::Inconsistent {
                continue;
            }
            let what = format!("{how:?}, round {round}");
            forced_to_old(&mut w, &second, &what);
            back += 1;
        }
    }
    assert!(kept > 10, "{kept} began with the log of the one before");
    assert!(back > 20, "{back} rolled back");
}

/// Without an activity log everything counts as different after a crash; the way back is the same.
#[test]
fn d12_without_an_activity_log() {
    let mut back = 0;
    for how in [Cut::Link, Cut::Kill, Cut::Power, Cut::Twice] {
        for steps in (20..420).step_by(25) {
            let seed = steps as u64 % 3;
            let (mut w, old) = behind(seed, UNDO, |w| w.tuning.activity_log = false);
            resync_for(&mut w, steps);
            if !interrupt(&mut w, how) || state(&w, TARGET) != CopyState::Inconsistent {
                continue;
            }
            let what = format!("{how:?} after {steps} steps");
            if !undo(&w).intact {
                // All of it is copied anew, and there may be no room for all of it.
                w.promote(TARGET, true).expect_err(&what);
                continue;
            }
            forced_to_old(&mut w, &old, &what);
            back += 1;
            if steps % 3 == 0 {
                old_primary_returns(&mut w);
            }
        }
    }
    assert!(back > 20, "{back} rolled back");
}

// --- a third copy ---

const THIRD: usize = 2;

/// Copies 0 and 2 are in sync, copy 1 is being filled by 0, which dies after so many steps.
fn source_dies(seed: u64, steps: usize) -> Option<(World, Content)> {
    source_of(seed, steps, false)
}

/// The same; if `both`, copy 2 is being filled, too.
fn source_of(seed: u64, steps: usize, both: bool) -> Option<(World, Content)> {
    let (mut w, old) = behind_of(&[Mode::Sync; 3], seed, UNDO, |_| ());
    if both {
        w.cut.push((SOURCE, THIRD));
        w.drop_link(SOURCE, THIRD, "cut");
        load(&mut w, SOURCE, 10);
        w.steps(100);
    }
    resync_for(&mut w, steps);
    w.crash(SOURCE, seed.is_multiple_of(2));
    w.cut.extend([(SOURCE, TARGET), (SOURCE, THIRD)]);
    (state(&w, TARGET) == CopyState::Inconsistent).then_some((w, old))
}

/// The third copy goes on and fills the target instead: from where the first source left off, with the same way back.
#[test]
fn d12_another_source_goes_on_and_the_way_back_stays() {
    let (mut back, mut filled) = (0, 0);
    for round in 0..30 {
        let Some((mut w, old)) = source_dies(round % 6, 120 + round as usize * 8) else {
            continue;
        };
        if w.promote(THIRD, true).is_err() {
            // What the two agreed on was under the primary that is gone: they meet again first.
            w.steps(200);
            w.promote(THIRD, true).unwrap_or_else(|e| panic!("{e}"));
        }
        let what = format!("round {round}");
        if round % 3 == 0 {
            load(&mut w, THIRD, 10);
            w.until("it is whole", 400_000, |w| {
                w.settled(&[TARGET, THIRD]) && w.up_to_date(TARGET)
            });
            let [a, b] = [TARGET, THIRD].map(|n| &w.nodes[n].disk.data);
            assert_eq!(differs(a, b), None, "{what}");
            filled += 1;
            continue;
        }
        for step in 0..round as usize * 6 {
            w.step();
            if step % 9 == 0 {
                one(&mut w, THIRD);
            }
        }
        w.cut.push((TARGET, THIRD));
        w.drop_link(TARGET, THIRD, "cut");
        w.steps(50);
        if state(&w, TARGET) != CopyState::Inconsistent {
            continue;
        }
        if !undo(&w).intact {
            w.promote(TARGET, true).expect_err(&what);
            continue;
        }
        force(&mut w);
        is_old(&w, &old, &what);
        known_between(&w, TARGET, THIRD, &what);
        back += 1;
    }
    assert!(back > 5 && filled > 3, "{back} back, {filled} filled");
}

/// A whole copy is connected: a mixture is not rolled back beside it, not even by force. Once it is gone, it is.
#[test]
fn d11_no_rollback_beside_a_whole_copy() {
    let mut refused = 0;
    for seed in 0..12 {
        let Some((mut w, old)) = source_dies(seed, 190) else {
            continue;
        };
        w.until("they are connected", 4000, |w| {
            w.sessions.contains_key(&(TARGET, THIRD))
        });
        w.steps(100);
        if state(&w, THIRD) == CopyState::Inconsistent {
            // A mixture itself: no better than this one.
            continue;
        }
        let text = w.promote(TARGET, true).expect_err("copy 2 is whole");
        assert!(text.to_string().contains("copy 2"), "{text}");
        assert_eq!(state(&w, TARGET), CopyState::Inconsistent);
        assert!(undo(&w).intact && !noticed(&w, TARGET, "rollback"));
        refused += 1;
        w.cut.push((TARGET, THIRD));
        w.drop_link(TARGET, THIRD, "cut");
        force(&mut w);
        is_old(&w, &old, &format!("seed {seed}"));
        known_between(&w, TARGET, THIRD, &format!("seed {seed}"));
    }
    assert!(refused > 3, "{refused} were refused");
}

/// A third copy, a mixture as well, is lost at any step of the rollback: nothing of the rollback lands on what is written
/// afterwards.
#[test]
fn d12_a_third_copy_lost_during_the_rollback() {
    let mut rolled = 0;
    for steps in 0..240 {
        let Some((mut w, old)) = source_of(steps as u64 % 6, 190, true) else {
            continue;
        };
        w.steps(60);
        let admin = w.admin(TARGET, Command::Promote { force: true });
        w.steps(steps % 120);
        if w.nodes[TARGET].admin.contains_key(&admin) {
            continue;
        }
        w.cut.push((TARGET, THIRD));
        w.drop_link(TARGET, THIRD, "cut");
        let what = format!("steps {steps}");
        w.until("it is answered", 20_000, |w| {
            w.nodes[TARGET].admin.contains_key(&admin)
        });
        if let Err(refusal) = &w.nodes[TARGET].admin[&admin] {
            panic!("{what}: {refusal}");
        }
        rolled += usize::from(noticed(&w, TARGET, "rolled-back"));
        is_old(&w, &old, &what);
        known_between(&w, TARGET, THIRD, &what);
        // Every write of the new primary stays.
        let block = vec![0xc3; 64 << 10];
        let requests: Vec<RequestId> = (0..SIZE >> 16)
            .map(|at| w.write(TARGET, 0, at << 16, block.clone(), false))
            .collect();
        w.until("all is written", 40_000, |w| {
            requests
                .iter()
                .all(|r| w.status_of(TARGET, *r) == Some(Status::Ok))
                && w.nodes[TARGET].pending.is_empty()
        });
        let written = &w.nodes[TARGET].disk.data[0];
        assert!(written.iter().all(|b| *b == 0xc3), "{what}");
    }
    assert!(rolled > 10, "{rolled} rolled back");
}
