//! `simulator mutants`: breaks the core in every way of `replicator/core/src/planted.rs`, one at a time, and shows which
//! seed notices it and how.
//!
//! The defects exist in a build of their own alone, which the subcommand makes for itself and then becomes.

/// What the subcommand was asked for.
#[derive(Debug)]
pub struct Arguments {
    /// So many seeds are tried before a defect counts as not noticed.
    pub seeds: u64,
    pub json: bool,
    pub list: bool,
    /// Also those that are known not to be noticed.
    pub all: bool,
    /// All by the enumeration, none by seeds.
    pub schedules: bool,
    /// Not those that only the enumeration notices.
    pub no_schedules: bool,
    /// Of the enumeration.
    pub level: usize,
    /// Not where they were noticed before: the whole search.
    pub fresh: bool,
    /// Only plans of this family, by its place among them.
    pub family: Option<usize>,
    /// From this seed of each family on.
    pub first: u64,
    pub threads: usize,
    /// Only these; all if empty.
    pub names: Vec<String>,
}

pub const USAGE: &str =
    "usage: simulator mutants [--seeds N] [--json] [--list] [--all] [--fresh] [--family NAME] [--first-seed S] [--schedules|--no-schedules] [--threads T] [NAME...]

Plants one defect after the other into the core and runs seeds, or every schedule of `enumerate`, until the oracle notices it. Exit 1 if one is never noticed.
--seeds N     tries so many seeds for each (default 2000)
--fresh       searches from the first seed, not from where each was noticed before (simulator/mutants.txt)
--family NAME searches among the plans of this family alone; --first-seed S from that seed on
--list        names the defects
--schedules   uses the enumeration for each, also where seeds are known to do
--level N     of the enumeration (default 2)
--all         also plants those that are known not to be noticed (docs/simulator.md)";

#[cfg(not(feature = "planted"))]
pub use build::run;
#[cfg(feature = "planted")]
pub use hunt::run;

#[cfg(not(feature = "planted"))]
mod build {
    use super::Arguments;
    use std::path::Path;
    use std::process::{Command, ExitCode};

    /// Builds the simulator with the defects in a directory of its own, and hands over to it.
    pub fn run(_: &Arguments) -> ExitCode {
        match handed_over() {
            Ok(code) => code,
            Err(what) => {
                eprintln!("{what}");
                ExitCode::from(2)
            }
        }
    }

    fn handed_over() -> Result<ExitCode, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .ok_or("the simulator stands outside a workspace")?;
        let me = std::env::current_exe().map_err(|e| format!("where this program is: {e}"))?;
        // target/release/simulator: beside `release`.
        let target = me.ancestors().nth(2).unwrap_or(root).join("planted");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        eprintln!("building the simulator with planted defects");
        let built = Command::new(&cargo)
            .args(["build", "--release", "-p", "simulator", "--features"])
            .args(["planted", "--target-dir"])
            .arg(&target)
            .current_dir(root)
            .status()
            .map_err(|e| format!("{}: {e}", cargo.display()))?;
        if !built.success() {
            return Err(format!("the build with planted defects ended with {built}"));
        }
        let program = target.join("release").join("simulator");
        let ended = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .status()
            .map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(match ended.code() {
            Some(code) => ExitCode::from(code.clamp(0, 255) as u8),
            None => return Err(format!("{} ended with {ended}", program.display())),
        })
    }
}

#[cfg(feature = "planted")]
mod hunt {
    use super::Arguments;
    use crate::enumerate::{self, Search};
    use crate::families::FAMILIES;
    use crate::{Plan, Trace, run_with, schedules};
    use holdfast_replicator_core::planted::{DEFECTS, Defect, Noticed};
    use std::collections::BTreeMap;
    use std::process::ExitCode;
    use std::sync::Mutex;

    /// Seeds given to a thread at once.
    const BATCH: u64 = 8;

