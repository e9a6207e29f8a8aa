//! What a seed stands for: the shape of the cluster, and the faults and orders that will come over it.

use crate::disk::SECTOR;
use crate::rng::Rng;
use holdfast_replicator_core::api::Tuning;
use holdfast_wire_format::metadata::{Mode, OnPeerLoss};
use std::collections::BTreeSet;

/// Nanoseconds.
pub const MS: u64 = 1_000_000;

/// One thing that goes wrong, or one order given at the wrong moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// SIGKILL; the process is started again after so many ms.
    Kill {
        node: usize,
        down_ms: u64,
    },
    /// The machine loses power, and with it the cache of its disk.
    Power {
        node: usize,
        down_ms: u64,
    },
    /// All machines lose power at once.
    Blackout {
        down_ms: u64,
    },
    /// SIGSTOP, SIGCONT.
    Freeze {
        node: usize,
        ms: u64,
    },
    /// Nothing gets from `from` to `to`; both ways if `both`.
    Cut {
        from: usize,
        to: usize,
        both: bool,
        ms: u64,
    },
    /// The connection breaks; any end of what is in flight is lost.
    Break {
        a: usize,
        b: usize,
    },
    /// The line is slow, and everything on it late.
    SlowLine {
        a: usize,
        b: usize,
        ms: u64,
    },
    SlowDisk {
        node: usize,
        ms: u64,
    },
    /// Requests stay in the disk until it goes on.
    HangDisk {
        node: usize,
        ms: u64,
    },
    /// The monotonic clock leaps forward, as after a suspended machine.
    ClockJump {
        node: usize,
        ms: u64,
    },
    /// The next disk operation fails; the node gets a blank disk later, or only a new process.
    DiskError {
        node: usize,
        replace: bool,
    },
    /// The machine comes back with an empty disk.
    BlankDisk {
        node: usize,
        down_ms: u64,
    },
    Promote {
        node: usize,
    },
    Force {
        node: usize,
    },
    Demote {
        node: usize,
    },
    Disconnect {
        node: usize,
        ms: u64,
    },
    PauseResync {
        node: usize,
        ms: u64,
    },
    SuspendIo {
        node: usize,
        ms: u64,
    },
    Verify {
        node: usize,
    },
    StopVerify {
        node: usize,
    },
    Invalidate {
        node: usize,
    },
    /// A clean stop and start.
    Detach {
        node: usize,
        down_ms: u64,
    },
    SetPolicy {
        node: usize,
        suspend: bool,
    },
    /// When `node` next comes to a certain point, something happens to it, or to the others, that very moment.
    Ambush {
        node: usize,
        /// Place in [`TRIGGERS`].
        on: usize,
        strike: Strike,
        delay_us: u64,
        ms: u64,
    },
    /// An image of the disk is kept.
    Backup {
        node: usize,
    },
    /// The machine comes back with the image of its disk that was kept.
    OldDisk {
        node: usize,
        down_ms: u64,
    },
    /// The process is killed, and a block of its metadata is not what was written when it starts again.
    Rot {
        node: usize,
        down_ms: u64,
        rot: Rot,
    },
    /// A frame of data comes once more: the copy that sends it is defective (D14).
    Replay {
        from: usize,
        to: usize,
    },
    /// The process is started again with a configuration that names two volumes in the wrong order, until somebody puts it
    /// right.
    Misnamed {
        node: usize,
        ms: u64,
    },
    /// A frame of data that means nothing, with good checksums (D14).
    Nonsense {
        from: usize,
        to: usize,
        what: Nonsense,
    },
    /// A person makes a volume larger, while it is in use.
    Grow {
        volume: usize,
        sectors: u64,
    },
    /// A person has that copy written to in another mode.
    SetMode {
        node: usize,
        mode: Mode,
    },
    /// A person takes the disk of the primary out of use, and puts it right after so many ms.
    DetachDisk {
        ms: u64,
    },
    /// The machine comes back with an empty disk, also if it was primary and nobody serves beside it: all others have everything.
    FreshDisk {
        node: usize,
        down_ms: u64,
    },
    /// A person gives up the writes of this side of a split brain.
    Resolve {
        node: usize,
    },
}

