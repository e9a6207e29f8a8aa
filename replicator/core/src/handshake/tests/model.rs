//! An abstract world of two copies of two blocks, for the enumeration in `enumerate.rs`.
//!
//! It keeps what a copy has on its disk (with a volatile cache that a power cut may lose), what its metadata
//! says, and, beside all that, the truth: which write overwrote which, and what the application was told. It asks
//! [`decide`] and [`may_promote`] and carries out what they say, stopping at every point where a message may be lost.

use super::build::pair;
use crate::handshake::*;
use holdfast_wire_format::frame::Facts;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::*;

pub const BLOCKS: usize = 2;
/// A write, by number: 0 is what `create` left. The number says which write it went over.
pub type Write = u8;
type PerBlock<T> = [T; BLOCKS];

/// The rule set that the two copies run under.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Setting {
    pub mode: Mode,
    pub on_peer_loss: OnPeerLoss,
}

/// How often each kind of bad luck may strike on one path.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    pub writes: u8,
    pub crashes: u8,
    pub clean_stops: u8,
    pub link_losses: u8,
    pub forces: u8,
    pub promotions: u8,
    pub replaced: u8,
    pub failed: u8,
    pub restored: u8,
}

/// What survives a power cut, apart from the blocks.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Meta {
    disk: u8,
    counter: u8,
    epoch: Epoch,
    state: CopyState,
    unclean: bool,
    /// Stopped uncleanly, and neither became a target nor came into a new generation since.
    unsettled: bool,
    was_primary: bool,
    rolled_back: bool,
    solo: bool,
    generations: Vec<Generation>,
    position: u8,
    target_of: GenerationId,
    target_source: u8,
    before: (GenerationId, u8),
    undo: Option<PerBlock<Option<Write>>>,
    in_sync: u8,
    version: u8,
    /// S shrank in this generation: no completion alone before a new one.
    needs_generation: bool,
    /// The copy outside S durably knows that it is outside: it will not promote itself unforced.
    peer_told: bool,
    bits: PerBlock<bool>,
    hot: PerBlock<bool>,
    base: GenerationId,
    full_copy: bool,
    known: bool,
    known_disk: u8,
    known_counter: u8,
    known_incarnation: u8,
    known_durable: (GenerationId, u8),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Node {
    up: bool,
    primary: bool,
    position: u8,
    incarnation: u8,
    blocks: PerBlock<Write>,
    /// What is under the volatile cache; equal to `blocks` where nothing is cached.
    durable: PerBlock<Write>,
    /// Lost in a power cut of this very machine, and not replaced since.
    lost: PerBlock<bool>,
    meta: Meta,
    backup: Option<Box<(Meta, PerBlock<Write>)>>,
    /// The application was told that this is written, on the line of writes this copy belongs to.
    owed: PerBlock<Write>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    Down,
    Mirroring,
    /// From the source; blocks already sent but not known to be flushed.
    Resync {
        source: usize,
        sent: PerBlock<bool>,
        becomes: u8,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    setting: Setting,
    nodes: [Node; 2],
    link: Link,
    /// For each write, the one it went over.
    over: Vec<Write>,
    generations: u8,
    incarnations: u8,
    disks: u8,
    /// A person insisted somewhere on this path: who is unreachable may have been replaced without knowing.
    forced: bool,
    pub left: Budget,
}

/// A decision made differently on purpose, to see that somebody notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// The row copies the other way round.
    Swap(Row),
    /// The row finds nothing to do.
    Skip(Row),
    /// The row copies everything from the copy in this slot instead of refusing or asking.
    Guess(Row, u8),
}

/// Where one transition leads, or the invariant it broke.
pub type Step = (String, Result<World, String>);

impl World {
    pub fn new(setting: Setting, left: Budget) -> World {
        let sync = setting.mode == Mode::Sync;
        let node = |slot: u8| Node {
            up: true,
            primary: slot == 0,
            position: 0,
            incarnation: slot,
            blocks: [0; BLOCKS],
            durable: [0; BLOCKS],
            lost: [false; BLOCKS],
            meta: Meta {
                disk: slot + 1,
                counter: 1,
                epoch: Epoch {
                    number: 1,
                    owner: 0,
                },
                state: CopyState::UpToDate,
                unclean: true,
                unsettled: false,
                was_primary: slot == 0,
                rolled_back: false,
                solo: false,
                generations: vec![
                    made(1, 0, 0, Epoch::NONE, GenerationCause::Created, 0),
                    made(
                        2,
                        1,
                        0,
                        Epoch {
                            number: 1,
                            owner: 0,
                        },
                        GenerationCause::Promotion,
                        0,
                    ),
                ],
                position: 0,
                target_of: GenerationId(0),
                target_source: 0xff,
                before: (GenerationId(0), 0),
                undo: None,
                in_sync: if sync { 0b11 } else { 0b01 },
                version: 1,
                needs_generation: false,
                peer_told: false,
                bits: [false; BLOCKS],
                hot: [false; BLOCKS],
                base: GenerationId(2),
                full_copy: false,
                known: true,
                known_disk: 2 - slot,
                known_counter: 1,
                known_incarnation: 1 - slot,
                known_durable: (GenerationId(2), 0),
            },
            backup: None,
            owed: [0; BLOCKS],
        };
        World {
            setting,
            nodes: [node(0), node(1)],
            link: Link::Mirroring,
            over: vec![0],
            generations: 2,
            incarnations: 2,
            disks: 2,
            forced: false,
            left,
        }
    }

