//! How many layers may be in flight on the device. The step loop reads it before each submission,
//! without asking anybody; whoever watches the memory moves it meanwhile.

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
}

impl Window {
    pub fn new(prefill: u32, decode: u32) -> Self {
        let window = Self {
            prefill: AtomicU32::new(1),
            decode: AtomicU32::new(1),
            prefills: AtomicBool::new(false),
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

    /// What the step that was begun last does.
    pub fn work(&self) -> WorkKind {
        match self.prefills.load(Ordering::Relaxed) {
            true => WorkKind::Prefill,
            false => WorkKind::Decode,
        }
    }

    pub(crate) fn begin(&self, work: WorkKind) {
        self.prefills
            .store(work == WorkKind::Prefill, Ordering::Relaxed);
    }

    fn of(&self, work: WorkKind) -> &AtomicU32 {
        match work {
            WorkKind::Prefill => &self.prefill,
            WorkKind::Decode => &self.decode,
        }
    }
}

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
}
