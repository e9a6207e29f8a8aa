//! The handle of one shard's link, and what all its tasks share.

use crate::api::{
    LinkEvent, LinkHandler, Path, Payload, PeerStatus, SendError, SessionId, code_to,
};
use crate::backoff::Jitter;
use crate::connection::Context;
use crate::control::Message;
use crate::dial;
use crate::error::LinkError;
use crate::facts::{self, Questions};
use crate::files::HexId;
use crate::identity::Identity;
use crate::peers::PeerStore;
use crate::quic::{Connection, Endpoint, socket};
use crate::session::Session;
use crate::tls::{self, ALPN_REPLICATION, Expect};
use crate::tuning::Tuning;
use holdfast_wire_format::frame::{FrameHeader, GoodbyeCode};
use holdfast_wire_format::frame_codec::encode_header;
use holdfast_wire_format::ids::Uuid;
use quinn::TransportConfig;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// What a link needs to start.
pub struct LinkConfig {
    /// UDP addresses of this shard; port 0 lets the system choose.
    pub listen: Vec<SocketAddr>,
    pub identity: Arc<Identity>,
    pub peers: Arc<PeerStore>,
    pub tuning: Tuning,
    /// For the jitter of pauses between attempts.
    pub seed: u64,
}

/// The link of one shard. A cheap handle for the thread that started it; clones are the same link. Nothing here blocks.
#[derive(Clone)]
pub struct Link {
    shared: Rc<Shared>,
}

pub(crate) struct Shared {
    pub identity: Arc<Identity>,
    pub peer_store: Arc<PeerStore>,
    pub tuning: Tuning,
    /// What callers meet; the transport is chosen for each.
    server: quinn::ServerConfig,
    pub jitter: Jitter,
    listening: Vec<Endpoint>,
    /// Endpoints for dialing only, by local address.
    dialing: RefCell<HashMap<IpAddr, Endpoint>>,
    peers: RefCell<HashMap<Uuid, Rc<PeerLink>>>,
    pub sessions: RefCell<BTreeMap<SessionId, Rc<Session>>>,
    /// Counts ended sessions and connections: whoever waits for an end watches it.
    pub ended: watch::Sender<u64>,
    pub connections: Cell<usize>,
    last_session: Cell<SessionId>,
    pub down: Cell<bool>,
    /// Frames wait for [`Link::flush`].
    unflushed: Cell<bool>,
    new_peers: mpsc::UnboundedSender<Rc<PeerLink>>,
}

/// One peer, connected or not.
pub(crate) struct PeerLink {
    pub id: Uuid,
    /// This node has the smaller id.
    pub dials: bool,
    paths: RefCell<Option<Vec<Path>>>,
    wanted: RefCell<BTreeSet<Uuid>>,
    /// Counts changes of what is wanted, of paths, and hints of the peer.
    pub changed: watch::Sender<u64>,
    pub connection: RefCell<Option<Current>>,
    pub last_failure: RefCell<Option<String>>,
    pub questions: Questions,
}

/// The connection in use.
pub(crate) struct Current {
    pub connection: Connection,
    pub path: String,
    pub messages: mpsc::UnboundedSender<Message>,
}

impl PeerLink {
    pub fn wants(&self, service: Uuid) -> bool {
        self.wanted.borrow().contains(&service)
    }

    pub fn wanted(&self) -> Vec<Uuid> {
        self.wanted.borrow().iter().copied().collect()
    }

    pub fn wants_any(&self) -> bool {
        !self.wanted.borrow().is_empty() || self.questions.any()
    }

    pub fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// True if it is on its way.
    pub fn tell(&self, message: Message) -> bool {
        match &*self.connection.borrow() {
            // If the connection ended just now, the next one begins with everything there is to say.
            Some(current) => current.messages.send(message).is_ok(),
            None => false,
        }
    }

    fn disconnect(&self, code: GoodbyeCode, reason: &str) {
        if let Some(current) = &*self.connection.borrow() {
            current.connection.close(code_to(code), reason.as_bytes());
        }
    }
}

impl Shared {
    /// The peer's state here; made on first use if the peer joined.
    pub fn peer(&self, id: Uuid) -> Option<Rc<PeerLink>> {
        if let Some(known) = self.peers.borrow().get(&id) {
            return Some(known.clone());
        }
        self.peer_store.get(id)?;
        let peer = Rc::new(PeerLink {
            id,
            dials: self.identity.id() < id,
            paths: RefCell::new(None),
            wanted: RefCell::default(),
            changed: watch::Sender::new(0),
            connection: RefCell::new(None),
            last_failure: RefCell::new(None),
            questions: Questions::default(),
        });
        self.peers.borrow_mut().insert(id, peer.clone());
        if peer.dials {
            // Nobody listens only while everything shuts down.
            let _ = self.new_peers.send(peer.clone());
        }
        Some(peer)
    }

