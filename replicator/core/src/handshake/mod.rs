//! What two copies decide when they meet: a pure function of both copies' facts and the store's record.
//!
//! [`decide`] names the row of the table in `docs/handshake.md` and what follows from it. It reads no clock and
//! no state, and both copies come to the same answer: `decide(a, b)` equals `decide(b, a)`.
//!
//! Before a copy sends its facts it has folded into its bitmap toward the receiver: the hot extents of an
//! unclean attach, every write in flight that the receiver did not acknowledge, and the unstable set if the
//! receiver came back under a new incarnation. `docs/handshake.md` lists everything the caller guarantees.

mod branches;
mod explain;
mod facts;
pub mod history;
pub mod outline;
mod promote;
mod rows;
mod same_generation;
#[cfg(feature = "planted-defects")]
mod swapped;
#[cfg(test)]
mod tests;

pub use explain::{Names, explain};
pub use promote::{Promotion, PromotionKind, may_promote};
pub use rows::decide;

/// Whether the list of a copy's generations is no chain.
pub(crate) fn broken_history(facts: &holdfast_wire_format::frame::Facts) -> bool {
    history::defect(facts).is_some()
}

use holdfast_wire_format::frame::GoodbyeCode;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Generation, GenerationCause};

/// A row of the table in `docs/handshake.md`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Row {
    /// The copies cannot be compared: shapes differ, or the facts contradict each other.
    R1 = 1,
    /// A disk failed.
    R2,
    /// Both blank.
    R3,
    /// One blank.
    R4,
    /// One was restored from a backup, or its disk went back in time.
    R5,
    /// One epoch number with two owners.
    R6,
    /// One mid-resync.
    R7,
    /// Both mid-resync.
    R8,
    /// The same.
    R9,
    /// A secondary stopped uncleanly.
    R10,
    /// A primary stopped uncleanly.
    R11,
    /// Both stopped uncleanly.
    R12,
    /// One is some writes behind.
    R13,
    /// One is behind by a generation, nothing acknowledged is given up.
    R14,
    /// The same, with acknowledged writes that the newer copy never got.
    R15,
    /// Both went on alone.
    R16,
    /// Nothing in common.
    R17,
}

impl Row {
    /// Every row, in the order they are tried.
    pub const ALL: [Row; 17] = [
        Row::R1,
        Row::R2,
        Row::R3,
        Row::R4,
        Row::R5,
        Row::R6,
        Row::R7,
        Row::R8,
        Row::R9,
        Row::R10,
        Row::R11,
        Row::R12,
        Row::R13,
        Row::R14,
        Row::R15,
        Row::R16,
        Row::R17,
    ];

    /// Its number in the table, 1..=17.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// What the cluster store says of the service, read linearizably after the facts arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreRecord {
    /// Newest promotion, and who was promoted.
    pub epoch: Epoch,
    /// Newest committed generation.
    pub generation: GenerationId,
    /// Copies that hold every acknowledged write.
    pub in_sync: SlotSet,
    /// Version of the record; compared with the copies' `in_sync_version`.
    pub version: u64,
    /// Disks the store knows, at most one entry per slot.
    pub copies: Vec<StoreCopy>,
}

/// The disk of one copy, as the store knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreCopy {
    pub slot: Slot,
    pub disk: Uuid,
    pub attach_counter: u64,
}

/// What a meeting comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    pub row: Row,
    pub outcome: Outcome,
    /// For a person: the copies by slot, generations and numbers.
    pub why: String,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The copies do not connect; nothing changes on either.
    Refuse { problem: Problem },
    /// The copies hold the same: mirror from here on. A `Complete` copy goes on joining S.
    Nothing,
    /// One copy takes blocks from the other.
    Copy(CopyPlan),
    /// Both hold writes the other lacks, and somebody may miss either. A person picks; both keep their bitmaps.
    SplitBrain {
        ancestor: GenerationId,
        sides: [Side; 2],
    },
    /// The safe answer depends on what a person knows. Nothing changes until then.
    AskPerson { question: Question },
    /// Neither copy may be a source for the other; a third one may.
    WaitForThird,
    /// The copy `failed` serves, if it does, through the disk of `server`.
    Diskless { failed: Slot, server: Slot },
}

/// Who copies what to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyPlan {
    pub source: Slot,
    pub target: Slot,
    pub how: How,
    /// The target is in S now and leaves it, durably, before any write or flush completes.
    pub leaves_s: bool,
    /// The target claims to be primary and stops being it first.
    pub target_demotes: bool,
    /// The target durably records `Outdated` before anything else: it must not be promoted even if this copy never starts.
    pub target_outdated: bool,
    /// The best state the target may end in: `Complete`, or the source's own if that is less.
    pub target_becomes: CopyState,
    /// Writes the target holds and gives up.
    pub surplus: Option<Surplus>,
}

