//! Breadth-first enumeration of the world in `model.rs`.
//!
//! `HOLDFAST_HANDSHAKE_STATES` sets how many states each setting visits (default 10000).

use super::model::*;
use crate::handshake::*;
use holdfast_wire_format::metadata::*;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

const SETTINGS: [Setting; 3] = [
    Setting {
        mode: Mode::Sync,
        on_peer_loss: OnPeerLoss::Suspend,
    },
    Setting {
        mode: Mode::Sync,
        on_peer_loss: OnPeerLoss::Continue,
    },
    Setting {
        mode: Mode::Async,
        on_peer_loss: OnPeerLoss::Continue,
    },
];

const NONE: Budget = Budget {
    writes: 0,
    crashes: 0,
    clean_stops: 0,
    link_losses: 0,
    forces: 0,
    promotions: 0,
    replaced: 0,
    failed: 0,
    restored: 0,
};

/// Each is deep in one kind of trouble rather than shallow in all.
const BUDGETS: [Budget; 9] = [
    Budget {
        writes: 2,
        link_losses: 1,
        promotions: 2,
        forces: 2,
        ..NONE
    },
    Budget {
        writes: 1,
        link_losses: 1,
        crashes: 2,
        ..NONE
    },
    Budget {
        writes: 1,
        clean_stops: 2,
        restored: 1,
        ..NONE
    },
    Budget {
        writes: 1,
        clean_stops: 1,
        replaced: 1,
        ..NONE
    },
    Budget {
        writes: 2,
        crashes: 2,
        link_losses: 1,
        promotions: 1,
        ..NONE
    },
    Budget {
        writes: 2,
        crashes: 1,
        link_losses: 2,
        promotions: 2,
        forces: 1,
        ..NONE
    },
    Budget {
        writes: 2,
        crashes: 1,
        clean_stops: 1,
        link_losses: 1,
        restored: 1,
        promotions: 1,
        forces: 1,
        ..NONE
    },
    Budget {
        writes: 2,
        clean_stops: 2,
        replaced: 2,
        failed: 1,
        promotions: 1,
        forces: 1,
        ..NONE
    },
    Budget {
        writes: 3,
        crashes: 2,
        link_losses: 1,
        promotions: 2,
        forces: 2,
        clean_stops: 1,
        ..NONE
    },
];

struct Found {
    rows: BTreeSet<Row>,
    states: usize,
    /// The shortest way to a broken invariant, step by step.
    broken: Option<String>,
}

fn enumerate(setting: Setting, budget: Budget, limit: usize, mutation: Option<Mutation>) -> Found {
    let hash = |w: &World| {
        let mut h = DefaultHasher::new();
        w.hash(&mut h);
        h.finish()
    };
    let start = World::new(setting, budget);
    let mut from: HashMap<u64, (u64, String)> = HashMap::new();
    let first = hash(&start);
    from.insert(first, (first, "start".into()));
    let mut queue = VecDeque::from([(first, start)]);
    let mut found = Found {
        rows: BTreeSet::new(),
        states: 0,
        broken: None,
    };
    while let Some((id, world)) = queue.pop_front() {
        found.states += 1;
        if found.states > limit {
            break;
        }
        let rows = &mut found.rows;
        for (what, next) in world.steps(mutation, &mut |row, _| {
            rows.insert(row);
        }) {
            match next {
                Err(broken) => {
                    let mut way = vec![broken];
                    let mut at = id;
                    while at != first {
                        let (before, step) = &from[&at];
                        way.push(step.clone());
                        at = *before;
                    }
                    way.reverse();
                    found.broken = Some(format!("{setting:?}\n{}", way.join("\n")));
                    return found;
                }
                Ok(next) => {
                    let next_id = hash(&next);
                    from.entry(next_id).or_insert_with(|| {
                        queue.push_back((next_id, next));
                        (id, what)
                    });
                }
            }
        }
    }
    found
}

fn limit() -> usize {
    std::env::var("HOLDFAST_HANDSHAKE_STATES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(10_000)
}

/// Rows that two copies alone cannot come to: shapes that differ, two mixtures.
const NOT_BETWEEN_TWO: [Row; 2] = [Row::R1, Row::R8];

#[test]
fn no_path_leads_to_different_data_or_to_a_silent_loss() {
    let mut rows = BTreeSet::new();
    for setting in SETTINGS {
        for (i, budget) in BUDGETS.into_iter().enumerate() {
            let found = enumerate(setting, budget, limit(), None);
            println!(
                "{setting:?}, budget {i}: {} states, rows {:?}",
                found.states, found.rows
            );
            assert!(
                found.broken.is_none(),
                "{}",
                found.broken.unwrap_or_default()
            );
            assert!(
                budget.restored > 0 || !found.rows.contains(&Row::R5),
                "{setting:?}, budget {i}: a disk that was never restored looks as if it went back in time"
            );
            rows.extend(found.rows);
        }
    }
    let missing: Vec<Row> = Row::ALL
        .into_iter()
        .filter(|r| !rows.contains(r) && !NOT_BETWEEN_TWO.contains(r))
        .collect();
    assert!(missing.is_empty(), "rows never reached: {missing:?}");
}

/// A row that decides otherwise must break an invariant somewhere. Left out: row 9, whose copies are equal, so that
/// copying either way changes nothing.
#[test]
fn every_row_that_decides_otherwise_is_noticed() {
    let mut mutations = Vec::new();
    for row in [
        Row::R4,
        Row::R5,
        Row::R7,
        Row::R10,
        Row::R11,
        Row::R12,
        Row::R13,
        Row::R14,
        Row::R15,
    ] {
        mutations.push(Mutation::Swap(row));
        mutations.push(Mutation::Skip(row));
    }
    for row in [Row::R6, Row::R16, Row::R17] {
        mutations.push(Mutation::Guess(row, 0));
        mutations.push(Mutation::Guess(row, 1));
    }
    // Most are noticed within a few steps of the start: look shallow everywhere before looking deep anywhere.
    let noticed = |m: &Mutation| {
        [limit() / 16, limit() / 4, limit()]
            .into_iter()
            .any(|limit| {
                SETTINGS.into_iter().any(|setting| {
                    BUDGETS
                        .into_iter()
                        .any(|budget| enumerate(setting, budget, limit, Some(*m)).broken.is_some())
                })
            })
    };
    let missed: Vec<Mutation> = mutations.into_iter().filter(|m| !noticed(m)).collect();
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
}
