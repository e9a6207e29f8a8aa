//! `holdfast dump-metadata`

use crate::cli::{DumpMetadata, Place};
use crate::failure::{FOUND_BAD, Failure, Outcome};
use crate::output::{json_line, print};
use holdfast_replicator::control::dump;

pub fn run(place: &Place, options: &DumpMetadata) -> Outcome {
    let config = place.configuration()?;
    let dumps = dump::dump(&config, options.service.as_deref())
        .map_err(|error| Failure::from_error(&error))?;
    if options.json {
        print(&json_line(&dumps));
    } else {
        print(&dump::render(&dumps));
    }
    let bad: Vec<&str> = dumps
        .iter()
        .filter(|dump| dump.error.is_some())
        .map(|dump| dump.volume.as_str())
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        FOUND_BAD,
        format!("no metadata that counts on: {}", bad.join(", ")),
        "Nothing was changed",
        "See above for each of them",
    ))
}
