//! Nodes in one process, over real UDP on loopback.
#![allow(dead_code)] // each test binary uses its part

use holdfast_link::*;
use holdfast_wire_format::frame::{FrameHeader, FrameKind};
use holdfast_wire_format::frame_codec::payload_crc;
use holdfast_wire_format::ids::*;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::UdpSocket;
use tokio::sync::{Notify, Semaphore};

pub type Event = LinkEvent<Vec<u8>>;

/// Far beyond anything that should happen: only a hang meets it.
pub const HANG: Duration = Duration::from_secs(30);

pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        tokio::time::timeout(HANG * 2, test)
            .await
            .expect("the test hangs");
    });
}

pub struct Handler {
    events: RefCell<VecDeque<Event>>,
    arrived: Notify,
    /// One permit is one buffer.
    pub memory: Semaphore,
    pub allocs: Cell<usize>,
    pub batches: Cell<usize>,
    pub undelivered_batch: Cell<usize>,
    pub refuse: RefCell<Option<String>>,
}

impl Handler {
    fn new() -> Rc<Self> {
        Rc::new(Handler {
            events: RefCell::default(),
            arrived: Notify::new(),
            memory: Semaphore::new(1 << 20),
            allocs: Cell::new(0),
            batches: Cell::new(0),
            undelivered_batch: Cell::new(0),
            refuse: RefCell::default(),
        })
    }
}

impl LinkHandler for Handler {
    type Buf = Vec<u8>;

    fn on_event(&self, event: Event) {
        self.undelivered_batch.set(self.undelivered_batch.get() + 1);
        self.events.borrow_mut().push_back(event);
    }

    fn on_batch_end(&self) {
        self.batches.set(self.batches.get() + 1);
        self.undelivered_batch.set(0);
        self.arrived.notify_one();
    }

    async fn alloc(&self, _service: Uuid, _header: &FrameHeader, len: usize) -> Vec<u8> {
        self.allocs.set(self.allocs.get() + 1);
        self.memory.acquire().await.unwrap().forget();
        vec![0; len]
    }

    fn accept(&self, _peer: Uuid, _service: Uuid) -> Result<(), String> {
        self.refuse.borrow().clone().map_or(Ok(()), Err)
    }
}

pub struct Node {
    pub dir: tempfile::TempDir,
    pub identity: Arc<Identity>,
    pub peers: Arc<PeerStore>,
    pub handler: Rc<Handler>,
    pub link: Option<Link>,
}

impl Node {
    pub fn new(name: &str) -> Node {
        Self::valid(name, Validity::default())
    }

    pub fn valid(name: &str, validity: Validity) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let identity = Arc::new(Identity::init_valid(dir.path(), name, validity).unwrap());
        let peers = Arc::new(PeerStore::load(dir.path()).unwrap());
        Node {
            dir,
            identity,
            peers,
            handler: Handler::new(),
            link: None,
        }
    }

    pub fn id(&self) -> Uuid {
        self.identity.id()
    }

    pub fn start(&mut self) {
        self.start_on("127.0.0.1:0");
    }

    pub fn start_on(&mut self, listen: &str) {
        let config = LinkConfig {
            listen: vec![listen.parse().unwrap()],
            identity: self.identity.clone(),
            peers: self.peers.clone(),
            tuning: Tuning::default(),
            seed: 1,
        };
        self.link = Some(Link::start(config, self.handler.clone()).unwrap());
    }

    pub fn link(&self) -> &Link {
        self.link.as_ref().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.link().local_addresses()[0]
    }

    /// As this node would introduce itself in a join.
    pub fn as_peer(&self) -> Peer {
        Peer {
            id: self.id(),
            name: self.identity.name().into(),
            fingerprints: self.identity.fingerprints(),
            addresses: self
                .link
                .as_ref()
                .map(|link| link.local_addresses())
                .unwrap_or_default(),
        }
    }

    /// Takes events until one fits.
    pub async fn wait<T>(&self, mut fits: impl FnMut(&Event) -> Option<T>) -> T {
        self.wait_event(|event| fits(&event).ok_or(())).await
    }

    pub async fn wait_event<T>(&self, mut fits: impl FnMut(Event) -> Result<T, ()>) -> T {
        let deadline = tokio::time::Instant::now() + HANG;
        let mut seen = Vec::new();
        loop {
            while let Some(event) = { self.handler.events.borrow_mut().pop_front() } {
                let mut text = format!("{event:?}");
                text.truncate(400);
                if let Ok(found) = fits(event) {
                    return found;
                }
                seen.push(text);
            }
            if tokio::time::timeout_at(deadline, self.handler.arrived.notified())
                .await
                .is_err()
            {
                panic!(
                    "node {} never saw it; it saw {seen:#?}",
                    self.identity.name()
                );
            }
        }
    }

    pub async fn up(&self, of: Uuid) -> (SessionId, String) {
        self.wait(|event| match event {
            LinkEvent::StreamUp {
                service,
                session,
                path,
                ..
            } if *service == of => Some((*session, path.clone())),
            _ => None,
        })
        .await
    }

    pub async fn down(&self, of: SessionId) -> String {
        self.wait(|event| match event {
            LinkEvent::StreamDown {
                session, reason, ..
            } if *session == of => Some(reason.clone()),
            _ => None,
        })
        .await
    }

    pub async fn frame(&self) -> (SessionId, FrameHeader, Vec<u8>) {
        self.wait_event(|event| match event {
            LinkEvent::Frame {
                session,
                header,
                payload,
                ..
            } => Ok(match payload {
                Received::None => (session, header, Vec::new()),
                Received::Control(bytes) | Received::Data(bytes) => (session, header, bytes),
            }),
            _ => Err(()),
        })
        .await
    }

    pub fn events_left(&self) -> usize {
        self.handler.events.borrow().len()
    }
}

