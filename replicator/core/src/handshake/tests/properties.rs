//! What holds of the function for any facts at all.

use super::build::*;
use crate::handshake::*;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use proptest::prelude::*;

const STATES: [CopyState; 7] = [
    CopyState::Blank,
    CopyState::Inconsistent,
    CopyState::Outdated,
    CopyState::Consistent,
    CopyState::Complete,
    CopyState::UpToDate,
    CopyState::Failed,
];
const CAUSES: [GenerationCause; 6] = [
    GenerationCause::Created,
    GenerationCause::Promotion,
    GenerationCause::Restart,
    GenerationCause::PeerLost,
    GenerationCause::DiskLost,
    GenerationCause::Force,
];

/// A path through one fixed tree of generations, so that pairs are often related.
fn histories() -> impl Strategy<Value = Vec<Generation>> {
    (prop::sample::select(vec![
        vec![1u64],
        vec![1, 2],
        vec![1, 2, 3],
        vec![1, 2, 4],
        vec![1, 2, 3, 5],
        vec![1, 6],
        vec![2, 3],
        vec![8],
    ]))
    .prop_map(|path| {
        let parent = |id: u64| match id {
            1 | 8 => 0,
            2 | 6 => 1,
            3 | 4 => 2,
            _ => 3,
        };
        path.iter()
            .map(|id| {
                generation(
                    *id,
                    parent(*id),
                    id % 3,
                    CAUSES[(*id % 6) as usize],
                    (*id % 2) as u8,
                )
            })
            .collect()
    })
}

pub(super) fn facts(slot: u8) -> impl Strategy<Value = Facts> {
    let shape = (
        histories(),
        prop::sample::select(&STATES[..]),
        0u64..4,
        0u64..3,
        any::<[bool; 12]>(),
    );
    let peer = (0u64..3, 0u64..7, 0u64..4, 0u64..4, 4u64..7, 50u64..53);
    let meta = (0u64..4, 0u8..3, 0u8..4, 0u64..3, 0u8..3, 0u64..4);
    (shape, peer, meta).prop_map(
        move |((generations, state, position, ahead, flag), peer, meta)| {
            let (a, b) = pair();
            let mut f = if slot == 0 { a } else { b };
            f.generations = generations;
            f.state = state;
            f.position = position;
            f.issued = position + ahead;
            f.is_primary = flag[0] && flag[1];
            f.unclean_start = flag[2];
            f.flags.was_primary = flag[3];
            f.flags.zeroed = flag[4];
            f.flags.rolled_back = flag[5] && flag[6];
            f.flags.undo_lost = flag[7];
            f.undo_intact = flag[8];
            f.volumes[0].blank = flag[9] && flag[10] && flag[0];
            f.about_peer.known = flag[10] || flag[1];
            f.about_peer.full_copy = flag[11] && flag[3];
            let (bits, base, known_generation, known_position, counter, incarnation) = peer;
            f.about_peer.bits = bits;
            f.about_peer.bytes = bits * 4096;
            f.about_peer.bitmap_base = GenerationId(base);
            f.about_peer.known_durable_generation = GenerationId(known_generation);
            f.about_peer.known_durable_position = known_position;
            f.about_peer.attach_counter = counter;
            f.about_peer.incarnation = Incarnation(incarnation);
            let (number, owner, in_sync, version, mode, target) = meta;
            f.epoch = Epoch { number, owner };
            f.in_sync = SlotSet(in_sync);
            f.in_sync_version = version;
            f.mode = [Mode::Sync, Mode::SemiSync, Mode::Async][usize::from(mode)];
            if state == CopyState::Inconsistent {
                f.target_of = GenerationId(target);
                f.target_source = owner;
                f.before_resync = (GenerationId(base % 3), position);
            }
            f
        },
    )
}

pub(super) fn stores() -> impl Strategy<Value = Option<StoreRecord>> {
    prop::option::of((2u64..6, 0u8..2, 1u64..7, 1u8..4).prop_map(
        |(number, owner, generation, in_sync)| StoreRecord {
            epoch: Epoch { number, owner },
            generation: GenerationId(generation),
            in_sync: SlotSet(in_sync),
            version: 5,
            copies: vec![],
        },
    ))
}

