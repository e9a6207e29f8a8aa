//! `holdfast split-brain`

use crate::cli::{Keep, Place, Service, SplitBrain};
use crate::consent;
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, verb: &SplitBrain) -> Outcome {
    match verb {
        SplitBrain::Show(service) => show(place, service),
        SplitBrain::Resolve { service, keep, yes } => resolve(place, service, *keep, *yes),
    }
}

fn show(place: &Place, service: &Service) -> Outcome {
    let mut session = place.session(service)?;
    let loss = session.loss()?;
    say!("this node, {}: {loss}", session.client.node());
    for peer in session.report()?.peers {
        let facts = session
            .client
            .explain_handshake(&session.service, &peer.name)?;
        say!("\nwith {}: {facts}", peer.name);
    }
    Ok(())
}

fn resolve(place: &Place, service: &Service, keep: Keep, yes: bool) -> Outcome {
    let mut session = place.session(service)?;
    let discard_mine = keep == Keep::Theirs;
    if discard_mine {
        let loss = session.loss()?;
        let doing = format!(
            "Discarding what node {} wrote to service {} since the two parted:",
            session.client.node(),
            session.service
        );
        consent::ask(&doing, &loss, yes)?;
    }
    session.run(ServiceCommand::ResolveSplitBrain { discard_mine })
}
