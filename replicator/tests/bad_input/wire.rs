//! A peer that sends garbage, at every point of the protocol: it is refused with a reason, nothing on this side changes, and
//! the application goes on (D14).

use crate::rogue::{Rogue, Session, connect_silently, framed};
use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use crate::{event, says};
use holdfast_link::Identity;
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::CopyState;

/// Where the rogue turns.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Point {
    /// Instead of its hello.
    Hello,
    /// Instead of its `Ready`, after both hellos.
    Ready,
    /// Once the copies stand established.
    Established,
    /// Toward the source of a resync, of which it is the target.
    Source,
}

/// A primary that takes the rogue for a copy that needs everything, and a secondary that takes it for its equal.
const EVERYWHERE: [(RoleName, Point); 5] = [
    (RoleName::Primary, Point::Hello),
    (RoleName::Primary, Point::Ready),
    (RoleName::Primary, Point::Source),
    (RoleName::Secondary, Point::Hello),
    (RoleName::Secondary, Point::Established),
];

struct Good {
    node: TestNode,
    rogue: Rogue,
    rogue_node: TestNode,
    /// What the volume holds.
    data: Vec<u8>,
    epoch: u64,
    role: RoleName,
}

async fn good(root: &std::path::Path, role: RoleName) -> Good {
    let settings = Settings::default();
    let [mut node, rogue_node] = two_nodes(root);
    // The rogue sends no heartbeats, and a busy machine may keep it from its next words for a while.
    node.more = "[service.tuning]\npeer_timeout_ms = 60000\n".into();
    node.create(&settings);
    let address = node.start(&settings, None).await;
    if role == RoleName::Primary {
        node.command(Command::Promote { force: true })
            .await
            .unwrap();
        let socket = node.dir.join("nbd.sock");
        blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            for at in 0..16u64 {
                nbd.write(at << 20, &[at as u8 + 1; 65536], false).unwrap();
            }
            nbd.flush().unwrap();
        })
        .await;
    }
    let rogue = Rogue::connect(&rogue_node, address).await;
    let data = node.on_disk(settings.size);
    let epoch = node.service().await.epoch.number;
    Good {
        node,
        rogue,
        rogue_node,
        data,
        epoch,
        role,
    }
}

/// What the rogue says of itself: the twin of the node's own copy, or one that has nothing yet.
fn facts_of(theirs: &Hello, rogue: &TestNode, blank: bool) -> Hello {
    let mut facts = theirs.facts.clone();
    let identity = Identity::load(&rogue.state()).unwrap();
    facts.slot = Slot(rogue.slot);
    facts.disk = Uuid(0x0d15c);
    facts.incarnation = Incarnation(77);
    facts.attach_counter = 1;
    facts.is_primary = false;
    facts.flags.was_primary = false;
    facts.flags.unclean = false;
    facts.unclean_start = false;
    facts.issued = facts.position;
    facts.about_peer = PeerFacts::default();
    if let Some(generation) = facts.generations.last() {
        facts.about_peer.bitmap_base = generation.id;
    }
    // The twin of a copy that reads zero everywhere is one, too.
    let zeroed = facts.flags.zeroed;
    for volume in &mut facts.volumes {
        volume.disk = Uuid(0x0d15c);
        volume.blank = blank;
    }
    if blank {
        facts.state = CopyState::Blank;
        facts.generations.clear();
        facts.position = 0;
        facts.issued = 0;
        facts.flags = Default::default();
    } else if !zeroed {
        facts.state = CopyState::UpToDate;
    }
    Hello::new(identity.id(), Slot(rogue.slot), theirs.service, facts)
}

/// A session brought to that point, and the header of a frame that would fit there.
async fn at(good: &Good, point: Point) -> (Session, FrameHeader) {
    let mut session = good.rogue.session().await;
    let (mut header, body) = session.until(FrameKind::Hello).await;
    let Body::Hello(theirs) = body else {
        unreachable!("a hello has a hello in it");
    };
    header.incarnation = Incarnation(77);
    header.position = 0;
    header.dependency = 0;
    header.stable_position = 0;
    if point == Point::Hello {
        return (session, header);
    }
    let hello = facts_of(&theirs, &good.rogue_node, point == Point::Source);
    header.kind = FrameKind::Hello;
    session.say(header, &Body::Hello(Box::new(hello))).await;
    if point == Point::Ready {
        return (session, header);
    }
    header.kind = FrameKind::Ready;
    let wanted = if point == Point::Source {
        session
            .say(
                FrameHeader {
                    kind: FrameKind::BitmapEnd,
                    ..header
                },
                &Body::Empty,
            )
            .await;
        LinkName::Resync
    } else {
        loop {
            match session.frame().await {
                Ok((header, _)) if header.kind == FrameKind::Ready => break,
                Ok(_) => {}
                Err(end) => {
                    let events = crate::events(&good.node);
                    let last = &events[events.len().saturating_sub(6)..];
                    panic!("{end} at {point:?}: {last:#?}");
                }
            }
        }
        LinkName::Established
    };
    session.say(header, &Body::Empty).await;
    good.node
        .until("the copies stand as wanted", |s| s.peers[0].link == wanted)
        .await;
    (session, header)
}

