//! One socket and all connections over it.

use super::connection::{self, Connection, Handle};
use super::packets::Packets;
use super::socket::Socket;
use crate::drive;
use quinn::udp::{self, RecvMeta};
use quinn::{ClientConfig, ConnectError, ConnectionError, EndpointConfig, ServerConfig, VarInt};
use quinn_proto::{ConnectionHandle, DatagramEvent, EcnCodepoint, EndpointEvent, Incoming};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, SocketAddrV6, UdpSocket};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::time::Sleep;

/// Looks for connections touched while others were served, before the rest of the thread has its turn.
const ROUNDS: u32 = 3;

/// A handle of one socket's QUIC. The socket is closed once all handles and all connections are gone.
#[derive(Clone)]
pub(crate) struct Endpoint(Rc<Owner>);

/// Ends the driver when the last handle goes.
struct Owner(Rc<Inner>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.wanted.set(false);
        self.0.wake();
    }
}

pub(super) struct Inner {
    pub socket: Socket,
    ipv6: bool,
    proto: RefCell<quinn_proto::Endpoint>,
    /// By handle.
    connections: RefCell<Vec<Option<Rc<connection::Inner>>>>,
    /// Those with something to say, to hear or to be told.
    touched: RefCell<Vec<Rc<connection::Inner>>>,
    /// Those whose last packets wait for room in the socket.
    blocked: RefCell<Vec<Rc<connection::Inner>>>,
    /// Callers nobody has looked at.
    incoming: RefCell<VecDeque<Incoming>>,
    /// A caller came, the last connection went, or it was closed.
    changed: Notify,
    /// There are handles.
    wanted: Cell<bool>,
    closed: Cell<bool>,
    packets: RefCell<Packets>,
    /// What is sent is built here.
    pub sending: RefCell<Vec<u8>>,
    driver: RefCell<Waker>,
    /// The driver runs: whoever has something for it needs no wake-up.
    running: Cell<bool>,
    /// The driver has ended, as the thread does: nothing is sent any more.
    gone: Cell<bool>,
    /// When the timer fires: no later than the first deadline of a connection.
    armed: Cell<Option<Instant>>,
}

impl Endpoint {
    /// Takes the socket. Within a `LocalSet`.
    pub fn new(
        socket: UdpSocket,
        config: EndpointConfig,
        server: Option<ServerConfig>,
    ) -> io::Result<Endpoint> {
        let socket = Socket::new(socket)?;
        let ipv6 = socket.local_addr()?.is_ipv6();
        let may_discover = !socket.may_fragment();
        let proto =
            quinn_proto::Endpoint::new(Arc::new(config), server.map(Arc::new), may_discover, None);
        let inner = Rc::new(Inner {
            socket,
            ipv6,
            proto: RefCell::new(proto),
            connections: RefCell::default(),
            touched: RefCell::default(),
            blocked: RefCell::default(),
            incoming: RefCell::default(),
            changed: Notify::new(),
            wanted: Cell::new(true),
            closed: Cell::new(false),
            packets: RefCell::default(),
            sending: RefCell::default(),
            driver: RefCell::new(Waker::noop().clone()),
            running: Cell::new(false),
            gone: Cell::new(false),
            armed: Cell::new(None),
        });
        tokio::task::spawn_local(drive(Driver(inner.clone())));
        Ok(Endpoint(Rc::new(Owner(inner))))
    }

    fn inner(&self) -> &Rc<Inner> {
        &self.0.0
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner().socket.local_addr()
    }

    /// The next caller; none once this endpoint was closed. Each has to be passed to [`Self::begin`], [`Self::refuse`] or [`Self::retry`].
    pub async fn accept(&self) -> Option<Incoming> {
        let inner = self.inner();
        loop {
            let changed = inner.changed.notified();
            if inner.closed.get() {
                return None;
            }
            if let Some(incoming) = inner.incoming.borrow_mut().pop_front() {
                return Some(incoming);
            }
            changed.await;
        }
    }

    /// Begins the handshake with a caller.
    pub fn begin(
        &self,
        incoming: Incoming,
        server: Arc<ServerConfig>,
    ) -> Result<Connection, ConnectionError> {
        let mut answer = Vec::new();
        let begun = self.inner().proto.borrow_mut().accept(
            incoming,
            Instant::now(),
            &mut answer,
            Some(server),
        );
        match begun {
            Ok((handle, proto)) => Ok(self.inner().insert(handle, proto)),
            Err(error) => {
                if let Some(transmit) = error.response {
                    self.inner().respond(&transmit, &answer);
                }
                Err(error.cause)
            }
        }
    }

    pub fn refuse(&self, incoming: Incoming) {
        self.inner().refuse(incoming);
    }

