//! How a copy becomes primary: what it waits for, whom it asks, in which order it becomes durable; and what a copy answers that is asked.

use crate::api::*;
use crate::cluster_store::Change;
use crate::handshake::{self, PromotionKind};
use crate::peer::*;
use crate::roles::refusal;
use crate::service::*;
use crate::words;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// How long a promotion waits for a meeting under way to end, in ms.
const PROMOTION_WAIT_MS: u64 = 5000;

/// How long a promotion takes a copy for connected whose session was ended to meet again, in ms.
const MEET_AGAIN_MS: u64 = 1000;

/// A promotion somebody asked for that waits for the facts it needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WantedPromotion {
    pub admin: AdminId,
    pub force: bool,
    pub since: Time,
    /// A connected primary was heard after the request: it lives.
    pub primary_heard: bool,
}

/// What a copy that wants to be promoted asks with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asks {
    pub epoch: Epoch,
    /// S as it knows it.
    pub in_sync: SlotSet,
    /// A person insists.
    pub force: bool,
    /// Where it is.
    pub generation: GenerationId,
}

impl Core {
    pub(crate) fn want_promotion(&mut self, admin: AdminId, force: bool, out: &mut Actions) {
        let already = self.promotion_wanted.is_some() || self.promotion.is_some();
        if self.role == Role::Primary || already || self.role != Role::Secondary {
            let refusal = refusal(
                if self.role == Role::Primary {
                    "this copy is primary already"
                } else {
                    "a change of role is under way"
                },
                "Nothing was changed",
                "Look at the status in a moment",
            );
            return out.push(Action::AdminDone {
                admin,
                result: Err(refusal),
            });
        }
        let since = self.now;
        self.promotion_wanted = Some(WantedPromotion {
            admin,
            force,
            since,
            primary_heard: false,
        });
        if force && !planted!("force-by-old-facts") {
            // D11: what a connected copy said when they met may be older than what it holds: as followers they agreed, and what its
            // primary sent since has come to it alone. Told anew, it fills this copy instead.
            for at in 0..self.peers.len() {
                let peer = &self.peers[at];
                if !peer.is_primary && matches!(peer.relation, Relation::Established) {
                    self.meet_again(
                        at,
                        "a force is wanted: what each copy holds is told anew",
                        out,
                    );
                }
            }
        }
        self.try_promotion(out);
    }

