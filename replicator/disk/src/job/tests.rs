//! Answers that a healthy kernel seldom gives.

use super::*;
use crate::backing::{Backing, OpenOptions};

fn backing() -> (tempfile::TempDir, Backing) {
    let dir = tempfile::tempdir().expect("directory");
    let options = OpenOptions {
        create_size: Some(8 << 20),
        sector_size: Some(4096),
        ..OpenOptions::default()
    };
    let backing = Backing::open(dir.path().join("volume"), &options).expect("backing");
    (dir, backing)
}

const FILE: FileId = FileId { slot: 0, serial: 0 };

fn job(backing: &Backing, op: Op) -> Job {
    let job = Job::new(op, 1, backing.inner.clone(), Instant::now());
    job.expect("valid").expect("something to do")
}

/// Verb, offset, length.
type Steps = Vec<(Verb, u64, u64)>;

/// The steps, each answered by `answer`, and the result.
fn play(job: &mut Job, mut answer: impl FnMut(&Step) -> i32) -> (Steps, Result<(), DiskError>) {
    let mut steps = Vec::new();
    loop {
        let step = job.step();
        steps.push((step.verb, step.offset, step.len));
        assert!(steps.len() < 1000, "never ends");
        if let Progress::Done(result) = job.answer(answer(&step), Instant::now()) {
            return (steps, result);
        }
    }
}

fn full(step: &Step) -> i32 {
    if matches!(step.verb, Verb::Read | Verb::Write { .. }) {
        step.len as i32
    } else {
        0
    }
}

const PLAIN: Verb = Verb::Write { dsync: false };
const DURABLE: Verb = Verb::Write { dsync: true };

#[test]
fn interruptions_are_retried_a_bounded_number_of_times() {
    let (_dir, backing) = backing();
    let write = || Op::WriteBytes {
        file: FILE,
        offset: 0,
        data: AlignedBytes::zeroed(8192),
        fua: true,
    };
    let mut answers = [-libc::EINTR, -libc::EAGAIN, 4096, -libc::EAGAIN, 4096].into_iter();
    let mut waits = Vec::new();
    let (steps, result) = play(&mut job(&backing, write()), |step| {
        waits.push(step.force_async);
        answers.next().expect("no more steps")
    });
    assert_eq!(result, Ok(()));
    let (first, second) = ((DURABLE, 0, 8192), (DURABLE, 4096, 4096));
    assert_eq!(steps, [first, first, first, second, second]);
    assert_eq!(
        waits,
        [false, false, true, false, true],
        "after EAGAIN a worker waits"
    );

    let (steps, result) = play(&mut job(&backing, write()), |_| -libc::EAGAIN);
    assert_eq!(steps.len(), 101);
    assert_eq!(result.expect_err("gives up").errno(), Some(libc::EAGAIN));
}

#[test]
fn part_of_a_sector_is_transferred_again() {
    let (_dir, backing) = backing();
    let write = Op::WriteBytes {
        file: FILE,
        offset: 4096,
        data: AlignedBytes::zeroed(12288),
        fua: false,
    };
    let mut answers = [5000, 8192].into_iter();
    let (steps, result) = play(&mut job(&backing, write), |_| {
        answers.next().expect("no more steps")
    });
    assert_eq!(
        (steps, result),
        (vec![(PLAIN, 4096, 12288), (PLAIN, 8192, 8192)], Ok(()))
    );
}

#[test]
fn zeroing_falls_back_step_by_step_and_flushes_once() {
    let (_dir, backing) = backing();
    let mut caps = backing.inner.caps.get();
    (caps.block, caps.punch, caps.zero_range) = (65536, true, true);
    backing.inner.caps.set(caps);
    let zero = |fua| Op::Zero {
        file: FILE,
        offset: 61440,
        len: 1 << 20,
        unmap: true,
        fua,
    };
    let whole = (65536, 983040);

    let (steps, result) = play(&mut job(&backing, zero(true)), full);
    assert_eq!(result, Ok(()));
    let tail = (PLAIN, 1_048_576, 61440);
    assert_eq!(
        steps,
        [
            (PLAIN, 61440, 4096),
            (Verb::Punch, whole.0, whole.1),
            tail,
            (Verb::Sync, 1_110_016, 0)
        ]
    );

    let (steps, result) = play(&mut job(&backing, zero(false)), |step| match step.verb {
        Verb::Punch | Verb::ZeroRange => -libc::EOPNOTSUPP,
        _ => full(step),
    });
    assert_eq!(result, Ok(()));
    let tried = [
        (PLAIN, 61440, 4096),
        (Verb::Punch, whole.0, whole.1),
        (Verb::ZeroRange, whole.0, whole.1),
    ];
    assert_eq!(steps, [&tried[..], &[(PLAIN, 65536, 1_044_480)]].concat());
    assert!(backing.discard_zeroes(), "what was promised at open stays");

    // Known now: written at once, durable by itself.
    let (steps, _) = play(&mut job(&backing, zero(true)), full);
    assert_eq!(steps, [(DURABLE, 61440, 1 << 20)]);
    let long = Op::Zero {
        file: FILE,
        offset: 0,
        len: 3 << 20,
        unmap: false,
        fua: true,
    };
    let (steps, _) = play(&mut job(&backing, long), full);
    assert_eq!(
        steps.iter().map(|step| step.0).collect::<Vec<_>>(),
        [PLAIN, PLAIN, PLAIN, Verb::Sync]
    );
}

#[test]
fn the_first_error_ends_a_request() {
    let (_dir, backing) = backing();
    let zero = Op::Zero {
        file: FILE,
        offset: 4096,
        len: 4 << 20,
        unmap: true,
        fua: true,
    };
    let (steps, result) = play(&mut job(&backing, zero), |step| {
        if step.verb == Verb::Punch {
            -libc::EIO
        } else {
            full(step)
        }
    });
    assert_eq!(steps.len(), 1);
    assert_eq!(result.expect_err("EIO").kind, DiskErrorKind::Io(libc::EIO));
    let (_, result) = play(&mut job(&backing, Op::Flush { file: FILE }), |_| -libc::EIO);
    assert_eq!(result.expect_err("EIO").kind, DiskErrorKind::Io(libc::EIO));
    assert_eq!(backing.inner.flush_lost.get(), Some(libc::EIO));
}
