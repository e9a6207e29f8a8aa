//! The clients people use, against the server: qemu-io, qemu-img, nbdinfo, nbdcopy, nbdsh, fio.
//! A test whose tool is not installed says so and passes.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use support::server::{Running, Setup};

/// Runs `tool`; `None`, with a message, if it is not installed. Panics if it fails.
fn run(tool: &str, args: &[&str]) -> Option<String> {
    let output = match Command::new(tool).args(args).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {tool} is not installed");
            return None;
        }
        Err(error) => panic!("{tool}: {error}"),
    };
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{text}",
        output.status
    );
    Some(text)
}

/// Bytes without a pattern that a misplaced block could hide in.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

/// Runs a script in the NBD shell with any Python that has it: the first one in the path often has not.
fn nbdsh(args: &[&str]) -> Option<String> {
    let has_nbd = |python: &&str| {
        let probe = Command::new(python)
            .args(["-c", "import nbd"])
            .stderr(Stdio::null())
            .status();
        probe.is_ok_and(|status| status.success())
    };
    let Some(python) = ["python3", "/usr/bin/python3"].into_iter().find(has_nbd) else {
        eprintln!("skipped: no Python has the nbd module (package python3-libnbd)");
        return None;
    };
    run(python, &[&["-m", "nbd"], args].concat())
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn qemu_io_writes_reads_discards_and_flushes() {
    let server = Running::start(Setup::default());
    let uri = server.uri("disk");
    let commands = [
        "write -P 0x11 0 64k",
        "write -f -P 0x22 1000 3000",
        "read -P 0x22 1000 3000",
        "read -P 0x11 0 1000",
        "read -P 0x11 4000 61536",
        "write -z 8k 4k",
        "read -P 0 8k 4k",
        "write -z -u 16k 4k",
        "read -P 0 16k 4k",
        "discard 32k 4k",
        "aio_write -P 0x33 1M 4M",
        "aio_write -P 0x44 8M 4M",
        "aio_flush",
        "flush",
        "read -P 0x33 1M 4M",
        "read -P 0x44 8M 4M",
    ];
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let Some(text) = run("qemu-io", &args) else {
        return;
    };
    assert!(
        !text.contains("failed") && !text.contains("error"),
        "{text}"
    );
    let (fua, flushes, zeroes) = server.on_volume(|volume| {
        let calls = &volume.calls;
        (calls.fua.get(), calls.flushes.get(), calls.zeroes.get())
    });
    assert!(
        fua >= 1 && flushes >= 1 && zeroes >= 2,
        "{fua} {flushes} {zeroes}"
    );
}

#[test]
fn qemu_img_converts_in_and_out() {
    let server = Running::start(Setup::default());
    let source = server.directory().join("source.raw");
    let back = server.directory().join("back.qcow2");
    let mut bytes = noise(20 << 20);
    bytes[3 << 20..9 << 20].fill(0);
    bytes.resize(64 << 20, 0);
    std::fs::write(&source, &bytes).expect("source");
    let uri = server.uri("disk");
    let to = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        path(&source),
        &uri,
    ];
    if run("qemu-img", &to).is_none() {
        return;
    }
    let compare = ["compare", "-f", "raw", "-F", "raw", path(&source), &uri];
    run("qemu-img", &compare);
    let from = ["convert", "-f", "raw", "-O", "qcow2", &uri, path(&back)];
    run("qemu-img", &from);
    let compare = [
        "compare",
        "-f",
        "raw",
        "-F",
        "qcow2",
        path(&source),
        path(&back),
    ];
    run("qemu-img", &compare);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).expect("qemu-img");
    assert!(map.contains("\"zero\": true"), "{map}");
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let server = Running::start(Setup::default());
    let Some(text) = run("nbdinfo", &["--json", &server.uri("disk@7")]) else {
        return;
    };
    for fact in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-name\": \"disk@7\"",
        "\"export-size\": 67108864",
        "\"description\": \"memory\"",
        "\"base:allocation\"",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(text.contains(fact), "{fact} is missing in {text}");
    }
    let list = run("nbdinfo", &["--list", "--json", &server.uri("")]).expect("nbdinfo");
    assert!(
        list.contains("\"disk\"") && list.contains("\"disk@7\""),
        "{list}"
    );
    let map = run("nbdinfo", &["--map", "--totals", &server.uri("disk")]).expect("nbdinfo");
    assert!(map.contains("hole,zero"), "{map}");
}

