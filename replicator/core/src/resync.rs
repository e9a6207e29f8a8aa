//! Resync: the source copies what the bits name, the target records Complete, S takes it in (D8).

use crate::api::*;
use crate::cluster_store::Change;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use crate::verify::VERIFY_CHUNK;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// Acknowledged but not yet durable bytes after which the target is asked to flush.
const FLUSH_EVERY: u64 = 64 << 20;
/// So many digests in a row that differed, and so many chunks are sent without asking: a round trip and a read at the target
/// buy nothing where the copies have nothing in common.
const COMPARE_MISSES: u32 = 16;
const COMPARE_SKIP: u32 = 256;

/// Counts down; whether it was above zero.
fn skip(left: &mut u32) -> bool {
    let skips = *left > 0;
    *left = left.saturating_sub(1);
    skips
}

impl Core {
    /// Reads and sends as much as the window allows.
    pub(crate) fn pump_source(&mut self, at: usize, out: &mut Actions) {
        if !matches!(self.peers[at].relation, Relation::Source) || self.failed {
            return;
        }
        loop {
            let outstanding = self.peers[at].source.outstanding_bytes;
            let most = self.tuning.resync_window_bytes;
            if self.peers[at].resync_paused
                || self.peers[at].source.cursor.0 >= self.volumes.len()
                || outstanding >= self.resync_rate.window(most, outstanding)
                || !self.resync_rate.may_take(self.now)
            {
                break;
            }
            let Some((volume, offset, length)) = self.next_chunk(at) else {
                break;
            };
            let Some(session) = self.peers[at].session else {
                return;
            };
            let compare = self.peers[at].compare
                && length <= VERIFY_CHUNK
                && !skip(&mut self.peers[at].source.compare_skip);
            self.resync_rate.took(length);
            let source = &mut self.peers[at].source;
            let id = source.next_id;
            source.next_id += 1;
            source.outstanding_bytes += u64::from(length);
            source.chunks.push_back(Chunk {
                id,
                sequence: 0,
                volume,
                offset,
                length,
                state: ChunkState::Waiting,
                redirtied: false,
                compare,
                buf: 0,
            });
            let slot = self.peers[at].slot;
            let key = self.ops.insert(Op::ResyncRead {
                peer: slot,
                session: session.0,
                chunk: id,
            });
            // The chunk is read as if it were a write: no write to it is in flight meanwhile, so what is sent is
            // what the disk holds, and what comes later is mirrored behind it (D8).
            let ordered = if planted!("resync-reads-through-writes") {
                0
            } else {
                length
            };
            if self
                .overlap
                .insert(key, volume.0, offset, u64::from(ordered))
                == 0
            {
                self.resync_read_ready(key, out);
            }
        }
        self.source_progress(at, out);
    }

    /// The next run of dirty blocks that is not in a chunk, from the cursor; the cursor moves forward only,
    /// and begins anew when a pass is over and nothing is outstanding.
    fn next_chunk(&mut self, at: usize) -> Option<(VolumeIndex, u64, u32)> {
        let most = self.tuning.resync_chunk_bytes;
        let peer = &mut self.peers[at];
        let (mut volume, mut bit) = peer.source.cursor;
        while let Some(bitmap) = peer.bitmaps.get(volume) {
            let shift = bitmap.grain_shift();
            let max_bits = (u64::from(most) >> shift).max(1);
            if let Some((first, bits)) = bitmap.next_run(bit, max_bits) {
                let offset = first << shift;
                let end = ((first + bits) << shift).min(self.volumes[volume].size);
                // A block larger than a frame: one frame at a time is not enough, so the run is clipped to
                // whole blocks and the frames are cut by the sender.
                peer.source.cursor = (volume, first + bits);
                return Some((VolumeIndex(volume as u16), offset, (end - offset) as u32));
            }
            volume += 1;
            bit = 0;
        }
        peer.source.cursor = (volume, 0);
        None
    }

