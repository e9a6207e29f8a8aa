//! What an application may expect, from what it asked and was told: nothing here knows how a copy works.
//!
//! Every sector has a history of writes. A promotion is checked against it sector by sector (no acknowledged
//! write missing, nothing reappearing), then the history continues from what the promoted copy holds. After a
//! person forced something, the promises toward the old branch end: the history starts again from the forced
//! copy (`forked`), until both copies are seen equal.

use holdfast_wire_format::ids::{Slot, SlotSet};
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

    /// A write or zero goes to a primary. Returns its number and stamp.
    #[allow(clippy::too_many_arguments)]
    pub fn write_invoked(
        &mut self,
        now: u64,
        node: usize,
        volume: usize,
        first: u64,
        count: u64,
        zero: bool,
        fua: bool,
    ) -> (WriteId, u64) {
        let id = self.writes.len() as WriteId;
        let value = if zero { 0 } else { u64::from(id) + 1 };
        let tenure = self.tenure_of(node).unwrap_or(usize::MAX);
        self.writes.push(Write {
            value,
            volume,
            first,
            count,
            fua,
            invoked: now,
            ended: None,
            acknowledged: None,
            set: SlotSet::EMPTY,
            tenure,
        });
        for sector in first..first + count {
            self.every[volume].entry(sector).or_default().push(id);
        }
        if tenure != usize::MAX && self.tenures[tenure].official {
            for sector in first..first + count {
                let entry = Entry {
                    write: id,
                    settled: None,
                    seen: None,
                };
                self.all[volume].entry(sector).or_default().push(id);
                // Sent to a primary that was replaced meanwhile: it may land nowhere or, late, be refused.
                if self.current(tenure) {
                    self.prune(volume, sector);
                    self.history[volume].entry(sector).or_default().push(entry);
                }
            }
        }
        (id, value)
    }

    /// A client that never got its answer asks for the same write again.
    pub fn write_again(&mut self, now: u64, node: usize, old: WriteId) -> (WriteId, u64) {
        let Write {
            value,
            volume,
            first,
            count,
            fua,
            ..
        } = self.writes[old as usize];
        let zero = value == 0;
        let (id, _) = self.write_invoked(now, node, volume, first, count, zero, fua);
        self.writes[id as usize].value = value;
        (id, value)
    }

    /// Volume, first sector, sectors, whether it zeroes, FUA.
    #[must_use]
    pub fn asked(&self, id: WriteId) -> (usize, u64, u64, bool, bool) {
        let w = &self.writes[id as usize];
        (w.volume, w.first, w.count, w.value == 0, w.fua)
    }

    #[must_use]
    pub fn is_fua(&self, id: WriteId) -> bool {
        self.writes[id as usize].fua
    }

    #[must_use]
    pub fn invoked(&self, id: WriteId) -> u64 {
        self.writes[id as usize].invoked
    }

    /// Acknowledged before the newest flush that its primary answered was asked for, or with FUA.
    #[must_use]
    pub fn is_flushed(&self, id: WriteId) -> bool {
        let w = &self.writes[id as usize];
        let flush = self.flushed_in.get(&w.tenure).copied().unwrap_or(0);
        w.fua || w.acknowledged.is_some_and(|a| a < flush)
    }

    /// The newest writes that were acknowledged by this primary before that moment.
    #[must_use]
    pub fn recent(&self, node: usize, before: u64) -> Vec<WriteId> {
        let tenure = self.tenure_of(node);
        let mine =
            |w: &Write| Some(w.tenure) == tenure && w.acknowledged.is_some_and(|a| a < before);
        let ids = self.recent.iter().copied();
        ids.filter(|id| mine(&self.writes[*id as usize])).collect()
    }

    /// The copy lost neither its cache nor its disk since.
    #[must_use]
    pub fn keeps(&self, node: usize, since: u64) -> bool {
        let lost = self.lost_since[node].max(self.given_up_at[node]);
        lost.is_none_or(|at| at < since) && !self.destroyed.contains(Slot(node as u8))
    }

    /// A copy's disk holds an acknowledged write, or what was written there since.
    ///
    /// # Errors
    /// It does not.
    pub fn held<'a>(
        &self,
        id: WriteId,
        node: usize,
        durably: bool,
        view: impl Fn(usize) -> &'a [u64],
    ) -> Result<(), String> {
        let w = &self.writes[id as usize];
        let view = view(w.volume);
        for sector in w.first..w.first + w.count {
            let value = view[sector as usize];
            if value == w.value {
                continue;
            }
            let since = self.every[w.volume].get(&sector).is_some_and(|ids| {
                ids.iter().rev().any(|other| {
                    let o = &self.writes[*other as usize];
                    o.value == value && o.ended.is_none_or(|e| e >= w.invoked)
                })
            });
            if !since {
                return Err(format!(
                    "node {node} does not hold write {id} ({}) {}in volume {} sector {sector}, but {value}: {}",
                    w.value,
                    if durably { "durably " } else { "" },
                    w.volume,
                    self.describe(w.volume, sector)
                ));
            }
        }
        Ok(())
    }

    /// The write was answered. `set`: the copies that the primary counts as holding everything.
    ///
    /// # Errors
    /// It was acknowledged by a primary that was replaced, and its successor lacks it (C1).
    pub fn write_ended(
        &mut self,
        now: u64,
        id: WriteId,
        ok: bool,
        set: SlotSet,
    ) -> Result<(), String> {
        let write = &mut self.writes[id as usize];
        write.ended = Some(now);
        if !ok {
            return Ok(());
        }
        write.acknowledged = Some(now);
        write.set = set;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
        let write = &self.writes[id as usize];
        let write = write.clone();
        let Some(tenure) = self.tenures.get(write.tenure) else {
            return Err(format!(
                "write {id} completed at a copy that was never primary"
            ));
        };
        if tenure.stale && !self.forked {
            return Err(format!(
                "C1: write {id} completed at node {} in epoch {}, superseded before",
                tenure.node, tenure.epoch
            ));
        }
        if !tenure.official {
            return Ok(());
        }
        let Some(next) = self.tenures[write.tenure + 1..].iter().find(|t| t.official) else {
            return Ok(());
        };
        if self.forked {
            return Ok(());
        }
        for sector in write.first..write.first + write.count {
            let value = next.snapshot[write.volume][sector as usize];
            let covered = value == write.value
                || self.all[write.volume].get(&sector).is_some_and(|ids| {
                    ids.iter()
                        .map(|i| &self.writes[*i as usize])
                        .any(|w| w.value == value && w.ended.is_none_or(|e| e >= write.invoked))
                });
            if !covered {
                return Err(format!(
                    "C1: write {id} completed at node {} after node {} was promoted without it (volume {} sector {sector} held {value})",
                    tenure.node, next.node, write.volume
                ));
            }
        }
        Ok(())
    }

    /// A flush was answered Ok: everything acknowledged before it was asked for is safe from power cuts.
    pub fn flush_ended(&mut self, node: usize, invoked: u64, now: u64) {
        if let Some(tenure) = self.tenure_of(node) {
            let newest = self.flushed_in.entry(tenure).or_default();
            *newest = (*newest).max(invoked);
        }
        let official = self.tenure_of(node).is_some_and(|t| self.current(t));
        if official {
            self.flushes.push((invoked, now));
            self.last_flush = self.last_flush.max(invoked);
        }
    }

    fn acknowledged(&self, entry: &Entry) -> Option<u64> {
        entry
            .settled
            .or(self.writes[entry.write as usize].acknowledged)
    }

    /// Every copy that held it stopped uncleanly since, one of them by losing power: none can tell what the others
    /// still have, so what was not flushed may be given up (as a single disk would).
    fn gone(&self, since: u64, set: SlotSet) -> bool {
        let after = |times: &[Option<u64>], slot: Slot| {
            times
                .get(slot.0 as usize)
                .is_some_and(|t| t.is_some_and(|t| t >= since))
        };
        self.losses.iter().any(|(at, lost, killed)| {
            *at >= since
                && set.iter().all(|s| after(lost, s) || after(killed, s))
                && set.iter().any(|s| after(lost, s))
        })
    }

    /// What was asked for at `asked`, acknowledged at `since` and never flushed may be missing on `node`. (An
    /// acknowledgement may still be on its way when the copy that sent it loses power.)
    fn may_be_lost(&self, asked: u64, since: u64, set: SlotSet, node: usize) -> bool {
        since >= self.last_flush
            && (self.lost_since[node].is_some_and(|l| l >= asked) || self.gone(asked, set))
    }

    fn required(&self, entry: &Entry, node: usize) -> bool {
        let write = &self.writes[entry.write as usize];
        let Some(since) = self.acknowledged(entry) else {
            return false;
        };
        if write.fua && write.acknowledged.is_some() {
            return true;
        }
        let (asked, set) = if write.acknowledged.is_some() {
            (write.invoked, write.set)
        } else {
            (since, self.settled_set)
        };
        !self.may_be_lost(asked, since, set, node)
    }

    fn before(&self, entries: &[Entry], x: usize, y: usize) -> bool {
        let (a, b) = (&entries[x], &entries[y]);
        match (a.settled, b.settled) {
            (Some(_), Some(_)) => x < y,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => self.writes[a.write as usize]
                .ended
                .is_some_and(|e| e < self.writes[b.write as usize].invoked),
        }
    }

    /// Forgets what can never be read again: it ended before a write was asked for that is safe for good.
    fn prune(&mut self, volume: usize, sector: u64) {
        let Some(entries) = self.history[volume].get(&sector) else {
            return;
        };
        if entries.len() < 8 {
            return;
        }
        let safe: Vec<usize> = (0..entries.len())
            .filter(|y| {
                let entry = &entries[*y];
                self.acknowledged(entry)
                    .is_some_and(|a| a < self.last_flush || self.writes[entry.write as usize].fua)
            })
            .collect();
        let kept: Vec<Entry> = (0..entries.len())
            .filter(|x| !safe.iter().any(|y| x != y && self.before(entries, *x, *y)))
            .map(|x| entries[x])
            .collect();
        self.history[volume].insert(sector, kept);
    }

    /// The newest entry that explains `value` on `node`: `Some(None)` is the base.
    fn explain(
        &self,
        volume: usize,
        sector: u64,
        value: u64,
        node: usize,
    ) -> Option<Option<usize>> {
        let empty = Vec::new();
        let entries = self.history[volume].get(&sector).unwrap_or(&empty);
        for x in (0..entries.len()).rev() {
            if self.writes[entries[x].write as usize].value != value {
                continue;
            }
            let stale = (0..entries.len())
                .any(|y| y != x && self.before(entries, x, y) && self.required(&entries[y], node));
            if !stale {
                return Some(Some(x));
            }
        }
        let newer = entries.iter().any(|e| self.required(e, node));
        let base_is_certain =
            self.base_certain || !self.may_be_lost(self.base_at, self.base_at, self.base_set, node);
        if !newer && (self.base[volume][sector as usize] == value || !base_is_certain) {
            return Some(None);
        }
        None
    }

    fn describe(&self, volume: usize, sector: u64) -> String {
        let mut text = format!("base {}", self.base[volume][sector as usize]);
        for e in self.history[volume].get(&sector).into_iter().flatten() {
            let w = &self.writes[e.write as usize];
            text += &format!(
                "; {} tenure {} asked {} ended {:?} acknowledged {:?} by {:?} settled {:?}{}",
                w.value,
                w.tenure,
                ms(w.invoked),
                w.ended.map(ms),
                w.acknowledged.map(ms),
                w.set,
                e.settled.map(ms),
                if w.fua { " fua" } else { "" }
            );
        }
        text + &format!(
            "; last flush asked {}, power lost {:?}",
            ms(self.last_flush),
            self.lost_since
                .iter()
                .map(|l| l.map(ms))
                .collect::<Vec<_>>()
        )
    }

    /// A copy became primary holding `view`.
    ///
    /// # Errors
    /// An acknowledged write is missing, or something given up came back (D1, D2, C1, C2), or a forced copy is no
    /// point in time (D3).
    pub fn promoted(
        &mut self,
        now: u64,
        node: usize,
        forced: bool,
        epoch: u64,
        set: SlotSet,
        view: Vec<Vec<u64>>,
    ) -> Result<(), String> {
        self.checked_promotions += 1;
        let newest = self.tenures.iter().filter(|t| t.official).map(|t| t.epoch);
        if !forced && !self.forked && newest.max().is_some_and(|e| e > epoch) {
            self.tenures.push(Tenure {
                node,
                official: false,
                stale: true,
                epoch,
                snapshot: view,
            });
            return Ok(());
        }
        let mut result = Ok(());
        if !self.forked && !forced {
            'all: for (volume, sectors) in view.iter().enumerate() {
                for (sector, value) in sectors.iter().enumerate() {
                    if self.explain(volume, sector as u64, *value, node).is_none() {
                        result = Err(format!(
                            "node {node} was promoted without force and holds {value} in volume {volume} sector {sector}: {}",
                            self.describe(volume, sector as u64)
                        ));
                        break 'all;
                    }
                }
            }
        } else if !self.forked && !self.destroyed.contains(Slot(node as u8)) {
            // (One that a person gave up holds no point in time, and whoever forces it is told so.)
            result = self.is_a_point_in_time(node, &view);
        }
        self.settled_set = set;
        if result.is_ok() && !self.forked && !forced {
            self.settle(now, node, &view);
        } else {
            for tenure in &mut self.tenures {
                tenure.official = false;
            }
            self.rebase(now, set, view.clone());
            self.forked = true;
        }
        self.tenures.push(Tenure {
            node,
            official: true,
            stale: false,
            epoch,
            snapshot: view,
        });
        result
    }

    fn settle(&mut self, now: u64, node: usize, view: &[Vec<u64>]) {
        for (volume, held) in view.iter().enumerate() {
            // What the base explains, certain or not, is what it is from here on.
            for (sector, value) in held.iter().enumerate() {
                if self.base[volume][sector] != *value
                    && self.explain(volume, sector as u64, *value, node) == Some(None)
                {
                    self.base[volume][sector] = *value;
                }
            }
            let sectors: Vec<u64> = self.history[volume].keys().copied().collect();
            for sector in sectors {
                let value = held[sector as usize];
                let found = self.explain(volume, sector, value, node).flatten();
                let entries = self.history[volume]
                    .get(&sector)
                    .cloned()
                    .unwrap_or_default();
                let mut kept: Vec<Entry> = Vec::new();
                for (at, entry) in entries.iter().enumerate() {
                    let keep = found.is_some_and(|x| at == x || self.before(&entries, at, x));
                    if keep
                        && (Some(at) == found
                            || entry.settled.is_some()
                            || self.acknowledged(entry).is_some())
                    {
                        kept.push(*entry);
                    } else if !keep
                        && self.acknowledged(entry).is_some()
                        && found.is_none_or(|x| self.before(&entries, x, at))
                    {
                        self.dead.insert((entry.write, sector));
                    }
                }
                // The one found is the newest.
                if let Some(x) = found {
                    let write = entries[x].write;
                    kept.retain(|e| e.write != write);
                    kept.push(entries[x]);
                }
                for entry in &mut kept {
                    let at = self.writes[entry.write as usize]
                        .acknowledged
                        .unwrap_or(now);
                    entry.settled.get_or_insert(at);
                }
                self.history[volume].insert(sector, kept);
            }
        }
    }

    /// From here on only what this copy holds counts.
    pub fn rebase(&mut self, now: u64, set: SlotSet, view: Vec<Vec<u64>>) {
        self.base = view;
        self.base_at = now;
        self.base_certain = false;
        self.base_set = set;
        for history in &mut self.history {
            history.clear();
        }
    }

    /// D3: what a copy holds must be a cut of the order in which things completed.
    fn is_a_point_in_time(&self, node: usize, view: &[Vec<u64>]) -> Result<(), String> {
        let volatile = self
            .cache_lost
            .union(self.filled_by_loser)
            .contains(Slot(node as u8));
        let mut newest = (0, 0);
        for (volume, sectors) in view.iter().enumerate() {
            for sector in self.all[volume].keys() {
                let value = sectors[*sector as usize];
                if value > 0
                    && let Some(w) = self.writes.get(value as usize - 1)
                {
                    newest = newest.max((w.invoked, value));
                }
            }
        }
        // What completed (after a power cut: what was flushed) before the newest visible write was asked for.
        let boundary = if volatile {
            self.flushes
                .iter()
                .filter(|f| f.1 < newest.0)
                .map(|f| f.0)
                .max()
                .unwrap_or(0)
        } else {
            newest.0
        };
        for (volume, sectors) in self.all.iter().enumerate() {
            for (sector, ids) in sectors {
                let value = view[volume][*sector as usize];
                let must: Vec<&Write> = ids
                    .iter()
                    .filter(|id| !self.dead.contains(&(**id, *sector)))
                    .map(|id| &self.writes[*id as usize])
                    .filter(|w| {
                        w.acknowledged
                            .is_some_and(|a| a < boundary && a >= self.base_at)
                    })
                    .collect();
                let explained = |w: &Write| {
                    w.value == value
                        && !must
                            .iter()
                            .any(|y| w.ended.is_some_and(|e| e < y.invoked) && y.value != value)
                };
                let by_write = ids.iter().any(|id| explained(&self.writes[*id as usize]));
                if !by_write && !must.is_empty() {
                    return Err(format!(
                        "D3: node {node} was promoted by force and is no point in time: it holds write {} (asked {}) but in volume {volume} sector {sector} only {value}, although {} completed before (power lost there: {volatile}); {}",
                        newest.1,
                        ms(newest.0),
                        must.iter()
                            .map(|w| w.value.to_string())
                            .collect::<Vec<_>>()
                            .join(", "),
                        self.describe(volume, *sector)
                    ));
                }
            }
        }
        Ok(())
    }

    /// A read at a primary returned `values`.
    ///
    /// # Errors
    /// No write the application may still see explains a value.
    #[allow(clippy::too_many_arguments)]
    pub fn read_ended(
        &mut self,
        node: usize,
        tenure: Option<usize>,
        volume: usize,
        first: u64,
        values: &[u64],
        invoked: u64,
        now: u64,
    ) -> Result<(), String> {
        let Some(tenure) = tenure else { return Ok(()) };
        if !self.current(tenure) || self.tenure_of(node) != Some(tenure) {
            // A replaced primary may read old data: without an agent nothing bounds that.
            return Ok(());
        }
        self.checked_reads += 1;
        for (i, value) in values.iter().enumerate() {
            let sector = first + i as u64;
            let mut entries = self.history[volume].remove(&sector).unwrap_or_default();
            let known = |e: &Entry| {
                let acknowledged = self.acknowledged(e);
                // What a write that ended with an error leaves nobody can say, not even who read it while it was under way: the disk that
                // it was read from may be gone, and the copy that serves now never got it.
                let ended = self.writes[e.write as usize].ended;
                let seen = e.seen.filter(|_| ended.is_none() || acknowledged.is_some());
                match (acknowledged, seen) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                }
            };
            let is_known: Vec<bool> = entries
                .iter()
                .map(|e| known(e).is_some_and(|k| k < invoked))
                .collect();
            let found = (0..entries.len()).rev().find(|x| {
                self.writes[entries[*x].write as usize].value == *value
                    && !(0..entries.len())
                        .any(|y| y != *x && is_known[y] && self.before(&entries, *x, y))
            });
            let base = self.base[volume][sector as usize] == *value && !is_known.contains(&true);
            if let Some(x) = found {
                entries[x].seen.get_or_insert(now);
            }
            if !entries.is_empty() {
                self.history[volume].insert(sector, entries);
            }
            if found.is_none() && !base {
                return Err(format!(
                    "a read at node {node} asked {} returned {value} from volume {volume} sector {sector}: {}",
                    ms(invoked),
                    self.describe(volume, sector)
                ));
            }
        }
        Ok(())
    }

    /// The copies that must have everything, as the primary whose writes count has it: those whose
    /// acknowledgement it waits for, and those it would leave to go on without it.
    pub fn held_by(&mut self, node: usize, set: SlotSet) {
        if self.current_node() == Some(node) {
            self.holders = set;
        }
    }

    /// A person gave up what this copy holds: its disk was replaced, or it was told to take another's data. What no
    /// other copy has to have is gone, and nobody broke a promise.
    /// `mixtures`: copies in the middle of a resync, which hold no point in time without their source.
    pub fn given_up(&mut self, now: u64, node: usize, mixtures: SlotSet) {
        self.destroyed = self.destroyed.with(Slot(node as u8));
        self.given_up_at[node] = Some(now);
        self.unclean(now);
        if self.tenures.is_empty() {
            return;
        }
        let gone = self.destroyed.union(mixtures);
        if self.holders.iter().all(|s| gone.contains(s)) {
            self.forked = true;
        }
    }

    /// A copy takes what it lacks from another.
    pub fn filled_from(&mut self, node: usize, source: usize) {
        if self.lost_since[source].is_some() || self.filled_by_loser.contains(Slot(source as u8)) {
            self.filled_by_loser = self.filled_by_loser.with(Slot(node as u8));
        }
    }

    /// The copy is whole again.
    pub fn filled_again(&mut self, node: usize) {
        self.destroyed = self.destroyed.without(Slot(node as u8));
    }

    /// After a fork all copies are equal again, beside the primary `node`: whichever branch it is, its writes count
    /// from here on, and everything reads as it does now or as what is in flight there will leave it.
    pub fn joined(&mut self, now: u64, node: usize, set: SlotSet, view: Vec<Vec<u64>>) {
        if !std::mem::take(&mut self.forked) {
            return;
        }
        let Some(tenure) = self.tenure_of(node) else {
            return;
        };
        for (at, other) in self.tenures.iter_mut().enumerate() {
            other.official = at == tenure;
        }
        self.rebase(now, set, view);
        self.settled_set = set;
        self.holders = set;
        self.destroyed = SlotSet::EMPTY;
        for (id, write) in self.writes.iter().enumerate() {
            if write.tenure != tenure || write.ended.is_some() {
                continue;
            }
            for sector in write.first..write.first + write.count {
                let entry = Entry {
                    write: id as WriteId,
                    settled: None,
                    seen: None,
                };
                self.history[write.volume]
                    .entry(sector)
                    .or_default()
                    .push(entry);
                let all = self.all[write.volume].entry(sector).or_default();
                if !all.contains(&(id as WriteId)) {
                    all.push(id as WriteId);
                }
            }
        }
    }

    /// The node lost what only its memory (semi-sync) or its disk's cache held.
    pub fn lost_power(&mut self, now: u64, node: usize) {
        self.cache_lost = self.cache_lost.with(Slot(node as u8));
        self.lost_memory(now, node);
    }

    /// It lost what only its memory held.
    pub fn lost_memory(&mut self, now: u64, node: usize) {
        self.lost_since[node] = Some(now);
        self.unclean(now);
    }

    /// The node's process ended; its disk has all it was given.
    pub fn killed(&mut self, now: u64, node: usize) {
        self.killed_since[node] = Some(now);
        self.unclean(now);
    }

    fn unclean(&mut self, now: u64) {
        // For what others kept in a cache, a copy that was given up is one that lost it.
        let lost = self.lost_since.iter().zip(&self.given_up_at);
        let lost = lost.map(|(l, g)| (*l).max(*g)).collect();
        self.losses.push((now, lost, self.killed_since.clone()));
    }

    /// Both copies were seen equal and established: what one had lost is back.
    pub fn seen_equal(&mut self, a: usize, b: usize) {
        for node in [a, b] {
            self.lost_since[node] = None;
            self.killed_since[node] = None;
            self.given_up_at[node] = None;
            self.filled_by_loser = self.filled_by_loser.without(Slot(node as u8));
            self.cache_lost = self.cache_lost.without(Slot(node as u8));
        }
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
