//! A small NBD client, so that the demo reaches volumes exactly as an application would: fixed newstyle handshake,
//! `NBD_OPT_GO`, simple replies, several requests in flight. Blocking; one connection belongs to one thread.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_FLAG_FUA: u16 = 1;

/// Largest read or write this client sends, in bytes.
pub const MAX_REQUEST: usize = 1 << 20;
/// An option reply of a server that means well is far smaller.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// Why an NBD request or connection failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error(
        "{uri} is no NBD address this program knows (nbd://host:port/export, nbd+unix:///export?socket=path)"
    )]
    Uri { uri: String },
    #[error("the NBD server could not be reached at {uri}: {source}")]
    Connect { uri: String, source: io::Error },
    #[error("the NBD server refused export {export:?}: {reason}")]
    Refused { export: String, reason: String },
    #[error("the NBD server answered with error {code} ({})", io::Error::from_raw_os_error(*code as i32))]
    Server { code: u32 },
    #[error("the NBD connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(String),
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(buffer),
            Stream::Unix(stream) => stream.write(buffer),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// What `submit_*` returned.
    pub cookie: u64,
    /// Data of a read, empty otherwise; or the server's refusal.
    pub result: Result<Vec<u8>, NbdError>,
}

/// One connection to one export.
pub struct NbdClient {
    stream: BufReader<Stream>,
    size: u64,
    flags: u16,
    next_cookie: u64,
    /// Bytes each unanswered request brings back.
    waiting: HashMap<u64, u32>,
}

impl NbdClient {
    /// Connects to `nbd://host:port/export` or `nbd+unix:///export?socket=path`. No single step of the
    /// conversation may then take longer than `timeout`.
    ///
    /// # Errors
    /// The address is none, nobody answers, or the export is refused.
    pub fn connect(uri: &str, timeout: Duration) -> Result<Self, NbdError> {
        let refused = |source| NbdError::Connect {
            uri: uri.to_string(),
            source,
        };
        let (stream, export) = if let Some(rest) = uri.strip_prefix("nbd://") {
            let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
            let address = authority
                .to_socket_addrs()
                .map_err(refused)?
                .next()
                .ok_or_else(|| NbdError::Uri {
                    uri: uri.to_string(),
                })?;
            let stream = TcpStream::connect_timeout(&address, timeout).map_err(refused)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            (Stream::Tcp(stream), export)
        } else if let Some((export, socket)) = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
        {
            let stream = UnixStream::connect(socket).map_err(refused)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            (Stream::Unix(stream), export)
        } else {
            return Err(NbdError::Uri {
                uri: uri.to_string(),
            });
        };
        let mut client = NbdClient {
            stream: BufReader::with_capacity(64 << 10, stream),
            size: 0,
            flags: 0,
            next_cookie: 1,
            waiting: HashMap::new(),
        };
        client.negotiate(export)?;
        Ok(client)
    }

