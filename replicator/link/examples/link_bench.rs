//! What the link itself costs: two nodes, a thread each, over loopback.
//!
//! `cargo run --release -p holdfast-link --example link_bench -- [udp payload] [local|shared] [seconds]`
//! Prints bulk MiB/s (1 MiB frames), 4 KiB writes with an acknowledgement each, 32 in flight, in thousands per second,
//! and the median of one in flight in µs; for the first two also the processor time of both nodes together.

use bytes::Bytes;
use holdfast_link::*;
use holdfast_wire_format::frame::{FrameHeader, FrameKind, GoodbyeCode};
use holdfast_wire_format::frame_codec::payload_crc;
use holdfast_wire_format::ids::*;
use std::cell::{Cell, OnceCell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

const SERVICE: Uuid = Uuid(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
/// Bytes the sender keeps queued in the bulk test.
const BULK_QUEUE: usize = 4 << 20;

fn header(kind: FrameKind, position: u64, payload: &[u8], crc: u32) -> FrameHeader {
    FrameHeader {
        payload_length: payload.len() as u32,
        payload_crc: crc,
        generation: GenerationId(1),
        incarnation: Incarnation(1),
        position,
        length: payload.len() as u32,
        ..FrameHeader::new(kind, SERVICE)
    }
}

/// The receiving copy: drops data, acknowledges small writes at the end of each batch.
#[derive(Default)]
struct Target {
    link: OnceCell<Link>,
    session: Cell<SessionId>,
    /// Bulk frames are acknowledged by their count only.
    due: RefCell<Vec<u64>>,
    spare: Rc<RefCell<Vec<Box<[u8]>>>>,
}

/// Reused, as the replicator's are: the benchmark should not measure page faults.
struct Pooled {
    bytes: Option<Box<[u8]>>,
    home: Rc<RefCell<Vec<Box<[u8]>>>>,
}

impl AsMut<[u8]> for Pooled {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes.as_mut().expect("taken only by drop")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.home.borrow_mut().extend(self.bytes.take());
    }
}

impl LinkHandler for Target {
    type Buf = Pooled;

    fn on_event(&self, event: LinkEvent<Pooled>) {
        match event {
            LinkEvent::StreamUp { session, .. } => self.session.set(session),
            LinkEvent::Frame { header, .. } => self.due.borrow_mut().push(header.position),
            _ => {}
        }
    }

    fn on_batch_end(&self) {
        for position in self.due.borrow_mut().drain(..) {
            let ack = header(FrameKind::WriteAck, position, &[], 0);
            let _ = self
                .link
                .get()
                .expect("started")
                .send(self.session.get(), &ack, Payload::None);
        }
    }

    async fn alloc(&self, _service: Uuid, _header: &FrameHeader, _len: usize) -> Pooled {
        let spare = self.spare.borrow_mut().pop();
        let bytes = spare.unwrap_or_else(|| vec![0; 1 << 20].into_boxed_slice());
        Pooled {
            bytes: Some(bytes),
            home: self.spare.clone(),
        }
    }
}

#[derive(Default)]
struct Source {
    session: Cell<SessionId>,
    acked: Cell<u64>,
    progress: Notify,
}

impl LinkHandler for Source {
    type Buf = Vec<u8>;

    fn on_event(&self, event: LinkEvent<Vec<u8>>) {
        match event {
            LinkEvent::StreamUp { session, .. } => self.session.set(session),
            LinkEvent::StreamDown {
                code: Some(GoodbyeCode::Shutdown),
                ..
            } => {}
            LinkEvent::StreamDown { reason, .. } => panic!("{reason}"),
            LinkEvent::Frame { .. } => self.acked.set(self.acked.get() + 1),
            _ => {}
        }
    }

    fn on_batch_end(&self) {
        self.progress.notify_one();
    }

    async fn alloc(&self, _service: Uuid, _header: &FrameHeader, len: usize) -> Vec<u8> {
        vec![0; len]
    }
}

struct Sender {
    link: Link,
    source: Rc<Source>,
    shared: bool,
    data: Bytes,
    crc: u32,
    position: Cell<u64>,
}

/// Stands for the replicator's buffer: shared by reference counting, not `Send`.
struct LocalBuffer(Rc<Bytes>);

impl AsRef<[u8]> for LocalBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Sender {
    fn write(&self) {
        self.position.set(self.position.get() + 1);
        // The CRC is part of every write's cost.
        let crc = payload_crc(&self.data);
        assert_eq!(crc, self.crc);
        let header = header(FrameKind::Write, self.position.get(), &self.data, crc);
        let payload = if self.shared {
            Payload::Shared(self.data.clone())
        } else {
            Payload::Local(Box::new(LocalBuffer(Rc::new(self.data.clone()))))
        };
        self.link
            .send(self.source.session.get(), &header, payload)
            .expect("the session is up");
    }

    async fn bulk(&self, time: Duration) -> f64 {
        let (since, before) = (Instant::now(), self.source.acked.get());
        while since.elapsed() < time {
            while self.link.queued_bytes(self.source.session.get()) < BULK_QUEUE {
                self.write();
            }
            self.source.progress.notified().await;
        }
        let frames = self.source.acked.get() - before;
        let elapsed = since.elapsed();
        self.settle().await;
        frames as f64 * self.data.len() as f64 / (1 << 20) as f64 / elapsed.as_secs_f64()
    }

    async fn in_flight(&self, depth: u64, time: Duration, mut took: impl FnMut(Duration)) -> f64 {
        let (since, before) = (Instant::now(), self.source.acked.get());
        let mut sent = Instant::now();
        while since.elapsed() < time {
            while self.position.get() - self.source.acked.get() < depth {
                sent = Instant::now();
                self.write();
            }
            let acked = self.source.acked.get();
            while self.source.acked.get() == acked {
                self.source.progress.notified().await;
            }
            took(sent.elapsed());
        }
        let rate = (self.source.acked.get() - before) as f64 / since.elapsed().as_secs_f64();
        self.settle().await;
        rate / 1000.0
    }

    async fn settle(&self) {
        while self.source.acked.get() < self.position.get() {
            self.source.progress.notified().await;
        }
    }
}

/// Processor time of both nodes so far, in seconds: unlike rates, hardly disturbed by what else the machine does.
fn processor() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

fn on_thread<T>(body: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, body)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let udp_payload = arguments
        .next()
        .map_or(8972, |text| text.parse().expect("a UDP payload in bytes"));
    let shared = arguments.next().is_some_and(|text| text == "shared");
    let time = Duration::from_secs(
        arguments
            .next()
            .map_or(3, |text| text.parse().expect("seconds")),
    );
    let tuning = Tuning {
        udp_payload,
        ..Tuning::default()
    };
    let (dir_a, dir_b) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("a directory"),
    );
    let mut dirs = [dir_a.path(), dir_b.path()];
    let mut nodes = [("a", dirs[0]), ("b", dirs[1])]
        .map(|(name, dir)| Arc::new(Identity::init(dir, name).expect("an identity")));
    if nodes[0].id() > nodes[1].id() {
        nodes.swap(0, 1);
        dirs.swap(0, 1);
    }
    let stores = dirs.map(|dir| Arc::new(PeerStore::load(dir).expect("no peers")));
    let [dialer, acceptor] = nodes;
    let peer = |identity: &Identity, addresses| Peer {
        id: identity.id(),
        name: identity.name().into(),
        fingerprints: identity.fingerprints(),
        addresses,
    };
    let config = |identity: &Arc<Identity>, peers: &Arc<PeerStore>| LinkConfig {
        listen: vec!["127.0.0.1:0".parse().expect("an address")],
        identity: identity.clone(),
        peers: peers.clone(),
        tuning,
        seed: 1,
    };
    stores[1].insert(peer(&dialer, vec![])).expect("a peer");
    let (tell, hear) = std::sync::mpsc::channel();
    let (ready, store) = (config(&acceptor, &stores[1]), stores[0].clone());
    let dialer_id = dialer.id();
    let (over, mut is_over) = tokio::sync::oneshot::channel::<()>();
    let target = std::thread::spawn(move || {
        on_thread(async {
            let target = Rc::new(Target::default());
            let link = Link::start(ready, target.clone()).expect("the link starts");
            let _ = target.link.set(link.clone());
            link.connect(dialer_id, SERVICE).expect("a peer");
            tell.send(link.local_addresses())
                .expect("the main thread listens");
            let _ = (&mut is_over).await;
        });
    });
    store
        .insert(peer(&acceptor, hear.recv().expect("an address")))
        .expect("a peer");
    on_thread(async {
        let source = Rc::new(Source::default());
        let link =
            Link::start(config(&dialer, &stores[0]), source.clone()).expect("the link starts");
        link.connect(acceptor.id(), SERVICE).expect("a peer");
        while source.session.get() == 0 {
            source.progress.notified().await;
        }
        let sender = |length: usize, position| {
            let data = Bytes::from(vec![0x5a; length]);
            let crc = payload_crc(&data);
            Sender {
                link: link.clone(),
                source: source.clone(),
                shared,
                data,
                crc,
                position: Cell::new(position),
            }
        };
        let large = sender(1 << 20, 0);
        large.bulk(Duration::from_millis(500)).await;
        let (used, sent) = (processor(), large.position.get());
        let bulk = large.bulk(time).await;
        let bulk_cost =
            (processor() - used) * 1000.0 * 1024.0 / (large.position.get() - sent) as f64;
        let small = sender(4096, large.position.get());
        let (used, sent) = (processor(), small.position.get());
        let rate = small.in_flight(32, time, |_| ()).await;
        let write_cost = (processor() - used) * 1e6 / (small.position.get() - sent) as f64;
        let mut times = Vec::new();
        small.in_flight(1, time, |took| times.push(took)).await;
        times.sort();
        let status = &link.status()[0];
        println!(
            "UDP payload {} found, {}: bulk {bulk:.0} MiB/s ({bulk_cost:.0} ms of processor per GiB, both nodes); \
             4 KiB + ack, 32 in flight {rate:.0} kops/s ({write_cost:.1} us of processor each); 1 in flight p50 {} us",
            status.udp_payload.unwrap_or_default(),
            if shared {
                "shared buffers"
            } else {
                "local buffers"
            },
            times[times.len() / 2].as_micros()
        );
        link.shutdown(GoodbyeCode::Shutdown, "done").await;
    });
    let _ = over.send(());
    target.join().expect("the target ends");
}
