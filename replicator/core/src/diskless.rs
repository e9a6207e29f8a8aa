//! A primary whose own disk failed goes on through the disk of a member of S (D13).
//!
//! States and frames are in `docs/core.md`. The failing side holds requests, has the server flush everything it
//! sent so far, and asks it to take over (`DiskLost`). The server durably opens a generation in which it alone is S,
//! keeps bits toward the failed copy from there on, and answers (`DiskLostAck`). Only then does anything complete
//! again: every write is sent FUA and read requests are answered by the server, whatever the mode of replication.

use crate::api::*;
use crate::cluster_store::Change;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use std::collections::BTreeMap;

/// How far the service is from going on through the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// The server makes durable what it received up to this position.
    Flushing(Position),
    /// `DiskLost` was sent.
    Recording,
    /// The server alone is S: requests are served.
    Serving,
    /// The server is unreachable: requests wait.
    Away,
    /// The server lost what it had not flushed: nothing is served until a person demotes this copy.
    Lost,
}

/// A primary without a disk of its own.
#[derive(Debug)]
pub(crate) struct Diskless {
    pub server: Slot,
    pub phase: Phase,
    /// The server recorded that it alone is S: what it lost before that is known to matter no more.
    pub taken_over: bool,
    /// Reads on their way to the server, by the number the frame carries.
    pub reads: BTreeMap<u64, usize>,
    pub next_read: u64,
    /// Operations that go on once requests are served, in order.
    pub waiting: Vec<usize>,
}

impl Core {
    /// Requests wait for the server.
    pub(crate) fn diskless_holds(&self) -> bool {
        self.diskless
            .as_ref()
            .is_some_and(|d| !matches!(d.phase, Phase::Serving | Phase::Lost))
    }

    /// No disk here, and the server cannot be reached or lost what it had.
    pub(crate) fn diskless_alone(&self) -> bool {
        self.diskless
            .as_ref()
            .is_some_and(|d| matches!(d.phase, Phase::Away | Phase::Lost))
    }

    pub(crate) fn diskless_serves(&self) -> bool {
        self.diskless
            .as_ref()
            .is_some_and(|d| d.phase == Phase::Serving)
    }

    /// This copy can do nothing for an application any more.
    pub(crate) fn out_of_service(&self) -> bool {
        match &self.diskless {
            None => self.failed,
            Some(diskless) => diskless.phase == Phase::Lost,
        }
    }

    /// The peer that may serve: a member of the committed and the pending S that gets every write now.
    pub(crate) fn diskless_server(&self) -> Option<usize> {
        if self.role != Role::Primary || self.dropping || !self.generation_unknown_to.is_empty() {
            return None;
        }
        (0..self.peers.len()).find(|at| {
            let peer = &self.peers[*at];
            matches!(peer.relation, Relation::Established)
                && peer.session.is_some()
                && peer.mode != Mode::Async
                && self.sb.in_sync.contains(peer.slot)
                && self.sb.in_sync_pending.contains(peer.slot)
                && self.known_as_a_member(peer)
        })
    }

    /// C1: under `suspend`, a member of S that knows of no third one may be promoted once the owner of the epoch is away. So who serves
    /// must be known to all of them.
    fn known_as_a_member(&self, peer: &Peer) -> bool {
        let members = self.sb.in_sync.union(self.sb.in_sync_pending);
        self.sb.on_peer_loss != OnPeerLoss::Suspend
            || self.store.is_cluster()
            || !peer.unaware.iter().any(|(slot, _)| members.contains(*slot))
    }

