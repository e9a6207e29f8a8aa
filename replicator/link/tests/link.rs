//! Streams, frames, paths, memory.

mod common;
use bytes::Bytes;
use common::*;
use holdfast_link::*;
use holdfast_wire_format::frame::{FrameKind, GoodbyeCode};

#[test]
fn frames_of_all_sizes_arrive_in_order_both_ways() {
    run(async {
        let (a, b) = pair();
        let (at_a, at_b) = connect(&a, &b, SERVICE).await;
        let sizes = [
            0,
            1,
            111,
            112,
            512,
            4096,
            16383,
            16384,
            65536,
            100_001,
            1 << 20,
        ];
        for (from, session, to, peer_session) in [(&a, at_a, &b, at_b), (&b, at_b, &a, at_a)] {
            let mut expected = Vec::new();
            for (i, size) in sizes.into_iter().cycle().take(60).enumerate() {
                let payload = bytes(size, i as u64);
                let kind = if i % 3 == 0 {
                    FrameKind::WriteAck
                } else {
                    FrameKind::Write
                };
                let mut header = header(kind, SERVICE, i as u64, &payload);
                header.dependency = (i as u64).saturating_sub(1);
                let sent = match i % 4 {
                    _ if size == 0 => Payload::None,
                    0 => Payload::Inline(payload.clone()),
                    1 => Payload::Local(Box::new(payload.clone())),
                    _ => Payload::Shared(Bytes::from(payload.clone())),
                };
                from.link().send(session, &header, sent).unwrap();
                expected.push((peer_session, header, payload));
            }
            for expected in expected {
                let got = to.frame().await;
                assert_eq!(got.1, expected.1);
                assert!(got == expected, "position {}", expected.1.position);
            }
        }
        assert_eq!(
            b.handler.undelivered_batch.get(),
            0,
            "each event is followed by the end of its batch"
        );
    });
}

#[test]
fn each_service_has_its_stream_and_a_closed_one_comes_back() {
    run(async {
        let (a, b) = pair();
        let (first_a, first_b) = connect(&a, &b, SERVICE).await;
        let (other_a, other_b) = connect(&a, &b, OTHER).await;
        b.link()
            .send(
                first_b,
                &header(FrameKind::Write, SERVICE, 9, b"last"),
                Payload::Inline(b"last".into()),
            )
            .unwrap();
        b.link()
            .close(first_b, GoodbyeCode::OldEpoch, "as the test wants");
        assert_eq!(a.frame().await.2, b"last", "what was queued is sent first");
        let (code, by_peer, reason) = a
            .wait(|event| match event {
                LinkEvent::StreamDown {
                    session,
                    code,
                    by_peer,
                    reason,
                    ..
                } if *session == first_a => Some((*code, *by_peer, reason.clone())),
                _ => None,
            })
            .await;
        assert_eq!(
            (code, by_peer),
            (Some(GoodbyeCode::OldEpoch), true),
            "{reason}"
        );
        assert!(b.down(first_b).await.contains("as the test wants"));
        // Still wanted by both: it opens again, under a new session.
        let again = a.up(SERVICE).await.0;
        assert_ne!(again, first_a);
        b.up(SERVICE).await;
        // The other stream never noticed.
        a.link()
            .send(
                other_a,
                &header(FrameKind::Heartbeat, OTHER, 1, &[]),
                Payload::None,
            )
            .unwrap();
        assert_eq!(b.frame().await.0, other_b);
        assert_eq!(
            a.link().send(
                first_a,
                &header(FrameKind::Heartbeat, SERVICE, 1, &[]),
                Payload::None
            ),
            Err(SendError::Closed)
        );
    });
}

