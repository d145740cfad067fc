//! What happens in a run, in words.

use std::cell::Cell;
use std::time::Duration;

use super::timeline::mix;

/// See the module's own words.
pub(super) struct Story {
    tells: bool,
    now: Cell<Duration>,
    digest: Cell<u64>,
    faults: Cell<u64>,
}

impl Story {
    pub(super) fn new(tells: bool) -> Self {
        Self {
            tells,
            now: Cell::default(),
            digest: Cell::new(0),
            faults: Cell::new(0),
        }
    }

    pub(super) fn pass(&self, now: Duration) {
        self.now.set(now);
    }

    pub(super) fn now(&self) -> Duration {
        self.now.get()
    }

    pub(super) fn note(&self, what: impl FnOnce() -> String) {
        let (now, what) = (self.now.get(), what());
        let mut digest = mix(self.digest.get() ^ now.as_micros() as u64);
        for byte in what.bytes() {
            digest = mix(digest ^ u64::from(byte));
        }
        self.digest.set(digest);
        if self.tells {
            println!("{:>9.3} {what}", now.as_secs_f64());
        }
    }

    pub(super) fn count_fault(&self) {
        self.faults.set(self.faults.get() + 1);
    }

    pub(super) fn faults(&self) -> u64 {
        self.faults.get()
    }

    /// Of all that was told, and when.
    pub(super) fn digest(&self) -> u64 {
        self.digest.get()
    }
}
