//! `holdfast connect`

use crate::cli::{Peer, Place};
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, options: &Peer) -> Outcome {
    let peer = options.peer.clone();
    place
        .session(&options.service)?
        .run(ServiceCommand::Connect { peer })
}
