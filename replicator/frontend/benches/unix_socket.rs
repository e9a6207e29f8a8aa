//! What the frontend itself costs: 4 KiB and 1 MiB requests over a Unix socket to a volume in memory.
//!
//! Runs a client of its own (no parsing, no threads), then fio against this server and against `qemu-nbd` on a file
//! in memory, where both are installed.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::wire::command;
use support::client::{Client, header};
use support::server::{Running, Setup};

const SIZE: u64 = 256 << 20;
const RUN: Duration = Duration::from_secs(2);

fn own_client(server: &Running, write: bool, bytes: u32, depth: u64) {
    let mut client = Client::open(&server.socket(), false);
    let payload = vec![0x5a; bytes as usize];
    let blocks = SIZE / u64::from(bytes);
    let kind = if write { command::WRITE } else { command::READ };
    let (payload, answer): (&[u8], usize) = if write {
        (&payload, 0)
    } else {
        (&[], bytes as usize)
    };
    let before = server.on_server(|server| {
        let stats = server.stats();
        (stats.socket_reads.get(), stats.socket_writes.get())
    });
    let start = Instant::now();
    let (mut sent, mut done) = (0u64, 0u64);
    while start.elapsed() < RUN || done < sent {
        while sent - done < depth && start.elapsed() < RUN {
            // A fixed stride visits the volume in no order the kernel could guess.
            let block = sent.wrapping_mul(7919) % blocks;
            client.send(header(kind, sent, block * u64::from(bytes), bytes), payload);
            sent += 1;
        }
        if done < sent {
            assert_eq!(client.reply(answer).error, 0);
            done += 1;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let after = server.on_server(|server| {
        let stats = server.stats();
        (stats.socket_reads.get(), stats.socket_writes.get())
    });
    println!(
        "own client, {} of {:>4} KiB, depth {depth:>2}: {:>8.0}/s {:>6.0} MiB/s, per request {:.2} receives and {:.2} sends",
        if write { "writes" } else { "reads " },
        bytes / 1024,
        done as f64 / seconds,
        done as f64 * f64::from(bytes) / seconds / 1_048_576.0,
        (after.0 - before.0) as f64 / done as f64,
        (after.1 - before.1) as f64 / done as f64,
    );
}

/// I/Os per second by fio's own account, from its terse output.
fn fio(uri: &str, write: bool, bytes: u32, depth: u32) -> Option<f64> {
    let output = Command::new("fio")
        .args([
            "--name=nbd",
            "--ioengine=nbd",
            "--time_based",
            "--runtime=3",
            "--ramp_time=1",
        ])
        .args(["--output-format=terse", "--terse-version=3"])
        .arg(format!(
            "--rw={}",
            if write { "randwrite" } else { "randread" }
        ))
        .arg(format!("--bs={bytes}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--uri={uri}"))
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with("3;"))?;
    line.split(';')
        .nth(if write { 48 } else { 7 })?
        .parse()
        .ok()
}

fn compare(server: &Running) {
    let file = server.directory().join("peer.raw");
    let Ok(handle) = std::fs::File::create("/dev/shm/holdfast-frontend-bench.raw") else {
        return println!("no /dev/shm: not compared with qemu-nbd");
    };
    handle.set_len(SIZE).expect("size");
    std::os::unix::fs::symlink("/dev/shm/holdfast-frontend-bench.raw", &file).expect("link");
    let socket = server.directory().join("peer.sock");
    let peer = Command::new("qemu-nbd")
        .args([
            "--format=raw",
            "--persistent",
            "--shared=0",
            "--cache=writeback",
            "--aio=io_uring",
        ])
        .arg(format!("--socket={}", socket.display()))
        .arg(&file)
        .spawn();
    match peer {
        Err(error) => println!("qemu-nbd: {error}; not compared"),
        Ok(mut peer) => {
            while std::os::unix::net::UnixStream::connect(&socket).is_err() {
                std::thread::yield_now();
            }
            let uri = format!("nbd+unix:///?socket={}", socket.display());
            for (write, bytes, depth) in [
                (true, 4096, 32),
                (false, 4096, 32),
                (true, 4096, 1),
                (false, 4096, 1),
                (true, 1 << 20, 8),
                (false, 1 << 20, 8),
            ] {
                let ours = fio(&server.uri("disk"), write, bytes, depth);
                let theirs = fio(&uri, write, bytes, depth);
                println!(
                    "fio, {} of {:>4} KiB, depth {depth:>2}: {ours:?} here, {theirs:?} qemu-nbd on a file in memory",
                    if write { "writes" } else { "reads " },
                    bytes / 1024
                );
            }
            let _ = peer.kill();
            let _ = peer.wait();
        }
    }
    let _ = std::fs::remove_file("/dev/shm/holdfast-frontend-bench.raw");
}

fn main() {
    let server = Running::start(Setup {
        size: SIZE,
        ..Setup::default()
    });
    for (bytes, depth) in [(4096, 1), (4096, 32), (1 << 20, 8)] {
        // A blocking client may only write ahead what the socket takes while the server writes back.
        own_client(&server, true, bytes, depth);
        own_client(&server, false, bytes, depth);
    }
    compare(&server);
}
