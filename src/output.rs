//! Standard output that may be a pipe whose reader has gone.

use std::io::{IsTerminal as _, Write as _};

/// Prints at once. False when nobody reads any more: a follower then stops quietly.
pub fn print(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .is_ok()
}

/// A line on standard output, as `println!`, but without a panic when nobody reads any more.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = $crate::output::print(&format!("{}\n", format_args!($($text)*)));
    }};
}

/// One JSON value and the end of the line.
pub fn json_line<T: serde::Serialize>(value: &T) -> String {
    // Values of the control protocol have string keys only, so this cannot fail.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

/// What starts a new screen: on a terminal it replaces the old one.
pub fn clear_screen() -> &'static str {
    if std::io::stdout().is_terminal() {
        "\x1b[H\x1b[2J"
    } else {
        "\n"
    }
}
