//! A history that can be checked: every 4 KiB block says which write it belongs to and carries a checksum, and the
//! writer remembers which writes were acknowledged and which were in flight when the connection broke.
//!
//! After a crash a block must hold its newest acknowledged write or, if one was in flight, that one. Anything else
//! is a lost write, and a block that is not one whole write is a torn one.

use super::nbd_client::{NbdClient, NbdError};
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_128;

/// The grain of the history, in bytes.
pub const BLOCK: usize = 4096;
const MAGIC: [u8; 8] = *b"HFHISTRY";
/// Blocks of one writer lie together in stripes of this many, so that writers meet in the same extents and
/// never in the same block.
const STRIPE: u64 = 16;
/// Requests each writer keeps in flight.
const DEPTH: usize = 4;
/// One write of so many asks for durability by itself.
const FUA_EVERY: u64 = 16;

/// Small, seedable and good enough to spread writes.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// 0 to `end` − 1.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Fills one block with write `sequence` of block `block` in run `run`.
fn fill(out: &mut [u8], run: u64, block: u64, sequence: u64) {
    out[..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&run.to_le_bytes());
    out[16..24].copy_from_slice(&block.to_le_bytes());
    out[24..32].copy_from_slice(&sequence.to_le_bytes());
    out[32..48].fill(0);
    let mut random = Random::new(run ^ block.rotate_left(32) ^ sequence.rotate_left(17));
    for word in out[48..BLOCK].chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let digest = xxh3_128(&out[..BLOCK]);
    out[32..48].copy_from_slice(&digest.to_le_bytes());
}

/// Which write a block holds: `Some(0)` for never written (all zero), none for a block that is no whole write
/// of this run and place.
fn read_back(data: &[u8], run: u64, block: u64) -> Option<u64> {
    if data.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let word = |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().unwrap_or_default());
    let sequence = word(24);
    if data[..8] != MAGIC || word(8) != run || word(16) != block {
        return None;
    }
    let mut expected = [0; BLOCK];
    fill(&mut expected, run, block, sequence);
    (data == expected).then_some(sequence)
}

/// What is known of one block: sequence numbers, 0 = none.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Known {
    acknowledged: u64,
    in_flight: u64,
}

/// A region of a volume under history, and everything that was ever written to it.
pub struct History {
    run: u64,
    /// Byte offset of the region on the volume.
    offset: u64,
    blocks: Vec<Known>,
    next_sequence: AtomicU64,
}

/// How long a load goes on.
pub struct Until<'a> {
    /// Writers stop when this is set; a broken connection stops them as well.
    pub stop: &'a AtomicBool,
    /// Writes acknowledged so far, counted up by the writers.
    pub acknowledged: &'a AtomicU64,
    /// Bytes acknowledged so far.
    pub acknowledged_bytes: &'a AtomicU64,
}

/// What a load achieved.
#[derive(Clone, Debug, Default)]
pub struct LoadReport {
    pub acknowledged: u64,
    pub acknowledged_bytes: u64,
    /// Writes sent, or half sent, and not answered when the connections broke.
    pub in_flight: u64,
    /// Why writers stopped before they were told to.
    pub broken: Vec<String>,
    pub elapsed: Duration,
    /// Longest wait for one acknowledgement.
    pub slowest: Duration,
}

/// What a check of the region found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Blocks compared.
    pub blocks: u64,
    /// Blocks that hold a write.
    pub written_blocks: u64,
    /// Acknowledged writes of which some block is older than it, or torn.
    pub lost_writes: u64,
    /// Blocks that are not one whole write.
    pub torn_blocks: u64,
    /// Blocks that hold a write they cannot hold: newer than sent, or superseded.
    pub strange_blocks: u64,
    /// Blocks in which a write that was in flight arrived.
    pub arrived_blocks: u64,
}

impl CheckReport {
    /// Whether every acknowledged write is there, whole.
    pub fn holds(&self) -> bool {
        self.lost_writes == 0 && self.torn_blocks == 0 && self.strange_blocks == 0
    }
}

