//! One service on its shard: feeds the core with events and carries out what it answers, in the order given.

use super::acks::AckTimes;
use super::budget::{Budget, Receipt};
use super::buffers::{BufTable, ClientBuf, Entry};
use super::exports::OpenExports;
use super::grow::Grower;
use super::link::{LinkPort, PeerRef};
use super::memory::Memory;
use super::requests::{Ended, Kind, Requests, Shape, Sink};
use super::surplus::SurplusPort;
use crate::control::protocol::{EventReport, LevelName};
use crate::events::{EventLog, now_ms};
use crate::metrics::{PeerMetrics, VolumeMetrics};
use crate::place::Locator;
use holdfast_disk::{AlignedBytes, DiskErrorKind, FileId, Op, Ring};
use holdfast_frontend::{Completion, IoError, IoErrorKind, Request};
use holdfast_replicator_core::Core;
use holdfast_replicator_core::api::{
    Action, Actions, AdminId, AdminResult, Command, DiskError, Event, Level, MetaPlace, Notice,
    OpId, Payload, Refusal, Role, Time,
};
use holdfast_replicator_core::words;
use holdfast_wire_format::frame::{Body, FrameKind};
use holdfast_wire_format::ids::{Epoch, Slot, VolumeIndex};
use slab::Slab;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::oneshot;

/// A disk that has not answered a request for this long is reported.
pub(super) const HUNG_AFTER_SECONDS: u64 = 10;
/// A stop waits this long for a disk that has been reported, then ends unclean.
pub(super) const HUNG_STOP_SECONDS: u64 = 5;
/// And this long for whatever else a service waits for, such as a copy that hears and does not acknowledge. Below the unit's
/// `TimeoutStopSec`: a supervisor's SIGKILL would tell nobody why.
pub(super) const LONGEST_STOP_SECONDS: u64 = 60;

/// One volume's files on the ring.
pub(super) struct VolumeFiles {
    pub name: String,
    pub data: FileId,
    pub meta: FileId,
    /// Byte offset of the metadata area in its file.
    pub meta_base: u64,
    /// The file of external metadata, by its own name.
    pub meta_path: PathBuf,
    /// A growth left this to be zeroed: place of the locator that says so, and the locator.
    pub not_zero: Option<(u64, Locator)>,
    pub sector: u32,
    /// Bytes the application sees.
    pub size: u64,
    pub discard_zeroes: bool,
    pub metrics: VolumeMetrics,
    /// Its disk is silent; said once.
    pub hung: bool,
}

/// One peer of the service.
pub(super) struct PeerState {
    pub slot: Slot,
    pub name: String,
    pub link: PeerRef,
    pub metrics: PeerMetrics,
    pub acks: AckTimes,
}

/// What a service uses of its shard.
pub(super) struct Surroundings<'a> {
    pub ring: &'a Ring,
    pub link: &'a LinkPort,
    pub memory: &'a Memory,
    pub log: &'a EventLog,
    pub surplus: &'a SurplusPort,
    pub grower: &'a Grower,
    pub now: Time,
}

/// A service with its core.
pub(super) struct Service {
    pub index: usize,
    pub name: String,
    /// Name of this node, and the slot of its copy.
    pub node: String,
    pub slot: Slot,
    pub core: Core,
    pub volumes: Vec<VolumeFiles>,
    pub peers: Vec<PeerState>,
    pub exports: OpenExports,
    /// What its clients may hold in requests.
    pub write_budget: Rc<Budget>,
    pub read_budget: Rc<Budget>,
    pub role: Role,
    pub epoch: Epoch,
    /// What the core has not heard yet.
    pub events: VecDeque<Event>,
    pub requests: Requests,
    pub table: BufTable,
    actions: Actions,
    /// Who waits for an answer, and whether it asked for the end.
    admins: Slab<(oneshot::Sender<AdminResult>, bool)>,
    /// The core was fed since its last `end_batch`.
    pub touched: bool,
    /// It said to stop this process, and why.
    pub halted: Option<String>,
    /// Its core hears of nothing but its disks: they are to come to rest.
    held: bool,
}

