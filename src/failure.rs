//! How a command ends badly: what happened, what was kept safe, what to do next, and with which exit code.

use holdfast_replicator::control::client::ClientError;
use std::fmt;

/// Refused or failed.
pub const FAILED: u8 = 1;
/// Data would be discarded, and nobody was there to agree.
pub const CONFIRMATION_MISSING: u8 = 3;
/// No replicator answers on the control socket.
pub const NOT_RUNNING: u8 = 4;
/// The command worked, and what it looked at is not as it should be.
pub const FOUND_BAD: u8 = 5;

/// The one error type of the command line.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub what: String,
    pub kept: String,
    pub next: String,
}

pub type Outcome = Result<(), Failure>;

impl Failure {
    pub fn new(
        code: u8,
        what: impl Into<String>,
        kept: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Failure {
            code,
            what: what.into(),
            kept: kept.into(),
            next: next.into(),
        }
    }

    /// For errors of the libraries whose sentence already says what to do.
    pub fn from_error(error: &dyn std::error::Error) -> Self {
        Failure::new(FAILED, error.to_string(), "", "")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

impl miette::Diagnostic for Failure {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let mut lines = Vec::new();
        for sentence in [&self.kept, &self.next] {
            let sentence = sentence.trim_end_matches('.');
            if !sentence.is_empty() {
                lines.push(format!("{sentence}."));
            }
        }
        if lines.is_empty() {
            None
        } else {
            Some(Box::new(lines.join("\n")))
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match error {
            ClientError::NotRunning { .. } | ClientError::NotPermitted { .. } => NOT_RUNNING,
            _ => FAILED,
        };
        Failure::new(code, error.to_string(), error.kept(), error.advice())
    }
}
