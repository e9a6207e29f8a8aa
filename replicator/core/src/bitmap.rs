//! The dirty bitmap: the blocks of one volume that one peer lacks, in memory, and what of it is durable.
//!
//! Paged like the bitmap on disk. A page is *clean* (nothing held), *all set* (nothing held either) or *partial*
//! (4 KiB held). Partial pages are bounded: over the bound, a page with many bits becomes all set. Saying too
//! much is always safe (D7), it costs a longer resync; saying too little never is.
//!
//! Bits that were set are durable **before** what depends on them goes on (a write that completes without the
//! peer, an extent that cools); bits that were cleared become durable when it suits, because a stale set bit
//! costs a transfer only. `docs/metadata-in-memory.md` has the states and the order of the writes.

mod page_set;
mod saving;
mod words;

use holdfast_wire_format::bitmap_page;
pub use holdfast_wire_format::bitmap_page::PAGE_WORDS;
use page_set::PageSet;
pub use saving::{AfterPage, SaveImage};
use words::*;

/// Bits of one page; bit `i` is bit `i % 64` of word `i / 64`.
pub const PAGE_BITS: u64 = bitmap_page::BITS_PER_PAGE as u64;
/// Pages whose summary bytes share one block on disk.
pub const SUMMARY_BLOCK_PAGES: u64 = bitmap_page::SUMMARY_ENTRIES as u64;

/// Summary byte: no bit of the page is set; what the page itself holds on disk does not count.
pub const SUMMARY_CLEAN: u8 = 0;
/// Summary byte: the page on disk says which bits are set.
pub const SUMMARY_PARTIAL: u8 = 1;
/// Summary byte: every bit is set; what the page itself holds on disk does not count.
pub const SUMMARY_ALL_SET: u8 = 2;
/// In place of the summary byte of a page whose summary block is damaged, for [`DirtyBitmap::load`] alone.
pub const SUMMARY_DAMAGED: u8 = 0xff;

/// Fewest partial pages a bitmap can be bounded to.
pub const MIN_PARTIAL_PAGES: usize = 8;

/// Bits that share one "not durable yet" mark: a 64th of a page. An extent that wants to cool must not wait for
/// bits that others keep setting elsewhere in its page.
const MARK_BITS: u64 = PAGE_BITS / 64;
/// Pages that a resync is taking apart and that are not made all set again: see `make_partial`.
const SHIELDED: usize = 4;
const NO_PAGE: u32 = u32::MAX;

/// The words of one page.
pub type PageWords = [u64; PAGE_WORDS];

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageContent<'a> {
    Clean,
    /// Every bit up to the end of the volume.
    AllSet,
    Partial(&'a PageWords),
}

#[derive(Clone, Debug)]
enum Content {
    Clean,
    AllSet,
    Partial(Box<PageWords>),
}

#[derive(Clone, Debug)]
struct Page {
    content: Content,
    /// Bits set; for all set pages up to the end of the volume.
    count: u32,
    /// Partial pages: place in their bucket.
    place: u32,
    /// Marks of sets that no write holds yet, and of those that a save in flight holds.
    unsaved: u64,
    saving: u64,
    /// What a summary block written now says of this page. Equal to what the disk says, or safe to become it.
    summary: u8,
    save: Save,
    /// A summary write failed: the disk may say this byte or an older one.
    summary_unsure: bool,
}

/// How far the save of a page is. One at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Save {
    Idle,
    PageInFlight,
    SummaryDue,
    SummaryInFlight,
}

/// The blocks of one volume that one peer lacks.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    size: u64,
    grain_shift: u8,
    bits: u64,
    pages: Vec<Page>,
    /// Bits set, in all.
    count: u64,
    with_bits: PageSet,
    /// Pages with sets that are not durable and are not being saved.
    unsaved_sets: PageSet,
    /// Pages whose disk content has more bits than they have.
    unsaved_clears: PageSet,
    /// Partial pages by the logarithm of their count, so that one with many bits is found at once.
    buckets: [Vec<u32>; 15],
    partial: usize,
    max_partial: usize,
    shielded: [u32; SHIELDED],
    shield_next: usize,
    collapsed: u64,
    summary_pages: u64,
    /// Summary blocks being written.
    summary_in_flight: PageSet,
    /// Pages with a save under way, and those of them that save sets.
    saves: usize,
    saves_of_sets: usize,
}

