//! The record that says, for all copies alike, who owns the epoch and who is in S: changed here and nowhere else. `docs/cluster-store.md` has
//! the states of a change.

use crate::api::*;
use crate::handshake::{StoreCopy, StoreRecord};
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use std::collections::VecDeque;

/// How long a read or a swap without a known outcome rests before it is tried again, in ms.
const AGAIN_MS: u64 = 200;

/// A change of the record, and with it what happens once it is committed.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// This attachment of this disk.
    Attached,
    /// This copy owns the next epoch.
    Epoch(Epoch),
    /// What a promotion leaves in S, in its generation.
    Promoted,
    /// Copies that are lost leave S.
    Dropped,
    /// A copy that became a target leaves S.
    Target { peer: usize, session: SessionId },
    /// A copy that holds everything joins S.
    Joined { peer: usize, session: SessionId },
    /// A copy became asynchronous.
    Mode {
        slot: Slot,
        admin: AdminId,
        text: String,
    },
    /// The primary has no disk, and goes on through this copy.
    DiskLost { peer: usize, session: SessionId },
}

/// Why the record was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ReadFor {
    Attach,
    Meeting {
        peer: usize,
        session: SessionId,
    },
    Promotion,
    /// A change that waits knows more than the record did.
    Change,
}

#[derive(Debug)]
struct Swap {
    id: StoreId,
    change: Change,
    expected: StoreVersion,
    record: StoreRecord,
    /// Its outcome is not known: when it is tried again.
    again: Option<Time>,
}

#[derive(Debug)]
pub(crate) struct ClusterStore {
    kind: StoreKind,
    /// The newest record that is known to be committed.
    record: Option<StoreRecord>,
    waiting: VecDeque<Change>,
    in_flight: Option<Swap>,
    reads: Vec<(StoreId, ReadFor)>,
    next: u64,
    /// The record has this attachment, or can't have it: this copy may meet others.
    attached: bool,
    /// This process told the record of its attachment, whether or not it arrived.
    attach_tried: bool,
    /// The disk is not the one the record counts on, and nobody else is in S.
    stranger: bool,
    /// When the record is asked for again that was not to be had.
    again: Option<Time>,
    /// The record as read for the promotion that is wanted.
    fresh: Option<StoreRecord>,
    /// An epoch of this copy that is committed and not used yet.
    granted: Option<Epoch>,
}

impl ClusterStore {
    pub fn new(kind: StoreKind) -> ClusterStore {
        ClusterStore {
            kind,
            record: None,
            waiting: VecDeque::new(),
            in_flight: None,
            reads: Vec::new(),
            next: 1,
            attached: kind == StoreKind::Own,
            attach_tried: false,
            stranger: false,
            again: None,
            fresh: None,
            granted: None,
        }
    }

    pub fn is_cluster(&self) -> bool {
        self.kind == StoreKind::Cluster
    }

    /// Nobody is met before the record knows of this attachment.
    pub fn may_meet(&self) -> bool {
        self.attached
    }

    /// A change is wanted that is not committed.
    pub fn busy(&self) -> bool {
        self.in_flight.is_some() || !self.waiting.is_empty()
    }

    /// The outcome of a change is not known, and was asked for.
    pub fn unknown(&self) -> bool {
        self.in_flight
            .as_ref()
            .is_some_and(|swap| swap.again.is_some())
    }

    /// Copies that are in S if the change in flight turns out to be committed (D18).
    pub fn possibly(&self) -> SlotSet {
        self.in_flight
            .as_ref()
            .map_or(SlotSet::EMPTY, |swap| swap.record.in_sync)
    }

    pub fn needs_time(&self) -> bool {
        self.again.is_some() || self.unknown()
    }

    /// The newest record that is known to be committed.
    pub fn known(&self) -> Option<&StoreRecord> {
        self.record.as_ref()
    }

    /// The record does not count on this disk: only a person promotes it.
    pub fn stranger(&self) -> bool {
        self.stranger
    }

    pub fn take_granted(&mut self) -> Option<Epoch> {
        self.granted.take()
    }

    /// Nobody wants the promotion any more that an epoch was asked for.
    pub fn forget_promotion(&mut self) {
        self.fresh = None;
        self.granted = None;
        self.waiting.retain(|c| !matches!(c, Change::Epoch(_)));
    }

    fn id(&mut self) -> StoreId {
        let id = StoreId(self.next);
        self.next += 1;
        id
    }
}

