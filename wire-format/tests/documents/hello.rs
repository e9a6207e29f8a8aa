//! `docs/wire.md`: the `Hello`.

use crate::common::examples::hello;
use crate::common::sample::Sample;
use crate::frames::framed;
use crate::tables::{Change, Structure, check, generation_at, short};
use holdfast_wire_format::frame::*;
use holdfast_wire_format::metadata::*;
use std::ops::Range;

fn hello_frame(hello: Hello) -> Sample {
    framed(FrameKind::Hello, Body::Hello(Box::new(hello)))
}

/// Places of the sections' contents in an encoded frame.
fn sections() -> Vec<Range<usize>> {
    let bytes = hello_frame(hello()).encode();
    let mut at = HEADER_LENGTH + 18;
    let mut sections = Vec::new();
    while at < bytes.len() {
        let length = usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        sections.push(at + 2..at + 2 + length);
        at += 2 + length;
    }
    sections
}

#[test]
fn hello_versions_and_sections() {
    let part = |heading, place, changes: &[Change<Hello>]| {
        check(Structure {
            document: "wire",
            heading,
            base: hello(),
            wrap: hello_frame,
            place,
            changes,
        });
    };
    part(
        "Versions of a Hello",
        HEADER_LENGTH..HEADER_LENGTH + 18,
        &[
            ("oldest version", &[], |h| h.version_min = 9),
            ("newest version", &[], |h| h.version_max = 9),
            ("required features", &[], |h| {
                h.features_required = !h.features_required
            }),
            ("features", &[], |h| {
                h.features_supported = !h.features_supported
            }),
        ],
    );
    let sections = sections();
    assert_eq!(sections.len(), 7);
    part(
        "Section 1: who",
        sections[0].clone(),
        &[
            ("node", &[], |h| h.node.0 = !h.node.0),
            ("slot", &[], |h| h.slot.0 = 6),
            ("service", &[], |h| h.service.0 = !h.service.0),
            ("software length", &[], |h| h.software.push('x')),
            ("software", &[], |h| h.software = h.software.to_uppercase()),
        ],
    );
    part(
        "Section 2: the copy",
        sections[1].clone(),
        &[
            ("slot", &[], |h| h.facts.slot.0 = 6),
            ("disk", &[], |h| h.facts.disk.0 = !h.facts.disk.0),
            ("attach counter", &[], |h| {
                h.facts.attach_counter = !h.facts.attach_counter
            }),
            ("incarnation", &[], |h| {
                h.facts.incarnation.0 = !h.facts.incarnation.0
            }),
            ("epoch number", &[], |h| {
                h.facts.epoch.number = !h.facts.epoch.number
            }),
            ("epoch owner", &[], |h| h.facts.epoch.owner = 6),
            ("state", &[], |h| h.facts.state = CopyState::Failed),
            ("copy flags", &[], |h| h.facts.flags.solo = true),
            ("conditions", &[], |h| h.facts.is_primary = true),
            ("mode", &[], |h| h.facts.mode = Mode::Async),
            ("on peer loss", &[], |h| {
                h.facts.on_peer_loss = OnPeerLoss::Suspend
            }),
            ("position", &[], |h| h.facts.position = !h.facts.position),
            ("issued", &[], |h| h.facts.issued = !h.facts.issued),
            ("target of", &[], |h| {
                h.facts.target_of.0 = !h.facts.target_of.0
            }),
            ("target source", &[], |h| h.facts.target_source = 6),
            ("before resync generation", &[], |h| {
                h.facts.before_resync.0.0 = !h.facts.before_resync.0.0
            }),
            ("before resync position", &[], |h| {
                h.facts.before_resync.1 = !h.facts.before_resync.1
            }),
            ("in sync", &[], |h| h.facts.in_sync.0 = !h.facts.in_sync.0),
            ("in sync version", &[], |h| {
                h.facts.in_sync_version = !h.facts.in_sync_version
            }),
            ("in sync pending", &[], |h| {
                h.facts.in_sync_pending.0 = !h.facts.in_sync_pending.0
            }),
        ],
    );
    part(
        "Section 3: generations",
        sections[2].clone(),
        &[
            ("generation count", &[], |h| short(&mut h.facts.generations)),
            ("generations", &[], |h| {
                h.facts.generations[0].id.0 = !h.facts.generations[0].id.0
            }),
        ],
    );
    generation_at(
        sections[2].start + 2 + 40,
        hello(),
        hello_frame,
        &[
            ("id", &[], |h| h.facts.generations[1].id.0 = !0),
            ("parent", &[], |h| h.facts.generations[1].parent.0 = !0),
            ("fork position", &[], |h| {
                h.facts.generations[1].fork_position = !0
            }),
            ("epoch number", &[], |h| {
                h.facts.generations[1].epoch.number = !1
            }),
            ("epoch owner", &[], |h| {
                h.facts.generations[1].epoch.owner = 6
            }),
            ("cause", &[], |h| {
                h.facts.generations[1].cause = GenerationCause::Force
            }),
            ("maker", &[], |h| h.facts.generations[1].maker = 6),
        ],
    );
    part(
        "Section 4: volumes",
        sections[3].clone(),
        &[
            ("volume count", &[], |h| short(&mut h.facts.volumes)),
            ("volumes", &[], |h| h.facts.volumes[0].index.0 = 9),
        ],
    );
    let second = sections[3].start + 2 + 48;
    part(
        "A volume in a Hello",
        second..second + 48,
        &[
            ("index", &[], |h| h.facts.volumes[1].index.0 = 9),
            ("volume", &[], |h| h.facts.volumes[1].volume.0 = !0),
            ("disk", &[], |h| h.facts.volumes[1].disk.0 = !0),
            ("size", &[], |h| h.facts.volumes[1].size = !0),
            ("sector size", &[], |h| h.facts.volumes[1].sector_size = !0),
            ("grain shift", &[], |h| h.facts.volumes[1].grain_shift = !0),
            ("blank", &[], |h| h.facts.volumes[1].blank = false),
        ],
    );
    part(
        "Section 5: about the receiver",
        sections[4].clone(),
        &[
            ("knowledge", &[], |h| h.facts.about_peer.full_copy = false),
            ("disk", &[], |h| h.facts.about_peer.disk.0 = !0),
            ("attach counter", &[], |h| {
                h.facts.about_peer.attach_counter = !0
            }),
            ("incarnation", &[], |h| {
                h.facts.about_peer.incarnation.0 = !0
            }),
            ("bitmap base", &[], |h| {
                h.facts.about_peer.bitmap_base.0 = !0
            }),
            ("bits", &[], |h| h.facts.about_peer.bits = !0),
            ("bytes", &[], |h| h.facts.about_peer.bytes = !0),
            ("durable generation", &[], |h| {
                h.facts.about_peer.known_durable_generation.0 = !0
            }),
            ("durable position", &[], |h| {
                h.facts.about_peer.known_durable_position = !0
            }),
        ],
    );
    part(
        "Section 6: names of the volumes",
        sections[5].clone(),
        &[("names", &[], |h| h.facts.volumes[0].name.clear())],
    );
    let second = sections[5].start + 2 + "data".len();
    part(
        "A name in a Hello",
        second..sections[5].end,
        &[
            ("name length", &[], |h| h.facts.volumes[1].name.push('x')),
            ("name", &[], |h| h.facts.volumes[1].name = "REDO-LOG".into()),
        ],
    );
    part(
        "Section 7: room for the volumes",
        sections[6].clone(),
        &[("rooms", &[], |h| h.facts.volumes[0].room = !0)],
    );
}
