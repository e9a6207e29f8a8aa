//! PostgreSQL on a replicated volume: a database that believes what its disk says. It is killed with its machine in the midst of
//! its work, and started on the other copy: every transaction whose COMMIT was answered is there, none is there in part, and no
//! table and no index is damaged (D1, D2, D3).

use holdfast_e2e::mounts::{self, Format, MountedVolume};
use holdfast_e2e::postgres::{Failure, Installation, Server, Session};
use holdfast_e2e::{Backing, Cluster, Random, Settings, process, random};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const VOLUME: u64 = 256 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// Of pgbench: ten tellers and 100 000 accounts each.
const BRANCHES: u64 = 2;
const SESSIONS: u64 = 4;

/// One transaction, as it was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Transfer {
    account: u64,
    teller: u64,
    branch: u64,
    delta: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    /// Sent, and no answer came yet.
    Sent,
    Committed,
}

/// Everything that was sent to the database, outside of it.
#[derive(Default)]
struct Ledger {
    transfers: Mutex<BTreeMap<u64, (Transfer, Known)>>,
    next: AtomicU64,
    committed: AtomicU64,
}

impl Ledger {
    /// Sends one transfer. It is in the ledger before it is sent, and as committed only after the server said so.
    fn transfer(&self, session: &mut Session, random: &mut Random) -> Result<(), Failure> {
        let branch = 1 + random.below(BRANCHES);
        let transfer = Transfer {
            account: 1 + random.below(100_000 * BRANCHES),
            teller: 1 + random.below(10 * BRANCHES),
            branch,
            delta: random.below(10_001) as i64 - 5_000,
        };
        let Transfer {
            account,
            teller,
            branch,
            delta,
        } = transfer;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut transfers = self.transfers.lock().unwrap();
        transfers.insert(id, (transfer, Known::Sent));
        drop(transfers);
        // In the order of pgbench, so that nobody waits in a circle.
        let answer = session.query(&format!(
            "BEGIN;
             UPDATE pgbench_accounts SET abalance = abalance + {delta} WHERE aid = {account};
             INSERT INTO ledger VALUES ({id}, {account}, {delta}, repeat(md5('{id}'), 1 + {id} % 20));
             UPDATE pgbench_tellers SET tbalance = tbalance + {delta} WHERE tid = {teller};
             UPDATE pgbench_branches SET bbalance = bbalance + {delta} WHERE bid = {branch};
             INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
                 VALUES ({teller}, {branch}, {account}, {delta}, now(), 'ledger {id}');
             COMMIT"
        ))?;
        if answer.done.last().map(String::as_str) != Some("COMMIT") {
            return Err(Failure::Refused(format!("{:?}", answer.done)));
        }
        self.transfers.lock().unwrap().get_mut(&id).unwrap().1 = Known::Committed;
        self.committed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// The database after a recovery, or at rest: each committed transfer is in it, exactly as it was sent. Of one that was not
    /// answered, the database decided, and must stay with that. Returns how many of those there were.
    ///
    /// # Panics
    /// Something else is in the database; both sides of the comparison are in the file `evidence` then.
    #[track_caller]
    fn check(&self, session: &mut Session, what: &str, evidence: &Path) -> usize {
        let mut transfers = self.transfers.lock().unwrap();
        let rows = session.rows(
            "SELECT l.id, h.aid, h.tid, h.bid, h.delta,
                    l.aid = h.aid AND l.delta = h.delta AND l.note = repeat(md5(l.id::text), (1 + l.id % 20)::int)
             FROM ledger l FULL JOIN (SELECT * FROM pgbench_history WHERE filler LIKE 'ledger %') h
                 ON h.filler = 'ledger ' || l.id ORDER BY l.id",
        );
        let wrong = compare(&transfers, &rows);
        if !wrong.is_empty() {
            let mut text = format!("{what}\n\nwrong:\n{}\n\nsent:\n", wrong.join("\n"));
            for (id, transfer) in transfers.iter() {
                text += &format!("{id} {transfer:?}\n");
            }
            text += "\nin the database:\n";
            for row in &rows {
                text += &format!("{row:?}\n");
            }
            std::fs::write(evidence, text).unwrap();
            panic!(
                "{what}: {} of {} committed transactions are wrong, the first: {}",
                wrong.len(),
                self.committed(),
                wrong[0]
            );
        }
        let found: BTreeSet<u64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
        let undecided = transfers
            .values()
            .filter(|(_, known)| *known == Known::Sent)
            .count();
        transfers.retain(|id, _| found.contains(id));
        for (_, known) in transfers.values_mut() {
            *known = Known::Committed;
        }
        undecided
    }
}

/// What of the database (identity, account, teller, branch, delta, whole) is not as it was sent, in words.
fn compare(transfers: &BTreeMap<u64, (Transfer, Known)>, rows: &[Vec<String>]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut found = BTreeSet::new();
    for row in rows {
        let number = |column: usize| row[column].parse::<i64>().unwrap_or(-1);
        let id = number(0) as u64;
        let transfer = Transfer {
            account: number(1) as u64,
            teller: number(2) as u64,
            branch: number(3) as u64,
            delta: number(4),
        };
        if row[5] != "t" {
            wrong.push(format!("there in part: {row:?}"));
        } else if transfers.get(&id).map(|(sent, _)| sent) != Some(&transfer) {
            wrong.push(format!("not what was sent: {row:?}"));
        }
        if !found.insert(id) {
            wrong.push(format!("twice in the history: {row:?}"));
        }
    }
    for (id, (transfer, known)) in transfers {
        if *known == Known::Committed && !found.contains(id) {
            wrong.push(format!("committed and not there: {id} {transfer:?}"));
        }
    }
    wrong
}

#[test]
fn each_difference_from_the_ledger_is_noticed() {
    let transfer = Transfer {
        account: 7,
        teller: 2,
        branch: 1,
        delta: -5,
    };
    let sent = BTreeMap::from([
        (1, (transfer, Known::Committed)),
        (2, (transfer, Known::Sent)),
    ]);
    let row = |id: &str, delta: &str, whole: &str| -> Vec<String> {
        [id, "7", "2", "1", delta, whole].map(String::from).to_vec()
    };
    let good = row("1", "-5", "t");
    assert!(compare(&sent, std::slice::from_ref(&good)).is_empty());
    assert!(compare(&sent, &[good.clone(), row("2", "-5", "t")]).is_empty());
    for (rows, why) in [
        (vec![], "not there"),
        (vec![row("1", "-5", "")], "in part"),
        (vec![row("1", "5", "t")], "not what was sent"),
        (vec![good.clone(), row("3", "-5", "t")], "not what was sent"),
        (vec![good.clone(), good.clone()], "twice"),
    ] {
        let wrong = compare(&sent, &rows);
        assert!(
            wrong.iter().any(|text| text.contains(why)),
            "{why}: {wrong:?}"
        );
    }
}

/// The balances that pgbench keeps add up, account by account.
#[track_caller]
fn balances_add_up(session: &mut Session, what: &str) {
    for (table, key, balance) in [
        ("pgbench_accounts", "aid", "abalance"),
        ("pgbench_tellers", "tid", "tbalance"),
        ("pgbench_branches", "bid", "bbalance"),
    ] {
        let wrong = session.rows(&format!(
            "SELECT {key}, {balance}, sum FROM {table}
             FULL JOIN (SELECT {key}, sum(delta) FROM pgbench_history GROUP BY {key}) h USING ({key})
             WHERE {balance} IS DISTINCT FROM coalesce(sum, 0) LIMIT 3"
        ));
        assert!(
            wrong.is_empty(),
            "{what}: {table} differs from the history: {wrong:?}"
        );
        // By another path, so that a broken index cannot hide rows.
        let sums = session.rows(&format!(
            "SELECT (SELECT sum({balance}) FROM {table}), (SELECT sum(delta) FROM pgbench_history)"
        ));
        assert_eq!(sums[0][0], sums[0][1], "{what}: the sums of {table}");
    }
}

/// Every table and every index, the catalogue's included, by PostgreSQL's own checker.
#[track_caller]
fn nothing_is_damaged(session: &mut Session, what: &str) {
    // Each index against its table: every row must be found through it.
    let indexes = session.rows(
        "SELECT count(*), count(bt_index_check(c.oid, true)) FROM pg_class c JOIN pg_am a ON a.oid = c.relam
         WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p'",
    );
    assert!(
        indexes[0][0].parse::<u64>().unwrap() > 100,
        "{what}: {indexes:?}"
    );
    let tables = session.rows(
        "SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'm', 't') AND relpersistence = 'p'",
    );
    assert!(
        tables[0][0].parse::<u64>().unwrap() > 50,
        "{what}: {tables:?}"
    );
    let damage = session.rows(
        "SELECT c.oid::regclass, v.* FROM pg_class c, verify_heapam(c.oid) v
         WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence = 'p' LIMIT 10",
    );
    assert!(damage.is_empty(), "{what}: {damage:?}");
}

/// Clients at work: the ledger's sessions, pgbench's, and one that has everything written that a checkpoint writes.
struct Clients {
    stop: Arc<AtomicBool>,
    sessions: Vec<std::thread::JoinHandle<Option<Failure>>>,
    pgbench: Child,
}

impl Clients {
    #[track_caller]
    fn start(
        server: &Server,
        installation: &Installation,
        ledger: &Arc<Ledger>,
        random: &mut Random,
    ) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let mut sessions: Vec<_> = (0..SESSIONS)
            .map(|_| {
                let (stop, ledger) = (stop.clone(), ledger.clone());
                let mut random = Random::new(random.word());
                let mut session = server.session();
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if let Err(failure) = ledger.transfer(&mut session, &mut random) {
                            return Some(failure);
                        }
                    }
                    None
                })
            })
            .collect();
        let (stopped, mut session) = (stop.clone(), server.session());
        sessions.push(std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for sql in [
                    "CHECKPOINT",
                    "VACUUM pgbench_tellers, pgbench_branches, ledger",
                ] {
                    if let Err(failure) = session.query(sql) {
                        return Some(failure);
                    }
                }
            }
            None
        }));
        let mut command = server.client(installation, "pgbench");
        command
            .args(["--no-vacuum", "--client=3", "--transactions=1000000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Clients {
            stop,
            sessions,
            pgbench: process::spawn(command).unwrap(),
        }
    }

    fn end(mut self) -> Vec<Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.pgbench.kill();
        let _ = self.pgbench.wait();
        let sessions = self.sessions.into_iter();
        sessions
            .filter_map(|thread| thread.join().unwrap())
            .collect()
    }

    /// Ends them while all is well.
    #[track_caller]
    fn finish(self) {
        let failures = self.end();
        assert!(failures.is_empty(), "{failures:?}");
    }

    /// Ends those whose server was ended.
    #[track_caller]
    fn broken(self, what: &str) {
        let failures = self.end();
        assert_eq!(failures.len() as u64, SESSIONS + 1, "{what}: {failures:?}");
    }
}

