//! The switchboard of a backing under the fault layer (docs/disk.md, "Fault layer").

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// One backing's switchboard. It is there while the replicator that opened the backing runs.
#[derive(Clone, Debug)]
pub struct Faults {
    pub(crate) socket: PathBuf,
}

impl Faults {
    /// Gives one command and returns the text of its answer.
    ///
    /// # Panics
    /// Nobody answers, or the answer is an error.
    #[track_caller]
    pub fn tell(&self, command: &str) -> String {
        let answer = self.try_tell(command);
        let answer = answer.unwrap_or_else(|error| panic!("{command} to {self:?}: {error}"));
        match answer.strip_prefix("ok") {
            Some(text) => text.trim().to_owned(),
            None => panic!("{command} to {self:?}: {answer:?}"),
        }
    }

    /// Gives a command that may end the process before it answers; the answer line as it came, empty when none did.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn try_tell(&self, command: &str) -> std::io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        match BufReader::new(stream).read_line(&mut answer) {
            Ok(_) => Ok(answer.trim().to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(String::new()),
            Err(error) => Err(error),
        }
    }

    /// One figure of `status`: `unflushed`, `held`, `rules`, `reads`, `writes`, `flushes` or `zeroes`.
    #[track_caller]
    pub fn figure(&self, name: &str) -> u64 {
        let status = self.tell("status");
        status
            .split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {status:?}"))
    }
}
