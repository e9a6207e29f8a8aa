//! N nodes on this machine, each a real `holdfast replicator` with its own directory, identity, loopback address and disk,
//! set up through the command line as on N machines.

use crate::evidence;
use crate::faults::Faults;
use crate::loop_device::LoopDevice;
use crate::mounts::SmallFilesystem;
use crate::nbd::{Nbd, NbdError};
use crate::process::{self, spawn};
use crate::programs;
use crate::relay::Relay;
use holdfast_replicator::control::protocol::{
    LinkName, NodeStatus, PeerReport, RoleName, ServiceReport,
};
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, UdpSocket};
use std::ops::{Index, IndexMut};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Name of the service in every cluster.
pub const SERVICE: &str = "db";
pub(crate) const NAMES: [&str; 4] = ["alpha", "beta", "gamma", "delta"];
/// Everything waited for happens within moments; longer means that something is broken.
pub const PATIENCE: Duration = Duration::from_secs(40);
const LOOK_EVERY: Duration = Duration::from_millis(10);
pub(crate) const LINK_PORT: u16 = 7741;

/// What a volume lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    File,
    /// A loop device over a file. Needs root.
    Loop,
    /// A file under the fault layer: a volatile cache that a power cut loses, and failures on command.
    Faults,
}

/// How a cluster is made. Change what the test is about.
#[derive(Clone, Debug)]
pub struct Settings {
    /// 2 to 4. Every node has a copy of every volume.
    pub nodes: usize,
    /// `sync`, `semi-sync` or `async`.
    pub mode: &'static str,
    /// `suspend` or `continue`.
    pub on_peer_loss: &'static str,
    /// Volumes of the one service, by name, with their size in bytes.
    pub volumes: Vec<(&'static str, u64)>,
    pub backing: Backing,
    /// In a file of its own instead of at the end of the backing.
    pub external_metadata: bool,
    /// Bytes; the backing's if none.
    pub sector_size: Option<u32>,
    /// Slots of copies that every other copy treats as asynchronous peers.
    pub asynchronous: Vec<usize>,
    /// `key = value` lines of `[service.tuning]`.
    pub tuning: Vec<(&'static str, String)>,
    /// Log filter of the replicators.
    pub log: &'static str,
    /// Slots of nodes that come later ([`Cluster::introduce`]): they have an identity, and nobody knows them yet.
    pub later: Vec<usize>,
    /// Services beside the one described above, with a copy on every node and the same tuning.
    pub others: Vec<crate::services::Service>,
    /// Two nodes reach each other through a [`Relay`] that makes its choices by this seed.
    pub relay: Option<u64>,
    /// Filesystems of so many bytes under a part of a node's files. Needs root.
    pub small: Vec<(usize, Part, u64)>,
}

/// A part of a node's files that can lie on a filesystem of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The state directory, on a tmpfs.
    State,
    /// The backings of the volumes, with internal metadata, on ext4.
    Backings,
    /// External metadata, on ext4.
    Metadata,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            nodes: 2,
            mode: "sync",
            on_peer_loss: "suspend",
            volumes: vec![("data", 32 << 20)],
            backing: Backing::File,
            external_metadata: false,
            sector_size: None,
            asynchronous: Vec::new(),
            tuning: vec![
                // Tests wait for a lost peer often, on machines with little time to spare.
                ("heartbeat_ms", "100".into()),
                ("peer_timeout_ms", "600".into()),
            ],
            log: "info",
            later: Vec::new(),
            others: Vec::new(),
            relay: None,
            small: Vec::new(),
        }
    }
}

/// Nodes that were made, joined, given their volumes and started.
pub struct Cluster {
    pub nodes: Vec<Node>,
    addresses: Addresses,
    service_id: String,
    relay: Option<Relay>,
    directory: Option<tempfile::TempDir>,
}

/// Where the nodes' links are.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    /// By slot: where it listens.
    listen: Vec<Ipv4Addr>,
    /// By slot: where others find it.
    pub(crate) reach: Vec<Ipv4Addr>,
}

