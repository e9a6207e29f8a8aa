//! The undo of a resync target: old blocks are saved before they are overwritten (D12).

use crate::api::*;
use crate::op::*;
use crate::roles::refusal;
use crate::service::*;
use holdfast_wire_format::ids::*;

/// What the target keeps for a rollback.
#[derive(Debug, Default)]
pub(crate) struct Undoing {
    /// The session of a target that waits for the undo head to be durable.
    pub waiting: Option<(usize, SessionId)>,
}

impl Core {
    /// Undo reaches back to the start of the resync.
    pub(crate) fn undo_intact(&self) -> bool {
        self.sb.target_of != GenerationId(0) && !self.sb.flags.undo_lost
    }

    pub(crate) fn undo_begin(&mut self, _fresh: bool, _initial: bool, _out: &mut Actions) {
        self.sb.flags.undo_lost = true;
    }

    /// Every block the undo log holds differs from the source as well (row 7).
    pub(crate) fn undo_blocks_become_bits(&mut self, _at: usize) {}

    pub(crate) fn undo_ready(&self) -> bool {
        true
    }

    pub(crate) fn undo_call_when_ready(&mut self, peer: usize, session: SessionId) {
        self.undo.waiting = Some((peer, session));
    }

    /// True if nothing has to be saved before this write.
    pub(crate) fn undo_gate(&mut self, _key: usize, _out: &mut Actions) -> bool {
        true
    }

    pub(crate) fn undo_done(
        &mut self,
        key: usize,
        _result: Result<(), DiskError>,
        _out: &mut Actions,
    ) {
        self.ops.remove(key);
    }

    pub(crate) fn undo_rollback(&mut self, out: &mut Actions) {
        let text = refusal(
            "no undo was kept",
            "Nothing was changed",
            "Bring back the source of the resync",
        )
        .to_string();
        self.cancel_promotion(&text, out);
    }

    pub(crate) fn rolled_back(&mut self, out: &mut Actions) {
        self.ask_for_epoch(out);
    }

    pub(crate) fn undo_drop(&mut self, _out: &mut Actions) {
        self.sb.flags.undo_lost = false;
    }
}
