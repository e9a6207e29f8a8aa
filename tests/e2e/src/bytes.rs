//! A volume byte by byte: what each byte may be while and after many connections wrote ranges that begin and end anywhere and overlap,
//! and their server died in the midst of it.
//!
//! The rule is that of [`crate::history`], for bytes: a write is superseded by one that began after it was acknowledged. Sectors
//! do not matter here, and that is the point: a server that changes a sector for one byte must not lose its neighbours, which
//! another connection may be changing at the same time.

use crate::nbd::{Nbd, NbdError};
use crate::random::Random;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests in flight on each connection.
const DEPTH: usize = 6;

/// One write that counts for a byte.
#[derive(Clone, Copy, Debug)]
struct Entry {
    sequence: u64,
    acknowledged: Option<u64>,
    value: u8,
}

/// A write since the last settling.
#[derive(Clone, Copy, Debug)]
struct Range {
    sequence: u64,
    begun: u64,
    first: usize,
    length: usize,
    zeroes: bool,
}

struct Inner {
    clock: u64,
    offset: u64,
    /// By byte: every write that it may hold.
    bytes: Vec<Vec<Entry>>,
    /// In the order they began.
    writes: Vec<Range>,
    sequence: u64,
    acknowledged: u64,
    reads: u64,
}

/// The bytes of one region of a volume; a cheap handle, used from many threads.
#[derive(Clone)]
pub struct Bytes {
    inner: Arc<Mutex<Inner>>,
}

/// A read under way: when it began, and what each byte could hold then.
struct Read {
    begun: u64,
    first: usize,
    allowed: Vec<Vec<u8>>,
}

/// What the write of that number puts at byte `at` of the region.
fn value(sequence: u64, at: usize) -> u8 {
    Random::new(sequence << 24 ^ at as u64).word() as u8
}