    /// `later` went over `earlier`, directly or through others, or is it.
    fn includes(&self, mut later: Write, earlier: Write) -> bool {
        while later != earlier && later != 0 {
            later = self.over[usize::from(later)];
        }
        later == earlier
    }

    fn facts(&self, i: usize) -> Facts {
        let (mut f, b) = pair();
        if i == 1 {
            f = b;
        }
        let n = &self.nodes[i];
        let m = &n.meta;
        f.slot = Slot(i as u8);
        f.disk = Uuid(m.disk.into());
        f.volumes[0].disk = f.disk;
        f.attach_counter = m.counter.into();
        f.incarnation = Incarnation(n.incarnation.into());
        f.epoch = m.epoch;
        f.state = m.state;
        f.flags = CopyFlags {
            unclean: m.unclean,
            was_primary: m.was_primary,
            zeroed: false,
            rolled_back: m.rolled_back,
            undo_lost: m.undo.is_none(),
            solo: m.solo,
        };
        f.is_primary = n.primary;
        f.unclean_start = m.unsettled;
        f.mode = self.setting.mode;
        f.on_peer_loss = self.setting.on_peer_loss;
        f.generations = m.generations.clone();
        f.position = n.position.into();
        f.issued = f.position;
        f.target_of = m.target_of;
        f.target_source = m.target_source;
        f.before_resync = (m.before.0, m.before.1.into());
        f.undo_intact = m.undo.is_some();
        f.in_sync = SlotSet(m.in_sync);
        f.in_sync_version = m.version.into();
        let p = &mut f.about_peer;
        p.known = m.known;
        p.disk = Uuid(m.known_disk.into());
        p.attach_counter = m.known_counter.into();
        p.incarnation = Incarnation(m.known_incarnation.into());
        p.bitmap_base = m.base;
        p.bits = m.bits.iter().filter(|b| **b).count() as u64;
        p.bytes = p.bits * 4096;
        p.known_durable_generation = m.known_durable.0;
        p.known_durable_position = m.known_durable.1.into();
        p.full_copy = m.full_copy;
        f
    }

    /// Every transition that is possible here. `seen` hears of each decision.
    pub fn steps(
        &self,
        mutation: Option<Mutation>,
        seen: &mut dyn FnMut(Row, &Outcome),
    ) -> Vec<Step> {
        let mut steps = Vec::new();
        for i in 0..2 {
            self.node_steps(i, &mut steps);
        }
        if self.link == Link::Down {
            if self.nodes.iter().all(|n| n.up) {
                self.meet(mutation, seen, &mut steps);
            }
        } else {
            if self.left.link_losses > 0 {
                let mut w = self.clone();
                w.left.link_losses -= 1;
                w.link = Link::Down;
                steps.push(("the link is lost".into(), Ok(w)));
            }
            self.mirrored_flush(&mut steps);
        }
        self.resync_steps(&mut steps);
        for (what, result) in &mut steps {
            if let Ok(w) = result
                && let Some(broken) = w.broken()
            {
                *result = Err(format!("{what}: {broken}"));
            }
        }
        steps
    }

    /// The invariant that holds in every state.
    fn broken(&self) -> Option<String> {
        let [a, b] = &self.nodes;
        if self.link == Link::Mirroring
            && a.meta.state == CopyState::UpToDate
            && b.meta.state == CopyState::UpToDate
            && a.blocks != b.blocks
        {
            return Some(format!(
                "both copies are UpToDate and differ: {:?} and {:?}",
                a.blocks, b.blocks
            ));
        }
        None
    }

