//! What of a bitmap is durable: which pages differ from the disk, a save of a page from its words to its summary byte,
//! and what the disk said at a start. `docs/metadata-in-memory.md` has the states and the order of the writes.

use super::*;

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

impl DirtyBitmap {
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

    fn summary_range(&self, block: u64) -> std::ops::Range<usize> {
        let first = block * self.summary_pages;
        first as usize..(first + self.summary_pages).min(self.page_count()) as usize
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

    pub(super) fn mark_unsaved(&mut self, page: usize, marks: u64) {
        self.pages[page].unsaved |= marks;
        self.unsaved_sets.insert(page);
    }
}