/// What a change that is the next one comes to.
enum Next {
    /// What it promises is not durable yet.
    Wait,
    /// The record known here is older than what was heard from a peer: it is read again first.
    Stale,
    /// Nobody wants it any more.
    Gone,
    /// The record says it already.
    Committed,
    Swap(StoreRecord),
}

impl Core {
    /// Makes a change of the record. What follows from it is done once it is committed: `committed`.
    pub(crate) fn propose(&mut self, change: Change, out: &mut Actions) {
        if !self.store.is_cluster() {
            return self.committed(change, out);
        }
        self.store.waiting.push_back(change);
        self.store_progress(out);
    }

    /// Goes on with the first change that waits, and with what has no known outcome, when it is time.
    pub(crate) fn store_progress(&mut self, out: &mut Actions) {
        if !self.store.is_cluster() || self.role == Role::Detached {
            return;
        }
        let now = self.now;
        if let Some(swap) = &mut self.store.in_flight {
            if swap.again.is_some_and(|at| now >= at) {
                // The same swap: one version is given once, so whichever of the two applies, it is this change.
                swap.again = None;
                let (id, expected, record) = (swap.id, swap.expected, swap.record.clone());
                out.push(Action::StoreSwap {
                    id,
                    expected,
                    record,
                });
            }
            return;
        }
        if self.store.again.is_some_and(|at| now >= at) {
            self.store.again = None;
            if !self.store.attached {
                self.store_read(ReadFor::Attach, out);
            }
        }
        while let Some(change) = self.store.waiting.pop_front() {
            let Some(base) = self.store.record.clone() else {
                return self.store.waiting.push_front(change);
            };
            match self.next_record(&change, &base) {
                Next::Wait => return self.store.waiting.push_front(change),
                Next::Stale => {
                    self.store.waiting.push_front(change);
                    if self.store.again.is_none() {
                        self.store.again = Some(now.after_ms(AGAIN_MS));
                        self.store_read(ReadFor::Change, out);
                    }
                    return;
                }
                Next::Gone => self.change_gone(&change, out),
                Next::Committed => self.committed(change, out),
                Next::Swap(record) => {
                    assert!(!record.in_sync.is_empty(), "S is never empty");
                    let id = self.store.id();
                    let expected = StoreVersion {
                        epoch: base.epoch,
                        version: base.version,
                    };
                    self.store.attach_tried |= matches!(change, Change::Attached);
                    // D18: from here on either may be what counts.
                    self.store.in_flight = Some(Swap {
                        id,
                        change,
                        expected,
                        record: record.clone(),
                        again: None,
                    });
                    self.sb.in_sync_pending = self.with_joining(self.sb.in_sync);
                    out.push(Action::StoreSwap {
                        id,
                        expected,
                        record,
                    });
                    return;
                }
            }
            if self.store.in_flight.is_some() {
                return;
            }
        }
    }

