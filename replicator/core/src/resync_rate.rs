//! How fast a resync goes: as fast as disks and link allow while the application does not notice, and never slower than
//! a stated minimum.
//!
//! What the application notices is measured where it is felt: the time from a request's arrival to its answer, for
//! writes, flushes and reads apart. Every [`INTERVAL_MS`] the mean of each is compared with what is usual for it. One
//! that takes more than twice as long, and half a millisecond, halves the rate; else the rate rises again, faster
//! while the application does nothing.
//!
//! What is usual is learned while a resync does not stand in the way: while none runs, or while it runs at its minimum.
//! Lower means are believed at any time. Where nothing was learned yet, the first slow interval leads to the minimum,
//! and there it is learned.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;

/// How often the rate is decided anew, in ms.
const INTERVAL_MS: u64 = 100;
/// Nanoseconds beyond twice the usual time that nobody notices.
const SLACK: u64 = 500_000;
/// Answers that are enough to learn from.
const SAMPLES: u64 = 4;

/// What the application waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Write,
    Flush,
    Read,
}

/// How long requests of one kind take.
#[derive(Clone, Copy, Default, Debug)]
struct Meter {
    /// Of the present interval.
    count: u64,
    sum: u64,
    /// Of several intervals, as many as it takes for something to be learned, all of them `undisturbed` or none.
    learning: (u64, u64),
    undisturbed: bool,
    /// Nanoseconds that one takes when no resync stands in its way.
    usual: Option<u64>,
}

impl Meter {
    /// Ends an interval. `undisturbed`: what it saw is usual. `oldest`: nanoseconds that the oldest one without an answer
    /// has been waiting. Returns whether they were slow.
    fn judge(&mut self, undisturbed: bool, oldest: u64) -> bool {
        let (count, sum) = (self.count, self.sum);
        (self.count, self.sum) = (0, 0);
        let bound = self
            .usual
            .unwrap_or(0)
            .saturating_mul(2)
            .saturating_add(SLACK);
        self.learn(undisturbed, count, sum);
        let stuck = count == 0 || oldest >= INTERVAL_MS * 1_000_000;
        sum.checked_div(count).is_some_and(|mean| mean > bound) || (stuck && oldest > bound)
    }

    fn learn(&mut self, undisturbed: bool, count: u64, sum: u64) {
        if std::mem::replace(&mut self.undisturbed, undisturbed) != undisturbed {
            self.learning = (0, 0);
        }
        self.learning.0 += count;
        self.learning.1 = self.learning.1.saturating_add(sum);
        if self.learning.0 < SAMPLES {
            return;
        }
        let mean = self.learning.1 / self.learning.0;
        self.learning = (0, 0);
        self.usual = match self.usual {
            None if undisturbed => Some(mean),
            Some(usual) if mean < usual => Some(usual - (usual - mean) / 4),
            Some(usual) if undisturbed => Some(usual + (mean - usual) / 4),
            usual => usual,
        };
    }
}

/// The rate of all resyncs that this copy is the source of, together.
#[derive(Clone, Debug)]
pub(crate) struct ResyncRate {
    /// Bounds in bytes per second. No maximum: `u64::MAX`.
    min: u64,
    max: u64,
    /// Bytes per second. None: as fast as it goes.
    limit: Option<u64>,
    /// Bytes that may be taken now; what was taken beyond is owed.
    credit: i64,
    /// Up to when credit was given.
    filled: u64,
    /// The present interval: its beginning, bytes taken, and whether more would have been.
    began: u64,
    taken: u64,
    held_back: bool,
    /// Something waits for credit.
    waiting: bool,
    meters: [Meter; 3],
}

impl ResyncRate {
    pub fn new(tuning: &Tuning, now: Time) -> Self {
        let max = match tuning.resync_rate_max {
            0 => u64::MAX,
            max => max,
        };
        ResyncRate {
            min: tuning.resync_rate_min.clamp(1, max),
            max,
            limit: None,
            credit: 0,
            filled: now.0,
            began: now.0,
            taken: 0,
            held_back: false,
            waiting: false,
            meters: [Meter::default(); 3],
        }
    }

    /// A request of the application was answered after so many nanoseconds.
    pub fn answered(&mut self, kind: Kind, took: u64) {
        let meter = &mut self.meters[kind as usize];
        meter.count += 1;
        meter.sum = meter.sum.saturating_add(took);
    }

    /// Bytes per second that a resync may copy at present; none if nothing holds it back.
    pub fn limit(&self) -> Option<u64> {
        match self.limit {
            None if self.max == u64::MAX => None,
            limit => Some(limit.map_or(self.max, |limit| limit.min(self.max))),
        }
    }

