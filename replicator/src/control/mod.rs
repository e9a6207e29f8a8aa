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

use crate::config::{Config, ConfigError, DEFAULT_CONTROL_SOCKET, DEFAULT_PATH};
use std::path::{Path, PathBuf};

/// Where the control socket is: named, or as that configuration (or the default one) says, or the default place.
/// A default configuration that cannot be read is no obstacle here: connecting then tells what is missing.
///
/// # Errors
/// The named configuration cannot be read or is wrong: another replicator than the one that was meant might answer.
pub fn find_socket(named: Option<&Path>, config: Option<&Path>) -> Result<PathBuf, ConfigError> {
    if let Some(path) = named {
        return Ok(path.to_path_buf());
    }
    match (
        Config::load(config.unwrap_or(Path::new(DEFAULT_PATH))),
        config,
    ) {
        (Ok(config), _) => Ok(config.node.control_socket),
        (Err(error), Some(_)) => Err(error),
        (Err(_), None) => Ok(PathBuf::from(DEFAULT_CONTROL_SOCKET)),
    }
}
