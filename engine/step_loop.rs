//! The life of a shard: steps, back to back, on the thread that owns the engine.
//!
//! Decode runs one step ahead of the host: step n + 1 is built and submitted before the tokens of
//! step n are read. Nothing on the way of a token waits for a message. In a pipeline with micro-batches
//! as many more steps are submitted as it takes for every stage to have one.
//!
//! All ranks must build the same steps. Each receives the same plans in the same order, but not at
//! the same time, so the sampling rank decides: the message of every step carries the highest plan
//! number that it had received when it built that step. Having read it, every rank applies the plans
//! up to that number, and the step built next knows them. A rank whose copy of a plan is late waits
//! for it. When nothing runs, all ranks are in the same state, and each begins with exactly the next
//! plan, whenever that comes, without a collective.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use offbook_collectives::{CollectiveError, Group, GroupHandle};
use offbook_protocol::{Epoch, Layout, Plan, PlanNumber, Rank, SampledToken, Step, StepOutcome};
use thiserror::Error;

use crate::batch::{Batch, BatchError, Chunks, KvUse, Observed};
use crate::engine::Engine;
use crate::models::Fault;
use crate::plan_inbox::{PlanGap, PlanInbox};
use crate::prefill_pace::{CHUNK_TOKENS_FIRST, Load, PrefillPace};
use crate::sampler::RowLogprobs;
use crate::step::{Answer, Control, Orders, Stepper, Submitted, Work};
use crate::step_log::{Noted, StepTiming};
use crate::window::{Window, WorkKind};

/// What the engine's thread is told.
#[derive(Clone, Debug)]
pub enum Command {
    /// The next plan of this epoch.
    Plan(Plan),
    Shutdown,
}

/// Who hears of the steps. Called on the engine's thread, between steps: whatever takes long there
/// makes the device wait.
pub trait Report {
    /// A step is about to be built, which reads so many tokens of prompts.
    fn begins(&mut self, _prefill_tokens: usize) {}

    /// Nothing runs: the loop waits for the next plan, and this is what the caches hold. Called again
    /// and again while it waits.
    fn idles(&mut self, _kv: KvUse) {}

    /// The tokens of one step, in order. Called on the sampling rank alone.
    fn outcome(&mut self, outcome: StepOutcome);

    /// Where the time of a step went. Called on every rank, after the step's outcome.
    fn timing(&mut self, timing: StepTiming);

    /// The loop ends with this error. Called once, last.
    fn failed(&mut self, error: &StepError);
}

/// How the loop runs.
#[derive(Clone, Debug)]
pub struct LoopOptions {
    /// Plans of other epochs are passed over.
    pub epoch: Epoch,
    /// How many layers may be in flight on the device. Read before every submission; anybody may
    /// move it.
    pub window: Arc<Window>,
    /// Every how many steps the log line is `info` rather than `debug`; 0 for never.
    pub step_log_every: u64,
    /// In the pipeline layout: into how many lanes sequences are spread, so that no stage waits for
    /// another one's step; 1 for one step at a time, `None` for as many as there are stages. The same on
    /// all ranks. Groups over MLX's own transports have one.
    pub micro_batches: Option<NonZeroU32>,
    /// How long a plan that the sampling rank has may be missing here.
    pub plan_deadline: Duration,
}

/// How the loop ended. The engine keeps its weights; its sequences are gone.
pub struct LoopEnd {
    pub engine: Engine,
    pub reason: EndReason,
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq)]
pub enum EndReason {
    /// Told to, or nobody is left to tell it anything.
    Shutdown,
    /// The engine can run again with a fresh group.
    Failed(StepError),
}

/// Runs steps until told to stop or until one fails. Nothing that a failed step computed is used.
pub fn run(
    engine: Engine,
    group: Group,
    commands: Receiver<Command>,
    report: impl Report,
    options: LoopOptions,
) -> LoopEnd {
    let mut report = report;
    let reason = {
        let inbox = Inbox::new(&commands, &options);
        match Loop::new(&engine, &group, inbox, &options).run(&mut report) {
            Ok(()) => EndReason::Shutdown,
            Err(error) => {
                report.failed(&error);
                EndReason::Failed(error)
            }
        }
    };
    LoopEnd { engine, reason }
}

