//! The core of one copy of one service: its state, the dispatch of events, superblock commits and timers.
//!
//! The other modules of this folder are `impl Core` blocks, one per concern.

use crate::activity_log::ActivityLog;
use crate::api::*;
use crate::log_recovery::LogRecovery;
use crate::op::*;
use crate::overlap::OverlapIndex;
use crate::peer::*;
use crate::status::Counters;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::*;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

/// What is to happen once the superblock that contains it is durable.
#[derive(Clone, Debug)]
pub(crate) enum Then {
    Nothing,
    Attached,
    TargetRecorded {
        peer: usize,
        session: SessionId,
    },
    SourceRecorded {
        peer: usize,
        session: SessionId,
    },
    /// S without a lost copy, and a new generation.
    PeerDropped,
    /// A new generation that the cluster's record is to name: told to the others before it does.
    GenerationBegun,
    GateRaised {
        peer: usize,
        session: SessionId,
        epoch: Epoch,
    },
    /// This copy's own gate is raised: now the others are asked.
    EpochTaken {
        epoch: Epoch,
    },
    Promoted,
    GenerationStored {
        peer: usize,
        session: SessionId,
        generation: GenerationId,
    },
    CompleteStored {
        peer: usize,
        session: SessionId,
    },
    Joined {
        peer: usize,
        session: SessionId,
    },
    InSyncStored,
    Demoted,
    Detached,
    /// The lead volume's new size.
    Grown,
    Admin {
        admin: AdminId,
        text: String,
    },
    RolledBack,
    /// `undo_lost` is durable, or the copy it belonged to is given up.
    UndoOver,
    /// A primary's disk failed and this copy serves for it.
    DiskLostStored {
        peer: usize,
        session: SessionId,
    },
}

/// Writes of the lead superblock: one in flight, the rest accumulates.
#[derive(Debug, Default)]
pub(crate) struct Commit {
    pub in_flight: Option<Vec<Then>>,
    pub waiting: Vec<Then>,
}

/// A flush frame of that peer, to be acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushDue {
    pub peer: usize,
    pub session: SessionId,
    pub ticket: u64,
    pub position: Position,
    pub resync_sequence: u64,
}

/// Who waits for a local flush.
#[derive(Clone, Debug)]
pub(crate) enum FlushFor {
    Client(usize),
    /// A flush frame of that peer.
    Peer(FlushDue),
    /// Everything before ResyncDone.
    Complete {
        peer: usize,
        session: SessionId,
    },
    Detach,
    /// This copy is about to become a target: the point its undo leads back to.
    Target {
        peer: usize,
        session: SessionId,
    },
    /// Old blocks were restored.
    Rollback,
    /// A generation is about to be made.
    Promotion,
    DropPeer,
    DropTarget {
        peer: usize,
        session: SessionId,
    },
}

/// Local flushes: rounds, one at a time; who comes while one runs waits for the next (group commit).
#[derive(Debug, Default)]
pub(crate) struct LocalFlush {
    pub round: u64,
    pub left: u32,
    /// A round is over and those who waited for it are being told.
    pub ending: bool,
    pub failed: bool,
    pub covers: Position,
    pub running: Vec<FlushFor>,
    pub waiting: Vec<FlushFor>,
}

/// One volume of the service on this copy.
#[derive(Debug)]
pub(crate) struct Volume {
    pub id: Uuid,
    pub name: String,
    pub disk: Uuid,
    pub size: u64,
    /// Up to here it can grow at once: the layout is one for it, and what is behind `size` reads zero.
    pub room: u64,
    pub sector_size: u32,
    pub grain_shift: u8,
    pub layout: Layout,
    pub superblock: Superblock,
    /// Written since the last local flush began.
    pub unflushed: bool,
    /// Its disk id is not the one the lead superblock knows: nothing on it counts.
    pub blank: bool,
    pub unread: crate::unread::Unread,
}

