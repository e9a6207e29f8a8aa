//! Peers that join or go, and certificates that change, while replicators run.

use crate::child;
use crate::support::{Settings, TestNode, blocking, eventually, two_nodes};
use holdfast_link::{Identity, PeerStore, Validity};
use holdfast_replicator::control::client::Client;
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::LinkName;

async fn connected(nodes: &[TestNode; 2]) {
    for node in nodes {
        node.until("they know each other", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    }
}

async fn started(settings: &Settings, nodes: &mut [TestNode; 2]) {
    for node in nodes.iter() {
        node.create(settings);
    }
    let address = nodes[0].start(settings, None).await;
    nodes[1].start(settings, Some(address)).await;
}

/// As `holdfast reload` does.
async fn reload(node: &TestNode) -> String {
    let socket = node.dir.join("control.sock");
    blocking(move || Client::connect(&socket).unwrap().reload().unwrap()).await
}

#[tokio::test]
async fn a_peer_that_joins_later_is_called_without_a_restart() {
    for late in [0, 1] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings::default();
        let mut nodes = two_nodes(root.path());
        let store = PeerStore::load(&nodes[late].state()).unwrap();
        let peer = store.all()[0].clone();
        store.remove(peer.id).unwrap();
        started(&settings, &mut nodes).await;
        eventually("the unknown peer is reported, with what to do", || {
            let (events, _) = nodes[late].replicator.as_ref().unwrap().handle().events();
            events
                .iter()
                .any(|event| event.kind == "peer-unknown" && event.text.contains("holdfast join"))
        })
        .await;
        // As `holdfast join` does, beside the running process.
        store.insert(peer.clone()).unwrap();
        let said = reload(&nodes[late]).await;
        assert!(said.contains(&format!("new: {}", peer.name)), "{said}");
        connected(&nodes).await;
        for node in &mut nodes {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn a_peer_that_was_removed_is_cut_off() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    started(&settings, &mut nodes).await;
    connected(&nodes).await;
    let store = PeerStore::load(&nodes[0].state()).unwrap();
    store.remove(store.all()[0].id).unwrap();
    let said = reload(&nodes[0]).await;
    assert!(said.contains("gone: "), "{said}");
    for node in &nodes {
        node.until("the link is down", |s| {
            s.peers[0].link == LinkName::Connecting
        })
        .await;
    }
    for node in &mut nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_certificate_rotates_while_both_run() {
    for rotating in [0, 1] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings::default();
        let mut nodes = two_nodes(root.path());
        started(&settings, &mut nodes).await;
        connected(&nodes).await;
        let (own, other) = (nodes[rotating].state(), nodes[1 - rotating].state());
        let old = Identity::load(&own).unwrap().fingerprint();
        let next = Identity::load(&own)
            .unwrap()
            .prepare_rotation(Validity::default())
            .unwrap();
        let activate = || {
            let peers = PeerStore::load(&own).unwrap();
            Identity::load(&own)
                .unwrap()
                .activate_rotation(&peers, false)
        };
        let refused = activate().unwrap_err().to_string();
        assert!(refused.contains("did not confirm"), "{refused}");
        let said = reload(&nodes[rotating]).await;
        assert!(said.contains(&next.to_string()), "{said}");
        eventually("the peer confirms the next certificate", || {
            activate().is_ok()
        })
        .await;
        reload(&nodes[rotating]).await;
        // New connections use it, and the peer forgets the old one.
        let command = |connect| {
            if connect {
                holdfast_replicator_core::api::Command::Connect { peer: None }
            } else {
                holdfast_replicator_core::api::Command::Disconnect { peer: None }
            }
        };
        for node in &nodes {
            node.command(command(false)).await.unwrap();
        }
        eventually("the connection has ended", || {
            nodes.iter().all(|node| {
                let (events, _) = node.replicator.as_ref().unwrap().handle().events();
                events.iter().any(|event| event.kind == "node-disconnected")
            })
        })
        .await;
        nodes[0].command(command(true)).await.unwrap();
        nodes[1].command(command(true)).await.unwrap();
        connected(&nodes).await;
        eventually("the old certificate is pinned no more", || {
            let pinned = &PeerStore::load(&other).unwrap().all()[0].fingerprints;
            pinned.contains(&next) && !pinned.contains(&old)
        })
        .await;
        for node in &mut nodes {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn files_that_cannot_be_read_leave_everything_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    started(&settings, &mut nodes).await;
    connected(&nodes).await;
    let path = nodes[0].state().join("peers.json");
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, b"{ \"format\": 1, ").unwrap();
    let refusal = nodes[0]
        .replicator
        .as_ref()
        .unwrap()
        .handle()
        .reload()
        .await
        .unwrap_err();
    assert!(refusal.what.contains("peers.json"), "{refusal}");
    assert!(refusal.kept.contains("known before"), "{refusal}");
    assert_eq!(
        nodes[0].service().await.peers[0].link,
        LinkName::Established
    );
    std::fs::write(&path, good).unwrap();
    reload(&nodes[0]).await;
    for node in &mut nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn sighup_reads_peers_again_and_sigterm_stops_cleanly() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, _] = two_nodes(root.path());
    node.create(&settings);
    std::fs::write(node.config_file(), node.config_text(&settings, None)).unwrap();
    let mut child = child::replicator(&node.config_file());
    let socket = node.dir.join("control.sock");
    let path = socket.clone();
    eventually("the replicator answers", move || {
        Client::connect(&path).is_ok()
    })
    .await;
    let store = PeerStore::load(&node.state()).unwrap();
    store.remove(store.all()[0].id).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    eventually("the peers were read again", move || {
        let mut gone = false;
        Client::connect(&socket)
            .unwrap()
            .events(false, None, |event| {
                gone |= event
                    .is_ok_and(|event| event.kind == "reloaded" && event.text.contains("gone: "));
                true
            })
            .unwrap();
        gone
    })
    .await;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(blocking(move || child.wait().unwrap()).await.success());
}
