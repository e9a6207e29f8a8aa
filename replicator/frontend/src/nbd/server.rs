//! Accepts connections and gives each its own task on the shard's thread.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::close::{CloseReason, CloseSignal, CloseWatch};
use crate::volume::{ClientInfo, Exports, Peer};

use super::connection::{
    ConnectionError, End, Progress, Surroundings, negotiate, start_tls, transmit,
};
use super::handshake::{Handshake, TlsState};
use super::settings::{Limits, Stats, TlsPolicy, add};
use super::unix;

/// Room for a few large answers between two wake-ups of the client; the kernel caps it by `net.core.wmem_max`.
const UNIX_SEND_BUFFER_BYTES: usize = 1 << 20;
/// After a failed accept (no file descriptors, no memory): long enough for something to be freed.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Connections the kernel keeps for us while we accept others.
const BACKLOG: u32 = 128;

/// Why a listening socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "{address} is not a loopback address and no TLS certificate is configured. Nothing is served and nothing was changed; \
         configure one, or listen on loopback or a Unix socket"
    )]
    NeedsTls { address: SocketAddr },
    #[error(
        "cannot listen for clients on {address} (TCP): {source}. Nothing is served and nothing was changed; `ss -ltnp` shows who has the port: \
         free it, or listen on another one"
    )]
    Tcp {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(
        "cannot listen for clients on {}: {source}. Nothing is served and nothing was changed; choose a path that this user may make a socket at",
        path.display()
    )]
    Unix { path: PathBuf, source: io::Error },
    #[error(
        "another process answers on the socket {}; it was left alone. Nothing is served and nothing was changed; stop that process, or choose \
         another path", path.display()
    )]
    InUse { path: PathBuf },
    #[error(
        "{} exists and is not a socket; it was left alone. Nothing is served; move it away, or choose another path", path.display()
    )]
    NotASocket { path: PathBuf },
}

