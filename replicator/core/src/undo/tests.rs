use super::*;
use holdfast_wire_format::ids::GenerationId;
use holdfast_wire_format::metadata::CopyState;
use proptest::prelude::*;
use std::collections::BTreeMap;

const SECTOR: u64 = 512;
/// Two volumes of 40 and 10.5 blocks, of different grain.
const VOLUMES: [(u64, u8); 2] = [(40 << 12, 12), ((10 << 13) + 4096 - 512, 13)];
const CAPACITY: u64 = 60 * 4096;

fn head(session: u64) -> UndoHead {
    UndoHead {
        session,
        target_of: GenerationId(77),
        returns_to: (GenerationId(5), 1234),
        returns_state: CopyState::UpToDate,
    }
}

fn active() -> UndoLog {
    let mut log = UndoLog::new(&VOLUMES, CAPACITY);
    assert!(log.begin(head(1)).is_some());
    assert!(log.begun().is_none());
    log
}

fn entry(volume: u16, offset: u64, length: u32) -> UndoEntry {
    UndoEntry {
        volume: VolumeIndex(volume),
        offset,
        length,
        content: OldContent::Saved { crc: 0 },
    }
}

fn save(log: &mut UndoLog, volume: u16, offset: u64, length: u64) -> u64 {
    let ranges = log.claim(VolumeIndex(volume), offset, length);
    let entries = ranges.iter().map(|(o, l)| entry(volume, *o, *l)).collect();
    log.append(entries).expect("there is room").sequence
}

fn finish(log: &mut UndoLog, sequence: u64) {
    log.data_saved(sequence);
    assert_eq!(log.next_header().map(|h| h.sequence), Some(sequence));
    assert!(log.saved(sequence));
}

#[test]
fn d12_nothing_is_overwritten_before_the_head_and_all_earlier_records_are_durable() {
    let v = VolumeIndex(0);
    let mut log = UndoLog::new(&VOLUMES, CAPACITY);
    assert_eq!(log.check(v, 0, 4096), Gate::Open, "no undo is kept");
    assert!(log.begin(head(1)).is_some());
    assert_eq!(log.check(v, 0, 4096), Gate::Wait);
    assert!(!log.is_intact());
    assert!(log.begun().is_none());
    assert_eq!(log.check(v, 0, 4096), Gate::Save);
    let first = save(&mut log, 0, 0, 4096);
    let second = save(&mut log, 0, 8192, 512);
    assert_eq!(log.check(v, 0, 4096), Gate::Wait);
    log.data_saved(second);
    assert_eq!(
        log.next_header(),
        None,
        "the header before it is not durable"
    );
    log.data_saved(first);
    let header = log.next_header().expect("its data is durable");
    assert_eq!((header.sequence, header.offset), (first, 4096));
    assert_eq!(log.next_header(), None, "one header at a time");
    assert_eq!(log.check(v, 0, 4096), Gate::Wait);
    assert!(log.saved(first));
    assert_eq!(
        (log.check(v, 0, 4096), log.check(v, 8192, 512)),
        (Gate::Open, Gate::Wait)
    );
    assert_eq!(log.next_header().map(|h| h.offset), Some(3 * 4096));
    assert!(log.saved(second));
    assert_eq!(log.check(v, 8192, 4096), Gate::Open);
    assert_eq!(log.check(v, 0, 8192), Gate::Save);
    assert_eq!(
        log.undone().collect::<Vec<_>>(),
        [(v, 0, 4096), (v, 8192, 4096)]
    );
}

#[test]
fn claims_are_whole_blocks_taken_once() {
    let mut log = active();
    let v = VolumeIndex(1);
    assert_eq!(log.claim(v, 8192 + 512, 512), [(8192, 8192)]);
    assert_eq!(
        log.claim(v, 0, u64::MAX),
        [(0, 8192), (16384, 7 * 8192 + 8192 + 4096 - 512)]
    );
    assert_eq!(log.claim(v, 0, u64::MAX), []);
    log.unclaim(v, 8192, 8192);
    assert_eq!(log.claim(v, 16383, 2), [(8192, 8192)]);
    assert_eq!(log.claim(v, 99, 0), []);
}

