//! The cluster's register: linearizable, reached over a network of its own that is late, loses answers, or is cut for a while.
//!
//! Its random numbers are its own: a seed means the same with and without it.

use crate::plan::{MS, Plan};
use crate::rng::Rng;
use crate::world::{Happening, World};
use holdfast_replicator_core::api::*;
use holdfast_replicator_core::handshake::StoreRecord;
use holdfast_wire_format::ids::*;

pub(crate) struct Register {
    record: StoreRecord,
    rng: Rng,
    /// From, to, the machine that can't reach it then (all: none named), in ns.
    cuts: Vec<(u64, u64, Option<usize>)>,
    latency: u64,
    lost_per_mille: u64,
    /// Who is promoted in which epoch, as committed: one owner for one number (C3).
    owners: std::collections::BTreeMap<u64, u8>,
}

/// What was asked, on its way.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Read(StoreId),
    Swap(StoreId, StoreVersion, StoreRecord),
}

impl Register {
    pub fn new(plan: &Plan, generation: GenerationId, in_sync: SlotSet) -> Register {
        let mut rng = Rng::stream(plan.seed, 6);
        let mut cuts = Vec::new();
        let mut at = rng.between(500, 4000) * MS;
        let every = [1000, 3000, 10_000][rng.index(3)];
        while at < plan.duration {
            let until = at + [200, 1500, 6000][rng.index(3)] * MS;
            let node = rng.chance(700).then(|| rng.index(plan.copies));
            cuts.push((at, until.min(plan.duration), node));
            at += rng.between(every / 2, every * 2) * MS;
        }
        Register {
            record: StoreRecord {
                epoch: Epoch::NONE,
                generation,
                in_sync,
                version: 1,
                copies: Vec::new(),
            },
            cuts,
            latency: [100_000, MS, 5 * MS, 40 * MS][rng.index(4)],
            lost_per_mille: [0, 20, 200][rng.index(3)],
            rng,
            owners: std::collections::BTreeMap::new(),
        }
    }

    fn cut(&self, node: usize, now: u64) -> bool {
        self.cuts
            .iter()
            .any(|(from, to, who)| (*from..*to).contains(&now) && who.is_none_or(|n| n == node))
    }
}

impl World {
    /// A core asks: it arrives after a while, or never.
    pub(crate) fn ask_register(&mut self, node: usize, ask: Ask) {
        let now = self.now;
        let life = self.nodes[node].life;
        let Some(register) = &mut self.register else {
            return self.fail(format!("node {node} asks for a register that is not there"));
        };
        let delay = register.latency / 2 + register.rng.below(register.latency + 1);
        let late = register.rng.chance(30);
        let delay = if late { delay + 2000 * MS } else { delay };
        if register.cut(node, now) {
            // Who can't reach it learns that after a while, and nothing else.
            return self.after(
                delay,
                Happening::Register {
                    node,
                    life,
                    ask,
                    lost: true,
                },
            );
        }
        self.after(
            delay,
            Happening::Register {
                node,
                life,
                ask,
                lost: false,
            },
        );
        if late {
            // Given up by who asked, and still on its way.
            self.coverage.count("store", "late");
        }
    }

    /// It arrives, is carried out, and the answer goes back.
    pub(crate) fn register_asked(&mut self, node: usize, life: u64, ask: Ask, lost: bool) {
        let Some(register) = &mut self.register else {
            return;
        };
        let latency = register.latency;
        let back = latency / 2 + register.rng.below(latency + 1);
        let answer_lost = lost || register.rng.chance(register.lost_per_mille);
        let mut failure = None;
        let (event, what) = match ask {
            Ask::Read(id) => {
                let record = (!answer_lost).then(|| register.record.clone());
                (Event::StoreRecord { id, record }, "read")
            }
            Ask::Swap(id, expected, record) => {
                let stands = register.record.epoch == expected.epoch
                    && register.record.version == expected.version;
                let applied = stands && !lost;
                if applied {
                    failure = wrong(&register.record, &record);
                    let owner = record.epoch.owner;
                    let first = *register.owners.entry(record.epoch.number).or_insert(owner);
                    if first != owner {
                        failure = Some(format!("C3: epoch {} has two owners", record.epoch.number));
                    }
                    register.record = record;
                }
                let outcome = match (answer_lost, applied) {
                    (true, _) => SwapOutcome::Unknown,
                    (false, true) => SwapOutcome::Swapped,
                    (false, false) => SwapOutcome::Refused(register.record.clone()),
                };
                let what = match (answer_lost, applied) {
                    (true, true) => "swapped, and nobody heard",
                    (true, false) => "swap lost",
                    (false, true) => "swapped",
                    (false, false) => "refused",
                };
                (Event::StoreSwapped { id, outcome }, what)
            }
        };
        let record = register.record.clone();
        self.coverage.count("store", what);
        self.log(|| {
            format!(
                "register: node {node}: {what}: epoch {} of {}, S {:?}, generation {}, version {}",
                record.epoch.number,
                record.epoch.owner,
                record.in_sync,
                record.generation,
                record.version
            )
        });
        if let Some(failure) = failure {
            self.fail(failure);
        }
        if self.nodes[node].life == life {
            let event = Box::new(event);
            self.after(back, Happening::Process { node, life, event });
        }
    }
}

/// What no change of the record may be.
fn wrong(old: &StoreRecord, new: &StoreRecord) -> Option<String> {
    if new.in_sync.is_empty() {
        return Some("S is empty".into());
    }
    if new.version != old.version + 1 {
        return Some("a version of the record is left out or given twice".into());
    }
    if new.epoch.number < old.epoch.number
        || (new.epoch.number == old.epoch.number && new.epoch != old.epoch)
    {
        return Some("C3: the epoch of the record went back, or changed its owner".into());
    }
    None
}
