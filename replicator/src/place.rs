//! Where a volume's data and metadata are on its backing.
//!
//! External metadata begins at byte 0 of a file or device of its own. Internal metadata lies behind the data, and
//! the last block of the backing, the *locator*, says where:
//!
//! ```text
//! | data ........................ | metadata area | locator |
//! 0                               area_offset               end of the backing, in whole blocks
//! ```
//!
//! The locator is found from the size alone. Whoever moves the area writes the new one completely and durably
//! first, and the new locator last: one block, whose content lies in its first 512 bytes and so is never torn.
//! When a device has grown, the locator is no longer at its end; the size it had is remembered in the state
//! directory ([`Hints`]).

use crate::config::{MetadataPlace, VolumeConfig};
use holdfast_disk::{Backing, DiskError, OpenError, OpenOptions};
use holdfast_wire_format::locator::LocatorError;
use holdfast_wire_format::superblock::{self, SUPERBLOCK_LENGTH};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use holdfast_wire_format::layout::BLOCK;
pub use holdfast_wire_format::locator::Locator;

/// Why a volume's parts could not be found or opened.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("volume {volume}: {source}")]
    Open { volume: String, source: OpenError },
    #[error("volume {volume}: {source}. Nothing was changed")]
    Disk { volume: String, source: DiskError },
    #[error("volume {volume}: {source}. Nothing was changed")]
    Locate { volume: String, source: LocateError },
    #[error(
        "volume {volume}: {} has no Holdfast metadata at its end. Nothing was changed. If it is new, run `holdfast volume create`; \
         if the device was made smaller, give it back its size{hint}", path.display()
    )]
    NoLocator {
        volume: String,
        path: PathBuf,
        hint: String,
    },
    #[error("volume {volume}: {} is {size} bytes, too small for {needed}. Nothing was changed; use a larger device", path.display())]
    TooSmall {
        volume: String,
        path: PathBuf,
        size: u64,
        needed: String,
    },
}

/// One step of a change whose order makes a crash harmless, told before it is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step<'a> {
    /// The file or device it is about.
    pub path: &'a Path,
    pub kind: StepKind,
}

/// What a [`Step`] does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StepKind {
    /// Makes a file longer.
    Lengthen,
    /// Writes these bytes.
    Write { offset: u64, length: u64 },
    /// Makes what was written durable.
    Flush,
    /// Puts a new file in the place of the old one.
    Replace,
}

/// Told of each step before it is taken.
pub type Before<'a> = &'a dyn Fn(Step);

/// A backing that says what is about to be done to it.
#[derive(Clone, Copy)]
pub(crate) struct Told<'a> {
    pub backing: &'a Backing,
    pub before: Before<'a>,
}

impl Told<'_> {
    /// As [`Backing::write_all_at`].
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let length = bytes.len() as u64;
        (self.before)(Step {
            path: self.backing.path(),
            kind: StepKind::Write { offset, length },
        });
        self.backing.write_all_at(offset, bytes)
    }

    /// As [`Backing::sync`].
    pub fn sync(&self) -> Result<(), DiskError> {
        (self.before)(Step {
            path: self.backing.path(),
            kind: StepKind::Flush,
        });
        self.backing.sync()
    }

    /// Writes zeroes over a range of whole sectors, durably. Blocks.
    pub fn zero(&self, from: u64, to: u64) -> Result<(), DiskError> {
        let zeroes = vec![0; 4 << 20];
        let mut at = from;
        while at < to {
            let length = (to - at).min(zeroes.len() as u64);
            self.write_all_at(at, &zeroes[..length as usize])?;
            at += length;
        }
        self.sync()
    }
}

/// The locator of a backing, looked for where a backing of `size` bytes has it. Blocks.
///
/// # Errors
/// The device fails, or the locator is of a newer version. One that is damaged counts as none.
pub fn read_locator(backing: &Backing, size: u64) -> Result<Option<Locator>, LocateError> {
    let size = size.min(backing.size());
    let Some(offset) = Locator::offset(size) else {
        return Ok(None);
    };
    let mut block = [0; BLOCK as usize];
    backing.read_exact_at(offset, &mut block)?;
    match Locator::decode(&block, size) {
        Ok(locator) => Ok(Some(locator)),
        Err(newer @ LocatorError::Newer { .. }) => Err(newer.into()),
        Err(_) => Ok(None),
    }
}

/// Why it is not known whether a backing has a locator, or where it points.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Newer(#[from] LocatorError),
}

/// A volume's open backing and where its metadata is.
#[derive(Debug)]
pub struct Opened {
    pub data: Backing,
    /// With external metadata: its own backing.
    pub external: Option<Backing>,
    /// Byte offset of the metadata area in its backing.
    pub base: u64,
    /// Bytes from the start of `data` that may hold data.
    pub data_limit: u64,
    /// Bytes the metadata may use.
    pub area_size: u64,
}

impl Opened {
    /// The backing the metadata is in.
    pub fn metadata(&self) -> &Backing {
        self.external.as_ref().unwrap_or(&self.data)
    }
}

/// Opens and locks the backing of a volume. Blocks.
///
/// # Errors
/// It cannot be opened, is in use or locked.
pub fn open_backing(
    volume: &str,
    path: &Path,
    options: &OpenOptions,
) -> Result<Backing, PlaceError> {
    Backing::open(path, options).map_err(|source| PlaceError::Open {
        volume: volume.to_owned(),
        source,
    })
}

