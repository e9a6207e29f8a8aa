//! What an application and a person ask of a node of the small world, and what they see.

use super::*;

impl World {
    /// Reads `length` bytes on node `n`; the bytes are in `read_bytes` once it completed.
    pub fn read(&mut self, n: usize, volume: u16, offset: u64, length: u32) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let buf = BufId(request.0 + (1 << 40));
        self.nodes[n]
            .bufs
            .insert(buf.0, vec![0xee; length as usize]);
        self.event(
            n,
            Event::Read {
                request,
                volume: VolumeIndex(volume),
                offset,
                length,
                buf,
            },
        );
        request
    }

    pub fn read_bytes(&mut self, n: usize, request: RequestId) -> Vec<u8> {
        self.nodes[n].bufs[&(request.0 + (1 << 40))].clone()
    }

    pub fn promote(&mut self, n: usize, force: bool) -> AdminResult {
        let admin = self.admin(n, Command::Promote { force });
        self.until("the promotion is answered", 20_000, |w| {
            w.nodes[n].admin.contains_key(&admin)
        });
        self.nodes[n].admin[&admin].clone()
    }

    pub fn command(&mut self, n: usize, command: Command) -> AdminResult {
        let admin = self.admin(n, command);
        self.until("the command is answered", 40_000, |w| {
            w.nodes[n].admin.contains_key(&admin)
        });
        self.nodes[n].admin[&admin].clone()
    }

    /// Issues a write of whole sectors; returns the request.
    pub fn write(
        &mut self,
        n: usize,
        volume: u16,
        offset: u64,
        bytes: Vec<u8>,
        fua: bool,
    ) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let buf = BufId(request.0 + (1 << 40));
        let length = bytes.len() as u32;
        self.nodes[n].bufs.insert(buf.0, bytes);
        self.event(
            n,
            Event::Write {
                request,
                volume: VolumeIndex(volume),
                offset,
                length,
                buf,
                fua,
                crc: 0,
            },
        );
        request
    }

    pub fn flush(&mut self, n: usize) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        self.event(n, Event::Flush { request });
        request
    }

    pub fn status_of(&self, n: usize, request: RequestId) -> Option<Status> {
        self.nodes[n]
            .completed
            .iter()
            .find(|c| c.0 == request)
            .map(|c| c.1)
    }

    pub fn settled(&self, slots: &[usize]) -> bool {
        slots.iter().all(|n| {
            let Some(core) = &self.nodes[*n].core else {
                return false;
            };
            let status = core.status(self.now);
            status
                .peers
                .iter()
                .filter(|p| slots.contains(&(p.slot.0 as usize)))
                .all(|p| {
                    p.link == holdfast_replicator_core::status::LinkState::Established
                        && p.unacknowledged_bytes == 0
                })
        })
    }

    pub fn up_to_date(&self, n: usize) -> bool {
        self.nodes[n]
            .core
            .as_ref()
            .is_some_and(|c| c.status(self.now).state == CopyState::UpToDate)
    }
}
