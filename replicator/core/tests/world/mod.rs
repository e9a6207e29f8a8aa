//! A small deterministic world of copies: disks with a volatile cache, links in order, steps in random order.

// Each test program uses a part of it.
#![allow(dead_code)]

pub mod register;
pub mod resync;
pub mod story;

use holdfast_replicator_core::api::*;
use holdfast_replicator_core::{AttachError, Core, CreateParameters, CreateVolume, create};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{
    WIRE_VERSION_MIN, decode_body, decode_header, encode_body, encode_header,
};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock;
use std::collections::{BTreeMap, VecDeque};

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

#[derive(Clone, Default)]
pub struct Disk {
    /// What a read sees.
    pub data: Vec<Vec<u8>>,
    /// What survives a power cut for certain.
    pub durable: Vec<Vec<u8>>,
    pub meta: BTreeMap<(u16, u64), Vec<u8>>,
    /// Ranges written since the last flush.
    pub unflushed: Vec<(usize, usize, usize)>,
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

impl MetaSource for &Disk {
    fn read(
        &mut self,
        volume: VolumeIndex,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), DiskError> {
        bytes.fill(0);
        if let Some(block) = self.meta.get(&(volume.0, offset)) {
            bytes.copy_from_slice(block);
        }
        Ok(())
    }
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

    /// The process dies; `power`: the disk loses a random part of what it had not flushed.
    pub fn crash(&mut self, n: usize, power: bool) {
        for m in 0..self.nodes.len() {
            self.drop_link(n, m, "crash");
        }
        let pending = std::mem::take(&mut self.nodes[n].pending);
        for mut action in pending {
            if let Action::MetaWriteBuf {
                place, buf, length, ..
            } = &action
                && self.tear_metadata
            {
                // Any sectors of it may land.
                let (place, length) = (*place, *length as usize);
                let mut bytes = self.nodes[n].bufs[&buf.0].clone();
                for (i, new) in bytes[..length].chunks_mut(4096).enumerate() {
                    let block = (place.volume.0, place.offset + i as u64 * 4096);
                    let old = self.nodes[n].disk.meta.get(&block).cloned();
                    let old = old.unwrap_or_else(|| vec![0; 4096]);
                    for (new, old) in new.chunks_mut(512).zip(old.chunks(512)) {
                        if self.rng.chance(50) {
                            new.copy_from_slice(&old[..new.len()]);
                        }
                    }
                }
                self.nodes[n].bufs.insert(buf.0, bytes);
            }
            if let Action::MetaWrite { place, bytes, .. } = &mut action
                && self.tear_metadata
            {
                // Any sectors of it may land.
                let old = self.nodes[n].disk.meta.get(&(place.volume.0, place.offset));
                let old = old.cloned().unwrap_or_else(|| vec![0; bytes.len()]);
                for (new, old) in bytes.chunks_mut(512).zip(old.chunks(512)) {
                    if self.rng.chance(50) {
                        new.copy_from_slice(old);
                    }
                }
            }
            if let Action::StoreSwap { .. } = &action {
                self.swap_without_asker(&action);
                continue;
            }
            // What was submitted may land or not.
            if self.rng.chance(50) {
                self.apply_disk(n, &action);
            }
        }
        let rng = &mut self.rng;
        let node = &mut self.nodes[n];
        if power {
            for (v, o, l) in std::mem::take(&mut node.disk.unflushed) {
                for at in (o..o + l).step_by(512) {
                    let (cache, platter) = (&mut node.disk.data[v], &mut node.disk.durable[v]);
                    if rng.chance(50) {
                        cache[at..at + 512].copy_from_slice(&platter[at..at + 512]);
                    } else {
                        platter[at..at + 512].copy_from_slice(&cache[at..at + 512]);
                    }
                }
            }
        }
        node.core = None;
        node.bufs.clear();
        node.wants.clear();
        node.reads.clear();
    }

