//! The shard's loop: gathers what happened on disk ring, link and frontends, feeds the cores, and hands what they
//! answer to disk and link in one go.
//!
//! Everything runs on one thread. [`Shard::pump`] is called by whoever has news: a frontend at the end of a batch, the
//! tasks that wait for ring, link and time. It works until nothing more follows, then submits all disk requests with
//! one system call and lets the link send. A write thus crosses no thread between its arrival and its submissions.

use super::budget::Receipt;
use super::buffers::ClientBuf;
use super::grow::Grower;
use super::link::LinkPort;
use super::memory::Memory;
use super::service::{GROWER, Service, Surroundings, Token};
use super::spin::{Next, Spin};
use super::surplus::SurplusPort;
use crate::events::EventLog;
use holdfast_disk::{Buf, Ring};
use holdfast_frontend::{CloseReason, Completion, IoError, IoErrorKind, Request};
use holdfast_replicator_core::api::{Event, Level, Time};
use holdfast_replicator_core::status::LinkState;
use holdfast_wire_format::ids::VolumeIndex;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// How often disks are looked at for silence, and memory that was added is given back.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long a halt waits for its line to reach the event log.
const HALT_GRACE: Duration = Duration::from_secs(1);

/// Rounds of a busy shard before gathered acknowledgements are sent anyway.
const ROUNDS: u32 = 8;

/// A request on its way from a frontend to a service.
struct Incoming {
    service: usize,
    volume: VolumeIndex,
    request: Request<ClientBuf>,
    read_into: Option<(Buf, Receipt)>,
    completion: Completion<ClientBuf>,
}

/// One shard. Lives on its thread.
pub struct Shard {
    pub(super) memory: Rc<Memory>,
    ring: Ring,
    link: LinkPort,
    pub(super) log: EventLog,
    pub(super) state_dir: PathBuf,
    pub(super) grower: Grower,
    started: Instant,
    services: RefCell<Vec<Service>>,
    incoming: RefCell<VecDeque<Incoming>>,
    completions: RefCell<Vec<holdfast_disk::Completion>>,
    /// Counts how often peers and certificates were read again.
    pub(super) reloaded: watch::Sender<u64>,
    /// When the timer fires, as it knows.
    armed: Cell<Option<Time>>,
    rearm: Notify,
    spin: RefCell<Spin>,
    spin_begins: Notify,
    surplus: SurplusPort,
}

