//! `holdfast split-brain`

use crate::cli::{Keep, Place, Service, SplitBrain};
use crate::consent;
use crate::failure::{FAILED, Failure, Outcome};
use holdfast_replicator::control::protocol::ServiceCommand;
use holdfast_replicator::control::render::timestamp;
use holdfast_replicator::surplus::{self, Saved};
use std::path::Path;

pub fn run(place: &Place, verb: &SplitBrain) -> Outcome {
    match verb {
        SplitBrain::Show(service) => show(place, service),
        SplitBrain::Resolve { service, keep, yes } => resolve(place, service, *keep, *yes),
        SplitBrain::Saved { service } => saved(place, service),
        SplitBrain::Export {
            service,
            volume,
            save,
            to,
        } => export(place, service, volume, save, to),
    }
}

/// What is in this node's state directory, whether a replicator runs or not.
fn list(place: &Place, service: &str) -> Result<Vec<Saved>, Failure> {
    let config = place.configuration()?;
    if config.service(service).is_none() {
        return Err(Failure::new(
            FAILED,
            format!("the configuration has no service {service}"),
            "Nothing was changed",
            "Name one of its services",
        ));
    }
    surplus::list(&config.node.state_dir, service).map_err(|error| {
        Failure::new(
            FAILED,
            format!("what was saved of service {service} cannot be read: {error}"),
            "Nothing was changed",
            "Check the directory `surplus` in the state directory",
        )
    })
}

fn saved(place: &Place, service: &str) -> Outcome {
    let saves = list(place, service)?;
    if saves.is_empty() {
        say!("nothing of service {service} was saved on this node");
    }
    for saved in saves {
        let about = &saved.about;
        say!(
            "{}  {}: {} blocks, {} bytes, written after position {} of generation {}, replaced by copy {}\n  {}",
            saved.name,
            timestamp(about.saved_ms),
            about.blocks,
            about.bytes,
            about.after,
            about.generation,
            about.peer_slot,
            saved.path.display()
        );
    }
    Ok(())
}

fn export(place: &Place, service: &str, volume: &str, save: &str, to: &Path) -> Outcome {
    let saves = list(place, service)?;
    let saved = saves.iter().find(|saved| saved.name == save);
    let holds = |saved: &&Saved| {
        saved
            .about
            .ranges
            .iter()
            .any(|range| range.volume == volume)
    };
    let Some(saved) = saved.filter(holds) else {
        return Err(Failure::new(
            FAILED,
            format!("there is no save {save} of service {service} with blocks of volume {volume}"),
            "Nothing was written",
            "See `holdfast split-brain saved`",
        ));
    };
    let bytes = surplus::export(saved, volume, to).map_err(|error| {
        Failure::new(
            FAILED,
            format!("{} cannot be written: {error}", to.display()),
            "The save stays as it is; some of its blocks may have been written to the target",
            "Correct that and do it again",
        )
    })?;
    say!(
        "{bytes} bytes of volume {volume} were written to {}, each at its own offset; the rest of it is as it was",
        to.display()
    );
    Ok(())
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
    session.run(ServiceCommand::ResolveSplitBrain { discard_mine })?;
    if discard_mine {
        say!("The other node's link to this one stays off until `holdfast connect` is run there.");
    }
    Ok(())
}
