//! The bytes of frames.

mod body;
mod header;
mod hello;
mod version;

pub use body::{decode_body, encode_body, encode_body_for};
pub use header::{check_payload, decode_header, encode_header, payload_crc};
pub use version::{
    Agreed, KNOWN_FEATURES, VersionError, Versions, WIRE_VERSION, WIRE_VERSION_MIN, agree,
};

use crate::frame::FrameKind;

/// Why bytes are no frame. The link is closed with the reason; nothing of the frame was applied, and
/// everything acknowledged before it stands (D14).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error(
        "the bytes received are not a Holdfast frame; nothing was applied; check that the configured address and port belong to a Holdfast node"
    )]
    Magic,
    #[error(
        "the header's checksum does not match: it was damaged between the nodes; nothing was applied; if it repeats, check network card and memory"
    )]
    HeaderCrc,
    #[error(
        "the frame is of wire version {0}, this side speaks {WIRE_VERSION_MIN} to {WIRE_VERSION}; nothing was applied; upgrade the older node"
    )]
    Version(u8),
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    #[error("the payload of {0} bytes is larger than allowed")]
    TooLong(u32),
    #[error(
        "the payload does not have the length and checksum its header announced: it was damaged between the nodes; nothing of it was applied; if it repeats, check network card and memory"
    )]
    PayloadCrc,
    #[error("the header is malformed: {0}")]
    Header(&'static str),
    #[error("the payload of a {kind:?} frame is malformed: {fault}")]
    Body {
        kind: FrameKind,
        fault: &'static str,
    },
    #[error("a {kind:?} frame cannot carry this body ({fault}): it was not sent; this is a defect")]
    Unencodable {
        kind: FrameKind,
        fault: &'static str,
    },
    #[error(transparent)]
    Incompatible(#[from] VersionError),
}
