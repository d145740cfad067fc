//! What the engine's thread notes of every step, for whoever asks.

use std::sync::{Arc, Mutex, PoisonError};

use offbook_engine::StepTiming;
use offbook_protocol::StepHistograms;

/// Shared by the engine's thread, which writes, and the actor, which is asked now and then.
#[derive(Clone, Default)]
pub(super) struct StepRecord(Arc<Mutex<Steps>>);

/// Since the process began.
#[derive(Clone, Default)]
pub(super) struct Steps {
    pub(super) decode: StepHistograms,
    pub(super) prefill: StepHistograms,
}

impl StepRecord {
    pub(super) fn note(&self, timing: &StepTiming) {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = match timing.prefill_tokens {
            0 => &mut steps.decode,
            _ => &mut steps.prefill,
        };
        kind.total.observe(timing.total);
        kind.model.observe(timing.model);
        kind.gpu_eval.observe(timing.gpu_eval);
        kind.eval.observe(timing.eval);
        kind.collective.observe(timing.collective);
    }

    pub(super) fn read(&self) -> Steps {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
