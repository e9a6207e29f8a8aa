//! `holdfast init`

use crate::cli::{Init, Place};
use crate::failure::{Failure, Outcome};
use holdfast_replicator::control::membership::init;

pub fn run(place: &Place, options: &Init) -> Outcome {
    let own = place.own(&options.state, &[])?;
    let identity =
        init(&own, options.name.as_deref()).map_err(|error| Failure::from_error(&error))?;
    say!(
        "node {} has an identity now, in {}\nid           {}\nfingerprint  {}",
        identity.name(),
        identity.dir().display(),
        identity.id(),
        identity.fingerprint()
    );
    Ok(())
}
