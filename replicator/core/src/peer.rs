//! What this copy knows of one other copy, and how it stands to it at the moment.

use crate::api::{SessionId, Time};
use crate::bitmap::DirtyBitmap;
use holdfast_wire_format::frame::{Facts, Hello};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Generation, Mode};
use std::collections::VecDeque;

/// Where the two copies stand; the picture is in `docs/core.md`.
#[derive(Clone, Debug)]
pub(crate) enum Relation {
    Down,
    /// Waiting for a superblock commit before our facts can be told, then for theirs.
    Greeting {
        sent: Option<Box<Facts>>,
        theirs: Option<Box<Hello>>,
    },
    /// Nothing to copy: waiting for the other's `Ready`.
    Agreeing,
    /// Recording durably that we are a target.
    TargetPreparing,
    Target,
    /// Waiting for the target's bits and its `Ready`.
    SourceWaiting,
    /// `Ready` came; S without the target is being committed.
    SourceStarting,
    Source,
    /// The target is Complete; everything up to `through` must be acknowledged, then S is committed with it.
    Joining {
        through: Position,
        committing: bool,
    },
    Established,
    /// Neither may be the other's source: meet again from time to time, a third copy may change that.
    Waiting {
        since: Time,
    },
    /// The meeting ended without agreement.
    Refused,
}

impl Relation {
    pub fn name(&self) -> &'static str {
        match self {
            Relation::Down => "down",
            Relation::Greeting { .. } => "greeting",
            Relation::Agreeing => "agreeing",
            Relation::TargetPreparing => "target-preparing",
            Relation::Target => "target",
            Relation::SourceWaiting => "source-waiting",
            Relation::SourceStarting => "source-starting",
            Relation::Source => "source",
            Relation::Joining { .. } => "joining",
            Relation::Established => "established",
            Relation::Waiting { .. } => "waiting",
            Relation::Refused => "refused",
        }
    }
}

/// Bytes of resync the source has read or sent and the target has not made durable.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    /// Names it while it is read.
    pub id: u64,
    /// Its place in the stream, given when it is sent; 0 before.
    pub sequence: u64,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u32,
    pub state: ChunkState,
    /// Written meanwhile without being mirrored: its bits stay (D8).
    pub redirtied: bool,
    /// Asked for by digest before it is sent.
    pub compare: bool,
    pub buf: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ChunkState {
    /// Behind overlapping writes.
    Waiting,
    Reading,
    /// The target compares it with what it holds.
    Compared,
    Sent,
    Acked,
}

/// The source's side of a resync.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceState {
    pub chunks: VecDeque<Chunk>,
    pub next_id: u64,
    pub next_sequence: u64,
    /// Where the next run is looked for.
    pub cursor: (usize, u64),
    pub total_bytes: u64,
    pub done_bytes: u64,
    pub outstanding_bytes: u64,
    pub acked_unflushed_bytes: u64,
    pub flush_sent: bool,
    pub done_sent: bool,
    pub done_position: Position,
    pub started: Time,
    pub pace: crate::pace::Pace,
    /// Bytes the target held already, by digest.
    pub equal_bytes: u64,
    /// Chunks in a row whose digests differed, and how many to send without asking because of that.
    pub compare_misses: u32,
    pub compare_skip: u32,
}

/// The target's side.
#[derive(Clone, Debug, Default)]
pub(crate) struct TargetState {
    /// Last resync sequence received, and last one begun.
    pub received_sequence: u64,
    pub begun_sequence: u64,
    /// What was received up to here has durable bits toward third copies.
    pub bits_saved: u64,
    pub received_bytes: u64,
    pub acks: Vec<(u64, u64)>,
    pub started: Time,
    /// Ranges that came or were found equal, with the sequence whose flush covers them: no bit toward the source names them from
    /// then on.
    pub landed: Vec<(u64, VolumeIndex, u64, u64)>,
    /// Where the source was when it said ResyncDone, and where its generation begins.
    pub done_position: Position,
    /// ResyncDone came: what follows it is mirrored writes of a copy that is about to be whole.
    pub finishing: bool,
    pub generation_base: Option<Position>,
    /// Third copies that hold what the source holds, as it says.
    pub equal: SlotSet,
    /// This copy was in the middle of a resync already, from whomever.
    pub goes_on: bool,
}

