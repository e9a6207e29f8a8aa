//! What ends or narrows a role: the loss of a member of S, demotion, the failure of the own disk.

use crate::api::*;
use crate::cluster_store::Change;
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use crate::words;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

pub(crate) fn refusal(
    what: impl Into<String>,
    kept: impl Into<String>,
    next: impl Into<String>,
) -> Refusal {
    Refusal {
        kind: Default::default(),
        what: what.into(),
        kept: kept.into(),
        next: next.into(),
    }
}

impl Core {
    // --- the loss of a member of S ---

    /// Members of S that get no writes now.
    pub(crate) fn missing_members(&self) -> SlotSet {
        let required = self.required();
        self.peers
            .iter()
            .filter(|p| {
                required.contains(p.slot)
                    && !matches!(
                        p.relation,
                        Relation::Established | Relation::Joining { .. } | Relation::SourceStarting
                    )
            })
            .fold(SlotSet::EMPTY, |set, p| set.with(p.slot))
    }

    /// Writes were parked, and every copy a completion needs gets them again: the lost one is back, or S is without it.
    pub(crate) fn unpark(&mut self, out: &mut Actions) {
        if !self.parked || self.role != Role::Primary || self.diskless.is_some() {
            return;
        }
        let required = self.required().without(self.slot);
        let all_there = required.iter().all(|slot| {
            self.peer_index(slot).is_some_and(|at| {
                matches!(
                    self.peers[at].relation,
                    Relation::Established | Relation::Joining { .. }
                )
            })
        });
        if all_there {
            self.parked = false;
            let text = format!(
                "writes go on: in sync are {}",
                words::copies(self.sb.in_sync)
            );
            self.notice(Level::Info, "unparked", None, text, out);
        }
    }

    /// A completion needs a copy that lacks the write.
    pub(crate) fn required_leg_missing(&mut self, out: &mut Actions) {
        // Without a disk of its own this copy can never go on alone (D13).
        if self.dropping || self.role != Role::Primary || self.diskless.is_some() {
            return;
        }
        let missing = self.missing_members();
        if missing.is_empty() {
            return;
        }
        if self.sb.on_peer_loss == OnPeerLoss::Suspend {
            if !self.parked {
                self.parked = true;
                let text = format!(
                    "writes are parked: {} cannot be reached, was in sync, and the policy is suspend; \
                     they complete when it returns, or end with an error at demotion",
                    words::copies(missing)
                );
                self.notice(Level::Error, "parked", None, text, out);
            }
            return;
        }
        // D1: S without the lost copy, and a new generation, durably, before anything completes without it.
        self.dropping = true;
        self.flush_locally(FlushFor::DropPeer, out);
    }

    /// Flushed: now S without them, and the generation that says since when.
    pub(crate) fn drop_missing(&mut self, out: &mut Actions) {
        if self.role != Role::Primary || !self.dropping {
            // Demoted meanwhile: S stays as it is. What waited for this and not for the copy completes; the rest ends
            // with an error.
            self.dropping = false;
            return self.check_all(out);
        }
        let missing = self.missing_members();
        if missing.is_empty() {
            self.dropping = false;
            return self.check_all(out);
        }
        self.hold_stable();
        if !planted!("no-generation-without-the-peer") {
            self.new_generation(GenerationCause::PeerLost);
            self.generation_committing = true;
        }
        if self.store.is_cluster() {
            // The record names it when everybody who stays holds it.
            self.commit(Then::GenerationBegun, out);
        }
        self.propose(Change::Dropped, out);
    }

