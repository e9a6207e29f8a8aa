//! What is durable where: local flushes, the stable position, the window, dirty bits, the activity log.

use crate::api::*;
use crate::bitmap::{AfterPage, DirtyBitmap};
use crate::op::*;
use crate::peer::*;
use crate::service::*;
use holdfast_wire_format::activity_log::ExtentKey;
use holdfast_wire_format::bitmap_page;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

/// Unstable bytes and entries after which a flush is asked for even if nobody waits.
const WINDOW_BYTES: u64 = 64 << 20;
const WINDOW_ENTRIES: usize = 16384;

impl Core {
    // --- local flushes ---

    pub(crate) fn flush_locally(&mut self, waiter: FlushFor, out: &mut Actions) {
        if crate::planted::flush_left_out(&waiter) {
            self.local_flushed = self.local_flushed.max(self.held_position());
            return self.flushed_for(waiter, out);
        }
        self.flush.waiting.push(waiter);
        self.pump_flush(out);
    }

    /// Begins the next round, and ends it too if there is nothing to flush. A loop, since the end of one round may let the next
    /// begin: a row of flushes that each depend on the one before can be thousands long.
    fn pump_flush(&mut self, out: &mut Actions) {
        while !self.flush.ending
            && self.flush.left == 0
            && !self.flush.waiting.is_empty()
            && !self.failed
        {
            self.begin_flush_round(out);
            if self.flush.left == 0 {
                self.flush_round_over(out);
            }
        }
    }

    fn begin_flush_round(&mut self, out: &mut Actions) {
        self.flush.round += 1;
        self.flush.failed = false;
        self.flush.running = std::mem::take(&mut self.flush.waiting);
        // A flush covers what the disk had answered when it began, nothing later.
        self.flush.covers = self.held_position();
        for at in 0..self.volumes.len() {
            if std::mem::take(&mut self.volumes[at].unflushed) {
                self.flush.left += 1;
                let op = OpId(self.ops.insert(Op::LocalFlush) as u64);
                out.push(Action::DiskFlush {
                    op,
                    volume: VolumeIndex(at as u16),
                });
            }
        }
    }

