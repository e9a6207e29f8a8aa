//! Whether a copy may be promoted, and by what right.

use super::facts::{Record, blank, mid_resync};
use super::history::{current, holds};
use super::{Outcome, StoreRecord, decide};
use crate::api::Refusal;
use crate::words;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Mode, OnPeerLoss};

/// By what right a copy is promoted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PromotionKind {
    /// The peer is connected, secondary, and agrees.
    Planned,
    /// This copy removed the others from S durably and may complete alone.
    Solo,
    /// The other copy was primary under `suspend`: it completes nothing alone.
    AfterSuspended,
    /// The cluster store's record names this copy as a member of S in its own generation.
    ByRecord,
    /// A blank service starts from this copy: a person picked it.
    First,
    /// A person insisted. Makes a generation with cause `Force`.
    Forced,
    /// The same, after the undo log was rolled back.
    ForcedAfterRollback,
}

/// A promotion that is allowed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promotion {
    pub kind: PromotionKind,
    /// What may be lost by it, for a person; empty when nothing that was acknowledged and flushed can be.
    pub may_lose: String,
}

impl Promotion {
    /// The new generation's cause is `Force`.
    pub fn is_forced(&self) -> bool {
        matches!(
            self.kind,
            PromotionKind::Forced | PromotionKind::ForcedAfterRollback | PromotionKind::First
        )
    }
}

/// Says whether this copy may be promoted.
///
/// `peer` holds the facts of the other copy if it is connected now, `None` if it is unreachable; `store` the cluster
/// store's record, `None` where no agent runs. `force`: a person insisted, and confirmed that an unreachable
/// other copy is off or cut off.
///
/// # Errors
/// What forbids it, what was kept, and what to do next. An `Inconsistent` copy without its undo, an `Outdated` or
/// `Failed` one, and one whose connected peer is ahead are refused even by force.
pub fn may_promote(
    me: &Facts,
    peer: Option<&Facts>,
    store: Option<&StoreRecord>,
    force: bool,
) -> Result<Promotion, Refusal> {
    if me.is_primary {
        return Err(refusal(
            "this copy is primary already",
            "Nothing was changed",
            "No promotion is needed",
        ));
    }
    if let Some(peer) = peer {
        connected(me, peer, store)?;
    }
    if let Some(store) = store
        && me.epoch.number > store.epoch.number
    {
        return Err(refusal(
            format!(
                "this copy knows epoch {}, the store only {}: the store went back in time",
                me.epoch.number, store.epoch.number
            ),
            "No copy was promoted and no data changed",
            "Find out why the store lost commits before anything is promoted",
        ));
    }
    match me.state {
        CopyState::Failed => Err(refusal(
            "the disk of this copy failed",
            "The other copies are untouched",
            "Promote another copy, or replace this disk and let it resync",
        )),
        _ if blank(me) => {
            if !force {
                return Err(refusal(
                    "this copy is blank: nothing was ever written here, or its disk was replaced",
                    "Nothing was changed",
                    "If the service is to start from this copy, promote it with --force; otherwise connect it to a copy that has data",
                ));
            }
            Ok(Promotion {
                kind: PromotionKind::First,
                may_lose: "everything any other copy of this service holds: this one starts from what its disk reads now".into(),
            })
        }
        _ if mid_resync(me) && !planted!("inconsistent-is-promoted") => inconsistent(me, force),
        CopyState::Outdated => Err(refusal(
            format!(
                "this copy is known to be behind (generation {}, position {})",
                current(me),
                me.position
            ),
            "Its data is one past point in time and stays as it is",
            "Connect it to a newer copy; if none exists any more, recreate the service from this copy's data",
        )),
        _ => settled(me, peer, store, force),
    }
}

/// Rules for a peer that answers.
fn connected(me: &Facts, peer: &Facts, store: Option<&StoreRecord>) -> Result<(), Refusal> {
    if peer.is_primary {
        return Err(refusal(
            format!("slot {} is primary and connected", peer.slot.0),
            "It goes on serving",
            "Demote it first, then promote this copy",
        ));
    }
    let decision = decide(me, peer, store);
    match decision.outcome {
        Outcome::Copy(plan) if plan.target == me.slot => Err(refusal(
            format!(
                "this copy lacks what slot {} holds: {}",
                peer.slot.0, decision.why
            ),
            "Nothing was changed",
            format!(
                "Wait for the resync to finish, or promote slot {}",
                peer.slot.0
            ),
        )),
        Outcome::SplitBrain { .. } => Err(refusal(
            decision.why,
            "Both sides keep their data and their bitmaps",
            "Resolve the split brain first: pick the side whose writes are given up",
        )),
        Outcome::Refuse { problem } => Err(refusal(
            format!("the copies do not fit together: {problem}"),
            "Nothing was changed on either",
            "Settle that first",
        )),
        Outcome::Diskless { failed, .. } if failed == me.slot => Err(refusal(
            "the disk of this copy failed",
            "The other copy holds the data",
            format!("Promote slot {}", peer.slot.0),
        )),
        _ => Ok(()),
    }
}