struct Loop<'a> {
    rank: Rank,
    samples: bool,
    batch: Batch,
    stepper: Stepper<'a>,
    inbox: Inbox<'a>,
    handle: GroupHandle,
    options: &'a LoopOptions,
    /// Submitted and not read, oldest first.
    ahead: VecDeque<(Step, Submitted)>,
    /// How many these are at most, the same on every rank.
    ahead_max: usize,
    next: Step,
    clock: Clock,
    pace: PrefillPace,
    /// As configured.
    chunk_tokens: usize,
    /// The same on every rank.
    chunks: Chunks,
}

impl<'a> Loop<'a> {
    fn new(
        engine: &'a Engine,
        group: &'a Group,
        inbox: Inbox<'a>,
        options: &'a LoopOptions,
    ) -> Self {
        let handle = group.handle();
        let lanes = lanes(engine, group, options);
        // Of the device: while it works on one step, the next one waits behind it. And each further
        // lane has one on its way through the other stages.
        let ahead_max = lanes + 1;
        let chunk_tokens = engine.limits().prefill_chunk_tokens;
        Self {
            rank: engine.rank(),
            samples: group.size() == 1 || engine.rank() == engine.partition().sampling_rank(),
            batch: Batch::in_lanes(engine.limits(), lanes),
            stepper: Stepper::new(engine, group, lanes),
            inbox,
            clock: Clock::new(handle.waited()),
            handle,
            options,
            ahead: VecDeque::with_capacity(ahead_max),
            ahead_max,
            next: Step(0),
            pace: PrefillPace::new(chunk_tokens),
            chunks: Chunks {
                beside_decode: CHUNK_TOKENS_FIRST,
                alone: chunk_tokens,
            },
            chunk_tokens,
        }
    }

    /// `Ok` when told to stop.
    fn run(&mut self, report: &mut impl Report) -> Result<(), StepError> {
        let result = self.steps(report);
        // Nothing may run on when the engine goes back: what is on its way is awaited, whatever it
        // says. Collectives end by their own deadlines, or at once when the group is poisoned.
        if let Err(error) = &result {
            self.handle.poison(CollectiveError::Poisoned {
                why: error.to_string(),
            });
        }
        for (_, step) in self.ahead.drain(..) {
            let _ = self.stepper.read(&step);
        }
        result
    }

    fn steps(&mut self, report: &mut impl Report) -> Result<(), StepError> {
        loop {
            self.inbox.drain()?;
            if self.inbox.shutdown {
                return Ok(());
            }
            while self.ahead.len() < self.ahead_max && self.submit(report)? {}
            match self.ahead.pop_front() {
                Some((step, submitted)) => self.read(step, submitted, report)?,
                None if !self.begin(report)? => return Ok(()),
                None => (),
            }
        }
    }

    /// Builds the next step, if there is one to build.
    fn submit(&mut self, report: &mut impl Report) -> Result<bool, StepError> {
        let before = self.batch.kv_use().preemptions;
        let batch = self.batch.next_batch(self.chunks);
        let kv = self.batch.kv_use();
        if kv.preemptions > before {
            tracing::info!(
                rank = %self.rank,
                preemptions = kv.preemptions,
                held_tokens = kv.held_tokens,
                capacity_tokens = kv.capacity_tokens,
                "a sequence gave up its cache to an older one and will be prefilled again"
            );
        }
        let Some(batch) = batch else {
            return Ok(false);
        };
        let since = Instant::now();
        // Who was preempted for this step gives up its memory before the step takes any.
        self.settle(self.next)?;
        report.begins(batch.prefill_tokens());
        self.options.window.begin(kind(batch.prefill_tokens()));
        let step = self.next;
        self.next = step.next();
        let orders = Orders {
            control: Control {
                plans: self.inbox.plans.control_word(),
                chunks: self.wanted_chunks(),
            },
            window: &self.options.window,
        };
        let submitted = self.stepper.submit(&batch, orders);
        let submitted = submitted.map_err(|fault| self.blame(step, fault))?;
        self.clock.built += since.elapsed().saturating_sub(submitted.blocked);
        self.clock.blocked += submitted.blocked;
        self.ahead.push_back((step, submitted));
        Ok(true)
    }

