//! The programs under test, built when they are first asked for, so that a test run alone never meets an old one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `holdfast` as packages have it: release profile, default features.
pub fn holdfast() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        given("HOLDFAST_BIN").unwrap_or_else(|| {
            cargo_build(&["--release"]);
            target().join("release/holdfast")
        })
    })
}

/// `holdfast` with debug assertions, whose backings lose power and fail on command (docs/disk.md, "Fault layer").
pub fn holdfast_with_faults() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        given("HOLDFAST_FAULTS_BIN").unwrap_or_else(|| {
            // One at a time from build to copy: the name is that of the ordinary debug build.
            let directory = target().join("e2e");
            std::fs::create_dir_all(&directory).expect("a directory in target");
            let lock = std::fs::File::create(directory.join("lock")).expect("a lock file");
            lock.lock().expect("the lock");
            cargo_build(&["--features", "fault-injection"]);
            let copy = directory.join("holdfast-faults");
            // Renamed into place: another test may be running the one that is there.
            let fresh = directory.join("holdfast-faults.new");
            std::fs::copy(target().join("debug/holdfast"), &fresh).expect("a copy of the program");
            std::fs::rename(&fresh, &copy).expect("the copy in its place");
            copy
        })
    })
}

fn given(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

/// The directory of cargo's output that this very program lies in.
pub(crate) fn target() -> PathBuf {
    let exe = std::env::current_exe().expect("this program's path");
    let profile = match exe.parent() {
        Some(parent) if parent.ends_with("deps") => parent.parent(),
        parent => parent,
    };
    profile
        .and_then(Path::parent)
        .expect("target/PROFILE/deps/PROGRAM")
        .to_path_buf()
}

fn cargo_build(options: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--package", "holdfast", "--bin", "holdfast"])
        .args(options)
        .arg("--target-dir")
        .arg(target())
        .output()
        .expect("cargo");
    assert!(
        output.status.success(),
        "cargo build {options:?}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
