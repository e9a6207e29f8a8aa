//! The table of the page is the one of the code, and the one of the code is what the function does.
//!
//! `HOLDFAST_WRITE_DOCS=1` writes the page anew.

use super::properties::{facts, stores};
use crate::handshake::outline::{TABLE, markdown};
use crate::handshake::*;
use holdfast_wire_format::ids::{Uuid, VolumeIndex};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/handshake.md");

#[test]
fn the_page_has_the_table() {
    let page = std::fs::read_to_string(PAGE).expect("docs/handshake.md");
    let table = markdown();
    if std::env::var_os("HOLDFAST_WRITE_DOCS").is_some() {
        let lines: Vec<&str> = page.lines().collect();
        let is_table = |l: &&str| l.starts_with("| ") || **l == *"(table)";
        let heading = lines
            .iter()
            .position(|l| *l == "## The table")
            .expect("its heading");
        let first = heading + lines[heading..].iter().position(is_table).expect("a table");
        let count = lines[first..].iter().take_while(|l| is_table(l)).count();
        let text = [
            &lines[..first],
            &table.lines().collect::<Vec<_>>(),
            &lines[first + count..],
        ]
        .concat();
        std::fs::write(PAGE, text.join("\n") + "\n").expect("written");
        return;
    }
    assert!(
        page.contains(&table),
        "docs/handshake.md is not what handshake/outline.rs says; HOLDFAST_WRITE_DOCS=1 writes it"
    );
}

#[test]
fn rows_come_to_what_the_table_says_and_to_nothing_else() {
    for (line, row) in TABLE.iter().zip(Row::ALL) {
        assert_eq!(line.row, row);
    }
    let said: BTreeSet<(Row, &str)> = TABLE
        .iter()
        .flat_map(|l| l.comes_to.iter().map(move |word| (l.row, *word)))
        .collect();
    // The same facts each time.
    let mut runner = TestRunner::deterministic();
    let pairs = (facts(0), facts(1), stores());
    let mut seen = BTreeSet::new();
    for round in 0..400_000 {
        let (mut a, mut b, store) = pairs.new_tree(&mut runner).expect("facts").current();
        if round % 4 == 0 {
            for f in [&mut a, &mut b] {
                let mut second = f.volumes[0].clone();
                (second.index, second.volume, second.blank) = (VolumeIndex(1), Uuid(77), false);
                second.disk = Uuid(second.disk.0 + 1000);
                f.volumes.push(second);
            }
        }
        let decision = decide(&a, &b, store.as_ref());
        seen.insert((decision.row, decision.outcome.word()));
    }
    let surprises: Vec<_> = seen.difference(&said).collect();
    assert!(surprises.is_empty(), "the table does not say {surprises:?}");
    let never: Vec<_> = said.difference(&seen).collect();
    assert!(never.is_empty(), "no facts came to {never:?}");
}
