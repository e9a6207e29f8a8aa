//! The replicator's configuration: one TOML file, read once at start.
//!
//! [`Config::load`] checks everything that follows from the file alone; [`check::environment`] checks what
//! depends on the machine. Each error names the file, the key and what to do. `docs/process.md` has every key.

pub mod check;
mod read;

use holdfast_replicator_core::api::Tuning;
use holdfast_wire_format::ids::{Slot, Uuid, VolumeIndex};
use holdfast_wire_format::metadata::{Mode, OnPeerLoss};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the file is looked for when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/holdfast/holdfast.toml";

/// The directory of identity, peers and event log unless the configuration names another.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/holdfast";

/// The control socket unless the configuration names another.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/holdfast/control.sock";

/// What is wrong with the configuration, and where.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {source}. Nothing was started; check the path and its permissions", file.display())]
    Read {
        file: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not a valid configuration:\n{message}\nNothing was started; correct the line (docs/process.md lists every key)", file.display())]
    Syntax { file: PathBuf, message: String },
    #[error("{}: {key}: {what}. Nothing was started; {next}", file.display())]
    Key {
        file: PathBuf,
        /// Dotted path, with names of services and volumes in it.
        key: String,
        what: String,
        next: String,
    },
}

/// A configuration whose values fit together.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    pub node: NodeConfig,
    pub nbd: NbdConfig,
    pub services: Vec<ServiceConfig>,
}

#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub name: String,
    /// Directory of what must survive a restart besides the volumes: identity, trusted peers, event log.
    pub state_dir: PathBuf,
    /// UDP addresses the link listens on.
    pub link_listen: Vec<SocketAddr>,
    /// Unix socket of the control API; [`DEFAULT_CONTROL_SOCKET`] unless set.
    pub control_socket: PathBuf,
    /// None: no metrics are served.
    pub metrics: Option<SocketAddr>,
    pub profile: Profile,
    /// How long a thread waits awake for the next event before it sleeps; zero: never.
    pub spin: Duration,
    /// The person knows that `state_dir` is on a network block device that is none of ours.
    pub state_may_be_on_nbd: bool,
}

/// What the network between the copies is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Short and clean.
    Lan,
    Wan {
        /// Bytes per second to fill.
        bandwidth: u64,
        /// Typical round trip.
        round_trip: Duration,
        congestion: Congestion,
    },
}

/// How sending speed is found on a long line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Congestion {
    /// Backs off at each loss; fair to others on a shared line.
    Cubic,
    /// Goes by measured bandwidth: keeps a lossy long line full.
    Bbr,
}

#[derive(Clone, Debug)]
pub struct NbdConfig {
    pub unix: Option<PathBuf>,
    pub tcp: Option<SocketAddr>,
    pub tls: NbdTls,
}

/// Who must encrypt.
#[derive(Clone, Debug)]
pub enum NbdTls {
    /// No certificate: loopback alone.
    LoopbackOnly,
    Certificate {
        certificate: PathBuf,
        key: PathBuf,
        /// Clients must present a certificate that one of these signed.
        client_ca: Option<PathBuf>,
        /// Loopback clients must encrypt, too.
        always: bool,
    },
}

#[derive(Clone, Debug)]
pub struct ServiceConfig {
    pub name: String,
    pub id: Uuid,
    /// Slot of this node's copy.
    pub slot: Slot,
    /// Mode used by peers that name none.
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
    pub tuning: Tuning,
    pub volumes: Vec<VolumeConfig>,
    pub peers: Vec<PeerConfig>,
}

#[derive(Clone, Debug)]
pub struct VolumeConfig {
    pub index: VolumeIndex,
    pub name: String,
    pub backing: PathBuf,
    pub metadata: MetadataPlace,
    /// Bytes the application sees; none = as much as the backing holds.
    pub size: Option<u64>,
    /// 512 or 4096; none = what the backing needs, at least 512.
    pub sector_size: Option<u32>,
}

/// Where a volume's metadata is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetadataPlace {
    /// At the end of the backing device or file itself.
    Internal,
    /// In a file or device of its own, from its first byte.
    External(PathBuf),
}

#[derive(Clone, Debug)]
pub struct PeerConfig {
    pub node: NodeRef,
    pub slot: Slot,
    /// `host:port`, tried in turn; names are resolved when a connection is made.
    pub addresses: Vec<String>,
    pub mode: Mode,
}

/// How a peer's node is named: by the name it joined under, or by its id.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum NodeRef {
    Name(String),
    Id(Uuid),
}

impl std::fmt::Display for NodeRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NodeRef::Name(name) => f.write_str(name),
            NodeRef::Id(id) => id.fmt(f),
        }
    }
}

/// 32 hexadecimal digits, dashes allowed as in `uuidgen`'s output; not all zero.
pub fn parse_uuid(text: &str) -> Option<Uuid> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&digits, 16)
        .ok()
        .filter(|id| *id != 0)
        .map(Uuid)
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML of this shape, or its values contradict each other.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
            file: file.to_owned(),
            source,
        })?;
        Config::parse(&text, file)
    }

    /// Checks the text of a configuration; `file` is named in errors.
    ///
    /// # Errors
    /// As [`load`](Self::load), except for reading.
    pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
        read::config(text, file)
    }

    /// The service of that name.
    pub fn service(&self, name: &str) -> Option<&ServiceConfig> {
        self.services.iter().find(|service| service.name == name)
    }
}

impl ServiceConfig {
    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&VolumeConfig> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}

/// Bytes from text like `4096`, `64KiB`, `10 GiB`, `1.5TiB`; powers of 1024 only. None if it is no size.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    let value = number.parse::<f64>().ok()? * (1u64 << shift) as f64;
    (value.fract() == 0.0 && value < i64::MAX as f64).then_some(value as u64)
}

#[cfg(test)]
mod tests;
