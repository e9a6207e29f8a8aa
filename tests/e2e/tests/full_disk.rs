//! Filesystems that become full under real nodes and a load: under the backings, the metadata, the state directory. Whoever can go on
//! does, everybody else says why, nothing that was acknowledged is lost, and all is well again once there is room (D6, D13, D14).

use holdfast_e2e::cluster::{PATIENCE, SERVICE};
use holdfast_e2e::{Cluster, History, Load, Loss, Mix, Part, Random, Settings, mounts, random};
use holdfast_replicator::control::protocol::{EventReport, RoleName, StateName};
use std::time::{Duration, Instant};

const VOLUME: u64 = 24 << 20;

struct Pair {
    cluster: Cluster,
    history: History,
    random: Random,
    primary: usize,
}

impl Pair {
    /// Two nodes in sync; none where there are no small filesystems.
    #[track_caller]
    fn begin(test: &str, settings: &Settings) -> Option<Pair> {
        if !mounts::available() {
            return None;
        }
        let cluster = Cluster::start(&Settings {
            volumes: vec![("data", VOLUME)],
            ..settings.clone()
        });
        cluster[0].promote();
        cluster.until_in_sync(0, &[0, 1]);
        let seed = random::seed(test);
        Some(Pair {
            cluster,
            history: History::new(seed, 0, VOLUME),
            random: Random::new(seed),
            primary: 0,
        })
    }

    /// A load in full flow on the primary, all over the volume.
    #[track_caller]
    fn load(&mut self) -> Load {
        let node = &self.cluster[self.primary];
        let mix = Mix {
            reads: 20,
            longest: 128,
            ..Mix::default()
        };
        let load = Load::start(&self.history, self.random.word(), mix, || node.nbd("data"));
        load.until_acknowledged(50);
        load
    }

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
        nbd.flush()
            .unwrap_or_else(|error| panic!("{what}: a flush: {error}"));
        nbd.disconnect();
    }

    #[track_caller]
    fn all_is_well(&self, what: &str) {
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        self.cluster.verify(self.primary);
        self.settle(what);
        eprintln!("{what}: {:?}", self.history.totals());
    }

    /// Waits until a node's disk failed, and for its words.
    #[track_caller]
    fn until_full(&self, node: usize) {
        self.cluster[node].until("its disk failed", |service| {
            service.state == StateName::Failed
        });
        let events = self.cluster[node].events(200);
        assert!(
            events.iter().any(|event| event.kind == "disk-error"
                && event.text.contains("no space left on the filesystem")
                && event.text.contains("data.img")),
            "it does not say why: {events:#?}"
        );
    }

    #[track_caller]
    fn finish(mut self) {
        self.cluster.stop();
        self.cluster.same_bytes(&[0, 1]);
    }
}

/// Room for the metadata and a part of the data, as for whoever puts a sparse file where it may not grow.
fn small_backing(node: usize) -> (usize, Part, u64) {
    (node, Part::Backings, 96 << 20)
}

/// What is left of the small filesystem before the load comes.
const LITTLE: u64 = 1 << 20;

#[test]
fn the_primarys_disk_is_full() {
    let settings = Settings {
        small: vec![small_backing(0)],
        ..Settings::default()
    };
    let Some(mut pair) = Pair::begin("full, primary", &settings) else {
        return;
    };
    pair.cluster[0].small(Part::Backings).fill(LITTLE);
    let load = pair.load();
    pair.until_full(0);
    // It goes on through its peer, and nobody sees an error.
    load.until_acknowledged(200);
    load.finish();
    let service = pair.cluster[0].service();
    assert_eq!(
        (service.role, service.in_sync.as_slice()),
        (RoleName::Primary, &[1][..])
    );
    pair.settle("full, primary");
    pair.cluster[0].demote();
    pair.cluster[1].promote();
    pair.primary = 1;
    // Without room it fails again, and harms nobody.
    let load = pair.load();
    pair.cluster[0].stop();
    pair.cluster[0].start();
    pair.until_full(0);
    let refused = pair.cluster[0].run(&["promote", SERVICE]);
    assert!(!refused.status.success(), "{refused:?}");
    // Under `suspend` the application waits for whoever was in sync, and the full copy is not.
    load.until_acknowledged(50);
    pair.cluster[0].stop();
    pair.cluster[0].small(Part::Backings).make_room();
    pair.cluster[0].start();
    pair.cluster.until_in_sync(1, &[0, 1]);
    load.until_acknowledged(30);
    load.finish();
    pair.all_is_well("with room again");
    pair.finish();
}

