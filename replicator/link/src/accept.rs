//! The accepting side: strangers are refused in the handshake, peers get their connection served.

use crate::api::{LinkEvent, LinkHandler, code_to};
use crate::connection::{self, Context};
use crate::link::report;
use crate::session::connection_error;
use crate::tls;
use holdfast_wire_format::frame::GoodbyeCode;
use quinn::{Endpoint, Incoming};
use std::cell::Cell;
use std::rc::Rc;
use tokio::time::timeout;

/// Handshakes under way from which on callers must first prove that they own their address.
const TRUSTING: usize = 16;

pub(crate) async fn run<H: LinkHandler>(context: Context<H>, endpoint: Endpoint) {
    let under_way = Rc::new(Cell::new(0));
    while let Some(incoming) = endpoint.accept().await {
        if context.shared.down.get() {
            incoming.refuse();
            continue;
        }
        if under_way.get() >= TRUSTING
            && !incoming.remote_address_validated()
            && incoming.may_retry()
        {
            let _ = incoming.retry();
            continue;
        }
        let (context, under_way) = (context.clone(), under_way.clone());
        tokio::task::spawn_local(async move {
            under_way.set(under_way.get() + 1);
            let remote = incoming.remote_address();
            let connected = handshake(&context, incoming).await;
            under_way.set(under_way.get() - 1);
            match connected {
                Ok((connection, peer)) => {
                    connection::run(&context, &peer, connection, remote.to_string()).await;
                }
                Err(reason) => {
                    report(
                        &*context.handler,
                        LinkEvent::CallerRefused { remote, reason },
                    );
                }
            }
        });
    }
}

async fn handshake<H: LinkHandler>(
    context: &Context<H>,
    incoming: Incoming,
) -> Result<(quinn::Connection, Rc<crate::link::PeerLink>), String> {
    let server = context.shared.server(incoming.remote_address());
    let accepted = async { incoming.accept_with(server)?.await };
    let connection = match timeout(2 * context.shared.tuning.attempt, accepted).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(e)) => return Err(connection_error(&e)),
        Err(_) => return Err("it began a handshake and did not finish it".into()),
    };
    let refuse = |reason: String| {
        connection.close(code_to(GoodbyeCode::Refused), reason.as_bytes());
        Err(reason)
    };
    // The pin was there in the handshake; it may have been removed since.
    let known = tls::remote_fingerprint(&connection)
        .and_then(|print| context.shared.peer_store.by_fingerprint(print));
    let Some(known) = known else {
        return refuse("this node has just forgotten the caller".into());
    };
    let Some(peer) = context.shared.peer(known.id) else {
        return refuse("this node has just forgotten the caller".into());
    };
    if peer.dials || known.id == context.shared.identity.id() {
        return refuse(format!(
            "node {} waits to be dialed: its id is the larger one",
            known.name
        ));
    }
    Ok((connection, peer))
}
