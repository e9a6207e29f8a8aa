//! Operations in flight and the window of writes that are not yet stable.

use crate::api::{BufId, RequestId};
use crate::resync_rate::Kind;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::undo_record::UndoEntry;
use std::collections::VecDeque;

/// What one peer has to do with one write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Leg {
    /// This peer does not concern it.
    None,
    /// Sent; the peer has not acknowledged it.
    InFlight,
    /// In the peer's memory (semi-sync counts it).
    Received,
    Acked,
    /// Not at the peer: its bits are set.
    Bits,
}

/// What an operation writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Data {
    Buf {
        buf: BufId,
        crc: u32,
        crc_known: bool,
    },
    Zero {
        unmap: bool,
    },
    Flush,
}

/// Where a write of the primary is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Behind an overlapping one (D4).
    Overlap,
    /// Behind the activity log (D6).
    Log,
    /// Given to disk and link.
    Issued,
}

/// A write, zero or flush of the primary.
#[derive(Clone, Debug)]
pub(crate) struct ClientOp {
    pub request: RequestId,
    /// The request has several pieces (large zeroes): it completes with the last.
    pub part_of_many: bool,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u64,
    pub data: Data,
    pub fua: bool,
    pub stage: Stage,
    pub position: Position,
    /// Local disk operations not yet answered.
    pub local_left: u32,
    pub local_failed: bool,
    pub legs: [Leg; MAX_COPIES],
    pub replied: bool,
    /// The buffer is kept until the reply (the primary has no disk: it may have to be sent again).
    pub holds_buf: bool,
    /// Made by the core itself (a stability flush): nobody to answer.
    pub internal: bool,
    /// Holds the overlap order.
    pub in_overlap: bool,
    /// Nanoseconds of the core's clock.
    pub arrived_at: u64,
    pub issued_at: u64,
}

impl ClientOp {
    /// How long it takes says something of the disks. Zeroes of any length do not compare.
    pub fn kind(&self) -> Option<Kind> {
        match self.data {
            Data::Buf { .. } => Some(Kind::Write),
            Data::Flush => Some(Kind::Flush),
            Data::Zero { .. } => None,
        }
    }
}

/// A frame of the primary or of a resync source on its way to this copy's disk.
#[derive(Clone, Debug)]
pub(crate) struct ApplyOp {
    pub peer: Slot,
    pub session: u64,
    /// Place in the receive order.
    pub ticket: u64,
    pub kind: ApplyKind,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u64,
    pub data: Data,
    pub fua: bool,
    pub position: Position,
    pub dependency: Position,
    pub in_overlap: bool,
    pub holds_log: bool,
    /// In the window: some other copy may lack it (D7).
    pub tracked: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ApplyKind {
    Write,
    Resync,
    /// Read and compare with the digest.
    Verify {
        sequence: u64,
        digest: u128,
    },
}

/// Everything the core waits for a disk for. The key in the slab is the `OpId`.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Read {
        request: RequestId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
        /// Nanoseconds of the core's clock.
        arrived_at: u64,
    },
    /// A read for a primary without a disk.
    ServeRead {
        peer: Slot,
        session: u64,
        id: u64,
        buf: BufId,
        length: u32,
    },
    Client(ClientOp),
    Lock {
        request: RequestId,
        granted: bool,
    },
    Apply(ApplyOp),
    /// One local flush of one volume, part of flush round `round`.
    LocalFlush,
    /// Source side of a resync: reading a chunk.
    ResyncRead {
        peer: Slot,
        session: u64,
        chunk: u64,
    },
    /// Source side of a verify.
    VerifyRead {
        peer: Slot,
        session: u64,
        sequence: u64,
    },
    Superblock,
    /// The superblock of a volume that is not the lead one.
    VolumeSuperblock {
        volume: usize,
    },
    ActivityLog {
        sequence: u64,
    },
    /// A block of the ring is being emptied.
    LogReset,
    BitmapPage {
        peer: usize,
        volume: usize,
        page: u64,
    },
    BitmapSummary {
        peer: usize,
        volume: usize,
        block: u64,
    },
    Undo {
        step: UndoStep,
    },
    /// Saving what only this copy has; no buffer: the end of it.
    Surplus {
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: Option<BufId>,
    },
}

