//! How two nodes come to trust each other: the joining node brings a token that the other one made.
//!
//! The joining node knows the certificate of the other from the token and proves that it holds the token's secret by a
//! signature over this TLS session, both certificates and what it says about itself. docs/link.md argues why that is enough.

use crate::error::LinkError;
use crate::files::HexId;
use crate::identity::{Fingerprint, Identity, check_name};
use crate::peers::{MAX_ADDRESSES, Peer, PeerStore};
use crate::quic::socket;
use crate::tls::{self, ALPN_JOIN, Expect, SERVER_NAME};
use crate::token::{Consumed, Token, TokenStore, verify};
use crate::tuning::Tuning;
use quinn::{Connection, Endpoint, RecvStream, SendStream, TokioRuntime, VarInt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

/// Longest message in bytes.
const MAX_MESSAGE: usize = 16 << 10;
/// One step of the conversation may take this long; it includes the other node's flush to disk.
const STEP: Duration = Duration::from_secs(5);
const EXPORTER_LABEL: &[u8] = b"EXPORTER-holdfast-join-1";
const SIGNATURE_DOMAIN: &[u8] = b"holdfast join 1\0";
const SIGNATURE_LENGTH: usize = 64;

/// What a node says about itself.
#[derive(Serialize, Deserialize, Debug)]
struct Introduction {
    node: HexId,
    name: String,
    addresses: Vec<SocketAddr>,
    fingerprints: Vec<Fingerprint>,
}

impl Introduction {
    fn of(identity: &Identity, addresses: &[SocketAddr]) -> Self {
        Introduction {
            node: HexId(identity.id()),
            name: identity.name().to_owned(),
            addresses: addresses.iter().copied().take(MAX_ADDRESSES).collect(),
            fingerprints: identity.fingerprints(),
        }
    }

    /// The peer it describes. `seen` is the certificate of this very connection: it is the one to pin, whatever else
    /// is claimed.
    fn into_peer(self, own: &Identity, seen: Fingerprint) -> Result<Peer, LinkError> {
        check_name(&self.name)?;
        if self.node.0 == own.id() || seen == own.fingerprint() {
            return Err(LinkError::Oneself);
        }
        let foreign = |what: &str| LinkError::JoinFailed(format!("the other node sent {what}"));
        if self.node.0.0 == 0 || self.addresses.len() > MAX_ADDRESSES {
            return Err(foreign("an unusable introduction"));
        }
        if self.name == own.name() {
            return Err(LinkError::NameTaken {
                name: self.name,
                known: own.id(),
                offered: self.node.0,
            });
        }
        let next = self
            .fingerprints
            .iter()
            .copied()
            .find(|print| *print != seen);
        let fingerprints = std::iter::once(seen).chain(next).collect();
        Ok(Peer {
            id: self.node.0,
            name: self.name,
            fingerprints,
            addresses: self.addresses,
        })
    }
}

#[derive(Serialize, Deserialize, Debug)]
struct Request {
    /// Public key of the token, in hex: which token it is.
    token: String,
    introduction: Introduction,
}

#[derive(Serialize, Deserialize, Debug)]
enum Reply {
    Welcome(Introduction),
    Refused(String),
}

/// Waits for nodes that bring a token. Exists only while a token is open; replication has ports of its own, which
/// never talk to strangers.
pub struct JoinServer {
    endpoint: Endpoint,
    identity: Arc<Identity>,
    peers: Arc<PeerStore>,
    tokens: TokenStore,
    own_addresses: Vec<SocketAddr>,
}

impl JoinServer {
    /// Listens on `listen` (UDP). `own_addresses` are where this node's replicator listens, for the peer to keep.
    pub fn bind(
        listen: SocketAddr,
        identity: Arc<Identity>,
        peers: Arc<PeerStore>,
        own_addresses: Vec<SocketAddr>,
    ) -> Result<Self, LinkError> {
        let mut server = tls::server(&identity, &peers, Expect::Joiner, ALPN_JOIN)?;
        let tuning = tuning();
        server
            .transport_config(tuning.transport(None))
            .max_incoming(32);
        let io = |source| LinkError::Listen {
            address: listen,
            source,
        };
        let socket = socket::bind(listen).map_err(io)?;
        let endpoint = Endpoint::new(
            tuning.endpoint(),
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(io)?;
        let tokens = TokenStore::new(identity.dir());
        Ok(JoinServer {
            endpoint,
            identity,
            peers,
            tokens,
            own_addresses,
        })
    }

    /// Address it listens on, with the port the system chose for port 0.
    pub fn local_address(&self) -> SocketAddr {
        self.endpoint
            .local_addr()
            .expect("a bound socket has an address")
    }

    /// Where the tokens of this server are kept.
    pub fn tokens(&self) -> &TokenStore {
        &self.tokens
    }

    /// Waits for the next node and lets it in or refuses it. The new peer is already durable. Callers are taken one at
    /// a time, each for at most 15 s. `None` after [`Self::close`].
    pub async fn next(&self) -> Option<Result<Peer, LinkError>> {
        loop {
            let incoming = self.endpoint.accept().await?;
            // A forged source address costs us one packet, and never the place of a real caller.
            if !incoming.remote_address_validated() && incoming.may_retry() {
                let _ = incoming.retry();
                continue;
            }
            let remote = incoming.remote_address();
            let failed = |e: String| LinkError::JoinFailed(format!("the caller at {remote}: {e}"));
            let connection = match timeout(STEP, async { incoming.accept()?.await }).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(e)) => return Some(Err(failed(e.to_string()))),
                Err(_) => return Some(Err(failed("no answer".into()))),
            };
            let result = timeout(2 * STEP, self.converse(&connection)).await;
            connection.close(VarInt::from_u32(0), b"");
            return Some(result.unwrap_or_else(|_| Err(failed("no answer".into()))));
        }
    }

    async fn converse(&self, connection: &Connection) -> Result<Peer, LinkError> {
        let failed = |e: String| {
            LinkError::JoinFailed(format!(
                "the caller at {}: {e}",
                connection.remote_address()
            ))
        };
        let (mut send, mut recv) = connection
            .accept_bi()
            .await
            .map_err(|e| failed(e.to_string()))?;
        let body = receive_bytes(&mut recv).await.map_err(failed)?;
        let mut signature = [0; SIGNATURE_LENGTH];
        recv.read_exact(&mut signature)
            .await
            .map_err(|e| failed(e.to_string()))?;
        let seen = tls::fingerprint(connection.peer_identity())
            .ok_or_else(|| failed("no certificate".into()))?;
        let message =
            signed_message(connection, seen, self.identity.fingerprint(), &body).map_err(failed)?;
        let decided = self.decide(&body, &message, &signature, seen).await;
        let reply = match &decided {
            Ok(_) => Reply::Welcome(Introduction::of(&self.identity, &self.own_addresses)),
            Err(e) => Reply::Refused(e.to_string()),
        };
        let sent = send_message(&mut send, &reply).await;
        // The caller has the answer when the stream is acknowledged.
        if sent.is_ok() && send.finish().is_ok() {
            let _ = timeout(STEP, send.stopped()).await;
        }
        decided
    }

    async fn decide(
        &self,
        body: &[u8],
        message: &[u8],
        signature: &[u8],
        seen: Fingerprint,
    ) -> Result<Peer, LinkError> {
        let refused = |why: &str| LinkError::JoinFailed(why.into());
        let request: Request = serde_json::from_slice(body)
            .map_err(|e| refused(&format!("the request can't be read: {e}")))?;
        let public_key = crate::files::unhex::<32>(&request.token)
            .ok_or_else(|| refused("the request can't be read: no token"))?;
        // Before the token is looked up: who can't sign learns nothing about which tokens are open.
        if !verify(&public_key, message, signature) {
            return Err(refused("the proof of the token's secret is wrong"));
        }
        let peer = request.introduction.into_peer(&self.identity, seen)?;
        // Before the token is used up: a name to change must not cost a new token.
        self.peers.check(&peer)?;
        let (tokens, peers, stored) = (self.tokens.clone(), self.peers.clone(), peer.clone());
        let consumed = tokio::task::spawn_blocking(move || {
            let consumed = tokens.consume(&public_key, SystemTime::now())?;
            if consumed == Consumed::Yes {
                peers.insert(stored)?;
            }
            Ok::<_, LinkError>(consumed)
        })
        .await
        .expect("the task does not panic")?;
        match consumed {
            Consumed::Yes => Ok(peer),
            Consumed::Expired => Err(refused(
                "the token has expired; make a new one with `holdfast token`",
            )),
            Consumed::Unknown => Err(refused(
                "the token is unknown here or was used before; make a new one with `holdfast token`",
            )),
        }
    }

    /// Stops listening. A conversation under way is broken off.
    pub fn close(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"");
    }
}

