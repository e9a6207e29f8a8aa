//! Between the link, which knows nodes and services by id, and the cores, which know slots.

use super::budget::{Budget, ReceiveBuf};
use super::buffers::Entry;
use super::driver::Shard;
use super::failures::Failures;
use super::memory::Memory;
use super::service::Service;
use crate::control::protocol::LevelName;
use crate::events::EventLog;
use holdfast_disk::Buf;
use holdfast_link::{
    Link, LinkConfig, LinkError, LinkEvent, LinkHandler, Path, Payload, PeerStore, Received,
};
use holdfast_replicator_core::api::{Event, SessionId};
use holdfast_replicator_core::words;
use holdfast_wire_format::frame::{Body, FrameHeader, FrameKind, GoodbyeCode, Hello};
use holdfast_wire_format::frame_codec::{FrameError, decode_body, encode_body};
use holdfast_wire_format::ids::{Slot, Uuid};
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::rc::{Rc, Weak};

/// One peer of one service, as the link names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct PeerRef {
    pub node: Uuid,
    pub service: Uuid,
}

/// Where a stream's events go.
struct Route {
    service: usize,
    slot: Slot,
}

/// The shard's side of the link.
pub(super) struct LinkPort {
    link: Link,
    inbox: Rc<Inbox>,
}

/// Names for what the link knows by id.
struct Names {
    this: String,
    peers: std::sync::Arc<PeerStore>,
    services: RefCell<HashMap<Uuid, String>>,
}

impl Names {
    fn node(&self, id: Uuid) -> String {
        let peers = self.peers.all();
        let known = peers.iter().find(|peer| peer.id == id);
        known.map_or_else(|| id.to_string(), |peer| peer.name.clone())
    }

    fn service(&self, id: Uuid) -> String {
        let services = self.services.borrow();
        services.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    /// The peer that a refusal is about: it names its id.
    fn in_text(&self, text: &str) -> Option<Uuid> {
        let peers = self.peers.all();
        let named = peers
            .iter()
            .find(|peer| text.contains(&peer.id.to_string()));
        named.map(|peer| peer.id)
    }
}

/// What the link delivered and the shard has not looked at.
struct Inbox {
    shard: OnceCell<Weak<Shard>>,
    memory: Rc<Memory>,
    log: EventLog,
    failures: Failures,
    names: Names,
    routes: RefCell<BTreeMap<PeerRef, Route>>,
    budgets: RefCell<BTreeMap<Uuid, Rc<Budget>>>,
    events: RefCell<VecDeque<LinkEvent<ReceiveBuf>>>,
    /// Sessions in which a frame could not be read: what follows it in them is not looked at.
    bad: RefCell<BTreeSet<u64>>,
}

/// The handler the link calls.
struct Handler(Rc<Inbox>);

impl LinkHandler for Handler {
    type Buf = ReceiveBuf;

    fn on_event(&self, event: LinkEvent<ReceiveBuf>) {
        self.0.events.borrow_mut().push_back(event);
    }

    fn on_batch_end(&self) {
        if let Some(shard) = self.0.shard.get().and_then(Weak::upgrade) {
            shard.pump();
        }
    }

    fn facts(&self, peer: Uuid, service: Uuid) -> Result<Vec<u8>, String> {
        let asked = PeerRef {
            node: peer,
            service,
        };
        let routes = self.0.routes.borrow();
        let route = routes.get(&asked).map(|route| (route.service, route.slot));
        let shard = self.0.shard.get().and_then(Weak::upgrade);
        let (Some((at, slot)), Some(shard)) = (route, shard) else {
            return Err("it has no such service with this node".into());
        };
        let hello = shard.with_services(|services| {
            let service = services.get(at).ok_or("it has no such copy")?;
            service.core.would_tell(slot)
        })?;
        Ok(encode_body(&Body::Hello(Box::new(hello))))
    }

