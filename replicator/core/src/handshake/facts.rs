//! What is read out of the facts of one copy, or of the pair, before any row is tried.

use super::history::{self, chain, current};
use super::{How, Problem, StoreRecord, Surplus};
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Generation, GenerationCause, Mode};

pub(super) const NO_GENERATION: GenerationId = GenerationId(0);

/// What counts as the record of who may write and who holds everything: the store's, or without one the
/// newest that either copy has durably.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Owner of the newest epoch; none if nobody was promoted or two claim the same number.
    pub owner: Option<Slot>,
    /// S as it is written down: slots.
    pub in_sync: SlotSet,
    /// Those of the two whose disk is the one that S was written down with. Another disk in the same slot holds none of
    /// what made the copy a member (C1), even if somebody who is no member filled it since.
    members: SlotSet,
}

impl Record {
    pub fn of(a: &Facts, b: &Facts, store: Option<&StoreRecord>) -> Record {
        if let Some(store) = store {
            // `went_back` compares the disks with the store's.
            return Record {
                owner: owner(store.epoch),
                in_sync: store.in_sync,
                members: store.in_sync,
            };
        }
        let key = |f: &Facts| (f.epoch.number, f.in_sync_version);
        let newest_epoch = a.epoch.number.max(b.epoch.number);
        let owner = if epochs_conflict(a, b) {
            None
        } else if a.epoch.number == newest_epoch {
            owner(a.epoch)
        } else {
            owner(b.epoch)
        };
        let (of_a, of_b) = (by_disk(a, b), by_disk(b, a));
        let (in_sync, members) = match key(a).cmp(&key(b)) {
            std::cmp::Ordering::Greater => (a.in_sync, of_a),
            std::cmp::Ordering::Less => (b.in_sync, of_b),
            // Two different sets under one version: only what both say can be relied on.
            std::cmp::Ordering::Equal => {
                (SlotSet(a.in_sync.0 & b.in_sync.0), SlotSet(of_a.0 & of_b.0))
            }
        };
        // Who left S by itself, or never heard that it is a member, is none: whoever fills it may lack what S has (C1). It may have
        // what it acknowledged; who made it a member has that, too.
        let members = [a, b]
            .iter()
            .filter(|f| !f.in_sync.contains(f.slot) && !planted!("member-by-hearsay"))
            .fold(members, |members, f| members.without(f.slot));
        Record {
            owner,
            in_sync,
            members,
        }
    }

    pub fn in_s(&self, f: &Facts) -> bool {
        self.members.contains(f.slot)
    }
}

/// S as `of` holds it, without `other` if another disk is in that slot by now.
fn by_disk(of: &Facts, other: &Facts) -> SlotSet {
    let known = &of.about_peer;
    if known.known && known.disk != other.disk {
        of.in_sync.without(other.slot)
    } else {
        of.in_sync
    }
}

fn owner(epoch: Epoch) -> Option<Slot> {
    (epoch.number > 0 && usize::from(epoch.owner) < MAX_COPIES).then_some(Slot(epoch.owner))
}

/// One epoch number, two owners.
pub(super) fn epochs_conflict(a: &Facts, b: &Facts) -> bool {
    a.epoch.number == b.epoch.number && a.epoch.number > 0 && a.epoch.owner != b.epoch.owner
}

/// Nothing on this copy counts.
pub(super) fn blank(f: &Facts) -> bool {
    f.state == CopyState::Blank || f.volumes.iter().any(|v| v.blank)
}

/// A mixture of points in time.
pub(super) fn mid_resync(f: &Facts) -> bool {
    f.target_of != NO_GENERATION || f.state == CopyState::Inconsistent
}

/// May blocks be taken from this copy? It must be one point in time, not known to be behind.
pub(super) fn may_be_source(f: &Facts) -> bool {
    matches!(
        f.state,
        CopyState::UpToDate | CopyState::Complete | CopyState::Consistent
    ) && !mid_resync(f)
        && !blank(f)
}

/// `f` stopped uncleanly and has neither become a target nor come into a new generation since: its position is a
/// lower bound. A primary that serves made a new generation first. Whether the other copy has met this incarnation
/// says nothing: it may have recorded its half of a handshake that was never finished.
pub(super) fn unclean(f: &Facts) -> bool {
    f.unclean_start && !f.is_primary
}

/// How far the copy got in its generation: what a live primary issued, else what it holds.
pub(super) fn reach(f: &Facts) -> Position {
    if f.is_primary {
        f.issued.max(f.position)
    } else {
        f.position
    }
}

/// This copy wrote, as primary, in its current generation.
pub(super) fn wrote_here(f: &Facts) -> bool {
    (f.flags.was_primary || f.is_primary)
        && f.generations.last().is_some_and(|g| g.maker == f.slot.0)
}

/// Who made the copy's current generation.
pub(super) fn current_maker(f: &Facts) -> Option<Slot> {
    f.generations.last().map(|g| Slot(g.maker))
}

