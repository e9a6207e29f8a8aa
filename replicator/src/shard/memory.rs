//! The shard's memory, divided so that no user of it can starve another.
//!
//! One arena serves all (it is registered with the disk ring as a whole). Clients get what the budgets leave over
//! and wait when it is used up: their sockets are then not read. What the core asks for and what peers send comes
//! out of a reserve that clients cannot touch; peers are bounded by a budget of their own per session
//! ([`super::budget`]). So a flood of client writes never keeps an acknowledgement's data out, nor the reverse.

use holdfast_disk::{Buf, BufPool, PoolOptions, Priority};
use holdfast_replicator_core::api::Tuning;
use holdfast_wire_format::frame::MAX_PAYLOAD;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

/// Bytes for requests of clients that are not answered yet, for each service. The largest request (32 MiB) fits.
const CLIENT_BYTES: usize = 32 << 20;
/// Bytes the core may need for one service beside its resync window: undo, verify.
const CORE_BYTES: usize = 16 << 20;
/// Bytes of one arena that is added when the reserve is used up.
const OVERFLOW_BYTES: usize = 16 << 20;

/// How much for whom, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// What clients asked for: requests under way, and answered writes that wait in the queue toward a peer.
    pub client: usize,
    /// Data received from peers, and buffers of the core.
    pub internal: usize,
}

impl Budgets {
    /// What these services need together; `peers` is the number of peers of each.
    pub fn of<'a>(services: impl Iterator<Item = (&'a Tuning, usize)>) -> Budgets {
        let mut budgets = Budgets {
            client: 0,
            internal: 0,
        };
        for (tuning, peers) in services {
            // A write that an asynchronous copy (or the target of a resync) has not taken yet keeps its buffer after its answer.
            // The bound counts bytes of data; buffers are powers of two, a third larger on average.
            let queue = tuning.async_queue_bytes as usize;
            budgets.client += CLIENT_BYTES + peers * (queue + queue / 2);
            budgets.internal += CORE_BYTES
                + peers * (tuning.receive_bytes as usize + tuning.resync_window_bytes as usize);
        }
        budgets
    }

    /// What one peer of a service may have waiting here. An asynchronous copy applies nothing before the primary says that it is
    /// stable, and what says so comes behind the data: less than the primary may send ahead, in buffers up to twice as
    /// large, and the two would wait for each other. What goes beyond the share of peers is taken from clients, who are
    /// elsewhere while a peer is primary, or added.
    pub fn of_peer(tuning: &Tuning) -> usize {
        let ahead = tuning.async_queue_bytes as usize + MAX_PAYLOAD as usize;
        (tuning.receive_bytes as usize).max(2 * ahead)
    }

    /// What the clients of one service may hold in requests that are not answered: for writes, and for reads. Writes that are
    /// parked thus leave room for reads, and for other services.
    pub const OF_CLIENTS: (usize, usize) = (CLIENT_BYTES / 4 * 3, CLIENT_BYTES / 4);
}

/// Buffers of one shard.
pub struct Memory {
    pool: BufPool,
    /// Taken only when the reserve is fragmented or used up: the core's work must go on for other work to end.
    overflow: RefCell<Vec<BufPool>>,
    waiting: RefCell<VecDeque<(Waker, usize)>>,
    someone_waits: Notify,
    /// The buffer that came free for the first in line.
    stash: Cell<Option<Buf>>,
}

impl Memory {
    /// Maps the arena.
    ///
    /// # Errors
    /// Not enough address space or memory.
    pub fn new(budgets: Budgets) -> io::Result<Memory> {
        let options = PoolOptions {
            bytes: budgets.client + budgets.internal,
            reserve: budgets.internal,
        };
        Ok(Memory {
            pool: BufPool::new(options)?,
            overflow: RefCell::new(Vec::new()),
            waiting: RefCell::new(VecDeque::new()),
            someone_waits: Notify::new(),
            stash: Cell::new(None),
        })
    }

    /// The arena to register with the ring.
    pub fn pool(&self) -> &BufPool {
        &self.pool
    }

    /// A buffer for work that must go on for other work to end.
    ///
    /// # Errors
    /// The system has no memory.
    pub fn internal(&self, len: usize) -> io::Result<Buf> {
        if let Some(buf) = self.pool.try_alloc_as(len, Priority::Internal) {
            return Ok(buf);
        }
        let mut overflow = self.overflow.borrow_mut();
        if let Some(buf) = overflow
            .iter()
            .find_map(|pool| pool.try_alloc_as(len, Priority::Internal))
        {
            return Ok(buf);
        }
        let pool = BufPool::new(PoolOptions {
            bytes: OVERFLOW_BYTES.max(len),
            reserve: 0,
        })?;
        tracing::warn!(
            bytes = OVERFLOW_BYTES,
            "the reserve for peers and resync is used up; memory was added. Lower receive_bytes or resync_window_bytes if this repeats"
        );
        let buf = pool.try_alloc_as(len, Priority::Internal);
        overflow.push(pool);
        buf.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
    }

