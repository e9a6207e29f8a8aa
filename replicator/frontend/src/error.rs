//! Why a volume refused or failed a request, in terms every frontend can pass on.

use std::borrow::Cow;
use std::fmt;

/// The kinds of failure an application can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoErrorKind {
    /// Not allowed: the export is read-only, or this client may not write (NBD `EPERM`).
    NotPermitted,
    /// The disk or the mirror failed (NBD `EIO`).
    Io,
    /// No memory for this request (NBD `ENOMEM`).
    NoMemory,
    /// The request itself makes no sense: range, alignment, flags (NBD `EINVAL`).
    Invalid,
    /// A write past the end of the export, or the backing device is full (NBD `ENOSPC`).
    NoSpace,
    /// The answer does not fit the way the client asked for it (NBD `EOVERFLOW`).
    Overflow,
    /// The operation, or its fast form, is not possible here (NBD `ENOTSUP`).
    NotSupported,
    /// The export is going away: superseded, demoted, removed, stopping (NBD `ESHUTDOWN`).
    ShuttingDown,
}

/// A failed request: its kind, and a sentence for the person who reads the client's log.
///
/// The sentence travels to NBD clients that negotiated structured replies, so it must hold no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct IoError {
    pub kind: IoErrorKind,
    pub message: Cow<'static, str>,
}

impl IoError {
    /// `message` says what happened and what to do next; static text costs no allocation.
    pub fn new(kind: IoErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        IoError {
            kind,
            message: message.into(),
        }
    }
}

impl fmt::Display for IoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoErrorKind::NotPermitted => "not permitted",
            IoErrorKind::Io => "I/O error",
            IoErrorKind::NoMemory => "out of memory",
            IoErrorKind::Invalid => "invalid request",
            IoErrorKind::NoSpace => "no space",
            IoErrorKind::Overflow => "answer too large",
            IoErrorKind::NotSupported => "not supported",
            IoErrorKind::ShuttingDown => "export is going away",
        })
    }
}
