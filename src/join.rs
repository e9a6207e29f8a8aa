//! `holdfast join`

use crate::cli::{Join, Place};
use crate::failure::{FAILED, Failure, Outcome};
use crate::reload;
use holdfast_replicator::control::membership::join;
use std::io::IsTerminal as _;

pub fn run(place: &Place, options: &Join) -> Outcome {
    let own = place.own(&options.state, &options.link.link_address)?;
    let token = match &options.token {
        Some(token) => token.clone(),
        None => read_token()?,
    };
    let peer = join(&own, token.trim()).map_err(|error| Failure::from_error(&error))?;
    say!(
        "joined node {} ({}); the two trust each other now. {}",
        peer.name,
        peer.id,
        reload::tell(place)
    );
    Ok(())
}

fn read_token() -> Result<String, Failure> {
    if std::io::stdin().is_terminal() {
        eprint!("Token: ");
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(|error| {
        Failure::new(
            FAILED,
            format!("no token could be read from standard input: {error}"),
            "Nothing was changed",
            "Give the token as an argument or on standard input",
        )
    })?;
    Ok(line)
}