#[test]
fn a_service_waits_until_both_want_it_and_the_handler_agrees() {
    run(async {
        let (a, b) = pair();
        a.link().connect(b.id(), SERVICE).unwrap();
        let refused = |event: &Event| match event {
            LinkEvent::ServiceRefused { reason, .. } => Some(reason.clone()),
            LinkEvent::StreamUp { .. } => panic!("opened"),
            _ => None,
        };
        assert!(a.wait(refused).await.contains("not connected there now"));
        *b.handler.refuse.borrow_mut() = Some("still starting".into());
        b.link().connect(a.id(), SERVICE).unwrap();
        assert_eq!(a.wait(refused).await, "still starting");
        *b.handler.refuse.borrow_mut() = None;
        a.up(SERVICE).await;
        b.up(SERVICE).await;
        let unknown = Node::new("nobody").id();
        assert!(matches!(
            a.link().connect(unknown, SERVICE),
            Err(LinkError::NotAPeer { .. })
        ));
    });
}

#[test]
fn a_bad_frame_closes_the_session_and_delivers_nothing() {
    run(async {
        let payload = bytes(8192, 1);
        let good = header(FrameKind::Write, SERVICE, 1, &payload);
        let mut wrong_crc = good;
        wrong_crc.payload_crc ^= 1;
        let wrong_service = header(FrameKind::Write, OTHER, 1, &payload);
        let mut wrong_length = good;
        wrong_length.length -= 1;
        for (bad, says) in [
            (wrong_crc, "CRC"),
            (wrong_service, "service tag"),
            (wrong_length, "range"),
        ] {
            let (a, b) = pair();
            let (at_a, at_b) = connect(&a, &b, SERVICE).await;
            a.link()
                .send(at_a, &good, Payload::Inline(payload.clone()))
                .unwrap();
            a.link()
                .send(at_a, &bad, Payload::Inline(payload.clone()))
                .unwrap();
            a.link()
                .send(at_a, &good, Payload::Inline(payload.clone()))
                .unwrap();
            assert_eq!(b.frame().await.1, good);
            let reason = b
                .wait(|event| match event {
                    LinkEvent::Frame { .. } => panic!("delivered after a bad frame"),
                    LinkEvent::StreamDown {
                        session,
                        code,
                        reason,
                        ..
                    } if *session == at_b => {
                        assert_eq!(*code, Some(GoodbyeCode::BadFrame));
                        Some(reason.clone())
                    }
                    _ => None,
                })
                .await;
            assert!(reason.contains(says), "{reason}");
            assert!(a.down(at_a).await.contains("damaged or impossible frame"));
        }
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        assert_eq!(
            a.link().send(at_a, &good, Payload::Inline(vec![0; 5])),
            Err(SendError::Length {
                header: 8192,
                payload: 5
            })
        );
    });
}

#[test]
fn death_of_a_peer_is_noticed_by_both() {
    run(async {
        let (a, b) = pair();
        let relay = Relay::new("127.0.0.1:0", b.address()).await;
        a.link()
            .set_paths(b.id(), vec![relay.address.into()])
            .unwrap();
        let (at_a, at_b) = connect(&a, &b, SERVICE).await;
        assert!(relay.carried.get() > 0, "the only way is through the relay");
        relay.cut.set(true);
        let (reason, _) = tokio::join!(a.down(at_a), b.down(at_b));
        assert!(
            reason.contains("stopped answering") && reason.contains(b.identity.name()),
            "{reason}"
        );
        relay.cut.set(false);
        a.up(SERVICE).await;
        b.up(SERVICE).await;
    });
}