#[track_caller]
fn until_committed(ledger: &Ledger, more: u64) {
    let (start, target) = (Instant::now(), ledger.committed() + more);
    while ledger.committed() < target {
        assert!(
            start.elapsed() < LIMIT,
            "{} of {target} transactions",
            ledger.committed()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A database that runs on one node's volume.
struct Running {
    volume: MountedVolume,
    server: Server,
}

struct Story {
    cluster: Cluster,
    installation: Installation,
    /// Mount points and sockets: the database's user must be able to go there.
    place: tempfile::TempDir,
    ledger: Arc<Ledger>,
    random: Random,
    primary: usize,
}

impl Story {
    /// Two nodes in sync, a fresh database on the first; none where it cannot run.
    #[track_caller]
    fn begin(test: &str, backing: Backing) -> Option<(Story, Running)> {
        if !mounts::available() {
            return None;
        }
        let installation = Installation::find()?;
        let place = tempfile::Builder::new().prefix("hf-").tempdir().unwrap();
        std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        if !installation.can_enter(place.path()) {
            eprintln!(
                "skipped: PostgreSQL's user may not enter {}",
                place.path().display()
            );
            return None;
        }
        let cluster = Cluster::start(&Settings {
            volumes: vec![("data", VOLUME)],
            backing,
            ..Settings::default()
        });
        cluster[0].promote();
        cluster.until_in_sync(0, &[0, 1]);
        let story = Story {
            cluster,
            installation,
            place,
            ledger: Arc::default(),
            random: Random::new(random::seed(test)),
            primary: 0,
        };
        let volume = story.mount(Format::Make);
        story.installation.own_directory(volume.directory());
        story.installation.initialise(&database(&volume));
        let server = story.start(&volume);
        let mut pgbench = server.client(&story.installation, "pgbench");
        pgbench.args(["--initialize", "--quiet", &format!("--scale={BRANCHES}")]);
        process::must(pgbench, LIMIT);
        let mut session = server.session();
        session.rows("CREATE EXTENSION amcheck");
        session.rows("CREATE TABLE ledger (id bigint PRIMARY KEY, aid int, delta int, note text)");
        Some((story, Running { volume, server }))
    }

    /// Where a difference is told in full, among what a failed test leaves behind.
    fn evidence(&self) -> PathBuf {
        self.cluster.directory().join("ledger.txt")
    }

    #[track_caller]
    fn mount(&self, format: Format) -> MountedVolume {
        let node = &self.cluster[self.primary];
        MountedVolume::mount(&node.nbd_uri("data"), self.place.path(), node.name, format)
    }

    #[track_caller]
    fn start(&self, volume: &MountedVolume) -> Server {
        let sockets = self.place.path().join("sockets");
        self.installation.own_directory(&sockets);
        Server::start(
            &self.installation,
            &database(volume),
            &sockets,
            &self.cluster.directory().join("postgres.log"),
        )
    }

    /// Clients in full flow, at a random point of their work.
    #[track_caller]
    fn clients_for_a_while(&mut self, server: &Server) -> Clients {
        let clients = Clients::start(server, &self.installation, &self.ledger, &mut self.random);
        until_committed(&self.ledger, 50 + self.random.below(200));
        std::thread::sleep(Duration::from_micros(self.random.below(50_000)));
        clients
    }

    /// The primary's machine goes in the midst of all this: `lose` ends its replicator, and maybe others.
    #[track_caller]
    fn crash(&mut self, running: Running, what: &str, lose: impl FnOnce(&mut Cluster, usize)) {
        let Running { mut volume, server } = running;
        let clients = self.clients_for_a_while(&server);
        lose(&mut self.cluster, self.primary);
        // Before anything else: what is dirty in the page cache has died with the machine, and stays dead.
        volume.cut_off();
        server.abandon();
        clients.broken(what);
        volume.abandon();
    }

    /// PostgreSQL starts on what the present primary has, and has everything.
    #[track_caller]
    fn recover(&mut self, what: &str) -> Running {
        let volume = self.mount(Format::Keep);
        let server = self.start(&volume);
        let mut session = server.session();
        let undecided = self.ledger.check(&mut session, what, &self.evidence());
        balances_add_up(&mut session, what);
        nothing_is_damaged(&mut session, what);
        eprintln!(
            "{what}: {} transactions committed so far, {undecided} were undecided",
            self.ledger.committed()
        );
        Running { volume, server }
    }

    /// The other node comes back while the clients work, and both copies are equal.
    #[track_caller]
    fn come_back(&mut self, running: &Running, what: &str) {
        let clients = self.clients_for_a_while(&running.server);
        let other = 1 - self.primary;
        if !self.cluster[other].is_running() {
            self.cluster[other].start();
        }
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        until_committed(&self.ledger, 50);
        self.cluster.verify(self.primary);
        clients.finish();
        let mut session = running.server.session();
        self.ledger.check(&mut session, what, &self.evidence());
        balances_add_up(&mut session, what);
    }

    /// The service moves as planned, and everything is checked for the last time, on disk and byte for byte.
    #[track_caller]
    fn finish(mut self, running: Running) {
        let Running { volume, server } = running;
        server.stop();
        volume.unmount();
        self.cluster[self.primary].demote();
        self.primary = 1 - self.primary;
        self.cluster[self.primary].promote();
        let Running { volume, server } = self.recover("after the switchover");
        server.stop();
        let mut checksums = self.installation.command("pg_checksums");
        checksums
            .args(["--check", "--pgdata"])
            .arg(database(&volume));
        process::must(checksums, LIMIT);
        volume.unmount();
        self.cluster.until_in_sync(self.primary, &[0, 1]);
        self.cluster.stop();
        self.cluster.same_bytes(&[0, 1]);
    }
}

fn database(volume: &MountedVolume) -> PathBuf {
    volume.directory().join("database")
}

#[test]
fn the_machine_of_a_database_is_killed_and_its_peer_goes_on() {
    let Some((mut story, mut running)) = Story::begin("postgres, kill", Backing::File) else {
        return;
    };
    for moment in 1..=3 {
        let what = format!("kill {moment}");
        let mut killed = None;
        story.crash(running, &what, |cluster, primary| {
            cluster[primary].kill();
            killed = Some(Instant::now());
        });
        let (lost, heir) = (story.primary, 1 - story.primary);
        story.cluster[heir].until_misses(lost);
        story.cluster[heir].promote();
        story.primary = heir;
        running = story.recover(&what);
        eprintln!(
            "{what}: recovered and checked {:?} after it",
            killed.unwrap().elapsed()
        );
        story.come_back(&running, &what);
    }
    story.finish(running);
}

#[test]
fn the_power_of_a_database_is_cut() {
    let Some((mut story, mut running)) = Story::begin("postgres, power", Backing::Faults) else {
        return;
    };
    let what = "the primary's power is cut";
    let seed = story.random.word();
    story.crash(running, what, |cluster, primary| {
        cluster[primary].cut_power(Some(seed))
    });
    let (lost, heir) = (story.primary, 1 - story.primary);
    story.cluster[heir].until_misses(lost);
    story.cluster[heir].promote();
    story.primary = heir;
    running = story.recover(what);
    story.come_back(&running, what);

    // A commit is a flush, and those are on both disks.
    let what = "the power of both is cut";
    let seeds = [story.random.word(), story.random.word()];
    story.crash(running, what, |cluster, primary| {
        cluster[primary].cut_power(Some(seeds[0]));
        cluster[1 - primary].cut_power(Some(seeds[1]));
    });
    story.cluster[0].start();
    story.cluster[1].start();
    story.cluster.until_connected();
    story.primary = story.random.below(2) as usize;
    story.cluster[story.primary].promote();
    running = story.recover(what);
    story.come_back(&running, what);
    story.finish(running);
}
