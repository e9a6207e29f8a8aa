//! The deciding half of the replicator: takes `(event, now)`, returns actions with reasons.
//!
//! Everything that can be wrong about data is decided here and runs in the simulator. `docs/core.md` has
//! the states and transitions; comments name the invariants (D1–D18) they keep.

pub mod activity_log;
pub mod api;
pub mod bitmap;
pub mod handshake;
pub mod overlap;
pub mod status;
pub mod undo;
