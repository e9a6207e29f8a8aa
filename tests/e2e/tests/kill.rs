//! SIGKILL at random moments of a load, on volumes in sync mode: no acknowledged write is lost, the copies converge, and a copy
//! that lacks something is not promoted (D1, D2, D4, D7, D8, D10, D11).

use holdfast_e2e::cluster::PATIENCE;
use holdfast_e2e::story::{Fault, Story};
use holdfast_e2e::{Backing, Cluster, Settings, random};
use std::time::{Duration, Instant};

fn moments(test: &str, settings: &Settings, faults: &[Fault], each: usize) {
    let mut story = Story::begin(settings, random::seed(test));
    for _ in 0..each {
        for fault in faults {
            story.moment(*fault);
        }
    }
    story.cluster.stop();
    story.cluster.same_bytes(&[0, 1]);
}

#[test]
fn the_primary_is_killed_and_its_peer_goes_on() {
    let settings = Settings::default();
    moments("kill primary", &settings, &[Fault::KillPrimary], 8);
}

#[test]
fn the_secondary_is_killed_and_the_primary_waits_for_it() {
    let settings = Settings::default();
    moments("kill secondary", &settings, &[Fault::KillSecondary], 6);
}

#[test]
fn the_secondary_is_killed_and_the_primary_goes_on_alone() {
    let settings = Settings {
        on_peer_loss: "continue",
        external_metadata: true,
        ..Settings::default()
    };
    let faults = [Fault::KillSecondary, Fault::KillPrimary];
    moments("kill secondary, continue", &settings, &faults, 3);
}

/// What a start says that finds its disk locked.
const WAITS: &str = "the disk is still held by somebody";

/// The kernel ends the requests of a killed process after the process itself, and only then gives up its locks: a restart by a
/// supervisor comes earlier.
#[test]
fn a_restart_waits_until_the_requests_of_the_killed_process_have_ended() {
    let mut cluster = Cluster::start(&Settings::default());
    cluster[1].kill();
    let lock = std::fs::File::open(cluster[1].image("data")).unwrap();
    lock.lock().unwrap();
    let log = cluster[1].path("replicator.log");
    let held = std::thread::spawn(move || {
        let begun = Instant::now();
        while !std::fs::read_to_string(&log).unwrap().contains(WAITS) {
            assert!(begun.elapsed() < PATIENCE, "it does not say that it waits");
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(lock);
    });
    cluster[1].start();
    held.join().expect("it started on a locked backing");
    cluster.until_connected();
}

#[test]
fn both_are_killed_and_either_is_promoted() {
    let settings = Settings::default();
    moments("kill both", &settings, &[Fault::KillBoth], 6);
}

#[test]
fn source_or_target_is_killed_in_the_midst_of_a_resync() {
    let settings = Settings::default();
    let faults = [
        Fault::KillTargetInResync,
        Fault::KillSourceInResync,
        Fault::SwitchOver,
    ];
    moments("kill in resync", &settings, &faults, 3);
}

#[test]
fn all_of_it_on_loop_devices() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: loop devices need root");
        return;
    }
    let settings = Settings {
        backing: Backing::Loop,
        ..Settings::default()
    };
    moments("kill, loop devices", &settings, &Fault::KILLS, 1);
}
