//! Buffers: one arena per shard, registered with the ring once, handed out in page-aligned pieces.
//!
//! A buffer is written while it has one owner and is immutable from the first clone on: the one buffer that feeds disk,
//! wire and checksum cannot change between them (D5). The ring keeps a clone of its own until the kernel has answered, so
//! no abort, however early, gives memory back that a device may still write to.

use crate::arena::{Arena, PAGE, Piece, rounded};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::task::{Poll, Waker};

pub use crate::arena::CHUNK;

/// Longest single buffer in bytes: the longest request of an NBD client.
pub const MAX_BUF: usize = 32 << 20;

/// A mapping of anonymous memory, unmapped when dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    pub(crate) fn new(len: usize, writable: bool) -> io::Result<Self> {
        let prot = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a fresh anonymous private mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Mapping { base, len })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Large pages make pinning and I/O on the arena cheaper; without them everything still works.
    fn prefer_huge_pages(&self) {
        // SAFETY: the range is this mapping; the advice changes no contents.
        let _ = unsafe {
            rustix::mm::madvise(
                self.base.as_ptr().cast(),
                self.len,
                rustix::mm::Advice::LinuxHugepage,
            )
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: created by mmap with this length; every piece handed out holds the pool, so nobody uses it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Who asks for memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Priority {
    /// New work from outside: leaves the reserve alone and queues behind earlier askers.
    Client,
    /// Work that must go on for other work to end (undo, resync answers, metadata): may use the reserve and does not
    /// queue, since those ahead in the queue may be waiting for it.
    Internal,
}

/// Size of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// Byte cap of all buffers together; rounded up to whole MiB, at least 1 MiB. Lockable memory of this size is needed
    /// for registration.
    pub bytes: usize,
    /// Bytes of it that only [`Priority::Internal`] may use.
    pub reserve: usize,
}

impl Default for PoolOptions {
    fn default() -> Self {
        PoolOptions {
            bytes: 256 << 20,
            reserve: 32 << 20,
        }
    }
}

struct PoolInner {
    memory: Mapping,
    arena: RefCell<Arena>,
    bytes: usize,
    reserve: usize,
    /// Bytes held as client work: what internal work holds takes nothing of the clients' part.
    client_used: Cell<usize>,
    waiters: RefCell<VecDeque<Rc<Waiter>>>,
}

struct Waiter {
    len: usize,
    waker: RefCell<Option<Waker>>,
    gone: Cell<bool>,
}

/// The buffers of one shard. A cheap handle; clones are the same pool.
#[derive(Clone)]
pub struct BufPool {
    inner: Rc<PoolInner>,
}

impl BufPool {
    /// Maps the arena. Pages become resident when the ring registers it, or at first use.
    ///
    /// # Errors
    /// Not enough address space or memory.
    pub fn new(options: PoolOptions) -> io::Result<Self> {
        let bytes = options.bytes.max(CHUNK).next_multiple_of(CHUNK);
        let memory = Mapping::new(bytes, true)?;
        memory.prefer_huge_pages();
        Ok(BufPool {
            inner: Rc::new(PoolInner {
                memory,
                arena: RefCell::new(Arena::new(bytes / CHUNK)),
                bytes,
                reserve: options.reserve.min(bytes / 2),
                client_used: Cell::new(0),
                waiters: RefCell::new(VecDeque::new()),
            }),
        })
    }

    /// Byte cap.
    pub fn capacity(&self) -> usize {
        self.inner.bytes
    }

    /// Bytes handed out now, each buffer rounded up to its size class.
    pub fn used(&self) -> usize {
        self.inner.arena.borrow().used()
    }

    /// Whether a buffer of `len` bytes (1 to [`MAX_BUF`]) can ever be had as client work.
    pub fn can_ever_alloc(&self, len: usize) -> bool {
        (1..=MAX_BUF).contains(&len) && rounded(len) <= self.inner.bytes - self.inner.reserve
    }

    /// A buffer of `len` bytes (1 to [`MAX_BUF`]) for client work, if there is room and nobody waits.
    /// Its bytes are what the last user left: fill it before showing it to anyone.
    pub fn try_alloc(&self, len: usize) -> Option<Buf> {
        self.try_alloc_as(len, Priority::Client)
    }

    /// As [`Self::try_alloc`], with a priority.
    pub fn try_alloc_as(&self, len: usize, priority: Priority) -> Option<Buf> {
        if priority == Priority::Client
            && self
                .inner
                .waiters
                .borrow()
                .iter()
                .any(|waiter| !waiter.gone.get())
        {
            return None;
        }
        self.take(len, priority)
    }

    fn take(&self, len: usize, priority: Priority) -> Option<Buf> {
        if !(1..=MAX_BUF).contains(&len) {
            return None;
        }
        let mut arena = self.inner.arena.borrow_mut();
        let client_used = &self.inner.client_used;
        if priority == Priority::Client
            && client_used.get() + rounded(len) > self.inner.bytes - self.inner.reserve
        {
            return None;
        }
        let piece = arena.alloc(len)?;
        if priority == Priority::Client {
            client_used.set(client_used.get() + piece.size);
        }
        Some(Buf {
            inner: Rc::new(BufInner {
                pool: self.inner.clone(),
                piece,
                len,
                priority,
                kernel_writers: Cell::new(0),
            }),
        })
    }

    /// A buffer of `len` bytes for client work; waits in the order of asking. Dropping the future gives the place up.
    ///
    /// # Panics
    /// When it could never be had ([`Self::can_ever_alloc`]): waiting for ever would be worse.
    pub async fn alloc(&self, len: usize) -> Buf {
        assert!(
            self.can_ever_alloc(len),
            "a buffer of {len} bytes can never be had from a pool of {} bytes",
            self.inner.bytes
        );
        if let Some(buf) = self.try_alloc(len) {
            return buf;
        }
        let waiter = Rc::new(Waiter {
            len,
            waker: RefCell::new(None),
            gone: Cell::new(false),
        });
        self.inner.waiters.borrow_mut().push_back(waiter.clone());
        let place = Place {
            pool: self.inner.clone(),
            waiter,
        };
        poll_fn(|cx| {
            // Only the head of the queue may take, so a stream of small requests cannot starve a large one.
            let mine = self
                .inner
                .waiters
                .borrow()
                .front()
                .is_some_and(|head| Rc::ptr_eq(head, &place.waiter));
            if mine && let Some(buf) = self.take(place.waiter.len, Priority::Client) {
                return Poll::Ready(buf);
            }
            *place.waiter.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// A copy of `bytes` (1 to [`MAX_BUF`]) in a new buffer.
    pub fn copy_from(&self, bytes: &[u8], priority: Priority) -> Option<Buf> {
        let mut buf = self.try_alloc_as(bytes.len(), priority)?;
        buf.get_mut()
            .expect("a new buffer has one owner")
            .copy_from_slice(bytes);
        Some(buf)
    }

    pub(crate) fn memory(&self) -> (NonNull<u8>, usize) {
        (self.inner.memory.base(), self.inner.bytes)
    }

    pub(crate) fn owns(&self, buf: &Buf) -> bool {
        Rc::ptr_eq(&self.inner, &buf.inner.pool)
    }
}

impl std::fmt::Debug for BufPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "BufPool({} of {} bytes used)",
            self.used(),
            self.capacity()
        )
    }
}

impl PoolInner {
    fn wake_first(&self) {
        let mut waiters = self.waiters.borrow_mut();
        while waiters.front().is_some_and(|waiter| waiter.gone.get()) {
            waiters.pop_front();
        }
        let waker = waiters
            .front()
            .and_then(|head| head.waker.borrow_mut().take());
        drop(waiters);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A place in the queue, given up when its future ends in any way.
struct Place {
    pool: Rc<PoolInner>,
    waiter: Rc<Waiter>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiter.gone.set(true);
        self.pool.wake_first();
    }
}

struct BufInner {
    pool: Rc<PoolInner>,
    piece: Piece,
    len: usize,
    priority: Priority,
    /// Reads into this buffer that the kernel or the queue still holds. While there are any, nobody gets a slice of it.
    kernel_writers: Cell<u32>,
}

impl BufInner {
    fn ptr(&self) -> NonNull<u8> {
        // SAFETY: the piece lies inside the mapping, which the pool keeps alive.
        unsafe { self.pool.memory.base().add(self.piece.offset) }
    }
}

impl Drop for BufInner {
    fn drop(&mut self) {
        self.pool.arena.borrow_mut().free(self.piece);
        if self.priority == Priority::Client {
            let used = &self.pool.client_used;
            used.set(used.get() - self.piece.size);
        }
        self.pool.wake_first();
    }
}

/// A page-aligned buffer of a pool. Clones share the bytes; the memory returns when the last one is gone, the ring's own
/// included.
#[derive(Clone)]
pub struct Buf {
    inner: Rc<BufInner>,
}

impl Buf {
    /// Bytes, as asked for.
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// Never: buffers have at least one byte.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Whether a read into this buffer has not completed yet.
    pub fn is_being_read_into(&self) -> bool {
        self.inner.kernel_writers.get() > 0
    }

    /// The bytes.
    ///
    /// # Panics
    /// While a read into it is in flight ([`Self::is_being_read_into`]).
    pub fn as_slice(&self) -> &[u8] {
        assert!(
            !self.is_being_read_into(),
            "buffer looked at while the disk still writes to it"
        );
        // SAFETY: `len` bytes of initialised memory (mapped zeroed). Nobody writes: `get_mut` and `read_target` need the only
        // handle, exclusively borrowed, and the kernel writes only while `kernel_writers` > 0, checked above.
        unsafe { std::slice::from_raw_parts(self.inner.ptr().as_ptr(), self.inner.len) }
    }

    /// The bytes for writing, if this is the only handle and the ring holds none.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        let inner = Rc::get_mut(&mut self.inner)?;
        let (ptr, len) = (inner.ptr(), inner.len);
        // SAFETY: the only handle, exclusively borrowed: no slice of it and no operation on it exists.
        Some(unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr(), len) })
    }

    /// A target for [`Op::Read`](crate::Op::Read), if this is the only handle. Until every target is gone (the ring drops
    /// its own with the completion), the bytes can't be looked at. Clone the target to read several pieces at once.
    pub fn read_target(&mut self) -> Option<ReadBuf> {
        Rc::get_mut(&mut self.inner)?;
        self.inner.kernel_writers.set(1);
        Some(ReadBuf {
            buf: Buf {
                inner: self.inner.clone(),
            },
        })
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.inner.ptr()
    }

    /// Bytes from the start of the arena.
    pub(crate) fn arena_offset(&self) -> usize {
        self.inner.piece.offset
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Buf({} bytes, {} handles)",
            self.len(),
            Rc::strong_count(&self.inner)
        )
    }
}

