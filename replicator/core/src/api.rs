//! What goes into the core and what comes out of it.
//!
//! One [`Core`](crate::Core) per service and copy. The shell calls `handle(now, event, &mut out)` and carries
//! out the actions **in the order given**; answers come back as events, in any order. The core never reads a
//! clock, a socket, a file, a random source or a thread.

use crate::handshake::StoreRecord;
use holdfast_wire_format::frame::{Body, FrameHeader, GoodbyeCode};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{Generation, Mode, OnPeerLoss, Superblock};

/// Nanoseconds of a monotonic clock, from any start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This moment plus `ms` milliseconds.
    #[must_use]
    pub fn after_ms(self, ms: u64) -> Time {
        Time(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }
    /// Milliseconds from `earlier` to this moment, 0 if it lies ahead.
    pub fn ms_since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

/// A buffer the shell owns. The shell keeps it alive from `AllocBuf` or the event that brought it until
/// `ReleaseBuf`, and beyond that for as long as the kernel or the link still reads or writes it.
/// Numbers below `BufId::CORE` are the shell's to hand out; the core takes those from there up.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BufId(pub u64);

impl BufId {
    /// First number of buffers that the core asks for.
    pub const CORE: u64 = 1 << 62;
}

/// A client request, numbered by the shell; unique until it completes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// An operation the core started, numbered by the core; its answer names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// One connection of the link to one peer; a new one for every connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SessionId(pub u64);

/// A read of the cluster's record or a change of it, numbered by the core; its answer names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreId(pub u64);

/// What a change of the cluster's record is compared with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StoreVersion {
    pub epoch: Epoch,
    pub version: u64,
}

/// How a change of the cluster's record ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SwapOutcome {
    Swapped,
    /// Another record stands; this one, read linearizably after the attempt.
    Refused(StoreRecord),
    /// It may be applied, now or later, or not.
    Unknown,
}

/// Where the record of who may write is kept (`docs/cluster-store.md`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum StoreKind {
    /// No agent runs: in each copy's own superblock.
    #[default]
    Own,
    /// In a register that all copies reach through the shell.
    Cluster,
}

/// An administrator's request, numbered by the shell; each gets exactly one `AdminDone`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AdminId(pub u64);

/// How a client request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Ok,
    /// The disk failed and no other copy could serve it.
    Io,
    /// Outside the volume or not aligned to its sector size.
    Invalid,
    /// This copy is not primary, or stopped being it.
    NotPrimary,
    /// Past the end of the volume.
    NoSpace,
}

/// How a disk operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskError {
    Io,
    NoSpace,
    /// The backing device ends before this place.
    BeyondEnd,
}

impl DiskError {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            DiskError::Io => "the disk reported an error",
            DiskError::NoSpace => "no space is left",
            DiskError::BeyondEnd => "the device ends before it",
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    // --- the application: offsets and lengths in bytes, multiples of the sector size, at most 1 MiB a request
    //     for data (the shell splits larger ones), any length for `Zero` ---
    Read {
        request: RequestId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
    },
    Write {
        request: RequestId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
        fua: bool,
        crc: u32,
    },
    Zero {
        request: RequestId,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
        unmap: bool,
        fua: bool,
    },
    Flush {
        request: RequestId,
    },
    /// Read-modify-write at byte grain, or another reason to have a range to oneself: `Granted` when no
    /// other write to that range is in flight, until `Unlock`. A `Write` that carries the lock's
    /// request id passes it.
    Lock {
        request: RequestId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
    },
    Unlock {
        request: RequestId,
    },

    // --- answers ---
    DiskDone {
        op: OpId,
        result: Result<(), DiskError>,
    },
    MetaDone {
        op: OpId,
        result: Result<(), DiskError>,
    },
    /// Answer to `Hash`.
    HashDone {
        op: OpId,
        digest: u128,
    },
    /// Answer to `IsZero`.
    ZeroCheck {
        op: OpId,
        zero: bool,
    },
    /// Answer to `Crc`.
    CrcDone {
        op: OpId,
        crc: u32,
        /// All of the bytes are zero.
        zero: bool,
    },

    /// Answer to `MakeRoom`: there is, durably, or why not.
    RoomMade {
        volume: VolumeIndex,
        size: u64,
        result: Result<(), String>,
    },

    /// Answer to `SurplusWrite` and `SurplusEnd`: where it is kept, for a person (after the end); or why it is not.
    SurplusDone {
        op: OpId,
        result: Result<String, String>,
    },