    fn node_steps(&self, i: usize, steps: &mut Vec<Step>) {
        let n = &self.nodes[i];
        if !n.up {
            self.down_steps(i, steps);
            return;
        }
        if self.left.crashes > 0 {
            for kept in 0..1u8 << BLOCKS {
                let cached = |b: usize| n.blocks[b] != n.durable[b];
                // Only blocks in the cache can be lost: other masks are the same crash again.
                if (0..BLOCKS).any(|b| !cached(b) && kept & (1 << b) == 0) {
                    continue;
                }
                let mut w = self.clone();
                w.left.crashes -= 1;
                w.crash(i, kept);
                steps.push((format!("copy {i} loses power, keeps {kept:02b}"), Ok(w)));
            }
        }
        if self.left.clean_stops > 0 && n.meta.state != CopyState::Failed {
            let mut w = self.clone();
            w.left.clean_stops -= 1;
            w.stop(i);
            steps.push((format!("copy {i} stops cleanly"), Ok(w)));
        }
        if n.meta.state == CopyState::Failed {
            return;
        }
        if n.primary {
            for b in 0..BLOCKS {
                self.write(i, b, steps);
            }
            self.go_on_alone(i, steps);
            let mut w = self.clone();
            w.demote(i);
            steps.push((format!("copy {i} is demoted"), Ok(w)));
        } else if self.left.promotions > 0 {
            self.promote(i, steps);
        }
    }

    fn down_steps(&self, i: usize, steps: &mut Vec<Step>) {
        let n = &self.nodes[i];
        let mut w = self.clone();
        w.start(i);
        steps.push((format!("copy {i} starts"), Ok(w)));
        if self.left.replaced > 0 {
            let mut w = self.clone();
            w.left.replaced -= 1;
            w.replace_disk(i);
            steps.push((format!("copy {i} gets a new disk"), Ok(w)));
        }
        if self.left.failed > 0 {
            let mut w = self.clone();
            w.left.failed -= 1;
            w.nodes[i].meta.state = CopyState::Failed;
            steps.push((format!("the disk of copy {i} fails"), Ok(w)));
        }
        if self.left.restored > 0 {
            let mut w = self.clone();
            match &n.backup {
                None => w.nodes[i].backup = Some(Box::new((n.meta.clone(), n.blocks))),
                Some(backup) => {
                    w.left.restored -= 1;
                    let node = &mut w.nodes[i];
                    (node.meta, node.blocks) = (**backup).clone();
                    node.durable = node.blocks;
                    node.backup = None;
                    w.owe_what_is_left(i);
                }
            }
            steps.push((format!("copy {i} is backed up or restored"), Ok(w)));
        }
    }

    fn crash(&mut self, i: usize, kept: u8) {
        self.link = Link::Down;
        for b in 0..BLOCKS {
            if kept & (1 << b) == 0 {
                let still_there = self.includes(self.nodes[i].durable[b], self.nodes[i].owed[b]);
                let n = &mut self.nodes[i];
                n.blocks[b] = n.durable[b];
                n.lost[b] = true;
                if !still_there {
                    n.owed[b] = n.durable[b];
                }
            }
        }
        let n = &mut self.nodes[i];
        n.durable = n.blocks;
        (n.up, n.primary) = (false, false);
        n.position = n.meta.position;
        if self.setting.mode == Mode::Async && n.meta.was_primary {
            // Without a second copy that counts, what the machine's own disk lost is lost.
            let lost = n.lost;
            for b in (0..BLOCKS).filter(|b| lost[*b]) {
                let kept = self.nodes[i].blocks[b];
                self.nodes[1 - i].owed[b] = kept;
            }
        }
    }

    fn flush(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        n.durable = n.blocks;
        n.meta.position = n.position;
    }

    fn stop(&mut self, i: usize) {
        if self.nodes[i].primary {
            self.demote(i);
        }
        self.flush(i);
        self.link = Link::Down;
        let n = &mut self.nodes[i];
        n.up = false;
        n.meta.unclean = false;
        n.meta.was_primary = n.meta.was_primary && n.meta.unsettled;
    }

    fn demote(&mut self, i: usize) {
        self.flush(i);
        self.nodes[i].primary = false;
    }

    fn start(&mut self, i: usize) {
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let n = &mut self.nodes[i];
        n.up = true;
        n.incarnation = incarnation;
        n.position = n.meta.position;
        let m = &mut n.meta;
        m.counter += 1;
        if m.unclean {
            m.unsettled = true;
            fold(m);
        }
        m.unclean = true;
        if !m.unsettled {
            m.was_primary = false;
        }
    }

    fn replace_disk(&mut self, i: usize) {
        self.disks += 1;
        let disk = self.disks;
        let n = &mut self.nodes[i];
        n.blocks = [0; BLOCKS];
        n.durable = n.blocks;
        n.owed = n.blocks;
        n.lost = [false; BLOCKS];
        n.position = 0;
        n.backup = None;
        let in_sync = 0;
        n.meta = Meta {
            disk,
            counter: 0,
            epoch: Epoch::NONE,
            state: CopyState::Blank,
            unclean: false,
            unsettled: false,
            was_primary: false,
            rolled_back: false,
            solo: false,
            generations: vec![],
            position: 0,
            target_of: GenerationId(0),
            target_source: 0xff,
            before: (GenerationId(0), 0),
            undo: None,
            in_sync,
            version: 0,
            needs_generation: false,
            peer_told: false,
            bits: [false; BLOCKS],
            hot: [false; BLOCKS],
            base: GenerationId(0),
            full_copy: false,
            known: false,
            known_disk: 0,
            known_counter: 0,
            known_incarnation: 0,
            known_durable: (GenerationId(0), 0),
        };
    }

