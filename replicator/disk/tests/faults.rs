//! The fault layer, and the code above it when the disk misbehaves. Run with `--features fault-injection`.

mod common;

use common::*;
use holdfast_disk::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
    pool: BufPool,
    ring: Ring,
    file: FileId,
    control: Control,
}

struct Control(BufReader<UnixStream>);

impl Control {
    fn to(socket: &Path) -> Control {
        Control(BufReader::new(
            UnixStream::connect(socket).expect("control socket"),
        ))
    }

    fn ask(&mut self, line: &str) -> String {
        self.0
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .expect("send");
        let mut reply = String::new();
        self.0.read_line(&mut reply).expect("reply");
        reply.trim_end().to_string()
    }

    fn tell(&mut self, line: &str) {
        assert_eq!(self.ask(line), "ok", "{line}");
    }
}

const SIZE: u64 = 4 << 20;

fn faulty(path: &Path) -> (Backing, Control) {
    let socket = path.with_extension("sock");
    let options = OpenOptions {
        create_size: (!path.exists()).then_some(SIZE),
        fault_control: Some(socket.clone()),
        lock_wait: Duration::from_secs(10),
        ..OpenOptions::default()
    };
    let backing = Backing::open(path, &options).expect("open");
    (backing, Control::to(&socket))
}

fn disk() -> Disk {
    let dir = disk_dir();
    let path = dir.path().join("volume");
    let (backing, control) = faulty(&path);
    let pool = pool();
    let ring = ring(&pool);
    let file = ring.attach(backing);
    Disk {
        _dir: dir,
        path,
        pool,
        ring,
        file,
        control,
    }
}

impl Disk {
    fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> Result<(), DiskError> {
        write(&self.ring, &self.pool, self.file, offset, bytes, fua)
    }
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        read(&self.ring, &self.pool, self.file, offset, len).expect("read")
    }
    fn flush(&self) -> Result<(), DiskError> {
        run(&self.ring, Op::Flush { file: self.file })
    }
    fn in_file(&self, offset: usize, len: usize) -> Vec<u8> {
        std::fs::read(&self.path).expect("read the file")[offset..offset + len].to_vec()
    }
}

#[test]
fn unflushed_writes_are_seen_by_reads_and_not_by_the_file() {
    let disk = disk();
    disk.write(4096, &pattern(1, 8192), false).expect("write");
    assert_eq!(disk.read(4096, 8192), pattern(1, 8192));
    assert_eq!(disk.in_file(4096, 8192), [0; 8192]);
    disk.write(16384, &pattern(2, 4096), true).expect("FUA");
    assert_eq!(
        disk.in_file(16384, 4096),
        pattern(2, 4096),
        "FUA is durable by itself"
    );
    assert_eq!(
        disk.in_file(4096, 8192),
        [0; 8192],
        "and makes nothing else durable"
    );
    disk.flush().expect("flush");
    assert_eq!(disk.in_file(4096, 8192), pattern(1, 8192));
}

#[test]
fn zeroes_go_through_the_same_cache() {
    let disk = disk();
    zero_everywhere(&disk.ring, &disk.pool, disk.file, 512);
    disk.write(0, &[9; 131072], true).expect("FUA");
    run(
        &disk.ring,
        Op::Zero {
            file: disk.file,
            offset: 512,
            len: 130048,
            unmap: true,
            fua: false,
        },
    )
    .expect("zero");
    assert_eq!(disk.in_file(0, 131072), [9; 131072]);
    run(
        &disk.ring,
        Op::Zero {
            file: disk.file,
            offset: 512,
            len: 130048,
            unmap: true,
            fua: true,
        },
    )
    .expect("zero");
    assert_eq!(disk.in_file(512, 130048), vec![0; 130048]);
}

#[test]
fn short_transfers_are_continued_to_the_end() {
    let mut disk = disk();
    disk.control.tell("short any 1536");
    let bytes = pattern(5, 65536);
    disk.write(4096, &bytes, false).expect("write");
    disk.write(131072, &bytes, true).expect("FUA write");
    assert_eq!(disk.read(4096, 65536), bytes);
    assert_eq!(disk.in_file(131072, 65536), bytes);
    disk.control.tell("heal");
    assert_eq!(disk.read(4096, 65536), bytes);
    // Never even one sector: an error in the end, not a loop.
    disk.control.tell("short write 100");
    assert_eq!(
        disk.write(0, &bytes, false).expect_err("stuck").kind,
        DiskErrorKind::Io(libc::EIO)
    );
}

