//! Metadata of copies: create, adopt, replace a disk, grow, remove. Run by the command line while no replicator has
//! the volumes open; the lock on each backing makes sure of that.
//!
//! What a new copy's metadata says is decided by the core; here it is written, in an order in which a crash leaves
//! either no metadata that counts or all of it: everything but the superblocks, flush, superblocks, flush, and for
//! internal metadata the locator, flush.

pub mod detect;
mod forget;
mod grow;

pub use forget::{contents, remove};
pub use grow::{Grown, grow, grow_telling};
pub(crate) use grow::{Images, file_beside, put_in_place};

use crate::config::{Config, MetadataPlace, NodeRef, ServiceConfig, VolumeConfig};
use crate::place::{
    self, BLOCK, Hints, LocateError, Locator, PlaceError, Told, open_backing, read_locator,
};
use holdfast_disk::{Backing, BackingKind, DiskError, OpenOptions};
use holdfast_link::{Identity, LinkError, PeerStore};
use holdfast_replicator_core::api::{MetaPlace, PeerParameters};
use holdfast_replicator_core::{CreateError, CreateParameters, CreateVolume};
use holdfast_wire_format::ids::{Slot, SlotSet, Uuid, VolumeIndex};
use holdfast_wire_format::layout::{self, Layout, LayoutError};
use holdfast_wire_format::metadata::Mode;
use std::path::{Path, PathBuf};

/// log2 of bytes per extent of the activity log, as the core creates it.
const EXTENT_SHIFT: u8 = 22;
/// Blocks of the activity log unless asked otherwise.
const AL_BLOCKS: u32 = 64;
/// Bytes looked at from either end of a device that should be empty.
const BLANK_CHECK: u64 = 1 << 20;

/// Why a volume's metadata could not be made, replaced or removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("there is no service {service} in {}. Nothing was changed; add it there first", file.display())]
    NoService { service: String, file: PathBuf },
    #[error("service {service} has no volume {volume}. Nothing was changed; see {}", file.display())]
    NoVolume {
        service: String,
        volume: String,
        file: PathBuf,
    },
    #[error(
        "peer {peer} of service {service} is not known to this node. Nothing was changed; let it join (`holdfast token`, \
         `holdfast join`), or name its id in the configuration"
    )]
    UnknownPeer { service: String, peer: String },
    #[error(
        "volume {volume}: {} already has Holdfast metadata. Nothing was changed; with --overwrite-metadata it is replaced and this \
         copy's history, and what it knows of its peers, is lost", path.display()
    )]
    HasMetadata { volume: String, path: PathBuf },
    #[error(
        "volume {volume}: {} holds {found}. Nothing was changed; to keep that data use `holdfast volume adopt`, otherwise wipe \
         it first (wipefs, blkdiscard)", path.display()
    )]
    NotBlank {
        volume: String,
        path: PathBuf,
        found: String,
    },
    #[error("volume {volume}: {} does not exist, and no size is configured. Nothing was changed; set `size`, or create the device", path.display())]
    NoSize { volume: String, path: PathBuf },
    #[error("volume {volume}: {problem}. Nothing was changed; {next}")]
    WouldOverwrite {
        volume: String,
        problem: String,
        next: String,
    },
    #[error("volume {volume}: {} offers {available} bytes for data, the configuration asks for {wanted}. Nothing was changed; lower `size` or use a larger device", path.display())]
    TooSmall {
        volume: String,
        path: PathBuf,
        available: u64,
        wanted: u64,
    },
    #[error("volume {volume}: {source}. Nothing was changed")]
    Layout { volume: String, source: LayoutError },
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(
        "volume {volume}: {source}. Its metadata may be half written and does not count; repeat the command with --overwrite-metadata"
    )]
    Write { volume: String, source: DiskError },
    #[error("volume {volume}: {source}. Nothing was changed")]
    Read { volume: String, source: DiskError },
    #[error("volume {volume} cannot grow: {problem}. Nothing was changed; {next}")]
    Grow {
        volume: String,
        problem: String,
        next: String,
    },
    #[error("{what}: {source}")]
    File {
        what: String,
        source: std::io::Error,
    },
}