    pub fn drop_link(&mut self, a: usize, b: usize, reason: &str) {
        for (x, y) in [(a, b), (b, a)] {
            self.wires.remove(&(x, y));
            if let Some(session) = self.sessions.remove(&(x, y))
                && self.nodes[x].core.is_some()
            {
                self.event(
                    x,
                    Event::LinkDown {
                        peer: Slot(y as u8),
                        session,
                        reason: reason.into(),
                    },
                );
            }
        }
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
                        let mut header = plain_header(FrameKind::Goodbye, &self.nodes[n]);
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

    fn apply_disk(&mut self, n: usize, action: &Action) {
        let node = &mut self.nodes[n];
        match action {
            Action::DiskWrite {
                volume,
                offset,
                length,
                buf,
                fua,
                ..
            } => {
                let bytes = node.bufs[&buf.0].clone();
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                node.disk.data[v][o..o + l].copy_from_slice(&bytes[..l]);
                node.disk.unflushed.push((v, o, l));
                if *fua {
                    node.disk.durable[v][o..o + l].copy_from_slice(&bytes[..l]);
                }
            }
            Action::DiskZero {
                volume,
                offset,
                length,
                fua,
                ..
            } => {
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                node.disk.data[v][o..o + l].fill(0);
                node.disk.unflushed.push((v, o, l));
                if *fua {
                    node.disk.durable[v][o..o + l].fill(0);
                }
            }
            Action::DiskFlush { volume, .. } => {
                let flushed = volume.0 as usize;
                for (v, o, l) in std::mem::take(&mut node.disk.unflushed) {
                    if v == flushed {
                        let bytes = node.disk.data[v][o..o + l].to_vec();
                        node.disk.durable[v][o..o + l].copy_from_slice(&bytes);
                    } else {
                        node.disk.unflushed.push((v, o, l));
                    }
                }
            }
            Action::MetaWrite { place, bytes, .. } => {
                node.disk
                    .meta
                    .insert((place.volume.0, place.offset), bytes.clone());
            }
            Action::MetaWriteBuf {
                place, buf, length, ..
            } => {
                node.undo_bytes += u64::from(*length);
                for (i, block) in node.bufs[&buf.0].clone()[..*length as usize]
                    .chunks(4096)
                    .enumerate()
                {
                    let mut bytes = block.to_vec();
                    bytes.resize(4096, 0);
                    node.disk
                        .meta
                        .insert((place.volume.0, place.offset + i as u64 * 4096), bytes);
                }
            }
            _ => {}
        }
    }

    fn finish_disk(&mut self, n: usize, at: usize) {
        let action = self.nodes[n].pending.remove(at);
        if let Action::MakeRoom { volume, size } = action {
            return self.make_room(n, volume, size);
        }
        if matches!(
            action,
            Action::SurplusWrite { .. } | Action::SurplusEnd { .. }
        ) {
            return self.finish_surplus(n, &action);
        }
        if matches!(action, Action::StoreRead { .. } | Action::StoreSwap { .. }) {
            return self.finish_store(n, &action);
        }
        let unreadable = matches!((&action, self.nodes[n].bad),
            (Action::DiskRead { volume, offset, length, .. }, Some((bad, at)))
                if volume.0 == bad && (*offset..offset + u64::from(*length)).contains(&at));
        if self.nodes[n].broken || unreadable {
            return self.finish_with_error(n, &action);
        }
        // A read returns what is there when it ends.
        match &action {
            Action::DiskRead {
                volume,
                offset,
                length,
                buf,
                ..
            } => {
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                let bytes = self.nodes[n].disk.data[v][o..o + l].to_vec();
                if let Some(target) = self.nodes[n].bufs.get_mut(&buf.0) {
                    target[..l].copy_from_slice(&bytes);
                }
            }
            Action::MetaReadBuf {
                place, buf, length, ..
            } => {
                let mut bytes = Vec::new();
                for i in 0..u64::from(*length).div_ceil(4096) {
                    let block = self.nodes[n]
                        .disk
                        .meta
                        .get(&(place.volume.0, place.offset + i * 4096));
                    bytes.extend_from_slice(block.unwrap_or(&vec![0; 4096]));
                }
                if let Some(target) = self.nodes[n].bufs.get_mut(&buf.0) {
                    target[..*length as usize].copy_from_slice(&bytes[..*length as usize]);
                }
            }
            _ => self.apply_disk(n, &action),
        }
        let event = match action {
            Action::DiskWrite { op, buf, .. } => {
                self.nodes[n].bufs.remove(&buf.0);
                Event::DiskDone { op, result: Ok(()) }
            }
            Action::DiskRead { op, .. }
            | Action::DiskZero { op, .. }
            | Action::DiskFlush { op, .. } => Event::DiskDone { op, result: Ok(()) },
            Action::MetaWrite { op, .. }
            | Action::MetaWriteBuf { op, .. }
            | Action::MetaReadBuf { op, .. } => Event::MetaDone { op, result: Ok(()) },
            _ => unreachable!(),
        };
        self.event(n, event);
    }

    /// As the shell: nothing else is under way on its disks, then the metadata is laid out for the larger size. Here the layout is
    /// the same one, since all of a volume is one page of the bitmap.
    fn make_room(&mut self, n: usize, volume: VolumeIndex, size: u64) {
        let busy = |action: &Action| {
            !matches!(
                action,
                Action::SurplusWrite { .. } | Action::SurplusEnd { .. } | Action::MakeRoom { .. }
            )
        };
        while let Some(at) = self.nodes[n].pending.iter().position(busy) {
            self.finish_disk(n, at);
        }
        let refuse = |why: &str| Err(why.to_owned());
        let may = match &self.nodes[n].core {
            Some(core) => core.may_move(volume),
            None => refuse("it is gone"),
        };
        let result = match may {
            _ if self.nodes[n].no_room => refuse("the device is too small"),
            Err(why) => Err(why),
            Ok(()) => {
                let node = &mut self.nodes[n];
                let slot = |offset| {
                    node.disk.meta[&(volume.0, offset)]
                        .as_slice()
                        .try_into()
                        .unwrap()
                };
                let (old, _) = superblock::choose(slot(0), slot(4096)).unwrap();
                let written = Superblock {
                    sequence: old.sequence + 2,
                    room: size,
                    ..old
                };
                for sequence in [written.sequence - 1, written.sequence] {
                    let image = superblock::encode(&Superblock {
                        sequence,
                        ..written.clone()
                    });
                    let offset = if sequence % 2 == 0 { 0 } else { 4096 };
                    node.disk
                        .meta
                        .insert((volume.0, offset), image.unwrap().to_vec());
                }
                for disk in [&mut node.disk.data, &mut node.disk.durable] {
                    disk[volume.0 as usize].resize(size as usize, 0);
                }
                node.core.as_mut().unwrap().moved(volume, &written);
                Ok(())
            }
        };
        self.event(
            n,
            Event::RoomMade {
                volume,
                size,
                result,
            },
        );
    }

    fn finish_surplus(&mut self, n: usize, action: &Action) {
        let node = &mut self.nodes[n];
        let full = node.surplus_full;
        let (op, save) = match action {
            Action::SurplusWrite { op, save, .. } | Action::SurplusEnd { op, save, .. } => {
                (*op, *save)
            }
            _ => unreachable!(),
        };
        let saved = node.surplus.iter_mut().find(|s| s.0.save == save).unwrap();
        match action {
            Action::SurplusWrite {
                volume,
                offset,
                length,
                buf,
                ..
            } => {
                let bytes = node.bufs[&buf.0][..*length as usize].to_vec();
                saved.1.push((volume.0, *offset, bytes));
            }
            Action::SurplusEnd { keep, .. } => saved.2 = Some(*keep && !full),
            _ => {}
        }
        let result = if full {
            Err("no space is left".into())
        } else {
            Ok(format!("/saved/{save}"))
        };
        self.event(n, Event::SurplusDone { op, result });
    }

    fn finish_with_error(&mut self, n: usize, action: &Action) {
        let result = Err(DiskError::Io);
        let event = match action {
            Action::DiskWrite { op, buf, .. } => {
                self.nodes[n].bufs.remove(&buf.0);
                Event::DiskDone { op: *op, result }
            }
            Action::DiskRead { op, .. }
            | Action::DiskZero { op, .. }
            | Action::DiskFlush { op, .. } => Event::DiskDone { op: *op, result },
            Action::MetaWrite { op, .. }
            | Action::MetaWriteBuf { op, .. }
            | Action::MetaReadBuf { op, .. } => Event::MetaDone { op: *op, result },
            _ => unreachable!(),
        };
        self.event(n, event);
    }

    /// Reads `length` bytes on node `n`; the bytes are in `read_bytes` once it completed.
    pub fn read(&mut self, n: usize, volume: u16, offset: u64, length: u32) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let buf = BufId(request.0 + (1 << 40));
        self.nodes[n]
            .bufs
            .insert(buf.0, vec![0xee; length as usize]);
        self.event(
            n,
            Event::Read {
                request,
                volume: VolumeIndex(volume),
                offset,
                length,
                buf,
            },
        );
        request
    }

