//! The fuzz targets, without a fuzzer: over the golden bytes and changes of them. `HOLDFAST_FUZZ_SECONDS` runs longer,
//! `HOLDFAST_SEED` repeats a run.

mod common;
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Inputs per target in an ordinary run.
const INPUTS: u64 = 4000;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to eight changes of the kinds that find most: a bit, an interesting number, a part copied, cut, put in, or
/// taken from another input.
fn mutate(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8]) {
    const NUMBERS: [u64; 12] = [
        0,
        1,
        2,
        7,
        8,
        0x7f,
        0xff,
        0x7fff,
        0xffff,
        0x7fff_ffff,
        1 << 60,
        u64::MAX,
    ];
    for _ in 0..=rng.below(8) {
        let at = rng.below(input.len());
        match rng.below(6) {
            0 if !input.is_empty() => input[at] ^= 1 << rng.below(8),
            1 => {
                let number = NUMBERS[rng.below(NUMBERS.len())].to_le_bytes();
                let size = [1, 2, 4, 8][rng.below(4)];
                for (byte, value) in input.iter_mut().skip(at).zip(&number[..size]) {
                    *byte = *value;
                }
            }
            2 if !input.is_empty() => {
                let length = 1 + rng.below(64.min(input.len() - at));
                let to = rng.below(input.len() - length + 1);
                input.copy_within(at..at + length, to);
            }
            3 if rng.below(4) == 0 => input.truncate(at),
            4 => {
                let bytes: Vec<u8> = (0..rng.below(16)).map(|_| rng.next() as u8).collect();
                input.splice(at..at, bytes);
            }
            5 if !other.is_empty() => {
                let from = rng.below(other.len());
                for (byte, value) in input
                    .iter_mut()
                    .skip(at)
                    .zip(&other[from..])
                    .take(1 + rng.below(64))
                {
                    *byte = *value;
                }
            }
            _ => {}
        }
    }
}

#[test]
fn no_input_breaks_a_promise() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u64>().ok())
    };
    let time = number("HOLDFAST_FUZZ_SECONDS").map(Duration::from_secs);
    // An ordinary run is the same every time; a longer one is for what no run has tried.
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = number("HOLDFAST_SEED").unwrap_or(if time.is_some() { clock } else { 1 });
    println!("HOLDFAST_SEED={seed}");
    let seeds = common::seeds::all_seeds(&targets::BLOCKS);
    for (name, target) in targets::TARGETS {
        let corpus: Vec<&Vec<u8>> = seeds.iter().filter(|s| s.0 == name).map(|s| &s.2).collect();
        assert!(!corpus.is_empty(), "{name} has no first inputs");
        for input in &corpus {
            target(input);
        }
        let mut rng = Rng(seed);
        let begun = Instant::now();
        let mut inputs = 0;
        while time.map_or(inputs < INPUTS, |time| {
            begun.elapsed() < time / targets::TARGETS.len() as u32
        }) {
            let mut input = corpus[rng.below(corpus.len())].clone();
            let other = rng.below(corpus.len());
            mutate(&mut rng, &mut input, corpus[other]);
            inputs += 1;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(&input))) {
                let file = std::env::temp_dir().join(format!("holdfast-fuzz-{name}"));
                std::fs::write(&file, &input).unwrap();
                eprintln!(
                    "{name}, HOLDFAST_SEED={seed}: the input is in {}",
                    file.display()
                );
                std::panic::resume_unwind(panic);
            }
        }
        println!(
            "{name}: {} first inputs, {inputs} changed ones",
            corpus.len()
        );
    }
}
