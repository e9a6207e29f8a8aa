//! The end of a session with a peer: what was under way with it, and what becomes of what it had sent.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;

impl Core {
    pub(crate) fn link_down(
        &mut self,
        slot: Slot,
        session: SessionId,
        reason: &str,
        out: &mut Actions,
    ) {
        let Some(at) = self.peer_index(slot) else {
            return;
        };
        if self.peers[at].on(session) {
            self.session_ended(at, reason, out);
        }
    }

    pub(crate) fn goodbye(&mut self, at: usize, code: GoodbyeCode, text: &str, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let reconnect = matches!(
            code,
            GoodbyeCode::Again
                | GoodbyeCode::OldEpoch
                | GoodbyeCode::BadFrame
                | GoodbyeCode::Shutdown
        );
        let level = if reconnect {
            Level::Info
        } else {
            Level::Warning
        };
        self.notice(
            level,
            "goodbye",
            Some(slot),
            format!("the peer closed ({}): {text}", crate::words::goodbye(code)),
            out,
        );
        let Some(session) = self.peers[at].session else {
            return;
        };
        self.peers[at].again_since = crate::peer::meets_at_once(code).then_some(self.now);
        out.push(Action::Close {
            peer: slot,
            session,
            code: GoodbyeCode::Disconnect,
            text: "as the peer asked".into(),
            reconnect: reconnect || code == GoodbyeCode::Disconnect,
        });
        self.session_ended(at, text, out);
        self.peers[at].last_error = text.to_owned();
        if matches!(
            code,
            GoodbyeCode::SplitBrain | GoodbyeCode::Unrelated | GoodbyeCode::Refused
        ) {
            self.peers[at].relation = Relation::Refused;
        }
    }

    /// The session is over, whoever ended it.
    pub(crate) fn session_ended(&mut self, at: usize, reason: &str, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let relation = self.peers[at].relation.clone();
        let was_primary = std::mem::take(&mut self.peers[at].is_primary);
        self.peers[at].forget_at = None;
        self.peers[at].session = None;
        self.peers[at].relation = Relation::Down;
        self.peers[at].last_error = reason.to_owned();
        self.notice(
            Level::Warning,
            "link-down",
            Some(slot),
            format!("link lost: {reason}"),
            out,
        );
        // An inbox that is an orphan already belongs to an earlier session: what that one received is applied still,
        // however many meetings are tried meanwhile.
        let orphaned = std::mem::replace(&mut self.peers[at].inbox.orphan, true);
        if !orphaned {
            self.peers[at].was_primary = was_primary;
        }
        let follower = was_primary && matches!(relation, Relation::Established);
        let follower = follower && !planted!("received-is-dropped");
        if !follower && !orphaned && self.peers[at].inbox.kept.is_none() {
            // A target in the middle: the source still has bits for all of it.
            self.drop_inbox(at, out);
        }
        let mirrored = matches!(
            relation,
            Relation::Established | Relation::Joining { .. } | Relation::Source
        );
        if mirrored && !was_primary && self.diskless.is_none() {
            self.unstable_becomes_bits(at);
        }
        self.source_ended(at, out);
        self.verify_ended(at, reason, out);
        if matches!(relation, Relation::Joining { .. }) {
            // D18: the commit of S with it may be on its way; both sets count until it is known.
            self.join_abandoned(at, out);
        }
        // Legs in flight to it are bits now.
        let flushed = self.peers[at].flushed;
        let entries: Vec<Entry> = self
            .window
            .iter()
            .filter(|e| e.op != NO_OP)
            .copied()
            .collect();
        for entry in entries {
            let Some(Op::Client(op)) = self.ops.get_mut(entry.op as usize) else {
                continue;
            };
            // D1: what it acknowledged it may have lost by the time that the other copies have the write, with its cache or, even
            // what it flushed, because a member that never got it filled it. It counts while the session lasts.
            // (A server of a primary without a disk acknowledges what is durable.)
            let unstable = entry.position > flushed;
            let revoked = !op.replied
                && mirrored
                && self.diskless.is_none()
                && (unstable || !planted!("flushed-is-acknowledged-forever"))
                && !planted!("acknowledged-forever");
            let leg = &mut op.legs[slot.0 as usize];
            // What it only received in memory it may have lost: nobody acknowledges it any more.
            if matches!(*leg, Leg::InFlight | Leg::Received) || (revoked && *leg == Leg::Acked) {
                *leg = Leg::Bits;
                if !unstable && entry.length > 0 && mirrored && self.diskless.is_none() {
                    self.set_bits(at, entry.volume, entry.offset, entry.length);
                }
            }
        }
        // What was on its way is bits from here on, and stays as old as it is.
        if let Some(issued) = self.oldest_issued(at) {
            self.peers[at].behind_since.get_or_insert(issued);
        }
        self.peers[at].unacked_bytes = 0;
        self.peers[at].oldest_unacked = None;
        self.diskless_server_gone(at, out);
        self.generation_unknown_to = self.generation_unknown_to.without(slot);
        self.promotion_lost_peer(slot, out);
        // A follower applies everything it received: semi-sync completions counted on it.
        self.pump_inbox(at, out);
        self.orphan_progress(at, out);
        self.check_all(out);
        self.trim_window(out);
        self.release_held(out);
        self.pump_log(out);
    }

