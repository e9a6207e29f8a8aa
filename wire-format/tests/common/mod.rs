//! What the tests of the formats share.
// Each test program uses a part of it.
#![allow(dead_code)]

pub mod examples;
pub mod golden;
pub mod sample;
pub mod seeds;
pub mod strategies;

use holdfast_wire_format::frame::HEADER_LENGTH;

/// Puts the right checksum into the four bytes at `at`, computed over `over`.
pub fn reseal(bytes: &mut [u8], at: usize, over: std::ops::Range<usize>) {
    let crc = crc32fast::hash(&bytes[over]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Of a frame: of its payload, then of its header.
pub fn reseal_frame(bytes: &mut [u8]) {
    if bytes.len() > HEADER_LENGTH {
        reseal(bytes, 12, HEADER_LENGTH..bytes.len());
    }
    reseal(bytes, HEADER_LENGTH - 4, 0..HEADER_LENGTH - 4);
}
