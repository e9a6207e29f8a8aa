//! An application that depends on order across the volumes of a service, as a database does on that of its log and its
//! data: a write is sent only after the one before it, on another volume, was acknowledged.
//!
//! Whatever a copy holds after a crash must be a beginning of one common order (D3): if a write is there, so is every write
//! that was acknowledged before it was begun, on whichever volume and by whichever thread. This says nothing about how
//! much is lost; [`Order::settle`] tells, and with [`Loss::Nothing`] no acknowledged write may be.

use crate::history::{Found, Loss, SECTOR, fill, identify};
use crate::nbd::{Nbd, NbdError};
use crate::random::Random;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest write, in sectors.
const LONGEST: u64 = 16;

#[derive(Clone, Copy, Debug)]
struct Entry {
    volume: usize,
    first: u64,
    count: u64,
    begun: u64,
    acknowledged: Option<u64>,
}

struct Inner {
    run: u32,
    clock: u64,
    /// Sequence number of the first of `entries`.
    base: u64,
    /// Everything since the last settling. Writes to one sector never overlap in time.
    entries: Vec<Entry>,
    /// By volume and sector: the write it held when last settled; 0 is "never written".
    settled: Vec<Vec<u64>>,
    acknowledged: u64,
}

/// What was written to the volumes, in which order; a cheap handle, used from many threads.
#[derive(Clone)]
pub struct Order {
    inner: Arc<Mutex<Inner>>,
}

/// What a copy was found to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kept {
    /// Writes since the last settling that are there, or were overwritten by one that is.
    pub writes: u64,
    /// Acknowledged ones that are not.
    pub lost: u64,
}