impl Shard {
    pub(super) fn new(
        memory: Rc<Memory>,
        ring: Ring,
        link: LinkPort,
        log: EventLog,
        started: Instant,
        spin: Duration,
        state_dir: PathBuf,
    ) -> Rc<Shard> {
        Rc::new(Shard {
            memory,
            ring,
            link,
            log,
            surplus: SurplusPort::new(state_dir.clone()),
            state_dir,
            grower: Grower::default(),
            started,
            services: RefCell::new(Vec::new()),
            incoming: RefCell::new(VecDeque::with_capacity(256)),
            completions: RefCell::new(Vec::with_capacity(256)),
            reloaded: watch::Sender::new(0),
            armed: Cell::new(None),
            rearm: Notify::new(),
            spin: RefCell::new(Spin::new(spin)),
            spin_begins: Notify::new(),
        })
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(super) fn link(&self) -> &LinkPort {
        &self.link
    }

    /// Nanoseconds since the shard began.
    pub(super) fn now(&self) -> Time {
        Time(self.started.elapsed().as_nanos() as u64)
    }

    /// Adds a service, or puts it in the place of the detached one with its index.
    pub(super) fn put_service(&self, service: Service) {
        let mut services = self.services.borrow_mut();
        let at = service.index;
        if at == services.len() {
            services.push(service);
        } else {
            services[at] = service;
        }
    }

    /// Looks at or changes the services. Not to be called from inside [`pump`](Self::pump).
    pub(super) fn with_services<R>(&self, with: impl FnOnce(&mut Vec<Service>) -> R) -> R {
        with(&mut self.services.borrow_mut())
    }

    /// Takes a request; it starts with the next [`pump`](Self::pump).
    pub(super) fn submit(
        &self,
        service: usize,
        volume: VolumeIndex,
        request: Request<ClientBuf>,
        read_into: Option<(Buf, Receipt)>,
        completion: Completion<ClientBuf>,
    ) {
        self.incoming.borrow_mut().push_back(Incoming {
            service,
            volume,
            request,
            read_into,
            completion,
        });
    }

    /// Works off everything that is there.
    pub(super) fn pump(&self) {
        // Whoever holds the services now is this function further up the stack, which looks again before it ends.
        let Ok(mut services) = self.services.try_borrow_mut() else {
            return;
        };
        let mut any = false;
        let mut around = Surroundings {
            ring: &self.ring,
            link: &self.link,
            memory: &self.memory,
            log: &self.log,
            surplus: &self.surplus,
            grower: &self.grower,
            now: self.now(),
        };
        for round in 0u32.. {
            // A few rounds take some microseconds.
            if round > 0 && round % ROUNDS == 0 {
                around.now = self.now();
            }
            self.take_in(&mut services, &around);
            let mut worked = false;
            for service in services.iter_mut() {
                worked |= service.run(&around);
                if let Some(reason) = &service.halted {
                    halt(&self.log, service, reason);
                }
            }
            any |= worked;
            // Before the local disk has its turn: the way to the peer and back is the longer one.
            let mut more = self.link.flush();
            // What these events caused may have finished or come in meanwhile; but who waits for an acknowledgement
            // gathered here does not wait for a quiet moment.
            if worked && round % ROUNDS != ROUNDS - 1 {
                continue;
            }
            for service in services.iter_mut() {
                more |= service.end_batch(&around);
                if let Some(reason) = &service.halted {
                    halt(&self.log, service, reason);
                }
            }
            more |= self.link.flush();
            more |= self.ring.flush_submissions();
            if !worked && !more {
                break;
            }
        }
        if services.iter().any(Service::is_held) {
            self.grower.rest.notify_one();
        }
        let deadline = services
            .iter()
            .filter(|service| !service.is_held())
            .filter_map(|service| service.core.deadline())
            .min();
        drop(services);
        self.arm(deadline);
        if any && self.spin.borrow_mut().event(self.started.elapsed()) {
            self.spin_begins.notify_one();
        }
    }

    /// Everything that came in since the last look becomes events of its service.
    fn take_in(&self, services: &mut [Service], around: &Surroundings) {
        let mut completions = self.completions.borrow_mut();
        self.ring.poll_completions(&mut completions);
        for completion in completions.drain(..) {
            if completion.token & GROWER == GROWER {
                self.grower
                    .done(completion.token & !GROWER, completion.result);
                continue;
            }
            let token = Token::unpack(completion.token);
            if let Some(service) = services.get_mut(token.service) {
                service.disk_done(token, completion, &self.log);
            }
        }
        self.link.poll(services);
        for (service, event) in self.surplus.poll() {
            if let Some(service) = services.get_mut(service) {
                service.events.push_back(event);
            }
        }
        loop {
            let next = self.incoming.borrow_mut().pop_front();
            let Some(Incoming {
                service,
                volume,
                request,
                read_into,
                completion,
            }) = next
            else {
                break;
            };
            match services.get_mut(service) {
                Some(service) => service.request(around, volume, request, read_into, completion),
                None => completion.fail(IoError::new(
                    IoErrorKind::ShuttingDown,
                    "the service was removed",
                )),
            }
        }
    }

    fn arm(&self, deadline: Option<Time>) {
        // A timer that fires early does no harm; only an earlier deadline must reach it.
        let earlier = match (deadline, self.armed.get()) {
            (Some(wanted), Some(armed)) => wanted < armed,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if earlier {
            self.armed.set(deadline);
            self.rearm.notify_one();
        }
    }

    /// The tasks that wake the shard; ends only with the shard's thread.
    pub(super) async fn run(self: Rc<Self>) {
        let ring = async {
            loop {
                self.ring.ready().await;
                self.pump();
            }
        };
        let timer = async {
            loop {
                match self.armed.get() {
                    None => self.rearm.notified().await,
                    Some(at) => {
                        let wait = tokio::time::sleep_until(
                            (self.started + Duration::from_nanos(at.0)).into(),
                        );
                        tokio::select! {
                            () = wait => self.tick(),
                            () = self.rearm.notified() => {}
                        }
                    }
                }
            }
        };
        let watch = async {
            let mut interval = tokio::time::interval(WATCH_INTERVAL);
            loop {
                interval.tick().await;
                self.with_services(|services| {
                    for service in services {
                        service.watch_disks(&self.ring, &self.log);
                    }
                });
                self.memory.trim();
            }
        };
        let spin = async {
            loop {
                self.spin_begins.notified().await;
                while self.spin.borrow_mut().look(self.started.elapsed()) == Next::Look {
                    // The runtime looks at all sockets and the ring, then comes back here instead of sleeping.
                    tokio::task::yield_now().await;
                }
            }
        };
        let grower = self.grower.serve(&self);
        let surplus = async {
            loop {
                self.surplus.ready().await;
                self.pump();
            }
        };
        tokio::join!(
            grower,
            surplus,
            ring,
            timer,
            watch,
            self.memory.serve_waiting(),
            spin
        );
    }

    fn tick(&self) {
        let now = self.now();
        self.armed.set(None);
        self.with_services(|services| {
            for service in services {
                if !service.is_held()
                    && service
                        .core
                        .deadline()
                        .is_some_and(|deadline| deadline <= now)
                {
                    service.events.push_back(Event::Tick);
                }
            }
        });
        self.pump();
    }

    /// Whether nothing of that service is under way on its disks.
    pub(super) fn at_rest(&self, service: usize) -> bool {
        self.with_services(|services| services[service].at_rest(&self.ring))
    }

    /// Peers and certificates were read again: those who left are cut off, those who came are called.
    pub(super) fn reload(&self) {
        self.link.reload();
        let now = self.now();
        self.with_services(|services| {
            for service in services {
                for peer in service.core.status(now).peers {
                    if peer.link == LinkState::Connecting {
                        service.call(peer.slot, &self.link, &self.log);
                    }
                }
            }
        });
        self.reloaded.send_modify(|count| *count += 1);
        self.pump();
    }

    /// Sends all clients away and takes no new ones.
    pub(super) fn close_exports(&self, reason: &CloseReason) {
        self.with_services(|services| {
            for service in services {
                service.exports.close(reason);
            }
        });
    }
}

/// The core found that going on could write wrong data: say so, then stop at once, before anything else is done.
fn halt(log: &EventLog, service: &Service, reason: &str) -> ! {
    let text = format!(
        "the replicator stopped itself rather than risk wrong data: {reason}. Everything acknowledged is on disk as its mode \
         says; start it again, and report this text"
    );
    service.say(log, Level::Error, "halted", None, text);
    log.settle(HALT_GRACE);
    std::process::abort();
}
