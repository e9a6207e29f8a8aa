//! Faults and orders of the plan, the failover manager, and the people who put things right in the end.

use crate::disk::Disk;
use crate::plan::{FaultKind, MS, Strike, TRIGGERS};
use crate::world::{Happening, World};
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, Mode, OnPeerLoss};

/// What they remember.
#[derive(Debug, Default)]
pub(crate) struct Operators {
    /// Since when nobody serves.
    no_primary_since: Option<u64>,
    faults_over_at: u64,
    turns: u64,
    /// A person had to force something after the faults.
    pub forced_at_end: bool,
    quiet_since: Option<u64>,
    /// How often a person forced something in the end, and how often one came to a copy that stays apart.
    forced: usize,
    visits: [usize; 8],
}

/// Virtual time after which a world without faults must have come to rest.
const REST: u64 = 120_000 * MS;

impl World {
    pub(crate) fn fault(&mut self, at: usize) {
        if self.faults_over {
            return;
        }
        let kind = self.plan.faults[at].kind;
        // Nobody starts an old disk again and again before it was seen by the others.
        if let FaultKind::Kill { node, .. }
        | FaultKind::Power { node, .. }
        | FaultKind::Detach { node, .. }
        | FaultKind::Rot { node, .. }
        | FaultKind::BlankDisk { node, .. }
        | FaultKind::FreshDisk { node, .. }
        | FaultKind::DiskError { node, .. } = kind
            && self.nodes[node].restored
        {
            return;
        }
        if matches!(kind, FaultKind::Blackout { .. }) && self.nodes.iter().any(|n| n.restored) {
            return;
        }
        self.coverage.faults += 1;
        self.coverage.count("faults", kind.name());
        self.log(|| format!("fault {at}: {kind:?}"));
        let over = |world: &mut World, ms: u64| world.after(ms * MS, Happening::FaultOver(at));
        match kind {
            FaultKind::Kill { node, down_ms } => {
                if self.nodes[node].core.is_some() {
                    self.kill(node);
                    self.restart(node, down_ms * MS);
                }
            }
            FaultKind::Power { node, down_ms } => self.power(node, down_ms),
            FaultKind::Blackout { down_ms } => {
                for node in 0..self.nodes.len() {
                    let more = self.rng.below(300);
                    self.power(node, down_ms + more);
                }
            }
            FaultKind::Freeze { node, ms } => {
                self.freeze(node);
                over(self, ms);
            }
            FaultKind::Cut { from, to, both, ms } => {
                self.network.cut[from][to] += 1;
                self.network.cut[to][from] += u32::from(both);
                over(self, ms);
            }
            FaultKind::Break { a, b } => self.break_pair(a, b),
            FaultKind::SlowLine { a, b, ms } => {
                let pair = self.network.pair_of(a, b);
                self.network.slow[pair] = true;
                over(self, ms);
            }
            FaultKind::SlowDisk { node, ms } => {
                self.nodes[node].slow = true;
                over(self, ms);
            }
            FaultKind::HangDisk { node, ms } => {
                self.nodes[node].hung = true;
                over(self, ms);
            }
            FaultKind::ClockJump { node, ms } => self.jump_clock(node, ms * MS),
            FaultKind::DiskError { node, replace } => {
                self.nodes[node].fail_next += 1;
                let _ = replace;
                over(self, 3000);
            }
            FaultKind::BlankDisk { node, down_ms } => {
                if self.may_lose_disk(node) {
                    self.replace_disk(node);
                    self.restart(node, down_ms * MS);
                }
            }
            FaultKind::FreshDisk { node, down_ms } => {
                if self.others_are_whole(node) {
                    self.replace_disk(node);
                    self.restart(node, down_ms * MS);
                }
            }
            FaultKind::Resolve { node } => {
                let discard = Command::ResolveSplitBrain { discard_mine: true };
                self.order(node, "resolve", discard);
            }
            FaultKind::Promote { node } => {
                self.order(node, "promote", Command::Promote { force: false });
            }
            FaultKind::Force { node } => {
                self.order(node, "force", Command::Promote { force: true });
            }
            FaultKind::Demote { node } => self.order(node, "demote", Command::Demote),
            FaultKind::Disconnect { node, ms } => {
                self.order(node, "disconnect", Command::Disconnect { peer: None });
                over(self, ms);
            }
            FaultKind::PauseResync { node, ms } => {
                self.order(node, "pause", Command::PauseResync);
                over(self, ms);
            }
            FaultKind::SuspendIo { node, ms } => {
                self.order(node, "suspend", Command::SuspendIo);
                over(self, ms);
            }
            FaultKind::Verify { node } => {
                self.order(node, "verify", Command::Verify { volume: None });
            }
            FaultKind::StopVerify { node } => self.order(node, "stop-verify", Command::StopVerify),
            FaultKind::Invalidate { node } => self.order(node, "invalidate", Command::Invalidate),
            FaultKind::Detach { node, down_ms } => {
                if self.nodes[node].core.is_some() {
                    self.order(node, "detach", Command::Detach);
                    over(self, down_ms);
                }
            }
            FaultKind::SetPolicy { node, suspend } => {
                let policy = if suspend {
                    OnPeerLoss::Suspend
                } else {
                    OnPeerLoss::Continue
                };
                self.order(
                    node,
                    "policy",
                    Command::SetOnPeerLoss {
                        policy,
                        force: false,
                    },
                );
            }
            FaultKind::Ambush { .. } => self.waiting.push(at),
            FaultKind::Backup { node } => {
                if !self.nodes[node].restored && !self.nodes[node].broken_disk {
                    let image = self.nodes[node].disk.image();
                    self.nodes[node].backup = Some((image, self.nodes[node].incarnation));
                }
            }
            FaultKind::OldDisk { node, down_ms } => self.old_disk(node, down_ms),
            FaultKind::Rot { node, down_ms, rot } => {
                if self.nodes[node].core.is_some() {
                    self.kill(node);
                    self.nodes[node].rot = Some(rot);
                    self.restart(node, down_ms * MS);
                }
            }
            FaultKind::Replay { from, to } => self.replay(from, to, None),
            FaultKind::Misnamed { node, ms } => {
                if self.nodes[node].core.is_some() {
                    self.kill(node);
                    self.nodes[node].misnamed = true;
                    self.restart(node, 10 * MS);
                    over(self, ms);
                }
            }
            FaultKind::Nonsense { from, to, what } => self.replay(from, to, Some(what)),
            FaultKind::Grow { volume, sectors } => self.grow(volume, sectors),
            FaultKind::SetMode { node, mode } => self.change_mode(node, mode),
            FaultKind::DetachDisk { ms } => {
                if let Some(node) = self.primary() {
                    self.order(node, "detach-disk", Command::DetachDisk);
                    over(self, ms);
                }
            }
        }
    }

