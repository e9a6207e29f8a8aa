//! Growing a volume: killed at each step, cut off from power between any two flushes, done on one copy alone.

use crate::child;
use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use holdfast_replicator::control::protocol::{LinkName, RoleName};
use holdfast_replicator::create::{CreateOptions, VolumeError, create, grow, grow_telling};
use holdfast_replicator::place::{BLOCK, Locator, StepKind};
use holdfast_replicator::process::Replicator;
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::locator::LOCATOR_VERSION;
use holdfast_wire_format::superblock;
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

const BEFORE: u64 = 4 << 20;
const AFTER: u64 = 16 << 20;

/// A volume with something in every block, and the files it is made of.
struct Grown {
    node: TestNode,
    settings: Settings,
    files: HashMap<PathBuf, Vec<u8>>,
    _root: tempfile::TempDir,
}

fn block(number: u64) -> [u8; 4096] {
    let mut block = [0x5a; 4096];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

fn full_volume(metadata: &'static str) -> Grown {
    let root = tempfile::tempdir().unwrap();
    let [node, _] = two_nodes(root.path());
    let settings = Settings {
        metadata,
        size: BEFORE,
        ..Settings::default()
    };
    std::fs::write(node.config_file(), node.config_text(&settings, None)).unwrap();
    let options = CreateOptions {
        al_blocks: Some(8),
        undo_size: Some(1 << 20),
        ..CreateOptions::default()
    };
    create(&node.config(&settings, None), "db", &options).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(node.backing())
        .unwrap();
    for number in 0..BEFORE / 4096 {
        file.write_all_at(&block(number), number * 4096).unwrap();
    }
    let mut names = vec![node.backing(), node.state().join("places.json")];
    if metadata != "internal" {
        names.push(node.dir.join(metadata));
    }
    let files = names
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    Grown {
        node,
        settings,
        files,
        _root: root,
    }
}

impl Grown {
    fn restore(&self, files: &HashMap<PathBuf, Vec<u8>>) {
        for (path, bytes) in files {
            std::fs::write(path, bytes).unwrap();
        }
    }

    /// It attaches with the old or the new size, everything in it is there, and the room beyond reads as zeroes.
    async fn holds_its_data(&mut self, when: &str) -> u64 {
        let settings = self.settings.clone();
        self.node.start(&settings, None).await;
        let size = self.node.service().await.volumes[0].size;
        assert!(size == BEFORE || size == AFTER, "{when}: {size}");
        self.node
            .command(Command::Promote { force: true })
            .await
            .unwrap();
        let socket = self.node.dir.join("nbd.sock");
        let read = blocking(move || {
            let mut nbd = Nbd::open(&socket, "data").unwrap();
            assert_eq!(nbd.size, size);
            nbd.read(0, size as u32).unwrap()
        })
        .await;
        for (number, found) in read.chunks(4096).enumerate() {
            let expected = if (number as u64) < BEFORE / 4096 {
                block(number as u64)
            } else {
                [0; 4096]
            };
            assert!(found == expected, "{when}: block {number} of {size} bytes");
        }
        self.node.stop().await;
        size
    }
}

async fn killed_at_each_step(metadata: &'static str) {
    let mut grown = full_volume(metadata);
    let (mut old, mut new) = (0, 0);
    for step in 0.. {
        grown.restore(&grown.files);
        let mut child = child::grow_killed_at(&grown.node.config_file(), step);
        let ended = blocking(move || child.wait().unwrap()).await;
        if ended.success() {
            assert!(step > 15, "only {step} steps");
            break;
        }
        assert_eq!(ended.signal(), Some(9), "step {step}");
        match grown
            .holds_its_data(&format!("killed before step {step}"))
            .await
        {
            BEFORE => old += 1,
            _ => new += 1,
        }
        let config = grown.node.config(&grown.settings, None);
        match grow(&config, "db", "data", Some(AFTER)) {
            Ok(done) => assert_eq!(done.after, AFTER),
            Err(error) => assert!(error.to_string().contains("already"), "{error}"),
        }
        assert_eq!(grown.holds_its_data("grown after that").await, AFTER);
    }
    assert!(
        old > 10 && (new > 0 || metadata != "internal"),
        "{old} old, {new} new"
    );
}

#[tokio::test]
async fn killed_at_any_step_of_growing_internal_metadata_nothing_is_lost() {
    killed_at_each_step("internal").await;
}

#[tokio::test]
async fn killed_at_any_step_of_growing_external_metadata_nothing_is_lost() {
    killed_at_each_step("meta.img").await;
}

/// Some sectors of what was written since the last flush are there, others are not.
fn cut(durable: &[u8], written: &[u8], seed: u64) -> Vec<u8> {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut image = written.to_vec();
    for (number, sector) in image.chunks_mut(512).enumerate() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if random & 1 == 0 {
            let at = number * 512;
            let old = durable.get(at..at + sector.len());
            match old {
                Some(old) => sector.copy_from_slice(old),
                None => sector.fill(0),
            }
        }
    }
    image
}

