//! One stream of one service: frames out of the queue, frames into the handler, and its end.

use crate::api::{LinkEvent, LinkHandler, SessionId, code_from, code_to, words};
use crate::queue::SendQueue;
use crate::quic::{RecvStream, SendStream};
use crate::receive::Receiver;
use bytes::Bytes;
use holdfast_wire_format::frame::GoodbyeCode;
use holdfast_wire_format::ids::Uuid;
use quinn::{ConnectionError, ReadError, StoppedError, VarInt, WriteError};
use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
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
    out: RefCell<Out>,
    /// Wakes the task that writes, while it waits.
    sender: Cell<Option<Waker>>,
    closing: RefCell<Option<(GoodbyeCode, String)>>,
    over: Cell<bool>,
}

/// The sending half of a stream.
struct Out {
    stream: SendStream,
    /// Taken from the queue; from `next` on QUIC has not taken it.
    batch: Vec<Bytes>,
    next: usize,
}

/// How a session ended.
pub(crate) struct Ending {
    pub code: Option<GoodbyeCode>,
    pub by_peer: bool,
    pub reason: String,
}

impl Session {
    pub fn new(id: SessionId, peer: Uuid, service: Uuid, stream: SendStream) -> Rc<Self> {
        Rc::new(Session {
            id,
            peer,
            service,
            queue: RefCell::default(),
            out: RefCell::new(Out {
                stream,
                batch: Vec::new(),
                next: 0,
            }),
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

    /// Queues a frame; [`Self::flush`] or [`Self::wake`] has to follow.
    pub fn push(&self, header: &[u8], payload: crate::api::Payload) {
        self.queue.borrow_mut().push(header, payload);
    }

    /// Hands what is queued to QUIC as far as there is room; its task does the rest. Bytes handed over, which [`Self::send`] has to follow.
    pub fn flush(&self) -> usize {
        // Without the waker the task has its turn before it waits again, and looks into the queue then.
        let Some(waker) = self.sender.take() else {
            return 0;
        };
        let (bytes, state) = self.poll_out(&mut Context::from_waker(&waker));
        match state {
            Poll::Ready(Err(_)) => waker.wake(),
            Poll::Ready(Ok(())) | Poll::Pending => self.sender.set(Some(waker)),
        }
        bytes
    }

    /// Sends what QUIC has of this session and of the others over the same connection.
    pub fn send(&self) {
        self.out.borrow().stream.send();
    }

    /// Ends the session after what is queued was sent; the first reason counts.
    pub fn close(&self, code: GoodbyeCode, reason: String) {
        self.closing.borrow_mut().get_or_insert((code, reason));
        self.wake();
    }

    /// The task looks into the queue.
    pub fn wake(&self) {
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    /// The peer wants nothing more on this stream, or has everything.
    fn stopped(&self) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + use<> {
        self.out.borrow().stream.stopped()
    }

    /// Whatever is left of this direction is not sent.
    fn reset(&self, code: GoodbyeCode) {
        // It may have ended already.
        let _ = self.out.borrow_mut().stream.reset(code_to(code));
    }

    fn closing(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Hands everything queued to QUIC. How many bytes that were this time, and whether it is everything; what fails once fails the next time too.
    fn poll_out(&self, cx: &mut Context<'_>) -> (usize, Poll<Result<(), WriteError>>) {
        let mut out = self.out.borrow_mut();
        let Out {
            stream,
            batch,
            next,
        } = &mut *out;
        let mut bytes = 0;
        loop {
            if *next == batch.len() {
                batch.clear();
                *next = 0;
                let mut queue = self.queue.borrow_mut();
                if queue.is_empty() {
                    return (bytes, Poll::Ready(Ok(())));
                }
                queue.take_batch(batch);
            }
            match stream.poll_write(cx, &mut batch[*next..]) {
                Poll::Ready(Ok(written)) => {
                    *next += written.chunks;
                    self.queue.borrow_mut().accepted(written.bytes);
                    bytes += written.bytes;
                }
                Poll::Ready(Err(error)) => return (bytes, Poll::Ready(Err(error))),
                Poll::Pending => return (bytes, Poll::Pending),
            }
        }
    }

    /// Waits until something was handed to QUIC, or nothing more will be; once the session closes, with `patience` only that QUIC takes something.
    async fn next_out(&self, patience: bool) -> Step {
        poll_fn(|cx| {
            let (bytes, state) = self.poll_out(cx);
            if bytes > 0 {
                self.send();
                return Poll::Ready(Step::Out(bytes));
            }
            match state {
                Poll::Ready(Err(error)) => return Poll::Ready(Step::Failed(error)),
                Poll::Ready(Ok(())) if self.closing() => return Poll::Ready(Step::Drained),
                Poll::Pending if self.closing() && !patience => return Poll::Ready(Step::Stuck),
                _ => {}
            }
            self.sender.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await
    }
}

/// What became of the queue.
enum Step {
    /// QUIC took so many bytes.
    Out(usize),
    /// The session closes, and QUIC has everything.
    Drained,
    /// The session closes, and QUIC has no room.
    Stuck,
    Failed(WriteError),
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
    mut recv: RecvStream,
) -> Ending {
    let stopped = session.stopped();
    let end = {
        let reading = read(session, handler, &mut recv);
        let writing = write(session, handler);
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
            let _ = session.out.borrow_mut().stream.finish();
            let _ = recv.stop(code_to(code));
            // Whoever waits for the end of the session may close the connection then, and that would overtake the last words.
            let _ = timeout(CLOSING, session.stopped()).await;
            Ending {
                code: Some(code),
                by_peer: false,
                reason,
            }
        }
        (End::Closed | End::Drained, local) => {
            let (code, reason) = local.unwrap_or((GoodbyeCode::Disconnect, String::new()));
            session.reset(code);
            let _ = recv.stop(code_to(code));
            Ending {
                code: Some(code),
                by_peer: false,
                reason,
            }
        }
        (End::Bad(what), _) => {
            tracing::warn!(peer = %session.peer, service = %session.service, "bad frame: {what}");
            session.reset(GoodbyeCode::BadFrame);
            let _ = recv.stop(code_to(GoodbyeCode::BadFrame));
            let reason = format!("closed: a bad frame arrived and was not delivered: {what}");
            Ending {
                code: Some(GoodbyeCode::BadFrame),
                by_peer: false,
                reason,
            }
        }
        (End::PeerCode(code), _) => peer_closed(session, code_from(code.into_inner())),
        (End::PeerFinished, _) => {
            // Its reason travels beside the end of the stream.
            let code = match timeout(CLOSING, session.stopped()).await {
                Ok(Ok(Some(code))) => code_from(code.into_inner()),
                _ => None,
            };
            peer_closed(session, code)
        }
        (End::Lost(e), _) => lost(&e),
    }
}

fn peer_closed(session: &Session, code: Option<GoodbyeCode>) -> Ending {
    session.reset(GoodbyeCode::Disconnect);
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
        ConnectionError::ConnectionClosed(e) if e.reason.is_empty() => {
            format!("ended by the peer without a reason ({})", e.error_code)
        }
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
        let count = match or_flush(pin!(recv.read(&mut chunks)), handler, &delivered).await {
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

async fn write<H: LinkHandler>(session: &Session, handler: &H) -> End {
    let mut deadline = None;
    loop {
        let step = match deadline {
            None => session.next_out(false).await,
            // A peer that takes nothing is not waited for any longer.
            Some(deadline) => match timeout_at(deadline, session.next_out(true)).await {
                Ok(step) => step,
                Err(_) => return End::Closed,
            },
        };
        match step {
            Step::Out(bytes) => {
                let (peer, service, session) = (session.peer, session.service, session.id);
                handler.on_event(LinkEvent::Drained {
                    peer,
                    service,
                    session,
                    bytes,
                });
                handler.on_batch_end();
            }
            Step::Drained => return End::Drained,
            Step::Stuck => deadline = Some(Instant::now() + CLOSING),
            Step::Failed(WriteError::Stopped(code)) => return End::PeerCode(code),
            Step::Failed(WriteError::ConnectionLost(e)) => return End::Lost(e),
            Step::Failed(e) => return End::Bad(e.to_string()),
        }
    }
}