/// A buffer that the disk may write to: nobody has a slice of it while this exists.
pub struct ReadBuf {
    buf: Buf,
}

impl ReadBuf {
    pub(crate) fn buf(&self) -> &Buf {
        &self.buf
    }

    /// Writes `bytes` at byte `at` of the buffer, in place of a disk (another machine's disk read them).
    ///
    /// # Panics
    /// If they do not fit.
    pub fn fill(&self, at: usize, bytes: &[u8]) {
        let inner = &self.buf.inner;
        assert!(
            at.checked_add(bytes.len())
                .is_some_and(|end| end <= inner.len),
            "{} bytes at {at} do not fit into a buffer of {}",
            bytes.len(),
            inner.len
        );
        // SAFETY: inside the buffer, as checked. While a `ReadBuf` lives no slice of the buffer is handed out
        // (`as_slice` and `get_mut` look at `kernel_writers` and at the handles), so nothing else in this process
        // reads or writes these bytes; `Rc` keeps all of it on one thread.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                inner.ptr().as_ptr().add(at),
                bytes.len(),
            );
        }
    }
}

impl Clone for ReadBuf {
    fn clone(&self) -> Self {
        let writers = &self.buf.inner.kernel_writers;
        writers.set(writers.get() + 1);
        ReadBuf {
            buf: self.buf.clone(),
        }
    }
}

