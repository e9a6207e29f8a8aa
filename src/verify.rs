//! `holdfast verify`

use crate::cli::{Place, Verify};
use crate::failure::{FOUND_BAD, Failure, Outcome};
use crate::progress::Progress;
use holdfast_replicator::control::client::ClientError;
use holdfast_replicator::control::follow;
use holdfast_replicator::control::protocol::{FaultCode, ServiceCommand};
use holdfast_replicator::control::render;
use std::time::Duration;

/// A refusal comes at once; after this long it is at work.
const PATIENCE: Duration = Duration::from_secs(1);

pub fn run(place: &Place, options: &Verify) -> Outcome {
    let mut session = place.session(&options.service)?;
    if options.stop {
        return session.run(ServiceCommand::StopVerify);
    }
    let command = ServiceCommand::Verify {
        volume: options.volume.clone(),
    };
    let answered = match place.connect()?.begin(&session.service, command, PATIENCE) {
        // A short one has ended by now, and what it found is an answer, not a failure to look.
        Err(ClientError::Fault(fault)) if fault.code == FaultCode::CopiesDiffer => {
            return Err(Failure {
                code: FOUND_BAD,
                ..ClientError::Fault(fault).into()
            });
        }
        answered => answered?,
    };
    if !options.wait {
        let started = "verification runs; `holdfast status` shows how far it is";
        say!("{}", answered.as_deref().unwrap_or(started));
        return Ok(());
    }
    let bar = Progress::start("verify");
    let result = follow::verify(session.client, &session.service, |verify| {
        bar.show(
            verify.done_bytes,
            verify.total_bytes,
            &render::verify_line(verify),
        );
    });
    bar.finish();
    let found = result?;
    if found.different_bytes == 0 {
        say!(
            "{} compared, the copies are identical",
            render::bytes(found.compared_bytes)
        );
        return Ok(());
    }
    Err(Failure::new(
        FOUND_BAD,
        format!(
            "{} differ between the copies",
            render::bytes(found.different_bytes)
        ),
        "The differing blocks are marked, and copied from the primary when the link is made anew",
        "Look for a failing disk or memory on either machine, then `holdfast disconnect` and `connect`",
    ))
}
