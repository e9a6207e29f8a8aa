//! Everything between submission and completion: the queue, the kernel's two rings, and what they keep alive.

use crate::backing::{Backing, Engine};
use crate::buf::{BufPool, Mapping};
use crate::error::{CloseError, DiskError, DiskErrorKind, RingError};
use crate::in_place;
use crate::job::{Job, Memory, Progress, Step, Verb, ZEROES};
use crate::op::{Completion, FileId, Op};
use crate::setup::{REGISTERED_FILES, REGISTERED_PIECE, RingFeatures};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::FallocateFlags;
use slab::Slab;
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long dropping a ring waits for requests in the kernel before it leaks what they use.
const DROP_WAIT: Duration = Duration::from_secs(5);

pub(crate) struct Attached {
    pub backing: Backing,
    serial: u32,
    registered: bool,
}

pub(crate) struct Inner {
    uring: ManuallyDrop<IoUring>,
    pool: BufPool,
    zeroes: ManuallyDrop<Mapping>,
    registered_buffers: bool,
    registered_files: bool,
    files: Slab<Attached>,
    serial: u32,
    /// Every request from submission to completion, with all that the kernel uses for it.
    pub jobs: ManuallyDrop<Slab<Job>>,
    /// Requests whose next step has not been handed to the kernel.
    queue: VecDeque<usize>,
    in_kernel: u32,
    max_in_kernel: u32,
    pub done: Vec<Completion>,
    /// Requests that a fault layer holds back.
    #[cfg(feature = "fault-injection")]
    held: Vec<usize>,
    event: Rc<OwnedFd>,
}

impl Inner {
    pub fn new(
        uring: IoUring,
        features: RingFeatures,
        pool: &BufPool,
        event: Rc<OwnedFd>,
    ) -> Result<Inner, RingError> {
        let zeroes = Mapping::new(ZEROES, false).map_err(|source| RingError::Setup {
            what: "mapping zeroes",
            source,
        })?;
        Ok(Inner {
            max_in_kernel: uring.params().cq_entries(),
            uring: ManuallyDrop::new(uring),
            pool: pool.clone(),
            zeroes: ManuallyDrop::new(zeroes),
            registered_buffers: features.registered_buffers,
            registered_files: features.registered_files,
            files: Slab::new(),
            serial: 0,
            jobs: ManuallyDrop::new(Slab::with_capacity(1024)),
            queue: VecDeque::with_capacity(1024),
            in_kernel: 0,
            done: Vec::with_capacity(256),
            #[cfg(feature = "fault-injection")]
            held: Vec::new(),
            event,
        })
    }

    pub fn attach(&mut self, backing: Backing) -> FileId {
        self.serial = self
            .serial
            .checked_add(1)
            .expect("fewer than 2^32 attaches in one run");
        let serial = self.serial;
        #[cfg(feature = "fault-injection")]
        if let Engine::Fault(disk) = &backing.inner.engine {
            disk.wake_through(
                self.event
                    .try_clone()
                    .expect("a file descriptor for the fault layer"),
            );
        }
        let fd = backing.inner.raw_fd();
        let slot = self.files.insert(Attached {
            backing,
            serial,
            registered: false,
        });
        if self.registered_files && (slot as u64) < u64::from(REGISTERED_FILES) {
            let registered = self
                .uring
                .submitter()
                .register_files_update(slot as u32, &[fd]);
            self.files[slot].registered = registered.is_ok();
        }
        FileId {
            slot: slot as u32,
            serial,
        }
    }

    pub fn attached(&self, file: FileId) -> Option<&Attached> {
        self.files
            .get(file.slot as usize)
            .filter(|attached| attached.serial == file.serial)
    }

    pub fn detach(&mut self, file: FileId) -> Result<Backing, CloseError> {
        let attached = self.attached(file).ok_or(CloseError::NotAttached)?;
        let requests = attached.backing.in_flight();
        if requests > 0 {
            return Err(CloseError::Busy {
                path: attached.backing.path().into(),
                requests,
            });
        }
        if attached.registered {
            // Failing here would leave the kernel a reference, and so the lock: the safe side.
            if let Err(error) = self
                .uring
                .submitter()
                .register_files_update(file.slot, &[-1])
            {
                tracing::warn!(%error, path = %attached.backing.path().display(), "the ring keeps its reference to a detached backing; it stays locked until the process ends");
            }
        }
        Ok(self.files.remove(file.slot as usize).backing)
    }

