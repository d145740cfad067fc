//! When to restart and when to give up. Pure: time and chance come in as arguments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often something may fail, and how long to pause before it is started again.
#[derive(Clone, Debug, PartialEq)]
pub struct RestartPolicy {
    /// So many failures are made good within `window`; one more is an escalation. What was ended from
    /// outside is not one: see [`RestartHistory::killed`].
    pub intensity: u32,
    /// The sliding window in which restarts are counted.
    pub window: Duration,
    /// The pause before the first restart; it doubles with each further one in the window.
    pub backoff_min: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// How much of a pause is left to chance, from 0 (none) to 1 (all), so that what failed
    /// together does not start together.
    pub jitter: f64,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            intensity: 5,
            window: Duration::from_secs(60),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            jitter: 0.2,
        }
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start it again after this pause.
    RestartAfter(Duration),
    /// It failed too often: leave it, and tell whoever supervises the supervisor.
    Escalate,
}

/// The ends that still count.
#[derive(Clone, Debug, Default)]
pub struct RestartHistory {
    failures: VecDeque<Instant>,
    /// When something from outside ended it that had hardly begun.
    kills: VecDeque<Instant>,
}

impl RestartHistory {
    /// Notes a failure at `now` and decides. `chance` is a random number from 0 up to 1.
    pub fn failed(&mut self, policy: &RestartPolicy, now: Instant, chance: f64) -> Verdict {
        forget(&mut self.failures, policy, now);
        let before = u32::try_from(self.failures.len()).unwrap_or(u32::MAX);
        if before >= policy.intensity {
            return Verdict::Escalate;
        }
        self.failures.push_back(now);
        Verdict::RestartAfter(policy.pause(before, chance))
    }

    /// Notes that something from outside ended at `now` what had run for `lived`, and decides. That is
    /// no fault of its own: what had settled is started again at once, however often it happens. What
    /// is killed the moment that it starts counts, a little, for whatever does so may never stop.
    pub fn killed(
        &mut self,
        policy: &RestartPolicy,
        now: Instant,
        lived: Duration,
        chance: f64,
    ) -> Verdict {
        if policy.intensity == 0 {
            return Verdict::Escalate;
        }
        if lived >= SETTLED {
            return Verdict::RestartAfter(Duration::ZERO);
        }
        forget(&mut self.kills, policy, now);
        let before = u32::try_from(self.kills.len()).unwrap_or(u32::MAX);
        if before >= policy.intensity.saturating_mul(KILLS_PER_FAILURE) {
            return Verdict::Escalate;
        }
        self.kills.push_back(now);
        Verdict::RestartAfter(policy.pause(0, chance))
    }

    /// Forgets everything, as when an operator starts it by hand.
    pub fn clear(&mut self) {
        self.failures.clear();
        self.kills.clear();
    }
}

/// Leaves out what is over for so long that it does not count any more.
fn forget(ends: &mut VecDeque<Instant>, policy: &RestartPolicy, now: Instant) {
    let is_over = |then: &Instant| now.duration_since(*then) >= policy.window;
    while ends.front().is_some_and(is_over) {
        ends.pop_front();
    }
}

impl RestartPolicy {
    fn pause(&self, before: u32, chance: f64) -> Duration {
        let full = self
            .backoff_min
            .saturating_mul(2u32.saturating_pow(before))
            .min(self.backoff_max);
        full.mul_f64(1.0 - self.jitter.clamp(0.0, 1.0) * chance.clamp(0.0, 1.0))
    }
}

/// A process that has lived for so long has started: it has its key, its port and its peers.
const SETTLED: Duration = Duration::from_secs(2);

/// Somebody who kills what they like every second does so 60 times within the default window, and a
/// process that is well shall not be given up for it: five failures are a hundred such kills.
const KILLS_PER_FAILURE: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_settled_is_started_again_at_once_however_often_it_is_killed() {
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        for _ in 0..1000 {
            let verdict = history.killed(&policy(), now, SETTLED, 0.0);
            assert_eq!(verdict, Verdict::RestartAfter(Duration::ZERO));
        }
        // And none of them is held against it when it fails by itself.
        let failed = [(); 4].map(|()| history.failed(&policy(), now, 0.0));
        let given_up = failed.map(|verdict| verdict == Verdict::Escalate);
        assert_eq!(given_up, [false, false, false, true]);
    }

    #[test]
    fn a_kill_every_second_ends_nothing_and_one_at_every_start_does() {
        let policy = RestartPolicy::default();
        let kills = |pause: Duration| {
            let (mut history, now) = (RestartHistory::default(), Instant::now());
            let escalates = |kill: &u32| {
                let verdict = history.killed(&policy, now + *kill * pause, pause, 0.0);
                verdict == Verdict::Escalate
            };
            (0..1000).find(escalates)
        };
        assert_eq!(kills(Duration::from_secs(1)), None);
        assert_eq!(kills(Duration::from_millis(100)), Some(100));
    }

    #[test]
    fn the_pause_after_a_kill_stays_short() {
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        for _ in 0..3 * KILLS_PER_FAILURE {
            let verdict = history.killed(&policy(), now, Duration::ZERO, 0.0);
            assert_eq!(verdict, Verdict::RestartAfter(policy().backoff_min));
        }
    }

    fn policy() -> RestartPolicy {
        RestartPolicy {
            intensity: 3,
            window: Duration::from_secs(10),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_millis(300),
            jitter: 0.5,
        }
    }

    #[test]
    fn one_failure_too_many_in_the_window_escalates() {
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        for second in 0..3 {
            let verdict = history.failed(&policy(), now + Duration::from_secs(second), 0.0);
            assert!(matches!(verdict, Verdict::RestartAfter(_)));
        }
        assert_eq!(
            history.failed(&policy(), now + Duration::from_secs(9), 0.0),
            Verdict::Escalate
        );
    }

    #[test]
    fn the_window_slides() {
        // A failure every four seconds never has more than three in any ten.
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        for count in 0..100 {
            let verdict = history.failed(&policy(), now + Duration::from_secs(4 * count), 0.0);
            assert!(
                matches!(verdict, Verdict::RestartAfter(_)),
                "failure {count}"
            );
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        let pauses = [(); 3].map(|()| match history.failed(&policy(), now, 0.0) {
            Verdict::RestartAfter(pause) => pause.as_millis(),
            Verdict::Escalate => panic!("too early"),
        });
        assert_eq!(pauses, [100, 200, 300]);
    }

    #[test]
    fn chance_shortens_a_pause_by_the_jitter_at_most() {
        assert_eq!(policy().pause(0, 1.0), Duration::from_millis(50));
        assert_eq!(policy().pause(0, 0.5), Duration::from_millis(75));
        assert_eq!(policy().pause(0, 7.0), Duration::from_millis(50));
    }

    #[test]
    fn a_policy_of_no_restarts_escalates_at_once() {
        let none = RestartPolicy {
            intensity: 0,
            ..policy()
        };
        let (mut history, now) = (RestartHistory::default(), Instant::now());
        assert_eq!(history.failed(&none, now, 0.0), Verdict::Escalate);
        assert_eq!(history.killed(&none, now, SETTLED, 0.0), Verdict::Escalate);
    }
}
