//! From the text of a configuration to values that fit together.

use super::*;
use crate::shard::spin::Spin;
use holdfast_wire_format::frame::MAX_PAYLOAD;
use holdfast_wire_format::ids::{MAX_COPIES, MAX_PEERS, MAX_VOLUMES};
use std::collections::BTreeSet;

mod tuning;

use tuning::RawTuning;

/// Reads and checks a configuration.
pub(super) fn config(text: &str, file: &Path) -> Result<Config, ConfigError> {
    let raw: RawConfig = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        file: file.to_owned(),
        message: error.to_string(),
    })?;
    Reader { file }.config(raw)
}

// The file as it is written. Unknown keys are refused, so that a typing error never silently means a default.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    node: RawNode,
    #[serde(default)]
    nbd: RawNbd,
    #[serde(default)]
    service: Vec<RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: String,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    #[serde(default)]
    link_listen: Vec<SocketAddr>,
    #[serde(default = "default_control_socket")]
    control_socket: PathBuf,
    #[serde(default = "default_metrics")]
    metrics: String,
    #[serde(default = "default_profile")]
    profile: RawProfile,
    wan: Option<RawWan>,
    spin_us: Option<u64>,
    #[serde(default)]
    state_may_be_on_nbd: bool,
}

/// Longest wait awake that can be set, in microseconds.
const MAX_SPIN_US: u64 = 1000;