/// What is wrong with a frame of data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nonsense {
    NoSuchVolume,
    BehindTheEnd,
    NotWholeSectors,
    OtherGeneration,
}

/// What an ambush does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strike {
    Kill,
    Power,
    /// All lose power; this one is back soon and the others late.
    AloneAfterBlackout,
    /// All lose power; this one is back late.
    OthersAfterBlackout,
    KillOthers,
    PowerOthers,
    /// The others lose power, and a person forces this copy.
    ForcedAlone,
    CutOff,
    Freeze,
    DiskError,
    Demote,
    Promote,
    PromoteOther,
    /// Its connections break, and everything on them is lost.
    Lose,
    /// Its process ends, its undo rots, the others lose power, and a person forces it.
    RottenAndForced,
    /// Its process ends with what it was doing, the others lose power, and a person forces it.
    KilledAndForced,
}

/// Which metadata rots: any block of its kind that the copy can do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rot {
    /// The older slot.
    Superblock,
    Log,
    Bitmap,
    /// A block of the bitmap stands in the place of another.
    BitmapMisdirected,
    Undo,
}

/// What an ambush waits for: notices of the core, and writes of metadata being given to the disk; the frames after those are
/// for schedules alone, seeds take the first [`SEEDED`].
pub const TRIGGERS: [&str; 46] = [
    "handshake",
    "established",
    "resync-source",
    "resync-target",
    "resync-complete",
    "resync-finished",
    "in-sync",
    "up-to-date",
    "promoting",
    "primary",
    "peer-dropped",
    "demoting",
    "secondary",
    "superseded",
    "link-down",
    "attached",
    "diskless",
    "rollback",
    "rolled-back",
    "undo-lost",
    "flush",
    "superblock write",
    "log write",
    "bitmap write",
    "undo write",
    "sends Hello",
    "sends BitmapEnd",
    "sends Ready",
    "sends ResyncData",
    "sends ResyncAck",
    "sends FlushAck",
    "sends ResyncDone",
    "sends CompleteAck",
    "sends InSync",
    "sends PromoteRequest",
    "sends PromoteReply",
    "sends NewGeneration",
    "sends GenerationAck",
    "sends Demoted",
    "sends DiskLost",
    "sends DiskLostAck",
    "superblock written",
    "log written",
    "bitmap written",
    "undo written",
    "flushed",
];

/// A seed picks among so many of [`TRIGGERS`].
const SEEDED: usize = 25;

impl FaultKind {
    /// Whether it concerns only the first `copies` nodes.
    #[must_use]
    pub fn within(&self, copies: usize) -> bool {
        match *self {
            FaultKind::Blackout { .. } => true,
            FaultKind::Cut { from, to, .. } => from < copies && to < copies,
            FaultKind::Break { a, b } | FaultKind::SlowLine { a, b, .. } => {
                a < copies && b < copies
            }
            FaultKind::Kill { node, .. }
            | FaultKind::Power { node, .. }
            | FaultKind::Freeze { node, .. }
            | FaultKind::SlowDisk { node, .. }
            | FaultKind::HangDisk { node, .. }
            | FaultKind::ClockJump { node, .. }
            | FaultKind::DiskError { node, .. }
            | FaultKind::BlankDisk { node, .. }
            | FaultKind::Promote { node }
            | FaultKind::Force { node }
            | FaultKind::Demote { node }
            | FaultKind::Disconnect { node, .. }
            | FaultKind::PauseResync { node, .. }
            | FaultKind::SuspendIo { node, .. }
            | FaultKind::Verify { node }
            | FaultKind::StopVerify { node }
            | FaultKind::Invalidate { node }
            | FaultKind::Detach { node, .. }
            | FaultKind::SetPolicy { node, .. }
            | FaultKind::Ambush { node, .. }
            | FaultKind::Backup { node }
            | FaultKind::OldDisk { node, .. }
            | FaultKind::Rot { node, .. }
            | FaultKind::Misnamed { node, .. }
            | FaultKind::FreshDisk { node, .. }
            | FaultKind::Resolve { node } => node < copies,
            FaultKind::Replay { from, to } | FaultKind::Nonsense { from, to, .. } => {
                from < copies && to < copies
            }
            FaultKind::SetMode { node, .. } => node < copies,
            FaultKind::Grow { .. } | FaultKind::DetachDisk { .. } => true,
        }
    }

