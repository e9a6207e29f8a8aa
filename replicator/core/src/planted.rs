//! Deliberate defects, for test builds alone: they show that the simulator, and the test of crash images, notice a
//! broken core.
//!
//! `planted!("name")` stands where the defect is and is `false` in every build without the feature `planted-defects`,
//! which only `cargo run --release -p simulator -- mutants` and `tests/soak --crash-images` ask for. In that build it is true for the one defect that
//! a run chose, and counts how often it was reached.
//!
//! **To add one**: `planted!("name")` at the place, as the last part of a condition, so that reaching it means that it
//! makes a difference; and a line in [`DEFECTS`]. A name that is not in the table does not compile in that build; a line
//! without a place is reported as never reached.

#[cfg(not(feature = "planted-defects"))]
macro_rules! planted {
    ($name:literal) => {
        $crate::planted::never()
    };
}

/// Stands for every defect in a build that has none.
#[cfg(not(feature = "planted-defects"))]
#[inline(always)]
pub(crate) const fn never() -> bool {
    false
}

#[cfg(feature = "planted-defects")]
macro_rules! planted {
    ($name:literal) => {{
        const AT: usize = $crate::planted::at($name);
        $crate::planted::chosen(AT)
    }};
}

// The core's own assertions are off in that build: a defect counts as noticed only if the oracle sees it. So what they look at
// must not change anything.
#[cfg(feature = "planted-defects")]
macro_rules! assert {
    ($($text:tt)*) => {
        if false {
            ::std::assert!($($text)*)
        }
    };
}
#[cfg(feature = "planted-defects")]
macro_rules! assert_eq {
    ($($text:tt)*) => {
        if false {
            ::std::assert_eq!($($text)*)
        }
    };
}

#[cfg(feature = "planted-defects")]
pub use on::*;

#[cfg(feature = "planted-defects")]
mod on {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    /// A defect that can be planted.
    #[derive(Debug)]
    pub struct Defect {
        pub name: &'static str,
        /// The invariants it breaks (`docs/core.md`).
        pub breaks: &'static str,
        pub what: &'static str,
        /// What is known to notice it (`docs/simulator.md` has those that nothing does, and why).
        pub noticed: Noticed,
    }

