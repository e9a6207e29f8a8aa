//! QUIC between replicators: identity, paths, frames.