    pub(crate) fn resync_read_ready(&mut self, key: usize, out: &mut Actions) {
        let Some((at, chunk)) = self.chunk_of(key) else {
            self.ops.remove(key);
            return self.leave_overlap(key, out);
        };
        let buf = self.alloc_buf(self.peers[at].source.chunks[chunk].length, out);
        let chunk = &mut self.peers[at].source.chunks[chunk];
        chunk.state = ChunkState::Reading;
        chunk.buf = buf.0;
        let (volume, offset, length) = (chunk.volume, chunk.offset, chunk.length);
        out.push(Action::DiskRead {
            op: OpId(key as u64),
            volume,
            offset,
            length,
            buf,
        });
    }

    /// The peer and the index of the chunk an operation reads; none if the session ended.
    fn chunk_of(&self, key: usize) -> Option<(usize, usize)> {
        let Some(Op::ResyncRead {
            peer,
            session,
            chunk,
        }) = self.ops.get(key)
        else {
            return None;
        };
        let at = self.peer_index(*peer)?;
        if self.peers[at].session.map(|s| s.0) != Some(*session) {
            return None;
        }
        let chunk = self.peers[at]
            .source
            .chunks
            .iter()
            .position(|c| c.id == *chunk)?;
        Some((at, chunk))
    }

