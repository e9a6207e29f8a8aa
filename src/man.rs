//! `holdfast man`

use crate::cli::{Cli, Man};
use crate::failure::{FAILED, Failure, Outcome};
use crate::output::print;
use clap::CommandFactory as _;

pub fn run(options: &Man) -> Outcome {
    let fail = |error: std::io::Error| {
        Failure::new(
            FAILED,
            format!("the manual pages were not written: {error}"),
            "",
            "Choose another directory",
        )
    };
    match &options.directory {
        Some(directory) => {
            std::fs::create_dir_all(directory).map_err(fail)?;
            clap_mangen::generate_to(Cli::command(), directory).map_err(fail)
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut page)
                .map_err(fail)?;
            print(&String::from_utf8_lossy(&page));
            Ok(())
        }
    }
}
