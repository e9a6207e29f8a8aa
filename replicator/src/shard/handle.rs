//! How the rest of the process speaks with a shard: by message, so that nothing outside its thread touches it.

use super::driver::Shard;
use super::service::{HUNG_STOP_SECONDS, LONGEST_STOP_SECONDS, Service};
use super::start::Attacher;
use crate::control::node::Node;
use crate::control::protocol::{
    EventReport, LevelName, LinkName, NodeStatus, ServiceReport, StateName,
};
use crate::control::render::{met, timestamp};
use crate::events::{EventLog, now_ms};
use crate::observed::Observed;
use holdfast_frontend::CloseReason;
use holdfast_link::{Identity, Peer, PeerStore};
use holdfast_replicator_core::api::{AdminResult, Command, Refusal, RefusalKind, Role};
use holdfast_replicator_core::status::LinkState;

use holdfast_wire_format::ids::Slot;
use holdfast_wire_format::metadata::CopyState;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a stop looks whether it waits for a hung disk.
const HUNG_LOOK: Duration = Duration::from_millis(200);
use tokio::sync::{broadcast, mpsc, oneshot};

/// Messages that may wait for the shard.
const QUEUE: usize = 256;
/// A shard that has not answered a question for a status after this long is busy: its last answer is used.
const STATUS_TIMEOUT: Duration = Duration::from_millis(500);

/// What a shard can be asked.
pub(crate) enum Message {
    Status(oneshot::Sender<Vec<ServiceReport>>),
    Command {
        service: String,
        command: Command,
        answer: oneshot::Sender<AdminResult>,
    },
    /// Take a detached service up again.
    Attach {
        service: String,
        disk: bool,
        answer: oneshot::Sender<AdminResult>,
    },
    /// What the copy of this service here and the one in that slot would agree on if they met now, in words; or why the peer does not say.
    Foresee {
        service: String,
        slot: Slot,
        answer: oneshot::Sender<Result<String, String>>,
    },
    /// Peers and certificates were read again; answered when the link knows.
    Reload(oneshot::Sender<()>),
    /// Send clients away and detach every service; answered when all is durable, with what did not work.
    Stop {
        answer: oneshot::Sender<Vec<Refusal>>,
    },
}

struct Shared {
    name: String,
    started: Instant,
    shard: mpsc::Sender<Message>,
    log: EventLog,
    last: Mutex<Vec<ServiceReport>>,
    identity: Arc<Identity>,
    peers: Arc<PeerStore>,
    observed: Arc<Observed>,
}

/// A handle on a running replicator, for control socket, metrics and tests: usable from any thread, cheap to clone.
#[derive(Clone)]
pub struct NodeHandle {
    shared: Arc<Shared>,
}

impl NodeHandle {
    pub(crate) fn new(
        name: String,
        log: EventLog,
        identity: Arc<Identity>,
        peers: Arc<PeerStore>,
        observed: Arc<Observed>,
    ) -> (NodeHandle, mpsc::Receiver<Message>) {
        let (shard, messages) = mpsc::channel(QUEUE);
        let shared = Shared {
            name,
            started: Instant::now(),
            shard,
            log,
            last: Mutex::new(Vec::new()),
            identity,
            peers,
            observed,
        };
        (
            NodeHandle {
                shared: Arc::new(shared),
            },
            messages,
        )
    }

    /// Stops cleanly: clients are sent away, every service is flushed and marked clean. Empty: all of it worked.
    pub async fn stop(&self) -> Vec<Refusal> {
        let (answer, result) = oneshot::channel();
        if self
            .shared
            .shard
            .send(Message::Stop { answer })
            .await
            .is_err()
        {
            return Vec::new();
        }
        result.await.unwrap_or_default()
    }

    fn stopping(service: &str) -> Refusal {
        Refusal {
            kind: RefusalKind::Refused,
            what: format!("service {service} was not asked: the replicator is stopping"),
            kept: "Nothing was changed by this request".into(),
            next: "Ask again once it runs".into(),
        }
    }

