//! The switchboard of a fault disk: a Unix socket, one command a line, one answer a line. `docs/disk.md` lists them.

use crate::fault::{Class, Effect, FaultDisk, Rule, power_cut};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Weak};

/// Listens on `socket`, replacing what a dead process left there.
pub(crate) fn bind(socket: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(socket) {
        Err(error)
            if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(socket).is_err() =>
        {
            std::fs::remove_file(socket)?;
            UnixListener::bind(socket)
        }
        bound => bound,
    }
}

/// Answers commands on threads of their own, so that a power cut or a release needs nothing of the shard.
pub(crate) fn serve(listener: Arc<UnixListener>, disk: Weak<FaultDisk>) -> io::Result<()> {
    let accept = move || {
        while let Ok((stream, _)) = listener.accept() {
            let disk = disk.clone();
            let spawned = std::thread::Builder::new()
                .name("disk-faults".into())
                .spawn(move || answer(stream, &disk));
            if spawned.is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("disk-faults".into())
        .spawn(accept)
        .map(drop)
}

fn answer(stream: UnixStream, disk: &Weak<FaultDisk>) {
    let Ok(mut out) = stream.try_clone() else {
        return;
    };
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let reply = match disk.upgrade() {
            Some(disk) => command(&disk, &line).map_or_else(
                |why| format!("error {why}\n"),
                |text| format!("{}\n", format!("ok {text}").trim_end()),
            ),
            None => "error the disk is closed\n".into(),
        };
        if out.write_all(reply.as_bytes()).is_err() {
            return;
        }
    }
}

fn command(disk: &FaultDisk, line: &str) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let done = Ok(String::new());
    match words.as_slice() {
        ["powercut", "all"] => power_cut(None),
        ["powercut", seed] => power_cut(Some(number(seed)?)),
        ["eio", class, place @ ..] => add(disk, class, Effect::Error(libc::EIO), place),
        ["enospc", class, place @ ..] => add(disk, class, Effect::Error(libc::ENOSPC), place),
        ["hang", class, place @ ..] => add(disk, class, Effect::Hang, place),
        ["short", class, most, place @ ..] => add(disk, class, Effect::Short(number(most)?), place),
        ["release"] => {
            disk.remove_rules(true);
            done
        }
        ["heal"] => {
            disk.remove_rules(false);
            done
        }
        ["cache", state @ ("on" | "off")] => disk
            .set_cache(*state == "on")
            .map(|()| String::new())
            .map_err(|errno| errno.to_string()),
        ["status"] => Ok(disk.status()),
        _ => Err(format!("unknown command {line:?}")),
    }
}

/// `[OFFSET LENGTH] [times N]`
fn add(
    disk: &FaultDisk,
    class: &str,
    effect: Effect,
    mut place: &[&str],
) -> Result<String, String> {
    let class = match class {
        "read" => Class::Read,
        "write" => Class::Write,
        "flush" => Class::Flush,
        "zero" => Class::Zero,
        "any" => Class::Any,
        other => {
            return Err(format!(
                "{other:?} is none of read, write, flush, zero, any"
            ));
        }
    };
    let mut times = None;
    if let [before @ .., "times", count] = place {
        times = Some(u32::try_from(number(count)?).map_err(|_| "too many times")?);
        place = before;
    }
    let range = match place {
        [] => None,
        [offset, length] => Some((number(offset)?, number(length)?)),
        _ => return Err("a place is OFFSET LENGTH in bytes".into()),
    };
    if effect == Effect::Hang && times.is_some() {
        return Err("what hangs does so until release".into());
    }
    disk.add_rule(Rule {
        class,
        effect,
        range,
        times,
    });
    Ok(String::new())
}

fn number(word: &str) -> Result<u64, String> {
    word.parse()
        .map_err(|_| format!("{word:?} is not a number"))
}