    pub fn read_bytes(&mut self, n: usize, request: RequestId) -> Vec<u8> {
        self.nodes[n].bufs[&(request.0 + (1 << 40))].clone()
    }

    fn deliver(&mut self, from: usize, to: usize) {
        let Some((header, body)) = self
            .wires
            .get_mut(&(from, to))
            .and_then(VecDeque::pop_front)
        else {
            return;
        };
        let Some(session) = self.sessions.get(&(to, from)).copied() else {
            return;
        };
        let header = decode_header(header.as_slice().try_into().unwrap()).unwrap();
        let peer = Slot(from as u8);
        if self.trace {
            eprintln!(
                "{:>8} {from}→{to}: {:?} pos {} dep {} stable {}",
                self.now.0 / 1_000_000,
                header.kind,
                header.position,
                header.dependency,
                header.stable_position
            );
        }
        if header.kind.carries_data() {
            let buf = BufId(self.rng.next() >> 3);
            self.nodes[to].bufs.insert(buf.0, body);
            self.event(
                to,
                Event::Data {
                    peer,
                    session,
                    header,
                    buf,
                },
            );
        } else {
            let body = decode_body(header.kind, &body).unwrap();
            self.event(
                to,
                Event::Control {
                    peer,
                    session,
                    header,
                    body,
                },
            );
        }
    }

