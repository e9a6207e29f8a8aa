//! A network that loses, delays, doubles, damages and reorders packets, and goes away now and then, in both directions or in one: no
//! wrong data, and everything is well again once the network is (D1, D4, D7, D8, D14).

use holdfast_e2e::process::available;
use holdfast_e2e::storm::storm;
use holdfast_e2e::{Settings, random};
use std::time::Duration;

const LENGTH: Duration = Duration::from_secs(10);

fn a_storm_passes(test: &str, on_peer_loss: &'static str) {
    if !available("fio") {
        return;
    }
    let settings = Settings {
        on_peer_loss,
        ..Settings::default()
    };
    let outcome = storm(&settings, random::seed(test), LENGTH);
    eprintln!("{test}: {outcome:?}");
    let counts = outcome.counts;
    for (what, count) in [
        ("lost", counts.lost),
        ("doubled", counts.doubled),
        ("damaged", counts.damaged),
        ("late", counts.late),
        ("overtaken", counts.overtaken),
        ("cut", counts.cut),
    ] {
        assert!(count > 0, "no packet was {what}: {counts:?}");
    }
}

#[test]
fn the_primary_waits_while_the_network_is_away() {
    a_storm_passes("storm, suspend", "suspend");
}

#[test]
fn the_primary_goes_on_alone_while_the_network_is_away() {
    a_storm_passes("storm, continue", "continue");
}
