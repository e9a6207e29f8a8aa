//! Rings, buffers and backings on real files.

mod common;

use common::*;
use holdfast_disk::*;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Instant;

#[test]
fn what_is_written_is_read_back() {
    for (name, dir) in places() {
        let (pool, path) = (pool(), dir.path().join("volume"));
        let ring = ring(&pool);
        let file = ring.attach(create(&path, 8 << 20));
        let bytes = pattern(1, 1 << 20);
        let source = buf(&pool, &bytes);
        run(
            &ring,
            Op::Write {
                file,
                offset: 8192,
                buf: source.clone(),
                buf_offset: 4096,
                len: 65536,
                fua: true,
            },
        )
        .expect(name);
        run(
            &ring,
            Op::WriteBytes {
                file,
                offset: 0,
                data: AlignedBytes::from(&bytes[..4096]),
                fua: true,
            },
        )
        .expect(name);
        run(&ring, Op::Flush { file }).expect(name);
        let got = read(&ring, &pool, file, 0, 8192 + 65536).expect(name);
        assert_eq!(got[..4096], bytes[..4096], "{name}");
        assert_eq!(got[4096..8192], [0; 4096], "{name}");
        assert_eq!(got[8192..], bytes[4096..4096 + 65536], "{name}");
        drop(ring);
        assert_eq!(
            &std::fs::read(&path).expect(name)[8192..][..65536],
            &bytes[4096..][..65536],
            "{name}"
        );
    }
}

#[test]
fn zeroes_and_discards_read_back_as_zeroes_whatever_their_alignment() {
    for (name, dir) in places() {
        let pool = pool();
        let ring = ring(&pool);
        let backing = create(&dir.path().join("volume"), 2 << 20);
        let sector = u64::from(backing.sector_size());
        assert!(backing.discard_zeroes(), "{name} punches holes");
        let file = ring.attach(backing);
        zero_everywhere(&ring, &pool, file, sector);
    }
}

#[test]
fn a_queue_deeper_than_the_ring_loses_nothing() {
    for (name, dir) in places() {
        let pool = pool();
        let ring = Ring::new(
            RingOptions {
                entries: 4,
                register_buffers: false,
            },
            &pool,
        )
        .expect("ring");
        let file = ring.attach(create(&dir.path().join("volume"), 8 << 20));
        for block in 0..2000u64 {
            let data = AlignedBytes::from(pattern(block as u8, 4096).as_slice());
            ring.push(
                Op::WriteBytes {
                    file,
                    offset: block * 4096,
                    data,
                    fua: false,
                },
                block,
            );
        }
        assert_eq!(ring.in_flight(), 2000, "{name}");
        let _ = ring.flush_submissions();
        let done = wait(&ring, 2000);
        assert!(
            done.iter().all(|completion| completion.result.is_ok()),
            "{name}"
        );
        assert_eq!(
            done.iter()
                .map(|completion| completion.token)
                .collect::<HashSet<_>>()
                .len(),
            2000,
            "{name}"
        );
        assert_eq!(ring.oldest_in_flight(Instant::now()), None);
        for block in [0, 3, 999, 1999u64] {
            assert_eq!(
                read(&ring, &pool, file, block * 4096, 4096).expect(name),
                pattern(block as u8, 4096),
                "{name} {block}"
            );
        }
    }
}

