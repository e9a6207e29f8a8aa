//! One shard: a thread that owns a disk ring, a link endpoint, the frontends and the cores of its services.

mod acks;
mod budget;
mod buffers;
mod driver;
mod exports;
mod failures;
pub mod grow;
pub mod handle;
mod link;
pub mod memory;
mod requests;
mod service;
pub mod spin;
mod start;
mod surplus;
mod tls;

pub use handle::NodeHandle;
pub use start::{Addresses, StartError};
pub(crate) use start::{Setup, start};
