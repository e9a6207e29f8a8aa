//! How an application reaches a volume.
//!
//! A frontend turns what an application's side speaks (today NBD, later ublk and vhost-user-blk) into
//! [`Request`]s for a [`Volume`], and each request's [`Completion`] back into an answer. The replicator
//! implements [`Volume`] once per export and [`Exports`] once per shard; it knows nothing of the protocol.
//!
//! Everything here lives on one thread (the shard's): nothing is `Send`, no lock is taken, and a write
//! crosses no thread between the socket and the disk ring.
//!
//! `docs/frontend.md` says what is supported, the limits, and how the other frontends fit the same traits.

mod close;
mod completion;
mod error;
pub mod nbd;
mod volume;

pub use close::{CloseReason, CloseSignal, CloseWatch};
pub use completion::{Completion, CompletionQueue, Finished};
pub use error::{IoError, IoErrorKind};
pub use volume::{
    BlockSizes, Buffer, ClientInfo, ExportError, ExportInfo, Exports, Extent, MAX_REQUEST_BYTES,
    Output, Peer, Request, Volume,
};