/// Tokens with these bits belong to no service: a growth asked.
pub(super) const GROWER: u64 = ((1 << 14) - 1) << 50;

/// What a completion of the ring was for, in one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Token {
    pub service: usize,
    pub what: What,
    pub volume: VolumeIndex,
    pub op: OpId,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    Read,
    Write,
    Flush,
    Metadata,
}

/// Bits of an operation number; the core numbers them by their place in a slab.
const OP_BITS: u32 = 40;

impl Token {
    fn pack(self) -> u64 {
        assert!(self.op.0 < 1 << OP_BITS && self.service < (1 << 14) - 1 && self.volume.0 < 1 << 8);
        (self.service as u64) << 50
            | (self.what as u64) << 48
            | u64::from(self.volume.0) << OP_BITS
            | self.op.0
    }

    pub fn unpack(token: u64) -> Token {
        Token {
            service: (token >> 50) as usize,
            what: match token >> 48 & 3 {
                0 => What::Read,
                1 => What::Write,
                2 => What::Flush,
                _ => What::Metadata,
            },
            volume: VolumeIndex((token >> OP_BITS & 0xff) as u16),
            op: OpId(token & ((1 << OP_BITS) - 1)),
        }
    }
}

impl Service {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        index: usize,
        name: String,
        node: String,
        slot: Slot,
        core: Core,
        attached: Actions,
        volumes: Vec<VolumeFiles>,
        peers: Vec<PeerState>,
        (write_bytes, read_bytes): (usize, usize),
    ) -> Service {
        Service {
            index,
            name,
            node,
            slot,
            core,
            volumes,
            peers,
            exports: OpenExports::default(),
            write_budget: Budget::new(write_bytes),
            read_budget: Budget::new(read_bytes),
            role: Role::Secondary,
            epoch: Epoch::NONE,
            events: VecDeque::with_capacity(256),
            requests: Requests::default(),
            table: BufTable::default(),
            actions: attached,
            admins: Slab::new(),
            touched: true,
            halted: None,
            held: false,
        }
    }

    /// From here on its core hears of nothing but its disks, or of everything again.
    pub fn hold(&mut self, hold: bool) {
        self.held = hold;
    }

    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Nothing of it is under way on its disks, nor is an answer of them on its way to the core.
    pub fn at_rest(&self, ring: &Ring) -> bool {
        let now = std::time::Instant::now();
        let quiet = |file| ring.oldest_of(file, now).is_none();
        let disks = self.volumes.iter().all(|v| quiet(v.data) && quiet(v.meta));
        disks && !self.events.iter().any(is_disk)
    }

    fn next_event(&mut self) -> Option<Event> {
        if !self.held {
            return self.events.pop_front();
        }
        let at = self.events.iter().position(is_disk)?;
        self.events.remove(at)
    }

    /// Starts a request of an application. `read_into` is the memory of a read.
    pub fn request(
        &mut self,
        around: &Surroundings,
        volume: VolumeIndex,
        request: Request<ClientBuf>,
        read_into: Option<(holdfast_disk::Buf, Receipt)>,
        completion: Completion<ClientBuf>,
    ) {
        let Some(files) = self.volumes.get(volume.0 as usize) else {
            return completion.fail(IoError::new(
                IoErrorKind::Invalid,
                "there is no such volume",
            ));
        };
        let shape = Shape {
            volume,
            sector: files.sector,
            checksum: !self.peers.is_empty(),
        };
        let mut sink = Sink {
            table: &mut self.table,
            events: &mut self.events,
            memory: around.memory,
        };
        match (request, read_into) {
            (Request::Read { offset, len }, Some(buf)) => {
                self.requests
                    .read(around.now, shape, offset, len, buf, completion, &mut sink);
            }
            (request, _) => self
                .requests
                .start(around.now, shape, request, completion, &mut sink),
        }
    }

    /// Asks the core on behalf of a person; `answer` gets the result, whenever it comes.
    pub fn admin(&mut self, command: Command, answer: oneshot::Sender<AdminResult>) {
        let ends = matches!(command, Command::Detach);
        let admin = AdminId(self.admins.insert((answer, ends)) as u64);
        self.events.push_back(Event::Admin { admin, command });
    }

    /// Lets the core handle everything that came, until nothing more follows from it. False: there was nothing.
    pub fn run(&mut self, around: &Surroundings) -> bool {
        let mut worked = self.carry_out(around);
        while let Some(event) = self.next_event() {
            self.touched = true;
            worked = true;
            self.observe(&event, around.now);
            let disconnect = match &event {
                Event::Admin {
                    command: Command::Disconnect { peer },
                    ..
                } => Some(*peer),
                _ => None,
            };
            self.core.handle(around.now, event, &mut self.actions);
            self.carry_out(around);
            if let Some(slot) = disconnect {
                // Also where there is no session to close: the link would go on calling.
                for peer in &self.peers {
                    if slot.is_none_or(|slot| slot == peer.slot) {
                        around.link.disconnect(peer.link);
                    }
                }
            }
            if self.halted.is_some() {
                break;
            }
        }
        worked
    }

    /// Sends what the core gathered over the batch. True: more events followed.
    pub fn end_batch(&mut self, around: &Surroundings) -> bool {
        if !std::mem::take(&mut self.touched) {
            return false;
        }
        self.core.end_batch(around.now, &mut self.actions);
        self.carry_out(around);
        if self.held {
            self.events.iter().any(is_disk)
        } else {
            !self.events.is_empty()
        }
    }

    /// What the metrics take from an event before the core consumes it.
    fn observe(&mut self, event: &Event, now: Time) {
        match event {
            Event::Control {
                peer, header, body, ..
            } => {
                let Some(peer) = self.peers.iter_mut().find(|known| known.slot == *peer) else {
                    return;
                };
                let PeerState { metrics, acks, .. } = peer;
                metrics
                    .received_bytes
                    .increment(u64::from(header.payload_length));
                let record =
                    |nanoseconds: u64| metrics.acknowledged.record(nanoseconds as f64 / 1e9);
                match (header.kind, body) {
                    (FrameKind::WriteAck, Body::Acks { runs }) => {
                        for (first, last) in runs {
                            acks.acknowledged(*first, *last, now, record);
                        }
                    }
                    (FrameKind::ReceivedAck, _) => {
                        acks.acknowledged(0, header.position, now, record)
                    }
                    _ => {}
                }
            }
            Event::Data { peer, header, .. } => {
                if let Some(peer) = self.peers.iter().find(|known| known.slot == *peer) {
                    peer.metrics
                        .received_bytes
                        .increment(u64::from(header.payload_length));
                }
            }
            Event::LinkUp { peer, .. } | Event::LinkDown { peer, .. } => {
                if let Some(peer) = self.peers.iter_mut().find(|known| known.slot == *peer) {
                    peer.acks.clear();
                    if matches!(event, Event::LinkUp { .. }) {
                        peer.metrics.sessions.increment(1);
                    }
                }
            }
            _ => {}
        }
    }

    fn carry_out(&mut self, around: &Surroundings) -> bool {
        if self.actions.is_empty() {
            return false;
        }
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            if self.halted.is_some() {
                // Nothing after a halt happens.
                break;
            }
            if let Err(defect) = self.act(action, around) {
                self.halted = Some(defect);
            }
        }
        // Its memory is used again.
        self.actions = actions;
        true
    }

    fn act(&mut self, action: Action, around: &Surroundings) -> Result<(), String> {
        match action {
            Action::DiskRead { op, volume, offset, length, buf } => {
                let file = self.files(volume)?.data;
                self.read(around, self.token(op, volume, What::Read), file, offset, length, buf)
            }
            Action::DiskWrite { op, volume, offset, length, buf, fua } => {
                let file = self.files(volume)?.data;
                let entry = self.entry(buf, length)?;
                let write =
                    Op::Write { file, offset, buf: entry.buf.clone(), buf_offset: entry.at, len: length, fua };
                around.ring.push(write, self.token(op, volume, What::Write));
                Ok(())
            }
            Action::DiskZero { op, volume, offset, length, unmap, fua } => {
                let file = self.files(volume)?.data;
                around.ring.push(Op::Zero { file, offset, len: length, unmap, fua }, self.token(op, volume, What::Write));
                Ok(())
            }
            Action::DiskFlush { op, volume } => {
                let file = self.files(volume)?.data;
                around.ring.push(Op::Flush { file }, self.token(op, volume, What::Flush));
                Ok(())
            }
            Action::MetaWrite { op, place, bytes } => {
                let (file, offset) = self.meta(place)?;
                let data = AlignedBytes::from(bytes.as_slice());
                around.ring.push(Op::WriteBytes { file, offset, data, fua: true }, self.token(op, place.volume, What::Metadata));
                Ok(())
            }
            Action::MetaWriteBuf { op, place, buf, length } => {
                let (file, offset) = self.meta(place)?;
                let entry = self.entry(buf, length)?;
                let write =
                    Op::Write { file, offset, buf: entry.buf.clone(), buf_offset: entry.at, len: length, fua: true };
                around.ring.push(write, self.token(op, place.volume, What::Metadata));
                Ok(())
            }
            Action::MetaReadBuf { op, place, buf, length } => {
                let (file, offset) = self.meta(place)?;
                self.read(around, self.token(op, place.volume, What::Metadata), file, offset, length, buf)
            }
            Action::AllocBuf { buf, length } => self
                .table
                .alloc(buf, length, around.memory)
                .map_err(|error| format!("no memory for {length} bytes that the service cannot go on without: {error}")),
            Action::ReleaseBuf { buf } => {
                // A read's number is forgotten with its request already.
                self.table.remove(buf);
                Ok(())
            }
            Action::CopyBuf { from, to, length } => {
                let length = length as usize;
                let bytes = self.entry(from, length as u32)?.bytes()[..length].to_vec();
                let entry = self.table.get_mut(to).filter(|entry| entry.len >= length);
                let entry = entry.ok_or_else(|| format!("the core copies into buffer {to:?}, which is not there"))?;
                let target = entry
                    .read_target()
                    .ok_or_else(|| format!("the core copies into buffer {to:?} while it is in use"))?;
                target.fill(entry.at, &bytes);
                Ok(())
            }
            Action::Hash { op, buf, length } => {
                let bytes = &self.entry(buf, length)?.bytes()[..length as usize];
                let digest = digest_of(bytes);
                self.events.push_back(Event::HashDone { op, digest });
                Ok(())
            }
            Action::IsZero { op, buf, length } => {
                let zero = is_zero(&self.entry(buf, length)?.bytes()[..length as usize]);
                self.events.push_back(Event::ZeroCheck { op, zero });
                Ok(())
            }
            Action::Crc { op, buf, length } => {
                let bytes = &self.entry(buf, length)?.bytes()[..length as usize];
                let event = Event::CrcDone { op, crc: crc32fast::hash(bytes), zero: is_zero(bytes) };
                self.events.push_back(event);
                Ok(())
            }
            Action::SurplusBegin { about } => {
                let volumes = self.volumes.iter().map(|volume| volume.name.clone()).collect();
                around.surplus.begin(&self.name, volumes, about);
                Ok(())
            }
            Action::SurplusWrite { op, save, volume, offset, length, buf } => {
                let bytes = self.entry(buf, length)?.bytes()[..length as usize].to_vec();
                around.surplus.write((self.index, op), save, volume.0 as usize, offset, bytes);
                Ok(())
            }
            Action::SurplusEnd { op, save, keep } => {
                around.surplus.end((self.index, op), save, keep);
                Ok(())
            }
            Action::Send { peer, session, mut header, payload } => {
                let at = self.peer(peer)?;
                if header.kind == FrameKind::Write {
                    self.peers[at].acks.sent(header.position, around.now);
                }
                match payload {
                    Payload::None => around.link.send(session, &header),
                    Payload::Body(body) => around.link.send_body(session, header, &body),
                    Payload::Buf { buf, crc_known } => {
                        let entry = self.entry(buf, header.payload_length)?;
                        let range = entry.at..entry.at + header.payload_length as usize;
                        if !crc_known {
                            header.payload_crc = crc32fast::hash(&entry.buf.as_slice()[range.clone()]);
                        }
                        around.link.send_data(session, &header, entry.buf.clone(), range);
                    }
                }
                self.peers[at].metrics.sent_bytes.increment(u64::from(header.payload_length));
                Ok(())
            }
            Action::Connect { peer } => {
                self.peer(peer)?;
                self.call(peer, around.link, around.log);
                Ok(())
            }
            Action::Close { peer, session, code, text, reconnect } => {
                let at = self.peer(peer)?;
                around.link.close(self.peers[at].link, session, code, &text, reconnect);
                Ok(())
            }
            Action::Complete { request, status } => {
                let mut sink = Sink { table: &mut self.table, events: &mut self.events, memory: around.memory };
                if let Some(ended) = self.requests.completed(around.now, request, status, &mut sink)? {
                    self.record(ended);
                }
                Ok(())
            }
            Action::Granted { request } => {
                let mut sink = Sink { table: &mut self.table, events: &mut self.events, memory: around.memory };
                if let Some(ended) = self.requests.granted(around.now, request, &mut sink)? {
                    self.record(ended);
                }
                Ok(())
            }
            Action::RoleChanged { role, epoch } => {
                self.role = role;
                self.epoch = epoch;
                self.exports.role_changed(role, epoch);
                tracing::info!(service = self.name, ?role, epoch = epoch.number, "role changed");
                Ok(())
            }
            Action::MakeRoom { volume, size } => {
                self.files(volume)?;
                around.grower.ask(self.index, volume, size);
                Ok(())
            }
            Action::Resized { volume, size } => {
                let at = volume.0 as usize;
                self.files(volume)?;
                self.volumes[at].size = size;
                Ok(())
            }
            Action::AdminDone { admin, result } => {
                if let Some((answer, ends)) = self.admins.try_remove(admin.0 as usize) {
                    if ends && result.is_ok() {
                        self.role = Role::Detached;
                        self.exports.role_changed(Role::Detached, self.epoch);
                        self.release(around);
                    }
                    let named = |text: &str| self.named(text);
                    let result = match result {
                        Ok(text) => Ok(named(&text)),
                        Err(refusal) => Err(Refusal {
                            kind: refusal.kind,
                            what: named(&refusal.what),
                            kept: named(&refusal.kept),
                            next: named(&refusal.next),
                        }),
                    };
                    // Whoever asked may have gone away.
                    let _ = answer.send(result);
                }
                Ok(())
            }
            Action::Notice(notice) => {
                self.notice(around.log, notice);
                Ok(())
            }
            // Without an agent each copy keeps its own record (`StoreKind::Own`), and its core never asks for another.
            Action::StoreRead { .. } | Action::StoreSwap { .. } => {
                Err("the core asked for a cluster store that it was not given".into())
            }
            Action::Halt { reason } => Err(reason),
        }
    }

    /// Has the link try to reach a peer from now on.
    pub fn call(&self, slot: Slot, link: &LinkPort, log: &EventLog) {
        let Some(peer) = self.peers.iter().find(|peer| peer.slot == slot) else {
            return;
        };
        if let Err(error) = link.connect(peer.link) {
            let text = format!(
                "{error}. Writes go on by the rules for a missing copy; let it join (`holdfast token`, `holdfast join`), and it is \
                 called at once"
            );
            self.say(log, Level::Error, "peer-unknown", Some(slot), text);
        }
    }

    /// Gives the disks up, so that tools may open them. One with an unfinished request stays locked.
    fn release(&mut self, around: &Surroundings) {
        for volume in &self.volumes {
            let files = [
                Some(volume.data),
                (volume.meta != volume.data).then_some(volume.meta),
            ];
            for file in files.into_iter().flatten() {
                match around.ring.detach(file) {
                    Ok(backing) => drop(backing),
                    Err(error) => {
                        let text = format!(
                            "volume {} stays locked until this process ends: {error}",
                            volume.name
                        );
                        self.say(around.log, Level::Warning, "disk-kept", None, text);
                    }
                }
            }
        }
    }

    fn read(
        &mut self,
        around: &Surroundings,
        token: u64,
        file: FileId,
        offset: u64,
        length: u32,
        buf: holdfast_replicator_core::api::BufId,
    ) -> Result<(), String> {
        let entry = self
            .table
            .get_mut(buf)
            .filter(|entry| entry.len >= length as usize);
        let entry = entry
            .ok_or_else(|| format!("the core reads into buffer {buf:?}, which is not there"))?;
        let target = entry
            .read_target()
            .ok_or_else(|| format!("the core reads into buffer {buf:?} while it is in use"))?;
        around.ring.push(
            Op::Read {
                file,
                offset,
                buf: target,
                buf_offset: entry.at,
                len: length,
            },
            token,
        );
        Ok(())
    }

    fn token(&self, op: OpId, volume: VolumeIndex, what: What) -> u64 {
        Token {
            service: self.index,
            what,
            volume,
            op,
        }
        .pack()
    }

    fn files(&self, volume: VolumeIndex) -> Result<&VolumeFiles, String> {
        self.volumes
            .get(volume.0 as usize)
            .ok_or_else(|| format!("the core names volume {}, which does not exist", volume.0))
    }

    fn meta(&self, place: MetaPlace) -> Result<(FileId, u64), String> {
        let files = self.files(place.volume)?;
        Ok((files.meta, files.meta_base + place.offset))
    }

    fn entry(
        &self,
        buf: holdfast_replicator_core::api::BufId,
        length: u32,
    ) -> Result<&Entry, String> {
        let entry = self
            .table
            .get(buf)
            .filter(|entry| entry.len >= length as usize);
        entry.ok_or_else(|| {
            format!("the core uses {length} bytes of buffer {buf:?}, which are not there")
        })
    }

    fn peer(&self, slot: Slot) -> Result<usize, String> {
        let at = self.peers.iter().position(|peer| peer.slot == slot);
        at.ok_or_else(|| format!("the core names slot {}, which is no peer", slot.0))
    }

    /// A completion of the ring: told to the core, counted, and said loudly when it is a failure.
    pub fn disk_done(
        &mut self,
        token: Token,
        completion: holdfast_disk::Completion,
        log: &EventLog,
    ) {
        let took = completion.took.as_secs_f64();
        let result = match completion.result {
            Ok(()) => Ok(()),
            Err(error) => {
                let kind = match error.kind {
                    DiskErrorKind::NoSpace => DiskError::NoSpace,
                    DiskErrorKind::BeyondEnd { .. } => DiskError::BeyondEnd,
                    _ => DiskError::Io,
                };
                let text = format!(
                    "{error}. What follows from it is decided by the replication rules and logged next"
                );
                self.say(log, Level::Error, "disk-error", None, text);
                if let Some(volume) = self.volumes.get(token.volume.0 as usize) {
                    volume.metrics.disk_errors.increment(1);
                }
                Err(kind)
            }
        };
        if let Some(volume) = self.volumes.get(token.volume.0 as usize) {
            match token.what {
                What::Read => volume.metrics.disk_reads.record(took),
                What::Write => volume.metrics.disk_writes.record(took),
                What::Flush => volume.metrics.disk_flushes.record(took),
                What::Metadata => volume.metrics.disk_metadata.record(took),
            }
        }
        let op = token.op;
        self.events.push_back(match token.what {
            What::Metadata => Event::MetaDone { op, result },
            _ => Event::DiskDone { op, result },
        });
    }

    /// Says when a disk has been silent for long, and when it speaks again.
    pub fn watch_disks(&mut self, ring: &Ring, log: &EventLog) {
        let now = std::time::Instant::now();
        for at in 0..self.volumes.len() {
            if self.role == Role::Detached {
                return;
            }
            let volume = &self.volumes[at];
            let oldest = [volume.data, volume.meta]
                .into_iter()
                .filter_map(|file| ring.oldest_of(file, now))
                .map(|(_, age)| age.as_secs())
                .max()
                .unwrap_or(0);
            let hung = oldest >= HUNG_AFTER_SECONDS;
            if hung == volume.hung {
                continue;
            }
            let name = volume.name.clone();
            self.volumes[at].hung = hung;
            if hung {
                let text = format!(
                    "the disk of volume {name} has not answered a request for {oldest} s. Its requests are kept, since it may \
                     still carry them out; check the device (dmesg, smartctl). To free the application, stop this node \
                     and promote another copy: a stop waits {HUNG_STOP_SECONDS} s for such a disk, then ends as a crash would, which is safe"
                );
                self.say(log, Level::Error, "disk-hung", None, text);
            } else {
                self.say(
                    log,
                    Level::Info,
                    "disk-answers",
                    None,
                    format!("the disk of volume {name} answers again"),
                );
            }
        }
    }

    /// Names of volumes whose disk was reported as silent and has not answered since.
    pub fn hung_volumes(&self) -> Vec<String> {
        let hung = self.volumes.iter().filter(|volume| volume.hung);
        hung.map(|volume| volume.name.clone()).collect()
    }

    fn record(&self, ended: Ended) {
        let Some(volume) = self.volumes.get(ended.volume.0 as usize) else {
            return;
        };
        let leg = match ended.kind {
            Kind::Read => &volume.metrics.reads,
            Kind::Write => &volume.metrics.writes,
            Kind::Flush => &volume.metrics.flushes,
            Kind::Zero => &volume.metrics.zeroes,
        };
        leg.record(ended.bytes, ended.nanoseconds as f64 / 1e9, ended.ok);
    }

    fn notice(&self, log: &EventLog, notice: Notice) {
        self.say(log, notice.level, notice.kind, notice.peer, notice.text);
    }

    /// A line for the event log and the process's own log.
    pub fn say(&self, log: &EventLog, level: Level, kind: &str, peer: Option<Slot>, text: String) {
        let peer = peer.map(|slot| {
            self.peer_name(slot)
                .unwrap_or_else(|| format!("slot-{}", slot.0))
        });
        let text = self.named(&text);
        let service = self.name.as_str();
        match level {
            Level::Info => tracing::info!(service, kind, ?peer, "{text}"),
            Level::Warning => tracing::warn!(service, kind, ?peer, "{text}"),
            Level::Error => tracing::error!(service, kind, ?peer, "{text}"),
        }
        log.append(EventReport {
            time_ms: now_ms(),
            level: LevelName::from(level),
            kind: kind.to_owned(),
            service: self.name.clone(),
            peer,
            text,
        });
    }

    /// A text of the core with the names of nodes and volumes in it.
    pub fn named(&self, text: &str) -> String {
        let text = words::named(text, &|slot| self.node_name(slot));
        words::named_volumes(&text, &|index| {
            self.volumes.get(index).map(|volume| volume.name.clone())
        })
    }

    /// The name of the node that holds a slot, this one included.
    pub fn node_name(&self, slot: Slot) -> Option<String> {
        if slot == self.slot {
            Some(self.node.clone())
        } else {
            self.peer_name(slot)
        }
    }

    /// The configured name of a peer's node.
    pub fn peer_name(&self, slot: Slot) -> Option<String> {
        self.peers
            .iter()
            .find(|peer| peer.slot == slot)
            .map(|peer| peer.name.clone())
    }
}

/// An answer of a disk.
fn is_disk(event: &Event) -> bool {
    matches!(event, Event::DiskDone { .. } | Event::MetaDone { .. })
}

/// Whether all bytes are zero; 64 at a time, which the compiler turns into wide registers.
fn is_zero(bytes: &[u8]) -> bool {
    let chunks = bytes.chunks_exact(64);
    let rest = chunks.remainder().iter().all(|byte| *byte == 0);
    rest && chunks
        .into_iter()
        .all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

/// What two copies compare instead of the bytes: the first 128 bits of their SHA-256.
fn digest_of(bytes: &[u8]) -> u128 {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref()[..16]
        .iter()
        .fold(0, |all, byte| all << 8 | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_as_it_was() {
        for token in [
            Token {
                service: 0,
                what: What::Read,
                volume: VolumeIndex(0),
                op: OpId(0),
            },
            Token {
                service: 7,
                what: What::Write,
                volume: VolumeIndex(1),
                op: OpId(9),
            },
            Token {
                service: 16_382,
                what: What::Metadata,
                volume: VolumeIndex(63),
                op: OpId((1 << OP_BITS) - 1),
            },
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn one_set_bit_anywhere_is_seen() {
        let mut bytes = vec![0; 200];
        assert!(is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
