//! The control API: how people, scripts and an agent speak with a running replicator.
//!
//! A Unix socket (mode 0600) with one JSON object per line. [`protocol`] has the values, [`server`] answers for a
//! [`node::Node`], [`client`] asks, [`render`] prints. `docs/control.md` describes the conversation for other
//! programs.

pub mod client;
mod health;
pub mod node;
pub mod protocol;
pub mod render;
mod report;
pub mod server;

/// Name of the socket in a node's state directory.
pub const SOCKET_NAME: &str = "control.sock";
/// Environment variable that names the socket.
pub const SOCKET_VARIABLE: &str = "HOLDFAST_SOCKET";