impl DirtyBitmap {
    /// A bitmap without a set bit.
    ///
    /// `size` in bytes; one bit stands for `1 << grain_shift` bytes (9..=40); at most `max_partial` pages of
    /// 4 KiB are held (at least [`MIN_PARTIAL_PAGES`]).
    #[must_use]
    pub fn new(size: u64, grain_shift: u8, max_partial: usize) -> Self {
        assert!(
            (9..=40).contains(&grain_shift),
            "grain shift {grain_shift} is outside 9..=40"
        );
        let mut bitmap = DirtyBitmap {
            size: 0,
            grain_shift,
            bits: 0,
            pages: Vec::new(),
            count: 0,
            with_bits: PageSet::default(),
            unsaved_sets: PageSet::default(),
            unsaved_clears: PageSet::default(),
            buckets: Default::default(),
            partial: 0,
            max_partial: max_partial.max(MIN_PARTIAL_PAGES),
            shielded: [NO_PAGE; SHIELDED],
            shield_next: 0,
            collapsed: 0,
            summary_pages: SUMMARY_BLOCK_PAGES,
            summary_in_flight: PageSet::default(),
            saves: 0,
            saves_of_sets: 0,
        };
        bitmap.grow(size);
        bitmap
    }

    /// Makes the volume `size` bytes long, never shorter. The new area is clear; the block that held the old end
    /// keeps its bit.
    pub fn grow(&mut self, size: u64) {
        assert!(
            size >= self.size,
            "a volume does not shrink: {} to {size} bytes",
            self.size
        );
        let old_bits = self.bits;
        self.size = size;
        self.bits = size.div_ceil(1 << self.grain_shift);
        let pages = self.bits.div_ceil(PAGE_BITS) as usize;
        assert!(
            pages < NO_PAGE as usize,
            "a volume of {size} bytes needs a coarser grain"
        );
        if self.bits == old_bits {
            return;
        }
        let empty = Page {
            content: Content::Clean,
            count: 0,
            place: 0,
            unsaved: 0,
            saving: 0,
            summary: SUMMARY_CLEAN,
            save: Save::Idle,
            summary_unsure: false,
        };
        self.pages.resize(pages, empty);
        for set in [
            &mut self.with_bits,
            &mut self.unsaved_sets,
            &mut self.unsaved_clears,
        ] {
            set.resize(pages);
        }
        self.summary_in_flight
            .resize(pages.div_ceil(self.summary_pages as usize));
        // "All set" of the former last page meant up to the former end.
        let tail = old_bits % PAGE_BITS;
        if tail != 0 {
            let page = (old_bits / PAGE_BITS) as usize;
            if matches!(self.pages[page].content, Content::AllSet) {
                let mut words = Box::new([0; PAGE_WORDS]);
                fill(&mut words, 0, tail);
                self.make_partial(page, words, tail as u32);
                self.unsaved_clears.insert(page);
            }
        }
    }

