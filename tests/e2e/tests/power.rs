//! Power cuts of disks with a volatile cache, under a load of writes and flushes in sync mode: no acknowledged flush is missing on
//! any copy in sync, whichever was cut, and the copies converge (D2, D7, and "Stability" of the design).

use holdfast_e2e::story::{Fault, Story};
use holdfast_e2e::{Backing, Mix, Settings, random};

fn moments(test: &str, settings: &Settings, faults: &[Fault], each: usize) {
    let settings = Settings {
        backing: Backing::Faults,
        ..settings.clone()
    };
    let mut story = Story::begin(&settings, random::seed(test));
    story.mix = Mix {
        flushes: 6,
        ..Mix::default()
    };
    for _ in 0..each {
        for fault in faults {
            story.moment(*fault);
        }
    }
    story.cluster.stop();
    story.cluster.same_bytes(&[0, 1]);
}

#[test]
fn the_power_of_the_primary_is_cut() {
    let settings = Settings::default();
    moments("cut primary", &settings, &[Fault::CutPrimary], 4);
}

#[test]
fn the_power_of_the_secondary_is_cut() {
    let settings = Settings::default();
    moments("cut secondary", &settings, &[Fault::CutSecondary], 4);
}

#[test]
fn the_power_of_both_is_cut() {
    let settings = Settings::default();
    moments("cut both", &settings, &[Fault::CutBoth], 4);
}

#[test]
fn the_secondary_is_power_cycled_and_then_takes_over() {
    let faults = [Fault::CycleSecondaryThenFailOver];
    moments("cycle secondary", &Settings::default(), &faults, 3);
    let settings = Settings {
        on_peer_loss: "continue",
        external_metadata: true,
        ..Settings::default()
    };
    moments("cycle secondary, continue", &settings, &faults, 3);
}
