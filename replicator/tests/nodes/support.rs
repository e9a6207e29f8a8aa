//! Two replicators in one process, over loopback QUIC, on real files; and an application that speaks NBD with them.

use holdfast_link::{Identity, Peer, PeerStore};
use holdfast_replicator::config::Config;
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{LinkName, ServiceReport, StateName};
use holdfast_replicator::create::{CreateOptions, create};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::{AdminResult, Command};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Everything waited for here happens within moments; longer means that something is broken.
const PATIENCE: Duration = Duration::from_secs(20);
const SERVICE_ID: &str = "5e51ce00000000000000000000000001";

/// One node's directory and, while it runs, its replicator.
pub struct TestNode {
    pub name: &'static str,
    pub dir: PathBuf,
    pub slot: u8,
    peer: String,
    peer_slot: u8,
    /// Further services, as they stand in the configuration.
    pub more: String,
    pub replicator: Option<Replicator>,
}

/// Settings that tests vary.
#[derive(Clone)]
pub struct Settings {
    pub mode: &'static str,
    pub on_peer_loss: &'static str,
    pub metadata: &'static str,
    pub size: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            mode: "sync",
            on_peer_loss: "continue",
            metadata: "internal",
            size: 16 << 20,
        }
    }
}

/// What the replicators log goes to standard error of a test when `HOLDFAST_LOG` asks for it.
fn log_if_asked() {
    if let Ok(filter) = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG") {
        // The other test of this process was first.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .try_init();
    }
}

