//! A decision in words, for `explain-handshake` and the event log.

use super::{Decision, How, Outcome, Question};
use crate::words;
use holdfast_wire_format::ids::Slot;
use holdfast_wire_format::metadata::CopyState;

/// Names of the nodes by slot, for people.
pub type Names<'a> = &'a dyn Fn(Slot) -> String;

/// What was decided, why, and what happens next, as a few sentences.
pub fn explain(decision: &Decision, names: Names<'_>) -> String {
    let mut text = format!("Row {}: {}.\n", decision.row.number(), decision.why);
    match &decision.outcome {
        Outcome::Refuse { problem } if decision.why == problem.to_string() => {
            text.push_str("The copies do not connect; nothing is changed.");
        }
        other => text.push_str(&outcome(other, names)),
    }
    text
}

fn outcome(outcome: &Outcome, names: Names<'_>) -> String {
    match outcome {
        Outcome::Refuse { problem } => format!("The copies do not connect; nothing is changed. Problem: {problem}."),
        Outcome::Nothing => "Nothing is copied; mirroring begins.".into(),
        Outcome::Copy(plan) => {
            let how = match plan.how {
                How::Bits => "the blocks that either side marked",
                How::BitsAndUndo => "the blocks that either side marked and those in the target's undo log",
                How::Full => "every block",
                How::FullByChecksum => "every block whose checksums differ",
            };
            let (source, target) = (names(plan.source), names(plan.target));
            let mut text = format!("{target} takes {how} from {source}.");
            if plan.target_demotes {
                text += &format!(" {target} stops being primary first.");
            }
            if plan.leaves_s {
                text += &format!(" {target} leaves the in-sync set until it has everything.");
            }
            if plan.target_outdated {
                text += &format!(" {target} cannot be promoted before that.");
            }
            if plan.target_becomes != CopyState::Complete {
                text += &format!(" It ends {}, as its source is.", words::state(plan.target_becomes));
            }
            if let Some(surplus) = plan.surplus {
                let amount = surplus
                    .blocks
                    .map_or("an unknown number of blocks".into(), |(blocks, bytes)| format!("at most {blocks} blocks, {bytes} bytes"));
                text += &format!(
                    " What {} wrote after position {} of generation {} ({amount}) is given up; it {}.",
                    names(surplus.holder),
                    surplus.after,
                    surplus.generation,
                    if surplus.acknowledged { "may have been acknowledged, and whoever let the other copy go on accepted its loss; until this copy is whole, its undo log still holds what was overwritten" } else { "was never acknowledged" }
                );
            }
            text
        }
        Outcome::SplitBrain { ancestor, sides } => {
            let mut text = format!("Split brain since generation {ancestor}. Nothing is changed; both keep their lists.\n");
            for side in sides {
                let amount = side
                    .blocks
                    .map_or("an unknown amount".into(), |(blocks, bytes)| format!("at most {blocks} blocks, {bytes} bytes"));
                text += &format!(
                    "  {} left it at position {} in epoch {} ({}), and wrote {amount} since.\n",
                    names(side.slot),
                    side.branch.fork_position,
                    side.branch.epoch.number,
                    if side.forced() { format!("forced on {}", names(Slot(side.branch.maker))) } else { words::cause(side.branch.cause).into() }
                );
            }
            text + "Pick the side whose writes are given up."
        }
        Outcome::AskPerson { question } => {
            let asked = match *question {
                Question::PickFirst { slots: [a, b] } => {
                    format!("Which copy does the service start from, {} or {}? Promote that one with --force.", names(a), names(b))
                }
                Question::GiveUpSurplus { source, target, .. } => {
                    format!("May {} give up what {} never got? If so, discard its writes there.", names(target), names(source))
                }
                Question::RestoredAndNewer { restored, other } => format!(
                    "Does the service go on from {}, restored as it is, or from {}, which is behind it? Invalidate the other one.",
                    names(restored),
                    names(other)
                ),
                Question::BothRestored { slots: [a, b] } => {
                    format!("Which one counts, {} or {}? Invalidate the other one.", names(a), names(b))
                }
                Question::NewestOnFailedDisk { failed, server } => format!(
                    "Can the disk of {} be brought back? If not, promote {} with --force, which loses what only that disk held.",
                    names(failed),
                    names(server)
                ),
            };
            format!("Nothing is changed until a person answers. {asked}")
        }
        Outcome::WaitForThird => {
            "Nothing is copied between these two. Connect a copy that is whole, or pick by `invalidate` or --force.".into()
        }
        Outcome::Diskless { failed, server } => {
            format!("{} goes on without its own disk, through that of {}.", names(*failed), names(*server))
        }
    }
}
