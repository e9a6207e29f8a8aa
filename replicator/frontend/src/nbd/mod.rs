//! The Network Block Device protocol, fixed newstyle.
//!
//! [`wire`] knows byte layouts, [`handshake`] option haggling, [`check`] what a request may ask for and [`session`]
//! the transmission phase: none of them does I/O. [`connection`] moves their bytes over one socket, [`server`]
//! accepts sockets.

mod answer;
pub mod check;
mod connection;
pub mod fuzz;
pub mod handshake;
mod outbox;
pub mod server;
pub mod session;
pub mod settings;
mod unix;
pub mod wire;

pub use server::{BindError, NbdServer, bind_tcp, bind_unix};
pub use settings::{Limits, Stats, TlsPolicy};
