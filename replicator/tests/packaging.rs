//! What users copy from `packaging/` and the README is read by the same code that reads theirs.

use holdfast_replicator::config::{Config, DEFAULT_CONTROL_SOCKET, DEFAULT_PATH, NodeRef};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn examples() -> BTreeMap<String, Config> {
    let directory = repository().join("packaging/examples");
    std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .map(|path| {
            let config = Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, config)
        })
        .collect()
}

#[test]
fn every_example_is_a_valid_configuration() {
    let names: Vec<String> = examples().into_keys().collect();
    assert_eq!(
        names,
        [
            "pair-alpha.toml",
            "pair-beta.toml",
            "services.toml",
            "third-alpha.toml",
            "third-beta.toml",
            "third-gamma.toml"
        ]
    );
}

/// The nodes of an example would find and accept each other.
#[test]
fn examples_of_several_nodes_fit_together() {
    let examples = examples();
    for set in ["pair-", "third-"] {
        let nodes: Vec<&Config> = examples
            .iter()
            .filter(|(name, _)| name.starts_with(set))
            .map(|(_, config)| config)
            .collect();
        for one in &nodes {
            assert_eq!(one.services[0].peers.len(), nodes.len() - 1, "{set}");
            for other in nodes
                .iter()
                .filter(|other| other.node.name != one.node.name)
            {
                let name = NodeRef::Name(other.node.name.clone());
                let (mine, theirs) = (&one.services[0], &other.services[0]);
                let peer = mine.peers.iter().find(|peer| peer.node == name);
                let peer = peer.unwrap_or_else(|| panic!("{set}{}: no {name}", one.node.name));
                let back = NodeRef::Name(one.node.name.clone());
                let back = theirs.peers.iter().find(|peer| peer.node == back).unwrap();
                assert_eq!(peer.slot, theirs.slot);
                assert_eq!(peer.addresses, [other.node.link_listen[0].to_string()]);
                // The copy that is asynchronous is so in the eyes of both.
                assert_eq!(peer.mode, back.mode, "{name} and {}", one.node.name);
                assert_eq!((&mine.name, mine.id), (&theirs.name, theirs.id));
                assert_eq!(mine.on_peer_loss, theirs.on_peer_loss);
                for (a, b) in mine.volumes.iter().zip(&theirs.volumes) {
                    assert_eq!((a.index, &a.name, a.size), (b.index, &b.name, b.size));
                }
            }
        }
    }
}

/// The five-minute guide says the same as the file it names.
#[test]
fn the_readme_and_its_example_agree() {
    let readme = read("README.md");
    let block = readme
        .split("```toml\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("README.md has a configuration");
    let shown = Config::parse(block, Path::new("README.md")).unwrap();
    let file = &examples()["pair-alpha.toml"];
    let (a, b) = (&shown.services[0], &file.services[0]);
    assert_eq!(shown.node.link_listen, file.node.link_listen);
    assert_eq!(shown.nbd.unix, file.nbd.unix);
    assert_eq!(
        (a.id, a.slot, a.mode, a.on_peer_loss),
        (b.id, b.slot, b.mode, b.on_peer_loss)
    );
    assert_eq!(a.volumes[0].backing, b.volumes[0].backing);
    assert_eq!(a.peers[0].addresses, b.peers[0].addresses);
}

/// Paths that the unit gives to the process are those the program uses by default.
#[test]
fn the_unit_fits_the_defaults() {
    let unit = read("packaging/systemd/holdfast-replicator.service");
    assert!(unit.contains(&format!("replicator --config {DEFAULT_PATH}\n")));
    assert!(unit.contains(&format!("ConditionPathExists={DEFAULT_PATH}\n")));
    assert_eq!(DEFAULT_CONTROL_SOCKET, "/run/holdfast/control.sock");
    let state = &examples()["pair-alpha.toml"].node.state_dir;
    assert_eq!(state, Path::new("/var/lib/holdfast"));
    for line in [
        "RuntimeDirectory=holdfast",
        "StateDirectory=holdfast",
        "Type=notify",
        "LimitMEMLOCK=infinity",
    ] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
}
