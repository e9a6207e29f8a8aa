//! An application: several connections with several requests in flight each, all of them in the history before they are
//! sent and after they are answered.

use crate::history::{History, SECTOR, Write};
use crate::nbd::{Nbd, NbdError};
use crate::random::Random;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the application does, in percent of its requests; the rest are writes.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub reads: u64,
    pub flushes: u64,
    pub zeroes: u64,
    /// Of the writes.
    pub fua: u64,
    /// Connections, and requests in flight on each.
    pub connections: usize,
    pub depth: usize,
    /// Longest request, in sectors of the history.
    pub longest: u64,
    /// Requests begin and end at multiples of so many sectors.
    pub align: u64,
    /// Requests may overlap others in flight, also of the same connection.
    pub overlap: bool,
}

impl Default for Mix {
    fn default() -> Self {
        Mix {
            reads: 10,
            flushes: 2,
            zeroes: 3,
            fua: 5,
            connections: 3,
            depth: 6,
            longest: 64,
            align: 1,
            overlap: true,
        }
    }
}

/// A load that runs in threads of its own.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Ended>>,
    answered: Arc<Answered>,
}

/// What was answered with success.
#[derive(Default)]
struct Answered {
    writes: AtomicU64,
    flushes: AtomicU64,
}

/// How one connection ended.
#[derive(Debug)]
struct Ended {
    in_flight: usize,
    why: Option<NbdError>,
}

/// What a load achieved.
#[derive(Debug)]
pub struct Report {
    /// Writes and zeroes answered with success.
    pub acknowledged: u64,
    pub flushes: u64,
    /// Requests sent and never answered.
    pub in_flight: usize,
    /// Why connections ended before they were told to.
    pub broken: Vec<String>,
}

enum Sent {
    Write(Write),
    Read { begun: u64, first: u64 },
    Flush { begun: u64 },
}

