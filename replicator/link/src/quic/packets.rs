//! Memory that packets are received into, and in which QUIC decrypts them: nothing is copied on the way.

use bytes::BytesMut;
use std::io::IoSliceMut;

/// Bytes of one receive: the kernel joins packets up to what one packet can hold.
const SLOT: usize = 64 << 10;
/// From here on a receive is worth the slot it came in; QUIC may hold what is less for long, and a whole slot with it.
const LARGE: usize = SLOT / 2;
/// Small receives that are copied after one was still held when its slot was needed again.
const CAREFUL: u32 = 64;

/// Slots for what one call receives.
#[derive(Default)]
pub(super) struct Packets {
    slots: Vec<BytesMut>,
    /// So many small receives are copied.
    careful: u32,
}

impl Packets {
    /// Room for `count` receives.
    pub fn room<R>(&mut self, count: usize, receive: impl FnOnce(&mut [IoSliceMut<'_>]) -> R) -> R {
        if self.slots.len() < count {
            self.slots.resize_with(count, BytesMut::new);
        }
        for slot in &mut self.slots[..count] {
            if slot.len() == SLOT {
                continue;
            }
            slot.clear();
            if slot.try_reclaim(SLOT) {
                // SAFETY: the capacity is there. The memory is that of `zeroed` below: nobody else holds a part of it any more, and who did has
                // written initialized bytes only.
                unsafe { slot.set_len(SLOT) };
            } else {
                // What came in it is still held. Large or small is not known any more; large ones are never copied anyway.
                if slot.capacity() > SLOT - LARGE {
                    self.careful = CAREFUL;
                }
                *slot = BytesMut::zeroed(SLOT);
            }
        }
        let mut slots = self.slots[..count].iter_mut();
        let mut bufs: [IoSliceMut<'_>; quinn::udp::BATCH_SIZE] =
            std::array::from_fn(|_| match slots.next() {
                Some(slot) => IoSliceMut::new(slot),
                None => IoSliceMut::new(&mut []),
            });
        receive(&mut bufs[..count])
    }

    /// What a receive brought.
    pub fn take(&mut self, at: usize, length: usize) -> BytesMut {
        let slot = &mut self.slots[at];
        if length < LARGE && self.careful > 0 {
            self.careful -= 1;
            return BytesMut::from(&slot[..length]);
        }
        slot.split_to(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Receives `length` bytes of `mark`.
    fn receive(packets: &mut Packets, length: usize, mark: u8) -> BytesMut {
        packets.room(1, |bufs| {
            assert_eq!((bufs.len(), bufs[0].len()), (1, SLOT));
            bufs[0][..length].fill(mark);
        });
        packets.take(0, length)
    }

    /// A packet is in the very memory that it was received into, and that serves the next one once the packet is gone.
    #[test]
    fn memory_is_handed_over_and_comes_back() {
        let mut packets = Packets::default();
        for length in [60_000, 100, SLOT, 1, 4_300] {
            let first = receive(&mut packets, length, 1);
            let at = first.as_ptr();
            assert_eq!(&first[..], vec![1; length]);
            drop(first);
            let second = receive(&mut packets, length, 2);
            assert_eq!(second.as_ptr(), at);
        }
    }

    /// What is held stays as it was; many small packets that are held do not hold a slot each.
    #[test]
    fn what_is_held_keeps_its_bytes_and_little_memory() {
        let mut packets = Packets::default();
        let (mut held, mut in_slots) = (Vec::new(), 0);
        for mark in 0..128u8 {
            held.push(packets_and_count(&mut packets, mark, &mut in_slots));
        }
        for (mark, packet) in held.iter().enumerate() {
            assert_eq!(&packet[..], vec![mark as u8; 1000]);
        }
        assert!(in_slots <= 3, "{in_slots}");
    }

    fn packets_and_count(packets: &mut Packets, mark: u8, in_slots: &mut u32) -> BytesMut {
        let packet = receive(packets, 1000, mark);
        // It took a part of its slot with it.
        *in_slots += u32::from(packets.slots[0].len() < SLOT);
        packet
    }
}
