//! Growing a volume of a running pair: with an application at work, without room, and with either process killed at each step.

use crate::child;
use crate::support::{Nbd, Settings, TestNode, blocking, eventually, two_nodes};
use holdfast_replicator::control::client::{Client, ClientError};
use holdfast_replicator::control::protocol::{LinkName, ServiceCommand, StateName};
use holdfast_replicator::create::{CreateOptions, create};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::ids::VolumeIndex;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const BEFORE: u64 = 4 << 20;
const AFTER: u64 = 16 << 20;

fn settings(metadata: &'static str) -> Settings {
    Settings {
        metadata,
        on_peer_loss: "suspend",
        size: BEFORE,
        ..Settings::default()
    }
}

fn create_small(node: &TestNode, settings: &Settings) {
    let options = CreateOptions {
        al_blocks: Some(8),
        undo_size: Some(1 << 20),
        ..CreateOptions::default()
    };
    create(&node.config(settings, None), "db", &options).unwrap();
}

fn grow_to(size: u64) -> Command {
    Command::Grow {
        volume: VolumeIndex(0),
        size,
    }
}

async fn whole(node: &TestNode) {
    node.until("the copies are in sync", |s| {
        s.peers[0].link == LinkName::Established && s.peers[0].dirty_bytes == 0
    })
    .await;
}

/// Both run and are in sync, the first one is primary.
async fn serve(nodes: &mut [TestNode; 2], settings: &Settings) {
    let address = nodes[0].start(settings, None).await;
    nodes[1].start(settings, Some(address)).await;
    whole(&nodes[0]).await;
    nodes[0]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    whole(&nodes[0]).await;
}

