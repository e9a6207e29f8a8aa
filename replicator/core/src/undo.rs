//! The undo log of a resync target (D12): what blocks held before the resync first overwrote them, so that the
//! copy can return to the consistent point it was at.
//!
//! Pure bookkeeping over the undo area of the lead volume: which blocks are saved, where the next record goes, what
//! a rollback restores. The caller reads old blocks, writes what it is told to, and reports what became durable.
//! The order is the whole point, and each step is durable before the next:
//!
//! 1. the head ([`begin`](UndoLog::begin)), before anything is overwritten;
//! 2. the old data of a record ([`append`](UndoLog::append)), then its header: a header that can be read
//!    vouches for its data;
//! 3. the headers one after another ([`next_header`](UndoLog::next_header)), so that none is ever found behind
//!    the end of the log: it would come back to life when a later record ends just before it;
//! 4. the overwrite ([`check`](UndoLog::check) says when).
//!
//! A log that no longer reaches back is dropped durably before the first block is overwritten without it.

use crate::bitmap::DirtyBitmap;
use holdfast_wire_format::ids::VolumeIndex;
use holdfast_wire_format::undo_record::{
    FIRST_RECORD, MAX_UNDO_DATA, MAX_UNDO_ENTRIES, MAX_UNDO_LENGTH, OldContent, UNDO_BLOCK,
    UndoEntry, UndoError, UndoHead, UndoRecord, decode_head, decode_record, encode_head,
    encode_record,
};
use std::collections::VecDeque;

/// How far behind the end of the log a start looks for records that prove the end to be damage, in bytes: several
/// records of the largest size.
const LOOK_AHEAD: u64 = 8 * (MAX_UNDO_DATA + UNDO_BLOCK as u64);

/// Whether a write by resync or mirroring may overwrite its range now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    /// Every block of it is durably saved, or no undo is kept.
    Open,
    /// Some blocks were claimed by nobody yet: [`UndoLog::claim`] them, read and save them.
    Save,
    /// Another write's save, the head, or the drop of the log is under way: ask again when it is durable.
    Wait,
}

/// Where the log is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// No undo is kept: none was begun, or it was dropped.
    None,
    /// The head is being written.
    Beginning,
    /// After a start: what is behind the last record is being erased ([`UndoLog::sweep`]). A rollback is possible.
    Sweeping,
    Active,
    /// To be dropped once the write of the head, or the sweep, has ended: two writes of one block must not cross.
    DropWaits,
    /// The head is being erased; until that is durable nothing may be overwritten without being saved.
    Dropping,
}

/// The data of a record, to be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoWrite {
    pub sequence: u64,
    /// Where the data of each entry goes, in bytes from the start of the undo area, in the order of the entries;
    /// `None` for zeroes, which are not stored.
    pub data: Vec<Option<u64>>,
}

/// The header of a record, to be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeaderWrite {
    pub sequence: u64,
    /// In bytes from the start of the undo area.
    pub offset: u64,
    pub bytes: [u8; UNDO_BLOCK],
}

/// Why a record was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AppendError {
    /// Nothing changed. Drop the log and say so loudly, or pause the resync: mirrored writes become bits
    /// meanwhile and never wait for it.
    #[error(
        "the undo area of {capacity} bytes is full: {needed} bytes more are needed to keep the point before the resync"
    )]
    Full { needed: u64, capacity: u64 },
    #[error(transparent)]
    Record(#[from] UndoError),
}

/// One step of a rollback.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restore {
    /// What to restore: volume, range, and the checksum of the data or that it was zeroes.
    pub entry: UndoEntry,
    /// Where the data is, in bytes from the start of the undo area; `None` for zeroes.
    pub data_offset: Option<u64>,
}

#[derive(Clone, Debug)]
struct Record {
    offset: u64,
    record: UndoRecord,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    DataInFlight,
    /// The data is durable; the header waits for its turn.
    Ready,
    HeaderInFlight,
}

