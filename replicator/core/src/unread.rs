//! A disk that a verify could not read throughout. What stands there may be lost on that copy although nothing has
//! asked for it yet, so both copies remember it until a verify has read the whole volume.

use crate::api::*;
use crate::op::ApplyOp;
use crate::peer::{Relation, VerifyChunk};
use crate::service::*;
use holdfast_wire_format::ids::*;
use std::collections::BTreeMap;

/// What of one of this copy's own volumes could not be read, and has not been since: ranges, first byte to first byte behind, none
/// of which touch each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unread {
    ranges: BTreeMap<u64, u64>,
}

/// More ranges than this are kept as one that holds them all.
const MOST_RANGES: usize = 256;

impl Unread {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    fn add(&mut self, mut from: u64, mut to: u64) {
        while let Some((&start, &end)) = self.ranges.range(..=to).next_back()
            && end >= from
        {
            self.ranges.remove(&start);
            (from, to) = (from.min(start), to.max(end));
        }
        self.ranges.insert(from, to);
        if self.ranges.len() > MOST_RANGES
            && let (Some((&first, _)), Some((_, &last))) =
                (self.ranges.first_key_value(), self.ranges.last_key_value())
        {
            self.ranges = BTreeMap::from([(first, last)]);
        }
    }

    fn remove(&mut self, from: u64, to: u64) {
        while let Some((&start, &end)) = self.ranges.range(..to).next_back()
            && end > from
        {
            self.ranges.remove(&start);
            if end > to {
                self.ranges.insert(to, end);
            }
            if start < from {
                self.ranges.insert(start, from);
            }
        }
    }
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
                // Where is not known any more.
                volume.unread.add(0, volume.size);
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

    /// A range that a verify asked for was read, or could not be. A resync by checksum does not count: what it cannot read it
    /// writes anew.
    pub(crate) fn was_read(&mut self, at: usize, op: &ApplyOp, ok: bool, out: &mut Actions) {
        if !matches!(self.peers[at].relation, Relation::Established) {
            return;
        }
        let slot = self.peers[at].slot;
        let unread = &mut self.volumes[op.volume.0 as usize].unread;
        let known = !unread.is_empty();
        let (from, to) = (op.offset, op.offset + op.length);
        if ok {
            unread.remove(from, to);
        } else {
            unread.add(from, to);
        }
        let (level, kind, text) = match (known, ok, unread.is_empty()) {
            (false, false, _) => (
                Level::Error,
                "verify-unreadable",
                format!(
                    "a verify could not read volume {} of this copy somewhere in {from}..{to}: what stands there may be lost on this disk. \
                     It is a problem of the status until a verify has read everything; replace the disk, or have every block written anew \
                     with `holdfast invalidate`",
                    op.volume.0
                ),
            ),
            (true, true, true) => (
                Level::Info,
                "verify-readable",
                format!(
                    "what could not be read of volume {} of this copy has been read by a verify",
                    op.volume.0
                ),
            ),
            _ => return,
        };
        self.notice(level, kind, Some(slot), text, out);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Against a byte for each byte.
    #[test]
    fn ranges_are_what_a_list_of_bytes_would_be() {
        let mut rng = 7u64;
        let mut next = |below: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (rng >> 33) % below
        };
        for _ in 0..200 {
            let mut unread = Unread::default();
            let mut bytes = [false; 64];
            for _ in 0..60 {
                let from = next(64);
                let to = (from + 1 + next(16)).min(64);
                let bad = next(2) == 0;
                if bad {
                    unread.add(from, to);
                } else {
                    unread.remove(from, to);
                }
                bytes[from as usize..to as usize].fill(bad);
                let mut shown = [false; 64];
                let mut last = None;
                for (&start, &end) in &unread.ranges {
                    assert!(start < end && last.is_none_or(|last| last < start));
                    last = Some(end);
                    shown[start as usize..end as usize].fill(true);
                }
                assert_eq!(shown, bytes);
            }
        }
    }

    #[test]
    fn very_many_ranges_become_one() {
        let mut unread = Unread::default();
        for at in 0..2000 {
            unread.add(at * 10, at * 10 + 1);
            assert!(unread.ranges.len() <= MOST_RANGES);
        }
        unread.remove(0, 20_000);
        assert!(unread.is_empty());
    }
}
