//! One request on its way: which system operations carry it out, and what their answers mean.
//!
//! No I/O here. [`Job::step`] names the next operation, [`Job::answer`] takes the kernel's number for it. The first
//! error ends the job, so no later success can cover it (D14); short transfers go on where they ended.

use crate::backing::{BackingInner, errno_kind};
use crate::buf::{AlignedBytes, Buf, ReadBuf};
use crate::error::{DiskError, DiskErrorKind, OpKind};
use crate::op::{FileId, Op};
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Instant;

/// Bytes of the shared zeroes that explicit zeroing writes from.
pub(crate) const ZEROES: usize = 1 << 20;
/// Without `unmap`, shorter ranges are zeroed by writing: fallocate takes the inode's lock and waits for all direct I/O.
const SMALL_ZERO: u64 = 64 << 10;
/// One fallocate on a block device may write all of it; pieces keep the age of a request meaningful.
const DEVICE_ZERO: u64 = 256 << 20;
/// On a file it changes extents only.
const FILE_ZERO: u64 = 64 << 30;
/// Longest transfer of one system operation: below the kernel's own limit of 2 GiB.
const LONGEST: u64 = 1 << 30;
/// EINTR, EAGAIN and transfers without progress in a row before the request fails.
const MAX_RETRIES: u32 = 100;

/// What a backing can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    /// Bytes; unit of every request.
    pub sector: u32,
    /// Bytes; fallocate gets whole multiples.
    pub block: u32,
    /// `fallocate(PUNCH_HOLE)` works (and reads back zeroes).
    pub punch: bool,
    /// `fallocate(ZERO_RANGE)` works.
    pub zero_range: bool,
    pub is_device: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    Read,
    Write { dsync: bool },
    Sync,
    Punch,
    ZeroRange,
}

/// Where the bytes of a step are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Memory {
    None,
    /// At this address; it lies in the arena if `pooled`.
    At {
        ptr: NonNull<u8>,
        pooled: Option<usize>,
    },
    /// The ring's shared zeroes.
    Zeroes,
}

/// One system operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub verb: Verb,
    pub offset: u64,
    pub len: u64,
    pub memory: Memory,
    /// Let a kernel worker wait: the inline attempt said EAGAIN.
    pub force_async: bool,
}

pub(crate) enum Progress {
    Again,
    Done(Result<(), DiskError>),
}

/// Kept until the kernel has answered, whatever the caller does meanwhile.
enum Data {
    None,
    Read(ReadBuf, usize),
    Write(Buf, usize),
    Bytes(AlignedBytes),
}

pub(crate) struct Job {
    pub token: u64,
    pub file: FileId,
    pub backing: Rc<BackingInner>,
    pub kind: OpKind,
    pub started: Instant,
    /// When the disk last answered a step of it.
    pub progressed: Instant,
    data: Data,
    offset: u64,
    at: u64,
    end: u64,
    fua: bool,
    unmap: bool,
    /// Bytes were changed by a step that is not durable by itself.
    needs_sync: bool,
    retries: u32,
    force_async: bool,
    current: Verb,
    current_len: u64,
    /// The step in flight, if a test records it.
    #[cfg(feature = "fault-injection")]
    pub noted: Option<crate::record::Noted>,
}

