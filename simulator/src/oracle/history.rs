//! What a sector may hold: which writes come before which, and which a copy may not lack.

use super::{Entry, Oracle, ms};
use holdfast_wire_format::ids::{Slot, SlotSet};

impl Oracle {
    pub(super) fn acknowledged(&self, entry: &Entry) -> Option<u64> {
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

    pub(super) fn before(&self, entries: &[Entry], x: usize, y: usize) -> bool {
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
    pub(super) fn prune(&mut self, volume: usize, sector: u64) {
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
    pub(super) fn explain(
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

    pub(super) fn describe(&self, volume: usize, sector: u64) -> String {
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
}