fn inconsistent(me: &Facts, force: bool) -> Result<Promotion, Refusal> {
    let (generation, position) = me.before_resync;
    let undo = me.undo_intact && !me.flags.undo_lost && generation != GenerationId(0);
    if !undo {
        return Err(refusal(
            "this copy is in the middle of a resync and its undo does not reach back to the start: it holds a mixture of points in time",
            "Nothing was changed",
            "Bring back the copy it was filled from, or promote another one; --force does not help here",
        ));
    }
    let loss = format!(
        "every write after position {position} of generation {generation}, the point this copy was at when its resync began"
    );
    if force {
        return Ok(Promotion {
            kind: PromotionKind::ForcedAfterRollback,
            may_lose: loss,
        });
    }
    Err(refusal(
        "this copy is in the middle of a resync",
        format!(
            "Its undo is intact: it can return to position {position} of generation {generation}"
        ),
        format!("Wait for the resync, or promote with --force, which loses {loss}"),
    ))
}

/// UpToDate, Complete or Consistent: one point in time.
fn settled(
    me: &Facts,
    peer: Option<&Facts>,
    store: Option<&StoreRecord>,
    force: bool,
) -> Result<Promotion, Refusal> {
    let whole =
        |in_s: bool| me.state == CopyState::UpToDate || (me.state == CopyState::Complete && in_s);
    if let Some(store) = store {
        let member = store.in_sync.contains(me.slot);
        if member && whole(member) && holds(me, store.generation) {
            return Ok(Promotion {
                kind: PromotionKind::ByRecord,
                may_lose: unflushed(me),
            });
        }
        return by_force(
            force,
            format!(
                "the store's record (generation {}, in sync {}) does not name this copy (slot {}, {}, generation {}) as holding every acknowledged write",
                store.generation,
                words::copies(store.in_sync),
                me.slot.0,
                words::state(me.state),
                current(me)
            ),
            me,
        );
    }
    let in_s = peer
        .map_or(me.in_sync, |p| Record::of(me, p, None).in_sync)
        .contains(me.slot);
    if peer.is_some() {
        if whole(in_s) {
            return Ok(Promotion {
                kind: PromotionKind::Planned,
                may_lose: String::new(),
            });
        }
        return by_force(
            force,
            format!(
                "this copy is {} and not known to hold every acknowledged write",
                words::state(me.state)
            ),
            me,
        );
    }
    if (!whole(in_s) || !in_s) && !planted!("outside-s-is-promoted") {
        return by_force(
            force,
            format!(
                "this copy is {}, {} the in-sync set, and the other copy is unreachable",
                words::state(me.state),
                if in_s { "in" } else { "not in" }
            ),
            me,
        );
    }
    if me.flags.solo && me.in_sync == SlotSet::only(me.slot) {
        return Ok(Promotion {
            kind: PromotionKind::Solo,
            may_lose: String::new(),
        });
    }
    let owner_is_other = me.epoch.number > 0 && me.epoch.owner != me.slot.0;
    // A third member of S has the same right as this one, and one of the two would not know of the other (C1).
    let no_third = me
        .in_sync
        .iter()
        .all(|slot| slot == me.slot || slot.0 == me.epoch.owner);
    // In semi-sync mode a member that stopped uncleanly may have had completed writes in memory alone.
    let kept_all = planted!("memory-forgotten") || !(me.unclean_start && me.mode != Mode::Sync);
    if (me.on_peer_loss == OnPeerLoss::Suspend || planted!("suspend-ignored"))
        && owner_is_other
        && (no_third || planted!("both-go-on"))
        && kept_all
    {
        return Ok(Promotion {
            kind: PromotionKind::AfterSuspended,
            may_lose: unflushed(me),
        });
    }
    let what = if me.on_peer_loss == OnPeerLoss::Continue {
        "the other copy is unreachable, and under `continue` it may have gone on alone"
    } else if owner_is_other && !no_third {
        "a third copy is in sync too, and it may have been promoted instead"
    } else if !kept_all {
        "this copy stopped uncleanly in semi-sync mode, and what it held in memory alone is gone"
    } else {
        "the other copy is unreachable, and it may have been promoted after this one was primary"
    };
    by_force(force, what.into(), me)
}

fn by_force(force: bool, what: String, me: &Facts) -> Result<Promotion, Refusal> {
    let loss = format!(
        "every write the other copies hold beyond position {} of generation {}",
        me.position,
        current(me)
    );
    if force {
        return Ok(Promotion {
            kind: PromotionKind::Forced,
            may_lose: loss,
        });
    }
    Err(refusal(
        what,
        "Both copies keep what they have",
        format!(
            "Connect the other copy, or make sure that it is off and promote with --force, which may lose {loss}"
        ),
    ))
}

fn unflushed(me: &Facts) -> String {
    if me.unclean_start {
        "writes that were never flushed, if this machine lost power".into()
    } else {
        String::new()
    }
}

fn refusal(what: impl Into<String>, kept: impl Into<String>, next: impl Into<String>) -> Refusal {
    Refusal {
        kind: Default::default(),
        what: what.into(),
        kept: kept.into(),
        next: next.into(),
    }
}
