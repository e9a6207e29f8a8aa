//! What is wrong from outside: configuration, devices, metadata, certificates, sockets, peers. Each test shows what a person is
//! told (what happened, to what, what was kept safe, what to do), and that nothing else happened.

mod devices;
mod metadata;
mod peers;
mod rogue;
mod sockets;
#[allow(dead_code)] // shared with `nodes`, which uses the rest
#[path = "../nodes/support.rs"]
mod support;
mod wire;

use support::TestNode;

/// Each of the parts stands in the text.
#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

/// The event log's lines of this node.
fn events(node: &TestNode) -> Vec<String> {
    use holdfast_replicator::control::node::Node as _;
    let (events, _) = node.replicator.as_ref().unwrap().handle().events();
    let line = |event: &holdfast_replicator::control::protocol::EventReport| {
        format!("{}: {}", event.kind, event.text)
    };
    events.iter().map(line).collect()
}

/// Waits for an event of that kind that has all parts in its text.
async fn event(node: &TestNode, kind: &str, parts: &[&str]) -> String {
    let start = std::time::Instant::now();
    loop {
        let found = events(node).into_iter().find(|line| {
            line.starts_with(&format!("{kind}: ")) && parts.iter().all(|part| line.contains(part))
        });
        if let Some(line) = found {
            return line;
        }
        assert!(
            start.elapsed() < std::time::Duration::from_secs(20),
            "{} has no {kind} with {parts:?}: {:#?}",
            node.name,
            events(node)
        );
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Why a replicator with this configuration does not start.
async fn refusal(config: holdfast_replicator::config::Config) -> String {
    match holdfast_replicator::process::Replicator::start(config).await {
        Ok(_) => panic!("it must not start"),
        Err(error) => error.to_string(),
    }
}
