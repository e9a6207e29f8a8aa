use super::*;
use holdfast_wire_format::ids::VolumeIndex;
use proptest::prelude::*;

const GRAIN: u8 = 12;
/// Two and a half pages, and a last block that is not whole.
const SIZE: u64 = ((PAGE_BITS * 5 / 2) << GRAIN) - 512;
const PAGE_BYTES: u64 = PAGE_BITS << GRAIN;

fn all_bits(bitmap: &DirtyBitmap) -> Vec<bool> {
    (0..bitmap.bits()).map(|b| bitmap.bit(b)).collect()
}

#[test]
fn set_takes_touched_blocks_and_clear_takes_whole_ones() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    assert_eq!(b.set(4095, 2), 2);
    assert_eq!(b.set(0, 8192), 0);
    assert_eq!(b.clear(1, 8191), 1);
    assert_eq!(b.next_run(0, 99), Some((0, 1)));
    assert_eq!(b.set(SIZE - 1, 1), 1);
    assert_eq!(b.bytes(), 4096 + 4096 - 512);
    assert_eq!(
        b.clear(SIZE - 3584, 3584),
        1,
        "the tail block is whole at the end of the volume"
    );
    assert_eq!(b.set(SIZE, 4096), 0, "past the end");
    assert_eq!(b.set(u64::MAX - 5, u64::MAX), 0);
}

#[test]
fn all_set_ends_at_the_end_of_the_volume() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    b.set_all();
    assert_eq!(b.count(), PAGE_BITS * 5 / 2);
    assert_eq!(b.bytes(), SIZE);
    assert_eq!(b.partial_pages(), 0);
    assert!(b.all_set(0, SIZE));
    assert_eq!(b.next_run(0, u64::MAX), Some((0, b.bits())));
    assert_eq!(b.next_run(b.bits(), 1), None);
    assert_eq!(b.byte_range(0, b.bits()), (0, SIZE));
    assert_eq!(b.clear(PAGE_BYTES, PAGE_BYTES), PAGE_BITS);
    assert_eq!(b.next_run(5, u64::MAX), Some((5, PAGE_BITS - 5)));
    assert_eq!(b.next_run(PAGE_BITS, 7), Some((2 * PAGE_BITS, 7)));
    b.clear_all();
    assert!(b.is_clear() && b.next_run(0, 1).is_none());
}

#[test]
fn growing_leaves_the_new_area_clear() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    let bits = b.bits();
    b.set_all();
    b.grow(SIZE + 100 * PAGE_BYTES);
    assert_eq!(b.count(), bits);
    assert_eq!(b.next_run(0, u64::MAX), Some((0, bits)));
    assert!(!b.any_set(bits << GRAIN, u64::MAX));
    b.grow(SIZE + 100 * PAGE_BYTES);
    assert_eq!(b.set(SIZE + 100 * PAGE_BYTES - 1, 1), 1);
}

#[test]
fn d7_too_many_partial_pages_say_too_much_never_too_little() {
    let pages = 40;
    let mut b = DirtyBitmap::new(pages * PAGE_BYTES, GRAIN, 8);
    b.set(3 * PAGE_BYTES, 1000 << GRAIN);
    for page in 0..pages {
        b.set(page * PAGE_BYTES + 8192, 4096);
        assert!(b.partial_pages() <= 8);
    }
    assert_eq!(b.collapsed_pages(), pages - 8);
    assert!(
        b.all_set(3 * PAGE_BYTES, PAGE_BYTES),
        "the fullest one goes first"
    );
    for page in 0..pages {
        assert!(b.any_set(page * PAGE_BYTES + 8192, 4096));
    }
    assert_eq!(b.count(), 8 + (pages - 8) * PAGE_BITS);
}

/// A block that became dirty by the collapse alone is not on disk; set in earnest, it must not count as durable.
#[test]
fn d6_collapsed_page_is_durable_only_after_a_save() {
    let pages = 9;
    let mut b = DirtyBitmap::new(pages * PAGE_BYTES, GRAIN, 8);
    for page in 0..8 {
        b.set(page * PAGE_BYTES, if page == 0 { 8192 } else { 4096 });
    }
    save_everything(&mut b);
    assert!(!b.has_unsaved_sets());
    b.set(8 * PAGE_BYTES, 4096);
    assert_eq!(b.collapsed_pages(), 1);
    assert_eq!(b.set(9 << GRAIN, 4096), 0);
    assert!(b.unsaved_sets_in(9 << GRAIN, 4096));
    save_everything(&mut b);
    assert!(b.is_saved());
}

