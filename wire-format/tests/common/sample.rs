//! Anything that has a byte layout, in one type: what all tests of the formats run over.

use super::examples::*;
use super::strategies::*;
use super::{reseal, reseal_frame};
use holdfast_wire_format::activity_log::{self, LogBlock};
use holdfast_wire_format::bitmap_page::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::*;
use holdfast_wire_format::ids::VolumeIndex;
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock;
use holdfast_wire_format::time_index::{self, TimeIndexBlock};
use holdfast_wire_format::undo_record::*;
use proptest::prelude::*;

#[derive(Clone, PartialEq, Debug)]
pub enum Sample {
    /// Length and checksum in the header are those of the payload.
    Frame(FrameHeader, FramePayload),
    Superblock(Box<Superblock>),
    Page {
        volume: VolumeIndex,
        peer: u8,
        page: u64,
        words: Vec<u64>,
    },
    Summary {
        volume: VolumeIndex,
        peer: u8,
        number: u64,
        entries: Vec<u8>,
    },
    LogBlock(LogBlock),
    UndoHead(UndoHead),
    UndoRecord(UndoRecord),
    TimeIndex(TimeIndexBlock),
    /// And the size of its backing.
    Locator(Locator, u64),
}

#[derive(Clone, PartialEq, Debug)]
pub enum FramePayload {
    Data(Vec<u8>),
    Body(Body),
}

fn block(bytes: &[u8]) -> Result<&[u8; 4096], String> {
    bytes.try_into().map_err(|_| "not 4096 bytes".to_owned())
}

impl Sample {
    /// A frame with the header's length and checksum set.
    pub fn frame(mut header: FrameHeader, payload: FramePayload) -> Sample {
        let bytes = match &payload {
            FramePayload::Data(data) => data.clone(),
            FramePayload::Body(body) => encode_body_for(header.kind, body).unwrap(),
        };
        header.payload_length = bytes.len() as u32;
        header.payload_crc = payload_crc(&bytes);
        if header.kind.carries_data() {
            header.length = header.payload_length;
        }
        Sample::Frame(header, payload)
    }

    pub fn encode(&self) -> Vec<u8> {
        match self {
            Sample::Frame(header, payload) => {
                let mut bytes = encode_header(header).to_vec();
                match payload {
                    FramePayload::Data(data) => bytes.extend_from_slice(data),
                    FramePayload::Body(body) => bytes.extend(encode_body(body)),
                }
                bytes
            }
            Sample::Superblock(sb) => superblock::encode(sb).unwrap().to_vec(),
            Sample::Page {
                volume,
                peer,
                page,
                words,
            } => encode_page(*volume, *peer, *page, words[..].try_into().unwrap()).to_vec(),
            Sample::Summary {
                volume,
                peer,
                number,
                entries,
            } => encode_summary(*volume, *peer, *number, entries).to_vec(),
            Sample::LogBlock(t) => activity_log::encode(t).to_vec(),
            Sample::UndoHead(head) => encode_head(head).to_vec(),
            Sample::UndoRecord(record) => encode_record(record).unwrap().to_vec(),
            Sample::TimeIndex(index) => time_index::encode(index).unwrap().to_vec(),
            Sample::Locator(locator, _) => locator.encode().to_vec(),
        }
    }

    /// Reads bytes as what `self` is, with what `self` knows besides them (which page, of which peer, ...).
    pub fn decode_as(&self, bytes: &[u8]) -> Result<Sample, String> {
        let words = |e: &dyn std::error::Error| e.to_string();
        Ok(match self {
            Sample::Frame(..) => {
                let (header, payload) = bytes
                    .split_first_chunk::<HEADER_LENGTH>()
                    .ok_or("no whole header")?;
                let header = decode_header(header).map_err(|e| words(&e))?;
                check_payload(&header, payload).map_err(|e| words(&e))?;
                let payload = if header.kind.carries_data() {
                    FramePayload::Data(payload.to_vec())
                } else {
                    FramePayload::Body(decode_body(header.kind, payload).map_err(|e| words(&e))?)
                };
                Sample::Frame(header, payload)
            }
            Sample::Superblock(_) => Sample::Superblock(Box::new(
                superblock::decode(block(bytes)?).map_err(|e| words(&e))?,
            )),
            Sample::Page {
                volume, peer, page, ..
            } => Sample::Page {
                volume: *volume,
                peer: *peer,
                page: *page,
                words: decode_page(block(bytes)?, *volume, *peer, *page)
                    .map_err(|e| words(&e))?
                    .to_vec(),
            },
            Sample::Summary {
                volume,
                peer,
                number,
                ..
            } => Sample::Summary {
                volume: *volume,
                peer: *peer,
                number: *number,
                entries: decode_summary(block(bytes)?, *volume, *peer, *number)
                    .map_err(|e| words(&e))?
                    .to_vec(),
            },
            Sample::LogBlock(_) => {
                Sample::LogBlock(activity_log::decode(block(bytes)?).map_err(|e| words(&e))?)
            }
            Sample::UndoHead(_) => {
                Sample::UndoHead(decode_head(block(bytes)?).map_err(|e| words(&e))?)
            }
            Sample::UndoRecord(_) => {
                Sample::UndoRecord(decode_record(block(bytes)?).map_err(|e| words(&e))?)
            }
            Sample::TimeIndex(_) => {
                Sample::TimeIndex(time_index::decode(block(bytes)?).map_err(|e| words(&e))?)
            }
            Sample::Locator(_, size) => Sample::Locator(
                Locator::decode(block(bytes)?, *size).map_err(|e| words(&e))?,
                *size,
            ),
        })
    }

