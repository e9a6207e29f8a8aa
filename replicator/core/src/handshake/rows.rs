//! The rows of the table in `docs/handshake.md`, tried in order: the first that fits decides.

use super::facts::*;
use super::history::{self, Relation, current, holds};
use super::{CopyPlan, Decision, How, Outcome, Problem, Question, Row, StoreRecord, Surplus};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::CopyState;

/// Decides what two copies do when they meet.
///
/// `store` is the cluster store's record, read linearizably after both facts arrived; `None` where no agent runs.
/// The result does not depend on the order of the first two arguments.
pub fn decide(a: &Facts, b: &Facts, store: Option<&StoreRecord>) -> Decision {
    // One order for the pair, so that both ends run literally the same computation.
    let (a, b) = if a.slot <= b.slot { (a, b) } else { (b, a) };
    let decision = by_table(a, b, store);
    #[cfg(feature = "planted-defects")]
    let decision = super::swapped::swap(a, b, store, decision);
    decision
}

fn by_table(a: &Facts, b: &Facts, store: Option<&StoreRecord>) -> Decision {
    if let Some(problem) = incomparable(a, b, store) {
        return refuse(Row::R1, problem);
    }
    let m = Meeting {
        a,
        b,
        store,
        record: Record::of(a, b, store),
    };
    m.failed()
        .or_else(|| m.blank())
        .or_else(|| m.restored())
        .or_else(|| m.mid_resync())
        .unwrap_or_else(|| m.by_history())
}

pub(super) fn refuse(row: Row, problem: Problem) -> Decision {
    let why = problem.to_string();
    Decision {
        row,
        outcome: Outcome::Refuse { problem },
        why,
    }
}

pub(super) fn ask(row: Row, question: Question, why: String) -> Decision {
    Decision {
        row,
        outcome: Outcome::AskPerson { question },
        why,
    }
}

pub(super) fn wait(row: Row, why: String) -> Decision {
    Decision {
        row,
        outcome: Outcome::WaitForThird,
        why,
    }
}

/// "slot 1 (generation 00000000000000ab, position 7)".
pub(super) fn name(f: &Facts) -> String {
    let bound = if f.unclean_start && !f.is_primary {
        " or more"
    } else {
        ""
    };
    format!(
        "slot {} (generation {}, position {}{bound})",
        f.slot.0,
        current(f),
        reach(f)
    )
}

pub(super) struct Meeting<'a> {
    pub(super) a: &'a Facts,
    pub(super) b: &'a Facts,
    pub(super) store: Option<&'a StoreRecord>,
    pub(super) record: Record,
}

impl<'a> Meeting<'a> {
    /// Both ways round: the second is the copy a row speaks of as Y.
    pub(super) fn ways(&self) -> [(&'a Facts, &'a Facts); 2] {
        [(self.a, self.b), (self.b, self.a)]
    }

    pub(super) fn copy(
        &self,
        row: Row,
        x: &Facts,
        y: &Facts,
        how: How,
        surplus: Option<Surplus>,
        why: String,
    ) -> Decision {
        let filler = row == Row::R4 && x.state == CopyState::Outdated;
        if !may_be_source(x) && !filler {
            return wait(
                row,
                format!(
                    "{why}. But slot {} is {} and may not be a source: a third copy, or a person, decides",
                    x.slot.0,
                    crate::words::state(x.state)
                ),
            );
        }
        let plan = CopyPlan {
            source: x.slot,
            target: y.slot,
            how,
            leaves_s: self.record.in_sync.contains(y.slot),
            target_demotes: y.is_primary,
            target_outdated: matches!(row, Row::R5 | Row::R6 | Row::R14 | Row::R15 | Row::R16),
            target_becomes: match x.state {
                CopyState::UpToDate | CopyState::Complete => CopyState::Complete,
                less => less,
            },
            surplus,
        };
        Decision {
            row,
            outcome: Outcome::Copy(plan),
            why,
        }
    }

