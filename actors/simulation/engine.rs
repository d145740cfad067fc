//! The engine's thread as a script: the real batch and the real inbox decide what each step is; what a
//! model would compute is a function that is known beforehand (`client.rs`), and the collective of a step
//! is that every rank has come to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use offbook_engine::PlanInbox;
use offbook_engine::batch::{
    Batch, CacheMove, Chunks, EntryId, Input, KV_BLOCK_TOKENS, Limits, Source, StepBatch,
};
use offbook_protocol::{
    Epoch, Plan, PlanNumber, Rank, SampledToken, SequenceId, Step, StepOutcome,
};

use super::client::{draw, extend};
use super::head::SAMPLING_RANK;
use super::shard::ReplyTo;
use super::{CONTEXT_TOKENS, DEADLY_CLIENT, Local, Pid, Plot, World};

/// What a shard holds of the model: another epoch of the same needs no reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) rank: Rank,
    pub(super) ranks: usize,
}

#[derive(Debug)]
pub(super) enum Order {
    Load {
        epoch: Epoch,
        share: Share,
        reply: ReplyTo,
    },
    Run {
        epoch: Epoch,
        rank: Rank,
        reply: ReplyTo,
    },
}

pub(super) enum Engine {
    Free,
    Loading,
    Running(Box<Loop>),
}

/// The shards of one epoch and how far each has come.
pub(super) struct Group {
    members: Vec<Pid>,
    /// Who waits for the others.
    present: BTreeSet<Pid>,
    /// Whose engine has run.
    joined: BTreeSet<Pid>,
    steps: BTreeMap<Step, Rendezvous>,
}

impl Group {
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.members.contains(&pid)
    }
}

/// One step, as the ranks come to it.
struct Rendezvous {
    arrived: BTreeSet<Pid>,
    /// As the first to come has built it: all must build the same.
    batch: StepBatch,
    tokens: Vec<u32>,
    control: u32,
}

/// The step loop of one rank.
pub(super) struct Loop {
    epoch: Epoch,
    rank: Rank,
    batch: Batch,
    plans: PlanInbox,
    commands: VecDeque<Plan>,
    /// Submitted and not read, oldest first.
    ahead: VecDeque<Submitted>,
    next: Step,
    /// The digest of each sequence's tokens, up to each position.
    cache: BTreeMap<SequenceId, Vec<u64>>,
    /// The same of sequences that are gone.
    entries: BTreeMap<EntryId, Vec<u64>>,
    /// What the step before drew, in each lane.
    drawn: [Vec<u32>; LANES],
    /// Up to which plan to apply before the next step.
    upto: PlanNumber,
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

impl Loop {
    fn new(epoch: Epoch, rank: Rank) -> Self {
        Self {
            epoch,
            rank,
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
            commands: VecDeque::new(),
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
            self.batch.apply(&plan).expect("a plan can be carried out");
        }
        self.settle();
        true
    }

    /// Nothing runs: begins with exactly the next plan. False when there is none.
    fn begin(&mut self) -> bool {
        let Some(plan) = self.plans.next_plan() else {
            return false;
        };
        self.batch.apply(&plan).expect("a plan can be carried out");
        true
    }
}

impl World {
    /// A member waits for the others.
    pub(super) fn present(&mut self, pid: Pid, epoch: Epoch, members: Vec<Pid>) {
        let group = self.groups.entry(epoch).or_insert_with(|| Group {
            members: members.clone(),
            present: BTreeSet::new(),
            joined: BTreeSet::new(),
            steps: BTreeMap::new(),
        });
        assert_eq!(group.members, members, "epoch {epoch} has two groups");
        group.present.insert(pid);
    }

    pub(super) fn join_group(&mut self, pid: Pid, epoch: Epoch) {
        let group = self.groups.get_mut(&epoch).expect("its members have met");
        group.joined.insert(pid);
    }

    /// The head is about to serve: every member has joined.
    pub(super) fn check_joined(&self, epoch: Epoch) {
        let group = &self.groups[&epoch];
        let missing = group.members.iter().find(|pid| !group.joined.contains(pid));
        assert!(
            missing.is_none(),
            "epoch {epoch} serves without {missing:?}"
        );
    }

    /// Whether this member sees all others wait for it.
    pub(super) fn all_meet(&self, pid: Pid, epoch: Epoch) -> bool {
        let group = &self.groups[&epoch];
        group.members.iter().all(|peer| {
            let both = self.reaches(pid, *peer) && self.reaches(*peer, pid);
            group.present.contains(peer) && (*peer == pid || both)
        })
    }

