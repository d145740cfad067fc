//! While a prompt of the full context is read, those who decode wait for a token at most two and a half
//! times as long as they usually do then, and at most so much longer than before: with a small model, and
//! with one whose prompts cost so much that a step may read only a few of their tokens.
//!
//! What a step took on a machine that others use says little of the step: medians are of what was measured, and
//! the slowest hundredth is of what each step takes by the number of tokens that it reads.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use offbook_collectives::Group;
use offbook_engine::{
    Command, EndReason, Engine, LoopOptions, ModelConfig, Report, StepError, StepTiming,
    TrialShare, Window, run_steps,
};
use offbook_protocol::{
    Epoch, Join, Layout, NodeWeight, Plan, PlanNumber, Rank, Sampling, SequenceId, StepOutcome,
};

#[test]
fn with_a_small_model() {
    holds(&Case {
        config: demo(),
        streams: 2,
        context: 1024,
    });
}

#[test]
fn with_a_model_whose_prompts_are_expensive() {
    holds(&Case {
        config: ModelConfig::wide(2).unwrap(),
        streams: 1,
        context: 256,
    });
}

struct Case {
    config: ModelConfig,
    streams: usize,
    context: usize,
}

/// The shape of the demo model: how long its steps take does not depend on what its weights are.
fn demo() -> ModelConfig {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/model");
    ModelConfig::open(std::path::Path::new(model)).unwrap()
}

/// Other programs may mislead the pace, which goes by the clock: one of three runs has to hold. A pace that reads
/// too much fails them all.
fn holds(case: &Case) {
    // Each has the processor for itself, as far as it depends on this process.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let mut said = Vec::new();
    for _ in 0..3 {
        let Steps { before, during } = measure(case);
        let usual = percentile(before, 0.5);
        let (tokens, took): (Vec<f64>, Vec<f64>) = during.into_iter().unzip();
        let p50 = percentile(took.clone(), 0.5);
        // What a token adds to a step.
        let token = (p50 - usual).max(0.0) / percentile(tokens.clone(), 0.5);
        let p99 = usual + token * percentile(tokens, 0.99);
        if p99 <= 2.5 * p50 && p50 <= 2.5 * usual {
            return;
        }
        said.push(format!(
            "usually {usual:.1} ms; beside the prompt p50 {p50:.1}, p99 {p99:.1}, by the clock {:.1}",
            percentile(took, 0.99)
        ));
    }
    panic!("{said:#?}");
}

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() as f64 * share).ceil() as usize - 1]
}

/// From token to token of every stream, which is from step to step, in milliseconds.
struct Steps {
    before: Vec<f64>,
    /// With how many tokens of the long prompt each reads.
    during: Vec<(f64, f64)>,
}

fn measure(case: &Case) -> Steps {
    let share = TrialShare {
        config: case.config.clone(),
        layout: Layout::Tensor,
        weights: vec![NodeWeight(1.0)],
        rank: Rank(0),
        context_tokens: case.context,
        prefill_chunk_tokens: 256,
    };
    let engine = Engine::random(&share, 1).unwrap();
    let (commands, commanded) = sync_channel(4);
    let first = (1..=case.streams as u64).map(|id| join(id, 24, u32::MAX));
    let first = plan(1, first.collect());
    commands.try_send(Command::Plan(first)).unwrap();
    let mut watch = Watch {
        commands,
        prompt: case.context - 1,
        read: None,
        steps: Steps {
            before: Vec::new(),
            during: Vec::new(),
        },
    };
    let options = LoopOptions {
        epoch: Epoch(1),
        window: Arc::new(Window::new(30, 100)),
        step_log_every: 0,
        micro_batches: None,
        plan_deadline: Duration::from_secs(60),
    };
    let end = run_steps(engine, Group::solo(), commanded, &mut watch, options);
    assert_eq!(end.reason, EndReason::Shutdown);
    // What the first steps make once is not to count.
    watch.steps.before.drain(..WARM_UP_STEPS);
    watch.steps
}

fn plan(number: u64, joins: Vec<Join>) -> Plan {
    Plan {
        epoch: Epoch(1),
        number: PlanNumber(number),
        joins,
        leaves: Vec::new(),
    }
}

fn join(id: u64, prompt: usize, max_tokens: u32) -> Join {
    let token = |position: usize| (position as u32 * 7 + id as u32 * 13) % 500;
    Join {
        sequence: SequenceId(id),
        prompt: (0..prompt).map(token).collect(),
        delivered: 0,
        sampling: Sampling::greedy(),
        max_tokens,
        stop_tokens: Vec::new(),
    }
}

/// Sends the long prompt when the streams have run for a while, and ends the loop when it is read.
struct Watch {
    commands: SyncSender<Command>,
    prompt: usize,
    /// Of the long prompt.
    read: Option<usize>,
    steps: Steps,
}

impl Report for &mut Watch {
    fn outcome(&mut self, _: StepOutcome) {}

    fn timing(&mut self, timing: StepTiming) {
        let took = timing.total.as_secs_f64() * 1e3;
        match &mut self.read {
            Some(read) if timing.prefill_tokens > 0 => {
                *read += timing.prefill_tokens;
                let tokens = timing.prefill_tokens as f64;
                self.steps.during.push((tokens, took));
                if *read >= self.prompt {
                    let _ = self.commands.try_send(Command::Shutdown);
                }
            }
            None if timing.prefill_tokens == 0 => {
                self.steps.before.push(took);
                if self.steps.before.len() == STEPS_BEFORE {
                    let long = plan(2, vec![join(99, self.prompt, 1)]);
                    let _ = self.commands.try_send(Command::Plan(long));
                    self.read = Some(0);
                }
            }
            Some(_) | None => {}
        }
    }

    fn failed(&mut self, error: &StepError) {
        panic!("{error}");
    }
}

const WARM_UP_STEPS: usize = 8;
const STEPS_BEFORE: usize = 48;
