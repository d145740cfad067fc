//! Owns the engine's thread of a shard, and speaks for the shard to the head. One per shard
//! process.
//!
//! The thread decodes by itself, step after step; this actor hands it plans and takes its outcomes
//! away. When the head is lost, so is the epoch: the shard leaves its group and registers again.

mod attendance;
mod device_gate;
pub(crate) mod engine_thread;
mod memory;
mod step_record;
mod watchdog;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, Message, ResponseActFuture,
    ResponseFuture, WrapFuture,
};
use futures::{FutureExt, future};
use offbook_engine::Command;
use offbook_engine::memory::DeviceMemory;
use offbook_protocol::{
    Epoch, GroupSpec, MemoryFigures, Plan, Rank, ShardSpec, ShardSteps, StepOutcome, Transport,
};
use offbook_runtime::supervise::{ActorRef, ActorSpec, Supervisor, SupervisorError, once};
use offbook_runtime::{
    ActorPath, AskError, Identity, LostReason, Open, ProcessName, Remote, RemoteMessage,
    StreamMessage, System, Trust,
};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::attendance::Attendance;
use self::engine_thread::{EngineThread, News, Place, Run};
use self::step_record::{StepRecord, Steps};
use self::watchdog::Progress;
use crate::collective::{self, Abort, Bind, Collective, Hold, Meet};
use crate::membership::{NoteProgress, RegisterShard, StepFailed};
use crate::names;
use crate::node_agent::Attach;
use crate::roll::Roll;
use crate::throttle::{ReadThrottle, Throttle, WindowSettings};

/// What a shard process knows from the start.
#[derive(Clone, Debug)]
pub struct ShardWorkerConfig {
    pub node: String,
    pub head: ProcessName,
    pub identity: Arc<Identity>,
    pub trust: Trust,
    /// The interface that tensors travel over.
    pub tensors: IpAddr,
    /// Where the model is on this machine, if not where the cluster says.
    pub model: Option<PathBuf>,
    pub window: WindowSettings,
    /// What MLX may take in this process; `None` leaves that to MLX.
    pub memory_limit_bytes: Option<u64>,
    pub stalls: StallLimits,
    /// What the head is told of this process's actors.
    pub roll: Roll,
}

pub use self::watchdog::StallLimits;

/// See the module's own words.
pub struct ShardWorker {
    system: System,
    config: ShardWorkerConfig,
    engine: EngineThread,
    news: Option<mpsc::Receiver<News>>,
    collective: Addr<Collective>,
    throttle: Addr<Throttle>,
    attendance: Attendance<Running>,
    steps: StepRecord,
    attach: Remote<Attach>,
    register: Remote<RegisterShard>,
    progress: Remote<NoteProgress>,
    step_failed: Remote<StepFailed>,
}

/// What a shard is made of besides its actor.
struct Parts {
    collective: Collective,
    throttle: Throttle,
    steps: StepRecord,
    engine: EngineThread,
    news: mpsc::Receiver<News>,
}

/// The epoch under way on the engine's thread.
struct Running {
    rank: Rank,
    transport: Transport,
    commands: std::sync::mpsc::SyncSender<Command>,
    /// Until somebody watches them.
    outcomes: Option<mpsc::Receiver<StepOutcome>>,
}

