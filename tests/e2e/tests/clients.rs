//! The NBD clients people use, on a live replicated volume: what they wrote is there, on both copies, also after a failover (D1,
//! D15).

use holdfast_e2e::process::{available, must, spawn};
use holdfast_e2e::{Cluster, Settings};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const VOLUME: u64 = 32 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// Two nodes in sync, the first one primary; its URI.
fn volume() -> (Cluster, String) {
    let cluster = Cluster::start(&Settings {
        volumes: vec![("data", VOLUME)],
        ..Settings::default()
    });
    cluster[0].promote();
    cluster.until_in_sync(0, &[0, 1]);
    let uri = cluster[0].nbd_uri("data");
    (cluster, uri)
}

/// The copies agree while they run and byte for byte afterwards.
fn both_copies_are_equal(mut cluster: Cluster, primary: usize) -> Vec<u8> {
    cluster.until_in_sync(primary, &[0, 1]);
    cluster.verify(primary);
    cluster.stop();
    cluster.same_bytes(&[0, 1]);
    cluster[0].on_disk("data")
}

/// The primary is killed, its peer takes over, the killed node comes back. Returns the new URI.
fn fail_over(cluster: &mut Cluster) -> String {
    cluster[0].kill();
    cluster[1].until_misses(0);
    cluster[1].promote();
    cluster[0].start();
    cluster.until_in_sync(1, &[0, 1]);
    cluster[1].nbd_uri("data")
}

fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    must(command, LIMIT)
}

/// Bytes that repeat nowhere, a quarter of them zeroes, so that tools that look for zeroes find some.
fn content(seed: u64) -> Vec<u8> {
    let mut random = holdfast_e2e::Random::new(seed);
    let mut bytes = Vec::with_capacity(VOLUME as usize);
    while bytes.len() < VOLUME as usize {
        if random.percent(25) {
            bytes.resize(bytes.len() + (64 << 10), 0);
        } else {
            for _ in 0..(64 << 10) / 8 {
                bytes.extend(random.word().to_le_bytes());
            }
        }
    }
    bytes
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn libnbd_tools_see_the_volume_and_copy_both_ways() {
    if !available("nbdinfo") || !available("nbdcopy") {
        return;
    }
    let (mut cluster, uri) = volume();
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], VOLUME, "{info}");
    for promise in [
        "can_flush",
        "can_fua",
        "can_zero",
        "can_trim",
        "can_multi_conn",
    ] {
        assert_eq!(export[promise], true, "{promise}: {info}");
    }
    let list = run("nbdinfo", &["--list", &uri.replace("///data", "///")]);
    assert!(list.contains("data"), "{list}");

    let bytes = content(1);
    let image = cluster.directory().join("in.img");
    std::fs::write(&image, &bytes).unwrap();
    run("nbdcopy", &["--flush", text(&image), &uri]);
    let uri = fail_over(&mut cluster);
    let back = cluster.directory().join("out.img");
    run("nbdcopy", &[&uri, text(&back)]);
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert!(both_copies_are_equal(cluster, 1) == bytes);
}

#[test]
fn a_secondary_tells_every_client_why_it_does_not_serve() {
    let (cluster, _) = volume();
    match cluster[1].nbd("data") {
        Err(holdfast_e2e::nbd::NbdError::Refused(reason)) => {
            assert!(
                reason.contains("secondary") || reason.contains("primary"),
                "{reason}"
            );
        }
        other => panic!("{:?}", other.map(|nbd| nbd.size())),
    }
}

