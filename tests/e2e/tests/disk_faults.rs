//! Disks that fail under real nodes and a load: errors, short transfers, silence, on the primary's disk, the secondary's, and in the
//! midst of a resync. The service goes on with what is left, says so, and a disk that failed never comes back as current (D6, D8,
//! D11, D13, D14).

use holdfast_e2e::cluster::{PATIENCE, SERVICE};
use holdfast_e2e::{Backing, Cluster, History, Load, Loss, Mix, Random, Settings, random};
use holdfast_replicator::control::protocol::{RoleName, StateName};
use std::time::{Duration, Instant};

const VOLUME: u64 = 16 << 20;
/// Behind the data of the volume: metadata alone.
const METADATA: &str = "16777216 1099511627776";

struct Pair {
    cluster: Cluster,
    history: History,
    random: Random,
    primary: usize,
}

impl Pair {
    #[track_caller]
    fn begin(test: &str, on_peer_loss: &'static str) -> Pair {
        let cluster = Cluster::start(&Settings {
            on_peer_loss,
            volumes: vec![("data", VOLUME)],
            backing: Backing::Faults,
            ..Settings::default()
        });
        cluster[0].promote();
        cluster.until_in_sync(0, &[0, 1]);
        let seed = random::seed(test);
        Pair {
            cluster,
            history: History::new(seed, 1 << 20, 8 << 20),
            random: Random::new(seed),
            primary: 0,
        }
    }

    fn secondary(&self) -> usize {
        1 - self.primary
    }

    /// A load in full flow on the primary.
    #[track_caller]
    fn load(&mut self) -> Load {
        let node = &self.cluster[self.primary];
        let mix = Mix {
            reads: 20,
            ..Mix::default()
        };
        let load = Load::start(&self.history, self.random.word(), mix, || node.nbd("data"));
        load.until_acknowledged(50 + self.random.below(50));
        load
    }

    /// A command for the disk under a node.
    #[track_caller]
    fn disk(&self, node: usize, command: &str) {
        self.cluster[node].faults("data").tell(command);
    }

