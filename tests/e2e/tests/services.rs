//! Several services on one pair of nodes, each primary where it likes: what happens to one is no other's business, and the volumes of
//! one service share one order (D1, D2, D3, D7, D10, D17).

use holdfast_e2e::cluster::SERVICE;
use holdfast_e2e::order::Chains;
use holdfast_e2e::services::peer;
use holdfast_e2e::{
    Backing, Cluster, History, Load, Loss, Mix, Order, Random, Service, Settings, random,
};
use holdfast_replicator::control::protocol::{LinkName, RoleName, ServiceReport};
use std::time::{Duration, Instant};

const DATA: u64 = 12 << 20;
const LOG: u64 = 6 << 20;

/// One service's application: a history on every volume.
struct App {
    name: &'static str,
    volumes: Vec<(&'static str, History)>,
    random: Random,
}

impl App {
    fn new(name: &'static str, seed: u64) -> App {
        App {
            name,
            volumes: vec![
                ("data", History::new(seed, 1 << 20, DATA - (1 << 20))),
                ("log", History::new(seed ^ 0x10_6000, 0, LOG)),
            ],
            random: Random::new(seed),
        }
    }

    #[track_caller]
    fn load(&mut self, cluster: &Cluster, primary: usize) -> Loads {
        let copy = cluster[primary].of(self.name);
        let mix = Mix {
            connections: 2,
            depth: 4,
            ..Mix::default()
        };
        let loads = self.volumes.iter().map(|(volume, history)| {
            Load::start(history, self.random.word(), mix, || copy.nbd(volume))
        });
        Loads(loads.collect())
    }

    /// Reads every volume from the primary and judges it.
    #[track_caller]
    fn settle(&self, cluster: &Cluster, primary: usize, what: &str) {
        for (volume, history) in &self.volumes {
            let place = format!(
                "{what}: {}/{volume} on {}",
                self.name, cluster[primary].name
            );
            let nbd = cluster[primary].of(self.name).nbd(volume);
            let mut nbd = nbd.unwrap_or_else(|error| panic!("{place}: {error}"));
            let check = history.settle(Loss::Nothing, |at, length| nbd.read(at, length));
            check.expect("a read").holds(&place);
            nbd.disconnect();
        }
    }
}

/// The loads on the volumes of one service.
struct Loads(Vec<Load>);

impl Loads {
    #[track_caller]
    fn go_on(&self, writes: u64) {
        for load in &self.0 {
            load.until_acknowledged(writes);
        }
    }

    #[track_caller]
    fn finish(self) {
        for load in self.0 {
            load.finish();
        }
    }

    /// Each of them must have been in full flow when its server went.
    #[track_caller]
    fn cut_off(self) {
        for load in self.0 {
            let report = load.end();
            assert!(
                report.in_flight > 0 && report.acknowledged > 0,
                "{report:?}"
            );
        }
    }
}

fn service(name: &'static str, mode: &'static str, on_peer_loss: &'static str) -> Service {
    Service {
        name,
        mode,
        on_peer_loss,
        volumes: vec![("data", DATA), ("log", LOG)],
    }
}

/// `db` under `suspend`, `mail` under `continue`, `wiki` under `suspend`; each has a volume `data` and a volume `log`.
fn three_services(backing: Backing) -> Settings {
    Settings {
        volumes: vec![("data", DATA), ("log", LOG)],
        backing,
        others: vec![
            service("mail", "sync", "continue"),
            service("wiki", "sync", "suspend"),
        ],
        ..Settings::default()
    }
}

/// Starts them: `db` is primary on the first node, the others on the second.
fn start(settings: &Settings) -> Cluster {
    let cluster = Cluster::start(settings);
    for (name, primary) in [(SERVICE, 0), ("mail", 1), ("wiki", 1)] {
        for node in &cluster.nodes {
            node.of(name).until("the link is established", |service| {
                service.peers[0].link == LinkName::Established
            });
        }
        cluster[primary].of(name).promote();
        cluster.until_service_in_sync(name, primary, &[0, 1]);
    }
    cluster
}

/// What must not change of a service while something happens to another.
fn standing(service: &ServiceReport) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        service.role,
        service.epoch.clone(),
        service.generations.clone(),
        service.in_sync.clone(),
        service.state,
        service.peers[0].link,
        (service.parked, service.suspended),
    )
}

