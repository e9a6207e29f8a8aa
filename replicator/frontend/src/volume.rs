//! What a frontend needs from the replicator, and nothing else.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::close::CloseSignal;
use crate::completion::Completion;
use crate::error::IoError;

/// The largest read or write a frontend hands to a volume, in bytes (the most NBD clients may rely on).
pub const MAX_REQUEST_BYTES: u32 = 32 << 20;

/// A piece of the replicator's own aligned memory: one request's payload, and nothing more.
///
/// The slices cover exactly the client's bytes. For a request that starts inside a block the volume places
/// them inside a larger aligned buffer, so that completing the block needs no copy of the payload.
pub trait Buffer: 'static {
    fn as_slice(&self) -> &[u8];
    fn as_mut_slice(&mut self) -> &mut [u8];
}

/// What an application asks of a volume. Offsets and lengths are bytes inside the export, already checked
/// against [`ExportInfo::size`]; lengths are never 0. Where the client did not negotiate block sizes they may
/// have any alignment: the volume gets exactly the client's range and does what read-modify-write that takes.
#[derive(Debug)]
pub enum Request<B> {
    /// Answered with [`Output::Data`] of exactly `len` bytes; `len` is at most [`MAX_REQUEST_BYTES`]. The volume may
    /// keep it until it has memory for the answer.
    Read { offset: u64, len: u32 },
    /// Writes the whole slice of `buffer`. With `fua` it is answered only once durable, as a FLUSH would be.
    Write { offset: u64, buffer: B, fua: bool },
    /// Makes every write answered before this request (on any session of the volume) durable.
    Flush,
    /// The application no longer needs these bytes. Both copies read back the same afterwards.
    Discard { offset: u64, len: u64, fua: bool },
    /// The range reads back as zeroes. `may_unmap`: holes are fine. `fast`: answer
    /// [`IoErrorKind::NotSupported`](crate::IoErrorKind) at once, and change nothing, if it costs as much as writing.
    WriteZeroes {
        offset: u64,
        len: u64,
        fua: bool,
        may_unmap: bool,
        fast: bool,
    },
    /// A hint that these bytes will be read soon.
    Cache { offset: u64, len: u64 },
    /// Answered with [`Output::Extents`] from `offset` on. `one`: only the first extent is of interest.
    BlockStatus { offset: u64, len: u64, one: bool },
}

/// What a request brings back.
#[derive(Debug)]
pub enum Output<B> {
    /// Success of anything but a read or a block status.
    Done,
    /// The bytes of a read, exactly as many as asked for.
    Data(B),
    /// Consecutive extents from the request's offset on, at least one; what lies past the range is cut off.
    Extents(Vec<Extent>),
}

/// A run of bytes with one allocation status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: u64,
    /// No space is allocated for it.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

/// Block sizes in bytes, told to clients that ask; those clients must then keep to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Power of two, 1 to 65,536. Offsets, lengths and the export's size are multiples of it.
    pub minimum: u32,
    /// Power of two, at least 512 and at least `minimum`: below this a write costs a read.
    pub preferred: u32,
    /// Largest read or write; a multiple of `minimum`, at least `preferred`, at most [`MAX_REQUEST_BYTES`].
    pub maximum: u32,
}

/// The shape of an export, read once when a session opens it: a resize is visible to new sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub rotational: bool,
    /// A flush on one session covers the answered writes of all sessions.
    pub multi_conn: bool,
    /// [`Request::Discard`] is understood; without it none arrives.
    pub discard: bool,
    /// [`Request::WriteZeroes`] honours `fast`; without it none with `fast` arrives.
    pub fast_zero: bool,
    /// [`Request::Cache`] does something; without it none arrives.
    pub cache: bool,
    pub block_sizes: BlockSizes,
    /// One line for people.
    pub description: Cow<'static, str>,
}

impl ExportInfo {
    /// What is wrong with it, in a sentence; `None` if nothing. Checked when a client opens the export, so that
    /// a mistake in the volume surfaces as a refusal and never as a broken protocol.
    pub fn defect(&self) -> Option<&'static str> {
        let BlockSizes {
            minimum,
            preferred,
            maximum,
        } = self.block_sizes;
        if !minimum.is_power_of_two() || minimum > 65536 {
            Some("the minimum block size is not a power of two from 1 to 65536")
        } else if !preferred.is_power_of_two() || preferred < minimum.max(512) {
            Some("the preferred block size is not a power of two of at least 512 and the minimum")
        } else if maximum < preferred || maximum % minimum != 0 || maximum > MAX_REQUEST_BYTES {
            Some("the maximum block size is out of range")
        } else if self.size > i64::MAX as u64 || !self.size.is_multiple_of(u64::from(minimum)) {
            Some("the size is not a multiple of the minimum block size")
        } else {
            None
        }
    }
}

/// One export, as a frontend sees it. All calls come from the shard's thread and must not block it.
pub trait Volume: 'static {
    type Buf: Buffer;

    fn info(&self) -> ExportInfo;

    /// Memory for a write of `len` bytes (1 to [`MAX_REQUEST_BYTES`]) at byte `offset`; the offset lets the volume
    /// place the payload so that its blocks are aligned. `Pending` is backpressure: the session stops reading
    /// its socket and the task of `cx` must be woken when memory is free. Several sessions may wait at once.
    /// The buffer's content is overwritten before it is used.
    fn poll_buffer(
        &self,
        cx: &mut Context<'_>,
        offset: u64,
        len: u32,
    ) -> Poll<Result<Self::Buf, IoError>>;

    /// Starts a request. It may be resolved before this returns, and requests may finish in any order.
    /// A session that ends drops its interest, never the request: what was submitted runs its course.
    fn submit(&self, request: Request<Self::Buf>, completion: Completion<Self::Buf>);

    /// Everything the session had at hand is submitted; it will look at completions next and then sleep. A volume
    /// that collects submissions hands them to the kernel here at the latest.
    fn end_of_batch(&self) {}

    /// Raised when sessions must end; requests in flight are then answered with a shutdown error.
    fn close_signal(&self) -> &CloseSignal;
}

/// Who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientInfo {
    pub peer: Peer,
    /// The session is encrypted.
    pub tls: bool,
    /// The client certificate (DER) that TLS verified, if one was presented.
    pub certificate: Option<Vec<u8>>,
}

/// Where a client sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine, with what the kernel says about it.
    Unix {
        pid: Option<i32>,
        uid: u32,
    },
    Tcp(SocketAddr),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Unix {
                pid: Some(pid),
                uid,
            } => write!(f, "process {pid} of user {uid}"),
            Peer::Unix { pid: None, uid } => write!(f, "a process of user {uid}"),
            Peer::Tcp(address) => address.fmt(f),
        }
    }
}

/// Why an export was not opened; the sentence goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// There is no such export here.
    #[error("{0}")]
    Unknown(String),
    /// It exists, but this client may not have it, or not now: superseded epoch, not primary, not permitted.
    #[error("{0}")]
    Refused(String),
    /// The replicator is stopping.
    #[error("{0}")]
    ShuttingDown(String),
}

/// The exports of one shard.
pub trait Exports: 'static {
    type Volume: Volume;

    /// Calls `each` with name and description of every export this client may see.
    fn list(&self, client: &ClientInfo, each: &mut dyn FnMut(&str, &str));

    /// `name` is what the client sent, unchanged: `volume`, or `volume@epoch` for a client that must never be let
    /// in again once that epoch is superseded. Called for information alone too, so opening must change nothing.
    fn open(&self, name: &str, client: &ClientInfo) -> Result<Rc<Self::Volume>, ExportError>;
}