    fn apply(&mut self, i: usize, b: usize, write: Write) {
        let n = &mut self.nodes[i];
        if n.meta.target_of != GenerationId(0)
            && let Some(undo) = &mut n.meta.undo
        {
            undo[b].get_or_insert(n.blocks[b]);
        }
        n.meta.hot[b] = true;
        n.blocks[b] = write;
        n.lost[b] = false;
        n.position += 1;
    }

    fn issue(&mut self, i: usize, b: usize) -> Write {
        self.left.writes -= 1;
        self.over.push(self.nodes[i].blocks[b]);
        (self.over.len() - 1) as Write
    }

    fn write(&self, i: usize, b: usize, steps: &mut Vec<Step>) {
        if self.left.writes == 0 {
            return;
        }
        let j = 1 - i;
        let m = &self.nodes[i].meta;
        let peer_counts = m.in_sync & (1 << j) != 0;
        let alone = !peer_counts && !m.needs_generation;
        if self.link == Link::Down {
            let mut w = self.clone();
            let write = w.issue(i, b);
            w.apply(i, b, write);
            w.nodes[i].meta.bits[b] = true;
            if alone {
                w.nodes[i].owed[b] = write;
            }
            steps.push((
                format!("copy {i} writes block {b} alone, acknowledged: {alone}"),
                Ok(w),
            ));
            return;
        }
        // Both get it, and the application hears of it.
        if peer_counts || alone {
            let mut w = self.clone();
            let write = w.issue(i, b);
            w.apply(i, b, write);
            w.apply(j, b, write);
            w.nodes[i].owed[b] = write;
            if self.link == Link::Mirroring {
                w.nodes[j].owed[b] = write;
            }
            steps.push((format!("copy {i} writes block {b}, mirrored"), Ok(w)));
        }
        // The link breaks before the peer has it; or after it has it and before the writer hears of that.
        if self.left.link_losses > 0 {
            for reached in [false, true] {
                let mut w = self.clone();
                w.left.link_losses -= 1;
                let write = w.issue(i, b);
                w.apply(i, b, write);
                w.nodes[i].meta.bits[b] = true;
                if reached {
                    w.apply(j, b, write);
                }
                if alone {
                    w.nodes[i].owed[b] = write;
                }
                w.link = Link::Down;
                steps.push((
                    format!(
                        "copy {i} writes block {b}, the link breaks, it reached the peer: {reached}"
                    ),
                    Ok(w),
                ));
            }
        }
        // The writer loses power with the write on the peer alone.
        if self.left.crashes > 0 && peer_counts {
            let mut w = self.clone();
            w.left.crashes -= 1;
            let write = w.issue(i, b);
            w.nodes[i].meta.hot[b] = true;
            w.apply(j, b, write);
            w.crash(i, 0b11);
            steps.push((
                format!("copy {i} loses power, its write of block {b} is on the peer alone"),
                Ok(w),
            ));
        }
    }

    fn mirrored_flush(&self, steps: &mut Vec<Step>) {
        if self.link != Link::Mirroring {
            return;
        }
        let mut w = self.clone();
        for i in 0..2 {
            w.flush(i);
        }
        // The primary hears that the peer flushed; then the peer hears that both did.
        for i in 0..2 {
            let peer = &w.nodes[1 - i].meta;
            let durable = (
                peer.generations.last().map_or(GenerationId(0), |g| g.id),
                peer.position,
            );
            let m = &mut w.nodes[i].meta;
            m.hot = [false; BLOCKS];
            m.known_durable = durable;
        }
        if w != *self {
            steps.push(("both flush".into(), Ok(w)));
        }
    }

    /// What a primary may do about a peer that is gone: drop it from S, then make a generation.
    fn go_on_alone(&self, i: usize, steps: &mut Vec<Step>) {
        let j = 1 - i;
        let m = &self.nodes[i].meta;
        if self.link == Link::Down
            && m.in_sync & (1 << j) != 0
            && self.setting.on_peer_loss == OnPeerLoss::Continue
        {
            let mut w = self.clone();
            w.drop_from_s(i);
            steps.push((format!("copy {i} drops the other from S"), Ok(w)));
        }
        let may = self.setting.on_peer_loss == OnPeerLoss::Continue || m.solo || m.peer_told;
        if m.needs_generation && m.in_sync & (1 << j) == 0 && may {
            let mut w = self.clone();
            w.new_generation(i, GenerationCause::PeerLost);
            steps.push((
                format!("copy {i} makes a generation without the other"),
                Ok(w),
            ));
        }
    }

    fn drop_from_s(&mut self, i: usize) {
        let m = &mut self.nodes[i].meta;
        m.in_sync = 1 << i;
        m.version += 1;
        m.needs_generation = true;
    }