impl Job {
    /// Checks the request. `Ok(None)`: nothing to do.
    pub fn new(
        op: Op,
        token: u64,
        backing: Rc<BackingInner>,
        now: Instant,
    ) -> Result<Option<Job>, DiskError> {
        let kind = op.kind();
        let file = op.file();
        let caps = backing.caps.get();
        let mut fua = false;
        let mut unmap = false;
        let mut fits = true;
        let (data, offset, len) = match op {
            Op::Read {
                offset,
                buf,
                buf_offset,
                len,
                ..
            } => {
                fits = range_fits(buf.buf(), buf_offset, len, caps.sector);
                (Data::Read(buf, buf_offset), offset, u64::from(len))
            }
            Op::Write {
                offset,
                buf,
                buf_offset,
                len,
                fua: durable,
                ..
            } => {
                // What a read in flight will leave there is not known: such bytes are not to be stored.
                fits = range_fits(&buf, buf_offset, len, caps.sector) && !buf.is_being_read_into();
                fua = durable;
                (Data::Write(buf, buf_offset), offset, u64::from(len))
            }
            Op::WriteBytes {
                offset,
                data,
                fua: durable,
                ..
            } => {
                fua = durable;
                let len = data.len() as u64;
                (Data::Bytes(data), offset, len)
            }
            Op::Flush { .. } => (Data::None, 0, 0),
            Op::Zero {
                offset,
                len,
                unmap: may,
                fua: durable,
                ..
            } => {
                (fua, unmap) = (durable, may);
                (Data::None, offset, len)
            }
            Op::Discard { offset, len, .. } => {
                unmap = true;
                (Data::None, offset, len)
            }
        };
        let fail = |problem| Err(backing.error(problem, kind, offset, len));
        let sector = u64::from(caps.sector);
        if kind != OpKind::Flush {
            if len == 0 || !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
                return fail(DiskErrorKind::Misaligned {
                    sector: caps.sector,
                });
            }
            if !fits {
                return fail(DiskErrorKind::Invalid);
            }
            let size = backing.size.get();
            if offset.checked_add(len).is_none_or(|end| end > size) {
                return fail(DiskErrorKind::BeyondEnd { size });
            }
        }
        if backing.read_only && kind != OpKind::Read {
            // A reader has nothing to make durable; it may not change anything.
            return if kind == OpKind::Flush {
                Ok(None)
            } else {
                fail(DiskErrorKind::ReadOnly)
            };
        }
        if kind == OpKind::Discard && !backing.discard_zeroes {
            return Ok(None);
        }
        if (fua || kind == OpKind::Flush)
            && let Some(errno) = backing.flush_lost.get()
        {
            return fail(DiskErrorKind::FlushLost(errno));
        }
        Ok(Some(Job {
            token,
            file,
            kind,
            started: now,
            progressed: now,
            data,
            offset,
            at: offset,
            end: offset + len,
            fua,
            unmap,
            needs_sync: kind == OpKind::Flush,
            retries: 0,
            force_async: false,
            current: Verb::Sync,
            current_len: 0,
            #[cfg(feature = "fault-injection")]
            noted: None,
            backing,
        }))
    }

    /// The next operation.
    pub fn step(&mut self) -> Step {
        let done = (self.at - self.offset) as usize;
        let rest = self.end - self.at;
        let (verb, len, memory) = match &self.data {
            _ if rest == 0 => (Verb::Sync, 0, Memory::None),
            Data::Read(target, from) => (Verb::Read, rest, at(target.buf(), from + done)),
            Data::Write(buf, from) => (Verb::Write { dsync: self.fua }, rest, at(buf, from + done)),
            Data::Bytes(bytes) => {
                // SAFETY: `done` is less than the length, since something is left.
                let ptr = unsafe { bytes.ptr().add(done) };
                (
                    Verb::Write { dsync: self.fua },
                    rest.min(LONGEST),
                    Memory::At { ptr, pooled: None },
                )
            }
            Data::None => self.zero_step(rest),
        };
        self.current = verb;
        self.current_len = len;
        Step {
            verb,
            offset: self.at,
            len,
            memory,
            force_async: self.force_async,
        }
    }

    fn zero_step(&self, rest: u64) -> (Verb, u64, Memory) {
        let caps = self.backing.caps.get();
        let block = u64::from(caps.block);
        let method = match self.unmap {
            true if caps.punch => Some(Verb::Punch),
            _ if caps.zero_range && (self.unmap || self.end - self.offset > SMALL_ZERO) => {
                Some(Verb::ZeroRange)
            }
            _ => None,
        };
        let whole_to = self.end - self.end % block;
        let to_block = self.at.next_multiple_of(block) - self.at;
        match method {
            Some(verb) if to_block == 0 && self.at < whole_to => (
                verb,
                (whole_to - self.at).min(if caps.is_device {
                    DEVICE_ZERO
                } else {
                    FILE_ZERO
                }),
                Memory::None,
            ),
            // Before the first whole block only up to it, so that the middle can go at once.
            Some(_) if to_block > 0 && self.at + to_block < whole_to => (
                Verb::Write { dsync: false },
                to_block.min(ZEROES as u64),
                Memory::Zeroes,
            ),
            _ => {
                // One write that is all of it can be durable by itself; otherwise one flush at the end covers the lot.
                let len = rest.min(ZEROES as u64);
                (
                    Verb::Write {
                        dsync: self.fua && len == self.end - self.offset,
                    },
                    len,
                    Memory::Zeroes,
                )
            }
        }
    }

    /// The kernel's answer to the last step: bytes or 0, or a negative errno.
    pub fn answer(&mut self, result: i32, now: Instant) -> Progress {
        self.progressed = now;
        if result < 0 {
            return self.failed(-result);
        }
        let sector = u64::from(self.backing.caps.get().sector);
        match self.current {
            Verb::Sync => self.needs_sync = false,
            Verb::Punch | Verb::ZeroRange => {
                self.at += self.current_len;
                self.needs_sync = self.fua;
            }
            Verb::Read | Verb::Write { .. } => {
                // A piece of a sector is not kept: the rest starts at a whole one again, as direct I/O demands.
                let moved = (result as u64).min(self.current_len) / sector * sector;
                if moved == 0 {
                    if self.current == Verb::Read {
                        return Progress::Done(
                            self.error(DiskErrorKind::BeyondEnd { size: self.at }),
                        );
                    }
                    return self.retry(libc::EIO);
                }
                self.at += moved;
                self.needs_sync |= self.fua && self.current == Verb::Write { dsync: false };
            }
        }
        self.retries = 0;
        self.force_async = false;
        if self.at < self.end || self.needs_sync {
            return Progress::Again;
        }
        // The kernel tells a lost flush to one caller only; the others must not believe their success.
        match self.backing.flush_lost.get() {
            Some(errno) if self.fua || self.kind == OpKind::Flush => {
                Progress::Done(self.error(DiskErrorKind::FlushLost(errno)))
            }
            _ => Progress::Done(Ok(())),
        }
    }

    fn failed(&mut self, errno: i32) -> Progress {
        let mut caps = self.backing.caps.get();
        match (self.current, errno) {
            (_, libc::EINTR) => return self.retry(errno),
            (_, libc::EAGAIN) => {
                self.force_async = true;
                return self.retry(errno);
            }
            // Not able to, or not in this shape: the next method down is always right, only slower.
            (Verb::Punch, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                caps.punch = false;
                self.backing.caps.set(caps);
                return Progress::Again;
            }
            (Verb::ZeroRange, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                caps.zero_range = false;
                self.backing.caps.set(caps);
                return Progress::Again;
            }
            _ => {}
        }
        let kind = match errno_kind(errno) {
            DiskErrorKind::NoSpace if caps.is_device => match self.backing.device_size() {
                Some(size) if self.at + self.current_len > size => {
                    DiskErrorKind::BeyondEnd { size }
                }
                _ => DiskErrorKind::NoSpace,
            },
            kind => kind,
        };
        let lost = match self.current {
            Verb::Sync => true,
            // Whether the write or the flush behind it failed is not told: assume the worse.
            Verb::Write { dsync: true } => matches!(kind, DiskErrorKind::Io(_)),
            _ => false,
        };
        if lost && self.backing.flush_lost.get().is_none() {
            self.backing.flush_lost.set(Some(errno));
        }
        Progress::Done(self.error(kind))
    }

    fn retry(&mut self, errno: i32) -> Progress {
        self.retries += 1;
        if self.retries > MAX_RETRIES {
            return Progress::Done(self.error(DiskErrorKind::Io(errno)));
        }
        Progress::Again
    }

    fn error(&self, kind: DiskErrorKind) -> Result<(), DiskError> {
        Err(self
            .backing
            .error(kind, self.kind, self.at, self.end - self.offset))
    }
}

fn range_fits(buf: &Buf, from: usize, len: u32, sector: u32) -> bool {
    from.is_multiple_of(sector as usize)
        && from
            .checked_add(len as usize)
            .is_some_and(|end| end <= buf.len())
}

fn at(buf: &Buf, from: usize) -> Memory {
    // SAFETY: `range_fits` was checked when the job was made, and `from` is at most its end.
    let ptr = unsafe { buf.ptr().add(from) };
    Memory::At {
        ptr,
        pooled: Some(buf.arena_offset() + from),
    }
}

#[cfg(test)]
mod tests;
