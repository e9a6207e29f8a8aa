//! Where a buffer lies in the arena: nine size classes, each half of the next, over chunks of 1 MiB.
//!
//! Pure arithmetic on numbers, so that it can be tested without memory. A piece is split in two when a smaller one
//! is asked for, and two free neighbours become one piece again at once: a pool that served small requests for
//! a week can still serve a large one. A buffer never takes twice what it needs.

/// Bytes of the smallest class; everything handed out is aligned to it.
pub const PAGE: usize = 4096;
/// Bytes of the largest class. Longer buffers are runs of whole chunks.
pub const CHUNK: usize = 1 << 20;
const LEVELS: usize = 9;
const NONE: u32 = u32::MAX;

/// A piece of the arena: `offset` in bytes, `size` in bytes (a class, or a multiple of [`CHUNK`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    pub offset: usize,
    pub size: usize,
}

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
    free: bool,
}

/// One size class: which of its pieces are free, as a doubly linked list through an array, so that a neighbour can
/// be taken out of the middle when two pieces become one.
struct Level {
    links: Vec<Link>,
    head: u32,
}

impl Level {
    fn new(pieces: usize) -> Self {
        Level {
            links: vec![
                Link {
                    prev: NONE,
                    next: NONE,
                    free: false
                };
                pieces
            ],
            head: NONE,
        }
    }

    fn put(&mut self, index: u32) {
        let head = self.head;
        let link = &mut self.links[index as usize];
        assert!(!link.free, "piece freed twice");
        *link = Link {
            prev: NONE,
            next: head,
            free: true,
        };
        if head != NONE {
            self.links[head as usize].prev = index;
        }
        self.head = index;
    }

    fn take(&mut self, index: u32) {
        let Link { prev, next, free } = self.links[index as usize];
        assert!(free, "piece taken twice");
        if prev == NONE {
            self.head = next;
        } else {
            self.links[prev as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].prev = prev;
        }
        self.links[index as usize] = Link {
            prev: NONE,
            next: NONE,
            free: false,
        };
    }

    fn pop(&mut self) -> Option<u32> {
        let index = self.head;
        (index != NONE).then(|| {
            self.take(index);
            index
        })
    }
}

/// Which bytes of an arena are free.
pub struct Arena {
    /// `levels[0]` holds pieces of 4 KiB, `levels[8]` chunks of 1 MiB.
    levels: [Level; LEVELS],
    used: usize,
    chunks: usize,
}

fn level_size(level: usize) -> usize {
    PAGE << level
}

/// Bytes really set aside for a buffer of `len` bytes.
pub fn rounded(len: usize) -> usize {
    if len > CHUNK {
        return len.next_multiple_of(CHUNK);
    }
    (0..LEVELS)
        .map(level_size)
        .find(|size| *size >= len)
        .unwrap_or(CHUNK)
}

impl Arena {
    /// An arena of `chunks` MiB, all free.
    ///
    /// # Panics
    /// With more than 2^23 chunks (8 TiB).
    pub fn new(chunks: usize) -> Self {
        assert!(
            chunks <= 1 << 23,
            "an arena of {chunks} MiB is larger than its numbering"
        );
        let mut levels = std::array::from_fn(|level| Level::new(chunks << (LEVELS - 1 - level)));
        // Backwards, so that the lowest addresses are handed out first and the rest stays in whole chunks.
        for chunk in (0..chunks as u32).rev() {
            levels[LEVELS - 1].put(chunk);
        }
        Arena {
            levels,
            used: 0,
            chunks,
        }
    }

    /// Bytes set aside at this moment.
    pub fn used(&self) -> usize {
        self.used
    }

    /// A piece of at least `len` bytes (1 or more), or `None` when no piece of its class is free. Longer than 1 MiB:
    /// a run of neighbouring chunks, searched from the start.
    pub fn alloc(&mut self, len: usize) -> Option<Piece> {
        assert!(len > 0, "a buffer of no bytes");
        let size = rounded(len);
        let offset = if size > CHUNK {
            self.run(size / CHUNK)? * CHUNK
        } else {
            self.single(size)?
        };
        self.used += size;
        Some(Piece { offset, size })
    }

