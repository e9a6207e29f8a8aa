//! What was lost with a copy's power, its process or its disk, given up by a person, and brought back since.

use super::{Entry, Oracle, WriteId};
use holdfast_wire_format::ids::{Slot, SlotSet};

impl Oracle {
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
}
