//! Option haggling: from the first byte to an opened export, without I/O.

use std::rc::Rc;

use crate::volume::{ClientInfo, ExportError, ExportInfo, Exports, Volume};

use super::check::Negotiated;
use super::wire::{
    self, BASE_ALLOCATION, BASE_ALLOCATION_ID, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES,
    OPTION_HEADER_BYTES, OptionData, OptionHeader, export_flag, info, option, option_reply,
    put_option_reply,
};

/// Data of one option that is looked at, in bytes. Two strings of the maximum length fit many times.
pub const MAX_OPTION_BYTES: u32 = 64 << 10;
/// A longer option is skipped and answered with "too big"; beyond this the connection is closed.
pub const MAX_SKIPPED_OPTION_BYTES: u32 = 1 << 20;
/// Input a caller must be able to hold for [`Handshake::step`] to make progress, in bytes.
pub const INPUT_BYTES: usize = OPTION_HEADER_BYTES + MAX_OPTION_BYTES as usize;
/// Options a client may send before it opens an export; a client that only asks is not worth a connection.
const MAX_OPTIONS: u32 = 4096;

/// What TLS means for this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsState {
    /// Not configured, or pointless (a Unix socket).
    Unavailable,
    /// The client may start it.
    Offered,
    /// The client must start it before anything else.
    Required,
    /// Running.
    Active,
}

/// Why a handshake cannot go on. The connection is closed; where the protocol allows it the client was told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("the client set handshake flags this server does not know: {0:#x}")]
    UnknownFlags(u32),
    #[error("not an NBD option: its magic number is wrong")]
    BadMagic,
    #[error("an option of {0} bytes, where at most {MAX_SKIPPED_OPTION_BYTES} are skipped")]
    OptionTooBig(u32),
    #[error("more than {MAX_OPTIONS} options without opening an export")]
    TooManyOptions,
    #[error("export {name:?} was not opened: {reason}")]
    NotOpened { name: String, reason: String },
    #[error("the client tried to open an export without TLS, which it must start first")]
    TlsRequired,
    #[error("the client sent bytes between its request for TLS and the TLS handshake")]
    BytesBeforeTls,
}

/// An export this client may use from now on.
pub struct Opened<V> {
    pub name: String,
    pub volume: Rc<V>,
    pub negotiated: Negotiated,
}

/// What the caller does after it has sent the output.
pub enum Step<V> {
    /// Call again with more input.
    Continue,
    /// Run the TLS handshake, then go on over TLS with [`Handshake::tls_started`].
    StartTls,
    /// The transmission phase begins; the rest of the input belongs to it.
    Open(Opened<V>),
    /// The client said goodbye.
    Close,
}

enum State {
    Flags,
    Options,
    /// This much of an option that is too big is still to come.
    Skip {
        option: u32,
        left: u32,
    },
}

/// One connection's handshake.
pub struct Handshake {
    state: State,
    client: ClientInfo,
    tls: TlsState,
    no_zeroes: bool,
    structured: bool,
    /// The export for which the client chose `base:allocation`.
    allocation_of: Option<String>,
    options: u32,
}