/// A promotion under way.
#[derive(Debug)]
pub(crate) struct Promotion {
    pub admin: AdminId,
    pub epoch: Epoch,
    /// It is a force: its generation says so.
    pub force: bool,
    /// A person allowed a force, whether or not it came to that.
    pub insisted: bool,
    /// Copies whose reply or acknowledgement is missing.
    pub waiting_for: SlotSet,
    /// Copies that raised their gate.
    pub agreed: SlotSet,
    /// Every reply is there: the new generation is on its way to the disk.
    pub committed: bool,
    /// Gate, generation and S are on the disk.
    pub durable: bool,
    /// S and generation are in the cluster's record: asked for, and so.
    pub proposed: bool,
    pub recorded: bool,
    pub reason: String,
}

/// The deciding half of a replicator, for one service and copy.
pub struct Core {
    pub(crate) slot: Slot,
    pub(crate) tuning: Tuning,
    pub(crate) now: Time,
    pub(crate) rng: u64,
    pub(crate) sb: Superblock,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) commit: Commit,
    pub(crate) role: Role,
    pub(crate) attached: bool,
    pub(crate) unclean_start: bool,
    /// Primary in the attachment that ended uncleanly.
    pub(crate) was_primary_before: bool,
    pub(crate) failed: bool,
    pub(crate) peers: Vec<Peer>,
    pub(crate) ops: Slab<Op>,
    pub(crate) overlap: OverlapIndex,
    pub(crate) log: ActivityLog,
    pub(crate) log_recovery: LogRecovery,
    pub(crate) log_waiting: VecDeque<usize>,
    pub(crate) log_in_flight: bool,
    pub(crate) pages_in_flight: usize,
    pub(crate) window: Window,
    /// Secondary: whose order the window holds. Positions of two primaries do not compare.
    pub(crate) window_of: Option<Slot>,
    /// Primary: last position issued. Secondary: last received.
    pub(crate) issued: Position,
    pub(crate) completed_max: Position,
    pub(crate) local_flushed: Position,
    pub(crate) flush: LocalFlush,
    pub(crate) stable_flush_running: bool,
    /// S is losing a member: what is stable without it is told only once every follower knows S without it, so that
    /// none of them lets go of what that member lacks.
    pub(crate) stable_held: Option<Position>,
    pub(crate) last_stable_flush: Time,
    pub(crate) held: VecDeque<Event>,
    pub(crate) suspended: bool,
    pub(crate) pieces: BTreeMap<RequestId, PieceState>,
    pub(crate) next_buf: u64,
    pub(crate) dropping: bool,
    /// A generation made while serving is on its way to the disk: nobody hears of it, and nothing is issued in it,
    /// before it is there (a generation that only a peer knows would have no source after a power cut).
    pub(crate) generation_committing: bool,
    /// Client operations that wait for that.
    pub(crate) issue_waiting: Vec<usize>,
    /// After `PeerDropped`: copies that must know the new generation before anything completes (D10).
    pub(crate) generation_unknown_to: SlotSet,
    pub(crate) promotion: Option<Promotion>,
    pub(crate) promotion_wanted: Option<crate::promotion::WantedPromotion>,
    pub(crate) demote_flush_sent: bool,
    pub(crate) demotion_recording: bool,
    pub(crate) detach_flushed_once: bool,
    pub(crate) detach_recording: bool,
    pub(crate) save_queue: VecDeque<(usize, usize, u64)>,
    /// Flush acknowledgements that wait for bitmap pages: peer, session, ticket, position, resync sequence.
    pub(crate) acks_after_save: Vec<FlushDue>,
    pub(crate) demotion: Option<Option<AdminId>>,
    pub(crate) detaching: Option<AdminId>,
    pub(crate) locks: BTreeMap<RequestId, usize>,
    pub(crate) counters: Counters,
    /// Client writes that wait for a missing member of S.
    pub(crate) parked: bool,
    pub(crate) undo: crate::undoing::Undoing,
    pub(crate) resync_rate: crate::resync_rate::ResyncRate,
    pub(crate) surplus: Option<crate::surplus::Saving>,
    pub(crate) growing: crate::growth::Growing,
    /// The own disk failed and a member of S serves for it (D13).
    pub(crate) diskless: Option<crate::diskless::Diskless>,
    pub(crate) store: crate::cluster_store::ClusterStore,
}

