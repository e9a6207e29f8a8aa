//! Two copies meet: facts are exchanged, [`handshake::decide`](crate::handshake::decide) says what follows,
//! and both sides carry it out until they stand `Established`.

use crate::api::*;
use crate::growth::SizesMeet;
use crate::handshake::{self, Decision, Outcome};
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::WIRE_VERSION_MIN;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

impl Core {
    pub(crate) fn link_up(
        &mut self,
        slot: Slot,
        session: SessionId,
        path: &str,
        out: &mut Actions,
    ) {
        let Some(at) = self.peer_index(slot) else {
            return;
        };
        if self.peers[at].session.is_some() {
            // The link lost the old one and has not said so yet.
            self.session_ended(at, "a new connection replaced it", out);
        }
        let served_by = self.diskless.as_ref().is_some_and(|d| d.server == slot);
        let failed = self.failed && !served_by;
        if !self.peers[at].wanted || failed || self.role == Role::Detached {
            let (code, text) = (GoodbyeCode::Refused, "not connected by choice".to_owned());
            return out.push(Action::Close {
                peer: slot,
                session,
                code,
                text,
                reconnect: false,
            });
        }
        let now = self.now;
        let peer = &mut self.peers[at];
        peer.session = Some(session);
        peer.again_since = None;
        peer.wire_version = WIRE_VERSION_MIN;
        peer.relation = Relation::Greeting {
            sent: None,
            theirs: None,
        };
        peer.last_heard = now;
        peer.last_sent = now;
        peer.up_since = now;
        peer.ready_received = false;
        peer.bits_received = false;
        peer.unacked_bytes = 0;
        peer.queued_bytes = 0;
        peer.oldest_unacked = None;
        peer.congested = false;
        peer.is_primary = false;
        peer.source = SourceState::default();
        peer.target = TargetState::default();
        self.notice(
            Level::Info,
            "link-up",
            Some(slot),
            format!("connected by {path}"),
            out,
        );
        self.greet(at, session, out);
    }

