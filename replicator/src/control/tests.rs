//! Server and client against each other over a real socket, with a node that answers by script.

use super::client::{Client, ClientError};
use super::node::Node;
use super::protocol::*;
use super::render::tests::sample;
use super::server::{ListenError, Server};
use holdfast_replicator_core::api::{AdminResult, Command, Refusal};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, broadcast, oneshot};

#[derive(Clone)]
struct Scripted {
    commands: Arc<Mutex<Vec<String>>>,
    events: broadcast::Sender<EventReport>,
    /// `Demote` waits for this: a service that is busy.
    busy: Arc<Notify>,
}

impl Node for Scripted {
    fn name(&self) -> String {
        "alpha".into()
    }
    async fn status(&self) -> NodeStatus {
        sample()
    }
    async fn command(&self, service: &str, command: Command) -> AdminResult {
        self.commands
            .lock()
            .unwrap()
            .push(format!("{service}: {command:?}"));
        match command {
            Command::Invalidate => Err(Refusal {
                kind: Default::default(),
                what: "db is primary".into(),
                kept: "Nothing was changed".into(),
                next: "Demote it first".into(),
            }),
            Command::Demote => {
                self.busy.notified().await;
                Ok("demoted".into())
            }
            _ => Ok("done".into()),
        }
    }
    async fn attach(&self, service: &str, disk: bool) -> AdminResult {
        Ok(format!("attached {service}, disk {disk}"))
    }
    async fn reload(&self) -> AdminResult {
        Ok("read again".into())
    }
    async fn explain_handshake(&self, service: &str, peer: &str) -> Result<String, Refusal> {
        Ok(format!("{service} and {peer}: row 9"))
    }
    fn events(&self) -> (Vec<EventReport>, broadcast::Receiver<EventReport>) {
        (vec![event("one"), event("two")], self.events.subscribe())
    }
}

fn event(text: &str) -> EventReport {
    EventReport {
        time_ms: 5,
        level: LevelName::Info,
        kind: "test".into(),
        service: "db".into(),
        peer: None,
        text: text.into(),
    }
}

struct Running {
    directory: tempfile::TempDir,
    node: Scripted,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let node = Scripted {
            commands: Arc::default(),
            events: broadcast::channel(4).0,
            busy: Arc::default(),
        };
        let (stop, stopped) = oneshot::channel();
        let (ready, opened) = std::sync::mpsc::channel();
        let served = node.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async move {
                let server = Server::open(&path).unwrap();
                ready.send(()).unwrap();
                server
                    .run(served, async { stopped.await.unwrap_or_default() })
                    .await;
            });
        });
        opened.recv().unwrap();
        Running {
            directory,
            node,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
    fn path(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }
    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap()
    }
    fn raw(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.path()).unwrap();
        // A server that says nothing fails the test instead of hanging it.
        stream
            .set_read_timeout(Some(std::time::Duration::from_secs(20)))
            .unwrap();
        BufReader::new(stream)
    }
    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.node.busy.notify_one();
        self.stop();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn open(path: &Path) -> Result<Server, ListenError> {
    let runtime = runtime();
    let _inside = runtime.enter();
    Server::open(path)
}

fn say(stream: &mut BufReader<UnixStream>, text: &str) -> String {
    stream.get_mut().write_all(text.as_bytes()).unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    line
}

const HELLO: &str = "{\"version_min\":1,\"version_max\":7,\"program\":\"test\"}\n";

#[test]
fn questions_are_answered_and_names_become_numbers() {
    let running = Running::start();
    let mut client = running.client();
    assert_eq!(client.node(), "alpha");
    assert_eq!(client.status().unwrap(), sample());
    assert_eq!(
        client.explain_handshake("db", "beta").unwrap(),
        "db and beta: row 9"
    );
    for command in [
        ServiceCommand::Promote { force: true },
        ServiceCommand::Connect {
            peer: Some("beta".into()),
        },
        ServiceCommand::Verify {
            volume: Some("data".into()),
        },
        ServiceCommand::SetMode {
            peer: "beta".into(),
            mode: ReplicationMode::Async,
        },
    ] {
        assert_eq!(client.command("db", command).unwrap(), "done");
    }
    assert_eq!(
        *running.node.commands.lock().unwrap(),
        [
            "db: Promote { force: true }",
            "db: Connect { peer: Some(Slot(1)) }",
            "db: Verify { volume: Some(VolumeIndex(0)) }",
            "db: SetMode { peer: Slot(1), mode: Async }",
        ]
    );
}

#[test]
fn a_refusal_keeps_its_three_sentences_and_unknown_names_list_the_known_ones() {
    let running = Running::start();
    let mut client = running.client();
    let refused = client
        .command("db", ServiceCommand::Invalidate)
        .unwrap_err();
    let ClientError::Fault(fault) = &refused else {
        panic!("{refused}")
    };
    assert_eq!(
        (fault.code, fault.what.as_str()),
        (FaultCode::Refused, "db is primary")
    );
    assert_eq!(
        (refused.kept().as_str(), refused.advice().as_str()),
        ("Nothing was changed", "Demote it first")
    );
    let unknown = client.command("web", ServiceCommand::Demote).unwrap_err();
    assert_eq!(unknown.advice(), "It has: db");
    let verify = ServiceCommand::Verify {
        volume: Some("log".into()),
    };
    assert_eq!(
        client.command("db", verify).unwrap_err().advice(),
        "Its volumes: data"
    );
    let connect = ServiceCommand::Connect {
        peer: Some("gamma".into()),
    };
    assert_eq!(
        client.command("db", connect).unwrap_err().advice(),
        "Its peers: beta"
    );
}

