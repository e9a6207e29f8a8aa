//! One replicated volume under load and one fault after the other, each at a random moment, with everything checked after
//! each: the tests and the soak differ only in which faults they choose.

use crate::cluster::{Cluster, SERVICE, Settings};
use crate::history::{History, Loss};
use crate::load::{Load, Mix, Report};
use crate::nbd::Nbd;
use crate::random::Random;
use std::time::Duration;

/// Where the history lies on the volume.
const REGION_OFFSET: u64 = 2 << 20;

/// What happens to the two nodes. `Cut` faults need backings under the fault layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// SIGKILL, promotion of the peer, the killed node comes back.
    KillPrimary,
    /// SIGKILL, and it comes back while the application goes on (or waits, by policy).
    KillSecondary,
    /// SIGKILL of both within a moment, both come back, either is promoted.
    KillBoth,
    /// The killed primary comes back and is killed again in the midst of its resync.
    KillTargetInResync,
    /// The killed primary comes back, and the source is killed in the midst of its resync.
    KillSourceInResync,
    /// The roles are exchanged, as planned.
    SwitchOver,
    /// SIGSTOP of the primary, the secondary or both, for less or more than the other one waits, and SIGCONT.
    Pause,
    /// As [`Fault::KillPrimary`], and its disk loses what it had not flushed.
    CutPrimary,
    /// As [`Fault::KillSecondary`], and its disk loses what it had not flushed.
    CutSecondary,
    /// As [`Fault::KillBoth`], and both disks lose what they had not flushed.
    CutBoth,
    /// The secondary's power is cycled alone while writes go on; then a flush; then the primary is killed and the secondary
    /// promoted.
    CycleSecondaryThenFailOver,
}

impl Fault {
    /// Faults for any backing, none of which loses what a disk had not flushed.
    pub const KILLS: [Fault; 7] = [
        Fault::KillPrimary,
        Fault::KillSecondary,
        Fault::KillBoth,
        Fault::KillTargetInResync,
        Fault::KillSourceInResync,
        Fault::SwitchOver,
        Fault::Pause,
    ];
    /// Faults for backings under the fault layer.
    pub const CUTS: [Fault; 4] = [
        Fault::CutPrimary,
        Fault::CutSecondary,
        Fault::CutBoth,
        Fault::CycleSecondaryThenFailOver,
    ];
}

/// A cluster of two, its application, and who is primary.
pub struct Story {
    pub cluster: Cluster,
    pub history: History,
    pub random: Random,
    /// Index of the primary; the other one is the secondary.
    pub primary: usize,
    pub mix: Mix,
    /// The primary may go on alone; promoting the peer of a lost primary is then always a force.
    continues: bool,
    /// The backings have a cache that a kill loses as a power cut would.
    volatile: bool,
    /// Moments so far.
    pub moments: u64,
}

impl Story {
    /// Two nodes in sync, the first one primary. The history covers the first volume from 2 MiB on, at most 12 MiB of it.
    #[track_caller]
    pub fn begin(settings: &Settings, seed: u64) -> Story {
        assert_eq!(settings.nodes, 2);
        let cluster = Cluster::start(settings);
        if settings.backing != crate::Backing::Loop {
            cluster[0].promote();
        }
        cluster.until_in_sync(0, &[0, 1]);
        let length = (settings.volumes[0].1 - REGION_OFFSET).min(12 << 20);
        Story {
            cluster,
            history: History::new(seed, REGION_OFFSET, length),
            random: Random::new(seed),
            primary: 0,
            mix: Mix::default(),
            continues: settings.on_peer_loss == "continue",
            volatile: settings.backing == crate::Backing::Faults,
            moments: 0,
        }
    }

    fn secondary(&self) -> usize {
        1 - self.primary
    }