#[test]
fn the_secondarys_disk_is_full() {
    for on_peer_loss in ["suspend", "continue"] {
        let settings = Settings {
            small: vec![small_backing(1)],
            on_peer_loss,
            ..Settings::default()
        };
        let what = format!("full, secondary, {on_peer_loss}");
        let Some(mut pair) = Pair::begin(&what, &settings) else {
            return;
        };
        pair.cluster[1].small(Part::Backings).fill(LITTLE);
        let load = pair.load();
        pair.until_full(1);
        if on_peer_loss == "suspend" {
            pair.cluster[0].until("it waits", |service| service.parked);
        } else {
            load.until_acknowledged(100);
        }
        let refused = pair.cluster[1].run(&["promote", SERVICE]);
        assert!(!refused.status.success(), "{what}: {refused:?}");
        pair.cluster[1].stop();
        pair.cluster[1].small(Part::Backings).make_room();
        pair.cluster[1].start();
        pair.cluster.until_in_sync(0, &[0, 1]);
        load.until_acknowledged(50);
        load.finish();
        pair.all_is_well(&what);
        pair.finish();
    }
}

/// A copy that is filled has no room for what it gets: that is no good copy, before and after it is started anew, until there is room
/// (D11).
#[test]
fn the_target_of_a_resync_is_full() {
    let settings = Settings {
        small: vec![small_backing(1)],
        on_peer_loss: "continue",
        ..Settings::default()
    };
    let Some(mut pair) = Pair::begin("full, target", &settings) else {
        return;
    };
    pair.cluster[1].stop();
    let load = pair.load();
    load.until_acknowledged(300);
    load.finish();
    pair.cluster[1].small(Part::Backings).fill(LITTLE);
    for moment in 0..2 {
        let what = format!("full, target, moment {moment}");
        pair.cluster[1].start();
        let load = pair.load();
        pair.until_full(1);
        load.until_acknowledged(50);
        load.finish();
        assert_eq!(pair.cluster[0].service().in_sync, [0], "{what}");
        let refused = pair.cluster[1].run(&["promote", SERVICE]);
        assert!(!refused.status.success(), "{what}: {refused:?}");
        pair.settle(&what);
        pair.cluster[1].stop();
    }
    pair.cluster[1].small(Part::Backings).make_room();
    pair.cluster[1].start();
    pair.all_is_well("full, target, with room again");
    pair.finish();
}

/// Nobody has room: the application waits, and what it was told to be written is there when there is room again.
#[test]
fn both_disks_are_full() {
    let settings = Settings {
        small: vec![small_backing(0), small_backing(1)],
        ..Settings::default()
    };
    let Some(mut pair) = Pair::begin("full, both", &settings) else {
        return;
    };
    for node in 0..2 {
        pair.cluster[node].small(Part::Backings).fill(LITTLE);
    }
    let load = pair.load();
    pair.until_full(1);
    // Which of the two failed first decides: the primary went on through the secondary and waits for it; or it waits with its own
    // disk not yet full; or that failed with nobody left to serve, and the application has its errors.
    let waits = std::cell::Cell::new(false);
    pair.cluster[0].until("the application waits, or has its errors", |service| {
        let mut problems = service.problems.iter();
        waits.set(problems.any(|problem| problem.text.contains("client I/O waits")));
        waits.get() || service.role == RoleName::Secondary
    });
    for node in 0..2 {
        pair.cluster[node].kill();
        pair.cluster[node].small(Part::Backings).make_room();
    }
    let left = load.end().in_flight;
    assert!(left > 0 || !waits.get(), "nothing waited");
    for node in &mut pair.cluster.nodes {
        node.start();
    }
    pair.cluster.until_connected();
    pair.primary = pair.random.below(2) as usize;
    pair.cluster[pair.primary].promote();
    pair.settle("full, both");
    pair.all_is_well("full, both");
    pair.finish();
}

