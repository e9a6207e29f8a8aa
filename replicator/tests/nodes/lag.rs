//! Lag in seconds is the age of the oldest write that a copy lacks, whether it is on its way, parked, or only bits.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{LinkName, StateName};
use holdfast_replicator_core::api::Command;
use std::time::Instant;

#[tokio::test]
async fn a_copy_that_is_away_falls_behind_in_seconds_and_catches_up_to_none() {
    // Under `continue` the writes are bits, under `suspend` they are parked as well.
    for on_peer_loss in ["continue", "suspend"] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            on_peer_loss,
            ..Settings::default()
        };
        let [mut alpha, mut beta] = two_nodes(root.path());
        alpha.create(&settings);
        beta.create(&settings);
        let address = alpha.start(&settings, None).await;
        beta.start(&settings, Some(address)).await;
        for node in [&alpha, &beta] {
            node.until("they are connected", |s| {
                s.peers[0].link == LinkName::Established
            })
            .await;
        }
        alpha
            .command(Command::Promote { force: false })
            .await
            .unwrap();
        beta.stop().await;
        let away = alpha
            .until("beta is missed", |s| {
                s.peers[0].link == LinkName::Connecting
            })
            .await;
        // Nothing was written since: nothing would be lost.
        assert_eq!((away.peers[0].dirty_bytes, away.peers[0].lag_ms), (0, 0));
        let socket = alpha.dir.join("nbd.sock");
        let before = Instant::now();
        let client = blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            nbd.send_write(8192, &[5; 4096]).unwrap();
            nbd
        })
        .await;
        let report = alpha
            .until("the write has an age", |s| s.peers[0].lag_ms >= 200)
            .await;
        assert!(report.peers[0].dirty_bytes >= 4096);
        assert!(u128::from(report.peers[0].lag_ms) <= before.elapsed().as_millis());
        assert_eq!(report.parked, on_peer_loss == "suspend");
        alpha
            .until("and grows older", |s| {
                s.peers[0].lag_ms > report.peers[0].lag_ms
            })
            .await;
        // What forcing the other copy, or discarding this one, would cost: whose, how much, since when.
        let loss = alpha.command(Command::WhatWouldForceLose).await.unwrap();
        for part in [
            beta.name,
            "blocks",
            "bytes",
            "last time this copy became primary: 2",
        ] {
            assert!(loss.contains(part), "{part:?} is missing in: {loss}");
        }
        // What they decided last is said to be of the past.
        let handle = alpha.replicator.as_ref().unwrap().handle();
        let explained = handle.explain_handshake("db", beta.name).await.unwrap();
        assert!(
            explained.contains("they last met") && explained.contains("cannot be reached now"),
            "{explained}"
        );
        beta.start(&settings, Some(address)).await;
        for node in [&alpha, &beta] {
            let report = node
                .until("both are whole", |s| {
                    s.state == StateName::UpToDate
                        && s.peers[0].link == LinkName::Established
                        && s.peers[0].lag_ms == 0
                })
                .await;
            assert_eq!(report.peers[0].dirty_bytes, 0);
        }
        let handle = alpha.replicator.as_ref().unwrap().handle();
        let explained = handle.explain_handshake("db", beta.name).await.unwrap();
        assert!(explained.contains("are connected"), "{explained}");
        drop(client);
        beta.stop().await;
        alpha.stop().await;
    }
}

/// The file of what the status remembers, with every moment in it made older.
fn an_hour_earlier(file: &std::path::Path) {
    let mut known: serde_json::Value =
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let services = known["services"].as_object_mut().unwrap();
    let peers = services
        .values_mut()
        .flat_map(|service| service["peers"].as_object_mut().unwrap().values_mut());
    for peer in peers {
        let until = peer["whole_until_ms"].as_u64().unwrap();
        peer["whole_until_ms"] = (until - 3_600_000).into();
    }
    std::fs::write(file, known.to_string()).unwrap();
}

#[tokio::test]
async fn a_restart_does_not_make_a_copy_look_younger() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut alpha, mut beta] = two_nodes(root.path());
    alpha.create(&settings);
    beta.create(&settings);
    let address = alpha.start(&settings, None).await;
    beta.start(&settings, Some(address)).await;
    alpha
        .until("they are connected", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    alpha
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    beta.stop().await;
    let socket = alpha.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        nbd.write(8192, &[5; 4096], false).unwrap();
    })
    .await;
    let before = alpha
        .until("the write has an age", |s| s.peers[0].lag_ms >= 100)
        .await;
    let observed = alpha.state().join("observed.json");
    alpha.stop().await;
    an_hour_earlier(&observed);

    alpha.start(&settings, None).await;
    let after = alpha
        .until("it lacks the write as before", |s| {
            s.peers[0].dirty_bytes > 0
        })
        .await;
    let lag = after.peers[0].lag_ms;
    assert!(lag >= 3_600_000 + before.peers[0].lag_ms, "{lag} ms");
    // No more than the file may be behind, and what this test took.
    assert!(lag < 3_600_000 + 60_000, "{lag} ms");
    assert!(!after.peers[0].lag_at_least);
    alpha.stop().await;

    // Without that memory it is a lower bound, and said to be one.
    std::fs::remove_file(&observed).unwrap();
    let address = alpha.start(&settings, None).await;
    let unknown = alpha
        .until("it lacks the write as before", |s| {
            s.peers[0].dirty_bytes > 0
        })
        .await;
    assert!(unknown.peers[0].lag_at_least && unknown.peers[0].lag_ms < 60_000);
    beta.start(&settings, Some(address)).await;
    alpha
        .until("beta has everything", |s| {
            s.peers[0].lag_ms == 0 && !s.peers[0].lag_at_least && s.peers[0].dirty_bytes == 0
        })
        .await;
    beta.stop().await;
    alpha.stop().await;
}
