//! How two histories of generations relate.
//!
//! A history is a chain: each generation names its parent and the position in the parent up to which the two
//! are the same. Two copies of one service share a beginning; what follows the last shared generation decides
//! whether one copy is simply behind or both went their own way.

use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::Generation;

/// How the current generations of two copies relate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// Both are in the same generation.
    Same,
    /// The first copy's generation is an ancestor of the second's; `child` is the second's first generation after it.
    FirstOlder { child: Generation },
    /// The other way round.
    SecondOlder { child: Generation },
    /// Both went on from `ancestor`; each side's first generation after it.
    Siblings {
        ancestor: GenerationId,
        first: Generation,
        second: Generation,
    },
    /// No generation in common.
    Unrelated {
        /// Older generations were dropped from a list: there may have been a common one.
        cut: bool,
    },
}

/// The generation a copy is in; none if it has no history.
pub fn current(facts: &Facts) -> GenerationId {
    facts.generations.last().map_or(GenerationId(0), |g| g.id)
}

/// Ids from oldest to newest. The parent of the oldest listed one counts: it is known by name.
pub fn chain(facts: &Facts) -> Vec<GenerationId> {
    let mut ids = Vec::with_capacity(facts.generations.len() + 1);
    if let Some(oldest) = facts.generations.first()
        && oldest.parent != GenerationId(0)
    {
        ids.push(oldest.parent);
    }
    ids.extend(facts.generations.iter().map(|g| g.id));
    ids
}

/// True if `id` is in the copy's history (and is not "none").
pub fn holds(facts: &Facts, id: GenerationId) -> bool {
    id != GenerationId(0) && chain(facts).contains(&id)
}

/// True if `older` comes before `newer` in this copy's history, or is the same.
pub fn at_or_before(facts: &Facts, older: GenerationId, newer: GenerationId) -> bool {
    let ids = chain(facts);
    match (place(&ids, older), place(&ids, newer)) {
        (Some(o), Some(n)) => o <= n,
        _ => false,
    }
}

fn place(ids: &[GenerationId], id: GenerationId) -> Option<usize> {
    if id == GenerationId(0) {
        return None;
    }
    ids.iter().position(|i| *i == id)
}

/// What makes a history impossible, in words; `None` if it is a chain.
pub fn defect(facts: &Facts) -> Option<String> {
    let gens = &facts.generations;
    for (i, g) in gens.iter().enumerate() {
        if g.id == GenerationId(0) {
            return Some(format!("generation {} of {} has no id", i + 1, gens.len()));
        }
        if i > 0 && g.parent != gens[i - 1].id {
            return Some(format!(
                "generation {} does not follow from {}",
                g.id,
                gens[i - 1].id
            ));
        }
        if gens[..i].iter().any(|older| older.id == g.id) || g.parent == g.id {
            return Some(format!("generation {} is listed twice", g.id));
        }
    }
    None
}

/// What two lists say differently of one generation, in words; `None` if they agree.
pub fn contradiction(first: &Facts, second: &Facts) -> Option<String> {
    for g in &first.generations {
        for h in second.generations.iter().filter(|h| h.id == g.id) {
            if g != h {
                return Some(format!(
                    "the copies disagree on where generation {} came from",
                    g.id
                ));
            }
        }
    }
    None
}

/// Compares two histories, each of them free of [`defect`]s.
pub fn relate(first: &Facts, second: &Facts) -> Relation {
    let (a, b) = (chain(first), chain(second));
    let common = a.iter().rev().copied().find(|id| b.contains(id));
    let Some(ancestor) = common else {
        return Relation::Unrelated {
            cut: first.generations_cut || second.generations_cut,
        };
    };
    match (child_of(first, ancestor), child_of(second, ancestor)) {
        (None, None) => Relation::Same,
        (None, Some(child)) => Relation::FirstOlder { child },
        (Some(child), None) => Relation::SecondOlder { child },
        (Some(first), Some(second)) => Relation::Siblings {
            ancestor,
            first,
            second,
        },
    }
}

fn child_of(facts: &Facts, parent: GenerationId) -> Option<Generation> {
    facts
        .generations
        .iter()
        .find(|g| g.parent == parent)
        .copied()
}
