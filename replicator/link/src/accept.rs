//! The accepting side: strangers are refused in the handshake, peers get their connection served.

use crate::api::{LinkEvent, LinkHandler, code_to};
use crate::connection::{self, Context};
use crate::link::report;
use crate::quic::{Connection, Endpoint};
use crate::session::connection_error;
use crate::tls;
use holdfast_wire_format::frame::GoodbyeCode;
use quinn::ConnectionError;
use std::cell::Cell;
use std::rc::Rc;
use tokio::time::timeout;

/// Handshakes under way from which on callers must first prove that they own their address.
const TRUSTING: usize = 16;

pub(crate) async fn run<H: LinkHandler>(context: Context<H>, endpoint: Endpoint) {
    let under_way = Rc::new(Cell::new(0));
    while let Some(incoming) = endpoint.accept().await {
        if context.shared.down.get() {
            endpoint.refuse(incoming);
            continue;
        }
        if under_way.get() >= TRUSTING
            && !incoming.remote_address_validated()
            && incoming.may_retry()
        {
            endpoint.retry(incoming);
            continue;
        }
        let remote = incoming.remote_address();
        let begun = endpoint.begin(incoming, context.shared.server(remote));
        let (context, under_way) = (context.clone(), under_way.clone());
        tokio::task::spawn_local(async move {
            under_way.set(under_way.get() + 1);
            let connected = handshake(&context, begun).await;
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
    begun: Result<Connection, ConnectionError>,
) -> Result<(Connection, Rc<crate::link::PeerLink>), String> {
    let connection = begun.map_err(|e| connection_error(&e))?;
    match timeout(2 * context.shared.tuning.attempt, connection.established()).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => return Err(connection_error(&e)),
        Err(_) => return Err("it began a handshake and did not finish it".into()),
    }
    let refuse = |reason: String| {
        connection.close(code_to(GoodbyeCode::Refused), reason.as_bytes());
        Err(reason)
    };
    // The pin was there in the handshake; it may have been removed since.
    let known = tls::fingerprint(connection.peer_identity())
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