/// A block of the dirty bitmap may be larger than an undo entry.
#[test]
fn d12_a_coarse_grain_is_not_saved_by_half() {
    let mut log = UndoLog::new(&[(64 << 20, 24)], 64 << 20);
    assert!(log.begin(head(1)).is_some());
    assert!(log.begun().is_none());
    let v = VolumeIndex(0);
    let ranges = log.claim(v, 0, 2 << 20);
    assert_eq!(ranges, [(0, 1 << 20), (1 << 20, 1 << 20)]);
    let first = log
        .append(vec![entry(0, 0, 1 << 20)])
        .expect("there is room")
        .sequence;
    finish(&mut log, first);
    assert_eq!(log.check(v, 0, 1 << 20), Gate::Open);
    assert_eq!(log.check(v, 1 << 20, 1 << 20), Gate::Wait);
}

#[test]
fn a_full_log_changes_nothing_and_a_drop_is_durable_before_anything_goes_on() {
    let v = VolumeIndex(0);
    let mut log = UndoLog::new(&VOLUMES, 4096 * 5);
    assert!(log.begin(head(1)).is_some());
    assert!(log.begun().is_none());
    let first = save(&mut log, 0, 0, 8192);
    finish(&mut log, first);
    let ranges = log.claim(v, 8192, 4096);
    let entries: Vec<_> = ranges.iter().map(|(o, l)| entry(0, *o, *l)).collect();
    assert_eq!(
        log.append(entries.clone()),
        Err(AppendError::Full {
            needed: 8192,
            capacity: 4096 * 5
        })
    );
    assert_eq!(
        log.append(Vec::new())
            .map(|_| ())
            .map_err(|e| matches!(e, AppendError::Record(_))),
        Err(true)
    );
    assert_eq!(log.drop_log(), Some([0; 4096]));
    assert_eq!(log.drop_log(), None);
    assert_eq!(
        log.check(v, 8192, 4096),
        Gate::Wait,
        "the old head still promises a rollback"
    );
    assert!(!log.is_intact());
    log.dropped();
    assert_eq!(log.check(v, 8192, 4096), Gate::Open);
    assert!(log.begin(head(2)).is_some());
    assert!(log.begun().is_none());
    assert_eq!(
        log.check(v, 0, 4096),
        Gate::Save,
        "a new session starts with nothing saved"
    );
}

#[test]
fn a_new_session_waits_for_the_writes_of_the_last_one() {
    let mut log = active();
    let first = save(&mut log, 0, 0, 8192);
    assert!(log.drop_log().is_some());
    log.dropped();
    assert!(!log.can_begin());
    log.data_saved(first);
    assert_eq!(log.next_header(), None);
    assert!(log.can_begin());
}

#[test]
fn an_area_too_small_for_a_record_keeps_no_undo() {
    for capacity in [0, 4096, 8192] {
        let mut log = UndoLog::new(&VOLUMES, capacity);
        assert!(log.begin(head(1)).is_none());
        assert_eq!(
            (log.check(VolumeIndex(0), 0, 4096), log.phase()),
            (Gate::Open, Phase::None)
        );
        let log = UndoLog::recover(&VOLUMES, capacity, |_| {
            Err("no read of an area that is not there")
        });
        assert!(capacity == 8192 || log.is_ok());
    }
}

#[test]
#[should_panic(expected = "D12")]
fn d12_a_range_that_was_not_claimed_is_refused() {
    let _ = active().append(vec![entry(0, 0, 4096)]);
}

// --- a disk that forgets what was not reported durable ---

type Sector = [u8; SECTOR as usize];

/// Where a sector is: in a volume or in the undo area.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Place {
    Volume(usize, u64),
    Area(u64),
}

#[derive(Clone, Debug)]
enum Then {
    Begun,
    /// The data of a record is durable, or it has none: its header is next.
    Header(u64),
    Saved(u64),
    /// The overwrite of that number is done.
    Overwritten(u32),
    Swept,
    Dropped,
}

/// A write on its way. When the power goes, each of its sectors may have landed or not.
#[derive(Clone, Debug)]
struct Write {
    sectors: Vec<(Place, Sector)>,
    then: Then,
}

