//! The engine's thread as a script: the real batch and the real inbox decide what each step is; what a
//! model would compute is a function that is known beforehand (`client.rs`), and the collective of a step
//! is that every rank has come to it (`group.rs`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use offbook_collectives::{Group as EngineGroup, GroupHandle};
use offbook_engine::batch::{
    Batch, CacheMove, Chunks, EntryId, Input, KV_BLOCK_TOKENS, Limits, Source, StepBatch,
};
use offbook_engine::{Command, PlanInbox};
use offbook_protocol::{
    Epoch, LoadProgress, Plan, PlanNumber, Rank, SampledToken, SequenceId, ShardSpec, Step,
    StepOutcome, Transport,
};
use offbook_runtime::supervise::Exit;
use tokio::sync::{mpsc, oneshot};

use super::client::{deadly_prompt, draw, extend};
use super::group::Group;
use super::{CONTEXT_TOKENS, Event, LIMITS, Pid, Plot, VOCABULARY, World};
use crate::shard_worker::LoadRefusal;
use crate::shard_worker::engine_thread::{Begun, Held, News, Order, PlayedThread, Run};

/// The engine of one shard's process.
pub(super) struct Engine {
    thread: PlayedThread,
    orders: VecDeque<Order>,
    state: State,
    /// What is held of the model: another epoch of the same needs no reading.
    held: Option<ShardSpec>,
}

enum State {
    Free,
    Loading,
    Running(Box<Loop>),
}

/// What an engine does a while after it began with it.
pub(super) enum Doing {
    Loaded(Box<ShardSpec>, oneshot::Sender<Result<Held, LoadRefusal>>),
    Begun(Begun, oneshot::Sender<Result<Begun, String>>),
    StepDone {
        epoch: Epoch,
        step: Step,
        control: Option<u32>,
    },
    StepLate {
        epoch: Epoch,
        step: Step,
    },
    LoopEnds(Epoch),
    PeerGone(Epoch, String),
}

/// The step loop of one rank.
struct Loop {
    epoch: Epoch,
    rank: Rank,
    group: GroupHandle,
    batch: Batch,
    plans: PlanInbox,
    commands: Receiver<Command>,
    /// None once one was not taken.
    outcomes: Option<mpsc::Sender<StepOutcome>>,
    /// Submitted and not read, oldest first.
    ahead: VecDeque<Submitted>,
    /// Whether the oldest of these is being read.
    reads: bool,
    next: Step,
    /// The digest of each sequence's tokens, up to each position.
    cache: BTreeMap<SequenceId, Vec<u64>>,
    /// The same of sequences that are gone.
    entries: BTreeMap<EntryId, Vec<u64>>,
    /// What the step before drew, in each lane.
    drawn: [Vec<u32>; LANES],
    /// Up to which plan to apply before the next step.
    upto: PlanNumber,
    /// The sequence that kills whoever reads it.
    deadly: Option<SequenceId>,
    end: Option<Option<String>>,
}

struct Submitted {
    step: Step,
    draws: Vec<SequenceId>,
    tokens: Vec<u32>,
    /// Set when all ranks have come to it: the message of the sampling rank.
    control: Option<u32>,
    done: bool,
}

impl Engine {
    pub(super) fn new(thread: PlayedThread) -> Self {
        Self {
            thread,
            orders: VecDeque::new(),
            state: State::Free,
            held: None,
        }
    }

    fn looping(&mut self, epoch: Epoch) -> Option<&mut Loop> {
        match &mut self.state {
            State::Running(running) if running.epoch == epoch => Some(running),
            _ => None,
        }
    }
}

