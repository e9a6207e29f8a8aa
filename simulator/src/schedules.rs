//! The schedules of `simulator enumerate`: the worlds they come over, and the steps they are made of.

use crate::plan::{Fault, FaultKind, MS, Plan, Rot, Strike, TRIGGERS};
use holdfast_replicator_core::api::Tuning;
use holdfast_wire_format::metadata::{Mode, OnPeerLoss};
use std::collections::BTreeSet;
use std::fmt;

/// The world that the schedules come over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub modes: &'static [Mode],
    pub policy: OnPeerLoss,
    /// Processes keep an activity log.
    pub log: bool,
}

const fn shape(modes: &'static [Mode], policy: OnPeerLoss, log: bool) -> Shape {
    Shape { modes, policy, log }
}

const PAIR: &[Mode] = &[Mode::Sync, Mode::Sync];
const SEMI_SYNC_PAIR: &[Mode] = &[Mode::SemiSync, Mode::SemiSync];
const THIRD_FOLLOWS: &[Mode] = &[Mode::Sync, Mode::Sync, Mode::Async];
const THREE_MEMBERS: &[Mode] = &[Mode::Sync, Mode::Sync, Mode::Sync];

/// Two and three copies, both policies, the activity log on and off.
pub(crate) const SHAPES: [Shape; 10] = [
    shape(PAIR, OnPeerLoss::Suspend, true),
    shape(PAIR, OnPeerLoss::Continue, true),
    shape(THIRD_FOLLOWS, OnPeerLoss::Continue, true),
    shape(THREE_MEMBERS, OnPeerLoss::Suspend, true),
    shape(PAIR, OnPeerLoss::Continue, false),
    shape(SEMI_SYNC_PAIR, OnPeerLoss::Suspend, true),
    shape(THIRD_FOLLOWS, OnPeerLoss::Suspend, true),
    shape(THREE_MEMBERS, OnPeerLoss::Continue, true),
    shape(THIRD_FOLLOWS, OnPeerLoss::Suspend, false),
    shape(THREE_MEMBERS, OnPeerLoss::Continue, false),
];

/// Something that goes wrong, or an order; some take more than one fault.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub name: String,
    /// Each with its time after the step begins, in ms.
    faults: Vec<(u64, FaultKind)>,
    /// The next step begins so many ms after this one.
    takes: u64,
    pub cost: usize,
    /// What follows from it is also struck at each of its points.
    pub struck: bool,
}

/// One step of a schedule, by its place in [`bases`], and what strikes in the midst of what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    pub base: u16,
    pub strike: Option<At>,
}

/// When that node comes to that point, that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct At {
    pub node: u8,
    /// Place in [`TRIGGERS`].
    pub point: u8,
    /// Place in [`STRIKES`].
    pub strike: u8,
}

pub(crate) const STRIKES: [Strike; 3] = [Strike::Lose, Strike::Power, Strike::ForcedAlone];

/// The world has so long until the first step.
const BEGIN: u64 = 700 * MS;
/// ms: a step; a machine that is back before the next one, and one that is not.
const STEP: u64 = 500;
const SOON: u64 = 60;
const LATE: u64 = 800;
/// A forced copy is forced 1500 ms after the strike.
const FORCED: u64 = 1900;

