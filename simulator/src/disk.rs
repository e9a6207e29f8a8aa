//! One machine's disk: data sectors as stamps behind a volatile cache, metadata as bytes.
//!
//! A stamp stands for 512 equal-valued bytes: the number of the write that put it there, 0 for zeroes.

use crate::rng::Rng;
use holdfast_replicator_core::api::{BufId, DiskError, MetaSource};
use holdfast_wire_format::ids::VolumeIndex;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock;
use std::collections::BTreeMap;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A sector of the metadata area: real bytes, or block data that the core parks there (undo).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaSector {
    Bytes(Box<[u8; SECTOR as usize]>),
    Stamp(u64),
}

/// An operation given to the disk and not yet answered.
#[derive(Clone, Debug)]
pub enum DiskOp {
    Read {
        volume: usize,
        first: u64,
        count: u64,
        buf: BufId,
    },
    Write {
        volume: usize,
        first: u64,
        values: Vec<u64>,
        fua: bool,
    },
    /// Covers what had landed when it was given: `through` is the landing number then.
    Flush { volume: usize, through: u64 },
    MetaWrite {
        volume: u16,
        offset: u64,
        sectors: Vec<MetaSector>,
    },
    MetaRead {
        volume: u16,
        offset: u64,
        count: u64,
        buf: BufId,
    },
}

#[derive(Clone, Debug, Default)]
struct Volume {
    /// What a read sees.
    cache: Vec<u64>,
    /// What is on the medium.
    durable: Vec<u64>,
    /// Values in the cache that the medium may or may not have yet, by sector, with their landing numbers.
    volatile: BTreeMap<u64, Vec<(u64, u64)>>,
}

/// All of one machine's volumes and metadata areas.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    volumes: Vec<Volume>,
    meta: BTreeMap<(u16, u64), MetaSector>,
    landed: u64,
}

impl Disk {
    /// Zeroed volumes of these sizes in sectors.
    #[must_use]
    pub fn new(sectors: &[u64]) -> Self {
        let volume = |n: &u64| Volume {
            cache: vec![0; *n as usize],
            durable: vec![0; *n as usize],
            volatile: BTreeMap::new(),
        };
        Disk {
            volumes: sectors.iter().map(volume).collect(),
            meta: BTreeMap::new(),
            landed: 0,
        }
    }

    /// Numbers everything that landed so far: what a flush given now will cover.
    #[must_use]
    pub fn landed(&self) -> u64 {
        self.landed
    }

    /// What reads of a volume see.
    #[must_use]
    pub fn view(&self, volume: usize) -> &[u64] {
        &self.volumes[volume].cache
    }

    /// What reads of all volumes see.
    #[must_use]
    pub fn all(&self) -> Vec<Vec<u64>> {
        self.volumes.iter().map(|v| v.cache.clone()).collect()
    }

    /// What a power cut leaves of a volume at the least.
    #[must_use]
    pub fn durable(&self, volume: usize) -> &[u64] {
        &self.volumes[volume].durable
    }

    /// What a copy of the whole device reads now.
    #[must_use]
    pub fn image(&self) -> Disk {
        let mut image = self.clone();
        for volume in &mut image.volumes {
            volume.durable.clone_from(&volume.cache);
            volume.volatile.clear();
        }
        image
    }

    /// Blocks of 4 KiB of metadata that were ever written, from `from` to `to`, by volume and offset.
    #[must_use]
    pub fn meta_blocks(&self, volume: u16, from: u64, to: u64) -> Vec<(u16, u64)> {
        let mut blocks: Vec<(u16, u64)> = self
            .meta
            .range((volume, from)..(volume, to))
            .map(|((volume, offset), _)| (*volume, offset / 4096 * 4096))
            .collect();
        blocks.dedup();
        blocks
    }

