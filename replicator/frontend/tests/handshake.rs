//! Option haggling, byte by byte.

mod support;

use std::io::Write;

use holdfast_frontend::nbd::wire::{command, export_flag, info, option, option_reply};
use support::client::{Client, header, info_request, meta_request};
use support::server::{Running, Setup};

#[test]
fn go_describes_the_export_and_block_sizes_only_on_request() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    let replies = client.option(option::INFO, &info_request("disk", &[]));
    assert_eq!(replies.len(), 2, "one description and the acknowledgement");
    let wanted = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION, 99];
    let replies = client.option(option::INFO, &info_request("disk@7", &wanted));
    let texts: Vec<_> = replies.iter().map(|reply| reply.data.clone()).collect();
    assert!(texts.contains(&b"\0\x01disk@7".to_vec()));
    assert!(texts.contains(&b"\0\x02memory".to_vec()));
    assert!(texts.contains(&vec![0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]));
    let (size, flags) = client.go("disk", &[]);
    assert_eq!(size, 64 << 20);
    let expected = export_flag::HAS_FLAGS
        | export_flag::FLUSH
        | export_flag::FUA
        | export_flag::TRIM
        | export_flag::WRITE_ZEROES
        | export_flag::FAST_ZERO
        | export_flag::MULTI_CONN
        | export_flag::CACHE;
    assert_eq!(flags, expected, "DF only with structured replies");
    assert_eq!(client.call(header(command::FLUSH, 1, 0, 0), &[]).error, 0);
}

#[test]
fn a_read_only_export_offers_nothing_that_writes() {
    let server = Running::start(Setup::default());
    server.on_volume(|volume| volume.change_info(|info| info.read_only = true));
    let mut client = Client::connect(&server.socket());
    client.structured_replies();
    let (_, flags) = client.go("disk", &[]);
    let writing = export_flag::TRIM | export_flag::WRITE_ZEROES | export_flag::FAST_ZERO;
    assert_eq!(flags & writing, 0);
    let wanted = export_flag::READ_ONLY | export_flag::DF;
    assert_eq!(flags & wanted, wanted);
}

#[test]
fn exports_that_cannot_be_opened_say_why_and_leave_the_connection_usable() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    let replies = client.option(option::GO, &info_request("nobody", &[]));
    assert_eq!(replies[0].kind, option_reply::ERR_UNKNOWN);
    let replies = client.option(option::GO, &info_request("disk@6", &[]));
    assert_eq!(replies[0].kind, option_reply::ERR_POLICY);
    let text = String::from_utf8_lossy(&replies[0].data).into_owned();
    assert!(text.contains("superseded by epoch 7"), "{text}");
    client.go("disk@7", &[]);
}

#[test]
fn a_volume_with_a_contradictory_description_is_refused_not_served() {
    let server = Running::start(Setup::default());
    server.on_volume(|volume| volume.change_info(|info| info.block_sizes.minimum = 3));
    let mut client = Client::connect(&server.socket());
    let replies = client.option(option::GO, &info_request("disk", &[]));
    assert_eq!(replies[0].kind, option_reply::ERR_POLICY);
}

#[test]
fn list_names_every_export() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    let replies = client.option(option::LIST, &[]);
    let names: Vec<_> = replies.iter().map(|reply| reply.data.as_slice()).collect();
    let expected: [&[u8]; 3] = [
        b"\0\0\0\x04diskmemory",
        b"\0\0\0\x06disk@7memory, epoch 7",
        b"",
    ];
    assert_eq!(names, expected);
    let replies = client.option(option::LIST, b"x");
    assert_eq!(replies[0].kind, option_reply::ERR_INVALID);
}

#[test]
fn the_old_way_in_works_with_and_without_the_zeroes() {
    let server = Running::start(Setup::default());
    for (flags, length) in [(3u32, 10usize), (1, 134), (0, 134)] {
        let mut stream = std::os::unix::net::UnixStream::connect(server.socket()).expect("connect");
        let mut greeting = [0; 18];
        std::io::Read::read_exact(&mut stream, &mut greeting).expect("greeting");
        stream.write_all(&flags.to_be_bytes()).expect("flags");
        let mut client = Client {
            stream,
            structured: false,
        };
        client.send_option(option::EXPORT_NAME, b"disk");
        let mut answer = vec![0xff; length];
        std::io::Read::read_exact(&mut client.stream, &mut answer).expect("export");
        assert_eq!(answer[..8], (64u64 << 20).to_be_bytes());
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        assert_eq!(
            client.call(header(command::READ, 5, 0, 16), &[]).data,
            [0; 16]
        );
    }
    let mut client = Client::connect(&server.socket());
    client.send_option(option::EXPORT_NAME, b"disk@6");
    client.expect_closed();
}

