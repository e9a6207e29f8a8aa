//! What a core asks for is carried out, as the shell does it.

use crate::disk::{DiskOp, SECTOR, meta_sectors, stamp_bytes};
use crate::network::Frame;
use crate::world::*;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::frame::{Body, FrameHeader, FrameKind};
use holdfast_wire_format::ids::*;
use std::rc::Rc;

impl World {
    // --- actions ---

    pub(crate) fn actions(&mut self, node: usize, actions: Vec<Action>) {
        for action in actions {
            if self.trace_all {
                self.log(|| {
                    let mut text = format!("{action:?}");
                    text.truncate(300);
                    format!("  node {node}: {text}")
                });
            }
            self.action(node, action);
        }
    }

    pub(crate) fn buf(&mut self, node: usize, buf: BufId) -> Stamps {
        match self.nodes[node].bufs.get(&buf.0) {
            Some(stamps) => stamps.clone(),
            None => {
                self.fail(format!(
                    "node {node} names buffer {buf:?} that it does not have"
                ));
                Rc::new(Vec::new())
            }
        }
    }

    pub(crate) fn process_event(&mut self, node: usize, delay: u64, event: Event) {
        let life = self.nodes[node].life;
        let event = Box::new(event);
        self.after(delay, Happening::Process { node, life, event });
    }

