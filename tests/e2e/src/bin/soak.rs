//! The faults of the end-to-end tests in a random order, on one cluster after the other, for as long as asked. The last line is
//! a summary; the exit code is 1 if anything did not hold.

use holdfast_e2e::storm::storm;
use holdfast_e2e::story::{Fault, Story};
use holdfast_e2e::{Backing, Mix, Random, Settings};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: soak --minutes N [--seed N] [--network]";
/// Moments on one cluster, at most, before a new one is made with other settings.
const MOMENTS: u64 = 40;
/// Of a bad network, on one cluster.
const STORM: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Totals {
    clusters: u64,
    moments: u64,
    writes: u64,
    flushes: u64,
    faults: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let mut minutes = None;
    let mut seed = None;
    let mut network = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--network" {
            network = true;
            continue;
        }
        let value = arguments.next();
        let target = match argument.as_str() {
            "--minutes" => &mut minutes,
            "--seed" => &mut seed,
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        };
        *target = value.and_then(|text| text.parse::<u64>().ok());
        if target.is_none() {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    let Some(minutes) = minutes else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let seed = seed.unwrap_or_else(|| holdfast_e2e::random::seed("soak"));
    eprintln!("soak: seed {seed}, {minutes} minutes");
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let mut random = Random::new(seed);
    let mut totals = Totals::default();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // At least one cluster, however short the time.
        while totals.clusters == 0 || Instant::now() < end {
            if network || random.percent(20) {
                bad_network(&mut random, &mut totals, end);
            } else {
                cluster(&mut random, &mut totals, end);
            }
        }
    }));
    let faults: Vec<String> = totals
        .faults
        .iter()
        .map(|(fault, count)| format!("{fault} {count}"))
        .collect();
    println!(
        "soak: {}, seed {seed}, {} moments on {} clusters, {} writes and {} flushes acknowledged ({})",
        if outcome.is_ok() {
            "all held"
        } else {
            "FAILED"
        },
        totals.moments,
        totals.clusters,
        totals.writes,
        totals.flushes,
        faults.join(", ")
    );
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One cluster of which nothing fails but the network between its nodes.
fn bad_network(random: &mut Random, totals: &mut Totals, end: Instant) {
    let settings = Settings {
        on_peer_loss: ["suspend", "continue"][random.below(2) as usize],
        external_metadata: random.percent(40),
        ..Settings::default()
    };
    totals.clusters += 1;
    // Short ones: a history without an end would be looked through ever more slowly.
    let left = end.saturating_duration_since(Instant::now());
    let outcome = storm(&settings, random.word(), left.min(STORM));
    eprintln!("cluster {}: {settings:?}: {outcome:?}", totals.clusters);
    totals.writes += outcome.writes;
    let cuts = outcome.cuts[0] + outcome.cuts[1] + outcome.short_cuts;
    totals.moments += cuts;
    *totals.faults.entry("NetworkAway".into()).or_default() += cuts;
}

/// One cluster with settings by chance, and faults by chance.
fn cluster(random: &mut Random, totals: &mut Totals, end: Instant) {
    let volatile = random.percent(60);
    let settings = Settings {
        on_peer_loss: if random.percent(70) {
            "suspend"
        } else {
            "continue"
        },
        backing: if volatile {
            Backing::Faults
        } else {
            Backing::File
        },
        external_metadata: random.percent(40),
        sector_size: [None, Some(512), Some(4096)][random.below(3) as usize],
        volumes: vec![("data", 16 << random.below(3) << 20)],
        ..Settings::default()
    };
    let mut faults = Fault::KILLS.to_vec();
    if volatile {
        faults.extend(Fault::CUTS);
    }
    let seed = random.word();
    eprintln!("cluster {}: {settings:?}", totals.clusters + 1);
    totals.clusters += 1;
    let mut story = Story::begin(&settings, seed);
    story.mix = Mix {
        flushes: 1 + random.below(8),
        depth: 1 + random.below(12) as usize,
        longest: 8 << random.below(6),
        align: [1, 8][random.below(2) as usize],
        ..Mix::default()
    };
    let (writes, flushes) = (totals.writes, totals.flushes);
    for _ in 0..1 + random.below(MOMENTS) {
        let fault = faults[random.below(faults.len() as u64) as usize];
        *totals.faults.entry(format!("{fault:?}")).or_default() += 1;
        story.moment(fault);
        totals.moments += 1;
        let so_far = story.history.totals();
        totals.writes = writes + so_far.writes_acknowledged;
        totals.flushes = flushes + so_far.flushes_acknowledged;
        if Instant::now() >= end {
            break;
        }
    }
    story.cluster.stop();
    story.cluster.same_bytes(&[0, 1]);
}
