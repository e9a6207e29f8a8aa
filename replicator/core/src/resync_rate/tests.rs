use super::*;

const MIB: u64 = 1 << 20;
const MS: u64 = 1_000_000;
const CHUNK: u32 = 256 << 10;

fn rate(min: u64, max: u64) -> ResyncRate {
    let tuning = Tuning {
        resync_rate_min: min,
        resync_rate_max: max,
        ..Tuning::default()
    };
    ResyncRate::new(&tuning, Time(0))
}

/// A disk that does one thing after the other, an application with one request in flight, and a resync.
struct Machine {
    rate: ResyncRate,
    now: u64,
    /// Bytes per second of the disk, and ns that each request takes besides.
    disk: u64,
    seek: u64,
    busy_until: u64,
    /// Ends of the resync's requests.
    chunks: std::collections::VecDeque<u64>,
    /// When the application's next request comes, if it works; its pause between two, and their size.
    next: Option<u64>,
    pause: u64,
    size: u64,
    copied: u64,
    answered: Vec<(u64, u64)>,
}

impl Machine {
    fn new(rate: ResyncRate) -> Self {
        Machine {
            rate,
            now: 0,
            disk: 200 * MIB,
            seek: 100_000,
            busy_until: 0,
            chunks: Default::default(),
            next: None,
            pause: MS,
            size: 4096,
            copied: 0,
            answered: Vec::new(),
        }
    }

    fn disk(&mut self, bytes: u64) -> u64 {
        let begins = self.busy_until.max(self.now);
        self.busy_until = begins + self.seek + bytes * 1_000_000_000 / self.disk;
        self.busy_until
    }

    /// Runs for so long, in ms; how many bytes were copied and how long requests took on average, in ns.
    fn run(&mut self, ms: u64) -> (u64, u64) {
        let end = self.now + ms * MS;
        let copied = self.copied;
        self.answered.clear();
        let mut pending: Option<(u64, u64)> = None;
        while self.now < end {
            while self.chunks.front().is_some_and(|at| *at <= self.now) {
                self.chunks.pop_front();
                self.copied += u64::from(CHUNK);
            }
            if let Some((came, done)) = pending
                && done <= self.now
            {
                self.rate.answered(Kind::Write, done - came);
                self.answered.push((came, done - came));
                pending = None;
                self.next = Some(done + self.pause);
            }
            if pending.is_none() && self.next.is_some_and(|at| at <= self.now) {
                let done = self.disk(self.size);
                pending = Some((self.now, done));
            }
            let waits = pending.map_or(0, |(came, _)| self.now - came);
            if self.rate.due(Time(self.now)) {
                self.rate.adapt(Time(self.now), [waits, 0, 0]);
            }
            loop {
                let outstanding = self.chunks.len() as u64 * u64::from(CHUNK);
                let window = self.rate.window(16 * MIB, outstanding);
                if outstanding >= window || !self.rate.may_take(Time(self.now)) {
                    break;
                }
                self.rate.took(CHUNK);
                let done = self.disk(CHUNK.into());
                self.chunks.push_back(done);
            }
            self.now += 50_000;
        }
        if pending.is_some() && self.next.is_some() {
            self.next = Some(self.now);
        }
        let count = self.answered.len().max(1) as u64;
        let sum: u64 = self.answered.iter().map(|(_, took)| took).sum();
        (self.copied - copied, sum / count)
    }
}

#[test]
fn alone_a_resync_takes_all_there_is() {
    let mut m = Machine::new(rate(MIB, 0));
    let (copied, _) = m.run(1000);
    assert!(copied > 170 * MIB, "{copied}");
    assert_eq!(m.rate.limit(), None);
}

#[test]
fn it_yields_to_the_application_and_comes_back() {
    let mut m = Machine::new(rate(MIB, 0));
    m.rate.min = 200 * MIB;
    m.next = Some(0);
    let (_, disturbed) = m.run(2000);
    let mut m = Machine::new(rate(MIB, 0));
    m.next = Some(0);
    m.run(2000);
    let (copied, took) = m.run(10_000);
    assert!(disturbed > 30 * MS, "without yielding: {disturbed} ns");
    assert!(took < 3 * MS, "{took} ns, of some 120000 without a resync");
    assert!(
        copied > 50 * MIB,
        "most of the time is the resync's: {copied}"
    );
    // The application stops.
    m.next = None;
    m.run(2000);
    let (copied, _) = m.run(1000);
    assert!(copied > 150 * MIB, "{copied}");
}

