//! A resync that is cut goes on where it was (D8): what the target has durably is not copied again, whoever had marked it.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_replicator_core::status::ResyncStatus;
use holdfast_wire_format::metadata::*;
use world::resync::{SIZE, on_disk};
use world::*;

fn source(w: &World, n: usize) -> Option<ResyncStatus> {
    let status = w.nodes[n].core.as_ref()?.status(w.now);
    status.peers[0].resync
}

/// A former primary that stopped uncleanly marks all of its hot extents, which here is everything. They are the target's own
/// marks, and once a block is durable there they say nothing more.
#[test]
fn d8_the_marks_of_the_target_go_as_its_blocks_come() {
    for seed in 0..12 {
        let modes = [Mode::Sync, Mode::Sync];
        let mut w = World::new(seed, &modes, OnPeerLoss::Suspend, &[SIZE, SIZE / 2], true);
        w.tuning.resync_chunk_bytes = 16 << 10;
        w.tuning.resync_window_bytes = 64 << 10;
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        for at in 0..24 {
            w.write(
                0,
                at % 2,
                u64::from(at) * 8192,
                vec![at as u8 + 1; 8192],
                false,
            );
            w.steps(10);
        }
        w.crash(0, seed % 2 == 0);
        w.promote(1, false).unwrap_or_else(|e| panic!("{e}"));
        w.start(0);
        let everything = SIZE + SIZE / 2;
        w.until("it begins", 40_000, |w| source(w, 1).is_some());
        let mut left = source(&w, 1).expect("it runs").total_bytes;
        assert_eq!(left, everything, "everything was hot");
        for round in 0..4 {
            w.steps(120);
            // Paused, the source asks for a flush, and what that covers is done with.
            let Some(_) = source(&w, 1) else { break };
            w.command(1, Command::PauseResync)
                .unwrap_or_else(|e| panic!("{e}"));
            w.steps(400);
            let Some(now) = source(&w, 1) else { break };
            // After a crash of the target its marks are what it had saved: more than they need be.
            assert!(
                now.left_bytes < left || seed % 3 != 0,
                "seed {seed}, round {round}: no progress"
            );
            left = now.left_bytes;
            match seed % 3 {
                0 => w.drop_link(0, 1, "cut"),
                how => {
                    w.crash(0, how == 1);
                    w.start(0);
                }
            }
            w.command(1, Command::ResumeResync)
                .unwrap_or_else(|e| panic!("{e}"));
            w.until("it goes on", 40_000, |w| source(w, 1).is_some() || whole(w));
            let Some(again) = source(&w, 1) else { break };
            if seed % 3 == 0 {
                assert_eq!(again.total_bytes, left, "seed {seed}, round {round}");
            }
        }
        w.until("all is whole", 400_000, |w| {
            w.settled(&[0, 1]) && w.up_to_date(0) && w.up_to_date(1)
        });
        assert!(w.nodes[0].disk.data == w.nodes[1].disk.data, "seed {seed}");
    }
}

fn whole(w: &World) -> bool {
    matches!(
        on_disk(w, 0).state,
        CopyState::UpToDate | CopyState::Complete
    )
}

/// What a person is told of the end is reckoned from what is left: none is in sight while the application makes more than is copied.
#[test]
fn an_end_is_told_only_where_less_is_left() {
    let mut told = 0;
    for seed in 0..12 {
        let modes = [Mode::Sync, Mode::Async];
        let mut w = World::new(seed, &modes, OnPeerLoss::Continue, &[SIZE], true);
        w.tuning.resync_chunk_bytes = 16 << 10;
        w.tuning.resync_window_bytes = 16 << 10;
        w.start(0);
        w.start(1);
        w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
        w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
        w.crash(1, true);
        for at in 0..SIZE / 8192 / 2 {
            w.write(0, 0, at * 8192, vec![1; 8192], false);
            w.steps(10);
        }
        w.start(1);
        w.until("it begins", 40_000, |w| source(w, 0).is_some());
        w.command(0, Command::PauseResync)
            .unwrap_or_else(|e| panic!("{e}"));
        let Some(before) = source(&w, 0) else {
            continue;
        };
        for at in SIZE / 8192 / 2..SIZE / 8192 {
            w.write(0, 0, at * 8192, vec![2; 8192], false);
            w.steps(2);
        }
        w.until("a second passes", 100_000, |w| {
            source(w, 0).is_none_or(|s| s.started_ms_ago > before.started_ms_ago + 1000)
        });
        let Some(now) = source(&w, 0) else { continue };
        let gain = now.gain.unwrap_or_else(|| panic!("seed {seed}: {now:?}"));
        let less = before.left_bytes.saturating_sub(now.left_bytes);
        assert!(gain <= less as i64, "seed {seed}: {now:?} after {before:?}");
        assert_eq!(now.eta_ms, None, "seed {seed}: paused");
        told += 1;
        w.command(0, Command::ResumeResync)
            .unwrap_or_else(|e| panic!("{e}"));
        w.until("whole", 100_000, |w| w.settled(&[0, 1]));
    }
    assert!(told > 6, "told {told} times");
}
