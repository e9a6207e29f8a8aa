//! A write, zero or flush of the application on its way: order among those that overlap, the activity log, its position, the local disk
//! and the other copies.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::activity_log::ExtentKey;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn begin_write(
        &mut self,
        request: RequestId,
        part_of_many: bool,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
        data: Data,
        fua: bool,
        out: &mut Actions,
    ) {
        let op = ClientOp {
            request,
            part_of_many,
            volume,
            offset,
            length,
            data,
            fua: fua && !planted!("fua-is-plain"),
            stage: Stage::Overlap,
            position: 0,
            local_left: 0,
            local_failed: false,
            legs: [Leg::None; MAX_COPIES],
            replied: false,
            holds_buf: false,
            internal: false,
            in_overlap: true,
            arrived_at: self.now.0,
            issued_at: self.now.0,
        };
        // A write under the requester's own lock passes it: the lock stands in the order for it.
        let locked = self.locks.get(&request).copied();
        let key = self.ops.insert(Op::Client(op));
        if locked.is_some() {
            if let Some(Op::Client(op)) = self.ops.get_mut(key) {
                op.in_overlap = false;
            }
            self.log_gate(key, out);
        } else if self.overlap.insert(key, volume.0, offset, length) == 0 {
            self.log_gate(key, out);
        }
    }

    /// D4: everything earlier that overlaps is finished.
    pub(crate) fn overlap_ready(&mut self, key: usize, out: &mut Actions) {
        match self.ops.get_mut(key) {
            Some(Op::Client(_)) => self.log_gate(key, out),
            Some(Op::Lock {
                request, granted, ..
            }) => {
                *granted = true;
                let request = *request;
                out.push(Action::Granted { request });
            }
            Some(Op::Apply(_)) => self.apply_ordered(key, out),
            Some(Op::ResyncRead { .. }) => self.resync_read_ready(key, out),
            Some(Op::VerifyRead { .. }) => self.verify_read_ready(key, out),
            other => {
                let text = format!("overlap order released operation {key} that is {other:?}");
                self.halt(out, &text);
            }
        }
    }

    pub(crate) fn leave_overlap(&mut self, key: usize, out: &mut Actions) {
        let mut ready = Vec::new();
        self.overlap.remove(key, &mut ready);
        for next in ready {
            self.overlap_ready(next, out);
        }
    }

    pub(crate) fn unlock(&mut self, request: RequestId, out: &mut Actions) {
        if let Some(key) = self.locks.remove(&request) {
            self.ops.remove(key);
            self.leave_overlap(key, out);
        }
    }

    pub(crate) fn extents(
        &self,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
    ) -> impl Iterator<Item = ExtentKey> + Clone + use<> {
        let shift = self.sb.extent_shift;
        let first = offset >> shift;
        let last = (offset + length - 1) >> shift;
        (first..=last).map(move |e| ExtentKey {
            volume,
            extent: e as u32,
        })
    }

    /// D6: the extents are hot in the durable activity log before the data goes anywhere.
    fn log_gate(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.stage = Stage::Log;
        if self.diskless.is_some() {
            // There is no log to write: the server keeps one.
            return self.issue(key, out);
        }
        let (volume, offset, length) = (op.volume, op.offset, op.length);
        if self.log_waiting.is_empty() && self.try_hold(volume, offset, length) {
            self.issue(key, out);
        } else {
            self.log_waiting.push_back(key);
            self.pump_log(out);
        }
    }

    /// A position, the local disk, every mirrored peer.
    pub(crate) fn issue(&mut self, key: usize, out: &mut Actions) {
        // A demotion or failure between arrival and here: nothing is issued any more.
        let internal = matches!(self.ops.get(key), Some(Op::Client(op)) if op.internal);
        let may_issue = self.role == Role::Primary || (internal && self.role == Role::Demoting);
        if !may_issue || self.out_of_service() {
            let status = if self.out_of_service() {
                Status::Io
            } else {
                Status::NotPrimary
            };
            // The log of a failed disk is not written any more, so nothing is held in it.
            return self.abandon(key, !self.failed, status, out);
        }
        let diskless = self.diskless.is_some();
        if diskless && !internal && !self.diskless_serves() {
            return self.diskless_wait(key);
        }
        if self.generation_committing {
            return self.issue_waiting.push(key);
        }
        self.issued += 1;
        let position = self.issued;
        let required = self.required();
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.stage = Stage::Issued;
        op.position = position;
        op.issued_at = self.now.0;
        let (volume, offset, length, data, fua) =
            (op.volume, op.offset, op.length, op.data, op.fua);
        let is_flush = data == Data::Flush;
        self.window.push(Entry {
            position,
            volume,
            offset,
            length,
            op: key as u32,
            local_done: is_flush || diskless,
            holds_log: !is_flush && self.tuning.activity_log && !diskless,
        });
        // The peers' legs.
        let mut legs = [Leg::None; MAX_COPIES];
        for at in 0..self.peers.len() {
            let slot = self.peers[at].slot;
            legs[slot.0 as usize] = if self.mirrors(at, volume, offset, length, is_flush) {
                self.mirror(
                    at, position, volume, offset, length, data, fua, required, out,
                );
                Leg::InFlight
            } else if is_flush {
                // A flush leaves no bits; it is missing at the peer like every write before it.
                if required.contains(slot) {
                    Leg::Bits
                } else {
                    Leg::None
                }
            } else {
                self.set_bits(at, volume, offset, length);
                Leg::Bits
            };
        }
        if let Some(Op::Client(op)) = self.ops.get_mut(key) {
            op.local_left = u32::from(!diskless);
            op.holds_buf = diskless && matches!(data, Data::Buf { .. });
            op.legs = legs;
        }
        if diskless {
            return;
        }
        // The local leg comes last: a flush of a clean disk is over at once, and must find its other legs set.
        match data {
            Data::Buf { buf, .. } => {
                let op = OpId(key as u64);
                out.push(Action::DiskWrite {
                    op,
                    volume,
                    offset,
                    length: length as u32,
                    buf,
                    fua,
                });
            }
            Data::Zero { unmap } => {
                let op = OpId(key as u64);
                out.push(Action::DiskZero {
                    op,
                    volume,
                    offset,
                    length,
                    unmap,
                    fua,
                });
            }
            Data::Flush => self.flush_locally(FlushFor::Client(key), out),
        }
        if required
            .iter()
            .any(|s| s != self.slot && legs[s.0 as usize] == Leg::Bits)
        {
            self.required_leg_missing(out);
        }
    }

    /// Whether this write goes to the peer as a frame now, or becomes bits.
    fn mirrors(
        &mut self,
        at: usize,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
        is_flush: bool,
    ) -> bool {
        let limit = self.tuning.async_queue_bytes;
        let peer = &mut self.peers[at];
        match peer.relation {
            Relation::Established | Relation::Joining { .. } => !peer.congested,
            Relation::Source => {
                if is_flush {
                    return true;
                }
                // Blocks still to be copied are copied later (D8); mirrored writes never wait for a slow target.
                let dirty = peer.bitmaps[volume.0 as usize].any_set(offset, length);
                let covered = !dirty
                    || chunks_cover(peer, volume, offset, length)
                    || planted!("mirrored-before-copied");
                let mirrored = covered && peer.unacked_bytes + length <= limit;
                if !mirrored {
                    for chunk in &mut peer.source.chunks {
                        let overlaps = chunk.volume == volume
                            && chunk.offset < offset + length
                            && offset < chunk.offset + u64::from(chunk.length);
                        chunk.redirtied |= overlaps && !planted!("redirty-not-noted");
                    }
                }
                mirrored
            }
            _ => false,
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn mirror(
        &mut self,
        at: usize,
        position: Position,
        volume: VolumeIndex,
        offset: u64,
        length: u64,
        data: Data,
        fua: bool,
        required: SlotSet,
        out: &mut Actions,
    ) {
        let kind = match data {
            Data::Buf { .. } => FrameKind::Write,
            Data::Zero { .. } => FrameKind::Zero,
            Data::Flush => FrameKind::Flush,
        };
        let mut header = self.header(kind);
        header.volume = volume;
        header.position = position;
        header.offset = offset;
        header.length = length as u32;
        // D13: without a disk here, what completes must be durable there.
        let diskless = self.diskless.is_some();
        header.flags.fua =
            (fua && !planted!("fua-not-sent")) || (diskless && !planted!("diskless-without-fua"));
        // D3: a copy whose acknowledgement every completion waits for has everything that completed before;
        // any other must not overtake it.
        let peer = &self.peers[at];
        let waits = ((peer.mode == Mode::Sync || diskless) && required.contains(peer.slot))
            || planted!("dependency-not-sent");
        header.dependency = if waits { 0 } else { self.completed_max };
        let payload = match data {
            Data::Buf {
                buf,
                crc,
                crc_known,
            } => {
                header.payload_length = length as u32;
                header.payload_crc = crc;
                Payload::Buf { buf, crc_known }
            }
            Data::Zero { unmap } => {
                header.flags.unmap = unmap;
                Payload::None
            }
            Data::Flush => {
                self.peers[at].flush_asked = position;
                Payload::None
            }
        };
        let peer = &mut self.peers[at];
        peer.unacked_bytes += length;
        peer.oldest_unacked.get_or_insert(position);
        self.counters.replicated_writes += 1;
        self.counters.replicated_bytes += length;
        self.send(at, header, payload, out);
    }

    /// Starts a flush of everything before it; returns its place in the order.
    pub(crate) fn begin_flush(
        &mut self,
        request: Option<RequestId>,
        out: &mut Actions,
    ) -> Position {
        let op = ClientOp {
            request: request.unwrap_or(RequestId(u64::MAX)),
            part_of_many: false,
            volume: VolumeIndex(0),
            offset: 0,
            length: 0,
            data: Data::Flush,
            fua: false,
            stage: Stage::Log,
            position: 0,
            local_left: 0,
            local_failed: false,
            legs: [Leg::None; MAX_COPIES],
            replied: false,
            holds_buf: false,
            internal: request.is_none(),
            in_overlap: false,
            arrived_at: self.now.0,
            issued_at: self.now.0,
        };
        let key = self.ops.insert(Op::Client(op));
        self.issue(key, out);
        self.issued
    }

    /// The flush that ends a demotion: everything, everywhere.
    pub(crate) fn begin_demote_flush(&mut self, out: &mut Actions) {
        let _position = self.begin_flush(None, out);
    }
}

/// Every dirty block of the range is in a chunk already sent: the stream carries this write after it (D8).
fn chunks_cover(peer: &Peer, volume: VolumeIndex, offset: u64, length: u64) -> bool {
    let mut at = offset;
    let end = offset + length;
    let bitmap = &peer.bitmaps[volume.0 as usize];
    while at < end {
        let chunk = peer.source.chunks.iter().find(|c| {
            c.volume == volume
                && !c.redirtied
                && matches!(c.state, ChunkState::Sent | ChunkState::Acked)
                && c.offset <= at
                && at < c.offset + u64::from(c.length)
        });
        if let Some(chunk) = chunk {
            at = chunk.offset + u64::from(chunk.length);
            continue;
        }
        // Not in a chunk: fine only if this block is clean.
        let block = 1u64 << bitmap.grain_shift();
        let next = (at / block + 1) * block;
        if bitmap.any_set(at, next.min(end) - at) {
            return false;
        }
        at = next;
    }
    true
}
