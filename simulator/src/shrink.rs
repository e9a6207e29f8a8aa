//! Makes a failing schedule small: leaves out faults and requests, one group after the other, while it still fails.

use crate::plan::Plan;
use crate::{Trace, run};
use std::time::{Duration, Instant};

/// The smallest plan found within the time given, and how it fails. Only ever leaves things out.
#[must_use]
pub fn shrink(plan: &Plan, limit: Duration) -> Plan {
    let started = Instant::now();
    let mut best = plan.clone();
    let kind = |plan: &Plan| run(plan, Trace::Off).failure.map(|f| class(&f));
    let Some(wanted) = kind(&best) else {
        return best;
    };
    let fails = |candidate: &Plan| {
        started.elapsed() < limit && kind(candidate).is_some_and(|k| k == wanted)
    };
    loop {
        let before = (
            best.faults.len(),
            best.clients,
            best.depth,
            best.dropped_requests.len(),
        );
        // Faults, in halves, quarters, …, one by one.
        let mut size = best.faults.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < best.faults.len() {
                let mut candidate = best.clone();
                candidate
                    .faults
                    .drain(at..(at + size).min(best.faults.len()));
                if fails(&candidate) {
                    best = candidate;
                } else {
                    at += size;
                }
            }
            size /= 2;
        }
        while best.clients > 1 {
            let mut candidate = best.clone();
            candidate.clients -= 1;
            if !fails(&candidate) {
                break;
            }
            best = candidate;
        }
        while best.copies > 2 {
            let mut candidate = best.clone();
            candidate.copies -= 1;
            candidate.modes.pop();
            candidate.faults.retain(|f| f.kind.within(candidate.copies));
            if !fails(&candidate) {
                break;
            }
            best = candidate;
        }
        // Requests: all of a client from some number on, then runs of them.
        for client in 0..best.clients {
            let mut size = 1024;
            while size > 0 {
                let mut first = 0;
                while first < 4096 {
                    let mut candidate = best.clone();
                    let before = candidate.dropped_requests.len();
                    candidate
                        .dropped_requests
                        .extend((first..first + size).map(|n| (client, n)));
                    if candidate.dropped_requests.len() > before && fails(&candidate) {
                        best = candidate;
                    }
                    first += size;
                    if started.elapsed() >= limit {
                        return best;
                    }
                }
                size /= 4;
            }
        }
        let after = (
            best.faults.len(),
            best.clients,
            best.depth,
            best.dropped_requests.len(),
        );
        if before == after || started.elapsed() >= limit {
            return best;
        }
    }
}

/// What kind of failure a message is: its words, without the numbers.
fn class(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let words: Vec<&str> = line
        .split_whitespace()
        .filter(|w| !w.chars().any(|c| c.is_ascii_digit()))
        .take(6)
        .collect();
    words.join(" ")
}
