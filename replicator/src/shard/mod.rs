//! One shard: a thread that owns a disk ring, a link endpoint, the frontends and the cores of its services.

mod buffers;
pub mod memory;
mod requests;
