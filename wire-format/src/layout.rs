//! Where everything is in a metadata area. All offsets in bytes from the start of the area, multiples of 4096.
//!
//! ```text
//! superblock A | superblock B | activity log | for each of 7 peers: summary, bitmap pages | undo | journal | reserve
//!                                                                       index of times, records ┘
//! ```

use crate::bitmap_page::{BITS_PER_PAGE, SUMMARY_ENTRIES};
use crate::ids::MAX_PEERS;
use crate::metadata::Superblock;

/// Unit of every metadata write.
pub const BLOCK: u64 = 4096;
/// Most bytes of bitmap for one peer and volume that the default grain allows.
const MAX_BITMAP: u64 = 512 << 20;
/// Most blocks of the activity log.
pub const MAX_AL_BLOCKS: u32 = 4096;
/// Largest volume: 8 EiB less one sector would overflow places; 1 EiB is the limit.
pub const MAX_DATA_SIZE: u64 = 1 << 60;

/// Why no layout fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("a volume has between one sector and 2^60 bytes, in whole sectors, not {0}")]
    DataSize(u64),
    #[error("a sector has 512 or 4096 bytes, not {0}")]
    SectorSize(u32),
    #[error("a bit stands for 2^12 to 2^24 bytes, not 2^{0}")]
    Grain(u8),
    #[error("an extent has 2^20 to 2^30 bytes, not 2^{0}, and a volume at most 2^32 of them")]
    Extent(u8),
    #[error("the activity log has 8 to 4096 blocks, not {0}")]
    ActivityLog(u32),
    #[error("the metadata would need more than 2^62 bytes")]
    TooLarge,
    #[error(
        "the device has {device} bytes: too small for {metadata} bytes of metadata and any data"
    )]
    TooSmall { device: u64, metadata: u64 },
}

/// Places in a metadata area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    pub activity_log_offset: u64,
    pub activity_log_blocks: u32,
    peers_offset: u64,
    peer_stride: u64,
    summary_size: u64,
    /// Bitmap pages of one peer.
    pub pages: u64,
    pub undo_offset: u64,
    pub undo_size: u64,
    pub journal_offset: u64,
    pub journal_size: u64,
    pub reserve_offset: u64,
    /// Bytes of the whole area.
    pub total: u64,
}

fn up(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(BLOCK)
}

impl Layout {
    /// The layout that follows from what the creator chose.
    ///
    /// # Errors
    /// Values out of their range, or a total that cannot be addressed.
    pub fn new(
        data_size: u64,
        sector_size: u32,
        grain_shift: u8,
        extent_shift: u8,
        al_blocks: u32,
        undo_size: u64,
        journal_size: u64,
    ) -> Result<Layout, LayoutError> {
        if sector_size != 512 && sector_size != 4096 {
            return Err(LayoutError::SectorSize(sector_size));
        }
        if data_size == 0
            || data_size > MAX_DATA_SIZE
            || !data_size.is_multiple_of(u64::from(sector_size))
        {
            return Err(LayoutError::DataSize(data_size));
        }
        if !(12..=24).contains(&grain_shift) {
            return Err(LayoutError::Grain(grain_shift));
        }
        if !(20..=30).contains(&extent_shift)
            || (data_size - 1) >> extent_shift > u64::from(u32::MAX)
        {
            return Err(LayoutError::Extent(extent_shift));
        }
        if !(8..=MAX_AL_BLOCKS).contains(&al_blocks) {
            return Err(LayoutError::ActivityLog(al_blocks));
        }
        let bits = data_size.div_ceil(1 << grain_shift);
        let pages = bits.div_ceil(BITS_PER_PAGE as u64);
        let summary_size = pages.div_ceil(SUMMARY_ENTRIES as u64) * BLOCK;
        let place = || {
            let activity_log_offset = 2 * BLOCK;
            let peers_offset = activity_log_offset + u64::from(al_blocks) * BLOCK;
            let peer_stride = summary_size.checked_add(pages.checked_mul(BLOCK)?)?;
            let undo_offset =
                peers_offset.checked_add(peer_stride.checked_mul(MAX_PEERS as u64)?)?;
            let undo_size = up(undo_size)?;
            let journal_offset = undo_offset.checked_add(undo_size)?;
            let journal_size = up(journal_size)?;
            let reserve_offset = journal_offset.checked_add(journal_size)?;
            // A quarter on top, for what a later version wants to keep here.
            let total = up(reserve_offset.checked_add(reserve_offset / 4)?)?;
            (total < 1 << 62).then_some(Layout {
                activity_log_offset,
                activity_log_blocks: al_blocks,
                peers_offset,
                peer_stride,
                summary_size,
                pages,
                undo_offset,
                undo_size,
                journal_offset,
                journal_size,
                reserve_offset,
                total,
            })
        };
        place().ok_or(LayoutError::TooLarge)
    }