    /// Goes on with a wanted promotion as soon as nothing is in between.
    pub(crate) fn try_promotion(&mut self, out: &mut Actions) {
        let Some(wanted) = self.promotion_wanted else {
            return;
        };
        if self.role != Role::Secondary {
            return;
        }
        let refuse = |core: &mut Core, refusal: Refusal, out: &mut Actions| {
            core.promotion_wanted = None;
            core.store.forget_promotion();
            out.push(Action::AdminDone {
                admin: wanted.admin,
                result: Err(refusal),
            });
        };
        if self.detaching.is_some() {
            return refuse(
                self,
                refusal(
                    "the replicator stops",
                    "No copy was promoted",
                    "Start it again first",
                ),
                out,
            );
        }
        if self.failed {
            return refuse(
                self,
                refusal(
                    "the disk of this copy failed",
                    "The other copies are untouched",
                    "Promote another copy",
                ),
                out,
            );
        }
        if let Some(primary) = self
            .peers
            .iter()
            .find(|p| p.is_primary && p.session.is_some())
        {
            // A silent one may be dead: the link says so within a second. One that speaks is alive.
            if wanted.primary_heard {
                let slot = primary.slot.0;
                return refuse(
                    self,
                    refusal(
                        format!("copy {slot} is primary and connected"),
                        "It goes on serving",
                        "Demote it first, then promote this copy",
                    ),
                    out,
                );
            }
            return;
        }
        let filling = self
            .peers
            .iter()
            .find(|p| matches!(p.relation, Relation::Target | Relation::TargetPreparing));
        if let Some(source) = filling {
            let slot = source.slot.0;
            return refuse(
                self,
                refusal(
                    format!("this copy is being filled by copy {slot}, which is connected"),
                    "Nothing was changed",
                    format!("Wait for the resync to end, or promote copy {slot}"),
                ),
                out,
            );
        }
        let now = self.now;
        let unsettled = self.peers.iter().any(|p| {
            let coming = p
                .again_since
                .is_some_and(|since| now.ms_since(since) < MEET_AGAIN_MS);
            p.session.is_none() && coming
                || p.session.is_some()
                    && !matches!(
                        p.relation,
                        Relation::Established
                            | Relation::Source
                            | Relation::Refused
                            | Relation::Waiting { .. }
                    )
        });
        if unsettled {
            if self.now.ms_since(wanted.since) > PROMOTION_WAIT_MS {
                refuse(
                    self,
                    refusal(
                        "a meeting with another copy does not end",
                        "Nothing was changed",
                        "Look at the status and try again",
                    ),
                    out,
                );
            }
            return;
        }
        if wanted.force {
            self.apply_kept(out);
        }
        // Everything received is applied first (an older primary's writes must not land later).
        let applying = self.applying() && !planted!("promoted-before-applying");
        if applying || self.commit_pending() {
            return;
        }
        let record = if self.store.is_cluster() {
            match self.store_for_promotion(out) {
                Some(record) => Some(record),
                None if self.now.ms_since(wanted.since) > PROMOTION_WAIT_MS
                    && !self.store.unknown() =>
                {
                    return refuse(
                        self,
                        refusal(
                            "the cluster store does not answer, so nobody knows who may write",
                            "No copy was promoted and no data changed",
                            "Bring back a majority of the nodes (and the witness)",
                        ),
                        out,
                    );
                }
                None => return,
            }
        } else {
            None
        };
        let connected: SlotSet = self
            .peers
            .iter()
            .filter(|p| {
                p.session.is_some()
                    && matches!(p.relation, Relation::Established | Relation::Source)
            })
            .fold(SlotSet::EMPTY, |set, p| set.with(p.slot));
        let facts = self.own_facts();
        let members_connected = self
            .sb
            .in_sync
            .without(self.slot)
            .iter()
            .all(|s| connected.contains(s));
        let in_s = self.sb.in_sync.contains(self.slot);
        let whole =
            self.sb.state == CopyState::UpToDate || (self.sb.state == CopyState::Complete && in_s);
        // The record names members itself.
        let member = whole && in_s && record.is_none();
        let planned = member || self.follower_has_all();
        let allowed = if !connected.is_empty() && members_connected && planned {
            Ok(handshake::Promotion {
                kind: PromotionKind::Planned,
                may_lose: String::new(),
            })
        } else {
            handshake::may_promote(&facts, None, record.as_ref(), wanted.force)
        };
        // C1, C13: neither a disk that the record does not count on nor one that is ahead of the record.
        let allowed = match (&record, allowed) {
            (Some(record), Ok(_)) if facts.epoch.number > record.epoch.number => {
                handshake::may_promote(&facts, None, Some(record), false)
            }
            (Some(_), Ok(promotion)) if self.store.stranger() && !promotion.is_forced() => {
                Err(refusal(
                    "the cluster's record knows another disk, or a later attachment of it, for this copy",
                    "No copy was promoted and no data changed",
                    "Connect a copy that is up to date, or promote this one with --force if there is none",
                ))
            }
            (_, allowed) => allowed,
        };
        // D11: a force is for want of anything better, not beside it. A member of S holds every acknowledged write, and a whole
        // copy more than a mixture, a point of the past or a new disk.
        let better = self.peers.iter().find(|p| {
            let whole = matches!(
                p.their_state,
                Some(CopyState::UpToDate | CopyState::Complete)
            );
            let this_whole = matches!(self.sb.state, CopyState::UpToDate | CopyState::Complete);
            // What it said when they met may be older than its membership.
            let unfit = matches!(
                p.their_state,
                Some(CopyState::Failed | CopyState::Inconsistent | CopyState::Outdated)
            );
            let has_all = !in_s
                && !unfit
                && self.sb.in_sync.contains(p.slot)
                && matches!(p.relation, Relation::Established);
            p.session.is_some() && (has_all || whole && !this_whole)
        });
        match (allowed, better) {
            (Err(refusal), _) => refuse(self, refusal, out),
            (Ok(promotion), Some(better)) if promotion.is_forced() => {
                let slot = better.slot.0;
                let text = refusal(
                    format!(
                        "copy {slot} is connected and holds what this copy may lack: {}",
                        promotion.may_lose
                    ),
                    "Nothing was changed",
                    format!(
                        "Promote copy {slot}; it fills this one, and the service can be moved here without loss after that"
                    ),
                );
                refuse(self, text, out);
            }
            (Ok(promotion), _) => {
                // C1: the compare-and-swap is what decides between two.
                if let Some(record) = record
                    && !self.epoch_granted(&record, out)
                {
                    return;
                }
                self.promotion_wanted = None;
                self.drop_kept(out);
                self.start_promotion(wanted.admin, &promotion, wanted.force, connected, out);
            }
        }
    }