impl Handshake {
    /// Appends the greeting to `out`.
    pub fn new(client: ClientInfo, tls: TlsState, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&wire::greeting());
        Handshake {
            state: State::Flags,
            client,
            tls,
            no_zeroes: false,
            structured: false,
            allocation_of: None,
            options: 0,
        }
    }

    /// TLS is up. What was settled in the clear is forgotten: somebody in the middle may have said it.
    pub fn tls_started(&mut self, certificate: Option<Vec<u8>>) {
        self.tls = TlsState::Active;
        self.client.tls = true;
        self.client.certificate = certificate;
        self.structured = false;
        self.allocation_of = None;
    }

    /// Takes what it can from `input`, appends answers to `out`. Returns how many bytes it took and what to do.
    /// 0 bytes with [`Step::Continue`] means: not enough input. Handles at most one option per call, so that the
    /// output of one call is bounded.
    pub fn step<E: Exports>(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        exports: &E,
    ) -> Result<(usize, Step<E::Volume>), HandshakeError> {
        match self.state {
            State::Flags => {
                let Some(bytes) = input.first_chunk::<4>() else {
                    return Ok((0, Step::Continue));
                };
                let flags = u32::from_be_bytes(*bytes);
                if flags & !(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                    return Err(HandshakeError::UnknownFlags(flags));
                }
                self.no_zeroes = flags & FLAG_NO_ZEROES != 0;
                self.state = State::Options;
                Ok((4, Step::Continue))
            }
            State::Skip { option, left } => {
                let taken = input.len().min(left as usize);
                let left = left - taken as u32;
                self.state = State::Skip { option, left };
                if left == 0 {
                    self.state = State::Options;
                    refuse(
                        out,
                        option,
                        option_reply::ERR_TOO_BIG,
                        "the option is too big",
                    );
                }
                Ok((taken, Step::Continue))
            }
            State::Options => self.option(input, out, exports),
        }
    }

    fn option<E: Exports>(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        exports: &E,
    ) -> Result<(usize, Step<E::Volume>), HandshakeError> {
        let Some(head) = input.first_chunk::<OPTION_HEADER_BYTES>() else {
            return Ok((0, Step::Continue));
        };
        let Some(OptionHeader { option, length }) = OptionHeader::decode(head) else {
            return Err(HandshakeError::BadMagic);
        };
        if length > MAX_OPTION_BYTES {
            if length > MAX_SKIPPED_OPTION_BYTES || option == option::EXPORT_NAME {
                return Err(HandshakeError::OptionTooBig(length));
            }
            self.count_option()?;
            self.state = State::Skip {
                option,
                left: length,
            };
            return Ok((OPTION_HEADER_BYTES, Step::Continue));
        }
        let end = OPTION_HEADER_BYTES + length as usize;
        let Some(data) = input.get(OPTION_HEADER_BYTES..end) else {
            return Ok((0, Step::Continue));
        };
        self.count_option()?;
        if self.tls == TlsState::Required {
            match option {
                option::STARTTLS | option::ABORT => {}
                option::EXPORT_NAME => return Err(HandshakeError::TlsRequired),
                _ => {
                    let message = "start TLS first";
                    refuse(out, option, option_reply::ERR_TLS_REQUIRED, message);
                    return Ok((end, Step::Continue));
                }
            }
        }
        let step = match option {
            option::ABORT => {
                put_option_reply(out, option, option_reply::ACK, &[]);
                Step::Close
            }
            option::EXPORT_NAME => self.export_name(data, out, exports)?,
            option::INFO | option::GO => self.info_or_go(option, data, out, exports),
            option::STARTTLS => {
                let step = self.start_tls(data, out);
                if matches!(step, Step::StartTls) && input.len() > end {
                    return Err(HandshakeError::BytesBeforeTls);
                }
                step
            }
            option::LIST => {
                if data.is_empty() {
                    exports.list(&self.client, &mut |name, description| {
                        let length = (name.len() as u32).to_be_bytes();
                        let parts: [&[u8]; 3] = [&length, name.as_bytes(), description.as_bytes()];
                        put_option_reply(out, option, option_reply::SERVER, &parts);
                    });
                    put_option_reply(out, option, option_reply::ACK, &[]);
                } else {
                    invalid(out, option, "the option takes no data");
                }
                Step::Continue
            }
            option::STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.structured = true;
                    put_option_reply(out, option, option_reply::ACK, &[]);
                } else {
                    invalid(out, option, "the option takes no data");
                }
                Step::Continue
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out, exports);
                Step::Continue
            }
            _ => {
                let message = "this server does not know the option";
                refuse(out, option, option_reply::ERR_UNSUPPORTED, message);
                Step::Continue
            }
        };
        Ok((end, step))
    }

    fn count_option(&mut self) -> Result<(), HandshakeError> {
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(HandshakeError::TooManyOptions);
        }
        Ok(())
    }

    fn start_tls<V>(&mut self, data: &[u8], out: &mut Vec<u8>) -> Step<V> {
        let option = option::STARTTLS;
        match self.tls {
            _ if !data.is_empty() => invalid(out, option, "the option takes no data"),
            TlsState::Active => invalid(out, option, "TLS is already running"),
            TlsState::Unavailable => refuse(
                out,
                option,
                option_reply::ERR_POLICY,
                "TLS is not configured for this socket",
            ),
            TlsState::Offered | TlsState::Required => {
                put_option_reply(out, option, option_reply::ACK, &[]);
                return Step::StartTls;
            }
        }
        Step::Continue
    }

    fn open<E: Exports>(
        &self,
        name: &str,
        exports: &E,
    ) -> Result<(Rc<E::Volume>, ExportInfo), ExportError> {
        let volume = exports.open(name, &self.client)?;
        if let Some(reason) = volume.close_signal().reason() {
            return Err(ExportError::Refused(reason.as_str().to_owned()));
        }
        let info = volume.info();
        if let Some(defect) = info.defect() {
            tracing::error!(export = name, defect, "export cannot be offered");
            return Err(ExportError::Refused(defect.to_owned()));
        }
        Ok((volume, info))
    }

    fn negotiated(&self, name: &str, info: &ExportInfo, client_knows_sizes: bool) -> Negotiated {
        Negotiated {
            client_knows_sizes,
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
            ..Negotiated::new(info)
        }
    }

    /// The old way in: no errors, no information, only an export or a closed connection.
    fn export_name<E: Exports>(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &E,
    ) -> Result<Step<E::Volume>, HandshakeError> {
        let Some(name) = wire::string(data) else {
            return Err(HandshakeError::NotOpened {
                name: String::from_utf8_lossy(&data[..data.len().min(64)]).into_owned(),
                reason: "not a valid name".to_owned(),
            });
        };
        let (volume, info) =
            self.open(name, exports)
                .map_err(|error| HandshakeError::NotOpened {
                    name: name.to_owned(),
                    reason: error.to_string(),
                })?;
        out.extend_from_slice(&info.size.to_be_bytes());
        out.extend_from_slice(&export_flags(&info, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Step::Open(Opened {
            name: name.to_owned(),
            volume,
            negotiated: self.negotiated(name, &info, false),
        }))
    }

    fn info_or_go<E: Exports>(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &E,
    ) -> Step<E::Volume> {
        let Some((name, wanted)) = parse_info(data) else {
            invalid(out, option, "malformed");
            return Step::Continue;
        };
        let (volume, info) = match self.open(name, exports) {
            Ok(opened) => opened,
            Err(error) => {
                not_opened(out, option, &error);
                return Step::Continue;
            }
        };
        let reply = |out: &mut Vec<u8>, kind: u16, parts: [&[u8]; 3]| {
            let kind = kind.to_be_bytes();
            let parts: [&[u8]; 4] = [&kind, parts[0], parts[1], parts[2]];
            put_option_reply(out, option, option_reply::INFO, &parts);
        };
        let flags = export_flags(&info, self.structured).to_be_bytes();
        reply(out, info::EXPORT, [&info.size.to_be_bytes(), &flags, &[]]);
        if wanted.name {
            reply(out, info::NAME, [name.as_bytes(), &[], &[]]);
        }
        if wanted.description && !info.description.is_empty() {
            reply(
                out,
                info::DESCRIPTION,
                [info.description.as_bytes(), &[], &[]],
            );
        }
        if wanted.block_size {
            let sizes = info.block_sizes;
            let [minimum, preferred, maximum] =
                [sizes.minimum, sizes.preferred, sizes.maximum].map(u32::to_be_bytes);
            reply(out, info::BLOCK_SIZE, [&minimum, &preferred, &maximum]);
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
        if option == option::INFO {
            return Step::Continue;
        }
        Step::Open(Opened {
            name: name.to_owned(),
            volume,
            negotiated: self.negotiated(name, &info, wanted.block_size),
        })
    }

    fn meta_context<E: Exports>(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
        exports: &E,
    ) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Also when this one fails: a client must not go on with contexts it meant to replace.
            self.allocation_of = None;
        }
        if !self.structured {
            return invalid(out, option, "negotiate structured replies first");
        }
        let Some((name, chosen)) = parse_meta_context(data, set) else {
            return invalid(out, option, "malformed");
        };
        if let Err(error) = self.open(name, exports) {
            return not_opened(out, option, &error);
        }
        if chosen {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let parts: [&[u8]; 2] = [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()];
            put_option_reply(out, option, option_reply::META_CONTEXT, &parts);
            if set {
                self.allocation_of = Some(name.to_owned());
            }
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
    }
}