    /// Bytes of the volume.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Logarithm of the bytes one bit stands for.
    #[must_use]
    pub fn grain_shift(&self) -> u8 {
        self.grain_shift
    }
    /// Bits of the volume, set or not.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bits
    }
    /// Pages of the volume.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }
    /// Bits set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
    /// True if no bit is set: the peer lacks nothing as far as this bitmap knows.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.count == 0
    }
    /// Bytes that the set bits stand for; the last block counts up to the end of the volume only.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let past_end = (self.bits << self.grain_shift) - self.size;
        let tail_set = past_end != 0 && self.bit(self.bits - 1);
        (self.count << self.grain_shift) - if tail_set { past_end } else { 0 }
    }
    /// How often a page was made all set because too many were partial.
    #[must_use]
    pub fn collapsed_pages(&self) -> u64 {
        self.collapsed
    }
    /// Pages of 4 KiB held.
    #[must_use]
    pub fn partial_pages(&self) -> usize {
        self.partial
    }

    /// Sets the bit of every block that the range touches; what lies past the end of the volume is ignored.
    /// Returns how many were not set before.
    pub fn set(&mut self, offset: u64, length: u64) -> u64 {
        let (first, end) = self.touched(offset, length);
        self.set_bits(first, end)
    }

    /// Clears the bits of the blocks that lie wholly inside the range (the volume's last block: up to the end
    /// of the volume). Returns how many were set.
    pub fn clear(&mut self, offset: u64, length: u64) -> u64 {
        let grain = 1u64 << self.grain_shift;
        let stop = offset.saturating_add(length);
        let first = offset.div_ceil(grain).min(self.bits);
        let end = if stop >= self.size {
            self.bits
        } else {
            stop >> self.grain_shift
        };
        let mut cleared = 0;
        for (page, from, to) in spans(first, end) {
            cleared += self.clear_in_page(page, from, to);
        }
        cleared
    }

    /// Sets every bit: the peer lacks everything.
    pub fn set_all(&mut self) {
        self.set_bits(0, self.bits);
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        let mut from = 0;
        while let Some(page) = self.with_bits.next(from) {
            self.clear_in_page(page, 0, PAGE_BITS);
            from = page + 1;
        }
    }

    /// Whether the bit of any block that the range touches is set.
    #[must_use]
    pub fn any_set(&self, offset: u64, length: u64) -> bool {
        let (first, end) = self.touched(offset, length);
        self.first_from(first).is_some_and(|bit| bit < end)
    }

    /// Whether the bits of all blocks that the range touches are set (true for an empty range).
    #[must_use]
    pub fn all_set(&self, offset: u64, length: u64) -> bool {
        let (first, end) = self.touched(offset, length);
        first >= end || (self.bit(first) && self.run_length(first, end - first) == end - first)
    }

    /// Whether this bit is set; false past the end.
    #[must_use]
    pub fn bit(&self, bit: u64) -> bool {
        if bit >= self.bits {
            return false;
        }
        match &self.pages[(bit / PAGE_BITS) as usize].content {
            Content::Clean => false,
            Content::AllSet => true,
            Content::Partial(words) => {
                let at = bit % PAGE_BITS;
                words[(at / 64) as usize] & 1 << (at % 64) != 0
            }
        }
    }

    /// The first run of set bits at or behind bit `from`: its first bit and its length, cut at `max_bits` (at
    /// least 1).
    #[must_use]
    pub fn next_run(&self, from: u64, max_bits: u64) -> Option<(u64, u64)> {
        let first = self.first_from(from)?;
        Some((first, self.run_length(first, max_bits.max(1))))
    }

    /// The bytes that a run of bits stands for: offset and length, cut at the end of the volume.
    #[must_use]
    pub fn byte_range(&self, first: u64, bits: u64) -> (u64, u64) {
        let start = (first << self.grain_shift).min(self.size);
        let end = (first.saturating_add(bits).min(self.bits) << self.grain_shift).min(self.size);
        (start, end.saturating_sub(start))
    }

    // --- exchange with the peer ---

    /// What a page holds, for sending it.
    #[must_use]
    pub fn page(&self, page: u64) -> PageContent<'_> {
        match &self.pages[page as usize].content {
            Content::Clean => PageContent::Clean,
            Content::AllSet => PageContent::AllSet,
            Content::Partial(words) => PageContent::Partial(words),
        }
    }

    /// The first page at or behind `from` that has a set bit.
    #[must_use]
    pub fn next_page_with_bits(&self, from: u64) -> Option<u64> {
        self.with_bits.next(from as usize).map(|p| p as u64)
    }

    /// The pages that have a set bit, in order.
    pub fn pages_with_bits(&self) -> impl Iterator<Item = u64> + '_ {
        self.with_bits.iter().map(|p| p as u64)
    }

    /// Adds the bits of page `page` of a bitmap of the same volume whose grain may differ; bits past the end of
    /// the volume are ignored. Returns how many were not set before.
    pub fn or_page(&mut self, page: u64, content: PageContent<'_>, grain_shift: u8) -> u64 {
        let first = page.saturating_mul(PAGE_BITS);
        let range = |from: u64, bits: u64| {
            let start = (u128::from(first + from)) << grain_shift;
            let length = u128::from(bits) << grain_shift;
            (
                u64::try_from(start).unwrap_or(u64::MAX),
                u64::try_from(length).unwrap_or(u64::MAX),
            )
        };
        match content {
            PageContent::Clean => 0,
            PageContent::AllSet => {
                let (offset, length) = range(0, PAGE_BITS);
                self.set(offset, length)
            }
            PageContent::Partial(words) => {
                let mut added = 0;
                let mut from = 0;
                while let Some(start) = first_set(words, from) {
                    let end = first_clear(words, start);
                    let (offset, length) = range(start, end - start);
                    added += self.set(offset, length);
                    from = end;
                }
                added
            }
        }
    }

    // --- inside ---

    /// Bits of the blocks that a range touches: first, and first behind.
    fn touched(&self, offset: u64, length: u64) -> (u64, u64) {
        let stop = offset.saturating_add(length).min(self.size);
        if offset >= stop {
            return (0, 0);
        }
        (
            offset >> self.grain_shift,
            stop.div_ceil(1 << self.grain_shift),
        )
    }

    fn page_length(&self, page: usize) -> u64 {
        (self.bits - page as u64 * PAGE_BITS).min(PAGE_BITS)
    }

    fn set_bits(&mut self, first: u64, end: u64) -> u64 {
        spans(first, end)
            .map(|(page, from, to)| self.set_in_page(page, from, to))
            .sum()
    }

    fn set_in_page(&mut self, page: usize, from: u64, to: u64) -> u64 {
        let length = self.page_length(page);
        let old = self.pages[page].count;
        match &mut self.pages[page].content {
            Content::AllSet => return 0,
            Content::Clean if to - from == length => {
                self.make_whole(page, Content::AllSet, length as u32)
            }
            Content::Clean => {
                let mut words = Box::new([0; PAGE_WORDS]);
                fill(&mut words, from, to);
                self.make_partial(page, words, (to - from) as u32);
            }
            Content::Partial(words) => {
                let added = fill(words, from, to);
                if added == 0 {
                    return 0;
                }
                let count = old + added;
                if u64::from(count) == length {
                    self.make_whole(page, Content::AllSet, count);
                } else {
                    self.recount(page, count);
                }
            }
        }
        // A collapse may have taken in a page; this page is never the one (see `make_partial`).
        let added = self.pages[page].count - old;
        self.mark_unsaved(page, marks(from, to));
        u64::from(added)
    }

    fn clear_in_page(&mut self, page: usize, from: u64, to: u64) -> u64 {
        let length = self.page_length(page);
        let to = to.min(length);
        let old = self.pages[page].count;
        match &mut self.pages[page].content {
            Content::Clean => return 0,
            Content::AllSet if to - from == length => self.make_whole(page, Content::Clean, 0),
            Content::AllSet => {
                let mut words = Box::new([0; PAGE_WORDS]);
                fill(&mut words, 0, length);
                let count = old - drain(&mut words, from, to);
                self.make_partial(page, words, count);
                self.shielded[self.shield_next] = page as u32;
                self.shield_next = (self.shield_next + 1) % SHIELDED;
            }
            Content::Partial(words) => {
                let removed = drain(words, from, to);
                if removed == 0 {
                    return 0;
                }
                if removed == old {
                    self.make_whole(page, Content::Clean, 0);
                } else {
                    self.recount(page, old - removed);
                }
            }
        }
        let count = self.pages[page].count;
        if count == 0 {
            // No bit is left that would have to become durable.
            self.pages[page].unsaved = 0;
            self.unsaved_sets.remove(page);
        }
        self.unsaved_clears.insert(page);
        u64::from(old - count)
    }

    /// Turns a page into one that holds no words.
    fn make_whole(&mut self, page: usize, content: Content, count: u32) {
        let old = std::mem::replace(&mut self.pages[page].content, content);
        if let Content::Partial(_) = old {
            self.leave_bucket(page);
            self.partial -= 1;
        }
        self.settle_count(page, count);
    }

    /// Turns a clean or all set page into a partial one. If that is one too many, another page becomes all set:
    /// never this one, and none of the last few that were taken apart by clearing. A resync that goes over an all
    /// set page would otherwise see its cleared bits come back and never end (D8).
    fn make_partial(&mut self, page: usize, words: Box<PageWords>, count: u32) {
        self.pages[page].content = Content::Partial(words);
        self.settle_count(page, count);
        self.enter_bucket(page, count);
        self.partial += 1;
        while self.partial > self.max_partial {
            let victim = self
                .buckets
                .iter()
                .rev()
                .flatten()
                .map(|p| *p as usize)
                .find(|candidate| {
                    *candidate != page && !self.shielded.contains(&(*candidate as u32))
                });
            // The bound is above the number of shielded pages.
            let Some(victim) = victim else { return };
            let length = self.page_length(victim) as u32;
            self.make_whole(victim, Content::AllSet, length);
            self.collapsed += 1;
            // Blocks that only the collapse made dirty are not on disk; one of them may be set in earnest
            // later and would find its bit set already.
            self.mark_unsaved(victim, u64::MAX);
        }
    }

    fn recount(&mut self, page: usize, count: u32) {
        if self.pages[page].count.ilog2() != count.ilog2() {
            self.leave_bucket(page);
            self.settle_count(page, count);
            self.enter_bucket(page, count);
        } else {
            self.settle_count(page, count);
        }
    }

    fn settle_count(&mut self, page: usize, count: u32) {
        self.count = self.count - u64::from(self.pages[page].count) + u64::from(count);
        self.pages[page].count = count;
        if count == 0 {
            self.with_bits.remove(page);
        } else {
            self.with_bits.insert(page);
        }
    }

    fn enter_bucket(&mut self, page: usize, count: u32) {
        let bucket = &mut self.buckets[count.ilog2() as usize];
        self.pages[page].place = bucket.len() as u32;
        bucket.push(page as u32);
    }

    fn leave_bucket(&mut self, page: usize) {
        let Page { count, place, .. } = self.pages[page];
        let bucket = &mut self.buckets[count.ilog2() as usize];
        bucket.swap_remove(place as usize);
        if let Some(moved) = bucket.get(place as usize) {
            self.pages[*moved as usize].place = place;
        }
    }

    fn first_from(&self, from: u64) -> Option<u64> {
        let mut page = self.with_bits.next((from / PAGE_BITS) as usize)?;
        let mut within = if page as u64 == from / PAGE_BITS {
            from % PAGE_BITS
        } else {
            0
        };
        loop {
            let found = match &self.pages[page].content {
                Content::Clean => None,
                Content::AllSet => (within < self.page_length(page)).then_some(within),
                Content::Partial(words) => first_set(words, within),
            };
            if let Some(bit) = found {
                return Some(page as u64 * PAGE_BITS + bit);
            }
            page = self.with_bits.next(page + 1)?;
            within = 0;
        }
    }

    /// Length of the run of set bits that begins at the set bit `first`, at most `max_bits`.
    fn run_length(&self, first: u64, max_bits: u64) -> u64 {
        let end = first.saturating_add(max_bits).min(self.bits);
        for (page, from, to) in spans(first, end) {
            let run_end = match &self.pages[page].content {
                Content::Clean => from,
                Content::AllSet => to,
                Content::Partial(words) => first_clear(words, from).min(to),
            };
            if run_end < to {
                return page as u64 * PAGE_BITS + run_end - first;
            }
        }
        end - first
    }
}

#[cfg(test)]
mod tests;