/// Two nodes that joined, in the order in which they are to be started: the second one dials the first.
pub fn two_nodes(root: &Path) -> [TestNode; 2] {
    log_if_asked();
    let mut made: Vec<(Identity, &'static str, u8)> = ["alpha", "beta"]
        .into_iter()
        .enumerate()
        .map(|(slot, name)| {
            let state = root.join(name).join("state");
            std::fs::create_dir_all(&state).unwrap();
            (Identity::init(&state, name).unwrap(), name, slot as u8)
        })
        .collect();
    for (this, other) in [(0, 1), (1, 0)] {
        let peer = Peer {
            id: made[other].0.id(),
            name: made[other].1.to_owned(),
            fingerprints: made[other].0.fingerprints(),
            addresses: vec!["127.0.0.1:1".parse().unwrap()],
        };
        PeerStore::load(made[this].0.dir())
            .unwrap()
            .insert(peer)
            .unwrap();
    }
    // The node with the smaller id dials.
    made.sort_by_key(|(identity, ..)| std::cmp::Reverse(identity.id()));
    let node = |at: usize, other: usize| TestNode {
        name: made[at].1,
        dir: root.join(made[at].1),
        slot: made[at].2,
        peer: made[other].0.id().to_string(),
        peer_slot: made[other].2,
        more: String::new(),
        replicator: None,
    };
    [node(0, 1), node(1, 0)]
}

/// Two nodes whose copies are in sync; nobody is primary.
pub async fn pair(root: &Path, settings: &Settings) -> [TestNode; 2] {
    let mut nodes = two_nodes(root);
    for node in &nodes {
        node.create(settings);
    }
    let address = nodes[0].start(settings, None).await;
    nodes[1].start(settings, Some(address)).await;
    nodes[0].whole().await;
    nodes
}

impl TestNode {
    pub fn config(&self, settings: &Settings, peer_address: Option<SocketAddr>) -> Config {
        let text = self.config_text(settings, peer_address);
        Config::parse(&text, &self.config_file()).unwrap()
    }

    pub fn config_file(&self) -> PathBuf {
        self.dir.join("holdfast.toml")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn config_text(&self, settings: &Settings, peer_address: Option<SocketAddr>) -> String {
        let dir = &self.dir;
        let addresses = peer_address
            .map(|address| format!("\"{address}\""))
            .unwrap_or_default();
        let metadata = match settings.metadata {
            "internal" => "internal".to_owned(),
            name => dir.join(name).display().to_string(),
        };
        format!(
            "[node]\nname = {:?}\nstate_dir = {:?}\ncontrol_socket = {:?}\nlink_listen = [\"127.0.0.1:0\"]\nmetrics = \"127.0.0.1:0\"\n\
             [nbd]\nunix = {:?}\n\
             [[service]]\nname = \"db\"\nid = {SERVICE_ID:?}\nslot = {}\nmode = {:?}\non_peer_loss = {:?}\n\
             [[service.volume]]\nname = \"data\"\nbacking = {:?}\nmetadata = {metadata:?}\nsize = {}\nsector_size = 512\n\
             [[service.peer]]\nnode = {:?}\nslot = {}\naddresses = [{addresses}]\n{}",
            self.name,
            dir.join("state"),
            dir.join("control.sock"),
            dir.join("nbd.sock"),
            self.slot,
            settings.mode,
            settings.on_peer_loss,
            self.backing(),
            settings.size,
            self.peer,
            self.peer_slot,
            self.more,
        )
    }

    pub fn backing(&self) -> PathBuf {
        self.dir.join("data.img")
    }

    pub fn create(&self, settings: &Settings) {
        create(
            &self.config(settings, None),
            "db",
            &CreateOptions::default(),
        )
        .unwrap();
    }

    pub async fn start(
        &mut self,
        settings: &Settings,
        peer_address: Option<SocketAddr>,
    ) -> SocketAddr {
        let replicator = Replicator::start(self.config(settings, peer_address))
            .await
            .unwrap();
        let address = replicator.addresses().link[0];
        self.replicator = Some(replicator);
        address
    }

    pub async fn stop(&mut self) {
        let refusals = self.replicator.take().unwrap().stop().await;
        assert!(refusals.is_empty(), "{refusals:?}");
    }

    pub async fn command(&self, command: Command) -> AdminResult {
        self.replicator
            .as_ref()
            .unwrap()
            .handle()
            .command("db", command)
            .await
    }

    pub async fn service(&self) -> ServiceReport {
        self.replicator
            .as_ref()
            .unwrap()
            .handle()
            .status()
            .await
            .services
            .remove(0)
    }

    /// Waits for a state that only shows in the status.
    pub async fn until(&self, what: &str, judge: impl Fn(&ServiceReport) -> bool) -> ServiceReport {
        let start = Instant::now();
        loop {
            let report = self.service().await;
            if judge(&report) {
                return report;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{}: waited in vain until {what}: {report:#?}",
                self.name
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The volume's bytes as they are on this node's disk.
    /// Waits until this copy and its peer are in sync, and nothing is left to copy.
    pub async fn whole(&self) -> ServiceReport {
        self.until("the copies are in sync", |s| {
            s.peers[0].link == LinkName::Established
                && s.peers[0].dirty_bytes == 0
                && s.state == StateName::UpToDate
                && s.peers[0].state == Some(StateName::UpToDate)
        })
        .await
    }

    /// 8 KiB of the application, durable.
    pub async fn write(&self, offset: u64, fill: u8) {
        let socket = self.dir.join("nbd.sock");
        blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            nbd.write(offset, &[fill; 8192], true).unwrap();
        })
        .await;
    }

    pub fn on_disk(&self, size: u64) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        std::fs::File::open(self.backing())
            .unwrap()
            .read_exact(&mut bytes)
            .unwrap();
        bytes
    }
}

/// An application: one connection, one request at a time.
pub struct Nbd {
    stream: UnixStream,
    pub size: u64,
}

const FUA: u16 = 1;

impl Nbd {
    /// Opens an export; the error is the server's option reply.
    pub fn open(socket: &Path, export: &str) -> Result<Nbd, u32> {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        // NBD_OPT_GO with no information requests.
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(7u32.to_be_bytes());
        option.extend((4 + export.len() as u32 + 2).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0u16.to_be_bytes());
        stream.write_all(&option).unwrap();
        let mut size = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut body = vec![0; u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize];
            stream.read_exact(&mut body).unwrap();
            match kind {
                1 => return Ok(Nbd { stream, size }),
                3 if body[..2] == [0, 0] => {
                    size = u64::from_be_bytes(body[2..10].try_into().unwrap())
                }
                3 => {}
                error => return Err(error),
            }
        }
    }

    fn request(
        &mut self,
        flags: u16,
        kind: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
        answer: usize,
    ) -> Result<Vec<u8>, u32> {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request).map_err(|_| 108u32)?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).map_err(|_| 108u32)?;
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        if error != 0 {
            return Err(error);
        }
        let mut data = vec![0; answer];
        self.stream.read_exact(&mut data).map_err(|_| 108u32)?;
        Ok(data)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.request(0, 0, offset, length, &[], length as usize)
    }

    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), u32> {
        self.request(
            if fua { FUA } else { 0 },
            1,
            offset,
            data.len() as u32,
            data,
            0,
        )
        .map(drop)
    }

    /// Sends a write and does not wait for its answer.
    pub fn send_write(&mut self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(1u16.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend((data.len() as u32).to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)
    }

    pub fn flush(&mut self) -> Result<(), u32> {
        self.request(0, 3, 0, 0, &[], 0).map(drop)
    }

    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), u32> {
        self.request(0, 6, offset, length, &[], 0).map(drop)
    }
}

/// Runs what blocks (an application) beside the runtime of the replicators' control side.
pub async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Waits for what only shows from outside; `judge` may block.
pub async fn eventually(what: &str, judge: impl Fn() -> bool) {
    let start = Instant::now();
    while !judge() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
