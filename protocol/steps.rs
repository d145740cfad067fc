//! Where the time of a shard's steps has gone so far, and what it holds: figures that can be read at
//! any moment and compared with what they were before.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Rank;

/// The figures of one shard. What is counted is counted since its process began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardSteps {
    pub rank: Rank,
    pub node: String,
    /// Steps in which every row continued a sequence.
    pub decode: StepHistograms,
    /// Steps with rows of prompts.
    pub prefill: StepHistograms,
    pub kv: KvFigures,
    pub memory: MemoryFigures,
    pub throttle: ThrottleFigures,
}

/// The caches of all sequences, in positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvFigures {
    /// Reserved by sequences that run now, in whole blocks.
    pub in_use_tokens: u64,
    /// Kept of sequences that are gone, until somebody needs the room, in whole blocks.
    pub retained_tokens: u64,
    /// What they may come to; 0 until the shard has been in a group.
    pub capacity_tokens: u64,
    /// How often a sequence gave its cache up for an older one.
    pub preemptions: u64,
}

/// MLX's memory in the shard's process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFigures {
    /// In arrays: weights, caches, results of layers.
    pub active_bytes: u64,
    /// Freed, and kept for the next array.
    pub cache_bytes: u64,
    /// The most that was active at once.
    pub peak_bytes: u64,
    /// What MLX keeps to.
    pub limit_bytes: u64,
}

/// The window of layers in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleFigures {
    /// Layers in flight at most while prompts are read.
    pub prefill_window: u32,
    /// And while there is only decode.
    pub decode_window: u32,
    /// How much of a prompt a step reads, of the configured chunk, in thousandths, as this shard would have
    /// it; what the rank that samples says holds for all.
    pub chunk_permille: u32,
    /// How often it was made smaller.
    pub shrinks: u64,
    /// How often MLX's cache was cleared.
    pub cache_clears: u64,
}

/// One histogram for each part of a step; the step log says what the parts are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepHistograms {
    pub total: Histogram,
    pub model: Histogram,
    pub gpu_eval: Histogram,
    pub eval: Histogram,
    pub collective: Histogram,
}

impl StepHistograms {
    /// Each with the name that the step log gives it.
    pub fn parts(&self) -> [(&'static str, &Histogram); 5] {
        [
            ("total", &self.total),
            ("model", &self.model),
            ("gpu_eval", &self.gpu_eval),
            ("eval", &self.eval),
            ("collective", &self.collective),
        ]
    }
}

/// How often a time fell between two bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// `counts[i]`: times up to [`Histogram::BOUNDS_SECONDS`]`[i]` and above the bound before; the last
    /// entry counts all that are longer. Empty before the first time.
    counts: Vec<u64>,
    seconds: f64,
}

impl Histogram {
    /// Doubling from 50 µs, the length of the shortest steps, to 13 s.
    pub const BOUNDS_SECONDS: [f64; 19] = {
        let mut bounds = [50e-6; 19];
        let mut i = 1;
        while i < bounds.len() {
            bounds[i] = 2.0 * bounds[i - 1];
            i += 1;
        }
        bounds
    };

    pub fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts.resize(Self::BOUNDS_SECONDS.len() + 1, 0);
        self.counts[Self::BOUNDS_SECONDS.partition_point(|&bound| bound < seconds)] += 1;
        self.seconds += seconds;
    }

    /// How many times were observed.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Upper bound in seconds and count of each bucket, the last one without a bound.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = Self::BOUNDS_SECONDS.into_iter().chain([f64::INFINITY]);
        let counts = self.counts.iter().copied().chain(std::iter::repeat(0));
        bounds.zip(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_one_bucket() {
        let mut histogram = Histogram::default();
        for micros in [0, 50, 51, 100, 3_000, 99_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        assert_eq!(histogram.count(), 6);
        assert!((histogram.seconds() - 99.003_201).abs() < 1e-9);
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets[0], (50e-6, 2), "a bound belongs to its bucket");
        assert_eq!(buckets[1], (100e-6, 2));
        assert_eq!(*buckets.last().unwrap(), (f64::INFINITY, 1));
        assert_eq!(buckets.len(), Histogram::BOUNDS_SECONDS.len() + 1);
    }

    #[test]
    fn nothing_observed_is_all_buckets_empty() {
        let empty = Histogram::default();
        assert_eq!(empty.buckets().map(|(_, count)| count).sum::<u64>(), 0);
        assert_eq!(empty.buckets().count(), Histogram::BOUNDS_SECONDS.len() + 1);
    }
}
