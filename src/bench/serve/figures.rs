//! What was measured of one server with one number of requests at the same time.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::Answer;

pub(in crate::bench) struct Figures {
    url: String,
    at_once: u32,
    complete: u64,
    tokens: u64,
    /// While requests of this server were under way.
    took: Duration,
    first: Vec<Duration>,
    between: Vec<Duration>,
    /// How many failed, by their status or what else it was.
    errors: BTreeMap<String, u64>,
}

impl Figures {
    pub(in crate::bench) const HEADING: &str = "url                             at once    done  failed   req/s   \
        tok/s  TTFT p50      p99   ITL p50      p99   (ms)";

    pub(in crate::bench) fn new(url: &str, at_once: u32) -> Self {
        Self {
            url: url.to_owned(),
            at_once,
            complete: 0,
            tokens: 0,
            took: Duration::ZERO,
            first: Vec::new(),
            between: Vec::new(),
            errors: BTreeMap::new(),
        }
    }

    pub(in crate::bench) fn add(&mut self, answers: Vec<Answer>, took: Duration) {
        self.took += took;
        for answer in answers {
            match answer {
                Answer::Complete {
                    first,
                    between,
                    tokens,
                } => {
                    self.complete += 1;
                    self.tokens += tokens;
                    self.first.push(first);
                    self.between.extend(between);
                }
                Answer::Failed(why) => *self.errors.entry(why).or_default() += 1,
            }
        }
        self.first.sort_unstable();
        self.between.sort_unstable();
    }

    pub(in crate::bench) fn json(&self) -> Value {
        json!({
            "url": self.url,
            "concurrency": self.at_once,
            "requests": self.complete,
            "requests_per_second": self.per_second(self.complete),
            "output_tokens": self.tokens,
            "output_tokens_per_second": self.per_second(self.tokens),
            "ttft_ms": {"p50": percentile(&self.first, 0.5), "p99": percentile(&self.first, 0.99)},
            "itl_ms": {"p50": percentile(&self.between, 0.5), "p99": percentile(&self.between, 0.99)},
            "errors": self.errors,
        })
    }

    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.took.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |sorted: &[Duration], share| {
            percentile(sorted, share).map_or_else(|| "-".into(), |ms| format!("{ms:.2}"))
        };
        write!(
            f,
            "{:<32}{:>7}{:>8}{:>8}{:>8.2}{:>8.1}{:>10}{:>9}{:>10}{:>9}",
            self.url,
            self.at_once,
            self.complete,
            self.errors.values().sum::<u64>(),
            self.per_second(self.complete),
            self.per_second(self.tokens),
            ms(&self.first, 0.5),
            ms(&self.first, 0.99),
            ms(&self.between, 0.5),
            ms(&self.between, 0.99),
        )?;
        for (why, count) in &self.errors {
            write!(f, "\n    {count} failed: {why}")?;
        }
        Ok(())
    }
}

/// In milliseconds; the least value that no smaller a share of all is at or below.
pub(in crate::bench) fn percentile(sorted: &[Duration], share: f64) -> Option<f64> {
    let place = (sorted.len() as f64 * share).ceil() as usize;
    let value = sorted.get(place.saturating_sub(1))?;
    Some(value.as_secs_f64() * 1e3)
}
