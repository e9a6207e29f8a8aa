//! Bringing a shard up, on its own thread: memory, ring, link, services, frontends; then serving until it is stopped.

use super::driver::Shard;
use super::exports::ShardExports;
use super::handle::{Message, answer_messages};
use super::link::{LinkPort, PeerRef};
use super::memory::{Budgets, Memory};
use super::service::{PeerState, Service, VolumeFiles};
use super::tls::{self, TlsError};
use crate::config::{Config, NbdTls, Profile, ServiceConfig};
use crate::create::{VolumeError, peer_parameters, random_u64};
use crate::events::EventLog;
use crate::metrics::Metrics;
use crate::observed::Observed;
use crate::place::{self, Hints, Opened, PlaceError};
use holdfast_disk::{OpenOptions, Ring, RingError, RingOptions};
use holdfast_frontend::CloseReason;
use holdfast_frontend::nbd::{BindError, Limits, NbdServer, bind_tcp, bind_unix};
use holdfast_link::{Congestion, Identity, LinkConfig, LinkError, PeerStore};
use holdfast_replicator_core::api::{
    Actions, AttachParameters, AttachVolume, DiskError, MetaSource, PeerParameters,
};
use holdfast_replicator_core::{Core, words};
use holdfast_wire_format::ids::{Incarnation, Uuid, VolumeIndex};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

/// How often names of peers are resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);

/// Why a shard did not start. Nothing was served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "no memory for the shard's buffers: {0}. Lower receive_bytes of the services, or add memory"
    )]
    Memory(std::io::Error),
    #[error("the shard's thread could not be set up: {0}")]
    Thread(std::io::Error),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("service {service}: {source}")]
    Place { service: String, source: PlaceError },
    /// What the core found wrong with the metadata, with the names of volumes in it.
    #[error("service {service}: {text}")]
    Attach { service: String, text: String },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the NBD server: {0}")]
    Bind(#[from] BindError),
    #[error("no random numbers: {0}")]
    Random(std::io::Error),
    #[error("the shard's thread ended while it started; see the log")]
    Died,
}

/// Where a shard really listens, with the ports the system chose.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub link: Vec<SocketAddr>,
    pub nbd_tcp: Option<SocketAddr>,
}

/// What a shard needs.
pub(crate) struct Setup {
    pub config: Config,
    pub identity: Arc<Identity>,
    pub peers: Arc<PeerStore>,
    pub log: EventLog,
    pub metrics: Metrics,
    pub messages: mpsc::Receiver<Message>,
    pub observed: Arc<Observed>,
}

/// Starts a shard on a thread of its own and waits until it serves, or why it does not. The thread ends after a
/// `Stop` message was carried out.
///
/// # Errors
/// [`StartError`]; the thread has ended then.
pub(crate) async fn start(
    setup: Setup,
) -> Result<(Addresses, std::thread::JoinHandle<()>), StartError> {
    let (ready, started) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("shard-0".into())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
            {
                Ok(runtime) => runtime,
                Err(error) => return drop(ready.send(Err(StartError::Thread(error)))),
            };
            // As one of the tasks: the runtime's own is looked at with each event.
            let serving = async { tokio::task::spawn_local(serve(setup, ready)).await };
            if let Err(error) = LocalSet::new().block_on(&runtime, serving)
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        })
        .map_err(StartError::Thread)?;
    let addresses = started.await.map_err(|_| StartError::Died)??;
    Ok((addresses, thread))
}

