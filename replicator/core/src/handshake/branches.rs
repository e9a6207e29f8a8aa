//! Rows 6 and 14 to 16: one copy left the generation of the other, or each left a common one.

use super::facts::*;
use super::history::{self, current, holds};
use super::rows::{Meeting, ask, name};
use super::{Decision, Outcome, Question, Row, Side, Surplus};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{Generation, GenerationCause, Mode};

impl Meeting<'_> {
    /// Rows 14 and 15: Y's generation is an ancestor of X's, which left it with `child`.
    pub(super) fn older(&self, x: &Facts, y: &Facts, child: &Generation) -> Decision {
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
    pub(super) fn siblings(
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

fn wrote_nothing_at_all(f: &Facts) -> bool {
    f.about_peer.known && f.about_peer.bits == 0
}

fn amount(blocks: Option<(u64, u64)>) -> String {
    match blocks {
        Some((blocks, bytes)) => format!("at most {blocks} blocks, {bytes} bytes"),
        None => "no list of them is left".into(),
    }
}
