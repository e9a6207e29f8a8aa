//! The ring of a shard: requests in, completions out, on one thread, never blocking.

use crate::backing::{Backing, Engine};
use crate::buf::{BufPool, Mapping};
use crate::error::{CloseError, DiskError, DiskErrorKind, RingError};
use crate::job::{Job, Memory, Progress, Step, Verb, ZEROES};
use crate::op::{Completion, FileId, Op};
use crate::setup::{self, REGISTERED_FILES, REGISTERED_PIECE, RingFeatures};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;
use slab::Slab;
use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long dropping a ring waits for requests in the kernel before it leaks what they use.
const DROP_WAIT: Duration = Duration::from_secs(5);

/// Size of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    /// Submission queue length (a power of two, 1 to 32768). Four times as many requests may be in the kernel; more wait here.
    pub entries: u32,
    /// Register the pool's arena (needs lockable memory of its size).
    pub register_buffers: bool,
}

impl Default for RingOptions {
    fn default() -> Self {
        RingOptions {
            entries: 256,
            register_buffers: true,
        }
    }
}

/// The disks of one shard. Not `Send`: used on the thread that made it.
pub struct Ring {
    inner: RefCell<Inner>,
    event: Rc<OwnedFd>,
    /// Made at the first wait, since only then a runtime is needed.
    waiting: OnceCell<AsyncFd<SharedFd>>,
    features: RingFeatures,
}

struct SharedFd(Rc<OwnedFd>);

impl AsRawFd for SharedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

struct Attached {
    backing: Backing,
    serial: u32,
    registered: bool,
}

struct Inner {
    uring: ManuallyDrop<IoUring>,
    pool: BufPool,
    zeroes: ManuallyDrop<Mapping>,
    registered_buffers: bool,
    registered_files: bool,
    files: Slab<Attached>,
    serial: u32,
    /// Every request from submission to completion, with all that the kernel uses for it.
    jobs: ManuallyDrop<Slab<Job>>,
    /// Requests whose next step has not been handed to the kernel.
    queue: VecDeque<usize>,
    in_kernel: u32,
    max_in_kernel: u32,
    done: Vec<Completion>,
    /// Requests that a fault layer holds back.
    #[cfg(feature = "fault-injection")]
    held: Vec<usize>,
    event: Rc<OwnedFd>,
}

