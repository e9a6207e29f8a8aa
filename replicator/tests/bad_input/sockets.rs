//! Ports and sockets that somebody else has, and socket files that nobody has any more.

use crate::support::{Nbd, Settings, blocking, two_nodes};
use crate::{refusal, says};
use holdfast_replicator::control::client::Client;
use holdfast_replicator_core::api::Command;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;

#[tokio::test]
async fn a_port_that_is_taken_is_named_and_nothing_is_started() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [node, _] = two_nodes(root.path());
    node.create(&settings);
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = tcp.local_addr().unwrap();
    let before = node.on_disk(settings.size);

    let mut config = node.config(&settings, None);
    config.node.link_listen = vec![udp.local_addr().unwrap()];
    let text = refusal(config).await;
    says(
        &text,
        &[
            "cannot listen for other nodes on",
            &udp.local_addr().unwrap().to_string(),
            "Nothing was started",
            "node.link_listen",
        ],
    );

    let mut config = node.config(&settings, None);
    config.nbd.tcp = Some(taken);
    let text = refusal(config).await;
    says(
        &text,
        &[
            "cannot listen for clients on",
            &taken.to_string(),
            "nothing was changed",
            "free it, or listen on another one",
        ],
    );

    let mut config = node.config(&settings, None);
    config.node.metrics = Some(taken);
    let text = refusal(config).await;
    says(
        &text,
        &[
            "metrics cannot be served on",
            &taken.to_string(),
            "Nothing was started",
            "set node.metrics to another address",
        ],
    );
    assert_eq!(node.on_disk(settings.size), before);
}

#[tokio::test]
async fn a_socket_file_that_nobody_answers_on_is_replaced_and_a_live_one_is_not() {
    let root = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let [mut node, _] = two_nodes(root.path());
    node.create(&settings);
    let control = node.dir.join("control.sock");
    let nbd = node.dir.join("nbd.sock");

    let live = UnixListener::bind(&control).unwrap();
    let text = refusal(node.config(&settings, None)).await;
    says(
        &text,
        &[
            "already answers on",
            "control.sock",
            "left alone",
            "nothing was started",
            "Stop it first",
        ],
    );
    assert!(live.local_addr().is_ok() && control.exists());
    // A listener that is gone leaves its file.
    drop(live);
    assert!(control.exists());

    let live = UnixListener::bind(&nbd).unwrap();
    let text = refusal(node.config(&settings, None)).await;
    says(
        &text,
        &[
            "another process answers on the socket",
            "nbd.sock",
            "left alone",
            "choose another path",
        ],
    );
    drop(live);
    assert!(nbd.exists());

    node.start(&settings, None).await;
    node.command(Command::Promote { force: true })
        .await
        .unwrap();
    let path = nbd.clone();
    blocking(move || {
        assert!(Client::connect(&control).is_ok());
        Nbd::open(&path, "data").unwrap().write(0, &[1; 512], true)
    })
    .await
    .unwrap();
    node.stop().await;

    // What is no socket at all is nobody's to remove.
    std::fs::remove_file(&nbd).unwrap();
    std::fs::write(&nbd, "notes").unwrap();
    let text = refusal(node.config(&settings, None)).await;
    says(&text, &["nbd.sock", "is not a socket", "left alone"]);
    assert_eq!(std::fs::read_to_string(&nbd).unwrap(), "notes");
}
