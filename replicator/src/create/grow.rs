//! Growing a volume of a stopped replicator: metadata for the new size, beside the old one, then the flip.
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
    let old_layout = layout_for(old.data_size)?;
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
    let layout = layout_for(wanted)?;
    let mut new = Superblock {
        data_size: wanted,
        area_size: layout.total,
        ..old.clone()
    };
    // Above both old ones, and each in the slot its number says.
    new.sequence = old.sequence + 2;
    let images = Images {
        old: &opened,
        old_layout,
        layout,
        sb: new,
        index: volume.index,
        name,
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
        hints.set(&service.name, name, images.old.data.size());
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

/// The new area's contents.
struct Images<'a> {
    old: &'a Opened,
    old_layout: Layout,
    layout: Layout,
    sb: Superblock,
    index: VolumeIndex,
    name: &'a str,
}

impl Images<'_> {
    /// Writes the new area at `base`, superblocks last, durably.
    fn write(&self, to: Told, base: u64) -> Result<(), VolumeError> {
        let failed = |source| VolumeError::Write {
            volume: self.name.to_owned(),
            source,
        };
        let put = |offset: u64, block: &[u8; BLOCK as usize]| {
            to.write_all_at(base + offset, block).map_err(failed)
        };
        put(0, &[0; BLOCK as usize])?;
        put(BLOCK, &[0; BLOCK as usize])?;
        // The log of a clean copy says nothing that bits do not.
        for block in 0..u64::from(self.layout.activity_log_blocks) {
            put(
                self.layout.activity_log_offset + block * BLOCK,
                &[0; BLOCK as usize],
            )?;
        }
        if self.layout.undo_size > 0 {
            put(self.layout.undo_offset, &[0; BLOCK as usize])?;
        }
        for peer in 0..MAX_PEERS {
            self.bitmap(peer, &put)?;
        }
        to.sync().map_err(failed)?;
        for sequence in [self.sb.sequence - 1, self.sb.sequence] {
            let sb = Superblock {
                sequence,
                ..self.sb.clone()
            };
            let image = superblock::encode(&sb).map_err(|error| VolumeError::Grow {
                volume: self.name.to_owned(),
                problem: error.to_string(),
                next: "this is a defect; report it".into(),
            })?;
            put(if sequence % 2 == 0 { 0 } else { BLOCK }, &image)?;
        }
        to.sync().map_err(failed)
    }

    /// The bits toward one peer slot: those of the old size, and none for what is new.
    fn bitmap(
        &self,
        peer: usize,
        put: &impl Fn(u64, &[u8; BLOCK as usize]) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let old = |offset: u64| {
            let mut block = [0; BLOCK as usize];
            self.old
                .metadata()
                .read_exact_at(self.old.base + offset, &mut block)
                .map_err(|source| VolumeError::Read {
                    volume: self.name.to_owned(),
                    source,
                })?;
            Ok::<_, VolumeError>(block)
        };
        for number in 0..self.layout.summary_blocks() {
            let mut entries = [SUMMARY_CLEAN; SUMMARY_ENTRIES];
            if number < self.old_layout.summary_blocks() {
                let block = old(self.old_layout.summary_block_offset(peer, number))?;
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
                        &old(self.old_layout.bitmap_page_offset(peer, page))?,
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
    let mut beside = path.as_os_str().to_owned();
    beside.push(".grown");
    let beside = PathBuf::from(beside);
    let file = |what: &str, source| VolumeError::File {
        what: format!("{what} {}", beside.display()),
        source,
    };
    // Left over from a run that was cut short: it never counted.
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(file("removing", error));
        }
        _ => {}
    }
    let options = OpenOptions {
        create_size: Some(images.layout.total),
        preallocate: true,
        ..OpenOptions::default()
    };
    let new = place::open_backing(images.name, &beside, &options)?;
    let told = Told {
        backing: &new,
        before,
    };
    images.write(told, 0)?;
    before(Step {
        path,
        kind: StepKind::Replace,
    });
    std::fs::rename(&beside, path).map_err(|source| file("putting in place", source))?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| file("making durable", source))
}
