//! A client that says exactly what a test wants it to say.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use holdfast_frontend::nbd::wire::{
    CHUNK_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, RequestHeader, SIMPLE_REPLY_MAGIC, option,
    option_reply,
};

/// One option reply.
#[derive(Debug)]
pub struct OptionReply {
    pub kind: u32,
    pub data: Vec<u8>,
}

/// One reply; a structured one is a single chunk.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    /// The message of a structured error.
    pub message: String,
    pub data: Vec<u8>,
}

pub struct Client<S> {
    pub stream: S,
    pub structured: bool,
}

pub fn header(command: u16, cookie: u64, offset: u64, length: u32) -> RequestHeader {
    RequestHeader {
        flags: 0,
        command,
        cookie,
        offset,
        length,
    }
}

impl Client<UnixStream> {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("connect");
        // A lost answer fails the test instead of hanging it.
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("time-out");
        Client::greet(stream)
    }

    /// Connected and in the transmission phase of `disk`.
    pub fn open(socket: &Path, structured: bool) -> Self {
        let mut client = Self::connect(socket);
        if structured {
            client.structured_replies();
        }
        client.go("disk", &[]);
        client
    }
}

impl<S: Read + Write> Client<S> {
    pub fn greet(mut stream: S) -> Self {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes()).expect("flags");
        Client {
            stream,
            structured: false,
        }
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let length = data.len() as u32;
        let head = OptionHeader { option, length }.encode();
        self.stream.write_all(&head).expect("option");
        self.stream.write_all(data).expect("option data");
    }

    pub fn option_reply(&mut self, option: u32) -> OptionReply {
        let mut head = [0; 20];
        self.stream.read_exact(&mut head).expect("option reply");
        assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        assert_eq!(head[8..12], option.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let mut data = vec![0; word(16) as usize];
        self.stream.read_exact(&mut data).expect("reply data");
        OptionReply {
            kind: word(12),
            data,
        }
    }

    /// All replies to one option; the last is its acknowledgement or error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply(option);
            let last = reply.kind == option_reply::ACK || reply.kind & (1 << 31) != 0;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    pub fn structured_replies(&mut self) {
        let replies = self.option(option::STRUCTURED_REPLY, &[]);
        assert_eq!(replies[0].kind, option_reply::ACK);
        self.structured = true;
    }

    /// Opens `export`; returns its size and flags.
    pub fn go(&mut self, export: &str, infos: &[u16]) -> (u64, u16) {
        let replies = self.option(option::GO, &info_request(export, infos));
        let last = replies.last().expect("a reply");
        let text = String::from_utf8_lossy(&last.data).into_owned();
        assert_eq!(last.kind, option_reply::ACK, "{text}");
        let data = &replies[0].data;
        (
            u64::from_be_bytes(data[2..10].try_into().expect("8 bytes")),
            u16::from_be_bytes(data[10..12].try_into().expect("2 bytes")),
        )
    }

    pub fn send(&mut self, header: RequestHeader, payload: &[u8]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).expect("request");
    }

    /// `read`: how many bytes follow a simple reply without error.
    pub fn reply(&mut self, read: usize) -> Reply {
        let mut magic = [0; 4];
        self.stream.read_exact(&mut magic).expect("reply");
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => {
                let mut rest = [0; 12];
                self.stream.read_exact(&mut rest).expect("reply");
                let error = u32::from_be_bytes(rest[..4].try_into().expect("4 bytes"));
                let mut data = vec![0; if error == 0 { read } else { 0 }];
                self.stream.read_exact(&mut data).expect("data");
                Reply {
                    cookie: u64::from_be_bytes(rest[4..].try_into().expect("8 bytes")),
                    error,
                    message: String::new(),
                    data,
                }
            }
            CHUNK_MAGIC => {
                let mut rest = [0; 16];
                self.stream.read_exact(&mut rest).expect("chunk");
                assert_eq!(rest[..2], [0, 1], "one chunk per reply");
                let kind = u16::from_be_bytes([rest[2], rest[3]]);
                let cookie = u64::from_be_bytes(rest[4..12].try_into().expect("8 bytes"));
                let length = u32::from_be_bytes(rest[12..].try_into().expect("4 bytes"));
                let mut data = vec![0; length as usize];
                self.stream.read_exact(&mut data).expect("chunk data");
                let mut reply = Reply {
                    cookie,
                    error: 0,
                    message: String::new(),
                    data,
                };
                if kind & (1 << 15) != 0 {
                    let data = std::mem::take(&mut reply.data);
                    reply.error = u32::from_be_bytes(data[..4].try_into().expect("4 bytes"));
                    reply.message = String::from_utf8(data[6..].to_vec()).expect("UTF-8");
                } else if kind == 1 {
                    reply.data.drain(..8);
                }
                reply
            }
            other => panic!("not a reply: {other:#x}"),
        }
    }

    pub fn call(&mut self, header: RequestHeader, payload: &[u8]) -> Reply {
        self.send(header, payload);
        let read = if header.command == 0 {
            header.length as usize
        } else {
            0
        };
        let reply = self.reply(read);
        assert_eq!(reply.cookie, header.cookie);
        reply
    }

    /// The server closes the connection without another byte.
    pub fn expect_closed(&mut self) {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{} unexpected bytes", rest.len());
    }
}

/// The data of INFO and GO.
pub fn info_request(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}
