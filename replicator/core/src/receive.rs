//! Frames of the other copy: checks, the order in which a secondary applies them, acknowledgements.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    /// A frame with block data.
    pub(crate) fn data_frame(
        &mut self,
        slot: Slot,
        session: SessionId,
        header: &FrameHeader,
        buf: BufId,
        out: &mut Actions,
    ) {
        let Some(at) = self.frame_peer(slot, session, header, out) else {
            return out.push(Action::ReleaseBuf { buf });
        };
        let data = Data::Buf {
            buf,
            crc: header.payload_crc,
            crc_known: true,
        };
        let accepted = match header.kind {
            FrameKind::Write => self.receive_write(at, header, data, out),
            FrameKind::ResyncData => self.receive_resync(at, header, data, out),
            FrameKind::ReadReply => self.read_reply(at, header, buf, out),
            kind => self.bad_frame(at, &format!("{kind:?} with block data"), out),
        };
        if !accepted {
            out.push(Action::ReleaseBuf { buf });
        }
    }

    /// A frame without block data.
    pub(crate) fn control_frame(
        &mut self,
        slot: Slot,
        session: SessionId,
        header: &FrameHeader,
        body: Body,
        out: &mut Actions,
    ) {
        let Some(at) = self.frame_peer(slot, session, header, out) else {
            return;
        };
        match (header.kind, body) {
            (FrameKind::Hello, Body::Hello(hello)) => self.hello(at, session, hello, out),
            (
                FrameKind::Bitmap,
                Body::Bitmap {
                    volume,
                    page,
                    grain_shift,
                    words,
                },
            ) => {
                self.receive_bits(at, volume, page, grain_shift, &words, out);
            }
            (FrameKind::BitmapEnd, _) => self.bits_complete(at, session, out),
            (FrameKind::Ready, _) => self.ready(at, session, header.position, out),
            (FrameKind::Goodbye, Body::Goodbye { code, text }) => {
                self.goodbye(at, code, &text, out)
            }
            (FrameKind::Zero, _) => {
                self.receive_write(
                    at,
                    header,
                    Data::Zero {
                        unmap: header.flags.unmap,
                    },
                    out,
                );
            }
            (FrameKind::ResyncZero, _) => {
                self.receive_resync(at, header, Data::Zero { unmap: true }, out);
            }
            (FrameKind::Flush, _) => {
                self.receive_flush(at, header, out);
            }
            (FrameKind::WriteAck, Body::Acks { runs }) => {
                if let Some((_, last)) = runs.last().copied() {
                    let from = self.peers[at].slot;
                    for peer in &mut self.peers {
                        peer.knows_since(from, last);
                    }
                }
                for (first, last) in runs {
                    self.acknowledged(at, first, last, Leg::Acked, out);
                }
                self.after_acks(at, out);
            }
            (FrameKind::ReceivedAck, _) => self.received_ack(at, header.position, out),
            (
                FrameKind::FlushAck,
                Body::FlushAck {
                    position,
                    resync_sequence,
                },
            ) => {
                self.flush_ack(at, session, position, resync_sequence, out);
            }
            (FrameKind::Heartbeat, _) => {
                if header.length == 1 && self.role == Role::Primary {
                    self.peers[at].wants_stable = true;
                    self.flush_for_stability(out);
                }
            }
            (FrameKind::ResyncAck, Body::Acks { runs }) => self.resync_ack(at, session, &runs, out),
            (FrameKind::ResyncDone, Body::ResyncDone { position, equal }) => {
                self.peers[at].target.equal = equal;
                self.resync_done_received(at, position, header.dependency, out);
            }
            (FrameKind::CompleteAck, _) => self.complete_ack(at, session, out),
            (FrameKind::InSync, Body::InSync { set, version }) => {
                self.in_sync_told(at, set, version, out);
            }
            (
                FrameKind::PromoteRequest,
                Body::PromoteRequest {
                    epoch,
                    in_sync,
                    force,
                },
            ) => {
                let asks = crate::promotion::Asks {
                    epoch,
                    in_sync,
                    force,
                    generation: header.generation,
                };
                self.promote_request(at, session, asks, out);
            }
            (
                FrameKind::PromoteReply,
                Body::PromoteReply {
                    epoch,
                    accepted,
                    reason,
                },
            ) => {
                self.promote_reply(at, epoch, accepted, &reason, out);
            }
            (FrameKind::NewGeneration, Body::NewGeneration { generation }) => {
                self.generation_told(at, session, header, generation, out);
            }
            (FrameKind::GenerationAck, Body::GenerationAck { generation }) => {
                self.generation_ack(at, generation, out);
            }
            (FrameKind::DiskLost, Body::DiskLost { position, .. }) => {
                self.disk_lost(at, session, position, out);
            }
            (FrameKind::DiskLostAck, _) => self.disk_lost_ack(at, header, out),
            (FrameKind::ReadRequest, _) => self.read_request(at, session, header, out),
            (FrameKind::Demoted, _) => {
                self.peer_demoted(at, header.position, header.stable_position, out);
            }
            (FrameKind::VerifyRequest, Body::Verify { sequence, digest }) => {
                self.verify_request(at, header, sequence, digest, out);
            }
            (
                FrameKind::VerifyReply,
                Body::VerifyReply {
                    sequence,
                    equal,
                    failed,
                },
            ) => {
                self.verify_reply(at, session, sequence, equal, failed, out);
            }
            (FrameKind::Grow, Body::Grow { size, step, text }) => {
                self.peer_grows(at, session, header.volume, size, step, &text, out);
            }
            (kind, _) => {
                self.bad_frame(at, &format!("{kind:?} is not understood here"), out);
            }
        }
    }

    /// Which peer a frame belongs to, after the checks every frame must pass (D14: else nothing changes).
    fn frame_peer(
        &mut self,
        slot: Slot,
        session: SessionId,
        header: &FrameHeader,
        out: &mut Actions,
    ) -> Option<usize> {
        let at = self.peer_index(slot)?;
        let on_it = self.peers[at].on(session) || planted!("old-session-heard");
        if !on_it || self.role == Role::Detached {
            return None;
        }
        if header.service_tag != (self.sb.service.0 >> 64) as u64 {
            self.bad_frame(at, "it belongs to another service", out);
            return None;
        }
        self.peers[at].last_heard = self.now;
        let greeting = matches!(self.peers[at].relation, Relation::Greeting { .. });
        if !greeting
            && header.kind != FrameKind::Goodbye
            && header.incarnation != self.peers[at].their_incarnation
        {
            self.bad_frame(at, "its incarnation is not the one that said hello", out);
            return None;
        }
        // Older ones were sent before their sender had our hello.
        if !greeting
            && !header.kind.precedes_agreement()
            && header.version > self.peers[at].wire_version
        {
            self.bad_frame(at, "its wire version is not the one agreed on", out);
            return None;
        }
        // What changes data or who may write is refused from an older epoch than the newest accepted.
        let gated = matches!(
            header.kind,
            FrameKind::Write
                | FrameKind::Zero
                | FrameKind::Flush
                | FrameKind::ResyncData
                | FrameKind::ResyncZero
                | FrameKind::ResyncDone
                | FrameKind::InSync
                | FrameKind::NewGeneration
                | FrameKind::DiskLost
                | FrameKind::ReadRequest
        );
        if gated && header.epoch.number < self.sb.epoch_gate.number && !planted!("old-epoch") {
            self.counters.refused_frames += 1;
            if header.kind == FrameKind::InSync {
                // Who kept S in an older epoch says nothing of it any more; nothing is lost with what it said. A promotion
                // under way meets this often, and is not to lose a copy by it.
                return None;
            }
            let text = format!(
                "a frame of epoch {} came, epoch {} was accepted since",
                header.epoch.number, self.sb.epoch_gate.number
            );
            self.close(at, GoodbyeCode::OldEpoch, &text, true, out);
            return None;
        }
        if self.peers[at].is_primary
            && let Some(wanted) = &mut self.promotion_wanted
            // What was in the socket when it died is read at once; a heartbeat after this is a sign of life.
            && self.now.ms_since(wanted.since) > self.tuning.heartbeat_ms + 50
        {
            wanted.primary_heard = true;
        }
        if header.stable_position > self.peers[at].inbox.stable && self.peers[at].is_primary {
            self.peers[at].inbox.stable = header.stable_position;
            self.forget_marks(at);
            self.trim_window(out);
            self.pump_inbox(at, out);
        }
        Some(at)
    }

    /// Closes the link over a frame that breaks the protocol; nothing of it was applied (D14).
    pub(crate) fn bad_frame(&mut self, at: usize, text: &str, out: &mut Actions) -> bool {
        self.counters.refused_frames += 1;
        let slot = self.peers[at].slot;
        let text = format!("bad frame: {text}");
        self.notice(Level::Error, "bad-frame", Some(slot), text.clone(), out);
        self.close(at, GoodbyeCode::BadFrame, &text, true, out);
        false
    }

    pub(crate) fn range_ok(&self, header: &FrameHeader) -> bool {
        self.volumes.get(header.volume.0 as usize).is_some_and(|v| {
            let sector = u64::from(v.sector_size);
            header.length > 0
                && header.offset.is_multiple_of(sector)
                && u64::from(header.length) % sector == 0
                && header
                    .offset
                    .checked_add(u64::from(header.length))
                    .is_some_and(|end| end <= v.size)
        })
    }

    /// A write or zero in the order of the service.
    fn receive_write(
        &mut self,
        at: usize,
        header: &FrameHeader,
        data: Data,
        out: &mut Actions,
    ) -> bool {
        let peer = &self.peers[at];
        if !peer.is_primary || !matches!(peer.relation, Relation::Target | Relation::Established) {
            let text = format!("a write came while {}", peer.relation.name());
            return self.bad_frame(at, &text, out);
        }
        if self.role != Role::Secondary {
            return self.bad_frame(at, "a write came to a copy that is not secondary", out);
        }
        if header.epoch != self.sb.epoch_gate && !planted!("old-epoch") {
            return self.bad_frame(at, "a write of an epoch that was not announced", out);
        }
        // A target's is the one that it recorded before it said Ready, or was told since; once it is Complete, its own.
        let announced = match peer.relation {
            Relation::Target if self.sb.target_of != GenerationId(0) => self.sb.target_of,
            _ => self.generation(),
        };
        if header.generation != announced {
            return self.bad_frame(at, "a write of a generation that was not announced", out);
        }
        if header.position <= peer.inbox.last_position && !planted!("replayed-frame-applied") {
            return self.bad_frame(at, "positions must rise", out);
        }
        if !self.range_ok(header) {
            return self.bad_frame(at, "a write outside its volume", out);
        }
        let async_copy = peer.their_mode == Mode::Async;
        let peer = &mut self.peers[at];
        peer.inbox.last_position = header.position;
        peer.inbox.received_ack = peer.memory_counts() || planted!("received-is-acknowledged");
        if peer.inbox.queued_bytes + u64::from(header.length) > self.tuning.receive_bytes
            && async_copy
        {
            // Room for more comes when the primary says more is stable.
            peer.wants_stable = true;
        }
        self.enqueue(at, ApplyKind::Write, header, data);
        self.pump_inbox(at, out);
        true
    }

    pub(crate) fn receive_resync(
        &mut self,
        at: usize,
        header: &FrameHeader,
        data: Data,
        out: &mut Actions,
    ) -> bool {
        if !matches!(self.peers[at].relation, Relation::Target) {
            let text = format!("resync data came while {}", self.peers[at].relation.name());
            return self.bad_frame(at, &text, out);
        }
        // The one this copy recorded before it said Ready, or was told since: what it becomes is known by it.
        if header.generation != self.sb.target_of && !planted!("foreign-resync-taken") {
            return self.bad_frame(
                at,
                "resync data of a generation that was not announced",
                out,
            );
        }
        if !self.range_ok(header) {
            return self.bad_frame(at, "resync data outside its volume", out);
        }
        let old = header.position <= self.peers[at].target.received_sequence;
        if old && !planted!("replayed-frame-applied") {
            return self.bad_frame(at, "resync sequences must rise", out);
        }
        self.peers[at].target.received_sequence = header.position;
        self.peers[at].target.received_bytes += u64::from(header.length);
        self.enqueue(at, ApplyKind::Resync, header, data);
        self.pump_inbox(at, out);
        true
    }

    pub(crate) fn enqueue(&mut self, at: usize, kind: ApplyKind, header: &FrameHeader, data: Data) {
        let peer = &mut self.peers[at];
        let session = peer.inbox.session;
        let op = ApplyOp {
            peer: peer.slot,
            session,
            ticket: 0,
            kind,
            volume: header.volume,
            offset: header.offset,
            length: u64::from(header.length),
            data,
            fua: header.flags.fua,
            position: header.position,
            dependency: header.dependency,
            in_overlap: false,
            holds_log: false,
            tracked: false,
        };
        peer.inbox.queued_bytes += op.length;
        let key = self.ops.insert(Op::Apply(op));
        self.peers[at].inbox.queue.push_back(Received::Apply(key));
    }

    fn receive_flush(&mut self, at: usize, header: &FrameHeader, out: &mut Actions) {
        let peer = &mut self.peers[at];
        if !matches!(peer.relation, Relation::Target | Relation::Established) {
            let text = format!("a flush came while {}", peer.relation.name());
            self.bad_frame(at, &text, out);
            return;
        }
        // Position 0: a resync source asks, outside the order.
        if header.position > 0 {
            if header.position <= peer.inbox.last_position || !peer.is_primary {
                self.bad_frame(at, "positions must rise", out);
                return;
            }
            peer.inbox.last_position = header.position;
            peer.inbox.received_ack |= peer.memory_counts();
        }
        let peer = &mut self.peers[at];
        peer.inbox.queue.push_back(Received::Flush {
            position: header.position,
            dependency: header.dependency,
        });
        self.pump_inbox(at, out);
    }

    /// Begins what may begin, in stream order.
    pub(crate) fn pump_inbox(&mut self, at: usize, out: &mut Actions) {
        loop {
            let peer = &self.peers[at];
            let Some(front) = peer.inbox.queue.front().copied() else {
                break;
            };
            let applied = peer.inbox.applied_through();
            let stable = peer.inbox.stable;
            let whole = matches!(peer.relation, Relation::Established)
                || peer.target.finishing
                || peer.inbox.orphan;
            let waits_for_stable = peer.their_mode == Mode::Async && whole && !peer.inbox.apply_all;
            match front {
                Received::Apply(key) => {
                    let Some(Op::Apply(op)) = self.ops.get(key) else {
                        break;
                    };
                    if op.kind == ApplyKind::Write {
                        // Async copies never run ahead of what every member of S has durably.
                        if waits_for_stable && op.position > stable && !planted!("stable-ignored") {
                            break;
                        }
                        // D3.
                        if op.dependency > applied && !planted!("dependency-ignored") {
                            break;
                        }
                    }
                    self.peers[at].inbox.queue.pop_front();
                    self.begin_apply(at, key, out);
                }
                Received::Flush {
                    position,
                    dependency,
                } => {
                    if dependency > applied || (waits_for_stable && position > stable) {
                        break;
                    }
                    self.issued = self.issued.max(position);
                    let inbox = &mut self.peers[at].inbox;
                    inbox.queue.pop_front();
                    let ticket = inbox.next_ticket;
                    inbox.next_ticket += 1;
                    inbox.begun.push_back((ticket, position, false));
                    let sequence = self.peers[at].target.begun_sequence;
                    self.peers[at]
                        .inbox
                        .pending_flushes
                        .push((ticket, position, sequence));
                    self.start_peer_flushes(at, out);
                }
                Received::ResyncDone { position } => {
                    // An async copy is whole only at a point that every member of S has durably.
                    let ahead =
                        peer.their_mode == Mode::Async && peer.is_primary && position > stable;
                    if !peer.inbox.begun.is_empty() || ahead {
                        break;
                    }
                    self.peers[at].inbox.queue.pop_front();
                    if let Some(session) = self.peers[at].session {
                        self.flush_locally(FlushFor::Complete { peer: at, session }, out);
                    }
                }
            }
        }
    }

    fn begin_apply(&mut self, at: usize, key: usize, out: &mut Actions) {
        let inbox = &mut self.peers[at].inbox;
        let ticket = inbox.next_ticket;
        inbox.next_ticket += 1;
        let Some(Op::Apply(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.ticket = ticket;
        op.in_overlap = true;
        let in_order = op.kind == ApplyKind::Write;
        let position = if in_order { op.position } else { 0 };
        if op.kind == ApplyKind::Resync {
            self.peers[at].target.begun_sequence = op.position;
        }
        let inbox = &mut self.peers[at].inbox;
        inbox.queued_bytes -= op.length;
        inbox.begun.push_back((ticket, position, false));
        let (volume, offset, length) = (op.volume, op.offset, op.length);
        if in_order {
            self.issued = position;
            if planted!("acknowledged-before-written") {
                add_run(&mut self.peers[at].inbox.write_acks, position);
            }
        }
        let tracked = in_order && self.tracks(at);
        if let Some(Op::Apply(op)) = self.ops.get_mut(key) {
            op.tracked = tracked;
        }
        if tracked {
            let order = Some(self.peers[at].slot);
            if self.window_of != order {
                self.window_becomes_bits(out);
                self.window_of = order;
            }
            self.window.push(Entry {
                position,
                volume,
                offset,
                length,
                op: NO_OP,
                local_done: false,
                holds_log: false,
            });
        }
        // D4: the same order as at the primary.
        let ordered = if planted!("overlap-ignored-by-peer") {
            0
        } else {
            length
        };
        if self.overlap.insert(key, volume.0, offset, ordered) == 0 {
            self.apply_ordered(key, out);
        }
    }

    /// Whether what the primary `at` sends has to be remembered: this copy may become ahead of another one by it.
    /// An asynchronous copy applies only what every member of S has durably, so it is ahead of none of those.
    fn tracks(&self, at: usize) -> bool {
        self.peers[at].their_mode != Mode::Async
            || self.peers[at].inbox.apply_all
            || self
                .peers
                .iter()
                .enumerate()
                .any(|(other, _)| other != at && !self.counts_in_s(other))
    }

    /// What a resync brings, any third copy may lack, a member of S too: the disk of a primary holds writes that no other
    /// member got yet. If the source is gone, this copy has to know (D7); `forget_marks` and `equal` in `ResyncDone` end it.
    /// The bits are durable before the source hears of it and clears its own (`peer_flush_done`).
    fn received_becomes_bits(&mut self, key: usize) {
        let Some(Op::Apply(op)) = self.ops.get(key) else {
            return;
        };
        let (source, volume, offset, length) = (op.peer, op.volume, op.offset, op.length);
        for at in 0..self.peers.len() {
            let slot = self.peers[at].slot;
            if slot != source {
                self.set_bits(at, volume, offset, length);
            }
        }
    }

    /// The overlap order let it through; now the activity log (D6).
    pub(crate) fn apply_ordered(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Apply(op)) = self.ops.get(key) else {
            return;
        };
        let (volume, offset, length) = (op.volume, op.offset, op.length);
        let (source, position, write) = (op.peer, op.position, op.kind == ApplyKind::Write);
        let tracked = op.tracked;
        let owed = self
            .peer_index(source)
            .and_then(|at| self.peers[at].inbox.owed_after);
        if write && owed.is_some_and(|stable| position > stable) {
            self.received_becomes_bits(key);
        }
        let Some(Op::Apply(op)) = self.ops.get(key) else {
            return;
        };
        if !tracked {
            if op.kind == ApplyKind::Resync && !planted!("resync-leaves-no-trace") {
                self.received_becomes_bits(key);
            }
            return self.apply_logged_or_free(key, false, out);
        }
        if self.log_waiting.is_empty() && self.try_hold(volume, offset, length) {
            self.apply_logged_or_free(key, true, out);
        } else {
            self.log_waiting.push_back(key);
            self.pump_log(out);
        }
    }

    pub(crate) fn apply_logged(&mut self, key: usize, out: &mut Actions) {
        self.apply_logged_or_free(key, true, out);
    }

    fn apply_logged_or_free(&mut self, key: usize, holds: bool, out: &mut Actions) {
        let Some(Op::Apply(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.holds_log = holds && self.tuning.activity_log;
        let (position, holds_log) = (op.position, op.holds_log);
        if holds_log && let Some(entry) = self.window.get_mut(position) {
            entry.holds_log = true;
        } else if holds_log {
            // The window was emptied meanwhile (the primary is gone): its bits are set, nobody holds on.
            let (volume, offset, length) = match self.ops.get(key) {
                Some(Op::Apply(op)) => (op.volume, op.offset, op.length),
                _ => return,
            };
            for extent in self.extents(volume, offset, length) {
                self.log.release(extent);
            }
        }
        // D12: what a resync or a write during it overwrites is saved first.
        if self.undo_gate(key, out) {
            self.submit_apply(key, out);
        }
    }

    pub(crate) fn submit_apply(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Apply(op)) = self.ops.get(key) else {
            return;
        };
        let id = OpId(key as u64);
        let (volume, offset, length, fua) = (op.volume, op.offset, op.length, op.fua);
        match (op.kind, op.data) {
            (ApplyKind::Verify { .. }, Data::Buf { buf, .. }) => {
                out.push(Action::DiskRead {
                    op: id,
                    volume,
                    offset,
                    length: length as u32,
                    buf,
                });
            }
            (_, Data::Buf { buf, .. }) => {
                out.push(Action::DiskWrite {
                    op: id,
                    volume,
                    offset,
                    length: length as u32,
                    buf,
                    fua,
                });
            }
            (_, Data::Zero { .. }) if planted!("zero-not-applied") => {
                self.apply_finished(key, Ok(()), None, out);
            }
            (_, Data::Zero { unmap }) => {
                out.push(Action::DiskZero {
                    op: id,
                    volume,
                    offset,
                    length,
                    unmap,
                    fua,
                });
            }
            (_, Data::Flush) => {}
        }
    }

    pub(crate) fn apply_disk_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        if let Some(Op::Apply(op)) = self.ops.get(key)
            && let (ApplyKind::Verify { .. }, Data::Buf { buf, .. }, Ok(())) =
                (op.kind, op.data, result)
        {
            let length = op.length as u32;
            return out.push(Action::Hash {
                op: OpId(key as u64),
                buf,
                length,
            });
        }
        self.apply_finished(key, result, None, out);
    }

    /// The disk has it (or failed): acknowledge, let the next ones go.
    pub(crate) fn apply_finished(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        digest: Option<u128>,
        out: &mut Actions,
    ) {
        let Some(Op::Apply(op)) = self.ops.get(key).cloned() else {
            return;
        };
        if let Data::Buf { buf, .. } = op.data {
            out.push(Action::ReleaseBuf { buf });
        }
        self.ops.remove(key);
        self.leave_overlap(key, out);
        let verify = matches!(op.kind, ApplyKind::Verify { .. });
        if result.is_err() && !verify && !planted!("apply-error-ignored") {
            return self.disk_failed("a replicated write failed", out);
        }
        if !verify {
            // From its completion on: a flush that began before may not have covered it.
            self.volumes[op.volume.0 as usize].unflushed = true;
        }
        if op.kind == ApplyKind::Write
            && let Some(entry) = self.window.get_mut(op.position)
        {
            entry.local_done = true;
        }
        let Some(at) = self.peer_index(op.peer) else {
            return;
        };
        let peer = &mut self.peers[at];
        if peer.inbox.session == op.session {
            finish_ticket(&mut peer.inbox, op.ticket);
        }
        if peer.session.map(|s| s.0) != Some(op.session) {
            // Its session ended while the disk worked: nobody to tell.
            self.start_peer_flushes(at, out);
            self.pump_inbox(at, out);
            self.trim_window(out);
            self.orphan_progress(at, out);
            return self.greet_waiting(out);
        }
        match op.kind {
            ApplyKind::Write => add_run(&mut peer.inbox.write_acks, op.position),
            ApplyKind::Resync => {
                add_run(&mut peer.target.acks, op.position);
                let landed = (op.position, op.volume, op.offset, op.length);
                peer.target.landed.push(landed);
            }
            ApplyKind::Verify {
                sequence,
                digest: theirs,
            } => {
                if digest == Some(theirs) && matches!(peer.relation, Relation::Target) {
                    let landed = (peer.target.begun_sequence, op.volume, op.offset, op.length);
                    peer.target.landed.push(landed);
                    if peer.target.goes_on && !planted!("equal-leaves-no-trace") {
                        // D7: it may have come before the resync was cut, and the marks of that were lost with the process.
                        for other in (0..self.peers.len()).filter(|other| *other != at) {
                            self.set_bits(other, op.volume, op.offset, op.length);
                        }
                    }
                }
                self.was_read(at, &op, result.is_ok(), out);
                let body = Body::VerifyReply {
                    sequence,
                    equal: digest == Some(theirs),
                    failed: result.is_err(),
                };
                self.send_body(at, FrameKind::VerifyReply, body, out);
            }
        }
        self.start_peer_flushes(at, out);
        self.pump_inbox(at, out);
    }

    /// Flush frames whose predecessors are all on the disk join the next local flush round.
    fn start_peer_flushes(&mut self, at: usize, out: &mut Actions) {
        let session = SessionId(self.peers[at].inbox.session);
        loop {
            let inbox = &mut self.peers[at].inbox;
            let Some(&(ticket, position, resync_sequence)) = inbox.pending_flushes.first() else {
                break;
            };
            let open = inbox
                .begun
                .iter()
                .take_while(|b| b.0 < ticket)
                .any(|b| !b.2 && !inbox.flushing.contains(&b.0));
            if open && !planted!("flush-overtakes-writes") {
                break;
            }
            inbox.pending_flushes.remove(0);
            inbox.flushing.push(ticket);
            let waiter = FlushFor::Peer {
                peer: at,
                session,
                ticket,
                position,
                resync_sequence,
            };
            self.flush_locally(waiter, out);
        }
    }

    /// A flush for a peer is over: its acknowledgement is due, once the bits toward third copies are durable that
    /// name what a resync brought (the source clears its own with this acknowledgement, D7).
    pub(crate) fn peer_flush_done(
        &mut self,
        at: usize,
        session: SessionId,
        ticket: u64,
        position: Position,
        resync_sequence: u64,
        out: &mut Actions,
    ) {
        let target = &self.peers[at].target;
        let more = resync_sequence > target.bits_saved
            && matches!(self.peers[at].relation, Relation::Target)
            && self.peers.len() > 1
            && !planted!("acknowledged-before-bits");
        if more {
            self.peers[at].target.bits_saved = resync_sequence;
            if !self.save_unsaved_bits(out) {
                let waiter = (at, session, ticket, position, resync_sequence);
                return self.acks_after_save.push(waiter);
            }
        }
        self.peer_flush_saved(at, session, ticket, position, resync_sequence, out);
    }

    pub(crate) fn peer_flush_saved(
        &mut self,
        at: usize,
        session: SessionId,
        ticket: u64,
        position: Position,
        resync_sequence: u64,
        out: &mut Actions,
    ) {
        let inbox = &mut self.peers[at].inbox;
        if inbox.session != session.0 {
            return;
        }
        inbox.flushing.retain(|t| *t != ticket);
        finish_ticket(inbox, ticket);
        if position > 0 {
            self.local_flushed = self.local_flushed.max(position);
        }
        self.landed_durably(at, session, resync_sequence);
        if self.peers[at].on(session) {
            // Acknowledgements of the writes before it go first: the stream keeps them in order.
            self.send_acks(at, out);
            let body = Body::FlushAck {
                position,
                resync_sequence,
            };
            self.send_body(at, FrameKind::FlushAck, body, out);
        }
        self.start_peer_flushes(at, out);
        self.trim_window(out);
        self.pump_inbox(at, out);
    }

    /// Up to this sequence this copy durably holds what its source holds: its own bits of those blocks say nothing more, and are not
    /// to be added to the source's again should they meet anew (D8). A rollback marks what it puts back.
    fn landed_durably(&mut self, at: usize, session: SessionId, through: u64) {
        let peer = &mut self.peers[at];
        if !peer.on(session) || !matches!(peer.relation, Relation::Target) {
            return;
        }
        let bitmaps = &mut peer.bitmaps;
        peer.target
            .landed
            .retain(|&(sequence, volume, offset, length)| {
                let covered = sequence <= through;
                if covered {
                    bitmaps[volume.0 as usize].clear(offset, length);
                }
                !covered
            });
    }

    /// What was gathered over a batch.
    pub(crate) fn send_acks(&mut self, at: usize, out: &mut Actions) {
        if self.peers[at].session.is_none() {
            return;
        }
        if std::mem::take(&mut self.peers[at].inbox.received_ack) {
            let mut header = self.header(FrameKind::ReceivedAck);
            header.position = self.peers[at].inbox.last_position;
            self.send(at, header, Payload::None, out);
        }
        while !self.peers[at].inbox.write_acks.is_empty() {
            let runs = &mut self.peers[at].inbox.write_acks;
            let rest = runs.split_off(runs.len().min(MAX_ACK_RUNS));
            let runs = std::mem::replace(runs, rest);
            self.send_body(at, FrameKind::WriteAck, Body::Acks { runs }, out);
        }
        while !self.peers[at].target.acks.is_empty() {
            let runs = &mut self.peers[at].target.acks;
            let rest = runs.split_off(runs.len().min(MAX_ACK_RUNS));
            let runs = std::mem::replace(runs, rest);
            self.send_body(at, FrameKind::ResyncAck, Body::Acks { runs }, out);
        }
    }

    // --- acknowledgements at the sender ---

    fn received_ack(&mut self, at: usize, through: Position, out: &mut Actions) {
        let slot = self.peers[at].slot.0 as usize;
        let Some(oldest) = self.peers[at].oldest_unacked else {
            return;
        };
        let positions: Vec<Position> = self
            .window
            .above(oldest - 1)
            .take_while(|e| e.position <= through)
            .filter(|e| e.op != NO_OP)
            .filter(|e| matches!(self.ops.get(e.op as usize), Some(Op::Client(op)) if op.legs[slot] == Leg::InFlight))
            .map(|e| e.position)
            .collect();
        for position in positions {
            self.acknowledged(at, position, position, Leg::Received, out);
        }
    }

    fn after_acks(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot.0 as usize;
        let open = |e: &&Entry| {
            e.op != NO_OP
                && matches!(self.ops.get(e.op as usize),
                    Some(Op::Client(op)) if matches!(op.legs[slot], Leg::InFlight | Leg::Received))
        };
        // Legs open at the newest end, so none is open below the one that was the oldest: the search begins there, and
        // the thousands that are settled and not yet stable are not walked for each acknowledgement.
        let before = self.peers[at].oldest_unacked;
        let first = before.and_then(|from| self.window.above(from - 1).find(open));
        let oldest = first.map(|e| e.position);
        debug_assert_eq!(oldest, self.window.iter().find(open).map(|e| e.position));
        self.peers[at].oldest_unacked = oldest;
        self.joining_progress(at, out);
        self.congestion_relieved(at, out);
    }

    fn flush_ack(
        &mut self,
        at: usize,
        session: SessionId,
        position: Position,
        resync_sequence: u64,
        out: &mut Actions,
    ) {
        if position > self.issued {
            self.bad_frame(
                at,
                "a flush acknowledgement of a position never issued",
                out,
            );
            return;
        }
        if position > 0 {
            self.peers[at].flushed = self.peers[at].flushed.max(position);
            self.acknowledged(at, position, position, Leg::Acked, out);
            self.after_acks(at, out);
            self.trim_window(out);
            self.diskless_flushed(at, position, out);
        }
        self.resync_flushed(at, session, resync_sequence, out);
    }
}

fn finish_ticket(inbox: &mut Inbox, ticket: u64) {
    if let Some(begun) = inbox.begun.iter_mut().find(|b| b.0 == ticket) {
        begun.2 = true;
    }
    while inbox.begun.front().is_some_and(|b| b.2) {
        inbox.begun.pop_front();
    }
}