#[test]
fn requests_that_cannot_be_right_are_refused_with_the_reason() {
    let dir = disk_dir();
    let (pool, other_pool) = (pool(), pool());
    let ring = ring(&pool);
    let size = 1 << 20;
    let path = dir.path().join("volume");
    let file = ring.attach(create(&path, size));
    let sector = ring.backing(file).expect("attached").sector_size();
    let kind = |op| run(&ring, op).expect_err("refused").kind;
    let source = buf(&pool, &[1; 8192]);
    let at = |offset, buf_offset, len| Op::Write {
        file,
        offset,
        buf: source.clone(),
        buf_offset,
        len,
        fua: false,
    };
    assert_eq!(
        kind(at(size - 4096, 0, 8192)),
        DiskErrorKind::BeyondEnd { size }
    );
    assert_eq!(
        kind(at(u64::MAX - 4095, 0, 4096)),
        DiskErrorKind::BeyondEnd { size }
    );
    assert_eq!(kind(at(100, 0, 4096)), DiskErrorKind::Misaligned { sector });
    assert_eq!(kind(at(0, 0, 100)), DiskErrorKind::Misaligned { sector });
    assert_eq!(kind(at(0, 0, 0)), DiskErrorKind::Misaligned { sector });
    assert_eq!(
        kind(at(0, 8192 - sector as usize, 4096)),
        DiskErrorKind::Invalid
    );
    let foreign = buf(&other_pool, &[1; 4096]);
    assert_eq!(
        kind(Op::Write {
            file,
            offset: 0,
            buf: foreign,
            buf_offset: 0,
            len: 4096,
            fua: false
        }),
        DiskErrorKind::Invalid
    );
    assert_eq!(
        kind(Op::Zero {
            file,
            offset: 0,
            len: size + 4096,
            unmap: true,
            fua: false
        }),
        DiskErrorKind::BeyondEnd { size }
    );

    drop(ring.detach(file).expect("idle"));
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let reader = ring.attach(Backing::open(&path, &options).expect("open for reading"));
    assert_eq!(
        kind(Op::Write {
            file,
            offset: 0,
            buf: source.clone(),
            buf_offset: 0,
            len: 4096,
            fua: false
        }),
        DiskErrorKind::Invalid,
        "a stale id"
    );
    assert_eq!(
        kind(Op::Zero {
            file: reader,
            offset: 0,
            len: 4096,
            unmap: false,
            fua: false
        }),
        DiskErrorKind::ReadOnly
    );
    assert_eq!(
        read(&ring, &pool, reader, 0, 4096).expect("read"),
        [0; 4096]
    );
}

#[test]
fn the_error_names_what_happened_and_where() {
    let dir = disk_dir();
    let pool = pool();
    let ring = ring(&pool);
    let path = dir.path().join("volume");
    let file = ring.attach(create(&path, 1 << 20));
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open")
        .set_len(8192)
        .expect("shrink");
    let mut into = pool.try_alloc(16384).expect("room");
    let target = into.read_target().expect("unique");
    let error = run(
        &ring,
        Op::Read {
            file,
            offset: 0,
            buf: target,
            buf_offset: 0,
            len: 16384,
        },
    )
    .expect_err("the file shrank");
    assert_eq!(error.kind, DiskErrorKind::BeyondEnd { size: 8192 });
    assert_eq!(
        error.to_string(),
        format!(
            "read of 16384 bytes at 8192 of {} failed: the backing ends at 8192",
            path.display()
        )
    );
}

#[test]
fn the_lock_keeps_others_out_until_the_last_handle_is_gone() {
    for (name, dir) in places() {
        let path = dir.path().join("volume");
        let pool = pool();
        let ring = ring(&pool);
        let file = ring.attach(create(&path, 1 << 20));
        let refused = |options: &OpenOptions| match Backing::open(&path, options) {
            Err(OpenError::Locked {
                path: named,
                holder,
            }) => {
                assert_eq!(named, path);
                assert!(
                    holder.contains(&std::process::id().to_string()),
                    "{name}: {holder:?}"
                );
            }
            other => panic!("{name}: {other:?}"),
        };
        refused(&OpenOptions::default());
        refused(&OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        });
        let backing = ring.detach(file).expect("idle");
        refused(&OpenOptions::default());
        drop(backing);
        let reading = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let readers = [
            Backing::open(&path, &reading).expect(name),
            Backing::open(&path, &reading).expect(name),
        ];
        assert_eq!(readers[0].identity(), readers[1].identity());
        refused(&OpenOptions::default());
    }
}

