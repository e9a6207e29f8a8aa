//! What a superblock says, as values. The bytes are in `superblock.rs`, the places in `layout.rs`.

use crate::ids::*;

/// How far a copy's data can be trusted by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum CopyState {
    /// Nothing known: never written, or the backing device was replaced.
    Blank = 0,
    /// In the middle of a resync: a mixture of points in time.
    Inconsistent = 1,
    /// A real past point, known to be behind.
    Outdated = 2,
    /// A real past point (after rollback, or cut off while following).
    Consistent = 3,
    /// All blocks of a generation, not yet known to be in S.
    Complete = 4,
    /// Holds every acknowledged write as far as this copy knows.
    UpToDate = 5,
    /// The disk failed.
    Failed = 6,
}

/// Why a generation was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum GenerationCause {
    /// The service was created.
    Created = 0,
    /// A copy was promoted.
    Promotion = 1,
    /// A primary started again after it stopped uncleanly or was restarted.
    Restart = 2,
    /// First completion without a former member of S.
    PeerLost = 3,
    /// First write the primary's own disk misses.
    DiskLost = 4,
    /// A person insisted.
    Force = 5,
}

/// One link of the chain of generations.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Generation {
    pub id: GenerationId,
    /// The generation it grew from; none for the first.
    pub parent: GenerationId,
    /// Position in the parent up to which the two are the same.
    pub fork_position: Position,
    /// Epoch in which it was made.
    pub epoch: Epoch,
    pub cause: GenerationCause,
    /// The copy that made it.
    pub maker: u8,
}

/// When a write completes to the application.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Mode {
    Sync = 0,
    SemiSync = 1,
    Async = 2,
}

/// What a primary without an agent does when it loses a member of S.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum OnPeerLoss {
    /// Never complete alone: writes are parked until the peer is back.
    Suspend = 0,
    /// Go on alone in a new generation; promoting the other copy is then always a force.
    Continue = 1,
}

/// Facts a copy knows of itself, as bits of one byte each in the superblock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CopyFlags {
    /// Set while attached; cleared by a clean detach.
    pub unclean: bool,
    /// Accepted writes as primary in this attachment (or in the one that ended uncleanly).
    pub was_primary: bool,
    /// All blocks read zero since `create`.
    pub zeroed: bool,
    /// The undo log was rolled back, or a copy that knows of a lower position filled this one: it went back on purpose.
    pub rolled_back: bool,
    /// The undo log does not reach back to the start of the resync (dropped or never kept).
    pub undo_lost: bool,
    /// The owner may complete writes alone (it removed the other copies from S durably).
    pub solo: bool,
}

/// What a copy durably knows of one other copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PeerRecord {
    pub in_use: bool,
    /// Slot of that copy in the service's configuration.
    pub slot: u8,
    pub node: Uuid,
    pub disk: Uuid,
    pub attach_counter: u64,
    pub incarnation: Incarnation,
    /// Generation the peer's data was at when the bitmap toward it was started; none = bitmap not usable.
    pub bitmap_base: GenerationId,
    /// Everything up to here (in `known_durable_generation`) is on the peer's stable storage, as the peer said.
    pub known_durable_generation: GenerationId,
    pub known_durable_position: Position,
    /// The mode of replication toward that copy.
    pub mode: u8,
    /// The bitmap toward this peer was started by a full copy: every block counts.
    pub full_copy: bool,
}

/// One copy's superblock of one volume. On volumes other than the lead one, the fields of the service as a
/// whole are what was true when that superblock was last written and are never used to decide.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// +1 with every write of a superblock; the valid slot with the higher one counts.
    pub sequence: u64,
    pub service: Uuid,
    pub volume: Uuid,
    pub volume_index: VolumeIndex,
    pub volume_count: u16,
    /// At most 63 bytes of UTF-8 each.
    pub service_name: String,
    pub volume_name: String,
    pub node: Uuid,
    pub slot: Slot,
    /// Identity of this copy's disk, random at create.
    pub disk: Uuid,
    /// Bytes the application sees.
    pub data_size: u64,
    /// The layout is one for this many bytes where that is more than `data_size`: room that was made before all copies grow.
    /// What is behind `data_size` and before this reads zero, or a locator says that it is to be zeroed. 0: none.
    pub room: u64,
    /// 512 or 4096.
    pub sector_size: u32,
    /// log2 of bytes per bit of the dirty bitmap, 12..=24.
    pub grain_shift: u8,
    /// log2 of bytes per extent of the activity log, 20..=30.
    pub extent_shift: u8,
    /// Sizes the creator chose; the layout follows from these and from `data_size`.
    pub al_blocks: u32,
    pub undo_size: u64,
    pub journal_size: u64,
    /// Bytes reserved for the whole metadata area, at least what the layout needs.
    pub area_size: u64,

    // Of the service as a whole: only the lead volume's counts.
    pub attach_counter: u64,
    pub incarnation: Incarnation,
    /// Newest epoch accepted: frames of older ones are refused.
    pub epoch_gate: Epoch,
    pub state: CopyState,
    pub flags: CopyFlags,
    /// Generation this copy is mid-resync towards; none if it is not.
    pub target_of: GenerationId,
    /// Slot of the source of that resync.
    pub target_source: u8,
    /// Generation and position the copy was at when that resync began: what rollback returns to.
    pub before_resync: (GenerationId, Position),
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
    /// Committed in-sync set and its version.
    pub in_sync: SlotSet,
    pub in_sync_version: u64,
    /// Members that may be in S: acknowledgements are required from these too.
    pub in_sync_pending: SlotSet,
    /// Every position this copy holds of the current generation is at least this far.
    pub position: Position,
    /// Where the current generation begins in the count of positions, which goes on across generations.
    /// Facts and fork positions count from the beginning of their generation.
    pub generation_base: Position,
    /// Newest last, at most `MAX_GENERATIONS`; the last is the current one.
    pub generations: Vec<Generation>,
    /// True if older generations were dropped from the list.
    pub generations_cut: bool,
    /// The activity log does not name everything that may differ after an unclean stop: this run keeps none, or the log was found
    /// damaged and the bits that stand for it are not durable yet. Every block counts then.
    pub log_incomplete: bool,
    /// Disk ids of all volumes of this copy, by volume index (MAX_VOLUMES at most).
    pub volume_disks: Vec<Uuid>,
    pub peers: [PeerRecord; MAX_PEERS],
    /// Bits a newer version may set: unknown incompatible ones refuse, unknown read-only ones open read-only.
    pub features_incompatible: u64,
    pub features_read_only: u64,
    pub features_compatible: u64,
}

/// Generations kept in a superblock.
pub const MAX_GENERATIONS: usize = 24;