async fn serve(setup: Setup, ready: oneshot::Sender<Result<Addresses, StartError>>) {
    let Setup {
        config,
        identity,
        peers,
        log,
        metrics,
        messages,
        observed,
    } = setup;
    let attacher = Attacher {
        config: config.clone(),
        node: identity.id(),
        peers: peers.clone(),
        metrics,
        observed,
    };
    let up = bring_up(&config, identity, peers, &log, &attacher).await;
    let (shard, server, addresses) = match up {
        Ok(up) => up,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let uris = nbd_uris(&config, addresses.nbd_tcp);
    let driver = tokio::task::spawn_local(shard.clone().run());
    resolve_peers(&config, &shard);
    // What the attach decided is carried out: superblocks are written, peers are called.
    shard.pump();
    if ready.send(Ok(addresses)).is_err() {
        // Nobody waits for this shard any more; it still stops cleanly, by its closed message queue.
        tracing::warn!("the process ended while its shard started");
    }
    answer_messages(shard.clone(), messages, uris, attacher).await;
    if let Some(server) = &server {
        server.stop(CloseReason::Stopping);
        server.idle().await;
    }
    shard.link().shutdown().await;
    driver.abort();
}

type Up = (Rc<Shard>, Option<Rc<NbdServer<ShardExports>>>, Addresses);

async fn bring_up(
    config: &Config,
    identity: Arc<Identity>,
    peers: Arc<PeerStore>,
    log: &EventLog,
    attacher: &Attacher,
) -> Result<Up, StartError> {
    let budgets = Budgets::of(
        config
            .services
            .iter()
            .map(|service| (&service.tuning, service.peers.len())),
    );
    let memory = Rc::new(Memory::new(budgets).map_err(StartError::Memory)?);
    let ring = Ring::new(RingOptions::default(), memory.pool())?;
    for service in &config.services {
        peer_parameters(service, &peers)?;
    }
    let link = LinkPort::start(
        LinkConfig {
            listen: config.node.link_listen.clone(),
            identity,
            peers,
            tuning: link_tuning(config),
            seed: random_u64().map_err(StartError::Random)?,
        },
        memory.clone(),
        log.clone(),
    )?;
    let shard = Shard::new(
        memory,
        ring,
        link,
        log.clone(),
        Instant::now(),
        config.node.spin,
        config.node.state_dir.clone(),
    );
    for at in 0..config.services.len() {
        attacher.attach(&shard, at)?;
    }
    shard.link().serve(&shard);
    let mut addresses = Addresses {
        link: shard.link().addresses(),
        nbd_tcp: None,
    };
    let mut server = None;
    if config.nbd.unix.is_some() || config.nbd.tcp.is_some() {
        let nbd = NbdServer::new(
            ShardExports {
                shard: shard.clone(),
            },
            Limits::default(),
        );
        if let Some(path) = &config.nbd.unix {
            tokio::task::spawn_local(nbd.clone().serve_unix(bind_unix(path, 0o600)?));
        }
        if let Some(address) = config.nbd.tcp {
            let tls = tls::policy(&config.nbd.tls)?;
            let listener = bind_tcp(address, &tls).await?;
            addresses.nbd_tcp = listener.local_addr().ok();
            tokio::task::spawn_local(nbd.clone().serve_tcp(listener, tls));
        }
        server = Some(nbd);
    }
    Ok((shard, server, addresses))
}

fn link_tuning(config: &Config) -> holdfast_link::Tuning {
    let profile = match config.node.profile {
        Profile::Lan => holdfast_link::Profile::Lan,
        Profile::Wan {
            bandwidth,
            round_trip,
            congestion,
        } => holdfast_link::Profile::Wan {
            bandwidth,
            round_trip,
            congestion: match congestion {
                crate::config::Congestion::Cubic => Congestion::Cubic,
                crate::config::Congestion::Bbr => Congestion::Bbr,
            },
        },
    };
    holdfast_link::Tuning {
        profile,
        ..holdfast_link::Tuning::default()
    }
}

/// Metadata of all volumes of a service, before it serves.
struct Areas<'a> {
    volumes: &'a [Opened],
}

impl MetaSource for Areas<'_> {
    fn read(
        &mut self,
        volume: VolumeIndex,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), DiskError> {
        let Some(opened) = self.volumes.get(volume.0 as usize) else {
            return Err(DiskError::BeyondEnd);
        };
        opened
            .metadata()
            .read_exact_at(opened.base + offset, bytes)
            .map_err(|error| {
                tracing::error!(%error, "metadata could not be read");
                DiskError::Io
            })
    }
}

/// A killed predecessor's backings stay locked until the kernel has ended its last requests, a moment after the process is gone. Whoever
/// still runs was met before, at the control socket.
const LOCK_WAIT: Duration = Duration::from_secs(10);

fn open_options(_service: &str, _volume: &str) -> OpenOptions {
    OpenOptions {
        lock_wait: LOCK_WAIT,
        // Where this names a directory, every backing is put under the fault layer, with its switchboard in there.
        #[cfg(feature = "fault-injection")]
        fault_control: std::env::var_os("HOLDFAST_FAULT_DIR").map(|directory| {
            std::path::PathBuf::from(directory).join(format!("{_service}-{_volume}.sock"))
        }),
        ..OpenOptions::default()
    }
}

/// What it takes to attach a service, at the start and later.
pub(super) struct Attacher {
    config: Config,
    node: Uuid,
    peers: Arc<PeerStore>,
    metrics: Metrics,
    observed: Arc<Observed>,
}

