//! The transmission phase against scripted clients: answers, errors, limits, endings.

mod support;

use std::io::Write;

use holdfast_frontend::nbd::wire::{RequestHeader, command, command_flag, option};
use holdfast_frontend::{CloseReason, Volume};
use support::client::{Client, header, meta_request};
use support::memory::full;
use support::server::{Running, Setup};

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;
const SIZE: u64 = 64 << 20;

fn flagged(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
    RequestHeader {
        flags,
        ..header(command, 42, offset, length)
    }
}

#[test]
fn bytes_come_back_at_any_alignment_and_size() {
    let server = Running::start(Setup::default());
    for structured in [false, true] {
        let mut client = Client::open(&server.socket(), structured);
        for (offset, length) in [
            (0, 1),
            (511, 2),
            (4095, 8193),
            (70_001, 20_000),
            (1 << 20, 3_000_001),
        ] {
            let payload: Vec<u8> = (0..length)
                .map(|n| (n % 251) as u8 ^ u8::from(structured))
                .collect();
            let write = header(command::WRITE, 7, offset, length);
            assert_eq!(client.call(write, &payload).error, 0);
            let read = client.call(header(command::READ, 8, offset, length), &[]);
            assert!(read.data == payload, "{length} bytes at {offset}");
        }
    }
}

#[test]
fn errors_have_the_numbers_of_the_specification_and_the_stream_stays_in_step() {
    let server = Running::start(Setup::default());
    for structured in [false, true] {
        let mut client = Client::open(&server.socket(), structured);
        let past = client.call(header(command::WRITE, 1, SIZE - 10, 11), &[1; 11]);
        assert_eq!(past.error, ENOSPC);
        assert_eq!(past.message.is_empty(), !structured);
        assert_eq!(
            client
                .call(header(command::READ, 2, SIZE - 10, 11), &[])
                .error,
            EINVAL
        );
        assert_eq!(
            client.call(header(command::TRIM, 3, SIZE, 1), &[]).error,
            EINVAL
        );
        assert_eq!(client.call(header(99, 4, 0, 0), &[]).error, EINVAL);
        let df = flagged(command::WRITE, command_flag::DF, 0, 9);
        assert_eq!(client.call(df, &[1; 9]).error, EINVAL);
        assert_eq!(
            client
                .call(header(command::BLOCK_STATUS, 5, 0, 1), &[])
                .error,
            EINVAL
        );
        assert_eq!(client.call(header(command::READ, 6, 0, 0), &[]).error, 0);
        assert_eq!(
            client
                .call(header(command::READ, 7, 0, (32 << 20) + 1), &[])
                .error,
            EINVAL
        );
        assert_eq!(
            client.call(header(command::READ, 8, 0, 4), &[]).data,
            [0; 4]
        );
    }
    server.on_volume(|volume| volume.change_info(|info| info.read_only = true));
    let mut client = Client::open(&server.socket(), true);
    assert_eq!(
        client.call(header(command::WRITE, 1, 0, 3), &[1; 3]).error,
        EPERM
    );
    assert_eq!(
        client.call(header(command::READ, 2, 0, 3), &[]).data,
        [0; 3]
    );
}

#[test]
fn a_write_that_is_too_large_is_skipped_or_ends_the_connection() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), true);
    let length = (32 << 20) + 1;
    let reply = client.call(
        header(command::WRITE, 1, 0, length),
        &vec![1; length as usize],
    );
    assert_eq!(reply.error, EINVAL);
    assert_eq!(
        client.call(header(command::READ, 2, 0, 4), &[]).data,
        [0; 4]
    );
    client.send(header(command::WRITE, 3, 0, (64 << 20) + 1), &[]);
    client.expect_closed();
    // The largest one allowed goes through.
    let mut client = Client::open(&server.socket(), false);
    let payload = vec![9; 32 << 20];
    assert_eq!(
        client
            .call(header(command::WRITE, 1, 0, 32 << 20), &payload)
            .error,
        0
    );
    assert!(client.call(header(command::READ, 1, 0, 32 << 20), &[]).data == payload);
}

#[test]
fn rubbish_in_place_of_a_request_ends_only_this_connection() {
    let server = Running::start(Setup::default());
    let mut bystander = Client::open(&server.socket(), true);
    let mut client = Client::open(&server.socket(), false);
    client.stream.write_all(&[0xee; 28]).expect("rubbish");
    client.expect_closed();
    assert_eq!(
        bystander.call(header(command::READ, 1, 0, 4), &[]).data,
        [0; 4]
    );
}