    fn connect_wanted(&mut self) -> bool {
        for a in 0..self.nodes.len() {
            for b in a + 1..self.nodes.len() {
                let alive = self.nodes[a].core.is_some() && self.nodes[b].core.is_some();
                let linked =
                    self.sessions.contains_key(&(a, b)) || self.sessions.contains_key(&(b, a));
                let cut = self.cut.contains(&(a, b));
                if linked
                    && !(self.sessions.contains_key(&(a, b)) && self.sessions.contains_key(&(b, a)))
                {
                    // One side closed: once the other has read what was sent, it hears of it.
                    let (open, closed) = if self.sessions.contains_key(&(a, b)) {
                        (a, b)
                    } else {
                        (b, a)
                    };
                    if self
                        .wires
                        .get(&(closed, open))
                        .is_none_or(VecDeque::is_empty)
                    {
                        self.drop_link(a, b, "closed by the other side");
                        return true;
                    }
                    continue;
                }
                let wanted = self.nodes[a].wants.contains(&Slot(b as u8))
                    && self.nodes[b].wants.contains(&Slot(a as u8));
                if alive && !linked && !cut && wanted {
                    let session = SessionId(self.next_session);
                    self.next_session += 1;
                    for (x, y) in [(a, b), (b, a)] {
                        self.sessions.insert((x, y), session);
                        self.wires.insert((x, y), VecDeque::new());
                    }
                    for (x, y) in [(a, b), (b, a)] {
                        self.event(
                            x,
                            Event::LinkUp {
                                peer: Slot(y as u8),
                                session,
                                path: "test".into(),
                            },
                        );
                    }
                    return true;
                }
            }
        }
        false
    }