    /// The text of the last event of a kind, once there is one in this run of the node.
    #[track_caller]
    fn until_event(&self, node: usize, kind: &str) -> String {
        let start = Instant::now();
        loop {
            let events = self.cluster[node].events(200);
            let run = events.iter().rposition(|event| event.kind == "attached");
            let found = events[run.unwrap_or(0)..]
                .iter()
                .rfind(|event| event.kind == kind);
            if let Some(event) = found {
                return event.text.clone();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{} says nothing of {kind}: {events:#?}",
                self.cluster[node].name
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The status of a node, as soon as one of its problems has all these words.
    #[track_caller]
    fn until_problem(&self, node: usize, words: &[&str]) {
        self.cluster[node].until(&format!("it says {words:?}"), |service| {
            service
                .problems
                .iter()
                .any(|problem| words.iter().all(|word| problem.text.contains(word)))
        });
    }

    /// Waits until a node says that its disk failed; the text of that.
    #[track_caller]
    fn until_failed(&self, node: usize) -> String {
        self.cluster[node].until("its disk failed", |service| {
            service.state == StateName::Failed
        });
        self.until_problem(node, &["the disk of this node's copy failed"]);
        self.until_event(node, "disk-failed")
    }

    /// A promotion that must be refused, without force.
    #[track_caller]
    fn is_not_promoted(&self, node: usize, what: &str) {
        let refused = self.cluster[node].run(&["promote", SERVICE]);
        assert!(!refused.status.success(), "{what}: {refused:?}");
        assert_ne!(
            self.cluster[node].service().role,
            RoleName::Primary,
            "{what}"
        );
    }

    /// Reads everything through the primary and judges it.
    #[track_caller]
    fn settle(&self, what: &str) {
        let node = &self.cluster[self.primary];
        let mut nbd = node
            .nbd("data")
            .unwrap_or_else(|error| panic!("{what}: {} does not serve: {error}", node.name));
        self.history
            .settle(Loss::Nothing, |at, length| nbd.read(at, length))
            .unwrap_or_else(|error| panic!("{what}: a read from {}: {error}", node.name))
            .holds(&format!("{what}, read from {}", node.name));
        let begun = self.history.begin_flush();
        nbd.flush()
            .unwrap_or_else(|error| panic!("{what}: a flush on {}: {error}", node.name));
        self.history.flushed(begun);
        nbd.disconnect();
    }

    /// Two good copies again, and the volume holds what it must.
    #[track_caller]
    fn all_is_well(&self, what: &str) {
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        self.cluster.verify(self.primary);
        self.settle(what);
        eprintln!("{what}: {:?}", self.history.totals());
    }

    /// A stop and a start: the disk works again, and is the same one.
    #[track_caller]
    fn restart(&mut self, node: usize) {
        self.cluster[node].stop();
        self.cluster[node].start();
    }

    /// Sometimes the disk is replaced, sometimes it works again after a restart.
    #[track_caller]
    fn repair(&mut self, node: usize) {
        if self.random.percent(50) {
            self.replace_disk(node);
        } else {
            self.restart(node);
        }
    }

    /// A new disk in the place of the failed one, as an administrator puts it in.
    #[track_caller]
    fn replace_disk(&mut self, node: usize) {
        self.cluster[node].stop();
        std::fs::remove_file(self.cluster[node].image("data")).unwrap();
        self.cluster[node].must(&["volume", "replace-disk", SERVICE, "data", "--yes"]);
        self.cluster[node].start();
    }

    #[track_caller]
    fn finish(mut self) {
        self.cluster.stop();
        self.cluster.same_bytes(&[0, 1]);
    }
}

#[track_caller]
fn until(what: &str, look: impl Fn() -> bool) {
    let start = Instant::now();
    while !look() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_primary_whose_disk_fails_goes_on_through_its_peer() {
    let mut pair = Pair::begin("primary's disk", "suspend");
    let metadata = format!("eio any {METADATA}");
    for failure in [
        "eio write",
        "eio read",
        "eio flush times 1",
        "eio any",
        &metadata,
    ] {
        let (failed, server) = (pair.primary, pair.secondary());
        let what = format!("{failure} at the primary, {}", pair.cluster[failed].name);
        let load = pair.load();
        pair.disk(failed, failure);
        let text = pair.until_failed(failed);
        assert!(
            text.contains("The service goes on through") && text.contains("replace the disk"),
            "{what}: {text}"
        );
        // Nobody who uses the volume sees an error.
        load.until_acknowledged(100);
        load.finish();
        let service = pair.cluster[failed].service();
        assert_eq!(service.role, RoleName::Primary, "{what}");
        assert_eq!(service.in_sync, [server as u8], "{what}: {service:#?}");
        let text = pair.until_event(server, "disk-lost");
        assert!(text.contains("alone holds current data"), "{what}: {text}");
        pair.settle(&what);
        pair.cluster[failed].demote();
        pair.is_not_promoted(failed, &what);
        pair.cluster[server].promote();
        pair.primary = server;
        let load = pair.load();
        pair.repair(failed);
        pair.cluster.until_in_sync(server, &[0, 1]);
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

#[test]
fn a_secondary_whose_disk_fails_is_left_behind() {
    let mut pair = Pair::begin("secondary's disk, continue", "continue");
    let metadata = format!("eio any {METADATA}");
    for failure in [
        "eio write",
        "eio zero",
        "enospc write",
        "eio flush times 1",
        &metadata,
    ] {
        let (primary, failed) = (pair.primary, pair.secondary());
        let what = format!("{failure} at the secondary");
        let load = pair.load();
        pair.disk(failed, failure);
        let text = pair.until_failed(failed);
        assert!(
            text.contains("until the disk is replaced"),
            "{what}: {text}"
        );
        load.until_acknowledged(100);
        load.finish();
        pair.cluster[primary].until("it goes on alone", |service| {
            service.in_sync == [primary as u8]
        });
        pair.until_problem(primary, &["not in the in-sync set"]);
        pair.settle(&what);
        pair.is_not_promoted(failed, &what);
        let load = pair.load();
        pair.repair(failed);
        pair.cluster.until_in_sync(primary, &[0, 1]);
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

#[test]
fn under_suspend_the_primary_waits_for_a_secondary_whose_disk_failed() {
    let mut pair = Pair::begin("secondary's disk, suspend", "suspend");
    for failure in ["eio write times 1", "eio flush times 1", "eio any"] {
        let (primary, failed) = (pair.primary, pair.secondary());
        let load = pair.load();
        pair.disk(failed, failure);
        pair.until_failed(failed);
        pair.cluster[primary].until("it waits", |service| service.parked);
        pair.until_problem(primary, &["client I/O waits"]);
        pair.is_not_promoted(failed, failure);
        pair.repair(failed);
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(failure);
    }
    pair.finish();
}

/// A read of a secondary serves nobody's data: the comparison ends and says so, and the copy stays.
#[test]
fn a_secondary_that_cannot_be_read_is_no_success_of_verify() {
    let mut pair = Pair::begin("verify", "suspend");
    let load = pair.load();
    pair.disk(pair.secondary(), "eio read");
    let output = pair.cluster[pair.primary].run(&["verify", SERVICE, "--wait"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("the other copy could not read"),
        "{output:?}"
    );
    let text = pair.until_event(pair.secondary(), "disk-error");
    assert!(text.contains("read of"), "{text}");
    load.until_acknowledged(50);
    load.finish();
    pair.disk(pair.secondary(), "heal");
    pair.all_is_well("a secondary that cannot be read");
    pair.finish();
}

#[test]
fn a_primary_without_a_disk_is_killed_and_its_old_data_is_never_current() {
    let mut pair = Pair::begin("diskless, killed", "suspend");
    for moment in 0..3 {
        let (failed, server) = (pair.primary, pair.secondary());
        let what = format!("moment {moment}, {} killed", pair.cluster[failed].name);
        let load = pair.load();
        pair.disk(failed, "eio any");
        pair.until_failed(failed);
        load.until_acknowledged(50 + pair.random.below(50));
        std::thread::sleep(Duration::from_micros(pair.random.below(20_000)));
        pair.cluster[failed].kill();
        let report = load.end();
        assert!(report.in_flight > 0, "{what}: {report:?}");
        if moment > 0 {
            // The disk works again, what it holds is old, and nobody is there who knows.
            pair.cluster[server].kill();
            pair.cluster[failed].start();
            pair.is_not_promoted(failed, &what);
            if moment == 1 {
                pair.cluster[failed].kill();
            }
            pair.cluster[server].start();
        }
        if pair.cluster[failed].is_running() {
            pair.cluster.until_connected();
        } else {
            pair.cluster[server].until_misses(failed);
        }
        pair.cluster[server].promote();
        pair.primary = server;
        pair.settle(&what);
        let load = pair.load();
        if !pair.cluster[failed].is_running() {
            pair.cluster[failed].start();
        }
        pair.cluster.until_in_sync(server, &[0, 1]);
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

#[test]
fn short_transfers_are_completed() {
    let mut pair = Pair::begin("short", "suspend");
    for node in 0..2 {
        pair.disk(node, "short write 4096");
        pair.disk(node, "short read 512");
    }
    let load = pair.load();
    load.until_acknowledged(300);
    load.finish();
    for node in 0..2 {
        assert_eq!(pair.cluster[node].service().state, StateName::UpToDate);
    }
    pair.all_is_well("short transfers");
    pair.finish();
}

/// Silence is told after ten seconds; what to do is for a person to say. So the two clusters of this test wait together.
#[test]
fn a_silent_disk_is_told_of_and_may_speak_again() {
    let mut speaks = Pair::begin("a silent secondary", "suspend");
    let mut dies = Pair::begin("a silent primary", "suspend");
    let mut waits = Pair::begin("a silent secondary of a primary that is stopped", "suspend");
    let load = speaks.load();
    let lost = dies.load();
    let waiting = waits.load();
    let start = Instant::now();
    speaks.disk(1, "hang write");
    dies.disk(0, "hang any");
    // This primary's disk is well; what it waits for in its stop is the other copy's.
    waits.disk(1, "hang any");
    until("its requests wait", || {
        waits.cluster[0].peer(1).unacknowledged_bytes > 0
    });
    let stop_of_waits = Instant::now();
    terminate(&waits);
    for (pair, node) in [(&speaks, 1), (&dies, 0)] {
        let text = pair.until_event(node, "disk-hung");
        assert!(text.contains("has not answered a request"), "{text}");
        assert!(start.elapsed() >= Duration::from_secs(10), "too soon");
    }
    assert_eq!(speaks.cluster[0].service().in_sync, [0, 1]);
    speaks.disk(1, "release");
    speaks.until_event(1, "disk-answers");
    load.until_acknowledged(50);
    load.finish();
    speaks.all_is_well("a silent secondary");
    speaks.finish();

    // As the event says: this node is stopped, and another copy promoted. The stop does not wait for the disk.
    let stop = Instant::now();
    terminate(&dies);
    until("it has ended", || dies.cluster[0].ended().is_some());
    assert!(
        stop.elapsed() < Duration::from_secs(18),
        "{:?}",
        stop.elapsed()
    );
    assert!(
        !dies.cluster[0].ended().expect("ended").success(),
        "it was no clean stop"
    );
    let events =
        std::fs::read_to_string(dies.cluster[0].path("state/events.jsonl")).expect("its event log");
    let last = events
        .lines()
        .rfind(|line| line.contains("stopped-unclean"))
        .expect("it says so");
    assert!(
        last.contains("did not answer") && last.contains("is safe"),
        "{last}"
    );
    dies.cluster[0].kill();
    assert!(lost.end().in_flight > 0);
    dies.cluster[1].until_misses(0);
    dies.cluster[1].promote();
    dies.primary = 1;
    dies.settle("a silent primary");
    dies.cluster[0].start();
    dies.all_is_well("a silent primary");
    dies.finish();

    while waits.cluster[0].ended().is_none() {
        assert!(
            stop_of_waits.elapsed() < Duration::from_secs(75),
            "the stop has no end"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        !waits.cluster[0].ended().expect("ended").success(),
        "it was no clean stop"
    );
    let events = std::fs::read_to_string(waits.cluster[0].path("state/events.jsonl"))
        .expect("its event log");
    let last = events
        .lines()
        .rfind(|line| line.contains("stopped-unclean"))
        .expect("it says so");
    assert!(last.contains("did not end within 60 s"), "{last}");
    waits.cluster[0].kill();
    waits.cluster[1].kill();
    assert!(waiting.end().in_flight > 0);
}

/// SIGTERM to a pair's first node.
fn terminate(pair: &Pair) {
    let pid = pair.cluster[0].pid().expect("it runs") as i32;
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("an own child");
}

#[test]
fn a_disk_fails_in_the_midst_of_a_resync() {
    let mut pair = Pair::begin("resync", "continue");
    for (failure, at_source) in [
        ("eio write", false),
        ("eio read", false),
        ("eio read times 1", true),
        ("eio any", true),
    ] {
        let (source, target) = (pair.primary, pair.secondary());
        let failed = if at_source { source } else { target };
        let what = format!(
            "{failure} at the {}",
            if at_source { "source" } else { "target" }
        );
        pair.cluster[target].kill();
        let load = pair.load();
        load.until_acknowledged(200);
        load.finish();
        // Held back until the disk is ready to fail.
        pair.cluster[source].must(&["pause", SERVICE]);
        pair.cluster[target].start();
        pair.cluster[source].until("the resync has begun", |service| {
            service.peers.iter().any(|peer| peer.resync.is_some())
        });
        pair.disk(failed, failure);
        pair.cluster[source].must(&["resume", SERVICE]);
        if at_source {
            // The only current data: neither is the target promoted, nor is anybody told to give the disk away.
            let text = pair.until_failed(failed);
            assert!(text.contains("keep this disk"), "{what}: {text}");
            pair.until_problem(failed, &["no other copy is known to hold everything"]);
            pair.is_not_promoted(target, &what);
            pair.restart(failed);
            pair.cluster.until_connected();
            pair.cluster[source].promote();
        } else if failure == "eio read" {
            // What cannot be saved is overwritten all the same, and said to be lost.
            let text = pair.until_event(target, "undo-lost");
            assert!(text.contains("The resync goes on"), "{what}: {text}");
            pair.cluster.until_in_sync(source, &[0, 1]);
            pair.disk(target, "heal");
        } else {
            let text = pair.until_failed(failed);
            assert!(
                text.contains("until the disk is replaced"),
                "{what}: {text}"
            );
            let load = pair.load();
            pair.is_not_promoted(target, &what);
            pair.repair(failed);
            load.until_acknowledged(30);
            load.finish();
        }
        pair.all_is_well(&what);
    }
    pair.finish();
}
