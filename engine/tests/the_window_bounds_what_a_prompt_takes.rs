//! The window of layers in flight: which one holds when, and that a small one takes less memory.

use std::sync::Arc;

use offbook_collectives::Group;
use offbook_engine::memory::{self, DeviceMemory};
use offbook_engine::{Engine, ModelConfig, StepTiming, Trial, TrialShare, Window};
use offbook_protocol::{Layout, NodeWeight, Rank};

/// The peak beyond the weights, in bytes, and the steps.
fn prefill(engine: Engine, trial: Trial, window: Window) -> (Engine, u64, Vec<StepTiming>) {
    memory::clear_cache().unwrap();
    memory::forget_peak().unwrap();
    let before = DeviceMemory::read().unwrap().active_bytes;
    let (engine, timings) = trial.run_all(engine, Group::solo(), Arc::new(window));
    let peak = DeviceMemory::read().unwrap().peak_bytes;
    (engine, peak - before, timings.unwrap())
}

#[test]
fn from_the_first_layer_of_the_first_prompt() {
    let trial = Trial {
        batch: 1,
        context_tokens: 256,
        steps: 2,
        micro_batches: None,
    };
    let share = TrialShare {
        config: ModelConfig::wide(6).unwrap(),
        layout: Layout::Tensor,
        weights: vec![NodeWeight(1.0)],
        rank: Rank(0),
        context_tokens: trial.context_needed(),
        prefill_chunk_tokens: 256,
    };
    let engine = Engine::random(&share, 1).unwrap();
    // What is made once is not to count.
    let (engine, _, _) = prefill(engine, trial, Window::new(1, 1));
    let none = || Window::new(u32::MAX, 100);
    let (engine, unbounded, _) = prefill(engine, trial, none());
    // How far a host gets ahead of a busy machine differs: the most counts.
    let (engine, again, _) = prefill(engine, trial, none());
    let unbounded = unbounded.max(again);
    let (_engine, one, timings) = prefill(engine, trial, Window::new(1, 100));
    assert!(
        one * 10 < unbounded * 9,
        "{one} bytes with one layer in flight, {unbounded} without a bound"
    );
    assert!(timings[0].prefill_tokens > 0);
    for timing in &timings {
        let expected = match timing.prefill_tokens {
            0 => 100,
            _ => 1,
        };
        assert_eq!(timing.window, expected, "{timing}");
    }
}