fn block(number: u64) -> Vec<u8> {
    let mut block = vec![0xa5; 4096];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

#[tokio::test]
async fn a_pair_grows_under_load_old_connections_keep_their_size_and_new_ones_see_the_new() {
    for (metadata, mode) in [
        ("internal", "sync"),
        ("meta.img", "sync"),
        ("internal", "async"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            mode,
            ..settings(metadata)
        };
        let mut nodes = two_nodes(root.path());
        for node in &nodes {
            create_small(node, &settings);
        }
        serve(&mut nodes, &settings).await;
        let socket = nodes[0].dir.join("nbd.sock");
        let mut old = {
            let socket = socket.clone();
            blocking(move || Nbd::open(&socket, "data").unwrap()).await
        };
        assert_eq!(old.size, BEFORE);
        // An application that never stops writing.
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let load = {
            let (stop, written) = (stop.clone(), written.clone());
            tokio::task::spawn_blocking(move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = written.load(Ordering::Relaxed);
                    let at = number % (BEFORE / 4096) * 4096;
                    old.write(at, &block(number), number % 16 == 0).unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                }
                // Its connection is as it was.
                assert_eq!(old.write(BEFORE, &block(0), false), Err(28));
                old.read(BEFORE - 4096, 4096).unwrap();
            })
        };
        eventually("the application writes", || {
            written.load(Ordering::Relaxed) > 50
        })
        .await;
        let text = nodes[0].command(grow_to(AFTER)).await.unwrap();
        assert!(
            text.contains("data has 16777216 bytes on every copy"),
            "{text}"
        );
        let then = written.load(Ordering::Relaxed);
        eventually("it still writes", || {
            written.load(Ordering::Relaxed) > then + 50
        })
        .await;
        // A second growth, of metadata that moved already.
        nodes[0].command(grow_to(2 * AFTER)).await.unwrap();
        stop.store(true, Ordering::Relaxed);
        load.await.unwrap();
        let total = written.load(Ordering::Relaxed);
        for node in &nodes {
            assert_eq!(
                node.service().await.volumes[0].size,
                2 * AFTER,
                "{metadata}"
            );
        }
        let path = socket.clone();
        blocking(move || {
            let mut new = Nbd::open(&path, "data").unwrap();
            assert_eq!(new.size, 2 * AFTER);
            let behind = new.read(BEFORE, (2 * AFTER - BEFORE) as u32).unwrap();
            assert!(behind.iter().all(|byte| *byte == 0), "what is new is zero");
            new.write(2 * AFTER - 4096, &block(7), true).unwrap();
        })
        .await;
        whole(&nodes[0]).await;
        nodes[0]
            .until("all of it is stable", |s| {
                s.peers[0].unacknowledged_bytes == 0 && s.peers[0].lag_ms == 0
            })
            .await;
        // Both stop and start: the metadata is found where it is now.
        for node in &mut nodes {
            node.stop().await;
        }
        assert!(
            nodes[0].on_disk(2 * AFTER) == nodes[1].on_disk(2 * AFTER),
            "{metadata} {mode}"
        );
        serve(&mut nodes, &settings).await;
        blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            assert_eq!(nbd.size, 2 * AFTER);
            assert!(nbd.read(2 * AFTER - 4096, 4096).unwrap() == block(7));
            for number in total.saturating_sub(BEFORE / 4096)..total {
                let at = number % (BEFORE / 4096) * 4096;
                assert!(nbd.read(at, 4096).unwrap() == block(number), "{number}");
            }
        })
        .await;
        for node in &mut nodes {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn a_copy_that_is_away_or_cannot_make_room_keeps_all_of_them_at_the_old_size() {
    let root = tempfile::tempdir().unwrap();
    let settings = settings("meta.img");
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        create_small(node, &settings);
    }
    serve(&mut nodes, &settings).await;
    // Something that is no file stands where the other copy's new metadata would be written.
    let in_the_way = nodes[1].dir.join("meta.img.grown");
    std::fs::create_dir(&in_the_way).unwrap();
    let refusal = nodes[0].command(grow_to(AFTER)).await.unwrap_err();
    let text = refusal.to_string();
    for part in [nodes[1].name, "meta.img.grown", "old size on every copy"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(sizes(&nodes).await, (BEFORE, BEFORE));
    // The same command goes on where it was left.
    std::fs::remove_dir(&in_the_way).unwrap();
    nodes[1]
        .command(Command::Disconnect { peer: None })
        .await
        .unwrap();
    nodes[0]
        .until("it is gone", |s| s.peers[0].link != LinkName::Established)
        .await;
    let refusal = nodes[0].command(grow_to(AFTER)).await.unwrap_err();
    assert!(
        refusal.to_string().contains("not connected and whole"),
        "{refusal}"
    );
    nodes[1]
        .command(Command::Connect { peer: None })
        .await
        .unwrap();
    whole(&nodes[0]).await;
    nodes[0].command(grow_to(AFTER)).await.unwrap();
    assert_eq!(sizes(&nodes).await, (AFTER, AFTER));
    for node in &mut nodes {
        node.stop().await;
    }
}

async fn sizes(nodes: &[TestNode; 2]) -> (u64, u64) {
    let size = async |node: &TestNode| node.service().await.volumes[0].size;
    (size(&nodes[0]).await, size(&nodes[1]).await)
}

/// The pair as it is before each try.
struct Pair {
    nodes: [TestNode; 2],
    settings: Settings,
    files: HashMap<PathBuf, Vec<u8>>,
    _root: tempfile::TempDir,
}

impl Pair {
    fn new(metadata: &'static str) -> Pair {
        let root = tempfile::tempdir().unwrap();
        let settings = settings(metadata);
        let nodes = two_nodes(root.path());
        let mut files = HashMap::new();
        for node in &nodes {
            create_small(node, &settings);
            let mut names = vec![node.backing(), node.state().join("places.json")];
            if metadata != "internal" {
                names.push(node.dir.join(metadata));
            }
            for name in names {
                files.insert(name.clone(), std::fs::read(name).unwrap());
            }
        }
        Pair {
            nodes,
            settings,
            files,
            _root: root,
        }
    }

    fn restore(&self) {
        for (path, bytes) in &self.files {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

fn ask(socket: &Path, command: ServiceCommand) -> Result<String, ClientError> {
    Client::connect(socket)?.command("db", command)
}

/// The second node is a process of its own that dies before step `step` of making room; false if it had fewer steps.
async fn killed_at(pair: &mut Pair, step: u32, primary_dies: bool) -> bool {
    pair.restore();
    let settings = pair.settings.clone();
    let address = pair.nodes[0].start(&settings, None).await;
    let text = pair.nodes[1].config_text(&settings, Some(address));
    std::fs::write(pair.nodes[1].config_file(), text).unwrap();
    let mut child = child::replicator_killed_at(&pair.nodes[1].config_file(), step);
    whole(&pair.nodes[0]).await;
    let control = pair.nodes[1].dir.join("control.sock");
    let (survivor, dying) = (&pair.nodes[0], &pair.nodes[1]);
    if primary_dies {
        let socket = control.clone();
        blocking(move || ask(&socket, ServiceCommand::Promote { force: false }))
            .await
            .unwrap();
    } else {
        survivor
            .command(Command::Promote { force: false })
            .await
            .unwrap();
    }
    whole(survivor).await;
    let primary = if primary_dies { dying } else { survivor };
    let nbd = primary.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&nbd, "data").unwrap();
        nbd.write(BEFORE - 4096, &block(3), true).unwrap();
    })
    .await;
    let grown = if primary_dies {
        blocking(move || {
            ask(
                &control,
                ServiceCommand::Grow {
                    volume: "data".into(),
                    size: AFTER,
                },
            )
        })
        .await
        .is_ok()
    } else {
        survivor.command(grow_to(AFTER)).await.is_ok()
    };
    if grown {
        child.kill().unwrap();
        child.wait().unwrap();
        pair.nodes[0].stop().await;
        return false;
    }
    let ended = blocking(move || child.wait().unwrap()).await;
    assert!(!ended.success(), "step {step}");
    // It comes back as what it is, and the two meet.
    let config = pair.nodes[1].config(&settings, Some(address));
    pair.nodes[1].replicator = Some(Replicator::start(config).await.unwrap());
    whole(&pair.nodes[0]).await;
    let sizes = [
        pair.nodes[0].service().await.volumes[0].size,
        pair.nodes[1].service().await.volumes[0].size,
    ];
    assert_eq!(sizes, [BEFORE; 2], "step {step}: nobody had the new size");
    let again = if primary_dies {
        pair.nodes[1]
            .until("it may be promoted", |s| {
                s.peers[0].link == LinkName::Established && s.state == StateName::UpToDate
            })
            .await;
        pair.nodes[1]
            .command(Command::Promote { force: false })
            .await
            .unwrap();
        &pair.nodes[1]
    } else {
        &pair.nodes[0]
    };
    whole(again).await;
    again.command(grow_to(AFTER)).await.unwrap();
    let nbd = again.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&nbd, "data").unwrap();
        assert_eq!(nbd.size, AFTER);
        assert!(
            nbd.read(BEFORE - 4096, 4096).unwrap() == block(3),
            "step {step}"
        );
        let behind = nbd.read(BEFORE, (AFTER - BEFORE) as u32).unwrap();
        assert!(behind.iter().all(|byte| *byte == 0), "step {step}");
        nbd.write(AFTER - 4096, &block(4), true).unwrap();
    })
    .await;
    for node in &mut pair.nodes {
        node.stop().await;
    }
    assert!(
        pair.nodes[0].on_disk(AFTER) == pair.nodes[1].on_disk(AFTER),
        "step {step}"
    );
    true
}

async fn killed_at_each_step(metadata: &'static str, primary_dies: bool, least: u32) {
    let mut pair = Pair::new(metadata);
    let mut step = 0;
    while killed_at(&mut pair, step, primary_dies).await {
        step += 1;
    }
    assert!(step >= least, "only {step} steps");
}

#[tokio::test]
async fn the_other_copy_killed_at_any_step_of_making_room_comes_back_with_the_old_size() {
    killed_at_each_step("internal", false, 10).await;
}

#[tokio::test]
async fn the_primary_killed_at_any_step_of_making_room_comes_back_with_the_old_size() {
    killed_at_each_step("internal", true, 10).await;
}

#[tokio::test]
async fn external_metadata_is_whole_whenever_its_process_is_killed() {
    killed_at_each_step("meta.img", false, 8).await;
}