async fn power_cut_between_flushes(metadata: &'static str) {
    let mut grown = full_volume(metadata);
    let durable = RefCell::new(grown.files.clone());
    let images = RefCell::new(Vec::new());
    let config = grown.node.config(&grown.settings, None);
    let read = |path: &Path| std::fs::read(path).unwrap();
    grow_telling(&config, "db", "data", Some(AFTER), &|step| {
        let mut durable = durable.borrow_mut();
        match step.kind {
            StepKind::Flush => {
                let written = read(step.path);
                let old = durable.get(step.path).cloned().unwrap_or_default();
                for seed in 1..=4 {
                    let mut image = durable.clone();
                    image.insert(step.path.to_owned(), cut(&old, &written, seed));
                    images.borrow_mut().push(image);
                }
                durable.insert(step.path.to_owned(), written);
            }
            StepKind::Replace => {
                images.borrow_mut().push(durable.clone());
                let mut beside = step.path.as_os_str().to_owned();
                beside.push(".grown");
                let new = durable[Path::new(&beside)].clone();
                durable.insert(step.path.to_owned(), new);
                images.borrow_mut().push(durable.clone());
            }
            StepKind::Lengthen | StepKind::Write { .. } => {}
        }
    })
    .unwrap();
    let images = images.into_inner();
    assert!(images.len() >= 12, "{}", images.len());
    for (number, image) in images.iter().enumerate() {
        grown.restore(image);
        grown.holds_its_data(&format!("power cut {number}")).await;
    }
}

#[tokio::test]
async fn a_power_cut_while_internal_metadata_moves_leaves_old_or_new() {
    power_cut_between_flushes("internal").await;
}

#[tokio::test]
async fn a_power_cut_while_external_metadata_is_replaced_leaves_old_or_new() {
    power_cut_between_flushes("meta.img").await;
}

