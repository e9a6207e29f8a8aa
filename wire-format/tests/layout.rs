//! Where things lie in a metadata area, for any sizes: nothing overlaps, nothing reaches over an end.

mod common;

use common::strategies::any_sizes;
use holdfast_wire_format::ids::MAX_PEERS;
use holdfast_wire_format::layout::{BLOCK, Layout, LayoutError, internal_area};
use proptest::prelude::*;

proptest! {
    #[test]
    fn areas_follow_each_other(sizes in any_sizes()) {
        let (data, sector, grain, extent, al, undo, journal) = sizes;
        let Ok(layout) = Layout::new(data, sector, grain, extent, al, undo, journal) else {
            return Ok(());
        };
        // Every grain of data has a bit, every page a summary byte.
        prop_assert!((u128::from(layout.pages) * 32_640) << grain >= u128::from(data));
        prop_assert!(layout.summary_blocks() * 4080 >= layout.pages);
        let mut next = 2 * BLOCK;
        prop_assert_eq!(layout.activity_log_offset, next);
        next += u64::from(al) * BLOCK;
        for peer in 0..MAX_PEERS {
            prop_assert_eq!(layout.summary_block_offset(peer, 0), next);
            next += layout.summary_blocks() * BLOCK;
            prop_assert_eq!(layout.bitmap_page_offset(peer, 0), next);
            next += layout.pages * BLOCK;
        }
        prop_assert_eq!(layout.undo_offset, next);
        prop_assert!(layout.undo_size >= undo && layout.journal_size >= journal);
        prop_assert_eq!(layout.journal_offset, next + layout.undo_size);
        prop_assert!(layout.journal_records_offset() <= layout.reserve_offset);
        prop_assert_eq!(layout.reserve_offset, layout.journal_offset + layout.journal_size);
        prop_assert!(layout.total - layout.reserve_offset >= layout.reserve_offset / 4);
        for place in [layout.undo_offset, layout.journal_offset, layout.journal_records_offset(), layout.reserve_offset, layout.total] {
            prop_assert!(place.is_multiple_of(BLOCK));
        }
    }

    #[test]
    fn internal_metadata_lies_behind_the_data_and_within_the_device(
        device in prop_oneof![1u64..64 << 20, 1u64..1 << 50],
        sector in prop::sample::select(vec![512u32, 4096]),
        grain in prop::option::of(12..=24u8),
        al in 8..=4096u32,
        undo in 0..1u64 << 34,
    ) {
        match internal_area(device, sector, grain, 30, al, undo, 0) {
            Ok((data, area)) => {
                let shift = grain.unwrap_or_else(|| holdfast_wire_format::layout::default_grain_shift(device));
                let layout = Layout::new(data, sector, shift, 30, al, undo, 0).unwrap();
                prop_assert!(data > 0 && data <= area && area.is_multiple_of(BLOCK));
                prop_assert!(area + layout.total <= device);
                // No more is left unused than the bitmap of what the metadata takes, and rounding.
                let whole = Layout::new(device / BLOCK * BLOCK, sector, shift, 30, al, undo, 0).unwrap();
                prop_assert!(device - area - layout.total <= whole.total - layout.total + BLOCK);
            }
            Err(LayoutError::TooSmall { device: said, metadata }) => {
                prop_assert_eq!(said, device);
                prop_assert!(metadata >= device / BLOCK * BLOCK);
            }
            Err(other) => prop_assert!(device < BLOCK || matches!(other, LayoutError::Extent(_)), "{}", other),
        }
    }
}
