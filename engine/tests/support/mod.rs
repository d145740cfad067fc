//! Runs the engine as a shard process does, with plans sent when the test says so.
#![allow(dead_code, reason = "each test uses the part that it needs")]

pub(crate) mod fixture;
pub(crate) mod processes;
#[path = "../../../collectives/tests/support/mod.rs"]
pub(crate) mod ranks;

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use offbook_collectives::Group;
use offbook_engine::{
    Command, EndReason, Engine, LoopOptions, Report, StepError, StepTiming, Window, step_loop,
};
use offbook_protocol::{
    Epoch, Join, KvBits, Layout, NodeWeight, Plan, PlanNumber, Rank, SampledToken, Sampling,
    SequenceId, ShardSpec, StepOutcome, Transport,
};
use serde::{Deserialize, Serialize};

use ranks::Carrier;

/// What every sequence drew.
pub(crate) type Drawn = BTreeMap<SequenceId, Vec<SampledToken>>;

/// The ranks that serve a script.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Cluster {
    pub(crate) model: PathBuf,
    pub(crate) layout: Layout,
    /// One per rank.
    pub(crate) weights: Vec<NodeWeight>,
    pub(crate) prefill_chunk_tokens: u32,
    pub(crate) window: u32,
    /// Positions of all caches; `None` for as many as are ever needed.
    pub(crate) kv_tokens: Option<u32>,
    pub(crate) kv_bits: KvBits,
    pub(crate) prefix_cache: bool,
    pub(crate) micro_batches: Option<NonZeroU32>,
    /// What joins the ranks, where they are processes: the name of a [`Carrier`].
    pub(crate) carrier: String,
}

impl Cluster {
    /// One rank.
    pub(crate) fn of(model: &Path) -> Self {
        Self {
            model: model.to_owned(),
            layout: Layout::Tensor,
            weights: vec![NodeWeight(1.0)],
            prefill_chunk_tokens: 512,
            window: 100,
            kv_tokens: None,
            kv_bits: KvBits::AsComputed,
            prefix_cache: true,
            micro_batches: None,
            carrier: Carrier::Quic.name(),
        }
    }

    /// The same with other ranks.
    pub(crate) fn over(self, layout: Layout, weights: &[f64]) -> Self {
        Self {
            layout,
            weights: weights.iter().map(|&weight| NodeWeight(weight)).collect(),
            ..self
        }
    }

    /// All sequences from the start.
    pub(crate) fn serve(&self, joins: Vec<Join>) -> Drawn {
        self.play(vec![Cue::start(joins)])
    }

    /// Each sequence by itself, one after the other.
    pub(crate) fn serve_each(&self, joins: Vec<Join>) -> Drawn {
        let alone = |join| self.serve(vec![join]);
        joins.into_iter().flat_map(alone).collect()
    }

    /// On one rank, in this thread.
    pub(crate) fn play(&self, cues: Vec<Cue>) -> Drawn {
        let (tx, rx) = sync_channel(64);
        let mut actor = Actor {
            script: Script::new(cues),
            tx,
        };
        actor.send_due();
        let engine = self.load(0);
        let end = step_loop::run(engine, Group::solo(), rx, &mut actor, self.options());
        assert_eq!(end.reason, EndReason::Shutdown);
        actor.script.drawn
    }

    pub(crate) fn load(&self, rank: usize) -> Engine {
        Engine::load(&self.spec(rank), &mut |_| ()).unwrap()
    }

    pub(crate) fn spec(&self, rank: usize) -> ShardSpec {
        ShardSpec {
            epoch: EPOCH,
            rank: Rank(rank as u32),
            model: self.model.clone(),
            layout: self.layout,
            weights: self.weights.clone(),
            transport: Transport::Quic,
            fast_synch: offbook_protocol::FastSynch::Auto,
            prefill_chunk_tokens: self.prefill_chunk_tokens,
            context_tokens: 1024,
            sequences_max: 16,
            kv_tokens: self.kv_tokens,
            kv_bits: self.kv_bits,
            prefix_cache: self.prefix_cache,
            micro_batches: self.micro_batches,
            collective_deadline: DEADLINE,
        }
    }

