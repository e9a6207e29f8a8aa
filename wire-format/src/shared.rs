//! Encodings that frames and superblocks share: codes of the enumerations, epochs, generations, flags.

use crate::bytes::{Fault, Reader, Writer, pack, unpack};
use crate::frame::{FrameKind, GoodbyeCode, GrowStep};
use crate::ids::*;
use crate::metadata::*;

/// One-byte codes. A variant that is missing from its list does not compile.
macro_rules! codes {
    ($name:ident { $($variant:ident),+ $(,)? }) => {
        impl $name {
            /// Every value.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The byte that stands for it in frames and metadata.
            pub const fn code(self) -> u8 {
                match self {
                    $($name::$variant => $name::$variant as u8),+
                }
            }

            /// The value of a byte, or none for a byte this version does not know.
            pub const fn from_code(code: u8) -> Option<Self> {
                $(if code == $name::$variant as u8 {
                    return Some($name::$variant);
                })+
                None
            }
        }
    };
}

codes!(CopyState {
    Blank,
    Inconsistent,
    Outdated,
    Consistent,
    Complete,
    UpToDate,
    Failed
});
codes!(GenerationCause {
    Created,
    Promotion,
    Restart,
    PeerLost,
    DiskLost,
    Force
});
codes!(Mode {
    Sync,
    SemiSync,
    Async
});
codes!(OnPeerLoss { Suspend, Continue });
codes!(GoodbyeCode {
    Disconnect,
    Refused,
    SplitBrain,
    Unrelated,
    BadFrame,
    OldEpoch,
    DiskFailed,
    Shutdown,
    Defect,
    Again,
});
codes!(GrowStep {
    MakeRoom,
    Room,
    Grow,
    Grown,
    Refused,
});
codes!(FrameKind {
    Hello,
    Bitmap,
    BitmapEnd,
    Ready,
    Goodbye,
    Write,
    Zero,
    Flush,
    WriteAck,
    ReceivedAck,
    FlushAck,
    Heartbeat,
    ResyncData,
    ResyncZero,
    ResyncAck,
    ResyncDone,
    CompleteAck,
    InSync,
    PromoteRequest,
    PromoteReply,
    NewGeneration,
    GenerationAck,
    Demoted,
    VerifyRequest,
    VerifyReply,
    DiskLost,
    DiskLostAck,
    ReadRequest,
    ReadReply,
    Grow,
});

/// Bytes of one encoded [`Generation`].
pub(crate) const GENERATION_LENGTH: usize = 40;

pub(crate) fn put_generation(w: &mut Writer, g: &Generation) {
    w.u64(g.id.0);
    w.u64(g.parent.0);
    w.u64(g.fork_position);
    w.u64(g.epoch.number);
    w.u8(g.epoch.owner);
    w.u8(g.cause.code());
    w.u8(g.maker);
    w.zero(5);
}

pub(crate) fn take_generation(r: &mut Reader) -> Result<Generation, Fault> {
    let id = GenerationId(r.u64()?);
    let parent = GenerationId(r.u64()?);
    let fork_position = r.u64()?;
    let number = r.u64()?;
    let epoch = epoch_of(number, r.u8()?)?;
    let cause =
        GenerationCause::from_code(r.u8()?).ok_or("the cause of a generation is unknown")?;
    let maker = slot_or_none(r.u8()?)?;
    r.zero(5)?;
    Ok(Generation {
        id,
        parent,
        fork_position,
        epoch,
        cause,
        maker,
    })
}

/// Number 0 has no owner, every other number has one.
pub(crate) fn epoch_of(number: u64, owner: u8) -> Result<Epoch, Fault> {
    let fits = if number == 0 {
        owner == Epoch::NO_OWNER
    } else {
        (owner as usize) < MAX_COPIES
    };
    if fits {
        Ok(Epoch { number, owner })
    } else {
        Err("the owner of an epoch is not a slot")
    }
}

/// 0..=7, or `NO_OWNER` where nobody is meant.
pub(crate) fn slot_or_none(slot: u8) -> Result<u8, Fault> {
    if (slot as usize) < MAX_COPIES || slot == Epoch::NO_OWNER {
        Ok(slot)
    } else {
        Err("a slot is out of range")
    }
}

pub(crate) fn slot_of(slot: u8) -> Result<Slot, Fault> {
    if (slot as usize) < MAX_COPIES {
        Ok(Slot(slot))
    } else {
        Err("a slot is out of range")
    }
}

pub(crate) fn volume_of(volume: u16) -> Result<VolumeIndex, Fault> {
    if (volume as usize) < MAX_VOLUMES {
        Ok(VolumeIndex(volume))
    } else {
        Err("a volume index is out of range")
    }
}

pub(crate) fn copy_flags_code(f: CopyFlags) -> u8 {
    pack([
        f.unclean,
        f.was_primary,
        f.zeroed,
        f.rolled_back,
        f.undo_lost,
        f.solo,
    ])
}

pub(crate) fn take_copy_flags(r: &mut Reader) -> Result<CopyFlags, Fault> {
    let [unclean, was_primary, zeroed, rolled_back, undo_lost, solo] = unpack(r.flags(0x3f)?);
    Ok(CopyFlags {
        unclean,
        was_primary,
        zeroed,
        rolled_back,
        undo_lost,
        solo,
    })
}
