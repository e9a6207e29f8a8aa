//! `holdfast pause`

use crate::cli::{Hold, Place};
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, options: &Hold) -> Outcome {
    let command = if options.io {
        ServiceCommand::SuspendIo
    } else {
        ServiceCommand::PauseResync
    };
    place.session(&options.service)?.run(command)
}