    fn primary(&self) -> Option<usize> {
        (0..self.nodes.len())
            .find(|n| self.nodes[*n].role == Role::Primary && self.nodes[*n].core.is_some())
    }

    /// The image of a disk that was kept takes its place. Only where every other copy has seen a later start of that
    /// disk: nothing else tells an old disk from one that lost power.
    fn old_disk(&mut self, node: usize, down_ms: u64) {
        let n = &self.nodes[node];
        let seen = (0..self.nodes.len()).all(|m| {
            m == node || (n.met.contains(Slot(m as u8)) && self.now > n.met_at + 500 * MS)
        });
        let later = n
            .backup
            .as_ref()
            .is_some_and(|(_, start)| start + 2 <= n.incarnation);
        if !seen || !later || n.restored || n.core.is_none() || !self.may_lose_disk(node) {
            return;
        }
        self.log(|| format!("node {node}: comes back with an old image of its disk"));
        self.end_process(node);
        let n = &mut self.nodes[node];
        n.disk_life += 1;
        n.pending.clear();
        n.hung = false;
        n.fail_next = 0;
        if let Some((image, _)) = n.backup.take() {
            n.disk = image;
        }
        n.restored = true;
        // The image may be from before this copy held anything.
        let image = n.disk.superblock();
        n.may_be_blank = image.is_none_or(|(_, sb)| sb.state == CopyState::Blank);
        n.last_state = (255, 255);
        self.oracle.given_up(self.now, node, self.mixtures());
        self.coverage.count("faults", "old disk came back");
        self.restart(node, down_ms * MS);
    }

    // --- ambushes ---