    /// A generation of copy `i`; a connected peer durably knows of it before anything completes in it.
    fn new_generation(&mut self, i: usize, cause: GenerationCause) {
        self.generations += 1;
        let id = self.generations;
        // The fork position is a promise: what it counts must not be lost in a power cut after it.
        self.flush(i);
        let n = &mut self.nodes[i];
        let parent = n.meta.generations.last().map_or(0, |g| g.id.0);
        let generation = made(
            id.into(),
            parent,
            n.position.into(),
            n.meta.epoch,
            cause,
            i as u8,
        );
        n.meta.generations.push(generation);
        n.meta.needs_generation = false;
        n.position = 0;
        n.meta.position = 0;
        // What was hot is not known to be on the peer's disk, and the positions that would say so have ended.
        if self.link == Link::Down {
            fold(&mut n.meta);
        }
        let (epoch, in_sync, version) = (n.meta.epoch, n.meta.in_sync, n.meta.version);
        let j = 1 - i;
        let peer = &mut self.nodes[j];
        match self.link {
            Link::Down => {}
            Link::Mirroring => {
                peer.meta.generations.push(generation);
                peer.position = 0;
                peer.meta.position = 0;
                peer.meta.unsettled = false;
            }
            Link::Resync { .. } => peer.meta.target_of = GenerationId(id.into()),
        }
        if self.link != Link::Down {
            peer.meta.epoch = epoch;
            (peer.meta.in_sync, peer.meta.version) = (in_sync, version);
        }
    }

    fn promote(&self, i: usize, steps: &mut Vec<Step>) {
        let j = 1 - i;
        let connected = self.link != Link::Down;
        let me = self.facts(i);
        let peer = connected.then(|| self.facts(j));
        for force in [false, true] {
            if force && self.left.forces == 0 {
                continue;
            }
            let Ok(promotion) = may_promote(&me, peer.as_ref(), None, force) else {
                continue;
            };
            if force && !promotion.is_forced() {
                continue;
            }
            let mut w = self.clone();
            w.left.promotions -= 1;
            let what = format!("copy {i} is promoted ({:?})", promotion.kind);
            if !promotion.is_forced() {
                // What the peer's line owes must be here, unless this very machine lost it.
                let missing = (0..BLOCKS).find(|b| {
                    !self.includes(self.nodes[i].blocks[*b], self.nodes[j].owed[*b])
                        && !self.nodes[i].lost[*b]
                });
                if !self.forced
                    && let Some(b) = missing
                {
                    steps.push((
                        what.clone(),
                        Err(format!(
                            "{what} without acknowledged write {} of block {b}",
                            self.nodes[j].owed[b]
                        )),
                    ));
                    continue;
                }
            } else {
                w.left.forces -= 1;
                w.forced = true;
            }
            w.take_over(i, promotion.kind, connected);
            steps.push((what, Ok(w)));
        }
    }

    fn take_over(&mut self, i: usize, kind: PromotionKind, connected: bool) {
        let j = 1 - i;
        if kind == PromotionKind::ForcedAfterRollback {
            self.roll_back(i);
        }
        for b in 0..BLOCKS {
            if self.nodes[i].lost[b]
                && !self.includes(self.nodes[i].blocks[b], self.nodes[j].owed[b])
            {
                // Accepted: the promoted copy itself lost power after it.
                self.nodes[j].owed[b] = self.nodes[i].blocks[b];
            }
        }
        let newest = if connected {
            self.nodes[i]
                .meta
                .epoch
                .number
                .max(self.nodes[j].meta.epoch.number)
        } else {
            self.nodes[i].meta.epoch.number
        };
        self.flush(i);
        let n = &mut self.nodes[i];
        n.meta.epoch = Epoch {
            number: newest + 1,
            owner: i as u8,
        };
        n.meta.state = CopyState::UpToDate;
        n.meta.was_primary = true;
        n.meta.unsettled = false;
        n.meta.rolled_back = false;
        n.primary = true;
        if !connected || self.setting.mode == Mode::Async {
            n.meta.in_sync = 1 << i;
            n.meta.version += 1;
            n.meta.solo = true;
        }
        let cause = if matches!(
            kind,
            PromotionKind::Forced | PromotionKind::ForcedAfterRollback | PromotionKind::First
        ) {
            GenerationCause::Force
        } else {
            GenerationCause::Promotion
        };
        self.new_generation(i, cause);
        if connected {
            self.nodes[j].meta.was_primary = false;
        }
    }

    fn roll_back(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        let undo = n.meta.undo.take().expect("an intact undo");
        for (b, old) in undo.iter().enumerate() {
            if let Some(old) = old {
                n.meta.bits[b] = true;
                n.blocks[b] = *old;
                n.durable[b] = *old;
            }
        }
        n.position = n.meta.before.1;
        n.meta.position = n.position;
        n.meta.target_of = GenerationId(0);
        n.meta.state = CopyState::Consistent;
        n.meta.rolled_back = true;
        self.owe_what_is_left(i);
    }

