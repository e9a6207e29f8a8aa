//! Rollback: a target that was left in the middle of a resync returns to the point before it (D11, D12).
//!
//! Each step is durable before the next, and a crash anywhere leaves either a target whose undo is whole, which
//! may be rolled back again or filled on, or a copy at its old point:
//!
//! 1. a dirty bit toward every peer for every block of the log;
//! 2. the old blocks, and a flush;
//! 3. the superblock: `Consistent`, rolled back, at the old generation and position;
//! 4. the log's head is erased. Only then is anything written here again.

use crate::api::*;
use crate::op::*;
use crate::roles::refusal;
use crate::service::*;
use crate::undo::{Phase, Restore};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::undo_record::{OldContent, UndoEntry};
use std::collections::VecDeque;

/// Old blocks on their way back at once, of at most 1 MiB each. No two of one log meet: a block is saved once.
const RESTORES: usize = 16;

/// How far a rollback is.
#[derive(Debug)]
pub(crate) enum Rollback {
    /// The bits are being saved.
    Bits,
    Restoring {
        left: VecDeque<Restore>,
        in_flight: usize,
    },
    Flushing,
    Recording,
    Erasing,
}

impl Core {
    /// The forced promotion of a target begins with its rollback.
    pub(crate) fn undo_rollback(&mut self, out: &mut Actions) {
        if !self.undo_intact() {
            let text = refusal(
                "the undo log is not intact",
                "Nothing was changed",
                "Bring back the source of the resync",
            );
            return self.cancel_promotion(&text.to_string(), out);
        }
        let bytes: u64 = self.undo.log.undone().map(|(_, _, length)| length).sum();
        // D7, D12: in whatever way this ends, these blocks may differ from every other copy.
        for at in 0..self.peers.len() {
            if !planted!("rollback-without-bits") {
                self.undo_blocks_become_bits(at);
            }
        }
        let (generation, position) = self.sb.before_resync;
        let text = format!(
            "{bytes} bytes are restored to what they were before the resync: position {position} of generation {generation}"
        );
        self.notice(Level::Warning, "rollback", None, text, out);
        self.undo.rollback = Some(Rollback::Bits);
        self.rollback_progress(out);
    }

    pub(crate) fn rollback_progress(&mut self, out: &mut Actions) {
        let wanted = self.role == Role::Promoting && self.promotion.is_some() && !self.failed;
        match &mut self.undo.rollback {
            None | Some(Rollback::Flushing | Rollback::Recording) => {}
            Some(Rollback::Bits | Rollback::Restoring { .. }) if !wanted => {
                // The promotion was called off. The log stays, so nothing is lost.
                self.undo.rollback = None;
            }
            Some(Rollback::Bits) => {
                if !self.save_all_bits(out) && !planted!("rollback-before-bits") {
                    return;
                }
                self.undo.rollback = Some(Rollback::Restoring {
                    left: self.undo.log.rollback_plan().collect(),
                    in_flight: 0,
                });
                self.restore_more(out);
            }
            Some(Rollback::Restoring { .. }) => self.restore_more(out),
            Some(Rollback::Erasing) => {
                if self.undo.log.phase() == Phase::None {
                    self.undo.rollback = None;
                    self.ask_for_epoch(out);
                }
            }
        }
    }

    fn restore_more(&mut self, out: &mut Actions) {
        while let Some(Rollback::Restoring { left, in_flight }) = &mut self.undo.rollback {
            if *in_flight >= RESTORES {
                return;
            }
            let Some(Restore { entry, data_offset }) = left.pop_front() else {
                if *in_flight == 0 {
                    self.undo.rollback = Some(Rollback::Flushing);
                    self.flush_locally(FlushFor::Rollback, out);
                }
                return;
            };
            *in_flight += 1;
            let (volume, length) = (entry.volume, entry.length);
            match data_offset {
                Some(offset) => {
                    let buf = self.alloc_buf(length, out);
                    let step = UndoStep::RestoreRead { entry, buf };
                    let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
                    let place = self.undo_place(offset);
                    out.push(Action::MetaReadBuf {
                        op,
                        place,
                        buf,
                        length,
                    });
                }
                None => {
                    let step = UndoStep::RestoreWrite { volume, buf: None };
                    let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
                    out.push(Action::DiskZero {
                        op,
                        volume,
                        offset: entry.offset,
                        length: length.into(),
                        unmap: true,
                        fua: false,
                    });
                }
            }
        }
    }

