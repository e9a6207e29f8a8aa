//! The beginning: metadata of a new copy, and what an old one remembers.

use crate::activity_log::ActivityLog;
use crate::api::*;
use crate::bitmap::{DirtyBitmap, SUMMARY_CLEAN, SUMMARY_DAMAGED, SUMMARY_PARTIAL};
use crate::cluster_store::ClusterStore;
use crate::log_recovery::LogRecovery;
use crate::op::*;
use crate::overlap::OverlapIndex;
use crate::peer::*;
use crate::resync_rate::ResyncRate;
use crate::service::*;
use crate::status::Counters;
use crate::undoing::Undoing;
use holdfast_wire_format::bitmap_page;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::frame_codec::WIRE_VERSION_MIN;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::{self, Layout};
use holdfast_wire_format::metadata::*;
use holdfast_wire_format::superblock;
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

/// Why a copy cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(
        "the metadata of volume {volume} could not be read: {}; nothing was changed; check the device (dmesg, smartctl)", error.words()
    )]
    Read { volume: u16, error: DiskError },
    #[error("volume {volume}: {error}; nothing was changed")]
    Superblock { volume: u16, error: String },
    #[error("volume {volume} does not fit its metadata: {problem}. Nothing was changed; {next}")]
    Mismatch {
        volume: u16,
        problem: String,
        next: &'static str,
    },
    #[error(
        "the metadata of volume {volume} uses features ({features:#x}) that this version may read and must not write past: a newer version \
         of Holdfast keeps something there that would become wrong. Nothing was changed, data and metadata are as that version left them; \
         use that version or a newer one (`holdfast dump-metadata` still reads it here)"
    )]
    ReadOnlyFeatures { volume: u16, features: u64 },
}

/// What a new copy of a service is to be.
#[derive(Clone, Debug)]
pub struct CreateParameters {
    pub service: Uuid,
    pub service_name: String,
    pub slot: Slot,
    pub node: Uuid,
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
    /// Random; disk ids come from it.
    pub seed: u64,
    /// Copies that start in S: all synchronous ones when every volume is zeroed, else none.
    pub in_sync: SlotSet,
    pub peers: Vec<PeerParameters>,
    pub volumes: Vec<CreateVolume>,
}

#[derive(Clone, Debug)]
pub struct CreateVolume {
    pub index: VolumeIndex,
    /// The same on every copy.
    pub volume: Uuid,
    pub name: String,
    /// Bytes, a multiple of the sector size.
    pub data_size: u64,
    pub sector_size: u32,
    /// log2 of bytes per bit, 12..=20; by size when `None`.
    pub grain_shift: Option<u8>,
    pub al_blocks: u32,
    pub undo_size: u64,
    /// Every block reads zero now.
    pub zeroed: bool,
}

/// Why metadata cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("{0}; nothing was written; correct the parameters")]
    Parameters(String),
}

/// log2 of bytes per extent of the activity log: 4 MiB.
pub const EXTENT_SHIFT: u8 = 22;

/// The first generation of a service whose copies all start as zeroes: the same on every copy, from the
/// service's identity, so that copies made apart agree (row 3).
fn genesis(service: Uuid) -> GenerationId {
    let id = (service.0 as u64) ^ ((service.0 >> 64) as u64).rotate_left(17);
    GenerationId(if id == 0 { 1 } else { id })
}

