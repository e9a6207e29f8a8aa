//! The small numbers that name things. All are plain values, cheap to copy.

/// Most copies of one service: itself and seven peers. Slots are numbered 0..=7.
pub const MAX_COPIES: usize = 8;
/// Peer slots in one copy's metadata.
pub const MAX_PEERS: usize = MAX_COPIES - 1;
/// Most volumes in one service.
pub const MAX_VOLUMES: usize = 64;

/// A copy of a service, by its slot in the service's configuration (0..=7), the same on every node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u8);

/// A volume of a service, by its place in the service's configuration (0..64), the same on every node.
/// Volume 0 is the *lead* volume: its metadata also holds what belongs to the service as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeIndex(pub u16);

/// 128-bit random identities. Zero means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub u128);

impl std::fmt::Debug for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}
impl std::fmt::Display for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Random id of one run of a replicator process. Zero means "none".
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Incarnation(pub u64);

/// Random id of a generation. Zero means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GenerationId(pub u64);

impl std::fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl std::fmt::Display for GenerationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Place of a write in the one order of a service, within a generation. 0 = before the first write.
pub type Position = u64;

/// Who may write, and since which promotion. Compared by number; one number has one owner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Epoch {
    /// +1 for each promotion; 0 = nobody was ever promoted.
    pub number: u64,
    /// The slot that owns it; `NO_OWNER` with number 0.
    pub owner: u8,
}

impl Epoch {
    /// Owner of epoch 0.
    pub const NO_OWNER: u8 = 0xff;
    /// Nobody was ever promoted.
    pub const NONE: Epoch = Epoch {
        number: 0,
        owner: Self::NO_OWNER,
    };
}

/// A set of copies, one bit per slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SlotSet(pub u8);

impl SlotSet {
    pub const EMPTY: SlotSet = SlotSet(0);
    pub fn only(slot: Slot) -> Self {
        SlotSet(1 << slot.0)
    }
    pub fn contains(self, slot: Slot) -> bool {
        self.0 & (1 << slot.0) != 0
    }
    #[must_use]
    pub fn with(self, slot: Slot) -> Self {
        SlotSet(self.0 | 1 << slot.0)
    }
    #[must_use]
    pub fn without(self, slot: Slot) -> Self {
        SlotSet(self.0 & !(1 << slot.0))
    }
    #[must_use]
    pub fn union(self, other: SlotSet) -> Self {
        SlotSet(self.0 | other.0)
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }
    pub fn iter(self) -> impl Iterator<Item = Slot> {
        (0..8).map(Slot).filter(move |s| self.contains(*s))
    }
}

impl std::fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter().map(|s| s.0)).finish()
    }
}