    /// Tells our facts, once nothing is on its way to the disk that would change them.
    pub(crate) fn greet(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session) {
            return;
        }
        let Relation::Greeting { sent: None, .. } = self.peers[at].relation else {
            return;
        };
        // Every event looks again whether they are.
        if !self.facts_are_true() {
            return;
        }
        // Its primary speaks for what it sent.
        self.drop_inbox(at, out);
        self.peers[at].inbox = Inbox {
            session: session.0,
            ..Inbox::default()
        };
        self.peers[at].met_record = None;
        let facts = self.facts(at);
        self.peers[at].told_generation = self.generation();
        let hello = Hello::new(self.sb.node, self.slot, self.sb.service, facts.clone());
        if let Relation::Greeting { sent, .. } = &mut self.peers[at].relation {
            *sent = Some(Box::new(facts));
        }
        self.send_body(at, FrameKind::Hello, Body::Hello(Box::new(hello)), out);
        self.decide_if_met(at, out);
    }

    /// Facts are told when they are durable and true.
    pub(crate) fn facts_are_true(&self) -> bool {
        if self.commit_pending() || self.size_on_its_way() || !self.store.may_meet() {
            return false;
        }
        // What an earlier session or role left in flight is finished first.
        // A primary's own writes go on meanwhile: what they are is bits until the meeting is settled.
        let unfinished = self.role != Role::Primary && self.applying();
        !unfinished && !matches!(self.role, Role::Promoting | Role::Demoting) && !self.dropping
    }

    /// What is true and durable of this copy, as told to one peer.
    pub(crate) fn facts(&self, at: usize) -> Facts {
        self.facts_about(Some(at))
    }

    pub(crate) fn facts_about(&self, at: Option<usize>) -> Facts {
        let peer = at.map(|at| &self.peers[at]);
        let record = peer.map(|p| self.sb.peers[p.record]).unwrap_or_default();
        Facts {
            slot: self.slot,
            disk: self.sb.disk,
            attach_counter: self.sb.attach_counter,
            incarnation: self.sb.incarnation,
            epoch: self.sb.epoch_gate,
            state: if self.failed {
                CopyState::Failed
            } else {
                self.sb.state
            },
            flags: CopyFlags {
                unclean: self.unclean_start,
                was_primary: self.was_primary_before || self.role == Role::Primary,
                ..self.sb.flags
            },
            is_primary: matches!(self.role, Role::Primary | Role::Demoting | Role::Promoting),
            unclean_start: self.unclean_start,
            mode: at.map_or(self.sb.mode, |at| self.weakest_mode(at)),
            on_peer_loss: self.sb.on_peer_loss,
            generations: self.sb.generations.clone(),
            generations_cut: self.sb.generations_cut,
            position: self.held_position().saturating_sub(self.sb.generation_base),
            issued: self.issued.saturating_sub(self.sb.generation_base),
            target_of: self.sb.target_of,
            target_source: self.sb.target_source,
            before_resync: self.sb.before_resync,
            undo_intact: self.undo_intact(),
            follows_third: at.is_some_and(|at| self.follows_third(at)),
            in_sync: self.sb.in_sync,
            in_sync_version: self.sb.in_sync_version,
            in_sync_pending: self.sb.in_sync_pending,
            volumes: self
                .volumes
                .iter()
                .enumerate()
                .map(|(index, v)| VolumeFacts {
                    index: VolumeIndex(index as u16),
                    volume: v.id,
                    name: v.name.clone(),
                    disk: v.disk,
                    size: v.size,
                    sector_size: v.sector_size,
                    grain_shift: v.grain_shift,
                    blank: v.blank,
                    room: v.room.max(v.size),
                })
                .collect(),
            about_peer: PeerFacts {
                known: record.disk != Uuid(0),
                disk: record.disk,
                attach_counter: record.attach_counter,
                incarnation: record.incarnation,
                bitmap_base: record.bitmap_base,
                bits: peer.map_or(0, Peer::dirty_bits),
                bytes: peer.map_or(0, Peer::dirty_bytes),
                known_durable_generation: record.known_durable_generation,
                known_durable_position: record.known_durable_position,
                full_copy: record.full_copy,
            },
        }
    }

    pub(crate) fn hello(&mut self, at: usize, hello: Box<Hello>, out: &mut Actions) {
        let peer = &self.peers[at];
        if hello.service != self.sb.service
            || hello.slot != peer.slot
            || hello.facts.slot != peer.slot
        {
            self.bad_frame(at, "the hello names another service or copy", out);
            return;
        }
        if !matches!(peer.relation, Relation::Greeting { theirs: None, .. }) {
            self.bad_frame(at, "a hello came out of turn", out);
            return;
        }
        let agreed = match hello.negotiate() {
            Ok(agreed) => agreed,
            Err(error) => {
                // The other side may not have seen our hello yet, and is to know why, too.
                let (code, text) = (GoodbyeCode::Refused, error.to_string());
                let goodbye = Body::Goodbye {
                    code,
                    text: text.clone(),
                };
                self.send_body(at, FrameKind::Goodbye, goodbye, out);
                let slot = Some(self.peers[at].slot);
                self.notice(Level::Error, "incompatible", slot, text.clone(), out);
                self.close(at, code, &text, false, out);
                return;
            }
        };
        let peer = &mut self.peers[at];
        peer.wire_version = agreed.version;
        let incarnation_before = peer.their_incarnation;
        peer.their_incarnation = hello.facts.incarnation;
        peer.their_state = Some(hello.facts.state);
        // Its disk was replaced, or is in use again.
        peer.diskless &= hello.facts.state == CopyState::Failed;
        peer.their_mode = hello.facts.mode;
        peer.their_disk = hello.facts.disk;
        peer.their_attach_counter = hello.facts.attach_counter;
        peer.their_in_sync = (hello.facts.in_sync, hello.facts.in_sync_version);
        peer.their_generations = hello.facts.generations.clone();
        peer.their_generations_cut = hello.facts.generations_cut;
        peer.grows = hello.facts.volumes.iter().all(|v| v.room != 0);
        if let Relation::Greeting { theirs, .. } = &mut peer.relation {
            *theirs = Some(hello);
        }
        self.diskless_meets(at, incarnation_before, out);
        self.decide_if_met(at, out);
    }

    /// Both sides' facts are there, and the cluster's record if there is one.
    pub(crate) fn decide_if_met(&mut self, at: usize, out: &mut Actions) {
        let Relation::Greeting {
            sent: Some(mine),
            theirs: Some(theirs),
        } = self.peers[at].relation.clone()
        else {
            return;
        };
        if self.facts_changed(at, &mine) {
            return self.meet_again(at, "our own facts changed during the greeting", out);
        }
        let slot = self.peers[at].slot;
        let theirs = theirs.facts;
        match self.sizes_meet(&mine, &theirs, out) {
            SizesMeet::Go => {}
            SizesMeet::Grows => {
                return self.meet_again(at, "this copy takes the size of the other's volume", out);
            }
            SizesMeet::Waits => {
                self.peers[at].last_error =
                    format!("copy {} takes the size of this copy's volume", slot.0);
                self.peers[at].relation = Relation::Waiting { since: self.now };
                return;
            }
        }
        let mut record = None;
        if self.store.is_cluster() {
            match self.peers[at].met_record.clone() {
                None => return self.store_meets(at, out),
                Some(known) => record = known,
            }
        }
        let decision = handshake::decide(&mine, &theirs, record.as_ref());
        if self.store.is_cluster()
            && !(mine.follows_third || theirs.follows_third)
            && let Some(why) = waits_for_primary(&mine, &theirs, record.is_some(), &decision)
        {
            self.peers[at].last_error = why.into();
            self.notice(Level::Info, "waiting", Some(slot), why.into(), out);
            self.peers[at].relation = Relation::Waiting { since: self.now };
            return;
        }
        self.peers[at].row = Some(decision.row);
        self.peers[at].met = Some(self.now);
        self.peers[at].handshake =
            handshake::explain(&decision, &|slot| format!("copy {}", slot.0));
        self.notice(
            Level::Info,
            "handshake",
            Some(slot),
            self.peers[at].handshake.replace('\n', " "),
            out,
        );
        self.adopt_facts(&mine, &theirs, out);
        if self.peers[at].session.is_none() {
            return;
        }
        self.carry_out(at, &mine, &theirs, decision, out);
    }

    /// Whether what was told is no longer true in a way that decides.
    fn facts_changed(&self, at: usize, told: &Facts) -> bool {
        let now = self.facts(at);
        now.epoch != told.epoch
            || now.state != told.state
            || now.is_primary != told.is_primary
            || now.generations != told.generations
            || now.in_sync != told.in_sync
            || now.in_sync_pending != told.in_sync_pending
            || now.follows_third != told.follows_third
            || now
                .volumes
                .iter()
                .zip(&told.volumes)
                .any(|(now, told)| now.size != told.size)
            || (now.about_peer.bits > 0) != (told.about_peer.bits > 0)
    }

    pub(crate) fn meet_again(&mut self, at: usize, why: &str, out: &mut Actions) {
        self.close(at, GoodbyeCode::Again, why, true, out);
    }

    /// A newer epoch than ours ends our right to write, whatever else this meeting comes to.
    fn adopt_facts(&mut self, mine: &Facts, theirs: &Facts, out: &mut Actions) {
        if theirs.epoch.number > mine.epoch.number {
            // D11, C1: a newer epoch ends every older right to write.
            self.sb.epoch_gate = theirs.epoch;
            let from_owner = theirs.epoch.owner == theirs.slot.0 || planted!("third-party-epoch");
            let still_in_s = from_owner && theirs.in_sync.contains(self.slot);
            if !still_in_s && !planted!("superseded-stays") {
                // C1: its S went on without this copy, or may have: a copy that is not the owner raised its gate
                // before it hears what the owner's S became, and the owner did not ask this one. That must be
                // durable together with the epoch: an owner that is not this copy is what allows an unforced
                // promotion under `suspend`.
                self.sb.in_sync = self.sb.in_sync.without(self.slot);
                self.sb.in_sync_pending = self.sb.in_sync;
                self.sb.flags.solo = false;
            }
            self.commit(Then::Nothing, out);
            if matches!(self.role, Role::Primary | Role::Promoting) {
                let text = format!(
                    "copy {} knows epoch {} of copy {}, newer than {}: this copy stops being primary",
                    theirs.slot.0, theirs.epoch.number, theirs.epoch.owner, mine.epoch.number
                );
                self.notice(Level::Error, "superseded", Some(theirs.slot), text, out);
                self.stop_being_primary(out);
            }
        }
    }

    /// Two copies that both follow a third, live primary leave each other alone. If one of them does, both wait: the
    /// other gets what it lacks from that primary, and what they would decide is over with its next write.
    pub(crate) fn third_primary(&self, mine: &Facts, theirs: &Facts) -> Third {
        // D14: who hears of a newer epoch here is no primary any more, for both sides alike. With a register the record says who is.
        let stays = |a: &Facts, b: &Facts| {
            a.is_primary
                && (a.epoch.number >= b.epoch.number || planted!("superseded-takes-followers"))
        };
        let primary = if self.store.is_cluster() {
            theirs.is_primary || self.is_primary_like()
        } else {
            stays(theirs, mine) || stays(mine, theirs)
        };
        match (mine.follows_third, theirs.follows_third) {
            _ if primary => Third::No,
            (false, false) => Third::No,
            (true, true) => Third::LeadsBoth,
            (true, false) => Third::LeadsOne(mine.slot),
            (false, true) => Third::LeadsOne(theirs.slot),
        }
    }

    fn carry_out(
        &mut self,
        at: usize,
        mine: &Facts,
        theirs: &Facts,
        decision: Decision,
        out: &mut Actions,
    ) {
        let slot = self.peers[at].slot;
        let target = match &decision.outcome {
            Outcome::Copy(plan) => Some(plan.target),
            _ => None,
        };
        // A target stops being primary: who is to fill it does not follow it.
        self.peers[at].is_primary =
            theirs.is_primary && theirs.epoch.number >= mine.epoch.number && target != Some(slot);
        let follows = target == Some(self.slot)
            || (decision.outcome == Outcome::Nothing && !self.is_primary_like());
        if self.peers[at].is_primary && follows && self.sb.epoch_gate != theirs.epoch {
            // Both took the same number, and only that copy was promoted in it: its frames are the ones to take.
            self.sb.epoch_gate = theirs.epoch;
        }
        let third = self.third_primary(mine, theirs);
        if let Third::LeadsOne(_) = third {
            let why = third.words();
            self.peers[at].last_error = why.clone();
            self.notice(Level::Info, "waiting", Some(slot), why, out);
            self.peers[at].relation = Relation::Waiting { since: self.now };
            return;
        }
        if third == Third::LeadsBoth {
            self.peers[at].relation = Relation::Agreeing;
            self.send_body(at, FrameKind::Ready, Body::Empty, out);
            if self.peers[at].ready_received {
                self.agreed(at, out);
            }
            return;
        }
        match decision.outcome {
            Outcome::Nothing => {
                self.peers[at].relation = Relation::Agreeing;
                let mut header = self.header(FrameKind::Ready);
                header.position = self.issued;
                self.send(at, header, Payload::None, out);
                if self.peers[at].ready_received {
                    self.agreed(at, out);
                }
            }
            Outcome::Copy(plan) => {
                if plan.target == self.slot {
                    self.become_target(at, theirs, &plan, out);
                } else if plan.source == self.slot {
                    self.become_source(at, plan.how, out);
                }
            }
            Outcome::Diskless { failed, server }
                if (failed == self.slot && self.diskless_holds())
                    || (server == self.slot && theirs.is_primary && !self.is_primary_like()) =>
            {
                // D13: the primary whose disk failed goes on through the server's.
                self.peers[at].diskless = server == self.slot && !self.sb.in_sync.contains(slot);
                self.peers[at].relation = Relation::Agreeing;
                let mut header = self.header(FrameKind::Ready);
                header.position = self.issued;
                self.send(at, header, Payload::None, out);
                if self.peers[at].ready_received {
                    self.agreed(at, out);
                }
            }
            Outcome::SplitBrain { .. } => {
                self.notice(
                    Level::Error,
                    "split-brain",
                    Some(slot),
                    decision.why.clone(),
                    out,
                );
                self.close(at, GoodbyeCode::SplitBrain, &decision.why, false, out);
            }
            // A third copy, or a person who promotes one of two blank ones by force, changes what is decided: until
            // then they meet again.
            Outcome::WaitForThird
            | Outcome::AskPerson {
                question: handshake::Question::PickFirst { .. },
            } => {
                self.peers[at].last_error = decision.why.clone();
                self.notice(
                    Level::Warning,
                    "waiting",
                    Some(slot),
                    decision.why.clone(),
                    out,
                );
                self.peers[at].relation = Relation::Waiting { since: self.now };
            }
            _ => {
                self.notice(
                    Level::Error,
                    "refused",
                    Some(slot),
                    decision.why.clone(),
                    out,
                );
                self.close(at, GoodbyeCode::Refused, &decision.why, false, out);
            }
        }
    }

    pub(crate) fn is_primary_like(&self) -> bool {
        matches!(self.role, Role::Primary | Role::Promoting | Role::Demoting)
    }

    fn follows_third(&self, at: usize) -> bool {
        self.peers.iter().enumerate().any(|(other, p)| {
            other != at
                && p.is_primary
                && matches!(p.relation, Relation::Target | Relation::Established)
        })
    }

    // --- nothing to copy ---

    fn agreed(&mut self, at: usize, out: &mut Actions) {
        let slot = self.peers[at].slot;
        if self.failed || self.peers[at].their_state == Some(CopyState::Failed) {
            return self.diskless_agreed(at, out);
        }
        let follows_third = self.follows_third(at);
        let marked = self.peers[at].dirty_bits() > 0 && !planted!("marks-forgotten-at-agreement");
        if marked && !follows_third {
            return self.meet_again(at, "writes came during the greeting", out);
        }
        if self.is_primary_like() && self.peers[at].told_generation != self.generation() {
            return self.meet_again(at, "a generation began during the greeting", out);
        }
        self.peers[at].relation = Relation::Established;
        self.peers[at].filled = false;
        self.remember_identity(at);
        if self.sb.state == CopyState::Blank && self.sb.flags.zeroed && !follows_third {
            // Row 3: both read zero everywhere since one create.
            self.sb.state = CopyState::UpToDate;
            self.peers[at].their_state = Some(CopyState::UpToDate);
        }
        if self.peers[at].is_primary {
            // Its count of positions is ours from here on; both are at the same place.
            let relative = self.issued.saturating_sub(self.sb.generation_base);
            self.issued = self.peers[at].ready_position;
            self.sb.generation_base = self.issued.saturating_sub(relative);
            self.local_flushed = self.issued;
        }
        self.peers[at].flushed = self.issued;
        if !follows_third {
            let (record, generation) = (self.peers[at].record, self.generation());
            self.sb.peers[record].bitmap_base = generation;
            self.sb.peers[record].full_copy = false;
        }
        self.commit(Then::Nothing, out);
        self.notice(
            Level::Info,
            "established",
            Some(slot),
            "both copies agree".into(),
            out,
        );
        if follows_third {
            return;
        }
        if !marked {
            // A flush alone leaves no mark; what was not flushed there would have.
            self.bits_were_copied(slot);
        }
        if self.leads(at) {
            let known = (self.sb.in_sync, self.sb.in_sync_version);
            if self.role == Role::Primary && self.peers[at].their_in_sync != known {
                // Before any write: what it marks toward third copies goes by it (D7).
                self.send_in_sync(at, out);
            }
            if self.peers[at].mode != Mode::Async && !self.sb.in_sync.contains(slot) {
                if self.may_admit(slot) {
                    self.begin_join(at, out);
                }
            } else if self.peers[at].their_state != Some(CopyState::UpToDate) {
                self.tell_in_sync(at, out);
            }
        }
        self.check_all(out);
    }

    /// Which of two connected copies keeps S: the primary, else the owner of the epoch, else the lower slot.
    pub(crate) fn leads(&self, at: usize) -> bool {
        if self.is_primary_like() {
            return true;
        }
        let peer = &self.peers[at];
        if peer.is_primary {
            return false;
        }
        let owner = self.sb.epoch_gate.owner;
        if owner == self.slot.0 || owner == peer.slot.0 {
            return owner == self.slot.0;
        }
        self.slot < peer.slot
    }

    pub(crate) fn ready(
        &mut self,
        at: usize,
        session: SessionId,
        position: Position,
        out: &mut Actions,
    ) {
        self.peers[at].ready_received = true;
        self.peers[at].ready_position = position;
        match self.peers[at].relation {
            Relation::Agreeing => self.agreed(at, out),
            Relation::SourceWaiting => self.source_ready(at, session, out),
            // The other side decided before us; kept until we did.
            Relation::Greeting { .. } => {}
            // Its other source is a live primary, and it leaves us alone: we meet again.
            Relation::Waiting { .. } => {}
            _ => {
                self.bad_frame(at, "Ready out of turn", out);
            }
        }
    }
}

