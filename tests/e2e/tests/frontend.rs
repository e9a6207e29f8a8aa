//! What the frontend promises applications, on real nodes with failovers: flushes across connections, exports by epoch, requests of
//! any bytes, and volumes that grew (D1, D2, D4, D15, D17).

use holdfast_e2e::bytes::{Bytes, Racers};
use holdfast_e2e::cluster::SERVICE;
use holdfast_e2e::nbd::NbdError;
use holdfast_e2e::{Backing, Cluster, Nbd, Random, Settings, random};

fn started(settings: &Settings) -> Cluster {
    let cluster = Cluster::start(settings);
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    cluster
}

fn block(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let words = (0..512).map(|_| random.word().to_le_bytes());
    words.flatten().collect()
}

/// A flush on one connection makes durable, on both machines, what was answered on the others (multi-conn).
#[test]
fn a_flush_covers_what_other_connections_were_answered() {
    const WRITERS: u64 = 4;
    const EACH: u64 = 16;
    let seed = random::seed("multi-conn");
    let mut cluster = started(&Settings {
        backing: Backing::Faults,
        ..Settings::default()
    });
    for moment in 0..3 {
        let primary = moment as usize % 2;
        let number = |writer: u64, n: u64| 1 + (moment * WRITERS + writer) * EACH + n;
        let connect = || cluster[primary].nbd("data").expect("a connection");
        let mut flushes = connect();
        assert!(flushes.can_multi_conn());
        let mut writers: Vec<Nbd> = (0..WRITERS).map(|_| connect()).collect();
        for n in 0..EACH {
            for (writer, nbd) in (0..).zip(&mut writers) {
                let number = number(writer, n);
                nbd.write(number * 4096, &block(seed ^ number)).unwrap();
            }
        }
        // The caches are volatile: what is in them now would be lost.
        let unflushed = [0, 1].map(|at| cluster[at].faults("data").figure("unflushed"));
        eprintln!("moment {moment}: {unflushed:?} sectors in the caches before the flush");
        flushes.flush().unwrap();
        // Nothing that was not flushed survives on either machine.
        let first = (moment as usize + 1) % 2;
        cluster[first].cut_power(None);
        cluster[1 - first].cut_power(None);
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.until_connected();
        let heir = 1 - primary;
        cluster[heir].promote();
        let mut nbd = cluster[heir].nbd("data").unwrap();
        for number in 1..number(WRITERS - 1, EACH - 1) + 1 {
            let read = nbd.read(number * 4096, 4096).unwrap();
            assert!(
                read == block(seed ^ number),
                "moment {moment}: block {number} was flushed and is lost"
            );
        }
        nbd.disconnect();
        cluster.until_in_sync(heir, &[0, 1]);
    }
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}

/// A client that must not come back to a later epoch names its own, and is refused once that is over.
#[test]
fn an_export_by_epoch_is_refused_once_superseded() {
    let mut cluster = started(&Settings::default());
    let epoch = cluster[0].service().epoch.number;
    let refused =
        |cluster: &Cluster, at: usize, export: &str, why: &str| match cluster[at].nbd(export) {
            Err(NbdError::Refused(reason)) => assert!(reason.contains(why), "{export}: {reason}"),
            Err(error) => panic!("{export} on {}: {error}", cluster[at].name),
            Ok(_) => panic!("{export} was opened on {}", cluster[at].name),
        };
    for export in [
        format!("data@{epoch}"),
        format!("{SERVICE}/data@{epoch}"),
        "data".into(),
    ] {
        let mut nbd = cluster[0].nbd(&export).expect(&export);
        nbd.write(0, &block(1)).unwrap();
        nbd.disconnect();
    }
    refused(&cluster, 0, &format!("data@{}", epoch - 1), "superseded");
    refused(&cluster, 0, &format!("data@{}", epoch + 1), "not known");
    refused(&cluster, 0, "data@one", "not the number");
    refused(&cluster, 1, &format!("data@{epoch}"), "secondary");

    // One session lives through the demotion of its primary, and must not reach the next epoch on the same node.
    let mut old = cluster[0].nbd(&format!("data@{epoch}")).unwrap();
    let mut plain = cluster[0].nbd("data").unwrap();
    cluster[0].demote();
    cluster[0].promote();
    let next = cluster[0].service().epoch.number;
    assert!(next > epoch);
    for nbd in [&mut old, &mut plain] {
        let answer = nbd.write(0, &block(2));
        assert!(
            answer.is_err(),
            "a session of epoch {epoch} wrote in {next}"
        );
    }
    refused(&cluster, 0, &format!("data@{epoch}"), "superseded");
    let mut now = cluster[0].nbd(&format!("data@{next}")).unwrap();
    assert!(now.read(0, 4096).unwrap() == block(1));

    // After a failover, a client that reconnects and replays is refused by the heir, and by the old node when that is back.
    now.write(4096, &block(3)).unwrap();
    cluster[0].kill();
    assert!(now.write(8192, &block(4)).is_err());
    cluster[1].until_misses(0);
    cluster[1].promote();
    refused(&cluster, 1, &format!("data@{next}"), "superseded");
    let heirs = cluster[1].service().epoch.number;
    let mut nbd = cluster[1].nbd(&format!("data@{heirs}")).unwrap();
    assert!(nbd.read(4096, 4096).unwrap() == block(3));
    nbd.disconnect();
    cluster[0].start();
    cluster.until_in_sync(1, &[0, 1]);
    refused(&cluster, 0, &format!("data@{next}"), "secondary");
    cluster[1].demote();
    cluster[0].promote();
    refused(&cluster, 0, &format!("data@{next}"), "superseded");
    refused(&cluster, 0, &format!("data@{heirs}"), "superseded");
}

