//! Which wire version and which features two nodes use with each other.
//!
//! Both read it from the other's `Hello`, and both come to the same result. Version N talks to N−1, so that nodes
//! are upgraded one after the other. `Hello` and `Goodbye` are read whatever version they are of: their header,
//! the first 18 bytes of a `Hello` and the layout of a `Goodbye` never change. Every other frame is of the version
//! agreed.

use crate::frame::{Facts, Hello};
use crate::ids::{Slot, Uuid};

/// Newest wire version this program speaks.
pub const WIRE_VERSION: u8 = 1;
/// Oldest wire version this program still speaks: the one before `WIRE_VERSION`, if there was one.
pub const WIRE_VERSION_MIN: u8 = 1;
/// Features of this program, one bit each. Version 1 has none.
pub const KNOWN_FEATURES: u64 = 0;

/// What one side speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Versions {
    /// Oldest and newest wire version.
    pub min: u8,
    pub max: u8,
    /// Features without which it cannot talk, one bit each.
    pub required: u64,
    /// Features it has.
    pub supported: u64,
}

impl Versions {
    /// What this program speaks.
    pub const OURS: Versions = Versions {
        min: WIRE_VERSION_MIN,
        max: WIRE_VERSION,
        required: 0,
        supported: KNOWN_FEATURES,
    };
}

/// What two nodes use with each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// The newest version both speak: that of every frame but `Hello` and `Goodbye`.
    pub version: u8,
    /// The features both have; what is not in here is not used, and nobody need know it.
    pub features: u64,
}

/// Two versions that cannot talk. The words fit both sides: the one that finds out tells the other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    #[error(
        "one node speaks wire versions {theirs_min} to {theirs_max}, the other {ours_min} to {ours_max}; nothing was exchanged and both copies are as they were; \
         upgrade the older node to the version before the newer one's, or to the same, then run `holdfast connect`"
    )]
    Version {
        theirs_min: u8,
        theirs_max: u8,
        ours_min: u8,
        ours_max: u8,
    },
    #[error(
        "one node requires features that the other does not have ({0:#x}); nothing was exchanged and both copies are as they were; \
         upgrade the older node, then run `holdfast connect`"
    )]
    Features(u64),
}

/// Whether two nodes can talk, and how. Symmetric: both sides find the same.
///
/// # Errors
/// No version in common, or a feature that one requires and the other does not have.
pub fn agree(ours: Versions, theirs: Versions) -> Result<Agreed, VersionError> {
    let version = theirs.max.min(ours.max);
    if version == 0 || version < theirs.min || version < ours.min {
        return Err(VersionError::Version {
            theirs_min: theirs.min,
            theirs_max: theirs.max,
            ours_min: ours.min,
            ours_max: ours.max,
        });
    }
    let missing = theirs.required & !ours.supported | ours.required & !theirs.supported;
    if missing != 0 {
        return Err(VersionError::Features(missing));
    }
    Ok(Agreed {
        version,
        features: ours.supported & theirs.supported,
    })
}

impl Hello {
    /// A hello with this version's numbers, to be sent about these facts.
    pub fn new(node: Uuid, slot: Slot, service: Uuid, facts: Facts) -> Hello {
        Hello {
            node,
            slot,
            service,
            software: concat!("holdfast ", env!("CARGO_PKG_VERSION")).to_owned(),
            version_min: Versions::OURS.min,
            version_max: Versions::OURS.max,
            features_required: Versions::OURS.required,
            features_supported: Versions::OURS.supported,
            facts,
        }
    }

    /// What its sender speaks.
    pub fn versions(&self) -> Versions {
        Versions {
            min: self.version_min,
            max: self.version_max,
            required: self.features_required,
            supported: self.features_supported,
        }
    }

    /// Whether this node can talk to the sender, and how.
    ///
    /// # Errors
    /// As [`agree`].
    pub fn negotiate(&self) -> Result<Agreed, VersionError> {
        agree(Versions::OURS, self.versions())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speaks(min: u8, max: u8, required: u64, supported: u64) -> Versions {
        Versions {
            min,
            max,
            required,
            supported,
        }
    }

    #[test]
    fn a_version_talks_to_the_one_before_it_and_to_no_older_one() {
        let program = |version: u8| speaks(version.saturating_sub(1).max(1), version, 0, 0);
        for ours in 1..6 {
            for theirs in 1..6 {
                let agreed = agree(program(ours), program(theirs));
                if ours.abs_diff(theirs) <= 1 {
                    assert_eq!(agreed.map(|a| a.version), Ok(ours.min(theirs)));
                } else {
                    let error = agreed.expect_err("too far apart").to_string();
                    for part in ["wire versions", "both copies are as they were", "upgrade"] {
                        assert!(error.contains(part), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn both_sides_find_the_same() {
        let all = [
            speaks(1, 1, 0, 0),
            speaks(1, 2, 0, 0b11),
            speaks(2, 3, 0b1, 0b111),
            speaks(3, 4, 0b1000, 0b1111),
            speaks(2, 1, 0, 0),
            speaks(0, 0, 0, 0),
        ];
        for a in all {
            for b in all {
                assert_eq!(agree(a, b).ok(), agree(b, a).ok(), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn a_required_feature_must_be_there_and_an_optional_one_is_used_if_both_have_it() {
        let old = speaks(1, 2, 0, 0b001);
        assert_eq!(
            agree(old, speaks(1, 2, 0, 0b111)).map(|a| a.features),
            Ok(0b001)
        );
        assert_eq!(
            agree(old, speaks(1, 2, 0b100, 0b111)),
            Err(VersionError::Features(0b100))
        );
        // Whoever requires it: the side that lacks it may be either.
        assert_eq!(
            agree(speaks(1, 2, 0b100, 0b111), old),
            Err(VersionError::Features(0b100))
        );
        assert_eq!(
            agree(speaks(1, 2, 0b001, 0b111), old).map(|a| a.features),
            Ok(0b001)
        );
    }

    #[test]
    fn version_zero_and_a_range_turned_around_agree_with_nobody() {
        for nonsense in [speaks(0, 0, 0, 0), speaks(2, 1, 0, 0)] {
            assert!(agree(Versions::OURS, nonsense).is_err());
        }
    }
}
