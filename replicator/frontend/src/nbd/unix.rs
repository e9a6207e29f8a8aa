//! A Unix socket that is watched for what to do next, and for nothing else.

use rustix::net::SendFlags;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The socket of one client.
///
/// The kernel tells whoever watches a Unix socket for room that there is room after every answer the client takes. That would wake
/// this thread once more for each request, so room is watched for only while a send waits for it.
pub(super) struct Socket {
    stream: AsyncFd<UnixStream>,
    /// A second descriptor, while a send waits for room.
    room: Option<AsyncFd<UnixStream>>,
}

fn watch(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: the stream owns its descriptor, which stays open and the same until the `AsyncFd` around it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(stream, interest) }?)
}

impl Socket {
    /// # Errors
    /// No more descriptors can be watched.
    pub fn new(stream: tokio::net::UnixStream) -> io::Result<Self> {
        Ok(Socket {
            stream: watch(stream.into_std()?, Interest::READABLE)?,
            room: None,
        })
    }

    fn send(
        &mut self,
        cx: &mut Context<'_>,
        mut send: impl FnMut(&UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(room) = &self.room {
                ready!(room.poll_write_ready(cx))?.clear_ready();
            }
            match send(self.stream.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.room.is_none() {
                        let second = self.stream.get_ref().try_clone()?;
                        self.room = Some(watch(second, Interest::WRITABLE)?);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => {
                    self.room = None;
                    return Poll::Ready(sent);
                }
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let asked = target.remaining();
        loop {
            let mut guard = ready!(self.stream.poll_read_ready(cx))?;
            let mut stream = self.stream.get_ref();
            match stream.read(target.initialize_unfilled()) {
                Ok(count) => {
                    target.advance(count);
                    // It took all there was; what comes from now on is a new edge. Nothing at all is the end, which stays.
                    if count > 0 && count < asked {
                        guard.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().send(cx, |mut stream| stream.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().send(cx, |mut stream| match slices {
            // Most answers are one piece, and this is the shorter way through the kernel.
            [one] => Ok(rustix::net::send(stream, one, SendFlags::NOSIGNAL)?),
            several => stream.write_vectored(several),
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ours = tokio::net::UnixStream::from_std(ours).unwrap();
        (Socket::new(ours).unwrap(), theirs)
    }

    /// Whatever the sizes of what comes and of what is asked for, nothing is left lying, and the end is seen.
    #[tokio::test(flavor = "current_thread")]
    async fn everything_that_comes_wakes_the_reader() {
        let (mut ours, mut theirs) = pair();
        for (sent, room) in [(1, 64), (64, 64), (65, 64), (200, 64), (10, 10), (3, 4096)] {
            theirs.write_all(&vec![9; sent]).unwrap();
            let mut got = 0;
            while got < sent {
                let mut memory = vec![0; room];
                got += timeout(PATIENCE, ours.read(&mut memory))
                    .await
                    .expect("bytes wait in the socket")
                    .unwrap();
            }
            assert_eq!(got, sent);
            let mut memory = [0; 16];
            let mut memory = ReadBuf::new(&mut memory);
            let mut cx = Context::from_waker(std::task::Waker::noop());
            assert!(
                Pin::new(&mut ours)
                    .poll_read(&mut cx, &mut memory)
                    .is_pending()
            );
        }
        theirs.write_all(&[1; 5]).unwrap();
        drop(theirs);
        let mut rest = Vec::new();
        timeout(PATIENCE, ours.read_to_end(&mut rest))
            .await
            .expect("the end is seen")
            .unwrap();
        assert_eq!(rest, [1; 5]);
    }

    /// A client that takes nothing holds up the sender, which goes on once there is room and then watches for none.
    #[tokio::test(flavor = "current_thread")]
    async fn a_full_socket_waits_for_room() {
        let (mut ours, mut theirs) = pair();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut sent = 0;
        while let Poll::Ready(count) = Pin::new(&mut ours).poll_write(&mut cx, &[7; 4096]) {
            sent += count.unwrap();
        }
        assert!(ours.room.is_some());
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all.len()
        });
        let more = poll_fn(|cx| Pin::new(&mut ours).poll_write(cx, &[7; 4096]));
        sent += timeout(PATIENCE, more)
            .await
            .expect("there is room")
            .unwrap();
        assert!(ours.room.is_none());
        ours.shutdown().await.unwrap();
        assert_eq!(reader.join().unwrap(), sent);
    }
}
