//! Connections: ordered both ways, and broken at any moment with any end of what was on the way lost.

use crate::plan::{MS, Nonsense};
use crate::rng::Rng;
use crate::world::{Backlog, Happening, SERVICE, Stamps, World};
use holdfast_replicator_core::api::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use std::collections::BTreeMap;

/// What travels.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub header: FrameHeader,
    pub body: Body,
    pub data: Option<Stamps>,
    /// Comes a second time: its sender knows nothing of it.
    pub again: bool,
}

/// Frames of data kept for a defective sender that repeats one.
const HISTORY: usize = 40;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// `LinkUp` is on its way.
    Coming,
    Up,
    /// Closed by its own core, or told `LinkDown`.
    Over,
}

struct Connection {
    nodes: [usize; 2],
    ends: [End; 2],
    /// Lives of the processes it was made for.
    lives: [u64; 2],
    session: [SessionId; 2],
    /// Toward that end, in order, with arrival times.
    queue: [Backlog<(u64, Frame)>; 2],
    last_arrival: [u64; 2],
    /// The newest frames of data toward that end.
    history: [Backlog<Frame>; 2],
    /// Nothing more is sent; each end hears of it when what is left was delivered.
    broken: bool,
    /// Since when a direction is cut.
    silent_since: Option<u64>,
}

/// All links.
pub(crate) struct Network {
    /// Some sender was made to be defective: a copy may refuse what it gets.
    pub injected: bool,
    pairs: Vec<(usize, usize)>,
    current: Vec<Option<u64>>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    /// [from][to]
    pub cut: Vec<Vec<u32>>,
    /// Pairs with a slow line.
    pub slow: Vec<bool>,
    /// What was on its way over connections that ended: by the end it would have come to, its life then, the session.
    late: Vec<(usize, usize, u64, SessionId, Frame)>,
    rng: Rng,
}

impl Network {
    pub fn new(copies: usize, rng: Rng) -> Self {
        let mut pairs = Vec::new();
        for a in 0..copies {
            for b in a + 1..copies {
                pairs.push((a, b));
            }
        }
        Network {
            current: vec![None; pairs.len()],
            slow: vec![false; pairs.len()],
            pairs,
            connections: BTreeMap::new(),
            next: 1,
            cut: vec![vec![0; copies]; copies],
            injected: false,
            late: Vec::new(),
            rng,
        }
    }

    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }

    pub fn pair_of(&self, a: usize, b: usize) -> usize {
        self.pairs
            .iter()
            .position(|p| *p == (a.min(b), a.max(b)))
            .unwrap_or(0)
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cut[a][b] > 0 || self.cut[b][a] > 0
    }
}

impl World {
    fn delay(&mut self, pair: usize) -> u64 {
        let base = self.plan.latency;
        let mut delay = base / 2 + self.network.rng.below(base + 1);
        if self.network.rng.chance(10) {
            delay *= 10;
        }
        if self.network.slow[pair] {
            delay += 20 * MS + self.network.rng.below(200 * MS);
        }
        delay
    }

    /// From time to time: connects what wants to be, and notices silence.
    pub(crate) fn dial(&mut self, pair: usize) {
        let again = 20 * MS + self.network.rng.below(200 * MS);
        self.after(again, Happening::Dial(pair));
        let (a, b) = self.network.pairs[pair];
        let cut = self.network.is_cut(a, b);
        if let Some(id) = self.network.current[pair] {
            let now = self.now;
            let Some(c) = self.network.connections.get_mut(&id) else {
                return;
            };
            if c.broken {
                return;
            }
            if cut {
                let since = *c.silent_since.get_or_insert(now);
                if now - since > 1000 * MS {
                    self.break_connection(id, false, "silent for a second");
                }
            } else {
                c.silent_since = None;
            }
            return;
        }
        let ready = |n: usize, m: usize| {
            let node = &self.nodes[n];
            node.core.is_some() && node.frozen.is_none() && node.wants[m]
        };
        if cut || !ready(a, b) || !ready(b, a) {
            return;
        }
        let id = self.network.next;
        self.network.next += 1;
        self.network.current[pair] = Some(id);
        self.network.connections.insert(
            id,
            Connection {
                nodes: [a, b],
                ends: [End::Coming; 2],
                lives: [self.nodes[a].life, self.nodes[b].life],
                session: [SessionId(id * 2), SessionId(id * 2 + 1)],
                queue: [Backlog::new(), Backlog::new()],
                last_arrival: [0; 2],
                history: [Backlog::new(), Backlog::new()],
                broken: false,
                silent_since: None,
            },
        );
        self.coverage.connections += 1;
        let first = self.delay(pair);
        for end in 0..2 {
            let later = self.delay(pair);
            self.after(
                first + later,
                Happening::LinkUp {
                    connection: id,
                    end,
                },
            );
        }
    }