/// D8: while client writes keep too many pages partial, a resync over all set pages still ends.
#[test]
fn d8_resync_ends_although_pages_collapse() {
    let pages = 64;
    let mut b = DirtyBitmap::new(pages * PAGE_BYTES, GRAIN, 8);
    b.set_all();
    let mut cleared = 0;
    let mut from = 0;
    let mut round = 0u64;
    let mut transfers = 0;
    while let Some((first, bits)) = b.next_run(from, 2048) {
        let (offset, length) = b.byte_range(first, bits);
        cleared += b.clear(offset, length);
        from = first + bits;
        transfers += bits;
        // A client that dirties what was copied already, behind.
        round += 1;
        let page = round * 7 % (first / PAGE_BITS + 1);
        if page < first / PAGE_BITS {
            b.set(page * PAGE_BYTES + ((round % 1000) << GRAIN), 4096);
        }
        assert!(
            !b.any_set(offset, length),
            "what was copied came back by a collapse"
        );
        assert!(transfers <= pages * PAGE_BITS, "a block was copied twice");
    }
    assert_eq!(cleared, pages * PAGE_BITS);
}

/// After a failed summary write the disk may still say "clean" of a page that memory believes announced.
#[test]
fn d7_a_failed_summary_write_is_made_good_by_the_next_save() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    b.set(0, 4096);
    assert!(b.begin_save(0).is_some());
    assert_eq!(b.page_saved(0), AfterPage::SummaryDue(0));
    assert!(b.begin_summary(0).is_some());
    b.summary_failed(0);
    assert!(b.unsaved_sets_in(0, 4096));
    assert!(b.begin_save(0).is_some());
    assert_eq!(
        b.page_saved(0),
        AfterPage::SummaryDue(0),
        "the page alone is not enough"
    );
}

#[test]
fn an_extent_does_not_wait_for_bits_set_elsewhere_in_its_page() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    b.set(0, 4096);
    let image = b.begin_save(0).expect("there is something to save");
    assert!(image.words.is_some());
    b.set(64 << 20, 4096);
    assert!(b.unsaved_sets_in(0, 4096));
    assert_eq!(b.page_saved(0), AfterPage::SummaryDue(0));
    assert!(b.begin_summary(0).is_some());
    assert!(b.unsaved_sets_in(0, 4096));
    b.summary_saved(0);
    assert!(!b.unsaved_sets_in(0, 1 << 20));
    assert!(b.unsaved_sets_in(64 << 20, 1));
    assert_eq!(b.next_unsaved_set(0), Some(0));
}

#[test]
fn setting_everything_is_saved_by_one_write_per_summary_block() {
    let mut b = DirtyBitmap::new(SIZE * 100, GRAIN, 8);
    b.set_all();
    let image = b.begin_save(17).expect("there is something to save");
    assert_eq!(
        image,
        SaveImage {
            words: None,
            summary: SUMMARY_ALL_SET
        }
    );
    let summary = b.begin_summary(0).expect("a byte is due");
    assert!(summary.iter().all(|s| *s == SUMMARY_ALL_SET));
    assert!(
        b.begin_summary(0).is_none(),
        "one write of a block at a time"
    );
    b.summary_saved(0);
    assert!(b.is_saved());
}

#[test]
fn damage_means_every_block() {
    let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
    let mut words = [0; PAGE_WORDS];
    words[0] = 0b1010;
    assert!(b.load(0, SUMMARY_PARTIAL, Some(&words)));
    assert!(!b.load(1, SUMMARY_PARTIAL, None));
    assert!(!b.load(2, SUMMARY_DAMAGED, None));
    assert_eq!(b.next_run(0, u64::MAX), Some((1, 1)));
    assert_eq!(
        b.next_run(4, u64::MAX),
        Some((PAGE_BITS, b.bits() - PAGE_BITS))
    );
    assert_eq!(b.unsaved_pages().collect::<Vec<_>>(), [1, 2]);
    assert!(b.unsaved_sets_in(PAGE_BYTES, 1) && !b.unsaved_sets_in(0, 1));
}

