//! Nodes that stand still for longer than their peer waits, as on a paused virtual machine or a machine that swaps, and go on as if
//! nothing had happened: nobody acknowledges what was taken over by another, and nothing acknowledged is lost (C1, D1, D2, D7, D8,
//! D11).

use holdfast_e2e::cluster::SERVICE;
use holdfast_e2e::process::{self, available};
use holdfast_e2e::{Cluster, History, Load, Loss, Mix, Random, Settings, random};
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use rustix::process::Signal;

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
            volumes: vec![("data", 16 << 20)],
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

    /// A load in full flow on the primary. A primary that was paused may answer a read before it hears of its successor, which
    /// nothing but a lease could prevent; so these loads read nothing.
    #[track_caller]
    fn load(&mut self) -> Load {
        let node = &self.cluster[self.primary];
        let mix = Mix {
            reads: 0,
            flushes: 5,
            connections: 1,
            depth: 24,
            // What of two writes at once is there in the end says nothing of the other one.
            overlap: false,
            ..Mix::default()
        };
        let load = Load::start(&self.history, self.random.word(), mix, || node.nbd("data"));
        load.until_acknowledged(50 + self.random.below(200));
        load
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
        nbd.flush()
            .unwrap_or_else(|error| panic!("{what}: a flush: {error}"));
        nbd.disconnect();
    }

    /// One primary, two good copies, and the volume holds what it must.
    #[track_caller]
    fn all_is_well(&self, what: &str) {
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        let other = self.cluster[1 - self.primary].service();
        assert_eq!(other.role, RoleName::Secondary, "{what}: {other:#?}");
        self.cluster.verify(self.primary);
        self.settle(what);
        eprintln!("{what}: {:?}", self.history.totals());
    }

    #[track_caller]
    fn finish(mut self) {
        self.cluster.stop();
        self.cluster.same_bytes(&[0, 1]);
    }
}

/// Its requests are in the sockets of a process that stands still, and it goes on after another copy was promoted. What it
/// acknowledges then is on the copy that was promoted, which had answered it before (C1: a late acknowledgement); what it is asked
/// for after that it never acknowledges, neither writes nor flushes.
#[test]
fn a_primary_that_was_paused_and_replaced_acknowledges_nothing_its_successor_lacks() {
    let mut pair = Pair::begin("paused primary, replaced", "suspend");
    let mut late = 0;
    for moment in 0..4 {
        let (paused, heir) = (pair.primary, 1 - pair.primary);
        let what = format!("moment {moment}, {} paused", pair.cluster[paused].name);
        let [mut writer, mut flusher] = [(); 2].map(|()| {
            pair.cluster[paused]
                .nbd("data")
                .expect("the primary serves")
        });
        let load = pair.load();
        pair.cluster[paused].freeze();
        pair.cluster[heir].until_misses(paused);
        pair.cluster[heir].promote();
        let before = load.acknowledged() + load.flushed();
        pair.primary = heir;
        // From here on the history knows what the successor has, and takes no acknowledgement of anything else.
        pair.settle(&what);
        // Asked for when another copy is primary already.
        let at = 12 << 20;
        let kept = read(&pair.cluster, heir, at);
        writer
            .submit_write(at, &[0xee; 4096], false)
            .expect("room in the socket");
        flusher.submit_flush().expect("room in the socket");
        // The old one returns to a volume in use, or at rest.
        let successor = (moment % 2 == 0).then(|| pair.load());
        pair.cluster[paused].thaw();
        let demoted = pair.cluster[paused].until("it knows of its successor", |service| {
            service.role == RoleName::Secondary
        });
        assert_eq!(demoted.epoch.owner, Some(heir as u8), "{what}");
        for nbd in [&mut writer, &mut flusher] {
            let answer = nbd.receive().map(|reply| reply.result);
            assert!(
                !matches!(answer, Ok(Ok(_))),
                "{what}: acknowledged by a primary that was replaced"
            );
        }
        let report = load.end();
        assert!(!report.broken.is_empty(), "{what}: {report:?}");
        late += report.acknowledged + report.flushes - before;
        assert!(
            read(&pair.cluster, heir, at) == kept,
            "{what}: a write of the old primary is on the new one's volume"
        );
        let load = successor.unwrap_or_else(|| pair.load());
        pair.cluster.until_in_sync(heir, &[0, 1]);
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(&what);
    }
    eprintln!("{late} late acknowledgements, of writes that the successor has");
    pair.finish();
}

#[track_caller]
fn read(cluster: &Cluster, node: usize, at: u64) -> Vec<u8> {
    let mut nbd = cluster[node].nbd("data").expect("the primary serves");
    let data = nbd.read(at, 4096).expect("a read");
    nbd.disconnect();
    data
}

