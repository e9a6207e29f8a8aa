//! The control API: how people, scripts and an agent speak with a running replicator.
//!
//! A Unix socket (mode 0600) with one JSON object per line. [`protocol`] has the values, [`server`] answers for a
//! [`node::Node`], [`client`] asks, [`render`] prints. `docs/control.md` describes the conversation for other
//! programs.

pub mod client;
pub mod dump;
pub mod follow;
mod health;
pub mod membership;
pub mod node;
pub mod protocol;
pub mod render;
mod report;
pub mod server;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

/// Where the control socket is: named, or as that configuration (or the default one) says, or the default place.
/// A configuration that cannot be read is no obstacle here: connecting then tells what is missing.
pub fn find_socket(named: Option<&Path>, config: Option<&Path>) -> PathBuf {
    if let Some(path) = named {
        return path.to_path_buf();
    }
    let file = config.unwrap_or(Path::new(crate::config::DEFAULT_PATH));
    match crate::config::Config::load(file) {
        Ok(config) => config.node.control_socket,
        Err(_) => PathBuf::from(crate::config::DEFAULT_CONTROL_SOCKET),
    }
}