impl Index<usize> for Cluster {
    type Output = Node;
    fn index(&self, at: usize) -> &Node {
        &self.nodes[at]
    }
}

impl IndexMut<usize> for Cluster {
    fn index_mut(&mut self, at: usize) -> &mut Node {
        &mut self.nodes[at]
    }
}

/// Loopback addresses that nobody else uses: 127/8 is wide, and what is taken is passed over.
fn addresses(count: usize) -> Vec<Ipv4Addr> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut found = Vec::new();
    while found.len() < count {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = std::process::id().wrapping_mul(251).wrapping_add(n) % (200 * 250 * 250);
        let address = Ipv4Addr::new(
            127,
            20 + (place / 62_500) as u8,
            2 + (place / 250 % 250) as u8,
            2 + (place % 250) as u8,
        );
        if UdpSocket::bind((address, LINK_PORT)).is_ok() {
            found.push(address);
        }
    }
    found
}

impl Cluster {
    /// Makes and starts a cluster and waits until every link is up.
    pub fn start(settings: &Settings) -> Cluster {
        let mut cluster = Cluster::make(settings);
        for node in &mut cluster.nodes {
            if !settings.later.contains(&usize::from(node.slot)) {
                node.start();
            }
        }
        if settings.backing == Backing::Loop {
            // Nobody knows what was on a device: somebody must say which copy the service starts from.
            for other in 1..settings.nodes {
                cluster[0].until("it says that nobody knows", |service| {
                    service.peers[other - 1].link == LinkName::Handshake
                });
            }
            cluster[0].force();
        }
        cluster.until_connected();
        cluster
    }

    /// Makes a cluster with identities, peers and volumes, and starts nothing.
    pub fn make(settings: &Settings) -> Cluster {
        assert!((2..=NAMES.len()).contains(&settings.nodes));
        let directory = tempfile::Builder::new()
            .prefix("hf-")
            .tempdir()
            .expect("a temporary directory");
        let exe = match settings.backing {
            Backing::Faults => programs::holdfast_with_faults(),
            _ => programs::holdfast(),
        };
        let listen = addresses(settings.nodes);
        let reach = match settings.relay {
            Some(_) => addresses(settings.nodes),
            None => listen.clone(),
        };
        let relay = settings.relay.map(|seed| {
            let pair = |all: &[Ipv4Addr]| all.try_into().expect("a relay is for two nodes");
            Relay::start(pair(&listen), pair(&reach), LINK_PORT, seed)
        });
        let addresses = Addresses { listen, reach };
        let service_id = format!("{:032x}", 0x5e51_ce00 + u128::from(std::process::id()));
        let nodes: Vec<Node> = (0..settings.nodes)
            .map(|slot| {
                let mut node = Node {
                    name: NAMES[slot],
                    slot: slot as u8,
                    directory: directory.path().join(NAMES[slot]),
                    exe: exe.to_path_buf(),
                    settings: settings.clone(),
                    environment: Vec::new(),
                    loops: Vec::new(),
                    small: Vec::new(),
                    child: None,
                };
                std::fs::create_dir_all(node.path("faults")).expect("a directory");
                for (_, part, bytes) in settings.small.iter().filter(|small| small.0 == slot) {
                    let place = node.path(part.directory());
                    node.small
                        .push((*part, SmallFilesystem::mount(&place, *part, *bytes)));
                }
                node
            })
            .collect();
        let mut cluster = Cluster {
            nodes,
            addresses: addresses.clone(),
            service_id: service_id.clone(),
            relay,
            directory: Some(directory),
        };
        for node in &mut cluster.nodes {
            node.configure(&addresses, &service_id);
            node.must(&["init"]);
        }
        for inviting in 0..settings.nodes {
            for joining in inviting + 1..settings.nodes {
                if settings.later.contains(&inviting) || settings.later.contains(&joining) {
                    continue;
                }
                join(&cluster.nodes[inviting], &cluster.nodes[joining]);
            }
        }
        for node in &cluster.nodes {
            if settings.later.contains(&usize::from(node.slot)) {
                continue;
            }
            node.must(&["volume", "create", SERVICE]);
            for other in &settings.others {
                node.must(&["volume", "create", other.name]);
            }
        }
        cluster
    }

