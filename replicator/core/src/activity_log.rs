//! The activity log: the extents of a service whose blocks may differ between copies after a crash (D7).
//!
//! An extent is *hot* once a transaction that names it is durable; only then may data be written into it (D6). It
//! stays hot while a write into it is not stable, and longer: extents cool only to make room, the longest unused
//! one first, several in one transaction. The blocks form a ring; each holds up to 64 changes of slots and, in
//! turn, the contents of some more slots, so that the ring always tells the contents of all of them, even with
//! its newest block torn. `docs/metadata-in-memory.md` has the states of a slot.

use holdfast_wire_format::activity_log::{
    self as layout, CONTEXT, ExtentKey, LogBlock, MAX_SLOTS, UPDATES,
};
use std::collections::BTreeMap;

const NO_SLOT: u16 = u16::MAX;

/// One block to be written to the ring. One at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transaction {
    pub sequence: u64,
    /// Which block of the ring, from 0.
    pub ring_block: u32,
    pub bytes: [u8; 4096],
    /// Hot once this is durable.
    pub added: Vec<ExtentKey>,
    /// Cold once this is durable.
    pub evicted: Vec<ExtentKey>,
    /// Wanted, and neither hot nor added: no room in this block or no slot could be freed.
    pub still_waiting: Vec<ExtentKey>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Empty,
    Hot,
    /// A transaction in flight gives the slot to another extent. Still in the set, but no new write may rely on
    /// it.
    Leaving,
    /// A transaction that gave it away, or may have, was not seen to become durable and may yet turn out to be:
    /// its write failed, or it was found torn after a start. As `Leaving`, until the next transaction has taken
    /// its place.
    Doubtful,
}

#[derive(Clone, Copy, Debug)]
struct SlotEntry {
    state: State,
    key: Option<ExtentKey>,
    /// Writes into it that are not stable.
    references: u32,
    /// Neighbours among the unreferenced ones.
    colder: u16,
    warmer: u16,
}

#[derive(Clone, Debug)]
struct Pending {
    sequence: u64,
    changes: Vec<(u16, ExtentKey)>,
}

/// The hot extents of one service.
#[derive(Clone, Debug)]
pub struct ActivityLog {
    slots: Vec<SlotEntry>,
    by_key: BTreeMap<ExtentKey, u16>,
    /// Empty slots, the next one to use last.
    free: Vec<u16>,
    /// Ends of the list of unreferenced slots, by last use.
    coldest: u16,
    warmest: u16,
    ring_blocks: u32,
    next_sequence: u64,
    pending: Option<Pending>,
}

impl ActivityLog {
    /// Slots of a ring of so many blocks: all it can carry, since all contents must be in the ring without the
    /// block that is being overwritten. 8 blocks carry 2884 slots; with extents of 4 MiB a crash then costs a
    /// resync of 11 GiB at most, so a longer ring trades fewer transactions for a longer resync.
    #[must_use]
    pub fn slots_for(ring_blocks: u32) -> usize {
        (ring_blocks.saturating_sub(1) as usize)
            .saturating_mul(CONTEXT)
            .min(MAX_SLOTS)
    }

    /// An empty log on a ring of `ring_blocks` zeroed blocks.
    ///
    /// # Panics
    /// If the ring is too short for `slots`, or `slots` is 0 or above [`MAX_SLOTS`].
    #[must_use]
    pub fn new(slots: usize, ring_blocks: u32) -> Self {
        assert!(
            (1..=MAX_SLOTS).contains(&slots),
            "{slots} slots of the activity log are outside 1..={MAX_SLOTS}"
        );
        assert!(
            slots <= Self::slots_for(ring_blocks),
            "a ring of {ring_blocks} blocks can't carry {slots} slots of the activity log"
        );
        let empty = SlotEntry {
            state: State::Empty,
            key: None,
            references: 0,
            colder: NO_SLOT,
            warmer: NO_SLOT,
        };
        ActivityLog {
            slots: vec![empty; slots],
            by_key: BTreeMap::new(),
            free: (0..slots as u16).rev().collect(),
            coldest: NO_SLOT,
            warmest: NO_SLOT,
            ring_blocks,
            next_sequence: 1,
            pending: None,
        }
    }