/// Metadata of a new copy: what is to be written where, before it is first attached.
///
/// # Errors
/// Parameters that no layout can hold.
pub fn create(p: &CreateParameters) -> Result<Vec<(MetaPlace, Vec<u8>)>, CreateError> {
    let bad = |text: String| CreateError::Parameters(text);
    if p.volumes.is_empty() || p.volumes.len() > MAX_VOLUMES {
        return Err(bad(format!(
            "a service has 1 to {MAX_VOLUMES} volumes, not {}",
            p.volumes.len()
        )));
    }
    if p.peers.len() > MAX_PEERS {
        return Err(bad(format!(
            "a copy has at most {MAX_PEERS} peers, not {}",
            p.peers.len()
        )));
    }
    let zeroed = p.volumes.iter().all(|v| v.zeroed);
    let mut rng = p.seed;
    let mut random = || {
        rng = rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let disks: Vec<Uuid> = p
        .volumes
        .iter()
        .map(|_| Uuid((u128::from(random()) << 64) | u128::from(random()) | 1))
        .collect();
    let mut peers = [PeerRecord::default(); MAX_PEERS];
    for (record, peer) in peers.iter_mut().zip(&p.peers) {
        record.in_use = true;
        record.slot = peer.slot.0;
        record.node = peer.node;
        record.mode = peer.mode as u8;
        record.bitmap_base = if zeroed {
            genesis(p.service)
        } else {
            GenerationId(0)
        };
    }
    let mut images = Vec::new();
    for (volume, disk) in p.volumes.iter().zip(&disks) {
        if volume.grain_shift.is_some_and(|g| !(12..=20).contains(&g)) {
            return Err(bad(
                "one bit of the dirty bitmap stands for 4 KiB to 1 MiB".into()
            ));
        }
        let grain_shift = volume
            .grain_shift
            .unwrap_or_else(|| layout::default_grain_shift(volume.data_size));
        let mut sb = Superblock {
            sequence: 2,
            service: p.service,
            volume: volume.volume,
            volume_index: volume.index,
            volume_count: p.volumes.len() as u16,
            service_name: p.service_name.clone(),
            volume_name: volume.name.clone(),
            node: p.node,
            slot: p.slot,
            disk: *disk,
            data_size: volume.data_size,
            room: 0,
            sector_size: volume.sector_size,
            grain_shift,
            extent_shift: EXTENT_SHIFT,
            al_blocks: volume.al_blocks,
            undo_size: volume.undo_size,
            journal_size: 0,
            area_size: 0,
            attach_counter: 0,
            incarnation: Incarnation(0),
            epoch_gate: Epoch::NONE,
            // Zeroed copies are up to date as soon as they met (row 3).
            state: CopyState::Blank,
            flags: CopyFlags {
                zeroed,
                ..CopyFlags::default()
            },
            target_of: GenerationId(0),
            target_source: 0,
            before_resync: (GenerationId(0), 0),
            mode: p.mode,
            on_peer_loss: p.on_peer_loss,
            in_sync: if zeroed { p.in_sync } else { SlotSet::EMPTY },
            in_sync_version: 1,
            in_sync_pending: if zeroed { p.in_sync } else { SlotSet::EMPTY },
            position: 0,
            generation_base: 0,
            generations: Vec::new(),
            generations_cut: false,
            log_incomplete: false,
            volume_disks: disks.clone(),
            peers,
            features_incompatible: 0,
            features_read_only: 0,
            features_compatible: 0,
        };
        if zeroed {
            sb.generations.push(Generation {
                id: genesis(p.service),
                parent: GenerationId(0),
                fork_position: 0,
                epoch: Epoch::NONE,
                cause: GenerationCause::Created,
                maker: 0,
            });
        }
        let layout = Layout::of(&sb).map_err(|e| bad(e.to_string()))?;
        sb.area_size = layout.total;
        let place = |offset| MetaPlace {
            volume: volume.index,
            offset,
        };
        // The log's blocks and the summaries first; the superblock makes them count.
        for block in 0..u64::from(volume.al_blocks) {
            images.push((
                place(layout.activity_log_offset + block * 4096),
                vec![0; 4096],
            ));
        }
        let pages = DirtyBitmap::new(volume.data_size, grain_shift, 8).page_count();
        for record in 0..MAX_PEERS {
            for block in 0..pages.div_ceil(bitmap_page::SUMMARY_ENTRIES as u64) {
                let bytes = vec![SUMMARY_CLEAN; bitmap_page::SUMMARY_ENTRIES];
                let image = bitmap_page::encode_summary(volume.index, record as u8, block, &bytes);
                images.push((
                    place(layout.summary_block_offset(record, block)),
                    image.to_vec(),
                ));
            }
        }
        if layout.undo_size > 0 {
            images.push((place(layout.undo_offset), vec![0; 4096]));
        }
        let image = superblock::encode(&sb).map_err(|e| bad(e.to_string()))?;
        images.push((place(0), image.to_vec()));
        let mut second = sb.clone();
        second.sequence = 1;
        let image = superblock::encode(&second).map_err(|e| bad(e.to_string()))?;
        images.push((place(4096), image.to_vec()));
    }
    Ok(images)
}

/// Reads and checks the superblock of one volume.
fn read_superblock(
    meta: &mut dyn MetaSource,
    volume: VolumeIndex,
) -> Result<Superblock, AttachError> {
    let mut slots = [[0u8; 4096]; 2];
    for (slot, bytes) in slots.iter_mut().enumerate() {
        meta.read(volume, slot as u64 * 4096, bytes)
            .map_err(|error| AttachError::Read {
                volume: volume.0,
                error,
            })?;
    }
    // D16: the newer of the two that is whole; a newer version in either is refused.
    let (sb, _) =
        superblock::choose(&slots[0], &slots[1]).map_err(|error| AttachError::Superblock {
            volume: volume.0,
            error: error.to_string(),
        })?;
    // Attaching writes: the attach counter, at least.
    match superblock::unknown_read_only_features(&sb) {
        0 => Ok(sb),
        features => Err(AttachError::ReadOnlyFeatures {
            volume: volume.0,
            features,
        }),
    }
}

impl Core {
    /// Recovers what this copy's metadata says and begins to attach it. Nothing is served and no link is
    /// asked for before the attach is durable; the actions say when.
    ///
    /// # Errors
    /// Metadata that cannot be read, is damaged in both slots, is of a newer version, or does not fit the
    /// configuration and devices. Nothing was written then.
    pub fn attach(
        params: AttachParameters,
        meta: &mut dyn MetaSource,
        now: Time,
        out: &mut Actions,
    ) -> Result<Core, AttachError> {
        let mut volumes = Vec::new();
        let mut lead: Option<Superblock> = None;
        for (index, v) in params.volumes.iter().enumerate() {
            let mismatch = |problem: String, next| AttachError::Mismatch {
                volume: v.index.0,
                problem,
                next,
            };
            if v.index.0 as usize != index {
                return Err(mismatch(
                    "volumes are not named in the order of their index".into(),
                    "put the volumes of the configuration in the order they were created in",
                ));
            }
            let sb = read_superblock(meta, v.index)?;
            if sb.service != params.service || sb.volume_index != v.index {
                let problem = format!(
                    "the device holds volume {} of service {} ({}), not volume {} of service {}",
                    sb.volume_index.0, sb.service_name, sb.service, v.index.0, params.service
                );
                let next = "correct service.id, the order of the volumes or the backing in the configuration";
                return Err(mismatch(problem, next));
            }
            if sb.node != params.node || sb.slot != params.slot {
                let problem = format!(
                    "the device belongs to node {} slot {}, this is node {} slot {}",
                    sb.node, sb.slot.0, params.node, params.slot.0
                );
                let next = "use this node's own device and slot; a disk that was moved here on purpose is made new with `holdfast volume \
                            replace-disk` and filled by the peer";
                return Err(mismatch(problem, next));
            }
            if v.device_data_size < sb.data_size {
                let problem = format!(
                    "the device has {} bytes for data, the volume needs {}: it shrank",
                    v.device_data_size, sb.data_size
                );
                let next = "give the device back its size before anything else writes to what was cut off, or replace the disk with \
                            `holdfast volume replace-disk`; the peer's copy is whole";
                return Err(mismatch(problem, next));
            }
            if v.sector_size > sb.sector_size {
                let problem = format!(
                    "the device has sectors of {} bytes, the volume was made for {}",
                    v.sector_size, sb.sector_size
                );
                let next = "use a device with sectors no larger than that";
                return Err(mismatch(problem, next));
            }
            let damaged = "use `holdfast volume replace-disk`, the peer fills the disk; or restore the metadata from a backup";
            let layout = Layout::of(&sb).map_err(|e| mismatch(e.to_string(), damaged))?;
            let lead_sb = lead.get_or_insert_with(|| sb.clone());
            if usize::from(lead_sb.volume_count) != params.volumes.len() {
                let problem = format!(
                    "the service was made with {} volumes, the configuration names {}",
                    lead_sb.volume_count,
                    params.volumes.len()
                );
                let next =
                    "name the volumes it was created with; `holdfast dump-metadata` shows them";
                return Err(mismatch(problem, next));
            }
            let known = lead_sb.volume_disks.get(index).copied().unwrap_or_default();
            volumes.push(Volume {
                id: sb.volume,
                name: v.name.clone(),
                disk: sb.disk,
                size: sb.data_size,
                // The shell zeroed what a growth left over before it attached.
                room: sb.data_size.max(sb.room),
                sector_size: sb.sector_size,
                grain_shift: sb.grain_shift,
                layout,
                blank: known != sb.disk,
                unread: Default::default(),
                superblock: sb,
                // What an earlier process wrote may still be in the disk's cache.
                unflushed: true,
            });
        }
        let Some(mut sb) = lead else {
            return Err(AttachError::Mismatch {
                volume: 0,
                problem: "a service needs a volume".into(),
                next: "name its volumes in the configuration",
            });
        };
        let unclean = sb.flags.unclean;
        let mut peers = Vec::new();
        for p in &params.peers {
            let record = sb
                .peers
                .iter()
                .position(|r| r.in_use && r.node == p.node)
                .or_else(|| sb.peers.iter().position(|r| !r.in_use));
            let Some(record) = record else {
                return Err(AttachError::Mismatch {
                    volume: 0,
                    problem: "all 7 peer slots are taken".into(),
                    next: "take a peer out of the configuration that is no longer there; `holdfast dump-metadata` shows them",
                });
            };
            if !sb.peers[record].in_use {
                sb.peers[record] = PeerRecord {
                    in_use: true,
                    node: p.node,
                    ..PeerRecord::default()
                };
            }
            sb.peers[record].slot = p.slot.0;
            // C2: after an unclean stop it may have acknowledged from memory what is gone, whatever it is told now.
            sb.peers[record].mode = if unclean {
                weaker(sb.peers[record].mode, p.mode)
            } else {
                p.mode as u8
            };
            let mut bitmaps = Vec::new();
            for volume in &volumes {
                bitmaps.push(load_bitmap(
                    meta,
                    volume,
                    record,
                    params.tuning.bitmap_pages,
                )?);
            }
            peers.push(new_peer(p, record, bitmaps, now));
        }
        let (mut log, damaged) =
            read_log(meta, &sb, &volumes[0].layout, params.tuning.log_extents)?;
        let hot = log.hot_extents();
        // The log of the run that ended says all it should only if that run kept one, whatever this run does.
        let no_log = sb.log_incomplete && !planted!("missing-log-overlooked");
        let every_block_counts =
            unclean && ((damaged && !planted!("damaged-log-overlooked")) || no_log);
        if unclean {
            // What was hot may differ between the copies, in either direction: bits toward every peer (D7).
            for peer in &mut peers {
                for key in &hot {
                    if let Some(bitmap) = peer.bitmaps.get_mut(key.volume.0 as usize) {
                        let offset = u64::from(key.extent) << sb.extent_shift;
                        let size = bitmap.size();
                        if offset < size && !planted!("log-forgotten") {
                            bitmap.set(offset, (1u64 << sb.extent_shift).min(size - offset));
                        }
                    }
                }
                // A full copy marks everything in memory, and durably only that it is one: how far it came is known
                // only if this copy stopped in order.
                if every_block_counts
                    || (sb.peers[peer.record].full_copy && !planted!("full-copy-forgotten"))
                {
                    for bitmap in &mut peer.bitmaps {
                        bitmap.set_all();
                    }
                }
            }
        }
        let undo = Undoing::recover(&mut sb, &volumes, |offset| {
            let mut bytes = [0; 4096];
            let offset = volumes[0].layout.undo_offset + offset;
            meta.read(VolumeIndex(0), offset, &mut bytes)
                .map(|()| bytes)
                .map_err(|error| AttachError::Read { volume: 0, error })
        })?;
        let was_primary_before = unclean && sb.flags.was_primary;
        sb.attach_counter += 1;
        sb.incarnation = params.incarnation;
        sb.flags.unclean = true;
        sb.log_incomplete = every_block_counts || !params.tuning.activity_log;
        let log_recovery = LogRecovery::new(damaged, every_block_counts, &mut log);
        let position = sb.position;
        for peer in &mut peers {
            peer.behind_before = peer.dirty_bits() > 0;
        }
        let mut core = Core {
            slot: params.slot,
            tuning: params.tuning,
            now,
            rng: params.seed,
            sb,
            volumes,
            commit: Commit::default(),
            role: Role::Secondary,
            attached: false,
            unclean_start: unclean && !planted!("unclean-forgotten"),
            was_primary_before,
            failed: false,
            peers,
            ops: Slab::new(),
            overlap: OverlapIndex::new(),
            log,
            log_recovery,
            log_waiting: VecDeque::new(),
            log_in_flight: false,
            pages_in_flight: 0,
            window: Window::default(),
            window_of: None,
            issued: position,
            completed_max: position,
            local_flushed: position,
            flush: LocalFlush::default(),
            stable_flush_running: false,
            stable_held: None,
            last_stable_flush: now,
            held: VecDeque::new(),
            suspended: false,
            pieces: BTreeMap::new(),
            next_buf: BufId::CORE,
            dropping: false,
            generation_committing: false,
            issue_waiting: Vec::new(),
            generation_unknown_to: SlotSet::EMPTY,
            promotion: None,
            promotion_wanted: None,
            demotion: None,
            demote_flush_sent: false,
            demotion_recording: false,
            detaching: None,
            detach_flushed_once: false,
            detach_recording: false,
            save_queue: VecDeque::new(),
            acks_after_save: Vec::new(),
            locks: BTreeMap::new(),
            counters: Counters::default(),
            parked: false,
            undo,
            resync_rate: ResyncRate::new(&params.tuning, now),
            surplus: None,
            growing: Default::default(),
            diskless: None,
            store: ClusterStore::new(params.store),
        };
        if core.sb.in_sync_pending != core.sb.in_sync {
            // D18: an outcome was unknown when the process ended; what is on the disk is what was committed.
            core.sb.in_sync_pending = core.sb.in_sync;
        }
        core.commit(Then::Attached, out);
        Ok(core)
    }

    /// The new attach counter and incarnation are durable.
    pub(crate) fn attached_durably(&mut self, out: &mut Actions) {
        self.attached = true;
        let text = format!(
            "attached {} time(s), {}, {} start, epoch {}, generation {}",
            self.sb.attach_counter,
            crate::words::state(self.sb.state),
            if self.unclean_start {
                "unclean"
            } else {
                "clean"
            },
            self.sb.epoch_gate.number,
            self.generation()
        );
        self.notice(Level::Info, "attached", None, text, out);
        self.undo_attached(out);
        self.store_attach(out);
    }

    /// The record knows of this attachment: meet the others.
    pub(crate) fn attached_and_known(&mut self, out: &mut Actions) {
        for peer in &self.peers {
            if peer.wanted {
                out.push(Action::Connect { peer: peer.slot });
            }
        }
    }

    /// Facts without a peer in view: for decisions about this copy alone.
    pub(crate) fn own_facts(&self) -> Facts {
        if self.peers.is_empty() {
            return self.facts_about(None);
        }
        let mut facts = self.facts(0);
        if facts.mode == Mode::Sync && self.had_memory_counted() {
            facts.mode = Mode::SemiSync;
        }
        facts
    }

    /// Some other copy was, or is, told of what this one has in memory alone.
    pub(crate) fn had_memory_counted(&self) -> bool {
        let counted = |at: usize| self.weakest_mode(at) == Mode::SemiSync;
        (0..self.peers.len()).any(counted)
    }

    /// How this pair replicates, or did since this copy last stopped in order or was filled: what it acknowledged from memory
    /// then may be gone (C2).
    pub(crate) fn weakest_mode(&self, at: usize) -> Mode {
        let peer = &self.peers[at];
        let recorded = self.sb.peers[peer.record].mode;
        match peer.mode {
            Mode::Sync if recorded != Mode::Sync as u8 => Mode::SemiSync,
            mode => mode,
        }
    }
}

/// Of a mode on record and a new one, the one in which less is on the disk when it is acknowledged.
pub(crate) fn weaker(recorded: u8, mode: Mode) -> u8 {
    recorded.max(mode as u8)
}

fn new_peer(p: &PeerParameters, record: usize, bitmaps: Vec<DirtyBitmap>, now: Time) -> Peer {
    Peer {
        slot: p.slot,
        node: p.node,
        record,
        mode: p.mode,
        their_mode: p.mode,
        unaware: Vec::new(),
        wanted: true,
        session: None,
        relation: Relation::Down,
        wire_version: WIRE_VERSION_MIN,
        bitmaps,
        their_state: None,
        their_incarnation: Incarnation(0),
        their_disk: Uuid(0),
        their_attach_counter: 0,
        their_generations: Vec::new(),
        their_generations_cut: false,
        told_generation: GenerationId(0),
        is_primary: false,
        was_primary: false,
        flushed: 0,
        ready_received: false,
        ready_position: 0,
        bits_received: false,
        unacked_bytes: 0,
        queued_bytes: 0,
        oldest_unacked: None,
        behind_since: None,
        behind_before: false,
        unread: 0,
        source: SourceState::default(),
        target: TargetState::default(),
        verify: VerifyState::default(),
        inbox: Inbox::default(),
        last_heard: now,
        last_sent: now,
        stable_told: 0,
        congested: false,
        resync_paused: false,
        row: None,
        filled: false,
        forget_at: None,
        grows: false,
        stranger: None,
        again_since: None,
        handshake: String::new(),
        met: None,
        last_error: String::new(),
        full_copy: false,
        compare: false,
        wants_stable: false,
        up_since: now,
        flush_asked: 0,
        diskless: false,
        met_record: None,
        their_in_sync: (SlotSet::EMPTY, 0),
    }
}

fn load_bitmap(
    meta: &mut dyn MetaSource,
    volume: &Volume,
    record: usize,
    max_pages: usize,
) -> Result<DirtyBitmap, AttachError> {
    let index = volume.superblock.volume_index;
    let failed = |error| AttachError::Read {
        volume: index.0,
        error,
    };
    let mut bitmap = DirtyBitmap::new(volume.size, volume.grain_shift, max_pages);
    let pages = bitmap.page_count();
    let mut block_bytes = [0u8; 4096];
    for block in 0..pages.div_ceil(bitmap_page::SUMMARY_ENTRIES as u64) {
        meta.read(
            index,
            volume.layout.summary_block_offset(record, block),
            &mut block_bytes,
        )
        .map_err(failed)?;
        let summary = bitmap_page::decode_summary(&block_bytes, index, record as u8, block);
        let first = block * bitmap_page::SUMMARY_ENTRIES as u64;
        for page in first..(first + bitmap_page::SUMMARY_ENTRIES as u64).min(pages) {
            // A damaged summary says nothing, and that means everything (D7).
            let damaged = if planted!("damaged-bitmap-is-clean") {
                SUMMARY_CLEAN
            } else {
                SUMMARY_DAMAGED
            };
            let state = summary
                .as_ref()
                .map_or(damaged, |s| s[(page - first) as usize]);
            if state == SUMMARY_CLEAN {
                continue;
            }
            let mut words = None;
            if state == SUMMARY_PARTIAL {
                let mut bytes = [0u8; 4096];
                meta.read(
                    index,
                    volume.layout.bitmap_page_offset(record, page),
                    &mut bytes,
                )
                .map_err(failed)?;
                words = bitmap_page::decode_page(&bytes, index, record as u8, page).ok();
            }
            bitmap.load(page, state, words.as_ref());
        }
    }
    Ok(bitmap)
}

fn read_log(
    meta: &mut dyn MetaSource,
    sb: &Superblock,
    layout: &Layout,
    log_extents: u32,
) -> Result<(ActivityLog, bool), AttachError> {
    let mut blocks = Vec::new();
    for block in 0..sb.al_blocks {
        let mut bytes = vec![0u8; 4096];
        meta.read(
            VolumeIndex(0),
            layout.activity_log_offset + u64::from(block) * 4096,
            &mut bytes,
        )
        .map_err(|error| AttachError::Read { volume: 0, error })?;
        blocks.push((block, bytes));
    }
    let carried = ActivityLog::slots_for(sb.al_blocks);
    let slots = match log_extents as usize {
        0 => carried,
        fewer => fewer.min(carried),
    };
    Ok(ActivityLog::recover(
        slots,
        sb.al_blocks,
        blocks.iter().map(|(i, b)| (*i, b.as_slice())),
    ))
}
