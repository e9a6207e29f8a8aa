//! What must hold at every moment, and in the end.

use crate::disk::SECTOR;
use crate::world::World;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::CopyState;

impl World {
    /// After every batch of a core.
    pub(crate) fn look(&mut self, node: usize) {
        let now = std::mem::take(&mut self.nodes[node].look_now);
        if !self.rng.chance(self.plan.look_per_mille) && !now {
            return;
        }
        for other in 0..self.nodes.len() {
            if other != node {
                self.d7(node.min(other), node.max(other));
                self.foretold(node.min(other), node.max(other));
            }
        }
    }

    /// D9: two copies that are apart foretell the same of their next meeting. (With a register each goes by what it read last.)
    fn foretold(&mut self, a: usize, b: usize) {
        let (Some(core_a), Some(core_b)) = (&self.nodes[a].core, &self.nodes[b].core) else {
            return;
        };
        let apart = self.relation(a, b) == "down" && self.relation(b, a) == "down";
        if !apart || self.plan.register {
            return;
        }
        let (slot_a, slot_b) = (Slot(a as u8), Slot(b as u8));
        let (Ok(of_a), Ok(of_b)) = (core_a.would_tell(slot_b), core_b.would_tell(slot_a)) else {
            return;
        };
        let (by_a, by_b) = (
            core_a.would_decide(slot_b, &of_b),
            core_b.would_decide(slot_a, &of_a),
        );
        self.coverage.count("checks", "foretold");
        if by_a != by_b {
            self.fail(format!(
                "D9: nodes {a} and {b} foretell different ends of their next meeting: {by_a:?} and {by_b:?}"
            ));
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
        // D9: two that stand established, one of them primary, have settled that nothing else differs.
        let established = self.both_up(a, b)
            && (pa.role == Role::Primary) != (pb.role == Role::Primary)
            && self.relation(a, b) == "established"
            && self.relation(b, a) == "established";
        if !by_marks && !established {
            return;
        }
        self.coverage.count("checks", "D7");
        for volume in 0..self.plan.volumes.len() {
            // What one has more than the other is zero on both if they agreed, and unknown if they did not.
            let (n, m) = (self.nodes[a].sizes[volume], self.nodes[b].sizes[volume]);
            let end = if established { n.max(m) } else { n.min(m) } as usize;
            let (x, y) = (
                &self.nodes[a].disk.view(volume)[..end],
                &self.nodes[b].disk.view(volume)[..end],
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

    /// D11: only a copy that holds one point in time begins to serve, and unforced only one that may have everything.
    pub(crate) fn may_serve(&mut self, node: usize, forced: bool) -> Result<(), String> {
        let n = &self.nodes[node];
        let (state, zeroed) = n.secondary_state;
        let fit = match state {
            CopyState::UpToDate | CopyState::Complete => true,
            CopyState::Blank => forced || zeroed,
            CopyState::Consistent => forced,
            CopyState::Inconsistent => forced && n.rolled_back,
            CopyState::Outdated | CopyState::Failed => false,
        };
        self.coverage.count("checks", "D11");
        if fit {
            return Ok(());
        }
        Err(format!(
            "D11: node {node} was {state:?} and was promoted {} force",
            if forced { "by" } else { "without" }
        ))
    }

    /// Whether what the oracle knows of this copy's disk says anything: nobody took it away, and it did not fail.
    fn disk_counts(&self, node: usize, since: u64) -> bool {
        let n = &self.nodes[node];
        !n.restored && !n.broken_disk && !n.failed_once && self.oracle.keeps(node, since)
    }

    /// D1, D2: a write was acknowledged. Every copy that had to have it has it, FUA durably.
    pub(crate) fn held_where_it_must(
        &mut self,
        primary: usize,
        set: SlotSet,
        write: crate::oracle::WriteId,
    ) {
        let Some(core) = &self.nodes[primary].core else {
            return;
        };
        let probe = core.probe();
        if probe.role != Role::Primary && probe.role != Role::Demoting {
            return;
        }
        let diskless = probe.failed;
        for node in 0..self.nodes.len() {
            if !set.contains(Slot(node as u8)) || (diskless && node == primary) {
                continue;
            }
            let fua = self.oracle.is_fua(write) || diskless;
            // In semi-sync mode the peer may have it in memory alone.
            let invoked = self.oracle.invoked(write);
            let in_memory = node != primary && !self.waits_for_disk(node, invoked) && !diskless;
            if in_memory || !self.disk_counts(node, invoked) {
                continue;
            }
            self.coverage.count("checks", "D1");
            let result = self.oracle.held(write, node, fua, |v| {
                let disk = &self.nodes[node].disk;
                if fua { disk.durable(v) } else { disk.view(v) }
            });
            if let Err(what) = result {
                return self.fail(format!("D1: acknowledged at node {primary}, {what}"));
            }
        }
        self.generation_known(primary);
    }

    /// Whether what was asked for at that moment is acknowledged when this copy's disk has it.
    pub(crate) fn waits_for_disk(&self, node: usize, asked: u64) -> bool {
        let n = &self.nodes[node];
        self.plan.modes[node] == holdfast_wire_format::metadata::Mode::Sync
            && !n.mode_changes
            && asked >= n.mode_since
    }

    /// D2: a flush was answered. Everything acknowledged before it was asked for, on any volume, is durable on every
    /// member of S (in semi-sync mode: on the primary).
    pub(crate) fn flushed_where_it_must(&mut self, primary: usize, set: SlotSet, invoked: u64) {
        let Some(core) = &self.nodes[primary].core else {
            return;
        };
        let diskless = core.probe().failed;
        for node in 0..self.nodes.len() {
            if !set.contains(Slot(node as u8)) || (diskless && node == primary) {
                continue;
            }
            if node != primary && !self.waits_for_disk(node, u64::MAX) && !diskless {
                continue;
            }
            self.coverage.count("checks", "D2");
            for write in self.oracle.recent(primary, invoked) {
                let asked = self.oracle.invoked(write);
                if !self.disk_counts(node, asked)
                    || (node != primary && !diskless && !self.waits_for_disk(node, asked))
                {
                    continue;
                }
                let disk = &self.nodes[node].disk;
                let result = self.oracle.held(write, node, true, |v| disk.durable(v));
                if let Err(what) = result {
                    return self.fail(format!(
                        "D2: a flush was answered at node {primary}, {what}"
                    ));
                }
            }
        }
    }

    /// A copy joined S: it holds every write that was acknowledged, and what was flushed durably (D1, D2).
    pub(crate) fn joined_s(&mut self, primary: usize, node: usize) {
        if self.nodes[primary].role != Role::Primary || !self.waits_for_disk(node, u64::MAX) {
            return;
        }
        self.coverage.count("checks", "joins S");
        for write in self.oracle.recent(primary, u64::MAX) {
            let asked = self.oracle.invoked(write);
            if !self.disk_counts(node, asked) || !self.waits_for_disk(node, asked) {
                continue;
            }
            let durable = self.oracle.is_flushed(write);
            let disk = &self.nodes[node].disk;
            let result = self.oracle.held(write, node, durable, |v| {
                if durable {
                    disk.durable(v)
                } else {
                    disk.view(v)
                }
            });
            if let Err(what) = result {
                return self.fail(format!("node {node} joined S of node {primary}, {what}"));
            }
        }
    }

    /// D10: nothing completes in a generation that a connected follower does not hold durably.
    fn generation_known(&mut self, primary: usize) {
        let Some(core) = &self.nodes[primary].core else {
            return;
        };
        let probe = core.probe();
        let n = &mut self.nodes[primary];
        if n.generation_checks.0 != probe.generation.0 {
            n.generation_checks = (probe.generation.0, 0);
        }
        n.generation_checks.1 += 1;
        if n.generation_checks.1 > 20 || probe.failed {
            return;
        }
        // The core may have gone on to a generation in this very turn: what completed before that is of the one before.
        let own = n.disk.superblock();
        if !own.is_some_and(|(_, sb)| sb.generations.iter().any(|g| g.id == probe.generation)) {
            return;
        }
        for node in 0..self.nodes.len() {
            if node == primary
                || !self.both_up(primary, node)
                || self.relation(primary, node) != "established"
                || self.relation(node, primary) != "established"
            {
                continue;
            }
            self.coverage.count("checks", "D10");
            let durable = self.nodes[node].disk.superblock();
            let holds = durable
                .is_some_and(|(_, sb)| sb.generations.iter().any(|g| g.id == probe.generation));
            if !holds {
                return self.fail(format!(
                    "D10: node {primary} completes a write in generation {}, which node {node} follows and does not hold durably",
                    probe.generation
                ));
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
            let view = self.nodes[primary].view(volume).to_vec();
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
