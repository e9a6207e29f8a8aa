//! Budgets: how many bytes a service's peers and its clients may hold, so that one service, parked or flooded, never takes
//! the memory of another. A peer feels it as a stream that is not read, a client as a socket that is not read.

use super::memory::Memory;
use holdfast_disk::{Buf, buffer_bytes};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Bytes that one kind of work of one service may hold.
pub(super) struct Budget {
    limit: usize,
    used: Cell<usize>,
    waiting: RefCell<VecDeque<Waker>>,
}

/// A share of a budget, given back when dropped.
pub(super) struct Receipt {
    budget: Rc<Budget>,
    bytes: usize,
}

/// A payload on its way in.
pub struct ReceiveBuf {
    pub(super) buf: Buf,
    pub(super) receipt: Receipt,
}

impl AsMut<[u8]> for ReceiveBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self.buf
            .get_mut()
            .expect("a payload that is still arriving has one owner")
    }
}

impl Budget {
    pub fn new(limit: usize) -> Rc<Budget> {
        Rc::new(Budget {
            limit,
            used: Cell::new(0),
            waiting: RefCell::new(VecDeque::new()),
        })
    }

    /// A buffer of `len` bytes once the budget allows it. One larger than the whole budget is let in alone.
    pub async fn alloc(self: &Rc<Self>, memory: &Memory, len: usize) -> ReceiveBuf {
        let bytes = buffer_bytes(len);
        poll_fn(|cx| self.poll_room(cx, bytes)).await;
        let receipt = self.take(bytes);
        loop {
            match memory.internal(len) {
                Ok(buf) => return ReceiveBuf { buf, receipt },
                Err(error) => {
                    // The peer waits meanwhile, and nothing is lost.
                    tracing::error!(%error, bytes = len, "no memory to receive into; the peer is not read");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Whether so many bytes may be taken now. What is larger than the whole budget may be taken alone.
    pub fn has_room(&self, bytes: usize) -> bool {
        let used = self.used.get();
        used == 0 || used + bytes <= self.limit
    }

    /// As [`Self::has_room`]; when pending, the task is woken once it is worth asking again.
    pub fn poll_room(&self, cx: &mut Context<'_>, bytes: usize) -> Poll<()> {
        if self.has_room(bytes) {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push_back(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Takes them, room or not: who asks looked before.
    pub fn take(self: &Rc<Self>, bytes: usize) -> Receipt {
        self.used.set(self.used.get() + bytes);
        Receipt {
            budget: self.clone(),
            bytes,
        }
    }
}

impl std::fmt::Debug for Receipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Receipt({} bytes)", self.bytes)
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
        // All of them: who does not fit waits again.
        for waker in self.budget.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::memory::Budgets;

    #[test]
    fn a_full_budget_waits_and_what_is_given_back_wakes() {
        let memory = Memory::new(Budgets {
            client: 1 << 20,
            internal: 4 << 20,
        })
        .unwrap();
        let budget = Budget::new(8192);
        let mut cx = Context::from_waker(Waker::noop());
        let mut poll = |len| match Box::pin(budget.alloc(&memory, len)).as_mut().poll(&mut cx) {
            Poll::Ready(buf) => Some(buf),
            Poll::Pending => None,
        };
        let first = poll(4096).unwrap();
        let second = poll(4096).unwrap();
        assert!(poll(512).is_none());
        drop(first);
        assert!(poll(4096).is_some());
        drop(second);
        // Larger than the whole budget, and alone.
        assert!(poll(16384).is_some());
        assert_eq!(budget.used.get(), 0);
    }
}
