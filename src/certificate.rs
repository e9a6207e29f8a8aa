//! `holdfast certificate`

use crate::cli::{Certificate, Place};
use crate::consent;
use crate::failure::{Failure, Outcome};
use crate::reload;
use holdfast_replicator::control::membership::{self, Certificates, MembershipError};

pub fn run(place: &Place, verb: &Certificate) -> Outcome {
    match verb {
        Certificate::Show(state) => {
            let found = done(membership::certificates(&place.own(state, &[])?))?;
            say!("node {}\nin use  {}", found.node, found.current);
            if let Some(next) = found.next {
                say!("next    {next}");
            }
            Ok(())
        }
        Certificate::Prepare(state) => {
            let found = done(membership::prepare_certificate(&place.own(state, &[])?))?;
            say!(
                "the next certificate of node {} is {}; the present one stays in use until `holdfast certificate activate`. {}",
                found.node,
                found.next.unwrap_or_default(),
                reload::tell(place)
            );
            Ok(())
        }
        Certificate::Activate { state, force, yes } => {
            if *force {
                consent::ask(
                    "Using the next certificate even where a peer has not confirmed it:",
                    "such a peer refuses this node until the two join anew; replication with it stops until then",
                    *yes,
                )?;
            }
            let found = done(membership::activate_certificate(
                &place.own(state, &[])?,
                *force,
            ))?;
            say!(
                "node {} uses certificate {} for every new connection. {}",
                found.node,
                found.current,
                reload::tell(place)
            );
            Ok(())
        }
    }
}

fn done(result: Result<Certificates, MembershipError>) -> Result<Certificates, Failure> {
    result.map_err(|error| Failure::from_error(&error))
}
