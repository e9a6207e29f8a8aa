//! What becomes of one copy: started, stopped, crashed, its disk replaced, and the writes that it takes.

use super::*;

impl World {
    pub(super) fn node_steps(&self, i: usize, steps: &mut Vec<Step>) {
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

    pub(super) fn flush(&mut self, i: usize) {
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

    pub(super) fn apply(&mut self, i: usize, b: usize, write: Write) {
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

    pub(super) fn mirrored_flush(&self, steps: &mut Vec<Step>) {
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
    pub(super) fn new_generation(&mut self, i: usize, cause: GenerationCause) {
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
}

/// Hot extents and the unstable set become bits: intent stays until a flush, but it is on the list from here on.
pub(super) fn fold(m: &mut Meta) {
    for b in 0..BLOCKS {
        m.bits[b] |= m.hot[b];
    }
}
