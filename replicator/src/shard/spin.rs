//! Whether to wait for the next event awake.
//!
//! A thread that sleeps is woken in 30 to 60 µs where processors sleep too (a virtual machine, above all); an acknowledgement that
//! is on its way for less than that is fetched sooner by a thread that looks again and again. That costs a processor, so
//! it is tried for some time after each event, less and less often where nothing comes in that time, and not at all while
//! another thread wants the processor.

use std::time::Duration;

/// Longest wait awake, unless it is set.
pub const BUDGET: Duration = Duration::from_micros(50);
/// Processors from which on one is to spare.
const SPARE: usize = 4;
/// Between two looks; one that takes longer was interrupted by somebody who needs the processor more.
const INTERRUPTED: Duration = Duration::from_micros(300);
/// How long the processor is left to others after that.
const PAUSE: Duration = Duration::from_millis(100);
/// After a row of waits in vain only each 2^row-th event is followed by one, up to this row.
const MAX_ROW: u32 = 8;

/// What one look finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    Look,
    Sleep,
}

/// The decision for one thread. Times are since any fixed moment.
#[derive(Debug)]
pub struct Spin {
    budget: Duration,
    /// Waits in vain in a row.
    row: u32,
    /// Events to let pass before the next wait.
    skip: u32,
    paused_until: Duration,
    last_event: Duration,
    last_look: Duration,
    /// It is being waited awake, and whether something came meanwhile.
    awake: bool,
    arrived: bool,
}

impl Spin {
    /// `budget`: how long to wait awake; zero: never.
    pub fn new(budget: Duration) -> Self {
        Spin {
            budget,
            row: 0,
            skip: 0,
            paused_until: Duration::ZERO,
            last_event: Duration::ZERO,
            last_look: Duration::ZERO,
            awake: false,
            arrived: false,
        }
    }

    /// As long as is sane where this process may use `processors` of them. The application and the kernel's network want one each beside
    /// this thread; with fewer, waiting awake takes from them what it gains (docs/performance.md).
    pub fn sane_budget(processors: usize) -> Duration {
        if processors >= SPARE {
            BUDGET
        } else {
            Duration::ZERO
        }
    }

    /// Something was worked on. True: begin to look.
    pub fn event(&mut self, now: Duration) -> bool {
        self.last_event = now;
        if self.awake {
            self.arrived = true;
            return false;
        }
        if self.budget.is_zero() || now < self.paused_until {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.last_look = now;
        self.awake = true;
        true
    }

    /// Everything that was there is done: look again, or sleep?
    pub fn look(&mut self, now: Duration) -> Next {
        let took = now.saturating_sub(self.last_look);
        self.last_look = now;
        if std::mem::take(&mut self.arrived) {
            // Work of its own makes a turn long too. It was awake in time, and that is what counts.
            self.row = 0;
        } else if took > INTERRUPTED {
            self.paused_until = now + PAUSE;
            self.awake = false;
            return Next::Sleep;
        }
        if now.saturating_sub(self.last_event) < self.budget {
            return Next::Look;
        }
        self.row = (self.row + 1).min(MAX_ROW);
        self.skip = (1 << self.row) - 1;
        self.awake = false;
        Next::Sleep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// Looks each microsecond from `now` until it sleeps; when that was.
    fn until_sleep(spin: &mut Spin, mut now: Duration) -> Duration {
        loop {
            now += us(1);
            if spin.look(now) == Next::Sleep {
                return now;
            }
        }
    }

    #[test]
    fn it_waits_no_longer_than_the_budget_and_an_event_begins_anew() {
        let mut spin = Spin::new(us(100));
        assert!(spin.event(us(1000)));
        for now in 1001..1050 {
            assert_eq!(spin.look(us(now)), Next::Look);
        }
        spin.event(us(1050));
        assert_eq!(until_sleep(&mut spin, us(1050)), us(1150));
    }

    #[test]
    fn waits_in_vain_become_rare_and_one_that_pays_brings_them_back() {
        let mut spin = Spin::new(us(100));
        let mut waits = 0;
        for event in 1..=10_000u64 {
            let now = us(event * 1000);
            if spin.event(now) {
                waits += 1;
                until_sleep(&mut spin, now);
            }
        }
        assert!((30..60).contains(&waits), "{waits} of 10000");
        let mut now = us(20_000_000);
        while !spin.event(now) {
            now += us(1000);
        }
        assert_eq!(spin.look(now + us(10)), Next::Look);
        spin.event(now + us(20));
        assert_eq!(spin.look(now + us(21)), Next::Look);
        assert_eq!(spin.row, 0);
    }

    #[test]
    fn it_sleeps_at_once_where_another_needs_the_processor() {
        let mut spin = Spin::new(us(100));
        spin.event(us(0));
        spin.look(us(1));
        assert_eq!(spin.look(us(4000)), Next::Sleep);
        assert!(!spin.event(us(5000)));
        assert!(!spin.event(us(90_000)));
        assert!(spin.event(us(104_001)));
    }

    #[test]
    fn long_work_is_no_interruption() {
        let mut spin = Spin::new(us(100));
        spin.event(us(0));
        spin.look(us(1));
        spin.event(us(4000));
        assert_eq!(spin.look(us(4001)), Next::Look);
    }

    #[test]
    fn few_processors_or_no_budget_means_never() {
        assert_eq!(Spin::sane_budget(1), Duration::ZERO);
        assert_eq!(Spin::sane_budget(SPARE - 1), Duration::ZERO);
        assert_eq!(Spin::sane_budget(SPARE), BUDGET);
        assert!(!Spin::new(Duration::ZERO).event(us(5)));
    }
}