    /// By what a defect is noticed.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum Noticed {
        /// Seeds of the simulator.
        Seeds,
        /// Its enumeration of all schedules.
        Schedules,
        Nothing,
    }

    const fn defect(name: &'static str, breaks: &'static str, what: &'static str) -> Defect {
        Defect {
            name,
            breaks,
            what,
            noticed: Noticed::Seeds,
        }
    }

    const fn scheduled(name: &'static str, breaks: &'static str, what: &'static str) -> Defect {
        Defect {
            noticed: Noticed::Schedules,
            ..defect(name, breaks, what)
        }
    }

    const fn unseen(name: &'static str, breaks: &'static str, what: &'static str) -> Defect {
        Defect {
            noticed: Noticed::Nothing,
            ..defect(name, breaks, what)
        }
    }

    /// All of them.
    #[rustfmt::skip]
    pub const DEFECTS: &[Defect] = &[
        defect("old-epoch", "C1", "a write of an older epoch is taken"),
        defect("early-completion", "D1", "a write completes although a member of S has not acknowledged it"),
        defect("received-is-acknowledged", "D1", "in sync mode, received counts as written"),
        defect("lost-leg-completes", "D1, C1", "a leg that is gone counts as done before S is committed without it"),
        defect("acknowledged-forever", "D1", "what a copy acknowledged before its session ended counts, although it may have lost it since"),
        defect("generation-unknown", "D10", "a write completes in a generation that the other copy does not hold yet"),
        unseen("cools-early", "D7", "an extent cools before its bits are durable"),
        defect("log-forgotten", "D7", "an unclean attach makes no bits of what was hot"),
        defect("full-copy-forgotten", "D7", "a full copy whose source restarted goes on with the bits it finds"),
        defect("unclean-forgotten", "D9", "a copy that stopped uncleanly says it stopped in order"),
        defect("unstable-forgotten", "D2, D7", "what a lost peer acknowledged and did not flush makes no bits"),
        defect("redirtied-cleared", "D8", "a resync bit is cleared although the block was written in flight"),
        defect("flush-not-done", "D2", "the peer acknowledges a flush without flushing"),
        unseen("complete-not-flushed", "D2, D8", "a target says it is complete before its disk has everything"),
        defect("target-not-recorded", "D7", "a target says Ready before it durably is one"),
        defect("dependency-ignored", "D3", "the peer writes what depends on a write that is not done"),
        defect("stable-ignored", "C9", "an asynchronous copy runs ahead of what S has durably"),
        defect("overlap-ignored", "D4", "overlapping operations are not put in order"),
        defect("undo-skipped", "D12", "a target overwrites blocks without saving them"),
        defect("others-forgotten", "D7", "a secondary makes no bits toward copies outside S"),
        defect("resync-leaves-no-trace", "D7", "what a resync brought makes no bits toward third copies"),
        unseen("demoted-says-all-have-it", "D7", "a demoted primary does not say what a lost member of S lacks"),
        unseen("superseded-takes-followers", "D14", "a primary that hears of a newer epoch takes a follower of the newer primary"),
        unseen("last-member-invalidated", "C1", "a member of S is invalidated while no other that has every write is connected"),
        unseen("kept-beside-a-source", "D8", "what is kept for a force keeps a copy from being filled"),
        defect("loser-fills-beside-a-third", "C1", "a copy that lost power finishes a resync while another member of S may have more"),
        unseen("loser-admits-the-owner", "C2", "a copy that lost power takes the owner that it filled into S while another member may have more"),
        unseen("member-by-hearsay", "C1", "who left S by itself is a member of it because another copy says so"),
        unseen("lower-position-is-an-old-disk", "C1", "who was filled up to a lower position passes for a disk that went back in time"),
        unseen("given-up-in-mid-resync", "D14", "a copy that is being filled gives up its writes and takes what still comes for something else"),
        defect("superseded-keeps-its-followers", "D14, C12", "a superseded primary says nothing to the copies that follow it"),
        defect("given-up-and-not-told", "D14", "who gives up its writes goes on with the sessions that it had"),
        defect("superseded-is-followed-on", "D17", "who is filled by a newer primary stays in agreement with the one that it superseded"),
        defect("flushed-is-acknowledged-forever", "D1", "what a copy flushed before its session ended counts, although another copy may have filled it since"),
        defect("agreed-and-filled", "D1, D8", "a copy that a follower fills stays in agreement with others"),
        defect("force-by-old-facts", "D11", "a force goes by what a connected follower said when they met, long ago"),
        unseen("server-counts-for-all", "D7", "what the server of a primary without a disk flushed counts as stable before it is alone in S"),
        unseen("foreign-resync-taken", "D14", "resync data of a generation that was not announced is taken"),
        unseen("marks-forgotten-by-hearsay", "D7", "marks toward members are forgotten by an S that the new primary never told"),
        unseen("equal-leaves-no-trace", "D7", "what a resync that goes on finds to be equal makes no bits toward third copies"),
        defect("filled-and-filling", "D8", "a copy that is being filled goes on filling another"),
        defect("superseded-stays", "C1", "a copy that hears of a newer epoch stays in its S"),
        defect("third-party-epoch", "C1", "an epoch told by another than its owner is taken as if nothing followed from it"),
        defect("own-gate-late", "C1, C3", "the peer raises its gate before the promoting copy has its own on the disk"),
        unseen("promotion-not-flushed", "D2", "a generation forks at a position that is not on the disk"),
        unseen("promotion-not-durable", "C3", "a copy serves before its epoch and generation are on the disk"),
        defect("joins-early", "D2", "S takes a copy in that has not acknowledged everything"),
        defect("both-go-on", "C1", "with three members of S, both followers of a lost primary may go on"),
        defect("suspend-ignored", "C1", "under `continue`, too, the follower of an unreachable primary goes on unasked"),
        defect("memory-forgotten", "C1", "a semi-sync copy that stopped uncleanly goes on unasked"),
        defect("log-not-awaited", "D6, D7", "data is written before its extent is hot durably"),
        defect("overlap-ignored-by-peer", "D4", "overlapping writes go to the peer's disk together"),
        defect("flush-after-one-leg", "D2", "a flush completes when one disk has done it"),
        defect("client-flush-not-done", "D2", "a flush of the application is answered without one of the own disk"),
        unseen("target-not-flushed", "D12", "a target does not make durable the point that its undo leads back to"),
        defect("rollback-not-flushed", "D12", "old blocks count as restored before they are durable"),
        defect("detach-not-flushed", "D2, D7", "a copy stops in order without a flush"),
        unseen("fork-not-flushed", "D2", "S loses a member at a position that is not on the disk"),
        defect("gate-not-durable", "C1, C3", "a copy agrees to an epoch before its gate is on the disk"),
        defect("epoch-not-durable", "C1, C3", "a copy asks for an epoch before its own gate is on the disk"),
        unseen("drop-not-durable", "D1, C1", "writes complete without a copy before S without it is on the disk"),
        defect("source-not-recorded", "D1, C1", "a source mirrors before S without its target is on the disk"),
        defect("generation-acknowledged-early", "D10", "a generation is acknowledged before it is on the disk"),
        defect("complete-not-durable", "D2, D8", "a target says it is complete before that is on the disk"),
        defect("joined-not-durable", "C1, D2", "a copy hears that it is in S before that is on the primary's disk"),
        unseen("rolled-back-not-durable", "D12", "the undo is erased before the superblock says that it was used"),
        unseen("undo-lost-not-durable", "D12", "blocks are overwritten unsaved before the superblock says so"),
        defect("fua-is-plain", "D2", "FUA is treated as a plain write"),
        defect("fua-not-sent", "D2", "FUA is a plain write at the peer"),
        defect("diskless-without-fua", "D13", "a primary without a disk does not make its writes durable"),
        defect("dependency-not-sent", "D3", "frames do not say what they depend on"),
        defect("zero-not-applied", "D15", "a zero or discard changes nothing at the peer"),
        unseen("trimmed-before-the-peer-flushed", "D7", "a write counts as stable although the peer has not flushed it"),
        defect("acknowledged-before-bits", "D7", "a resync is acknowledged before the bits toward third copies are durable"),
        unseen("rollback-without-bits", "D7, D12", "a rollback sets no bits"),
        unseen("rollback-before-bits", "D7, D12", "a rollback begins before its bits are durable"),
        defect("rollback-skipped", "D11, D12", "a target is forced without its rollback"),
        defect("cleared-before-flush", "D8", "a resync bit is cleared before the target has flushed"),
        defect("redirty-not-noted", "D8", "a write to a block in flight is not noted"),
        defect("own-bits-not-told", "D7, D8", "a target does not say which blocks it holds that its source lacks"),
        defect("follower-forgets-unstable", "D7", "what the lost primary may not have kept makes no bits toward it"),
        defect("received-is-dropped", "D1, C1", "what a follower received and had not applied is dropped with the link"),
        defect("promoted-before-applying", "C1", "a copy is promoted before it has applied what it received"),
        defect("positions-reused", "D17", "no new generation after an unclean stop: positions are used again"),
        defect("equal-generation-is-equal", "D9", "copies in one generation count as equal"),
        unseen("stale-list-used", "D7, D9", "a bitmap that does not reach back is used"),
        unseen("old-disk-not-seen", "D9", "a disk that went back in time is not noticed"),
        defect("non-member-has-all", "D9, C1", "a copy outside S counts as having every write"),
        defect("write-error-ignored", "D14", "a write that the disk refused counts as done"),
        defect("apply-error-ignored", "D14", "a replicated write that the disk refused counts as done"),
        defect("flush-error-ignored", "D2, D14", "a flush that failed counts as done"),
        defect("replayed-frame-applied", "D14, D17", "a frame that came before is applied again"),
        defect("old-session-heard", "D14", "frames of a connection that is over are applied"),
        unseen("marks-forgotten-at-agreement", "D7", "copies agree that nothing differs although blocks were marked meanwhile"),
        unseen("damaged-bitmap-is-clean", "D7, D16", "a damaged bitmap counts as empty"),
        defect("damaged-log-overlooked", "D7, D16", "a damaged activity log counts as empty"),
        defect("missing-log-overlooked", "D7", "a run that kept no activity log is taken for one that did"),
        defect("damaged-undo-restored", "D12, D16", "a damaged block of the undo log is restored"),
        scheduled("one-superblock-slot", "D16", "the superblock is always written to the same slot"),
        defect("stopped-before-bits", "D7", "a copy stops in order before its bits are durable"),
        unseen("second-stop-settles-the-first", "D7, D9", "a clean stop after an unclean one counts as clean"),
        unseen("fork-not-compared", "D9, D10", "a follower takes a generation that forks at another place than where it stands"),
        unseen("epoch-taken-twice", "C3", "a promotion takes the number of the epoch before it"),
        defect("no-generation-without-the-peer", "D9, D10", "S loses a member and no generation begins"),
        defect("flush-overtakes-writes", "D2, D3", "the peer flushes before the writes that come before the flush are done"),
        defect("acknowledged-before-written", "D1", "the peer acknowledges a write before its disk has it"),
        unseen("flush-covers-too-much", "D2, D7", "a flush is taken to cover what was written while it ran"),
        defect("stable-without-the-peer", "C9", "the stable position does not wait for the other members of S"),
        defect("resync-reads-through-writes", "D4, D8", "a resync reads a block that is being written"),
        defect("mirrored-before-copied", "D8", "a write is mirrored into a block that is still to be copied"),
        defect("inconsistent-is-promoted", "D11", "a copy in the middle of a resync is promoted"),
        defect("outside-s-is-promoted", "C1, D11", "a copy outside S goes on unasked"),
        scheduled("row-1-swapped", "D9", "row 1 (the copies cannot be compared) comes to the opposite of what the table says"),
        unseen("row-2-swapped", "D9", "row 2 (one disk failed) comes to the opposite of what the table says"),
        scheduled("row-3-swapped", "D9", "row 3 (both blank) comes to the opposite of what the table says"),
        scheduled("row-4-swapped", "D9", "row 4 (one blank) comes to the opposite of what the table says"),
        scheduled("row-5-swapped", "D9", "row 5 (one went back in time) comes to the opposite of what the table says"),
        unseen("row-6-swapped", "D9", "row 6 (one epoch number with two owners) comes to the opposite of what the table says"),
        scheduled("row-7-swapped", "D9", "row 7 (one in the middle of a resync) comes to the opposite of what the table says"),
        unseen("row-8-swapped", "D9", "row 8 (both in the middle of a resync) comes to the opposite of what the table says"),
        scheduled("row-9-swapped", "D9", "row 9 (the same) comes to the opposite of what the table says"),
        scheduled("row-10-swapped", "D9", "row 10 (a secondary stopped uncleanly) comes to the opposite of what the table says"),
        scheduled("row-11-swapped", "D9", "row 11 (a primary stopped uncleanly) comes to the opposite of what the table says"),
        scheduled("row-12-swapped", "D9", "row 12 (both stopped uncleanly) comes to the opposite of what the table says"),
        scheduled("row-13-swapped", "D9", "row 13 (one is some writes behind) comes to the opposite of what the table says"),
        scheduled("row-14-swapped", "D9", "row 14 (one is a generation behind) comes to the opposite of what the table says"),
        scheduled("row-15-swapped", "D9", "row 15 (one is behind, with acknowledged writes of its own) comes to the opposite of what the table says"),
        scheduled("row-16-swapped", "D9", "row 16 (both went on alone) comes to the opposite of what the table says"),
        unseen("row-17-swapped", "D9", "row 17 (nothing in common) comes to the opposite of what the table says"),
    ];

    const NONE: usize = usize::MAX;

    /// The defect of every thread that chose none, and how often those reached it.
    static EVERYWHERE: AtomicUsize = AtomicUsize::new(NONE);
    static REACHED: AtomicU64 = AtomicU64::new(0);

    thread_local! {
        /// The defect of this thread's run, and how often it was reached.
        static CHOSEN: Cell<(usize, u64)> = const { Cell::new((NONE, 0)) };
    }

    /// Place of a name in the table; fails to compile if it is not there.
    #[must_use]
    pub const fn at(name: &str) -> usize {
        let mut at = 0;
        while at < DEFECTS.len() {
            let (a, b) = (DEFECTS[at].name.as_bytes(), name.as_bytes());
            let mut i = 0;
            while a.len() == b.len() && i < a.len() && a[i] == b[i] {
                i += 1;
            }
            if a.len() == b.len() && i == a.len() {
                return at;
            }
            at += 1;
        }
        panic!("a planted defect that is not in the table")
    }

    /// From here on this thread's cores have that defect, by its place in the table, or none.
    pub fn choose(defect: Option<usize>) {
        CHOSEN.set((defect.unwrap_or(NONE), 0));
    }

    /// The same for all threads of the process that choose none themselves: replicators have threads of their own.
    pub fn choose_everywhere(defect: Option<usize>) {
        EVERYWHERE.store(defect.unwrap_or(NONE), Ordering::SeqCst);
        REACHED.store(0, Ordering::SeqCst);
    }

    /// How often the defect that was chosen everywhere was reached since.
    #[must_use]
    pub fn reached_everywhere() -> u64 {
        REACHED.load(Ordering::SeqCst)
    }

    /// How often the chosen defect was reached by this thread since it was chosen.
    #[must_use]
    pub fn reached() -> u64 {
        CHOSEN.get().1
    }

    /// Whether that defect is in force here and now.
    pub fn chosen(at: usize) -> bool {
        let (chosen, reached) = CHOSEN.get();
        if chosen == NONE {
            let is = EVERYWHERE.load(Ordering::Relaxed) == at;
            REACHED.fetch_add(u64::from(is), Ordering::Relaxed);
            return is;
        }
        let is = chosen == at;
        if is {
            CHOSEN.set((chosen, reached + 1));
            // A run reaches it some thousand times: more is a loop without an end.
            std::assert!(
                reached < 50_000_000,
                "the planted defect makes a loop without an end"
            );
        }
        is
    }
}

