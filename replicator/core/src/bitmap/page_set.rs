//! A set of pages, for finding the next one.

/// A set of page numbers that is walked in order; a bit per page, so that half a million pages scan in
/// microseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct PageSet {
    words: Vec<u64>,
    pub(super) len: usize,
}

impl PageSet {
    pub(super) fn resize(&mut self, pages: usize) {
        self.words.resize(pages.div_ceil(64), 0);
    }
    pub(super) fn contains(&self, page: usize) -> bool {
        self.words[page / 64] & 1 << (page % 64) != 0
    }
    pub(super) fn insert(&mut self, page: usize) -> bool {
        let added = !self.contains(page);
        self.words[page / 64] |= 1 << (page % 64);
        self.len += usize::from(added);
        added
    }
    pub(super) fn remove(&mut self, page: usize) -> bool {
        let removed = self.contains(page);
        self.words[page / 64] &= !(1 << (page % 64));
        self.len -= usize::from(removed);
        removed
    }
    pub(super) fn next(&self, from: usize) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        let mut at = from / 64;
        let mut word = *self.words.get(at)? & u64::MAX << (from % 64);
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        Some(at * 64 + word.trailing_zeros() as usize)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = self.next(from)?;
            from = page + 1;
            Some(page)
        })
    }
}