    /// A word for counts.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            FaultKind::Kill { .. } => "kill",
            FaultKind::Power { .. } => "power cut",
            FaultKind::Blackout { .. } => "blackout",
            FaultKind::Freeze { .. } => "freeze",
            FaultKind::Cut { both: true, .. } => "cut",
            FaultKind::Cut { .. } => "one-way cut",
            FaultKind::Break { .. } => "break",
            FaultKind::SlowLine { .. } => "slow line",
            FaultKind::SlowDisk { .. } => "slow disk",
            FaultKind::HangDisk { .. } => "hung disk",
            FaultKind::ClockJump { .. } => "clock jump",
            FaultKind::DiskError { .. } => "disk error",
            FaultKind::BlankDisk { .. } => "blank disk",
            FaultKind::Promote { .. } => "promote",
            FaultKind::Force { .. } => "force",
            FaultKind::Demote { .. } => "demote",
            FaultKind::Disconnect { .. } => "disconnect",
            FaultKind::PauseResync { .. } => "pause resync",
            FaultKind::SuspendIo { .. } => "suspend",
            FaultKind::Verify { .. } => "verify",
            FaultKind::StopVerify { .. } => "stop verify",
            FaultKind::Invalidate { .. } => "invalidate",
            FaultKind::Detach { .. } => "detach",
            FaultKind::SetPolicy { .. } => "policy",
            FaultKind::Ambush { .. } => "ambush",
            FaultKind::Backup { .. } => "backup",
            FaultKind::OldDisk { .. } => "old disk",
            FaultKind::Rot { .. } => "rot",
            FaultKind::Replay { .. } => "replay",
            FaultKind::Misnamed { .. } => "misnamed",
            FaultKind::Nonsense { .. } => "nonsense",
            FaultKind::Grow { .. } => "grow",
            FaultKind::SetMode { .. } => "set mode",
            FaultKind::DetachDisk { .. } => "detach disk",
            FaultKind::FreshDisk { .. } => "fresh disk",
            FaultKind::Resolve { .. } => "resolve",
        }
    }
}

/// A fault and its time in ns after the start.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub at: u64,
    pub kind: FaultKind,
}

/// The shape of one run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub copies: usize,
    /// The record of who may write is in a register of the cluster.
    pub register: bool,
    pub modes: Vec<Mode>,
    pub policy: OnPeerLoss,
    /// Sectors of each volume's device, and of the volume at first.
    pub volumes: Vec<u64>,
    pub begin: Vec<u64>,
    pub tuning: Tuning,
    pub clients: usize,
    /// Requests one client keeps in flight.
    pub depth: usize,
    /// A client asks `burst` times in a row, `think` ns apart at most, then waits `pause` ns on average.
    pub burst: u64,
    pub think: u64,
    pub pause: u64,
    /// Sectors the clients mostly write to.
    pub hot_sectors: u64,
    /// One way, ns.
    pub latency: u64,
    /// Faults stop here, ns.
    pub duration: u64,
    /// A failover manager that waits so many ms before it promotes.
    pub failover_ms: u64,
    /// Clocks run up to 5 % fast or slow.
    pub drift: bool,
    /// log2 of bytes per bit of the dirty bitmap, and per extent of the activity log.
    pub grain_shift: u8,
    pub extent_shift: u8,
    pub al_blocks: u32,
    pub undo_size: u64,
    /// A typical disk operation, ns; a write of metadata and a flush take so many times as long.
    pub disk_ns: u64,
    pub meta_factor: u64,
    pub flush_factor: u64,
    /// How many starts of 1000 keep no activity log.
    pub log_off_per_mille: u64,
    pub corrupt_per_million: u64,
    /// How often the costly invariants are looked at.
    pub look_per_mille: u64,
    /// A refused frame that was good is no failure (docs/simulator.md, "What it does not do").
    pub refusals_pass: bool,
    /// Clients go on for so long after the last fault, ns; and so long everything must stay quiet before a run is over.
    pub go_on: u64,
    pub quiet: u64,
    /// Requests left out: (client, number).
    pub dropped_requests: BTreeSet<(usize, u64)>,
    pub faults: Vec<Fault>,
}

