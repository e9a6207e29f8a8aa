//! `holdfast events`

use crate::cli::{Events, Place};
use crate::failure::Outcome;
use crate::output::{json_line, print};
use holdfast_replicator::control::render::{self, Style};

pub fn run(place: &Place, options: &Events) -> Outcome {
    let style = Style::stdout();
    place.connect()?.events(options.follow, options.last, |item| match item {
        Ok(event) if options.json => print(&json_line(&event)),
        Ok(event) => print(&format!("{}\n", render::event(&event, style))),
        Err(count) => {
            eprintln!("{count} events were missed here: this reader was too slow; the log file has them");
            true
        }
    })?;
    Ok(())
}
