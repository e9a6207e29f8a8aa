//! One connection to one peer, from its first words to its end: control messages, and the streams of services.

use crate::api::{LinkEvent, LinkHandler, code_to};
use crate::backoff::Backoff;
use crate::control::{self, Message, OLDEST, VERSION};
use crate::drive;
use crate::identity::{Fingerprint, Identity};
use crate::link::{Current, PeerLink, Shared, report};
use crate::peers::MAX_FINGERPRINTS;
use crate::quic::{Connection, RecvStream, SendStream};
use crate::session::{self, Session, connection_error};
use crate::tls;
use holdfast_wire_format::frame::GoodbyeCode;
use holdfast_wire_format::ids::Uuid;
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};

/// A stream that lived this long was a good one: after it, a new one is asked for without a pause.
const GOOD: Duration = Duration::from_secs(2);

/// Answers to control messages of one peer that may wait to be sent.
const REPLIES: usize = 4;

/// What every task of a link holds.
pub(crate) struct Context<H> {
    pub shared: Rc<Shared>,
    pub handler: Rc<H>,
}

impl<H> Clone for Context<H> {
    fn clone(&self) -> Self {
        Context {
            shared: self.shared.clone(),
            handler: self.handler.clone(),
        }
    }
}

pub(crate) fn hello(identity: &Identity) -> Message {
    Message::Hello {
        newest: VERSION,
        oldest: OLDEST,
        fingerprints: identity.fingerprints(),
    }
}

/// Serves the connection until it ends. True if this side ended it.
pub(crate) async fn run<H: LinkHandler>(
    context: &Context<H>,
    peer: &Rc<PeerLink>,
    connection: Connection,
    path: String,
) -> bool {
    let shared = &context.shared;
    shared.connections.set(shared.connections.get() + 1);
    let on_purpose = match first_words(context, peer, &connection).await {
        Ok((send, recv)) => serve(context, peer, &connection, &path, send, recv).await,
        Err(reason) => {
            connection.close(code_to(GoodbyeCode::Refused), reason.as_bytes());
            *peer.last_failure.borrow_mut() = Some(format!("{path}: {reason}"));
            report(
                &*context.handler,
                LinkEvent::PathFailed {
                    peer: peer.id,
                    path,
                    reason,
                },
            );
            false
        }
    };
    shared.connections.set(shared.connections.get() - 1);
    shared.ended.send_modify(|count| *count += 1);
    on_purpose
}

/// Both sides say hello; only then is the connection up. In TLS 1.3 the dialing side learns only by this that its
/// certificate was accepted.
async fn first_words<H: LinkHandler>(
    context: &Context<H>,
    peer: &PeerLink,
    connection: &Connection,
) -> Result<(SendStream, RecvStream), String> {
    let why = |e: String| {
        connection
            .close_reason()
            .map_or(e, |closed| connection_error(&closed))
    };
    let words = async {
        let mut send = connection
            .open_uni()
            .await
            .map_err(|e| connection_error(&e))?;
        control::send(&mut send, &hello(&context.shared.identity))
            .await
            .map_err(why)?;
        let mut recv = connection
            .accept_uni()
            .await
            .map_err(|e| connection_error(&e))?;
        let message = control::receive(&mut recv).await.map_err(why)?;
        Ok::<_, String>((send, recv, message))
    };
    let limit = 2 * context.shared.tuning.attempt;
    let (mut send, recv, message) = timeout(limit, words)
        .await
        .map_err(|_| "connected, but it did not say hello".to_owned())??;
    let Message::Hello { newest, oldest, .. } = &message else {
        return Err("it did not begin with hello".into());
    };
    control::common_version(*oldest, *newest)?;
    if let Some(reply) = heed(context, peer, connection, message).await {
        control::send(&mut send, &reply).await.map_err(why)?;
    }
    Ok((send, recv))
}

/// Does what a control message asks for; perhaps there is something to answer.
async fn heed<H: LinkHandler>(
    context: &Context<H>,
    peer: &PeerLink,
    connection: &Connection,
    message: Message,
) -> Option<Message> {
    match message {
        Message::Hello { fingerprints, .. } => {
            let used = tls::fingerprint(connection.peer_identity())?;
            pin(&context.shared, peer.id, used, fingerprints).await
        }
        Message::Pinned { fingerprints } => {
            let (identity, id) = (context.shared.identity.clone(), peer.id);
            let stored =
                tokio::task::spawn_blocking(move || identity.confirmed(id, &fingerprints)).await;
            if let Ok(Err(e)) = stored {
                tracing::warn!(peer = %peer.id, "cannot record that the peer accepts the next certificate: {e}");
            }
            None
        }
        Message::Wanted { service } => {
            tracing::debug!(peer = %peer.id, service = %service.0, "the peer wants this service now");
            peer.bump();
            None
        }
        Message::FactsWanted { service, number } => {
            let facts = context.handler.facts(peer.id, service.0);
            Some(crate::facts::told(number, facts))
        }
        Message::Facts { number, facts } => {
            peer.questions.answered(number, facts);
            None
        }
    }
}

