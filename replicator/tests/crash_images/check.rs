//! Goes through a recording, rebuilds what a power cut may leave at each moment, opens it and says what does not hold.

use crate::client::{Mark, Marks, Phase};
use crate::disk::{Choice, Disk, Overlay, SECTOR};
use crate::recover::{Machine, Scratch};
use crate::support::{Settings, TestNode};
use holdfast_disk::record::{Recorded, Request};
use holdfast_replicator::config::Config;
use holdfast_replicator_core::probe::Probe;
use holdfast_wire_format::ids::{GenerationId, Slot, Uuid, VolumeIndex};
use holdfast_wire_format::locator::Locator;
use holdfast_wire_format::metadata::CopyState;
use holdfast_wire_format::superblock;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use xxhash_rust::xxh3::xxh3_64;

/// How much of what a power cut may leave is tried at each moment.
#[derive(Clone, Copy)]
struct Bound {
    /// Un-flushed writes of which every subset is tried.
    subsets: usize,
    /// Ways in which each write of more than a sector is torn.
    tears: usize,
    /// Images; more are thinned out by a seed.
    images: usize,
    /// Of them, those that are rolled back.
    rollbacks: u64,
}

impl Bound {
    /// `HOLDFAST_CRASH_IMAGES=N`: every subset of N writes, each torn in N ways, and nothing thinned out.
    fn chosen() -> Bound {
        match std::env::var("HOLDFAST_CRASH_IMAGES") {
            Err(_) => Bound {
                subsets: 4,
                tears: 2,
                images: 20,
                rollbacks: 3,
            },
            Ok(number) => {
                let number = number.parse().expect("HOLDFAST_CRASH_IMAGES is a number");
                Bound {
                    subsets: number,
                    tears: number,
                    images: usize::MAX,
                    rollbacks: u64::MAX,
                }
            }
        }
    }
}

/// What opening an image came to.
struct Opened {
    /// By place in `Check::sectors`: the copy knows that it may differ from the other one.
    marks: Vec<bool>,
    /// The superblock that counts.
    superblock: u64,
    probe: Probe,
    undo_intact: Option<bool>,
    size: u64,
}

/// What the other copy's data and its opening may be at the same moment.
type Opposite = (Vec<u64>, Rc<Result<Opened, String>>);

struct Node {
    name: &'static str,
    disk: Disk,
    scratch: Scratch,
    config: Config,
    id: Uuid,
    hint: u64,
    slot: Slot,
    peer: Slot,
    opened: HashMap<u64, Rc<Result<Opened, String>>>,
    rolled_back: HashSet<Vec<u64>>,
    /// First word of each of `Check::sectors`, durable; and before all this.
    data: Vec<u64>,
    old: Vec<u64>,
    /// Superblocks that were there or were written.
    superblocks: HashSet<u64>,
    /// The generation in which it had that.
    was_in: Option<GenerationId>,
}

/// A copy's files before the recording began.
pub struct Before {
    pub config: Config,
    pub name: &'static str,
    pub slots: (u8, u8),
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    /// The length at which a shorter backing had its locator.
    pub hint: u64,
    /// Where the metadata is, also if it is only made later.
    pub metadata_from: u64,
    pub node: Uuid,
}

/// The area and the node's id, from a backing with metadata.
fn area(bytes: &[u8]) -> (u64, Uuid) {
    let size = bytes.len() as u64;
    let at = Locator::offset(size).unwrap() as usize;
    let locator = Locator::decode(bytes[at..at + 4096].try_into().unwrap(), size).unwrap();
    let at = locator.area_offset as usize;
    let slots: [&[u8; 4096]; 2] =
        [at, at + 4096].map(|at| bytes[at..at + 4096].try_into().unwrap());
    let (sb, _) = superblock::choose(slots[0], slots[1]).unwrap();
    (locator.area_offset, sb.node)
}

impl Before {
    /// As the node's backing is now.
    pub fn of(node: &TestNode, settings: &Settings) -> Before {
        Before::with(node, settings, std::fs::read(node.backing()).unwrap())
    }

    /// As these bytes are; where the metadata is, the node's backing says now.
    pub fn with(node: &TestNode, settings: &Settings, bytes: Vec<u8>) -> Before {
        let (metadata_from, id) = area(&std::fs::read(node.backing()).unwrap());
        Before {
            config: crate::workloads::config(node, settings, None),
            name: node.name,
            slots: (node.slot, 1 - node.slot),
            path: node.backing(),
            hint: bytes.len() as u64,
            bytes,
            metadata_from,
            node: id,
        }
    }
}

