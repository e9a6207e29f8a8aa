//! Rows 9 to 13: both copies are in one generation.

use super::facts::*;
use super::history::current;
use super::rows::{Meeting, name, refuse, wait};
use super::{Decision, How, Outcome, Problem, Row};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::metadata::{CopyState, Mode};

impl<'a> Meeting<'a> {
    /// Rows 9 to 13.
    pub(super) fn same_generation(&self) -> Decision {
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
}
