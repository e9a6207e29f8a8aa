//! Order of overlapping operations in flight (D4): of two that touch the same bytes, the one inserted first
//! finishes first, on every copy, so that both copies end with the same bytes.
//!
//! Whatever must have a range to itself is registered: writes, zeroes, locks, and the *exclusive readers*, which
//! are the reads of a resync or of a verify (what they read is sent as the block's content, so no write may be
//! half-way through it). A plain client read is not registered: a disk promises nothing about a read that races
//! with a write either.

/// One operation that has not finished.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// First byte, and first byte behind it.
    start: u64,
    end: u64,
    op: usize,
    /// Overlapping earlier operations that have not finished.
    waits_for: u32,
    volume: u16,
}

impl Entry {
    /// Whether the two share a byte; an empty range shares none.
    fn shares(&self, volume: u16, start: u64, end: u64) -> bool {
        self.volume == volume
            && self.start.max(start) < self.end.min(end)
            && !planted!("overlap-ignored")
    }
}

/// The operations of one service in flight, in order of arrival.
///
/// A few hundred entries of 32 bytes at most, so one contiguous array and a linear scan beat any tree, and
/// nothing allocates once the array has grown to the depth of the service.
#[derive(Clone, Debug, Default)]
pub struct OverlapIndex {
    entries: Vec<Entry>,
}

impl OverlapIndex {
    /// No operation in flight.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers an operation on `length` bytes from byte `offset` of a volume, behind all that are registered.
    ///
    /// Returns how many earlier unfinished operations it must wait for; with 0 it may start at once, otherwise
    /// [`remove`](Self::remove) names it when it may. `op` must not be registered already. A length of 0 waits
    /// for nobody.
    pub fn insert(&mut self, op: usize, volume: u16, offset: u64, length: u64) -> usize {
        debug_assert!(
            !self.contains(op),
            "operation {op} is in the overlap index already"
        );
        let end = offset.saturating_add(length);
        let waits_for = self
            .entries
            .iter()
            .filter(|e| e.shares(volume, offset, end))
            .count();
        self.entries.push(Entry {
            start: offset,
            end,
            op,
            waits_for: waits_for as u32,
            volume,
        });
        waits_for
    }

    /// Takes out an operation that finished (or was given up while it still waited) and appends to `ready`, in
    /// order of arrival, those that now wait for nobody. Returns whether it was registered.
    pub fn remove(&mut self, op: usize, ready: &mut Vec<usize>) -> bool {
        let Some(at) = self.entries.iter().position(|e| e.op == op) else {
            return false;
        };
        let gone = self.entries.remove(at);
        // Only later ones can have waited for it.
        for later in &mut self.entries[at..] {
            if later.shares(gone.volume, gone.start, gone.end) {
                later.waits_for -= 1;
                if later.waits_for == 0 {
                    ready.push(later.op);
                }
            }
        }
        true
    }

    /// Whether an unfinished operation touches any of these bytes.
    #[must_use]
    pub fn touches(&self, volume: u16, offset: u64, length: u64) -> bool {
        let end = offset.saturating_add(length);
        self.entries.iter().any(|e| e.shares(volume, offset, end))
    }

    /// Whether `op` is registered.
    #[must_use]
    pub fn contains(&self, op: usize) -> bool {
        self.entries.iter().any(|e| e.op == op)
    }

    /// Operations registered, waiting ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if nothing is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets everything, keeping the memory.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn d4_later_overlapping_operation_waits_for_all_earlier_ones() {
        let mut index = OverlapIndex::new();
        let mut ready = Vec::new();
        assert_eq!(index.insert(1, 0, 0, 8192), 0);
        assert_eq!(
            index.insert(2, 0, 8192, 4096),
            0,
            "neighbours do not overlap"
        );
        assert_eq!(index.insert(3, 0, 4096, 8192), 2);
        assert_eq!(index.insert(4, 1, 0, 1 << 20), 0, "another volume");
        assert_eq!(index.insert(5, 0, 4096, 512), 2);
        assert!(index.remove(1, &mut ready));
        assert!(ready.is_empty());
        assert!(index.remove(2, &mut ready));
        assert_eq!(ready, [3]);
        ready.clear();
        assert!(index.remove(3, &mut ready));
        assert_eq!(ready, [5]);
        assert!(!index.remove(3, &mut ready));
    }

    #[test]
    fn an_empty_range_waits_for_nobody_and_holds_up_nobody() {
        let mut index = OverlapIndex::new();
        let mut ready = Vec::new();
        index.insert(1, 0, 0, 8192);
        assert_eq!(index.insert(2, 0, 4096, 0), 0);
        assert_eq!(index.insert(3, 0, 0, 8192), 1);
        index.remove(2, &mut ready);
        assert!(ready.is_empty());
        index.remove(1, &mut ready);
        assert_eq!(ready, [3]);
    }

    #[test]
    fn becoming_ready_keeps_the_order_of_arrival() {
        let mut index = OverlapIndex::new();
        let mut ready = Vec::new();
        index.insert(9, 0, 0, 1 << 20);
        for op in [7, 3, 8, 1] {
            index.insert(op, 0, op as u64 * 4096, 4096);
        }
        index.remove(9, &mut ready);
        assert_eq!(ready, [7, 3, 8, 1]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert {
            volume: u16,
            offset: u64,
            length: u64,
        },
        Remove {
            pick: usize,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let insert =
            (0u16..2, 0u64..12, 0u64..5).prop_map(|(volume, offset, length)| Step::Insert {
                volume,
                offset,
                length,
            });
        let remove = any::<usize>().prop_map(|pick| Step::Remove { pick });
        proptest::collection::vec(prop_oneof![3 => insert, 2 => remove], 0..120)
    }

    proptest! {
        /// D4 against the definition: an operation may run exactly when no earlier unfinished one overlaps it,
        /// and it is announced exactly once, at the moment that becomes true.
        #[test]
        fn d4_ready_means_no_earlier_overlap(steps in steps()) {
            let mut index = OverlapIndex::new();
            let mut model: Vec<(usize, u16, u64, u64)> = Vec::new();
            let mut running: Vec<usize> = Vec::new();
            let may_run = |model: &[(usize, u16, u64, u64)], at: usize| {
                let (_, volume, start, end) = model[at];
                !model[..at].iter().any(|e| e.1 == volume && e.2.max(start) < e.3.min(end))
            };
            for (op, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Insert { volume, offset, length } => {
                        let waits = index.insert(op, volume, offset, length);
                        model.push((op, volume, offset, offset + length));
                        prop_assert_eq!(waits == 0, may_run(&model, model.len() - 1));
                        if waits == 0 {
                            running.push(op);
                        }
                    }
                    Step::Remove { pick } => {
                        if model.is_empty() {
                            continue;
                        }
                        // Also those that still wait: an aborted session removes them.
                        let (gone, ..) = model.remove(pick % model.len());
                        running.retain(|r| *r != gone);
                        let mut ready = Vec::new();
                        prop_assert!(index.remove(gone, &mut ready));
                        let expected: Vec<usize> = (0..model.len())
                            .filter(|at| may_run(&model, *at) && !running.contains(&model[*at].0))
                            .map(|at| model[at].0)
                            .collect();
                        prop_assert_eq!(&ready, &expected);
                        running.extend(ready);
                    }
                }
                prop_assert_eq!(index.len(), model.len());
            }
        }
    }
}
