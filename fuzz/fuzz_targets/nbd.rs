//! The NBD handshake and requests: eight bytes that steer the volume and the cuts between reads, then what a client
//! sends. Without TLS's own bytes, which are not ours to decode.
#![no_main]

use holdfast_frontend::nbd::fuzz::{fuzz_session, limits};

/// The largest request that is taken.
const LARGEST: u64 = 32 << 20;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let outcome = fuzz_session(input);
    // A single request may be larger than the limit, and a refused write takes its place once its payload is skipped.
    let bound = limits().max_bytes_in_flight.max(LARGEST);
    assert!(
        outcome.most_requests <= limits().max_requests_in_flight + 1,
        "{outcome:?}"
    );
    assert!(outcome.most_bytes_in_flight <= bound, "{outcome:?}");
    assert!(outcome.most_buffer_bytes <= bound + LARGEST, "{outcome:?}");
});