impl Running {
    /// The group is poisoned, or about to be; the thread that runs it gets no more commands.
    fn end(self) {
        if self.transport.is_of_mlx() {
            // MLX's ring can neither be interrupted nor formed twice in a process, and MLX must not be
            // torn down under the engine's thread.
            tracing::warn!("the ring is left by ending the process");
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}

impl ShardWorker {
    /// Starts the engine's thread; the shard registers when the actor starts.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(system: System, config: ShardWorkerConfig) -> std::io::Result<Self> {
        let collective = Collective::new(collective::Place::Network {
            identity: Arc::clone(&config.identity),
            trust: config.trust.clone(),
            interface: config.tensors,
        });
        let (throttle, window) = Throttle::new(config.window);
        let (steps, progress) = (StepRecord::default(), Progress::default());
        let place = Place {
            node: config.node.clone(),
            memory_limit_bytes: config.memory_limit_bytes,
        };
        let (engine, news) = EngineThread::start(place, window, steps.clone(), progress.clone())?;
        watchdog::start(progress, config.stalls)?;
        let parts = Parts {
            collective,
            throttle,
            steps,
            engine,
            news,
        };
        Self::of(parts, system, config)
    }

    /// A shard whose engine and group a simulation plays.
    #[cfg(test)]
    pub(crate) fn played(
        system: System,
        config: ShardWorkerConfig,
        hall: crate::simulation::Hall,
        (engine, news): (EngineThread, mpsc::Receiver<News>),
    ) -> std::io::Result<Self> {
        let parts = Parts {
            collective: Collective::new(collective::Place::Played(hall)),
            throttle: Throttle::new(config.window).0,
            steps: StepRecord::default(),
            engine,
            news,
        };
        Self::of(parts, system, config)
    }

    fn of(parts: Parts, system: System, config: ShardWorkerConfig) -> std::io::Result<Self> {
        let node = ProcessName::new(&*config.node).map_err(std::io::Error::other)?;
        let head = ActorPath::new(config.head.clone(), names::MEMBERSHIP);
        Ok(Self {
            engine: parts.engine,
            news: Some(parts.news),
            collective: parts.collective.start(),
            throttle: parts.throttle.start(),
            attendance: Attendance::new(),
            steps: parts.steps,
            attach: system.remote(&ActorPath::new(node, names::NODE_AGENT)),
            register: system.remote(&head),
            progress: system.remote(&head),
            step_failed: system.remote(&head),
            system,
            config,
        })
    }

    /// Starts it, and has other processes reach it by its name. It is not to be restarted.
    ///
    /// # Errors
    /// When the supervisor has a shard worker already.
    pub fn supervised(self, by: &Supervisor) -> Result<ActorRef<Self>, SupervisorError> {
        let system = self.system.clone();
        let spec = ActorSpec::new(names::SHARD_WORKER).mailbox_max(MAILBOX_MAX);
        let worker = by.start_actor(spec, once(self))?;
        system.register::<LoadShard>(names::SHARD_WORKER, worker.recipient());
        system.register::<JoinGroup>(names::SHARD_WORKER, worker.recipient());
        system.register::<ApplyPlan>(names::SHARD_WORKER, worker.recipient());
        system.register::<LeaveGroup>(names::SHARD_WORKER, worker.recipient());
        system.register::<ReadSteps>(names::SHARD_WORKER, worker.recipient());
        system.register_stream::<WatchOutcomes>(names::SHARD_WORKER, worker.recipient());
        Ok(worker)
    }

    /// Registers with the head until it answers, then waits until its link is lost, and again.
    fn register(&mut self, ctx: &mut Context<Self>) {
        // Whoever registers takes part in nothing: the head may have taken a registration whose answer
        // did not come here.
        self.leave_all("the link to the head is lost", ctx);
        let register = self.register.clone();
        let message = RegisterShard {
            node: self.config.node.clone(),
            process: self.system.process().to_string(),
            pid: self.system.pid(),
            heard: self.attendance.heard(),
            actors: self.config.roll.report(),
        };
        let (system, head) = (self.system.clone(), self.config.head.clone());
        let registered = async move {
            // From before it is asked: the link may be lost with the answer on it, and a watch that begins then
            // would be of another link, over which nobody has registered.
            let lost = system.watch(&head);
            register.ask(message, REGISTER_DEADLINE).await?;
            Ok::<_, AskError>(lost.await)
        };
        ctx.spawn(registered.into_actor(self).map(|registered, _, ctx| {
            let pause = match registered {
                Ok(lost) if lost.reason == LostReason::Closed => {
                    tracing::info!("the head says goodbye, or answers ours");
                    Duration::ZERO
                }
                Ok(lost) => {
                    tracing::warn!(reason = %lost.reason, "the link to the head is lost");
                    Duration::ZERO
                }
                Err(error) => {
                    tracing::debug!(%error, "the head does not answer");
                    REGISTER_PAUSE
                }
            };
            ctx.run_later(pause, |this, ctx| this.register(ctx));
        }));
    }

    /// Keeps a link to this shard's own node, by which the node sees that it is not frozen.
    fn attach(&self, ctx: &mut Context<Self>) {
        let attach = self.attach.clone();
        let message = Attach {
            process: self.system.process().to_string(),
            pid: self.system.pid(),
        };
        let (system, node) = (self.system.clone(), attach.path().process.clone());
        let attached = async move {
            loop {
                // From before it is asked, as for the head.
                let lost = system.watch(&node);
                match attach.ask(message.clone(), REGISTER_DEADLINE).await {
                    Ok(true) => {
                        lost.await;
                        continue;
                    }
                    Ok(false) => tracing::debug!("the node does not know this process yet"),
                    Err(error) => tracing::debug!(%error, "the node does not answer"),
                }
                tokio::time::sleep(REGISTER_PAUSE).await;
            }
        };
        ctx.spawn(attached.into_actor(self));
    }

    /// Ends the work of an epoch and of those before it. The engine's thread follows as soon as the
    /// operation that it waits in returns.
    fn leave(&mut self, epoch: Epoch, why: String, ctx: &mut Context<Self>) {
        self.attendance.leave(epoch);
        self.abort(epoch, why, ctx);
    }

    /// Ends the work of every epoch that this shard has heard of.
    fn leave_all(&mut self, why: &str, ctx: &mut Context<Self>) {
        if let Some(epoch) = self.attendance.leave_all() {
            self.abort(epoch, why.into(), ctx);
        }
    }

    fn abort(&self, epoch: Epoch, why: String, ctx: &mut Context<Self>) {
        let abort = Abort { epoch, why };
        let aborted = self.collective.send(abort).into_actor(self);
        ctx.spawn(aborted.map(|_, this, _| {
            if let Some((_, running)) = this.attendance.drop_left() {
                running.end();
            }
        }));
    }

    /// News of the engine's thread.
    fn note(&mut self, news: News, ctx: &mut Context<Self>) {
        match news {
            News::Progress(load) => {
                let note = NoteProgress {
                    node: self.config.node.clone(),
                    load,
                };
                // Progress is for the eye: the next one says more.
                let _ = self.progress.try_tell(note);
            }
            News::Ended { epoch, failure } => self.ended(epoch, failure, ctx),
        }
    }

    fn ended(&mut self, epoch: Epoch, failure: Option<String>, ctx: &mut Context<Self>) {
        let Some(running) = self.attendance.ended(epoch) else {
            return;
        };
        let Some(why) = failure else { return };
        tracing::warn!(%epoch, rank = %running.rank, why, "the epoch ended in an error");
        let failed = StepFailed {
            epoch,
            rank: running.rank,
            why: why.clone(),
        };
        let step_failed = self.step_failed.clone();
        ctx.spawn(
            async move {
                if let Err(error) = step_failed.ask(failed, REGISTER_DEADLINE).await {
                    tracing::warn!(%error, "the head was not told of a failed step");
                }
            }
            .into_actor(self),
        );
        let aborted = self.collective.send(Abort { epoch, why });
        ctx.spawn(aborted.map(drop).into_actor(self));
    }
}

impl Actor for ShardWorker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if let Some(news) = self.news.take() {
            let news = futures::stream::unfold(news, |mut news| async {
                news.recv().await.map(|one| (one, news))
            });
            ctx.add_message_stream(futures::StreamExt::map(news, NoteNews));
        }
        self.attach(ctx);
        self.register(ctx);
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct NoteNews(News);

impl Handler<NoteNews> for ShardWorker {
    type Result = ();

