//! A small deterministic world of copies: disks with a volatile cache, links in order, steps in random order.

// Each test program uses a part of it.
#![allow(dead_code)]

mod ask;
mod disk;
mod links;
pub mod register;
pub mod resync;
pub mod story;

use holdfast_replicator_core::api::*;
use holdfast_replicator_core::{AttachError, Core, CreateParameters, CreateVolume, create};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{decode_body, decode_header, encode_body, encode_header};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock;
use std::collections::{BTreeMap, VecDeque};

pub use disk::Disk;

pub const BLOCK: u64 = 4096;

pub struct Rng(pub u64);
impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

pub struct Node {
    pub core: Option<Core>,
    pub disk: Disk,
    pub bufs: BTreeMap<u64, Vec<u8>>,
    pub pending: Vec<Action>,
    pub completed: Vec<(RequestId, Status)>,
    pub admin: BTreeMap<u64, AdminResult>,
    pub notices: Vec<Notice>,
    pub wants: Vec<Slot>,
    pub starts: u64,
    /// Bytes of old blocks written to the undo area.
    pub undo_bytes: u64,
    pub reads: BTreeMap<RequestId, (BufId, Vec<u8>)>,
    /// The disk answers everything with an error.
    pub broken: bool,
    /// What was saved before it was overwritten: pieces of volumes, and whether it was kept at the end.
    pub surplus: Vec<Saved>,
    /// There is no place for more of it.
    pub surplus_full: bool,
    /// Volume and byte that the disk cannot read.
    pub bad: Option<(u16, u64)>,
    /// Sizes that new connections were told, in their order.
    pub resized: Vec<(u16, u64)>,
    /// Its devices are full: no volume gets more room.
    pub no_room: bool,
}

/// About, (volume, offset, bytes), kept.
pub type Saved = (SurplusAbout, Vec<(u16, u64, Vec<u8>)>, Option<bool>);

/// Header and payload of a frame on its way.
pub type Encoded = (Vec<u8>, Vec<u8>);

pub struct World {
    pub rng: Rng,
    pub now: Time,
    pub nodes: Vec<Node>,
    /// (from, to) → frames in order; a link exists while `sessions` has the pair.
    pub wires: BTreeMap<(usize, usize), VecDeque<Encoded>>,
    pub sessions: BTreeMap<(usize, usize), SessionId>,
    pub cut: Vec<(usize, usize)>,
    next_session: u64,
    next_admin: u64,
    pub next_request: u64,
    volumes: Vec<u64>,
    pub modes: Vec<Mode>,
    pub policy: OnPeerLoss,
    pub trace: bool,
    pub tuning: Tuning,
    /// A crash may tear blocks of metadata that are being written.
    pub tear_metadata: bool,
    /// The cluster's register, where there is one.
    pub register: Option<register::Register>,
}

const SERVICE: Uuid = Uuid(0x1111_2222_3333_4444_5555_6666_7777_8888);

fn node_id(n: usize) -> Uuid {
    Uuid(0x1000 + n as u128)
}

impl World {
    pub fn new(
        seed: u64,
        modes: &[Mode],
        policy: OnPeerLoss,
        volumes: &[u64],
        zeroed: bool,
    ) -> World {
        World::with_undo(seed, modes, policy, volumes, zeroed, 1 << 20)
    }

