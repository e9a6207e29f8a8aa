//! One connection: moves bytes between a socket and the handshake, then between it and the session.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::close::{CloseReason, CloseWatch};
use crate::volume::{Exports, Volume};

use super::handshake::{self, Handshake, HandshakeError, Opened, Step};
use super::session::{Session, SessionError};
use super::settings::{Limits, Stats};

/// Pieces in one send: 64 answers with their payloads.
const GATHER: usize = 128;

/// Why a connection ended badly. The others do not notice.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("handshake: {0}")]
    Handshake(#[from] HandshakeError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("the handshake took longer than {} s", .0.as_secs_f32())]
    HandshakeTimeout(Duration),
    #[error("the client took no answer and finished no write for {} s, so its memory was taken back", .0.as_secs_f32())]
    Stalled(Duration),
    /// Not a failure: the server stops before the client opened anything.
    #[error("{}", .0.as_str())]
    Stopping(CloseReason),
    #[error("the socket: {0}")]
    Socket(#[from] io::Error),
}

/// How a connection ended well.
#[derive(Debug)]
pub(super) enum End {
    /// The client said goodbye.
    Disconnected,
    /// The client closed its socket without a word.
    Gone,
    /// The export or the server went away.
    Closed(CloseReason),
}

/// What a connection needs besides its socket.
pub(super) struct Surroundings<'a> {
    pub limits: &'a Limits,
    pub stats: &'a Rc<Stats>,
}

/// A handshake that got as far as it could on one kind of stream.
pub(super) enum Progress<V> {
    Opened(Opened<V>, Vec<u8>),
    StartTls,
    Over(End),
}

/// Runs option haggling until an export is open, TLS must start, or it is over. `out` holds the greeting.
pub(super) async fn negotiate<E: Exports, S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    handshake: &mut Handshake,
    mut out: Vec<u8>,
    exports: &E,
) -> Result<Progress<E::Volume>, ConnectionError> {
    let mut input = Vec::with_capacity(4096);
    loop {
        let (taken, step) = match handshake.step(&input, &mut out, exports) {
            Ok(taken_and_step) => taken_and_step,
            Err(error) => {
                // What was answered before the breach may still explain it to the client.
                let _ = stream.write_all(&out).await;
                return Err(error.into());
            }
        };
        input.drain(..taken);
        stream.write_all(&out).await?;
        stream.flush().await?;
        out.clear();
        match step {
            Step::Continue if taken > 0 => {}
            Step::Continue => {
                assert!(
                    input.len() < handshake::INPUT_BYTES,
                    "a handshake that takes nothing from a full buffer"
                );
                let room = (handshake::INPUT_BYTES - input.len()) as u64;
                if (&mut *stream).take(room).read_buf(&mut input).await? == 0 {
                    return Ok(Progress::Over(End::Gone));
                }
            }
            Step::StartTls => return Ok(Progress::StartTls),
            Step::Open(opened) => return Ok(Progress::Opened(opened, input)),
            Step::Close => return Ok(Progress::Over(End::Disconnected)),
        }
    }
}

/// The server's half of the TLS handshake, and the certificate the client showed.
pub(super) async fn start_tls(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
) -> Result<(TlsStream<TcpStream>, Option<Vec<u8>>), ConnectionError> {
    let stream = acceptor
        .accept(stream)
        .await
        .map_err(ConnectionError::Tls)?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|leaf| leaf.as_ref().to_vec());
    Ok((stream, certificate))
}

/// Runs the transmission phase to its end.
pub(super) async fn transmit<V: Volume, S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    opened: Opened<V>,
    rest: &[u8],
    server_stops: CloseWatch,
    around: &Surroundings<'_>,
) -> Result<End, ConnectionError> {
    let limits = around.limits;
    let mut transmission = Transmission {
        stream,
        session: Session::new(opened, limits, Rc::clone(around.stats), rest),
        server_stops,
        unflushed: false,
        moves: 0,
        timer: Box::pin(sleep_until(Instant::now() + limits.stall_timeout)),
        moves_at_timer: None,
        closing: false,
        limits: limits.clone(),
    };
    let end = poll_fn(|cx| transmission.poll(cx)).await?;
    let Transmission {
        mut stream,
        session,
        ..
    } = transmission;
    drop(session);
    let lingers = matches!(end, End::Closed(_));
    // A socket closed with unread bytes resets the connection, and the client would lose its last answers.
    let _ = timeout(limits.close_timeout, async {
        stream.shutdown().await?;
        let mut sink = [0; 4096];
        while lingers && stream.read(&mut sink).await? > 0 {}
        io::Result::Ok(())
    })
    .await;
    Ok(end)
}

