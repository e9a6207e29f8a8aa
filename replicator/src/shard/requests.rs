//! From an application's requests to the core's, and back.
//!
//! A request becomes *parts*: pieces of at most 1 MiB for data, and, where it begins or ends inside a sector, one
//! read-modify-write of that sector under the core's lock. The application gets one answer when the last part ends.

use super::budget::Receipt;
use super::buffers::{BufTable, ClientBuf, Entry};
use super::memory::Memory;
use holdfast_disk::{Buf, ReadBuf};
use holdfast_frontend::{Completion, Extent, IoError, IoErrorKind, Output, Request};
use holdfast_replicator_core::api::{BufId, Event, RequestId, Status, Time};
use holdfast_wire_format::frame::MAX_PAYLOAD;
use holdfast_wire_format::ids::VolumeIndex;
use slab::Slab;
use std::collections::VecDeque;

/// What is counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Zero,
}

/// A finished request, for the metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub kind: Kind,
    pub volume: VolumeIndex,
    pub bytes: u64,
    pub nanoseconds: u64,
    pub ok: bool,
}

/// The volume a request is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub volume: VolumeIndex,
    /// Bytes; a power of two.
    pub sector: u32,
    /// Someone will receive the data: its CRC is computed once, here.
    pub checksum: bool,
}

/// Where a request's parts go to.
pub(super) struct Sink<'a> {
    pub table: &'a mut BufTable,
    pub events: &'a mut VecDeque<Event>,
    pub memory: &'a Memory,
}

struct Parent {
    completion: Completion<ClientBuf>,
    kind: Kind,
    volume: VolumeIndex,
    bytes: u64,
    started: Time,
    /// Parts not ended.
    left: u32,
    /// The first failure; a later success never hides it (D14).
    status: Status,
    read: Option<ClientBuf>,
    target: Option<ReadBuf>,
    /// A write's share of the budget for clients, held until it is answered.
    _receipt: Option<Receipt>,
}

enum Part {
    /// A piece of whole sectors. `buf`: the number to forget with it.
    Piece { parent: usize, buf: Option<BufId> },
    /// One sector of which some bytes change.
    Sector(Sector),
    /// Reading what a sector holds now.
    Fetch { sector: usize, buf: BufId },
}

struct Sector {
    parent: usize,
    shape: Shape,
    /// Byte offset of the sector.
    offset: u64,
    /// Bytes of it that change.
    from: usize,
    to: usize,
    /// Where the new bytes are; none for zeroes.
    payload: Option<(Buf, usize)>,
    fua: bool,
    granted: bool,
}

/// Requests of one service that have not been answered.
#[derive(Default)]
pub(super) struct Requests {
    parents: Slab<Parent>,
    parts: Slab<Part>,
}

