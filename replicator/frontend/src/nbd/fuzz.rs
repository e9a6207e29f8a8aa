//! Entry points for fuzzing: arbitrary bytes against the whole protocol, with a volume that answers late, in
//! another order, or not at all. No I/O and no clock, so a finding replays from its input alone.

use std::cell::RefCell;
use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::close::{CloseReason, CloseSignal};
use crate::completion::Completion;
use crate::error::{IoError, IoErrorKind};
use crate::volume::{
    BlockSizes, Buffer, ClientInfo, ExportError, ExportInfo, Exports, Extent, Output, Peer,
    Request, Volume,
};

use super::check::Negotiated;
use super::handshake::{self, Handshake, Opened, Step, TlsState};
use super::session::Session;
use super::settings::{Limits, Stats};

const SIZE: u64 = 1 << 30;

/// What one run did, for bounds that a property test checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The client's bytes opened an export.
    pub opened: bool,
    /// The client broke the protocol and was cut off.
    pub cut_off: bool,
    /// The most requests that were open at once, unsent answers included.
    pub most_requests: usize,
    /// The most payload bytes that were in flight at once.
    pub most_bytes_in_flight: u64,
    /// The most memory the volume had to lend at once.
    pub most_buffer_bytes: u64,
    /// Bytes answered in all.
    pub answered: u64,
}

/// The limits of every run.
pub fn limits() -> Limits {
    Limits {
        max_requests_in_flight: 8,
        max_bytes_in_flight: 1 << 20,
        ..Limits::default()
    }
}

#[derive(Default)]
struct State {
    /// Steers the volume; changes with every use.
    dice: u64,
    pending: Vec<(Request<Lent>, Completion<Lent>)>,
}

#[derive(Default)]
struct Ledger {
    lent: u64,
    most: u64,
}

struct Lent {
    bytes: Vec<u8>,
    ledger: Rc<RefCell<Ledger>>,
}

impl Lent {
    fn new(len: u32, ledger: &Rc<RefCell<Ledger>>) -> Self {
        let mut sums = ledger.borrow_mut();
        sums.lent += u64::from(len);
        sums.most = sums.most.max(sums.lent);
        Lent {
            bytes: vec![0; len as usize],
            ledger: Rc::clone(ledger),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.ledger.borrow_mut().lent -= self.bytes.len() as u64;
    }
}

impl Buffer for Lent {
    fn as_slice(&self) -> &[u8] {
        &self.bytes
    }
    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

struct Fickle {
    state: RefCell<State>,
    ledger: Rc<RefCell<Ledger>>,
    close: CloseSignal,
}

impl Fickle {
    fn roll(&self, sides: u64) -> u64 {
        let mut state = self.state.borrow_mut();
        // xorshift: enough to take every branch, and the same on every run.
        state.dice ^= state.dice << 13;
        state.dice ^= state.dice >> 7;
        state.dice ^= state.dice << 17;
        state.dice % sides
    }

