//! Limits of the NBD server, and what it counts.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;

use crate::volume::MAX_REQUEST_BYTES;

/// What one server, and each of its connections, may use. Every limit protects the others from one bad client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, those still in their handshake included; Unix sockets and TCP are counted apart, so
    /// that a crowd on the network keeps no local client out. 1 or more. A further one is closed at once.
    pub max_connections: usize,
    /// Requests of one connection that are unanswered or whose answer is not sent yet. 1 to 65,536.
    /// At the limit the socket is no longer read.
    pub max_requests_in_flight: usize,
    /// Payload bytes of those requests, reads and writes together. A single request is always admitted, so
    /// the real bound is this or [`MAX_REQUEST_BYTES`], whichever is larger.
    pub max_bytes_in_flight: u64,
    /// From the accepted connection to the opened export, TLS included.
    pub handshake_timeout: Duration,
    /// A client that takes no byte of a waiting answer, or stops inside a write's payload, for this long is
    /// disconnected: it holds memory that others need.
    pub stall_timeout: Duration,
    /// How long a session that must end waits for its last answers to be taken.
    pub close_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_connections: 256,
            max_requests_in_flight: 128,
            max_bytes_in_flight: 2 * u64::from(MAX_REQUEST_BYTES),
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(120),
            close_timeout: Duration::from_secs(1),
        }
    }
}

/// When a TCP client must encrypt. Unix sockets are guarded by file permissions and never ask for TLS.
#[derive(Clone)]
pub enum TlsPolicy {
    /// No certificate: only loopback addresses can be bound, and only loopback clients are served.
    LoopbackOnly,
    /// Clients off loopback must encrypt, loopback clients may.
    OffLoopback(Arc<ServerConfig>),
    /// Everybody must encrypt.
    Always(Arc<ServerConfig>),
}

impl fmt::Debug for TlsPolicy {
    // The configuration holds a private key: never print it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TlsPolicy::LoopbackOnly => "LoopbackOnly",
            TlsPolicy::OffLoopback(_) => "OffLoopback",
            TlsPolicy::Always(_) => "Always",
        })
    }
}

/// Counters of one server since its start.
#[derive(Debug, Default)]
pub struct Stats {
    /// Accepted connections.
    pub connections: Cell<u64>,
    /// Connections open now.
    pub connections_open: Cell<usize>,
    /// Connections closed at once because of [`Limits::max_connections`].
    pub connections_refused: Cell<u64>,
    /// Connections that ended by a breach of protocol or a time-out.
    pub connections_failed: Cell<u64>,
    pub reads: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub writes: Cell<u64>,
    pub written_bytes: Cell<u64>,
    pub flushes: Cell<u64>,
    /// Discards, zeroes, hints, block status.
    pub other_requests: Cell<u64>,
    /// Requests answered with an error.
    pub errors: Cell<u64>,
    /// Receive and send calls that moved bytes.
    pub socket_reads: Cell<u64>,
    pub socket_writes: Cell<u64>,
}

pub(crate) fn add(counter: &Cell<u64>, n: u64) {
    counter.set(counter.get().wrapping_add(n));
}
