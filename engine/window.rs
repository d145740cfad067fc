//! How many layers may be in flight on the device, and how much of a prompt memory has room for in one
//! step. The step loop reads it before each submission, without asking anybody; whoever watches the memory
//! moves it meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What a step does. A step with a row of a prompt is prefill, whoever decodes beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkKind {
    Prefill,
    Decode,
}

/// Layers in flight at most, by kind of work, and the kind that is under way. Never below 1.
#[derive(Debug)]
pub struct Window {
    prefill: AtomicU32,
    decode: AtomicU32,
    prefills: AtomicBool,
    chunk_permille: AtomicU32,
    /// Of the configured chunk, in thousandths: what was said last to be read in a step, and the most that may
    /// be said next.
    chunk_permille_said: AtomicU32,
    chunk_permille_next: AtomicU32,
}

impl Window {
    pub fn new(prefill: u32, decode: u32) -> Self {
        let window = Self {
            prefill: AtomicU32::new(1),
            decode: AtomicU32::new(1),
            prefills: AtomicBool::new(false),
            chunk_permille: AtomicU32::new(CHUNK_AS_CONFIGURED),
            chunk_permille_said: AtomicU32::new(CHUNK_AS_CONFIGURED),
            chunk_permille_next: AtomicU32::new(CHUNK_AS_CONFIGURED),
        };
        window.set(WorkKind::Prefill, prefill);
        window.set(WorkKind::Decode, decode);
        window
    }

    /// Layers in flight at most in this kind of work.
    pub fn layers(&self, work: WorkKind) -> u32 {
        self.of(work).load(Ordering::Relaxed)
    }

    /// Holds from the next submission on, also within a step.
    pub fn set(&self, work: WorkKind, layers: u32) {
        self.of(work).store(layers.max(1), Ordering::Relaxed);
    }

    /// How many tokens of prompts memory has room for in a step, where so many are configured; at least 1. From
    /// one step to the next it grows by a tenth of that: a long step has memory to spare at its end, whatever it
    /// took at its beginning, and the next one shows what a tenth more takes before there is another.
    pub(crate) fn chunk_tokens(&self, configured: usize) -> usize {
        let next = self.chunk_permille_next.load(Ordering::Relaxed);
        let permille = self.chunk_permille().min(next);
        self.chunk_permille_said.store(permille, Ordering::Relaxed);
        (configured.saturating_mul(permille as usize) / CHUNK_AS_CONFIGURED as usize).max(1)
    }

    /// Of the configured chunk, in thousandths.
    pub fn chunk_permille(&self) -> u32 {
        self.chunk_permille.load(Ordering::Relaxed)
    }

    /// Holds on all ranks a few steps after it is set on the one that samples.
    pub fn set_chunk_permille(&self, permille: u32) {
        self.chunk_permille.store(permille, Ordering::Relaxed);
    }

    /// What the step that was begun last does.
    pub fn work(&self) -> WorkKind {
        match self.prefills.load(Ordering::Relaxed) {
            true => WorkKind::Prefill,
            false => WorkKind::Decode,
        }
    }

    pub(crate) fn begin(&self, work: WorkKind) {
        let prefills = work == WorkKind::Prefill;
        self.prefills.store(prefills, Ordering::Relaxed);
        if prefills {
            let said = self.chunk_permille_said.load(Ordering::Relaxed);
            let next = said.saturating_add(CHUNK_STEP);
            self.chunk_permille_next.store(next, Ordering::Relaxed);
        }
    }

    fn of(&self, work: WorkKind) -> &AtomicU32 {
        match work {
            WorkKind::Prefill => &self.prefill,
            WorkKind::Decode => &self.decode,
        }
    }
}

/// The chunk is the configured one, in thousandths of that.
pub const CHUNK_AS_CONFIGURED: u32 = 1000;
/// How much a chunk may be longer than that of the step before.
const CHUNK_STEP: u32 = CHUNK_AS_CONFIGURED / 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_work_has_its_own_and_none_is_empty() {
        let window = Window::new(30, 0);
        assert_eq!(window.layers(WorkKind::Prefill), 30);
        assert_eq!(window.layers(WorkKind::Decode), 1);
        window.set(WorkKind::Prefill, 0);
        assert_eq!(window.layers(WorkKind::Prefill), 1);
        window.begin(WorkKind::Prefill);
        assert_eq!(window.work(), WorkKind::Prefill);
    }

    #[test]
    fn the_chunk_is_a_share_of_the_configured_one_and_never_nothing() {
        let window = Window::new(30, 100);
        assert_eq!(window.chunk_tokens(256), 256);
        for (permille, tokens) in [(500, 128), (62, 15), (0, 1)] {
            window.set_chunk_permille(permille);
            assert_eq!(window.chunk_tokens(256), tokens);
        }
    }

    #[test]
    fn the_chunk_shrinks_at_once_and_grows_by_a_tenth_with_each_step_of_a_prompt() {
        let window = Window::new(30, 100);
        let next = || {
            window.begin(WorkKind::Prefill);
            window.begin(WorkKind::Decode);
            window.chunk_tokens(1000)
        };
        assert_eq!(next(), 1000);
        window.set_chunk_permille(100);
        assert_eq!(next(), 100);
        // Within one step, which has room to spare at its end.
        window.set_chunk_permille(4000);
        assert_eq!([next(), next(), next()], [200, 300, 400]);
        let grown: Vec<usize> = (0..100).map(|_| next()).collect();
        assert_eq!(grown.last(), Some(&4000));
    }
}
