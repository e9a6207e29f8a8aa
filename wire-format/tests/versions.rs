//! Frames of other versions: what is understood whatever the version, and what is refused with which words.

mod common;

use common::examples::{PAYLOAD, header, hello};
use common::sample::{FramePayload, Sample};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::*;

/// The encoded header of a frame of that kind and version.
fn of(kind: FrameKind, version: u8) -> [u8; HEADER_LENGTH] {
    let payload_length = if kind.carries_data() {
        PAYLOAD.len() as u32
    } else {
        0
    };
    encode_header(&FrameHeader {
        version,
        kind,
        payload_length,
        payload_crc: if payload_length == 0 { 0 } else { 1 },
        ..header()
    })
}

#[test]
fn hello_and_goodbye_are_read_in_any_version_and_nothing_else_is() {
    for kind in FrameKind::ALL {
        for version in 0..=u8::MAX {
            let read = decode_header(&of(*kind, version));
            let spoken = (WIRE_VERSION_MIN..=WIRE_VERSION).contains(&version);
            let first_words = matches!(kind, FrameKind::Hello | FrameKind::Goodbye);
            if spoken || first_words && version != 0 {
                assert_eq!(read.map(|h| (h.kind, h.version)), Ok((*kind, version)));
            } else {
                assert_eq!(read, Err(FrameError::Version(version)), "{kind:?}");
            }
        }
    }
}

#[test]
fn a_frame_of_a_foreign_version_says_which_and_what_to_do() {
    let text = decode_header(&of(FrameKind::Write, 9))
        .unwrap_err()
        .to_string();
    for part in [
        "wire version 9",
        "this side speaks 1 to 1",
        "nothing was applied",
        "upgrade the older node",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn hello_bytes() -> Vec<u8> {
    encode_body_for(FrameKind::Hello, &Body::Hello(Box::new(hello()))).unwrap()
}

#[test]
fn a_hello_of_the_future_may_have_longer_sections_and_more_of_them() {
    let bytes = hello_bytes();
    let mut longer = bytes[..18].to_vec();
    let mut at = 18;
    while at < bytes.len() {
        let length = usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let section = [&bytes[at + 2..at + 2 + length], b"more"].concat();
        longer.extend_from_slice(&(section.len() as u16).to_le_bytes());
        longer.extend_from_slice(&section);
        at += 2 + length;
    }
    longer.extend_from_slice(&[3, 0, 7, 8, 9]);
    let same = Ok(Body::Hello(Box::new(hello())));
    assert_eq!(decode_body(FrameKind::Hello, &longer), same);
    // But not a section that is cut off.
    longer.extend_from_slice(&[3, 0, 7]);
    assert!(decode_body(FrameKind::Hello, &longer).is_err());
}

#[test]
fn a_hello_without_the_names_of_volumes_tells_none() {
    let bytes = hello_bytes();
    let mut at = 18;
    for _ in 0..5 {
        at += 2 + usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    }
    let mut unnamed = hello();
    for volume in &mut unnamed.facts.volumes {
        assert!(!volume.name.is_empty());
        volume.name.clear();
        volume.room = 0;
    }
    assert_eq!(
        decode_body(FrameKind::Hello, &bytes[..at]),
        Ok(Body::Hello(Box::new(unnamed)))
    );
    // Names that are cut off are no names.
    let names_end = at + 2 + usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    assert!(decode_body(FrameKind::Hello, &bytes[..names_end - 1]).is_err());
    // And one that tells names may tell no room.
    let mut roomless = hello();
    for volume in &mut roomless.facts.volumes {
        volume.room = 0;
    }
    assert_eq!(
        decode_body(FrameKind::Hello, &bytes[..names_end]),
        Ok(Body::Hello(Box::new(roomless)))
    );
    assert!(decode_body(FrameKind::Hello, &bytes[..bytes.len() - 1]).is_err());
}

#[test]
fn a_hello_that_cannot_be_read_says_so_by_its_version_if_that_is_why() {
    let unreadable = |min: u8, max: u8, required: u64| {
        let mut bytes = vec![min, max];
        bytes.extend_from_slice(&required.to_le_bytes());
        bytes.extend_from_slice(&required.to_le_bytes());
        bytes.extend_from_slice(b"sections as nobody knows them yet");
        decode_body(FrameKind::Hello, &bytes).unwrap_err()
    };
    let too_new = FrameError::Incompatible(VersionError::Version {
        theirs_min: 8,
        theirs_max: 9,
        ours_min: WIRE_VERSION_MIN,
        ours_max: WIRE_VERSION,
    });
    assert_eq!(unreadable(8, 9, 0), too_new);
    let lacks = FrameError::Incompatible(VersionError::Features(4));
    assert_eq!(unreadable(1, 2, 4), lacks);
    // A neighbour's hello that makes no sense is a bad frame and nothing else.
    assert!(matches!(unreadable(1, 1, 0), FrameError::Body { .. }));
}

#[test]
fn a_goodbye_of_any_version_says_its_reason() {
    let goodbye = Body::Goodbye {
        code: GoodbyeCode::Refused,
        text: "wire versions 7 to 8".into(),
    };
    for version in [1, 7, 255] {
        let header = FrameHeader {
            version,
            kind: FrameKind::Goodbye,
            ..header()
        };
        let frame = Sample::frame(header, FramePayload::Body(goodbye.clone()));
        assert_eq!(frame.decode_as(&frame.encode()), Ok(frame));
    }
}
