//! Online verify: both copies are compared block range by block range while the service runs.
//!
//! The checking side reads a range with no write to it in flight, and its digest travels in the order of the
//! stream: the other side reads the same range after everything before it and before everything behind it.

use crate::api::*;
use crate::op::*;
use crate::peer::*;
use crate::roles::refusal;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;

/// Bytes compared by one digest.
pub(crate) const VERIFY_CHUNK: u32 = 256 << 10;
/// Digests on their way at once.
const VERIFY_DEPTH: usize = 16;

impl Core {
    /// Begins a comparison with every connected copy that stands established.
    pub(crate) fn start_verify(
        &mut self,
        admin: AdminId,
        only: Option<VolumeIndex>,
        out: &mut Actions,
    ) {
        let candidates: Vec<usize> = (0..self.peers.len())
            .filter(|at| {
                let p = &self.peers[*at];
                matches!(p.relation, Relation::Established) && !p.is_primary && !p.verify.running
            })
            .collect();
        let Some(&at) = candidates.first() else {
            let text = refusal(
                "no other copy stands established with this one as its leader, or a verify is running",
                "Nothing was compared and nothing changed",
                "Run it on the primary (or, with no primary, on either copy) when the copies are connected and no resync runs",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        };
        if only.is_some_and(|v| v.0 as usize >= self.volumes.len()) {
            let text = refusal(
                "there is no such volume",
                "Nothing was compared",
                "List the volumes",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        for &at in &candidates {
            let total = self
                .volumes
                .iter()
                .enumerate()
                .filter(|(i, _)| only.is_none_or(|v| v.0 as usize == *i))
                .map(|(_, v)| v.size)
                .sum();
            // Numbers go on: reads and replies of a run that was ended may still come, and belong to none of this one.
            let first_sequence = self.peers[at].verify.next_sequence.max(1);
            self.peers[at].verify = VerifyState {
                volume: only.map_or(0, |v| v.0 as usize),
                only,
                first_sequence,
                next_sequence: first_sequence,
                total_bytes: total,
                running: true,
                ..VerifyState::default()
            };
        }
        self.peers[at].verify.admin = Some(admin);
        for at in candidates {
            self.pump_verify(at, out);
        }
    }

    pub(crate) fn stop_verify(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            self.verify_ended(at, "stopped by a person", out);
        }
    }

    pub(crate) fn pump_verify(&mut self, at: usize, out: &mut Actions) {
        loop {
            let peer = &self.peers[at];
            if !peer.verify.running || peer.resync_paused || self.failed {
                return;
            }
            if peer.verify.outstanding.len() >= VERIFY_DEPTH {
                return;
            }
            let Some(session) = peer.session else { return };
            let slot = peer.slot;
            let verify = &mut self.peers[at].verify;
            let size = self.volumes.get(verify.volume).map(|v| v.size);
            match size {
                Some(size) if verify.offset < size => {
                    let volume = VolumeIndex(verify.volume as u16);
                    let offset = verify.offset;
                    let length = u64::from(VERIFY_CHUNK).min(size - offset) as u32;
                    verify.offset += u64::from(length);
                    let sequence = verify.next_sequence;
                    verify.next_sequence += 1;
                    verify.outstanding.push(VerifyChunk {
                        sequence,
                        volume,
                        offset,
                        length,
                        buf: 0,
                    });
                    let key = self.ops.insert(Op::VerifyRead {
                        peer: slot,
                        session: session.0,
                        sequence,
                    });
                    if self
                        .overlap
                        .insert(key, volume.0, offset, u64::from(length))
                        == 0
                    {
                        self.verify_read_ready(key, out);
                    }
                }
                Some(_) if verify.only.is_none() => {
                    verify.volume += 1;
                    verify.offset = 0;
                }
                _ => {
                    if verify.outstanding.is_empty() {
                        self.verify_finished(at, out);
                    }
                    return;
                }
            }
        }
    }

    fn verify_chunk(&self, key: usize) -> Option<(usize, usize)> {
        let Some(Op::VerifyRead {
            peer,
            session,
            sequence,
        }) = self.ops.get(key)
        else {
            return None;
        };
        let at = self.peer_index(*peer)?;
        if self.peers[at].session.map(|s| s.0) != Some(*session) || !self.peers[at].verify.running {
            return None;
        }
        let chunk = self.peers[at]
            .verify
            .outstanding
            .iter()
            .position(|c| c.sequence == *sequence)?;
        Some((at, chunk))
    }

    fn drop_verify_read(&mut self, key: usize, out: &mut Actions) {
        self.ops.remove(key);
        self.leave_overlap(key, out);
    }

    pub(crate) fn verify_read_ready(&mut self, key: usize, out: &mut Actions) {
        let Some((at, chunk)) = self.verify_chunk(key) else {
            return self.drop_verify_read(key, out);
        };
        let length = self.peers[at].verify.outstanding[chunk].length;
        let buf = self.alloc_buf(length, out);
        let chunk = &mut self.peers[at].verify.outstanding[chunk];
        chunk.buf = buf.0;
        let (volume, offset) = (chunk.volume, chunk.offset);
        out.push(Action::DiskRead {
            op: OpId(key as u64),
            volume,
            offset,
            length,
            buf,
        });
    }

    pub(crate) fn verify_read_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        if result.is_err() {
            return self.disk_failed("a read for verify failed", out);
        }
        let Some((at, chunk)) = self.verify_chunk(key) else {
            return self.drop_verify_read(key, out);
        };
        let chunk = self.peers[at].verify.outstanding[chunk];
        out.push(Action::Hash {
            op: OpId(key as u64),
            buf: BufId(chunk.buf),
            length: chunk.length,
        });
    }

    pub(crate) fn hash_done(&mut self, op: OpId, digest: u128, out: &mut Actions) {
        let key = op.0 as usize;
        if matches!(self.ops.get(key), Some(Op::Apply(_))) {
            return self.apply_finished(key, Ok(()), Some(digest), out);
        }
        if matches!(self.ops.get(key), Some(Op::ResyncRead { .. })) {
            return self.resync_hashed(key, digest, out);
        }
        let Some((at, index)) = self.verify_chunk(key) else {
            if matches!(self.ops.get(key), Some(Op::VerifyRead { .. })) {
                self.drop_verify_read(key, out);
            }
            return;
        };
        let chunk = &mut self.peers[at].verify.outstanding[index];
        let buf = std::mem::take(&mut chunk.buf);
        let chunk = *chunk;
        out.push(Action::ReleaseBuf { buf: BufId(buf) });
        let mut header = self.header(FrameKind::VerifyRequest);
        header.volume = chunk.volume;
        header.offset = chunk.offset;
        header.length = chunk.length;
        let body = Body::Verify {
            sequence: chunk.sequence,
            digest,
        };
        self.send(at, header, Payload::Body(body), out);
        // The request stands in the stream: what is written from here on comes behind it.
        self.drop_verify_read(key, out);
    }

    /// The other side: compare in the order of the stream.
    pub(crate) fn verify_request(
        &mut self,
        at: usize,
        header: &FrameHeader,
        sequence: u64,
        digest: u128,
        out: &mut Actions,
    ) {
        let in_volume = self.volumes.get(header.volume.0 as usize).is_some_and(|v| {
            header.length > 0
                && header.length <= VERIFY_CHUNK
                && header.offset.is_multiple_of(512)
                && header
                    .offset
                    .checked_add(u64::from(header.length))
                    .is_some_and(|end| end <= v.size)
        });
        let in_turn = matches!(
            self.peers[at].relation,
            Relation::Established | Relation::Target
        );
        if !in_volume || !in_turn {
            self.bad_frame(
                at,
                "a verify request out of turn or outside the volume",
                out,
            );
            return;
        }
        let buf = self.alloc_buf(header.length, out);
        let data = Data::Buf {
            buf,
            crc: 0,
            crc_known: false,
        };
        self.enqueue(at, ApplyKind::Verify { sequence, digest }, header, data);
        self.pump_inbox(at, out);
    }

    pub(crate) fn verify_reply(
        &mut self,
        at: usize,
        session: SessionId,
        sequence: u64,
        equal: bool,
        failed: bool,
        out: &mut Actions,
    ) {
        if !self.peers[at].on(session) {
            return;
        }
        if matches!(self.peers[at].relation, Relation::Source) {
            return self.resync_compared(at, sequence, equal && !failed, out);
        }
        let verify = &self.peers[at].verify;
        if !verify.running || sequence < verify.first_sequence {
            return;
        }
        let slot = self.peers[at].slot;
        let verify = &mut self.peers[at].verify;
        let Some(index) = verify
            .outstanding
            .iter()
            .position(|c| c.sequence == sequence)
        else {
            self.bad_frame(at, "a verify reply that was not asked for", out);
            return;
        };
        let chunk = verify.outstanding.swap_remove(index);
        verify.done_bytes += u64::from(chunk.length);
        if failed {
            self.peer_could_not_read(at, chunk, out);
            return self.verify_ended(at, "the other copy could not read", out);
        }
        if !equal {
            self.peers[at].verify.different_bytes += u64::from(chunk.length);
            self.set_bits(at, chunk.volume, chunk.offset, u64::from(chunk.length));
            let text = format!(
                "volume {} differs somewhere in {}..{}: marked for resync",
                chunk.volume.0,
                chunk.offset,
                chunk.offset + u64::from(chunk.length)
            );
            self.notice(Level::Error, "verify-difference", Some(slot), text, out);
        }
        self.pump_verify(at, out);
    }

    fn verify_finished(&mut self, at: usize, out: &mut Actions) {
        let verify = &mut self.peers[at].verify;
        verify.running = false;
        let (done, different) = (verify.done_bytes, verify.different_bytes);
        let admin = verify.admin.take();
        let only = verify.only;
        self.peers[at].unread &= only.map_or(0, |volume| !(1 << volume.0));
        let slot = self.peers[at].slot;
        let text = if different == 0 {
            format!("equal: {done} bytes compared with copy {}", slot.0)
        } else {
            format!(
                "{different} of {done} bytes compared with copy {} lie in ranges that differ; they are marked, disconnect and connect to resync them",
                slot.0
            )
        };
        let level = if different == 0 {
            Level::Info
        } else {
            Level::Error
        };
        self.notice(level, "verify-finished", Some(slot), text.clone(), out);
        if let Some(admin) = admin {
            let result = if different == 0 {
                Ok(text)
            } else {
                Err(Refusal {
                    kind: RefusalKind::CopiesDiffer,
                    ..refusal(
                        text,
                        "No data was changed",
                        "Resync, and find out how they came to differ",
                    )
                })
            };
            out.push(Action::AdminDone { admin, result });
        }
    }

    pub(crate) fn verify_ended(&mut self, at: usize, why: &str, out: &mut Actions) {
        let verify = &mut self.peers[at].verify;
        if !verify.running {
            return;
        }
        verify.running = false;
        let done = verify.done_bytes;
        for chunk in std::mem::take(&mut verify.outstanding) {
            if chunk.buf != 0 {
                out.push(Action::ReleaseBuf {
                    buf: BufId(chunk.buf),
                });
            }
        }
        if let Some(admin) = self.peers[at].verify.admin.take() {
            let text = refusal(
                format!("the verify ended after {done} bytes: {why}"),
                "What was compared stays true; no data was changed",
                "Start it again when the copies are connected",
            );
            out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
    }
}
