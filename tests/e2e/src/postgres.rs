//! PostgreSQL as an application: a server of the distribution on a data directory of the test's choice, and a client that
//! knows of each transaction whether its COMMIT was answered.

use crate::process;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);
const PORT: &str = "5432";
/// Name of the superuser and of the database.
const NAME: &str = "postgres";
/// Small and busy: files are reused and checkpoints come often. Nothing is switched off that makes a commit durable.
const SETTINGS: [&str; 7] = [
    "listen_addresses=",
    "shared_buffers=16MB",
    "max_connections=30",
    "dynamic_shared_memory_type=mmap",
    "min_wal_size=16MB",
    "max_wal_size=24MB",
    "autovacuum_naptime=1s",
];

/// An installation, and the unprivileged user it runs as: PostgreSQL refuses root.
#[derive(Clone, Debug)]
pub struct Installation {
    programs: PathBuf,
    uid: u32,
    gid: u32,
}

impl Installation {
    /// The newest one of the distribution; says that something is skipped if there is none.
    pub fn find() -> Option<Installation> {
        let found = std::fs::read_dir("/usr/lib/postgresql")
            .ok()
            .and_then(|versions| {
                let mut programs: Vec<(u32, PathBuf)> = versions
                    .flatten()
                    .filter_map(|version| {
                        let number = version.file_name().to_str()?.parse().ok()?;
                        Some((number, version.path().join("bin")))
                    })
                    .filter(|(_, programs)| {
                        ["postgres", "initdb", "pgbench"]
                            .iter()
                            .all(|program| programs.join(program).exists())
                    })
                    .collect();
                programs.sort();
                programs.pop()
            });
        let Some((_, programs)) = found else {
            eprintln!("skipped: no PostgreSQL in /usr/lib/postgresql (package postgresql)");
            return None;
        };
        let id = |user: &str, what: &str| -> Option<u32> {
            let output = Command::new("id").args([what, user]).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        ["postgres", "nobody"].iter().find_map(|user| {
            Some(Installation {
                programs: programs.clone(),
                uid: id(user, "-u")?,
                gid: id(user, "-g")?,
            })
        })
    }

    /// A program of the installation, to be run as its user.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command
            .uid(self.uid)
            .gid(self.gid)
            .current_dir("/")
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C.UTF-8");
        command
    }

    /// Makes a directory of the user's own.
    #[track_caller]
    pub fn own_directory(&self, directory: &Path) {
        std::fs::create_dir_all(directory).expect("a directory");
        std::os::unix::fs::chown(directory, Some(self.uid), Some(self.gid)).expect("as root");
    }

    /// Whether its user gets as far as this directory.
    pub fn can_enter(&self, directory: &Path) -> bool {
        let mut command = Command::new("test");
        command.arg("-x").arg(directory).uid(self.uid).gid(self.gid);
        command.status().is_ok_and(|status| status.success())
    }

    /// A new data directory (not there yet, in a directory of the user's own), with checksums.
    #[track_caller]
    pub fn initialise(&self, data: &Path) {
        let mut command = self.command("initdb");
        command
            .args(["--auth=trust", "--data-checksums", "--wal-segsize=4"])
            .args(["--no-locale", "--encoding=UTF8", "--username", NAME])
            .args(["--no-instructions", "--pgdata"])
            .arg(data);
        process::must(command, LIMIT);
    }
}