impl Attacher {
    /// Attaches the service at that place of the configuration, in place of what it was here before. Blocks while metadata is read.
    pub fn attach(&self, shard: &Rc<Shard>, at: usize) -> Result<(), StartError> {
        let service = &self.config.services[at];
        let peers = peer_parameters(service, &self.peers)?;
        // As the nodes are called where they joined, also where the configuration has their ids.
        let known = self.peers.all();
        let names = |id: Uuid| {
            known
                .iter()
                .find(|peer| peer.id == id)
                .map(|peer| peer.name.clone())
        };
        let state_dir = &self.config.node.state_dir;
        let mut hints = Hints::load(state_dir);
        let mut hints_changed = false;
        attach(
            shard,
            &self.config,
            service,
            at,
            self.node,
            &peers,
            &mut hints,
            &mut hints_changed,
            &self.metrics,
            &names,
            &self.observed,
        )?;
        if hints_changed && let Err(error) = hints.store(state_dir) {
            // A help for the day a device grows, no more.
            tracing::warn!(%error, "the sizes of the devices could not be remembered in the state directory");
        }
        Ok(())
    }
}

#[allow(clippy::too_many_arguments)]
fn attach(
    shard: &Rc<Shard>,
    config: &Config,
    service: &ServiceConfig,
    at: usize,
    node: Uuid,
    peers: &[PeerParameters],
    hints: &mut Hints,
    hints_changed: &mut bool,
    metrics: &Metrics,
    names: &dyn Fn(Uuid) -> Option<String>,
    observed: &Observed,
) -> Result<(), StartError> {
    let mut opened = Vec::with_capacity(service.volumes.len());
    for volume in &service.volumes {
        let hint = hints.size(&service.name, &volume.name);
        let options = open_options(&service.name, &volume.name);
        let place = place::open(volume, &options, hint).map_err(|source| StartError::Place {
            service: service.name.clone(),
            source,
        })?;
        // With a grown device the old size is what finds the locator, until the volume was grown.
        if place::read_locator(&place.data, place.data.size()).is_ok_and(|found| found.is_some()) {
            *hints_changed |= hints.set(&service.name, &volume.name, place.data.size());
        }
        opened.push(place);
    }
    let incarnation = loop {
        let random = random_u64().map_err(StartError::Random)?;
        if random != 0 {
            break Incarnation(random);
        }
    };
    let parameters = AttachParameters {
        volumes: service
            .volumes
            .iter()
            .zip(&opened)
            .map(|(volume, place)| AttachVolume {
                index: volume.index,
                name: volume.name.clone(),
                device_data_size: place.data_limit,
                sector_size: place.data.sector_size(),
                discard_zeroes: place.data.discard_zeroes(),
            })
            .collect(),
        peers: peers.to_vec(),
        slot: service.slot,
        node,
        service: service.id,
        incarnation,
        seed: random_u64().map_err(StartError::Random)?,
        tuning: service.tuning,
        store: holdfast_replicator_core::api::StoreKind::Own,
    };
    let now = shard.now();
    let mut actions = Actions::new();
    let mut core = Core::attach(
        parameters,
        &mut Areas { volumes: &opened },
        now,
        &mut actions,
    )
    .map_err(|error| StartError::Attach {
        service: service.name.clone(),
        text: words::named_volumes(&error.to_string(), &|index| {
            let volume = service.volumes.get(index)?;
            Some(format!("{} ({})", volume.name, volume.backing.display()))
        }),
    })?;
    let unread = |peer: Option<Uuid>| {
        let names = observed.unread(
            &service.id.to_string(),
            peer.map(|id| id.to_string()).as_deref(),
        );
        let volumes = service.volumes.iter();
        volumes
            .filter(|volume| names.contains(&volume.name))
            .map(|volume| volume.index)
            .collect::<Vec<_>>()
    };
    let of_peers: Vec<_> = peers
        .iter()
        .map(|peer| (peer.slot, unread(Some(peer.node))))
        .collect();
    core.recall_unread(&unread(None), &of_peers);
    let status = core.status(now);
    let volumes = opened
        .into_iter()
        .zip(&status.volumes)
        .zip(&service.volumes)
        .map(|((place, status), volume)| {
            let Opened {
                data,
                external,
                base,
                ..
            } = place;
            let discard_zeroes = data.discard_zeroes();
            let meta_path = external.as_ref().unwrap_or(&data).path().to_owned();
            let data = shard.ring().attach(data);
            let meta = external.map_or(data, |external| shard.ring().attach(external));
            VolumeFiles {
                name: volume.name.clone(),
                data,
                meta,
                meta_base: base,
                meta_path,
                not_zero: None,
                sector: status.sector_size,
                size: status.size,
                discard_zeroes,
                metrics: metrics.volume(&service.name, &volume.name),
                hung: false,
            }
        })
        .collect();
    let peer_states = service
        .peers
        .iter()
        .zip(peers)
        .map(|(configured, peer)| {
            let name = names(peer.node).unwrap_or_else(|| configured.node.to_string());
            PeerState {
                slot: peer.slot,
                link: PeerRef {
                    node: peer.node,
                    service: service.id,
                },
                metrics: metrics.peer(&service.name, &name),
                acks: Default::default(),
                name,
            }
        })
        .collect();
    let slots: Vec<_> = peers.iter().map(|peer| (peer.slot, peer.node)).collect();
    shard.link().add_service(
        at,
        service.id,
        &service.name,
        Budgets::of_peer(&service.tuning),
        &slots,
    );
    shard.put_service(Service::new(
        at,
        service.name.clone(),
        config.node.name.clone(),
        service.slot,
        core,
        actions,
        volumes,
        peer_states,
        Budgets::OF_CLIENTS,
    ));
    tracing::info!(service = service.name, state = ?status.state, position = status.position, "service attached");
    Ok(())
}

