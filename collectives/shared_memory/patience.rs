//! How a rank waits for its peers: it offers its core to others and looks again, which costs a
//! microsecond where cores are free, and sleeps where they turn out not to be.

use std::{
    thread,
    time::{Duration, Instant},
};

/// What one rank has learnt about the machine while it waited.
pub(super) struct Patience {
    /// How long a wait goes on before the rank sleeps.
    spin: Duration,
    /// Until then the machine counts as crowded, and nothing but sleeping is done.
    crowded_until: Instant,
    crowded_for: Duration,
}

impl Patience {
    pub(super) fn new(spin: Duration) -> Self {
        Self {
            spin,
            crowded_until: Instant::now(),
            crowded_for: Duration::ZERO,
        }
    }

    /// Lets others run for a moment, or says that it is time to sleep. It is `now`, and nothing has
    /// come for `quiet`.
    pub(super) fn is_up(&mut self, now: Instant, quiet: Duration) -> bool {
        if self.is_exhausted(now, quiet) {
            return true;
        }
        thread::yield_now();
        let back = Instant::now();
        if back.duration_since(now) > CROWDED_AFTER {
            self.note_crowd(back);
        }
        false
    }

    fn is_exhausted(&self, now: Instant, quiet: Duration) -> bool {
        quiet >= self.spin || now < self.crowded_until
    }

    /// Somebody took the core and kept it. Who sleeps is woken at once even then, who only steps
    /// aside waits for the other's whole slice of time: so we sleep for a while, and longer when it
    /// happens again soon.
    fn note_crowd(&mut self, now: Instant) {
        let again = now.duration_since(self.crowded_until) < self.crowded_for;
        self.crowded_for = match again {
            true => (2 * self.crowded_for).min(CROWDED_MAX),
            false => CROWDED_MIN,
        };
        self.crowded_until = now + self.crowded_for;
    }
}

/// Longer than a peer needs for its part of a small collective, shorter than a slice of time.
const CROWDED_AFTER: Duration = Duration::from_micros(500);
/// Many times the loss that was just made.
const CROWDED_MIN: Duration = Duration::from_millis(50);
const CROWDED_MAX: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lost_its_core_sleeps_longer_each_time() {
        let mut patience = Patience::new(Duration::from_secs(1));
        let start = Instant::now();
        assert!(!patience.is_exhausted(start, Duration::ZERO));
        assert!(patience.is_exhausted(start, Duration::from_secs(1)));

        patience.note_crowd(start);
        assert!(patience.is_exhausted(start + CROWDED_MIN / 2, Duration::ZERO));
        let over = start + CROWDED_MIN;
        assert!(!patience.is_exhausted(over, Duration::ZERO));
        patience.note_crowd(over + CROWDED_MIN / 2);
        assert_eq!(patience.crowded_for, 2 * CROWDED_MIN);
        // Long after, it begins anew.
        patience.note_crowd(over + Duration::from_secs(10));
        assert_eq!(patience.crowded_for, CROWDED_MIN);
    }
}
