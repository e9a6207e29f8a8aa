//! A defect per row: it comes to the opposite of what the table says. In the test build of `planted.rs` alone.

use super::facts::Record;
use super::{CopyPlan, Decision, How, Outcome, Row, StoreRecord};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::Slot;
use holdfast_wire_format::metadata::CopyState;

/// Who was to be copied to is copied from; copies that were to connect wait; those that were not, do; and where nobody was to
/// be copied to, the copy in the higher slot is.
pub(super) fn swap(
    a: &Facts,
    b: &Facts,
    store: Option<&StoreRecord>,
    decision: Decision,
) -> Decision {
    if !is_swapped(decision.row) {
        return decision;
    }
    let copy = |source: Slot, target: Slot, how: How| {
        let y = if target == a.slot { a } else { b };
        CopyPlan {
            source,
            target,
            how,
            leaves_s: Record::of(a, b, store).in_sync.contains(target),
            target_demotes: y.is_primary,
            target_outdated: false,
            target_becomes: CopyState::Complete,
            surplus: None,
        }
    };
    let outcome = match decision.outcome {
        Outcome::Copy(plan) => Outcome::Copy(copy(plan.target, plan.source, plan.how)),
        Outcome::Nothing => Outcome::WaitForThird,
        Outcome::Refuse { .. } if decision.row != Row::R17 => Outcome::Nothing,
        Outcome::Diskless { failed, server } => Outcome::Diskless {
            failed: server,
            server: failed,
        },
        Outcome::SplitBrain { .. }
        | Outcome::AskPerson { .. }
        | Outcome::WaitForThird
        | Outcome::Refuse { .. } => Outcome::Copy(copy(a.slot, b.slot, How::FullByChecksum)),
    };
    Decision {
        outcome,
        ..decision
    }
}

fn is_swapped(row: Row) -> bool {
    match row {
        Row::R1 => planted!("row-1-swapped"),
        Row::R2 => planted!("row-2-swapped"),
        Row::R3 => planted!("row-3-swapped"),
        Row::R4 => planted!("row-4-swapped"),
        Row::R5 => planted!("row-5-swapped"),
        Row::R6 => planted!("row-6-swapped"),
        Row::R7 => planted!("row-7-swapped"),
        Row::R8 => planted!("row-8-swapped"),
        Row::R9 => planted!("row-9-swapped"),
        Row::R10 => planted!("row-10-swapped"),
        Row::R11 => planted!("row-11-swapped"),
        Row::R12 => planted!("row-12-swapped"),
        Row::R13 => planted!("row-13-swapped"),
        Row::R14 => planted!("row-14-swapped"),
        Row::R15 => planted!("row-15-swapped"),
        Row::R16 => planted!("row-16-swapped"),
        Row::R17 => planted!("row-17-swapped"),
    }
}