#[test]
fn opening_says_what_is_wrong_and_changes_nothing() {
    let dir = disk_dir();
    let path = dir.path().join("volume");
    drop(create(&path, 1 << 20));
    let again = Backing::open(
        &path,
        &OpenOptions {
            create_size: Some(4096),
            ..OpenOptions::default()
        },
    );
    assert!(
        matches!(again, Err(OpenError::AlreadyExists { .. })),
        "{again:?}"
    );
    assert_eq!(
        std::fs::metadata(&path).expect("still there").len(),
        1 << 20
    );
    assert!(matches!(
        Backing::open(dir.path().join("none"), &OpenOptions::default()),
        Err(OpenError::Open { .. })
    ));
    assert!(matches!(
        Backing::open(dir.path(), &OpenOptions::default()),
        Err(OpenError::WrongKind {
            found: "a directory",
            ..
        })
    ));
    assert!(matches!(
        Backing::open("/dev/null", &OpenOptions::default()),
        Err(OpenError::WrongKind { .. })
    ));
    let small = dir.path().join("small");
    std::fs::write(&small, [0; 100]).expect("write");
    assert!(matches!(
        Backing::open(&small, &OpenOptions::default()),
        Err(OpenError::Empty { .. })
    ));
    let tiny = dir.path().join("tiny");
    let failed = Backing::open(
        &tiny,
        &OpenOptions {
            create_size: Some(10),
            ..OpenOptions::default()
        },
    );
    assert!(
        failed.is_err() && !tiny.exists(),
        "a file that could not be used is not left behind"
    );
    let impossible = dir.path().join("impossible");
    let failed = Backing::open(
        &impossible,
        &OpenOptions {
            create_size: Some(1 << 60),
            preallocate: true,
            ..OpenOptions::default()
        },
    );
    assert!(matches!(failed, Err(OpenError::Create { .. })) && !impossible.exists());
    let wrong = OpenOptions {
        sector_size: Some(256),
        ..OpenOptions::default()
    };
    assert!(matches!(
        Backing::open(&path, &wrong),
        Err(OpenError::SectorSize { .. })
    ));
    let coarse = OpenOptions {
        sector_size: Some(4096),
        ..OpenOptions::default()
    };
    assert_eq!(
        Backing::open(&path, &coarse)
            .expect("4096 on top of 512")
            .sector_size(),
        4096
    );
}

#[test]
fn the_kernel_keeps_its_buffer_when_the_caller_lets_go() {
    let dir = disk_dir();
    let pool = pool();
    let ring = ring(&pool);
    let file = ring.attach(create(&dir.path().join("volume"), 8 << 20));
    let before = pool.used();
    for piece in 0..8 {
        let mut source = buf(&pool, &pattern(9, 1 << 20));
        ring.push(
            Op::Write {
                file,
                offset: piece << 20,
                buf: source.clone(),
                buf_offset: 0,
                len: 1 << 20,
                fua: true,
            },
            piece,
        );
        assert!(
            source.get_mut().is_none(),
            "immutable while the disk reads it"
        );
    }
    assert_eq!(
        pool.used(),
        before + (8 << 20),
        "dropped by the caller, held for the disk"
    );
    assert!(matches!(
        ring.detach(file),
        Err(CloseError::Busy { requests: 8, .. })
    ));
    let _ = ring.flush_submissions();
    wait(&ring, 8);
    assert_eq!(pool.used(), before);
    ring.detach(file).expect("idle now");
}

#[test]
fn dropping_a_ring_waits_for_what_the_kernel_has() {
    let dir = disk_dir();
    let path = dir.path().join("volume");
    let pool = pool();
    drop(create(&path, 8 << 20));
    for round in 0..20u8 {
        let ring = ring(&pool);
        let file = ring.attach(
            Backing::open(&path, &OpenOptions::default()).expect("unlocked by the drop before"),
        );
        for piece in 0..8 {
            let source = buf(&pool, &[round; 1 << 20]);
            ring.submit(
                Op::Write {
                    file,
                    offset: piece << 20,
                    buf: source,
                    buf_offset: 0,
                    len: 1 << 20,
                    fua: true,
                },
                piece,
            );
        }
        let mut target = pool.try_alloc(1 << 20).expect("room");
        let reading = target.read_target().expect("unique");
        ring.submit(
            Op::Read {
                file,
                offset: 0,
                buf: reading,
                buf_offset: 0,
                len: 1 << 20,
            },
            99,
        );
        drop(ring);
        assert!(
            !target.is_being_read_into(),
            "nothing is under way any more"
        );
        drop(target);
        assert_eq!(pool.used(), 0);
        assert!(
            std::fs::read(&path)
                .expect("read")
                .iter()
                .all(|byte| *byte == round),
            "submitted writes were carried out"
        );
    }
}

