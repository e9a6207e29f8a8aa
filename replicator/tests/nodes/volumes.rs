//! Metadata of copies, made and changed while no replicator runs.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use holdfast_replicator::control::protocol::{LinkName, RoleName, StateName};
use holdfast_replicator::create::{CreateOptions, VolumeError, create, grow, remove, replace_disk};
use holdfast_replicator_core::api::Command;
use std::os::unix::fs::FileExt;

fn options() -> CreateOptions {
    CreateOptions::default()
}

#[test]
fn metadata_is_not_written_over_unless_a_person_says_so() {
    let root = tempfile::tempdir().unwrap();
    for metadata in ["internal", "meta.img"] {
        let [node, _] = two_nodes(&root.path().join(metadata));
        let config = node.config(
            &Settings {
                metadata,
                ..Settings::default()
            },
            None,
        );
        let created = create(&config, "db", &options()).unwrap();
        assert!(created.volumes[0].zeroed && created.in_sync.len() == 2);
        let error = create(&config, "db", &options()).unwrap_err();
        assert!(matches!(error, VolumeError::HasMetadata { .. }), "{error}");
        create(
            &config,
            "db",
            &CreateOptions {
                overwrite_metadata: true,
                ..options()
            },
        )
        .unwrap();
        remove(&config, "db", "data").unwrap();
        let error = remove(&config, "db", "data");
        assert!(metadata != "internal" || error.is_err());
        create(&config, "db", &options()).unwrap();
    }
}

#[test]
fn data_is_not_written_over() {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let settings = Settings {
        size: 8 << 20,
        ..Settings::default()
    };
    let config = node.config(&settings, None);
    let file = std::fs::File::create(node.backing()).unwrap();
    file.set_len(32 << 20).unwrap();
    file.write_all_at(b"precious", 100).unwrap();
    let error = create(&config, "db", &options()).unwrap_err();
    assert!(matches!(error, VolumeError::NotBlank { .. }), "{error}");
    // Not known what it is: nobody can say where it ends.
    let adopt = CreateOptions {
        adopt: true,
        ..options()
    };
    let error = create(&config, "db", &adopt).unwrap_err();
    assert!(
        matches!(error, VolumeError::WouldOverwrite { .. }),
        "{error}"
    );
    let created = create(
        &config,
        "db",
        &CreateOptions {
            assume_shrunk: true,
            ..adopt
        },
    )
    .unwrap();
    assert!(!created.volumes[0].zeroed && created.in_sync.is_empty());
    let mut bytes = [0; 8];
    std::fs::File::open(node.backing())
        .unwrap()
        .read_exact_at(&mut bytes, 100)
        .unwrap();
    assert_eq!(&bytes, b"precious");
}

#[test]
fn a_filesystem_that_reaches_into_the_metadata_is_seen() {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let config = node.config(
        &Settings {
            size: 8 << 20,
            ..Settings::default()
        },
        None,
    );
    let file = std::fs::File::create(node.backing()).unwrap();
    file.set_len(32 << 20).unwrap();
    let mut superblock = [0; 1024];
    superblock[56..58].copy_from_slice(&[0x53, 0xef]);
    superblock[24..28].copy_from_slice(&2u32.to_le_bytes());
    superblock[4..8].copy_from_slice(&8192u32.to_le_bytes());
    file.write_all_at(&superblock, 1024).unwrap();
    let adopt = CreateOptions {
        adopt: true,
        assume_shrunk: true,
        ..options()
    };
    let error = create(&config, "db", &adopt).unwrap_err();
    assert!(
        matches!(error, VolumeError::WouldOverwrite { .. }),
        "{error}"
    );
    // Shrunk to what the configuration says.
    superblock[4..8].copy_from_slice(&2048u32.to_le_bytes());
    file.write_all_at(&superblock, 1024).unwrap();
    create(
        &config,
        "db",
        &CreateOptions {
            adopt: true,
            ..options()
        },
    )
    .unwrap();
}

#[test]
fn too_small_and_missing_devices_are_refused_and_leave_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let config = node.config(&Settings::default(), None);
    std::fs::File::create(node.backing())
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    let error = create(&config, "db", &options()).unwrap_err();
    assert!(matches!(error, VolumeError::TooSmall { .. }), "{error}");
    assert_eq!(std::fs::metadata(node.backing()).unwrap().len(), 16 << 20);
}

#[tokio::test]
async fn a_running_replicator_keeps_its_volumes_to_itself() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut node, _] = two_nodes(root.path());
    node.create(&settings);
    node.start(&settings, None).await;
    let config = node.config(&settings, None);
    let overwrite = CreateOptions {
        overwrite_metadata: true,
        ..options()
    };
    assert!(
        create(&config, "db", &overwrite)
            .unwrap_err()
            .to_string()
            .contains("locked")
    );
    assert!(
        grow(&config, "db", "data", Some(32 << 20))
            .unwrap_err()
            .to_string()
            .contains("locked")
    );
    let error = holdfast_replicator::process::Replicator::start(config.clone())
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("another replicator"), "{error}");
    // Detached by a command: free for tools, the process goes on.
    node.command(Command::Detach).await.unwrap();
    assert!(grow(&config, "db", "data", Some(32 << 20)).is_ok());
    node.stop().await;
}