    /// The own disk failed: tries to go on without it. False if no copy can serve.
    pub(crate) fn go_diskless(&mut self, what: &str, out: &mut Actions) -> bool {
        let Some(at) = self.diskless_server() else {
            return false;
        };
        let server = self.peers[at].slot;
        let text = format!(
            "{what}: this copy's data counts as lost until the disk is replaced. The service goes on through copy {}, \
             which now holds the only current data: replace the disk, or move the service there",
            server.0
        );
        self.notice(Level::Error, "disk-failed", Some(server), text, out);
        for other in 0..self.peers.len() {
            if other != at {
                self.close(other, GoodbyeCode::DiskFailed, what, false, out);
            }
        }
        self.diskless = Some(Diskless {
            server,
            phase: Phase::Flushing(0),
            taken_over: false,
            reads: BTreeMap::new(),
            next_read: 1,
            waiting: Vec::new(),
        });
        // Whatever waited for the log or for a flush of this disk waits for the server instead.
        let waiting = std::mem::take(&mut self.log_waiting);
        for key in waiting {
            self.diskless_wait(key);
        }
        let flushes: Vec<FlushFor> = std::mem::take(&mut self.flush.running)
            .into_iter()
            .chain(std::mem::take(&mut self.flush.waiting))
            .collect();
        for waiter in flushes {
            if let FlushFor::Client(key) = waiter
                && let Some(Op::Client(op)) = self.ops.get_mut(key)
            {
                op.local_left = 0;
            }
        }
        self.stable_flush_running = false;
        self.diskless_flush(out);
        true
    }

    pub(crate) fn diskless_wait(&mut self, key: usize) {
        if let Some(diskless) = &mut self.diskless {
            diskless.waiting.push(key);
        }
    }

    /// The server makes durable what it has: from here on nothing completed may be in its cache alone.
    fn diskless_flush(&mut self, out: &mut Actions) {
        let position = self.begin_flush(None, out);
        if let Some(diskless) = &mut self.diskless {
            diskless.phase = Phase::Flushing(position);
        }
    }

    /// The server flushed up to `position`.
    pub(crate) fn diskless_flushed(&mut self, at: usize, position: Position, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        let Phase::Flushing(asked) = diskless.phase else {
            return;
        };
        if diskless.server != slot || position < asked {
            return;
        }
        diskless.phase = Phase::Recording;
        let body = Body::DiskLost {
            generation_cause: GenerationCause::DiskLost,
            position: asked,
        };
        self.send_body(at, FrameKind::DiskLost, body, out);
    }

    /// The server recorded its generation: requests go on.
    pub(crate) fn disk_lost_ack(&mut self, at: usize, header: &FrameHeader, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let recording = self
            .diskless
            .as_ref()
            .is_some_and(|d| d.phase == Phase::Recording && d.server == slot);
        if !recording || self.role == Role::Secondary {
            self.bad_frame(at, "nobody asked it to take over", out);
            return;
        }
        if header.generation != self.generation() {
            let generation = Generation {
                id: header.generation,
                parent: self.generation(),
                fork_position: header.position.saturating_sub(self.sb.generation_base),
                epoch: self.sb.epoch_gate,
                cause: GenerationCause::DiskLost,
                maker: slot.0,
            };
            // In memory alone: this disk never hears of it, so its old data never looks current (D13).
            self.push_generation(generation);
            self.sb.generation_base = header.position;
        }
        let Some(session) = self.peers[at].session else {
            return;
        };
        if let Some(diskless) = &mut self.diskless {
            diskless.taken_over = true;
        }
        self.propose(Change::DiskLost { peer: at, session }, out);
    }

    /// The record names the server alone.
    pub(crate) fn server_recorded(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let asked = self
            .diskless
            .as_ref()
            .is_some_and(|d| d.server == slot && d.phase == Phase::Recording);
        self.sb.in_sync = SlotSet::only(slot);
        self.next_in_sync_version();
        self.sb.in_sync_pending = self.with_joining(self.sb.in_sync);
        if !asked || !self.peers[at].on(session) {
            return;
        }
        let text = format!("copy {} serves for this copy, whose disk failed", slot.0);
        self.notice(Level::Warning, "diskless", Some(slot), text, out);
        self.diskless_resume(at, out);
    }