    // --- the cluster store ---
    /// Answer to `StoreRead`: the record, by a linearizable read that began after it was asked for; `None`: not to be had.
    StoreRecord {
        id: StoreId,
        record: Option<StoreRecord>,
    },
    /// Answer to `StoreSwap`.
    StoreSwapped {
        id: StoreId,
        outcome: SwapOutcome,
    },

    // --- the link ---
    LinkUp {
        peer: Slot,
        session: SessionId,
        path: String,
    },
    LinkDown {
        peer: Slot,
        session: SessionId,
        reason: String,
    },
    /// A frame without block data, CRCs checked, body decoded.
    Control {
        peer: Slot,
        session: SessionId,
        header: FrameHeader,
        body: Body,
    },
    /// A frame with block data (`Write`, `ResyncData`, `ReadReply`), CRCs checked.
    Data {
        peer: Slot,
        session: SessionId,
        header: FrameHeader,
        buf: BufId,
    },
    /// The link took this many bytes off its queue toward the peer.
    Drained {
        peer: Slot,
        session: SessionId,
        bytes: u64,
    },

    // --- time ---
    /// The deadline the core named has come (calls at other moments do no harm).
    Tick,

    // --- people ---
    Admin {
        admin: AdminId,
        command: Command,
    },
}

/// What a person or an agent may ask for.
#[derive(Clone, Debug)]
pub enum Command {
    Promote {
        force: bool,
    },
    Demote,
    /// Allow the link to that peer (all of them: `None`).
    Connect {
        peer: Option<Slot>,
    },
    Disconnect {
        peer: Option<Slot>,
    },
    /// Hold back resync and verify; mirroring goes on.
    PauseResync,
    ResumeResync,
    Verify {
        volume: Option<VolumeIndex>,
    },
    StopVerify,
    /// This copy's data is worthless: take a full copy from the peer. `confirmed` after the loss was shown.
    Invalidate,
    /// Give up this copy's writes since the fork and become the target.
    ResolveSplitBrain {
        discard_mine: bool,
    },
    /// Park all client I/O (a planned hold), and let it go on.
    SuspendIo,
    ResumeIo,
    SetMode {
        peer: Slot,
        mode: Mode,
    },
    SetOnPeerLoss {
        policy: OnPeerLoss,
        force: bool,
    },
    /// Make volume `volume` this large on every copy while it is in use. Only a primary with all of them connected and whole.
    Grow {
        volume: VolumeIndex,
        size: u64,
    },
    /// Stop cleanly: demote if primary, flush, mark clean. `AdminDone` when all is durable.
    Detach,
    /// Stop using this copy's disk, as if it had failed, and go on through another copy. Only a primary with one that can serve.
    DetachDisk,
    /// What would be lost or decided, changing nothing.
    WhatWouldForceLose,
}

/// How an administrator's request ended: a sentence either way.
pub type AdminResult = Result<String, Refusal>;

/// Why not: what happened, what was kept safe, what to do next.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}. {kept}. {next}")]
pub struct Refusal {
    pub kind: RefusalKind,
    pub what: String,
    pub kept: String,
    pub next: String,
}

/// What a program may want to tell apart among refusals.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RefusalKind {
    /// It was not carried out.
    #[default]
    Refused,
    /// It was carried out, and found that the copies differ.
    CopiesDiffer,
}

/// Where a metadata write goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MetaPlace {
    pub volume: VolumeIndex,
    /// Byte offset in that volume's metadata area, a multiple of 4096.
    pub offset: u64,
}

/// What the payload of a frame is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    None,
    /// Encoded by the shell's link with `encode_body`.
    Body(Body),
    /// `header.length` bytes of this buffer from its start. The CRC is the one the event brought, or is
    /// computed by the shell when `header.payload_crc` is 0 and `crc_known` is false.
    Buf {
        buf: BufId,
        crc_known: bool,
    },
}