    /// Whether a write may rely on this extent being in the durable log (D6).
    #[must_use]
    pub fn is_hot(&self, key: ExtentKey) -> bool {
        self.by_key
            .get(&key)
            .is_some_and(|slot| self.slots[*slot as usize].state == State::Hot)
    }

    /// Keeps a hot extent hot until [`release`](Self::release): a write into it is not stable.
    ///
    /// # Panics
    /// If the extent is not hot.
    pub fn hold(&mut self, key: ExtentKey) {
        assert!(self.is_hot(key), "D6: {key:?} is held without being hot");
        let slot = self.by_key[&key];
        if self.slots[slot as usize].references == 0 {
            self.unlink(slot);
        }
        self.slots[slot as usize].references += 1;
    }

    /// Holds all of them, or none if one is not hot. An extent named twice is held twice.
    pub fn try_hold(&mut self, keys: &[ExtentKey]) -> bool {
        let hot = keys.iter().all(|k| self.is_hot(*k));
        if hot {
            for key in keys {
                self.hold(*key);
            }
        }
        hot
    }

    /// A write into it became stable (or was never submitted).
    ///
    /// # Panics
    /// If the extent is not held.
    pub fn release(&mut self, key: ExtentKey) {
        let slot = self.by_key.get(&key).copied().unwrap_or(NO_SLOT);
        let held = slot != NO_SLOT && self.slots[slot as usize].references > 0;
        assert!(held, "{key:?} is released without being held");
        self.slots[slot as usize].references -= 1;
        if self.slots[slot as usize].references == 0 {
            self.link_warmest(slot);
        }
    }

    /// Every extent that the durable log may name as hot, in order (D7): those whose cooling is under way too.
    #[must_use]
    pub fn hot_extents(&self) -> Vec<ExtentKey> {
        self.by_key.keys().copied().collect()
    }

    /// How many [`hot_extents`](Self::hot_extents) there are.
    #[must_use]
    pub fn hot_count(&self) -> usize {
        self.by_key.len()
    }

    /// Slots in all.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// A transaction was begun and neither committed nor aborted.
    #[must_use]
    pub fn in_flight(&self) -> bool {
        self.pending.is_some()
    }

    /// Prepares the next block: as many of the wanted extents as it and the slots can take.
    ///
    /// `wanted` are the extents of all waiting writes, the longest waiting write first; name its hot ones as
    /// well, so that they are not cooled while it waits for the others. `may_evict` says whether an extent may
    /// cool: whether all bits in it are durable toward every peer (D7).
    ///
    /// `None` if a transaction is in flight, if all wanted are hot, or else because no slot can be freed: the
    /// caller then makes writes stable and bits durable, and asks again.
    pub fn begin_transaction(
        &mut self,
        wanted: &[ExtentKey],
        mut may_evict: impl FnMut(ExtentKey) -> bool,
    ) -> Option<Transaction> {
        if self.pending.is_some() {
            return None;
        }
        let mut rank: BTreeMap<ExtentKey, usize> = BTreeMap::new();
        for (at, key) in wanted.iter().enumerate() {
            rank.entry(*key).or_insert(at);
        }
        let mut changes: Vec<(u16, ExtentKey)> = Vec::new();
        let mut evicted = Vec::new();
        let mut still_waiting = Vec::new();
        // What was refused once is not asked again in this round.
        let mut candidate = self.coldest;
        let mut last_resort = wanted.len();
        for (at, &key) in wanted.iter().enumerate() {
            if rank[&key] != at {
                continue;
            }
            let present = self.by_key.get(&key).copied();
            if present.is_some_and(|slot| self.slots[slot as usize].state == State::Hot) {
                continue;
            }
            if changes.len() == UPDATES {
                still_waiting.push(key);
                continue;
            }
            if let Some(slot) = present {
                // Doubtful: said again. (Leaving: given away a moment ago to a write that waits longer.)
                if self.slots[slot as usize].state == State::Doubtful {
                    changes.push((slot, key));
                } else {
                    still_waiting.push(key);
                }
                continue;
            }
            if let Some(slot) = self.free.pop() {
                changes.push((slot, key));
                continue;
            }
            let mut found = None;
            while candidate != NO_SLOT && found.is_none() {
                let slot = candidate;
                candidate = self.slots[slot as usize].warmer;
                if let Some(old) = self.slots[slot as usize].key
                    && !rank.contains_key(&old)
                    && may_evict(old)
                {
                    found = Some((slot, old));
                }
            }
            // Everything else is held: then those that wait longest win over those that came last, or two
            // writes could each hold back what the other lacks.
            while found.is_none() && last_resort > at + 1 {
                last_resort -= 1;
                let old = wanted[last_resort];
                let slot = self
                    .by_key
                    .get(&old)
                    .copied()
                    .filter(|s| self.slots[*s as usize].references == 0);
                if let Some(slot) = slot
                    && rank[&old] == last_resort
                    && self.slots[slot as usize].state != State::Leaving
                    && may_evict(old)
                {
                    found = Some((slot, old));
                }
            }
            match found {
                Some((slot, old)) => {
                    self.unlink(slot);
                    self.slots[slot as usize].state = State::Leaving;
                    evicted.push(old);
                    changes.push((slot, key));
                }
                None => still_waiting.push(key),
            }
        }
        if changes.is_empty() {
            return None;
        }
        let sequence = self.next_sequence;
        let updates = changes
            .iter()
            .map(|(slot, key)| (*slot, Some(*key)))
            .collect();
        let bytes = self.encode(sequence, updates, &changes);
        let added = changes.iter().map(|(_, key)| *key).collect();
        self.pending = Some(Pending { sequence, changes });
        Some(Transaction {
            sequence,
            ring_block: self.ring_block(sequence),
            bytes,
            added,
            evicted,
            still_waiting,
        })
    }

