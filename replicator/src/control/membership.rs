//! How nodes get an identity and come to trust each other: `init`, `token` and `join` of the command line. They work on
//! the state directory and need no running replicator.

use crate::config::{Config, ConfigError, DEFAULT_PATH, DEFAULT_STATE_DIR};
use holdfast_link::{Identity, JoinServer, LinkError, Peer, PeerStore, Token, Validity};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Why a step towards membership failed.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "no name is known for this node: the configuration cannot be read and the host has no usable name. Nothing was changed; give one with --name"
    )]
    NoName,
    #[error(
        "{0} is every address of this machine, so the other node cannot be told where to come. Nothing was changed; name one with --address"
    )]
    NoAddress(SocketAddr),
    #[error(
        "nobody came with the token before it expired. Nothing was changed; make a new one with `holdfast token`"
    )]
    NobodyCame,
    #[error("the network could not be used: {0}. Nothing was changed")]
    Runtime(std::io::Error),
}

/// What the options and the configuration say of this node.
#[derive(Clone, Debug)]
pub struct Own {
    pub state_dir: PathBuf,
    /// As configured; none where there is no configuration yet.
    pub name: Option<String>,
    /// Where peers find this node's link; wildcard addresses are left out, for they mean nothing to a peer.
    pub link_addresses: Vec<SocketAddr>,
}

impl Own {
    /// Options come first, then the configuration (the default one when none is named), then defaults. A configuration
    /// that is not there yet is no obstacle, unless it was named: membership may come before configuration.
    ///
    /// # Errors
    /// A configuration that is there and wrong: an identity in another place than the replicator looks for it helps nobody.
    pub fn find(
        config: Option<&Path>,
        state_dir: Option<&Path>,
        link_addresses: &[SocketAddr],
    ) -> Result<Self, MembershipError> {
        let loaded = Config::load(config.unwrap_or(Path::new(DEFAULT_PATH)));
        let config = match loaded {
            Ok(config) => Some(config.node),
            Err(ConfigError::Read { source, .. })
                if config.is_none() && source.kind() == std::io::ErrorKind::NotFound =>
            {
                None
            }
            Err(error) => return Err(error.into()),
        };
        let listening = config
            .as_ref()
            .map(|node| node.link_listen.clone())
            .unwrap_or_default();
        let candidates = if link_addresses.is_empty() {
            listening
        } else {
            link_addresses.to_vec()
        };
        Ok(Own {
            state_dir: match (state_dir, &config) {
                (Some(directory), _) => directory.to_path_buf(),
                (None, Some(node)) => node.state_dir.clone(),
                (None, None) => PathBuf::from(DEFAULT_STATE_DIR),
            },
            name: config.map(|node| node.name),
            link_addresses: candidates
                .into_iter()
                .filter(|address| !address.ip().is_unspecified())
                .collect(),
        })
    }
}

/// Gives this node an identity, under `name`, or the configured name, or the host's.
///
/// # Errors
/// It has one already, no name is usable, or the state directory cannot be written.
pub fn init(own: &Own, name: Option<&str>) -> Result<Identity, MembershipError> {
    let name = match (name, &own.name) {
        (Some(name), _) => name.to_string(),
        (None, Some(name)) => name.clone(),
        (None, None) => {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = host.trim().to_string();
            // "localhost" would name every machine.
            let usable = !host.is_empty() && !host.starts_with("localhost");
            if usable {
                host
            } else {
                return Err(MembershipError::NoName);
            }
        }
    };
    Ok(Identity::init(&own.state_dir, &name)?)
}

/// Makes a token, hands it to `show`, and waits on `listen` until a node came with it. Callers with no or a wrong token
/// are reported to `refused` and change nothing.
///
/// # Errors
/// There is no identity, the address is taken, or nobody came in time.
pub fn wait_for_peer(
    own: &Own,
    listen: SocketAddr,
    addresses: &[SocketAddr],
    lifetime: Duration,
    show: impl FnOnce(&Token),
    mut refused: impl FnMut(&LinkError),
) -> Result<Peer, MembershipError> {
    let identity = Arc::new(Identity::load(&own.state_dir)?);
    let peers = Arc::new(PeerStore::load(&own.state_dir)?);
    runtime()?.block_on(async {
        let fingerprint = identity.fingerprint();
        let server = JoinServer::bind(listen, identity, peers, own.link_addresses.clone())?;
        let reachable = reachable(server.local_address(), addresses, &own.link_addresses)?;
        let token = server
            .tokens()
            .create(reachable, fingerprint, lifetime, SystemTime::now())?;
        show(&token);
        let waiting = async {
            while let Some(result) = server.next().await {
                match result {
                    Ok(peer) => return Ok(peer),
                    Err(error) => refused(&error),
                }
            }
            Err(MembershipError::NobodyCame)
        };
        let result = tokio::time::timeout(lifetime, waiting).await;
        server.close();
        result.unwrap_or(Err(MembershipError::NobodyCame))
    })
}

/// The addresses a token names: those given, else the one listened on, else the link's with this port.
fn reachable(
    listening: SocketAddr,
    given: &[SocketAddr],
    link: &[SocketAddr],
) -> Result<Vec<SocketAddr>, MembershipError> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    if !listening.ip().is_unspecified() {
        return Ok(vec![listening]);
    }
    let mut hosts: Vec<IpAddr> = link.iter().map(SocketAddr::ip).collect();
    hosts.retain(|host| listening.is_ipv6() || host.is_ipv4());
    hosts.dedup();
    if hosts.is_empty() {
        return Err(MembershipError::NoAddress(listening));
    }
    Ok(hosts
        .into_iter()
        .map(|host| SocketAddr::new(host, listening.port()))
        .collect())
}

