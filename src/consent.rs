//! Asking before data is discarded.

use crate::failure::{CONFIRMATION_MISSING, FAILED, Failure, Outcome};
use std::io::{BufRead as _, IsTerminal as _, Write as _};

/// Shows what would be lost, then has a person agree: by `--yes`, or by typing yes on a terminal.
pub fn ask(doing: &str, loss: &str, yes: bool) -> Outcome {
    agree(doing, loss, yes, "this discards data")
}

/// The same for what discards nothing and has an application wait.
pub fn ask_to_stop(doing: &str, effect: &str, yes: bool) -> Outcome {
    agree(doing, effect, yes, "this has an application wait")
}

fn agree(doing: &str, loss: &str, yes: bool, why: &str) -> Outcome {
    eprintln!("{doing}\n");
    for line in loss.lines() {
        eprintln!("  {line}");
    }
    eprintln!();
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Failure::new(
            CONFIRMATION_MISSING,
            format!("{why}, and nobody confirmed it"),
            "Nothing was changed",
            "Read above what it would do, then run the command again with --yes",
        ));
    }
    eprint!("Type yes to go on: ");
    let mut answer = String::new();
    let typed = std::io::stderr()
        .flush()
        .and_then(|()| std::io::stdin().lock().read_line(&mut answer));
    if typed.is_ok() && answer.trim() == "yes" {
        return Ok(());
    }
    Err(Failure::new(
        FAILED,
        "not confirmed",
        "Nothing was changed",
        "",
    ))
}