impl Loop {
    fn new(run: Run, rank: Rank, group: GroupHandle) -> Self {
        let epoch = run.epoch;
        Self {
            epoch,
            rank,
            group,
            outcomes: Some(run.outcomes),
            reads: false,
            deadly: None,
            batch: Batch::in_lanes(
                Limits {
                    prefill_chunk_tokens: 8,
                    context_tokens: CONTEXT_TOKENS as usize,
                    kv_tokens: usize::MAX,
                    retained_tokens: RETAINED_TOKENS,
                },
                LANES,
            ),
            plans: PlanInbox::new(epoch),
            commands: run.commands,
            ahead: VecDeque::new(),
            next: Step(0),
            cache: BTreeMap::new(),
            entries: BTreeMap::new(),
            drawn: Default::default(),
            upto: PlanNumber(0),
            end: None,
        }
    }

    /// Does with caches what the batch has decided.
    fn settle(&mut self) {
        let Self { cache, entries, .. } = self;
        for to_do in self.batch.cache_moves() {
            match to_do {
                CacheMove::Drop(sequence) => {
                    cache.remove(&sequence);
                }
                CacheMove::Retain { sequence, entry } => {
                    entries.insert(entry, cache.remove(&sequence).expect("it ran"));
                }
                CacheMove::Trim { entry, reserve } => {
                    let kept = entries.get_mut(&entry).expect("it is kept");
                    kept.truncate(reserve + 1);
                }
                CacheMove::Evict(entry) => {
                    entries.remove(&entry);
                }
                CacheMove::TakeOver {
                    entry, sequence, ..
                } => {
                    let kept = entries.remove(&entry).expect("it is kept");
                    cache.insert(sequence, kept);
                }
                CacheMove::Copy {
                    from,
                    sequence,
                    positions,
                    ..
                } => {
                    let source = match from {
                        Source::Entry(entry) => &entries[&entry],
                        Source::Sequence(other) => &cache[&other],
                    };
                    let copy = source[..=positions].to_vec();
                    cache.insert(sequence, copy);
                }
            }
        }
    }

    /// What a model would draw, from the tokens that this rank has in its cache.
    fn compute(&mut self, batch: &StepBatch) -> Vec<u32> {
        let mut tokens = Vec::new();
        for segment in &batch.segments {
            let inputs = match &segment.input {
                Input::Prompt(tokens) => tokens.clone(),
                Input::Drawn(row) => vec![self.drawn[batch.lane][*row]],
            };
            let cache = self
                .cache
                .entry(segment.sequence)
                .or_insert_with(|| vec![0]);
            assert!(
                segment.start < cache.len(),
                "{} skips positions",
                segment.sequence
            );
            cache.truncate(segment.start + 1);
            for token in inputs {
                cache.push(extend(cache[cache.len() - 1], token));
            }
            if let Some(to_draw) = &segment.draw {
                assert_eq!(to_draw.position, cache.len() - 1, "the place of a draw");
                tokens.push(draw(
                    cache[to_draw.position],
                    to_draw.position,
                    &to_draw.sampling,
                ));
            }
        }
        self.drawn[batch.lane].clone_from(&tokens);
        tokens
    }

    /// Takes in a step that all ranks have come to.
    fn read(&mut self) -> Option<StepOutcome> {
        let step = self.ahead.pop_front_if(|step| step.done)?;
        self.reads = false;
        let observed = self.batch.observe(&step.draws, &step.tokens);
        self.settle();
        self.upto = self.plans.upto(step.control);
        let sampled = observed.iter().map(|seen| SampledToken {
            sequence: seen.sequence,
            token: seen.token,
            logprob: None,
            top: Vec::new(),
            cached_tokens: seen.cached_tokens as u32,
            finish: seen.finish,
        });
        Some(StepOutcome {
            epoch: self.epoch,
            step: step.step,
            tokens: sampled.collect(),
        })
    }

    /// Lets plans take effect that are due. False when one is due that has not come.
    fn apply(&mut self) -> bool {
        while self.plans.applied() < self.upto {
            let Some(plan) = self.plans.next_plan() else {
                return false;
            };
            self.apply_plan(&plan);
        }
        self.settle();
        true
    }