    /// Everything on its way arrives, and what wants to connect does.
    pub fn deliver_all(&mut self) {
        loop {
            let full = self.wires.iter().find(|(_, wire)| !wire.is_empty());
            match full.map(|(pair, _)| *pair) {
                Some((from, to)) => self.deliver(from, to),
                None if self.connect_wanted() => {}
                None => return,
            }
        }
    }

    /// The oldest request of that node's disk ends.
    pub fn finish_first(&mut self, n: usize) {
        self.finish_disk(n, 0);
    }

    /// That request of that node's disk ends.
    pub fn finish(&mut self, n: usize, at: usize) {
        self.finish_disk(n, at);
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

    pub fn promote(&mut self, n: usize, force: bool) -> AdminResult {
        let admin = self.admin(n, Command::Promote { force });
        self.until("the promotion is answered", 20_000, |w| {
            w.nodes[n].admin.contains_key(&admin)
        });
        self.nodes[n].admin[&admin].clone()
    }

    pub fn command(&mut self, n: usize, command: Command) -> AdminResult {
        let admin = self.admin(n, command);
        self.until("the command is answered", 40_000, |w| {
            w.nodes[n].admin.contains_key(&admin)
        });
        self.nodes[n].admin[&admin].clone()
    }

    /// Issues a write of whole sectors; returns the request.
    pub fn write(
        &mut self,
        n: usize,
        volume: u16,
        offset: u64,
        bytes: Vec<u8>,
        fua: bool,
    ) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let buf = BufId(request.0 + (1 << 40));
        let length = bytes.len() as u32;
        self.nodes[n].bufs.insert(buf.0, bytes);
        self.event(
            n,
            Event::Write {
                request,
                volume: VolumeIndex(volume),
                offset,
                length,
                buf,
                fua,
                crc: 0,
            },
        );
        request
    }

    pub fn flush(&mut self, n: usize) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        self.event(n, Event::Flush { request });
        request
    }

    pub fn status_of(&self, n: usize, request: RequestId) -> Option<Status> {
        self.nodes[n]
            .completed
            .iter()
            .find(|c| c.0 == request)
            .map(|c| c.1)
    }

    pub fn settled(&self, slots: &[usize]) -> bool {
        slots.iter().all(|n| {
            let Some(core) = &self.nodes[*n].core else {
                return false;
            };
            let status = core.status(self.now);
            status
                .peers
                .iter()
                .filter(|p| slots.contains(&(p.slot.0 as usize)))
                .all(|p| {
                    p.link == holdfast_replicator_core::status::LinkState::Established
                        && p.unacknowledged_bytes == 0
                })
        })
    }

    pub fn up_to_date(&self, n: usize) -> bool {
        self.nodes[n]
            .core
            .as_ref()
            .is_some_and(|c| c.status(self.now).state == CopyState::UpToDate)
    }
}

fn plain_header(kind: FrameKind, node: &Node) -> FrameHeader {
    let _ = node;
    FrameHeader {
        version: WIRE_VERSION_MIN,
        kind,
        flags: FrameFlags::default(),
        payload_length: 0,
        payload_crc: 0,
        service_tag: (SERVICE.0 >> 64) as u64,
        volume: VolumeIndex(0),
        epoch: Epoch::NONE,
        generation: GenerationId(0),
        incarnation: Incarnation(0),
        position: 0,
        dependency: 0,
        stable_position: 0,
        offset: 0,
        length: 0,
    }
}
