//! The listening side of the control socket.
//!
//! It runs apart from the shards and speaks with them through a [`Node`], so a shard that is busy with I/O delays
//! one answer and no other.

use super::node::Node;
use super::protocol::*;
use holdfast_replicator_core::api::{AdminResult, Command, Refusal, RefusalKind};
use holdfast_wire_format::ids::{Slot, VolumeIndex};
use rustix::fs::{FlockOperation, Mode as FileMode};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

/// A client must introduce itself within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A client that takes no byte for this long is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// After the stop was asked for, running requests get this long to finish.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// Answers queued toward a client before streams wait for it.
const ANSWER_QUEUE: usize = 64;

/// Why the control socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "another process already answers on {path}; it was left alone and nothing was started. Stop it first, or give this \
         replicator another control socket and its own state directory"
    )]
    InUse { path: PathBuf },
    #[error(
        "{path} exists and is not a socket; it was left as it is. Move it away, or choose another \
         path for the control socket"
    )]
    NotASocket { path: PathBuf },
    #[error("the control socket {path} could not be opened: {source}. Nothing was changed")]
    Io { path: PathBuf, source: io::Error },
}

/// The open control socket. Dropping it removes the socket from the file system.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Held as long as the server lives: a crashed process lets go of it by itself.
    _lock: OwnedFd,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Still under the lock, so it is ours. If it is gone already there is nothing to do.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Server {
    /// Opens the socket at `path` with mode 0600. A socket left by a crashed process is replaced; one that a
    /// live process holds is not.
    ///
    /// # Errors
    /// The path is in use, is no socket, is too long for a Unix socket (107 bytes), or the directory is not
    /// writable.
    pub fn open(path: &Path) -> Result<Self, ListenError> {
        let fail = |source: io::Error| ListenError::Io {
            path: path.to_path_buf(),
            source,
        };
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = rustix::fs::open(
            Path::new(&lock_path),
            rustix::fs::OFlags::CREATE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
            FileMode::RUSR | FileMode::WUSR,
        )
        .map_err(|errno| fail(errno.into()))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(ListenError::InUse {
                    path: path.to_path_buf(),
                });
            }
            Err(errno) => return Err(fail(errno.into())),
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) => {
                use std::os::unix::fs::FileTypeExt as _;
                if !found.file_type().is_socket() {
                    return Err(ListenError::NotASocket {
                        path: path.to_path_buf(),
                    });
                }
                // Whoever answers there without the lock is no replicator of this version, and is left alone all the same.
                match std::os::unix::net::UnixStream::connect(path) {
                    Ok(_) => {
                        return Err(ListenError::InUse {
                            path: path.to_path_buf(),
                        });
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(error) => return Err(fail(error)),
                }
                std::fs::remove_file(path).map_err(fail)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        let socket = bind_private(path).map_err(fail)?;
        let listener = UnixListener::from_std(socket.into()).map_err(fail)?;
        Ok(Server {
            listener,
            path: path.to_path_buf(),
            _lock: lock,
        })
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers until `stop` resolves, then lets running requests finish for a few seconds.
    pub async fn run<N: Node>(self, node: N, stop: impl Future<Output = ()>) {
        let seats = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        let (stopping_sender, stopping) = watch::channel(false);
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: wait for some to come back rather than spin.
                    tracing::warn!(%error, "a control connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let seat = Arc::clone(&seats).try_acquire_owned().ok();
            let node = node.clone();
            let stopping = stopping.clone();
            connections.spawn(async move {
                let refused = match (&seat, permitted(&stream)) {
                    (_, Err(fault)) => Some(fault),
                    (None, Ok(())) => Some(Fault::new(
                        FaultCode::Busy,
                        format!("{MAX_CONNECTIONS} control connections are open already"),
                        "Nothing was changed",
                        "Close some and ask again",
                    )),
                    (Some(_), Ok(())) => None,
                };
                if let Err(error) = converse(stream, node, refused, stopping).await {
                    tracing::debug!(%error, "control connection ended");
                }
                drop(seat);
            });
        }
        let _ = stopping_sender.send(true);
        let _ = tokio::time::timeout(STOP_GRACE, async {
            while connections.join_next().await.is_some() {}
        })
        .await;
    }
}

/// A listening socket whose file is 0600 from its first moment on: the mode is set before the name exists.
fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::fs::fchmod(socket.as_fd(), FileMode::RUSR | FileMode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

/// Only the user the replicator runs as, and root. The file mode says the same; this also holds where the socket
/// was moved or its mode changed.
fn permitted(stream: &UnixStream) -> Result<(), Fault> {
    let deny = |who: String| {
        Err(Fault::new(
            FaultCode::NotPermitted,
            format!("{who} may not control this replicator"),
            "Nothing was changed",
            "Ask as root or as the user the replicator runs as",
        ))
    };
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() => Ok(()),
        Ok(peer) => deny(format!("user {}", peer.uid())),
        Err(error) => deny(format!("a process the kernel cannot name ({error})")),
    }
}

/// Reads one line of at most `limit` bytes; `None` at the end of the stream.
async fn read_line<R: AsyncRead + Unpin>(
    reader: &mut BufReader<R>,
    line: &mut Vec<u8>,
    limit: usize,
) -> io::Result<Option<()>> {
    line.clear();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return if line.is_empty() {
                Ok(None)
            } else {
                Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the stream ended inside a line",
                ))
            };
        }
        let (piece, end) = match available.iter().position(|byte| *byte == b'\n') {
            Some(end) => (&available[..end], true),
            None => (available, false),
        };
        let taken = piece.len() + usize::from(end);
        if line.len() + piece.len() > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the line is too long",
            ));
        }
        line.extend_from_slice(piece);
        reader.consume(taken);
        if end {
            return Ok(Some(()));
        }
    }
}