    /// The same with an undo area of that many bytes.
    pub fn with_undo(
        seed: u64,
        modes: &[Mode],
        policy: OnPeerLoss,
        volumes: &[u64],
        zeroed: bool,
        undo_size: u64,
    ) -> World {
        let mut world = World {
            rng: Rng(seed),
            now: Time(1_000_000_000),
            nodes: Vec::new(),
            wires: BTreeMap::new(),
            sessions: BTreeMap::new(),
            cut: Vec::new(),
            next_session: 1,
            next_admin: 1,
            next_request: 1,
            volumes: volumes.to_vec(),
            modes: modes.to_vec(),
            policy,
            trace: std::env::var_os("TRACE").is_some(),
            tuning: Tuning {
                resync_chunk_bytes: 64 << 10,
                resync_window_bytes: 256 << 10,
                ..Tuning::default()
            },
            tear_metadata: false,
            register: None,
        };
        let in_sync = (0..modes.len())
            .filter(|n| modes[*n] != Mode::Async)
            .fold(SlotSet::EMPTY, |set, n| set.with(Slot(n as u8)));
        for n in 0..modes.len() {
            let parameters = CreateParameters {
                service: SERVICE,
                service_name: "test".into(),
                slot: Slot(n as u8),
                node: node_id(n),
                mode: Mode::Sync,
                on_peer_loss: policy,
                seed: seed ^ ((n as u64 + 1) * 77),
                in_sync,
                peers: world.peer_parameters(n),
                volumes: volumes
                    .iter()
                    .enumerate()
                    .map(|(i, size)| CreateVolume {
                        index: VolumeIndex(i as u16),
                        volume: Uuid(0xabc0 + i as u128),
                        name: format!("v{i}"),
                        data_size: *size,
                        sector_size: 512,
                        grain_shift: None,
                        al_blocks: 16,
                        undo_size,
                        zeroed,
                    })
                    .collect(),
            };
            let mut disk = Disk {
                data: volumes.iter().map(|s| vec![0; *s as usize]).collect(),
                durable: volumes.iter().map(|s| vec![0; *s as usize]).collect(),
                meta: BTreeMap::new(),
                unflushed: Vec::new(),
            };
            for (place, bytes) in create(&parameters).unwrap() {
                disk.meta.insert((place.volume.0, place.offset), bytes);
            }
            world.nodes.push(Node {
                core: None,
                disk,
                bufs: BTreeMap::new(),
                pending: Vec::new(),
                completed: Vec::new(),
                admin: BTreeMap::new(),
                notices: Vec::new(),
                wants: Vec::new(),
                starts: 0,
                undo_bytes: 0,
                reads: BTreeMap::new(),
                broken: false,
                surplus: Vec::new(),
                surplus_full: false,
                bad: None,
                resized: Vec::new(),
                no_room: false,
            });
        }
        world
    }

    fn peer_parameters(&self, n: usize) -> Vec<PeerParameters> {
        (0..self.modes.len())
            .filter(|m| *m != n)
            .map(|m| PeerParameters {
                slot: Slot(m as u8),
                node: node_id(m),
                // A pair is asynchronous if either end is the asynchronous copy.
                mode: if self.modes[m] == Mode::Async || self.modes[n] == Mode::Async {
                    Mode::Async
                } else {
                    self.modes[m]
                },
            })
            .collect()
    }

    pub fn start(&mut self, n: usize) {
        self.try_start(n).unwrap();
    }

    /// Nothing is done if the copy refuses its metadata.
    pub fn try_start(&mut self, n: usize) -> Result<(), AttachError> {
        self.nodes[n].starts += 1;
        let parameters = AttachParameters {
            volumes: self
                .volumes
                .iter()
                .enumerate()
                .map(|(i, _)| AttachVolume {
                    index: VolumeIndex(i as u16),
                    name: format!("v{i}"),
                    device_data_size: self.nodes[n].disk.data[i].len() as u64,
                    sector_size: 512,
                    discard_zeroes: true,
                })
                .collect(),
            peers: self.peer_parameters(n),
            slot: Slot(n as u8),
            node: node_id(n),
            service: SERVICE,
            incarnation: Incarnation(self.rng.next() | 1),
            seed: self.rng.next(),
            tuning: self.tuning,
            store: match self.register {
                Some(_) => StoreKind::Cluster,
                None => StoreKind::Own,
            },
        };
        let mut out = Vec::new();
        let core = Core::attach(parameters, &mut &self.nodes[n].disk, self.now, &mut out)?;
        self.nodes[n].core = Some(core);
        self.actions(n, out);
        Ok(())
    }