impl Plan {
    /// Everything about this seed, decided beforehand so that single faults can be left out.
    #[must_use]
    pub fn of(seed: u64) -> Plan {
        let mut rng = Rng::stream(seed, 1);
        let copies = if rng.chance(250) { 3 } else { 2 };
        let pair = if rng.chance(200) {
            Mode::SemiSync
        } else {
            Mode::Sync
        };
        // A third copy follows asynchronously, or is one more member of S.
        let third = if seed.is_multiple_of(4) {
            pair
        } else {
            Mode::Async
        };
        let modes = vec![pair, pair, third][..copies].to_vec();
        let policy = if rng.chance(300) {
            OnPeerLoss::Continue
        } else {
            OnPeerLoss::Suspend
        };
        let volumes: Vec<u64> = (0..rng.between(1, 3))
            .map(|_| rng.between(2, 16) * (256 << 10) / SECTOR)
            .collect();
        let tuning = Tuning {
            resync_chunk_bytes: (16 << 10) << rng.below(4),
            resync_window_bytes: (64 << 10) << rng.below(5),
            async_queue_bytes: (256 << 10) << rng.below(6),
            async_block: rng.chance(300),
            undo_full_pauses: rng.chance(300),
            log_extents: [0, 12, 24, 100][rng.index(4)],
            ..Tuning::default()
        };
        let duration = rng.between(3, 25) * 1000 * MS;
        let mut plan = Plan {
            seed,
            copies,
            register: false,
            modes,
            policy,
            begin: volumes.clone(),
            volumes,
            tuning,
            clients: rng.between(1, 5) as usize,
            depth: rng.between(1, 3) as usize,
            burst: [1, 4, 16, 64][rng.index(4)],
            think: [20_000, 200_000, MS][rng.index(3)],
            pause: 0,
            hot_sectors: [16, 128, 1024, 1 << 20, 1 << 20][rng.index(5)],
            latency: [50_000, 300_000, 3 * MS, 30 * MS][rng.index(4)],
            duration,
            failover_ms: [50, 500, 1500, 5000][rng.index(4)],
            drift: rng.chance(500),
            grain_shift: rng.between(12, 16) as u8,
            extent_shift: [13, 13, 14, 15, 16, 18, 20][rng.index(7)],
            al_blocks: rng.between(8, 10) as u32,
            undo_size: [0, 64 << 10, 1 << 20, 8 << 20, 8 << 20][rng.index(5)],
            disk_ns: [20_000, 100_000, 400_000, 3 * MS][rng.index(4)],
            meta_factor: [1, 1, 4, 20][rng.index(4)],
            flush_factor: [3, 3, 20][rng.index(3)],
            log_off_per_mille: [0, 0, 0, 300][rng.index(4)],
            corrupt_per_million: if rng.chance(200) { 300 } else { 0 },
            look_per_mille: 20,
            refusals_pass: false,
            go_on: 1500 * MS,
            quiet: 2500 * MS,
            dropped_requests: BTreeSet::new(),
            faults: Vec::new(),
        };
        let requests = rng.between(900, 2400);
        plan.pause = plan.duration * plan.clients as u64 * plan.burst / requests;
        plan.extent_shift = plan.extent_shift.max(plan.grain_shift);
        let mut at = rng.between(100, 1500) * MS;
        // Quiet runs and stormy ones; each has its own taste for some kinds.
        let pause = [150, 500, 1500, 4000][rng.index(4)];
        let taste = rng.next();
        while at < duration {
            let kind = plan.fault(&mut rng, taste);
            plan.faults.push(Fault { at, kind });
            // A rollback is cut, too.
            if let FaultKind::Ambush {
                node,
                strike: Strike::ForcedAlone,
                delay_us,
                ms,
                ..
            } = kind
                && rng.chance(500)
            {
                let name = ["rollback", "rolled-back"][rng.index(2)];
                let on = TRIGGERS.iter().position(|t| *t == name).unwrap_or(0);
                let strike = [Strike::Power, Strike::Kill][rng.index(2)];
                let kind = FaultKind::Ambush {
                    node,
                    on,
                    strike,
                    delay_us,
                    ms,
                };
                plan.faults.push(Fault { at, kind });
            }
            at += rng.between(1, 2 * pause) * MS;
        }
        plan
    }