    fn volume(&self) -> &'static str {
        self.cluster[0].volume_name()
    }

    /// A load on the primary.
    #[track_caller]
    pub fn load(&mut self) -> Load {
        let node = &self.cluster[self.primary];
        let volume = node.volume_name();
        Load::start(&self.history, self.random.word(), self.mix, || {
            node.nbd(volume)
        })
    }

    /// A load in full flow, at a random point of it.
    #[track_caller]
    fn load_for_a_while(&mut self) -> Load {
        let load = self.load();
        load.until_acknowledged(30 + self.random.below(300));
        self.pause(15_000);
        load
    }

    fn pause(&mut self, most_microseconds: u64) {
        let pause = self.random.below(most_microseconds);
        std::thread::sleep(Duration::from_micros(pause));
    }

    /// One fault at a random moment, everything that follows from it, and all checks. Both nodes are in sync before and after.
    #[track_caller]
    pub fn moment(&mut self, fault: Fault) {
        self.moments += 1;
        let what = format!(
            "moment {} ({fault:?}, primary {})",
            self.moments, self.cluster[self.primary].name
        );
        match fault {
            Fault::KillPrimary | Fault::CutPrimary => {
                self.lose_primary(fault == Fault::CutPrimary, &what);
                self.come_back();
            }
            Fault::KillSecondary | Fault::CutSecondary => {
                let load = self.load_for_a_while();
                self.lose_secondary(fault == Fault::CutSecondary, &what);
                let secondary = self.secondary();
                self.cluster[secondary].start();
                load.until_acknowledged(30);
                load.finish();
            }
            Fault::KillBoth | Fault::CutBoth => self.lose_both(fault == Fault::CutBoth, &what),
            Fault::KillTargetInResync => {
                self.lose_primary(false, &what);
                let target = self.secondary();
                self.cluster[target].start();
                self.pause(60_000);
                self.cluster[target].kill();
                // It may have been in sync again already, and then the primary waits for it.
                let load = self.load();
                self.cluster[target].start();
                load.until_acknowledged(30);
                load.finish();
            }
            Fault::KillSourceInResync => self.lose_source(&what),
            Fault::SwitchOver => self.switch_over(),
            Fault::Pause => self.stand_still(),
            Fault::CycleSecondaryThenFailOver => self.cycle_secondary(&what),
        }
        self.all_is_well(&what);
        let totals = self.history.totals();
        eprintln!(
            "{what}: {} writes and {} flushes acknowledged so far",
            totals.writes_acknowledged, totals.flushes_acknowledged
        );
    }

    /// The copies are in sync and equal, and the volume holds what it must.
    #[track_caller]
    fn all_is_well(&mut self, what: &str) {
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        self.cluster.verify(self.primary);
        self.settle(Loss::Nothing, what);
    }

    /// Reads everything from the primary, judges it and makes it durable.
    #[track_caller]
    fn settle(&mut self, loss: Loss, what: &str) {
        let node = &self.cluster[self.primary];
        let mut nbd = node.nbd(self.volume()).unwrap_or_else(|error| {
            panic!(
                "{what}: {} is primary and does not serve: {error}",
                node.name
            )
        });
        let check = self
            .history
            .settle(loss, |at, length| nbd.read(at, length))
            .unwrap_or_else(|error| panic!("{what}: a read from {}: {error}", node.name));
        check.holds(&format!("{what}, read from {}", node.name));
        self.flush(&mut nbd, what);
        nbd.disconnect();
    }

    #[track_caller]
    fn flush(&self, nbd: &mut Nbd, what: &str) {
        let begun = self.history.begin_flush();
        nbd.flush()
            .unwrap_or_else(|error| panic!("{what}: a flush: {error}"));
        self.history.flushed(begun);
    }

    /// Ends a node in the midst of whatever it does.
    #[track_caller]
    fn lose(&mut self, node: usize, cut: bool) {
        if cut {
            // Often any part of the cache survives, sometimes nothing does.
            let seed = self.random.word();
            let seed = self.random.percent(80).then_some(seed);
            self.cluster[node].cut_power(seed);
        } else {
            self.cluster[node].kill();
        }
    }

    /// What the disk of a node that is down has: its own recovery may lose no flush that was acknowledged (D2).
    #[track_caller]
    fn disk_has_what_was_flushed(&self, node: usize, what: &str) {
        use std::os::unix::fs::FileExt as _;
        let node = &self.cluster[node];
        let file = std::fs::File::open(node.image(self.volume())).expect("the backing");
        // The lock is free once the kernel has ended the last request of the dead process.
        file.lock_shared().expect("the lock of the backing");
        let loss = if self.volatile {
            Loss::Unflushed
        } else {
            Loss::Nothing
        };
        let read = |at, length| {
            let mut data = vec![0; length];
            file.read_exact_at(&mut data, at).map(|()| data)
        };
        let check = self.history.check(loss, read).expect("the backing");
        check.holds(&format!("{what}, on the disk of {}", node.name));
    }

    /// The primary goes in the midst of a load, and its peer is promoted and has everything.
    #[track_caller]
    fn lose_primary(&mut self, cut: bool, what: &str) {
        let load = self.load_for_a_while();
        let (lost, heir) = (self.primary, self.secondary());
        self.lose(lost, cut);
        in_flight(load.end(), what);
        self.disk_has_what_was_flushed(lost, what);
        self.cluster[heir].until_misses(lost);
        self.take_over(heir);
        self.settle(Loss::Nothing, what);
    }

    #[track_caller]
    fn take_over(&mut self, heir: usize) {
        let node = &self.cluster[heir];
        if self.continues {
            node.force();
        } else {
            node.promote();
        }
        self.primary = heir;
    }

    /// The secondary goes. Under `suspend` the primary completes nothing without it, and so its disk can be judged while it
    /// is down: what was acknowledged, it has.
    #[track_caller]
    fn lose_secondary(&mut self, cut: bool, what: &str) {
        let (primary, secondary) = (self.primary, self.secondary());
        self.lose(secondary, cut);
        if !self.continues {
            self.disk_has_what_was_flushed(secondary, what);
        }
        if self.random.percent(50) {
            self.cluster[primary].until_misses(secondary);
        }
    }

    /// The secondary is started while the primary has work, and both go on until they are in sync.
    #[track_caller]
    fn come_back(&mut self) {
        let load = self.load_for_a_while();
        let secondary = self.secondary();
        self.cluster[secondary].start();
        load.until_acknowledged(30);
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        load.until_acknowledged(30);
        load.finish();
    }

    #[track_caller]
    fn lose_both(&mut self, cut: bool, what: &str) {
        let load = self.load_for_a_while();
        let first = self.random.below(2) as usize;
        self.lose(first, cut);
        self.pause(3_000);
        self.lose(1 - first, cut);
        in_flight(load.end(), what);
        for node in 0..2 {
            // A primary that may go on alone may have done so, on a machine that paused this program.
            if node == self.primary || !self.continues {
                self.disk_has_what_was_flushed(node, what);
            }
        }
        let first = self.random.below(2) as usize;
        self.cluster[first].start();
        self.pause(50_000);
        self.cluster[1 - first].start();
        self.cluster.until_connected();
        self.primary = self.random.below(2) as usize;
        self.cluster[self.primary].promote();
        // A kill loses the cache of the fault layer like a power cut.
        let loss = if self.volatile {
            Loss::Unflushed
        } else {
            Loss::Nothing
        };
        self.settle(loss, what);
    }

    #[track_caller]
    fn lose_source(&mut self, what: &str) {
        self.lose_primary(false, what);
        let (source, target) = (self.primary, self.secondary());
        let load = self.load_for_a_while();
        self.cluster[target].start();
        self.pause(60_000);
        self.cluster[source].kill();
        load.end();
        self.cluster[target].until_misses(source);
        // It may have been done already; a copy that is not must not be promoted.
        let output = self.cluster[target].run(&["promote", SERVICE]);
        if output.status.success() {
            assert!(!self.continues, "{what}: promoted without force");
            self.cluster[target].until("it is primary", |service| {
                service.role == holdfast_replicator::control::protocol::RoleName::Primary
            });
            self.primary = target;
            self.settle(Loss::Nothing, what);
            self.cluster[source].start();
        } else {
            self.cluster[source].start();
            self.cluster.until_connected();
            self.cluster[source].promote();
            // The source alone has it all; under the fault layer its kill lost what was not flushed.
            let loss = if self.volatile {
                Loss::Unflushed
            } else {
                Loss::Nothing
            };
            self.settle(loss, what);
        }
    }

    #[track_caller]
    fn switch_over(&mut self) {
        let load = self.load_for_a_while();
        load.finish();
        let (old, new) = (self.primary, self.secondary());
        self.cluster[old].demote();
        self.cluster[new].promote();
        self.primary = new;
        let load = self.load_for_a_while();
        load.finish();
    }

    /// Nobody is promoted meanwhile, so the application sees no more than a pause.
    #[track_caller]
    fn stand_still(&mut self) {
        let load = self.load_for_a_while();
        let which = 1 + self.random.below(3);
        let paused: Vec<usize> = (0..2).filter(|node| which >> node & 1 == 1).collect();
        for node in &paused {
            self.cluster[*node].freeze();
            self.pause(5_000);
        }
        match paused[..] {
            [node] if self.random.percent(60) => self.cluster[1 - node].until_misses(node),
            _ => self.pause(1_500_000),
        }
        for node in paused {
            self.cluster[node].thaw();
            self.pause(100_000);
        }
        load.until_acknowledged(30);
        load.finish();
    }

    #[track_caller]
    fn cycle_secondary(&mut self, what: &str) {
        let load = self.load_for_a_while();
        self.lose_secondary(true, what);
        let (primary, secondary) = (self.primary, self.secondary());
        self.cluster[secondary].start();
        load.until_acknowledged(30);
        self.cluster.until_in_sync(primary, &[0, 1]);
        load.until_acknowledged(30);
        let volume = self.volume();
        let mut nbd = self.cluster[primary]
            .nbd(volume)
            .expect("the primary serves");
        self.flush(&mut nbd, what);
        drop(nbd);
        self.cluster[primary].kill();
        in_flight(load.end(), what);
        self.cluster[secondary].until_misses(primary);
        self.take_over(secondary);
        self.settle(Loss::Nothing, what);
        self.come_back();
    }
}

#[track_caller]
fn in_flight(report: Report, what: &str) {
    assert!(
        report.in_flight > 0 && report.acknowledged > 0,
        "{what}: the load was over before the fault: {report:?}"
    );
}
