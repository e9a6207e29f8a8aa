//! Peers that are not who or what they should be: both sides say it, in the status and in the event log.

use crate::support::{Settings, TestNode, two_nodes};
use crate::{event, events, says};
use holdfast_link::{Identity, Peer, PeerStore, Validity};
use holdfast_replicator::config::Config;
use holdfast_replicator::control::protocol::LinkName;
use holdfast_replicator::create::{CreateOptions, create};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::ids::Uuid;
use holdfast_wire_format::superblock;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

/// Starts a node with a configuration text that was changed.
async fn start(node: &mut TestNode, text: &str) -> std::net::SocketAddr {
    let config = Config::parse(text, &node.config_file()).unwrap();
    let replicator = Replicator::start(config).await.unwrap();
    let address = replicator.addresses().link[0];
    node.replicator = Some(replicator);
    address
}

#[tokio::test]
async fn another_service_id_under_the_same_name_is_named_on_both_sides() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut listens, mut dials] = two_nodes(root.path());
    let (right, wrong) = (
        "5e51ce00000000000000000000000001",
        "5e51ce000000000000000000000000ff",
    );
    listens.create(&settings);
    let text = dials.config_text(&settings, None).replace(right, wrong);
    let config = Config::parse(&text, &dials.config_file()).unwrap();
    create(&config, "db", &CreateOptions::default()).unwrap();
    let address = listens.start(&settings, None).await;
    let text = dials
        .config_text(&settings, Some(address))
        .replace(right, wrong);
    start(&mut dials, &text).await;
    let hint = ["service.id", "no copy was changed"];
    event(
        &dials,
        "service-refused",
        &[&[wrong, right], &hint[..]].concat(),
    )
    .await;
    event(
        &listens,
        "service-unknown",
        &[&[wrong, right, dials.name], &hint[..]].concat(),
    )
    .await;
    for node in [&listens, &dials] {
        let report = node
            .until("the status says it", |s| {
                s.peers[0].last_error.contains(wrong)
            })
            .await;
        says(&report.peers[0].last_error, &["db", right, "service.id"]);
        assert_eq!(report.peers[0].link, LinkName::Connecting);
        assert!(report.problems.iter().any(|p| p.text.contains(wrong)));
        // Once, although it is tried again and again.
        let said = events(node)
            .iter()
            .filter(|line| line.contains(wrong))
            .count();
        assert_eq!(said, 1, "{:#?}", events(node));
    }
    dials.stop().await;
    listens.stop().await;
}

#[tokio::test]
async fn another_volume_under_the_same_service_is_named_on_both_sides() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        metadata: "metadata.img",
        ..Settings::default()
    };
    let [mut listens, mut dials] = two_nodes(root.path());
    listens.create(&settings);
    dials.create(&settings);
    // As if a disk of another service, or of another volume of it, had been put under this one.
    let metadata = std::fs::File::options()
        .read(true)
        .write(true)
        .open(dials.dir.join("metadata.img"))
        .unwrap();
    for slot in [0, superblock::SUPERBLOCK_LENGTH as u64] {
        let mut bytes = [0; superblock::SUPERBLOCK_LENGTH];
        metadata.read_exact_at(&mut bytes, slot).unwrap();
        let mut found = superblock::decode(&bytes).unwrap();
        found.volume = Uuid(0xbad);
        metadata
            .write_all_at(&superblock::encode(&found).unwrap(), slot)
            .unwrap();
    }
    let address = listens.start(&settings, None).await;
    dials.start(&settings, Some(address)).await;
    for node in [&listens, &dials] {
        let line = event(node, "handshake", &["volume"]).await;
        says(&line, &["nothing is changed", "bad"]);
        let report = node
            .until("the link is off", |s| s.peers[0].link == LinkName::Off)
            .await;
        says(&report.peers[0].handshake, &["volume"]);
        assert!(!report.healthy());
    }
    dials.stop().await;
    listens.stop().await;
}