    fn handle(&mut self, news: NoteNews, ctx: &mut Context<Self>) {
        self.note(news.0, ctx);
    }
}

/// Read your share of the model, unless you hold it already, and say where you can be met.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Loaded, LoadRefusal>")]
pub struct LoadShard(pub ShardSpec);

impl RemoteMessage for LoadShard {
    const NAME: &'static str = "load-shard";
    const VERSION: u16 = 3;
    type Reply = Result<Loaded, LoadRefusal>;
}

/// The share is held.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Loaded {
    /// Of the tensor endpoint.
    pub address: std::net::SocketAddr,
    /// Who samples in this layout: the same on every rank.
    pub sampling_rank: Rank,
    /// Positions that a sequence may reach.
    pub context_tokens: u32,
    pub vocabulary: u32,
    /// Positions that the caches of this rank may hold together: as many as were asked for, or as
    /// many as there is memory for.
    pub kv_tokens: u32,
}

/// The share is not held.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadRefusal {
    pub detail: String,
    /// Trying again would not help.
    pub lasting: bool,
}

impl Handler<LoadShard> for ShardWorker {
    type Result = ResponseActFuture<Self, Result<Loaded, LoadRefusal>>;

    fn handle(&mut self, load: LoadShard, ctx: &mut Context<Self>) -> Self::Result {
        let LoadShard(mut spec) = load;
        if let Some(model) = &self.config.model {
            spec.model.clone_from(model);
        }
        let passing = |detail: String| LoadRefusal {
            detail,
            lasting: false,
        };
        let Some(before) = self.attendance.load(spec.epoch) else {
            let refused = Err(passing(format!("epoch {} is over", spec.epoch)));
            return Box::pin(future::ready(refused).into_actor(self));
        };
        // The head may begin anew without this shard having heard of the end.
        self.abort(before, "a new epoch begins".into(), ctx);
        let bind = Bind {
            epoch: spec.epoch,
            transport: spec.transport,
        };
        let loading = self.engine.load(spec);
        let collective = self.collective.clone();
        let loaded = async move {
            let loaded = loading.await?;
            let bound = collective
                .send(bind)
                .await
                .map_err(|error| passing(error.to_string()))?;
            let address = bound.map_err(|error| passing(error.to_string()))?;
            Ok(Loaded {
                address,
                sampling_rank: loaded.sampling_rank,
                context_tokens: loaded.context_tokens,
                vocabulary: loaded.vocabulary,
                kv_tokens: loaded.kv_tokens,
            })
        };
        Box::pin(loaded.into_actor(self))
    }
}