    /// Nothing runs: begins with exactly the next plan. False when there is none.
    fn begin(&mut self) -> bool {
        let Some(plan) = self.plans.next_plan() else {
            return false;
        };
        self.apply_plan(&plan);
        true
    }

    fn apply_plan(&mut self, plan: &Plan) {
        let deadly = deadly_prompt();
        let mut joins = plan.joins.iter();
        let deadly = joins.find(|join| join.prompt.starts_with(&deadly));
        self.deadly = deadly.map(|join| join.sequence).or(self.deadly);
        self.batch.apply(plan).expect("a plan can be carried out");
    }

    /// The thread reads a step that not all ranks have come to: nothing but the end of its group frees it.
    fn is_blocked(&self) -> bool {
        self.reads && self.ahead.front().is_some_and(|step| !step.done)
    }

    /// Takes the plans that have come. An error says why the loop ends; nothing, that it is told to.
    fn take_commands(&mut self) -> Result<(), Option<String>> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Plan(plan)) => {
                    let taken = self.plans.take(plan);
                    taken.map_err(|gap| Some(format!("a plan is missing: {gap:?}")))?;
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return Err(None),
            }
        }
    }

    fn report(&mut self, outcome: StepOutcome) {
        self.outcomes
            .take_if(|outcomes| outcomes.try_send(outcome).is_err());
    }
}

impl World {
    /// Has every engine do what it can without waiting.
    pub(super) fn turn_engines(&mut self) {
        for pid in self.engines.keys().copied().collect::<Vec<_>>() {
            if self.processes.get(&pid).is_some_and(|it| !it.frozen) {
                self.turn_engine(pid);
            }
        }
    }

    fn turn_engine(&mut self, pid: Pid) {
        let Some(engine) = self.engines.get_mut(&pid) else {
            return;
        };
        while let Ok(order) = engine.thread.orders.try_recv() {
            engine.orders.push_back(order);
        }
        match &engine.state {
            State::Loading => {}
            State::Running(running) => {
                let epoch = running.epoch;
                self.drive(pid, epoch);
            }
            State::Free => {
                if let Some(order) = engine.orders.pop_front() {
                    self.carry_out_order(pid, order);
                }
            }
        }
    }

    fn engine(&mut self, pid: Pid) -> &mut Engine {
        self.engines
            .get_mut(&pid)
            .expect("only a shard that lives gets its events")
    }

    fn looping(&mut self, pid: Pid, epoch: Epoch) -> Option<&mut Loop> {
        self.engines.get_mut(&pid)?.looping(epoch)
    }

    pub(super) fn engine_after(&mut self, pause: Duration, pid: Pid, doing: Doing) {
        self.timeline.after(pause, Event::Engine(pid, doing));
    }

    fn carry_out_order(&mut self, pid: Pid, order: Order) {
        match order {
            Order::Load(spec, reply) => {
                self.disturb_formation(spec.epoch);
                let engine = self.engine(pid);
                let is_same = |held: &ShardSpec| {
                    let epoch = spec.epoch;
                    ShardSpec {
                        epoch,
                        ..held.clone()
                    } == *spec
                };
                let is_held = engine.held.as_ref().is_some_and(is_same);
                engine.held = None;
                engine.state = State::Loading;
                let progress = LoadProgress {
                    rank: spec.rank,
                    bytes_loaded: 1,
                    bytes_total: 2,
                };
                let _ = engine.thread.news.try_send(News::Progress(progress));
                let pause = match is_held {
                    true => self.chance.ms(0, 2),
                    false => self.chance.ms(50, 400),
                };
                self.engine_after(pause, pid, Doing::Loaded(spec, reply));
            }
            Order::Run(run, reply) => self.begin_epoch(pid, *run, reply),
        }
    }

