//! A resync in virtual time, over disks that do one thing after the other: the application's requests are not held up
//! by it for long, and it comes to its end.

mod world;

use holdfast_replicator_core::api::*;
use holdfast_wire_format::metadata::*;
use world::*;

const SIZE: u64 = 24 << 20;
const MS: u64 = 1_000_000;
/// Bytes per second of each disk, and ns of each request besides.
const DISK: u64 = 20 << 20;
const SEEK: u64 = 100_000;

/// How long an action keeps a disk busy, in ns.
fn takes(action: &Action) -> u64 {
    let bytes = match action {
        Action::DiskRead { length, .. } | Action::DiskWrite { length, .. } => u64::from(*length),
        Action::MetaWriteBuf { length, .. } | Action::MetaReadBuf { length, .. } => {
            u64::from(*length)
        }
        Action::MetaWrite { bytes, .. } => bytes.len() as u64,
        _ => 0,
    };
    SEEK + bytes * 1_000_000_000 / DISK
}

/// Runs the world until `end`, with an application at node 0 that writes, waits for the answer and then for
/// `pause`. Returns how long its writes took, in ns.
struct Timed {
    /// When the request that each disk works on is done.
    busy: [Option<u64>; 2],
    pending: Option<(RequestId, u64)>,
    next: u64,
    /// Bytes of each write.
    size: usize,
}

impl Timed {
    fn run(&mut self, w: &mut World, end: u64, pause: Option<u64>) -> Vec<u64> {
        let mut took = Vec::new();
        while w.now.0 < end {
            w.deliver_all();
            for n in 0..2 {
                if self.busy[n].is_none()
                    && let Some(action) = w.nodes[n].pending.first()
                {
                    self.busy[n] = Some(w.now.0 + takes(action));
                }
            }
            if let Some((request, came)) = self.pending
                && w.status_of(0, request).is_some()
            {
                took.push(w.now.0 - came);
                self.pending = None;
                self.next = w.now.0 + pause.unwrap_or(0);
            }
            if let (None, Some(_), true) = (self.pending, pause, self.next <= w.now.0) {
                let offset = w.rng.below((SIZE - self.size as u64) / 4096) * 4096;
                let request = w.write(0, 0, offset, vec![7; self.size], false);
                self.pending = Some((request, w.now.0));
                continue;
            }
            let deadline = |n: usize| w.nodes[n].core.as_ref().and_then(|c| c.deadline());
            let ticks = (0..2).filter_map(deadline).map(|t| t.0);
            let app = (self.pending.is_none() && pause.is_some()).then_some(self.next);
            let next = self
                .busy
                .into_iter()
                .flatten()
                .chain(ticks)
                .chain(app)
                .min();
            let next = next.unwrap_or(w.now.0 + MS).max(w.now.0 + 1).min(end);
            w.now = Time(next);
            for n in 0..2 {
                if self.busy[n].is_some_and(|at| at <= next) {
                    self.busy[n] = None;
                    w.finish_first(n);
                }
                if w.nodes[n]
                    .core
                    .as_ref()
                    .and_then(|c| c.deadline())
                    .is_some_and(|d| d.0 <= next)
                {
                    w.event(n, Event::Tick);
                }
            }
        }
        took
    }
}

fn source(w: &World) -> Option<holdfast_replicator_core::status::ResyncStatus> {
    let status = w.nodes[0].core.as_ref().expect("it runs").status(w.now);
    status.peers[0].resync
}

fn mean(took: &[u64]) -> u64 {
    took.iter().sum::<u64>() / took.len().max(1) as u64
}

