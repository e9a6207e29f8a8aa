//! `holdfast attach`

use crate::cli::{Place, Service};
use crate::failure::Outcome;
use holdfast_replicator::control::protocol::ServiceCommand;

pub fn run(place: &Place, service: &Service) -> Outcome {
    place.session(service)?.run(ServiceCommand::Attach)
}