/// A few short messages: packets of the size that every path carries.
fn tuning() -> Tuning {
    Tuning {
        silence: STEP,
        udp_payload: 1200,
        ..Tuning::default()
    }
}

/// Joins the node that made `token`: both durably pin each other. `own_addresses` are where this node's replicator
/// listens. Tries each address of the token, 5 s each.
///
/// # Errors
/// No address answers; another certificate answers; the other node refuses; the peer can't be stored. If the very last step
/// fails the other node knows this one already; joining again with a new token repairs that.
pub async fn join(
    identity: &Arc<Identity>,
    peers: &Arc<PeerStore>,
    token: &Token,
    own_addresses: &[SocketAddr],
) -> Result<Peer, LinkError> {
    let mut failures = Vec::new();
    for address in &token.addresses {
        match timeout(STEP, connect(identity, peers, token, *address)).await {
            Ok(Ok((endpoint, connection))) => {
                let result = timeout(
                    3 * STEP,
                    introduce(identity, peers, token, own_addresses, &connection),
                )
                .await
                .unwrap_or_else(|_| {
                    Err(LinkError::JoinFailed(format!(
                        "{address} stopped answering"
                    )))
                });
                connection.close(VarInt::from_u32(0), b"");
                let _ = timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
                return result;
            }
            Ok(Err(e)) => failures.push(format!("{address}: {e}")),
            Err(_) => failures.push(format!("{address}: no answer within {} s", STEP.as_secs())),
        }
    }
    Err(LinkError::JoinFailed(failures.join("; ")))
}

