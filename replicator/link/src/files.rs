//! Small state files: read whole, replaced whole, readable by their owner alone.

use crate::error::LinkError;
use holdfast_wire_format::ids::Uuid;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Format number of every file here.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    format: u32,
    #[serde(flatten)]
    content: T,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

/// Reads `path`; `None` if there is no such file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LinkError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(LinkError::file("read", path)(e)),
    };
    let damaged = |e: serde_json::Error| LinkError::Damaged {
        path: path.into(),
        detail: e.to_string(),
    };
    // The number first: a newer format may lack fields that this version wants.
    let FormatOnly { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format > FORMAT {
        return Err(LinkError::Newer {
            path: path.into(),
            found: format,
            known: FORMAT,
        });
    }
    let envelope: Envelope<T> = serde_json::from_slice(&bytes).map_err(damaged)?;
    Ok(Some(envelope.content))
}

/// Replaces `path` durably: after a crash it holds the old or the new content, never a mixture.
pub(crate) fn replace<T: Serialize>(path: &Path, content: &T) -> Result<(), LinkError> {
    let dir = path
        .parent()
        .expect("state files lie in the state directory");
    let temporary = path.with_extension("new");
    let mut bytes = serde_json::to_vec_pretty(&Envelope {
        format: FORMAT,
        content,
    })
    .expect("state values have string keys only");
    bytes.push(b'\n');
    // A leftover of a crash may be there with any mode; a fresh file has ours.
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(LinkError::file("remove", &temporary)(e));
        }
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(LinkError::file("create", &temporary))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(LinkError::file("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(LinkError::file("replace", path))?;
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(LinkError::file("flush", dir))
}

/// Creates the state directory, closed to others, if it is missing.
pub(crate) fn create_dir(dir: &Path) -> Result<(), LinkError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(LinkError::file("create", dir))
}

/// Keeps other processes (the command line beside the daemon) out of read-change-write until dropped.
pub(crate) struct Locked {
    _file: File,
}

pub(crate) fn lock(dir: &Path) -> Result<Locked, LinkError> {
    let path = dir.join("link.lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(LinkError::file("open", &path))?;
    flock(&file, FlockOperation::LockExclusive)
        .map_err(|e| LinkError::file("lock", &path)(e.into()))?;
    Ok(Locked { _file: file })
}

/// Lower-case hex of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// At most `limit` bytes of pairs of hex digits, or `None`.
pub(crate) fn unhexed(text: &str, limit: usize) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2)
        || text.len() / 2 > limit
        || !text.bytes().all(|b| b.is_ascii_hexdigit())
    {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

/// Bytes of `N` pairs of hex digits, or `None`.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

/// A node or service id as 32 hex digits, in files and control messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HexId(pub Uuid);

impl Serialize for HexId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for HexId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        unhex::<16>(&text)
            .map(|bytes| HexId(Uuid(u128::from_be_bytes(bytes))))
            .ok_or_else(|| serde::de::Error::custom("an id has 32 hex digits"))
    }
}
