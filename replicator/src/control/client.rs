//! The asking side of the control socket: blocking, for the command line and for programs of that kind.

use super::protocol::*;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Answers that take longer than this mean a stuck process. Commands may wait for disks and peers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no replicator answers on {path}: {source}")]
    NotRunning { path: PathBuf, source: io::Error },
    #[error("this user may not open the control socket {path}")]
    NotPermitted { path: PathBuf },
    #[error("the conversation with the replicator on {path} broke off: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the process on {path} does not speak the control protocol: {detail}")]
    Protocol { path: PathBuf, detail: String },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl ClientError {
    /// What to do next.
    pub fn advice(&self) -> String {
        match self {
            ClientError::NotRunning { .. } => {
                "Start it with `holdfast replicator --config FILE`, or name its socket with --socket or \
                 HOLDFAST_SOCKET"
                    .to_string()
            }
            ClientError::NotPermitted { .. } => {
                "Ask as root or as the user the replicator runs as".to_string()
            }
            ClientError::Io { .. } => {
                "The command may or may not have been carried out; `holdfast status` and `holdfast \
                 events` tell"
                    .to_string()
            }
            ClientError::Protocol { .. } => {
                "Check that --socket names the control socket of a replicator".to_string()
            }
            ClientError::Fault(fault) => fault.next.clone(),
        }
    }

    /// What was kept safe.
    pub fn kept(&self) -> String {
        match self {
            ClientError::NotRunning { .. }
            | ClientError::NotPermitted { .. }
            | ClientError::Protocol { .. } => "Nothing was changed".to_string(),
            ClientError::Io { .. } => String::new(),
            ClientError::Fault(fault) => fault.kept.clone(),
        }
    }
}

/// One connection to a running replicator.
pub struct Client {
    reader: BufReader<UnixStream>,
    path: PathBuf,
    next_id: u64,
    node: String,
}

