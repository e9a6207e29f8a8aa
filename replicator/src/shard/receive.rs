//! Memory for what peers send: a budget per service, felt by the peer as a stream that is not read.

use super::memory::Memory;
use holdfast_disk::Buf;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Bytes of one service that were received and are not applied yet.
pub(super) struct ReceiveBudget {
    limit: usize,
    used: Cell<usize>,
    waiting: RefCell<VecDeque<Waker>>,
}

/// A received payload's share of its budget, given back when dropped.
pub(super) struct Receipt {
    budget: Rc<ReceiveBudget>,
    bytes: usize,
}

/// A payload on its way in.
pub struct ReceiveBuf {
    pub(super) buf: Buf,
    pub(super) receipt: Receipt,
}

impl AsMut<[u8]> for ReceiveBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self.buf.get_mut().expect("a payload that is still arriving has one owner")
    }
}

impl ReceiveBudget {
    pub fn new(limit: usize) -> Rc<ReceiveBudget> {
        Rc::new(ReceiveBudget { limit, used: Cell::new(0), waiting: RefCell::new(VecDeque::new()) })
    }

    /// A buffer of `len` bytes once the budget allows it. One larger than the whole budget is let in alone.
    pub async fn alloc(self: &Rc<Self>, memory: &Memory, len: usize) -> ReceiveBuf {
        let receipt = poll_fn(|cx| match self.take(len) {
            Some(receipt) => Poll::Ready(receipt),
            None => {
                let mut waiting = self.waiting.borrow_mut();
                if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    waiting.push_back(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await;
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

    fn take(self: &Rc<Self>, bytes: usize) -> Option<Receipt> {
        let used = self.used.get();
        if used > 0 && used + bytes > self.limit {
            return None;
        }
        self.used.set(used + bytes);
        Some(Receipt { budget: self.clone(), bytes })
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
        // All of them: who does not fit waits again, and there is one stream per peer.
        for waker in self.budget.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::memory::Budgets;
    use std::task::Context;

    #[test]
    fn a_full_budget_waits_and_what_is_given_back_wakes() {
        let memory = Memory::new(Budgets { client: 1 << 20, internal: 4 << 20 }).unwrap();
        let budget = ReceiveBudget::new(8192);
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
