//! QUIC's protocol code, driven by this thread's own loop. See docs/link.md, "The loop".
//!
//! One [`Endpoint`] is one socket. Its driver takes what the socket has, hands it to the connections, lets the sessions that
//! have something to read run, then sends: all of it in one turn.

mod connection;
mod endpoint;
mod packets;
pub(crate) mod socket;
mod stream;

pub(crate) use connection::Connection;
pub(crate) use endpoint::Endpoint;
pub(crate) use stream::{RecvStream, SendStream};
