//! What a disk may hold after a power cut, by its contract: everything that was flushed, or written with FUA and
//! answered; of what else was written or is in flight, any subset, each sector whole.

use holdfast_disk::record::Request;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub const SECTOR: usize = 512;
const ZEROES: [u8; SECTOR] = [0; SECTOR];

/// A write that a crash may lose.
pub struct Pending {
    pub id: u64,
    pub first: u64,
    pub sectors: u64,
    /// None: zeroes.
    bytes: Option<std::sync::Arc<[u8]>>,
    durable: bool,
    pub ended: bool,
}

impl Pending {
    pub fn sector(&self, number: u64) -> &[u8] {
        let at = (number - self.first) as usize * SECTOR;
        self.bytes
            .as_ref()
            .map_or(&ZEROES[..], |bytes| &bytes[at..at + SECTOR])
    }
}

/// Which of the pending writes a crash left: by their place in `Disk::pending`, and of one of them only some sectors.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub kept: Vec<bool>,
    pub torn: Option<(usize, u64)>,
}

/// The sectors in which an image differs from what is durable, each with the write it is from.
pub type Overlay = BTreeMap<u64, (u64, Rc<Pending>)>;

pub struct Disk {
    pub path: PathBuf,
    pub durable: Vec<u8>,
    /// The write that each sector of `durable` is from.
    from: HashMap<u64, u64>,
    pub pending: Vec<Rc<Pending>>,
    flushes: HashMap<u64, Vec<u64>>,
    /// Sectors that became durable since someone last looked.
    pub changed: Vec<u64>,
    /// What lies from here on is the metadata.
    pub metadata_from: u64,
    metadata_hash: u64,
}

fn hash(sector: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, sector)
}

impl Disk {
    pub fn new(path: PathBuf, durable: Vec<u8>, metadata_from: u64) -> Disk {
        Disk {
            path,
            durable,
            from: HashMap::new(),
            pending: Vec::new(),
            flushes: HashMap::new(),
            changed: Vec::new(),
            metadata_from,
            metadata_hash: 0,
        }
    }

    pub fn durable_sector(&self, sector: u64) -> &[u8] {
        let at = sector as usize * SECTOR;
        &self.durable[at..at + SECTOR]
    }

    fn is_metadata(&self, sector: u64) -> bool {
        sector * SECTOR as u64 >= self.metadata_from
    }

    pub fn began(&mut self, id: u64, what: &Request) {
        let (offset, len, bytes, durable) = match what {
            Request::Flush => {
                let ended = self.pending.iter().filter(|write| write.ended);
                self.flushes
                    .insert(id, ended.map(|write| write.id).collect());
                return;
            }
            Request::Write {
                offset,
                bytes,
                durable,
            } => (*offset, bytes.len() as u64, Some(bytes.clone()), *durable),
            Request::Zero { offset, len } => (*offset, *len, None, false),
        };
        self.pending.push(Rc::new(Pending {
            id,
            first: offset / SECTOR as u64,
            sectors: len / SECTOR as u64,
            bytes,
            durable,
            ended: false,
        }));
    }

    /// True if more is durable than before.
    pub fn ended(&mut self, id: u64, ok: bool) -> bool {
        assert!(ok, "the real disk failed");
        if let Some(covered) = self.flushes.remove(&id) {
            return self.make_durable(&covered);
        }
        let at = self
            .pending
            .iter()
            .position(|write| write.id == id)
            .expect("it began");
        if self.pending[at].durable {
            return self.make_durable(&[id]);
        }
        let old = &self.pending[at];
        self.pending[at] = Rc::new(Pending {
            id: old.id,
            first: old.first,
            sectors: old.sectors,
            bytes: old.bytes.clone(),
            durable: false,
            ended: true,
        });
        false
    }

