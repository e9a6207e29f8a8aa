//! The dirty bitmap: the blocks of one volume that one peer lacks, in memory, and what of it is durable.
//!
//! Paged like the bitmap on disk. A page is *clean* (nothing held), *all set* (nothing held either) or *partial*
//! (4 KiB held). Partial pages are bounded: over the bound, a page with many bits becomes all set. Saying too
//! much is always safe (D7), it costs a longer resync; saying too little never is.
//!
//! Bits that were set are durable **before** what depends on them goes on (a write that completes without the
//! peer, an extent that cools); bits that were cleared become durable when it suits, because a stale set bit
//! costs a transfer only. `docs/metadata-in-memory.md` has the states and the order of the writes.

use holdfast_wire_format::bitmap_page;
pub use holdfast_wire_format::bitmap_page::PAGE_WORDS;

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

/// What one save of one page has to write, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SaveImage {
    /// The page's words, to be durable before [`DirtyBitmap::page_saved`]; `None` if the summary byte says all.
    pub words: Option<Box<PageWords>>,
    /// What the summary byte says when the save is done.
    pub summary: u8,
}

/// What is left of a save after its page is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AfterPage {
    /// The summary byte on disk was right already.
    Saved,
    /// That summary block is to be written ([`DirtyBitmap::begin_summary`]).
    SummaryDue(u64),
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

    // --- what is durable ---

    /// Whether a bit in this range was set and is not durable yet (D6, D7: what depends on it must wait). May
    /// say yes for a neighbour's bit, a 64th of a page around.
    #[must_use]
    pub fn unsaved_sets_in(&self, offset: u64, length: u64) -> bool {
        let (first, end) = self.touched(offset, length);
        spans(first, end).any(|(page, from, to)| {
            let state = &self.pages[page];
            (state.unsaved | state.saving) & marks(from, to) != 0
        })
    }

    /// Whether any bit that was set is not durable yet.
    #[must_use]
    pub fn has_unsaved_sets(&self) -> bool {
        self.unsaved_sets.len > 0 || self.saves_of_sets > 0
    }

    /// Pages that hold blocks of this range, for saving them.
    #[must_use]
    pub fn pages_of(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let (first, end) = self.touched(offset, length);
        if first >= end {
            0..0
        } else {
            first / PAGE_BITS..end.div_ceil(PAGE_BITS)
        }
    }

    /// The first page at or behind `from` with sets that are neither durable nor being saved.
    #[must_use]
    pub fn next_unsaved_set(&self, from: u64) -> Option<u64> {
        self.unsaved_sets.next(from as usize).map(|p| p as u64)
    }

    /// The first page at or behind `from` that differs from the disk and is not being saved: to be saved when
    /// there is time, and at a clean detach.
    #[must_use]
    pub fn next_unsaved(&self, from: u64) -> Option<u64> {
        let set = self.unsaved_sets.next(from as usize);
        let cleared = self.unsaved_clears.next(from as usize);
        [set, cleared].into_iter().flatten().min().map(|p| p as u64)
    }

    /// Pages that differ from the disk and are not being saved.
    pub fn unsaved_pages(&self) -> impl Iterator<Item = u64> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = self.next_unsaved(from)?;
            from = page + 1;
            Some(page)
        })
    }

    /// Whether memory and disk say the same and nothing is being written.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        self.unsaved_sets.len == 0 && self.unsaved_clears.len == 0 && self.saves == 0
    }

    /// The summary block a page's byte is in.
    #[must_use]
    pub fn summary_block_of(&self, page: u64) -> u64 {
        page / self.summary_pages
    }

    /// Starts saving a page. `None` if it is saved, or if a save of it is under way (what was set since then
    /// needs another one after it).
    ///
    /// With words: write them, then call [`page_saved`](Self::page_saved). Without: the summary block is due
    /// ([`begin_summary`](Self::begin_summary), which takes along every such page of the block by itself).
    pub fn begin_save(&mut self, page: u64) -> Option<SaveImage> {
        let at = page as usize;
        if self.pages[at].save != Save::Idle
            || !(self.unsaved_sets.contains(at) || self.unsaved_clears.contains(at))
        {
            return None;
        }
        self.unsaved_sets.remove(at);
        self.unsaved_clears.remove(at);
        let state = &mut self.pages[at];
        state.saving = std::mem::take(&mut state.unsaved);
        self.saves += 1;
        self.saves_of_sets += usize::from(state.saving != 0);
        match &state.content {
            Content::Partial(words) => {
                // The byte stays what it is until the page is durable: turned to "partial" earlier, a crash
                // would bring back whatever the page held long ago.
                state.save = Save::PageInFlight;
                Some(SaveImage {
                    words: Some(words.clone()),
                    summary: SUMMARY_PARTIAL,
                })
            }
            content => {
                let summary = if matches!(content, Content::Clean) {
                    SUMMARY_CLEAN
                } else {
                    SUMMARY_ALL_SET
                };
                state.summary = summary;
                state.save = Save::SummaryDue;
                Some(SaveImage {
                    words: None,
                    summary,
                })
            }
        }
    }

    /// The words of [`begin_save`](Self::begin_save) are durable.
    pub fn page_saved(&mut self, page: u64) -> AfterPage {
        let block = self.summary_block_of(page);
        let state = &mut self.pages[page as usize];
        assert_eq!(
            state.save,
            Save::PageInFlight,
            "no write of bitmap page {page} was under way"
        );
        if state.summary == SUMMARY_PARTIAL && !state.summary_unsure {
            self.end_save(page as usize);
            AfterPage::Saved
        } else {
            state.summary = SUMMARY_PARTIAL;
            state.save = Save::SummaryDue;
            AfterPage::SummaryDue(block)
        }
    }

    /// Starts writing a summary block: one byte per page of it. Takes along every page of the block whose save
    /// needs no more than its byte. `None` if nothing is due there, or while a write of that block is under way
    /// (ask again when it ends).
    pub fn begin_summary(&mut self, block: u64) -> Option<Vec<u8>> {
        if self.summary_in_flight.contains(block as usize) {
            return None;
        }
        let range = self.summary_range(block);
        for page in range.clone() {
            if !matches!(self.pages[page].content, Content::Partial(_)) {
                let _ = self.begin_save(page as u64);
            }
        }
        let mut due = false;
        for state in &mut self.pages[range.clone()] {
            if state.save == Save::SummaryDue {
                state.save = Save::SummaryInFlight;
                due = true;
            }
        }
        if !due {
            return None;
        }
        self.summary_in_flight.insert(block as usize);
        Some(self.pages[range].iter().map(|p| p.summary).collect())
    }

    /// The summary block is durable: the saves that waited for it are done.
    pub fn summary_saved(&mut self, block: u64) {
        let under_way = self.summary_in_flight.remove(block as usize);
        assert!(under_way, "no write of summary block {block} was under way");
        for page in self.summary_range(block) {
            if self.pages[page].save == Save::SummaryInFlight {
                self.pages[page].summary_unsure = false;
                self.end_save(page);
            }
        }
    }

    /// The write of the page failed: its bits count as not durable again.
    pub fn page_failed(&mut self, page: u64) {
        assert_eq!(
            self.pages[page as usize].save,
            Save::PageInFlight,
            "no write of bitmap page {page} was under way"
        );
        self.save_failed(page as usize);
    }

    /// The write of the summary block failed: what waited for it counts as not durable again.
    pub fn summary_failed(&mut self, block: u64) {
        let under_way = self.summary_in_flight.remove(block as usize);
        assert!(under_way, "no write of summary block {block} was under way");
        for page in self.summary_range(block) {
            if self.pages[page].save == Save::SummaryInFlight {
                self.pages[page].summary_unsure = true;
                self.save_failed(page);
            }
        }
    }

    /// Takes over what the disk says of a page: its summary byte and, for [`SUMMARY_PARTIAL`], its words, `None`
    /// if they were damaged. Returns false if the page had to be taken as all set because of damage.
    ///
    /// To be called before anything else happens to the page. Of a damaged summary block, load every page as
    /// [`SUMMARY_DAMAGED`]. A damaged page counts as not durable until it is saved: a torn block can be made whole
    /// by the next write to it, when that is torn too, and then says what it said before the damage.
    pub fn load(&mut self, page: u64, summary: u8, words: Option<&PageWords>) -> bool {
        let at = page as usize;
        assert!(
            matches!(self.pages[at].content, Content::Clean) && self.pages[at].save == Save::Idle,
            "bitmap page {page} is loaded late"
        );
        let intact = match summary {
            SUMMARY_CLEAN | SUMMARY_ALL_SET => true,
            SUMMARY_PARTIAL => words.is_some(),
            _ => false,
        };
        let first = page * PAGE_BITS;
        match (summary, words) {
            (SUMMARY_CLEAN, _) => {}
            (SUMMARY_PARTIAL, Some(words)) => {
                self.or_page(page, PageContent::Partial(words), self.grain_shift);
            }
            // Damage means "nobody knows", and that means every block (D7).
            _ => {
                self.set_bits(first, (first + PAGE_BITS).min(self.bits));
            }
        }
        let state = &mut self.pages[at];
        state.summary = if summary <= SUMMARY_ALL_SET {
            summary
        } else {
            SUMMARY_ALL_SET
        };
        state.summary_unsure = summary > SUMMARY_ALL_SET;
        // What was read is durable. (A page that had to make room for it is marked by `make_partial`.)
        state.unsaved = 0;
        self.unsaved_sets.remove(at);
        if !intact {
            self.mark_unsaved(at, u64::MAX);
        }
        intact
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

    fn summary_range(&self, block: u64) -> std::ops::Range<usize> {
        let first = block * self.summary_pages;
        first as usize..(first + self.summary_pages).min(self.page_count()) as usize
    }

    fn page_length(&self, page: usize) -> u64 {
        (self.bits - page as u64 * PAGE_BITS).min(PAGE_BITS)
    }

    /// Returns the marks that the save held.
    fn end_save(&mut self, page: usize) -> u64 {
        let state = &mut self.pages[page];
        state.save = Save::Idle;
        let saving = std::mem::take(&mut state.saving);
        self.saves -= 1;
        self.saves_of_sets -= usize::from(saving != 0);
        saving
    }

    fn save_failed(&mut self, page: usize) {
        let marks = self.end_save(page);
        let state = &mut self.pages[page];
        state.unsaved |= marks;
        if state.unsaved != 0 {
            self.unsaved_sets.insert(page);
        } else {
            self.unsaved_clears.insert(page);
        }
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

    fn mark_unsaved(&mut self, page: usize, marks: u64) {
        self.pages[page].unsaved |= marks;
        self.unsaved_sets.insert(page);
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

/// Splits a range of bits at page boundaries: page, and first bit and first bit behind within it.
fn spans(first: u64, end: u64) -> impl Iterator<Item = (usize, u64, u64)> {
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
fn marks(from: u64, to: u64) -> u64 {
    let (low, high) = (from / MARK_BITS, (to - 1) / MARK_BITS);
    u64::MAX >> (63 - (high - low)) << low
}

/// The part of word `at` that lies in the bits `from..to`.
fn mask(at: usize, from: u64, to: u64) -> u64 {
    let start = at as u64 * 64;
    let low = from.saturating_sub(start).min(64);
    let high = to.saturating_sub(start).min(64);
    if low >= high {
        0
    } else {
        u64::MAX >> (64 - (high - low)) << low
    }
}

fn words_of(from: u64, to: u64) -> std::ops::Range<usize> {
    (from / 64) as usize..to.div_ceil(64) as usize
}

/// Sets the bits `from..to`; returns how many were not set.
fn fill(words: &mut PageWords, from: u64, to: u64) -> u32 {
    words_of(from, to)
        .map(|at| {
            let added = mask(at, from, to) & !words[at];
            words[at] |= added;
            added.count_ones()
        })
        .sum()
}

/// Clears the bits `from..to`; returns how many were set.
fn drain(words: &mut PageWords, from: u64, to: u64) -> u32 {
    words_of(from, to)
        .map(|at| {
            let removed = mask(at, from, to) & words[at];
            words[at] &= !removed;
            removed.count_ones()
        })
        .sum()
}

/// The first set bit at or behind `from`.
fn first_set(words: &PageWords, from: u64) -> Option<u64> {
    words_of(from, PAGE_BITS).find_map(|at| {
        let found = words[at] & mask(at, from, PAGE_BITS);
        (found != 0).then(|| at as u64 * 64 + u64::from(found.trailing_zeros()))
    })
}

/// The first clear bit at or behind `from`; the end of the page if there is none.
fn first_clear(words: &PageWords, from: u64) -> u64 {
    words_of(from, PAGE_BITS)
        .find_map(|at| {
            let found = !words[at] & mask(at, from, PAGE_BITS);
            (found != 0).then(|| at as u64 * 64 + u64::from(found.trailing_zeros()))
        })
        .unwrap_or(PAGE_BITS)
}

/// A set of page numbers that is walked in order; a bit per page, so that half a million pages scan in
/// microseconds.
#[derive(Clone, Debug, Default)]
struct PageSet {
    words: Vec<u64>,
    len: usize,
}

impl PageSet {
    fn resize(&mut self, pages: usize) {
        self.words.resize(pages.div_ceil(64), 0);
    }
    fn contains(&self, page: usize) -> bool {
        self.words[page / 64] & 1 << (page % 64) != 0
    }
    fn insert(&mut self, page: usize) -> bool {
        let added = !self.contains(page);
        self.words[page / 64] |= 1 << (page % 64);
        self.len += usize::from(added);
        added
    }
    fn remove(&mut self, page: usize) -> bool {
        let removed = self.contains(page);
        self.words[page / 64] &= !(1 << (page % 64));
        self.len -= usize::from(removed);
        removed
    }
    fn next(&self, from: usize) -> Option<usize> {
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
    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = self.next(from)?;
            from = page + 1;
            Some(page)
        })
    }
}

#[cfg(test)]
mod tests;
