//! A resync of real processes keeps the bound it is given, and says so.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use holdfast_replicator::control::protocol::{LinkName, StateName};
use holdfast_replicator_core::api::Command;
use std::time::{Duration, Instant};

#[tokio::test]
async fn a_resync_keeps_its_maximum() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut alpha, mut beta] = two_nodes(root.path());
    for node in [&mut alpha, &mut beta] {
        node.more = "[service.tuning]\nresync_rate_max = 4194304\n".into();
        node.create(&settings);
    }
    let address = alpha.start(&settings, None).await;
    beta.start(&settings, Some(address)).await;
    for node in [&alpha, &beta] {
        node.until("they are connected", |s| {
            s.peers[0].link == LinkName::Established && s.in_sync.len() == 2
        })
        .await;
    }
    alpha
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    alpha
        .command(Command::Disconnect { peer: None })
        .await
        .unwrap();
    let socket = alpha.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        for at in 0..12 {
            nbd.write(at << 20, &vec![at as u8 + 1; 1 << 20], false)
                .unwrap();
        }
        nbd.flush().unwrap();
    })
    .await;
    let began = Instant::now();
    for node in [&alpha, &beta] {
        node.command(Command::Connect { peer: None }).await.unwrap();
    }
    let running = alpha
        .until("it copies", |s| {
            s.peers[0].resync.as_ref().is_some_and(|r| r.done_bytes > 0)
        })
        .await;
    let resync = running.peers[0].resync.as_ref().unwrap();
    assert_eq!(resync.rate_limit, Some(4 << 20));
    beta.until("it is whole", |s| s.state == StateName::UpToDate)
        .await;
    // 12 MiB at 4 MiB/s; a twentieth of a second may go at once.
    assert!(began.elapsed() > Duration::from_millis(2500));
    assert!(alpha.on_disk(settings.size) == beta.on_disk(settings.size));
    alpha.stop().await;
    beta.stop().await;
}