    pub(crate) fn action(&mut self, node: usize, action: Action) {
        match action {
            Action::AllocBuf { buf, length } => {
                let stamps = Rc::new(vec![
                    0xdead_0000_0000;
                    (u64::from(length) / SECTOR) as usize
                ]);
                if self.nodes[node].bufs.insert(buf.0, stamps).is_some() {
                    self.fail(format!("node {node} takes buffer {buf:?} twice"));
                }
            }
            Action::ReleaseBuf { buf } => {
                if self.nodes[node].bufs.remove(&buf.0).is_none() {
                    self.fail(format!("node {node} releases buffer {buf:?} twice"));
                }
            }
            Action::DiskRead {
                op,
                volume,
                offset,
                length,
                buf,
            } => {
                let disk_op = DiskOp::Read {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    count: u64::from(length) / SECTOR,
                    buf,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskWrite {
                op,
                volume,
                offset,
                length,
                buf,
                fua,
            } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                if stamps.len() < count {
                    return self.fail(format!("node {node} writes more than {buf:?} holds"));
                }
                let disk_op = DiskOp::Write {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    values: stamps[..count].to_vec(),
                    fua,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskZero {
                op,
                volume,
                offset,
                length,
                fua,
                ..
            } => {
                let disk_op = DiskOp::Write {
                    volume: volume.0 as usize,
                    first: offset / SECTOR,
                    values: vec![0; (length / SECTOR) as usize],
                    fua,
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::DiskFlush { op, volume } => {
                let disk_op = DiskOp::Flush {
                    volume: volume.0 as usize,
                    through: self.nodes[node].disk.landed(),
                };
                self.give_disk(node, op, disk_op, false);
            }
            Action::MetaWrite { op, place, bytes } => {
                let disk_op = DiskOp::MetaWrite {
                    volume: place.volume.0,
                    offset: place.offset,
                    sectors: meta_sectors(&bytes),
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::MetaWriteBuf {
                op,
                place,
                buf,
                length,
            } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let disk_op = DiskOp::MetaWrite {
                    volume: place.volume.0,
                    offset: place.offset,
                    sectors: stamps[..count]
                        .iter()
                        .map(|s| crate::disk::MetaSector::Stamp(*s))
                        .collect(),
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::MetaReadBuf {
                op,
                place,
                buf,
                length,
            } => {
                let disk_op = DiskOp::MetaRead {
                    volume: place.volume.0,
                    offset: place.offset,
                    count: u64::from(length) / SECTOR,
                    buf,
                };
                self.give_disk(node, op, disk_op, true);
            }
            Action::CopyBuf { from, to, length } => {
                let stamps = self.buf(node, from);
                let count = (u64::from(length) / SECTOR) as usize;
                if let Some(target) = self.nodes[node].bufs.get_mut(&to.0) {
                    Rc::make_mut(target)[..count].copy_from_slice(&stamps[..count]);
                }
            }
            Action::Hash { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let digest = stamps[..count].iter().fold(7u128, |h, s| {
                    (h ^ u128::from(*s)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
                });
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::HashDone { op, digest });
            }
            Action::Crc { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let mut hasher = crc32fast::Hasher::new();
                for stamp in &stamps[..count] {
                    hasher.update(&stamp_bytes(*stamp));
                }
                let crc = hasher.finalize();
                let zero = stamps[..count].iter().all(|s| *s == 0);
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::CrcDone { op, crc, zero });
            }
            Action::IsZero { op, buf, length } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(length) / SECTOR) as usize;
                let zero = stamps[..count].iter().all(|s| *s == 0);
                let delay = self.rng.below(20_000);
                self.process_event(node, delay, Event::ZeroCheck { op, zero });
            }
            Action::SurplusBegin { .. } => {}
            Action::SurplusWrite { op, .. } | Action::SurplusEnd { op, .. } => {
                let result = if self.rng.chance(20) {
                    Err("the state directory is full".to_owned())
                } else {
                    Ok("the simulator's memory".to_owned())
                };
                let delay = self.rng.below(200_000);
                self.process_event(node, delay, Event::SurplusDone { op, result });
            }
            Action::StoreRead { id } => {
                self.ask_register(node, crate::register::Ask::Read(id));
            }
            Action::StoreSwap {
                id,
                expected,
                record,
            } => {
                self.ask_register(node, crate::register::Ask::Swap(id, expected, record));
            }
            Action::Send {
                peer,
                session,
                header,
                payload,
            } => self.send(node, peer, session, header, payload),
            Action::Connect { peer } => {
                self.nodes[node].wants[peer.0 as usize] = true;
            }
            Action::Close {
                peer,
                session,
                code,
                text,
                reconnect,
            } => {
                if !reconnect {
                    self.nodes[node].wants[peer.0 as usize] = false;
                }
                self.coverage.count("goodbye", &format!("{code:?}"));
                self.close(node, peer.0 as usize, session, code, text);
            }
            Action::Complete { request, status } => self.completed(node, request, status),
            Action::Granted { request } => self.granted(node, request),
            Action::RoleChanged { role, epoch } => self.role_changed(node, role, epoch),
            Action::Resized { volume, size } => {
                self.nodes[node].sizes[volume.0 as usize] = size / SECTOR;
            }
            Action::MakeRoom { volume, size } => self.room_wanted(node, volume.0 as usize, size),
            Action::AdminDone { admin, result } => {
                let Some(what) = self.nodes[node].admin.remove(&admin.0) else {
                    return self.fail(format!("node {node} answers admin request {admin:?} twice"));
                };
                self.log(|| match &result {
                    Ok(text) => format!("node {node}: {what}: ok: {text}"),
                    Err(refusal) => format!("node {node}: {what}: refused: {refusal}"),
                });
                let how = if result.is_ok() { "ok" } else { "refused" };
                self.coverage.count("orders", &format!("{what} {how}"));
                self.order_answered(node, what, &result);
            }
            Action::Notice(notice) => {
                self.log(|| {
                    let peer = notice.peer.map_or(String::new(), |p| format!(" ({})", p.0));
                    format!("node {node}: {}{peer}: {}", notice.kind, notice.text)
                });
                if notice.kind == "handshake" {
                    let row = notice.text.split(':').next().unwrap_or_default().to_owned();
                    self.coverage.count("rows", &row);
                    let outcome = format!("{row}: {}", outcome_in(&notice.text));
                    self.coverage.count("outcomes", &outcome);
                } else {
                    self.coverage.count("notices", notice.kind);
                }
                self.noticed(node, &notice);
            }
            Action::Halt { reason } => {
                self.halted = true;
                self.fail(format!("node {node} halts: {reason}"));
            }
        }
    }

    /// A frame arrives at a live process.
    pub(crate) fn arrived(&mut self, node: usize, from: usize, session: SessionId, frame: Frame) {
        let peer = Slot(from as u8);
        if let Some(data) = frame.data {
            let buf = BufId(self.nodes[node].next_buf);
            self.nodes[node].next_buf += 1;
            self.nodes[node].bufs.insert(buf.0, data);
            let header = frame.header;
            self.event(
                node,
                Event::Data {
                    peer,
                    session,
                    header,
                    buf,
                },
            );
        } else {
            self.event(
                node,
                Event::Control {
                    peer,
                    session,
                    header: frame.header,
                    body: frame.body,
                },
            );
        }
    }

    pub(crate) fn send(
        &mut self,
        node: usize,
        peer: Slot,
        session: SessionId,
        mut header: FrameHeader,
        payload: Payload,
    ) {
        let (body, data) = match payload {
            Payload::None => (Body::Empty, None),
            Payload::Body(body) => (body, None),
            Payload::Buf { buf, .. } => {
                let stamps = self.buf(node, buf);
                let count = (u64::from(header.length) / SECTOR) as usize;
                header.payload_length = header.length;
                let data = if stamps.len() == count {
                    stamps
                } else {
                    Rc::new(stamps[..count].to_vec())
                };
                (Body::Empty, Some(data))
            }
        };
        if matches!(
            header.kind,
            FrameKind::Write | FrameKind::Zero | FrameKind::Flush
        ) && header.position > 0
        {
            // D17: one name, one content.
            let place = u64::from(header.volume.0) << 48 | header.offset;
            let content = data.as_ref().map_or(u64::from(header.length), |d| {
                d.iter().fold(header.length.into(), |h: u64, s| {
                    (h ^ s).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                })
            });
            let result = self
                .oracle
                .named(header.generation.0, header.position, place, content);
            self.check(result);
        }
        self.coverage.frames[header.kind as usize & 127] += 1;
        let kind = header.kind;
        let frame = Frame {
            header,
            body,
            data,
            again: false,
        };
        self.transmit(node, peer.0 as usize, session, frame);
        if let Some(point) = sending(kind) {
            self.ambushes(node, point);
        }
    }
}

/// What a meeting came to, by the sentences that tell a person.
fn outcome_in(told: &str) -> &'static str {
    const SENTENCES: [(&str, &str); 11] = [
        ("The copies do not connect", "refused"),
        ("mirroring begins", "nothing to copy"),
        (
            "marked and those in the target's undo log",
            "copies marks and undo",
        ),
        ("the blocks that either side marked", "copies marks"),
        (
            "takes every block whose checksums differ",
            "copies by checksum",
        ),
        ("takes every block", "copies everything"),
        ("Split brain since", "split brain"),
        ("until a person answers", "asks a person"),
        ("Nothing is copied between these two", "waits for a third"),
        ("goes on without its own disk", "diskless"),
        ("", "?"),
    ];
    SENTENCES
        .iter()
        .find(|(sentence, _)| told.contains(sentence))
        .map_or("?", |(_, outcome)| outcome)
}

/// The point of [`crate::plan::TRIGGERS`] that sending such a frame is.
fn sending(kind: FrameKind) -> Option<&'static str> {
    Some(match kind {
        FrameKind::Hello => "sends Hello",
        FrameKind::BitmapEnd => "sends BitmapEnd",
        FrameKind::Ready => "sends Ready",
        FrameKind::ResyncData => "sends ResyncData",
        FrameKind::ResyncAck => "sends ResyncAck",
        FrameKind::FlushAck => "sends FlushAck",
        FrameKind::ResyncDone => "sends ResyncDone",
        FrameKind::CompleteAck => "sends CompleteAck",
        FrameKind::InSync => "sends InSync",
        FrameKind::PromoteRequest => "sends PromoteRequest",
        FrameKind::PromoteReply => "sends PromoteReply",
        FrameKind::NewGeneration => "sends NewGeneration",
        FrameKind::GenerationAck => "sends GenerationAck",
        FrameKind::Demoted => "sends Demoted",
        FrameKind::DiskLost => "sends DiskLost",
        FrameKind::DiskLostAck => "sends DiskLostAck",
        _ => return None,
    })
}