    /// When what decides about a loss happened last, by the clock of this machine: the core has none.
    fn since_when(&self, service: &str) -> String {
        let (events, _) = self.shared.log.follow();
        let mut text = String::new();
        for (kind, words) in [
            ("in-sync", "a copy came in sync"),
            ("parked", "writes were parked"),
            ("peer-dropped", "a copy left the in-sync set"),
            ("primary", "this copy became primary"),
            ("secondary", "this copy stopped being primary"),
            ("split-brain", "a split brain was found"),
            (
                "surplus-saved",
                "what this copy wrote alone was saved for a person",
            ),
            (
                "surplus-not-saved",
                "what this copy wrote alone was given up unsaved",
            ),
        ] {
            let last = events
                .iter()
                .rfind(|event| event.service == service && event.kind == kind);
            if let Some(event) = last {
                text.push_str(&format!(
                    "\nlast time {words}: {} ({})",
                    timestamp(event.time_ms),
                    event.text
                ));
            }
        }
        text
    }

    async fn services(&self) -> Vec<ServiceReport> {
        let (answer, result) = oneshot::channel();
        // A full queue means a busy shard, too.
        let asked = self.shared.shard.try_send(Message::Status(answer)).is_ok();
        let mut last = None;
        if asked && let Ok(Ok(services)) = tokio::time::timeout(STATUS_TIMEOUT, result).await {
            last = Some(services);
        }
        if let Some(services) = &mut last {
            self.shared.observed.complete(services, now_ms());
        }
        let mut kept = self
            .shared
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match last {
            Some(services) => {
                kept.clone_from(&services);
                services
            }
            None => kept.clone(),
        }
    }
}

impl Node for NodeHandle {
    fn name(&self) -> String {
        self.shared.name.clone()
    }

    async fn status(&self) -> NodeStatus {
        NodeStatus {
            node: self.shared.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: self.shared.started.elapsed().as_millis() as u64,
            services: self.services().await,
        }
    }

    async fn command(&self, service: &str, command: Command) -> AdminResult {
        let (answer, result) = oneshot::channel();
        let message = Message::Command {
            service: service.to_owned(),
            command,
            answer,
        };
        let asks_for_loss = matches!(
            message,
            Message::Command {
                command: Command::WhatWouldForceLose,
                ..
            }
        );
        if self.shared.shard.send(message).await.is_err() {
            return Err(Self::stopping(service));
        }
        let answered = result
            .await
            .unwrap_or_else(|_| Err(Self::stopping(service)));
        if asks_for_loss {
            return answered.map(|text| text + &self.since_when(service));
        }
        answered
    }

    async fn attach(&self, service: &str, disk: bool) -> AdminResult {
        let (answer, result) = oneshot::channel();
        let message = Message::Attach {
            service: service.to_owned(),
            disk,
            answer,
        };
        if self.shared.shard.send(message).await.is_err() {
            return Err(Self::stopping(service));
        }
        result
            .await
            .unwrap_or_else(|_| Err(Self::stopping(service)))
    }

    async fn reload(&self) -> AdminResult {
        let before = self.shared.peers.all();
        let (identity, peers) = (self.shared.identity.clone(), self.shared.peers.clone());
        // Both wait for the disk and for the command line's lock: not on a shard's thread, nor on this one.
        let read = tokio::task::spawn_blocking(move || {
            identity.reload()?;
            peers.reload()
        });
        let problem = match read.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(problem) = problem {
            let text = format!("peers and certificates could not be read again: {problem}");
            self.shared
                .log
                .node(LevelName::Error, "reload-failed", text.clone());
            return Err(Refusal {
                kind: RefusalKind::Refused,
                what: text,
                kept: "Replication goes on with the peers and certificates known before".into(),
                next: "Repair the file, then reload again".into(),
            });
        }
        let (answer, told) = oneshot::channel();
        let sent = self.shared.shard.send(Message::Reload(answer)).await;
        if sent.is_err() || told.await.is_err() {
            return Err(Self::stopping("of this node"));
        }
        let text = what_changed(&before, &self.shared.peers.all(), &self.shared.identity);
        self.shared
            .log
            .node(LevelName::Info, "reloaded", text.clone());
        Ok(text)
    }

