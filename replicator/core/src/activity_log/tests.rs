use super::*;
use holdfast_wire_format::ids::VolumeIndex;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn key(extent: u32) -> ExtentKey {
    ExtentKey {
        volume: VolumeIndex((extent % 3) as u16),
        extent,
    }
}

fn keys(range: std::ops::Range<u32>) -> Vec<ExtentKey> {
    range.map(key).collect()
}

/// A ring as the disk holds it, zeroed by `create`.
#[derive(Clone)]
struct Ring(Vec<[u8; 4096]>);

impl Ring {
    fn new(blocks: u32) -> Self {
        Ring(vec![[0; 4096]; blocks as usize])
    }
    fn write(&mut self, t: &Transaction) {
        self.0[t.ring_block as usize] = t.bytes;
    }
    fn recover(&self, slots: usize) -> (ActivityLog, bool) {
        let log = ActivityLog::new(slots, self.0.len() as u32);
        log.recovered(
            self.0
                .iter()
                .enumerate()
                .map(|(at, b)| (at as u32, b.as_slice())),
        )
    }
}

fn make_hot(log: &mut ActivityLog, ring: &mut Ring, wanted: &[ExtentKey]) {
    while let Some(t) = log.begin_transaction(wanted, |_| true) {
        ring.write(&t);
        log.commit(t.sequence);
    }
}

#[test]
fn d6_an_extent_is_hot_only_after_the_commit() {
    let mut log = ActivityLog::new(4, 8);
    let t = log
        .begin_transaction(&keys(0..2), |_| true)
        .expect("two slots are free");
    assert_eq!((t.sequence, t.ring_block, t.added.len()), (1, 1, 2));
    assert!(!log.is_hot(key(0)) && !log.try_hold(&[key(0)]));
    assert!(
        log.begin_transaction(&keys(5..6), |_| true).is_none(),
        "one at a time"
    );
    log.commit(1);
    assert!(log.try_hold(&keys(0..2)));
    assert_eq!(log.begin_transaction(&keys(0..2), |_| true), None);
}

#[test]
fn d7_an_evicted_extent_stays_in_the_set_until_the_commit_and_takes_no_new_write() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(2, 8);
    make_hot(&mut log, &mut ring, &keys(0..2));
    log.hold(key(1));
    let t = log
        .begin_transaction(&[key(7)], |_| true)
        .expect("extent 0 may go");
    assert_eq!(t.evicted, [key(0)]);
    assert_eq!(log.hot_extents(), [key(0), key(1)]);
    assert!(!log.is_hot(key(0)));
    log.commit(t.sequence);
    assert_eq!(log.hot_extents(), [key(1), key(7)]);
}

#[test]
fn held_extents_and_those_with_bits_not_durable_do_not_cool() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(3, 8);
    make_hot(&mut log, &mut ring, &keys(0..3));
    assert!(log.try_hold(&[key(0), key(0)]));
    assert_eq!(
        log.begin_transaction(&keys(9..11), |k| k == key(0)),
        None,
        "nothing can be evicted"
    );
    log.release(key(0));
    assert_eq!(
        log.begin_transaction(&keys(9..11), |k| k == key(0)),
        None,
        "held twice"
    );
    log.release(key(0));
    let t = log
        .begin_transaction(&keys(9..11), |k| k == key(0))
        .expect("extent 0 may go");
    assert_eq!(
        (t.added, t.evicted, t.still_waiting),
        (vec![key(9)], vec![key(0)], vec![key(10)])
    );
}

#[test]
fn the_longest_unused_extent_cools_first() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(3, 8);
    make_hot(&mut log, &mut ring, &keys(0..3));
    log.hold(key(0));
    log.release(key(0));
    let t = log
        .begin_transaction(&keys(9..11), |_| true)
        .expect("there is room");
    assert_eq!(t.evicted, [key(1), key(2)]);
}