    /// One bit of a block changes.
    pub fn flip(&mut self, block: (u16, u64), rng: &mut Rng) {
        let (volume, offset) = block;
        let at = (volume, offset + rng.below(8) * SECTOR);
        match self.meta.get_mut(&at) {
            Some(MetaSector::Bytes(bytes)) => {
                bytes[rng.index(SECTOR as usize)] ^= 1 << rng.below(8);
            }
            Some(MetaSector::Stamp(stamp)) => *stamp ^= 1 << rng.below(20),
            None => {}
        }
    }

    /// A block of metadata stands in the place of another as well.
    pub fn misdirect(&mut self, from: (u16, u64), to: (u16, u64)) {
        for i in 0..8 {
            match self.meta.get(&(from.0, from.1 + i * SECTOR)).cloned() {
                Some(sector) => self.meta.insert((to.0, to.1 + i * SECTOR), sector),
                None => self.meta.remove(&(to.0, to.1 + i * SECTOR)),
            };
        }
    }

    /// A block of metadata as it reads now.
    #[must_use]
    pub fn meta_block(&self, volume: u16, offset: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        // (Reading what is in memory cannot fail.)
        let _ = MetaSource::read(&mut &*self, VolumeIndex(volume), offset, &mut bytes);
        bytes
    }

    /// The newest superblock on the medium.
    #[must_use]
    pub fn superblock(&self) -> Option<(u64, Superblock)> {
        [0, 4096]
            .into_iter()
            .filter_map(|at| Some((at, superblock::decode(&self.meta_block(0, at)).ok()?)))
            .max_by_key(|(_, sb)| sb.sequence)
    }

    /// A range reads like this from now on, whatever happens.
    pub fn fill(&mut self, volume: usize, from: u64, to: u64, value: u64) {
        let v = &mut self.volumes[volume];
        v.cache[from as usize..to as usize].fill(value);
        v.durable[from as usize..to as usize].fill(value);
        v.volatile
            .retain(|sector, _| *sector < from || *sector >= to);
    }

    /// The newest superblock of a volume that can be read.
    #[must_use]
    pub fn newest(&self, volume: u16) -> Option<Superblock> {
        [0, 4096]
            .into_iter()
            .filter_map(|at| superblock::decode(&self.meta_block(volume, at)).ok())
            .max_by_key(|sb| sb.sequence)
    }

    /// Fills every sector with values that no write of the run has: an unknown disk.
    pub fn scribble(&mut self, value: u64) {
        for volume in &mut self.volumes {
            volume.cache.fill(value);
            volume.durable.fill(value);
        }
    }

    /// Puts metadata where `create` wants it, durably.
    pub fn put_meta(&mut self, volume: u16, offset: u64, bytes: &[u8]) {
        for (i, sector) in meta_sectors(bytes).into_iter().enumerate() {
            self.meta
                .insert((volume, offset + i as u64 * SECTOR), sector);
        }
    }

