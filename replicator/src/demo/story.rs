//! What the demo does, step by step. Each step checks before it tells.

use super::cluster::{self, Leftovers, NAMES, Node, SERVICE};
use super::filesystem::{self, Image};
use super::history::{History, LoadReport, Random, Until};
use super::{DemoError, Figures, Options, Teller, megabytes, millis};
use crate::control::protocol::{
    LinkName, ReplicationMode, RoleName, ServiceCommand, ServiceReport, StateName,
};
use crate::control::{follow, render};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 256 << 20;
/// The history lies behind the filesystem. Small enough that, even if everything ever touched had to be copied, it
/// would stay below a quarter of the volume.
const HISTORY_OFFSET: u64 = filesystem::SIZE;
const HISTORY_BYTES: u64 = 24 << 20;
/// Written first after the promotion.
const LAST_BLOCK: u64 = VOLUME_BYTES - 4096;
const FIRST_WORDS: [u8; 4096] = [0xA5; 4096];
/// Connections that write at the same time.
const WRITERS: usize = 6;
/// The primary is not killed before this many writes were acknowledged, and this long after the first.
const WRITES_BEFORE_KILL: u64 = 1500;
const LOAD_BEFORE_KILL: Duration = Duration::from_secs(2);
/// The new primary acknowledges at least this much while the other is away.
const BYTES_AFTER: u64 = 16 << 20;
/// A load that gets nowhere for this long has failed.
const STALLED: Duration = Duration::from_secs(30);

pub fn tell(
    exe: &Path,
    options: Options,
    leftovers: &Leftovers,
    teller: &Teller,
    figures: &mut Figures,
) -> Result<(), DemoError> {
    let run = seed()?;
    let mut random = Random::new(run);
    let directory = make_directory(run)?;
    figures.volume_bytes = VOLUME_BYTES;

    let id = (u128::from(random.next()) << 64) | u128::from(random.next());
    let nodes = cluster::build(exe, &directory, VOLUME_BYTES, id, !options.keep, leftovers)?;
    let [mut alpha, mut beta] = nodes;
    connected(&alpha, &beta)?;
    teller.say(&format!(
        "two nodes run on this machine ({} pid {}, {} pid {}), each with its own certificate",
        alpha.name,
        alpha.pid().unwrap_or_default(),
        beta.name,
        beta.pid().unwrap_or_default()
    ));

    alpha.command(ServiceCommand::Promote { force: false })?;
    alpha.until_service("it is primary and in sync", |service| {
        service.role == RoleName::Primary && service.in_sync == [0, 1]
    })?;
    let zero_copies = both(&alpha, &beta, |service| service.counters.resync_bytes)?;
    if zero_copies != [0, 0] {
        return Err(DemoError::Broken(
            "a volume of zeroes on both sides was copied".into(),
        ));
    }
    teller.say(&format!(
        "volume of {} mirrored in sync mode, no initial copy needed; {} is primary",
        megabytes(VOLUME_BYTES),
        alpha.name
    ));

    let image = Image::make(&directory, random.next())?;
    figures.filesystem = image.description.clone();
    let mut client = alpha.nbd()?;
    if client.size() != VOLUME_BYTES {
        return Err(DemoError::Broken(format!(
            "the volume has {} bytes instead of {VOLUME_BYTES}",
            client.size()
        )));
    }
    let copied = image.copy_to(&mut client)?;
    teller.say(&format!(
        "filesystem copied onto it over NBD: {}, {} of data",
        image.description,
        megabytes(copied)
    ));
    client.disconnect()?;

    let mut history = History::new(run, HISTORY_OFFSET, HISTORY_BYTES);
    let killed = crash(
        &mut alpha,
        &mut history,
        random.next(),
        random.below(50),
        figures,
    )?;
    teller.say(&format!(
        "{} killed (SIGKILL) in mid-write: {} writes acknowledged ({}), {} in flight",
        alpha.name,
        figures.writes_acknowledged,
        megabytes(figures.writes_acknowledged_bytes),
        figures.writes_in_flight
    ));

    fail_over(&beta, killed, figures)?;
    teller.say(&format!(
        "{} promoted, unforced: peer missed after {}, promoted in {}, first write {} after the kill",
        beta.name,
        render::span(figures.detect_ms),
        render::span(figures.promote_ms),
        render::span(figures.outage_ms)
    ));

    let mut client = beta.nbd()?;
    let found = history.check(|offset, length| client.read(offset, length))?;
    figures.writes_lost = found.lost_writes;
    if !found.holds() {
        return Err(DemoError::Broken(format!(
            "the history on {} is damaged: {found:?}",
            beta.name
        )));
    }
    teller.say(&format!(
        "all {} acknowledged writes are there ({} blocks checked, none torn; {} blocks of writes in \
         flight arrived)",
        figures.writes_acknowledged, found.blocks, found.arrived_blocks
    ));
    let back = client.read(0, filesystem::SIZE as usize)?;
    let judged = image.check(&back, &directory)?;
    figures.filesystem_intact = true;
    teller.say(&format!("the filesystem is {judged}"));
    client.disconnect()?;

    let after = write_alone(&beta, &mut history, random.next(), figures)?;
    teller.say(&format!(
        "{} wrote {} more, alone",
        beta.name,
        megabytes(after.acknowledged_bytes)
    ));

    come_back(&mut alpha, &beta, figures)?;
    teller.say(&format!(
        "{} started again as secondary: {} resynced of {} ({:.1} %), in {}",
        alpha.name,
        megabytes(figures.resynced_bytes),
        megabytes(VOLUME_BYTES),
        figures.resynced_bytes as f64 * 100.0 / VOLUME_BYTES as f64,
        render::span(figures.resync_ms)
    ));

    verify(&beta, figures)?;
    teller.say(&format!(
        "verify, online: {} compared, no difference",
        megabytes(figures.verify_bytes)
    ));

    let mut client = beta.nbd()?;
    settled(
        &mut history,
        &image,
        &directory,
        "read over NBD",
        |offset, length| Ok(client.read(offset, length)?),
    )?;
    client.disconnect()?;
    if options.keep {
        figures.copies_identical = true;
        tell_kept(&alpha, &beta, &directory, teller, figures);
        return Ok(());
    }

    // The primary last: a secondary that stops first is missed in good order, not a crash.
    beta.command(ServiceCommand::Demote)?;
    alpha.stop()?;
    beta.stop()?;
    compare_files(&mut history, &image, &directory, [&alpha, &beta])?;
    figures.copies_identical = true;
    teller.say(&format!(
        "both nodes stopped cleanly; their files are equal, all {} of them",
        megabytes(VOLUME_BYTES)
    ));
    Ok(())
}

