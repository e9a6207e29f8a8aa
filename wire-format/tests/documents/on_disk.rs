//! `docs/metadata.md`.

use crate::common::examples::{self, *};
use crate::common::sample::Sample;
use crate::tables::{
    Change, Structure, check, features, generation_at, says, short, table, thousands,
};
use holdfast_wire_format::activity_log::{ExtentKey, LogBlock};
use holdfast_wire_format::bitmap_page::{BITS_PER_PAGE, SUMMARY_ENTRIES};
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock::{FEATURE_JOURNAL, KNOWN_INCOMPATIBLE, KNOWN_READ_ONLY};
use holdfast_wire_format::time_index::TimeIndexBlock;
use holdfast_wire_format::undo_record::{OldContent, UndoHead, UndoRecord};
use std::fmt::Debug;

fn superblock_sample(sb: Superblock) -> Sample {
    Sample::Superblock(Box::new(sb))
}

#[test]
fn superblock() {
    let part = |heading, place, changes: &[Change<Superblock>]| {
        check(Structure {
            document: "metadata",
            heading,
            base: examples::superblock(),
            wrap: superblock_sample,
            place,
            changes,
        });
    };
    part(
        "Superblock",
        0..4096,
        &[
            ("read-only features", &[], |s| s.features_read_only = !0),
            ("compatible features", &[], |s| {
                s.features_compatible = !s.features_compatible
            }),
            ("sequence", &[], |s| s.sequence = !s.sequence),
            ("service", &[], |s| s.service.0 = !s.service.0),
            ("volume", &[], |s| s.volume.0 = !s.volume.0),
            ("node", &[], |s| s.node.0 = !s.node.0),
            ("disk", &[], |s| s.disk.0 = !s.disk.0),
            ("volume index", &[], |s| s.volume_index.0 = 9),
            ("volume count", &[], |s| s.volume_count = !s.volume_count),
            ("slot", &[], |s| s.slot.0 = 6),
            ("grain shift", &[], |s| s.grain_shift = 13),
            ("extent shift", &[], |s| s.extent_shift = 23),
            ("data size", &[], |s| s.data_size = 0x3e0e_0e0e_f000),
            ("room", &["incompatible features"], |s| {
                s.room = 0x3e0e_0e0e_f000
            }),
            ("sector size", &[], |s| s.sector_size = 512),
            ("activity log blocks", &[], |s| s.al_blocks = 0x0807),
            ("undo size", &[], |s| s.undo_size = 0x00ee_eeee_eeee_eeee),
            ("journal size", &[], |s| {
                s.journal_size = 0x00ee_eeee_eeee_eeee
            }),
            ("area size", &[], |s| s.area_size = !s.area_size),
            ("service name length", &["service name"], |s| {
                s.service_name.truncate(62)
            }),
            ("service name", &[], |s| s.service_name = "x".repeat(63)),
            ("volume name length", &["volume name"], |s| {
                s.volume_name.push('x')
            }),
            ("volume name", &[], |s| {
                s.volume_name = s.volume_name.to_uppercase()
            }),
            ("attach counter", &[], |s| {
                s.attach_counter = !s.attach_counter
            }),
            ("incarnation", &[], |s| s.incarnation.0 = !s.incarnation.0),
            ("epoch gate number", &[], |s| {
                s.epoch_gate.number = !s.epoch_gate.number
            }),
            ("epoch gate owner", &[], |s| s.epoch_gate.owner = 6),
            ("state", &[], |s| s.state = CopyState::Failed),
            ("copy flags", &[], |s| s.flags.zeroed = true),
            ("target source", &[], |s| s.target_source = 6),
            ("mode", &[], |s| s.mode = Mode::SemiSync),
            ("on peer loss", &[], |s| {
                s.on_peer_loss = OnPeerLoss::Suspend
            }),
            ("in sync", &[], |s| s.in_sync.0 = !s.in_sync.0),
            ("in sync pending", &[], |s| {
                s.in_sync_pending.0 = !s.in_sync_pending.0
            }),
            ("target of", &[], |s| s.target_of.0 = !s.target_of.0),
            ("before resync generation", &[], |s| {
                s.before_resync.0.0 = !s.before_resync.0.0
            }),
            ("before resync position", &[], |s| {
                s.before_resync.1 = !s.before_resync.1
            }),
            ("in sync version", &[], |s| {
                s.in_sync_version = !s.in_sync_version
            }),
            ("position", &[], |s| s.position = !s.position),
            ("generation base", &[], |s| {
                s.generation_base = !s.generation_base
            }),
            ("generation count", &["generations"], |s| {
                short(&mut s.generations)
            }),
            ("list flags", &[], |s| {
                s.generations_cut = !s.generations_cut
            }),
            ("disk count", &["volume disks"], |s| {
                short(&mut s.volume_disks)
            }),
            ("generations", &[], |s| s.generations[0].id.0 = !0),
            ("volume disks", &[], |s| s.volume_disks[0].0 = !0),
            ("peers", &[], |s| {
                s.peers[0].full_copy = !s.peers[0].full_copy
            }),
        ],
    );
    generation_at(
        512 + 40,
        examples::superblock(),
        superblock_sample,
        &[
            ("id", &[], |s| s.generations[1].id.0 = !0),
            ("parent", &[], |s| s.generations[1].parent.0 = !0),
            ("fork position", &[], |s| {
                s.generations[1].fork_position = !0
            }),
            ("epoch number", &[], |s| s.generations[1].epoch.number = !1),
            ("epoch owner", &[], |s| s.generations[1].epoch.owner = 6),
            ("cause", &[], |s| {
                s.generations[1].cause = GenerationCause::Force
            }),
            ("maker", &[], |s| s.generations[1].maker = 6),
        ],
    );
    for end in [0, MAX_PEERS - 1] {
        let changes: &[Change<Superblock>] = if end == 0 { &PEER_0 } else { &PEER_6 };
        let at = 2496 + end * 104;
        part("Peer record", at..at + 104, changes);
    }
}