    pub(crate) fn options(&self) -> LoopOptions {
        LoopOptions {
            epoch: EPOCH,
            window: Arc::new(Window::new(self.window, self.window)),
            step_log_every: 0,
            micro_batches: self.micro_batches,
            plan_deadline: DEADLINE,
        }
    }
}

/// A plan that is sent when so many tokens were drawn in all.
pub(crate) struct Cue {
    pub(crate) after_tokens: usize,
    pub(crate) joins: Vec<Join>,
    pub(crate) leaves: Vec<SequenceId>,
}

impl Cue {
    pub(crate) fn start(joins: Vec<Join>) -> Self {
        Self {
            after_tokens: 0,
            joins,
            leaves: Vec::new(),
        }
    }
}

/// Says which plan is due, and a shutdown when nobody is left.
pub(crate) struct Script {
    cues: VecDeque<Cue>,
    number: PlanNumber,
    running: Vec<SequenceId>,
    ended: bool,
    pub(crate) drawn: Drawn,
}

impl Script {
    pub(crate) fn new(cues: Vec<Cue>) -> Self {
        Self {
            cues: cues.into(),
            number: PlanNumber(0),
            running: Vec::new(),
            ended: false,
            drawn: Drawn::new(),
        }
    }

    /// What is to be sent to every rank now.
    pub(crate) fn due(&mut self) -> Vec<Command> {
        let mut due = Vec::new();
        let tokens: usize = self.drawn.values().map(Vec::len).sum();
        while let Some(cue) = self.cues.pop_front_if(|cue| cue.after_tokens <= tokens) {
            self.number = self.number.next();
            self.running.extend(cue.joins.iter().map(|j| j.sequence));
            self.running.retain(|id| !cue.leaves.contains(id));
            due.push(Command::Plan(Plan {
                epoch: EPOCH,
                number: self.number,
                joins: cue.joins,
                leaves: cue.leaves,
            }));
        }
        if self.running.is_empty() && self.cues.is_empty() && !self.ended {
            self.ended = true;
            due.push(Command::Shutdown);
        }
        due
    }

    pub(crate) fn hear(&mut self, outcome: StepOutcome) {
        for token in outcome.tokens {
            if token.finish.is_some() {
                self.running.retain(|id| *id != token.sequence);
            }
            self.drawn.entry(token.sequence).or_default().push(token);
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }
}

/// Plays a script from within the loop of a rank alone.
struct Actor {
    script: Script,
    tx: SyncSender<Command>,
}

impl Actor {
    fn send_due(&mut self) {
        for command in self.script.due() {
            self.tx.try_send(command).unwrap();
        }
    }
}

impl Report for &mut Actor {
    fn outcome(&mut self, outcome: StepOutcome) {
        self.script.hear(outcome);
        self.send_due();
    }

    fn timing(&mut self, timing: StepTiming) {
        assert!(timing.model + timing.gpu_eval <= timing.total);
    }

    fn failed(&mut self, error: &StepError) {
        eprintln!("{error}");
    }
}

/// A sequence that begins with `prompt`.
pub(crate) fn join(id: u64, prompt: &[u32], max_tokens: u32, sampling: Sampling) -> Join {
    Join {
        sequence: SequenceId(id),
        prompt: prompt.to_vec(),
        delivered: 0,
        sampling,
        max_tokens,
        stop_tokens: Vec::new(),
    }
}

/// Greedy, with the log-probabilities of each token and of the three most likely ones.
pub(crate) fn greedy_with_logprobs() -> Sampling {
    Sampling {
        logprobs: Some(3),
        ..Sampling::greedy()
    }
}

pub(crate) fn tokens(drawn: &[SampledToken]) -> Vec<u32> {
    drawn.iter().map(|token| token.token).collect()
}

pub(crate) const EPOCH: Epoch = Epoch(3);
/// Longer than anything here takes on a loaded machine; a test that needs it has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
