//! What people change about a cluster while it runs: larger volumes, other modes.

use crate::disk::{Disk, SECTOR};
use crate::plan::MS;
use crate::world::{Happening, Node, World};
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::{Mode, Superblock};
use holdfast_wire_format::superblock;

impl Node {
    /// What its volume holds, as far as it goes.
    pub(crate) fn view(&self, volume: usize) -> &[u64] {
        &self.disk.view(volume)[..self.sizes[volume] as usize]
    }

    /// The same of all volumes; what is behind their ends reads zero, as it will when they have grown.
    pub(crate) fn all(&self) -> Vec<Vec<u64>> {
        let mut all = self.disk.all();
        for (view, size) in all.iter_mut().zip(&self.sizes) {
            view[*size as usize..].fill(0);
        }
        all
    }
}

impl World {
    /// Sizes for a new disk, in sectors: what the largest copy of each volume has.
    pub(crate) fn largest(&self) -> Vec<u64> {
        let size = |disk: &Disk, volume: usize| {
            disk.newest(volume as u16)
                .map_or(0, |sb| sb.data_size / SECTOR)
        };
        (0..self.plan.begin.len())
            .map(|volume| {
                let sizes = self.nodes.iter().map(|n| size(&n.disk, volume));
                sizes.max().unwrap_or(0).max(self.plan.begin[volume])
            })
            .collect()
    }

    /// A person asks whoever serves.
    pub(crate) fn grow(&mut self, volume: usize, sectors: u64) {
        let serving = (0..self.nodes.len()).find(|n| self.nodes[*n].role == Role::Primary);
        let Some(node) = serving else { return };
        if self.nodes.iter().any(|n| n.restored) {
            return;
        }
        let size = (self.nodes[node].sizes[volume] + sectors).min(self.plan.volumes[volume]);
        let command = Command::Grow {
            volume: VolumeIndex(volume as u16),
            size: size * SECTOR,
        };
        self.order(node, "grow", command);
    }

    /// The primary said that every copy has the new size.
    pub(crate) fn grown(&mut self, primary: usize, volume: usize) {
        let size = self.nodes[primary].sizes[volume];
        self.grown[volume] = self.grown[volume].max(size);
        for node in 0..self.nodes.len() {
            let n = &self.nodes[node];
            if n.restored || n.broken_disk || n.failed_once || n.may_be_blank {
                continue;
            }
            let durable = n.disk.newest(volume as u16);
            if durable.is_none_or(|sb| sb.data_size / SECTOR < size) {
                return self.fail(format!(
                    "volume {volume} has {size} sectors on every copy, says node {primary}, and node {node} has less"
                ));
            }
        }
        self.coverage.count("checks", "grown everywhere");
    }

    /// Copies that are durably in the middle of a resync.
    pub(crate) fn mixtures(&self) -> SlotSet {
        let target = |n: &usize| {
            let durable = self.nodes[*n].disk.superblock();
            durable.is_some_and(|(_, sb)| sb.target_of != GenerationId(0))
        };
        let targets = (0..self.nodes.len()).filter(target);
        targets.fold(SlotSet::EMPTY, |set, n| set.with(Slot(n as u8)))
    }

    /// What was told once stays true.
    pub(crate) fn large_enough(&self, node: usize, forced: bool) -> Result<(), String> {
        for (volume, size) in self.nodes[node].sizes.iter().enumerate() {
            if *size < self.grown[volume] && !forced {
                return Err(format!(
                    "node {node} serves volume {volume} with {size} sectors, {} before",
                    self.grown[volume]
                ));
            }
        }
        Ok(())
    }

    /// The shell holds everything but the answers of its disks until they are at rest.
    pub(crate) fn room_wanted(&mut self, node: usize, volume: usize, size: u64) {
        self.log(|| format!("node {node}: makes room for {size} bytes of volume {volume}"));
        self.nodes[node].held.get_or_insert_default();
        let until = self.now + 300 * MS;
        let life = self.nodes[node].life;
        let begins = self.rng.below(3 * MS);
        self.after(
            begins,
            Happening::Room {
                node,
                life,
                volume,
                size,
                until,
            },
        );
    }

