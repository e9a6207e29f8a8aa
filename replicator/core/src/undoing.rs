//! The undo of a resync target (D12): carries out what [`UndoLog`] keeps the books of.
//!
//! Before a resync, or a mirrored write during one, overwrites a block for the first time, the old block is
//! read and made durable in the undo area of the lead volume. Old blocks that were read while a record was being
//! written share the next one (group commit). `undo_rollback.rs` puts them back.
//!
//! The superblock rules: the log counts only while the copy is the target it was begun for (`target_of` is set,
//! `undo_lost` is not). So the head is durable before the superblock that makes this copy a target, and
//! `undo_lost` is durable before the first block is overwritten without being saved.

use crate::api::*;
use crate::handshake::{How, Surplus};
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use crate::status::UndoStatus;
use crate::undo::{AppendError, Gate, Phase, UndoLog, record_has_room};
use crate::undo_rollback::Rollback;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::undo_record::*;
use std::collections::BTreeMap;

/// Bytes of old blocks held in memory on their way to the log; writes that need more wait.
const SAVING_BYTES: u64 = 16 << 20;

/// A resync that begins: what is recorded once the undo is ready for it.
#[derive(Clone, Debug)]
pub(crate) struct TargetPlan {
    pub peer: usize,
    pub session: SessionId,
    pub how: How,
    /// Generation of the source.
    pub goal: GenerationId,
    /// This copy was no target before: a point to return to exists, and an undo may be kept.
    pub fresh: bool,
    /// What it gives up.
    pub surplus: Option<Surplus>,
}

/// How far the preparation of a target is.
#[derive(Debug)]
struct Preparing {
    plan: TargetPlan,
    flush_asked: bool,
    flushed: bool,
    /// What this copy gives up was saved, or it was said that it is not.
    surplus_over: bool,
    /// The log was begun for this plan.
    begun: bool,
}

/// An old block that was read and waits for a record.
#[derive(Clone, Copy, Debug)]
struct Old {
    entry: UndoEntry,
    /// `None` for zeroes, which are not stored.
    buf: Option<BufId>,
}

/// A record on its way to the disk.
#[derive(Clone, Copy, Debug)]
struct RecordWrite {
    /// Writes of data not answered.
    left: usize,
    /// Bytes of the volumes it stands for.
    bytes: u64,
}

/// The undo of this copy.
#[derive(Debug)]
pub(crate) struct Undoing {
    pub log: UndoLog,
    preparing: Option<Preparing>,
    /// Blocks must be saved before they are overwritten. Off once the superblock says durably that there is
    /// nothing to return to: the log may then still be on the disk, and counts for nothing.
    keeping: bool,
    /// `undo_lost` is being committed.
    losing: bool,
    /// Full, and the resync was stopped for it.
    paused: bool,
    /// Writes that wait, in order of arrival.
    gated: Vec<usize>,
    /// Bytes claimed that are in no durable record.
    saving_bytes: u64,
    ready: Vec<Old>,
    records: BTreeMap<u64, RecordWrite>,
    pub rollback: Option<Rollback>,
    /// Why the present resync can't be undone, for a person; empty if it can, or if there is none.
    why_lost: String,
}

impl Undoing {
    /// What the undo area says after a start. A superblock that claims an undo which is not there, or not whole, is
    /// corrected.
    ///
    /// # Errors
    /// The one of reading.
    pub fn recover<E>(
        sb: &mut Superblock,
        volumes: &[Volume],
        read: impl FnMut(u64) -> Result<[u8; UNDO_BLOCK], E>,
    ) -> Result<Undoing, E> {
        let sizes: Vec<(u64, u8)> = volumes.iter().map(|v| (v.size, v.grain_shift)).collect();
        let capacity = volumes[0].layout.undo_size;
        let target = sb.target_of != GenerationId(0);
        let claimed = target && !sb.flags.undo_lost;
        let mut log = UndoLog::new(&sizes, capacity);
        let mut why_lost = String::new();
        if target && !claimed {
            why_lost =
                "it did not reach back to the start of the resync when this process began".into();
        }
        if claimed {
            let found = UndoLog::recover(&sizes, capacity, read)?;
            // A head of an earlier resync was replaced before this one was recorded. Its goal is no sign: the
            // source may begin new generations while it copies.
            if found
                .head()
                .is_some_and(|head| head.returns_to == sb.before_resync)
            {
                log = found;
            } else if let Some(at) = found.damaged_at() {
                why_lost = format!("its record at byte {at} of the undo area is damaged");
            }
            if !log.is_intact() {
                sb.flags.undo_lost = true;
                if why_lost.is_empty() {
                    why_lost = "what it begins with is missing or damaged".into();
                }
            }
        }
        Ok(Undoing {
            log,
            preparing: None,
            keeping: false,
            losing: false,
            paused: false,
            gated: Vec::new(),
            saving_bytes: 0,
            ready: Vec::new(),
            records: BTreeMap::new(),
            rollback: None,
            why_lost,
        })
    }
}