/// The same facts with the two slots exchanged everywhere.
fn renamed(f: &Facts) -> Facts {
    let swap = |s: u8| if s < 2 { 1 - s } else { s };
    let swap_set = |s: SlotSet| SlotSet((s.0 & !3) | ((s.0 & 1) << 1) | ((s.0 & 2) >> 1));
    let mut g = f.clone();
    g.slot = Slot(swap(f.slot.0));
    g.epoch.owner = swap(f.epoch.owner);
    g.target_source = swap(f.target_source);
    g.in_sync = swap_set(f.in_sync);
    g.in_sync_pending = swap_set(f.in_sync_pending);
    for generation in &mut g.generations {
        generation.maker = swap(generation.maker);
        generation.epoch.owner = swap(generation.epoch.owner);
    }
    g
}

fn direction(d: &Decision) -> Option<(Slot, Slot, How)> {
    match d.outcome {
        Outcome::Copy(p) => Some((p.source, p.target, p.how)),
        Outcome::Diskless { failed, server } => Some((server, failed, How::Bits)),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn both_ends_decide_the_same(a in facts(0), b in facts(1), store in stores()) {
        prop_assert_eq!(decide(&a, &b, store.as_ref()), decide(&b, &a, store.as_ref()));
    }

    /// No rule prefers a slot for its number: exchange the names, and the copies do the same as before.
    #[test]
    fn slot_numbers_do_not_decide(a in facts(0), b in facts(1), store in stores()) {
        let d = decide(&a, &b, store.as_ref());
        let renamed_store = store.map(|mut s| {
            s.epoch.owner = 1 - s.epoch.owner;
            s.in_sync = SlotSet(((s.in_sync.0 & 1) << 1) | ((s.in_sync.0 & 2) >> 1));
            s
        });
        let e = decide(&renamed(&a), &renamed(&b), renamed_store.as_ref());
        prop_assert_eq!(d.row, e.row);
        let back = direction(&e).map(|(s, t, how)| (Slot(1 - s.0), Slot(1 - t.0), how));
        prop_assert_eq!(direction(&d), back);
    }

    /// A copy never comes from a mixture, a blank or a failed disk; a side that claims to be primary is told to
    /// demote; and the target never ends better than its source.
    #[test]
    fn sources_are_whole(a in facts(0), b in facts(1), store in stores()) {
        let d = decide(&a, &b, store.as_ref());
        if let Outcome::Copy(p) = d.outcome {
            let (x, y) = if p.source == a.slot { (&a, &b) } else { (&b, &a) };
            prop_assert!(p.source != p.target);
            prop_assert!(!matches!(x.state, CopyState::Blank | CopyState::Inconsistent | CopyState::Failed));
            prop_assert!(x.state != CopyState::Outdated || d.row == Row::R4);
            prop_assert_eq!(x.target_of, GenerationId(0));
            prop_assert_eq!(p.target_demotes, y.is_primary);
            prop_assert!(matches!(x.state, CopyState::UpToDate | CopyState::Complete) || p.target_becomes == x.state);
            // Bits are used only if the source has a list toward exactly this disk.
            if matches!(p.how, How::Bits | How::BitsAndUndo) {
                prop_assert!(x.about_peer.known && x.about_peer.disk == y.disk);
                prop_assert!(x.about_peer.bitmap_base != GenerationId(0) || x.about_peer.full_copy);
            }
        }
        if d.outcome == Outcome::Nothing && d.row == Row::R9 {
            prop_assert_eq!(a.about_peer.bits + b.about_peer.bits, 0);
        }
        prop_assert!(!d.why.is_empty());
        let text = explain(&d, &|s| format!("node {}", s.0));
        prop_assert!(!text.is_empty());
    }

    /// No copy that the handshake makes a target of its connected peer can be promoted, even by force.
    #[test]
    fn targets_refuse_promotion(a in facts(0), b in facts(1), store in stores(), force in any::<bool>()) {
        let d = decide(&a, &b, store.as_ref());
        if let Outcome::Copy(p) = d.outcome {
            let (x, y) = if p.source == a.slot { (&a, &b) } else { (&b, &a) };
            prop_assert!(may_promote(y, Some(x), store.as_ref(), force).is_err());
        }
    }
}