    /// The disk of copy `i` went back: what it held alone is gone.
    fn owe_what_is_left(&mut self, i: usize) {
        for b in 0..BLOCKS {
            if !self.includes(self.nodes[i].blocks[b], self.nodes[i].owed[b]) {
                self.nodes[i].owed[b] = self.nodes[i].blocks[b];
            }
        }
    }

    /// Both are up and reach each other.
    fn meet(
        &self,
        mutation: Option<Mutation>,
        seen: &mut dyn FnMut(Row, &Outcome),
        steps: &mut Vec<Step>,
    ) {
        let mut w = self.clone();
        for i in 0..2 {
            let peer_incarnation = w.nodes[1 - i].incarnation;
            let m = &mut w.nodes[i].meta;
            if m.known_incarnation != peer_incarnation {
                fold(m);
            }
        }
        let facts = [w.facts(0), w.facts(1)];
        let mut d = decide(&facts[0], &facts[1], None);
        seen(d.row, &d.outcome);
        if let Some(mutation) = mutation {
            mutate(&mut d, mutation);
        }
        let what = format!("they meet, row {}: {:?}", d.row.number(), d.outcome);
        match d.outcome {
            Outcome::Nothing => {
                if w.nodes[0].blocks != w.nodes[1].blocks {
                    let broken = format!(
                        "{what}, but they hold {:?} and {:?}",
                        w.nodes[0].blocks, w.nodes[1].blocks
                    );
                    steps.push((what, Err(broken)));
                    return;
                }
                for i in 0..2 {
                    w.introduce(i);
                }
                w.link = Link::Mirroring;
                steps.push((what, Ok(w)));
            }
            Outcome::Copy(plan) => w.begin_copy(what, plan, d.row, &facts, steps),
            Outcome::Diskless { failed, server } => {
                let (y, x) = (usize::from(failed.0), usize::from(server.0));
                // Whoever forced the server accepted what only the other disk had, and that disk is gone.
                if !w.forced
                    && let Some(b) = w.unpaid(x, y, &d.row)
                {
                    let owed = w.nodes[y].owed[b];
                    steps.push((
                        what.clone(),
                        Err(format!(
                            "{what}: the server lacks acknowledged write {owed} of block {b}"
                        )),
                    ));
                }
            }
            // Nothing changes.
            _ => {}
        }
    }

    /// A block whose acknowledged write on Y's line is not on X.
    fn unpaid(&self, x: usize, y: usize, row: &Row) -> Option<usize> {
        (0..BLOCKS).find(|b| {
            // Both lost power, or the only member of S did: what nobody had flushed may go, as with a single disk.
            let (only_x, only_y) = (1 << x, 1 << y);
            let only_member =
                self.nodes[x].meta.in_sync == only_x && self.nodes[y].meta.in_sync & only_y == 0;
            let forgiven =
                (only_member || matches!(row, Row::R12 | Row::R7)) && self.nodes[x].lost[*b];
            !self.includes(self.nodes[x].blocks[*b], self.nodes[y].owed[*b]) && !forgiven
        })
    }

    fn introduce(&mut self, i: usize) {
        let peer = &self.nodes[1 - i];
        let (disk, counter, incarnation) = (peer.meta.disk, peer.meta.counter, peer.incarnation);
        let durable = (
            peer.meta
                .generations
                .last()
                .map_or(GenerationId(0), |g| g.id),
            peer.meta.position,
        );
        let m = &mut self.nodes[i].meta;
        m.known = true;
        (m.known_disk, m.known_incarnation) = (disk, incarnation);
        m.known_counter = counter;
        m.known_durable = durable;
    }