    fn finish_one(&self) -> bool {
        let pick = self.roll(64) as usize;
        let next = {
            let mut state = self.state.borrow_mut();
            if state.pending.is_empty() {
                return false;
            }
            let pick = pick % state.pending.len();
            state.pending.swap_remove(pick)
        };
        let (request, completion) = next;
        match request {
            // Dropped on purpose: the session must answer all the same.
            _ if self.roll(16) == 0 => drop(completion),
            _ if self.roll(16) == 0 => completion.fail(IoError::new(IoErrorKind::Io, "fuzzed")),
            Request::Read { len, .. } => {
                completion.complete(Ok(Output::Data(Lent::new(len, &self.ledger))));
            }
            Request::BlockStatus { .. } => {
                let count = self.roll(4);
                let extents = (0..count)
                    .map(|n| Extent {
                        len: n * 700,
                        hole: n % 2 == 0,
                        zero: n % 3 == 0,
                    })
                    .collect();
                completion.complete(Ok(Output::Extents(extents)));
            }
            _ => completion.done(),
        }
        true
    }
}

impl Volume for Fickle {
    type Buf = Lent;

    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: SIZE,
            read_only: self.roll(8) == 0,
            rotational: false,
            multi_conn: true,
            discard: true,
            fast_zero: true,
            cache: true,
            block_sizes: BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum: 1 << 20,
            },
            description: "fuzzed".into(),
        }
    }

    fn poll_buffer(&self, cx: &mut Context<'_>, _: u64, len: u32) -> Poll<Result<Lent, IoError>> {
        match self.roll(8) {
            0 => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            1 => Poll::Ready(Err(IoError::new(IoErrorKind::NoMemory, "fuzzed"))),
            _ => Poll::Ready(Ok(Lent::new(len, &self.ledger))),
        }
    }

    fn submit(&self, request: Request<Lent>, completion: Completion<Lent>) {
        self.state.borrow_mut().pending.push((request, completion));
        if self.roll(2) == 0 {
            self.finish_one();
        }
    }

    fn end_of_batch(&self) {
        for _ in 0..self.roll(4) {
            self.finish_one();
        }
    }

    fn close_signal(&self) -> &CloseSignal {
        &self.close
    }
}

struct OneExport(Rc<Fickle>);

impl Exports for OneExport {
    type Volume = Fickle;

    fn list(&self, _: &ClientInfo, each: &mut dyn FnMut(&str, &str)) {
        each("v", "fuzzed");
        each("v@3", "");
    }

    fn open(&self, name: &str, _: &ClientInfo) -> Result<Rc<Fickle>, ExportError> {
        match name {
            "" | "v" | "v@3" => Ok(Rc::clone(&self.0)),
            "v@2" => Err(ExportError::Refused("superseded".to_owned())),
            _ => Err(ExportError::Unknown("no such export".to_owned())),
        }
    }
}

/// Runs one connection on `data`. The first 8 bytes steer the volume, the cuts between reads, whether the handshake
/// is skipped and whether the export closes; the rest is what the client sends.
///
/// # Panics
///
/// Panics when the protocol code breaks one of its own rules: that is the finding.
pub fn fuzz_session(data: &[u8]) -> Outcome {
    let (seed, mut client_bytes) = match data.split_first_chunk::<8>() {
        Some((seed, rest)) => (u64::from_le_bytes(*seed), rest),
        None => (0, data),
    };
    let volume = Rc::new(Fickle {
        state: RefCell::new(State {
            dice: seed | 1,
            pending: Vec::new(),
        }),
        ledger: Rc::default(),
        close: CloseSignal::new(),
    });
    let mut outcome = Outcome::default();
    let opened = if seed & 1 == 0 {
        run_handshake(&volume, &mut client_bytes, &mut outcome)
    } else {
        Some(Opened {
            name: "v".to_owned(),
            volume: Rc::clone(&volume),
            negotiated: Negotiated {
                structured: seed & 2 != 0,
                allocation: seed & 6 == 6,
                client_knows_sizes: seed & 8 != 0,
                ..Negotiated::new(&volume.info())
            },
        })
    };
    if let Some(opened) = opened {
        outcome.opened = true;
        run_session(opened, &volume, client_bytes, &mut outcome);
    }
    outcome.most_buffer_bytes = volume.ledger.borrow().most;
    outcome
}