    /// Row 2.
    fn failed(&self) -> Option<Decision> {
        let [x, y] = match (
            self.a.state == CopyState::Failed,
            self.b.state == CopyState::Failed,
        ) {
            (false, false) => return None,
            (true, true) => return Some(refuse(Row::R2, Problem::BothFailed)),
            (true, false) => [self.b, self.a],
            (false, true) => [self.a, self.b],
        };
        let (failed, server) = (y.slot, x.slot);
        let fit = match x.state {
            CopyState::UpToDate => true,
            CopyState::Complete => self.record.in_s(x),
            _ => false,
        };
        if !fit || blank(x) || mid_resync(x) {
            return Some(refuse(
                Row::R2,
                Problem::NoServer {
                    failed: failed.0,
                    server: server.0,
                    state: x.state,
                },
            ));
        }
        // "UpToDate" is what the server believes. The failed copy may know of writes that were completed without it.
        let server_has_all = if y.generations.is_empty() {
            true
        } else {
            match history::relate(x, y) {
                Relation::Same => {
                    self.record.in_s(x) || (reach(y) <= reach(x) && y.about_peer.bits == 0)
                }
                Relation::SecondOlder { .. } => true,
                _ => false,
            }
        };
        if !server_has_all {
            let why = format!(
                "the disk of slot {} failed, and it knows of writes that {} never got: going on there would lose them",
                failed.0,
                name(x)
            );
            return Some(ask(
                Row::R2,
                Question::NewestOnFailedDisk { failed, server },
                why,
            ));
        }
        let why = format!(
            "the disk of slot {} failed; {} is {} and serves for both",
            failed.0,
            name(x),
            crate::words::state(x.state)
        );
        Some(Decision {
            row: Row::R2,
            outcome: Outcome::Diskless { failed, server },
            why,
        })
    }

    /// Rows 3 and 4.
    fn blank(&self) -> Option<Decision> {
        let resumes = |y: &Facts, x: &Facts| {
            // A full copy under way fills a blank disk: row 7 goes on with it.
            y.state == CopyState::Inconsistent
                && y.target_of != NO_GENERATION
                && x.about_peer.full_copy
                && x.about_peer.disk == y.disk
        };
        let (blank_a, blank_b) = (
            blank(self.a) && !resumes(self.a, self.b),
            blank(self.b) && !resumes(self.b, self.a),
        );
        // `zeroed` ends with the first promotion a copy hears of: one that is not blank any more because it met a third one still
        // reads zero everywhere, unless it is being filled.
        let created = current(self.a);
        let untouched = |f: &Facts| {
            f.flags.zeroed
                && current(f) == created
                && !mid_resync(f)
                && f.about_peer.bits == 0
                && !f.volumes.iter().any(|v| v.blank)
                && matches!(
                    f.state,
                    CopyState::Blank | CopyState::UpToDate | CopyState::Complete
                )
        };
        if created != NO_GENERATION && untouched(self.a) && untouched(self.b) {
            let why = format!(
                "both copies read zero everywhere since one `create` made generation {created}"
            );
            return Some(Decision {
                row: Row::R3,
                outcome: Outcome::Nothing,
                why,
            });
        }
        if blank_a && blank_b {
            let why = "both copies are blank and no `create` zeroed both: nothing says which one the service starts from".into();
            return Some(ask(
                Row::R3,
                Question::PickFirst {
                    slots: [self.a.slot, self.b.slot],
                },
                why,
            ));
        }
        let (x, y) = match (blank_a, blank_b) {
            (false, false) => return None,
            (true, _) => (self.b, self.a),
            (_, true) => (self.a, self.b),
        };
        if mid_resync(x) {
            let why = format!(
                "slot {} is blank, and slot {} is in the middle of a resync itself",
                y.slot.0, x.slot.0
            );
            return Some(wait(Row::R4, why));
        }
        let all = y.state == CopyState::Blank || y.volumes.iter().all(|v| v.blank);
        let how = if all { How::Full } else { How::FullByChecksum };
        let why = format!(
            "slot {} is blank or was replaced: it takes everything from {}",
            y.slot.0,
            name(x)
        );
        Some(self.copy(Row::R4, x, y, how, None, why))
    }

    /// Row 5.
    fn restored(&self) -> Option<Decision> {
        let signs = self
            .ways()
            .map(|(x, y)| went_back(y, x, self.store).filter(|_| !planted!("old-disk-not-seen")));
        let (x, y, sign) = match signs {
            [None, None] => return None,
            [Some(_), Some(_)] => {
                let question = Question::BothRestored {
                    slots: [self.a.slot, self.b.slot],
                };
                let why = format!(
                    "both disks went back in time: {} and {}",
                    name(self.a),
                    name(self.b)
                );
                return Some(ask(Row::R5, question, why));
            }
            [Some(sign), None] => (self.a, self.b, sign),
            [None, Some(sign)] => (self.b, self.a, sign),
        };
        let back = format!("the disk of slot {} went back in time: {sign}", y.slot.0);
        match history::relate(x, y) {
            Relation::Same | Relation::SecondOlder { .. } => {
                let why = format!("{back}. It takes what differs from {}", name(x));
                Some(self.copy(Row::R5, x, y, How::FullByChecksum, None, why))
            }
            Relation::FirstOlder { .. } => {
                let question = Question::RestoredAndNewer {
                    restored: y.slot,
                    other: x.slot,
                };
                let why = format!(
                    "{back}. Yet {} is behind even that, so copying from it would lose more",
                    name(x)
                );
                Some(ask(Row::R5, question, why))
            }
            // It went its own way after that, or has nothing in common: no list counts, but its writes may.
            Relation::Siblings { .. } | Relation::Unrelated { .. } => None,
        }
    }

