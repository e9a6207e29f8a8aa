//! What the losing side of a meeting wrote alone, and may have acknowledged, is saved for a person before it is
//! overwritten (rows 15 and 16 of `docs/handshake.md`).
//!
//! The blocks are those of the bitmap toward the copy that overwrites them: an upper bound of what was written. They are read
//! and handed to the shell, which keeps them outside the volume. Only then does this copy record that it is a target,
//! or that a person gave its writes up. What is not saved, because it is larger than `surplus_bytes` or the shell has no
//! place for it, is said: as an error in the event log where a meeting decides, as a refusal where a person does.

use crate::api::*;
use crate::op::*;
use crate::roles::refusal;
use crate::service::*;
use crate::undoing::TargetPlan;
use holdfast_wire_format::ids::*;

/// Chunks on their way at once, and bytes of one.
const IN_FLIGHT: usize = 4;
const CHUNK: u64 = 256 << 10;

/// Who waits for it.
#[derive(Clone, Copy, Debug)]
enum For {
    Meeting(SessionId),
    /// A person who gives these writes up.
    Person(AdminId),
}

/// A save under way.
#[derive(Debug)]
pub(crate) struct Saving {
    about: SurplusAbout,
    /// Index of the peer whose bitmap names the blocks.
    peer: usize,
    wanted_by: For,
    /// Volume and bit to look at next.
    cursor: (usize, u64),
    in_flight: usize,
    failed: Option<String>,
    ending: bool,
}

impl Core {
    /// Whether this copy may become the target of that plan as far as its surplus goes. Begins to save it if need be;
    /// asked again when that is over.
    pub(crate) fn surplus_settled(&mut self, plan: &TargetPlan, out: &mut Actions) -> bool {
        let Some(surplus) = plan
            .surplus
            .filter(|s| s.acknowledged && s.holder == self.slot)
        else {
            return true;
        };
        if self.surplus.is_some() {
            // This one, or one of an earlier session that ends.
            return false;
        }
        let slot = self.peers[plan.peer].slot;
        let (blocks, bytes) = (
            self.peers[plan.peer].dirty_bits(),
            self.peers[plan.peer].dirty_bytes(),
        );
        let wrote = format!(
            "what this copy wrote alone after position {} of generation {}",
            surplus.after, surplus.generation
        );
        let why_not = if surplus.blocks.is_none() {
            Some("no list of the blocks is left".to_owned())
        } else {
            self.too_large(bytes)
        };
        if let Some(why) = why_not {
            let text = format!(
                "{wrote} ({blocks} blocks, {bytes} bytes) is overwritten by copy {} and was not saved: {why}. Until this \
                 copy is whole, its undo log holds what was overwritten, and a forced promotion returns to it",
                slot.0
            );
            self.notice(Level::Error, "surplus-not-saved", Some(slot), text, out);
            return true;
        }
        if bytes == 0 {
            return true;
        }
        let about = SurplusAbout {
            save: 0,
            peer: slot,
            generation: surplus.generation,
            after: surplus.after,
            blocks,
            bytes,
        };
        self.save_surplus(plan.peer, about, For::Meeting(plan.session), out);
        false
    }

    /// A person gives up what this copy wrote alone: it is saved first. Returns whether the person has to wait for that, or
    /// was refused; if neither, there is nothing to save.
    pub(crate) fn surplus_of_person(
        &mut self,
        at: usize,
        admin: AdminId,
        out: &mut Actions,
    ) -> bool {
        let (blocks, bytes) = (self.peers[at].dirty_bits(), self.peers[at].dirty_bytes());
        if bytes == 0 || self.tuning.surplus_bytes == 0 {
            return false;
        }
        let refused = if self.surplus.is_some() {
            Some(refusal(
                "what this copy wrote alone is being saved already",
                "Nothing was discarded",
                "Wait for it",
            ))
        } else {
            self.too_large(bytes).map(|why| {
                refusal(
                    format!("what this copy wrote alone ({blocks} blocks, {bytes} bytes) can't be saved first: {why}"),
                    "Nothing was discarded",
                    "Raise service.tuning.surplus_bytes and restart the replicator; 0 discards without saving",
                )
            })
        };
        if let Some(refusal) = refused {
            out.push(Action::AdminDone {
                admin,
                result: Err(refusal),
            });
            return true;
        }
        let record = &self.sb.peers[self.peers[at].record];
        let about = SurplusAbout {
            save: 0,
            peer: self.peers[at].slot,
            generation: record.bitmap_base,
            after: if record.known_durable_generation == record.bitmap_base {
                record.known_durable_position
            } else {
                0
            },
            blocks,
            bytes,
        };
        self.save_surplus(at, about, For::Person(admin), out);
        true
    }