/// The fields of one peer record; its place pins the distance between two.
macro_rules! peer_record {
    ($at:literal) => {
        [
            ("record flags", &[], |s| {
                s.peers[$at].full_copy = !s.peers[$at].full_copy
            }),
            ("slot", &[], |s| s.peers[$at].slot ^= 1),
            ("mode", &[], |s| {
                s.peers[$at].mode = (s.peers[$at].mode + 1) % 3
            }),
            ("node", &[], |s| s.peers[$at].node.0 = !0),
            ("disk", &[], |s| s.peers[$at].disk.0 = !0),
            ("attach counter", &[], |s| s.peers[$at].attach_counter = !0),
            ("incarnation", &[], |s| s.peers[$at].incarnation.0 = !0),
            ("bitmap base", &[], |s| s.peers[$at].bitmap_base.0 = !0),
            ("durable generation", &[], |s| {
                s.peers[$at].known_durable_generation.0 = !0
            }),
            ("durable position", &[], |s| {
                s.peers[$at].known_durable_position = !0
            }),
        ]
    };
}
const PEER_0: [Change<Superblock>; 10] = peer_record!(0);
const PEER_6: [Change<Superblock>; 10] = peer_record!(6);

#[derive(Clone, Debug)]
struct Numbered<T> {
    volume: VolumeIndex,
    peer: u8,
    number: u64,
    content: Vec<T>,
}

fn numbered<T>(content: &[T]) -> Numbered<T>
where
    T: Clone,
{
    Numbered {
        volume: VolumeIndex(3),
        peer: 5,
        number: 0x1_0203_0405,
        content: content.to_vec(),
    }
}