    /// The caller has to prove first that it owns its address.
    pub fn retry(&self, incoming: Incoming) {
        let mut answer = Vec::new();
        let retried = self.inner().proto.borrow_mut().retry(incoming, &mut answer);
        match retried {
            Ok(transmit) => self.inner().respond(&transmit, &answer),
            Err(error) => self.refuse(error.into_incoming()),
        }
    }

    /// Calls. The handshake is done when [`Connection::established`] says so.
    pub fn connect(
        &self,
        config: ClientConfig,
        remote: SocketAddr,
        name: &str,
    ) -> Result<Connection, ConnectError> {
        let inner = self.inner();
        if inner.closed.get() {
            return Err(ConnectError::EndpointStopping);
        }
        let remote = match remote {
            SocketAddr::V6(_) if !inner.ipv6 => {
                return Err(ConnectError::InvalidRemoteAddress(remote));
            }
            SocketAddr::V4(v4) if inner.ipv6 => {
                SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into()
            }
            _ => remote,
        };
        let (handle, proto) =
            inner
                .proto
                .borrow_mut()
                .connect(Instant::now(), config, remote, name)?;
        Ok(inner.insert(handle, proto))
    }

    /// Ends all connections, and takes and makes no new ones.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        let inner = self.inner();
        inner.closed.set(true);
        for connection in inner.all() {
            connection.close(code, reason);
        }
        for incoming in inner.incoming.take() {
            inner.refuse(incoming);
        }
        inner.changed.notify_waiters();
    }

    /// Waits until the last words of all connections are said.
    pub async fn wait_idle(&self) {
        let inner = self.inner();
        loop {
            let changed = inner.changed.notified();
            if inner.is_idle() {
                return;
            }
            changed.await;
        }
    }
}

impl Inner {
    fn all(&self) -> Vec<Rc<connection::Inner>> {
        let connections = self.connections.borrow();
        connections.iter().flatten().cloned().collect()
    }

    fn is_idle(&self) -> bool {
        self.connections.borrow().iter().all(Option::is_none)
    }

    fn insert(
        self: &Rc<Self>,
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
    ) -> Connection {
        let connection = connection::Inner::new(self.clone(), handle, proto);
        let mut connections = self.connections.borrow_mut();
        if connections.len() <= handle.0 {
            connections.resize_with(handle.0 + 1, || None);
        }
        connections[handle.0] = Some(connection.clone());
        drop(connections);
        connection.touch();
        Connection::new(Handle::new(connection))
    }

    /// The driver has to look again.
    pub fn wake(&self) {
        if !self.running.get() {
            self.driver.borrow().wake_by_ref();
        }
    }

    /// Gives `connection` a turn of the driver. Once for each turn.
    pub fn touched(&self, connection: Rc<connection::Inner>) {
        if !self.gone.get() {
            self.touched.borrow_mut().push(connection);
            self.wake();
        }
    }

    /// The packets of `connection` wait for room in the socket. Once for each turn that it gets.
    pub fn blocked(&self, connection: Rc<connection::Inner>) {
        if !self.gone.get() {
            self.blocked.borrow_mut().push(connection);
            self.wake();
        }
    }

    /// Looks at the connections' deadlines at `deadline`, or before.
    pub fn arm(&self, deadline: Instant) {
        if self.armed.get().is_none_or(|armed| deadline < armed) {
            self.armed.set(Some(deadline));
            self.wake();
        }
    }

    /// What a connection has to tell the endpoint. What the endpoint answers is for that connection.
    pub fn event(
        &self,
        handle: ConnectionHandle,
        event: EndpointEvent,
    ) -> Option<quinn_proto::ConnectionEvent> {
        if event.is_drained() {
            // Dropped after the list is free again.
            let _gone = self
                .connections
                .borrow_mut()
                .get_mut(handle.0)
                .and_then(Option::take);
            self.changed.notify_waiters();
        }
        self.proto.borrow_mut().handle_event(handle, event)
    }

    fn refuse(&self, incoming: Incoming) {
        let mut answer = Vec::new();
        let transmit = self.proto.borrow_mut().refuse(incoming, &mut answer);
        self.respond(&transmit, &answer);
    }

    /// Sends an answer that belongs to no connection. Where there is no room it is lost, and the caller tries again.
    fn respond(&self, transmit: &quinn_proto::Transmit, contents: &[u8]) {
        let _ = self.socket.send(&outgoing(transmit, contents));
    }

