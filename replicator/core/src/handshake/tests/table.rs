//! One test or more for each row of the table in `docs/handshake.md`.

use super::build::*;
use crate::handshake::*;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

fn meet(a: &Facts, b: &Facts) -> Decision {
    decide(a, b, None)
}

fn refused(d: &Decision, row: Row) -> &Problem {
    assert_eq!(d.row, row, "{d:?}");
    match &d.outcome {
        Outcome::Refuse { problem } => problem,
        _ => panic!("not refused: {d:?}"),
    }
}

#[test]
fn row_1_shapes_that_differ_are_refused() {
    type Change = fn(&mut Facts, &Facts);
    let changes: [Change; 9] = [
        |b, _| b.volumes[0].size += 4096,
        |b, _| b.volumes[0].sector_size = 512,
        |b, _| b.volumes[0].volume = Uuid(8),
        |b, _| b.volumes[0].index = VolumeIndex(1),
        |b, _| b.volumes.clear(),
        |b, a| b.slot = a.slot,
        |b, a| b.disk = a.disk,
        |b, a| b.volumes[0].disk = a.volumes[0].disk,
        |b, _| b.generations[1].parent = GenerationId(77),
    ];
    for change in changes {
        let (a, mut b) = pair();
        change(&mut b, &a);
        refused(&meet(&a, &b), Row::R1);
    }
}

#[test]
fn row_1_a_volume_of_another_name_is_refused_and_both_names_are_told() {
    let (a, mut b) = pair();
    b.volumes[0].name = "logs".into();
    let text = refused(&meet(&a, &b), Row::R1).to_string();
    for part in ["\"data\" on slot 0", "\"logs\" on slot 1", "same order"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Who does not tell names is not refused for them.
    b.volumes[0].name.clear();
    assert_ne!(meet(&a, &b).row, Row::R1);
}

#[test]
fn row_1_contradicting_histories_are_a_defect() {
    let (a, mut b) = pair();
    b.generations[1].fork_position = 3;
    assert!(matches!(
        refused(&meet(&a, &b), Row::R1),
        Problem::Defect { .. }
    ));
}

#[test]
fn row_1_two_primaries_in_one_generation_are_a_defect() {
    let (mut a, mut b) = pair();
    (a.is_primary, b.is_primary) = (true, true);
    assert!(matches!(
        refused(&meet(&a, &b), Row::R1),
        Problem::Defect { .. }
    ));
}

#[test]
fn row_1_a_store_behind_the_copies_decides_nothing() {
    let (a, b) = pair();
    let mut store = record(0, 2, 0b11);
    store.epoch.number = 1;
    assert_eq!(
        refused(&decide(&a, &b, Some(&store)), Row::R1),
        &Problem::StoreBehind { known: 2, store: 1 }
    );
}

#[test]
fn row_2_an_up_to_date_copy_serves_for_a_failed_disk() {
    let (mut a, b) = pair();
    a.state = CopyState::Failed;
    a.is_primary = true;
    let d = meet(&a, &b);
    assert_eq!(
        (d.row, d.outcome),
        (
            Row::R2,
            Outcome::Diskless {
                failed: Slot(0),
                server: Slot(1)
            }
        )
    );
}

#[test]
fn row_2_complete_serves_only_in_s() {
    let (mut a, mut b) = pair();
    a.state = CopyState::Failed;
    b.state = CopyState::Complete;
    assert!(matches!(meet(&a, &b).outcome, Outcome::Diskless { .. }));
    (a.in_sync, b.in_sync) = (SlotSet(0b01), SlotSet(0b01));
    assert!(matches!(
        refused(&meet(&a, &b), Row::R2),
        Problem::NoServer { .. }
    ));
}

#[test]
fn row_2_a_server_that_is_behind_the_failed_copy_is_not_used_unasked() {
    let (mut a, b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    writes(&mut a, 2);
    a.state = CopyState::Failed;
    let question = Question::NewestOnFailedDisk {
        failed: Slot(0),
        server: Slot(1),
    };
    assert_eq!(meet(&a, &b).outcome, Outcome::AskPerson { question });
}

#[test]
fn row_2_both_failed() {
    let (mut a, mut b) = pair();
    (a.state, b.state) = (CopyState::Failed, CopyState::Failed);
    assert_eq!(refused(&meet(&a, &b), Row::R2), &Problem::BothFailed);
}

fn blank(f: &mut Facts) {
    f.state = CopyState::Blank;
    f.generations.truncate(1);
    f.about_peer.known = false;
    f.position = 0;
    f.issued = 0;
}

#[test]
fn row_3_both_blank() {
    let (mut a, mut b) = pair();
    blank(&mut a);
    blank(&mut b);
    let question = Question::PickFirst {
        slots: [Slot(0), Slot(1)],
    };
    assert_eq!(meet(&a, &b).outcome, Outcome::AskPerson { question });
    (a.flags.zeroed, b.flags.zeroed) = (true, true);
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R3, Outcome::Nothing)
    );
    // Zeroed, but by two different `create`s.
    b.generations[0].id = GenerationId(99);
    assert_eq!(meet(&a, &b).outcome, Outcome::AskPerson { question });
}

