//! Whole replicators in this process, on real files, over loopback.

mod process;
mod support;
mod two_nodes;
mod volumes;
