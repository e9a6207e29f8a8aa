//! What the replicator sees of the link: events, payloads, and the trait it implements to get them.

use bytes::Bytes;
use holdfast_wire_format::frame::{FrameHeader, GoodbyeCode};
use holdfast_wire_format::ids::Uuid;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};

/// One life of one service's stream to one peer; never used again within a process.
pub type SessionId = u64;

/// One way to reach a peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Path {
    /// Send from this address (another network card); `None`: the system's choice, from the listening port.
    pub local: Option<IpAddr>,
    pub remote: SocketAddr,
}

impl From<SocketAddr> for Path {
    fn from(remote: SocketAddr) -> Self {
        Path {
            local: None,
            remote,
        }
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.local {
            Some(local) => write!(f, "{local}->{}", self.remote),
            None => write!(f, "{}", self.remote),
        }
    }
}

/// Payload of a frame to send. Its length must be the header's `payload_length`; its CRC is the header's `payload_crc`, computed
/// once by whoever builds the header, however many peers get the frame.
pub enum Payload {
    None,
    /// A control payload.
    Inline(Vec<u8>),
    /// A buffer of this thread, which must not change. From 64 KiB on it is not copied, and held until the peer's QUIC has
    /// acknowledged it; below it is copied once, when QUIC has room for it, and held until then.
    Local(Box<dyn AsRef<[u8]>>),
    /// A buffer that QUIC may hold: not copied when it is 16 KiB or more, and held until the peer's QUIC has acknowledged it.
    Shared(Bytes),
}

impl Payload {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Inline(bytes) => bytes.len(),
            Payload::Local(buffer) => (**buffer).as_ref().len(),
            Payload::Shared(bytes) => bytes.len(),
        }
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Payload of a received frame, its CRC checked.
#[derive(Debug)]
pub enum Received<B> {
    None,
    /// The encoding of a body: every kind that is not raw data.
    Control(Vec<u8>),
    /// Raw data in a buffer of [`LinkHandler::alloc`]; the first `payload_length` bytes are filled.
    Data(B),
}

/// What happens on the link. All of it arrives on the link's own thread.
#[derive(Debug)]
pub enum LinkEvent<B> {
    /// A connection to this peer is up; streams follow.
    PeerUp { peer: Uuid, path: String },
    /// The connection is gone; each of its streams reports that by itself, before or after.
    PeerDown {
        peer: Uuid,
        path: String,
        reason: String,
    },
    /// An attempt over one path failed; the next path or, after a pause, the next round follows by itself.
    PathFailed {
        peer: Uuid,
        path: String,
        reason: String,
    },
    /// Somebody was refused before it became a peer.
    CallerRefused { remote: SocketAddr, reason: String },
    /// The peer does not take this service now; asked again by itself. Reported when the reason changes.
    ServiceRefused {
        peer: Uuid,
        service: Uuid,
        reason: String,
    },
    /// A service's stream is open in both directions.
    StreamUp {
        peer: Uuid,
        service: Uuid,
        session: SessionId,
        path: String,
    },
    /// The stream is over: exactly once for each `StreamUp`, and the last event of that session. What was queued may or may
    /// not have arrived. `code` is known if one side closed it on purpose.
    StreamDown {
        peer: Uuid,
        service: Uuid,
        session: SessionId,
        code: Option<GoodbyeCode>,
        by_peer: bool,
        reason: String,
    },
    /// A whole frame with correct CRCs, in the order sent.
    Frame {
        peer: Uuid,
        service: Uuid,
        session: SessionId,
        header: FrameHeader,
        payload: Received<B>,
    },
    /// So many bytes (headers included) left the queue of this session toward QUIC.
    Drained {
        peer: Uuid,
        service: Uuid,
        session: SessionId,
        bytes: usize,
    },
}

/// The replicator's side of the link. Called on the link's thread, never inside a call to [`crate::Link`]; may call `Link`.
pub trait LinkHandler: 'static {
    /// Memory for raw data. At least the length asked for.
    type Buf: AsMut<[u8]> + 'static;

    /// Something happened. Must not block.
    fn on_event(&self, event: LinkEvent<Self::Buf>);

    /// Everything that was ready has been delivered: the moment to send acknowledgements and submit disk writes at once.
    fn on_batch_end(&self) {}

    /// A buffer of at least `len` bytes (1 to 1 MiB) for the data frame with this header. While it is pending nothing is read from this
    /// stream, so the peer's sending stops within the stream window: lack of memory is felt at the source.
    fn alloc(
        &self,
        service: Uuid,
        header: &FrameHeader,
        len: usize,
    ) -> impl Future<Output = Self::Buf>;

    /// A peer opens the stream of a service that this node wants connected. An error is the reason the peer is told.
    fn accept(&self, peer: Uuid, service: Uuid) -> Result<(), String> {
        let _ = (peer, service);
        Ok(())
    }

    /// What this node would say of a service to that peer, if they met now: bytes that the link does not read. Changes nothing. An error is the
    /// reason the peer is told.
    fn facts(&self, peer: Uuid, service: Uuid) -> Result<Vec<u8>, String> {
        let _ = (peer, service);
        Err("it does not say".into())
    }
}

/// Why a frame was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Not a defect: the end of a session is reported a moment later.
    #[error("the session is over")]
    Closed,
    #[error("the header says {header} bytes of payload, and there are {payload}")]
    Length { header: u32, payload: usize },
}

/// A peer as the link sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    pub peer: Uuid,
    pub name: String,
    /// This node dials; else it waits to be dialed.
    pub dials: bool,
    /// The path in use, if connected.
    pub path: Option<String>,
    /// Smoothed round trip, if connected.
    pub round_trip: Option<std::time::Duration>,
    /// UDP payload in bytes that the path was found to carry, if connected.
    pub udp_payload: Option<u16>,
    /// Why the last connection or attempt ended.
    pub last_failure: Option<String>,
}

pub(crate) fn code_from(value: u64) -> Option<GoodbyeCode> {
    u8::try_from(value).ok().and_then(GoodbyeCode::from_code)
}

pub(crate) fn code_to(code: GoodbyeCode) -> quinn::VarInt {
    quinn::VarInt::from_u32(code as u32)
}

pub(crate) fn words(code: GoodbyeCode) -> &'static str {
    match code {
        GoodbyeCode::Disconnect => {
            "the service was disconnected there, by a person or since nothing was heard"
        }
        GoodbyeCode::Refused => "it refused",
        GoodbyeCode::SplitBrain => "split brain",
        GoodbyeCode::Unrelated => "the copies are unrelated",
        GoodbyeCode::BadFrame => "it received a damaged or impossible frame",
        GoodbyeCode::OldEpoch => "this node's epoch is old",
        GoodbyeCode::DiskFailed => "its disk failed",
        GoodbyeCode::Shutdown => "it shuts down",
        GoodbyeCode::Defect => "it found a defect in itself",
        GoodbyeCode::Again => "it wants to meet again",
    }
}