    async fn explain_handshake(&self, service: &str, peer: &str) -> Result<String, Refusal> {
        let services = self.services().await;
        let report = services
            .iter()
            .find(|report| report.name == service)
            .ok_or_else(|| no_service(service))?;
        let Some(peer_report) = report.peer(peer) else {
            return Err(Refusal {
                kind: RefusalKind::Refused,
                what: format!("service {service} has no peer {peer}"),
                kept: "Nothing was changed".into(),
                next: "`holdfast status` lists the peers".into(),
            });
        };
        let last = match peer_report.handshake.as_str() {
            "" => "they have not met since this process began".to_owned(),
            handshake => format!("{}\n{handshake}", met(peer_report)),
        };
        if matches!(peer_report.link, LinkName::Established | LinkName::Resync) {
            return Ok(format!("nothing is to be decided now: {last}"));
        }
        let (answer, told) = oneshot::channel();
        let message = Message::Foresee {
            service: service.to_owned(),
            slot: Slot(peer_report.slot),
            answer,
        };
        let foreseen = match self.shared.shard.send(message).await {
            Ok(()) => told.await.ok(),
            Err(_) => None,
        };
        match foreseen {
            None => Err(Self::stopping(&format!("of service {service}"))),
            Some(Ok(text)) => Ok(format!(
                "if {} and {peer} connected now (nothing was changed):\n{text}\n\n{last}",
                self.shared.name
            )),
            Some(Err(why)) if !peer_report.handshake.is_empty() => Ok(format!("{why}\n\n{last}")),
            Some(Err(why)) => Err(Refusal {
                kind: RefusalKind::Refused,
                what: format!("{why}; {last}"),
                kept: match peer_report.last_error.as_str() {
                    "" => format!("The link is {}", peer_report.link),
                    error => format!("The link is {}; last error: {error}", peer_report.link),
                },
                next: "Check that the peer runs and can be reached, or ask there".into(),
            }),
        }
    }

    fn events(&self) -> (Vec<EventReport>, broadcast::Receiver<EventReport>) {
        self.shared.log.follow()
    }
}

/// What reading the peers again came to, in words.
fn what_changed(before: &[Peer], after: &[Peer], identity: &Identity) -> String {
    let names = |list: &[Peer], other: &[Peer]| {
        let names: Vec<&str> = list
            .iter()
            .filter(|peer| !other.iter().any(|known| known.id == peer.id))
            .map(|peer| peer.name.as_str())
            .collect();
        names.join(", ")
    };
    let mut text = format!(
        "peers and certificates were read again: {} trusted",
        after.len()
    );
    for (words, names) in [
        ("new", names(after, before)),
        ("gone", names(before, after)),
    ] {
        if !names.is_empty() {
            text.push_str(&format!("; {words}: {names}"));
        }
    }
    let own: Vec<String> = identity
        .fingerprints()
        .iter()
        .map(ToString::to_string)
        .collect();
    text.push_str(&format!("; this node's certificate is {}", own[0]));
    if let Some(next) = own.get(1) {
        text.push_str(&format!(", the next one {next}"));
    }
    text
}

fn no_service(name: &str) -> Refusal {
    Refusal {
        kind: RefusalKind::Refused,
        what: format!("there is no service {name} on this node"),
        kept: "Nothing was changed".into(),
        next:
            "`holdfast status` lists the services; a new one is taken up when the replicator starts"
                .into(),
    }
}