    /// The same run, in which people also change what the cluster is made of: they grow volumes, change modes, and take the disk
    /// of a primary out of use; and senders say nonsense. All else is drawn as without.
    #[must_use]
    pub fn with_changes(mut self) -> Plan {
        let mut rng = Rng::stream(self.seed, 7);
        for size in &mut self.volumes {
            *size += rng.between(1, 8) * (64 << 10) / SECTOR;
        }
        let pause = [300, 1000, 4000][rng.index(3)];
        let mut at = rng.between(300, 2000) * MS;
        while at < self.duration {
            let node = rng.index(self.copies);
            let kind = match rng.below(100) {
                0..45 => FaultKind::Grow {
                    volume: rng.index(self.volumes.len()),
                    sectors: rng.between(1, 16) * 8,
                },
                45..70 => FaultKind::SetMode {
                    node,
                    // A third copy comes and goes as an asynchronous one; the first two stay in S.
                    mode: [Mode::Sync, Mode::SemiSync, Mode::Async]
                        [rng.index(if node == 2 { 3 } else { 2 })],
                },
                70..80 => FaultKind::DetachDisk {
                    ms: rng.between(100, 4000),
                },
                _ => FaultKind::Nonsense {
                    from: node,
                    to: (node + 1 + rng.index(self.copies - 1)) % self.copies,
                    what: [
                        Nonsense::NoSuchVolume,
                        Nonsense::BehindTheEnd,
                        Nonsense::NotWholeSectors,
                        Nonsense::OtherGeneration,
                    ][rng.index(4)],
                },
            };
            self.faults.push(Fault { at, kind });
            at += rng.between(1, 2 * pause) * MS;
        }
        self
    }

    /// How writes go from one copy to another: asynchronously if either end is the asynchronous copy.
    #[must_use]
    pub fn pair_mode(&self, a: usize, b: usize) -> Mode {
        if self.modes[a] == Mode::Async || self.modes[b] == Mode::Async {
            Mode::Async
        } else {
            self.modes[b]
        }
    }