/// A request in several pieces (large zeroes).
#[derive(Clone, Copy, Debug)]
pub(crate) struct PieceState {
    pub volume: VolumeIndex,
    pub next: u64,
    pub end: u64,
    pub unmap: bool,
    pub fua: bool,
    pub in_flight: u32,
    pub status: Status,
}

impl Core {
    /// Carries on with one event. Actions are appended in the order they are to be done.
    /// After a batch of events the shell calls [`Core::end_batch`].
    pub fn handle(&mut self, now: Time, event: Event, out: &mut Actions) {
        self.now = now;
        match event {
            Event::Read { .. }
            | Event::Write { .. }
            | Event::Zero { .. }
            | Event::Flush { .. }
            | Event::Lock { .. } => self.client(event, out),
            Event::Unlock { request } => self.unlock(request, out),
            Event::DiskDone { op, result } => self.disk_done(op, result, out),
            Event::MetaDone { op, result } => self.meta_done(op, result, out),
            Event::HashDone { op, digest } => self.hash_done(op, digest, out),
            Event::ZeroCheck { op, zero } => self.zero_checked(op, zero, out),
            Event::SurplusDone { op, result } => self.surplus_done(op, result, out),
            Event::RoomMade {
                volume,
                size,
                result,
            } => self.room_made(volume, size, result, out),
            Event::CrcDone { op, crc, zero } => self.undo_crc_done(op, crc, zero, out),
            Event::LinkUp {
                peer,
                session,
                path,
            } => self.link_up(peer, session, &path, out),
            Event::LinkDown {
                peer,
                session,
                reason,
            } => self.link_down(peer, session, &reason, out),
            Event::Control {
                peer,
                session,
                header,
                body,
            } => {
                self.control_frame(peer, session, &header, body, out);
            }
            Event::Data {
                peer,
                session,
                header,
                buf,
            } => self.data_frame(peer, session, &header, buf, out),
            Event::Drained {
                peer,
                session,
                bytes,
            } => self.drained(peer, session, bytes, out),
            Event::StoreRecord { id, record } => self.store_record(id, record, out),
            Event::StoreSwapped { id, outcome } => self.store_swapped(id, outcome, out),
            Event::Tick => {}
            Event::Admin { admin, command } => self.admin(admin, command, out),
        }
        self.timers(out);
    }

    /// Sends what was gathered over a batch of events: acknowledgements, stable positions.
    pub fn end_batch(&mut self, now: Time, out: &mut Actions) {
        self.now = now;
        for at in 0..self.peers.len() {
            self.send_acks(at, out);
        }
        self.watch_behind();
    }

    /// When to call with `Event::Tick` at the latest.
    pub fn deadline(&self) -> Option<Time> {
        if self.role == Role::Detached {
            return None;
        }
        let linked = self.peers.iter().any(|p| p.session.is_some());
        // A promotion waits for a time too: for a copy that is about to meet again, and does not.
        let busy =
            !self.window.is_empty() || self.promotion_wanted.is_some() || self.store.needs_time();
        let usual = self.now.after_ms(self.tuning.heartbeat_ms.min(100));
        let resync = self.resync_rate.ready_at().unwrap_or(usual).min(usual);
        (linked || busy).then_some(resync)
    }

    fn disk_done(&mut self, op: OpId, result: Result<(), DiskError>, out: &mut Actions) {
        let key = op.0 as usize;
        match self.ops.get(key) {
            Some(Op::Read { .. }) => self.read_done(key, result, out),
            Some(Op::ServeRead { .. }) => self.serve_read_done(key, result, out),
            Some(Op::Client(_)) => self.client_disk_done(key, result, out),
            Some(Op::Apply(_)) => self.apply_disk_done(key, result, out),
            Some(Op::LocalFlush) => self.local_flush_done(key, result, out),
            Some(Op::ResyncRead { .. }) => self.resync_read_done(key, result, out),
            Some(Op::VerifyRead { .. }) => self.verify_read_done(key, result, out),
            Some(Op::Undo { .. }) => self.undo_done(key, result, out),
            Some(Op::Surplus { .. }) => self.surplus_read(key, result, out),
            other => self.halt(
                out,
                &format!("disk answered operation {key} that is {other:?}"),
            ),
        }
    }