struct Transmission<S, V: Volume> {
    stream: S,
    session: Session<V>,
    server_stops: CloseWatch,
    /// Bytes may sit inside the stream (TLS records) until it is flushed.
    unflushed: bool,
    /// Calls that moved bytes, so that the timer can tell a slow client from a stuck one.
    moves: u64,
    /// One timer for the whole phase instead of one per request: it looks once per time-out.
    timer: Pin<Box<Sleep>>,
    /// `moves` when the timer last found the client owing something.
    moves_at_timer: Option<u64>,
    closing: bool,
    limits: Limits,
}

impl<S: AsyncRead + AsyncWrite + Unpin, V: Volume> Transmission<S, V> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<End, ConnectionError>> {
        loop {
            if !self.closing
                && let Some(reason) = self.server_stops.poll(cx)
            {
                self.session.close(reason.clone());
            }
            self.session.pump(cx)?;
            if !self.closing && self.session.close_reason().is_some() {
                self.closing = true;
                self.timer
                    .as_mut()
                    .reset(Instant::now() + self.limits.close_timeout);
            }
            let before = self.moves;
            if let Err(error) = self.send(cx) {
                return Poll::Ready(gone(error));
            }
            if self.session.is_finished() && !self.unflushed {
                return Poll::Ready(Ok(self.end()));
            }
            // What was sent makes room for a request that a limit holds back, and changes nothing else.
            let room = self.moves != before && self.session.is_held_back();
            let before = self.moves;
            match self.receive(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(Ok(End::Gone)),
                Err(error) => return Poll::Ready(gone(error)),
            }
            if room || self.moves != before {
                continue;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.closing {
                return Poll::Ready(Ok(self.end()));
            }
            let stall = self.limits.stall_timeout;
            if !self.session.waits_for_client() {
                self.moves_at_timer = None;
            } else if self.moves_at_timer == Some(self.moves) {
                return Poll::Ready(Err(ConnectionError::Stalled(stall)));
            } else {
                self.moves_at_timer = Some(self.moves);
            }
            self.timer.as_mut().reset(Instant::now() + stall);
        }
    }

    fn end(&self) -> End {
        match self.session.close_reason() {
            Some(reason) => End::Closed(reason.clone()),
            None => End::Disconnected,
        }
    }

    fn send(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.session.unsent_answers() > 0 {
            let mut slices = [IoSlice::new(&[]); GATHER];
            let filled = self.session.gather(&mut slices);
            let stream = Pin::new(&mut self.stream);
            match stream.poll_write_vectored(cx, &slices[..filled])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(n) => {
                    self.session.sent(n);
                    self.moves += 1;
                    self.unflushed = true;
                }
                Poll::Pending => break,
            }
        }
        if self.unflushed && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        Ok(())
    }

    /// `false` when the client closed its side.
    fn receive(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let Some(target) = self.session.read_target() else {
            return Ok(true);
        };
        let mut target = ReadBuf::new(target);
        match Pin::new(&mut self.stream).poll_read(cx, &mut target)? {
            Poll::Pending => Ok(true),
            Poll::Ready(()) => {
                let n = target.filled().len();
                if n > 0 {
                    self.session.received(n);
                    self.moves += 1;
                }
                Ok(n > 0)
            }
        }
    }
}

/// A client that vanished is no defect of anybody's.
fn gone(error: io::Error) -> Result<End, ConnectionError> {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::UnexpectedEof => Ok(End::Gone),
        _ => Err(error.into()),
    }
}