    pub fn paths(&self, peer: &PeerLink) -> Vec<Path> {
        if let Some(paths) = &*peer.paths.borrow() {
            return paths.clone();
        }
        let known = self.peer_store.get(peer.id);
        known
            .map(|known| known.addresses.into_iter().map(Path::from).collect())
            .unwrap_or_default()
    }

    pub fn next_session(&self) -> SessionId {
        self.last_session.set(self.last_session.get() + 1);
        self.last_session.get()
    }

    pub fn session_of(&self, peer: Uuid, service: Uuid) -> Option<Rc<Session>> {
        self.sessions
            .borrow()
            .values()
            .find(|s| s.peer == peer && s.service == service)
            .cloned()
    }

    pub fn session_ended(&self, id: SessionId) {
        self.sessions.borrow_mut().remove(&id);
        self.ended.send_modify(|count| *count += 1);
    }

    /// The endpoint to dial a path from.
    pub fn endpoint_for(&self, path: &Path) -> std::io::Result<Endpoint> {
        let local = match path.local {
            Some(local) => local,
            None => {
                let fits = |endpoint: &&Endpoint| {
                    endpoint.local_addr().is_ok_and(|own| {
                        own.ip().is_unspecified() && (own.is_ipv6() || path.remote.is_ipv4())
                    })
                };
                if let Some(endpoint) = self.listening.iter().find(fits) {
                    return Ok(endpoint.clone());
                }
                match path.remote {
                    SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                }
            }
        };
        if let Some(endpoint) = self.dialing.borrow().get(&local) {
            return Ok(endpoint.clone());
        }
        let socket = socket::bind((local, 0).into())?;
        let endpoint = Endpoint::new(socket, self.tuning.endpoint(), None)?;
        self.dialing.borrow_mut().insert(local, endpoint.clone());
        Ok(endpoint)
    }

    /// Settings for a connection to `remote`: packets as large as the route's interface carries are looked for.
    pub fn transport(&self, local: Option<IpAddr>, remote: SocketAddr) -> Arc<TransportConfig> {
        let route = socket::route_payload(local, remote);
        self.tuning.transport(route.ok())
    }

    /// What a caller from `remote` meets.
    pub fn server(&self, remote: SocketAddr) -> Arc<quinn::ServerConfig> {
        let mut server = self.server.clone();
        server.transport_config(self.transport(None, remote));
        Arc::new(server)
    }

    fn endpoints(&self) -> Vec<Endpoint> {
        self.listening
            .iter()
            .cloned()
            .chain(self.dialing.borrow().values().cloned())
            .collect()
    }
}

impl Link {
    /// Starts the link: listens, and dials the peers with a smaller id than theirs once a service is wanted. Call it within a
    /// `LocalSet` of a current-thread runtime; all of the link runs on that thread.
    ///
    /// # Errors
    /// An address can't be bound; the certificate can't be used.
    pub fn start<H: LinkHandler>(config: LinkConfig, handler: Rc<H>) -> Result<Link, LinkError> {
        let LinkConfig {
            listen,
            identity,
            peers,
            tuning,
            seed,
        } = config;
        let mut server = tls::server(&identity, &peers, Expect::AnyPeer, ALPN_REPLICATION)?;
        server
            .transport_config(tuning.transport(None))
            .max_incoming(64);
        let mut listening = Vec::new();
        for address in listen {
            let io = |source| LinkError::Listen { address, source };
            let endpoint = socket::bind(address)
                .and_then(|socket| Endpoint::new(socket, tuning.endpoint(), Some(server.clone())))
                .map_err(io)?;
            listening.push(endpoint);
        }
        let (new_peers, mut to_dial) = mpsc::unbounded_channel();
        let shared = Rc::new(Shared {
            identity,
            peer_store: peers,
            tuning,
            server,
            jitter: Jitter::new(seed),
            listening,
            dialing: RefCell::default(),
            peers: RefCell::default(),
            sessions: RefCell::default(),
            ended: watch::Sender::new(0),
            connections: Cell::new(0),
            last_session: Cell::new(0),
            down: Cell::new(false),
            unflushed: Cell::new(false),
            new_peers,
        });
        let context = Context {
            shared: shared.clone(),
            handler,
        };
        for endpoint in shared.listening.clone() {
            tokio::task::spawn_local(crate::accept::run(context.clone(), endpoint));
        }
        tokio::task::spawn_local(async move {
            while let Some(peer) = to_dial.recv().await {
                if context.shared.down.get() {
                    break;
                }
                tokio::task::spawn_local(dial::run(context.clone(), peer));
            }
        });
        Ok(Link { shared })
    }