/// Listens on a Unix socket that only `mode` (such as `0o600`) lets in. A socket file that nobody answers on
/// any more is replaced; anything else at that path is an error.
pub fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, BindError> {
    let failed = |source: io::Error| BindError::Unix {
        path: path.to_owned(),
        source,
    };
    let new_socket = || {
        rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
    };
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {
            let probe = new_socket().map_err(|error| failed(error.into()))?;
            if rustix::net::connect(&probe, &address) != Err(rustix::io::Errno::CONNREFUSED) {
                return Err(BindError::InUse {
                    path: path.to_owned(),
                });
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
    }
    // Permissions before listen(): nobody can connect in between.
    let socket = new_socket().map_err(|error| failed(error.into()))?;
    rustix::net::bind(&socket, &address).map_err(|error| failed(error.into()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    rustix::net::listen(&socket, BACKLOG as i32).map_err(|error| failed(error.into()))?;
    UnixListener::from_std(socket.into()).map_err(failed)
}

/// Listens on TCP; off loopback only with a TLS certificate.
pub async fn bind_tcp(address: SocketAddr, tls: &TlsPolicy) -> Result<TcpListener, BindError> {
    if matches!(tls, TlsPolicy::LoopbackOnly) && !is_loopback(&address) {
        return Err(BindError::NeedsTls { address });
    }
    TcpListener::bind(address)
        .await
        .map_err(|source| BindError::Tcp { address, source })
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// An NBD server for the exports of one shard.
pub struct NbdServer<E: Exports> {
    exports: E,
    limits: Limits,
    stats: Rc<Stats>,
    stop: CloseSignal,
    /// Open connections, Unix and TCP apart: a crowd at the network's door keeps no local client out.
    open: [Cell<usize>; 2],
    last_gone: Notify,
}

impl<E: Exports> NbdServer<E> {
    pub fn new(exports: E, limits: Limits) -> Rc<Self> {
        Rc::new(NbdServer {
            exports,
            limits,
            stats: Rc::default(),
            stop: CloseSignal::new(),
            open: Default::default(),
            last_gone: Notify::new(),
        })
    }

    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    pub fn exports(&self) -> &E {
        &self.exports
    }

    /// Ends every session and every accept loop. The first reason stays.
    pub fn stop(&self, reason: CloseReason) {
        self.stop.close(reason);
    }

    /// Resolves when no connection is open. After [`stop`](Self::stop) that takes at most twice
    /// [`Limits::close_timeout`], or what is left of a handshake's time.
    pub async fn idle(&self) {
        loop {
            let gone = self.last_gone.notified();
            if self.stats.connections_open.get() == 0 {
                return;
            }
            gone.await;
        }
    }

    /// Serves a Unix socket until [`stop`](Self::stop). Must run inside a `LocalSet`.
    pub async fn serve_unix(self: Rc<Self>, listener: UnixListener) {
        let mut stops = self.stop.watch();
        loop {
            let accepted = tokio::select! {
                _ = stops.closed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.spawn_unix(stream),
                Err(error) => accept_failed(error).await,
            }
        }
    }

    /// Serves a TCP socket until [`stop`](Self::stop). Must run inside a `LocalSet`.
    pub async fn serve_tcp(self: Rc<Self>, listener: TcpListener, tls: TlsPolicy) {
        let mut stops = self.stop.watch();
        loop {
            let accepted = tokio::select! {
                _ = stops.closed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.spawn_tcp(stream, peer, &tls),
                Err(error) => accept_failed(error).await,
            }
        }
    }

    fn spawn_unix(self: &Rc<Self>, stream: UnixStream) {
        // Too small a buffer costs wake-ups, never correctness.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER_BYTES);
        let credentials = match stream.peer_cred() {
            Ok(credentials) => credentials,
            Err(error) => {
                tracing::debug!(%error, "a client vanished before it was known");
                return;
            }
        };
        let peer = Peer::Unix {
            pid: credentials.pid(),
            uid: credentials.uid(),
        };
        let Some(place) = self.admit(peer) else {
            return;
        };
        let server = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let result = server.run_unix(stream, peer).await;
            place.over(peer, result);
        });
    }

    fn spawn_tcp(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, tls: &TlsPolicy) {
        let local = is_loopback(&peer);
        let (state, config) = match tls {
            TlsPolicy::LoopbackOnly if local => (TlsState::Unavailable, None),
            TlsPolicy::LoopbackOnly => {
                add(&self.stats.connections_refused, 1);
                tracing::warn!(%peer, "refused a client off loopback: no TLS certificate is configured");
                return;
            }
            TlsPolicy::OffLoopback(config) if local => (TlsState::Offered, Some(config)),
            TlsPolicy::OffLoopback(config) | TlsPolicy::Always(config) => {
                (TlsState::Required, Some(config))
            }
        };
        let acceptor = config.map(|config| TlsAcceptor::from(config.clone()));
        let _ = stream.set_nodelay(true);
        let peer = Peer::Tcp(peer);
        let Some(place) = self.admit(peer) else {
            return;
        };
        let server = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let result = server.run_tcp(stream, peer, state, acceptor).await;
            place.over(peer, result);
        });
    }

    fn admit(self: &Rc<Self>, peer: Peer) -> Option<Place<E>> {
        add(&self.stats.connections, 1);
        let door = usize::from(matches!(peer, Peer::Tcp(_)));
        let limit = self.limits.max_connections.max(1);
        if self.open[door].get() >= limit {
            add(&self.stats.connections_refused, 1);
            tracing::warn!(%peer, limit, "refused a client: the limit of connections is reached");
            return None;
        }
        let total = &self.stats.connections_open;
        total.set(total.get() + 1);
        self.open[door].set(self.open[door].get() + 1);
        Some(Place {
            server: Rc::clone(self),
            door,
        })
    }

    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings {
            limits: &self.limits,
            stats: &self.stats,
        }
    }

    async fn run_unix(&self, mut stream: UnixStream, peer: Peer) -> Result<End, ConnectionError> {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(client(peer), TlsState::Unavailable, &mut out);
        let shaken = self.in_time(negotiate(&mut stream, &mut handshake, out, &self.exports));
        match shaken.await? {
            Progress::Opened(opened, rest) => {
                self.log_opened(peer, &opened.name, false);
                let stops = self.stop.watch();
                let stream = unix::Socket::new(stream)?;
                transmit(stream, opened, &rest, stops, &self.surroundings()).await
            }
            Progress::Over(end) => Ok(end),
            Progress::StartTls => unreachable!("TLS is never offered on a Unix socket"),
        }
    }

    async fn run_tcp(
        &self,
        stream: TcpStream,
        peer: Peer,
        state: TlsState,
        acceptor: Option<TlsAcceptor>,
    ) -> Result<End, ConnectionError> {
        // One deadline for both handshakes and TLS between them.
        let shaken = self.in_time(async {
            let mut stream = stream;
            let mut out = Vec::new();
            let mut handshake = Handshake::new(client(peer), state, &mut out);
            let clear = negotiate(&mut stream, &mut handshake, out, &self.exports).await?;
            Ok(match (clear, &acceptor) {
                (Progress::StartTls, Some(acceptor)) => {
                    let (mut stream, certificate) = start_tls(stream, acceptor).await?;
                    handshake.tls_started(certificate);
                    let secret =
                        negotiate(&mut stream, &mut handshake, Vec::new(), &self.exports).await?;
                    (TcpOrTls::Tls(Box::new(stream)), secret)
                }
                (clear, _) => (TcpOrTls::Tcp(stream), clear),
            })
        });
        let (stream, progress) = shaken.await?;
        match progress {
            Progress::Opened(opened, rest) => {
                let stops: CloseWatch = self.stop.watch();
                let around = self.surroundings();
                match stream {
                    TcpOrTls::Tcp(stream) => {
                        self.log_opened(peer, &opened.name, false);
                        transmit(stream, opened, &rest, stops, &around).await
                    }
                    TcpOrTls::Tls(stream) => {
                        self.log_opened(peer, &opened.name, true);
                        transmit(stream, opened, &rest, stops, &around).await
                    }
                }
            }
            Progress::Over(end) => Ok(end),
            Progress::StartTls => {
                unreachable!("TLS is offered only with a configuration, and once")
            }
        }
    }

    /// `handshake`, unless it takes too long or the server stops.
    async fn in_time<T>(
        &self,
        handshake: impl Future<Output = Result<T, ConnectionError>>,
    ) -> Result<T, ConnectionError> {
        let limit = self.limits.handshake_timeout;
        let mut stops = self.stop.watch();
        tokio::select! {
            reason = stops.closed() => Err(ConnectionError::Stopping(reason)),
            result = timeout(limit, handshake) => match result {
                Ok(result) => result,
                Err(_) => Err(ConnectionError::HandshakeTimeout(limit)),
            },
        }
    }

    fn log_opened(&self, peer: Peer, export: &str, tls: bool) {
        tracing::info!(%peer, export, tls, "client opened the export");
    }
}

