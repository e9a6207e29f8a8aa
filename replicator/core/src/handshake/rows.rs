//! The rows of the table in `docs/handshake.md`, tried in order: the first that fits decides.

use super::facts::*;
use super::history::{self, Relation, current, holds};
use super::{CopyPlan, Decision, How, Outcome, Problem, Question, Row, Side, StoreRecord, Surplus};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Generation, GenerationCause, Mode};

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

fn refuse(row: Row, problem: Problem) -> Decision {
    let why = problem.to_string();
    Decision {
        row,
        outcome: Outcome::Refuse { problem },
        why,
    }
}

fn ask(row: Row, question: Question, why: String) -> Decision {
    Decision {
        row,
        outcome: Outcome::AskPerson { question },
        why,
    }
}

fn wait(row: Row, why: String) -> Decision {
    Decision {
        row,
        outcome: Outcome::WaitForThird,
        why,
    }
}

/// "slot 1 (generation 00000000000000ab, position 7)".
fn name(f: &Facts) -> String {
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

struct Meeting<'a> {
    a: &'a Facts,
    b: &'a Facts,
    store: Option<&'a StoreRecord>,
    record: Record,
}

impl<'a> Meeting<'a> {
    /// Both ways round: the second is the copy a row speaks of as Y.
    fn ways(&self) -> [(&'a Facts, &'a Facts); 2] {
        [(self.a, self.b), (self.b, self.a)]
    }