    async fn alloc(&self, service: Uuid, _header: &FrameHeader, len: usize) -> ReceiveBuf {
        let budget = self.0.budgets.borrow().get(&service).cloned();
        // A service without a budget has no stream; the smallest budget lets one payload in.
        let budget = budget.unwrap_or_else(|| Budget::new(0));
        budget.alloc(&self.0.memory, len).await
    }

    fn accept(&self, peer: Uuid, service: Uuid) -> Result<(), String> {
        let routes = self.0.routes.borrow();
        let asked = PeerRef {
            node: peer,
            service,
        };
        if routes.contains_key(&asked) {
            return Ok(());
        }
        let names = &self.0.names;
        let mut common: Vec<String> = routes
            .keys()
            .filter(|known| known.node == peer)
            .map(|known| {
                format!(
                    "service {} ({})",
                    names.service(known.service),
                    known.service
                )
            })
            .collect();
        common.sort();
        Err(self
            .0
            .failures
            .asked(peer, &names.node(peer), &names.this, service, &common))
    }
}

/// A part of a buffer, as the link takes it.
struct Part {
    buf: Buf,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.buf.as_slice()[self.range.clone()]
    }
}

impl LinkPort {
    /// Starts the link of this shard. Nothing reaches it before [`Self::serve`]. Within a `LocalSet`.
    ///
    /// # Errors
    /// An address is in use, or the node's certificate cannot be used.
    pub fn start(
        config: LinkConfig,
        memory: Rc<Memory>,
        log: EventLog,
    ) -> Result<LinkPort, LinkError> {
        let names = Names {
            this: config.identity.name().to_owned(),
            peers: config.peers.clone(),
            services: RefCell::default(),
        };
        let inbox = Rc::new(Inbox {
            shard: OnceCell::new(),
            memory,
            failures: Failures::new(log.clone()),
            names,
            log,
            routes: RefCell::default(),
            budgets: RefCell::default(),
            events: RefCell::default(),
            bad: RefCell::default(),
        });
        let link = Link::start(config, Rc::new(Handler(inbox.clone())))?;
        Ok(LinkPort { link, inbox })
    }

    /// The shard that what arrives is for.
    pub fn serve(&self, shard: &Rc<Shard>) {
        // A second call would name the same shard.
        let _ = self.inbox.shard.set(Rc::downgrade(shard));
    }

    /// Takes streams of this service's peers from here on; `bytes` is what each may have waiting here.
    pub fn add_service(
        &self,
        at: usize,
        service: Uuid,
        name: &str,
        bytes: usize,
        peers: &[(Slot, Uuid)],
    ) {
        let budget = Budget::new(bytes * peers.len());
        self.inbox.budgets.borrow_mut().insert(service, budget);
        let names = &self.inbox.names.services;
        names.borrow_mut().insert(service, name.to_owned());
        let mut routes = self.inbox.routes.borrow_mut();
        for (slot, node) in peers {
            routes.insert(
                PeerRef {
                    node: *node,
                    service,
                },
                Route {
                    service: at,
                    slot: *slot,
                },
            );
        }
    }

    /// Addresses listened on, with the ports the system chose.
    pub fn addresses(&self) -> Vec<std::net::SocketAddr> {
        self.link.local_addresses()
    }

    pub fn send(&self, session: SessionId, header: &FrameHeader) {
        self.queue(session, header, Payload::None);
    }

    pub fn send_body(&self, session: SessionId, mut header: FrameHeader, body: &Body) {
        let bytes = encode_body(body);
        header.payload_length = bytes.len() as u32;
        header.payload_crc = if bytes.is_empty() {
            0
        } else {
            crc32fast::hash(&bytes)
        };
        let payload = if bytes.is_empty() {
            Payload::None
        } else {
            Payload::Inline(bytes)
        };
        self.queue(session, &header, payload);
    }

    pub fn send_data(
        &self,
        session: SessionId,
        header: &FrameHeader,
        buf: Buf,
        range: Range<usize>,
    ) {
        self.queue(
            session,
            header,
            Payload::Local(Box::new(Part { buf, range })),
        );
    }

