//! Two nodes on this machine, each a process of its own with its own directory, identity and disk: started, killed
//! and looked at from outside, as a person would do it on two machines.

use super::DemoError;
use super::nbd_client::NbdClient;
use crate::control::client::Client;
use crate::control::protocol::{NodeStatus, ServiceCommand, ServiceReport};
use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Name of the service and of its volume.
pub const SERVICE: &str = "demo";
/// See [`SERVICE`].
pub const VOLUME: &str = "data";
/// Names of the two nodes.
pub const NAMES: [&str; 2] = ["alpha", "beta"];

/// Starting, stopping and the answers to commands stay far below this; longer means that something is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a condition outside this process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A port of the loopback interface that was free for both UDP and TCP a moment ago.
pub fn free_port() -> std::io::Result<u16> {
    let mut last = None;
    for _ in 0..64 {
        let udp = UdpSocket::bind("127.0.0.1:0")?;
        let port = udp.local_addr()?.port();
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()))
}

/// Everything that must be undone when the demo ends, in whatever way: processes and the directory. Shared with
/// the thread that waits for signals.
#[derive(Clone, Default)]
pub struct Leftovers {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    children: Vec<Child>,
    directory: Option<PathBuf>,
}

impl Leftovers {
    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Kills what still runs and removes the directory.
    pub fn clean(&self) {
        self.with(|inner| {
            for child in &mut inner.children {
                // One that ended already was waited for, and its number may be another's now: `Child` knows.
                let _ = child.kill();
                let _ = child.wait();
            }
            inner.children.clear();
            if let Some(directory) = inner.directory.take()
                && let Err(error) = std::fs::remove_dir_all(&directory)
            {
                eprintln!("{} could not be removed: {error}", directory.display());
            }
        });
    }

    /// Leaves processes and directory alone from now on.
    pub fn keep(&self) {
        self.with(|inner| {
            inner.children.clear();
            inner.directory = None;
        });
    }

    fn adopt(&self, child: Child) -> u32 {
        let pid = child.id();
        self.with(|inner| inner.children.push(child));
        pid
    }

    fn child<T>(
        &self,
        pid: u32,
        act: impl FnOnce(&mut Child) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        self.with(
            |inner| match inner.children.iter_mut().find(|child| child.id() == pid) {
                Some(child) => act(child),
                None => Err(std::io::ErrorKind::NotFound.into()),
            },
        )
    }

    /// Waits until that child has ended; none when patience ends first. The lock is free in between, so that a
    /// signal is never held up.
    fn wait(&self, pid: u32) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Ok(Some(status)) = self.child(pid, Child::try_wait) {
                return Some(status);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        None
    }

    fn forget(&self, pid: u32) {
        self.with(|inner| inner.children.retain(|child| child.id() != pid));
    }
}

/// One of the two nodes.
pub struct Node {
    pub name: &'static str,
    exe: PathBuf,
    directory: PathBuf,
    link_port: u16,
    leftovers: Leftovers,
    pid: Option<u32>,
    /// The process dies with this one, however this one ends.
    tied: bool,
}