#[derive(Default)]
struct WantedInfo {
    name: bool,
    description: bool,
    block_size: bool,
}

fn parse_info(data: &[u8]) -> Option<(&str, WantedInfo)> {
    let mut data = OptionData(data);
    let name = data.string()?;
    let count = data.u16()?;
    let mut wanted = WantedInfo::default();
    for _ in 0..count {
        match data.u16()? {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            info::BLOCK_SIZE => wanted.block_size = true,
            _ => {}
        }
    }
    data.is_empty().then_some((name, wanted))
}

/// The export's name, and whether a query asks for `base:allocation`.
fn parse_meta_context(data: &[u8], set: bool) -> Option<(&str, bool)> {
    let mut data = OptionData(data);
    let name = data.string()?;
    let count = data.u32()?;
    // To list without a question is to ask for everything.
    let mut chosen = !set && count == 0;
    for _ in 0..count {
        let query = data.string()?;
        chosen |= query == BASE_ALLOCATION || (!set && query == "base:");
    }
    data.is_empty().then_some((name, chosen))
}

fn export_flags(info: &ExportInfo, structured: bool) -> u16 {
    let on = |condition: bool, flag: u16| if condition { flag } else { 0 };
    let writable = !info.read_only;
    export_flag::HAS_FLAGS
        | export_flag::FLUSH
        | export_flag::FUA
        | on(info.read_only, export_flag::READ_ONLY)
        | on(info.rotational, export_flag::ROTATIONAL)
        | on(writable && info.discard, export_flag::TRIM)
        | on(writable, export_flag::WRITE_ZEROES)
        | on(writable && info.fast_zero, export_flag::FAST_ZERO)
        | on(structured, export_flag::DF)
        | on(info.multi_conn, export_flag::MULTI_CONN)
        | on(info.cache, export_flag::CACHE)
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    put_option_reply(out, option, kind, &[message.as_bytes()]);
}

fn invalid(out: &mut Vec<u8>, option: u32, message: &str) {
    refuse(out, option, option_reply::ERR_INVALID, message);
}

fn not_opened(out: &mut Vec<u8>, option: u32, error: &ExportError) {
    let kind = match error {
        ExportError::Unknown(_) => option_reply::ERR_UNKNOWN,
        ExportError::Refused(_) => option_reply::ERR_POLICY,
        ExportError::ShuttingDown(_) => option_reply::ERR_SHUTDOWN,
    };
    refuse(out, option, kind, &error.to_string());
}
