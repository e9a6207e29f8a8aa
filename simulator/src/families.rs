//! Families of plans: worlds made for one kind of trouble each, in which moments that are rare in an ordinary seed come again and
//! again. `simulator mutants` looks for planted defects in them, and `simulator --family NAME` runs the core without any.

use crate::plan::{Fault, FaultKind, MS, Nonsense, Plan, Rot, Strike, TRIGGERS};
use crate::rng::Rng;
use holdfast_wire_format::metadata::{Mode, OnPeerLoss};

/// Every family, in the order in which they are tried.
pub const FAMILIES: [&str; 16] = [
    "ordinary",
    "writes",
    "commits",
    "rollbacks",
    "disks",
    "third",
    "changes",
    "register",
    "resyncs",
    "shapeless",
    "diskless",
    "errors",
    "memory",
    "greetings",
    "alone",
    "order",
];

/// The moments right before and right after something is made durable.
const DURABLE: [&str; 10] = [
    "superblock write",
    "log write",
    "bitmap write",
    "undo write",
    "flush",
    "superblock written",
    "log written",
    "bitmap written",
    "undo written",
    "flushed",
];

fn set_all(modes: &mut [Mode], mode: Mode) {
    for each in modes.iter_mut().filter(|m| **m != Mode::Async) {
        *each = mode;
    }
}

fn trigger(name: &str) -> usize {
    TRIGGERS.iter().position(|t| *t == name).unwrap_or(0)
}

fn one<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.index(of.len())]
}

impl Plan {
    /// The plan of a seed in a family, by its place in [`FAMILIES`].
    #[must_use]
    pub fn in_family(seed: u64, family: usize) -> Plan {
        let mut rng = Rng::stream(seed, 100 + family as u64);
        let name = FAMILIES[family];
        let mut plan = Plan::of(seed);
        match name {
            "ordinary" => return plan,
            "changes" => return plan.with_changes(),
            "register" => {
                plan.register = true;
                return plan;
            }
            "shapeless" => {
                // An ordinary seed, looked at after every batch.
                plan.look_per_mille = 300;
                return plan;
            }
            _ => {}
        }
        plan.narrow(&mut rng);
        match name {
            "memory" => {
                self::set_all(&mut plan.modes, Mode::SemiSync);
                plan.policy = OnPeerLoss::Suspend;
                plan.disk_ns = 3 * MS;
            }
            "greetings" => {
                plan.latency = one(&mut rng, &[3 * MS, 10 * MS]);
                plan.pause /= 3;
            }
            "order" => {
                // Two volumes and few blocks: many writes wait for others in the same place, and others do not.
                let other = one(&mut rng, &[Mode::Async, Mode::SemiSync]);
                let first = if other == Mode::Async {
                    Mode::Sync
                } else {
                    other
                };
                plan.copies = 2 + usize::from(rng.chance(300));
                plan.modes = vec![first; plan.copies - 1];
                plan.modes.push(other);
                plan.volumes = vec![2048, 2048];
                plan.begin = plan.volumes.clone();
                plan.hot_sectors = one(&mut rng, &[24, 64, 256]);
                plan.tuning.log_extents = 12;
                plan.meta_factor = 20;
                plan.extent_shift = 13;
                plan.grain_shift = 12;
                plan.clients = 3;
                plan.burst = 16;
                plan.pause *= 8;
                plan.think = 20_000;
            }
            "alone" => {
                plan.policy = OnPeerLoss::Continue;
                plan.meta_factor = 20;
                plan.tuning.log_extents = 12;
                plan.extent_shift = 13;
                plan.grain_shift = 12;
                plan.volumes = vec![2048, 2048];
                plan.begin = plan.volumes.clone();
                plan.hot_sectors = 1 << 20;
            }
            _ => {}
        }
        if name == "third" || (name == "diskless" && rng.chance(700)) {
            plan.copies = 3;
            let third = one(&mut rng, &[Mode::Sync, Mode::Async]);
            plan.modes = vec![Mode::Sync, Mode::Sync, third];
        }
        let mut at = 800 * MS;
        while at < plan.duration {
            let end = plan.story(name, at, &mut rng);
            at = end + rng.between(100, 1500) * MS;
        }
        plan.faults.sort_by_key(|f| f.at);
        plan
    }