/// Answers messages until the process has nothing more to ask, or a stop is carried out. A task of the shard.
pub(super) async fn answer_messages(
    shard: Rc<Shard>,
    mut messages: mpsc::Receiver<Message>,
    nbd_uris: impl Fn(&str, &str) -> Vec<String>,
    attacher: Attacher,
) {
    while let Some(message) = messages.recv().await {
        match message {
            Message::Status(answer) => {
                // Who asked may have given up.
                let _ = answer.send(reports(&shard, &nbd_uris));
            }
            Message::Command {
                service,
                command,
                answer,
            } => {
                let refused = shard.with_services(|services| {
                    match services
                        .iter_mut()
                        .find(|candidate| candidate.name == service)
                    {
                        Some(found) => {
                            found.admin(command, answer);
                            None
                        }
                        None => Some(answer),
                    }
                });
                match refused {
                    Some(answer) => drop(answer.send(Err(no_service(&service)))),
                    None => shard.pump(),
                }
            }
            Message::Attach {
                service,
                disk,
                answer,
            } => {
                let result = attach_again(&shard, &attacher, &service, disk).await;
                let _ = answer.send(result);
            }
            Message::Foresee {
                service,
                slot,
                answer,
            } => {
                let shard = shard.clone();
                // It waits for another node; other messages do not wait for it.
                tokio::task::spawn_local(async move {
                    let _ = answer.send(foresee(&shard, &service, slot).await);
                });
            }
            Message::Reload(answer) => {
                shard.reload();
                let _ = answer.send(());
            }
            Message::Stop { answer } => {
                let refusals = stop(&shard).await;
                let _ = answer.send(refusals);
                return;
            }
        }
    }
}

/// Asks the peer what it would say, and has the core decide from that, changing nothing.
async fn foresee(shard: &Rc<Shard>, service: &str, slot: Slot) -> Result<String, String> {
    let of = |services: &mut Vec<Service>| services.iter().position(|s| s.name == service);
    let peer = shard.with_services(|services| {
        let at = of(services)?;
        let peer = services[at].peers.iter().find(|peer| peer.slot == slot)?;
        Some((peer.link, peer.name.clone()))
    });
    let (peer, name) = peer.ok_or("there is no such copy")?;
    let hello = shard.link().facts(peer).await;
    let hello = hello.map_err(|why| format!("{name} does not say what it has now: {why}"))?;
    shard.with_services(|services| {
        let at = of(services).ok_or("the service is gone")?;
        let decided = services[at].core.would_decide(slot, &hello);
        let decided = decided.map_err(|why| format!("nothing can be foretold here: {why}"))?;
        Ok(services[at].named(&decided))
    })
}

/// A service that this process gave up is taken up again, from its disks as they are now: with a new core, as at a start.
async fn attach_again(
    shard: &Rc<Shard>,
    attacher: &Attacher,
    service: &str,
    disk: bool,
) -> AdminResult {
    let now = shard.now();
    let found = shard.with_services(|services| {
        let at = services.iter().position(|known| known.name == service)?;
        let failed = services[at].core.status(now).state == CopyState::Failed;
        Some((at, services[at].role, failed))
    });
    let Some((at, role, failed)) = found else {
        return Err(no_service(service));
    };
    let refused = |what: String, kept: &str, next: &str| {
        Err(Refusal {
            kind: RefusalKind::Refused,
            what,
            kept: kept.into(),
            next: next.into(),
        })
    };
    match role {
        Role::Detached => {}
        Role::Secondary if failed && disk => {
            let (answer, detached) = oneshot::channel();
            shard.with_services(|services| services[at].admin(Command::Detach, answer));
            shard.pump();
            detached
                .await
                .unwrap_or_else(|_| Err(NodeHandle::stopping(service)))?;
        }
        _ if failed => {
            return refused(
                format!("service {service} goes on through another copy's disk"),
                "It goes on like that",
                "Move it there first: `holdfast demote` here, `holdfast promote` there, then `holdfast volume attach-disk` here",
            );
        }
        _ => {
            return refused(
                format!("service {service} is attached on this node, and its disks are in use"),
                "Nothing was changed",
                "`holdfast status` shows it",
            );
        }
    }
    // A request that the disk has not answered may still be carried out, and its answer would reach the new core.
    let busy = shard.with_services(|services| {
        let mut files = services[at].volumes.iter().flat_map(|v| [v.data, v.meta]);
        files.any(|file| shard.ring().backing(file).is_some())
    });
    if busy {
        return refused(
            format!("a disk of service {service} has not answered all requests of before"),
            "The service stays detached, and the disk locked",
            "Wait until the disk answers, or restart the replicator",
        );
    }
    if let Err(error) = attacher.attach(shard, at) {
        return refused(
            format!("service {service} cannot be attached: {error}"),
            "The service stays detached, its disks are as they were",
            "Remove the cause, then `holdfast attach` again",
        );
    }
    shard.pump();
    let state = shard.with_services(|services| services[at].core.status(now).state);
    Ok(format!(
        "service {service} is attached: this copy is {} and meets the others",
        StateName::from(state)
    ))
}

