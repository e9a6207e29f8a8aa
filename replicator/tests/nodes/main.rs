//! Whole replicators in this process, on real files, over loopback.

mod attach;
mod child;
mod explain;
mod grow;
mod grow_online;
mod lag;
mod memory;
mod process;
mod reload;
mod resync_rate;
mod support;
mod surplus;
mod two_nodes;
mod volumes;