#[test]
fn a_busy_service_delays_nobody_else() {
    let running = Running::start();
    let mut slow = running.client();
    let waiting = std::thread::spawn(move || slow.command("db", ServiceCommand::Demote));
    while running.node.commands.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    running.client().status().unwrap();
    running.node.busy.notify_one();
    assert_eq!(waiting.join().unwrap().unwrap(), "demoted");
}

#[test]
fn a_command_that_takes_long_goes_on_without_its_asker() {
    let running = Running::start();
    let patience = std::time::Duration::from_millis(50);
    let begun = running
        .client()
        .begin("db", ServiceCommand::Demote, patience);
    assert_eq!(begun.unwrap(), None);
    assert_eq!(*running.node.commands.lock().unwrap(), ["db: Demote"]);
    let quick = running
        .client()
        .begin("db", ServiceCommand::StopVerify, patience * 100);
    assert_eq!(quick.unwrap().as_deref(), Some("done"));
}

#[test]
fn followers_get_the_past_then_the_present_and_are_told_what_they_missed() {
    let running = Running::start();
    let mut past = Vec::new();
    running
        .client()
        .events(false, Some(1), |event| {
            past.push(event.unwrap().text);
            true
        })
        .unwrap();
    assert_eq!(past, ["two"]);

    let mut seen = Vec::new();
    let sender = running.node.events.clone();
    running
        .client()
        .events(true, None, |item| {
            seen.push(item.map(|event| event.text));
            if seen.len() == 2 {
                // More than the channel holds, in one go: the oldest are dropped.
                for number in 0..10 {
                    sender.send(event(&number.to_string())).unwrap();
                }
            }
            !matches!(seen.last(), Some(Ok(text)) if text == "9")
        })
        .unwrap();
    let live = |text: &str| Ok(text.to_string());
    assert_eq!(seen[..2], [live("one"), live("two")]);
    assert_eq!(seen.last(), Some(&live("9")));
    let missed: u64 = seen.iter().filter_map(|item| item.as_ref().err()).sum();
    let got = seen.iter().filter(|item| item.is_ok()).count() as u64 - 2;
    assert_eq!(missed + got, 10, "{seen:?}");
}

#[test]
fn a_watch_goes_on_until_the_server_stops() {
    let mut running = Running::start();
    let client = running.client();
    let (count, counted) = std::sync::mpsc::channel();
    let watching = std::thread::spawn(move || {
        client.watch(1, |status| {
            count.send(status).unwrap();
            true
        })
    });
    for _ in 0..2 {
        assert_eq!(counted.recv().unwrap(), sample());
    }
    running.stop();
    // Either the end of the stream or the notice that it stops, whichever is read first; never a hang.
    match watching.join().unwrap() {
        Ok(()) => {}
        Err(ClientError::Fault(fault)) => assert_eq!(fault.code, FaultCode::Stopping),
        Err(error) => panic!("{error}"),
    }
    assert!(!running.path().exists(), "the socket is removed");
}

#[test]
fn versions_without_overlap_are_refused_with_advice() {
    let running = Running::start();
    let answer = say(
        &mut running.raw(),
        "{\"version_min\":9,\"version_max\":9,\"program\":\"x\"}\n",
    );
    assert!(
        answer.contains("\"version\"") && answer.contains("speaks versions 9 to 9"),
        "{answer}"
    );
    let mut newer = running.raw();
    assert!(say(&mut newer, HELLO).starts_with("{\"version_min\":1,\"version_max\":1,"));
}

#[test]
fn nonsense_is_answered_and_does_no_harm() {
    let running = Running::start();
    assert!(say(&mut running.raw(), "GET / HTTP/1.1\n").contains("malformed"));
    let mut client = running.raw();
    say(&mut client, HELLO);
    assert!(say(&mut client, "{\"id\":1,\"request\":\"destroy\"}\n").contains("malformed"));
    let status = say(&mut client, "{\"id\":2,\"request\":\"status\"}\n");
    assert!(
        status.starts_with("{\"id\":2,\"answer\":{\"status\":{\"node\":\"alpha\""),
        "{status}"
    );
    // A line without end is cut off at the limit, not stored.
    let long = vec![b'x'; MAX_REQUEST_LINE + 1];
    client.get_mut().write_all(&long).unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("too long"), "{rest}");
    running.client().status().unwrap();
}

#[test]
fn more_connections_than_seats_are_told_so() {
    let running = Running::start();
    let held: Vec<Client> = (0..MAX_CONNECTIONS).map(|_| running.client()).collect();
    let refused = Client::connect(&running.path()).err().unwrap();
    assert!(
        matches!(&refused, ClientError::Fault(fault) if fault.code == FaultCode::Busy),
        "{refused}"
    );
    drop(held);
}

#[test]
fn the_socket_is_private_from_the_start_and_belongs_to_one_process() {
    let running = Running::start();
    let mode = std::fs::metadata(running.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(
        open(&running.path()),
        Err(ListenError::InUse { .. })
    ));
    running.client().status().unwrap();

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    // Left behind by a crash: bound, never removed, nobody listens.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(open(&path).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(open(&path), Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let long = directory.path().join("x".repeat(120));
    assert!(matches!(open(&long), Err(ListenError::Io { .. })));
    let none = Client::connect(&directory.path().join("none"))
        .err()
        .unwrap();
    assert!(matches!(none, ClientError::NotRunning { .. }));
}
