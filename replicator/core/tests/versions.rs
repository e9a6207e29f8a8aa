//! Copies of different versions of the program: what one may not write past, and what two may say to each other.

mod world;

use holdfast_replicator_core::AttachError;
use holdfast_replicator_core::api::*;
use holdfast_replicator_core::status::LinkState;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{
    WIRE_VERSION, WIRE_VERSION_MIN, decode_body, decode_header, encode_body,
};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock;
use world::*;

/// A feature no version knows yet.
const UNKNOWN: u64 = 1 << 63;

fn pair() -> World {
    World::new(
        1,
        &[Mode::Sync, Mode::Sync],
        OnPeerLoss::Suspend,
        &[1 << 20, 1 << 19],
        true,
    )
}

/// Both copies are UpToDate and stopped.
fn pair_that_was_in_sync() -> World {
    let mut w = pair();
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w.promote(0, false).expect("two whole copies");
    w.until("both are UpToDate, durably", 2000, |w| {
        w.up_to_date(0) && w.up_to_date(1) && w.nodes.iter().all(|n| n.pending.is_empty())
    });
    w.crash(0, false);
    w.crash(1, false);
    w
}

/// Rewrites both superblocks of a volume of copy 1, as a newer version would have left them.
fn rewrite(w: &mut World, volume: u16, change: impl Fn(&mut Superblock)) {
    for slot in [0, 4096] {
        let block = w.nodes[1].disk.meta.get_mut(&(volume, slot)).unwrap();
        let mut sb = superblock::decode(block.as_slice().try_into().unwrap()).unwrap();
        change(&mut sb);
        *block = superblock::encode(&sb).unwrap().to_vec();
    }
}