impl Core {
    /// A rollback leads to the point before the resync this copy is in the middle of.
    pub(crate) fn undo_intact(&self) -> bool {
        self.sb.target_of != GenerationId(0)
            && !self.sb.flags.undo_lost
            && self.undo.log.is_intact()
    }

    /// Whether and to where a rollback leads, while this copy is in the middle of a resync.
    pub(crate) fn undo_status(&self) -> Option<UndoStatus> {
        if self.sb.target_of == GenerationId(0) {
            return None;
        }
        let intact = self.undo_intact() && !self.undo.losing;
        let why_lost = match (intact, self.undo.why_lost.is_empty()) {
            (true, _) => String::new(),
            (false, false) => self.undo.why_lost.clone(),
            (false, true) => "none was kept".into(),
        };
        Some(UndoStatus {
            intact,
            returns_to: self.sb.before_resync,
            used_bytes: self.undo.log.used(),
            capacity_bytes: self.undo.log.capacity(),
            why_lost,
        })
    }

    /// Attached: what stands behind the last record is erased before the log goes on.
    pub(crate) fn undo_attached(&mut self, out: &mut Actions) {
        if let Some(undo) = self.undo_status()
            && !undo.intact
        {
            let text = format!(
                "this copy is in the middle of a resync and can't be rolled back: {}. Bring back the source of the                  resync; until it ends, this copy can't be promoted even by force",
                undo.why_lost
            );
            self.notice(Level::Error, "undo-lost", None, text, out);
        }
        if let Some(offset) = self.undo.log.sweep() {
            self.undo_write(UndoStep::Sweep, offset, vec![0; UNDO_BLOCK], out);
        }
    }

    fn undo_write(&mut self, step: UndoStep, offset: u64, bytes: Vec<u8>, out: &mut Actions) {
        let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
        let place = self.undo_place(offset);
        out.push(Action::MetaWrite { op, place, bytes });
    }

    /// Where a byte of the undo area is.
    pub(crate) fn undo_place(&self, offset: u64) -> MetaPlace {
        MetaPlace {
            volume: VolumeIndex(0),
            offset: self.volumes[0].layout.undo_offset + offset,
        }
    }

    // --- the beginning of a resync ---

    /// This copy is to become a target: what it is now is made durable, and so is the head of its undo, before
    /// anything says that it is one.
    pub(crate) fn undo_prepare(&mut self, plan: TargetPlan, out: &mut Actions) {
        self.undo.preparing = Some(Preparing {
            plan,
            flush_asked: false,
            flushed: false,
            surplus_over: false,
            begun: false,
        });
        self.undo_prepare_progress(out);
    }

