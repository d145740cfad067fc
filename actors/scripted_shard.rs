//! A shard without an engine, for measurements: it takes plans as any shard, and draws a token for each
//! of its sequences at steps of a fixed length. What a client sees beyond these steps is the price of
//! everything around an engine.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use actix::{Actor, Addr, AsyncContext, Context, Handler, WrapFuture};
use offbook_protocol::{Epoch, FinishReason, Plan, SampledToken, SequenceId, Step, StepOutcome};
use offbook_runtime::{Open, System};
use tokio::sync::mpsc;

use crate::names;
use crate::shard_worker::{ApplyPlan, WatchOutcomes};

/// See the module's own words.
pub struct ScriptedShard {
    plans: Sender<Plan>,
    outcomes: Option<mpsc::Receiver<StepOutcome>>,
}

/// When the tokens were drawn.
#[derive(Clone, Default)]
pub struct Drawn(Arc<Mutex<Vec<Instant>>>);

impl Drawn {
    /// Those since the last call, in order.
    pub fn take(&self) -> Vec<Instant> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self) {
        let mut drawn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        drawn.push(Instant::now());
    }
}

impl ScriptedShard {
    /// Starts the only shard of this epoch, and registers it with the process. It draws `token`,
    /// whatever it is asked.
    pub fn start(system: &System, epoch: Epoch, step: Duration, token: u32) -> (Addr<Self>, Drawn) {
        let (plans, planned) = channel();
        let (tell, outcomes) = mpsc::channel(OUTCOMES_MAX);
        let drawn = Drawn::default();
        let engine = Engine {
            epoch,
            step,
            token,
            planned,
            tell,
            drawn: drawn.clone(),
            sequences: Vec::new(),
        };
        thread::spawn(move || engine.run());
        let shard = Self {
            plans,
            outcomes: Some(outcomes),
        };
        let shard = shard.start();
        system.register::<ApplyPlan>(names::SHARD_WORKER, shard.clone().recipient());
        system.register_stream::<WatchOutcomes>(names::SHARD_WORKER, shard.clone().recipient());
        (shard, drawn)
    }
}

impl Actor for ScriptedShard {
    type Context = Context<Self>;
}

impl Handler<ApplyPlan> for ScriptedShard {
    type Result = ();

    fn handle(&mut self, ApplyPlan(plan): ApplyPlan, _: &mut Context<Self>) {
        // The thread ends with this actor, not before.
        let _ = self.plans.send(plan);
    }
}

impl Handler<Open<WatchOutcomes>> for ScriptedShard {
    type Result = ();

    fn handle(&mut self, open: Open<WatchOutcomes>, ctx: &mut Context<Self>) {
        let Some(mut outcomes) = self.outcomes.take() else {
            return;
        };
        let items = open.items;
        let forwarded = async move {
            while let Some(outcome) = outcomes.recv().await {
                if items.send(outcome).await.is_err() {
                    return;
                }
            }
        };
        ctx.spawn(forwarded.into_actor(self));
    }
}

/// In place of an engine, on a thread as one.
struct Engine {
    epoch: Epoch,
    step: Duration,
    token: u32,
    planned: Receiver<Plan>,
    tell: mpsc::Sender<StepOutcome>,
    drawn: Drawn,
    /// And how many tokens each has left.
    sequences: Vec<(SequenceId, u32)>,
}

impl Engine {
    fn run(mut self) {
        let mut number = 0;
        let mut due = Instant::now();
        loop {
            if self.sequences.is_empty() {
                let Ok(plan) = self.planned.recv() else {
                    return;
                };
                self.apply(plan);
                due = Instant::now();
            }
            while let Ok(plan) = self.planned.try_recv() {
                self.apply(plan);
            }
            due += self.step;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            number += 1;
            let tokens = self.draw();
            self.drawn.note();
            let outcome = StepOutcome {
                epoch: self.epoch,
                step: Step(number),
                tokens,
            };
            if self.tell.blocking_send(outcome).is_err() {
                return;
            }
        }
    }

    fn apply(&mut self, plan: Plan) {
        self.sequences.retain(|(id, _)| !plan.leaves.contains(id));
        let joins = plan.joins.into_iter();
        self.sequences
            .extend(joins.map(|join| (join.sequence, join.max_tokens)));
    }

    fn draw(&mut self) -> Vec<SampledToken> {
        let draw = |(sequence, left): &mut (SequenceId, u32)| {
            *left -= 1;
            SampledToken {
                sequence: *sequence,
                token: self.token,
                logprob: None,
                top: Vec::new(),
                cached_tokens: 0,
                finish: (*left == 0).then_some(FinishReason::Length),
            }
        };
        let tokens = self.sequences.iter_mut().map(draw).collect();
        self.sequences.retain(|(_, left)| *left > 0);
        tokens
    }
}

/// A head that does not read for a while stops nothing.
const OUTCOMES_MAX: usize = 1024;
