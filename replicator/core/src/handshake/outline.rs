//! The table of `docs/handshake.md`, row by row in words. The page is written from it, and a test compares both, and what the
//! rows come to over generated facts.

use super::{How, Outcome, Row};

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    pub row: Row,
    /// When it fits.
    pub state: &'static str,
    pub outcome: &'static str,
    /// What it can come to ([`Outcome::word`]).
    pub comes_to: &'static [&'static str],
}

impl Outcome {
    /// In a word or two, without the copies.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Refuse { .. } => "refuse",
            Outcome::Nothing => "nothing to copy",
            Outcome::Copy(plan) => match plan.how {
                How::Bits => "bits",
                How::BitsAndUndo => "bits and undo",
                How::Full => "full",
                How::FullByChecksum => "checksum",
            },
            Outcome::SplitBrain { .. } => "split brain",
            Outcome::AskPerson { .. } => "ask",
            Outcome::WaitForThird => "wait",
            Outcome::Diskless { .. } => "diskless",
        }
    }
}

const fn line(
    row: Row,
    state: &'static str,
    outcome: &'static str,
    comes_to: &'static [&'static str],
) -> Line {
    Line {
        row,
        state,
        outcome,
        comes_to,
    }
}

/// In the order of the numbers. (Row 6 is tried with 16, after 7 to 15.)
#[rustfmt::skip]
pub const TABLE: [Line; 17] = [
    line(Row::R1, "volumes, their names, sizes or sector sizes differ; same slot; one disk a clone of the other; broken or contradicting histories; two primaries in one generation; the store behind the copies",
        "refuse, change nothing",
        &["refuse"]),
    line(Row::R2, "one failed",
        "diskless through the other if it is UpToDate, or Complete and in S, **and** holds what the failed one knows of; if the failed one knows more, ask; both failed: refuse",
        &["diskless", "ask", "refuse"]),
    line(Row::R3, "both blank",
        "no copy if one `create` zeroed both (same generation); else ask which is the first",
        &["nothing to copy", "ask"]),
    line(Row::R4, "Y blank",
        "X→Y full; by checksum if only some of its volumes are new. X may be Outdated: Y then is, too",
        &["full", "checksum", "wait"]),
    line(Row::R5, "Y's disk went back in time (attach counter, generation or position below what was recorded; another disk than the store knows; a claimed primary that its secondary is ahead of)",
        "X in the same generation or newer: Y Outdated, X→Y by checksum. X older: ask. Both went back: ask. Siblings or unrelated: on to 16 and 17, without trusting lists",
        &["checksum", "ask", "wait"]),
    line(Row::R6, "siblings, and one epoch number has two owners",
        "as 16",
        &["bits", "checksum", "split brain", "wait"]),
    line(Row::R7, "Y mid-resync toward g",
        "g not in X's history: wait for a third. X stopped uncleanly, did not make that generation, and a third member of S may have more: wait for it. X is the source recorded, or Y received nothing past X's end of g: goes on over bits. Else bits and Y's undo list; undo lost or no usable bits: by checksum",
        &["bits", "bits and undo", "checksum", "wait"]),
    line(Row::R8, "both mid-resync",
        "wait for a third, or a person",
        &["wait"]),
    line(Row::R9, "same generation, none unclean, lists usable and empty, equal positions, states whole",
        "nothing",
        &["nothing to copy"]),
    line(Row::R10, "same generation, Y unclean and not its primary, X lived on",
        "X→Y over bits; the other way only if Y is in S and X neither is nor wrote here, or X is not fit; not while a third member of S, not the maker, may have more than Y",
        &["bits", "checksum", "wait"]),
    line(Row::R11, "same generation, Y unclean and its primary, X lived on",
        "X in S, or still UpToDate in this generation, and not async: X→Y over bits; else Y→X",
        &["bits", "checksum", "wait"]),
    line(Row::R12, "same generation, both unclean",
        "source: the store's owner in S; else the one that wrote in this generation; else the one in S; else its maker. None: wait for a third",
        &["bits", "checksum", "wait"]),
    line(Row::R13, "same generation, bits or shortfall",
        "source: the primary; else the store's owner; else who alone is in S; else who alone holds bits; else who wrote in this generation; else who is further; else, where a third copy made the generation, the lower slot. A shortfall without bits: by checksum. The source behind its target: as 5",
        &["bits", "checksum", "wait"]),
    line(Row::R14, "Y's generation is an ancestor of X's, no acknowledged surplus",
        "X→Y over bits, by checksum if X has no usable list, or if Y may hold writes past the fork without one. If the store never committed X's generation and Y owns the epoch (sync mode): Y→X",
        &["bits", "checksum", "wait"]),
    line(Row::R15, "the same with surplus that may have been acknowledged",
        "X→Y, if X went on by promotion, restart or force; else ask. The surplus is listed (blocks, bytes, since when) and saved at Y before anything of it is overwritten; what is overwritten also stays in Y's undo log until Y is whole, and forcing Y before that brings it back",
        &["bits", "checksum", "ask", "wait"]),
    line(Row::R16, "siblings",
        "a branch the store never committed (sync mode, nobody forced) is the target; a side that wrote nothing past the fork, or completed nothing of it (not async, and the other, which never held its branch, is still in its S), is the target; else split brain with both sides' facts",
        &["bits", "checksum", "split brain", "wait"]),
    line(Row::R17, "no common generation",
        "refuse; only `invalidate`",
        &["refuse"]),
];

/// As the page has it.
pub fn markdown() -> String {
    let mut text = String::from("| # | state | outcome | comes to |\n| --- | --- | --- | --- |\n");
    for line in &TABLE {
        text += &format!(
            "| {} | {} | {} | {} |\n",
            line.row.number(),
            line.state,
            line.outcome,
            line.comes_to.join(", ")
        );
    }
    text
}