    fn queue(&self, session: SessionId, header: &FrameHeader, payload: Payload) {
        match self.link.queue(session.0, header, payload) {
            // Its end is reported by an event of its own.
            Ok(()) | Err(holdfast_link::SendError::Closed) => {}
            Err(error) => {
                tracing::error!(kind = ?header.kind, %error, "a frame was not sent; the session is closed");
                self.link
                    .close(session.0, GoodbyeCode::Defect, "a frame could not be built");
            }
        }
    }

    /// Sends what the services queued. True: the cores have to hear what left the queues.
    #[must_use]
    pub fn flush(&self) -> bool {
        let mut any = false;
        self.link.flush(|peer, service, session, bytes| {
            any = true;
            self.inbox
                .events
                .borrow_mut()
                .push_back(LinkEvent::Drained {
                    peer,
                    service,
                    session,
                    bytes,
                });
        });
        any
    }

    pub fn connect(&self, peer: PeerRef) -> Result<(), LinkError> {
        self.link.connect(peer.node, peer.service)
    }

    /// Does not try to reach that peer any more, and takes no stream of it.
    pub fn disconnect(&self, peer: PeerRef) {
        self.link.disconnect(peer.node, peer.service);
    }

    pub fn close(
        &self,
        peer: PeerRef,
        session: SessionId,
        code: GoodbyeCode,
        text: &str,
        reconnect: bool,
    ) {
        self.link.close(session.0, code, text);
        // Who shuts down does not come back by itself.
        if !reconnect || code == GoodbyeCode::Shutdown {
            self.link.disconnect(peer.node, peer.service);
        }
    }

    /// Where to reach a node, instead of the addresses it gave when it joined.
    pub fn set_paths(
        &self,
        node: Uuid,
        addresses: Vec<std::net::SocketAddr>,
    ) -> Result<(), LinkError> {
        self.link
            .set_paths(node, addresses.into_iter().map(Path::from).collect())
    }

    /// Peers and certificates were read again.
    pub fn reload(&self) {
        self.link.reload();
    }

