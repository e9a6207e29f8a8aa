//! One connection: its protocol, who waits for what in it, and its turn to send.

use super::endpoint::{self, outgoing};
use super::socket::Full;
use super::stream::{RecvStream, SendStream};
use bytes::Bytes;
use quinn::{ConnectionError, ConnectionStats, VarInt};
use quinn_proto::{ConnectionEvent, ConnectionHandle, Dir, Event, StreamEvent, StreamId};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Most packets sent in one go; what arrives meanwhile (acknowledgements, above all) is looked at in between.
const PACKETS: usize = 20;

/// A handle; clones are the same connection. It is closed when the last handle and the last stream go.
#[derive(Clone)]
pub(crate) struct Connection(Rc<Handle>);

/// Closes the connection when nobody is left who could use it.
pub(super) struct Handle(Rc<Inner>);

impl Handle {
    pub fn new(inner: Rc<Inner>) -> Rc<Handle> {
        Rc::new(Handle(inner))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close(VarInt::from_u32(0), b"");
    }
}

/// Who waits for something on which stream.
#[derive(Default)]
pub(super) struct Waiting(Vec<(StreamId, Waker)>);

impl Waiting {
    pub fn wait(&mut self, id: StreamId, cx: &Context<'_>) {
        match self.0.iter_mut().find(|(waits, _)| *waits == id) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => self.0.push((id, cx.waker().clone())),
        }
    }

    pub fn forget(&mut self, id: StreamId) -> Option<Waker> {
        let at = self.0.iter().position(|(waits, _)| *waits == id)?;
        Some(self.0.swap_remove(at).1)
    }

    fn wake(&mut self, id: StreamId) {
        if let Some(waker) = self.forget(id) {
            waker.wake();
        }
    }

    fn wake_all(&mut self) {
        self.0.drain(..).for_each(|(_, waker)| waker.wake());
    }
}

pub(super) struct Inner {
    endpoint: Rc<endpoint::Inner>,
    handle: ConnectionHandle,
    pub proto: RefCell<quinn_proto::Connection>,
    /// It is in the endpoint's list.
    touched: Cell<bool>,
    /// Built and not sent: the socket had no room.
    unsent: RefCell<Option<(quinn_proto::Transmit, Vec<u8>)>>,
    /// It is in the endpoint's list of those that wait for room.
    blocked: Cell<bool>,
    deadline: Cell<Option<Instant>>,
    pub readers: RefCell<Waiting>,
    pub writers: RefCell<Waiting>,
    /// Who waits for the end of a stream's sending half.
    pub enders: RefCell<Waiting>,
    connected: Cell<bool>,
    /// Why it ended; the first reason counts.
    ended: RefCell<Option<ConnectionError>>,
    /// It is connected, it ended, or there are new streams.
    changed: Notify,
}

impl Inner {
    pub fn new(
        endpoint: Rc<endpoint::Inner>,
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
    ) -> Rc<Inner> {
        Rc::new(Inner {
            endpoint,
            handle,
            proto: RefCell::new(proto),
            touched: Cell::new(false),
            unsent: RefCell::new(None),
            blocked: Cell::new(false),
            deadline: Cell::new(None),
            readers: RefCell::default(),
            writers: RefCell::default(),
            enders: RefCell::default(),
            connected: Cell::new(false),
            ended: RefCell::new(None),
            changed: Notify::new(),
        })
    }