impl Load {
    /// Starts a load on one volume. `connect` opens a connection; it is called here, `mix.connections` times.
    #[track_caller]
    pub fn start(
        history: &History,
        seed: u64,
        mix: Mix,
        mut connect: impl FnMut() -> Result<Nbd, NbdError>,
    ) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::<Answered>::default();
        let threads = (0..mix.connections)
            .map(|index| {
                let nbd = connect().unwrap_or_else(|error| panic!("a connection: {error}"));
                assert!(nbd.can_multi_conn(), "flushes cover one connection only");
                let mut client = Client {
                    nbd,
                    history: history.clone(),
                    answered: answered.clone(),
                    mix,
                    random: Random::new(seed ^ (index as u64 + 1) << 40),
                    sent: HashMap::new(),
                    spans: HashMap::new(),
                };
                let stop = stop.clone();
                std::thread::spawn(move || client.run(&stop))
            })
            .collect();
        Load {
            stop,
            threads,
            answered,
        }
    }

    /// Writes acknowledged so far by this load.
    pub fn acknowledged(&self) -> u64 {
        self.answered.writes.load(Ordering::Relaxed)
    }

    /// Flushes acknowledged so far by this load.
    pub fn flushed(&self) -> u64 {
        self.answered.flushes.load(Ordering::Relaxed)
    }

    /// Waits until that many writes more were acknowledged.
    ///
    /// # Panics
    /// They do not come.
    #[track_caller]
    pub fn until_acknowledged(&self, writes: u64) {
        let target = self.acknowledged() + writes;
        let start = Instant::now();
        while self.acknowledged() < target {
            assert!(
                start.elapsed() < crate::cluster::PATIENCE
                    && self.threads.iter().any(|thread| !thread.is_finished()),
                "the load stands at {} of {target} writes",
                self.acknowledged()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets every request be answered, and ends.
    ///
    /// # Panics
    /// A connection broke, a request failed, or a read returned what it must not.
    #[track_caller]
    pub fn finish(self) -> Report {
        let report = self.end();
        assert!(
            report.broken.is_empty() && report.in_flight == 0,
            "the load broke: {report:?}"
        );
        report
    }

    /// Ends, in whatever way: for a load whose server was killed. What is in flight on a server that lives is answered first.
    ///
    /// # Panics
    /// A read returned what it must not.
    pub fn end(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut broken = Vec::new();
        let mut in_flight = 0;
        for thread in self.threads {
            match thread.join() {
                Ok(ended) => {
                    in_flight += ended.in_flight;
                    broken.extend(ended.why.map(|error| error.to_string()));
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Report {
            acknowledged: self.answered.writes.load(Ordering::Relaxed),
            flushes: self.answered.flushes.load(Ordering::Relaxed),
            in_flight,
            broken,
        }
    }
}

struct Client {
    nbd: Nbd,
    history: History,
    answered: Arc<Answered>,
    mix: Mix,
    random: Random,
    sent: HashMap<u64, Sent>,
    /// Sectors of the requests in flight, where they must not overlap.
    spans: HashMap<u64, (u64, u64)>,
}

impl Client {
    fn run(&mut self, stop: &AtomicBool) -> Ended {
        let why = self.requests(stop).err();
        Ended {
            in_flight: self.nbd.unanswered(),
            why,
        }
    }

    fn requests(&mut self, stop: &AtomicBool) -> Result<(), NbdError> {
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && self.sent.len() < self.mix.depth {
                self.send()?;
            }
            if self.sent.is_empty() {
                return Ok(());
            }
            let reply = self.nbd.receive()?;
            self.spans.remove(&reply.cookie);
            let sent = self.sent.remove(&reply.cookie).expect("one that was sent");
            // A write that failed may be there all the same: it stays in flight for good.
            let data = reply.result.map_err(NbdError::Failed)?;
            match sent {
                Sent::Write(write) => {
                    self.history.acknowledge(write);
                    self.answered.writes.fetch_add(1, Ordering::Relaxed);
                }
                Sent::Flush { begun } => {
                    self.history.flushed(begun);
                    self.answered.flushes.fetch_add(1, Ordering::Relaxed);
                }
                Sent::Read { begun, first } => {
                    if let Err(damage) = self.history.check_read(begun, first, &data) {
                        panic!("a read returned what it must not: {damage:?}");
                    }
                }
            }
        }
    }

    fn send(&mut self) -> Result<(), NbdError> {
        let dice = self.random.below(100);
        let mix = self.mix;
        if dice < mix.flushes {
            let begun = self.history.begin_flush();
            let cookie = self.nbd.submit_flush()?;
            self.sent.insert(cookie, Sent::Flush { begun });
            return Ok(());
        }
        let (first, count) = self.place();
        let (cookie, sent) = if dice < mix.flushes + mix.reads {
            let begun = self.history.begin_read();
            let at = self.history.offset() + first * SECTOR as u64;
            let cookie = self.nbd.submit_read(at, count as usize * SECTOR)?;
            (cookie, Sent::Read { begun, first })
        } else if dice < mix.flushes + mix.reads + mix.zeroes {
            let (write, at) = self.history.begin_zeroes(first, count);
            let may_punch = self.random.percent(50);
            let length = count as usize * SECTOR;
            let cookie = self.nbd.submit_zeroes(at, length, may_punch)?;
            (cookie, Sent::Write(write))
        } else {
            let fua = self.random.percent(mix.fua);
            let (write, at, data) = self.history.begin_write(first, count, fua);
            let cookie = self.nbd.submit_write(at, &data, fua)?;
            (cookie, Sent::Write(write))
        };
        self.spans.insert(cookie, (first, count));
        self.sent.insert(cookie, sent);
        Ok(())
    }

    fn place(&mut self) -> (u64, u64) {
        let units = self.history.sectors() / self.mix.align;
        let longest = (self.mix.longest / self.mix.align).clamp(1, units);
        loop {
            // Mostly short, sometimes long; half of the time in a small hot part, so that blocks are overwritten.
            let most = if self.random.percent(70) {
                longest.min(8)
            } else {
                longest
            };
            let count = 1 + self.random.below(most);
            let within = if self.random.percent(50) {
                (units / 16).max(count)
            } else {
                units
            };
            let first = self.random.below(within - count + 1) * self.mix.align;
            let count = count * self.mix.align;
            let free = self.mix.overlap
                || self
                    .spans
                    .values()
                    .all(|(at, length)| first + count <= *at || at + length <= first);
            if free {
                return (first, count);
            }
        }
    }
}