#[test]
fn row_4_a_blank_copy_takes_everything() {
    let (a, mut b) = pair();
    blank(&mut b);
    let p = plan(&meet(&a, &b), Row::R4);
    assert_eq!(
        (p.source, p.target, p.how, p.target_becomes),
        (Slot(0), Slot(1), How::Full, CopyState::Complete)
    );
}

#[test]
fn row_4_what_comes_from_an_outdated_copy_is_outdated() {
    let (mut a, mut b) = pair();
    blank(&mut b);
    a.state = CopyState::Outdated;
    assert_eq!(
        plan(&meet(&a, &b), Row::R4).target_becomes,
        CopyState::Outdated
    );
    becomes_target(&mut a, 2, 2);
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R4, Outcome::WaitForThird)
    );
}

#[test]
fn row_4_one_replaced_volume_of_two_compares_the_other() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        let mut second = f.volumes[0].clone();
        second.index = VolumeIndex(1);
        second.volume = Uuid(8);
        second.disk = Uuid(second.disk.0 + 10);
        f.volumes.push(second);
    }
    b.volumes[1].blank = true;
    assert_eq!(plan(&meet(&a, &b), Row::R4).how, How::FullByChecksum);
}

#[test]
fn row_5_an_older_attach_counter() {
    let (a, mut b) = pair();
    b.attach_counter = 4;
    let p = plan(&meet(&a, &b), Row::R5);
    assert_eq!(
        (p.source, p.target, p.how),
        (Slot(0), Slot(1), How::FullByChecksum)
    );
    assert!(p.target_outdated && p.leaves_s);
}

#[test]
fn row_5_a_position_or_generation_the_copy_itself_recorded() {
    let (a, mut b) = pair();
    (b.position, b.issued) = (7, 7);
    plan(&meet(&a, &b), Row::R5);
    let (a, mut b) = pair();
    b.generations.truncate(1);
    b.about_peer.bitmap_base = GenerationId(1);
    plan(&meet(&a, &b), Row::R5);
    // The same generation after a rollback on purpose is no sign.
    b.flags.rolled_back = true;
    b.state = CopyState::Consistent;
    assert_eq!(meet(&a, &b).row, Row::R14);
}

#[test]
fn row_5_a_claimed_primary_that_its_secondary_is_ahead_of_demotes() {
    let (mut a, b) = pair();
    a.is_primary = true;
    (a.position, a.issued) = (9, 9);
    let p = plan(&meet(&a, &b), Row::R5);
    assert_eq!(
        (p.source, p.target, p.target_demotes),
        (Slot(1), Slot(0), true)
    );
}

#[test]
fn row_5_the_store_trusts_disks_not_names() {
    let (a, b) = pair();
    let mut store = record(0, 2, 0b11);
    store.copies = vec![StoreCopy {
        slot: Slot(1),
        disk: Uuid(555),
        attach_counter: 5,
    }];
    plan(&decide(&a, &b, Some(&store)), Row::R5);
    store.copies[0] = StoreCopy {
        slot: Slot(1),
        disk: b.disk,
        attach_counter: 6,
    };
    plan(&decide(&a, &b, Some(&store)), Row::R5);
}

