//! Making room for a larger volume while it is in use: what [`Action::MakeRoom`] asks for.
//!
//! 1. a file is made longer; a device has grown by its own means, or it is refused
//! 2. the service is *held*: nothing but answers of its disks reaches its core, until those are at rest. Then its metadata on the
//!    disk is exactly what the core takes it for
//! 3. the new area is written, without superblocks; flush; its superblocks; flush; the locator (or the rename of an external
//!    file); flush. From there on the new area counts, a crash before leaves the old one. Both say the same, so either is right
//! 4. the core hears where things are now, and the service goes on: after some milliseconds, for its clients a slow write
//! 5. what is new is zeroed in the background (of a volume with external metadata before step 2), and the locator says so
//!
//! If it is not known whether the new area counts (the write of the locator failed), going on with either could leave the other
//! one behind: the process stops, and the next start finds which one it is.

use super::driver::Shard;
use super::service::{GROWER, Service};
use crate::create::{Images, VolumeError, file_beside, put_in_place};
use crate::place::{BLOCK, Hints, Locator, Step, StepKind, read_locator};
use holdfast_disk::{AlignedBytes, Backing, BackingKind, FileId, Op};
use holdfast_replicator_core::api::{Event, Level};
use holdfast_wire_format::ids::{MAX_PEERS, VolumeIndex};
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock;
use slab::Slab;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Zeroed by one request: the disk serves the application between two of them.
const ZERO_PIECE: u64 = 64 << 20;
/// A service is held no longer than this for its disks to come to rest.
const REST_WAIT: Duration = Duration::from_secs(5);
/// Most bytes of one write of the new area.
const WRITE_PIECE: usize = 256 << 10;
/// With more bitmap pages than this to move, the service would be held for long enough to lose its peers.
const MOST_PAGES: u64 = 4096;

type Hook = Box<dyn Fn(Step) + Send + Sync>;

/// Told of each step before it is taken. For tests, which end the process there.
static STEPS: OnceLock<Hook> = OnceLock::new();

/// Has `hook` told of each step of every growth in this process, before it is taken.
#[doc(hidden)]
pub fn tell_steps(hook: impl Fn(Step) + Send + Sync + 'static) {
    // A second hook is a mistake of the test that has it: it would wait for steps in vain and fail.
    let _ = STEPS.set(Box::new(hook));
}

type Answer = Result<(), holdfast_disk::DiskError>;

/// What was asked and what is on its way.
#[derive(Default)]
pub(super) struct Grower {
    asked: RefCell<VecDeque<(usize, VolumeIndex, u64)>>,
    wake: Notify,
    /// A held service may be at rest now.
    pub rest: Notify,
    ops: RefCell<Slab<oneshot::Sender<Answer>>>,
}

impl Grower {
    pub fn ask(&self, service: usize, volume: VolumeIndex, size: u64) {
        self.asked.borrow_mut().push_back((service, volume, size));
        self.wake.notify_one();
    }

    /// A request of a growth ended.
    pub fn done(&self, op: u64, result: Answer) {
        if let Some(waiting) = self.ops.borrow_mut().try_remove(op as usize) {
            // Whoever asked may have given up.
            let _ = waiting.send(result);
        }
    }

    /// Makes room whenever that is asked for, one volume after the other. A task of the shard.
    pub async fn serve(&self, shard: &Shard) {
        loop {
            let next = self.asked.borrow_mut().pop_front();
            let Some((service, volume, size)) = next else {
                self.wake.notified().await;
                continue;
            };
            let result = make_room(shard, service, volume, size).await;
            shard.with_services(|services| {
                let service = &mut services[service];
                let name = service.volumes[volume.0 as usize].name.clone();
                let (level, text) = match &result {
                    Ok(()) => (
                        Level::Info,
                        format!("volume {name} has room for {size} bytes here"),
                    ),
                    Err(why) => (
                        Level::Warning,
                        format!("volume {name} gets no room for {size} bytes here: {why}. It stays as it is"),
                    ),
                };
                service.say(&shard.log, level, "room", None, text);
                service.events.push_back(Event::RoomMade {
                    volume,
                    size,
                    result,
                });
            });
            shard.pump();
        }
    }
}

/// One volume while room is made for it.
struct Volume<'a> {
    shard: &'a Shard,
    service: usize,
    index: VolumeIndex,
    service_name: String,
    name: String,
    data: Backing,
    data_file: FileId,
    meta: Backing,
    meta_file: FileId,
    /// Of external metadata: the file it is in, by its own name.
    meta_path: PathBuf,
    base: u64,
}

