//! A server on a thread of its own, as a shard runs it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use holdfast_frontend::CloseReason;
use holdfast_frontend::nbd::{Limits, NbdServer, TlsPolicy, bind_tcp, bind_unix};
use tokio::sync::mpsc as tokio_mpsc;
use tokio::task::LocalSet;

use super::memory::{Memory, OneDisk};

type Job = Box<dyn FnOnce(&Rc<NbdServer<OneDisk>>) + Send>;

/// How to run a test server.
pub struct Setup {
    pub size: u64,
    pub limits: Limits,
    pub tls: TlsPolicy,
    pub tcp: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            size: 64 << 20,
            limits: Limits::default(),
            tls: TlsPolicy::LoopbackOnly,
            tcp: false,
        }
    }
}

pub struct Running {
    directory: tempfile::TempDir,
    pub tcp: Option<SocketAddr>,
    jobs: tokio_mpsc::UnboundedSender<Job>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(setup: Setup) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let socket = directory.path().join("nbd.sock");
        let (ready, is_ready) = mpsc::channel();
        let (jobs, mut inbox) = tokio_mpsc::unbounded_channel::<Job>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            LocalSet::new().block_on(&runtime, async move {
                let server = NbdServer::new(OneDisk(Memory::new(setup.size)), setup.limits);
                let listener = bind_unix(&socket, 0o600).expect("Unix socket");
                tokio::task::spawn_local(Rc::clone(&server).serve_unix(listener));
                let mut tcp = None;
                if setup.tcp {
                    let address = "127.0.0.1:0".parse().expect("address");
                    let listener = bind_tcp(address, &setup.tls).await.expect("TCP socket");
                    tcp = Some(listener.local_addr().expect("address"));
                    tokio::task::spawn_local(Rc::clone(&server).serve_tcp(listener, setup.tls));
                }
                ready.send(tcp).expect("the test waits");
                while let Some(job) = inbox.recv().await {
                    job(&server);
                }
                server.stop(CloseReason::Stopping);
                server.idle().await;
            });
        });
        let tcp = is_ready.recv().expect("the server starts");
        Running {
            directory,
            tcp,
            jobs,
            thread: Some(thread),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Runs `job` on the server's thread and brings back what it returns.
    pub fn on_server<R: Send + 'static>(
        &self,
        job: impl FnOnce(&Rc<NbdServer<OneDisk>>) -> R + Send + 'static,
    ) -> R {
        let (back, result) = mpsc::channel();
        let job: Job = Box::new(move |server| {
            let _ = back.send(job(server));
        });
        assert!(self.jobs.send(job).is_ok(), "the server's thread is gone");
        result.recv().expect("the job ran")
    }

    /// The same with the volume.
    pub fn on_volume<R: Send + 'static>(
        &self,
        job: impl FnOnce(&Memory) -> R + Send + 'static,
    ) -> R {
        self.on_server(move |server| job(&server.exports().0))
    }

    /// Asks the volume until `condition` holds. Each question takes a turn of the server's thread, in which it
    /// also serves its sockets; panics after 20 s.
    pub fn until(
        &self,
        what: &str,
        condition: impl Fn(&Rc<NbdServer<OneDisk>>) -> bool + Send + Clone + 'static,
    ) {
        let start = std::time::Instant::now();
        while !self.on_server(condition.clone()) {
            assert!(start.elapsed().as_secs() < 20, "never happened: {what}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Closing the inbox stops the server.
        let (closed, _) = tokio_mpsc::unbounded_channel();
        self.jobs = closed;
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the server's thread panicked");
            }
        }
    }
}
