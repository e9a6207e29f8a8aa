//! Promotion: who may, what a new primary's generation says, and what is owed to the application then.

use super::*;

impl World {
    pub(super) fn promote(&self, i: usize, steps: &mut Vec<Step>) {
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
    pub(super) fn owe_what_is_left(&mut self, i: usize) {
        for b in 0..BLOCKS {
            if !self.includes(self.nodes[i].blocks[b], self.nodes[i].owed[b]) {
                self.nodes[i].owed[b] = self.nodes[i].blocks[b];
            }
        }
    }
}
