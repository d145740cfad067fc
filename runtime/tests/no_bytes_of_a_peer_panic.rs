//! The functions of the fuzz targets, on noise and on good inputs that were damaged: several hundred
//! thousand inputs, the same at every run, each given to every target; with `OFFBOOK_FUZZ_TIMES=N` so many
//! times as many, and others. `fuzz/` looks further, with a compiler of its own.

use offbook_runtime::fuzzing::{TARGETS, seeds};
use rand::{RngExt, SeedableRng, rngs::StdRng};

#[test]
fn noise() {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..200_000 * times() {
        let mut bytes = vec![0; random.random_range(0..400)];
        random.fill(&mut bytes[..]);
        for (_, target) in TARGETS {
            target(&bytes);
        }
    }
}

#[test]
fn good_inputs_that_were_damaged() {
    let mut random = StdRng::seed_from_u64(2);
    let seeds = seeds();
    for _ in 0..500_000 * times() {
        let mut bytes = seeds[random.random_range(0..seeds.len())].clone();
        for _ in 0..random.random_range(0..4) {
            damage(&mut bytes, &seeds, &mut random);
        }
        for (_, target) in TARGETS {
            target(&bytes);
        }
    }
}

fn times() -> u64 {
    std::env::var("OFFBOOK_FUZZ_TIMES").map_or(1, |times| times.parse().expect("a number"))
}

/// Flips, sets, cuts, repeats, or takes a piece of another input.
fn damage(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut StdRng) {
    let at = random.random_range(0..bytes.len().max(1));
    match random.random_range(0..6) {
        _ if bytes.is_empty() => bytes.push(random.random()),
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => bytes[at] = [0, 1, 127, 128, 250, 251, 252, 253, 254, 255][random.random_range(0..10)],
        2 => bytes.truncate(at),
        3 => {
            let piece = bytes[at..].to_vec();
            bytes.extend_from_slice(&piece);
        }
        4 => bytes.insert(at, random.random()),
        _ => {
            let other = &seeds[random.random_range(0..seeds.len())];
            let from = random.random_range(0..other.len());
            bytes.splice(at.., other[from..].iter().copied());
        }
    }
}
