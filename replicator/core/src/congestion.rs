//! An asynchronous copy that cannot keep up: the application waits, or the copy falls back to the bitmap and
//! returns by itself when what was sent has drained.

use crate::api::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    /// Lag of a copy in ms as far as mirrored writes go: the age of the oldest one it has not acknowledged.
    pub(crate) fn lag_ms(&self, at: usize) -> u64 {
        self.oldest_issued(at)
            .map_or(0, |issued| self.now.ms_since(issued))
    }

    /// When the oldest write that was mirrored to a copy, and that it has not acknowledged, was issued.
    pub(crate) fn oldest_issued(&self, at: usize) -> Option<Time> {
        let entry = self.window.get(self.peers[at].oldest_unacked?)?;
        match self.ops.get(entry.op as usize) {
            Some(crate::op::Op::Client(op)) => Some(Time(op.issued_at)),
            _ => None,
        }
    }

    /// How long a copy has lacked something, in ms: since the oldest write it has not acknowledged, or since its bitmap
    /// has named blocks, whether it is connected or not. What would be lost in time if only that copy were left.
    pub(crate) fn behind_ms(&self, at: usize, now: Time) -> u64 {
        let since = [self.oldest_issued(at), self.peers[at].behind_since];
        let oldest = since.into_iter().flatten().min();
        oldest.map_or(0, |since| now.ms_since(since))
    }

    /// Notes since when each copy has lacked blocks, and how fast it gets them.
    pub(crate) fn watch_behind(&mut self) {
        // A follower's bits name what another follower may lack at worst; what it does lack, the primary knows.
        let follows = !self.is_primary_like()
            && self
                .peers
                .iter()
                .any(|peer| peer.is_primary && peer.session.is_some());
        for peer in &mut self.peers {
            if follows || peer.dirty_bits() == 0 {
                peer.behind_since = None;
                peer.behind_before = false;
            } else {
                peer.behind_since.get_or_insert(self.now);
            }
            if matches!(peer.relation, Relation::Source) {
                let (left, done) = (peer.dirty_bytes(), peer.source.done_bytes);
                peer.source.pace.note(self.now, left, done);
            }
        }
    }

    fn over_bound(&self, at: usize) -> bool {
        let peer = &self.peers[at];
        let lag_bound = self.tuning.async_lag_ms;
        peer.unacked_bytes > self.tuning.async_queue_bytes
            || (lag_bound > 0 && self.lag_ms(at) > lag_bound)
    }

    /// Whether new writes wait for an asynchronous copy.
    pub(crate) fn congestion_blocks(&self) -> bool {
        self.tuning.async_block
            && (0..self.peers.len()).any(|at| {
                let peer = &self.peers[at];
                peer.mode == Mode::Async
                    && matches!(peer.relation, Relation::Established)
                    && self.over_bound(at)
            })
    }

    /// Checks the bound of every asynchronous copy; over it, with the bitmap policy, mirroring to it stops.
    pub(crate) fn watch_congestion(&mut self, out: &mut Actions) {
        if self.role != Role::Primary || self.tuning.async_block {
            return;
        }
        for at in 0..self.peers.len() {
            let peer = &self.peers[at];
            if peer.mode == Mode::Async
                && matches!(peer.relation, Relation::Established)
                && !peer.congested
                && self.over_bound(at)
            {
                self.congest(at, out);
            }
        }
    }

    /// From here on what is written becomes bits; the copy stays at a real past point until it drained.
    pub(crate) fn congest(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.peers[at].congested = true;
        let text = format!(
            "copy {} is {} bytes and {} ms behind: writes are noted in the bitmap until it has drained",
            slot.0,
            self.peers[at].unacked_bytes,
            self.lag_ms(at)
        );
        self.notice(Level::Warning, "congested", Some(slot), text, out);
    }

    pub(crate) fn congestion_relieved(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot;
        if self.peers[at].congested && self.peers[at].oldest_unacked.is_none() {
            self.peers[at].congested = false;
            self.notice(
                Level::Info,
                "drained",
                Some(slot),
                "what was sent is acknowledged".into(),
                out,
            );
            return self.meet_again(at, "an asynchronous copy returns from congestion", out);
        }
        self.release_held(out);
    }

    pub(crate) fn drained(
        &mut self,
        slot: Slot,
        session: SessionId,
        bytes: u64,
        out: &mut Actions,
    ) {
        let Some(at) = self.peer_index(slot) else {
            return;
        };
        if self.peers[at].on(session) {
            self.peers[at].queued_bytes = self.peers[at].queued_bytes.saturating_sub(bytes);
            self.pump_source(at, out);
        }
    }
}