    fn begin_copy(
        mut self,
        what: String,
        plan: CopyPlan,
        row: Row,
        facts: &[Facts; 2],
        steps: &mut Vec<Step>,
    ) {
        let (x, y) = (usize::from(plan.source.0), usize::from(plan.target.0));
        let told = plan
            .surplus
            .is_some_and(|s| s.acknowledged && s.holder == plan.target);
        if !told && let Some(b) = self.unpaid(x, y, &row) {
            let owed = self.nodes[y].owed[b];
            steps.push((
                what.clone(),
                Err(format!(
                    "{what}: gives up acknowledged write {owed} of block {b} and does not say so"
                )),
            ));
            return;
        }
        if facts[x].target_of != GenerationId(0)
            || matches!(facts[x].state, CopyState::Blank | CopyState::Failed)
        {
            steps.push((
                what.clone(),
                Err(format!("{what}: the source is {:?}", facts[x].state)),
            ));
            return;
        }
        // The source records it first.
        let undo = self.nodes[y].meta.undo;
        let (bits_y, counter_before) = (self.nodes[y].meta.bits, self.nodes[x].meta.known_counter);
        let same_disk = self.nodes[x].meta.known_disk == self.nodes[y].meta.disk;
        let met_before = self.nodes[x].meta.known_incarnation;
        self.introduce(x);
        self.nodes[x].meta.known_incarnation = met_before;
        // A target may come out at an earlier position than it went in.
        self.nodes[x].meta.known_durable = (GenerationId(0), 0);
        if same_disk {
            let m = &mut self.nodes[x].meta;
            m.known_counter = m.known_counter.max(counter_before);
        }
        for b in 0..BLOCKS {
            // Forgiven above, or told: not asked about twice.
            if !self.includes(self.nodes[x].blocks[b], self.nodes[y].owed[b]) {
                self.nodes[y].owed[b] = self.nodes[x].blocks[b];
            }
        }
        let m = &mut self.nodes[x].meta;
        match plan.how {
            How::Bits | How::BitsAndUndo => {
                for b in 0..BLOCKS {
                    m.bits[b] |= bits_y[b] || m.hot[b];
                    if plan.how == How::BitsAndUndo {
                        m.bits[b] |= undo.is_some_and(|u| u[b].is_some());
                    }
                }
            }
            How::Full | How::FullByChecksum => {
                m.bits = [true; BLOCKS];
                m.full_copy = true;
            }
        }
        if !m.full_copy {
            m.base = common(&facts[x], &facts[y]);
        }
        let was_member = m.in_sync & (1 << y) != 0;
        if was_member || facts[y].in_sync_version >= u64::from(m.version) {
            m.version = m.version.max(facts[y].in_sync_version as u8) + 1;
            m.in_sync = 1 << x;
            m.needs_generation |= was_member;
        }
        steps.push((
            format!("{what}; the target does not get to record it"),
            Ok(self.clone()),
        ));
        // Then the target.
        self.introduce(y);
        let goal = self.nodes[x]
            .meta
            .generations
            .last()
            .map_or(GenerationId(0), |g| g.id);
        let (epoch, in_sync, version) = {
            let m = &self.nodes[x].meta;
            (m.epoch, m.in_sync, m.version)
        };
        let n = &mut self.nodes[y];
        let continues = n.meta.target_of != GenerationId(0);
        if n.primary {
            n.primary = false;
            n.durable = n.blocks;
        }
        let m = &mut n.meta;
        if !continues {
            m.before = (
                m.generations.last().map_or(GenerationId(0), |g| g.id),
                n.position,
            );
            m.undo = (m.state != CopyState::Blank).then_some([None; BLOCKS]);
        }
        m.state = CopyState::Inconsistent;
        m.target_of = goal;
        m.target_source = x as u8;
        m.unsettled = false;
        m.was_primary = false;
        m.solo = false;
        m.rolled_back = false;
        (m.in_sync, m.version) = (in_sync, version);
        if epoch.number > m.epoch.number {
            m.epoch = epoch;
        }
        steps.push((
            format!("{what}; the source does not hear that the target is ready"),
            Ok(self.clone()),
        ));
        // The source counts the other as met only now.
        let incarnation = self.nodes[y].incarnation;
        let m = &mut self.nodes[x].meta;
        m.known_incarnation = incarnation;
        m.peer_told = true;
        self.link = Link::Resync {
            source: x,
            sent: [false; BLOCKS],
            becomes: plan.target_becomes as u8,
        };
        steps.push((what, Ok(self)));
    }

    fn resync_steps(&self, steps: &mut Vec<Step>) {
        match self.link {
            Link::Resync {
                source: x,
                sent,
                becomes,
            } => {
                let y = 1 - x;
                for b in (0..BLOCKS).filter(|b| self.nodes[x].meta.bits[*b] && !sent[*b]) {
                    let mut w = self.clone();
                    let (value, position) = (w.nodes[x].blocks[b], w.nodes[y].position);
                    w.apply(y, b, value);
                    w.nodes[y].position = position;
                    let mut sent = sent;
                    sent[b] = true;
                    w.link = Link::Resync {
                        source: x,
                        sent,
                        becomes,
                    };
                    steps.push((format!("block {b} is copied to {y}"), Ok(w)));
                }
                if sent.iter().any(|s| *s) {
                    let mut w = self.clone();
                    w.nodes[y].durable = w.nodes[y].blocks;
                    w.nodes[y].lost = [false; BLOCKS];
                    for b in (0..BLOCKS).filter(|b| sent[*b]) {
                        w.nodes[x].meta.bits[b] = false;
                    }
                    w.link = Link::Resync {
                        source: x,
                        sent: [false; BLOCKS],
                        becomes,
                    };
                    steps.push((format!("copy {y} flushes what was copied"), Ok(w)));
                }
                if self.nodes[x].meta.bits == [false; BLOCKS] {
                    self.complete(x, y, steps);
                }
            }
            Link::Mirroring => {
                for x in 0..2 {
                    self.join_s(x, 1 - x, steps);
                }
            }
            Link::Down => {}
        }
    }