/// Two waiting writes of two extents each, and two slots: each could hold what the other lacks.
#[test]
fn the_longest_waiting_write_gets_its_extents_first() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(2, 8);
    make_hot(&mut log, &mut ring, &[key(2), key(8)]);
    let wanted = [key(0), key(1), key(2), key(3)];
    let t = log
        .begin_transaction(&wanted, |_| true)
        .expect("there is room");
    assert_eq!(t.added, [key(0), key(1)]);
    assert_eq!(t.still_waiting, [key(2), key(3)]);
    log.commit(t.sequence);
    assert!(log.try_hold(&wanted[..2]));
    for extent in &wanted[..2] {
        log.release(*extent);
    }
    let t = log
        .begin_transaction(&wanted[2..], |_| true)
        .expect("there is room");
    log.commit(t.sequence);
    assert!(log.try_hold(&wanted[2..]));
}

#[test]
fn a_block_takes_64_changes() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(200, 8);
    let t = log
        .begin_transaction(&keys(0..100), |_| true)
        .expect("there is room");
    assert_eq!((t.added.len(), t.still_waiting.len()), (64, 36));
    ring.write(&t);
    log.commit(t.sequence);
    make_hot(&mut log, &mut ring, &keys(0..100));
    assert!(log.try_hold(&keys(0..100)));
}

#[test]
fn d7_after_a_failed_write_nothing_relies_on_what_the_disk_may_say() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(2, 8);
    make_hot(&mut log, &mut ring, &keys(0..2));
    let t = log
        .begin_transaction(&[key(7)], |_| true)
        .expect("extent 0 may go");
    log.abort(t.sequence);
    // The block may be on the disk all the same: extent 0 is cold there.
    assert!(!log.is_hot(key(7)) && !log.is_hot(key(0)) && log.is_hot(key(1)));
    assert_eq!(log.hot_extents(), [key(0), key(1)]);
    let again = log
        .begin_transaction(&[key(0)], |_| true)
        .expect("extent 0 has to be said again");
    assert_eq!(
        (again.sequence, again.ring_block),
        (t.sequence, t.ring_block)
    );
    log.commit(again.sequence);
    assert!(log.try_hold(&keys(0..2)));
}

#[test]
fn a_blank_ring_is_empty_and_a_lost_one_is_not() {
    let ring = Ring::new(8);
    let (log, damaged) = ring.recover(900);
    assert!(!damaged && log.hot_count() == 0);
    let mut torn_first = ring.clone();
    torn_first.0[1] = [7; 4096];
    assert!(!torn_first.recover(900).1);
    let mut lost = ring;
    lost.0[3] = [7; 4096];
    assert!(lost.recover(900).1);
}

/// Any block damaged but the one that may be torn: the set may be incomplete, and that is said.
#[test]
fn damage_is_told_from_a_torn_write() {
    let slots = ActivityLog::slots_for(8);
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(slots, 8);
    for round in 0..30 {
        make_hot(&mut log, &mut ring, &keys(round * 64..round * 64 + 64));
    }
    let (recovered, damaged) = ring.recover(slots);
    assert!(!damaged);
    assert_eq!(recovered.hot_extents(), log.hot_extents());
    let newest = log.next_sequence - 1;
    for ahead in 1..=8u64 {
        for bytes in [[7u8; 4096], [0; 4096]] {
            let mut hurt = ring.clone();
            hurt.0[((newest + ahead) % 8) as usize] = bytes;
            let (recovered, damaged) = hurt.recover(slots);
            // The newest block itself (8 ahead) can't be told from one that was torn; 1 ahead is the one that may be.
            let excused = bytes[0] == 7 && (ahead == 1 || ahead == 8);
            assert_eq!(damaged, !excused, "block {ahead} behind the newest");
            if damaged {
                assert_eq!(recovered.hot_count(), 0);
            }
        }
    }
}

