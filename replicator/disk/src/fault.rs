//! A disk that fails on command, for tests with real processes: a volatile write cache over the real file, errors,
//! short transfers and hangs, below the same code that drives the kernel.
//!
//! A completed write lives in memory only until a flush (or, for FUA, goes straight to the file), as in a drive
//! with a write cache. [`power_cut`] lets any subset of the un-flushed sectors survive, each sector in any version it had
//! since the last flush, for all disks of the process at one instant, and aborts the process.

use crate::buf::AlignedBytes;
use crate::job::{Step, Verb};
use rustix::io::{Errno, ReadWriteFlags, pread, pwritev2};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Un-flushed versions kept per sector; between the oldest and the newest, further ones are forgotten.
const VERSIONS: usize = 4;
/// Un-flushed bytes, beyond which the cache is written out as a real one would be.
const CACHE_BYTES: usize = 128 << 20;
/// Zeroing more than this at once goes through to the file.
const ZERO_CACHED: u64 = 16 << 20;

/// Contents of a sector; `None` is zeroes.
type Version = Option<Arc<[u8]>>;

/// Which operations a rule is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Read,
    Write,
    Flush,
    Zero,
    Any,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    Error(i32),
    Hang,
    /// At most this many bytes move at once.
    Short(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rule {
    pub class: Class,
    pub effect: Effect,
    /// Start and length in bytes; everything if `None`.
    pub range: Option<(u64, u64)>,
    /// How often it still applies; always if `None`.
    pub times: Option<u32>,
}

#[derive(Default)]
struct State {
    cache_off: bool,
    /// By sector number, oldest version first.
    cache: BTreeMap<u64, Vec<Version>>,
    rules: Vec<Rule>,
    /// Bytes of held-back writes: a power cut may have let any part of them through.
    held_writes: HashMap<usize, (u64, Vec<u8>)>,
    /// Requests of the ring, and threads of the start-up path, that are held back.
    held: HashSet<usize>,
    held_threads: usize,
    wakers: Vec<OwnedFd>,
    operations: [u64; 4],
}

pub(crate) struct FaultDisk {
    file: File,
    sector: usize,
    state: Mutex<State>,
    changed: Condvar,
    socket: PathBuf,
    listener: Arc<UnixListener>,
}

/// Every fault disk of this process: a power cut hits all of them.
static DISKS: Mutex<Vec<Weak<FaultDisk>>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not turn into a different fault than the one commanded.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FaultDisk {
    /// A disk over `file` (opened for direct I/O), commanded through `socket`.
    pub fn open(file: File, sector: u32, socket: &Path) -> io::Result<Arc<FaultDisk>> {
        let listener = Arc::new(crate::fault_control::bind(socket)?);
        let disk = Arc::new(FaultDisk {
            file,
            sector: sector as usize,
            state: Mutex::default(),
            changed: Condvar::new(),
            socket: socket.into(),
            listener: listener.clone(),
        });
        let mut disks = locked(&DISKS);
        disks.retain(|disk| disk.strong_count() > 0);
        disks.push(Arc::downgrade(&disk));
        drop(disks);
        crate::fault_control::serve(listener, Arc::downgrade(&disk))?;
        tracing::warn!(socket = %socket.display(), "fault injection: un-flushed writes of this backing live in memory only; never use this outside tests");
        Ok(disk)
    }

    /// A ring's event, signalled when held-back operations may go on.
    pub fn wake_through(&self, event: OwnedFd) {
        locked(&self.state).wakers.push(event);
    }

    /// Carries out a step of the request `key`; `None` if it is held back: to be tried again after a wake-up.
    ///
    /// # Safety
    /// `ptr` is valid for the step's length (reading or writing, by its verb) during this call.
    pub unsafe fn start(&self, key: usize, step: &Step, ptr: *mut u8) -> Option<i32> {
        let mut state = locked(&self.state);
        let write_bytes = || {
            // SAFETY: the caller's promise.
            unsafe { std::slice::from_raw_parts(ptr, step.len as usize) }
        };
        let len = match self.judge(&mut state, class_of(step.verb), step.offset, step.len) {
            Judgement::Error(errno) => {
                state.held_writes.remove(&key);
                state.held.remove(&key);
                return Some(-errno);
            }
            Judgement::Hang => {
                if let Verb::Write { .. } = step.verb {
                    state
                        .held_writes
                        .entry(key)
                        .or_insert_with(|| (step.offset, write_bytes().to_vec()));
                }
                state.held.insert(key);
                return None;
            }
            Judgement::Go(len) => len,
        };
        state.held_writes.remove(&key);
        state.held.remove(&key);
        let result = match step.verb {
            // SAFETY: the caller's promise; the kernel and nobody else has this memory.
            Verb::Read => self.read(&mut state, step.offset, len, unsafe {
                std::slice::from_raw_parts_mut(ptr, step.len as usize)
            }),
            Verb::Write { dsync } => self.write(
                &mut state,
                step.offset,
                &write_bytes()[..len as usize],
                dsync,
            ),
            Verb::Sync => self.flush(&mut state).map(|()| 0),
            Verb::Punch | Verb::ZeroRange => self.zero(&mut state, step.offset, len).map(|()| 0),
        };
        Some(result.map_or_else(
            |errno| -errno.raw_os_error(),
            |moved| i32::try_from(moved).unwrap_or(i32::MAX),
        ))
    }

    fn judge(&self, state: &mut State, class: Class, offset: u64, len: u64) -> Judgement {
        state.operations[match class {
            Class::Read => 0,
            Class::Write => 1,
            Class::Flush => 2,
            Class::Zero | Class::Any => 3,
        }] += 1;
        // Shortened first: an error further on then meets the piece that reaches it, as on a disk.
        let mut allowed = len;
        for short_pass in [true, false] {
            for rule in &mut state.rules {
                let meets = rule.range.is_none_or(|(start, length)| {
                    class == Class::Flush
                        || (offset < start.saturating_add(length) && start < offset + allowed)
                });
                let mine = rule.class == class || rule.class == Class::Any;
                let short = matches!(rule.effect, Effect::Short(_));
                if !mine || !meets || short != short_pass || rule.times == Some(0) {
                    continue;
                }
                match rule.effect {
                    Effect::Short(most) if matches!(class, Class::Read | Class::Write) => {
                        allowed = allowed.min(most);
                    }
                    Effect::Short(_) => continue,
                    Effect::Hang => return Judgement::Hang,
                    Effect::Error(_) => {}
                }
                if let Some(times) = &mut rule.times {
                    *times -= 1;
                }
                if let Effect::Error(errno) = rule.effect {
                    return Judgement::Error(errno);
                }
            }
        }
        Judgement::Go(allowed)
    }

    /// Reads at most `most` bytes. Direct I/O on the file moves whole sectors even so.
    fn read(
        &self,
        state: &mut State,
        offset: u64,
        most: u64,
        bytes: &mut [u8],
    ) -> Result<usize, Errno> {
        let most = most as usize;
        let whole = most.next_multiple_of(self.sector).min(bytes.len());
        let read = pread(&self.file, &mut bytes[..whole], offset)?;
        let first = offset / self.sector as u64;
        for (sector, versions) in state
            .cache
            .range(first..(offset + read as u64).div_ceil(self.sector as u64))
        {
            let from = (sector - first) as usize * self.sector;
            // A short read may end inside a sector.
            let Some(target) = bytes.get_mut(from..(from + self.sector).min(read)) else {
                continue;
            };
            match versions.last().expect("a cached sector has a version") {
                Some(data) => target.copy_from_slice(&data[..target.len()]),
                None => target.fill(0),
            }
        }
        Ok(read.min(most))
    }

    fn write(
        &self,
        state: &mut State,
        offset: u64,
        bytes: &[u8],
        dsync: bool,
    ) -> Result<usize, Errno> {
        // Part of a sector never reaches a disk.
        let bytes = &bytes[..bytes.len() - bytes.len() % self.sector];
        let first = offset / self.sector as u64;
        if dsync || state.cache_off {
            self.write_through(offset, bytes, dsync)?;
            for sector in first..first + (bytes.len() / self.sector) as u64 {
                state.cache.remove(&sector);
            }
            return Ok(bytes.len());
        }
        for (sector, data) in (first..).zip(bytes.chunks(self.sector)) {
            remember(state, sector, Some(Arc::from(data)));
        }
        self.bound(state)?;
        Ok(bytes.len())
    }

    fn zero(&self, state: &mut State, offset: u64, len: u64) -> Result<(), Errno> {
        let sectors = offset / self.sector as u64..(offset + len) / self.sector as u64;
        if len <= ZERO_CACHED && !state.cache_off {
            sectors.for_each(|sector| remember(state, sector, None));
            return self.bound(state);
        }
        use rustix::fs::{FallocateFlags, fallocate};
        fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )?;
        let covered: Vec<u64> = state
            .cache
            .range(sectors)
            .map(|(sector, _)| *sector)
            .collect();
        for sector in covered {
            state.cache.remove(&sector);
        }
        Ok(())
    }

    fn bound(&self, state: &mut State) -> Result<(), Errno> {
        if state.cache.len() * self.sector > CACHE_BYTES {
            self.write_out(state)
        } else {
            Ok(())
        }
    }

    fn flush(&self, state: &mut State) -> Result<(), Errno> {
        self.write_out(state)?;
        rustix::fs::fdatasync(&self.file)
    }

    /// The newest version of every sector to the file.
    fn write_out(&self, state: &mut State) -> Result<(), Errno> {
        let newest: Vec<(u64, Version)> = state
            .cache
            .iter()
            .map(|(sector, versions)| (*sector, versions.last().expect("a version").clone()))
            .collect();
        self.apply(&newest)?;
        state.cache.clear();
        Ok(())
    }

    /// Writes sectors (ascending) to the file, neighbours together.
    fn apply(&self, sectors: &[(u64, Version)]) -> Result<(), Errno> {
        let mut bounce = AlignedBytes::zeroed(1 << 20);
        let most = bounce.len() / self.sector;
        let mut rest = sectors;
        while let Some((first, _)) = rest.first() {
            let run = rest
                .iter()
                .zip(*first..)
                .take(most)
                .take_while(|((sector, _), expected)| sector == expected)
                .count();
            for ((_, version), target) in rest[..run].iter().zip(bounce.chunks_mut(self.sector)) {
                match version {
                    Some(data) => target.copy_from_slice(data),
                    None => target.fill(0),
                }
            }
            self.write_through(
                first * self.sector as u64,
                &bounce[..run * self.sector],
                false,
            )?;
            rest = &rest[run..];
        }
        Ok(())
    }

    fn write_through(&self, offset: u64, bytes: &[u8], dsync: bool) -> Result<(), Errno> {
        let flags = if dsync {
            ReadWriteFlags::DSYNC
        } else {
            ReadWriteFlags::empty()
        };
        let mut done = 0;
        while done < bytes.len() {
            match pwritev2(
                &self.file,
                &[IoSlice::new(&bytes[done..])],
                offset + done as u64,
                flags,
            ) {
                Ok(0) => return Err(Errno::IO),
                Ok(moved) => done += moved,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn blocking<T>(
        &self,
        class: Class,
        offset: u64,
        len: u64,
        work: impl FnOnce(&Self, &mut State, u64) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut state = locked(&self.state);
        loop {
            match self.judge(&mut state, class, offset, len) {
                Judgement::Go(len) => return work(self, &mut state, len),
                Judgement::Error(errno) => return Err(Errno::from_raw_os_error(errno)),
                Judgement::Hang => {
                    state.held_threads += 1;
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                    state.held_threads -= 1;
                }
            }
        }
    }

    pub fn blocking_read(&self, offset: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
        self.blocking(
            Class::Read,
            offset,
            bytes.len() as u64,
            |disk, state, len| disk.read(state, offset, len, bytes),
        )
    }

    pub fn blocking_write(&self, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        self.blocking(
            Class::Write,
            offset,
            bytes.len() as u64,
            |disk, state, len| disk.write(state, offset, &bytes[..len as usize], false),
        )
    }

    pub fn blocking_sync(&self) -> Result<(), Errno> {
        self.blocking(Class::Flush, 0, 0, |disk, state, _| disk.flush(state))
    }

    // --- commands ---

    pub fn add_rule(&self, rule: Rule) {
        locked(&self.state).rules.push(rule);
    }

    /// Takes rules away (all, or those that hang) and lets what they held back go on.
    pub fn remove_rules(&self, hangs_only: bool) {
        let mut state = locked(&self.state);
        state
            .rules
            .retain(|rule| hangs_only && rule.effect != Effect::Hang);
        for event in &state.wakers {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
        self.changed.notify_all();
    }

    /// Without the cache, writes go to the file at once, and only in-flight ones can be lost.
    pub fn set_cache(&self, on: bool) -> Result<(), Errno> {
        let mut state = locked(&self.state);
        state.cache_off = !on;
        if on { Ok(()) } else { self.flush(&mut state) }
    }

    /// `unflushed=SECTORS held=N rules=N reads=N writes=N flushes=N zeroes=N`
    pub fn status(&self) -> String {
        let state = locked(&self.state);
        let [reads, writes, flushes, zeroes] = state.operations;
        format!(
            "unflushed={} held={} rules={} reads={reads} writes={writes} flushes={flushes} zeroes={zeroes}",
            state.cache.len(),
            state.held.len() + state.held_threads,
            state
                .rules
                .iter()
                .filter(|rule| rule.times != Some(0))
                .count()
        )
    }

    /// What is in the file after the loss: any version of each un-flushed sector, the flushed one included.
    fn lose(&self, state: &mut State, random: &mut Random) -> Result<(), Errno> {
        let held = std::mem::take(&mut state.held_writes);
        let mut by_key: Vec<_> = held.into_iter().collect();
        by_key.sort_by_key(|(key, _)| *key);
        for (_, (offset, bytes)) in by_key {
            for (sector, data) in
                (offset / self.sector as u64..).zip(bytes.chunks_exact(self.sector))
            {
                remember(state, sector, Some(Arc::from(data)));
            }
        }
        // Some cuts lose everything, some little: uniform coins alone would hardly ever do either.
        let survive_percent = [0, 10, 50, 90, 100][random.below(5) as usize];
        let mut survivors = Vec::new();
        for (sector, mut versions) in std::mem::take(&mut state.cache) {
            if random.below(100) < survive_percent {
                let which = random.below(versions.len() as u64) as usize;
                survivors.push((sector, versions.swap_remove(which)));
            }
        }
        self.apply(&survivors)?;
        rustix::fs::fdatasync(&self.file)
    }
}

impl Drop for FaultDisk {
    fn drop(&mut self) {
        // Closing a file is no power cut: the drive keeps its cache and writes it out in time.
        let mut state = std::mem::take(&mut *locked(&self.state));
        let _ = self.write_out(&mut state);
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        let _ = std::fs::remove_file(&self.socket);
    }
}

enum Judgement {
    Go(u64),
    Error(i32),
    Hang,
}

fn class_of(verb: Verb) -> Class {
    match verb {
        Verb::Read => Class::Read,
        Verb::Write { .. } => Class::Write,
        Verb::Sync => Class::Flush,
        Verb::Punch | Verb::ZeroRange => Class::Zero,
    }
}

fn remember(state: &mut State, sector: u64, version: Version) {
    let versions = state.cache.entry(sector).or_default();
    if versions.len() == VERSIONS {
        versions.remove(1);
    }
    versions.push(version);
}

/// Cuts the power of every fault disk of this process: the loss reaches the files, then the process aborts. Seed
/// `None` loses all that is un-flushed.
pub(crate) fn power_cut(seed: Option<u64>) -> ! {
    let disks: Vec<Arc<FaultDisk>> = locked(&DISKS).iter().filter_map(Weak::upgrade).collect();
    // All are stopped before any loss is applied: nothing runs on after the first.
    let mut states: Vec<_> = disks.iter().map(|disk| locked(&disk.state)).collect();
    if let Some(seed) = seed {
        let mut random = Random(seed);
        for (disk, state) in disks.iter().zip(&mut states) {
            if let Err(errno) = disk.lose(state, &mut random) {
                eprintln!("power cut: writing the survivors failed: {errno}");
            }
        }
    }
    std::process::abort()
}

/// SplitMix64: the same loss for the same seed and the same history.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