impl History {
    /// A region of `length` bytes at `offset`, all zero now. `run` tells this history from earlier ones.
    pub fn new(run: u64, offset: u64, length: u64) -> Self {
        let blocks = vec![Known::default(); (length / BLOCK as u64) as usize];
        History {
            run,
            offset,
            blocks,
            next_sequence: AtomicU64::new(1),
        }
    }

    /// Writes from `clients.len()` threads at once until told to stop or until the connections break.
    pub fn load(&mut self, clients: Vec<NbdClient>, seed: u64, until: &Until<'_>) -> LoadReport {
        let start = Instant::now();
        let writers = clients.len() as u64;
        let (run, offset, total) = (self.run, self.offset, self.blocks.len() as u64);
        let sequence = &self.next_sequence;
        let stripes = total / STRIPE;
        assert!(stripes >= writers, "each writer needs a stripe of its own");
        let known = &self.blocks;
        let ended: Vec<Writer> = std::thread::scope(|scope| {
            let threads: Vec<_> = clients
                .into_iter()
                .enumerate()
                .map(|(index, client)| {
                    let mut writer = Writer {
                        run,
                        offset,
                        first_stripe: index as u64,
                        step: writers,
                        stripes: (stripes - index as u64).div_ceil(writers),
                        random: Random::new(seed ^ (index as u64 + 1) << 48),
                        known: HashMap::new(),
                        sent: HashMap::new(),
                        report: LoadReport::default(),
                    };
                    scope.spawn(move || {
                        writer.run(client, sequence, known, until);
                        writer
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(writer) => writer,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        });
        let mut report = LoadReport::default();
        for writer in ended {
            for (block, known) in writer.known {
                self.blocks[block as usize] = known;
            }
            report.acknowledged += writer.report.acknowledged;
            report.acknowledged_bytes += writer.report.acknowledged_bytes;
            report.in_flight += writer.report.in_flight;
            report.slowest = report.slowest.max(writer.report.slowest);
            report.broken.extend(writer.report.broken);
        }
        report.elapsed = start.elapsed();
        report
    }

    /// Compares the region, as `read(byte offset on the volume, length)` gives it, with what was acknowledged.
    /// What is found of the writes in flight is settled by that: a block must not change its mind later.
    ///
    /// # Errors
    /// That of `read`.
    pub fn check<E>(
        &mut self,
        mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, E>,
    ) -> Result<CheckReport, E> {
        const PIECE: usize = 256;
        let mut report = CheckReport::default();
        let mut lost = BTreeSet::new();
        let (run, offset) = (self.run, self.offset);
        for (index, piece) in self.blocks.chunks_mut(PIECE).enumerate() {
            let first = (index * PIECE) as u64;
            let data = read(offset + first * BLOCK as u64, piece.len() * BLOCK)?;
            for (at, (known, content)) in piece.iter_mut().zip(data.chunks(BLOCK)).enumerate() {
                report.blocks += 1;
                let found = read_back(content, run, first + at as u64);
                report.written_blocks += u64::from(found != Some(0));
                match found {
                    Some(found) if found == known.acknowledged => known.in_flight = 0,
                    // Zero stands for "nothing in flight" there and for "never written" here.
                    Some(found) if found != 0 && found == known.in_flight => {
                        report.arrived_blocks += 1;
                        *known = Known {
                            acknowledged: found,
                            in_flight: 0,
                        };
                    }
                    found => {
                        match found {
                            None => report.torn_blocks += 1,
                            Some(found) if found < known.acknowledged => {}
                            Some(_) => report.strange_blocks += 1,
                        }
                        if known.acknowledged != 0 {
                            lost.insert(known.acknowledged);
                        }
                    }
                }
            }
        }
        report.lost_writes = lost.len() as u64;
        Ok(report)
    }
}

struct Sent {
    first: u64,
    blocks: u64,
    sequence: u64,
    at: Instant,
}

/// One connection, and the blocks that only it writes.
struct Writer {
    run: u64,
    offset: u64,
    first_stripe: u64,
    step: u64,
    stripes: u64,
    random: Random,
    known: HashMap<u64, Known>,
    sent: HashMap<u64, Sent>,
    report: LoadReport,
}

impl Writer {
    fn run(
        &mut self,
        mut client: NbdClient,
        sequence: &AtomicU64,
        before: &[Known],
        until: &Until<'_>,
    ) {
        let written = self.write_on(&mut client, sequence, before, until);
        if let Err(error) = written.and_then(|()| client.disconnect()) {
            self.report.broken.push(error.to_string());
        }
        self.report.in_flight = self.sent.len() as u64;
    }

    fn write_on(
        &mut self,
        client: &mut NbdClient,
        sequence: &AtomicU64,
        before: &[Known],
        until: &Until<'_>,
    ) -> Result<(), NbdError> {
        let mut data = vec![0; STRIPE as usize * BLOCK];
        loop {
            let stopping = until.stop.load(Ordering::Relaxed);
            while !stopping && self.sent.len() < DEPTH {
                let Some((first, blocks)) = self.choose() else {
                    break;
                };
                // One number for the whole run: a later write has a higher one, whoever made it.
                let sequence = sequence.fetch_add(1, Ordering::Relaxed);
                let data = &mut data[..blocks as usize * BLOCK];
                for (at, content) in data.chunks_mut(BLOCK).enumerate() {
                    let block = first + at as u64;
                    fill(content, self.run, block, sequence);
                    let known = self
                        .known
                        .entry(block)
                        .or_insert_with(|| before[block as usize]);
                    known.in_flight = sequence;
                }
                let fua = sequence.is_multiple_of(FUA_EVERY);
                let sent = Sent {
                    first,
                    blocks,
                    sequence,
                    at: Instant::now(),
                };
                let submitted = client.submit_write(self.offset + first * BLOCK as u64, data, fua);
                // A write that failed half-way may have arrived: it counts as in flight.
                self.sent
                    .insert(*submitted.as_ref().unwrap_or(&u64::MAX), sent);
                submitted?;
            }
            if self.sent.is_empty() {
                return Ok(());
            }
            let reply = client.receive()?;
            // A refused write may still have reached one copy: it stays in flight for good.
            reply.result?;
            let Some(sent) = self.sent.remove(&reply.cookie) else {
                return Err(NbdError::Protocol("an answer to a write never sent".into()));
            };
            for block in sent.first..sent.first + sent.blocks {
                self.known.insert(
                    block,
                    Known {
                        acknowledged: sent.sequence,
                        in_flight: 0,
                    },
                );
            }
            self.report.slowest = self.report.slowest.max(sent.at.elapsed());
            self.report.acknowledged += 1;
            self.report.acknowledged_bytes += sent.blocks * BLOCK as u64;
            until.acknowledged.fetch_add(1, Ordering::Relaxed);
            until
                .acknowledged_bytes
                .fetch_add(sent.blocks * BLOCK as u64, Ordering::Relaxed);
        }
    }

    /// A run of blocks inside one stripe, none of them in flight: NBD orders nothing between requests in flight,
    /// so overlapping ones could not be told apart afterwards.
    fn choose(&mut self) -> Option<(u64, u64)> {
        for _ in 0..32 {
            let stripe = self.first_stripe + self.random.below(self.stripes) * self.step;
            let from = self.random.below(STRIPE);
            let blocks = 1 + self.random.below(STRIPE - from);
            let first = stripe * STRIPE + from;
            let free = self
                .sent
                .values()
                .all(|sent| first + blocks <= sent.first || sent.first + sent.blocks <= first);
            if free {
                return Some((first, blocks));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::qemu_nbd;
    use std::os::unix::fs::FileExt as _;

    const OFFSET: u64 = 1 << 20;
    const LENGTH: u64 = 4 << 20;

    fn run(history: &mut History, uri: &str, writes: u64, at_end: impl FnOnce()) -> LoadReport {
        let clients = (0..4)
            .map(|_| NbdClient::connect(uri, Duration::from_secs(10)).unwrap())
            .collect();
        let (stop, count, bytes) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let until = Until {
            stop: &stop,
            acknowledged: &count,
            acknowledged_bytes: &bytes,
        };
        std::thread::scope(|scope| {
            let load = scope.spawn(|| history.load(clients, 7, &until));
            while count.load(Ordering::Relaxed) < writes && !load.is_finished() {
                std::thread::yield_now();
            }
            at_end();
            stop.store(true, Ordering::Relaxed);
            load.join().unwrap()
        })
    }

    fn check_file(history: &mut History, file: &std::fs::File) -> CheckReport {
        let read = |offset, length| {
            let mut data = vec![0; length];
            file.read_exact_at(&mut data, offset).map(|()| data)
        };
        history.check(read).unwrap()
    }

    #[test]
    fn a_crash_keeps_what_was_acknowledged_and_damage_is_found() {
        let Some(mut server) = qemu_nbd::serve(8 << 20, false) else {
            return;
        };
        let mut history = History::new(1, OFFSET, LENGTH);
        let uri = server.uri().to_string();
        let report = run(&mut history, &uri, 200, || server.kill());
        assert!(report.acknowledged >= 200, "{report:?}");
        assert!(
            !report.broken.is_empty(),
            "the kill came too late: {report:?}"
        );

        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(server.image())
            .unwrap();
        let found = check_file(&mut history, &file);
        assert!(found.holds(), "{found:?}");
        assert!(found.written_blocks > 0);
        let settled = check_file(&mut history, &file);
        assert_eq!(
            settled.arrived_blocks, 0,
            "checked once, nothing is in flight any more"
        );

        let victim = history
            .blocks
            .iter()
            .position(|known| known.acknowledged > 0)
            .unwrap();
        let place = OFFSET + (victim * BLOCK) as u64;
        let mut good = [0; BLOCK];
        file.read_exact_at(&mut good, place).unwrap();

        // Torn: the second half is gone.
        file.write_all_at(&[0; BLOCK / 2], place + BLOCK as u64 / 2)
            .unwrap();
        let found = check_file(&mut history, &file);
        assert_eq!((found.torn_blocks, found.lost_writes), (1, 1), "{found:?}");
        // Lost: never written.
        file.write_all_at(&[0; BLOCK], place).unwrap();
        let found = check_file(&mut history, &file);
        assert_eq!((found.torn_blocks, found.lost_writes), (0, 1), "{found:?}");
        // Another block's content in this place.
        let mut other = [0; BLOCK];
        fill(&mut other, 1, victim as u64 + 1, 5);
        file.write_all_at(&other, place).unwrap();
        assert_eq!(check_file(&mut history, &file).torn_blocks, 1);
        // A write that was never made.
        fill(&mut other, 1, victim as u64, 1 << 40);
        file.write_all_at(&other, place).unwrap();
        let found = check_file(&mut history, &file);
        assert_eq!(
            (found.strange_blocks, found.holds()),
            (1, false),
            "{found:?}"
        );
        // And restored.
        file.write_all_at(&good, place).unwrap();
        assert!(check_file(&mut history, &file).holds());
    }

    #[test]
    fn a_second_load_goes_on_where_the_first_stopped() {
        let Some(server) = qemu_nbd::serve(8 << 20, false) else {
            return;
        };
        let mut history = History::new(2, OFFSET, LENGTH);
        for _ in 0..2 {
            let report = run(&mut history, server.uri(), 100, || ());
            assert_eq!((report.in_flight, report.broken.len()), (0, 0));
            let mut client = NbdClient::connect(server.uri(), Duration::from_secs(10)).unwrap();
            let found = history
                .check(|offset, length| client.read(offset, length))
                .unwrap();
            assert!(found.holds(), "{found:?}");
            assert_eq!(found.arrived_blocks, 0);
        }
    }
}
