//! Metadata that a newer version wrote, and metadata with torn or flipped bytes: each structure, each copy of it (D16).

use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use crate::{refusal, says};
use holdfast_replicator::control::protocol::{LinkName, StateName};
use holdfast_replicator_core::api::Command;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::superblock::{self, SUPERBLOCK_LENGTH};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const EXTERNAL: &str = "metadata.img";

fn settings() -> Settings {
    Settings {
        metadata: EXTERNAL,
        size: 64 << 20,
        ..Settings::default()
    }
}

fn metadata(node: &TestNode) -> PathBuf {
    node.dir.join(EXTERNAL)
}

fn bytes(node: &TestNode, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let file = std::fs::File::open(metadata(node)).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn put(node: &TestNode, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(metadata(node));
    file.unwrap().write_all_at(bytes, offset).unwrap();
}

/// Every kind of damage to one block: one bit, half of it from elsewhere, all of it.
fn damages(whole: &[u8]) -> Vec<Vec<u8>> {
    let flipped = |at: usize| {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    let mut torn = whole.to_vec();
    torn[512..].fill(0x5a);
    vec![flipped(9), flipped(700), torn, vec![0; whole.len()]]
}

fn superblocks(node: &TestNode) -> [[u8; SUPERBLOCK_LENGTH]; 2] {
    [0, 1].map(|slot| {
        let bytes = bytes(node, slot * SUPERBLOCK_LENGTH as u64, SUPERBLOCK_LENGTH);
        bytes.try_into().unwrap()
    })
}

fn layout(node: &TestNode) -> Layout {
    let [a, b] = superblocks(node);
    let (chosen, _) = superblock::choose(&a, &b).unwrap();
    Layout::of(&chosen).unwrap()
}

/// A pair of which one wrote while the other was away, stopped cleanly; the one that wrote is first.
async fn behind(root: &std::path::Path) -> ([TestNode; 2], Vec<u8>) {
    let settings = settings();
    let [mut alpha, mut beta] = two_nodes(root);
    alpha.create(&settings);
    beta.create(&settings);
    let address = alpha.start(&settings, None).await;
    beta.start(&settings, Some(address)).await;
    for node in [&alpha, &beta] {
        node.until("they are connected", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    }
    alpha
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    write(&alpha, 1).await;
    beta.stop().await;
    write(&alpha, 2).await;
    alpha.stop().await;
    let data = alpha.on_disk(settings.size);
    ([alpha, beta], data)
}

async fn write(node: &TestNode, fill: u8) {
    let socket = node.dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        for at in 0..8u64 {
            nbd.write(at * (8 << 20) + 8192, &[fill; 8192], false)
                .unwrap();
        }
        nbd.flush().unwrap();
    })
    .await;
}

/// Both start, become equal with what `data` says, and stop.
async fn converge(nodes: &mut [TestNode; 2], data: &[u8]) {
    let settings = settings();
    let address = nodes[0].start(&settings, None).await;
    nodes[0]
        .command(Command::Promote { force: true })
        .await
        .unwrap();
    nodes[1].start(&settings, Some(address)).await;
    for node in &*nodes {
        node.until("both are whole", |s| {
            s.state == StateName::UpToDate && s.peers[0].link == LinkName::Established
        })
        .await;
    }
    nodes[1].stop().await;
    nodes[0].stop().await;
    for node in &*nodes {
        assert!(node.on_disk(settings.size) == data, "{}", node.name);
    }
}

#[tokio::test]
async fn one_damaged_superblock_of_two_costs_nothing_and_two_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let (mut nodes, data) = behind(root.path()).await;
    let whole = superblocks(&nodes[0]);
    // The older of the two is what a torn write leaves behind: it must do. What it does not know is told by the peer.
    for slot in [0, 1] {
        for damaged in damages(&whole[slot]) {
            for (at, bytes) in whole.iter().enumerate() {
                put(&nodes[0], at as u64 * SUPERBLOCK_LENGTH as u64, bytes);
            }
            put(&nodes[0], slot as u64 * SUPERBLOCK_LENGTH as u64, &damaged);
            let settings = settings();
            nodes[0].start(&settings, None).await;
            assert!(nodes[0].on_disk(settings.size) == data);
            nodes[0].stop().await;
        }
    }
    converge(&mut nodes, &data).await;
    let whole = superblocks(&nodes[0]);
    for (slot, bytes) in whole.iter().enumerate() {
        put(
            &nodes[0],
            slot as u64 * SUPERBLOCK_LENGTH as u64,
            &damages(bytes)[slot],
        );
    }
    let before = std::fs::read(metadata(&nodes[0])).unwrap();
    let text = refusal(nodes[0].config(&settings(), None)).await;
    says(
        &text,
        &[
            "service db",
            "data",
            "both superblocks are damaged",
            "nothing was changed",
            "replace the disk and let it resync",
        ],
    );
    assert!(std::fs::read(metadata(&nodes[0])).unwrap() == before);
    assert!(nodes[0].on_disk(settings().size) == data);
}

#[tokio::test]
async fn metadata_of_a_newer_version_is_refused_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let (nodes, data) = behind(root.path()).await;
    let [mut a, b] = superblocks(&nodes[0]);
    // Magic, checksum of what follows it, version: the checksum is right again, as the newer version would have it.
    let version = u16::from_le_bytes([a[12], a[13]]);
    a[12..14].copy_from_slice(&(version + 1).to_le_bytes());
    let crc = crc32fast::hash(&a[12..]);
    a[8..12].copy_from_slice(&crc.to_le_bytes());
    assert!(
        superblock::decode(&a)
            .unwrap_err()
            .to_string()
            .contains("newer version"),
        "the test does not know the format: {:?}",
        superblock::decode(&a)
    );
    put(&nodes[0], 0, &a);
    let before = std::fs::read(metadata(&nodes[0])).unwrap();
    let text = refusal(nodes[0].config(&settings(), None)).await;
    says(
        &text,
        &[
            "service db",
            "data",
            "newer version of Holdfast",
            "nothing was changed",
            "use that version or a newer one",
        ],
    );
    assert!(std::fs::read(metadata(&nodes[0])).unwrap() == before);
    assert_eq!(superblocks(&nodes[0])[1], b);
    assert!(nodes[0].on_disk(settings().size) == data);
}

/// D7: where the bitmap cannot be read, everything counts as different, and the copies still become equal.
#[tokio::test]
async fn damaged_bitmaps_and_activity_logs_cost_a_longer_resync_and_no_data() {
    let root = tempfile::tempdir().unwrap();
    let (mut nodes, _) = behind(root.path()).await;
    let layout = layout(&nodes[0]);
    let places: Vec<u64> = (0..layout.pages)
        .map(|page| layout.bitmap_page_offset(0, page))
        .chain([layout.summary_block_offset(0, 0)])
        .chain((0..3).map(|block| layout.activity_log_offset + block * 4096))
        .collect();
    for (round, place) in places.into_iter().enumerate() {
        // Something to copy, each time anew.
        nodes[0].start(&settings(), None).await;
        nodes[0]
            .command(Command::Promote { force: true })
            .await
            .unwrap();
        write(&nodes[0], 10 + round as u8).await;
        nodes[0].stop().await;
        let data = nodes[0].on_disk(settings().size);
        let whole = bytes(&nodes[0], place, 4096);
        let damaged = &damages(&whole)[round % 3];
        put(&nodes[0], place, damaged);
        converge(&mut nodes, &data).await;
    }
}