#[test]
fn services_in_opposite_directions_lose_a_node_each_in_its_own_way() {
    let seed = random::seed("services, node lost");
    let mut random = Random::new(seed);
    let mut cluster = start(&three_services(Backing::File));
    let mut db = App::new(SERVICE, seed);
    let mut mail = App::new("mail", seed ^ 1);
    let mut wiki = App::new("wiki", seed ^ 2);
    for moment in 0..2 {
        let what = format!("moment {moment}");
        let before = cluster[1].of("mail").report();
        let lost = db.load(&cluster, 0);
        let mailing = mail.load(&cluster, 1);
        let waiting = wiki.load(&cluster, 1);
        lost.go_on(30 + random.below(100));
        cluster[0].kill();
        lost.cut_off();

        // Each by its own policy: one fails over, one goes on alone, one waits.
        cluster[1].of(SERVICE).until_misses(0);
        cluster[1].of(SERVICE).promote();
        db.settle(&cluster, 1, &what);
        mailing.go_on(30);
        let alone = cluster[1].of("mail").report();
        assert_eq!((alone.role, alone.parked), (RoleName::Primary, false));
        assert_eq!(alone.epoch, before.epoch, "mail was not promoted");
        assert_eq!(alone.in_sync, [1], "mail goes on without the lost copy");
        let parked = cluster[1].of("wiki").until("it waits", |wiki| wiki.parked);
        assert_eq!(parked.in_sync, [0, 1], "wiki did nothing alone");
        assert!(parked.parked_reason.contains("alpha"), "{parked:#?}");
        let moved = db.load(&cluster, 1);
        moved.go_on(30);

        cluster[0].start();
        for name in [SERVICE, "mail", "wiki"] {
            cluster.until_service_in_sync(name, 1, &[0, 1]);
        }
        for loads in [&moved, &mailing, &waiting] {
            loads.go_on(10);
        }
        let resynced: u64 = [SERVICE, "mail", "wiki"]
            .map(|name| cluster[1].of(name).report().counters.resync_bytes)
            .iter()
            .sum();
        eprintln!("{what}: {resynced} bytes resynced so far");
        moved.finish();
        waiting.finish();

        // Both switch over while the other works; a service that stays where it is notices nothing.
        let before = standing(&cluster[1].of("mail").report());
        cluster[1].of(SERVICE).demote();
        cluster[0].of(SERVICE).promote();
        cluster.until_service_in_sync(SERVICE, 0, &[0, 1]);
        mailing.go_on(10);
        assert_eq!(standing(&cluster[1].of("mail").report()), before);
        mailing.finish();
        let back = db.load(&cluster, 0);
        let before = standing(&cluster[0].of(SERVICE).report());
        for (from, to) in [(1, 0), (0, 1)] {
            cluster[from].of("mail").demote();
            cluster[to].of("mail").promote();
            let loads = mail.load(&cluster, to);
            loads.go_on(20);
            loads.finish();
        }
        back.go_on(10);
        assert_eq!(standing(&cluster[0].of(SERVICE).report()), before);
        back.finish();

        for (app, primary) in [(&db, 0), (&mail, 1), (&wiki, 1)] {
            cluster.until_service_in_sync(app.name, primary, &[0, 1]);
            cluster.verify_service(app.name, primary);
            app.settle(&cluster, primary, &what);
        }
    }
    cluster.stop();
    for name in [SERVICE, "mail", "wiki"] {
        cluster.same_bytes_of(name, &[0, 1]);
    }
}