    /// An asynchronous copy is never in S, and yet holds every acknowledged write once the last primary stopped being
    /// primary, all of S is connected, and nothing is left to copy: its link to that primary was met anew, or ended with
    /// everything flushed here, since then.
    fn follower_has_all(&self) -> bool {
        let settled = |slot: Slot| {
            self.peers.iter().any(|p| {
                p.slot == slot
                    && p.session.is_some()
                    && matches!(p.relation, Relation::Established)
                    && !p.is_primary
                    && !p.diskless
            })
        };
        // Whose writes this copy holds; no slot, as long as nobody was promoted. A newer epoch is this copy's own, from an
        // attempt that was begun anew, or somebody else's who may be primary.
        let owner = self
            .sb
            .generations
            .last()
            .map_or(u8::MAX, |g| g.epoch.owner);
        let newest = self.sb.epoch_gate.owner;
        let members = self.sb.in_sync.without(self.slot);
        self.sb.state == CopyState::Complete
            && (newest == owner || newest == self.slot.0)
            && members.iter().any(|slot| slot.0 == owner)
            && members.iter().all(settled)
    }

    fn start_promotion(
        &mut self,
        admin: AdminId,
        allowed: &handshake::Promotion,
        insisted: bool,
        connected: SlotSet,
        out: &mut Actions,
    ) {
        let next = Epoch {
            number: self.sb.epoch_gate.number + u64::from(!planted!("epoch-taken-twice")),
            owner: self.slot.0,
        };
        let epoch = self.store.take_granted().unwrap_or(next);
        self.role = Role::Promoting;
        self.in_sync_of_record();
        let mut reason = words::promotion(allowed.kind).to_owned();
        if !allowed.may_lose.is_empty() {
            reason = format!("{reason}; this may lose {}", allowed.may_lose);
        }
        let text = format!("epoch {} for this copy: {reason}", epoch.number);
        self.notice(Level::Info, "promoting", None, text, out);
        self.promotion = Some(Promotion {
            admin,
            epoch,
            force: allowed.is_forced(),
            insisted,
            waiting_for: connected,
            agreed: SlotSet::EMPTY,
            committed: false,
            durable: false,
            proposed: false,
            recorded: false,
            reason,
        });
        if allowed.kind == PromotionKind::ForcedAfterRollback && !planted!("rollback-skipped") {
            return self.undo_rollback(out);
        }
        self.ask_for_epoch(out);
    }

    /// Every connected copy raises its gate first, so that nothing older is accepted there any more. This copy raises
    /// its own before it asks: whoever is not the owner of the newest epoch it knows may go on without the other
    /// under `suspend`, and the copy that agreed becomes just that. Never must both have that right.
    pub(crate) fn ask_for_epoch(&mut self, out: &mut Actions) {
        let Some(promotion) = &self.promotion else {
            return;
        };
        let (epoch, waiting) = (promotion.epoch, promotion.waiting_for);
        let insisted = promotion.insisted;
        if !waiting.is_empty() && self.sb.epoch_gate != epoch && !planted!("own-gate-late") {
            self.sb.epoch_gate = epoch;
            return self.commit(Then::EpochTaken { epoch }, out);
        }
        for at in 0..self.peers.len() {
            if waiting.contains(self.peers[at].slot) {
                self.send_body(
                    at,
                    FrameKind::PromoteRequest,
                    Body::PromoteRequest {
                        epoch,
                        in_sync: self.sb.in_sync,
                        force: insisted,
                    },
                    out,
                );
            }
        }
        self.promotion_progress(out);
    }