impl Bytes {
    /// `length` bytes at byte `offset` of a volume, all zeroes now.
    pub fn new(offset: u64, length: usize) -> Bytes {
        let start = Entry {
            sequence: 0,
            acknowledged: Some(0),
            value: 0,
        };
        Bytes {
            inner: Arc::new(Mutex::new(Inner {
                clock: 1,
                offset,
                bytes: vec![vec![start]; length],
                writes: Vec::new(),
                sequence: 0,
                acknowledged: 0,
                reads: 0,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes acknowledged, and reads judged, since the beginning.
    pub fn totals(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.acknowledged, inner.reads)
    }

    fn begin(&self, first: usize, length: usize, zeroes: bool) -> (Range, Vec<u8>) {
        let mut inner = self.lock();
        inner.clock += 1;
        inner.sequence += 1;
        let range = Range {
            sequence: inner.sequence,
            begun: inner.clock,
            first,
            length,
            zeroes,
        };
        inner.writes.push(range);
        let data: Vec<u8> = (first..first + length).map(|at| range.value(at)).collect();
        for (entries, byte) in inner.bytes[first..first + length].iter_mut().zip(&data) {
            entries.push(Entry {
                sequence: range.sequence,
                acknowledged: None,
                value: *byte,
            });
        }
        (range, data)
    }

    fn acknowledge(&self, range: Range) {
        let mut inner = self.lock();
        inner.clock += 1;
        inner.acknowledged += 1;
        let now = inner.clock;
        for entries in &mut inner.bytes[range.first..range.first + range.length] {
            for entry in entries.iter_mut() {
                if entry.sequence == range.sequence {
                    entry.acknowledged = Some(now);
                }
            }
            entries.retain(|entry| entry.acknowledged.is_none_or(|at| at >= range.begun));
        }
    }

    fn begin_read(&self, first: usize, length: usize) -> Read {
        let mut inner = self.lock();
        inner.clock += 1;
        Read {
            begun: inner.clock,
            first,
            allowed: inner.bytes[first..first + length]
                .iter()
                .map(|entries| entries.iter().map(|entry| entry.value).collect())
                .collect(),
        }
    }

    /// Each byte must be what it could be when the read began, or of a write that began since.
    fn check_read(&self, read: &Read, data: &[u8]) -> Result<(), String> {
        let mut inner = self.lock();
        inner.reads += 1;
        let since = inner
            .writes
            .partition_point(|write| write.begun < read.begun);
        for (at, (byte, allowed)) in (read.first..).zip(data.iter().zip(&read.allowed)) {
            let later = || {
                inner.writes[since..]
                    .iter()
                    .any(|write| write.covers(at) && write.value(at) == *byte)
            };
            if !allowed.contains(byte) && !later() {
                return Err(format!(
                    "byte {} read as {byte:02x}, allowed were {allowed:02x?}",
                    inner.offset + at as u64
                ));
            }
        }
        Ok(())
    }

    /// Compares the region, as it was read whole, and goes on from what it holds. Nothing may be in flight.
    ///
    /// # Panics
    /// A byte is what it cannot be.
    #[track_caller]
    pub fn settle(&self, what: &str, data: &[u8]) {
        let mut inner = self.lock();
        assert_eq!(data.len(), inner.bytes.len());
        let mut wrong = Vec::new();
        for (at, (entries, byte)) in inner.bytes.iter_mut().zip(data).enumerate() {
            match entries.iter().rfind(|entry| entry.value == *byte) {
                Some(entry) => *entries = vec![*entry],
                None => wrong.push((at, *byte, entries.clone())),
            }
        }
        assert!(
            wrong.is_empty(),
            "{what}: {} bytes are what they cannot be, the first: {:02x?}",
            wrong.len(),
            &wrong[..wrong.len().min(3)]
        );
        inner.clock += 1;
        let now = inner.clock;
        for entries in &mut inner.bytes {
            for entry in entries {
                entry.acknowledged = Some(entry.acknowledged.unwrap_or(now));
            }
        }
        inner.writes.clear();
    }
}

impl Range {
    fn covers(&self, at: usize) -> bool {
        (self.first..self.first + self.length).contains(&at)
    }

    fn value(&self, at: usize) -> u8 {
        if self.zeroes {
            0
        } else {
            value(self.sequence, at)
        }
    }
}

enum Sent {
    Write(Range),
    Read(Read),
    Flush,
}

/// Connections that write, zero and read any ranges of one region at the same time.
pub struct Racers {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Result<(), NbdError>>>,
    bytes: Bytes,
}

impl Racers {
    /// Starts `connections` of them. `connect` opens a connection; it is called here.
    #[track_caller]
    pub fn start(
        bytes: &Bytes,
        seed: u64,
        connections: usize,
        connect: impl Fn() -> Result<Nbd, NbdError>,
    ) -> Racers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..connections)
            .map(|index| {
                let mut nbd = connect().unwrap_or_else(|error| panic!("a connection: {error}"));
                let (bytes, stop) = (bytes.clone(), stop.clone());
                let mut random = Random::new(seed ^ (index as u64 + 1) << 32);
                std::thread::spawn(move || race(&bytes, &mut nbd, &mut random, &stop))
            })
            .collect();
        Racers {
            stop,
            threads,
            bytes: bytes.clone(),
        }
    }

    /// Waits until that many writes more were acknowledged.
    ///
    /// # Panics
    /// They do not come.
    #[track_caller]
    pub fn until_acknowledged(&self, writes: u64) {
        let target = self.bytes.totals().0 + writes;
        let start = Instant::now();
        while self.bytes.totals().0 < target {
            assert!(
                start.elapsed() < crate::cluster::PATIENCE
                    && self.threads.iter().any(|thread| !thread.is_finished()),
                "the racers stand at {} of {target} writes",
                self.bytes.totals().0
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends, in whatever way; how many connections were cut off by the end of their server.
    ///
    /// # Panics
    /// A read returned what it must not.
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

fn race(
    bytes: &Bytes,
    nbd: &mut Nbd,
    random: &mut Random,
    stop: &AtomicBool,
) -> Result<(), NbdError> {
    let (offset, size) = {
        let inner = bytes.lock();
        (inner.offset, inner.bytes.len() as u64)
    };
    let mut sent: HashMap<u64, Sent> = HashMap::new();
    loop {
        while !stop.load(Ordering::Relaxed) && sent.len() < DEPTH {
            // Mostly within a sector or across one border; sometimes across many.
            let most = if random.percent(75) { 700 } else { 9000 };
            let length = 1 + random.below(most) as usize;
            let first = random.below(size - length as u64 + 1) as usize;
            let at = offset + first as u64;
            let dice = random.below(100);
            let (cookie, request) = if dice < 3 {
                (nbd.submit_flush()?, Sent::Flush)
            } else if dice < 25 {
                let read = bytes.begin_read(first, length);
                (nbd.submit_read(at, length)?, Sent::Read(read))
            } else if dice < 35 {
                let (range, _) = bytes.begin(first, length, true);
                let cookie = nbd.submit_zeroes(at, length, random.percent(50))?;
                (cookie, Sent::Write(range))
            } else {
                let (range, data) = bytes.begin(first, length, false);
                let cookie = nbd.submit_write(at, &data, random.percent(5))?;
                (cookie, Sent::Write(range))
            };
            sent.insert(cookie, request);
        }
        if sent.is_empty() {
            return Ok(());
        }
        let reply = nbd.receive()?;
        let request = sent.remove(&reply.cookie).expect("one that was sent");
        let data = reply.result.map_err(NbdError::Failed)?;
        match request {
            Sent::Write(range) => bytes.acknowledge(range),
            Sent::Read(read) => {
                if let Err(why) = bytes.check_read(&read, &data) {
                    panic!("a read returned what it must not: {why}");
                }
            }
            Sent::Flush => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settles(bytes: &Bytes, data: &[u8]) -> bool {
        let settle = || bytes.settle("test", data);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(settle)).is_ok()
    }

    #[test]
    fn either_of_two_writes_at_once_and_no_older_one() {
        let bytes = Bytes::new(0, 8);
        let (old, old_data) = bytes.begin(0, 8, false);
        bytes.acknowledge(old);
        let (one, one_data) = bytes.begin(0, 6, false);
        let (two, two_data) = bytes.begin(2, 6, false);
        bytes.acknowledge(one);
        bytes.acknowledge(two);
        let mut disk = one_data.clone();
        disk.extend(&two_data[4..]);
        let read = bytes.begin_read(0, 8);
        bytes.check_read(&read, &disk).unwrap();
        // A neighbour of the second write that a change of the whole sector took back.
        let mut lost = disk.clone();
        lost[0] = old_data[0];
        bytes.check_read(&read, &lost).unwrap_err();
        assert!(!settles(&bytes, &lost));
        assert!(settles(&bytes, &disk));
    }

    #[test]
    fn what_is_in_flight_may_be_there_byte_by_byte_and_then_stays() {
        let bytes = Bytes::new(0, 4);
        let (_, data) = bytes.begin(1, 2, false);
        let found = [0, data[0], 0, 0];
        assert!(settles(&bytes, &found));
        assert!(settles(&bytes, &found));
        assert!(!settles(&bytes, &[0, data[0], data[1], 0]));
    }
}
