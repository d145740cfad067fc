//! How long a peer is left alone after dials that failed. Pure.

use std::time::{Duration, Instant};

use crate::hello::HandshakeError;
use crate::limits::Limits;

/// The pause after failed dials: calls within it fail at once.
#[derive(Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
    last: Option<HandshakeError>,
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// How many dials failed in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn failed(
        &mut self,
        error: HandshakeError,
        now: Instant,
        limits: &Limits,
        chance: f64,
    ) {
        let longest = pause(self.failures, limits.backoff_min, limits.backoff_max);
        self.until = Some(now + jittered(longest, chance));
        self.failures = self.failures.saturating_add(1);
        self.last = Some(error);
    }

    pub(super) fn waiting(&self, now: Instant) -> Option<HandshakeError> {
        if self.until.is_some_and(|until| now < until) {
            self.last.clone()
        } else {
            None
        }
    }
}

/// Doubles from `min` to `max`.
fn pause(failures: u32, min: Duration, max: Duration) -> Duration {
    min.saturating_mul(2u32.saturating_pow(failures)).min(max)
}

/// Between half of the pause and all of it: those that lost the same process at the same moment do not
/// all dial it at the same moment, again and again.
fn jittered(pause: Duration, chance: f64) -> Duration {
    pause.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let (min, max) = (Duration::from_millis(20), Duration::from_secs(1));
        let pauses = [0, 1, 2, 6, 40].map(|failures| pause(failures, min, max).as_millis());
        assert_eq!(pauses, [20, 40, 80, 1000, 1000]);
    }

    #[test]
    fn chance_takes_half_of_a_pause_at_most() {
        let pause = Duration::from_millis(100);
        let drawn = [0.0, 0.5, 1.0, 7.0].map(|chance| jittered(pause, chance).as_millis());
        assert_eq!(drawn, [100, 75, 50, 50]);
    }
}
