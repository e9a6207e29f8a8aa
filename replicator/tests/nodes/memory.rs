//! A replicator's memory stays within what docs/process.md promises.

use crate::child;
use crate::support::{Nbd, Settings, blocking, eventually, two_nodes};
use holdfast_replicator::control::client::Client;
use holdfast_replicator::control::protocol::ServiceCommand;
use std::path::Path;

/// Bytes that are promised, less the code of a release build: a test's code is several times larger and says nothing about it.
const PROMISED: u64 = 200 << 20;
const CODE: u64 = 16 << 20;

/// Resident bytes of a process that are no file's pages.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let status = status.unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib << 10
    };
    field("RssAnon:") + field("RssShmem:")
}

#[tokio::test]
async fn a_pair_with_a_large_volume_stays_within_what_is_promised() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        size: 64 << 30,
        mode: "async",
        ..Settings::default()
    };
    let [node, _] = two_nodes(root.path());
    node.create(&settings);
    std::fs::write(node.config_file(), node.config_text(&settings, None)).unwrap();
    let mut child = child::replicator(&node.config_file());
    let pid = child.id();
    let socket = node.dir.join("control.sock");
    let path = socket.clone();
    eventually("the replicator answers", move || {
        Client::connect(&path).is_ok()
    })
    .await;
    let at_start = resident(pid);
    assert!(
        at_start < PROMISED - CODE,
        "{at_start} bytes after the start"
    );
    let (path, nbd) = (socket.clone(), node.dir.join("nbd.sock"));
    blocking(move || {
        Client::connect(&path)
            .unwrap()
            .command("db", ServiceCommand::Promote { force: true })
            .unwrap();
        // One write into every bitmap page toward the peer, which is not there; more than all buffers hold.
        let mut nbd = Nbd::open(&nbd, "data").unwrap();
        for page in 0..512u64 {
            nbd.write(page << 27, &[7; 300 << 10], false).unwrap();
        }
    })
    .await;
    let loaded = resident(pid);
    assert!(loaded < PROMISED - CODE, "{loaded} bytes after the load");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(blocking(move || child.wait().unwrap()).await.success());
}
