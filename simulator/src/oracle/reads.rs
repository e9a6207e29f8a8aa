//! What a read may return.

use super::{Entry, Oracle, ms};

impl Oracle {
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
}