    /// S without the lost copies is committed.
    pub(crate) fn members_left(&mut self, out: &mut Actions) {
        if !self.dropping {
            return;
        }
        if !self.is_primary_like() {
            self.dropping = false;
            return self.check_all(out);
        }
        let left = match self.store.is_cluster() {
            false => self.missing_members(),
            true => self.left_by_record(),
        };
        for slot in left.iter() {
            self.sb.in_sync = self.sb.in_sync.without(slot);
            self.sb.in_sync_pending = self.sb.in_sync_pending.without(slot);
        }
        self.sb.in_sync = self.sb.in_sync.with(self.slot);
        self.next_in_sync_version();
        self.sb.flags.solo = self.sb.in_sync == SlotSet::only(self.slot);
        let text = format!(
            "{} left the in-sync set, in it are {}: degraded, the service goes on",
            words::copies(left),
            words::copies(self.sb.in_sync)
        );
        self.notice(Level::Error, "peer-dropped", None, text, out);
        self.commit(Then::PeerDropped, out);
    }

    /// A generation made while serving is durable: the connected copies hear of it, and what waited is issued.
    pub(crate) fn generation_committed(&mut self, out: &mut Actions) {
        if !std::mem::take(&mut self.generation_committing) {
            return;
        }
        if self.is_primary_like() {
            self.announce_generations(out);
        }
        for key in std::mem::take(&mut self.issue_waiting) {
            self.issue(key, out);
        }
    }

    pub(crate) fn peer_dropped(&mut self, out: &mut Actions) {
        self.dropping = false;
        self.announce_in_sync(out);
        self.check_all(out);
        if self.store.is_cluster() && self.role == Role::Primary {
            // Came back while the record was changed.
            for at in 0..self.peers.len() {
                let peer = &self.peers[at];
                if matches!(peer.relation, Relation::Established)
                    && peer.mode != Mode::Async
                    && !self.sb.in_sync.contains(peer.slot)
                {
                    self.begin_join(at, out);
                }
            }
        }
    }

    // --- the end of being primary ---

    pub(crate) fn demote(&mut self, admin: Option<AdminId>, out: &mut Actions) {
        if self.role != Role::Primary {
            if let Some(admin) = admin {
                let result = if self.role == Role::Secondary {
                    Ok("this copy is secondary".to_owned())
                } else {
                    Err(refusal(
                        "a change of role is under way",
                        "Nothing was changed",
                        "Look at the status in a moment",
                    ))
                };
                out.push(Action::AdminDone { admin, result });
            }
            return;
        }
        self.role = Role::Demoting;
        self.demotion = Some(admin);
        self.demote_flush_sent = false;
        out.push(Action::RoleChanged {
            role: Role::Demoting,
            epoch: self.sb.epoch_gate,
        });
        self.notice(
            Level::Info,
            "demoting",
            None,
            "finishing what is in flight".into(),
            out,
        );
        self.end_client_io(Status::NotPrimary, true, out);
        if self.diskless_holds() {
            self.diskless_end_reads(out);
        }
        self.demotion_progress(out);
    }

    /// What is in flight ends; then one flush everywhere; then the record.
    pub(crate) fn demotion_progress(&mut self, out: &mut Actions) {
        if self.role != Role::Demoting || (self.failed && self.diskless.is_none()) {
            return;
        }
        if self.parked_in_demotion() {
            self.end_client_io(Status::Io, true, out);
        }
        // Neither a disk here nor a server: what waits has nobody to carry it out, and so has a last flush.
        let alone = self.diskless_alone();
        if alone {
            self.end_client_io(Status::Io, false, out);
            self.diskless_end_reads(out);
        }
        let settled = self.generation_unknown_to.is_empty() && !self.generation_committing;
        // What a change of S comes to is known first, if it is to be had: who is lost with it is not in the way of stopping.
        let changing = match self.store.unknown() {
            true => {
                self.end_client_io(Status::Io, true, out);
                false
            }
            false => self.dropping || self.store.busy(),
        };
        if self.client_in_flight() || !(settled || alone) || changing {
            return;
        }
        if !self.demote_flush_sent && !alone {
            self.demote_flush_sent = true;
            return self.begin_demote_flush(out);
        }
        if self.demotion_recording {
            return;
        }
        if self.diskless.is_some() {
            return self.diskless_demoted(out);
        }
        self.demotion_recording = true;
        for at in 0..self.peers.len() {
            // Whoever did not flush all of it (an async copy) gets bits for the rest.
            if self.peers[at].flushed < self.issued {
                self.unstable_becomes_bits(at);
            }
        }
        self.release_window(out);
        self.sb.flags.was_primary = false;
        self.commit(Then::Demoted, out);
    }

