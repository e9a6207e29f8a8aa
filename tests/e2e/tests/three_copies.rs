//! Three real nodes, two in sync and the third asynchronous: it follows whoever is primary, holds up nobody, costs no full copy after a
//! failover, and is what is left when both others are gone (D1, D3, D7, D8, D11).

use holdfast_e2e::cluster::SERVICE;
use holdfast_e2e::order::Chains;
use holdfast_e2e::services::peer;
use holdfast_e2e::{Cluster, History, Load, Loss, Mix, Order, Random, Settings, random};
use holdfast_replicator::control::protocol::{LinkName, RoleName, ServiceReport, StateName};

/// Larger than what an activity log of so small a load can cover: an unclean stop makes whole extents of 4 MiB dirty.
const SIZE: u64 = 64 << 20;
/// Slot of the asynchronous copy.
const THIRD: usize = 2;

fn settings() -> Settings {
    Settings {
        nodes: 3,
        volumes: vec![("data", SIZE)],
        asynchronous: vec![THIRD],
        ..Settings::default()
    }
}

fn history(seed: u64) -> History {
    History::new(seed, 2 << 20, 12 << 20)
}

#[track_caller]
fn load(cluster: &Cluster, primary: usize, history: &History, random: &mut Random) -> Load {
    Load::start(history, random.word(), Mix::default(), || {
        cluster[primary].nbd("data")
    })
}

#[track_caller]
fn settle(cluster: &Cluster, primary: usize, history: &History, what: &str) {
    let what = format!("{what}, read from {}", cluster[primary].name);
    let mut nbd = cluster[primary].nbd("data").expect("the primary serves");
    let check = history.settle(Loss::Nothing, |at, length| nbd.read(at, length));
    check.expect("a read").holds(&what);
    nbd.disconnect();
}

/// Whether the copy in that slot has everything and gets what comes.
fn follows(service: &ServiceReport, slot: usize) -> bool {
    let copy = peer(service, slot);
    copy.link == LinkName::Established && copy.dirty_bytes == 0 && copy.resync.is_none()
}

/// Waits until the copy in that slot has everything that was written, and is a whole copy.
#[track_caller]
fn until_follows(cluster: &Cluster, primary: usize, slot: usize) {
    cluster[primary].until("the copy follows", |service| {
        follows(service, slot) && peer(service, slot).unacknowledged_bytes == 0
    });
    cluster[slot].until("it is whole", |service| {
        matches!(service.state, StateName::Complete | StateName::UpToDate)
    });
}

#[test]
fn the_third_copy_follows_from_primary_to_primary_by_bits() {
    let seed = random::seed("third copy follows");
    let mut random = Random::new(seed);
    let history = history(seed);
    let mut cluster = Cluster::start(&settings());
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    until_follows(&cluster, 0, THIRD);
    for moment in 0..4 {
        let (lost, heir) = (moment % 2, 1 - moment % 2);
        let what = format!("moment {moment}");
        let before = cluster[heir].service().counters.resync_bytes;
        let running = load(&cluster, lost, &history, &mut random);
        running.until_acknowledged(100 + random.below(200));
        cluster[lost].kill();
        assert!(running.end().in_flight > 0, "the kill came too late");
        cluster[heir].until_misses(lost);
        cluster[heir].promote();
        settle(&cluster, heir, &history, &what);

        // The third copy follows the heir under load, while the lost one is away.
        let running = load(&cluster, heir, &history, &mut random);
        running.until_acknowledged(30);
        cluster[heir].until("the third copy follows it", |service| {
            follows(service, THIRD)
        });
        let resynced = cluster[heir].service().counters.resync_bytes - before;
        eprintln!("{what}: {resynced} bytes resynced to the third copy");
        assert!(
            resynced < SIZE / 2,
            "{what}: {resynced} bytes resynced to a copy that had nearly all of it"
        );

        cluster[lost].start();
        cluster.until_in_sync(heir, &[0, 1]);
        running.until_acknowledged(30);
        running.finish();
        until_follows(&cluster, heir, THIRD);
        settle(&cluster, heir, &history, &what);
        cluster.verify_service(SERVICE, heir);
    }

    // The third copy itself is killed and comes back.
    let running = load(&cluster, 0, &history, &mut random);
    running.until_acknowledged(30);
    cluster[THIRD].kill();
    running.until_acknowledged(200);
    let before = cluster[0].service().counters.resync_bytes;
    cluster[THIRD].start();
    running.until_acknowledged(30);
    running.finish();
    until_follows(&cluster, 0, THIRD);
    let resynced = cluster[0].service().counters.resync_bytes - before;
    assert!(
        resynced < SIZE / 2,
        "{resynced} bytes after a short absence"
    );
    cluster.verify_service(SERVICE, 0);
    assert_eq!(cluster[0].service().in_sync, [0, 1], "never the third one");
    cluster.stop();
    cluster.same_bytes(&[0, 1, 2]);
}

