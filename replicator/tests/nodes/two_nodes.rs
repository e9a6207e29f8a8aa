//! A write from an application through NBD, core, disk and link to the other copy, and back.

use crate::support::{Nbd, Settings, TestNode, blocking, two_nodes};
use holdfast_replicator::control::node::Node as _;
use holdfast_replicator::control::protocol::{LinkName, RoleName, ServiceReport, StateName};
use holdfast_replicator::create::{CreateOptions, create};
use holdfast_replicator_core::api::Command;
use std::collections::BTreeMap;

async fn start_both(nodes: &mut [TestNode; 2], settings: &Settings) {
    let [first, second] = nodes;
    let address = first.start(settings, None).await;
    second.start(settings, Some(address)).await;
    first
        .until("the copies know each other", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
    second
        .until("the copies know each other", |s| {
            s.peers[0].link == LinkName::Established
        })
        .await;
}

/// Writes of many sizes and alignments, with what the volume must then hold.
fn workload(nbd: &mut Nbd, expected: &mut [u8], seed: u64) {
    let mut random = seed;
    let mut next = move || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        random >> 33
    };
    let size = expected.len() as u64;
    for step in 0..120u64 {
        let length = match step % 6 {
            0 => 4096,
            1 => 512 * (1 + next() % 64),
            2 => 1 + next() % 5000,
            3 => (1 << 20) + next() % (2 << 20),
            4 => 65536,
            _ => 1 + next() % 100,
        };
        let aligned = step % 6 < 2 || step % 6 == 4;
        let mut offset = next() % (size - length);
        if aligned {
            offset -= offset % 512;
        }
        let range = offset as usize..(offset + length) as usize;
        if step % 10 == 9 {
            nbd.write_zeroes(offset, length as u32).unwrap();
            expected[range].fill(0);
        } else {
            let data: Vec<u8> = (0..length).map(|at| (at ^ next()) as u8).collect();
            nbd.write(offset, &data, step % 7 == 0).unwrap();
            expected[range].copy_from_slice(&data);
        }
    }
    nbd.flush().unwrap();
}

#[tokio::test]
async fn what_an_application_writes_is_on_both_disks_and_survives_a_switchover() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        node.create(&settings);
    }
    start_both(&mut nodes, &settings).await;
    nodes[0]
        .until("it is up to date", |s| {
            s.state == StateName::UpToDate && s.in_sync.len() == 2
        })
        .await;

    // Nobody is primary: nobody serves.
    let socket = nodes[0].dir.join("nbd.sock");
    assert!(Nbd::open(&socket, "data").is_err());
    nodes[0]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    let epoch = nodes[0]
        .until("it is primary", |s| s.role == RoleName::Primary)
        .await
        .epoch
        .number;
    assert!(Nbd::open(&nodes[1].dir.join("nbd.sock"), "data").is_err());

    let size = settings.size;
    let path = socket.clone();
    let expected = blocking(move || {
        let mut nbd = Nbd::open(&path, &format!("db/data@{epoch}")).unwrap();
        assert_eq!(nbd.size, size);
        let mut expected = vec![0; size as usize];
        workload(&mut nbd, &mut expected, 7);
        for (offset, length) in [(0, 1 << 20), (777, 3_000_001)] {
            let read = nbd.read(offset, length).unwrap();
            assert!(read == expected[offset as usize..(offset + u64::from(length)) as usize]);
        }
        expected
    })
    .await;
    for node in &nodes {
        assert!(node.on_disk(size) == expected, "the disk of {}", node.name);
    }

    // Planned switchover: the old epoch's export is refused, the other copy serves the same bytes.
    nodes[0].command(Command::Demote).await.unwrap();
    // The copies meet anew once nobody is primary, and an automatic promotion asks for a member of S.
    let ready =
        |s: &ServiceReport| s.peers[0].link == LinkName::Established && s.in_sync.len() == 2;
    nodes[0].until("the copies met again", ready).await;
    nodes[1].until("the copies met again", ready).await;
    nodes[1]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    nodes[1]
        .until("it is primary", |s| {
            s.role == RoleName::Primary && s.epoch.number > epoch
        })
        .await;
    let other = nodes[1].dir.join("nbd.sock");
    assert!(Nbd::open(&socket, "data").is_err());
    assert!(Nbd::open(&other, &format!("data@{epoch}")).is_err());
    let mut after = expected.clone();
    let after = blocking(move || {
        let mut nbd = Nbd::open(&other, "data").unwrap();
        assert!(nbd.read(0, 4 << 20).unwrap() == after[..4 << 20]);
        workload(&mut nbd, &mut after, 8);
        after
    })
    .await;
    for node in &nodes {
        assert!(node.on_disk(size) == after, "the disk of {}", node.name);
    }
    let [first, second] = &mut nodes;
    second.stop().await;
    first.stop().await;
}

