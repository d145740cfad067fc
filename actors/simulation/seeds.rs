//! Plays seeds on all cores, and names the one that goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{Tally, World};

/// Plays a seed. What went wrong comes back as words.
fn play(seed: u64, tells: bool) -> Result<Tally, String> {
    let run = AssertUnwindSafe(|| World::new(seed, tells).run());
    catch_unwind(run).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "it panicked".to_owned())
    })
}

/// Plays seeds on all cores until one goes wrong; the lowest that did is told.
fn play_all(seeds: std::ops::Range<u64>) -> Tally {
    let next = AtomicU64::new(seeds.start);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut tally = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return Ok(tally);
            }
            match play(seed, false) {
                Ok(run) => tally.add(run),
                Err(why) => {
                    next.store(seeds.end, Ordering::Relaxed);
                    return Err((seed, why));
                }
            }
        }
    };
    let played: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("panics are caught"))
            .collect()
    });
    let failures = played.iter().filter_map(|played| played.as_ref().err());
    if let Some((seed, why)) = failures.min() {
        panic!(
            "seed {seed}: {why}\nplay it again: OFFBOOK_SIMULATION_SEED={seed} cargo test -p \
             offbook-actors --lib simulation -- --nocapture"
        );
    }
    let mut tally = Tally::default();
    played.into_iter().flatten().for_each(|run| tally.add(run));
    tally
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.epochs += other.epochs;
        self.answered += other.answered;
        self.failed += other.failed;
        self.tokens += other.tokens;
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is a number, not '{value}'")),
    )
}

#[test]
fn no_seed_loses_a_request_or_a_token() {
    if let Some(seed) = number("OFFBOOK_SIMULATION_SEED") {
        let played = play(seed, true);
        println!("{played:?}");
        played.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        return;
    }
    let seeds = number("OFFBOOK_SIMULATION_SEEDS").unwrap_or(SEEDS);
    let began = Instant::now();
    let tally = play_all(0..seeds);
    println!("{seeds} seeds in {:.1?}: {tally:?}", began.elapsed());
    assert!(
        tally.answered > 3 * seeds,
        "most requests are answered: {tally:?}"
    );
}

/// So many are played where nobody asks for more.
const SEEDS: u64 = 2000;
