//! `holdfast replicator`

use crate::cli::Place;
use crate::failure::{Failure, Outcome};
use holdfast_replicator::config::DEFAULT_PATH;
use holdfast_replicator::process;
use std::path::Path;

pub fn run(place: &Place) -> Outcome {
    let file = place.config.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    process::run(file).map_err(|error| Failure::from_error(&error))
}
