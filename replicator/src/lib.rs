//! The replicator process: shards, control API, metrics. `docs/process.md` says how the parts fit together.

pub mod config;
pub mod control;
pub mod create;
pub mod demo;
pub mod events;
pub mod metrics;
pub mod observed;
pub mod place;
pub mod process;
pub mod shard;
pub mod surplus;
