//! `holdfast reload`, and the same after a command that changed who is trusted.

use crate::cli::Place;
use crate::failure::{FAILED, Outcome};

pub fn run(place: &Place) -> Outcome {
    say!("{}", place.connect()?.reload()?);
    Ok(())
}

/// Has the replicator of this machine, if one runs, read peers and certificates again. What came of it, for people.
pub fn tell(place: &Place) -> String {
    let failure = match place.connect() {
        Ok(mut client) => match client.reload() {
            Ok(_) => return "The replicator that runs here knows of it already.".into(),
            Err(error) => error.into(),
        },
        Err(failure) => failure,
    };
    if failure.code == FAILED {
        return format!(
            "The replicator that runs here did not take it up: {failure}. Run `holdfast reload` once that is repaired."
        );
    }
    "No replicator answers here: one that is started from now on knows of it, one that runs takes it up with \
     `holdfast reload` or SIGHUP."
        .into()
}