async fn connect(
    identity: &Arc<Identity>,
    peers: &Arc<PeerStore>,
    token: &Token,
    address: SocketAddr,
) -> Result<(Endpoint, Connection), LinkError> {
    let failed = |e: String| LinkError::JoinFailed(e);
    let local: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let io = |source| LinkError::Listen {
        address: local,
        source,
    };
    let tuning = tuning();
    let socket = socket::bind(local).map_err(io)?;
    let endpoint =
        Endpoint::new(tuning.endpoint(), None, socket, Arc::new(TokioRuntime)).map_err(io)?;
    let mut config = tls::client(
        identity,
        peers,
        Expect::Exactly(token.fingerprint),
        ALPN_JOIN,
    )?;
    config.transport_config(tuning.transport(None));
    let connection = endpoint
        .connect_with(config, address, SERVER_NAME)
        .map_err(|e| failed(e.to_string()))?
        .await
        .map_err(|e| failed(e.to_string()))?;
    Ok((endpoint, connection))
}

async fn introduce(
    identity: &Arc<Identity>,
    peers: &Arc<PeerStore>,
    token: &Token,
    own_addresses: &[SocketAddr],
    connection: &Connection,
) -> Result<Peer, LinkError> {
    let failed = |e: String| LinkError::JoinFailed(e);
    let (mut send, mut recv) = connection
        .open_bi()
        .await
        .map_err(|e| failed(e.to_string()))?;
    let request = Request {
        token: crate::files::hex(&token.public_key()),
        introduction: Introduction::of(identity, own_addresses),
    };
    let body = serde_json::to_vec(&request).expect("plain values");
    let message = signed_message(connection, identity.fingerprint(), token.fingerprint, &body)
        .map_err(failed)?;
    send_bytes(&mut send, &body).await.map_err(failed)?;
    send.write_all(&token.sign(&message))
        .await
        .map_err(|e| failed(e.to_string()))?;
    let _ = send.finish();
    let reply: Reply = receive_message(&mut recv).await.map_err(failed)?;
    match reply {
        Reply::Refused(why) => Err(LinkError::JoinRefused(why)),
        Reply::Welcome(introduction) => {
            let peer = introduction.into_peer(identity, token.fingerprint)?;
            let (peers, stored) = (peers.clone(), peer.clone());
            tokio::task::spawn_blocking(move || peers.insert(stored))
                .await
                .expect("the task does not panic")?;
            Ok(peer)
        }
    }
}

/// What the token's key signs. The exporter ties it to this TLS session, but is fixed before the client's certificate is
/// sent, so both fingerprints stand beside it.
fn signed_message(
    connection: &Connection,
    joiner: Fingerprint,
    server: Fingerprint,
    body: &[u8],
) -> Result<Vec<u8>, String> {
    let mut exported = [0; 32];
    connection
        .export_keying_material(&mut exported, EXPORTER_LABEL, b"")
        .map_err(|_| "TLS gives no keying material".to_owned())?;
    Ok([SIGNATURE_DOMAIN, &exported, &joiner.0, &server.0, body].concat())
}

