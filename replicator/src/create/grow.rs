//! Growing a volume: metadata for the new size, beside the old one, then the flip. Here for a stopped replicator; a running one
//! makes room with the same images ([`Images`], `shard/grow.rs`).
//!
//! Internal metadata moves to the new end of the backing:
//!
//! 1. the new area is written where neither data nor old metadata is, all but its superblocks; flush; the superblocks; flush
//! 2. the locator at the new end, which also names the range that was no data before; flush: from here on the new area
//!    counts, and a crash before this leaves the old one in force
//! 3. that range is zeroed (it holds the old area, and may hold anything), flush, and the locator says it is done
//!
//! The other copies do the same, so the grown range is equal on all of them without being copied. External metadata is
//! rewritten into a new file that replaces the old one, after the grown range was zeroed.

use super::{BLOCK, Locator, OpenOptions, VolumeError, find, place};
use crate::config::{Config, MetadataPlace};
use crate::place::{Before, Hints, Opened, Step, StepKind, Told};
use holdfast_disk::{Backing, BackingKind};
use holdfast_replicator_core::bitmap::SUMMARY_CLEAN;
use holdfast_wire_format::bitmap_page::{SUMMARY_ENTRIES, decode_summary, encode_summary};
use holdfast_wire_format::ids::{GenerationId, MAX_PEERS, VolumeIndex};
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock;
use std::path::{Path, PathBuf};

/// What grew.
#[derive(Clone, Debug)]
pub struct Grown {
    /// Bytes the application saw, and sees from the next start on.
    pub before: u64,
    pub after: u64,
    pub path: PathBuf,
}

/// Makes a volume `size` bytes large on this node, or as large as its device allows. A backing that is a regular file is
/// made longer as needed. To be done on every copy while all of them are stopped; copies of different size do not connect.
///
/// # Errors
/// The service was not stopped cleanly or is in the middle of a resync, the device is too small, or the new metadata
/// would overlap the old (grow by more).
pub fn grow(
    config: &Config,
    service: &str,
    volume: &str,
    size: Option<u64>,
) -> Result<Grown, VolumeError> {
    grow_telling(config, service, volume, size, &|_| ())
}