    /// Brings a node of [`Settings::later`] in as a person would: it joins every other node, whether that runs or not, gets its
    /// volumes, and all configurations name it from now on. Running replicators read theirs when they are started anew.
    #[track_caller]
    pub fn introduce(&mut self, newcomer: usize) {
        for node in &mut self.nodes {
            node.settings.later.retain(|slot| *slot != newcomer);
        }
        let later = self.nodes[newcomer].settings.later.clone();
        for other in (0..self.nodes.len()).filter(|slot| *slot != newcomer) {
            if !later.contains(&other) {
                join(&self.nodes[other], &self.nodes[newcomer]);
            }
        }
        let (addresses, service_id) = (self.addresses.clone(), self.service_id.clone());
        for node in &mut self.nodes {
            node.configure(&addresses, &service_id);
        }
        self.nodes[newcomer].must(&["volume", "create", SERVICE]);
    }

    /// What is between the nodes.
    ///
    /// # Panics
    /// Nothing is.
    #[track_caller]
    pub fn relay(&self) -> &Relay {
        self.relay.as_ref().expect("a relay")
    }

    /// Where the cluster's files are.
    pub fn directory(&self) -> &Path {
        self.directory.as_ref().expect("not yet dropped").path()
    }

    /// Waits until every running node has every other running node on the link, done with handshake and resync.
    #[track_caller]
    pub fn until_connected(&self) {
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|at| self.nodes[*at].is_running())
            .collect();
        for &at in &running {
            self.nodes[at].until("every link is established", |service| {
                service.peers.iter().all(|peer| {
                    !running.contains(&usize::from(peer.slot)) || peer.link == LinkName::Established
                })
            });
        }
    }

    /// Waits until the primary counts all these copies in sync, with nothing dirty and no resync, and each of them says
    /// that it is UpToDate.
    ///
    /// # Panics
    /// Nothing came nearer to that within the patience, or too much time passed in all.
    #[track_caller]
    pub fn until_in_sync(&self, primary: usize, copies: &[usize]) {
        self.until_service_in_sync(SERVICE, primary, copies);
    }

    /// Has `verify` compare the copies while they run, from the primary.
    ///
    /// # Panics
    /// It finds that they differ, or does not end.
    #[track_caller]
    pub fn verify(&self, primary: usize) {
        let output = self.nodes[primary].run(&["verify", SERVICE, "--wait"]);
        assert!(
            output.status.success(),
            "verify: {}\n{}{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.nodes[primary].screen()
        );
        let bytes: u64 = self.nodes[primary]
            .settings
            .volumes
            .iter()
            .map(|(_, size)| size)
            .sum();
        let service = self.nodes[primary].service();
        let compared = service
            .peers
            .iter()
            .filter_map(|peer| peer.verify.as_ref())
            .any(|verify| verify.different_bytes == 0 && verify.done_bytes >= bytes);
        assert!(compared, "verify did not compare everything: {service:#?}");
    }

    /// Compares the volumes' bytes of these stopped nodes.
    ///
    /// # Panics
    /// They differ.
    #[track_caller]
    pub fn same_bytes(&self, copies: &[usize]) {
        for (volume, _) in &self.nodes[0].settings.volumes {
            let first = self.nodes[copies[0]].on_disk(volume);
            for at in &copies[1..] {
                let other = self.nodes[*at].on_disk(volume);
                let differs = first
                    .chunks(512)
                    .zip(other.chunks(512))
                    .position(|(left, right)| left != right);
                assert!(
                    first.len() == other.len() && differs.is_none(),
                    "{volume} of {} and {} differ at byte {:?}",
                    self.nodes[copies[0]].name,
                    self.nodes[*at].name,
                    differs.map(|sector| sector * 512)
                );
            }
        }
    }

    /// SIGTERM to every running node, secondaries first, each of which must end with success.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut order: Vec<usize> = (0..self.nodes.len())
            .filter(|at| self.nodes[*at].is_running())
            .collect();
        order.sort_by_key(|at| self.nodes[*at].service().role == RoleName::Primary);
        for at in order {
            self.nodes[at].stop();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        for node in &mut self.nodes {
            if failed {
                if node.is_running() {
                    node.thaw();
                }
                eprintln!("--- {} ---\n{}", node.name, node.screen());
                eprintln!("{}", node.log_tail(60));
            }
            node.kill();
        }
        if failed {
            if let Some(relay) = &self.relay {
                eprintln!("--- the relay ---\n{:?}", relay.counts());
            }
            evidence::keep(self.directory());
        }
        for node in &mut self.nodes {
            node.small.clear();
        }
    }
}

