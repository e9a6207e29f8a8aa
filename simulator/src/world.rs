//! The world: machines, their clocks, the queue of what happens next, and the carrying out of what cores ask for.

use crate::coverage::Coverage;
use crate::disk::{Disk, DiskOp, SECTOR, meta_sectors, stamp_bytes};
use crate::network::{Frame, Network};
use crate::oracle::Oracle;
use crate::plan::{MS, Plan};
use crate::rng::Rng;
use holdfast_replicator_core::Core;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::frame::{Body, FrameHeader, FrameKind};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::{CopyState, GenerationCause};
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
    next_key: u64,
    next_admin: u64,
    pub(crate) faults_over: bool,
    pub(crate) finished: bool,
    /// A core said that it cannot go on.
    pub(crate) halted: bool,
    /// Of each volume's metadata.
    pub(crate) layouts: Vec<Layout>,
    /// Generations that a person's force began, of copies that came to serve.
    forced_seen: BTreeSet<GenerationId>,
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

    // --- processes ---

    pub(crate) fn peer_parameters(&self, n: usize) -> Vec<PeerParameters> {
        (0..self.plan.modes.len())
            .filter(|m| *m != n)
            .map(|m| PeerParameters {
                slot: Slot(m as u8),
                node: node_id(m),
                mode: self.plan.pair_mode(n, m),
            })
            .collect()
    }

    /// New metadata on a machine's disk.
    pub(crate) fn create_disk(&mut self, node: usize, zeroed: bool) {
        use holdfast_replicator_core::{CreateParameters, CreateVolume, create};
        use holdfast_wire_format::metadata::Mode;
        let modes = &self.plan.modes;
        let in_sync = (0..modes.len())
            .filter(|n| modes[*n] != Mode::Async)
            .fold(SlotSet::EMPTY, |set, n| set.with(Slot(n as u8)));
        let number = self.nodes[node].disk_number;
        let parameters = CreateParameters {
            service: SERVICE,
            service_name: "simulated".into(),
            slot: Slot(node as u8),
            node: node_id(node),
            mode: self.plan.modes[0],
            on_peer_loss: self.plan.policy,
            seed: Rng::stream(self.plan.seed, 1000 + node as u64 * 100 + number).next(),
            in_sync,
            peers: self.peer_parameters(node),
            volumes: self
                .largest()
                .iter()
                .enumerate()
                .map(|(i, sectors)| CreateVolume {
                    index: VolumeIndex(i as u16),
                    volume: Uuid(0xabc0 + i as u128),
                    name: format!("v{i}"),
                    data_size: sectors * SECTOR,
                    sector_size: SECTOR as u32,
                    grain_shift: Some(self.plan.grain_shift),
                    al_blocks: self.plan.al_blocks,
                    undo_size: self.plan.undo_size,
                    zeroed,
                })
                .collect(),
        };
        match create(&parameters) {
            Ok(images) => {
                for (place, mut bytes) in images {
                    self.shrink_extents(place.offset, &mut bytes);
                    self.nodes[node]
                        .disk
                        .put_meta(place.volume.0, place.offset, &bytes);
                }
            }
            Err(error) => self.fail(format!("create: {error}")),
        }
    }

    /// Volumes here are small: so are extents, or the activity log would always name everything.
    fn shrink_extents(&self, offset: u64, bytes: &mut [u8]) {
        use holdfast_wire_format::superblock;
        if offset > 4096 {
            return;
        }
        let Ok(block) = <&[u8; 4096]>::try_from(&*bytes) else {
            return;
        };
        if let Ok(mut sb) = superblock::decode(block) {
            sb.extent_shift = self.plan.extent_shift;
            if let Ok(image) = superblock::encode(&sb) {
                bytes.copy_from_slice(&image);
            }
        }
    }

    fn start(&mut self, node: usize, life: u64) {
        let n = &mut self.nodes[node];
        if n.life != life || n.core.is_some() || n.down {
            return;
        }
        if !n.pending.is_empty() {
            // The lock is free once nothing of the old process can land any more.
            return self.after(5 * MS, Happening::Start { node, life });
        }
        n.life += 1;
        n.incarnation += 1;
        n.role = Role::Secondary;
        n.admin.clear();
        n.bufs.clear();
        n.frozen = None;
        n.held = None;
        n.tick_at = u64::MAX;
        n.batch_open = false;
        n.suspended_by_operator = false;
        n.wants.fill(false);
        n.met = SlotSet::EMPTY;
        if let Some(rot) = self.nodes[node].rot.take() {
            self.rot(node, rot);
        }
        let mut tuning = self.plan.tuning;
        if self.plan.log_off_per_mille > 0 && self.rng.chance(self.plan.log_off_per_mille) {
            tuning.activity_log = false;
            self.coverage
                .count("faults", "started without an activity log");
        }
        let n = &self.nodes[node];
        let incarnation = (node as u64 + 1) << 32 | n.incarnation;
        let parameters = AttachParameters {
            volumes: self
                .plan
                .volumes
                .iter()
                .enumerate()
                .map(|(i, sectors)| AttachVolume {
                    index: VolumeIndex(i as u16),
                    name: {
                        let last = self.plan.volumes.len() - 1;
                        format!("volume-{}", if n.misnamed { last - i } else { i })
                    },
                    device_data_size: sectors * SECTOR,
                    sector_size: SECTOR as u32,
                    discard_zeroes: true,
                })
                .collect(),
            peers: self.peer_parameters(node),
            slot: Slot(node as u8),
            node: node_id(node),
            service: SERVICE,
            incarnation: Incarnation(incarnation),
            seed: Rng::stream(self.plan.seed, incarnation).next(),
            tuning,
            store: if self.plan.register {
                StoreKind::Cluster
            } else {
                StoreKind::Own
            },
        };
        let now = self.local(node);
        let mut out = Vec::new();
        match Core::attach(parameters, &mut &self.nodes[node].disk, now, &mut out) {
            Ok(core) => {
                self.log(|| format!("node {node}: starts"));
                let volumes = core.status(now).volumes;
                self.nodes[node].sizes = volumes.iter().map(|v| v.size / SECTOR).collect();
                self.nodes[node].core = Some(core);
                self.actions(node, out);
                self.after_core(node);
            }
            Err(error) => self.fail(format!("node {node} cannot attach: {error}")),
        }
    }

    /// The process ends, without a word.
    pub(crate) fn end_process(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.life += 1;
        n.core = None;
        n.bufs.clear();
        n.frozen = None;
        n.held = None;
        n.admin.clear();
        n.role = Role::Secondary;
        self.clients_lost(node);
        self.connections_of_dead(node);
    }

    pub(crate) fn event(&mut self, node: usize, event: Event) {
        let now = self.local(node);
        let n = &mut self.nodes[node];
        if let Some(backlog) = &mut n.frozen {
            return backlog.push(event);
        }
        if let Some(backlog) = &mut n.held
            && !matches!(event, Event::DiskDone { .. } | Event::MetaDone { .. })
        {
            return backlog.push(event);
        }
        let Some(core) = &mut n.core else { return };
        let probe = core.probe();
        if probe.role == Role::Secondary {
            n.secondary_state = (probe.state, probe.zeroed);
            n.rolled_back = false;
        }
        let mut out = Vec::new();
        core.handle(now, event, &mut out);
        self.actions(node, out);
        if self.nodes[node].batch_open {
            return;
        }
        if self.rng.chance(200) {
            // More events may come before the batch ends.
            self.nodes[node].batch_open = true;
            let life = self.nodes[node].life;
            let delay = self.rng.below(30_000);
            self.after(delay, Happening::EndBatch { node, life });
        } else {
            self.end_batch(node);
        }
    }

    pub(crate) fn end_batch(&mut self, node: usize) {
        let now = self.local(node);
        let n = &mut self.nodes[node];
        n.batch_open = false;
        let Some(core) = &mut n.core else { return };
        let mut out = Vec::new();
        core.end_batch(now, &mut out);
        self.actions(node, out);
        self.after_core(node);
    }

    /// What is looked at after each batch: the next deadline, states for coverage, invariants.
    fn after_core(&mut self, node: usize) {
        let Some(core) = &self.nodes[node].core else {
            return;
        };
        let probe = core.probe();
        if let Some(deadline) = core.deadline() {
            let local = self.local(node);
            let rate = 1_000_000 + self.nodes[node].rate_ppm;
            let wait =
                i128::from(deadline.0.saturating_sub(local.0)) * 1_000_000 / i128::from(rate);
            let at = self.now + wait as u64 + 1;
            if at < self.nodes[node].tick_at {
                self.nodes[node].tick_at = at;
                let life = self.nodes[node].life;
                self.at(at, Happening::Tick { node, life });
            }
        }
        if probe.role == Role::Detached && self.nodes[node].core.is_some() {
            self.log(|| format!("node {node}: detached, process ends"));
            if probe.failed {
                // Nothing of this was in order: what its disk still had to do nobody knows.
                self.oracle.killed(self.now, node);
            }
            self.end_process(node);
            return;
        }
        if probe.failed {
            self.nodes[node].broken_disk = true;
            self.nodes[node].failed_once = true;
        }
        if probe.role == Role::Primary {
            self.oracle
                .held_by(node, probe.in_sync.union(probe.required));
        }
        // (An old image says so, too, of what it held once.)
        if matches!(probe.state, CopyState::UpToDate | CopyState::Complete)
            && probe.role == Role::Secondary
            && !self.nodes[node].restored
        {
            self.oracle.filled_again(node);
        }
        let before = self.nodes[node].last_state.0;
        // (What a failed disk did not take down never was: it may have been blank all the time.)
        if probe.state == CopyState::Blank && before != 255 && !probe.zeroed {
            if !self.nodes[node].may_be_blank && !self.nodes[node].failed_once {
                return self.fail(format!(
                    "node {node} gave up its data and nobody told it to"
                ));
            }
            if before != CopyState::Blank as u8 {
                self.oracle.given_up(self.now, node, self.mixtures());
            }
        } else if probe.state != CopyState::Blank
            && self.nodes[node].admin.is_empty()
            && self.nodes[node].may_be_blank
        {
            // A state that is not on the disk yet is gone with the power.
            let durable = self.nodes[node].disk.superblock();
            self.nodes[node].may_be_blank =
                durable.is_none_or(|(_, sb)| sb.state == CopyState::Blank);
        }
        let state = (probe.state as u8, probe.role as u8);
        if state != self.nodes[node].last_state {
            self.coverage
                .transition(self.nodes[node].last_state, &probe);
            self.nodes[node].last_state = state;
        }
        self.look(node);
    }

    // --- actions ---

    fn actions(&mut self, node: usize, actions: Vec<Action>) {
        for action in actions {
            if self.trace_all {
                self.log(|| {
                    let mut text = format!("{action:?}");
                    text.truncate(300);
                    format!("  node {node}: {text}")
                });
            }
            self.action(node, action);
        }
    }

    fn buf(&mut self, node: usize, buf: BufId) -> Stamps {
        match self.nodes[node].bufs.get(&buf.0) {
            Some(stamps) => stamps.clone(),
            None => {
                self.fail(format!(
                    "node {node} names buffer {buf:?} that it does not have"
                ));
                Rc::new(Vec::new())
            }
        }
    }

    fn process_event(&mut self, node: usize, delay: u64, event: Event) {
        let life = self.nodes[node].life;
        let event = Box::new(event);
        self.after(delay, Happening::Process { node, life, event });
    }

    fn action(&mut self, node: usize, action: Action) {
        match action {
            Action::AllocBuf { buf, length } => {
                let stamps = Rc::new(vec![
                    0xdead_0000_0000;
                    (u64::from(length) / SECTOR) as usize
                ]);
                if self.nodes[node].bufs.insert(buf.0, stamps).is_some() {
                    self.fail(format!("node {node} takes buffer {buf:?} twice"));
                }
            }
            Action::ReleaseBuf { buf } => {
                if self.nodes[node].bufs.remove(&buf.0).is_none() {
                    self.fail(format!("node {node} releases buffer {buf:?} twice"));
                }
            }
            Action::DiskRead {
                op,
                volume,
                offset,
                length,
                buf,
            } => {
                let disk_op = DiskOp::Read {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    count: u64::from(length) / SECTOR,
                    buf,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskWrite {
                op,
                volume,
                offset,
                length,
                buf,
                fua,
            } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                if stamps.len() < count {
                    return self.fail(format!("node {node} writes more than {buf:?} holds"));
                }
                let disk_op = DiskOp::Write {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    values: stamps[..count].to_vec(),
                    fua,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskZero {
                op,
                volume,
                offset,
                length,
                fua,
                ..
            } => {
                let disk_op = DiskOp::Write {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    values: vec![0; (length / SECTOR) as usize],
                    fua,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskFlush { op, volume } => {
                let disk_op = DiskOp::Flush {
                    volume: volume.0 as usize,
                    through: self.nodes[node].disk.landed(),
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::MetaWrite { op, place, bytes } => {
                let disk_op = DiskOp::MetaWrite {
                    volume: place.volume.0,
                    offset: place.offset,
                    sectors: meta_sectors(&bytes),
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::MetaWriteBuf {
                op,
                place,
                buf,
                length,
            } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let disk_op = DiskOp::MetaWrite {
                    volume: place.volume.0,
                    offset: place.offset,
                    sectors: stamps[..count]
                        .iter()
                        .map(|s| crate::disk::MetaSector::Stamp(*s))
                        .collect(),
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::MetaReadBuf {
                op,
                place,
                buf,
                length,
            } => {
                let disk_op = DiskOp::MetaRead {
                    volume: place.volume.0,
                    offset: place.offset,
                    count: u64::from(length) / SECTOR,
                    buf,
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::CopyBuf { from, to, length } => {
                let stamps = self.buf(node, from);
                let count = (u64::from(length) / SECTOR) as usize;
                if let Some(target) = self.nodes[node].bufs.get_mut(&to.0) {
                    Rc::make_mut(target)[..count].copy_from_slice(&stamps[..count]);
                }
            }
            Action::Hash { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let digest = stamps[..count].iter().fold(7u128, |h, s| {
                    (h ^ u128::from(*s)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
                });
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::HashDone { op, digest });
            }
            Action::Crc { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let mut hasher = crc32fast::Hasher::new();
                for stamp in &stamps[..count] {
                    hasher.update(&stamp_bytes(*stamp));
                }
                let crc = hasher.finalize();
                let zero = stamps[..count].iter().all(|s| *s == 0);
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::CrcDone { op, crc, zero });
            }
            Action::IsZero { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let zero = stamps[..count].iter().all(|s| *s == 0);
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::ZeroCheck { op, zero });
            }
            Action::SurplusBegin { .. } => {}
            Action::SurplusWrite { op, .. } | Action::SurplusEnd { op, .. } => {
                let result = if self.rng.chance(20) {
                    Err("the state directory is full".to_owned())
                } else {
                    Ok("the simulator's memory".to_owned())
                };
                let delay = self.rng.below(200_000);
                self.process_event(node, delay, Event::SurplusDone { op, result });
            }
            Action::StoreRead { id } => {
                self.ask_register(node, crate::register::Ask::Read(id));
            }
            Action::StoreSwap {
                id,
                expected,
                record,
            } => {
                self.ask_register(node, crate::register::Ask::Swap(id, expected, record));
            }
            Action::Send {
                peer,
                session,
                header,
                payload,
            } => self.send(node, peer, session, header, payload),
            Action::Connect { peer } => {
                self.nodes[node].wants[peer.0 as usize] = true;
            }
            Action::Close {
                peer,
                session,
                code,
                text,
                reconnect,
            } => {
                if !reconnect {
                    self.nodes[node].wants[peer.0 as usize] = false;
                }
                self.coverage.count("goodbye", &format!("{code:?}"));
                self.close(node, peer.0 as usize, session, code, text);
            }
            Action::Complete { request, status } => self.completed(node, request, status),
            Action::Granted { request } => self.granted(node, request),
            Action::RoleChanged { role, epoch } => self.role_changed(node, role, epoch),
            Action::Resized { volume, size } => {
                self.nodes[node].sizes[volume.0 as usize] = size / SECTOR;
            }
            Action::MakeRoom { volume, size } => self.room_wanted(node, volume.0 as usize, size),
            Action::AdminDone { admin, result } => {
                let Some(what) = self.nodes[node].admin.remove(&admin.0) else {
                    return self.fail(format!("node {node} answers admin request {admin:?} twice"));
                };
                self.log(|| match &result {
                    Ok(text) => format!("node {node}: {what}: ok: {text}"),
                    Err(refusal) => format!("node {node}: {what}: refused: {refusal}"),
                });
                let how = if result.is_ok() { "ok" } else { "refused" };
                self.coverage.count("orders", &format!("{what} {how}"));
                self.order_answered(node, what, &result);
            }
            Action::Notice(notice) => {
                self.log(|| {
                    let peer = notice.peer.map_or(String::new(), |p| format!(" ({})", p.0));
                    format!("node {node}: {}{peer}: {}", notice.kind, notice.text)
                });
                if notice.kind == "handshake" {
                    let row = notice.text.split(':').next().unwrap_or_default().to_owned();
                    self.coverage.count("rows", &row);
                    let outcome = format!("{row}: {}", outcome_in(&notice.text));
                    self.coverage.count("outcomes", &outcome);
                } else {
                    self.coverage.count("notices", notice.kind);
                }
                self.noticed(node, &notice);
            }
            Action::Halt { reason } => {
                self.halted = true;
                self.fail(format!("node {node} halts: {reason}"));
            }
        }
    }

    pub(crate) fn order(&mut self, node: usize, what: &'static str, command: Command) {
        if self.nodes[node].core.is_none() {
            return;
        }
        let admin = self.next_admin;
        self.next_admin += 1;
        self.nodes[node].admin.insert(admin, what);
        let admin = AdminId(admin);
        self.log(|| format!("operator: {what} at node {node}"));
        if matches!(
            command,
            Command::Invalidate | Command::ResolveSplitBrain { .. }
        ) {
            self.nodes[node].may_be_blank = true;
        }
        self.event(node, Event::Admin { admin, command });
    }

    fn role_changed(&mut self, node: usize, role: Role, epoch: Epoch) {
        self.nodes[node].role = role;
        self.log(|| format!("node {node}: role {role:?} epoch {}", epoch.number));
        if role != Role::Primary {
            return;
        }
        let Some(core) = &self.nodes[node].core else {
            return;
        };
        let probe = core.probe();
        let view = self.nodes[node].all();
        // A copy may have been forced and have ended before it served: then it goes on from what it was forced to.
        let before = self.forced_seen.len();
        let durable = self.nodes[node].disk.superblock();
        for generation in durable.iter().flat_map(|(_, sb)| &sb.generations) {
            if generation.cause == GenerationCause::Force {
                self.forced_seen.insert(generation.id);
            }
        }
        let forced = probe.forced || self.nodes[node].restored || self.forced_seen.len() > before;
        let result = self.may_serve(node, probe.forced);
        self.check(result);
        let result = self.large_enough(node, forced);
        self.check(result);
        let result =
            self.oracle
                .promoted(self.now, node, forced, epoch.number, probe.in_sync, view);
        self.coverage
            .count("promotions", if forced { "forced" } else { "unforced" });
        self.check(result);
    }

    // --- disks ---

    fn give_disk(&mut self, node: usize, id: OpId, op: DiskOp, metadata: bool) {
        let kind = match &op {
            DiskOp::Read { .. } => 0,
            DiskOp::Write { .. } => 1,
            DiskOp::Flush { .. } => 2,
            DiskOp::MetaWrite { .. } => 3,
            DiskOp::MetaRead { .. } => 4,
        };
        self.coverage.disk_ops[kind] += 1;
        let key = self.next_key;
        self.next_key += 1;
        let base = self.plan.disk_ns;
        let mut delay = base / 2 + self.disk_rng.below(base + 1);
        if kind == 2 {
            delay *= self.plan.flush_factor;
            self.ambushes(node, "flush");
        }
        if let DiskOp::MetaWrite { volume, offset, .. } = &op {
            delay *= self.plan.meta_factor;
            let what = self.region(*volume, *offset);
            self.ambushes(node, what);
        }
        if self.disk_rng.chance(20) {
            delay *= 20;
        }
        if self.nodes[node].slow {
            delay *= 30;
        }
        let n = &mut self.nodes[node];
        let life = n.life;
        let held = n.hung;
        n.pending.insert(
            key,
            Pending {
                op,
                id,
                life,
                metadata,
                held,
            },
        );
        if !held {
            let disk_life = n.disk_life;
            self.after(
                delay,
                Happening::DiskDone {
                    node,
                    disk_life,
                    key,
                },
            );
        }
    }

    /// A hung disk goes on.
    pub(crate) fn release_disk(&mut self, node: usize) {
        self.nodes[node].hung = false;
        let disk_life = self.nodes[node].disk_life;
        let held: Vec<u64> = self.nodes[node]
            .pending
            .iter_mut()
            .filter_map(|(key, p)| std::mem::take(&mut p.held).then_some(*key))
            .collect();
        for key in held {
            let delay = self.disk_rng.below(self.plan.disk_ns + 1);
            self.after(
                delay,
                Happening::DiskDone {
                    node,
                    disk_life,
                    key,
                },
            );
        }
    }

    fn disk_done(&mut self, node: usize, disk_life: u64, key: u64) {
        let n = &mut self.nodes[node];
        if n.disk_life != disk_life {
            return;
        }
        if n.hung {
            if let Some(pending) = n.pending.get_mut(&key) {
                pending.held = true;
            }
            return;
        }
        let Some(pending) = n.pending.remove(&key) else {
            return;
        };
        let alive = pending.life == n.life;
        let failed = n.fail_next > 0 && alive;
        if failed {
            n.fail_next -= 1;
            let mut rng = self.disk_rng.clone();
            let torn = n.disk.land_partly(&pending.op, &mut rng);
            self.disk_rng = rng;
            self.coverage.count("disk errors", "EIO");
            self.count_torn(u64::from(torn));
            self.log(|| format!("node {node}: disk error on {}", describe(&pending.op)));
        } else {
            n.disk.land(&pending.op);
            // A read returns what is there when it ends.
            match &pending.op {
                DiskOp::Read {
                    volume,
                    first,
                    count,
                    buf,
                } if alive => {
                    let (from, to) = (*first as usize, (first + count) as usize);
                    if let Some(target) = n.bufs.get_mut(&buf.0) {
                        let target = Rc::make_mut(target);
                        target[..to - from].copy_from_slice(&n.disk.view(*volume)[from..to]);
                    }
                }
                DiskOp::MetaRead {
                    volume,
                    offset,
                    count,
                    buf,
                } if alive => {
                    let stamps = n.disk.meta_stamps(*volume, *offset, *count);
                    if let Some(target) = n.bufs.get_mut(&buf.0) {
                        Rc::make_mut(target)[..stamps.len()].copy_from_slice(&stamps);
                    }
                }
                _ => {}
            }
        }
        if !alive {
            return;
        }
        let result = if failed { Err(DiskError::Io) } else { Ok(()) };
        let op = pending.id;
        let event = if pending.metadata {
            Event::MetaDone { op, result }
        } else {
            Event::DiskDone { op, result }
        };
        self.event(node, event);
    }

    /// The machine loses power.
    pub(crate) fn cut_power(&mut self, node: usize) {
        let mut rng = self.disk_rng.clone();
        let n = &mut self.nodes[node];
        n.disk_life += 1;
        n.hung = false;
        let mut torn = 0;
        for (_, pending) in std::mem::take(&mut n.pending) {
            torn += u64::from(n.disk.land_partly(&pending.op, &mut rng));
        }
        let lost = n.disk.power_cut(&mut rng);
        self.disk_rng = rng;
        self.count_torn(torn);
        self.coverage.lost_sectors += lost;
        self.coverage.power_cuts += 1;
        self.log(|| format!("node {node}: power is cut, {lost} sectors go back in time"));
        self.loses_memory(node);
        self.end_process(node);
    }

    /// What this copy had not made durable is gone; and with it from every copy that it is to fill: it durably became a target, and
    /// takes whatever this one still has.
    fn loses_memory(&mut self, node: usize) {
        self.oracle.lost_power(self.now, node);
        for other in (0..self.nodes.len()).filter(|n| *n != node) {
            let durable = self.nodes[other].disk.superblock();
            if durable.is_some_and(|(_, sb)| {
                sb.target_of != GenerationId(0) && usize::from(sb.target_source) == node
            }) {
                self.oracle.lost_power(self.now, other);
            }
        }
    }

    fn count_torn(&mut self, torn: u64) {
        for _ in 0..torn {
            self.coverage.count("faults", "torn metadata write");
        }
    }

    /// What a block of metadata is part of.
    pub(crate) fn region(&self, volume: u16, offset: u64) -> &'static str {
        let Some(layout) = self.layouts.get(volume as usize) else {
            return "";
        };
        let log_end = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
        if offset < layout.activity_log_offset {
            "superblock write"
        } else if offset < log_end {
            "log write"
        } else if offset < layout.undo_offset {
            "bitmap write"
        } else {
            "undo write"
        }
    }

    /// A block of metadata of a stopped copy is not what was written.
    fn rot(&mut self, node: usize, rot: crate::plan::Rot) {
        use crate::plan::Rot;
        let mut rng = self.disk_rng.clone();
        let layout = self.layouts[0];
        let log_end = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
        let volume = rng.index(self.layouts.len()) as u16;
        let disk = &mut self.nodes[node].disk;
        let bitmaps = |disk: &Disk, layouts: &[Layout]| {
            let layout = &layouts[volume as usize];
            let from = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
            disk.meta_blocks(volume, from, layout.undo_offset)
        };
        let block = match rot {
            // The newer slot is what a single good one is: nothing can replace it.
            Rot::Superblock => disk.superblock().map(|(at, _)| (0, 4096 - at)),
            Rot::Log => {
                // A damaged newest block looks like one whose write was cut.
                let blocks = disk.meta_blocks(0, layout.activity_log_offset, log_end);
                let sequence = |b: &(u16, u64)| {
                    holdfast_wire_format::activity_log::decode(&disk.meta_block(b.0, b.1))
                        .map_or(0, |b| b.sequence)
                };
                let newest = blocks.iter().map(sequence).max().unwrap_or(0);
                let others: Vec<_> = blocks
                    .into_iter()
                    .filter(|b| sequence(b) < newest)
                    .collect();
                (!others.is_empty()).then(|| others[rng.index(others.len())])
            }
            Rot::Bitmap | Rot::BitmapMisdirected => {
                let blocks = bitmaps(disk, &self.layouts);
                (!blocks.is_empty()).then(|| blocks[rng.index(blocks.len())])
            }
            Rot::Undo => {
                let blocks = disk.meta_blocks(0, layout.undo_offset, u64::MAX);
                (!blocks.is_empty()).then(|| blocks[rng.index(blocks.len())])
            }
        };
        if let Some(block) = block {
            if rot == Rot::BitmapMisdirected {
                let blocks = bitmaps(disk, &self.layouts);
                let from = blocks[rng.index(blocks.len())];
                disk.misdirect(from, block);
            } else {
                disk.flip(block, &mut rng);
            }
            self.coverage.count("rot", &format!("{rot:?}"));
            self.log(|| format!("node {node}: {rot:?} at {block:?} is not what was written"));
        }
        self.disk_rng = rng;
    }

    pub(crate) fn kill(&mut self, node: usize) {
        self.log(|| format!("node {node}: SIGKILL"));
        if !self.waits_for_disk(node, u64::MAX) {
            // What it had acknowledged from memory is gone.
            self.loses_memory(node);
        } else {
            self.oracle.killed(self.now, node);
        }
        self.end_process(node);
    }

    pub(crate) fn restart(&mut self, node: usize, delay: u64) {
        self.nodes[node].down = false;
        let life = self.nodes[node].life;
        self.after(delay, Happening::Start { node, life });
    }

    pub(crate) fn freeze(&mut self, node: usize) {
        if self.nodes[node].core.is_some() && self.nodes[node].frozen.is_none() {
            self.log(|| format!("node {node}: frozen"));
            self.nodes[node].frozen = Some(Vec::new());
        }
    }

    pub(crate) fn thaw(&mut self, node: usize) {
        if let Some(backlog) = self.nodes[node].frozen.take() {
            self.log(|| format!("node {node}: goes on with {} events", backlog.len()));
            let life = self.nodes[node].life;
            for event in backlog {
                if self.nodes[node].life == life {
                    self.event(node, event);
                }
            }
            if self.nodes[node].life == life {
                self.nodes[node].tick_at = u64::MAX;
                self.event(node, Event::Tick);
                self.end_batch(node);
            }
        }
    }

    /// A frame arrives at a live process.
    pub(crate) fn arrived(&mut self, node: usize, from: usize, session: SessionId, frame: Frame) {
        let peer = Slot(from as u8);
        if let Some(data) = frame.data {
            let buf = BufId(self.nodes[node].next_buf);
            self.nodes[node].next_buf += 1;
            self.nodes[node].bufs.insert(buf.0, data);
            let header = frame.header;
            self.event(
                node,
                Event::Data {
                    peer,
                    session,
                    header,
                    buf,
                },
            );
        } else {
            self.event(
                node,
                Event::Control {
                    peer,
                    session,
                    header: frame.header,
                    body: frame.body,
                },
            );
        }
    }

    fn send(
        &mut self,
        node: usize,
        peer: Slot,
        session: SessionId,
        mut header: FrameHeader,
        payload: Payload,
    ) {
        let (body, data) = match payload {
            Payload::None => (Body::Empty, None),
            Payload::Body(body) => (body, None),
            Payload::Buf { buf, .. } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(header.length) / SECTOR) as usize;
                header.payload_length = header.length;
                let data = if stamps.len() == count {
                    stamps
                } else {
                    Rc::new(stamps[..count].to_vec())
                };
                (Body::Empty, Some(data))
            }
        };
        if matches!(
            header.kind,
            FrameKind::Write | FrameKind::Zero | FrameKind::Flush
        ) && header.position > 0
        {
            // D17: one name, one content.
            let place = u64::from(header.volume.0) << 48 | header.offset;
            let content = data.as_ref().map_or(u64::from(header.length), |d| {
                d.iter().fold(header.length.into(), |h: u64, s| {
                    (h ^ s).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                })
            });
            let result = self
                .oracle
                .named(header.generation.0, header.position, place, content);
            self.check(result);
        }
        self.coverage.frames[header.kind as usize & 127] += 1;
        let kind = header.kind;
        let frame = Frame {
            header,
            body,
            data,
            again: false,
        };
        self.transmit(node, peer.0 as usize, session, frame);
        if let Some(point) = sending(kind) {
            self.ambushes(node, point);
        }
    }
}

/// What a meeting came to, by the sentences that tell a person.
fn outcome_in(told: &str) -> &'static str {
    const SENTENCES: [(&str, &str); 11] = [
        ("The copies do not connect", "refused"),
        ("mirroring begins", "nothing to copy"),
        (
            "marked and those in the target's undo log",
            "copies marks and undo",
        ),
        ("the blocks that either side marked", "copies marks"),
        (
            "takes every block whose checksums differ",
            "copies by checksum",
        ),
        ("takes every block", "copies everything"),
        ("Split brain since", "split brain"),
        ("until a person answers", "asks a person"),
        ("Nothing is copied between these two", "waits for a third"),
        ("goes on without its own disk", "diskless"),
        ("", "?"),
    ];
    SENTENCES
        .iter()
        .find(|(sentence, _)| told.contains(sentence))
        .map_or("?", |(_, outcome)| outcome)
}

/// The point of [`crate::plan::TRIGGERS`] that sending such a frame is.
fn sending(kind: FrameKind) -> Option<&'static str> {
    Some(match kind {
        FrameKind::Hello => "sends Hello",
        FrameKind::BitmapEnd => "sends BitmapEnd",
        FrameKind::Ready => "sends Ready",
        FrameKind::ResyncData => "sends ResyncData",
        FrameKind::ResyncAck => "sends ResyncAck",
        FrameKind::FlushAck => "sends FlushAck",
        FrameKind::ResyncDone => "sends ResyncDone",
        FrameKind::CompleteAck => "sends CompleteAck",
        FrameKind::InSync => "sends InSync",
        FrameKind::PromoteRequest => "sends PromoteRequest",
        FrameKind::PromoteReply => "sends PromoteReply",
        FrameKind::NewGeneration => "sends NewGeneration",
        FrameKind::GenerationAck => "sends GenerationAck",
        FrameKind::Demoted => "sends Demoted",
        FrameKind::DiskLost => "sends DiskLost",
        FrameKind::DiskLostAck => "sends DiskLostAck",
        _ => return None,
    })
}

fn describe(op: &DiskOp) -> String {
    match op {
        DiskOp::Read {
            volume,
            first,
            count,
            ..
        } => format!("read of volume {volume} sectors {first}+{count}"),
        DiskOp::Write {
            volume,
            first,
            values,
            ..
        } => format!("write of volume {volume} sectors {first}+{}", values.len()),
        DiskOp::Flush { volume, .. } => format!("flush of volume {volume}"),
        DiskOp::MetaWrite {
            volume,
            offset,
            sectors,
        } => format!("metadata write {volume}:{offset}+{}", sectors.len()),
        DiskOp::MetaRead { volume, offset, .. } => format!("metadata read {volume}:{offset}"),
    }
}

/// Frames and events held back in order.
pub(crate) type Backlog<T> = VecDeque<T>;
