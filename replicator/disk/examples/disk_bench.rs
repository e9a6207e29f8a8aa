//! What the disk shell gets out of a file or device, to be held against fio:
//!
//! ```text
//! cargo run --release -p holdfast-disk --example disk_bench -- PATH [SECONDS] [SIZE_MIB]
//! fio --name=x --filename=PATH --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k --iodepth=32 --time_based --runtime=5
//! ```
//! PATH is created (and kept) if it does not exist. **A device or file named here is overwritten.**

use holdfast_disk::{Backing, BufPool, FileId, Op, OpenOptions, PoolOptions, Ring, RingOptions};
use std::path::Path;
use std::time::{Duration, Instant};

struct Shape {
    name: &'static str,
    len: u32,
    depth: u64,
    random: bool,
    fua: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args
        .next()
        .ok_or("usage: disk_bench PATH [SECONDS] [SIZE_MIB]")?;
    let seconds: f64 = args.next().map_or(Ok(3.0), |word| word.parse())?;
    let size: u64 = args.next().map_or(Ok(1024), |word| word.parse())?;
    let create = (!Path::new(&path).exists()).then_some(size << 20);
    let backing = Backing::open(
        &path,
        &OpenOptions {
            create_size: create,
            preallocate: true,
            ..OpenOptions::default()
        },
    )?;
    let pool = BufPool::new(PoolOptions::default())?;
    let ring = Ring::new(RingOptions::default(), &pool)?;
    println!(
        "{path}: {} MiB, sectors of {} bytes, {:?}",
        backing.size() >> 20,
        backing.sector_size(),
        ring.features()
    );
    let size = backing.size();
    let file = ring.attach(backing);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let fill = Shape {
        name: "1 MiB sequential write (fill, depth 8)",
        len: 1 << 20,
        depth: 8,
        random: false,
        fua: false,
    };
    // Unwritten extents cost a conversion at the first write; fio measures a laid-out file as well.
    measure(&runtime, &ring, &pool, file, &fill, size, None)?;
    for shape in [
        Shape {
            name: "4 KiB random write, depth 1",
            len: 4096,
            depth: 1,
            random: true,
            fua: false,
        },
        Shape {
            name: "4 KiB random write, depth 32",
            len: 4096,
            depth: 32,
            random: true,
            fua: false,
        },
        Shape {
            name: "4 KiB random write FUA, depth 32",
            len: 4096,
            depth: 32,
            random: true,
            fua: true,
        },
        Shape {
            name: "1 MiB sequential write, depth 8",
            len: 1 << 20,
            depth: 8,
            random: false,
            fua: false,
        },
    ] {
        measure(
            &runtime,
            &ring,
            &pool,
            file,
            &shape,
            size,
            Some(Duration::from_secs_f64(seconds)),
        )?;
    }
    Ok(())
}

fn measure(
    runtime: &tokio::runtime::Runtime,
    ring: &Ring,
    pool: &BufPool,
    file: FileId,
    shape: &Shape,
    size: u64,
    time: Option<Duration>,
) -> Result<(), Box<dyn std::error::Error>> {
    let places = size / u64::from(shape.len);
    let bytes = vec![0xa5; shape.len as usize];
    let buf = pool
        .copy_from(&bytes, holdfast_disk::Priority::Client)
        .ok_or("no buffer")?;
    let (mut seed, mut started, mut finished) = (1u64, 0u64, 0u64);
    let begin = Instant::now();
    let cpu = cpu_time();
    let mut latencies = Vec::with_capacity(1 << 20);
    let submit = |seed: &mut u64, started: &mut u64| {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let place = if shape.random {
            (*seed >> 20) % places
        } else {
            *started % places
        };
        ring.submit(
            Op::Write {
                file,
                offset: place * u64::from(shape.len),
                buf: buf.clone(),
                buf_offset: 0,
                len: shape.len,
                fua: shape.fua,
            },
            *started,
        );
        *started += 1;
    };
    runtime.block_on(async {
        let mut done = Vec::with_capacity(64);
        for _ in 0..shape.depth {
            submit(&mut seed, &mut started);
        }
        while finished < started {
            ring.ready().await;
            ring.poll_completions(&mut done);
            for completion in done.drain(..) {
                completion.result?;
                finished += 1;
                latencies.push(completion.took);
                if time.map_or(started < places, |time| begin.elapsed() < time) {
                    submit(&mut seed, &mut started);
                }
            }
        }
        Ok::<_, holdfast_disk::DiskError>(())
    })?;
    let took = begin.elapsed().as_secs_f64();
    latencies.sort_unstable();
    println!(
        "{:<40} {:>9.0} IOPS {:>7.0} MiB/s  p50 {:>6.1?} p99 {:>6.1?}  {:.1} µs CPU each",
        shape.name,
        finished as f64 / took,
        finished as f64 * f64::from(shape.len) / took / 1_048_576.0,
        latencies[latencies.len() / 2],
        latencies[latencies.len() * 99 / 100],
        (cpu_time() - cpu).as_secs_f64() * 1e6 / finished as f64,
    );
    Ok(())
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(clock.tv_sec as u64, clock.tv_nsec as u32)
}
