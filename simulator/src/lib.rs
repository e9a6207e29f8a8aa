//! A deterministic world that runs the real cores from one seed and tries to lose data.
//!
//! Everything that can go wrong comes from the seed: the shape of the cluster, the order of events, faults and
//! orders at the wrong moment.

mod checks;
mod clients;
mod coverage;
mod disk;
mod network;
mod operators;
mod oracle;
mod plan;
mod rng;
mod shrink;
mod world;

pub use coverage::Coverage;
pub use plan::{Fault, FaultKind, Plan};
pub use shrink::shrink;
pub use world::World;

use std::cell::RefCell;
use std::sync::Once;
use std::sync::mpsc::{Sender, channel};

/// How one run ended.
#[derive(Debug)]
pub struct Outcome {
    pub failure: Option<String>,
    pub coverage: Coverage,
    /// The timeline, if it was asked for.
    pub trace: String,
}

/// How much of a timeline to keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trace {
    Off,
    /// Faults, orders, requests, decisions.
    Timeline,
    /// Every action of every core, too.
    Everything,
}

thread_local! {
    /// Where the run of this thread reports to, should its core panic.
    static REPORT: RefCell<Option<Sender<Outcome>>> = const { RefCell::new(None) };
    /// The timeline of the run of this thread: also told if its core panics.
    static TRACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A release build aborts after a panic, so nothing can be caught: the hook reports the run and stops its thread
/// for good. The other threads go on.
fn report_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let Some(report) = REPORT.with(|r| r.take()) else {
                return before(info);
            };
            let place = info.location().map_or(String::new(), ToString::to_string);
            let payload = info.payload();
            let what = payload
                .downcast_ref::<&str>()
                .copied()
                .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            let _ = report.send(Outcome {
                failure: Some(format!("a core panicked: {what} at {place}")),
                coverage: Coverage {
                    seeds: 1,
                    ..Coverage::default()
                },
                trace: TRACE.take(),
            });
            loop {
                std::thread::park();
            }
        }));
    });
}

/// Runs a plan once, on a thread of its own. A panic of a core is a failure like any other.
#[must_use]
pub fn run(plan: &Plan, trace: Trace) -> Outcome {
    report_panics();
    let plan = plan.clone();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        REPORT.with(|r| r.replace(Some(sender.clone())));
        let mut world = World::new(plan);
        if trace != Trace::Off {
            world.keep_trace(trace == Trace::Everything);
        }
        let failure = world.run().err();
        let mut coverage = std::mem::take(&mut world.coverage);
        coverage.seeds = 1;
        REPORT.with(|r| r.take());
        let _ = sender.send(Outcome {
            failure,
            coverage,
            trace: TRACE.take(),
        });
    });
    receiver.recv().unwrap_or_else(|_| Outcome {
        failure: Some("the run ended without a result".into()),
        coverage: Coverage::default(),
        trace: String::new(),
    })
}