/// What is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    // --- disk. Each answers with `DiskDone` or `MetaDone`; none is to be reordered by the shell around
    //     another one's completion, but those given together may run together ---
    DiskRead {
        op: OpId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
    },
    DiskWrite {
        op: OpId,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
        fua: bool,
    },
    DiskZero {
        op: OpId,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
        unmap: bool,
        fua: bool,
    },
    DiskFlush {
        op: OpId,
        volume: VolumeIndex,
    },
    /// Metadata: done means durable (FUA).
    MetaWrite {
        op: OpId,
        place: MetaPlace,
        bytes: Vec<u8>,
    },
    /// Undo data: `length` bytes of the buffer to the metadata area; done means durable.
    MetaWriteBuf {
        op: OpId,
        place: MetaPlace,
        buf: BufId,
        length: u32,
    },
    /// Undo data back into a buffer.
    MetaReadBuf {
        op: OpId,
        place: MetaPlace,
        buf: BufId,
        length: u32,
    },

    // --- buffers ---
    AllocBuf {
        buf: BufId,
        length: u32,
    },
    ReleaseBuf {
        buf: BufId,
    },
    /// Copies the first `length` bytes of one buffer to another (a read that another copy's disk served).
    CopyBuf {
        from: BufId,
        to: BufId,
        length: u32,
    },
    /// The first 128 bits of the SHA-256 of the first `length` bytes. Blocks with equal digests are not copied, and whoever writes
    /// to a volume chooses what is in them: a hash that is only fast would not do.
    Hash {
        op: OpId,
        buf: BufId,
        length: u32,
    },
    /// Whether the first `length` bytes are all zero.
    IsZero {
        op: OpId,
        buf: BufId,
        length: u32,
    },
    /// CRC-32 of the first `length` bytes, and whether they are all zero.
    Crc {
        op: OpId,
        buf: BufId,
        length: u32,
    },

    // --- what this copy wrote alone and gives up, kept outside the volume for a person ---
    SurplusBegin {
        about: SurplusAbout,
    },
    /// The first `length` bytes of the buffer, as they are in the volume at `offset`. Answers with `SurplusDone`.
    SurplusWrite {
        op: OpId,
        save: u64,
        volume: VolumeIndex,
        offset: u64,
        length: u32,
        buf: BufId,
    },
    /// All of it was given: kept durably from the answer on, or thrown away. Answers with `SurplusDone`.
    SurplusEnd {
        op: OpId,
        save: u64,
        keep: bool,
    },

    // --- the cluster store: only with `StoreKind::Cluster` ---
    /// Read the record. Answers with `StoreRecord`.
    StoreRead {
        id: StoreId,
    },
    /// Put `record` in place of the one that has this epoch and version, if that one stands. May be given again with the same number.
    /// Answers with `StoreSwapped`.
    StoreSwap {
        id: StoreId,
        expected: StoreVersion,
        record: StoreRecord,
    },

    // --- link ---
    Send {
        peer: Slot,
        session: SessionId,
        header: FrameHeader,
        payload: Payload,
    },
    /// Try to reach that peer from now on.
    Connect {
        peer: Slot,
    },
    /// Send what is queued, then close; do not reconnect when `reconnect` is false.
    Close {
        peer: Slot,
        session: SessionId,
        code: GoodbyeCode,
        text: String,
        reconnect: bool,
    },

    // --- application ---
    Complete {
        request: RequestId,
        status: Status,
    },
    Granted {
        request: RequestId,
    },
    /// Who may write changed: exports of older epochs are refused from here on.
    RoleChanged {
        role: Role,
        epoch: Epoch,
    },
    /// Lay a volume's metadata out for `size` bytes and have zeroes behind its present end, which stays. The shell calls
    /// [`Core::may_move`](crate::Core::may_move) and [`Core::moved`](crate::Core::moved) on the way. Answers with `RoomMade`.
    MakeRoom {
        volume: VolumeIndex,
        size: u64,
    },
    /// A volume's size for new connections.
    Resized {
        volume: VolumeIndex,
        size: u64,
    },

    // --- people ---
    AdminDone {
        admin: AdminId,
        result: AdminResult,
    },
    /// A decision or a change of state, for the event log.
    Notice(Notice),
    /// Stop this process now rather than write wrong data.
    Halt {
        reason: String,
    },
}

/// What is saved before it is overwritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SurplusAbout {
    /// Names this save; random.
    pub save: u64,
    /// The copy whose blocks replace these.
    pub peer: Slot,
    /// The generation both had in common, and the position in it after which these were written (0: not known closer).
    pub generation: GenerationId,
    pub after: Position,
    /// An upper bound of what was written.
    pub blocks: u64,
    pub bytes: u64,
}

/// One line of the event log.
#[derive(Clone, PartialEq, Debug)]
pub struct Notice {
    pub level: Level,
    /// Short, stable, for machines: `peer-lost`, `resync-finished`, …
    pub kind: &'static str,
    pub peer: Option<Slot>,
    /// For a person: what, why, what is safe.
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    Info,
    Warning,
    Error,
}

/// What this copy is doing for the service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    Secondary,
    /// Epoch and generation are being made durable; serves nothing yet.
    Promoting,
    Primary,
    /// Finishes what is in flight; takes nothing new.
    Demoting,
    /// Detached: nothing is done any more.
    Detached,
}