    fn meta_done(&mut self, op: OpId, result: Result<(), DiskError>, out: &mut Actions) {
        let key = op.0 as usize;
        match self.ops.get(key) {
            Some(Op::Superblock) => {
                self.ops.remove(key);
                self.superblock_done(result, out);
            }
            Some(Op::VolumeSuperblock { .. }) => self.volume_superblock_done(key, result, out),
            Some(Op::ActivityLog { .. }) => self.log_done(key, result, out),
            Some(Op::LogReset) => self.log_reset_done(key, result, out),
            Some(Op::BitmapPage { .. } | Op::BitmapSummary { .. }) => {
                self.page_done(key, result, out)
            }
            Some(Op::Undo { .. }) => self.undo_done(key, result, out),
            other => self.halt(
                out,
                &format!("metadata answered operation {key} that is {other:?}"),
            ),
        }
    }

    // --- superblock commits ---

    /// Makes the present `self.sb` durable, then does `then`.
    pub(crate) fn commit(&mut self, then: Then, out: &mut Actions) {
        if crate::planted::commit_not_awaited(&then) {
            self.commit(Then::Nothing, out);
            return self.then(then, out);
        }
        self.commit.waiting.push(then);
        self.pump_commit(out);
    }

    pub(crate) fn commit_pending(&self) -> bool {
        self.commit.in_flight.is_some() || !self.commit.waiting.is_empty()
    }

    fn pump_commit(&mut self, out: &mut Actions) {
        if self.commit.in_flight.is_some() || self.commit.waiting.is_empty() || self.failed {
            return;
        }
        self.sb.sequence += 1;
        // A lower bound that a power cut cannot take back.
        self.sb.position = self.held_position().min(self.local_flushed);
        let bytes = match holdfast_wire_format::superblock::encode(&self.sb) {
            Ok(bytes) => bytes.to_vec(),
            Err(error) => {
                return self.halt(out, &format!("the superblock cannot be encoded: {error}"));
            }
        };
        // D16: the two slots in turn; a torn write leaves the other.
        let offset = if self.sb.sequence.is_multiple_of(2) || planted!("one-superblock-slot") {
            0
        } else {
            4096
        };
        let op = self.ops.insert(Op::Superblock);
        self.commit.in_flight = Some(std::mem::take(&mut self.commit.waiting));
        self.counters.superblock_writes += 1;
        out.push(Action::MetaWrite {
            op: OpId(op as u64),
            place: MetaPlace {
                volume: VolumeIndex(0),
                offset,
            },
            bytes,
        });
    }

    fn superblock_done(&mut self, result: Result<(), DiskError>, out: &mut Actions) {
        let thens = self.commit.in_flight.take().unwrap_or_default();
        if result.is_err() || self.failed {
            self.commit.waiting.splice(0..0, thens);
            self.disk_failed("the superblock could not be written", out);
            return self.commits_failed(out);
        }
        for then in thens {
            self.then(then, out);
        }
        self.pump_commit(out);
    }

    /// The disk failed: nothing that waits for it to record anything happens, and who asked is told.
    pub(crate) fn commits_failed(&mut self, out: &mut Actions) {
        for then in std::mem::take(&mut self.commit.waiting) {
            if let Then::Admin { admin, .. } = then {
                let refusal = crate::roles::refusal(
                    "the disk of this copy failed before the change was recorded",
                    "The other copies are untouched",
                    "Look at the status; replace the disk",
                );
                out.push(Action::AdminDone {
                    admin,
                    result: Err(refusal),
                });
            }
        }
    }

