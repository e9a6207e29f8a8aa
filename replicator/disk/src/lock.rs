//! One writer per disk: locks, and the other names a disk may have.

use crate::error::OpenError;
use crate::probe::{self, Identity};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;

/// flock belongs to the open file description, which the ring's requests hold too: after a SIGKILL the lock lives until the
/// last of them is gone. A POSIX lock would end with the process.
pub(crate) fn lock(
    file: &File,
    path: &Path,
    metadata: &std::fs::Metadata,
    read_only: bool,
) -> Result<(), OpenError> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match retry_interrupted(|| flock(file, operation)) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(OpenError::Locked {
            path: path.into(),
            holder: probe::lock_holder(metadata),
        }),
        Err(errno) => Err(OpenError::Query {
            path: path.into(),
            what: "locking",
            source: errno.into(),
        }),
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The same bytes under another name: a loop device over this file, or the file under this loop device.
pub(crate) fn guard_aliases(
    path: &Path,
    identity: Identity,
    read_only: bool,
) -> Result<Option<File>, OpenError> {
    match identity {
        Identity::File { .. } if read_only => Ok(None),
        Identity::File { .. } => match probe::loop_over(identity) {
            Some(device) => Err(OpenError::Aliased {
                path: path.into(),
                other: device.display().to_string(),
            }),
            None => Ok(None),
        },
        Identity::Device { number } => {
            // A file that can't be opened from here (deleted, other namespace) can't be opened as a backing from here either.
            let Some(under) = probe::file_under_loop(number) else {
                return Ok(None);
            };
            let Ok(file) = File::open(&under) else {
                return Ok(None);
            };
            let metadata = file.metadata().map_err(|source| OpenError::Open {
                path: under.clone(),
                source,
            })?;
            match lock(&file, &under, &metadata, read_only) {
                Ok(()) => Ok(Some(file)),
                Err(OpenError::Locked { holder, .. }) => Err(OpenError::Aliased {
                    path: path.into(),
                    other: format!("{}{holder}", under.display()),
                }),
                Err(error) => Err(error),
            }
        }
    }
}