/// How an action list is filled: actions in order.
pub type Actions = Vec<Action>;

/// Reads metadata before the core serves, synchronously: recovery is a function of these bytes.
pub trait MetaSource {
    /// Fills `bytes` from the volume's metadata area.
    ///
    /// # Errors
    /// The disk's error; recovery then refuses to attach.
    fn read(&mut self, volume: VolumeIndex, offset: u64, bytes: &mut [u8])
    -> Result<(), DiskError>;
}

/// What the shell knows at start, besides the metadata.
#[derive(Clone, Debug)]
pub struct AttachParameters {
    /// Volumes of the service in the order of their index: what the configuration and the devices say.
    pub volumes: Vec<AttachVolume>,
    /// Peers, with the mode wanted toward each.
    pub peers: Vec<PeerParameters>,
    pub slot: Slot,
    pub node: Uuid,
    pub service: Uuid,
    /// Random, different for every run of the process.
    pub incarnation: Incarnation,
    /// Seed of the core's own random numbers (generation ids). Random for every run.
    pub seed: u64,
    pub tuning: Tuning,
    pub store: StoreKind,
}

#[derive(Clone, Debug)]
pub struct AttachVolume {
    pub index: VolumeIndex,
    /// What the configuration calls it, at most 63 bytes. Copies that call a volume differently do not connect.
    pub name: String,
    /// Bytes of the device that may hold data now (without the metadata area).
    pub device_data_size: u64,
    pub sector_size: u32,
    /// Discard reads back zeroes.
    pub discard_zeroes: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct PeerParameters {
    pub slot: Slot,
    pub node: Uuid,
    pub mode: Mode,
}

/// Limits and intervals. Every field has a sane default.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Keep-alive interval in ms (250).
    pub heartbeat_ms: u64,
    /// Without any frame for this long the session is closed (1000).
    pub peer_timeout_ms: u64,
    /// Flush everywhere at least this often while something is unstable and somebody waits (200 ms, 8 MiB).
    pub stable_interval_ms: u64,
    pub stable_bytes: u64,
    /// Async: most bytes queued toward a peer before the congestion policy acts (32 MiB).
    pub async_queue_bytes: u64,
    /// Async: most ms of lag before the congestion policy acts; 0 = no bound (0).
    pub async_lag_ms: u64,
    /// Async congestion: block the application (true) or fall back to the bitmap (false).
    pub async_block: bool,
    /// Resync: bytes in flight (16 MiB) and bytes per chunk (256 KiB).
    pub resync_window_bytes: u64,
    pub resync_chunk_bytes: u32,
    /// Bytes per second that resync keeps going at however slow the application's requests become (1 MiB), and that it never
    /// exceeds; 0 = no such bound (0). In between it goes by how long the application's requests take.
    pub resync_rate_min: u64,
    pub resync_rate_max: u64,
    /// Receiver: bytes of writes buffered before the link is not read further (32 MiB).
    pub receive_bytes: u64,
    /// Partial bitmap pages kept in memory per peer and volume (16384 = 64 MiB).
    pub bitmap_pages: usize,
    /// Undo full: pause the resync (true) or drop the undo loudly (false).
    pub undo_full_pauses: bool,
    /// Most bytes of what this copy wrote alone that are saved for a person before another copy overwrites them (1 GiB);
    /// 0 = nothing is saved.
    pub surplus_bytes: u64,
    /// Use the activity log; off costs nothing per write but a full copy after a crash.
    pub activity_log: bool,
    /// Extents that may be hot at once, at least those of one request; 0: as many as the ring carries (0). Fewer cost more
    /// transactions and a shorter resync after a crash. The ring is taken as damaged once after a change.
    pub log_extents: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            heartbeat_ms: 250,
            peer_timeout_ms: 1000,
            stable_interval_ms: 200,
            stable_bytes: 8 << 20,
            async_queue_bytes: 32 << 20,
            async_lag_ms: 0,
            async_block: false,
            resync_window_bytes: 16 << 20,
            resync_chunk_bytes: 256 << 10,
            resync_rate_min: 1 << 20,
            resync_rate_max: 0,
            receive_bytes: 32 << 20,
            bitmap_pages: 16384,
            undo_full_pauses: false,
            surplus_bytes: 1 << 30,
            activity_log: true,
            log_extents: 0,
        }
    }
}

/// Re-exported for the shell's convenience.
pub type SuperblockImage = Superblock;
/// Re-exported for the shell's convenience.
pub type GenerationEntry = Generation;