fn seed() -> Result<u64, DemoError> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| DemoError::io("reading", Path::new("the random source"), errno.into()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A directory for this user alone. Short: socket paths have room for 107 bytes.
fn make_directory(run: u64) -> Result<PathBuf, DemoError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let directory = std::env::temp_dir().join(format!("holdfast-demo-{run:016x}"));
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .map_err(|source| DemoError::io("making", &directory, source))?;
    Ok(directory)
}

fn both<T>(
    alpha: &Node,
    beta: &Node,
    of: impl Fn(&ServiceReport) -> T,
) -> Result<[T; 2], DemoError> {
    Ok([of(&alpha.service()?), of(&beta.service()?)])
}

/// Waits until the two have met.
fn connected(alpha: &Node, beta: &Node) -> Result<(), DemoError> {
    for node in [alpha, beta] {
        node.until_service("it is connected with its peer", |service| {
            service.peers.iter().all(|peer| {
                peer.link == LinkName::Established && peer.mode == ReplicationMode::Sync
            })
        })?;
    }
    Ok(())
}

/// Runs a load until `enough` says so (it is asked again and again), then does `then`, and ends the load.
fn load<T>(
    node: &Node,
    history: &mut History,
    seed: u64,
    enough: impl Fn(u64, u64) -> bool,
    then: impl FnOnce() -> Result<T, DemoError>,
) -> Result<(LoadReport, T), DemoError> {
    let clients = (0..WRITERS)
        .map(|_| node.nbd())
        .collect::<Result<Vec<_>, _>>()?;
    let (stop, count, bytes) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let until = Until {
        stop: &stop,
        acknowledged: &count,
        acknowledged_bytes: &bytes,
    };
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| history.load(clients, seed, &until));
        let mut progress = (0, Instant::now());
        let stalled = loop {
            let (writes, written) = (count.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
            if enough(writes, written) || writing.is_finished() {
                break false;
            }
            if writes > progress.0 {
                progress = (writes, Instant::now());
            }
            if progress.1.elapsed() > STALLED {
                break true;
            }
            std::thread::sleep(Duration::from_micros(200));
        };
        let outcome = if stalled {
            Err(DemoError::Broken(format!(
                "{} acknowledged nothing for {} s under load",
                node.name,
                STALLED.as_secs()
            )))
        } else {
            then()
        };
        stop.store(true, Ordering::Relaxed);
        let report = match writing.join() {
            Ok(report) => report,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        outcome.map(|value| (report, value))
    })
}

