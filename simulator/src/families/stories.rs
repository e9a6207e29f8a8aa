//! The stories that families tell: one piece of trouble each, told again and again until the plan's time is over.

use super::{one, trigger};
use crate::plan::{Fault, FaultKind, MS, Nonsense, Plan, Rot, Strike, TRIGGERS};
use crate::rng::Rng;

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

/// The steps of a resync.
const RESYNC: [&str; 12] = [
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
];

/// Whom a story is about, and what it was given to begin with.
#[derive(Clone, Copy)]
struct About {
    at: u64,
    node: usize,
    other: usize,
    down_ms: u64,
    sudden: Strike,
}

/// Nothing gets from one to the other for so many ms, or back.
fn cut(from: usize, to: usize, ms: u64) -> FaultKind {
    FaultKind::Cut {
        from,
        to,
        both: true,
        ms,
    }
}

impl Plan {
    /// One piece of trouble; returns when it should be over.
    pub(super) fn story(&mut self, name: &str, at: u64, rng: &mut Rng) -> u64 {
        let node = rng.index(self.copies);
        let about = About {
            at,
            node,
            other: (node + 1 + rng.index(self.copies - 1)) % self.copies,
            down_ms: one(rng, &[5, 200, 1500]),
            sudden: one(
                rng,
                &[
                    Strike::Power,
                    Strike::Power,
                    Strike::Kill,
                    Strike::PowerOthers,
                    Strike::OthersAfterBlackout,
                    Strike::AloneAfterBlackout,
                ],
            ),
        };
        at + match name {
            "commits" => self.commits(about, rng),
            "rollbacks" => self.rollbacks(about, rng),
            "disks" => self.disks(about, rng),
            "third" => self.third(about, rng),
            "diskless" => self.diskless(about, rng),
            "resyncs" => self.resyncs(about, rng),
            "errors" => self.errors(about, rng),
            "memory" => self.memory(about, rng),
            "greetings" => self.greetings(about, rng),
            "order" => self.order(about, rng),
            "alone" => self.alone(about, rng),
            "members" => self.members(about, rng),
            _ => self.writes(about, rng),
        } * MS
    }

    fn add(&mut self, at: u64, kind: FaultKind) {
        self.faults.push(Fault { at, kind });
    }

    fn ambush(&mut self, at: u64, node: usize, on: &str, strike: Strike, rng: &mut Rng) {
        let delay_us = rng.below([1, 1, 2, 300, 5000][(at / MS) as usize % 5]);
        let ms = one(rng, &[5, 50, 500]);
        self.ambush_after(at, node, on, strike, delay_us, ms);
    }

    /// `ms`: how long what it strikes stays away.
    fn ambush_after(
        &mut self,
        at: u64,
        node: usize,
        on: &str,
        strike: Strike,
        delay_us: u64,
        ms: u64,
    ) {
        let on = trigger(on);
        let kind = FaultKind::Ambush {
            node,
            on,
            strike,
            delay_us,
            ms,
        };
        self.add(at, kind);
    }

    fn commits(&mut self, about: About, rng: &mut Rng) -> u64 {
        let point = one(rng, &DURABLE);
        self.ambush(about.at, about.node, point, about.sudden, rng);
        self.something(about.at, rng);
        rng.between(200, 1500)
    }

    /// The copies part, so that there is something to fill; the target is forced in the middle, and the rollback is cut.
    fn rollbacks(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        self.add(at, cut(node, other, rng.between(1100, 2500)));
        if rng.chance(500) {
            self.tuning.resync_window_bytes = 64 << 10;
        }
        let points = [
            "resync-target",
            "undo write",
            "undo written",
            "sends ResyncAck",
        ];
        let begin = one(rng, &points);
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
                self.ambush_after(at, n, moment, strike, rng.below(4000), 20);
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
        rng.between(5000, 8000)
    }

    fn disks(&mut self, about: About, rng: &mut Rng) -> u64 {
        if rng.below(3) == 0 {
            self.old_disk(about, rng)
        } else {
            self.rot(about, rng)
        }
    }