    fn then(&mut self, then: Then, out: &mut Actions) {
        match then {
            Then::Nothing => {}
            Then::Attached => self.reset_log(out),
            Then::TargetRecorded { peer, session } => self.target_recorded(peer, session, out),
            Then::SourceRecorded { peer, session } => {
                self.generation_committed(out);
                self.source_recorded(peer, session, out);
            }
            Then::PeerDropped => {
                self.generation_committed(out);
                self.peer_dropped(out);
            }
            Then::GenerationBegun => self.generation_committed(out),
            Then::GateRaised {
                peer,
                session,
                epoch,
            } => self.gate_raised(peer, session, epoch, out),
            Then::EpochTaken { epoch } => self.epoch_taken(epoch, out),
            Then::Promoted => self.promotion_durable(out),
            Then::GenerationStored {
                peer,
                session,
                generation,
            } => {
                self.generation_stored(peer, session, generation, out);
            }
            Then::CompleteStored { peer, session } => self.complete_stored(peer, session, out),
            Then::Joined { peer, session } => self.joined(peer, session, out),
            Then::InSyncStored => self.undo_drop(out),
            Then::Demoted => self.demotion_durable(out),
            Then::Detached => self.detached(out),
            Then::Grown => self.lead_size_stored(out),
            Then::Admin { admin, text } => out.push(Action::AdminDone {
                admin,
                result: Ok(text),
            }),
            Then::RolledBack => self.rolled_back(out),
            Then::UndoOver => self.undo_drop(out),
            Then::DiskLostStored { peer, session } => self.disk_lost_stored(peer, session, out),
        }
    }

    // --- small helpers used everywhere ---

    /// Every position up to here is on this copy's disk.
    pub(crate) fn held_position(&self) -> Position {
        if self.window.is_empty() {
            self.issued
        } else {
            self.window.local_done_through(self.issued)
        }
    }

    pub(crate) fn generation(&self) -> GenerationId {
        self.sb.generations.last().map_or(GenerationId(0), |g| g.id)
    }

    pub(crate) fn peer_index(&self, slot: Slot) -> Option<usize> {
        self.peers.iter().position(|p| p.slot == slot)
    }

    pub(crate) fn random(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014): the seed is the shell's randomness.
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Starts a generation that grows from the present one at the position held.
    pub(crate) fn new_generation(&mut self, cause: GenerationCause) -> Generation {
        let mut id = GenerationId(self.random());
        while id.0 == 0 || self.sb.generations.iter().any(|g| g.id == id) {
            id = GenerationId(self.random());
        }
        let fork = self.local_flushed.min(self.held_position());
        let generation = Generation {
            id,
            parent: self.generation(),
            // A promise: all up to here is durable on this copy (the callers flush first).
            fork_position: fork.saturating_sub(self.sb.generation_base),
            epoch: self.sb.epoch_gate,
            cause,
            maker: self.slot.0,
        };
        self.push_generation(generation);
        self.sb.generation_base = fork;
        generation
    }

    pub(crate) fn push_generation(&mut self, generation: Generation) {
        append_generation(
            &mut self.sb.generations,
            &mut self.sb.generations_cut,
            generation,
        );
    }

    pub(crate) fn alloc_buf(&mut self, length: u32, out: &mut Actions) -> BufId {
        let buf = BufId(self.next_buf);
        self.next_buf += 1;
        out.push(Action::AllocBuf { buf, length });
        buf
    }

    pub(crate) fn notice(
        &self,
        level: Level,
        kind: &'static str,
        peer: Option<Slot>,
        text: String,
        out: &mut Actions,
    ) {
        out.push(Action::Notice(Notice {
            level,
            kind,
            peer,
            text,
        }));
    }

    pub(crate) fn halt(&mut self, out: &mut Actions, reason: &str) {
        self.failed = true;
        out.push(Action::Halt {
            reason: reason.to_owned(),
        });
    }