/// A run of the online comparison.
#[derive(Clone, Debug, Default)]
pub(crate) struct VerifyState {
    /// Volumes left: (index, next offset).
    pub volume: usize,
    pub only: Option<VolumeIndex>,
    pub offset: u64,
    /// Of this run; 0 before the first one.
    pub first_sequence: u64,
    pub next_sequence: u64,
    pub outstanding: Vec<VerifyChunk>,
    pub total_bytes: u64,
    pub done_bytes: u64,
    pub different_bytes: u64,
    pub running: bool,
    pub admin: Option<crate::api::AdminId>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct VerifyChunk {
    pub sequence: u64,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u32,
    pub buf: u64,
}

/// A frame received and not yet begun, in stream order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Received {
    /// Slab key of an `ApplyOp`.
    Apply(usize),
    Flush {
        position: Position,
        dependency: Position,
    },
    ResyncDone {
        position: Position,
    },
}

/// The receiving side of a session: what came, in stream order.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// The session all of it came by.
    pub session: u64,
    /// That session ended; what may still be applied is, then the inbox is done with.
    pub orphan: bool,
    /// What an asynchronous copy received and had not been told to be stable when the session ended stays in the queue for a
    /// person who forces this copy. The epoch and generation it came in.
    pub kept: Option<(Epoch, GenerationId)>,
    /// Forced: the queue is applied beyond the stable position.
    pub apply_all: bool,
    /// Not yet begun.
    pub queue: VecDeque<Received>,
    pub queued_bytes: u64,
    /// Tickets of begun, unfinished operations, oldest first, with their positions.
    pub begun: VecDeque<(u64, Position, bool)>,
    pub next_ticket: u64,
    /// Last position received in the order.
    pub last_position: Position,
    /// The primary's stable position as last told.
    pub stable: Position,
    /// The primary told whom it has in S in this session. What was known before is of another time.
    pub in_sync_heard: bool,
    /// It was demoted: what came after this position a member of S may lack.
    pub owed_after: Option<Position>,
    pub write_acks: Vec<(u64, u64)>,
    pub received_ack: bool,
    /// Flushes begun that wait for what is before them: (ticket, position, resync sequence).
    pub pending_flushes: Vec<(u64, Position, u64)>,
    /// Tickets of flushes given to the local flush.
    pub flushing: Vec<u64>,
}

impl Inbox {
    /// Writes in the queue that are kept for a person who forces this copy.
    pub fn kept_writes(&self) -> usize {
        if self.kept.is_none() {
            return 0;
        }
        let queue = self.queue.iter();
        queue.filter(|r| matches!(r, Received::Apply(_))).count()
    }

    /// All received positions up to here are on this copy's disk.
    pub fn applied_through(&self) -> Position {
        self.begun
            .iter()
            .find(|b| !b.2 && b.1 > 0)
            .map_or(Position::MAX, |b| b.1 - 1)
    }
}

