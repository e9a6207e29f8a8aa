//! Two copies meet, do what `decide` says, and one is filled until both are in sync.

use super::life::fold;
use super::*;

impl World {
    /// Both are up and reach each other.
    pub(super) fn meet(
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

    pub(super) fn resync_steps(&self, steps: &mut Vec<Step>) {
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

/// The newest generation both have.
pub(super) fn common(a: &Facts, b: &Facts) -> GenerationId {
    history::chain(a)
        .into_iter()
        .rev()
        .find(|id| history::holds(b, *id))
        .unwrap_or(GenerationId(0))
}

pub(super) fn mutate(d: &mut Decision, mutation: Mutation) {
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
