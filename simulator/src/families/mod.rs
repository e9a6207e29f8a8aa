//! Families of plans: worlds made for one kind of trouble each, in which moments that are rare in an ordinary seed come again and
//! again. `simulator mutants` looks for planted defects in them, and `simulator --family NAME` runs the core without any.

mod stories;

use crate::plan::{MS, Plan, TRIGGERS};
use crate::rng::Rng;
use holdfast_wire_format::metadata::{Mode, OnPeerLoss};

/// Every family, in the order in which they are tried.
pub const FAMILIES: [&str; 17] = [
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
    "members",
];

fn set_all(modes: &mut [Mode], mode: Mode) {
    for each in modes.iter_mut().filter(|m| **m != Mode::Async) {
        *each = mode;
    }
}

fn trigger(name: &str) -> usize {
    let at = TRIGGERS.iter().position(|t| *t == name);
    at.unwrap_or_else(|| panic!("nothing is called {name}"))
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
        if name == "members" {
            plan.copies = 3;
            plan.modes = vec![one(&mut rng, &[Mode::Sync, Mode::SemiSync, Mode::SemiSync]); 3];
            plan.disk_ns = one(&mut rng, &[100_000, MS, 3 * MS]);
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
}