/// Node 1 was away while most of the volume was written, and is back; the application has been seen for a second.
fn resync(min: u64, max: u64) -> (World, Timed, u64) {
    let modes = [Mode::Sync, Mode::Sync];
    let mut w = World::with_undo(1, &modes, OnPeerLoss::Continue, &[SIZE], true, 0);
    w.tuning.resync_rate_min = min;
    w.tuning.resync_rate_max = max;
    w.tuning.resync_window_bytes = 4 << 20;
    w.start(0);
    w.start(1);
    w.until("the copies agree", 4000, |w| w.settled(&[0, 1]));
    w.promote(0, false).unwrap_or_else(|e| panic!("{e}"));
    w.cut.push((0, 1));
    w.drop_link(0, 1, "cut");
    let requests: Vec<RequestId> = (0..SIZE >> 19)
        .map(|at| w.write(0, 0, at << 19, vec![at as u8 + 1; 512 << 10], false))
        .collect();
    w.until("all is written", 100_000, |w| {
        requests
            .iter()
            .all(|r| w.status_of(0, *r) == Some(Status::Ok))
    });
    let mut timed = Timed {
        busy: [None; 2],
        pending: None,
        next: 0,
        size: 4096,
    };
    let end = w.now.0 + 1000 * MS;
    let alone = mean(&timed.run(&mut w, end, Some(2 * MS)));
    w.cut.clear();
    let mut waited = 0;
    while source(&w).is_none() {
        let end = w.now.0 + MS;
        timed.run(&mut w, end, Some(2 * MS));
        waited += 1;
        assert!(waited < 10_000, "it does not begin");
    }
    (w, timed, alone)
}

#[test]
fn writes_are_not_held_up_and_the_resync_ends() {
    // Nothing makes it yield: each write stands behind what is on its way.
    let (mut w, mut timed, alone) = resync(1 << 40, 0);
    let end = w.now.0 + 600 * MS;
    let beside = mean(&timed.run(&mut w, end, Some(2 * MS)));
    assert!(alone < MS, "{alone} ns without a resync");
    assert!(
        beside > 20 * alone,
        "{beside} ns beside one that does not yield"
    );

    let (mut w, mut timed, alone) = resync(256 << 10, 0);
    let end = w.now.0 + 1000 * MS;
    timed.run(&mut w, end, Some(2 * MS));
    let end = w.now.0 + 1000 * MS;
    let beside = mean(&timed.run(&mut w, end, Some(2 * MS)));
    assert!(
        beside < 3 * alone + 2 * MS,
        "{beside} ns, {alone} without a resync"
    );
    let held = source(&w).expect("it goes on");
    assert!(held.rate_limit.is_some() && held.left_bytes > 0, "{held:?}");
    // The application stops: full speed again.
    let before = source(&w).map_or(0, |s| s.done_bytes);
    let end = w.now.0 + 1200 * MS;
    timed.run(&mut w, end, None);
    let copied = source(&w).map_or(SIZE, |s| s.done_bytes) - before;
    assert!(copied > 8 << 20, "{copied} bytes in 1.2 s");
    let end = w.now.0 + 3000 * MS;
    timed.run(&mut w, end, None);
    assert!(w.settled(&[0, 1]) && w.up_to_date(1));
    assert!(w.nodes[0].disk.data == w.nodes[1].disk.data);
}

#[test]
fn it_never_starves_and_never_exceeds_its_bound() {
    // An application that never pauses, whose requests take long whatever the resync does.
    let min = 1 << 20;
    let (mut w, mut timed, _) = resync(min, 0);
    timed.size = 1 << 20;
    for _ in 0..4 {
        let before = source(&w).map_or(SIZE, |s| s.done_bytes);
        let end = w.now.0 + 1000 * MS;
        timed.run(&mut w, end, Some(0));
        let after = source(&w).map_or(SIZE, |s| s.done_bytes);
        let copied = after - before;
        assert!(
            copied >= min * 8 / 10 || after == SIZE,
            "{copied} bytes in a second"
        );
    }

    let (mut w, mut timed, _) = resync(min, 2 << 20);
    let end = w.now.0 + 4000 * MS;
    timed.run(&mut w, end, None);
    let done = source(&w).expect("it goes on");
    assert_eq!(done.rate_limit, Some(2 << 20));
    let expected = (7 << 20)..=(9 << 20);
    assert!(expected.contains(&done.done_bytes), "{done:?}");
}
