//! Plays seeds on all cores, and names the one that goes wrong.

use std::cell::RefCell;
use std::fmt::Debug;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What is played, once for each seed.
pub struct Game<T> {
    /// Whose tests these are: for those who play a seed again.
    pub package: &'static str,
    /// Plays a seed to its end, on this thread; tells all that happens if the second argument is true.
    pub play: fn(u64, bool) -> T,
}

/// What a run came to.
pub trait Tally: Default + Debug + Send {
    /// Adds what another run came to.
    fn add(&mut self, other: Self);
}

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

/// Ends the run of this thread if anything of it has panicked.
pub fn check() {
    if let Some(wrong) = WRONG.with_borrow(Clone::clone) {
        std::panic::resume_unwind(Box::new(wrong));
    }
}

impl<T: Tally> Game<T> {
    /// Plays a seed.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn play(&self, seed: u64, tells: bool) -> Result<T, String> {
        note_panics();
        WRONG.take();
        let played = catch_unwind(AssertUnwindSafe(|| (self.play)(seed, tells)));
        match (WRONG.take(), played) {
            (Some(wrong), _) => Err(wrong),
            (None, Ok(tally)) => Ok(tally),
            (None, Err(_)) => Err("it panicked".to_owned()),
        }
    }

    /// Plays what the environment asks for, or so many seeds: gives the number of seeds and what all came to.
    /// `None` when one seed was asked for, which is told.
    ///
    /// # Panics
    /// When a seed goes wrong.
    pub fn play_asked(&self, usual: u64) -> Option<(u64, T)> {
        if let Some(seed) = number("OFFBOOK_SIMULATION_SEED") {
            let played = self.play(seed, true);
            println!("{played:?}");
            played.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            return None;
        }
        let seeds = number("OFFBOOK_SIMULATION_SEEDS").unwrap_or(usual);
        let first = number("OFFBOOK_SIMULATION_FIRST").unwrap_or(0);
        let began = Instant::now();
        let tally = self.play_all(first..first + seeds);
        println!("{seeds} seeds in {:.1?}: {tally:?}", began.elapsed());
        Some((seeds, tally))
    }

    /// Plays seeds on all cores until one goes wrong; the lowest that did is told.
    fn play_all(&self, seeds: Range<u64>) -> T {
        let next = AtomicU64::new(seeds.start);
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let work = || {
            let mut tally = T::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end {
                    return Ok(tally);
                }
                match self.play(seed, false) {
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
                 {} --lib simulation -- --nocapture",
                self.package
            );
        }
        let mut tally = T::default();
        played.into_iter().flatten().for_each(|run| tally.add(run));
        tally
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
