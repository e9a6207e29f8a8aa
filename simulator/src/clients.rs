//! Applications: overlapping writes, reads, flushes, zeroes on several volumes, with reconnects.

use crate::disk::SECTOR;
use crate::oracle::WriteId;
use crate::plan::{MS, Plan};
use crate::rng::Rng;
use crate::world::{Happening, World};
use holdfast_replicator_core::api::*;
use holdfast_wire_format::ids::*;
use std::collections::BTreeMap;
use std::rc::Rc;

#[derive(Clone, Copy, Debug)]
enum What {
    Write(WriteId),
    /// A read-modify-write: the range is locked first.
    Locked {
        volume: usize,
        first: u64,
        count: u64,
        write: Option<WriteId>,
    },
    Read {
        buf: BufId,
        volume: usize,
        first: u64,
    },
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    client: usize,
    node: usize,
    tenure: Option<usize>,
    invoked: u64,
    what: What,
}

#[derive(Clone, Debug, Default)]
struct Client {
    in_flight: usize,
    blocked: bool,
    issued: u64,
}

/// All of them.
pub(crate) struct Clients {
    clients: Vec<Client>,
    requests: BTreeMap<u64, Request>,
    next_request: u64,
    pub stopped: bool,
}

impl Clients {
    pub fn new(plan: &Plan) -> Self {
        Clients {
            clients: vec![Client::default(); plan.clients],
            requests: BTreeMap::new(),
            next_request: 1,
            stopped: false,
        }
    }

    /// Requests not answered.
    pub fn open(&self) -> usize {
        self.requests.len()
    }
}