#[tokio::test]
async fn a_copy_that_was_away_takes_what_it_missed() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        metadata: "meta.img",
        ..Settings::default()
    };
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        node.create(&settings);
    }
    start_both(&mut nodes, &settings).await;
    nodes[0]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    nodes[1].stop().await;
    let socket = nodes[0].dir.join("nbd.sock");
    let size = settings.size;
    let expected = blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        let mut expected = vec![0; size as usize];
        workload(&mut nbd, &mut expected, 11);
        expected
    })
    .await;
    nodes[0]
        .until("it went on alone", |s| s.in_sync == [s.slot])
        .await;
    let address = nodes[0].replicator.as_ref().unwrap().addresses().link[0];
    nodes[1].start(&settings, Some(address)).await;
    nodes[0]
        .until("both are in sync again", |s| {
            s.in_sync.len() == 2 && s.peers[0].dirty_bytes == 0
        })
        .await;
    nodes[1]
        .until("it is up to date", |s| s.state == StateName::UpToDate)
        .await;
    for node in &nodes {
        assert!(node.on_disk(size) == expected, "the disk of {}", node.name);
    }
    let [first, second] = &mut nodes;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn metrics_and_events_tell_what_happened() {
    use std::io::{Read, Write};
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let mut nodes = two_nodes(root.path());
    for node in &nodes {
        node.create(&settings);
    }
    start_both(&mut nodes, &settings).await;
    nodes[0]
        .command(Command::Promote { force: false })
        .await
        .unwrap();
    let socket = nodes[0].dir.join("nbd.sock");
    blocking(move || {
        let mut nbd = Nbd::open(&socket, "data").unwrap();
        for at in 0..10 {
            nbd.write(at * 4096, &[1; 4096], false).unwrap();
        }
    })
    .await;
    let address = nodes[0].replicator.as_ref().unwrap().metrics().unwrap();
    let text = blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    })
    .await;
    let value = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(
        value("holdfast_requests_total{service=\"db\",volume=\"data\",kind=\"write\"}"),
        10.0
    );
    let peer = &nodes[0].service().await.peers[0].name;
    assert_eq!(
        value(&format!(
            "holdfast_peer_acknowledge_seconds_count{{service=\"db\",peer={peer:?}}}"
        )),
        10.0
    );
    assert_eq!(value("holdfast_primary{service=\"db\"}"), 1.0);
    let (events, _) = nodes[0].replicator.as_ref().unwrap().handle().events();
    let mut kinds = BTreeMap::<String, usize>::new();
    for event in &events {
        *kinds.entry(event.kind.clone()).or_default() += 1;
    }
    assert_eq!(kinds.get("started"), Some(&1), "{kinds:?}");
    let [first, second] = &mut nodes;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_service_on_hold_takes_no_memory_from_another() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings {
        size: 64 << 20,
        ..Settings::default()
    };
    let [mut node, _] = two_nodes(root.path());
    let second = format!(
        "[[service]]\nname = \"web\"\nid = \"5e51ce00000000000000000000000002\"\nslot = 0\n\
         [[service.volume]]\nname = \"pages\"\nbacking = {:?}\nsize = \"16MiB\"\n",
        node.dir.join("pages.img")
    );
    node.more = second;
    node.create(&settings);
    create(
        &node.config(&settings, None),
        "web",
        &CreateOptions::default(),
    )
    .unwrap();
    node.start(&settings, None).await;
    let handle = node.replicator.as_ref().unwrap().handle().clone();
    node.command(Command::Promote { force: true })
        .await
        .unwrap();
    handle
        .command("web", Command::Promote { force: true })
        .await
        .unwrap();
    node.command(Command::SuspendIo).await.unwrap();
    // More than all memory for clients together; each connection blocks once there is no more for it.
    let socket = node.dir.join("nbd.sock");
    let writers: Vec<_> = (0..4)
        .map(|number| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let mut nbd = Nbd::open(&socket, "data").unwrap();
                for at in 0..32u64 {
                    // Ends with an error when the node is stopped below.
                    if nbd
                        .send_write(((at * 2 + number / 2) % 64) << 20, &[1; 1 << 20])
                        .is_err()
                    {
                        return;
                    }
                }
            })
        })
        .collect();
    let other = blocking(move || {
        let mut nbd = Nbd::open(&socket, "pages").unwrap();
        let step = |at: u64| {
            nbd.write((at % 16) << 20, &[2; 8192], false)
                .and_then(|()| nbd.read((at % 16) << 20, 8192))
        };
        (0..3000)
            .map(step)
            .all(|read| read.is_ok_and(|bytes| bytes == [2; 8192]))
    });
    let fine = tokio::time::timeout(std::time::Duration::from_secs(20), other).await;
    assert!(fine.expect("the other service goes on"));
    node.command(Command::ResumeIo).await.unwrap();
    blocking(move || {
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap())
    })
    .await;
    node.stop().await;
}
