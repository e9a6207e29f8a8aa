//! This test program run again as a process of its own, for tests that kill or stop it.

use holdfast_replicator::config::Config;
use holdfast_replicator::create::grow_telling;
use holdfast_replicator::shard::grow::tell_steps;
use std::cell::Cell;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const ROLE: &str = "HOLDFAST_TEST_CHILD";
const FILE: &str = "HOLDFAST_TEST_FILE";
const STEP: &str = "HOLDFAST_TEST_STEP";

/// A replicator with this configuration, as `holdfast replicator` runs it.
pub fn replicator(file: &Path) -> Child {
    spawn("replicator", file, 0)
}

/// Grows `db/data` to 16 MiB, and is killed with SIGKILL before its step number `step`, counted from 0.
pub fn grow_killed_at(file: &Path, step: u32) -> Child {
    spawn("grow", file, step)
}

/// A replicator that is killed with SIGKILL before its step number `step` of making room for a larger volume, counted from 0.
pub fn replicator_killed_at(file: &Path, step: u32) -> Child {
    spawn("killed-replicator", file, step)
}

fn spawn(role: &str, file: &Path, step: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child::entry", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FILE, file)
        .env(STEP, step.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Nothing in an ordinary run of the tests.
#[test]
fn entry() {
    let (Some(role), Some(file)) = (std::env::var_os(ROLE), std::env::var_os(FILE)) else {
        return;
    };
    let file = Path::new(&file);
    if role == "killed-replicator" {
        let last: u32 = std::env::var(STEP).unwrap().parse().unwrap();
        let step = AtomicU32::new(0);
        tell_steps(move |_| {
            if step.fetch_add(1, Ordering::Relaxed) == last {
                let this = rustix::process::getpid();
                rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
            }
        });
    }
    if role == "replicator" || role == "killed-replicator" {
        holdfast_replicator::process::run(file).unwrap();
        return;
    }
    let last: u32 = std::env::var(STEP).unwrap().parse().unwrap();
    let step = Cell::new(0);
    let config = Config::load(file).unwrap();
    grow_telling(&config, "db", "data", Some(16 << 20), &|_| {
        if step.get() == last {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap();
        }
        step.set(step.get() + 1);
    })
    .unwrap();
}
