//! First inputs of the fuzz targets: the golden bytes, in the form each target takes.

use super::golden;
use super::sample::{Sample, all};
use holdfast_wire_format::frame::HEADER_LENGTH;

/// Place of each structure in the list of the target `blocks`.
pub type Blocks<'a> = &'a [&'a str];

/// (target, name, input).
pub fn all_seeds(blocks: Blocks) -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut stream = Vec::new();
    for (name, sample) in all() {
        let bytes = golden::read(&name);
        match &sample {
            Sample::Frame(header, _) => {
                stream.extend_from_slice(&bytes);
                if !header.kind.carries_data() {
                    let body = [&[header.kind.code()], &bytes[HEADER_LENGTH..]].concat();
                    seeds.push(("bodies", name.clone(), body));
                }
                seeds.push(("frames", name, bytes));
            }
            Sample::Superblock(sb) => {
                let mut older = sb.clone();
                older.sequence -= 1;
                let older = Sample::Superblock(older).encode();
                seeds.push(("superblock", "one".into(), bytes.clone()));
                seeds.push(("superblock", "two".into(), [bytes, older].concat()));
            }
            other => {
                let which = blocks
                    .iter()
                    .position(|block| *block == name)
                    .expect("every block is fuzzed");
                let mut input = [&[which as u8], &bytes[..]].concat();
                if let Sample::Locator(_, size) = other {
                    input.extend_from_slice(&size.to_le_bytes());
                }
                seeds.push(("blocks", name, input));
            }
        }
    }
    seeds.push(("frames", "all".into(), stream));
    seeds
}
