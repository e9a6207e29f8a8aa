//! Join, by everything that can be wrong with a token.

mod common;
use common::*;
use holdfast_link::*;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn server(node: &Node) -> JoinServer {
    let own = vec!["10.0.0.1:7789".parse().unwrap()];
    JoinServer::bind(
        "127.0.0.1:0".parse().unwrap(),
        node.identity.clone(),
        node.peers.clone(),
        own,
    )
    .unwrap()
}

fn token(node: &Node, server: &JoinServer, lifetime: Duration) -> Token {
    server
        .tokens()
        .create(
            vec![server.local_address()],
            node.identity.fingerprint(),
            lifetime,
            SystemTime::now(),
        )
        .unwrap()
}

async fn both(
    server: &JoinServer,
    node: &Node,
    token: &Token,
) -> (Result<Peer, LinkError>, Result<Peer, LinkError>) {
    let own = ["10.0.0.2:7789".parse().unwrap()];
    let (at_server, at_node) = tokio::join!(
        server.next(),
        join(&node.identity, &node.peers, token, &own)
    );
    (at_server.unwrap(), at_node)
}

#[test]
fn join_pins_both_ways_once() {
    run(async {
        let (a, b, c) = (Node::new("alpha"), Node::new("beta"), Node::new("gamma"));
        let server = server(&a);
        let token = token(&a, &server, TOKEN_LIFETIME);
        // As people carry it.
        let token: Token = token.to_string().parse().unwrap();
        let (at_a, at_b) = both(&server, &b, &token).await;
        let (at_a, at_b) = (at_a.unwrap(), at_b.unwrap());
        assert_eq!(
            (at_a.id, &at_a.name[..], at_a.fingerprints),
            (b.id(), "beta", b.identity.fingerprints())
        );
        assert_eq!(
            (at_b.id, &at_b.name[..], at_b.fingerprints),
            (a.id(), "alpha", a.identity.fingerprints())
        );
        assert_eq!(at_a.addresses, vec!["10.0.0.2:7789".parse().unwrap()]);
        assert_eq!(at_b.addresses, vec!["10.0.0.1:7789".parse().unwrap()]);
        // Durable on both sides.
        assert!(PeerStore::load(a.dir.path()).unwrap().get(b.id()).is_some());
        assert!(PeerStore::load(b.dir.path()).unwrap().get(a.id()).is_some());
        assert_eq!(server.tokens().open(SystemTime::now()).unwrap(), 0);
        // The same token again, for another node.
        let (at_a, at_c) = both(&server, &c, &token).await;
        assert!(at_a.is_err());
        let refused = at_c.unwrap_err().to_string();
        assert!(refused.contains("used before"), "{refused}");
        assert!(a.peers.get(c.id()).is_none() && c.peers.get(a.id()).is_none());
    });
}

#[test]
fn expired_tokens_are_refused() {
    run(async {
        let (a, b) = (Node::new("alpha"), Node::new("beta"));
        let server = server(&a);
        let token = token(&a, &server, Duration::ZERO);
        let (_, at_b) = both(&server, &b, &token).await;
        let refused = at_b.unwrap_err().to_string();
        assert!(refused.contains("expired"), "{refused}");
        assert!(a.peers.all().is_empty() && b.peers.all().is_empty());
    });
}

#[test]
fn a_wrong_secret_is_refused_and_costs_no_token() {
    run(async {
        let (a, b) = (Node::new("alpha"), Node::new("beta"));
        let server = server(&a);
        let good = token(&a, &server, TOKEN_LIFETIME);
        // Made by nobody: same addresses and certificate, another secret.
        let elsewhere = tempfile::tempdir().unwrap();
        let wrong = TokenStore::new(elsewhere.path())
            .create(
                good.addresses.clone(),
                good.fingerprint,
                TOKEN_LIFETIME,
                SystemTime::now(),
            )
            .unwrap();
        let (at_a, at_b) = both(&server, &b, &wrong).await;
        assert!(at_a.is_err());
        let refused = at_b.unwrap_err().to_string();
        assert!(refused.contains("unknown here"), "{refused}");
        assert!(a.peers.all().is_empty());
        let (at_a, at_b) = both(&server, &b, &good).await;
        assert!(at_a.is_ok() && at_b.is_ok());
    });
}

#[test]
fn another_node_at_the_address_is_refused_before_it_hears_anything() {
    run(async {
        let (a, b, thief) = (Node::new("alpha"), Node::new("beta"), Node::new("thief"));
        let (honest, dishonest) = (server(&a), server(&thief));
        let real = token(&a, &honest, TOKEN_LIFETIME);
        let mut redirected = real.clone();
        redirected.addresses = vec![dishonest.local_address()];
        let (at_thief, at_b) = both(&dishonest, &b, &redirected).await;
        assert!(at_thief.is_err());
        let refused = at_b.unwrap_err().to_string();
        assert!(
            refused.contains(&thief.identity.fingerprint().to_string())
                && refused.contains(&a.identity.fingerprint().to_string()),
            "{refused}"
        );
        assert!(b.peers.all().is_empty());
    });
}

#[test]
fn a_name_that_is_taken_costs_no_token() {
    run(async {
        let (a, b, same) = (Node::new("alpha"), Node::new("beta"), Node::new("alpha"));
        let server = server(&a);
        let token = token(&a, &server, TOKEN_LIFETIME);
        let (_, refused) = both(&server, &same, &token).await;
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("a node named alpha"),
            "says why"
        );
        assert_eq!(server.tokens().open(SystemTime::now()).unwrap(), 1);
        let (at_a, at_b) = both(&server, &b, &token).await;
        assert!(at_a.is_ok() && at_b.is_ok());
    });
}

#[test]
fn replication_and_join_do_not_mix() {
    run(async {
        let (a, b) = pair();
        // A token that leads to the replication port.
        let token = TokenStore::new(b.dir.path())
            .create(
                vec![b.address()],
                b.identity.fingerprint(),
                TOKEN_LIFETIME,
                SystemTime::now(),
            )
            .unwrap();
        let c = Node::new("gamma");
        assert!(join(&c.identity, &c.peers, &token, &[]).await.is_err());
        assert!(b.peers.get(c.id()).is_none());
        // A dialing replicator that meets the join port.
        let server = Arc::new(server(&b));
        a.link()
            .set_paths(b.id(), vec![server.local_address().into()])
            .unwrap();
        a.link().connect(b.id(), SERVICE).unwrap();
        let (result, ()) = tokio::join!(
            server.next(),
            a.wait(|event| match event {
                LinkEvent::PathFailed { .. } => Some(()),
                LinkEvent::PeerUp { .. } => panic!("the join port speaks replication"),
                _ => None,
            })
        );
        assert!(result.unwrap().is_err());
    });
}
