//! One seed, one course of things: everything a core asked for, in every run of every process.

use simulator::{Plan, Trace, run};
use std::process::Command;

/// Seeds of both shapes, with every kind of fault.
const SEEDS: [u64; 6] = [2, 3, 8, 21, 60, 105];

fn trace(seed: u64) -> String {
    let outcome = run(&Plan::of(seed), Trace::Everything);
    format!("{}{:?}", outcome.trace, outcome.failure)
}

fn same(seed: u64, a: &str, b: &str) {
    if a == b {
        return;
    }
    let at = a.lines().zip(b.lines()).position(|(x, y)| x != y);
    let line = |text: &str| {
        at.and_then(|at| text.lines().nth(at))
            .unwrap_or("(the end)")
            .to_owned()
    };
    panic!(
        "seed {seed} differs in line {at:?}:\n{}\n{}",
        line(a),
        line(b)
    );
}

/// Two runs in one process, at once and one after the other: hash seeds and addresses are not the same in both.
#[test]
fn the_same_seed_runs_the_same_way_twice() {
    for seed in SEEDS {
        let beside = std::thread::spawn(move || trace(seed));
        let first = trace(seed);
        assert!(first.lines().count() > 1000, "seed {seed} does something");
        same(seed, &first, &trace(seed));
        same(seed, &first, &beside.join().expect("a run"));
    }
}

#[test]
fn the_same_seed_runs_the_same_way_in_another_process() {
    for seed in SEEDS {
        let print = || {
            let output = Command::new(env!("CARGO_BIN_EXE_simulator"))
                .args(["--seed", &seed.to_string(), "--no-shrink", "--everything"])
                .output()
                .expect("the simulator");
            String::from_utf8(output.stdout).expect("text")
        };
        let first = print();
        same(seed, &first, &print());
        let here = run(&Plan::of(seed), Trace::Everything).trace;
        assert!(
            first.contains(&here),
            "seed {seed} runs another way in another process"
        );
    }
}

#[test]
fn a_run_does_not_depend_on_being_watched() {
    for seed in SEEDS {
        let plan = Plan::of(seed);
        let watched = run(&plan, Trace::Everything);
        let alone = run(&plan, Trace::Off);
        assert_eq!(watched.failure, alone.failure, "seed {seed}");
        assert_eq!(watched.coverage.steps, alone.coverage.steps, "seed {seed}");
        assert_eq!(
            watched.coverage.frames, alone.coverage.frames,
            "seed {seed}"
        );
    }
}