    fn too_large(&self, bytes: u64) -> Option<String> {
        match self.tuning.surplus_bytes {
            0 => Some("saving it is turned off (surplus_bytes = 0)".into()),
            most if bytes > most => Some(format!("at most {most} bytes are saved (surplus_bytes)")),
            _ => None,
        }
    }

    fn save_surplus(
        &mut self,
        peer: usize,
        mut about: SurplusAbout,
        wanted_by: For,
        out: &mut Actions,
    ) {
        about.save = self.random();
        out.push(Action::SurplusBegin { about });
        self.surplus = Some(Saving {
            about,
            peer,
            wanted_by,
            cursor: (0, 0),
            in_flight: 0,
            failed: None,
            ending: false,
        });
        self.surplus_progress(out);
    }

    /// Nobody waits for it any more: the session it was for ended, or the role changed.
    fn surplus_unwanted(&self) -> bool {
        let Some(saving) = &self.surplus else {
            return false;
        };
        match saving.wanted_by {
            For::Meeting(session) => !self.peers[saving.peer].on(session),
            For::Person(_) => self.role != Role::Secondary,
        }
    }

    fn surplus_progress(&mut self, out: &mut Actions) {
        let unwanted = self.surplus_unwanted();
        let failed = self.failed;
        loop {
            let Some(saving) = &mut self.surplus else {
                return;
            };
            if unwanted || failed {
                saving
                    .failed
                    .get_or_insert_with(|| "it was called off".into());
            }
            if saving.in_flight >= IN_FLIGHT || saving.ending {
                return;
            }
            let peer = saving.peer;
            let next = if saving.failed.is_some() {
                None
            } else {
                self.next_surplus(peer)
            };
            let Some((volume, offset, length)) = next else {
                break;
            };
            let buf = self.alloc_buf(length, out);
            let op = OpId(self.ops.insert(Op::Surplus {
                volume,
                offset,
                length,
                buf: Some(buf),
            }) as u64);
            if let Some(saving) = &mut self.surplus {
                saving.in_flight += 1;
            }
            out.push(Action::DiskRead {
                op,
                volume,
                offset,
                length,
                buf,
            });
        }
        let Some(saving) = &mut self.surplus else {
            return;
        };
        if saving.in_flight > 0 {
            return;
        }
        saving.ending = true;
        let (save, keep) = (saving.about.save, saving.failed.is_none());
        let op = OpId(self.ops.insert(Op::Surplus {
            volume: VolumeIndex(0),
            offset: 0,
            length: 0,
            buf: None,
        }) as u64);
        out.push(Action::SurplusEnd { op, save, keep });
    }

    /// The next run of blocks that only this copy has.
    fn next_surplus(&mut self, peer: usize) -> Option<(VolumeIndex, u64, u32)> {
        let saving = self.surplus.as_mut()?;
        let (mut volume, mut bit) = saving.cursor;
        while let Some(bitmap) = self.peers[peer].bitmaps.get(volume) {
            let shift = bitmap.grain_shift();
            if let Some((first, bits)) = bitmap.next_run(bit, (CHUNK >> shift).max(1)) {
                let (offset, length) = bitmap.byte_range(first, bits);
                saving.cursor = (volume, first + bits);
                return Some((VolumeIndex(volume as u16), offset, length as u32));
            }
            (volume, bit) = (volume + 1, 0);
        }
        saving.cursor = (volume, 0);
        None
    }