    fn negotiate(&mut self, export: &str) -> Result<(), NbdError> {
        let greeting = [self.read_u64()?, self.read_u64()?];
        if greeting != [INIT_MAGIC, OPTION_MAGIC] {
            return Err(NbdError::Protocol("the greeting is not NBD's".into()));
        }
        let offered = self.read_u16()?;
        if offered & HANDSHAKE_FIXED_NEWSTYLE == 0 {
            return Err(NbdError::Protocol("no fixed newstyle handshake".into()));
        }
        let chosen = HANDSHAKE_FIXED_NEWSTYLE | (offered & HANDSHAKE_NO_ZEROES);
        let mut message = u32::from(chosen).to_be_bytes().to_vec();
        message.extend(OPTION_MAGIC.to_be_bytes());
        message.extend(OPTION_GO.to_be_bytes());
        message.extend((export.len() as u32 + 6).to_be_bytes());
        message.extend((export.len() as u32).to_be_bytes());
        message.extend(export.as_bytes());
        message.extend(0u16.to_be_bytes()); // No particular information is asked for.
        self.stream.get_mut().write_all(&message)?;
        let mut export_known = false;
        loop {
            if self.read_u64()? != OPTION_REPLY_MAGIC || self.read_u32()? != OPTION_GO {
                return Err(NbdError::Protocol(
                    "not an answer to the option sent".into(),
                ));
            }
            let kind = self.read_u32()?;
            let length = self.read_u32()?;
            if length > MAX_OPTION_REPLY {
                return Err(NbdError::Protocol(format!(
                    "an option reply of {length} bytes"
                )));
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            match kind {
                REPLY_ACK if export_known => return Ok(()),
                REPLY_ACK => {
                    return Err(NbdError::Protocol(
                        "the size of the export was not told".into(),
                    ));
                }
                REPLY_INFO if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    self.size = u64::from_be_bytes(data[2..10].try_into().unwrap_or_default());
                    self.flags = u16::from_be_bytes([data[10], data[11]]);
                    export_known = true;
                }
                REPLY_INFO => {}
                kind if kind & REPLY_ERROR_BIT != 0 => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    let reason = if text.is_empty() {
                        format!("error {kind:#x}")
                    } else {
                        text
                    };
                    return Err(NbdError::Refused {
                        export: export.to_string(),
                        reason,
                    });
                }
                kind => {
                    return Err(NbdError::Protocol(format!(
                        "an option reply of kind {kind}"
                    )));
                }
            }
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sends a read of 1 byte to [`MAX_REQUEST`].
    ///
    /// # Errors
    /// The connection broke; what is in flight may or may not have happened.
    pub fn submit_read(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        self.submit(COMMAND_READ, 0, offset, length, &[])
    }

    /// Sends a write; with `fua` the answer comes once it is durable.
    ///
    /// # Errors
    /// The connection broke; what is in flight, this write included, may or may not have happened.
    pub fn submit_write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<u64, NbdError> {
        let fua = fua && self.flags & FLAG_SEND_FUA != 0;
        let flags = if fua { COMMAND_FLAG_FUA } else { 0 };
        self.submit(COMMAND_WRITE, flags, offset, data.len() as u32, data)
    }

    fn submit(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<u64, NbdError> {
        assert!(
            length as usize <= MAX_REQUEST,
            "the caller splits larger requests"
        );
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(data);
        let back = if command == COMMAND_READ { length } else { 0 };
        // Before it is sent: half a request sent is a request in flight.
        self.waiting.insert(cookie, back);
        self.stream.get_mut().write_all(&message)?;
        Ok(cookie)
    }

    /// Waits for the next answer, in whatever order they come.
    ///
    /// # Errors
    /// The connection broke or nothing is in flight. A refusal by the server is in the reply instead.
    pub fn receive(&mut self) -> Result<Reply, NbdError> {
        if self.read_u32()? != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::Protocol("not a simple reply".into()));
        }
        let code = self.read_u32()?;
        let cookie = self.read_u64()?;
        let Some(length) = self.waiting.remove(&cookie) else {
            return Err(NbdError::Protocol(format!(
                "an answer to request {cookie}, never sent"
            )));
        };
        if code != 0 {
            return Ok(Reply {
                cookie,
                result: Err(NbdError::Server { code }),
            });
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(Reply {
            cookie,
            result: Ok(data),
        })
    }

    fn alone(&mut self, cookie: u64) -> Result<Vec<u8>, NbdError> {
        let reply = self.receive()?;
        assert_eq!(reply.cookie, cookie, "nothing else was in flight");
        reply.result
    }

    /// Reads any length, [`MAX_REQUEST`] at a time. Nothing else may be in flight.
    ///
    /// # Errors
    /// The server refused or the connection broke.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, NbdError> {
        let mut data = Vec::with_capacity(length);
        while data.len() < length {
            let piece = (length - data.len()).min(MAX_REQUEST);
            let cookie = self.submit_read(offset + data.len() as u64, piece as u32)?;
            data.extend(self.alone(cookie)?);
        }
        Ok(data)
    }

