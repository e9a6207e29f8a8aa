//! A volume whose disk is memory: it keeps what was written, knows holes, lends a bounded number of bytes and can
//! hold back its answers until a test lets them go.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use holdfast_frontend::{
    BlockSizes, Buffer, ClientInfo, CloseSignal, Completion, ExportError, ExportInfo, Exports,
    Extent, IoError, IoErrorKind, MAX_REQUEST_BYTES, Output, Request, Volume,
};

pub const PAGE: u64 = 4096;

#[derive(Default)]
struct Pool {
    /// Idle memory, reused as it is: contents are somebody else's old bytes, as in a real pool.
    idle: RefCell<Vec<Vec<u8>>>,
    lent: Cell<u64>,
    limit: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

pub struct Lent {
    bytes: Vec<u8>,
    len: usize,
    pool: Rc<Pool>,
}

impl Lent {
    fn new(pool: &Rc<Pool>, len: usize) -> Self {
        let mut bytes = pool.idle.borrow_mut().pop().unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len, 0xa5);
        }
        pool.lent.set(pool.lent.get() + len as u64);
        Lent {
            bytes,
            len,
            pool: Rc::clone(pool),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.lent.set(self.pool.lent.get() - self.len as u64);
        self.pool
            .idle
            .borrow_mut()
            .push(std::mem::take(&mut self.bytes));
        for waker in self.pool.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}

impl Buffer for Lent {
    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

/// What the volume was asked, in numbers.
#[derive(Default)]
pub struct Calls {
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    pub fua: Cell<u64>,
    pub flushes: Cell<u64>,
    pub discards: Cell<u64>,
    pub zeroes: Cell<u64>,
    pub no_hole: Cell<u64>,
    pub fast: Cell<u64>,
    pub caches: Cell<u64>,
    pub batches: Cell<u64>,
    pub most_lent: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

pub struct Memory {
    info: RefCell<ExportInfo>,
    disk: RefCell<Vec<u8>>,
    /// One entry per page: something was written there.
    allocated: RefCell<Vec<bool>>,
    pool: Rc<Pool>,
    close: CloseSignal,
    holding: Cell<bool>,
    held: RefCell<Vec<(Request<Lent>, Completion<Lent>)>>,
    /// Every write and flush fails with this.
    pub failing: RefCell<Option<IoError>>,
    pub calls: Calls,
}

impl Memory {
    pub fn new(size: u64) -> Rc<Self> {
        let pool = Pool::default();
        pool.limit.set(u64::MAX);
        Rc::new(Memory {
            info: RefCell::new(ExportInfo {
                size,
                read_only: false,
                rotational: false,
                multi_conn: true,
                discard: true,
                fast_zero: true,
                cache: true,
                block_sizes: BlockSizes {
                    minimum: 1,
                    preferred: 4096,
                    maximum: MAX_REQUEST_BYTES,
                },
                description: "memory".into(),
            }),
            disk: RefCell::new(vec![0; size as usize]),
            allocated: RefCell::new(vec![false; size.div_ceil(PAGE) as usize]),
            pool: Rc::new(pool),
            close: CloseSignal::new(),
            holding: Cell::new(false),
            held: RefCell::default(),
            failing: RefCell::default(),
            calls: Calls::default(),
        })
    }

    pub fn change_info(&self, change: impl FnOnce(&mut ExportInfo)) {
        let mut info = self.info.borrow_mut();
        change(&mut info);
        let pages = info.size.div_ceil(PAGE) as usize;
        self.disk.borrow_mut().resize(info.size as usize, 0);
        self.allocated.borrow_mut().resize(pages, false);
    }

    /// Lends at most this many bytes for writes at once.
    pub fn limit_memory(&self, bytes: u64) {
        self.pool.limit.set(bytes);
    }

    pub fn lent(&self) -> u64 {
        self.pool.lent.get()
    }

    /// From now on requests stay open until [`release`](Self::release).
    pub fn hold(&self) {
        self.holding.set(true);
    }

    pub fn held(&self) -> usize {
        self.held.borrow().len()
    }

    /// Loses everything held, as a defect would.
    pub fn drop_held(&self) {
        self.holding.set(false);
        drop(self.held.take());
    }

    /// Answers everything held, the newest first.
    pub fn release(&self) {
        self.holding.set(false);
        let held = self.held.take();
        for (request, completion) in held.into_iter().rev() {
            completion.complete(self.execute(request));
        }
    }