#[derive(Clone, Debug)]
struct VolumeIndexOf {
    /// Blocks that are saved or being saved.
    claimed: DirtyBitmap,
    /// Blocks whose old content is in a durable record.
    saved: DirtyBitmap,
}

/// The undo log of one service on one copy. Memory: 24 bytes per saved range, 2 bits per block in partly saved
/// pages of the index.
#[derive(Clone, Debug)]
pub struct UndoLog {
    phase: Phase,
    head: Option<UndoHead>,
    volumes: Vec<VolumeIndexOf>,
    /// Bytes of the undo area.
    capacity: u64,
    /// Where the next record goes.
    next_offset: u64,
    next_sequence: u64,
    /// Records that are durable.
    records: Vec<Record>,
    /// Records after those.
    pending: VecDeque<Record>,
    /// Writes of data and headers that were not answered, of a dropped log too.
    in_flight: usize,
    /// Where a record that was durable can't be read any more, in bytes from the start of the undo area.
    damaged_at: Option<u64>,
}

impl UndoLog {
    /// No undo. `volumes` gives size in bytes and grain shift of every volume of the service, by index;
    /// `capacity` is the size of the undo area in bytes (0: none).
    #[must_use]
    pub fn new(volumes: &[(u64, u8)], capacity: u64) -> Self {
        let index = |(size, grain): &(u64, u8)| {
            // A block is never larger than an entry, so it is always saved by one record.
            let grain = (*grain).min(MAX_UNDO_LENGTH.ilog2() as u8);
            // Unbounded: here "saved" is the claim that would be dangerous if it said too much.
            let none = DirtyBitmap::new(*size, grain, usize::MAX);
            VolumeIndexOf {
                claimed: none.clone(),
                saved: none,
            }
        };
        UndoLog {
            phase: Phase::None,
            head: None,
            volumes: volumes.iter().map(index).collect(),
            capacity,
            next_offset: FIRST_RECORD,
            next_sequence: 1,
            records: Vec::new(),
            pending: VecDeque::new(),
            in_flight: 0,
            damaged_at: None,
        }
    }

    /// Reads the undo area after a start: `read` gives 4096 bytes at an offset of it. The records end at the
    /// first block that is no next record of the session; what was being written there protects nothing yet.
    ///
    /// Unless a later record of the session stands behind it: headers are written one after another, so the one that
    /// is missing was durable, and what it saved was overwritten since. Without it a rollback would lead to a mixture, so
    /// there is no log then, and [`damaged_at`](Self::damaged_at) says where. Damage to the newest record alone looks
    /// like a record that was being written.
    ///
    /// # Errors
    /// The one of `read`.
    pub fn recover<E>(
        volumes: &[(u64, u8)],
        capacity: u64,
        mut read: impl FnMut(u64) -> Result<[u8; UNDO_BLOCK], E>,
    ) -> Result<Self, E> {
        let mut log = Self::new(volumes, capacity);
        if capacity < FIRST_RECORD + UNDO_BLOCK as u64 {
            return Ok(log);
        }
        let Ok(head) = decode_head(&read(0)?) else {
            return Ok(log);
        };
        log.head = Some(head);
        log.phase = Phase::Active;
        while log.next_offset + UNDO_BLOCK as u64 <= capacity {
            let block = read(log.next_offset)?;
            // A header that is torn here could be made whole by sectors of the next one, when that is torn too,
            // and would vouch for data that is no longer there.
            log.phase = if block == [0; UNDO_BLOCK] {
                Phase::Active
            } else {
                Phase::Sweeping
            };
            let Ok(record) = decode_record(&block) else {
                break;
            };
            let fits = log.next_offset + record.size() <= capacity;
            let known = record
                .entries
                .iter()
                .all(|e| (e.volume.0 as usize) < volumes.len());
            if !(fits && known && record.follows(&head, log.next_sequence - 1)) {
                break;
            }
            for entry in &record.entries {
                log.volumes[entry.volume.0 as usize]
                    .claimed
                    .set(entry.offset, entry.length.into());
            }
            let record = log.place(record);
            log.keep(record);
            log.phase = Phase::Active;
        }
        if log.goes_on_behind(&head, &mut read)? {
            let mut none = Self::new(volumes, capacity);
            none.damaged_at = Some(log.next_offset);
            return Ok(none);
        }
        Ok(log)
    }

