//! What the application asks of a primary: reads, writes, zeroes, flushes; and when each completes.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::resync_rate::Kind;
use crate::service::*;
use holdfast_wire_format::activity_log::ExtentKey;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// Largest piece of a zero or discard: touches few extents of the activity log at a time.
const ZERO_PIECE: u64 = 16 << 20;
/// Pieces of one large zero in flight together.
const ZERO_PIECES: u32 = 8;

impl Core {
    /// One request of the application.
    pub(crate) fn client(&mut self, event: Event, out: &mut Actions) {
        let (request, place) = match &event {
            Event::Read {
                request,
                volume,
                offset,
                length,
                ..
            }
            | Event::Write {
                request,
                volume,
                offset,
                length,
                ..
            }
            | Event::Lock {
                request,
                volume,
                offset,
                length,
            } => (*request, Some((*volume, *offset, u64::from(*length)))),
            Event::Zero {
                request,
                volume,
                offset,
                length,
                ..
            } => (*request, Some((*volume, *offset, *length))),
            Event::Flush { request } => (*request, None),
            _ => return,
        };
        let is_write = !matches!(event, Event::Read { .. });
        if let Some(status) = self.refuse_client(place, is_write) {
            if let Event::Write { buf, .. } = event {
                out.push(Action::ReleaseBuf { buf });
            }
            return out.push(Action::Complete { request, status });
        }
        if self.suspended
            || !self.held.is_empty()
            || self.diskless_holds()
            || (is_write && self.congestion_blocks())
        {
            self.held.push_back(event);
            return;
        }
        self.admit(event, out);
    }

    fn refuse_client(
        &self,
        place: Option<(VolumeIndex, u64, u64)>,
        is_write: bool,
    ) -> Option<Status> {
        if self.role != Role::Primary {
            return Some(Status::NotPrimary);
        }
        if self.out_of_service() {
            return Some(Status::Io);
        }
        let (volume, offset, length) = place?;
        let Some(v) = self.volumes.get(volume.0 as usize) else {
            return Some(Status::Invalid);
        };
        let sector = u64::from(v.sector_size);
        if length == 0 || offset % sector != 0 || length % sector != 0 {
            return Some(Status::Invalid);
        }
        match offset.checked_add(length) {
            Some(end) if end <= v.size => None,
            _ if is_write => Some(Status::NoSpace),
            _ => Some(Status::Invalid),
        }
    }

    /// Requests held back go on, in their order.
    pub(crate) fn release_held(&mut self, out: &mut Actions) {
        while !self.suspended && !self.congestion_blocks() && !self.diskless_holds() {
            let Some(event) = self.held.pop_front() else {
                break;
            };
            if self.role == Role::Primary && !self.out_of_service() {
                self.admit(event, out);
            } else {
                let status = if self.out_of_service() {
                    Status::Io
                } else {
                    Status::NotPrimary
                };
                self.end_held(event, status, out);
            }
        }
    }

    pub(crate) fn end_held(&mut self, event: Event, status: Status, out: &mut Actions) {
        let request = match event {
            Event::Write { request, buf, .. } => {
                out.push(Action::ReleaseBuf { buf });
                request
            }
            Event::Read { request, .. }
            | Event::Zero { request, .. }
            | Event::Flush { request }
            | Event::Lock { request, .. } => request,
            _ => return,
        };
        out.push(Action::Complete { request, status });
    }