    fn next_record(&self, change: &Change, base: &StoreRecord) -> Next {
        let mut record = StoreRecord {
            version: base.version + 1,
            ..base.clone()
        };
        let owner = self.is_primary_like() && base.epoch == self.sb.epoch_gate;
        // D10, and "a generation is in the record only when all members hold it durably".
        let told = !self.generation_committing && self.generation_unknown_to.is_empty();
        match change {
            Change::Attached => {
                let tried = self.store.attach_tried && base.copies.contains(&self.store_copy());
                let (other, in_sync) = self.in_sync_after_attach(base);
                if tried || (other && in_sync.is_empty()) {
                    return Next::Committed;
                }
                // S is never empty: who is alone in it has what there is.
                if !in_sync.is_empty() {
                    record.in_sync = in_sync;
                }
                self.name_disk(&mut record);
            }
            Change::Epoch(epoch) => {
                if base.epoch == *epoch {
                    return Next::Committed;
                }
                if self.promotion_wanted.is_none()
                    || base.epoch.number >= epoch.number
                    || self.store.fresh.as_ref() != Some(base)
                {
                    // What allowed it was another record.
                    return Next::Gone;
                }
                record.epoch = *epoch;
            }
            Change::Promoted => {
                let Some(promotion) = self.promotion.as_ref().filter(|_| owner) else {
                    return Next::Gone;
                };
                let asynchronous = |slot: Slot| {
                    self.peers
                        .iter()
                        .any(|p| p.slot == slot && p.mode == Mode::Async)
                };
                let mut in_sync = SlotSet::only(self.slot);
                for slot in base.in_sync.iter() {
                    if promotion.agreed.contains(slot)
                        && !asynchronous(slot)
                        && self.follows(slot, base)
                    {
                        in_sync = in_sync.with(slot);
                    }
                }
                if !told {
                    return Next::Wait;
                }
                record.in_sync = in_sync;
                record.generation = self.generation();
                self.name_disk(&mut record);
                let same = base.in_sync == in_sync && base.generation == record.generation;
                if same && base.copies == record.copies {
                    return Next::Committed;
                }
            }
            Change::Dropped => {
                if !owner || !self.dropping {
                    return Next::Gone;
                }
                let missing = self.missing_members();
                if missing.is_empty() {
                    return Next::Gone;
                }
                if !told {
                    return Next::Wait;
                }
                for slot in missing.iter() {
                    record.in_sync = record.in_sync.without(slot);
                }
                record.in_sync = record.in_sync.with(self.slot);
                if record.in_sync == base.in_sync {
                    return Next::Committed;
                }
                record.generation = self.generation();
            }
            Change::Target { peer, session } => {
                let slot = self.peers[*peer].slot;
                if !owner || !self.peers[*peer].on(*session) {
                    return Next::Gone;
                }
                if !base.in_sync.contains(slot) {
                    return Next::Committed;
                }
                if !told {
                    return Next::Wait;
                }
                record.in_sync = record.in_sync.without(slot).with(self.slot);
                record.generation = self.generation();
            }
            Change::Joined { peer, session } => {
                let slot = self.peers[*peer].slot;
                let joining = matches!(
                    self.peers[*peer].relation,
                    Relation::Joining {
                        committing: true,
                        ..
                    }
                );
                if base.in_sync.contains(slot) {
                    return Next::Committed;
                }
                let there = joining && self.peers[*peer].on(*session);
                if !owner || !there {
                    return Next::Gone;
                }
                if !self.follows(slot, base) {
                    return Next::Stale;
                }
                if !told {
                    return Next::Wait;
                }
                record.in_sync = record.in_sync.with(slot).with(self.slot);
                record.generation = self.generation();
            }
            Change::Mode { slot, .. } => {
                if !owner || !base.in_sync.contains(*slot) {
                    return Next::Committed;
                }
                record.in_sync = record.in_sync.without(*slot).with(self.slot);
            }
            Change::DiskLost { peer, session } => {
                if !owner || !self.peers[*peer].on(*session) {
                    return Next::Gone;
                }
                record.in_sync = SlotSet::only(self.peers[*peer].slot);
                record.generation = self.generation();
                if record.in_sync == base.in_sync && record.generation == base.generation {
                    return Next::Committed;
                }
            }
        }
        Next::Swap(record)
    }

    /// That copy takes every write from here on, in the attachment that the record knows: not in one that ended meanwhile (D2).
    fn follows(&self, slot: Slot, base: &StoreRecord) -> bool {
        self.peers.iter().any(|p| {
            p.slot == slot
                && matches!(p.relation, Relation::Established | Relation::Joining { .. })
                && base.copies.iter().any(|copy| {
                    copy.slot == slot
                        && copy.disk == p.their_disk
                        && copy.attach_counter == p.their_attach_counter
                })
        })
    }

    fn store_copy(&self) -> StoreCopy {
        StoreCopy {
            slot: self.slot,
            disk: self.sb.disk,
            attach_counter: self.sb.attach_counter,
        }
    }

    fn name_disk(&self, record: &mut StoreRecord) {
        record.copies.retain(|copy| copy.slot != self.slot);
        record.copies.push(self.store_copy());
        record.copies.sort_by_key(|copy| copy.slot);
    }

    /// Whether this is another disk than the record counts on, or an old image of it; and what this attachment leaves of S.
    fn in_sync_after_attach(&self, base: &StoreRecord) -> (bool, SlotSet) {
        let known = base.copies.iter().find(|copy| copy.slot == self.slot);
        let mine = self.store_copy();
        let other = known.is_some_and(|known| {
            known.disk != mine.disk
                || known.attach_counter > mine.attach_counter
                // An image of it from before, attached once more. Not, if it was this process that told the record.
                || (known.attach_counter == mine.attach_counter && !self.store.attach_tried)
        });
        // What it had acknowledged was in its memory alone. The owner's flushes were durable at the owner.
        let forgot =
            self.unclean_start && base.epoch.owner != self.slot.0 && self.had_memory_counted();
        let in_sync = if other || forgot {
            base.in_sync.without(self.slot)
        } else {
            base.in_sync
        };
        (other, in_sync)
    }