#[test]
fn the_next_path_takes_over() {
    run(async {
        let (a, b) = pair();
        let first = Relay::new("127.0.0.1:0", b.address()).await;
        let second = Relay::new("127.0.0.2:0", b.address()).await;
        let paths = vec![
            Path {
                local: None,
                remote: first.address,
            },
            Path {
                local: Some("127.0.0.2".parse().unwrap()),
                remote: second.address,
            },
        ];
        a.link().set_paths(b.id(), paths).unwrap();
        b.link().connect(a.id(), SERVICE).unwrap();
        a.link().connect(b.id(), SERVICE).unwrap();
        let (at_a, path) = a.up(SERVICE).await;
        assert_eq!(path, first.address.to_string());
        let (_, _) = b.up(SERVICE).await;
        first.cut.set(true);
        a.down(at_a).await;
        let (at_a, path) = a.up(SERVICE).await;
        assert_eq!(path, format!("127.0.0.2->{}", second.address));
        let (at_b, _) = b.up(SERVICE).await;
        a.link()
            .send(
                at_a,
                &header(FrameKind::Heartbeat, SERVICE, 5, &[]),
                Payload::None,
            )
            .unwrap();
        assert_eq!(b.frame().await.0, at_b);
        let status = &a.link().status()[0];
        assert!(status.dials && status.path == Some(path) && status.last_failure.is_some());
    });
}

#[test]
fn a_receiver_without_memory_stops_the_sender_and_resumes() {
    run(async {
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        let (other_a, other_b) = connect(&a, &b, OTHER).await;
        b.handler.memory.forget_permits(1 << 20);
        let payload = bytes(256 << 10, 7);
        let frames = 64;
        for position in 0..frames {
            let header = header(FrameKind::Write, SERVICE, position, &payload);
            a.link()
                .send(at_a, &header, Payload::Local(Box::new(payload.clone())))
                .unwrap();
        }
        let total = frames as usize * (payload.len() + 112);
        // Another service is not held up: its frames go back and forth while the first has no memory, and never does more than
        // the windows hold leave the queue of the first.
        for round in 1..=300 {
            let beat = header(FrameKind::Heartbeat, OTHER, round, &[]);
            a.link().send(other_a, &beat, Payload::None).unwrap();
            assert_eq!(b.frame().await.0, other_b);
            b.link().send(other_b, &beat, Payload::None).unwrap();
            assert_eq!(a.frame().await.0, other_a);
            let gone = total - a.link().queued_bytes(at_a);
            assert!(
                gone <= 8 << 20,
                "{gone} bytes left the queue of a stream that nobody reads"
            );
        }
        assert_eq!(
            b.handler.allocs.get(),
            1,
            "one buffer is asked for at a time"
        );
        assert!(a.link().queued_bytes(at_a) > 0);
        b.handler.memory.add_permits(frames as usize);
        for position in 0..frames {
            let (_, header, got) = b.frame().await;
            assert_eq!(header.position, position);
            assert!(got == payload);
        }
        assert_eq!(a.link().queued_bytes(at_a), 0);
    });
}

#[test]
fn what_left_the_queue_is_reported() {
    run(async {
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        let payload = bytes(100_000, 3);
        for position in 0..20 {
            let header = header(FrameKind::Write, SERVICE, position, &payload);
            a.link()
                .send(at_a, &header, Payload::Local(Box::new(payload.clone())))
                .unwrap();
        }
        let total = 20 * (payload.len() + 112);
        assert_eq!(a.link().queued_bytes(at_a), total);
        let mut drained = 0;
        while drained < total {
            drained += a
                .wait(|event| match event {
                    LinkEvent::Drained { session, bytes, .. } if *session == at_a => Some(*bytes),
                    _ => None,
                })
                .await;
        }
        assert_eq!((drained, a.link().queued_bytes(at_a)), (total, 0));
    });
}

