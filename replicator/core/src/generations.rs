//! New generations: told to every copy that takes frames, and learnt from the primary (D10).

use crate::api::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    /// Tells new generations to every copy that takes frames; nothing completes before they hold them (D10).
    pub(crate) fn announce_generations(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            let takes_frames = matches!(
                self.peers[at].relation,
                Relation::Established
                    | Relation::Joining { .. }
                    | Relation::Source
                    | Relation::SourceStarting
            );
            if takes_frames {
                self.tell_generations(at, out);
            }
        }
    }

    /// Every generation that this copy was not told, in order: two may have become durable together.
    pub(crate) fn tell_generations(&mut self, at: usize, out: &mut Actions) {
        let told = self.peers[at].told_generation;
        let generations = &self.sb.generations;
        let from = generations.iter().position(|g| g.id == told);
        let from = from.map_or(generations.len().saturating_sub(1), |at| at + 1);
        let untold: Vec<Generation> = generations[from..].to_vec();
        for generation in untold {
            self.generation_unknown_to = self.generation_unknown_to.with(self.peers[at].slot);
            self.peers[at].told_generation = generation.id;
            let mut header = self.header(FrameKind::NewGeneration);
            header.position = self.sb.generation_base;
            self.send(
                at,
                header,
                Payload::Body(Body::NewGeneration { generation }),
                out,
            );
        }
    }

    pub(crate) fn generation_told(
        &mut self,
        at: usize,
        session: SessionId,
        header: &FrameHeader,
        generation: Generation,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let newer = header.epoch.number > self.sb.epoch_gate.number
            || (header.epoch == self.sb.epoch_gate && header.epoch.owner == slot.0);
        if !newer || self.is_primary_like() {
            self.bad_frame(
                at,
                "a generation of a copy that is not the owner of the epoch",
                out,
            );
            return;
        }
        let established = matches!(self.peers[at].relation, Relation::Established);
        if established
            && !planted!("fork-not-compared")
            && (self.issued != header.position || self.peers[at].dirty_bits() > 0)
        {
            // It forked at another place than where we stand: one of us holds what the other lacks.
            self.sb.epoch_gate = header.epoch;
            self.commit(Then::Nothing, out);
            return self.meet_again(
                at,
                "the new generation forks at another position than ours",
                out,
            );
        }
        self.sb.epoch_gate = header.epoch;
        for (other, peer) in self.peers.iter_mut().enumerate() {
            peer.is_primary = other == at;
        }
        let peer = &mut self.peers[at];
        if !peer.their_generations.iter().any(|g| g.id == generation.id) {
            append_generation(
                &mut peer.their_generations,
                &mut peer.their_generations_cut,
                generation,
            );
        }
        // A target whose Complete is on its way to the disk: that names the generations before this one.
        let completing = matches!(self.peers[at].relation, Relation::Target)
            && self.sb.state == CopyState::Complete;
        match self.peers[at].relation {
            // An earlier primary announced it already.
            Relation::Established if self.sb.generations.iter().any(|g| g.id == generation.id) => {}
            Relation::Target | Relation::TargetPreparing if !completing => {
                // Recorded with Complete; until then this copy is a target of the source's line anyway.
                self.sb.target_of = generation.id;
                self.peers[at].target.generation_base = Some(header.position);
            }
            Relation::Established | Relation::Target => {
                if generation.parent != self.generation() {
                    self.bad_frame(at, "a generation that does not grow from ours", out);
                    return;
                }
                self.push_generation(generation);
                if self.peers[at].mode == Mode::Async || self.peers[at].their_mode == Mode::Async {
                    // C1: a primary that this copy follows asynchronously completes without it, from its first write on. Its
                    // `InSync` comes after it serves; this is durable before.
                    self.sb.in_sync = SlotSet::only(slot);
                    self.sb.in_sync_pending = self.sb.in_sync;
                }
                self.sb.flags.zeroed = false;
                self.sb.generation_base = header.position;
                self.unclean_start = false;
                self.was_primary_before = false;
            }
            _ => {
                self.bad_frame(at, "a generation out of turn", out);
                return;
            }
        }
        let stored = Then::GenerationStored {
            peer: at,
            session,
            generation: generation.id,
        };
        self.commit(stored, out);
    }

    pub(crate) fn generation_stored(
        &mut self,
        at: usize,
        session: SessionId,
        generation: GenerationId,
        out: &mut Actions,
    ) {
        if self.peers[at].on(session) {
            self.send_body(
                at,
                FrameKind::GenerationAck,
                Body::GenerationAck { generation },
                out,
            );
        }
    }

    pub(crate) fn generation_ack(
        &mut self,
        at: usize,
        generation: GenerationId,
        out: &mut Actions,
    ) {
        if generation != self.generation() {
            return;
        }
        let slot = self.peers[at].slot;
        if matches!(
            self.peers[at].relation,
            Relation::Established | Relation::Joining { .. }
        ) {
            let record = self.peers[at].record;
            self.sb.peers[record].bitmap_base = generation;
        }
        self.generation_unknown_to = self.generation_unknown_to.without(slot);
        if self.generation_unknown_to.is_empty() {
            self.promotion_known(out);
            self.check_all(out);
        }
    }
}
