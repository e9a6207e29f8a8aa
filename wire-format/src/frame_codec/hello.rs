//! The bytes of a `Hello`: what two copies tell each other first.
//!
//! Eighteen bytes that never change (versions, features), then sections, each with its length in front. A later
//! version appends to a section or adds one at the end, and its neighbour leaves that unread. What must not be left
//! unread is a required feature.

use super::body::{put_epoch, put_text, take_epoch, take_text};
use super::version::{VersionError, Versions, agree};
use crate::bytes::{Fault, Reader, Writer, pack, unpack};
use crate::frame::*;
use crate::ids::*;
use crate::shared::*;

const NAME_CAP: usize = 64;
/// Longest name of a volume, as in the superblock.
const VOLUME_NAME_CAP: usize = 63;

/// What the first bytes of a `Hello` say, which no version changes: a node too far apart is told apart from
/// one that sends nonsense.
pub(super) fn incompatible(kind: FrameKind, payload: &[u8]) -> Option<VersionError> {
    if kind != FrameKind::Hello {
        return None;
    }
    let mut r = Reader::new(payload);
    let theirs = Versions {
        min: r.u8().ok()?,
        max: r.u8().ok()?,
        required: r.u64().ok()?,
        supported: r.u64().ok()?,
    };
    agree(Versions::OURS, theirs).err()
}

/// A section with its length in front.
fn section(w: &mut Writer, fill: impl FnOnce(&mut Writer)) {
    let mut inner = Writer::with_capacity(256);
    fill(&mut inner);
    let bytes = inner.into_vec();
    w.u16(bytes.len() as u16);
    w.put(&bytes);
}

pub(super) fn put_hello(w: &mut Writer, h: &Hello) {
    w.u8(h.version_min);
    w.u8(h.version_max);
    w.u64(h.features_required);
    w.u64(h.features_supported);
    section(w, |w| {
        w.u128(h.node.0);
        w.u8(h.slot.0);
        w.u128(h.service.0);
        put_text(w, &h.software, NAME_CAP);
    });
    section(w, |w| put_facts(w, &h.facts));
    section(w, |w| {
        w.u16(h.facts.generations.len() as u16);
        for generation in &h.facts.generations {
            put_generation(w, generation);
        }
    });
    section(w, |w| {
        w.u16(h.facts.volumes.len() as u16);
        for v in &h.facts.volumes {
            w.u16(v.index.0);
            w.u128(v.volume.0);
            w.u128(v.disk.0);
            w.u64(v.size);
            w.u32(v.sector_size);
            w.u8(v.grain_shift);
            w.u8(u8::from(v.blank));
        }
    });
    section(w, |w| put_about(w, &h.facts.about_peer));
    section(w, |w| {
        for v in &h.facts.volumes {
            put_text(w, &v.name, VOLUME_NAME_CAP);
        }
    });
    section(w, |w| {
        for v in &h.facts.volumes {
            w.u64(v.room);
        }
    });
}

/// The next section; what a later version appended to it is left unread.
fn open<'a>(r: &mut Reader<'a>) -> Result<Reader<'a>, Fault> {
    let length = usize::from(r.u16()?);
    Ok(Reader::new(r.take(length)?))
}

pub(super) fn take_hello(r: &mut Reader) -> Result<Hello, Fault> {
    let (version_min, version_max) = (r.u8()?, r.u8()?);
    let (features_required, features_supported) = (r.u64()?, r.u64()?);
    let mut s = open(r)?;
    let (node, slot, service) = (Uuid(s.u128()?), slot_of(s.u8()?)?, Uuid(s.u128()?));
    let software = take_text(&mut s, NAME_CAP)?;
    let mut facts = take_facts(&mut open(r)?)?;
    let mut s = open(r)?;
    let count = usize::from(s.u16()?);
    if count > crate::metadata::MAX_GENERATIONS {
        return Err("too many generations");
    }
    for _ in 0..count {
        facts.generations.push(take_generation(&mut s)?);
    }
    let mut s = open(r)?;
    let count = usize::from(s.u16()?);
    if count > MAX_VOLUMES {
        return Err("too many volumes");
    }
    for _ in 0..count {
        facts.volumes.push(VolumeFacts {
            index: volume_of(s.u16()?)?,
            volume: Uuid(s.u128()?),
            name: String::new(),
            disk: Uuid(s.u128()?),
            size: s.u64()?,
            sector_size: s.u32()?,
            grain_shift: s.u8()?,
            blank: s.flags(1)? == 1,
            room: 0,
        });
    }
    facts.about_peer = take_about(&mut open(r)?)?;
    // Absent from a program that does not tell names: they stay empty then.
    if r.remaining() > 0 {
        let mut s = open(r)?;
        for volume in &mut facts.volumes {
            volume.name = take_text(&mut s, VOLUME_NAME_CAP)?;
        }
    }
    // Absent from a program that grows stopped volumes only.
    if r.remaining() > 0 {
        let mut s = open(r)?;
        for volume in &mut facts.volumes {
            volume.room = s.u64()?;
        }
    }
    // Sections of a later version.
    while r.remaining() > 0 {
        open(r)?;
    }
    Ok(Hello {
        node,
        slot,
        service,
        software,
        version_min,
        version_max,
        features_required,
        features_supported,
        facts,
    })
}

