//! What the status remembers over a restart, in `observed.json` of the state directory: until when each peer had
//! everything, and which volumes a verify could not read throughout.
//!
//! The core counts from its attach: it has no clock that outlives it. Here are the moments, by the clock of this machine,
//! so that what is shown as lag after a restart is never less than what would be lost.

use crate::control::protocol::ServiceReport;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The moments on the disk are at most this much older than the true ones, and so is a lag counted from them longer.
const WRITE_INTERVAL_MS: u64 = 10_000;
/// How often the status is looked at: no more often is the file written, whatever happens.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
struct Known {
    /// By service id.
    services: BTreeMap<String, OfService>,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
struct OfService {
    /// By node id.
    #[serde(default)]
    peers: BTreeMap<String, OfPeer>,
    /// Names of this copy's volumes that a verify could not read throughout.
    #[serde(default)]
    unread: BTreeSet<String>,
}

#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
struct OfPeer {
    /// It had everything written until then: ms since 1970, UTC.
    #[serde(default)]
    whole_until_ms: Option<u64>,
    /// Names of its volumes that a verify could not read throughout.
    #[serde(default)]
    unread: BTreeSet<String>,
}

/// The memory of one node; for any thread.
#[derive(Debug)]
pub struct Observed {
    state_dir: PathBuf,
    state: Mutex<State>,
    /// One writer of the file at a time.
    writing: Mutex<()>,
}

#[derive(Debug)]
struct State {
    /// As it was when this process began.
    before: Known,
    now: Known,
    written: Known,
}

impl Observed {
    const FILE: &str = "observed.json";

    /// What was remembered; nothing if the file is missing or damaged: ages then are told as lower bounds.
    pub fn load(state_dir: &Path) -> Observed {
        let bytes = std::fs::read(state_dir.join(Self::FILE)).unwrap_or_default();
        let known: Known = serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            if !bytes.is_empty() {
                tracing::warn!(%error, "{} in the state directory is damaged: what it said of the time before this start is not known", Self::FILE);
            }
            Known::default()
        });
        Observed {
            state_dir: state_dir.to_owned(),
            state: Mutex::new(State {
                before: known.clone(),
                now: known.clone(),
                written: known,
            }),
            writing: Mutex::new(()),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Volumes, by name, that could not be read throughout before this process began: of this copy, and of a peer by its node id.
    pub fn unread(&self, service: &str, peer: Option<&str>) -> BTreeSet<String> {
        let state = self.state();
        let Some(known) = state.before.services.get(service) else {
            return BTreeSet::new();
        };
        match peer {
            None => known.unread.clone(),
            Some(node) => known
                .peers
                .get(node)
                .map(|peer| peer.unread.clone())
                .unwrap_or_default(),
        }
    }

    /// Makes the lag of peers that lack something from before this process began as long as it really is: counted from the
    /// last moment known. Where none is known, or the clock of the machine went back, the lag is marked as a lower bound.
    pub fn complete(&self, services: &mut [ServiceReport], now_ms: u64) {
        let state = self.state();
        for service in services {
            let before = state.before.services.get(&service.service);
            for peer in service.peers.iter_mut().filter(|peer| peer.lag_at_least) {
                let known = before.and_then(|known| known.peers.get(&peer.node));
                let Some(until) = known.and_then(|known| known.whole_until_ms) else {
                    continue;
                };
                if let Some(age) = now_ms.checked_sub(until) {
                    peer.lag_at_least = age < peer.lag_ms;
                    peer.lag_ms = peer.lag_ms.max(age);
                }
            }
        }
    }

    /// Takes note of a completed status. True: the file is to be written.
    pub fn note(&self, services: &[ServiceReport], now_ms: u64) -> bool {
        let mut state = self.state();
        for service in services {
            let known = state
                .now
                .services
                .entry(service.service.clone())
                .or_default();
            known.unread = service
                .volumes
                .iter()
                .filter(|volume| volume.unread)
                .map(|volume| volume.name.clone())
                .collect();
            for peer in &service.peers {
                let of_peer = known.peers.entry(peer.node.clone()).or_default();
                of_peer.unread = peer.unread_volumes.iter().cloned().collect();
                if !peer.lag_at_least {
                    of_peer.whole_until_ms = Some(now_ms.saturating_sub(peer.lag_ms));
                }
            }
        }
        let rounded = |known: &Known| {
            let mut known = known.clone();
            for peer in known
                .services
                .values_mut()
                .flat_map(|service| service.peers.values_mut())
            {
                peer.whole_until_ms = peer.whole_until_ms.map(|ms| ms / WRITE_INTERVAL_MS);
            }
            known
        };
        rounded(&state.now) != rounded(&state.written)
    }

    /// Replaces the file by what is known now. Blocks.
    ///
    /// # Errors
    /// The state directory cannot be written; the file is as it was.
    pub fn store(&self) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.state().now.clone();
        let new = self.state_dir.join("observed.json.new");
        let mut file = std::fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(&known)?)?;
        file.sync_all()?;
        std::fs::rename(&new, self.state_dir.join(Self::FILE))?;
        std::fs::File::open(&self.state_dir)?.sync_all()?;
        self.state().written = known;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::render::tests::sample;