#[test]
fn row_5_a_restored_copy_that_is_still_the_newer_one_is_a_question() {
    let (mut a, b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    a.attach_counter = 4;
    let question = Question::RestoredAndNewer {
        restored: Slot(0),
        other: Slot(1),
    };
    assert_eq!(meet(&a, &b).outcome, Outcome::AskPerson { question });
    let mut b = b;
    b.attach_counter = 4;
    assert!(matches!(
        meet(&a, &b).outcome,
        Outcome::AskPerson {
            question: Question::BothRestored { .. }
        }
    ));
}

/// Both forced, both wrote.
fn split() -> (Facts, Facts) {
    let (mut a, mut b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    goes_on(&mut b, 4, 10, GenerationCause::Force);
    writes(&mut a, 2);
    writes(&mut b, 3);
    // Each goes on alone.
    a.in_sync = SlotSet::only(Slot(0));
    b.in_sync = SlotSet::only(Slot(1));
    (a, b)
}

#[test]
fn row_6_one_epoch_number_with_two_owners() {
    let (mut a, mut b) = split();
    a.epoch = Epoch {
        number: 4,
        owner: 0,
    };
    let d = meet(&a, &b);
    assert!(matches!(d.outcome, Outcome::SplitBrain { .. }));
    assert_eq!(d.row, Row::R6);
    b.about_peer.bits = 0;
    assert!(
        matches!(meet(&a, &b).outcome, Outcome::SplitBrain { .. }),
        "the other may have undone what this one wrote"
    );
    (b.position, b.issued) = (0, 0);
    assert_eq!(plan(&meet(&a, &b), Row::R6).target, Slot(1));
}

#[test]
fn row_7_goes_on_over_bits_from_its_source() {
    let (mut a, mut b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    writes(&mut a, 2);
    becomes_target(&mut b, 0, 3);
    let p = plan(&meet(&a, &b), Row::R7);
    assert_eq!((p.source, p.target, p.how), (Slot(0), Slot(1), How::Bits));
    // Also after the source went on to yet another generation.
    goes_on(&mut a, 5, 2, GenerationCause::Restart);
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::Bits);
    a.about_peer.known = false;
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::FullByChecksum);
}

#[test]
fn row_7_goes_on_with_a_full_copy() {
    let (mut a, mut b) = pair();
    blank(&mut b);
    becomes_target(&mut b, 0, 2);
    b.volumes[0].blank = true;
    a.about_peer.full_copy = true;
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::Bits);
    // It was blank and has no history of its own yet.
    b.generations.clear();
    b.before_resync = (GenerationId(0), 0);
    b.volumes[0].blank = false;
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::Bits);
}

#[test]
fn row_7_from_another_source_adds_the_undo_list() {
    let (mut a, mut b) = pair();
    // Slot 2 was the source in generation 3; slot 0 was promoted from it at position 5.
    for f in [&mut a, &mut b] {
        f.about_peer.bitmap_base = GenerationId(2);
    }
    a.generations
        .push(generation(3, 2, 10, GenerationCause::Promotion, 2));
    goes_on(&mut a, 4, 5, GenerationCause::Promotion);
    becomes_target(&mut b, 2, 3);
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::BitsAndUndo);
    b.flags.undo_lost = true;
    assert_eq!(plan(&meet(&a, &b), Row::R7).how, How::FullByChecksum);
}

#[test]
fn row_7_toward_a_generation_the_other_lacks_waits() {
    let (a, mut b) = pair();
    becomes_target(&mut b, 2, 9);
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R7, Outcome::WaitForThird)
    );
}

#[test]
fn row_8_two_mixtures() {
    let (mut a, mut b) = pair();
    becomes_target(&mut a, 2, 9);
    becomes_target(&mut b, 2, 9);
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R8, Outcome::WaitForThird)
    );
}

#[test]
fn row_9_the_same() {
    let (mut a, mut b) = pair();
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R9, Outcome::Nothing)
    );
    a.is_primary = true;
    b.state = CopyState::Complete;
    assert_eq!(meet(&a, &b).row, Row::R9);
    // A clean restart of one side.
    b.incarnation = Incarnation(999);
    b.attach_counter += 1;
    assert_eq!(meet(&a, &b).row, Row::R9);
    // Equal, but never introduced: nothing says that the bitmaps count.
    a.about_peer.known = false;
    assert_eq!(plan(&meet(&a, &b), Row::R13).how, How::FullByChecksum);
}

#[test]
fn row_10_an_unclean_secondary_takes_its_unstable_set() {
    let (mut a, mut b) = pair();
    a.is_primary = true;
    crash(&mut b);
    let p = plan(&meet(&a, &b), Row::R10);
    assert_eq!(
        (p.source, p.target, p.how, p.leaves_s),
        (Slot(0), Slot(1), How::Bits, true)
    );
    // It became a target, took what it lacked and is whole again.
    b.unclean_start = false;
    (b.position, b.issued) = (10, 10);
    assert_eq!(meet(&a, &b).row, Row::R9);
}