#[test]
fn a_volume_with_an_unknown_feature_that_forbids_writing_is_not_attached_and_not_changed() {
    for volume in [0, 1] {
        let mut w = pair();
        rewrite(&mut w, volume, |sb| sb.features_read_only = UNKNOWN);
        let before = w.nodes[1].disk.meta.clone();
        let error = w.try_start(1).expect_err("it must not be written");
        assert!(
            matches!(error, AttachError::ReadOnlyFeatures { volume: v, features: UNKNOWN } if v == volume)
        );
        let text = error.to_string();
        for part in [
            &format!("volume {volume}"),
            "0x8000000000000000",
            "Nothing was changed",
            "use that version or a newer one",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(w.nodes[1].pending.is_empty() && w.nodes[1].disk.meta == before);
    }
}

#[test]
fn an_unknown_feature_that_forbids_nothing_is_kept() {
    let mut w = pair();
    rewrite(&mut w, 0, |sb| sb.features_compatible = UNKNOWN);
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    w.promote(0, false).expect("two whole copies");
    for slot in [0, 4096] {
        let block = &w.nodes[1].disk.meta[&(0, slot)];
        let sb = superblock::decode(block.as_slice().try_into().unwrap()).unwrap();
        assert_eq!(sb.features_compatible, UNKNOWN);
    }
}

/// What was on the wires.
#[derive(Default)]
struct Seen {
    /// Of each frame but hellos and goodbyes.
    versions: Vec<u8>,
    /// Said by the cores themselves; this world says them for any link that is closed, without an incarnation.
    goodbyes: Vec<String>,
}

/// Runs two copies of which 1 speaks otherwise: its hellos are changed on their way.
fn meet(w: &mut World, steps: usize, change: impl Fn(&mut Hello)) -> Seen {
    let mut wires = Seen::default();
    w.start(0);
    w.start(1);
    let mut seen = (0, 0);
    for _ in 0..steps {
        w.step();
        for (ends, wire) in &mut w.wires {
            for (header, bytes) in wire {
                let decoded = decode_header(header.as_slice().try_into().unwrap()).unwrap();
                match (decoded.kind, ends) {
                    (FrameKind::Hello, (1, 0)) => {
                        let Body::Hello(mut hello) = decode_body(decoded.kind, bytes).unwrap()
                        else {
                            panic!("a hello has the body of one")
                        };
                        change(&mut hello);
                        *bytes = encode_body(&Body::Hello(hello));
                        seen.0 += 1;
                        assert_eq!(decoded.version, WIRE_VERSION_MIN);
                    }
                    (FrameKind::Hello, _) => {
                        seen.1 += 1;
                        assert_eq!(decoded.version, WIRE_VERSION_MIN);
                    }
                    (FrameKind::Goodbye, _) => {
                        assert_eq!(decoded.version, WIRE_VERSION_MIN);
                        if let Ok(Body::Goodbye { text, .. }) = decode_body(decoded.kind, bytes)
                            && decoded.incarnation != Incarnation(0)
                        {
                            wires.goodbyes.push(text);
                        }
                    }
                    _ => wires.versions.push(decoded.version),
                }
            }
        }
    }
    assert!(seen.0 > 0 && seen.1 > 0, "both said hello");
    wires
}

fn refused(w: &World, n: usize, parts: &[&str]) {
    let status = w.nodes[n].core.as_ref().unwrap().status(w.now);
    assert_eq!(status.peers[0].link, LinkState::Off, "node {n}");
    for part in parts {
        assert!(
            w.nodes[n]
                .notices
                .iter()
                .any(|notice| notice.text.contains(part)),
            "node {n} never said {part}: {:?}",
            w.nodes[n]
                .notices
                .iter()
                .map(|n| &n.text)
                .collect::<Vec<_>>()
        );
    }
    assert_eq!(
        status.state,
        CopyState::UpToDate,
        "node {n} keeps what it is"
    );
}

#[test]
fn a_peer_with_newer_versions_beside_a_common_one_is_talked_to_in_that_one() {
    let mut w = pair();
    let seen = meet(&mut w, 400, |hello| {
        hello.version_max = WIRE_VERSION + 7;
        // It has more than we know of, and can do without.
        hello.features_supported |= UNKNOWN;
    });
    assert!(w.settled(&[0, 1]), "they work together");
    assert!(!seen.versions.is_empty() && seen.versions.iter().all(|v| *v == WIRE_VERSION));
    assert!(seen.goodbyes.is_empty());
}

#[test]
fn a_peer_too_new_is_refused_and_both_say_why() {
    let mut w = pair_that_was_in_sync();
    let seen = meet(&mut w, 400, |hello| {
        hello.version_min = WIRE_VERSION + 1;
        hello.version_max = WIRE_VERSION + 2;
    });
    assert!(
        seen.versions.iter().all(|v| *v == WIRE_VERSION_MIN),
        "nothing newer than the oldest was sent"
    );
    assert!(seen.goodbyes[0].contains("wire versions 2 to 3"));
    let words = [
        "wire versions 2 to 3",
        "both copies are as they were",
        "upgrade",
    ];
    refused(&w, 0, &words);
    refused(&w, 1, &words);
}

#[test]
fn a_peer_that_requires_an_unknown_feature_is_refused_and_both_say_why() {
    let mut w = pair_that_was_in_sync();
    let seen = meet(&mut w, 400, |hello| {
        hello.features_required = UNKNOWN;
        hello.features_supported = UNKNOWN;
    });
    assert!(seen.goodbyes[0].contains("requires features"));
    let words = ["requires features", "0x8000000000000000", "upgrade"];
    refused(&w, 0, &words);
    refused(&w, 1, &words);
}

#[test]
fn a_frame_of_a_version_that_was_not_agreed_on_closes_the_link_and_changes_nothing() {
    let mut w = pair();
    w.start(0);
    w.start(1);
    w.until("the copies agree", 2000, |w| w.settled(&[0, 1]));
    let session = w.sessions[&(1, 0)];
    let [a, b] = [0, 4096].map(|slot| {
        let block = &w.nodes[0].disk.meta[&(0, slot)];
        block.as_slice().try_into().unwrap()
    });
    let incarnation = superblock::choose(&a, &b).unwrap().0.incarnation;
    let before = w.nodes[1].disk.meta.clone();
    let header = FrameHeader {
        version: WIRE_VERSION + 1,
        kind: FrameKind::Heartbeat,
        flags: FrameFlags::default(),
        payload_length: 0,
        payload_crc: 0,
        service_tag: 0x1111_2222_3333_4444,
        volume: VolumeIndex(0),
        epoch: Epoch::NONE,
        generation: GenerationId(0),
        incarnation,
        position: 0,
        dependency: 0,
        stable_position: 0,
        offset: 0,
        length: 0,
    };
    let beat = |w: &mut World, version| {
        let event = Event::Control {
            peer: Slot(0),
            session,
            header: FrameHeader { version, ..header },
            body: Body::Empty,
        };
        w.event(1, event);
    };
    beat(&mut w, WIRE_VERSION);
    assert_eq!(w.sessions.get(&(1, 0)), Some(&session), "as agreed");
    beat(&mut w, WIRE_VERSION + 1);
    assert_ne!(w.sessions.get(&(1, 0)), Some(&session), "closed");
    let said = |part: &str| w.nodes[1].notices.iter().any(|n| n.text.contains(part));
    assert!(said("its wire version is not the one agreed on"));
    assert_eq!(w.nodes[1].disk.meta, before);
}