    pub(crate) fn epoch_taken(&mut self, epoch: Epoch, out: &mut Actions) {
        if self.sb.epoch_gate == epoch && self.promotion.as_ref().is_some_and(|p| p.epoch == epoch)
        {
            self.ask_for_epoch(out);
        }
    }

    pub(crate) fn promotion_progress(&mut self, out: &mut Actions) {
        let Some(promotion) = &mut self.promotion else {
            return;
        };
        if !promotion.waiting_for.is_empty() || promotion.committed {
            return;
        }
        promotion.committed = true;
        // The fork position of the new generation is a promise: flush first.
        self.flush_locally(FlushFor::Promotion, out);
    }

    pub(crate) fn promotion_flushed(&mut self, out: &mut Actions) {
        let Some(promotion) = &self.promotion else {
            return;
        };
        let (epoch, force, agreed) = (promotion.epoch, promotion.force, promotion.agreed);
        self.sb.epoch_gate = epoch;
        self.sb.flags.was_primary = true;
        self.sb.flags.zeroed = false;
        self.sb.flags.rolled_back = false;
        self.sb.state = CopyState::UpToDate;
        self.sb.target_of = GenerationId(0);
        let cause = if force {
            GenerationCause::Force
        } else if self.unclean_start {
            // Its fork position is a lower bound, and this copy may have lost what the other kept.
            GenerationCause::Restart
        } else {
            GenerationCause::Promotion
        };
        if !self.unclean_start || !planted!("positions-reused") {
            self.new_generation(cause);
        }
        // What was unclean is settled by a generation of its own.
        self.unclean_start = false;
        self.was_primary_before = false;
        self.sb.volume_disks = self.volumes.iter().map(|v| v.disk).collect();
        for volume in &mut self.volumes {
            volume.blank = false;
        }
        if self.store.is_cluster() {
            // S follows once the connected copies hold the generation.
            return self.commit(Then::Promoted, out);
        }
        // Copies that did not agree leave S durably before this copy serves (they are unreachable).
        let mut in_sync = SlotSet::only(self.slot);
        for slot in self.sb.in_sync.iter() {
            let asynchronous = self
                .peers
                .iter()
                .any(|p| p.slot == slot && p.mode == Mode::Async);
            if agreed.contains(slot) && !asynchronous {
                in_sync = in_sync.with(slot);
            }
        }
        if in_sync != self.sb.in_sync {
            self.sb.in_sync_version += 1;
        }
        self.sb.in_sync = in_sync;
        self.sb.in_sync_pending = in_sync;
        self.sb.flags.solo = in_sync == SlotSet::only(self.slot);
        self.commit(Then::Promoted, out);
    }

    /// The cluster's record has S and generation of this promotion.
    pub(crate) fn promotion_recorded(&mut self, out: &mut Actions) {
        if let Some(promotion) = &mut self.promotion {
            promotion.recorded = true;
            self.sb.flags.solo = self.sb.in_sync == SlotSet::only(self.slot);
            self.commit(Then::Nothing, out);
        }
    }

    pub(crate) fn promotion_durable(&mut self, out: &mut Actions) {
        if self.role != Role::Promoting {
            return;
        }
        if let Some(promotion) = &mut self.promotion {
            promotion.durable = true;
        }
        self.announce_generations(out);
        self.promotion_known(out);
    }

