//! An abstract world of two copies of two blocks, for the enumeration in `enumerate.rs`.
//!
//! It keeps what a copy has on its disk (with a volatile cache that a power cut may lose), what its metadata
//! says, and, beside all that, the truth: which write overwrote which, and what the application was told. It asks
//! [`decide`] and [`may_promote`] and carries out what they say, stopping at every point where a message may be lost.

mod lead;
mod life;
mod meet;

use super::build::pair;
use crate::handshake::*;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

pub const BLOCKS: usize = 2;
/// A write, by number: 0 is what `create` left. The number says which write it went over.
pub type Write = u8;
type PerBlock<T> = [T; BLOCKS];

/// The rule set that the two copies run under.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Setting {
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
}

/// How often each kind of bad luck may strike on one path.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    pub writes: u8,
    pub crashes: u8,
    pub clean_stops: u8,
    pub link_losses: u8,
    pub forces: u8,
    pub promotions: u8,
    pub replaced: u8,
    pub failed: u8,
    pub restored: u8,
}

/// What survives a power cut, apart from the blocks.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Meta {
    disk: u8,
    counter: u8,
    epoch: Epoch,
    state: CopyState,
    unclean: bool,
    /// Stopped uncleanly, and neither became a target nor came into a new generation since.
    unsettled: bool,
    was_primary: bool,
    rolled_back: bool,
    solo: bool,
    generations: Vec<Generation>,
    position: u8,
    target_of: GenerationId,
    target_source: u8,
    before: (GenerationId, u8),
    undo: Option<PerBlock<Option<Write>>>,
    in_sync: u8,
    version: u8,
    /// S shrank in this generation: no completion alone before a new one.
    needs_generation: bool,
    /// The copy outside S durably knows that it is outside: it will not promote itself unforced.
    peer_told: bool,
    bits: PerBlock<bool>,
    hot: PerBlock<bool>,
    base: GenerationId,
    full_copy: bool,
    known: bool,
    known_disk: u8,
    known_counter: u8,
    known_incarnation: u8,
    known_durable: (GenerationId, u8),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Node {
    up: bool,
    primary: bool,
    position: u8,
    incarnation: u8,
    blocks: PerBlock<Write>,
    /// What is under the volatile cache; equal to `blocks` where nothing is cached.
    durable: PerBlock<Write>,
    /// Lost in a power cut of this very machine, and not replaced since.
    lost: PerBlock<bool>,
    meta: Meta,
    backup: Option<Box<(Meta, PerBlock<Write>)>>,
    /// The application was told that this is written, on the line of writes this copy belongs to.
    owed: PerBlock<Write>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    Down,
    Mirroring,
    /// From the source; blocks already sent but not known to be flushed.
    Resync {
        source: usize,
        sent: PerBlock<bool>,
        becomes: u8,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    setting: Setting,
    nodes: [Node; 2],
    link: Link,
    /// For each write, the one it went over.
    over: Vec<Write>,
    generations: u8,
    incarnations: u8,
    disks: u8,
    /// A person insisted somewhere on this path: who is unreachable may have been replaced without knowing.
    forced: bool,
    pub left: Budget,
}

/// A decision made differently on purpose, to see that somebody notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// The row copies the other way round.
    Swap(Row),
    /// The row finds nothing to do.
    Skip(Row),
    /// The row copies everything from the copy in this slot instead of refusing or asking.
    Guess(Row, u8),
}

/// Where one transition leads, or the invariant it broke.
pub type Step = (String, Result<World, String>);

impl World {
    pub fn new(setting: Setting, left: Budget) -> World {
        let sync = setting.mode == Mode::Sync;
        let node = |slot: u8| Node {
            up: true,
            primary: slot == 0,
            position: 0,
            incarnation: slot,
            blocks: [0; BLOCKS],
            durable: [0; BLOCKS],
            lost: [false; BLOCKS],
            meta: Meta {
                disk: slot + 1,
                counter: 1,
                epoch: Epoch {
                    number: 1,
                    owner: 0,
                },
                state: CopyState::UpToDate,
                unclean: true,
                unsettled: false,
                was_primary: slot == 0,
                rolled_back: false,
                solo: false,
                generations: vec![
                    made(1, 0, 0, Epoch::NONE, GenerationCause::Created, 0),
                    made(
                        2,
                        1,
                        0,
                        Epoch {
                            number: 1,
                            owner: 0,
                        },
                        GenerationCause::Promotion,
                        0,
                    ),
                ],
                position: 0,
                target_of: GenerationId(0),
                target_source: 0xff,
                before: (GenerationId(0), 0),
                undo: None,
                in_sync: if sync { 0b11 } else { 0b01 },
                version: 1,
                needs_generation: false,
                peer_told: false,
                bits: [false; BLOCKS],
                hot: [false; BLOCKS],
                base: GenerationId(2),
                full_copy: false,
                known: true,
                known_disk: 2 - slot,
                known_counter: 1,
                known_incarnation: 1 - slot,
                known_durable: (GenerationId(2), 0),
            },
            backup: None,
            owed: [0; BLOCKS],
        };
        World {
            setting,
            nodes: [node(0), node(1)],
            link: Link::Mirroring,
            over: vec![0],
            generations: 2,
            incarnations: 2,
            disks: 2,
            forced: false,
            left,
        }
    }

