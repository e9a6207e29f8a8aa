//! A service that was detached, and a disk that was, come back without a restart.

use crate::support::{Settings, TestNode, pair};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::RoleName;
use holdfast_replicator_core::api::{AdminResult, Command};

async fn attach(node: &TestNode, disk: bool) -> AdminResult {
    let replicator = node.replicator.as_ref().unwrap();
    replicator.handle().attach("db", disk).await
}

#[tokio::test]
async fn a_detached_secondary_comes_back_and_gets_what_it_missed() {
    // Either one may be who dials.
    for primary in [0, 1] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings::default();
        let mut nodes = pair(root.path(), &settings).await;
        let (here, there) = (&nodes[primary], &nodes[1 - primary]);
        here.command(Command::Promote { force: false })
            .await
            .unwrap();
        here.whole().await;
        let refusal = attach(there, false).await.unwrap_err();
        assert!(refusal.to_string().contains("is attached"), "{refusal}");
        for round in 1..4 {
            there.command(Command::Detach).await.unwrap();
            let report = there.service().await;
            assert_eq!(report.role, RoleName::Detached);
            // Nobody holds its disk.
            holdfast_replicator::create::contents(&there.config(&settings, None), "db").unwrap();
            here.write(u64::from(round) * 65536, round).await;
            let text = attach(there, false).await.unwrap();
            assert!(text.contains("is attached"), "{text}");
            here.whole().await;
        }
        let disks = [&nodes[0], &nodes[1]].map(|node| node.on_disk(settings.size));
        assert!(disks[0] == disks[1] && disks[0][3 * 65536] == 3);
        // And the primary's own: it comes back as a secondary, and may be promoted.
        let here = &nodes[primary];
        here.command(Command::Detach).await.unwrap();
        attach(here, false).await.unwrap();
        here.whole().await;
        assert_eq!(here.service().await.role, RoleName::Secondary);
        here.command(Command::Promote { force: false })
            .await
            .unwrap();
        here.write(0, 9).await;
        for node in &mut nodes {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn a_detached_disk_is_used_again_once_the_service_moved() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = pair(root.path(), &settings).await;
    let (first, second) = (&nodes[0], &nodes[1]);
    first
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    first.whole().await;
    first.write(0, 1).await;
    first.command(Command::DetachDisk).await.unwrap();
    first.write(65536, 2).await;
    // D13: what its disk lacks by now must not be served.
    let refusal = attach(first, true).await.unwrap_err();
    assert!(
        refusal.to_string().contains("another copy's disk"),
        "{refusal}"
    );
    first.command(Command::Demote).await.unwrap();
    second
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    second.write(131_072, 3).await;
    attach(first, true).await.unwrap();
    second.whole().await;
    assert_eq!(first.service().await.role, RoleName::Secondary);
    let disks = [first, second].map(|node| node.on_disk(settings.size));
    assert!(disks[0] == disks[1] && (disks[0][65536], disks[0][131_072]) == (2, 3));
    for node in &mut nodes {
        node.stop().await;
    }
}