#[test]
fn an_error_in_the_middle_is_not_covered_by_a_success_before_or_after() {
    let mut disk = disk();
    disk.control.tell("short write 4096");
    disk.control.tell("eio write 12288 4096 times 1");
    let error = disk
        .write(4096, &pattern(1, 65536), false)
        .expect_err("the third piece fails");
    assert_eq!(
        (error.kind, error.offset, error.len),
        (DiskErrorKind::Io(libc::EIO), 12288, 65536)
    );
    disk.control.tell("heal");
    disk.write(4096, &pattern(1, 65536), false)
        .expect("an error of a write is the request's own");

    disk.control.tell("enospc write 0 4096");
    assert_eq!(
        disk.write(0, &[1; 4096], false).expect_err("full").kind,
        DiskErrorKind::NoSpace
    );
    disk.write(8192, &[1; 4096], true).expect("elsewhere");
    disk.control.tell("eio read 8192 512");
    let mut into = disk.pool.try_alloc(4096).expect("room");
    let target = into.read_target().expect("unique");
    let op = Op::Read {
        file: disk.file,
        offset: 8192,
        buf: target,
        buf_offset: 0,
        len: 4096,
    };
    assert_eq!(
        run(&disk.ring, op).expect_err("unreadable").errno(),
        Some(libc::EIO)
    );
}

#[test]
fn a_lost_flush_is_never_forgotten() {
    for command in ["eio flush times 1", "eio write 0 4096 times 1"] {
        let mut disk = disk();
        disk.write(65536, &[1; 4096], false).expect("write");
        disk.control.tell(command);
        let first = if command.contains("flush") {
            disk.flush()
        } else {
            disk.write(0, &[1; 4096], true)
        };
        assert_eq!(
            first.expect_err("commanded").kind,
            DiskErrorKind::Io(libc::EIO)
        );
        let lost = DiskErrorKind::FlushLost(libc::EIO);
        assert_eq!(
            disk.flush().expect_err("still lost").kind,
            lost,
            "{command}"
        );
        assert_eq!(
            disk.write(0, &[1; 4096], true)
                .expect_err("still lost")
                .kind,
            lost
        );
        let zero = Op::Zero {
            file: disk.file,
            offset: 0,
            len: 4096,
            unmap: false,
            fua: true,
        };
        assert_eq!(run(&disk.ring, zero).expect_err("still lost").kind, lost);
        disk.write(0, &[1; 4096], false).expect("promises nothing");
        let backing = disk.ring.detach(disk.file).expect("idle");
        assert_eq!(backing.sync().expect_err("still lost").kind, lost);
    }
}