/// What may be chosen when metadata is made.
#[derive(Clone, Debug, Default)]
pub struct CreateOptions {
    /// Replace metadata that is there.
    pub overwrite_metadata: bool,
    /// The device holds data that is to stay: nothing of it may be written over.
    pub adopt: bool,
    /// Write zeroes over everything, so that copies made this way need no initial copy.
    pub zero: bool,
    /// With `adopt` and internal metadata: a person says that nothing is behind the configured size.
    pub assume_shrunk: bool,
    /// Bytes for old blocks during a resync, per volume; by size unless set.
    pub undo_size: Option<u64>,
    /// log2 of bytes per bit of the dirty bitmap, 12 to 20; by size unless set.
    pub grain_shift: Option<u8>,
    /// Blocks of the activity log, 8 to 4096; 64 unless set.
    pub al_blocks: Option<u32>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Created {
    pub service: String,
    pub volumes: Vec<CreatedVolume>,
    /// Copies that start in sync; empty when a first copy has to be chosen.
    pub in_sync: SlotSet,
}

#[derive(Clone, Debug)]
pub struct CreatedVolume {
    pub name: String,
    pub path: PathBuf,
    /// Bytes the application sees.
    pub size: u64,
    pub metadata_path: PathBuf,
    /// Bytes of metadata.
    pub metadata_size: u64,
    /// All of it reads zero now.
    pub zeroed: bool,
}

/// A volume on its way to having metadata.
struct Prepared<'a> {
    config: &'a VolumeConfig,
    data: Backing,
    external: Option<Backing>,
    base: u64,
    data_size: u64,
    sector_size: u32,
    layout: Layout,
    zeroed: bool,
    /// Files made by this run, removed again if a later volume cannot be prepared.
    made: Vec<PathBuf>,
}

impl Prepared<'_> {
    fn metadata(&self) -> &Backing {
        self.external.as_ref().unwrap_or(&self.data)
    }
}

/// The volume's id: the same on every node, from what is the same on every node.
pub fn volume_id(service: Uuid, index: VolumeIndex) -> Uuid {
    let mut bytes = [0; 18];
    bytes[..16].copy_from_slice(&service.0.to_le_bytes());
    bytes[16..].copy_from_slice(&index.0.to_le_bytes());
    Uuid(xxhash_rust::xxh3::xxh3_128(&bytes).max(1))
}

/// The service's peers by node id.
///
/// # Errors
/// A peer that is configured by name has not joined.
pub fn peer_parameters(
    service: &ServiceConfig,
    peers: &PeerStore,
) -> Result<Vec<PeerParameters>, VolumeError> {
    let all = peers.all();
    service
        .peers
        .iter()
        .map(|peer| {
            let node = match &peer.node {
                NodeRef::Id(id) => Some(*id),
                NodeRef::Name(name) => all
                    .iter()
                    .find(|known| known.name == *name)
                    .map(|known| known.id),
            };
            let unknown = || VolumeError::UnknownPeer {
                service: service.name.clone(),
                peer: peer.node.to_string(),
            };
            Ok(PeerParameters {
                slot: peer.slot,
                node: node.ok_or_else(unknown)?,
                mode: peer.mode,
            })
        })
        .collect()
}

fn find<'a>(config: &'a Config, service: &str) -> Result<&'a ServiceConfig, VolumeError> {
    config
        .service(service)
        .ok_or_else(|| VolumeError::NoService {
            service: service.to_owned(),
            file: config.file.clone(),
        })
}

/// Makes the metadata of this node's copy of a service, and its files where they do not exist.
///
/// # Errors
/// [`VolumeError`]: the volumes hold data or metadata, are in use, too small, or cannot be written.
pub fn create(
    config: &Config,
    service: &str,
    options: &CreateOptions,
) -> Result<Created, VolumeError> {
    make(config, service, None, options)
}

/// Makes the metadata of one volume whose disk was replaced. The copy takes everything on it from its peers; when it is
/// the service's first volume, all of the service.
///
/// # Errors
/// As [`create`].
pub fn replace_disk(
    config: &Config,
    service: &str,
    volume: &str,
    options: &CreateOptions,
) -> Result<Created, VolumeError> {
    let found = find(config, service)?
        .volume(volume)
        .ok_or_else(|| VolumeError::NoVolume {
            service: service.to_owned(),
            volume: volume.to_owned(),
            file: config.file.clone(),
        })?;
    make(config, service, Some(found.index), options)
}

