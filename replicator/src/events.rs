//! The event log: every decision and change of state, in memory, in a file of JSON lines, and to whoever follows.
//!
//! Whoever has something to say hands it over and goes on: memory and followers get it at once, the file is
//! written by a thread of its own behind a bounded queue. A disk that hangs under the log can therefore hold up
//! nothing; what did not fit into the queue is counted and the number is written once the file takes lines again.

use crate::control::protocol::{EventReport, LevelName};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Events kept in memory; about 1 MiB.
pub const MEMORY_EVENTS: usize = 4096;
/// Name of the file in the state directory; its predecessors are `events.jsonl.1` (newest) to `.4`.
pub const FILE_NAME: &str = "events.jsonl";
/// A file that reaches this many bytes is rotated.
pub const FILE_BYTES: u64 = 8 << 20;
/// Files kept besides the current one.
pub const FILES_KEPT: u32 = 4;
/// Events that may wait for the file.
const QUEUE: usize = 1024;
/// Events a follower may lag behind before it misses some.
const FOLLOWERS: usize = 1024;

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the event log {}: {source}. Check the state directory and its permissions", path.display())]
pub struct EventLogError {
    pub path: PathBuf,
    pub source: io::Error,
}

enum ToWriter {
    Line(EventReport),
    /// Answer when everything before it is in the file.
    Settle(mpsc::Sender<()>),
}

struct Shared {
    memory: Mutex<VecDeque<EventReport>>,
    followers: broadcast::Sender<EventReport>,
    writer: SyncSender<ToWriter>,
    dropped: Arc<AtomicU64>,
}

/// The event log of one process; clones are the same log.
#[derive(Clone)]
pub struct EventLog {
    shared: Arc<Shared>,
}

impl EventLog {
    /// Opens the log in `state_dir` and starts its writer. Earlier lines stay in the file; the last ones are
    /// read back, so that a restart does not hide what led to it.
    ///
    /// # Errors
    /// The file cannot be opened or its thread cannot be started.
    pub fn open(state_dir: &Path) -> Result<EventLog, EventLogError> {
        let path = state_dir.join(FILE_NAME);
        let fail = |source| EventLogError {
            path: path.clone(),
            source,
        };
        let memory = read_back(&path);
        let mut file = LogFile::open(path.clone()).map_err(fail)?;
        let (writer, lines) = mpsc::sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let lost = dropped.clone();
        std::thread::Builder::new()
            .name("event-log".into())
            .spawn(move || write_lines(&mut file, &lines, &lost))
            .map_err(fail)?;
        let (followers, _) = broadcast::channel(FOLLOWERS);
        Ok(EventLog {
            shared: Arc::new(Shared {
                memory: Mutex::new(memory),
                followers,
                writer,
                dropped,
            }),
        })
    }

