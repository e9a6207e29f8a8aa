//! What can go wrong, in words a person can act on.

use crate::identity::Fingerprint;
use holdfast_wire_format::ids::Uuid;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Errors of identity, join and start-up. What happens to a running link arrives as events instead.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot {what} {path}: {source}")]
    File {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is damaged ({detail}); nothing was changed. Restore it from a backup of this node, or move it away and join the cluster anew"
    )]
    Damaged { path: PathBuf, detail: String },
    #[error(
        "{path} was written by a newer version of this software (format {found}, this one reads {known}); install that version again"
    )]
    Newer {
        path: PathBuf,
        found: u32,
        known: u32,
    },
    #[error(
        "this node already has an identity in {path}; it was kept. To give the node a new one, move that file away first: every peer must then join it again"
    )]
    IdentityExists { path: PathBuf },
    #[error("this node has no identity in {path}; create one with `holdfast init`")]
    NoIdentity { path: PathBuf },
    #[error("'{name}' can't be a node name: use 1 to 64 letters, digits, '.', '-' or '_'")]
    BadName { name: String },
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("TLS could not be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error("no new certificate is prepared; prepare one first")]
    NoRotation,
    #[error(
        "the new certificate can't be used yet: {waiting} did not confirm it. They would refuse this node. Connect them, or remove them from this node's peers"
    )]
    RotationIncomplete { waiting: String },
    #[error("node {name} ({id}) is not a peer of this node")]
    NotAPeer { id: Uuid, name: String },
    #[error(
        "a node named {name} is already known under id {known}, and this one has id {offered}; nothing was changed. Forget the old one first, or give the new one another name"
    )]
    NameTaken {
        name: String,
        known: Uuid,
        offered: Uuid,
    },
    #[error(
        "certificate {fingerprint} already belongs to node {name} ({id}); nothing was changed. Each node needs an identity of its own: was the state directory copied?"
    )]
    CertificateTaken {
        fingerprint: Fingerprint,
        name: String,
        id: Uuid,
    },
    #[error(
        "that is this node's own identity; a node can't join itself. Was the state directory copied from another machine?"
    )]
    Oneself,
    #[error("this is no join token: {0}. Copy the whole line that `holdfast token` printed")]
    BadToken(&'static str),
    #[error(
        "{count} join tokens are still open, the most allowed; use one or wait until it expires"
    )]
    TooManyTokens { count: usize },
    #[error("join refused by the other node: {0}")]
    JoinRefused(String),
    #[error("could not join: {0}; nothing was changed here")]
    JoinFailed(String),
    #[error(
        "cannot listen for other nodes on {address} (UDP): {source}. Nothing was started and nothing was changed; `ss -lunp` shows who has the \
         port: free it, or listen on another one (node.link_listen, and this node's address at its peers)"
    )]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
}

impl LinkError {
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> LinkError {
        let path = path.into();
        move |source| LinkError::File { what, path, source }
    }
}
