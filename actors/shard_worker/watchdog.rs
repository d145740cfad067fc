//! Ends the shard's process when its engine's thread makes no progress: a device call that does not
//! return can be ended in no other way. The node starts another process, and reports the last words
//! of this one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

/// How long the engine's thread may make no progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StallLimits {
    /// Between two tensors read.
    pub load: Duration,
    /// In one step that reads prompts.
    pub prefill: Duration,
    /// In one step that does not.
    pub decode: Duration,
}

/// What the engine's thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing: it waits for orders.
    Idle,
    Load,
    Prefill,
    Decode,
}

/// What the engine's thread last began: written by it, read by the watchdog.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Something new begins, or the same goes on.
    pub(super) fn note(&self, phase: Phase) {
        let count = self.0.load(Ordering::Relaxed) / PHASES;
        // Only the engine's thread writes.
        self.0.store(
            count.wrapping_add(1).wrapping_mul(PHASES) + phase as u64,
            Ordering::Relaxed,
        );
    }
}

/// Starts the watchdog's thread. It ends with the process.
///
/// # Errors
/// When the system gives no thread.
pub(super) fn start(progress: Progress, limits: StallLimits) -> std::io::Result<()> {
    let watch = move || {
        let mut watch = Watch::new(limits);
        let mut before = Instant::now();
        loop {
            std::thread::sleep(LOOK_EVERY);
            let passed = before.elapsed();
            before = Instant::now();
            if let Some((phase, limit)) = watch.look(progress.0.load(Ordering::Relaxed), passed) {
                let what = match phase {
                    Phase::Idle => "idleness",
                    Phase::Load => "loading",
                    Phase::Prefill => "a step that reads a prompt",
                    Phase::Decode => "a decode step",
                };
                tracing::error!(
                    ?limit,
                    "the engine makes no progress in {what}: this process ends"
                );
                // A failure of its own, which nobody takes for a kill from outside.
                let _ = kill_process(getpid(), Signal::ALARM);
            }
        }
    };
    std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(watch)?;
    Ok(())
}

/// Decides, without a clock of its own.
#[derive(Debug)]
struct Watch {
    limits: StallLimits,
    seen: u64,
    still_for: Duration,
}

impl Watch {
    fn new(limits: StallLimits) -> Self {
        Self {
            limits,
            seen: 0,
            still_for: Duration::ZERO,
        }
    }

    /// The engine's thread has noted `now`, and `passed` went by since the last look. Gives what it
    /// does for longer than it may.
    fn look(&mut self, now: u64, passed: Duration) -> Option<(Phase, Duration)> {
        if now != self.seen {
            self.seen = now;
            self.still_for = Duration::ZERO;
            return None;
        }
        // When this thread was late, the machine slept or the process was stopped: the engine's
        // thread had no time either.
        self.still_for += passed.min(2 * LOOK_EVERY);
        let (phase, limit) = match now % PHASES {
            1 => (Phase::Load, self.limits.load),
            2 => (Phase::Prefill, self.limits.prefill),
            3 => (Phase::Decode, self.limits.decode),
            _ => return None,
        };
        (self.still_for >= limit).then_some((phase, limit))
    }
}

/// How many [`Phase`]s there are.
const PHASES: u64 = 4;
/// Much shorter than any limit that makes sense.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: StallLimits = StallLimits {
        load: Duration::from_millis(300),
        prefill: Duration::from_millis(200),
        decode: Duration::from_millis(100),
    };

    fn looks_until_the_end(progress: &Progress, watch: &mut Watch) -> Option<(Phase, u32)> {
        (1..1000).find_map(|look| {
            let word = progress.0.load(Ordering::Relaxed);
            let (phase, _) = watch.look(word, LOOK_EVERY)?;
            Some((phase, look))
        })
    }

    #[test]
    fn each_phase_has_its_limit_and_idleness_has_none() {
        for (phase, looks) in [(Phase::Load, 16), (Phase::Prefill, 11), (Phase::Decode, 6)] {
            let (progress, mut watch) = (Progress::default(), Watch::new(LIMITS));
            progress.note(phase);
            assert_eq!(
                looks_until_the_end(&progress, &mut watch),
                Some((phase, looks))
            );
            progress.note(Phase::Idle);
            assert_eq!(looks_until_the_end(&progress, &mut watch), None);
        }
    }

    #[test]
    fn whoever_goes_on_is_left_alone() {
        let (progress, mut watch) = (Progress::default(), Watch::new(LIMITS));
        for _ in 0..1000 {
            progress.note(Phase::Decode);
            let word = progress.0.load(Ordering::Relaxed);
            for _ in 0..5 {
                assert_eq!(watch.look(word, LOOK_EVERY), None);
            }
        }
    }

    #[test]
    fn time_in_which_nobody_ran_does_not_count() {
        let (progress, mut watch) = (Progress::default(), Watch::new(LIMITS));
        progress.note(Phase::Decode);
        let word = progress.0.load(Ordering::Relaxed);
        assert_eq!(watch.look(word, LOOK_EVERY), None);
        assert_eq!(watch.look(word, Duration::from_secs(3600)), None);
    }
}