/// What must hold beyond the rules that always do.
#[derive(Default)]
pub struct Rules {
    /// An image of this node in the middle of a resync leads back to what the node had before.
    pub goes_back: Option<usize>,
    /// An image may be refused until this phase.
    pub metadata_from: Option<Phase>,
    /// The data is never changed.
    pub data_stays: bool,
    /// An image that says so reads zero.
    pub zeroed: bool,
    /// Sizes that an image may have; from the first to the last of them it reads zero, or its locator says what is still to be
    /// zeroed.
    pub sizes: Vec<u64>,
}

impl Node {
    /// What the application sees between the old and the new end of a volume that has grown.
    fn grown(&self, overlay: &Overlay, from: u64, to: u64) -> Result<(), String> {
        let size = self.disk.durable.len() as u64;
        let machine = Machine::new(&self.disk, overlay, 0);
        let at = Locator::offset(size).expect("room for one");
        let locator = Locator::decode(&machine.block(at), size);
        if locator.is_ok_and(|locator| locator.zero == (from, to)) {
            return Ok(());
        }
        let sectors = from / SECTOR as u64..to / SECTOR as u64;
        // The old metadata began where the data ended.
        let looked_at = sectors.clone().take(256).chain(sectors.step_by(61));
        match looked_at
            .into_iter()
            .find(|s| machine.sector(*s).iter().any(|byte| *byte != 0))
        {
            Some(sector) => Err(format!(
                "D16: sector {sector} of what was added has old metadata"
            )),
            None => Ok(()),
        }
    }
}

#[derive(Default)]
struct Model {
    /// By block: the stamps in the order in which they were written, and from where on one of them must be there.
    blocks: HashMap<u64, (Vec<u64>, usize)>,
    written: HashMap<usize, (u64, usize)>,
    flushes: HashMap<usize, Vec<(u64, usize)>>,
    acked: Vec<(u64, usize)>,
    phases: Vec<Phase>,
    /// By write: phases when it was issued.
    issued: HashMap<usize, usize>,
    /// A node completed a write while the other one was away.
    alone: bool,
}

pub struct Check {
    rules: Rules,
    bound: Bound,
    nodes: Vec<Node>,
    /// Sectors of data that are written at any time, on any copy.
    sectors: Vec<u64>,
    place: BTreeMap<u64, usize>,
    model: Model,
    images: u64,
    openings: u64,
    rollbacks: u64,
    /// At this moment.
    rollbacks_here: u64,
    moments: u64,
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

impl Check {
    pub fn new(before: Vec<Before>, rules: Rules, events: &[Recorded], scratch: &Path) -> Check {
        let mut place = BTreeMap::new();
        for event in events {
            let Recorded::Began { path, what, .. } = event else {
                continue;
            };
            let Some(node) = before.iter().find(|node| node.path == **path) else {
                continue;
            };
            let (offset, len) = match what {
                Request::Write { offset, bytes, .. } => (*offset, bytes.len() as u64),
                Request::Zero { offset, len } => (*offset, *len),
                Request::Flush => continue,
            };
            for sector in offset / SECTOR as u64..(offset + len) / SECTOR as u64 {
                if sector * (SECTOR as u64) < node.metadata_from {
                    place.insert(sector, 0);
                }
            }
        }
        let mut superblocks = HashSet::new();
        let mut superblock = |bytes: &[u8]| {
            if bytes.len() == superblock::SUPERBLOCK_LENGTH && bytes.starts_with(b"HOLDFAST") {
                superblocks.insert(xxh3_64(bytes));
            }
        };
        for event in events {
            if let Recorded::Began {
                what: Request::Write { bytes, .. },
                ..
            } = event
            {
                superblock(bytes);
            }
        }
        for node in &before {
            let area = &node.bytes[node.metadata_from as usize..];
            area.chunks(superblock::SUPERBLOCK_LENGTH)
                .take(2)
                .for_each(&mut superblock);
        }
        for (number, at) in place.values_mut().enumerate() {
            *at = number;
        }
        let sectors: Vec<u64> = place.keys().copied().collect();
        let nodes = before
            .into_iter()
            .map(|before| {
                let disk = Disk::new(before.path, before.bytes, before.metadata_from);
                let data: Vec<u64> = sectors
                    .iter()
                    .map(|sector| word(disk.durable_sector(*sector)))
                    .collect();
                Node {
                    name: before.name,
                    scratch: Scratch::new(&disk, scratch, before.name),
                    disk,
                    config: before.config,
                    id: before.node,
                    hint: before.hint,
                    slot: Slot(before.slots.0),
                    peer: Slot(before.slots.1),
                    opened: HashMap::new(),
                    rolled_back: HashSet::new(),
                    old: data.clone(),
                    was_in: None,
                    superblocks: superblocks.clone(),
                    data,
                }
            })
            .collect();
        Check {
            rules,
            bound: Bound::chosen(),
            nodes,
            sectors,
            place,
            model: Model::default(),
            images: 0,
            openings: 0,
            rollbacks: 0,
            rollbacks_here: 0,
            moments: 0,
        }
    }