    fn admit(&mut self, event: Event, out: &mut Actions) {
        match event {
            Event::Read {
                request,
                volume,
                offset,
                length,
                buf,
            } => {
                self.counters.reads += 1;
                self.counters.read_bytes += u64::from(length);
                let key = self.ops.insert(Op::Read {
                    request,
                    volume,
                    offset,
                    length,
                    buf,
                    arrived_at: self.now.0,
                });
                if self.diskless.is_some() {
                    return self.read_remotely(key, out);
                }
                let op = OpId(key as u64);
                out.push(Action::DiskRead {
                    op,
                    volume,
                    offset,
                    length,
                    buf,
                });
            }
            Event::Write {
                request,
                volume,
                offset,
                length,
                buf,
                fua,
                crc,
            } => {
                self.counters.writes += 1;
                self.counters.write_bytes += u64::from(length);
                let data = Data::Buf {
                    buf,
                    crc,
                    crc_known: crc != 0,
                };
                self.begin_write(
                    request,
                    false,
                    volume,
                    offset,
                    u64::from(length),
                    data,
                    fua,
                    out,
                );
            }
            Event::Zero {
                request,
                volume,
                offset,
                length,
                unmap,
                fua,
            } => {
                self.counters.zeroes += 1;
                if length <= ZERO_PIECE {
                    self.begin_write(
                        request,
                        false,
                        volume,
                        offset,
                        length,
                        Data::Zero { unmap },
                        fua,
                        out,
                    );
                } else {
                    let piece = PieceState {
                        volume,
                        next: offset,
                        end: offset + length,
                        unmap,
                        fua,
                        in_flight: 0,
                        status: Status::Ok,
                    };
                    self.pieces.insert(request, piece);
                    self.next_pieces(request, out);
                }
            }
            Event::Flush { request } => {
                self.counters.flushes += 1;
                let _position = self.begin_flush(Some(request), out);
            }
            Event::Lock {
                request,
                volume,
                offset,
                length,
            } => {
                let key = self.ops.insert(Op::Lock {
                    request,
                    granted: false,
                });
                self.locks.insert(request, key);
                if self
                    .overlap
                    .insert(key, volume.0, offset, u64::from(length))
                    == 0
                {
                    self.overlap_ready(key, out);
                }
            }
            _ => {}
        }
    }

