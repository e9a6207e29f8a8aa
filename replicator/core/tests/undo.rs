//! The target of a resync stays promotable (D11, D12): real cores, resyncs and rollbacks cut at every step.

mod world;

use world::resync::*;

#[test]
fn d12_forced_after_a_cut_resync_the_target_is_at_its_old_point() {
    let mut rolled_back = 0;
    for how in [Cut::Link, Cut::Kill, Cut::Power, Cut::Twice] {
        for seed in 0..3 {
            for steps in (seed as usize..420).step_by(20) {
                let (mut w, old) = behind(seed, UNDO, |_| ());
                resync_for(&mut w, steps);
                if !interrupt(&mut w, how) {
                    continue;
                }
                force(&mut w);
                let back = noticed(&w, TARGET, "rolled-back");
                // A copy flushes before it becomes a target. One that lost power before that has only lost what no
                // disk owed it.
                if back || matches!(how, Cut::Link | Cut::Kill) {
                    is_old(
                        &w,
                        &old,
                        &format!("seed {seed}, {how:?} after {steps} steps"),
                    );
                }
                if back {
                    known(&w, &format!("seed {seed}, {how:?} after {steps} steps"));
                    rolled_back += 1;
                    assert!(
                        !has_undo_head(&w, TARGET),
                        "a second rollback would undo more"
                    );
                }
                if steps % 5 == 0 {
                    old_primary_returns(&mut w);
                }
            }
        }
    }
    assert!(rolled_back > 100, "{rolled_back} rollbacks");
}