impl Ring {
    /// Sets the ring up and registers the pool.
    ///
    /// # Errors
    /// No io_uring, or not allowed, or not enough memory: [`RingError`] says what to do.
    pub fn new(options: RingOptions, pool: &BufPool) -> Result<Ring, RingError> {
        let (uring, mut features) = setup::build(options.entries.clamp(1, 32768))?;
        features.registered_buffers =
            options.register_buffers && setup::register_pool(&uring, pool);
        features.registered_files = setup::register_files(&uring);
        let event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| {
                RingError::Setup {
                    what: "eventfd",
                    source: errno.into(),
                }
            })?;
        uring
            .submitter()
            .register_eventfd(event.as_raw_fd())
            .map_err(|source| RingError::Setup {
                what: "registering the eventfd",
                source,
            })?;
        let zeroes = Mapping::new(ZEROES, false).map_err(|source| RingError::Setup {
            what: "mapping zeroes",
            source,
        })?;
        tracing::info!(
            ?features,
            entries = uring.params().sq_entries(),
            "disk ring ready"
        );
        let event = Rc::new(event);
        Ok(Ring {
            inner: RefCell::new(Inner {
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
                event: event.clone(),
            }),
            event,
            waiting: OnceCell::new(),
            features,
        })
    }

    /// What the kernel granted.
    pub fn features(&self) -> RingFeatures {
        self.features
    }

    /// Takes a backing onto the ring.
    pub fn attach(&self, backing: Backing) -> FileId {
        self.inner.borrow_mut().attach(backing)
    }

    /// Takes a backing off the ring; it stays open and locked until dropped.
    ///
    /// # Errors
    /// Unfinished requests: it stays attached, and locked, since the disk may still change.
    pub fn detach(&self, file: FileId) -> Result<Backing, CloseError> {
        self.inner.borrow_mut().detach(file)
    }

    /// A handle to an attached backing: size, growth, identity.
    pub fn backing(&self, file: FileId) -> Option<Backing> {
        self.inner
            .borrow()
            .attached(file)
            .map(|attached| attached.backing.clone())
    }

    /// Starts a request at once. Its one completion carries `token`, errors of the request itself included.
    pub fn submit(&self, op: Op, token: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.push(op, token);
        inner.fill();
        inner.enter();
        self.signal_if_done(&inner);
    }

    /// Puts a request into the queue, to be started by the next [`Self::flush_submissions`], [`Self::submit`] or
    /// [`Self::poll_completions`]: one system call for many requests.
    pub fn push(&self, op: Op, token: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.push(op, token);
        inner.fill();
        self.signal_if_done(&inner);
    }

    /// Starts several requests with one system call.
    pub fn submit_batch(&self, ops: impl IntoIterator<Item = (Op, u64)>) {
        let mut inner = self.inner.borrow_mut();
        for (op, token) in ops {
            inner.push(op, token);
        }
        inner.fill();
        inner.enter();
        self.signal_if_done(&inner);
    }

    /// Hands everything pushed to the kernel: one system call, none when there is nothing.
    pub fn flush_submissions(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.fill();
        inner.enter();
        self.signal_if_done(&inner);
    }

    /// Moves all completions there are to the end of `out`, without waiting; how many. Also continues short transfers and hands on what is queued,
    /// so it must be called whenever [`Self::ready`] says so.
    pub fn poll_completions(&self, out: &mut Vec<Completion>) -> usize {
        let mut inner = self.inner.borrow_mut();
        inner.pump();
        let count = inner.done.len();
        out.append(&mut inner.done);
        count
    }

    /// Waits until [`Self::poll_completions`] has something to give. One waiter at a time; cancel-safe.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn ready(&self) {
        let waiting = self.waiting.get_or_init(|| {
            // SAFETY: the eventfd is owned through the `Rc` inside, so it stays open and the same while the `AsyncFd` lives.
            let registered = unsafe {
                AsyncFd::register_with_interest(SharedFd(self.event.clone()), Interest::READABLE)
            };
            registered.unwrap_or_else(|error| {
                panic!("the eventfd of the ring cannot be watched: {error}")
            })
        });
        loop {
            {
                let mut inner = self.inner.borrow_mut();
                inner.pump();
                if !inner.done.is_empty() {
                    return;
                }
            }
            match waiting.readable().await {
                // The event counter is never read: every signal is a new edge, and clearing before the next look at the queue loses
                // none. That saves a system call per wake-up.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    panic!("the runtime of this shard ended while its ring was in use: {error}")
                }
            }
        }
    }

    /// Blocks until a request completes or `timeout` passes: for start-up, tools and tests, not for a serving shard.
    pub fn wait_completions(&self, timeout: Duration, out: &mut Vec<Completion>) -> usize {
        let deadline = Instant::now() + timeout;
        loop {
            let count = self.poll_completions(out);
            let left = deadline.saturating_duration_since(Instant::now());
            if count > 0 || left.is_zero() {
                return count;
            }
            self.inner
                .borrow_mut()
                .wait(left.min(Duration::from_millis(20)));
        }
    }

    /// Requests submitted and not completed.
    pub fn in_flight(&self) -> usize {
        self.inner.borrow().jobs.len()
    }

    /// How long the disk has been silent about the request that it has been silent about longest. Grows without bound on
    /// a hung disk; `None` without requests. Walks over all requests: for a heartbeat, not for every request.
    pub fn oldest_in_flight(&self, now: Instant) -> Option<Duration> {
        let inner = self.inner.borrow();
        inner
            .jobs
            .iter()
            .map(|(_, job)| now.saturating_duration_since(job.progressed))
            .max()
    }

    /// As [`Self::oldest_in_flight`], for one backing, with its token.
    pub fn oldest_of(&self, file: FileId, now: Instant) -> Option<(u64, Duration)> {
        let inner = self.inner.borrow();
        let of_file = inner.jobs.iter().filter(|(_, job)| job.file == file);
        of_file
            .map(|(_, job)| (job.token, now.saturating_duration_since(job.progressed)))
            .max_by_key(|(_, age)| *age)
    }

    /// A completion that did not come from the kernel must wake the waiter too.
    fn signal_if_done(&self, inner: &Inner) {
        if !inner.done.is_empty() {
            signal(&self.event);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Ring({} in flight, {:?})",
            self.in_flight(),
            self.features
        )
    }
}

impl Inner {
    fn attach(&mut self, backing: Backing) -> FileId {
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

    fn attached(&self, file: FileId) -> Option<&Attached> {
        self.files
            .get(file.slot as usize)
            .filter(|attached| attached.serial == file.serial)
    }

    fn detach(&mut self, file: FileId) -> Result<Backing, CloseError> {
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

    fn push(&mut self, op: Op, token: u64) {
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
    fn fill(&mut self) {
        while self.in_kernel < self.max_in_kernel {
            let Some(key) = self.queue.pop_front() else {
                return;
            };
            let step = self.jobs[key].step();
            match &self.jobs[key].backing.engine {
                Engine::Kernel => {
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

    #[cfg(feature = "fault-injection")]
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
    fn enter(&mut self) {
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
    fn pump(&mut self) {
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
    fn wait(&mut self, time: Duration) {
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
fn signal(event: &OwnedFd) {
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
