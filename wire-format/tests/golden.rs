//! The bytes of every frame and every structure on disk, as they were when the format was fixed.

mod common;

use common::golden;
use common::sample::all;
use std::collections::BTreeSet;

#[test]
fn golden_bytes_are_what_is_written_and_mean_what_they_meant() {
    for (name, sample) in all() {
        let bytes = golden::read(&name);
        let written = sample.encode();
        if let Some(at) =
            (0..bytes.len().max(written.len())).find(|at| bytes.get(*at) != written.get(*at))
        {
            panic!(
                "{name}: byte {at} was {:?} and is written as {:?} now: nodes and disks of the field would not understand it",
                bytes.get(at),
                written.get(at)
            );
        }
        assert_eq!(sample.decode_as(&bytes), Ok(sample), "{name}");
    }
}

#[test]
fn every_golden_file_is_used() {
    let used: BTreeSet<String> = all()
        .into_iter()
        .map(|(name, _)| format!("{name}.hex"))
        .collect();
    let there: BTreeSet<String> = std::fs::read_dir(golden::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "README.md")
        .collect();
    assert_eq!(used, there);
}

#[test]
fn each_byte_counts() {
    for (name, sample) in all() {
        let bytes = golden::read(&name);
        for at in 0..sample.meaningful(&bytes) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            let read = sample.decode_as(&changed);
            assert!(
                read.is_err(),
                "{name}: a changed byte {at} passes its checksums"
            );
            // And with the checksums made right again it means something else, or nothing.
            sample.reseal(&mut changed);
            let read = sample.decode_as(&changed);
            assert!(
                read.as_ref() != Ok(&sample) || changed == bytes,
                "{name}: byte {at} has no meaning"
            );
        }
    }
}

#[test]
fn the_text_of_golden_files_says_the_bytes() {
    for bytes in [
        vec![],
        vec![0; 16],
        vec![0; 17],
        vec![7; 4096],
        (0..=255).collect(),
        [vec![1; 64], vec![2; 3]].concat(),
    ] {
        assert_eq!(golden::from_text(&golden::to_text(&bytes)), bytes);
    }
}
