//! Ranges of bits: in the words of one page, and over pages.

use super::{MARK_BITS, PAGE_BITS, PageWords};

/// Splits a range of bits at page boundaries: page, and first bit and first bit behind within it.
pub(super) fn spans(first: u64, end: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let pages = if first < end {
        first / PAGE_BITS..end.div_ceil(PAGE_BITS)
    } else {
        0..0
    };
    pages.map(move |page| {
        let start = page * PAGE_BITS;
        (
            page as usize,
            first.saturating_sub(start),
            (end - start).min(PAGE_BITS),
        )
    })
}

/// Marks of the 64ths of a page that a range of its bits touches.
pub(super) fn marks(from: u64, to: u64) -> u64 {
    let (low, high) = (from / MARK_BITS, (to - 1) / MARK_BITS);
    u64::MAX >> (63 - (high - low)) << low
}

/// The part of word `at` that lies in the bits `from..to`.
pub(super) fn mask(at: usize, from: u64, to: u64) -> u64 {
    let start = at as u64 * 64;
    let low = from.saturating_sub(start).min(64);
    let high = to.saturating_sub(start).min(64);
    if low >= high {
        0
    } else {
        u64::MAX >> (64 - (high - low)) << low
    }
}

pub(super) fn words_of(from: u64, to: u64) -> std::ops::Range<usize> {
    (from / 64) as usize..to.div_ceil(64) as usize
}

/// Sets the bits `from..to`; returns how many were not set.
pub(super) fn fill(words: &mut PageWords, from: u64, to: u64) -> u32 {
    words_of(from, to)
        .map(|at| {
            let added = mask(at, from, to) & !words[at];
            words[at] |= added;
            added.count_ones()
        })
        .sum()
}

/// Clears the bits `from..to`; returns how many were set.
pub(super) fn drain(words: &mut PageWords, from: u64, to: u64) -> u32 {
    words_of(from, to)
        .map(|at| {
            let removed = mask(at, from, to) & words[at];
            words[at] &= !removed;
            removed.count_ones()
        })
        .sum()
}

/// The first set bit at or behind `from`.
pub(super) fn first_set(words: &PageWords, from: u64) -> Option<u64> {
    words_of(from, PAGE_BITS).find_map(|at| {
        let found = words[at] & mask(at, from, PAGE_BITS);
        (found != 0).then(|| at as u64 * 64 + u64::from(found.trailing_zeros()))
    })
}

/// The first clear bit at or behind `from`; the end of the page if there is none.
pub(super) fn first_clear(words: &PageWords, from: u64) -> u64 {
    words_of(from, PAGE_BITS)
        .find_map(|at| {
            let found = !words[at] & mask(at, from, PAGE_BITS);
            (found != 0).then(|| at as u64 * 64 + u64::from(found.trailing_zeros()))
        })
        .unwrap_or(PAGE_BITS)
}
