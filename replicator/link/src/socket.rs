//! UDP sockets under QUIC: large buffers, and segmented sends that stay within what one send may carry.

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// Most bytes of one segmented send. The kernel's limit is 65,507 for IPv4; a send above it fails with EMSGSIZE, which
/// QUIC treats as a lost packet, again and again.
const MAX_SEND: usize = 65_500;
/// Most segments the sender ever makes in one send.
const MAX_SEGMENTS: usize = 10;
/// Most bytes of one receive: the kernel joins packets up to this.
const MAX_RECEIVE: usize = 65_535;
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

/// Hands the socket to the runtime of this thread. `payload`: most bytes of one packet that the endpoint takes.
pub(crate) fn wrap(socket: UdpSocket, payload: u16) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    Ok(Arc::new(Clamped {
        inner,
        receive_segments: receive_segments_for(payload.into()),
        largest_segment: AtomicUsize::new(0),
    }))
}

/// Keeps segmented sends below [`MAX_SEND`], whatever packet size was discovered, and the receive buffers of QUIC, which
/// are segments times packet size, at what one receive can bring.
struct Clamped {
    inner: Arc<dyn AsyncUdpSocket>,
    receive_segments: usize,
    /// Largest segment that was ever sent in a segmented send.
    largest_segment: AtomicUsize,
}

impl fmt::Debug for Clamped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

fn segments_for(segment: usize) -> usize {
    (MAX_SEND / segment.max(1)).clamp(1, MAX_SEGMENTS)
}

/// Packets of the largest size whose room holds any receive: with 64 of 8972 bytes, which is what QUIC asks the socket
/// for, the buffers of one endpoint take 18 MiB.
fn receive_segments_for(payload: usize) -> usize {
    MAX_RECEIVE.div_ceil(payload.max(1))
}

impl AsyncUdpSocket for Clamped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit.segment_size else {
            return self.inner.try_send(transmit);
        };
        self.largest_segment.fetch_max(segment, Ordering::Relaxed);
        if transmit.contents.len() <= MAX_SEND {
            return self.inner.try_send(transmit);
        }
        // Only the first sends after a larger packet size was found: from then on the limit below holds. If a later
        // part would block, the whole is sent again, and the receiver drops the repetition as QUIC always does.
        for part in transmit.contents.chunks(segments_for(segment) * segment) {
            let segment_size = (part.len() > segment).then_some(segment);
            self.inner.try_send(&Transmit {
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
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        segments_for(self.largest_segment.load(Ordering::Relaxed))
            .min(self.inner.max_transmit_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.receive_segments.min(self.inner.max_receive_segments())
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
