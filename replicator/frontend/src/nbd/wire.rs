//! Byte layouts of the NBD protocol. All numbers are big-endian on the wire.

use crate::error::IoErrorKind;

pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

pub const OPTION_HEADER_BYTES: usize = 16;
pub const REQUEST_BYTES: usize = 28;

/// Strings (export names, messages) are at most this long, in bytes.
pub const MAX_STRING_BYTES: usize = 4096;

/// Server and client handshake flags share their values.
pub const FLAG_FIXED_NEWSTYLE: u32 = 1;
pub const FLAG_NO_ZEROES: u32 = 2;

/// Option numbers.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of option replies; those with the top bit set are errors with a message.
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUPPORTED: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_TLS_REQUIRED: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information about an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do, in its transmission flags.
pub mod export_flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const DF: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const CACHE: u16 = 1 << 10;
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Commands of the transmission phase.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of structured reply chunks.
pub mod chunk {
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// The one metadata context, and the number this server gives it.
pub const BASE_ALLOCATION: &str = "base:allocation";
pub const BASE_ALLOCATION_ID: u32 = 1;
pub const ALLOCATION_HOLE: u32 = 1;
pub const ALLOCATION_ZERO: u32 = 2;

/// The error number NBD gives to a kind of failure.
pub fn error_number(kind: IoErrorKind) -> u32 {
    match kind {
        IoErrorKind::NotPermitted => 1,
        IoErrorKind::Io => 5,
        IoErrorKind::NoMemory => 12,
        IoErrorKind::Invalid => 22,
        IoErrorKind::NoSpace => 28,
        IoErrorKind::Overflow => 75,
        IoErrorKind::NotSupported => 95,
        IoErrorKind::ShuttingDown => 108,
    }
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}

/// The first 18 bytes a server sends.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    let flags = (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) as u16;
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// The header of an option a client sends; `length` bytes of data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    pub length: u32,
}

impl OptionHeader {
    /// `None` if the magic is wrong.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        (be64(bytes) == OPTION_MAGIC).then(|| OptionHeader {
            option: be32(&bytes[8..]),
            length: be32(&bytes[12..]),
        })
    }

    pub fn encode(&self) -> [u8; OPTION_HEADER_BYTES] {
        let mut bytes = [0; OPTION_HEADER_BYTES];
        bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.to_be_bytes());
        bytes[12..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// Appends an option reply whose data is the concatenation of `parts`.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(length as u32).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Reads the fields of an option's data; every method is `None` when the data is too short or malformed.
pub struct OptionData<'a>(pub &'a [u8]);

impl<'a> OptionData<'a> {
    pub fn u16(&mut self) -> Option<u16> {
        let (head, rest) = self.0.split_at_checked(2)?;
        self.0 = rest;
        Some(be16(head))
    }

    pub fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_at_checked(4)?;
        self.0 = rest;
        Some(be32(head))
    }

    /// A length of 32 bits, then that many bytes of UTF-8 without NUL, at most [`MAX_STRING_BYTES`].
    pub fn string(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        string(head)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `bytes` as a protocol string: UTF-8, no NUL, at most [`MAX_STRING_BYTES`].
pub fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_STRING_BYTES || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// The header of a request; for a write, `length` bytes of payload follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    /// Chosen by the client, echoed in the reply, no meaning to the server.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl RequestHeader {
    /// `None` if the magic is wrong.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        (be32(bytes) == REQUEST_MAGIC).then(|| RequestHeader {
            flags: be16(&bytes[4..]),
            command: be16(&bytes[6..]),
            cookie: be64(&bytes[8..]),
            offset: be64(&bytes[16..]),
            length: be32(&bytes[24..]),
        })
    }

    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// Room for the longest reply header: a data chunk with its offset.
pub const REPLY_HEAD_BYTES: usize = 28;

/// The bytes before a reply's payload.
#[derive(Clone, Copy, Debug)]
pub struct ReplyHead {
    bytes: [u8; REPLY_HEAD_BYTES],
    length: u8,
}

impl ReplyHead {
    /// A simple reply; `error` 0 is success.
    pub fn simple(cookie: u64, error: u32) -> Self {
        let mut bytes = [0; REPLY_HEAD_BYTES];
        bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&error.to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        ReplyHead { bytes, length: 16 }
    }

    /// The only chunk of a structured reply; `payload` bytes follow.
    pub fn chunk(cookie: u64, kind: u16, payload: u32) -> Self {
        let mut bytes = [0; REPLY_HEAD_BYTES];
        bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&chunk::FLAG_DONE.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes[16..20].copy_from_slice(&payload.to_be_bytes());
        ReplyHead { bytes, length: 20 }
    }

    /// A structured read's only chunk: `length` bytes of data from `offset` follow.
    pub fn data_chunk(cookie: u64, offset: u64, length: u32) -> Self {
        let mut head = Self::chunk(cookie, chunk::OFFSET_DATA, length + 8);
        head.bytes[20..].copy_from_slice(&offset.to_be_bytes());
        head.length = 28;
        head
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// The payload of an error chunk.
pub fn error_payload(error: u32, message: &str) -> Vec<u8> {
    // A message may not exceed the string limit; cut at a character.
    let mut end = message.len().min(MAX_STRING_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let message = &message[..end];
    let mut bytes = Vec::with_capacity(6 + message.len());
    bytes.extend_from_slice(&error.to_be_bytes());
    bytes.extend_from_slice(&(message.len() as u16).to_be_bytes());
    bytes.extend_from_slice(message.as_bytes());
    bytes
}
