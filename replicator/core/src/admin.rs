//! What people ask for, apart from roles.

use crate::api::*;
use crate::cluster_store::Change;
use crate::handshake::Row;
use crate::peer::*;
use crate::roles::refusal;
use crate::service::*;
use crate::words;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    pub(crate) fn admin(&mut self, admin: AdminId, command: Command, out: &mut Actions) {
        let done = |text: &str| Action::AdminDone {
            admin,
            result: Ok(text.to_owned()),
        };
        if self.role == Role::Detached {
            let text = refusal(
                "this copy is detached",
                "Its disk holds everything it had",
                "`holdfast attach` takes it up again, and so does a start of the replicator",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        match command {
            Command::Promote { force } => self.want_promotion(admin, force, out),
            Command::Demote => self.demote(Some(admin), out),
            Command::Connect { peer } => {
                for at in self.chosen(peer) {
                    self.peers[at].wanted = true;
                    if self.peers[at].session.is_none() {
                        self.peers[at].relation = Relation::Down;
                        out.push(Action::Connect {
                            peer: self.peers[at].slot,
                        });
                    }
                }
                out.push(done("connecting"));
            }
            Command::Disconnect { peer } => {
                for at in self.chosen(peer) {
                    self.peers[at].wanted = false;
                    self.close(
                        at,
                        GoodbyeCode::Disconnect,
                        "disconnected by a person",
                        false,
                        out,
                    );
                }
                out.push(done("disconnected; writes are noted in the bitmap"));
            }
            Command::PauseResync => {
                for peer in &mut self.peers {
                    peer.resync_paused = true;
                }
                out.push(done("resync and verify are paused; mirroring goes on"));
            }
            Command::ResumeResync => {
                for at in 0..self.peers.len() {
                    self.peers[at].resync_paused = false;
                    self.pump_source(at, out);
                    self.pump_verify(at, out);
                }
                self.undo_resume(out);
                out.push(done("resync and verify go on"));
            }
            Command::Verify { volume } => self.start_verify(admin, volume, out),
            Command::StopVerify => {
                self.stop_verify(out);
                out.push(done("verify stopped"));
            }
            Command::Invalidate => self.invalidate(admin, out),
            Command::ResolveSplitBrain { discard_mine } => {
                self.resolve_split_brain(admin, discard_mine, out)
            }
            Command::SuspendIo => {
                self.suspended = true;
                out.push(done("client I/O is held"));
            }
            Command::ResumeIo => {
                self.suspended = false;
                self.release_held(out);
                out.push(done("client I/O goes on"));
            }
            Command::SetMode { peer, mode } => self.set_mode(admin, peer, mode, out),
            Command::SetOnPeerLoss { policy, force } => self.set_policy(admin, policy, force, out),
            Command::Grow { volume, size } => self.grow(admin, volume, size, out),
            Command::Detach => self.detach(admin, out),
            Command::DetachDisk => self.detach_disk(admin, out),
            Command::WhatWouldForceLose => {
                let text = self.what_force_loses();
                out.push(Action::AdminDone {
                    admin,
                    result: Ok(text),
                });
            }
        }
    }

    fn chosen(&self, peer: Option<Slot>) -> Vec<usize> {
        (0..self.peers.len())
            .filter(|at| peer.is_none_or(|slot| self.peers[*at].slot == slot))
            .collect()
    }

    /// The data of this copy is given up: it becomes blank, and the next meeting fills it whole.
    fn invalidate(&mut self, admin: AdminId, out: &mut Actions) {
        // What serves for a primary without a disk alone has what that one completed (D13).
        let serves = self.peers.iter().any(|p| p.diskless);
        // C1: a member of S has every acknowledged write, and what it says elsewhere of others may be old: another one of S, or the primary,
        // must be there to have them. (Copies that parted for good, or a history that nobody believes, are a person's to settle.)
        let member = self.sb.in_sync.contains(self.slot)
            && matches!(self.sb.state, CopyState::UpToDate | CopyState::Complete)
            && !crate::handshake::broken_history(&self.own_facts())
            && !planted!("last-member-invalidated");
        let parted = |p: &Peer| matches!(p.row, Some(Row::R6 | Row::R15 | Row::R16 | Row::R17));
        let has_all = |p: &Peer| {
            matches!(p.relation, Relation::Established)
                && p.their_state != Some(CopyState::Failed)
                && (p.is_primary || self.sb.in_sync.contains(p.slot))
        };
        let others_whole = self.peers.iter().any(|p| {
            matches!(
                p.their_state,
                Some(CopyState::UpToDate | CopyState::Complete)
            )
        });
        let reason = if self.is_primary_like() {
            Some((
                "this copy is primary",
                "Demote it and promote another copy, then invalidate this one",
            ))
        } else if serves {
            Some((
                "this copy serves for a primary whose disk failed, and has what that one completed",
                "Demote the primary, promote this copy, and replace the disk that failed",
            ))
        } else if member && !self.peers.iter().any(|p| has_all(p) || parted(p)) {
            Some((
                "this copy is in sync, and no other copy that has every acknowledged write is connected",
                "Connect one, then invalidate this one",
            ))
        } else if !others_whole {
            Some((
                "no other copy is known to hold the data",
                "Connect a copy that is up to date, then invalidate this one",
            ))
        } else {
            None
        };
        if let Some((why, next)) = reason {
            let text = refusal(why, "Nothing was discarded", next);
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        self.sb.state = CopyState::Blank;
        self.sb.flags.zeroed = false;
        self.sb.target_of = GenerationId(0);
        self.sb.in_sync = self.sb.in_sync.without(self.slot);
        self.undo_give_up("this copy was invalidated", out);
        if crate::handshake::broken_history(&self.own_facts()) {
            // It says nothing that can be believed, and would stand in the way of the copy that replaces it (row 1).
            self.sb.generations.clear();
            self.sb.generations_cut = false;
        }
        self.commit(
            Then::Admin {
                admin,
                text: "this copy is blank; it takes a full copy at the next meeting".into(),
            },
            out,
        );
        for at in 0..self.peers.len() {
            self.meet_again(at, "this copy was invalidated", out);
            if self.peers[at].wanted && self.peers[at].session.is_none() {
                self.peers[at].relation = Relation::Down;
                out.push(Action::Connect {
                    peer: self.peers[at].slot,
                });
            }
        }
    }

    fn resolve_split_brain(&mut self, admin: AdminId, discard_mine: bool, out: &mut Actions) {
        let split = self
            .peers
            .iter()
            .any(|p| matches!(p.row, Some(Row::R6 | Row::R15 | Row::R16)));
        if !split {
            let text = refusal(
                "no split brain is known here",
                "Nothing was discarded",
                "Look at the status",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        if !discard_mine {
            // The other side gives up its writes there; here it is enough to meet again.
            for at in 0..self.peers.len() {
                self.peers[at].wanted = true;
                if self.peers[at].session.is_none() {
                    self.peers[at].relation = Relation::Down;
                    out.push(Action::Connect {
                        peer: self.peers[at].slot,
                    });
                }
            }
            let sides = self
                .peers
                .iter()
                .filter(|p| matches!(p.row, Some(Row::R6 | Row::R15 | Row::R16)))
                .fold(SlotSet::EMPTY, |set, p| set.with(p.slot));
            let other = words::copies(sides);
            let text = format!(
                "nothing was discarded: this copy keeps its writes. Those of {other} are given up by `holdfast split-brain resolve --keep \
                 theirs` on that node, which shows them first"
            );
            return out.push(Action::AdminDone {
                admin,
                result: Ok(text),
            });
        }
        if self.is_primary_like() {
            let text = refusal(
                "this copy is primary",
                "Nothing was discarded",
                "Demote it first: its application must not see its data change under it",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        let filling = self
            .peers
            .iter()
            .find(|p| matches!(p.relation, Relation::Target | Relation::TargetPreparing));
        if let Some(source) = filling
            && !planted!("given-up-in-mid-resync")
        {
            // D14: what is on its way from there is of the generation that this copy recorded.
            let text = refusal(
                format!(
                    "this copy is being filled by copy {}: nothing of its own is left to give up",
                    source.slot.0
                ),
                "Nothing was discarded",
                "Wait for the resync to end; the status says then whether a split brain is left",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        let other = self
            .peers
            .iter()
            .position(|p| matches!(p.row, Some(Row::R6 | Row::R15 | Row::R16)));
        if let Some(at) = other
            && self.surplus_of_person(at, admin, out)
        {
            return;
        }
        self.give_up_writes(admin, "", out);
    }

    /// This copy becomes the target of the one whose writes survive. `saved`: what became of its own.
    pub(crate) fn give_up_writes(&mut self, admin: AdminId, saved: &str, out: &mut Actions) {
        self.sb.state = CopyState::Blank;
        self.sb.flags.zeroed = false;
        self.sb.target_of = GenerationId(0);
        self.sb.in_sync = self.sb.in_sync.without(self.slot);
        let text = format!(
            "the writes of this copy since the fork are given up; it becomes the target{saved}"
        );
        self.commit(Then::Admin { admin, text }, out);
        for at in 0..self.peers.len() {
            self.peers[at].wanted = true;
            // Whoever is connected knows it as the copy that it was: whole, or a source (D14).
            if self.peers[at].session.is_some() && !planted!("given-up-and-not-told") {
                self.meet_again(at, "this copy gave up its writes", out);
            } else if self.peers[at].session.is_none() {
                self.peers[at].relation = Relation::Down;
                out.push(Action::Connect {
                    peer: self.peers[at].slot,
                });
            }
        }
    }

    fn set_mode(&mut self, admin: AdminId, slot: Slot, mode: Mode, out: &mut Actions) {
        let Some(at) = self.peer_index(slot) else {
            let text = refusal(
                "there is no such peer",
                "Nothing was changed",
                "Look at the status",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        };
        let record = self.peers[at].record;
        self.peers[at].mode = mode;
        // C2: what was acknowledged from memory until now may still be there alone.
        self.sb.peers[record].mode = crate::attach::weaker(self.sb.peers[record].mode, mode);
        let text = format!("mode toward copy {} is {}", slot.0, words::mode(mode));
        if mode == Mode::Async && self.is_primary_like() && self.sb.in_sync.contains(slot) {
            // An asynchronous copy is never in S.
            self.propose(Change::Mode { slot, admin, text }, out);
        } else {
            self.commit(Then::Admin { admin, text }, out);
        }
        self.meet_again(at, "the mode of replication changed", out);
    }

    /// Every copy acts on its own record of the policy: a primary that goes on alone beside a copy that believes it
    /// cannot would lose writes. So a change is a force, made on every copy while none is primary (C1).
    fn set_policy(&mut self, admin: AdminId, policy: OnPeerLoss, force: bool, out: &mut Actions) {
        let alone = self.peers.is_empty();
        if policy != self.sb.on_peer_loss && !alone && !force {
            let text = refusal(
                "the other copies decide by their own record of the policy, and would go on by the old one",
                "The policy stays as it is",
                "Stop the service on every node, change the policy on each of them with --force, start it again",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        self.sb.on_peer_loss = policy;
        self.parked = false;
        self.commit(
            Then::Admin {
                admin,
                text: format!("on-peer-loss is {}", words::policy(policy)),
            },
            out,
        );
        self.check_all(out);
    }

    /// For a person who is about to force a promotion.
    fn what_force_loses(&self) -> String {
        let facts = self.own_facts();
        let mut lines = vec![format!(
            "this copy is {} at position {} of generation {}{}, epoch {}",
            words::state(self.sb.state),
            facts.position,
            self.generation(),
            self.sb
                .generations
                .last()
                .map_or(String::new(), |g| format!(
                    " (made by {} on copy {} in epoch {})",
                    words::cause(g.cause),
                    g.maker,
                    g.epoch.number
                )),
            self.sb.epoch_gate.number
        )];
        match crate::handshake::may_promote(&facts, None, None, true) {
            Ok(promotion) if promotion.may_lose.is_empty() => {
                lines.push("a promotion loses nothing that was acknowledged and flushed".into());
            }
            Ok(promotion) => lines.push(format!(
                "a forced promotion may lose {}",
                promotion.may_lose
            )),
            Err(refusal) => lines.push(format!("a promotion is refused even by force: {refusal}")),
        }
        for peer in &self.peers {
            let slot = peer.slot.0;
            let state = peer.their_state.map_or("unknown", words::state);
            let record = &self.sb.peers[peer.record];
            let (blocks, bytes) = (peer.dirty_bits(), peer.dirty_bytes());
            let held = if bytes == 0 {
                format!("nothing is noted here that copy {slot} lacks")
            } else {
                let since = if record.known_durable_generation == GenerationId(0) {
                    "since before the two copies met".to_owned()
                } else {
                    format!(
                        "since position {} of generation {}",
                        record.known_durable_position, record.known_durable_generation
                    )
                };
                format!(
                    "copy {slot} may lack {blocks} blocks, {bytes} bytes, written here {since}: \
                     discarding this copy loses them"
                )
            };
            lines.push(format!(
                "copy {slot} ({}, last known {state}): {held}",
                peer.relation.name()
            ));
        }
        lines.join("\n")
    }

    // --- detach ---

    /// D13 by request: a disk that begins to fail is left while there still is a copy to go on through.
    fn detach_disk(&mut self, admin: AdminId, out: &mut Actions) {
        let refused = |what: String, next: &str| Action::AdminDone {
            admin,
            result: Err(refusal(
                what,
                "Nothing was changed, the disk stays in use",
                next,
            )),
        };
        if self.failed {
            let what = "this copy goes without its disk already".to_owned();
            return out.push(refused(what, "Replace the disk"));
        }
        if self.role != Role::Primary {
            let what = format!(
                "this copy is {}: only a primary can go on through another copy's disk",
                words::role(self.role)
            );
            let next = "Stop the service on this node (`holdfast detach`), then replace the disk";
            return out.push(refused(what, next));
        }
        let Some(server) = self.diskless_server().map(|at| self.peers[at].slot) else {
            let what = "no other copy is connected, in sync and mirrored right now, so nothing could serve this one's data".to_owned();
            let next = "Connect a copy that is not asynchronous and let it finish its resync, then ask again";
            return out.push(refused(what, next));
        };
        self.disk_failed("its disk was taken out of use by a person", out);
        out.push(Action::AdminDone {
            admin,
            result: Ok(format!(
                "this copy's disk is not used any more; the service goes on through copy {}, which now holds the only current data",
                server.0
            )),
        });
    }

    fn detach(&mut self, admin: AdminId, out: &mut Actions) {
        if self.detaching.is_some() {
            let text = refusal(
                "a detach is under way",
                "Nothing was changed",
                "Wait for it",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(text),
            });
        }
        if let Some(promotion) = self.promotion.take_if(|p| !p.committed) {
            let text = refusal(
                "the replicator stops",
                "No copy was promoted",
                "Start it again first",
            );
            out.push(Action::AdminDone {
                admin: promotion.admin,
                result: Err(text),
            });
            self.role = Role::Secondary;
        }
        self.detaching = Some(admin);
        if self.role == Role::Primary {
            return self.demote(None, out);
        }
        self.detach_progress(out);
    }

    /// Links closed, everything received applied and flushed, all bits durable, then the clean mark.
    pub(crate) fn detach_progress(&mut self, out: &mut Actions) {
        if self.detaching.is_none() || self.role != Role::Secondary || self.detach_recording {
            return;
        }
        if self.failed {
            return self.detached(out);
        }
        for at in 0..self.peers.len() {
            if self.peers[at].session.is_some() {
                self.close(at, GoodbyeCode::Shutdown, "the replicator stops", true, out);
            }
        }
        if self.applying() || self.log_in_flight || self.commit_pending() {
            return;
        }
        if !self.detach_flushed_once {
            self.detach_flushed_once = true;
            self.flush_locally(FlushFor::Detach, out);
        }
    }

    pub(crate) fn detach_flushed(&mut self, out: &mut Actions) {
        self.release_window(out);
        self.pages_saved(out);
    }

    /// A bitmap page became durable: more to save, or the end of a detach.
    pub(crate) fn pages_saved(&mut self, out: &mut Actions) {
        self.undo_prepare_progress(out);
        self.rollback_progress(out);
        self.log_recovery_progress(out);
        if self.detaching.is_none()
            || !self.detach_flushed_once
            || self.detach_recording
            || self.flush.left > 0
        {
            return;
        }
        if !self.save_all_bits(out) && !planted!("stopped-before-bits") {
            return;
        }
        self.detach_recording = true;
        // A second, clean stop does not settle an unclean one.
        self.sb.flags.unclean = self.unclean_start && !planted!("second-stop-settles-the-first");
        self.commit(Then::Detached, out);
    }

    pub(crate) fn detached(&mut self, out: &mut Actions) {
        self.role = Role::Detached;
        if let Some(admin) = self.detaching.take() {
            out.push(Action::AdminDone {
                admin,
                result: Ok(if self.failed {
                    "detached; its disk failed before: what it lacks comes from another copy".into()
                } else {
                    "detached; all of it is durable".into()
                }),
            });
        }
    }

    /// Something of this copy's disk is still being written on behalf of an earlier session or role.
    pub(crate) fn applying(&self) -> bool {
        // What is kept for a person who forces this copy waits for nothing.
        let kept: usize = self.peers.iter().map(|p| p.inbox.kept_writes()).sum();
        let applies = self
            .ops
            .iter()
            .filter(|(_, op)| matches!(op, crate::op::Op::Apply(_)));
        applies.count() > kept
            || self.ops.iter().any(|(_, op)| match op {
                crate::op::Op::Undo { .. } => true,
                crate::op::Op::Client(op) => {
                    op.local_left > 0 && op.stage == crate::op::Stage::Issued
                }
                _ => false,
            })
            || self
                .peers
                .iter()
                .any(|p| p.inbox.kept.is_none() && !p.inbox.queue.is_empty())
    }
}
