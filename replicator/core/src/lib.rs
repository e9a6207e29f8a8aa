//! The deciding half of the replicator: takes `(event, now)`, returns actions with reasons.
//!
//! Everything that can be wrong about data is decided here and runs in the simulator. `docs/core.md` has
//! the states and transitions; comments name the invariants (D1–D18) they keep.

#[macro_use]
pub mod planted;

mod acknowledge;
pub mod activity_log;
mod admin;
pub mod api;
mod apply;
mod attach;
pub mod bitmap;
mod cluster_store;
mod completion;
mod congestion;
mod diskless;
mod filling;
mod foresee;
mod generations;
mod growth;
pub mod handshake;
mod log_recovery;
mod meeting;
mod op;
pub mod overlap;
mod pace;
mod peer;
#[doc(hidden)]
pub mod probe;
mod promotion;
mod receive;
mod report;
mod requests;
mod resync;
mod resync_rate;
mod roles;
mod service;
mod session_end;
mod stability;
pub mod status;
mod surplus;
pub mod undo;
mod undo_rollback;
mod undoing;
mod unread;
mod verify;
pub mod words;
mod write_path;

pub use attach::{AttachError, CreateError, CreateParameters, CreateVolume, create};
pub use service::Core;