#[test]
fn bitmap() {
    check(Structure::<Numbered<u64>> {
        document: "metadata",
        heading: "Bitmap page",
        base: numbered(&page_words()),
        wrap: |it| Sample::Page {
            volume: it.volume,
            peer: it.peer,
            page: it.number,
            words: it.content,
        },
        place: 0..4096,
        changes: &[
            ("volume", &[], |it| it.volume.0 = !it.volume.0),
            ("peer", &[], |it| it.peer = !it.peer),
            ("number", &[], |it| it.number = !it.number),
            ("words", &[], |it| it.content[0] = !it.content[0]),
        ],
    });
    check(Structure::<Numbered<u8>> {
        document: "metadata",
        heading: "Bitmap summary",
        base: numbered(&summary_entries()),
        wrap: |it| Sample::Summary {
            volume: it.volume,
            peer: it.peer,
            number: it.number,
            entries: it.content,
        },
        place: 0..4096,
        changes: &[
            ("volume", &[], |it| it.volume.0 = !it.volume.0),
            ("peer", &[], |it| it.peer = !it.peer),
            ("number", &[], |it| it.number = !it.number),
            ("entries", &[], |it| it.content[0] ^= 1),
        ],
    });
}

#[test]
fn activity_log() {
    let part = |heading, place, changes: &[Change<LogBlock>]| {
        check(Structure {
            document: "metadata",
            heading,
            base: log_block(),
            wrap: Sample::LogBlock,
            place,
            changes,
        });
    };
    const OTHER: Option<ExtentKey> = Some(ExtentKey {
        volume: VolumeIndex(9),
        extent: 1000,
    });
    part(
        "Activity log",
        0..4096,
        &[
            ("sequence", &[], |t| t.sequence = !t.sequence),
            ("slots", &[], |t| t.slots += 1),
            ("update count", &["updates"], |t| short(&mut t.updates)),
            ("context start", &[], |t| t.context_start += 1),
            ("context count", &["context"], |t| short(&mut t.context)),
            ("updates", &[], |t| t.updates[0].0 = 1),
            ("context", &[], |t| t.context[0] = OTHER),
        ],
    );
    // Both have an entry: volume 1, extent 1000.
    part(
        "Update",
        24 + 12..24 + 24,
        &[
            ("slot", &[], |t| t.updates[1].0 += 1),
            ("entry", &[], |t| t.updates[1].1 = OTHER),
        ],
    );
    part(
        "Entry of a slot",
        792 + 8..792 + 16,
        &[
            ("volume", &[], |t| t.context[1] = OTHER),
            ("used", &["volume", "extent"], |t| t.context[1] = None),
            ("extent", &[], |t| {
                t.context[1].as_mut().unwrap().extent = !1000
            }),
        ],
    );
}

#[test]
fn undo() {
    check(Structure::<UndoHead> {
        document: "metadata",
        heading: "Undo head",
        base: undo_head(),
        wrap: Sample::UndoHead,
        place: 0..4096,
        changes: &[
            ("session", &[], |h| h.session = !h.session),
            ("target of", &[], |h| h.target_of.0 = !h.target_of.0),
            ("generation", &[], |h| h.returns_to.0.0 = !h.returns_to.0.0),
            ("position", &[], |h| h.returns_to.1 = !h.returns_to.1),
            ("state", &[], |h| h.returns_state = CopyState::Failed),
        ],
    });
    let part = |heading, place, changes: &[Change<UndoRecord>]| {
        check(Structure {
            document: "metadata",
            heading,
            base: undo_record(),
            wrap: Sample::UndoRecord,
            place,
            changes,
        });
    };
    part(
        "Undo record",
        0..4096,
        &[
            ("session", &[], |r| r.session = !r.session),
            ("target of", &[], |r| r.target_of.0 = !r.target_of.0),
            ("sequence", &[], |r| r.sequence = !r.sequence),
            ("entry count", &["entries"], |r| short(&mut r.entries)),
            ("entries of a record", &[], |r| {
                r.entries[0].offset = 0x1234_5600
            }),
        ],
    );
    part(
        "Undo entry",
        64 + 24..64 + 48,
        &[
            ("offset of an entry", &[], |r| {
                r.entries[1].offset = 0xeeee_eeee_eeee_ee00
            }),
            ("length of an entry", &[], |r| {
                r.entries[1].length = 0x000e_ee00
            }),
            ("data crc", &[], |r| {
                r.entries[1].content = OldContent::Saved { crc: !0x0101_0101 }
            }),
            ("volume", &[], |r| r.entries[1].volume.0 = 9),
            ("entry flags", &["data crc"], |r| {
                r.entries[1].content = OldContent::Zero
            }),
        ],
    );
}

