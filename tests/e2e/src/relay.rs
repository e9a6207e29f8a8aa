//! A bad network between the two nodes of a cluster: a relay of UDP packets that loses, delays, doubles, damages and reorders them
//! by a seed, and cuts a direction when told. It counts what it did, so that a test can show that it happened.

use crate::random::Random;
use std::collections::{BinaryHeap, HashMap};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Packets that wait to be sent, at most; what comes on top is lost, as in any router.
const QUEUE: usize = 16 << 10;
/// How often a receiver looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What happens to packets, each on its own, in both directions. Chances are of 1000.
#[derive(Clone, Copy, Default, Debug)]
pub struct Weather {
    pub lost: u64,
    pub doubled: u64,
    /// One byte is changed.
    pub damaged: u64,
    /// Held back for a random time of up to `latest`, so that others overtake it.
    pub late: u64,
    pub latest: Duration,
    /// How long every packet takes.
    pub delay: Duration,
}

impl Weather {
    /// Some, by chance: up to 3 % are lost, and a packet takes up to 6 ms. With more, little of what an application writes gets
    /// through.
    pub fn random(random: &mut Random) -> Weather {
        Weather {
            lost: random.below(30),
            doubled: random.below(50),
            damaged: random.below(5),
            late: random.below(100),
            latest: Duration::from_micros(1 + random.below(5_000)),
            delay: Duration::from_micros(random.below(1_000)),
        }
    }
}

/// Packets, since the beginning.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    pub arrived: u64,
    pub sent: u64,
    pub lost: u64,
    pub doubled: u64,
    pub damaged: u64,
    pub late: u64,
    /// Sent after one that arrived later.
    pub overtaken: u64,
    /// Lost because their direction was cut.
    pub cut: u64,
    /// Lost because too many waited.
    pub crowded: u64,
}

struct Packet {
    due: Instant,
    /// In the order of arrival.
    number: u64,
    /// The node it goes to.
    toward: usize,
    from: Arc<UdpSocket>,
    to: SocketAddr,
    bytes: Vec<u8>,
}

impl Ord for Packet {
    /// The one that is due first is the greatest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Packet {}

struct State {
    random: Random,
    weather: Weather,
    /// Toward each node.
    cut: [bool; 2],
    waiting: BinaryHeap<Packet>,
    number: u64,
    /// The latest packet sent toward each node.
    newest: [u64; 2],
    counts: Counts,
    /// The relay's socket toward a node, by that node and who talks to it.
    flows: HashMap<(usize, SocketAddr), Arc<UdpSocket>>,
    receivers: Vec<JoinHandle<()>>,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    /// Where the nodes are.
    nodes: [SocketAddr; 2],
    /// Where each node seems to be for the other one.
    fronts: [Arc<UdpSocket>; 2],
}

/// The relay; it ends when dropped.
pub struct Relay {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

fn socket(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    // Packets that its own socket has no room for would be lost without being counted. Only root gets past the system's limit.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20);
    socket
        .set_read_timeout(Some(LOOK_EVERY))
        .expect("a time-out");
    socket
}

impl Relay {
    /// Stands between two nodes at `nodes`: who sends to `fronts[n]` reaches node n, and gets its answers from there. The weather
    /// is fair at first.
    #[track_caller]
    pub fn start(nodes: [Ipv4Addr; 2], fronts: [Ipv4Addr; 2], port: u16, seed: u64) -> Relay {
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                random: Random::new(seed),
                weather: Weather::default(),
                cut: [false; 2],
                waiting: BinaryHeap::new(),
                number: 0,
                newest: [0; 2],
                counts: Counts::default(),
                flows: HashMap::new(),
                receivers: Vec::new(),
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            nodes: nodes.map(|node| (node, port).into()),
            fronts: fronts.map(|front| Arc::new(socket((front, port).into()))),
        });
        let mut threads = Vec::new();
        for node in 0..2 {
            let inner = inner.clone();
            threads.push(std::thread::spawn(move || inner.front(node)));
        }
        let sender = inner.clone();
        threads.push(std::thread::spawn(move || sender.send()));
        Relay { inner, threads }
    }

