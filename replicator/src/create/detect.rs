//! What is on a device: filesystems, partition tables, our own metadata. Only enough to refuse to write over them.

use holdfast_disk::{Backing, DiskError};
use holdfast_wire_format::superblock::{self, SuperblockError};

/// Why the end of a device may not be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Behind {
    /// A filesystem reaches to this byte.
    Filesystem { kind: &'static str, end: u64 },
    /// The partition table keeps its second copy at the end.
    PartitionTable,
    /// Nothing that is known here.
    Unknown,
}

impl Behind {
    /// In words, for a volume of `data_size` bytes.
    pub fn describe(&self, data_size: u64) -> String {
        match self {
            Behind::Filesystem { kind, end } => format!(
                "the {kind} on it reaches to byte {end}, and metadata would begin behind byte {data_size}"
            ),
            Behind::PartitionTable => {
                "it has a partition table, whose second copy is at its end".into()
            }
            Behind::Unknown => {
                format!(
                    "what is on it is not known, so nobody can say whether something is behind byte {data_size}"
                )
            }
        }
    }
}

/// Whether everything that is on the device ends before byte `data_size`. The outer error is the disk's.
pub fn behind(backing: &Backing, data_size: u64) -> Result<Result<(), Behind>, DiskError> {
    let head = read(backing, 0, 4096)?;
    if is_gpt(&head) {
        return Ok(Err(Behind::PartitionTable));
    }
    Ok(match filesystem(&head) {
        Some((_, end)) if end <= data_size => Ok(()),
        Some((kind, end)) => Err(Behind::Filesystem { kind, end }),
        None => Err(Behind::Unknown),
    })
}

/// What is within `reach` bytes of either end, in words; none if all of that reads zero.
pub fn content(backing: &Backing, reach: u64) -> Result<Option<String>, DiskError> {
    let size = backing.size();
    let head = read(backing, 0, reach.min(size))?;
    if is_gpt(&head) {
        return Ok(Some("a partition table".into()));
    }
    if let Some((kind, end)) = filesystem(&head) {
        return Ok(Some(format!("a filesystem ({kind}, {end} bytes)")));
    }
    let tail = read(backing, size.saturating_sub(reach), reach.min(size))?;
    let used = head.iter().chain(&tail).any(|byte| *byte != 0);
    Ok(used.then(|| "data".to_owned()))
}

/// Whether a block is a superblock of ours, of any version and in any state of repair.
pub fn is_superblock(block: &[u8; 4096]) -> bool {
    !matches!(superblock::decode(block), Err(SuperblockError::Absent))
}

fn read(backing: &Backing, offset: u64, len: u64) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; len.min(backing.size() - offset) as usize];
    backing.read_exact_at(offset, &mut bytes)?;
    Ok(bytes)
}

fn is_gpt(head: &[u8]) -> bool {
    [512, 4096]
        .iter()
        .any(|at| head.get(*at..at + 8) == Some(b"EFI PART"))
}

/// Kind and end, in bytes, of the filesystem that begins with these bytes.
fn filesystem(head: &[u8]) -> Option<(&'static str, u64)> {
    let le32 = |at: usize| {
        Some(u64::from(u32::from_le_bytes(
            head.get(at..at + 4)?.try_into().ok()?,
        )))
    };
    let be32 = |at: usize| {
        Some(u64::from(u32::from_be_bytes(
            head.get(at..at + 4)?.try_into().ok()?,
        )))
    };
    const EXT: usize = 1024;
    if head.get(EXT + 56..EXT + 58) == Some(&[0x53, 0xef]) {
        let shift = 10 + le32(EXT + 24)?;
        // The high half of the block count counts with the feature "64bit".
        let wide = le32(EXT + 96)? & 0x80 != 0;
        let high = if wide { le32(EXT + 0x150)? } else { 0 };
        let blocks = le32(EXT + 4)? | high << 32;
        return Some((
            "ext2, ext3 or ext4",
            blocks.checked_shl(u32::try_from(shift).ok()?)?,
        ));
    }
    if head.get(..4) == Some(b"XFSB") {
        let blocks = be32(8)? << 32 | be32(12)?;
        return Some(("XFS", blocks.checked_mul(be32(4)?)?));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_known_filesystems() {
        let mut ext = vec![0; 4096];
        ext[1024 + 56..1024 + 58].copy_from_slice(&[0x53, 0xef]);
        ext[1024 + 24..1024 + 28].copy_from_slice(&2u32.to_le_bytes());
        ext[1024 + 4..1024 + 8].copy_from_slice(&1000u32.to_le_bytes());
        ext[1024 + 0x150..1024 + 0x154].copy_from_slice(&1u32.to_le_bytes());
        assert_eq!(filesystem(&ext), Some(("ext2, ext3 or ext4", 4_096_000)));
        ext[1024 + 96] = 0x80;
        assert_eq!(filesystem(&ext).unwrap().1, 4_096_000 + (4096 << 32));
        let mut xfs = vec![0; 4096];
        xfs[..4].copy_from_slice(b"XFSB");
        xfs[4..8].copy_from_slice(&4096u32.to_be_bytes());
        xfs[8..16].copy_from_slice(&25_600u64.to_be_bytes());
        assert_eq!(filesystem(&xfs), Some(("XFS", 25_600 * 4096)));
        assert_eq!(filesystem(&[0; 4096]), None);
        assert_eq!(filesystem(&[]), None);
    }
}
