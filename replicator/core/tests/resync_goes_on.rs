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
