//! A full copy by checksum: a copy whose disk went back in time takes what differs and nothing else (rows 5, 14; D8), whatever is
//! written, cut or killed meanwhile.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::metadata::*;
use world::*;

const SIZE: u64 = 4 << 20;

/// Node 0 primary, every block written, then node 1 gets an old image of its disk, data and metadata.
fn restored_from_backup(seed: u64) -> World {
    let modes = [Mode::Sync, Mode::Sync];
    let mut w = World::new(seed, &modes, OnPeerLoss::Continue, &[SIZE], true);
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w.promote(0, false).unwrap();
    for offset in (0..SIZE).step_by(64 << 10) {
        let fill = 1 + w.rng.below(250) as u8;
        w.write(0, 0, offset, vec![fill; 64 << 10], false);
        w.steps(20);
    }
    w.flush(0);
    w.until("all is there", 20_000, |w| w.settled(&[0, 1]));
    w.command(1, Command::Detach).unwrap();
    let backup = w.nodes[1].disk.clone();
    w.crash(1, false);
    w.start(1);
    w.until("in sync again", 40_000, |w| {
        w.settled(&[0, 1]) && w.up_to_date(1)
    });
    for _ in 0..4 {
        let offset = w.rng.below(SIZE / 512) * 512;
        w.write(0, 0, offset, vec![0xee; 512], false);
        w.steps(20);
    }
    w.until("all is there", 20_000, |w| w.settled(&[0, 1]));
    w.command(1, Command::Detach).unwrap();
    w.crash(1, false);
    w.nodes[1].disk = backup;
    w
}

fn counters(w: &World, n: usize) -> (u64, u64) {
    let counters = w.nodes[n].core.as_ref().unwrap().status(w.now).counters;
    (counters.resync_bytes, counters.resync_equal_bytes)
}

fn equal_in_the_end(w: &mut World) {
    w.until("in sync again", 400_000, |w| {
        w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
    });
    assert!(w.nodes[0].disk.data == w.nodes[1].disk.data);
}

#[test]
fn only_what_differs_is_sent() {
    let mut w = restored_from_backup(1);
    let (before, _) = counters(&w, 0);
    w.start(1);
    equal_in_the_end(&mut w);
    assert!(
        w.nodes[0].notices.iter().any(|n| n.text.contains("Row 5")),
        "an old image is noticed"
    );
    let (sent, equal) = counters(&w, 0);
    assert_eq!(sent - before + equal, SIZE);
    // Four sectors lie in at most four chunks of 64 KiB.
    assert!(sent - before <= 4 * (64 << 10), "{} sent", sent - before);
}

#[test]
fn nothing_in_common_is_not_asked_for_long() {
    let mut w = restored_from_backup(2);
    w.nodes[1].disk.data[0].fill(0xff);
    w.nodes[1].disk.durable[0].fill(0xff);
    let (before, _) = counters(&w, 0);
    w.start(1);
    equal_in_the_end(&mut w);
    let (sent, equal) = counters(&w, 0);
    assert_eq!((sent - before, equal), (SIZE, 0));
}

#[test]
fn writes_cuts_and_power_losses_meanwhile() {
    for seed in 10..60 {
        let mut w = restored_from_backup(seed);
        w.start(1);
        for _ in 0..60 {
            let length = (1 + w.rng.below(200)) * 512;
            let offset = w.rng.below((SIZE - length) / 512) * 512;
            let fill = w.rng.next() as u8;
            w.write(0, 0, offset, vec![fill; length as usize], false);
            let steps = w.rng.below(60) as usize;
            w.steps(steps);
            match w.rng.below(30) {
                0 => w.drop_link(0, 1, "cut"),
                1 => {
                    w.crash(1, true);
                    w.start(1);
                }
                _ => {}
            }
        }
        equal_in_the_end(&mut w);
    }
}