#[test]
fn flags_reach_the_volume() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), true);
    let fua = command_flag::FUA;
    assert_eq!(
        client
            .call(flagged(command::WRITE, fua, 0, 4), b"abcd")
            .error,
        0
    );
    assert_eq!(client.call(header(command::FLUSH, 1, 0, 0), &[]).error, 0);
    let zero = flagged(command::WRITE_ZEROES, command_flag::NO_HOLE, 0, 2);
    assert_eq!(client.call(zero, &[]).error, 0);
    let fast = flagged(command::WRITE_ZEROES, command_flag::FAST_ZERO, 4096, 4096);
    assert_eq!(client.call(fast, &[]).error, 0);
    assert_eq!(
        client.call(header(command::TRIM, 1, 8192, 4096), &[]).error,
        0
    );
    assert_eq!(
        client
            .call(header(command::CACHE, 1, 8192, 4096), &[])
            .error,
        0
    );
    assert_eq!(
        client.call(header(command::READ, 1, 0, 4), &[]).data,
        b"\0\0cd"
    );
    let counts = server.on_volume(|volume| {
        let calls = &volume.calls;
        [
            &calls.fua,
            &calls.flushes,
            &calls.no_hole,
            &calls.fast,
            &calls.discards,
            &calls.caches,
        ]
        .map(std::cell::Cell::get)
    });
    assert_eq!(counts, [1; 6]);
}

#[test]
fn block_status_names_holes_and_data() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    client.structured_replies();
    client.option(
        option::SET_META_CONTEXT,
        &meta_request("disk", &["base:allocation"]),
    );
    client.go("disk", &[]);
    assert_eq!(
        client
            .call(header(command::WRITE, 1, 8192, 4096), &[1; 4096])
            .error,
        0
    );
    let words = |data: &[u8]| -> Vec<u32> {
        let words = data.chunks(4);
        words
            .map(|word| u32::from_be_bytes(word.try_into().expect("4 bytes")))
            .collect()
    };
    let all = client.call(header(command::BLOCK_STATUS, 2, 0, 65536), &[]);
    assert_eq!(words(&all.data), [1, 8192, 3, 4096, 0, 65536 - 12288, 3]);
    let one = client.call(
        flagged(command::BLOCK_STATUS, command_flag::REQ_ONE, 100, 65536),
        &[],
    );
    assert_eq!(words(&one.data), [1, 8092, 3]);
}

#[test]
fn the_volume_s_failures_reach_the_client() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), true);
    server.on_volume(|volume| *volume.failing.borrow_mut() = Some(full()));
    let reply = client.call(header(command::WRITE, 1, 0, 4), b"abcd");
    assert_eq!(
        (reply.error, reply.message.as_str()),
        (ENOSPC, "the backing device is full")
    );
    // A request whose completion is lost is answered all the same.
    server.on_volume(|volume| volume.hold());
    client.send(header(command::READ, 2, 0, 4), &[]);
    server.until("the read is held", |server| server.exports().0.held() == 1);
    server.on_volume(|volume| volume.drop_held());
    assert_eq!(client.reply(4).error, EIO);
}

#[test]
fn answers_come_in_the_order_of_completion() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), false);
    server.on_volume(|volume| volume.hold());
    for cookie in 0..3 {
        client.send(header(command::READ, cookie, cookie, 1), &[]);
    }
    server.until("all are held", |server| server.exports().0.held() == 3);
    server.on_volume(|volume| volume.release());
    let order = [client.reply(1), client.reply(1), client.reply(1)].map(|reply| reply.cookie);
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn requests_beyond_the_limit_wait_in_the_socket() {
    let mut setup = Setup::default();
    setup.limits.max_requests_in_flight = 8;
    let server = Running::start(setup);
    let mut client = Client::open(&server.socket(), true);
    server.on_volume(|volume| volume.hold());
    for cookie in 0..50 {
        client.send(header(command::READ, cookie, 0, 512), &[]);
    }
    server.until("eight are held", |server| server.exports().0.held() == 8);
    // The server had turns to take more, and did not.
    let mut other = Client::open(&server.socket(), false);
    other.send(header(command::DISCONNECT, 1, 0, 0), &[]);
    other.expect_closed();
    assert_eq!(server.on_volume(|volume| volume.held()), 8);
    server.on_volume(|volume| volume.release());
    let mut cookies: Vec<_> = (0..50).map(|_| client.reply(512).cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..50).collect::<Vec<_>>());
}