    fn fault(&self, rng: &mut Rng, taste: u64) -> FaultKind {
        let node = rng.index(self.copies);
        let other = (node + 1 + rng.index(self.copies - 1)) % self.copies;
        let short = [
            rng.between(1, 100),
            rng.between(100, 2000),
            rng.between(2000, 8000),
        ];
        let ms = short[rng.index(3)];
        let strike = [
            Strike::Kill,
            Strike::Power,
            Strike::AloneAfterBlackout,
            Strike::OthersAfterBlackout,
            Strike::KillOthers,
            Strike::PowerOthers,
            Strike::ForcedAlone,
            Strike::CutOff,
            Strike::Freeze,
            Strike::DiskError,
            Strike::Demote,
            Strike::Promote,
            Strike::PromoteOther,
        ][rng.index(13)];
        let rot = [
            Rot::Superblock,
            Rot::Log,
            Rot::Bitmap,
            Rot::BitmapMisdirected,
            Rot::Undo,
        ][rng.index(5)];
        let on = rng.index(SEEDED);
        // Moments that matter and are rarely hit otherwise.
        let known: [(&str, Strike); 10] = [
            ("resync-target", Strike::ForcedAlone),
            ("undo write", Strike::ForcedAlone),
            ("rollback", Strike::Power),
            ("rolled-back", Strike::Power),
            ("rolled-back", Strike::AloneAfterBlackout),
            ("link-down", Strike::Promote),
            ("flush", Strike::Power),
            ("flush", Strike::OthersAfterBlackout),
            ("in-sync", Strike::AloneAfterBlackout),
            ("resync-complete", Strike::Power),
        ];
        let (name, then) = known[rng.index(known.len())];
        let place = TRIGGERS.iter().position(|t| *t == name);
        let (on, strike) = match place {
            Some(place) if rng.chance(500) => (place, then),
            _ => (on, strike),
        };
        let most = [1, self.disk_ns / 500, self.latency / 500, 5_000][rng.index(4)];
        let delay_us = rng.below(most + 1);
        let weights: [(u64, FaultKind); 28] = [
            (12, FaultKind::Kill { node, down_ms: ms }),
            (12, FaultKind::Power { node, down_ms: ms }),
            (3, FaultKind::Blackout { down_ms: ms }),
            (6, FaultKind::Freeze { node, ms }),
            (
                12,
                FaultKind::Cut {
                    from: node,
                    to: other,
                    both: rng.chance(600),
                    ms,
                },
            ),
            (12, FaultKind::Break { a: node, b: other }),
            (
                3,
                FaultKind::SlowLine {
                    a: node,
                    b: other,
                    ms,
                },
            ),
            (4, FaultKind::SlowDisk { node, ms }),
            (3, FaultKind::HangDisk { node, ms }),
            (2, FaultKind::ClockJump { node, ms }),
            (
                1,
                FaultKind::DiskError {
                    node,
                    replace: rng.chance(700),
                },
            ),
            (1, FaultKind::BlankDisk { node, down_ms: ms }),
            (8, FaultKind::Promote { node }),
            (2, FaultKind::Force { node }),
            (8, FaultKind::Demote { node }),
            (4, FaultKind::Disconnect { node, ms }),
            (3, FaultKind::PauseResync { node, ms }),
            (2, FaultKind::SuspendIo { node, ms }),
            (3, FaultKind::Verify { node }),
            (1, FaultKind::StopVerify { node }),
            (1, FaultKind::Invalidate { node }),
            (4, FaultKind::Detach { node, down_ms: ms }),
            (
                1,
                FaultKind::SetPolicy {
                    node,
                    suspend: rng.chance(500),
                },
            ),
            (
                35,
                FaultKind::Ambush {
                    node,
                    on,
                    strike,
                    delay_us,
                    ms,
                },
            ),
            (3, FaultKind::Backup { node }),
            (8, FaultKind::OldDisk { node, down_ms: ms }),
            (
                4,
                FaultKind::Rot {
                    node,
                    down_ms: ms,
                    rot,
                },
            ),
            (
                2,
                FaultKind::Replay {
                    from: node,
                    to: other,
                },
            ),
        ];
        // The taste triples some kinds and leaves some out.
        let weight = |i: usize, w: u64| match (taste >> (2 * i)) & 3 {
            0 => 0,
            1 => w * 3,
            _ => w,
        };
        let total: u64 = (0..weights.len()).map(|i| weight(i, weights[i].0)).sum();
        let mut at = rng.below(total.max(1));
        for (i, (w, kind)) in weights.iter().enumerate() {
            let w = weight(i, *w);
            if at < w {
                return *kind;
            }
            at -= w;
        }
        FaultKind::Break { a: node, b: other }
    }
}