/// A torn block can be made whole by the next write to its place, when that is torn too: the sectors they have in
/// common are many. What the first one evicted must not have been relied on in between.
#[test]
fn d7_a_torn_block_completed_by_its_successor_loses_nothing() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(41, 8);
    make_hot(&mut log, &mut ring, &keys(0..41));
    let first = log
        .begin_transaction(&[key(100)], |_| true)
        .expect("extent 0 may go");
    assert_eq!(first.evicted, [key(0)]);
    leave(&mut ring, &first, 0b0000_0001);
    let (mut log, damaged) = ring.recover(41);
    assert!(!damaged && log.hot_extents().contains(&key(0)));
    assert!(
        !log.try_hold(&[key(0)]),
        "the next block has to be durable first"
    );
    let again = log
        .begin_transaction(&[key(0)], |_| true)
        .expect("extent 0 has to be said again");
    assert_eq!(again.ring_block, first.ring_block);
    let mut mixed = ring.clone();
    leave(&mut mixed, &again, 0b1111_1110);
    assert!(!mixed.recover(41).1);
    ring.write(&again);
    log.commit(again.sequence);
    assert!(log.try_hold(&[key(0), key(40)]));
}

/// A ring with more blocks than its slots need: the older blocks tell every slot, and still two lost newest ones
/// may have named extents that nothing else does.
#[test]
fn two_lost_newest_blocks_are_damage() {
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(41, 8);
    for extent in 0..20 {
        make_hot(&mut log, &mut ring, &[key(extent)]);
    }
    let newest = log.next_sequence - 1;
    ring.0[(newest % 8) as usize] = [7; 4096];
    assert!(!ring.recover(41).1, "it may have been torn");
    ring.0[((newest - 1) % 8) as usize] = [7; 4096];
    assert!(ring.recover(41).1);
}

#[test]
fn a_damaged_ring_is_rewritten_and_stays_suspect_until_then() {
    let slots = ActivityLog::slots_for(8);
    let mut ring = Ring::new(8);
    let mut log = ActivityLog::new(slots, 8);
    for round in 0..20 {
        make_hot(&mut log, &mut ring, &keys(round * 64..round * 64 + 64));
    }
    ring.0[((log.next_sequence + 3) % 8) as usize] = [7; 4096];
    let (mut log, damaged) = ring.recover(slots);
    assert!(damaged);
    let images = log.reset();
    assert_eq!(images.len(), 8);
    for (done, (block, bytes)) in images.into_iter().enumerate() {
        ring.0[block as usize] = bytes;
        assert_eq!(ring.recover(slots).1, done < 7, "after {} blocks", done + 1);
    }
    make_hot(&mut log, &mut ring, &keys(0..3));
    let (recovered, damaged) = ring.recover(slots);
    assert!(!damaged);
    assert_eq!(recovered.hot_extents(), log.hot_extents());
}

#[test]
#[should_panic(expected = "can't carry")]
fn a_ring_too_short_for_its_slots_is_refused() {
    let _ = ActivityLog::new(CONTEXT + 1, 2);
}

#[derive(Clone, Debug)]
enum Step {
    /// A write into some extents: waits until they are hot, then writes.
    Write {
        first: u32,
        count: u32,
    },
    /// The oldest unstable write becomes stable.
    Stable,
    Begin {
        stubborn: u32,
    },
    /// The write of the block ends; when it fails, the disk has it whole, in part or not at all.
    End {
        ok: bool,
        how: u8,
    },
}

fn mask() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(0u8),
        Just(255),
        any::<u8>(),
        (0u8..8).prop_map(|s| 1 << s),
        (0u8..8).prop_map(|s| !(1 << s))
    ]
}

fn step(extents: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..extents, 1u32..40).prop_map(|(first, count)| Step::Write { first, count }),
        2 => Just(Step::Stable),
        3 => (0u32..9).prop_map(|stubborn| Step::Begin { stubborn }),
        3 => (prop::bool::weighted(0.93), mask()).prop_map(|(ok, how)| Step::End { ok, how }),
    ]
}

/// Of a write that was cut off, any of the 8 sectors may have landed: a bit of `how` each.
fn leave(ring: &mut Ring, t: &Transaction, how: u8) {
    for sector in 0..8 {
        if how & 1 << sector != 0 {
            let range = sector * 512..sector * 512 + 512;
            ring.0[t.ring_block as usize][range.clone()].copy_from_slice(&t.bytes[range]);
        }
    }
}

