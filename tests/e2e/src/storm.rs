//! Two nodes on a bad network ([`crate::relay`]) under a load and fio, for as long as asked: nobody reads wrong data, the link comes
//! back every time, and in the end both copies have everything.

use crate::cluster::{Cluster, PATIENCE, Settings};
use crate::history::{History, Loss};
use crate::load::{Load, Mix};
use crate::process;
use crate::random::Random;
use crate::relay::{Counts, Weather};
use holdfast_replicator::control::protocol::LinkName;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// fio's part of the volume, from its beginning; the history's lies behind it.
const FIO_BYTES: u64 = 2 << 20;
const HISTORY_BYTES: u64 = 8 << 20;

/// What a storm did.
#[derive(Clone, Copy, Default, Debug)]
pub struct Outcome {
    pub counts: Counts,
    /// Cuts that ended the connection, in both directions and in one.
    pub cuts: [u64; 2],
    /// Cuts that were over before anybody noticed.
    pub short_cuts: u64,
    /// Passes of fio, each written, read back and judged.
    pub passes: u64,
    pub writes: u64,
    pub reads: u64,
}

/// A storm of that length over a cluster of two with these settings, its relay included.
///
/// # Panics
/// Anything is not as it must be.
#[track_caller]
pub fn storm(settings: &Settings, seed: u64, length: Duration) -> Outcome {
    let mut cluster = Cluster::start(&Settings {
        volumes: vec![("data", 16 << 20)],
        relay: Some(seed),
        tuning: settings
            .tuning
            .iter()
            .cloned()
            // What waits for a copy that is behind also holds up what it lacks.
            .chain([("async_queue_bytes", "1048576".to_owned())])
            .collect(),
        ..settings.clone()
    });
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    let mut random = Random::new(seed);
    let history = History::new(seed, FIO_BYTES, HISTORY_BYTES);
    let mix = Mix {
        reads: 20,
        ..Mix::default()
    };
    let fio = Fio::start(&cluster[0].nbd_uri("data"), seed);

    let mut outcome = Outcome::default();
    let start = Instant::now();
    for round in 0.. {
        // Every kind of cut at least once, however slow the machine.
        if start.elapsed() > length && round >= 4 && fio.passes() > 0 {
            break;
        }
        assert!(
            start.elapsed() < length + 2 * PATIENCE,
            "no end of the storm after {round} rounds and {} passes of fio",
            fio.passes()
        );
        let load = Load::start(&history, random.word(), mix, || cluster[0].nbd("data"));
        cluster.relay().weather(Weather::random(&mut random));
        load.until_acknowledged(50 + random.below(200));
        let cut = match round % 4 {
            0 => Cut::Both,
            1 => Cut::Short,
            2 => Cut::Toward(random.below(2) as usize),
            _ => [Cut::Both, Cut::Toward(0), Cut::Toward(1)][random.below(3) as usize],
        };
        gust(&cluster, cut, &mut random, &mut outcome);
        load.until_acknowledged(50);
        // Without a pause it would overwrite what is copied as fast as a bad network copies it.
        load.finish();
        cluster.until_in_sync(0, &[0, 1]);
    }
    cluster.relay().weather(Weather::default());
    let (pass, passes) = fio.finish();
    cluster.until_in_sync(0, &[0, 1]);
    cluster.verify(0);
    let totals = history.totals();
    outcome.counts = cluster.relay().counts();
    outcome.passes = passes;
    outcome.writes = totals.writes_acknowledged;
    outcome.reads = totals.reads_checked;

    // The copy at the far end of all this is read by those who wrote.
    cluster[0].demote();
    cluster[1].promote();
    let said = process::must(
        command(&cluster[1].nbd_uri("data"), pass, &["--verify_only=1"]),
        PATIENCE,
    );
    assert!(said.contains("err= 0"), "{said}");
    let mut nbd = cluster[1].nbd("data").expect("the primary serves");
    history
        .settle(Loss::Nothing, |at, length| nbd.read(at, length))
        .expect("a read")
        .holds("after the storm, on the other copy");
    nbd.disconnect();
    cluster.until_in_sync(1, &[0, 1]);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
    outcome
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    /// In both directions, until the connection is over.
    Both,
    /// What goes to that node, until the connection is over.
    Toward(usize),
    /// Over before anybody notices.
    Short,
}

/// The network goes away and comes back.
fn gust(cluster: &Cluster, cut: Cut, random: &mut Random, outcome: &mut Outcome) {
    let toward = |node: usize| cut != Cut::Toward(1 - node);
    cluster.relay().cut([toward(0), toward(1)]);
    if cut == Cut::Short {
        // As long as it takes is what the fault is: nobody waits for anything here.
        std::thread::sleep(Duration::from_millis(20 + random.below(250)));
        outcome.short_cuts += 1;
    } else {
        cluster[0].until("the link is down", |service| {
            service.peers[0].link == LinkName::Connecting
        });
        outcome.cuts[usize::from(cut != Cut::Both)] += 1;
        std::thread::sleep(Duration::from_millis(random.below(800)));
    }
    cluster.relay().cut([false; 2]);
}

/// fio, one pass after the other, each with blocks of its own.
struct Fio {
    stop: Arc<AtomicBool>,
    passes: Arc<AtomicU64>,
    running: std::thread::JoinHandle<u64>,
}

fn command(uri: &str, seed: u64, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=verify", "--ioengine=nbd", "--rw=randwrite"])
        .args(["--bs=4k", "--iodepth=16", "--verify=crc32c"])
        .args(["--verify_fatal=1", "--verify_state_save=0"])
        .arg(format!("--size={FIO_BYTES}"))
        .arg(format!("--randseed={}", seed % 1_000_000_007))
        .arg(format!("--uri={uri}"))
        .args(more);
    command
}

impl Fio {
    fn start(uri: &str, seed: u64) -> Fio {
        let (stop, passes) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<AtomicU64>::default(),
        );
        let running = {
            let (stop, passes, uri) = (stop.clone(), passes.clone(), uri.to_owned());
            std::thread::spawn(move || {
                for pass in 0.. {
                    let seed = seed.wrapping_add(pass);
                    let said = process::must(
                        command(&uri, seed, &["--do_verify=1", "--rate_iops=400"]),
                        3 * PATIENCE,
                    );
                    assert!(said.contains("err= 0"), "{said}");
                    passes.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        return seed;
                    }
                }
                unreachable!("it has no end of its own")
            })
        };
        Fio {
            stop,
            passes,
            running,
        }
    }

    /// Passes so far.
    ///
    /// # Panics
    /// It has ended.
    #[track_caller]
    fn passes(&self) -> u64 {
        assert!(!self.running.is_finished(), "fio has ended: see above");
        self.passes.load(Ordering::Relaxed)
    }

    /// Lets the pass under way end: its seed, and how many there were.
    #[track_caller]
    fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let seed = self.running.join().expect("fio, as said above");
        (seed, self.passes.load(Ordering::Relaxed))
    }
}