use crate::service::{FlushFor, Then};

/// A defect: this flush is not made, and what waits for it goes on.
pub(crate) fn flush_left_out(waiter: &FlushFor) -> bool {
    match waiter {
        FlushFor::Client(_) => planted!("client-flush-not-done"),
        FlushFor::Peer(_) => planted!("flush-not-done"),
        FlushFor::Complete { .. } => planted!("complete-not-flushed"),
        FlushFor::Promotion => planted!("promotion-not-flushed"),
        FlushFor::DropPeer | FlushFor::DropTarget { .. } => planted!("fork-not-flushed"),
        FlushFor::Target { .. } => planted!("target-not-flushed"),
        FlushFor::Rollback => planted!("rollback-not-flushed"),
        FlushFor::Detach => planted!("detach-not-flushed"),
    }
}

/// A defect: what waits for this superblock goes on before it is durable.
pub(crate) fn commit_not_awaited(then: &Then) -> bool {
    match then {
        Then::TargetRecorded { .. } => planted!("target-not-recorded"),
        Then::SourceRecorded { .. } => planted!("source-not-recorded"),
        Then::PeerDropped => planted!("drop-not-durable"),
        Then::GateRaised { .. } => planted!("gate-not-durable"),
        Then::EpochTaken { .. } => planted!("epoch-not-durable"),
        Then::Promoted => planted!("promotion-not-durable"),
        Then::GenerationStored { .. } => planted!("generation-acknowledged-early"),
        Then::CompleteStored { .. } => planted!("complete-not-durable"),
        Then::Joined { .. } => planted!("joined-not-durable"),
        Then::RolledBack => planted!("rolled-back-not-durable"),
        Then::UndoOver => planted!("undo-lost-not-durable"),
        _ => false,
    }
}