#[derive(Clone, Debug)]
struct Overwrite {
    number: u32,
    volume: usize,
    offset: u64,
    length: u64,
    submitted: bool,
}

/// A resync target with its disk.
struct Target {
    disk: BTreeMap<Place, Sector>,
    log: UndoLog,
    session: u64,
    /// The volumes when the session was begun.
    before: BTreeMap<Place, Sector>,
    /// The caller was told that a rollback is possible, and has not begun to drop the log.
    promised: bool,
    writes: Vec<Write>,
    overwrites: Vec<Overwrite>,
    number: u32,
}

fn block_sectors(offset: u64, block: &[u8; UNDO_BLOCK]) -> Vec<(Place, Sector)> {
    let (chunks, _) = block.as_chunks::<512>();
    chunks
        .iter()
        .enumerate()
        .map(|(at, sector)| (Place::Area(offset / SECTOR + at as u64), *sector))
        .collect()
}

fn recover(disk: &BTreeMap<Place, Sector>) -> UndoLog {
    let read = |offset: u64| {
        let mut block = [0; UNDO_BLOCK];
        for at in 0..8 {
            if let Some(sector) = disk.get(&Place::Area(offset / SECTOR + at)) {
                block[at as usize * 512..][..512].copy_from_slice(sector);
            }
        }
        Ok::<_, ()>(block)
    };
    UndoLog::recover(&VOLUMES, CAPACITY, read).expect("this disk reads")
}

fn restore(disk: &mut BTreeMap<Place, Sector>, step: &Restore, mut lands: impl FnMut() -> bool) {
    for at in 0..u64::from(step.entry.length) / SECTOR {
        let old = step
            .data_offset
            .map_or([0; 512], |d| disk[&Place::Area(d / SECTOR + at)]);
        if lands() {
            disk.insert(
                Place::Volume(step.entry.volume.0.into(), step.entry.offset / SECTOR + at),
                old,
            );
        }
    }
}

fn volumes_of(disk: &BTreeMap<Place, Sector>) -> BTreeMap<Place, Sector> {
    disk.iter()
        .filter(|(place, _)| matches!(place, Place::Volume(..)))
        .map(|(p, s)| (*p, *s))
        .collect()
}

impl Target {
    fn new() -> Self {
        let mut disk = BTreeMap::new();
        for (volume, (size, _)) in VOLUMES.iter().enumerate() {
            for sector in 0..size / SECTOR {
                // Every third block holds zeroes, which the log does not store.
                let zero = sector / 16 % 3 == 0;
                disk.insert(
                    Place::Volume(volume, sector),
                    if zero {
                        [0; 512]
                    } else {
                        [sector as u8 | 1; 512]
                    },
                );
            }
        }
        Target {
            before: volumes_of(&disk),
            disk,
            log: UndoLog::new(&VOLUMES, CAPACITY),
            session: 0,
            promised: false,
            writes: Vec::new(),
            overwrites: Vec::new(),
            number: 0,
        }
    }

    fn begin_if_possible(&mut self) {
        if self.log.can_begin() && self.writes.is_empty() && self.overwrites.is_empty() {
            self.session += 1;
            self.before = volumes_of(&self.disk);
            let block = self
                .log
                .begin(head(self.session))
                .expect("the area is large enough");
            self.writes.push(Write {
                sectors: block_sectors(0, &block),
                then: Then::Begun,
            });
        }
    }

    fn overwrite(&mut self, volume: usize, sector: u64, count: u64) {
        let sectors = VOLUMES[volume].0 / SECTOR;
        let first = sector % sectors;
        let (offset, length) = (first * SECTOR, count.min(sectors - first) * SECTOR);
        self.number += 1;
        self.overwrites.push(Overwrite {
            number: self.number,
            volume,
            offset,
            length,
            submitted: false,
        });
    }