impl Drop for ReadBuf {
    fn drop(&mut self) {
        let writers = &self.buf.inner.kernel_writers;
        writers.set(writers.get() - 1);
    }
}

impl std::fmt::Debug for ReadBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadBuf({} bytes)", self.buf.len())
    }
}

/// Page-aligned bytes outside the pool, for metadata: a metadata write must never wait for a buffer that only its own
/// completion would free.
pub struct AlignedBytes {
    ptr: NonNull<u8>,
    len: usize,
}

impl AlignedBytes {
    fn layout(len: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(len.max(1), PAGE)
            .expect("length fits the address space")
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has at least one byte.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        AlignedBytes { ptr, len }
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }
}

impl From<&[u8]> for AlignedBytes {
    fn from(bytes: &[u8]) -> Self {
        let mut aligned = AlignedBytes::zeroed(bytes.len());
        aligned.copy_from_slice(bytes);
        aligned
    }
}

impl std::ops::Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(mib: usize, reserve: usize) -> BufPool {
        BufPool::new(PoolOptions {
            bytes: mib << 20,
            reserve,
        })
        .expect("memory")
    }

    #[test]
    fn the_cap_holds_and_the_reserve_is_for_internal_work() {
        let pool = pool(4, CHUNK);
        let held: Vec<_> = std::iter::from_fn(|| pool.try_alloc(CHUNK)).collect();
        assert_eq!(held.len(), 3);
        assert!(pool.try_alloc(1).is_none());
        let internal = pool
            .try_alloc_as(CHUNK, Priority::Internal)
            .expect("the reserve");
        assert!(pool.try_alloc_as(1, Priority::Internal).is_none());
        drop((held, internal));
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn internal_work_within_the_reserve_takes_nothing_from_clients() {
        let pool = pool(4, CHUNK);
        let internal = pool.try_alloc_as(CHUNK, Priority::Internal);
        let held: Vec<_> = std::iter::from_fn(|| pool.try_alloc(CHUNK)).collect();
        assert_eq!(held.len(), 3);
        drop((internal, held));
        // Beyond it there is no promise, and what was lent comes back.
        let internal: Vec<_> =
            std::iter::from_fn(|| pool.try_alloc_as(CHUNK, Priority::Internal)).collect();
        assert_eq!(internal.len(), 4);
        assert!(pool.try_alloc(1).is_none());
        drop(internal);
        assert!(pool.try_alloc(3 * CHUNK).is_some());
    }

    #[test]
    fn a_shared_buffer_cannot_be_written() {
        let pool = pool(1, 0);
        let mut buf = pool.try_alloc(512).expect("room");
        buf.get_mut().expect("unique").fill(7);
        let other = buf.clone();
        assert!(buf.get_mut().is_none());
        assert!(buf.read_target().is_none());
        drop(other);
        assert!(buf.get_mut().is_some());
        assert_eq!(buf.as_slice(), [7; 512]);
    }

    #[test]
    #[should_panic(expected = "still writes to it")]
    fn a_buffer_being_read_into_cannot_be_looked_at() {
        let pool = pool(1, 0);
        let mut buf = pool.try_alloc(512).expect("room");
        let _target = buf.read_target();
        let _ = buf.as_slice();
    }

    #[test]
    fn what_is_filled_in_place_of_a_disk_is_read_afterwards() {
        let pool = pool(1, 0);
        let mut buf = pool.try_alloc(1024).expect("room");
        let target = buf.read_target().expect("the only handle");
        target.fill(512, &[9; 512]);
        drop(target);
        assert_eq!(buf.as_slice()[511..513], [0, 9]);
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn a_fill_past_the_end_is_refused() {
        let pool = pool(1, 0);
        let mut buf = pool.try_alloc(512).expect("room");
        let target = buf.read_target().expect("the only handle");
        target.fill(511, &[1, 2]);
    }

    #[test]
    fn buffers_are_page_aligned_and_outlive_the_pool_handle() {
        let pool = pool(1, 0);
        let bufs: Vec<_> = [1, 5000, 70_000]
            .into_iter()
            .map(|len| pool.try_alloc(len).expect("room"))
            .collect();
        drop(pool);
        for buf in &bufs {
            assert_eq!(buf.ptr().as_ptr() as usize % PAGE, 0);
            assert_eq!(buf.as_slice()[buf.len() - 1], 0);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn waiters_are_served_in_order_and_may_leave() {
        let pool = pool(2, 0);
        let a = pool.try_alloc(CHUNK).expect("room");
        let b = pool.try_alloc(CHUNK).expect("room");
        let mut large = Box::pin(pool.alloc(2 * CHUNK));
        let mut small = Box::pin(pool.alloc(4096));
        let mut leaver = Box::pin(pool.alloc(4096));
        assert!(poll_once(&mut large).await.is_none());
        assert!(poll_once(&mut small).await.is_none());
        assert!(poll_once(&mut leaver).await.is_none());
        drop(a);
        assert!(
            poll_once(&mut small).await.is_none(),
            "the large one is first"
        );
        assert!(
            pool.try_alloc(4096).is_none(),
            "and nobody passes the queue"
        );
        drop(leaver);
        drop(b);
        let large = large.await;
        assert!(poll_once(&mut small).await.is_none());
        drop(large);
        assert_eq!(small.await.len(), 4096);
    }

    async fn poll_once(future: &mut (impl Future<Output = Buf> + Unpin)) -> Option<Buf> {
        poll_fn(|cx| match std::pin::Pin::new(&mut *future).poll(cx) {
            Poll::Ready(buf) => Poll::Ready(Some(buf)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }
}
