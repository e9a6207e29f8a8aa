//! The world: machines, their clocks, and the queue of what happens next.

use crate::coverage::Coverage;
use crate::disk::{Disk, DiskOp};
use crate::network::{Frame, Network};
use crate::oracle::Oracle;
use crate::plan::{MS, Plan};
use crate::rng::Rng;
use holdfast_replicator_core::Core;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::CopyState;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::rc::Rc;

/// Block data: a stamp per sector.
pub type Stamps = Rc<Vec<u64>>;

/// What happens at a moment.
#[derive(Debug)]
pub(crate) enum Happening {
    /// Fault number so-and-so of the plan begins, or ends.
    Fault(usize),
    FaultOver(usize),
    FaultsOver,
    Start {
        node: usize,
        life: u64,
    },
    DiskDone {
        node: usize,
        disk_life: u64,
        key: u64,
    },
    Process {
        node: usize,
        life: u64,
        event: Box<Event>,
    },
    Tick {
        node: usize,
        life: u64,
    },
    EndBatch {
        node: usize,
        life: u64,
    },
    Dial(usize),
    LinkUp {
        connection: u64,
        end: usize,
    },
    Deliver {
        connection: u64,
        to: usize,
    },
    LinkDown {
        connection: u64,
        end: usize,
    },
    Client(usize),
    /// A client sends a write again whose answer it never got.
    Again {
        client: usize,
        write: crate::oracle::WriteId,
    },
    Manager,
    /// What a core asked of the cluster's register arrives there.
    Register {
        node: usize,
        life: u64,
        ask: crate::register::Ask,
        lost: bool,
    },
    /// A frame of a connection that is over: the shell had it in hand.
    Late {
        node: usize,
        peer: usize,
        life: u64,
        session: SessionId,
        frame: Box<Frame>,
    },
    /// The shell makes room for a larger volume once the disk is at rest; not after `until`.
    Room {
        node: usize,
        life: u64,
        volume: usize,
        size: u64,
        until: u64,
    },
    /// An ambush of the plan strikes; with `later`, its second half.
    Strike {
        fault: usize,
        later: bool,
    },
}

struct Queued {
    at: u64,
    sequence: u64,
    what: Happening,
}
impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

/// An operation the disk works on.
pub(crate) struct Pending {
    pub op: DiskOp,
    pub id: OpId,
    /// Of the process that gave it.
    pub life: u64,
    pub metadata: bool,
    /// Held by a hung disk.
    pub held: bool,
}

/// One machine.
pub(crate) struct Node {
    pub core: Option<Core>,
    /// Counts starts and ends of the process: what was meant for another life is dropped.
    pub life: u64,
    /// Counts power cuts and replaced disks: operations of another life are gone.
    pub disk_life: u64,
    pub disk: Disk,
    pub pending: BTreeMap<u64, Pending>,
    pub bufs: BTreeMap<u64, Stamps>,
    pub next_buf: u64,
    /// Volumes with a write of this machine on the way, for checks.
    pub wants: Vec<bool>,
    pub tick_at: u64,
    pub batch_open: bool,
    /// Sectors of its volumes.
    pub sizes: Vec<u64>,
    /// What came while its metadata is being moved.
    pub held: Option<Vec<Event>>,
    /// Not every copy may know yet how this one is written to, and since when all do.
    pub mode_changes: bool,
    pub mode_since: u64,
    /// What came while the process was stopped.
    pub frozen: Option<Vec<Event>>,
    pub down: bool,
    /// Not started again before this moment.
    pub rate_ppm: i64,
    pub clock: (u64, u64),
    pub slow: bool,
    pub hung: bool,
    pub fail_next: u32,
    /// Must get a new disk: the core gave this one up.
    pub broken_disk: bool,
    /// Runs under a configuration that names its volumes in the wrong order.
    pub misnamed: bool,
    /// Runs on a disk that was restored from an old image and has not met the others since.
    pub restored: bool,
    /// A person told it to give up its data, or gave it a new disk; until it holds data again.
    pub may_be_blank: bool,
    pub failed_once: bool,
    pub role: Role,
    pub suspended_by_operator: bool,
    pub admin: BTreeMap<u64, &'static str>,
    pub incarnation: u64,
    pub disk_number: u64,
    pub last_state: (u8, u8),
    /// What it was when it was last seen as a secondary, whether it read zero everywhere then, and whether it was rolled
    /// back since.
    pub secondary_state: (CopyState, bool),
    pub rolled_back: bool,
    /// Copies it met since it started, and when it last did.
    pub met: SlotSet,
    pub met_at: u64,
    /// An image of its disk, and which start it was made under.
    pub backup: Option<(Disk, u64)>,
    /// Its metadata rots before it starts again.
    pub rot: Option<crate::plan::Rot>,
    /// Something settled: the invariants are looked at after this batch.
    pub look_now: bool,
    /// Completions checked against the generations of its followers.
    pub generation_checks: (u64, u32),
}