    /// Waits for a step, reports it, and lets plans take effect that it names.
    fn read(
        &mut self,
        step: Step,
        submitted: Submitted,
        report: &mut impl Report,
    ) -> Result<(), StepError> {
        let since = Instant::now();
        let answer = self.stepper.read(&submitted);
        self.clock.blocked += since.elapsed();
        let answer = answer.map_err(|fault| self.blame(step, fault))?;
        self.healthy(step)?;

        let observed = self.batch.observe(&submitted.draws, &answer.tokens);
        if self.samples && !observed.is_empty() {
            report.outcome(StepOutcome {
                epoch: self.options.epoch,
                step,
                tokens: sampled(&observed, &answer),
            });
        }
        // What the sampling rank says holds from the step that is built next, on every rank.
        self.chunks = match answer.control {
            Some(control) => control.chunks,
            None => self.wanted_chunks(),
        };
        let plans = answer.control.map(|control| control.plans);
        let upto = self.inbox.plans.upto(plans);
        while self.inbox.plans.applied() < upto {
            let plan = self.inbox.wait(step, self.rank)?;
            self.batch.apply(&plan).map_err(StepError::Plan)?;
        }
        self.settle(step)?;
        self.time(step, submitted.work, report);
        Ok(())
    }

    /// By what this rank has measured, and by its memory: what all ranks do where it samples.
    fn wanted_chunks(&self) -> Chunks {
        let room = self.options.window.chunk_tokens(self.chunk_tokens);
        self.pace.chunks(room)
    }

    /// Carries out what the batch has decided about caches.
    fn settle(&mut self, step: Step) -> Result<(), StepError> {
        let moves = self.batch.cache_moves();
        let settled = self.stepper.settle(&moves, &self.batch);
        settled.map_err(|error| self.blame(step, error.into()))
    }

    /// Nothing runs: waits for the next plan, and applies it. `false` when there will be none.
    fn begin(&mut self, report: &mut impl Report) -> Result<bool, StepError> {
        loop {
            report.idles(self.batch.kv_use());
            if let Some(plan) = self.inbox.plans.next_plan() {
                self.batch.apply(&plan).map_err(StepError::Plan)?;
                self.clock.restart(self.handle.waited());
                // There was more room once; the first steps show whether there still is.
                self.chunks.alone = self.chunks.alone.min(self.chunk_tokens);
                return Ok(true);
            }
            self.inbox.sleep(IDLE_CHECK)?;
            if self.inbox.shutdown {
                return Ok(false);
            }
            self.healthy(self.next)?;
        }
    }

    fn healthy(&self, step: Step) -> Result<(), StepError> {
        self.handle.health().map_err(|error| StepError::Collective {
            rank: self.rank,
            step,
            error,
        })
    }

    /// A device error is often only what a failed collective looks like from here.
    fn blame(&self, step: Step, fault: Fault) -> StepError {
        let rank = self.rank;
        match (self.healthy(step), fault) {
            (Err(collective), _) => collective,
            (Ok(()), Fault::Collective(error)) => StepError::Collective { rank, step, error },
            (Ok(()), Fault::Device(error)) => StepError::Device {
                rank,
                step,
                what: error.what().to_owned(),
            },
        }
    }

    fn time(&mut self, step: Step, work: Work, report: &mut impl Report) {
        let window = self.options.window.layers(kind(work.prefill_tokens));
        let timing = StepTiming {
            step,
            batch: work.sequences,
            prefill_tokens: work.prefill_tokens,
            window,
            kv: self.batch.kv_use(),
            ..self.clock.lap(self.handle.waited())
        };
        let load = Load {
            decodes: work.decodes,
            prefill_tokens: work.prefill_tokens,
        };
        self.pace.note(load, timing.total);
        let every = self.options.step_log_every;
        timing.log(
            self.rank,
            match every > 0 && step.0.is_multiple_of(every) {
                true => Noted::Info,
                false => Noted::Debug,
            },
        );
        report.timing(timing);
    }
}

/// Into how many lanes the sequences are spread.
fn lanes(engine: &Engine, group: &Group, options: &LoopOptions) -> usize {
    let stages = match engine.layout() {
        Layout::Pipeline if group.sends_ahead() => group.size(),
        Layout::Pipeline | Layout::Tensor | Layout::Expert => return 1,
    };
    match options.micro_batches {
        Some(wanted) if stages > 1 => wanted.get() as usize,
        _ => stages,
    }
}

/// What a step does that reads so many tokens of prompts.
fn kind(prefill_tokens: usize) -> WorkKind {
    match prefill_tokens {
        0 => WorkKind::Decode,
        _ => WorkKind::Prefill,
    }
}

