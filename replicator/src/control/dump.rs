//! What the disks of this node's copies say by themselves: `holdfast dump-metadata`, and what would be lost with a copy
//! that no running replicator can be asked about. Reads only, takes no lock, and so may run beside a replicator.

use super::report::*;
use crate::config::{Config, MetadataPlace, ServiceConfig, VolumeConfig};
use crate::place::{BLOCK, Hints, Locator};
use holdfast_wire_format::ids::{Epoch, Slot};
use holdfast_wire_format::locator::LocatorError;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock::{self, SUPERBLOCK_LENGTH};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    #[error("there is no service {service} in {}; nothing was read", file.display())]
    NoService { service: String, file: PathBuf },
    #[error("service {service} has no volume {volume} in {}; nothing was read", file.display())]
    NoVolume {
        service: String,
        volume: String,
        file: PathBuf,
    },
}

/// One volume's metadata, or why there is none to show.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeDump {
    pub service: String,
    pub volume: String,
    /// File or device the metadata is in, and the byte at which it starts.
    pub metadata_path: PathBuf,
    pub metadata_offset: Option<u64>,
    pub superblock: Option<SuperblockReport>,
    pub error: Option<String>,
}

/// A superblock in printable form.
#[derive(Clone, Debug, Serialize)]
pub struct SuperblockReport {
    /// Which of the two slots counts, 0 or 1.
    pub slot_used: u8,
    pub sequence: u64,
    pub service: String,
    pub service_name: String,
    pub volume: String,
    pub volume_name: String,
    pub volume_index: u16,
    pub volume_count: u16,
    pub node: String,
    /// Slot of this copy in the service.
    pub slot: u8,
    pub disk: String,
    pub data_size: u64,
    pub sector_size: u32,
    /// Bytes per bit of the dirty bitmap.
    pub grain: u64,
    /// Bytes per extent of the activity log.
    pub extent: u64,
    pub activity_log_blocks: u32,
    pub undo_size: u64,
    pub area_size: u64,
    /// What follows belongs to the service as a whole and counts on its first volume only.
    pub attach_counter: u64,
    pub incarnation: String,
    pub epoch: u64,
    pub epoch_owner: Option<u8>,
    pub state: StateName,
    pub flags: Vec<&'static str>,
    pub resync_target_of: Option<String>,
    pub mode: ReplicationMode,
    pub on_peer_loss: PeerLossPolicy,
    pub in_sync: Vec<u8>,
    pub in_sync_version: u64,
    pub in_sync_pending: Vec<u8>,
    pub position_at_least: u64,
    /// Position at which the current generation began.
    pub generation_base: u64,
    pub generations: Vec<GenerationReport>,
    pub generations_cut: bool,
    /// After an unclean stop every block counts as different: the activity log was off, or was found damaged.
    pub log_incomplete: bool,
    pub peers: Vec<PeerRecordReport>,
}

/// What the copy durably knows of another one.
#[derive(Clone, Debug, Serialize)]
pub struct PeerRecordReport {
    pub slot: u8,
    pub node: String,
    pub disk: String,
    pub attach_counter: u64,
    pub bitmap_base: Option<String>,
    pub known_durable_generation: Option<String>,
    pub known_durable_position: u64,
    pub full_copy: bool,
}

/// The metadata of every volume of one service, or of all.
///
/// # Errors
/// The service is not configured. What is wrong with a single volume is in its dump instead.
pub fn dump(config: &Config, service: Option<&str>) -> Result<Vec<VolumeDump>, DumpError> {
    let services: Vec<&ServiceConfig> = match service {
        Some(name) => vec![
            config
                .service(name)
                .ok_or_else(|| no_service(config, name))?,
        ],
        None => config.services.iter().collect(),
    };
    let hints = Hints::load(&config.node.state_dir);
    Ok(services
        .into_iter()
        .flat_map(|service| service.volumes.iter().map(move |volume| (service, volume)))
        .map(|(service, volume)| one(service, volume, hints.size(&service.name, &volume.name)))
        .collect())
}

fn no_service(config: &Config, name: &str) -> DumpError {
    DumpError::NoService {
        service: name.to_string(),
        file: config.file.clone(),
    }
}

