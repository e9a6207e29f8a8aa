//! `holdfast demo`

use crate::cli::Demo;
use crate::failure::{FAILED, Failure, Outcome};
use crate::output::{json_line, print};
use holdfast_replicator::demo::{Figures, Options, run as demo};

pub fn run(options: &Demo) -> Outcome {
    let exe = std::env::current_exe().map_err(|error| {
        Failure::new(
            FAILED,
            format!("this program cannot find itself: {error}"),
            "",
            "",
        )
    })?;
    let mut figures = Figures::default();
    let result = demo(
        &exe,
        Options {
            json: options.json,
            keep: options.keep,
        },
        &mut figures,
    );
    if options.json {
        print(&json_line(&figures));
    }
    result.map_err(|error| {
        Failure::new(
            FAILED,
            format!("the demo failed: {error}"),
            "Nothing but its own temporary files was touched, and those are removed",
            "Run it again; if it fails again, please report this output",
        )
    })
}