/// Runs the steps; after each one every outcome of a crash must recover all extents with unstable data, without a
/// false alarm, and a recovered log must be able to go on.
fn crash_everywhere(
    slots: usize,
    blocks: u32,
    steps: Vec<(Step, u8, bool)>,
) -> Result<(), TestCaseError> {
    let mut ring = Ring::new(blocks);
    let mut log = ActivityLog::new(slots, blocks);
    let mut waiting: Vec<Vec<ExtentKey>> = Vec::new();
    let mut unstable: Vec<Vec<ExtentKey>> = Vec::new();
    let mut in_flight: Option<Transaction> = None;
    for (step, how, crashes) in steps {
        match step {
            Step::Write { first, count } => {
                waiting.push((first..first + count.min(slots as u32)).map(key).collect());
            }
            Step::Stable if !unstable.is_empty() => {
                for extent in unstable.remove(0) {
                    log.release(extent);
                }
            }
            Step::Begin { stubborn } => {
                let wanted: Vec<ExtentKey> = waiting.iter().flatten().copied().collect();
                if let Some(t) =
                    log.begin_transaction(&wanted, |k| stubborn == 0 || k.extent % 9 != stubborn)
                {
                    in_flight = Some(t);
                }
            }
            Step::End { ok, how } => {
                if let Some(t) = in_flight.take() {
                    if ok {
                        ring.write(&t);
                        log.commit(t.sequence);
                    } else {
                        leave(&mut ring, &t, how);
                        log.abort(t.sequence);
                    }
                }
            }
            Step::Stable => {}
        }
        while let Some(first) = waiting.first() {
            if !log.try_hold(first) {
                break;
            }
            unstable.push(waiting.remove(0));
        }
        let mut crashed = ring.clone();
        if let Some(t) = &in_flight {
            leave(&mut crashed, t, how);
        }
        let (recovered, damaged) = crashed.recover(slots);
        prop_assert!(!damaged, "a torn write alone was taken for damage");
        let hot: BTreeSet<ExtentKey> = recovered.hot_extents().into_iter().collect();
        for extent in unstable.iter().flatten() {
            prop_assert!(
                hot.contains(extent),
                "D7: {:?} has unstable data and is not hot after a crash",
                extent
            );
        }
        // D7 in memory: the set covers what the durable log may lack.
        for extent in unstable.iter().flatten() {
            prop_assert!(log.hot_extents().contains(extent));
        }
        if crashes {
            // The machine really goes down here: nothing is in flight any more, the log goes on.
            ring = crashed;
            log = recovered;
            in_flight = None;
            waiting.clear();
            unstable.clear();
        }
    }
    // Progress: once nothing is held and everything may cool, whoever waits longest gets in.
    if let Some(t) = in_flight {
        ring.write(&t);
        log.commit(t.sequence);
    }
    for extent in unstable.into_iter().flatten() {
        log.release(extent);
    }
    for at in 0..waiting.len() {
        let wanted: Vec<ExtentKey> = waiting[at..].iter().flatten().copied().collect();
        let mut rounds = 0;
        while !log.try_hold(&waiting[at]) {
            let t = log
                .begin_transaction(&wanted, |_| true)
                .expect("something can be evicted");
            log.commit(t.sequence);
            rounds += 1;
            prop_assert!(
                rounds <= 2,
                "a write of at most 40 extents waits for more than two blocks"
            );
        }
        for extent in &waiting[at] {
            log.release(*extent);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn d6_d7_every_crash_recovers_a_superset_small(steps in prop::collection::vec((step(60), mask(), prop::bool::weighted(0.08)), 1..120)) {
        crash_everywhere(41, 3, steps)?;
    }
}

proptest! {
    // Each step recovers a whole ring: a few long runs say more than many short ones.
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// The ring is exactly long enough for its slots, and wraps.
    #[test]
    fn d6_d7_every_crash_recovers_a_superset_tight(steps in prop::collection::vec((step(3000), mask(), prop::bool::weighted(0.05)), 1..160)) {
        crash_everywhere(ActivityLog::slots_for(3), 3, steps)?;
    }
}
