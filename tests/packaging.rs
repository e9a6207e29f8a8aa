//! The Debian package: it builds, and what it unpacks is what a node needs, at the places that the guide and the unit name.

use std::path::Path;
use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn the_debian_package_builds_and_unpacks_to_what_the_unit_starts() {
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        eprintln!("no dpkg-deb here: the Debian package is not tested");
        return;
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().to_str().unwrap();
    let script = repository.join("packaging/debian/build");
    let built = run(
        script.to_str().unwrap(),
        &[env!("CARGO_BIN_EXE_holdfast"), directory],
    );
    let package = words(&built);
    let field = |name: &str| words(&run("dpkg-deb", &["--field", &package, name]));
    assert_eq!(field("Package"), "holdfast");
    assert_eq!(field("Version"), env!("CARGO_PKG_VERSION"));
    let needs = field("Depends");
    assert!(needs.starts_with("libc6 (>= 2."), "{needs}");

    let tree = root.path().join("tree");
    run(
        "dpkg-deb",
        &["--raw-extract", &package, tree.to_str().unwrap()],
    );
    for file in [
        "usr/lib/systemd/system/holdfast-replicator.service",
        "usr/lib/sysusers.d/holdfast.conf",
        "usr/lib/tmpfiles.d/holdfast.conf",
        "usr/share/man/man1/holdfast.1.gz",
        "usr/share/man/man1/holdfast-volume-create.1.gz",
        "usr/share/bash-completion/completions/holdfast",
        "usr/share/zsh/vendor-completions/_holdfast",
        "usr/share/fish/vendor_completions.d/holdfast.fish",
        "usr/share/doc/holdfast/copyright",
        "usr/share/doc/holdfast/changelog.gz",
        "usr/share/doc/holdfast/examples/pair-alpha.toml",
        "usr/share/doc/holdfast/docs/operations.md",
    ] {
        let length = std::fs::metadata(tree.join(file)).map(|found| found.len());
        assert!(length.is_ok_and(|length| length > 0), "{file} is missing");
    }
    let unit =
        std::fs::read_to_string(tree.join("usr/lib/systemd/system/holdfast-replicator.service"))
            .unwrap();
    let starts = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .and_then(|line| line.split(' ').next())
        .unwrap();
    let program = tree.join(starts.trim_start_matches('/'));
    assert!(words(&run(program.to_str().unwrap(), &["--version"])).starts_with("holdfast "));
    for script in ["postinst", "prerm", "postrm"] {
        let script = tree.join("DEBIAN").join(script);
        run("sh", &["-n", script.to_str().unwrap()]);
    }
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_ok()
    {
        // With the targets of this system, on which it depends.
        let units = "usr/lib/systemd/system";
        for target in std::fs::read_dir(Path::new("/").join(units)).unwrap() {
            let target = target.unwrap().path();
            if target
                .extension()
                .is_some_and(|extension| extension == "target")
            {
                std::fs::copy(&target, tree.join(units).join(target.file_name().unwrap())).unwrap();
            }
        }
        let at = format!("--root={}", tree.display());
        run(
            "systemd-analyze",
            &["verify", "--man=no", &at, "holdfast-replicator.service"],
        );
    }
    // Nobody but root owns anything, and nothing is writable for others.
    let listing = words(&run("dpkg-deb", &["--contents", &package]));
    for line in listing.lines() {
        assert!(line.contains(" root/root "), "{line}");
        assert_ne!(&line[8..9], "w", "{line}");
    }
}
