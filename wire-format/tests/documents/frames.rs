//! `docs/wire.md`.

use crate::common::examples::{self, bodies};
use crate::common::sample::{FramePayload, Sample};
use crate::tables::{
    Change, Structure, check, codes, features, generation_at, says, table, thousands,
};
use holdfast_wire_format::bitmap_page::BITS_PER_PAGE;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{KNOWN_FEATURES, WIRE_VERSION, WIRE_VERSION_MIN};
use holdfast_wire_format::metadata::*;

#[test]
fn header() {
    check(Structure::<FrameHeader> {
        document: "wire",
        heading: "Header",
        base: examples::header(),
        wrap: |header| Sample::Frame(header, FramePayload::Data(Vec::new())),
        place: 0..HEADER_LENGTH,
        changes: &[
            ("version", &[], |h| h.version = 0x31),
            ("kind", &[], |h| h.kind = FrameKind::Zero),
            ("flags", &[], |h| h.flags.unmap = true),
            ("payload length", &[], |h| {
                h.payload_length = !h.payload_length
            }),
            ("payload crc", &[], |h| h.payload_crc = !h.payload_crc),
            ("service tag", &[], |h| h.service_tag = !h.service_tag),
            ("volume", &[], |h| h.volume.0 = !h.volume.0),
            ("epoch owner", &[], |h| h.epoch.owner = !h.epoch.owner),
            ("length", &[], |h| h.length = !h.length),
            ("epoch number", &[], |h| h.epoch.number = !h.epoch.number),
            ("generation", &[], |h| h.generation.0 = !h.generation.0),
            ("incarnation", &[], |h| h.incarnation.0 = !h.incarnation.0),
            ("position", &[], |h| h.position = !h.position),
            ("dependency", &[], |h| h.dependency = !h.dependency),
            ("stable position", &[], |h| {
                h.stable_position = !h.stable_position
            }),
            ("offset", &[], |h| h.offset = !h.offset),
        ],
    });
}

#[test]
fn kinds_and_codes() {
    let kinds = FrameKind::ALL
        .iter()
        .map(|kind| (kind.code(), format!("{kind:?}")));
    codes("wire", "Kinds", kinds);
    for (cells, kind) in table("wire", "Kinds").iter().zip(FrameKind::ALL) {
        let payload = if kind.carries_data() {
            "data"
        } else if kind.carries(&Body::Empty) {
            "none"
        } else {
            "body"
        };
        assert_eq!(cells[2], payload, "{kind:?}");
    }
    codes(
        "wire",
        "Goodbye codes",
        GoodbyeCode::ALL
            .iter()
            .map(|c| (c.code(), format!("{c:?}"))),
    );
    codes(
        "metadata",
        "States",
        CopyState::ALL.iter().map(|c| (c.code(), format!("{c:?}"))),
    );
    codes(
        "metadata",
        "Causes",
        GenerationCause::ALL
            .iter()
            .map(|c| (c.code(), format!("{c:?}"))),
    );
    codes(
        "metadata",
        "Modes",
        Mode::ALL.iter().map(|c| (c.code(), format!("{c:?}"))),
    );
    codes(
        "metadata",
        "Policies",
        OnPeerLoss::ALL.iter().map(|c| (c.code(), format!("{c:?}"))),
    );
}

pub fn framed(kind: FrameKind, body: Body) -> Sample {
    let header = FrameHeader {
        kind,
        ..examples::header()
    };
    Sample::frame(header, FramePayload::Body(body))
}

/// The example of that kind's body.
fn example(kind: FrameKind) -> Body {
    bodies()
        .into_iter()
        .find(|body| body.1 == kind)
        .expect("an example")
        .2
}

fn body(heading: &str, kind: FrameKind, wrap: fn(Body) -> Sample, changes: &[Change<Body>]) {
    check(Structure {
        document: "wire",
        heading,
        base: example(kind),
        wrap,
        place: HEADER_LENGTH..usize::MAX,
        changes,
    });
}

/// Changes one field of one kind of body.
macro_rules! set {
    ($body:ident, $variant:ident { $field:ident } => $change:expr) => {
        |$body| match $body {
            Body::$variant { $field, .. } => $change,
            other => panic!("{other:?}"),
        }
    };
}