    pub fn push(&mut self, op: Op, token: u64) {
        let now = Instant::now();
        let Some(attached) = self.attached(op.file()) else {
            let error = DiskError {
                kind: DiskErrorKind::Invalid,
                op: op.kind(),
                offset: 0,
                len: 0,
                path: Arc::from(Path::new("(detached)")),
            };
            self.done.push(Completion {
                token,
                result: Err(error),
                took: Duration::ZERO,
            });
            return;
        };
        let foreign = match &op {
            Op::Read { buf, .. } => !self.pool.owns(buf.buf()),
            Op::Write { buf, .. } => !self.pool.owns(buf),
            _ => false,
        };
        if foreign {
            // Its place in the arena would name other memory to the kernel.
            let error = attached
                .backing
                .inner
                .error(DiskErrorKind::Invalid, op.kind(), 0, 0);
            self.done.push(Completion {
                token,
                result: Err(error),
                took: Duration::ZERO,
            });
            return;
        }
        match Job::new(op, token, attached.backing.inner.clone(), now) {
            Ok(Some(job)) => {
                let in_flight = &job.backing.in_flight;
                in_flight.set(in_flight.get() + 1);
                let key = self.jobs.insert(job);
                self.queue.push_back(key);
            }
            Ok(None) => self.done.push(Completion {
                token,
                result: Ok(()),
                took: Duration::ZERO,
            }),
            Err(error) => self.done.push(Completion {
                token,
                result: Err(error),
                took: Duration::ZERO,
            }),
        }
    }

    /// Moves queued requests into the submission queue, as many as the kernel's queues hold.
    pub fn fill(&mut self) {
        while self.in_kernel < self.max_in_kernel {
            let Some(key) = self.queue.pop_front() else {
                return;
            };
            let step = self.jobs[key].step();
            match &self.jobs[key].backing.engine {
                Engine::Memory if in_place::fits(&step) => {
                    let ptr = self.address(&step);
                    #[cfg(feature = "fault-injection")]
                    self.note(key, &step);
                    let backing = &self.jobs[key].backing;
                    // SAFETY: the job holds the memory of its step; what is read into has no other user until then.
                    let result = unsafe { in_place::run(&backing.file, &step, ptr) };
                    self.answer(key, result);
                }
                Engine::Kernel | Engine::Memory => {
                    let entry = self.entry(key, &step);
                    if self.uring.submission().is_full() {
                        self.enter();
                    }
                    // SAFETY: the memory and the file of the entry are held by `jobs[key]`, which is removed only after its
                    // completion was read (and leaked, if that never comes).
                    if unsafe { self.uring.submission().push(&entry) }.is_err() {
                        self.queue.push_front(key);
                        return;
                    }
                    self.in_kernel += 1;
                    // The kernel looks at it with the next call.
                    #[cfg(feature = "fault-injection")]
                    self.note(key, &step);
                }
                #[cfg(feature = "fault-injection")]
                Engine::Fault(disk) => {
                    let disk = disk.clone();
                    let ptr = self.address(&step);
                    // SAFETY: as above, the job holds the memory of its step.
                    match unsafe { disk.start(key, &step, ptr) } {
                        Some(result) => self.answer(key, result),
                        None => self.held.push(key),
                    }
                }
            }
        }
    }

    /// For tests that record what is asked of the disk.
    #[cfg(feature = "fault-injection")]
    fn note(&mut self, key: usize, step: &Step) {
        let ptr = self.address(step);
        let job = &mut self.jobs[key];
        // SAFETY: the job holds the memory of its step.
        job.noted = unsafe { crate::record::step_began(&job.backing.path, step, ptr) };
    }

    fn address(&self, step: &Step) -> *mut u8 {
        match step.memory {
            Memory::None => std::ptr::null_mut(),
            Memory::At { ptr, .. } => ptr.as_ptr(),
            Memory::Zeroes => self.zeroes.base().as_ptr(),
        }
    }

    fn entry(&self, key: usize, step: &Step) -> squeue::Entry {
        let job = &self.jobs[key];
        let mut flags = squeue::Flags::empty();
        let file = match self.files.get(job.file.slot as usize) {
            Some(attached) if attached.registered => {
                flags |= squeue::Flags::FIXED_FILE;
                types::Fd(job.file.slot as RawFd)
            }
            _ => types::Fd(job.backing.raw_fd()),
        };
        if step.force_async {
            flags |= squeue::Flags::ASYNC;
        }
        let entry = self.entry_on(file, step);
        entry.flags(flags).user_data(key as u64)
    }