fn save_everything(b: &mut DirtyBitmap) {
    for page in b.unsaved_pages().collect::<Vec<_>>() {
        if b.begin_save(page)
            .is_some_and(|image| image.words.is_some())
        {
            let _ = b.page_saved(page);
        }
    }
    for block in 0..b.summary_block_of(b.page_count() - 1) + 1 {
        if b.begin_summary(block).is_some() {
            b.summary_saved(block);
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Set(u64, u64),
    Clear(u64, u64),
    SetAll,
    ClearAll,
    /// A peer's page of another grain.
    Or(u64, u8, u64, u64),
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let length = prop_oneof![4 => 0u64..100_000, 2 => 0..2 * PAGE_BYTES, 1 => Just(PAGE_BYTES), 1 => Just(SIZE)];
    let offset = prop_oneof![3 => 0..SIZE + 9999, 2 => (0u64..3).prop_map(|p| p * PAGE_BYTES), 1 => 0u64..3 << 20];
    (offset, length)
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        8 => range().prop_map(|(o, l)| Change::Set(o, l)),
        6 => range().prop_map(|(o, l)| Change::Clear(o, l)),
        1 => Just(Change::SetAll),
        1 => Just(Change::ClearAll),
        2 => (0u64..3, 11u8..15, 0..PAGE_BITS, 0..PAGE_BITS).prop_map(|(p, g, a, b)| Change::Or(p, g, a.min(b), a.max(b))),
    ]
}

/// The same change on plain booleans. Returns how many bits changed.
fn model_change(model: &mut [bool], change: &Change) -> u64 {
    let put = |model: &mut [bool], range: std::ops::Range<u64>, value: bool| {
        let mut changed = 0;
        for bit in range.start.min(range.end)..range.end {
            changed += u64::from(model[bit as usize] != value);
            model[bit as usize] = value;
        }
        changed
    };
    let touched = |offset: u64, length: u64| {
        let end = offset.saturating_add(length).min(SIZE);
        if offset >= end {
            0..0
        } else {
            offset >> GRAIN..end.div_ceil(1 << GRAIN)
        }
    };
    let bits = model.len() as u64;
    match *change {
        Change::Set(offset, length) => put(model, touched(offset, length), true),
        Change::Clear(offset, length) => {
            let end = if offset + length >= SIZE {
                bits
            } else {
                (offset + length) >> GRAIN
            };
            put(model, offset.div_ceil(1 << GRAIN).min(bits)..end, false)
        }
        Change::SetAll => put(model, 0..bits, true),
        Change::ClearAll => put(model, 0..bits, false),
        Change::Or(page, grain, from, to) => (from..to)
            .map(|b| {
                put(
                    model,
                    touched((page * PAGE_BITS + b) << grain, 1 << grain),
                    true,
                )
            })
            .sum(),
    }
}

fn apply(b: &mut DirtyBitmap, change: &Change) -> Option<u64> {
    match *change {
        Change::Set(offset, length) => Some(b.set(offset, length)),
        Change::Clear(offset, length) => Some(b.clear(offset, length)),
        Change::SetAll => {
            b.set_all();
            None
        }
        Change::ClearAll => {
            b.clear_all();
            None
        }
        Change::Or(page, grain, from, to) => {
            let mut words = [0; PAGE_WORDS];
            fill(&mut words, from, to);
            let content = if to - from == PAGE_BITS {
                PageContent::AllSet
            } else {
                PageContent::Partial(&words)
            };
            Some(b.or_page(page, content, grain))
        }
    }
}

const TEST_SUMMARY_PAGES: u64 = 2;
const VOLUME: VolumeIndex = VolumeIndex(0);

/// What a disk holds of one bitmap: its 3 pages, then its 2 summary blocks.
#[derive(Clone)]
struct Disk([[u8; 4096]; 5]);

impl Disk {
    fn new() -> Self {
        let summary = |number| bitmap_page::encode_summary(VOLUME, 0, number, &[]);
        Disk([[0; 4096], [0; 4096], [0; 4096], summary(0), summary(1)])
    }

    fn load(&self) -> DirtyBitmap {
        let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
        b.summary_pages = TEST_SUMMARY_PAGES;
        for page in 0..3 {
            let block = page / TEST_SUMMARY_PAGES;
            let entries =
                bitmap_page::decode_summary(&self.0[3 + block as usize], VOLUME, 0, block);
            let summary =
                entries.map_or(SUMMARY_DAMAGED, |e| e[(page % TEST_SUMMARY_PAGES) as usize]);
            let words = bitmap_page::decode_page(&self.0[page as usize], VOLUME, 0, page).ok();
            b.load(page, summary, words.as_ref());
        }
        b
    }

    /// Each of the 8 sectors lands or not: a bit of `how` each.
    fn land(&mut self, write: &(usize, [u8; 4096]), how: u8) {
        for sector in (0..8).filter(|s| how & 1 << s != 0) {
            let range = sector * 512..sector * 512 + 512;
            self.0[write.0][range.clone()].copy_from_slice(&write.1[range]);
        }
    }
}

fn page_write(b: &mut DirtyBitmap, page: u64) -> Option<(usize, [u8; 4096])> {
    let words = b.begin_save(page)?.words?;
    Some((
        page as usize,
        bitmap_page::encode_page(VOLUME, 0, page, &words),
    ))
}

fn summary_write(b: &mut DirtyBitmap, block: u64) -> Option<(usize, [u8; 4096])> {
    let entries = b.begin_summary(block)?;
    Some((
        3 + block as usize,
        bitmap_page::encode_summary(VOLUME, 0, block, &entries),
    ))
}

fn write_ended(b: &mut DirtyBitmap, block: usize, ok: bool) {
    match (block.checked_sub(3), ok) {
        (None, true) => {
            let _ = b.page_saved(block as u64);
        }
        (None, false) => b.page_failed(block as u64),
        (Some(summary), true) => b.summary_saved(summary as u64),
        (Some(summary), false) => b.summary_failed(summary as u64),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Change(Change),
    Begin(u64),
    BeginSummary(u64),
    /// A write ends; one that fails leaves some sectors.
    End(usize, bool, u8),
    /// The machine goes down and starts again; of each write some sectors have landed.
    Crash,
}

fn mask() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0u8), Just(255), any::<u8>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => change().prop_map(Step::Change),
        5 => (0u64..3).prop_map(Step::Begin),
        4 => (0u64..2).prop_map(Step::BeginSummary),
        8 => (any::<usize>(), prop::bool::weighted(0.9), mask()).prop_map(|(a, b, c)| Step::End(a, b, c)),
        1 => Just(Step::Crash),
    ]
}