    #[derive(Default)]
    struct Hunt {
        /// Place in the table.
        defect: usize,
        next: u64,
        in_flight: u64,
        runs: u64,
        reached: u64,
        /// Runs that ended in a panic or halt: the core noticed something itself, which does not count.
        crashed: u64,
        /// The first try whose run the oracle found wrong, and how.
        noticed: Option<(u64, String)>,
        /// The schedule that shows it, as `enumerate` takes it, and how.
        scheduled: Option<(String, String)>,
    }

    /// Where each defect was noticed when somebody last looked: name, family and seed, or `schedule`, the world and the schedule. Tried
    /// first; a change of the core or of the plans may move it, and then the search goes on as for a defect that nobody has seen yet.
    const KNOWN: &str = include_str!("../mutants.txt");

    fn known(name: &str) -> Option<(&str, u64, &str)> {
        let mut lines = KNOWN.lines().map(str::split_whitespace);
        let mut words = lines.find_map(|mut w| (w.next() == Some(name)).then_some(w))?;
        let (kind, number) = (words.next()?, words.next()?.parse().ok()?);
        Some((kind, number, words.next().unwrap_or_default()))
    }

    /// Try number so-and-so of a defect: the place where it was noticed before, then the families in turn, seed by seed.
    fn tried(arguments: &Arguments, name: &str, number: u64) -> (usize, u64) {
        if let (1, false, Some((family, seed, _))) = (number, arguments.fresh, known(name))
            && let Some(family) = FAMILIES.iter().position(|f| *f == family)
        {
            return (family, seed);
        }
        if let Some(family) = arguments.family {
            return (family, arguments.first + number - 1);
        }
        let families = FAMILIES.len() as u64;
        (
            (number % families) as usize,
            arguments.first + number / families,
        )
    }

