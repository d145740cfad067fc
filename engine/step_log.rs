//! Where the time of a step went, and the line that says so.

use std::fmt;
use std::time::Duration;

use offbook_protocol::{Rank, Step};

use crate::batch::KvUse;

/// The time of one step on one rank. `total` is `model` + `gpu_eval` + `eval`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTiming {
    pub step: Step,
    /// From the end of the last step to the end of this one; from its own start when the rank was
    /// idle before.
    pub total: Duration,
    /// Host time spent building and submitting a step.
    pub model: Duration,
    /// Host time spent waiting for the device while that computed.
    pub gpu_eval: Duration,
    /// The rest: the host was neither building nor waiting for computation. Orchestration.
    pub eval: Duration,
    /// How long the device waited for other ranks.
    pub collective: Duration,
    /// Sequences in the step.
    pub batch: usize,
    /// Tokens of prompts in the step; 0 for a step that only decodes.
    pub prefill_tokens: usize,
    /// Layers that may be in flight.
    pub window: u32,
    /// What the caches hold once the step was read.
    pub kv: KvUse,
}

impl StepTiming {
    /// Writes the step's line: `info` when `noted`, else `debug`.
    pub(crate) fn log(&self, rank: Rank, noted: Noted) {
        match noted {
            Noted::Info => tracing::info!(target: "offbook::step", %rank, "{self}"),
            Noted::Debug => tracing::debug!(target: "offbook::step", %rank, "{self}"),
        }
    }
}

/// How loudly a step is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    Info,
    Debug,
}

/// The line that operators' scripts already read.
impl fmt::Display for StepTiming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        write!(
            f,
            "[STEP {}] total={:.1}ms model={:.1}ms gpu_eval={:.1}ms eval={:.1}ms \
             collective={:.1}ms batch={} window={}",
            self.step,
            ms(self.total),
            ms(self.model),
            ms(self.gpu_eval),
            ms(self.eval),
            ms(self.collective),
            self.batch,
            self.window,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_the_one_that_was_promised() {
        let timing = StepTiming {
            step: Step(128),
            total: Duration::from_micros(36_000),
            model: Duration::from_micros(7_000),
            gpu_eval: Duration::from_micros(500),
            eval: Duration::from_micros(28_500),
            collective: Duration::from_micros(1_100),
            batch: 3,
            prefill_tokens: 0,
            window: 100,
            kv: KvUse::default(),
        };
        assert_eq!(
            timing.to_string(),
            "[STEP 128] total=36.0ms model=7.0ms gpu_eval=0.5ms eval=28.5ms collective=1.1ms \
             batch=3 window=100"
        );
    }
}