    /// Goes on with the preparation of a target as far as possible; every event looks again.
    pub(crate) fn undo_prepare_progress(&mut self, out: &mut Actions) {
        let Some(preparing) = &self.undo.preparing else {
            return;
        };
        let plan = preparing.plan.clone();
        let peer = &self.peers[plan.peer];
        if !peer.on(plan.session) || !matches!(peer.relation, Relation::TargetPreparing) {
            self.undo.preparing = None;
            return;
        }
        // What an earlier role or source still writes lands first: it is part of the point to return to.
        let writing = self.ops.iter().any(|(_, op)| match op {
            Op::Apply(_) => true,
            Op::Client(op) => op.local_left > 0 && op.stage == Stage::Issued,
            _ => false,
        });
        if self.failed || writing {
            return;
        }
        let Some(preparing) = &mut self.undo.preparing else {
            return;
        };
        if !preparing.flush_asked {
            preparing.flush_asked = true;
            let (peer, session) = (plan.peer, plan.session);
            // D12: a power cut during the resync must not take back what its undo does not hold.
            return self.flush_locally(FlushFor::Target { peer, session }, out);
        }
        if !preparing.flushed {
            return;
        }
        let begun = preparing.begun;
        if plan.fresh && !preparing.surplus_over {
            if !self.surplus_settled(&plan, out) {
                return;
            }
            if let Some(preparing) = &mut self.undo.preparing {
                preparing.surplus_over = true;
            }
        }
        let mut why_none = String::new();
        // Row 7: the next meeting takes them for granted, so they are durable before the source is recorded.
        if plan.how == How::BitsAndUndo && !self.save_all_bits(out) {
            return;
        }
        if begun && self.undo.log.phase() != Phase::Active {
            return;
        }
        if plan.fresh && !begun {
            if !self.undo.log.can_begin() {
                return self.undo_erase(out);
            }
            let head = UndoHead {
                session: self.random() | 1,
                target_of: plan.goal,
                returns_to: self.point_held(),
                returns_state: self.sb.state,
            };
            let slot = self.peers[plan.peer].slot;
            if let Some(why) = self.undo_not_kept(&plan) {
                why_none.clone_from(&why);
                self.notice(Level::Info, "undo-none", Some(slot), why, out);
            } else if let Some(bytes) = self.undo.log.begin(head) {
                if let Some(preparing) = &mut self.undo.preparing {
                    preparing.begun = true;
                }
                return self.undo_write(UndoStep::Head, 0, bytes.to_vec(), out);
            }
        }
        self.undo.preparing = None;
        if plan.fresh {
            self.sb.before_resync = self.point_held();
        }
        // An older log that does not lead to this resync's beginning is none.
        self.sb.flags.undo_lost = if plan.fresh {
            !begun
        } else {
            self.sb.flags.undo_lost || !self.undo.log.is_intact()
        };
        if plan.fresh {
            self.undo.why_lost = why_none;
        }
        self.undo.keeping = !self.sb.flags.undo_lost;
        self.undo.losing = false;
        self.undo.paused = false;
        self.undo.saving_bytes = 0;
        self.undo.records.clear();
        self.record_target(&plan, out);
    }

    pub(crate) fn undo_surplus_over(&mut self, out: &mut Actions) {
        if let Some(preparing) = &mut self.undo.preparing {
            preparing.surplus_over = true;
        }
        self.undo_prepare_progress(out);
    }

    /// Generation and position of what this copy holds.
    fn point_held(&self) -> (GenerationId, Position) {
        let position = self.held_position().saturating_sub(self.sb.generation_base);
        (self.generation(), position)
    }

    pub(crate) fn target_flushed(&mut self, peer: usize, session: SessionId, out: &mut Actions) {
        if let Some(preparing) = &mut self.undo.preparing
            && preparing.plan.peer == peer
            && preparing.plan.session == session
        {
            preparing.flushed = true;
        }
        self.undo_prepare_progress(out);
    }

    /// Why no undo is kept of this resync, if none is.
    fn undo_not_kept(&self, plan: &TargetPlan) -> Option<String> {
        let capacity = self.undo.log.capacity();
        let whole: u64 = self.volumes.iter().map(|v| v.size).sum();
        let full = matches!(plan.how, How::Full | How::FullByChecksum);
        let real_point = matches!(
            self.sb.state,
            CopyState::UpToDate | CopyState::Complete | CopyState::Consistent
        ) && self.generation() != GenerationId(0)
            && !self.volumes.iter().any(|v| v.blank);
        if !real_point {
            Some(format!(
                "no undo is kept: this copy is {:?}, there is no point in time to return to",
                self.sb.state
            ))
        } else if capacity < FIRST_RECORD + 2 * UNDO_BLOCK as u64 {
            Some("no undo is kept: the volume was made without room for one; until the resync ends, this copy can't be promoted even by force".into())
        } else if full && capacity < whole {
            Some(format!(
                "no undo is kept: everything is copied anew, {whole} bytes, and the undo area has {capacity}; until the \
                 resync ends, this copy can't be promoted even by force"
            ))
        } else {
            None
        }
    }

    /// Every block the undo log holds differs from the source as well (row 7).
    pub(crate) fn undo_blocks_become_bits(&mut self, at: usize) {
        let undone: Vec<(VolumeIndex, u64, u64)> = self.undo.log.undone().collect();
        for (volume, offset, length) in undone {
            self.set_bits(at, volume, offset, length);
        }
    }

    // --- before a block is overwritten ---

