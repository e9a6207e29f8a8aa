//! `simulator enumerate`: not random schedules but every one, breadth first, in a small world of the real cores.
//!
//! A schedule is a list of steps that cost one or two ([`crate::schedules`]); level N has every schedule that costs N. Where
//! the world stands after a schedule is put into a short form (`fingerprint.rs`); of schedules that come to the same form one
//! is gone on with. Each is also run to its end: faults stop, people put things right, and the oracle looks at all of it as it
//! does for a seed.

use crate::schedules::{At, Base, SHAPES, Shape, Step, bases, parse, plan, strikes_at};
use crate::{Coverage, Outcome, Stand, Trace, run_to, shrink};
use holdfast_replicator_core::handshake::Row;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What the subcommand was asked for.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// Schedules that cost more are not tried.
    pub level: usize,
    /// No level is begun after so many seconds, and one that runs is left; 0: no such limit.
    pub seconds: u64,
    /// Only shapes with so many copies; 0: all.
    pub copies: usize,
    /// Only these shapes; all if empty.
    pub shapes: Vec<usize>,
    /// Decides what goes on within a step.
    pub seed: u64,
    pub threads: usize,
    /// A row that no meeting came to is a failure.
    pub every_row: bool,
    /// This one alone, with its timeline.
    pub schedule: Option<String>,
    pub everything: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments {
            level: 2,
            seconds: 0,
            copies: 0,
            shapes: Vec::new(),
            seed: 1,
            threads: 1,
            every_row: false,
            schedule: None,
            everything: false,
        }
    }
}

pub const USAGE: &str = "usage: simulator enumerate [--level N] [--seconds S] [--copies N] [--shapes N,N] [--seed N] [--threads T] [--every-row]
       simulator enumerate --shapes N --schedule STEP,STEP [--seed N] [--everything]

Tries every schedule of faults that costs at most N, in small worlds of two and three copies. Exit 1 if one fails.
--level N     a fault costs one, a fault with another one in the midst of what follows costs two (default 2)
--seconds S   stops after so many seconds, and says which levels are whole (default: no limit)
--copies N    only worlds of so many copies
--shapes N,N  only these worlds
--seed N      another order of what goes on within a step (default 1)
--every-row   fails also if a row of the handshake was never reached
--schedule S  runs one schedule, as it was printed, and prints its timeline";

/// Reads them.
pub fn arguments(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut a = Arguments {
        threads: std::thread::available_parallelism().map_or(2, |n| n.get()),
        ..Arguments::default()
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--every-row" => a.every_row = true,
            "--everything" => a.everything = true,
            _ => {
                let value = words
                    .next()
                    .ok_or_else(|| format!("{word} needs a value"))?;
                let number = || {
                    let n = value.parse::<u64>();
                    n.map_err(|_| format!("{word} needs a number, not {value}"))
                };
                match word.as_str() {
                    "--level" => a.level = number()? as usize,
                    "--seconds" => a.seconds = number()?,
                    "--copies" => a.copies = number()? as usize,
                    "--seed" => a.seed = number()?,
                    "--threads" => a.threads = number()?.clamp(1, 64) as usize,
                    "--schedule" => a.schedule = Some(value),
                    "--shapes" => {
                        let shapes = value.split(',').map(|n| n.parse().ok());
                        let shapes: Option<Vec<usize>> = shapes.collect();
                        a.shapes = shapes
                            .filter(|all| all.iter().all(|n| *n < SHAPES.len()))
                            .ok_or_else(|| {
                                format!("--shapes: there are 0 to {}", SHAPES.len() - 1)
                            })?;
                    }
                    other => return Err(format!("unknown argument {other}")),
                }
            }
        }
    }
    if a.schedule.is_some() && a.shapes.len() != 1 {
        return Err("--schedule needs the world it is for: --shapes N".into());
    }
    Ok(a)
}

/// A schedule that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub shape: usize,
    schedule: Vec<Step>,
    pub what: String,
}

impl Failure {
    /// As `--schedule` takes it.
    pub fn schedule(&self) -> String {
        line(&self.schedule)
    }
}

fn line(schedule: &[Step]) -> String {
    let steps: Vec<String> = schedule.iter().map(Step::to_string).collect();
    steps.join(",")
}

/// What became of one shape.
#[derive(Default)]
pub(crate) struct Found {
    pub coverage: Coverage,
    forms: HashSet<u64>,
    pub failures: Vec<Failure>,
    /// Runs that a core ended itself, and how often a planted defect was reached.
    pub crashed: u64,
    pub reached: u64,
    whole: Option<usize>,
}

/// How many worlds there are.
#[cfg(feature = "planted")]
pub(crate) fn worlds() -> usize {
    SHAPES.len()
}