    /// D10: serve once every connected copy holds the generation.
    pub(crate) fn promotion_known(&mut self, out: &mut Actions) {
        if self.role != Role::Promoting
            || !self.generation_unknown_to.is_empty()
            || self.commit_pending()
        {
            return;
        }
        if self.store.is_cluster()
            && let Some(promotion) = &mut self.promotion
            && promotion.durable
            && !promotion.recorded
        {
            if !std::mem::replace(&mut promotion.proposed, true) {
                self.propose(Change::Promoted, out);
            }
            return;
        }
        let Some(promotion) = self.promotion.take_if(|p| p.durable) else {
            return;
        };
        self.role = Role::Primary;
        self.announce_in_sync(out);
        self.completed_max = self.issued;
        self.undo_drop(out);
        self.last_stable_flush = self.now;
        let text = format!(
            "primary in epoch {} ({})",
            promotion.epoch.number, promotion.reason
        );
        self.notice(Level::Info, "primary", None, text.clone(), out);
        out.push(Action::RoleChanged {
            role: Role::Primary,
            epoch: promotion.epoch,
        });
        out.push(Action::AdminDone {
            admin: promotion.admin,
            result: Ok(text),
        });
        for at in 0..self.peers.len() {
            self.peers[at].is_primary = false;
            if !matches!(self.peers[at].relation, Relation::Established) {
                continue;
            }
            self.peers[at].flushed = self.issued;
            if self.peers[at].dirty_bits() > 0 {
                self.meet_again(
                    at,
                    "this copy became primary and holds blocks the other may lack",
                    out,
                );
            } else if self.peers[at].mode != Mode::Async
                && !self.sb.in_sync.contains(self.peers[at].slot)
            {
                self.begin_join(at, out);
            } else if self.peers[at].mode != Mode::Async
                && matches!(
                    self.peers[at].their_state,
                    Some(CopyState::Complete | CopyState::Consistent)
                )
            {
                // A former leader's `InSync` never reached it.
                self.tell_in_sync(at, out);
            }
        }
        if self.detaching.is_some() {
            // Told to stop when the promotion could not be taken back any more.
            return self.demote(None, out);
        }
        self.greet_waiting(out);
    }

    /// Another copy wants to be promoted.
    pub(crate) fn promote_request(
        &mut self,
        at: usize,
        session: SessionId,
        asks: Asks,
        out: &mut Actions,
    ) {
        let epoch = asks.epoch;
        let slot = self.peers[at].slot;
        let settled = matches!(
            self.peers[at].relation,
            Relation::Established | Relation::Target
        );
        let mut reason = String::new();
        let (mut apart, mut unasked) = (false, false);
        // Two at once take the same number, each for itself: the one that yields takes the other's.
        let same_number = self
            .promotion
            .as_ref()
            .is_some_and(|p| p.epoch.number == epoch.number)
            && self.sb.epoch_gate.number == epoch.number;
        if epoch.owner != slot.0 {
            reason = format!("copy {} asks for an epoch of copy {}", slot.0, epoch.owner);
        } else if !settled {
            reason = format!("this copy is {}", self.peers[at].relation.name());
        } else if let Some(why) = self.apart(at, asks.generation) {
            reason = why;
            apart = true;
        } else if matches!(self.role, Role::Primary | Role::Demoting) {
            reason = "this copy is primary".into();
        } else if self.role == Role::Promoting
            && (self.slot < slot || self.promotion.as_ref().is_some_and(|p| p.committed))
        {
            // Two at once: the lower slot goes on.
            reason = "this copy is being promoted".into();
        } else if epoch.number <= self.sb.epoch_gate.number
            && !same_number
            // Heard of from another copy that agreed to it.
            && epoch != self.sb.epoch_gate
        {
            reason = format!("epoch {} was accepted already", self.sb.epoch_gate.number);
        } else if self.store.is_cluster() {
            // The record says who owns the epoch: it asks when it does.
        } else if let (false, Some(other)) = (asks.force, self.agreed_to_another(slot)) {
            reason = format!(
                "this copy agreed to the promotion of copy {}, which is not connected and may be primary",
                other.0
            );
        } else if let (false, Some(member)) = (asks.force, self.unasked_member(slot, asks.in_sync))
        {
            reason = format!("copy {} is in sync, too, and was not asked", member.0);
            unasked = true;
        }
        if !reason.is_empty() {
            let body = Body::PromoteReply {
                epoch,
                accepted: false,
                reason,
            };
            self.send_body(at, FrameKind::PromoteReply, body, out);
            if apart {
                self.meet_again(at, "the copies went apart since they agreed", out);
            } else if unasked {
                self.send_in_sync(at, out);
            }
            return;
        }
        if self.role == Role::Promoting {
            self.cancel_promotion("another copy with a lower slot is being promoted", out);
        }
        self.sb.epoch_gate = epoch;
        self.commit(
            Then::GateRaised {
                peer: at,
                session,
                epoch,
            },
            out,
        );
    }

