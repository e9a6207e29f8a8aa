//! No deadlock through memory: parked I/O fills the page cache, and a process that then waits for memory to be
//! written back to the very volume it serves waits for itself.

use rustix::mm::{MlockAllFlags, mlockall};

/// A protection that the system refused; the process works without, at the stated risk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Warning {
    pub what: &'static str,
    pub reason: String,
    /// What may happen, and how to allow it.
    pub advice: &'static str,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} was refused ({}); {}",
            self.what, self.reason, self.advice
        )
    }
}

/// Locks all memory of this process, present and future, and lets its allocations pass the throttling of writers
/// (PR_SET_IO_FLUSHER, inherited by threads made later: call it before making any). What is refused is logged and returned.
pub fn lock_process_memory() -> Vec<Warning> {
    let mut warnings = Vec::new();
    if let Err(errno) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE) {
        warnings.push(Warning {
            what: "locking the memory of the process",
            reason: errno.to_string(),
            advice: "under memory pressure it may be paged out and wait for the volume it serves. Set LimitMEMLOCK=infinity in the systemd unit",
        });
    }
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
        warnings.push(Warning {
            what: "the I/O flusher state",
            reason: errno.to_string(),
            advice: "an allocation may wait for writeback to the volume it serves. Grant CAP_SYS_RESOURCE (AmbientCapabilities= in the systemd unit)",
        });
    }
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    warnings
}