    /// Writes any length, [`MAX_REQUEST`] at a time. Nothing else may be in flight.
    ///
    /// # Errors
    /// The server refused or the connection broke.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        for (index, piece) in data.chunks(MAX_REQUEST).enumerate() {
            let cookie = self.submit_write(offset + (index * MAX_REQUEST) as u64, piece, false)?;
            self.alone(cookie)?;
        }
        Ok(())
    }

    /// Makes every answered write durable. Nothing else may be in flight.
    ///
    /// # Errors
    /// The server refused or the connection broke.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        if self.flags & FLAG_SEND_FLUSH == 0 {
            return Err(NbdError::Protocol("the export takes no FLUSH".into()));
        }
        let cookie = self.submit(COMMAND_FLUSH, 0, 0, 0, &[])?;
        self.alone(cookie).map(drop)
    }

    /// Says goodbye; the server closes.
    ///
    /// # Errors
    /// The connection broke before.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.submit(COMMAND_DISCONNECT, 0, 0, 0, &[]).map(drop)
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
    fn read_u16(&mut self) -> Result<u16, NbdError> {
        Ok(u16::from_be_bytes(self.read_array()?))
    }
    fn read_u32(&mut self) -> Result<u32, NbdError> {
        Ok(u32::from_be_bytes(self.read_array()?))
    }
    fn read_u64(&mut self) -> Result<u64, NbdError> {
        Ok(u64::from_be_bytes(self.read_array()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::qemu_nbd;

    const TIMEOUT: Duration = Duration::from_secs(10);

    #[test]
    fn what_is_written_is_read_back_over_unix_and_tcp() {
        for tcp in [false, true] {
            let Some(server) = qemu_nbd::serve(8 << 20, tcp) else {
                return;
            };
            let mut client = NbdClient::connect(server.uri(), TIMEOUT).unwrap();
            assert_eq!(client.size(), 8 << 20);
            let data: Vec<u8> = (0..3 << 20).map(|i: u32| ((i * 31) >> 3) as u8).collect();
            client.write(4096, &data).unwrap();
            client.flush().unwrap();
            assert!(client.read(4096, data.len()).unwrap() == data);
            client.disconnect().unwrap();
        }
    }

    #[test]
    fn many_requests_share_a_connection() {
        let Some(server) = qemu_nbd::serve(8 << 20, false) else {
            return;
        };
        let mut client = NbdClient::connect(server.uri(), TIMEOUT).unwrap();
        let writes: Vec<u64> = (0..16u64)
            .map(|i| {
                client
                    .submit_write(i * 4096, &[i as u8 + 1; 4096], i % 2 == 0)
                    .unwrap()
            })
            .collect();
        let mut answered: Vec<u64> = (0..16).map(|_| client.receive().unwrap().cookie).collect();
        answered.sort_unstable();
        assert_eq!(answered, writes);
        assert!(client.waiting.is_empty());
        for i in 0..16u64 {
            assert_eq!(client.read(i * 4096, 4096).unwrap(), [i as u8 + 1; 4096]);
        }
    }

    #[test]
    fn refusals_name_the_reason() {
        let Some(server) = qemu_nbd::serve(1 << 20, false) else {
            return;
        };
        let other = server.uri().replace("///data", "///other");
        let refused = NbdClient::connect(&other, TIMEOUT);
        assert!(matches!(refused, Err(NbdError::Refused { .. })));
        let mut client = NbdClient::connect(server.uri(), TIMEOUT).unwrap();
        let beyond = client.read(1 << 20, 4096);
        assert!(matches!(beyond, Err(NbdError::Server { .. })), "{beyond:?}");
        let none = NbdClient::connect("http://x", TIMEOUT);
        assert!(matches!(none, Err(NbdError::Uri { .. })));
    }
}
