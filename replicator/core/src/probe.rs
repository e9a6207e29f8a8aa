//! What a test world may see of a core at any moment. Reads only; no product code uses it.

use crate::api::Role;
use crate::handshake::{self, How, Outcome, Row};
use crate::service::Core;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// A cheap look at one copy.
#[doc(hidden)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probe {
    pub role: Role,
    pub attached: bool,
    pub failed: bool,
    pub epoch: Epoch,
    pub state: CopyState,
    pub generation: GenerationId,
    /// Reads zero everywhere since its `create`.
    pub zeroed: bool,
    /// The newest generation was forced by a person.
    pub forced: bool,
    pub in_sync: SlotSet,
    /// Copies whose acknowledgement a completion needs now.
    pub required: SlotSet,
    pub window_entries: usize,
    pub parked: bool,
}

impl Core {
    #[doc(hidden)]
    pub fn probe(&self) -> Probe {
        let newest = self.sb.generations.last();
        Probe {
            role: self.role,
            attached: self.attached,
            failed: self.failed,
            epoch: self.sb.epoch_gate,
            state: self.sb.state,
            generation: self.generation(),
            zeroed: self.sb.flags.zeroed,
            forced: newest.is_some_and(|g| g.cause == GenerationCause::Force),
            in_sync: self.sb.in_sync,
            required: self.required(),
            window_entries: self.window.len(),
            parked: self.parked,
        }
    }

    /// How this copy stands to `slot`, in a word, and the blocks it knows that one may lack.
    #[doc(hidden)]
    pub fn probe_peer(&self, slot: Slot) -> Option<(&'static str, u64)> {
        let peer = &self.peers[self.peer_index(slot)?];
        Some((peer.relation.name(), peer.dirty_bits()))
    }

    /// Whether this copy has a dirty bit toward `slot` in the range.
    #[doc(hidden)]
    pub fn marked(&self, slot: Slot, volume: VolumeIndex, offset: u64, length: u64) -> bool {
        self.peer_index(slot)
            .is_some_and(|at| self.peers[at].bitmaps[volume.0 as usize].any_set(offset, length))
    }

    /// What would come of it if this copy met `other` now: the row, and whether only marked blocks would be copied,
    /// so that everything rests on the marks. Every mark a meeting would fold in counts.
    #[doc(hidden)]
    pub fn next_meeting(&self, other: &Core) -> Option<(Row, bool)> {
        let facts = |me: &Core, peer: &Core| {
            let at = me.peer_index(peer.slot)?;
            let mut facts = me.facts(at);
            let unstable = me.window.iter().filter(|e| e.length > 0).count();
            facts.about_peer.bits += unstable as u64;
            Some(facts)
        };
        let decision = handshake::decide(&facts(self, other)?, &facts(other, self)?, None);
        let by_marks = match decision.outcome {
            Outcome::Nothing | Outcome::Diskless { .. } => true,
            Outcome::Copy(plan) => matches!(plan.how, How::Bits | How::BitsAndUndo),
            _ => false,
        };
        Some((decision.row, by_marks))
    }

    /// Whether the undo log of this copy names the range.
    #[doc(hidden)]
    pub fn undo_names(&self, volume: VolumeIndex, offset: u64, length: u64) -> bool {
        self.undo
            .log
            .undone()
            .any(|(v, o, l)| v == volume && o < offset + length && offset < o + l)
    }

    /// D7: whether this copy knows that the range may differ from `slot`'s: a dirty bit, a hot extent, or a
    /// write that is not yet stable.
    #[doc(hidden)]
    pub fn may_differ(&self, slot: Slot, volume: VolumeIndex, offset: u64, length: u64) -> bool {
        if self.peer_index(slot).is_none() {
            return true;
        }
        self.marked(slot, volume, offset, length)
            || self
                .extents(volume, offset, length)
                .any(|extent| self.log.is_hot(extent))
            || self.window.iter().any(|e| {
                e.volume == volume && e.offset < offset + length && offset < e.offset + e.length
            })
    }
}
