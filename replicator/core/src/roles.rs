//! Who is primary: promotion, demotion, the loss of a member of S, the failure of the own disk.

use crate::api::*;
use crate::handshake::{self, PromotionKind};
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use crate::words;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// How long a promotion waits for a meeting under way to end, in ms.
const PROMOTION_WAIT_MS: u64 = 5000;

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
    // --- promotion ---

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
        let planned = whole && in_s || self.follower_has_all();
        let allowed = if !connected.is_empty() && members_connected && planned {
            Ok(handshake::Promotion {
                kind: PromotionKind::Planned,
                may_lose: String::new(),
            })
        } else {
            handshake::may_promote(&facts, None, None, wanted.force)
        };
        // D11: a mixture is rolled back for want of anything better, not beside it.
        let better = self.peers.iter().find(|p| {
            p.session.is_some()
                && matches!(
                    p.their_state,
                    Some(CopyState::UpToDate | CopyState::Complete)
                )
        });
        match (allowed, better) {
            (Err(refusal), _) => refuse(self, refusal, out),
            (Ok(promotion), Some(better))
                if promotion.kind == PromotionKind::ForcedAfterRollback =>
            {
                let slot = better.slot.0;
                let text = refusal(
                    format!(
                        "copy {slot} is connected and whole, and this copy would return to a point before it"
                    ),
                    "Nothing was changed",
                    format!("Promote copy {slot}; it fills this one"),
                );
                refuse(self, text, out);
            }
            (Ok(promotion), _) => {
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
        let epoch = Epoch {
            number: self.sb.epoch_gate.number + u64::from(!planted!("epoch-taken-twice")),
            owner: self.slot.0,
        };
        self.role = Role::Promoting;
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
        // What was unclean is settled by a generation of its own.
        self.unclean_start = false;
        self.was_primary_before = false;
        self.sb.volume_disks = self.volumes.iter().map(|v| v.disk).collect();
        for volume in &mut self.volumes {
            volume.blank = false;
        }
        self.commit(Then::Promoted, out);
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
                && self.peers[at].their_state == Some(CopyState::Complete)
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

    // --- generations ---

    /// Tells new generations to every copy that takes frames; nothing completes before they hold them (D10).
    pub(crate) fn announce_generations(&mut self, out: &mut Actions) {
        for at in 0..self.peers.len() {
            let takes_frames = matches!(
                self.peers[at].relation,
                Relation::Established
                    | Relation::Joining { .. }
                    | Relation::Source
                    | Relation::SourceStarting
            );
            if takes_frames {
                self.tell_generations(at, out);
            }
        }
    }

    /// Every generation that this copy was not told, in order: two may have become durable together.
    pub(crate) fn tell_generations(&mut self, at: usize, out: &mut Actions) {
        let told = self.peers[at].told_generation;
        let generations = &self.sb.generations;
        let from = generations.iter().position(|g| g.id == told);
        let from = from.map_or(generations.len().saturating_sub(1), |at| at + 1);
        let untold: Vec<Generation> = generations[from..].to_vec();
        for generation in untold {
            self.generation_unknown_to = self.generation_unknown_to.with(self.peers[at].slot);
            self.peers[at].told_generation = generation.id;
            let mut header = self.header(FrameKind::NewGeneration);
            header.position = self.sb.generation_base;
            self.send(
                at,
                header,
                Payload::Body(Body::NewGeneration { generation }),
                out,
            );
        }
    }

    pub(crate) fn generation_told(
        &mut self,
        at: usize,
        session: SessionId,
        header: &FrameHeader,
        generation: Generation,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let newer = header.epoch.number > self.sb.epoch_gate.number
            || (header.epoch == self.sb.epoch_gate && header.epoch.owner == slot.0);
        if !newer || self.is_primary_like() {
            self.bad_frame(
                at,
                "a generation of a copy that is not the owner of the epoch",
                out,
            );
            return;
        }
        let established = matches!(self.peers[at].relation, Relation::Established);
        if established
            && !planted!("fork-not-compared")
            && (self.issued != header.position || self.peers[at].dirty_bits() > 0)
        {
            // It forked at another place than where we stand: one of us holds what the other lacks.
            self.sb.epoch_gate = header.epoch;
            self.commit(Then::Nothing, out);
            return self.meet_again(
                at,
                "the new generation forks at another position than ours",
                out,
            );
        }
        self.sb.epoch_gate = header.epoch;
        for (other, peer) in self.peers.iter_mut().enumerate() {
            peer.is_primary = other == at;
        }
        let peer = &mut self.peers[at];
        if !peer.their_generations.iter().any(|g| g.id == generation.id) {
            append_generation(
                &mut peer.their_generations,
                &mut peer.their_generations_cut,
                generation,
            );
        }
        // A target whose Complete is on its way to the disk: that names the generations before this one.
        let completing = matches!(self.peers[at].relation, Relation::Target)
            && self.sb.state == CopyState::Complete;
        match self.peers[at].relation {
            // An earlier primary announced it already.
            Relation::Established if self.sb.generations.iter().any(|g| g.id == generation.id) => {
                self.commit(
                    Then::GenerationStored {
                        peer: at,
                        session,
                        generation: generation.id,
                    },
                    out,
                );
            }
            Relation::Target | Relation::TargetPreparing if !completing => {
                // Recorded with Complete; until then this copy is a target of the source's line anyway.
                self.sb.target_of = generation.id;
                self.peers[at].target.generation_base = Some(header.position);
                self.commit(
                    Then::GenerationStored {
                        peer: at,
                        session,
                        generation: generation.id,
                    },
                    out,
                );
            }
            Relation::Established | Relation::Target => {
                if generation.parent != self.generation() {
                    self.bad_frame(at, "a generation that does not grow from ours", out);
                    return;
                }
                self.push_generation(generation);
                if self.peers[at].mode == Mode::Async || self.peers[at].their_mode == Mode::Async {
                    // C1: a primary that this copy follows asynchronously completes without it, from its first write on. Its
                    // `InSync` comes after it serves; this is durable before.
                    self.sb.in_sync = SlotSet::only(slot);
                    self.sb.in_sync_pending = self.sb.in_sync;
                }
                self.sb.flags.zeroed = false;
                self.sb.generation_base = header.position;
                self.unclean_start = false;
                self.was_primary_before = false;
                self.commit(
                    Then::GenerationStored {
                        peer: at,
                        session,
                        generation: generation.id,
                    },
                    out,
                );
            }
            _ => {
                self.bad_frame(at, "a generation out of turn", out);
            }
        }
    }

    pub(crate) fn generation_stored(
        &mut self,
        at: usize,
        session: SessionId,
        generation: GenerationId,
        out: &mut Actions,
    ) {
        if self.peers[at].on(session) {
            self.send_body(
                at,
                FrameKind::GenerationAck,
                Body::GenerationAck { generation },
                out,
            );
        }
    }

    pub(crate) fn generation_ack(
        &mut self,
        at: usize,
        generation: GenerationId,
        out: &mut Actions,
    ) {
        if generation != self.generation() {
            return;
        }
        let slot = self.peers[at].slot;
        if matches!(
            self.peers[at].relation,
            Relation::Established | Relation::Joining { .. }
        ) {
            let record = self.peers[at].record;
            self.sb.peers[record].bitmap_base = generation;
        }
        self.generation_unknown_to = self.generation_unknown_to.without(slot);
        if self.generation_unknown_to.is_empty() {
            self.promotion_known(out);
            self.check_all(out);
        }
    }

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
        for slot in missing.iter() {
            self.sb.in_sync = self.sb.in_sync.without(slot);
            self.sb.in_sync_pending = self.sb.in_sync_pending.without(slot);
        }
        self.sb.in_sync = self.sb.in_sync.with(self.slot);
        self.sb.in_sync_version += 1;
        self.sb.flags.solo = self.sb.in_sync == SlotSet::only(self.slot);
        if !planted!("no-generation-without-the-peer") {
            self.new_generation(GenerationCause::PeerLost);
            self.generation_committing = true;
        }
        let text = format!(
            "{} left the in-sync set, in it are {}: degraded, the service goes on",
            words::copies(missing),
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
        if self.client_in_flight() || !(settled || alone) || self.dropping {
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

    pub(crate) fn peer_demoted(&mut self, at: usize, position: Position, out: &mut Actions) {
        if !self.peers[at].is_primary {
            self.bad_frame(at, "a copy that is not primary says it was demoted", out);
            return;
        }
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
                 Start the replicator again to have it tried again; replace the disk once another copy is in sync"
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