    fn lagging(lag_ms: u64, at_least: bool) -> Vec<ServiceReport> {
        let mut services = sample().services;
        services[0].peers[0].lag_ms = lag_ms;
        services[0].peers[0].lag_at_least = at_least;
        services
    }

    #[test]
    fn a_lag_from_before_the_start_is_counted_from_the_last_whole_moment() {
        let dir = tempfile::tempdir().unwrap();
        let day = 86_400_000;
        let first = Observed::load(dir.path());
        // Unknown: what the core says, as a lower bound.
        let mut services = lagging(300, true);
        first.complete(&mut services, 20 * day);
        assert_eq!(
            (
                services[0].peers[0].lag_ms,
                services[0].peers[0].lag_at_least
            ),
            (300, true)
        );
        // It lagged 5 s behind at the last look: whole until 5 s before.
        assert!(first.note(&lagging(5_000, false), 20 * day));
        first.store().unwrap();
        let second = Observed::load(dir.path());
        let mut services = lagging(300, true);
        second.complete(&mut services, 20 * day + 60_000);
        assert_eq!(
            (
                services[0].peers[0].lag_ms,
                services[0].peers[0].lag_at_least
            ),
            (65_000, false)
        );
        // A second restart before it was whole again counts from the same moment.
        second.note(&services, 20 * day + 60_000);
        second.store().unwrap();
        let mut services = lagging(10, true);
        Observed::load(dir.path()).complete(&mut services, 20 * day + 90_000);
        assert_eq!(services[0].peers[0].lag_ms, 95_000);
        // A clock that went back cannot tell.
        let mut services = lagging(10, true);
        Observed::load(dir.path()).complete(&mut services, 19 * day);
        assert!(services[0].peers[0].lag_at_least);
        // Once the core knows the age itself, the memory has no say.
        let mut services = lagging(10, false);
        Observed::load(dir.path()).complete(&mut services, 20 * day + 90_000);
        assert_eq!(services[0].peers[0].lag_ms, 10);
    }

    #[test]
    fn the_file_is_written_once_in_an_interval_and_at_once_for_a_disk_that_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let observed = Observed::load(dir.path());
        assert!(observed.note(&lagging(0, false), 100_000));
        observed.store().unwrap();
        assert!(!observed.note(&lagging(0, false), 109_000));
        assert!(observed.note(&lagging(0, false), 110_000));
        observed.store().unwrap();
        let mut services = lagging(0, false);
        services[0].volumes[0].unread = true;
        services[0].peers[0].unread_volumes = vec!["data".into()];
        assert!(observed.note(&services, 110_001));
        observed.store().unwrap();
        let again = Observed::load(dir.path());
        let data = BTreeSet::from(["data".to_owned()]);
        assert_eq!(again.unread(&services[0].service, None), data);
        assert_eq!(
            again.unread(&services[0].service, Some(&services[0].peers[0].node)),
            data
        );
        assert!(again.unread("another", None).is_empty());
    }

    #[test]
    fn a_damaged_file_is_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(Observed::FILE), "{").unwrap();
        let observed = Observed::load(dir.path());
        let mut services = lagging(300, true);
        observed.complete(&mut services, 5);
        assert_eq!(services[0].peers[0].lag_ms, 300);
        assert!(observed.note(&lagging(0, false), 5));
    }
}
