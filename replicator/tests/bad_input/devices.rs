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
