//! `holdfast volume`

use crate::cli::{Place, Sizes, Volume, VolumeAdopt, VolumeCreate, VolumeRemove, VolumeReplace};
use crate::consent;
use crate::failure::{FAILED, Failure, Outcome};
use crate::output::{json_line, print};
use holdfast_replicator::config::parse_size;
use holdfast_replicator::control::client::Client;
use holdfast_replicator::control::dump;
use holdfast_replicator::control::protocol::{RoleName, ServiceCommand, ServiceReport};
use holdfast_replicator::control::render;
use holdfast_replicator::create::{self, CreateOptions, Created};
use std::time::Duration;

pub fn run(place: &Place, verb: &Volume) -> Outcome {
    match verb {
        Volume::Create(options) => create(place, options),
        Volume::Adopt(options) => adopt(place, options),
        Volume::List { json } => list(place, *json),
        Volume::Grow {
            service,
            volume,
            size,
        } => grow(place, service, volume, size.as_deref()),
        Volume::AttachDisk(service) => place.session(service)?.run(ServiceCommand::AttachDisk),
        Volume::DetachDisk(service) => place.session(service)?.run(ServiceCommand::DetachDisk),
        Volume::ReplaceDisk(options) => replace_disk(place, options),
        Volume::Remove(options) => remove(place, options),
    }
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::from_error(&error)
}

fn size(text: &str) -> Result<u64, Failure> {
    parse_size(text).ok_or_else(|| {
        Failure::new(
            FAILED,
            format!("{text:?} is no size"),
            "Nothing was changed",
            "Write bytes, or a unit of 1024 as in 20GiB",
        )
    })
}

impl Sizes {
    fn options(&self) -> Result<CreateOptions, Failure> {
        let grain_shift = match &self.grain {
            None => None,
            Some(text) => {
                let grain = size(text)?;
                if !grain.is_power_of_two() {
                    return Err(Failure::new(
                        FAILED,
                        format!("{text:?} is not a power of two"),
                        "Nothing was changed",
                        "Use 4KiB to 1MiB",
                    ));
                }
                Some(grain.trailing_zeros() as u8)
            }
        };
        Ok(CreateOptions {
            undo_size: self.undo_size.as_deref().map(size).transpose()?,
            grain_shift,
            al_blocks: self.activity_log_blocks,
            ..CreateOptions::default()
        })
    }
}

fn tell(created: &Created) {
    for volume in &created.volumes {
        say!(
            "volume {} of service {}: {} on {}, {} of metadata in {}{}",
            volume.name,
            created.service,
            render::bytes(volume.size),
            volume.path.display(),
            render::bytes(volume.metadata_size),
            volume.metadata_path.display(),
            if volume.zeroed {
                "; reads zero everywhere"
            } else {
                ""
            }
        );
    }
    if created.in_sync.is_empty() {
        say!(
            "No copy counts as the first one yet: start the replicators, then `holdfast promote --force` on the node \
             whose data is to be kept."
        );
    } else {
        say!("All copies created like this are equal: no initial copy is needed.");
    }
}

fn create(place: &Place, options: &VolumeCreate) -> Outcome {
    let config = place.configuration()?;
    let service = &options.service;
    let mut loss = String::new();
    if options.overwrite_metadata {
        loss += &dump::loss(&config, service, None).map_err(failed)?;
    }
    if options.zero {
        loss += &create::contents(&config, service).map_err(failed)?;
    }
    if !loss.is_empty() {
        let doing = match (options.overwrite_metadata, options.zero) {
            (true, true) => format!(
                "Making service {service} anew and writing zeroes over all of it; this copy forgets what it was:"
            ),
            (true, false) => {
                format!("Making service {service} anew; this copy forgets what it was:")
            }
            (false, _) => format!("Writing zeroes over the volumes of service {service}:"),
        };
        consent::ask(&doing, &loss, options.yes)?;
    }
    let chosen = CreateOptions {
        overwrite_metadata: options.overwrite_metadata,
        zero: options.zero,
        ..options.sizes.options()?
    };
    tell(&create::create(&config, &options.service, &chosen).map_err(failed)?);
    Ok(())
}

