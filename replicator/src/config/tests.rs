use super::*;

const GOOD: &str = r#"
[node]
name = "alpha"
state_dir = "/var/lib/holdfast"
link_listen = ["127.0.0.1:7741"]

[nbd]
unix = "/run/holdfast/nbd.sock"

[[service]]
name = "db"
id = "0123456789abcdef0123456789abcdef"
slot = 0

[[service.volume]]
name = "data"
backing = "/dev/vg/db"
size = "10GiB"

[[service.volume]]
name = "log"
backing = "/dev/vg/dblog"
metadata = "/var/lib/holdfast-meta/dblog"

[[service.peer]]
node = "beta"
slot = 1
addresses = ["10.0.0.2:7741", "beta.example:7741"]
mode = "async"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/holdfast/holdfast.toml"))
}

#[test]
fn a_whole_configuration() {
    let config = parse(GOOD).unwrap();
    let service = config.service("db").unwrap();
    assert_eq!(service.volumes[0].size, Some(10 << 30));
    assert_eq!(service.volumes[1].index, VolumeIndex(1));
    assert_eq!(
        service.volumes[1].metadata,
        MetadataPlace::External("/var/lib/holdfast-meta/dblog".into())
    );
    assert_eq!(service.peers[0].mode, Mode::Async);
    assert_eq!(service.mode, Mode::Sync);
    assert_eq!(service.on_peer_loss, OnPeerLoss::Suspend);
    assert_eq!(config.node.metrics, Some("127.0.0.1:9741".parse().unwrap()));
}

/// Each change makes the configuration wrong; the error names the file and what is given beside it.
#[test]
fn every_contradiction_is_refused_with_file_and_key() {
    let cases = [
        ("name = \"alpha\"", "name = \"al/pha\"", "node.name"),
        ("name = \"alpha\"", "nmae = \"alpha\"", "nmae"),
        (
            "name = \"alpha\"",
            "name = \"alpha\"\nspin_us = 1001",
            "node.spin_us",
        ),
        ("slot = 0", "slot = 9", "service \"db\".slot"),
        ("slot = 0", "slot = 1", "peer \"beta\".slot"),
        ("node = \"beta\"", "node = \"alpha\"", "peer \"alpha\".node"),
        ("\"10.0.0.2:7741\"", "\"10.0.0.2\"", "addresses"),
        (
            "0123456789abcdef0123456789abcdef",
            "0123",
            "service \"db\".id",
        ),
        ("name = \"log\"", "name = \"data\"", "volume \"data\""),
        ("/dev/vg/dblog", "/dev/vg/db", "volume \"log\".backing"),
        (
            "/var/lib/holdfast-meta/dblog",
            "/dev/vg/db",
            "volume \"log\".metadata",
        ),
        ("\"10GiB\"", "\"10GB\"", "volume \"data\".size"),
        ("\"10GiB\"", "4097", "volume \"data\".size"),
        ("link_listen = [\"127.0.0.1:7741\"]", "", "node.link_listen"),
        ("[nbd]", "[nbd]\ntcp = \"10.0.0.1:10809\"", "nbd.tcp"),
        (
            "state_dir = \"/var",
            "metrics = \"0.0.0.0:1\"\nstate_dir = \"/var",
            "node.metrics",
        ),
        (
            "slot = 0\n",
            "slot = 0\ntuning.heartbeat_ms = 1\n",
            "tuning.heartbeat_ms",
        ),
        (
            "slot = 0\n",
            "slot = 0\ntuning.resync_chunk_bytes = 5000\n",
            "tuning.resync_chunk_bytes",
        ),
    ];
    for (from, to, key) in cases {
        assert!(GOOD.contains(from), "{from}");
        let error = parse(&GOOD.replacen(from, to, 1))
            .expect_err(to)
            .to_string();
        assert!(error.contains("/etc/holdfast/holdfast.toml"), "{error}");
        assert!(error.contains(key), "{key} in: {error}");
    }
}

#[test]
fn a_service_twice_is_refused() {
    let second = "[[service]]\nname = \"db\"\nid = \"1123456789abcdef0123456789abcdef\"\nslot = 0\n\
                  [[service.volume]]\nname = \"x\"\nbacking = \"/x\"\n";
    let error = parse(&format!("{GOOD}{second}")).unwrap_err().to_string();
    assert!(error.contains("two services have this name"), "{error}");
    let second = second.replace("\"db\"", "\"web\"").replace("1123", "0123");
    let error = parse(&format!("{GOOD}{second}")).unwrap_err().to_string();
    assert!(error.contains("two services have this id"), "{error}");
}

#[test]
fn sizes() {
    assert_eq!(parse_size("4096"), Some(4096));
    assert_eq!(parse_size(" 64 KiB"), Some(64 << 10));
    assert_eq!(parse_size("1.5G"), Some(3 << 29));
    assert_eq!(parse_size("1.0000001K"), None);
    assert_eq!(parse_size("20000000P"), None);
    assert_eq!(parse_size("x"), None);
    assert_eq!(parse_size(""), None);
}

#[test]
fn ids() {
    assert_eq!(
        parse_uuid("00000000-0000-0000-0000-00000000000a"),
        Some(Uuid(10))
    );
    assert_eq!(parse_uuid("00000000000000000000000000000000"), None);
    assert_eq!(parse_uuid("+0000000000000000000000000000001"), None);
    assert_eq!(parse_uuid("beta"), None);
}