/// In words: what this node's copy of a volume is, and whether another copy is known to have all of it.
///
/// # Errors
/// The service or the volume is not configured.
pub fn loss(config: &Config, service: &str, volume: Option<&str>) -> Result<String, DumpError> {
    let found = config
        .service(service)
        .ok_or_else(|| no_service(config, service))?;
    if let Some(volume) = volume
        && found.volume(volume).is_none()
    {
        return Err(DumpError::NoVolume {
            service: service.to_string(),
            volume: volume.to_string(),
            file: config.file.clone(),
        });
    }
    let dumps = dump(config, Some(service))?;
    // The state of the service as a whole is on its first volume.
    let lead = dumps.first().and_then(|dump| dump.superblock.as_ref());
    let mut text = String::new();
    for dump in dumps
        .iter()
        .filter(|dump| volume.is_none_or(|name| name == dump.volume))
    {
        let _ = match &dump.superblock {
            Some(block) => writeln!(
                text,
                "volume {}: {} in {} blocks of {} bytes, disk {}",
                dump.volume,
                super::render::bytes(block.data_size),
                block.data_size / u64::from(block.sector_size.max(1)),
                block.sector_size,
                block.disk
            ),
            None => writeln!(
                text,
                "volume {}: {}",
                dump.volume,
                dump.error.as_deref().unwrap_or("no metadata")
            ),
        };
    }
    match lead {
        Some(lead) => text.push_str(&standing(found, lead)),
        None => text.push_str("nothing is known of the state of this copy\n"),
    }
    Ok(text)
}

fn standing(service: &ServiceConfig, lead: &SuperblockReport) -> String {
    let name = |slot: &u8| match service.peers.iter().find(|peer| peer.slot == Slot(*slot)) {
        Some(peer) => peer.node.to_string(),
        None if *slot == lead.slot => "this node".to_string(),
        None => format!("slot {slot}"),
    };
    let mut text = format!(
        "this copy: {}, epoch {}, position {} or later\n",
        lead.state, lead.epoch, lead.position_at_least
    );
    let others: Vec<String> = lead
        .in_sync
        .iter()
        .filter(|slot| **slot != lead.slot)
        .map(name)
        .collect();
    if others.is_empty() && lead.in_sync.contains(&lead.slot) {
        text.push_str(
            "NO OTHER COPY is known to hold every acknowledged write: what only this copy has is lost for good\n",
        );
    } else if others.is_empty() {
        text.push_str("which copies hold every acknowledged write is not known here\n");
    } else {
        let _ = writeln!(
            text,
            "as last recorded here, every acknowledged write is also on: {}",
            others.join(", ")
        );
    }
    text
}

fn one(service: &ServiceConfig, volume: &VolumeConfig, hint: Option<u64>) -> VolumeDump {
    let path = match &volume.metadata {
        MetadataPlace::Internal => &volume.backing,
        MetadataPlace::External(path) => path,
    };
    let mut dump = VolumeDump {
        service: service.name.clone(),
        volume: volume.name.clone(),
        metadata_path: path.clone(),
        metadata_offset: None,
        superblock: None,
        error: None,
    };
    let read = File::open(path).and_then(|file| {
        let internal = volume.metadata == MetadataPlace::Internal;
        let Some(base) = base(&file, internal, hint)? else {
            return Ok(None);
        };
        Ok(Some((base, read_slots(&file, base)?)))
    });
    match read {
        Ok(Some((base, [first, second]))) => {
            dump.metadata_offset = Some(base);
            match superblock::choose(&first, &second) {
                Ok((block, used)) => dump.superblock = Some(report(&block, used as u8)),
                Err(error) => dump.error = Some(error.to_string()),
            }
        }
        Ok(None) => dump.error = Some("there is no Holdfast metadata at its end".into()),
        Err(error) => dump.error = Some(unreadable(path, &error)),
    }
    dump
}

fn unreadable(path: &Path, error: &io::Error) -> String {
    format!("{} cannot be read: {error}", path.display())
}