#[test]
fn nbdcopy_copies_over_several_connections() {
    let server = Running::start(Setup::default());
    let source = server.directory().join("source.raw");
    let back = server.directory().join("back.raw");
    let mut bytes = noise(48 << 20);
    bytes[10 << 20..20 << 20].fill(0);
    bytes.resize(64 << 20, 0);
    std::fs::write(&source, &bytes).expect("source");
    let uri = server.uri("disk");
    let to = [
        "--threads=4",
        "--connections=4",
        "--flush",
        path(&source),
        &uri,
    ];
    if run("nbdcopy", &to).is_none() {
        return;
    }
    run(
        "nbdcopy",
        &["--threads=4", "--connections=4", &uri, path(&back)],
    );
    assert!(
        std::fs::read(&back).expect("copy") == bytes,
        "the copy differs"
    );
    let (connections, flushes) = server.on_server(|server| {
        let stats = server.stats();
        (stats.connections.get(), stats.flushes.get())
    });
    assert!(connections >= 8 && flushes >= 1, "{connections} {flushes}");
}

#[test]
fn nbdsh_gets_the_errors_the_specification_names() {
    let server = Running::start(Setup::default());
    let script = r#"
import errno
size = h.get_size()
h.set_strict_mode(0)
def fails(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, (number, error)
    else:
        raise AssertionError(number)
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size))
fails(errno.EINVAL, lambda: h.pread(512, size))
fails(errno.EINVAL, lambda: h.trim(512, size))
fails(errno.ENOSPC, lambda: h.zero(512, size))
h.pwrite(b"abc", 4095, nbd.CMD_FLAG_FUA)
assert h.pread(5, 4094) == b"\0abc\0"
h.zero(1, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(3, 4095) == b"a\0c"
h.trim(512, 0, nbd.CMD_FLAG_FUA)
h.cache(4096, 0)
seen = []
h.block_status(1 << 20, 0, lambda name, at, entries, error: seen.append((name, entries)))
assert seen == [("base:allocation", [8192, 0, (1 << 20) - 8192, 3])], seen
seen = []
h.block_status(1 << 20, 0, lambda name, at, entries, error: seen.append(entries), nbd.CMD_FLAG_REQ_ONE)
assert seen == [[8192, 0]], seen
assert h.pread_structured(4, 4095, lambda data, at, status, error: None, nbd.CMD_FLAG_DF) == b"a\0c\0"
h.shutdown()
print("all well")
"#;
    let uri = server.uri("disk");
    let args = ["--base-allocation", "--uri", &uri, "--command", script];
    let Some(text) = nbdsh(&args) else {
        return;
    };
    assert!(text.contains("all well"), "{text}");
}

#[test]
fn nbdsh_without_modern_features_still_reads_and_writes() {
    let server = Running::start(Setup::default());
    let script = format!(
        r#"
h.set_request_structured_replies(False)
h.set_handshake_flags(0)
h.set_opt_mode(False)
h.set_export_name("disk")
h.connect_unix("{}")
h.pwrite(b"old", 7)
assert h.pread(3, 7) == b"old"
assert not h.get_structured_replies_negotiated()
h.shutdown()
print("all well")
"#,
        server.socket().display()
    );
    let Some(text) = nbdsh(&["--command", &script]) else {
        return;
    };
    assert!(text.contains("all well"), "{text}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let mut setup = Setup {
        tcp: true,
        ..Setup::default()
    };
    // Small enough that the limits are at work, not only present.
    setup.limits.max_requests_in_flight = 16;
    setup.limits.max_bytes_in_flight = 256 << 10;
    let server = Running::start(setup);
    server.on_volume(|volume| volume.limit_memory(128 << 10));
    let tcp = server.tcp.expect("TCP");
    for uri in [server.uri("disk"), format!("nbd://{tcp}/disk")] {
        let uri = format!("--uri={uri}");
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randrw",
            "--bsrange=512-64k",
            "--iodepth=32",
            "--size=48m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_state_save=0", // It would be a file in the working directory.
            "--randseed=11",
            &uri,
        ];
        let Some(text) = run("fio", &args) else {
            return;
        };
        assert!(text.contains("err= 0"), "{text}");
    }
    let most = server.on_volume(|volume| volume.calls.most_lent.get());
    assert!(most <= 128 << 10, "{most}");
}