    /// A frame header toward one peer with everything that does not depend on the kind.
    pub(crate) fn header(&self, kind: FrameKind) -> FrameHeader {
        FrameHeader {
            // `send` puts in the version that was agreed with the receiver.
            epoch: self.sb.epoch_gate,
            generation: self.generation(),
            incarnation: self.sb.incarnation,
            stable_position: if self.role == Role::Primary {
                self.stable_position()
            } else {
                0
            },
            ..FrameHeader::new(kind, self.sb.service)
        }
    }

    pub(crate) fn send(
        &mut self,
        at: usize,
        mut header: FrameHeader,
        payload: Payload,
        out: &mut Actions,
    ) {
        let now = self.now;
        let peer = &mut self.peers[at];
        let Some(session) = peer.session else { return };
        if !header.kind.precedes_agreement() {
            header.version = peer.wire_version;
        }
        peer.last_sent = now;
        peer.stable_told = peer.stable_told.max(header.stable_position);
        if let Payload::Buf { .. } = payload {
            peer.queued_bytes += u64::from(header.length);
        }
        out.push(Action::Send {
            peer: peer.slot,
            session,
            header,
            payload,
        });
    }

    pub(crate) fn send_body(&mut self, at: usize, kind: FrameKind, body: Body, out: &mut Actions) {
        let header = self.header(kind);
        let payload = if body == Body::Empty {
            Payload::None
        } else {
            Payload::Body(body)
        };
        self.send(at, header, payload, out);
    }

    /// Ends a session from our side; what follows is the same as a lost link.
    pub(crate) fn close(
        &mut self,
        at: usize,
        code: GoodbyeCode,
        text: &str,
        reconnect: bool,
        out: &mut Actions,
    ) {
        let peer = &mut self.peers[at];
        let Some(session) = peer.session else { return };
        let slot = peer.slot;
        peer.last_error = text.to_owned();
        peer.again_since = crate::peer::meets_at_once(code).then_some(self.now);
        out.push(Action::Close {
            peer: slot,
            session,
            code,
            text: text.to_owned(),
            reconnect,
        });
        self.session_ended(at, text, out);
        if !reconnect {
            self.peers[at].relation = Relation::Refused;
        }
    }

    /// Heartbeats, time-outs, stability on time.
    fn timers(&mut self, out: &mut Actions) {
        self.watch_growth(out);
        if self.role == Role::Detached || (self.failed && self.diskless.is_none()) {
            return;
        }
        for at in 0..self.peers.len() {
            self.orphan_progress(at, out);
            let peer = &self.peers[at];
            if peer.session.is_none() {
                continue;
            }
            if self.now.ms_since(peer.last_heard) > self.tuning.peer_timeout_ms {
                let text = format!("nothing heard for {} ms", self.tuning.peer_timeout_ms);
                self.close(at, GoodbyeCode::Disconnect, &text, true, out);
                continue;
            }
            if let Relation::Waiting { since } = peer.relation
                && self.now.ms_since(since) > self.tuning.peer_timeout_ms
            {
                self.meet_again(
                    at,
                    "what neither copy could decide may be clear by now",
                    out,
                );
                continue;
            }
            if self.now.ms_since(peer.last_sent) >= self.tuning.heartbeat_ms {
                self.send_body(at, FrameKind::Heartbeat, Body::Empty, out);
            }
        }
        self.store_progress(out);
        self.resync_on_time(out);
        self.stability_on_time(out);
        self.watch_congestion(out);
        self.demotion_progress(out);
        self.detach_progress(out);
        self.promotion_known(out);
        self.try_promotion(out);
        self.greet_waiting(out);
        self.undo_prepare_progress(out);
    }
}

/// Adds a generation to a history, which forgets the oldest one when it is full, and says so: what is kept must fit a superblock
/// and a hello, also where it is another copy's.
pub(crate) fn append_generation(
    generations: &mut Vec<Generation>,
    cut: &mut bool,
    generation: Generation,
) {
    generations.push(generation);
    if generations.len() > MAX_GENERATIONS {
        generations.remove(0);
        *cut = true;
    }
}