impl Node {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
    /// Identity, trusted peers and event log.
    pub fn state_dir(&self) -> PathBuf {
        self.path("state")
    }
    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.path("control.sock")
    }
    /// The file with the volume's data, and nothing else in it.
    pub fn backing(&self) -> PathBuf {
        self.path("data.img")
    }
    /// Where applications find the volume while this node is primary.
    pub fn nbd_uri(&self) -> String {
        format!(
            "nbd+unix:///{VOLUME}?socket={}",
            self.path("nbd.sock").display()
        )
    }
    /// Process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// This program, with the node's configuration, in the way a person would call it.
    fn holdfast(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.exe);
        command
            .args(arguments)
            .arg("--config")
            .arg(self.path("holdfast.toml"))
            // Settings of the caller's own cluster must not lead there.
            .env_remove("HOLDFAST_SOCKET")
            .env_remove("HOLDFAST_CONFIG");
        command
    }

    /// Runs one verb to its end and returns what it printed.
    pub fn verb(&self, arguments: &[&str], input: &str) -> Result<String, DemoError> {
        let mut child = self
            .holdfast(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| DemoError::io("starting", &self.exe, source))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A verb that reads nothing may be gone already; its exit code tells the rest.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child
            .wait_with_output()
            .map_err(|source| DemoError::io("waiting for", &self.exe, source))?;
        if !output.status.success() {
            return Err(DemoError::Broken(format!(
                "`holdfast {}` on {} failed ({}): {}",
                arguments.join(" "),
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts the replicator and waits until it answers.
    pub fn start(&mut self) -> Result<(), DemoError> {
        let log = self.path("replicator.log");
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|source| DemoError::io("opening", &log, source))?;
        let errors = file
            .try_clone()
            .map_err(|source| DemoError::io("opening", &log, source))?;
        let mut command = self.holdfast(&["replicator"]);
        // Its own process group: Ctrl-C ends the demo, and the demo ends its nodes.
        command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .process_group(0);
        if self.tied {
            let parent = rustix::process::getpid();
            // SAFETY: between fork and exec only two system calls are made, both safe there; nothing is
            // allocated and no lock is taken.
            unsafe {
                command.pre_exec(move || {
                    rustix::process::set_parent_process_death_signal(Some(
                        rustix::process::Signal::KILL,
                    ))?;
                    // The parent may have died before the call above.
                    if rustix::process::getppid() == Some(parent) {
                        Ok(())
                    } else {
                        Err(std::io::ErrorKind::BrokenPipe.into())
                    }
                });
            }
        }
        let child = command
            .spawn()
            .map_err(|source| DemoError::io("starting", &self.exe, source))?;
        let pid = self.leftovers.adopt(child);
        self.pid = Some(pid);
        self.until("the replicator answers", || {
            match Client::connect(&self.socket()) {
                Ok(mut client) => Ok(client.status().ok()),
                Err(_) => Ok(None),
            }
        })?;
        Ok(())
    }

    /// Looks again and again until there is something; fails when the process ends or patience does.
    pub fn until<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> Result<Option<T>, DemoError>,
    ) -> Result<T, DemoError> {
        let start = Instant::now();
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if let Some(status) = self.exited() {
                return Err(DemoError::Broken(format!(
                    "node {} ended ({status}) before {what}:\n{}",
                    self.name,
                    self.log_tail()
                )));
            }
            if start.elapsed() > PATIENCE {
                return Err(DemoError::Broken(format!(
                    "node {}: waited {} s in vain until {what}\n{}{}",
                    self.name,
                    PATIENCE.as_secs(),
                    self.screen(),
                    self.log_tail()
                )));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn exited(&self) -> Option<ExitStatus> {
        self.leftovers
            .child(self.pid?, Child::try_wait)
            .ok()
            .flatten()
    }

    fn screen(&self) -> String {
        let plain = crate::control::render::Style { colour: false };
        self.status().map_or_else(
            |error| format!("{error}\n"),
            |status| crate::control::render::status(&status, plain),
        )
    }

    /// The last lines the process wrote.
    pub fn log_tail(&self) -> String {
        let mut text = Vec::new();
        let read = std::fs::File::open(self.path("replicator.log"))
            .and_then(|mut file| file.read_to_end(&mut text));
        if let Err(error) = read {
            return format!("(its log cannot be read: {error})");
        }
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// A connection to its control socket.
    pub fn client(&self) -> Result<Client, DemoError> {
        Client::connect(&self.socket()).map_err(|source| DemoError::Control {
            node: self.name,
            source,
        })
    }

    /// Its status now.
    pub fn status(&self) -> Result<NodeStatus, DemoError> {
        let status = self.client()?.status();
        status.map_err(|source| DemoError::Control {
            node: self.name,
            source,
        })
    }

    /// The status of the service now.
    pub fn service(&self) -> Result<ServiceReport, DemoError> {
        let status = self.status()?;
        status
            .services
            .into_iter()
            .find(|service| service.name == SERVICE)
            .ok_or_else(|| {
                DemoError::Broken(format!(
                    "node {} does not know service {SERVICE}",
                    self.name
                ))
            })
    }

    /// Waits until the service's status satisfies `judge`.
    pub fn until_service(
        &self,
        what: &str,
        judge: impl Fn(&ServiceReport) -> bool,
    ) -> Result<ServiceReport, DemoError> {
        self.until(what, || Ok(Some(self.service()?).filter(&judge)))
    }

    /// Has the service carry out a command.
    pub fn command(&self, command: ServiceCommand) -> Result<String, DemoError> {
        let done = self.client()?.command(SERVICE, command);
        done.map_err(|source| DemoError::Control {
            node: self.name,
            source,
        })
    }

    /// A connection to the volume, as an application makes it.
    pub fn nbd(&self) -> Result<NbdClient, DemoError> {
        Ok(NbdClient::connect(&self.nbd_uri(), PATIENCE)?)
    }

    /// What it takes to kill it from another place, in the midst of a load.
    pub fn handle(&self) -> Handle {
        Handle {
            name: self.name,
            pid: self.pid,
            leftovers: self.leftovers.clone(),
        }
    }

    /// Its process was killed: there is none any more.
    pub fn killed(&mut self) {
        self.pid = None;
    }

    /// SIGTERM, and the process must end by itself, with success.
    pub fn stop(&mut self) -> Result<(), DemoError> {
        let Some(pid) = self.pid else { return Ok(()) };
        let target = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(target) = target {
            // Not waited for yet, so the number is still this child's.
            rustix::process::kill_process(target, rustix::process::Signal::TERM)
                .map_err(|errno| DemoError::io("stopping", Path::new(self.name), errno.into()))?;
        }
        let Some(status) = self.leftovers.wait(pid) else {
            return Err(DemoError::Broken(format!(
                "node {} did not stop within {} s of SIGTERM\n{}",
                self.name,
                PATIENCE.as_secs(),
                self.log_tail()
            )));
        };
        self.leftovers.forget(pid);
        self.pid = None;
        if status.success() {
            return Ok(());
        }
        Err(DemoError::Broken(format!(
            "node {} ended with {status} instead of stopping cleanly\n{}",
            self.name,
            self.log_tail()
        )))
    }
}

/// See [`Node::handle`].
pub struct Handle {
    name: &'static str,
    pid: Option<u32>,
    leftovers: Leftovers,
}

impl Handle {
    /// SIGKILL: the process gets to do nothing more. Returns once the kernel has taken it apart.
    pub fn kill(&self) -> Result<(), DemoError> {
        let Some(pid) = self.pid else { return Ok(()) };
        self.leftovers
            .child(pid, |child| child.kill().and_then(|()| child.wait()))
            .map_err(|source| DemoError::io("killing", Path::new(self.name), source))?;
        self.leftovers.forget(pid);
        Ok(())
    }
}

/// Makes the directories, configurations, identities and volumes of both nodes in `directory`, and starts them.
pub fn build(
    exe: &Path,
    directory: &Path,
    volume_bytes: u64,
    service_id: u128,
    tied: bool,
    leftovers: &Leftovers,
) -> Result<[Node; 2], DemoError> {
    leftovers.with(|inner| inner.directory = Some(directory.to_path_buf()));
    let mut ports = [0; 2];
    for port in &mut ports {
        *port = free_port().map_err(|source| {
            DemoError::io("looking for a free port on", Path::new("127.0.0.1"), source)
        })?;
    }
    let mut nodes = [0, 1].map(|index| Node {
        name: NAMES[index],
        exe: exe.to_path_buf(),
        directory: directory.join(NAMES[index]),
        link_port: ports[index],
        leftovers: leftovers.clone(),
        pid: None,
        tied,
    });
    for (index, node) in nodes.iter().enumerate() {
        std::fs::create_dir_all(&node.directory)
            .map_err(|source| DemoError::io("making", &node.directory, source))?;
        let text = configuration(node, index, ports[1 - index], volume_bytes, service_id);
        let path = node.path("holdfast.toml");
        std::fs::write(&path, text).map_err(|source| DemoError::io("writing", &path, source))?;
        node.verb(&["init"], "")?;
    }
    join(&mut nodes)?;
    for node in &mut nodes {
        node.verb(&["volume", "create", SERVICE], "")?;
    }
    for node in &mut nodes {
        node.start()?;
    }
    Ok(nodes)
}

fn configuration(
    node: &Node,
    index: usize,
    peer_port: u16,
    volume_bytes: u64,
    service_id: u128,
) -> String {
    // Paths are of this program's own making, below the system's directory for temporary files.
    let path = |name: &str| toml::Value::String(node.path(name).display().to_string()).to_string();
    format!(
        r#"# One of the two nodes of `holdfast demo`.
[node]
name = "{name}"
state_dir = {state}
link_listen = ["127.0.0.1:{link}"]
control_socket = {control}
metrics = "off"

[nbd]
unix = {nbd}

[[service]]
name = "{SERVICE}"
id = "{service_id:032x}"
slot = {index}
mode = "sync"
on_peer_loss = "suspend"

[[service.volume]]
name = "{VOLUME}"
backing = {backing}
metadata = {metadata}
size = {volume_bytes}

[[service.peer]]
node = "{peer}"
slot = {peer_slot}
addresses = ["127.0.0.1:{peer_port}"]
"#,
        name = node.name,
        state = path("state"),
        link = node.link_port,
        control = path("control.sock"),
        nbd = path("nbd.sock"),
        backing = path("data.img"),
        metadata = path("metadata.img"),
        peer = NAMES[1 - index],
        peer_slot = 1 - index,
    )
}

/// Has beta join alpha, with the verbs a person would use on two machines.
fn join(nodes: &mut [Node; 2]) -> Result<(), DemoError> {
    let [alpha, beta] = nodes;
    let mut waiting = alpha
        .holdfast(&["token", "--listen", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| DemoError::io("starting", &alpha.exe, source))?;
    let stdout = waiting.stdout.take();
    let pid = alpha.leftovers.adopt(waiting);
    let mut token = String::new();
    if let Some(stdout) = stdout {
        std::io::BufReader::new(stdout)
            .read_line(&mut token)
            .map_err(|source| DemoError::io("reading the token of", &alpha.directory, source))?;
    }
    // An empty token is refused by `join` with a reason, and the waiting process then tells its own.
    let joined = beta.verb(&["join"], &token);
    let mut said = String::new();
    if joined.is_err() {
        // It would wait for the next caller.
        let _ = alpha.leftovers.child(pid, Child::kill);
    }
    let ended = alpha.leftovers.wait(pid);
    let read = alpha
        .leftovers
        .child(pid, |child| match child.stderr.take() {
            Some(mut stderr) if ended.is_some() => stderr.read_to_string(&mut said).map(drop),
            _ => Ok(()),
        });
    if ended.is_none() {
        let _ = alpha
            .leftovers
            .child(pid, |child| child.kill().and_then(|()| child.wait()));
    }
    alpha.leftovers.forget(pid);
    joined?;
    read.map_err(|source| DemoError::io("reading what was said by", &alpha.exe, source))?;
    match ended {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(DemoError::Broken(format!(
            "`holdfast token` on {} ended with {status}: {}",
            alpha.name,
            said.trim()
        ))),
        None => Err(DemoError::Broken(format!(
            "`holdfast token` on {} went on waiting although {} had joined",
            alpha.name, beta.name
        ))),
    }
}