#[test]
fn a_service_that_is_cut_off_held_or_stopped_disturbs_no_other() {
    let seed = random::seed("services, one held");
    let mut cluster = start(&three_services(Backing::File));
    let mut db = App::new(SERVICE, seed);
    let mut mail = App::new("mail", seed ^ 1);
    // Two ways: mail has its primary beside db's secondary, wiki is not used and must not change at all.
    let before = ["mail", "wiki"].map(|name| standing(&cluster[1].of(name).report()));
    let mailing = mail.load(&cluster, 1);
    let undisturbed = |what: &str| {
        mailing.go_on(60);
        let now = ["mail", "wiki"].map(|name| standing(&cluster[1].of(name).report()));
        assert_eq!(now, before, "{what}");
    };

    // Its link is cut: it waits, with as much in flight as its application can send.
    let mut flood = Vec::new();
    cluster[0].must(&["disconnect", SERVICE, "--peer", "beta"]);
    for (volume, history) in &db.volumes {
        let mix = Mix {
            connections: 8,
            depth: 64,
            reads: 0,
            longest: 512,
            ..Mix::default()
        };
        flood.push(Load::start(history, seed, mix, || {
            cluster[0].of(SERVICE).nbd(volume)
        }));
    }
    cluster[0].of(SERVICE).until("it waits", |db| db.parked);
    undisturbed("db waits for its peer");
    cluster[0].must(&["connect", SERVICE, "--peer", "beta"]);
    cluster.until_service_in_sync(SERVICE, 0, &[0, 1]);
    for load in &flood {
        load.until_acknowledged(50);
    }

    // Its application is held.
    cluster[0].must(&["pause", SERVICE, "--io"]);
    cluster[0]
        .of(SERVICE)
        .until("it is held", |db| db.suspended);
    undisturbed("db is held");
    cluster[0].must(&["resume", SERVICE, "--io"]);
    for load in &flood {
        load.until_acknowledged(50);
    }
    for load in flood {
        load.finish();
    }
    db.settle(&cluster, 0, "after it was held");

    // Its resync is held back.
    cluster[1].must(&["pause", SERVICE]);
    cluster[0].must(&["pause", SERVICE]);
    undisturbed("db's resync is paused");
    cluster[0].must(&["resume", SERVICE]);
    cluster[1].must(&["resume", SERVICE]);

    // It is stopped on the node where the other is primary, and then on both.
    let loads = db.load(&cluster, 0);
    // A person is asked first, since the application on the other node will wait; off a terminal nothing happens.
    let asked = cluster[1].run(&["detach", SERVICE]);
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert_eq!(asked.status.code(), Some(3), "{said}");
    for part in [
        "the application on alpha waits",
        "Nothing was changed",
        "--yes",
    ] {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
    undisturbed("db was not stopped without consent");
    assert!(!cluster[0].of(SERVICE).report().parked);
    cluster[1].must(&["detach", SERVICE, "--yes"]);
    cluster[0].of(SERVICE).until("it waits", |db| db.parked);
    undisturbed("db is stopped beside mail's primary");
    cluster[0].of(SERVICE).detach();
    for load in loads.0 {
        // Demotion ends what waited with an error; it stays undecided.
        let report = load.end();
        assert!(!report.broken.is_empty(), "{report:?}");
    }
    undisturbed("db is stopped on both nodes");
    mailing.finish();
    mail.settle(&cluster, 1, "at the end");
    cluster.verify_service("mail", 1);

    // A restart attaches it again; mail moves meanwhile, as planned.
    cluster[1].of("mail").demote();
    cluster[0].stop();
    cluster[1].stop();
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.until_connected();
    cluster[0].of(SERVICE).promote();
    db.settle(&cluster, 0, "after it was stopped");
    cluster.until_service_in_sync(SERVICE, 0, &[0, 1]);
    cluster.verify_service(SERVICE, 0);
    cluster.stop();
    for name in [SERVICE, "mail", "wiki"] {
        cluster.same_bytes_of(name, &[0, 1]);
    }
}

#[test]
fn a_failed_disk_of_one_service_disturbs_no_other() {
    let seed = random::seed("services, failed disk");
    let mut cluster = start(&three_services(Backing::Faults));
    let mut db = App::new(SERVICE, seed);
    let mut mail = App::new("mail", seed ^ 1);
    let before = standing(&cluster[1].of("mail").report());
    let mailing = mail.load(&cluster, 1);
    let loads = db.load(&cluster, 0);
    loads.go_on(20);

    // A disk that is silent, beside mail's primary.
    let disk = cluster[1].faults("log");
    disk.tell("hang write");
    let start = Instant::now();
    while disk.figure("held") == 0 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "nothing was held"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    mailing.go_on(60);
    assert_eq!(standing(&cluster[1].of("mail").report()), before);
    disk.tell("release");
    loads.go_on(20);

    // A disk that fails: db's primary waits for a copy (or a person), mail goes on.
    disk.tell("eio write");
    cluster[0]
        .of(SERVICE)
        .until("its peer's disk failed", |db| {
            peer(db, 1).link != LinkName::Established
        });
    mailing.go_on(60);
    assert_eq!(standing(&cluster[1].of("mail").report()), before);
    mailing.finish();
    mail.settle(&cluster, 1, "beside a failed disk");
    cluster.verify_service("mail", 1);

    // The disk is well again, and the process attaches it anew.
    cluster[1].of("mail").demote();
    cluster[0].of("mail").promote();
    disk.tell("heal");
    cluster[1].stop();
    cluster[1].start();
    cluster.until_service_in_sync(SERVICE, 0, &[0, 1]);
    cluster.until_service_in_sync("mail", 0, &[0, 1]);
    loads.go_on(20);
    loads.finish();
    db.settle(&cluster, 0, "after its peer's disk failed");
    cluster.verify_service(SERVICE, 0);
    cluster.stop();
    for name in [SERVICE, "mail", "wiki"] {
        cluster.same_bytes_of(name, &[0, 1]);
    }
}

/// Reads both volumes from a primary.
fn reader(cluster: &Cluster, primary: usize) -> impl FnMut(usize, u64, usize) -> Vec<u8> {
    let mut connections = ["data", "log"].map(|volume| {
        let nbd = cluster[primary].of(SERVICE).nbd(volume);
        nbd.unwrap_or_else(|error| panic!("{volume}: {error}"))
    });
    move |volume, at, length| connections[volume].read(at, length).expect("a read")
}

fn chains(cluster: &Cluster, primary: usize, order: &Order, seed: u64) -> Chains {
    Chains::start(order, seed, 4, |volume| {
        cluster[primary].of(SERVICE).nbd(["data", "log"][volume])
    })
}

#[test]
fn the_volumes_of_a_service_share_one_order_and_sync_loses_nothing() {
    let seed = random::seed("order, sync");
    let mut random = Random::new(seed);
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", DATA), ("log", LOG)],
        ..Settings::default()
    });
    cluster[0].promote();
    let order = Order::new(seed, &[DATA, LOG]);
    for moment in 0..4 {
        let (lost, heir) = (moment % 2, 1 - moment % 2);
        let writing = chains(&cluster, lost, &order, random.word());
        writing.until_acknowledged(100 + random.below(400));
        cluster[lost].kill();
        assert!(writing.end() > 0, "the kill came too late");
        cluster[heir].until_misses(lost);
        cluster[heir].promote();
        let what = format!("moment {moment}, read from {}", cluster[heir].name);
        let kept = order.settle(Loss::Nothing, &what, reader(&cluster, heir));
        eprintln!("{what}: {kept:?}");
        assert!(kept.writes > 0);
        cluster[lost].start();
        cluster.until_in_sync(heir, &[0, 1]);
    }
    cluster.verify(0);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}

