//! Acknowledgements, on both sides: what a copy says of what it applied and flushed, and what a primary or source makes of it.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;

impl Core {
    /// Flush frames whose predecessors are all on the disk join the next local flush round.
    pub(crate) fn start_peer_flushes(&mut self, at: usize, out: &mut Actions) {
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
            let due = FlushDue {
                peer: at,
                session,
                ticket,
                position,
                resync_sequence,
            };
            self.flush_locally(FlushFor::Peer(due), out);
        }
    }

    /// A flush for a peer is over: its acknowledgement is due, once the bits toward third copies are durable that
    /// name what a resync brought (the source clears its own with this acknowledgement, D7).
    pub(crate) fn peer_flush_done(&mut self, due: FlushDue, out: &mut Actions) {
        let at = due.peer;
        let target = &self.peers[at].target;
        let more = due.resync_sequence > target.bits_saved
            && matches!(self.peers[at].relation, Relation::Target)
            && self.peers.len() > 1
            && !planted!("acknowledged-before-bits");
        if more {
            self.peers[at].target.bits_saved = due.resync_sequence;
            if !self.save_unsaved_bits(out) {
                return self.acks_after_save.push(due);
            }
        }
        self.peer_flush_saved(due, out);
    }

    pub(crate) fn peer_flush_saved(&mut self, due: FlushDue, out: &mut Actions) {
        let FlushDue {
            peer: at,
            session,
            ticket,
            position,
            resync_sequence,
        } = due;
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

    pub(crate) fn received_ack(&mut self, at: usize, through: Position, out: &mut Actions) {
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

    pub(crate) fn after_acks(&mut self, at: usize, out: &mut Actions) {
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

    pub(crate) fn flush_ack(
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

pub(crate) fn finish_ticket(inbox: &mut Inbox, ticket: u64) {
    if let Some(begun) = inbox.begun.iter_mut().find(|b| b.0 == ticket) {
        begun.2 = true;
    }
    while inbox.begun.front().is_some_and(|b| b.2) {
        inbox.begun.pop_front();
    }
}