/// Where the metadata begins; none where internal metadata has no locator.
fn base(file: &File, internal: bool, hint: Option<u64>) -> io::Result<Option<u64>> {
    if !internal {
        return Ok(Some(0));
    }
    let mut cursor = file;
    let size = cursor.seek(SeekFrom::End(0))?;
    for size in [Some(size), hint.filter(|hint| *hint < size)]
        .into_iter()
        .flatten()
    {
        let Some(offset) = Locator::offset(size) else {
            continue;
        };
        let mut block = [0; BLOCK as usize];
        file.read_exact_at(&mut block, offset)?;
        match Locator::decode(&block, size) {
            Ok(locator) => return Ok(Some(locator.area_offset)),
            Err(newer @ LocatorError::Newer { .. }) => return Err(io::Error::other(newer)),
            Err(_) => {}
        }
    }
    Ok(None)
}

fn read_slots(file: &File, base: u64) -> io::Result<[[u8; SUPERBLOCK_LENGTH]; 2]> {
    let mut slots = [[0; SUPERBLOCK_LENGTH]; 2];
    for (number, slot) in slots.iter_mut().enumerate() {
        file.read_exact_at(slot, base + (number * SUPERBLOCK_LENGTH) as u64)?;
    }
    Ok(slots)
}

fn report(block: &Superblock, slot_used: u8) -> SuperblockReport {
    let flags = &block.flags;
    let known = |id: holdfast_wire_format::ids::GenerationId| (id.0 != 0).then(|| id.to_string());
    SuperblockReport {
        slot_used,
        sequence: block.sequence,
        service: block.service.to_string(),
        service_name: block.service_name.clone(),
        volume: block.volume.to_string(),
        volume_name: block.volume_name.clone(),
        volume_index: block.volume_index.0,
        volume_count: block.volume_count,
        node: block.node.to_string(),
        slot: block.slot.0,
        disk: block.disk.to_string(),
        data_size: block.data_size,
        sector_size: block.sector_size,
        grain: 1 << block.grain_shift,
        extent: 1 << block.extent_shift,
        activity_log_blocks: block.al_blocks,
        undo_size: block.undo_size,
        area_size: block.area_size,
        attach_counter: block.attach_counter,
        incarnation: format!("{:016x}", block.incarnation.0),
        epoch: block.epoch_gate.number,
        epoch_owner: (block.epoch_gate.owner != Epoch::NO_OWNER).then_some(block.epoch_gate.owner),
        state: block.state.into(),
        flags: [
            (flags.unclean, "unclean"),
            (flags.was_primary, "was-primary"),
            (flags.zeroed, "zeroed"),
            (flags.rolled_back, "rolled-back"),
            (flags.undo_lost, "undo-lost"),
            (flags.solo, "solo"),
        ]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect(),
        resync_target_of: known(block.target_of),
        mode: block.mode.into(),
        on_peer_loss: block.on_peer_loss.into(),
        in_sync: slots(block.in_sync),
        in_sync_version: block.in_sync_version,
        in_sync_pending: slots(block.in_sync_pending),
        position_at_least: block.position,
        generation_base: block.generation_base,
        generations: block
            .generations
            .iter()
            .map(GenerationReport::from)
            .collect(),
        generations_cut: block.generations_cut,
        log_incomplete: block.log_incomplete,
        peers: block
            .peers
            .iter()
            .filter(|peer| peer.in_use)
            .map(|peer| PeerRecordReport {
                slot: peer.slot,
                node: peer.node.to_string(),
                disk: peer.disk.to_string(),
                attach_counter: peer.attach_counter,
                bitmap_base: known(peer.bitmap_base),
                known_durable_generation: known(peer.known_durable_generation),
                known_durable_position: peer.known_durable_position,
                full_copy: peer.full_copy,
            })
            .collect(),
    }
}