    /// The engine's thread does one thing after the other.
    pub(super) fn next_order(&mut self, pid: Pid) {
        while matches!(self.shard_mut(pid).engine, Engine::Free) {
            let Some(order) = self.shard_mut(pid).orders.pop_front() else {
                return;
            };
            self.carry_out_order(pid, order);
        }
    }

    fn carry_out_order(&mut self, pid: Pid, order: Order) {
        match order {
            Order::Load {
                epoch,
                share,
                reply,
            } => {
                let is_held = self.shard_mut(pid).share == Some(share);
                let pause = if is_held {
                    self.chance.ms(0, 2)
                } else {
                    self.chance.ms(100, 900)
                };
                self.shard_mut(pid).share = None;
                self.shard_mut(pid).engine = Engine::Loading;
                self.local_after(
                    pause,
                    pid,
                    Local::Loaded {
                        epoch,
                        share,
                        reply,
                    },
                );
            }
            Order::Run { epoch, rank, reply } => {
                if self.shard_mut(pid).loaded_for != Some(epoch) {
                    return self.reply(reply, Err("no share is loaded for the epoch".into()));
                }
                let shard = self.shard_mut(pid);
                shard.engine = Engine::Running(Box::new(Loop::new(epoch, rank)));
                if rank == SAMPLING_RANK {
                    shard.outcomes.entry(epoch).or_default();
                }
                let pause = self.chance.ms(0, 4);
                self.local_after(pause, pid, Local::Begun { epoch, rank, reply });
            }
        }
    }

    pub(super) fn load_done(&mut self, pid: Pid, epoch: Epoch, share: Share, reply: ReplyTo) {
        let shard = self.shard_mut(pid);
        shard.engine = Engine::Free;
        shard.share = Some(share);
        shard.loaded_for = Some(epoch);
        self.loaded(pid, epoch, reply);
        self.next_order(pid);
    }

    fn looping(&mut self, pid: Pid, epoch: Epoch) -> Option<&mut Loop> {
        match &mut self.shards.get_mut(&pid)?.engine {
            Engine::Running(running) if running.epoch == epoch => Some(running),
            _ => None,
        }
    }

    pub(super) fn command(&mut self, pid: Pid, plan: Plan) {
        let epoch = plan.epoch;
        if let Some(running) = self.looping(pid, epoch) {
            running.commands.push_back(plan);
            self.drive(pid, epoch);
        }
    }

    pub(super) fn poison(&mut self, pid: Pid, epoch: Epoch) {
        self.end_loop(pid, epoch, Some("the group was left".into()));
    }

    pub(super) fn shut_down(&mut self, pid: Pid, epoch: Epoch) {
        self.end_loop(pid, epoch, None);
    }

    /// The loop ends as soon as the thread looks.
    pub(super) fn end_loop(&mut self, pid: Pid, epoch: Epoch, failure: Option<String>) {
        let pause = self.chance.ms(0, 30);
        if let Some(running) = self.looping(pid, epoch)
            && running.end.is_none()
        {
            running.end = Some(failure);
            self.local_after(pause, pid, Local::LoopEnds(epoch));
        }
    }

    pub(super) fn loop_ends(&mut self, pid: Pid, epoch: Epoch) {
        let Some(failure) = self
            .looping(pid, epoch)
            .and_then(|running| running.end.take())
        else {
            return;
        };
        self.shard_mut(pid).engine = Engine::Free;
        let pause = self.chance.ms(0, 2);
        self.local_after(pause, pid, Local::Ended { epoch, failure });
        self.peers_notice(pid, epoch);
        self.next_order(pid);
    }

    /// A member is gone from its group: the others hear of it, or wait in vain.
    pub(super) fn peers_notice(&mut self, pid: Pid, epoch: Epoch) {
        let members = self.groups.get(&epoch).map(|group| group.members.clone());
        for peer in members.into_iter().flatten().filter(|peer| *peer != pid) {
            let tells = self.reaches(pid, peer);
            let pause = if tells {
                self.chance.ms(0, 20)
            } else {
                self.chance.ms(300, 1500)
            };
            self.local_after(pause, peer, Local::PeerGone(epoch));
        }
    }