const PYTHON: &str = r#"
import nbd, os, sys
uri, failed_over = sys.argv[1], sys.argv[2] == "again"
h = nbd.NBD()
h.connect_uri(uri)
size = h.get_size()
block = 16384
content = lambda n: bytes((n * 7 + i) % 251 for i in range(256)) * (block // 256)
if not failed_over:
    # Many requests in flight on one connection.
    pending = []
    for n in range(200):
        buf = nbd.Buffer.from_bytearray(bytearray(content(n)))
        pending.append((h.aio_pwrite(buf, n * block), buf))
    while pending:
        h.poll(-1)
        pending = [(c, b) for c, b in pending if not h.aio_command_completed(c)]
    h.zero(3 * block, 5 * block)
    h.trim(2 * block, 20 * block)
    h.pwrite(content(255), 40 * block + 100, nbd.CMD_FLAG_FUA)
    h.flush()
else:
    for n in range(200):
        got = h.pread(block, n * block)
        if 5 <= n < 8:
            assert got == bytes(block), n
        elif 20 <= n < 22:
            # Discarded: zeroes, or as before.
            assert got in (bytes(block), content(n)), n
        elif n == 40:
            assert got == content(40)[:100] + content(255)[:block - 100], n
        elif n == 41:
            assert got == content(255)[block - 100:] + content(41)[100:], n
        else:
            assert got == content(n), n
    try:
        h.pread(4096, size - 512)
        raise SystemExit("a read beyond the end was answered")
    except nbd.Error:
        pass
h.shutdown()
print("all well")
"#;

#[test]
fn libnbd_from_python_with_many_requests_in_flight() {
    let has_nbd = |python: &&str| {
        let probe = Command::new(python).args(["-c", "import nbd"]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    // The first one in the path often is not the distribution's.
    let Some(python) = ["python3", "/usr/bin/python3"].into_iter().find(has_nbd) else {
        eprintln!("skipped: no Python has the nbd module (package python3-libnbd)");
        return;
    };
    let (mut cluster, uri) = volume();
    let said = run(python, &["-c", PYTHON, &uri, "first"]);
    assert!(said.contains("all well"), "{said}");
    let uri = fail_over(&mut cluster);
    let said = run(python, &["-c", PYTHON, &uri, "again"]);
    assert!(said.contains("all well"), "{said}");
    both_copies_are_equal(cluster, 1);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back_after_a_failover() {
    if !available("qemu-io") {
        return;
    }
    let (mut cluster, uri) = volume();
    let io = |uri: &str, commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", "-d", "unmap"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(uri);
        let said = run("qemu-io", &arguments);
        assert!(
            !said.contains("Pattern verification failed") && !said.contains("failed:"),
            "{said}"
        );
    };
    io(
        &uri,
        &[
            "write -P 0x11 0 1M",
            "write -P 0x22 4k 100k",
            "write -f -P 0x33 1000 3000",
            "write -z 64k 30k",
            "write -z -u 200000 70000",
            "discard 512k 64k",
            "aio_write -P 0x44 2M 1M",
            "aio_write -P 0x55 3M 1M",
            "aio_flush",
            "flush",
        ],
    );
    let uri = fail_over(&mut cluster);
    io(
        &uri,
        &[
            "read -P 0x11 0 1000",
            "read -P 0x33 1000 3000",
            "read -P 0x11 4000 96",
            "read -P 0x22 4k 60k",
            "read -P 0 64k 30k",
            "read -P 0x22 94k 10k",
            "read -P 0x11 104k 93504",
            "read -P 0 200000 70000",
            "read -P 0x11 270000 254288",
            "read -P 0x11 576k 448k",
            "read -P 0x44 2M 1M",
            "read -P 0x55 3M 1M",
        ],
    );
    both_copies_are_equal(cluster, 1);
}

#[test]
fn qemu_img_converts_and_compares() {
    if !available("qemu-img") {
        return;
    }
    let (mut cluster, uri) = volume();
    let info: serde_json::Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &uri])).unwrap();
    assert_eq!(info["virtual-size"], VOLUME, "{info}");
    let bytes = content(2);
    let raw = cluster.directory().join("in.img");
    std::fs::write(&raw, &bytes).unwrap();
    let packed = cluster.directory().join("in.qcow2");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&raw),
            text(&packed),
        ],
    );
    // Not created by qemu: it is there, with what it held before.
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-W",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text(&packed),
            &uri,
        ],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", text(&raw), &uri],
    );
    let uri = fail_over(&mut cluster);
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", text(&raw), &uri],
    );
    let back = cluster.directory().join("out.img");
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, text(&back)],
    );
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert!(both_copies_are_equal(cluster, 1) == bytes);
}

#[test]
fn a_file_system_through_nbdfuse() {
    if !available("nbdfuse") || !available("mke2fs") || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: nbdfuse, mke2fs or /dev/fuse is missing");
        return;
    }
    // Whichever this distribution has; root can always use the last one.
    let unmount: &[&str] = [["fusermount3", "-u"], ["fusermount", "-u"]]
        .iter()
        .find(|command| Command::new(command[0]).arg("-V").output().is_ok())
        .map_or(&["umount"], |command| command.as_slice());
    let (mut cluster, uri) = volume();
    let mount = |cluster: &Cluster, uri: &str, act: &dyn Fn(&str)| {
        let file = cluster.directory().join("fuse");
        std::fs::write(&file, "").unwrap();
        let mut command = Command::new("nbdfuse");
        command.arg(&file).arg(uri);
        let mut child = spawn(command).unwrap();
        let start = std::time::Instant::now();
        while std::fs::metadata(&file).unwrap().len() != VOLUME {
            assert!(start.elapsed() < LIMIT, "nbdfuse does not mount");
            std::thread::sleep(Duration::from_millis(5));
        }
        act(text(&file));
        run(unmount[0], &[&unmount[1..], &[text(&file)]].concat());
        let ended = holdfast_e2e::process::wait(&mut child, LIMIT);
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    };
    mount(&cluster, &uri, &|file| {
        run("mke2fs", &["-q", "-F", "-t", "ext4", file]);
        run("e2fsck", &["-f", "-n", file]);
    });
    let uri = fail_over(&mut cluster);
    mount(&cluster, &uri, &|file| {
        run("e2fsck", &["-f", "-n", file]);
    });
    both_copies_are_equal(cluster, 1);
}