/// The peer says which certificates are its own: exactly those are pinned from now on, and always the one it uses here.
async fn pin(
    shared: &Shared,
    peer: Uuid,
    used: Fingerprint,
    announced: Vec<Fingerprint>,
) -> Option<Message> {
    let mut fingerprints = vec![used];
    for print in announced {
        if !fingerprints.contains(&print) && fingerprints.len() < MAX_FINGERPRINTS {
            fingerprints.push(print);
        }
    }
    let known = shared.peer_store.get(peer)?;
    let same = known.fingerprints.len() == fingerprints.len()
        && fingerprints
            .iter()
            .all(|print| known.fingerprints.contains(print));
    if !same {
        let (store, pinned) = (shared.peer_store.clone(), fingerprints.clone());
        let stored =
            tokio::task::spawn_blocking(move || store.set_fingerprints(peer, pinned)).await;
        match stored {
            Ok(Ok(())) => {
                tracing::info!(peer = %peer, name = known.name, "pinned the certificates it announced")
            }
            Ok(Err(e)) => {
                // Not confirmed: the peer goes on with the certificate that is pinned.
                tracing::warn!(peer = %peer, name = known.name, "cannot pin the certificate it announced: {e}");
                return None;
            }
            Err(_) => return None,
        }
    }
    Some(Message::Pinned { fingerprints })
}

async fn serve<H: LinkHandler>(
    context: &Context<H>,
    peer: &Rc<PeerLink>,
    connection: &Connection,
    path: &str,
    mut send: SendStream,
    mut recv: RecvStream,
) -> bool {
    let shared = &context.shared;
    let (messages, mut outgoing) = mpsc::unbounded_channel();
    let current = Current {
        connection: connection.clone(),
        path: path.to_owned(),
        messages: messages.clone(),
    };
    if let Some(old) = peer.connection.borrow_mut().replace(current) {
        // The peer dialed anew: it has given the old connection up.
        old.connection.close(
            code_to(GoodbyeCode::Again),
            b"replaced by a newer connection",
        );
    }
    if shared.down.get() {
        connection.close(code_to(GoodbyeCode::Shutdown), b"");
    }
    let mut changed = peer.changed.subscribe();
    // Questions wait for a connection.
    peer.bump();
    report(
        &*context.handler,
        LinkEvent::PeerUp {
            peer: peer.id,
            path: path.to_owned(),
        },
    );
    if !peer.dials {
        for service in peer.wanted() {
            let _ = messages.send(Message::Wanted {
                service: crate::files::HexId(service),
            });
        }
    }
    let open: Rc<RefCell<HashSet<Uuid>>> = Rc::default();
    let stream_ended = Rc::new(Notify::new());
    // A peer that asks and does not read is not read either.
    let (replies, mut replied) = mpsc::channel(REPLIES);
    let sending = async {
        loop {
            let message = tokio::select! {
                Some(message) = outgoing.recv() => message,
                Some(reply) = replied.recv() => reply,
                else => break,
            };
            if control::send(&mut send, &message).await.is_err() {
                break;
            }
        }
        std::future::pending::<String>().await
    };
    let receiving = async {
        loop {
            match control::receive(&mut recv).await {
                Ok(message) => {
                    if let Some(reply) = heed(context, peer, connection, message).await {
                        // Nobody takes it any more only when the connection ends.
                        let _ = replies.send(reply).await;
                    }
                }
                Err(reason) => return reason,
            }
        }
    };
    let streams = async {
        if peer.dials {
            loop {
                changed.borrow_and_update();
                for service in peer.wanted() {
                    if open.borrow_mut().insert(service) {
                        let (context, peer, connection) =
                            (context.clone(), peer.clone(), connection.clone());
                        let (path, open, stream_ended) =
                            (path.to_owned(), open.clone(), stream_ended.clone());
                        tokio::task::spawn_local(drive::stand_in(Box::pin(async move {
                            keep_open(&context, &peer, &connection, &path, service).await;
                            open.borrow_mut().remove(&service);
                            stream_ended.notify_one();
                        })));
                    }
                }
                if !peer.wants_any() && open.borrow().is_empty() && !shared.down.get() {
                    connection.close(code_to(GoodbyeCode::Disconnect), b"no service is wanted");
                }
                tokio::select! {
                    // The sender lives in the peer, which this function holds.
                    _ = changed.changed() => {}
                    () = stream_ended.notified() => {}
                }
            }
        }
        while let Ok((send, recv)) = connection.accept_bi().await {
            let (context, peer, path) = (context.clone(), peer.clone(), path.to_owned());
            tokio::task::spawn_local(drive::stand_in(Box::pin(async move {
                accept_stream(&context, &peer, &path, send, recv).await;
            })));
        }
        std::future::pending().await
    };
    let reason = tokio::select! {
        closed = connection.closed() => connection_error(&closed),
        reason = sending => reason,
        reason = receiving => {
            // The stream of messages ends only with the connection, or by a peer that breaks the rules.
            connection.close(code_to(GoodbyeCode::BadFrame), reason.as_bytes());
            connection.close_reason().map_or(reason, |closed| connection_error(&closed))
        }
        () = streams => "closed by this node".into(),
    };
    let mut slot = peer.connection.borrow_mut();
    if slot
        .as_ref()
        .is_some_and(|current| current.connection.is(connection))
    {
        *slot = None;
    }
    drop(slot);
    *peer.last_failure.borrow_mut() = Some(format!("{path}: {reason}"));
    report(
        &*context.handler,
        LinkEvent::PeerDown {
            peer: peer.id,
            path: path.to_owned(),
            reason,
        },
    );
    matches!(
        connection.close_reason(),
        Some(quinn::ConnectionError::LocallyClosed)
    )
}