    fn make_durable(&mut self, ids: &[u64]) -> bool {
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|write| ids.contains(&write.id));
        self.pending = later;
        for write in &now {
            for sector in write.first..write.first + write.sectors {
                if self.from.get(&sector).is_some_and(|from| *from > write.id) {
                    continue;
                }
                self.from.insert(sector, write.id);
                let at = sector as usize * SECTOR;
                if self.is_metadata(sector) {
                    self.metadata_hash ^= hash(sector, &self.durable[at..at + SECTOR])
                        ^ hash(sector, write.sector(sector));
                }
                self.durable[at..at + SECTOR].copy_from_slice(write.sector(sector));
                self.changed.push(sector);
            }
        }
        // What was overwritten durably can't come back.
        self.pending.retain(|write| {
            !write.ended
                || (write.first..write.first + write.sectors)
                    .any(|sector| self.from.get(&sector).is_none_or(|from| *from < write.id))
        });
        !now.is_empty()
    }

    pub fn overlay(&self, choice: &Choice) -> Overlay {
        let mut overlay = Overlay::new();
        for (at, write) in self.pending.iter().enumerate() {
            if !choice.kept[at] {
                continue;
            }
            for sector in write.first..write.first + write.sectors {
                let torn_off = choice.torn.is_some_and(|(torn, mask)| {
                    torn == at && mask >> ((sector - write.first) % 64) & 1 == 0
                });
                if !torn_off && self.from.get(&sector).is_none_or(|from| *from < write.id) {
                    overlay.insert(sector, (write.id, write.clone()));
                }
            }
        }
        overlay
    }

    /// Equal for images with equal metadata.
    pub fn metadata_key(&self, overlay: &Overlay) -> u64 {
        let first = self.metadata_from / SECTOR as u64;
        overlay
            .range(first..)
            .fold(self.metadata_hash, |key, (sector, (_, write))| {
                key ^ hash(*sector, self.durable_sector(*sector))
                    ^ hash(*sector, write.sector(*sector))
            })
    }

    /// None and all of the pending writes, the newest alone and all but that; then every subset of up to `bound` of them; of more each single omission, each pair of
    /// omissions among the newest `bound`, each single write alone, the prefixes, and seeded samples. Then `tears` torn ways of each
    /// write of more than a sector among the newest `bound`: with all others, and with none. Of all that at most `most`, the first
    /// four always, the rest thinned out by the seed.
    pub fn choices(&self, bound: usize, tears: usize, most: usize, seed: u64) -> Vec<Choice> {
        let count = self.pending.len();
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut choices = vec![self.nothing()];
        if count > 0 {
            choices.push(self.everything());
        }
        if count > 2 {
            // What overtook all before it.
            for newest in [true, false] {
                let kept = (1..=count).map(|at| (at == count) == newest).collect();
                choices.push(Choice { kept, torn: None });
            }
        }
        let always = choices.len();
        let mut whole = |kept: Vec<bool>| choices.push(Choice { kept, torn: None });
        if count <= bound {
            for subset in 1..(1u64 << count).saturating_sub(1) {
                whole((0..count).map(|at| subset >> at & 1 == 1).collect());
            }
        } else {
            for one in 0..count {
                whole((0..count).map(|at| at != one).collect());
                whole((0..count).map(|at| at == one).collect());
                whole((0..count).map(|at| at < one).collect());
            }
            for one in count - bound..count {
                for other in one + 1..count {
                    whole((0..count).map(|at| at != one && at != other).collect());
                }
            }
            for _ in 0..4 * bound {
                whole((0..count).map(|_| next() & 1 == 1).collect());
            }
        }
        for at in count.saturating_sub(bound)..count {
            let sectors = self.pending[at].sectors.min(64);
            if sectors < 2 {
                continue;
            }
            for tear in 0..tears as u64 {
                // First the beginnings and the ends, as a disk tears; then any.
                let cut = 1 + (tear / 2) % (sectors - 1);
                let all = u64::MAX >> (64 - sectors);
                let mask = match tear {
                    0 | 2 => (1 << cut) - 1,
                    1 | 3 => all & !((1 << cut) - 1),
                    _ => next() & all,
                };
                for others in [true, false] {
                    let kept = (0..count).map(|place| others || place == at).collect();
                    choices.push(Choice {
                        kept,
                        torn: Some((at, mask)),
                    });
                }
            }
        }
        while choices.len() > most.max(always) {
            let at = always + next() as usize % (choices.len() - always);
            choices.swap_remove(at);
        }
        choices
    }

    pub fn nothing(&self) -> Choice {
        Choice {
            kept: vec![false; self.pending.len()],
            torn: None,
        }
    }

    pub fn everything(&self) -> Choice {
        Choice {
            kept: vec![true; self.pending.len()],
            torn: None,
        }
    }

    /// As a process that is killed leaves it, where the kernel had time.
    pub fn ended_alone(&self) -> Choice {
        Choice {
            kept: self.pending.iter().map(|write| write.ended).collect(),
            torn: None,
        }
    }
}
