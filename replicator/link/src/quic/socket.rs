//! UDP sockets under QUIC: large buffers, segmented sends that stay within what one send may carry, few wake-ups.

use super::packets::Packets;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{SendFlags, sendto};
use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes of one segmented send. The kernel's limit is 65,507 for IPv4; a send above it fails with EMSGSIZE, which
/// QUIC treats as a lost packet, again and again.
const MAX_SEND: usize = 65_500;
/// Most segments the sender ever makes in one send.
const MAX_SEGMENTS: usize = 10;
/// Bytes that are taken from the socket at once, about. What is taken is decrypted, parsed and written before more is taken: this
/// much is in the processor's cache all the while, and the sender gets room for more in small steps. With 32 of the largest
/// packets, a whole window, the two ends work by turns, and a full sync takes a fifth more processor time.
const RECEIVE_AT_ONCE: usize = 512 << 10;
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

/// A socket of this thread, watched by its runtime, with what QUIC asks of it; it wakes nobody without need.
#[derive(Debug)]
pub(super) struct Socket {
    options: UdpSocketState,
    /// What is sent without a word about marks of congestion says that they are understood.
    marks: bool,
    /// Watched for what arrives alone: the network takes every packet off the socket's buffer, and each would wake this thread once more to
    /// say that there is room again.
    io: AsyncFd<UdpSocket>,
    /// The last send found no room.
    full: Cell<bool>,
    /// A second descriptor of the socket, watched for room only while somebody waits for it.
    waiting: RefCell<Option<AsyncFd<UdpSocket>>>,
    /// Packets (joined by the kernel, where it can) that make about [`RECEIVE_AT_ONCE`], if they are like the last ones.
    receive_at_once: Cell<usize>,
    /// The last receive brought as many packets as it had room for.
    many: Cell<bool>,
}

/// Packets of this size that one send may carry.
pub(super) fn segments_for(segment: usize) -> usize {
    (MAX_SEND / segment.max(1)).clamp(1, MAX_SEGMENTS)
}