#[test]
fn an_asynchronous_copy_holds_a_beginning_of_the_order_of_all_volumes() {
    let seed = random::seed("order, async");
    let mut random = Random::new(seed);
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", DATA), ("log", LOG)],
        mode: "async",
        on_peer_loss: "continue",
        ..Settings::default()
    });
    cluster[0].promote();
    let order = Order::new(seed, &[DATA, LOG]);
    let mut lost_in_all = 0;
    for moment in 0..4 {
        let (lost, heir) = (moment % 2, 1 - moment % 2);
        let before = cluster[heir].service().position;
        let writing = chains(&cluster, lost, &order, random.word());
        writing.until_acknowledged(200 + random.below(300));
        // An asynchronous copy is up to `stable_interval_ms` behind.
        cluster[heir].until("something arrived", |copy| copy.position > before);
        if moment >= 2 {
            // The copy stands still while the application goes on: something is lost for sure.
            cluster[heir].freeze();
            cluster[lost].until_misses(heir);
            writing.until_acknowledged(100);
        }
        cluster[lost].kill();
        assert!(writing.end() > 0, "the kill came too late");
        cluster[heir].thaw();
        cluster[heir].until_misses(lost);
        cluster[heir].force();
        let what = format!("moment {moment}, read from {}", cluster[heir].name);
        let kept = order.settle(Loss::Unflushed, &what, reader(&cluster, heir));
        eprintln!("{what}: {kept:?}");
        lost_in_all += kept.lost;
        assert!(kept.writes > 0, "{what}: nothing arrived");
        cluster[lost].start();
        cluster[heir].until("the other copy is back", |service| {
            let other = peer(service, lost);
            other.link == LinkName::Established && other.dirty_bytes == 0
        });
    }
    assert!(lost_in_all > 0, "nothing was lost, so nothing was shown");
    cluster.verify(0);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}

/// A write to one volume that a copy's disk holds back holds back what depends on it on the other volume (D3).
#[test]
fn a_write_that_a_copys_disk_holds_back_holds_back_what_depends_on_it() {
    let seed = random::seed("order, held write");
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", DATA), ("log", LOG)],
        mode: "async",
        on_peer_loss: "continue",
        backing: Backing::Faults,
        external_metadata: true,
        ..Settings::default()
    });
    cluster[0].promote();
    let order = Order::new(seed, &[DATA, LOG]);
    let writing = chains(&cluster, 0, &order, seed);
    cluster[1].until("something arrived", |copy| copy.position > 0);
    for volume in ["data", "log"] {
        // What its disk wrote survives its process.
        cluster[1].faults(volume).tell("cache off");
    }
    let disk = cluster[1].faults("data");
    disk.tell(&format!("hang write 0 {DATA}"));
    let start = Instant::now();
    while disk.figure("held") == 0 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "nothing was held"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    // The primary says several times that more is stable, which lets an asynchronous copy go on as far as order allows.
    for _ in 0..3 {
        let position = cluster[0].service().position;
        writing.until_acknowledged(50);
        cluster[0].until("more is stable", |service| {
            service.stable_position > position
        });
    }
    cluster[1].kill();
    cluster[0].kill();
    writing.end();
    cluster[1].start();
    cluster[1].force();
    let kept = order.settle(Loss::Unflushed, "with a held write", reader(&cluster, 1));
    eprintln!("{kept:?}");
    assert!(kept.writes > 0 && kept.lost > 0, "{kept:?}");
}
