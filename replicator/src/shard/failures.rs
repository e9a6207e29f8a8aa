//! Why a peer is not connected: what the link reports with every attempt, kept for the status and said once in the event log.

use super::link::PeerRef;
use crate::control::protocol::LevelName;
use crate::events::EventLog;
use holdfast_wire_format::ids::Uuid;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Texts that are remembered as said. A stranger may present as many certificates as it likes.
const MOST_SAID: usize = 256;
/// Strangers are reported no more often than this.
const STRANGER_INTERVAL: Duration = Duration::from_secs(60);

/// What went wrong last, by what it concerns.
pub(super) struct Failures {
    log: EventLog,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// No connection to that node.
    paths: HashMap<Uuid, String>,
    /// The node is connected and does not take that service.
    services: HashMap<PeerRef, String>,
    /// That node asked for a service this one does not have with it.
    asked: HashMap<Uuid, String>,
    /// A caller was refused, by the node its certificate names; none for a stranger.
    callers: HashMap<Option<Uuid>, String>,
    said: HashSet<(Option<Uuid>, String)>,
    stranger_said: Option<Instant>,
}

impl Failures {
    pub fn new(log: EventLog) -> Failures {
        Failures {
            log,
            state: RefCell::default(),
        }
    }

    /// An attempt to reach a node failed.
    pub fn path(&self, node: Uuid, name: &str, path: &str, reason: &str) {
        let text = format!("node {name} cannot be connected over {path}: {reason}");
        self.say(Some(node), LevelName::Warning, "path-failed", &text);
        self.state.borrow_mut().paths.insert(node, text);
    }

    /// A caller was refused; `node` is whom its certificate names, if that is a peer.
    pub fn caller(&self, node: Option<Uuid>, remote: SocketAddr, reason: &str) {
        let text = format!("a caller at {} was refused: {reason}", remote.ip());
        tracing::warn!(%remote, reason, "a caller was refused");
        let mut state = self.state.borrow_mut();
        state.callers.insert(node, text.clone());
        let quiet = node.is_none()
            && state
                .stranger_said
                .is_some_and(|at| at.elapsed() < STRANGER_INTERVAL);
        if node.is_none() && !quiet {
            state.stranger_said = Some(Instant::now());
        }
        drop(state);
        if !quiet {
            self.say(node, LevelName::Warning, "caller-refused", &text);
        }
    }

    /// A connected node does not take a service.
    pub fn service(&self, peer: PeerRef, name: &str, service: &str, reason: &str) {
        let text = format!("node {name} does not take service {service} now: {reason}");
        self.say(
            Some(peer.node),
            LevelName::Warning,
            "service-refused",
            &text,
        );
        self.state.borrow_mut().services.insert(peer, text);
    }

    /// A connected node asked for a service that this one does not have with it; returns what it is told.
    pub fn asked(
        &self,
        node: Uuid,
        name: &str,
        here: &str,
        service: Uuid,
        common: &[String],
    ) -> String {
        let common = if common.is_empty() {
            format!("{here} has no service with it")
        } else {
            format!("{here} has {} with it", common.join(", "))
        };
        let text = format!(
            "node {name} asked for service {service}, but {common}: nothing was exchanged, no copy was changed. Make service.id, \
             service.peer.node and the slots agree in the configurations of both nodes"
        );
        self.say(Some(node), LevelName::Error, "service-unknown", &text);
        self.state.borrow_mut().asked.insert(node, text.clone());
        text
    }

    /// A node is connected: what kept it away is over, and is said again when it comes again.
    pub fn connected(&self, node: Uuid) {
        let mut state = self.state.borrow_mut();
        state.paths.remove(&node);
        state.callers.remove(&Some(node));
        state.callers.remove(&None);
        state.said.retain(|(about, _)| *about != Some(node));
    }

    /// The connection to a node ended, and with it what was said over it.
    pub fn disconnected(&self, node: Uuid) {
        let mut state = self.state.borrow_mut();
        state.services.retain(|peer, _| peer.node != node);
        state.asked.remove(&node);
    }

    /// A service has its stream.
    pub fn open(&self, peer: PeerRef) {
        let mut state = self.state.borrow_mut();
        state.services.remove(&peer);
        state.asked.remove(&peer.node);
    }

    /// Why that peer is not connected, as far as the link knows.
    pub fn of(&self, peer: PeerRef) -> Option<String> {
        let state = self.state.borrow();
        let known = [
            state.services.get(&peer),
            state.asked.get(&peer.node),
            state.callers.get(&Some(peer.node)),
            state.paths.get(&peer.node),
            // It may have been that peer, under a certificate nobody knows.
            state.callers.get(&None),
        ];
        known.into_iter().flatten().next().cloned()
    }

    fn say(&self, node: Option<Uuid>, level: LevelName, kind: &str, text: &str) {
        let mut state = self.state.borrow_mut();
        if state.said.len() >= MOST_SAID {
            state.said.clear();
        }
        if state.said.insert((node, text.to_owned())) {
            self.log.node(level, kind, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_text_is_said_once_until_the_node_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        let failures = Failures::new(log.clone());
        let peer = PeerRef {
            node: Uuid(1),
            service: Uuid(9),
        };
        let remote = "192.0.2.1:5".parse().unwrap();
        for _ in 0..3 {
            failures.path(peer.node, "beta", "192.0.2.2:7741", "timed out");
            failures.caller(None, remote, "nobody knows it");
        }
        // Of strangers not more than one, whatever they present.
        failures.caller(None, remote, "nobody knows this one either");
        assert_eq!(log.follow().0.len(), 2);
        assert!(failures.of(peer).unwrap().contains("timed out"));
        failures.connected(peer.node);
        assert_eq!(failures.of(peer), None);
        failures.path(peer.node, "beta", "192.0.2.2:7741", "timed out");
        assert_eq!(log.follow().0.len(), 3);
        failures.service(peer, "beta", "db", "not here");
        assert!(
            failures
                .of(peer)
                .unwrap()
                .contains("does not take service db")
        );
        failures.open(peer);
        assert!(failures.of(peer).unwrap().contains("timed out"));
    }
}
