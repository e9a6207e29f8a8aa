//! `holdfast explain-handshake`

use crate::cli::{ExplainHandshake, Place};
use crate::failure::Outcome;

pub fn run(place: &Place, options: &ExplainHandshake) -> Outcome {
    say!(
        "{}",
        place
            .connect()?
            .explain_handshake(&options.service, &options.peer)?
    );
    Ok(())
}