/// The bitmap of `of` toward `toward` says where the two differ, for data that both shared in generation `shared`.
///
/// It was started when `toward` was at `bitmap_base`. From there on every block that `toward` may lack has a bit, so
/// it holds if that base is `shared` or lies before it in the owner's history.
pub(super) fn list_usable(of: &Facts, toward: &Facts, shared: GenerationId) -> bool {
    let p = &of.about_peer;
    let usable = p.known
        && p.disk == toward.disk
        && !p.full_copy
        && p.bitmap_base != NO_GENERATION
        && history::at_or_before(of, p.bitmap_base, shared);
    usable || planted!("stale-list-used")
}

/// Signs that the disk of `y` went back in time, in words.
pub(super) fn went_back(y: &Facts, x: &Facts, store: Option<&StoreRecord>) -> Option<String> {
    let known = &x.about_peer;
    let same_disk = known.known && known.disk == y.disk;
    if same_disk && known.attach_counter > y.attach_counter {
        return Some(format!(
            "it was attached {} times, and slot {} has seen attachment {}",
            y.attach_counter, x.slot.0, known.attach_counter
        ));
    }
    if let Some(copy) = store.and_then(|s| s.copies.iter().find(|c| c.slot == y.slot)) {
        if copy.disk != y.disk {
            return Some(format!(
                "the store knows disk {} there, this is disk {}",
                copy.disk, y.disk
            ));
        }
        if copy.attach_counter > y.attach_counter {
            return Some(format!(
                "it was attached {} times, and the store has seen attachment {}",
                y.attach_counter, copy.attach_counter
            ));
        }
    }
    // A copy that undid a resync went back on purpose, and has a bit for every block it undid; one that was filled by a copy that
    // knew of a lower position, too.
    let on_purpose = y.flags.rolled_back || mid_resync(y);
    if same_disk && !on_purpose {
        let generation = known.known_durable_generation;
        if generation == current(y)
            && generation != NO_GENERATION
            && known.known_durable_position > reach(y)
        {
            return Some(format!(
                "it is at position {} of generation {generation}, and once recorded {}",
                reach(y),
                known.known_durable_position
            ));
        }
        if generation != current(y) && history::at_or_before(x, current(y), generation) {
            return Some(format!(
                "it is in generation {}, and once recorded {generation}",
                current(y)
            ));
        }
    }
    // A live primary has issued everything that anybody holds of its generation.
    if y.is_primary
        && !x.is_primary
        && current(x) == current(y)
        && !mid_resync(x)
        && x.position > y.issued
    {
        return Some(format!(
            "it claims to be primary and issued {} positions of generation {}, but slot {} holds {}",
            y.issued,
            current(y),
            x.slot.0,
            x.position
        ));
    }
    None
}

/// What Y holds beyond `child.fork_position`, the point where the other copy's `child` left Y's generation.
/// `None` if it can hold nothing.
pub(super) fn surplus_beyond(y: &Facts, x: &Facts, child: &Generation) -> Option<Surplus> {
    let beyond = reach(y) > child.fork_position;
    // A position after an unclean stop is a lower bound. Only when the primary of that very generation lived on
    // and left its peer behind is it certain that nobody holds more than that primary.
    let unknown = unclean(y) && child.cause != GenerationCause::PeerLost;
    if !beyond && !unknown {
        return None;
    }
    // In sync mode a write completes when every member of S has it, and a primary that goes on without a member
    // makes a generation first. So what X lacks was acknowledged only if X did not count, if X may have had it in
    // memory alone (semi-sync), or if X lost it again when it stopped uncleanly.
    let x_counted = by_disk(y, x).contains(x.slot);
    let x_kept_it = y.mode == Mode::Sync && child.cause != GenerationCause::Restart;
    let acknowledged = !(x_counted && x_kept_it);
    let list = list_usable(y, x, current(y));
    Some(Surplus {
        holder: y.slot,
        generation: current(y),
        after: child.fork_position,
        until: reach(y),
        blocks: list.then_some((y.about_peer.bits, y.about_peer.bytes)),
        acknowledged,
    })
}

/// The branch of `f` that begins with `branch` holds no write that the other copy lacks.
pub(super) fn wrote_nothing(
    f: &Facts,
    other: &Facts,
    ancestor: GenerationId,
    branch: &Generation,
    other_fork: Position,
) -> bool {
    // No list names anything: the copies are equal. An empty list of this side alone would not do: what it wrote may
    // have reached the other copy, which then undid it and holds the bits.
    if list_usable(f, other, ancestor)
        && list_usable(other, f, ancestor)
        && f.about_peer.bits == 0
        && other.about_peer.bits == 0
    {
        return true;
    }
    if unclean(f) || branch.fork_position > other_fork {
        return false;
    }
    let later = f
        .generations
        .iter()
        .skip_while(|g| g.id != branch.id)
        .skip(1);
    // A generation made after an unclean stop forks at a lower bound: 0 says nothing about the one before it.
    let exact = |g: &Generation| {
        matches!(
            g.cause,
            GenerationCause::Promotion | GenerationCause::PeerLost | GenerationCause::DiskLost
        )
    };
    reach(f) == 0 && later.into_iter().all(|g| g.fork_position == 0 && exact(g))
}

