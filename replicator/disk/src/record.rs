//! What a process asks of its backings and what they answer, in order: for tests that rebuild every state in which a
//! crash may leave a disk.
//!
//! A request is noted before the kernel can have it, and its end after the kernel said so: what lies between is in
//! flight, and no request is taken for done too early.

use crate::job::{Step, Verb};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One line of a recording.
#[derive(Clone, Debug)]
pub enum Recorded {
    Began {
        id: u64,
        path: Arc<Path>,
        what: Request,
    },
    Ended {
        id: u64,
        ok: bool,
    },
    /// What the test itself noted.
    Mark(u64),
}

/// What changes a disk or makes it durable.
#[derive(Clone, Debug)]
pub enum Request {
    Write {
        offset: u64,
        bytes: Arc<[u8]>,
        /// Durable once it ended (FUA).
        durable: bool,
    },
    /// Reads back zeroes afterwards, as an un-flushed write of zeroes does.
    Zero { offset: u64, len: u64 },
    /// Makes durable what had ended when it began.
    Flush,
}

struct Log {
    root: PathBuf,
    next: u64,
    events: Vec<Recorded>,
}

static LOGS: Mutex<Vec<Log>> = Mutex::new(Vec::new());

fn logs() -> MutexGuard<'static, Vec<Log>> {
    LOGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records what happens to the backings in one directory (and below) until it is dropped.
#[derive(Debug)]
pub struct Recording {
    root: PathBuf,
}

impl Recording {
    pub fn begin(root: &Path) -> Recording {
        logs().push(Log {
            root: root.into(),
            next: 1,
            events: Vec::new(),
        });
        Recording { root: root.into() }
    }

    /// Notes a moment between two requests.
    pub fn mark(&self, number: u64) {
        let mut logs = logs();
        if let Some(log) = logs.iter_mut().find(|log| log.root == self.root) {
            log.events.push(Recorded::Mark(number));
        }
    }

    /// All of it so far, in order.
    #[must_use]
    pub fn so_far(&self) -> Vec<Recorded> {
        let logs = logs();
        let log = logs.iter().find(|log| log.root == self.root);
        log.map_or_else(Vec::new, |log| log.events.clone())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        logs().retain(|log| log.root != self.root);
    }
}

/// A request that is being recorded.
#[derive(Debug)]
pub(crate) struct Noted {
    path: Arc<Path>,
    id: u64,
}

pub(crate) fn began(path: &Arc<Path>, what: impl FnOnce() -> Request) -> Option<Noted> {
    let mut logs = logs();
    let log = logs.iter_mut().find(|log| path.starts_with(&log.root))?;
    let id = log.next;
    log.next += 1;
    log.events.push(Recorded::Began {
        id,
        path: path.clone(),
        what: what(),
    });
    Some(Noted {
        path: path.clone(),
        id,
    })
}

pub(crate) fn ended(noted: Option<Noted>, ok: bool) {
    let Some(noted) = noted else { return };
    let mut logs = logs();
    if let Some(log) = logs
        .iter_mut()
        .find(|log| noted.path.starts_with(&log.root))
    {
        log.events.push(Recorded::Ended { id: noted.id, ok });
    }
}

/// A step of the ring is about to be handed to the kernel.
///
/// # Safety
/// `ptr` points to the step's bytes, which nobody changes meanwhile, if it writes.
pub(crate) unsafe fn step_began(path: &Arc<Path>, step: &Step, ptr: *const u8) -> Option<Noted> {
    if step.verb == Verb::Read {
        return None;
    }
    began(path, || match step.verb {
        Verb::Write { dsync } => Request::Write {
            offset: step.offset,
            // SAFETY: the caller's promise.
            bytes: unsafe { std::slice::from_raw_parts(ptr, step.len as usize) }.into(),
            durable: dsync,
        },
        Verb::Punch | Verb::ZeroRange => Request::Zero {
            offset: step.offset,
            len: step.len,
        },
        Verb::Read | Verb::Sync => Request::Flush,
    })
}