/// What `flush` sends is on its way when it returns, and is told at once; what a stream has no room for is sent and told later, in order.
#[test]
fn what_is_flushed_leaves_at_once_and_the_rest_follows() {
    run(async {
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        let small = header(FrameKind::Heartbeat, SERVICE, 0, &[]);
        a.link().queue(at_a, &small, Payload::None).unwrap();
        assert_eq!(a.link().queued_bytes(at_a), 112, "not before the flush");
        let mut told = Vec::new();
        a.link()
            .flush(|_, _, session, bytes| told.push((session, bytes)));
        assert_eq!(told, [(at_a, 112)]);
        assert_eq!(a.link().queued_bytes(at_a), 0);
        assert_eq!(b.frame().await.1, small);

        // More than the send window holds.
        let payload = bytes(1 << 20, 4);
        for position in 0..20 {
            let header = header(FrameKind::Write, SERVICE, position, &payload);
            let payload = Payload::Local(Box::new(payload.clone()));
            a.link().queue(at_a, &header, payload).unwrap();
        }
        let total = 20 * (payload.len() + 112);
        let mut drained = 0;
        a.link().flush(|_, _, _, bytes| drained += bytes);
        assert!((1..total).contains(&drained), "{drained} of {total}");
        // A second one finds nothing to do, and takes nothing twice.
        a.link().flush(|_, _, _, bytes| drained += bytes);
        for position in 0..20 {
            let (_, header, got) = b.frame().await;
            assert_eq!(header.position, position);
            assert!(got == payload);
        }
        while drained < total {
            drained += a
                .wait(|event| match event {
                    LinkEvent::Drained { session, bytes, .. } if *session == at_a => Some(*bytes),
                    _ => None,
                })
                .await;
        }
        assert_eq!((drained, a.link().queued_bytes(at_a)), (total, 0));
    });
}

/// A peer that takes nothing holds up the end of a session for a second, flushed or not.
#[test]
fn a_session_that_cannot_send_closes_all_the_same() {
    run(async {
        let (a, b) = pair();
        let (at_a, _) = connect(&a, &b, SERVICE).await;
        b.handler.memory.forget_permits(1 << 20);
        let payload = bytes(1 << 20, 5);
        for position in 0..20 {
            let header = header(FrameKind::Write, SERVICE, position, &payload);
            let payload = Payload::Local(Box::new(payload.clone()));
            a.link().queue(at_a, &header, payload).unwrap();
        }
        a.link().flush(|_, _, _, _| {});
        assert!(a.link().queued_bytes(at_a) > 0);
        a.link().close(at_a, GoodbyeCode::Again, "enough");
        let end = tokio::time::timeout(HANG, a.down(at_a)).await;
        assert!(end.expect("it ends").contains("enough"));
    });
}

#[test]
fn shutdown_says_goodbye() {
    run(async {
        let (a, b) = pair();
        let (at_a, at_b) = connect(&a, &b, SERVICE).await;
        b.link()
            .shutdown(GoodbyeCode::Shutdown, "the test is over")
            .await;
        assert!(b.down(at_b).await.contains("the test is over"));
        let code = a
            .wait(|event| match event {
                LinkEvent::StreamDown { session, code, .. } if *session == at_a => Some(*code),
                _ => None,
            })
            .await;
        assert_eq!(code, Some(GoodbyeCode::Shutdown));
    });
}

/// The interface tells how large a packet may be, and what it tells is looked for and found.
#[test]
fn packets_become_as_large_as_the_interface_carries() {
    run(async {
        let (a, b) = pair();
        connect(&a, &b, SERVICE).await;
        let mtu = std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap();
        let largest = (mtu.trim().parse::<usize>().unwrap() - 28).min(65_507);
        let deadline = tokio::time::Instant::now() + HANG;
        for node in [&a, &b] {
            // The search ends within 20 bytes.
            let found = || usize::from(node.link().status()[0].udp_payload.unwrap());
            while found() + 20 < largest {
                assert!(
                    tokio::time::Instant::now() < deadline,
                    "found {} of {largest}",
                    found()
                );
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            assert!(found() <= largest);
        }
    });
}

/// A thread that ends without a goodbye leaves no socket behind: endpoint and connections do not keep each other alive.
#[test]
fn the_end_of_the_thread_frees_the_port() {
    let mut address = None;
    run(async {
        let (a, b) = pair();
        connect(&a, &b, SERVICE).await;
        address = Some((a.address(), b.address()));
    });
    let (a, b) = address.unwrap();
    for address in [a, b] {
        std::net::UdpSocket::bind(address).unwrap();
    }
}