fn run_handshake(
    volume: &Rc<Fickle>,
    client_bytes: &mut &[u8],
    outcome: &mut Outcome,
) -> Option<Opened<Fickle>> {
    let exports = OneExport(Rc::clone(volume));
    let tls = match volume.roll(4) {
        0 => TlsState::Offered,
        1 => TlsState::Required,
        _ => TlsState::Unavailable,
    };
    let client = ClientInfo {
        peer: Peer::Unix { pid: None, uid: 0 },
        tls: false,
        certificate: None,
    };
    let mut out = Vec::new();
    let mut handshake = Handshake::new(client, tls, &mut out);
    let mut seen = 0;
    loop {
        let input = &client_bytes[..seen];
        assert!(
            input.len() <= handshake::INPUT_BYTES,
            "more input held than promised"
        );
        let step = handshake.step(input, &mut out, &exports);
        outcome.answered += out.len() as u64;
        out.clear();
        let (taken, step) = match step {
            Ok(taken_and_step) => taken_and_step,
            Err(_) => {
                outcome.cut_off = true;
                return None;
            }
        };
        *client_bytes = &client_bytes[taken..];
        seen -= taken;
        match step {
            Step::Continue if taken > 0 => {}
            Step::Continue => {
                let room = handshake::INPUT_BYTES - seen;
                assert!(
                    room > 0,
                    "a handshake that takes nothing from a full buffer"
                );
                let more = (client_bytes.len() - seen).min(room);
                if more == 0 {
                    return None;
                }
                seen += 1 + volume.roll(more as u64) as usize;
            }
            Step::StartTls => handshake.tls_started(None),
            Step::Open(opened) => return Some(opened),
            Step::Close => return None,
        }
    }
}

fn run_session(
    opened: Opened<Fickle>,
    volume: &Rc<Fickle>,
    mut client_bytes: &[u8],
    outcome: &mut Outcome,
) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut session = Session::new(opened, &limits(), Rc::<Stats>::default(), &[]);
    let closes = volume.roll(4) == 0;
    loop {
        if session.pump(&mut cx).is_err() {
            outcome.cut_off = true;
            return;
        }
        let requests = session.requests_in_flight() + session.unsent_answers();
        outcome.most_requests = outcome.most_requests.max(requests);
        outcome.most_bytes_in_flight = outcome.most_bytes_in_flight.max(session.bytes_in_flight());
        // A slow reader takes a little, sometimes.
        let sent = send(&mut session, volume.roll(3) * 3000);
        outcome.answered += sent;
        if session.is_finished() {
            return;
        }
        if closes && volume.roll(32) == 0 {
            volume.close.close(CloseReason::Superseded);
        }
        let mut moved = sent > 0 || volume.finish_one();
        if let Some(target) = session.read_target() {
            let most = target.len().min(client_bytes.len()) as u64;
            if most > 0 {
                let n = 1 + volume.roll(most) as usize;
                target[..n].copy_from_slice(&client_bytes[..n]);
                client_bytes = &client_bytes[n..];
                session.received(n);
                moved = true;
            }
        }
        if !moved && client_bytes.is_empty() {
            break;
        }
    }
    // The client is gone silent: everything it asked for must come to an end.
    for turn in 0.. {
        // The volume says "no memory" one time in eight; a session that still waits after this waits for ever.
        assert!(turn < 500, "a request never ends");
        while volume.finish_one() {}
        if session.pump(&mut cx).is_err() {
            outcome.cut_off = true;
            return;
        }
        let sent = send(&mut session, u64::MAX);
        outcome.answered += sent;
        let waits_for_memory = session.read_target().is_none() && !session.is_finished();
        if sent == 0 && volume.state.borrow().pending.is_empty() && !waits_for_memory {
            break;
        }
    }
    if !session.waits_for_client() {
        assert_eq!(session.requests_in_flight(), 0, "a request was lost");
        assert_eq!(session.bytes_in_flight(), 0, "a limit leaks");
    }
}

fn send(session: &mut Session<Fickle>, most: u64) -> u64 {
    let mut slices = [IoSlice::new(&[]); 16];
    let filled = session.gather(&mut slices);
    let total: u64 = slices[..filled]
        .iter()
        .map(|slice| slice.len() as u64)
        .sum();
    let n = total.min(most);
    if n > 0 {
        session.sent(n as usize);
    }
    n
}