/// Joins the node that made `token`: afterwards the two trust each other.
///
/// # Errors
/// The text is no token, nobody answers, or the other node refuses.
pub fn join(own: &Own, token: &str) -> Result<Peer, MembershipError> {
    let token: Token = token.parse()?;
    let identity = Arc::new(Identity::load(&own.state_dir)?);
    let peers = Arc::new(PeerStore::load(&own.state_dir)?);
    let joined = runtime()?.block_on(holdfast_link::join(
        &identity,
        &peers,
        &token,
        &own.link_addresses,
    ))?;
    Ok(joined)
}

/// The certificates by which peers know this node.
#[derive(Clone, Debug)]
pub struct Certificates {
    pub node: String,
    /// Fingerprint of the one in use, 64 hexadecimal digits.
    pub current: String,
    /// The next one, while it is being rolled out.
    pub next: Option<String>,
}

fn certificates_of(identity: &Identity) -> Certificates {
    let mut prints = identity.fingerprints().into_iter();
    Certificates {
        node: identity.name().to_owned(),
        current: prints
            .next()
            .map(|print| print.to_string())
            .unwrap_or_default(),
        next: prints.next().map(|print| print.to_string()),
    }
}

/// The certificates of this node.
///
/// # Errors
/// There is no identity, or it cannot be read.
pub fn certificates(own: &Own) -> Result<Certificates, MembershipError> {
    Ok(certificates_of(&Identity::load(&own.state_dir)?))
}

/// Makes the next certificate; the one in use stays in use. A running replicator announces it to its peers once it has
/// read its certificates again.
///
/// # Errors
/// As [`certificates`], or the file cannot be written.
pub fn prepare_certificate(own: &Own) -> Result<Certificates, MembershipError> {
    let identity = Identity::load(&own.state_dir)?;
    identity.prepare_rotation(Validity::default())?;
    Ok(certificates_of(&identity))
}

/// Uses the next certificate from here on. `force` does so even where a peer has not confirmed that it accepts it.
///
/// # Errors
/// None is prepared, or a peer has not confirmed it: it would refuse this node.
pub fn activate_certificate(own: &Own, force: bool) -> Result<Certificates, MembershipError> {
    let identity = Identity::load(&own.state_dir)?;
    identity.activate_rotation(&PeerStore::load(&own.state_dir)?, force)?;
    Ok(certificates_of(&identity))
}

fn runtime() -> Result<tokio::runtime::Runtime, MembershipError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(MembershipError::Runtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(directory: &Path, address: &str) -> Own {
        Own {
            state_dir: directory.to_path_buf(),
            name: None,
            link_addresses: vec![address.parse().unwrap()],
        }
    }

    #[test]
    fn two_nodes_meet_over_a_token() {
        let directory = tempfile::tempdir().unwrap();
        let alpha = own(&directory.path().join("alpha"), "127.0.0.1:7001");
        let beta = own(&directory.path().join("beta"), "127.0.0.1:7002");
        init(&alpha, Some("alpha")).unwrap();
        init(&beta, Some("beta")).unwrap();
        assert!(
            init(&beta, Some("beta")).is_err(),
            "an identity is never replaced"
        );
        let (send, receive) = std::sync::mpsc::channel();
        let (left, right) = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let listen = "127.0.0.1:0".parse().unwrap();
                let show = |token: &Token| send.send(token.to_string()).unwrap();
                wait_for_peer(&alpha, listen, &[], Duration::from_secs(60), show, |_| ())
            });
            let token = receive.recv().unwrap();
            let joined = join(&beta, &token).unwrap();
            (waiting.join().unwrap().unwrap(), joined)
        });
        assert_eq!((left.name.as_str(), right.name.as_str()), ("beta", "alpha"));
        assert_eq!(left.addresses, beta.link_addresses);
        assert_eq!(right.addresses, alpha.link_addresses);
    }

    #[test]
    fn a_configuration_that_is_wrong_is_told_of_with_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("holdfast.toml");
        let missing = Own::find(Some(&file), None, &[]).unwrap_err().to_string();
        assert!(
            missing.contains("cannot read the configuration"),
            "{missing}"
        );
        for (text, key) in [
            (
                "[node]\nname = \"a\"\nstate_dri = \"/tmp/x\"\n",
                "state_dri",
            ),
            ("[node]\nname = \"a b\"\n", "node.name"),
        ] {
            std::fs::write(&file, text).unwrap();
            // Also where an option names the place: the rest of it would still be guessed.
            for state_dir in [None, Some(directory.path())] {
                let wrong = Own::find(Some(&file), state_dir, &[])
                    .unwrap_err()
                    .to_string();
                assert!(
                    wrong.contains(key) && wrong.contains("holdfast.toml"),
                    "{wrong}"
                );
            }
        }
        std::fs::write(&file, "[node]\nname = \"a\"\nstate_dir = \"/tmp/x\"\n").unwrap();
        let own = Own::find(Some(&file), None, &[]).unwrap();
        assert_eq!(own.state_dir, Path::new("/tmp/x"));
    }

    #[test]
    fn a_wildcard_address_is_never_told_to_others() {
        let any: SocketAddr = "0.0.0.0:7742".parse().unwrap();
        let link = ["10.0.0.1:7741".parse().unwrap()];
        assert_eq!(
            reachable(any, &[], &link).unwrap(),
            ["10.0.0.1:7742".parse().unwrap()]
        );
        assert!(matches!(
            reachable(any, &[], &[]),
            Err(MembershipError::NoAddress(_))
        ));
        let given = ["192.0.2.9:1".parse().unwrap()];
        assert_eq!(reachable(any, &given, &link).unwrap(), given);
    }
}
