//! Frames between two copies of one service, as values. The bytes are in `frame_codec.rs`.
//!
//! Every frame is one fixed header and a payload of `payload_length` bytes. Data frames (`Write`,
//! `ResyncData`, `ReadReply`) carry raw block data as payload and nothing else; every other kind carries
//! the encoding of its [`Body`]. Header and payload have a CRC each.

use crate::frame_codec::WIRE_VERSION_MIN;
use crate::ids::*;
use crate::metadata::{CopyFlags, CopyState, Generation, GenerationCause, Mode, OnPeerLoss};

/// Largest payload of one frame: one megabyte of data (a larger write is several frames).
pub const MAX_PAYLOAD: u32 = 1 << 20;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FrameKind {
    // --- meeting ---
    Hello = 1,
    /// Bits one copy has toward the other, during the handshake.
    Bitmap = 2,
    BitmapEnd = 3,
    /// The target durably recorded what the handshake decided and takes frames from here on.
    Ready = 4,
    /// The sender closes the link and says why.
    Goodbye = 5,
    // --- the order of the service: each takes a position ---
    /// Raw data; `length == payload_length`.
    Write = 16,
    /// Zeroes or discard over `length` bytes, no payload; see `FrameFlags`.
    Zero = 17,
    /// Everything before it in the order becomes durable before anything after it is applied.
    Flush = 18,
    // --- acknowledgements ---
    /// Positions applied to the disk (in its cache, at least).
    WriteAck = 32,
    /// Everything up to `position` was received into memory.
    ReceivedAck = 33,
    /// Everything up to `position`, and every resync chunk up to `resync_sequence`, is durable.
    FlushAck = 34,
    /// Keep-alive with the stable position; sent when nothing else was.
    Heartbeat = 35,
    // --- resync ---
    /// Raw data for a block the target lacks; `position` holds the resync sequence, not a place in the order.
    ResyncData = 48,
    /// The same for a range that reads as zero at the source.
    ResyncZero = 49,
    ResyncAck = 50,
    /// No bit is left: record Complete.
    ResyncDone = 51,
    /// Complete is durable.
    CompleteAck = 52,
    /// S was committed with the receiver in it.
    InSync = 53,
    // --- roles ---
    PromoteRequest = 64,
    PromoteReply = 65,
    NewGeneration = 66,
    GenerationAck = 67,
    /// The primary stopped cleanly at `position`, all of it flushed.
    Demoted = 68,
    // --- verify ---
    VerifyRequest = 80,
    VerifyReply = 81,
    // --- diskless primary ---
    /// My disk failed: take over S and the generation.
    DiskLost = 96,
    DiskLostAck = 97,
    ReadRequest = 98,
    /// Raw data; `position` holds the request id.
    ReadReply = 99,
    // --- other ---
    /// A volume was grown.
    Grow = 112,
}

/// Flags of a data frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrameFlags {
    /// Durable before it is acknowledged.
    pub fua: bool,
    /// For `Zero`: space may be released.
    pub unmap: bool,
    /// For acknowledgements and replies: the operation failed.
    pub failed: bool,
}

/// The fixed part of every frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Wire version of the frame: the one agreed with the receiver, the oldest one spoken for what precedes that
    /// ([`FrameKind::precedes_agreement`]). Never 0.
    pub version: u8,
    pub kind: FrameKind,
    pub flags: FrameFlags,
    /// Bytes of payload that follow, 0..=MAX_PAYLOAD.
    pub payload_length: u32,
    /// CRC-32 of the payload; 0 when there is none.
    pub payload_crc: u32,
    /// First 8 bytes of the service id: a frame on the wrong stream is noticed.
    pub service_tag: u64,
    pub volume: VolumeIndex,
    /// Sender's epoch.
    pub epoch: Epoch,
    /// Sender's generation.
    pub generation: GenerationId,
    /// Sender's incarnation.
    pub incarnation: Incarnation,
    /// Place in the order, or what the kind says.
    pub position: Position,
    /// Nothing of this frame is applied before everything up to here is; 0 = no dependency.
    pub dependency: Position,
    /// Flushed by every member of S, as the sender knows.
    pub stable_position: Position,
    /// Byte offset in the volume.
    pub offset: u64,
    /// Bytes of the volume concerned (equals `payload_length` for data frames).
    pub length: u32,
}

/// What the frames of a service are marked with: the first 8 bytes of its id.
#[must_use]
pub fn service_tag(service: Uuid) -> u64 {
    (service.0 >> 64) as u64
}

impl FrameHeader {
    /// A header that says nothing but its kind and service, in the oldest version that is spoken: without payload, of no epoch and
    /// no generation.
    #[must_use]
    pub fn new(kind: FrameKind, service: Uuid) -> FrameHeader {
        FrameHeader {
            version: WIRE_VERSION_MIN,
            kind,
            flags: FrameFlags::default(),
            payload_length: 0,
            payload_crc: 0,
            service_tag: service_tag(service),
            volume: VolumeIndex(0),
            epoch: Epoch::NONE,
            generation: GenerationId(0),
            incarnation: Incarnation(0),
            position: 0,
            dependency: 0,
            stable_position: 0,
            offset: 0,
            length: 0,
        }
    }
}

/// Bytes of an encoded header.
pub const HEADER_LENGTH: usize = 112;