#[tokio::test]
async fn both_copies_grow_and_what_was_there_stays() {
    for metadata in ["internal", "meta.img"] {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            metadata,
            ..Settings::default()
        };
        let mut nodes = two_nodes(root.path());
        let (before, after) = (settings.size, 64u64 << 20);
        for node in &nodes {
            node.create(&settings);
        }
        let address = nodes[0].start(&settings, None).await;
        nodes[1].start(&settings, Some(address)).await;
        nodes[0]
            .until("they know each other", |s| {
                s.peers[0].link == LinkName::Established
            })
            .await;
        nodes[0]
            .command(Command::Promote { force: false })
            .await
            .unwrap();
        let socket = nodes[0].dir.join("nbd.sock");
        let path = socket.clone();
        blocking(move || {
            Nbd::open(&path, "data")
                .unwrap()
                .write(before - 8192, &[5; 8192], true)
                .unwrap()
        })
        .await;
        for node in &mut nodes {
            node.stop().await;
        }
        let grown_settings = Settings {
            size: after,
            ..settings
        };
        for node in &nodes {
            let grown = grow(
                &node.config(&grown_settings, None),
                "db",
                "data",
                Some(after),
            )
            .unwrap();
            assert_eq!((grown.before, grown.after), (before, after));
        }
        let address = nodes[0].start(&grown_settings, None).await;
        nodes[1].start(&grown_settings, Some(address)).await;
        nodes[0]
            .until("they know each other", |s| {
                s.peers[0].link == LinkName::Established
            })
            .await;
        let report = nodes[0].service().await;
        assert_eq!(
            (report.peers[0].dirty_bytes, report.volumes[0].size),
            (0, after)
        );
        nodes[0]
            .command(Command::Promote { force: false })
            .await
            .unwrap();
        blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            assert_eq!(nbd.size, after);
            let mut expected = vec![0; 1 << 20];
            expected[..8192].fill(5);
            assert!(nbd.read(before - 8192, 1 << 20).unwrap() == expected);
            nbd.write(after - 4096, &[6; 4096], true).unwrap();
        })
        .await;
        assert!(
            nodes[0].on_disk(after) == nodes[1].on_disk(after),
            "{metadata}"
        );
        for node in &mut nodes {
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn an_interrupted_growth_leaves_the_old_volume_or_finishes_the_new_one() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut node, _] = two_nodes(root.path());
    node.create(&settings);
    let config = node.config(&settings, None);
    // Cut short before the flip: the file is longer, and nothing else happened.
    let old = std::fs::metadata(node.backing()).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(node.backing())
        .unwrap()
        .set_len(128 << 20)
        .unwrap();
    node.start(&settings, None).await;
    assert_eq!(node.service().await.volumes[0].size, settings.size);
    node.stop().await;
    // And a second try goes through; the old area reads as zeroes afterwards.
    grow(&config, "db", "data", Some(64 << 20)).unwrap();
    let mut area = vec![1; (old - settings.size) as usize];
    std::fs::File::open(node.backing())
        .unwrap()
        .read_exact_at(&mut area, settings.size)
        .unwrap();
    assert!(area.iter().all(|byte| *byte == 0));
    node.start(&settings, None).await;
    assert_eq!(node.service().await.volumes[0].size, 64 << 20);
    node.stop().await;
}

#[tokio::test]
async fn a_replaced_disk_is_filled_from_the_peer() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        node.create(&settings);
    }
    let address = nodes[0].start(&settings, None).await;
    nodes[1].start(&settings, Some(address)).await;
    nodes[0]
        .until("they know each other", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    nodes[0]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    nodes[1].stop().await;
    let socket = nodes[0].dir.join("nbd.sock");
    blocking(move || {
        Nbd::open(&socket, "data")
            .unwrap()
            .write(0, &[9; 1 << 20], true)
            .unwrap()
    })
    .await;
    std::fs::remove_file(nodes[1].backing()).unwrap();
    let created =
        replace_disk(&nodes[1].config(&settings, None), "db", "data", &options()).unwrap();
    assert!(created.in_sync.is_empty());
    nodes[1].start(&settings, Some(address)).await;
    nodes[0]
        .until("both are in sync", |s| {
            s.role == RoleName::Primary && s.in_sync.len() == 2
        })
        .await;
    nodes[1]
        .until("it is up to date", |s| s.state == StateName::UpToDate)
        .await;
    assert!(nodes[0].on_disk(settings.size) == nodes[1].on_disk(settings.size));
    for node in &mut nodes {
        node.stop().await;
    }
}