    /// Whether something may be taken now. What is taken may be more than the credit: the rest is owed.
    pub fn may_take(&mut self, now: Time) -> bool {
        let Some(limit) = self.limit() else {
            return true;
        };
        let passed = u128::from(now.0.saturating_sub(self.filled));
        let earned = passed * u128::from(limit) / 1_000_000_000;
        // The time of the bytes that were given, and no more, so that nothing is lost in small steps.
        self.filled += (earned * 1_000_000_000).div_ceil(u128::from(limit)) as u64;
        // What was not used for a while is not caught up on.
        let most = (limit / 20).min(1 << 40) as i64;
        self.credit = (i128::from(self.credit) + earned as i128).min(most.into()) as i64;
        self.waiting = self.credit <= 0;
        self.held_back |= self.waiting;
        !self.waiting
    }

    pub fn took(&mut self, bytes: u32) {
        self.taken += u64::from(bytes);
        if self.limit().is_some() {
            self.credit -= i64::from(bytes);
        }
    }

    /// Most bytes that may be on their way of `most`: they are what a request of the application waits behind.
    pub fn window(&mut self, most: u64, outstanding: u64) -> u64 {
        let Some(limit) = self.limit else {
            return most;
        };
        // A quarter of a second; of the minimum a whole one, or a long line would keep it below that.
        let window = most.min((limit / 4).max(self.min));
        if outstanding >= window && window < most {
            self.held_back = true;
        }
        window
    }

    /// When what waits may go on.
    pub fn ready_at(&self) -> Option<Time> {
        let limit = self.limit()?;
        let owed = u128::from((1 - self.credit).max(0) as u64);
        let after = (owed * 1_000_000_000).div_ceil(u128::from(limit)) as u64;
        self.waiting
            .then(|| Time(self.filled.saturating_add(after)))
    }

    /// Whether an interval is over.
    pub fn due(&self, now: Time) -> bool {
        now.0.saturating_sub(self.began) >= INTERVAL_MS * 1_000_000
    }

    /// Ends an interval. `oldest`: nanoseconds that the oldest write, flush and read without an answer have been waiting.
    pub fn adapt(&mut self, now: Time, oldest: [u64; 3]) {
        let passed = now.0.saturating_sub(self.began).max(1);
        let taken = std::mem::take(&mut self.taken);
        let held_back = std::mem::take(&mut self.held_back);
        self.began = now.0;
        let undisturbed = taken == 0 || self.limit.is_some_and(|limit| limit <= self.min);
        let idle = self.meters.iter().all(|m| m.count == 0) && oldest == [0; 3];
        let mut slow = false;
        for (meter, oldest) in self.meters.iter_mut().zip(oldest) {
            slow |= meter.judge(undisturbed, oldest);
        }
        if slow && (taken > 0 || self.limit.is_some()) {
            let rate = u128::from(taken) * 1_000_000_000 / u128::from(passed);
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            let from = self.limit.map_or(rate, |limit| limit.min(rate));
            self.set(Some((from / 2).max(self.min)), now);
        } else if let Some(limit) = self.limit
            && !slow
            && held_back
        {
            let more = if idle { limit } else { limit / 8 };
            self.set(Some(limit.saturating_add(more.max(self.min))), now);
        } else if !slow && idle && self.limit.is_some() {
            // It goes as fast as it can anyway, or there is nothing to copy.
            self.set(None, now);
        }
    }

    fn set(&mut self, limit: Option<u64>, now: Time) {
        if self.limit().is_none() {
            self.credit = 0;
            self.filled = now.0;
        }
        self.limit = limit.filter(|limit| *limit < self.max);
        if self.limit().is_none() {
            self.waiting = false;
        }
    }
}

impl Core {
    /// The rate is decided anew when it is time to, and what waited for it goes on.
    pub(crate) fn resync_on_time(&mut self, out: &mut Actions) {
        if self.resync_rate.due(self.now) {
            let oldest = self.oldest_requests();
            self.resync_rate.adapt(self.now, oldest);
        } else if self.resync_rate.ready_at().is_none_or(|at| at > self.now) {
            return;
        }
        // Whoever still has something to copy says so again.
        self.resync_rate.waiting = false;
        for at in 0..self.peers.len() {
            if matches!(self.peers[at].relation, Relation::Source) {
                self.pump_source(at, out);
            }
        }
    }

    /// For how long the oldest write, flush and read without an answer have been waiting, in ns. Those that wait for a
    /// missing copy, or for a person, do not wait for a resync.
    fn oldest_requests(&self) -> [u64; 3] {
        let mut oldest = [0; 3];
        let copying = self
            .peers
            .iter()
            .any(|p| matches!(p.relation, Relation::Source));
        if !copying || self.parked || self.suspended {
            return oldest;
        }
        for (_, op) in self.ops.iter() {
            let (kind, arrived) = match op {
                Op::Read { arrived_at, .. } => (Kind::Read, *arrived_at),
                Op::Client(op) if !op.replied && !op.internal => match op.kind() {
                    Some(kind) => (kind, op.arrived_at),
                    None => continue,
                },
                _ => continue,
            };
            let waits = self.now.0.saturating_sub(arrived);
            oldest[kind as usize] = waits.max(oldest[kind as usize]);
        }
        oldest
    }
}

#[cfg(test)]
mod tests;