async fn send_message<T: Serialize>(send: &mut SendStream, message: &T) -> Result<(), String> {
    send_bytes(send, &serde_json::to_vec(message).expect("plain values")).await
}

async fn send_bytes(send: &mut SendStream, bytes: &[u8]) -> Result<(), String> {
    let length = u32::try_from(bytes.len()).expect("messages are short");
    let framed = [&length.to_be_bytes(), bytes].concat();
    send.write_all(&framed).await.map_err(|e| e.to_string())
}

async fn receive_message<T: DeserializeOwned>(recv: &mut RecvStream) -> Result<T, String> {
    serde_json::from_slice(&receive_bytes(recv).await?).map_err(|e| e.to_string())
}

async fn receive_bytes(recv: &mut RecvStream) -> Result<Vec<u8>, String> {
    let mut length = [0; 4];
    recv.read_exact(&mut length)
        .await
        .map_err(|e| e.to_string())?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(format!("a message of {length} bytes is too long"));
    }
    let mut bytes = vec![0; length];
    recv.read_exact(&mut bytes)
        .await
        .map_err(|e| e.to_string())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::TOKEN_LIFETIME;

    fn node(name: &str) -> (tempfile::TempDir, Arc<Identity>, Arc<PeerStore>) {
        let dir = tempfile::tempdir().unwrap();
        let identity = Arc::new(Identity::init(dir.path(), name).unwrap());
        let peers = Arc::new(PeerStore::load(dir.path()).unwrap());
        (dir, identity, peers)
    }

    /// Says hello with the public key of `token` and the signature that `sign` makes of the right message.
    async fn present(
        server: &JoinServer,
        identity: &Arc<Identity>,
        peers: &Arc<PeerStore>,
        token: &Token,
        sign: impl FnOnce(Vec<u8>) -> [u8; 64],
    ) -> (Result<Peer, LinkError>, Reply) {
        let caller = async {
            let (_endpoint, connection) = connect(identity, peers, token, token.addresses[0])
                .await
                .unwrap();
            let request = Request {
                token: crate::files::hex(&token.public_key()),
                introduction: Introduction::of(identity, &[]),
            };
            let body = serde_json::to_vec(&request).unwrap();
            let message = signed_message(
                &connection,
                identity.fingerprint(),
                token.fingerprint,
                &body,
            )
            .unwrap();
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send_bytes(&mut send, &body).await.unwrap();
            send.write_all(&sign(message)).await.unwrap();
            receive_message(&mut recv).await.unwrap()
        };
        let (decided, reply) = tokio::join!(server.next(), caller);
        (decided.unwrap(), reply)
    }

    /// Knowing which token is open is not enough: the signature must be by its key, over this session and this caller.
    #[tokio::test]
    async fn the_public_key_of_a_token_proves_nothing() {
        let (_a, a, a_peers) = node("alpha");
        let (_b, b, b_peers) = node("beta");
        let server = JoinServer::bind(
            "127.0.0.1:0".parse().unwrap(),
            a.clone(),
            a_peers.clone(),
            vec![],
        )
        .unwrap();
        let make = || {
            let addresses = vec![server.local_address()];
            server
                .tokens()
                .create(
                    addresses,
                    a.fingerprint(),
                    TOKEN_LIFETIME,
                    SystemTime::now(),
                )
                .unwrap()
        };
        let (token, other) = (make(), make());
        let earlier = std::cell::RefCell::new(Vec::new());
        let (decided, reply) = present(&server, &b, &b_peers, &token, |message| {
            *earlier.borrow_mut() = message.clone();
            other.sign(&message)
        })
        .await;
        assert!(
            decided.is_err() && matches!(&reply, Reply::Refused(why) if why.contains("proof")),
            "{reply:?}"
        );
        // Signed by the right key, but for the session before.
        let (decided, _) = present(&server, &b, &b_peers, &token, |_| {
            token.sign(&earlier.borrow())
        })
        .await;
        assert!(decided.is_err());
        // For this session, but another caller's certificate.
        let (decided, _) = present(&server, &b, &b_peers, &token, |mut message| {
            message[SIGNATURE_DOMAIN.len() + 32] ^= 1;
            token.sign(&message)
        })
        .await;
        assert!(decided.is_err());
        assert!(a_peers.all().is_empty());
        assert_eq!(
            server.tokens().open(SystemTime::now()).unwrap(),
            2,
            "no token was used up"
        );
        let (decided, _) = present(&server, &b, &b_peers, &token, |message| {
            token.sign(&message)
        })
        .await;
        assert_eq!(decided.unwrap().id, b.id());
    }
}
