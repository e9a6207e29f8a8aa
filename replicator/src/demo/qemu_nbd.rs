//! For tests: an independent NBD server, where one is installed.

use rustix::process::{Pid, Signal};
use std::path::PathBuf;
use std::process::Command;

/// A `qemu-nbd` with one export named `data`.
pub struct Server {
    directory: tempfile::TempDir,
    uri: String,
    pid: Option<Pid>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Ends it in the midst of whatever it does.
    pub fn kill(&mut self) {
        if let Some(pid) = self.pid.take() {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Serves a fresh sparse image on a Unix socket or a TCP port; none where `qemu-nbd` is not installed.
pub fn serve(size: u64, tcp: bool) -> Option<Server> {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::File::create(at("image"))
        .unwrap()
        .set_len(size)
        .unwrap();
    let (listen, uri) = if tcp {
        let port = crate::demo::cluster::free_port().unwrap();
        let listen = vec!["--bind=127.0.0.1".to_string(), format!("--port={port}")];
        (listen, format!("nbd://127.0.0.1:{port}/data"))
    } else {
        let socket = at("nbd.sock");
        (
            vec![format!("--socket={socket}")],
            format!("nbd+unix:///data?socket={socket}"),
        )
    };
    // With --fork it returns once the socket listens.
    let started = Command::new("qemu-nbd")
        .args([
            "--fork",
            "--format=raw",
            "--persistent",
            "--shared=16",
            "--export-name=data",
        ])
        .arg(format!("--pid-file={}", at("pid")))
        .args(listen)
        .arg(at("image"))
        .status();
    match started {
        Ok(status) => assert!(status.success(), "qemu-nbd did not start"),
        Err(_) => {
            eprintln!("skipped: qemu-nbd is not installed");
            return None;
        }
    }
    let pid = std::fs::read_to_string(at("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    Some(Server {
        directory,
        uri,
        pid: Pid::from_raw(pid),
    })
}
