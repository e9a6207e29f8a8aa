//! The links of the small world: frames in order, encoded and decoded, until the link is cut.

use super::*;

impl World {
    pub fn drop_link(&mut self, a: usize, b: usize, reason: &str) {
        for (x, y) in [(a, b), (b, a)] {
            self.wires.remove(&(x, y));
            if let Some(session) = self.sessions.remove(&(x, y))
                && self.nodes[x].core.is_some()
            {
                self.event(
                    x,
                    Event::LinkDown {
                        peer: Slot(y as u8),
                        session,
                        reason: reason.into(),
                    },
                );
            }
        }
    }

    pub(super) fn deliver(&mut self, from: usize, to: usize) {
        let Some((header, body)) = self
            .wires
            .get_mut(&(from, to))
            .and_then(VecDeque::pop_front)
        else {
            return;
        };
        let Some(session) = self.sessions.get(&(to, from)).copied() else {
            return;
        };
        let header = decode_header(header.as_slice().try_into().unwrap()).unwrap();
        let peer = Slot(from as u8);
        if self.trace {
            eprintln!(
                "{:>8} {from}→{to}: {:?} pos {} dep {} stable {}",
                self.now.0 / 1_000_000,
                header.kind,
                header.position,
                header.dependency,
                header.stable_position
            );
        }
        if header.kind.carries_data() {
            let buf = BufId(self.rng.next() >> 3);
            self.nodes[to].bufs.insert(buf.0, body);
            self.event(
                to,
                Event::Data {
                    peer,
                    session,
                    header,
                    buf,
                },
            );
        } else {
            let body = decode_body(header.kind, &body).unwrap();
            self.event(
                to,
                Event::Control {
                    peer,
                    session,
                    header,
                    body,
                },
            );
        }
    }

    pub(super) fn connect_wanted(&mut self) -> bool {
        for a in 0..self.nodes.len() {
            for b in a + 1..self.nodes.len() {
                let alive = self.nodes[a].core.is_some() && self.nodes[b].core.is_some();
                let linked =
                    self.sessions.contains_key(&(a, b)) || self.sessions.contains_key(&(b, a));
                let cut = self.cut.contains(&(a, b));
                if linked
                    && !(self.sessions.contains_key(&(a, b)) && self.sessions.contains_key(&(b, a)))
                {
                    // One side closed: once the other has read what was sent, it hears of it.
                    let (open, closed) = if self.sessions.contains_key(&(a, b)) {
                        (a, b)
                    } else {
                        (b, a)
                    };
                    if self
                        .wires
                        .get(&(closed, open))
                        .is_none_or(VecDeque::is_empty)
                    {
                        self.drop_link(a, b, "closed by the other side");
                        return true;
                    }
                    continue;
                }
                let wanted = self.nodes[a].wants.contains(&Slot(b as u8))
                    && self.nodes[b].wants.contains(&Slot(a as u8));
                if alive && !linked && !cut && wanted {
                    let session = SessionId(self.next_session);
                    self.next_session += 1;
                    for (x, y) in [(a, b), (b, a)] {
                        self.sessions.insert((x, y), session);
                        self.wires.insert((x, y), VecDeque::new());
                    }
                    for (x, y) in [(a, b), (b, a)] {
                        self.event(
                            x,
                            Event::LinkUp {
                                peer: Slot(y as u8),
                                session,
                                path: "test".into(),
                            },
                        );
                    }
                    return true;
                }
            }
        }
        false
    }

    /// Everything on its way arrives, and what wants to connect does.
    pub fn deliver_all(&mut self) {
        loop {
            let full = self.wires.iter().find(|(_, wire)| !wire.is_empty());
            match full.map(|(pair, _)| *pair) {
                Some((from, to)) => self.deliver(from, to),
                None if self.connect_wanted() => {}
                None => return,
            }
        }
    }
}