#[tokio::test]
async fn a_volume_of_another_name_at_the_same_place_is_refused_and_both_names_are_told() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut listens, mut dials] = two_nodes(root.path());
    listens.create(&settings);
    // Same place in the order, same size: nothing else tells them apart.
    let renamed = |node: &TestNode, address| {
        let text = node.config_text(&settings, address);
        text.replace("name = \"data\"", "name = \"logs\"")
    };
    let config = Config::parse(&renamed(&dials, None), &dials.config_file()).unwrap();
    create(&config, "db", &CreateOptions::default()).unwrap();
    let address = listens.start(&settings, None).await;
    let text = renamed(&dials, Some(address));
    start(&mut dials, &text).await;
    for node in [&listens, &dials] {
        let report = node
            .until("the link is off", |s| s.peers[0].link == LinkName::Off)
            .await;
        let both = ["\"data\"", "\"logs\"", "nothing was changed", "same order"];
        says(&report.peers[0].handshake, &both);
        assert!(!report.healthy());
    }
    // The configuration is what counts, and it can be put right.
    dials.stop().await;
    dials.start(&settings, Some(address)).await;
    listens
        .command(Command::Connect { peer: None })
        .await
        .unwrap();
    dials
        .until("they meet", |s| s.peers[0].link == LinkName::Established)
        .await;
    dials.stop().await;
    listens.stop().await;
}

#[tokio::test]
async fn volumes_of_one_size_in_another_order_are_not_mirrored_to_each_other() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut listens, mut dials] = two_nodes(root.path());
    let second = |node: &TestNode| {
        let part = node.config_text(&settings, None);
        let from = part.find("[[service.volume]]").unwrap();
        let to = part.find("[[service.peer]]").unwrap();
        part[from..to]
            .replace("\"data\"", "\"logs\"")
            .replace("data.img", "logs.img")
    };
    let ordered = |node: &TestNode, address, logs_first: bool| {
        let text = node.config_text(&settings, address);
        let place = if logs_first {
            "[[service.volume]]"
        } else {
            "[[service.peer]]"
        };
        text.replacen(place, &format!("{}{place}", second(node)), 1)
    };
    for (node, logs_first) in [(&listens, false), (&dials, true)] {
        let text = ordered(node, None, logs_first);
        let config = Config::parse(&text, &node.config_file()).unwrap();
        create(&config, "db", &CreateOptions::default()).unwrap();
    }
    let text = ordered(&listens, None, false);
    let address = start(&mut listens, &text).await;
    let text = ordered(&dials, Some(address), true);
    start(&mut dials, &text).await;
    for node in [&listens, &dials] {
        let report = node
            .until("the link is off", |s| s.peers[0].link == LinkName::Off)
            .await;
        says(
            &report.peers[0].handshake,
            &["\"data\"", "\"logs\"", "same order"],
        );
    }
    dials.stop().await;
    listens.stop().await;
}

/// Gives a node a new identity, valid as said, that its peer pinned; the other's stays. Which of the two dials may change.
fn renewed(node: &mut TestNode, other: &TestNode, validity: Validity) {
    let old = Identity::load(&node.state()).unwrap();
    let trusted = PeerStore::load(&node.state()).unwrap().all();
    let state = node.dir.join("renewed");
    std::fs::create_dir_all(&state).unwrap();
    // The id decides who dials: as before.
    let other_id = Identity::load(&other.state()).unwrap().id();
    let before = old.id() < other_id;
    let new = loop {
        let new = Identity::init_valid(&state, node.name, validity).unwrap();
        if (new.id() < other_id) == before {
            break new;
        }
        std::fs::remove_file(state.join("identity.json")).unwrap();
    };
    let mine = PeerStore::load(&state).unwrap();
    trusted
        .iter()
        .for_each(|peer| mine.insert(peer.clone()).unwrap());
    let theirs = PeerStore::load(&other.state()).unwrap();
    theirs.remove(old.id()).unwrap();
    theirs
        .insert(Peer {
            id: new.id(),
            name: node.name.to_owned(),
            fingerprints: new.fingerprints(),
            addresses: vec!["127.0.0.1:1".parse().unwrap()],
        })
        .unwrap();
    std::fs::remove_dir_all(node.state()).unwrap();
    std::fs::rename(&state, node.state()).unwrap();
}

