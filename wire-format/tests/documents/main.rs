//! The tables of `docs/wire.md` and `docs/metadata.md` say what the code writes: each field of a value is changed, and
//! the bytes that change are those of its row.

#[path = "../common/mod.rs"]
mod common;
mod frames;
mod hello;
mod on_disk;
mod tables;