impl Order {
    /// Volumes of so many bytes each, all zeroes now.
    pub fn new(run: u64, volumes: &[u64]) -> Order {
        Order {
            inner: Arc::new(Mutex::new(Inner {
                run: run as u32 | 1,
                clock: 1,
                base: 1,
                entries: Vec::new(),
                settled: volumes
                    .iter()
                    .map(|bytes| vec![0; (bytes / SECTOR as u64) as usize])
                    .collect(),
                acknowledged: 0,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes acknowledged since the beginning.
    pub fn acknowledged(&self) -> u64 {
        self.lock().acknowledged
    }

    fn begin(&self, volume: usize, first: u64, count: u64) -> (u64, Vec<u8>) {
        let mut inner = self.lock();
        inner.clock += 1;
        let entry = Entry {
            volume,
            first,
            count,
            begun: inner.clock,
            acknowledged: None,
        };
        let sequence = inner.base + inner.entries.len() as u64;
        inner.entries.push(entry);
        let run = inner.run;
        drop(inner);
        let mut data = vec![0; count as usize * SECTOR];
        for (sector, content) in (first..).zip(data.chunks_mut(SECTOR)) {
            fill(content, run, label(volume, sector), sequence);
        }
        (sequence, data)
    }

    fn acknowledge(&self, sequence: u64) {
        let mut inner = self.lock();
        inner.clock += 1;
        inner.acknowledged += 1;
        let (now, at) = (inner.clock, (sequence - inner.base) as usize);
        inner.entries[at].acknowledged = Some(now);
    }

    /// Compares the volumes, as `read(volume, byte offset, length)` gives them, with the order, and goes on from what they
    /// hold. Nothing may be in flight.
    ///
    /// # Panics
    /// They hold no beginning of the order, or with [`Loss::Nothing`] not every acknowledged write.
    #[track_caller]
    pub fn settle(
        &self,
        loss: Loss,
        what: &str,
        mut read: impl FnMut(usize, u64, usize) -> Vec<u8>,
    ) -> Kept {
        const PIECE: u64 = 2048;
        let mut inner = self.lock();
        let (run, base) = (inner.run, inner.base);
        let mut found: Vec<Vec<u64>> = Vec::new();
        for (volume, before) in inner.settled.iter().enumerate() {
            let mut held = Vec::with_capacity(before.len());
            for from in (0..before.len() as u64).step_by(PIECE as usize) {
                let count = PIECE.min(before.len() as u64 - from);
                let data = read(volume, from * SECTOR as u64, count as usize * SECTOR);
                for (sector, content) in (from..).zip(data.chunks(SECTOR)) {
                    held.push(match identify(content, run, label(volume, sector)) {
                        Found::Zeroes => 0,
                        Found::Write(sequence) => sequence,
                        Found::Foreign(why) => {
                            panic!("{what}: sector {sector} of volume {volume} holds {why}")
                        }
                    });
                }
            }
            found.push(held);
        }
        // The last write begun of which anything is there.
        let mut newest: Option<(u64, u64)> = None;
        for (volume, held) in found.iter().enumerate() {
            for (sector, sequence) in held.iter().enumerate() {
                if *sequence < base {
                    let before = inner.settled[volume][sector];
                    assert_eq!(
                        *sequence, before,
                        "{what}: sector {sector} of volume {volume} went back behind what was there before"
                    );
                    continue;
                }
                let entry = inner
                    .entries
                    .get((*sequence - base) as usize)
                    .unwrap_or_else(|| panic!("{what}: write {sequence} was never begun"));
                assert!(
                    entry.volume == volume
                        && (entry.first..entry.first + entry.count).contains(&(sector as u64)),
                    "{what}: write {sequence} is not one of sector {sector} of volume {volume}"
                );
                newest = newest.max(Some((entry.begun, *sequence)));
            }
        }
        let mut kept = Kept { writes: 0, lost: 0 };
        for (sequence, entry) in (base..).zip(&inner.entries) {
            let sectors = entry.first as usize..(entry.first + entry.count) as usize;
            // A sector's writes follow one another, so a later one there has taken the place of this one.
            let whole = found[entry.volume][sectors]
                .iter()
                .all(|held| *held >= sequence);
            if whole {
                kept.writes += 1;
                continue;
            }
            let Some(acknowledged) = entry.acknowledged else {
                continue;
            };
            kept.lost += 1;
            if let Some((begun, later)) = newest {
                assert!(
                    acknowledged > begun,
                    "{what}: write {later} is there, but not write {sequence} of volume {}, acknowledged before it was begun",
                    entry.volume
                );
            }
            assert!(
                loss != Loss::Nothing,
                "{what}: write {sequence} of volume {}, acknowledged, is lost",
                entry.volume
            );
        }
        inner.settled = found;
        inner.base += inner.entries.len() as u64;
        inner.entries.clear();
        kept
    }
}

/// A sector's place across all volumes.
fn label(volume: usize, sector: u64) -> u64 {
    (volume as u64) << 48 | sector
}

/// Threads that write in order, each to the volumes in turn, one write at a time.
pub struct Chains {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Result<(), NbdError>>>,
    order: Order,
}

impl Chains {
    /// Starts `threads` of them. `connect(volume)` opens a connection; it is called here.
    #[track_caller]
    pub fn start(
        order: &Order,
        seed: u64,
        threads: usize,
        connect: impl Fn(usize) -> Result<Nbd, NbdError>,
    ) -> Chains {
        let stop = Arc::new(AtomicBool::new(false));
        let sizes: Vec<u64> = order
            .lock()
            .settled
            .iter()
            .map(|sectors| sectors.len() as u64)
            .collect();
        let threads = (0..threads)
            .map(|index| {
                let mut connections: Vec<Nbd> = (0..sizes.len())
                    .map(|volume| {
                        connect(volume).unwrap_or_else(|error| panic!("a connection: {error}"))
                    })
                    .collect();
                let (order, stop, sizes) = (order.clone(), stop.clone(), sizes.clone());
                let mut random = Random::new(seed ^ (index as u64 + 1) << 32);
                std::thread::spawn(move || {
                    // Each thread has parts of every volume to itself: writes to one sector follow one another.
                    while !stop.load(Ordering::Relaxed) {
                        for (volume, nbd) in connections.iter_mut().enumerate() {
                            let slots = sizes[volume] / LONGEST / threads as u64;
                            let slot = random.below(slots) * threads as u64 + index as u64;
                            let count = 1 + random.below(LONGEST);
                            let first = slot * LONGEST + random.below(LONGEST - count + 1);
                            let (sequence, data) = order.begin(volume, first, count);
                            nbd.write(first * SECTOR as u64, &data)?;
                            order.acknowledge(sequence);
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        Chains {
            stop,
            threads,
            order: order.clone(),
        }
    }

    /// Waits until that many writes more were acknowledged.
    ///
    /// # Panics
    /// They do not come.
    #[track_caller]
    pub fn until_acknowledged(&self, writes: u64) {
        let target = self.order.acknowledged() + writes;
        let start = Instant::now();
        while self.order.acknowledged() < target {
            assert!(
                start.elapsed() < crate::cluster::PATIENCE
                    && self.threads.iter().any(|thread| !thread.is_finished()),
                "the order stands at {} of {target} writes",
                self.order.acknowledged()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends, in whatever way; how many threads were cut off by the end of their server.
    pub fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut broken = 0;
        for thread in self.threads {
            match thread.join() {
                Ok(ended) => broken += usize::from(ended.is_err()),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two volumes of 32 sectors under an order.
    struct Disks {
        order: Order,
        volumes: [Vec<u8>; 2],
    }

    impl Disks {
        fn new() -> Disks {
            let size = 32 * SECTOR;
            Disks {
                order: Order::new(1, &[size as u64; 2]),
                volumes: [vec![0; size], vec![0; size]],
            }
        }
        /// A write that reaches the disk or not, acknowledged.
        fn write(&mut self, volume: usize, first: u64, arrives: bool) {
            let (sequence, data) = self.order.begin(volume, first, 2);
            if arrives {
                let at = first as usize * SECTOR;
                self.volumes[volume][at..at + data.len()].copy_from_slice(&data);
            }
            self.order.acknowledge(sequence);
        }
        fn settle(&self, loss: Loss) -> Option<Kept> {
            let read = |volume: usize, offset: u64, length: usize| {
                self.volumes[volume][offset as usize..offset as usize + length].to_vec()
            };
            let settle = || self.order.settle(loss, "test", read);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(settle)).ok()
        }
    }

    #[test]
    fn a_beginning_of_the_order_may_be_left_and_nothing_else() {
        let mut disks = Disks::new();
        disks.write(0, 0, true);
        disks.write(1, 0, true);
        disks.write(0, 4, false);
        disks.write(1, 4, false);
        assert_eq!(disks.settle(Loss::Nothing), None);
        let kept = disks.settle(Loss::Unflushed);
        assert_eq!(kept, Some(Kept { writes: 2, lost: 2 }));

        disks.write(0, 8, false);
        disks.write(1, 8, true);
        assert_eq!(
            disks.settle(Loss::Unflushed),
            None,
            "the second without the first"
        );
    }

    #[test]
    fn an_overwritten_write_is_there_and_a_settled_one_stays() {
        let mut disks = Disks::new();
        disks.write(0, 0, true);
        disks.write(0, 0, true);
        let kept = disks.settle(Loss::Nothing);
        assert_eq!(kept, Some(Kept { writes: 2, lost: 0 }));
        disks.volumes[0].fill(0);
        assert_eq!(
            disks.settle(Loss::Unflushed),
            None,
            "what was there is gone"
        );
    }

    #[test]
    fn what_is_in_flight_may_be_there_or_not_or_in_part() {
        let mut disks = Disks::new();
        disks.write(1, 2, true);
        let (_, data) = disks.order.begin(0, 0, 2);
        disks.volumes[0][..SECTOR].copy_from_slice(&data[..SECTOR]);
        let kept = disks.settle(Loss::Nothing);
        assert_eq!(kept, Some(Kept { writes: 1, lost: 0 }));
    }
}