#[test]
fn other_bodies() {
    use FrameKind as K;
    body(
        "Bitmap",
        K::Bitmap,
        |b| framed(K::Bitmap, b),
        &[
            ("volume", &[], set!(b, Bitmap { volume } => volume.0 = 9)),
            (
                "grain shift",
                &[],
                set!(b, Bitmap { grain_shift } => *grain_shift = 99),
            ),
            ("page", &[], set!(b, Bitmap { page } => *page = !*page)),
            (
                "word count",
                &[],
                set!(b, Bitmap { words } => words.clear()),
            ),
            (
                "words",
                &[],
                set!(b, Bitmap { words } => words[0] = !words[0]),
            ),
        ],
    );
    body(
        "Goodbye",
        K::Goodbye,
        |b| framed(K::Goodbye, b),
        &[
            (
                "code",
                &[],
                set!(b, Goodbye { code } => *code = GoodbyeCode::Again),
            ),
            (
                "text length",
                &[],
                set!(b, Goodbye { text } => text.push('x')),
            ),
            (
                "text",
                &[],
                set!(b, Goodbye { text } => *text = text.to_uppercase()),
            ),
        ],
    );
    for (kind, wrap) in [
        (
            K::WriteAck,
            (|b| framed(K::WriteAck, b)) as fn(Body) -> Sample,
        ),
        (K::ResyncAck, |b| framed(K::ResyncAck, b)),
    ] {
        body(
            "WriteAck and ResyncAck",
            kind,
            wrap,
            &[
                (
                    "run count",
                    &[],
                    set!(b, Acks { runs } => runs.push((1 << 40, 1 << 40))),
                ),
                ("runs", &[], set!(b, Acks { runs } => runs[0].0 = 2)),
            ],
        );
    }
    check(Structure::<Body> {
        document: "wire",
        heading: "A run",
        base: example(K::WriteAck),
        wrap: |b| framed(K::WriteAck, b),
        place: HEADER_LENGTH + 4 + 2 * 16..HEADER_LENGTH + 4 + 3 * 16,
        changes: &[
            ("first", &[], set!(b, Acks { runs } => runs[2].0 += 1)),
            ("last", &[], set!(b, Acks { runs } => runs[2].1 += 1)),
        ],
    });
    body(
        "FlushAck",
        K::FlushAck,
        |b| framed(K::FlushAck, b),
        &[
            (
                "position",
                &[],
                set!(b, FlushAck { position } => *position = !*position),
            ),
            (
                "resync sequence",
                &[],
                set!(b, FlushAck { resync_sequence } => *resync_sequence = !*resync_sequence),
            ),
        ],
    );
    body(
        "ResyncDone",
        K::ResyncDone,
        |b| framed(K::ResyncDone, b),
        &[
            (
                "position",
                &[],
                set!(b, ResyncDone { position } => *position = !*position),
            ),
            (
                "equal",
                &[],
                set!(b, ResyncDone { equal } => equal.0 = !equal.0),
            ),
        ],
    );
    body(
        "InSync",
        K::InSync,
        |b| framed(K::InSync, b),
        &[
            ("set", &[], set!(b, InSync { set } => set.0 = !set.0)),
            (
                "version",
                &[],
                set!(b, InSync { version } => *version = !*version),
            ),
        ],
    );
    body(
        "PromoteRequest",
        K::PromoteRequest,
        |b| framed(K::PromoteRequest, b),
        &[
            (
                "epoch number",
                &[],
                set!(b, PromoteRequest { epoch } => epoch.number = !epoch.number),
            ),
            (
                "epoch owner",
                &[],
                set!(b, PromoteRequest { epoch } => epoch.owner = 6),
            ),
            (
                "set",
                &[],
                set!(b, PromoteRequest { in_sync } => in_sync.0 = !in_sync.0),
            ),
            (
                "force",
                &[],
                set!(b, PromoteRequest { force } => *force = !*force),
            ),
        ],
    );
    body(
        "PromoteReply",
        K::PromoteReply,
        |b| framed(K::PromoteReply, b),
        &[
            (
                "epoch number",
                &[],
                set!(b, PromoteReply { epoch } => epoch.number = !epoch.number),
            ),
            (
                "epoch owner",
                &[],
                set!(b, PromoteReply { epoch } => epoch.owner = 6),
            ),
            (
                "accepted",
                &[],
                set!(b, PromoteReply { accepted } => *accepted = true),
            ),
            (
                "reason length",
                &[],
                set!(b, PromoteReply { reason } => reason.push('x')),
            ),
            (
                "reason",
                &[],
                set!(b, PromoteReply { reason } => *reason = reason.to_uppercase()),
            ),
        ],
    );
    body(
        "NewGeneration",
        K::NewGeneration,
        |b| framed(K::NewGeneration, b),
        &[(
            "generation",
            &[],
            set!(b, NewGeneration { generation } => generation.id.0 = !0),
        )],
    );
    generation_at(
        HEADER_LENGTH,
        example(K::NewGeneration),
        |b| framed(K::NewGeneration, b),
        &[
            (
                "id",
                &[],
                set!(b, NewGeneration { generation } => generation.id.0 = !0),
            ),
            (
                "parent",
                &[],
                set!(b, NewGeneration { generation } => generation.parent.0 = !0),
            ),
            (
                "fork position",
                &[],
                set!(b, NewGeneration { generation } => generation.fork_position = !0),
            ),
            (
                "epoch number",
                &[],
                set!(b, NewGeneration { generation } => generation.epoch.number = !0),
            ),
            (
                "epoch owner",
                &[],
                set!(b, NewGeneration { generation } => generation.epoch.owner = 6),
            ),
            (
                "cause",
                &[],
                set!(b, NewGeneration { generation } => generation.cause = GenerationCause::Force),
            ),
            (
                "maker",
                &[],
                set!(b, NewGeneration { generation } => generation.maker = 6),
            ),
        ],
    );
    body(
        "GenerationAck",
        K::GenerationAck,
        |b| framed(K::GenerationAck, b),
        &[(
            "generation",
            &[],
            set!(b, GenerationAck { generation } => generation.0 = !0),
        )],
    );
    body(
        "VerifyRequest",
        K::VerifyRequest,
        |b| framed(K::VerifyRequest, b),
        &[
            (
                "sequence",
                &[],
                set!(b, Verify { sequence } => *sequence = !0),
            ),
            (
                "digest",
                &[],
                set!(b, Verify { digest } => *digest = !*digest),
            ),
        ],
    );
    body(
        "VerifyReply",
        K::VerifyReply,
        |b| framed(K::VerifyReply, b),
        &[
            (
                "sequence",
                &[],
                set!(b, VerifyReply { sequence } => *sequence = !0),
            ),
            (
                "result",
                &[],
                set!(b, VerifyReply { equal } => *equal = true),
            ),
        ],
    );
    body(
        "DiskLost",
        K::DiskLost,
        |b| framed(K::DiskLost, b),
        &[
            (
                "cause",
                &[],
                set!(b, DiskLost { generation_cause } => *generation_cause = GenerationCause::Force),
            ),
            (
                "position",
                &[],
                set!(b, DiskLost { position } => *position = !*position),
            ),
        ],
    );
    body(
        "Grow",
        K::Grow,
        |b| framed(K::Grow, b),
        &[
            ("size", &[], set!(b, Grow { size } => *size = !*size)),
            (
                "step",
                &[],
                set!(b, Grow { step } => *step = GrowStep::Room),
            ),
            ("text length", &[], set!(b, Grow { text } => text.push('x'))),
            (
                "text",
                &[],
                set!(b, Grow { text } => *text = text.to_uppercase()),
            ),
        ],
    );
}

#[test]
fn every_body_has_a_table() {
    for kind in FrameKind::ALL {
        let has_body = !kind.carries_data() && !kind.carries(&Body::Empty);
        if has_body
            && !matches!(
                kind,
                FrameKind::Hello | FrameKind::WriteAck | FrameKind::ResyncAck
            )
        {
            table("wire", &format!("{kind:?}"));
        }
    }
}

#[test]
fn numbers_in_sentences() {
    says(
        "wire",
        &[
            format!(
                "This program: versions {WIRE_VERSION_MIN} to {WIRE_VERSION}, features: {}.",
                features(KNOWN_FEATURES)
            ),
            format!("a header of {HEADER_LENGTH} bytes"),
            format!("at most {MAX_ACK_RUNS} |"),
            format!("| {BITMAP_WORDS}, or 0: all bits"),
            format!("`page` × {}", thousands(BITS_PER_PAGE)),
        ],
    );
}
