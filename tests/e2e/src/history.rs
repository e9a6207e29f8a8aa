//! What a volume may hold, sector by sector, after everything that was written to it, whatever crashed meanwhile.
//!
//! Each sector written names its write and its place and carries a checksum. The history remembers when each write was
//! begun, acknowledged and covered by an acknowledged flush, on one logical clock. From that follows what a sector may
//! hold ([`Loss`]): a write is *superseded* by one that began after it was acknowledged. NBD promises no order between
//! writes in flight together, so either of them may be the last.
//!
//! A sector is the unit because a disk tears requests between sectors, and no smaller one: a sector that is not one whole
//! write is damage in any case.

use crate::random::Random;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The grain of a history, in bytes. Volumes under test have sectors of this size or a multiple of it.
pub const SECTOR: usize = 512;
const MAGIC: u32 = 0x4846_4848;
const HEAD: usize = 32;

/// Which writes the events since the last check may have taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// None that was acknowledged: processes were killed, machines went on.
    Nothing,
    /// Those that no flush and no FUA covered: the power of the surviving copies was cut.
    Unflushed,
}

/// The number of one write; 0 is "never written".
pub type Sequence = u64;

#[derive(Clone, Copy, Debug)]
struct Entry {
    sequence: Sequence,
    zeroes: bool,
    fua: bool,
    begun: u64,
    acknowledged: Option<u64>,
}

struct Inner {
    run: u32,
    /// Byte offset of the region on the volume.
    offset: u64,
    clock: u64,
    sequence: Sequence,
    /// Writes that were acknowledged before this tick are flushed.
    flushed: u64,
    /// Oldest first; the first one is what the sector held when it was last settled.
    sectors: Vec<Vec<Entry>>,
    totals: Totals,
}

/// Counts since the beginning.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Totals {
    pub writes_begun: u64,
    pub writes_acknowledged: u64,
    pub bytes_acknowledged: u64,
    pub flushes_acknowledged: u64,
    pub reads_checked: u64,
}

/// The history of one region of one volume; a cheap handle, used from many threads.
#[derive(Clone)]
pub struct History {
    inner: Arc<Mutex<Inner>>,
}

/// A write under way.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub sequence: Sequence,
    /// First sector of the region, and how many.
    pub first: u64,
    pub count: u64,
}

/// One sector that holds what it must not.
#[derive(Clone, Debug)]
pub struct Damage {
    /// Byte offset on the volume.
    pub offset: u64,
    pub found: String,
    pub allowed: String,
}

/// What a check found.
#[derive(Clone, Default, Debug)]
pub struct Check {
    pub sectors: u64,
    /// Sectors that hold a write.
    pub written: u64,
    /// Sectors that hold an older write than the newest acknowledged one, with right.
    pub older: u64,
    pub damaged: u64,
    /// The first few of them.
    pub damage: Vec<Damage>,
}