    fn next_pieces(&mut self, request: RequestId, out: &mut Actions) {
        loop {
            let Some(piece) = self.pieces.get_mut(&request) else {
                return;
            };
            if piece.next >= piece.end
                || piece.in_flight >= ZERO_PIECES
                || piece.status != Status::Ok
            {
                return;
            }
            let (volume, offset, unmap, fua) = (piece.volume, piece.next, piece.unmap, piece.fua);
            let length = ZERO_PIECE.min(piece.end - piece.next);
            piece.next += length;
            piece.in_flight += 1;
            self.begin_write(
                request,
                true,
                volume,
                offset,
                length,
                Data::Zero { unmap },
                fua,
                out,
            );
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn begin_write(
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

    /// Copies whose acknowledgement a completion needs, this one included.
    pub(crate) fn required(&self) -> SlotSet {
        // D18: while a change of S is not known to be durable, both sets count.
        self.sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .with(self.slot)
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

    /// The local disk answered a write of the application.
    pub(crate) fn client_disk_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let result = result.or_else(|e| {
            if planted!("write-error-ignored") {
                Ok(())
            } else {
                Err(e)
            }
        });
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        op.local_left = 0;
        // D14: an error stays an error.
        op.local_failed |= result.is_err();
        let (position, buf) = (op.position, op.data);
        if let Data::Buf { buf, .. } = buf {
            out.push(Action::ReleaseBuf { buf });
        }
        if result.is_err() {
            self.disk_failed("a write of the application failed", out);
            if self.diskless.is_none() {
                return;
            }
        }
        // From its completion on a write needs a flush: one that began before may not have covered it.
        if let Some(Op::Client(op)) = self.ops.get(key) {
            self.volumes[op.volume.0 as usize].unflushed = true;
        }
        if let Some(entry) = self.window.get_mut(position) {
            entry.local_done = true;
        }
        let leave = match self.ops.get_mut(key) {
            Some(Op::Client(op)) => std::mem::take(&mut op.in_overlap),
            _ => false,
        };
        if leave {
            self.leave_overlap(key, out);
        }
        self.check_client(key, out);
    }

    /// Completes the operation if its mode allows (D1), and forgets it when nothing is open.
    pub(crate) fn check_client(&mut self, key: usize, out: &mut Actions) {
        let required = self.required();
        let modes = self.modes();
        let may_complete = self.may_complete();
        let diskless = self.diskless_serves();
        let mut free = None;
        let Some(Op::Client(op)) = self.ops.get_mut(key) else {
            return;
        };
        if op.stage != Stage::Issued {
            return;
        }
        if !op.replied && ((op.local_left == 0 && !op.local_failed) || diskless) {
            let held_by = required.iter().filter(|s| *s != self.slot).find(|s| {
                !match op.legs[s.0 as usize] {
                    Leg::Acked => true,
                    Leg::Received => {
                        planted!("received-is-acknowledged")
                            || (modes[s.0 as usize] == Mode::SemiSync && !diskless)
                    }
                    // Not concerned: it joined after this was issued, and had to have it before it joined.
                    Leg::None => true,
                    Leg::InFlight if op.data == Data::Flush => planted!("flush-after-one-leg"),
                    Leg::InFlight => planted!("early-completion"),
                    Leg::Bits => planted!("lost-leg-completes"),
                }
            });
            match held_by {
                None if may_complete => {
                    op.replied = true;
                    let (position, request) = (op.position, op.request);
                    let (many, internal) = (op.part_of_many, op.internal);
                    if let (Some(kind), false) = (op.kind(), internal) {
                        let took = self.now.0.saturating_sub(op.arrived_at);
                        self.resync_rate.answered(kind, took);
                    }
                    if let (Data::Buf { buf, .. }, true) =
                        (op.data, std::mem::take(&mut op.holds_buf))
                    {
                        out.push(Action::ReleaseBuf { buf });
                    }
                    free = (diskless && std::mem::take(&mut op.in_overlap)).then_some(key);
                    self.completed_max = self.completed_max.max(position);
                    if internal {
                        // An asynchronous copy answers it only once it is stable: nobody waits for that.
                        self.stable_flush_running = false;
                    } else if many {
                        self.piece_done(request, Status::Ok, out);
                    } else {
                        out.push(Action::Complete {
                            request,
                            status: Status::Ok,
                        });
                    }
                }
                Some(slot) if op.legs[slot.0 as usize] == Leg::Bits => {
                    self.required_leg_missing(out)
                }
                _ => {}
            }
        }
        self.forget_if_settled(key, out);
        if let Some(key) = free {
            self.leave_overlap(key, out);
        }
    }

    /// No completion while a new generation is not known to every connected copy (D10), nor between the
    /// decision to drop a copy and its commit.
    fn may_complete(&self) -> bool {
        self.role != Role::Secondary
            && !self.dropping
            && !self.generation_committing
            && (self.generation_unknown_to.is_empty() || planted!("generation-unknown"))
            && (!self.failed || self.diskless_serves())
    }

    /// The flush that ends a demotion: everything, everywhere.
    pub(crate) fn begin_demote_flush(&mut self, out: &mut Actions) {
        let _position = self.begin_flush(None, out);
    }

    fn modes(&self) -> [Mode; MAX_COPIES] {
        let mut modes = [Mode::Sync; MAX_COPIES];
        for peer in &self.peers {
            modes[peer.slot.0 as usize] = peer.mode;
        }
        modes
    }

    fn forget_if_settled(&mut self, key: usize, out: &mut Actions) {
        let Some(Op::Client(op)) = self.ops.get(key) else {
            return;
        };
        let open = op
            .legs
            .iter()
            .any(|l| matches!(l, Leg::InFlight | Leg::Received));
        if !op.replied || op.local_left > 0 || open {
            return;
        }
        let (position, internal) = (op.position, op.internal);
        self.ops.remove(key);
        if let Some(entry) = self.window.get_mut(position) {
            entry.op = NO_OP;
        }
        if internal {
            self.stable_flush_running = false;
        }
        self.trim_window(out);
    }

    pub(crate) fn piece_done(&mut self, request: RequestId, status: Status, out: &mut Actions) {
        let Some(piece) = self.pieces.get_mut(&request) else {
            return;
        };
        piece.in_flight -= 1;
        if status != Status::Ok {
            piece.status = status;
        }
        if piece.in_flight == 0 && (piece.next >= piece.end || piece.status != Status::Ok) {
            let status = piece.status;
            self.pieces.remove(&request);
            return out.push(Action::Complete { request, status });
        }
        self.next_pieces(request, out);
    }

    /// Every operation of the application, by position order, looks again whether it may complete.
    pub(crate) fn check_all(&mut self, out: &mut Actions) {
        self.unpark(out);
        let keys: Vec<u32> = self
            .window
            .iter()
            .map(|e| e.op)
            .filter(|op| *op != NO_OP)
            .collect();
        for key in keys {
            self.check_client(key as usize, out);
        }
    }

    /// The peer acknowledged positions; `leg` is what they become.
    pub(crate) fn acknowledged(
        &mut self,
        at: usize,
        first: Position,
        last: Position,
        leg: Leg,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot.0 as usize;
        // A peer may name what it likes (D14): only what is in the window counts.
        let begin = self
            .window
            .iter()
            .next()
            .map_or(first, |e| e.position.max(first));
        for position in begin..=last.min(self.issued) {
            let Some(entry) = self.window.get(position) else {
                continue;
            };
            let key = entry.op as usize;
            let length = entry.length;
            if entry.op == NO_OP {
                continue;
            }
            let Some(Op::Client(op)) = self.ops.get_mut(key) else {
                continue;
            };
            match (op.legs[slot], leg) {
                (Leg::InFlight, Leg::Received) => op.legs[slot] = Leg::Received,
                (Leg::InFlight | Leg::Received, Leg::Acked) => {
                    op.legs[slot] = Leg::Acked;
                    let peer = &mut self.peers[at];
                    peer.unacked_bytes = peer.unacked_bytes.saturating_sub(length);
                }
                _ => continue,
            }
            self.check_client(key, out);
        }
    }

    /// An operation that was never issued, or that cannot complete any more, ends with `status`.
    fn abandon(&mut self, key: usize, release_log: bool, status: Status, out: &mut Actions) {
        let Some(Op::Client(op)) = self.ops.try_remove(key) else {
            return;
        };
        if let (Data::Buf { buf, .. }, true) = (op.data, op.stage != Stage::Issued) {
            out.push(Action::ReleaseBuf { buf });
        }
        if release_log && op.data != Data::Flush && self.tuning.activity_log {
            for extent in self.extents(op.volume, op.offset, op.length) {
                self.log.release(extent);
            }
        }
        if op.internal {
            self.stable_flush_running = false;
        } else if op.part_of_many {
            self.piece_done(op.request, status, out);
        } else {
            out.push(Action::Complete {
                request: op.request,
                status,
            });
        }
        if op.in_overlap {
            self.leave_overlap(key, out);
        }
    }

    /// The role ends or the disk failed: what is held, waiting or parked is answered; what the disk still
    /// works on stays until it answers.
    pub(crate) fn end_client_io(&mut self, status: Status, only_parked: bool, out: &mut Actions) {
        while let Some(event) = self.held.pop_front() {
            self.end_held(event, status, out);
        }
        let waiting: Vec<usize> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op) if op.stage != Stage::Issued => Some(key),
                _ => None,
            })
            .collect();
        self.log_waiting.retain(|key| !waiting.contains(key));
        // These passed the log already and hold their extents.
        let held = std::mem::take(&mut self.issue_waiting);
        for key in waiting {
            self.abandon(key, held.contains(&key), status, out);
        }
        // Parked: done here, but a required copy lacks it. It keeps its place in the window.
        let parked: Vec<usize> = self
            .ops
            .iter()
            .filter_map(|(key, op)| match op {
                Op::Client(op) if !op.replied && (!only_parked || op.legs.contains(&Leg::Bits)) => {
                    Some(key)
                }
                _ => None,
            })
            .collect();
        for key in parked {
            self.end_issued(key, status, out);
        }
        self.parked = false;
    }

