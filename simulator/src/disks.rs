//! What becomes of requests to the disks, and of disks that lose power, their memory, or a bit.

use crate::disk::{Disk, DiskOp};
use crate::plan::MS;
use crate::world::*;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use std::rc::Rc;

/// The longest that a disk takes for a request, unless it hangs.
const SLOWEST: u64 = 10_000 * MS;

impl World {
    // --- disks ---

    pub(crate) fn give_disk(&mut self, node: usize, id: OpId, op: DiskOp, metadata: bool) {
        let kind = match &op {
            DiskOp::Read { .. } => 0,
            DiskOp::Write { .. } => 1,
            DiskOp::Flush { .. } => 2,
            DiskOp::MetaWrite { .. } => 3,
            DiskOp::MetaRead { .. } => 4,
        };
        self.coverage.disk_ops[kind] += 1;
        let key = self.next_key;
        self.next_key += 1;
        let base = self.plan.disk_ns;
        let mut delay = base / 2 + self.disk_rng.below(base + 1);
        if kind == 2 {
            delay *= self.plan.flush_factor;
            self.ambushes(node, "flush");
        }
        if let DiskOp::MetaWrite { volume, offset, .. } = &op {
            delay *= self.plan.meta_factor;
            let what = self.region(*volume, *offset);
            self.ambushes(node, what);
        }
        if self.disk_rng.chance(20) {
            delay *= 20;
        }
        if self.nodes[node].slow {
            delay *= 30;
        }
        // A request of a disk that is slow in every way takes seconds, not minutes: it would outlast the run.
        let delay = delay.min(SLOWEST);
        let n = &mut self.nodes[node];
        let life = n.life;
        let held = n.hung;
        n.pending.insert(
            key,
            Pending {
                op,
                id,
                life,
                metadata,
                held,
            },
        );
        if !held {
            let disk_life = n.disk_life;
            self.after(
                delay,
                Happening::DiskDone {
                    node,
                    disk_life,
                    key,
                },
            );
        }
    }

    /// A hung disk goes on.
    pub(crate) fn release_disk(&mut self, node: usize) {
        self.nodes[node].hung = false;
        let disk_life = self.nodes[node].disk_life;
        let held: Vec<u64> = self.nodes[node]
            .pending
            .iter_mut()
            .filter_map(|(key, p)| std::mem::take(&mut p.held).then_some(*key))
            .collect();
        for key in held {
            let delay = self.disk_rng.below(self.plan.disk_ns + 1);
            self.after(
                delay,
                Happening::DiskDone {
                    node,
                    disk_life,
                    key,
                },
            );
        }
    }

    pub(crate) fn disk_done(&mut self, node: usize, disk_life: u64, key: u64) {
        let n = &mut self.nodes[node];
        if n.disk_life != disk_life {
            return;
        }
        if n.hung {
            if let Some(pending) = n.pending.get_mut(&key) {
                pending.held = true;
            }
            return;
        }
        let Some(pending) = n.pending.remove(&key) else {
            return;
        };
        let alive = pending.life == n.life;
        let failed = n.fail_next > 0 && alive;
        if failed {
            n.fail_next -= 1;
            let mut rng = self.disk_rng.clone();
            let torn = n.disk.land_partly(&pending.op, &mut rng);
            self.disk_rng = rng;
            self.coverage.count("disk errors", "EIO");
            self.count_torn(u64::from(torn));
            self.log(|| format!("node {node}: disk error on {}", describe(&pending.op)));
        } else {
            n.disk.land(&pending.op);
            // A read returns what is there when it ends.
            match &pending.op {
                DiskOp::Read {
                    volume,
                    first,
                    count,
                    buf,
                } if alive => {
                    let (from, to) = (*first as usize, (first + count) as usize);
                    if let Some(target) = n.bufs.get_mut(&buf.0) {
                        let target = Rc::make_mut(target);
                        target[..to - from].copy_from_slice(&n.disk.view(*volume)[from..to]);
                    }
                }
                DiskOp::MetaRead {
                    volume,
                    offset,
                    count,
                    buf,
                } if alive => {
                    let stamps = n.disk.meta_stamps(*volume, *offset, *count);
                    if let Some(target) = n.bufs.get_mut(&buf.0) {
                        Rc::make_mut(target)[..stamps.len()].copy_from_slice(&stamps);
                    }
                }
                _ => {}
            }
        }
        if !alive {
            return;
        }
        // The moment right after something is durable, before anybody acts on it.
        let durable = match &pending.op {
            DiskOp::Flush { .. } => "flushed",
            DiskOp::MetaWrite { volume, offset, .. } => match self.region(*volume, *offset) {
                "superblock write" => "superblock written",
                "log write" => "log written",
                "bitmap write" => "bitmap written",
                "undo write" => "undo written",
                _ => "",
            },
            _ => "",
        };
        if !failed && !durable.is_empty() {
            self.ambushes(node, durable);
        }
        let result = if failed { Err(DiskError::Io) } else { Ok(()) };
        let op = pending.id;
        let event = if pending.metadata {
            Event::MetaDone { op, result }
        } else {
            Event::DiskDone { op, result }
        };
        self.event(node, event);
    }