#[test]
fn it_never_starves() {
    let mut m = Machine::new(rate(4 * MIB, 0));
    // The disk is slower than the application would like, whatever the resync does.
    m.next = Some(0);
    m.pause = 0;
    m.size = MIB;
    m.disk = 50 * MIB;
    m.run(5000);
    let (copied, _) = m.run(10_000);
    assert!(copied >= 36 * MIB, "{copied}");
}

/// Requests that get no answer at all count as slow ones: there is no mean to look at.
#[test]
fn it_yields_to_requests_that_wait() {
    let mut rate = rate(MIB, 0);
    for interval in 1..=20 {
        rate.took(u32::MAX / 64);
        let waits = (interval - 1) * INTERVAL_MS * MS;
        rate.adapt(Time(interval * INTERVAL_MS * MS), [0, waits, 0]);
    }
    assert_eq!(rate.limit(), Some(MIB));
}

#[test]
fn bounds_are_kept() {
    let mut m = Machine::new(rate(MIB, 10 * MIB));
    let (copied, _) = m.run(10_000);
    assert!(
        (95 * MIB..=101 * MIB).contains(&copied),
        "{copied} in ten seconds"
    );
    // A minimum above what the disk can do: the application comes last, as configured.
    let mut m = Machine::new(rate(1 << 40, 0));
    m.next = Some(0);
    let (copied, _) = m.run(2000);
    assert!(copied > 300 * MIB, "{copied}");
    let over = rate(8 * MIB, 2 * MIB);
    assert_eq!((over.min, over.max), (2 * MIB, 2 * MIB));
}

/// A slow disk is no reason to yield: its requests take long without a resync, too.
#[test]
fn what_is_usual_is_learned() {
    let mut m = Machine::new(rate(MIB, 0));
    m.seek = 8 * MS;
    m.next = Some(0);
    m.pause = 30 * MS;
    m.run(15_000);
    let usual = m.rate.meters[0].usual.expect("it was learned");
    assert!((7 * MS..20 * MS).contains(&usual), "{usual}");
    let (copied, took) = m.run(10_000);
    assert!(took < 25 * MS, "{took}");
    assert!(copied > 20 * MIB, "{copied}");
}

/// Small steps of time lose no credit.
#[test]
fn credit_is_exact() {
    let mut rate = rate(1, 3 * MIB);
    let mut taken = 0u64;
    for step in 0..1_000_000u64 {
        if rate.may_take(Time(step * 1000)) {
            rate.took(4096);
            taken += 4096;
        }
        if let Some(at) = rate.ready_at() {
            assert!(at.0 > step * 1000 && at.0 <= step * 1000 + 2 * MS);
        }
    }
    assert!(taken.abs_diff(3 * MIB) <= 8192, "{taken}");
}

/// What is on its way shrinks with the rate, and a rate that is held back by that alone rises again.
#[test]
fn less_is_on_its_way_at_a_lower_rate() {
    let mut rate = rate(MIB, 0);
    assert_eq!(rate.window(16 * MIB, 0), 16 * MIB);
    rate.took(4 << 20);
    rate.adapt(Time(INTERVAL_MS * MS), [INTERVAL_MS * MS, 0, 0]);
    // 40 MiB/s were copied.
    assert_eq!(rate.limit(), Some(20 * MIB));
    assert_eq!(rate.window(16 * MIB, 0), 5 * MIB);
    assert_eq!(rate.window(MIB, 0), MIB);
    for interval in 2..=20 {
        rate.took(MIB as u32);
        rate.window(16 * MIB, 16 * MIB);
        rate.adapt(Time(interval * INTERVAL_MS * MS), [0; 3]);
    }
    assert!(rate.limit().is_none_or(|limit| limit > 40 * MIB));
    // Of the minimum, a second's worth: a long line is not kept below it.
    for interval in 21..=60 {
        rate.took(MIB as u32);
        rate.adapt(Time(interval * INTERVAL_MS * MS), [INTERVAL_MS * MS, 0, 0]);
    }
    assert_eq!((rate.limit(), rate.window(16 * MIB, 0)), (Some(MIB), MIB));
}