    pub(crate) fn link_up(&mut self, id: u64, end: usize) {
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let node = c.nodes[end];
        let alive = self.nodes[node].life == c.lives[end] && self.nodes[node].core.is_some();
        if c.ends[end] != End::Coming || c.broken || !alive {
            c.ends[end] = End::Over;
            return self.forget_connection(id);
        }
        c.ends[end] = End::Up;
        let (peer, session) = (Slot(c.nodes[1 - end] as u8), c.session[end]);
        self.log(|| format!("link: node {node} is connected to {}", peer.0));
        self.event(
            node,
            Event::LinkUp {
                peer,
                session,
                path: "simulated".into(),
            },
        );
        self.late_frames(node, peer.0 as usize);
        // Frames may have arrived before the process heard of the connection.
        self.after(
            0,
            Happening::Deliver {
                connection: id,
                to: end,
            },
        );
    }

    pub(crate) fn transmit(&mut self, node: usize, to: usize, session: SessionId, frame: Frame) {
        let pair = self.network.pair_of(node, to);
        let Some(id) = self.network.current[pair] else {
            return;
        };
        let delay = self.delay(pair);
        let now = self.now;
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let from = usize::from(c.nodes[1] == node);
        if c.session[from] != session || c.ends[from] != End::Up || c.broken {
            return;
        }
        let to = 1 - from;
        let at = (now + delay).max(c.last_arrival[to]);
        c.last_arrival[to] = at;
        if matches!(
            frame.header.kind,
            FrameKind::Write | FrameKind::Zero | FrameKind::ResyncData | FrameKind::ResyncZero
        ) {
            if c.history[to].len() == HISTORY {
                c.history[to].pop_front();
            }
            c.history[to].push_back(frame.clone());
        }
        c.queue[to].push_back((at, frame));
        self.at(at, Happening::Deliver { connection: id, to });
    }

    /// Frames of a connection that is over come to a process that has a new one: the shell had them in hand.
    fn late_frames(&mut self, node: usize, peer: usize) {
        let life = self.nodes[node].life;
        let all = std::mem::take(&mut self.network.late);
        let (mine, others) = all
            .into_iter()
            .partition(|l: &(usize, usize, u64, SessionId, Frame)| l.0 == node && l.1 == peer);
        self.network.late = others;
        let mine: Vec<_> = mine;
        // At once, or when the copies have settled.
        let latest = [0, 10 * MS, 100 * MS][self.network.rng.index(3)];
        let delay = self.network.rng.below(latest + 1);
        for (_, _, then, session, frame) in mine {
            if then == life && self.network.rng.chance(700) {
                let frame = Box::new(frame);
                self.after(
                    delay,
                    Happening::Late {
                        node,
                        peer,
                        life,
                        session,
                        frame,
                    },
                );
            }
        }
    }

