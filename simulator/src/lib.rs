//! A deterministic world that runs the real cores from one seed and tries to lose data.
//!
//! Everything that can go wrong comes from the seed: the shape of the cluster, the order of events, faults and
//! orders at the wrong moment.

mod changes;
mod checks;
mod clients;
mod coverage;
mod disk;
mod disks;
pub mod enumerate;
pub mod families;
mod fingerprint;
pub mod mutants;
mod network;
mod operators;
mod oracle;
mod plan;
mod processes;
mod register;
mod rng;
mod schedules;
mod shell;
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
    /// A core noticed something itself: a panic, or a halt.
    pub crashed: bool,
    /// How often the planted defect was reached.
    pub reached: u64,
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
                crashed: true,
                reached: reached(),
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
    run_with(plan, trace, None)
}

fn choose(defect: Option<usize>) {
    #[cfg(feature = "planted")]
    holdfast_replicator_core::planted::choose(defect);
    #[cfg(not(feature = "planted"))]
    let _ = defect;
}

fn reached() -> u64 {
    #[cfg(feature = "planted")]
    return holdfast_replicator_core::planted::reached();
    #[cfg(not(feature = "planted"))]
    0
}

/// Where a world stood when its faults stopped, and what it came by since a given moment.
#[derive(Clone, Debug)]
pub(crate) struct Stand {
    /// [`World::fingerprint`].
    pub form: u64,
    /// Points of [`plan::TRIGGERS`], each with the node that came there.
    pub points: Vec<(usize, usize)>,
}

/// The same with a defect, and where the world stood when the faults stopped; `None` if it did not come to that.
pub(crate) fn run_to(
    plan: &Plan,
    trace: Trace,
    defect: Option<usize>,
    points_from: u64,
) -> (Outcome, Option<Stand>) {
    let (sender, receiver) = channel();
    let at = plan.duration - 1;
    let outcome = run_driven(plan, trace, defect, move |world| {
        world.points_from = points_from;
        world.run_until(at)?;
        let _ = sender.send(Stand {
            form: world.fingerprint(),
            points: std::mem::take(&mut world.points).into_iter().collect(),
        });
        world.points_from = u64::MAX;
        world.run()
    });
    (outcome, receiver.try_recv().ok())
}

/// The same, with a defect planted in its cores, by its place in the table of them.
pub(crate) fn run_with(plan: &Plan, trace: Trace, defect: Option<usize>) -> Outcome {
    run_driven(plan, trace, defect, World::run)
}

fn run_driven(
    plan: &Plan,
    trace: Trace,
    defect: Option<usize>,
    drive: impl FnOnce(&mut World) -> Result<(), String> + Send + 'static,
) -> Outcome {
    report_panics();
    let plan = plan.clone();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        REPORT.with(|r| r.replace(Some(sender.clone())));
        choose(defect);
        let mut world = World::new(plan);
        if trace != Trace::Off {
            world.keep_trace(trace == Trace::Everything);
        }
        let failure = drive(&mut world).err();
        let mut coverage = std::mem::take(&mut world.coverage);
        coverage.seeds = 1;
        REPORT.with(|r| r.take());
        let _ = sender.send(Outcome {
            failure,
            coverage,
            trace: TRACE.take(),
            crashed: world.halted,
            reached: reached(),
        });
    });
    receiver.recv().unwrap_or_else(|_| Outcome {
        failure: Some("the run ended without a result".into()),
        coverage: Coverage::default(),
        trace: String::new(),
        crashed: true,
        reached: 0,
    })
}
