//! When what the application asked completes: its own disk and the copies that count have it (D1), or it ends with an error.

use crate::api::*;
use crate::op::*;
use crate::resync_rate::Kind;
use crate::service::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    /// Copies whose acknowledgement a completion needs, this one included.
    pub(crate) fn required(&self) -> SlotSet {
        // D18: while a change of S is not known to be durable, both sets count.
        self.sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .with(self.slot)
    }

    /// The local disk answered a write of the application.
    pub(crate) fn client_disk_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let result = result.or_else(|e| {
            if planted!("write-error-ignored") {
                Ok(())
            } else {
                Err(e)
            }
        });
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.local_left = 0;
        // D14: an error stays an error.
        op.local_failed |= result.is_err();
        let (position, buf) = (op.position, op.data);
        if let Data::Buf { buf, .. } = buf {
            out.push(Action::ReleaseBuf { buf });
        }
        if result.is_err() {
            self.disk_failed("a write of the application failed", out);
            if self.diskless.is_none() {
                return;
            }
        }
        // From its completion on a write needs a flush: one that began before may not have covered it.
        if let Some(Op::Client(op)) = self.ops.get(key) {
            self.volumes[op.volume.0 as usize].unflushed = true;
        }
        if let Some(entry) = self.window.get_mut(position) {
            entry.local_done = true;
        }
        let leave = match self.ops.get_mut(key) {
            Some(Op::Client(op)) => std::mem::take(&mut op.in_overlap),
            _ => false,
        };
        if leave {
            self.leave_overlap(key, out);
        }
        self.check_client(key, out);
    }

    /// Completes the operation if its mode allows (D1), and forgets it when nothing is open.
    pub(crate) fn check_client(&mut self, key: usize, out: &mut Actions) {
        let required = self.required();
        let modes = self.modes();
        let may_complete = self.may_complete();
        let diskless = self.diskless_serves();
        let mut free = None;
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        if op.stage != Stage::Issued {
            return;
        }
        if !op.replied && ((op.local_left == 0 && !op.local_failed) || diskless) {
            let held_by = required.iter().filter(|s| *s != self.slot).find(|s| {
                !match op.legs[s.0 as usize] {
                    Leg::Acked => true,
                    Leg::Received => {
                        planted!("received-is-acknowledged")
                            || (modes[s.0 as usize] == Mode::SemiSync && !diskless)
                    }
                    // Not concerned: it joined after this was issued, and had to have it before it joined.
                    Leg::None => true,
                    Leg::InFlight if op.data == Data::Flush => planted!("flush-after-one-leg"),
                    Leg::InFlight => planted!("early-completion"),
                    Leg::Bits => planted!("lost-leg-completes"),
                }
            });
            match held_by {
                None if may_complete => {
                    op.replied = true;
                    let (position, request) = (op.position, op.request);
                    let (many, internal) = (op.part_of_many, op.internal);
                    if let (Some(kind), false) = (op.kind(), internal) {
                        let took = self.now.0.saturating_sub(op.arrived_at);
                        self.resync_rate.answered(kind, took);
                    }
                    if let (Data::Buf { buf, .. }, true) =
                        (op.data, std::mem::take(&mut op.holds_buf))
                    {
                        out.push(Action::ReleaseBuf { buf });
                    }
                    free = (diskless && std::mem::take(&mut op.in_overlap)).then_some(key);
                    self.completed_max = self.completed_max.max(position);
                    if internal {
                        // An asynchronous copy answers it only once it is stable: nobody waits for that.
                        self.stable_flush_running = false;
                    } else if many {
                        self.piece_done(request, Status::Ok, out);
                    } else {
                        out.push(Action::Complete {
                            request,
                            status: Status::Ok,
                        });
                    }
                }
                Some(slot) if op.legs[slot.0 as usize] == Leg::Bits => {
                    self.required_leg_missing(out)
                }
                _ => {}
            }
        }
        self.forget_if_settled(key, out);
        if let Some(key) = free {
            self.leave_overlap(key, out);
        }
    }

    /// No completion while a new generation is not known to every connected copy (D10), nor between the
    /// decision to drop a copy and its commit.
    fn may_complete(&self) -> bool {
        self.role != Role::Secondary
            && !self.dropping
            && !self.generation_committing
            && (self.generation_unknown_to.is_empty() || planted!("generation-unknown"))
            && (!self.failed || self.diskless_serves())
    }

    fn modes(&self) -> [Mode; MAX_COPIES] {
        let mut modes = [Mode::Sync; MAX_COPIES];
        for peer in &self.peers {
            modes[peer.slot.0 as usize] = peer.mode;
        }
        modes
    }

    fn forget_if_settled(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Client(op)) = self.ops.get(key) else {
            return;
        };
        let open = op
            .legs
            .iter()
            .any(|l| matches!(l, Leg::InFlight | Leg::Received));
        if !op.replied || op.local_left > 0 || open {
            return;
        }
        let (position, internal) = (op.position, op.internal);
        self.ops.remove(key);
        if let Some(entry) = self.window.get_mut(position) {
            entry.op = NO_OP;
        }
        if internal {
            self.stable_flush_running = false;
        }
        self.trim_window(out);
    }

    /// Every operation of the application, by position order, looks again whether it may complete.
    pub(crate) fn check_all(&mut self, out: &mut Actions) {
        self.unpark(out);
        for key in self.window.ops() {
            self.check_client(key as usize, out);
        }
    }

    /// The peer acknowledged positions; `leg` is what they become.
    pub(crate) fn acknowledged(
        &mut self,
        at: usize,
        first: Position,
        last: Position,
        leg: Leg,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot.0 as usize;
        // A peer may name what it likes (D14): only what is in the window counts.
        let begin = self
            .window
            .iter()
            .next()
            .map_or(first, |e| e.position.max(first));
        for position in begin..=last.min(self.issued) {
            let Some(entry) = self.window.get(position) else {
                continue;
            };
            let key = entry.op as usize;
            let length = entry.length;
            if entry.op == NO_OP {
                continue;
            }
            let Some(Op::Client(op)) = self.ops.get_mut(key) else {
                continue;
            };
            match (op.legs[slot], leg) {
                (Leg::InFlight, Leg::Received) => op.legs[slot] = Leg::Received,
                (Leg::InFlight | Leg::Received, Leg::Acked) => {
                    op.legs[slot] = Leg::Acked;
                    let peer = &mut self.peers[at];
                    peer.unacked_bytes = peer.unacked_bytes.saturating_sub(length);
                }
                _ => continue,
            }
            self.check_client(key, out);
        }
    }

    /// An operation that was never issued, or that cannot complete any more, ends with `status`.
    pub(crate) fn abandon(
        &mut self,
        key: usize,
        release_log: bool,
        status: Status,
        out: &mut Actions,
    ) {
        let Some(Op::Client(op)) = self.ops.try_remove(key) else {
            return;
        };
        if let (Data::Buf { buf, .. }, true) = (op.data, op.stage != Stage::Issued) {
            out.push(Action::ReleaseBuf { buf });
        }
        if release_log && op.data != Data::Flush && self.tuning.activity_log {
            for extent in self.extents(op.volume, op.offset, op.length) {
                self.log.release(extent);
            }
        }
        if op.internal {
            self.stable_flush_running = false;
        } else if op.part_of_many {
            self.piece_done(op.request, status, out);
        } else {
            out.push(Action::Complete {
                request: op.request,
                status,
            });
        }
        if op.in_overlap {
            self.leave_overlap(key, out);
        }
    }

    /// The role ends or the disk failed: what is held, waiting or parked is answered; what the disk still
    /// works on stays until it answers.
    pub(crate) fn end_client_io(&mut self, status: Status, only_parked: bool, out: &mut Actions) {
        while let Some(event) = self.held.pop_front() {
            self.end_held(event, status, out);
        }
        let waiting: Vec<usize> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op) if op.stage != Stage::Issued => Some(key),
                _ => None,
            })
            .collect();
        self.log_waiting.retain(|key| !waiting.contains(key));
        // These passed the log already and hold their extents.
        let held = std::mem::take(&mut self.issue_waiting);
        for key in waiting {
            self.abandon(key, held.contains(&key), status, out);
        }
        // Parked: done here, but a required copy lacks it. It keeps its place in the window.
        let parked: Vec<usize> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op) if !op.replied && (!only_parked || op.legs.contains(&Leg::Bits)) => {
                    Some(key)
                }
                _ => None,
            })
            .collect();
        for key in parked {
            self.end_issued(key, status, out);
        }
        self.parked = false;
    }

    /// An operation on its way is answered with an error; what is still open of it stays until it ends.
    pub(crate) fn end_issued(&mut self, key: usize, status: Status, out: &mut Actions) {
        if let Some(Op::Client(op)) = self.ops.get_mut(key) {
            op.replied = true;
            let (request, many, internal) = (op.request, op.part_of_many, op.internal);
            if internal {
                // What is still open of it may never be answered: the next primary's flushes do not wait for it.
                self.stable_flush_running = false;
            } else if many {
                self.piece_done(request, status, out);
            } else {
                out.push(Action::Complete { request, status });
            }
        }
        self.forget_if_settled(key, out);
    }

    pub(crate) fn read_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        if result.is_err() {
            self.disk_failed("a read of the application failed", out);
            if self.diskless.is_some() {
                return self.read_remotely(key, out);
            }
        }
        let Op::Read {
            request,
            arrived_at,
            ..
        } = self.ops.remove(key)
        else {
            return;
        };
        let took = self.now.0.saturating_sub(arrived_at);
        self.resync_rate.answered(Kind::Read, took);
        let status = match result {
            Ok(()) => Status::Ok,
            Err(_) => Status::Io,
        };
        out.push(Action::Complete { request, status });
    }

    /// Client operations that were issued and not answered.
    pub(crate) fn client_in_flight(&self) -> bool {
        self.ops.iter().any(|(_, op)| match op {
            Op::Client(op) => !op.replied || op.local_left > 0,
            Op::Read { .. } | Op::Lock { .. } => true,
            _ => false,
        })
    }
}
