//! Files in memory: a small transfer is carried out by the thread that asks for it.
//!
//! tmpfs has no transfer that may be tried without waiting, so io_uring hands each one to a worker thread, and two wake-ups cost
//! more than copying some pages. Large transfers go to the workers all the same: they run beside this thread. A chunk of a resync is
//! still small: read here it is in this processor's cache when its CRC is computed, and a full sync takes a tenth less
//! processor time.

use crate::job::{Step, Verb};
use rustix::fs::fstatfs;
use rustix::io::{Errno, ReadWriteFlags, pread, pwrite, pwritev2};
use std::fs::File;
use std::io::IoSlice;

/// Longest transfer carried out in place, in bytes: what one thread copies in some twenty microseconds.
const LONGEST: u64 = 256 << 10;
/// `f_type` of tmpfs.
const TMPFS: u64 = 0x0102_1994;

/// Whether the file's bytes are in memory.
pub(crate) fn in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.f_type as u64 == TMPFS)
}

/// Whether the step should be carried out by [`run`].
pub(crate) fn fits(step: &Step) -> bool {
    let small = step.len <= LONGEST;
    match step.verb {
        Verb::Read | Verb::Write { .. } => small && !step.force_async,
        // Nothing is behind memory that it could wait for.
        Verb::Sync => true,
        Verb::Punch | Verb::ZeroRange => false,
    }
}

/// Carries a step out and gives the kernel's number for it: bytes, 0, or a negative errno.
///
/// # Safety
/// `ptr` points to `step.len` bytes that nobody changes meanwhile, and for a read nobody looks at; it is not used for a flush.
pub(crate) unsafe fn run(file: &File, step: &Step, ptr: *mut u8) -> i32 {
    let len = step.len as usize;
    let moved = match step.verb {
        // SAFETY: the caller's promise.
        Verb::Read => pread(
            file,
            unsafe { std::slice::from_raw_parts_mut(ptr, len) },
            step.offset,
        ),
        Verb::Write { dsync } => {
            // SAFETY: the caller's promise.
            let bytes = unsafe { std::slice::from_raw_parts(ptr, len) };
            if dsync {
                pwritev2(
                    file,
                    &[IoSlice::new(bytes)],
                    step.offset,
                    ReadWriteFlags::DSYNC,
                )
            } else {
                pwrite(file, bytes, step.offset)
            }
        }
        Verb::Sync => rustix::fs::fdatasync(file).map(|()| 0),
        Verb::Punch | Verb::ZeroRange => Err(Errno::NOSYS),
    };
    match moved {
        Ok(moved) => i32::try_from(moved).unwrap_or(i32::MAX),
        Err(errno) => -errno.raw_os_error(),
    }
}