fn put_facts(w: &mut Writer, f: &Facts) {
    w.u8(f.slot.0);
    w.u128(f.disk.0);
    w.u64(f.attach_counter);
    w.u64(f.incarnation.0);
    put_epoch(w, f.epoch);
    w.u8(f.state.code());
    w.u8(copy_flags_code(f.flags));
    w.u8(pack([
        f.is_primary,
        f.unclean_start,
        f.generations_cut,
        f.undo_intact,
        f.follows_third,
    ]));
    w.u8(f.mode.code());
    w.u8(f.on_peer_loss.code());
    w.u64(f.position);
    w.u64(f.issued);
    w.u64(f.target_of.0);
    w.u8(f.target_source);
    w.u64(f.before_resync.0.0);
    w.u64(f.before_resync.1);
    w.u8(f.in_sync.0);
    w.u64(f.in_sync_version);
    w.u8(f.in_sync_pending.0);
}

fn take_facts(r: &mut Reader) -> Result<Facts, Fault> {
    let slot = slot_of(r.u8()?)?;
    let disk = Uuid(r.u128()?);
    let attach_counter = r.u64()?;
    let incarnation = Incarnation(r.u64()?);
    let epoch = take_epoch(r)?;
    let state =
        crate::metadata::CopyState::from_code(r.u8()?).ok_or("the state of the copy is unknown")?;
    let flags = take_copy_flags(r)?;
    let [
        is_primary,
        unclean_start,
        generations_cut,
        undo_intact,
        follows_third,
    ] = unpack(r.flags(0b1_1111)?);
    let mode = crate::metadata::Mode::from_code(r.u8()?).ok_or("the mode is unknown")?;
    let on_peer_loss =
        crate::metadata::OnPeerLoss::from_code(r.u8()?).ok_or("the policy is unknown")?;
    Ok(Facts {
        slot,
        disk,
        attach_counter,
        incarnation,
        epoch,
        state,
        flags,
        is_primary,
        unclean_start,
        mode,
        on_peer_loss,
        generations: Vec::new(),
        generations_cut,
        position: r.u64()?,
        issued: r.u64()?,
        target_of: GenerationId(r.u64()?),
        target_source: slot_or_none(r.u8()?)?,
        before_resync: (GenerationId(r.u64()?), r.u64()?),
        undo_intact,
        follows_third,
        in_sync: SlotSet(r.u8()?),
        in_sync_version: r.u64()?,
        in_sync_pending: SlotSet(r.u8()?),
        volumes: Vec::new(),
        about_peer: PeerFacts::default(),
    })
}

fn put_about(w: &mut Writer, p: &PeerFacts) {
    w.u8(pack([p.known, p.full_copy]));
    w.u128(p.disk.0);
    w.u64(p.attach_counter);
    w.u64(p.incarnation.0);
    w.u64(p.bitmap_base.0);
    w.u64(p.bits);
    w.u64(p.bytes);
    w.u64(p.known_durable_generation.0);
    w.u64(p.known_durable_position);
}

fn take_about(r: &mut Reader) -> Result<PeerFacts, Fault> {
    let [known, full_copy] = unpack(r.flags(0b11)?);
    Ok(PeerFacts {
        known,
        full_copy,
        disk: Uuid(r.u128()?),
        attach_counter: r.u64()?,
        incarnation: Incarnation(r.u64()?),
        bitmap_base: GenerationId(r.u64()?),
        bits: r.u64()?,
        bytes: r.u64()?,
        known_durable_generation: GenerationId(r.u64()?),
        known_durable_position: r.u64()?,
    })
}
