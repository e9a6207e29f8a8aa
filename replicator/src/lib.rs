//! The replicator process: shards, control API, metrics.

pub mod config;
pub mod control;
pub mod events;
pub mod metrics;
pub mod shard;