/// Meet your peers and wait for plans.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Joined, String>")]
pub struct JoinGroup(pub GroupSpec);

impl RemoteMessage for JoinGroup {
    const NAME: &'static str = "join-group";
    const VERSION: u16 = 2;
    type Reply = Result<Joined, String>;
}

/// All peers have been met.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Joined {
    /// The way that this rank's collectives take: see [`ShardReport`](offbook_protocol::ShardReport).
    pub collectives: String,
}

impl Handler<JoinGroup> for ShardWorker {
    type Result = ResponseActFuture<Self, Result<Joined, String>>;

    fn handle(&mut self, join: JoinGroup, _: &mut Context<Self>) -> Self::Result {
        let JoinGroup(spec) = join;
        let (epoch, rank, kv_tokens) = (spec.epoch, spec.rank, spec.kv_tokens);
        let collective = self.collective.clone();
        let engine = self.engine.clone();
        let (commands, commanded) = std::sync::mpsc::sync_channel(PLANS_MAX);
        let (outcomes, watched) = mpsc::channel(OUTCOMES_MAX);
        let joined = async move {
            let seed = collective
                .send(Meet {
                    spec,
                    deadline: MEET_DEADLINE,
                })
                .await;
            let seed = seed.map_err(|error| error.to_string())?;
            let seed = seed.map_err(|error| error.to_string())?;
            let run = Run {
                epoch,
                kv_tokens,
                seed,
                commands: commanded,
                outcomes,
            };
            let begun = engine.run(run).await?;
            collective
                .send(Hold {
                    epoch,
                    group: begun.group,
                })
                .await
                .map_err(|error| error.to_string())?;
            Ok((begun.transport, begun.collectives))
        };
        Box::pin(
            joined
                .into_actor(self)
                .map(move |joined: Result<_, String>, this, ctx| {
                    let (transport, collectives) = joined?;
                    tracing::debug!(%epoch, %rank, collectives, "joined");
                    let running = Running {
                        rank,
                        transport,
                        commands,
                        outcomes: Some(watched),
                    };
                    if let Err(running) = this.attendance.begin(epoch, running) {
                        running.end();
                        let why = "it was left while its group met";
                        this.abort(epoch, why.into(), ctx);
                        return Err(format!("epoch {epoch} is over: {why}"));
                    }
                    Ok(Joined { collectives })
                }),
        )
    }
}

/// The outcomes of an epoch, from its first step on. Only the rank that samples has any.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WatchOutcomes {
    pub epoch: Epoch,
}