/// As [`grow`]; `before` is told of each step before it is taken, and may end the process there.
///
/// # Errors
/// As [`grow`].
pub fn grow_telling(
    config: &Config,
    service: &str,
    volume: &str,
    size: Option<u64>,
    before: Before,
) -> Result<Grown, VolumeError> {
    let service = find(config, service)?;
    let volume = service
        .volume(volume)
        .ok_or_else(|| VolumeError::NoVolume {
            service: service.name.clone(),
            volume: volume.to_owned(),
            file: config.file.clone(),
        })?;
    let name = volume.name.as_str();
    let state_dir = &config.node.state_dir;
    let mut hints = Hints::load(state_dir);
    let opened = place::open(
        volume,
        &OpenOptions::default(),
        hints.size(&service.name, name),
    )?;
    let refuse = |problem: String, next: &str| VolumeError::Grow {
        volume: name.to_owned(),
        problem,
        next: next.to_owned(),
    };
    let read = |source| VolumeError::Read {
        volume: name.to_owned(),
        source,
    };
    let superblock_of = |opened: &Opened| {
        let mut slots = [[0; BLOCK as usize]; 2];
        for (number, slot) in slots.iter_mut().enumerate() {
            opened
                .metadata()
                .read_exact_at(opened.base + number as u64 * BLOCK, slot)
                .map_err(read)?;
        }
        let (found, _) = superblock::choose(&slots[0], &slots[1])
            .map_err(|error| refuse(error.to_string(), "see `holdfast dump-metadata`"))?;
        match superblock::unknown_read_only_features(&found) {
            0 => Ok(found),
            features => Err(refuse(
                format!(
                    "its metadata uses features ({features:#x}) that this version may read and must not write past"
                ),
                "use the version of Holdfast that set them or a newer one",
            )),
        }
    };
    let old = superblock_of(&opened)?;
    // What holds for the service as a whole is in its first volume; opening it also makes sure that nobody runs.
    let lead = match service
        .volumes
        .first()
        .filter(|lead| lead.index != volume.index)
    {
        None => old.clone(),
        Some(lead) => {
            let hint = hints.size(&service.name, &lead.name);
            superblock_of(&place::open(lead, &OpenOptions::default(), hint)?)?
        }
    };
    if lead.flags.unclean {
        return Err(refuse(
            "its service was not stopped cleanly".into(),
            "start the replicator, let the copies meet, stop it, and grow then",
        ));
    }
    if lead.target_of != GenerationId(0) {
        return Err(refuse(
            "it is in the middle of a resync".into(),
            "let the resync finish first",
        ));
    }
    let sector = u64::from(old.sector_size);
    let layout_for = |size: u64| {
        Layout::new(
            size,
            old.sector_size,
            old.grain_shift,
            old.extent_shift,
            old.al_blocks,
            old.undo_size,
            old.journal_size,
        )
        .map_err(|source| VolumeError::Layout {
            volume: name.to_owned(),
            source,
        })
    };
    let old_layout = Layout::of(&old).map_err(|source| VolumeError::Layout {
        volume: name.to_owned(),
        source,
    })?;
    let internal = volume.metadata == MetadataPlace::Internal;
    let wanted = match size {
        Some(size) => size - size % sector,
        None if internal => {
            let device = Locator::offset(opened.data.size()).unwrap_or(0);
            let upper = layout_for(device.max(BLOCK))?.total;
            device.saturating_sub(upper) / BLOCK * BLOCK
        }
        None => opened.data.size() / sector * sector,
    };
    if wanted <= old.data_size {
        return Err(refuse(
            format!(
                "it has {} bytes already, and {wanted} were asked for or are possible",
                old.data_size
            ),
            "enlarge the device first; a volume cannot be made smaller",
        ));
    }
    if wanted <= old.room {
        // Room was made while it ran, all of it zero: one superblock is all that is missing.
        take_room(&opened, &old, wanted, name, before)?;
        return Ok(Grown {
            before: old.data_size,
            after: wanted,
            path: volume.backing.clone(),
        });
    }
    let layout = layout_for(wanted)?;
    let mut new = Superblock {
        data_size: wanted,
        room: 0,
        area_size: layout.total,
        ..old.clone()
    };
    // Above both old ones, and each in the slot its number says.
    new.sequence = old.sequence + 2;
    let images = Images {
        metadata: opened.metadata(),
        base: opened.base,
        old_layout,
        layout,
        sb: new,
        index: volume.index,
        name,
        log_counts: false,
    };
    if internal {
        let end = wanted + layout.total + BLOCK;
        let device = match opened.data.kind() {
            BackingKind::File => opened.data.size().max(end),
            _ => opened.data.size(),
        };
        let locator_at = Locator::offset(device).unwrap_or(0);
        let base = locator_at.saturating_sub(layout.total) / BLOCK * BLOCK;
        if base < wanted {
            return Err(VolumeError::TooSmall {
                volume: name.to_owned(),
                path: volume.backing.clone(),
                available: base,
                wanted,
            });
        }
        // Old area and old locator stay as they are until the flip.
        let old_end = opened.base + opened.area_size + BLOCK;
        if base < old_end {
            return Err(refuse(
                "the new metadata would lie over the old".into(),
                &format!(
                    "enlarge the device by at least {} bytes more",
                    old_end - base
                ),
            ));
        }
        grow_file(&opened.data, end, name, before)?;
        let data = Told {
            backing: &opened.data,
            before,
        };
        images.write(data, base)?;
        let locator = Locator {
            volume: old.volume,
            area_offset: base,
            area_size: layout.total,
            zero: (old.data_size, wanted),
        };
        let failed = |source| VolumeError::Write {
            volume: name.to_owned(),
            source,
        };
        data.write_all_at(locator_at, &locator.encode())
            .map_err(failed)?;
        data.sync().map_err(failed)?;
        place::finish_growing(data, locator).map_err(failed)?;
        hints.set(&service.name, name, device);
    } else {
        let MetadataPlace::External(path) = &volume.metadata else {
            return Err(refuse(
                "its metadata is nowhere".into(),
                "correct `metadata` in the configuration",
            ));
        };
        if opened.metadata().kind() != BackingKind::File {
            return Err(refuse(
                "its metadata is on a device of its own, where there is no room for a second copy of it".into(),
                "use a file for the metadata",
            ));
        }
        grow_file(&opened.data, wanted, name, before)?;
        if opened.data.size() < wanted {
            return Err(VolumeError::TooSmall {
                volume: name.to_owned(),
                path: volume.backing.clone(),
                available: opened.data.size(),
                wanted,
            });
        }
        let data = Told {
            backing: &opened.data,
            before,
        };
        data.zero(old.data_size, wanted)
            .map_err(|source| VolumeError::Write {
                volume: name.to_owned(),
                source,
            })?;
        replace_external(path, &images, before)?;
        hints.set(&service.name, name, opened.data.size());
    }
    hints.store(state_dir).map_err(|source| VolumeError::File {
        what: format!(
            "the volume has grown, but {} could not be written",
            state_dir.display()
        ),
        source,
    })?;
    Ok(Grown {
        before: old.data_size,
        after: wanted,
        path: volume.backing.clone(),
    })
}

