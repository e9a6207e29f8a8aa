//! Shared by the tests on real files and devices.
#![allow(dead_code, reason = "each test binary uses its part")]

use holdfast_disk::*;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

/// One disk filesystem and, where there is one, tmpfs: they answer inline or later, and know different calls.
pub fn places() -> Vec<(&'static str, TempDir)> {
    let mut places = vec![(
        "disk",
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary directory"),
    )];
    match tempfile::tempdir_in("/dev/shm") {
        Ok(dir) => places.push(("tmpfs", dir)),
        Err(error) => eprintln!("skipped on tmpfs: no /dev/shm here ({error})"),
    }
    places
}

pub fn disk_dir() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary directory")
}

pub fn create(path: &PathBuf, size: u64) -> Backing {
    let options = OpenOptions {
        create_size: Some(size),
        ..OpenOptions::default()
    };
    Backing::open(path, &options).expect("new backing")
}

pub fn pool() -> BufPool {
    BufPool::new(PoolOptions {
        bytes: 16 << 20,
        reserve: 0,
    })
    .expect("pool")
}

pub fn ring(pool: &BufPool) -> Ring {
    Ring::new(RingOptions::default(), pool).expect("ring")
}

/// Submits one request and blocks for its answer.
pub fn run(ring: &Ring, op: Op) -> Result<(), DiskError> {
    ring.submit(op, 77);
    let mut done = wait(ring, 1);
    assert_eq!(done[0].token, 77);
    done.remove(0).result
}

/// Blocks for exactly `count` completions.
pub fn wait(ring: &Ring, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    while done.len() < count {
        let got = ring.wait_completions(Duration::from_secs(30), &mut done);
        assert!(
            got > 0,
            "no completion in 30 s; {} in flight",
            ring.in_flight()
        );
    }
    assert_eq!(done.len(), count);
    done
}

pub fn buf(pool: &BufPool, bytes: &[u8]) -> Buf {
    pool.copy_from(bytes, Priority::Client)
        .expect("room in the pool")
}

pub fn write(
    ring: &Ring,
    pool: &BufPool,
    file: FileId,
    offset: u64,
    bytes: &[u8],
    fua: bool,
) -> Result<(), DiskError> {
    let len = bytes.len() as u32;
    let buf = buf(pool, bytes);
    run(
        ring,
        Op::Write {
            file,
            offset,
            buf,
            buf_offset: 0,
            len,
            fua,
        },
    )
}

pub fn read(
    ring: &Ring,
    pool: &BufPool,
    file: FileId,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, DiskError> {
    let mut buf = pool.try_alloc(len).expect("room in the pool");
    let target = buf.read_target().expect("unique");
    run(
        ring,
        Op::Read {
            file,
            offset,
            buf: target,
            buf_offset: 0,
            len: len as u32,
        },
    )?;
    Ok(buf.as_slice().to_vec())
}

/// Bytes that differ at every place and for every seed.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 512) as u8 ^ (i % 251) as u8 ^ seed)
        .collect()
}

/// Zeroes and discards at every kind of alignment, compared with a model after each.
pub fn zero_everywhere(ring: &Ring, pool: &BufPool, file: FileId, sector: u64) {
    let size = 2 << 20;
    let mut model = pattern(3, size);
    write(ring, pool, file, 0, &model, false).expect("fill");
    let ranges = [
        (0, sector),
        (sector, 3 * sector),
        (4096 - sector, 2 * sector + 4096),
        (200 * 1024 + sector, 300 * 1024),
        (700 * 1024, 256 * 1024),
        (1000 * 1024 + 3 * sector, 65536 + sector),
        (size as u64 - 5 * sector, 5 * sector),
    ];
    let discards = ring.backing(file).expect("attached").discard_zeroes();
    for (round, (offset, len)) in ranges.iter().cycle().take(ranges.len() * 5).enumerate() {
        let (offset, len) = (*offset, *len);
        let spot = offset as usize..(offset + len) as usize;
        let fresh = pattern(round as u8, spot.len());
        write(ring, pool, file, offset, &fresh, false).expect("rewrite");
        model[spot.clone()].copy_from_slice(&fresh);
        let op = match round / ranges.len() {
            0 => Op::Zero {
                file,
                offset,
                len,
                unmap: false,
                fua: false,
            },
            1 => Op::Zero {
                file,
                offset,
                len,
                unmap: true,
                fua: false,
            },
            2 => Op::Zero {
                file,
                offset,
                len,
                unmap: false,
                fua: true,
            },
            3 => Op::Zero {
                file,
                offset,
                len,
                unmap: true,
                fua: true,
            },
            _ => Op::Discard { file, offset, len },
        };
        if discards || !matches!(op, Op::Discard { .. }) {
            model[spot].fill(0);
        }
        let text = format!("{op:?}");
        run(ring, op).unwrap_or_else(|error| panic!("{text}: {error}"));
        let got = read(ring, pool, file, 0, size).expect("read back");
        if let Some(at) = (0..size).find(|i| got[*i] != model[*i]) {
            panic!("{text}: byte {at} is {} instead of {}", got[at], model[at]);
        }
    }
}