    /// Few blocks, small logs, everything looked at often.
    fn narrow(&mut self, rng: &mut Rng) {
        self.faults.clear();
        self.volumes = (0..rng.between(1, 2))
            .map(|_| one(rng, &[128, 256, 512, 2048]))
            .collect();
        self.begin = self.volumes.clone();
        self.hot_sectors = one(rng, &[16, 128, 1 << 20]);
        self.duration = rng.between(10, 18) * 1000 * MS;
        self.latency = one(rng, &[50_000, 300_000, 3 * MS]);
        self.disk_ns = one(rng, &[20_000, 100_000, 400_000]);
        self.meta_factor = one(rng, &[1, 4, 20]);
        self.flush_factor = one(rng, &[3, 20, 60]);
        self.grain_shift = one(rng, &[12, 12, 13]);
        self.extent_shift = self.grain_shift.max(one(rng, &[13, 14]));
        self.undo_size = one(rng, &[64 << 10, 1 << 20, 1 << 20]);
        self.tuning.resync_chunk_bytes = 16 << 10;
        self.tuning.resync_window_bytes = one(rng, &[64 << 10, 128 << 10]);
        self.tuning.log_extents = one(rng, &[12, 12, 24]);
        self.failover_ms = one(rng, &[100, 500, 1500]);
        self.corrupt_per_million = 0;
        self.look_per_mille = 300;
        self.clients = rng.between(1, 3) as usize;
        self.burst = one(rng, &[1, 4, 16]);
        self.think = one(rng, &[20_000, 200_000]);
        self.pause = self.duration * self.clients as u64 * self.burst / rng.between(500, 1200);
        self.log_off_per_mille = 0;
    }

    fn add(&mut self, at: u64, kind: FaultKind) {
        self.faults.push(Fault { at, kind });
    }

    fn ambush(&mut self, at: u64, node: usize, on: &str, strike: Strike, rng: &mut Rng) {
        let delay_us = rng.below([1, 1, 2, 300, 5000][(at / MS) as usize % 5]);
        let on = trigger(on);
        let ms = one(rng, &[5, 50, 500]);
        self.add(
            at,
            FaultKind::Ambush {
                node,
                on,
                strike,
                delay_us,
                ms,
            },
        );
    }

