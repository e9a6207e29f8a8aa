//! The transmission phase of one connection, without I/O.
//!
//! The caller moves bytes: into [`Session::read_target`], out of [`Session::gather`]; in between [`Session::pump`]
//! turns bytes into requests and completions into replies. In the steady state nothing is allocated but the
//! volume's own buffers.

use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::close::{CloseReason, CloseWatch};
use crate::completion::CompletionQueue;
use crate::error::IoError;
use crate::volume::{Buffer, MAX_REQUEST_BYTES, Output, Request, Volume};

use super::answer::{block_status, defect, shutting_down};
use super::check::{Negotiated, Plan, plan};
use super::handshake::Opened;
use super::outbox::{Body, Outbox};
use super::settings::{Limits, Stats, add};
use super::wire::{
    REQUEST_BYTES, ReplyHead, RequestHeader, chunk, command, error_number, error_payload,
};

/// The receive buffer: one read takes in a whole burst of small requests (32 writes of 4 KiB are 130 KiB).
pub const INPUT_BYTES: usize = 256 << 10;
/// After a large write's header only this much is read into the receive buffer, so that the next payload
/// goes straight into the volume's memory instead of being copied from here.
const SMALL_WINDOW: usize = 4 << 10;
/// Payloads from this size on count as large.
const LARGE_PAYLOAD: u32 = 64 << 10;
/// A payload's rest of at least this many bytes is read straight into the volume's buffer; for less, a read that
/// also takes in the requests behind it saves more than the copy costs.
const DIRECT_READ: usize = 16 << 10;
/// A refused write's payload is read and dropped up to this length; a longer one ends the connection.
pub const MAX_SKIPPED_PAYLOAD: u32 = 2 * MAX_REQUEST_BYTES;

/// Why a connection cannot go on: after this its bytes have no meaning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("not an NBD request: its magic number is wrong")]
    BadMagic,
    #[error(
        "a write of {0} bytes, where at most {MAX_REQUEST_BYTES} are taken and {MAX_SKIPPED_PAYLOAD} skipped"
    )]
    WriteTooBig(u32),
}

/// A request the volume has, or will have once its payload is here.
#[derive(Clone, Copy)]
struct Slot {
    used: bool,
    plan: Plan,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Slot {
    const FREE: Slot = Slot {
        used: false,
        plan: Plan::Nothing,
        cookie: 0,
        offset: 0,
        length: 0,
    };

    /// Payload bytes that count against the connection's limit.
    fn charge(&self) -> u64 {
        match self.plan {
            Plan::Read | Plan::Write { .. } => u64::from(self.length),
            _ => 0,
        }
    }
}

/// What the next received bytes are.
enum Receiving<B> {
    /// A request's header.
    Header,
    /// A write whose payload has no memory yet.
    Unbuffered { slot: u32, fua: bool },
    /// A write's payload.
    Payload {
        slot: u32,
        fua: bool,
        buffer: B,
        filled: usize,
    },
    /// A refused write's payload.
    Skip {
        left: u32,
        cookie: u64,
        error: IoError,
    },
    /// Nothing: the client said goodbye.
    Stopped,
}

/// One connection's transmission phase.
pub struct Session<V: Volume> {
    volume: Rc<V>,
    on: Negotiated,
    limits: Limits,
    stats: Rc<Stats>,
    queue: Rc<CompletionQueue<V::Buf>>,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Payload bytes of unanswered requests and unsent answers.
    bytes: u64,
    input: Box<[u8]>,
    start: usize,
    end: usize,
    window: usize,
    receiving: Receiving<V::Buf>,
    outbox: Outbox<V::Buf>,
    watch: CloseWatch,
    /// The export went away: everything is answered with this.
    closed: Option<CloseReason>,
}

impl<V: Volume> Session<V> {
    /// `rest`: bytes received after the handshake's last one; they must fit [`INPUT_BYTES`].
    pub fn new(opened: Opened<V>, limits: &Limits, stats: Rc<Stats>, rest: &[u8]) -> Self {
        let capacity = limits.max_requests_in_flight.clamp(1, 65_536);
        let mut input = vec![0; INPUT_BYTES].into_boxed_slice();
        input[..rest.len()].copy_from_slice(rest);
        Session {
            watch: opened.volume.close_signal().watch(),
            volume: opened.volume,
            on: opened.negotiated,
            limits: limits.clone(),
            stats,
            queue: CompletionQueue::new(capacity),
            slots: vec![Slot::FREE; capacity].into_boxed_slice(),
            free: (0..capacity as u32).rev().collect(),
            bytes: 0,
            input,
            start: 0,
            end: rest.len(),
            window: INPUT_BYTES,
            receiving: Receiving::Header,
            outbox: Outbox::new(capacity),
            closed: None,
        }
    }

