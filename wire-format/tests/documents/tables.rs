//! Reads the tables of the documents and compares them with the code.

use crate::common::sample::{FramePayload, Sample};
use std::fmt::Debug;
use std::ops::Range;

fn document(name: &str) -> String {
    let path = format!("{}/../docs/{name}.md", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The cells of the table under a heading, without its first two lines.
pub fn table(name: &str, heading: &str) -> Vec<Vec<String>> {
    let text = document(name);
    let mut lines = text.lines().skip_while(|line| {
        line.trim_start_matches('#').trim() != heading || !line.starts_with('#')
    });
    assert!(lines.next().is_some(), "{name}.md has no heading {heading}");
    let rows: Vec<Vec<String>> = lines
        .take_while(|line| !line.starts_with('#'))
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect();
    assert!(!rows.is_empty(), "{name}.md: no table under {heading}");
    rows
}

struct Row {
    name: String,
    /// From the beginning of the structure.
    pub place: Range<usize>,
}

/// The rows of a table of bytes; they follow each other without a gap. A last one with `…` goes to the end.
fn rows(name: &str, heading: &str, length: usize) -> Vec<Row> {
    let mut next = 0;
    let rows: Vec<Row> = table(name, heading)
        .iter()
        .map(|cells| {
            let context = format!("{name}.md, {heading}, {}", cells[2]);
            let offset: usize = cells[0]
                .parse()
                .unwrap_or_else(|e| panic!("{context}: {e}"));
            assert_eq!(offset, next, "{context}: there is a gap or an overlap");
            next = match cells[1].as_str() {
                "…" => length,
                size => {
                    offset
                        + size
                            .parse::<usize>()
                            .unwrap_or_else(|e| panic!("{context}: {e}"))
                }
            };
            Row {
                name: cells[2].clone(),
                place: offset..next,
            }
        })
        .collect();
    assert_eq!(
        next, length,
        "{name}.md, {heading}: the structure has {length} bytes"
    );
    rows
}

/// A field, those that change with it, and a change of it.
pub type Change<T> = (&'static str, &'static [&'static str], fn(&mut T));

/// Where a structure's checksums are: they change with everything.
fn checksums(sample: &Sample) -> [Range<usize>; 2] {
    match sample {
        // Length and checksum of the payload, and the header's checksum. Only where a body is looked at.
        Sample::Frame(_, FramePayload::Body(_)) => [8..16, 108..112],
        Sample::Frame(..) => [0..0, 108..112],
        Sample::Superblock(_) => [0..0, 8..12],
        Sample::Locator(..) => [0..0, 72..76],
        _ => [0..0, 4..8],
    }
}

/// Rows that are the same in everything that is accepted.
const FIXED: [&str; 4] = ["magic", "zero", "incompatible features", "on-disk version"];
/// Fields whose lowest byte is always zero.
const LOOSE: [&str; 8] = [
    "data size",
    "room",
    "sector size",
    "offset of an entry",
    "length of an entry",
    "entries of a record",
    "area offset",
    "area size",
];

pub struct Structure<'a, T> {
    pub document: &'a str,
    pub heading: &'a str,
    /// A value with all of the structure in it, and what is encoded of it.
    pub base: T,
    pub wrap: fn(T) -> Sample,
    /// The bytes of the structure in the encoding; `usize::MAX` stands for the end of the encoding.
    pub place: Range<usize>,
    pub changes: &'a [Change<T>],
}

pub fn check<T: Clone + Debug>(it: Structure<T>) {
    let sample = (it.wrap)(it.base.clone());
    let base = sample.encode();
    let place = it.place.start..if it.place.end == usize::MAX {
        base.len()
    } else {
        it.place.end
    };
    let rows = rows(it.document, it.heading, place.len());
    let within = |row: &Row| place.start + row.place.start..place.start + row.place.end;
    let context = |name: &str| format!("{}.md, {}, {name}", it.document, it.heading);
    let mut unused: Vec<&str> = it.changes.iter().map(|change| change.0).collect();
    for row in &rows {
        let at = within(row);
        if row.name == "crc" {
            assert!(checksums(&sample).contains(&at), "{}", context("crc"));
            continue;
        }
        let Some((name, also, change)) =
            it.changes.iter().find(|change| plain(change.0) == row.name)
        else {
            assert!(
                FIXED.contains(&row.name.as_str())
                    || row.name == "version" && it.document == "metadata",
                "{}: no field of the code",
                context(&row.name)
            );
            // Nothing else is accepted there, though its checksum is right.
            for byte in at {
                let mut changed = base.clone();
                assert!(
                    row.name != "zero" || changed[byte] == 0,
                    "{}: byte {byte}",
                    context("zero")
                );
                changed[byte] ^= 0x55;
                sample.reseal(&mut changed);
                assert!(
                    sample.decode_as(&changed).is_err(),
                    "{}: byte {byte}",
                    context(&row.name)
                );
            }
            continue;
        };
        unused.retain(|n| n != name);
        let mut value = it.base.clone();
        change(&mut value);
        let changed = (it.wrap)(value).encode();
        let allowed: Vec<Range<usize>> = rows
            .iter()
            .filter(|other| {
                other.name == row.name && other.place == row.place
                    || also.contains(&other.name.as_str())
            })
            .map(&within)
            .chain(checksums(&sample))
            .collect();
        let differs: Vec<usize> = (0..base.len().min(changed.len()))
            .filter(|at| base[*at] != changed[*at])
            .collect();
        let first = if LOOSE.contains(name) {
            differs.iter().any(|byte| at.contains(byte))
        } else {
            differs.contains(&at.start)
        };
        assert!(
            first,
            "{}: bytes {differs:?} change and not {at:?}",
            context(name)
        );
        if base.len() == changed.len() {
            let outside = differs
                .iter()
                .find(|byte| !allowed.iter().any(|range| range.contains(byte)));
            assert_eq!(
                outside,
                None,
                "{}: only {at:?} should change",
                context(name)
            );
        }
    }
    assert!(
        unused.is_empty(),
        "{}: not in the table: {unused:?}",
        context("fields")
    );
}

/// Names in `LOOSE` say more than the table does.
fn plain(name: &str) -> &str {
    name.split(" of an entry")
        .next()
        .unwrap()
        .split(" of a record")
        .next()
        .unwrap()
}

/// A table of codes: each code and its name, in order.
pub fn codes(document: &str, heading: &str, expected: impl Iterator<Item = (u8, String)>) {
    let found: Vec<(u8, String)> = table(document, heading)
        .iter()
        .map(|cells| (cells[0].parse().unwrap(), cells[1].clone()))
        .collect();
    assert_eq!(
        found,
        expected.collect::<Vec<_>>(),
        "{document}.md, {heading}"
    );
}

/// The table of a generation, at a place in anything that has one.
pub fn generation_at<T: Clone + Debug>(
    at: usize,
    base: T,
    wrap: fn(T) -> Sample,
    changes: &[Change<T>],
) {
    check(Structure {
        document: "metadata",
        heading: "Generation",
        base,
        wrap,
        place: at..at + 40,
        changes,
    });
}

/// One entry less.
pub fn short<T>(list: &mut Vec<T>) {
    list.pop();
}

/// The document has these words.
pub fn says(name: &str, sentences: &[String]) {
    let text = document(name);
    for sentence in sentences {
        assert!(
            text.contains(sentence),
            "{name}.md does not say: {sentence}"
        );
    }
}

/// Feature bits in words.
pub fn features(known: u64) -> String {
    if known == 0 {
        "none".to_owned()
    } else {
        format!("{known:#x}")
    }
}

/// 32640 → 32,640.
pub fn thousands(n: usize) -> String {
    format!("{},{:03}", n / 1000, n % 1000)
}