/// Nobody was promoted meanwhile: the application sees no more than a pause.
#[test]
fn a_primary_that_was_paused_goes_on() {
    for on_peer_loss in ["suspend", "continue"] {
        let mut pair = Pair::begin(&format!("paused primary, {on_peer_loss}"), on_peer_loss);
        for moment in 0..3 {
            let what = format!("{on_peer_loss}, moment {moment}");
            let load = pair.load();
            pair.cluster[0].freeze();
            pair.cluster[1].until_misses(0);
            assert_eq!(
                pair.cluster[1].service().role,
                RoleName::Secondary,
                "{what}"
            );
            pair.cluster[0].thaw();
            load.until_acknowledged(50);
            load.finish();
            pair.all_is_well(&what);
        }
        pair.finish();
    }
}

#[test]
fn the_primary_waits_for_a_secondary_that_is_paused_or_goes_on_without_it() {
    for on_peer_loss in ["suspend", "continue"] {
        let mut pair = Pair::begin(&format!("paused secondary, {on_peer_loss}"), on_peer_loss);
        for moment in 0..3 {
            let what = format!("{on_peer_loss}, moment {moment}");
            let load = pair.load();
            pair.cluster[1].freeze();
            pair.cluster[0].until_misses(1);
            if on_peer_loss == "suspend" {
                let waits = pair.cluster[0].until("it waits", |service| service.parked);
                assert_eq!(waits.in_sync, [0, 1], "{what}: it did nothing alone");
            } else {
                load.until_acknowledged(50);
                assert_eq!(pair.cluster[0].service().in_sync, [0], "{what}");
            }
            pair.cluster[1].thaw();
            load.until_acknowledged(50);
            load.finish();
            pair.all_is_well(&what);
        }
        pair.finish();
    }
}

