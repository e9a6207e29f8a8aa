//! `holdfast demo`: replication, a crash in mid-write, a failover and the way back, on this machine and in a minute.
//!
//! Nothing is played: two real processes, started through the same verbs as on two machines, reached over NBD as by an
//! application. Every sentence it prints about data was checked just before, and the first one that does not hold
//! ends it with an error.

mod cluster;
mod filesystem;
mod history;
mod nbd_client;
#[cfg(test)]
mod qemu_nbd;
mod story;

use crate::control::client::ClientError;
use crate::control::render;
use cluster::Leftovers;
use nbd_client::NbdError;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// What `holdfast demo` was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// The story goes to standard error, and the figures are for standard output.
    pub json: bool,
    /// The cluster goes on running afterwards.
    pub keep: bool,
}

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error("{doing} {}: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("node {node}: {source}")]
    Control {
        node: &'static str,
        source: ClientError,
    },
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error("{} ended with {status}: {said}", program.display())]
    Tool {
        program: PathBuf,
        status: ExitStatus,
        said: String,
    },
    /// A claim of the demo does not hold.
    #[error("{0}")]
    Broken(String),
}

impl DemoError {
    fn io(doing: &'static str, path: &Path, source: std::io::Error) -> Self {
        DemoError::Io {
            doing,
            path: path.to_path_buf(),
            source,
        }
    }
    fn tool(program: &Path, status: ExitStatus, said: String) -> Self {
        let said = said.trim().to_string();
        DemoError::Tool {
            program: program.to_path_buf(),
            status,
            said,
        }
    }
}

/// The figures of a run; what was not reached is 0 or false.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Everything held.
    pub ok: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub volume_bytes: u64,
    /// Writes of the history that were acknowledged before the primary was killed.
    pub writes_acknowledged: u64,
    pub writes_acknowledged_bytes: u64,
    /// Writes in flight at the kill: allowed to be there or not.
    pub writes_in_flight: u64,
    /// Acknowledged writes that were missing or torn afterwards.
    pub writes_lost: u64,
    /// From the kill to the survivor's notice that its peer is gone.
    pub detect_ms: u64,
    /// From the promote command to the first read answered by the new primary.
    pub promote_ms: u64,
    /// From the kill to the first write acknowledged by the new primary.
    pub outage_ms: u64,
    pub filesystem: String,
    pub filesystem_intact: bool,
    /// Acknowledged by the new primary while the dead node was away.
    pub written_after_promotion_bytes: u64,
    pub resynced_bytes: u64,
    pub resync_ms: u64,
    pub verify_bytes: u64,
    /// By the online verify, and by comparing the files of both nodes (with --keep: by verify alone).
    pub copies_identical: bool,
    pub total_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_uri: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dirs: Option<Vec<PathBuf>>,
}

/// Prints the story as it happens.
struct Teller {
    start: Instant,
    json: bool,
}

impl Teller {
    fn say(&self, text: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        let mut lines = text.lines();
        self.line(&format!(
            "{seconds:6.1} s  {}",
            lines.next().unwrap_or_default()
        ));
        for line in lines {
            self.line(&format!("          {line}"));
        }
    }

    fn line(&self, line: &str) {
        use std::io::Write as _;
        // A reader that went away does not stop the checks: the exit code still tells.
        let _ = if self.json {
            writeln!(std::io::stderr(), "{line}")
        } else {
            writeln!(std::io::stdout(), "{line}")
        };
    }
}

/// Runs the demo with `exe` (the `holdfast` program) as both nodes. Whatever happens, no process and no file is left
/// behind, unless `keep` was asked for and all went well.
///
/// # Errors
/// The first thing that did not hold; the figures so far are in `figures`.
pub fn run(exe: &Path, options: Options, figures: &mut Figures) -> Result<(), DemoError> {
    let leftovers = Leftovers::default();
    clean_on_signals(&leftovers)?;
    let teller = Teller {
        start: Instant::now(),
        json: options.json,
    };
    let result = story::tell(exe, options, &leftovers, &teller, figures);
    figures.total_ms = millis(teller.start.elapsed());
    match &result {
        Ok(()) if options.keep => leftovers.keep(),
        Ok(()) | Err(_) => leftovers.clean(),
    }
    figures.ok = result.is_ok();
    figures.error = result.as_ref().err().map(ToString::to_string);
    if figures.ok {
        teller.say(&format!(
            "all of it held: {} acknowledged writes, {} lost, copies identical",
            figures.writes_acknowledged, figures.writes_lost
        ));
    }
    result
}

/// Ctrl-C and its like end the demo in good order: nodes first, then the files, then this process.
fn clean_on_signals(leftovers: &Leftovers) -> Result<(), DemoError> {
    let fail = |source| DemoError::io("waiting for", Path::new("signals"), source);
    let leftovers = leftovers.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(fail)?;
    // Registered here, not in the thread: a signal from now on is never missed.
    let mut signals = {
        use tokio::signal::unix::{SignalKind, signal};
        let _inside = runtime.enter();
        let make = |kind| signal(kind).map_err(fail);
        [
            (make(SignalKind::interrupt())?, 2),
            (make(SignalKind::terminate())?, 15),
            (make(SignalKind::hangup())?, 1),
        ]
    };
    std::thread::Builder::new()
        .name("demo-signals".into())
        .spawn(move || {
            let number = runtime.block_on(async {
                let [(interrupt, _), (terminate, _), (hangup, _)] = &mut signals;
                tokio::select! {
                    _ = interrupt.recv() => 2,
                    _ = terminate.recv() => 15,
                    _ = hangup.recv() => 1,
                }
            });
            leftovers.clean();
            std::process::exit(128 + number);
        })
        .map(drop)
        .map_err(fail)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn megabytes(bytes: u64) -> String {
    render::bytes(bytes)
}