    /// Where the next received bytes go; `None` while no more may be received (a limit, no memory, the end).
    pub fn read_target(&mut self) -> Option<&mut [u8]> {
        let mut window = self.window;
        let held_back = self.is_held_back();
        match &mut self.receiving {
            Receiving::Stopped | Receiving::Unbuffered { .. } => return None,
            // A complete header waits here: a limit holds it back.
            Receiving::Header if held_back => return None,
            Receiving::Payload { buffer, filled, .. } => {
                debug_assert!(self.start == self.end, "payload left in the receive buffer");
                let rest = &mut buffer.as_mut_slice()[*filled..];
                if rest.len() >= DIRECT_READ {
                    return Some(rest);
                }
                window = window.max(rest.len());
            }
            Receiving::Header | Receiving::Skip { .. } => {}
        }
        // What is left is less than a header: moving it costs nothing.
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = (self.end + window).min(INPUT_BYTES);
        Some(&mut self.input[self.end..limit])
    }

    /// The first `n` bytes of the last [`read_target`](Self::read_target) are filled.
    pub fn received(&mut self, n: usize) {
        add(&self.stats.socket_reads, 1);
        match &mut self.receiving {
            Receiving::Payload { buffer, filled, .. }
                if buffer.as_slice().len() - *filled >= DIRECT_READ =>
            {
                *filled += n;
            }
            _ => self.end += n,
        }
    }

    /// Turns what was received into requests and what finished into replies. The task of `cx` is woken when
    /// there is more to do.
    pub fn pump(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        self.queue.register(cx);
        self.queue.attend(true);
        let result = self.pump_attended(cx);
        self.queue.attend(false);
        result
    }

    fn pump_attended(&mut self, cx: &mut Context<'_>) -> Result<(), SessionError> {
        loop {
            self.drain();
            if self.closed.is_none()
                && let Some(reason) = self.watch.poll(cx).cloned()
            {
                self.close(reason);
            }
            let mut submitted = false;
            while self.receive(cx, &mut submitted)? {}
            if submitted {
                self.volume.end_of_batch();
            }
            // A finished request makes room for one that a limit held back.
            if !self.drain() {
                return Ok(());
            }
        }
    }

    /// Answers everything that is open with the reason, and everything that still comes. What the volume has
    /// runs its course there; its outcome interests nobody any more.
    pub fn close(&mut self, reason: CloseReason) {
        if self.closed.is_some() {
            return;
        }
        self.drain();
        self.queue.detach();
        match std::mem::replace(&mut self.receiving, Receiving::Header) {
            Receiving::Unbuffered { slot, .. } => {
                let slot = self.release(slot);
                self.receiving = Receiving::Skip {
                    left: slot.length,
                    cookie: slot.cookie,
                    error: shutting_down(&reason),
                };
            }
            Receiving::Payload { slot, filled, .. } => {
                let slot = self.release(slot);
                self.receiving = Receiving::Skip {
                    left: slot.length - filled as u32,
                    cookie: slot.cookie,
                    error: shutting_down(&reason),
                };
            }
            other => self.receiving = other,
        }
        for slot in 0..self.slots.len() as u32 {
            if self.slots[slot as usize].used {
                let slot = self.release(slot);
                self.answer_error(slot.cookie, shutting_down(&reason));
            }
        }
        self.closed = Some(reason);
    }

    /// The reason the export gave for going away, once it did.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.closed.as_ref()
    }

    /// Nothing more will happen: the client said goodbye or the export went away, and every answer is sent.
    pub fn is_finished(&self) -> bool {
        let over = match self.receiving {
            Receiving::Stopped => true,
            Receiving::Header => self.closed.is_some() && self.end - self.start < REQUEST_BYTES,
            _ => false,
        };
        over && self.outbox.is_empty() && self.requests_in_flight() == 0
    }

    /// Requests the volume has or waits for.
    pub fn requests_in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Answers that wait for the client to take them.
    pub fn unsent_answers(&self) -> usize {
        self.outbox.len()
    }

    /// A request is here whole and waits for room.
    pub fn is_held_back(&self) -> bool {
        matches!(self.receiving, Receiving::Header) && self.end - self.start >= REQUEST_BYTES
    }

    /// Payload bytes of unanswered requests and unsent answers.
    pub fn bytes_in_flight(&self) -> u64 {
        self.bytes
    }

    /// The client owes something: it does not take its answers, or stopped inside a payload.
    pub fn waits_for_client(&self) -> bool {
        !self.outbox.is_empty()
            || matches!(
                self.receiving,
                Receiving::Payload { .. } | Receiving::Skip { .. }
            )
    }