fn make(
    config: &Config,
    service: &str,
    only: Option<VolumeIndex>,
    options: &CreateOptions,
) -> Result<Created, VolumeError> {
    let service = find(config, service)?;
    let state_dir = &config.node.state_dir;
    let identity = Identity::load(state_dir)?;
    let peers = peer_parameters(service, &PeerStore::load(state_dir)?)?;
    let wanted = |volume: &&VolumeConfig| only.is_none_or(|index| volume.index == index);
    let mut prepared: Vec<Prepared> = Vec::new();
    for volume in service.volumes.iter().filter(wanted) {
        match prepare(volume, options) {
            Ok(volume) => prepared.push(volume),
            Err(error) => {
                for path in prepared.iter().flat_map(|volume| &volume.made) {
                    // Made a moment ago, empty, and locked by us: nothing of anybody's is lost.
                    let _ = std::fs::remove_file(path);
                }
                return Err(error);
            }
        }
    }
    // A replaced disk is never in sync by itself, whatever it reads as: the others hold data.
    let zeroed = only.is_none() && prepared.iter().all(|volume| volume.zeroed || options.zero);
    let synchronous = |peer: &&PeerParameters| peer.mode != Mode::Async;
    let in_sync = if zeroed {
        peers
            .iter()
            .filter(synchronous)
            .fold(SlotSet::only(service.slot), |set, peer| set.with(peer.slot))
    } else {
        SlotSet::EMPTY
    };
    let of_volume = |volume: &VolumeConfig| {
        let known = prepared
            .iter()
            .find(|prepared| prepared.config.index == volume.index);
        CreateVolume {
            index: volume.index,
            volume: volume_id(service.id, volume.index),
            name: volume.name.clone(),
            // Of a volume that is not touched only the number counts.
            data_size: known.map_or(1 << 30, |known| known.data_size),
            sector_size: known.map_or(4096, |known| known.sector_size),
            grain_shift: options.grain_shift,
            al_blocks: options.al_blocks.unwrap_or(AL_BLOCKS),
            undo_size: known.map_or(0, |known| known.layout.undo_size),
            zeroed,
        }
    };
    let images = holdfast_replicator_core::create(&CreateParameters {
        service: service.id,
        service_name: service.name.clone(),
        slot: service.slot,
        node: identity.id(),
        mode: service.mode,
        on_peer_loss: service.on_peer_loss,
        seed: random_u64().map_err(|source| VolumeError::File {
            what: "no random numbers".into(),
            source,
        })?,
        in_sync,
        peers,
        volumes: service.volumes.iter().map(of_volume).collect(),
    })?;
    let mut hints = Hints::load(state_dir);
    if options.zero {
        // No metadata may count beside data that is half zeroed.
        for volume in &prepared {
            forget::old_metadata(volume)?;
        }
    }
    for volume in &prepared {
        if options.zero && !volume.zeroed {
            Told {
                backing: &volume.data,
                before: &|_| (),
            }
            .zero(0, volume.data_size)
            .map_err(|source| VolumeError::Write {
                volume: volume.config.name.clone(),
                source,
            })?;
        }
        write(volume, volume_id(service.id, volume.config.index), &images)?;
        hints.set(&service.name, &volume.config.name, volume.data.size());
    }
    let stored = hints.store(state_dir);
    stored.map_err(|source| VolumeError::File {
        what: format!(
            "the volumes are ready, but {} could not be written",
            state_dir.display()
        ),
        source,
    })?;
    let volumes = prepared
        .iter()
        .map(|volume| CreatedVolume {
            name: volume.config.name.clone(),
            path: volume.config.backing.clone(),
            size: volume.data_size,
            metadata_path: volume.metadata().path().to_owned(),
            metadata_size: volume.layout.total,
            zeroed: volume.zeroed || options.zero,
        })
        .collect();
    Ok(Created {
        service: service.name.clone(),
        volumes,
        in_sync,
    })
}

/// A random number for identities.
pub(crate) fn random_u64() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(u64::from_le_bytes(bytes))
}