fn any_bytes(test: &str, settings: &Settings) {
    const FIRST: u64 = (1 << 20) + 77;
    let seed = random::seed(test);
    let mut random = Random::new(seed);
    let mut cluster = started(settings);
    let bytes = Bytes::new(FIRST, 40_000);
    for moment in 0..4 {
        let (lost, heir) = (moment % 2, 1 - moment % 2);
        let racers = Racers::start(&bytes, random.word(), 4, || cluster[lost].nbd("data"));
        racers.until_acknowledged(200 + random.below(600));
        let what = format!("moment {moment}");
        if moment < 3 {
            cluster[lost].kill();
            assert!(racers.end() > 0, "the kill came too late");
            cluster[heir].until_misses(lost);
            cluster[heir].promote();
        } else {
            assert_eq!(racers.end(), 0, "nothing fails without a fault");
            cluster[lost].demote();
            cluster[heir].promote();
        }
        let mut nbd = cluster[heir].nbd("data").unwrap();
        bytes.settle(&what, &nbd.read(FIRST, 40_000).unwrap());
        nbd.disconnect();
        if !cluster[lost].is_running() {
            cluster[lost].start();
        }
        cluster.until_in_sync(heir, &[0, 1]);
        eprintln!("{what}: writes and reads so far {:?}", bytes.totals());
    }
    cluster.verify(0);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}

#[test]
fn requests_of_any_bytes_race_and_survive_failovers() {
    any_bytes("any bytes", &Settings::default());
}

#[test]
fn requests_of_any_bytes_race_on_sectors_of_4096_bytes() {
    let settings = Settings {
        sector_size: Some(4096),
        external_metadata: true,
        ..Settings::default()
    };
    any_bytes("any bytes, large sectors", &settings);
}

/// Growing is done while the service runs, on every copy; what was promised holds afterwards, through a failover too.
#[test]
fn a_grown_volume_is_larger_for_new_connections_and_the_same_on_both_copies() {
    const BEFORE: u64 = 32 << 20;
    const AFTER: u64 = 48 << 20;
    let mut cluster = started(&Settings {
        volumes: vec![("data", BEFORE)],
        ..Settings::default()
    });
    let grow = ["volume", "grow", SERVICE, "data", "48MiB"];
    let mut nbd = cluster[0].nbd("data").unwrap();
    for number in [0, 5, BEFORE / 4096 - 1] {
        nbd.write(number * 4096, &block(number)).unwrap();
    }
    assert!(nbd.write(BEFORE, &block(7)).is_err(), "beyond the end");

    cluster[0].must(&grow);
    // The connection that is open keeps its size and goes on.
    assert!(nbd.write(BEFORE, &block(7)).is_err(), "beyond its end");
    nbd.write(5 * 4096, &block(5)).unwrap();
    nbd.disconnect();
    let mut nbd = cluster[0].nbd("data").unwrap();
    assert_eq!(nbd.size(), AFTER, "a new connection sees the new size");
    for number in [0, 5, BEFORE / 4096 - 1] {
        assert!(
            nbd.read(number * 4096, 4096).unwrap() == block(number),
            "{number}"
        );
    }
    let grown = nbd.read(BEFORE, (AFTER - BEFORE) as usize).unwrap();
    assert!(
        grown.iter().all(|byte| *byte == 0),
        "the new room is zeroes"
    );
    for number in [BEFORE / 4096, AFTER / 4096 - 1] {
        nbd.write(number * 4096, &block(number)).unwrap();
    }
    assert!(nbd.write(AFTER, &block(7)).is_err(), "beyond the end");
    nbd.disconnect();

    cluster[0].kill();
    cluster[1].until_misses(0);
    cluster[1].promote();
    let mut nbd = cluster[1].nbd("data").unwrap();
    assert_eq!(nbd.size(), AFTER);
    for number in [0, 5, BEFORE / 4096 - 1, BEFORE / 4096, AFTER / 4096 - 1] {
        assert!(
            nbd.read(number * 4096, 4096).unwrap() == block(number),
            "{number}"
        );
    }
    nbd.disconnect();
    cluster[0].start();
    cluster.until_in_sync(1, &[0, 1]);
    cluster.verify_service(SERVICE, 1);
    cluster.stop();
    let copies = [0, 1].map(|at| std::fs::read(cluster[at].image("data")).unwrap());
    assert!(copies[0][..AFTER as usize] == copies[1][..AFTER as usize]);
}