impl Volume<'_> {
    fn internal(&self) -> bool {
        self.data_file == self.meta_file
    }

    fn step(&self, backing: &Backing, kind: StepKind) {
        if let Some(hook) = STEPS.get() {
            hook(Step {
                path: backing.path(),
                kind,
            });
        }
    }

    /// Starts a request; nothing of the shard waits for it.
    fn start(&self, make: impl FnOnce() -> Op) -> oneshot::Receiver<Answer> {
        let (waiting, answer) = oneshot::channel();
        let op = self.shard.grower.ops.borrow_mut().insert(waiting);
        self.shard.ring().submit(make(), GROWER | op as u64);
        answer
    }

    async fn done(&self, answer: oneshot::Receiver<Answer>) -> Result<(), String> {
        match answer.await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("the replicator stops".into()),
        }
    }

    async fn write(
        &self,
        file: FileId,
        backing: &Backing,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), String> {
        let length = bytes.len() as u64;
        self.step(backing, StepKind::Write { offset, length });
        let data = AlignedBytes::from(bytes);
        let answer = self.start(|| Op::WriteBytes {
            file,
            offset,
            data,
            fua: false,
        });
        self.done(answer).await
    }

    async fn flush(&self, file: FileId, backing: &Backing) -> Result<(), String> {
        self.step(backing, StepKind::Flush);
        let answer = self.start(|| Op::Flush { file });
        self.done(answer).await
    }

    /// Zeroes a range that nobody uses, durably.
    async fn zero(&self, from: u64, to: u64) -> Result<(), String> {
        let mut offset = from;
        while offset < to {
            let len = (to - offset).min(ZERO_PIECE);
            self.step(
                &self.data,
                StepKind::Write {
                    offset,
                    length: len,
                },
            );
            let answer = self.start(|| Op::Zero {
                file: self.data_file,
                offset,
                len,
                unmap: false,
                fua: false,
            });
            self.done(answer).await?;
            offset += len;
        }
        self.flush(self.data_file, &self.data).await
    }

    fn superblock(&self) -> Result<Superblock, String> {
        let mut slots = [[0; BLOCK as usize]; 2];
        for (number, slot) in slots.iter_mut().enumerate() {
            self.meta
                .read_exact_at(self.base + number as u64 * BLOCK, slot)
                .map_err(|error| error.to_string())?;
        }
        let (found, _) =
            superblock::choose(&slots[0], &slots[1]).map_err(|error| error.to_string())?;
        match superblock::unknown_read_only_features(&found) {
            0 => Ok(found),
            features => Err(format!(
                "its metadata uses features ({features:#x}) that this version must not write past"
            )),
        }
    }

    fn layout(&self, old: &Superblock, size: u64) -> Result<Layout, String> {
        let grown = Superblock {
            data_size: size,
            room: 0,
            ..old.clone()
        };
        Layout::of(&grown).map_err(|error| error.to_string())
    }

    /// Where the locator is found after the device grew, if it is not moved before the process ends.
    fn remember_size(&self) -> Result<(), String> {
        let here = read_locator(&self.data, self.data.size()).map_err(|error| error.to_string())?;
        if here.is_none() {
            // The device was larger already when this process began: what is remembered is the size before.
            return Ok(());
        }
        let state_dir = &self.shard.state_dir;
        let mut hints = Hints::load(state_dir);
        hints.set(&self.service_name, &self.name, self.data.size());
        hints
            .store(state_dir)
            .map_err(|error| format!("{} cannot be written: {error}", state_dir.display()))
    }

    /// Makes a file long enough; of a device the present size is taken. What is there then.
    async fn lengthen(&self, end: u64) -> Result<u64, String> {
        let path = self.data.path().display();
        if self.data.kind() == BackingKind::File && self.data.size() < end {
            self.step(&self.data, StepKind::Lengthen);
            let grown = self.data.grow(end, false).await;
            return grown.map_err(|error| format!("{path} cannot be made longer: {error}"));
        }
        let size = self.data.adopt_size();
        size.map_err(|error| format!("the size of {path} is not known: {error}"))
    }

    /// The new area, all but the superblocks and with writes of neighbouring blocks put together.
    fn contents(&self, images: &Images) -> Result<Vec<(u64, Vec<u8>)>, String> {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        let fixed = images.layout.summary_blocks() * MAX_PEERS as u64
            + u64::from(images.layout.activity_log_blocks);
        let most = fixed + MOST_PAGES;
        let mut blocks = 0;
        let put = &mut |offset: u64, block: &[u8; BLOCK as usize]| {
            blocks += 1;
            if blocks > most {
                return Err(VolumeError::Grow {
                    volume: self.name.clone(),
                    problem:
                        "the bitmaps of what other copies lack are too large to be moved at once"
                            .into(),
                    next: "let the resync finish first".into(),
                });
            }
            match pieces.last_mut() {
                Some((at, bytes))
                    if *at + bytes.len() as u64 == offset && bytes.len() < WRITE_PIECE =>
                {
                    bytes.extend_from_slice(block);
                }
                _ => pieces.push((offset, block.to_vec())),
            }
            Ok(())
        };
        images.contents(put).map_err(|error| error.to_string())?;
        Ok(pieces)
    }

    /// Holds the service, moves its metadata into the area at `to`, and lets it go on.
    async fn move_metadata(&self, size: u64, to: Target) -> Result<(), String> {
        let begun = std::time::Instant::now();
        self.hold(true);
        let moved = async {
            self.rest().await?;
            self.move_at_rest(size, to).await
        };
        let result = moved.await;
        self.hold(false);
        let held_ms = begun.elapsed().as_secs_f64() * 1e3;
        tracing::info!(
            service = self.service_name,
            volume = self.name,
            held_ms,
            "metadata moved"
        );
        // What waited has its turn.
        self.shard.pump();
        result
    }

    fn hold(&self, hold: bool) {
        self.shard
            .with_services(|services| services[self.service].hold(hold));
    }

    /// Waits until the core has nothing more under way on its disks.
    async fn rest(&self) -> Result<(), String> {
        let rest = async {
            loop {
                let notified = self.shard.grower.rest.notified();
                self.shard.pump();
                if self.shard.at_rest(self.service) {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(REST_WAIT, rest).await.map_err(|_| {
            format!(
                "its disk did not come to rest within {} s",
                REST_WAIT.as_secs()
            )
        })
    }

    async fn move_at_rest(&self, size: u64, to: Target) -> Result<(), String> {
        let index = self.index;
        self.shard
            .with_services(|services| services[self.service].core.may_move(index))?;
        let old = self.superblock()?;
        let layout = self.layout(&old, size)?;
        let sb = Superblock {
            // Above both old ones, and each in the slot its number says.
            sequence: old.sequence + 2,
            room: size,
            area_size: layout.total,
            ..old.clone()
        };
        let images = Images {
            metadata: &self.meta,
            base: self.base,
            old_layout: Layout::of(&old).map_err(|error| error.to_string())?,
            layout,
            sb: sb.clone(),
            index,
            name: &self.name,
            log_counts: true,
        };
        let (file, backing, base) = match &to {
            Target::Behind { base, .. } => (self.data_file, &self.data, *base),
            Target::Beside { file, backing, .. } => (*file, backing, 0),
        };
        let contents = self.contents(&images)?;
        let mut answers = Vec::with_capacity(contents.len());
        for (offset, bytes) in contents {
            let (offset, length) = (base + offset, bytes.len() as u64);
            self.step(backing, StepKind::Write { offset, length });
            let data = AlignedBytes::from(bytes.as_slice());
            answers.push(self.start(|| Op::WriteBytes {
                file,
                offset,
                data,
                fua: false,
            }));
        }
        for answer in answers {
            self.done(answer).await?;
        }
        self.flush(file, backing).await?;
        let superblocks = images.superblocks().map_err(|error| error.to_string())?;
        for (offset, image) in superblocks {
            self.write(file, backing, base + offset, &image).await?;
        }
        self.flush(file, backing).await?;
        // D16: up to here the old area counts, whatever happens.
        let flipped = match &to {
            Target::Behind { base, locator_at } => {
                let locator = Locator {
                    volume: old.volume,
                    area_offset: *base,
                    area_size: layout.total,
                    zero: (old.data_size, size),
                };
                match self
                    .write(file, backing, *locator_at, &locator.encode())
                    .await
                {
                    Ok(()) => self.flush(file, backing).await,
                    failed => failed,
                }
            }
            Target::Beside { beside, .. } => {
                self.step(&self.meta, StepKind::Replace);
                let (beside, path) = (beside.clone(), self.meta_path.clone());
                let renamed =
                    tokio::task::spawn_blocking(move || put_in_place(&beside, &path)).await;
                renamed
                    .map_err(|error| error.to_string())
                    .and_then(|renamed| renamed.map_err(|error| error.to_string()))
            }
        };
        self.shard.with_services(|services| {
            let service = &mut services[self.service];
            if let Err(why) = flipped {
                service.halted = Some(format!(
                    "whether the metadata of volume {} was moved is not known: {why}",
                    self.name
                ));
                return;
            }
            service.core.moved(index, &sb);
            let files = &mut service.volumes[index.0 as usize];
            files.meta_base = base;
            files.meta = file;
            if let Target::Behind { locator_at, base } = to {
                let locator = Locator {
                    volume: old.volume,
                    area_offset: base,
                    area_size: layout.total,
                    zero: (old.data_size, size),
                };
                files.not_zero = Some((locator_at, locator));
            }
        });
        Ok(())
    }
}

/// Where metadata is moved to.
enum Target {
    /// Internal: behind the new end.
    Behind { base: u64, locator_at: u64 },
    /// External: a new file that takes the place of the old one.
    Beside {
        file: FileId,
        backing: Backing,
        beside: PathBuf,
    },
}

async fn make_room(
    shard: &Shard,
    service: usize,
    index: VolumeIndex,
    size: u64,
) -> Result<(), String> {
    let found = shard.with_services(|services| {
        let service = &services[service];
        let files = &service.volumes[index.0 as usize];
        let ids = (
            files.data,
            files.meta,
            files.meta_base,
            files.meta_path.clone(),
        );
        (service.name.clone(), files.name.clone(), ids)
    });
    let (service_name, name, (data_file, meta_file, base, meta_path)) = found;
    let gone = || "its disk is not in use".to_owned();
    let volume = Volume {
        shard,
        service,
        index,
        service_name,
        name,
        data: shard.ring().backing(data_file).ok_or_else(gone)?,
        data_file,
        meta: shard.ring().backing(meta_file).ok_or_else(gone)?,
        meta_file,
        meta_path,
        base,
    };
    let old = volume.superblock()?;
    let layout = volume.layout(&old, size)?;
    if !volume.internal() {
        return beside(&volume, &old, &layout, size).await;
    }
    if old.room < size {
        behind(&volume, &old, &layout, size).await?;
    }
    // Also where an earlier try came so far and no further.
    zero_behind(&volume).await
}

/// Internal metadata moves behind the new end of the backing.
async fn behind(
    volume: &Volume<'_>,
    old: &Superblock,
    layout: &Layout,
    size: u64,
) -> Result<(), String> {
    let path = volume.data.path().to_owned();
    // Old area and old locator stay as they are until the flip.
    let old_end = volume.base + old.area_size + BLOCK;
    let end = size.max(old_end).next_multiple_of(BLOCK) + layout.total + BLOCK;
    volume.remember_size()?;
    let device = volume.lengthen(end).await?;
    let locator_at = Locator::offset(device).unwrap_or(0);
    let base = locator_at.saturating_sub(layout.total) / BLOCK * BLOCK;
    if base < size {
        return Err(format!(
            "{} has {device} bytes, and {} are needed for the data and its metadata; enlarge the device first",
            path.display(),
            size + layout.total + BLOCK
        ));
    }
    if base < old_end {
        return Err(format!(
            "the new metadata would lie over the old; enlarge {} by at least {} bytes more",
            path.display(),
            old_end - base
        ));
    }
    volume
        .move_metadata(size, Target::Behind { base, locator_at })
        .await?;
    volume.remember_size()
}

/// What the locator of this process names as not zero yet is made zero. What an earlier one left over was made zero before the
/// volume was attached.
async fn zero_behind(volume: &Volume<'_>) -> Result<(), String> {
    let files =
        |of: &mut Vec<Service>| of[volume.service].volumes[volume.index.0 as usize].not_zero;
    let Some((at, locator)) = volume.shard.with_services(|services| files(services)) else {
        return Ok(());
    };
    let (from, to) = locator.zero;
    volume.zero(from, to).await?;
    let done = Locator {
        zero: (0, 0),
        ..locator
    };
    volume
        .write(volume.data_file, &volume.data, at, &done.encode())
        .await?;
    volume.flush(volume.data_file, &volume.data).await?;
    volume.shard.with_services(|services| {
        services[volume.service].volumes[volume.index.0 as usize].not_zero = None;
    });
    Ok(())
}

/// External metadata is written into a new file.
async fn beside(
    volume: &Volume<'_>,
    old: &Superblock,
    layout: &Layout,
    size: u64,
) -> Result<(), String> {
    if old.room >= size {
        return Ok(());
    }
    if volume.meta.kind() != BackingKind::File {
        return Err(
            "its metadata is on a device of its own, where there is no room for a second copy of it; use a file for the metadata"
                .into(),
        );
    }
    let path = volume.data.path().display();
    let device = volume.lengthen(size).await?;
    if device < size {
        return Err(format!(
            "{path} has {device} bytes; enlarge the device first"
        ));
    }
    volume.zero(old.data_size, size).await?;
    let (backing, beside) = file_beside(&volume.meta_path, &volume.name, layout.total)
        .map_err(|error| error.to_string())?;
    let ring = volume.shard.ring();
    let file = ring.attach(backing.clone());
    let target = Target::Beside {
        file,
        backing,
        beside: beside.clone(),
    };
    let moved = volume.move_metadata(size, target).await;
    let unused = if moved.is_ok() {
        volume.meta_file
    } else {
        file
    };
    // At rest, so nothing of it is under way.
    if let Err(error) = ring.detach(unused) {
        tracing::warn!(%error, "the file of the old metadata stays open until this process ends");
    }
    if moved.is_err() {
        // It never counted; the next try removes it, too.
        let _ = std::fs::remove_file(&beside);
    }
    moved
}
