//! Nodes come and go: their processes start, are killed, freeze, and go on; what happens after each batch of a core.

use crate::disk::SECTOR;
use crate::plan::MS;
use crate::rng::Rng;
use crate::world::*;
use holdfast_replicator_core::Core;
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::{CopyState, GenerationCause};

impl World {
    // --- processes ---

    pub(crate) fn peer_parameters(&self, n: usize) -> Vec<PeerParameters> {
        (0..self.plan.modes.len())
            .filter(|m| *m != n)
            .map(|m| PeerParameters {
                slot: Slot(m as u8),
                node: node_id(m),
                mode: self.plan.pair_mode(n, m),
            })
            .collect()
    }

    /// New metadata on a machine's disk.
    pub(crate) fn create_disk(&mut self, node: usize, zeroed: bool) {
        use holdfast_replicator_core::{CreateParameters, CreateVolume, create};
        use holdfast_wire_format::metadata::Mode;
        let modes = &self.plan.modes;
        let in_sync = (0..modes.len())
            .filter(|n| modes[*n] != Mode::Async)
            .fold(SlotSet::EMPTY, |set, n| set.with(Slot(n as u8)));
        let number = self.nodes[node].disk_number;
        let parameters = CreateParameters {
            service: SERVICE,
            service_name: "simulated".into(),
            slot: Slot(node as u8),
            node: node_id(node),
            mode: self.plan.modes[0],
            on_peer_loss: self.plan.policy,
            seed: Rng::stream(self.plan.seed, 1000 + node as u64 * 100 + number).next(),
            in_sync,
            peers: self.peer_parameters(node),
            volumes: self
                .largest()
                .iter()
                .enumerate()
                .map(|(i, sectors)| CreateVolume {
                    index: VolumeIndex(i as u16),
                    volume: Uuid(0xabc0 + i as u128),
                    name: format!("v{i}"),
                    data_size: sectors * SECTOR,
                    sector_size: SECTOR as u32,
                    grain_shift: Some(self.plan.grain_shift),
                    al_blocks: self.plan.al_blocks,
                    undo_size: self.plan.undo_size,
                    zeroed,
                })
                .collect(),
        };
        match create(&parameters) {
            Ok(images) => {
                for (place, mut bytes) in images {
                    self.shrink_extents(place.offset, &mut bytes);
                    self.nodes[node]
                        .disk
                        .put_meta(place.volume.0, place.offset, &bytes);
                }
            }
            Err(error) => self.fail(format!("create: {error}")),
        }
    }

    /// Volumes here are small: so are extents, or the activity log would always name everything.
    pub(crate) fn shrink_extents(&self, offset: u64, bytes: &mut [u8]) {
        use holdfast_wire_format::superblock;
        if offset > 4096 {
            return;
        }
        let Ok(block) = <&[u8; 4096]>::try_from(&*bytes) else {
            return;
        };
        if let Ok(mut sb) = superblock::decode(block) {
            sb.extent_shift = self.plan.extent_shift;
            if let Ok(image) = superblock::encode(&sb) {
                bytes.copy_from_slice(&image);
            }
        }
    }

    pub(crate) fn start(&mut self, node: usize, life: u64) {
        let n = &mut self.nodes[node];
        if n.life != life || n.core.is_some() || n.down {
            return;
        }
        if !n.pending.is_empty() {
            // The lock is free once nothing of the old process can land any more.
            return self.after(5 * MS, Happening::Start { node, life });
        }
        n.life += 1;
        n.incarnation += 1;
        n.role = Role::Secondary;
        n.admin.clear();
        n.bufs.clear();
        n.frozen = None;
        n.held = None;
        n.tick_at = u64::MAX;
        n.batch_open = false;
        n.suspended_by_operator = false;
        n.wants.fill(false);
        n.met = SlotSet::EMPTY;
        if let Some(rot) = self.nodes[node].rot.take() {
            self.rot(node, rot);
        }
        let mut tuning = self.plan.tuning;
        if self.plan.log_off_per_mille > 0 && self.rng.chance(self.plan.log_off_per_mille) {
            tuning.activity_log = false;
            self.coverage
                .count("faults", "started without an activity log");
        }
        let n = &self.nodes[node];
        let incarnation = (node as u64 + 1) << 32 | n.incarnation;
        let parameters = AttachParameters {
            volumes: self
                .plan
                .volumes
                .iter()
                .enumerate()
                .map(|(i, sectors)| AttachVolume {
                    index: VolumeIndex(i as u16),
                    name: {
                        let last = self.plan.volumes.len() - 1;
                        format!("volume-{}", if n.misnamed { last - i } else { i })
                    },
                    device_data_size: sectors * SECTOR,
                    sector_size: SECTOR as u32,
                    discard_zeroes: true,
                })
                .collect(),
            peers: self.peer_parameters(node),
            slot: Slot(node as u8),
            node: node_id(node),
            service: SERVICE,
            incarnation: Incarnation(incarnation),
            seed: Rng::stream(self.plan.seed, incarnation).next(),
            tuning,
            store: if self.plan.register {
                StoreKind::Cluster
            } else {
                StoreKind::Own
            },
        };
        let now = self.local(node);
        let mut out = Vec::new();
        match Core::attach(parameters, &mut &self.nodes[node].disk, now, &mut out) {
            Ok(core) => {
                self.log(|| format!("node {node}: starts"));
                let volumes = core.status(now).volumes;
                self.nodes[node].sizes = volumes.iter().map(|v| v.size / SECTOR).collect();
                self.nodes[node].core = Some(core);
                self.actions(node, out);
                self.after_core(node);
            }
            Err(error) => self.fail(format!("node {node} cannot attach: {error}")),
        }
    }