/// The node is as it was: role, epoch, every byte, and the application goes on.
async fn unharmed(good: &mut Good, after: &str) {
    let report = good.node.service().await;
    assert_eq!(
        (report.role, report.epoch.number),
        (good.role, good.epoch),
        "after {after}: {report:#?}"
    );
    assert!(
        good.node.on_disk(good.data.len() as u64) == good.data,
        "after {after}"
    );
    if good.role != RoleName::Primary {
        return;
    }
    assert_eq!(report.state, StateName::UpToDate, "after {after}");
    let socket = good.node.dir.join("nbd.sock");
    let (held, fill) = (good.data.clone(), good.data[512].wrapping_add(1));
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        let now: Vec<u8> = (0..held.len() as u64)
            .step_by(1 << 20)
            .flat_map(|at| nbd.read(at, 1 << 20).unwrap())
            .collect();
        assert!(now == held, "the data changed");
        nbd.write(0, &[fill; 4096], true).unwrap();
    })
    .await;
    good.data[..4096].fill(fill);
    assert!(
        good.node.on_disk(good.data.len() as u64) == good.data,
        "after {after}"
    );
}

/// Bytes that are no frame, or one that no peer may send anywhere. The stream must end.
fn corruptions(header: FrameHeader) -> Vec<(String, Vec<u8>, bool)> {
    let payload = [7; 4096];
    let write = FrameHeader {
        kind: FrameKind::Write,
        position: 1 << 40,
        ..header
    };
    let whole = framed(write, &payload);
    let mut all = vec![
        ("noise".to_owned(), vec![0xa5; 8192], false),
        ("zeroes".into(), vec![0; HEADER_LENGTH], false),
        ("half a header".into(), whole[..50].to_vec(), true),
        ("half a payload".into(), whole[..2000].to_vec(), true),
    ];
    for at in (0..HEADER_LENGTH).step_by(11) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        all.push((format!("bit at {at} of the header"), bytes, false));
    }
    let mut bytes = whole.clone();
    bytes[HEADER_LENGTH + 100] ^= 1;
    all.push(("a bit of the payload".into(), bytes, false));
    // With checksums that are right.
    let mut patched = |name: &str, at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        let end = HEADER_LENGTH - 4;
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..HEADER_LENGTH].copy_from_slice(&crc.to_le_bytes());
        all.push((name.to_owned(), bytes, false));
    };
    patched(
        "a payload over the limit",
        8,
        &(MAX_PAYLOAD + 1).to_le_bytes(),
    );
    patched("a payload of 4 GiB", 8, &u32::MAX.to_le_bytes());
    patched("an unknown kind", 5, &[250]);
    patched("version 0", 4, &[0]);
    patched("a version of the future", 4, &[200]);
    patched("reserved bits", 7, &[1]);
    patched("another service", 16, &[0xee; 8]);
    patched("a range beyond every volume", 88, &u64::MAX.to_le_bytes());
    patched("a length unlike the payload", 28, &1u32.to_le_bytes());
    all
}

/// Has the rogue send each of these at that point, once it stands there; `finish` ends the stream behind the bytes. Every
/// session must end, and the node be as it was.
async fn each(
    root: &std::path::Path,
    (role, point): (RoleName, Point),
    bad: impl Fn(FrameHeader) -> Vec<(String, Vec<u8>, bool)>,
) {
    let mut at_all = 0;
    let mut good = good(&root.join("0"), role).await;
    for number in 0.. {
        if number > 0 && point == Point::Established {
            // Copies that stood established once meet in another way the next time.
            good.node.stop().await;
            good = self::good(&root.join(number.to_string()), role).await;
        }
        let (mut session, header) = at(&good, point).await;
        let mut all = bad(header);
        at_all = at_all.max(all.len());
        let (name, bytes, finish) = all.swap_remove(number);
        session.write(&bytes).await;
        if finish {
            let _ = session.send.finish();
        }
        session.closed().await;
        let report = good
            .node
            .until("the session is gone", |s| {
                !matches!(s.peers[0].link, LinkName::Established | LinkName::Resync)
            })
            .await;
        let text = format!("{name} at {point:?}");
        assert!(!report.peers[0].last_error.is_empty(), "{text}");
        if point == Point::Established || number + 1 == at_all {
            unharmed(&mut good, &text).await;
        }
        if number + 1 == at_all {
            break;
        }
    }
    event(&good.node, "link-down", &[]).await;
    good.node.stop().await;
}