    /// Goes through all of it.
    ///
    /// # Errors
    /// The first image that breaks a promise.
    pub fn run(mut self, what: &str, events: &[Recorded], marks: &Marks) -> Result<(), String> {
        let mut of_request = HashMap::new();
        for (number, event) in events.iter().enumerate() {
            let mut look = [false; 2];
            match event {
                Recorded::Began { id, path, what } => {
                    let Some(node) = self.nodes.iter().position(|n| n.disk.path == **path) else {
                        continue;
                    };
                    of_request.insert(*id, node);
                    self.nodes[node].disk.began(*id, what);
                    look[node] = !matches!(what, Request::Flush);
                }
                Recorded::Ended { id, ok } => {
                    let Some(node) = of_request.remove(id) else {
                        continue;
                    };
                    look[node] = self.nodes[node].disk.ended(*id, *ok);
                    if look[node] {
                        let node = &mut self.nodes[node];
                        for sector in &node.disk.changed {
                            if let Some(at) = self.place.get(sector) {
                                node.data[*at] = word(node.disk.durable_sector(*sector));
                            }
                        }
                    }
                }
                Recorded::Mark(mark) => {
                    if self.model.mark(&marks.get(*mark as usize)) {
                        look = [true; 2];
                    }
                }
            }
            for (node, look) in look.into_iter().enumerate().take(self.nodes.len()) {
                if look {
                    self.moments += 1;
                    self.look(node, &format!("{what}, moment {number}"))?;
                }
            }
        }
        println!(
            "{what}: {} images at {} moments ({} different metadata opened, {} rolled back)",
            self.images, self.moments, self.openings, self.rollbacks
        );
        match self.images > 50 {
            true => Ok(()),
            false => Err(format!("{what}: only {} images", self.images)),
        }
    }

    fn look(&mut self, node: usize, when: &str) -> Result<(), String> {
        let other = (self.nodes.len() > 1).then_some(1 - node);
        let mut opposite = Vec::new();
        if let Some(other) = other {
            let disk = &self.nodes[other].disk;
            for choice in [disk.nothing(), disk.ended_alone(), disk.everything()] {
                let overlay = self.nodes[other].disk.overlay(&choice);
                let data = self.data(other, &overlay);
                let opened = self.open(other, &overlay);
                opposite.push((data, opened));
            }
        }
        self.rollbacks_here = 0;
        let bound = self.bound;
        let disk = &self.nodes[node].disk;
        let choices = disk.choices(bound.subsets, bound.tears, bound.images, self.moments);
        for choice in choices {
            self.images += 1;
            let overlay = self.nodes[node].disk.overlay(&choice);
            let opened = self.open(node, &overlay);
            self.judge(node, &overlay, &opened, &opposite)
                .map_err(|problem| self.tell(node, &choice, when, &problem))?;
        }
        Ok(())
    }

    fn tell(&self, node: usize, choice: &Choice, when: &str, problem: &str) -> String {
        let disk = &self.nodes[node].disk;
        let pending: Vec<String> = disk
            .pending
            .iter()
            .zip(&choice.kept)
            .map(|(write, kept)| {
                format!(
                    "  {} at byte {}, {} sectors, {}",
                    if *kept { "there" } else { "lost " },
                    write.first * SECTOR as u64,
                    write.sectors,
                    if write.ended { "answered" } else { "in flight" }
                )
            })
            .collect();
        format!(
            "{when}: {}: {problem}\nmetadata from {}, torn: {:?}; not flushed:\n{}",
            self.nodes[node].name,
            disk.metadata_from,
            choice.torn,
            pending.join("\n")
        )
    }

    fn data(&self, node: usize, overlay: &Overlay) -> Vec<u64> {
        let node = &self.nodes[node];
        let mut data = node.data.clone();
        for (sector, (_, write)) in overlay {
            if let Some(at) = self.place.get(sector) {
                data[*at] = word(write.sector(*sector));
            }
        }
        data
    }

