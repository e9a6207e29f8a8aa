//! `holdfast invalidate`

use crate::cli::{Discard, Place};
use crate::consent;
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, options: &Discard) -> Outcome {
    let mut session = place.session(&options.service)?;
    let loss = session.loss()?;
    let doing = format!(
        "Declaring node {}'s copy of service {} worthless; all of it is copied anew from the peer:",
        session.client.node(),
        session.service
    );
    consent::ask(&doing, &loss, options.yes)?;
    session.run(ServiceCommand::Invalidate)
}
