//! What was asked for and answered: each write goes into the history of its sectors, and what was acknowledged must be where it has to
//! be.

use super::{Entry, Oracle, RECENT, Write, WriteId};
use holdfast_wire_format::ids::{Slot, SlotSet};

impl Oracle {
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
}