/// Which blocks are copied.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum How {
    /// The union of both copies' bits.
    Bits,
    /// That, and every block in the target's undo log.
    BitsAndUndo,
    /// Every block, without comparing: the target holds nothing.
    Full,
    /// Every block whose checksums differ.
    FullByChecksum,
}

/// Writes one copy holds that the other never got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Surplus {
    pub holder: Slot,
    /// The generation they were written in, and the position after which they begin.
    pub generation: GenerationId,
    pub after: Position,
    /// Last one known. A lower bound after an unclean stop.
    pub until: Position,
    /// Blocks and bytes that may hold them: an upper bound. `None` when the holder has no list.
    pub blocks: Option<(u64, u64)>,
    /// They may have been acknowledged to the application. The undo log holds what is overwritten until the target is whole.
    pub acknowledged: bool,
}

/// One side of a split brain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Side {
    pub slot: Slot,
    /// Its first generation after the common one: since when, by whom and why.
    pub branch: Generation,
    /// Its current generation and last known position there (a lower bound after an unclean stop).
    pub generation: GenerationId,
    pub position: Position,
    /// Blocks and bytes this side has toward the other: an upper bound of what it wrote. `None`: no list.
    pub blocks: Option<(u64, u64)>,
    pub is_primary: bool,
}

impl Side {
    /// A person insisted on this branch.
    pub fn forced(&self) -> bool {
        self.branch.cause == GenerationCause::Force
    }
}

/// What only a person can answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question {
    /// Both copies are blank: which one does the service start from?
    PickFirst { slots: [Slot; 2] },
    /// May `target` lose its acknowledged surplus?
    GiveUpSurplus {
        source: Slot,
        target: Slot,
        surplus: Surplus,
    },
    /// `restored` went back in time, but `other` is no better. Which one counts?
    RestoredAndNewer { restored: Slot, other: Slot },
    /// Both disks went back in time. Which one counts?
    BothRestored { slots: [Slot; 2] },
    /// The newest writes are on the disk of `failed`, and `server` lacks them. Go on with what `server` has?
    NewestOnFailedDisk { failed: Slot, server: Slot },
}

/// Why two copies do not connect.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Problem {
    #[error(
        "both copies claim slot {slot}: give each node its own slot in the service's configuration"
    )]
    SameSlot { slot: u8 },
    #[error(
        "the copies hold different volumes: {detail}. Compare both nodes' configuration of the service"
    )]
    VolumesDiffer { detail: String },
    #[error(
        "the volume at place {volume} of the service is {:?} on slot {} and {:?} on slot {}; nothing was changed. \
         Give both nodes' configuration the same volumes, with the same names in the same order (each with the disk that was created for it)",
        names[0], slots[0], names[1], slots[1]
    )]
    NamesDiffer {
        volume: u16,
        slots: [u8; 2],
        names: [String; 2],
    },
    #[error(
        "volume {volume} has {first} bytes on one node and {second} on the other; nothing was changed. Stop the replicators and grow the smaller one to the same size (`holdfast volume grow`)"
    )]
    SizesDiffer {
        volume: u16,
        first: u64,
        second: u64,
    },
    #[error(
        "volume {volume} has sectors of {first} bytes on one node and {second} on the other; nothing was changed. Create one of them anew with the same `sector_size`, in the configuration of both"
    )]
    SectorSizesDiffer {
        volume: u16,
        first: u32,
        second: u32,
    },
    #[error(
        "both copies have disk id {disk}: one disk is a clone of the other. Run `create` on the clone to give it an identity of its own"
    )]
    ClonedDisk { disk: Uuid },
    #[error(
        "the history of the copy in slot {slot} is broken ({detail}): take a full copy with `invalidate` there"
    )]
    BrokenHistory { slot: u8, detail: String },
    #[error(
        "the facts of the copies contradict each other: {detail}. This is a defect; nothing was changed"
    )]
    Defect { detail: String },
    #[error(
        "a copy knows epoch {known} and the store only {store}: the store went back in time. No automatic decision until a person looked at it"
    )]
    StoreBehind { known: u64, store: u64 },
    #[error("both disks failed: replace one, then restore or force what is left")]
    BothFailed,
    #[error(
        "the disk of slot {failed} failed, and slot {server} is {}, which is not fit to serve", crate::words::state(*.state)
    )]
    NoServer {
        failed: u8,
        server: u8,
        state: CopyState,
    },
    #[error("the copies have no generation in common{}: only `invalidate` on one of them joins them", if *.cut { " (older ones were dropped from a list)" } else { "" })]
    Unrelated { cut: bool },
}

impl Problem {
    /// The code to close the link with.
    pub fn goodbye(&self) -> GoodbyeCode {
        match self {
            Problem::Unrelated { .. } => GoodbyeCode::Unrelated,
            Problem::Defect { .. } | Problem::BrokenHistory { .. } => GoodbyeCode::Defect,
            Problem::BothFailed | Problem::NoServer { .. } => GoodbyeCode::DiskFailed,
            _ => GoodbyeCode::Refused,
        }
    }
}