    /// What the copy there would say of itself if the two met now. Changes nothing on either side.
    pub async fn facts(&self, peer: PeerRef) -> Result<Hello, String> {
        let bytes = self.link.facts(peer.node, peer.service).await?;
        match decode_body(FrameKind::Hello, &bytes) {
            Ok(Body::Hello(hello)) => Ok(*hello),
            Ok(_) => Err("it answers with something else".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What arrived since the last look, as events of the services.
    pub fn poll(&self, services: &mut [Service]) -> bool {
        let mut any = false;
        loop {
            let Some(event) = self.inbox.events.borrow_mut().pop_front() else {
                return any;
            };
            any = true;
            self.deliver(event, services);
        }
    }

    fn deliver(&self, event: LinkEvent<ReceiveBuf>, services: &mut [Service]) {
        let of = |peer: Uuid, service: Uuid| {
            let routes = self.inbox.routes.borrow();
            routes
                .get(&PeerRef {
                    node: peer,
                    service,
                })
                .map(|route| (route.service, route.slot))
        };
        match event {
            LinkEvent::StreamUp {
                peer,
                service,
                session,
                path,
            } => {
                self.inbox.failures.open(PeerRef {
                    node: peer,
                    service,
                });
                if let Some((at, peer)) = of(peer, service) {
                    services[at].events.push_back(Event::LinkUp {
                        peer,
                        session: SessionId(session),
                        path,
                    });
                }
            }
            LinkEvent::StreamDown {
                peer,
                service,
                session,
                code,
                by_peer,
                reason,
            } => {
                self.inbox.bad.borrow_mut().remove(&session);
                if let Some((at, peer)) = of(peer, service) {
                    let reason = match code {
                        Some(code) if by_peer => {
                            format!("the peer closed it ({}): {reason}", words::goodbye(code))
                        }
                        Some(code) => {
                            format!("closed here ({}): {reason}", words::goodbye(code))
                        }
                        None => reason,
                    };
                    services[at].events.push_back(Event::LinkDown {
                        peer,
                        session: SessionId(session),
                        reason,
                    });
                }
            }
            LinkEvent::Frame {
                peer,
                service,
                session,
                header,
                payload,
            } => {
                let Some((at, slot)) = of(peer, service) else {
                    return;
                };
                if self.inbox.bad.borrow().contains(&session) {
                    return;
                }
                self.frame(&mut services[at], slot, session, header, payload);
            }
            LinkEvent::Drained {
                peer,
                service,
                session,
                bytes,
            } => {
                if let Some((at, peer)) = of(peer, service) {
                    let event = Event::Drained {
                        peer,
                        session: SessionId(session),
                        bytes: bytes as u64,
                    };
                    services[at].events.push_back(event);
                }
            }
            LinkEvent::PeerUp { peer, path } => {
                self.inbox.failures.connected(peer);
                self.inbox.log.node(
                    LevelName::Info,
                    "node-connected",
                    format!("node {} is connected over {path}", self.name(peer)),
                );
            }
            LinkEvent::PeerDown { peer, path, reason } => {
                self.inbox.failures.disconnected(peer);
                let text = format!(
                    "the connection to node {} over {path} ended: {reason}",
                    self.name(peer)
                );
                self.inbox
                    .log
                    .node(LevelName::Warning, "node-disconnected", text);
            }
            // Repeats with every attempt; said once.
            LinkEvent::PathFailed { peer, path, reason } => {
                let name = self.name(peer);
                self.inbox.failures.path(peer, &name, &path, &reason);
            }
            LinkEvent::CallerRefused { remote, reason } => {
                let named = self.inbox.names.in_text(&reason);
                self.inbox.failures.caller(named, remote, &reason);
            }
            LinkEvent::ServiceRefused {
                peer,
                service,
                reason,
            } => {
                let (node, name) = (self.name(peer), self.inbox.names.service(service));
                let peer = PeerRef {
                    node: peer,
                    service,
                };
                self.inbox.failures.service(peer, &node, &name, &reason);
            }
        }
    }

    fn frame(
        &self,
        service: &mut Service,
        peer: Slot,
        session: u64,
        header: FrameHeader,
        payload: Received<ReceiveBuf>,
    ) {
        let id = SessionId(session);
        let body = match payload {
            Received::Data(ReceiveBuf { buf, receipt }) => {
                let len = header.payload_length as usize;
                let buf = service.table.insert(Entry {
                    buf,
                    at: 0,
                    len,
                    target: None,
                    _receipt: Some(receipt),
                });
                return service.events.push_back(Event::Data {
                    peer,
                    session: id,
                    header,
                    buf,
                });
            }
            Received::Control(bytes) => decode_body(header.kind, &bytes),
            Received::None => decode_body(header.kind, &[]),
        };
        match body {
            Ok(body) => service.events.push_back(Event::Control {
                peer,
                session: id,
                header,
                body,
            }),
            Err(error) => {
                // D14: a bad frame closes the link with a reason and changes nothing.
                let text = format!("a {:?} frame cannot be read: {error}", header.kind);
                tracing::error!(service = service.name, peer = peer.0, "{text}");
                let code = match error {
                    FrameError::Incompatible(_) => GoodbyeCode::Refused,
                    _ => GoodbyeCode::BadFrame,
                };
                self.inbox.bad.borrow_mut().insert(session);
                self.link.close(session, code, &text);
            }
        }
    }

    fn name(&self, node: Uuid) -> String {
        self.inbox.names.node(node)
    }

    /// Why a peer that is wanted is not there, as far as the link knows.
    pub fn failure(&self, peer: PeerRef) -> Option<String> {
        self.inbox.failures.of(peer)
    }

    /// Ends all connections; what is queued is sent first.
    pub async fn shutdown(&self) {
        self.link
            .shutdown(GoodbyeCode::Shutdown, "the replicator stops")
            .await;
    }
}