    /// The process ends, without a word.
    pub(crate) fn end_process(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.life += 1;
        n.core = None;
        n.bufs.clear();
        n.frozen = None;
        n.held = None;
        n.admin.clear();
        n.role = Role::Secondary;
        self.clients_lost(node);
        self.connections_of_dead(node);
    }

    pub(crate) fn event(&mut self, node: usize, event: Event) {
        let now = self.local(node);
        let n = &mut self.nodes[node];
        if let Some(backlog) = &mut n.frozen {
            return backlog.push(event);
        }
        if let Some(backlog) = &mut n.held
            && !matches!(event, Event::DiskDone { .. } | Event::MetaDone { .. })
        {
            return backlog.push(event);
        }
        let Some(core) = &mut n.core else { return };
        let probe = core.probe();
        if probe.role == Role::Secondary {
            n.secondary_state = (probe.state, probe.zeroed);
            n.rolled_back = false;
        }
        let mut out = Vec::new();
        core.handle(now, event, &mut out);
        self.actions(node, out);
        if self.nodes[node].batch_open {
            return;
        }
        if self.rng.chance(200) {
            // More events may come before the batch ends.
            self.nodes[node].batch_open = true;
            let life = self.nodes[node].life;
            let delay = self.rng.below(30_000);
            self.after(delay, Happening::EndBatch { node, life });
        } else {
            self.end_batch(node);
        }
    }

    pub(crate) fn end_batch(&mut self, node: usize) {
        let now = self.local(node);
        let n = &mut self.nodes[node];
        n.batch_open = false;
        let Some(core) = &mut n.core else { return };
        let mut out = Vec::new();
        core.end_batch(now, &mut out);
        self.actions(node, out);
        self.after_core(node);
    }

    /// What is looked at after each batch: the next deadline, states for coverage, invariants.
    pub(crate) fn after_core(&mut self, node: usize) {
        let Some(core) = &self.nodes[node].core else {
            return;
        };
        let probe = core.probe();
        if let Some(deadline) = core.deadline() {
            let local = self.local(node);
            let rate = 1_000_000 + self.nodes[node].rate_ppm;
            let wait =
                i128::from(deadline.0.saturating_sub(local.0)) * 1_000_000 / i128::from(rate);
            let at = self.now + wait as u64 + 1;
            if at < self.nodes[node].tick_at {
                self.nodes[node].tick_at = at;
                let life = self.nodes[node].life;
                self.at(at, Happening::Tick { node, life });
            }
        }
        if probe.role == Role::Detached && self.nodes[node].core.is_some() {
            self.log(|| format!("node {node}: detached, process ends"));
            if probe.failed {
                // Nothing of this was in order: what its disk still had to do nobody knows.
                self.oracle.killed(self.now, node);
            }
            self.end_process(node);
            return;
        }
        if probe.failed {
            self.nodes[node].broken_disk = true;
            self.nodes[node].failed_once = true;
        }
        if probe.role == Role::Primary {
            self.oracle
                .held_by(node, probe.in_sync.union(probe.required));
        }
        // (An old image says so, too, of what it held once.)
        if matches!(probe.state, CopyState::UpToDate | CopyState::Complete)
            && probe.role == Role::Secondary
            && !self.nodes[node].restored
        {
            self.oracle.filled_again(node);
        }
        let before = self.nodes[node].last_state.0;
        // (What a failed disk did not take down never was: it may have been blank all the time.)
        if probe.state == CopyState::Blank && before != 255 && !probe.zeroed {
            if !self.nodes[node].may_be_blank && !self.nodes[node].failed_once {
                return self.fail(format!(
                    "node {node} gave up its data and nobody told it to"
                ));
            }
            if before != CopyState::Blank as u8 {
                self.oracle.given_up(self.now, node, self.mixtures());
            }
        } else if probe.state != CopyState::Blank
            && self.nodes[node].admin.is_empty()
            && self.nodes[node].may_be_blank
        {
            // A state that is not on the disk yet is gone with the power.
            let durable = self.nodes[node].disk.superblock();
            self.nodes[node].may_be_blank =
                durable.is_none_or(|(_, sb)| sb.state == CopyState::Blank);
        }
        let state = (probe.state as u8, probe.role as u8);
        if state != self.nodes[node].last_state {
            self.coverage
                .transition(self.nodes[node].last_state, &probe);
            self.nodes[node].last_state = state;
        }
        self.look(node);
    }

