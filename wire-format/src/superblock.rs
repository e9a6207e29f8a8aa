//! The bytes of a superblock: 4096, two slots, the newer whole one counts (D16).
//!
//! The table of the layout is in `docs/metadata.md`, compared with this file by a test.

use crate::bytes::{Fault, Reader, Writer};
use crate::ids::*;
use crate::layout::Layout;
use crate::metadata::*;
use crate::shared::*;

/// Bytes of a superblock.
pub const SUPERBLOCK_LENGTH: usize = 4096;
/// On-disk version written, and the newest one understood.
pub const DISK_VERSION: u16 = 1;
/// Incompatible feature: the layout is one for a larger volume ([`Superblock::room`]). Set while it is, and not kept in
/// [`Superblock::features_incompatible`].
pub const FEATURE_ROOM: u64 = 1;
/// Incompatible features this version understands.
pub const KNOWN_INCOMPATIBLE: u64 = FEATURE_ROOM;
/// Read-only-compatible feature: a journal is kept. Who writes without recording it there would make the journal
/// lie, so a version that keeps none (this one) may read such a volume and not write it. Whoever sets it erases the
/// journal's index of times first.
pub const FEATURE_JOURNAL: u64 = 1;
/// Read-only-compatible features this version understands.
pub const KNOWN_READ_ONLY: u64 = 0;

const MAGIC: [u8; 8] = *b"HOLDFAST";
const NAME_CAP: usize = 63;
const PEER_LENGTH: usize = 104;
/// Everything before the lists, with the header.
const FIXED: usize = 512;
const _: () = assert!(
    FIXED + MAX_GENERATIONS * GENERATION_LENGTH + MAX_VOLUMES * 16 + MAX_PEERS * PEER_LENGTH
        <= SUPERBLOCK_LENGTH
);

/// Why a superblock does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    #[error("there is no Holdfast metadata here (create or adopt the volume first)")]
    Absent,
    #[error("the superblock is damaged: {0}")]
    Damaged(&'static str),
    #[error(
        "the metadata was written by a newer version of Holdfast (format {found}, this one understands {known}); use that version or a newer one"
    )]
    Newer { found: u16, known: u16 },
    #[error(
        "the metadata uses features this version does not understand ({0:#x}); use a newer version of Holdfast"
    )]
    Features(u64),
    #[error(
        "both superblocks are damaged ({first}; {second}): the metadata cannot be used; replace the disk and let it resync, or restore the metadata"
    )]
    Both { first: String, second: String },
    #[error("a superblock cannot hold this: {0}")]
    Unencodable(&'static str),
}

/// Features that this version does not understand and that let it read, not write: with any of them the
/// volume is opened read-only or not at all. 0 = none.
pub fn unknown_read_only_features(sb: &Superblock) -> u64 {
    sb.features_read_only & !KNOWN_READ_ONLY
}

