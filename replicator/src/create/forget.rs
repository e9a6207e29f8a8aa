//! Metadata that is to count no more, and what else a device holds that a command would discard.

use super::{
    BLANK_CHECK, BLOCK, BackingKind, Config, DiskError, Hints, Locator, OpenOptions, Prepared,
    VolumeError, detect, find, has_superblock, is_hole, place, read_locator,
};
use crate::control::render;
use crate::place::{LocateError, open_backing};
use holdfast_disk::Backing;
use std::fmt::Write as _;

/// Makes this node's copy of a volume forget that it is one: superblocks and locator are overwritten. Data stays.
///
/// # Errors
/// The volume is in use, or cannot be written.
pub fn remove(config: &Config, service: &str, volume: &str) -> Result<(), VolumeError> {
    let service = find(config, service)?;
    let found = service
        .volume(volume)
        .ok_or_else(|| VolumeError::NoVolume {
            service: service.name.clone(),
            volume: volume.to_owned(),
            file: config.file.clone(),
        })?;
    let state_dir = &config.node.state_dir;
    let mut hints = Hints::load(state_dir);
    let hint = hints.size(&service.name, volume);
    let opened = place::open(found, &OpenOptions::default(), hint)?;
    let failed = |source| VolumeError::Write {
        volume: volume.to_owned(),
        source,
    };
    let metadata = opened.metadata();
    metadata
        .write_all_at(opened.base, &[0; 2 * BLOCK as usize])
        .map_err(failed)?;
    metadata.sync().map_err(failed)?;
    if opened.external.is_none() {
        let end = opened.base + opened.area_size;
        // The locator is in the first whole block boundary behind the area or later, wherever it was found.
        let at = [Some(opened.data.size()), hint]
            .into_iter()
            .flatten()
            .filter_map(Locator::offset)
            .filter(|at| *at >= end && at + BLOCK <= opened.data.size());
        for at in at {
            opened
                .data
                .write_all_at(at, &[0; BLOCK as usize])
                .map_err(failed)?;
        }
        opened.data.sync().map_err(failed)?;
    }
    hints.remove(&service.name, volume);
    hints.store(state_dir).map_err(|source| VolumeError::File {
        what: format!(
            "the metadata is gone, but {} could not be written",
            state_dir.display()
        ),
        source,
    })
}

/// Overwrites the superblocks and the locator of whatever was a copy here before. What has none is left as it is.
pub(super) fn old_metadata(volume: &Prepared) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Write {
        volume: volume.config.name.clone(),
        source,
    };
    let blank = |backing: &Backing, at: u64, blocks: u64| -> Result<(), DiskError> {
        backing.write_all_at(at, &vec![0; (blocks * BLOCK) as usize])?;
        backing.sync()
    };
    if let Some(external) = &volume.external {
        if has_superblock(external, 0).map_err(failed)? {
            blank(external, 0, 2).map_err(failed)?;
        }
        return Ok(());
    }
    let data = &volume.data;
    match read_locator(data, data.size()) {
        Ok(Some(old)) => blank(data, old.area_offset, 2).map_err(failed)?,
        // A newer version's: where its superblocks are is not known, but nothing finds them without the locator.
        Ok(None) | Err(LocateError::Newer(_)) => {}
        Err(LocateError::Disk(source)) => return Err(failed(source)),
    }
    match Locator::offset(data.size()) {
        Some(at) => blank(data, at, 1).map_err(failed),
        None => Ok(()),
    }
}

/// What the devices of a service hold that zeroing them would discard, a line each; empty when there is nothing: files that
/// do not exist yet, or that are one hole.
///
/// # Errors
/// There is no such service; a device is in use or cannot be read.
pub fn contents(config: &Config, service: &str) -> Result<String, VolumeError> {
    let mut text = String::new();
    for volume in &find(config, service)?.volumes {
        if std::fs::symlink_metadata(&volume.backing).is_err() {
            continue;
        }
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let data = open_backing(&volume.name, &volume.backing, &options)?;
        if data.kind() == BackingKind::File && is_hole(data.path()) {
            continue;
        }
        let read = |source| VolumeError::Read {
            volume: volume.name.clone(),
            source,
        };
        let found = detect::content(&data, BLANK_CHECK).map_err(read)?;
        let sector = u64::from(data.sector_size());
        let _ = writeln!(
            text,
            "volume {}: {} in {} blocks of {sector} bytes on {}, which holds {}; whoever wrote it, and when, is not known here",
            volume.name,
            render::bytes(data.size()),
            data.size() / sector,
            volume.backing.display(),
            found
                .as_deref()
                .unwrap_or("nothing that is known in its first and last MiB"),
        );
    }
    Ok(text)
}