    pub fn event(&mut self, n: usize, event: Event) {
        let mut out = Vec::new();
        let now = self.now;
        if let Some(core) = &mut self.nodes[n].core {
            core.handle(now, event, &mut out);
            core.end_batch(now, &mut out);
        }
        self.actions(n, out);
    }

    pub fn admin(&mut self, n: usize, command: Command) -> u64 {
        let admin = self.next_admin;
        self.next_admin += 1;
        self.event(
            n,
            Event::Admin {
                admin: AdminId(admin),
                command,
            },
        );
        admin
    }

    fn actions(&mut self, n: usize, actions: Vec<Action>) {
        for action in actions {
            if self.trace {
                let mut text = format!("{action:?}");
                text.truncate(400);
                eprintln!("{:>8} node {n}: {text}", self.now.0 / 1_000_000);
            }
            match action {
                Action::AllocBuf { buf, length } => {
                    self.nodes[n].bufs.insert(buf.0, vec![0; length as usize]);
                }
                Action::ReleaseBuf { buf } => {
                    assert!(
                        self.nodes[n].bufs.remove(&buf.0).is_some(),
                        "buffer {buf:?} released twice"
                    );
                }
                Action::DiskWrite {
                    op,
                    volume,
                    offset,
                    length,
                    buf,
                    fua,
                } => {
                    // The kernel has its own reference: keep the bytes with the operation.
                    let bytes = self.nodes[n].bufs[&buf.0][..length as usize].to_vec();
                    let hidden = BufId(u64::MAX - op.0);
                    self.nodes[n].bufs.insert(hidden.0, bytes);
                    self.nodes[n].pending.push(Action::DiskWrite {
                        op,
                        volume,
                        offset,
                        length,
                        buf: hidden,
                        fua,
                    });
                }
                Action::CopyBuf { from, to, length } => {
                    let bytes = self.nodes[n].bufs[&from.0][..length as usize].to_vec();
                    self.nodes[n].bufs.get_mut(&to.0).unwrap()[..bytes.len()]
                        .copy_from_slice(&bytes);
                }
                Action::Hash { op, buf, length } => {
                    let digest = self.nodes[n].bufs[&buf.0][..length as usize]
                        .iter()
                        .fold(7u128, |h, b| {
                            h.wrapping_mul(0x1_0000_01b3).wrapping_add(u128::from(*b))
                        });
                    self.event(n, Event::HashDone { op, digest });
                }
                Action::IsZero { op, buf, length } => {
                    let zero = self.nodes[n].bufs[&buf.0][..length as usize]
                        .iter()
                        .all(|b| *b == 0);
                    self.event(n, Event::ZeroCheck { op, zero });
                }
                Action::Crc { op, buf, length } => {
                    let bytes = &self.nodes[n].bufs[&buf.0][..length as usize];
                    let zero = bytes.iter().all(|b| *b == 0);
                    let crc = crc32fast::hash(bytes);
                    self.event(n, Event::CrcDone { op, crc, zero });
                }
                Action::DiskRead { .. }
                | Action::DiskZero { .. }
                | Action::DiskFlush { .. }
                | Action::MetaWrite { .. }
                | Action::MetaWriteBuf { .. }
                | Action::MetaReadBuf { .. } => self.nodes[n].pending.push(action),
                Action::SurplusBegin { about } => {
                    self.nodes[n].surplus.push((about, Vec::new(), None));
                }
                Action::SurplusWrite { .. }
                | Action::SurplusEnd { .. }
                | Action::StoreRead { .. }
                | Action::StoreSwap { .. } => self.nodes[n].pending.push(action),
                Action::Send {
                    peer,
                    session,
                    mut header,
                    payload,
                } => {
                    let bytes = match payload {
                        Payload::None => Vec::new(),
                        Payload::Body(body) => encode_body(&body),
                        Payload::Buf { buf, .. } => {
                            self.nodes[n].bufs[&buf.0][..header.length as usize].to_vec()
                        }
                    };
                    header.payload_length = bytes.len() as u32;
                    let to = peer.0 as usize;
                    if self.sessions.get(&(n, to)) == Some(&session)
                        && let Some(wire) = self.wires.get_mut(&(n, to))
                    {
                        wire.push_back((encode_header(&header).to_vec(), bytes));
                    }
                }
                Action::Connect { peer } => {
                    if !self.nodes[n].wants.contains(&peer) {
                        self.nodes[n].wants.push(peer);
                    }
                }
                Action::Close {
                    peer,
                    session,
                    reconnect,
                    code,
                    text,
                } => {
                    let to = peer.0 as usize;
                    if self.sessions.get(&(n, to)) == Some(&session) {
                        self.sessions.remove(&(n, to));
                        let mut header = FrameHeader::new(FrameKind::Goodbye, SERVICE);
                        let body = encode_body(&Body::Goodbye { code, text });
                        header.payload_length = body.len() as u32;
                        if let Some(wire) = self.wires.get_mut(&(n, to)) {
                            wire.push_back((encode_header(&header).to_vec(), body));
                        }
                    }
                    if !reconnect {
                        self.nodes[n].wants.retain(|p| *p != peer);
                    }
                }
                Action::Complete { request, status } => {
                    self.nodes[n].completed.push((request, status))
                }
                Action::AdminDone { admin, result } => {
                    let before = self.nodes[n].admin.insert(admin.0, result);
                    assert!(before.is_none(), "one answer per request");
                }
                Action::Notice(notice) => self.nodes[n].notices.push(notice),
                Action::Halt { reason } => panic!("node {n} halts: {reason}"),
                Action::MakeRoom { .. } => self.nodes[n].pending.push(action),
                Action::Resized { volume, size } => {
                    self.nodes[n].resized.push((volume.0, size));
                }
                Action::RoleChanged { .. } | Action::Granted { .. } => {}
            }
        }
    }