fn check_recovery(b: &DirtyBitmap, recovered: &DirtyBitmap) -> Result<(), TestCaseError> {
    for bit in 0..b.bits() {
        if b.bit(bit) && !b.unsaved_sets_in(bit << GRAIN, 1) {
            prop_assert!(
                recovered.bit(bit),
                "bit {} was reported durable and is gone",
                bit
            );
        }
    }
    Ok(())
}

/// A page that was torn twice: the second write completes what the first one wrote.
#[test]
fn d7_a_torn_page_completed_by_its_successor_loses_nothing() {
    let mut disk = Disk::new();
    let mut b = disk.load();
    // On disk and announced, so that the next writes go in place.
    b.set(0, 4096);
    disk.land(
        &page_write(&mut b, 0).expect("there is something to save"),
        255,
    );
    write_ended(&mut b, 0, true);
    disk.land(&summary_write(&mut b, 0).expect("a byte is due"), 255);
    write_ended(&mut b, 3, true);
    b.set(PAGE_BYTES - 4096, 4096);
    disk.land(
        &page_write(&mut b, 0).expect("there is something to save"),
        0b0000_0001,
    );
    let mut b = disk.load();
    assert!(b.all_set(0, PAGE_BYTES), "a torn page says everything");
    // Another block is dirtied; a resync clears all but that one, the first and the last.
    b.set(78 << GRAIN, 4096);
    b.clear(4096, 77 << GRAIN);
    b.clear(79 << GRAIN, PAGE_BYTES - (80 << GRAIN));
    assert_eq!(b.count(), 3);
    disk.land(
        &page_write(&mut b, 0).expect("there is something to save"),
        0b1000_0000,
    );
    check_recovery(&b, &disk.load()).expect("nothing is lost");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn behaves_like_plain_booleans(changes in prop::collection::vec(change(), 1..24), probe in prop::collection::vec(range(), 8)) {
        let mut b = DirtyBitmap::new(SIZE, GRAIN, 8);
        let mut model = vec![false; b.bits() as usize];
        for change in &changes {
            let changed = model_change(&mut model, change);
            if let Some(said) = apply(&mut b, change) {
                prop_assert_eq!(said, changed, "{:?}", change);
            }
            prop_assert_eq!(b.count(), model.iter().filter(|s| **s).count() as u64);
        }
        prop_assert_eq!(&all_bits(&b), &model);
        let dirty_bytes: u64 = (0..b.bits()).filter(|at| model[*at as usize]).map(|at| b.byte_range(at, 1).1).sum();
        prop_assert_eq!(b.bytes(), dirty_bytes);
        let mut runs = vec![false; model.len()];
        let mut from = 0;
        while let Some((first, bits)) = b.next_run(from, 40_000) {
            prop_assert!(bits > 0 && bits <= 40_000);
            for at in first..first + bits {
                runs[at as usize] = true;
            }
            from = first + bits;
        }
        prop_assert_eq!(&runs, &model);
        for (offset, length) in probe {
            let end = (offset + length).min(SIZE);
            let touched = if offset >= end { 0..0 } else { (offset >> GRAIN) as usize..end.div_ceil(1 << GRAIN) as usize };
            prop_assert_eq!(b.any_set(offset, length), model[touched.clone()].iter().any(|s| *s));
            prop_assert_eq!(b.all_set(offset, length), model[touched].iter().all(|s| *s));
        }
        for page in 0..3 {
            let any = model[(page * PAGE_BITS) as usize..((page + 1) * PAGE_BITS).min(b.bits()) as usize].contains(&true);
            prop_assert_eq!(b.pages_with_bits().any(|p| p == page), any);
        }
    }

    /// D6, D7: whatever the order of changes and saves, whatever crashes do to the writes in flight and whatever
    /// failed writes leave behind, a set bit that was reported durable is there after recovery.
    #[test]
    fn d7_crash_loses_no_bit_reported_durable(
        steps in prop::collection::vec(step(), 1..60),
        landed in prop::collection::vec(mask(), 61),
    ) {
        let mut disk = Disk::new();
        let mut b = disk.load();
        let mut writes: Vec<(usize, [u8; 4096])> = Vec::new();
        let mut landed = landed.into_iter().cycle();
        for step in steps.into_iter().chain([Step::Crash]) {
            match step {
                Step::Change(change) => {
                    apply(&mut b, &change);
                }
                Step::Begin(page) => writes.extend(page_write(&mut b, page)),
                Step::BeginSummary(block) => writes.extend(summary_write(&mut b, block)),
                Step::End(pick, ok, how) if !writes.is_empty() => {
                    let write = writes.remove(pick % writes.len());
                    disk.land(&write, if ok { 255 } else { how });
                    write_ended(&mut b, write.0, ok);
                }
                Step::End(..) => {}
                Step::Crash => {
                    for write in writes.drain(..) {
                        disk.land(&write, landed.next().unwrap_or(0));
                    }
                    let recovered = disk.load();
                    check_recovery(&b, &recovered)?;
                    b = recovered;
                }
            }
        }
        // When everything is saved, the disk says exactly what memory says.
        for _ in 0..2 {
            for page in 0..3 {
                if let Some(write) = page_write(&mut b, page) {
                    disk.land(&write, 255);
                    write_ended(&mut b, write.0, true);
                }
            }
            for block in 0..2 {
                if let Some(write) = summary_write(&mut b, block) {
                    disk.land(&write, 255);
                    write_ended(&mut b, write.0, true);
                }
            }
        }
        prop_assert!(b.is_saved() && !b.has_unsaved_sets());
        prop_assert_eq!(all_bits(&disk.load()), all_bits(&b));
    }
}
