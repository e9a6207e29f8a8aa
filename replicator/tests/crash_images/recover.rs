//! Opening an image as a start does, and going back from it to the point before a resync.

use crate::disk::{Disk, Overlay, SECTOR};
use holdfast_disk::OpenOptions;
use holdfast_link::PeerStore;
use holdfast_replicator::config::Config;
use holdfast_replicator::create::peer_parameters;
use holdfast_replicator::place::{self, Opened};
use holdfast_replicator_core::Core;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file beside the recorded one, in which images are laid out and opened.
pub struct Scratch {
    file: File,
    path: PathBuf,
    laid: Vec<u64>,
}

/// Every start is a new process.
const INCARNATION: Incarnation = Incarnation(0x0071_a6e5);

impl Scratch {
    pub fn new(disk: &Disk, directory: &Path, name: &str) -> Scratch {
        let path = directory.join(format!("{name}.image"));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len(disk.durable.len() as u64).unwrap();
        let mut scratch = Scratch {
            file,
            path,
            laid: Vec::new(),
        };
        // Data is not looked at by a start; its holes stay.
        let from = disk.metadata_from as usize;
        scratch
            .file
            .write_all_at(&disk.durable[from..], from as u64)
            .unwrap();
        scratch.laid.clear();
        scratch
    }

    /// Puts the metadata of this image there.
    fn lay(&mut self, disk: &mut Disk, overlay: &Overlay) {
        let first = disk.metadata_from / SECTOR as u64;
        let back = std::mem::take(&mut self.laid);
        for sector in back.into_iter().chain(std::mem::take(&mut disk.changed)) {
            if sector >= first {
                let at = sector * SECTOR as u64;
                self.file
                    .write_all_at(disk.durable_sector(sector), at)
                    .unwrap();
            }
        }
        for (sector, (_, write)) in overlay.range(first..) {
            let at = sector * SECTOR as u64;
            self.file.write_all_at(write.sector(*sector), at).unwrap();
            self.laid.push(*sector);
        }
    }

    /// Opens the image with what a start uses: the volume's places, then the core.
    ///
    /// # Errors
    /// What a person would be told.
    pub fn open(
        &mut self,
        disk: &mut Disk,
        overlay: &Overlay,
        config: &Config,
        node: Uuid,
        hint: u64,
    ) -> Result<(Core, Actions, u64), String> {
        self.lay(disk, overlay);
        let service = &config.services[0];
        let mut volume = service.volumes[0].clone();
        volume.backing = self.path.clone();
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let opened =
            place::open(&volume, &read_only, Some(hint)).map_err(|error| error.to_string())?;
        let parameters = AttachParameters {
            volumes: vec![AttachVolume {
                index: volume.index,
                name: volume.name.clone(),
                device_data_size: opened.data_limit,
                sector_size: opened.data.sector_size(),
                discard_zeroes: true,
            }],
            peers: peer_parameters(service, &PeerStore::load(&config.node.state_dir).unwrap())
                .map_err(|error| error.to_string())?,
            slot: service.slot,
            node,
            service: service.id,
            incarnation: INCARNATION,
            seed: 1,
            tuning: service.tuning,
            store: StoreKind::Own,
        };
        let base = opened.base;
        let mut out = Actions::new();
        let core = Core::attach(parameters, &mut Area(opened), Time(0), &mut out)
            .map_err(|error| error.to_string())?;
        Ok((core, out, base))
    }
}

struct Area(Opened);

impl MetaSource for Area {
    fn read(&mut self, _: VolumeIndex, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let at = self.0.base + offset;
        self.0
            .metadata()
            .read_exact_at(at, bytes)
            .map_err(|_| DiskError::Io)
    }
}

/// An image in memory, for what the core does with it after it was opened.
pub struct Machine<'a> {
    disk: &'a Disk,
    written: HashMap<u64, [u8; SECTOR]>,
    overlay: &'a Overlay,
    base: u64,
    buffers: HashMap<u64, Vec<u8>>,
    pub answer: Option<AdminResult>,
}

impl<'a> Machine<'a> {
    pub fn new(disk: &'a Disk, overlay: &'a Overlay, base: u64) -> Self {
        Machine {
            disk,
            written: HashMap::new(),
            overlay,
            base,
            buffers: HashMap::new(),
            answer: None,
        }
    }