/// Every base of a world of so many copies.
pub(crate) fn bases(copies: usize) -> Vec<Base> {
    let base = |name: String, kind: FaultKind| Base {
        name,
        faults: vec![(1, kind)],
        takes: STEP,
        cost: 1,
        struck: false,
    };
    let mut all = vec![base(
        "all lose power".into(),
        FaultKind::Blackout { down_ms: SOON },
    )];
    for node in 0..copies {
        let down_ms = SOON;
        let struck = |name: &str, kind| Base {
            struck: true,
            ..base(format!("{name} {node}"), kind)
        };
        let plain = |name: &str, kind| base(format!("{name} {node}"), kind);
        all.extend([
            struck("power cut of", FaultKind::Power { node, down_ms }),
            struck("new disk for", FaultKind::BlankDisk { node, down_ms }),
            struck("demotion of", FaultKind::Demote { node }),
            struck(
                "disk error of",
                FaultKind::DiskError {
                    node,
                    replace: true,
                },
            ),
            plain("kill of", FaultKind::Kill { node, down_ms }),
            plain(
                "long power cut of",
                FaultKind::Power {
                    node,
                    down_ms: LATE,
                },
            ),
            plain("clean stop of", FaultKind::Detach { node, down_ms }),
            plain("promotion of", FaultKind::Promote { node }),
            plain("force of", FaultKind::Force { node }),
            plain("invalidation of", FaultKind::Invalidate { node }),
        ]);
        let others = (0..copies).filter(|n| *n != node);
        // A person insists on a copy while the others are away: those that are off, and those that go on.
        let mut faults: Vec<(u64, FaultKind)> = others
            .clone()
            .map(|node| {
                (
                    1,
                    FaultKind::Power {
                        node,
                        down_ms: LATE,
                    },
                )
            })
            .collect();
        faults.push((200, FaultKind::Force { node }));
        all.push(Base {
            name: format!("force of {node}, the others off"),
            faults,
            takes: 1100,
            cost: 1,
            struck: false,
        });
        let mut faults: Vec<(u64, FaultKind)> = others
            .map(|to| {
                let (from, ms) = (node, LATE);
                (
                    1,
                    FaultKind::Cut {
                        from,
                        to,
                        both: true,
                        ms,
                    },
                )
            })
            .collect();
        faults.push((200, FaultKind::Force { node }));
        all.push(Base {
            name: format!("force of {node}, cut off"),
            faults,
            takes: 1100,
            cost: 1,
            struck: false,
        });
        // An image of the disk, two starts that the others see, and the image in place of the disk.
        all.push(Base {
            name: format!("old disk of {node}"),
            faults: vec![
                (1, FaultKind::Backup { node }),
                (20, FaultKind::Kill { node, down_ms }),
                (500, FaultKind::Kill { node, down_ms }),
                (1700, FaultKind::OldDisk { node, down_ms }),
            ],
            takes: 2200,
            cost: 1,
            struck: false,
        });
        let mut seldom = vec![(
            format!("wrong names at {node}"),
            FaultKind::Misnamed { node, ms: 300 },
        )];
        let rots = [
            ("older superblock", Rot::Superblock),
            ("log", Rot::Log),
            ("bitmap", Rot::Bitmap),
            ("misdirected bitmap", Rot::BitmapMisdirected),
            ("undo", Rot::Undo),
        ];
        seldom.extend(rots.map(|(what, rot)| {
            (
                format!("rot of the {what} of {node}"),
                FaultKind::Rot { node, down_ms, rot },
            )
        }));
        all.extend(seldom.into_iter().map(|(name, kind)| Base {
            cost: 2,
            ..base(name, kind)
        }));
    }
    for from in 0..copies {
        for to in from + 1..copies {
            let cut = |ms| FaultKind::Cut {
                from,
                to,
                both: true,
                ms,
            };
            all.push(Base {
                struck: true,
                ..base(format!("cut of {from} and {to}"), cut(200))
            });
            all.push(base(format!("long cut of {from} and {to}"), cut(LATE)));
        }
    }
    all
}

/// Whether a strike at that point leads somewhere that others do not: a force where a copy is in the midst of being
/// filled, the rest everywhere.
pub(crate) fn strikes_at(point: usize) -> &'static [u8] {
    match TRIGGERS[point] {
        "resync-target" | "resync-complete" | "undo write" | "bitmap write" | "up-to-date" => {
            &[0, 1, 2]
        }
        // These tell of an end, or come all the time.
        "link-down" | "flush" | "established" | "primary" | "attached" | "sends Hello" => &[1],
        _ => &[0, 1],
    }
}

impl Step {
    pub fn cost(&self, bases: &[Base]) -> usize {
        bases[usize::from(self.base)].cost + usize::from(self.strike.is_some())
    }

    fn takes(&self, bases: &[Base]) -> u64 {
        let forced = self
            .strike
            .is_some_and(|at| STRIKES[usize::from(at.strike)] == Strike::ForcedAlone);
        let takes = bases[usize::from(self.base)].takes;
        takes + if forced { FORCED } else { 0 }
    }

