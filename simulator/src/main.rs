//! `cargo run --release -p simulator -- --seeds N [--first-seed S] [--json]`, or `--seed S` to look at one.

use simulator::{Coverage, Plan, Trace, enumerate, mutants, run, shrink};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const USAGE: &str =
    "usage: simulator --seeds N [--first-seed S] [--json] [--threads T] [--family NAME] [--without KIND,KIND]
       simulator enumerate [--level N] [--seconds S] [--copies N] [--shapes N,N] [--threads T]
       simulator mutants [--seeds N] [--json] [--list] [--all] [--schedules] [--threads T] [NAME...]
       simulator --seed S [--no-shrink] [--everything] [--repeat] [--without KIND,KIND]

Runs the replicator's cores in a deterministic world, one run per seed. Exit 1 if a seed fails.
--seed S      replays one seed, makes its schedule smaller and prints the timeline
--repeat      runs the seed twice and says where the two runs part, if they do
--copies N    only seeds with so many copies, beside those of simulator/seeds.txt
--family NAME plans of that family: one kind of trouble, again and again (docs/simulator.md)
--changes     people grow volumes, change modes and take disks out of use as well, and senders say nonsense
--register    the record of who may write is in a register of the cluster, as with an agent
--skip        leaves these seeds out
--first-failure  no more seeds once one fails
--without     leaves faults of these kinds out (names as in the report, spaces as '-')";

struct Arguments {
    seeds: u64,
    first: u64,
    one: Option<u64>,
    json: bool,
    shrink: bool,
    everything: bool,
    repeat: bool,
    first_failure: bool,
    skip: Vec<u64>,
    threads: usize,
    without: Vec<String>,
    copies: Option<u64>,
    register: bool,
    changes: bool,
    /// Plans of this family.
    family: Option<usize>,
}

fn arguments() -> Result<Arguments, String> {
    let mut a = Arguments {
        seeds: 1000,
        first: 1,
        one: None,
        json: false,
        shrink: true,
        everything: false,
        repeat: false,
        first_failure: false,
        skip: Vec::new(),
        threads: threads(),
        without: Vec::new(),
        copies: None,
        register: false,
        changes: false,
        family: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            words
                .next()
                .and_then(|w| w.parse::<u64>().ok())
                .ok_or_else(|| format!("{word} needs a number"))
        };
        match word.as_str() {
            "--seeds" => a.seeds = number()?,
            "--first-seed" => a.first = number()?,
            "--seed" => a.one = Some(number()?),
            "--threads" => a.threads = number()?.clamp(1, 64) as usize,
            "--copies" => a.copies = Some(number()?),
            "--json" => a.json = true,
            "--register" => a.register = true,
            "--changes" => a.changes = true,
            "--family" => a.family = Some(family(words.next())?),
            "--no-shrink" => a.shrink = false,
            "--first-failure" => a.first_failure = true,
            "--repeat" => a.repeat = true,
            "--everything" => a.everything = true,
            "--skip" => {
                let list = words.next().ok_or("--skip needs a list")?;
                for seed in list.split(',').filter(|s| !s.is_empty()) {
                    let seed = seed.parse().map_err(|_| "--skip needs seeds")?;
                    a.skip.push(seed);
                }
            }
            "--without" => {
                let list = words.next().ok_or("--without needs a list")?;
                a.without
                    .extend(list.split(',').map(|k| k.replace('-', " ")));
            }
            other => return Err(format!("unknown argument {other}")),
        }
    }
    Ok(a)
}

/// A family's place among them.
fn family(name: Option<String>) -> Result<usize, String> {
    let names = simulator::families::FAMILIES;
    let at = names.iter().position(|f| Some(*f) == name.as_deref());
    at.ok_or_else(|| format!("--family needs one of {}", names.join(", ")))
}

fn plan_of(seed: u64, arguments: &Arguments) -> Plan {
    let without = &arguments.without;
    let mut plan = Plan::of(seed);
    plan.register = arguments.register;
    if arguments.changes {
        plan = plan.with_changes();
    }
    if let Some(family) = arguments.family {
        plan = Plan::in_family(seed, family);
    }
    plan.faults
        .retain(|f| !without.iter().any(|w| w == f.kind.name()));
    plan
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get())
}