    /// Why this frame ends the connection, if it does: it comes again (D14), or is of an epoch older than the newest that
    /// its receiver accepted (C1).
    fn is_to_be_refused(&self, node: usize, from: usize, frame: &Frame) -> Option<&'static str> {
        let core = self.nodes[node].core.as_ref()?;
        if self.nodes[node].held.is_some() {
            // It has not seen the frame yet.
            return None;
        }
        let changes_data = matches!(
            frame.header.kind,
            FrameKind::Write
                | FrameKind::Zero
                | FrameKind::Flush
                | FrameKind::ResyncData
                | FrameKind::ResyncZero
        );
        if !changes_data || !matches!(self.relation(node, from), "established" | "target") {
            return None;
        }
        if frame.again {
            return Some("D14, it came before, or means nothing");
        }
        let old = frame.header.epoch.number < core.probe().epoch.number;
        old.then_some("C1, it is of an epoch that was superseded")
    }

    /// A defective sender repeats one of its frames of data (D14).
    /// With `nonsense`, it sends one that means nothing.
    pub(crate) fn replay(&mut self, from: usize, to: usize, nonsense: Option<Nonsense>) {
        let pair = self.network.pair_of(from, to);
        let Some(id) = self.network.current[pair] else {
            return;
        };
        let now = self.now;
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let end = usize::from(c.nodes[1] == to);
        if c.broken || c.history[end].is_empty() {
            return;
        }
        let mut frame = match (nonsense, c.history[end].back()) {
            (Some(what), Some(newest)) => {
                let mut frame = newest.clone();
                let header = &mut frame.header;
                header.position += 1;
                match what {
                    Nonsense::NoSuchVolume => header.volume.0 = 77,
                    Nonsense::BehindTheEnd => header.offset += 1 << 40,
                    Nonsense::NotWholeSectors => header.offset += 100,
                    Nonsense::OtherGeneration => header.generation.0 ^= 1,
                }
                frame
            }
            _ => {
                let any = self.network.rng.index(c.history[end].len());
                c.history[end][any].clone()
            }
        };
        frame.again = true;
        self.network.injected = true;
        let at = now.max(c.last_arrival[end]);
        c.last_arrival[end] = at;
        c.queue[end].push_back((at, frame));
        let what = nonsense.map_or("frame repeated".to_owned(), |n| format!("frame: {n:?}"));
        self.coverage.count("faults", &what);
        self.log(|| format!("link: {from} to {to}: {what}"));
        self.at(
            at,
            Happening::Deliver {
                connection: id,
                to: end,
            },
        );
    }

    pub(crate) fn deliver(&mut self, id: u64, to: usize) {
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let (from_node, to_node) = (c.nodes[1 - to], c.nodes[to]);
        if self.network.cut[from_node][to_node] > 0 {
            return;
        }
        let now = self.now;
        while let Some(c) = self.network.connections.get_mut(&id) {
            if c.ends[to] != End::Up || self.nodes[to_node].life != c.lives[to] {
                return;
            }
            if c.queue[to].front().is_none_or(|f| f.0 > now) {
                return;
            }
            let Some((_, frame)) = c.queue[to].pop_front() else {
                return;
            };
            let session = c.session[to];
            let sender = (c.ends[1 - to] == End::Up
                && self.nodes[from_node].life == c.lives[1 - to])
                .then_some(c.session[1 - to]);
            if self.plan.corrupt_per_million > 0
                && self.network.rng.below(1_000_000) < self.plan.corrupt_per_million
            {
                // The frame's CRC finds it: nothing of it is delivered, nor anything after it.
                c.queue[to].clear();
                self.coverage.count("faults", "corrupt frame");
                return self.break_connection(id, true, "a frame was damaged on the way");
            }
            let bytes = u64::from(frame.header.length);
            let is_data = frame.data.is_some() && !frame.again;
            if self.trace_all {
                let h = &frame.header;
                let text = format!(
                    "  {from_node}→{to_node}: {:?} position {} dependency {} stable {} offset {} length {}",
                    h.kind, h.position, h.dependency, h.stable_position, h.offset, h.length
                );
                self.log(|| text);
            }
            let refused = self.is_to_be_refused(to_node, from_node, &frame);
            self.arrived(to_node, from_node, session, frame);
            if let Some(why) = refused
                && self.nodes[to_node].frozen.is_none()
                && matches!(self.relation(to_node, from_node), "established" | "target")
            {
                let kind = format!("node {to_node} takes a frame of node {from_node}: {why}");
                return self.fail(kind);
            }
            if let (Some(session), true) = (sender, is_data) {
                let peer = Slot(to_node as u8);
                self.event(
                    from_node,
                    Event::Drained {
                        peer,
                        session,
                        bytes,
                    },
                );
            }
            if self.failure.is_some() {
                return;
            }
        }
    }

    /// What a core asked for: what is queued goes first, then the other end hears of it.
    pub(crate) fn close(
        &mut self,
        node: usize,
        peer: usize,
        session: SessionId,
        code: GoodbyeCode,
        text: String,
    ) {
        let pair = self.network.pair_of(node, peer);
        let Some(id) = self.network.current[pair] else {
            return;
        };
        let delay = self.delay(pair);
        let now = self.now;
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let from = usize::from(c.nodes[1] == node);
        if c.session[from] != session || c.ends[from] == End::Over {
            return;
        }
        c.ends[from] = End::Over;
        if !c.broken {
            let at = (now + delay).max(c.last_arrival[1 - from]);
            c.last_arrival[1 - from] = at;
            let header = FrameHeader::new(FrameKind::Goodbye, SERVICE);
            let body = Body::Goodbye { code, text };
            let frame = Frame {
                header,
                body,
                data: None,
                again: false,
            };
            c.queue[1 - from].push_back((at, frame));
            self.at(
                at,
                Happening::Deliver {
                    connection: id,
                    to: 1 - from,
                },
            );
            let keep_all = !self.network.rng.chance(200);
            self.break_connection(id, keep_all, "closed by the other end");
        }
        self.forget_connection(id);
    }

    /// The connection ends: of what is on the way, any end may be lost.
    pub(crate) fn break_connection(&mut self, id: u64, keep_all: bool, why: &str) {
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        if c.broken {
            return;
        }
        c.broken = true;
        let nodes = c.nodes;
        for end in 0..2 {
            let other = c.nodes[1 - end];
            let cut = self.network.cut[other][c.nodes[end]] > 0;
            let keep = if cut {
                0
            } else if keep_all {
                c.queue[end].len()
            } else {
                self.network.rng.below(c.queue[end].len() as u64 + 1) as usize
            };
            let lost = c.queue[end].split_off(keep);
            let (node, life, session) = (c.nodes[end], c.lives[end], c.session[end]);
            self.network.late.retain(|l| l.0 != node || l.1 != other);
            let late = lost.into_iter().take(6);
            self.network
                .late
                .extend(late.map(|(_, frame)| (node, other, life, session, frame)));
        }
        let ends = c.ends;
        let arrivals = c.last_arrival;
        self.log(|| {
            format!(
                "link: connection of {} and {} ends: {why}",
                nodes[0], nodes[1]
            )
        });
        for end in 0..2 {
            if ends[end] == End::Over {
                continue;
            }
            // Told soon, or only by silence.
            let delay = if self.network.rng.chance(600) {
                self.network.rng.below(5 * MS)
            } else {
                self.network.rng.below(1200 * MS)
            };
            let at = (self.now + delay).max(arrivals[end]);
            self.at(
                at,
                Happening::LinkDown {
                    connection: id,
                    end,
                },
            );
        }
    }

    /// Both ends of a live connection have heard of it.
    pub(crate) fn both_up(&self, a: usize, b: usize) -> bool {
        let id = self.network.current[self.network.pair_of(a, b)];
        id.and_then(|id| self.network.connections.get(&id))
            .is_some_and(|c| c.ends == [End::Up; 2] && !c.broken)
    }

    pub(crate) fn break_pair(&mut self, a: usize, b: usize) {
        let pair = self.network.pair_of(a, b);
        if let Some(id) = self.network.current[pair] {
            self.break_connection(id, false, "broken");
        }
    }

    /// The same, and nothing of what is on the way arrives.
    pub(crate) fn lose_pair(&mut self, a: usize, b: usize) {
        self.network.cut[a][b] += 1;
        self.network.cut[b][a] += 1;
        self.break_pair(a, b);
        self.network.cut[a][b] -= 1;
        self.network.cut[b][a] -= 1;
    }

    pub(crate) fn link_down(&mut self, id: u64, end: usize) {
        let Some(c) = self.network.connections.get_mut(&id) else {
            return;
        };
        let was = std::mem::replace(&mut c.ends[end], End::Over);
        let (node, peer, session) = (c.nodes[end], c.nodes[1 - end], c.session[end]);
        if was == End::Up && self.nodes[node].life == c.lives[end] {
            self.log(|| format!("link: node {node} hears that the connection to {peer} is over"));
            self.event(
                node,
                Event::LinkDown {
                    peer: Slot(peer as u8),
                    session,
                    reason: "the connection is over".into(),
                },
            );
        }
        self.forget_connection(id);
    }

    /// Sessions never overlap: a new connection comes only when both ends are done with the old one.
    fn forget_connection(&mut self, id: u64) {
        let Some(c) = self.network.connections.get(&id) else {
            return;
        };
        let over =
            |end: usize| c.ends[end] == End::Over || self.nodes[c.nodes[end]].life != c.lives[end];
        if over(0) && over(1) {
            let pair = self.network.pair_of(c.nodes[0], c.nodes[1]);
            if self.network.current[pair] == Some(id) {
                self.network.current[pair] = None;
            }
            self.network.connections.remove(&id);
        } else if over(0) || over(1) {
            self.break_connection(id, true, "one end is gone");
        }
    }

    /// The process of a node is gone, and its ends of all connections with it.
    pub(crate) fn connections_of_dead(&mut self, node: usize) {
        let ids: Vec<u64> = self
            .network
            .connections
            .iter()
            .filter(|(_, c)| c.nodes.contains(&node))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(c) = self.network.connections.get_mut(&id) {
                let end = usize::from(c.nodes[1] == node);
                c.ends[end] = End::Over;
            }
            self.break_connection(id, false, "a process ended");
            self.forget_connection(id);
        }
    }

    /// A line works again: what waited goes on.
    pub(crate) fn cut_over(&mut self, a: usize, b: usize) {
        let ids: Vec<(u64, usize)> = self
            .network
            .connections
            .iter()
            .filter(|(_, c)| c.nodes.contains(&a) && c.nodes.contains(&b))
            .flat_map(|(id, _)| [(*id, 0), (*id, 1)])
            .collect();
        for (connection, to) in ids {
            self.after(0, Happening::Deliver { connection, to });
        }
    }
}