    /// Addresses listened on, with the ports the system chose.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        self.shared
            .listening
            .iter()
            .filter_map(|endpoint| endpoint.local_addr().ok())
            .collect()
    }

    /// From now on: keep a stream for this service to this peer. Both nodes must want it. Idempotent.
    ///
    /// # Errors
    /// The peer never joined.
    pub fn connect(&self, peer: Uuid, service: Uuid) -> Result<(), LinkError> {
        let link = self.shared.peer(peer).ok_or_else(|| LinkError::NotAPeer {
            id: peer,
            name: "without a name here".into(),
        })?;
        if link.wanted.borrow_mut().insert(service) {
            link.bump();
            if !link.dials {
                link.tell(Message::Wanted {
                    service: HexId(service),
                });
            }
        }
        Ok(())
    }

    /// No stream for this service any more; the one there is closes after its queue was sent.
    pub fn disconnect(&self, peer: Uuid, service: Uuid) {
        let Some(link) = self.shared.peers.borrow().get(&peer).cloned() else {
            return;
        };
        if link.wanted.borrow_mut().remove(&service) {
            if let Some(session) = self.shared.session_of(peer, service) {
                session.close(GoodbyeCode::Disconnect, "disconnected by this node".into());
            }
            link.bump();
        }
    }

    /// What the peer would say of this service if the two met now, as its [`LinkHandler::facts`] gives it. Nothing changes on either side, and
    /// the service need not be wanted on any.
    ///
    /// # Errors
    /// A sentence that follows the peer's name: it is no peer, it can't be reached within two seconds, or why it does not say.
    pub async fn facts(&self, peer: Uuid, service: Uuid) -> Result<Vec<u8>, String> {
        let Some(link) = self.shared.peer(peer) else {
            return Err("it never joined".into());
        };
        facts::ask(&link, service, 2 * self.shared.tuning.attempt).await
    }

    /// Replaces the ways to reach a peer, best first, instead of the addresses it gave when it joined. A connection in use stays.
    ///
    /// # Errors
    /// The peer never joined.
    pub fn set_paths(&self, peer: Uuid, paths: Vec<Path>) -> Result<(), LinkError> {
        let link = self.shared.peer(peer).ok_or_else(|| LinkError::NotAPeer {
            id: peer,
            name: "without a name here".into(),
        })?;
        *link.paths.borrow_mut() = Some(paths);
        link.bump();
        Ok(())
    }

    /// Queues a frame. It is sent after the current turn of the thread, together with whatever else was queued until then.
    /// The queue has no bound of its own: the caller keeps [`Self::queued_bytes`] within one, by `Drained` events.
    ///
    /// # Errors
    /// The session is over, or the payload's length is not what the header says (a defect of the caller; nothing was queued).
    pub fn send(
        &self,
        session: SessionId,
        header: &FrameHeader,
        payload: Payload,
    ) -> Result<(), SendError> {
        self.queue_on(session, header, payload, Session::wake)
    }

    /// As [`Self::send`], but it is sent by the next [`Self::flush`], which the caller has to call in the same turn of the thread.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn queue(
        &self,
        session: SessionId,
        header: &FrameHeader,
        payload: Payload,
    ) -> Result<(), SendError> {
        self.queue_on(session, header, payload, |_| {
            self.shared.unflushed.set(true)
        })
    }

    fn queue_on(
        &self,
        session: SessionId,
        header: &FrameHeader,
        payload: Payload,
        then: impl FnOnce(&Session),
    ) -> Result<(), SendError> {
        let length = payload.len();
        if header.payload_length as usize != length {
            return Err(SendError::Length {
                header: header.payload_length,
                payload: length,
            });
        }
        let sessions = self.shared.sessions.borrow();
        let session = sessions
            .get(&session)
            .filter(|session| session.is_open())
            .ok_or(SendError::Closed)?;
        session.push(&encode_header(header), payload);
        then(session);
        Ok(())
    }

    /// Sends what was queued by [`Self::queue`], at once as far as QUIC and the socket have room, else as soon as they have. `drained` gets what a
    /// [`LinkEvent::Drained`] says: peer, service, session and bytes that left its queue here.
    pub fn flush(&self, mut drained: impl FnMut(Uuid, Uuid, SessionId, usize)) {
        if !self.shared.unflushed.replace(false) {
            return;
        }
        let sessions = self.shared.sessions.borrow();
        let mut last = None;
        for session in sessions.values() {
            if session.queued_bytes() == 0 {
                continue;
            }
            let bytes = session.flush();
            if bytes == 0 {
                continue;
            }
            drained(session.peer, session.service, session.id, bytes);
            // What several services have for one peer leaves together.
            if let Some(last) = last.replace(session)
                && last.peer != session.peer
            {
                last.send();
            }
        }
        if let Some(last) = last {
            last.send();
        }
    }

    /// Bytes queued on a session that QUIC has not taken yet; 0 if it is over.
    pub fn queued_bytes(&self, session: SessionId) -> usize {
        self.shared
            .sessions
            .borrow()
            .get(&session)
            .map_or(0, |session| session.queued_bytes())
    }

    /// Closes a session after what is queued was sent, which may take up to 1 s. If the service is still wanted, a new session
    /// follows.
    pub fn close(&self, session: SessionId, code: GoodbyeCode, reason: &str) {
        if let Some(session) = self.shared.sessions.borrow().get(&session) {
            session.close(code, reason.into());
        }
    }

    /// Tells every connected peer the fingerprints of this node: after [`Identity::prepare_rotation`].
    pub fn announce_identity(&self) {
        for peer in self.shared.peers.borrow().values() {
            peer.tell(crate::connection::hello(&self.shared.identity));
        }
    }

    /// Drops a peer that was removed from the [`PeerStore`]: its connection closes, its services are wanted no more.
    pub fn forget(&self, peer: Uuid) {
        let Some(link) = self.shared.peers.borrow_mut().remove(&peer) else {
            return;
        };
        link.wanted.borrow_mut().clear();
        link.disconnect(GoodbyeCode::Refused, "this node forgot the other one");
        link.bump();
    }

    /// After the [`PeerStore`] and the [`Identity`] were read again: peers that are gone are forgotten, connections whose certificate
    /// is pinned no more are closed, the others are told this node's certificates, and dialing starts over without a pause.
    pub fn reload(&self) {
        let peers: Vec<_> = self.shared.peers.borrow().values().cloned().collect();
        for peer in peers {
            let Some(known) = self.shared.peer_store.get(peer.id) else {
                self.forget(peer.id);
                continue;
            };
            let pinned = peer.connection.borrow().as_ref().is_none_or(|current| {
                tls::fingerprint(current.connection.peer_identity())
                    .is_some_and(|print| known.fingerprints.contains(&print))
            });
            if !pinned {
                peer.disconnect(
                    GoodbyeCode::Refused,
                    "the certificate of this connection is pinned no more",
                );
            }
            peer.bump();
        }
        self.announce_identity();
    }

    /// Every peer that a service was wanted with or that connected.
    pub fn status(&self) -> Vec<PeerStatus> {
        let status = |link: &Rc<PeerLink>| {
            let current = link.connection.borrow();
            let stats = current.as_ref().map(|current| current.connection.stats());
            PeerStatus {
                peer: link.id,
                name: self
                    .shared
                    .peer_store
                    .get(link.id)
                    .map(|peer| peer.name)
                    .unwrap_or_default(),
                dials: link.dials,
                path: current.as_ref().map(|current| current.path.clone()),
                round_trip: current.as_ref().map(|current| current.connection.rtt()),
                udp_payload: stats.map(|stats| stats.path.current_mtu),
                last_failure: link.last_failure.borrow().clone(),
            }
        };
        let mut all: Vec<_> = self.shared.peers.borrow().values().map(status).collect();
        all.sort_by_key(|status| status.peer);
        all
    }

    /// Ends the link: sessions send what they have queued (up to 1 s), then all connections close with this code. Every session has had
    /// its `StreamDown` when it returns. It can't be started again.
    pub async fn shutdown(&self, code: GoodbyeCode, reason: &str) {
        let shared = &self.shared;
        shared.down.set(true);
        let mut ended = shared.ended.subscribe();
        let peers: Vec<_> = shared.peers.borrow().values().cloned().collect();
        for peer in &peers {
            peer.wanted.borrow_mut().clear();
        }
        for session in shared.sessions.borrow().values() {
            session.close(code, reason.into());
        }
        while !shared.sessions.borrow().is_empty() {
            if ended.changed().await.is_err() {
                break;
            }
        }
        for peer in &peers {
            peer.disconnect(code, reason);
            peer.bump();
        }
        while shared.connections.get() > 0 {
            if ended.changed().await.is_err() {
                break;
            }
        }
        for endpoint in shared.endpoints() {
            endpoint.close(code_to(code), reason.as_bytes());
            // The last words are on their way; a peer that is gone does not get to hold us.
            let _ = timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
        }
    }
}

/// Passes an event that carries no payload.
pub(crate) fn report<H: LinkHandler>(handler: &H, event: LinkEvent<H::Buf>) {
    handler.on_event(event);
    handler.on_batch_end();
}