    /// A change that nobody wants any more, or that another copy's came before.
    fn change_gone(&mut self, change: &Change, out: &mut Actions) {
        self.sb.in_sync_pending = self.with_joining(self.sb.in_sync);
        match change {
            Change::Dropped => {
                self.dropping = false;
                self.check_all(out);
            }
            Change::Epoch(_) => {
                self.store.fresh = None;
                self.try_promotion(out);
            }
            Change::Joined { .. } => self.check_all(out),
            _ => {}
        }
    }

    /// The change is committed: what follows from it.
    fn committed(&mut self, change: Change, out: &mut Actions) {
        match change {
            Change::Attached => {
                self.store.attached = true;
                let record = self.store.record.as_ref();
                self.store.stranger = record.is_some_and(|record| {
                    let (other, in_sync) = self.in_sync_after_attach(record);
                    other && in_sync.is_empty()
                });
                if self.store.stranger {
                    let text = "the record of the cluster knows another disk, or a later attachment of it, in this slot, and no other \
                                copy is in sync. The record stays as it is; only a person promotes this copy (with --force)";
                    self.notice(Level::Error, "not-the-member", None, text.into(), out);
                }
                self.attached_and_known(out);
            }
            Change::Epoch(epoch) => {
                self.store.granted = Some(epoch);
                self.try_promotion(out);
            }
            Change::Promoted => {
                self.in_sync_of_record();
                self.promotion_recorded(out);
            }
            Change::Dropped => self.members_left(out),
            Change::Target { peer, session } => self.target_left(peer, session, out),
            Change::Joined { peer, session } => self.member_joined(peer, session, out),
            Change::Mode { slot, admin, text } => {
                self.sb.in_sync = self.sb.in_sync.without(slot);
                self.next_in_sync_version();
                self.sb.in_sync_pending = self.with_joining(self.sb.in_sync).without(slot);
                self.commit(Then::Admin { admin, text }, out);
            }
            Change::DiskLost { peer, session } => self.server_recorded(peer, session, out),
        }
    }

    // --- the register ---

    fn store_read(&mut self, why: ReadFor, out: &mut Actions) {
        if self.store.reads.iter().any(|(_, other)| *other == why) {
            return;
        }
        let id = self.store.id();
        self.store.reads.push((id, why));
        out.push(Action::StoreRead { id });
    }

    /// The attach counter is durable here: now the record's.
    pub(crate) fn store_attach(&mut self, out: &mut Actions) {
        if !self.store.is_cluster() {
            return self.committed(Change::Attached, out);
        }
        self.store_read(ReadFor::Attach, out);
    }

    /// Both sides' facts are there: the record is read, and `decide_if_met` called again.
    pub(crate) fn store_meets(&mut self, at: usize, out: &mut Actions) {
        if let Some(session) = self.peers[at].session {
            self.store_read(ReadFor::Meeting { peer: at, session }, out);
        }
    }

    /// The record by which a promotion is decided, once it is there.
    pub(crate) fn store_for_promotion(&mut self, out: &mut Actions) -> Option<StoreRecord> {
        let asked = self
            .store
            .in_flight
            .iter()
            .map(|swap| &swap.change)
            .chain(&self.store.waiting)
            .any(|change| matches!(change, Change::Epoch(_)));
        if asked || !self.store.attached {
            return None;
        }
        let owned = self.store.record.as_ref().map(|record| record.epoch);
        self.store.granted = self.store.granted.filter(|epoch| Some(*epoch) == owned);
        if self.store.granted.is_some() {
            return self.store.record.clone();
        }
        if self.store.fresh.is_none() && self.store.again.is_none() {
            self.store_read(ReadFor::Promotion, out);
        }
        self.store.fresh.clone()
    }

    /// The epoch is to be taken: true if it is this copy's already.
    pub(crate) fn epoch_granted(&mut self, record: &StoreRecord, out: &mut Actions) -> bool {
        if self.store.granted.is_some() {
            return true;
        }
        let epoch = Epoch {
            number: record.epoch.number.max(self.sb.epoch_gate.number) + 1,
            owner: self.slot.0,
        };
        self.propose(Change::Epoch(epoch), out);
        false
    }