/// One search through the schedules of a shape.
pub(crate) struct Search<'a> {
    pub shape: usize,
    pub arguments: &'a Arguments,
    pub until: Option<Instant>,
    /// A planted defect, and the search ends with the first run that the oracle finds wrong.
    pub defect: Option<usize>,
    pub say: bool,
}

impl Search<'_> {
    fn shape(&self) -> &'static Shape {
        &SHAPES[self.shape]
    }

    fn run(
        &self,
        bases: &[Base],
        schedule: &[Step],
        defect: Option<usize>,
    ) -> (Outcome, Option<Stand>) {
        let (plan, last) = plan(self.shape(), bases, schedule, self.arguments.seed);
        run_to(&plan, Trace::Off, defect, last)
    }

    /// Runs each schedule; where it stood, if it came so far. `None`: the time is over.
    fn level(
        &self,
        bases: &[Base],
        schedules: &[Vec<Step>],
        found: &mut Found,
    ) -> Option<Vec<Option<Stand>>> {
        let next = AtomicUsize::new(0);
        let over = AtomicBool::new(false);
        let results = Mutex::new((&mut *found, vec![None; schedules.len()]));
        std::thread::scope(|scope| {
            for _ in 0..self.arguments.threads {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(schedule) = schedules.get(at) else {
                            return;
                        };
                        if self.until.is_some_and(|until| Instant::now() >= until) {
                            over.store(true, Ordering::Relaxed);
                        }
                        if over.load(Ordering::Relaxed) {
                            return;
                        }
                        let (outcome, stand) = self.run(bases, schedule, self.defect);
                        let counts = outcome
                            .failure
                            .filter(|_| self.defect.is_none() || !outcome.crashed);
                        // A schedule that fails without the defect proves nothing.
                        let failure = counts.filter(|_| {
                            self.defect.is_none()
                                || self.run(bases, schedule, None).0.failure.is_none()
                        });
                        let mut results = results.lock().unwrap_or_else(|e| e.into_inner());
                        let (found, stands) = &mut *results;
                        found.coverage.add(&outcome.coverage);
                        found.crashed += u64::from(outcome.crashed);
                        found.reached += outcome.reached;
                        if let Some(what) = failure {
                            over.fetch_or(self.defect.is_some(), Ordering::Relaxed);
                            found.failures.push(Failure {
                                shape: self.shape,
                                schedule: schedule.clone(),
                                what,
                            });
                        }
                        stands[at] = stand;
                    }
                });
            }
        });
        let (_, stands) = results.into_inner().unwrap_or_else(|e| e.into_inner());
        (!over.load(Ordering::Relaxed)).then_some(stands)
    }

    pub fn search(&self) -> Found {
        let mut found = Found::default();
        let bases = bases(self.shape().modes.len());
        // Per level: schedules that came to a form of their own; and those to strike at points of their last step.
        let mut fresh: Vec<Vec<Vec<Step>>> = Vec::new();
        let mut to_strike: Vec<Vec<Step>> = Vec::new();
        for cost in 0..=self.arguments.level {
            let mut schedules = std::mem::take(&mut to_strike);
            if cost == 0 {
                schedules.push(Vec::new());
            }
            for (base, b) in bases.iter().enumerate().filter(|(_, b)| b.cost <= cost) {
                for before in &fresh[cost - b.cost] {
                    let mut schedule = before.clone();
                    schedule.push(Step {
                        base: base as u16,
                        strike: None,
                    });
                    schedules.push(schedule);
                }
            }
            let Some(stands) = self.level(&bases, &schedules, &mut found) else {
                break;
            };
            // In the order of the schedules, whichever thread came first.
            let mut new = Vec::new();
            for (schedule, stand) in schedules.iter().zip(stands) {
                let Some(stand) = stand else { continue };
                if let Some(last) = schedule.last()
                    && last.strike.is_none()
                    && last.cost(&bases) == 1
                    && bases[usize::from(last.base)].struck
                {
                    for (node, point) in stand.points {
                        for strike in strikes_at(point) {
                            let mut struck = schedule.clone();
                            struck.pop();
                            let at = At {
                                node: node as u8,
                                point: point as u8,
                                strike: *strike,
                            };
                            struck.push(Step {
                                base: last.base,
                                strike: Some(at),
                            });
                            to_strike.push(struck);
                        }
                    }
                }
                if found.forms.insert(stand.form) {
                    new.push(schedule.clone());
                }
            }
            if self.say {
                println!(
                    "world {}, level {cost}: {} schedules, {} new states",
                    self.shape,
                    schedules.len(),
                    new.len()
                );
            }
            fresh.push(new);
            found.whole = Some(cost);
        }
        found
    }
}

