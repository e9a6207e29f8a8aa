//! Every byte layout of Holdfast: frames between nodes, metadata on disk. No I/O, no async, no clock.
//!
//! Values are in [`ids`], [`frame`] and [`metadata`]; bytes in the codec modules beside them.
//! All numbers are little-endian, reserved bytes are zero, every length has a cap. No decoder panics on any
//! input, and each states the most it allocates.

pub mod activity_log;
pub mod bitmap_page;
mod bytes;
pub mod frame;
pub mod frame_codec;
pub mod ids;
pub mod layout;
pub mod locator;
pub mod metadata;
mod shared;
pub mod superblock;
pub mod time_index;
pub mod undo_record;