/// Opens a volume that has metadata. Blocks.
///
/// # Errors
/// A backing cannot be opened, or no metadata is where it should be.
pub fn open(
    config: &VolumeConfig,
    options: &OpenOptions,
    hint: Option<u64>,
) -> Result<Opened, PlaceError> {
    let name = config.name.as_str();
    let options = OpenOptions {
        sector_size: config.sector_size,
        ..options.clone()
    };
    let data = open_backing(name, &config.backing, &options)?;
    let disk = |source| PlaceError::Disk {
        volume: name.to_owned(),
        source,
    };
    match &config.metadata {
        MetadataPlace::External(path) => {
            let external = open_backing(
                name,
                path,
                &OpenOptions {
                    sector_size: None,
                    // A backing of its own has a switchboard of its own.
                    #[cfg(feature = "fault-injection")]
                    fault_control: options
                        .fault_control
                        .as_ref()
                        .map(|socket| socket.with_extension("metadata.sock")),
                    ..options
                },
            )?;
            let (data_limit, area_size) = (data.size(), external.size());
            Ok(Opened {
                data,
                external: Some(external),
                base: 0,
                data_limit,
                area_size,
            })
        }
        MetadataPlace::Internal => {
            let locate = |size| {
                read_locator(&data, size).map_err(|source| PlaceError::Locate {
                    volume: name.to_owned(),
                    source,
                })
            };
            let mut found = locate(data.size())?;
            if let (None, Some(size)) = (found, hint.filter(|size| *size < data.size())) {
                found = locate(size)?;
            }
            match found {
                Some(locator) => Ok(Opened {
                    data: {
                        if !options.read_only && may_write(&data, locator).map_err(disk)? {
                            finish_growing(
                                Told {
                                    backing: &data,
                                    before: &|_| (),
                                },
                                locator,
                            )
                            .map_err(disk)?;
                        }
                        data
                    },
                    external: None,
                    base: locator.area_offset,
                    data_limit: locator.area_offset,
                    area_size: locator.area_size,
                }),
                None => Err(PlaceError::NoLocator {
                    volume: name.to_owned(),
                    path: config.backing.clone(),
                    hint: hint.map_or(String::new(), |size| {
                        format!(" ({size} bytes when it was last used)")
                    }),
                }),
            }
        }
    }
}

/// False if the metadata there is damaged or of a version that this one may not write past. Whoever goes on with such a
/// volume reads the same superblock and refuses with the reason.
fn may_write(data: &Backing, locator: Locator) -> Result<bool, DiskError> {
    let mut slots = [[0; SUPERBLOCK_LENGTH]; 2];
    for (number, slot) in slots.iter_mut().enumerate() {
        data.read_exact_at(locator.area_offset + number as u64 * BLOCK, slot)?;
    }
    Ok(superblock::choose(&slots[0], &slots[1])
        .is_ok_and(|(sb, _)| superblock::unknown_read_only_features(&sb) == 0))
}

/// Zeroes what a volume was grown over, if that was not finished, and says so in the locator. Nothing else may use the
/// backing before: another copy has zeroes there.
pub(crate) fn finish_growing(data: Told, locator: Locator) -> Result<(), DiskError> {
    let (from, to) = locator.zero;
    if from < to {
        data.zero(from, to)?;
        let done = Locator {
            zero: (0, 0),
            ..locator
        };
        if let Some(at) = Locator::offset(data.backing.size()) {
            data.write_all_at(at, &done.encode())?;
        }
        data.sync()?;
    }
    Ok(())
}

/// The sizes that backings with internal metadata had when they were last used, in `places.json` of the state
/// directory. Only a help to find a locator after a device has grown: losing it loses nothing else.
#[derive(Default, Debug, Serialize, Deserialize)]
pub struct Hints {
    sizes: BTreeMap<String, u64>,
}

impl Hints {
    const FILE: &str = "places.json";

    /// What was remembered; nothing if the file is missing or damaged.
    pub fn load(state_dir: &Path) -> Hints {
        let bytes = std::fs::read(state_dir.join(Self::FILE)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn key(service: &str, volume: &str) -> String {
        format!("{service}/{volume}")
    }

    /// The size in bytes that the backing of this volume had.
    pub fn size(&self, service: &str, volume: &str) -> Option<u64> {
        self.sizes.get(&Self::key(service, volume)).copied()
    }

    /// Remembers a size; true if that is news.
    pub fn set(&mut self, service: &str, volume: &str, size: u64) -> bool {
        self.sizes.insert(Self::key(service, volume), size) != Some(size)
    }

    /// Forgets a volume.
    pub fn remove(&mut self, service: &str, volume: &str) {
        self.sizes.remove(&Self::key(service, volume));
    }

    /// Replaces the file. Blocks.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn store(&self, state_dir: &Path) -> io::Result<()> {
        let path = state_dir.join(Self::FILE);
        let new = state_dir.join("places.json.new");
        let mut file = std::fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        std::fs::File::open(state_dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_survive_and_damage_means_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut hints = Hints::load(dir.path());
        assert!(hints.set("db", "data", 4096) && !hints.set("db", "data", 4096));
        hints.store(dir.path()).unwrap();
        assert_eq!(Hints::load(dir.path()).size("db", "data"), Some(4096));
        std::fs::write(dir.path().join(Hints::FILE), "{").unwrap();
        assert_eq!(Hints::load(dir.path()).size("db", "data"), None);
    }
}