    /// An operation on its way is answered with an error; what is still open of it stays until it ends.
    pub(crate) fn end_issued(&mut self, key: usize, status: Status, out: &mut Actions) {
        if let Some(Op::Client(op)) = self.ops.get_mut(key) {
            op.replied = true;
            let (request, many, internal) = (op.request, op.part_of_many, op.internal);
            if internal {
                // What is still open of it may never be answered: the next primary's flushes do not wait for it.
                self.stable_flush_running = false;
            } else if many {
                self.piece_done(request, status, out);
            } else {
                out.push(Action::Complete { request, status });
            }
        }
        self.forget_if_settled(key, out);
    }

    pub(crate) fn read_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        if result.is_err() {
            self.disk_failed("a read of the application failed", out);
            if self.diskless.is_some() {
                return self.read_remotely(key, out);
            }
        }
        let Op::Read {
            request,
            arrived_at,
            ..
        } = self.ops.remove(key)
        else {
            return;
        };
        let took = self.now.0.saturating_sub(arrived_at);
        self.resync_rate.answered(Kind::Read, took);
        let status = match result {
            Ok(()) => Status::Ok,
            Err(_) => Status::Io,
        };
        out.push(Action::Complete { request, status });
    }

    /// Client operations that were issued and not answered.
    pub(crate) fn client_in_flight(&self) -> bool {
        self.ops.iter().any(|(_, op)| match op {
            Op::Client(op) => !op.replied || op.local_left > 0,
            Op::Read { .. } | Op::Lock { .. } => true,
            _ => false,
        })
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
