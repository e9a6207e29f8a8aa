//! `holdfast detach`

use crate::cli::{Detach, Place};
use crate::consent;
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::{
    PeerLossPolicy, ReplicationMode, RoleName, ServiceCommand, ServiceReport,
};

pub fn run(place: &Place, options: &Detach) -> Outcome {
    let mut session = place.session(&options.service)?;
    if let Some(primary) = waits_for_this_copy(&session.report()?) {
        let what = format!("Detaching service {} on this node:", session.service);
        let effect = format!(
            "the application on {primary} waits from its next write on: on_peer_loss is suspend, and this copy must have every write.\n\
             It goes on when this copy is back (`holdfast attach`). Nothing is lost."
        );
        consent::ask_to_stop(&what, &effect, options.yes)?;
    }
    session.run(ServiceCommand::Detach)
}

/// The primary whose application stands still without this copy.
fn waits_for_this_copy(service: &ServiceReport) -> Option<&str> {
    let secondary = service.role == RoleName::Secondary
        && service.on_peer_loss == PeerLossPolicy::Suspend
        && service.in_sync.contains(&service.slot);
    let primary = service
        .peers
        .iter()
        .find(|peer| peer.is_primary && peer.mode != ReplicationMode::Async)?;
    secondary.then_some(primary.name.as_str())
}