/// Two nodes that joined, the first of which dials.
pub fn pair() -> (Node, Node) {
    let (mut a, mut b) = (Node::new("alpha"), Node::new("beta"));
    if a.id() > b.id() {
        std::mem::swap(&mut a, &mut b);
    }
    a.start();
    b.start();
    befriend(&a, &b);
    (a, b)
}

pub fn befriend(a: &Node, b: &Node) {
    a.peers.insert(b.as_peer()).unwrap();
    b.peers.insert(a.as_peer()).unwrap();
}

pub const SERVICE: Uuid = Uuid(0x1111_2222_3333_4444_5555_6666_7777_8888);
pub const OTHER: Uuid = Uuid(0x9999_2222_3333_4444_5555_6666_7777_8888);

pub async fn connect(a: &Node, b: &Node, service: Uuid) -> (SessionId, SessionId) {
    b.link().connect(a.id(), service).unwrap();
    a.link().connect(b.id(), service).unwrap();
    (a.up(service).await.0, b.up(service).await.0)
}

pub fn header(kind: FrameKind, service: Uuid, position: u64, payload: &[u8]) -> FrameHeader {
    FrameHeader {
        payload_length: payload.len() as u32,
        payload_crc: payload_crc(payload),
        generation: GenerationId(3),
        incarnation: Incarnation(4),
        position,
        offset: 4096 * position,
        length: payload.len() as u32,
        ..FrameHeader::new(kind, service)
    }
}

pub fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A UDP path that can be cut.
pub struct Relay {
    pub address: SocketAddr,
    pub cut: Rc<Cell<bool>>,
    pub carried: Rc<Cell<u64>>,
}

impl Relay {
    pub async fn new(listen: &str, target: SocketAddr) -> Relay {
        let front = UdpSocket::bind(listen).await.unwrap();
        let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(target).await.unwrap();
        let address = front.local_addr().unwrap();
        let (cut, carried) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
        let (is_cut, count) = (cut.clone(), carried.clone());
        tokio::task::spawn_local(async move {
            let mut caller = None;
            let (mut there, mut back_again) = (vec![0; 65536], vec![0; 65536]);
            loop {
                tokio::select! {
                    got = front.recv_from(&mut there) => if let Ok((length, from)) = got {
                        caller = Some(from);
                        if !is_cut.get() {
                            count.set(count.get() + 1);
                            let _ = back.send(&there[..length]).await;
                        }
                    },
                    got = back.recv(&mut back_again) => match (got, caller) {
                        (Ok(length), Some(caller)) if !is_cut.get() => {
                            let _ = front.send_to(&back_again[..length], caller).await;
                        }
                        _ => {}
                    },
                }
            }
        });
        Relay {
            address,
            cut,
            carried,
        }
    }
}

pub fn long_ago() -> Validity {
    let day = Duration::from_secs(24 * 3600);
    let now = SystemTime::now();
    Validity {
        not_before: now - 20 * day,
        not_after: now - day,
    }
}

pub fn mode(path: &FilePath) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}