    /// A third copy that this one agreed to last, whose generation never came: whether it was promoted is not known here, and
    /// as a copy outside S it may complete writes alone (C1).
    fn agreed_to_another(&self, asking: Slot) -> Option<Slot> {
        let owner = self.sb.epoch_gate.owner;
        let last = self.sb.generations.last().map(|g| g.epoch.owner);
        if self.sb.epoch_gate.number == 0
            || usize::from(owner) >= MAX_COPIES
            || [Some(self.slot.0), Some(asking.0), last].contains(&Some(owner))
        {
            return None;
        }
        let there = self.peers.iter().any(|p| {
            p.slot.0 == owner
                && !p.is_primary
                && matches!(p.relation, Relation::Established | Relation::Source)
        });
        (!there).then_some(Slot(owner))
    }

    /// A member of S as this copy knows it that the one who asks does not know of: what it asks for was not asked of
    /// everybody who may be promoted without it (C1).
    fn unasked_member(&self, asking: Slot, asked: SlotSet) -> Option<Slot> {
        if !self.sb.in_sync.contains(self.slot) {
            // Whoever left S hears of no change of it any more.
            return None;
        }
        let known = self.sb.in_sync.union(self.sb.in_sync_pending);
        known
            .without(self.slot)
            .without(asking)
            .iter()
            .find(|slot| !asked.contains(*slot))
    }

    /// What this copy became since it and `at` agreed that they hold the same, if it concerns a promotion there (C1): two
    /// copies agree once, and a third one, or the loss of a disk, may lead one of them on alone.
    fn apart(&self, at: usize, generation: GenerationId) -> Option<String> {
        if !matches!(self.peers[at].relation, Relation::Established) {
            return None;
        }
        if self.sb.target_of != GenerationId(0) || self.sb.state == CopyState::Inconsistent {
            return Some("this copy is being filled by another one".into());
        }
        (generation != self.generation()).then(|| {
            format!(
                "this copy is in generation {}, that one in {generation}",
                self.generation()
            )
        })
    }

    pub(crate) fn gate_raised(
        &mut self,
        at: usize,
        session: SessionId,
        epoch: Epoch,
        out: &mut Actions,
    ) {
        if self.peers[at].on(session) {
            let body = Body::PromoteReply {
                epoch,
                accepted: true,
                reason: String::new(),
            };
            self.send_body(at, FrameKind::PromoteReply, body, out);
        }
    }

    pub(crate) fn promote_reply(
        &mut self,
        at: usize,
        epoch: Epoch,
        accepted: bool,
        reason: &str,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let Some(promotion) = &mut self.promotion else {
            return;
        };
        if promotion.epoch != epoch || !promotion.waiting_for.contains(slot) {
            return;
        }
        if !accepted {
            let text = format!("copy {} refuses: {reason}", slot.0);
            return self.cancel_promotion(&text, out);
        }
        promotion.waiting_for = promotion.waiting_for.without(slot);
        promotion.agreed = promotion.agreed.with(slot);
        self.promotion_progress(out);
    }

    pub(crate) fn cancel_promotion(&mut self, why: &str, out: &mut Actions) {
        let Some(promotion) = self.promotion.take() else {
            return;
        };
        self.role = Role::Secondary;
        self.notice(
            Level::Warning,
            "promotion-cancelled",
            None,
            why.to_owned(),
            out,
        );
        let kept = if self.undo.rollback.is_some() {
            "No copy was promoted. Blocks that were put back already are marked: the source of the resync brings them again"
        } else {
            "No copy was promoted and no data changed"
        };
        let refusal = refusal(why, kept, "Look at the status and try again");
        out.push(Action::AdminDone {
            admin: promotion.admin,
            result: Err(refusal),
        });
        self.greet_waiting(out);
    }

    /// A copy whose agreement a promotion waits for is gone: begin anew with what is left.
    pub(crate) fn promotion_lost_peer(&mut self, slot: Slot, out: &mut Actions) {
        if let Some(promotion) = &self.promotion
            && !promotion.committed
            && (promotion.waiting_for.contains(slot) || promotion.agreed.contains(slot))
        {
            let (admin, force) = (promotion.admin, promotion.insisted);
            self.promotion = None;
            self.role = Role::Secondary;
            let text = format!(
                "copy {} was lost meanwhile: the promotion is decided anew without it",
                slot.0
            );
            self.notice(Level::Info, "promotion-anew", Some(slot), text, out);
            self.promotion_wanted = Some(WantedPromotion {
                admin,
                force,
                since: self.now,
                primary_heard: false,
            });
        }
        self.promotion_known(out);
        self.try_promotion(out);
    }
}