impl World {
    /// A client may ask for something.
    pub(crate) fn client_turn(&mut self, at: usize) {
        if self.clients.stopped {
            return;
        }
        if self.clients.clients[at].in_flight >= self.plan.depth {
            self.clients.clients[at].blocked = true;
            return;
        }
        let number = self.clients.clients[at].issued;
        let mut rng = Rng::stream(self.plan.seed, (at as u64 + 1) << 40 | number);
        let primaries: Vec<usize> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].core.is_some() && self.nodes[*n].role == Role::Primary)
            .collect();
        let anybody = rng.chance(10);
        let node = if primaries.is_empty() || anybody {
            let alive: Vec<usize> = (0..self.nodes.len())
                .filter(|n| self.nodes[*n].core.is_some())
                .collect();
            if alive.is_empty() || !anybody {
                return self.after(10 * MS, Happening::Client(at));
            }
            alive[rng.index(alive.len())]
        } else {
            primaries[rng.index(primaries.len())]
        };
        self.clients.clients[at].issued += 1;
        let again = if (number + 1).is_multiple_of(self.plan.burst) {
            rng.below(2 * self.plan.pause + 1)
        } else {
            rng.below(self.plan.think + 1) + 1000
        };
        if !self.plan.dropped_requests.contains(&(at, number)) {
            self.issue_request(at, node, &mut rng);
        }
        self.after(again, Happening::Client(at));
    }

    fn issue_request(&mut self, at: usize, node: usize, rng: &mut Rng) {
        let volume = rng.index(self.plan.volumes.len());
        let size = self.nodes[node].sizes[volume];
        let most = [1, 2, 8, 8, 16, 128][rng.index(6)].min(size);
        let count = rng.between(1, most);
        let room = if rng.chance(900) {
            self.plan.hot_sectors.max(count).min(size)
        } else {
            size
        };
        let mut first = rng.below(room - count + 1);
        let mut count = count;
        if rng.chance(500) {
            // Whole blocks.
            first = first / 8 * 8;
            count = count.div_ceil(8) * 8;
            count = count.min(size - first);
        }
        let fua = rng.chance(60);
        let request = RequestId(self.clients.next_request);
        self.clients.next_request += 1;
        let now = self.now;
        let (vol, offset) = (VolumeIndex(volume as u16), first * SECTOR);
        let length = (count * SECTOR) as u32;
        let kind = rng.below(1000);
        let (what, event) = if kind < 550 {
            let (id, stamp) = self
                .oracle
                .write_invoked(now, node, volume, first, count, false, fua);
            let buf = self.client_buf(node, count, stamp);
            (
                What::Write(id),
                Event::Write {
                    request,
                    volume: vol,
                    offset,
                    length,
                    buf,
                    fua,
                    crc: 0,
                },
            )
        } else if kind < 800 {
            let buf = self.client_buf(node, count, 0xdead);
            (
                What::Read { buf, volume, first },
                Event::Read {
                    request,
                    volume: vol,
                    offset,
                    length,
                    buf,
                },
            )
        } else if kind < 880 {
            (What::Flush, Event::Flush { request })
        } else if kind < 950 {
            let (id, _) = self
                .oracle
                .write_invoked(now, node, volume, first, count, true, fua);
            (
                What::Write(id),
                Event::Zero {
                    request,
                    volume: vol,
                    offset,
                    length: u64::from(length),
                    unmap: rng.chance(500),
                    fua,
                },
            )
        } else {
            (
                What::Locked {
                    volume,
                    first,
                    count,
                    write: None,
                },
                Event::Lock {
                    request,
                    volume: vol,
                    offset,
                    length,
                },
            )
        };
        self.coverage.requests += 1;
        let tenure = self.oracle.tenure_of(node);
        self.clients.requests.insert(
            request.0,
            Request {
                client: at,
                node,
                tenure,
                invoked: now,
                what,
            },
        );
        self.clients.clients[at].in_flight += 1;
        self.log(|| {
            format!(
                "client {at} at node {node}: {}",
                describe(request, what, &event)
            )
        });
        self.event(node, event);
    }

    fn client_buf(&mut self, node: usize, count: u64, stamp: u64) -> BufId {
        let n = &mut self.nodes[node];
        let buf = BufId(n.next_buf);
        n.next_buf += 1;
        n.bufs.insert(buf.0, Rc::new(vec![stamp; count as usize]));
        buf
    }

    pub(crate) fn granted(&mut self, node: usize, request: RequestId) {
        let Some(open) = self.clients.requests.get(&request.0).copied() else {
            return self.fail(format!("node {node} grants {request:?} that nobody asked"));
        };
        let What::Locked {
            volume,
            first,
            count,
            write: None,
        } = open.what
        else {
            return self.fail(format!("node {node} grants {request:?} twice"));
        };
        let now = self.now;
        let (id, stamp) = self
            .oracle
            .write_invoked(now, node, volume, first, count, false, false);
        if let Some(open) = self.clients.requests.get_mut(&request.0) {
            open.what = What::Locked {
                volume,
                first,
                count,
                write: Some(id),
            };
        }
        let buf = self.client_buf(node, count, stamp);
        let event = Event::Write {
            request,
            volume: VolumeIndex(volume as u16),
            offset: first * SECTOR,
            length: (count * SECTOR) as u32,
            buf,
            fua: false,
            crc: 0,
        };
        self.log(|| format!("  {request:?} has its lock and writes {stamp}"));
        let life = self.nodes[node].life;
        self.after(
            1000,
            Happening::Process {
                node,
                life,
                event: Box::new(event),
            },
        );
    }

    pub(crate) fn completed(&mut self, node: usize, request: RequestId, status: Status) {
        let Some(open) = self.clients.requests.remove(&request.0) else {
            return self.fail(format!("node {node} answers {request:?} twice"));
        };
        let now = self.now;
        let ok = status == Status::Ok;
        self.log(|| format!("  node {node}: {request:?} ends: {status:?}"));
        self.coverage.status(status);
        let set = self.nodes[node]
            .core
            .as_ref()
            .map_or(SlotSet::EMPTY, |c| c.probe().required);
        match open.what {
            What::Write(id) => {
                let result = self.oracle.write_ended(now, id, ok, set);
                self.check(result);
                if ok {
                    self.held_where_it_must(node, set, id);
                } else {
                    self.ask_again(open.client, id);
                }
            }
            What::Locked { write, .. } => {
                if let Some(id) = write {
                    let result = self.oracle.write_ended(now, id, ok, set);
                    self.check(result);
                    if ok {
                        self.held_where_it_must(node, set, id);
                    }
                    let life = self.nodes[node].life;
                    self.after(
                        500,
                        Happening::Process {
                            node,
                            life,
                            event: Box::new(Event::Unlock { request }),
                        },
                    );
                }
            }
            What::Read { buf, volume, first } => {
                let stamps = self.nodes[node].bufs.remove(&buf.0);
                if ok && let Some(stamps) = stamps {
                    let result = self.oracle.read_ended(
                        node,
                        open.tenure,
                        volume,
                        first,
                        &stamps,
                        open.invoked,
                        now,
                    );
                    self.check(result);
                }
            }
            What::Flush => {
                if ok {
                    self.oracle.flush_ended(node, open.invoked, now);
                    self.flushed_where_it_must(node, set, open.invoked);
                }
            }
        }
        self.client_free(open.client);
    }

    fn client_free(&mut self, at: usize) {
        let client = &mut self.clients.clients[at];
        client.in_flight -= 1;
        if std::mem::take(&mut client.blocked) {
            let delay = self.rng.below(self.plan.think + 1);
            self.after(delay, Happening::Client(at));
        }
    }

    /// Some clients send what was not answered, or answered with an error, once more.
    fn ask_again(&mut self, client: usize, write: WriteId) {
        if self.rng.chance(300) {
            let delay = self.rng.below(300 * MS);
            self.after(delay, Happening::Again { client, write });
        }
    }

    pub(crate) fn client_again(&mut self, client: usize, old: WriteId) {
        if self.clients.stopped {
            return;
        }
        let primary = (0..self.nodes.len())
            .rev()
            .find(|n| self.nodes[*n].core.is_some() && self.nodes[*n].role == Role::Primary);
        let Some(node) = primary else {
            return self.after(50 * MS, Happening::Again { client, write: old });
        };
        let now = self.now;
        let (volume, first, count, zero, fua) = self.oracle.asked(old);
        let (id, stamp) = self.oracle.write_again(now, node, old);
        let request = RequestId(self.clients.next_request);
        self.clients.next_request += 1;
        let (vol, offset) = (VolumeIndex(volume as u16), first * SECTOR);
        let length = (count * SECTOR) as u32;
        let event = if zero {
            Event::Zero {
                request,
                volume: vol,
                offset,
                length: u64::from(length),
                unmap: true,
                fua,
            }
        } else {
            let buf = self.client_buf(node, count, stamp);
            Event::Write {
                request,
                volume: vol,
                offset,
                length,
                buf,
                fua,
                crc: 0,
            }
        };
        self.coverage.requests += 1;
        self.coverage.count("faults", "request sent again");
        let tenure = self.oracle.tenure_of(node);
        let what = What::Write(id);
        self.clients.requests.insert(
            request.0,
            Request {
                client,
                node,
                tenure,
                invoked: now,
                what,
            },
        );
        self.clients.clients[client].in_flight += 1;
        self.log(|| {
            format!(
                "client {client} at node {node}, again: {}",
                describe(request, what, &event)
            )
        });
        self.event(node, event);
    }

    /// A process is gone: its clients never hear how their requests ended.
    pub(crate) fn clients_lost(&mut self, node: usize) {
        let lost: Vec<u64> = self
            .clients
            .requests
            .iter()
            .filter(|(_, r)| r.node == node)
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            if let Some(request) = self.clients.requests.remove(&id) {
                self.client_free(request.client);
                if let What::Write(write) = request.what {
                    self.ask_again(request.client, write);
                }
            }
        }
    }
}

fn describe(request: RequestId, what: What, event: &Event) -> String {
    match (what, event) {
        (
            What::Write(id),
            Event::Write {
                volume,
                offset,
                length,
                fua,
                ..
            },
        ) => format!(
            "{request:?} writes {} to volume {} sectors {}+{}{}",
            id + 1,
            volume.0,
            offset / SECTOR,
            u64::from(*length) / SECTOR,
            if *fua { " FUA" } else { "" }
        ),
        (
            What::Write(_),
            Event::Zero {
                volume,
                offset,
                length,
                fua,
                ..
            },
        ) => format!(
            "{request:?} zeroes volume {} sectors {}+{}{}",
            volume.0,
            offset / SECTOR,
            length / SECTOR,
            if *fua { " FUA" } else { "" }
        ),
        (What::Read { volume, first, .. }, Event::Read { length, .. }) => format!(
            "{request:?} reads volume {volume} sectors {first}+{}",
            u64::from(*length) / SECTOR
        ),
        (
            What::Locked {
                volume,
                first,
                count,
                ..
            },
            _,
        ) => format!("{request:?} locks volume {volume} sectors {first}+{count}"),
        _ => format!("{request:?} flushes"),
    }
}