    /// Has the driver look at it.
    pub fn touch(self: &Rc<Self>) {
        if !self.touched.replace(true) {
            self.endpoint.touched(self.clone());
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.get()
    }

    pub fn expire(self: &Rc<Self>, now: Instant) {
        self.proto.borrow_mut().handle_timeout(now);
        self.touch();
    }

    /// A packet came.
    pub fn handle(self: &Rc<Self>, event: ConnectionEvent) {
        self.proto.borrow_mut().handle_event(event);
        self.touch();
    }

    pub fn close(self: &Rc<Self>, code: VarInt, reason: &[u8]) {
        if self.ended.borrow().is_some() {
            return;
        }
        let reason = Bytes::copy_from_slice(reason);
        self.proto.borrow_mut().close(Instant::now(), code, reason);
        self.end(ConnectionError::LocallyClosed);
        self.touch();
    }

    pub fn ended(&self) -> Option<ConnectionError> {
        self.ended.borrow().clone()
    }

    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    fn end(&self, reason: ConnectionError) {
        self.ended.borrow_mut().get_or_insert(reason);
        self.readers.borrow_mut().wake_all();
        self.writers.borrow_mut().wake_all();
        self.enders.borrow_mut().wake_all();
        self.changed.notify_waiters();
    }

    /// Tells everybody what happened.
    pub fn dispatch(&self) {
        self.tell_endpoint();
        loop {
            let Some(event) = self.proto.borrow_mut().poll() else {
                break;
            };
            match event {
                Event::Stream(StreamEvent::Readable { id }) => self.readers.borrow_mut().wake(id),
                Event::Stream(StreamEvent::Writable { id }) => self.writers.borrow_mut().wake(id),
                Event::Stream(StreamEvent::Finished { id }) => self.enders.borrow_mut().wake(id),
                Event::Stream(StreamEvent::Stopped { id, .. }) => {
                    self.enders.borrow_mut().wake(id);
                    self.writers.borrow_mut().wake(id);
                }
                Event::Stream(StreamEvent::Opened { .. } | StreamEvent::Available { .. }) => {
                    self.changed.notify_waiters();
                }
                Event::Connected => {
                    self.connected.set(true);
                    self.changed.notify_waiters();
                }
                Event::ConnectionLost { reason } => self.end(reason),
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {
                }
            }
        }
    }

    fn tell_endpoint(&self) {
        loop {
            let Some(event) = self.proto.borrow_mut().poll_endpoint_events() else {
                break;
            };
            if let Some(answer) = self.endpoint.event(self.handle, event) {
                self.proto.borrow_mut().handle_event(answer);
            }
        }
    }

    /// The end of its turn: whatever is left to send is sent.
    pub fn sent(self: &Rc<Self>) {
        self.touched.set(false);
        self.send();
    }

    /// Sends what there is, as far as the protocol and the socket allow.
    pub fn send(self: &Rc<Self>) {
        self.transmit();
        self.tell_endpoint();
        let deadline = self.proto.borrow_mut().poll_timeout();
        self.deadline.set(deadline);
        if let Some(deadline) = deadline {
            self.endpoint.arm(deadline);
        }
    }

    /// The socket has no room for this now.
    fn keep(self: &Rc<Self>, transmit: quinn_proto::Transmit, contents: Vec<u8>) {
        *self.unsent.borrow_mut() = Some((transmit, contents));
        if !self.blocked.replace(true) {
            self.endpoint.blocked(self.clone());
        }
    }

    /// There is room again.
    pub fn unblocked(self: &Rc<Self>) {
        self.blocked.set(false);
        self.touch();
    }

    fn transmit(self: &Rc<Self>) {
        let socket = &self.endpoint.socket;
        if let Some((transmit, contents)) = self.unsent.take()
            && socket.send(&outgoing(&transmit, &contents)).is_err()
        {
            return self.keep(transmit, contents);
        }
        let now = Instant::now();
        let mut proto = self.proto.borrow_mut();
        let mut contents = self.endpoint.sending.borrow_mut();
        let mut packets = 0;
        while packets < PACKETS {
            let size = proto.current_mtu();
            contents.clear();
            contents.reserve(size.into());
            let segments = socket.segments(size.into());
            let Some(transmit) = proto.poll_transmit(now, segments, &mut contents) else {
                return;
            };
            packets += match transmit.segment_size {
                None => 1,
                Some(segment) => transmit.size.div_ceil(segment),
            };
            if let Err(Full) = socket.send(&outgoing(&transmit, &contents)) {
                return self.keep(transmit, contents.clone());
            }
        }
        // There may be more.
        self.touch();
    }

    /// Waits until `look` finds something; it is asked again after each change of the connection.
    async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }
}

impl Connection {
    pub(super) fn new(handle: Rc<Handle>) -> Connection {
        Connection(handle)
    }

    pub(super) fn inner(&self) -> &Rc<Inner> {
        &self.0.0
    }

    /// Waits for the end of the handshake.
    pub async fn established(&self) -> Result<(), ConnectionError> {
        let inner = self.inner();
        let look = || match inner.ended() {
            Some(reason) => Some(Err(reason)),
            None => inner.connected.get().then_some(Ok(())),
        };
        inner.until(look).await
    }

    /// Ends it, unless it has ended. Whatever is not yet sent is not sent any more.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        self.inner().close(code, reason);
    }

    /// Why it ended, if it did.
    pub fn close_reason(&self) -> Option<ConnectionError> {
        self.inner().ended()
    }

    /// Waits for its end.
    pub async fn closed(&self) -> ConnectionError {
        self.inner().until(|| self.inner().ended()).await
    }

    pub fn is(&self, other: &Connection) -> bool {
        Rc::ptr_eq(self.inner(), other.inner())
    }

    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.open(Dir::Bi).await?;
        Ok((self.send_half(id), self.recv_half(id)))
    }

    pub async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        let id = self.open(Dir::Uni).await?;
        Ok(self.send_half(id))
    }

    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.accept(Dir::Bi).await?;
        Ok((self.send_half(id), self.recv_half(id)))
    }

    pub async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        let id = self.accept(Dir::Uni).await?;
        Ok(self.recv_half(id))
    }

    async fn open(&self, dir: Dir) -> Result<StreamId, ConnectionError> {
        let inner = self.inner();
        let look = || match inner.ended() {
            Some(reason) => Some(Err(reason)),
            None => inner.proto.borrow_mut().streams().open(dir).map(Ok),
        };
        inner.until(look).await
    }

    async fn accept(&self, dir: Dir) -> Result<StreamId, ConnectionError> {
        let inner = self.inner();
        // What was opened before the end is there to be read.
        let look = || match inner.proto.borrow_mut().streams().accept(dir) {
            Some(id) => Some(Ok(id)),
            None => inner.ended().map(Err),
        };
        let id = inner.until(look).await?;
        // The peer may open one more for it.
        inner.touch();
        Ok(id)
    }

    fn send_half(&self, id: StreamId) -> SendStream {
        SendStream::new(self.clone(), id)
    }

    fn recv_half(&self, id: StreamId) -> RecvStream {
        RecvStream::new(self.clone(), id)
    }

    /// Smoothed round trip.
    pub fn rtt(&self) -> Duration {
        self.inner().proto.borrow().rtt()
    }

    pub fn stats(&self) -> ConnectionStats {
        self.inner().proto.borrow().stats()
    }

    /// What the peer proved to be: its certificates.
    pub fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner().proto.borrow().crypto_session().peer_identity()
    }
}