    /// No bit is left: both flush, the target records Complete.
    fn complete(&self, x: usize, y: usize, steps: &mut Vec<Step>) {
        let mut w = self.clone();
        w.flush(x);
        w.nodes[y].position = w.nodes[x].position;
        w.flush(y);
        let (generations, owed, epoch) = {
            let n = &w.nodes[x];
            (n.meta.generations.clone(), n.owed, n.meta.epoch)
        };
        let goal = generations.last().map_or(GenerationId(0), |g| g.id);
        let n = &mut w.nodes[y];
        n.owed = owed;
        let m = &mut n.meta;
        m.generations = generations;
        m.epoch = epoch;
        m.state = CopyState::Complete;
        m.target_of = GenerationId(0);
        m.bits = [false; BLOCKS];
        m.hot = [false; BLOCKS];
        (m.base, m.full_copy) = (goal, false);
        w.link = Link::Down;
        steps.push((
            format!("copy {y} is Complete, the answer is lost"),
            Ok(w.clone()),
        ));
        w.link = Link::Mirroring;
        w.learn_complete(x, y);
        steps.push((format!("copy {y} is Complete"), Ok(w)));
    }

    fn learn_complete(&mut self, x: usize, y: usize) {
        let goal = self.nodes[y]
            .meta
            .generations
            .last()
            .map_or(GenerationId(0), |g| g.id);
        let m = &mut self.nodes[x].meta;
        (m.base, m.full_copy) = (goal, false);
        m.hot = [false; BLOCKS];
    }

    /// The source takes a Complete copy into S; the target hears of it, or not.
    fn join_s(&self, x: usize, y: usize, steps: &mut Vec<Step>) {
        let same = self.nodes[x].meta.generations == self.nodes[y].meta.generations;
        if self.nodes[y].meta.state != CopyState::Complete
            || self.nodes[x].meta.state != CopyState::UpToDate
            || !same
        {
            return;
        }
        let mut w = self.clone();
        w.learn_complete(x, y);
        if self.setting.mode == Mode::Sync {
            let m = &mut w.nodes[x].meta;
            if m.in_sync & (1 << y) == 0 {
                m.in_sync |= 1 << y;
                m.version += 1;
                (m.solo, m.peer_told) = (false, false);
            }
        }
        if self.left.link_losses > 0 {
            let mut lost = w.clone();
            lost.left.link_losses -= 1;
            lost.link = Link::Down;
            steps.push((
                format!("copy {y} is in S and does not hear of it"),
                Ok(lost),
            ));
        }
        let (in_sync, version) = (w.nodes[x].meta.in_sync, w.nodes[x].meta.version);
        let m = &mut w.nodes[y].meta;
        m.state = CopyState::UpToDate;
        m.undo = None;
        (m.in_sync, m.version) = (in_sync, version);
        steps.push((format!("copy {y} is in S"), Ok(w)));
    }
}

/// Hot extents and the unstable set become bits: intent stays until a flush, but it is on the list from here on.
fn fold(m: &mut Meta) {
    for b in 0..BLOCKS {
        m.bits[b] |= m.hot[b];
    }
}

fn made(
    id: u64,
    parent: u64,
    fork: Position,
    epoch: Epoch,
    cause: GenerationCause,
    maker: u8,
) -> Generation {
    Generation {
        id: GenerationId(id),
        parent: GenerationId(parent),
        fork_position: fork,
        epoch,
        cause,
        maker,
    }
}

/// The newest generation both have.
fn common(a: &Facts, b: &Facts) -> GenerationId {
    history::chain(a)
        .into_iter()
        .rev()
        .find(|id| history::holds(b, *id))
        .unwrap_or(GenerationId(0))
}

fn mutate(d: &mut Decision, mutation: Mutation) {
    match mutation {
        Mutation::Swap(row) if row == d.row => match &mut d.outcome {
            Outcome::Copy(plan) => std::mem::swap(&mut plan.source, &mut plan.target),
            Outcome::Diskless { failed, server } => std::mem::swap(failed, server),
            _ => {}
        },
        Mutation::Skip(row) if row == d.row && matches!(d.outcome, Outcome::Copy(_)) => {
            d.outcome = Outcome::Nothing
        }
        Mutation::Guess(row, source)
            if row == d.row
                && !matches!(
                    d.outcome,
                    Outcome::Copy(_) | Outcome::Nothing | Outcome::Diskless { .. }
                ) =>
        {
            d.outcome = Outcome::Copy(CopyPlan {
                source: Slot(source),
                target: Slot(1 - source),
                how: How::FullByChecksum,
                leaves_s: true,
                target_demotes: true,
                target_outdated: true,
                target_becomes: CopyState::Complete,
                surplus: None,
            });
        }
        _ => {}
    }
}