impl Requests {
    /// Starts a read into `buf`, which covers the sectors that hold `offset..offset + len`.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        &mut self,
        now: Time,
        shape: Shape,
        offset: u64,
        len: u32,
        (mut buf, receipt): (Buf, Receipt),
        completion: Completion<ClientBuf>,
        sink: &mut Sink,
    ) {
        let (from, to) = covering(offset, u64::from(len), shape.sector);
        debug_assert_eq!(buf.len() as u64, to - from);
        let Some(target) = buf.read_target() else {
            return completion.fail(IoError::new(
                IoErrorKind::Io,
                "a new buffer had two owners; this is a defect",
            ));
        };
        let parent = self.parent(now, Kind::Read, shape.volume, u64::from(len), completion);
        let mut at = from;
        while at < to {
            let length = (to - at).min(u64::from(MAX_PAYLOAD)) as usize;
            let id = sink.table.insert(Entry {
                buf: buf.clone(),
                at: (at - from) as usize,
                len: length,
                target: Some(target.clone()),
                _receipt: None,
            });
            let request = self.part(
                parent,
                Part::Piece {
                    parent,
                    buf: Some(id),
                },
            );
            sink.events.push_back(Event::Read {
                request,
                volume: shape.volume,
                offset: at,
                length: length as u32,
                buf: id,
            });
            at += length as u64;
        }
        let parent = &mut self.parents[parent];
        parent.read = Some(ClientBuf {
            buf,
            start: (offset - from) as usize,
            len: len as usize,
            receipt: Some(receipt),
        });
        parent.target = Some(target);
    }

    /// Starts anything but a read. May answer at once.
    pub fn start(
        &mut self,
        now: Time,
        shape: Shape,
        request: Request<ClientBuf>,
        completion: Completion<ClientBuf>,
        sink: &mut Sink,
    ) {
        match request {
            Request::Read { .. } => {
                completion.fail(IoError::new(
                    IoErrorKind::Io,
                    "a read came without memory; this is a defect",
                ));
            }
            Request::Write {
                offset,
                buffer,
                fua,
            } => {
                self.write(now, shape, offset, buffer, fua, completion, sink);
            }
            Request::Flush => {
                let parent = self.parent(now, Kind::Flush, shape.volume, 0, completion);
                let request = self.part(parent, Part::Piece { parent, buf: None });
                sink.events.push_back(Event::Flush { request });
            }
            Request::Discard { offset, len, fua } => {
                // The bytes of a sector that is discarded in part stay as they are, on every copy.
                let (from, to) = inside(offset, len, shape.sector);
                if from >= to {
                    return completion.done();
                }
                let parent = self.parent(now, Kind::Zero, shape.volume, to - from, completion);
                self.zero_sectors(parent, shape, from, to, true, fua, sink);
            }
            Request::WriteZeroes { fast: true, .. } => completion.fail(IoError::new(
                IoErrorKind::NotSupported,
                "zeroing is carried out on every copy, and not known to be fast there",
            )),
            Request::WriteZeroes {
                offset,
                len,
                fua,
                may_unmap,
                fast: false,
            } => {
                let parent = self.parent(now, Kind::Zero, shape.volume, len, completion);
                // Held until all parts exist.
                self.parents[parent].left += 1;
                let (from, to) = inside(offset, len, shape.sector);
                if from < to {
                    self.zero_sectors(parent, shape, from, to, may_unmap, fua, sink);
                }
                self.edges(parent, shape, offset, len, None, fua, sink);
                self.parents[parent].left -= 1;
            }
            // Data is read when it is asked for; the disk's own cache is behind it.
            Request::Cache { .. } => completion.done(),
            // What is a hole here says nothing of the other copies, and a client may skip what is one.
            Request::BlockStatus { len, .. } => {
                completion.complete(Ok(Output::Extents(vec![Extent {
                    len,
                    hole: false,
                    zero: false,
                }])));
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn write(
        &mut self,
        now: Time,
        shape: Shape,
        offset: u64,
        mut buffer: ClientBuf,
        fua: bool,
        completion: Completion<ClientBuf>,
        sink: &mut Sink,
    ) {
        let len = buffer.len as u64;
        let parent = self.parent(now, Kind::Write, shape.volume, len, completion);
        self.parents[parent]._receipt = buffer.receipt.take();
        let (from, to) = inside(offset, len, shape.sector);
        let mut at = from;
        while at < to {
            let length = (to - at).min(u64::from(MAX_PAYLOAD)) as usize;
            let entry = Entry {
                buf: buffer.buf.clone(),
                at: buffer.start + (at - offset) as usize,
                len: length,
                target: None,
                _receipt: None,
            };
            let crc = if shape.checksum {
                crc32fast::hash(entry.bytes())
            } else {
                0
            };
            let id = sink.table.insert(entry);
            // The core releases the buffer of a write.
            let request = self.part(parent, Part::Piece { parent, buf: None });
            sink.events.push_back(Event::Write {
                request,
                volume: shape.volume,
                offset: at,
                length: length as u32,
                buf: id,
                fua,
                crc,
            });
            at += length as u64;
        }
        self.edges(
            parent,
            shape,
            offset,
            len,
            Some((&buffer.buf, buffer.start)),
            fua,
            sink,
        );
    }

    #[allow(clippy::too_many_arguments)]
    fn zero_sectors(
        &mut self,
        parent: usize,
        shape: Shape,
        from: u64,
        to: u64,
        unmap: bool,
        fua: bool,
        sink: &mut Sink,
    ) {
        let request = self.part(parent, Part::Piece { parent, buf: None });
        sink.events.push_back(Event::Zero {
            request,
            volume: shape.volume,
            offset: from,
            length: to - from,
            unmap,
            fua,
        });
    }

    /// The sectors that a range begins or ends inside of.
    #[allow(clippy::too_many_arguments)]
    fn edges(
        &mut self,
        parent: usize,
        shape: Shape,
        offset: u64,
        len: u64,
        payload: Option<(&Buf, usize)>,
        fua: bool,
        sink: &mut Sink,
    ) {
        let sector = u64::from(shape.sector);
        let end = offset + len;
        let mut edge = |requests: &mut Requests, at: u64| {
            let (from, to) = (offset.max(at), end.min(at + sector));
            let part = Part::Sector(Sector {
                parent,
                shape,
                offset: at,
                from: (from - at) as usize,
                to: (to - at) as usize,
                payload: payload
                    .map(|(buf, start)| (buf.clone(), start + (from - offset) as usize)),
                fua,
                granted: false,
            });
            let request = requests.part(parent, part);
            sink.events.push_back(Event::Lock {
                request,
                volume: shape.volume,
                offset: at,
                length: shape.sector,
            });
        };
        let first = offset - offset % sector;
        let last = end - end % sector;
        if first != offset {
            edge(self, first);
        }
        if last != end && (last != first || first == offset) {
            edge(self, last);
        }
    }

    fn parent(
        &mut self,
        now: Time,
        kind: Kind,
        volume: VolumeIndex,
        bytes: u64,
        completion: Completion<ClientBuf>,
    ) -> usize {
        self.parents.insert(Parent {
            completion,
            kind,
            volume,
            bytes,
            started: now,
            left: 0,
            status: Status::Ok,
            read: None,
            target: None,
            _receipt: None,
        })
    }

    fn part(&mut self, parent: usize, part: Part) -> RequestId {
        self.parents[parent].left += 1;
        RequestId(self.parts.insert(part) as u64)
    }

    /// The core granted a lock: read what the sector holds. Returns the request if that was not possible and it
    /// ended with it.
    pub fn granted(
        &mut self,
        now: Time,
        request: RequestId,
        sink: &mut Sink,
    ) -> Result<Option<Ended>, String> {
        let key = request.0 as usize;
        let Some(Part::Sector(sector)) = self.parts.get_mut(key) else {
            return Err(format!(
                "the core granted a lock to request {key}, which asked for none"
            ));
        };
        sector.granted = true;
        let (shape, offset) = (sector.shape, sector.offset);
        let Ok(buf) = sink.memory.internal(shape.sector as usize) else {
            return self.completed(now, request, Status::Io, sink);
        };
        let id = sink.table.insert(Entry {
            buf,
            at: 0,
            len: shape.sector as usize,
            target: None,
            _receipt: None,
        });
        let fetch = self.parts.insert(Part::Fetch {
            sector: key,
            buf: id,
        });
        sink.events.push_back(Event::Read {
            request: RequestId(fetch as u64),
            volume: shape.volume,
            offset,
            length: shape.sector,
            buf: id,
        });
        Ok(None)
    }

    /// A part ended. Returns the request if it was its last one.
    pub fn completed(
        &mut self,
        now: Time,
        request: RequestId,
        status: Status,
        sink: &mut Sink,
    ) -> Result<Option<Ended>, String> {
        let key = request.0 as usize;
        match self.parts.get_mut(key) {
            None => Err(format!(
                "the core completed request {key}, which does not exist"
            )),
            Some(Part::Piece { parent, buf }) => {
                let parent = *parent;
                if let Some(buf) = *buf {
                    sink.table.remove(buf);
                }
                self.parts.remove(key);
                Ok(self.part_ended(now, parent, status))
            }
            Some(Part::Sector(sector)) => {
                let (parent, granted) = (sector.parent, sector.granted);
                self.parts.remove(key);
                if granted {
                    sink.events.push_back(Event::Unlock { request });
                }
                Ok(self.part_ended(now, parent, status))
            }
            Some(Part::Fetch { sector, buf }) => {
                let (sector, buf) = (*sector, *buf);
                self.parts.remove(key);
                let old = sink.table.remove(buf);
                if status == Status::Ok
                    && let Some(old) = old
                    && let Some(write) = self.merge(sector, &old, sink)
                {
                    sink.events.push_back(write);
                    return Ok(None);
                }
                let status = if status == Status::Ok {
                    Status::Io
                } else {
                    status
                };
                self.completed(now, RequestId(sector as u64), status, sink)
            }
        }
    }

    /// The sector with its new bytes, as a write under its lock.
    fn merge(&mut self, key: usize, old: &Entry, sink: &mut Sink) -> Option<Event> {
        let Some(Part::Sector(sector)) = self.parts.get_mut(key) else {
            return None;
        };
        let mut buf = sink.memory.internal(sector.shape.sector as usize).ok()?;
        let bytes = buf.get_mut()?;
        bytes.copy_from_slice(old.bytes());
        let changed = &mut bytes[sector.from..sector.to];
        match sector.payload.take() {
            Some((payload, at)) => {
                changed.copy_from_slice(&payload.as_slice()[at..at + changed.len()])
            }
            None => changed.fill(0),
        }
        let entry = Entry {
            buf,
            at: 0,
            len: sector.shape.sector as usize,
            target: None,
            _receipt: None,
        };
        let crc = if sector.shape.checksum {
            crc32fast::hash(entry.bytes())
        } else {
            0
        };
        Some(Event::Write {
            request: RequestId(key as u64),
            volume: sector.shape.volume,
            offset: sector.offset,
            length: sector.shape.sector,
            buf: sink.table.insert(entry),
            fua: sector.fua,
            crc,
        })
    }

    fn part_ended(&mut self, now: Time, key: usize, status: Status) -> Option<Ended> {
        let parent = &mut self.parents[key];
        if parent.status == Status::Ok {
            parent.status = status;
        }
        parent.left -= 1;
        if parent.left > 0 {
            return None;
        }
        let parent = self.parents.remove(key);
        let ended = Ended {
            kind: parent.kind,
            volume: parent.volume,
            bytes: parent.bytes,
            nanoseconds: now.0.saturating_sub(parent.started.0),
            ok: parent.status == Status::Ok,
        };
        drop(parent.target);
        parent
            .completion
            .complete(match (error_of(parent.status), parent.read) {
                (Some(error), _) => Err(error),
                (None, Some(data)) if data.buf.is_being_read_into() => Err(IoError::new(
                    IoErrorKind::Io,
                    "the read was answered while the disk still worked on it; this is a defect",
                )),
                (None, Some(data)) => Ok(Output::Data(data)),
                (None, None) => Ok(Output::Done),
            });
        Some(ended)
    }
}

/// The whole sectors that hold the range: its begin and end.
pub(super) fn covering(offset: u64, len: u64, sector: u32) -> (u64, u64) {
    let sector = u64::from(sector);
    (
        offset - offset % sector,
        (offset + len).next_multiple_of(sector),
    )
}

/// The whole sectors inside the range; begin is not below end when there are none.
fn inside(offset: u64, len: u64, sector: u32) -> (u64, u64) {
    let sector = u64::from(sector);
    let end = offset + len;
    (offset.next_multiple_of(sector), end - end % sector)
}

fn error_of(status: Status) -> Option<IoError> {
    Some(match status {
        Status::Ok => return None,
        Status::Io => IoError::new(
            IoErrorKind::Io,
            "the disk failed and no other copy could serve the request; see `holdfast status`",
        ),
        Status::Invalid => IoError::new(IoErrorKind::Invalid, "outside the volume"),
        Status::NotPrimary => IoError::new(
            IoErrorKind::ShuttingDown,
            "this node is not primary; the request was not carried out here, or may not be on every copy. \
             Reconnect to the current primary",
        ),
        Status::NoSpace => IoError::new(IoErrorKind::NoSpace, "past the end of the volume"),
    })
}

#[cfg(test)]
mod tests;
