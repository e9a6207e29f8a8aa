//! The replicator process: from a configuration file to serving, and back to a clean stop.
//!
//! The main thread runs control socket, metrics and signals; each shard has a thread of its own, the event log's file
//! too. A replicator that starts comes up secondary, whatever it was before: promotion is asked for, by a person or
//! an agent.

use crate::config::{Config, ConfigError, check};
use crate::control::node::Node as _;
use crate::control::protocol::LevelName;
use crate::control::server::{ListenError, Server};
use crate::events::{EventLog, EventLogError, now_ms};
use crate::metrics::Metrics;
use crate::observed::{LOOK_INTERVAL, Observed};
use crate::shard::{self, Addresses, NodeHandle, Setup, StartError};
use holdfast_link::{Identity, LinkError, PeerStore};
use holdfast_replicator_core::api::Refusal;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// File in the state directory whose lock says that a replicator runs.
const LOCK_NAME: &str = "replicator.lock";
/// How long the last lines may take to reach the event log's file.
const LOG_GRACE: Duration = Duration::from_secs(2);

/// Why the replicator did not start, or did not stop cleanly.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "another replicator (process {pid}) uses the state directory {}. Nothing was started; stop that one first, or give this \
         one its own state_dir", state_dir.display()
    )]
    Running { state_dir: PathBuf, pid: String },
    #[error("{what} {}: {source}. Nothing was started", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "the configuration names this node {configured}, its identity in {} says {known}. Nothing was started; correct node.name, \
         or use this node's own state directory", state_dir.display()
    )]
    OtherNode {
        configured: String,
        known: String,
        state_dir: PathBuf,
    },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    EventLog(#[from] EventLogError),
    #[error(transparent)]
    Control(#[from] ListenError),
    #[error(
        "metrics cannot be served on {address}: {source}. Nothing was started; free the port, or set node.metrics to another address or \"off\""
    )]
    Metrics {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("the metrics could not be set up: {0}")]
    Exporter(#[from] metrics_exporter_prometheus::BuildError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the process could not be set up: {0}")]
    Runtime(std::io::Error),
    #[error(
        "it did not stop cleanly: {0}. What was acknowledged is safe; the next start takes longer, since it repeats what may be missing"
    )]
    Unclean(String),
}

/// A replicator that runs in this process.
pub struct Replicator {
    handle: NodeHandle,
    addresses: Addresses,
    metrics: Option<SocketAddr>,
    log: EventLog,
    observed: Arc<Observed>,
    remembering: tokio::task::JoinHandle<()>,
    shard: JoinHandle<()>,
    stop: watch::Sender<bool>,
    control: tokio::task::JoinHandle<()>,
    /// Held until the end: nobody else uses the state directory.
    _lock: File,
}

impl Replicator {
    /// Attaches all services and serves. Within a tokio runtime, which then carries control socket and metrics.
    ///
    /// # Errors
    /// [`ProcessError`]; nothing runs then.
    pub async fn start(config: Config) -> Result<Replicator, ProcessError> {
        check::environment(&config)?;
        let state_dir = config.node.state_dir.clone();
        let lock = lock(&state_dir)?;
        let identity = Identity::load(&state_dir)?;
        if identity.name() != config.node.name {
            return Err(ProcessError::OtherNode {
                configured: config.node.name.clone(),
                known: identity.name().to_owned(),
                state_dir,
            });
        }
        for socket in [Some(&config.node.control_socket), config.nbd.unix.as_ref()]
            .into_iter()
            .flatten()
        {
            if let Some(directory) = socket.parent() {
                std::fs::create_dir_all(directory).map_err(|source| ProcessError::Io {
                    what: "cannot make the directory of a socket,",
                    path: directory.to_owned(),
                    source,
                })?;
            }
        }
        let log = EventLog::open(&state_dir)?;
        let metrics = Metrics::new()?;
        // What can fail without touching a disk comes first.
        let server = Server::open(&config.node.control_socket)?;
        let scrapes = match config.node.metrics {
            None => None,
            Some(address) => {
                let listener = TcpListener::bind(address).await;
                Some(listener.map_err(|source| ProcessError::Metrics { address, source })?)
            }
        };
        let metrics_address = scrapes
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());
        let (identity, peers) = (Arc::new(identity), Arc::new(PeerStore::load(&state_dir)?));
        let observed = Arc::new(Observed::load(&state_dir));
        let (handle, messages) = NodeHandle::new(
            config.node.name.clone(),
            log.clone(),
            identity.clone(),
            peers.clone(),
            observed.clone(),
        );
        let names: Vec<&str> = config
            .services
            .iter()
            .map(|service| service.name.as_str())
            .collect();
        let text = format!(
            "replicator {} starts on node {} with {}",
            env!("CARGO_PKG_VERSION"),
            config.node.name,
            if names.is_empty() {
                "no service".to_owned()
            } else {
                format!("services {}", names.join(", "))
            }
        );
        log.node(LevelName::Info, "started", text);
        let setup = Setup {
            peers,
            identity,
            log: log.clone(),
            metrics: metrics.clone(),
            messages,
            config,
            observed: observed.clone(),
        };
        let (addresses, shard) = shard::start(setup).await.inspect_err(|error| {
            log.node(LevelName::Error, "start-failed", error.to_string());
            log.settle(LOG_GRACE);
        })?;
        let (stop, stopped) = watch::channel(false);
        let until = |mut stopped: watch::Receiver<bool>| async move {
            // A sender that is gone means the same as a stop.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let control = tokio::spawn(server.run(handle.clone(), until(stopped.clone())));
        if let Some(listener) = scrapes {
            let (node, stopped) = (handle.clone(), until(stopped));
            tokio::spawn(async move {
                tokio::select! {
                    () = metrics.serve(listener, node) => {}
                    () = stopped => {}
                }
            });
        }
        let (node, mut ends) = (handle.clone(), stop.subscribe());
        let remembering = tokio::spawn({
            let observed = observed.clone();
            async move {
                loop {
                    remember(&node, &observed).await;
                    if tokio::time::timeout(LOOK_INTERVAL, ends.wait_for(|stop| *stop))
                        .await
                        .is_ok()
                    {
                        return;
                    }
                }
            }
        });
        Ok(Replicator {
            observed,
            remembering,
            handle,
            addresses,
            metrics: metrics_address,
            log,
            shard,
            stop,
            control,
            _lock: lock,
        })
    }