    /// Fills `slices` with what is to be sent; returns how many it filled.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        self.outbox.gather(slices)
    }

    /// The first `n` gathered bytes are sent.
    pub fn sent(&mut self, n: usize) {
        add(&self.stats.socket_writes, 1);
        self.bytes -= self.outbox.sent(n);
    }

    /// One step on received bytes; `false` when it needs more bytes, room or memory.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        submitted: &mut bool,
    ) -> Result<bool, SessionError> {
        match &mut self.receiving {
            Receiving::Stopped => Ok(false),
            Receiving::Header => self.header(submitted),
            Receiving::Unbuffered { slot, fua } => {
                let (slot, fua) = (*slot, *fua);
                let Slot { offset, length, .. } = self.slots[slot as usize];
                let buffer = match self.volume.poll_buffer(cx, offset, length) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(buffer) => buffer,
                };
                match buffer {
                    Ok(buffer) if buffer.as_slice().len() == length as usize => {
                        self.receiving = Receiving::Payload {
                            slot,
                            fua,
                            buffer,
                            filled: 0,
                        };
                    }
                    other => {
                        let error = other
                            .err()
                            .unwrap_or_else(|| defect("a buffer of the wrong size"));
                        let slot = self.release(slot);
                        self.receiving = Receiving::Skip {
                            left: slot.length,
                            cookie: slot.cookie,
                            error,
                        };
                    }
                }
                Ok(true)
            }
            Receiving::Payload { buffer, filled, .. } => {
                let target = &mut buffer.as_mut_slice()[*filled..];
                let n = target.len().min(self.end - self.start);
                target[..n].copy_from_slice(&self.input[self.start..self.start + n]);
                self.start += n;
                *filled += n;
                if *filled < buffer.as_slice().len() {
                    return Ok(false);
                }
                let whole = std::mem::replace(&mut self.receiving, Receiving::Header);
                if let Receiving::Payload {
                    slot, fua, buffer, ..
                } = whole
                {
                    let offset = self.slots[slot as usize].offset;
                    let completion = self.queue.completion(slot);
                    *submitted = true;
                    self.volume.submit(
                        Request::Write {
                            offset,
                            buffer,
                            fua,
                        },
                        completion,
                    );
                }
                Ok(true)
            }
            Receiving::Skip { left, .. } => {
                let n = (*left as usize).min(self.end - self.start);
                self.start += n;
                *left -= n as u32;
                if *left > 0 {
                    return Ok(false);
                }
                let skipped = std::mem::replace(&mut self.receiving, Receiving::Header);
                if let Receiving::Skip { cookie, error, .. } = skipped {
                    self.answer_error(cookie, error);
                }
                Ok(true)
            }
        }
    }

    fn header(&mut self, submitted: &mut bool) -> Result<bool, SessionError> {
        let Some(bytes) = self.input[self.start..self.end].first_chunk::<REQUEST_BYTES>() else {
            return Ok(false);
        };
        let header = RequestHeader::decode(bytes).ok_or(SessionError::BadMagic)?;
        // The answer needs a place too, so errors wait for room like everything else.
        if self.free.len() <= self.outbox.len() {
            return Ok(false);
        }
        let planned = match &self.closed {
            Some(_) if header.command == command::DISCONNECT => Ok(Plan::Disconnect),
            Some(reason) => Err(shutting_down(reason)),
            None => plan(&header, &self.on),
        };
        let plan = match planned {
            Ok(plan) => plan,
            Err(error) => {
                if header.command != command::WRITE {
                    self.start += REQUEST_BYTES;
                    self.answer_error(header.cookie, error);
                    return Ok(true);
                }
                if header.length > MAX_SKIPPED_PAYLOAD {
                    return Err(SessionError::WriteTooBig(header.length));
                }
                self.start += REQUEST_BYTES;
                self.receiving = Receiving::Skip {
                    left: header.length,
                    cookie: header.cookie,
                    error,
                };
                return Ok(true);
            }
        };
        let slot = Slot {
            used: true,
            plan,
            cookie: header.cookie,
            offset: header.offset,
            length: header.length,
        };
        let charge = slot.charge();
        if self.bytes > 0 && self.bytes + charge > self.limits.max_bytes_in_flight {
            return Ok(false);
        }
        self.start += REQUEST_BYTES;
        self.window = INPUT_BYTES;
        match plan {
            Plan::Nothing => {
                self.answer_success(header.cookie, header.command == command::READ);
                return Ok(true);
            }
            Plan::Disconnect => {
                self.receiving = Receiving::Stopped;
                return Ok(true);
            }
            _ => {}
        }
        let Some(index) = self.free.pop() else {
            unreachable!("checked above: more free slots than unsent answers");
        };
        self.bytes += charge;
        self.slots[index as usize] = slot;
        let (offset, length) = (header.offset, u64::from(header.length));
        let stats = &self.stats;
        let request = match plan {
            Plan::Write { fua } => {
                add(&stats.writes, 1);
                add(&stats.written_bytes, length);
                if header.length >= LARGE_PAYLOAD {
                    self.window = SMALL_WINDOW;
                }
                self.receiving = Receiving::Unbuffered { slot: index, fua };
                return Ok(true);
            }
            Plan::Read => {
                add(&stats.reads, 1);
                add(&stats.read_bytes, length);
                Request::Read {
                    offset,
                    len: header.length,
                }
            }
            Plan::Flush => {
                add(&stats.flushes, 1);
                Request::Flush
            }
            other => {
                add(&stats.other_requests, 1);
                match other {
                    Plan::Discard { fua } => Request::Discard {
                        offset,
                        len: length,
                        fua,
                    },
                    Plan::WriteZeroes {
                        fua,
                        may_unmap,
                        fast,
                    } => Request::WriteZeroes {
                        offset,
                        len: length,
                        fua,
                        may_unmap,
                        fast,
                    },
                    Plan::BlockStatus { one } => Request::BlockStatus {
                        offset,
                        len: length,
                        one,
                    },
                    _ => Request::Cache {
                        offset,
                        len: length,
                    },
                }
            }
        };
        *submitted = true;
        self.volume.submit(request, self.queue.completion(index));
        Ok(true)
    }

    /// Finished requests become replies; `true` if there were any.
    fn drain(&mut self) -> bool {
        let mut any = false;
        while let Some((index, result)) = self.queue.pop() {
            any = true;
            let slot = self.slots[index as usize];
            assert!(slot.used, "a request finished twice");
            let (head, body) = match result.and_then(|output| self.reply(&slot, output)) {
                Ok(reply) => reply,
                Err(error) => {
                    self.release(index);
                    self.answer_error(slot.cookie, error);
                    continue;
                }
            };
            if matches!(slot.plan, Plan::Read) {
                // The bytes stay until they are sent.
                self.free_slot(index);
                self.outbox.push(head, body, slot.charge());
            } else {
                self.release(index);
                self.outbox.push(head, body, 0);
            }
        }
        any
    }

    fn reply(
        &self,
        slot: &Slot,
        output: Output<V::Buf>,
    ) -> Result<(ReplyHead, Body<V::Buf>), IoError> {
        match (slot.plan, output) {
            (Plan::Read, Output::Data(buffer))
                if buffer.as_slice().len() == slot.length as usize =>
            {
                let head = if self.on.structured {
                    ReplyHead::data_chunk(slot.cookie, slot.offset, slot.length)
                } else {
                    ReplyHead::simple(slot.cookie, 0)
                };
                Ok((head, Body::Buffer(buffer)))
            }
            (Plan::BlockStatus { one }, Output::Extents(extents)) => {
                let payload = block_status(slot.length, one, &extents)
                    .ok_or_else(|| defect("a block status without extents"))?;
                let head = ReplyHead::chunk(slot.cookie, chunk::BLOCK_STATUS, payload.len() as u32);
                Ok((head, Body::Bytes(payload)))
            }
            (Plan::Read | Plan::BlockStatus { .. }, _) => {
                Err(defect("an answer that does not fit the request"))
            }
            (_, Output::Done) => Ok((ReplyHead::simple(slot.cookie, 0), Body::Nothing)),
            _ => Err(defect("an answer that does not fit the request")),
        }
    }

    fn free_slot(&mut self, index: u32) -> Slot {
        let slot = std::mem::replace(&mut self.slots[index as usize], Slot::FREE);
        self.free.push(index);
        slot
    }

    fn release(&mut self, index: u32) -> Slot {
        let slot = self.free_slot(index);
        self.bytes -= slot.charge();
        slot
    }

    fn answer_success(&mut self, cookie: u64, read: bool) {
        // After structured replies were negotiated a read is always answered with one.
        let head = if read && self.on.structured {
            ReplyHead::chunk(cookie, chunk::NONE, 0)
        } else {
            ReplyHead::simple(cookie, 0)
        };
        self.outbox.push(head, Body::Nothing, 0);
    }

    fn answer_error(&mut self, cookie: u64, error: IoError) {
        add(&self.stats.errors, 1);
        let number = error_number(error.kind);
        if self.on.structured {
            let payload = error_payload(number, &error.message);
            let head = ReplyHead::chunk(cookie, chunk::ERROR, payload.len() as u32);
            self.outbox.push(head, Body::Bytes(payload), 0);
        } else {
            self.outbox
                .push(ReplyHead::simple(cookie, number), Body::Nothing, 0);
        }
    }
}

impl<V: Volume> Drop for Session<V> {
    fn drop(&mut self) {
        // What still finishes in the volume has nobody to tell.
        self.queue.detach();
    }
}