    fn parked_in_demotion(&self) -> bool {
        self.ops.iter().any(
            |(_, op)| matches!(op, Op::Client(op) if !op.replied && op.legs.contains(&Leg::Bits)),
        )
    }

    pub(crate) fn demotion_durable(&mut self, out: &mut Actions) {
        if self.role != Role::Demoting {
            return;
        }
        self.demotion_recording = false;
        self.role = Role::Secondary;
        let position = self.issued;
        for at in 0..self.peers.len() {
            match self.peers[at].relation {
                Relation::Established if self.peers[at].flushed >= position => {
                    let mut header = self.header(FrameKind::Demoted);
                    header.position = position;
                    // What a member of S that is not there lacks, the one who hears this has to remember (D7).
                    if !planted!("demoted-says-all-have-it") {
                        header.stable_position = self.stable_position();
                    } else {
                        header.stable_position = position;
                    }
                    self.send(at, header, Payload::None, out);
                }
                Relation::Down | Relation::Refused | Relation::Greeting { .. } => {}
                _ => self.meet_again(at, "this copy is not primary any more", out),
            }
        }
        out.push(Action::RoleChanged {
            role: Role::Secondary,
            epoch: self.sb.epoch_gate,
        });
        self.notice(
            Level::Info,
            "secondary",
            None,
            format!("demoted at position {position}"),
            out,
        );
        if let Some(Some(admin)) = self.demotion.take() {
            let result = Ok(format!(
                "secondary; everything up to position {position} is flushed"
            ));
            out.push(Action::AdminDone { admin, result });
        }
        self.greet_waiting(out);
        self.detach_progress(out);
        self.try_promotion(out);
    }

    /// Everything up to `position` is durable at the copy that was primary, and up to `stable` at every member of S.
    pub(crate) fn peer_demoted(
        &mut self,
        at: usize,
        position: Position,
        stable: Position,
        out: &mut Actions,
    ) {
        if !self.peers[at].is_primary || stable > position {
            self.bad_frame(at, "a copy that is not primary says it was demoted", out);
            return;
        }
        self.owed_to_third(at, stable);
        self.peers[at].inbox.stable = position;
        self.pump_inbox(at, out);
        self.trim_window(out);
        self.peers[at].is_primary = false;
        self.peers[at].flushed = self.issued;
        if self.peers[at].diskless {
            // What it lacks is in the window no longer than this session.
            self.primary_gone(at, out);
        }
        let slot = self.peers[at].slot;
        self.notice(
            Level::Info,
            "peer-demoted",
            Some(slot),
            format!("at position {position}"),
            out,
        );
        self.try_promotion(out);
    }

    /// Members of S may lack what came after `stable`, and nobody will tell them: bits toward every third copy, for what is in the
    /// window now and for what is applied from here on (D7).
    fn owed_to_third(&mut self, at: usize, stable: Position) {
        self.peers[at].inbox.owed_after = Some(stable);
        let entries: Vec<Entry> = self
            .window
            .iter()
            .filter(|e| e.length > 0 && e.position > stable)
            .copied()
            .collect();
        for entry in entries {
            for other in (0..self.peers.len()).filter(|other| *other != at) {
                self.set_bits(other, entry.volume, entry.offset, entry.length);
            }
        }
    }

