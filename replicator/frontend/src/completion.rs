//! The way back from a volume to the session that asked.
//!
//! A completion is a counted reference to its session's queue and a slot number: handing one out, keeping it
//! in the replicator's own request record and resolving it allocates nothing.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Waker};

use crate::error::{IoError, IoErrorKind};
use crate::volume::{Buffer, Output};

/// A resolved request: the slot the session gave it, and how it ended.
pub type Finished<B> = (u32, Result<Output<B>, IoError>);

/// Resolved requests of one session, in the order they finished.
///
/// The queue never holds more than the session has requests in flight.
pub struct CompletionQueue<B> {
    finished: RefCell<VecDeque<Finished<B>>>,
    waker: RefCell<Option<Waker>>,
    /// The session is running right now and looks at the queue before it sleeps: waking it is wasted work.
    attended: Cell<bool>,
    /// The session is gone; what still finishes is dropped.
    detached: Cell<bool>,
}

impl<B: Buffer> CompletionQueue<B> {
    /// `capacity`: the number of requests that may be in flight, so that the queue never grows.
    pub fn new(capacity: usize) -> Rc<Self> {
        Rc::new(CompletionQueue {
            finished: RefCell::new(VecDeque::with_capacity(capacity)),
            waker: RefCell::new(None),
            attended: Cell::new(false),
            detached: Cell::new(false),
        })
    }

    /// The handle for the request in `slot`.
    pub fn completion(self: &Rc<Self>, slot: u32) -> Completion<B> {
        Completion {
            queue: Some(Rc::clone(self)),
            slot,
        }
    }

    /// Between `attend(true)` and `attend(false)` a finished request wakes nobody.
    pub fn attend(&self, attended: bool) {
        self.attended.set(attended);
    }

    /// Whom to wake when a request finishes.
    pub fn register(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        match &mut *waker {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
    }

    /// The next finished request.
    pub fn pop(&self) -> Option<Finished<B>> {
        self.finished.borrow_mut().pop_front()
    }

    /// The session ends: results already here and results still to come are dropped.
    pub fn detach(&self) {
        self.detached.set(true);
        self.waker.borrow_mut().take();
        // Dropped outside the borrow: a buffer's destructor may resolve another completion.
        let rest = std::mem::take(&mut *self.finished.borrow_mut());
        drop(rest);
    }

    fn push(&self, slot: u32, result: Result<Output<B>, IoError>) {
        if self.detached.get() {
            return;
        }
        let mut finished = self.finished.borrow_mut();
        finished.push_back((slot, result));
        // Whoever pushed onto a queue with entries woke the session already.
        if finished.len() == 1
            && !self.attended.get()
            && let Some(waker) = &*self.waker.borrow()
        {
            waker.wake_by_ref();
        }
    }
}

/// Resolves one request, exactly once. Dropped unresolved, it answers with an I/O error, so that no
/// application waits for ever for a request that was lost.
#[must_use = "a request must be resolved; dropping its completion answers it with an I/O error"]
pub struct Completion<B: Buffer> {
    queue: Option<Rc<CompletionQueue<B>>>,
    slot: u32,
}

impl<B: Buffer> Completion<B> {
    /// Ends the request. May be called at any time, also inside [`crate::Volume::submit`].
    pub fn complete(mut self, result: Result<Output<B>, IoError>) {
        if let Some(queue) = self.queue.take() {
            queue.push(self.slot, result);
        }
    }

    /// Ends the request with success and nothing to return.
    pub fn done(self) {
        self.complete(Ok(Output::Done));
    }

    /// Ends the request with an error.
    pub fn fail(self, error: IoError) {
        self.complete(Err(error));
    }

    /// True once the asking session is gone; a volume may then skip work that only an answer needs (a read).
    /// A write that was submitted must still run its course.
    pub fn is_abandoned(&self) -> bool {
        self.queue.as_ref().is_none_or(|queue| queue.detached.get())
    }
}

impl<B: Buffer> Drop for Completion<B> {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.push(
                self.slot,
                Err(IoError::new(
                    IoErrorKind::Io,
                    "the replicator dropped this request without an outcome; a write may or may not have happened",
                )),
            );
        }
    }
}

impl<B: Buffer> std::fmt::Debug for Completion<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completion")
            .field("slot", &self.slot)
            .finish()
    }
}