/// Metadata in a file of its own has its space from the beginning: a full filesystem around it stops nobody.
#[test]
fn the_filesystem_of_the_metadata_is_full() {
    let settings = Settings {
        external_metadata: true,
        small: vec![(0, Part::Metadata, 64 << 20), (1, Part::Metadata, 64 << 20)],
        ..Settings::default()
    };
    let Some(mut pair) = Pair::begin("full, metadata", &settings) else {
        return;
    };
    for node in 0..2 {
        let small = pair.cluster[node].small(Part::Metadata);
        small.fill(0);
        assert!(small.free() < 4096, "{} bytes are left", small.free());
    }
    for moment in 0..2 {
        let what = format!("full, metadata, moment {moment}");
        let load = pair.load();
        let (lost, heir) = (pair.primary, 1 - pair.primary);
        load.until_acknowledged(200);
        pair.cluster[lost].kill();
        assert!(load.end().in_flight > 0, "{what}");
        pair.cluster[heir].until_misses(lost);
        pair.cluster[heir].promote();
        pair.primary = heir;
        pair.settle(&what);
        let load = pair.load();
        pair.cluster[lost].start();
        pair.cluster.until_in_sync(heir, &[0, 1]);
        load.until_acknowledged(50);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

/// Logs and lists have no room: the service goes on, fails over, and starts anew without; what was said meanwhile is in memory, and
/// the file says that lines are missing once it takes some again.
#[test]
fn the_state_directory_is_full() {
    let settings = Settings {
        small: vec![(0, Part::State, 1 << 20), (1, Part::State, 1 << 20)],
        ..Settings::default()
    };
    let Some(mut pair) = Pair::begin("full, state", &settings) else {
        return;
    };
    for node in 0..2 {
        let small = pair.cluster[node].small(Part::State);
        small.fill(0);
        assert_eq!(small.free(), 0);
    }
    // More to say than fits into what is left of the last page: the line that does not fit is torn.
    let torn = |node: usize| {
        let log = std::fs::read(pair.cluster[node].path("state/events.jsonl")).unwrap();
        log.last().is_some_and(|byte| *byte != b'\n')
    };
    let start = Instant::now();
    while !(torn(0) && torn(1)) {
        assert!(
            start.elapsed() < PATIENCE,
            "their logs have room for everything"
        );
        pair.cluster[0].must(&["disconnect", SERVICE]);
        pair.cluster[0].must(&["connect", SERVICE]);
        pair.cluster.until_in_sync(0, &[0, 1]);
    }
    let load = pair.load();
    load.until_acknowledged(50);
    load.finish();
    for _ in 0..2 {
        let load = pair.load();
        let (lost, heir) = (pair.primary, 1 - pair.primary);
        pair.cluster[lost].kill();
        assert!(load.end().in_flight > 0, "the kill came too late");
        pair.cluster[heir].until_misses(lost);
        pair.cluster[heir].promote();
        pair.primary = heir;
        pair.cluster[lost].start();
        pair.cluster.until_in_sync(heir, &[0, 1]);
    }
    pair.all_is_well("full, state");
    for node in 0..2 {
        let kinds = pair.cluster[node].events(500);
        assert!(
            kinds.iter().any(|event| event.kind == "up-to-date"),
            "what has no room in the file is in memory: {kinds:#?}"
        );
        pair.cluster[node].small(Part::State).make_room();
    }
    // What is said from now on is in the file, a line of its own each.
    pair.cluster[pair.primary].must(&["disconnect", SERVICE]);
    pair.cluster[pair.primary].must(&["connect", SERVICE]);
    pair.all_is_well("with room again");
    for node in 0..2 {
        let log = pair.cluster[node].path("state/events.jsonl");
        let start = Instant::now();
        let whole = |kind: &str| {
            let text = std::fs::read_to_string(&log).unwrap();
            let mut lines = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            lines.any(|event: EventReport| event.kind == kind)
        };
        while !(whole("events-lost") && whole("link-down")) {
            assert!(
                start.elapsed() < PATIENCE,
                "{}: {}",
                log.display(),
                std::fs::read_to_string(&log).unwrap()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    pair.finish();
}
