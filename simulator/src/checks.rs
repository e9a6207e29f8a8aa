//! What must hold at every moment, and in the end.

use crate::disk::SECTOR;
use crate::world::World;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::CopyState;

impl World {
    /// After every batch of a core.
    pub(crate) fn look(&mut self, node: usize) {
        if !self.rng.chance(self.plan.look_per_mille) {
            return;
        }
        for other in 0..self.nodes.len() {
            if other != node {
                self.d7(node.min(other), node.max(other));
            }
        }
    }

    /// D7: where two copies differ, one of them knows it.
    fn d7(&mut self, a: usize, b: usize) {
        let (Some(core_a), Some(core_b)) = (&self.nodes[a].core, &self.nodes[b].core) else {
            return;
        };
        let (pa, pb) = (core_a.probe(), core_b.probe());
        let no_claim = |s: CopyState| matches!(s, CopyState::Blank | CopyState::Failed);
        if no_claim(pa.state)
            || no_claim(pb.state)
            || self.nodes[a].restored
            || self.nodes[b].restored
        {
            return;
        }
        // Two copies rely on their marks if they would go by them should they meet now; where they would take
        // everything, or nothing, from each other, no difference can be overlooked.
        let Some((row, by_marks)) = core_a.next_meeting(core_b) else {
            return;
        };
        self.coverage.count("D7 checked at", &format!("{row:?}"));
        if !by_marks {
            return;
        }
        self.coverage.count("checks", "D7");
        for volume in 0..self.plan.volumes.len() {
            let (x, y) = (
                self.nodes[a].disk.view(volume),
                self.nodes[b].disk.view(volume),
            );
            if x == y {
                continue;
            }
            let index = VolumeIndex(volume as u16);
            let mut sector = 0;
            while sector < x.len() {
                if x[sector] == y[sector] {
                    sector += 1;
                    continue;
                }
                let offset = sector as u64 * SECTOR;
                let known = core_a.may_differ(Slot(b as u8), index, offset, SECTOR)
                    || core_b.may_differ(Slot(a as u8), index, offset, SECTOR)
                    || core_a.undo_names(index, offset, SECTOR)
                    || core_b.undo_names(index, offset, SECTOR);
                if !known {
                    let text = format!(
                        "D7: nodes {a} ({:?} {:?} {}) and {b} ({:?} {:?} {}) hold {} and {} in volume {volume} sector {sector}, and neither knows, though row {} goes by marks",
                        pa.role,
                        pa.state,
                        self.relation(a, b),
                        pb.role,
                        pb.state,
                        self.relation(b, a),
                        x[sector],
                        y[sector],
                        row.number()
                    );
                    return self.fail(text);
                }
                // The rest of this block has the same answer.
                sector = (sector / 8 + 1) * 8;
            }
        }
    }

    /// Everything is quiet: all copies are equal, and the application reads what it may.
    pub(crate) fn final_checks(&mut self) {
        self.finished = true;
        let Some(primary) = (0..self.nodes.len()).find(|n| self.nodes[*n].role == Role::Primary)
        else {
            return;
        };
        let now = self.now;
        for volume in 0..self.plan.volumes.len() {
            let view = self.nodes[primary].disk.view(volume).to_vec();
            for node in 0..self.nodes.len() {
                let other = self.nodes[node].disk.view(volume);
                if let Some(at) = view.iter().zip(other).position(|(x, y)| x != y) {
                    return self.fail(format!(
                        "at rest, nodes {primary} and {node} differ in volume {volume} sector {at}: {} and {}",
                        view[at], other[at]
                    ));
                }
            }
            let tenure = self.oracle.tenure_of(primary);
            let result = self
                .oracle
                .read_ended(primary, tenure, volume, 0, &view, now, now);
            if let Err(what) = result {
                return self.fail(format!("at rest, {what}"));
            }
        }
        self.log(|| "at rest: all copies are equal".into());
    }
}