#[test]
fn breaches_close_the_connection_and_nobody_elses() {
    let server = Running::start(Setup::default());
    let mut bystander = Client::open(&server.socket(), false);
    // Unknown handshake flags.
    let mut stream = std::os::unix::net::UnixStream::connect(server.socket()).expect("connect");
    std::io::Read::read_exact(&mut stream, &mut [0; 18]).expect("greeting");
    stream.write_all(&7u32.to_be_bytes()).expect("flags");
    Client {
        stream,
        structured: false,
    }
    .expect_closed();
    // Not an option.
    let mut client = Client::connect(&server.socket());
    client.stream.write_all(&[0x41; 16]).expect("rubbish");
    client.expect_closed();
    // An option nobody will read.
    let mut client = Client::connect(&server.socket());
    let head = holdfast_frontend::nbd::wire::OptionHeader {
        option: option::LIST,
        length: u32::MAX,
    };
    client.stream.write_all(&head.encode()).expect("option");
    client.expect_closed();
    assert_eq!(
        bystander.call(header(command::READ, 1, 0, 8), &[]).data,
        [0; 8]
    );
    server.until("the failures are counted", |server| {
        server.stats().connections_failed.get() == 3
    });
}

#[test]
fn unknown_and_oversized_options_are_answered() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    assert_eq!(
        client.option(77, b"x")[0].kind,
        option_reply::ERR_UNSUPPORTED
    );
    assert_eq!(
        client.option(11, b"")[0].kind,
        option_reply::ERR_UNSUPPORTED
    );
    let replies = client.option(option::INFO, &vec![0; 200_000]);
    assert_eq!(replies[0].kind, option_reply::ERR_TOO_BIG);
    let replies = client.option(option::GO, &[0, 0, 0, 9, b'd']);
    assert_eq!(replies[0].kind, option_reply::ERR_INVALID);
    let replies = client.option(option::STARTTLS, &[]);
    assert_eq!(replies[0].kind, option_reply::ERR_POLICY);
    let replies = client.option(option::ABORT, &[]);
    assert_eq!(replies[0].kind, option_reply::ACK);
    client.expect_closed();
}

#[test]
fn a_client_may_send_everything_at_once() {
    let server = Running::start(Setup::default());
    let mut client = Client::connect(&server.socket());
    let mut burst = Vec::new();
    let data = info_request("disk", &[]);
    let length = data.len() as u32;
    let option = option::GO;
    burst.extend(holdfast_frontend::nbd::wire::OptionHeader { option, length }.encode());
    burst.extend(data);
    burst.extend(header(command::WRITE, 1, 3, 5).encode());
    burst.extend(b"hello");
    burst.extend(header(command::READ, 2, 3, 5).encode());
    client.stream.write_all(&burst).expect("burst");
    while client.option_reply(option).kind != option_reply::ACK {}
    assert_eq!(client.reply(0).cookie, 1);
    assert_eq!(client.reply(5).data, b"hello");
}

#[test]
fn metadata_contexts_need_structured_replies_and_the_same_export() {
    let server = Running::start(Setup::default());
    let set = option::SET_META_CONTEXT;
    let list = option::LIST_META_CONTEXT;
    let mut client = Client::connect(&server.socket());
    let chosen = meta_request("disk", &["base:allocation"]);
    assert_eq!(
        client.option(set, &chosen)[0].kind,
        option_reply::ERR_INVALID
    );
    client.structured_replies();
    for queries in [&[][..], &["base:"], &["x-other:y", "base:allocation"]] {
        let replies = client.option(list, &meta_request("disk", queries));
        assert_eq!(replies[0].data, b"\0\0\0\0base:allocation");
    }
    assert_eq!(
        client
            .option(list, &meta_request("disk", &["x-other:"]))
            .len(),
        1
    );
    assert_eq!(
        client.option(set, &meta_request("disk", &["base:"])).len(),
        1
    );
    let replies = client.option(set, &meta_request("nobody", &["base:allocation"]));
    assert_eq!(replies[0].kind, option_reply::ERR_UNKNOWN);
    // Chosen for one export, opened another: not chosen.
    let replies = client.option(set, &meta_request("disk@7", &["base:allocation"]));
    assert_eq!(replies[0].data, b"\0\0\0\x01base:allocation");
    client.go("disk", &[]);
    let status = client.call(header(command::BLOCK_STATUS, 1, 0, 4096), &[]);
    assert_eq!(status.error, 22);
}