    /// For people.
    pub fn describe(&self, bases: &[Base]) -> String {
        let name = &bases[usize::from(self.base)].name;
        match self.strike {
            None => name.clone(),
            Some(at) => format!(
                "{name}, struck by {:?} when {} comes to \"{}\"",
                STRIKES[usize::from(at.strike)],
                at.node,
                TRIGGERS[usize::from(at.point)]
            ),
        }
    }
}

/// As `--schedule` takes it: `7`, or `7@1.22.0` for base 7 with strike 0 when node 1 comes to point 22.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.base)?;
        match self.strike {
            Some(at) => write!(f, "@{}.{}.{}", at.node, at.point, at.strike),
            None => Ok(()),
        }
    }
}

/// A schedule as [`Step`]s print, with commas between them.
pub(crate) fn parse(text: &str, copies: usize) -> Result<Vec<Step>, String> {
    let bases = bases(copies).len();
    let step = |word: &str| {
        let (base, strike) = word
            .split_once('@')
            .map_or((word, None), |(b, s)| (b, Some(s)));
        let base: u16 = base.parse().ok().filter(|b| usize::from(*b) < bases)?;
        let Some(strike) = strike else {
            return Some(Step { base, strike: None });
        };
        let numbers: Vec<u8> = strike.split('.').filter_map(|n| n.parse().ok()).collect();
        let [node, point, strike] = *numbers.as_slice() else {
            return None;
        };
        let fits = usize::from(node) < copies
            && usize::from(point) < TRIGGERS.len()
            && usize::from(strike) < STRIKES.len();
        let at = At {
            node,
            point,
            strike,
        };
        fits.then_some(Step {
            base,
            strike: Some(at),
        })
    };
    text.split(',')
        .filter(|w| !w.is_empty())
        .map(|w| step(w).ok_or_else(|| format!("{w} is no step of a world of {copies} copies")))
        .collect()
}

/// The run of a schedule, and when its last step begins.
pub(crate) fn plan(shape: &Shape, bases: &[Base], schedule: &[Step], seed: u64) -> (Plan, u64) {
    let mut faults = Vec::new();
    let (mut at, mut last) = (BEGIN, BEGIN);
    for step in schedule {
        last = at;
        let base = &bases[usize::from(step.base)];
        // What strikes lies in wait before the step begins.
        if let Some(strike) = step.strike {
            let kind = FaultKind::Ambush {
                node: strike.node.into(),
                on: strike.point.into(),
                strike: STRIKES[usize::from(strike.strike)],
                delay_us: 0,
                ms: 100,
            };
            faults.push(Fault { at, kind });
        }
        faults.extend(base.faults.iter().map(|(ms, kind)| Fault {
            at: at + ms * MS,
            kind: *kind,
        }));
        at += step.takes(bases) * MS;
    }
    let copies = shape.modes.len();
    let plan = Plan {
        seed,
        copies,
        register: false,
        modes: shape.modes.to_vec(),
        policy: shape.policy,
        // Two volumes of two blocks.
        volumes: vec![16, 16],
        begin: vec![16, 16],
        tuning: Tuning {
            log_extents: 0,
            ..Tuning::default()
        },
        clients: 1,
        depth: 2,
        burst: 4,
        think: MS,
        pause: 60 * MS,
        hot_sectors: 16,
        latency: 300_000,
        duration: at,
        failover_ms: 50,
        drift: false,
        grain_shift: 12,
        extent_shift: 13,
        al_blocks: 8,
        undo_size: 64 << 10,
        disk_ns: 100_000,
        meta_factor: 1,
        flush_factor: 3,
        log_off_per_mille: if shape.log { 0 } else { 1000 },
        corrupt_per_million: 0,
        look_per_mille: 1000,
        refusals_pass: true,
        go_on: 300 * MS,
        quiet: 600 * MS,
        dropped_requests: BTreeSet::new(),
        faults,
    };
    (plan, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_reads_as_it_prints() {
        let text = "7,0@1.22.0,12@0.33.2";
        let schedule = parse(text, 2).expect("steps");
        let printed: Vec<String> = schedule.iter().map(Step::to_string).collect();
        assert_eq!(printed.join(","), text);
        for wrong in ["999", "x", "1@2.0.0", "1@0.99.0", "1@0.0.9", "1@0"] {
            assert!(parse(wrong, 2).is_err(), "{wrong}");
        }
    }
}
