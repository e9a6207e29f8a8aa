//! QUIC between replicators: identity, join, paths, frames. See docs/link.md.

mod error;
mod files;
mod identity;
mod join;
mod peers;
mod socket;
mod tls;
mod token;
mod tuning;

pub use error::LinkError;
pub use identity::{Fingerprint, Identity, Validity};
pub use join::{JoinServer, join};
pub use peers::{Peer, PeerStore};
pub use token::{TOKEN_LIFETIME, Token, TokenStore};
pub use tuning::{Congestion, Profile, Tuning};
