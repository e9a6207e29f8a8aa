//! A snapshot of what a copy knows, for people and for metrics.

use crate::api::Role;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Generation, Mode, OnPeerLoss};

/// All a copy can say of its service at one moment.
#[derive(Clone, Debug)]
pub struct ServiceStatus {
    pub name: String,
    pub service: Uuid,
    pub slot: Slot,
    pub role: Role,
    pub epoch: Epoch,
    pub state: CopyState,
    pub generations: Vec<Generation>,
    /// Last position issued (primary) or applied (secondary).
    pub position: Position,
    /// Flushed by every member of S.
    pub stable_position: Position,
    pub in_sync: SlotSet,
    pub in_sync_pending: SlotSet,
    pub on_peer_loss: OnPeerLoss,
    /// Client writes wait because a member of S is missing and the policy says suspend.
    pub parked: bool,
    /// Client writes waiting, and why, in words; empty when none.
    pub parked_reason: String,
    /// I/O held by a person or an agent.
    pub suspended: bool,
    pub unclean_start: bool,
    pub volumes: Vec<VolumeStatus>,
    pub peers: Vec<PeerStatus>,
    pub hot_extents: usize,
    /// While this copy is in the middle of a resync, connected or not: whether it can return to the point before it.
    pub undo: Option<UndoStatus>,
    pub counters: Counters,
}

/// The way back of a copy that is in the middle of a resync (D12).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UndoStatus {
    /// A forced promotion returns to the point before the resync. False: this copy is a mixture until its source is back.
    pub intact: bool,
    /// Generation and position of that point.
    pub returns_to: (GenerationId, Position),
    /// Bytes of the undo area in use, and all of it.
    pub used_bytes: u64,
    pub capacity_bytes: u64,
    /// Why it is not intact, in words; empty if it is.
    pub why_lost: String,
}

#[derive(Clone, Debug)]
pub struct VolumeStatus {
    pub index: VolumeIndex,
    pub name: String,
    pub size: u64,
    pub sector_size: u32,
    pub disk: Uuid,
    /// A verify could not read all of it from this copy's disk, and none has since.
    pub unread: bool,
}

#[derive(Clone, Debug)]
pub struct PeerStatus {
    pub slot: Slot,
    pub node: Uuid,
    pub mode: Mode,
    pub link: LinkState,
    /// As the peer said when we last met it.
    pub state: Option<CopyState>,
    pub is_primary: bool,
    /// Blocks the peer lacks, in bytes, and those not yet acknowledged.
    pub dirty_bytes: u64,
    pub unacknowledged_bytes: u64,
    /// For how long the peer has lacked something, in ms: the age of the oldest write it has not acknowledged, whether that is
    /// on its way, parked, or only bits in the bitmap. Where it lacks something from before this copy was attached, counted from there.
    pub lag_ms: u64,
    /// It lacks something from before this copy was attached: for longer than `lag_ms`, and the core cannot know for how long.
    pub lag_from_before: bool,
    /// Volumes whose disk there a verify could not read throughout, and none has since.
    pub unread: Vec<VolumeIndex>,
    pub resync: Option<ResyncStatus>,
    pub verify: Option<VerifyStatus>,
    /// What the last handshake decided, in words.
    pub handshake: String,
    /// How long ago that was, in ms.
    pub met_ms_ago: Option<u64>,
    pub last_error: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// Told not to connect.
    Off,
    Connecting,
    Handshake,
    /// Mirrored, bits left to copy.
    Resync,
    /// Mirrored, nothing left to copy.
    Established,
}

#[derive(Clone, Copy, Debug)]
pub struct ResyncStatus {
    pub is_source: bool,
    pub total_bytes: u64,
    pub left_bytes: u64,
    pub done_bytes: u64,
    pub paused: bool,
    pub started_ms_ago: u64,
    /// Bytes per second: at the source over the last ten seconds, at the target since it began.
    pub rate: u64,
    /// Bytes per second that it is held to at present, for the application's sake or as configured; none: nothing holds it back.
    /// Known at the source alone.
    pub rate_limit: Option<u64>,
    /// Bytes per second by which less is left, over the last ten seconds: what was copied, less what the application wrote over it
    /// meanwhile. Below zero: more is left. `None` while nothing can be said. Known at the source alone.
    pub gain: Option<i64>,
    /// When nothing is left, if it goes on like this; `None` while nothing can be said, and where `gain` is not above zero.
    pub eta_ms: Option<u64>,
    pub undo_intact: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct VerifyStatus {
    pub total_bytes: u64,
    pub done_bytes: u64,
    pub different_bytes: u64,
    pub running: bool,
}

/// Since the process began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub zeroes: u64,
    pub replicated_writes: u64,
    pub replicated_bytes: u64,
    pub resync_bytes: u64,
    /// Bytes a full copy by checksum did not send, because the target's digest was equal.
    pub resync_equal_bytes: u64,
    pub al_transactions: u64,
    pub bitmap_writes: u64,
    pub superblock_writes: u64,
    pub refused_frames: u64,
}