    /// The server is there and alone in S: what waited goes on, in order.
    fn diskless_resume(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot.0 as usize;
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        diskless.phase = Phase::Serving;
        let waiting = std::mem::take(&mut diskless.waiting);
        self.parked = false;
        // A write whose frame was lost with a link is sent again, at a new place in the order.
        let mut again: Vec<(Position, usize)> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op)
                    if op.stage == Stage::Issued && !op.replied && op.legs[slot] == Leg::Bits =>
                {
                    Some((op.position, key))
                }
                _ => None,
            })
            .collect();
        again.sort_unstable();
        for (position, key) in again {
            if let Some(entry) = self.window.get_mut(position) {
                entry.op = NO_OP;
                entry.local_done = true;
            }
            let Some(Op::Client(op)) = self.ops.get_mut(key) else {
                continue;
            };
            let data_gone = matches!(op.data, Data::Buf { .. }) && !op.holds_buf;
            if op.internal || data_gone {
                // Its bytes went with the disk's answer; whether the server has them is not known.
                self.end_issued(key, Status::Io, out);
                continue;
            }
            op.stage = Stage::Log;
            self.issue(key, out);
        }
        // The disk may never answer what it was given: nobody waits for it any more.
        let stuck: Vec<usize> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op) if op.stage == Stage::Issued && op.in_overlap && !op.holds_buf => {
                    Some(key)
                }
                _ => None,
            })
            .collect();
        for key in stuck {
            if let Some(Op::Client(op)) = self.ops.get_mut(key) {
                op.in_overlap = false;
                self.leave_overlap(key, out);
            }
        }
        self.check_all(out);
        for key in waiting {
            match self.ops.get(key) {
                Some(Op::Client(_)) => self.issue(key, out),
                Some(Op::Read { .. }) => self.read_remotely(key, out),
                _ => {}
            }
        }
        self.release_held(out);
        self.demotion_progress(out);
    }

    /// A read goes to the server.
    pub(crate) fn read_remotely(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Read {
            volume,
            offset,
            length,
            ..
        }) = self.ops.get(key)
        else {
            return;
        };
        let (volume, offset, length) = (*volume, *offset, *length);
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        if diskless.phase != Phase::Serving {
            diskless.waiting.push(key);
            return;
        }
        let id = diskless.next_read;
        diskless.next_read += 1;
        diskless.reads.insert(id, key);
        let server = diskless.server;
        let Some(at) = self.peer_index(server) else {
            return;
        };
        let mut header = self.header(FrameKind::ReadRequest);
        header.volume = volume;
        header.offset = offset;
        header.length = length;
        header.position = id;
        self.send(at, header, Payload::None, out);
    }

    /// What the server read.
    pub(crate) fn read_reply(
        &mut self,
        at: usize,
        header: &FrameHeader,
        buf: BufId,
        out: &mut Actions,
    ) -> bool {
        let slot = self.peers[at].slot;
        let asked = self
            .diskless
            .as_mut()
            .filter(|d| d.server == slot)
            .and_then(|d| d.reads.remove(&header.position));
        let Some(key) = asked else {
            return self.bad_frame(at, "a reply to no read", out);
        };
        let Op::Read {
            request,
            buf: target,
            length,
            ..
        } = self.ops.remove(key)
        else {
            return self.bad_frame(at, "a reply to no read", out);
        };
        if header.length != length {
            out.push(Action::Complete {
                request,
                status: Status::Io,
            });
            return self.bad_frame(at, "a reply of another length than was asked for", out);
        }
        out.push(Action::CopyBuf {
            from: buf,
            to: target,
            length,
        });
        out.push(Action::ReleaseBuf { buf });
        out.push(Action::Complete {
            request,
            status: Status::Ok,
        });
        true
    }

    /// The link to the server ended.
    pub(crate) fn diskless_server_gone(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        if diskless.server != slot || diskless.phase == Phase::Lost {
            return;
        }
        diskless.phase = Phase::Away;
        let reads = std::mem::take(&mut diskless.reads);
        diskless.waiting.extend(reads.into_values());
        if self.role != Role::Primary {
            return self.diskless_end_reads(out);
        }
        self.parked = true;
        let text = format!(
            "requests wait: this copy has no disk and copy {}, which serves for it, cannot be reached; they go on when \
             it returns, or end with an error at demotion",
            slot.0
        );
        self.notice(Level::Error, "parked", Some(slot), text, out);
    }

    /// The server met us again: goes on where the loss of the link left it.
    pub(crate) fn diskless_agreed(&mut self, at: usize, out: &mut Actions) {
        self.peers[at].relation = Relation::Established;
        let slot = self.peers[at].slot;
        if self.diskless.as_ref().is_none_or(|d| d.server != slot) {
            // The other side: this copy serves for one whose disk failed.
            self.peers[at].flushed = self.issued;
            return;
        }
        self.peers[at].flushed = self.issued;
        let taken_over = self.diskless.as_ref().is_some_and(|d| d.taken_over);
        if taken_over && self.sb.in_sync != SlotSet::only(slot) {
            // The session ended before the record said that the server is alone in S (C1).
            if let Some(diskless) = &mut self.diskless {
                diskless.phase = Phase::Recording;
            }
            if let Some(session) = self.peers[at].session {
                self.propose(Change::DiskLost { peer: at, session }, out);
            }
            return;
        }
        if taken_over {
            // All that completed since was FUA: no restart of the server lost any of it.
            return self.diskless_resume(at, out);
        }
        self.diskless_flush(out);
    }

    /// The server came back before it had flushed: did it keep what it acknowledged?
    pub(crate) fn diskless_meets(
        &mut self,
        at: usize,
        incarnation_before: Incarnation,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let incarnation = self.peers[at].their_incarnation;
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        if diskless.server != slot || diskless.taken_over || incarnation == incarnation_before {
            return;
        }
        let flushed = self.peers[at].flushed;
        let unstable = self.window.above(flushed).any(|entry| entry.length > 0);
        if !unstable {
            return;
        }
        diskless.phase = Phase::Lost;
        let text = format!(
            "copy {} restarted before it had flushed, and this copy's disk failed: what completed last may be gone. \
             Every request ends with an error until this copy is demoted; then promote copy {} by force, which keeps \
             everything up to its last flush",
            slot.0, slot.0
        );
        self.notice(Level::Error, "volume-failed", Some(slot), text, out);
        self.diskless_end_reads(out);
        self.end_client_io(Status::Io, false, out);
    }

    /// Remote reads that will not be answered.
    pub(crate) fn diskless_end_reads(&mut self, out: &mut Actions) {
        let Some(diskless) = &mut self.diskless else {
            return;
        };
        let reads = std::mem::take(&mut diskless.reads);
        let waiting = std::mem::take(&mut diskless.waiting);
        for key in reads.into_values().chain(waiting) {
            if matches!(self.ops.get(key), Some(Op::Read { .. }))
                && let Op::Read { request, .. } = self.ops.remove(key)
            {
                out.push(Action::Complete {
                    request,
                    status: Status::Io,
                });
            }
        }
    }

    /// Nothing is in flight any more: this copy stops being primary, and says so to the server.
    pub(crate) fn diskless_demoted(&mut self, out: &mut Actions) {
        let alone = self.diskless_alone();
        let Some(diskless) = self.diskless.take() else {
            return;
        };
        self.diskless_buffers(out);
        let position = self.issued;
        self.release_window(out);
        self.role = Role::Secondary;
        if let Some(at) = self.peer_index(diskless.server) {
            if matches!(self.peers[at].relation, Relation::Established) {
                let mut header = self.header(FrameKind::Demoted);
                header.position = position;
                self.send(at, header, Payload::None, out);
            }
            self.close(
                at,
                GoodbyeCode::DiskFailed,
                "the disk of this copy failed",
                false,
                out,
            );
        }
        out.push(Action::RoleChanged {
            role: Role::Secondary,
            epoch: self.sb.epoch_gate,
        });
        let server = diskless.server.0;
        let (text, told) = if alone {
            // Under the rules of sync mode nothing was acknowledged without the server.
            let text = format!(
                "demoted without copy {server}, which held what was acknowledged and cannot be reached; what waited ended with \
                 an error"
            );
            (
                text.clone(),
                format!("secondary; its disk failed. It was {text}"),
            )
        } else {
            let told = format!(
                "secondary; its disk failed, copy {server} holds everything and can be promoted"
            );
            let text = format!("demoted at position {position}; copy {server} holds all of it");
            (text, told)
        };
        self.notice(Level::Info, "secondary", None, text, out);
        if let Some(Some(admin)) = self.demotion.take() {
            let result = Ok(told);
            out.push(Action::AdminDone { admin, result });
        }
        self.detach_progress(out);
    }

    /// Buffers of operations that were answered before the server had them.
    pub(crate) fn diskless_buffers(&mut self, out: &mut Actions) {
        for (_, op) in &mut self.ops {
            if let Op::Client(op) = op
                && let Data::Buf { buf, .. } = op.data
                && op.stage == Stage::Issued
                && std::mem::take(&mut op.holds_buf)
            {
                out.push(Action::ReleaseBuf { buf });
            }
        }
    }

    // --- the side that serves ---

    /// The primary's disk failed: from here on this copy alone is S.
    pub(crate) fn disk_lost(
        &mut self,
        at: usize,
        session: SessionId,
        position: Position,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let established = matches!(self.peers[at].relation, Relation::Established);
        if !self.peers[at].is_primary || !established || self.role != Role::Secondary {
            self.bad_frame(
                at,
                "a copy asks for this disk that is not primary here",
                out,
            );
            return;
        }
        if self.peers[at].diskless {
            // Our answer was lost with the link.
            return self.disk_lost_stored(at, session, out);
        }
        let whole = self.sb.state == CopyState::UpToDate || self.sb.state == CopyState::Complete;
        if !whole || self.failed || self.issued != position || self.local_flushed < position {
            self.bad_frame(at, "this copy does not hold what it is to serve", out);
            return;
        }
        // What the failed disk may lack: everything it had not flushed (D7), and all that comes (`remember_for_others`).
        let entries: Vec<Entry> = self
            .window
            .iter()
            .filter(|entry| entry.length > 0)
            .copied()
            .collect();
        for entry in entries {
            self.set_bits(at, entry.volume, entry.offset, entry.length);
        }
        self.peers[at].diskless = true;
        self.sb.state = CopyState::UpToDate;
        self.sb.in_sync = SlotSet::only(self.slot);
        self.sb.in_sync_pending = self.sb.in_sync;
        self.sb.in_sync_version += 1;
        self.sb.flags.solo = true;
        self.sb.flags.zeroed = false;
        self.unclean_start = false;
        self.new_generation(GenerationCause::DiskLost);
        let text = format!(
            "the disk of copy {} failed: it goes on through this copy, which alone holds current data",
            slot.0
        );
        self.notice(Level::Error, "disk-lost", Some(slot), text, out);
        for other in 0..self.peers.len() {
            // The primary stopped mirroring to the others before it asked: they hold what this copy held, and nothing says
            // to them that it goes on without them (C1).
            if other != at && self.peers[other].session.is_some() {
                self.meet_again(other, "this copy alone goes on for the primary", out);
            }
        }
        self.commit(Then::DiskLostStored { peer: at, session }, out);
    }

    pub(crate) fn disk_lost_stored(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session) || self.commit_pending() {
            // Asked for again when it meets us again, or answered by the commit on its way.
            return;
        }
        let mut header = self.header(FrameKind::DiskLostAck);
        header.position = self.sb.generation_base;
        self.send(at, header, Payload::None, out);
    }

    /// The primary without a disk reads through ours.
    pub(crate) fn read_request(
        &mut self,
        at: usize,
        session: SessionId,
        header: &FrameHeader,
        out: &mut Actions,
    ) {
        let served = self.peers[at].diskless
            && self.peers[at].is_primary
            && matches!(self.peers[at].relation, Relation::Established);
        if !served || !self.range_ok(header) || header.length > MAX_PAYLOAD {
            self.bad_frame(at, "a read that nobody may ask for here", out);
            return;
        }
        let buf = self.alloc_buf(header.length, out);
        let op = self.ops.insert(Op::ServeRead {
            peer: self.peers[at].slot,
            session: session.0,
            id: header.position,
            buf,
            length: header.length,
        });
        out.push(Action::DiskRead {
            op: OpId(op as u64),
            volume: header.volume,
            offset: header.offset,
            length: header.length,
            buf,
        });
    }

    pub(crate) fn serve_read_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let Op::ServeRead {
            peer,
            session,
            id,
            buf,
            length,
        } = self.ops.remove(key)
        else {
            return;
        };
        if let (Some(at), Ok(())) = (self.peer_index(peer), result)
            && self.peers[at].on(SessionId(session))
        {
            let mut header = self.header(FrameKind::ReadReply);
            header.position = id;
            header.length = length;
            header.payload_length = length;
            let payload = Payload::Buf {
                buf,
                crc_known: false,
            };
            self.send(at, header, payload, out);
        }
        out.push(Action::ReleaseBuf { buf });
        if result.is_err() {
            self.disk_failed("a read for a primary without a disk failed", out);
        }
    }
}
