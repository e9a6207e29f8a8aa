//! Whether the checks can fail: the core is broken in one way after the other (`replicator/core/src/planted.rs`), in a build
//! of its own (`tests/soak --crash-images`).

use crate::workloads::Verdict;
use holdfast_replicator_core::planted::{DEFECTS, at, choose_everywhere, reached_everywhere};

/// A defect, a workload in whose images it shows, and the promise that they break.
const SEEN: &[(&str, &str, &str)] = &[
    ("log-not-awaited", "attach_write_stop", "D6"),
    ("log-forgotten", "attach_write_stop", "D6"),
    ("client-flush-not-done", "attach_write_stop", "D6"),
    ("flush-not-done", "attach_write_stop", "D6"),
    ("cools-early", "lost_and_back", "D7"),
    ("flush-after-one-leg", "attach_write_stop", "D2"),
    ("fua-is-plain", "attach_write_stop", "D2"),
    ("fua-not-sent", "attach_write_stop", "D2"),
    ("drop-not-durable", "lost_and_back", "D1"),
    ("one-superblock-slot", "attach_write_stop", "C3"),
    ("undo-skipped", "rollback", "D12"),
    ("rollback-not-flushed", "rollback", "D11"),
    ("rolled-back-not-durable", "rollback", "D12"),
];

/// What is in flight at once differs from run to run, so an image that shows a defect need not be in each.
const RECORDINGS: u64 = 4;

/// `HOLDFAST_CRASH_DEFECTS=NAME,NAME` shows instead what each workload makes of these, to find a row for the table.
#[tokio::test]
async fn every_planted_defect_is_seen() {
    if let Ok(names) = std::env::var("HOLDFAST_CRASH_DEFECTS") {
        return show(&names.split(',').collect::<Vec<_>>()).await;
    }
    let mut missed = Vec::new();
    for (name, workload, promise) in SEEN {
        let (mut seen, mut reached, mut recordings) = (None, 0, 0);
        while seen.is_none() && recordings < RECORDINGS {
            recordings += 1;
            let (verdict, times) = broken(at(name), workload).await;
            reached += times;
            seen = verdict
                .err()
                .filter(|wrong| wrong.contains(&format!(": {promise}: ")));
        }
        match seen {
            Some(wrong) => println!("{name}: {}", wrong.lines().next().unwrap_or_default()),
            None => missed.push(format!("{name} in {workload}, reached {reached} times")),
        }
    }
    assert!(missed.is_empty(), "not seen: {missed:#?}");
}

/// What the images of a workload come to with that defect, and how often it was reached.
async fn broken(defect: usize, workload: &'static str) -> (Verdict, u64) {
    choose_everywhere(Some(defect));
    let ended = tokio::spawn(crate::run(workload)).await;
    let reached = reached_everywhere();
    choose_everywhere(None);
    // A broken core may also come to no end: nobody opened an image then.
    (ended.unwrap_or(Ok(())), reached)
}

async fn show(names: &[&str]) {
    for (place, defect) in DEFECTS.iter().enumerate() {
        for workload in crate::WORKLOADS {
            if names.contains(&defect.name) {
                let (verdict, reached) = broken(place, workload).await;
                println!(
                    "{} in {workload}, reached {reached} times: {verdict:?}",
                    defect.name
                );
            }
        }
    }
}