    /// A copy came to a point that an ambush may wait for.
    pub(crate) fn ambushes(&mut self, node: usize, what: &str) {
        if self.now >= self.points_from
            && let Some(on) = TRIGGERS.iter().position(|t| *t == what)
        {
            self.points.insert((node, on));
        }
        let found = self.waiting.iter().position(|fault| {
            matches!(self.plan.faults[*fault].kind,
                FaultKind::Ambush { node: n, on, .. } if n == node && TRIGGERS[on] == what)
        });
        let Some(found) = found else { return };
        let fault = self.waiting.remove(found);
        if let FaultKind::Ambush { delay_us, .. } = self.plan.faults[fault].kind {
            self.after(
                delay_us * 1000,
                Happening::Strike {
                    fault,
                    later: false,
                },
            );
        }
    }

    pub(crate) fn strike(&mut self, at: usize, later: bool) {
        let FaultKind::Ambush {
            node,
            on,
            strike,
            ms,
            ..
        } = self.plan.faults[at].kind
        else {
            return;
        };
        if self.faults_over || self.nodes.iter().any(|n| n.restored) {
            return;
        }
        if later {
            return self.order(node, "force", Command::Promote { force: true });
        }
        self.log(|| format!("ambush {at} at {}: {strike:?} node {node}", TRIGGERS[on]));
        self.coverage.count("ambushes", TRIGGERS[on]);
        self.coverage.count("strikes", &format!("{strike:?}"));
        let others: Vec<usize> = (0..self.nodes.len()).filter(|n| *n != node).collect();
        match strike {
            Strike::Kill => {
                if self.nodes[node].core.is_some() {
                    self.kill(node);
                    self.restart(node, ms * MS);
                }
            }
            Strike::Power => self.power(node, ms),
            Strike::AloneAfterBlackout => {
                self.power(node, 10);
                for other in others {
                    self.power(other, ms + 1500);
                }
            }
            Strike::OthersAfterBlackout => {
                self.power(node, ms + 1500);
                for other in others {
                    self.power(other, 10);
                }
            }
            Strike::KillOthers => {
                for other in others {
                    if self.nodes[other].core.is_some() {
                        self.kill(other);
                        self.restart(other, ms * MS);
                    }
                }
            }
            Strike::PowerOthers => {
                for other in others {
                    self.power(other, ms);
                }
            }
            Strike::ForcedAlone | Strike::RottenAndForced | Strike::KilledAndForced => {
                if strike != Strike::ForcedAlone && self.nodes[node].core.is_some() {
                    self.kill(node);
                    if strike == Strike::RottenAndForced {
                        self.nodes[node].rot = Some(crate::plan::Rot::Undo);
                    }
                    self.restart(node, 5 * MS);
                }
                for other in others {
                    self.power(other, ms + 3000);
                }
                self.after(
                    1500 * MS,
                    Happening::Strike {
                        fault: at,
                        later: true,
                    },
                );
            }
            Strike::CutOff => {
                for other in others {
                    self.network.cut[node][other] += 1;
                    self.network.cut[other][node] += 1;
                }
                self.after(ms * MS, Happening::FaultOver(at));
            }
            Strike::Freeze => {
                self.freeze(node);
                self.after(ms * MS, Happening::FaultOver(at));
            }
            Strike::DiskError => {
                self.nodes[node].fail_next += 1;
                self.after(3000 * MS, Happening::FaultOver(at));
            }
            Strike::Demote => self.order(node, "demote", Command::Demote),
            Strike::Promote => self.order(node, "promote", Command::Promote { force: false }),
            Strike::Lose => {
                for other in others {
                    self.lose_pair(node, other);
                }
            }
            Strike::PromoteOther => {
                let other = others[self.rng.index(others.len())];
                self.order(other, "promote", Command::Promote { force: false });
            }
        }
    }

