//! End-to-end tests on real processes: nodes as a user would set them up ([`cluster`]), an application of the tests' own
//! that knows what a volume may hold after a crash ([`history`], [`load`]), disks that lose power ([`faults`]) and a network that
//! loses packets ([`relay`]).
//!
//! Everything here panics when something is not as it should be: it is for tests. `docs/testing.md` says which test proves
//! what, and how to run one alone.

pub mod bytes;
pub mod cluster;
mod evidence;
pub mod faults;
pub mod history;
pub mod load;
pub mod loop_device;
pub mod mounts;
pub mod nbd;
pub mod order;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod random;
pub mod relay;
pub mod services;
pub mod storm;
pub mod story;

pub use cluster::{Backing, Cluster, Node, Part, Settings};
pub use history::{History, Loss};
pub use load::{Load, Mix};
pub use nbd::Nbd;
pub use order::Order;
pub use random::Random;
pub use services::Service;
