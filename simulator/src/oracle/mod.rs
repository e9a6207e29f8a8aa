//! What an application may expect, from what it asked and was told: nothing here knows how a copy works.
//!
//! Every sector has a history of writes. A promotion is checked against it sector by sector (no acknowledged
//! write missing, nothing reappearing), then the history continues from what the promoted copy holds. After a
//! person forced something, the promises toward the old branch end: the history starts again from the forced
//! copy (`forked`), until both copies are seen equal.

mod history;
mod losses;
mod promotions;
mod reads;
mod writes;

use holdfast_wire_format::ids::SlotSet;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Index of a write; its stamp is one more.
pub type WriteId = u32;

#[derive(Clone, Debug)]
struct Write {
    value: u64,
    volume: usize,
    first: u64,
    count: u64,
    fua: bool,
    invoked: u64,
    /// Answered, either way.
    ended: Option<u64>,
    acknowledged: Option<u64>,
    /// The copies that held it then.
    set: SlotSet,
    tenure: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    write: WriteId,
    /// Found on a promoted copy: it counts as acknowledged from then on, and comes before all later ones.
    settled: Option<u64>,
    /// A read returned it.
    seen: Option<u64>,
}

/// So many acknowledged writes are looked for on the copies that have to have them.
const RECENT: usize = 48;

/// One time of being primary.
#[derive(Clone, Debug)]
struct Tenure {
    node: usize,
    /// Its writes are part of the history.
    official: bool,
    /// Promoted in an epoch that was superseded already: it may complete nothing.
    stale: bool,
    epoch: u64,
    /// What the copy held when it began.
    snapshot: Vec<Vec<u64>>,
}

/// When something was lost; by copy, when it had last lost power, and when its process had last ended.
type Loss = (u64, Vec<Option<u64>>, Vec<Option<u64>>);

/// What the oracle knows.
#[derive(Debug)]
pub struct Oracle {
    writes: Vec<Write>,
    history: Vec<BTreeMap<u64, Vec<Entry>>>,
    /// Every write ever made to a sector, for checks of forced copies.
    all: Vec<BTreeMap<u64, Vec<WriteId>>>,
    dead: BTreeSet<(WriteId, u64)>,
    base: Vec<Vec<u64>>,
    base_at: u64,
    base_certain: bool,
    base_set: SlotSet,
    tenures: Vec<Tenure>,
    flushes: Vec<(u64, u64)>,
    last_flush: u64,
    /// By copy: when it last lost power, and when its process last ended without a word.
    lost_since: Vec<Option<u64>>,
    killed_since: Vec<Option<u64>>,
    /// By copy: its disk lost power, so any of what was not flushed may be missing, in whatever order it completed (D3). A process that ends
    /// loses what was in its memory alone, and leaves a point in time.
    cache_lost: SlotSet,
    /// The same at each such moment, with what was lost then.
    losses: Vec<Loss>,
    settled_set: SlotSet,
    /// A person forced something, or destroyed the only copy of something, and the copies were not seen equal since.
    pub forked: bool,
    /// Copies that were filled by one that lost power: what those lost they lack, too (D3).
    filled_by_loser: SlotSet,
    /// The copies that had everything when the newest primary was last seen.
    holders: SlotSet,
    /// Copies whose data a person gave up, until they were filled again.
    destroyed: SlotSet,
    /// By copy: when a person last gave up its data.
    given_up_at: Vec<Option<u64>>,
    positions: BTreeMap<(u64, u64), (u64, u64)>,
    /// Every write to a sector, whichever primary was asked.
    every: Vec<BTreeMap<u64, Vec<WriteId>>>,
    /// By tenure: when the newest flush was asked for that was answered.
    flushed_in: BTreeMap<usize, u64>,
    /// Acknowledged writes, the newest last.
    recent: VecDeque<WriteId>,
    pub checked_promotions: u64,
    pub checked_reads: u64,
}

impl Oracle {
    /// Zeroed volumes of these sizes in sectors, on so many copies.
    #[must_use]
    pub fn new(volumes: &[u64], copies: usize) -> Self {
        Oracle {
            writes: Vec::new(),
            history: vec![BTreeMap::new(); volumes.len()],
            all: vec![BTreeMap::new(); volumes.len()],
            dead: BTreeSet::new(),
            base: volumes.iter().map(|n| vec![0; *n as usize]).collect(),
            base_at: 0,
            base_certain: true,
            base_set: SlotSet::EMPTY,
            tenures: Vec::new(),
            flushes: Vec::new(),
            last_flush: 0,
            lost_since: vec![None; copies],
            killed_since: vec![None; copies],
            cache_lost: SlotSet::EMPTY,
            losses: Vec::new(),
            settled_set: SlotSet::EMPTY,
            forked: false,
            filled_by_loser: SlotSet::EMPTY,
            holders: SlotSet::EMPTY,
            destroyed: SlotSet::EMPTY,
            given_up_at: vec![None; copies],
            positions: BTreeMap::new(),
            every: vec![BTreeMap::new(); volumes.len()],
            flushed_in: BTreeMap::new(),
            recent: VecDeque::new(),
            checked_promotions: 0,
            checked_reads: 0,
        }
    }

    /// The tenure a node serves in now, if its history counts.
    #[must_use]
    pub fn tenure_of(&self, node: usize) -> Option<usize> {
        self.tenures.iter().rposition(|t| t.node == node)
    }

    /// The node whose writes count now.
    #[must_use]
    pub fn current_node(&self) -> Option<usize> {
        self.tenures
            .iter()
            .rev()
            .find(|t| t.official)
            .map(|t| t.node)
    }

    fn current(&self, tenure: usize) -> bool {
        self.tenures
            .iter()
            .rposition(|t| t.official)
            .is_some_and(|t| t == tenure)
    }

    /// A write goes over the link under a name (D17).
    ///
    /// # Errors
    /// That name stood for other data.
    pub fn named(
        &mut self,
        generation: u64,
        position: u64,
        place: u64,
        content: u64,
    ) -> Result<(), String> {
        let before = self
            .positions
            .insert((generation, position), (place, content));
        match before {
            Some(old) if old != (place, content) => Err(format!(
                "D17: position {position} of generation {generation:016x} names two writes"
            )),
            _ => Ok(()),
        }
    }
}

fn ms(t: u64) -> String {
    format!("{:.3}ms", t as f64 / 1e6)
}