    /// Whether a record of the session stands behind the end of the log.
    fn goes_on_behind<E>(
        &self,
        head: &UndoHead,
        read: &mut impl FnMut(u64) -> Result<[u8; UNDO_BLOCK], E>,
    ) -> Result<bool, E> {
        let end = self.capacity.min(self.next_offset + LOOK_AHEAD);
        let mut at = self.next_offset;
        while at + UNDO_BLOCK as u64 <= end {
            let of_this_session =
                |r: UndoRecord| r.session == head.session && r.sequence >= self.next_sequence;
            if decode_record(&read(at)?).is_ok_and(of_this_session) {
                return Ok(true);
            }
            at += UNDO_BLOCK as u64;
        }
        Ok(false)
    }

    /// Where a record that was durable can't be read any more, in bytes from the start of the undo area.
    #[must_use]
    pub fn damaged_at(&self) -> Option<u64> {
        self.damaged_at
    }

    /// Where the log is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }
    /// What the log undoes and where it leads to, from [`begin`](Self::begin) until it is dropped.
    #[must_use]
    pub fn head(&self) -> Option<&UndoHead> {
        self.head.as_ref()
    }
    /// True if a rollback leads to the state the head names: the log was begun durably and was not dropped.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        matches!(self.phase, Phase::Active | Phase::Sweeping)
    }
    /// Bytes of the undo area in use, head included.
    #[must_use]
    pub fn used(&self) -> u64 {
        if self.head.is_some() {
            self.next_offset
        } else {
            0
        }
    }
    /// Bytes of the undo area.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Starts a session: the head, to be written at offset 0 of the area. What the area held counts no more.
    /// `None` if the area can't hold any record: then no undo is kept.
    ///
    /// # Panics
    /// If a session is under way (roll it back or drop it first) or [`can_begin`](Self::can_begin) says no.
    pub fn begin(&mut self, head: UndoHead) -> Option<[u8; UNDO_BLOCK]> {
        assert_eq!(
            self.phase,
            Phase::None,
            "an undo log is begun on top of another one"
        );
        assert_eq!(
            self.in_flight, 0,
            "records of the last undo log are still being written"
        );
        if self.capacity < FIRST_RECORD + 2 * UNDO_BLOCK as u64 {
            return None;
        }
        self.forget();
        self.phase = Phase::Beginning;
        self.head = Some(head);
        Some(encode_head(&head))
    }

    /// Whether nothing of an earlier session is under way: a late write of one of its records would land among
    /// those of the new one.
    #[must_use]
    pub fn can_begin(&self) -> bool {
        self.phase == Phase::None && self.in_flight == 0
    }

    /// The head is durable. If the log was to be dropped meanwhile: the block that erases it.
    pub fn begun(&mut self) -> Option<[u8; UNDO_BLOCK]> {
        match self.phase {
            Phase::Beginning => {
                self.phase = Phase::Active;
                None
            }
            Phase::DropWaits => {
                self.phase = Phase::Dropping;
                Some([0; UNDO_BLOCK])
            }
            phase => panic!("no head of the undo log was being written, it is {phase:?}"),
        }
    }

    /// After [`recover`](Self::recover): where 4096 zeroes are to be written in the area before the log goes on, if
    /// anywhere. To be written right after the start: until then nothing can be saved or dropped. A rollback does not
    /// need it.
    #[must_use]
    pub fn sweep(&self) -> Option<u64> {
        (self.phase == Phase::Sweeping).then_some(self.next_offset)
    }

    /// The zeroes of [`sweep`](Self::sweep) are durable. If the log was to be dropped meanwhile: the block that
    /// erases it.
    pub fn swept(&mut self) -> Option<[u8; UNDO_BLOCK]> {
        match self.phase {
            Phase::Sweeping => {
                self.phase = Phase::Active;
                None
            }
            Phase::DropWaits => {
                self.phase = Phase::Dropping;
                Some([0; UNDO_BLOCK])
            }
            phase => panic!("nothing was being erased behind the undo log, it is {phase:?}"),
        }
    }

    /// Whether this range may be overwritten now (D12). An empty range always may.
    #[must_use]
    pub fn check(&self, volume: VolumeIndex, offset: u64, length: u64) -> Gate {
        let index = &self.volumes[volume.0 as usize];
        if self.phase == Phase::None || index.saved.all_set(offset, length) {
            Gate::Open
        } else if self.phase == Phase::Active && !index.claimed.all_set(offset, length) {
            Gate::Save
        } else {
            Gate::Wait
        }
    }

    /// Claims the blocks of this range that nobody saves yet: from here on other writes to them wait. Returns
    /// the ranges to read and to save, in bytes, whole blocks, cut at the end of the volume and at
    /// [`MAX_UNDO_LENGTH`]. No write to them can be in flight, because it would have claimed them.
    pub fn claim(&mut self, volume: VolumeIndex, offset: u64, length: u64) -> Vec<(u64, u32)> {
        let mut ranges = Vec::new();
        if self.phase != Phase::Active {
            return ranges;
        }
        let claimed = &mut self.volumes[volume.0 as usize].claimed;
        let end = offset.saturating_add(length).min(claimed.size());
        if offset >= end {
            return ranges;
        }
        let last = (end - 1) >> claimed.grain_shift();
        let mut at = offset >> claimed.grain_shift();
        while at <= last {
            let (taken, bits) = claimed.next_run(at, u64::MAX).unwrap_or((u64::MAX, 0));
            let gap_end = taken.min(last + 1);
            let (mut from, mut left) = claimed.byte_range(at, gap_end - at);
            while left > 0 {
                let piece = left.min(MAX_UNDO_LENGTH.into());
                ranges.push((from, piece as u32));
                from += piece;
                left -= piece;
            }
            at = taken.saturating_add(bits);
        }
        for (offset, length) in &ranges {
            claimed.set(*offset, u64::from(*length));
        }
        ranges
    }

    /// Gives back what was claimed and not appended: its old content could not be read, or the log was full and
    /// the resync pauses.
    pub fn unclaim(&mut self, volume: VolumeIndex, offset: u64, length: u64) {
        let index = &mut self.volumes[volume.0 as usize];
        debug_assert!(
            !index.saved.any_set(offset, length),
            "a saved block is given back"
        );
        index.claimed.clear(offset, length);
    }

    /// Places a record of claimed ranges at the end of the log: those that [`claim`](Self::claim) returned, or
    /// parts of them that are cut between blocks. At most [`MAX_UNDO_ENTRIES`] entries and [`MAX_UNDO_DATA`]
    /// bytes of data.
    ///
    /// # Errors
    /// [`AppendError::Full`], or entries that make no record; nothing changed then, and they stay claimed.
    ///
    /// # Panics
    /// If no session is active, or a range was not claimed or is no whole blocks.
    pub fn append(&mut self, entries: Vec<UndoEntry>) -> Result<UndoWrite, AppendError> {
        let (Phase::Active, Some(head)) = (self.phase, self.head) else {
            panic!(
                "a record is appended to an undo log that is {:?}",
                self.phase
            );
        };
        let sequence = self.next_sequence;
        let record = UndoRecord {
            session: head.session,
            target_of: head.target_of,
            sequence,
            entries,
        };
        // Only to know that it will be encodable.
        encode_record(&record)?;
        let size = record.size();
        if size > self.capacity - self.next_offset {
            return Err(AppendError::Full {
                needed: size,
                capacity: self.capacity,
            });
        }
        for entry in &record.entries {
            self.assert_whole(entry);
        }
        let record = self.place(record);
        let data = data_offsets(record.offset, &record.record).collect();
        self.pending.push_back(record);
        self.in_flight += 1;
        Ok(UndoWrite { sequence, data })
    }

    /// All data of that record is durable (or it has none): its header may follow. Ask
    /// [`next_header`](Self::next_header).
    ///
    /// # Panics
    /// If no such data is being written.
    pub fn data_saved(&mut self, sequence: u64) {
        self.answered();
        if self.phase == Phase::Active {
            self.advance(sequence, Stage::DataInFlight, Stage::Ready);
        }
    }

    /// The header to write now, if any: ask after [`data_saved`](Self::data_saved) and after
    /// [`saved`](Self::saved).
    pub fn next_header(&mut self) -> Option<HeaderWrite> {
        let first = self
            .pending
            .front_mut()
            .filter(|r| r.stage == Stage::Ready && self.phase == Phase::Active)?;
        first.stage = Stage::HeaderInFlight;
        self.in_flight += 1;
        // `append` has encoded it once.
        let bytes = encode_record(&first.record).ok()?;
        Some(HeaderWrite {
            sequence: first.record.sequence,
            offset: first.offset,
            bytes,
        })
    }

    /// The header of that record is durable, and so its blocks are saved: waiting writes are to be checked again.
    /// Returns whether they are (not if the log was dropped meanwhile).
    ///
    /// # Panics
    /// If that header is not being written.
    pub fn saved(&mut self, sequence: u64) -> bool {
        self.answered();
        if self.phase != Phase::Active {
            return false;
        }
        match self.pending.pop_front() {
            Some(r) if r.record.sequence == sequence && r.stage == Stage::HeaderInFlight => {
                self.keep(r)
            }
            _ => {
                panic!("the header of undo record {sequence} became durable without being written")
            }
        }
        true
    }

    /// Data or header could not be written: its blocks never become saved, nor those of later records. What is
    /// left is to drop the log, or to treat the disk as failed.
    pub fn save_failed(&mut self) {
        self.answered();
    }

    /// Stops keeping an undo: the block to be written at offset 0 of the area. Until [`dropped`](Self::dropped),
    /// blocks that are not saved can't be overwritten: after a crash the old head would promise a rollback to a
    /// point that is partly gone. `None` if there is none to drop, if that is being done already, or if the head
    /// or the sweep is still being written ([`begun`](Self::begun) or [`swept`](Self::swept) then gives the block).
    ///
    /// Writes under way are still answered as before.
    pub fn drop_log(&mut self) -> Option<[u8; UNDO_BLOCK]> {
        match self.phase {
            Phase::None | Phase::DropWaits | Phase::Dropping => None,
            Phase::Beginning | Phase::Sweeping => {
                self.phase = Phase::DropWaits;
                None
            }
            Phase::Active => {
                self.phase = Phase::Dropping;
                Some([0; UNDO_BLOCK])
            }
        }
    }

    /// The erased head is durable.
    pub fn dropped(&mut self) {
        assert_eq!(self.phase, Phase::Dropping, "no undo log was being dropped");
        self.phase = Phase::None;
        self.forget();
    }

    /// Every range that a rollback restores: volume, offset and length in bytes, in order. Their dirty bits toward
    /// the source are to be durable before the first one is restored (D12), and a resync that goes on after a
    /// partial rollback has to copy them again.
    pub fn undone(&self) -> impl Iterator<Item = (VolumeIndex, u64, u64)> + '_ {
        self.volumes.iter().enumerate().flat_map(|(at, index)| {
            let mut from = 0;
            std::iter::from_fn(move || {
                let (first, bits) = index.saved.next_run(from, u64::MAX)?;
                from = first + bits;
                let (offset, length) = index.saved.byte_range(first, bits);
                Some((VolumeIndex(at as u16), offset, length))
            })
        })
    }

    /// What a rollback does, newest record first, so that the oldest content of a block is written last. Doing it
    /// again, wholly or from any step, gives the same. One step after the other where ranges meet.
    ///
    /// When all is restored and flushed: the superblock says `Consistent` and `rolled_back`, durably; then the
    /// log is dropped; only then may anything be written, or a second rollback would undo that too.
    pub fn rollback_plan(&self) -> impl Iterator<Item = Restore> + '_ {
        self.records.iter().rev().flat_map(|r| {
            let steps: Vec<Restore> = r
                .record
                .entries
                .iter()
                .zip(data_offsets(r.offset, &r.record))
                .map(|(entry, data_offset)| Restore {
                    entry: *entry,
                    data_offset,
                })
                .collect();
            steps.into_iter().rev()
        })
    }

    /// A volume grew. The new area had no old content to return to, but it is treated like any other.
    pub fn grow(&mut self, volume: VolumeIndex, size: u64) {
        let index = &mut self.volumes[volume.0 as usize];
        index.claimed.grow(size);
        index.saved.grow(size);
    }

    /// A block half of which is in another record would count as saved too early.
    fn assert_whole(&self, entry: &UndoEntry) {
        let index = &self.volumes[entry.volume.0 as usize];
        let grain = 1u64 << index.claimed.grain_shift();
        let (length, end) = (
            u64::from(entry.length),
            entry.offset + u64::from(entry.length),
        );
        let whole = entry.offset.is_multiple_of(grain)
            && (end.is_multiple_of(grain) || end == index.claimed.size());
        let claimed = index.claimed.all_set(entry.offset, length)
            && !index.saved.any_set(entry.offset, length);
        assert!(
            whole && claimed,
            "D12: an undo record has a range that was not claimed for it: {entry:?}"
        );
    }

    fn answered(&mut self) {
        assert!(
            self.in_flight > 0,
            "no record of the undo log was being written"
        );
        self.in_flight -= 1;
    }

    fn advance(&mut self, sequence: u64, from: Stage, to: Stage) {
        match self
            .pending
            .iter_mut()
            .find(|r| r.record.sequence == sequence && r.stage == from)
        {
            Some(record) => record.stage = to,
            None => panic!("undo record {sequence} was not {from:?}"),
        }
    }

    fn place(&mut self, record: UndoRecord) -> Record {
        let offset = self.next_offset;
        self.next_offset += record.size();
        self.next_sequence = record.sequence + 1;
        Record {
            offset,
            record,
            stage: Stage::DataInFlight,
        }
    }

    fn keep(&mut self, record: Record) {
        for entry in &record.record.entries {
            self.volumes[entry.volume.0 as usize]
                .saved
                .set(entry.offset, entry.length.into());
        }
        self.records.push(record);
    }

    fn forget(&mut self) {
        self.head = None;
        self.records.clear();
        self.pending.clear();
        self.next_offset = FIRST_RECORD;
        self.next_sequence = 1;
        for index in &mut self.volumes {
            index.claimed.clear_all();
            index.saved.clear_all();
        }
    }
}

fn data_offsets(header_offset: u64, record: &UndoRecord) -> impl Iterator<Item = Option<u64>> + '_ {
    record
        .entries
        .iter()
        .zip(record.data_ranges())
        .map(move |(entry, range)| match entry.content {
            OldContent::Saved { .. } => Some(header_offset + range.start),
            OldContent::Zero => None,
        })
}

/// Whether one more range of that length fits into a record that has `entries` entries and `bytes` of data.
#[must_use]
pub fn record_has_room(entries: usize, bytes: u64, length: u32) -> bool {
    entries < MAX_UNDO_ENTRIES && bytes + u64::from(length) <= MAX_UNDO_DATA
}

#[cfg(test)]
mod tests;
