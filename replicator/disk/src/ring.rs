//! The ring of a shard: requests in, completions out, on one thread, never blocking.

use crate::backing::Backing;
use crate::buf::BufPool;
use crate::error::{CloseError, RingError};
use crate::in_flight::{Inner, signal};
use crate::op::{Completion, FileId, Op};
use crate::setup::{self, RingFeatures};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::{OnceCell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
        tracing::info!(
            ?features,
            entries = uring.params().sq_entries(),
            "disk ring ready"
        );
        let event = Rc::new(event);
        Ok(Ring {
            inner: RefCell::new(Inner::new(uring, features, pool, event.clone())?),
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
        self.inner.borrow_mut().push(op, token);
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

    /// Hands everything pushed to the kernel: one system call, none when there is nothing. True: something is complete already, and
    /// nobody is woken for it, so [`Self::poll_completions`] is to be called.
    #[must_use = "completions that are there already wake nobody"]
    pub fn flush_submissions(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.fill();
        inner.enter();
        !inner.done.is_empty()
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