    pub(crate) fn fault_over(&mut self, at: usize) {
        if self.faults_over {
            // All of them ended together.
            return;
        }
        match self.plan.faults[at].kind {
            FaultKind::Freeze { node, .. } => self.thaw(node),
            FaultKind::Cut { from, to, both, .. } => {
                self.network.cut[from][to] -= 1;
                self.network.cut[to][from] -= u32::from(both);
                self.log(|| format!("fault {at} is over"));
                self.cut_over(from, to);
            }
            FaultKind::SlowLine { a, b, .. } => {
                let pair = self.network.pair_of(a, b);
                self.network.slow[pair] = false;
            }
            FaultKind::SlowDisk { node, .. } => self.nodes[node].slow = false,
            FaultKind::HangDisk { node, .. } => self.release_disk(node),
            FaultKind::DiskError { node, .. } => {
                self.nodes[node].fail_next = 0;
                self.mend_disk(node);
            }
            FaultKind::DetachDisk { .. } => {
                for node in 0..self.nodes.len() {
                    self.mend_disk(node);
                }
            }
            FaultKind::Disconnect { node, .. } => {
                self.order(node, "connect", Command::Connect { peer: None });
            }
            FaultKind::PauseResync { node, .. } => {
                self.order(node, "resume", Command::ResumeResync);
            }
            FaultKind::SuspendIo { node, .. } => self.order(node, "resume-io", Command::ResumeIo),
            FaultKind::Ambush { node, strike, .. } => match strike {
                Strike::CutOff => {
                    for other in (0..self.nodes.len()).filter(|n| *n != node) {
                        self.network.cut[node][other] -= 1;
                        self.network.cut[other][node] -= 1;
                    }
                    for other in (0..self.nodes.len()).filter(|n| *n != node) {
                        self.cut_over(node, other);
                    }
                }
                Strike::Freeze => self.thaw(node),
                Strike::DiskError => {
                    self.nodes[node].fail_next = 0;
                    self.mend_disk(node);
                }
                _ => {}
            },
            FaultKind::Detach { node, .. } if self.nodes[node].core.is_none() => {
                self.restart(node, 0);
            }
            FaultKind::Misnamed { node, .. } => self.put_names_right(node),
            _ => {}
        }
    }

    fn put_names_right(&mut self, node: usize) {
        if std::mem::take(&mut self.nodes[node].misnamed) && self.nodes[node].core.is_some() {
            self.kill(node);
            self.restart(node, 10 * MS);
        }
    }

    fn power(&mut self, node: usize, down_ms: u64) {
        self.may_back_up(node);
        self.cut_power(node);
        self.restart(node, down_ms * MS);
    }

    /// Somebody makes an image of a disk now and then.
    fn may_back_up(&mut self, node: usize) {
        let n = &self.nodes[node];
        if n.backup.is_none() && !n.restored && !n.broken_disk && self.rng.chance(300) {
            let n = &mut self.nodes[node];
            n.backup = Some((n.disk.image(), n.incarnation));
        }
    }

    /// Whether the others can bring back what this disk holds.
    fn may_lose_disk(&self, node: usize) -> bool {
        (0..self.nodes.len()).any(|other| {
            other != node
                && self.nodes[other].core.as_ref().is_some_and(|c| {
                    let probe = c.probe();
                    probe.role == Role::Primary && probe.state == CopyState::UpToDate
                })
        }) && (0..self.nodes.len())
            .filter(|n| *n != node)
            .all(|n| !self.nodes[n].broken_disk)
    }

    /// Whether the others all have what this disk holds, as they and this copy see it: then one of them may lose what it has in memory alone.
    fn others_are_whole(&self, node: usize) -> bool {
        (0..self.nodes.len()).filter(|n| *n != node).all(|other| {
            let n = &self.nodes[other];
            let state = n.core.as_ref().map(|c| c.probe().state);
            !n.broken_disk
                && !n.restored
                && state == Some(CopyState::UpToDate)
                && self.relation(node, other) == "established"
                && self.relation(other, node) == "established"
        })
    }

    fn replace_disk(&mut self, node: usize) {
        self.log(|| format!("node {node}: gets a new, blank disk"));
        self.end_process(node);
        let n = &mut self.nodes[node];
        n.disk_life += 1;
        n.disk_number += 1;
        n.pending.clear();
        n.hung = false;
        n.broken_disk = false;
        n.fail_next = 0;
        n.disk = Disk::new(&self.plan.volumes);
        n.disk.scribble(u64::MAX);
        self.create_disk(node, false);
        self.nodes[node].may_be_blank = true;
        self.nodes[node].last_state = (255, 255);
        self.oracle.given_up(self.now, node, self.mixtures());
        self.coverage.count("faults", "disk replaced");
    }

    /// A failed disk is replaced when the others can fill it, else the machine is started again on it: the
    /// error was one of the cable.
    fn mend_disk(&mut self, node: usize) {
        if !self.nodes[node].broken_disk {
            return;
        }
        if self.may_lose_disk(node) && self.rng.chance(500) {
            self.replace_disk(node);
        } else {
            self.cut_power(node);
            self.nodes[node].broken_disk = false;
        }
        self.restart(node, 50 * MS);
    }