    fn open(&mut self, node: usize, overlay: &Overlay) -> Rc<Result<Opened, String>> {
        let sectors = &self.sectors;
        let node = &mut self.nodes[node];
        let key = node.disk.metadata_key(overlay);
        if let Some(known) = node.opened.get(&key) {
            return known.clone();
        }
        self.openings += 1;
        let opened = node
            .scratch
            .open(&mut node.disk, overlay, &node.config, node.id, node.hint)
            .map(|(core, _, base)| {
                let machine = Machine::new(&node.disk, overlay, 0);
                let slots: [[u8; superblock::SUPERBLOCK_LENGTH]; 2] =
                    [0, 1].map(|slot| machine.block(base + slot * 4096));
                let (_, at) = superblock::choose(&slots[0], &slots[1]).expect("it was opened");
                let status = core.status(holdfast_replicator_core::api::Time(0));
                let size = status.volumes[0].size;
                let marks = sectors
                    .iter()
                    .map(|sector| {
                        let at = sector * SECTOR as u64;
                        at < size
                            && (core.may_differ(node.peer, VolumeIndex(0), at, SECTOR as u64)
                                || core.undo_names(VolumeIndex(0), at, SECTOR as u64))
                    })
                    .collect();
                Opened {
                    marks,
                    superblock: xxh3_64(&slots[at]),
                    probe: core.probe(),
                    undo_intact: status.undo.map(|undo| undo.intact),
                    size,
                }
            });
        let opened = Rc::new(opened);
        node.opened.insert(key, opened.clone());
        opened
    }

    fn judge(
        &mut self,
        node: usize,
        overlay: &Overlay,
        opened: &Rc<Result<Opened, String>>,
        opposite: &[Opposite],
    ) -> Result<(), String> {
        let data = self.data(node, overlay);
        if self.rules.data_stays && data != self.nodes[node].old {
            return Err("data was changed".into());
        }
        // D16: one of the two slots is there, and the locator.
        let found = match &**opened {
            Ok(found) => found,
            Err(refused) => {
                let may = self.rules.metadata_from;
                return match may.is_some_and(|phase| !self.model.phases.contains(&phase)) {
                    true => Ok(()),
                    false => Err(format!("D16: refused: {refused}")),
                };
            }
        };
        if !self.nodes[node].superblocks.contains(&found.superblock) {
            return Err("D16: the superblock that counts was never written".into());
        }
        if self.rules.zeroed && found.probe.zeroed && data.iter().any(|word| *word != 0) {
            return Err("D7: a copy that says that it reads zero does not".into());
        }
        if !self.rules.sizes.is_empty() && !self.rules.sizes.contains(&found.size) {
            return Err(format!("D16: a size of {} bytes", found.size));
        }
        if let [from, .., to] = self.rules.sizes[..]
            && found.size == to
        {
            self.nodes[node].grown(overlay, from, to)?;
        }
        self.model
            .promises(node, self.nodes[node].slot, &found.probe)?;
        // D2: each sector is from the last flushed write, or from one after that.
        if self.model.in_sync(node) {
            for (at, sector) in self.sectors.iter().enumerate() {
                if let Some((stamps, from)) = self.model.blocks.get(&(sector / 8)) {
                    let before = *from == 0 && data[at] == self.nodes[node].old[at];
                    let first = from.saturating_sub(1);
                    if !before && !stamps[first..].contains(&data[at]) {
                        return Err(format!(
                            "D2: sector {sector} has {:x}, of {stamps:x?} those from {first} on are promised",
                            data[at]
                        ));
                    }
                }
            }
        }
        let resyncing = found.probe.state == CopyState::Inconsistent;
        // D11: what it had before a resync is all of it, or it does not say that it has it.
        if self.rules.goes_back == Some(node) && !resyncing {
            let was_in = *self.nodes[node]
                .was_in
                .get_or_insert(found.probe.generation);
            if found.probe.generation == was_in
                && let Some(at) = (0..data.len()).find(|at| data[*at] != self.nodes[node].old[*at])
            {
                return Err(format!(
                    "D11: sector {} is of the resync, and the copy says that it is as before: {:?}",
                    self.sectors[at], found.probe
                ));
            }
        }
        // D6: what is not yet flushed is marked, in this image as well.
        if !resyncing && self.rules.goes_back != Some(node) {
            for sector in overlay.keys() {
                if let Some(at) = self.place.get(sector)
                    && data[*at] != self.nodes[node].data[*at]
                    && !found.marks[*at]
                    && !self.rules.zeroed
                {
                    return Err(format!("D6: sector {sector} was written and is not marked"));
                }
            }
        }
        // D7: whatever the other copy's power cut left.
        for (theirs, their_opening) in opposite {
            let Ok(they) = &**their_opening else { continue };
            for at in 0..data.len() {
                if data[at] != theirs[at] && !found.marks[at] && !they.marks[at] {
                    return Err(format!(
                        "D7: sector {} differs ({:x}, there {:x}) and no copy knows; {:?}, there {:?}",
                        self.sectors[at], data[at], theirs[at], found.probe, they.probe
                    ));
                }
            }
        }
        if self.rules.goes_back == Some(node) && resyncing {
            self.goes_back(node, overlay, data, found)?;
        }
        Ok(())
    }

