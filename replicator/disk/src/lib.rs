//! io_uring and O_DIRECT: the disks under a replicator.
//!
//! A [`Backing`] is one locked file or block device; a [`Ring`] carries out [`Op`]s on the backings of one shard and
//! gives one [`Completion`] for each; a [`BufPool`] holds the memory they use. All of it lives on the shard's thread. Which
//! operation may start when is decided elsewhere: here nothing is ordered, retried on error or acknowledged early.
//! `docs/disk.md` says how operations map to durability.

mod arena;
mod backing;
mod blocking;
mod buf;
mod error;
#[cfg(feature = "fault-injection")]
mod fault;
#[cfg(feature = "fault-injection")]
mod fault_control;
mod in_flight;
mod in_place;
mod job;
mod lock;
mod memory;
mod op;
mod probe;
#[cfg(feature = "fault-injection")]
pub mod record;
mod ring;
mod setup;

pub use arena::rounded as buffer_bytes;
pub use backing::{Backing, BackingKind, OpenOptions};
pub use buf::{AlignedBytes, Buf, BufPool, CHUNK, MAX_BUF, PoolOptions, Priority, ReadBuf};
pub use error::{CloseError, DiskError, DiskErrorKind, OpKind, OpenError, RingError};
pub use memory::{Warning, lock_process_memory};
pub use op::{Completion, FileId, Op};
pub use probe::Identity;
pub use ring::{Ring, RingOptions};
pub use setup::RingFeatures;