enum TcpOrTls {
    Tcp(TcpStream),
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

/// One admitted connection, counted until it is dropped.
struct Place<E: Exports> {
    server: Rc<NbdServer<E>>,
    door: usize,
}

impl<E: Exports> Place<E> {
    fn over(self, peer: Peer, result: Result<End, ConnectionError>) {
        match result {
            Ok(End::Disconnected) => tracing::info!(%peer, "client disconnected"),
            Ok(End::Gone) => tracing::info!(%peer, "client closed its socket"),
            Ok(End::Closed(reason)) | Err(ConnectionError::Stopping(reason)) => {
                tracing::info!(%peer, reason = reason.as_str(), "session ended");
            }
            Err(error) => {
                add(&self.server.stats.connections_failed, 1);
                tracing::warn!(%peer, %error, "connection closed");
            }
        }
    }
}

impl<E: Exports> Drop for Place<E> {
    fn drop(&mut self) {
        let (door, total) = (
            &self.server.open[self.door],
            &self.server.stats.connections_open,
        );
        door.set(door.get() - 1);
        total.set(total.get() - 1);
        if total.get() == 0 {
            self.server.last_gone.notify_waiters();
        }
    }
}

fn client(peer: Peer) -> ClientInfo {
    ClientInfo {
        peer,
        tls: false,
        certificate: None,
    }
}

async fn accept_failed(error: io::Error) {
    // A client that left before it was accepted is its own affair.
    if error.kind() != io::ErrorKind::ConnectionAborted {
        tracing::warn!(%error, "accepting a connection failed; trying again shortly");
        sleep(ACCEPT_BACKOFF).await;
    }
}