impl StreamMessage for WatchOutcomes {
    const NAME: &'static str = "watch-outcomes";
    const VERSION: u16 = 2;
    type Item = StepOutcome;
}

impl Handler<Open<WatchOutcomes>> for ShardWorker {
    type Result = ();

    fn handle(&mut self, open: Open<WatchOutcomes>, ctx: &mut Context<Self>) {
        let running = self.attendance.current_mut(open.message.epoch);
        let Some(mut outcomes) = running.and_then(|running| running.outcomes.take()) else {
            tracing::debug!(epoch = %open.message.epoch, "nothing to watch");
            return;
        };
        let items = open.items;
        // What the head is too slow to take waits in the queue; the engine does not.
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

/// Change what you are working on.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct ApplyPlan(pub Plan);

impl RemoteMessage for ApplyPlan {
    const NAME: &'static str = "apply-plan";
    type Reply = ();
}

impl Handler<ApplyPlan> for ShardWorker {
    type Result = ();

    fn handle(&mut self, apply: ApplyPlan, ctx: &mut Context<Self>) {
        let ApplyPlan(plan) = apply;
        let Some(running) = self.attendance.current_mut(plan.epoch) else {
            tracing::debug!(epoch = %plan.epoch, "a plan of another epoch is refused");
            return;
        };
        let epoch = plan.epoch;
        if let Err(error) = running.commands.try_send(Command::Plan(plan)) {
            self.leave(
                epoch,
                format!("the engine takes no more plans: {error}"),
                ctx,
            );
        }
    }
}

/// The epoch is over.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct LeaveGroup {
    pub epoch: Epoch,
    pub why: String,
}

impl RemoteMessage for LeaveGroup {
    const NAME: &'static str = "leave-group";
    type Reply = ();
}

impl Handler<LeaveGroup> for ShardWorker {
    type Result = ();

    fn handle(&mut self, leave: LeaveGroup, ctx: &mut Context<Self>) {
        self.leave(leave.epoch, leave.why, ctx);
    }
}

/// Say what your steps have taken and what you hold; nothing while you are in no group.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Option<ShardSteps>")]
pub struct ReadSteps;

impl RemoteMessage for ReadSteps {
    const NAME: &'static str = "read-steps";
    const VERSION: u16 = 3;
    type Reply = Option<ShardSteps>;
}

impl Handler<ReadSteps> for ShardWorker {
    type Result = ResponseFuture<Option<ShardSteps>>;

    fn handle(&mut self, _: ReadSteps, _: &mut Context<Self>) -> Self::Result {
        let Some((_, Running { rank, .. })) = self.attendance.running() else {
            return Box::pin(future::ready(None));
        };
        let (rank, node) = (*rank, self.config.node.clone());
        let Steps {
            decode,
            prefill,
            kv,
            ..
        } = self.steps.read();
        let throttle = self.throttle.send(ReadThrottle);
        Box::pin(async move {
            Some(ShardSteps {
                rank,
                node,
                decode,
                prefill,
                kv,
                memory: memory_figures(),
                throttle: throttle.await.unwrap_or_default(),
            })
        })
    }
}

/// All zero where MLX does not say.
fn memory_figures() -> MemoryFigures {
    let memory = DeviceMemory::read().unwrap_or_default();
    MemoryFigures {
        active_bytes: memory.active_bytes,
        cache_bytes: memory.cache_bytes,
        peak_bytes: memory.peak_bytes,
        limit_bytes: memory.limit_bytes,
    }
}

/// The head answers within a round trip; it may be starting.
const REGISTER_DEADLINE: Duration = Duration::from_secs(5);
const REGISTER_PAUSE: Duration = Duration::from_millis(100);
/// Meeting takes a round trip; the rest is for processes that the system has not scheduled yet.
/// Shorter than what the head gives the whole join.
const MEET_DEADLINE: Duration = Duration::from_secs(20);
/// Plans that the engine has not taken yet. It takes them every step; one that is this late hangs.
const PLANS_MAX: usize = 4096;
/// Outcomes that the head has not taken yet: decode goes on while the scheduler stands still.
const OUTCOMES_MAX: usize = 64 * 1024;
/// The head's messages, and news of the engine's thread.
const MAILBOX_MAX: usize = 1024;