    /// D12: forced, it is what it was before the resync.
    fn goes_back(
        &mut self,
        node: usize,
        overlay: &Overlay,
        data: Vec<u64>,
        found: &Opened,
    ) -> Result<(), String> {
        if found.undo_intact != Some(true) {
            return Err(format!("D12: no way back: {:?}", found.undo_intact));
        }
        if self.rollbacks_here == self.bound.rollbacks {
            return Ok(());
        }
        let mut key = data;
        key.push(self.nodes[node].disk.metadata_key(overlay));
        let node = &mut self.nodes[node];
        if !node.rolled_back.insert(key) {
            return Ok(());
        }
        self.rollbacks += 1;
        self.rollbacks_here += 1;
        let (mut core, out, base) =
            node.scratch
                .open(&mut node.disk, overlay, &node.config, node.id, node.hint)?;
        let mut machine = Machine::new(&node.disk, overlay, base);
        machine.force(&mut core, out);
        match &machine.answer {
            Some(Ok(_)) => {}
            other => return Err(format!("D12: not promoted: {other:?}")),
        }
        for (at, sector) in self.sectors.iter().enumerate() {
            let now = word(machine.sector(*sector));
            if now != node.old[at] {
                return Err(format!(
                    "D12: after the rollback sector {sector} has {now:x}, it was {:x}",
                    node.old[at]
                ));
            }
        }
        Ok(())
    }
}

impl Model {
    /// Takes a mark; true if more is promised from here on.
    fn mark(&mut self, mark: &Mark) -> bool {
        match *mark {
            Mark::Issued {
                write,
                block,
                stamp,
            } => {
                let entry = self.blocks.entry(block).or_default();
                entry.0.push(stamp);
                self.issued.insert(write, self.phases.len());
                self.written.insert(write, (block, entry.0.len()));
                false
            }
            Mark::Acked { write, fua } => {
                let written = self.written[&write];
                match fua {
                    true => self.settle(&[written]),
                    false => self.acked.push(written),
                }
                let first = !self.alone;
                self.alone |= self.phases[..self.issued[&write]]
                    .iter()
                    .any(|phase| matches!(phase, Phase::AloneIn(..)));
                fua || first && self.alone
            }
            Mark::FlushIssued(number) => {
                self.flushes.insert(number, self.acked.clone());
                false
            }
            Mark::FlushAcked(number) => {
                let covered = self.flushes.remove(&number).unwrap();
                self.settle(&covered);
                true
            }
            Mark::Phase(phase) => {
                self.phases.push(phase);
                true
            }
        }
    }

    fn settle(&mut self, writes: &[(u64, usize)]) {
        for (block, number) in writes {
            let entry = self.blocks.get_mut(block).unwrap();
            entry.1 = entry.1.max(*number);
        }
    }

    /// Whether the flushes that were acknowledged are this copy's to keep.
    fn in_sync(&self, node: usize) -> bool {
        let last = self
            .phases
            .iter()
            .rfind(|phase| [Phase::Left(node), Phase::Joined(node)].contains(phase));
        last != Some(&Phase::Left(node))
    }

    /// What commands and completed writes promised of the metadata.
    fn promises(&self, node: usize, slot: Slot, probe: &Probe) -> Result<(), String> {
        for phase in &self.phases {
            match *phase {
                Phase::Serves(at, epoch) if at == node && probe.epoch.number < epoch => {
                    return Err(format!("C3: it serves in epoch {epoch}: {probe:?}"));
                }
                Phase::AloneIn(at, generation) if at == node && self.alone => {
                    let back = self.phases.contains(&Phase::Back);
                    if !back
                        && (probe.in_sync.contains(Slot(1 - slot.0))
                            || probe.generation.0 == generation)
                    {
                        return Err(format!(
                            "D1: a write completed without the other copy: {probe:?}"
                        ));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