    /// One piece of trouble; returns when it should be over.
    fn story(&mut self, name: &str, at: u64, rng: &mut Rng) -> u64 {
        let node = rng.index(self.copies);
        let other = (node + 1 + rng.index(self.copies - 1)) % self.copies;
        let down_ms = one(rng, &[5, 200, 1500]);
        let sudden = one(
            rng,
            &[
                Strike::Power,
                Strike::Power,
                Strike::Kill,
                Strike::PowerOthers,
                Strike::OthersAfterBlackout,
                Strike::AloneAfterBlackout,
            ],
        );
        match name {
            "commits" => {
                let point = one(rng, &DURABLE);
                self.ambush(at, node, point, sudden, rng);
                self.something(at, rng);
                at + rng.between(200, 1500) * MS
            }
            "rollbacks" => {
                // The copies part, so that there is something to fill; the target is forced in the middle, and the rollback is cut.
                self.add(
                    at,
                    FaultKind::Cut {
                        from: node,
                        to: other,
                        both: true,
                        ms: rng.between(1100, 2500),
                    },
                );
                if rng.chance(500) {
                    self.tuning.resync_window_bytes = 64 << 10;
                }
                let begin = one(
                    rng,
                    &[
                        "resync-target",
                        "undo write",
                        "undo written",
                        "sends ResyncAck",
                    ],
                );
                for n in [node, other] {
                    let how = one(
                        rng,
                        &[
                            Strike::ForcedAlone,
                            Strike::ForcedAlone,
                            Strike::RottenAndForced,
                        ],
                    );
                    self.ambush(at, n, begin, how, rng);
                    if rng.chance(700) {
                        let moment = one(rng, &["rollback", "rolled-back", "promoting", "primary"]);
                        let strike = one(rng, &[Strike::Power, Strike::Power, Strike::Kill]);
                        let delay_us = rng.below(4000);
                        let ms = 20;
                        self.add(
                            at,
                            FaultKind::Ambush {
                                node: n,
                                on: trigger(moment),
                                strike,
                                delay_us,
                                ms,
                            },
                        );
                    }
                }
                // Whoever was struck in the middle is forced once more, before its source is back.
                for n in [node, other] {
                    let mut then = at + 2500 * MS;
                    for _ in 0..3 {
                        then += rng.between(300, 1500) * MS;
                        self.add(then, FaultKind::Force { node: n });
                    }
                }
                at + rng.between(5000, 8000) * MS
            }
            "disks" => match rng.below(3) {
                0 => {
                    self.add(at, FaultKind::Backup { node });
                    let mut then = at;
                    for _ in 0..3 {
                        then += rng.between(100, 600) * MS;
                        self.add(
                            then,
                            one(
                                rng,
                                &[
                                    FaultKind::Kill { node, down_ms: 5 },
                                    FaultKind::Detach { node, down_ms: 5 },
                                    FaultKind::Demote { node: other },
                                    FaultKind::Promote { node },
                                ],
                            ),
                        );
                    }
                    then += 900 * MS;
                    self.add(then, FaultKind::OldDisk { node, down_ms });
                    then + 1500 * MS
                }
                _ => {
                    let rot = one(
                        rng,
                        &[
                            Rot::Superblock,
                            Rot::Log,
                            Rot::Log,
                            Rot::Bitmap,
                            Rot::Bitmap,
                            Rot::BitmapMisdirected,
                            Rot::Undo,
                        ],
                    );
                    if rng.chance(600) {
                        self.add(
                            at,
                            FaultKind::Cut {
                                from: node,
                                to: other,
                                both: true,
                                ms: rng.between(1100, 2500),
                            },
                        );
                    }
                    let then = at + rng.between(50, 2500) * MS;
                    if rng.chance(400) {
                        self.ambush(at, node, one(rng, &DURABLE), Strike::Power, rng);
                    }
                    self.add(then, FaultKind::Rot { node, down_ms, rot });
                    if rng.chance(300) {
                        self.add(
                            then + 2 * MS,
                            FaultKind::Power {
                                node: other,
                                down_ms,
                            },
                        );
                    }
                    then + rng.between(500, 2500) * MS
                }
            },
            "third" => {
                self.add(
                    at,
                    FaultKind::Cut {
                        from: node,
                        to: other,
                        both: true,
                        ms: rng.between(100, 3000),
                    },
                );
                for _ in 0..rng.between(1, 4) {
                    let then = at + rng.below(2500) * MS;
                    let n = rng.index(3);
                    let m = (n + 1 + rng.index(2)) % 3;
                    let what = one(
                        rng,
                        &[
                            FaultKind::Cut {
                                from: n,
                                to: m,
                                both: true,
                                ms: 1500,
                            },
                            FaultKind::Cut {
                                from: n,
                                to: m,
                                both: true,
                                ms: 300,
                            },
                            FaultKind::Break { a: n, b: m },
                            FaultKind::Demote { node: n },
                            FaultKind::Promote { node: n },
                            FaultKind::Kill {
                                node: n,
                                down_ms: 5,
                            },
                            FaultKind::Power {
                                node: n,
                                down_ms: 300,
                            },
                            FaultKind::Force { node: n },
                            FaultKind::Detach {
                                node: n,
                                down_ms: 700,
                            },
                        ],
                    );
                    self.add(then, what);
                }
                if rng.chance(500) {
                    let point = one(rng, &TRIGGERS);
                    self.ambush(at, rng.index(3), point, sudden, rng);
                }
                at + rng.between(1500, 3500) * MS
            }
            "diskless" => {
                self.add(
                    at,
                    FaultKind::DetachDisk {
                        ms: rng.between(500, 4000),
                    },
                );
                self.something(at, rng);
                if rng.chance(500) {
                    let point = one(
                        rng,
                        &[
                            "diskless",
                            "sends DiskLost",
                            "sends DiskLostAck",
                            "flush",
                            "established",
                        ],
                    );
                    self.ambush(at, node, point, sudden, rng);
                }
                at + rng.between(2000, 5000) * MS
            }
            "resyncs" => {
                let full = rng.chance(300);
                if full {
                    self.add(at, FaultKind::Invalidate { node });
                } else {
                    self.add(
                        at,
                        FaultKind::Cut {
                            from: node,
                            to: other,
                            both: true,
                            ms: rng.between(1100, 1800),
                        },
                    );
                }
                for n in [node, other] {
                    let point = one(
                        rng,
                        &[
                            "resync-target",
                            "resync-source",
                            "resync-complete",
                            "resync-finished",
                            "in-sync",
                            "sends ResyncAck",
                            "sends ResyncData",
                            "sends Ready",
                            "sends CompleteAck",
                            "sends ResyncDone",
                            "established",
                            "handshake",
                        ],
                    );
                    let strike = one(
                        rng,
                        &[
                            Strike::Power,
                            Strike::Kill,
                            Strike::CutOff,
                            Strike::Demote,
                            Strike::PromoteOther,
                            Strike::PowerOthers,
                            Strike::AloneAfterBlackout,
                            Strike::OthersAfterBlackout,
                        ],
                    );
                    self.ambush(at, n, point, strike, rng);
                }
                at + rng.between(1500, 3500) * MS
            }
            "errors" => {
                if rng.chance(400) {
                    let ms = rng.between(1100, 1800);
                    self.add(
                        at,
                        FaultKind::Cut {
                            from: node,
                            to: other,
                            both: true,
                            ms,
                        },
                    );
                }
                for _ in 0..rng.between(1, 4) {
                    let then = at + rng.below(3000) * MS;
                    let nonsense = [
                        Nonsense::OtherGeneration,
                        Nonsense::OtherGeneration,
                        Nonsense::BehindTheEnd,
                    ];
                    let what = one(rng, &nonsense);
                    let kind = match rng.below(4) {
                        0 => FaultKind::DiskError {
                            node,
                            replace: rng.chance(500),
                        },
                        1 => FaultKind::Replay {
                            from: node,
                            to: other,
                        },
                        2 => FaultKind::Replay {
                            from: other,
                            to: node,
                        },
                        _ => FaultKind::Nonsense {
                            from: node,
                            to: other,
                            what,
                        },
                    };
                    self.add(then, kind);
                }
                let point = one(
                    rng,
                    &[
                        "flush",
                        "sends ResyncData",
                        "resync-source",
                        "established",
                        "log write",
                    ],
                );
                self.ambush(at, node, point, Strike::DiskError, rng);
                at + rng.between(1500, 3500) * MS
            }
            "memory" => {
                self.add(at, FaultKind::SlowDisk { node, ms: 1500 });
                let then = at + rng.between(10, 1400) * MS;
                self.add(then, FaultKind::Kill { node, down_ms });
                self.add(
                    then + rng.below(300) * MS,
                    FaultKind::Power {
                        node: other,
                        down_ms: 2500,
                    },
                );
                at + rng.between(3000, 5000) * MS
            }
            "greetings" => {
                self.add(at, FaultKind::Break { a: node, b: other });
                if rng.chance(300) {
                    self.add(at + 50 * MS, FaultKind::Power { node, down_ms });
                }
                at + rng.between(200, 600) * MS
            }
            "order" => {
                // A follower whose disk is behind ends in the midst of applying, and what it holds must be a point in time (D3): some
                // writes wait for others in the same place, and what depends on them must wait, too.
                let node = self.copies - 1;
                self.add(at, FaultKind::SlowDisk { node, ms: 1500 });
                let strike = one(
                    rng,
                    &[
                        Strike::KilledAndForced,
                        Strike::KilledAndForced,
                        Strike::ForcedAlone,
                    ],
                );
                let kind = FaultKind::Ambush {
                    node,
                    on: trigger(one(rng, &["flush", "flushed", "log write"])),
                    strike,
                    delay_us: rng.below(100_000),
                    ms: 500,
                };
                self.add(at + rng.between(100, 800) * MS, kind);
                at + rng.between(5000, 7000) * MS
            }
            "alone" => {
                let ms = rng.between(1500, 4000);
                self.add(
                    at,
                    FaultKind::Cut {
                        from: node,
                        to: other,
                        both: true,
                        ms,
                    },
                );
                for n in [node, other] {
                    let point = one(
                        rng,
                        &["log write", "log written", "bitmap write", "bitmap written"],
                    );
                    let then = at + rng.between(1000, ms) * MS;
                    self.ambush(then, n, point, Strike::Power, rng);
                }
                at + (ms + rng.between(500, 2000)) * MS
            }
            // Writes and power cuts, and nothing else.
            _ => {
                match rng.below(4) {
                    0 => self.add(at, FaultKind::Break { a: node, b: other }),
                    1 => self.add(at, FaultKind::Blackout { down_ms }),
                    2 => self.ambush(
                        at,
                        node,
                        one(rng, &["flush", "flushed", "log write", "log written"]),
                        sudden,
                        rng,
                    ),
                    _ => self.add(at, FaultKind::Power { node, down_ms }),
                }
                self.something(at, rng);
                at + rng.between(50, 800) * MS
            }
        }
    }

    /// An order or a small fault beside it.
    fn something(&mut self, at: u64, rng: &mut Rng) {
        let node = rng.index(self.copies);
        let other = (node + 1) % self.copies;
        let kind = match rng.below(9) {
            0 => FaultKind::Promote { node },
            1 => FaultKind::Demote { node },
            2 => FaultKind::Break { a: node, b: other },
            3 => FaultKind::Cut {
                from: node,
                to: other,
                both: rng.chance(700),
                ms: 1300,
            },
            4 => FaultKind::Kill { node, down_ms: 20 },
            5 => FaultKind::Detach { node, down_ms: 20 },
            6 => FaultKind::SlowDisk { node, ms: 1000 },
            7 => FaultKind::HangDisk { node, ms: 700 },
            _ => return,
        };
        self.add(at + rng.below(400) * MS, kind);
    }
}