/// Kills the primary under full load. Returns the moment.
fn crash(
    alpha: &mut Node,
    history: &mut History,
    seed: u64,
    jitter_ms: u64,
    figures: &mut Figures,
) -> Result<Instant, DemoError> {
    let start = Instant::now();
    let least = LOAD_BEFORE_KILL + Duration::from_millis(jitter_ms);
    let victim = alpha.handle();
    let enough = |writes, _| writes >= WRITES_BEFORE_KILL && start.elapsed() >= least;
    let (report, killed) = load(alpha, history, seed, enough, || {
        let killed = Instant::now();
        victim.kill()?;
        Ok(killed)
    })?;
    alpha.killed();
    figures.writes_acknowledged = report.acknowledged;
    figures.writes_acknowledged_bytes = report.acknowledged_bytes;
    figures.writes_in_flight = report.in_flight;
    if report.acknowledged < WRITES_BEFORE_KILL {
        return Err(DemoError::Broken(format!(
            "the load broke before the kill: {}",
            report.broken.join("; ")
        )));
    }
    if report.in_flight == 0 {
        return Err(DemoError::Broken(
            "no write was in flight at the kill".into(),
        ));
    }
    Ok(killed)
}

/// Promotes the survivor, without force, and has it answer a read and a write.
fn fail_over(beta: &Node, killed: Instant, figures: &mut Figures) -> Result<(), DemoError> {
    beta.until_service("it missed its peer", |service| {
        service
            .peers
            .iter()
            .all(|peer| matches!(peer.link, LinkName::Connecting | LinkName::Off))
    })?;
    figures.detect_ms = millis(killed.elapsed());
    let asked = Instant::now();
    beta.command(ServiceCommand::Promote { force: false })?;
    beta.until_service("it is primary", |service| service.role == RoleName::Primary)?;
    let mut client = beta.nbd()?;
    client.read(HISTORY_OFFSET, 4096)?;
    figures.promote_ms = millis(asked.elapsed());
    // Beyond the filesystem and the history, so that both can be checked as they were at the kill.
    client.write(LAST_BLOCK, &FIRST_WORDS)?;
    figures.outage_ms = millis(killed.elapsed());
    if client.read(LAST_BLOCK, FIRST_WORDS.len())? != FIRST_WORDS {
        return Err(DemoError::Broken(
            "the first write after the promotion reads back wrong".into(),
        ));
    }
    Ok(client.disconnect()?)
}

/// Load on the new primary while the other node is dead.
fn write_alone(
    beta: &Node,
    history: &mut History,
    seed: u64,
    figures: &mut Figures,
) -> Result<LoadReport, DemoError> {
    let enough = |_, written| written >= BYTES_AFTER;
    let (report, ()) = load(beta, history, seed, enough, || Ok(()))?;
    figures.written_after_promotion_bytes = report.acknowledged_bytes;
    if !report.broken.is_empty() || report.acknowledged_bytes < BYTES_AFTER {
        return Err(DemoError::Broken(format!(
            "the new primary stopped taking writes after {}: {}",
            megabytes(report.acknowledged_bytes),
            report.broken.join("; ")
        )));
    }
    let mut client = beta.nbd()?;
    client.flush()?;
    client.disconnect()?;
    Ok(report)
}

/// Starts the dead node again and waits until both copies are whole.
fn come_back(alpha: &mut Node, beta: &Node, figures: &mut Figures) -> Result<(), DemoError> {
    let before = sent_by_resync(beta)?;
    alpha.start()?;
    let began = Instant::now();
    alpha.until_service("it is up to date again", |service| {
        service.state == StateName::UpToDate && service.role == RoleName::Secondary
    })?;
    beta.until_service("both copies are in sync", |service| {
        service.in_sync == [0, 1]
            && service.peers.iter().all(|peer| {
                peer.link == LinkName::Established && peer.dirty_bytes == 0 && peer.resync.is_none()
            })
    })?;
    figures.resync_ms = millis(began.elapsed());
    figures.resynced_bytes = sent_by_resync(beta)? - before;
    if figures.resynced_bytes == 0 || figures.resynced_bytes >= VOLUME_BYTES / 4 {
        return Err(DemoError::Broken(format!(
            "{} were resynced, which is not what was dirty",
            megabytes(figures.resynced_bytes)
        )));
    }
    Ok(())
}

