//! Who holds which buffer: numbers the core knows, memory the disk layer owns.
//!
//! Every holder has a handle of its own: the table until `ReleaseBuf`, the ring and the link until they are done.
//! Memory returns with the last one, so nothing here can free what a device still writes to.

use super::budget::Receipt;
use super::memory::Memory;
use holdfast_disk::{Buf, ReadBuf};
use holdfast_frontend::Buffer;
use holdfast_replicator_core::api::BufId;
use slab::Slab;
use std::collections::HashMap;

/// A request's payload, as a frontend sees it: exactly the client's bytes, inside a buffer whose start is at a
/// sector boundary of the volume.
#[derive(Debug)]
pub struct ClientBuf {
    pub(super) buf: Buf,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Its share of the service's budget for clients.
    pub(super) receipt: Option<Receipt>,
}

impl Buffer for ClientBuf {
    fn as_slice(&self) -> &[u8] {
        &self.buf.as_slice()[self.start..self.start + self.len]
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        let range = self.start..self.start + self.len;
        // A frontend has the only handle until it submits, and gives this one away then.
        &mut self
            .buf
            .get_mut()
            .expect("a client's buffer is filled before it is submitted")[range]
    }
}

/// One number's bytes: `len` bytes from `at` of a buffer.
pub(super) struct Entry {
    pub buf: Buf,
    pub at: usize,
    pub len: usize,
    /// The disk may write to it: taken while this was the only handle.
    pub target: Option<ReadBuf>,
    /// Received from a peer: its share of that budget, held as long as this.
    pub _receipt: Option<Receipt>,
}

/// Numbers of one service's buffers.
#[derive(Default)]
pub(super) struct BufTable {
    /// The shell's own: key in the low 32 bits of the number, a serial above, so that none is used twice.
    own: Slab<(u32, Entry)>,
    serial: u32,
    core: HashMap<u64, Entry>,
}

/// Serials stay below bit 62, where the core's numbers begin.
const SERIAL_BITS: u32 = 30;

impl BufTable {
    /// A number for these bytes.
    pub fn insert(&mut self, entry: Entry) -> BufId {
        self.serial = (self.serial + 1) % (1 << SERIAL_BITS);
        let key = self.own.insert((self.serial, entry));
        BufId(u64::from(self.serial) << 32 | key as u64)
    }

    /// A buffer of the core's choice of number.
    pub fn alloc(&mut self, id: BufId, length: u32, memory: &Memory) -> Result<(), std::io::Error> {
        let buf = memory.internal(length as usize)?;
        self.core.insert(
            id.0,
            Entry {
                buf,
                at: 0,
                len: length as usize,
                target: None,
                _receipt: None,
            },
        );
        Ok(())
    }

    pub fn get(&self, id: BufId) -> Option<&Entry> {
        if id.0 >= BufId::CORE {
            return self.core.get(&id.0);
        }
        let (serial, entry) = self.own.get((id.0 & 0xffff_ffff) as usize)?;
        (u64::from(*serial) == id.0 >> 32).then_some(entry)
    }

    pub fn get_mut(&mut self, id: BufId) -> Option<&mut Entry> {
        if id.0 >= BufId::CORE {
            return self.core.get_mut(&id.0);
        }
        let (serial, entry) = self.own.get_mut((id.0 & 0xffff_ffff) as usize)?;
        (u64::from(*serial) == id.0 >> 32).then_some(entry)
    }

    /// Forgets the number; none if it was forgotten before.
    pub fn remove(&mut self, id: BufId) -> Option<Entry> {
        if id.0 >= BufId::CORE {
            return self.core.remove(&id.0);
        }
        self.get(id)?;
        Some(self.own.remove((id.0 & 0xffff_ffff) as usize).1)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.own.len() + self.core.len()
    }
}

impl Entry {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buf.as_slice()[self.at..self.at + self.len]
    }

    /// A handle for the disk to read into.
    pub fn read_target(&mut self) -> Option<ReadBuf> {
        match &self.target {
            Some(target) => Some(target.clone()),
            None => self.buf.read_target(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::memory::{Budgets, Memory};

    #[test]
    fn a_number_is_never_taken_for_a_later_buffer() {
        let memory = Memory::new(Budgets {
            client: 1 << 20,
            internal: 1 << 20,
        })
        .unwrap();
        let mut table = BufTable::default();
        let entry = || Entry {
            buf: memory.internal(4096).unwrap(),
            at: 0,
            len: 4096,
            target: None,
            _receipt: None,
        };
        let first = table.insert(entry());
        assert!(table.remove(first).is_some());
        let second = table.insert(entry());
        assert!(table.get(first).is_none() && table.remove(first).is_none());
        assert!(table.get(second).is_some());
        table.alloc(BufId(BufId::CORE), 4096, &memory).unwrap();
        assert_eq!(table.len(), 2);
        assert!(table.remove(BufId(BufId::CORE)).is_some());
    }
}