fn reports(shard: &Rc<Shard>, nbd_uris: &impl Fn(&str, &str) -> Vec<String>) -> Vec<ServiceReport> {
    let now = shard.now();
    shard.with_services(|services| {
        services
            .iter()
            .map(|service| {
                let mut status = service.core.status(now);
                for peer in &mut status.peers {
                    let known = service.peers.iter().find(|known| known.slot == peer.slot);
                    if peer.link == LinkState::Connecting
                        && let Some(known) = known
                        && let Some(failure) = shard.link().failure(known.link)
                    {
                        peer.last_error = failure;
                    }
                }
                let uris = |volume: &str| {
                    if service.role == Role::Primary {
                        nbd_uris(&service.name, volume)
                    } else {
                        Vec::new()
                    }
                };
                ServiceReport::new(&status, &|slot| service.node_name(slot), &uris)
            })
            .collect()
    })
}

/// Detaches every service; what did not work. A service with a hung disk is waited for until [`HUNG_STOP_SECONDS`] have passed and
/// the disk was told of as hung, any other until [`LONGEST_STOP_SECONDS`]: it stays marked as unclean, which is what it is.
async fn stop(shard: &Rc<Shard>) -> Vec<Refusal> {
    shard.close_exports(&CloseReason::Stopping);
    let begun = Instant::now();
    let waiting: Vec<_> = shard.with_services(|services| {
        services
            .iter_mut()
            .enumerate()
            .filter(|(_, service)| service.role != Role::Detached)
            .map(|(at, service)| {
                let (answer, result) = oneshot::channel();
                service.admin(Command::Detach, answer);
                (at, result)
            })
            .collect()
    });
    shard.pump();
    let mut refusals = Vec::new();
    for (at, mut result) in waiting {
        let answered = loop {
            if let Ok(answered) = tokio::time::timeout(HUNG_LOOK, &mut result).await {
                break answered.unwrap_or(Ok(String::new()));
            }
            let waited = begun.elapsed().as_secs();
            let hung = shard.with_services(|services| services[at].hung_volumes());
            if waited >= LONGEST_STOP_SECONDS || waited >= HUNG_STOP_SECONDS && !hung.is_empty() {
                break Err(left_behind(shard, at, &hung));
            }
        };
        refusals.extend(answered.err());
    }
    refusals
}

/// A service is stopped although not all of its requests have ended.
fn left_behind(shard: &Rc<Shard>, at: usize, hung: &[String]) -> Refusal {
    let name = shard.with_services(|services| services[at].name.clone());
    Refusal {
        kind: RefusalKind::Refused,
        what: if hung.is_empty() {
            format!(
                "service {name} is left with requests that did not end within {LONGEST_STOP_SECONDS} s, here or at another copy"
            )
        } else {
            format!(
                "service {name} is left with requests that the disk of volume {} did not answer",
                hung.join(", ")
            )
        },
        kept: "Everything acknowledged is safe; what was under way counts as not written, and is compared at the next start"
            .into(),
        next: "Promote another copy, and check the device before this node is started again".into(),
    }
}