/// Whether a primary that is none of the two that meet leads them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Third {
    No,
    LeadsOne(Slot),
    LeadsBoth,
}

impl Third {
    pub(crate) fn words(self) -> String {
        match self {
            Third::No => "no third copy is primary".into(),
            Third::LeadsOne(follower) => format!(
                "copy {} follows a primary that is connected to it alone",
                follower.0
            ),
            Third::LeadsBoth => "both follow a primary that is connected to both".into(),
        }
    }
}

/// Where the record says who is promoted, copies are filled by a primary alone: which of two followers should be the other's source
/// depends on who is promoted next, and a member of S that was being filled could not be. Without the record only what follows from a
/// live primary is carried out.
pub(crate) fn waits_for_primary(
    mine: &Facts,
    theirs: &Facts,
    record_read: bool,
    decision: &Decision,
) -> Option<&'static str> {
    let primary = [mine, theirs].into_iter().find(|f| f.is_primary);
    let by_primary = match (&decision.outcome, primary) {
        (Outcome::Refuse { .. }, _) => true,
        (Outcome::Nothing, Some(_)) => true,
        (Outcome::Nothing, None) => record_read,
        (Outcome::Copy(plan), Some(primary)) => plan.source == primary.slot,
        (_, Some(_)) => record_read,
        (_, None) => false,
    };
    if by_primary {
        return None;
    }
    Some(match primary {
        None => "neither copy is primary: one fills the other once somebody is promoted",
        Some(_) => "the cluster store cannot be reached, and what is to be done depends on it",
    })
}
