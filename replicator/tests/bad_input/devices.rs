//! Backings that are not what they should be.

use crate::support::{Settings, two_nodes};
use crate::{event, refusal, says};
use holdfast_replicator::config::{Config, ConfigError};
use holdfast_replicator::control::protocol::LinkName;
use holdfast_replicator::create::{CreateOptions, create};
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn an_unknown_key_and_one_place_for_two_volumes_name_file_and_key() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, _] = two_nodes(root.path());
    let text = node.config_text(&settings, None);
    let parse = |text: &str| -> String {
        let error: ConfigError = Config::parse(text, &node.config_file()).unwrap_err();
        error.to_string()
    };
    let file = node.config_file().display().to_string();
    let wrong = parse(&text.replace("on_peer_loss", "on_peer_lost"));
    says(&wrong, &[&file, "on_peer_lost"]);
    let twice = format!(
        "{text}\n[[service]]\nname = \"web\"\nid = \"5e51ce00000000000000000000000002\"\nslot = 0\n\
         [[service.volume]]\nname = \"pages\"\nbacking = {:?}\n",
        node.backing()
    );
    says(
        &parse(&twice),
        &[
            &file,
            "service \"web\".volume \"pages\".backing",
            "already used by another volume",
            "a place of its own",
        ],
    );
}

#[tokio::test]
async fn a_device_that_shrank_is_refused_and_keeps_what_it_has() {
    for metadata in ["metadata.img", "internal"] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            metadata,
            ..Settings::default()
        };
        let [mut node, _] = two_nodes(root.path());
        node.create(&settings);
        // Once attached, so that its size is remembered.
        node.start(&settings, None).await;
        node.stop().await;
        let file = std::fs::File::options()
            .write(true)
            .open(node.backing())
            .unwrap();
        let size = file.metadata().unwrap().len();
        file.set_len(8 << 20).unwrap();
        let before = std::fs::read(node.backing()).unwrap();
        let text = refusal(node.config(&settings, None)).await;
        says(
            &text,
            &["service db", "data", "data.img", "Nothing was changed"],
        );
        let next: &[&str] = if metadata == "internal" {
            &["made smaller, give it back its size"]
        } else {
            &["it shrank", "give the device back its size", "replace-disk"]
        };
        says(&text, next);
        assert_eq!(std::fs::read(node.backing()).unwrap(), before);
        // With its size back the volume is there again (what was cut off of a file reads zero).
        if metadata != "internal" {
            file.set_len(size).unwrap();
            node.start(&settings, None).await;
            node.stop().await;
        }
    }
}

#[test]
fn a_device_that_is_too_small_says_how_much_there_is() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, _] = two_nodes(root.path());
    std::fs::create_dir_all(&node.dir).unwrap();
    std::fs::write(node.backing(), vec![0; 4 << 20]).unwrap();
    let error = create(
        &node.config(&settings, None),
        "db",
        &CreateOptions::default(),
    );
    says(
        &error.unwrap_err().to_string(),
        &[
            "volume data",
            "data.img",
            "asks for 16777216",
            "Nothing was changed",
            "larger device",
        ],
    );
    assert_eq!(std::fs::read(node.backing()).unwrap(), vec![0; 4 << 20]);
}

#[tokio::test]
async fn copies_with_different_sectors_do_not_connect_and_both_say_so() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut alpha, mut beta] = two_nodes(root.path());
    alpha.create(&settings);
    let coarse = beta
        .config_text(&settings, None)
        .replace("sector_size = 512", "sector_size = 4096");
    let config = Config::parse(&coarse, &beta.config_file()).unwrap();
    create(&config, "db", &CreateOptions::default()).unwrap();
    let address = alpha.start(&settings, None).await;
    let text = beta
        .config_text(&settings, Some(address))
        .replace("sector_size = 512", "sector_size = 4096");
    let config = Config::parse(&text, &beta.config_file()).unwrap();
    beta.replicator = Some(
        holdfast_replicator::process::Replicator::start(config)
            .await
            .unwrap(),
    );
    for node in [&alpha, &beta] {
        event(node, "handshake", &["512", "4096", "sector"]).await;
        let report = node
            .until("the link is off", |s| s.peers[0].link == LinkName::Off)
            .await;
        says(&report.peers[0].handshake, &["512", "4096"]);
        assert!(!report.healthy());
    }
    beta.stop().await;
    alpha.stop().await;
}

