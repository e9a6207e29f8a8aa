//! What a copy that begins to serve may hold, and how the history goes on from there.

use super::{Entry, Oracle, Tenure, Write, ms};
use holdfast_wire_format::ids::{Slot, SlotSet};

impl Oracle {
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
}