    /// The transaction is durable: what it added is hot, what it evicted is out of the set.
    ///
    /// # Panics
    /// If that transaction is not in flight.
    pub fn commit(&mut self, sequence: u64) {
        let pending = self.take_pending(sequence);
        for (slot, key) in pending.changes {
            if self.slots[slot as usize].state == State::Doubtful {
                continue;
            }
            if let Some(old) = self.slots[slot as usize].key.replace(key) {
                self.by_key.remove(&old);
            }
            self.by_key.insert(key, slot);
            self.slots[slot as usize].state = State::Hot;
            self.link_warmest(slot);
        }
        // The failed block was overwritten by this one.
        for entry in &mut self.slots {
            if entry.state == State::Doubtful {
                entry.state = State::Hot;
            }
        }
        self.next_sequence += 1;
    }

    /// The write failed, and the disk may hold the transaction or not: what it would have added is not hot, and
    /// what it would have evicted stays in the set without being relied on. The next transaction takes its place
    /// in the ring.
    ///
    /// # Panics
    /// If that transaction is not in flight.
    pub fn abort(&mut self, sequence: u64) {
        let pending = self.take_pending(sequence);
        for (slot, _) in pending.changes.into_iter().rev() {
            match self.slots[slot as usize].state {
                State::Empty => self.free.push(slot),
                State::Leaving => {
                    self.slots[slot as usize].state = State::Doubtful;
                    self.link_coldest(slot);
                }
                State::Hot | State::Doubtful => {}
            }
        }
    }

    /// Reads the ring after a start, of a log with so many slots: `blocks` gives each block by its place. The log goes on with what was hot
    /// (and need not be rewritten). The second value is true if the ring is damaged, so that extents may be
    /// missing: then every block of every volume has to be taken as dirty, and once that is durable the ring is
    /// to be rewritten with [`reset`](Self::reset).
    ///
    /// # Panics
    /// If the ring has fewer than 2 blocks.
    #[must_use]
    pub fn recover<'a>(
        slots: usize,
        ring_blocks: u32,
        blocks: impl Iterator<Item = (u32, &'a [u8])>,
    ) -> (Self, bool) {
        Self::new(slots, ring_blocks).recovered(blocks)
    }

