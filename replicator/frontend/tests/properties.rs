//! Arbitrary bytes never panic the protocol code and never make it hold more than its limits say.

use holdfast_frontend::nbd::fuzz::{Outcome, fuzz_session, limits};
use holdfast_frontend::nbd::wire::{OptionHeader, REQUEST_BYTES, RequestHeader, command, option};
use proptest::prelude::*;

/// What a single admitted request may take beyond the byte limit.
const LARGEST: u64 = 32 << 20;

fn check(outcome: &Outcome) -> Result<(), TestCaseError> {
    let bound = limits().max_bytes_in_flight.max(LARGEST);
    // One more: a refused write takes its place only once its payload is skipped.
    let requests = limits().max_requests_in_flight + 1;
    prop_assert!(outcome.most_requests <= requests, "{outcome:?}");
    prop_assert!(outcome.most_bytes_in_flight <= bound, "{outcome:?}");
    // The volume lends at most for what is admitted, and once more for reads that wait to be sent.
    prop_assert!(outcome.most_buffer_bytes <= bound + LARGEST, "{outcome:?}");
    Ok(())
}

/// A request with mostly sensible fields: pure noise never gets past the magic number.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let commands = prop_oneof![
        10 => 0u16..8,
        1 => any::<u16>(),
    ];
    let flags = prop_oneof![
        3 => Just(0u16),
        2 => 0u16..32,
        1 => any::<u16>(),
    ];
    let offsets = prop_oneof![
        6 => (0u64..1 << 18).prop_map(|block| block * 4096),
        2 => 0u64..1 << 30,
        1 => any::<u64>(),
    ];
    let lengths = prop_oneof![
        6 => (0u32..24).prop_map(|block| block * 512),
        2 => 0u32..200_000,
        1 => any::<u32>(),
    ];
    (commands, flags, any::<u64>(), offsets, lengths).prop_map(
        |(command, flags, cookie, offset, length)| {
            let header = RequestHeader {
                flags,
                command,
                cookie,
                offset,
                length,
            };
            let mut bytes = header.encode().to_vec();
            if command == command::WRITE {
                bytes.resize(REQUEST_BYTES + length.min(300_000) as usize, 0x77);
            }
            bytes
        },
    )
}

fn option_bytes() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("v"), Just("v@2"), Just("v@3"), Just("nobody")];
    let known = (
        1u32..13,
        name,
        proptest::collection::vec(any::<u8>(), 0..12),
    )
        .prop_map(|(number, name, tail)| {
            let mut data = Vec::new();
            if number != option::EXPORT_NAME {
                data.extend_from_slice(&(name.len() as u32).to_be_bytes());
            }
            data.extend_from_slice(name.as_bytes());
            match number {
                option::INFO | option::GO => data.extend_from_slice(&[0, 1, 0, 3]),
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                    data.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 15]);
                    data.extend_from_slice(b"base:allocation");
                }
                option::STRUCTURED_REPLY | option::LIST | option::STARTTLS => data.clear(),
                _ => {}
            }
            if tail.len() > 9 {
                data.extend_from_slice(&tail);
            }
            (number, data)
        });
    let noise = (any::<u32>(), proptest::collection::vec(any::<u8>(), 0..64));
    prop_oneof![8 => known, 1 => noise].prop_map(|(option, data)| {
        let length = data.len() as u32;
        let mut bytes = OptionHeader { option, length }.encode().to_vec();
        bytes.extend_from_slice(&data);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn noise(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
        check(&fuzz_session(&data))?;
    }

    #[test]
    fn requests(
        seed in any::<u64>(),
        requests in proptest::collection::vec(request(), 0..40),
    ) {
        let mut data = (seed | 1).to_le_bytes().to_vec();
        data.extend(requests.concat());
        check(&fuzz_session(&data))?;
    }

    #[test]
    fn options_then_requests(
        seed in any::<u64>(),
        options in proptest::collection::vec(option_bytes(), 0..12),
        requests in proptest::collection::vec(request(), 0..8),
    ) {
        let mut data = (seed & !1).to_le_bytes().to_vec();
        data.extend(3u32.to_be_bytes());
        data.extend(options.concat());
        data.extend(requests.concat());
        check(&fuzz_session(&data))?;
    }

    #[test]
    fn headers_survive_the_wire(
        flags in any::<u16>(),
        command in any::<u16>(),
        cookie in any::<u64>(),
        offset in any::<u64>(),
        length in any::<u32>(),
    ) {
        let header = RequestHeader { flags, command, cookie, offset, length };
        prop_assert_eq!(RequestHeader::decode(&header.encode()), Some(header));
        let option = OptionHeader { option: length, length: command.into() };
        prop_assert_eq!(OptionHeader::decode(&option.encode()), Some(option));
    }
}

/// The generators reach what they are meant to reach; otherwise the properties above prove nothing.
#[test]
fn the_interesting_states_are_reached() {
    let mut go = 0u64.to_le_bytes().to_vec();
    go.extend(3u32.to_be_bytes());
    let data = [0, 0, 0, 1, b'v', 0, 0];
    let length = data.len() as u32;
    go.extend(
        OptionHeader {
            option: option::GO,
            length,
        }
        .encode(),
    );
    go.extend(data);
    let opened = (0u64..64).map(|seed| {
        go[..8].copy_from_slice(&(seed << 1).to_le_bytes());
        fuzz_session(&go)
    });
    assert!(opened.filter(|outcome| outcome.opened).count() > 20);

    let header = RequestHeader {
        flags: 0,
        command: command::READ,
        cookie: 1,
        offset: 0,
        length: 1 << 20,
    };
    let mut reads = 1u64.to_le_bytes().to_vec();
    for _ in 0..20 {
        reads.extend(header.encode());
    }
    let outcome = fuzz_session(&reads);
    assert!(outcome.most_bytes_in_flight == 1 << 20, "{outcome:?}");
    assert!(outcome.answered > 4 << 20, "{outcome:?}");
}