#[test]
fn time_index_of_the_journal() {
    let part = |heading, place, changes: &[Change<TimeIndexBlock>]| {
        check(Structure {
            document: "metadata",
            heading,
            base: time_index(),
            wrap: Sample::TimeIndex,
            place,
            changes,
        });
    };
    part(
        "Time index",
        0..4096,
        &[
            ("sequence", &[], |t| t.sequence = !t.sequence),
            ("generation", &[], |t| t.generation.0 = !t.generation.0),
            ("entry count", &["entries"], |t| short(&mut t.entries)),
            ("entries", &[], |t| t.entries[0].position += 1),
        ],
    );
    part(
        "Time entry",
        32 + 16..32 + 32,
        &[
            ("position", &[], |t| t.entries[1].position += 1),
            ("time", &[], |t| {
                t.entries[1].time_ms = !t.entries[1].time_ms
            }),
        ],
    );
}

#[test]
fn locator_block() {
    check(Structure::<Locator> {
        document: "metadata",
        heading: "Locator",
        base: locator().0,
        wrap: |it| Sample::Locator(it, locator().1),
        place: 0..512,
        changes: &[
            ("volume", &[], |l| l.volume.0 = !l.volume.0),
            ("area offset", &[], |l| {
                l.area_offset = 0x0eee_eeee_eeee_e000
            }),
            ("area size", &[], |l| l.area_size = 0x0eee_eeee_eeee_e000),
            ("zeroed from", &[], |l| l.zero.0 = !l.zero.0),
            ("zeroed to", &[], |l| l.zero.1 = !l.zero.1),
        ],
    });
}

#[test]
fn areas() {
    let layout = Layout::new(1 << 40, 4096, 12, 22, 64, 1 << 30, 1 << 30).unwrap();
    let page = |peer| (layout.bitmap_page_offset(peer, 0), layout.pages * 4096);
    let summary = |peer| {
        (
            layout.summary_block_offset(peer, 0),
            layout.summary_blocks() * 4096,
        )
    };
    let expected = [
        ("superblock A", (0, 4096)),
        ("superblock B", (4096, 4096)),
        ("activity log", (layout.activity_log_offset, 64 * 4096)),
        ("peer 0: summary", summary(0)),
        ("peer 0: bitmap pages", page(0)),
        ("peer 1: summary", summary(1)),
        ("peer 6: bitmap pages", page(6)),
        ("undo", (layout.undo_offset, layout.undo_size)),
        ("journal", (layout.journal_offset, layout.journal_size)),
        (
            "reserve",
            (layout.reserve_offset, layout.total - layout.reserve_offset),
        ),
    ]
    .map(|(name, (offset, size))| [name.to_owned(), offset.to_string(), size.to_string()]);
    let found: Vec<Vec<String>> = table("metadata", "Areas")
        .into_iter()
        .map(|row| row[..3].to_vec())
        .collect();
    assert_eq!(found, expected.map(|row| row.to_vec()));
}

#[test]
fn numbers_in_sentences() {
    says(
        "metadata",
        &[
            format!("a block for each {SUMMARY_ENTRIES} pages"),
            format!("a block for each {} bits", thousands(BITS_PER_PAGE)),
            format!("| at most {MAX_GENERATIONS} |"),
            format!("| at most {MAX_VOLUMES} |"),
            format!(
                "| incompatible features | the volume is refused | {} |",
                features(KNOWN_INCOMPATIBLE)
            ),
        ],
    );
    // Bit 0 is named as one that this program refuses.
    assert_eq!((KNOWN_READ_ONLY, FEATURE_JOURNAL), (0, 1));
}
