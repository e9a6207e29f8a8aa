//! What an attach owes the activity log after a run that did not keep one, or whose ring was found damaged (D7).
//!
//! Every block is then marked toward every other copy. The superblock's `log_incomplete` says so durably before the
//! ring is written again, and is taken back only when those marks are durable: a crash at any moment between finds
//! either the flag or the marks.

use crate::activity_log::ActivityLog;
use crate::api::*;
use crate::op::*;
use crate::service::*;
use holdfast_wire_format::ids::*;
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(crate) struct LogRecovery {
    /// Blocks of the ring to be emptied, in this order, each durable before the next.
    reset: VecDeque<(u32, [u8; 4096])>,
    /// All blocks were marked, and the marks are not durable yet.
    marks: Marks,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Marks {
    #[default]
    Durable,
    Due,
    Saving,
}

impl LogRecovery {
    pub(crate) fn new(damaged: bool, every_block_counts: bool, log: &mut ActivityLog) -> Self {
        LogRecovery {
            // A ring that is only partly overwritten would be found damaged again, and a new log in it not be believed.
            reset: if damaged {
                log.reset().into()
            } else {
                VecDeque::new()
            },
            marks: if every_block_counts {
                Marks::Due
            } else {
                Marks::Durable
            },
        }
    }
}

impl Core {
    /// The attach is durable, with `log_incomplete` where it is needed: empty a damaged ring before anything relies on it.
    pub(crate) fn reset_log(&mut self, out: &mut Actions) {
        let Some((block, bytes)) = self.log_recovery.reset.pop_front() else {
            self.attached_durably(out);
            if self.log_recovery.marks == Marks::Due {
                self.log_recovery.marks = Marks::Saving;
                self.save_unsaved_bits(out);
                self.log_recovery_progress(out);
            }
            return;
        };
        let op = self.ops.insert(Op::LogReset);
        out.push(Action::MetaWrite {
            op: OpId(op as u64),
            place: MetaPlace {
                volume: VolumeIndex(0),
                offset: self.volumes[0].layout.activity_log_offset + u64::from(block) * 4096,
            },
            bytes: bytes.to_vec(),
        });
    }

    pub(crate) fn log_reset_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        self.ops.remove(key);
        if result.is_err() {
            return self.disk_failed("the activity log could not be emptied", out);
        }
        self.reset_log(out);
    }

    /// The marks are durable: the log alone may speak again.
    pub(crate) fn log_recovery_progress(&mut self, out: &mut Actions) {
        if self.log_recovery.marks != Marks::Saving
            || self.pages_in_flight > 0
            || !self.save_queue.is_empty()
            || self.failed
        {
            return;
        }
        self.log_recovery.marks = Marks::Durable;
        if self.tuning.activity_log {
            self.sb.log_incomplete = false;
            self.commit(Then::Nothing, out);
        }
    }
}