/// A running server.
pub struct Server {
    child: Option<Child>,
    sockets: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts one and waits until it answers, crash recovery included. Its socket is in `sockets`, a directory of the user's
    /// own; its log is appended to `log`.
    #[track_caller]
    pub fn start(installation: &Installation, data: &Path, sockets: &Path, log: &Path) -> Server {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log");
        let mut command = installation.command("postgres");
        command
            .args(["-p", PORT, "-k"])
            .arg(sockets)
            .args(SETTINGS.iter().flat_map(|setting| ["-c", setting]))
            .arg("-D")
            .arg(data)
            .stdin(std::process::Stdio::null())
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file);
        let mut server = Server {
            child: Some(process::spawn(command).expect("postgres")),
            sockets: sockets.to_path_buf(),
            log: log.to_path_buf(),
        };
        let start = Instant::now();
        loop {
            match server.connect() {
                Ok(_) => return server,
                Err(error) => {
                    let child = server.child.as_mut().expect("it runs");
                    let ended = child.try_wait().expect("waiting for an own child");
                    assert!(
                        ended.is_none() && start.elapsed() < LIMIT,
                        "PostgreSQL does not start: {error}, {ended:?}\n{}",
                        server.log_tail()
                    );
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// # Errors
    /// It does not take the connection.
    pub fn connect(&self) -> Result<Session, Failure> {
        Session::connect(&self.sockets.join(format!(".s.PGSQL.{PORT}")))
    }

    /// A session that must be there, with nothing but good answers.
    #[track_caller]
    pub fn session(&self) -> Session {
        self.connect()
            .unwrap_or_else(|error| panic!("a session: {error}\n{}", self.log_tail()))
    }

    /// A program of the installation as a client of this server.
    pub fn client(&self, installation: &Installation, program: &str) -> Command {
        let mut command = installation.command(program);
        command
            .env("PGHOST", &self.sockets)
            .env("PGPORT", PORT)
            .env("PGUSER", NAME)
            .env("PGDATABASE", NAME);
        command
    }

    /// Ends it as an administrator would, with everything written.
    #[track_caller]
    pub fn stop(mut self) {
        let mut child = self.child.take().expect("it runs");
        process::signal(&child, rustix::process::Signal::INT);
        let ended = process::wait(&mut child, LIMIT);
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        assert!(
            ended.is_some_and(|status| status.success()),
            "PostgreSQL ended with {ended:?}\n{}",
            self.log_tail()
        );
    }

    /// Ends it at once, with nothing written any more. Its processes are gone afterwards.
    pub fn abandon(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // "Immediate shutdown": it writes nothing, ends its children, and gives back the shared memory, which SIGKILL would
        // leave behind on this machine. It may have ended by itself.
        if child.try_wait().is_ok_and(|ended| ended.is_none()) {
            process::signal(&child, rustix::process::Signal::QUIT);
        }
        if process::wait(&mut child, Duration::from_secs(10)).is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() && std::thread::panicking() {
            eprintln!("--- PostgreSQL ---\n{}", self.log_tail());
        }
        self.end();
    }
}

/// Why a query has no good answer.
#[derive(Debug)]
pub enum Failure {
    /// The server's message. Whatever the query was, it has not happened.
    Refused(String),
    /// Nobody knows whether it happened.
    Broken(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Broken(error)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Refused(message) => write!(f, "refused: {message}"),
            Failure::Broken(error) => write!(f, "the connection broke: {error}"),
        }
    }
}

/// The answer to one query string.
#[derive(Debug, Default)]
pub struct Answer {
    /// Of the last statement that returned some; NULL is empty.
    pub rows: Vec<Vec<String>>,
    /// What each statement says it did, like `INSERT 0 1` or `COMMIT`.
    pub done: Vec<String>,
}

/// One connection: protocol 3, simple queries.
pub struct Session {
    stream: BufReader<UnixStream>,
}

impl Session {
    fn connect(socket: &Path) -> Result<Session, Failure> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut session = Session {
            stream: BufReader::new(stream),
        };
        let mut body = 196_608u32.to_be_bytes().to_vec();
        body.extend(format!("user\0{NAME}\0database\0{NAME}\0\0").bytes());
        let mut message = (body.len() as u32 + 4).to_be_bytes().to_vec();
        message.extend(body);
        session.stream.get_mut().write_all(&message)?;
        session.answer()?;
        Ok(session)
    }

    /// Runs one or more statements.
    ///
    /// # Errors
    /// The server refused one of them, or the connection broke.
    pub fn query(&mut self, sql: &str) -> Result<Answer, Failure> {
        let mut message = vec![b'Q'];
        message.extend((sql.len() as u32 + 5).to_be_bytes());
        message.extend(sql.bytes());
        message.push(0);
        self.stream.get_mut().write_all(&message)?;
        self.answer()
    }

    /// Runs a query that must succeed, and returns its rows.
    #[track_caller]
    pub fn rows(&mut self, sql: &str) -> Vec<Vec<String>> {
        match self.query(sql) {
            Ok(answer) => answer.rows,
            Err(failure) => panic!("{sql}: {failure}"),
        }
    }

    /// The only value of the only row.
    #[track_caller]
    pub fn value(&mut self, sql: &str) -> String {
        let rows = self.rows(sql);
        assert!(rows.len() == 1 && rows[0].len() == 1, "{sql}: {rows:?}");
        rows[0][0].clone()
    }

    /// Reads until the server is ready for the next query.
    fn answer(&mut self) -> Result<Answer, Failure> {
        let mut answer = Answer::default();
        let mut refused: Option<String> = None;
        loop {
            let mut head = [0; 5];
            if let Err(error) = self.stream.read_exact(&mut head) {
                // A server that ends says so before it closes.
                return Err(match refused {
                    Some(message) => broken(&message),
                    None => error.into(),
                });
            }
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if !(4..1 << 24).contains(&length) {
                return Err(broken("a message of a strange length"));
            }
            let mut body = vec![0; length - 4];
            self.stream.read_exact(&mut body)?;
            match head[0] {
                b'Z' => {
                    return refused.map_or(Ok(answer), |message| Err(Failure::Refused(message)));
                }
                b'E' => refused = Some(message(&body)),
                b'R' if body[..4] != [0; 4] => return Err(broken("it wants a password")),
                b'T' => answer.rows.clear(),
                b'D' => answer
                    .rows
                    .push(row(&body).ok_or_else(|| broken("a bad row"))?),
                b'C' => answer
                    .done
                    .push(String::from_utf8_lossy(&body[..body.len() - 1]).into()),
                _ => {}
            }
        }
    }
}

fn broken(what: &str) -> Failure {
    Failure::Broken(io::Error::other(what.to_owned()))
}

/// Severity and text of an ErrorResponse.
fn message(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0);
    let wanted = fields.filter_map(|field| match field.split_first() {
        Some((b'V' | b'M', text)) => Some(String::from_utf8_lossy(text)),
        _ => None,
    });
    wanted.collect::<Vec<_>>().join(": ")
}

/// The columns of a DataRow.
fn row(body: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (text, after) = after.split_at_checked(length)?;
        columns.push(String::from_utf8_lossy(text).into());
        rest = after;
    }
    Some(columns)
}