    /// The machine loses power.
    pub(crate) fn cut_power(&mut self, node: usize) {
        let mut rng = self.disk_rng.clone();
        let n = &mut self.nodes[node];
        n.disk_life += 1;
        n.hung = false;
        let mut torn = 0;
        for (_, pending) in std::mem::take(&mut n.pending) {
            torn += u64::from(n.disk.land_partly(&pending.op, &mut rng));
        }
        let lost = n.disk.power_cut(&mut rng);
        self.disk_rng = rng;
        self.count_torn(torn);
        self.coverage.lost_sectors += lost;
        self.coverage.power_cuts += 1;
        self.log(|| format!("node {node}: power is cut, {lost} sectors go back in time"));
        self.oracle.lost_power(self.now, node);
        self.loses_memory(node);
        self.end_process(node);
    }

    /// What this copy had not made durable is gone; and with it from every copy that it is to fill: it durably became a target, and
    /// takes whatever this one still has.
    pub(crate) fn loses_memory(&mut self, node: usize) {
        self.oracle.lost_memory(self.now, node);
        for other in (0..self.nodes.len()).filter(|n| *n != node) {
            let durable = self.nodes[other].disk.superblock();
            let is_target = durable.is_some_and(|(_, sb)| {
                sb.target_of != GenerationId(0) && usize::from(sb.target_source) == node
            });
            if is_target || self.relation(other, node) == "target-preparing" {
                self.oracle.lost_power(self.now, other);
            }
        }
    }

    pub(crate) fn count_torn(&mut self, torn: u64) {
        for _ in 0..torn {
            self.coverage.count("faults", "torn metadata write");
        }
    }

    /// What a block of metadata is part of.
    pub(crate) fn region(&self, volume: u16, offset: u64) -> &'static str {
        let Some(layout) = self.layouts.get(volume as usize) else {
            return "";
        };
        let log_end = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
        if offset < layout.activity_log_offset {
            "superblock write"
        } else if offset < log_end {
            "log write"
        } else if offset < layout.undo_offset {
            "bitmap write"
        } else {
            "undo write"
        }
    }

    /// A block of metadata of a stopped copy is not what was written.
    pub(crate) fn rot(&mut self, node: usize, rot: crate::plan::Rot) {
        use crate::plan::Rot;
        let mut rng = self.disk_rng.clone();
        let layout = self.layouts[0];
        let log_end = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
        let volume = rng.index(self.layouts.len()) as u16;
        let disk = &mut self.nodes[node].disk;
        let bitmaps = |disk: &Disk, layouts: &[Layout]| {
            let layout = &layouts[volume as usize];
            let from = layout.activity_log_offset + u64::from(layout.activity_log_blocks) * 4096;
            disk.meta_blocks(volume, from, layout.undo_offset)
        };
        let block = match rot {
            // The newer slot is what a single good one is: nothing can replace it.
            Rot::Superblock => disk.superblock().map(|(at, _)| (0, 4096 - at)),
            Rot::Log => {
                // A damaged newest block looks like one whose write was cut.
                let blocks = disk.meta_blocks(0, layout.activity_log_offset, log_end);
                let sequence = |b: &(u16, u64)| {
                    holdfast_wire_format::activity_log::decode(&disk.meta_block(b.0, b.1))
                        .map_or(0, |b| b.sequence)
                };
                let newest = blocks.iter().map(sequence).max().unwrap_or(0);
                let others: Vec<_> = blocks
                    .into_iter()
                    .filter(|b| sequence(b) < newest)
                    .collect();
                (!others.is_empty()).then(|| others[rng.index(others.len())])
            }
            Rot::Bitmap | Rot::BitmapMisdirected => {
                let blocks = bitmaps(disk, &self.layouts);
                (!blocks.is_empty()).then(|| blocks[rng.index(blocks.len())])
            }
            Rot::Undo => {
                // A damaged newest record, too, looks like one whose write was cut.
                let blocks = disk.meta_blocks(0, layout.undo_offset, u64::MAX);
                let record = |b: &(u16, u64)| {
                    holdfast_wire_format::undo_record::decode_record(&disk.meta_block(b.0, b.1))
                        .ok()
                        .map(|r| (r.session, r.sequence))
                };
                let newest = blocks.iter().filter_map(record).max();
                let blocks: Vec<_> = blocks
                    .into_iter()
                    .filter(|b| newest.is_none() || record(b) != newest)
                    .collect();
                (!blocks.is_empty()).then(|| blocks[rng.index(blocks.len())])
            }
        };
        if let Some(block) = block {
            if rot == Rot::BitmapMisdirected {
                let blocks = bitmaps(disk, &self.layouts);
                let from = blocks[rng.index(blocks.len())];
                disk.misdirect(from, block);
            } else {
                disk.flip(block, &mut rng);
            }
            self.coverage.count("rot", &format!("{rot:?}"));
            self.log(|| format!("node {node}: {rot:?} at {block:?} is not what was written"));
        }
        self.disk_rng = rng;
    }
}

fn describe(op: &DiskOp) -> String {
    match op {
        DiskOp::Read {
            volume,
            first,
            count,
            ..
        } => format!("read of volume {volume} sectors {first}+{count}"),
        DiskOp::Write {
            volume,
            first,
            values,
            ..
        } => format!("write of volume {volume} sectors {first}+{}", values.len()),
        DiskOp::Flush { volume, .. } => format!("flush of volume {volume}"),
        DiskOp::MetaWrite {
            volume,
            offset,
            sectors,
        } => format!("metadata write {volume}:{offset}+{}", sectors.len()),
        DiskOp::MetaRead { volume, offset, .. } => format!("metadata read {volume}:{offset}"),
    }
}