    /// Runs the chosen defects. Success if the oracle notices every one.
    pub fn run(arguments: &Arguments) -> ExitCode {
        let wanted = |d: &Defect| {
            if arguments.names.is_empty() {
                let scheduled = d.noticed == Noticed::Schedules;
                (d.noticed != Noticed::Nothing || arguments.all)
                    && !(scheduled && arguments.no_schedules)
            } else {
                arguments.names.iter().any(|n| n == d.name)
            }
        };
        for name in &arguments.names {
            if !DEFECTS.iter().any(|d| d.name == name) {
                eprintln!("no defect is called {name}");
                return ExitCode::from(2);
            }
        }
        if arguments.list {
            for d in DEFECTS.iter().filter(|d| wanted(d)) {
                println!("{:32} {:10} {}", d.name, d.breaks, d.what);
            }
            return ExitCode::SUCCESS;
        }
        let hunts = DEFECTS.iter().enumerate().filter(|(_, d)| wanted(d));
        let hunts: Vec<Hunt> = hunts
            .map(|(defect, _)| Hunt {
                defect,
                next: 1,
                ..Hunt::default()
            })
            .collect();
        let by_schedules =
            |h: &Hunt| arguments.schedules || DEFECTS[h.defect].noticed == Noticed::Schedules;
        let (scheduled, hunts): (Vec<Hunt>, Vec<Hunt>) = hunts.into_iter().partition(by_schedules);
        let scheduled = Mutex::new((scheduled, Vec::new()));
        let hunts = Mutex::new(hunts);
        // Seeds that fail without any defect prove nothing.
        let sound = Mutex::new(BTreeMap::<(usize, u64), bool>::new());
        std::thread::scope(|scope| {
            for _ in 0..arguments.threads {
                scope.spawn(|| {
                    hunt(arguments, &hunts, &sound);
                    hunt_by_schedules(arguments, &scheduled);
                });
            }
        });
        let mut hunts = hunts.into_inner().unwrap_or_else(|e| e.into_inner());
        let (_, done) = scheduled.into_inner().unwrap_or_else(|e| e.into_inner());
        hunts.extend(done);
        let is_caught = |h: &Hunt| h.noticed.is_some() || h.scheduled.is_some();
        let caught = hunts.iter().filter(|h| is_caught(h)).count();
        if !arguments.json && caught < hunts.len() {
            let names = hunts
                .iter()
                .filter(|h| !is_caught(h))
                .map(|h| DEFECTS[h.defect].name);
            println!("not noticed: {}", names.collect::<Vec<_>>().join(", "));
        }
        println!("{{\"planted\":{},\"caught\":{caught}}}", hunts.len());
        if caught == hunts.len() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// Takes one defect after the other, and tries every schedule in one world after the other.
    fn hunt_by_schedules(arguments: &Arguments, hunts: &Mutex<(Vec<Hunt>, Vec<Hunt>)>) {
        let lock = || hunts.lock().unwrap_or_else(|e| e.into_inner());
        let bounds = enumerate::Arguments {
            level: arguments.level,
            ..enumerate::Arguments::default()
        };
        loop {
            let next = lock().0.pop();
            let Some(mut h) = next else { return };
            h.scheduled = as_before(arguments, &mut h);
            let worlds = if h.scheduled.is_some() {
                0
            } else {
                enumerate::worlds()
            };
            for shape in 0..worlds {
                let search = Search {
                    shape,
                    arguments: &bounds,
                    until: None,
                    defect: Some(h.defect),
                    say: false,
                };
                let found = search.search();
                h.runs += found.coverage.seeds;
                h.reached += found.reached;
                h.crashed += found.crashed;
                if let Some(failure) = found.failures.first() {
                    let at = format!("--shapes {shape} --schedule {}", failure.schedule());
                    let why = failure.what.lines().next().unwrap_or_default();
                    h.scheduled = Some((at, why.to_owned()));
                    break;
                }
            }
            let mut hunts = lock();
            tell(arguments, &h);
            hunts.1.push(h);
        }
    }

    /// The schedule in which it was noticed before, if it still is, and how.
    fn as_before(arguments: &Arguments, h: &mut Hunt) -> Option<(String, String)> {
        let ("schedule", shape, schedule) = known(DEFECTS[h.defect].name)? else {
            return None;
        };
        let (index, shape) = (shape, schedules::SHAPES.get(shape as usize)?);
        let bases = schedules::bases(shape.modes.len());
        let steps = schedules::parse(schedule, shape.modes.len()).ok()?;
        let seed = enumerate::Arguments::default().seed;
        let (plan, _) = schedules::plan(shape, &bases, &steps, seed);
        let outcome = run_with(&plan, Trace::Off, Some(h.defect));
        h.runs += 1;
        h.reached += outcome.reached;
        let why = outcome
            .failure
            .filter(|_| !outcome.crashed && !arguments.fresh)?;
        let is_sound = run_with(&plan, Trace::Off, None).failure.is_none();
        let why = why.lines().next().unwrap_or_default().to_owned();
        is_sound.then(|| (format!("--shapes {index} --schedule {schedule}"), why))
    }

    fn tell(arguments: &Arguments, h: &Hunt) {
        if arguments.json {
            println!("{}", json(arguments, h));
        } else {
            println!("{}", line(arguments, h));
        }
    }

    fn hunt(
        arguments: &Arguments,
        hunts: &Mutex<Vec<Hunt>>,
        sound: &Mutex<BTreeMap<(usize, u64), bool>>,
    ) {
        let lock = || hunts.lock().unwrap_or_else(|e| e.into_inner());
        let open = |h: &Hunt| h.noticed.is_none() && h.next <= arguments.seeds;
        loop {
            // The one that had the fewest seeds goes first.
            let (at, defect, first, batch) = {
                let mut hunts = lock();
                let next = (0..hunts.len())
                    .filter(|at| open(&hunts[*at]))
                    .min_by_key(|at| (hunts[*at].next, hunts[*at].in_flight));
                let Some(at) = next else { return };
                let h = &mut hunts[at];
                let first = h.next;
                // The known place alone, then more at a time.
                let batch = if first == 1 { 1 } else { BATCH };
                h.next += batch;
                h.in_flight += 1;
                (at, h.defect, first, batch)
            };
            let (mut runs, mut reached, mut crashed, mut noticed) = (0, 0, 0, None);
            for number in first..(first + batch).min(arguments.seeds + 1) {
                let place = tried(arguments, DEFECTS[defect].name, number);
                let plan = Plan::in_family(place.1, place.0);
                let outcome = run_with(&plan, Trace::Off, Some(defect));
                runs += 1;
                reached += outcome.reached;
                crashed += u64::from(outcome.crashed);
                let Some(failure) = outcome.failure.filter(|_| !outcome.crashed) else {
                    continue;
                };
                let known = sound
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .get(&place)
                    .copied();
                let is_sound = known.unwrap_or_else(|| {
                    let is = run_with(&plan, Trace::Off, None).failure.is_none();
                    sound
                        .lock()
                        .unwrap_or_else(|e| e.into_inner())
                        .insert(place, is);
                    is
                });
                if is_sound {
                    noticed = Some((
                        number,
                        failure.lines().next().unwrap_or_default().to_owned(),
                    ));
                    break;
                }
            }
            let mut hunts = lock();
            let h = &mut hunts[at];
            let before = h.noticed.is_some();
            h.in_flight -= 1;
            h.runs += runs;
            h.reached += reached;
            h.crashed += crashed;
            if let Some(found) = noticed
                && h.noticed.as_ref().is_none_or(|old| found.0 < old.0)
            {
                h.noticed = Some(found);
            }
            let over = h.noticed.is_some() && !before;
            if over || (!open(h) && h.in_flight == 0 && h.noticed.is_none()) {
                tell(arguments, h);
            }
        }
    }

    fn line(arguments: &Arguments, h: &Hunt) -> String {
        let d = &DEFECTS[h.defect];
        let shorter = |why: &str| why.chars().take(150).collect::<String>();
        if let Some((schedule, why)) = &h.scheduled {
            return format!(
                "{} ({}: {})\n    {schedule}, run {}, reached {} times: {}",
                d.name,
                d.breaks,
                d.what,
                h.runs,
                h.reached,
                shorter(why)
            );
        }
        let how = match &h.noticed {
            Some((number, why)) => {
                let why = shorter(why);
                let (family, seed) = tried(arguments, d.name, *number);
                format!(
                    "{} {seed}, noticed by try {number}, reached {} times: {why}",
                    FAMILIES[family], h.reached
                )
            }
            None if h.reached == 0 => format!("SURVIVES {} runs, never reached", h.runs),
            None => format!(
                "SURVIVES {} runs, reached {} times, {} runs ended in a crash",
                h.runs, h.reached, h.crashed
            ),
        };
        format!("{} ({}: {})\n    {how}", d.name, d.breaks, d.what)
    }

    fn json(arguments: &Arguments, h: &Hunt) -> serde_json::Value {
        let d = &DEFECTS[h.defect];
        serde_json::json!({
            "name": d.name, "breaks": d.breaks, "what": d.what,
            "caught": h.noticed.is_some() || h.scheduled.is_some(), "reached": h.reached, "runs": h.runs, "crashed": h.crashed,
            "try": h.noticed.as_ref().map(|n| n.0),
            "family": h.noticed.as_ref().map(|n| FAMILIES[tried(arguments, d.name, n.0).0]),
            "seed": h.noticed.as_ref().map(|n| tried(arguments, d.name, n.0).1),
            "schedule": h.scheduled.as_ref().map(|n| n.0.as_str()),
            "why": h.noticed.as_ref().map(|n| &n.1).or(h.scheduled.as_ref().map(|n| &n.1)),
        })
    }
}