fn malformed(detail: &str) -> Fault {
    Fault::new(
        FaultCode::Malformed,
        format!("not a request of this protocol: {detail}"),
        "Nothing was changed",
        "See docs/control.md for the form of a request",
    )
}

fn encode<T: serde::Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// The version both speak, or the reason there is none.
fn negotiate(hello: &[u8]) -> Result<u32, Fault> {
    let hello: Hello =
        serde_json::from_slice(hello).map_err(|error| malformed(&error.to_string()))?;
    if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
        return Err(Fault::new(
            FaultCode::Version,
            format!(
                "{} speaks versions {} to {} of the control protocol, this replicator {VERSION_MIN} \
                 to {VERSION_MAX}",
                hello.program, hello.version_min, hello.version_max
            ),
            "Nothing was changed",
            "Use the `holdfast` of the version that runs",
        ));
    }
    Ok(hello.version_max.min(VERSION_MAX))
}

async fn converse<N: Node>(
    stream: UnixStream,
    node: N,
    refused: Option<Fault>,
    mut stopping: watch::Receiver<bool>,
) -> io::Result<()> {
    let (read_half, mut write_half) = stream.into_split();
    let mut reader = BufReader::new(read_half);
    let mut line = Vec::new();
    // Of a refused client nothing is read: it may have sent anything.
    let version = match refused {
        Some(fault) => Err(fault),
        None => {
            let read =
                tokio::time::timeout(HELLO_TIMEOUT, read_line(&mut reader, &mut line, 4096)).await;
            match read {
                Err(_) => Err(malformed("no hello within 5 s")),
                Ok(Ok(None)) => return Ok(()),
                Ok(Ok(Some(()))) => negotiate(&line),
                Ok(Err(error)) => Err(malformed(&error.to_string())),
            }
        }
    };
    let version = match version {
        Ok(version) => version,
        Err(fault) => {
            let line = encode(&AnswerLine {
                id: 0,
                answer: Answer::Failed(fault),
            })?;
            return write_half.write_all(&line).await;
        }
    };
    let hello = Hello {
        version_min: version,
        version_max: version,
        program: concat!("holdfast ", env!("CARGO_PKG_VERSION")).to_string(),
        node: node.name(),
    };
    write_half.write_all(&encode(&hello)?).await?;

    let (answers, mut queue) = mpsc::channel::<AnswerLine>(ANSWER_QUEUE);
    let writing = async move {
        while let Some(answer) = queue.recv().await {
            let line = encode(&answer)?;
            tokio::time::timeout(WRITE_TIMEOUT, write_half.write_all(&line))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        }
        Ok(())
    };
    let reading = async move {
        // Dropping the set ends the streams; commands that reached a core run their course there.
        let mut running = JoinSet::new();
        loop {
            while running.len() >= MAX_IN_FLIGHT {
                running.join_next().await;
            }
            let read = tokio::select! {
                read = read_line(&mut reader, &mut line, MAX_REQUEST_LINE) => read,
                Some(_) = running.join_next() => continue,
                () = stopped(&mut stopping) => {
                    // Streams end by themselves; commands get the grace that `run` gives them.
                    while running.join_next().await.is_some() {}
                    let fault = Fault::new(
                        FaultCode::Stopping,
                        "the replicator is stopping",
                        "Requests that were not answered may or may not have been carried out",
                        "Ask `holdfast status` once it runs again",
                    );
                    let _ = answers.send(AnswerLine { id: 0, answer: Answer::Failed(fault) }).await;
                    return Ok(());
                }
            };
            match read {
                Ok(Some(())) => {}
                Ok(None) => return Ok(()),
                Err(error) => {
                    // After a broken line there is no telling where the next one starts.
                    let answer = Answer::Failed(malformed(&error.to_string()));
                    let _ = answers.send(AnswerLine { id: 0, answer }).await;
                    return Err(error);
                }
            }
            let request: RequestLine = match serde_json::from_slice(&line) {
                Ok(request) => request,
                Err(error) => {
                    let answer = Answer::Failed(malformed(&error.to_string()));
                    if answers.send(AnswerLine { id: 0, answer }).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
            };
            let (node, answers, stopping) = (node.clone(), answers.clone(), stopping.clone());
            running.spawn(async move { answer(node, request, &answers, stopping).await });
        }
    };
    tokio::pin!(writing);
    tokio::select! {
        result = &mut writing => result,
        result = reading => {
            // What was answered still goes out; the queue ends with the last sender.
            writing.await?;
            result
        }
    }
}

/// Resolves when the server is stopping.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server itself is gone: that is stopping, too.
    let _ = stopping.wait_for(|stop| *stop).await.map(drop);
}

