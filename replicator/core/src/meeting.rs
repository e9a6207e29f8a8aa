//! Two copies meet: facts are exchanged, [`handshake::decide`](crate::handshake::decide) says what follows,
//! and both sides carry it out until they stand `Established`.

use crate::api::*;
use crate::bitmap::PageContent;
use crate::cluster_store::Change;
use crate::growth::SizesMeet;
use crate::handshake::{self, CopyPlan, Decision, How, Outcome};
use crate::peer::*;
use crate::service::*;
use crate::undoing::TargetPlan;
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

    pub(crate) fn hello(
        &mut self,
        at: usize,
        session: SessionId,
        hello: Box<Hello>,
        out: &mut Actions,
    ) {
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
        let _ = session;
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
        self.peers[at].member_here = match &record {
            Some(record) => record.in_sync.contains(mine.slot),
            None => handshake::in_sync(&mine, &theirs, mine.slot),
        };
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
        self.adopt_facts(at, &mine, &theirs, out);
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
    fn adopt_facts(&mut self, at: usize, mine: &Facts, theirs: &Facts, out: &mut Actions) {
        let _ = at;
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

    // --- the target ---

    /// The meeting is settled: what it was settled with is what the next one compares against.
    fn remember_identity(&mut self, at: usize) {
        let peer = &self.peers[at];
        let known = &mut self.sb.peers[peer.record];
        known.disk = peer.their_disk;
        known.attach_counter = peer.their_attach_counter;
        known.incarnation = peer.their_incarnation;
    }

    fn become_target(&mut self, at: usize, theirs: &Facts, plan: &CopyPlan, out: &mut Actions) {
        let how = plan.how;
        let Some(session) = self.peers[at].session else {
            return;
        };
        // One source at a time: two would mix their blocks. A primary goes before any other.
        for other in 0..self.peers.len() {
            let filling = matches!(
                self.peers[other].relation,
                Relation::Target | Relation::TargetPreparing
            );
            if other == at || !filling {
                continue;
            }
            if !theirs.is_primary || self.peers[other].is_primary {
                self.peers[at].relation = Relation::Waiting { since: self.now };
                return;
            }
            self.meet_again(other, "the primary fills this copy instead", out);
        }
        // A copy that is being filled is nobody's source: what it receives changes blocks that it has sent already.
        for other in 0..self.peers.len() {
            let fills = matches!(
                self.peers[other].relation,
                Relation::SourceWaiting
                    | Relation::SourceStarting
                    | Relation::Source
                    | Relation::Joining { .. }
            );
            if other != at && fills && !planted!("filled-and-filling") {
                self.meet_again(other, "its source is being filled itself", out);
            }
        }
        // Who agreed with it took it for whole, and may be about to serve with it in S (D1, D8). Beside a primary that fills it its other
        // followers may stay, and a primary that was superseded by that one may not: its order of writes ends here (D17).
        for other in 0..self.peers.len() {
            let agreed = matches!(
                self.peers[other].relation,
                Relation::Established | Relation::Agreeing
            );
            let followed = self.peers[other].is_primary && !planted!("superseded-is-followed-on");
            let ends = followed || (!theirs.is_primary && !planted!("agreed-and-filled"));
            if other != at && agreed && ends {
                self.meet_again(other, "this copy is filled by another one now", out);
            }
        }
        if self.is_primary_like() {
            self.stop_being_primary(out);
        }
        // This copy goes on as the source has it.
        if !planted!("kept-beside-a-source") {
            self.drop_kept(out);
        }
        self.peers[at].relation = Relation::TargetPreparing;
        self.peers[at].full_copy = matches!(how, How::Full | How::FullByChecksum);
        if how == How::BitsAndUndo {
            self.undo_blocks_become_bits(at);
        }
        let plan = TargetPlan {
            peer: at,
            session,
            how,
            goal: theirs.generations.last().map_or(GenerationId(0), |g| g.id),
            fresh: self.sb.target_of == GenerationId(0),
            surplus: plan.surplus,
        };
        self.undo_prepare(plan, out);
    }

    /// The way back is durable, as far as there is one (D12): this copy becomes a target.
    pub(crate) fn record_target(&mut self, plan: &TargetPlan, out: &mut Actions) {
        let at = plan.peer;
        self.peers[at].target.goes_on = !plan.fresh;
        self.sb.state = CopyState::Inconsistent;
        self.sb.target_of = plan.goal;
        self.sb.target_source = self.peers[at].slot.0;
        self.sb.in_sync = self.sb.in_sync.without(self.slot);
        self.sb.flags.solo = false;
        // What was unclean is settled by being a target.
        self.unclean_start = false;
        self.was_primary_before = false;
        self.sb.flags.was_primary = false;
        self.remember_identity(at);
        // Recorded before Ready is sent: no data of the source arrives unrecorded.
        let session = plan.session;
        self.commit(Then::TargetRecorded { peer: at, session }, out);
    }

    pub(crate) fn target_recorded(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::TargetPreparing)
        {
            return;
        }
        let now = self.now;
        let slot = self.peers[at].slot;
        self.peers[at].relation = Relation::Target;
        // What comes is counted in the source's order; our own count, of a generation that is given up, may be ahead
        // of it and says nothing there (row 5 would take the source for an old disk). Where a rollback returns to is
        // in `before_resync`.
        self.issued = 0;
        self.local_flushed = 0;
        self.peers[at].target = TargetState {
            started: now,
            goes_on: self.peers[at].target.goes_on,
            ..TargetState::default()
        };
        // Our bits toward the source: what it may lack of ours is what we must take of its (row: "both sides' bits").
        for volume in 0..self.volumes.len() {
            let grain_shift = self.volumes[volume].grain_shift;
            let bitmap = &self.peers[at].bitmaps[volume];
            let pages: Vec<(u64, Vec<u64>)> = bitmap
                .pages_with_bits()
                .filter(|_| !planted!("own-bits-not-told"))
                .map(|page| match bitmap.page(page) {
                    PageContent::Partial(words) => (page, words.to_vec()),
                    _ => (page, Vec::new()),
                })
                .collect();
            for (page, words) in pages {
                let body = Body::Bitmap {
                    volume: VolumeIndex(volume as u16),
                    page,
                    grain_shift,
                    words,
                };
                self.send_body(at, FrameKind::Bitmap, body, out);
            }
        }
        self.send_body(at, FrameKind::BitmapEnd, Body::Empty, out);
        self.send_body(at, FrameKind::Ready, Body::Empty, out);
        self.notice(
            Level::Warning,
            "resync-target",
            Some(slot),
            "receiving what this copy lacks; it cannot be promoted without force until that ends"
                .into(),
            out,
        );
    }

    // --- the source ---

    fn become_source(&mut self, at: usize, how: How, out: &mut Actions) {
        // Greeted before another copy began to fill this one.
        if self
            .peers
            .iter()
            .any(|p| matches!(p.relation, Relation::Target | Relation::TargetPreparing))
        {
            return self.meet_again(at, "its source is being filled itself", out);
        }
        let full = matches!(how, How::Full | How::FullByChecksum);
        self.peers[at].full_copy = full;
        if full && !self.is_primary_like() {
            self.peers[at].stranger = Some(self.sb.in_sync_version);
        }
        let record = self.peers[at].record;
        // Also where a full copy goes on that was cut.
        self.peers[at].compare = how != How::Full && (full || self.sb.peers[record].full_copy);
        if full {
            for bitmap in &mut self.peers[at].bitmaps {
                bitmap.set_all();
            }
            self.sb.peers[record].full_copy = true;
            self.commit(Then::Nothing, out);
        }
        self.peers[at].relation = Relation::SourceWaiting;
        if self.peers[at].ready_received {
            let session = self.peers[at].session.unwrap_or(SessionId(0));
            self.source_ready(at, session, out);
        }
    }

    pub(crate) fn receive_bits(
        &mut self,
        at: usize,
        volume: VolumeIndex,
        page: u64,
        grain_shift: u8,
        words: &[u64],
        out: &mut Actions,
    ) {
        if let Relation::Waiting { .. } = self.peers[at].relation {
            // With a register both read it, at two moments, and may come to different ends.
            return self.meet_again(at, "the other copy decided from another record", out);
        }
        let in_turn = matches!(
            self.peers[at].relation,
            Relation::SourceWaiting | Relation::Greeting { .. }
        );
        let Some(bitmap) = self.peers[at].bitmaps.get_mut(volume.0 as usize) else {
            self.bad_frame(at, "bits of a volume that is not there", out);
            return;
        };
        let content = match <&crate::bitmap::PageWords>::try_from(words) {
            Ok(words) => PageContent::Partial(words),
            Err(_) => PageContent::AllSet,
        };
        if !in_turn || page >= (1 << 40) || !(9..=40).contains(&grain_shift) {
            self.bad_frame(at, "bits out of turn or outside the volume", out);
            return;
        }
        bitmap.or_page(page, content, grain_shift);
    }

    pub(crate) fn bits_complete(&mut self, at: usize, _session: SessionId, _out: &mut Actions) {
        self.peers[at].bits_received = true;
    }

    /// The target recorded that it is one and takes frames from here on.
    fn source_ready(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].bits_received {
            self.bad_frame(at, "Ready before the bits", out);
            return;
        }
        let slot = self.peers[at].slot;
        self.peers[at].relation = Relation::SourceStarting;
        self.remember_identity(at);
        let in_s = self
            .sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .contains(slot);
        if in_s && self.is_primary_like() {
            // The new generation's fork position is a promise: flush first.
            return self.flush_locally(FlushFor::DropTarget { peer: at, session }, out);
        }
        self.drop_target(at, session, out);
    }

    /// S without the copy that became a target.
    pub(crate) fn drop_target(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::SourceStarting)
        {
            return;
        }
        let slot = self.peers[at].slot;
        let in_s = self
            .sb
            .in_sync
            .union(self.sb.in_sync_pending)
            .contains(slot);
        if !in_s || (self.store.is_cluster() && !self.is_primary_like()) {
            return self.commit(Then::SourceRecorded { peer: at, session }, out);
        }
        // It durably knows that it is a target, so it will not be promoted unasked: leaving S is safe.
        self.hold_stable();
        if self.is_primary_like() {
            self.new_generation(GenerationCause::PeerLost);
            self.generation_committing = true;
        }
        if self.store.is_cluster() {
            self.commit(Then::GenerationBegun, out);
        }
        self.propose(Change::Target { peer: at, session }, out);
    }

    /// S without the target is committed.
    pub(crate) fn target_left(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        let slot = self.peers[at].slot;
        self.sb.in_sync = self.sb.in_sync.without(slot);
        self.sb.in_sync_pending = self.sb.in_sync_pending.without(slot);
        self.next_in_sync_version();
        if self.is_primary_like() {
            self.sb.flags.solo = self.sb.in_sync == SlotSet::only(self.slot);
        }
        self.commit(Then::SourceRecorded { peer: at, session }, out);
    }

    pub(crate) fn source_recorded(&mut self, at: usize, session: SessionId, out: &mut Actions) {
        if !self.peers[at].on(session)
            || !matches!(self.peers[at].relation, Relation::SourceStarting)
        {
            return;
        }
        let slot = self.peers[at].slot;
        let total = self.peers[at].dirty_bytes();
        self.peers[at].relation = Relation::Source;
        // Everything issued so far is durable there or has bits.
        self.peers[at].flushed = self.issued;
        self.peers[at].source = SourceState {
            total_bytes: total,
            next_sequence: 1,
            started: self.now,
            ..SourceState::default()
        };
        // What began since our facts were told was announced to those that took frames then.
        if self.is_primary_like() && !self.generation_committing {
            self.tell_generations(at, out);
        }
        self.announce_in_sync(out);
        let text = format!("copying {total} bytes to copy {}", slot.0);
        self.notice(Level::Info, "resync-source", Some(slot), text, out);
        self.check_all(out);
        self.pump_source(at, out);
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