#[test]
fn a_client_that_does_not_read_holds_a_bounded_amount_of_memory() {
    let mut setup = Setup::default();
    setup.limits.max_bytes_in_flight = 4 << 20;
    let server = Running::start(setup);
    let mut slow = Client::open(&server.socket(), true);
    for cookie in 0..64 {
        slow.send(header(command::READ, cookie, 0, 1 << 20), &[]);
    }
    server.until("the limit is reached", |server| {
        server.exports().0.lent() >= 3 << 20
    });
    // Everybody else goes on.
    let mut quick = Client::open(&server.socket(), false);
    for cookie in 0..100 {
        assert_eq!(
            quick.call(header(command::READ, cookie, 0, 8), &[]).data,
            [0; 8]
        );
        assert!(server.on_volume(|volume| volume.lent()) <= 4 << 20);
    }
    for cookie in 0..64 {
        let reply = slow.reply(1 << 20);
        assert_eq!((reply.cookie, reply.data.len()), (cookie, 1 << 20));
    }
    server.until("all memory is back", |server| {
        server.exports().0.lent() == 0
    });
}

#[test]
fn writes_wait_for_memory_and_then_go_on() {
    let server = Running::start(Setup::default());
    server.on_volume(|volume| {
        volume.limit_memory(256 << 10);
        volume.hold();
    });
    let mut first = Client::open(&server.socket(), false);
    let mut second = Client::open(&server.socket(), false);
    for cookie in 0..4 {
        first.send(
            header(command::WRITE, cookie, 0, 64 << 10),
            &vec![1; 64 << 10],
        );
    }
    server.until("the memory is lent", |server| {
        server.exports().0.held() == 4
    });
    second.send(header(command::WRITE, 9, 0, 64 << 10), &vec![2; 64 << 10]);
    server.on_volume(|volume| volume.release());
    for _ in 0..4 {
        assert_eq!(first.reply(0).error, 0);
    }
    assert_eq!(second.reply(0).cookie, 9);
    assert_eq!(
        server.on_volume(|volume| volume.calls.most_lent.get()),
        256 << 10
    );
}