    /// Rows 7 and 8.
    fn mid_resync(&self) -> Option<Decision> {
        let (x, y) = match (mid_resync(self.a), mid_resync(self.b)) {
            (false, false) => return None,
            (true, true) => {
                let why = format!(
                    "slots {} and {} are both in the middle of a resync: neither holds one point in time",
                    self.a.slot.0, self.b.slot.0
                );
                return Some(wait(Row::R8, why));
            }
            (true, false) => (self.b, self.a),
            (false, true) => (self.a, self.b),
        };
        let goal = y.target_of;
        if goal != NO_GENERATION && !holds(x, goal) {
            let why = format!(
                "slot {} is in the middle of a resync toward generation {goal}, which {} does not hold: only a copy that does can finish it",
                y.slot.0,
                name(x)
            );
            return Some(wait(Row::R7, why));
        }
        if goal == NO_GENERATION
            && matches!(
                history::relate(x, y),
                Relation::FirstOlder { .. } | Relation::Siblings { .. }
            )
        {
            let why = format!(
                "slot {} is in the middle of a resync, nobody recorded toward what, and {} does not hold its generation",
                y.slot.0,
                name(x)
            );
            return Some(wait(Row::R7, why));
        }
        if let Some(third) = self.third_may_have_more(x) {
            let why = format!(
                "{} stopped uncleanly, and {} may have more: it does not finish the resync of slot {} before they met",
                name(x),
                crate::words::copies(third),
                y.slot.0
            );
            return Some(wait(Row::R7, why));
        }
        let how = self.resume(x, y);
        let why = format!(
            "the resync of slot {} toward generation {goal} goes on from {}",
            y.slot.0,
            name(x)
        );
        Some(self.copy(Row::R7, x, y, how, None, why))
    }

    /// The members of S, neither of these two, that may have what `x` lost when it stopped: whom `x` fills then, not having
    /// stopped, would pass for one that lacks nothing (C1, C2). The primary of the generation is none of them: it fills whom it meets,
    /// whatever these two did (rows 11 and 12).
    pub(super) fn third_may_have_more(&self, x: &Facts) -> Option<SlotSet> {
        let maker = current_maker(x).unwrap_or(x.slot);
        let third = self
            .record
            .in_sync
            .without(self.a.slot)
            .without(self.b.slot)
            .without(maker);
        let lost = unclean(x) && !wrote_here(x) && self.record.in_s(x);
        let waits = lost && self.store.is_none() && !third.is_empty();
        (waits && !planted!("loser-fills-beside-a-third")).then_some(third)
    }

    /// How an interrupted resync goes on.
    fn resume(&self, x: &Facts, y: &Facts) -> How {
        let (p, goal) = (&x.about_peer, y.target_of);
        if goal == NO_GENERATION || !p.known || p.disk != y.disk {
            return How::FullByChecksum;
        }
        let before = before_resync(y);
        let base_fits = p.full_copy
            || (p.bitmap_base != NO_GENERATION
                && history::at_or_before(x, p.bitmap_base, before)
                && shared(x, y, p.bitmap_base));
        // A target of a full copy keeps no generation of its own to compare with; its source's bits say all.
        let from_x = y.target_source == x.slot.0;
        let agreed = from_x && shared(x, y, p.bitmap_base);
        if !base_fits && !agreed {
            return How::FullByChecksum;
        }
        if !from_x && p.full_copy {
            return How::FullByChecksum;
        }
        // Everything the target received came from X itself, or lies in the generation X is still in and before
        // X's end of it. Else what it received may lie past the point where X left: only its undo log names those.
        if from_x || (goal == current(x) && y.position <= reach(x) && !unclean(x)) {
            How::Bits
        } else if y.undo_intact && !y.flags.undo_lost {
            How::BitsAndUndo
        } else {
            How::FullByChecksum
        }
    }

    /// Rows 6 and 9 to 17.
    fn by_history(&self) -> Decision {
        match history::relate(self.a, self.b) {
            Relation::Same => self.same_generation(),
            Relation::FirstOlder { child } => self.older(self.b, self.a, &child),
            Relation::SecondOlder { child } => self.older(self.a, self.b, &child),
            Relation::Siblings {
                ancestor,
                first,
                second,
            } => self.siblings(ancestor, first, second),
            Relation::Unrelated { cut } => refuse(Row::R17, Problem::Unrelated { cut }),
        }
    }
}
