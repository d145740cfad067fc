//! Plays seeds on all cores, and names the one that goes wrong.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::ledger::Tally;

thread_local! {
    /// What went wrong first in the run of this thread: tokio and actix swallow the panics of tasks.
    static WRONG: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            WRONG.with_borrow_mut(|wrong| {
                wrong.get_or_insert_with(|| panic.to_string());
            });
            before(panic);
        }));
    });
}

/// Ends the run if anything of it has panicked.
pub(super) fn check() {
    if let Some(wrong) = WRONG.with_borrow(Clone::clone) {
        std::panic::resume_unwind(Box::new(wrong));
    }
}

/// Plays a seed. What went wrong comes back as words.
fn play(seed: u64, tells: bool) -> Result<Tally, String> {
    note_panics();
    WRONG.take();
    let played = catch_unwind(AssertUnwindSafe(|| super::run(seed, tells)));
    match (WRONG.take(), played) {
        (Some(wrong), _) => Err(wrong),
        (None, Ok(tally)) => Ok(tally),
        (None, Err(_)) => Err("it panicked".to_owned()),
    }
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
             offbook-runtime --lib simulation -- --nocapture"
        );
    }
    let mut tally = Tally::default();
    played.into_iter().flatten().for_each(|run| tally.add(run));
    tally
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
fn no_seed_breaks_a_promise() {
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
        tally.answers > 10 * seeds,
        "most questions are answered: {tally:?}"
    );
    assert!(
        tally.kills > seeds && tally.cuts > seeds,
        "much goes wrong: {tally:?}"
    );
}

#[test]
fn a_seed_is_one_run() {
    for seed in [3, 5, 8] {
        let first = play(seed, false);
        assert_eq!(first, play(seed, false), "seed {seed}");
    }
}

/// So many are played where nobody asks for more.
const SEEDS: u64 = 200;