    /// For asking and commanding it.
    pub fn handle(&self) -> &NodeHandle {
        &self.handle
    }

    /// Where it listens, with the ports the system chose.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Where metrics are served.
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// Whether its shard has ended.
    pub fn is_finished(&self) -> bool {
        self.shard.is_finished()
    }

    /// Stops cleanly: clients are sent away, every service is demoted if it is primary, flushed and marked clean. What did not
    /// work is returned.
    pub async fn stop(self) -> Vec<Refusal> {
        // What is written from here on makes the remembered moment older than the true one, never younger.
        self.remembering.abort();
        remember(&self.handle, &self.observed).await;
        let refusals = self.handle.stop().await;
        let shard = self.shard;
        if let Ok(Err(_)) = tokio::task::spawn_blocking(move || shard.join()).await {
            tracing::error!("the shard's thread panicked while it stopped");
        }
        // Nobody listens when both ended by themselves.
        let _ = self.stop.send(true);
        let _ = self.control.await;
        match refusals.as_slice() {
            [] => self
                .log
                .node(LevelName::Info, "stopped", "the replicator stopped cleanly"),
            some => self
                .log
                .node(LevelName::Error, "stopped-unclean", describe(some)),
        }
        let log = self.log;
        let _ = tokio::task::spawn_blocking(move || log.settle(LOG_GRACE)).await;
        refusals
    }
}

/// Looks at the status, and writes down what is to be known after a restart if that is news.
async fn remember(handle: &NodeHandle, observed: &Arc<Observed>) {
    let status = handle.status().await;
    if !observed.note(&status.services, now_ms()) {
        return;
    }
    let observed = observed.clone();
    // It waits for the disk.
    let stored = tokio::task::spawn_blocking(move || observed.store()).await;
    if let Ok(Err(error)) = stored {
        tracing::warn!(%error, "what the status knows of lag could not be written to the state directory: after a restart it is told as older");
    }
}

fn describe(refusals: &[Refusal]) -> String {
    refusals
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Takes the state directory for this process.
fn lock(state_dir: &Path) -> Result<File, ProcessError> {
    let path = state_dir.join(LOCK_NAME);
    let io = |source| ProcessError::Io {
        what: "cannot open the lock",
        path: path.clone(),
        source,
    };
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            let pid = if pid.trim().is_empty() {
                "unknown".to_owned()
            } else {
                pid.trim().to_owned()
            };
            return Err(ProcessError::Running {
                state_dir: state_dir.to_owned(),
                pid,
            });
        }
        Err(errno) => return Err(io(errno.into())),
    }
    file.set_len(0).map_err(io)?;
    writeln!(file, "{}", std::process::id()).map_err(io)?;
    Ok(file)
}

/// Runs the replicator that `file` configures until SIGTERM or SIGINT, then stops it cleanly. A second signal ends the
/// process at once, as a crash would.
///
/// # Errors
/// [`ProcessError`]: it did not start, or did not stop cleanly.
pub fn run(file: &Path) -> Result<(), ProcessError> {
    log_to_stderr();
    let config = Config::load(file)?;
    // Before any thread exists: they inherit it.
    for warning in holdfast_disk::lock_process_memory() {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ProcessError::Runtime)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(ProcessError::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ProcessError::Runtime)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(ProcessError::Runtime)?;
        let replicator = Replicator::start(config).await?;
        notify_supervisor("READY=1");
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => match replicator.handle().reload().await {
                    Ok(text) => tracing::info!("SIGHUP: {text}"),
                    Err(refusal) => tracing::error!("SIGHUP: {refusal}"),
                },
            }
        }
        notify_supervisor("STOPPING=1");
        tracing::info!("stopping");
        let refusals = tokio::select! {
            refusals = replicator.stop() => refusals,
            _ = terminate.recv() => return Err(ProcessError::Unclean("a second signal ended it".into())),
            _ = interrupt.recv() => return Err(ProcessError::Unclean("a second signal ended it".into())),
        };
        if refusals.is_empty() { Ok(()) } else { Err(ProcessError::Unclean(describe(&refusals))) }
    })
}

/// Lines to standard error; `HOLDFAST_LOG` chooses how much (`debug`, or `holdfast_link=debug,info`).
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Somebody set up logging before: theirs stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
}

/// Tells systemd (or whoever set `NOTIFY_SOCKET`) how far this process is.
fn notify_supervisor(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, state, "the supervisor could not be told");
    }
}
