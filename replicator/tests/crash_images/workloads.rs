//! What is recorded: each way in which a copy's metadata and data change.

use crate::check::{Before, Check, Rules};
use crate::client::{Marks, Phase};
use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use holdfast_replicator::config::Config;
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use holdfast_replicator::create::{CreateOptions, create, grow_telling};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::Command;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

/// What the images came to.
pub type Verdict = Result<(), String>;

/// 8 extents of the activity log.
const SIZE: u64 = 32 << 20;
const EXTENTS: u64 = 8;

fn settings() -> Settings {
    Settings {
        size: SIZE,
        ..Settings::default()
    }
}

/// A log of so few extents that each write needs one to cool, and resyncs that can be cut.
pub fn config(node: &TestNode, settings: &Settings, peer: Option<SocketAddr>) -> Config {
    let mut config = node.config(settings, peer);
    config.services[0].tuning.log_extents = 4;
    config.services[0].tuning.resync_chunk_bytes = 64 << 10;
    config.services[0].tuning.resync_window_bytes = 256 << 10;
    config
}

fn made(node: &TestNode) {
    let options = CreateOptions {
        al_blocks: Some(8),
        // A start looks through all of it.
        undo_size: Some(2 << 20),
        ..CreateOptions::default()
    };
    create(&node.config(&settings(), None), "db", &options).unwrap();
}

async fn start(node: &mut TestNode, peer: Option<SocketAddr>) -> SocketAddr {
    let replicator = Replicator::start(config(node, &settings(), peer))
        .await
        .unwrap();
    let address = replicator.addresses().link[0];
    node.replicator = Some(replicator);
    address
}

/// Images lie in memory: they need not outlive anything.
fn scratch() -> tempfile::TempDir {
    match Path::new("/dev/shm").is_dir() {
        true => tempfile::tempdir_in("/dev/shm").unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

async fn check(
    what: &'static str,
    before: Vec<Before>,
    rules: Rules,
    marks: Arc<Marks>,
) -> Verdict {
    blocking(move || {
        let directory = scratch();
        let events = marks.events();
        Check::new(before, rules, &events, directory.path()).run(what, &events, &marks)
    })
    .await
}

async fn load(node: &TestNode, marks: &Arc<Marks>, rounds: u64) {
    let (socket, marks) = (node.dir.join("nbd.sock"), marks.clone());
    blocking(move || marks.load(&socket, rounds, EXTENTS)).await;
}

/// Both run, the first one is primary.
async fn pair(nodes: &mut [TestNode; 2]) -> SocketAddr {
    let address = start(&mut nodes[0], None).await;
    start(&mut nodes[1], Some(address)).await;
    for node in nodes.iter() {
        node.until("they are connected", |s| {
            s.peers[0].link == LinkName::Established && s.in_sync.len() == 2
        })
        .await;
    }
    address
}

async fn promoted(node: &TestNode, force: bool) {
    node.command(Command::Promote { force }).await.unwrap();
    node.until("it serves", |s| s.role == RoleName::Primary)
        .await;
}

fn both(nodes: &[TestNode; 2]) -> Vec<Before> {
    nodes
        .iter()
        .map(|node| Before::of(node, &settings()))
        .collect()
}

/// A backing full of something else.
fn used(node: &TestNode, bytes: u64) -> Vec<u8> {
    let garbage: Vec<u8> = (0..bytes / 8)
        .flat_map(|n| (n | 1 << 63).to_le_bytes())
        .collect();
    std::fs::write(node.backing(), &garbage).unwrap();
    std::fs::File::open(node.backing())
        .unwrap()
        .sync_all()
        .unwrap();
    garbage
}

async fn creation(what: &'static str, options: CreateOptions, rules: Rules) -> Verdict {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let settings = Settings {
        size: 4 << 20,
        ..settings()
    };
    let bytes = used(&node, 24 << 20);
    let marks = Arc::new(Marks::begin(&node.dir));
    create(&node.config(&settings, None), "db", &options).unwrap();
    marks.phase(Phase::Made);
    let before = Before::with(&node, &settings, bytes);
    check(what, vec![before], rules, marks).await
}

pub async fn create_over_something_else() -> Verdict {
    let options = CreateOptions {
        zero: true,
        al_blocks: Some(8),
        undo_size: Some(1 << 20),
        ..CreateOptions::default()
    };
    let rules = Rules {
        metadata_from: Some(Phase::Made),
        zeroed: true,
        ..Rules::default()
    };
    creation("create", options, rules).await
}

pub async fn adopt() -> Verdict {
    let options = CreateOptions {
        adopt: true,
        assume_shrunk: true,
        al_blocks: Some(8),
        undo_size: Some(1 << 20),
        ..CreateOptions::default()
    };
    let rules = Rules {
        metadata_from: Some(Phase::Made),
        data_stays: true,
        ..Rules::default()
    };
    creation("adopt", options, rules).await
}

pub async fn attach_write_stop() -> Verdict {
    let root = tempfile::tempdir().unwrap();
    let mut nodes = two_nodes(root.path());
    nodes.iter().for_each(made);
    let before = both(&nodes);
    let marks = Arc::new(Marks::begin(root.path()));
    pair(&mut nodes).await;
    promoted(&nodes[0], false).await;
    marks.phase(Phase::Serves(0, nodes[0].service().await.epoch.number));
    load(&nodes[0], &marks, 24).await;
    for node in &mut nodes {
        node.stop().await;
    }
    check("attach, write, stop", before, Rules::default(), marks).await
}

pub async fn lost_and_back() -> Verdict {
    let root = tempfile::tempdir().unwrap();
    let mut nodes = two_nodes(root.path());
    nodes.iter().for_each(made);
    pair(&mut nodes).await;
    promoted(&nodes[0], false).await;
    for node in &mut nodes {
        node.stop().await;
    }
    let before = both(&nodes);
    let marks = Arc::new(Marks::begin(root.path()));
    pair(&mut nodes).await;
    promoted(&nodes[0], false).await;
    load(&nodes[0], &marks, 9).await;
    let generation = generation(&nodes[0]).await;
    marks.phase(Phase::Left(1));
    nodes[1].stop().await;
    marks.phase(Phase::AloneIn(0, generation));
    load(&nodes[0], &marks, 18).await;
    marks.phase(Phase::Back);
    let address = nodes[0].replicator.as_ref().unwrap().addresses().link[0];
    start(&mut nodes[1], Some(address)).await;
    nodes[1]
        .until("it has everything", |s| {
            s.state == StateName::UpToDate && s.peers[0].link == LinkName::Established
        })
        .await;
    marks.phase(Phase::Joined(1));
    load(&nodes[0], &marks, 6).await;
    for node in &mut nodes {
        node.stop().await;
    }
    check("lost and back", before, Rules::default(), marks).await
}

async fn generation(node: &TestNode) -> u64 {
    let report = node.service().await;
    let current = report.generations.last().expect("a generation");
    u64::from_str_radix(&current.id, 16).expect("16 digits")
}

/// The second copy stopped in order, the first one went on alone; the recording begins where the second one returns.
async fn behind(root: &Path) -> ([TestNode; 2], SocketAddr) {
    let mut nodes = two_nodes(root);
    nodes.iter().for_each(made);
    let address = pair(&mut nodes).await;
    promoted(&nodes[0], false).await;
    let unrecorded = Arc::new(Marks::begin(&root.join("nowhere")));
    load(&nodes[0], &unrecorded, 16).await;
    nodes[1].stop().await;
    load(&nodes[0], &unrecorded, 24).await;
    // Enough that the resync takes a while.
    let socket = nodes[0].dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        for piece in 0..6u64 {
            let stamp = (0xaa00 + piece).to_le_bytes().repeat(16 << 10);
            nbd.write((piece << 22) + (1 << 20), &stamp, false).unwrap();
        }
        nbd.flush().unwrap();
    })
    .await;
    (nodes, address)
}

