//! Who may be promoted without an agent, by record, and by force.

use super::build::*;
use crate::handshake::*;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

fn kind(me: &Facts, peer: Option<&Facts>, force: bool) -> Option<PromotionKind> {
    may_promote(me, peer, None, force).ok().map(|p| p.kind)
}

#[test]
fn with_the_peer_connected_a_secondary_must_stand_opposite_a_secondary() {
    let (mut a, b) = pair();
    assert_eq!(kind(&b, Some(&a), false), Some(PromotionKind::Planned));
    a.is_primary = true;
    assert_eq!(kind(&b, Some(&a), true), None);
    assert_eq!(kind(&a, Some(&b), false), None, "primary already");
    a.is_primary = false;
    writes(&mut a, 2);
    assert_eq!(
        kind(&b, Some(&a), true),
        None,
        "the connected peer is ahead"
    );
    assert_eq!(kind(&a, Some(&b), false), Some(PromotionKind::Planned));
}

#[test]
fn under_suspend_only_the_copy_that_was_not_primary_goes_on_alone() {
    let (a, mut b) = pair();
    assert_eq!(kind(&b, None, false), Some(PromotionKind::AfterSuspended));
    assert_eq!(
        kind(&a, None, false),
        None,
        "the other may have been promoted since"
    );
    assert_eq!(kind(&a, None, true), Some(PromotionKind::Forced));
    b.state = CopyState::Complete;
    assert_eq!(kind(&b, None, false), Some(PromotionKind::AfterSuspended));
    b.in_sync = SlotSet(0b01);
    assert_eq!(kind(&b, None, false), None);
}

#[test]
fn two_followers_of_a_lost_primary_do_not_both_have_the_right() {
    let (_, mut b) = pair();
    b.in_sync = SlotSet(0b111);
    assert_eq!(kind(&b, None, false), None, "slot 2 could do the same");
    assert_eq!(kind(&b, None, true), Some(PromotionKind::Forced));
}

#[test]
fn under_continue_promotion_opposite_an_unreachable_primary_is_a_force() {
    let (_, mut b) = pair();
    b.on_peer_loss = OnPeerLoss::Continue;
    assert_eq!(kind(&b, None, false), None);
    let p = may_promote(&b, None, None, true).expect("forced");
    assert!(p.is_forced() && p.may_lose.contains("position 10"));
}

#[test]
fn a_solo_owner_goes_on() {
    let (mut a, _) = pair();
    a.flags.solo = true;
    assert_eq!(
        kind(&a, None, false),
        None,
        "solo needs S to name this copy alone"
    );
    a.in_sync = SlotSet(0b01);
    assert_eq!(kind(&a, None, false), Some(PromotionKind::Solo));
}

#[test]
fn an_unclean_member_in_semi_sync_mode_needs_force() {
    let (_, mut b) = pair();
    crash(&mut b);
    assert_eq!(kind(&b, None, false), Some(PromotionKind::AfterSuspended));
    b.mode = Mode::SemiSync;
    assert_eq!(kind(&b, None, false), None);
}

#[test]
fn force_does_not_make_a_mixture_or_a_stale_copy_whole() {
    let (_, mut b) = pair();
    b.state = CopyState::Outdated;
    assert_eq!(kind(&b, None, true), None);
    b.state = CopyState::Failed;
    assert_eq!(kind(&b, None, true), None);
    becomes_target(&mut b, 0, 2);
    assert_eq!(kind(&b, None, false), None);
    assert_eq!(
        kind(&b, None, true),
        Some(PromotionKind::ForcedAfterRollback)
    );
    b.flags.undo_lost = true;
    assert_eq!(kind(&b, None, true), None);
}

#[test]
fn a_blank_copy_becomes_the_first_only_if_a_person_says_so() {
    let (_, mut b) = pair();
    b.state = CopyState::Blank;
    assert_eq!(kind(&b, None, false), None);
    assert_eq!(kind(&b, None, true), Some(PromotionKind::First));
}

#[test]
fn the_store_promotes_members_of_s_in_the_records_generation() {
    let (a, b) = pair();
    let promoted =
        |me: &Facts, store: &StoreRecord| may_promote(me, None, Some(store), false).map(|p| p.kind);
    assert_eq!(
        promoted(&b, &record(0, 2, 0b11)),
        Ok(PromotionKind::ByRecord)
    );
    assert!(promoted(&b, &record(0, 2, 0b01)).is_err());
    assert!(
        promoted(&b, &record(0, 7, 0b11)).is_err(),
        "the record's generation is not in its history"
    );
    let mut behind = record(0, 2, 0b11);
    behind.epoch.number = 1;
    assert!(
        may_promote(&a, None, Some(&behind), true).is_err(),
        "the store went back in time"
    );
}

#[test]
fn refusals_say_what_happened_what_is_kept_and_what_to_do() {
    let (a, _) = pair();
    let refusal = may_promote(&a, None, None, false).expect_err("unreachable peer");
    assert!(refusal.what.contains("unreachable"));
    assert!(!refusal.kept.is_empty());
    assert!(refusal.next.contains("--force"));
}
