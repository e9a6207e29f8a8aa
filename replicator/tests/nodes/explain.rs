//! `explain-handshake` says what two copies would agree on if they connected now, changing nothing; and that is what they then agree on.

use crate::support::{Settings, TestNode, pair};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{LinkName, ServiceReport};
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::ids::Slot;

async fn explained(node: &TestNode, peer: &TestNode) -> String {
    let handle = node.replicator.as_ref().unwrap().handle();
    handle.explain_handshake("db", peer.name).await.unwrap()
}

async fn link(node: &TestNode, peer: &TestNode, on: bool) {
    let peer = Some(Slot(peer.slot));
    let command = if on {
        Command::Connect { peer }
    } else {
        Command::Disconnect { peer }
    };
    node.command(command).await.unwrap();
}

#[tokio::test]
async fn what_is_foretold_is_what_is_decided_then_and_telling_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = pair(root.path(), &settings).await;
    let (here, there) = (&nodes[0], &nodes[1]);
    here.command(Command::Promote { force: false })
        .await
        .unwrap();
    here.whole().await;
    here.write(0, 1).await;
    let text = explained(there, here).await;
    assert!(text.starts_with("nothing is to be decided now"), "{text}");
    assert!(text.contains("are connected"), "{text}");

    // First nothing is written meanwhile, then a block that only one of them has.
    for round in 0..2_u8 {
        link(here, there, false).await;
        if round == 1 {
            here.write(65536, 2).await;
        }
        let off = |s: &ServiceReport| s.peers[0].link != LinkName::Established;
        there.until("the link is off", off).await;
        here.until("it goes on alone", |s| s.in_sync.len() == 1)
            .await;
        link(there, here, false).await;
        let before = (here.service().await, there.service().await);
        // The one that dials asks although no service needs a connection.
        // What is on its way to a disk is waited for by who asks.
        let text = loop {
            let text = explained(there, here).await;
            if !text.contains("ask again in a moment") {
                break text;
            }
        };
        let now = format!(
            "if {} and {} connected now (nothing was changed):\nRow ",
            there.name, here.name
        );
        assert!(text.starts_with(&now), "{text}");
        assert!(text.contains("they last met"), "{text}");
        let copies = format!(
            "{} takes the blocks that either side marked from {}",
            there.name, here.name
        );
        assert!(text.contains(&copies) || round == 0, "{text}");
        let after = (here.service().await, there.service().await);
        for (before, after) in [(before.0, after.0), (before.1, after.1)] {
            assert_eq!(before.generations, after.generations);
            assert_eq!(before.in_sync, after.in_sync);
            assert_eq!(before.peers[0].handshake, after.peers[0].handshake);
            assert_eq!(after.peers[0].link, LinkName::Off);
        }
        // The other one may find no connection, and says so; what was decided last it knows.
        let answer = explained(here, there).await;
        assert!(
            answer.starts_with(&format!("{} does not say what it has now", there.name))
                || answer.starts_with("if "),
            "{answer}"
        );
        link(there, here, true).await;
        link(here, there, true).await;
        let report = here.whole().await;
        // The primary counts on meanwhile, so positions differ.
        let decided = &report.peers[0].handshake;
        let row = decided.split(':').next().unwrap();
        let outcome = decided.lines().nth(1).unwrap();
        assert!(
            text.contains(&format!("\n{row}:")) && text.contains(outcome),
            "foretold: {text}\ndecided: {decided}"
        );
        there.whole().await;
    }
    for node in &mut nodes {
        node.stop().await;
    }
}