/// What a step of saving or restoring old blocks is for.
#[derive(Clone, Debug)]
pub(crate) enum UndoStep {
    /// The head is being written.
    Head,
    /// The head is being erased.
    Drop,
    /// What stands behind the last record is being erased.
    Sweep,
    /// Reading what a write is about to overwrite.
    ReadOld {
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
    },
    /// Writing one entry of a record.
    Data {
        sequence: u64,
        buf: BufId,
    },
    Header {
        sequence: u64,
    },
    RestoreRead {
        entry: UndoEntry,
        buf: BufId,
    },
    RestoreWrite {
        volume: VolumeIndex,
        buf: Option<BufId>,
    },
}

/// One write that may not be stable everywhere yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub position: Position,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u64,
    /// Slab key of the operation, or `NO_OP` once all its legs are settled.
    pub op: u32,
    /// This copy's disk has it (in its cache at least).
    pub local_done: bool,
    /// Holds references on activity-log extents.
    pub holds_log: bool,
}

pub(crate) const NO_OP: u32 = u32::MAX;

/// Writes in order of position, oldest first (D7: what is in here may differ between copies).
#[derive(Default, Debug)]
pub(crate) struct Window {
    entries: VecDeque<Entry>,
    bytes: u64,
}

impl Window {
    pub fn push(&mut self, entry: Entry) {
        if let Some(last) = self.entries.back() {
            assert!(last.position < entry.position, "positions rise (D17)");
        }
        self.bytes += entry.length;
        self.entries.push_back(entry);
    }
    fn index(&self, position: Position) -> Option<usize> {
        let first = self.entries.front()?.position;
        // Dense at the primary: the guess is right almost always.
        let guess = usize::try_from(position.checked_sub(first)?).ok()?;
        if self
            .entries
            .get(guess)
            .is_some_and(|e| e.position == position)
        {
            return Some(guess);
        }
        let at = self.entries.partition_point(|e| e.position < position);
        (self.entries.get(at)?.position == position).then_some(at)
    }
    pub fn get_mut(&mut self, position: Position) -> Option<&mut Entry> {
        let at = self.index(position)?;
        self.entries.get_mut(at)
    }
    pub fn get(&self, position: Position) -> Option<&Entry> {
        self.entries.get(self.index(position)?)
    }
    /// Takes the oldest entry if it is finished and stable.
    pub fn pop_stable(&mut self, stable: Position) -> Option<Entry> {
        let first = self.entries.front()?;
        if first.position > stable || first.op != NO_OP || !first.local_done {
            return None;
        }
        self.bytes -= first.length;
        self.entries.pop_front()
    }
    pub fn clear(&mut self) -> Vec<Entry> {
        self.bytes = 0;
        self.entries.drain(..).collect()
    }
    /// Keys of the operations that are still under way, oldest first.
    pub fn ops(&self) -> Vec<u32> {
        let keys = self.entries.iter().map(|e| e.op);
        keys.filter(|op| *op != NO_OP).collect()
    }
    /// Everything above `position`, oldest first.
    pub fn above(&self, position: Position) -> impl Iterator<Item = &Entry> {
        let at = self.entries.partition_point(|e| e.position <= position);
        self.entries.range(at..)
    }
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
    /// All up to here are done on this copy's disk; `last` if everything is.
    pub fn local_done_through(&self, last: Position) -> Position {
        self.entries
            .iter()
            .find(|e| !e.local_done)
            .map_or(last, |e| e.position - 1)
    }
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// The position of the newest entry that writes anything; 0 if there is none.
    pub fn last_data(&self) -> Position {
        let data = self.entries.iter().rev().find(|e| e.length > 0);
        data.map_or(0, |e| e.position)
    }
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