    /// True if nothing has to be saved before this write. Else it is submitted when that is done.
    pub(crate) fn undo_gate(&mut self, key: usize, out: &mut Actions) -> bool {
        if !self.undo.keeping || planted!("undo-skipped") {
            return true;
        }
        let Some(Op::Apply(op)) = self.ops.get(key) else {
            return false;
        };
        if matches!(op.kind, ApplyKind::Verify { .. }) {
            return true;
        }
        let (volume, offset, length) = (op.volume, op.offset, op.length);
        let gate = self.undo.log.check(volume, offset, length);
        if gate == Gate::Open {
            return true;
        }
        self.undo.gated.push(key);
        if self.undo.paused {
            self.undo_discard(out);
        } else if gate == Gate::Save && !self.undo.losing {
            self.undo_save(volume, offset, length, out);
        }
        false
    }

    /// Reads what nobody saves yet of this range, as far as there is memory for it.
    fn undo_save(&mut self, volume: VolumeIndex, offset: u64, length: u64, out: &mut Actions) {
        let end = offset + length;
        let mut at = offset;
        while at < end && self.undo.saving_bytes < SAVING_BYTES {
            let piece = (end - at).min(MAX_UNDO_LENGTH.into());
            for (offset, length) in self.undo.log.claim(volume, at, piece) {
                self.undo.saving_bytes += u64::from(length);
                let buf = self.alloc_buf(length, out);
                let step = UndoStep::ReadOld {
                    volume,
                    offset,
                    length,
                    buf,
                };
                let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
                out.push(Action::DiskRead {
                    op,
                    volume,
                    offset,
                    length,
                    buf,
                });
            }
            at += piece;
        }
    }

    /// Writes that waited look again.
    fn undo_recheck(&mut self, out: &mut Actions) {
        for key in std::mem::take(&mut self.undo.gated) {
            if self.undo_gate(key, out) {
                self.submit_apply(key, out);
            }
        }
    }