    /// Adds a line. Never waits for the file.
    pub fn append(&self, event: EventReport) {
        {
            // Under the lock, so that `follow` sees each event exactly once.
            let mut memory = self.memory();
            if memory.len() == MEMORY_EVENTS {
                memory.pop_front();
            }
            memory.push_back(event.clone());
            // Nobody follows: that is fine.
            let _ = self.shared.followers.send(event.clone());
        }
        if self.shared.writer.try_send(ToWriter::Line(event)).is_err() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds a line about the node as a whole, stamped now.
    pub fn node(&self, level: LevelName, kind: &str, text: impl Into<String>) {
        self.append(EventReport {
            time_ms: now_ms(),
            level,
            kind: kind.to_owned(),
            service: String::new(),
            peer: None,
            text: text.into(),
        });
    }

    /// The lines in memory, oldest first, and every line after those.
    pub fn follow(&self) -> (Vec<EventReport>, broadcast::Receiver<EventReport>) {
        let memory = self.memory();
        let receiver = self.shared.followers.subscribe();
        (memory.iter().cloned().collect(), receiver)
    }

    /// Waits until everything appended so far is in the file, at most `limit`. False when it is not.
    pub fn settle(&self, limit: Duration) -> bool {
        let (done, settled) = mpsc::channel();
        let end = std::time::Instant::now() + limit;
        // The queue may be full; a full one empties within the limit or the disk hangs.
        let mut message = ToWriter::Settle(done);
        loop {
            match self.shared.writer.try_send(message) {
                Ok(()) => break,
                Err(mpsc::TrySendError::Full(back)) if std::time::Instant::now() < end => {
                    message = back;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(_) => return false,
            }
        }
        settled
            .recv_timeout(end.saturating_duration_since(std::time::Instant::now()))
            .is_ok()
    }

    fn memory(&self) -> MutexGuard<'_, VecDeque<EventReport>> {
        self.shared
            .memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since 1970 by this machine's clock.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// The last lines of an earlier run. A line that is torn (the machine stopped while it was written) is left out.
fn read_back(path: &Path) -> VecDeque<EventReport> {
    let mut predecessor = path.as_os_str().to_owned();
    predecessor.push(".1");
    let mut events = VecDeque::new();
    for file in [Path::new(&predecessor), path] {
        let Ok(text) = std::fs::read(file) else {
            continue;
        };
        for line in text.split(|byte| *byte == b'\n') {
            if let Ok(event) = serde_json::from_slice(line) {
                if events.len() == MEMORY_EVENTS {
                    events.pop_front();
                }
                events.push_back(event);
            }
        }
    }
    events
}

fn write_lines(file: &mut LogFile, lines: &mpsc::Receiver<ToWriter>, dropped: &AtomicU64) {
    let mut failing = false;
    loop {
        let message = match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let lost = dropped.swap(0, Ordering::Relaxed);
        let mut result = Ok(());
        if lost > 0 {
            result = file.write(&EventReport {
                time_ms: now_ms(),
                level: LevelName::Warning,
                kind: "events-lost".into(),
                service: String::new(),
                peer: None,
                text: format!(
                    "{lost} lines were not written to this file because its disk did not keep up"
                ),
            });
        }
        match message {
            Some(ToWriter::Line(event)) => result = result.and_then(|()| file.write(&event)),
            Some(ToWriter::Settle(done)) => {
                // Whoever asked may have given up waiting.
                let _ = done.send(());
            }
            None => {}
        }
        match result {
            Ok(()) => failing = false,
            Err(error) => {
                if !failing {
                    tracing::error!(file = %file.path.display(), %error, "the event log cannot be written; events are only in memory until it can");
                }
                failing = true;
                dropped.fetch_add(lost.max(1), Ordering::Relaxed);
            }
        }
    }
}

struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    /// The file ends within a line, which must not swallow the next one.
    torn: bool,
    line: Vec<u8>,
}

impl LogFile {
    fn open(path: PathBuf) -> io::Result<LogFile> {
        let (file, size, torn) = Self::open_end(&path)?;
        Ok(LogFile {
            path,
            file,
            size,
            torn,
            line: Vec::with_capacity(1024),
        })
    }

    /// Writes nothing: a log whose filesystem is full keeps no node from starting.
    fn open_end(path: &Path) -> io::Result<(File, u64, bool)> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .mode(0o640)
            .open(path)?;
        let size = file.metadata()?.len();
        let mut last = [b'\n'];
        if size > 0 {
            use std::os::unix::fs::FileExt;
            file.read_exact_at(&mut last, size - 1)?;
        }
        Ok((file, size, last != [b'\n']))
    }

    fn write(&mut self, event: &EventReport) -> io::Result<()> {
        self.line.clear();
        if self.torn {
            self.line.push(b'\n');
        }
        serde_json::to_writer(&mut self.line, event)?;
        self.line.push(b'\n');
        if self.size > 0 && self.size + self.line.len() as u64 > FILE_BYTES {
            self.rotate()?;
        }
        // One write call per line: a reader of the file never sees half a line from two writers.
        // A full filesystem may take a part of it; an empty line more costs nothing.
        self.torn = true;
        self.file.write_all(&self.line)?;
        self.torn = false;
        self.size += self.line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let name = |number: u32| {
            let mut name = self.path.as_os_str().to_owned();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        for number in (1..FILES_KEPT).rev() {
            match std::fs::rename(name(number), name(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(&self.path, name(1))?;
        (self.file, self.size, self.torn) = Self::open_end(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> EventReport {
        EventReport {
            time_ms: 1,
            level: LevelName::Info,
            kind: "test".into(),
            service: "db".into(),
            peer: None,
            text: text.into(),
        }
    }

    #[test]
    fn lines_survive_a_restart_and_a_torn_line_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        log.append(event("one"));
        log.append(event("two"));
        assert!(log.settle(Duration::from_secs(10)));
        drop(log);
        let path = dir.path().join(FILE_NAME);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"time_ms\":3,\"lev")
            .unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        log.append(event("three"));
        assert!(log.settle(Duration::from_secs(10)));
        let log = EventLog::open(dir.path()).unwrap();
        let texts: Vec<String> = log.follow().0.into_iter().map(|event| event.text).collect();
        assert_eq!(texts, ["one", "two", "three"]);
    }

    #[tokio::test]
    async fn a_follower_sees_each_line_once() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        log.append(event("before"));
        let (memory, mut live) = log.follow();
        log.append(event("after"));
        assert_eq!(memory.len(), 1);
        assert_eq!(live.recv().await.unwrap().text, "after");
    }

    #[test]
    fn the_file_is_rotated_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = LogFile::open(dir.path().join(FILE_NAME)).unwrap();
        let long = event(&"x".repeat(1 << 20));
        for _ in 0..60 {
            file.write(&long).unwrap();
        }
        let size = |name: &str| std::fs::metadata(dir.path().join(name)).map(|m| m.len());
        assert!(size("events.jsonl").unwrap() <= FILE_BYTES);
        for number in 1..=FILES_KEPT {
            let size = size(&format!("events.jsonl.{number}")).unwrap();
            assert!(size > FILE_BYTES / 2 && size <= FILE_BYTES, "{size}");
        }
        assert!(size(&format!("events.jsonl.{}", FILES_KEPT + 1)).is_err());
    }
}
