//! `holdfast status`

use crate::cli::{Place, Status};
use crate::failure::{FOUND_BAD, Failure, Outcome};
use crate::output::{clear_screen, json_line, print};
use holdfast_replicator::control::protocol::NodeStatus;
use holdfast_replicator::control::render::{self, Style};

pub fn run(place: &Place, options: &Status) -> Outcome {
    let mut client = place.connect()?;
    if options.watch {
        let style = Style::stdout();
        client.watch(options.interval, |status| {
            if options.json {
                return print(&json_line(&status));
            }
            print(&format!(
                "{}{}",
                clear_screen(),
                render::status(&status, style)
            ))
        })?;
        return Ok(());
    }
    let status = client.status()?;
    if options.json {
        print(&json_line(&status));
    } else {
        print(&render::status(&status, Style::stdout()));
    }
    if options.check {
        check(&status)
    } else {
        Ok(())
    }
}

fn check(status: &NodeStatus) -> Outcome {
    let bad: Vec<&str> = status
        .services
        .iter()
        .filter(|service| !service.healthy())
        .map(|service| service.name.as_str())
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        FOUND_BAD,
        format!("not healthy: {}", bad.join(", ")),
        "",
        "",
    ))
}