    /// Whatever of a dead session's frames may still be applied is; then its primary's unstable writes become
    /// bits, and the next meeting may begin.
    pub(crate) fn orphan_progress(&mut self, at: usize, out: &mut Actions) {
        let now_in = (self.sb.epoch_gate, self.generation());
        let kept = self.peers[at].inbox.kept;
        if kept.is_some_and(|k| k != now_in || self.failed || self.detaching.is_some()) {
            // Somebody else went on: these writes are of a past that is not this copy's any more.
            self.drop_inbox(at, out);
        }
        if !self.peers[at].inbox.orphan {
            return;
        }
        let inbox = &mut self.peers[at].inbox;
        if inbox.begun.iter().all(|b| b.2) && !inbox.queue.is_empty() {
            // Async copies stop at the last stable position they were told: the rest is theirs to apply only if a person makes
            // this copy the one that goes on.
            inbox.kept = Some(now_in);
        }
        if inbox.kept.is_none() && !inbox.queue.is_empty() {
            return;
        }
        let kept = inbox.kept_writes();
        let slot = self.peers[at].slot;
        let applies = self
            .ops
            .iter()
            .filter(|(_, op)| matches!(op, Op::Apply(op) if op.peer == slot));
        if applies.count() > kept {
            return;
        }
        if std::mem::take(&mut self.peers[at].was_primary) {
            self.primary_gone(at, out);
        }
        self.peers[at].inbox.orphan = false;
        self.greet_waiting(out);
    }

    /// Meetings that waited for something of ours to finish.
    pub(crate) fn greet_waiting(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            if let (Some(session), Relation::Greeting { sent: None, .. }) =
                (self.peers[at].session, &self.peers[at].relation)
            {
                self.greet(at, session, out);
            }
        }
    }

    /// Received and not begun: never reaches this disk.
    pub(crate) fn drop_inbox(&mut self, at: usize, out: &mut Actions) {
        let queue: Vec<Received> = self.peers[at].inbox.queue.drain(..).collect();
        for received in queue {
            if let Received::Apply(key) = received
                && let Op::Apply(op) = self.ops.remove(key)
                && let Data::Buf { buf, .. } = op.data
            {
                out.push(Action::ReleaseBuf { buf });
            }
        }
        self.peers[at].inbox.queued_bytes = 0;
        self.peers[at].inbox.kept = None;
    }

    /// A person forces this copy: what it received of the order is a longer part of it than what was known to be stable.
    pub(crate) fn apply_kept(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            self.orphan_progress(at, out);
            let inbox = &mut self.peers[at].inbox;
            if inbox.kept.take().is_some() {
                inbox.orphan = true;
                inbox.apply_all = true;
                // It may be ahead of the copies that hold what is stable: they get bits when all is applied.
                self.peers[at].was_primary = true;
                self.pump_inbox(at, out);
                self.orphan_progress(at, out);
            }
        }
    }

    /// This copy goes on without a person's word: without what it kept for one.
    pub(crate) fn drop_kept(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            let inbox = &self.peers[at].inbox;
            if inbox.kept.is_some() {
                let (writes, slot) = (inbox.kept_writes(), self.peers[at].slot);
                if writes > 0 {
                    let text = format!(
                        "{writes} writes that came from copy {} before the link was lost, and were not known to be stable, are given up",
                        slot.0
                    );
                    self.notice(Level::Warning, "received-dropped", Some(slot), text, out);
                }
                self.drop_inbox(at, out);
            }
        }
    }

    /// Another primary's order begins: what was not stable in the one before may be missing anywhere (D7).
    pub(crate) fn window_becomes_bits(&mut self, out: &mut Actions) {
        let entries: Vec<Entry> = self.window.iter().copied().collect();
        for entry in entries.iter().filter(|e| e.length > 0) {
            for peer in 0..self.peers.len() {
                self.set_bits(peer, entry.volume, entry.offset, entry.length);
            }
        }
        self.release_window(out);
    }

    /// The primary's link is gone: what may have been lost with its cache becomes bits toward it, and what
    /// copies outside S may lack becomes bits toward them (D7, and "every promotable copy tracks").
    pub(crate) fn primary_gone(&mut self, at: usize, _out: &mut Actions) {
        if self.window_of != Some(self.peers[at].slot) {
            return;
        }
        let stable = self.peers[at].inbox.stable;
        let entries: Vec<Entry> = self
            .window
            .iter()
            .filter(|e| e.length > 0)
            .copied()
            .collect();
        for entry in &entries {
            for peer in 0..self.peers.len() {
                if peer != at || (entry.position > stable && !planted!("follower-forgets-unstable"))
                {
                    self.set_bits(peer, entry.volume, entry.offset, entry.length);
                }
            }
        }
        for entry in self.window.clear() {
            if entry.holds_log {
                for extent in self.extents(entry.volume, entry.offset, entry.length) {
                    self.log.release(extent);
                }
            }
        }
    }
}