    /// Superseded: a newer epoch exists. Nothing completes any more, nothing is flushed first.
    pub(crate) fn stop_being_primary(&mut self, out: &mut Actions) {
        if self.role == Role::Promoting {
            return self.cancel_promotion("a newer epoch exists", out);
        }
        if !matches!(self.role, Role::Primary | Role::Demoting) {
            return;
        }
        self.role = Role::Secondary;
        self.demotion_recording = false;
        self.was_primary_before = true;
        self.dropping = false;
        self.generation_unknown_to = SlotSet::EMPTY;
        self.end_client_io(Status::NotPrimary, false, out);
        self.diskless_end_reads(out);
        self.diskless_buffers(out);
        self.diskless = None;
        for at in 0..self.peers.len() {
            if matches!(
                self.peers[at].relation,
                Relation::Established | Relation::Joining { .. } | Relation::Source
            ) {
                self.unstable_becomes_bits(at);
                // It goes by an order of writes that is over, and an asynchronous one waits to be told how much of it is stable:
                // it meets this copy, and whoever is primary, anew (D14, C12).
                if !planted!("superseded-keeps-its-followers") {
                    self.meet_again(at, "this copy is not primary any more", out);
                }
            }
        }
        self.release_window(out);
        out.push(Action::RoleChanged {
            role: Role::Secondary,
            epoch: self.sb.epoch_gate,
        });
        if let Some(Some(admin)) = self.demotion.take() {
            out.push(Action::AdminDone {
                admin,
                result: Ok("secondary: a newer epoch took over".into()),
            });
        }
    }

    /// Forgets the window; its entries have bits wherever they may be missing.
    pub(crate) fn release_window(&mut self, out: &mut Actions) {
        for entry in self.window.clear() {
            // Answered, and only a copy that nobody waits for has not acknowledged it: its place in the window is what an
            // acknowledgement, or the end of the session, would have found it by.
            let settled = entry.op != NO_OP
                && matches!(self.ops.get(entry.op as usize), Some(Op::Client(op)) if op.replied && op.local_left == 0);
            if settled {
                self.ops.remove(entry.op as usize);
            }
            if entry.holds_log && entry.length > 0 {
                for extent in self.extents(entry.volume, entry.offset, entry.length) {
                    self.log.release(extent);
                }
            }
        }
        self.pump_log(out);
    }

    // --- the own disk ---

    /// The disk under this copy failed: nothing it says counts any more (D14).
    pub(crate) fn disk_failed(&mut self, what: &str, out: &mut Actions) {
        if self.failed {
            return;
        }
        self.failed = true;
        self.sb.state = CopyState::Failed;
        if self.commit.in_flight.is_none() {
            self.commits_failed(out);
        }
        if self.go_diskless(what, out) {
            return;
        }
        let others = self.sb.in_sync.without(self.slot);
        let text = if others.is_empty() {
            // Nobody must be told to give away the only current data.
            format!(
                "{what}: this copy is out of service, and no other copy is known to hold everything: keep this disk. \
                 `holdfast volume attach-disk` has it tried again; replace the disk once another copy is in sync"
            )
        } else {
            format!(
                "{what}: this copy is out of service, its data counts as lost until the disk is replaced; \
                 promote another copy"
            )
        };
        self.notice(Level::Error, "disk-failed", None, text, out);
        self.end_client_io(Status::Io, false, out);
        for at in 0..self.peers.len() {
            self.close(at, GoodbyeCode::DiskFailed, what, false, out);
        }
        if matches!(self.role, Role::Primary | Role::Demoting | Role::Promoting) {
            self.role = Role::Secondary;
            out.push(Action::RoleChanged {
                role: Role::Secondary,
                epoch: self.sb.epoch_gate,
            });
        }
        if let Some(promotion) = self.promotion.take() {
            let refusal = refusal(what, "No copy was promoted", "Promote another copy");
            out.push(Action::AdminDone {
                admin: promotion.admin,
                result: Err(refusal),
            });
        }
        if let Some(wanted) = self.promotion_wanted.take() {
            let refusal = refusal(what, "No copy was promoted", "Promote another copy");
            out.push(Action::AdminDone {
                admin: wanted.admin,
                result: Err(refusal),
            });
        }
        if let Some(Some(admin)) = self.demotion.take() {
            out.push(Action::AdminDone {
                admin,
                result: Ok("secondary: its disk failed".into()),
            });
        }
        if let Some(admin) = self.detaching.take() {
            self.role = Role::Detached;
            out.push(Action::AdminDone {
                admin,
                result: Ok("detached: its disk failed".into()),
            });
        }
    }
}