    fn begin_epoch(&mut self, pid: Pid, run: Run, reply: oneshot::Sender<Result<Begun, String>>) {
        let epoch = run.epoch;
        let held = self.engine(pid).held.as_ref();
        let Some(spec) = held.filter(|held| held.epoch == epoch) else {
            let _ = reply.send(Err(format!("no share is loaded for epoch {epoch}")));
            return;
        };
        let rank = spec.rank;
        // Who is alone meets nobody.
        let alone = || Group::new(vec![pid]);
        let group = self.groups.entry(epoch).or_insert_with(alone);
        group.join(pid, rank);
        let group = EngineGroup::solo().handle();
        let begun = Begun {
            group: group.clone(),
            collectives: "played".to_owned(),
            transport: Transport::Quic,
        };
        self.engine(pid).state = State::Running(Box::new(Loop::new(run, rank, group)));
        let pause = self.chance.ms(0, 4);
        self.engine_after(pause, pid, Doing::Begun(begun, reply));
    }

    pub(super) fn engine_does(&mut self, pid: Pid, doing: Doing) {
        match doing {
            Doing::Loaded(spec, reply) => {
                let engine = self.engine(pid);
                engine.state = State::Free;
                let _ = reply.send(Ok(Held {
                    sampling_rank: SAMPLING_RANK,
                    context_tokens: spec.context_tokens,
                    vocabulary: VOCABULARY,
                    kv_tokens: spec.kv_tokens(),
                }));
                engine.held = Some(*spec);
            }
            Doing::Begun(begun, reply) => {
                let _ = reply.send(Ok(begun));
            }
            Doing::StepDone {
                epoch,
                step,
                control,
            } => self.step_done(pid, epoch, step, control),
            Doing::StepLate { epoch, step } => self.step_late(pid, epoch, step),
            Doing::LoopEnds(epoch) => self.loop_ends(pid, epoch),
            Doing::PeerGone(epoch, why) => self.end_loop(pid, epoch, Some(why)),
        }
    }

    /// The loop ends as soon as the thread looks.
    pub(super) fn end_loop(&mut self, pid: Pid, epoch: Epoch, failure: Option<String>) {
        let pause = self.chance.ms(0, 30);
        if let Some(running) = self.looping(pid, epoch)
            && running.end.is_none()
        {
            running.end = Some(failure);
            self.engine_after(pause, pid, Doing::LoopEnds(epoch));
        }
    }

    /// The device of this shard fails in whatever it does.
    pub(super) fn fail_step(&mut self, pid: Pid) {
        if let Some(Engine {
            state: State::Running(running),
            ..
        }) = self.engines.get(&pid)
        {
            let epoch = running.epoch;
            self.end_loop(pid, epoch, Some("the device failed".into()));
        }
    }

    fn loop_ends(&mut self, pid: Pid, epoch: Epoch) {
        let ended = self
            .looping(pid, epoch)
            .and_then(|running| running.end.take());
        let Some(failure) = ended else {
            return;
        };
        let engine = self.engine(pid);
        engine.state = State::Free;
        let _ = engine.thread.news.try_send(News::Ended { epoch, failure });
        self.peers_notice(pid, epoch);
    }

    /// Does what the thread can do without waiting.
    fn drive(&mut self, pid: Pid, epoch: Epoch) {
        while let Some(running) = self.looping(pid, epoch) {
            if running.end.is_some() {
                return;
            }
            let is_blocked = running.is_blocked();
            let told = match running.group.health() {
                Err(error) => Err(Some(error.to_string())),
                Ok(()) if is_blocked => Ok(()),
                Ok(()) => running.take_commands(),
            };
            if let Err(failure) = told {
                return self.end_loop(pid, epoch, failure);
            }
            self.check_epoch(pid, epoch);
            let Some(running) = self.looping(pid, epoch) else {
                return;
            };
            if is_blocked || !running.apply() {
                return;
            }
            while self.submit_step(pid, epoch) {}
            let Some(running) = self.looping(pid, epoch) else {
                return;
            };
            if let Some(outcome) = running.read() {
                if running.rank == SAMPLING_RANK && !outcome.tokens.is_empty() {
                    running.report(outcome);
                }
            } else if !running.ahead.is_empty() {
                running.reads = true;
                return;
            } else if !running.begin() {
                return;
            }
        }
    }

