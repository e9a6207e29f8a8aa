//! `holdfast completions`

use crate::cli::{Cli, Completions};
use crate::failure::Outcome;
use crate::output::print;
use clap::CommandFactory as _;

pub fn run(options: &Completions) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "holdfast", &mut script);
    print(&String::from_utf8_lossy(&script));
    Ok(())
}
