//! Child processes that never outlive the test program, and commands with a deadline.

use rustix::process::{Pid, Resource, Rlimit, Signal};
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

type Order = (Command, Sender<std::io::Result<Child>>);

/// Starts a process that dies with this one, however this one ends.
///
/// # Errors
/// The program cannot be started.
pub fn spawn(mut command: Command) -> std::io::Result<Child> {
    // The kernel's "parent died" is about the thread that forked, so one that lives as long as the program does it.
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, incoming): (Sender<Order>, Receiver<Order>) = channel();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in incoming {
                    // Nobody waits for the answer of a test that was ended.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread");
        orders
    });
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only system calls are made, all safe there; nothing is allocated and no lock is
    // taken.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // A power cut of the fault layer is an abort, and its memory image helps nobody.
            rustix::process::setrlimit(
                Resource::Core,
                Rlimit {
                    current: Some(0),
                    maximum: Some(0),
                },
            )?;
            // The parent may have died before the first call.
            if rustix::process::getppid() == Some(parent) {
                Ok(())
            } else {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    let (answer, answered) = channel();
    spawner.send((command, answer)).expect("the spawner");
    answered.recv().expect("the spawner")
}

/// Sends a signal to a child that was not waited for.
pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("signalling an own child");
}

/// Runs a command to its end.
///
/// # Panics
/// It cannot be started, or has not ended within `limit`.
#[track_caller]
pub fn run(command: Command, limit: Duration) -> Output {
    try_run(command, limit).unwrap_or_else(|why| panic!("{why}"))
}

/// As [`run`].
///
/// # Errors
/// It cannot be started, or has not ended within `limit`; in words.
pub fn try_run(mut command: Command, limit: Duration) -> Result<Output, String> {
    let text = format!("{command:?}");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command).map_err(|error| format!("{text}: {error}"))?;
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let finish = |stream: Option<std::thread::JoinHandle<Vec<u8>>>| {
        stream.map_or_else(Vec::new, |thread| thread.join().expect("a reader"))
    };
    match wait(&mut child, limit) {
        Some(status) => Ok(Output {
            status,
            stdout: finish(stdout),
            stderr: finish(stderr),
        }),
        None => {
            let _ = child.kill();
            let _ = child.wait();
            Err(format!(
                "{text} had not ended after {limit:?}\n{}{}",
                String::from_utf8_lossy(&finish(stdout)),
                String::from_utf8_lossy(&finish(stderr))
            ))
        }
    }
}

/// Runs a command to its end and returns its standard output and standard error, one after the other.
///
/// # Panics
/// As [`run`], or it ends with an error.
#[track_caller]
pub fn must(command: Command, limit: Duration) -> String {
    let text = format!("{command:?}");
    let output = run(command, limit);
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}: {}\n{said}", output.status);
    said
}

/// Waits for a child's end; none when the limit is reached first.
pub fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("waiting for an own child") {
            return Some(status);
        }
        if start.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn drain(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        // What was read before an error is still worth showing.
        let _ = stream.read_to_end(&mut all);
        all
    })
}

/// Whether a program is in the path; says that something is skipped if not.
pub fn available(program: &str) -> bool {
    let found = Command::new("sh")
        .args([
            "-c",
            "PATH=$PATH:/usr/sbin:/sbin command -v \"$0\" >/dev/null",
            program,
        ])
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}
