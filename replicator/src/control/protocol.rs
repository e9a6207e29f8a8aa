//! What travels over the control socket, as values.
//!
//! One JSON object per line in both directions (`docs/control.md` has the conversation). Names of fields are
//! snake_case, names of variants kebab-case; both are part of the protocol: a rename needs a new version.

use serde::{Deserialize, Serialize};

pub use super::report::*;

/// Oldest and newest version of the conversation this program can hold.
pub const VERSION_MIN: u32 = 1;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u32 = 1;

/// Longest line a client may send, in bytes.
pub const MAX_REQUEST_LINE: usize = 64 << 10;
/// Longest line a server sends, in bytes: a status of 64 services with 64 volumes each stays below it.
pub const MAX_RESPONSE_LINE: usize = 16 << 20;
/// Connections at the same time; one more is answered with [`FaultCode::Busy`] and closed.
pub const MAX_CONNECTIONS: usize = 64;
/// Requests in flight on one connection; more wait in the socket.
pub const MAX_IN_FLIGHT: usize = 16;
/// Shortest and longest interval of [`Request::WatchStatus`], in ms; others are brought into this range.
pub const WATCH_INTERVAL_MS: std::ops::RangeInclusive<u32> = 100..=60_000;

/// First line of either side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Client: oldest version it speaks. Server: the version chosen (both fields alike).
    pub version_min: u32,
    /// Client: newest version it speaks.
    pub version_max: u32,
    /// Name and version of the program, for people.
    pub program: String,
    /// Server only: name of its node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
}

/// A line from the client after its hello.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RequestLine {
    /// Chosen by the client, repeated in every answer; not to be reused while a request is unanswered.
    pub id: u64,
    pub request: Request,
}

/// What a client may ask.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum Request {
    /// One [`Answer::Status`].
    Status,
    /// [`Answer::Status`] now and then every so many ms, until the client closes.
    WatchStatus { interval_ms: u32 },
    /// [`Answer::Event`] for each of the last `last` lines of the log, then, with `follow`, each new one until the
    /// client closes; without it [`Answer::End`].
    Events {
        follow: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last: Option<u32>,
    },
    /// Answered with [`Answer::Done`] once carried out.
    Command {
        service: String,
        command: ServiceCommand,
    },
    /// Read trusted peers and this node's certificates again: after a join, a rotation, or the removal of a peer. Answered
    /// with [`Answer::Done`] when connections are made by them.
    Reload,
    /// Which row of the handshake table the two copies fall into, with the facts it was decided from.
    ExplainHandshake { service: String, peer: String },
}

/// What may be asked of a service. Peers are named by node, volumes by name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum ServiceCommand {
    /// Make this copy primary. `force` makes a new generation even where acknowledged writes may be lost.
    Promote {
        force: bool,
    },
    Demote,
    /// Allow the link to that peer, or to all.
    Connect {
        peer: Option<String>,
    },
    Disconnect {
        peer: Option<String>,
    },
    PauseResync,
    ResumeResync,
    SuspendIo,
    ResumeIo,
    Verify {
        volume: Option<String>,
    },
    StopVerify,
    /// This copy's data is worthless: take a full copy from the peer.
    Invalidate,
    ResolveSplitBrain {
        discard_mine: bool,
    },
    SetMode {
        peer: String,
        mode: ReplicationMode,
    },
    SetOnPeerLoss {
        policy: PeerLossPolicy,
        force: bool,
    },
    /// Bytes the application sees from now on.
    Grow {
        volume: String,
        size: u64,
    },
    /// Changes nothing; says what a force, or discarding this copy's writes, would lose.
    WhatWouldForceLose,
    /// Stop the service on this node cleanly.
    Detach,
    /// Stop using this copy's disk and go on through another copy; refused where none can serve.
    DetachDisk,
    /// Take a detached service up again, from its disks as they are now.
    Attach,
    /// Take this copy's disk into use again after it failed or was detached.
    AttachDisk,
}

/// A line from the server after its hello.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AnswerLine {
    /// That of the request; 0 for what concerns the connection.
    pub id: u64,
    pub answer: Answer,
}

/// What the server says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum Answer {
    Status(NodeStatus),
    Event(EventReport),
    /// So many events were dropped here since the client read too slowly; the log file has them.
    Missed {
        count: u64,
    },
    /// Carried out; a sentence for people.
    Done {
        text: String,
    },
    /// A stream is over.
    End,
    Failed(Fault),
}

/// Why a request was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{what}")]
pub struct Fault {
    pub code: FaultCode,
    /// What happened, to which service or node.
    pub what: String,
    /// What was kept safe.
    #[serde(default)]
    pub kept: String,
    /// What to do next.
    #[serde(default)]
    pub next: String,
}

impl Fault {
    /// A fault in three sentences.
    pub fn new(
        code: FaultCode,
        what: impl Into<String>,
        kept: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Fault {
            code,
            what: what.into(),
            kept: kept.into(),
            next: next.into(),
        }
    }
}

/// Kinds of fault a program may want to tell apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultCode {
    /// The two programs have no version of the conversation in common.
    Version,
    /// The line is not a request of this protocol.
    Malformed,
    /// No such service, peer or volume on this node.
    Unknown,
    /// The service said no; nothing was changed.
    Refused,
    /// A verification ran to its end and found that the copies differ.
    CopiesDiffer,
    /// Too many connections.
    Busy,
    /// Another user's process asked.
    NotPermitted,
    /// The replicator stopped before the request was carried out.
    Stopping,
}
