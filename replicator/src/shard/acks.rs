//! How long a peer takes to acknowledge: the shell's own look at frames as they go by, for the metrics alone.

use holdfast_replicator_core::api::Time;
use holdfast_wire_format::ids::Position;
use std::collections::VecDeque;

/// Most writes followed at the same time; what is sent beyond them is not measured.
const FOLLOWED: usize = 16 << 10;

/// Writes sent in one session and not acknowledged, in order of position.
#[derive(Default)]
pub(super) struct AckTimes {
    /// Position and moment of sending; the moment is none once it is acknowledged.
    sent: VecDeque<(Position, Option<Time>)>,
}

impl AckTimes {
    /// A write was given to the link.
    pub fn sent(&mut self, position: Position, now: Time) {
        let rises = self.sent.back().is_none_or(|(last, _)| *last < position);
        if rises && self.sent.len() < FOLLOWED {
            self.sent.push_back((position, Some(now)));
        }
    }

    /// Everything from `first` to `last` is acknowledged; `each` gets the nanoseconds of those that were not before.
    pub fn acknowledged(
        &mut self,
        first: Position,
        last: Position,
        now: Time,
        mut each: impl FnMut(u64),
    ) {
        let from = self.sent.partition_point(|(position, _)| *position < first);
        for (position, since) in self.sent.range_mut(from..) {
            if *position > last {
                break;
            }
            if let Some(since) = since.take() {
                each(now.0.saturating_sub(since.0));
            }
        }
        while self.sent.front().is_some_and(|(_, since)| since.is_none()) {
            self.sent.pop_front();
        }
    }

    /// The session ended.
    pub fn clear(&mut self) {
        self.sent.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_write_is_measured_once_whatever_the_order() {
        let mut times = AckTimes::default();
        for position in 1..=5 {
            times.sent(position, Time(position * 10));
        }
        let mut seen = Vec::new();
        times.acknowledged(3, 4, Time(100), |took| seen.push(took));
        times.acknowledged(1, 3, Time(100), |took| seen.push(took));
        times.acknowledged(0, 9, Time(100), |took| seen.push(took));
        assert_eq!(seen, [70, 60, 90, 80, 50]);
        assert!(times.sent.is_empty());
    }
}
