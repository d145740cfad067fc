//! When the window of a kind of work shrinks and when it grows: pure, without IO or clock.
//!
//! At the high-water mark it is halved, below the low-water mark it grows by a tenth of its set point,
//! between the two it stays. A window says how many layers' results may wait in memory: halving gets
//! out of trouble in a few steps of its own, growing slowly does not run into it again at once.

use std::time::Duration;

use offbook_engine::WorkKind;

/// What memory looked like at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Since any moment that is the same for all samples.
    pub at: Duration,
    /// What the shard was doing.
    pub work: WorkKind,
    /// In MLX's arrays.
    pub active_bytes: u64,
    /// Freed, and kept by MLX.
    pub cache_bytes: u64,
    /// What `active_bytes` may come to.
    pub limit_bytes: u64,
    /// What the system could still give; `None` where it does not say.
    pub available_bytes: Option<u64>,
    /// Share of the last ten seconds in which some process waited for memory.
    pub stalled: f64,
}

impl Sample {
    /// How much of the limit is out of reach: used by MLX, or by others on this machine. From 0 to 1;
    /// 1 when nothing is left.
    fn used(&self) -> f64 {
        let limit = self.limit_bytes.max(1);
        let own = limit.saturating_sub(self.active_bytes);
        // MLX gives back what it keeps before it fails.
        let others = |available: u64| available.saturating_add(self.cache_bytes);
        let room = self.available_bytes.map_or(own, |a| own.min(others(a)));
        1.0 - room as f64 / limit as f64
    }

    fn level(&self) -> Level {
        let used = self.used();
        if used >= 1.0 {
            Level::Exhausted
        } else if used >= HIGH_WATER || self.stalled >= STALLED_HIGH {
            Level::High
        } else if used <= LOW_WATER && self.stalled <= STALLED_LOW {
            Level::Low
        } else {
            Level::Between
        }
    }

    /// Whether giving back what MLX keeps would help: it is much, and the mark is reached by it or by
    /// others.
    fn cache_is_in_the_way(&self) -> bool {
        let limit = self.limit_bytes as f64;
        let held = self.active_bytes.saturating_add(self.cache_bytes) as f64;
        let others = self
            .available_bytes
            .is_some_and(|available| (available as f64) < (1.0 - HIGH_WATER) * limit);
        let much = self.cache_bytes as f64 >= CACHE_WORTH_CLEARING * limit;
        much && (held >= HIGH_WATER * limit || others)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Low,
    Between,
    High,
    Exhausted,
}

/// What is to become of the window after a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Of the sample's kind of work.
    pub(crate) window: u32,
    pub(crate) change: Option<Change>,
    pub(crate) clear_cache: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Shrink,
    Grow,
}

/// See the module's own words. Samples come in the order of their time.
#[derive(Debug)]
pub(crate) struct Controller {
    prefill: Lane,
    decode: Lane,
    cleared_at: Option<Duration>,
}

/// The window of one kind of work.
#[derive(Debug)]
struct Lane {
    /// The most that it may be, at least 1.
    set_point: u32,
    window: u32,
    shrunk_at: Option<Duration>,
    grown_at: Option<Duration>,
}

impl Controller {
    /// Begins at the set points.
    pub(crate) fn new(prefill: u32, decode: u32) -> Self {
        let lane = |set_point: u32| Lane {
            set_point: set_point.max(1),
            window: set_point.max(1),
            shrunk_at: None,
            grown_at: None,
        };
        Self {
            prefill: lane(prefill),
            decode: lane(decode),
            cleared_at: None,
        }
    }

    pub(crate) fn observe(&mut self, sample: &Sample) -> Decision {
        let lane = match sample.work {
            WorkKind::Prefill => &mut self.prefill,
            WorkKind::Decode => &mut self.decode,
        };
        let before = lane.window;
        lane.follow(sample.level(), sample.at);
        let window = lane.window;
        let change = match window.cmp(&before) {
            std::cmp::Ordering::Less => Some(Change::Shrink),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(Change::Grow),
        };
        let clear_cache =
            sample.cache_is_in_the_way() && is_past(self.cleared_at, CLEAR_PAUSE, sample.at);
        if clear_cache {
            self.cleared_at = Some(sample.at);
        }
        Decision {
            window,
            change,
            clear_cache,
        }
    }
}

impl Lane {
    fn follow(&mut self, level: Level, at: Duration) {
        match level {
            Level::Between => {}
            Level::Exhausted => self.shrink(1, at),
            Level::High if is_past(self.shrunk_at, SHRINK_PAUSE, at) => {
                self.shrink((self.window / 2).max(1), at);
            }
            Level::High => {}
            Level::Low => {
                let calm = is_past(self.shrunk_at, CALM, at);
                if calm && is_past(self.grown_at, GROW_PAUSE, at) && self.window < self.set_point {
                    let step = (self.set_point / 10).max(1);
                    self.window = self.window.saturating_add(step).min(self.set_point);
                    self.grown_at = Some(at);
                }
            }
        }
    }

    fn shrink(&mut self, to: u32, at: Duration) {
        self.window = to;
        // Also when it was as small before: the trouble is not over.
        self.shrunk_at = Some(at);
    }
}

fn is_past(last: Option<Duration>, pause: Duration, at: Duration) -> bool {
    last.is_none_or(|last| at.saturating_sub(last) >= pause)
}

/// A tenth of the limit is left for what was submitted before a smaller window takes effect.
const HIGH_WATER: f64 = 0.90;
/// Far enough below that a window which grows by a tenth does not swing between the two.
const LOW_WATER: f64 = 0.75;
/// A machine whose processes wait for memory a tenth of the time is about to thrash.
const STALLED_HIGH: f64 = 0.10;
const STALLED_LOW: f64 = 0.02;
/// Clearing makes the next results be allocated anew: less than this is not worth it.
const CACHE_WORTH_CLEARING: f64 = 0.05;
/// A smaller window takes effect when layers under way are done: tens of milliseconds in prefill.
const SHRINK_PAUSE: Duration = Duration::from_millis(100);
const GROW_PAUSE: Duration = Duration::from_millis(100);
/// After trouble the window rests for so long before it grows.
const CALM: Duration = Duration::from_secs(1);
const CLEAR_PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
