//! Virtual time, the events that are to come, and chance. All chance of a run comes from its seed by
//! arithmetic of our own, so that a seed means the same for ever.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

/// Events in the order of their time; those of one moment in the order in which they were noted.
pub(super) struct Timeline<E> {
    now: Duration,
    noted: u64,
    due: BinaryHeap<Reverse<Due<E>>>,
}

struct Due<E> {
    at: Duration,
    number: u64,
    event: E,
}

impl<E> Timeline<E> {
    pub(super) fn new() -> Self {
        Self {
            now: Duration::ZERO,
            noted: 0,
            due: BinaryHeap::new(),
        }
    }

    /// Time since the beginning.
    pub(super) fn now(&self) -> Duration {
        self.now
    }

    pub(super) fn after(&mut self, pause: Duration, event: E) {
        self.at(self.now + pause, event);
    }

    /// What lies in the past happens now.
    pub(super) fn at(&mut self, at: Duration, event: E) {
        self.noted += 1;
        self.due.push(Reverse(Due {
            at: at.max(self.now),
            number: self.noted,
            event,
        }));
    }

    /// It is `now`.
    pub(super) fn pass(&mut self, now: Duration) {
        self.now = now;
    }

    /// The next event that is due.
    pub(super) fn next(&mut self) -> Option<E> {
        let Reverse(first) = self.due.peek()?;
        if first.at > self.now {
            return None;
        }
        self.due.pop().map(|Reverse(due)| due.event)
    }
}

impl<E> Ord for Due<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl<E> PartialOrd for Due<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Due<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Due<E> {}

/// Random numbers by SplitMix64.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Less than `below`, which is at least 1.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        (self.next() % below as u64) as usize
    }

    /// True once in so many times.
    pub(super) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// From 0 up to 1.
    pub(super) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Milliseconds, both bounds included.
    pub(super) fn ms(&mut self, least: u64, most: u64) -> Duration {
        let micros = 1000 * least + self.next() % (1000 * (most - least) + 1);
        Duration::from_micros(micros)
    }
}

/// A number that has nothing to do with any other number's.
pub(super) fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