/// The configurations name the peer by its node's name, since ids changed.
fn by_name(node: &TestNode, other: &TestNode, address: Option<std::net::SocketAddr>) -> String {
    let text = node.config_text(&Settings::default(), address);
    let from = text.find("[[service.peer]]\nnode = ").unwrap();
    let line_end = from + text[from + 17..].find('\n').unwrap() + 17;
    format!(
        "{}[[service.peer]]\nnode = {:?}{}",
        &text[..from],
        other.name,
        &text[line_end..]
    )
}

fn long_ago() -> Validity {
    let day = Duration::from_secs(24 * 3600);
    Validity {
        not_before: SystemTime::now() - 30 * day,
        not_after: SystemTime::now() - day,
    }
}

/// Creates both with configurations that name peers by name, and starts them; the first one listens.
async fn both(nodes: &mut [TestNode; 2]) {
    let [listens, dials] = nodes;
    for (node, other) in [(&*listens, &*dials), (&*dials, &*listens)] {
        let config = Config::parse(&by_name(node, other, None), &node.config_file());
        create(&config.unwrap(), "db", &CreateOptions::default()).unwrap();
    }
    let text = by_name(listens, dials, None);
    let address = start(listens, &text).await;
    let text = by_name(dials, listens, Some(address));
    start(dials, &text).await;
}

#[tokio::test]
async fn an_expired_certificate_shows_in_status_and_events_of_both_sides() {
    for expired in [0, 1] {
        let root = tempfile::tempdir().unwrap();
        let mut nodes = two_nodes(root.path());
        let [a, b] = &mut nodes;
        if expired == 0 {
            renewed(a, b, long_ago());
        } else {
            renewed(b, a, long_ago());
        }
        both(&mut nodes).await;
        let name = nodes[expired].name;
        // Whoever checks it says all; the other side learns that it was refused.
        let checks = &nodes[1 - expired];
        let report = checks
            .until("it says why", |s| {
                s.peers[0].last_error.contains("expired on")
            })
            .await;
        says(
            &report.peers[0].last_error,
            &[name, "refused", "Give that node a new certificate"],
        );
        assert_eq!(report.peers[0].link, LinkName::Connecting);
        let kind = if expired == 0 {
            "path-failed"
        } else {
            "caller-refused"
        };
        event(checks, kind, &["expired on", name]).await;
        let refused = &nodes[expired];
        let report = refused
            .until("it says that it was refused", |s| {
                !s.peers[0].last_error.is_empty()
            })
            .await;
        let text = &report.peers[0].last_error;
        assert!(
            text.contains("refused") || text.contains("certificate"),
            "{text}"
        );
        let kind = if expired == 0 {
            "caller-refused"
        } else {
            "path-failed"
        };
        event(refused, kind, &[]).await;
        for node in nodes.iter_mut().rev() {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn a_certificate_that_nobody_pinned_shows_in_status_and_events_of_both_sides() {
    let root = tempfile::tempdir().unwrap();
    let mut nodes = two_nodes(root.path());
    let stranger = root.path().join("stranger");
    std::fs::create_dir_all(&stranger).unwrap();
    let stranger = Identity::init(&stranger, "stranger").unwrap();
    // To the one that listens, the other is somebody else.
    let store = PeerStore::load(&nodes[0].state()).unwrap();
    let known = store.all()[0].id;
    store
        .set_fingerprints(known, stranger.fingerprints())
        .unwrap();
    both(&mut nodes).await;
    let presented = Identity::load(&nodes[1].state())
        .unwrap()
        .fingerprint()
        .to_string();
    let pinned = stranger.fingerprint().to_string();
    let report = nodes[0]
        .until("it says why", |s| s.peers[0].last_error.contains("refused"))
        .await;
    says(
        &report.peers[0].last_error,
        &[nodes[1].name, &presented, &pinned],
    );
    let line = event(&nodes[0], "caller-refused", &[&presented]).await;
    says(&line, &[nodes[1].name, &pinned]);
    let report = nodes[1]
        .until("it knows that it was refused", |s| {
            s.peers[0].last_error.contains("refused")
        })
        .await;
    assert_eq!(report.peers[0].link, LinkName::Connecting);
    event(&nodes[1], "path-failed", &["refused by the peer"]).await;
    for node in nodes.iter_mut().rev() {
        node.stop().await;
    }
}