    fn entry_on(&self, file: types::Fd, step: &Step) -> squeue::Entry {
        let len = step.len as u32;
        let fixed = match step.memory {
            Memory::At {
                pooled: Some(from), ..
            } if self.registered_buffers => {
                let first = from / REGISTERED_PIECE;
                (first == (from + len as usize - 1) / REGISTERED_PIECE).then_some(first as u16)
            }
            _ => None,
        };
        let ptr = match step.memory {
            Memory::At { ptr, .. } => ptr.as_ptr(),
            Memory::Zeroes => self.zeroes.base().as_ptr(),
            Memory::None => std::ptr::null_mut(),
        };
        let keep = FallocateFlags::KEEP_SIZE;
        match step.verb {
            Verb::Read => match fixed {
                Some(index) => opcode::ReadFixed::new(file, ptr, len, index)
                    .offset(step.offset)
                    .build(),
                None => opcode::Read::new(file, ptr, len)
                    .offset(step.offset)
                    .build(),
            },
            Verb::Write { dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                match fixed {
                    Some(index) => opcode::WriteFixed::new(file, ptr, len, index)
                        .offset(step.offset)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Write::new(file, ptr, len)
                        .offset(step.offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Verb::Sync => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Verb::Punch | Verb::ZeroRange => {
                let mode = if step.verb == Verb::Punch {
                    FallocateFlags::PUNCH_HOLE
                } else {
                    FallocateFlags::ZERO_RANGE
                } | keep;
                opcode::Fallocate::new(file, step.len)
                    .offset(step.offset)
                    .mode(mode.bits() as i32)
                    .build()
            }
        }
    }

    /// Hands the submission queue to the kernel and runs its deferred work.
    pub fn enter(&mut self) {
        loop {
            let queue = self.uring.submission();
            if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                return;
            }
            drop(queue);
            match self.uring.submit() {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Out of memory or completion space for the moment: the entries stay queued, and the waiter comes back here.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    signal(&self.event);
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "io_uring refused to take requests; they stay queued and age");
                    return;
                }
                // Taken in part: the next call takes the rest or says why not.
                Ok(_) if self.uring.submission().is_empty() => return,
                Ok(_) => {}
            }
        }
    }

    /// Everything that can be done without waiting.
    pub fn pump(&mut self) {
        self.enter();
        loop {
            let reaped = self.reap();
            self.fill();
            self.enter();
            if reaped == 0 {
                return;
            }
        }
    }

    fn reap(&mut self) -> usize {
        let mut reaped = 0;
        loop {
            let Some(entry) = self.uring.completion().next() else {
                break;
            };
            reaped += 1;
            self.in_kernel -= 1;
            self.answer(entry.user_data() as usize, entry.result());
        }
        #[cfg(feature = "fault-injection")]
        for key in std::mem::take(&mut self.held) {
            self.queue.push_back(key);
        }
        reaped
    }

    fn answer(&mut self, key: usize, result: i32) {
        let now = Instant::now();
        #[cfg(feature = "fault-injection")]
        crate::record::ended(self.jobs[key].noted.take(), result >= 0);
        match self.jobs[key].answer(result, now) {
            // Ahead of new work: it is older.
            Progress::Again => self.queue.push_front(key),
            Progress::Done(result) => {
                let job = self.jobs.remove(key);
                job.backing.in_flight.set(job.backing.in_flight.get() - 1);
                self.done.push(Completion {
                    token: job.token,
                    result,
                    took: now.saturating_duration_since(job.started),
                });
            }
        }
    }

    /// Blocks for one completion or the time.
    pub fn wait(&mut self, time: Duration) {
        if self.in_kernel == 0 {
            std::thread::sleep(time.min(Duration::from_millis(1)));
            return;
        }
        let time = types::Timespec::from(time);
        let args = types::SubmitArgs::new().timespec(&time);
        // Timeouts and interruptions show in the completion queue staying empty.
        let _ = self.uring.submitter().submit_with_args(1, &args);
    }
}

/// Makes a waiter look again.
pub(crate) fn signal(event: &OwnedFd) {
    // A full counter (EAGAIN) has been signalled already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What the kernel does not have yet will never run.
        for key in self.queue.drain(..) {
            self.jobs.remove(key);
        }
        #[cfg(feature = "fault-injection")]
        for key in self.held.drain(..) {
            self.jobs.remove(key);
        }
        let deadline = Instant::now() + DROP_WAIT;
        self.enter();
        while self.in_kernel > 0 && Instant::now() < deadline {
            self.wait(Duration::from_millis(100));
            loop {
                let Some(entry) = self.uring.completion().next() else {
                    break;
                };
                self.in_kernel -= 1;
                self.jobs.remove(entry.user_data() as usize);
            }
        }
        if self.in_kernel > 0 {
            let paths: Vec<_> = self
                .jobs
                .iter()
                .map(|(_, job)| job.backing.path.display().to_string())
                .collect();
            tracing::error!(
                requests = self.in_kernel,
                ?paths,
                "the disk does not finish its requests; their buffers and the locks are kept until this process ends"
            );
            return;
        }
        // The kernel takes a closed ring apart in the background; what holds the locks of the backings must not wait for that.
        if self.registered_files {
            let _ = self.uring.submitter().unregister_files();
        }
        // SAFETY: each is dropped once, here, and not used afterwards. Nothing is in the kernel, so nothing uses the memory; the ring goes
        // first, and with it the registration of the arena, which `pool` still keeps mapped.
        unsafe {
            ManuallyDrop::drop(&mut self.uring);
            ManuallyDrop::drop(&mut self.jobs);
            ManuallyDrop::drop(&mut self.zeroes);
        }
    }
}