    pub(crate) fn local_flush_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        self.ops.remove(key);
        self.flush.left -= 1;
        if self.failed {
            return;
        }
        self.flush.failed |= result.is_err() && !planted!("flush-error-ignored");
        if self.flush.failed {
            // What the disk lost after a failed flush is unknown: never try again on top of it (D14).
            return self.disk_failed("a flush failed", out);
        }
        if self.flush.left == 0 {
            self.flush_round_over(out);
            self.pump_flush(out);
        }
    }

    /// Whoever asks for a flush meanwhile waits for the next round.
    fn flush_round_over(&mut self, out: &mut Actions) {
        self.flush.ending = true;
        if planted!("flush-covers-too-much") {
            self.flush.covers = self.held_position();
        }
        self.local_flushed = self.local_flushed.max(self.flush.covers);
        for waiter in std::mem::take(&mut self.flush.running) {
            self.flushed_for(waiter, out);
        }
        self.trim_window(out);
        self.flush.ending = false;
    }

    fn flushed_for(&mut self, waiter: FlushFor, out: &mut Actions) {
        match waiter {
            FlushFor::Client(key) => {
                if let Some(Op::Client(op)) = self.ops.get_mut(key) {
                    op.local_left = 0;
                }
                self.check_client(key, out);
            }
            FlushFor::Peer(due) => self.peer_flush_done(due, out),
            FlushFor::Complete { peer, session } => self.complete_flushed(peer, session, out),
            FlushFor::Promotion => self.promotion_flushed(out),
            FlushFor::DropPeer => self.drop_missing(out),
            FlushFor::DropTarget { peer, session } => self.drop_target(peer, session, out),
            FlushFor::Detach => self.detach_flushed(out),
            FlushFor::Target { peer, session } => self.target_flushed(peer, session, out),
            FlushFor::Rollback => self.rollback_flushed(out),
        }
    }

    // --- the stable position ---

    /// Flushed by every member of the committed and the pending S, as this primary knows.
    pub(crate) fn stable_position(&self) -> Position {
        if let Some(held) = self.stable_held {
            return held;
        }
        let required = self.required();
        if let Some(diskless) = &self.diskless {
            // Its own disk counts for nothing; until the server is alone in S, the other members do, also those that are away.
            let members = self.peers.iter().filter(|p| {
                let server = p.slot == diskless.server;
                server || (required.contains(p.slot) && !planted!("server-counts-for-all"))
            });
            return members.map(|p| p.flushed).min().unwrap_or(0);
        }
        let mut stable = self.local_flushed;
        for peer in &self.peers {
            if required.contains(peer.slot) && !planted!("stable-without-the-peer") {
                let at = match peer.relation {
                    Relation::Established | Relation::Joining { .. } => peer.flushed,
                    // Not mirrored: nothing new is durable there.
                    _ => peer.flushed.min(stable),
                };
                stable = stable.min(at);
            }
        }
        stable
    }

    /// Lets go of writes that are durable here and at every mirrored peer (D7: the others have bits).
    pub(crate) fn trim_window(&mut self, out: &mut Actions) {
        let floor = match self.role {
            Role::Primary | Role::Demoting => {
                let mut floor = self.local_flushed;
                if self.diskless.is_some() {
                    floor = self.stable_position();
                }
                for peer in &self.peers {
                    if matches!(
                        peer.relation,
                        Relation::Established | Relation::Joining { .. } | Relation::Source
                    ) && !planted!("trimmed-before-the-peer-flushed")
                    {
                        floor = floor.min(peer.flushed);
                    }
                }
                floor
            }
            _ => {
                let told = self
                    .peers
                    .iter()
                    .filter(|p| p.is_primary && Some(p.slot) == self.window_of)
                    .map(|p| p.inbox.stable)
                    .max();
                self.local_flushed.min(told.unwrap_or(0))
            }
        };
        let mut released = false;
        while let Some(entry) = self.window.pop_stable(floor) {
            if self.role != Role::Primary {
                self.remember_for_others(&entry);
            }
            if entry.holds_log && entry.length > 0 {
                for extent in self.extents(entry.volume, entry.offset, entry.length) {
                    self.log.release(extent);
                }
                released = true;
            }
        }
        if released {
            self.pump_log(out);
        }
    }

    /// S names this peer, and the disk there is the one it means, as far as this copy knows.
    pub(crate) fn counts_in_s(&self, at: usize) -> bool {
        let peer = &self.peers[at];
        let since = peer
            .stranger
            .is_none_or(|version| self.sb.in_sync_version > version);
        since && self.sb.in_sync.contains(peer.slot)
    }

    /// What a resync from the primary `at` brought was marked toward everybody: it may hold writes that a member of S never
    /// got. When all of it is stable, every member has it (a failover is not to cost them a copy of everything).
    pub(crate) fn forget_marks(&mut self, at: usize) {
        let peer = &self.peers[at];
        let over = peer.is_primary
            && (peer.inbox.in_sync_heard || planted!("marks-forgotten-by-hearsay"))
            && matches!(peer.relation, Relation::Established)
            && peer
                .forget_at
                .is_some_and(|position| peer.inbox.stable >= position);
        if !over {
            return;
        }
        self.peers[at].forget_at = None;
        for other in 0..self.peers.len() {
            if other != at && self.counts_in_s(other) {
                for bitmap in &mut self.peers[other].bitmaps {
                    bitmap.clear_all();
                }
            }
        }
    }

    /// A secondary tracks what copies outside S may lack (they follow on their own): a failover must not
    /// cost them a full resync. Cleared when that copy's resync from us ends.
    fn remember_for_others(&mut self, entry: &Entry) {
        if entry.length == 0 {
            return;
        }
        for at in 0..self.peers.len() {
            let peer = &self.peers[at];
            if (!peer.is_primary || peer.diskless)
                && !self.counts_in_s(at)
                && !planted!("others-forgotten")
            {
                self.set_bits(at, entry.volume, entry.offset, entry.length);
            }
        }
    }

    /// Asks for a flush everywhere when somebody waits for stability, or the window is large.
    pub(crate) fn stability_on_time(&mut self, out: &mut Actions) {
        if self.role != Role::Primary || self.stable_flush_running || self.window.is_empty() {
            return;
        }
        let waits = !self.log_waiting.is_empty()
            || self.peers.iter().any(|p| {
                p.wants_stable
                    || (p.mode == Mode::Async
                        && matches!(p.relation, Relation::Established | Relation::Source))
            });
        let bytes = self.window.bytes();
        let due = self.now.ms_since(self.last_stable_flush) >= self.tuning.stable_interval_ms;
        // Idle: make the last writes stable too, so that a link blip costs no resync.
        let idle = self.now.ms_since(self.last_stable_flush) >= 5 * self.tuning.stable_interval_ms;
        if bytes >= WINDOW_BYTES
            || self.window.len() >= WINDOW_ENTRIES
            || (waits && (due || bytes >= self.tuning.stable_bytes))
            || idle
        {
            self.flush_for_stability(out);
        }
    }

    pub(crate) fn flush_for_stability(&mut self, out: &mut Actions) {
        let stopped = self.failed && !self.diskless_serves();
        if self.stable_flush_running || self.role != Role::Primary || stopped {
            return;
        }
        // Everything written is stable, or was never anything but flushes: no need.
        if self.window.last_data() <= self.stable_position() {
            return;
        }
        self.stable_flush_running = true;
        self.last_stable_flush = self.now;
        for peer in &mut self.peers {
            peer.wants_stable = false;
        }
        let _position = self.begin_flush(None, out);
    }

    // --- dirty bits ---

    pub(crate) fn set_bits(&mut self, at: usize, volume: VolumeIndex, offset: u64, length: u64) {
        self.peers[at].bitmaps[volume.0 as usize].set(offset, length);
    }

    /// The link to a peer ended: what it did not flush-acknowledge may be missing there, acknowledged or
    /// not, because its disk has a volatile cache (D2, D7: the unstable set).
    pub(crate) fn unstable_becomes_bits(&mut self, at: usize) {
        let flushed = if planted!("unstable-forgotten") {
            u64::MAX
        } else {
            self.peers[at].flushed
        };
        let entries: Vec<Entry> = self
            .window
            .above(flushed)
            .filter(|e| e.length > 0)
            .copied()
            .collect();
        for entry in entries {
            self.set_bits(at, entry.volume, entry.offset, entry.length);
        }
    }

    // --- the activity log (D6) ---

    /// Takes references on all extents if every one is hot.
    pub(crate) fn try_hold(&mut self, volume: VolumeIndex, offset: u64, length: u64) -> bool {
        if !self.tuning.activity_log || length == 0 {
            return true;
        }
        let extents = self.extents(volume, offset, length);
        if !extents.clone().all(|extent| self.log.is_hot(extent)) {
            return false;
        }
        for extent in extents {
            self.log.hold(extent);
        }
        true
    }

    /// Writes the next transaction for what waits, and lets go on what need not wait.
    pub(crate) fn pump_log(&mut self, out: &mut Actions) {
        while let Some(&key) = self.log_waiting.front() {
            let Some((volume, offset, length)) = self.log_range(key) else {
                self.log_waiting.pop_front();
                continue;
            };
            if !self.try_hold(volume, offset, length) {
                break;
            }
            self.log_waiting.pop_front();
            self.log_passed(key, out);
        }
        if self.log_in_flight || self.log_waiting.is_empty() || self.failed {
            return;
        }
        let mut wanted: Vec<ExtentKey> = Vec::new();
        for &key in &self.log_waiting {
            let Some((volume, offset, length)) = self.log_range(key) else {
                continue;
            };
            for extent in self.extents(volume, offset, length) {
                if !wanted.contains(&extent) {
                    wanted.push(extent);
                }
            }
            if wanted.len() >= 64 {
                break;
            }
        }
        let shift = self.sb.extent_shift;
        let mut unsaved: Vec<ExtentKey> = Vec::new();
        let peers = &self.peers;
        let transaction = self.log.begin_transaction(&wanted, |extent: ExtentKey| {
            let offset = u64::from(extent.extent) << shift;
            // D7: an extent cools only when all bits in it are durable, toward every peer.
            let blocked = peers
                .iter()
                .any(|p| p.bitmaps[extent.volume.0 as usize].unsaved_sets_in(offset, 1 << shift));
            if blocked && unsaved.len() < 16 {
                unsaved.push(extent);
            }
            !blocked || planted!("cools-early")
        });
        match transaction {
            Some(transaction) => {
                self.log_in_flight = true;
                self.counters.al_transactions += 1;
                let op = self.ops.insert(Op::ActivityLog {
                    sequence: transaction.sequence,
                });
                let layout = &self.volumes[0].layout;
                out.push(Action::MetaWrite {
                    op: OpId(op as u64),
                    place: MetaPlace {
                        volume: VolumeIndex(0),
                        offset: layout.activity_log_offset
                            + u64::from(transaction.ring_block) * 4096,
                    },
                    bytes: transaction.bytes.to_vec(),
                });
                if planted!("log-not-awaited") {
                    self.log.commit(transaction.sequence);
                    self.pump_log(out);
                }
            }
            None => {
                for extent in unsaved {
                    self.save_bits_of(extent, out);
                }
                if self.pages_in_flight == 0 {
                    self.make_room_in_log(out);
                }
            }
        }
    }

    /// Every slot is held by writes that are not stable: make them stable.
    fn make_room_in_log(&mut self, out: &mut Actions) {
        if self.role == Role::Primary {
            return self.flush_for_stability(out);
        }
        // Only the primary can say what is stable everywhere; a heartbeat with length 1 asks for it.
        for at in 0..self.peers.len() {
            if self.peers[at].is_primary && self.peers[at].session.is_some() {
                let mut header = self.header(FrameKind::Heartbeat);
                header.length = 1;
                self.send(at, header, Payload::None, out);
            }
        }
    }

    fn log_range(&self, key: usize) -> Option<(VolumeIndex, u64, u64)> {
        match self.ops.get(key)? {
            Op::Client(op) => Some((op.volume, op.offset, op.length)),
            Op::Apply(op) => Some((op.volume, op.offset, op.length)),
            _ => None,
        }
    }

    fn log_passed(&mut self, key: usize, out: &mut Actions) {
        match self.ops.get(key) {
            Some(Op::Client(_)) => self.issue(key, out),
            Some(Op::Apply(_)) => self.apply_logged(key, out),
            _ => {}
        }
    }

    pub(crate) fn log_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let Op::ActivityLog { sequence } = self.ops.remove(key) else {
            return;
        };
        self.log_in_flight = false;
        if result.is_err() {
            // D6: the intent is not durable, so the data is not submitted.
            self.log.abort(sequence);
            return self.disk_failed("the activity log could not be written", out);
        }
        if !planted!("log-not-awaited") {
            self.log.commit(sequence);
        }
        self.pump_log(out);
    }

    // --- saving bitmap pages ---

    fn save_bits_of(&mut self, extent: ExtentKey, out: &mut Actions) {
        let shift = self.sb.extent_shift;
        let offset = u64::from(extent.extent) << shift;
        let volume = extent.volume.0 as usize;
        for peer in 0..self.peers.len() {
            if !self.peers[peer].bitmaps[volume].unsaved_sets_in(offset, 1 << shift) {
                continue;
            }
            for page in self.peers[peer].bitmaps[volume].pages_of(offset, 1 << shift) {
                self.save_queue.push_back((peer, volume, page));
            }
        }
        self.pump_saves(out);
    }

    /// Saves every page that has something not durable; true if there was none.
    pub(crate) fn save_all_bits(&mut self, out: &mut Actions) -> bool {
        for peer in 0..self.peers.len() {
            for volume in 0..self.volumes.len() {
                if let Some(page) = self.peers[peer].bitmaps[volume].next_unsaved(0) {
                    self.save_queue.push_back((peer, volume, page));
                }
            }
        }
        self.pump_saves(out);
        self.pages_in_flight == 0
            && self.save_queue.is_empty()
            && self
                .peers
                .iter()
                .all(|p| p.bitmaps.iter().all(DirtyBitmap::is_saved))
    }

    /// Saves every page that is not durable now, whatever is set meanwhile; true if there was none.
    pub(crate) fn save_unsaved_bits(&mut self, out: &mut Actions) -> bool {
        for peer in 0..self.peers.len() {
            for volume in 0..self.volumes.len() {
                let pages: Vec<u64> = self.peers[peer].bitmaps[volume].unsaved_pages().collect();
                let queued = pages.into_iter().map(|page| (peer, volume, page));
                self.save_queue.extend(queued);
            }
        }
        self.pump_saves(out);
        self.pages_in_flight == 0 && self.save_queue.is_empty()
    }

    /// One page at a time: two writes of one summary block must not cross.
    fn pump_saves(&mut self, out: &mut Actions) {
        while self.pages_in_flight == 0 && !self.failed {
            let Some((peer, volume, page)) = self.save_queue.pop_front() else {
                return;
            };
            let Some(image) = self.peers[peer].bitmaps[volume].begin_save(page) else {
                continue;
            };
            self.pages_in_flight = 1;
            self.counters.bitmap_writes += 1;
            let Some(words) = image.words else {
                let block = self.peers[peer].bitmaps[volume].summary_block_of(page);
                self.save_summary(peer, volume, block, out);
                continue;
            };
            let record = self.peers[peer].record;
            let bytes =
                bitmap_page::encode_page(VolumeIndex(volume as u16), record as u8, page, &words);
            let op = self.ops.insert(Op::BitmapPage { peer, volume, page });
            out.push(Action::MetaWrite {
                op: OpId(op as u64),
                place: MetaPlace {
                    volume: VolumeIndex(volume as u16),
                    offset: self.volumes[volume].layout.bitmap_page_offset(record, page),
                },
                bytes: bytes.to_vec(),
            });
        }
    }

    fn save_summary(&mut self, peer: usize, volume: usize, block: u64, out: &mut Actions) {
        let record = self.peers[peer].record;
        let Some(bytes) = self.peers[peer].bitmaps[volume].begin_summary(block) else {
            self.pages_in_flight = 0;
            return;
        };
        let bytes =
            bitmap_page::encode_summary(VolumeIndex(volume as u16), record as u8, block, &bytes);
        let op = self.ops.insert(Op::BitmapSummary {
            peer,
            volume,
            block,
        });
        out.push(Action::MetaWrite {
            op: OpId(op as u64),
            place: MetaPlace {
                volume: VolumeIndex(volume as u16),
                offset: self.volumes[volume]
                    .layout
                    .summary_block_offset(record, block),
            },
            bytes: bytes.to_vec(),
        });
    }

    pub(crate) fn page_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let op = self.ops.remove(key);
        if result.is_err() {
            return self.disk_failed("the dirty bitmap could not be written", out);
        }
        match op {
            Op::BitmapPage { peer, volume, page } => {
                match self.peers[peer].bitmaps[volume].page_saved(page) {
                    AfterPage::SummaryDue(block) => {
                        return self.save_summary(peer, volume, block, out);
                    }
                    AfterPage::Saved => self.pages_in_flight = 0,
                }
            }
            Op::BitmapSummary {
                peer,
                volume,
                block,
            } => {
                self.peers[peer].bitmaps[volume].summary_saved(block);
                self.pages_in_flight = 0;
            }
            _ => {}
        }
        self.pump_saves(out);
        if self.pages_in_flight == 0 && self.save_queue.is_empty() {
            for due in std::mem::take(&mut self.acks_after_save) {
                self.peer_flush_saved(due, out);
            }
        }
        self.pump_log(out);
        self.pages_saved(out);
    }
}
