//! QUIC between replicators: identity, join, paths, frames. See docs/link.md.
//!
//! [`Identity`] and [`PeerStore`] say who this node is and whom it trusts; [`JoinServer`] and [`join()`] introduce two nodes;
//! [`Link`] carries frames between the copies of services on one thread and reports to a [`LinkHandler`].

mod accept;
mod api;
mod backoff;
mod connection;
mod control;
mod dial;
mod drive;
mod error;
mod facts;
mod files;
mod identity;
mod join;
mod link;
mod peers;
mod queue;
mod quic;
mod receive;
mod session;
mod tls;
mod token;
mod tuning;

pub use api::{LinkEvent, LinkHandler, Path, Payload, PeerStatus, Received, SendError, SessionId};
pub use error::LinkError;
pub use identity::{Fingerprint, Identity, Validity};
pub use join::{JoinServer, join};
pub use link::{Link, LinkConfig};
pub use peers::{Peer, PeerStore};
pub use token::{TOKEN_LIFETIME, Token, TokenStore};
pub use tuning::{Congestion, Profile, Tuning};