impl Socket {
    /// Hands the socket to the runtime of this thread.
    pub fn new(socket: UdpSocket) -> io::Result<Socket> {
        let options = UdpSocketState::new((&socket).into())?;
        let local = socket.local_addr()?;
        if !local.ip().is_unspecified() {
            // Whoever listens on one address need not be told with each packet which one it came to, nor say which one to send from.
            without_destinations(&socket, local)?;
        }
        Ok(Socket {
            marks: marked(&socket, local),
            options,
            io: watch(socket, Interest::READABLE)?,
            full: Cell::new(false),
            waiting: RefCell::new(None),
            receive_at_once: Cell::new(usize::MAX),
            many: Cell::new(false),
        })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    /// Packets may be cut on their way, so their size can't be found out.
    pub fn may_fragment(&self) -> bool {
        self.options.may_fragment()
    }

    /// Packets of `size` that one send takes here.
    pub fn segments(&self, size: usize) -> usize {
        segments_for(size).min(self.options.max_gso_segments())
    }

    /// Sends, or says that there is no room. Whatever else goes wrong counts as lost on the way.
    pub fn send(&self, transmit: &Transmit<'_>) -> Result<(), Full> {
        debug_assert!(transmit.segment_size.is_none() || transmit.contents.len() <= MAX_SEND);
        let sent = if self.is_plain(transmit) {
            self.send_plain(transmit)
        } else {
            self.options.send(self.io.get_ref().into(), transmit)
        };
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.full.set(true);
                Err(Full)
            }
            // It said in the log what is wrong.
            Ok(()) | Err(_) => Ok(()),
        }
    }

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

    /// Takes what is there, about [`RECEIVE_AT_ONCE`] bytes of it, and how many receives that were.
    pub fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        packets: &mut Packets,
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let most = self.receive_at_once.get().min(meta.len());
        loop {
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            let mut room = most;
            if !self.many.get() {
                room = room.min(FEW);
            }
            let received = packets.room(room, |bufs| {
                self.options
                    .recv(self.io.get_ref().into(), bufs, &mut meta[..room])
            });
            match received {
                Ok(count) => {
                    self.many.set(count == room);
                    // It took all there was. What comes from now on is a new edge, so asking again would tell nothing.
                    if count < room {
                        guard.clear_ready();
                    }
                    let bytes: usize = meta[..count].iter().map(|meta| meta.len).sum();
                    let next = RECEIVE_AT_ONCE * count / bytes.max(1);
                    self.receive_at_once.set(next.max(1));
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) => {
                    guard.clear_ready();
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Waits until there is something to receive.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        // An error shows when it is received.
        self.io.poll_read_ready(cx).map(|_| ())
    }

    /// Waits for room, after a send that found none.
    pub fn poll_room(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.waiting.borrow_mut();
        if self.full.get() {
            let room = match waiting.take() {
                Some(room) => room,
                None => watch(self.io.get_ref().try_clone()?, Interest::WRITABLE)?,
            };
            if room.poll_write_ready(cx)?.is_pending() {
                *waiting = Some(room);
                return Poll::Pending;
            }
            self.full.set(false);
        }
        Poll::Ready(Ok(()))
    }
}

/// There is no room in the socket's buffer.
#[derive(Debug)]
pub(super) struct Full;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;
    use tokio::time::timeout;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn ours(ip: Ipv4Addr) -> Socket {
        Socket::new(bind((ip, 0).into()).unwrap()).unwrap()
    }

    /// One receive: what came, and what is known of it.
    async fn receive(by: &Socket, packets: &mut Packets) -> Vec<(Vec<u8>, RecvMeta)> {
        let mut meta = [RecvMeta::default(); 32];
        let got = std::future::poll_fn(|cx| by.poll_recv(cx, packets, &mut meta));
        let got = timeout(PATIENCE, got).await;
        let got = got.expect("packets wait in the socket").unwrap();
        (0..got)
            .map(|at| (packets.take(at, meta[at].len).to_vec(), meta[at]))
            .collect()
    }

    /// Packets that come one by one, together, and between a look that found the socket empty and the next: none is left lying.
    #[tokio::test(flavor = "current_thread")]
    async fn every_packet_wakes_the_receiver() {
        let (ours, mut packets) = (ours(Ipv4Addr::LOCALHOST), Packets::default());
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = ours.local_addr().unwrap();
        for burst in [1, 3, 1, 40, 2, 33, 32, 1] {
            for _ in 0..burst {
                other.send_to(&[7; 100], to).unwrap();
            }
            let mut expected = burst;
            while expected > 0 {
                // Segments that the kernel joined count each.
                for (bytes, _) in receive(&ours, &mut packets).await {
                    assert!(bytes.iter().all(|byte| *byte == 7));
                    expected -= bytes.len() / 100;
                }
            }
        }
    }

    /// After large packets fewer are taken at once, after small ones more again, and none is left lying.
    #[tokio::test(flavor = "current_thread")]
    async fn what_is_taken_at_once_is_bounded_in_bytes() {
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (ours, mut packets) = (ours(Ipv4Addr::LOCALHOST), Packets::default());
        let to = ours.local_addr().unwrap();
        let mut burst = async |burst: usize, bytes: usize| {
            for _ in 0..burst {
                other.send_to(&vec![7; bytes], to).unwrap();
            }
            let (mut left, mut most) = (burst, Vec::new());
            while left > 0 {
                let got = receive(&ours, &mut packets).await;
                most.push(got.len());
                left -= got.iter().map(|(got, _)| got.len() / bytes).sum::<usize>();
            }
            most
        };
        // Without the right to large socket buffers only a few of these fit at a time.
        for _ in 0..3 {
            burst(2, 60_000).await;
        }
        let large = burst(20, 60_000).await;
        assert!(large.iter().all(|got| *got <= 8), "{large:?}");
        burst(1, 100).await;
        let small = burst(20, 100).await;
        assert!(small.len() < 10, "{small:?}");
    }

    /// Marks of congestion are announced as QUIC says, on the short way and on the long one; where a packet was sent to is told only to whom
    /// it may not know.
    #[tokio::test(flavor = "current_thread")]
    async fn marks_and_destinations_are_as_quic_expects() {
        let from = ours(Ipv4Addr::LOCALHOST);
        let one = ours(Ipv4Addr::LOCALHOST);
        let any = ours(Ipv4Addr::UNSPECIFIED);
        let mut packets = Packets::default();
        for (to, told) in [(&one, None), (&any, Some(Ipv4Addr::LOCALHOST.into()))] {
            let destination = (Ipv4Addr::LOCALHOST, to.local_addr().unwrap().port()).into();
            for ecn in [Some(EcnCodepoint::Ect0), None, Some(EcnCodepoint::Ect0)] {
                from.send(&Transmit {
                    destination,
                    ecn,
                    contents: &[6; 900],
                    segment_size: None,
                    src_ip: None,
                })
                .unwrap();
                let got = receive(to, &mut packets).await;
                let [(bytes, meta)] = &got[..] else {
                    panic!("{} packets", got.len());
                };
                assert_eq!(bytes, &[6; 900]);
                assert_eq!(meta.ecn, ecn);
                assert_eq!(meta.dst_ip, told);
                assert_eq!(meta.addr, from.local_addr().unwrap());
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
        let ours = UdpSocket::from(std::os::fd::OwnedFd::from(ours));
        let socket = Socket {
            options: UdpSocketState::new((&UdpSocket::bind("127.0.0.1:0").unwrap()).into())
                .unwrap(),
            io: watch(ours, Interest::READABLE).unwrap(),
            full: Cell::new(true),
            waiting: RefCell::new(None),
            receive_at_once: Cell::new(usize::MAX),
            marks: false,
            many: Cell::new(false),
        };
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(socket.poll_room(&mut cx).is_pending());
        assert!(socket.waiting.borrow().is_some());
        let mut memory = [0; 1024];
        other.set_nonblocking(true).unwrap();
        while other.recv(&mut memory).is_ok() {}
        let ready = std::future::poll_fn(|cx| socket.poll_room(cx));
        timeout(PATIENCE, ready)
            .await
            .expect("there is room")
            .unwrap();
        assert!(socket.waiting.borrow().is_none() && !socket.full.get());
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
}