impl Client {
    /// Connects and agrees on a version.
    ///
    /// # Errors
    /// Nobody listens, this user may not, or the versions have nothing in common.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NotPermitted {
                path: path.to_path_buf(),
            },
            _ => ClientError::NotRunning {
                path: path.to_path_buf(),
                source,
            },
        })?;
        let mut client = Client {
            reader: BufReader::new(stream),
            path: path.to_path_buf(),
            next_id: 1,
            node: String::new(),
        };
        client
            .reader
            .get_ref()
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .and_then(|()| {
                client
                    .reader
                    .get_ref()
                    .set_write_timeout(Some(ANSWER_TIMEOUT))
            })
            .map_err(|source| client.broken(source))?;
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            program: concat!("holdfast ", env!("CARGO_PKG_VERSION")).to_string(),
            node: String::new(),
        };
        // A server that refuses at once may have closed already; its reason is then still there to be read.
        let sent = client.send_line(&hello);
        let line = match client.read_line() {
            Ok(line) => line,
            Err(error) => return Err(sent.err().unwrap_or(error)),
        };
        match serde_json::from_slice::<Hello>(&line) {
            Ok(hello) => client.node = hello.node,
            Err(error) => match serde_json::from_slice::<AnswerLine>(&line) {
                Ok(AnswerLine {
                    answer: Answer::Failed(fault),
                    ..
                }) => return Err(fault.into()),
                _ => return Err(client.strange(error.to_string())),
            },
        }
        Ok(client)
    }

    /// Name of the node that answers.
    pub fn node(&self) -> &str {
        &self.node
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Io {
            path: self.path.clone(),
            source,
        }
    }

    fn strange(&self, detail: impl Into<String>) -> ClientError {
        ClientError::Protocol {
            path: self.path.clone(),
            detail: detail.into(),
        }
    }

    fn send_line<T: serde::Serialize>(&mut self, value: &T) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(value).map_err(|error| self.broken(error.into()))?;
        line.push(b'\n');
        let sent = self.reader.get_mut().write_all(&line);
        sent.map_err(|source| self.broken(source))
    }

    fn read_line(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut line = Vec::new();
        let limit = MAX_RESPONSE_LINE as u64 + 1;
        let read = (&mut self.reader).take(limit).read_until(b'\n', &mut line);
        read.map_err(|source| self.broken(source))?;
        if line.pop() != Some(b'\n') {
            return Err(if line.len() >= MAX_RESPONSE_LINE {
                self.strange("a line is too long")
            } else {
                self.broken(io::ErrorKind::UnexpectedEof.into())
            });
        }
        Ok(line)
    }

    fn send(&mut self, request: Request) -> Result<u64, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        self.send_line(&RequestLine { id, request })?;
        Ok(id)
    }

    fn receive(&mut self, id: u64) -> Result<Answer, ClientError> {
        let line = self.read_line()?;
        let line: AnswerLine =
            serde_json::from_slice(&line).map_err(|error| self.strange(error.to_string()))?;
        match line.answer {
            Answer::Failed(fault) => Err(fault.into()),
            answer if line.id == id => Ok(answer),
            _ => Err(self.strange(format!("an answer to request {} came for {id}", line.id))),
        }
    }

    /// The node's status now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&mut self) -> Result<NodeStatus, ClientError> {
        let id = self.send(Request::Status)?;
        match self.receive(id)? {
            Answer::Status(status) => Ok(status),
            _ => Err(self.strange("a status was asked for and something else came")),
        }
    }

    /// Calls `each` with a status now and every `interval_ms`, until it returns false or the replicator stops.
    ///
    /// # Errors
    /// See [`ClientError`]. The connection is of no further use afterwards.
    pub fn watch(
        mut self,
        interval_ms: u32,
        mut each: impl FnMut(NodeStatus) -> bool,
    ) -> Result<(), ClientError> {
        let id = self.send(Request::WatchStatus { interval_ms })?;
        loop {
            match self.receive(id)? {
                Answer::Status(status) => {
                    if !each(status) {
                        return Ok(());
                    }
                }
                Answer::End => return Ok(()),
                _ => return Err(self.strange("a status was asked for and something else came")),
            }
        }
    }

    /// Calls `each` with events until it returns false or the stream ends: the last `last` ones (all that are
    /// kept when none), then, with `follow`, each new one. `Err(n)` stands for n events that were dropped here.
    ///
    /// # Errors
    /// See [`ClientError`]. The connection is of no further use afterwards.
    pub fn events(
        mut self,
        follow: bool,
        last: Option<u32>,
        mut each: impl FnMut(Result<EventReport, u64>) -> bool,
    ) -> Result<(), ClientError> {
        if follow {
            // Hours without an event are no sign of trouble.
            let unlimited = self.reader.get_ref().set_read_timeout(None);
            unlimited.map_err(|source| self.broken(source))?;
        }
        let id = self.send(Request::Events { follow, last })?;
        loop {
            let item = match self.receive(id)? {
                Answer::Event(event) => Ok(event),
                Answer::Missed { count } => Err(count),
                Answer::End => return Ok(()),
                _ => return Err(self.strange("events were asked for and something else came")),
            };
            if !each(item) {
                return Ok(());
            }
        }
    }

    /// Has a service carry out a command; the sentence is for people.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Fault`] when the service said no.
    pub fn command(
        &mut self,
        service: &str,
        command: ServiceCommand,
    ) -> Result<String, ClientError> {
        self.sentence(Request::Command {
            service: service.to_string(),
            command,
        })
    }

    /// Sends a command that may take hours and is answered when it has ended, such as a verification: what the
    /// service said within `patience`, or none when it is at work by then. It goes on without this connection.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn begin(
        mut self,
        service: &str,
        command: ServiceCommand,
        patience: Duration,
    ) -> Result<Option<String>, ClientError> {
        let limited = self.reader.get_ref().set_read_timeout(Some(patience));
        limited.map_err(|source| self.broken(source))?;
        match self.command(service, command) {
            Err(ClientError::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                Ok(None)
            }
            answered => answered.map(Some),
        }
    }

    /// What the last handshake with a peer decided, and from which facts.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn explain_handshake(&mut self, service: &str, peer: &str) -> Result<String, ClientError> {
        self.sentence(Request::ExplainHandshake {
            service: service.to_string(),
            peer: peer.to_string(),
        })
    }

    /// Has the replicator read its peers and certificates again.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn reload(&mut self) -> Result<String, ClientError> {
        self.sentence(Request::Reload)
    }

    fn sentence(&mut self, request: Request) -> Result<String, ClientError> {
        let id = self.send(request)?;
        match self.receive(id)? {
            Answer::Done { text } => Ok(text),
            _ => Err(self.strange("a sentence was expected and something else came")),
        }
    }
}