#[test]
fn a_superseded_export_answers_what_is_in_flight_and_ends_its_sessions() {
    let mut setup = Setup::default();
    setup.limits.close_timeout = std::time::Duration::from_secs(3600);
    let server = Running::start(setup);
    let mut client = Client::open(&server.socket(), true);
    let mut unfinished = Client::open(&server.socket(), true);
    assert_eq!(
        client.call(header(command::WRITE, 1, 0, 4), b"safe").error,
        0
    );
    server.on_volume(|volume| volume.hold());
    client.send(header(command::WRITE, 2, 0, 4), b"lost");
    client.send(header(command::READ, 3, 0, 4), &[]);
    unfinished.send(header(command::WRITE, 4, 0, 100_000), &[1; 50_000]);
    server.until("two are held and one is half here", |server| {
        server.exports().0.held() == 2 && server.exports().0.lent() == 100_004
    });
    server.on_volume(|volume| volume.close_signal().close(CloseReason::Superseded));
    let mut cookies = Vec::new();
    for _ in 0..2 {
        let reply = client.reply(0);
        assert_eq!(reply.error, ESHUTDOWN);
        assert!(reply.message.contains("newer epoch"), "{}", reply.message);
        cookies.push(reply.cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, [2, 3]);
    client.expect_closed();
    // A write whose payload is still under way is answered once that has passed.
    unfinished.stream.write_all(&[1; 50_000]).expect("the rest");
    let reply = unfinished.reply(0);
    assert_eq!((reply.cookie, reply.error), (4, ESHUTDOWN));
    unfinished.expect_closed();
    drop((client, unfinished));
    // Late completions find nobody, and hurt nobody.
    server.on_volume(|volume| volume.release());
    server.until("every session is gone", |server| {
        server.stats().connections_open.get() == 0 && server.exports().0.lent() == 0
    });
    let mut again = Client::connect(&server.socket());
    let replies = again.option(option::GO, &support::client::info_request("disk", &[]));
    assert_ne!(replies[0].kind & (1 << 31), 0);
}

#[test]
fn requests_that_a_limit_held_back_are_answered_too_when_the_export_goes_away() {
    let mut setup = Setup::default();
    setup.limits.max_requests_in_flight = 1;
    let server = Running::start(setup);
    let mut client = Client::open(&server.socket(), true);
    server.on_volume(|volume| volume.hold());
    // One burst, so that all of it is in the server's hands when the first is.
    let burst: Vec<u8> = (0..20)
        .flat_map(|cookie| header(command::READ, cookie, 0, 4).encode())
        .collect();
    client.stream.write_all(&burst).expect("burst");
    server.until("one is held", |server| server.exports().0.held() == 1);
    server.on_volume(|volume| volume.close_signal().close(CloseReason::Demoted));
    for cookie in 0..20 {
        let reply = client.reply(0);
        assert_eq!((reply.cookie, reply.error), (cookie, ESHUTDOWN));
    }
    client.expect_closed();
}

#[test]
fn a_closed_session_still_takes_what_the_client_is_sending() {
    let mut setup = Setup::default();
    // Only the client's own goodbye may end this.
    setup.limits.close_timeout = std::time::Duration::from_secs(3600);
    let server = Running::start(setup);
    let mut client = Client::open(&server.socket(), true);
    server.on_volume(|volume| volume.hold());
    client.send(header(command::READ, 1, 0, 4), &[]);
    server.until("it is held", |server| server.exports().0.held() == 1);
    server.on_volume(|volume| volume.close_signal().close(CloseReason::Demoted));
    assert_eq!(client.reply(0).error, ESHUTDOWN);
    client.expect_closed();
    for cookie in 0..1000 {
        client.send(header(command::WRITE, cookie, 0, 4096), &[1; 4096]);
    }
    assert_eq!(
        server.on_server(|server| server.stats().connections_open.get()),
        1
    );
    drop(client);
    server.until("it is gone", |server| {
        server.stats().connections_open.get() == 0
    });
}

#[test]
fn a_stopping_server_tells_its_clients() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), true);
    let mut undecided = Client::connect(&server.socket());
    server.on_volume(|volume| volume.hold());
    client.send(header(command::FLUSH, 5, 0, 0), &[]);
    server.until("it is held", |server| server.exports().0.held() == 1);
    server.on_server(|server| server.stop(CloseReason::Stopping));
    assert_eq!(client.reply(0).error, ESHUTDOWN);
    client.expect_closed();
    undecided.expect_closed();
}

#[test]
fn goodbye_waits_for_what_is_in_flight() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), false);
    server.on_volume(|volume| volume.hold());
    client.send(header(command::WRITE, 1, 0, 4), b"last");
    client.send(header(command::DISCONNECT, 2, 0, 0), &[]);
    server.until("it is held", |server| server.exports().0.held() == 1);
    server.on_volume(|volume| volume.release());
    assert_eq!(client.reply(0).cookie, 1);
    client.expect_closed();
}

#[test]
fn a_client_that_vanishes_gives_its_memory_back_and_its_writes_still_happen() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), false);
    server.on_volume(|volume| volume.hold());
    client.send(header(command::WRITE, 1, 0, 4), b"here");
    client.send(header(command::WRITE, 2, 0, 1 << 20), &[1; 1000]);
    server.until("one is held", |server| server.exports().0.held() == 1);
    drop(client);
    server.until("the session is gone", |server| {
        server.stats().connections_open.get() == 0
    });
    assert_eq!(server.on_volume(|volume| volume.lent()), 4);
    server.on_volume(|volume| volume.release());
    assert_eq!(server.on_volume(|volume| volume.lent()), 0);
    let mut client = Client::open(&server.socket(), false);
    assert_eq!(
        client.call(header(command::READ, 1, 0, 4), &[]).data,
        b"here"
    );
}

#[test]
fn a_new_size_is_seen_by_new_sessions() {
    let server = Running::start(Setup::default());
    let mut old = Client::open(&server.socket(), false);
    server.on_volume(|volume| volume.change_info(|info| info.size *= 2));
    assert_eq!(
        old.call(header(command::READ, 1, SIZE, 4), &[]).error,
        EINVAL
    );
    let mut new = Client::connect(&server.socket());
    assert_eq!(new.go("disk", &[]).0, 2 * SIZE);
    assert_eq!(
        new.call(header(command::READ, 1, SIZE, 4), &[]).data,
        [0; 4]
    );
}
