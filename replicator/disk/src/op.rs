//! What can be asked of a disk, and the answer.

use crate::buf::{AlignedBytes, Buf, ReadBuf};
use crate::error::{DiskError, OpKind};
use std::time::Duration;

/// A backing attached to a ring. Never reused for another one, so a stale id is refused instead of reaching a wrong disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileId {
    pub(crate) slot: u32,
    pub(crate) serial: u32,
}

/// One request. Offsets and lengths in bytes, multiples of the backing's sector size, length at least one sector; the range must
/// lie inside [`Backing::size`](crate::Backing::size). Order between requests in flight is undefined: what depends on
/// another one is submitted after that one's completion.
#[derive(Debug)]
pub enum Op {
    Read {
        file: FileId,
        offset: u64,
        buf: ReadBuf,
        buf_offset: usize,
        len: u32,
    },
    /// `fua`: completes when these bytes are durable.
    Write {
        file: FileId,
        offset: u64,
        buf: Buf,
        buf_offset: usize,
        len: u32,
        fua: bool,
    },
    /// As `Write`, from memory outside the pool (metadata); all of `data`.
    WriteBytes {
        file: FileId,
        offset: u64,
        data: AlignedBytes,
        fua: bool,
    },
    /// Completes when everything that completed before it was submitted is durable.
    Flush { file: FileId },
    /// The range reads back zeroes from completion on. `unmap`: its space may be given back (a later write can then fail for want
    /// of space); without it the space stays allocated where the filesystem knows how.
    Zero {
        file: FileId,
        offset: u64,
        len: u64,
        unmap: bool,
        fua: bool,
    },
    /// As `Zero` with `unmap` where [`Backing::discard_zeroes`](crate::Backing::discard_zeroes) says so, else nothing.
    Discard { file: FileId, offset: u64, len: u64 },
}

impl Op {
    pub(crate) fn file(&self) -> FileId {
        match self {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::WriteBytes { file, .. }
            | Op::Flush { file }
            | Op::Zero { file, .. }
            | Op::Discard { file, .. } => *file,
        }
    }

    /// What it is, for messages.
    pub fn kind(&self) -> OpKind {
        match self {
            Op::Read { .. } => OpKind::Read,
            Op::Write { .. } | Op::WriteBytes { .. } => OpKind::Write,
            Op::Flush { .. } => OpKind::Flush,
            Op::Zero { .. } => OpKind::Zero,
            Op::Discard { .. } => OpKind::Discard,
        }
    }
}

/// The one answer to a submitted request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// As given to `submit`.
    pub token: u64,
    pub result: Result<(), DiskError>,
    /// From submission to completion, queueing included.
    pub took: Duration,
}
