//! When the window of a kind of work shrinks and when it grows, and the chunk of prompts with it: pure,
//! without IO or clock.
//!
//! At the high-water mark it is halved, below the low-water mark it grows by a tenth of its set point,
//! between the two it stays. A window says how many layers' results may wait in memory: halving gets
//! out of trouble in a few steps of its own, growing slowly does not run into it again at once. What counts
//! is all that MLX holds, in arrays and for later; where giving up what is for later is enough, that goes
//! first, and MLX keeps less from then on.

mod chunk;

use std::time::Duration;

use offbook_engine::WorkKind;

use self::chunk::Chunk;

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
    /// What both together may come to.
    pub limit_bytes: u64,
    /// What the system could still give; `None` where it does not say.
    pub available_bytes: Option<u64>,
    /// Share of the last ten seconds in which some process waited for memory.
    pub stalled: f64,
}

impl Sample {
    /// How much of the limit is out of reach: held by MLX, or used by others on this machine. From 0 to 1;
    /// 1 when nothing is left.
    fn used(&self) -> f64 {
        let limit = self.limit_bytes.max(1);
        let held = self.active_bytes.saturating_add(self.cache_bytes);
        let own = limit.saturating_sub(held);
        let room = own.min(self.available_bytes.unwrap_or(u64::MAX));
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

    /// The same moment, had MLX given back what it keeps for later.
    fn cleared(&self) -> Self {
        let given_back = |available: u64| available.saturating_add(self.cache_bytes);
        Self {
            cache_bytes: 0,
            available_bytes: self.available_bytes.map(given_back),
            ..*self
        }
    }

    /// What MLX may keep after it gave up what it kept, so that this alone does not reach the mark again.
    fn narrow_cache_bytes(&self) -> u64 {
        let mark = (HIGH_WATER * self.limit_bytes as f64) as u64;
        mark.saturating_sub(self.active_bytes) / 2
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
    /// How much of a prompt a step reads, of the configured chunk, in thousandths.
    pub(crate) chunk_permille: u32,
    pub(crate) clear_cache: bool,
    /// What is to become of the bound on what MLX keeps for later.
    pub(crate) cache_bound: Option<CacheBound>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheBound {
    /// So many bytes, or what it was if that is less.
    Narrow(u64),
    /// What it was.
    Wide,
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
    chunk: Chunk,
    cleared_at: Option<Duration>,
    /// Whether MLX keeps less since then.
    is_narrow: bool,
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
            chunk: Chunk::default(),
            cleared_at: None,
            is_narrow: false,
        }
    }

    pub(crate) fn observe(&mut self, sample: &Sample) -> Decision {
        let clear_cache = self.clears(sample);
        let level = sample.level();
        let cleared = sample.cleared().level();
        let level = match level {
            // What comes of it is seen in the next sample.
            Level::High | Level::Exhausted if clear_cache && !cleared.is_high() => Level::Between,
            // MLX gives back what it keeps before it fails.
            Level::Exhausted if cleared != Level::Exhausted => Level::High,
            level => level,
        };
        let lane = match sample.work {
            WorkKind::Prefill => &mut self.prefill,
            WorkKind::Decode => &mut self.decode,
        };
        let before = lane.window;
        lane.follow(level, sample.at);
        let window = lane.window;
        let change = match window.cmp(&before) {
            std::cmp::Ordering::Less => Some(Change::Shrink),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(Change::Grow),
        };
        Decision {
            window,
            change,
            chunk_permille: self.chunk.follow(level, sample),
            clear_cache,
            cache_bound: self.cache_bound(clear_cache, sample),
        }
    }

    /// Whether MLX is to give back what it keeps: it is much, and the mark is reached by it or by others.
    fn clears(&mut self, sample: &Sample) -> bool {
        let much = sample.cache_bytes as f64 >= CACHE_WORTH_CLEARING * sample.limit_bytes as f64;
        let clears =
            much && sample.used() >= HIGH_WATER && is_past(self.cleared_at, CLEAR_PAUSE, sample.at);
        if clears {
            self.cleared_at = Some(sample.at);
        }
        clears
    }

    fn cache_bound(&mut self, cleared: bool, sample: &Sample) -> Option<CacheBound> {
        if cleared {
            self.is_narrow = true;
            return Some(CacheBound::Narrow(sample.narrow_cache_bytes()));
        }
        let calm = sample.level() == Level::Low && is_past(self.cleared_at, CALM, sample.at);
        (calm && std::mem::take(&mut self.is_narrow)).then_some(CacheBound::Wide)
    }
}

impl Level {
    fn is_high(self) -> bool {
        matches!(self, Self::High | Self::Exhausted)
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