    /// A block that only this copy has was read.
    pub(crate) fn surplus_read(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let Some(Op::Surplus {
            volume,
            offset,
            length,
            buf: Some(buf),
        }) = self.ops.get(key)
        else {
            return;
        };
        let (volume, offset, length, buf) = (*volume, *offset, *length, *buf);
        if let Err(error) = result {
            let text = format!(
                "volume {} could not be read at byte {offset}: {}",
                volume.0,
                error.words()
            );
            return self.surplus_done(OpId(key as u64), Err(text), out);
        }
        let save = self.surplus.as_ref().map_or(0, |s| s.about.save);
        out.push(Action::SurplusWrite {
            op: OpId(key as u64),
            save,
            volume,
            offset,
            length,
            buf,
        });
    }

    /// The shell has it, or all of it, or not.
    pub(crate) fn surplus_done(
        &mut self,
        op: OpId,
        result: Result<String, String>,
        out: &mut Actions,
    ) {
        let key = op.0 as usize;
        if !matches!(self.ops.get(key), Some(Op::Surplus { .. })) {
            return;
        }
        let Op::Surplus { buf, .. } = self.ops.remove(key) else {
            return;
        };
        if let Some(buf) = buf {
            out.push(Action::ReleaseBuf { buf });
        }
        let Some(saving) = &mut self.surplus else {
            return;
        };
        if !saving.ending {
            saving.in_flight -= 1;
            if let Err(why) = result {
                saving.failed.get_or_insert(why);
            }
            return self.surplus_progress(out);
        }
        let Some(saving) = self.surplus.take() else {
            return;
        };
        let result = match (saving.failed, result) {
            (Some(why), _) | (None, Err(why)) => Err(why),
            (None, Ok(place)) => Ok(place),
        };
        let SurplusAbout {
            peer,
            generation,
            after,
            blocks,
            bytes,
            ..
        } = saving.about;
        let wrote = format!(
            "what this copy wrote alone after position {after} of generation {generation} ({blocks} blocks, {bytes} bytes)"
        );
        if let Ok(place) = &result {
            let text = format!(
                "{wrote} was saved to {place} before copy {} overwrites it",
                peer.0
            );
            self.notice(Level::Warning, "surplus-saved", Some(peer), text, out);
        }
        match (saving.wanted_by, result) {
            (For::Meeting(session), result) => {
                if !self.peers[saving.peer].on(session) {
                    return self.undo_prepare_progress(out);
                }
                if let Err(why) = result {
                    let text = format!(
                        "{wrote} is overwritten by copy {} and was not saved: {why}. Until this copy is whole, its undo log \
                         holds what was overwritten, and a forced promotion returns to it",
                        peer.0
                    );
                    self.notice(Level::Error, "surplus-not-saved", Some(peer), text, out);
                }
                self.undo_surplus_over(out);
            }
            (For::Person(admin), Ok(place)) => {
                if self.role != Role::Secondary || self.failed {
                    let refusal = refusal(
                        "the role or the disk of this copy changed meanwhile",
                        format!("Nothing was discarded; {wrote} was saved to {place} all the same"),
                        "Look at the status",
                    );
                    return out.push(Action::AdminDone {
                        admin,
                        result: Err(refusal),
                    });
                }
                self.give_up_writes(admin, &format!("; {wrote} was saved to {place}"), out);
            }
            (For::Person(admin), Err(why)) => {
                let refusal = refusal(
                    format!("{wrote} could not be saved first: {why}"),
                    "Nothing was discarded",
                    "Make room where the state directory is; service.tuning.surplus_bytes = 0 discards without saving",
                );
                out.push(Action::AdminDone {
                    admin,
                    result: Err(refusal),
                });
            }
        }
    }
}