async fn answer<N: Node>(
    node: N,
    line: RequestLine,
    answers: &mpsc::Sender<AnswerLine>,
    mut stopping: watch::Receiver<bool>,
) {
    let id = line.id;
    let send = async |answer| answers.send(AnswerLine { id, answer }).await.is_ok();
    match line.request {
        Request::Status => {
            send(Answer::Status(node.status().await)).await;
        }
        Request::WatchStatus { interval_ms } => {
            let interval_ms =
                interval_ms.clamp(*WATCH_INTERVAL_MS.start(), *WATCH_INTERVAL_MS.end());
            let mut ticks = tokio::time::interval(Duration::from_millis(interval_ms.into()));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stopped(&mut stopping) => break,
                }
                if !send(Answer::Status(node.status().await)).await {
                    return;
                }
            }
            send(Answer::End).await;
        }
        Request::Events { follow, last } => {
            let (past, mut coming) = node.events();
            let skip = last.map_or(0, |last| past.len().saturating_sub(last as usize));
            for event in past.into_iter().skip(skip) {
                if !send(Answer::Event(event)).await {
                    return;
                }
            }
            if follow {
                loop {
                    let received = tokio::select! {
                        received = coming.recv() => received,
                        () = stopped(&mut stopping) => break,
                    };
                    let answer = match received {
                        Ok(event) => Answer::Event(event),
                        Err(RecvError::Lagged(count)) => Answer::Missed { count },
                        Err(RecvError::Closed) => break,
                    };
                    if !send(answer).await {
                        return;
                    }
                }
            }
            send(Answer::End).await;
        }
        Request::Command { service, command } => {
            let answer = match resolve(&node, &service, command).await {
                Ok(Order::Core(command)) => done(node.command(&service, command).await),
                Ok(Order::Attach { disk }) => done(node.attach(&service, disk).await),
                Err(fault) => Answer::Failed(fault),
            };
            send(answer).await;
        }
        Request::Reload => {
            send(done(node.reload().await)).await;
        }
        Request::ExplainHandshake { service, peer } => {
            send(done(node.explain_handshake(&service, &peer).await)).await;
        }
    }
}