    /// `later` went over `earlier`, directly or through others, or is it.
    fn includes(&self, mut later: Write, earlier: Write) -> bool {
        while later != earlier && later != 0 {
            later = self.over[usize::from(later)];
        }
        later == earlier
    }

    fn facts(&self, i: usize) -> Facts {
        let (mut f, b) = pair();
        if i == 1 {
            f = b;
        }
        let n = &self.nodes[i];
        let m = &n.meta;
        f.slot = Slot(i as u8);
        f.disk = Uuid(m.disk.into());
        f.volumes[0].disk = f.disk;
        f.attach_counter = m.counter.into();
        f.incarnation = Incarnation(n.incarnation.into());
        f.epoch = m.epoch;
        f.state = m.state;
        f.flags = CopyFlags {
            unclean: m.unclean,
            was_primary: m.was_primary,
            zeroed: false,
            rolled_back: m.rolled_back,
            undo_lost: m.undo.is_none(),
            solo: m.solo,
        };
        f.is_primary = n.primary;
        f.unclean_start = m.unsettled;
        f.mode = self.setting.mode;
        f.on_peer_loss = self.setting.on_peer_loss;
        f.generations = m.generations.clone();
        f.position = n.position.into();
        f.issued = f.position;
        f.target_of = m.target_of;
        f.target_source = m.target_source;
        f.before_resync = (m.before.0, m.before.1.into());
        f.undo_intact = m.undo.is_some();
        f.in_sync = SlotSet(m.in_sync);
        f.in_sync_version = m.version.into();
        let p = &mut f.about_peer;
        p.known = m.known;
        p.disk = Uuid(m.known_disk.into());
        p.attach_counter = m.known_counter.into();
        p.incarnation = Incarnation(m.known_incarnation.into());
        p.bitmap_base = m.base;
        p.bits = m.bits.iter().filter(|b| **b).count() as u64;
        p.bytes = p.bits * 4096;
        p.known_durable_generation = m.known_durable.0;
        p.known_durable_position = m.known_durable.1.into();
        p.full_copy = m.full_copy;
        f
    }

    /// Every transition that is possible here. `seen` hears of each decision.
    pub fn steps(
        &self,
        mutation: Option<Mutation>,
        seen: &mut dyn FnMut(Row, &Outcome),
    ) -> Vec<Step> {
        let mut steps = Vec::new();
        for i in 0..2 {
            self.node_steps(i, &mut steps);
        }
        if self.link == Link::Down {
            if self.nodes.iter().all(|n| n.up) {
                self.meet(mutation, seen, &mut steps);
            }
        } else {
            if self.left.link_losses > 0 {
                let mut w = self.clone();
                w.left.link_losses -= 1;
                w.link = Link::Down;
                steps.push(("the link is lost".into(), Ok(w)));
            }
            self.mirrored_flush(&mut steps);
        }
        self.resync_steps(&mut steps);
        for (what, result) in &mut steps {
            if let Ok(w) = result
                && let Some(broken) = w.broken()
            {
                *result = Err(format!("{what}: {broken}"));
            }
        }
        steps
    }

    /// The invariant that holds in every state.
    fn broken(&self) -> Option<String> {
        let [a, b] = &self.nodes;
        if self.link == Link::Mirroring
            && a.meta.state == CopyState::UpToDate
            && b.meta.state == CopyState::UpToDate
            && a.blocks != b.blocks
        {
            return Some(format!(
                "both copies are UpToDate and differ: {:?} and {:?}",
                a.blocks, b.blocks
            ));
        }
        None
    }
}

fn made(
    id: u64,
    parent: u64,
    fork: Position,
    epoch: Epoch,
    cause: GenerationCause,
    maker: u8,
) -> Generation {
    Generation {
        id: GenerationId(id),
        parent: GenerationId(parent),
        fork_position: fork,
        epoch,
        cause,
        maker,
    }
}