/// One other copy.
#[derive(Debug)]
pub(crate) struct Peer {
    /// S and its version as that copy had them when we met.
    pub their_in_sync: (SlotSet, u64),
    /// The cluster's record as read for this meeting; `Some(None)`: it was not to be had.
    pub met_record: Option<Option<crate::handshake::StoreRecord>>,
    pub slot: Slot,
    pub node: Uuid,
    /// Index of its record in the superblock.
    pub record: usize,
    /// The mode of replication toward it while we are primary.
    pub mode: Mode,
    /// Members of S that may not have heard that this copy joined it, and up to which position that says nothing.
    pub unaware: Vec<(Slot, Position)>,
    /// The mode it uses toward us, as it said.
    pub their_mode: Mode,
    pub wanted: bool,
    pub session: Option<SessionId>,
    pub relation: Relation,
    /// Of the frames sent to it: what both sides agreed on in this session, the oldest one spoken before that.
    pub wire_version: u8,
    pub bitmaps: Vec<DirtyBitmap>,
    pub their_state: Option<CopyState>,
    pub their_incarnation: Incarnation,
    pub their_disk: Uuid,
    pub their_attach_counter: u64,
    /// Its history as it said, and what it added since.
    pub their_generations: Vec<Generation>,
    pub their_generations_cut: bool,
    /// The newest generation of ours that it was told in this session, with our facts or later.
    pub told_generation: GenerationId,
    pub is_primary: bool,
    /// It was primary when its session ended and what it sent is still being applied.
    pub was_primary: bool,
    /// Flush-acknowledged through here in the present session.
    pub flushed: Position,
    pub ready_received: bool,
    /// Where the other side's count of positions stood with its `Ready`.
    pub ready_position: Position,
    pub bits_received: bool,
    pub unacked_bytes: u64,
    /// Bytes given to the link and not yet drained.
    pub queued_bytes: u64,
    pub oldest_unacked: Option<Position>,
    /// Since when the bitmap has named blocks that it lacks; as far back as the oldest write among them, where that is known.
    pub behind_since: Option<Time>,
    /// Some of those blocks were named before this copy was attached: it lacks them for longer than `behind_since` says.
    pub behind_before: bool,
    /// Volumes, one bit each, whose disk there could not be read throughout by the last verify.
    pub unread: u64,
    pub source: SourceState,
    pub target: TargetState,
    pub verify: VerifyState,
    pub inbox: Inbox,
    pub last_heard: Time,
    pub last_sent: Time,
    pub stable_told: Position,
    /// An async peer fell too far behind: nothing is sent until what was sent is acknowledged.
    pub congested: bool,
    pub resync_paused: bool,
    /// What the last meeting came to, and in words.
    pub row: Option<crate::handshake::Row>,
    /// The session was ended to meet again, and the next one has not begun.
    pub again_since: Option<Time>,
    /// This copy filled it, without being primary, and they did not meet since.
    pub filled: bool,
    /// This copy was filled by that primary up to here: what it marked meanwhile toward members of S goes when this is stable.
    pub forget_at: Option<Position>,
    /// Filled whole by this copy, without a primary, under this version of S: whoever S names in that slot was another disk.
    pub stranger: Option<u64>,
    /// It can grow its volumes while they are in use.
    pub grows: bool,
    pub handshake: String,
    /// When that was.
    pub met: Option<Time>,
    pub last_error: String,
    /// `decide` said full copy.
    pub full_copy: bool,
    /// Most of what the bits toward it name is likely to be equal: they stand for a lack of knowledge.
    pub compare: bool,
    /// Waits for stability to make room in its activity log.
    pub wants_stable: bool,
    pub up_since: Time,
    /// The sequence of the last `Flush` frame: nothing new to make durable.
    pub flush_asked: Position,
    /// It is primary and its disk failed: it goes on through ours (D13).
    pub diskless: bool,
}

impl Peer {
    pub fn dirty_bits(&self) -> u64 {
        self.bitmaps.iter().map(DirtyBitmap::count).sum()
    }
    pub fn dirty_bytes(&self) -> u64 {
        self.bitmaps.iter().map(DirtyBitmap::bytes).sum()
    }
    /// It acknowledged a write: what it was told before, it knows.
    pub fn knows_since(&mut self, other: Slot, position: Position) {
        self.unaware
            .retain(|(slot, told)| *slot != other || position <= *told);
    }
    /// What came from it is acknowledged from memory, before it is on the disk: only if both sides were told so. Whoever does it
    /// must know, after an unclean stop, that it did (C2).
    pub fn memory_counts(&self) -> bool {
        self.mode == Mode::SemiSync && self.their_mode == Mode::SemiSync
    }
    pub fn on(&self, session: SessionId) -> bool {
        self.session == Some(session)
    }
}

/// Adds one number to sorted, disjoint, inclusive runs; fast when it extends the last.
pub(crate) fn add_run(runs: &mut Vec<(u64, u64)>, n: u64) {
    if let Some(last) = runs.last_mut() {
        if n == last.1 + 1 {
            last.1 = n;
            return;
        }
        if n > last.1 {
            runs.push((n, n));
            return;
        }
        let at = runs.partition_point(|r| r.1 < n);
        if runs[at].0 <= n {
            return;
        }
        let joins_next = runs[at].0 == n + 1;
        let joins_previous = at > 0 && runs[at - 1].1 + 1 == n;
        match (joins_previous, joins_next) {
            (true, true) => {
                runs[at - 1].1 = runs[at].1;
                runs.remove(at);
            }
            (true, false) => runs[at - 1].1 = n,
            (false, true) => runs[at].0 = n,
            (false, false) => runs.insert(at, (n, n)),
        }
        return;
    }
    runs.push((n, n));
}

/// Whether a session that ends with this is ended to begin another one at once.
pub(crate) fn meets_at_once(code: holdfast_wire_format::frame::GoodbyeCode) -> bool {
    use holdfast_wire_format::frame::GoodbyeCode;
    matches!(code, GoodbyeCode::Again | GoodbyeCode::OldEpoch)
}

#[cfg(test)]
mod tests {
    use super::add_run;

    #[test]
    fn runs_stay_sorted_and_joined() {
        let mut runs = Vec::new();
        for n in [5, 6, 9, 7, 1, 3, 2, 8, 5] {
            add_run(&mut runs, n);
        }
        assert_eq!(runs, vec![(1, 3), (5, 9)]);
    }
}
