//! `holdfast split-brain`

use crate::cli::{Keep, Place, Service, SplitBrain};
use crate::consent;
use crate::failure::{FAILED, Failure, Outcome};
use holdfast_replicator::control::protocol::{LinkName, ServiceCommand};
use holdfast_replicator::control::render::{bytes, timestamp};
use holdfast_replicator::surplus::{self, Saved};
use std::path::Path;

pub fn run(place: &Place, verb: &SplitBrain) -> Outcome {
    match verb {
        SplitBrain::Show(service) => show(place, service),
        SplitBrain::Resolve { service, keep, yes } => resolve(place, service, *keep, *yes),
        SplitBrain::Saved { service } => saved(place, service),
        SplitBrain::RemoveSaved { service, save, yes } => remove(place, service, save, *yes),
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
    let mut total = 0;
    for saved in saves {
        let about = &saved.about;
        let space = surplus::space(&saved).unwrap_or(about.bytes);
        total += space;
        say!(
            "{}  {}: {} blocks, {} bytes, written after position {} of generation {}, replaced by copy {}\n  {}, {} on its disk",
            saved.name,
            timestamp(about.saved_ms),
            about.blocks,
            about.bytes,
            about.after,
            about.generation,
            about.peer_slot,
            saved.path.display(),
            bytes(space)
        );
    }
    if total > 0 {
        say!(
            "{} in all; `holdfast split-brain remove-saved` gives it back",
            bytes(total)
        );
    }
    Ok(())
}

fn remove(place: &Place, service: &str, save: &str, yes: bool) -> Outcome {
    let saves = list(place, service)?;
    let Some(saved) = saves.iter().find(|saved| saved.name == save) else {
        return Err(Failure::new(
            FAILED,
            format!("there is no save {save} of service {service}"),
            "Nothing was removed",
            "See `holdfast split-brain saved`",
        ));
    };
    let about = &saved.about;
    let loss = format!(
        "{} blocks, {} bytes that this node's copy wrote alone and gave up, saved {}: no copy has them any more",
        about.blocks,
        about.bytes,
        timestamp(about.saved_ms)
    );
    consent::ask(
        &format!("Removing the save {save} of service {service}:"),
        &loss,
        yes,
    )?;
    surplus::remove(saved).map_err(|error| {
        Failure::new(
            FAILED,
            format!("{} cannot be removed: {error}", saved.path.display()),
            "What is left of it is not listed any more if its name ends with .partial",
            "Remove the rest by hand",
        )
    })?;
    say!("the save {save} of service {service} was removed");
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
    let written = surplus::export(saved, volume, to).map_err(|error| {
        Failure::new(
            FAILED,
            format!("{} cannot be written: {error}", to.display()),
            "The save stays as it is; some of its blocks may have been written to the target",
            "Correct that and do it again",
        )
    })?;
    say!(
        "{written} bytes of volume {volume} were written to {}, each at its own offset; the rest of it is as it was",
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
        for peer in session.report()?.peers {
            if peer.link != LinkName::Established && peer.link != LinkName::Resync {
                say!(
                    "Node {} keeps its writes and fills this copy once they meet; if it stays away, run `holdfast connect {}` there.",
                    peer.name,
                    session.service
                );
            }
        }
    }
    Ok(())
}