    pub(crate) fn order(&mut self, node: usize, what: &'static str, command: Command) {
        if self.nodes[node].core.is_none() {
            return;
        }
        let admin = self.next_admin;
        self.next_admin += 1;
        self.nodes[node].admin.insert(admin, what);
        let admin = AdminId(admin);
        self.log(|| format!("operator: {what} at node {node}"));
        if matches!(
            command,
            Command::Invalidate | Command::ResolveSplitBrain { .. }
        ) {
            self.nodes[node].may_be_blank = true;
        }
        self.event(node, Event::Admin { admin, command });
    }

    pub(crate) fn role_changed(&mut self, node: usize, role: Role, epoch: Epoch) {
        self.nodes[node].role = role;
        self.log(|| format!("node {node}: role {role:?} epoch {}", epoch.number));
        if role != Role::Primary {
            return;
        }
        let Some(core) = &self.nodes[node].core else {
            return;
        };
        let probe = core.probe();
        let view = self.nodes[node].all();
        // A copy may have been forced and have ended before it served: then it goes on from what it was forced to.
        let before = self.forced_seen.len();
        let durable = self.nodes[node].disk.superblock();
        for generation in durable.iter().flat_map(|(_, sb)| &sb.generations) {
            if generation.cause == GenerationCause::Force {
                self.forced_seen.insert(generation.id);
            }
        }
        let forced = probe.forced || self.nodes[node].restored || self.forced_seen.len() > before;
        let result = self.may_serve(node, probe.forced);
        self.check(result);
        let result = self.large_enough(node, forced);
        self.check(result);
        let result =
            self.oracle
                .promoted(self.now, node, forced, epoch.number, probe.in_sync, view);
        self.coverage
            .count("promotions", if forced { "forced" } else { "unforced" });
        self.check(result);
    }

    pub(crate) fn kill(&mut self, node: usize) {
        self.log(|| format!("node {node}: SIGKILL"));
        if !self.waits_for_disk(node, u64::MAX) {
            // What it had acknowledged from memory is gone.
            self.loses_memory(node);
        } else {
            self.oracle.killed(self.now, node);
        }
        self.end_process(node);
    }

    pub(crate) fn restart(&mut self, node: usize, delay: u64) {
        self.nodes[node].down = false;
        let life = self.nodes[node].life;
        self.after(delay, Happening::Start { node, life });
    }

    pub(crate) fn freeze(&mut self, node: usize) {
        if self.nodes[node].core.is_some() && self.nodes[node].frozen.is_none() {
            self.log(|| format!("node {node}: frozen"));
            self.nodes[node].frozen = Some(Vec::new());
        }
    }

    pub(crate) fn thaw(&mut self, node: usize) {
        if let Some(backlog) = self.nodes[node].frozen.take() {
            self.log(|| format!("node {node}: goes on with {} events", backlog.len()));
            let life = self.nodes[node].life;
            for event in backlog {
                if self.nodes[node].life == life {
                    self.event(node, event);
                }
            }
            if self.nodes[node].life == life {
                self.nodes[node].tick_at = u64::MAX;
                self.event(node, Event::Tick);
                self.end_batch(node);
            }
        }
    }
}