    /// The weather from now on.
    pub fn weather(&self, weather: Weather) {
        self.inner.lock().weather = weather;
    }

    /// Whether packets toward each of the nodes are cut off, from now on.
    pub fn cut(&self, toward: [bool; 2]) {
        self.inner.lock().cut = toward;
    }

    pub fn counts(&self) -> Counts {
        self.inner.lock().counts
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Relaxed);
        self.inner.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Nobody starts new ones any more.
        let receivers = std::mem::take(&mut self.inner.lock().receivers);
        for thread in receivers {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes packets from a socket until the relay ends.
    fn receive(&self, socket: &UdpSocket, mut take: impl FnMut(&[u8], SocketAddr)) {
        let mut buffer = vec![0; 1 << 16];
        while !self.stop.load(Ordering::Relaxed) {
            // Besides the time-out: a node that is not there, which the kernel tells whoever sent to it.
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                take(&buffer[..length], from);
            }
        }
    }

    /// Packets for one node, from whichever socket of the other one.
    fn front(self: &Arc<Self>, node: usize) {
        let own = self.fronts[node].clone();
        self.receive(&own, |bytes, from| {
            let mut state = self.lock();
            let flow = state.flows.get(&(node, from)).cloned();
            let flow = flow.unwrap_or_else(|| {
                let flow = Arc::new(socket((Ipv4Addr::LOCALHOST, 0).into()));
                state.flows.insert((node, from), flow.clone());
                let (inner, answers) = (self.clone(), flow.clone());
                let receiver = std::thread::spawn(move || {
                    inner.receive(&answers, |bytes, _| {
                        let front = inner.fronts[node].clone();
                        let mut state = inner.lock();
                        inner.take(&mut state, 1 - node, front, from, bytes);
                    });
                });
                state.receivers.push(receiver);
                flow
            });
            self.take(&mut state, node, flow, self.nodes[node], bytes);
        });
    }

    /// One packet arrived; the weather decides what becomes of it.
    fn take(
        &self,
        state: &mut State,
        toward: usize,
        from: Arc<UdpSocket>,
        to: SocketAddr,
        bytes: &[u8],
    ) {
        let weather = state.weather;
        let mut chance = |of: u64| of > 0 && state.random.below(1000) < of;
        let (lost, doubled, damaged) = (
            chance(weather.lost),
            chance(weather.doubled),
            chance(weather.damaged),
        );
        state.counts.arrived += 1;
        state.number += 1;
        if lost {
            state.counts.lost += 1;
            return;
        }
        let mut bytes = bytes.to_vec();
        if damaged && !bytes.is_empty() {
            let at = state.random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << state.random.below(8);
            state.counts.damaged += 1;
        }
        state.counts.doubled += u64::from(doubled);
        for _ in 0..=u64::from(doubled) {
            let mut due = Instant::now() + weather.delay;
            if weather.late > 0 && state.random.below(1000) < weather.late {
                state.counts.late += 1;
                let most = 1 + weather.latest.as_micros() as u64;
                due += Duration::from_micros(state.random.below(most));
            }
            if state.waiting.len() >= QUEUE {
                state.counts.crowded += 1;
                continue;
            }
            let number = state.number;
            state.waiting.push(Packet {
                due,
                number,
                toward,
                from: from.clone(),
                to,
                bytes: bytes.clone(),
            });
        }
        self.changed.notify_one();
    }