#[test]
fn row_10_half_a_handshake_is_none() {
    let (mut a, mut b) = pair();
    crash(&mut b);
    a.about_peer.incarnation = b.incarnation;
    b.about_peer.incarnation = a.incarnation;
    assert_eq!(meet(&a, &b).row, Row::R10);
}

#[test]
fn row_10_between_secondaries_the_one_in_s_is_the_source() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        f.flags.was_primary = false;
        f.in_sync = SlotSet(0b110);
        f.generations[1].maker = 2;
        f.epoch.owner = 2;
    }
    crash(&mut b);
    assert_eq!(plan(&meet(&a, &b), Row::R10).source, Slot(1));
}

#[test]
fn row_7_and_10_who_stopped_uncleanly_fills_nobody_while_a_third_member_may_have_more() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        f.flags.was_primary = false;
        f.in_sync = SlotSet(0b110);
    }
    // Copy 0 made the generation and is no member any more; copy 1 lost power; copy 2 is in S and away.
    crash(&mut b);
    assert_eq!(meet(&a, &b).row, Row::R10);
    assert_eq!(meet(&a, &b).outcome, Outcome::WaitForThird);
    let mut filled = a.clone();
    filled.state = CopyState::Inconsistent;
    filled.target_of = a.generations.last().expect("one").id;
    assert_eq!(meet(&filled, &b).row, Row::R7);
    assert_eq!(meet(&filled, &b).outcome, Outcome::WaitForThird);
    // Alone in S it has what there is.
    for f in [&mut filled, &mut b] {
        f.in_sync = SlotSet(0b010);
    }
    assert_eq!(plan(&meet(&filled, &b), Row::R7).source, Slot(1));
}

#[test]
fn row_11_a_copy_that_does_not_count_itself_in_s_is_no_member() {
    let (mut a, mut b) = pair();
    crash(&mut a);
    a.in_sync_version += 1;
    // The primary counts it; it was filled by somebody else since, or never heard.
    b.in_sync = SlotSet(0b01);
    b.state = CopyState::Complete;
    assert_eq!(plan(&meet(&a, &b), Row::R11).source, Slot(0));
    b.in_sync = SlotSet(0b11);
    assert_eq!(plan(&meet(&a, &b), Row::R11).source, Slot(1));
}

#[test]
fn row_5_a_copy_that_was_filled_up_to_a_lower_position_is_no_old_disk() {
    let (mut a, mut b) = pair();
    a.about_peer.known_durable_generation = b.generations.last().expect("one").id;
    a.about_peer.known_durable_position = b.position + 1;
    assert_eq!(meet(&a, &b).row, Row::R5);
    b.flags.rolled_back = true;
    assert_ne!(meet(&a, &b).row, Row::R5);
}

#[test]
fn row_11_an_unclean_primary() {
    let (mut a, b) = pair();
    crash(&mut a);
    a.about_peer.bits = 4;
    let p = plan(&meet(&a, &b), Row::R11);
    assert_eq!((p.source, p.target, p.how), (Slot(1), Slot(0), How::Bits));
    let out = |f: &Facts| Facts {
        in_sync: SlotSet(0b01),
        ..f.clone()
    };
    assert_eq!(plan(&meet(&out(&a), &out(&b)), Row::R11).source, Slot(0));
    let by_mode = |f: &Facts| Facts {
        mode: Mode::Async,
        ..f.clone()
    };
    assert_eq!(
        plan(&meet(&by_mode(&a), &by_mode(&b)), Row::R11).source,
        Slot(0)
    );
    a.about_peer.known = false;
    assert_eq!(plan(&meet(&a, &b), Row::R11).how, How::FullByChecksum);
}

#[test]
fn row_12_both_unclean() {
    let (mut a, mut b) = pair();
    crash(&mut a);
    crash(&mut b);
    assert_eq!(plan(&meet(&a, &b), Row::R12).source, Slot(0));
    assert_eq!(
        plan(&decide(&a, &b, Some(&record(1, 2, 0b11))), Row::R12).source,
        Slot(1)
    );
    for f in [&mut a, &mut b] {
        f.flags.was_primary = false;
        f.generations[1].maker = 2;
        f.epoch.owner = 2;
    }
    assert_eq!(
        (meet(&a, &b).row, meet(&a, &b).outcome),
        (Row::R12, Outcome::WaitForThird)
    );
}