/// Opens, or makes, the files of a volume and decides where everything goes. Writes nothing to what was there.
fn prepare<'a>(
    config: &'a VolumeConfig,
    options: &CreateOptions,
) -> Result<Prepared<'a>, VolumeError> {
    let name = || config.name.clone();
    let exists = std::fs::symlink_metadata(&config.backing).is_ok();
    let mut made = Vec::new();
    let sector_for =
        |backing: &Backing| config.sector_size.unwrap_or(backing.sector_size()).max(512);
    let undo_for = |size: u64| {
        options
            .undo_size
            .unwrap_or((size / 16).clamp(1 << 20, 1 << 30))
    };
    let al_blocks = options.al_blocks.unwrap_or(AL_BLOCKS);
    let layout_for = |size: u64, sector: u32| {
        let grain = options
            .grain_shift
            .unwrap_or_else(|| layout::default_grain_shift(size));
        Layout::new(
            size,
            sector,
            grain,
            EXTENT_SHIFT,
            al_blocks,
            undo_for(size),
            0,
        )
        .map_err(|source| VolumeError::Layout {
            volume: name(),
            source,
        })
    };
    let data = if exists {
        open_backing(
            &config.name,
            &config.backing,
            &OpenOptions {
                sector_size: config.sector_size,
                ..OpenOptions::default()
            },
        )?
    } else {
        let Some(size) = config.size.filter(|_| !options.adopt) else {
            return Err(VolumeError::NoSize {
                volume: name(),
                path: config.backing.clone(),
            });
        };
        let whole = match &config.metadata {
            MetadataPlace::External(_) => size,
            // The sector size is a multiple of 512 either way, and the layout does not depend on it.
            MetadataPlace::Internal => size + layout_for(size, 4096)?.total + BLOCK,
        };
        let create = OpenOptions {
            create_size: Some(whole),
            sector_size: config.sector_size,
            ..OpenOptions::default()
        };
        let data = open_backing(&config.name, &config.backing, &create)?;
        made.push(config.backing.clone());
        data
    };
    let read = |source| VolumeError::Read {
        volume: name(),
        source,
    };
    let sector_size = sector_for(&data);
    let zeroed = !options.adopt && data.kind() == BackingKind::File && is_hole(data.path());
    let (data_size, base, external, layout) = match &config.metadata {
        MetadataPlace::Internal => {
            let there = match read_locator(&data, data.size()) {
                Ok(found) => found.is_some(),
                Err(LocateError::Newer(_)) => true,
                Err(LocateError::Disk(source)) => return Err(read(source)),
            };
            if there && !options.overwrite_metadata {
                return Err(VolumeError::HasMetadata {
                    volume: name(),
                    path: config.backing.clone(),
                });
            }
            let before_locator = Locator::offset(data.size()).unwrap_or(0);
            let (available, _) = layout::internal_area(
                before_locator,
                sector_size,
                options.grain_shift,
                EXTENT_SHIFT,
                al_blocks,
                undo_for(data.size()),
                0,
            )
            .map_err(|source| VolumeError::Layout {
                volume: name(),
                source,
            })?;
            let data_size = config.size.unwrap_or(available);
            let layout = layout_for(data_size, sector_size)?;
            let base = before_locator
                .checked_sub(layout.total)
                .map(|base| base - base % BLOCK)
                .unwrap_or(0);
            if base < data_size {
                return Err(VolumeError::TooSmall {
                    volume: name(),
                    path: config.backing.clone(),
                    available,
                    wanted: data_size,
                });
            }
            if options.adopt {
                let fits = detect::behind(&data, data_size).map_err(read)?;
                fits.or_else(|problem| match problem {
                    detect::Behind::Unknown if options.assume_shrunk && config.size.is_some() => Ok(()),
                    problem => Err(VolumeError::WouldOverwrite {
                        volume: name(),
                        problem: problem.describe(data_size),
                        next: "keep the metadata elsewhere (metadata = \"/path\"), or shrink what is on the device first, set `size`, \
                               and say so with --assume-shrunk"
                            .into(),
                    }),
                })?;
            }
            (data_size, base, None, layout)
        }
        MetadataPlace::External(path) => {
            let data_size = config.size.unwrap_or(data.size());
            if data_size > data.size() {
                return Err(VolumeError::TooSmall {
                    volume: name(),
                    path: config.backing.clone(),
                    available: data.size(),
                    wanted: data_size,
                });
            }
            let layout = layout_for(data_size, sector_size)?;
            let new = std::fs::symlink_metadata(path).is_err();
            // Preallocated: a metadata write must not fail for want of space.
            let create = OpenOptions {
                create_size: new.then_some(layout.total),
                preallocate: new,
                ..OpenOptions::default()
            };
            let external = open_backing(&config.name, path, &create)?;
            if new {
                made.push(path.clone());
            } else if has_superblock(&external, 0).map_err(read)? && !options.overwrite_metadata {
                return Err(VolumeError::HasMetadata {
                    volume: name(),
                    path: path.clone(),
                });
            }
            if external.size() < layout.total {
                return Err(PlaceError::TooSmall {
                    volume: name(),
                    path: path.clone(),
                    size: external.size(),
                    needed: format!("{} bytes of metadata", layout.total),
                }
                .into());
            }
            (data_size, 0, Some(external), layout)
        }
    };
    let may_hold_data =
        exists && !options.adopt && !options.overwrite_metadata && !options.zero && !zeroed;
    if may_hold_data && let Some(found) = detect::content(&data, BLANK_CHECK).map_err(read)? {
        return Err(VolumeError::NotBlank {
            volume: name(),
            path: config.backing.clone(),
            found,
        });
    }
    Ok(Prepared {
        config,
        data,
        external,
        base,
        data_size,
        sector_size,
        layout,
        zeroed,
        made,
    })
}

