//! Start and stop of the process around the shards.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{RoleName, StateName};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::Command;

#[tokio::test]
async fn a_primary_that_is_restarted_comes_back_secondary_and_clean() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut node, _] = two_nodes(root.path());
    node.create(&settings);
    node.start(&settings, None).await;
    node.command(Command::Promote { force: true })
        .await
        .unwrap();
    let socket = node.dir.join("nbd.sock");
    let path = socket.clone();
    // Open while it stops: the session is ended from this side, not waited for.
    let mut nbd = blocking(move || {
        let mut nbd = Nbd::open(&path, "data").unwrap();
        nbd.write(4096, &[3; 4096], false).unwrap();
        nbd
    })
    .await;
    node.stop().await;
    assert!(blocking(move || nbd.read(4096, 512).is_err()).await);
    node.start(&settings, None).await;
    let report = node.service().await;
    assert_eq!(
        (report.role, report.unclean_start),
        (RoleName::Secondary, false)
    );
    assert!(Nbd::open(&socket, "data").is_err());
    node.command(Command::Promote { force: true })
        .await
        .unwrap();
    node.until("it is primary", |s| {
        s.role == RoleName::Primary && s.state == StateName::UpToDate
    })
    .await;
    let read = blocking(move || {
        Nbd::open(&socket, "data")
            .unwrap()
            .read(4096, 4096)
            .unwrap()
    })
    .await;
    assert_eq!(read, [3; 4096]);
    node.stop().await;
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing_running() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, other] = two_nodes(root.path());
    let config = node.config(&settings, None);
    let reason = async |config| {
        Replicator::start(config)
            .await
            .err()
            .expect("it must not start")
            .to_string()
    };
    assert!(
        reason(config.clone()).await.contains("cannot open"),
        "no backing"
    );
    node.create(&settings);
    let mut misnamed = config.clone();
    misnamed.node.name = "gamma".into();
    assert!(reason(misnamed).await.contains("names this node gamma"));
    // The metadata of another node's copy.
    other.create(&settings);
    let mut foreign = config.clone();
    foreign.services[0].volumes[0].backing = other.backing();
    assert!(reason(foreign).await.contains("belongs to node"));
    // A port that is taken.
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut config = config;
    config.node.link_listen = vec![taken.local_addr().unwrap()];
    let text = reason(config.clone()).await;
    assert!(
        text.contains(&taken.local_addr().unwrap().to_string()),
        "{text}"
    );
    drop(taken);
    // And after all that it starts.
    let replicator = Replicator::start(config).await.unwrap();
    assert_eq!(replicator.handle().status().await.services.len(), 1);
    assert!(replicator.stop().await.is_empty());
}
