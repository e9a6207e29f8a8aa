//! The command line as a person meets it: what is said where it goes wrong, and that every verb explains itself.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn holdfast(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_holdfast"))
        .args(arguments)
        .env_remove("HOLDFAST_CONFIG")
        .env_remove("HOLDFAST_SOCKET")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Lines are wrapped for people; words are looked for as one line.
fn plain(output: &Output) -> String {
    let text = text(output).replace(['│', '\n'], " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn written(directory: &Path, text: &str) -> String {
    let file = directory.join("holdfast.toml");
    std::fs::write(&file, text).unwrap();
    file.display().to_string()
}

#[test]
fn init_does_not_guess_past_a_wrong_configuration() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let file = written(
        root.path(),
        &format!("[node]\nname = \"alpha\"\nstate_dir = {state:?}\nlink_listn = []\n"),
    );
    for verb in [
        &["init"][..],
        &["token"],
        &["join", "hf1-x"],
        &["certificate", "show"],
        &["status"],
    ] {
        let refused = holdfast(&[verb, &["--config", &file]].concat());
        let said = plain(&refused);
        assert_eq!(refused.status.code(), Some(1), "{verb:?}: {said}");
        assert!(said.contains("link_listn"), "{verb:?}: {said}");
    }
    assert!(!state.exists());
    // Named, and not there.
    let missing = root.path().join("none.toml").display().to_string();
    let refused = holdfast(&["init", "--config", &missing]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(plain(&refused).contains("none.toml"), "{}", text(&refused));
    // Put right, it is followed.
    let file = written(
        root.path(),
        &format!("[node]\nname = \"alpha\"\nstate_dir = {state:?}\n"),
    );
    let made = holdfast(&["init", "--config", &file]);
    assert!(made.status.success(), "{}", text(&made));
    assert!(state.join("identity.json").exists());
}

/// The verbs of a help text, by its list of commands.
fn verbs(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .map(str::to_owned)
        .collect()
}

/// Every verb with the verbs below it, in the words a person types.
fn all_verbs() -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![Vec::<String>::new()];
    while let Some(path) = open.pop() {
        let words: Vec<&str> = path.iter().map(String::as_str).collect();
        let help = holdfast(&[&words[..], &["--help"]].concat());
        assert!(help.status.success(), "{path:?}");
        for verb in verbs(&text(&help)) {
            open.push([&path[..], &[verb]].concat());
        }
        if !path.is_empty() {
            found.push(path);
        }
    }
    found
}

#[test]
fn every_verb_explains_itself_and_every_option_it_has() {
    let found = all_verbs();
    assert!(found.len() > 30, "{found:?}");
    for path in &found {
        let words: Vec<&str> = path.iter().map(String::as_str).collect();
        let help = text(&holdfast(&[&words[..], &["--help"]].concat()));
        let lines: Vec<&str> = help.lines().collect();
        assert!(!lines[0].trim().is_empty(), "{path:?} has no sentence");
        // An option or argument stands alone on its line where nothing explains it, with no deeper line behind it.
        for (at, line) in lines.iter().enumerate() {
            let entry = line.trim_start();
            if entry.starts_with("[env")
                || entry.starts_with("[default")
                || entry.starts_with("[possible")
            {
                continue;
            }
            if !(line.starts_with("  ")
                && (entry.starts_with('-') || entry.starts_with('<') || entry.starts_with('[')))
            {
                continue;
            }
            let explained = entry.contains("  ")
                || lines
                    .get(at + 1)
                    .is_some_and(|next| next.starts_with("          "));
            assert!(explained, "{path:?} does not explain: {entry}");
        }
    }
}

#[test]
fn pages_and_completions_know_every_verb_and_so_does_the_documentation() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().display().to_string();
    assert!(
        holdfast(&["man", "--directory", &directory])
            .status
            .success()
    );
    let completions = text(&holdfast(&["completions", "bash"]));
    let document =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md")).unwrap();
    for path in all_verbs() {
        let page = root.path().join(format!("holdfast-{}.1", path.join("-")));
        assert!(page.exists(), "{} is missing", page.display());
        let function = format!("holdfast-{}", path.join("-")).replace('-', "__subcmd__");
        assert!(completions.contains(&function), "{path:?} is not completed");
        let last = path.last().unwrap();
        if !["completions", "man"].contains(&last.as_str()) {
            assert!(
                document.contains(last.as_str()),
                "docs/cli.md lacks {path:?}"
            );
        }
    }
}

/// Ended with the test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_service_is_detached_while_the_replicator_runs_on_and_a_disk_only_where_another_can_serve() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path();
    let file = written(
        directory,
        &format!(
            "[node]\nname = \"alpha\"\nstate_dir = {:?}\ncontrol_socket = {:?}\nmetrics = \"off\"\nlink_listen = [\"127.0.0.1:0\"]\n\
             [[service]]\nname = \"db\"\nid = \"5e51ce00000000000000000000000001\"\nslot = 0\n\
             [[service.volume]]\nname = \"data\"\nbacking = {:?}\nsize = \"16MiB\"\n\
             [[service.peer]]\nnode = \"000000000000000000000000000000be\"\nslot = 1\naddresses = []\n",
            directory.join("state"),
            directory.join("control.sock"),
            directory.join("data.img"),
        ),
    );
    let run = |words: &[&str]| holdfast(&[words, &["--config", &file]].concat());
    for words in [&["init"][..], &["volume", "create", "db"]] {
        let done = run(words);
        assert!(done.status.success(), "{}", text(&done));
    }
    let replicator = Command::new(env!("CARGO_BIN_EXE_holdfast"))
        .args(["replicator", "--config", &file])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut replicator = Running(replicator.unwrap());
    let start = Instant::now();
    while !run(&["status"]).status.success() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "it does not start"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    // Neither as a secondary nor as a primary alone.
    let refused = run(&["volume", "detach-disk", "db"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        plain(&refused).contains("only a primary"),
        "{}",
        text(&refused)
    );
    let promoted = run(&["promote", "db", "--force", "--yes"]);
    assert!(promoted.status.success(), "{}", text(&promoted));
    let refused = run(&["volume", "detach-disk", "db"]);
    assert_eq!(refused.status.code(), Some(1));
    for part in [
        "no other copy",
        "Nothing was changed",
        "the disk stays in use",
    ] {
        assert!(plain(&refused).contains(part), "{part}: {}", text(&refused));
    }
    let detached = run(&["detach"]);
    assert!(detached.status.success(), "{}", text(&detached));
    assert!(plain(&run(&["status"])).contains("is detached on this node"));
    assert!(replicator.0.try_wait().unwrap().is_none(), "it runs on");
    // Its disk is free for the tools again.
    let removed = run(&["volume", "remove", "db", "data", "--yes"]);
    assert!(removed.status.success(), "{}", text(&removed));
}