    /// Who has been told of a later epoch works for no earlier one.
    fn check_epoch(&mut self, pid: Pid, epoch: Epoch) {
        for order in &self.engine(pid).orders {
            if let Order::Load(spec, _) = order {
                assert!(
                    spec.epoch <= epoch,
                    "process {pid} goes on with epoch {epoch} and is to load {}",
                    spec.epoch
                );
            }
        }
    }

    fn submit_step(&mut self, pid: Pid, epoch: Epoch) -> bool {
        let kills = self.plot == Plot::Deadly;
        let Some(running) = self.looping(pid, epoch) else {
            return false;
        };
        if running.ahead.len() >= STEPS_AHEAD_MAX {
            return false;
        }
        let Some(batch) = running.batch.next_batch(CHUNKS) else {
            return false;
        };
        let deadly = running.deadly;
        let mut segments = batch.segments.iter();
        if kills && segments.any(|segment| Some(segment.sequence) == deadly) {
            self.kill(pid, Exit::Signal(SIGSEGV));
            return false;
        }
        let (step, rank, control) = (running.next, running.rank, running.plans.control_word());
        let sequences = running.batch.len();
        assert!(
            sequences <= LIMITS.sequences_max as usize,
            "{sequences} sequences in a batch"
        );
        running.settle();
        let tokens = running.compute(&batch);
        running.next = step.next();
        running.ahead.push_back(Submitted {
            step,
            draws: batch.draws(),
            tokens: tokens.clone(),
            control: None,
            done: false,
        });
        let group = self.groups.get_mut(&epoch).expect("its members have met");
        group.come(pid, step, batch, tokens);
        if rank == SAMPLING_RANK {
            group.control(step, control);
        }
        self.exchange(epoch, step);
        self.engine_after(COLLECTIVE_DEADLINE, pid, Doing::StepLate { epoch, step });
        true
    }

    /// Whether the loop of this epoch runs, and is not about to end.
    pub(super) fn works(&self, pid: Pid, epoch: Epoch) -> bool {
        let state = self.engines.get(&pid).map(|engine| &engine.state);
        matches!(state, Some(State::Running(running)) if running.epoch == epoch && running.end.is_none())
    }

    fn step_done(&mut self, pid: Pid, epoch: Epoch, step: Step, control: Option<u32>) {
        let Some(running) = self.looping(pid, epoch) else {
            return;
        };
        if let Some(ahead) = running.ahead.iter_mut().find(|ahead| ahead.step == step) {
            ahead.done = true;
            ahead.control = control;
            self.drive(pid, epoch);
        }
    }

    /// The deadline of a collective, or of a plan that others have.
    fn step_late(&mut self, pid: Pid, epoch: Epoch, step: Step) {
        let Some(running) = self.looping(pid, epoch) else {
            return;
        };
        let is_late = running.ahead.iter().any(|ahead| ahead.step == step);
        let lacks_plan = running.plans.applied() < running.upto;
        if is_late || lacks_plan {
            let why = match self.missing(epoch, step) {
                Some(rank) => format!("rank {rank} was late"),
                None => "the deadline of a collective".to_owned(),
            };
            self.end_loop(pid, epoch, Some(why));
        }
    }
}

/// Who samples in every group.
pub(super) const SAMPLING_RANK: Rank = Rank(0);
const SIGSEGV: i32 = 11;
/// As in a pipeline of two stages.
const LANES: usize = 2;
const STEPS_AHEAD_MAX: usize = LANES + 1;
/// Few enough for entries to be evicted.
const RETAINED_TOKENS: usize = 6 * KV_BLOCK_TOKENS;
const CHUNKS: Chunks = Chunks {
    beside_decode: 4,
    alone: 8,
};
pub(super) const COLLECTIVE_DEADLINE: Duration = Duration::from_millis(1500);