    /// The layout of the area that a superblock describes.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn of(sb: &Superblock) -> Result<Layout, LayoutError> {
        Layout::new(
            sb.data_size.max(sb.room),
            sb.sector_size,
            sb.grain_shift,
            sb.extent_shift,
            sb.al_blocks,
            sb.undo_size,
            sb.journal_size,
        )
    }

    /// Summary blocks of one peer.
    pub fn summary_blocks(&self) -> u64 {
        self.summary_size / BLOCK
    }

    /// Blocks of the journal's index of times, which is the beginning of the journal area: a 256th of it, at least
    /// one; none without a journal.
    pub fn time_index_blocks(&self) -> u64 {
        match self.journal_size / BLOCK {
            0 => 0,
            blocks => (blocks / 256).max(1),
        }
    }

    /// Place of a block of the index of times.
    pub fn time_index_offset(&self, block: u64) -> u64 {
        assert!(
            block < self.time_index_blocks(),
            "a block of the index of times outside the layout"
        );
        self.journal_offset + block * BLOCK
    }

    /// Where the journal's records begin, behind the index of times.
    pub fn journal_records_offset(&self) -> u64 {
        self.journal_offset + self.time_index_blocks() * BLOCK
    }

    /// Place of a summary block of a peer slot (0..7).
    pub fn summary_block_offset(&self, peer: usize, block: u64) -> u64 {
        assert!(
            peer < MAX_PEERS && block < self.summary_blocks(),
            "a summary block outside the layout"
        );
        self.peers_offset + peer as u64 * self.peer_stride + block * BLOCK
    }

    /// Place of a bitmap page of a peer slot (0..7).
    pub fn bitmap_page_offset(&self, peer: usize, page: u64) -> u64 {
        assert!(
            peer < MAX_PEERS && page < self.pages,
            "a bitmap page outside the layout"
        );
        self.peers_offset + peer as u64 * self.peer_stride + self.summary_size + page * BLOCK
    }
}

/// log2 of bytes per bit: 4 KiB up to 16 TiB, then so that one peer's bitmap takes at most 512 MiB.
pub fn default_grain_shift(data_size: u64) -> u8 {
    let mut shift = 12;
    while shift < 24 && data_size.div_ceil(1 << shift).div_ceil(8) > MAX_BITMAP {
        shift += 1;
    }
    shift
}

/// Internal metadata sits at the end of the device: the data size that fits before it, and the area's offset.
/// `grain_shift` of `None` means by size.
///
/// # Errors
/// A device too small for its metadata, or values out of range.
pub fn internal_area(
    device_size: u64,
    sector_size: u32,
    grain_shift: Option<u8>,
    extent_shift: u8,
    al_blocks: u32,
    undo_size: u64,
    journal_size: u64,
) -> Result<(u64, u64), LayoutError> {
    let device = device_size / BLOCK * BLOCK;
    let grain = grain_shift.unwrap_or_else(|| default_grain_shift(device_size));
    // A layout for the whole device is an upper bound; one more round takes back what the bitmap does not need.
    let mut data = device;
    for _ in 0..2 {
        if data == 0 {
            break;
        }
        let total = Layout::new(
            data,
            sector_size,
            grain,
            extent_shift,
            al_blocks,
            undo_size,
            journal_size,
        )?
        .total;
        data = device.saturating_sub(total);
        if data == 0 {
            return Err(LayoutError::TooSmall {
                device: device_size,
                metadata: total,
            });
        }
    }
    let total = Layout::new(
        data.max(BLOCK),
        sector_size,
        grain,
        extent_shift,
        al_blocks,
        undo_size,
        journal_size,
    )?
    .total;
    if data == 0 || data + total > device {
        // The second round can overshoot by a page; the first bound always fits.
        let upper = Layout::new(
            device.max(BLOCK),
            sector_size,
            grain,
            extent_shift,
            al_blocks,
            undo_size,
            journal_size,
        )?
        .total;
        data = device.saturating_sub(upper);
        if data == 0 {
            return Err(LayoutError::TooSmall {
                device: device_size,
                metadata: upper,
            });
        }
        return Ok((data, data));
    }
    Ok((data, device - total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_areas_follow_each_other_and_a_quarter_is_left() {
        for (data, undo, journal) in [
            (512, 0, 0),
            (1 << 30, 1 << 20, 0),
            (64 << 40, 5000, 3 << 30),
        ] {
            let grain = default_grain_shift(data);
            let layout =
                Layout::new(data, 512, grain, 22.max(shift(data)), 64, undo, journal).unwrap();
            let mut next =
                layout.activity_log_offset + u64::from(layout.activity_log_blocks) * BLOCK;
            for peer in 0..MAX_PEERS {
                for block in [0, layout.summary_blocks() - 1] {
                    assert_eq!(
                        layout.summary_block_offset(peer, block),
                        next + block * BLOCK
                    );
                }
                next += layout.summary_blocks() * BLOCK;
                for page in [0, layout.pages - 1] {
                    assert_eq!(layout.bitmap_page_offset(peer, page), next + page * BLOCK);
                }
                next += layout.pages * BLOCK;
            }
            assert_eq!(layout.undo_offset, next);
            assert!(layout.undo_size >= undo && layout.journal_size >= journal);
            next += layout.undo_size;
            assert_eq!(layout.journal_offset, next);
            let index = layout.time_index_blocks();
            assert_eq!(index == 0, journal == 0);
            assert_eq!(layout.journal_records_offset(), next + index * BLOCK);
            if index > 0 {
                assert_eq!(
                    layout.time_index_offset(index - 1),
                    next + (index - 1) * BLOCK
                );
            }
            next += layout.journal_size;
            assert!(layout.journal_records_offset() <= next);
            assert_eq!(layout.reserve_offset, next);
            assert!(layout.total - next >= next / 4 && layout.total.is_multiple_of(BLOCK));
        }
    }

    fn shift(data: u64) -> u8 {
        (20..=30)
            .find(|s| (data - 1) >> s <= u64::from(u32::MAX))
            .unwrap()
    }

    #[test]
    fn sixty_four_tebibytes_need_no_more_bitmap_than_allowed_and_can_have_the_finest() {
        let size = 64 << 40;
        assert!(size >> default_grain_shift(size) >> 3 <= MAX_BITMAP);
        let fine = Layout::new(size, 4096, 12, 22, 64, 0, 0).unwrap();
        assert!(fine.pages * BLOCK >= 2 << 30, "2 GiB at 4 KiB grain");
    }
}