#[test]
fn a_third_copy_that_stands_still_holds_up_nobody_and_returns_by_itself() {
    let seed = random::seed("third copy stands still");
    let mut random = Random::new(seed);
    let history = history(seed);
    let mut settings = settings();
    settings.tuning = vec![
        ("heartbeat_ms", "100".into()),
        ("peer_timeout_ms", "6000".into()),
        ("async_queue_bytes", (2 << 20).to_string()),
    ];
    let mut cluster = Cluster::start(&settings);
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    until_follows(&cluster, 0, THIRD);
    let running = load(&cluster, 0, &history, &mut random);
    running.until_acknowledged(50);

    // Behind a link that is up and takes nothing: over the bound, writes are bits.
    cluster[THIRD].freeze();
    cluster[0].until("it falls back to the bitmap", |service| {
        let third = peer(service, THIRD);
        third.link == LinkName::Established && third.dirty_bytes > 0
    });
    running.until_acknowledged(200);
    let service = cluster[0].service();
    assert!(!service.parked, "{service:#?}");
    assert!(
        cluster[0]
            .events(50)
            .iter()
            .any(|event| event.kind == "congested"),
        "falling back is an event"
    );
    cluster[THIRD].thaw();
    cluster[0].until("it returned", |service| follows(service, THIRD));
    running.until_acknowledged(50);

    // Gone for so long that its link ends: no other difference.
    cluster[THIRD].freeze();
    cluster[0].until_misses(THIRD);
    running.until_acknowledged(200);
    cluster[THIRD].thaw();
    cluster[0].until("it returned", |service| follows(service, THIRD));

    // Disconnected by a person, the pair fails over, and the copy follows the other one.
    cluster[0].must(&["disconnect", SERVICE, "--peer", "gamma"]);
    cluster[1].must(&["disconnect", SERVICE, "--peer", "gamma"]);
    running.until_acknowledged(100);
    cluster[0].kill();
    running.end();
    cluster[1].until_misses(0);
    cluster[1].promote();
    settle(&cluster, 1, &history, "without the third copy");
    let before = cluster[1].service().counters.resync_bytes;
    cluster[1].must(&["connect", SERVICE, "--peer", "gamma"]);
    until_follows(&cluster, 1, THIRD);
    let resynced = cluster[1].service().counters.resync_bytes - before;
    assert!(resynced < SIZE / 2, "{resynced} bytes for a short absence");
    cluster[0].start();
    cluster.until_in_sync(1, &[0, 1]);
    cluster.verify_service(SERVICE, 1);
    settle(&cluster, 1, &history, "at the end");
    cluster.stop();
    cluster.same_bytes(&[0, 1, 2]);
}

fn reader(cluster: &Cluster, primary: usize) -> impl FnMut(usize, u64, usize) -> Vec<u8> {
    let mut connections = ["data", "log"].map(|volume| {
        let nbd = cluster[primary].nbd(volume);
        nbd.unwrap_or_else(|error| panic!("{volume}: {error}"))
    });
    move |volume, at, length| connections[volume].read(at, length).expect("a read")
}