#[tokio::test(flavor = "current_thread")]
async fn waiting_wakes_for_completions_of_the_kernel_and_for_refusals() {
    for (name, dir) in places() {
        let pool = pool();
        let ring = Rc::new(ring(&pool));
        let file = ring.attach(create(&dir.path().join("volume"), 1 << 20));
        let local = tokio::task::LocalSet::new();
        let collector = local.spawn_local({
            let ring = ring.clone();
            async move {
                let mut done = Vec::new();
                while done.len() < 300 {
                    ring.ready().await;
                    assert!(ring.poll_completions(&mut done) > 0, "ready means ready");
                }
                done
            }
        });
        local
            .run_until(async {
                for token in 0..300u64 {
                    // Every third is refused at once, without the kernel.
                    let offset = if token % 3 == 0 {
                        1 << 40
                    } else {
                        token / 3 * 4096 % (1 << 20)
                    };
                    let data = AlignedBytes::from([5; 4096].as_slice());
                    ring.submit(
                        Op::WriteBytes {
                            file,
                            offset,
                            data,
                            fua: token % 2 == 0,
                        },
                        token,
                    );
                    if token % 7 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                let done = tokio::time::timeout(std::time::Duration::from_secs(30), collector)
                    .await
                    .expect(name)
                    .expect(name);
                assert_eq!(
                    done.iter()
                        .filter(|completion| completion.result.is_err())
                        .count(),
                    100,
                    "{name}"
                );
            })
            .await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_file_grows_and_the_new_part_is_usable_only_when_adopted() {
    for (name, dir) in places() {
        let path = dir.path().join("volume");
        let pool = pool();
        let ring = ring(&pool);
        let file = ring.attach(create(&path, 1 << 20));
        let backing = ring.backing(file).expect("attached");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("open")
            .set_len((2 << 20) + 100)
            .expect("grow");
        assert_eq!(
            (backing.size(), backing.current_size().expect(name)),
            (1 << 20, 2 << 20),
            "{name}"
        );
        assert!(write(&ring, &pool, file, 1 << 20, &[1; 4096], false).is_err());
        assert_eq!(backing.adopt_size().expect(name), 2 << 20);
        write(&ring, &pool, file, 1 << 20, &[1; 4096], false).expect(name);
        assert_eq!(backing.grow(4 << 20, true).await.expect(name), 4 << 20);
        write(&ring, &pool, file, (4 << 20) - 4096, &[1; 4096], true).expect(name);
        assert_eq!(
            backing.grow(1 << 20, false).await.expect(name),
            4 << 20,
            "never shrinks"
        );
    }
}

#[test]
fn the_start_up_path_reads_at_any_alignment_and_writes_whole_sectors() {
    for (name, dir) in places() {
        let backing = create(&dir.path().join("volume"), 4 << 20);
        let bytes = pattern(4, 3 << 20);
        backing.write_all_at(4096, &bytes).expect(name);
        backing.sync().expect(name);
        for (offset, len) in [
            (4096, 3 << 20),
            (4097, 1),
            (5000, 2 << 20),
            (4096 + (3 << 20) - 7, 7),
            (0, 0),
        ] {
            let mut got = vec![0; len];
            backing.read_exact_at(offset, &mut got).expect(name);
            assert!(
                len == 0 || got == bytes[offset as usize - 4096..][..len],
                "{name} {offset} {len}"
            );
        }
        let kind = |result: Result<(), DiskError>| result.expect_err("refused").kind;
        assert!(matches!(
            kind(backing.write_all_at(100, &[0; 4096])),
            DiskErrorKind::Misaligned { .. }
        ));
        assert!(matches!(
            kind(backing.write_all_at(4 << 20, &[0; 4096])),
            DiskErrorKind::BeyondEnd { .. }
        ));
        assert!(matches!(
            kind(backing.read_exact_at((4 << 20) - 1, &mut [0; 2])),
            DiskErrorKind::BeyondEnd { .. }
        ));
    }
}

#[test]
fn several_reads_fill_one_buffer() {
    let dir = disk_dir();
    let pool = pool();
    let ring = ring(&pool);
    let file = ring.attach(create(&dir.path().join("volume"), 1 << 20));
    let bytes = pattern(8, 1 << 20);
    write(&ring, &pool, file, 0, &bytes, false).expect("fill");
    let mut into = pool.try_alloc(65536).expect("room");
    let target = into.read_target().expect("unique");
    ring.submit_batch((0..16u64).map(|piece| {
        let op = Op::Read {
            file,
            offset: (15 - piece) * 4096,
            buf: target.clone(),
            buf_offset: piece as usize * 4096,
            len: 4096,
        };
        (op, piece)
    }));
    drop(target);
    wait(&ring, 16);
    for (piece, got) in into.as_slice().chunks(4096).enumerate() {
        assert_eq!(got, &bytes[(15 - piece) * 4096..][..4096]);
    }
}

const CHILD: &str = "HOLDFAST_DISK_TEST_CHILD";

/// In a process of its own, started by the test below: writes without end and says so.
#[test]
fn child_that_writes_until_killed() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let pool = pool();
    let ring = ring(&pool);
    let file = ring.attach(Backing::open(path, &OpenOptions::default()).expect("open"));
    let source = buf(&pool, &[1; 1 << 20]);
    let submit = |token: u64| {
        let offset = (token % 8) << 20;
        ring.submit(
            Op::Write {
                file,
                offset,
                buf: source.clone(),
                buf_offset: 0,
                len: 1 << 20,
                fua: true,
            },
            token,
        );
    };
    (0..8).for_each(submit);
    println!("writing");
    let mut done = Vec::new();
    loop {
        ring.wait_completions(std::time::Duration::from_secs(1), &mut done);
        done.drain(..)
            .for_each(|completion| submit(completion.token));
    }
}

#[test]
fn after_a_kill_the_next_process_gets_the_lock_once_the_requests_are_gone() {
    use std::io::{BufRead, BufReader};
    let dir = disk_dir();
    let path = dir.path().join("volume");
    drop(create(&path, 8 << 20));
    for _ in 0..5 {
        let mut child = std::process::Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "child_that_writes_until_killed", "--nocapture"])
            .env(CHILD, &path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("child");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        assert!(
            out.lines()
                .any(|line| line.is_ok_and(|line| line.contains("writing"))),
            "the child got to work"
        );
        assert!(matches!(
            Backing::open(&path, &OpenOptions::default()),
            Err(OpenError::Locked { .. })
        ));
        child.kill().expect("kill");
        child.wait().expect("wait");
        let patient = OpenOptions {
            lock_wait: std::time::Duration::from_secs(30),
            ..OpenOptions::default()
        };
        let backing = Backing::open(&path, &patient).expect("the lock ends with the requests");
        // Nothing of the dead process lands from here on.
        backing.write_all_at(0, &[0; 65536]).expect("write");
        let mut got = vec![1; 65536];
        backing.read_exact_at(0, &mut got).expect("read");
        assert!(got.iter().all(|byte| *byte == 0));
    }
}

/// Small transfers of a file in memory are over when they are handed over, with all that is promised of them; large ones and
/// those of a disk are not waited for.
#[test]
fn small_transfers_in_memory_are_carried_out_in_place() {
    let Some((_, dir)) = places().into_iter().find(|(name, _)| *name == "tmpfs") else {
        return;
    };
    let pool = pool();
    let ring = ring(&pool);
    let file = ring.attach(create(&dir.path().join("volume"), 8 << 20));
    let mut done = Vec::new();
    for (number, fua) in [(0, false), (1, true)] {
        let data = pattern(number as u8 + 1, 256 << 10);
        let op = Op::Write {
            file,
            offset: number * (256 << 10),
            buf: buf(&pool, &data),
            buf_offset: 0,
            len: 256 << 10,
            fua,
        };
        ring.push(op, number);
    }
    ring.push(Op::Flush { file }, 2);
    assert_eq!(ring.poll_completions(&mut done), 3);
    assert!(done.iter().all(|completion| completion.result.is_ok()));
    assert_eq!(pool.used(), 0, "buffers are free with the answer");
    for number in 0..2 {
        let found = read(&ring, &pool, file, number * (256 << 10), 256 << 10).expect("read");
        assert_eq!(found, pattern(number as u8 + 1, 256 << 10));
    }
    // Nobody is woken for what is over at the hand-over: it says so.
    ring.push(Op::Flush { file }, 3);
    assert!(ring.flush_submissions());
    assert_eq!(wait(&ring, 1)[0].token, 3);
    let large = Op::Write {
        file,
        offset: 0,
        buf: buf(&pool, &pattern(5, 1 << 20)),
        buf_offset: 0,
        len: 1 << 20,
        fua: false,
    };
    ring.push(large, 4);
    let _ = ring.flush_submissions();
    assert_eq!(wait(&ring, 1)[0].token, 4);
    assert_eq!(
        read(&ring, &pool, file, 0, 1 << 20).expect("read"),
        pattern(5, 1 << 20)
    );
}