    /// A saved block was read back.
    pub(crate) fn restore_read(
        &mut self,
        entry: UndoEntry,
        buf: BufId,
        crc: u32,
        out: &mut Actions,
    ) {
        let wanted = matches!(self.undo.rollback, Some(Rollback::Restoring { .. }));
        if !wanted || self.failed {
            return out.push(Action::ReleaseBuf { buf });
        }
        let damaged = entry.content != (OldContent::Saved { crc });
        if damaged && !planted!("damaged-undo-restored") {
            out.push(Action::ReleaseBuf { buf });
            let text = format!(
                "what the undo log holds for volume {} at byte {} is damaged",
                entry.volume.0, entry.offset
            );
            return self.restore_failed(&text, out);
        }
        let volume = entry.volume;
        let step = UndoStep::RestoreWrite {
            volume,
            buf: Some(buf),
        };
        let op = OpId(self.ops.insert(Op::Undo { step }) as u64);
        out.push(Action::DiskWrite {
            op,
            volume,
            offset: entry.offset,
            length: entry.length,
            buf,
            fua: false,
        });
    }

    /// An old block is back.
    pub(crate) fn restored(&mut self, volume: VolumeIndex, out: &mut Actions) {
        self.volumes[volume.0 as usize].unflushed = true;
        if let Some(Rollback::Restoring { in_flight, .. }) = &mut self.undo.rollback {
            *in_flight -= 1;
        }
        self.rollback_progress(out);
    }

    /// There is no way back: this copy stays a mixture, and says so.
    pub(crate) fn restore_failed(&mut self, why: &str, out: &mut Actions) {
        if self.undo.rollback.is_none() {
            return;
        }
        self.undo_give_up(why, out);
        let text = format!(
            "{why}: this copy can't return to the point before the resync and stays a mixture; bring back the source \
             of the resync"
        );
        self.notice(Level::Error, "undo-lost", None, text.clone(), out);
        self.cancel_promotion(&text, out);
        self.undo.rollback = None;
    }

    /// All old blocks are durable.
    pub(crate) fn rollback_flushed(&mut self, out: &mut Actions) {
        if !matches!(self.undo.rollback, Some(Rollback::Flushing)) {
            // Of a rollback that was called off; another one began since and is not that far.
            return;
        }
        if self.role != Role::Promoting || self.promotion.is_none() || self.failed {
            self.undo.rollback = None;
            return;
        }
        self.undo.rollback = Some(Rollback::Recording);
        self.release_window(out);
        self.issued = self.sb.generation_base + self.sb.before_resync.1;
        self.local_flushed = self.issued;
        self.completed_max = self.issued;
        self.sb.state = CopyState::Consistent;
        self.sb.flags.rolled_back = true;
        self.sb.target_of = GenerationId(0);
        // The position may have been a lower bound before the resync, and nobody recorded whether it was.
        self.unclean_start = true;
        self.commit(Then::RolledBack, out);
    }

    /// Durably at the old point. The log counts no more; it is erased before anything is written here.
    pub(crate) fn rolled_back(&mut self, out: &mut Actions) {
        let (generation, position) = self.sb.before_resync;
        let text = format!("this copy is at position {position} of generation {generation} again");
        self.notice(Level::Warning, "rolled-back", None, text, out);
        self.undo.rollback = Some(Rollback::Erasing);
        self.undo_drop(out);
        self.rollback_progress(out);
    }
}
