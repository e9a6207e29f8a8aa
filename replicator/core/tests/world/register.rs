//! The cluster's register in the small world: linearizable, its answers late, lost, or about something that is applied later.

use super::*;
use holdfast_replicator_core::handshake::StoreRecord;
use holdfast_wire_format::superblock;

#[derive(Default)]
pub struct Register {
    pub record: Option<StoreRecord>,
    /// Asked for, not applied, and given up by who asked.
    pub late: Vec<(StoreVersion, StoreRecord)>,
    /// How often an outcome gets lost, of 100.
    pub lost: u64,
    /// Nodes that can't reach it.
    pub cut: Vec<usize>,
    /// It can be read, and nothing is changed.
    pub read_only: bool,
    /// Every record that was ever committed.
    pub history: Vec<StoreRecord>,
}

impl Register {
    fn swap(&mut self, expected: StoreVersion, record: &StoreRecord) -> bool {
        let Some(now) = &self.record else {
            return false;
        };
        if now.epoch != expected.epoch || now.version != expected.version {
            return false;
        }
        assert_eq!(record.version, now.version + 1);
        assert!(record.epoch.number >= now.epoch.number);
        assert!(!record.in_sync.is_empty(), "S is never empty");
        self.history.push(record.clone());
        self.record = Some(record.clone());
        true
    }
}

impl World {
    /// A world whose copies keep their record in a register. It begins with what was created.
    pub fn with_register(
        seed: u64,
        modes: &[Mode],
        policy: OnPeerLoss,
        volumes: &[u64],
        lost: u64,
    ) -> World {
        let mut world = World::new(seed, modes, policy, volumes, true);
        let block = &world.nodes[0].disk.meta[&(0, 0)];
        let zeroes = [0; 4096];
        let block: &[u8; 4096] = block.as_slice().try_into().unwrap();
        let created = superblock::choose(block, &zeroes).unwrap().0;
        let record = StoreRecord {
            epoch: Epoch::NONE,
            generation: created.generations.last().unwrap().id,
            in_sync: created.in_sync,
            version: 1,
            copies: Vec::new(),
        };
        world.register = Some(Register {
            record: Some(record),
            lost,
            ..Register::default()
        });
        world
    }

    pub fn record(&self) -> &StoreRecord {
        let register = self.register.as_ref().expect("a world with a register");
        register.record.as_ref().expect("a record")
    }

    pub(super) fn finish_store(&mut self, n: usize, action: &Action) {
        let rng = &mut self.rng;
        let register = self.register.as_mut().expect("asked for a register");
        let cut = register.cut.contains(&n);
        let lost = rng.chance(register.lost);
        let event = match action {
            Action::StoreRead { id } => Event::StoreRecord {
                id: *id,
                record: register.record.clone().filter(|_| !cut && !lost),
            },
            Action::StoreSwap {
                id,
                expected,
                record,
            } => {
                let outcome = if cut || register.read_only {
                    SwapOutcome::Unknown
                } else if lost {
                    // Applied, applied later, or never: nobody can say.
                    match rng.below(3) {
                        0 => {
                            register.swap(*expected, record);
                        }
                        1 => register.late.push((*expected, record.clone())),
                        _ => {}
                    }
                    SwapOutcome::Unknown
                } else if register.swap(*expected, record) {
                    SwapOutcome::Swapped
                } else {
                    SwapOutcome::Refused(register.record.clone().unwrap())
                };
                Event::StoreSwapped { id: *id, outcome }
            }
            _ => unreachable!(),
        };
        self.event(n, event);
    }

    /// Who asked is gone: it may be applied, later even, or not.
    pub(super) fn swap_without_asker(&mut self, action: &Action) {
        let Action::StoreSwap {
            expected, record, ..
        } = action
        else {
            return;
        };
        let register = self.register.as_mut().expect("asked for a register");
        match self.rng.below(3) {
            0 => {
                register.swap(*expected, record);
            }
            1 => register.late.push((*expected, record.clone())),
            _ => {}
        }
    }

    pub(super) fn late_swap(&mut self, at: usize) {
        let register = self.register.as_mut().expect("a register");
        let (expected, record) = register.late.remove(at);
        register.swap(expected, &record);
    }
}