impl History {
    /// A region of `length` bytes at byte `offset` of a volume, all zeroes now. `run` tells its writes from others'.
    pub fn new(run: u64, offset: u64, length: u64) -> History {
        let start = Entry {
            sequence: 0,
            zeroes: true,
            fua: true,
            begun: 0,
            acknowledged: Some(0),
        };
        History {
            inner: Arc::new(Mutex::new(Inner {
                run: run as u32 | 1,
                offset,
                clock: 1,
                sequence: 1,
                flushed: 0,
                sectors: vec![vec![start]; (length / SECTOR as u64) as usize],
                totals: Totals::default(),
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Byte offset of the region.
    pub fn offset(&self) -> u64 {
        self.lock().offset
    }

    /// Sectors of the region.
    pub fn sectors(&self) -> u64 {
        self.lock().sectors.len() as u64
    }

    pub fn totals(&self) -> Totals {
        self.lock().totals
    }

    /// Before a write is sent: which it is, where it goes on the volume, and its bytes.
    pub fn begin_write(&self, first: u64, count: u64, fua: bool) -> (Write, u64, Vec<u8>) {
        let write = self.begin(first, count, false, fua);
        let (run, base) = {
            let inner = self.lock();
            (inner.run, inner.offset)
        };
        let mut data = vec![0; count as usize * SECTOR];
        for (sector, content) in (first..).zip(data.chunks_mut(SECTOR)) {
            fill(content, run, sector, write.sequence);
        }
        (write, base + first * SECTOR as u64, data)
    }

    /// Before zeroes are sent: which write it is, and the byte offset on the volume.
    pub fn begin_zeroes(&self, first: u64, count: u64) -> (Write, u64) {
        let write = self.begin(first, count, true, false);
        (write, self.offset() + first * SECTOR as u64)
    }

    fn begin(&self, first: u64, count: u64, zeroes: bool, fua: bool) -> Write {
        let mut inner = self.lock();
        let sequence = inner.sequence;
        inner.sequence += 1;
        let begun = inner.tick();
        inner.totals.writes_begun += 1;
        for entries in &mut inner.sectors[first as usize..(first + count) as usize] {
            entries.push(Entry {
                sequence,
                zeroes,
                fua,
                begun,
                acknowledged: None,
            });
        }
        Write {
            sequence,
            first,
            count,
        }
    }

    /// The write was answered with success.
    pub fn acknowledge(&self, write: Write) {
        let mut inner = self.lock();
        let now = inner.tick();
        inner.totals.writes_acknowledged += 1;
        inner.totals.bytes_acknowledged += write.count * SECTOR as u64;
        let range = write.first as usize..(write.first + write.count) as usize;
        for entries in &mut inner.sectors[range] {
            // A check between crash and answer may have settled it: what was not found then, nobody may acknowledge any more.
            let entry = entries
                .iter_mut()
                .rfind(|entry| entry.sequence == write.sequence)
                .expect("a write that is answered is under way, or was found when all was settled");
            entry.acknowledged.get_or_insert(now);
        }
    }

    /// Before a flush is sent; to be handed to [`History::flushed`] when it was answered.
    pub fn begin_flush(&self) -> u64 {
        self.lock().tick()
    }

    /// The flush that began then was answered with success: every write acknowledged before it began is durable.
    pub fn flushed(&self, begun: u64) {
        let mut inner = self.lock();
        inner.totals.flushes_acknowledged += 1;
        inner.flushed = inner.flushed.max(begun);
    }

    /// Before a read is sent; to be handed to [`History::check_read`].
    pub fn begin_read(&self) -> u64 {
        self.lock().tick()
    }

    /// What a read from a running primary returned: each sector must hold a write that was not superseded before the read
    /// began, or a later one.
    ///
    /// # Errors
    /// The first sector that does not.
    pub fn check_read(&self, begun: u64, first: u64, data: &[u8]) -> Result<(), Damage> {
        let mut inner = self.lock();
        inner.totals.reads_checked += 1;
        let mut check = Check::default();
        for (sector, content) in (first..).zip(data.chunks(SECTOR)) {
            inner.look(sector, content, &mut check, |_, by| {
                by.acknowledged.is_some_and(|at| at < begun)
            });
            if let Some(damage) = check.damage.pop() {
                return Err(damage);
            }
        }
        Ok(())
    }

    /// Compares the whole region, as `read(byte offset on the volume, length)` gives it, with what it may hold, and settles it:
    /// what was undecided (in flight, or un-flushed before a power cut) is from now on as it was found, and must stay so.
    /// Nothing may be in flight. The caller flushes the volume after it, or what was found may be lost by the next power cut.
    ///
    /// # Errors
    /// That of `read`.
    pub fn settle<E>(
        &self,
        loss: Loss,
        read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    ) -> Result<Check, E> {
        self.compare(loss, true, read)
    }

    /// As [`History::settle`], and changes nothing: for one copy that need not be the one the service goes on with.
    ///
    /// # Errors
    /// That of `read`.
    pub fn check<E>(
        &self,
        loss: Loss,
        read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    ) -> Result<Check, E> {
        self.compare(loss, false, read)
    }

    fn compare<E>(
        &self,
        loss: Loss,
        settle: bool,
        mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    ) -> Result<Check, E> {
        const PIECE: u64 = 2048;
        let mut inner = self.lock();
        let mut check = Check::default();
        let (base, total) = (inner.offset, inner.sectors.len() as u64);
        for from in (0..total).step_by(PIECE as usize) {
            let count = PIECE.min(total - from);
            let data = read(base + from * SECTOR as u64, count as usize * SECTOR)?;
            for (sector, content) in (from..).zip(data.chunks(SECTOR)) {
                let flushed = inner.flushed;
                let found = inner.look(sector, content, &mut check, |_, by| match loss {
                    Loss::Nothing => by.acknowledged.is_some(),
                    Loss::Unflushed => by.acknowledged.is_some_and(|at| at < flushed || by.fua),
                });
                let now = inner.clock;
                let entries = &mut inner.sectors[sector as usize];
                if let (true, Some(found)) = (settle, found) {
                    entries.clear();
                    entries.push(Entry {
                        begun: now,
                        acknowledged: Some(now),
                        fua: false,
                        ..found
                    });
                }
            }
        }
        inner.tick();
        Ok(check)
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Judges one sector: `counts(entry, by)` says whether `by` is a write that must not be lost.
    fn look(
        &self,
        sector: u64,
        content: &[u8],
        check: &mut Check,
        counts: impl Fn(&Entry, &Entry) -> bool,
    ) -> Option<Entry> {
        let entries = &self.sectors[sector as usize];
        let superseded = |entry: &Entry| {
            entries
                .iter()
                .any(|by| counts(entry, by) && entry.acknowledged.is_some_and(|at| at < by.begun))
        };
        check.sectors += 1;
        let found = identify(content, self.run, sector);
        // The newest of several writes of zeroes: which it is cannot be seen, and if one of them may be there all is well.
        let entry = entries.iter().rfind(|entry| match found {
            Found::Zeroes => entry.zeroes && !superseded(entry),
            Found::Write(sequence) => entry.sequence == sequence && !entry.zeroes,
            Found::Foreign(_) => false,
        });
        check.written += u64::from(matches!(found, Found::Write(_)));
        match entry {
            Some(entry) if !superseded(entry) => {
                let newer = entries
                    .iter()
                    .any(|by| by.begun > entry.begun && by.acknowledged.is_some());
                check.older += u64::from(newer);
                Some(*entry)
            }
            _ => {
                check.damaged += 1;
                if check.damage.len() < 8 {
                    check.damage.push(Damage {
                        offset: self.offset + sector * SECTOR as u64,
                        found: format!("{found:?}"),
                        allowed: entries
                            .iter()
                            .filter(|entry| !superseded(entry))
                            .map(|entry| {
                                format!(
                                    "{}{} ({}{})",
                                    if entry.zeroes { "zeroes " } else { "" },
                                    entry.sequence,
                                    match entry.acknowledged {
                                        Some(_) => "acknowledged",
                                        None => "in flight",
                                    },
                                    match entry.acknowledged {
                                        Some(at) if at < self.flushed || entry.fua => ", flushed",
                                        _ => "",
                                    }
                                )
                            })
                            .collect::<Vec<_>>()
                            .join(", "),
                    });
                }
                None
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Zeroes,
    Write(Sequence),
    /// Not one whole write of this run and place.
    Foreign(String),
}

pub(crate) fn fill(out: &mut [u8], run: u32, sector: u64, sequence: Sequence) {
    let (head, body) = out.split_at_mut(HEAD);
    let mut random = Random::new(sequence.rotate_left(40) ^ sector ^ u64::from(run) << 32);
    for word in body.chunks_exact_mut(8) {
        word.copy_from_slice(&random.word().to_le_bytes());
    }
    head[..4].copy_from_slice(&MAGIC.to_le_bytes());
    head[4..8].copy_from_slice(&run.to_le_bytes());
    head[8..16].copy_from_slice(&sector.to_le_bytes());
    head[16..24].copy_from_slice(&sequence.to_le_bytes());
    head[24..28].fill(0);
    let digest = crc32fast::hash(body) ^ crc32fast::hash(&head[..24]);
    head[28..32].copy_from_slice(&digest.to_le_bytes());
}

pub(crate) fn identify(content: &[u8], run: u32, sector: u64) -> Found {
    if content.iter().all(|byte| *byte == 0) {
        return Found::Zeroes;
    }
    let half = |at: usize| u32::from_le_bytes(content[at..at + 4].try_into().expect("4 bytes"));
    let word = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().expect("8 bytes"));
    if half(0) != MAGIC {
        return Found::Foreign(format!("no header: {:02x?}", &content[..16]));
    }
    if half(4) != run || word(8) != sector {
        return Found::Foreign(format!(
            "write {} of sector {} of run {}",
            word(16),
            word(8),
            half(4)
        ));
    }
    let digest = crc32fast::hash(&content[HEAD..]) ^ crc32fast::hash(&content[..24]);
    if half(28) != digest {
        return Found::Foreign(format!("a torn sector of write {}", word(16)));
    }
    Found::Write(word(16))
}

impl Check {
    /// # Panics
    /// A sector holds what it must not.
    #[track_caller]
    pub fn holds(&self, place: &str) {
        assert!(
            self.damaged == 0,
            "{place}: {} of {} sectors hold what they must not, the first: {:#?}",
            self.damaged,
            self.sectors,
            self.damage
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 8 sectors under history.
    struct Disk {
        history: History,
        bytes: Vec<u8>,
    }

    impl Disk {
        fn new() -> Disk {
            Disk {
                history: History::new(1, 4096, 8 * SECTOR as u64),
                bytes: vec![0; 8 * SECTOR],
            }
        }
        fn put(&mut self, offset: u64, data: &[u8]) {
            let at = offset as usize - 4096;
            self.bytes[at..at + data.len()].copy_from_slice(data);
        }
        fn damaged(&self, loss: Loss) -> u64 {
            self.look(loss, false).damaged
        }
        fn look(&self, loss: Loss, settle: bool) -> Check {
            let read = |offset: u64, length: usize| {
                let at = offset as usize - 4096;
                Ok::<_, ()>(self.bytes[at..at + length].to_vec())
            };
            self.history.compare(loss, settle, read).unwrap()
        }
    }

    #[test]
    fn an_acknowledged_write_must_be_there_and_one_in_flight_may() {
        let mut disk = Disk::new();
        let before = disk.bytes.clone();
        let (write, at, data) = disk.history.begin_write(2, 2, false);
        assert_eq!(disk.damaged(Loss::Nothing), 0);
        disk.put(at, &data[..SECTOR]); // In flight, torn between its sectors.
        assert_eq!(disk.damaged(Loss::Nothing), 0);
        disk.history.acknowledge(write);
        assert_eq!(disk.damaged(Loss::Nothing), 1);
        assert_eq!(disk.damaged(Loss::Unflushed), 0);
        disk.put(at, &data);
        assert_eq!(disk.damaged(Loss::Nothing), 0);
        let flush = disk.history.begin_flush();
        disk.history.flushed(flush);
        assert_eq!(disk.damaged(Loss::Unflushed), 0);
        disk.bytes = before;
        assert_eq!(disk.damaged(Loss::Unflushed), 2);
    }

    #[test]
    fn a_flush_covers_only_what_was_acknowledged_before_it_began() {
        let disk = Disk::new();
        let (early, ..) = disk.history.begin_write(0, 1, false);
        let (late, ..) = disk.history.begin_write(1, 1, false);
        disk.history.acknowledge(early);
        let flush = disk.history.begin_flush();
        disk.history.acknowledge(late);
        disk.history.flushed(flush);
        assert_eq!(disk.damaged(Loss::Unflushed), 1);
        assert_eq!(disk.damaged(Loss::Nothing), 2);
    }

    #[test]
    fn fua_needs_no_flush() {
        let disk = Disk::new();
        let (write, ..) = disk.history.begin_write(0, 1, true);
        disk.history.acknowledge(write);
        assert_eq!(disk.damaged(Loss::Unflushed), 1);
    }

    #[test]
    fn either_of_two_concurrent_writes_may_be_the_last_and_an_older_one_may_not() {
        let mut disk = Disk::new();
        let (old, at, old_data) = disk.history.begin_write(0, 1, false);
        disk.history.acknowledge(old);
        let (one, _, one_data) = disk.history.begin_write(0, 1, false);
        let (two, _, two_data) = disk.history.begin_write(0, 1, false);
        disk.history.acknowledge(two);
        disk.history.acknowledge(one);
        for data in [&one_data, &two_data] {
            disk.put(at, data);
            assert_eq!(disk.damaged(Loss::Nothing), 0);
        }
        disk.put(at, &old_data);
        assert_eq!(disk.damaged(Loss::Nothing), 1);
        assert_eq!(disk.damaged(Loss::Unflushed), 0);
    }

    #[test]
    fn what_was_settled_does_not_change_its_mind() {
        let mut disk = Disk::new();
        let (_, at, data) = disk.history.begin_write(0, 1, false);
        disk.look(Loss::Nothing, true).holds("before it arrived");
        disk.put(at, &data);
        assert_eq!(disk.damaged(Loss::Nothing), 1, "too late");
    }

    #[test]
    fn zeroes_are_a_write() {
        let mut disk = Disk::new();
        let (write, at, data) = disk.history.begin_write(0, 1, false);
        disk.history.acknowledge(write);
        let (zeroes, _) = disk.history.begin_zeroes(0, 1);
        disk.put(at, &data);
        assert_eq!(disk.damaged(Loss::Nothing), 0);
        disk.history.acknowledge(zeroes);
        assert_eq!(disk.damaged(Loss::Nothing), 1);
        disk.put(at, &[0; SECTOR]);
        assert_eq!(disk.damaged(Loss::Nothing), 0);
    }

    #[test]
    fn a_read_may_not_return_what_was_superseded_before_it_began() {
        let disk = Disk::new();
        let early = disk.history.begin_read();
        let (write, _, data) = disk.history.begin_write(3, 1, false);
        disk.history.acknowledge(write);
        let late = disk.history.begin_read();
        let zeroes = [0; SECTOR];
        disk.history.check_read(early, 3, &zeroes).unwrap();
        disk.history.check_read(early, 3, &data).unwrap();
        disk.history.check_read(late, 3, &data).unwrap();
        disk.history.check_read(late, 3, &zeroes).unwrap_err();
    }

    #[test]
    fn a_torn_or_misplaced_sector_is_damage() {
        let mut disk = Disk::new();
        let (_, at, data) = disk.history.begin_write(0, 2, false);
        disk.put(at, &data[..SECTOR / 2]);
        assert_eq!(disk.damaged(Loss::Unflushed), 1);
        disk.put(at, &data[SECTOR..]);
        assert_eq!(disk.damaged(Loss::Unflushed), 1);
    }
}
