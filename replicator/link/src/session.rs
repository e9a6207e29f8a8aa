//! One stream of one service: frames out of the queue, frames into the handler, and its end.

use crate::api::{LinkEvent, LinkHandler, SessionId, code_from, code_to, words};
use crate::queue::SendQueue;
use crate::receive::Receiver;
use bytes::Bytes;
use holdfast_wire_format::frame::GoodbyeCode;
use holdfast_wire_format::ids::Uuid;
use quinn::{
    ConnectionError, ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError, Written,
};
use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// Packets taken from QUIC at once. What is taken counts as read, so this bounds what a stream holds beyond its window
/// while memory for a payload is awaited: 32 packets, a quarter of a megabyte of jumbo frames and 2 MiB of the largest packets.
const CHUNKS: usize = 32;
/// Frames delivered before the handler may flush acknowledgements, if more is ready all the time.
const BATCH_FRAMES: usize = 256;
/// How long the end of a session may take to reach the peer in good order.
const CLOSING: Duration = Duration::from_secs(1);

/// The handle side of a session: what `Link` touches.
pub(crate) struct Session {
    pub id: SessionId,
    pub peer: Uuid,
    pub service: Uuid,
    queue: RefCell<SendQueue>,
    sender: Cell<Option<Waker>>,
    closing: RefCell<Option<(GoodbyeCode, String)>>,
    over: Cell<bool>,
}

/// How a session ended.
pub(crate) struct Ending {
    pub code: Option<GoodbyeCode>,
    pub by_peer: bool,
    pub reason: String,
}

impl Session {
    pub fn new(id: SessionId, peer: Uuid, service: Uuid) -> Rc<Self> {
        Rc::new(Session {
            id,
            peer,
            service,
            queue: RefCell::default(),
            sender: Cell::new(None),
            closing: RefCell::new(None),
            over: Cell::new(false),
        })
    }

    pub fn queued_bytes(&self) -> usize {
        self.queue.borrow().bytes()
    }

    /// False once the session is over or closing.
    pub fn is_open(&self) -> bool {
        !self.over.get() && self.closing.borrow().is_none()
    }

    pub fn push(&self, header: &[u8], payload: crate::api::Payload) {
        self.queue.borrow_mut().push(header, payload);
        self.wake();
    }