#[tokio::test]
async fn one_copy_grown_alone_does_not_connect_and_says_why() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        node.create(&settings);
    }
    grow(
        &nodes[0].config(&settings, None),
        "db",
        "data",
        Some(64 << 20),
    )
    .unwrap();
    let address = nodes[0].start(&settings, None).await;
    nodes[1].start(&settings, Some(address)).await;
    for node in &nodes {
        let report = node
            .until("the other size is noticed", |s| {
                s.peers[0].link == LinkName::Off && !s.problems.is_empty()
            })
            .await;
        let text = format!("{}{:?}", report.peers[0].handshake, report.problems);
        for part in ["volume data", "16777216", "67108864", "volume grow"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(report.role, RoleName::Secondary);
    }
    // The other side grows as well: they meet again, and nothing is copied.
    for node in &mut nodes {
        node.stop().await;
    }
    grow(
        &nodes[1].config(&settings, None),
        "db",
        "data",
        Some(64 << 20),
    )
    .unwrap();
    let address = nodes[0].start(&settings, None).await;
    nodes[1].start(&settings, Some(address)).await;
    let report = nodes[0]
        .until("they know each other", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    assert_eq!(report.peers[0].dirty_bytes, 0);
    for node in &mut nodes {
        node.stop().await;
    }
}

#[test]
fn a_volume_does_not_shrink_and_needs_its_room() {
    let grown = full_volume("internal");
    let config = grown.node.config(&grown.settings, None);
    let text = grow(&config, "db", "data", Some(BEFORE / 2))
        .unwrap_err()
        .to_string();
    for part in [
        "volume data",
        "Nothing was changed",
        "cannot be made smaller",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // Not by more than the metadata's own size: the new area would lie over the old one.
    let error = grow(&config, "db", "data", Some(BEFORE + 4096)).unwrap_err();
    assert!(matches!(error, VolumeError::Grow { .. }), "{error}");
    assert!(error.to_string().contains("more"), "{error}");
    assert_eq!(
        std::fs::metadata(grown.node.backing()).unwrap().len(),
        grown.files[&grown.node.backing()].len() as u64
    );
}

/// Rewrites the superblocks and the locator of a backing as a newer version may have left them.
fn as_a_newer_version(
    file: &Path,
    superblocks: impl Fn(&mut holdfast_wire_format::metadata::Superblock),
    locator: impl Fn(&mut [u8; BLOCK as usize], Locator),
) {
    let mut bytes = std::fs::read(file).unwrap();
    let size = bytes.len() as u64;
    let at = Locator::offset(size).unwrap() as usize;
    let mut block: [u8; BLOCK as usize] = bytes[at..].try_into().unwrap();
    let found = Locator::decode(&block, size).unwrap();
    for slot in 0..2 {
        let at = found.area_offset as usize + slot * 4096;
        let slot: &mut [u8; 4096] = (&mut bytes[at..at + 4096]).try_into().unwrap();
        let mut sb = superblock::decode(slot).unwrap();
        superblocks(&mut sb);
        *slot = superblock::encode(&sb).unwrap();
    }
    locator(&mut block, found);
    bytes[at..].copy_from_slice(&block);
    std::fs::write(file, bytes).unwrap();
}

/// Neither growing nor starting the replicator works, both say why, and no byte changes.
async fn left_alone(grown: &Grown, parts: &[&str]) {
    let before = std::fs::read(grown.node.backing()).unwrap();
    let config = grown.node.config(&grown.settings, None);
    let growing = grow(&config, "db", "data", Some(AFTER))
        .unwrap_err()
        .to_string();
    let Err(starting) = Replicator::start(config).await else {
        panic!("it started")
    };
    for (doing, text) in [("growing", growing), ("starting", starting.to_string())] {
        for part in parts {
            assert!(text.contains(part), "{doing}: {part} in {text}");
        }
    }
    assert!(
        std::fs::read(grown.node.backing()).unwrap() == before,
        "the backing was written"
    );
}

#[tokio::test]
async fn a_volume_with_an_unknown_feature_that_forbids_writing_is_left_alone() {
    let grown = full_volume("internal");
    as_a_newer_version(
        &grown.node.backing(),
        |sb| sb.features_read_only = 1 << 40,
        // It was being grown, too; finishing that is writing.
        |block, found| {
            let zero = (0, 4096);
            *block = Locator { zero, ..found }.encode();
        },
    );
    let parts = [
        "features (0x10000000000)",
        "othing was changed",
        "newer one",
    ];
    left_alone(&grown, &parts).await;
}

#[tokio::test]
async fn a_volume_whose_metadata_a_newer_version_placed_is_left_alone() {
    let grown = full_volume("internal");
    as_a_newer_version(
        &grown.node.backing(),
        |_| (),
        |block, _| {
            block[8..12].copy_from_slice(&(LOCATOR_VERSION + 1).to_le_bytes());
            let crc = crc32fast::hash(&block[..72]);
            block[72..76].copy_from_slice(&crc.to_le_bytes());
        },
    );
    let parts = [
        "newer version of Holdfast",
        "othing was changed",
        "use that version",
    ];
    left_alone(&grown, &parts).await;
    // Nor is it taken for a device without metadata.
    let config = grown.node.config(&grown.settings, None);
    let error = create(&config, "db", &CreateOptions::default()).unwrap_err();
    assert!(matches!(error, VolumeError::HasMetadata { .. }), "{error}");
}