/// Bytes the source sent by resync since its process began.
fn sent_by_resync(beta: &Node) -> Result<u64, DemoError> {
    Ok(beta.service()?.counters.resync_bytes)
}

/// Compares both copies while they run.
fn verify(beta: &Node, figures: &mut Figures) -> Result<(), DemoError> {
    beta.command(ServiceCommand::Verify { volume: None })?;
    let found =
        follow::verify(beta.client()?, SERVICE, |_| ()).map_err(|source| DemoError::Control {
            node: beta.name,
            source,
        })?;
    figures.verify_bytes = found.compared_bytes;
    if found.different_bytes > 0 || found.compared_bytes < VOLUME_BYTES {
        return Err(DemoError::Broken(format!(
            "verify compared {} and found {} bytes that differ",
            megabytes(found.compared_bytes),
            found.different_bytes
        )));
    }
    Ok(())
}

/// The history and the filesystem once more, when nothing is in flight any more: every block must be exact.
fn settled(
    history: &mut History,
    image: &Image,
    directory: &Path,
    place: &str,
    mut read: impl FnMut(u64, usize) -> Result<Vec<u8>, DemoError>,
) -> Result<(), DemoError> {
    let found = history.check(&mut read)?;
    if !found.holds() || found.arrived_blocks > 0 {
        return Err(DemoError::Broken(format!(
            "the history, {place}, is damaged: {found:?}"
        )));
    }
    image
        .check(&read(0, filesystem::SIZE as usize)?, directory)
        .map(drop)
}

/// Both backing files, byte for byte, against each other and against the history.
fn compare_files(
    history: &mut History,
    image: &Image,
    directory: &Path,
    nodes: [&Node; 2],
) -> Result<(), DemoError> {
    use std::os::unix::fs::FileExt as _;
    let mut files = Vec::new();
    for node in nodes {
        let path = node.backing();
        let file =
            std::fs::File::open(&path).map_err(|source| DemoError::io("opening", &path, source))?;
        files.push((path, file));
    }
    let read = |at: usize, offset: u64, length: usize| {
        let (path, file) = &files[at];
        let mut data = vec![0; length];
        file.read_exact_at(&mut data, offset)
            .map_err(|source| DemoError::io("reading", path, source))?;
        Ok::<_, DemoError>(data)
    };
    const PIECE: usize = 1 << 20;
    for offset in (0..VOLUME_BYTES).step_by(PIECE) {
        let (left, right) = (read(0, offset, PIECE)?, read(1, offset, PIECE)?);
        if left != right {
            let at = left
                .iter()
                .zip(&right)
                .position(|(left, right)| left != right);
            return Err(DemoError::Broken(format!(
                "the copies differ at byte {}",
                offset + at.unwrap_or_default() as u64
            )));
        }
    }
    for (at, name) in NAMES.iter().enumerate() {
        let place = format!("in the file of {name}");
        settled(history, image, directory, &place, |offset, length| {
            read(at, offset, length)
        })?;
    }
    Ok(())
}

fn tell_kept(alpha: &Node, beta: &Node, directory: &Path, teller: &Teller, figures: &mut Figures) {
    let pids: Vec<u32> = [alpha, beta].iter().filter_map(|node| node.pid()).collect();
    let kill: Vec<String> = pids.iter().map(u32::to_string).collect();
    teller.say(&format!(
        "the cluster goes on running; look at it with\n\
         holdfast --socket {alpha} status\n\
         holdfast --socket {beta} status --watch\n\
         holdfast --socket {beta} events --follow\n\
         nbdinfo '{uri}'\n\
         and end it with\n\
         kill {pids}; rm -r {directory}",
        alpha = alpha.socket().display(),
        beta = beta.socket().display(),
        uri = beta.nbd_uri(),
        pids = kill.join(" "),
        directory = directory.display(),
    ));
    figures.nbd_uri = Some(beta.nbd_uri());
    figures.pids = Some(pids);
    figures.state_dirs = Some(vec![alpha.state_dir(), beta.state_dir()]);
}