    /// Sends what is due.
    fn send(&self) {
        let mut state = self.lock();
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let wait = match state.waiting.peek() {
                Some(packet) if packet.due <= now => {
                    let packet = state.waiting.pop().expect("just seen");
                    if state.cut[packet.toward] {
                        state.counts.cut += 1;
                        continue;
                    }
                    let newest = &mut state.newest[packet.toward];
                    let overtaken = packet.number < *newest;
                    *newest = packet.number.max(*newest);
                    state.counts.overtaken += u64::from(overtaken);
                    state.counts.sent += 1;
                    drop(state);
                    // Nobody may be there at the moment.
                    let _ = packet.from.send_to(&packet.bytes, packet.to);
                    state = self.lock();
                    continue;
                }
                Some(packet) => packet.due - now,
                None => LOOK_EVERY,
            };
            state = self
                .changed
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKETS: u16 = 400;

    fn receive(socket: &UdpSocket) -> Vec<(Vec<u8>, SocketAddr)> {
        let mut found = Vec::new();
        let mut buffer = [0; 100];
        // Silence for the socket's time-out ends it: far longer than any packet takes here.
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            found.push((buffer[..length].to_vec(), from));
        }
        found
    }

    /// Two nodes at a relay, the first of which talks to the second one's front.
    fn talk(weather: Weather, cut: [bool; 2]) -> (Counts, Vec<Vec<u8>>, Vec<Vec<u8>>) {
        // Addresses of this process's own.
        let place = std::process::id();
        let address = |n: u32| Ipv4Addr::new(127, 230 + n as u8, (place >> 8) as u8, place as u8);
        let port = 20_000 + (std::thread::current().name().map_or(0, str::len) as u16);
        let [dialer, node] = [0, 1].map(|n| socket((address(n), port).into()));
        let relay = Relay::start([address(0), address(1)], [address(2), address(3)], port, 1);
        relay.weather(weather);
        relay.cut(cut);
        for number in 0..PACKETS {
            dialer
                .send_to(&number.to_be_bytes(), (address(3), port))
                .unwrap();
        }
        let there = receive(&node);
        for (bytes, from) in &there {
            node.send_to(bytes, from).unwrap();
        }
        let back = receive(&dialer);
        assert!(
            back.iter()
                .all(|(_, from)| *from == (address(3), port).into())
        );
        let bytes = |packets: Vec<(Vec<u8>, SocketAddr)>| {
            packets.into_iter().map(|(bytes, _)| bytes).collect()
        };
        (relay.counts(), bytes(there), bytes(back))
    }

    #[test]
    fn in_fair_weather_everything_comes_in_order() {
        let (counts, there, back) = talk(Weather::default(), [false; 2]);
        let sent: Vec<Vec<u8>> = (0..PACKETS).map(|n| n.to_be_bytes().to_vec()).collect();
        assert_eq!((&there, &back), (&sent, &sent));
        let all = 2 * u64::from(PACKETS);
        assert_eq!((counts.arrived, counts.sent), (all, all));
    }

    #[test]
    fn what_it_counts_is_what_it_does() {
        let weather = Weather {
            lost: 100,
            doubled: 100,
            damaged: 100,
            late: 300,
            latest: Duration::from_millis(20),
            delay: Duration::from_millis(1),
        };
        let (counts, there, back) = talk(weather, [false; 2]);
        assert_eq!(counts.sent, (there.len() + back.len()) as u64);
        assert_eq!(counts.arrived, u64::from(PACKETS) + there.len() as u64);
        assert_eq!(counts.sent, counts.arrived - counts.lost + counts.doubled);
        for count in [counts.lost, counts.doubled, counts.damaged, counts.late] {
            assert!(count > 0, "{counts:?}");
        }
        assert!(counts.overtaken > 0 && !there.is_sorted(), "{counts:?}");
        assert!(
            there
                .iter()
                .any(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]) >= PACKETS)
        );
    }

    #[test]
    fn each_direction_is_cut_alone() {
        let (counts, there, back) = talk(Weather::default(), [true, false]);
        assert_eq!((there.len(), back.len()), (PACKETS.into(), 0));
        assert_eq!(counts.cut, u64::from(PACKETS));
        let (counts, there, _) = talk(Weather::default(), [false, true]);
        assert_eq!(there.len(), 0);
        assert_eq!(counts.cut, u64::from(PACKETS));
    }
}