/// A whole run.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    pub(crate) rng: Rng,
    pub(crate) disk_rng: Rng,
    pub(crate) nodes: Vec<Node>,
    pub(crate) network: Network,
    pub(crate) oracle: Oracle,
    pub(crate) clients: crate::clients::Clients,
    pub(crate) operators: crate::operators::Operators,
    pub(crate) coverage: Coverage,
    pub(crate) failure: Option<String>,
    pub(crate) tracing: bool,
    pub(crate) trace_all: bool,
    pub(crate) next_key: u64,
    pub(crate) next_admin: u64,
    pub(crate) faults_over: bool,
    pub(crate) finished: bool,
    /// A core said that it cannot go on.
    pub(crate) halted: bool,
    /// Of each volume's metadata.
    pub(crate) layouts: Vec<Layout>,
    /// Generations that a person's force began, of copies that came to serve.
    pub(crate) forced_seen: BTreeSet<GenerationId>,
    /// Ambushes of the plan that wait.
    pub(crate) waiting: Vec<usize>,
    /// Points that an ambush could wait for and that were reached since that moment: (node, place in `TRIGGERS`).
    pub(crate) points: BTreeSet<(usize, usize)>,
    pub(crate) points_from: u64,
    /// Sectors of each volume that a person was told are there.
    pub(crate) grown: Vec<u64>,
    /// Where the record is kept, if not by the copies themselves.
    pub(crate) register: Option<crate::register::Register>,
}

pub(crate) const SERVICE: Uuid = Uuid(0x1111_2222_3333_4444_5555_6666_7777_8888);

pub(crate) fn node_id(n: usize) -> Uuid {
    Uuid(0x1000 + n as u128)
}

impl World {
    /// The world of a plan, every machine off.
    #[must_use]
    pub fn new(plan: Plan) -> World {
        let seed = plan.seed;
        let copies = plan.copies;
        let mut clock_rng = Rng::stream(seed, 2);
        let nodes = (0..copies)
            .map(|_| Node {
                core: None,
                life: 0,
                disk_life: 0,
                disk: Disk::new(&plan.volumes),
                pending: BTreeMap::new(),
                bufs: BTreeMap::new(),
                next_buf: 1,
                wants: vec![false; copies],
                tick_at: u64::MAX,
                batch_open: false,
                sizes: plan.begin.clone(),
                held: None,
                mode_changes: false,
                mode_since: 0,
                frozen: None,
                down: true,
                rate_ppm: if plan.drift {
                    clock_rng.between(0, 100_000) as i64 - 50_000
                } else {
                    0
                },
                clock: (0, clock_rng.below(1 << 50) + MS),
                slow: false,
                hung: false,
                fail_next: 0,
                broken_disk: false,
                misnamed: false,
                restored: false,
                may_be_blank: true,
                failed_once: false,
                role: Role::Secondary,
                suspended_by_operator: false,
                admin: BTreeMap::new(),
                incarnation: 0,
                disk_number: 0,
                last_state: (255, 255),
                secondary_state: (CopyState::Blank, true),
                rolled_back: false,
                met: SlotSet::EMPTY,
                met_at: 0,
                backup: None,
                rot: None,
                look_now: false,
                generation_checks: (0, 0),
            })
            .collect();
        let mut world = World {
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            rng: Rng::stream(seed, 3),
            disk_rng: Rng::stream(seed, 4),
            nodes,
            network: Network::new(copies, Rng::stream(seed, 5)),
            oracle: Oracle::new(&plan.volumes, copies),
            clients: crate::clients::Clients::new(&plan),
            operators: crate::operators::Operators::default(),
            coverage: Coverage::default(),
            failure: None,
            tracing: false,
            trace_all: false,
            next_key: 0,
            next_admin: 1,
            faults_over: false,
            finished: false,
            halted: false,
            layouts: Vec::new(),
            forced_seen: BTreeSet::new(),
            waiting: Vec::new(),
            points: BTreeSet::new(),
            points_from: u64::MAX,
            grown: plan.begin.clone(),
            register: None,
            plan,
        };
        for node in 0..copies {
            // Behind the end of a volume is whatever was there before.
            for volume in 0..world.plan.volumes.len() {
                let (from, to) = (world.plan.begin[volume], world.plan.volumes[volume]);
                world.nodes[node]
                    .disk
                    .fill(volume, from, to, u64::MAX - node as u64);
            }
            world.create_disk(node, true);
            let delay = world.rng.below(200 * MS);
            world.nodes[node].down = false;
            world.at(delay, Happening::Start { node, life: 0 });
        }
        world.layouts = (0..world.plan.volumes.len())
            .filter_map(|volume| {
                let bytes = world.nodes[0].disk.meta_block(volume as u16, 0);
                let sb = holdfast_wire_format::superblock::decode(&bytes).ok()?;
                Layout::of(&sb).ok()
            })
            .collect();
        if world.plan.register {
            let bytes = world.nodes[0].disk.meta_block(0, 0);
            if let Ok(sb) = holdfast_wire_format::superblock::decode(&bytes) {
                let generation = sb.generations.last().map_or(GenerationId(0), |g| g.id);
                world.register = Some(crate::register::Register::new(
                    &world.plan,
                    generation,
                    sb.in_sync,
                ));
            }
        }
        for pair in 0..world.network.pairs() {
            world.after(MS, Happening::Dial(pair));
        }
        for fault in 0..world.plan.faults.len() {
            world.at(world.plan.faults[fault].at, Happening::Fault(fault));
        }
        for client in 0..world.plan.clients {
            world.after((client as u64 + 1) * MS, Happening::Client(client));
        }
        world.after(100 * MS, Happening::Manager);
        world.at(world.plan.duration, Happening::FaultsOver);
        world
    }