    /// Stamps of a metadata range (block data that was parked there).
    #[must_use]
    pub fn meta_stamps(&self, volume: u16, offset: u64, count: u64) -> Vec<u64> {
        (0..count)
            .map(|i| match self.meta.get(&(volume, offset + i * SECTOR)) {
                Some(MetaSector::Stamp(stamp)) => *stamp,
                Some(MetaSector::Bytes(bytes)) => {
                    u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default())
                }
                None => 0,
            })
            .collect()
    }

    /// The operation is done: its effect is in the cache, or on the medium where it promises that.
    pub fn land(&mut self, op: &DiskOp) {
        match op {
            DiskOp::Read { .. } | DiskOp::MetaRead { .. } => {}
            DiskOp::Write {
                volume,
                first,
                values,
                fua,
            } => {
                self.landed += 1;
                for (i, value) in values.iter().enumerate() {
                    self.land_sector(*volume, first + i as u64, *value, *fua);
                }
            }
            DiskOp::Flush { volume, through } => {
                let Volume {
                    durable, volatile, ..
                } = &mut self.volumes[*volume];
                volatile.retain(|sector, versions| {
                    let covered = versions.partition_point(|v| v.0 <= *through);
                    if covered > 0 {
                        durable[*sector as usize] = versions[covered - 1].1;
                        versions.drain(..covered);
                    }
                    !versions.is_empty()
                });
            }
            DiskOp::MetaWrite {
                volume,
                offset,
                sectors,
            } => {
                for (i, sector) in sectors.iter().enumerate() {
                    self.meta
                        .insert((*volume, offset + i as u64 * SECTOR), sector.clone());
                }
            }
        }
    }

    fn land_sector(&mut self, volume: usize, sector: u64, value: u64, fua: bool) {
        let landed = self.landed;
        let v = &mut self.volumes[volume];
        v.cache[sector as usize] = value;
        if fua {
            v.durable[sector as usize] = value;
            v.volatile.remove(&sector);
        } else {
            v.volatile.entry(sector).or_default().push((landed, value));
        }
    }

    /// Any part of the operation lands, sector by sector: power went, or the disk failed under it. Whether a block of
    /// metadata was torn.
    pub fn land_partly(&mut self, op: &DiskOp, rng: &mut Rng) -> bool {
        match op {
            DiskOp::Write {
                volume,
                first,
                values,
                ..
            } => {
                self.landed += 1;
                for (i, value) in values.iter().enumerate() {
                    if rng.chance(500) {
                        self.land_sector(*volume, first + i as u64, *value, false);
                    }
                }
            }
            DiskOp::MetaWrite {
                volume,
                offset,
                sectors,
            } => {
                // 0: nothing, 1: all, else torn.
                let how = rng.below(4);
                let mut landed = 0;
                for (i, sector) in sectors.iter().enumerate() {
                    if how == 1 || (how > 1 && rng.chance(500)) {
                        landed += 1;
                        self.meta
                            .insert((*volume, offset + i as u64 * SECTOR), sector.clone());
                    }
                }
                return landed > 0 && landed < sectors.len();
            }
            _ => {}
        }
        false
    }

    /// The cache is gone: every sector not flushed holds the medium's value or any later one. Returns how
    /// many sectors went back in time.
    pub fn power_cut(&mut self, rng: &mut Rng) -> u64 {
        let mut lost = 0;
        // Some cuts take nearly everything, some nearly nothing.
        let keep = rng.below(1001);
        for volume in &mut self.volumes {
            for (sector, versions) in std::mem::take(&mut volume.volatile) {
                let at = sector as usize;
                if rng.chance(keep) {
                    volume.durable[at] = versions[rng.index(versions.len())].1;
                }
                lost += u64::from(volume.durable[at] != volume.cache[at]);
                volume.cache[at] = volume.durable[at];
            }
        }
        lost
    }
}

/// The 512 bytes that a stamp stands for.
#[must_use]
pub fn stamp_bytes(stamp: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
    bytes
}

/// Bytes cut into sectors.
#[must_use]
pub fn meta_sectors(bytes: &[u8]) -> Vec<MetaSector> {
    bytes
        .chunks(SECTOR as usize)
        .map(|chunk| {
            let mut sector = Box::new([0u8; SECTOR as usize]);
            sector[..chunk.len()].copy_from_slice(chunk);
            MetaSector::Bytes(sector)
        })
        .collect()
}

impl MetaSource for &Disk {
    fn read(
        &mut self,
        volume: VolumeIndex,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), DiskError> {
        for (i, chunk) in bytes.chunks_mut(SECTOR as usize).enumerate() {
            let at = (volume.0, offset + i as u64 * SECTOR);
            match self.meta.get(&at) {
                Some(MetaSector::Bytes(sector)) => chunk.copy_from_slice(&sector[..chunk.len()]),
                Some(MetaSector::Stamp(stamp)) => {
                    chunk.copy_from_slice(&stamp_bytes(*stamp)[..chunk.len()]);
                }
                None => chunk.fill(0),
            }
        }
        Ok(())
    }
}