    /// Gives a piece back.
    ///
    /// # Panics
    /// If it was not handed out.
    pub fn free(&mut self, piece: Piece) {
        assert!(self.used >= piece.size, "more freed than handed out");
        self.used -= piece.size;
        if piece.size > CHUNK {
            for chunk in (piece.offset / CHUNK..(piece.offset + piece.size) / CHUNK).rev() {
                self.levels[LEVELS - 1].put(chunk as u32);
            }
            return;
        }
        let mut level = (0..LEVELS)
            .find(|level| level_size(*level) == piece.size)
            .expect("size of a class");
        let mut index = (piece.offset / piece.size) as u32;
        while level + 1 < LEVELS {
            let neighbour = index ^ 1;
            if !self.levels[level].links[neighbour as usize].free {
                break;
            }
            self.levels[level].take(neighbour);
            level += 1;
            index >>= 1;
        }
        self.levels[level].put(index);
    }

    fn single(&mut self, size: usize) -> Option<usize> {
        let wanted = (0..LEVELS).find(|level| level_size(*level) == size)?;
        let from = (wanted..LEVELS).find(|level| self.levels[*level].head != NONE)?;
        let mut index = self.levels[from].pop()?;
        for level in (wanted..from).rev() {
            index <<= 1;
            self.levels[level].put(index + 1);
        }
        Some(index as usize * size)
    }

    fn run(&mut self, wanted: usize) -> Option<usize> {
        let top = &mut self.levels[LEVELS - 1];
        let mut length = 0;
        for chunk in 0..self.chunks {
            length = if top.links[chunk].free { length + 1 } else { 0 };
            if length == wanted {
                let first = chunk + 1 - wanted;
                for taken in first..=chunk {
                    top.take(taken as u32);
                }
                return Some(first);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn classes_round_up_and_long_buffers_take_whole_chunks() {
        assert_eq!(rounded(1), 4096);
        assert_eq!(rounded(4097), 8192);
        assert_eq!(rounded(300_000), CHUNK / 2);
        assert_eq!(rounded(CHUNK + 1), 2 * CHUNK);
        for len in (PAGE..3 * CHUNK).step_by(511) {
            assert!(rounded(len) < 2 * len, "{len}");
        }
    }

    #[test]
    fn a_full_arena_holds_as_many_buffers_as_fit() {
        for len in [4096, 8192, 32 << 10, 128 << 10, 512 << 10] {
            let mut arena = Arena::new(2);
            let held: Vec<_> = std::iter::from_fn(|| arena.alloc(len)).collect();
            assert_eq!(held.len() * len, 2 * CHUNK, "{len}");
        }
    }

    #[test]
    fn small_pieces_become_whole_chunks_again() {
        let mut arena = Arena::new(2);
        let pieces: Vec<_> = (0..512).map(|_| arena.alloc(4096).expect("room")).collect();
        assert!(arena.alloc(1).is_none());
        for piece in pieces {
            arena.free(piece);
        }
        assert_eq!(arena.used(), 0);
        assert!(
            arena.alloc(2 * CHUNK).is_some(),
            "two whole neighbouring chunks"
        );
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn freeing_twice_is_noticed() {
        let mut arena = Arena::new(1);
        let a = arena.alloc(4096).expect("room");
        arena.alloc(4096).expect("room");
        arena.free(a);
        arena.free(a);
    }

    proptest! {
        /// Pieces never overlap, never leave the arena, and everything merges back.
        #[test]
        fn pieces_never_overlap(steps in prop::collection::vec((any::<bool>(), 1usize..3 * CHUNK, any::<prop::sample::Index>()), 1..200)) {
            let mut arena = Arena::new(8);
            let mut held: Vec<Piece> = Vec::new();
            for (give_back, len, which) in steps {
                if give_back && !held.is_empty() {
                    let at = which.index(held.len());
                    arena.free(held.swap_remove(at));
                } else if let Some(piece) = arena.alloc(len) {
                    prop_assert!(piece.size >= len && piece.offset % PAGE == 0 && piece.offset + piece.size <= 8 * CHUNK);
                    for other in &held {
                        prop_assert!(piece.offset + piece.size <= other.offset || other.offset + other.size <= piece.offset);
                    }
                    held.push(piece);
                }
                prop_assert_eq!(arena.used(), held.iter().map(|piece| piece.size).sum::<usize>());
            }
            for piece in held.drain(..) {
                arena.free(piece);
            }
            prop_assert!(arena.alloc(8 * CHUNK).is_some());
        }
    }
}
