//! The dialing side: one path after the other until one works, and the next at once when it dies.

use crate::api::{LinkEvent, LinkHandler, Path};
use crate::backoff::Backoff;
use crate::connection::{self, Context};
use crate::link::{PeerLink, report};
use crate::quic::Connection;
use crate::session::connection_error;
use crate::tls::{self, ALPN_REPLICATION, Expect, SERVER_NAME};
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// A connection that lived this long was a good one: after it, attempts begin without a pause.
const GOOD: Duration = Duration::from_secs(2);

pub(crate) async fn run<H: LinkHandler>(context: Context<H>, peer: Rc<PeerLink>) {
    let shared = &context.shared;
    let mut changed = peer.changed.subscribe();
    let mut backoff = Backoff::new();
    let (mut next, mut failures) = (0usize, 0usize);
    loop {
        changed.borrow_and_update();
        if shared.down.get() || shared.peer_store.get(peer.id).is_none() {
            return;
        }
        let paths = shared.paths(&peer);
        if !peer.wants_any() || paths.is_empty() {
            if paths.is_empty() {
                let reason =
                    "no address of this node is known: set its paths, or join again".to_owned();
                failed(&context, &peer, "none", reason);
            }
            // The sender lives in the peer itself.
            let _ = changed.changed().await;
            continue;
        }
        let path = paths[next % paths.len()];
        let outcome = attempt(&context, &peer, &path).await;
        match outcome {
            Ok(connection) => {
                let since = Instant::now();
                let on_purpose =
                    connection::run(&context, &peer, connection, path.to_string()).await;
                if on_purpose && !peer.wants_any() {
                    continue;
                }
                if since.elapsed() >= GOOD {
                    backoff.reset();
                    failures = 0;
                    next += 1;
                    continue;
                }
            }
            Err(reason) => failed(&context, &peer, &path.to_string(), reason),
        }
        next += 1;
        failures += 1;
        if failures % paths.len() == 0 {
            // Every path was tried: pause, unless something changes from here on.
            changed.borrow_and_update();
            tokio::select! {
                () = sleep(backoff.pause(&shared.jitter)) => {}
                _ = changed.changed() => {}
            }
        }
    }
}

fn failed<H: LinkHandler>(context: &Context<H>, peer: &PeerLink, path: &str, reason: String) {
    *peer.last_failure.borrow_mut() = Some(format!("{path}: {reason}"));
    report(
        &*context.handler,
        LinkEvent::PathFailed {
            peer: peer.id,
            path: path.to_owned(),
            reason,
        },
    );
}

async fn attempt<H: LinkHandler>(
    context: &Context<H>,
    peer: &PeerLink,
    path: &Path,
) -> Result<Connection, String> {
    let shared = &context.shared;
    let endpoint = shared
        .endpoint_for(path)
        .map_err(|e| format!("cannot send from this address: {e}"))?;
    let mut config = tls::client(
        &shared.identity,
        &shared.peer_store,
        Expect::Peer(peer.id),
        ALPN_REPLICATION,
    )
    .map_err(|e| e.to_string())?;
    config.transport_config(shared.transport(path.local, path.remote));
    let connection = endpoint
        .connect(config, path.remote, SERVER_NAME)
        .map_err(|e| e.to_string())?;
    match timeout(shared.tuning.attempt, connection.established()).await {
        Ok(Ok(())) => Ok(connection),
        Ok(Err(e)) => Err(connection_error(&e)),
        Err(_) => Err(format!(
            "no answer within {} ms",
            shared.tuning.attempt.as_millis()
        )),
    }
}
