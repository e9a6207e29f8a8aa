//! The two halves of a stream.

use super::connection::Connection;
use bytes::Bytes;
use quinn::{ClosedStream, ReadError, ReadExactError, StoppedError, VarInt, WriteError};
use quinn_proto::{FinishError, ReadableError, StreamId, Written};
use std::future::{Future, poll_fn};
use std::task::{Context, Poll};

/// The sending half. What was written is sent to its end when it goes, unless it was reset.
pub(crate) struct SendStream {
    connection: Connection,
    id: StreamId,
}

impl SendStream {
    pub(super) fn new(connection: Connection, id: StreamId) -> Self {
        SendStream { connection, id }
    }

    /// Hands over as much as QUIC has room for. It is sent by [`Self::send`], or at the end of the connection's next turn.
    pub fn poll_write(
        &self,
        cx: &mut Context<'_>,
        pieces: &mut [Bytes],
    ) -> Poll<Result<Written, WriteError>> {
        self.poll_with(cx, |mut stream| stream.write_chunks(pieces))
    }

    fn poll_with<T>(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(quinn_proto::SendStream<'_>) -> Result<T, quinn_proto::WriteError>,
    ) -> Poll<Result<T, WriteError>> {
        use quinn_proto::WriteError as Refused;
        let inner = self.connection.inner();
        if let Some(reason) = inner.ended() {
            return Poll::Ready(Err(WriteError::ConnectionLost(reason)));
        }
        let written = write(inner.proto.borrow_mut().send_stream(self.id));
        Poll::Ready(match written {
            Ok(written) => Ok(written),
            Err(Refused::Blocked) => {
                inner.writers.borrow_mut().wait(self.id, cx);
                return Poll::Pending;
            }
            Err(Refused::Stopped(code)) => Err(WriteError::Stopped(code)),
            Err(Refused::ClosedStream) => Err(WriteError::ClosedStream),
        })
    }

    /// Sends what was written on all streams of the connection, at once.
    pub fn send(&self) {
        self.connection.inner().send();
    }

    pub async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let written =
                poll_fn(|cx| self.poll_with(cx, |mut stream| stream.write(bytes))).await?;
            bytes = &bytes[written..];
            self.connection.inner().touch();
        }
        Ok(())
    }

    /// Nothing more follows.
    pub fn finish(&mut self) -> Result<(), FinishError> {
        let inner = self.connection.inner();
        inner.proto.borrow_mut().send_stream(self.id).finish()?;
        inner.touch();
        Ok(())
    }

    /// Whatever was not acknowledged is given up.
    pub fn reset(&mut self, code: VarInt) -> Result<(), ClosedStream> {
        let inner = self.connection.inner();
        let mut proto = inner.proto.borrow_mut();
        proto.send_stream(self.id).reset(code)?;
        drop(proto);
        inner.touch();
        Ok(())
    }

    /// Waits until the peer wants nothing more, for the reason that is the result, or has everything.
    pub fn stopped(&self) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + use<> {
        let (connection, id) = (self.connection.clone(), self.id);
        poll_fn(move |cx| {
            let inner = connection.inner();
            let stopped = inner.proto.borrow_mut().send_stream(id).stopped();
            match stopped {
                Err(_) => Poll::Ready(Ok(None)),
                Ok(Some(code)) => Poll::Ready(Ok(Some(code))),
                Ok(None) => match inner.ended() {
                    Some(reason) => Poll::Ready(Err(StoppedError::ConnectionLost(reason))),
                    None => {
                        inner.enders.borrow_mut().wait(id, cx);
                        Poll::Pending
                    }
                },
            }
        })
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let inner = self.connection.inner();
        inner.writers.borrow_mut().forget(self.id);
        if inner.has_ended() {
            return;
        }
        let mut proto = inner.proto.borrow_mut();
        let mut stream = proto.send_stream(self.id);
        let more = match stream.finish() {
            Ok(()) => true,
            Err(FinishError::Stopped(reason)) => stream.reset(reason).is_ok(),
            // It was finished or reset before.
            Err(FinishError::ClosedStream) => false,
        };
        drop(proto);
        if more {
            inner.touch();
        }
    }
}