/// For people: one block of lines per volume.
pub fn render(dumps: &[VolumeDump]) -> String {
    let mut out = String::new();
    for dump in dumps {
        let _ = write!(
            out,
            "service {}, volume {}: {}",
            dump.service,
            dump.volume,
            dump.metadata_path.display()
        );
        if let Some(offset) = dump.metadata_offset {
            let _ = write!(out, ", byte {offset}");
        }
        out.push('\n');
        if let Some(error) = &dump.error {
            let _ = writeln!(out, "  {error}");
        }
        // The JSON form has every field with its name; this is the same, a line each.
        if let Some(Ok(serde_json::Value::Object(fields))) =
            dump.superblock.as_ref().map(serde_json::to_value)
        {
            for (name, value) in fields {
                render_field(&mut out, &name, &value);
            }
        }
        out.push('\n');
    }
    out
}

fn render_field(out: &mut String, name: &str, value: &serde_json::Value) {
    use serde_json::Value;
    let _ = match value {
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let _ = writeln!(out, "  {name}:");
            for item in items {
                let fields: Vec<String> = item
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| format!("{name} {}", scalar(value)))
                    .collect();
                let _ = writeln!(out, "    {}", fields.join(", "));
            }
            Ok(())
        }
        value => writeln!(out, "  {name:<22}{}", scalar(value)),
    };
}

fn scalar(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "none".to_string(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "none".to_string(),
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{CreateOptions, create};
    use holdfast_link::Identity;

    fn node(directory: &Path, metadata: &str) -> Config {
        let state = directory.join("state");
        Identity::init(&state, "alpha").unwrap();
        let text = format!(
            r#"
            [node]
            name = "alpha"
            state_dir = "{state}"
            control_socket = "{directory}/control.sock"
            metrics = "off"
            [[service]]
            name = "db"
            id = "0123456789abcdef0123456789abcdef"
            slot = 0
            [[service.volume]]
            name = "data"
            backing = "{directory}/data.img"
            metadata = "{metadata}"
            size = "64MiB"
            "#,
            state = state.display(),
            directory = directory.display(),
        );
        let config = Config::parse(&text, Path::new("holdfast.toml")).unwrap();
        create(&config, "db", &CreateOptions::default()).unwrap();
        config
    }

    #[test]
    fn what_was_created_is_read_back_wherever_the_metadata_is() {
        for place in ["internal", "external"] {
            let directory = tempfile::tempdir().unwrap();
            let external = directory.path().join("meta.img").display().to_string();
            let config = node(
                directory.path(),
                if place == "internal" {
                    place
                } else {
                    &external
                },
            );
            let dumps = dump(&config, None).unwrap();
            let block = dumps[0].superblock.as_ref().unwrap();
            assert_eq!(
                (block.service_name.as_str(), block.volume_name.as_str()),
                ("db", "data")
            );
            assert_eq!(
                (block.data_size, block.in_sync.as_slice()),
                (64 << 20, &[0][..])
            );
            let text = render(&dumps);
            assert!(text.contains("  service_name          db\n"), "{text}");
        }
    }

    #[test]
    fn a_torn_superblock_leaves_the_other_one_and_two_leave_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let external = directory.path().join("meta.img");
        let config = node(directory.path(), &external.display().to_string());
        let file = File::options().write(true).open(&external).unwrap();
        let used = dump(&config, None).unwrap()[0]
            .superblock
            .as_ref()
            .unwrap()
            .slot_used;
        file.write_all_at(b"torn", u64::from(used) * BLOCK + 100)
            .unwrap();
        let survivor = dump(&config, None).unwrap()[0]
            .superblock
            .as_ref()
            .unwrap()
            .slot_used;
        assert_ne!(survivor, used);
        file.write_all_at(b"torn", u64::from(survivor) * BLOCK + 100)
            .unwrap();
        let both = dump(&config, None).unwrap();
        assert!(both[0].superblock.is_none());
        assert!(
            both[0]
                .error
                .as_ref()
                .unwrap()
                .contains("both superblocks are damaged"),
            "{both:?}"
        );
    }

    #[test]
    fn the_only_copy_is_called_that() {
        let directory = tempfile::tempdir().unwrap();
        let config = node(directory.path(), "internal");
        let said = loss(&config, "db", Some("data")).unwrap();
        assert!(said.contains("NO OTHER COPY"), "{said}");
        assert!(said.contains("volume data: 64.0 MiB"), "{said}");
        assert!(loss(&config, "db", Some("log")).is_err());
        assert!(dump(&config, Some("web")).is_err());
    }
}
