//! An NBD client of the tests' own: fixed newstyle, simple replies, many requests in flight. It shares no code with the
//! server under test, and it keeps what was not answered, since that is what a crash leaves undecided.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Largest read or write this client sends, in bytes.
pub const MAX_REQUEST: usize = 1 << 20;

const OPTION_GO: u32 = 7;
const FUA: u16 = 1;
/// WRITE_ZEROES: do not punch a hole.
const NO_HOLE: u16 = 2;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// Why there is no (good) answer.
#[derive(Debug)]
pub enum NbdError {
    /// The server does not offer this export; its words.
    Refused(String),
    /// The server carried the request out not at all, or not as far as it says: an NBD error number.
    Failed(u32),
    /// The connection broke; what is unanswered may or may not have happened.
    Broken(io::Error),
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        NbdError::Broken(error)
    }
}

impl std::fmt::Display for NbdError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NbdError::Refused(reason) => write!(f, "refused: {reason}"),
            NbdError::Failed(code) => write!(f, "NBD error {code}"),
            NbdError::Broken(error) => write!(f, "the connection broke: {error}"),
        }
    }
}

impl std::error::Error for NbdError {}

fn strange(what: &str) -> NbdError {
    NbdError::Broken(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()))
}

/// The answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// What the submission returned.
    pub cookie: u64,
    /// Data of a read, empty otherwise; or the NBD error number.
    pub result: Result<Vec<u8>, u32>,
}

/// One connection to one export.
pub struct Nbd {
    stream: BufReader<UnixStream>,
    size: u64,
    flags: u16,
    next: u64,
    /// Unanswered requests, and the bytes that each brings back.
    unanswered: std::collections::HashMap<u64, usize>,
}

