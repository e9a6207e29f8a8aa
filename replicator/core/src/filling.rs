//! A copy is filled by another one: both sides from what their meeting decided until the first block is sent.

use crate::api::*;
use crate::bitmap::PageContent;
use crate::cluster_store::Change;
use crate::handshake::{CopyPlan, How};
use crate::peer::*;
use crate::service::*;
use crate::undoing::TargetPlan;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    // --- the target ---

    /// The meeting is settled: what it was settled with is what the next one compares against.
    pub(crate) fn remember_identity(&mut self, at: usize) {
        let peer = &self.peers[at];
        let known = &mut self.sb.peers[peer.record];
        known.disk = peer.their_disk;
        known.attach_counter = peer.their_attach_counter;
        known.incarnation = peer.their_incarnation;
    }

    pub(crate) fn become_target(
        &mut self,
        at: usize,
        theirs: &Facts,
        plan: &CopyPlan,
        out: &mut Actions,
    ) {
        let how = plan.how;
        let Some(session) = self.peers[at].session else {
            return;
        };
        // One source at a time: two would mix their blocks. A primary goes before any other.
        for other in 0..self.peers.len() {
            let filling = matches!(
                self.peers[other].relation,
                Relation::Target | Relation::TargetPreparing
            );
            if other == at || !filling {
                continue;
            }
            if !theirs.is_primary || self.peers[other].is_primary {
                self.peers[at].relation = Relation::Waiting { since: self.now };
                return;
            }
            self.meet_again(other, "the primary fills this copy instead", out);
        }
        // A copy that is being filled is nobody's source: what it receives changes blocks that it has sent already.
        for other in 0..self.peers.len() {
            let fills = matches!(
                self.peers[other].relation,
                Relation::SourceWaiting
                    | Relation::SourceStarting
                    | Relation::Source
                    | Relation::Joining { .. }
            );
            if other != at && fills && !planted!("filled-and-filling") {
                self.meet_again(other, "its source is being filled itself", out);
            }
        }
        // Who agreed with it took it for whole, and may be about to serve with it in S (D1, D8). Beside a primary that fills it its other
        // followers may stay, and a primary that was superseded by that one may not: its order of writes ends here (D17).
        for other in 0..self.peers.len() {
            let agreed = matches!(
                self.peers[other].relation,
                Relation::Established | Relation::Agreeing
            );
            let followed = self.peers[other].is_primary && !planted!("superseded-is-followed-on");
            let ends = followed || (!theirs.is_primary && !planted!("agreed-and-filled"));
            if other != at && agreed && ends {
                self.meet_again(other, "this copy is filled by another one now", out);
            }
        }
        if self.is_primary_like() {
            self.stop_being_primary(out);
        }
        // This copy goes on as the source has it.
        if !planted!("kept-beside-a-source") {
            self.drop_kept(out);
        }
        self.peers[at].relation = Relation::TargetPreparing;
        self.peers[at].full_copy = matches!(how, How::Full | How::FullByChecksum);
        if how == How::BitsAndUndo {
            self.undo_blocks_become_bits(at);
        }
        let plan = TargetPlan {
            peer: at,
            session,
            how,
            goal: theirs.generations.last().map_or(GenerationId(0), |g| g.id),
            fresh: self.sb.target_of == GenerationId(0),
            surplus: plan.surplus,
        };
        self.undo_prepare(plan, out);
    }

    /// The way back is durable, as far as there is one (D12): this copy becomes a target.
    pub(crate) fn record_target(&mut self, plan: &TargetPlan, out: &mut Actions) {
        let at = plan.peer;
        self.peers[at].target.goes_on = !plan.fresh;
        self.sb.state = CopyState::Inconsistent;
        self.sb.target_of = plan.goal;
        self.sb.target_source = self.peers[at].slot.0;
        self.sb.in_sync = self.sb.in_sync.without(self.slot);
        self.sb.flags.solo = false;
        // What was unclean is settled by being a target.
        self.unclean_start = false;
        self.was_primary_before = false;
        self.sb.flags.was_primary = false;
        self.remember_identity(at);
        // Recorded before Ready is sent: no data of the source arrives unrecorded.
        let session = plan.session;
        self.commit(Then::TargetRecorded { peer: at, session }, out);
    }

    pub(crate) fn target_recorded(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::TargetPreparing)
        {
            return;
        }
        let now = self.now;
        let slot = self.peers[at].slot;
        self.peers[at].relation = Relation::Target;
        // What comes is counted in the source's order; our own count, of a generation that is given up, may be ahead
        // of it and says nothing there (row 5 would take the source for an old disk). Where a rollback returns to is
        // in `before_resync`.
        self.issued = 0;
        self.local_flushed = 0;
        self.peers[at].target = TargetState {
            started: now,
            goes_on: self.peers[at].target.goes_on,
            ..TargetState::default()
        };
        // Our bits toward the source: what it may lack of ours is what we must take of its (row: "both sides' bits").
        for volume in 0..self.volumes.len() {
            let grain_shift = self.volumes[volume].grain_shift;
            let bitmap = &self.peers[at].bitmaps[volume];
            let pages: Vec<(u64, Vec<u64>)> = bitmap
                .pages_with_bits()
                .filter(|_| !planted!("own-bits-not-told"))
                .map(|page| match bitmap.page(page) {
                    PageContent::Partial(words) => (page, words.to_vec()),
                    _ => (page, Vec::new()),
                })
                .collect();
            for (page, words) in pages {
                let body = Body::Bitmap {
                    volume: VolumeIndex(volume as u16),
                    page,
                    grain_shift,
                    words,
                };
                self.send_body(at, FrameKind::Bitmap, body, out);
            }
        }
        self.send_body(at, FrameKind::BitmapEnd, Body::Empty, out);
        self.send_body(at, FrameKind::Ready, Body::Empty, out);
        self.notice(
            Level::Warning,
            "resync-target",
            Some(slot),
            "receiving what this copy lacks; it cannot be promoted without force until that ends"
                .into(),
            out,
        );
    }

    // --- the source ---

    pub(crate) fn become_source(&mut self, at: usize, how: How, out: &mut Actions) {
        // Greeted before another copy began to fill this one.
        if self
            .peers
            .iter()
            .any(|p| matches!(p.relation, Relation::Target | Relation::TargetPreparing))
        {
            return self.meet_again(at, "its source is being filled itself", out);
        }
        let full = matches!(how, How::Full | How::FullByChecksum);
        self.peers[at].full_copy = full;
        if full && !self.is_primary_like() {
            self.peers[at].stranger = Some(self.sb.in_sync_version);
        }
        let record = self.peers[at].record;
        // Also where a full copy goes on that was cut.
        self.peers[at].compare = how != How::Full && (full || self.sb.peers[record].full_copy);
        if full {
            for bitmap in &mut self.peers[at].bitmaps {
                bitmap.set_all();
            }
            self.sb.peers[record].full_copy = true;
            self.commit(Then::Nothing, out);
        }
        self.peers[at].relation = Relation::SourceWaiting;
        if self.peers[at].ready_received {
            let session = self.peers[at].session.unwrap_or(SessionId(0));
            self.source_ready(at, session, out);
        }
    }

    pub(crate) fn receive_bits(
        &mut self,
        at: usize,
        volume: VolumeIndex,
        page: u64,
        grain_shift: u8,
        words: &[u64],
        out: &mut Actions,
    ) {
        if let Relation::Waiting { .. } = self.peers[at].relation {
            // With a register both read it, at two moments, and may come to different ends.
            return self.meet_again(at, "the other copy decided from another record", out);
        }
        let in_turn = matches!(
            self.peers[at].relation,
            Relation::SourceWaiting | Relation::Greeting { .. }
        );
        let Some(bitmap) = self.peers[at].bitmaps.get_mut(volume.0 as usize) else {
            self.bad_frame(at, "bits of a volume that is not there", out);
            return;
        };
        let content = match <&crate::bitmap::PageWords>::try_from(words) {
            Ok(words) => PageContent::Partial(words),
            Err(_) => PageContent::AllSet,
        };
        if !in_turn || page >= (1 << 40) || !(9..=40).contains(&grain_shift) {
            self.bad_frame(at, "bits out of turn or outside the volume", out);
            return;
        }
        bitmap.or_page(page, content, grain_shift);
    }

    pub(crate) fn bits_complete(&mut self, at: usize) {
        self.peers[at].bits_received = true;
    }

    /// The target recorded that it is one and takes frames from here on.
    pub(crate) fn source_ready(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].bits_received {
            self.bad_frame(at, "Ready before the bits", out);
            return;
        }
        let slot = self.peers[at].slot;
        self.peers[at].relation = Relation::SourceStarting;
        self.remember_identity(at);
        let in_s = self
            .sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .contains(slot);
        if in_s && self.is_primary_like() {
            // The new generation's fork position is a promise: flush first.
            return self.flush_locally(FlushFor::DropTarget { peer: at, session }, out);
        }
        self.drop_target(at, session, out);
    }

    /// S without the copy that became a target.
    pub(crate) fn drop_target(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::SourceStarting)
        {
            return;
        }
        let slot = self.peers[at].slot;
        let in_s = self
            .sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .contains(slot);
        if !in_s || (self.store.is_cluster() && !self.is_primary_like()) {
            return self.commit(Then::SourceRecorded { peer: at, session }, out);
        }
        // It durably knows that it is a target, so it will not be promoted unasked: leaving S is safe.
        self.hold_stable();
        if self.is_primary_like() {
            self.new_generation(GenerationCause::PeerLost);
            self.generation_committing = true;
        }
        if self.store.is_cluster() {
            self.commit(Then::GenerationBegun, out);
        }
        self.propose(Change::Target { peer: at, session }, out);
    }

    /// S without the target is committed.
    pub(crate) fn target_left(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.sb.in_sync = self.sb.in_sync.without(slot);
        self.sb.in_sync_pending = self.sb.in_sync_pending.without(slot);
        self.next_in_sync_version();
        if self.is_primary_like() {
            self.sb.flags.solo = self.sb.in_sync == SlotSet::only(self.slot);
        }
        self.commit(Then::SourceRecorded { peer: at, session }, out);
    }

    pub(crate) fn source_recorded(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::SourceStarting)
        {
            return;
        }
        let slot = self.peers[at].slot;
        let total = self.peers[at].dirty_bytes();
        self.peers[at].relation = Relation::Source;
        // Everything issued so far is durable there or has bits.
        self.peers[at].flushed = self.issued;
        self.peers[at].source = SourceState {
            total_bytes: total,
            next_sequence: 1,
            started: self.now,
            ..SourceState::default()
        };
        // What began since our facts were told was announced to those that took frames then.
        if self.is_primary_like() && !self.generation_committing {
            self.tell_generations(at, out);
        }
        self.announce_in_sync(out);
        let text = format!("copying {total} bytes to copy {}", slot.0);
        self.notice(Level::Info, "resync-source", Some(slot), text, out);
        self.check_all(out);
        self.pump_source(at, out);
    }
}