#[test]
fn both_copies_in_sync_are_lost_and_the_third_is_forced() {
    let seed = random::seed("third copy forced");
    let mut random = Random::new(seed);
    let sizes = [8 << 20, 4 << 20];
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", sizes[0]), ("log", sizes[1])],
        ..settings()
    });
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    until_follows(&cluster, 0, THIRD);
    let order = Order::new(seed, &sizes);
    let chains = |cluster: &Cluster, primary: usize, seed| {
        Chains::start(&order, seed, 4, |volume| {
            cluster[primary].nbd(["data", "log"][volume])
        })
    };

    // It stands still for the last moments before both others are lost.
    let writing = chains(&cluster, 0, random.word());
    writing.until_acknowledged(200 + random.below(200));
    cluster[THIRD].until("something arrived", |third| third.position > 0);
    cluster[THIRD].freeze();
    // What is sent to it may still be waiting in its socket: what comes after the link has ended is not.
    cluster[0].until_misses(THIRD);
    writing.until_acknowledged(50);
    let (first, second) = if random.percent(50) { (0, 1) } else { (1, 0) };
    cluster[first].kill();
    cluster[second].kill();
    writing.end();
    cluster[THIRD].thaw();
    cluster[THIRD].until_misses(0);
    cluster[THIRD].until_misses(1);

    // Without force it refuses; a force says first what that may lose, and does nothing unless somebody agrees.
    let refused = cluster[THIRD].run(&["promote", SERVICE]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let asked = cluster[THIRD].run(&["promote", SERVICE, "--force"]);
    assert_eq!(asked.status.code(), Some(3), "{asked:?}");
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    eprintln!("{said}");
    assert!(said.contains("may lose"), "{said}");
    assert_eq!(cluster[THIRD].service().role, RoleName::Secondary);
    cluster[THIRD].force();
    let kept = order.settle(
        Loss::Unflushed,
        "on the third copy",
        reader(&cluster, THIRD),
    );
    eprintln!("kept {kept:?}");
    assert!(kept.writes > 0 && kept.lost > 0, "{kept:?}");
    let writing = chains(&cluster, THIRD, random.word());
    writing.until_acknowledged(100);

    // The two come back, with writes that the third never had: it stays primary, and they follow it.
    let (first, second) = if random.percent(50) { (0, 1) } else { (1, 0) };
    for (back, both) in [(first, false), (second, true)] {
        cluster[back].start();
        if both || random.percent(50) {
            cluster[THIRD].until("it follows", |service| follows(service, back));
        }
    }
    for back in [0, 1] {
        cluster[THIRD].until("it follows", |service| follows(service, back));
        assert_eq!(cluster[back].service().role, RoleName::Secondary);
    }
    writing.until_acknowledged(100);
    assert_eq!(writing.end(), 0, "the third copy served all the time");
    for back in [0, 1] {
        until_follows(&cluster, THIRD, back);
    }
    order.settle(
        Loss::Nothing,
        "after both came back",
        reader(&cluster, THIRD),
    );
    cluster.verify_service(SERVICE, THIRD);

    // Nothing was overwritten without a word: the meeting names the writes that were given up.
    let given_up = [0, 1].iter().any(|at| {
        cluster[*at].events(200).iter().any(|event| {
            event.kind == "handshake" && event.text.contains("may have been acknowledged")
        })
    });
    assert!(given_up, "{:#?}", cluster[0].events(200));

    // Home again, as planned.
    cluster[THIRD].demote();
    cluster.until_connected();
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    until_follows(&cluster, 0, THIRD);
    order.settle(Loss::Nothing, "home again", reader(&cluster, 0));
    let writing = chains(&cluster, 0, random.word());
    writing.until_acknowledged(100);
    assert_eq!(writing.end(), 0);
    until_follows(&cluster, 0, THIRD);
    order.settle(Loss::Nothing, "home again, in use", reader(&cluster, 0));
    cluster.verify_service(SERVICE, 0);
    cluster.stop();
    cluster.same_bytes(&[0, 1, 2]);
}

#[test]
fn a_third_node_joins_a_pair_in_use() {
    let seed = random::seed("third node joins");
    let mut random = Random::new(seed);
    let history = history(seed);
    let mut cluster = Cluster::start(&Settings {
        later: vec![THIRD],
        ..settings()
    });
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    let running = load(&cluster, 0, &history, &mut random);
    running.until_acknowledged(200);

    // The pair learns to trust it while it serves; its configuration is read when each is started anew, one after the other.
    cluster.introduce(THIRD);
    running.until_acknowledged(50);
    cluster[1].stop();
    cluster[1].start();
    cluster.until_in_sync(0, &[0, 1]);
    running.until_acknowledged(20);
    running.finish();
    cluster[0].demote();
    cluster[1].promote();
    let running = load(&cluster, 1, &history, &mut random);
    running.until_acknowledged(20);
    cluster[THIRD].start();
    cluster[1].until("the third copy follows", |service| follows(service, THIRD));
    cluster[0].stop();
    cluster[0].start();
    cluster.until_in_sync(1, &[0, 1]);
    running.until_acknowledged(50);
    running.finish();
    cluster.until_connected();
    until_follows(&cluster, 1, THIRD);
    settle(&cluster, 1, &history, "with a third copy");
    cluster.verify_service(SERVICE, 1);
    cluster.stop();
    cluster.same_bytes(&[0, 1, 2]);
}