    /// Every overwrite goes as far as it may.
    fn pump(&mut self) {
        for at in 0..self.overwrites.len() {
            let Overwrite {
                number,
                volume,
                offset,
                length,
                submitted,
            } = self.overwrites[at];
            // D4: behind earlier ones on the same bytes.
            let behind = self.overwrites[..at].iter().any(|e| {
                e.volume == volume && e.offset < offset + length && offset < e.offset + e.length
            });
            if submitted || behind {
                continue;
            }
            let index = VolumeIndex(volume as u16);
            match self.log.check(index, offset, length) {
                Gate::Wait => {}
                Gate::Open => {
                    let sectors = (offset / SECTOR..(offset + length) / SECTOR)
                        .map(|s| (Place::Volume(volume, s), [number as u8; 512]))
                        .collect();
                    self.writes.push(Write {
                        sectors,
                        then: Then::Overwritten(number),
                    });
                    self.overwrites[at].submitted = true;
                }
                Gate::Save => {
                    let ranges = self.log.claim(index, offset, length);
                    let entries: Vec<UndoEntry> = ranges
                        .iter()
                        .map(|(o, l)| self.old_content(volume, *o, *l))
                        .collect();
                    match self.log.append(entries.clone()) {
                        Ok(write) => self.save(write, &entries),
                        Err(AppendError::Full { .. }) => {
                            for (offset, length) in ranges {
                                self.log.unclaim(index, offset, length.into());
                            }
                            self.drop_log();
                        }
                        Err(AppendError::Record(error)) => panic!("{error}"),
                    }
                }
            }
        }
    }

    fn old_content(&self, volume: usize, offset: u64, length: u32) -> UndoEntry {
        let mut sectors = offset / SECTOR..(offset + u64::from(length)) / SECTOR;
        let zero = sectors.all(|s| self.disk[&Place::Volume(volume, s)] == [0; 512]);
        let content = if zero {
            OldContent::Zero
        } else {
            OldContent::Saved { crc: 0 }
        };
        UndoEntry {
            volume: VolumeIndex(volume as u16),
            offset,
            length,
            content,
        }
    }

    fn save(&mut self, write: UndoWrite, entries: &[UndoEntry]) {
        let mut sectors = Vec::new();
        for (entry, to) in entries.iter().zip(&write.data) {
            let Some(to) = to else { continue };
            for at in 0..u64::from(entry.length) / SECTOR {
                let from = Place::Volume(entry.volume.0.into(), entry.offset / SECTOR + at);
                sectors.push((Place::Area(to / SECTOR + at), self.disk[&from]));
            }
        }
        self.writes.push(Write {
            sectors,
            then: Then::Header(write.sequence),
        });
    }

    fn header(&mut self) {
        if let Some(header) = self.log.next_header() {
            let sectors = block_sectors(header.offset, &header.bytes);
            self.writes.push(Write {
                sectors,
                then: Then::Saved(header.sequence),
            });
        }
    }

    fn drop_log(&mut self) {
        if let Some(block) = self.log.drop_log() {
            self.writes.push(Write {
                sectors: block_sectors(0, &block),
                then: Then::Dropped,
            });
        }
        self.promised = false;
    }

    fn finish(&mut self, pick: usize) {
        if self.writes.is_empty() {
            return;
        }
        let write = self.writes.remove(pick % self.writes.len());
        self.disk.extend(write.sectors);
        match write.then {
            Then::Begun => {
                let erase = self.log.begun();
                self.promised = erase.is_none();
                if let Some(block) = erase {
                    let sectors = block_sectors(0, &block);
                    self.writes.push(Write {
                        sectors,
                        then: Then::Dropped,
                    });
                }
            }
            Then::Header(sequence) => {
                self.log.data_saved(sequence);
                self.header();
            }
            Then::Saved(sequence) => {
                self.log.saved(sequence);
                self.header();
            }
            Then::Overwritten(number) => self.overwrites.retain(|o| o.number != number),
            Then::Swept => {
                if let Some(block) = self.log.swept() {
                    let sectors = block_sectors(0, &block);
                    self.writes.push(Write {
                        sectors,
                        then: Then::Dropped,
                    });
                }
            }
            Then::Dropped => self.log.dropped(),
        }
    }

    /// The power goes: of what is on its way, some sectors land.
    fn crash(&mut self, mut lands: impl FnMut() -> bool) {
        for write in self.writes.drain(..) {
            self.disk
                .extend(write.sectors.into_iter().filter(|_| lands()));
        }
        self.overwrites.clear();
        self.log = recover(&self.disk);
        if let Some(sweep) = self.log.sweep() {
            let sectors = block_sectors(sweep, &[0; UNDO_BLOCK]);
            self.writes.push(Write {
                sectors,
                then: Then::Swept,
            });
        }
    }