fn mutants(words: impl Iterator<Item = String>) -> Result<mutants::Arguments, String> {
    let mut a = mutants::Arguments {
        seeds: 2000,
        json: false,
        list: false,
        all: false,
        schedules: false,
        no_schedules: false,
        level: 2,
        fresh: false,
        family: None,
        first: 1,
        threads: threads(),
        names: Vec::new(),
    };
    let mut words = words;
    while let Some(word) = words.next() {
        let mut number = || {
            words
                .next()
                .and_then(|w| w.parse::<u64>().ok())
                .ok_or_else(|| format!("{word} needs a number"))
        };
        match word.as_str() {
            "--seeds" => a.seeds = number()?,
            "--threads" => a.threads = number()?.clamp(1, 64) as usize,
            "--json" => a.json = true,
            "--list" => a.list = true,
            "--all" => a.all = true,
            "--schedules" => a.schedules = true,
            "--no-schedules" => a.no_schedules = true,
            "--level" => a.level = number()? as usize,
            "--fresh" => a.fresh = true,
            "--family" => a.family = Some(family(words.next())?),
            "--first-seed" => a.first = number()?,
            other if other.starts_with('-') => return Err(format!("unknown argument {other}")),
            _ => a.names.push(word),
        }
    }
    Ok(a)
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("enumerate") {
        return match enumerate::arguments(std::env::args().skip(2)) {
            Ok(a) => enumerate::run(&a),
            Err(text) => {
                eprintln!("{text}\n{}", enumerate::USAGE);
                ExitCode::from(2)
            }
        };
    }
    if std::env::args().nth(1).as_deref() == Some("families") {
        println!("{}", simulator::families::FAMILIES.join("\n"));
        return ExitCode::SUCCESS;
    }
    if std::env::args().nth(1).as_deref() == Some("mutants") {
        return match mutants(std::env::args().skip(2)) {
            Ok(a) => mutants::run(&a),
            Err(text) => {
                eprintln!("{text}\n{}", mutants::USAGE);
                ExitCode::from(2)
            }
        };
    }
    let arguments = match arguments() {
        Ok(a) => a,
        Err(text) => {
            eprintln!("{text}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match arguments.one {
        Some(seed) if arguments.repeat => repeat(seed, &arguments),
        Some(seed) => one(seed, &arguments),
        None => many(&arguments),
    }
}

/// Runs a seed twice: both must do the same to the last byte.
fn repeat(seed: u64, arguments: &Arguments) -> ExitCode {
    let plan = plan_of(seed, arguments);
    let [a, b] = [(); 2].map(|()| run(&plan, Trace::Everything).trace);
    if a == b {
        println!(
            "seed {seed}: two runs, {} lines, the same",
            a.lines().count()
        );
        return ExitCode::SUCCESS;
    }
    let parts = a.lines().zip(b.lines()).position(|(x, y)| x != y);
    println!("seed {seed}: the runs part at line {parts:?}:");
    for text in [&a, &b] {
        let line = parts.and_then(|at| text.lines().nth(at));
        println!("{}", line.unwrap_or("(nothing more)"));
    }
    ExitCode::FAILURE
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let mut plan = plan_of(seed, arguments);
    if arguments.shrink && run(&plan, Trace::Off).failure.is_some() {
        plan = shrink(&plan, Duration::from_secs(60));
    }
    let trace = if arguments.everything {
        Trace::Everything
    } else {
        Trace::Timeline
    };
    let outcome = run(&plan, trace);
    println!(
        "seed {seed}: {} copies {:?}, {:?}, volumes {:?} sectors, grain 2^{}, extents 2^{}, clients {} × {}, latency {} µs, disk {} µs",
        plan.copies,
        plan.modes,
        plan.policy,
        plan.volumes,
        plan.grain_shift,
        plan.extent_shift,
        plan.clients,
        plan.depth,
        plan.latency / 1000,
        plan.disk_ns / 1000
    );
    print!("{}", outcome.trace);
    match outcome.failure {
        Some(what) => {
            println!("seed {seed} FAILS: {what}");
            ExitCode::FAILURE
        }
        None => {
            print!("{}", outcome.coverage.report());
            println!("seed {seed}: nothing wrong");
            ExitCode::SUCCESS
        }
    }
}

/// Seeds that ever failed, one a line; text after the number says what was wrong.
const KNOWN: &str = include_str!("../seeds.txt");

fn many(arguments: &Arguments) -> ExitCode {
    // In a family their numbers mean something else.
    let known: Vec<u64> = KNOWN
        .lines()
        .filter(|_| arguments.family.is_none())
        .filter_map(|l| l.split_whitespace().next()?.parse().ok())
        .collect();
    let total = known.len() as u64 + arguments.seeds;
    let seed_at = |i: u64| {
        known
            .get(i as usize)
            .copied()
            .unwrap_or_else(|| arguments.first + i - known.len() as u64)
    };
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let sum = Mutex::new((Coverage::default(), Vec::<(u64, String)>::new()));
    let each = Mutex::new(Vec::<[u64; 4]>::new());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= total || (arguments.first_failure && failed.load(Ordering::Relaxed)) {
                        return;
                    }
                    let seed = seed_at(i);
                    if arguments.skip.contains(&seed) {
                        continue;
                    }
                    let plan = plan_of(seed, arguments);
                    // Seeds that failed once are always run.
                    let fresh = i >= known.len() as u64;
                    if fresh && arguments.copies.is_some_and(|n| n != plan.copies as u64) {
                        continue;
                    }
                    let outcome = run(&plan, Trace::Off);
                    let c = &outcome.coverage;
                    each.lock().unwrap_or_else(|e| e.into_inner()).push([
                        c.io() + c.faults,
                        c.faults,
                        c.power_cuts,
                        c.promotions(),
                    ]);
                    let mut sum = sum.lock().unwrap_or_else(|e| e.into_inner());
                    sum.0.add(&outcome.coverage);
                    if let Some(failure) = outcome.failure {
                        if !arguments.json {
                            let line = failure.lines().next().unwrap_or_default();
                            println!("seed {seed} FAILS: {line}");
                        }
                        failed.store(true, Ordering::Relaxed);
                        sum.1.push((seed, failure));
                    }
                }
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let (coverage, mut failures) = sum.into_inner().unwrap_or_else(|e| e.into_inner());
    failures.sort();
    let mut each = each.into_inner().unwrap_or_else(|e| e.into_inner());
    let [events, faults, cuts, promotions] = [0, 1, 2, 3].map(|of| {
        each.sort_unstable_by_key(|e| e[of]);
        let at = |per_cent: usize| each.get(each.len() * per_cent / 100).map_or(0, |e| e[of]);
        [at(0), at(10), at(50)]
    });
    let hours = coverage.virtual_ns as f64 / 3.6e12;
    let rate = coverage.seeds as f64 / seconds;
    if !arguments.json {
        print!("{}", coverage.report());
        println!(
            "a seed, median: {} I/O and faults (least {}, a tenth below {}), {} faults, {} power cuts, {} promotions",
            events[2], events[0], events[1], faults[2], cuts[2], promotions[2]
        );
        println!(
            "{} seeds in {seconds:.1} s ({rate:.1} a second), {hours:.2} virtual hours, {:.0} I/O and {:.1} faults a seed, {} failures",
            coverage.seeds,
            coverage.io() as f64 / coverage.seeds.max(1) as f64,
            coverage.faults as f64 / coverage.seeds.max(1) as f64,
            failures.len()
        );
    }
    let line = serde_json::json!({
        "seeds": coverage.seeds,
        "failures": failures.len(),
        "failing_seeds": failures.iter().map(|f| f.0).collect::<Vec<_>>(),
        "first_failure": failures.first().and_then(|f| f.1.lines().next()),
        "seconds": seconds,
        "seeds_per_second": rate,
        "virtual_hours": hours,
        "io": coverage.io(),
        "requests": coverage.requests,
        "faults": coverage.faults,
        "median": {
            "events": events[2],
            "faults": faults[2],
            "power_cuts": cuts[2],
            "promotions": promotions[2],
        },
        "least_events": events[0],
        "coverage": coverage.counts,
    });
    if arguments.json {
        println!("{line}");
    }
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