/// Makes a regular file at least `end` bytes long; a device is as long as it is.
fn grow_file(data: &Backing, end: u64, name: &str, before: Before) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::File {
        what: format!(
            "volume {name}: {} cannot be made longer",
            data.path().display()
        ),
        source,
    };
    if data.kind() == BackingKind::File && data.size() < end {
        let file = std::fs::File::options()
            .write(true)
            .open(data.path())
            .map_err(failed)?;
        before(Step {
            path: data.path(),
            kind: StepKind::Lengthen,
        });
        file.set_len(end)
            .and_then(|()| file.sync_all())
            .map_err(failed)?;
        data.adopt_size().map_err(failed)?;
    }
    Ok(())
}

/// Takes a size that there is room for: the older of the two superblocks is written over (D16).
fn take_room(
    opened: &Opened,
    old: &Superblock,
    size: u64,
    name: &str,
    before: Before,
) -> Result<(), VolumeError> {
    let sb = Superblock {
        sequence: old.sequence + 1,
        data_size: size,
        room: if old.room > size { old.room } else { 0 },
        ..old.clone()
    };
    let image = encode(&sb, name)?;
    let told = Told {
        backing: opened.metadata(),
        before,
    };
    told.write_all_at(opened.base + slot_of(sb.sequence), &image)
        .and_then(|()| told.sync())
        .map_err(|source| VolumeError::Write {
            volume: name.to_owned(),
            source,
        })
}

/// Where in the area the superblock of that number is.
fn slot_of(sequence: u64) -> u64 {
    if sequence.is_multiple_of(2) { 0 } else { BLOCK }
}

fn encode(sb: &Superblock, name: &str) -> Result<[u8; BLOCK as usize], VolumeError> {
    superblock::encode(sb).map_err(|error| VolumeError::Grow {
        volume: name.to_owned(),
        problem: error.to_string(),
        next: "this is a defect; report it".into(),
    })
}

/// Takes a block of an area, with its place in the area.
pub(crate) type Put<'a> = &'a mut dyn FnMut(u64, &[u8; BLOCK as usize]) -> Result<(), VolumeError>;

/// The new area's contents, from the old area and a superblock that says where everything in the new one is.
pub(crate) struct Images<'a> {
    /// The backing of the old area, and where in it that is.
    pub metadata: &'a Backing,
    pub base: u64,
    pub old_layout: Layout,
    pub layout: Layout,
    /// The newer one of the two to be written.
    pub sb: Superblock,
    pub index: VolumeIndex,
    pub name: &'a str,
    /// The activity log is in use and goes on where it was. That of a clean copy says nothing that bits do not.
    pub log_counts: bool,
}

