//! SIGKILL at random moments of a load, on volumes in sync mode: no acknowledged write is lost, and the copies converge (D1,
//! D2, D4, D7, D10).

use holdfast_e2e::{Cluster, History, Load, Loss, Mix, Random, Settings, random};
use std::time::Duration;

const VOLUME: u64 = 32 << 20;
const REGION: u64 = 12 << 20;

#[test]
fn the_primary_is_killed_and_its_peer_goes_on() {
    let seed = random::seed("kill primary");
    let mut random = Random::new(seed);
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", VOLUME)],
        ..Settings::default()
    });
    let history = History::new(seed, 4 << 20, REGION);
    let (mut primary, mut other) = (0, 1);
    cluster[primary].promote();
    cluster.until_in_sync(primary, &[0, 1]);
    for moment in 0..10 {
        let load = Load::start(&history, random.word(), Mix::default(), || {
            cluster[primary].nbd("data")
        });
        load.until_acknowledged(50 + random.below(400));
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        cluster[primary].kill();
        let report = load.end();
        assert!(report.in_flight > 0, "moment {moment}: {report:?}");

        cluster[other].until_misses(primary);
        cluster[other].promote();
        let mut nbd = cluster[other].nbd("data").unwrap();
        let check = history
            .settle(Loss::Nothing, |at, length| nbd.read(at, length))
            .unwrap();
        check.holds(&format!("moment {moment}"));
        nbd.disconnect();
        let load = Load::start(&history, random.word(), Mix::default(), || {
            cluster[other].nbd("data")
        });
        load.until_acknowledged(50 + random.below(200));
        cluster[primary].start();
        load.until_acknowledged(50);
        cluster.until_in_sync(other, &[0, 1]);
        load.finish();
        cluster.verify(other);
        eprintln!("moment {moment}: {report:?}");
        std::mem::swap(&mut primary, &mut other);
    }
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}
