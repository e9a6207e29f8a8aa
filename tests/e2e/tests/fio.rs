//! `fio --verify` on a replicated volume while nodes are killed (D1, D4, D7).

use holdfast_e2e::process::{available, must};
use holdfast_e2e::{Cluster, History, Load, Mix, Random, Settings, random};
use std::process::Command;
use std::time::Duration;

/// fio's part of the volume; the history's part lies behind it.
const FIO_BYTES: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn volume() -> Cluster {
    let cluster = Cluster::start(&Settings {
        volumes: vec![("data", 32 << 20)],
        ..Settings::default()
    });
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    cluster
}

/// fio with one seed writes, or reads, the same blocks with the same content.
fn fio(uri: &str, seed: u64, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite"])
        .args(["--bs=4k", "--iodepth=16", "--verify=crc32c"])
        .args(["--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--size={FIO_BYTES}"))
        .arg(format!("--randseed={seed}"))
        .arg(format!("--uri={uri}"))
        .args(more);
    command
}

#[test]
fn fio_verifies_while_the_secondary_is_killed() {
    if !available("fio") {
        return;
    }
    let mut cluster = volume();
    let seed = random::seed("fio, secondary");
    let mut random = Random::new(seed);
    let uri = cluster[0].nbd_uri("data");
    // Several passes of writing, each read back and judged by fio.
    let command = fio(
        &uri,
        seed,
        &["--do_verify=1", "--loops=6", "--rate_iops=6000"],
    );
    let running = std::thread::spawn(move || must(command, LIMIT));
    let mut kills = 0;
    while !running.is_finished() && kills < 5 {
        let written = cluster[0].service().position + 600 + random.below(1800);
        cluster[0].until("fio has written more, or is done", |service| {
            service.position > written || running.is_finished()
        });
        cluster[1].kill();
        cluster[1].start();
        kills += 1;
        cluster.until_in_sync(0, &[0, 1]);
    }
    let said = running.join().unwrap();
    assert!(said.contains("err= 0"), "{said}");
    assert!(kills > 1, "fio was over too soon");
    cluster.verify(0);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}

#[test]
fn what_fio_wrote_is_on_the_survivor_of_a_killed_primary() {
    if !available("fio") {
        return;
    }
    let mut cluster = volume();
    let seed = random::seed("fio, primary");
    let mut random = Random::new(seed);
    let history = History::new(seed, FIO_BYTES, 8 << 20);
    let (mut primary, mut other) = (0, 1);
    for moment in 0..4 {
        // fio ends with everything acknowledged and nothing flushed; the load is what the kill interrupts.
        let uri = cluster[primary].nbd_uri("data");
        let load = Load::start(&history, random.word(), Mix::default(), || {
            cluster[primary].nbd("data")
        });
        let fio_seed = seed.wrapping_add(moment) % 1_000_000;
        must(fio(&uri, fio_seed, &["--do_verify=0"]), LIMIT);
        load.until_acknowledged(random.below(100));
        cluster[primary].kill();
        load.end();
        cluster[other].until_misses(primary);
        cluster[other].promote();
        let uri = cluster[other].nbd_uri("data");
        let said = must(fio(&uri, fio_seed, &["--verify_only=1"]), LIMIT);
        assert!(said.contains("err= 0"), "{said}");
        let mut nbd = cluster[other].nbd("data").unwrap();
        history
            .settle(holdfast_e2e::Loss::Nothing, |at, length| {
                nbd.read(at, length)
            })
            .unwrap()
            .holds(&format!("moment {moment}"));
        nbd.disconnect();
        cluster[primary].start();
        cluster.until_in_sync(other, &[0, 1]);
        cluster.verify(other);
        std::mem::swap(&mut primary, &mut other);
    }
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
}