    /// One random thing happens; false if nothing was left to do but wait.
    pub fn step(&mut self) -> bool {
        if self.connect_wanted() {
            return true;
        }
        let mut choices = Vec::new();
        for n in 0..self.nodes.len() {
            for at in 0..self.nodes[n].pending.len() {
                choices.push((0, n, at));
            }
        }
        for (&(from, to), wire) in &self.wires {
            if !wire.is_empty() {
                choices.push((1, from, to));
            }
        }
        let late = self.register.as_ref().map_or(0, |r| r.late.len());
        choices.extend((0..late).map(|at| (2, at, 0)));
        if choices.is_empty() {
            self.now = self.now.after_ms(50);
            for n in 0..self.nodes.len() {
                self.event(n, Event::Tick);
            }
            return false;
        }
        self.now = Time(self.now.0 + 10_000);
        let at = self.rng.below(choices.len() as u64) as usize;
        match choices[at] {
            (0, n, at) => self.finish_disk(n, at),
            (2, at, _) => self.late_swap(at),
            (_, from, to) => self.deliver(from, to),
        }
        true
    }

    pub fn steps(&mut self, n: usize) {
        for _ in 0..n {
            self.step();
        }
    }

    /// Runs until `done`, at most `limit` steps.
    pub fn until(&mut self, what: &str, limit: usize, mut done: impl FnMut(&World) -> bool) {
        for _ in 0..limit {
            if done(self) {
                return;
            }
            self.step();
        }
        for n in 0..self.nodes.len() {
            if let Some(core) = &self.nodes[n].core {
                eprintln!("node {n}: {:#?}", core.status(self.now));
            }
            for notice in self.nodes[n].notices.iter().rev().take(12).rev() {
                eprintln!(
                    "node {n} {:?} {} {:?}: {}",
                    notice.level, notice.kind, notice.peer, notice.text
                );
            }
            eprintln!("node {n} admin: {:?}", self.nodes[n].admin);
        }
        panic!("never: {what}");
    }
}