/// Has `joining` join `inviting`, with the verbs a person would use.
fn join(inviting: &Node, joining: &Node) {
    let mut command = inviting.holdfast(&["token", "--listen", "127.0.0.1:0"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut waiting = spawn(command).expect("holdfast token");
    let mut token = String::new();
    let mut stdout = BufReader::new(waiting.stdout.take().expect("piped"));
    stdout.read_line(&mut token).expect("a token");
    // The file keeps the token out of the argument list, as a user would.
    let file = joining.path("token");
    std::fs::write(&file, &token).expect("a token in a file");
    let mut command = joining.holdfast(&["join"]);
    command.stdin(std::fs::File::open(&file).expect("the token's file"));
    process::must(command, PATIENCE);
    let ended = process::wait(&mut waiting, PATIENCE);
    assert!(
        ended.is_some_and(|status| status.success()),
        "holdfast token on {}: {ended:?}",
        inviting.name
    );
}

/// One node and, while it runs, its replicator.
pub struct Node {
    pub name: &'static str,
    pub slot: u8,
    directory: PathBuf,
    exe: PathBuf,
    pub(crate) settings: Settings,
    /// Added to the replicator's environment.
    pub environment: Vec<(String, String)>,
    loops: Vec<LoopDevice>,
    small: Vec<(Part, SmallFilesystem)>,
    child: Option<Child>,
}

impl Part {
    fn directory(self) -> &'static str {
        match self {
            Part::State => "state",
            Part::Backings => "backings",
            Part::Metadata => "metadata",
        }
    }
}

impl Node {
    /// A path in the node's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The file under a volume (with a loop device between, if there is one). Metadata may follow the data.
    pub fn image(&self, volume: &str) -> PathBuf {
        self.place(Part::Backings).join(format!("{volume}.img"))
    }

    /// Where files of that kind are.
    fn place(&self, part: Part) -> PathBuf {
        if self.small.iter().any(|(small, _)| *small == part) {
            self.path(part.directory())
        } else {
            self.directory.clone()
        }
    }

    /// The small filesystem under a part of its files.
    #[track_caller]
    pub fn small(&self, part: Part) -> &SmallFilesystem {
        let found = self.small.iter().find(|(small, _)| *small == part);
        &found.expect("a small filesystem").1
    }

    /// The volume's bytes as they are on this node's disk.
    pub fn on_disk(&self, volume: &str) -> Vec<u8> {
        let size = self.volume_size(volume);
        let mut bytes = vec![0; size as usize];
        std::fs::File::open(self.image(volume))
            .and_then(|file| file.read_exact_at(&mut bytes, 0))
            .expect("the backing can be read");
        bytes
    }

    /// The name of the first volume.
    pub fn volume_name(&self) -> &'static str {
        self.settings.volumes[0].0
    }

    fn volume_size(&self, volume: &str) -> u64 {
        let volumes = &self.settings.volumes;
        let found = volumes.iter().find(|(name, _)| *name == volume);
        found.expect("a volume of the cluster").1
    }

    fn configure(&mut self, addresses: &Addresses, service_id: &str) {
        let slot = usize::from(self.slot);
        let settings = self.settings.clone();
        let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
        let mut text = format!(
            "[node]\nname = {:?}\nstate_dir = {}\nlink_listen = [\"{}:{LINK_PORT}\"]\ncontrol_socket = {}\nmetrics = \"off\"\n\
             [nbd]\nunix = {}\n\
             [[service]]\nname = \"{SERVICE}\"\nid = {service_id:?}\nslot = {slot}\nmode = {:?}\non_peer_loss = {:?}\n",
            self.name,
            quoted(self.path("state")),
            addresses.listen[slot],
            quoted(self.path("control.sock")),
            quoted(self.path("nbd.sock")),
            settings.mode,
            settings.on_peer_loss,
        );
        for (volume, size) in &settings.volumes {
            let mut backing = self.image(volume);
            if settings.backing == Backing::Loop {
                // Room for internal metadata, of which a file gets as much as it needs.
                let file = std::fs::File::create(&backing).expect("a file");
                file.set_len(size + (32 << 20)).expect("a sparse file");
                let device = LoopDevice::over(&backing).expect("a loop device");
                backing = device.path().to_path_buf();
                self.loops.push(device);
            }
            text += &format!(
                "[[service.volume]]\nname = {volume:?}\nbacking = {}\nsize = {size}\n",
                quoted(backing)
            );
            if settings.external_metadata {
                text += &format!(
                    "metadata = {}\n",
                    quoted(self.place(Part::Metadata).join(format!("{volume}.meta")))
                );
            }
            if let Some(bytes) = settings.sector_size {
                text += &format!("sector_size = {bytes}\n");
            }
        }
        let known = |other: &usize| *other != slot && !settings.later.contains(other);
        for other in (0..settings.nodes).filter(known) {
            text += &format!(
                "[[service.peer]]\nnode = {:?}\nslot = {other}\naddresses = [\"{}:{LINK_PORT}\"]\n",
                NAMES[other], addresses.reach[other]
            );
            if settings.asynchronous.contains(&other) || settings.asynchronous.contains(&slot) {
                text += "mode = \"async\"\n";
            }
        }
        if !settings.tuning.is_empty() {
            text += "[service.tuning]\n";
            for (key, value) in &settings.tuning {
                text += &format!("{key} = {value}\n");
            }
        }
        for (number, service) in settings.others.iter().enumerate() {
            text += &self.further_service(number, service, &addresses.reach);
        }
        std::fs::write(self.path("holdfast.toml"), text).expect("a configuration file");
    }

    /// `holdfast ARGUMENTS` with this node's configuration, as a person would call it there.
    pub fn holdfast(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.exe);
        command
            .args(arguments)
            .arg("--config")
            .arg(self.path("holdfast.toml"))
            .stdin(Stdio::null())
            // Settings of whoever runs the tests must not lead elsewhere.
            .env_remove("HOLDFAST_SOCKET")
            .env_remove("HOLDFAST_CONFIG");
        command
    }

    /// Runs a verb to its end.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> std::process::Output {
        process::run(self.holdfast(arguments), PATIENCE)
    }

    /// Runs a verb that must succeed and returns what it printed.
    #[track_caller]
    pub fn must(&self, arguments: &[&str]) -> String {
        process::must(self.holdfast(arguments), PATIENCE)
    }

    /// Starts the replicator and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("replicator.log"))
            .expect("a log file");
        let mut command = self.holdfast(&["replicator"]);
        command
            .env("HOLDFAST_LOG", self.settings.log)
            .envs(self.environment.iter().cloned())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        if self.settings.backing == Backing::Faults {
            command.env("HOLDFAST_FAULT_DIR", self.path("faults"));
        }
        self.child = Some(spawn(command).expect("holdfast replicator"));
        self.until_some("the replicator answers", |node| node.try_status());
    }

    /// SIGKILL; returns once the process is gone. Nothing happens if none runs.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            child.wait().expect("waiting for an own child");
        }
    }

    /// A function that kills the process from another thread, in the midst of a load. Tell the node with [`Node::kill`]
    /// afterwards.
    pub fn killer(&self) -> impl Fn() + Send + use<> {
        let pid = self.pid().expect("it runs");
        move || {
            let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
            // Not waited for before `kill`, so the number is still that child's.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// SIGTERM; the process must end by itself, with success.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        process::signal(&child, rustix::process::Signal::TERM);
        let ended = process::wait(&mut child, PATIENCE);
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        assert!(
            ended.is_some_and(|status| status.success()),
            "{} ended with {ended:?} on SIGTERM\n{}",
            self.name,
            self.log_tail(40)
        );
    }

    /// The switchboard of a volume's backing (its data; with internal metadata also that).
    pub fn faults(&self, volume: &str) -> Faults {
        assert_eq!(self.settings.backing, Backing::Faults);
        Faults {
            socket: self.path(&format!("faults/{SERVICE}-{volume}.sock")),
        }
    }

    /// Cuts this node's power: its process ends, and of what its disks had not flushed, `seed` decides what survives;
    /// without a seed nothing does.
    #[track_caller]
    pub fn cut_power(&mut self, seed: Option<u64>) {
        let (volume, _) = self.settings.volumes[0];
        let which = seed.map_or_else(|| "all".to_owned(), |seed| seed.to_string());
        let answer = self.faults(volume).try_tell(&format!("powercut {which}"));
        let mut child = self.child.take().expect("it runs");
        let ended = process::wait(&mut child, PATIENCE);
        let aborted = ended.is_some_and(|status| status.signal() == Some(6 /* SIGABRT */));
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        assert!(
            aborted,
            "{}: the power cut was answered with {answer:?}, the process ended with {ended:?}\n{}",
            self.name,
            self.log_tail(40)
        );
    }

    /// SIGSTOP: the process stands still with everything it holds, as on a machine that is paused.
    #[track_caller]
    pub fn freeze(&self) {
        process::signal(
            self.child.as_ref().expect("it runs"),
            rustix::process::Signal::STOP,
        );
    }

    /// SIGCONT: it goes on. Nothing happens if it was not frozen.
    #[track_caller]
    pub fn thaw(&self) {
        process::signal(
            self.child.as_ref().expect("it runs"),
            rustix::process::Signal::CONT,
        );
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it was started and not ended since through this harness.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// `holdfast status --json`, if somebody answers.
    pub fn try_status(&self) -> Option<NodeStatus> {
        let output = self.run(&["status", "--json"]);
        if !output.status.success() {
            return None;
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    /// The service's part of `holdfast status --json`.
    #[track_caller]
    pub fn service(&self) -> ServiceReport {
        let status = self
            .try_status()
            .unwrap_or_else(|| panic!("{} does not answer\n{}", self.name, self.log_tail(40)));
        let mut services = status.services.into_iter();
        let found = services.find(|service| service.name == SERVICE);
        found.unwrap_or_else(|| panic!("{} does not have the service", self.name))
    }

    /// What it says of the copy in that slot.
    #[track_caller]
    pub fn peer(&self, slot: usize) -> PeerReport {
        let service = self.service();
        let found = service
            .peers
            .iter()
            .find(|peer| usize::from(peer.slot) == slot);
        found.expect("a configured peer").clone()
    }

    /// Waits until the service's status is as `judge` wants it.
    ///
    /// # Panics
    /// The process ends, or patience does.
    #[track_caller]
    pub fn until(&self, what: &str, judge: impl Fn(&ServiceReport) -> bool) -> ServiceReport {
        self.until_some(what, |node| Some(node.service()).filter(&judge))
    }

    #[track_caller]
    pub(crate) fn until_some<T>(&self, what: &str, mut look: impl FnMut(&Node) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        self.until_some_by(what, |node| look(node).ok_or(deadline))
    }

    /// Waits until `look` finds something; until then it says how long to wait at most.
    #[track_caller]
    pub(crate) fn until_some_by<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&Node) -> Result<T, Instant>,
    ) -> T {
        loop {
            if let Some(ended) = self.ended() {
                panic!(
                    "{} ended ({ended}) before {what}\n{}",
                    self.name,
                    self.log_tail(40)
                );
            }
            match look(self) {
                Ok(found) => return found,
                Err(deadline) => assert!(
                    Instant::now() < deadline,
                    "{}: waited in vain until {what}\n{}\n{}",
                    self.name,
                    self.screen(),
                    self.log_tail(40)
                ),
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// How the process ended by itself, if it did. It stays this node's process.
    pub fn ended(&self) -> Option<ExitStatus> {
        // A zombie is still there; only waiting for it takes it away, and that needs `&mut`.
        let pid = rustix::process::Pid::from_raw(self.pid()? as i32)?;
        let options = rustix::process::WaitIdOptions::EXITED
            | rustix::process::WaitIdOptions::NOHANG
            | rustix::process::WaitIdOptions::NOWAIT;
        let status = rustix::process::waitid(rustix::process::WaitId::Pid(pid), options).ok()??;
        let raw = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code << 8,
            (None, Some(signal)) => signal,
            (None, None) => return None,
        };
        Some(ExitStatus::from_raw(raw))
    }

    /// Waits until the link to the copy in that slot is down.
    #[track_caller]
    pub fn until_misses(&self, slot: usize) {
        self.until("it misses its peer", |service| {
            service.peers.iter().any(|peer| {
                usize::from(peer.slot) == slot
                    && matches!(peer.link, LinkName::Connecting | LinkName::Off)
            })
        });
    }

    /// `holdfast promote`, without force, and waits until it is primary.
    #[track_caller]
    pub fn promote(&self) {
        self.must(&["promote", SERVICE]);
        self.until("it is primary", |service| service.role == RoleName::Primary);
    }

    /// `holdfast promote --force`, and waits until it is primary.
    #[track_caller]
    pub fn force(&self) {
        self.must(&["promote", SERVICE, "--force", "--yes"]);
        self.until("it is primary", |service| service.role == RoleName::Primary);
    }

    /// `holdfast demote`, and waits until it is secondary.
    #[track_caller]
    pub fn demote(&self) {
        self.must(&["demote", SERVICE]);
        self.until("it is secondary", |service| {
            service.role == RoleName::Secondary
        });
    }

    /// A connection to a volume, as an application makes it.
    ///
    /// # Errors
    /// It is refused, for instance because this node is not primary.
    pub fn nbd(&self, volume: &str) -> Result<Nbd, NbdError> {
        Nbd::connect(&self.path("nbd.sock"), volume, PATIENCE)
    }

    /// Where applications find a volume while this node is primary.
    pub fn nbd_uri(&self, volume: &str) -> String {
        format!(
            "nbd+unix:///{volume}?socket={}",
            self.path("nbd.sock").display()
        )
    }

    /// `holdfast status` as a person sees it, or why there is none.
    pub fn screen(&self) -> String {
        if !self.is_running() {
            return format!("{} does not run\n", self.name);
        }
        // Also called while a test fails already, when it must not panic once more.
        match process::try_run(self.holdfast(&["status"]), Duration::from_secs(10)) {
            Ok(output) => format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(why) => why,
        }
    }

    /// The last lines of the replicator's log.
    pub fn log_tail(&self, lines: usize) -> String {
        match std::fs::read(self.path("replicator.log")) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                let all: Vec<&str> = text.lines().collect();
                all[all.len().saturating_sub(lines)..].join("\n")
            }
            Err(error) => format!("(no log: {error})"),
        }
    }
}
