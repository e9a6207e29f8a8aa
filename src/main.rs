//! The `holdfast` program: a verb per file, no logic of its own.

#[macro_use]
mod output;
mod attach;
mod certificate;
mod cli;
mod completions;
mod connect;
mod consent;
mod demo;
mod demote;
mod detach;
mod disconnect;
mod dump_metadata;
mod events;
mod explain_handshake;
mod failure;
mod init;
mod invalidate;
mod join;
mod man;
mod pause;
mod progress;
mod promote;
mod reload;
mod replicator;
mod resume;
mod resync;
mod session;
mod split_brain;
mod status;
mod token;
mod verify;
mod volume;

use clap::Parser as _;
use cli::{Cli, Verb};
use failure::Outcome;
use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Cli { place, verb } = Cli::parse();
    match run(&place, &verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let code = failure.code;
            // The exit code tells even where nobody reads the words.
            let _ = writeln!(std::io::stderr(), "{:?}", miette::Report::new(failure));
            ExitCode::from(code)
        }
    }
}

fn run(place: &cli::Place, verb: &Verb) -> Outcome {
    match verb {
        Verb::Init(options) => init::run(place, options),
        Verb::Token(options) => token::run(place, options),
        Verb::Join(options) => join::run(place, options),
        Verb::Certificate(verb) => certificate::run(place, verb),
        Verb::Reload => reload::run(place),
        Verb::Replicator => replicator::run(place),
        Verb::Status(options) => status::run(place, options),
        Verb::Events(options) => events::run(place, options),
        Verb::Promote(options) => promote::run(place, options),
        Verb::Demote(service) => demote::run(place, service),
        Verb::Detach(options) => detach::run(place, options),
        Verb::Attach(service) => attach::run(place, service),
        Verb::Connect(options) => connect::run(place, options),
        Verb::Disconnect(options) => disconnect::run(place, options),
        Verb::Pause(options) => pause::run(place, options),
        Verb::Resume(options) => resume::run(place, options),
        Verb::Verify(options) => verify::run(place, options),
        Verb::Resync(options) => resync::run(place, options),
        Verb::Invalidate(options) => invalidate::run(place, options),
        Verb::SplitBrain(verb) => split_brain::run(place, verb),
        Verb::ExplainHandshake(options) => explain_handshake::run(place, options),
        Verb::Volume(verb) => volume::run(place, verb),
        Verb::DumpMetadata(options) => dump_metadata::run(place, options),
        Verb::Demo(options) => demo::run(options),
        Verb::Completions(options) => completions::run(options),
        Verb::Man(options) => man::run(options),
    }
}