impl Images<'_> {
    /// Writes the new area at `base`, superblocks last, durably.
    fn write(&self, to: Told, base: u64) -> Result<(), VolumeError> {
        let failed = |source| VolumeError::Write {
            volume: self.name.to_owned(),
            source,
        };
        self.contents(&mut |offset, block| to.write_all_at(base + offset, block).map_err(failed))?;
        to.sync().map_err(failed)?;
        for (offset, image) in self.superblocks()? {
            to.write_all_at(base + offset, &image).map_err(failed)?;
        }
        to.sync().map_err(failed)
    }

    /// Both superblocks, each with its place: what makes the rest count. All of that must be durable before.
    pub fn superblocks(&self) -> Result<[(u64, [u8; BLOCK as usize]); 2], VolumeError> {
        let image = |sequence| {
            let sb = Superblock {
                sequence,
                ..self.sb.clone()
            };
            Ok::<_, VolumeError>((slot_of(sequence), encode(&sb, self.name)?))
        };
        Ok([image(self.sb.sequence - 1)?, image(self.sb.sequence)?])
    }

    /// Every block but the superblocks, whose places are made to say nothing. Blocks that nothing reads are left out.
    pub fn contents(&self, put: Put) -> Result<(), VolumeError> {
        put(0, &[0; BLOCK as usize])?;
        put(BLOCK, &[0; BLOCK as usize])?;
        for block in 0..u64::from(self.layout.activity_log_blocks) {
            let offset = block * BLOCK;
            let log = if self.log_counts {
                self.old_block(self.old_layout.activity_log_offset + offset)?
            } else {
                [0; BLOCK as usize]
            };
            put(self.layout.activity_log_offset + offset, &log)?;
        }
        if self.layout.undo_size > 0 {
            put(self.layout.undo_offset, &[0; BLOCK as usize])?;
        }
        for peer in 0..MAX_PEERS {
            self.bitmap(peer, put)?;
        }
        Ok(())
    }

    fn old_block(&self, offset: u64) -> Result<[u8; BLOCK as usize], VolumeError> {
        let mut block = [0; BLOCK as usize];
        self.metadata
            .read_exact_at(self.base + offset, &mut block)
            .map_err(|source| VolumeError::Read {
                volume: self.name.to_owned(),
                source,
            })?;
        Ok(block)
    }

    /// The bits toward one peer slot: those of the old size, and none for what is new.
    fn bitmap(&self, peer: usize, put: Put) -> Result<(), VolumeError> {
        for number in 0..self.layout.summary_blocks() {
            let mut entries = [SUMMARY_CLEAN; SUMMARY_ENTRIES];
            if number < self.old_layout.summary_blocks() {
                let block = self.old_block(self.old_layout.summary_block_offset(peer, number))?;
                entries =
                    decode_summary(&block, self.index, peer as u8, number).map_err(|error| {
                        VolumeError::Grow {
                            volume: self.name.to_owned(),
                            problem: error.to_string(),
                            next: "start the replicator and let a full copy repair it".into(),
                        }
                    })?;
            }
            let first = number * SUMMARY_ENTRIES as u64;
            for (at, entry) in entries.iter().enumerate() {
                let page = first + at as u64;
                // A page that is neither clean nor all set has bits of its own.
                if *entry != SUMMARY_CLEAN && page < self.old_layout.pages {
                    put(
                        self.layout.bitmap_page_offset(peer, page),
                        &self.old_block(self.old_layout.bitmap_page_offset(peer, page))?,
                    )?;
                }
            }
            put(
                self.layout.summary_block_offset(peer, number),
                &encode_summary(self.index, peer as u8, number, &entries),
            )?;
        }
        Ok(())
    }
}

/// Writes the new area into a file beside the old one and puts it in its place.
fn replace_external(path: &Path, images: &Images, before: Before) -> Result<(), VolumeError> {
    let (new, beside) = file_beside(path, images.name, images.layout.total)?;
    let told = Told {
        backing: &new,
        before,
    };
    images.write(told, 0)?;
    before(Step {
        path,
        kind: StepKind::Replace,
    });
    put_in_place(&beside, path).map_err(|source| VolumeError::File {
        what: format!("putting {} in its place", beside.display()),
        source,
    })
}

/// A new file for external metadata, beside the old one.
pub(crate) fn file_beside(
    path: &Path,
    name: &str,
    bytes: u64,
) -> Result<(Backing, PathBuf), VolumeError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".grown");
    let beside = PathBuf::from(beside);
    // Left over from a run that was cut short: it never counted.
    match std::fs::remove_file(&beside) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(VolumeError::File {
                what: format!("removing {}", beside.display()),
                source,
            });
        }
        _ => {}
    }
    let options = OpenOptions {
        create_size: Some(bytes),
        preallocate: true,
        ..OpenOptions::default()
    };
    let new = place::open_backing(name, &beside, &options)?;
    Ok((new, beside))
}

/// Renames, durably. Blocks.
pub(crate) fn put_in_place(beside: &Path, path: &Path) -> std::io::Result<()> {
    std::fs::rename(beside, path)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(directory)?.sync_all()
}