/// What one copy tells the other when they meet: the input of the handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    pub node: Uuid,
    pub slot: Slot,
    pub service: Uuid,
    /// Name and version of the software, at most 64 bytes.
    pub software: String,
    /// Wire versions the sender speaks.
    pub version_min: u8,
    pub version_max: u8,
    /// Features without which the sender cannot talk, and those it has.
    pub features_required: u64,
    pub features_supported: u64,
    pub facts: Facts,
}

/// The facts of one copy (`handshake.md`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub slot: Slot,
    /// Identity of the lead disk.
    pub disk: Uuid,
    pub attach_counter: u64,
    pub incarnation: Incarnation,
    pub epoch: Epoch,
    pub state: CopyState,
    pub flags: CopyFlags,
    /// Serves as primary at this moment.
    pub is_primary: bool,
    /// The copy before this attachment was not detached cleanly, or it lost power as far as it knows.
    pub unclean_start: bool,
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
    /// Newest last.
    pub generations: Vec<Generation>,
    pub generations_cut: bool,
    /// Every position of the current generation up to here is held.
    pub position: Position,
    /// Live primary: last issued; else equal to `position`.
    pub issued: Position,
    pub target_of: GenerationId,
    pub target_source: u8,
    pub before_resync: (GenerationId, Position),
    /// Undo reaches back to the start of the resync.
    pub undo_intact: bool,
    /// Follows a live primary that is neither of the two.
    pub follows_third: bool,
    pub in_sync: SlotSet,
    pub in_sync_version: u64,
    pub in_sync_pending: SlotSet,
    /// Index, volume id, name, size in bytes, sector size, disk id of each volume.
    pub volumes: Vec<VolumeFacts>,
    /// About the copy this is sent to.
    pub about_peer: PeerFacts,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeFacts {
    pub index: VolumeIndex,
    pub volume: Uuid,
    /// What the sender's configuration calls it, at most 63 bytes; empty where the sender does not say.
    pub name: String,
    pub disk: Uuid,
    pub size: u64,
    pub sector_size: u32,
    /// log2 of bytes per bit.
    pub grain_shift: u8,
    /// This volume's disk is new: nothing on it counts.
    pub blank: bool,
    /// Up to how many bytes it can grow at once, at least `size`; 0 where the sender does not say.
    pub room: u64,
}

/// What the sender durably knows of the receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerFacts {
    pub known: bool,
    pub disk: Uuid,
    pub attach_counter: u64,
    pub incarnation: Incarnation,
    pub bitmap_base: GenerationId,
    /// Bits set toward the receiver, over all volumes (after folding in unclean hot extents and the unstable set).
    pub bits: u64,
    /// Bytes those bits stand for.
    pub bytes: u64,
    pub known_durable_generation: GenerationId,
    pub known_durable_position: Position,
    /// A full copy toward the receiver was under way.
    pub full_copy: bool,
}

/// What a `Grow` frame asks for or answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum GrowStep {
    /// The primary asks for room for that size.
    MakeRoom = 0,
    /// There is room for it here.
    Room = 1,
    /// The primary asks for the size itself: every copy has room.
    Grow = 2,
    /// The volume has that size here, durably.
    Grown = 3,
    /// Not here, and why.
    Refused = 4,
}

/// Why a link is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum GoodbyeCode {
    Disconnect = 0,
    Refused = 1,
    SplitBrain = 2,
    Unrelated = 3,
    BadFrame = 4,
    OldEpoch = 5,
    DiskFailed = 6,
    Shutdown = 7,
    Defect = 8,
    /// Sent by a copy whose facts changed: meet again.
    Again = 9,
}

/// Payload of every kind that is not raw data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// Zero, Flush, Heartbeat, FlushAck without more, ResyncZero and others that the header says all of.
    Empty,
    Hello(Box<Hello>),
    /// Bits of one page toward the receiver. `words` is empty for "all set".
    Bitmap {
        volume: VolumeIndex,
        page: u64,
        grain_shift: u8,
        words: Vec<u64>,
    },
    Goodbye {
        code: GoodbyeCode,
        text: String,
    },
    /// Inclusive runs of positions (or resync sequences), at most `MAX_ACK_RUNS`.
    Acks {
        runs: Vec<(u64, u64)>,
    },
    FlushAck {
        position: Position,
        resync_sequence: u64,
    },
    ResyncDone {
        position: Position,
        /// Third copies that hold the same as the source, as far as it knows: what they do not share with it they have marked.
        equal: SlotSet,
    },
    InSync {
        set: SlotSet,
        version: u64,
    },
    PromoteRequest {
        epoch: Epoch,
        /// S as the sender knows it: it asks every other member.
        in_sync: SlotSet,
        /// A person insists.
        force: bool,
    },
    PromoteReply {
        epoch: Epoch,
        accepted: bool,
        reason: String,
    },
    NewGeneration {
        generation: Generation,
    },
    GenerationAck {
        generation: GenerationId,
    },
    Verify {
        sequence: u64,
        digest: u128,
    },
    VerifyReply {
        sequence: u64,
        equal: bool,
        failed: bool,
    },
    DiskLost {
        generation_cause: GenerationCause,
        position: Position,
    },
    Grow {
        size: u64,
        step: GrowStep,
        /// Why it is refused, for a person; at most 1024 bytes.
        text: String,
    },
}

/// Most runs in one acknowledgement.
pub const MAX_ACK_RUNS: usize = 512;
/// 64-bit words in one `Bitmap` frame that has any: the bits of one page of the bitmap on disk.
pub const BITMAP_WORDS: usize = crate::bitmap_page::PAGE_WORDS;