    /// Its metadata is laid out for the larger size, and what is behind the end is zero: all of it, or nothing. (How the shell
    /// does that through a crash, `replicator/` tests on real files.)
    pub(crate) fn make_room(&mut self, node: usize, volume: usize, size: u64, until: u64) {
        let n = &self.nodes[node];
        if n.frozen.is_some() || (!n.pending.is_empty() && self.now < until) {
            let life = n.life;
            return self.after(
                MS,
                Happening::Room {
                    node,
                    life,
                    volume,
                    size,
                    until,
                },
            );
        }
        let index = VolumeIndex(volume as u16);
        let result = if !n.pending.is_empty() {
            Err("the disk is at work for too long".to_owned())
        } else if size / SECTOR > self.plan.volumes[volume] || self.rng.chance(50) {
            Err("the device is too small".to_owned())
        } else {
            let may = n.core.as_ref().map(|core| core.may_move(index));
            may.unwrap_or_else(|| Err("it is gone".to_owned()))
        };
        let result = result.and_then(|()| self.lay_out(node, index, size));
        self.coverage.count(
            "room",
            match &result {
                Ok(()) => "made",
                Err(_) => "refused",
            },
        );
        let event = Event::RoomMade {
            volume: index,
            size,
            result,
        };
        let backlog = self.nodes[node].held.take().unwrap_or_default();
        let life = self.nodes[node].life;
        self.event(node, event);
        for event in backlog {
            if self.nodes[node].life == life {
                self.event(node, event);
            }
        }
        // The end of a batch that came while it was held was passed over.
        if self.nodes[node].life == life {
            self.end_batch(node);
        }
    }

    fn lay_out(&mut self, node: usize, volume: VolumeIndex, size: u64) -> Result<(), String> {
        let at = volume.0 as usize;
        let n = &mut self.nodes[node];
        let old = n.disk.newest(volume.0).ok_or("no superblock")?;
        let written = Superblock {
            sequence: old.sequence + 2,
            room: size,
            ..old
        };
        let layout = Layout::of(&written).map_err(|e| e.to_string())?;
        if layout.undo_offset != self.layouts[at].undo_offset {
            return Err("in this world the metadata of every size lies alike".into());
        }
        for sequence in [written.sequence - 1, written.sequence] {
            let image = superblock::encode(&Superblock {
                sequence,
                ..written.clone()
            });
            let image = image.map_err(|e| e.to_string())?;
            let offset = if sequence.is_multiple_of(2) { 0 } else { 4096 };
            n.disk.put_meta(volume.0, offset, &image);
        }
        n.disk
            .fill(at, written.data_size / SECTOR, size / SECTOR, 0);
        // (An older image ends where this disk does not any more: a person would grow it before its start.)
        n.backup = None;
        if let Some(core) = &mut n.core {
            core.moved(volume, &written);
        }
        Ok(())
    }

    /// A person changes how a copy is written to: on every node, and in what they start with.
    pub(crate) fn change_mode(&mut self, node: usize, mode: Mode) {
        if self.plan.modes[node] == mode {
            return;
        }
        self.plan.modes[node] = mode;
        self.nodes[node].mode_changes = true;
        self.coverage.count("modes", &format!("{mode:?}"));
        for other in (0..self.nodes.len()).filter(|n| *n != node) {
            for (at, peer) in [(other, node), (node, other)] {
                let command = Command::SetMode {
                    peer: Slot(peer as u8),
                    mode: self.plan.pair_mode(at, peer),
                };
                self.order(at, "set-mode", command);
            }
        }
    }

    /// Everybody heard of it, and what was asked for before was answered.
    pub(crate) fn mode_settles(&mut self) {
        if self.nodes.iter().all(|n| !n.mode_changes) || !self.settled() {
            return;
        }
        let now = self.now;
        for n in &mut self.nodes {
            if std::mem::take(&mut n.mode_changes) {
                n.mode_since = now;
            }
        }
    }
}
