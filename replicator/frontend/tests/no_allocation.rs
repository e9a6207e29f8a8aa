//! In the steady state a request costs no allocation beyond the volume's own buffers, which here come from a pool.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use holdfast_frontend::nbd::wire::command;
use support::client::{Client, header};
use support::server::{Running, Setup};

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged to the system's allocator; the counter is a constant-initialised
// thread local without a destructor, so touching it allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is the same one.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same one.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn ten_thousand_requests_allocate_nothing() {
    let server = Running::start(Setup::default());
    let mut client = Client::open(&server.socket(), true);
    let payload = [7; 4096];
    let burst = |client: &mut Client<_>| {
        for cookie in 0..16 {
            client.send(
                header(command::WRITE, cookie, cookie * 4096, 4096),
                &payload,
            );
            client.send(header(command::READ, cookie, cookie * 4096, 4096), &[]);
        }
        client.send(header(command::FLUSH, 99, 0, 0), &[]);
        for _ in 0..33 {
            assert_eq!(client.reply(0).error, 0);
        }
    };
    // Fills the pool, and whatever else grows once.
    for _ in 0..20 {
        burst(&mut client);
    }
    let before = server.on_server(|_| ALLOCATIONS.with(Cell::get));
    for _ in 0..300 {
        burst(&mut client);
    }
    let after = server.on_server(|_| ALLOCATIONS.with(Cell::get));
    // The two questions themselves cost a few.
    assert!(
        after - before < 20,
        "{} allocations for 9,900 requests",
        after - before
    );
}
