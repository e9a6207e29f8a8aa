//! Several services on the nodes of one cluster, each promoted, loaded and looked at on its own.

use crate::cluster::{Cluster, LINK_PORT, NAMES, Node, PATIENCE, SERVICE};
use crate::nbd::{Nbd, NbdError};
use holdfast_replicator::control::protocol::{
    EventReport, LinkName, PeerReport, RoleName, ServiceReport, StateName,
};
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

/// A service beside the cluster's own. Its volumes are files.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: &'static str,
    /// `sync`, `semi-sync` or `async`.
    pub mode: &'static str,
    /// `suspend` or `continue`.
    pub on_peer_loss: &'static str,
    /// By name, with their size in bytes. Other services may have volumes of the same name.
    pub volumes: Vec<(&'static str, u64)>,
}

impl Node {
    /// The lines of one more service in this node's configuration.
    pub(crate) fn further_service(
        &self,
        number: usize,
        service: &Service,
        addresses: &[Ipv4Addr],
    ) -> String {
        let id = 0x0dd0_5e51_ce00_0000 + (u128::from(std::process::id()) << 32) + number as u128;
        let mut text = format!(
            "[[service]]\nname = {:?}\nid = \"{id:032x}\"\nslot = {}\nmode = {:?}\non_peer_loss = {:?}\n",
            service.name, self.slot, service.mode, service.on_peer_loss
        );
        let mut line = |arguments: std::fmt::Arguments<'_>| {
            text.write_fmt(arguments)
                .expect("a string takes everything");
        };
        for (volume, size) in &service.volumes {
            line(format_args!(
                "[[service.volume]]\nname = {volume:?}\nbacking = {:?}\nsize = {size}\n",
                self.of(service.name).image(volume).display().to_string()
            ));
        }
        for (other, address) in addresses.iter().enumerate() {
            if other != usize::from(self.slot) {
                line(format_args!(
                    "[[service.peer]]\nnode = {:?}\nslot = {other}\naddresses = [\"{address}:{LINK_PORT}\"]\n",
                    NAMES[other]
                ));
            }
        }
        line(format_args!("[service.tuning]\n"));
        for (key, value) in &self.settings.tuning {
            line(format_args!("{key} = {value}\n"));
        }
        text
    }

    /// This node's copy of a service.
    pub fn of<'a>(&'a self, service: &'a str) -> Copy<'a> {
        Copy {
            node: self,
            service,
        }
    }

    /// The last lines of its event log, oldest first.
    #[track_caller]
    pub fn events(&self, last: u32) -> Vec<EventReport> {
        let text = self.must(&["events", "--json", "--last", &last.to_string()]);
        text.lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }
}

/// One node's copy of one service.
#[derive(Clone, Copy)]
pub struct Copy<'a> {
    pub node: &'a Node,
    pub service: &'a str,
}

