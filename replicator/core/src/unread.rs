//! A disk that a verify could not read throughout. What stands there may be lost on that copy although nothing has
//! asked for it yet, so both copies remember it until a verify has read the whole volume.

use crate::api::*;
use crate::op::ApplyOp;
use crate::peer::{Relation, VerifyChunk};
use crate::service::*;
use holdfast_wire_format::frame::FrameHeader;
use holdfast_wire_format::ids::*;

/// What this copy knows of one of its own volumes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unread {
    /// A verify could not read all of it, and none has since.
    pub failed: bool,
    /// Number of the present reading; 0 before the first one.
    run: u32,
    /// Bytes it has read.
    bytes: u64,
}

/// The volumes of a set of one bit each.
pub(crate) fn volumes(set: u64) -> Vec<VolumeIndex> {
    let index = |volume: &u16| set >> volume & 1 == 1;
    (0..u64::BITS as u16)
        .filter(index)
        .map(VolumeIndex)
        .collect()
}

impl Core {
    /// Tells a copy that was just attached what was known before of volumes that could not be read throughout: its own, and
    /// those of a peer.
    pub fn recall_unread(&mut self, own: &[VolumeIndex], peers: &[(Slot, Vec<VolumeIndex>)]) {
        for volume in own {
            if let Some(volume) = self.volumes.get_mut(volume.0 as usize) {
                volume.unread.failed = true;
            }
        }
        for (slot, unread) in peers {
            let Some(at) = self.peer_index(*slot) else {
                continue;
            };
            let known = unread
                .iter()
                .filter(|v| usize::from(v.0) < self.volumes.len());
            self.peers[at].unread = known.fold(0, |set, volume| set | 1 << volume.0);
        }
    }

    /// A verify asks for a range of this copy: which reading of the whole volume that belongs to. One that begins at the
    /// start of the volume begins a new one. A resync by checksum does not count: what it cannot read it writes anew.
    pub(crate) fn begin_reading(&mut self, at: usize, header: &FrameHeader) -> u32 {
        if !matches!(self.peers[at].relation, Relation::Established) {
            return 0;
        }
        let Some(volume) = self.volumes.get_mut(header.volume.0 as usize) else {
            return 0;
        };
        if header.offset == 0 {
            volume.unread.run = volume.unread.run.wrapping_add(1).max(1);
            volume.unread.bytes = 0;
        }
        volume.unread.run
    }

    /// That range was read, or could not be.
    pub(crate) fn was_read(
        &mut self,
        at: usize,
        run: u32,
        op: &ApplyOp,
        ok: bool,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let volume = &mut self.volumes[op.volume.0 as usize];
        if run == 0 || run != volume.unread.run {
            return;
        }
        if !ok {
            let first = !std::mem::replace(&mut volume.unread.failed, true);
            if first {
                let text = format!(
                    "a verify could not read volume {} of this copy somewhere in {}..{}: what stands there may be lost on this disk. It is \
                     a problem of the status until a verify has read the whole volume; replace the disk, or have every block written anew \
                     with `holdfast invalidate`",
                    op.volume.0,
                    op.offset,
                    op.offset + op.length
                );
                self.notice(Level::Error, "verify-unreadable", Some(slot), text, out);
            }
            return;
        }
        volume.unread.bytes += op.length;
        if volume.unread.failed && volume.unread.bytes >= volume.size {
            volume.unread.failed = false;
            let text = format!(
                "volume {} of this copy was read throughout by a verify",
                op.volume.0
            );
            self.notice(Level::Info, "verify-readable", Some(slot), text, out);
        }
    }

    /// The other side of a verify could not read.
    pub(crate) fn peer_could_not_read(&mut self, at: usize, chunk: VerifyChunk, out: &mut Actions) {
        let peer = &mut self.peers[at];
        peer.unread |= 1 << chunk.volume.0;
        let slot = peer.slot;
        let text = format!(
            "copy {} could not read volume {} somewhere in {}..{} for the verify: what stands there may be lost on its disk. Replace that \
             disk, or have every block written anew with `holdfast invalidate` there; a verify that reads everything ends this problem",
            slot.0,
            chunk.volume.0,
            chunk.offset,
            chunk.offset + u64::from(chunk.length)
        );
        self.notice(Level::Error, "verify-unreadable", Some(slot), text, out);
    }
}
