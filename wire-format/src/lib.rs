//! Every byte layout of Holdfast: frames between nodes, metadata on disk. No I/O, no async, no clock.
//!
//! Values are in [`ids`], [`frame`] and [`metadata`]; bytes in the codec modules beside them.

pub mod frame;
pub mod ids;
pub mod metadata;
