//! A service that was detached, and a disk that was, come back without a restart.

use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use holdfast_replicator_core::api::{AdminResult, Command};

async fn pair(root: &std::path::Path, settings: &Settings) -> [TestNode; 2] {
    let mut nodes = two_nodes(root);
    for node in &nodes {
        node.create(settings);
    }
    let address = nodes[0].start(settings, None).await;
    nodes[1].start(settings, Some(address)).await;
    whole(&nodes[0]).await;
    nodes
}

async fn whole(node: &TestNode) {
    node.until("the copies are in sync", |s| {
        s.peers[0].link == LinkName::Established
            && s.peers[0].dirty_bytes == 0
            && s.state == StateName::UpToDate
            && s.peers[0].state == Some(StateName::UpToDate)
    })
    .await;
}

async fn attach(node: &TestNode, disk: bool) -> AdminResult {
    let replicator = node.replicator.as_ref().unwrap();
    replicator.handle().attach("db", disk).await
}

async fn write(node: &TestNode, offset: u64, fill: u8) {
    let socket = node.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        nbd.write(offset, &[fill; 8192], true).unwrap();
    })
    .await;
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
        whole(here).await;
        let refusal = attach(there, false).await.unwrap_err();
        assert!(refusal.to_string().contains("is attached"), "{refusal}");
        for round in 1..4 {
            there.command(Command::Detach).await.unwrap();
            let report = there.service().await;
            assert_eq!(report.role, RoleName::Detached);
            // Nobody holds its disk.
            holdfast_replicator::create::contents(&there.config(&settings, None), "db").unwrap();
            write(here, u64::from(round) * 65536, round).await;
            let text = attach(there, false).await.unwrap();
            assert!(text.contains("is attached"), "{text}");
            whole(here).await;
        }
        let disks = [&nodes[0], &nodes[1]].map(|node| node.on_disk(settings.size));
        assert!(disks[0] == disks[1] && disks[0][3 * 65536] == 3);
        // And the primary's own: it comes back as a secondary, and may be promoted.
        let here = &nodes[primary];
        here.command(Command::Detach).await.unwrap();
        attach(here, false).await.unwrap();
        whole(here).await;
        assert_eq!(here.service().await.role, RoleName::Secondary);
        here.command(Command::Promote { force: false })
            .await
            .unwrap();
        write(here, 0, 9).await;
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
    whole(first).await;
    write(first, 0, 1).await;
    first.command(Command::DetachDisk).await.unwrap();
    write(first, 65536, 2).await;
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
    write(second, 131_072, 3).await;
    attach(first, true).await.unwrap();
    whole(second).await;
    assert_eq!(first.service().await.role, RoleName::Secondary);
    let disks = [first, second].map(|node| node.on_disk(settings.size));
    assert!(disks[0] == disks[1] && (disks[0][65536], disks[0][131_072]) == (2, 3));
    for node in &mut nodes {
        node.stop().await;
    }
}
