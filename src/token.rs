//! `holdfast token`

use crate::cli::{Place, Token};
use crate::failure::{Failure, Outcome};
use crate::output::print;
use crate::reload;
use holdfast_replicator::control::membership::wait_for_peer;
use std::time::Duration;

pub fn run(place: &Place, options: &Token) -> Outcome {
    let own = place.own(&options.state, &options.link.link_address)?;
    let lifetime = Duration::from_secs(options.valid * 60);
    let peer = wait_for_peer(
        &own,
        options.listen,
        &options.address,
        lifetime,
        |token| {
            // The token alone on standard output, so that a script can take it.
            print(&format!("{token}\n"));
            eprintln!(
                "Run `holdfast join` on the other node and give it this token. Waiting for it, {} min.",
                options.valid
            );
        },
        |error| eprintln!("refused: {error}"),
    )
    .map_err(|error| Failure::from_error(&error))?;
    eprintln!(
        "node {} ({}) has joined; the two trust each other now. {}",
        peer.name,
        peer.id,
        reload::tell(place)
    );
    Ok(())
}