/// A filesystem of its own, where this user may mount one.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, size: &str) -> Option<Small> {
        std::fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(&at)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Small(at)),
            _ => {
                eprintln!("skipped: this user may not mount a filesystem");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_filesystem_under_external_metadata_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        metadata: "small/metadata.img",
        ..Settings::default()
    };
    let [node, _] = two_nodes(root.path());
    let Some(small) = Small::mount(node.dir.join("small"), "64k") else {
        return;
    };
    let error = create(
        &node.config(&settings, None),
        "db",
        &CreateOptions::default(),
    );
    let text = error.unwrap_err().to_string();
    says(&text, &["volume data", "metadata.img", "pace"]);
    assert!(
        text.contains("nothing else was changed") || text.contains("does not count"),
        "{text}"
    );
    let left: Vec<_> = std::fs::read_dir(&small.0).unwrap().collect();
    assert!(
        left.is_empty() || text.contains("--overwrite-metadata"),
        "{left:?}, {text}"
    );
}

struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Loop> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => Some(Loop(PathBuf::from(
                String::from_utf8_lossy(&output.stdout).trim(),
            ))),
            _ => {
                eprintln!("skipped: this user may not make loop devices");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

/// A filesystem on a loop device over a file that a process serves blocks through, where this machine has all of that.
struct Served {
    fuse: PathBuf,
    mounted: PathBuf,
    device: Option<Loop>,
    server: std::process::Child,
}

impl Served {
    fn mount(root: &Path) -> Option<Served> {
        let (fuse, mounted) = (root.join("fuse"), root.join("mounted"));
        std::fs::create_dir_all(&fuse).unwrap();
        std::fs::create_dir_all(&mounted).unwrap();
        let server = Command::new("nbdfuse")
            .arg(&fuse)
            .args(["--command", "nbdkit", "-s", "memory", "64M"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn();
        let Ok(server) = server else {
            eprintln!("skipped: no nbdfuse here");
            return None;
        };
        let mut served = Served {
            fuse,
            mounted,
            device: None,
            server,
        };
        let file = served.fuse.join("nbd");
        let start = std::time::Instant::now();
        while !file.exists() {
            let ended = served.server.try_wait().unwrap().is_some();
            if ended || start.elapsed() > std::time::Duration::from_secs(20) {
                eprintln!("skipped: nbdfuse or nbdkit does not work here");
                return None;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let device = Loop::over(&file)?;
        let made = Command::new("mkfs.ext4").arg("-q").arg(&device.0).status();
        let mount = Command::new("mount")
            .arg(&device.0)
            .arg(&served.mounted)
            .status();
        served.device = Some(device);
        let works = [made, mount]
            .iter()
            .all(|step| step.as_ref().is_ok_and(|status| status.success()));
        if !works {
            eprintln!("skipped: mkfs.ext4 or mount does not work here");
        }
        works.then_some(served)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mounted).output();
        drop(self.device.take());
        let _ = Command::new("umount").arg(&self.fuse).output();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// While the replicator waits for its state to be written, the volume below it may be waiting for the replicator.
#[tokio::test]
async fn state_on_a_volume_that_a_process_serves_is_refused_through_loop_and_fuse() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, _] = two_nodes(root.path());
    let Some(served) = Served::mount(root.path()) else {
        return;
    };
    let mut config = node.config(&settings, None);
    config.node.state_dir = served.mounted.clone();
    let text = refusal(config).await;
    says(
        &text,
        &[
            "node.state_dir",
            "mounted",
            "fuse",
            "served by a process",
            "move the state to a local disk",
        ],
    );
    let mut config = node.config(&settings, None);
    config.services[0].volumes[0].backing = served.mounted.join("data.img");
    let text = refusal(config).await;
    says(&text, &["data.img", "fuse", "wait for itself"]);
}

#[test]
fn a_mounted_device_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let image = node.dir.join("disk.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let Some(device) = Loop::over(&image) else {
        return;
    };
    let made = Command::new("mkfs.ext4").arg("-q").arg(&device.0).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mkfs.ext4 here");
        return;
    }
    let point = node.dir.join("mounted");
    std::fs::create_dir_all(&point).unwrap();
    let mounted = Command::new("mount").arg(&device.0).arg(&point).status();
    assert!(mounted.is_ok_and(|status| status.success()));
    let text = node
        .config_text(&Settings::default(), None)
        .replace(node.backing().to_str().unwrap(), device.0.to_str().unwrap());
    let config = Config::parse(&text, &node.config_file()).unwrap();
    let error = create(&config, "db", &CreateOptions::default());
    let _ = Command::new("umount").arg(&point).status();
    says(
        &error.unwrap_err().to_string(),
        &[
            "volume data",
            device.0.to_str().unwrap(),
            "in use",
            "Nothing was changed",
            "unmount or release it",
        ],
    );
}