/// The bytes of a superblock. What [`decode`] would not read back as the same is never handed out to be
/// written over what is whole.
///
/// # Errors
/// More entries than a list holds, a name too long, or a value out of its range.
pub fn encode(sb: &Superblock) -> Result<[u8; SUPERBLOCK_LENGTH], SuperblockError> {
    if sb.generations.len() > MAX_GENERATIONS {
        return Err(SuperblockError::Unencodable("too many generations"));
    }
    if sb.volume_disks.len() > MAX_VOLUMES {
        return Err(SuperblockError::Unencodable("too many volumes"));
    }
    if sb.service_name.len() > NAME_CAP || sb.volume_name.len() > NAME_CAP {
        return Err(SuperblockError::Unencodable(
            "a name is longer than 63 bytes",
        ));
    }
    if sb.room != 0 && sb.room <= sb.data_size {
        return Err(SuperblockError::Unencodable(
            "room for no more than there is",
        ));
    }
    let mut w = Writer::with_capacity(SUPERBLOCK_LENGTH);
    w.put(&MAGIC);
    w.u32(0); // The checksum, put in at the end.
    w.u16(DISK_VERSION);
    w.zero(2);
    w.u64(sb.features_incompatible | if sb.room == 0 { 0 } else { FEATURE_ROOM });
    w.u64(sb.features_read_only);
    w.u64(sb.features_compatible);
    w.u64(sb.sequence);
    w.u128(sb.service.0);
    w.u128(sb.volume.0);
    w.u128(sb.node.0);
    w.u128(sb.disk.0);
    w.u16(sb.volume_index.0);
    w.u16(sb.volume_count);
    w.u8(sb.slot.0);
    w.u8(sb.grain_shift);
    w.u8(sb.extent_shift);
    w.zero(1);
    w.u64(sb.data_size);
    w.u32(sb.sector_size);
    w.u32(sb.al_blocks);
    w.u64(sb.undo_size);
    w.u64(sb.journal_size);
    w.u64(sb.area_size);
    for name in [&sb.service_name, &sb.volume_name] {
        w.u8(name.len() as u8);
        w.put(name.as_bytes());
        w.zero(NAME_CAP - name.len());
    }
    w.u64(sb.attach_counter);
    w.u64(sb.incarnation.0);
    w.u64(sb.epoch_gate.number);
    w.u8(sb.epoch_gate.owner);
    w.u8(sb.state.code());
    w.u8(copy_flags_code(sb.flags));
    w.u8(sb.target_source);
    w.u8(sb.mode.code());
    w.u8(sb.on_peer_loss.code());
    w.u8(sb.in_sync.0);
    w.u8(sb.in_sync_pending.0);
    w.u64(sb.target_of.0);
    w.u64(sb.before_resync.0.0);
    w.u64(sb.before_resync.1);
    w.u64(sb.in_sync_version);
    w.u64(sb.position);
    w.u64(sb.generation_base);
    w.u8(sb.generations.len() as u8);
    w.u8(crate::bytes::pack([sb.generations_cut, sb.log_incomplete]));
    w.u8(sb.volume_disks.len() as u8);
    w.zero(5);
    w.u64(sb.room);
    w.zero(FIXED - w.len());
    for generation in &sb.generations {
        put_generation(&mut w, generation);
    }
    w.zero((MAX_GENERATIONS - sb.generations.len()) * GENERATION_LENGTH);
    for disk in &sb.volume_disks {
        w.u128(disk.0);
    }
    w.zero((MAX_VOLUMES - sb.volume_disks.len()) * 16);
    for peer in &sb.peers {
        put_peer(&mut w, peer);
    }
    w.zero(SUPERBLOCK_LENGTH - w.len());
    let mut bytes = [0u8; SUPERBLOCK_LENGTH];
    bytes.copy_from_slice(&w.into_vec());
    let crc = crc32fast::hash(&bytes[12..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    match decode(&bytes) {
        Ok(back) if back == *sb => Ok(bytes),
        Err(SuperblockError::Damaged(why)) => Err(SuperblockError::Unencodable(why)),
        _ => Err(SuperblockError::Unencodable(
            "it would not be read back as it is",
        )),
    }
}

fn put_peer(w: &mut Writer, p: &PeerRecord) {
    let start = w.len();
    w.u8(crate::bytes::pack([p.in_use, p.full_copy]));
    w.u8(p.slot);
    w.u8(p.mode);
    w.zero(5);
    w.u128(p.node.0);
    w.u128(p.disk.0);
    w.u64(p.attach_counter);
    w.u64(p.incarnation.0);
    w.u64(p.bitmap_base.0);
    w.u64(p.known_durable_generation.0);
    w.u64(p.known_durable_position);
    w.zero(PEER_LENGTH - (w.len() - start));
}

fn take_peer(r: &mut Reader) -> Result<PeerRecord, Fault> {
    let start = r.remaining();
    let [in_use, full_copy] = crate::bytes::unpack(r.flags(0b11)?);
    let slot = slot_of(r.u8()?)?.0;
    let mode = r.u8()?;
    if Mode::from_code(mode).is_none() {
        return Err("the mode toward a peer is unknown");
    }
    r.zero(5)?;
    let record = PeerRecord {
        in_use,
        full_copy,
        slot,
        mode,
        node: Uuid(r.u128()?),
        disk: Uuid(r.u128()?),
        attach_counter: r.u64()?,
        incarnation: Incarnation(r.u64()?),
        bitmap_base: GenerationId(r.u64()?),
        known_durable_generation: GenerationId(r.u64()?),
        known_durable_position: r.u64()?,
    };
    r.zero(PEER_LENGTH - (start - r.remaining()))?;
    Ok(record)
}

/// What a superblock says. Allocates at most 4 KiB, whatever the bytes.
///
/// # Errors
/// No metadata, damage, or a newer version.
pub fn decode(bytes: &[u8; SUPERBLOCK_LENGTH]) -> Result<Superblock, SuperblockError> {
    if bytes[..8] != MAGIC {
        return Err(SuperblockError::Absent);
    }
    if bytes[8..12] != crc32fast::hash(&bytes[12..]).to_le_bytes() {
        return Err(SuperblockError::Damaged("its checksum does not match"));
    }
    // Only after the checksum: a flipped bit is damage, not a newer version. And before anything else is
    // read: what a newer version means by its fields is not known here, and "damaged" would fall back to the
    // older slot (D16). So magic, checksum, version and incompatible features keep their places for good.
    let version = u16::from_le_bytes([bytes[12], bytes[13]]);
    if version > DISK_VERSION {
        return Err(SuperblockError::Newer {
            found: version,
            known: DISK_VERSION,
        });
    }
    let mut features = [0; 8];
    features.copy_from_slice(&bytes[16..24]);
    let unknown = u64::from_le_bytes(features) & !KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        return Err(SuperblockError::Features(unknown));
    }
    let sb = fields(bytes).map_err(SuperblockError::Damaged)?;
    match Layout::of(&sb) {
        Ok(_) => Ok(sb),
        Err(_) => Err(SuperblockError::Damaged("its sizes make no layout")),
    }
}

fn fields(bytes: &[u8; SUPERBLOCK_LENGTH]) -> Result<Superblock, Fault> {
    let mut r = Reader::new(&bytes[12..]);
    let at = |r: &Reader| SUPERBLOCK_LENGTH - r.remaining();
    if r.u16()? == 0 {
        return Err("version 0 never existed");
    }
    r.zero(2)?;
    let incompatible = r.u64()?;
    let features_incompatible = incompatible & !FEATURE_ROOM;
    let features_read_only = r.u64()?;
    let features_compatible = r.u64()?;
    let sequence = r.u64()?;
    let service = Uuid(r.u128()?);
    let volume = Uuid(r.u128()?);
    let node = Uuid(r.u128()?);
    let disk = Uuid(r.u128()?);
    let volume_index = volume_of(r.u16()?)?;
    let volume_count = r.u16()?;
    let slot = slot_of(r.u8()?)?;
    let grain_shift = r.u8()?;
    let extent_shift = r.u8()?;
    r.zero(1)?;
    let data_size = r.u64()?;
    let sector_size = r.u32()?;
    let al_blocks = r.u32()?;
    let undo_size = r.u64()?;
    let journal_size = r.u64()?;
    let area_size = r.u64()?;
    let mut name = || -> Result<String, Fault> {
        let length = usize::from(r.u8()?);
        let text = r.text(length, NAME_CAP)?;
        r.zero(NAME_CAP - length)?;
        Ok(text)
    };
    let service_name = name()?;
    let volume_name = name()?;
    let attach_counter = r.u64()?;
    let incarnation = Incarnation(r.u64()?);
    let number = r.u64()?;
    let epoch_gate = epoch_of(number, r.u8()?)?;
    let state = CopyState::from_code(r.u8()?).ok_or("the state of the copy is unknown")?;
    let flags = take_copy_flags(&mut r)?;
    let target_source = slot_or_none(r.u8()?)?;
    let mode = Mode::from_code(r.u8()?).ok_or("the mode is unknown")?;
    let on_peer_loss = OnPeerLoss::from_code(r.u8()?).ok_or("the policy is unknown")?;
    let in_sync = SlotSet(r.u8()?);
    let in_sync_pending = SlotSet(r.u8()?);
    let target_of = GenerationId(r.u64()?);
    let before_resync = (GenerationId(r.u64()?), r.u64()?);
    let in_sync_version = r.u64()?;
    let position = r.u64()?;
    let generation_base = r.u64()?;
    let generation_count = usize::from(r.u8()?);
    let [generations_cut, log_incomplete] = crate::bytes::unpack(r.flags(0b11)?);
    let disk_count = usize::from(r.u8()?);
    if generation_count > MAX_GENERATIONS || disk_count > MAX_VOLUMES {
        return Err("a list is longer than allowed");
    }
    r.zero(5)?;
    let room = r.u64()?;
    if (room != 0) != (incompatible & FEATURE_ROOM != 0) || (room != 0 && room <= data_size) {
        return Err("the room for more is none");
    }
    let reserved = FIXED - at(&r);
    r.zero(reserved)?;
    let mut generations = Vec::with_capacity(generation_count);
    for _ in 0..generation_count {
        generations.push(take_generation(&mut r)?);
    }
    r.zero((MAX_GENERATIONS - generation_count) * GENERATION_LENGTH)?;
    let mut volume_disks = Vec::with_capacity(disk_count);
    for _ in 0..disk_count {
        volume_disks.push(Uuid(r.u128()?));
    }
    r.zero((MAX_VOLUMES - disk_count) * 16)?;
    let mut peers = [PeerRecord::default(); MAX_PEERS];
    for peer in &mut peers {
        *peer = take_peer(&mut r)?;
    }
    let rest = r.remaining();
    r.zero(rest)?;
    Ok(Superblock {
        sequence,
        service,
        volume,
        volume_index,
        volume_count,
        service_name,
        volume_name,
        node,
        slot,
        disk,
        data_size,
        room,
        sector_size,
        grain_shift,
        extent_shift,
        al_blocks,
        undo_size,
        journal_size,
        area_size,
        attach_counter,
        incarnation,
        epoch_gate,
        state,
        flags,
        target_of,
        target_source,
        before_resync,
        mode,
        on_peer_loss,
        in_sync,
        in_sync_version,
        in_sync_pending,
        position,
        generation_base,
        generations,
        generations_cut,
        log_incomplete,
        volume_disks,
        peers,
        features_incompatible,
        features_read_only,
        features_compatible,
    })
}

/// The superblock that counts of the two slots, and which slot it is (D16).
///
/// # Errors
/// Both damaged or absent; a newer version or an unknown feature in either, even if the other slot is whole:
/// the newer version wrote last and what it means is not known here.
pub fn choose(
    a: &[u8; SUPERBLOCK_LENGTH],
    b: &[u8; SUPERBLOCK_LENGTH],
) -> Result<(Superblock, usize), SuperblockError> {
    let newer = |e: &SuperblockError| {
        matches!(
            e,
            SuperblockError::Newer { .. } | SuperblockError::Features(_)
        )
    };
    match (decode(a), decode(b)) {
        (Err(e), _) | (_, Err(e)) if newer(&e) => Err(e),
        (Ok(x), Ok(y)) => Ok(if y.sequence > x.sequence {
            (y, 1)
        } else {
            (x, 0)
        }),
        (Ok(x), Err(_)) => Ok((x, 0)),
        (Err(_), Ok(y)) => Ok((y, 1)),
        (Err(SuperblockError::Absent), Err(SuperblockError::Absent)) => {
            Err(SuperblockError::Absent)
        }
        (Err(x), Err(y)) => Err(SuperblockError::Both {
            first: x.to_string(),
            second: y.to_string(),
        }),
    }
}
