//! A bar on a terminal, a line every few seconds elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

/// Where there is no terminal, a line per this long says that it goes on.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

pub struct Progress {
    bar: Option<ProgressBar>,
    last_line: Cell<Option<Instant>>,
}

impl Progress {
    pub fn start(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            // Rate and time left come from the node: the bar's own guess would know less.
            if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(what);
            bar
        });
        Progress {
            bar,
            last_line: Cell::new(None),
        }
    }

    pub fn show(&self, done: u64, total: u64, text: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(text.to_string());
            }
            None => {
                let due = self
                    .last_line
                    .get()
                    .is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL);
                if due {
                    eprintln!("{text}");
                    self.last_line.set(Some(Instant::now()));
                }
            }
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
