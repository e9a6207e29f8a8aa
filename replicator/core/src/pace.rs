//! How fast a resync gets on, for the person who waits for it.
//!
//! What counts is not how much was copied but how much less is left: an application that writes over what is to be copied makes work as fast as it
//! is done, and an end that is reckoned from the copied bytes alone then moves away for ever. So both are measured over the last seconds.

use crate::api::Time;
use std::collections::VecDeque;

/// Between two samples, in ms.
const EVERY_MS: u64 = 500;
/// How many are kept: ten seconds.
const SAMPLES: usize = 20;
/// Nothing is said before this much was seen, in ms.
const FIRST_MS: u64 = 500;

/// Samples of what is left and of what was copied, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    samples: VecDeque<(Time, u64, u64)>,
}

/// What the last seconds say, in bytes per second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub copied: u64,
    /// By how much less is left; below zero: more.
    pub gained: i64,
}

impl Pace {
    /// To be told now and then.
    pub fn note(&mut self, now: Time, left: u64, copied: u64) {
        if let Some(last) = self.samples.back()
            && now.ms_since(last.0) < EVERY_MS
        {
            return;
        }
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((now, left, copied));
    }

    /// What was seen up to now; `None` while that is too little to say anything.
    pub fn seen(&self, now: Time, left: u64, copied: u64) -> Option<Seen> {
        let (since, was_left, was_copied) = self.samples.front().copied()?;
        let ms = now.ms_since(since);
        if ms < FIRST_MS {
            return None;
        }
        let gained = (i128::from(was_left) - i128::from(left)) * 1000 / i128::from(ms);
        Some(Seen {
            copied: copied.saturating_sub(was_copied).saturating_mul(1000) / ms,
            gained: i64::try_from(gained).unwrap_or(if gained < 0 { i64::MIN } else { i64::MAX }),
        })
    }
}

impl Seen {
    /// When nothing is left, in ms, if it goes on like this; `None`: never.
    pub fn end(&self, left: u64) -> Option<u64> {
        let gained = u64::try_from(self.gained).ok().filter(|g| *g > 0)?;
        Some(left.saturating_mul(1000) / gained)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(ms: u64) -> Time {
        Time(0).after_ms(ms)
    }

    #[test]
    fn an_end_is_reckoned_from_what_is_left() {
        let mut pace = Pace::default();
        assert_eq!(pace.seen(at(0), 100 * MIB, 0), None);
        // 10 MiB/s are copied, and the application makes 4 MiB/s of it anew.
        for second in 0..5 {
            pace.note(
                at(second * 1000),
                (100 - 6 * second) * MIB,
                10 * second * MIB,
            );
        }
        let seen = pace.seen(at(5000), 70 * MIB, 50 * MIB).expect("seen");
        assert_eq!(seen.copied, 10 * MIB);
        assert_eq!(seen.gained, 6 * MIB as i64);
        assert_eq!(seen.end(72 * MIB), Some(12_000));
    }

    #[test]
    fn no_end_is_told_where_as_much_is_made_as_is_copied() {
        let mut pace = Pace::default();
        for second in 0..5 {
            pace.note(at(second * 1000), 100 * MIB, 10 * second * MIB);
        }
        let seen = pace.seen(at(5000), 100 * MIB, 50 * MIB).expect("seen");
        assert_eq!((seen.copied, seen.end(100 * MIB)), (10 * MIB, None));
        let seen = pace.seen(at(5000), 110 * MIB, 50 * MIB).expect("seen");
        assert_eq!(seen.end(110 * MIB), None);
    }

    #[test]
    fn the_last_seconds_count_and_not_the_whole_time() {
        let mut pace = Pace::default();
        // A minute at full speed, then the rate falls to a tenth.
        for half in 0..120 {
            pace.note(at(half * 500), (10_000 - 50 * half) * MIB, 50 * half * MIB);
        }
        for half in 0..20 {
            pace.note(
                at(60_000 + half * 500),
                (4000 - 5 * half) * MIB,
                (6000 + 5 * half) * MIB,
            );
        }
        let seen = pace.seen(at(70_000), 3900 * MIB, 6100 * MIB).expect("seen");
        assert_eq!(seen.copied, 10 * MIB);
        assert_eq!(seen.end(3900 * MIB), Some(390_000));
    }

    #[test]
    fn often_told_is_often_enough() {
        let mut pace = Pace::default();
        for ms in 0..2000 {
            pace.note(at(ms), 1000 - ms / 2, ms / 2);
        }
        assert_eq!(pace.samples.len(), 4);
    }
}
