//! What a peer sent is carried out on this copy's disk: in order, held by the activity log, saved in the undo log first.

use crate::acknowledge::finish_ticket;
use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::metadata::*;

impl Core {
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
}