    // --- the failover manager, and people ---

    pub(crate) fn manager_turn(&mut self) {
        self.operators.turns += 1;
        let pause = self.rng.between(50, 200) * MS;
        self.after(pause, Happening::Manager);
        let serving = (0..self.nodes.len()).any(|n| {
            self.nodes[n].core.as_ref().is_some_and(|c| {
                self.nodes[n].frozen.is_none()
                    && matches!(
                        c.probe().role,
                        Role::Primary | Role::Promoting | Role::Demoting
                    )
            })
        });
        if serving {
            self.operators.no_primary_since = None;
        } else {
            self.operators.no_primary_since.get_or_insert(self.now);
        }
        self.see_equal();
        self.mode_settles();
        if self.faults_over {
            return self.put_right();
        }
        if let Some(since) = self.operators.no_primary_since
            && self.now - since >= self.plan.failover_ms * MS
        {
            self.try_failover(false);
        }
    }

    fn try_failover(&mut self, force: bool) {
        let candidates: Vec<usize> = (0..self.nodes.len())
            .filter(|n| {
                let node = &self.nodes[*n];
                node.core.is_some() && node.frozen.is_none() && node.admin.is_empty()
            })
            .collect();
        if candidates.is_empty() {
            return;
        }
        let node = if force {
            // A person takes the best: by state, then by epoch.
            let rank = |n: usize| {
                self.nodes[n].core.as_ref().map(|c| {
                    let p = c.probe();
                    (
                        !self.nodes[n].restored,
                        p.state as u8 * u8::from(!p.failed),
                        p.epoch.number,
                    )
                })
            };
            // What was refused before is refused again: then the next best one.
            let mut best = candidates;
            best.sort_by_key(|n| std::cmp::Reverse(rank(*n)));
            let node = best[self.operators.forced % best.len()];
            self.operators.forced += 1;
            node
        } else {
            candidates[self.rng.index(candidates.len())]
        };
        let what = if force { "force" } else { "promote" };
        self.order(node, what, Command::Promote { force });
    }

    pub(crate) fn end_faults(&mut self) {
        self.log(|| "faults stop".into());
        self.faults_over = true;
        self.waiting.clear();
        self.operators.faults_over_at = self.now;
        self.plan.tuning.undo_full_pauses = false;
        for row in &mut self.network.cut {
            row.fill(0);
        }
        for pair in 0..self.network.pairs() {
            self.network.slow[pair] = false;
        }
        for node in 0..self.nodes.len() {
            for other in 0..self.nodes.len() {
                if node < other {
                    self.cut_over(node, other);
                }
            }
            self.nodes[node].slow = false;
            self.nodes[node].fail_next = 0;
            self.release_disk(node);
            self.thaw(node);
            self.put_names_right(node);
            self.order(node, "resume-io", Command::ResumeIo);
            self.order(node, "resume", Command::ResumeResync);
            self.order(node, "connect", Command::Connect { peer: None });
            if self.nodes[node].core.is_none() {
                self.restart(node, 10 * MS);
            }
        }
    }