#[test]
fn flushes_under_way_when_one_is_lost_fail_too() {
    let mut disk = disk();
    disk.control.tell("hang flush");
    disk.ring.submit(Op::Flush { file: disk.file }, 1);
    disk.ring.submit(Op::Flush { file: disk.file }, 2);
    disk.control.tell("eio flush times 1");
    disk.control.tell("release");
    let done = wait(&disk.ring, 2);
    assert!(
        done.iter().all(|completion| completion.result.is_err()),
        "{done:?}"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_hung_disk_is_noticed_keeps_its_buffers_and_its_lock() {
    let mut disk = disk();
    disk.control.tell("hang write 0 8192");
    let before = disk.pool.used();
    let bytes = buf(&disk.pool, &pattern(1, 8192));
    disk.ring.submit(
        Op::Write {
            file: disk.file,
            offset: 0,
            buf: bytes,
            buf_offset: 0,
            len: 8192,
            fua: false,
        },
        5,
    );
    disk.write(8192, &[2; 4096], false).expect("others go on");
    assert_eq!(
        disk.pool.used(),
        before + 8192,
        "the buffer of the hung write stays"
    );
    let later = Instant::now() + Duration::from_secs(60);
    assert!(disk.ring.oldest_in_flight(later).expect("one in flight") >= Duration::from_secs(60));
    let (token, age) = disk
        .ring
        .oldest_of(disk.file, later)
        .expect("one in flight");
    assert!(token == 5 && age >= Duration::from_secs(60));
    assert!(matches!(
        disk.ring.detach(disk.file),
        Err(CloseError::Busy { requests: 1, .. })
    ));
    assert!(matches!(
        Backing::open(&disk.path, &OpenOptions::default()),
        Err(OpenError::Locked { .. })
    ));

    // The release comes from another thread while this one waits.
    let mut control = Control::to(&disk.path.with_extension("sock"));
    let releaser = std::thread::spawn(move || control.tell("release"));
    tokio::time::timeout(Duration::from_secs(30), disk.ring.ready())
        .await
        .expect("woken by the release");
    releaser.join().expect("released");
    let mut done = Vec::new();
    disk.ring.poll_completions(&mut done);
    assert!(done.len() == 1 && done[0].token == 5 && done[0].result.is_ok());
    assert_eq!(disk.pool.used(), before);
    assert_eq!(disk.read(0, 8192), pattern(1, 8192));
    disk.ring.detach(disk.file).expect("idle");
}

#[test]
fn closing_is_no_power_cut() {
    let mut disk = disk();
    assert_eq!(
        disk.control.ask("nonsense"),
        "error unknown command \"nonsense\""
    );
    assert!(disk.control.ask("eio sideways").starts_with("error"));
    disk.write(0, &pattern(1, 4096), false).expect("write");
    let status = disk.control.ask("status");
    assert!(
        status.starts_with("ok unflushed=8 held=0 rules=0 reads=0 writes=1"),
        "{status}"
    );
    drop(disk.ring.detach(disk.file).expect("idle"));
    assert_eq!(disk.in_file(0, 4096), pattern(1, 4096));
    assert_eq!(disk.control.ask("status"), "error the disk is closed");
    let (backing, mut control) = faulty(&disk.path);
    control.tell("cache off");
    backing
        .write_all_at(4096, &pattern(2, 4096))
        .expect("write");
    assert_eq!(disk.in_file(4096, 4096), pattern(2, 4096));
}

const CHILD: &str = "HOLDFAST_DISK_TEST_CHILD";

/// In a process of its own, started by the test below. Two disks; flushed, FUA, un-flushed and hung writes on both.
#[test]
fn child_that_loses_power() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let seed = std::env::var("HOLDFAST_DISK_TEST_SEED").expect("seed");
    let pool = pool();
    let ring = ring(&pool);
    let mut controls = Vec::new();
    for name in ["a", "b"] {
        let (backing, mut control) = faulty(&dir.join(name));
        let file = ring.attach(backing);
        write(&ring, &pool, file, 0, &[1; 65536], false).expect("write");
        run(&ring, Op::Flush { file }).expect("flush");
        write(&ring, &pool, file, 0, &[2; 32768], false).expect("un-flushed");
        write(&ring, &pool, file, 0, &[3; 16384], false).expect("un-flushed, again");
        write(&ring, &pool, file, 65536, &[4; 4096], true).expect("FUA");
        control.tell("hang write");
        let held = buf(&pool, &[5; 8192]);
        ring.submit(
            Op::Write {
                file,
                offset: 131072,
                buf: held,
                buf_offset: 0,
                len: 8192,
                fua: true,
            },
            1,
        );
        controls.push(control);
    }
    println!("cutting");
    // One disk is told; the machine loses power as a whole.
    controls[0].ask(&format!("powercut {seed}"));
    println!("still alive");
}

#[test]
fn a_power_cut_loses_a_subset_of_what_was_not_flushed_and_nothing_else() {
    let (mut lost, mut kept, mut torn, mut older, mut held_landed) = (0, 0, 0, 0, 0);
    for seed in (0..24)
        .map(|seed| seed.to_string())
        .chain(["all".to_string()])
    {
        let dir = disk_dir();
        let child = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "child_that_loses_power", "--nocapture"])
            .env(CHILD, dir.path())
            .env("HOLDFAST_DISK_TEST_SEED", &seed)
            .stdout(Stdio::piped())
            .output()
            .expect("child");
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(
            said.contains("cutting") && !said.contains("still alive") && !child.status.success(),
            "{said}"
        );
        for name in ["a", "b"] {
            let bytes = std::fs::read(dir.path().join(name)).expect("read");
            let sectors: Vec<&[u8]> = bytes.chunks(512).collect();
            assert!(
                sectors
                    .iter()
                    .all(|sector| sector.iter().all(|byte| *byte == sector[0])),
                "no sector is torn"
            );
            let values: Vec<u8> = sectors.iter().map(|sector| sector[0]).collect();
            assert!(
                values[..32].iter().all(|value| [1, 2, 3].contains(value)),
                "{values:?}"
            );
            assert!(values[32..64].iter().all(|value| [1, 2].contains(value)));
            assert!(values[64..128].iter().all(|value| *value == 1), "flushed");
            assert!(values[128..136].iter().all(|value| *value == 4), "FUA");
            assert!(values[136..256].iter().all(|value| *value == 0));
            assert!(
                values[256..272].iter().all(|value| [0, 5].contains(value)),
                "in flight: any part of it"
            );
            if seed == "all" {
                assert!(
                    values[..64].iter().all(|value| *value == 1)
                        && values[256..272].iter().all(|value| *value == 0)
                );
            }
            lost += values[..64].iter().filter(|value| **value == 1).count();
            kept += values[..32].iter().filter(|value| **value == 3).count();
            older += values[..32].iter().filter(|value| **value == 2).count();
            torn += values[32..64]
                .chunks(8)
                .filter(|block| block.contains(&1) && block.contains(&2))
                .count();
            held_landed += values[256..272].iter().filter(|value| **value == 5).count();
        }
    }
    assert!(
        lost > 0 && kept > 0 && torn > 0 && older > 0 && held_landed > 0,
        "{lost} {kept} {torn} {older} {held_landed}"
    );
}