    pub(crate) fn store_record(
        &mut self,
        id: StoreId,
        record: Option<StoreRecord>,
        out: &mut Actions,
    ) {
        let Some(at) = self.store.reads.iter().position(|(read, _)| *read == id) else {
            return self.halt(
                out,
                "the cluster store answered a read that nobody asked for",
            );
        };
        let (_, why) = self.store.reads.swap_remove(at);
        if let Some(record) = &record {
            self.adopt_record(record.clone(), out);
        } else {
            self.store.again = Some(self.now.after_ms(AGAIN_MS));
        }
        match (why, record) {
            (ReadFor::Attach, Some(_)) if !self.store.attached => {
                self.propose(Change::Attached, out);
            }
            (ReadFor::Meeting { peer, session }, record) if self.peers[peer].on(session) => {
                self.peers[peer].met_record = Some(record);
                self.decide_if_met(peer, out);
            }
            (ReadFor::Promotion, Some(record)) => {
                self.store.fresh = Some(record);
                self.try_promotion(out);
            }
            _ => {}
        }
        self.store_progress(out);
    }

    pub(crate) fn store_swapped(&mut self, id: StoreId, outcome: SwapOutcome, out: &mut Actions) {
        let now = self.now;
        let Some(swap) = &mut self.store.in_flight else {
            return;
        };
        if swap.id != id {
            // An earlier try of a change that is settled.
            return;
        }
        match outcome {
            SwapOutcome::Unknown => {
                // D18: neither committed nor not.
                swap.again = Some(now.after_ms(AGAIN_MS));
            }
            SwapOutcome::Swapped => {
                let Some(swap) = self.store.in_flight.take() else {
                    return;
                };
                self.adopt_record(swap.record, out);
                self.committed(swap.change, out);
            }
            SwapOutcome::Refused(record) => {
                let Some(swap) = self.store.in_flight.take() else {
                    return;
                };
                // If an earlier try of it was applied the record says so, and `next_record` sees it.
                self.store.waiting.push_front(swap.change);
                self.adopt_record(record, out);
            }
        }
        self.store_progress(out);
    }

    /// A committed record is known. A newer epoch of another copy ends every older right to write (C1).
    fn adopt_record(&mut self, record: StoreRecord, out: &mut Actions) {
        let old = self.store.record.as_ref();
        if old.is_some_and(|known| known.version > record.version) {
            return;
        }
        let epoch = record.epoch;
        self.store.record = Some(record);
        // A follower hears of S from its primary, in the order of the writes: what it marks toward copies outside S goes by that (D7).
        // For the same reason a primary goes by its own changes alone: a copy that took itself out is lost first, as any other.
        let follows = self
            .peers
            .iter()
            .any(|p| p.is_primary && p.session.is_some());
        if !follows && !self.is_primary_like() {
            self.in_sync_of_record();
        }
        // Its own epoch a copy takes in the order of a promotion: its gate before it asks.
        if epoch.number > self.sb.epoch_gate.number && epoch.owner != self.slot.0 {
            self.sb.epoch_gate = epoch;
            self.commit(Then::Nothing, out);
            if self.is_primary_like() {
                let text = format!(
                    "the cluster's record names copy {} as owner of epoch {}: this copy stops being primary",
                    epoch.owner, epoch.number
                );
                self.notice(
                    Level::Error,
                    "superseded",
                    Some(Slot(epoch.owner)),
                    text,
                    out,
                );
                self.stop_being_primary(out);
                // Who followed this copy meets it as what it is now.
                for at in 0..self.peers.len() {
                    if self.peers[at].session.is_some() {
                        self.meet_again(at, "another copy owns a newer epoch", out);
                    }
                }
            }
        }
    }

    /// S of this copy was changed, as the record was.
    pub(crate) fn next_in_sync_version(&mut self) {
        self.sb.in_sync_version = match &self.store.record {
            Some(record) => record.version,
            None => self.sb.in_sync_version + 1,
        };
    }

    /// Members as this copy has them that the record has no more.
    pub(crate) fn left_by_record(&self) -> SlotSet {
        let Some(record) = &self.store.record else {
            return SlotSet::EMPTY;
        };
        self.sb
            .in_sync
            .iter()
            .filter(|slot| !record.in_sync.contains(*slot))
            .fold(SlotSet::EMPTY, |set, slot| set.with(slot))
    }

    /// S is what the record says.
    pub(crate) fn in_sync_of_record(&mut self) {
        let Some(record) = &self.store.record else {
            return;
        };
        self.sb.in_sync = record.in_sync;
        self.sb.in_sync_version = record.version;
        self.sb.flags.solo = self.is_primary_like() && record.in_sync == SlotSet::only(self.slot);
        self.sb.in_sync_pending = self.with_joining(self.sb.in_sync);
    }
}
