//! Errors a person can act on: what happened, to which backing, what to do next.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a backing could not be opened. Nothing on the disk was changed, except where
/// [`OpenError::Create`] says that a new file could not be completed (it is removed again).
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "cannot open {path}: {source}. Nothing was changed; check that the path exists and that this user may read and write it"
    )]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "{path} already exists; its contents were left alone. Choose another path or remove the file if it is not needed"
    )]
    AlreadyExists { path: PathBuf },
    #[error(
        "cannot create {path} with {size} bytes: {source}. The incomplete file was removed and nothing else was changed; free space there, choose \
         another place, or make the volume smaller"
    )]
    Create {
        path: PathBuf,
        size: u64,
        source: io::Error,
    },
    #[error(
        "the filesystem of {path} refuses direct I/O (O_DIRECT): {source}. Data in the page cache would be acknowledged without being \
         on the disk, so it is not used; put the backing on a filesystem with direct I/O (ext4, xfs, btrfs without compression) or on a block device"
    )]
    NoDirectIo { path: PathBuf, source: io::Error },
    #[error(
        "{path} is {found}; it was left alone. A backing must be a regular file or a block device"
    )]
    WrongKind { path: PathBuf, found: &'static str },
    #[error(
        "{path} is locked by another process{holder}. Usually a replicator that still runs, or one that was killed while the disk has not \
         finished its requests yet: nothing was changed; stop it or wait until its requests have ended (a hung disk keeps the lock)"
    )]
    Locked { path: PathBuf, holder: String },
    #[error(
        "block device {path} is in use: mounted, part of a RAID, LVM or multipath, swap, or opened exclusively by another program. \
         Nothing was changed; unmount or release it (see `lsblk {path}`)"
    )]
    InUse { path: PathBuf },
    #[error(
        "{path} is also reachable as {other}, which is in use; two writers would destroy each other's data. Nothing was changed; detach {other} first"
    )]
    Aliased { path: PathBuf, other: String },
    #[error(
        "{path} needs direct I/O in units of {needed} bytes, but the volume has sectors of {wanted} bytes. Nothing was changed; use a volume sector size of at least {needed}"
    )]
    SectorSize {
        path: PathBuf,
        needed: u32,
        wanted: u32,
    },
    #[error(
        "{path} is smaller than one sector of {sector} bytes. Nothing was changed; use a larger one"
    )]
    Empty { path: PathBuf, sector: u32 },
    #[error("{what} failed on {path}: {source}")]
    Query {
        path: PathBuf,
        what: &'static str,
        source: io::Error,
    },
    #[cfg(feature = "fault-injection")]
    #[error("cannot listen for fault commands on {socket}: {source}")]
    FaultControl { socket: PathBuf, source: io::Error },
}

/// Why the ring could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("this kernel has no io_uring (Linux 5.18 or newer is needed): {0}")]
    Unsupported(io::Error),
    #[error(
        "io_uring is switched off on this machine (kernel.io_uring_disabled = {sysctl}): {source}. \
         Allow it with `sysctl kernel.io_uring_disabled=0`, or run in a container whose seccomp profile permits io_uring"
    )]
    Disabled { sysctl: String, source: io::Error },
    #[error(
        "not enough lockable memory for the ring: {0}. Raise the memlock limit (LimitMEMLOCK=infinity in the systemd unit)"
    )]
    Memory(io::Error),
    #[error("setting up io_uring failed in {what}: {source}")]
    Setup {
        what: &'static str,
        source: io::Error,
    },
}

/// Why a backing cannot be taken off its ring now. It stays attached and locked.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    #[error(
        "{path} has {requests} unfinished request(s); the disk may still change, so it stays open and locked. \
         Wait until they end; if the disk hangs, restore or remove the device"
    )]
    Busy { path: PathBuf, requests: u32 },
    #[error("this file is not attached to this ring")]
    NotAttached,
}

/// What was attempted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpKind {
    Read,
    Write,
    Flush,
    Zero,
    Discard,
}

impl std::fmt::Display for OpKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OpKind::Read => "read",
            OpKind::Write => "write",
            OpKind::Flush => "flush",
            OpKind::Zero => "zeroing",
            OpKind::Discard => "discard",
        })
    }
}

/// How a disk operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskErrorKind {
    /// The device or filesystem reported an error (the number is an errno).
    Io(i32),
    /// No space left where the filesystem or thin device needed to allocate.
    NoSpace,
    /// The range ends beyond the backing, or the backing shrank below it.
    BeyondEnd { size: u64 },
    /// Offset, length or memory is not a multiple of the sector size, or the length is 0.
    Misaligned { sector: u32 },
    /// The backing was opened read-only.
    ReadOnly,
    /// An earlier flush or FUA write failed: the kernel reports such a loss once, so everything acknowledged since
    /// the last good flush may be gone. Stays so until the backing is opened anew.
    FlushLost(i32),
    /// The file is not attached to this ring, or the buffer is too short, of another pool, or being
    /// read into.
    Invalid,
}

/// A failed disk operation: what, where, why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskError {
    pub kind: DiskErrorKind,
    pub op: OpKind,
    /// Bytes from the start of the backing; where the failing piece begins.
    pub offset: u64,
    /// Bytes that were asked for in this operation.
    pub len: u64,
    pub path: Arc<Path>,
}

impl DiskError {
    /// The error number of the kernel, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self.kind {
            DiskErrorKind::Io(errno) | DiskErrorKind::FlushLost(errno) => Some(errno),
            DiskErrorKind::NoSpace => Some(libc::ENOSPC),
            _ => None,
        }
    }
}

impl std::error::Error for DiskError {}

impl std::fmt::Display for DiskError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match self.op {
            OpKind::Flush => write!(f, "flush of {path} failed: ")?,
            op => write!(
                f,
                "{op} of {} bytes at {} of {path} failed: ",
                self.len, self.offset
            )?,
        }
        match self.kind {
            DiskErrorKind::Io(errno) => write!(f, "{}", io::Error::from_raw_os_error(errno)),
            DiskErrorKind::NoSpace => {
                f.write_str("no space left on the filesystem or thin device below")
            }
            DiskErrorKind::BeyondEnd { size } => write!(f, "the backing ends at {size}"),
            DiskErrorKind::Misaligned { sector } => {
                write!(f, "not aligned to sectors of {sector} bytes")
            }
            DiskErrorKind::ReadOnly => f.write_str("the backing was opened read-only"),
            DiskErrorKind::FlushLost(errno) => write!(
                f,
                "an earlier flush failed ({}), so writes since the last good flush may be lost; open the backing anew and resync",
                io::Error::from_raw_os_error(errno)
            ),
            DiskErrorKind::Invalid => f.write_str("not a valid request for this ring"),
        }
    }
}