    pub(crate) fn resync_read_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        if result.is_err() {
            return self.disk_failed("a read for the resync failed", out);
        }
        let Some((at, chunk)) = self.chunk_of(key) else {
            // The session ended while the disk worked: its buffer was released then.
            self.ops.remove(key);
            return self.leave_overlap(key, out);
        };
        let chunk = &self.peers[at].source.chunks[chunk];
        let (op, buf, length) = (OpId(key as u64), BufId(chunk.buf), chunk.length);
        out.push(if chunk.compare {
            Action::Hash { op, buf, length }
        } else {
            Action::IsZero { op, buf, length }
        });
    }

    /// A full copy by checksum: the digest travels in the order of the stream, and the target compares it with what it holds
    /// there after everything before it and before everything behind it.
    pub(crate) fn resync_hashed(&mut self, key: usize, digest: u128, out: &mut Actions) {
        if let Some((at, index)) = self.chunk_of(key) {
            let mut header = self.header(FrameKind::VerifyRequest);
            let chunk = &mut self.peers[at].source.chunks[index];
            chunk.state = ChunkState::Compared;
            header.volume = chunk.volume;
            header.offset = chunk.offset;
            header.length = chunk.length;
            let (sequence, buf) = (chunk.id, BufId(chunk.buf));
            let body = Body::Verify { sequence, digest };
            self.send(at, header, Payload::Body(body), out);
            out.push(Action::ReleaseBuf { buf });
        }
        self.ops.remove(key);
        self.leave_overlap(key, out);
    }

    /// What the target found. Equal bytes need no transfer, and are as durable there as anything before this session: the
    /// next flush covers them. Others, and what it could not read, are read anew and sent.
    pub(crate) fn resync_compared(&mut self, at: usize, id: u64, equal: bool, out: &mut Actions) {
        let slot = self.peers[at].slot;
        let session = self.peers[at].session.unwrap_or(SessionId(0));
        let source = &mut self.peers[at].source;
        let Some(chunk) = source
            .chunks
            .iter_mut()
            .find(|c| c.id == id && c.state == ChunkState::Compared)
        else {
            self.bad_frame(at, "a comparison that was not asked for", out);
            return;
        };
        let (volume, offset, length) = (chunk.volume, chunk.offset, u64::from(chunk.length));
        if equal {
            chunk.state = ChunkState::Acked;
            source.compare_misses = 0;
            source.outstanding_bytes -= length;
            source.acked_unflushed_bytes += length;
            source.done_bytes += length;
            source.equal_bytes += length;
            self.counters.resync_equal_bytes += length;
            return self.pump_source(at, out);
        }
        chunk.state = ChunkState::Waiting;
        chunk.compare = false;
        source.compare_misses += 1;
        if source.compare_misses >= COMPARE_MISSES {
            source.compare_misses = 0;
            source.compare_skip = COMPARE_SKIP;
        }
        let key = self.ops.insert(Op::ResyncRead {
            peer: slot,
            session: session.0,
            chunk: id,
        });
        if self.overlap.insert(key, volume.0, offset, length) == 0 {
            self.resync_read_ready(key, out);
        }
    }

    /// Zeroes travel as a range; everything else as data.
    pub(crate) fn zero_checked(&mut self, op: OpId, zero: bool, out: &mut Actions) {
        let key = op.0 as usize;
        let Some((at, chunk)) = self.chunk_of(key) else {
            if self.ops.contains(key) {
                self.ops.remove(key);
                self.leave_overlap(key, out);
            }
            return;
        };
        let source = &mut self.peers[at].source;
        // Numbered in the order of the stream: reads end in any order.
        let sequence = source.next_sequence;
        source.next_sequence += 1;
        let chunk = &mut source.chunks[chunk];
        chunk.state = ChunkState::Sent;
        chunk.sequence = sequence;
        let (volume, offset, length, sequence, buf) = (
            chunk.volume,
            chunk.offset,
            chunk.length,
            chunk.sequence,
            BufId(chunk.buf),
        );
        let mut header = self.header(if zero {
            FrameKind::ResyncZero
        } else {
            FrameKind::ResyncData
        });
        header.volume = volume;
        header.offset = offset;
        header.length = length;
        header.position = sequence;
        // One that begins meanwhile is told first, and nobody hears of it before it is on the disk.
        header.generation = self.peers[at].told_generation;
        let payload = if zero {
            Payload::None
        } else {
            header.payload_length = length;
            Payload::Buf {
                buf,
                crc_known: false,
            }
        };
        self.counters.resync_bytes += u64::from(length);
        self.send(at, header, payload, out);
        out.push(Action::ReleaseBuf { buf });
        self.ops.remove(key);
        self.leave_overlap(key, out);
        self.pump_source(at, out);
    }

    pub(crate) fn resync_ack(
        &mut self,
        at: usize,
        session: SessionId,
        runs: &[(u64, u64)],
        out: &mut Actions,
    ) {
        if !self.peers[at].on(session) {
            return;
        }
        let source = &mut self.peers[at].source;
        for chunk in &mut source.chunks {
            if chunk.state == ChunkState::Sent
                && runs
                    .iter()
                    .any(|r| r.0 <= chunk.sequence && chunk.sequence <= r.1)
            {
                chunk.state = ChunkState::Acked;
                source.outstanding_bytes -= u64::from(chunk.length);
                source.acked_unflushed_bytes += u64::from(chunk.length);
                source.done_bytes += u64::from(chunk.length);
            }
        }
        if planted!("cleared-before-flush") {
            self.resync_flushed(at, session, u64::MAX, out);
        }
        self.pump_source(at, out);
    }

    /// Asks for a flush when enough is acknowledged or nothing else is left to do; ends the resync.
    fn source_progress(&mut self, at: usize, out: &mut Actions) {
        let peer = &self.peers[at];
        if !matches!(peer.relation, Relation::Source) {
            return;
        }
        let pass_over = peer.source.cursor.0 >= self.volumes.len();
        let source = &peer.source;
        let idle = source.outstanding_bytes == 0 && (pass_over || peer.resync_paused);
        if source.acked_unflushed_bytes > 0
            && !source.flush_sent
            && (source.acked_unflushed_bytes >= FLUSH_EVERY || idle)
        {
            self.peers[at].source.flush_sent = true;
            // Outside the order: position 0.
            let header = self.header(FrameKind::Flush);
            return self.send(at, header, Payload::None, out);
        }
        if !pass_over
            || source.outstanding_bytes > 0
            || !source.chunks.is_empty()
            || source.done_sent
        {
            return;
        }
        if peer.dirty_bits() > 0 {
            // Written meanwhile and not mirrored: another pass.
            if !peer.resync_paused {
                self.peers[at].source.cursor = (0, 0);
                self.pump_source(at, out);
            }
            return;
        }
        self.peers[at].source.done_sent = true;
        self.peers[at].source.done_position = self.issued;
        let mut header = self.header(FrameKind::ResyncDone);
        header.position = self.issued;
        header.dependency = self.sb.generation_base;
        let body = Body::ResyncDone {
            position: self.issued,
            equal: self.equals(),
        };
        self.send(at, header, Payload::Body(body), out);
    }

    /// Copies that agreed with this one that both hold the same, without a block marked since. Whatever becomes different
    /// is marked by the copy that changes, toward everybody (`received_becomes_bits`, `primary_gone`): so a target may
    /// forget what it marked toward these when it is whole. Else two copies that are equal fill a third in turns for ever.
    fn equals(&self) -> SlotSet {
        if self.is_primary_like() {
            return SlotSet::EMPTY;
        }
        self.peers
            .iter()
            .filter(|p| matches!(p.relation, Relation::Established) && p.dirty_bits() == 0)
            .fold(SlotSet::EMPTY, |set, p| set.with(p.slot))
    }

    /// Everything up to this sequence is durable at the target: now its bits may go (D8), unless written since.
    pub(crate) fn resync_flushed(
        &mut self,
        at: usize,
        session: SessionId,
        through: u64,
        out: &mut Actions,
    ) {
        if !self.peers[at].on(session) || !matches!(self.peers[at].relation, Relation::Source) {
            return;
        }
        self.peers[at].source.flush_sent = false;
        let chunks = std::mem::take(&mut self.peers[at].source.chunks);
        for chunk in chunks {
            if chunk.sequence > through || chunk.state != ChunkState::Acked {
                self.peers[at].source.chunks.push_back(chunk);
                continue;
            }
            self.peers[at].source.acked_unflushed_bytes -= u64::from(chunk.length);
            if !chunk.redirtied || planted!("redirtied-cleared") {
                self.peers[at].bitmaps[chunk.volume.0 as usize]
                    .clear(chunk.offset, u64::from(chunk.length));
            }
        }
        self.pump_source(at, out);
    }

    /// The session of a source ended: buffers back, bits stay.
    pub(crate) fn source_ended(&mut self, at: usize, out: &mut Actions) {
        let source = std::mem::take(&mut self.peers[at].source);
        for chunk in source.chunks {
            // What the disk still reads is released here too: the shell keeps it until the disk answers.
            if chunk.state == ChunkState::Reading {
                out.push(Action::ReleaseBuf {
                    buf: BufId(chunk.buf),
                });
            }
        }
    }

    // --- the target's end ---

    pub(crate) fn resync_done_received(
        &mut self,
        at: usize,
        position: Position,
        base: Position,
        out: &mut Actions,
    ) {
        if !matches!(self.peers[at].relation, Relation::Target) {
            self.bad_frame(at, "the end of a resync that is not running", out);
            return;
        }
        self.peers[at].target.done_position = position;
        self.peers[at].target.generation_base = Some(base);
        self.peers[at].target.finishing = true;
        self.peers[at]
            .inbox
            .queue
            .push_back(Received::ResyncDone { position });
        self.pump_inbox(at, out);
    }

    /// Everything before ResyncDone is durable here: record Complete, in the source's generation.
    pub(crate) fn complete_flushed(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session) || !matches!(self.peers[at].relation, Relation::Target) {
            return;
        }
        self.issued = self.issued.max(self.peers[at].target.done_position);
        self.local_flushed = self.local_flushed.max(self.peers[at].target.done_position);
        self.sb.state = CopyState::Complete;
        self.sb.generation_base = self.peers[at].target.generation_base.unwrap_or(0);
        // From here on our bits toward the source begin at the generation both are in (promise 2 of `handshake.md`).
        let record = self.peers[at].record;
        self.sb.peers[record].bitmap_base = self.peers[at]
            .their_generations
            .last()
            .map_or(GenerationId(0), |g| g.id);
        self.sb.peers[record].full_copy = false;
        self.sb.target_of = GenerationId(0);
        self.sb.generations = self.peers[at].their_generations.clone();
        // Its source may know a lower position of the same generation than others recorded of this copy: then it went back on purpose,
        // and is no restored backup (row 5).
        let (generation, position) = self.sb.before_resync;
        let reached = self.issued.saturating_sub(self.sb.generation_base);
        self.sb.flags.rolled_back = generation == self.generation()
            && (self.sb.flags.rolled_back || reached < position)
            && !planted!("lower-position-is-an-old-disk");
        self.sb.flags.undo_lost = false;
        self.sb.flags.zeroed = false;
        self.sb.generations_cut = self.peers[at].their_generations_cut;
        for volume in &mut self.volumes {
            volume.blank = false;
        }
        self.sb.volume_disks = self.volumes.iter().map(|v| v.disk).collect();
        self.was_primary_before = false;
        self.sb.flags.was_primary = false;
        self.unclean_start = false;
        // What it had in memory alone in another mode counts no more.
        for peer in &self.peers {
            self.sb.peers[peer.record].mode = peer.mode as u8;
        }
        self.commit(Then::CompleteStored { peer: at, session }, out);
    }

    pub(crate) fn complete_stored(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        // Equal now: our bits toward the source name nothing any more.
        for bitmap in &mut self.peers[at].bitmaps {
            bitmap.clear_all();
        }
        let (equal, generation) = (self.peers[at].target.equal, self.generation());
        for other in 0..self.peers.len() {
            let record = self.peers[other].record;
            // What this copy filled itself is as this copy was, whatever the source heard of it before.
            if other != at && equal.contains(self.peers[other].slot) && !self.peers[other].filled {
                for bitmap in &mut self.peers[other].bitmaps {
                    bitmap.clear_all();
                }
                self.sb.peers[record].bitmap_base = generation;
                self.sb.peers[record].full_copy = false;
            }
        }
        // Nothing leads back from Complete: what comes now is not saved any more.
        if self.peers[at].their_mode == Mode::Async {
            // An async copy is never in S: its undo ends here.
            self.undo_drop(out);
        } else {
            self.undo_over(out);
        }
        if !self.peers[at].on(session) {
            return;
        }
        self.peers[at].relation = Relation::Established;
        self.peers[at].flushed = self.issued;
        let slot = self.peers[at].slot;
        self.notice(
            Level::Info,
            "resync-complete",
            Some(slot),
            "all blocks are here and durable".into(),
            out,
        );
        self.send_body(at, FrameKind::CompleteAck, Body::Empty, out);
        if self.peers[at].is_primary {
            self.peers[at].forget_at = Some(self.peers[at].target.done_position);
            return self.forget_marks(at);
        }
        // A primary speaks for all its followers. Filled by any other, this copy is not what it was when it agreed with the
        // rest: they meet again (D7, C1).
        for other in 0..self.peers.len() {
            if other != at && matches!(self.peers[other].relation, Relation::Established) {
                self.meet_again(other, "this copy was filled since they agreed", out);
            }
        }
    }

    // --- joining S ---

    pub(crate) fn complete_ack(&mut self, at: usize, _session: SessionId, out: &mut Actions) {
        if !matches!(self.peers[at].relation, Relation::Source) || !self.peers[at].source.done_sent
        {
            self.bad_frame(at, "Complete out of turn", out);
            return;
        }
        let slot = self.peers[at].slot;
        let record = self.peers[at].record;
        self.sb.peers[record].full_copy = false;
        self.peers[at].full_copy = false;
        self.peers[at].filled = !self.is_primary_like();
        if self.peers[at].dirty_bits() > 0 {
            // A write that could not be mirrored came after ResyncDone: another round.
            return self.meet_again(at, "writes came at the end of the resync", out);
        }
        let generation = self.generation();
        let known = &mut self.sb.peers[record];
        known.bitmap_base = generation;
        // Complete was recorded with at least this position: a lower one later means an old disk.
        known.known_durable_generation = generation;
        known.known_durable_position = self.peers[at]
            .source
            .done_position
            .saturating_sub(self.sb.generation_base);
        self.peers[at].source = SourceState::default();
        self.notice(
            Level::Info,
            "resync-finished",
            Some(slot),
            "the target holds every block".into(),
            out,
        );
        if self.peers[at].mode == Mode::Async {
            self.peers[at].relation = Relation::Established;
            self.peers[at].their_state = Some(CopyState::Complete);
            return self.trim_window(out);
        }
        if !self.may_admit(slot) {
            self.peers[at].relation = Relation::Established;
            self.peers[at].their_state = Some(CopyState::Complete);
            return self.trim_window(out);
        }
        self.begin_join(at, out);
    }

    /// Whether S may get this member from here. Without a primary only a member of S may say so, and not while the owner of
    /// the epoch is outside S: it may live without its disk, and what it completes reaches no new member (C1, D13).
    pub(crate) fn may_admit(&self, slot: Slot) -> bool {
        if self.is_primary_like() {
            return true;
        }
        if self.store.is_cluster() {
            // Only the owner of the epoch changes S there, beside a copy that takes itself out.
            return false;
        }
        let owner = self.sb.epoch_gate.owner;
        let nobody = self.sb.epoch_gate.number == 0 || usize::from(owner) >= MAX_COPIES;
        let owner_known = nobody
            || owner == self.slot.0
            || owner == slot.0
            || self.sb.in_sync.contains(Slot(owner));
        let member = self.sb.in_sync.contains(self.slot);
        // Both left: this copy was superseded, and the one that superseded it gave way to it. There is nobody else who could.
        let both_left =
            self.sb.in_sync.without(slot).is_empty() && (owner == slot.0 || owner == self.slot.0);
        // After a power cut this copy may lack what it acknowledged; the owner has it, or, if the owner is the one that was filled, a third
        // member. A new member that did not lose power would pass for one that lacks nothing (C2).
        let alone = self.sb.in_sync.without(slot).without(self.slot).is_empty();
        let kept = !self.unclean_start
            || owner == self.slot.0
            || (owner == slot.0 && (alone || planted!("loser-admits-the-owner")))
            || self
                .peers
                .iter()
                .any(|p| p.slot.0 == owner && matches!(p.relation, Relation::Established));
        (member || both_left) && owner_known && kept
    }

    /// From here on every completion needs this copy's acknowledgement; when what was issued before has it
    /// too, S is committed with it.
    pub(crate) fn begin_join(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.peers[at].relation = Relation::Joining {
            through: self.issued,
            committing: false,
        };
        self.sb.in_sync_pending = self.with_joining(self.sb.in_sync.with(slot).with(self.slot));
        self.joining_progress(at, out);
    }

    pub(crate) fn joining_progress(&mut self, at: usize, out: &mut Actions) {
        let Relation::Joining {
            through,
            committing: false,
        } = self.peers[at].relation
        else {
            return;
        };
        let Some(session) = self.peers[at].session else {
            return;
        };
        if self.peers[at].oldest_unacked.is_some_and(|p| p <= through) && !planted!("joins-early") {
            return;
        }
        self.peers[at].relation = Relation::Joining {
            through,
            committing: true,
        };
        self.propose(Change::Joined { peer: at, session }, out);
    }

    /// S with the copy is committed.
    pub(crate) fn member_joined(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.sb.in_sync = self.sb.in_sync.with(slot).with(self.slot);
        self.next_in_sync_version();
        if self.sb.state == CopyState::Complete {
            // A member of S like the one it filled.
            self.sb.state = CopyState::UpToDate;
        }
        self.sb.flags.solo = false;
        // Durable here before the copy hears of it.
        self.commit(Then::Joined { peer: at, session }, out);
    }

    /// That copy holds everything that was marked toward it, durably: what was in flight when its session ended has nothing to wait for
    /// there any more.
    pub(crate) fn bits_were_copied(&mut self, slot: Slot) {
        for key in self.window.ops() {
            if let Some(Op::Client(op)) = self.ops.get_mut(key as usize)
                && op.legs[slot.0 as usize] == Leg::Bits
            {
                op.legs[slot.0 as usize] = Leg::Acked;
            }
        }
    }

    pub(crate) fn joined(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.sb.in_sync_pending = self.with_joining(self.sb.in_sync);
        self.sb.flags.solo = false;
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::Joining { .. })
        {
            return;
        }
        self.peers[at].relation = Relation::Established;
        let others = self.sb.in_sync.without(slot).without(self.slot);
        self.peers[at].unaware = others.iter().map(|other| (other, self.issued)).collect();
        // What had bits toward it was copied before it completed.
        self.bits_were_copied(slot);
        if self.role == Role::Primary {
            self.peers[at].their_state = Some(CopyState::UpToDate);
            self.announce_in_sync(out);
        } else {
            self.tell_in_sync(at, out);
            for other in 0..self.peers.len() {
                // Who is promoted asks all of S first, and has to know of it.
                if other != at && matches!(self.peers[other].relation, Relation::Established) {
                    self.send_in_sync(other, out);
                }
            }
        }
        self.notice(
            Level::Info,
            "in-sync",
            Some(slot),
            format!("in sync are {}", crate::words::copies(self.sb.in_sync)),
            out,
        );
        self.check_all(out);
    }

    /// S is about to lose a member: see `stable_held`.
    pub(crate) fn hold_stable(&mut self) {
        if self.role == Role::Primary && self.stable_held.is_none() {
            self.stable_held = Some(self.stable_position());
        }
    }

    /// Every follower hears of a change of S, in the order of the writes: it remembers what copies outside S may lack.
    pub(crate) fn announce_in_sync(&mut self, out: &mut Actions) {
        if self.role == Role::Primary {
            for at in 0..self.peers.len() {
                if matches!(
                    self.peers[at].relation,
                    Relation::Established | Relation::Source
                ) {
                    self.send_in_sync(at, out);
                }
            }
        }
        self.stable_held = None;
    }

    pub(crate) fn send_in_sync(&mut self, at: usize, out: &mut Actions) {
        let body = Body::InSync {
            set: self.sb.in_sync,
            version: self.sb.in_sync_version,
        };
        self.send_body(at, FrameKind::InSync, body, out);
    }

    pub(crate) fn tell_in_sync(&mut self, at: usize, out: &mut Actions) {
        self.peers[at].their_state = Some(CopyState::UpToDate);
        self.send_in_sync(at, out);
    }

    /// The session ended while the copy was joining. If S with it may be durable it stays in S.
    pub(crate) fn join_abandoned(&mut self, at: usize, _out: &mut Actions) {
        let slot = self.peers[at].slot;
        if !self.sb.in_sync.contains(slot) {
            self.sb.in_sync_pending = self
                .with_joining(self.sb.in_sync)
                .without(slot)
                .union(self.store.possibly());
        }
    }

    /// `set`, what a change under way may make of it, and every copy that joins now: from `begin_join` on, nothing completes without it (D1), whatever becomes of
    /// another copy's join meanwhile.
    pub(crate) fn with_joining(&self, set: SlotSet) -> SlotSet {
        self.peers
            .iter()
            .filter(|p| matches!(p.relation, Relation::Joining { .. }))
            .fold(set, |set, p| set.with(p.slot))
            .union(self.store.possibly())
    }

    pub(crate) fn in_sync_told(
        &mut self,
        at: usize,
        set: SlotSet,
        version: u64,
        out: &mut Actions,
    ) {
        let in_turn = matches!(
            self.peers[at].relation,
            Relation::Established | Relation::Target
        );
        if !in_turn || self.is_primary_like() {
            self.bad_frame(at, "S was told out of turn", out);
            return;
        }
        // One past point that the primary grew from is as good as all of it, once both agree that they hold the same.
        let whole = self.sb.state == CopyState::Complete
            || (self.sb.state == CopyState::Consistent
                && self.store.is_cluster()
                && self.peers[at].is_primary);
        self.peers[at].inbox.in_sync_heard = true;
        let became = set.contains(self.slot) && whole;
        self.sb.in_sync = set;
        self.sb.in_sync_pending = set;
        self.sb.in_sync_version = version;
        self.forget_marks(at);
        if !became {
            return self.commit(Then::Nothing, out);
        }
        self.sb.state = CopyState::UpToDate;
        self.sb.flags.rolled_back = false;
        let slot = self.peers[at].slot;
        self.notice(
            Level::Info,
            "up-to-date",
            Some(slot),
            format!(
                "this copy is in sync, as are {}",
                crate::words::copies(set.without(self.slot))
            ),
            out,
        );
        self.commit(Then::InSyncStored, out);
    }
}
