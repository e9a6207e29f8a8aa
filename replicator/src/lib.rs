//! The replicator process: shards, control API, metrics.