    pub fn sector(&self, sector: u64) -> &[u8] {
        if let Some(written) = self.written.get(&sector) {
            return written;
        }
        match self.overlay.get(&sector) {
            Some((_, write)) => write.sector(sector),
            None => self.disk.durable_sector(sector),
        }
    }

    /// A block of metadata, by its place in the file.
    pub fn block(&self, offset: u64) -> [u8; 4096] {
        self.read(offset, 4096).try_into().expect("a block")
    }

    fn read(&self, offset: u64, length: u32) -> Vec<u8> {
        let first = offset / SECTOR as u64;
        (first..first + u64::from(length) / SECTOR as u64)
            .flat_map(|sector| self.sector(sector).to_vec())
            .collect()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (sector, bytes) in (offset / SECTOR as u64..).zip(bytes.chunks(SECTOR)) {
            self.written.insert(sector, bytes.try_into().unwrap());
        }
    }

    /// Forces the copy to serve, with nobody else there, and carries out all that this takes.
    pub fn force(&mut self, core: &mut Core, mut out: Actions) {
        self.carry_out(core, &mut out, Time(0));
        let command = Event::Admin {
            admin: AdminId(1),
            command: Command::Promote { force: true },
        };
        core.handle(Time(0), command, &mut out);
        self.carry_out(core, &mut out, Time(0));
        for round in 1..100 {
            if self.answer.is_some() {
                break;
            }
            let now = Time(0).after_ms(round * 100);
            core.handle(now, Event::Tick, &mut out);
            self.carry_out(core, &mut out, now);
        }
    }

    fn carry_out(&mut self, core: &mut Core, out: &mut Actions, now: Time) {
        for _ in 0..100_000 {
            if out.is_empty() {
                core.end_batch(now, out);
                if out.is_empty() {
                    return;
                }
            }
            for action in std::mem::take(out) {
                if let Some(event) = self.act(action) {
                    core.handle(now, event, out);
                }
            }
        }
        panic!("the core finds no end");
    }

    fn act(&mut self, action: Action) -> Option<Event> {
        let done = |op| Some(Event::DiskDone { op, result: Ok(()) });
        let meta_done = |op| Some(Event::MetaDone { op, result: Ok(()) });
        match action {
            Action::DiskRead {
                op,
                offset,
                length,
                buf,
                ..
            } => {
                let bytes = self.read(offset, length);
                self.buffers.get_mut(&buf.0).unwrap()[..bytes.len()].copy_from_slice(&bytes);
                done(op)
            }
            Action::DiskWrite {
                op,
                offset,
                length,
                buf,
                ..
            } => {
                let bytes = self.buffers[&buf.0][..length as usize].to_vec();
                self.write(offset, &bytes);
                done(op)
            }
            Action::DiskZero {
                op, offset, length, ..
            } => {
                self.write(offset, &vec![0; length as usize]);
                done(op)
            }
            Action::DiskFlush { op, .. } => done(op),
            Action::MetaWrite { op, place, bytes } => {
                self.write(self.base + place.offset, &bytes);
                meta_done(op)
            }
            Action::MetaWriteBuf {
                op,
                place,
                buf,
                length,
            } => {
                let bytes = self.buffers[&buf.0][..length as usize].to_vec();
                self.write(self.base + place.offset, &bytes);
                meta_done(op)
            }
            Action::MetaReadBuf {
                op,
                place,
                buf,
                length,
            } => {
                let bytes = self.read(self.base + place.offset, length);
                self.buffers.get_mut(&buf.0).unwrap()[..bytes.len()].copy_from_slice(&bytes);
                meta_done(op)
            }
            Action::AllocBuf { buf, length } => {
                self.buffers.insert(buf.0, vec![0; length as usize]);
                None
            }
            Action::ReleaseBuf { buf } => {
                self.buffers.remove(&buf.0);
                None
            }
            Action::IsZero { op, buf, length } => {
                let zero = self.buffers[&buf.0][..length as usize]
                    .iter()
                    .all(|byte| *byte == 0);
                Some(Event::ZeroCheck { op, zero })
            }
            Action::Crc { op, buf, length } => {
                let bytes = &self.buffers[&buf.0][..length as usize];
                let zero = bytes.iter().all(|byte| *byte == 0);
                Some(Event::CrcDone {
                    op,
                    crc: crc32fast::hash(bytes),
                    zero,
                })
            }
            Action::AdminDone { result, .. } => {
                self.answer = Some(result);
                None
            }
            Action::Halt { reason } => panic!("it halts: {reason}"),
            _ => None,
        }
    }
}
