//! `holdfast promote`

use crate::cli::{Place, Promote};
use crate::consent;
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, options: &Promote) -> Outcome {
    let mut session = place.session(&options.service)?;
    if options.force {
        let loss = session.loss()?;
        let doing = format!(
            "Forcing service {} to be primary on node {}:",
            session.service,
            session.client.node()
        );
        consent::ask(&doing, &loss, options.yes)?;
    }
    session.run(ServiceCommand::Promote {
        force: options.force,
    })
}
