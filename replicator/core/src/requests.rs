//! What the application asks of a primary comes in: refused, held back, or begun; a large zero in pieces.

use crate::api::*;
use crate::op::*;
use crate::service::*;
use holdfast_wire_format::ids::*;

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
}