/// What the step's tokens are to the scheduler.
fn sampled(observed: &[Observed], answer: &Answer) -> Vec<SampledToken> {
    observed
        .iter()
        .map(|seen| {
            let row = answer.logprobs.get(seen.row).cloned();
            let RowLogprobs { chosen, top } = row.unwrap_or_default();
            SampledToken {
                sequence: seen.sequence,
                token: seen.token,
                logprob: chosen,
                top,
                cached_tokens: seen.cached_tokens as u32,
                finish: seen.finish,
            }
        })
        .collect()
}

/// Where commands come in.
struct Inbox<'a> {
    commands: &'a Receiver<Command>,
    options: &'a LoopOptions,
    plans: PlanInbox,
    shutdown: bool,
}

impl<'a> Inbox<'a> {
    fn new(commands: &'a Receiver<Command>, options: &'a LoopOptions) -> Self {
        Self {
            commands,
            options,
            plans: PlanInbox::new(options.epoch),
            shutdown: false,
        }
    }

    /// Takes what has come, without waiting. What does not fit stays in the channel, whose own bound
    /// then holds its senders back.
    fn drain(&mut self) -> Result<(), StepError> {
        while !self.shutdown && self.plans.waiting() < PLANS_WAITING_MAX {
            match self.commands.try_recv() {
                Ok(command) => self.take(command)?,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.shutdown = true,
            }
        }
        Ok(())
    }

    /// Waits for one command.
    fn sleep(&mut self, at_most: Duration) -> Result<(), StepError> {
        match self.commands.recv_timeout(at_most) {
            Ok(command) => self.take(command)?,
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => self.shutdown = true,
        }
        Ok(())
    }

    fn take(&mut self, command: Command) -> Result<(), StepError> {
        match command {
            Command::Shutdown => self.shutdown = true,
            Command::Plan(plan) => {
                let taken = self.plans.take(plan);
                taken.map_err(|PlanGap { expected, came }| StepError::PlanOrder {
                    expected,
                    came,
                })?;
            }
        }
        Ok(())
    }

    /// The next plan, which the sampling rank has; waits for it when it is late.
    fn wait(&mut self, step: Step, rank: Rank) -> Result<Plan, StepError> {
        let deadline = Instant::now() + self.options.plan_deadline;
        loop {
            if let Some(plan) = self.plans.next_plan() {
                return Ok(plan);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.shutdown {
                return Err(StepError::PlanMissing {
                    rank,
                    step,
                    number: self.plans.applied().next(),
                });
            }
            self.sleep(left)?;
        }
    }
}

/// Adds up where time goes between two laps.
struct Clock {
    since: Instant,
    waited: Duration,
    built: Duration,
    blocked: Duration,
}

impl Clock {
    fn new(waited: Duration) -> Self {
        Self {
            since: Instant::now(),
            waited,
            built: Duration::ZERO,
            blocked: Duration::ZERO,
        }
    }

    /// Forgets the time in which nothing ran.
    fn restart(&mut self, waited: Duration) {
        *self = Self::new(waited);
    }

    /// The times since the last lap; the rest of the timing is for the caller to say.
    fn lap(&mut self, waited: Duration) -> StepTiming {
        let total = self.since.elapsed();
        let collective = waited.saturating_sub(self.waited);
        let gpu_eval = self.blocked.saturating_sub(collective);
        let timing = StepTiming {
            step: Step(0),
            total,
            model: self.built,
            gpu_eval,
            eval: total.saturating_sub(self.built + gpu_eval),
            collective,
            batch: 0,
            prefill_tokens: 0,
            window: 0,
            kv: KvUse::default(),
        };
        self.restart(waited);
        timing
    }
}

/// A step failed, and the epoch with it. The shard itself is whole.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum StepError {
    #[error("rank {rank}, step {step}: {error}")]
    Collective {
        rank: Rank,
        step: Step,
        error: CollectiveError,
    },
    #[error("rank {rank}, step {step}: the device failed: {what}")]
    Device {
        rank: Rank,
        step: Step,
        what: String,
    },
    #[error("rank {rank}, step {step}: plan {number} took effect elsewhere and never came here")]
    PlanMissing {
        rank: Rank,
        step: Step,
        number: PlanNumber,
    },
    #[error("plan {came} came where plan {expected} was due")]
    PlanOrder {
        expected: PlanNumber,
        came: PlanNumber,
    },
    #[error("a plan cannot be carried out: {0}")]
    Plan(BatchError),
}

/// Plans held here; more wait in the channel. A plan takes effect within a few steps.
const PLANS_WAITING_MAX: usize = 64;
/// How often a rank that is idle looks whether its group still stands.
const IDLE_CHECK: Duration = Duration::from_millis(200);