#[test]
fn both_are_paused_at_once_and_go_on_in_any_order() {
    let mut pair = Pair::begin("both paused", "suspend");
    for moment in 0..4 {
        let what = format!("moment {moment}");
        let load = pair.load();
        let first = pair.random.below(2) as usize;
        pair.cluster[first].freeze();
        // The other one finds out or does not.
        if pair.random.percent(50) {
            pair.cluster[1 - first].until_misses(first);
        }
        pair.cluster[1 - first].freeze();
        std::thread::sleep(std::time::Duration::from_millis(pair.random.below(1500)));
        let first = pair.random.below(2) as usize;
        pair.cluster[first].thaw();
        if pair.random.percent(50) {
            pair.cluster[first].until_misses(1 - first);
        }
        pair.cluster[1 - first].thaw();
        load.until_acknowledged(50);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

/// In the midst of a resync its source, its target or both stand still, at any moment of it: it goes on where it was or begins anew,
/// and a target is promoted at no moment.
#[test]
fn source_or_target_is_paused_in_the_midst_of_a_resync() {
    let mut pair = Pair::begin("paused in a resync", "continue");
    for moment in 0..6 {
        let paused: &[usize] = [&[1][..], &[0], &[0, 1]][moment % 3];
        let what = format!("moment {moment}, paused {paused:?}");
        pair.cluster[1].stop();
        let load = pair.load();
        load.until_acknowledged(200);
        load.finish();
        // Held back until they stand still, or not at all.
        let held = moment < 3;
        if held {
            pair.cluster[0].must(&["pause", SERVICE]);
        }
        let load = pair.load();
        pair.cluster[1].start();
        pair.cluster[0].until("the resync has begun", |service| {
            service.peers[0].resync.is_some() || service.in_sync == [0, 1]
        });
        if held {
            let target = pair.cluster[1].service();
            assert_eq!(target.state, StateName::Inconsistent, "{what}");
            // What is mirrored goes on.
            load.until_acknowledged(20);
            pair.cluster[0].must(&["resume", SERVICE]);
        }
        for node in paused {
            pair.cluster[*node].freeze();
        }
        let refuses = |node: usize| {
            let refused = pair.cluster[node].run(&["promote", SERVICE]);
            assert!(!refused.status.success(), "{what}: {refused:?}");
        };
        match paused {
            [0] => {
                pair.cluster[1].until_misses(0);
                refuses(1);
            }
            [1] => {
                pair.cluster[0].until_misses(1);
                load.until_acknowledged(20);
            }
            _ => std::thread::sleep(std::time::Duration::from_millis(
                500 + pair.random.below(800),
            )),
        }
        for node in paused {
            pair.cluster[*node].thaw();
        }
        load.until_acknowledged(30);
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

/// The application stands still with requests under way and answers that it does not take. Others on the same volume go on, the
/// service moves to the other node without it, and it never gets an answer from a later epoch.
#[test]
fn an_application_that_stands_still_holds_up_nobody() {
    if !available("fio") {
        return;
    }
    let mut pair = Pair::begin("paused application", "suspend");
    for moment in 0..2 {
        let (old, new) = (pair.primary, 1 - pair.primary);
        let what = format!("moment {moment}");
        let written = pair.cluster[old].service().position;
        let mut fio = std::process::Command::new("fio");
        // More answers than a socket buffer holds, whatever its limit.
        fio.args(["--name=stands", "--ioengine=nbd", "--rw=randrw"])
            .args(["--rwmixread=80", "--bs=256k", "--iodepth=128"])
            .args(["--offset=10m", "--size=4m"])
            .args(["--time_based", "--runtime=600"])
            .arg(format!("--uri={}", pair.cluster[old].nbd_uri("data")))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut fio = process::spawn(fio).expect("fio");
        pair.cluster[old].until("fio writes", |service| service.position > written + 50);
        process::signal(&fio, Signal::STOP);
        let load = pair.load();
        load.until_acknowledged(200);
        load.finish();
        pair.settle(&what);
        pair.cluster[old].demote();
        pair.cluster[new].promote();
        pair.primary = new;
        let load = pair.load();
        load.until_acknowledged(200);
        process::signal(&fio, Signal::CONT);
        let ended = process::wait(&mut fio, holdfast_e2e::cluster::PATIENCE);
        assert!(
            ended.is_some_and(|status| !status.success()),
            "{what}: fio goes on without its volume: {ended:?}"
        );
        load.finish();
        pair.all_is_well(&what);
    }
    pair.finish();
}

/// The policy lets the primary go on alone, so a person must force the other copy, and then both may have written. That is told as a
/// split brain, and nothing is overwritten until a person says whose writes are given up (D8, D11).
#[test]
fn a_forced_promotion_beside_a_paused_primary_is_a_split_brain_that_nobody_hides() {
    let mut pair = Pair::begin("split brain", "continue");
    let load = pair.load();
    pair.cluster[0].freeze();
    pair.cluster[1].until_misses(0);
    let refused = pair.cluster[1].run(&["promote", SERVICE]);
    assert!(
        !refused.status.success(),
        "promoted without force: {refused:?}"
    );
    pair.cluster[1].force();
    // What was acknowledged before the pause is there. The history stays open: the old primary will add to it.
    let mut nbd = pair.cluster[1].nbd("data").expect("a primary");
    let read = |at, length| nbd.read(at, length);
    let check = pair.history.check(Loss::Nothing, read).expect("a read");
    check.holds("forced");
    let whole = nbd.read(1 << 20, 8 << 20).expect("a read");
    let before = pair.history.totals().writes_acknowledged;
    let theirs = History::new(pair.random.word(), 10 << 20, 4 << 20);
    let seed = pair.random.word();
    let successor = Load::start(&theirs, seed, Mix::default(), || {
        pair.cluster[1].nbd("data")
    });
    successor.until_acknowledged(100);

    pair.cluster[0].thaw();
    // Alone, as it believes, it goes on until it hears of its successor.
    let old = load.end();
    let alone = pair.history.totals().writes_acknowledged - before;
    eprintln!("{alone} writes acknowledged by the old primary after its pause: {old:?}");
    for node in 0..2 {
        pair.cluster[node].until("it tells of the split brain", |service| {
            let peer = &service.peers[0];
            peer.link == LinkName::Off && peer.handshake.contains("split brain")
        });
    }
    successor.until_acknowledged(50);
    successor.finish();
    let facts = pair.cluster[1].must(&["split-brain", "show", SERVICE]);
    eprintln!("{facts}");
    assert!(pair.cluster[0].service().peers[0].link == LinkName::Off);

    let said = pair.cluster[0].must(&[
        "split-brain",
        "resolve",
        SERVICE,
        "--keep",
        "theirs",
        "--yes",
    ]);
    eprintln!("{said}");
    pair.cluster[1].must(&["connect", SERVICE]);
    pair.primary = 1;
    pair.cluster.until_in_sync(1, &[0, 1]);
    pair.cluster.verify(1);
    let read = |at, length| nbd.read(at, length);
    let check = theirs.settle(Loss::Nothing, read).expect("a read");
    check.holds("of the successor's writes");
    assert!(
        nbd.read(1 << 20, 8 << 20).expect("a read") == whole,
        "a write of the old primary is on the new one's volume"
    );
    nbd.disconnect();
    pair.cluster.stop();
    pair.cluster.same_bytes(&[0, 1]);
}