impl Copy<'_> {
    /// The service's part of `holdfast status --json`.
    #[track_caller]
    pub fn report(&self) -> ServiceReport {
        let status = self.node.try_status();
        let status = status.unwrap_or_else(|| panic!("{} does not answer", self.node.name));
        let mut services = status.services.into_iter();
        let found = services.find(|service| service.name == self.service);
        found.unwrap_or_else(|| panic!("{} does not have {}", self.node.name, self.service))
    }

    /// What it says of the copy in that slot.
    #[track_caller]
    pub fn peer(&self, slot: usize) -> PeerReport {
        peer(&self.report(), slot).clone()
    }

    /// Waits until the service's status is as `judge` wants it.
    ///
    /// # Panics
    /// The process ends, or patience does.
    #[track_caller]
    pub fn until(&self, what: &str, judge: impl Fn(&ServiceReport) -> bool) -> ServiceReport {
        let what = format!("{what} ({})", self.service);
        self.node
            .until_some(&what, |_| Some(self.report()).filter(&judge))
    }

    /// Waits until the link to the copy in that slot is down.
    #[track_caller]
    pub fn until_misses(&self, slot: usize) {
        self.until("it misses its peer", |service| {
            matches!(
                peer(service, slot).link,
                LinkName::Connecting | LinkName::Off
            )
        });
    }

    /// `holdfast promote`, without force, and waits until it is primary.
    #[track_caller]
    pub fn promote(&self) {
        self.node.must(&["promote", self.service]);
        self.until("it is primary", |service| service.role == RoleName::Primary);
    }

    /// `holdfast promote --force`, and waits until it is primary.
    #[track_caller]
    pub fn force(&self) {
        self.node
            .must(&["promote", self.service, "--force", "--yes"]);
        self.until("it is primary", |service| service.role == RoleName::Primary);
    }

    /// `holdfast demote`, and waits until it is secondary.
    #[track_caller]
    pub fn demote(&self) {
        self.node.must(&["demote", self.service]);
        self.until("it is secondary", |service| {
            service.role == RoleName::Secondary
        });
    }

    /// Stops this copy cleanly, as a program does it: the control API's `detach`.
    #[track_caller]
    pub fn detach(&self) {
        let stream = UnixStream::connect(self.node.path("control.sock")).expect("control socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let hello = r#"{"version_min":1,"version_max":1,"program":"e2e"}"#;
        let command = format!(
            r#"{{"id":1,"request":{{"command":{{"service":{:?},"command":"detach"}}}}}}"#,
            self.service
        );
        (&stream)
            .write_all(format!("{hello}\n{command}\n").as_bytes())
            .expect("a request");
        let mut answers = BufReader::new(&stream).lines();
        let _hello = answers.next().expect("a hello").expect("a hello");
        let answer = answers.next().expect("an answer").expect("an answer");
        assert!(answer.contains("\"done\""), "detach: {answer}");
    }

    /// A connection to a volume, as an application makes it.
    ///
    /// # Errors
    /// It is refused, for instance because this copy is not primary.
    pub fn nbd(&self, volume: &str) -> Result<Nbd, NbdError> {
        self.node.nbd(&format!("{}/{volume}", self.service))
    }

    /// The file under a volume.
    pub fn image(&self, volume: &str) -> PathBuf {
        if self.service == SERVICE {
            self.node.image(volume)
        } else {
            self.node.path(&format!("{}-{volume}.img", self.service))
        }
    }

    /// Its volumes, by name, with their size in bytes.
    pub fn volumes(&self) -> &[(&'static str, u64)] {
        let settings = &self.node.settings;
        let other = settings
            .others
            .iter()
            .find(|other| other.name == self.service);
        match other {
            Some(other) => &other.volumes,
            None => &settings.volumes,
        }
    }

    /// A volume's bytes as they are on this node's disk.
    pub fn on_disk(&self, volume: &str) -> Vec<u8> {
        let (_, size) = self
            .volumes()
            .iter()
            .find(|(name, _)| *name == volume)
            .expect("a volume of the service");
        let mut bytes = vec![0; *size as usize];
        std::fs::File::open(self.image(volume))
            .and_then(|file| file.read_exact_at(&mut bytes, 0))
            .expect("the backing can be read");
        bytes
    }
}

/// What a copy says of the copy in that slot.
#[track_caller]
pub fn peer(service: &ServiceReport, slot: usize) -> &PeerReport {
    let found = service
        .peers
        .iter()
        .find(|peer| usize::from(peer.slot) == slot);
    found.expect("a configured peer")
}

impl Cluster {
    /// As [`Cluster::until_in_sync`], for one of several services.
    #[track_caller]
    pub fn until_service_in_sync(&self, name: &str, primary: usize, copies: &[usize]) {
        let slots: Vec<u8> = copies.iter().map(|slot| *slot as u8).collect();
        // A machine with too little time for its work loses links, copies slowly and comes through all the same: it has time as
        // long as what is left becomes less. Less than at the look before, not than ever: a copy that was away has little to get until it
        // is told that a resync begins.
        let start = Instant::now();
        let mut moved = start;
        let mut before = u64::MAX;
        self[primary].until_some_by("the copies are in sync", |_| {
            let service = self[primary].of(name).report();
            let mut left = 0;
            let mut done = service.role == RoleName::Primary
                && service.in_sync == slots
                && (service.in_sync_pending.is_empty() || service.in_sync_pending == slots);
            for at in copies.iter().filter(|at| **at != primary) {
                let peer = peer(&service, *at);
                let copying = peer.resync.as_ref().map_or(0, |resync| resync.left_bytes);
                left += peer.dirty_bytes.max(copying);
                done &= peer.link == LinkName::Established
                    && peer.dirty_bytes == 0
                    && peer.resync.is_none();
            }
            if left < before {
                moved = Instant::now();
            }
            before = left;
            let deadline = (moved + PATIENCE).min(start + 5 * PATIENCE);
            if done { Ok(()) } else { Err(deadline) }
        });
        for &at in copies {
            self[at].of(name).until("its copy is UpToDate", |service| {
                service.state == StateName::UpToDate
            });
        }
    }

    /// As [`Cluster::verify`], for one of several services, with every copy whose link is established.
    #[track_caller]
    pub fn verify_service(&self, name: &str, primary: usize) {
        let copy = self[primary].of(name);
        let output = self[primary].run(&["verify", name, "--wait"]);
        assert!(
            output.status.success(),
            "verify: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        let bytes: u64 = copy.volumes().iter().map(|(_, size)| size).sum();
        let service = copy.report();
        for peer in &service.peers {
            let all = peer
                .verify
                .as_ref()
                .is_some_and(|verify| verify.different_bytes == 0 && verify.done_bytes >= bytes);
            assert!(
                all || peer.link != LinkName::Established,
                "verify did not compare everything: {service:#?}"
            );
        }
    }

    /// As [`Cluster::same_bytes`], for one of several services.
    #[track_caller]
    pub fn same_bytes_of(&self, name: &str, copies: &[usize]) {
        let first = self[copies[0]].of(name);
        for (volume, _) in first.volumes() {
            let bytes = first.on_disk(volume);
            for at in &copies[1..] {
                let other = self[*at].of(name).on_disk(volume);
                let differs = bytes
                    .chunks(512)
                    .zip(other.chunks(512))
                    .position(|(left, right)| left != right);
                assert!(
                    differs.is_none(),
                    "{name}/{volume} of {} and {} differ at byte {:?}",
                    self[copies[0]].name,
                    self[*at].name,
                    differs.map(|sector| sector * 512)
                );
            }
        }
    }
}