    /// After a crash: what was promised is kept.
    fn check_promise(
        &self,
        mut lands: impl FnMut() -> bool,
        stop_at: usize,
    ) -> Result<(), TestCaseError> {
        prop_assert!(
            self.log.is_intact() || !self.promised,
            "a promised rollback is gone"
        );
        if !self.log.is_intact() {
            return Ok(());
        }
        prop_assert_eq!(self.log.head().map(|h| h.session), Some(self.session));
        let mut disk = self.disk.clone();
        let undone: Vec<_> = self.log.undone().collect();
        for (place, old) in &self.before {
            let Place::Volume(volume, sector) = *place else {
                continue;
            };
            if disk[place] != *old {
                let at = sector * SECTOR;
                let covered = undone
                    .iter()
                    .any(|(v, o, l)| usize::from(v.0) == volume && (*o..o + l).contains(&at));
                prop_assert!(
                    covered,
                    "D12: {:?} differs and would get no dirty bit",
                    place
                );
            }
        }
        // A rollback that is cut off, then done again by the next process.
        let plan: Vec<Restore> = self.log.rollback_plan().collect();
        for step in plan.iter().take(stop_at % (plan.len() + 1)) {
            restore(&mut disk, step, || true);
        }
        if let Some(step) = plan.get(stop_at % (plan.len() + 1)) {
            restore(&mut disk, step, &mut lands);
        }
        for step in recover(&disk).rollback_plan() {
            restore(&mut disk, &step, || true);
        }
        let wrong = self
            .before
            .iter()
            .find(|(place, old)| disk[place] != **old)
            .map(|(place, _)| *place);
        prop_assert_eq!(
            wrong,
            None,
            "D12: the rollback does not lead to the old point"
        );
        Ok(())
    }
}

/// A torn header and a later one that is torn too could together be the first one, whole, whose data has been
/// written over by then.
#[test]
fn d12_a_torn_header_is_erased_before_the_log_goes_on() {
    let v = VolumeIndex(0);
    let mut disk: BTreeMap<Place, Sector> = block_sectors(0, &encode_head(&head(1)))
        .into_iter()
        .collect();
    let clean = recover(&disk);
    assert_eq!(
        (clean.phase(), clean.sweep()),
        (Phase::Active, None),
        "nothing was ever written behind the head"
    );
    let mut log = active();
    let first = save(&mut log, 0, 0, 4096);
    log.data_saved(first);
    let header = log.next_header().expect("its data is durable");
    // Its first sector landed; what it says is zero further on is not.
    disk.insert(Place::Area(8), block_sectors(0, &header.bytes)[0].1);
    disk.insert(Place::Area(9), [0xee; 512]);
    let mut log = recover(&disk);
    assert_eq!((log.phase(), log.sweep()), (Phase::Sweeping, Some(4096)));
    assert!(log.is_intact(), "a rollback needs no more");
    assert_eq!(log.check(v, 0, 4096), Gate::Wait);
    assert!(log.claim(v, 0, 4096).is_empty());
    assert_eq!(log.drop_log(), None);
    assert_eq!(log.swept(), Some([0; 4096]), "the drop had to wait");
    log.dropped();
    assert_eq!(log.check(v, 0, 4096), Gate::Open);
}