    /// Takes what the socket has and gives it to whom it is for.
    fn receive(&self, cx: &mut Context<'_>) {
        let mut meta = [RecvMeta::default(); udp::BATCH_SIZE];
        let mut packets = self.packets.borrow_mut();
        let count = match self.socket.poll_recv(cx, &mut packets, &mut meta) {
            Poll::Pending => return,
            Poll::Ready(Ok(count)) => count,
            // Anybody can cause it, and it says nothing.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Poll::Ready(Err(error)) => {
                tracing::warn!(%error, "nothing can be received on a UDP socket of the link; connections over it will be missed and made anew");
                return;
            }
        };
        let now = Instant::now();
        for (at, meta) in meta[..count].iter().enumerate() {
            let mut joined = packets.take(at, meta.len);
            while !joined.is_empty() {
                let packet = joined.split_to(meta.stride.clamp(1, joined.len()));
                let mut answer = Vec::new();
                let event = self.proto.borrow_mut().handle(
                    now,
                    meta.addr,
                    meta.dst_ip,
                    meta.ecn.map(incoming_mark),
                    packet,
                    &mut answer,
                );
                match event {
                    Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                        let connection = self
                            .connections
                            .borrow()
                            .get(handle.0)
                            .and_then(Clone::clone);
                        if let Some(connection) = connection {
                            connection.handle(event);
                        }
                    }
                    Some(DatagramEvent::NewConnection(incoming)) if self.closed.get() => {
                        self.refuse(incoming);
                    }
                    Some(DatagramEvent::NewConnection(incoming)) => {
                        self.incoming.borrow_mut().push_back(incoming);
                        self.changed.notify_waiters();
                    }
                    Some(DatagramEvent::Response(transmit)) => self.respond(&transmit, &answer),
                    None => {}
                }
            }
        }
    }

    /// Tells the connections whose deadline has come, and when to look next.
    fn expire(&self) {
        let now = Instant::now();
        if self.armed.get().is_none_or(|armed| now < armed) {
            return;
        }
        self.armed.set(None);
        for connection in self.all() {
            if let Some(deadline) = connection.deadline() {
                if deadline <= now {
                    connection.expire(now);
                } else {
                    self.arm(deadline);
                }
            }
        }
    }

    /// Serves whoever was touched: events first, then the sessions they are for, then what there is to send.
    fn serve(&self) {
        for _ in 0..ROUNDS {
            let mut served = self.touched.take();
            if served.is_empty() {
                return;
            }
            for connection in &served {
                connection.dispatch();
            }
            drive::at_once(|| ());
            for connection in served.drain(..) {
                connection.sent();
            }
        }
    }

    fn turn(&self, cx: &mut Context<'_>, timer: &mut Option<Pin<Box<Sleep>>>) -> Poll<()> {
        self.driver.borrow_mut().clone_from(cx.waker());
        self.running.set(true);
        self.receive(cx);
        self.expire();
        self.serve();
        if !self.blocked.borrow().is_empty() && self.socket.poll_room(cx).is_ready() {
            for connection in self.blocked.take() {
                connection.unblocked();
            }
        }
        self.running.set(false);
        if !self.wanted.get() && self.is_idle() {
            return Poll::Ready(());
        }
        // Each of these asks for a wake-up of its own if it is pending.
        let ready = self.socket.poll_readable(cx).is_ready() | self.wait(cx, timer).is_ready();
        if ready || !self.touched.borrow().is_empty() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Waits for the first deadline.
    fn wait(&self, cx: &mut Context<'_>, timer: &mut Option<Pin<Box<Sleep>>>) -> Poll<()> {
        let Some(armed) = self.armed.get() else {
            return Poll::Pending;
        };
        let at = tokio::time::Instant::from_std(armed);
        let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if timer.deadline() != at {
            timer.as_mut().reset(at);
        }
        timer.as_mut().poll(cx)
    }
}

async fn drive(driver: Driver) {
    let mut timer = None;
    poll_fn(|cx| driver.0.turn(cx, &mut timer)).await;
}

/// The driver's hold on its endpoint. Endpoint and connections hold each other; at the driver's end they let go, and the socket is closed.
struct Driver(Rc<Inner>);

impl Drop for Driver {
    fn drop(&mut self) {
        let inner = &self.0;
        inner.gone.set(true);
        inner.touched.take();
        inner.blocked.take();
        inner.connections.take();
        for incoming in inner.incoming.take() {
            inner.proto.borrow_mut().ignore(incoming);
        }
    }
}

fn incoming_mark(mark: udp::EcnCodepoint) -> EcnCodepoint {
    match mark {
        udp::EcnCodepoint::Ect0 => EcnCodepoint::Ect0,
        udp::EcnCodepoint::Ect1 => EcnCodepoint::Ect1,
        udp::EcnCodepoint::Ce => EcnCodepoint::Ce,
    }
}

/// As the socket takes it.
pub(super) fn outgoing<'a>(
    transmit: &quinn_proto::Transmit,
    contents: &'a [u8],
) -> udp::Transmit<'a> {
    udp::Transmit {
        destination: transmit.destination,
        ecn: transmit
            .ecn
            .and_then(|mark| udp::EcnCodepoint::from_bits(mark as u8)),
        contents: &contents[..transmit.size],
        segment_size: transmit.segment_size,
        src_ip: transmit.src_ip,
    }
}