    fn put_right(&mut self) {
        let passed = self.now - self.operators.faults_over_at;
        if passed > self.plan.go_on {
            self.clients.stopped = true;
        }
        if passed > REST {
            let text = self.describe_all();
            return self.fail(format!(
                "no rest {} s after the last fault:\n{text}",
                passed / (1000 * MS)
            ));
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].broken_disk {
                self.mend_disk(node);
            } else if self.nodes[node].core.is_none() && self.nodes[node].pending.is_empty() {
                self.restart(node, 10 * MS);
            }
        }
        if let Some(since) = self.operators.no_primary_since {
            let waited = self.now - since;
            if waited > 20_000 * MS {
                self.operators.forced_at_end = true;
                self.operators.no_primary_since = Some(self.now);
                self.coverage.count("orders", "force at the end");
                self.try_failover(true);
            } else if waited > 300 * MS && (self.register.is_none() || waited < 15_000 * MS) {
                // (An order that is still under way would be in the way of the person's.)
                self.try_failover(false);
            }
            self.operators.quiet_since = None;
            return;
        }
        if self.operators.turns.is_multiple_of(40) {
            self.settle_split_brains();
        }
        if passed > self.plan.go_on && self.at_rest() {
            let since = *self.operators.quiet_since.get_or_insert(self.now);
            if self.now - since > self.plan.quiet {
                self.final_checks();
            }
        } else {
            self.operators.quiet_since = None;
        }
    }

    /// Copies that refuse each other: the newer side is kept.
    fn settle_split_brains(&mut self) {
        let primaries: Vec<usize> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].role == Role::Primary)
            .collect();
        let keep = self
            .oracle
            .current_node()
            .filter(|n| primaries.contains(n))
            .or(primaries.first().copied());
        let Some(keep) = keep else { return };
        for node in 0..self.nodes.len() {
            if node == keep {
                self.order(node, "connect", Command::Connect { peer: None });
                continue;
            }
            let relation = self.relation(node, keep);
            if relation == "established" {
                self.operators.visits[node] = 0;
                continue;
            }
            if relation == "target" {
                // It is being filled: slowly, perhaps.
                continue;
            }
            self.operators.visits[node] += 1;
            if self.undo_full(node) {
                // The person gives up the undo: another setting, and the process anew.
                self.kill(node);
                self.restart(node, 10 * MS);
                continue;
            }
            let smaller = self.nodes[node].sizes.iter().zip(&self.nodes[keep].sizes);
            if smaller.into_iter().any(|(n, k)| n < k) && relation == "refused" {
                // Its disk was made anew in the middle of a growth: the person makes it once more, as large as the others.
                self.replace_disk(node);
                self.restart(node, 10 * MS);
            } else if self.nodes[node].role == Role::Primary {
                self.order(node, "demote", Command::Demote);
            } else if self.is_unrelated(node, keep) || self.operators.visits[node] > 4 {
                // Nothing in common, or nothing that time would bring together: one of them takes all of the other.
                self.order(node, "invalidate", Command::Invalidate);
                self.order(node, "connect", Command::Connect { peer: None });
            } else if matches!(relation, "refused" | "down") {
                self.order(node, "connect", Command::Connect { peer: None });
                self.order(
                    node,
                    "resolve",
                    Command::ResolveSplitBrain { discard_mine: true },
                );
            }
        }
    }

    fn is_unrelated(&self, node: usize, other: usize) -> bool {
        self.nodes[node].core.as_ref().is_some_and(|c| {
            let status = c.status(self.local(node));
            status
                .peers
                .iter()
                .any(|p| p.slot.0 as usize == other && p.handshake.starts_with("Row 17"))
        })
    }

    fn undo_full(&self, node: usize) -> bool {
        let full = |p: &holdfast_replicator_core::status::PeerStatus| {
            p.last_error.contains("undo area of the target is full")
        };
        self.nodes[node]
            .core
            .as_ref()
            .is_some_and(|c| c.status(self.local(node)).peers.iter().any(full))
    }

    pub(crate) fn relation(&self, node: usize, other: usize) -> &'static str {
        self.nodes[node]
            .core
            .as_ref()
            .and_then(|c| c.probe_peer(Slot(other as u8)))
            .map_or("down", |r| r.0)
    }

    fn at_rest(&self) -> bool {
        // An asynchronous copy has everything once nothing waits to be stable.
        let stable = (0..self.nodes.len()).all(|n| {
            self.nodes[n].core.as_ref().is_none_or(|c| {
                let status = c.status(self.local(n));
                status.role != Role::Primary
                    || status.stable_position >= status.position
                    || c.probe().window_entries == 0
            })
        });
        // A disk that is slow with its flushes is still at what became stable last.
        let idle = self.nodes.iter().all(|n| n.pending.is_empty());
        self.clients.open() == 0 && stable && idle && self.settled()
    }

    /// All copies were seen equal: what one had lost is back, and no old branch is left.
    fn see_equal(&mut self) {
        if !self.settled() {
            return;
        }
        for volume in 0..self.plan.volumes.len() {
            let view = self.nodes[0].view(volume);
            if self.nodes.iter().any(|n| n.view(volume) != view) {
                return;
            }
        }
        for node in 1..self.nodes.len() {
            self.oracle.seen_equal(0, node);
        }
        if !self.oracle.forked {
            return;
        }
        let Some(primary) = (0..self.nodes.len()).find(|n| self.nodes[*n].role == Role::Primary)
        else {
            return;
        };
        let Some(core) = &self.nodes[primary].core else {
            return;
        };
        let probe = core.probe();
        let view = self.nodes[primary].all();
        let set = probe.in_sync.union(probe.required);
        self.oracle.joined(self.now, primary, set, view);
    }

    /// One primary, and every other copy stands established with it and is whole.
    pub(crate) fn settled(&self) -> bool {
        let primaries = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].role == Role::Primary)
            .count();
        if primaries != 1 {
            return false;
        }
        let Some(primary) = (0..self.nodes.len()).find(|n| self.nodes[*n].role == Role::Primary)
        else {
            return false;
        };
        (0..self.nodes.len()).all(|n| {
            let Some(core) = &self.nodes[n].core else {
                return false;
            };
            let probe = core.probe();
            n == primary
                || (matches!(probe.state, CopyState::UpToDate | CopyState::Complete)
                    && (self.plan.pair_mode(n, primary) == Mode::Async
                        || probe.state == CopyState::UpToDate)
                    && self.relation(n, primary) == "established"
                    && self.relation(primary, n) == "established")
        })
    }

    pub(crate) fn order_answered(&mut self, node: usize, what: &'static str, result: &AdminResult) {
        if matches!(what, "invalidate" | "resolve") && result.is_ok() {
            self.nodes[node].restored = false;
        }
        if what == "grow"
            && let Ok(text) = result
            && text.contains("on every copy")
        {
            let volume = text.split(' ').nth(1).and_then(|v| v.parse().ok());
            if let Some(volume) = volume {
                self.grown(node, volume);
            }
        }
    }

    pub(crate) fn noticed(&mut self, node: usize, notice: &Notice) {
        if matches!(notice.kind, "established" | "resync-target") {
            self.nodes[node].restored = false;
        }
        if matches!(
            notice.kind,
            "established" | "resync-target" | "resync-source"
        ) && let Some(peer) = notice.peer
        {
            // Row 1: whatever the reason to meet, copies that call their volumes differently have nothing to exchange.
            if self.nodes[node].misnamed != self.nodes[peer.0 as usize].misnamed {
                self.fail(format!(
                    "row 1: node {node} takes node {} for its peer, which names other volumes",
                    peer.0
                ));
            }
            self.nodes[node].met = self.nodes[node].met.with(peer);
            self.nodes[node].met_at = self.now;
            self.nodes[node].look_now = true;
        }
        if notice.kind == "resync-target"
            && let Some(source) = notice.peer
        {
            self.oracle.filled_from(node, source.0 as usize);
        }
        if matches!(notice.kind, "resync-complete" | "link-down" | "attached") {
            self.nodes[node].look_now = true;
        }
        // (S may be told to a copy that turned to another primary at that moment: they meet again.)
        if notice.kind == "bad-frame"
            && !self.network.injected
            && !notice.text.contains("S was told out of turn")
            && !self.plan.refusals_pass
        {
            self.fail(format!(
                "D14: node {node} refuses a good frame: {}",
                notice.text
            ));
        }
        if notice.kind == "rolled-back" {
            self.nodes[node].rolled_back = true;
        }
        if notice.kind == "in-sync"
            && let Some(peer) = notice.peer
        {
            self.joined_s(node, peer.0 as usize);
        }
        self.ambushes(node, notice.kind);
    }

    pub(crate) fn describe_all(&self) -> String {
        let mut text = String::new();
        for (n, node) in self.nodes.iter().enumerate() {
            match &node.core {
                None => text += &format!("node {n}: no process\n"),
                Some(core) => {
                    let status = core.status(self.local(n));
                    text += &format!(
                        "node {n}: {:?} {:?} epoch {}/{} position {} stable {} S {:?} pending {:?} parked {:?} window {} unclean {}\n",
                        status.role,
                        status.state,
                        status.epoch.number,
                        status.epoch.owner,
                        status.position,
                        status.stable_position,
                        status.in_sync,
                        status.in_sync_pending,
                        status.parked_reason,
                        core.probe().window_entries,
                        status.unclean_start,
                    );
                    for peer in &status.peers {
                        let relation = core.probe_peer(peer.slot).map_or("", |p| p.0);
                        text += &format!(
                            "  to {}: {relation} {:?} dirty {} unacked {} primary {} | {} | {}\n",
                            peer.slot.0,
                            peer.state,
                            peer.dirty_bytes,
                            peer.unacknowledged_bytes,
                            peer.is_primary,
                            peer.handshake,
                            peer.last_error
                        );
                    }
                }
            }
        }
        text += &format!("open requests: {}\n", self.clients.open());
        text
    }
}
