//! Frames of the other copy come in: checks, and what each is for; what is to be applied waits in the order it came in.

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
            (FrameKind::Hello, Body::Hello(hello)) => self.hello(at, hello, out),
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
            (FrameKind::BitmapEnd, _) => self.bits_complete(at),
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
        if header.service_tag != service_tag(self.sb.service) {
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
}
