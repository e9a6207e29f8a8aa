//! Where a world stands, in a short form: what decides how it goes on, without what only counts up.
//!
//! Left out: the time, absolute positions, epochs and versions (only which is further counts), ids of generations (only
//! how two histories stand to each other), and what was written (only where the copies' contents, and each copy's cache
//! and medium, differ). Copies of one mode are interchangeable: of all orders of them the smallest form counts.

use crate::world::World;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;
use std::cmp::Ordering;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Sectors of a block.
const BLOCK: usize = 8;
/// More generations past the common one than this are not told apart.
const FAR: usize = 3;

impl World {
    pub(crate) fn fingerprint(&self) -> u64 {
        let copies = self.nodes.len();
        let orders: &[&[usize]] = match copies {
            2 => &[&[0, 1], &[1, 0]],
            3 if self.plan.modes[2] == self.plan.modes[1] => &[
                &[0, 1, 2],
                &[0, 2, 1],
                &[1, 0, 2],
                &[1, 2, 0],
                &[2, 0, 1],
                &[2, 1, 0],
            ],
            _ => &[&[0, 1, 2], &[1, 0, 2]],
        };
        let superblocks: Vec<Option<Superblock>> = self
            .nodes
            .iter()
            .map(|n| n.disk.superblock().map(|(_, sb)| sb))
            .collect();
        orders
            .iter()
            .map(|order| {
                let mut form = DefaultHasher::new();
                self.hash_in(order, &superblocks, &mut form);
                form.finish()
            })
            .min()
            .unwrap_or(0)
    }

    fn hash_in(
        &self,
        order: &[usize],
        superblocks: &[Option<Superblock>],
        form: &mut DefaultHasher,
    ) {
        let place = |slot: u8| order.iter().position(|n| *n == usize::from(slot));
        let set = |set: SlotSet| -> Vec<bool> {
            order.iter().map(|n| set.contains(Slot(*n as u8))).collect()
        };
        for &i in order {
            let node = &self.nodes[i];
            (node.broken_disk, node.restored, node.backup.is_some()).hash(form);
            let probe = node.core.as_ref().map(|core| core.probe());
            if let Some(p) = probe {
                (p.role as u8, p.state as u8, p.failed, p.zeroed, p.parked).hash(form);
                (set(p.in_sync), set(p.required)).hash(form);
            }
            if let Some(sb) = &superblocks[i] {
                let f = &sb.flags;
                (sb.state as u8, sb.target_of.0 != 0, place(sb.target_source)).hash(form);
                (f.unclean, f.was_primary, f.rolled_back, f.undo_lost, f.solo).hash(form);
                (set(sb.in_sync), set(sb.in_sync_pending), sb.log_incomplete).hash(form);
                place(sb.epoch_gate.owner).hash(form);
                let newest = sb.generations.last();
                newest.map(|g| (g.cause as u8, place(g.maker))).hash(form);
            }
            for volume in 0..self.plan.volumes.len() {
                let disk = &node.disk;
                blocks(disk.view(volume), disk.durable(volume)).hash(form);
            }
            for &j in order.iter().filter(|j| **j != i) {
                (self.network.cut[i][j] > 0, self.relation(i, j)).hash(form);
                let peer = node.core.as_ref().and_then(|c| c.probe_peer(Slot(j as u8)));
                peer.map(|p| p.1 > 0).hash(form);
                if let (Some(mine), Some(theirs)) = (&superblocks[i], &superblocks[j]) {
                    self.hash_pair(i, j, mine, theirs, form);
                }
            }
        }
    }

    fn hash_pair(
        &self,
        i: usize,
        j: usize,
        mine: &Superblock,
        theirs: &Superblock,
        form: &mut DefaultHasher,
    ) {
        let order = |o: Ordering| o as i8;
        order(mine.epoch_gate.number.cmp(&theirs.epoch_gate.number)).hash(form);
        order(mine.in_sync_version.cmp(&theirs.in_sync_version)).hash(form);
        let past = mine
            .generations
            .iter()
            .rev()
            .take_while(|g| !theirs.generations.iter().any(|t| t.id == g.id))
            .count();
        past.min(FAR).hash(form);
        let current = |sb: &Superblock| sb.generations.last().map(|g| g.id);
        // Positions of a pair that follows each other move all the time.
        if current(mine) == current(theirs) && !self.both_up(i, j) {
            order(mine.position.cmp(&theirs.position)).hash(form);
        }
        (Some(mine.target_of) == current(theirs)).hash(form);
        for volume in 0..self.plan.volumes.len() {
            blocks(
                self.nodes[i].disk.view(volume),
                self.nodes[j].disk.view(volume),
            )
            .hash(form);
        }
    }
}

/// Which blocks of two contents differ.
fn blocks(a: &[u64], b: &[u64]) -> Vec<bool> {
    a.chunks(BLOCK)
        .zip(b.chunks(BLOCK))
        .map(|(a, b)| a != b)
        .collect()
}