fn default_state_dir() -> PathBuf {
    DEFAULT_STATE_DIR.into()
}
fn default_control_socket() -> PathBuf {
    DEFAULT_CONTROL_SOCKET.into()
}
fn default_metrics() -> String {
    "127.0.0.1:9741".into()
}
fn default_profile() -> RawProfile {
    RawProfile::Lan
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawProfile {
    Lan,
    Wan,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWan {
    #[serde(default = "default_bandwidth")]
    bandwidth_mbit: u64,
    #[serde(default = "default_round_trip")]
    round_trip_ms: u64,
    #[serde(default = "default_congestion")]
    congestion: Congestion,
}

impl Default for RawWan {
    fn default() -> Self {
        RawWan {
            bandwidth_mbit: default_bandwidth(),
            round_trip_ms: default_round_trip(),
            congestion: default_congestion(),
        }
    }
}

fn default_bandwidth() -> u64 {
    1000
}
fn default_round_trip() -> u64 {
    50
}
fn default_congestion() -> Congestion {
    Congestion::Bbr
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawNbd {
    unix: Option<PathBuf>,
    tcp: Option<SocketAddr>,
    tls: Option<RawTls>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    #[serde(default)]
    always: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: String,
    id: String,
    slot: u8,
    #[serde(default = "default_mode")]
    mode: RawMode,
    #[serde(default = "default_policy")]
    on_peer_loss: RawPolicy,
    #[serde(default)]
    tuning: RawTuning,
    #[serde(default)]
    volume: Vec<RawVolume>,
    #[serde(default)]
    peer: Vec<RawPeer>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawMode {
    Sync,
    SemiSync,
    Async,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawPolicy {
    Suspend,
    Continue,
}

fn default_mode() -> RawMode {
    RawMode::Sync
}
fn default_policy() -> RawPolicy {
    RawPolicy::Suspend
}

impl From<RawMode> for Mode {
    fn from(mode: RawMode) -> Mode {
        match mode {
            RawMode::Sync => Mode::Sync,
            RawMode::SemiSync => Mode::SemiSync,
            RawMode::Async => Mode::Async,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    name: String,
    backing: PathBuf,
    #[serde(default = "default_metadata")]
    metadata: PathBuf,
    size: Option<RawSize>,
    sector_size: Option<u32>,
}

fn default_metadata() -> PathBuf {
    "internal".into()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawSize {
    Bytes(u64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPeer {
    node: String,
    slot: u8,
    addresses: Vec<String>,
    mode: Option<RawMode>,
}

struct Reader<'a> {
    file: &'a Path,
}

impl Reader<'_> {
    fn wrong(
        &self,
        key: impl Into<String>,
        what: impl Into<String>,
        next: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Key {
            file: self.file.to_owned(),
            key: key.into(),
            what: what.into(),
            next: next.into(),
        }
    }

    fn config(&self, raw: RawConfig) -> Result<Config, ConfigError> {
        let node = self.node(raw.node)?;
        let nbd = self.nbd(raw.nbd)?;
        let mut services = Vec::with_capacity(raw.service.len());
        let mut names = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for raw in raw.service {
            let service = self.service(raw, &node.name)?;
            let key = format!("service {:?}", service.name);
            if !names.insert(service.name.clone()) {
                return Err(self.wrong(
                    key,
                    "two services have this name",
                    "give each service a name of its own",
                ));
            }
            if !ids.insert(service.id) {
                return Err(self.wrong(
                    format!("{key}.id"),
                    "two services have this id",
                    "make a new id for one of them with uuidgen, the same on every node",
                ));
            }
            services.push(service);
        }
        self.backings(&services)?;
        if node.link_listen.is_empty() && services.iter().any(|service| !service.peers.is_empty()) {
            return Err(self.wrong(
                "node.link_listen",
                "services have peers, but the link listens nowhere",
                "set it, for example to [\"0.0.0.0:7741\"]",
            ));
        }
        Ok(Config {
            file: self.file.to_owned(),
            node,
            nbd,
            services,
        })
    }

    fn name(&self, key: &str, name: &str) -> Result<(), ConfigError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let fits = (1..=63).contains(&name.len())
            && name.chars().all(allowed)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if fits {
            return Ok(());
        }
        Err(self.wrong(
            key,
            format!("{name:?} is not a name"),
            "use 1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit",
        ))
    }

    fn absolute(&self, key: &str, path: &Path) -> Result<(), ConfigError> {
        if path.is_absolute() {
            return Ok(());
        }
        Err(self.wrong(
            key,
            format!("{} is not an absolute path", path.display()),
            "write it from / on",
        ))
    }

    fn node(&self, raw: RawNode) -> Result<NodeConfig, ConfigError> {
        self.name("node.name", &raw.name)?;
        self.absolute("node.state_dir", &raw.state_dir)?;
        self.absolute("node.control_socket", &raw.control_socket)?;
        let metrics = match raw.metrics.as_str() {
            "off" => None,
            text => {
                let address: SocketAddr = text.parse().map_err(|_| {
                    self.wrong(
                        "node.metrics",
                        format!("{text:?} is neither an address with a port nor \"off\""),
                        "write it like \"127.0.0.1:9741\"",
                    )
                })?;
                if !address.ip().is_loopback() {
                    return Err(self.wrong(
                        "node.metrics",
                        format!("{address} is not a loopback address, and metrics are served without encryption"),
                        "use 127.0.0.1 and let a local collector fetch them",
                    ));
                }
                Some(address)
            }
        };
        let profile = match (raw.profile, raw.wan) {
            (RawProfile::Lan, None) => Profile::Lan,
            (RawProfile::Lan, Some(_)) => {
                return Err(self.wrong(
                    "node.wan",
                    "it says nothing for the profile \"lan\"",
                    "set profile = \"wan\", or leave [node.wan] out",
                ));
            }
            (RawProfile::Wan, wan) => {
                let wan = wan.unwrap_or_default();
                if !(1..=400_000).contains(&wan.bandwidth_mbit)
                    || !(1..=2000).contains(&wan.round_trip_ms)
                {
                    return Err(self.wrong(
                        "node.wan",
                        "a value is out of range",
                        "use bandwidth_mbit from 1 to 400000 and round_trip_ms from 1 to 2000",
                    ));
                }
                Profile::Wan {
                    bandwidth: wan.bandwidth_mbit * 125_000,
                    round_trip: Duration::from_millis(wan.round_trip_ms),
                    congestion: wan.congestion,
                }
            }
        };
        let spin = match raw.spin_us {
            Some(micros) if micros > MAX_SPIN_US => {
                return Err(self.wrong(
                    "node.spin_us",
                    format!("{micros} is out of range"),
                    "use 0 to 1000 microseconds; 0 never waits awake",
                ));
            }
            Some(micros) => Duration::from_micros(micros),
            None => Spin::sane_budget(
                std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            ),
        };
        Ok(NodeConfig {
            name: raw.name,
            state_dir: raw.state_dir,
            link_listen: raw.link_listen,
            control_socket: raw.control_socket,
            metrics,
            profile,
            spin,
            state_may_be_on_nbd: raw.state_may_be_on_nbd,
        })
    }

    fn nbd(&self, raw: RawNbd) -> Result<NbdConfig, ConfigError> {
        if let Some(path) = &raw.unix {
            self.absolute("nbd.unix", path)?;
        }
        let tls = match raw.tls {
            None => NbdTls::LoopbackOnly,
            Some(tls) => {
                self.absolute("nbd.tls.certificate", &tls.certificate)?;
                self.absolute("nbd.tls.key", &tls.key)?;
                if let Some(ca) = &tls.client_ca {
                    self.absolute("nbd.tls.client_ca", ca)?;
                }
                NbdTls::Certificate {
                    certificate: tls.certificate,
                    key: tls.key,
                    client_ca: tls.client_ca,
                    always: tls.always,
                }
            }
        };
        if let (Some(tcp), NbdTls::LoopbackOnly) = (raw.tcp, &tls)
            && !tcp.ip().is_loopback()
        {
            return Err(self.wrong(
                "nbd.tcp",
                format!("{tcp} is reachable from other machines, and no certificate is configured"),
                "add [nbd.tls] with certificate and key, or listen on 127.0.0.1",
            ));
        }
        Ok(NbdConfig {
            unix: raw.unix,
            tcp: raw.tcp,
            tls,
        })
    }

    fn service(&self, raw: RawService, own_node: &str) -> Result<ServiceConfig, ConfigError> {
        let key = format!("service {:?}", raw.name);
        self.name("service.name", &raw.name)?;
        let id = parse_uuid(&raw.id).ok_or_else(|| {
            self.wrong(
                format!("{key}.id"),
                format!("{:?} is not an id of 32 hexadecimal digits", raw.id),
                "make one with uuidgen, the same on every node",
            )
        })?;
        let slot = self.slot(&format!("{key}.slot"), raw.slot)?;
        if raw.volume.is_empty() || raw.volume.len() > MAX_VOLUMES {
            return Err(self.wrong(
                format!("{key}.volume"),
                format!("it has {} volumes", raw.volume.len()),
                format!("give it 1 to {MAX_VOLUMES} [[service.volume]] sections"),
            ));
        }
        let mut volumes = Vec::with_capacity(raw.volume.len());
        for (index, volume) in raw.volume.into_iter().enumerate() {
            volumes.push(self.volume(&key, index as u16, volume)?);
        }
        let mut names = BTreeSet::new();
        for volume in &volumes {
            if !names.insert(&volume.name) {
                return Err(self.wrong(
                    format!("{key}.volume {:?}", volume.name),
                    "two volumes of the service have this name",
                    "give each a name of its own, in the same order on every node",
                ));
            }
        }
        let mode: Mode = raw.mode.into();
        let peers = self.peers(&key, raw.peer, slot, mode, own_node)?;
        let on_peer_loss = match raw.on_peer_loss {
            RawPolicy::Suspend => OnPeerLoss::Suspend,
            RawPolicy::Continue => OnPeerLoss::Continue,
        };
        let tuning = self.tuning(&format!("{key}.tuning"), raw.tuning)?;
        Ok(ServiceConfig {
            name: raw.name,
            id,
            slot,
            mode,
            on_peer_loss,
            tuning,
            volumes,
            peers,
        })
    }

    fn slot(&self, key: &str, slot: u8) -> Result<Slot, ConfigError> {
        if (slot as usize) < MAX_COPIES {
            return Ok(Slot(slot));
        }
        Err(self.wrong(
            key,
            format!("{slot} is not a slot"),
            format!(
                "number the copies from 0 to {}, the same on every node",
                MAX_COPIES - 1
            ),
        ))
    }

    fn volume(
        &self,
        service: &str,
        index: u16,
        raw: RawVolume,
    ) -> Result<VolumeConfig, ConfigError> {
        self.name(&format!("{service}.volume.name"), &raw.name)?;
        let key = format!("{service}.volume {:?}", raw.name);
        self.absolute(&format!("{key}.backing"), &raw.backing)?;
        let metadata = if raw.metadata == Path::new("internal") {
            MetadataPlace::Internal
        } else {
            self.absolute(&format!("{key}.metadata"), &raw.metadata)?;
            MetadataPlace::External(raw.metadata)
        };
        let size = match raw.size {
            None => None,
            Some(size) => {
                let bytes = match &size {
                    RawSize::Bytes(bytes) => Some(*bytes),
                    RawSize::Text(text) => parse_size(text),
                };
                match bytes.filter(|bytes| *bytes > 0 && bytes % 4096 == 0) {
                    Some(bytes) => Some(bytes),
                    None => {
                        return Err(self.wrong(
                            format!("{key}.size"),
                            "it is not a size in whole blocks of 4096 bytes",
                            "write it in bytes, or like \"100GiB\"",
                        ));
                    }
                }
            }
        };
        if !matches!(raw.sector_size, None | Some(512 | 4096)) {
            return Err(self.wrong(
                format!("{key}.sector_size"),
                "only 512 and 4096 are possible",
                "leave it out unless the copies' disks differ; then use 4096",
            ));
        }
        Ok(VolumeConfig {
            index: VolumeIndex(index),
            name: raw.name,
            backing: raw.backing,
            metadata,
            size,
            sector_size: raw.sector_size,
        })
    }

    fn peers(
        &self,
        service: &str,
        raw: Vec<RawPeer>,
        own: Slot,
        mode: Mode,
        own_node: &str,
    ) -> Result<Vec<PeerConfig>, ConfigError> {
        if raw.len() > MAX_PEERS {
            return Err(self.wrong(
                format!("{service}.peer"),
                format!("it has {} peers", raw.len()),
                format!("at most {MAX_PEERS} are possible"),
            ));
        }
        let mut peers: Vec<PeerConfig> = Vec::with_capacity(raw.len());
        for raw in raw {
            let key = format!("{service}.peer {:?}", raw.node);
            let node = match parse_uuid(&raw.node) {
                Some(id) => NodeRef::Id(id),
                None => {
                    self.name(&format!("{key}.node"), &raw.node)?;
                    NodeRef::Name(raw.node.clone())
                }
            };
            if node == NodeRef::Name(own_node.to_owned()) {
                return Err(self.wrong(
                    format!("{key}.node"),
                    "this is the node itself",
                    "list only the other copies; the own slot is the service's `slot`",
                ));
            }
            let slot = self.slot(&format!("{key}.slot"), raw.slot)?;
            if slot == own {
                return Err(self.wrong(
                    format!("{key}.slot"),
                    format!("slot {} is this node's own", slot.0),
                    "give every copy a slot of its own, the same on every node",
                ));
            }
            if let Some(other) = peers
                .iter()
                .find(|peer| peer.slot == slot || peer.node == node)
            {
                return Err(self.wrong(
                    key,
                    format!("peer {} already has this slot or name", other.node),
                    "give every copy a slot and a node of its own",
                ));
            }
            if let Some(bad) = raw.addresses.iter().find(|address| !is_host_port(address)) {
                return Err(self.wrong(
                    format!("{key}.addresses"),
                    format!("{bad:?} is not host:port"),
                    "write it like \"10.0.0.2:7741\" or \"[2001:db8::2]:7741\"",
                ));
            }
            // An empty list is allowed: the peer connects to this node (it is behind a translated address).
            let mode = raw.mode.map_or(mode, Mode::from);
            peers.push(PeerConfig {
                node,
                slot,
                addresses: raw.addresses,
                mode,
            });
        }
        Ok(peers)
    }

    /// Two volumes in one place as written; `check::environment` compares what the paths lead to.
    fn backings(&self, services: &[ServiceConfig]) -> Result<(), ConfigError> {
        let mut places = BTreeSet::new();
        for service in services {
            for volume in &service.volumes {
                let external = match &volume.metadata {
                    MetadataPlace::Internal => None,
                    MetadataPlace::External(path) => Some(("metadata", path)),
                };
                for (key, path) in [("backing", &volume.backing)].into_iter().chain(external) {
                    if !places.insert(path) {
                        return Err(self.wrong(
                            format!("service {:?}.volume {:?}.{key}", service.name, volume.name),
                            format!("{} is already used by another volume", path.display()),
                            "give each volume and each external metadata area a place of its own",
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

fn is_host_port(text: &str) -> bool {
    if text.parse::<SocketAddr>().is_ok() {
        return true;
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let host_fits = !host.is_empty()
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    host_fits && port.parse::<u16>().is_ok_and(|port| port > 0)
}