/// Gives the link the configured addresses of each node, names resolved again now and then.
fn resolve_peers(config: &Config, shard: &Rc<Shard>) {
    let mut nodes: BTreeMap<Uuid, BTreeSet<String>> = BTreeMap::new();
    shard.with_services(|services| {
        for (service, configured) in services.iter().zip(&config.services) {
            for (peer, configured) in service.peers.iter().zip(&configured.peers) {
                nodes
                    .entry(peer.link.node)
                    .or_default()
                    .extend(configured.addresses.iter().cloned());
            }
        }
    });
    for (node, addresses) in nodes
        .into_iter()
        .filter(|(_, addresses)| !addresses.is_empty())
    {
        let shard = shard.clone();
        let mut reloaded = shard.reloaded.subscribe();
        tokio::task::spawn_local(async move {
            let fixed = addresses
                .iter()
                .all(|address| address.parse::<SocketAddr>().is_ok());
            let mut last = Vec::new();
            loop {
                let mut found = Vec::new();
                for address in &addresses {
                    match tokio::net::lookup_host(address.as_str()).await {
                        Ok(resolved) => found.extend(
                            resolved
                                .filter(|address| !found.contains(address))
                                .collect::<Vec<_>>(),
                        ),
                        Err(error) => {
                            tracing::warn!(address, %error, "the address of a peer could not be resolved")
                        }
                    }
                }
                if !found.is_empty() && found != last {
                    if let Err(error) = shard.link().set_paths(node, found.clone()) {
                        tracing::warn!(%error, "the addresses of a peer were not taken");
                    }
                    last = found;
                }
                // The sender lives in the shard, which this task holds.
                if fixed {
                    let _ = reloaded.changed().await;
                    last.clear();
                } else if tokio::time::timeout(RESOLVE_INTERVAL, reloaded.changed())
                    .await
                    .is_ok()
                {
                    last.clear();
                }
            }
        });
    }
}

/// The NBD addresses of a volume, by service and volume name.
fn nbd_uris(
    config: &Config,
    tcp: Option<SocketAddr>,
) -> impl Fn(&str, &str) -> Vec<String> + use<> {
    let unix = config.nbd.unix.clone();
    let encrypted = match (&config.nbd.tls, tcp) {
        (NbdTls::Certificate { always, .. }, Some(tcp)) => *always || !tcp.ip().is_loopback(),
        _ => false,
    };
    let mut volumes = BTreeMap::<String, usize>::new();
    for volume in config.services.iter().flat_map(|service| &service.volumes) {
        *volumes.entry(volume.name.clone()).or_default() += 1;
    }
    move |service, volume| {
        let alone = volumes.get(volume).copied().unwrap_or(0) <= 1;
        let name = if alone {
            volume.to_owned()
        } else {
            format!("{service}/{volume}")
        };
        let unix = unix
            .as_deref()
            .map(|path: &Path| format!("nbd+unix:///{name}?socket={}", path.display()));
        let scheme = if encrypted { "nbds" } else { "nbd" };
        unix.into_iter()
            .chain(tcp.map(|tcp| format!("{scheme}://{tcp}/{name}")))
            .collect()
    }
}