    fn mark(&self, offset: u64, len: u64, value: bool) {
        let mut pages = self.allocated.borrow_mut();
        // A partly discarded page stays allocated.
        let range = if value {
            offset / PAGE..(offset + len).div_ceil(PAGE)
        } else {
            offset.div_ceil(PAGE)..(offset + len) / PAGE
        };
        for page in range {
            pages[page as usize] = value;
        }
    }

    fn execute(&self, request: Request<Lent>) -> Result<Output<Lent>, IoError> {
        let changes = matches!(request, Request::Write { .. } | Request::Flush);
        if changes && let Some(error) = &*self.failing.borrow() {
            return Err(error.clone());
        }
        let calls = &self.calls;
        let mut disk = self.disk.borrow_mut();
        match request {
            Request::Read { offset, len } => {
                count(&calls.reads);
                let mut buffer = Lent::new(&self.pool, len as usize);
                let from = offset as usize;
                buffer
                    .as_mut_slice()
                    .copy_from_slice(&disk[from..from + len as usize]);
                return Ok(Output::Data(buffer));
            }
            Request::Write {
                offset,
                buffer,
                fua,
            } => {
                count(&calls.writes);
                if fua {
                    count(&calls.fua);
                }
                let bytes = buffer.as_slice();
                disk[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
                self.mark(offset, bytes.len() as u64, true);
            }
            Request::Flush => count(&calls.flushes),
            Request::Discard { offset, len, .. } => {
                count(&calls.discards);
                disk[offset as usize..(offset + len) as usize].fill(0);
                self.mark(offset, len, false);
            }
            Request::WriteZeroes {
                offset,
                len,
                may_unmap,
                fast,
                ..
            } => {
                count(&calls.zeroes);
                if fast {
                    count(&calls.fast);
                }
                disk[offset as usize..(offset + len) as usize].fill(0);
                if may_unmap {
                    self.mark(offset, len, false);
                } else {
                    count(&calls.no_hole);
                    self.mark(offset, len, true);
                }
            }
            Request::Cache { .. } => count(&calls.caches),
            Request::BlockStatus { offset, len, .. } => {
                let pages = self.allocated.borrow();
                let mut extents: Vec<Extent> = Vec::new();
                let mut at = offset;
                while at < offset + len {
                    let end = ((at / PAGE + 1) * PAGE).min(offset + len);
                    let hole = !pages[(at / PAGE) as usize];
                    match extents.last_mut() {
                        Some(last) if last.hole == hole => last.len += end - at,
                        _ => extents.push(Extent {
                            len: end - at,
                            hole,
                            zero: hole,
                        }),
                    }
                    at = end;
                }
                return Ok(Output::Extents(extents));
            }
        }
        Ok(Output::Done)
    }
}

impl Volume for Memory {
    type Buf = Lent;

    fn info(&self) -> ExportInfo {
        self.info.borrow().clone()
    }

    fn poll_buffer(
        &self,
        cx: &mut Context<'_>,
        _offset: u64,
        len: u32,
    ) -> Poll<Result<Lent, IoError>> {
        let lent = self.pool.lent.get() + u64::from(len);
        if lent > self.pool.limit.get() {
            self.pool.waiting.borrow_mut().push(cx.waker().clone());
            return Poll::Pending;
        }
        let most = &self.calls.most_lent;
        most.set(most.get().max(lent));
        Poll::Ready(Ok(Lent::new(&self.pool, len as usize)))
    }

    fn submit(&self, request: Request<Lent>, completion: Completion<Lent>) {
        if self.holding.get() {
            self.held.borrow_mut().push((request, completion));
        } else {
            completion.complete(self.execute(request));
        }
    }

    fn end_of_batch(&self) {
        count(&self.calls.batches);
    }

    fn close_signal(&self) -> &CloseSignal {
        &self.close
    }
}

/// The volume as `""`, `disk` and `disk@7`; `disk@6` is superseded.
pub struct OneDisk(pub Rc<Memory>);

impl Exports for OneDisk {
    type Volume = Memory;

    fn list(&self, _: &ClientInfo, each: &mut dyn FnMut(&str, &str)) {
        each("disk", "memory");
        each("disk@7", "memory, epoch 7");
    }

    fn open(&self, name: &str, _: &ClientInfo) -> Result<Rc<Memory>, ExportError> {
        match name {
            "" | "disk" | "disk@7" => Ok(Rc::clone(&self.0)),
            "disk@6" => Err(ExportError::Refused(
                "epoch 6 of disk is superseded by epoch 7".to_owned(),
            )),
            _ => Err(ExportError::Unknown(format!("there is no export {name:?}"))),
        }
    }
}

/// An error as a full disk gives it.
pub fn full() -> IoError {
    IoError::new(IoErrorKind::NoSpace, "the backing device is full")
}
