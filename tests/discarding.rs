//! Every command that discards data says first what would be lost, and off a terminal wants `--yes`: without it nothing is
//! changed, and the exit code is 3.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    root: tempfile::TempDir,
    running: Option<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.running.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Node {
    /// A node with one service of one volume, made, and a peer that is not there.
    fn new() -> Node {
        let node = Node {
            root: tempfile::tempdir().unwrap(),
            running: None,
        };
        let dir = node.dir();
        std::fs::write(
            node.config(),
            format!(
                "[node]\nname = \"alpha\"\nstate_dir = {:?}\ncontrol_socket = {:?}\nmetrics = \"off\"\n\
                 link_listen = [\"127.0.0.1:0\"]\n\
                 [[service]]\nname = \"db\"\nid = \"5e51ce00000000000000000000000001\"\nslot = 0\n\
                 [[service.volume]]\nname = \"data\"\nbacking = {:?}\nsize = \"16MiB\"\n\
                 [[service.peer]]\nnode = \"000000000000000000000000000000be\"\nslot = 1\naddresses = []\n",
                dir.join("state"),
                dir.join("control.sock"),
                node.backing(),
            ),
        )
        .unwrap();
        let state = dir.join("state");
        let made = node.run(&[
            "init",
            "--name",
            "alpha",
            "--state-dir",
            state.to_str().unwrap(),
        ]);
        assert!(made.status.success(), "{}", text(&made));
        node
    }

    fn created() -> Node {
        let node = Node::new();
        let made = node.run(&["volume", "create", "db"]);
        assert!(made.status.success(), "{}", text(&made));
        node
    }

    fn dir(&self) -> &Path {
        self.root.path()
    }

    fn config(&self) -> PathBuf {
        self.dir().join("holdfast.toml")
    }

    fn backing(&self) -> PathBuf {
        self.dir().join("data.img")
    }

    /// Off a terminal: what it reads is nothing, what it prints is kept.
    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
        command.args(arguments).stdin(Stdio::null());
        if arguments[0] != "init" {
            command.arg("--config").arg(self.config());
        }
        command.output().unwrap()
    }

    fn start(&mut self) {
        let child = Command::new(env!("CARGO_BIN_EXE_holdfast"))
            .args(["replicator", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.running = Some(child.unwrap());
        let start = Instant::now();
        while !self.run(&["status"]).status.success() {
            assert!(start.elapsed() < PATIENCE, "it does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Not confirmed: exit code 3, each of these parts is said, and that nothing was changed.
#[track_caller]
fn asks(output: &Output, parts: &[&str]) {
    let said = text(output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    let own = ["nobody confirmed it", "Nothing was changed", "--yes"];
    for part in parts.iter().chain(&own) {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
}

#[test]
fn volumes_are_not_made_anew_replaced_or_removed_without_consent() {
    let node = Node::created();
    let before = std::fs::read(node.backing()).unwrap();
    let what = [
        "volume data",
        "16.0 MiB in",
        "blocks of",
        "this copy:",
        "epoch 0",
    ];
    for command in [
        &["volume", "create", "db", "--overwrite-metadata"][..],
        &["volume", "create", "db", "--overwrite-metadata", "--zero"],
        &[
            "volume",
            "replace-disk",
            "db",
            "data",
            "--overwrite-metadata",
        ],
        &["volume", "remove", "db", "data"],
    ] {
        asks(&node.run(command), &what);
        assert!(
            std::fs::read(node.backing()).unwrap() == before,
            "{command:?}"
        );
    }
    // With it they are carried out.
    let done = node.run(&["volume", "remove", "db", "data", "--yes"]);
    assert!(done.status.success(), "{}", text(&done));
    assert!(text(&done).contains("removed"));
}

#[test]
fn a_device_with_data_is_zeroed_only_with_consent_and_then_whole() {
    let node = Node::new();
    std::fs::write(node.backing(), vec![7; 64 << 20]).unwrap();
    // Without the option it is refused outright.
    let refused = node.run(&["volume", "create", "db"]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    let zero = ["volume", "create", "db", "--zero"];
    asks(
        &node.run(&zero),
        &[
            "volume data",
            "64.0 MiB in",
            "blocks of",
            "data.img",
            "whoever wrote it",
        ],
    );
    assert!(std::fs::read(node.backing()).unwrap() == vec![7; 64 << 20]);
    let done = node.run(&[&zero[..], &["--yes"]].concat());
    let said = text(&done);
    assert!(done.status.success(), "{said}");
    assert!(
        said.contains("reads zero everywhere") && said.contains("no initial copy is needed"),
        "{said}"
    );
    let volume = &std::fs::read(node.backing()).unwrap()[..16 << 20];
    assert!(volume.iter().all(|byte| *byte == 0));
    // Nothing to lose, nothing to ask: a file that is not there yet.
    let fresh = Node::new();
    let done = fresh.run(&zero);
    assert!(done.status.success(), "{}", text(&done));
}

#[test]
fn a_running_service_discards_nothing_without_consent() {
    let mut node = Node::created();
    node.start();
    let status = |node: &Node| {
        let output = node.run(&["status", "--json"]);
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let service = &json["services"][0];
        (
            service["role"].clone(),
            service["state"].clone(),
            service["epoch"]["number"].clone(),
        )
    };
    let before = status(&node);
    for command in [
        &["promote", "db", "--force"][..],
        &["invalidate", "db"],
        &["split-brain", "resolve", "db", "--keep", "theirs"],
    ] {
        asks(
            &node.run(command),
            &["this copy is blank", "may lose everything"],
        );
        assert_eq!(status(&node), before, "{command:?}");
    }
    let done = node.run(&["promote", "db", "--force", "--yes"]);
    assert!(done.status.success(), "{}", text(&done));
    let promoted = status(&node);
    assert_eq!(promoted.0, "primary");
    // Of a primary: what it holds, since when, and what the other copy lacks as far as is known.
    for command in [
        &["invalidate", "db"][..],
        &["split-brain", "resolve", "db", "--keep", "theirs"],
    ] {
        asks(
            &node.run(command),
            &[
                "at position",
                "of generation",
                "last time this copy became primary: 2",
                "lacks",
            ],
        );
        assert_eq!(status(&node), promoted, "{command:?}");
    }
}