    fn recovered<'a>(mut self, blocks: impl Iterator<Item = (u32, &'a [u8])>) -> (Self, bool) {
        let mut ring = vec![Found::Damaged; self.ring_blocks as usize];
        for (at, bytes) in blocks.filter(|(at, _)| *at < self.ring_blocks) {
            ring[at as usize] = self.read_block(at, bytes);
        }
        match self.replay(&ring) {
            Some(newest) => {
                self.next_sequence = newest + 1;
                let next = self.ring_block(self.next_sequence) as usize;
                if matches!(ring[next], Found::Damaged) {
                    // Torn, perhaps; its successor, torn too, could make it whole, and what it evicted would be
                    // cold. Nothing is relied on before that successor is durable.
                    for entry in &mut self.slots {
                        if entry.state == State::Hot {
                            entry.state = State::Doubtful;
                        }
                    }
                }
                (self, false)
            }
            None => {
                let newest = ring.iter().filter_map(Found::sequence).max().unwrap_or(0);
                let mut fresh = Self::new(self.slots.len(), self.ring_blocks);
                // Away from everything the ring holds, so that old and new blocks are never taken for one run.
                fresh.next_sequence = newest + 2 * u64::from(self.ring_blocks);
                (fresh, true)
            }
        }
    }

    /// The blocks that durably empty the whole ring, to be written in this order, each durable before the next.
    /// What the log knew is forgotten, so all it stood for must be durable as bits before (D7).
    ///
    /// # Panics
    /// If a transaction is in flight or an extent is held.
    pub fn reset(&mut self) -> Vec<(u32, [u8; 4096])> {
        assert!(
            self.pending.is_none(),
            "the activity log is emptied while a transaction is in flight"
        );
        assert!(
            self.slots.iter().all(|s| s.references == 0),
            "the activity log is emptied while extents are held"
        );
        let first = self.next_sequence;
        *self = Self::new(self.slots.len(), self.ring_blocks);
        self.next_sequence = first + u64::from(self.ring_blocks);
        (first..self.next_sequence)
            .map(|s| (self.ring_block(s), self.encode(s, Vec::new(), &[])))
            .collect()
    }

    // --- inside ---

    fn ring_block(&self, sequence: u64) -> u32 {
        (sequence % u64::from(self.ring_blocks)) as u32
    }

    fn take_pending(&mut self, sequence: u64) -> Pending {
        match self.pending.take() {
            Some(pending) if pending.sequence == sequence => pending,
            other => panic!(
                "activity-log transaction {sequence} ended, in flight is {:?}",
                other.map(|p| p.sequence)
            ),
        }
    }

    /// Slots whose contents transaction `sequence` carries along.
    fn context_of(&self, sequence: u64) -> (u16, usize) {
        let count = CONTEXT.min(self.slots.len());
        let first = sequence.wrapping_mul(count as u64) % self.slots.len() as u64;
        (first as u16, count)
    }

    fn encode(
        &self,
        sequence: u64,
        updates: Vec<(u16, Option<ExtentKey>)>,
        changes: &[(u16, ExtentKey)],
    ) -> [u8; 4096] {
        let (first, count) = self.context_of(sequence);
        let context = (0..count)
            .map(|at| {
                let slot = (first as usize + at) % self.slots.len();
                let changed = changes.iter().find(|(s, _)| *s as usize == slot);
                changed.map(|(_, key)| *key).or(self.slots[slot].key)
            })
            .collect();
        let slots = self.slots.len() as u16;
        layout::encode(&LogBlock {
            sequence,
            slots,
            updates,
            context_start: first,
            context,
        })
    }

    fn read_block(&self, at: u32, bytes: &[u8]) -> Found {
        if bytes.iter().all(|b| *b == 0) {
            return Found::Blank;
        }
        let block = <&[u8; 4096]>::try_from(bytes)
            .ok()
            .and_then(|b| layout::decode(b).ok());
        let belongs = |b: &LogBlock| {
            b.sequence > 0
                && self.ring_block(b.sequence) == at
                && b.slots as usize == self.slots.len()
        };
        block.filter(belongs).map_or(Found::Damaged, Found::Valid)
    }

    /// Fills the slots from the ring. `None` if it does not tell the contents of every slot.
    fn replay(&mut self, ring: &[Found]) -> Option<u64> {
        let blocks = ring.len() as u64;
        let newest = ring.iter().filter_map(Found::sequence).max().unwrap_or(0);
        // The block behind the newest may be torn: its write was not acknowledged. Those that were not being
        // written must be what they have to be, or blocks newer than "the newest" may have been there and are
        // lost: the next one of an older round, or all of them in the first round.
        let next = &ring[((newest + 1) % blocks) as usize];
        let before_next = (newest + 1).checked_sub(blocks).filter(|s| *s > 0);
        if !matches!(next, Found::Damaged) && next.sequence() != before_next {
            return None;
        }
        if (newest + 2..=blocks).any(|s| !matches!(ring[(s % blocks) as usize], Found::Blank)) {
            return None;
        }
        if let Some(older) = (newest + 2).checked_sub(blocks).filter(|s| *s > 0)
            && ring[(older % blocks) as usize].sequence() != Some(older)
        {
            return None;
        }
        let mut contents: Vec<Option<Option<ExtentKey>>> = vec![None; self.slots.len()];
        let mut open = contents.len();
        let mut sequence = newest;
        // From the newest back: what is known of a slot first is the newest.
        while open > 0 && sequence > 0 {
            let Found::Valid(block) = &ring[(sequence % blocks) as usize] else {
                return None;
            };
            if block.sequence != sequence {
                return None;
            }
            let (first, count) = self.context_of(sequence);
            if block.context_start != first || block.context.len() != count {
                return None;
            }
            let carried = block
                .context
                .iter()
                .enumerate()
                .map(|(at, key)| (((first as usize + at) % self.slots.len()) as u16, *key));
            for (slot, key) in block.updates.iter().copied().chain(carried) {
                let content = contents.get_mut(slot as usize)?;
                if content.is_none() {
                    *content = Some(key);
                    open -= 1;
                }
            }
            sequence -= 1;
        }
        self.free.clear();
        for (slot, content) in contents.into_iter().enumerate().rev() {
            // Before the first transaction every slot was empty.
            let Some(key) = content.flatten() else {
                self.free.push(slot as u16);
                continue;
            };
            if self.by_key.insert(key, slot as u16).is_some() {
                return None;
            }
            self.slots[slot].key = Some(key);
            self.slots[slot].state = State::Hot;
            self.link_warmest(slot as u16);
        }
        Some(newest)
    }

    fn unlink(&mut self, slot: u16) {
        let SlotEntry { colder, warmer, .. } = self.slots[slot as usize];
        match colder {
            NO_SLOT => self.coldest = warmer,
            _ => self.slots[colder as usize].warmer = warmer,
        }
        match warmer {
            NO_SLOT => self.warmest = colder,
            _ => self.slots[warmer as usize].colder = colder,
        }
        self.slots[slot as usize].colder = NO_SLOT;
        self.slots[slot as usize].warmer = NO_SLOT;
    }

    fn link_warmest(&mut self, slot: u16) {
        let before = std::mem::replace(&mut self.warmest, slot);
        self.slots[slot as usize].colder = before;
        self.slots[slot as usize].warmer = NO_SLOT;
        match before {
            NO_SLOT => self.coldest = slot,
            _ => self.slots[before as usize].warmer = slot,
        }
    }

    fn link_coldest(&mut self, slot: u16) {
        let before = std::mem::replace(&mut self.coldest, slot);
        self.slots[slot as usize].warmer = before;
        self.slots[slot as usize].colder = NO_SLOT;
        match before {
            NO_SLOT => self.warmest = slot,
            _ => self.slots[before as usize].colder = slot,
        }
    }
}

/// What one block of the ring turned out to be.
#[derive(Clone, Debug)]
enum Found {
    /// Never written since the area was zeroed.
    Blank,
    Damaged,
    Valid(LogBlock),
}

impl Found {
    fn sequence(&self) -> Option<u64> {
        match self {
            Found::Valid(transaction) => Some(transaction.sequence),
            Found::Blank | Found::Damaged => None,
        }
    }
}

#[cfg(test)]
mod tests;
