//! Identity, pins, rotation.

mod common;
use common::*;
use holdfast_link::*;

#[test]
fn identity_is_private_and_kept() {
    let node = Node::new("alpha");
    assert_eq!(mode(&node.dir.path().join("identity.json")), 0o600);
    let again = Identity::load(node.dir.path()).unwrap();
    assert_eq!(
        (again.id(), again.fingerprint()),
        (node.id(), node.identity.fingerprint())
    );
    assert!(matches!(
        Identity::init(node.dir.path(), "other"),
        Err(LinkError::IdentityExists { .. })
    ));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(
        Identity::load(empty.path()),
        Err(LinkError::NoIdentity { .. })
    ));
    assert!(matches!(
        Identity::init(empty.path(), "no spaces"),
        Err(LinkError::BadName { .. })
    ));
    let shown = format!("{:?}", node.identity);
    assert!(!shown.contains("PRIVATE"), "{shown}");
}

#[test]
fn newer_and_damaged_files_are_refused() {
    let node = Node::new("alpha");
    let path = node.dir.path().join("identity.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    assert!(matches!(
        Identity::load(node.dir.path()),
        Err(LinkError::Newer {
            found: 2,
            known: 1,
            ..
        })
    ));
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    assert!(matches!(
        Identity::load(node.dir.path()),
        Err(LinkError::Damaged { .. })
    ));
}

#[test]
fn names_and_certificates_are_unique() {
    let (a, b, c) = (Node::new("alpha"), Node::new("beta"), Node::new("beta"));
    a.peers.insert(b.as_peer()).unwrap();
    assert!(matches!(
        a.peers.insert(c.as_peer()),
        Err(LinkError::NameTaken { .. })
    ));
    let copied = Peer {
        name: "gamma".into(),
        fingerprints: b.identity.fingerprints(),
        ..c.as_peer()
    };
    assert!(matches!(
        a.peers.insert(copied),
        Err(LinkError::CertificateTaken { .. })
    ));
    let again = PeerStore::load(a.dir.path()).unwrap();
    assert_eq!(*again.all(), vec![b.as_peer()]);
}

#[test]
fn unpinned_certificates_are_refused_by_name_on_both_sides() {
    run(async {
        let (a, b) = pair();
        // To a, b is another node than the one that answers.
        let stranger = Node::new("stranger");
        a.peers
            .set_fingerprints(b.id(), stranger.identity.fingerprints())
            .unwrap();
        a.link().connect(b.id(), SERVICE).unwrap();
        let reason = a
            .wait(|event| match event {
                LinkEvent::PathFailed { reason, .. } => Some(reason.clone()),
                _ => None,
            })
            .await;
        for part in [
            b.identity.name().to_owned(),
            b.id().to_string(),
            b.identity.fingerprint().to_string(),
            stranger.identity.fingerprint().to_string(),
        ] {
            assert!(reason.contains(&part), "'{reason}' lacks '{part}'");
        }
        // The other way: to b, a is unknown.
        let (c, d) = pair();
        d.peers
            .set_fingerprints(c.id(), stranger.identity.fingerprints())
            .unwrap();
        d.link().connect(c.id(), SERVICE).unwrap();
        c.link().connect(d.id(), SERVICE).unwrap();
        let reason = d
            .wait(|event| match event {
                LinkEvent::CallerRefused { reason, .. } => Some(reason.clone()),
                LinkEvent::StreamUp { .. } => panic!("let in"),
                _ => None,
            })
            .await;
        for part in [
            c.identity.name().to_owned(),
            c.identity.fingerprint().to_string(),
            stranger.identity.fingerprint().to_string(),
        ] {
            assert!(reason.contains(&part), "'{reason}' lacks '{part}'");
        }
        let told = c
            .wait(|event| match event {
                LinkEvent::PathFailed { reason, .. } => Some(reason.clone()),
                LinkEvent::StreamUp { .. } | LinkEvent::PeerUp { .. } => panic!("let in"),
                _ => None,
            })
            .await;
        assert!(told.contains("refused by the peer"), "{told}");
    });
}

#[test]
fn expired_certificates_are_refused_though_pinned() {
    run(async {
        // Both roles: once the expired one accepts, once it dials.
        for expired_dials in [false, true] {
            let (mut old, mut new);
            loop {
                (old, new) = (Node::valid("old", long_ago()), Node::new("new"));
                if (old.id() < new.id()) == expired_dials {
                    break;
                }
            }
            old.start();
            new.start();
            befriend(&old, &new);
            old.link().connect(new.id(), SERVICE).unwrap();
            new.link().connect(old.id(), SERVICE).unwrap();
            let reason = new
                .wait(|event| match event {
                    LinkEvent::PathFailed { reason, .. }
                    | LinkEvent::CallerRefused { reason, .. } => Some(reason.clone()),
                    LinkEvent::StreamUp { .. } => panic!("let in"),
                    _ => None,
                })
                .await;
            assert!(
                reason.contains("expired on") && reason.contains("node old"),
                "{reason}"
            );
        }
    });
}

#[test]
fn rotation_keeps_every_link() {
    run(async {
        let (a, b) = pair();
        connect(&a, &b, SERVICE).await;
        let before = b.identity.fingerprint();
        let next = b.identity.prepare_rotation(Validity::default()).unwrap();
        assert!(matches!(
            b.identity.activate_rotation(&b.peers, false),
            Err(LinkError::RotationIncomplete { .. })
        ));
        b.link().announce_identity();
        until(|| a.peers.get(b.id()).unwrap().fingerprints.contains(&next)).await;
        until(|| b.identity.activate_rotation(&b.peers, false).is_ok()).await;
        assert_eq!(b.identity.fingerprint(), next);
        // A new connection uses it, and the old certificate is no longer pinned after it.
        a.link().disconnect(b.id(), SERVICE);
        a.wait(|event| matches!(event, LinkEvent::PeerDown { .. }).then_some(()))
            .await;
        connect(&a, &b, OTHER).await;
        until(|| a.peers.get(b.id()).unwrap().fingerprints == vec![next]).await;
        let on_disk = PeerStore::load(a.dir.path()).unwrap();
        assert_eq!(on_disk.by_fingerprint(next).unwrap().id, b.id());
        assert_eq!(on_disk.by_fingerprint(before), None);
    });
}

#[test]
fn forgotten_peers_are_cut_off() {
    run(async {
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        b.peers.remove(a.id()).unwrap();
        b.link().forget(a.id());
        a.down(at_a).await;
        let told = a
            .wait(|event| match event {
                LinkEvent::PathFailed { reason, .. } => Some(reason.clone()),
                LinkEvent::StreamUp { .. } => panic!("let in again"),
                _ => None,
            })
            .await;
        assert!(
            told.contains("never joined this node, or was forgotten here"),
            "{told}"
        );
    });
}

/// Gives everything else a turn until the condition holds; bounded by the time limit of the test.
async fn until(mut holds: impl FnMut() -> bool) {
    while !holds() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}