fn adopt(place: &Place, options: &VolumeAdopt) -> Outcome {
    let config = place.configuration()?;
    let chosen = CreateOptions {
        adopt: true,
        assume_shrunk: options.assume_shrunk,
        ..options.sizes.options()?
    };
    tell(&create::create(&config, &options.service, &chosen).map_err(failed)?);
    Ok(())
}

fn list(place: &Place, json: bool) -> Outcome {
    let status = place.connect()?.status()?;
    if json {
        let volumes: Vec<_> = status
            .services
            .iter()
            .flat_map(|service| {
                service.volumes.iter().map(|volume| {
                    serde_json::json!({ "service": service.name, "role": service.role, "state": service.state, "volume": volume })
                })
            })
            .collect();
        print(&json_line(&volumes));
        return Ok(());
    }
    for service in &status.services {
        for volume in &service.volumes {
            print(&format!(
                "{:<30} {:>10}  {:<10} {:<13} {}\n",
                format!("{}/{}", service.name, volume.name),
                render::bytes(volume.size),
                service.role,
                service.state,
                volume.nbd_uris.join("  ")
            ));
        }
    }
    Ok(())
}

/// A growth zeroes what is new, on every copy. That may take hours, and is answered at its end.
const GROWTH_PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);

fn grow(place: &Place, service: &str, volume: &str, text: Option<&str>) -> Outcome {
    let size = text.map(size).transpose()?;
    if let Ok(mut client) = place.connect() {
        let of_service = |report: &&ServiceReport| report.name == service;
        let node = client.status()?;
        let running = node.services.iter().find(of_service);
        if running.is_some_and(|report| report.role != RoleName::Detached) {
            return grow_running(client, service, volume, size);
        }
    }
    let config = place.configuration()?;
    let grown = create::grow(&config, service, volume, size).map_err(failed)?;
    say!(
        "volume {volume} of service {service} on {}: {} became {}. Grow it on every other node too, then start the \
         replicators: copies of different size do not connect.",
        grown.path.display(),
        render::bytes(grown.before),
        render::bytes(grown.after)
    );
    Ok(())
}

/// All copies, by the replicators that run. The application goes on.
fn grow_running(client: Client, service: &str, volume: &str, size: Option<u64>) -> Outcome {
    let Some(size) = size else {
        return Err(Failure::new(
            FAILED,
            "the replicator runs, and how large the volume is to become was not said",
            "Nothing was changed",
            "Name the size, as in 20GiB: every copy's device must have room for it and its metadata",
        ));
    };
    say!(
        "making room for {} on every copy, then growing them, this one last; the application goes on, and \
         `holdfast events --follow` on each node tells how far it is",
        render::bytes(size)
    );
    let command = ServiceCommand::Grow {
        volume: volume.to_owned(),
        size,
    };
    match client.begin(service, command, GROWTH_PATIENCE)? {
        Some(text) => say!("{text}"),
        None => say!("it is still at work; `holdfast status` shows the size"),
    }
    Ok(())
}

fn replace_disk(place: &Place, options: &VolumeReplace) -> Outcome {
    let config = place.configuration()?;
    let volume = Some(options.volume.as_str());
    let loss = dump::loss(&config, &options.service, volume).map_err(failed)?;
    let doing = format!(
        "Starting volume {} of service {} anew on this node; all of it is to be copied from the peer:",
        options.volume, options.service
    );
    consent::ask(&doing, &loss, options.yes)?;
    let chosen = CreateOptions {
        overwrite_metadata: options.overwrite_metadata,
        ..options.sizes.options()?
    };
    let created = create::replace_disk(&config, &options.service, &options.volume, &chosen);
    for volume in created.map_err(failed)?.volumes {
        say!(
            "volume {}: new metadata in {}; start the replicator, and the peer fills it",
            volume.name,
            volume.metadata_path.display()
        );
    }
    Ok(())
}

fn remove(place: &Place, options: &VolumeRemove) -> Outcome {
    let config = place.configuration()?;
    let volume = Some(options.volume.as_str());
    let loss = dump::loss(&config, &options.service, volume).map_err(failed)?;
    let doing = format!(
        "Taking the metadata off this node's copy of volume {} of service {}; its data stays, and is no copy any more:",
        options.volume, options.service
    );
    consent::ask(&doing, &loss, options.yes)?;
    create::remove(&config, &options.service, &options.volume).map_err(failed)?;
    say!(
        "removed; take the volume out of {} now",
        config.file.display()
    );
    Ok(())
}