    fn copy(
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
    fn third_may_have_more(&self, x: &Facts) -> Option<SlotSet> {
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

    /// Rows 9 to 13.
    fn same_generation(&self) -> Decision {
        let (a, b) = (self.a, self.b);
        if a.is_primary && b.is_primary {
            let detail = format!(
                "slots {} and {} both serve as primary in generation {}",
                a.slot.0,
                b.slot.0,
                current(a)
            );
            return refuse(Row::R1, Problem::Defect { detail });
        }
        match (unclean(a), unclean(b)) {
            (true, true) => self.both_unclean(),
            (true, false) => self.one_unclean(b, a),
            (false, true) => self.one_unclean(a, b),
            (false, false) => self.none_unclean(),
        }
    }

    fn lists_usable(&self) -> bool {
        list_usable(self.a, self.b, current(self.a)) && list_usable(self.b, self.a, current(self.b))
    }

    /// Rows 10 and 11: Y stopped uncleanly, X lived on.
    fn one_unclean(&self, x: &Facts, y: &Facts) -> Decision {
        let how = by_lists(self.lists_usable());
        // A write completes when every member of S has it, so a member that lived on has all that completed. A
        // member that was dropped but is still UpToDate in this generation counts too: completing without it
        // would have begun a new one.
        let member =
            self.record.in_s(x) || (x.state == CopyState::UpToDate && x.in_sync.contains(x.slot));
        let waits = x.mode != Mode::Async && y.mode != Mode::Async;
        let x_has_all = may_be_source(x)
            && (x.is_primary || (member && waits) || planted!("non-member-has-all"));
        if wrote_here(y) {
            return if x_has_all {
                let why = format!(
                    "the primary in {} stopped uncleanly; {} was in sync and has every write that completed. What only slot {} holds was never acknowledged",
                    name(y),
                    name(x),
                    y.slot.0
                );
                self.copy(Row::R11, x, y, how, None, why)
            } else {
                let why = format!(
                    "the primary in {} stopped uncleanly, but {} was not in sync and may lack writes that completed",
                    name(y),
                    name(x)
                );
                self.copy(Row::R11, y, x, how, None, why)
            };
        }
        let y_is_more =
            may_be_source(y) && (!may_be_source(x) || (!wrote_here(x) && self.record.in_s(y)));
        if !x_has_all
            && y_is_more
            && let Some(third) = self.third_may_have_more(y)
        {
            let why = format!(
                "{} stopped uncleanly, and {} may have more: it does not fill slot {} before they met",
                name(y),
                crate::words::copies(third),
                x.slot.0
            );
            return wait(Row::R10, why);
        }
        if !x_has_all && y_is_more {
            let why = format!(
                "{} stopped uncleanly, but it is fit to be a source and {} is not, or not in sync: what it kept is still more",
                name(y),
                name(x)
            );
            return self.copy(Row::R10, y, x, how, None, why);
        }
        let why = format!(
            "{} stopped uncleanly and may have lost what its disk held in its cache; {} lived on",
            name(y),
            name(x)
        );
        self.copy(Row::R10, x, y, how, None, why)
    }

    /// Row 12.
    fn both_unclean(&self) -> Decision {
        let how = by_lists(self.lists_usable());
        let both = format!(
            "{} and {} both stopped uncleanly",
            name(self.a),
            name(self.b)
        );
        for (x, y) in self.ways() {
            if may_be_source(x) && !may_be_source(y) {
                let why = format!("{both}; slot {} alone is fit to be a source", x.slot.0);
                return self.copy(Row::R12, x, y, how, None, why);
            }
        }
        for (x, y) in self.ways() {
            if self.store.is_some() && self.record.owner == Some(x.slot) && self.record.in_s(x) {
                let why = format!("{both}; slot {} owns the epoch", x.slot.0);
                return self.copy(Row::R12, x, y, how, None, why);
            }
        }
        // A generation is made by the one copy that writes in it, so at most one of the two qualifies.
        for (x, y) in self.ways() {
            if wrote_here(x) {
                let why = format!(
                    "{both}; slot {} was the primary of this generation",
                    x.slot.0
                );
                return self.copy(Row::R12, x, y, how, None, why);
            }
        }
        for (x, y) in self.ways() {
            if self.record.in_s(x) && !self.record.in_s(y) {
                let why = format!("{both}, neither as primary; slot {} is in sync", x.slot.0);
                return self.copy(Row::R12, x, y, how, None, why);
            }
        }
        for rule in [current_maker(self.a), self.record.owner] {
            for (x, y) in self.ways() {
                if rule == Some(x.slot) {
                    let why = format!(
                        "{both} before anything was written in this generation; slot {} made it",
                        x.slot.0
                    );
                    return self.copy(Row::R12, x, y, how, None, why);
                }
            }
        }
        wait(
            Row::R12,
            format!("{both}, and the primary of this generation was a third copy"),
        )
    }

    /// Rows 9 and 13.
    fn none_unclean(&self) -> Decision {
        let (a, b) = (self.a, self.b);
        let lists = self.lists_usable();
        let no_bits = a.about_peer.bits == 0 && b.about_peer.bits == 0;
        let good = |f: &Facts| matches!(f.state, CopyState::UpToDate | CopyState::Complete);
        let states_fit = (good(a) && good(b))
            || (a.state == CopyState::Consistent && b.state == CopyState::Consistent);
        let equal = lists && no_bits && reach(a) == reach(b);
        if (equal || planted!("equal-generation-is-equal")) && states_fit {
            let why = format!(
                "both copies are at position {} of generation {} and nothing is marked",
                reach(a),
                current(a)
            );
            return Decision {
                row: Row::R9,
                outcome: Outcome::Nothing,
                why,
            };
        }
        // A shortfall that no bit accounts for: a list is missing somewhere, so every block is compared.
        let accounted = reach(a) == reach(b) || !no_bits;
        let how = by_lists(lists && accounted);
        let source = self.source_of_13();
        let Some((x, y, reason)) = source else {
            let detail = format!(
                "{} and {} both hold blocks the other lacks, and neither made that generation",
                name(a),
                name(b)
            );
            return refuse(Row::R13, Problem::Defect { detail });
        };
        if reach(y) > reach(x) && x.mode != Mode::Async {
            // A primary, or a clean former one, holds everything of its generation.
            let why = format!(
                "{} should hold everything of its generation, but {} holds more: its disk went back in time",
                name(x),
                name(y)
            );
            return self.copy(Row::R5, y, x, How::FullByChecksum, None, why);
        }
        let why = format!(
            "{} and {} differ in at most {} blocks ({} bytes); {reason}",
            name(x),
            name(y),
            a.about_peer.bits + b.about_peer.bits,
            a.about_peer.bytes + b.about_peer.bytes
        );
        self.copy(Row::R13, x, y, how, None, why)
    }

    fn source_of_13(&self) -> Option<(&'a Facts, &'a Facts, String)> {
        let pick = |test: &dyn Fn(&Facts, &Facts) -> bool, reason: &str| {
            self.ways()
                .into_iter()
                .find(|(x, y)| test(x, y) && !test(y, x))
                .map(|(x, y)| (x, y, format!("slot {} {reason}", x.slot.0)))
        };
        pick(&|x, _| x.is_primary, "is primary")
            .or_else(|| pick(&|x, _| may_be_source(x), "is the one fit to be a source"))
            .or_else(|| {
                pick(
                    &|x, _| {
                        self.store.is_some()
                            && self.record.owner == Some(x.slot)
                            && self.record.in_s(x)
                    },
                    "owns the epoch",
                )
            })
            // Only a member of S is known to hold every acknowledged write.
            .or_else(|| pick(&|x, _| self.record.in_s(x), "is in sync"))
            .or_else(|| {
                pick(
                    &|x, y| x.about_peer.bits > 0 && reach(x) >= reach(y),
                    "alone has blocks marked",
                )
            })
            .or_else(|| pick(&|x, _| wrote_here(x), "was the primary of this generation"))
            .or_else(|| pick(&|x, y| reach(x) > reach(y), "is further"))
            .or_else(|| {
                pick(
                    &|x, _| self.record.owner == Some(x.slot),
                    "owns the newest epoch",
                )
            })
            .or_else(|| {
                pick(
                    &|x, _| current_maker(x) == Some(x.slot),
                    "made this generation",
                )
            })
            // Both followed a third copy equally far, and each marked what the other may have missed of it.
            .or_else(|| {
                let third = current_maker(self.a)
                    .is_some_and(|maker| maker != self.a.slot && maker != self.b.slot);
                third.then(|| {
                    let maker = current_maker(self.a).map_or(0, |slot| slot.0);
                    let why = format!(
                        "slot {maker} made this generation, and both followed it equally far: slot {} has the lower number",
                        self.a.slot.0
                    );
                    (self.a, self.b, why)
                })
            })
    }

    /// Rows 14 and 15: Y's generation is an ancestor of X's, which left it with `child`.
    fn older(&self, x: &Facts, y: &Facts, child: &Generation) -> Decision {
        if let Some(decision) = self.uncommitted_newer(x, y) {
            return decision;
        }
        let surplus = surplus_beyond(y, x, child);
        let bits_of_x = list_usable(x, y, current(y));
        let list_of_y = list_usable(y, x, current(y));
        let how = by_lists(bits_of_x && (surplus.is_none() || list_of_y));
        let behind = format!(
            "{} is behind {}, which left that generation at position {} ({} by slot {})",
            name(y),
            name(x),
            child.fork_position,
            crate::words::cause(child.cause),
            child.maker
        );
        match surplus {
            Some(s) if s.acknowledged => {
                let consented = matches!(
                    child.cause,
                    GenerationCause::Promotion | GenerationCause::Force | GenerationCause::Restart
                );
                let what = format!(
                    "{behind}. Slot {} holds writes after position {} that may have been acknowledged ({})",
                    y.slot.0,
                    s.after,
                    amount(s.blocks)
                );
                if consented {
                    let why = format!(
                        "{what}; whoever let slot {} go on accepted their loss",
                        child.maker
                    );
                    self.copy(Row::R15, x, y, how, Some(s), why)
                } else {
                    let question = Question::GiveUpSurplus {
                        source: x.slot,
                        target: y.slot,
                        surplus: s,
                    };
                    ask(
                        Row::R15,
                        question,
                        format!("{what}, and nobody has accepted their loss"),
                    )
                }
            }
            Some(s) => {
                let why = format!(
                    "{behind}. What slot {} holds beyond that was never acknowledged ({})",
                    y.slot.0,
                    amount(s.blocks)
                );
                self.copy(Row::R14, x, y, how, Some(s), why)
            }
            None => self.copy(Row::R14, x, y, how, None, behind),
        }
    }

    /// The newer generation was never committed to the store, so nothing ever completed in it, and the other copy
    /// owns the epoch: X returns to what the store says. (Sync mode; elsewhere X may hold acknowledged writes.)
    fn uncommitted_newer(&self, x: &Facts, y: &Facts) -> Option<Decision> {
        let store = self.store?;
        let sync = x.mode == Mode::Sync && y.mode == Mode::Sync;
        if !sync
            || store.generation != current(y)
            || self.record.owner != Some(y.slot)
            || !self.record.in_s(y)
            || unclean(y)
        {
            return None;
        }
        let how = by_lists(list_usable(x, y, current(y)) && list_usable(y, x, current(y)));
        let surplus = Surplus {
            holder: x.slot,
            generation: current(x),
            after: 0,
            until: reach(x),
            blocks: list_usable(x, y, current(y))
                .then_some((x.about_peer.bits, x.about_peer.bytes)),
            acknowledged: false,
        };
        let why = format!(
            "{} made a generation that the store never committed, so nothing completed in it; slot {} owns the epoch",
            name(x),
            y.slot.0
        );
        Some(self.copy(Row::R14, y, x, how, Some(surplus), why))
    }

    /// Rows 6 and 16.
    fn siblings(
        &self,
        ancestor: GenerationId,
        branch_a: Generation,
        branch_b: Generation,
    ) -> Decision {
        let row = if epochs_conflict(self.a, self.b) {
            Row::R6
        } else {
            Row::R16
        };
        let (a, b) = (self.a, self.b);
        let trusted =
            went_back(a, b, self.store).is_none() && went_back(b, a, self.store).is_none();
        let usable = trusted && list_usable(a, b, ancestor) && list_usable(b, a, ancestor);
        let how = by_lists(usable);
        let surplus = |y: &Facts, after: Position| Surplus {
            holder: y.slot,
            generation: ancestor,
            after,
            until: reach(y),
            blocks: usable.then_some((y.about_peer.bits, y.about_peer.bytes)),
            acknowledged: false,
        };
        let sides = [(a, b, branch_a, branch_b), (b, a, branch_b, branch_a)];
        for (x, y, of_x, of_y) in sides {
            if self.never_committed(x, y, &of_x, &of_y) {
                let why = format!(
                    "{} left generation {ancestor} without a commit in the store, so nothing completed there; {} is what the store says",
                    name(y),
                    name(x)
                );
                return self.copy(row, x, y, how, Some(surplus(y, of_x.fork_position)), why);
            }
        }
        let empty = sides.map(|(x, y, of_x, of_y)| {
            trusted
                && (wrote_nothing(y, x, ancestor, &of_y, of_x.fork_position)
                    || (self.store.is_none() && completed_nothing(y, x, &of_y, &of_x)))
        });
        let chosen = match empty {
            [false, false] => None,
            [true, false] => Some(sides[0]),
            [false, true] => Some(sides[1]),
            // Nothing is at stake: a serving primary keeps serving, then the newest epoch, then the longer
            // shared part; at last any rule will do that both ends apply alike.
            [true, true] => {
                let rank = |f: &Facts, branch: &Generation| {
                    (
                        f.is_primary,
                        self.record.owner == Some(f.slot),
                        f.epoch.number,
                        branch.fork_position,
                        branch.id,
                    )
                };
                Some(if rank(a, &branch_a) >= rank(b, &branch_b) {
                    sides[0]
                } else {
                    sides[1]
                })
            }
        };
        if let Some((x, y, of_x, of_y)) = chosen
            && may_be_source(x)
        {
            let why = format!(
                "{} and {} both left generation {ancestor}, but slot {} {} that slot {} lacks",
                name(a),
                name(b),
                y.slot.0,
                if wrote_nothing(y, x, ancestor, &of_y, of_x.fork_position) {
                    "wrote nothing"
                } else {
                    "had to wait for the other with everything it wrote, and completed nothing"
                },
                x.slot.0
            );
            // Nothing in its own branch; but a branch made after an unclean stop forks at a lower bound, and what lies
            // beyond it in the common generation may have been acknowledged.
            let kept = (!wrote_nothing_at_all(y)).then(|| Surplus {
                acknowledged: true,
                ..surplus(y, of_x.fork_position)
            });
            return self.copy(row, x, y, how, kept, why);
        }
        let side = |f: &Facts, other: &Facts, branch: Generation| Side {
            slot: f.slot,
            branch,
            generation: current(f),
            position: reach(f),
            blocks: (trusted && list_usable(f, other, ancestor))
                .then_some((f.about_peer.bits, f.about_peer.bytes)),
            is_primary: f.is_primary,
        };
        let sides = [side(a, b, branch_a), side(b, a, branch_b)];
        let told: Vec<String> = sides
            .iter()
            .map(|s| {
                format!(
                    "slot {} at position {} ({} by slot {} in epoch {}, {})",
                    s.slot.0,
                    s.branch.fork_position,
                    crate::words::cause(s.branch.cause),
                    s.branch.maker,
                    s.branch.epoch.number,
                    amount(s.blocks)
                )
            })
            .collect();
        let why = format!(
            "split brain: both copies left generation {ancestor}: {}",
            told.join("; ")
        );
        Decision {
            row,
            outcome: Outcome::SplitBrain { ancestor, sides },
            why,
        }
    }

    /// The store holds X's branch, entered by a checked promotion: Y's branch was never committed, for otherwise X
    /// would not have been in S. In sync mode nothing completed in it.
    fn never_committed(&self, x: &Facts, y: &Facts, of_x: &Generation, of_y: &Generation) -> bool {
        let Some(store) = self.store else {
            return false;
        };
        y.mode == Mode::Sync
            && x.mode == Mode::Sync
            && of_x.cause != GenerationCause::Force
            && of_y.cause != GenerationCause::Force
            && holds(x, store.generation)
            && history::at_or_before(x, of_x.id, store.generation)
    }
}

fn current_maker(f: &Facts) -> Option<Slot> {
    f.generations.last().map(|g| Slot(g.maker))
}

fn wrote_nothing_at_all(f: &Facts) -> bool {
    f.about_peer.known && f.about_peer.bits == 0
}

fn amount(blocks: Option<(u64, u64)>) -> String {
    match blocks {
        Some((blocks, bytes)) => format!("at most {blocks} blocks, {bytes} bytes"),
        None => "no list of them is left".into(),
    }
}
