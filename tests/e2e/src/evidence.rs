//! What a failed test leaves behind.

use crate::programs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

/// Failures that are kept, the newest ones.
const KEPT: usize = 8;

/// Copies a cluster's files (backings, metadata, state, logs) to `target/e2e/evidence` and says where. Temporary directories are
/// gone with the test run.
pub(crate) fn keep(directory: &Path) {
    let all = programs::target().join("e2e/evidence");
    let name = format!(
        "{}-{}",
        std::thread::current().name().unwrap_or("test"),
        std::process::id()
    );
    let place = all.join(name.replace("::", "-"));
    if let Err(error) = std::fs::create_dir_all(&place) {
        eprintln!("no evidence is kept: {}: {error}", place.display());
        return;
    }
    forget_older(&all);
    let copied = Command::new("cp")
        .args(["--archive", "--sparse=always"])
        .arg(directory)
        .arg(&place)
        .output();
    match copied {
        Ok(output) if output.status.success() => {
            eprintln!("evidence: {}", place.display());
        }
        Ok(output) => eprintln!(
            "evidence, in part: {}\n{}",
            place.display(),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => eprintln!("no evidence is kept: cp: {error}"),
    }
}

fn forget_older(all: &Path) {
    let Ok(entries) = std::fs::read_dir(all) else {
        return;
    };
    let mut found: Vec<_> = entries
        .flatten()
        .map(|entry| {
            let changed = entry.metadata().and_then(|found| found.modified());
            (changed.unwrap_or(SystemTime::UNIX_EPOCH), entry.path())
        })
        .collect();
    found.sort();
    for (_, old) in &found[..found.len().saturating_sub(KEPT)] {
        // Another test may be faster.
        let _ = std::fs::remove_dir_all(old);
    }
}