/// A file without any allocated byte reads as zeroes.
fn is_hole(path: &Path) -> bool {
    let Ok(file) = std::fs::File::open(path) else {
        return false;
    };
    matches!(
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)),
        Err(rustix::io::Errno::NXIO)
    )
}

/// Whether either superblock slot counts, or is of a version this software does not know.
fn has_superblock(backing: &Backing, base: u64) -> Result<bool, DiskError> {
    let mut slots = [[0; BLOCK as usize]; 2];
    for (number, slot) in slots.iter_mut().enumerate() {
        let at = base + number as u64 * BLOCK;
        if at + BLOCK <= backing.size() {
            backing.read_exact_at(at, slot)?;
        }
    }
    Ok(slots.iter().any(detect::is_superblock))
}

/// Writes the images of one volume. The order is what makes a crash harmless.
fn write(volume: &Prepared, id: Uuid, images: &[(MetaPlace, Vec<u8>)]) -> Result<(), VolumeError> {
    let metadata = volume.metadata();
    let failed = |source| VolumeError::Write {
        volume: volume.config.name.clone(),
        source,
    };
    let mine = || {
        images
            .iter()
            .filter(|(place, _)| place.volume == volume.config.index)
    };
    let is_superblock = |place: &MetaPlace| place.offset < 2 * BLOCK;
    // Old superblocks must not make new contents count.
    metadata
        .write_all_at(volume.base, &[0; 2 * BLOCK as usize])
        .map_err(failed)?;
    metadata.sync().map_err(failed)?;
    for (place, bytes) in mine().filter(|(place, _)| !is_superblock(place)) {
        metadata
            .write_all_at(volume.base + place.offset, bytes)
            .map_err(failed)?;
    }
    metadata.sync().map_err(failed)?;
    for (place, bytes) in mine().filter(|(place, _)| is_superblock(place)) {
        metadata
            .write_all_at(volume.base + place.offset, bytes)
            .map_err(failed)?;
    }
    metadata.sync().map_err(failed)?;
    if volume.external.is_none() {
        let locator = Locator {
            volume: id,
            area_offset: volume.base,
            area_size: volume.layout.total,
            zero: (0, 0),
        };
        let at = Locator::offset(volume.data.size()).unwrap_or(0);
        volume
            .data
            .write_all_at(at, &locator.encode())
            .map_err(failed)?;
        volume.data.sync().map_err(failed)?;
    }
    Ok(())
}

/// The slot of a service's own copy and of its peers, for messages.
pub fn slots(service: &ServiceConfig) -> Vec<Slot> {
    std::iter::once(service.slot)
        .chain(service.peers.iter().map(|peer| peer.slot))
        .collect()
}