    fn old_disk(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            ..
        } = about;
        self.add(at, FaultKind::Backup { node });
        let mut then = at;
        for _ in 0..3 {
            then += rng.between(100, 600) * MS;
            let what = [
                FaultKind::Kill { node, down_ms: 5 },
                FaultKind::Detach { node, down_ms: 5 },
                FaultKind::Demote { node: other },
                FaultKind::Promote { node },
            ];
            self.add(then, one(rng, &what));
        }
        then += 900 * MS;
        self.add(then, FaultKind::OldDisk { node, down_ms });
        (then - at) / MS + 1500
    }

    fn rot(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            ..
        } = about;
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
            self.add(at, cut(node, other, rng.between(1100, 2500)));
        }
        let then = at + rng.between(50, 2500) * MS;
        if rng.chance(400) {
            self.ambush(at, node, one(rng, &DURABLE), Strike::Power, rng);
        }
        self.add(then, FaultKind::Rot { node, down_ms, rot });
        if rng.chance(300) {
            let node = other;
            self.add(then + 2 * MS, FaultKind::Power { node, down_ms });
        }
        (then - at) / MS + rng.between(500, 2500)
    }

    fn third(&mut self, about: About, rng: &mut Rng) -> u64 {
        let at = about.at;
        let away = rng.between(100, 3000);
        self.add(at, cut(about.node, about.other, away));
        for _ in 0..rng.between(1, 4) {
            let then = at + rng.below(2500) * MS;
            let node = rng.index(3);
            let other = (node + 1 + rng.index(2)) % 3;
            let what = [
                cut(node, other, 1500),
                cut(node, other, 300),
                FaultKind::Break { a: node, b: other },
                FaultKind::Demote { node },
                FaultKind::Promote { node },
                FaultKind::Kill { node, down_ms: 5 },
                FaultKind::Power { node, down_ms: 300 },
                FaultKind::Force { node },
                FaultKind::Detach { node, down_ms: 700 },
            ];
            self.add(then, one(rng, &what));
        }
        if rng.chance(500) {
            let point = one(rng, &TRIGGERS);
            self.ambush(at, rng.index(3), point, about.sudden, rng);
        }
        rng.between(1500, 3500)
    }

    fn diskless(&mut self, about: About, rng: &mut Rng) -> u64 {
        let ms = rng.between(500, 4000);
        self.add(about.at, FaultKind::DetachDisk { ms });
        self.something(about.at, rng);
        if rng.chance(500) {
            let points = [
                "diskless",
                "sends DiskLost",
                "sends DiskLostAck",
                "flush",
                "established",
            ];
            let point = one(rng, &points);
            self.ambush(about.at, about.node, point, about.sudden, rng);
        }
        rng.between(2000, 5000)
    }

    fn resyncs(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        if rng.chance(300) {
            self.add(at, FaultKind::Invalidate { node });
        } else {
            self.add(at, cut(node, other, rng.between(1100, 1800)));
        }
        for n in [node, other] {
            let point = one(rng, &RESYNC);
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
        rng.between(1500, 3500)
    }

    fn errors(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        if rng.chance(400) {
            self.add(at, cut(node, other, rng.between(1100, 1800)));
        }
        for _ in 0..rng.between(1, 4) {
            let then = at + rng.below(3000) * MS;
            let nonsense = [
                Nonsense::OtherGeneration,
                Nonsense::OtherGeneration,
                Nonsense::BehindTheEnd,
            ];
            let what = one(rng, &nonsense);
            let (from, to) = (node, other);
            let kind = match rng.below(4) {
                0 => FaultKind::DiskError {
                    node,
                    replace: rng.chance(500),
                },
                1 => FaultKind::Replay { from, to },
                2 => FaultKind::Replay { from: to, to: from },
                _ => FaultKind::Nonsense { from, to, what },
            };
            self.add(then, kind);
        }
        let points = [
            "flush",
            "sends ResyncData",
            "resync-source",
            "established",
            "log write",
        ];
        let point = one(rng, &points);
        self.ambush(at, node, point, Strike::DiskError, rng);
        rng.between(1500, 3500)
    }

    fn memory(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            ..
        } = about;
        self.add(at, FaultKind::SlowDisk { node, ms: 1500 });
        let then = at + rng.between(10, 1400) * MS;
        self.add(then, FaultKind::Kill { node, down_ms });
        let power = FaultKind::Power {
            node: other,
            down_ms: 2500,
        };
        self.add(then + rng.below(300) * MS, power);
        rng.between(3000, 5000)
    }

    fn greetings(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            ..
        } = about;
        self.add(at, FaultKind::Break { a: node, b: other });
        if rng.chance(300) {
            self.add(at + 50 * MS, FaultKind::Power { node, down_ms });
        }
        rng.between(200, 600)
    }

    /// A follower whose disk is behind ends in the midst of applying, and what it holds must be a point in time (D3): some writes wait for
    /// others in the same place, and what depends on them must wait, too.
    fn order(&mut self, about: About, rng: &mut Rng) -> u64 {
        let node = self.copies - 1;
        self.add(about.at, FaultKind::SlowDisk { node, ms: 1500 });
        let strikes = [
            Strike::KilledAndForced,
            Strike::KilledAndForced,
            Strike::ForcedAlone,
        ];
        let strike = one(rng, &strikes);
        let on = one(rng, &["flush", "flushed", "log write"]);
        let delay_us = rng.below(100_000);
        let then = about.at + rng.between(100, 800) * MS;
        self.ambush_after(then, node, on, strike, delay_us, 500);
        rng.between(5000, 7000)
    }

    fn alone(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        let ms = rng.between(1500, 4000);
        self.add(at, cut(node, other, ms));
        let points = ["log write", "log written", "bitmap write", "bitmap written"];
        for n in [node, other] {
            let point = one(rng, &points);
            let then = at + rng.between(1000, ms) * MS;
            self.ambush(then, n, point, Strike::Power, rng);
        }
        ms + rng.between(500, 2000)
    }

    /// Three members of S, and what one of them is filled with by another that is not the primary.
    fn members(&mut self, about: About, rng: &mut Rng) -> u64 {
        match rng.below(4) {
            0 => self.loser(about, rng),
            1 => self.parked(about, rng),
            2 => self.unheard(about, rng),
            _ => self.given_up(about, rng),
        }
    }

    /// The third copy.
    fn rest(&self, about: About) -> usize {
        3 - about.node - about.other
    }

    /// The others are demoted, and this one serves.
    fn serves(&mut self, at: u64, node: usize) {
        for other in (0..3).filter(|n| *n != node) {
            self.add(at, FaultKind::Demote { node: other });
        }
        self.add(at + 60 * MS, FaultKind::Promote { node });
    }

    /// One member is away with everything; one loses power and what it acknowledged from memory, and fills the primary's new disk, or whom it
    /// was filling before.
    fn loser(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        let rest = self.rest(about);
        self.serves(at, node);
        let away = at + rng.between(200, 600) * MS;
        self.add(
            away,
            FaultKind::SlowDisk {
                node: other,
                ms: 1000,
            },
        );
        let lost = away + rng.between(5, 300) * MS;
        let ms = rng.between(800, 3000);
        let from = lost - rng.below(5) * MS;
        self.add(from, cut(node, rest, ms));
        self.add(from, cut(other, rest, ms));
        let power = FaultKind::Power {
            node: other,
            down_ms: one(rng, &[5, 50, 200]),
        };
        self.add(lost, power);
        let down_ms = one(rng, &[5, 300]);
        let what = [
            FaultKind::Power { node, down_ms },
            FaultKind::Kill { node, down_ms },
        ];
        // (A new disk once, in the end: until it is filled, what was acknowledged depends on those who only have it in memory.)
        let fresh = at + 5500 * MS >= self.duration;
        let what = if fresh {
            FaultKind::FreshDisk { node, down_ms }
        } else {
            one(rng, &what)
        };
        self.add(lost - rng.below(3) * MS, what);
        if rng.chance(300) {
            self.ambush(lost, other, one(rng, &RESYNC), Strike::Power, rng);
        }
        for _ in 0..rng.below(3) {
            let node = one(rng, &[node, other]);
            let then = lost + rng.between(300, 2500) * MS;
            self.add(then, FaultKind::Promote { node });
        }
        let end = (lost - at) / MS + ms + rng.between(500, 1500);
        if fresh { end.max(6000) } else { end }
    }

    /// Writes wait for one member. Another, which has flushed them, ends, and is filled by the first before the primary notices.
    fn parked(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        let rest = self.rest(about);
        self.serves(at, node);
        let from = at + rng.between(200, 800) * MS;
        let ms = rng.between(300, 1500);
        self.add(from, cut(node, rest, ms));
        let then = from + rng.between(1, ms) * MS;
        let end = [
            FaultKind::Kill {
                node: other,
                down_ms: 5,
            },
            FaultKind::Break { a: node, b: other },
            FaultKind::Power {
                node: other,
                down_ms: 5,
            },
        ];
        self.add(then, one(rng, &end));
        self.add(then, cut(node, other, rng.between(50, 800)));
        if rng.chance(300) {
            self.add(then + rng.below(ms) * MS, FaultKind::Demote { node });
        }
        (then - at) / MS + ms + rng.between(300, 1500)
    }

    /// The primary loses power right when a copy comes into S, which may never hear of it.
    fn unheard(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            ..
        } = about;
        let rest = self.rest(about);
        self.serves(at, node);
        let from = at + rng.between(200, 600) * MS;
        let ms = rng.between(1100, 1800);
        self.add(from, cut(node, other, ms));
        self.add(from, cut(rest, other, ms + rng.below(600)));
        let points = [
            "in-sync",
            "sends InSync",
            "superblock write",
            "superblock written",
        ];
        let point = one(rng, &points);
        let strike = one(rng, &[Strike::Power, Strike::Kill, Strike::CutOff]);
        self.ambush_after(from + ms * MS, node, point, strike, rng.below(300), down_ms);
        if rng.chance(500) {
            // Who was left behind fills it meanwhile.
            let then = from + (ms + rng.below(300)) * MS;
            self.add(
                then,
                FaultKind::Power {
                    node: rest,
                    down_ms: 50,
                },
            );
        }
        ms + rng.between(1500, 4000)
    }

    /// Two sides, one of which is given up, and once more while it is filled.
    fn given_up(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at, node, other, ..
        } = about;
        let rest = self.rest(about);
        self.serves(at, node);
        let from = at + rng.between(200, 500) * MS;
        let ms = rng.between(1100, 1800);
        self.add(from, cut(node, other, ms));
        self.add(from, cut(other, rest, ms));
        self.add(from + 300 * MS, FaultKind::Force { node: other });
        let met = from + ms * MS;
        self.add(met + 150 * MS, FaultKind::Demote { node: other });
        let mut then = met + 250 * MS;
        for _ in 0..6 {
            self.add(then, FaultKind::Resolve { node: other });
            then += rng.between(10, 150) * MS;
        }
        if rng.chance(500) {
            let then = met + rng.between(200, 500) * MS;
            self.add(then, cut(node, other, 400));
        }
        (then - at) / MS + rng.between(500, 1500)
    }

    /// Writes and power cuts, and nothing else.
    fn writes(&mut self, about: About, rng: &mut Rng) -> u64 {
        let About {
            at,
            node,
            other,
            down_ms,
            sudden,
        } = about;
        match rng.below(4) {
            0 => self.add(at, FaultKind::Break { a: node, b: other }),
            1 => self.add(at, FaultKind::Blackout { down_ms }),
            2 => {
                let points = ["flush", "flushed", "log write", "log written"];
                self.ambush(at, node, one(rng, &points), sudden, rng);
            }
            _ => self.add(at, FaultKind::Power { node, down_ms }),
        }
        self.something(at, rng);
        rng.between(50, 800)
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
