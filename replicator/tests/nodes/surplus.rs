//! Both copies went on alone and a person picks: what the other side wrote is in the state directory first.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use holdfast_replicator::surplus;
use holdfast_replicator_core::api::Command;
use std::path::PathBuf;

/// Writes a block through the node that serves.
async fn written(socket: PathBuf, offset: u64, fill: u8) {
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        nbd.write(offset, &[fill; 4096], true).unwrap();
        nbd.flush().unwrap();
    })
    .await;
}

#[tokio::test]
async fn what_a_person_gives_up_is_saved_and_can_be_exported() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        on_peer_loss: "continue",
        ..Settings::default()
    };
    let [mut alpha, mut beta] = two_nodes(root.path());
    alpha.create(&settings);
    beta.create(&settings);
    let address = alpha.start(&settings, None).await;
    beta.start(&settings, Some(address)).await;
    for node in [&alpha, &beta] {
        node.until("they are connected", |s| {
            s.peers[0].link == LinkName::Established && s.in_sync.len() == 2
        })
        .await;
    }
    let promote = |force| Command::Promote { force };
    alpha.command(promote(false)).await.unwrap();
    for node in [&alpha, &beta] {
        node.command(Command::Disconnect { peer: None })
            .await
            .unwrap();
    }
    written(alpha.dir.join("nbd.sock"), 1 << 20, 0xa1).await;
    beta.command(promote(true)).await.unwrap();
    beta.until("it serves", |s| s.role == RoleName::Primary)
        .await;
    written(beta.dir.join("nbd.sock"), 2 << 20, 0xb1).await;
    alpha.command(Command::Demote).await.unwrap();
    for node in [&alpha, &beta] {
        node.command(Command::Connect { peer: None }).await.unwrap();
    }
    for node in [&alpha, &beta] {
        node.until("split brain is found", |s| s.peers[0].link == LinkName::Off)
            .await;
    }
    assert!(surplus::list(&alpha.state(), "db").unwrap().is_empty());

    let discard = Command::ResolveSplitBrain { discard_mine: true };
    let said = alpha.command(discard).await.unwrap();
    let saved = surplus::list(&alpha.state(), "db").unwrap();
    assert_eq!(saved.len(), 1);
    assert!(
        said.contains(&saved[0].path.display().to_string()),
        "{said}"
    );
    let target = root.path().join("exported");
    let bytes = surplus::export(&saved[0], "data", &target).unwrap();
    assert_eq!(bytes, saved[0].about.bytes);
    let exported = std::fs::read(&target).unwrap();
    assert!(
        exported[1 << 20..(1 << 20) + 4096]
            .iter()
            .all(|b| *b == 0xa1)
    );

    beta.command(Command::Connect { peer: None }).await.unwrap();
    alpha
        .until("it follows", |s| {
            s.state == StateName::UpToDate && s.peers[0].link == LinkName::Established
        })
        .await;
    let disk = alpha.on_disk(settings.size);
    assert_eq!((disk[1 << 20], disk[2 << 20]), (0, 0xb1));
    alpha.stop().await;
    beta.stop().await;
}