#[test]
fn row_13_bits_without_a_crash() {
    let (mut a, mut b) = pair();
    a.is_primary = true;
    writes(&mut a, 2);
    let p = plan(&meet(&a, &b), Row::R13);
    assert_eq!((p.source, p.target, p.how), (Slot(0), Slot(1), How::Bits));
    a.is_primary = false;
    assert_eq!(plan(&meet(&a, &b), Row::R13).source, Slot(0));
    // Both marked something: who wrote in this generation is the source.
    b.about_peer.bits = 1;
    assert_eq!(plan(&meet(&a, &b), Row::R13).source, Slot(0));
    // Positions differ and no bit says where: compare everything.
    (a.about_peer.bits, b.about_peer.bits) = (0, 0);
    assert_eq!(plan(&meet(&a, &b), Row::R13).how, How::FullByChecksum);
}

#[test]
fn row_13_marks_on_both_sides_of_two_that_followed_a_third() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        f.flags.was_primary = false;
        f.generations[1].maker = 2;
        f.epoch.owner = 2;
        f.about_peer.bits = 1;
    }
    let p = plan(&meet(&a, &b), Row::R13);
    assert_eq!((p.source, p.target, p.how), (Slot(0), Slot(1), How::Bits));
    // Of whoever followed less far nothing is taken.
    b.position += 1;
    b.issued += 1;
    let p = plan(&meet(&a, &b), Row::R13);
    assert_eq!((p.source, p.target), (Slot(1), Slot(0)));
}

#[test]
fn row_14_a_copy_that_was_away() {
    let (mut a, b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    writes(&mut a, 2);
    let p = plan(&meet(&a, &b), Row::R14);
    assert_eq!(
        (p.source, p.target, p.how, p.surplus),
        (Slot(0), Slot(1), How::Bits, None)
    );
    assert!(p.target_outdated);
    for base in [0, 3] {
        a.about_peer.bitmap_base = GenerationId(base);
        assert_eq!(plan(&meet(&a, &b), Row::R14).how, How::FullByChecksum);
    }
}

#[test]
fn row_14_a_replaced_primary_gives_up_what_was_never_acknowledged() {
    let (mut a, mut b) = pair();
    writes(&mut a, 2);
    a.is_primary = true;
    goes_on(&mut b, 3, 10, GenerationCause::Promotion);
    let p = plan(&meet(&a, &b), Row::R14);
    assert_eq!(
        (p.source, p.target, p.how, p.target_demotes),
        (Slot(1), Slot(0), How::Bits, true)
    );
    let s = p.surplus.expect("positions past the fork");
    assert_eq!(
        (s.holder, s.after, s.until, s.acknowledged),
        (Slot(0), 10, 12, false)
    );
    a.about_peer.known = false;
    assert_eq!(
        plan(&meet(&a, &b), Row::R14).how,
        How::FullByChecksum,
        "it may hold writes it has no list of"
    );
}

#[test]
fn row_14_a_generation_that_was_never_committed_yields_to_the_owner() {
    let (mut a, b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    a.is_primary = false;
    let p = plan(&decide(&a, &b, Some(&record(1, 2, 0b11))), Row::R14);
    assert_eq!((p.source, p.target), (Slot(1), Slot(0)));
    // Once it was committed, it counts.
    assert_eq!(
        plan(&decide(&a, &b, Some(&record(0, 3, 0b01))), Row::R14).source,
        Slot(0)
    );
}

#[test]
fn row_15_acknowledged_surplus_is_listed_or_asked_about() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        f.mode = Mode::Async;
        f.in_sync = SlotSet(0b01);
    }
    writes(&mut a, 4);
    a.is_primary = true;
    goes_on(&mut b, 3, 10, GenerationCause::Force);
    let p = plan(&meet(&a, &b), Row::R15);
    let s = p.surplus.expect("acknowledged writes");
    assert_eq!(
        (p.source, p.target, s.acknowledged, s.blocks),
        (Slot(1), Slot(0), true, Some((4, 4 * 4096)))
    );
    b.generations[2].cause = GenerationCause::DiskLost;
    assert!(matches!(
        meet(&a, &b).outcome,
        Outcome::AskPerson {
            question: Question::GiveUpSurplus { .. }
        }
    ));
    assert_eq!(meet(&a, &b).row, Row::R15);
}