    /// Does what the thread can do without waiting.
    pub(super) fn drive(&mut self, pid: Pid, epoch: Epoch) {
        while let Some(running) = self.looping(pid, epoch) {
            if running.end.is_some() {
                return;
            }
            while let Some(plan) = running.commands.pop_front() {
                if running.plans.take(plan).is_err() {
                    return self.end_loop(pid, epoch, Some("a plan is missing".into()));
                }
            }
            if !running.apply() {
                return;
            }
            while self.submit_step(pid, epoch) {}
            let Some(running) = self.looping(pid, epoch) else {
                return;
            };
            if let Some(outcome) = running.read() {
                if running.rank == SAMPLING_RANK && !outcome.tokens.is_empty() {
                    self.report_outcome(pid, outcome);
                }
            } else if !running.ahead.is_empty() || !running.begin() {
                return;
            }
        }
    }

    fn submit_step(&mut self, pid: Pid, epoch: Epoch) -> bool {
        let most = self.limits.sequences_max as usize;
        let deadly = (self.plot == Plot::Deadly).then(|| self.clients[DEADLY_CLIENT].sequence());
        let Some(running) = self.looping(pid, epoch) else {
            return false;
        };
        if running.ahead.len() >= STEPS_AHEAD_MAX {
            return false;
        }
        let Some(batch) = running.batch.next_batch(CHUNKS) else {
            return false;
        };
        if let Some(Some(deadly)) = deadly
            && batch
                .segments
                .iter()
                .any(|segment| segment.sequence == deadly)
        {
            self.crash(pid);
            return false;
        }
        let (step, rank, control) = (running.next, running.rank, running.plans.control_word());
        assert!(
            running.batch.len() <= most,
            "{} sequences in a batch",
            running.batch.len()
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
        let met = group.steps.entry(step).or_insert_with(|| Rendezvous {
            arrived: BTreeSet::new(),
            batch: batch.clone(),
            tokens: tokens.clone(),
            control: 0,
        });
        assert_eq!(met.batch, batch, "ranks build different steps");
        assert_eq!(met.tokens, tokens, "ranks hold different caches");
        met.arrived.insert(pid);
        if rank == SAMPLING_RANK {
            met.control = control;
        }
        self.exchange(epoch, step);
        let deadline = COLLECTIVE_DEADLINE;
        self.local_after(deadline, pid, Local::StepLate { epoch, step });
        true
    }

    /// The collective of a step, if every rank is there and reaches every other.
    fn exchange(&mut self, epoch: Epoch, step: Step) {
        let group = &self.groups[&epoch];
        let met = &group.steps[&step];
        let all = group.members.iter().all(|pid| {
            let reached = group.members.iter().all(|peer| self.reaches(*pid, *peer));
            met.arrived.contains(pid) && reached
        });
        if !all {
            return;
        }
        // A group of one sends no message.
        let control = (group.members.len() > 1).then_some(met.control);
        let members = group.members.clone();
        self.groups
            .get_mut(&epoch)
            .expect("it was there")
            .steps
            .remove(&step);
        let took = self.chance.ms(10, 40);
        for pid in members {
            let pause = took + self.chance.ms(0, 3);
            self.local_after(
                pause,
                pid,
                Local::StepDone {
                    epoch,
                    step,
                    control,
                },
            );
        }
    }

    /// What stood still may go on: a path is whole again, or a process.
    pub(super) fn exchange_all(&mut self) {
        let waiting = self
            .groups
            .iter()
            .flat_map(|(epoch, group)| group.steps.keys().map(|step| (*epoch, *step)));
        for (epoch, step) in waiting.collect::<Vec<_>>() {
            self.exchange(epoch, step);
        }
    }

    pub(super) fn step_done(&mut self, pid: Pid, epoch: Epoch, step: Step, control: Option<u32>) {
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
    pub(super) fn step_late(&mut self, pid: Pid, epoch: Epoch, step: Step) {
        let Some(running) = self.looping(pid, epoch) else {
            return;
        };
        let is_late = running.ahead.iter().any(|ahead| ahead.step == step);
        let lacks_plan = running.plans.applied() < running.upto;
        if is_late || lacks_plan {
            self.end_loop(pid, epoch, Some("the deadline of a collective".into()));
        }
    }
}

/// As in a pipeline of two stages.
const LANES: usize = 2;
const STEPS_AHEAD_MAX: usize = LANES + 1;
/// Few enough for entries to be evicted.
const RETAINED_TOKENS: usize = 6 * KV_BLOCK_TOKENS;
const CHUNKS: Chunks = Chunks {
    beside_decode: 4,
    alone: 8,
};
const COLLECTIVE_DEADLINE: Duration = Duration::from_secs(3);
