//! Contents of answers that are more than a success.

use crate::close::CloseReason;
use crate::error::{IoError, IoErrorKind};
use crate::volume::Extent;

use super::wire::{ALLOCATION_HOLE, ALLOCATION_ZERO, BASE_ALLOCATION_ID};

/// Extents in one block status answer; clients ask again for the rest.
const MAX_EXTENTS: usize = 8192;

pub(super) fn shutting_down(reason: &CloseReason) -> IoError {
    IoError::new(IoErrorKind::ShuttingDown, reason.as_str().to_owned())
}

pub(super) fn defect(what: &'static str) -> IoError {
    tracing::error!(what, "the volume broke its contract with the frontend");
    IoError::new(IoErrorKind::Io, what)
}

/// The payload of a block status chunk, cut to `length` bytes; `None` if it would be empty.
pub(super) fn block_status(length: u32, one: bool, extents: &[Extent]) -> Option<Vec<u8>> {
    let most = if one { 1 } else { MAX_EXTENTS };
    let mut payload = Vec::with_capacity(4 + 8 * extents.len().min(most));
    payload.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    let mut left = length;
    for extent in extents.iter().filter(|extent| extent.len > 0).take(most) {
        if left == 0 {
            break;
        }
        let bytes = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
        let mut flags = 0;
        if extent.hole {
            flags |= ALLOCATION_HOLE;
        }
        if extent.zero {
            flags |= ALLOCATION_ZERO;
        }
        payload.extend_from_slice(&bytes.to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
        left -= bytes;
    }
    (payload.len() > 4).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(len: u64) -> Extent {
        Extent {
            len,
            hole: false,
            zero: false,
        }
    }

    #[test]
    fn a_block_status_is_cut_to_the_range_and_to_a_bounded_size() {
        assert_eq!(block_status(100, false, &[]), None);
        assert_eq!(block_status(100, false, &[data(0)]), None);
        let cut = block_status(100, false, &[data(60), data(u64::MAX), data(1)]);
        let expected = [1u32, 60, 0, 40, 0].map(u32::to_be_bytes).concat();
        assert_eq!(cut, Some(expected));
        let one = block_status(100, true, &[data(60), data(40)]);
        assert_eq!(one.map(|payload| payload.len()), Some(12));
        let many = block_status(u32::MAX, false, &vec![data(1); 100_000]);
        assert_eq!(many.map(|payload| payload.len()), Some(4 + 8 * MAX_EXTENTS));
    }
}
