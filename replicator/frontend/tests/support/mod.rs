//! What the tests and the benchmark share: a volume in memory, a server on a thread of its own, a scripted client.
#![allow(dead_code)]

pub mod client;
pub mod memory;
pub mod server;