    /// Answer of the disk to a step of saving or restoring.
    pub(crate) fn undo_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let Some(Op::Undo { step }) = self.ops.get(key) else {
            return;
        };
        let step = step.clone();
        let (UndoStep::ReadOld { buf, length, .. }
        | UndoStep::RestoreRead {
            buf,
            entry: UndoEntry { length, .. },
        }) = step
        else {
            self.ops.remove(key);
            self.undo_written(step, result, out);
            return self.undo_prepare_progress(out);
        };
        if result.is_ok() && !self.failed {
            let op = OpId(key as u64);
            return out.push(Action::Crc { op, buf, length });
        }
        self.ops.remove(key);
        out.push(Action::ReleaseBuf { buf });
        match step {
            UndoStep::ReadOld { volume, offset, .. } => {
                self.undo.saving_bytes = self.undo.saving_bytes.saturating_sub(length.into());
                self.undo_lose(
                    &format!(
                        "what volume {} held at byte {offset} could not be read",
                        volume.0
                    ),
                    out,
                );
            }
            _ => self.restore_failed("the undo log could not be read", out),
        }
    }

    /// A write ended.
    fn undo_written(&mut self, step: UndoStep, result: Result<(), DiskError>, out: &mut Actions) {
        let buf = match step {
            UndoStep::Data { buf, .. } => Some(buf),
            UndoStep::RestoreWrite { buf, .. } => buf,
            _ => None,
        };
        if let Some(buf) = buf {
            out.push(Action::ReleaseBuf { buf });
        }
        if result.is_err() {
            if let UndoStep::RestoreWrite { .. } = step {
                return self.disk_failed("an old block could not be restored", out);
            }
            return self.disk_failed("the undo log could not be written", out);
        }
        if self.failed {
            return;
        }
        match step {
            UndoStep::Head => {
                if let Some(bytes) = self.undo.log.begun() {
                    self.undo_write(UndoStep::Drop, 0, bytes.to_vec(), out);
                }
            }
            UndoStep::Sweep => {
                if let Some(bytes) = self.undo.log.swept() {
                    self.undo_write(UndoStep::Drop, 0, bytes.to_vec(), out);
                }
                self.undo_recheck(out);
            }
            UndoStep::Drop => {
                self.undo.log.dropped();
                self.rollback_progress(out);
            }
            UndoStep::Data { sequence, .. } => {
                let Some(record) = self.undo.records.get_mut(&sequence) else {
                    return;
                };
                record.left -= 1;
                if record.left == 0 {
                    self.undo_data_saved(sequence, out);
                }
            }
            UndoStep::Header { sequence } => {
                let record = self.undo.records.remove(&sequence);
                let bytes = record.map_or(0, |r| r.bytes);
                self.undo.saving_bytes = self.undo.saving_bytes.saturating_sub(bytes);
                if self.undo.log.saved(sequence) {
                    self.undo_recheck(out);
                }
                self.undo_headers(out);
                self.undo_append(out);
            }
            UndoStep::RestoreWrite { volume, .. } => self.restored(volume, out),
            UndoStep::ReadOld { .. } | UndoStep::RestoreRead { .. } => {}
        }
    }

    /// An old block, or a saved one, was read and its checksum is known.
    pub(crate) fn undo_crc_done(&mut self, op: OpId, crc: u32, zero: bool, out: &mut Actions) {
        let key = op.0 as usize;
        let Some(Op::Undo { step }) = self.ops.get(key) else {
            return;
        };
        let step = step.clone();
        self.ops.remove(key);
        let (volume, offset, length, buf) = match step {
            UndoStep::ReadOld {
                volume,
                offset,
                length,
                buf,
            } => (volume, offset, length, buf),
            UndoStep::RestoreRead { entry, buf } => {
                return self.restore_read(entry, buf, crc, out);
            }
            _ => return,
        };
        let wanted = self.undo.keeping && !self.undo.losing && !self.undo.paused && !self.failed;
        if !wanted || self.undo.log.phase() != Phase::Active {
            self.undo.saving_bytes = self.undo.saving_bytes.saturating_sub(length.into());
            if self.undo.paused {
                self.undo.log.unclaim(volume, offset, length.into());
            }
            return out.push(Action::ReleaseBuf { buf });
        }
        let (content, buf) = if zero {
            out.push(Action::ReleaseBuf { buf });
            (OldContent::Zero, None)
        } else {
            (OldContent::Saved { crc }, Some(buf))
        };
        let entry = UndoEntry {
            volume,
            offset,
            length,
            content,
        };
        self.undo.ready.push(Old { entry, buf });
        self.undo_append(out);
    }

    /// Puts what is ready into records: at once when none is under way, else when one is full or ended.
    fn undo_append(&mut self, out: &mut Actions) {
        while !self.undo.ready.is_empty() && self.undo.log.phase() == Phase::Active {
            let mut count = 0;
            let mut stored = 0;
            for old in &self.undo.ready {
                if !record_has_room(count, stored, old.entry.stored() as u32) {
                    break;
                }
                count += 1;
                stored += old.entry.stored();
            }
            let full = count < self.undo.ready.len();
            if !full && !self.undo.records.is_empty() {
                return;
            }
            let entries: Vec<UndoEntry> =
                self.undo.ready[..count].iter().map(|o| o.entry).collect();
            let bytes = entries.iter().map(|e| u64::from(e.length)).sum();
            let write = match self.undo.log.append(entries) {
                Ok(write) => write,
                Err(error @ AppendError::Full { .. }) => {
                    return self.undo_full(&error.to_string(), out);
                }
                Err(error) => return self.halt(out, &format!("D12: {error}")),
            };
            let olds: Vec<Old> = self.undo.ready.drain(..count).collect();
            let mut left = 0;
            for (old, offset) in olds.iter().zip(&write.data) {
                if let (Some(buf), Some(offset)) = (old.buf, *offset) {
                    left += 1;
                    let sequence = write.sequence;
                    let step = UndoStep::Data { sequence, buf };
                    let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
                    let place = self.undo_place(offset);
                    let length = old.entry.length;
                    out.push(Action::MetaWriteBuf {
                        op,
                        place,
                        buf,
                        length,
                    });
                }
            }
            let record = RecordWrite { left, bytes };
            self.undo.records.insert(write.sequence, record);
            if left == 0 {
                self.undo_data_saved(write.sequence, out);
            }
        }
    }

    fn undo_data_saved(&mut self, sequence: u64, out: &mut Actions) {
        self.undo.log.data_saved(sequence);
        self.undo_headers(out);
    }

    fn undo_headers(&mut self, out: &mut Actions) {
        while let Some(header) = self.undo.log.next_header() {
            let step = UndoStep::Header {
                sequence: header.sequence,
            };
            self.undo_write(step, header.offset, header.bytes.to_vec(), out);
        }
    }

    // --- the end of keeping it ---

    /// The area is full: the resync stops, or goes on without a way back.
    fn undo_full(&mut self, text: &str, out: &mut Actions) {
        let source = self
            .peers
            .iter()
            .position(|p| matches!(p.relation, Relation::Target) && p.session.is_some());
        let Some(at) = source else {
            // The source is gone: what it sent last and nobody acknowledged is bits there. Dropped rather than the way back,
            // which may be all that this copy has left.
            self.undo_unsaved(out);
            return self.undo_discard(out);
        };
        if !self.tuning.undo_full_pauses {
            return self.undo_lose(text, out);
        }
        self.undo.paused = true;
        self.undo_unsaved(out);
        let slot = self.peers[at].slot;
        let text = format!(
            "{text}. The resync from copy {} is stopped, as configured (undo_full_pauses); the primary goes on and notes in its \
             bitmap what this copy lacks. Resume the resync here to go on without an undo, or promote this copy by force \
             to return to the point before the resync",
            slot.0
        );
        self.notice(Level::Error, "undo-full", Some(slot), text, out);
        // The link ends: what is mirrored becomes bits at the source, and nobody waits for this copy.
        self.peers[at].wanted = false;
        let why =
            "the undo area of the target is full and it is configured to stop the resync then";
        self.close(
            at,
            holdfast_wire_format::frame::GoodbyeCode::Disconnect,
            why,
            false,
            out,
        );
        self.undo_discard(out);
    }

    /// Gives back what was read to be saved and has no room.
    fn undo_unsaved(&mut self, out: &mut Actions) {
        for old in std::mem::take(&mut self.undo.ready) {
            let length = u64::from(old.entry.length);
            self.undo
                .log
                .unclaim(old.entry.volume, old.entry.offset, length);
            self.undo.saving_bytes = self.undo.saving_bytes.saturating_sub(length);
            if let Some(buf) = old.buf {
                out.push(Action::ReleaseBuf { buf });
            }
        }
    }

    /// Received before the resync was stopped and not saved for: never reaches the disk, the source has bits for it.
    fn undo_discard(&mut self, out: &mut Actions) {
        while let Some(key) = self.undo.gated.pop() {
            self.apply_finished(key, Ok(()), None, out);
        }
    }

    /// A person lets a resync go on that was stopped because the undo area is full.
    pub(crate) fn undo_resume(&mut self, out: &mut Actions) {
        if !std::mem::take(&mut self.undo.paused) {
            return;
        }
        self.undo_lose("a person lets the resync go on without one", out);
        for at in 0..self.peers.len() {
            if self.peers[at].slot.0 == self.sb.target_source && self.peers[at].session.is_none() {
                self.peers[at].wanted = true;
                self.peers[at].relation = Relation::Down;
                out.push(Action::Connect {
                    peer: self.peers[at].slot,
                });
            }
        }
    }

    /// The undo can't be kept: said loudly, and recorded before the first block is overwritten without it.
    pub(crate) fn undo_lose(&mut self, why: &str, out: &mut Actions) {
        if !self.undo.keeping || self.undo.losing {
            return;
        }
        self.undo.losing = true;
        self.undo.why_lost = why.to_owned();
        self.undo_release_ready(out);
        self.sb.flags.undo_lost = true;
        let text = format!(
            "the undo of the resync is given up: {why}. The resync goes on; until it ends, this copy can't be promoted \
             even by force"
        );
        self.notice(Level::Error, "undo-lost", None, text, out);
        self.commit(Then::UndoOver, out);
    }

    /// The data of this copy is given up, and with it the way back; recorded by the commit that follows.
    pub(crate) fn undo_give_up(&mut self, why: &str, out: &mut Actions) {
        self.undo.losing = true;
        self.undo.why_lost = why.to_owned();
        self.undo_release_ready(out);
        self.sb.flags.undo_lost = true;
        self.commit(Then::UndoOver, out);
    }

    /// The superblock says durably that there is nothing to return to: no more is saved, and the head is erased.
    pub(crate) fn undo_drop(&mut self, out: &mut Actions) {
        self.undo_over(out);
        self.undo_erase(out);
    }

    /// The same, and the head stays for now: until S has this copy.
    pub(crate) fn undo_over(&mut self, out: &mut Actions) {
        self.undo.keeping = false;
        self.undo.losing = false;
        self.undo.paused = false;
        self.undo_release_ready(out);
        self.undo_recheck(out);
    }

    fn undo_release_ready(&mut self, out: &mut Actions) {
        for old in std::mem::take(&mut self.undo.ready) {
            if let Some(buf) = old.buf {
                out.push(Action::ReleaseBuf { buf });
            }
        }
    }

    pub(crate) fn undo_erase(&mut self, out: &mut Actions) {
        if let Some(bytes) = self.undo.log.drop_log() {
            self.undo_write(UndoStep::Drop, 0, bytes.to_vec(), out);
        }
    }
}
