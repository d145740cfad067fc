//! When to restart and when to give up. Pure: time and chance come in as arguments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often something may fail, and how long to pause before it is started again.
#[derive(Clone, Debug, PartialEq)]
pub struct RestartPolicy {
    /// So many restarts are allowed within `window`; one more is an escalation.
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

/// The failures that still count.
#[derive(Clone, Debug, Default)]
pub struct RestartHistory {
    failures: VecDeque<Instant>,
}

impl RestartHistory {
    /// Notes a failure at `now` and decides. `chance` is a random number from 0 up to 1.
    pub fn failed(&mut self, policy: &RestartPolicy, now: Instant, chance: f64) -> Verdict {
        while self
            .failures
            .front()
            .is_some_and(|&then| now.duration_since(then) >= policy.window)
        {
            self.failures.pop_front();
        }
        let before = u32::try_from(self.failures.len()).unwrap_or(u32::MAX);
        if before >= policy.intensity {
            return Verdict::Escalate;
        }
        self.failures.push_back(now);
        Verdict::RestartAfter(policy.pause(before, chance))
    }

    /// Forgets everything, as when an operator starts it by hand.
    pub fn clear(&mut self) {
        self.failures.clear();
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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            RestartHistory::default().failed(&none, Instant::now(), 0.0),
            Verdict::Escalate
        );
    }
}