    /// Gives back arenas that were added and are no longer used.
    pub fn trim(&self) {
        self.overflow.borrow_mut().retain(|pool| pool.used() > 0);
    }

    /// Whether a client's buffer of `len` bytes can ever be had.
    pub fn can_ever(&self, len: usize) -> bool {
        self.pool.can_ever_alloc(len)
    }

    /// A buffer for a client if there is room and nobody waits for some.
    pub fn try_client(&self, len: usize) -> Option<Buf> {
        if self.waiting.borrow().is_empty() {
            self.pool.try_alloc(len)
        } else {
            None
        }
    }

    /// A buffer for a client, in the order of asking. When it is pending, the task is woken once it is worth asking again.
    pub fn poll_client(&self, cx: &mut Context<'_>, len: usize) -> Poll<Buf> {
        if let Some(buf) = self.stash.take() {
            if buf.len() == len {
                return Poll::Ready(buf);
            }
            self.stash.set(Some(buf));
        }
        if self.waiting.borrow().is_empty()
            && let Some(buf) = self.pool.try_alloc(len)
        {
            return Poll::Ready(buf);
        }
        let mut waiting = self.waiting.borrow_mut();
        match waiting
            .iter_mut()
            .find(|(waker, _)| waker.will_wake(cx.waker()))
        {
            Some(place) => place.1 = len,
            None => waiting.push_back((cx.waker().clone(), len)),
        }
        self.someone_waits.notify_one();
        Poll::Pending
    }

    /// Serves those who wait; a task of the shard for as long as it runs.
    ///
    /// It stands in the pool's queue for the first in line and leaves what it gets for it. A session that ended
    /// meanwhile does not come for its buffer, which then goes back.
    pub async fn serve_waiting(&self) {
        loop {
            let next = self.waiting.borrow().front().map(|(_, len)| *len);
            let Some(len) = next else {
                self.someone_waits.notified().await;
                continue;
            };
            let buf = self.pool.alloc(len).await;
            let Some((waker, now_wanted)) = self.waiting.borrow_mut().pop_front() else {
                continue;
            };
            if now_wanted == len {
                self.stash.set(Some(buf));
            }
            waker.wake();
            // The woken task is ahead of this one in the runtime's queue.
            tokio::task::yield_now().await;
            drop(self.stash.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::rc::Rc;
    use tokio::task::LocalSet;

    fn memory(client: usize) -> Rc<Memory> {
        Rc::new(
            Memory::new(Budgets {
                client,
                internal: 1 << 20,
            })
            .unwrap(),
        )
    }

    #[test]
    fn clients_cannot_take_the_reserve_and_it_grows_when_needed() {
        let memory = memory(2 << 20);
        let mut cx = Context::from_waker(Waker::noop());
        let mut held = Vec::new();
        while let Poll::Ready(buf) = memory.poll_client(&mut cx, 1 << 20) {
            held.push(buf);
        }
        assert_eq!(held.len(), 2);
        let more: Vec<Buf> = (0..3).map(|_| memory.internal(1 << 20).unwrap()).collect();
        assert_eq!(memory.overflow.borrow().len(), 1);
        drop(more);
        memory.trim();
        assert!(memory.overflow.borrow().is_empty());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_asked_first_is_served_first_and_the_dead_hold_up_nobody() {
        let memory = memory(2 << 20);
        let local = LocalSet::new();
        let server = memory.clone();
        local.spawn_local(async move { server.serve_waiting().await });
        local
            .run_until(async {
                let one = poll_fn(|cx| memory.poll_client(cx, 1 << 20)).await;
                let two = poll_fn(|cx| memory.poll_client(cx, 1 << 20)).await;
                let order = Rc::new(RefCell::new(Vec::new()));
                let ask = |name: &'static str, len: usize| {
                    let (memory, order) = (memory.clone(), order.clone());
                    tokio::task::spawn_local(async move {
                        let buf = poll_fn(|cx| memory.poll_client(cx, len)).await;
                        order.borrow_mut().push(name);
                        drop(buf);
                    })
                };
                let dead = ask("dead", 2 << 20);
                let large = ask("large", 2 << 20);
                let small = ask("small", 4096);
                tokio::task::yield_now().await;
                dead.abort();
                drop(one);
                tokio::task::yield_now().await;
                assert!(order.borrow().is_empty(), "nobody passes the large one");
                drop(two);
                large.await.unwrap();
                small.await.unwrap();
                assert_eq!(*order.borrow(), ["large", "small"]);
            })
            .await;
    }
}
