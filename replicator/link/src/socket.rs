//! UDP sockets under QUIC: large buffers, segmented sends that stay within what one send may carry, few wake-ups.

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::io::Errno;
use rustix::net::{SendFlags, sendto};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes of one segmented send. The kernel's limit is 65,507 for IPv4; a send above it fails with EMSGSIZE, which
/// QUIC treats as a lost packet, again and again.
const MAX_SEND: usize = 65_500;
/// Most segments the sender ever makes in one send.
const MAX_SEGMENTS: usize = 10;
/// Most bytes of one receive: the kernel joins packets up to what one packet can hold.
const MAX_RECEIVE: usize = 65_507;
/// Bytes that are taken from the socket at once, about. What is taken is decrypted, parsed and written before more is taken: this
/// much is in the processor's cache all the while, and the sender gets room for more in small steps. With 32 of the largest
/// packets, a whole window, the two ends work by turns, and a full sync takes a fifth more processor time.
const RECEIVE_AT_ONCE: usize = 512 << 10;
/// Sends without a segment of that size after which it does not count any more.
const FORGET_SEGMENT_AFTER: u32 = 64;
/// Packets, or rows of them that the kernel joined, that are received at once while no more than that come: room for each costs time.
const FEW: usize = 2;
/// Socket buffers in bytes, each direction: what a 4 MiB connection window can put in flight.
const SOCKET_BUFFER: usize = 4 << 20;

/// Binds a UDP socket with large buffers, not yet in any runtime.
pub(crate) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        // `[::]` serves both families.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // The FORCE options pass the system's limit but need CAP_NET_ADMIN; without it the limit applies.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    }
    if rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER).is_err() {
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
    }
    // The kernel reports twice what was asked for.
    let (recv, send) = (
        socket.recv_buffer_size()? / 2,
        socket.send_buffer_size()? / 2,
    );
    if recv < SOCKET_BUFFER || send < SOCKET_BUFFER {
        tracing::info!(
            recv,
            send,
            wanted = SOCKET_BUFFER,
            "UDP socket buffers are smaller than wanted: bulk transfers may be slower. Raise net.core.rmem_max and \
             net.core.wmem_max, or give this process CAP_NET_ADMIN"
        );
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Largest UDP payload that the interface toward `remote` carries in one piece. No packet is sent.
///
/// # Errors
/// There is no route.
pub(crate) fn route_payload(local: Option<IpAddr>, remote: SocketAddr) -> io::Result<u16> {
    // A caller by IPv4 at a socket for both families is seen as IPv6.
    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((local.unwrap_or(any), 0))?;
    socket.connect(remote)?;
    let (mtu, headers) = match remote {
        SocketAddr::V4(_) => (rustix::net::sockopt::ip_mtu(&socket)?, 20 + 8),
        SocketAddr::V6(_) => (rustix::net::sockopt::ipv6_mtu(&socket)?, 40 + 8),
    };
    Ok(u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX))
}

/// Hands the socket to the runtime of this thread. `payload`: most bytes of one packet that the endpoint takes.
pub(crate) fn wrap(socket: UdpSocket, payload: u16) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let options = UdpSocketState::new((&socket).into())?;
    let local = socket.local_addr()?;
    if !local.ip().is_unspecified() {
        // Whoever listens on one address need not be told with each packet which one it came to, nor say which one to send from.
        without_destinations(&socket, local)?;
    }
    Ok(Arc::new(Socket {
        marks: marked(&socket, local),
        receive_segments: receive_segments_for(payload.into()).min(options.gro_segments()),
        options,
        // Readable alone: the network takes every packet off the socket's buffer, and each would wake this thread once more to say
        // that there is room again.
        io: watch(socket, Interest::READABLE)?,
        full: AtomicBool::new(false),
        largest_segment: AtomicUsize::new(0),
        smaller: AtomicU32::new(0),
        receive_at_once: AtomicUsize::new(usize::MAX),
        many: AtomicBool::new(false),
    }))
}