    /// Bytes that mean something; what lies behind them is not looked at.
    pub fn meaningful(&self, bytes: &[u8]) -> usize {
        match self {
            // One sector, which no write tears.
            Sample::Locator(..) => 512,
            _ => bytes.len(),
        }
    }

    /// Puts the right checksums into changed bytes, so that what is checked behind them is reached.
    pub fn reseal(&self, bytes: &mut [u8]) {
        match self {
            Sample::Frame(..) if bytes.len() >= HEADER_LENGTH => reseal_frame(bytes),
            _ if bytes.len() != 4096 => {}
            Sample::Frame(..) => {}
            Sample::Superblock(_) => reseal(bytes, 8, 12..4096),
            Sample::Locator(..) => reseal(bytes, 72, 0..72),
            _ => reseal(bytes, 4, 8..4096),
        }
    }
}

/// `FlushAck` → `flush-ack`.
fn dashed(kind: FrameKind) -> String {
    let mut name = String::new();
    for (at, letter) in format!("{kind:?}").chars().enumerate() {
        if letter.is_uppercase() && at > 0 {
            name.push('-');
        }
        name.extend(letter.to_lowercase());
    }
    name
}

/// One of everything: every kind of frame, every structure on disk. Names are file names.
pub fn all() -> Vec<(String, Sample)> {
    let mut all = Vec::new();
    for kind in FrameKind::ALL {
        let header = FrameHeader {
            kind: *kind,
            ..header()
        };
        let name = format!("frame-{}", dashed(*kind));
        if kind.carries_data() {
            let data = FramePayload::Data(PAYLOAD.to_vec());
            all.push((name, Sample::frame(header, data)));
        } else if kind.carries(&Body::Empty) {
            let empty = FramePayload::Body(Body::Empty);
            all.push((name, Sample::frame(header, empty)));
        } else {
            for (at, (_, _, body)) in bodies().into_iter().filter(|b| b.1 == *kind).enumerate() {
                let name = match at {
                    0 => name.clone(),
                    _ => format!("{name}-{}", at + 1),
                };
                all.push((name, Sample::frame(header, FramePayload::Body(body))));
            }
        }
    }
    let on_disk = [
        ("superblock", Sample::Superblock(Box::new(superblock()))),
        (
            "bitmap-page",
            Sample::Page {
                volume: VolumeIndex(0x21),
                peer: 5,
                page: 0x1_0203_0405,
                words: page_words().to_vec(),
            },
        ),
        (
            "bitmap-summary",
            Sample::Summary {
                volume: VolumeIndex(0x21),
                peer: 5,
                number: 0x0203_0405,
                entries: summary_entries().to_vec(),
            },
        ),
        ("activity-log", Sample::LogBlock(log_block())),
        ("undo-head", Sample::UndoHead(undo_head())),
        ("undo-record", Sample::UndoRecord(undo_record())),
        ("time-index", Sample::TimeIndex(time_index())),
        ("locator", Sample::Locator(locator().0, locator().1)),
    ];
    all.extend(on_disk.map(|(name, sample)| (name.to_owned(), sample)));
    all
}

/// Everything that may be encoded.
pub fn any_sample() -> impl Strategy<Value = Sample> {
    let frame = (
        any_header(),
        any_body(),
        proptest::collection::vec(any::<u8>(), 0..2000),
    )
        .prop_map(|(mut header, (kind, body), data)| {
            if header.kind.carries_data() {
                return Sample::frame(header, FramePayload::Data(data));
            }
            header.kind = kind;
            if !kind.precedes_agreement() {
                header.version = WIRE_VERSION;
            }
            Sample::frame(header, FramePayload::Body(body))
        });
    let page = (0..64u16, 0..7u8, any::<u64>());
    prop_oneof![
        4 => frame,
        2 => any_superblock().prop_map(|sb| Sample::Superblock(Box::new(sb))),
        1 => (page.clone(), proptest::collection::vec(any::<u64>(), PAGE_WORDS)).prop_map(
            |((volume, peer, page), words)| {
                Sample::Page { volume: VolumeIndex(volume), peer, page, words }
            }
        ),
        1 => (page, proptest::collection::vec(0..3u8, SUMMARY_ENTRIES)).prop_map(
            |((volume, peer, number), entries)| {
                Sample::Summary { volume: VolumeIndex(volume), peer, number, entries }
            }
        ),
        1 => any_log_block().prop_map(Sample::LogBlock),
        1 => any_undo_head().prop_map(Sample::UndoHead),
        1 => any_undo_record().prop_map(Sample::UndoRecord),
        1 => any_time_index().prop_map(Sample::TimeIndex),
        1 => any_locator().prop_map(|(locator, size)| Sample::Locator(locator, size)),
    ]
}