#[tokio::test]
async fn frames_that_are_none_end_the_stream_at_every_point() {
    let root = tempfile::tempdir().unwrap();
    for (role, point) in EVERYWHERE {
        let root = root.path().join(format!("{role}-{point:?}"));
        each(&root, (role, point), corruptions).await;
    }
}

/// Frames that are well formed and come out of turn, with bodies that are none and with empty ones. Those a peer may send are
/// taken; the others end the stream, as the noise behind each does at the latest. Whichever it is, this copy stays what it was.
#[tokio::test]
async fn every_kind_of_frame_out_of_turn_harms_nothing_at_every_point() {
    let root = tempfile::tempdir().unwrap();
    let kinds: Vec<FrameKind> = (0..=255).filter_map(FrameKind::from_code).collect();
    assert!(kinds.len() > 20);
    for (role, point) in EVERYWHERE {
        let root = root.path().join(format!("{role}-{point:?}"));
        let out_of_turn = |header: FrameHeader| {
            let frame = |kind: FrameKind, body: &[u8]| {
                let header = FrameHeader {
                    kind,
                    position: 1 << 40,
                    ..header
                };
                let bytes = [framed(header, body), vec![0xa5; HEADER_LENGTH]].concat();
                (format!("{kind:?} with {} bytes", body.len()), bytes, false)
            };
            kinds
                .iter()
                .flat_map(|&kind| [frame(kind, &[]), frame(kind, &[0x5a; 64])])
                .collect()
        };
        each(&root, (role, point), out_of_turn).await;
    }
}

#[tokio::test]
async fn a_peer_of_another_wire_version_is_told_and_both_numbers_are_shown() {
    let root = tempfile::tempdir().unwrap();
    let mut good = good(root.path(), RoleName::Primary).await;
    let mut session = good.rogue.session().await;
    let (mut header, body) = session.until(FrameKind::Hello).await;
    let Body::Hello(theirs) = body else {
        unreachable!("a hello has a hello in it");
    };
    let mut hello = facts_of(&theirs, &good.rogue_node, false);
    (hello.version_min, hello.version_max) = (41, 42);
    header.incarnation = Incarnation(77);
    session.say(header, &Body::Hello(Box::new(hello))).await;
    session.closed().await;
    let report = good
        .node
        .until("the link is off", |s| s.peers[0].link == LinkName::Off)
        .await;
    says(&report.peers[0].last_error, &["41", "42", "version"]);
    event(&good.node, "link-down", &["41", "42"]).await;
    assert!(!report.healthy());
    unharmed(&mut good, "another version").await;
    good.node.stop().await;
}

#[tokio::test]
async fn noise_before_the_service_ends_the_connection_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let mut good = good(root.path(), RoleName::Primary).await;
    let address = good.node.replicator.as_ref().unwrap().addresses().link[0];
    for noise in [
        vec![0xff; 64],
        b"\0\0\0\x05hello".to_vec(),
        message("{\"Hello\":{\"newest\":9,\"oldest\":9,\"fingerprints\":[]}}"),
        message("{\"Wanted\":{}}"),
    ] {
        let (connection, _endpoint) = connect_silently(&good.rogue_node, address).await;
        let mut send = connection.open_uni().await.unwrap();
        send.write_all(&noise).await.unwrap();
        let closed = tokio::time::timeout(std::time::Duration::from_secs(20), connection.closed());
        let closed = closed.await.expect("closed in time");
        assert!(
            matches!(closed, quinn::ConnectionError::ApplicationClosed(_)),
            "{closed}"
        );
    }
    event(&good.node, "path-failed", &["9 to 9", "upgrade the older"]).await;
    // Streams that ask for nothing known.
    let rogue = Rogue::connect(&good.rogue_node, address).await;
    rogue.open(&[0xee; 20]).await.closed().await;
    let words = [&b"HFS1"[..], &[0xee; 16]].concat();
    let mut unknown = rogue.open(&words).await;
    says(&unknown.refusal().await, &["eeee", "no copy was changed"]);
    event(&good.node, "service-unknown", &["eeee"]).await;
    unharmed(&mut good, "noise").await;
    good.node.stop().await;
}

fn message(json: &str) -> Vec<u8> {
    let mut bytes = (json.len() as u32).to_be_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes
}