pub async fn resync() -> Verdict {
    let root = tempfile::tempdir().unwrap();
    let (mut nodes, address) = behind(root.path()).await;
    // The first one runs: what it has in flight is over, and its log says what is hot.
    let before = both(&nodes);
    let marks = Arc::new(Marks::begin(root.path()));
    marks.phase(Phase::Left(1));
    start(&mut nodes[1], Some(address)).await;
    load(&nodes[0], &marks, 6).await;
    nodes[1]
        .until("it has everything", |s| {
            s.state == StateName::UpToDate && s.peers[0].link == LinkName::Established
        })
        .await;
    marks.phase(Phase::Joined(1));
    for node in &mut nodes {
        node.stop().await;
    }
    let rules = Rules {
        goes_back: Some(1),
        ..Rules::default()
    };
    check("resync with undo", before, rules, marks).await
}

pub async fn rollback() -> Verdict {
    let root = tempfile::tempdir().unwrap();
    let (mut nodes, address) = behind(root.path()).await;
    let before = both(&nodes);
    let marks = Arc::new(Marks::begin(root.path()));
    marks.phase(Phase::Left(1));
    let mut config = config(&nodes[1], &settings(), Some(address));
    config.services[0].tuning.resync_rate_max = 256 << 10;
    nodes[1].replicator = Some(Replicator::start(config).await.unwrap());
    nodes[1]
        .until("it is in the middle of a resync", |s| {
            s.state == StateName::Inconsistent
                && s.peers[0]
                    .resync
                    .as_ref()
                    .is_some_and(|resync| resync.done_bytes > 0)
        })
        .await;
    nodes[1]
        .command(Command::Disconnect { peer: None })
        .await
        .unwrap();
    assert_eq!(nodes[1].service().await.state, StateName::Inconsistent);
    promoted(&nodes[1], true).await;
    for node in &mut nodes {
        node.stop().await;
    }
    let rules = Rules {
        goes_back: Some(1),
        ..Rules::default()
    };
    check("rollback by force", before, rules, marks).await
}

pub async fn grow() -> Verdict {
    const BEFORE: u64 = 4 << 20;
    const AFTER: u64 = 16 << 20;
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let settings = Settings {
        size: BEFORE,
        ..settings()
    };
    let options = CreateOptions {
        al_blocks: Some(8),
        undo_size: Some(1 << 20),
        ..CreateOptions::default()
    };
    create(&node.config(&settings, None), "db", &options).unwrap();
    let mut before = Before::of(&node, &settings);
    let marks = Arc::new(Marks::begin(&node.dir));
    let config = config(&node, &settings, None);
    grow_telling(&config, "db", "data", Some(AFTER), &|_| ()).unwrap();
    // The file is longer from the start: its length is durable before anything is written behind the old end.
    before.hint = before.bytes.len() as u64;
    let after = std::fs::metadata(node.backing()).unwrap().len();
    before.bytes.resize(after as usize, 0);
    let rules = Rules {
        data_stays: true,
        sizes: vec![BEFORE, AFTER],
        ..Rules::default()
    };
    check("grow", vec![before], rules, marks).await
}