mod model {
    use super::*;
    use proptest::prelude::*;

    const SECTORS: u64 = 512;

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u64, u8, bool),
        Zero(u64, u64, bool, bool),
        Discard(u64, u64),
        Flush,
        Read(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = || (0..SECTORS, 1u64..200).prop_map(|(at, len)| (at, len.min(SECTORS - at)));
        prop_oneof![
            4 => (range(), any::<u8>(), any::<bool>()).prop_map(|((at, len), fill, fua)| Step::Write(at, len, fill, fua)),
            2 => (range(), any::<bool>(), any::<bool>()).prop_map(|((at, len), unmap, fua)| Step::Zero(at, len, unmap, fua)),
            1 => range().prop_map(|(at, len)| Step::Discard(at, len)),
            1 => Just(Step::Flush),
            3 => range().prop_map(|(at, len)| Step::Read(at, len)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        /// Reads see the last write whatever is short, cached, flushed or zeroed; the file has it after a flush.
        #[test]
        fn reads_see_the_last_write(steps in prop::collection::vec(step(), 1..60), short in 512u64..20_000) {
            let mut disk = disk();
            disk.control.tell(&format!("short any {short}"));
            let file = disk.file;
            let mut model = vec![0; (SECTORS * 512) as usize];
            let mut durable = model.clone();
            for step in steps {
                let spot = |at: u64, len: u64| (at * 512) as usize..((at + len) * 512) as usize;
                let mut must_be_durable = None;
                match step {
                    Step::Write(at, len, fill, fua) => {
                        let bytes = pattern(fill, (len * 512) as usize);
                        disk.write(at * 512, &bytes, fua).expect("write");
                        model[spot(at, len)].copy_from_slice(&bytes);
                        must_be_durable = fua.then(|| spot(at, len));
                    }
                    Step::Zero(at, len, unmap, fua) => {
                        run(&disk.ring, Op::Zero { file, offset: at * 512, len: len * 512, unmap, fua }).expect("zero");
                        model[spot(at, len)].fill(0);
                        must_be_durable = fua.then(|| spot(at, len));
                    }
                    Step::Discard(at, len) => {
                        run(&disk.ring, Op::Discard { file, offset: at * 512, len: len * 512 }).expect("discard");
                        model[spot(at, len)].fill(0);
                    }
                    Step::Flush => {
                        disk.flush().expect("flush");
                        must_be_durable = Some(0..model.len());
                    }
                    Step::Read(at, len) => {
                        prop_assert!(disk.read(at * 512, (len * 512) as usize) == model[spot(at, len)], "{at} {len}");
                    }
                }
                let in_file = disk.in_file(0, model.len());
                if let Some(spot) = must_be_durable {
                    prop_assert!(in_file[spot.clone()] == model[spot], "acknowledged as durable");
                }
                // Any step may make more durable than it has to, but only what was written last.
                for (sector, bytes) in in_file.chunks(512).enumerate() {
                    let at = sector * 512..(sector + 1) * 512;
                    prop_assert!(bytes == &durable[at.clone()] || bytes == &model[at], "sector {sector}");
                }
                durable = in_file;
            }
        }
    }
}