/// In sync and semi-sync mode nothing that `f` wrote in its own branch completed: `other` is still in the S that it goes by, and never held
/// that branch, so it acknowledged nothing of it. (`f` left the common generation no later than the other: all that
/// the other may lack is in the branch.)
pub(super) fn completed_nothing(
    f: &Facts,
    other: &Facts,
    branch: &Generation,
    of_other: &Generation,
) -> bool {
    let mut own = f.generations.iter().skip_while(|g| g.id != branch.id);
    f.mode != Mode::Async
        && other.mode != Mode::Async
        && f.about_peer.known
        && by_disk(f, other).contains(other.slot)
        && f.in_sync.contains(f.slot)
        && own.all(|g| g.maker == f.slot.0)
        && branch.fork_position <= of_other.fork_position
        && !unclean(other)
}

/// Row 1: what makes the copies impossible to compare.
pub(super) fn incomparable(a: &Facts, b: &Facts, store: Option<&StoreRecord>) -> Option<Problem> {
    if a.slot == b.slot {
        return Some(Problem::SameSlot { slot: a.slot.0 });
    }
    if a.volumes.len() != b.volumes.len() {
        let detail = format!(
            "slot {} has {}, slot {} has {}",
            a.slot.0,
            a.volumes.len(),
            b.slot.0,
            b.volumes.len()
        );
        return Some(Problem::VolumesDiffer { detail });
    }
    for v in &a.volumes {
        let Some(w) = b.volumes.iter().find(|w| w.index == v.index) else {
            let detail = format!("volume {} is known to slot {} only", v.index.0, a.slot.0);
            return Some(Problem::VolumesDiffer { detail });
        };
        if v.volume != w.volume {
            let detail = format!(
                "volume {} has id {} in slot {}, {} in slot {}",
                v.index.0, v.volume, a.slot.0, w.volume, b.slot.0
            );
            return Some(Problem::VolumesDiffer { detail });
        }
        // The ids come from the service and the index: a swapped order shows in the names alone.
        if v.name != w.name && !v.name.is_empty() && !w.name.is_empty() {
            return Some(Problem::NamesDiffer {
                volume: v.index.0,
                slots: [a.slot.0, b.slot.0],
                names: [v.name.clone(), w.name.clone()],
            });
        }
        if v.sector_size != w.sector_size {
            return Some(Problem::SectorSizesDiffer {
                volume: v.index.0,
                first: v.sector_size,
                second: w.sector_size,
            });
        }
        if v.size != w.size {
            return Some(Problem::SizesDiffer {
                volume: v.index.0,
                first: v.size,
                second: w.size,
            });
        }
        if v.disk == w.disk && v.disk != Uuid(0) {
            return Some(Problem::ClonedDisk { disk: v.disk });
        }
    }
    if a.disk == b.disk && a.disk != Uuid(0) {
        return Some(Problem::ClonedDisk { disk: a.disk });
    }
    for f in [a, b] {
        if let Some(detail) = history::defect(f) {
            return Some(Problem::BrokenHistory {
                slot: f.slot.0,
                detail,
            });
        }
        // A copy that was blank has no history until its first resync is complete.
        if f.generations.is_empty() && !blank(f) && !mid_resync(f) && f.state != CopyState::Failed {
            return Some(Problem::BrokenHistory {
                slot: f.slot.0,
                detail: "it has no generation".into(),
            });
        }
    }
    if let Some(detail) = history::contradiction(a, b) {
        return Some(Problem::Defect { detail });
    }
    if let Some(store) = store {
        let known = a.epoch.number.max(b.epoch.number);
        if known > store.epoch.number {
            return Some(Problem::StoreBehind {
                known,
                store: store.epoch.number,
            });
        }
    }
    None
}

/// The copy over both lists if both can be relied on, else a comparison of everything.
pub(super) fn by_lists(usable: bool) -> How {
    if usable {
        How::Bits
    } else {
        How::FullByChecksum
    }
}

/// The generation that `f`'s data was in before the resync it is in the middle of.
pub(super) fn before_resync(f: &Facts) -> GenerationId {
    if f.before_resync.0 != NO_GENERATION {
        f.before_resync.0
    } else {
        current(f)
    }
}

/// `id` belongs to the histories of both.
pub(super) fn shared(a: &Facts, b: &Facts, id: GenerationId) -> bool {
    id != NO_GENERATION && chain(a).contains(&id) && chain(b).contains(&id)
}
