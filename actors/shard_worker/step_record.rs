//! What the engine's thread notes of every step, for whoever asks.

use std::sync::{Arc, Mutex, PoisonError};

use offbook_engine::StepTiming;
use offbook_engine::batch::KvUse;
use offbook_protocol::{KvFigures, StepHistograms};

/// Shared by the engine's thread, which writes, and the actor, which is asked now and then.
#[derive(Clone, Default)]
pub(super) struct StepRecord(Arc<Mutex<Steps>>);

/// Since the process began.
#[derive(Clone, Default)]
pub(super) struct Steps {
    pub(super) decode: StepHistograms,
    pub(super) prefill: StepHistograms,
    pub(super) kv: KvFigures,
    /// Of `kv.preemptions`, those of epochs that are over: a batch counts from its own beginning.
    preemptions_before: u64,
}

impl StepRecord {
    pub(super) fn note(&self, timing: &StepTiming) {
        self.change(|steps| {
            let kind = match timing.prefill_tokens {
                0 => &mut steps.decode,
                _ => &mut steps.prefill,
            };
            kind.total.observe(timing.total);
            kind.model.observe(timing.model);
            kind.gpu_eval.observe(timing.gpu_eval);
            kind.eval.observe(timing.eval);
            kind.collective.observe(timing.collective);
            steps.note_kv(timing.kv);
        });
    }

    /// What the caches hold while nothing runs.
    pub(super) fn note_idle(&self, kv: KvUse) {
        self.change(|steps| steps.note_kv(kv));
    }

    /// An epoch is over, and its caches are gone.
    pub(super) fn note_end(&self) {
        self.change(|steps| {
            steps.kv.in_use_tokens = 0;
            steps.kv.retained_tokens = 0;
            steps.preemptions_before = steps.kv.preemptions;
        });
    }

    pub(super) fn read(&self) -> Steps {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn change(&self, change: impl FnOnce(&mut Steps)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Steps {
    fn note_kv(&mut self, kv: KvUse) {
        self.kv = KvFigures {
            in_use_tokens: kv.held_tokens,
            retained_tokens: kv.retained_tokens,
            capacity_tokens: kv.capacity_tokens,
            preemptions: self.preemptions_before + kv.preemptions,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_epoch_empties_the_caches_and_forgets_no_preemption() {
        let record = StepRecord::default();
        let kv = |held_tokens, preemptions| KvUse {
            held_tokens,
            retained_tokens: 256,
            capacity_tokens: 1024,
            preemptions,
        };
        record.note_idle(kv(512, 3));
        record.note_end();
        let after = record.read().kv;
        assert_eq!((after.in_use_tokens, after.preemptions), (0, 3));
        assert_eq!(after.retained_tokens, 0);
        assert_eq!(after.capacity_tokens, 1024);
        record.note_idle(kv(256, 2));
        let next = record.read().kv;
        assert_eq!((next.in_use_tokens, next.preemptions), (256, 5));
    }
}
