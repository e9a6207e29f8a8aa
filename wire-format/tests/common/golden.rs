//! Golden files: bytes as text. A line is an offset and up to 16 bytes; `*` stands for lines equal to the one before,
//! up to the next offset; the last line is the length. `#` begins a comment.

use std::fmt::Write;
use std::path::PathBuf;

pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

pub fn path(name: &str) -> PathBuf {
    directory().join(format!("{name}.hex"))
}

pub fn to_text(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut before: Option<&[u8]> = None;
    let mut starred = false;
    for (at, line) in bytes.chunks(16).enumerate() {
        if before == Some(line) {
            if !starred {
                text.push_str("*\n");
                starred = true;
            }
            continue;
        }
        starred = false;
        before = Some(line);
        let _ = write!(text, "{:06x} ", at * 16);
        for byte in line {
            let _ = write!(text, " {byte:02x}");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "{:06x}", bytes.len());
    text
}

/// # Panics
/// Text that is not what [`to_text`] makes, comments aside.
pub fn from_text(text: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut last = Vec::new();
    let mut repeat = false;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line == "*" {
            repeat = true;
            continue;
        }
        let mut words = line.split_whitespace();
        let offset = words.next().expect("an offset");
        let offset = usize::from_str_radix(offset, 16).expect("an offset");
        while repeat && bytes.len() < offset {
            bytes.extend_from_slice(&last);
        }
        repeat = false;
        assert_eq!(bytes.len(), offset, "the lines do not follow each other");
        last = words
            .map(|byte| u8::from_str_radix(byte, 16).expect("a byte"))
            .collect();
        bytes.extend_from_slice(&last);
    }
    assert!(last.is_empty(), "the length is missing at the end");
    bytes
}

pub fn read(name: &str) -> Vec<u8> {
    let path = path(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| {
        panic!(
            "{}: {e}; tests/golden/README.md says how they are made",
            path.display()
        )
    });
    from_text(&text)
}