impl Nbd {
    /// Opens `export` on a server's Unix socket. No single wait takes longer than `timeout` afterwards.
    ///
    /// # Errors
    /// Nobody listens, or the export is refused.
    pub fn connect(socket: &Path, export: &str, timeout: Duration) -> Result<Nbd, NbdError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut nbd = Nbd {
            stream: BufReader::with_capacity(256 << 10, stream),
            size: 0,
            flags: 0,
            next: 1,
            unanswered: std::collections::HashMap::new(),
        };
        nbd.negotiate(export)?;
        Ok(nbd)
    }

    fn negotiate(&mut self, export: &str) -> Result<(), NbdError> {
        if &self.array::<16>()? != b"NBDMAGICIHAVEOPT" {
            return Err(strange("not the greeting of NBD"));
        }
        let _handshake_flags = self.array::<2>()?;
        let name = export.as_bytes();
        // Fixed newstyle, no zeroes.
        let mut message = 3u32.to_be_bytes().to_vec();
        message.extend(b"IHAVEOPT");
        message.extend(OPTION_GO.to_be_bytes());
        message.extend((name.len() as u32 + 6).to_be_bytes());
        message.extend((name.len() as u32).to_be_bytes());
        message.extend(name);
        message.extend(0u16.to_be_bytes());
        self.stream.get_mut().write_all(&message)?;
        loop {
            let head = self.array::<20>()?;
            let kind = u32::from_be_bytes(head[12..16].try_into().expect("4 bytes"));
            let length = u32::from_be_bytes(head[16..].try_into().expect("4 bytes"));
            if length > 64 << 10 {
                return Err(strange("an option reply of more than 64 KiB"));
            }
            let mut body = vec![0; length as usize];
            self.stream.read_exact(&mut body)?;
            match kind {
                1 if self.size > 0 => return Ok(()),
                1 => return Err(strange("the size of the export was not told")),
                3 if body.len() >= 12 && body[..2] == [0, 0] => {
                    self.size = u64::from_be_bytes(body[2..10].try_into().expect("8 bytes"));
                    self.flags = u16::from_be_bytes([body[10], body[11]]);
                }
                3 => {}
                _ => return Err(NbdError::Refused(String::from_utf8_lossy(&body).into())),
            }
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether a flush on one connection covers what was answered on the others.
    pub fn can_multi_conn(&self) -> bool {
        self.flags & (1 << 8) != 0
    }

    /// Requests that were sent, in part or whole, and not answered.
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// # Errors
    /// The connection broke.
    pub fn submit_read(&mut self, offset: u64, length: usize) -> Result<u64, NbdError> {
        self.submit(0, READ, offset, length, &[])
    }

    /// # Errors
    /// The connection broke; this write, too, may or may not have happened.
    pub fn submit_write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<u64, NbdError> {
        self.submit(if fua { FUA } else { 0 }, WRITE, offset, data.len(), data)
    }

    /// # Errors
    /// The connection broke; this, too, may or may not have happened.
    pub fn submit_zeroes(
        &mut self,
        offset: u64,
        length: usize,
        may_punch: bool,
    ) -> Result<u64, NbdError> {
        let flags = if may_punch { 0 } else { NO_HOLE };
        self.submit(flags, WRITE_ZEROES, offset, length, &[])
    }

    /// # Errors
    /// The connection broke.
    pub fn submit_flush(&mut self) -> Result<u64, NbdError> {
        self.submit(0, FLUSH, 0, 0, &[])
    }

    fn submit(
        &mut self,
        flags: u16,
        kind: u16,
        offset: u64,
        length: usize,
        data: &[u8],
    ) -> Result<u64, NbdError> {
        let cookie = self.next;
        self.next += 1;
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend(0x2560_9513u32.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend((length as u32).to_be_bytes());
        message.extend(data);
        // Before it is sent: half a request sent is a request in flight.
        self.unanswered
            .insert(cookie, if kind == READ { length } else { 0 });
        self.stream.get_mut().write_all(&message)?;
        Ok(cookie)
    }

    /// Waits for the next answer, in whatever order they come.
    ///
    /// # Errors
    /// The connection broke. An error that the server answered is in the reply.
    pub fn receive(&mut self) -> Result<Reply, NbdError> {
        let head = self.array::<16>()?;
        if head[..4] != 0x6744_6698u32.to_be_bytes() {
            return Err(strange("not a simple reply"));
        }
        let code = u32::from_be_bytes(head[4..8].try_into().expect("4 bytes"));
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("8 bytes"));
        let Some(length) = self.unanswered.remove(&cookie) else {
            return Err(strange("an answer to a request that was not sent"));
        };
        if code != 0 {
            return Ok(Reply {
                cookie,
                result: Err(code),
            });
        }
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(Reply {
            cookie,
            result: Ok(data),
        })
    }

    fn alone(&mut self, cookie: u64) -> Result<Vec<u8>, NbdError> {
        let reply = self.receive()?;
        assert_eq!(reply.cookie, cookie, "nothing else was in flight");
        reply.result.map_err(NbdError::Failed)
    }

    /// Reads any length. Nothing else may be in flight, here and below.
    ///
    /// # Errors
    /// The server failed it or the connection broke.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, NbdError> {
        let mut data = Vec::with_capacity(length);
        while data.len() < length {
            let piece = (length - data.len()).min(MAX_REQUEST);
            let cookie = self.submit_read(offset + data.len() as u64, piece)?;
            data.extend(self.alone(cookie)?);
        }
        Ok(data)
    }

    /// Writes any length.
    ///
    /// # Errors
    /// The server failed it or the connection broke.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        for (index, piece) in data.chunks(MAX_REQUEST).enumerate() {
            let cookie = self.submit_write(offset + (index * MAX_REQUEST) as u64, piece, false)?;
            self.alone(cookie)?;
        }
        Ok(())
    }

    /// Writes once (at most [`MAX_REQUEST`]), durable when answered.
    ///
    /// # Errors
    /// The server failed it or the connection broke.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let cookie = self.submit_write(offset, data, true)?;
        self.alone(cookie).map(drop)
    }

    /// # Errors
    /// The server failed it or the connection broke.
    pub fn zero(&mut self, offset: u64, length: usize, may_punch: bool) -> Result<(), NbdError> {
        let cookie = self.submit_zeroes(offset, length, may_punch)?;
        self.alone(cookie).map(drop)
    }

    /// # Errors
    /// The server failed it or the connection broke.
    pub fn trim(&mut self, offset: u64, length: usize) -> Result<(), NbdError> {
        let cookie = self.submit(0, TRIM, offset, length, &[])?;
        self.alone(cookie).map(drop)
    }

    /// Makes every answered write durable.
    ///
    /// # Errors
    /// The server failed it or the connection broke.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        let cookie = self.submit_flush()?;
        self.alone(cookie).map(drop)
    }

    /// Says goodbye; the server closes.
    pub fn disconnect(mut self) {
        // The server may be gone, which is as good.
        let _ = self.submit(0, DISCONNECT, 0, 0, &[]);
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