#[test]
fn row_16_split_brain_with_the_facts() {
    let (a, b) = split();
    let d = meet(&a, &b);
    assert_eq!(d.row, Row::R16);
    let Outcome::SplitBrain { ancestor, sides } = d.outcome else {
        panic!("{d:?}")
    };
    assert_eq!(ancestor, GenerationId(2));
    assert_eq!(
        sides.map(|s| (s.slot, s.blocks, s.forced())),
        [
            (Slot(0), Some((2, 8192)), false),
            (Slot(1), Some((3, 12288)), true)
        ]
    );
}

#[test]
fn row_16_a_side_that_wrote_nothing_is_the_target() {
    let (a, mut b) = split();
    (b.position, b.issued) = (0, 0);
    assert_eq!(plan(&meet(&a, &b), Row::R16).target, Slot(1));
    // What it held of the common generation beyond the other's fork counts as written.
    b.generations[2].fork_position = 12;
    assert!(matches!(meet(&a, &b).outcome, Outcome::SplitBrain { .. }));
    // A zero after an unclean stop says nothing.
    b.generations[2].fork_position = 10;
    crash(&mut b);
    (b.position, b.issued) = (0, 0);
    assert!(matches!(meet(&a, &b).outcome, Outcome::SplitBrain { .. }));
}

#[test]
fn row_16_a_branch_the_store_never_committed_is_the_target() {
    let (a, mut b) = split();
    b.generations[2].cause = GenerationCause::Promotion;
    assert_eq!(
        plan(&decide(&a, &b, Some(&record(1, 4, 0b10))), Row::R16).target,
        Slot(0)
    );
    b.generations[2].cause = GenerationCause::Force;
    assert!(matches!(
        decide(&a, &b, Some(&record(1, 4, 0b10))).outcome,
        Outcome::SplitBrain { .. }
    ));
}

#[test]
fn row_16_a_restored_side_keeps_its_voice_but_not_its_list() {
    let (mut a, b) = split();
    a.attach_counter = 4;
    let d = meet(&a, &b);
    let Outcome::SplitBrain { sides, .. } = d.outcome else {
        panic!("{d:?}")
    };
    assert_eq!(sides[0].blocks, None);
}

#[test]
fn row_17_nothing_in_common() {
    let (a, mut b) = pair();
    b.generations = vec![generation(70, 0, 0, GenerationCause::Created, 1)];
    b.about_peer.known = false;
    assert_eq!(
        refused(&meet(&a, &b), Row::R17),
        &Problem::Unrelated { cut: false }
    );
    b.generations_cut = true;
    assert_eq!(
        refused(&meet(&a, &b), Row::R17),
        &Problem::Unrelated { cut: true }
    );
}

#[test]
fn a_history_cut_just_above_the_common_generation_is_still_related() {
    let (mut a, mut b) = pair();
    goes_on(&mut a, 3, 10, GenerationCause::PeerLost);
    a.generations.drain(..2);
    a.generations_cut = true;
    b.generations.drain(..1);
    assert_eq!(plan(&meet(&a, &b), Row::R14).source, Slot(0));
}

#[test]
fn every_decision_is_explained_with_the_nodes_names() {
    let (mut a, b) = pair();
    writes(&mut a, 2);
    a.is_primary = true;
    let mut b2 = b.clone();
    goes_on(&mut b2, 3, 10, GenerationCause::Promotion);
    let text = explain(&meet(&a, &b2), &|slot| {
        format!("node-{}", ["anna", "bert"][usize::from(slot.0)])
    });
    for part in [
        "Row 14",
        "node-anna takes",
        "from node-bert",
        "stops being primary",
        "never acknowledged",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// Two that were told to take what a third copy has, and meet while it is away: nobody is at fault, and they are not to refuse
/// each other until a person comes.
#[test]
fn row_13_two_outdated_followers_wait_for_the_third() {
    let (mut a, mut b) = pair();
    for f in [&mut a, &mut b] {
        f.state = CopyState::Outdated;
        f.flags.was_primary = false;
        f.epoch.owner = 2;
        f.about_peer.bits = 1;
        if let Some(last) = f.generations.last_mut() {
            (last.maker, last.epoch.owner) = (2, 2);
        }
    }
    let d = meet(&a, &b);
    assert_eq!((d.row, d.outcome), (Row::R13, Outcome::WaitForThird));
}