/// Packets come without the address they were sent to.
fn without_destinations(socket: &UdpSocket, local: SocketAddr) -> io::Result<()> {
    let (level, name) = match local {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    };
    let off: libc::c_int = 0;
    // SAFETY: the value is an int that lives through the call, and its size is given.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
    match failed {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has every packet say that this sender understands marks of congestion, so that it need not be said with each. False: it must.
fn marked(socket: &UdpSocket, local: SocketAddr) -> bool {
    let ect0 = EcnCodepoint::Ect0 as u8;
    let v4 = rustix::net::sockopt::set_ip_tos(socket, ect0).is_ok();
    v4 && (local.is_ipv4() || rustix::net::sockopt::set_ipv6_tclass(socket, ect0.into()).is_ok())
}

/// Watches a socket in the runtime of this thread.
fn watch(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    // SAFETY: the socket owns its descriptor, which stays open and the same until the `AsyncFd` around it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

/// The runtime of the thread that owns the link, as QUIC's tasks see it: they run beside the link's own, in one queue. In a queue
/// of their own every hand-over between the two would look at all sockets in between.
#[derive(Debug)]
pub(crate) struct OneThread;

impl Runtime for OneThread {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::task::spawn_local(crate::drive::stand_in(future));
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// Keeps segmented sends below [`MAX_SEND`], whatever packet size was discovered, and the receive buffers of QUIC, which
/// are segments times packet size, at what one receive can bring; and wakes nobody without need.
#[derive(Debug)]
struct Socket {
    options: UdpSocketState,
    /// What is sent without a word about marks of congestion says that they are understood.
    marks: bool,
    receive_segments: usize,
    io: AsyncFd<UdpSocket>,
    /// The last send found no room.
    full: AtomicBool,
    /// Largest segment of the last sends.
    largest_segment: AtomicUsize,
    /// Sends since one had a segment of that size.
    smaller: AtomicU32,
    /// Packets (joined by the kernel, where it can) that make about [`RECEIVE_AT_ONCE`], if they are like the last ones.
    receive_at_once: AtomicUsize,
    /// The last receive brought as many packets as it had room for.
    many: AtomicBool,
}

fn segments_for(segment: usize) -> usize {
    (MAX_SEND / segment.max(1)).clamp(1, MAX_SEGMENTS)
}

/// Packets of the largest size whose room holds any receive: with 64 of 8972 bytes, which is what QUIC asks the socket
/// for, the buffers of one endpoint take 18 MiB.
fn receive_segments_for(payload: usize) -> usize {
    MAX_RECEIVE.div_ceil(payload.max(1))
}

impl Socket {
    /// QUIC asks for the most segments of a send without saying to whom. Peers on one socket may have packets of different
    /// size (one on this machine has by far the largest), so what a while ago was sent to one does not limit all for ever.
    fn note_segment(&self, segment: usize) {
        let smaller = self.smaller.load(Ordering::Relaxed) + 1;
        if segment >= self.largest_segment.load(Ordering::Relaxed)
            || smaller >= FORGET_SEGMENT_AFTER
        {
            self.largest_segment.store(segment, Ordering::Relaxed);
            self.smaller.store(0, Ordering::Relaxed);
        } else {
            self.smaller.store(smaller, Ordering::Relaxed);
        }
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = if self.is_plain(transmit) {
            self.send_plain(transmit)
        } else {
            self.options.send(self.io.get_ref().into(), transmit)
        };
        if let Err(error) = &sent
            && error.kind() == io::ErrorKind::WouldBlock
        {
            self.full.store(true, Ordering::Relaxed);
        }
        sent
    }
}

impl Socket {
    /// There is nothing to say about the packet but where it goes.
    fn is_plain(&self, transmit: &Transmit<'_>) -> bool {
        self.marks
            && transmit.ecn == Some(EcnCodepoint::Ect0)
            && transmit.segment_size.is_none()
            && transmit.src_ip.is_none()
    }

    fn send_plain(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = sendto(
            self.io.get_ref(),
            transmit.contents,
            SendFlags::empty(),
            &transmit.destination,
        );
        match sent {
            Ok(_) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::WouldBlock.into()),
            // A packet of a size that is only tried.
            Err(Errno::MSGSIZE) => Ok(()),
            // Says in the log what is wrong.
            Err(_) => self.options.send(self.io.get_ref().into(), transmit),
        }
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room {
            socket: self,
            waiting: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        self.note_segment(segment);
        if transmit.contents.len() <= MAX_SEND.max(segment) {
            return self.send(transmit);
        }
        // Only the first sends after a larger packet size was found: from then on the limit below holds. If a later
        // part would block, the whole is sent again, and the receiver drops the repetition as QUIC always does.
        for part in transmit.contents.chunks(segments_for(segment) * segment) {
            let segment_size = (part.len() > segment).then_some(segment);
            self.send(&Transmit {
                contents: part,
                segment_size,
                ..transmit.clone()
            })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let most = self.receive_at_once.load(Ordering::Relaxed);
        let most = most.min(bufs.len()).min(meta.len());
        let (bufs, meta) = (&mut bufs[..most], &mut meta[..most]);
        loop {
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            let mut room = most;
            if !self.many.load(Ordering::Relaxed) {
                room = room.min(FEW);
            }
            match self.options.recv(
                self.io.get_ref().into(),
                &mut bufs[..room],
                &mut meta[..room],
            ) {
                Ok(count) => {
                    self.many.store(count == room, Ordering::Relaxed);
                    // It took all there was. What comes from now on is a new edge, so asking again would tell nothing.
                    if count < room {
                        guard.clear_ready();
                    }
                    let bytes: usize = meta[..count].iter().map(|meta| meta.len).sum();
                    let next = RECEIVE_AT_ONCE * count / bytes.max(1);
                    self.receive_at_once.store(next.max(1), Ordering::Relaxed);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        segments_for(self.largest_segment.load(Ordering::Relaxed))
            .min(self.options.max_gso_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.receive_segments
    }

    fn may_fragment(&self) -> bool {
        self.options.may_fragment()
    }
}

/// Waits for room in the socket's buffer, after a send that found none.
#[derive(Debug)]
struct Room {
    socket: Arc<Socket>,
    /// A second descriptor of the socket, watched only while somebody waits.
    waiting: Option<AsyncFd<UdpSocket>>,
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.socket.full.load(Ordering::Relaxed) {
            self.waiting = None;
            return Poll::Ready(Ok(()));
        }
        let waiting = match self.waiting.take() {
            Some(waiting) => waiting,
            None => {
                let second = self.socket.io.get_ref().try_clone()?;
                watch(second, Interest::WRITABLE)?
            }
        };
        if waiting.poll_write_ready(cx)?.is_pending() {
            self.waiting = Some(waiting);
            return Poll::Pending;
        }
        self.socket.full.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Arc<dyn AsyncUdpSocket>, UdpSocket) {
        let ours = bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let other = UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        (wrap(ours, 1472).unwrap(), other)
    }

    /// Packets that come one by one, together, and between a look that found the socket empty and the next: none is left lying.
    #[tokio::test(flavor = "current_thread")]
    async fn every_packet_wakes_the_receiver() {
        let (ours, other) = pair();
        let to = ours.local_addr().unwrap();
        let mut expected = 0;
        for burst in [1, 3, 1, 40, 2, 33, 32, 1] {
            for _ in 0..burst {
                other.send_to(&[7; 100], to).unwrap();
            }
            expected = burst;
            while expected > 0 {
                let mut memory = vec![[0; 2048]; 32];
                let mut bufs: Vec<_> = memory.iter_mut().map(|m| IoSliceMut::new(m)).collect();
                let mut meta = [RecvMeta::default(); 32];
                let got = std::future::poll_fn(|cx| ours.poll_recv(cx, &mut bufs, &mut meta));
                let got = tokio::time::timeout(std::time::Duration::from_secs(5), got).await;
                let got = got.expect("packets wait in the socket").unwrap();
                // Segments that the kernel joined count each.
                expected -= meta[..got].iter().map(|m| m.len / 100).sum::<usize>();
            }
        }
        assert_eq!(expected, 0);
    }

    /// After large packets fewer are taken at once, after small ones more again, and none is left lying.
    #[tokio::test(flavor = "current_thread")]
    async fn what_is_taken_at_once_is_bounded_in_bytes() {
        let other = UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let ours = bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let ours = wrap(ours, u16::MAX).unwrap();
        let to = ours.local_addr().unwrap();
        let mut memory = vec![vec![0; 65_536]; 32];
        let mut receive = async |burst: usize, bytes: usize| {
            for _ in 0..burst {
                other.send_to(&vec![7; bytes], to).unwrap();
            }
            let (mut left, mut most) = (burst, Vec::new());
            while left > 0 {
                let mut bufs: Vec<_> = memory.iter_mut().map(|m| IoSliceMut::new(m)).collect();
                let mut meta = [RecvMeta::default(); 32];
                let got = std::future::poll_fn(|cx| ours.poll_recv(cx, &mut bufs, &mut meta));
                let got = tokio::time::timeout(std::time::Duration::from_secs(5), got).await;
                let got = got.expect("packets wait in the socket").unwrap();
                most.push(got);
                left -= meta[..got].iter().map(|m| m.len / bytes).sum::<usize>();
            }
            most
        };
        // Without the right to large socket buffers only a few of these fit at a time.
        for _ in 0..3 {
            receive(2, 60_000).await;
        }
        let large = receive(20, 60_000).await;
        assert!(large.iter().all(|got| *got <= 8), "{large:?}");
        receive(1, 100).await;
        let small = receive(20, 100).await;
        assert!(small.len() < 10, "{small:?}");
    }

    /// One packet as QUIC gets it.
    async fn received(by: &Arc<dyn AsyncUdpSocket>) -> (Vec<u8>, RecvMeta) {
        let mut memory = vec![[0; 2048]; 4];
        let mut bufs: Vec<_> = memory.iter_mut().map(|m| IoSliceMut::new(m)).collect();
        let mut meta = [RecvMeta::default(); 4];
        let got = std::future::poll_fn(|cx| by.poll_recv(cx, &mut bufs, &mut meta));
        let got = tokio::time::timeout(std::time::Duration::from_secs(5), got).await;
        assert_eq!(got.expect("a packet waits in the socket").unwrap(), 1);
        (memory[0][..meta[0].len].to_vec(), meta[0])
    }

    /// Marks of congestion are announced as QUIC says, on the short way and on the long one; where a packet was sent to is told only to whom
    /// it may not know.
    #[tokio::test(flavor = "current_thread")]
    async fn marks_and_destinations_are_as_quic_expects() {
        use std::net::Ipv4Addr;
        let socket = |ip: IpAddr| wrap(bind((ip, 0).into()).unwrap(), 1472).unwrap();
        let ours = socket(Ipv4Addr::LOCALHOST.into());
        let one = socket(Ipv4Addr::LOCALHOST.into());
        let any = socket(Ipv4Addr::UNSPECIFIED.into());
        for (to, told) in [(&one, None), (&any, Some(Ipv4Addr::LOCALHOST.into()))] {
            let destination = (Ipv4Addr::LOCALHOST, to.local_addr().unwrap().port()).into();
            for ecn in [Some(EcnCodepoint::Ect0), None, Some(EcnCodepoint::Ect0)] {
                let transmit = Transmit {
                    destination,
                    ecn,
                    contents: &[6; 900],
                    segment_size: None,
                    src_ip: None,
                };
                ours.try_send(&transmit).unwrap();
                let (bytes, meta) = received(to).await;
                assert_eq!(bytes, [6; 900]);
                assert_eq!(meta.ecn, ecn);
                assert_eq!(meta.dst_ip, told);
                assert_eq!(meta.addr, ours.local_addr().unwrap());
            }
        }
    }

    /// A socket whose buffer is full says so, and is written again once there is room; nobody watches it otherwise.
    #[tokio::test(flavor = "current_thread")]
    async fn a_full_socket_waits_for_room() {
        // A pair of datagram sockets whose other end the test holds, so that it decides when there is room.
        let (ours, other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.send(&[1; 1024]).is_ok() {}
        let room = Room {
            socket: Arc::new(Socket {
                options: UdpSocketState::new((&UdpSocket::bind("127.0.0.1:0").unwrap()).into())
                    .unwrap(),
                io: watch(
                    UdpSocket::from(std::os::fd::OwnedFd::from(ours)),
                    Interest::READABLE,
                )
                .unwrap(),
                receive_segments: 1,
                full: AtomicBool::new(true),
                largest_segment: AtomicUsize::new(0),
                smaller: AtomicU32::new(0),
                receive_at_once: AtomicUsize::new(usize::MAX),
                marks: false,
                many: AtomicBool::new(false),
            }),
            waiting: None,
        };
        let mut room = Box::pin(room);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(room.as_mut().poll_writable(&mut cx).is_pending());
        assert!(room.waiting.is_some());
        let mut memory = [0; 1024];
        other.set_nonblocking(true).unwrap();
        while other.recv(&mut memory).is_ok() {}
        let ready = std::future::poll_fn(|cx| room.as_mut().poll_writable(cx));
        let ready = tokio::time::timeout(std::time::Duration::from_secs(5), ready).await;
        ready.expect("there is room").unwrap();
        assert!(room.waiting.is_none() && !room.socket.full.load(Ordering::Relaxed));
    }

    /// One peer with the largest packets leaves the others only for a while with fewer segments in a send.
    #[tokio::test(flavor = "current_thread")]
    async fn large_packets_of_one_peer_are_forgotten() {
        let (ours, other) = pair();
        let to = other.local_addr().unwrap();
        let send = |length: usize| {
            ours.try_send(&Transmit {
                destination: to,
                ecn: None,
                contents: &vec![7; length],
                segment_size: None,
                src_ip: None,
            })
            .unwrap();
        };
        send(1472);
        assert_eq!(ours.max_transmit_segments(), 10);
        send(60_000);
        assert_eq!(ours.max_transmit_segments(), 1);
        for _ in 0..FORGET_SEGMENT_AFTER {
            send(1472);
        }
        assert_eq!(ours.max_transmit_segments(), 10);
    }

    #[test]
    fn the_route_tells_how_much_a_packet_may_carry() {
        let mtu: u16 = std::fs::read_to_string("/sys/class/net/lo/mtu")
            .unwrap()
            .trim()
            .parse()
            .unwrap_or(u16::MAX);
        for (address, headers) in [("127.0.0.1:7", 28), ("[::ffff:127.0.0.1]:7", 28)] {
            let found = route_payload(None, address.parse().unwrap()).unwrap();
            assert!(found >= mtu - headers, "{address}: {found} of {mtu}");
        }
        assert!(route_payload(None, "255.255.255.255:7".parse().unwrap()).is_err());
    }

    #[test]
    fn segments_fit_one_send() {
        assert_eq!(segments_for(1472), 10);
        assert_eq!(segments_for(8972), 7);
        assert_eq!(segments_for(65_000), 1);
        for segment in 1..=u16::MAX as usize {
            assert!(segments_for(segment) == 1 || segments_for(segment) * segment <= MAX_SEND);
        }
    }

    #[test]
    fn what_one_receive_brings_fits_in_its_buffer() {
        for payload in 1200..=u16::MAX as usize {
            let room = receive_segments_for(payload) * payload;
            assert!((MAX_RECEIVE..2 * MAX_RECEIVE).contains(&room), "{payload}");
        }
    }
}