    /// Ends the session after what is queued was sent; the first reason counts.
    pub fn close(&self, code: GoodbyeCode, reason: String) {
        self.closing.borrow_mut().get_or_insert((code, reason));
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    fn closing(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Waits until there is something to send (true) or the session closes with nothing left to send (false).
    async fn work(&self) -> bool {
        poll_fn(|cx| {
            if !self.queue.borrow().is_empty() {
                return Poll::Ready(true);
            }
            if self.closing() {
                return Poll::Ready(false);
            }
            self.sender.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await
    }
}

enum End {
    Closed,
    Drained,
    PeerFinished,
    PeerCode(VarInt),
    Lost(ConnectionError),
    Bad(String),
}

/// Runs the session to its end and says how it ended. All events of the session but up and down come from here.
pub(crate) async fn run<H: LinkHandler>(
    session: &Session,
    handler: &H,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Ending {
    let stopped = send.stopped();
    let end = {
        let reading = read(session, handler, &mut recv);
        let writing = write(session, handler, &mut send);
        // Reading first: what its frames cause to be queued is then sent in the same turn.
        tokio::select! {
            biased;
            end = reading => end,
            end = writing => end,
            stopped = stopped => match stopped {
                Ok(Some(code)) => End::PeerCode(code),
                Ok(None) => End::PeerFinished,
                Err(StoppedError::ConnectionLost(e)) => End::Lost(e),
                Err(StoppedError::ZeroRttRejected) => End::Bad("early data, which is never sent".into()),
            },
        }
    };
    session.over.set(true);
    session.queue.borrow_mut().clear();
    let local = session.closing.borrow_mut().take();
    match (end, local) {
        (End::Drained, Some((code, reason))) => {
            let _ = send.finish();
            let _ = recv.stop(code_to(code));
            // Whoever waits for the end of the session may close the connection then, and that would overtake the last words.
            let _ = timeout(CLOSING, send.stopped()).await;
            Ending {
                code: Some(code),
                by_peer: false,
                reason,
            }
        }
        (End::Closed | End::Drained, local) => {
            let (code, reason) = local.unwrap_or((GoodbyeCode::Disconnect, String::new()));
            let _ = send.reset(code_to(code));
            let _ = recv.stop(code_to(code));
            Ending {
                code: Some(code),
                by_peer: false,
                reason,
            }
        }
        (End::Bad(what), _) => {
            tracing::warn!(peer = %session.peer, service = %session.service, "bad frame: {what}");
            let _ = send.reset(code_to(GoodbyeCode::BadFrame));
            let _ = recv.stop(code_to(GoodbyeCode::BadFrame));
            let reason = format!("closed: a bad frame arrived and was not delivered: {what}");
            Ending {
                code: Some(GoodbyeCode::BadFrame),
                by_peer: false,
                reason,
            }
        }
        (End::PeerCode(code), _) => peer_closed(&mut send, code_from(code.into_inner())),
        (End::PeerFinished, _) => {
            // Its reason travels beside the end of the stream.
            let code = match timeout(CLOSING, send.stopped()).await {
                Ok(Ok(Some(code))) => code_from(code.into_inner()),
                _ => None,
            };
            peer_closed(&mut send, code)
        }
        (End::Lost(e), _) => lost(&e),
    }
}

fn peer_closed(send: &mut SendStream, code: Option<GoodbyeCode>) -> Ending {
    let _ = send.reset(code_to(GoodbyeCode::Disconnect));
    let reason = match code {
        Some(code) => format!("closed by the peer: {}", words(code)),
        None => "closed by the peer".into(),
    };
    Ending {
        code,
        by_peer: true,
        reason,
    }
}

fn lost(e: &ConnectionError) -> Ending {
    let (code, by_peer) = match e {
        ConnectionError::ApplicationClosed(close) => {
            (code_from(close.error_code.into_inner()), true)
        }
        _ => (None, false),
    };
    Ending {
        code,
        by_peer,
        reason: connection_error(e),
    }
}

/// Why a connection ended, in words.
pub(crate) fn connection_error(e: &ConnectionError) -> String {
    match e {
        ConnectionError::ApplicationClosed(close) => {
            let what =
                code_from(close.error_code.into_inner()).map_or("for an unknown reason", words);
            if close.reason.is_empty() {
                format!("closed by the peer: {what}")
            } else {
                format!(
                    "closed by the peer: {what}: {}",
                    String::from_utf8_lossy(&close.reason)
                )
            }
        }
        ConnectionError::TimedOut => "the peer stopped answering on this path".into(),
        ConnectionError::Reset => "the peer lost this connection: it was probably restarted".into(),
        ConnectionError::LocallyClosed => "closed by this node".into(),
        ConnectionError::TransportError(e) => plain(&e.reason).to_owned(),
        ConnectionError::ConnectionClosed(e) => {
            format!(
                "refused by the peer: {}",
                plain(&String::from_utf8_lossy(&e.reason))
            )
        }
        other => other.to_string(),
    }
}

/// Our own words, without what the TLS library puts before them.
fn plain(reason: &str) -> &str {
    reason.strip_prefix("other error: ").unwrap_or(reason)
}

/// Waits for `future`; if it is not ready at once, the handler may first flush what it got so far.
async fn or_flush<T, H: LinkHandler>(
    mut future: Pin<&mut (impl Future<Output = T> + ?Sized)>,
    handler: &H,
    delivered: &Cell<usize>,
) -> T {
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(value),
        Poll::Pending => {
            if delivered.take() > 0 {
                handler.on_batch_end();
            }
            Poll::Pending
        }
    })
    .await
}

async fn read<H: LinkHandler>(session: &Session, handler: &H, recv: &mut RecvStream) -> End {
    let mut receiver = Receiver::new(session.service);
    let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
    let delivered = Cell::new(0);
    let end = loop {
        let count = match or_flush(pin!(recv.read_chunks(&mut chunks)), handler, &delivered).await {
            Ok(Some(count)) => count,
            Ok(None) if receiver.between_frames() => break End::PeerFinished,
            Ok(None) => break End::Bad("the stream ended inside a frame".into()),
            Err(ReadError::Reset(code)) => break End::PeerCode(code),
            Err(ReadError::ConnectionLost(e)) => break End::Lost(e),
            Err(e) => break End::Bad(e.to_string()),
        };
        let fed = feed(
            session,
            handler,
            &mut receiver,
            &mut chunks[..count],
            &delivered,
        )
        .await;
        if let Err(what) = fed {
            break End::Bad(what);
        }
        if session.closing() {
            // Who closed wants no more frames; the writer ends the session.
            return pending().await;
        }
    };
    if delivered.take() > 0 {
        handler.on_batch_end();
    }
    end
}

async fn feed<H: LinkHandler>(
    session: &Session,
    handler: &H,
    receiver: &mut Receiver<H::Buf>,
    chunks: &mut [Bytes],
    delivered: &Cell<usize>,
) -> Result<(), String> {
    for chunk in chunks {
        let mut chunk = std::mem::take(chunk);
        while !chunk.is_empty() {
            let waiting = async |allocation: Pin<&mut dyn Future<Output = H::Buf>>| {
                or_flush(allocation, handler, delivered).await
            };
            let Some((header, payload)) = receiver.feed(&mut chunk, handler, waiting).await? else {
                continue;
            };
            if session.closing() {
                return Ok(());
            }
            let (peer, service, session) = (session.peer, session.service, session.id);
            handler.on_event(LinkEvent::Frame {
                peer,
                service,
                session,
                header,
                payload,
            });
            delivered.set(delivered.get() + 1);
            if delivered.get() >= BATCH_FRAMES {
                delivered.set(0);
                handler.on_batch_end();
            }
        }
    }
    Ok(())
}

async fn write<H: LinkHandler>(session: &Session, handler: &H, send: &mut SendStream) -> End {
    let mut batch = Vec::new();
    let mut deadline = None;
    while session.work().await {
        session.queue.borrow_mut().take_batch(&mut batch);
        let mut left = &mut batch[..];
        let mut drained = 0;
        while !left.is_empty() {
            let written = match write_some(session, send, left, &mut deadline).await {
                Some(Ok(written)) => written,
                Some(Err(WriteError::Stopped(code))) => return End::PeerCode(code),
                Some(Err(WriteError::ConnectionLost(e))) => return End::Lost(e),
                Some(Err(e)) => return End::Bad(e.to_string()),
                None => return End::Closed,
            };
            left = &mut left[written.chunks..];
            session.queue.borrow_mut().accepted(written.bytes);
            drained += written.bytes;
        }
        batch.clear();
        let (peer, service, session) = (session.peer, session.service, session.id);
        handler.on_event(LinkEvent::Drained {
            peer,
            service,
            session,
            bytes: drained,
        });
        handler.on_batch_end();
    }
    End::Drained
}

/// Writes as much as QUIC takes. Once the session closes, a peer that takes nothing is given until `deadline`; then `None`.
async fn write_some(
    session: &Session,
    send: &mut SendStream,
    left: &mut [Bytes],
    deadline: &mut Option<Instant>,
) -> Option<Result<Written, WriteError>> {
    let mut write = pin!(send.write_chunks(left));
    if deadline.is_none() {
        let until_closing = poll_fn(|cx| {
            if let Poll::Ready(written) = write.as_mut().poll(cx) {
                return Poll::Ready(Some(written));
            }
            if session.closing() {
                return Poll::Ready(None);
            }
            session.sender.set(Some(cx.waker().clone()));
            Poll::Pending
        });
        if let Some(written) = until_closing.await {
            return Some(written);
        }
    }
    let deadline = *deadline.get_or_insert_with(|| Instant::now() + CLOSING);
    timeout_at(deadline, write).await.ok()
}