fn done(result: AdminResult) -> Answer {
    match result {
        Ok(text) => Answer::Done { text },
        Err(Refusal {
            kind,
            what,
            kept,
            next,
        }) => {
            let code = match kind {
                RefusalKind::Refused => FaultCode::Refused,
                RefusalKind::CopiesDiffer => FaultCode::CopiesDiffer,
            };
            Answer::Failed(Fault::new(code, what, kept, next))
        }
    }
}

/// Names to numbers: a core knows slots and indices alone.
async fn resolve<N: Node>(
    node: &N,
    service: &str,
    command: ServiceCommand,
) -> Result<Order, Fault> {
    let status = node.status().await;
    let unknown = |what: String, next: String| {
        Fault::new(FaultCode::Unknown, what, "Nothing was changed", next)
    };
    let Some(service) = status.services.iter().find(|report| report.name == service) else {
        let known: Vec<&str> = status
            .services
            .iter()
            .map(|report| report.name.as_str())
            .collect();
        return Err(unknown(
            format!("node {} has no service {service:?}", status.node),
            if known.is_empty() {
                "Create it first, see `holdfast help volume create`".to_string()
            } else {
                format!("It has: {}", known.join(", "))
            },
        ));
    };
    let slot = |name: &str| match service.peer(name) {
        Some(peer) => Ok(Slot(peer.slot)),
        None => {
            let known: Vec<&str> = service
                .peers
                .iter()
                .map(|peer| peer.name.as_str())
                .collect();
            Err(unknown(
                format!("service {} has no peer {name:?}", service.name),
                format!("Its peers: {}", known.join(", ")),
            ))
        }
    };
    let index = |name: &str| match service.volume(name) {
        Some(volume) => Ok(VolumeIndex(volume.index)),
        None => {
            let known: Vec<&str> = service
                .volumes
                .iter()
                .map(|volume| volume.name.as_str())
                .collect();
            Err(unknown(
                format!("service {} has no volume {name:?}", service.name),
                format!("Its volumes: {}", known.join(", ")),
            ))
        }
    };
    let optional_slot = |name: Option<String>| name.as_deref().map(slot).transpose();
    Ok(Order::Core(match command {
        ServiceCommand::Promote { force } => Command::Promote { force },
        ServiceCommand::Demote => Command::Demote,
        ServiceCommand::Connect { peer } => Command::Connect {
            peer: optional_slot(peer)?,
        },
        ServiceCommand::Disconnect { peer } => Command::Disconnect {
            peer: optional_slot(peer)?,
        },
        ServiceCommand::PauseResync => Command::PauseResync,
        ServiceCommand::ResumeResync => Command::ResumeResync,
        ServiceCommand::SuspendIo => Command::SuspendIo,
        ServiceCommand::ResumeIo => Command::ResumeIo,
        ServiceCommand::Verify { volume } => Command::Verify {
            volume: volume.as_deref().map(index).transpose()?,
        },
        ServiceCommand::StopVerify => Command::StopVerify,
        ServiceCommand::Invalidate => Command::Invalidate,
        ServiceCommand::ResolveSplitBrain { discard_mine } => {
            Command::ResolveSplitBrain { discard_mine }
        }
        ServiceCommand::SetMode { peer, mode } => Command::SetMode {
            peer: slot(&peer)?,
            mode: mode.into(),
        },
        ServiceCommand::SetOnPeerLoss { policy, force } => Command::SetOnPeerLoss {
            policy: policy.into(),
            force,
        },
        ServiceCommand::Grow { volume, size } => Command::Grow {
            volume: index(&volume)?,
            size,
        },
        ServiceCommand::WhatWouldForceLose => Command::WhatWouldForceLose,
        ServiceCommand::Detach => Command::Detach,
        ServiceCommand::DetachDisk => Command::DetachDisk,
        ServiceCommand::Attach => return Ok(Order::Attach { disk: false }),
        ServiceCommand::AttachDisk => return Ok(Order::Attach { disk: true }),
    }))
}

/// Whom a command is for.
enum Order {
    /// The core of the service.
    Core(Command),
    /// The process: the service has no core that could do it.
    Attach { disk: bool },
}
