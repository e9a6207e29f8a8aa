//! Pauses between attempts, spread by a seeded generator so that two runs with one seed pause alike.

use std::cell::Cell;
use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(2);

/// A pause that doubles from 100 ms to 2 s.
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub fn new() -> Self {
        Backoff { next: SHORTEST }
    }

    pub fn reset(&mut self) {
        self.next = SHORTEST;
    }

    /// How long to pause now: between half and the whole of the current step.
    pub fn pause(&mut self, jitter: &Jitter) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(LONGEST);
        step / 2 + step.mul_f64(jitter.fraction() / 2.0)
    }
}

/// Pseudo-random fractions (xorshift64*).
pub(crate) struct Jitter(Cell<u64>);

impl Jitter {
    pub fn new(seed: u64) -> Self {
        Jitter(Cell::new(seed ^ 0x9e37_79b9_7f4a_7c15 | 1))
    }

    fn fraction(&self) -> f64 {
        let mut state = self.0.get();
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.0.set(state);
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_bounds_and_repeat_with_the_seed() {
        let run = |seed| {
            let (mut backoff, jitter) = (Backoff::new(), Jitter::new(seed));
            (0..12).map(|_| backoff.pause(&jitter)).collect::<Vec<_>>()
        };
        let pauses = run(7);
        assert_eq!(pauses, run(7));
        assert_ne!(pauses, run(8));
        for (step, pause) in pauses.iter().enumerate() {
            let whole = (SHORTEST * 2u32.pow(step as u32)).min(LONGEST);
            assert!(
                *pause >= whole / 2 && *pause <= whole,
                "step {step}: {pause:?}"
            );
        }
    }
}