/// A record that was durable and can't be read any more, with later ones behind it, is damage: what it saved was
/// overwritten since, and a rollback without it would lead to a mixture. The last one alone looks like one that was
/// being written.
#[test]
fn d12_a_hole_in_the_log_is_no_end_of_it() {
    let mut log = active();
    let mut disk: BTreeMap<Place, Sector> = block_sectors(0, &encode_head(&head(1)))
        .into_iter()
        .collect();
    let mut headers = Vec::new();
    for block in 0..3 {
        let sequence = save(&mut log, 0, block * 4096, 4096);
        log.data_saved(sequence);
        let header = log.next_header().expect("its data is durable");
        disk.extend(block_sectors(header.offset, &header.bytes));
        headers.push(header);
        assert!(log.saved(sequence));
    }
    let whole = recover(&disk);
    assert!(whole.is_intact() && whole.damaged_at().is_none());
    assert_eq!(whole.undone().count(), 1, "one run of three blocks");
    let zeroes = [0; UNDO_BLOCK];
    let of = |at: usize| headers[at].bytes;
    for (place, found) in [
        (0, zeroes),
        (1, zeroes),
        // Misdirected: a record of the same log in the place of another one.
        (1, of(0)),
        (0, of(2)),
    ] {
        let mut disk = disk.clone();
        disk.extend(block_sectors(headers[place].offset, &found));
        let log = recover(&disk);
        assert_eq!(log.damaged_at(), Some(headers[place].offset));
        assert!(!log.is_intact() && log.rollback_plan().next().is_none());
        assert_eq!(log.phase(), Phase::None);
    }
    for sector in 0..8 {
        let mut disk = disk.clone();
        disk.insert(
            Place::Area(headers[1].offset / SECTOR + sector),
            [0xee; 512],
        );
        assert!(!recover(&disk).is_intact(), "sector {sector} is damaged");
    }
    disk.extend(block_sectors(headers[2].offset, &zeroes));
    assert!(recover(&disk).is_intact(), "as if it had been on its way");
}

/// What is behind the old end of a volume that grew is saved like any other block; the part of a block that the old end
/// cut is not taken for saved.
#[test]
fn d12_a_volume_that_grew_is_saved_to_its_new_end() {
    let v = VolumeIndex(1);
    let old = VOLUMES[1].0;
    let mut log = active();
    let first = save(&mut log, 1, 0, 8192);
    finish(&mut log, first);
    log.grow(v, old + (64 << 10));
    assert_eq!(log.check(v, 0, 8192), Gate::Open, "what was saved stays so");
    assert_eq!(log.check(v, old - 512, 8192), Gate::Save);
    let ranges = log.claim(v, old - 512, 8192);
    let end: u64 = ranges
        .iter()
        .map(|(o, l)| o + u64::from(*l))
        .max()
        .unwrap_or(0);
    assert!(
        end >= old - 512 + 8192,
        "the grown part is claimed: {ranges:?}"
    );
    let entries = ranges.iter().map(|(o, l)| entry(1, *o, *l)).collect();
    let second = log.append(entries).expect("there is room").sequence;
    finish(&mut log, second);
    assert_eq!(log.check(v, old - 512, 8192), Gate::Open);
    assert_eq!(log.check(v, old + 16384, 512), Gate::Save);
    let undone: u64 = log.undone().map(|(_, _, length)| length).sum();
    assert_eq!(undone, 8192 + 16384);
}

#[derive(Clone, Debug)]
enum Step {
    Overwrite {
        volume: usize,
        sector: u64,
        count: u64,
    },
    Finish(usize),
    Crash,
    Drop,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..2, any::<u64>(), 1u64..40).prop_map(|(volume, sector, count)| Step::Overwrite { volume, sector, count }),
        10 => any::<usize>().prop_map(Step::Finish),
        1 => Just(Step::Crash),
        1 => Just(Step::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any interleaving of saving, overwriting, dropping, crashing, going on and rolling back: the rollback leads
    /// exactly to the content at the start of the session.
    #[test]
    fn d12_rollback_restores_the_old_point(
        steps in prop::collection::vec(step(), 1..120),
        coins in prop::collection::vec(any::<bool>(), 997),
        stop_at in any::<usize>(),
    ) {
        let mut target = Target::new();
        let mut coins = coins.iter().copied().cycle();
        let mut lands = move || coins.next().unwrap_or(false);
        for step in steps {
            match step {
                Step::Overwrite { volume, sector, count } => target.overwrite(volume, sector, count),
                Step::Finish(pick) => target.finish(pick),
                Step::Drop => target.drop_log(),
                Step::Crash => {
                    target.crash(&mut lands);
                    target.check_promise(&mut lands, stop_at)?;
                    target.promised = target.log.is_intact();
                }
            }
            target.begin_if_possible();
            target.pump();
        }
        target.crash(&mut lands);
        target.check_promise(&mut lands, stop_at)?;
    }
}