/// The receiving half. If it goes before the end of the stream, the peer is told to stop.
pub(crate) struct RecvStream {
    connection: Connection,
    id: StreamId,
    /// Nothing more will come.
    over: bool,
    /// The peer gave it up; said once what was read before it is used up.
    reset: Option<VarInt>,
}

impl RecvStream {
    pub(super) fn new(connection: Connection, id: StreamId) -> Self {
        RecvStream {
            connection,
            id,
            over: false,
            reset: None,
        }
    }

    /// Takes pieces in the order of the stream, as many as `pieces` has places for, each of `most` bytes at most. `None`: the stream has ended.
    fn poll_pieces(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &mut [Bytes],
        most: usize,
    ) -> Poll<Result<Option<usize>, ReadError>> {
        use quinn_proto::ReadError as Nothing;
        if self.over {
            return Poll::Ready(Ok(None));
        }
        if let Some(code) = self.reset {
            self.over = true;
            return Poll::Ready(Err(ReadError::Reset(code)));
        }
        let inner = self.connection.inner();
        let mut proto = inner.proto.borrow_mut();
        let mut stream = proto.recv_stream(self.id);
        let mut chunks = match stream.read(true) {
            Ok(chunks) => chunks,
            Err(ReadableError::ClosedStream) => return Poll::Ready(Err(ReadError::ClosedStream)),
            Err(ReadableError::IllegalOrderedRead) => {
                return Poll::Ready(Err(ReadError::IllegalOrderedRead));
            }
        };
        let mut count = 0;
        let mut end = None;
        while count < pieces.len() {
            match chunks.next(most) {
                Ok(Some(chunk)) => {
                    pieces[count] = chunk.bytes;
                    count += 1;
                }
                Ok(None) => {
                    self.over = true;
                    break;
                }
                Err(error) => {
                    end = Some(error);
                    break;
                }
            }
        }
        let more = chunks.finalize().should_transmit();
        drop(proto);
        if more {
            inner.touch();
        }
        if let Some(Nothing::Reset(code)) = end {
            self.reset = Some(code);
        }
        Poll::Ready(match (count, end) {
            (0, None) => Ok(None),
            (0, Some(Nothing::Reset(code))) => {
                self.over = true;
                Err(ReadError::Reset(code))
            }
            (0, Some(Nothing::Blocked)) => match inner.ended() {
                Some(reason) => Err(ReadError::ConnectionLost(reason)),
                None => {
                    inner.readers.borrow_mut().wait(self.id, cx);
                    return Poll::Pending;
                }
            },
            _ => Ok(Some(count)),
        })
    }

    /// Waits for something and takes all there is, as many pieces as `pieces` has places for. `None`: the stream has ended.
    pub async fn read(&mut self, pieces: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        poll_fn(|cx| self.poll_pieces(cx, pieces, usize::MAX)).await
    }

    pub async fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), ReadExactError> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut piece = [Bytes::new()];
            let room = bytes.len() - filled;
            if poll_fn(|cx| self.poll_pieces(cx, &mut piece, room))
                .await?
                .is_none()
            {
                return Err(ReadExactError::FinishedEarly(filled));
            }
            let [piece] = piece;
            bytes[filled..filled + piece.len()].copy_from_slice(&piece);
            filled += piece.len();
        }
        Ok(())
    }

    /// The peer need not send anything more.
    pub fn stop(&mut self, code: VarInt) -> Result<(), ClosedStream> {
        let inner = self.connection.inner();
        let mut proto = inner.proto.borrow_mut();
        proto.recv_stream(self.id).stop(code)?;
        drop(proto);
        inner.touch();
        inner.readers.borrow_mut().forget(self.id);
        self.over = true;
        Ok(())
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let inner = self.connection.inner();
        inner.readers.borrow_mut().forget(self.id);
        if self.over || inner.has_ended() {
            return;
        }
        let mut proto = inner.proto.borrow_mut();
        // It may have ended unread.
        let _ = proto.recv_stream(self.id).stop(VarInt::from_u32(0));
        drop(proto);
        inner.touch();
    }
}