    /// Keeps a readable timeline of what happens.
    pub fn keep_trace(&mut self, everything: bool) {
        self.tracing = true;
        self.trace_all = everything;
    }

    // --- time ---

    pub(crate) fn at(&mut self, at: u64, what: Happening) {
        self.sequence += 1;
        self.queue.push(Reverse(Queued {
            at: at.max(self.now),
            sequence: self.sequence,
            what,
        }));
    }

    pub(crate) fn after(&mut self, delay: u64, what: Happening) {
        self.at(self.now.saturating_add(delay), what);
    }

    /// A machine's monotonic clock: drifts, and was set to anything at its start.
    pub(crate) fn local(&self, node: usize) -> Time {
        let node = &self.nodes[node];
        let passed = (self.now - node.clock.0) as i128;
        let local = passed + passed * i128::from(node.rate_ppm) / 1_000_000;
        Time(node.clock.1 + local as u64)
    }

    pub(crate) fn jump_clock(&mut self, node: usize, forward: u64) {
        let local = self.local(node).0;
        self.nodes[node].clock = (self.now, local + forward);
    }

    pub(crate) fn log(&mut self, line: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>12.3}ms {}\n", self.now as f64 / 1e6, line());
            crate::TRACE.with_borrow_mut(|trace| trace.push_str(&line));
        }
    }

    pub(crate) fn fail(&mut self, what: String) {
        self.log(|| format!("FAILURE: {what}"));
        self.failure.get_or_insert(what);
    }

    pub(crate) fn check(&mut self, result: Result<(), String>) {
        if let Err(what) = result {
            self.fail(what);
        }
    }

    /// Runs up to that moment, or to the first thing that is wrong.
    pub(crate) fn run_until(&mut self, at: u64) -> Result<(), String> {
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= at) && !self.finished {
            self.next()?;
        }
        Ok(())
    }

    /// Runs to the end, or to the first thing that is wrong.
    pub fn run(&mut self) -> Result<(), String> {
        while !self.queue.is_empty() && !self.finished {
            self.next()?;
        }
        self.coverage.virtual_ns += self.now;
        Ok(())
    }

    fn next(&mut self) -> Result<(), String> {
        if let Some(Reverse(next)) = self.queue.pop() {
            self.now = next.at;
            self.coverage.steps += 1;
            self.happen(next.what);
        }
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Fault(fault) => self.fault(fault),
            Happening::FaultOver(fault) => self.fault_over(fault),
            Happening::FaultsOver => self.end_faults(),
            Happening::Start { node, life } => self.start(node, life),
            Happening::DiskDone {
                node,
                disk_life,
                key,
            } => self.disk_done(node, disk_life, key),
            Happening::Process { node, life, event } => {
                if self.nodes[node].life == life {
                    self.event(node, *event);
                }
            }
            Happening::Tick { node, life } => {
                if self.nodes[node].life == life {
                    self.nodes[node].tick_at = u64::MAX;
                    self.event(node, Event::Tick);
                }
            }
            Happening::EndBatch { node, life } => {
                let n = &self.nodes[node];
                if n.life == life && n.frozen.is_none() && n.held.is_none() {
                    self.end_batch(node);
                }
            }
            Happening::Dial(pair) => self.dial(pair),
            Happening::LinkUp { connection, end } => self.link_up(connection, end),
            Happening::Deliver { connection, to } => self.deliver(connection, to),
            Happening::LinkDown { connection, end } => self.link_down(connection, end),
            Happening::Client(client) => self.client_turn(client),
            Happening::Again { client, write } => self.client_again(client, write),
            Happening::Late {
                node,
                peer,
                life,
                session,
                frame,
            } => {
                if self.nodes[node].life == life {
                    self.coverage.count("faults", "frame of an old connection");
                    self.arrived(node, peer, session, *frame);
                }
            }
            Happening::Manager => self.manager_turn(),
            Happening::Register {
                node,
                life,
                ask,
                lost,
            } => self.register_asked(node, life, ask, lost),
            Happening::Room {
                node,
                life,
                volume,
                size,
                until,
            } => {
                if self.nodes[node].life == life {
                    self.make_room(node, volume, size, until);
                }
            }
            Happening::Strike { fault, later } => self.strike(fault, later),
        }
    }
}

/// Frames and events held back in order.
pub(crate) type Backlog<T> = VecDeque<T>;