/// Runs it; the last line is a summary.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    if let (Some(schedule), [shape]) = (&arguments.schedule, arguments.shapes.as_slice()) {
        return replay(arguments, *shape, schedule);
    }
    let started = Instant::now();
    let wanted = |at: &usize| {
        (arguments.shapes.is_empty() || arguments.shapes.contains(at))
            && (arguments.copies == 0 || SHAPES[*at].modes.len() == arguments.copies)
    };
    let shapes: Vec<usize> = (0..SHAPES.len()).filter(wanted).collect();
    let mut coverage = Coverage::default();
    let (mut states, mut failures) = (0, 0);
    for (i, shape) in shapes.iter().enumerate() {
        println!("world {shape}: {:?}", SHAPES[*shape]);
        // What is left of the time is shared by the shapes that are left.
        let until = (arguments.seconds > 0).then(|| {
            let left = Duration::from_secs(arguments.seconds).saturating_sub(started.elapsed());
            Instant::now() + left / (shapes.len() - i) as u32
        });
        let search = Search {
            shape: *shape,
            arguments,
            until,
            defect: None,
            say: true,
        };
        let found = search.search();
        println!(
            "world {shape}: {} states by {} schedules, whole to level {}, {} failures",
            found.forms.len(),
            found.coverage.seeds,
            found.whole.map_or("none".into(), |w| w.to_string()),
            found.failures.len()
        );
        tell(arguments, &found.failures);
        coverage.add(&found.coverage);
        states += found.forms.len();
        failures += found.failures.len();
    }
    let missing = tell_rows(&coverage);
    let rows = Row::ALL.len() - missing.len();
    println!(
        "{states} states of {} worlds by {} schedules in {:.0} s, {rows} of {} rows of the handshake, {failures} failures",
        shapes.len(),
        coverage.seeds,
        started.elapsed().as_secs_f64(),
        Row::ALL.len()
    );
    if failures == 0 && (missing.is_empty() || !arguments.every_row) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What meetings came to, row by row; those that none came to.
fn tell_rows(coverage: &Coverage) -> Vec<Row> {
    let none = BTreeMap::new();
    let outcomes = coverage.counts.get("outcomes").unwrap_or(&none);
    let mut missing = Vec::new();
    for row in Row::ALL {
        let name = format!("Row {}: ", row.number());
        let of_row = outcomes
            .iter()
            .filter_map(|(o, n)| Some(format!("{} {n}", o.strip_prefix(&name)?)));
        let of_row: Vec<String> = of_row.collect();
        println!(
            "{name}{}",
            if of_row.is_empty() {
                "never reached".into()
            } else {
                of_row.join(", ")
            }
        );
        if of_row.is_empty() {
            missing.push(row);
        }
    }
    missing
}

/// One of each kind, the first with its timeline, made small.
fn tell(arguments: &Arguments, failures: &[Failure]) {
    let mut kinds = BTreeSet::new();
    for failure in failures {
        let kind: String = failure
            .what
            .chars()
            .filter(|c| !c.is_ascii_digit())
            .take(60)
            .collect();
        if !kinds.insert(kind) {
            continue;
        }
        let shape = &SHAPES[failure.shape];
        let bases = bases(shape.modes.len());
        println!("FAILS: {}", failure.what.lines().next().unwrap_or_default());
        for step in &failure.schedule {
            println!("    {}", step.describe(&bases));
        }
        println!(
            "  again: enumerate --seed {} --shapes {} --schedule {}",
            arguments.seed,
            failure.shape,
            failure.schedule()
        );
        if kinds.len() == 1 {
            let (plan, _) = plan(shape, &bases, &failure.schedule, arguments.seed);
            print!(
                "{}",
                crate::run(&shrink(&plan, Duration::from_secs(20)), Trace::Timeline).trace
            );
        }
    }
}

fn replay(arguments: &Arguments, shape: usize, schedule: &str) -> ExitCode {
    let (shape, bases) = (&SHAPES[shape], bases(SHAPES[shape].modes.len()));
    let schedule = match parse(schedule, shape.modes.len()) {
        Ok(schedule) => schedule,
        Err(what) => {
            eprintln!("{what}");
            return ExitCode::from(2);
        }
    };
    println!("{shape:?}");
    for step in &schedule {
        println!("    {}", step.describe(&bases));
    }
    let (plan, last) = plan(shape, &bases, &schedule, arguments.seed);
    let trace = if arguments.everything {
        Trace::Everything
    } else {
        Trace::Timeline
    };
    let (outcome, _) = run_to(&plan, trace, None, last);
    print!("{}", outcome.trace);
    match outcome.failure {
        Some(what) => {
            println!("FAILS: {what}");
            ExitCode::FAILURE
        }
        None => {
            println!("nothing wrong");
            ExitCode::SUCCESS
        }
    }
}
