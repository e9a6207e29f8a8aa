//! Limits that take time or count connections, and the sockets themselves.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use holdfast_frontend::nbd::wire::command;
use holdfast_frontend::nbd::{BindError, TlsPolicy, bind_tcp, bind_unix};
use support::client::{Client, header};
use support::server::{Running, Setup};

#[test]
fn a_handshake_has_a_deadline() {
    let mut setup = Setup::default();
    setup.limits.handshake_timeout = Duration::from_millis(200);
    let server = Running::start(setup);
    let mut opened = Client::open(&server.socket(), false);
    let mut silent = Client::connect(&server.socket());
    silent.expect_closed();
    assert_eq!(
        opened.call(header(command::READ, 1, 0, 4), &[]).data,
        [0; 4]
    );
}

#[test]
fn one_connection_too_many_is_closed_at_once() {
    let mut setup = Setup {
        tcp: true,
        ..Setup::default()
    };
    setup.limits.max_connections = 2;
    let server = Running::start(setup);
    let mut first = Client::open(&server.socket(), false);
    let second = Client::open(&server.socket(), false);
    let mut third = Client {
        stream: UnixStream::connect(server.socket()).expect("connect"),
        structured: false,
    };
    third.expect_closed();
    // The network's door is another one.
    let address = server.tcp.expect("TCP");
    let mut remote = Client::greet(std::net::TcpStream::connect(address).expect("connect"));
    remote.go("disk", &[]);
    drop((remote, second));
    server.until("a place is free", |server| {
        server.stats().connections_open.get() == 1
    });
    let mut fourth = Client::open(&server.socket(), false);
    for client in [&mut first, &mut fourth] {
        assert_eq!(
            client.call(header(command::READ, 1, 0, 4), &[]).data,
            [0; 4]
        );
    }
}

#[test]
fn a_client_that_stops_inside_a_payload_or_takes_no_answer_is_cut_off() {
    let mut setup = Setup::default();
    setup.limits.stall_timeout = Duration::from_millis(200);
    let server = Running::start(setup);
    let mut idle = Client::open(&server.socket(), false);
    let mut half = Client::open(&server.socket(), false);
    half.send(header(command::WRITE, 1, 0, 1 << 20), &[1; 4000]);
    half.expect_closed();
    let mut deaf = Client::open(&server.socket(), false);
    for cookie in 0..32 {
        deaf.send(header(command::READ, cookie, 0, 1 << 20), &[]);
    }
    server.until("both are cut off", |server| {
        server.stats().connections_failed.get() == 2 && server.exports().0.lent() == 0
    });
    // Idle is not stalled, however long.
    assert_eq!(idle.call(header(command::READ, 1, 0, 4), &[]).data, [0; 4]);
}

fn with_runtime<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
        .block_on(future)
}

#[test]
fn a_unix_socket_is_private_and_replaces_only_a_dead_one() {
    with_runtime(async {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("nbd.sock");
        let listener = bind_unix(&path, 0o600).expect("first");
        let mode = std::fs::metadata(&path)
            .expect("socket")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            bind_unix(&path, 0o600),
            Err(BindError::InUse { .. })
        ));
        drop(listener);
        bind_unix(&path, 0o660).expect("a dead socket is replaced");
        let file = directory.path().join("data");
        std::fs::write(&file, b"precious").expect("file");
        assert!(matches!(
            bind_unix(&file, 0o600),
            Err(BindError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&file).expect("file"), b"precious");
    });
}

#[test]
fn tcp_off_loopback_needs_tls() {
    with_runtime(async {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            let address = address.parse().expect("address");
            let error = bind_tcp(address, &TlsPolicy::LoopbackOnly).await;
            assert!(
                matches!(error, Err(BindError::NeedsTls { .. })),
                "{error:?}"
            );
        }
        let address = "127.0.0.1:0".parse().expect("address");
        bind_tcp(address, &TlsPolicy::LoopbackOnly)
            .await
            .expect("loopback");
    });
}