/// The dialing side of one service: opens its stream, again and again, while it is wanted and the connection lives.
async fn keep_open<H: LinkHandler>(
    context: &Context<H>,
    peer: &PeerLink,
    connection: &Connection,
    path: &str,
    service: Uuid,
) {
    let mut changed = peer.changed.subscribe();
    let mut backoff = Backoff::new();
    let mut told = None;
    while peer.wants(service) && connection.close_reason().is_none() {
        changed.borrow_and_update();
        let asking = async {
            let (mut send, mut recv) = connection
                .open_bi()
                .await
                .map_err(|e| connection_error(&e))?;
            let answer = control::ask(&mut send, &mut recv, service).await?;
            Ok::<_, String>(answer.map(|()| (send, recv)))
        };
        let refusal = match timeout(2 * context.shared.tuning.attempt, asking).await {
            Ok(Ok(Ok((send, recv)))) => {
                told = None;
                let since = Instant::now();
                run_session(context, peer.id, service, path, send, recv).await;
                if since.elapsed() >= GOOD {
                    backoff.reset();
                    continue;
                }
                None
            }
            Ok(Ok(Err(reason))) => Some(reason),
            Ok(Err(reason)) => Some(reason),
            Err(_) => Some("no answer to the opening of the stream".into()),
        };
        if connection.close_reason().is_some() {
            return;
        }
        if let Some(reason) = refusal
            && told.as_ref() != Some(&reason)
        {
            told = Some(reason.clone());
            report(
                &*context.handler,
                LinkEvent::ServiceRefused {
                    peer: peer.id,
                    service,
                    reason,
                },
            );
        }
        tokio::select! {
            () = sleep(backoff.pause(&context.shared.jitter)) => {}
            _ = changed.changed() => {}
            _ = connection.closed() => return,
        }
    }
}

/// The accepting side of one service.
async fn accept_stream<H: LinkHandler>(
    context: &Context<H>,
    peer: &PeerLink,
    path: &str,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let limit = 2 * context.shared.tuning.attempt;
    let service = match timeout(limit, control::asked(&mut recv)).await {
        Ok(Ok(service)) => service,
        Ok(Err(reason)) => {
            tracing::warn!(peer = %peer.id, "stream refused: {reason}");
            let _ = send.reset(code_to(GoodbyeCode::BadFrame));
            return;
        }
        Err(_) => return,
    };
    // The handler is asked first: a service that it does not know is never wanted either, and it should hear of it.
    let decision = context.handler.accept(peer.id, service).and_then(|()| {
        if peer.wants(service) {
            Ok(())
        } else {
            Err("this service is not connected there now".to_owned())
        }
    });
    let answer = decision.as_ref().copied().map_err(String::as_str);
    if timeout(limit, control::answer(&mut send, answer))
        .await
        .is_err()
    {
        return;
    }
    match decision {
        Ok(()) => run_session(context, peer.id, service, path, send, recv).await,
        Err(_) => {
            let _ = send.finish();
        }
    }
}

async fn run_session<H: LinkHandler>(
    context: &Context<H>,
    peer: Uuid,
    service: Uuid,
    path: &str,
    send: SendStream,
    recv: RecvStream,
) {
    let shared = &context.shared;
    // One session at a time for each service and peer, and the old one's end is reported before the new one's beginning.
    let mut ended = shared.ended.subscribe();
    while let Some(old) = shared.session_of(peer, service) {
        old.close(GoodbyeCode::Again, "replaced by a newer stream".into());
        if ended.changed().await.is_err() {
            return;
        }
    }
    if shared.down.get() {
        return;
    }
    let session = Session::new(shared.next_session(), peer, service, send);
    shared
        .sessions
        .borrow_mut()
        .insert(session.id, session.clone());
    report(
        &*context.handler,
        LinkEvent::StreamUp {
            peer,
            service,
            session: session.id,
            path: path.to_owned(),
        },
    );
    let ending = session::run(&session, &*context.handler, recv).await;
    shared.session_ended(session.id);
    let session::Ending {
        code,
        by_peer,
        reason,
    } = ending;
    let name = shared
        .peer_store
        .get(peer)
        .map_or_else(|| peer.to_string(), |known| known.name);
    let reason = format!("stream to node {name} by {path}: {reason}");
    report(
        &*context.handler,
        LinkEvent::StreamDown {
            peer,
            service,
            session: session.id,
            code,
            by_peer,
            reason,
        },
    );
}
