//! The thread that owns the engine and its stream. It does one thing after the other: load a
//! share, then run an epoch until it ends, then whatever comes next.

use std::sync::Arc;
use std::sync::mpsc as blocking;

use offbook_collectives::{FastSynch, Group, GroupHandle, can_delegate, device_free_bytes};
use offbook_engine::batch::KvUse;
use offbook_engine::memory as device_memory;
use offbook_engine::{
    Command, EndReason, Engine, LoopEnd, LoopOptions, Report, StepError, StepTiming, Window,
    step_loop,
};
use offbook_protocol::{Epoch, LoadProgress, Rank, ShardSpec, StepOutcome, Transport};
use tokio::sync::{mpsc, oneshot};

use super::LoadRefusal;
use super::device_gate;
use super::memory::{self, Bound};
use super::step_record::StepRecord;
use super::watchdog::{Phase, Progress};
use crate::collective::GroupSeed;
use crate::process_limit;

/// The sending end of the thread's orders. When the last one is dropped, the thread ends.
#[derive(Clone)]
pub(crate) struct EngineThread {
    orders: blocking::SyncSender<Order>,
}

/// What the thread says without being asked.
pub(crate) enum News {
    Progress(LoadProgress),
    Ended {
        epoch: Epoch,
        failure: Option<String>,
    },
}

/// What every rank knows of the model once it holds its share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) sampling_rank: Rank,
    pub(crate) context_tokens: u32,
    pub(crate) vocabulary: u32,
    /// Positions that this rank's caches may hold together.
    pub(crate) kv_tokens: u32,
}

/// One epoch to run.
pub(crate) struct Run {
    pub(crate) epoch: Epoch,
    /// Positions that the caches may hold together, on every rank.
    pub(crate) kv_tokens: u32,
    pub(crate) seed: GroupSeed,
    pub(crate) commands: blocking::Receiver<Command>,
    pub(crate) outcomes: mpsc::Sender<StepOutcome>,
}

/// An epoch that runs.
pub(crate) struct Begun {
    pub(crate) group: GroupHandle,
    /// The way that they take.
    pub(crate) collectives: String,
    pub(crate) transport: Transport,
}

/// What the thread is to do next.
pub(crate) enum Order {
    Load(Box<ShardSpec>, oneshot::Sender<Result<Held, LoadRefusal>>),
    Run(Box<Run>, oneshot::Sender<Result<Begun, String>>),
}

impl EngineThread {
    pub(super) fn start(
        place: Place,
        window: Arc<Window>,
        steps: StepRecord,
        progress: Progress,
    ) -> std::io::Result<(Self, mpsc::Receiver<News>)> {
        let (orders, ordered) = blocking::sync_channel(ORDERS_MAX);
        let (news, told) = mpsc::channel(NEWS_MAX);
        let thread = Thread {
            place,
            news,
            window,
            steps,
            progress,
            held: None,
            device_bytes: None,
        };
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || thread.work(&ordered))?;
        Ok((Self { orders }, told))
    }

    /// The ends of a thread that a simulation plays.
    #[cfg(test)]
    pub(crate) fn played() -> (Self, mpsc::Receiver<News>, PlayedThread) {
        let (orders, ordered) = blocking::sync_channel(ORDERS_MAX);
        let (news, told) = mpsc::channel(NEWS_MAX);
        let played = PlayedThread {
            orders: ordered,
            news,
        };
        (Self { orders }, told, played)
    }

    /// Resolves when the share is held. Waits for an epoch that is still ending.
    pub(crate) fn load(
        &self,
        spec: ShardSpec,
    ) -> impl Future<Output = Result<Held, LoadRefusal>> + use<> {
        let (reply, replied) = oneshot::channel();
        let sent = self.orders.try_send(Order::Load(Box::new(spec), reply));
        let busy = |detail: &str| LoadRefusal {
            detail: detail.into(),
            lasting: false,
        };
        async move {
            sent.map_err(|_| busy("the engine's thread takes no orders"))?;
            replied
                .await
                .map_err(|_| busy("the engine's thread has ended"))?
        }
    }

    /// Resolves when the epoch runs.
    pub(crate) fn run(&self, run: Run) -> impl Future<Output = Result<Begun, String>> + use<> {
        let (reply, replied) = oneshot::channel();
        let sent = self.orders.try_send(Order::Run(Box::new(run), reply));
        async move {
            sent.map_err(|_| "the engine's thread takes no orders".to_owned())?;
            replied
                .await
                .map_err(|_| "the engine's thread has ended".to_owned())?
        }
    }
}

/// The thread's own ends, for whoever plays it.
#[cfg(test)]
pub(crate) struct PlayedThread {
    pub(crate) orders: blocking::Receiver<Order>,
    pub(crate) news: mpsc::Sender<News>,
}

/// Where the thread works, and what it may take there.
pub(crate) struct Place {
    pub(crate) node: String,
    pub(crate) memory_limit_bytes: Option<u64>,
}

/// A share that is loaded, for what, and how many positions of caches fit beside it.
struct Share {
    spec: ShardSpec,
    engine: Engine,
    kv_tokens: u32,
}

struct Thread {
    place: Place,
    news: mpsc::Sender<News>,
    window: Arc<Window>,
    steps: StepRecord,
    progress: Progress,
    /// What is loaded, and for what: another epoch of the same share needs no reading.
    held: Option<Share>,
    /// What a device with memory of its own has.
    device_bytes: Option<u64>,
}

impl Thread {
    fn work(mut self, orders: &blocking::Receiver<Order>) {
        if let Err(error) = self.keep_to_the_limit() {
            tracing::error!(%error, "the memory limit does not hold: the device will say why");
        }
        while let Ok(order) = orders.recv() {
            match order {
                Order::Load(spec, reply) => {
                    let _ = reply.send(self.load(*spec));
                }
                Order::Run(run, reply) => self.run(*run, reply),
            }
            self.progress.note(Phase::Idle);
        }
    }

    fn keep_to_the_limit(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        self.device_bytes = device_memory::device_bytes()?;
        let Some(bytes) = self.place.memory_limit_bytes else {
            return Ok(());
        };
        device_memory::limit(bytes)?;
        // A device with memory of its own takes none of the process's.
        if self.device_bytes.is_none() {
            process_limit::limit_data(process_limit::with_headroom(bytes))?;
        }
        Ok(())
    }

    fn load(&mut self, spec: ShardSpec) -> Result<Held, LoadRefusal> {
        let same = |held: &ShardSpec| {
            ShardSpec {
                epoch: spec.epoch,
                ..held.clone()
            } == spec
        };
        let lasting = |detail: String| LoadRefusal {
            detail,
            lasting: true,
        };
        if spec.fast_synch == offbook_protocol::FastSynch::Require {
            // Another epoch would not bring another device.
            can_delegate().map_err(|why| lasting(format!("fast_synch is required, but {why}")))?;
        }
        if !self.held.as_ref().is_some_and(|held| same(&held.spec)) {
            // Two shares at once might not fit.
            self.held = None;
            let _ = device_memory::clear_cache();
            let bound = Bound::of(self.place.memory_limit_bytes, self.device_bytes);
            let kv_tokens = memory::kv_tokens(&spec, &self.place.node, bound).map_err(lasting)?;
            let (news, progress) = (self.news.clone(), self.progress.clone());
            progress.note(Phase::Load);
            self.wait_for_device_memory(&spec, kv_tokens);
            let engine = Engine::load(&spec, &mut |load| {
                progress.note(Phase::Load);
                let _ = news.try_send(News::Progress(load));
            });
            let engine = engine.map_err(|error| lasting(error.to_string()))?;
            self.held = Some(Share {
                spec: spec.clone(),
                engine,
                kv_tokens,
            });
        }
        let held = self.held.as_mut().expect("it was loaded above");
        held.spec.epoch = spec.epoch;
        let engine = &held.engine;
        Ok(Held {
            kv_tokens: held.kv_tokens,
            sampling_rank: engine.partition().sampling_rank(),
            context_tokens: spec.context_tokens,
            vocabulary: engine.config().vocabulary_size as u32,
        })
    }

    /// A process that held this share before may have died a moment ago.
    fn wait_for_device_memory(&self, spec: &ShardSpec, kv_tokens: u32) {
        if self.device_bytes.is_none() {
            return;
        }
        let own = device_memory::DeviceMemory::read().unwrap_or_default();
        let own = own.active_bytes + own.cache_bytes;
        if let Some(needed) = memory::share_bytes(spec, kv_tokens) {
            device_gate::wait(needed, own, device_free_bytes);
        }
    }

    fn run(&mut self, run: Run, reply: oneshot::Sender<Result<Begun, String>>) {
        let Run {
            epoch,
            kv_tokens,
            seed,
            commands,
            outcomes,
        } = run;
        let Some(mut share) = self.held.take().filter(|held| held.spec.epoch == epoch) else {
            let _ = reply.send(Err(format!("no share is loaded for epoch {epoch}")));
            return;
        };
        let spec = share.spec.clone();
        let transport = spec.transport;
        let deadline = spec.collective_deadline;
        let fast_synch = match spec.fast_synch {
            offbook_protocol::FastSynch::Auto => FastSynch::Auto,
            offbook_protocol::FastSynch::On => FastSynch::On,
            offbook_protocol::FastSynch::Off => FastSynch::Off,
            offbook_protocol::FastSynch::Require => FastSynch::Require,
        };
        let group = match seed {
            GroupSeed::Solo => Ok(Group::solo()),
            GroupSeed::Quic(quic) => Group::over(quic, deadline, fast_synch),
            GroupSeed::SharedMemory(host) => Group::on_one_host(*host, deadline, fast_synch),
            GroupSeed::Ring(ring) => Group::ring(&ring),
            GroupSeed::Nccl(nccl) => Group::nccl(&nccl),
            GroupSeed::Jaccl(jaccl, side) => Group::jaccl(&jaccl, side, deadline),
        };
        let group = match group {
            Ok(group) => group,
            Err(error) => {
                self.held = Some(share);
                let _ = reply.send(Err(error.to_string()));
                return;
            }
        };
        let _ = reply.send(Ok(Begun {
            group: group.handle(),
            collectives: group.path().name().to_owned(),
            transport,
        }));
        let report = Reporter {
            outcomes: Some(outcomes),
            steps: self.steps.clone(),
            progress: self.progress.clone(),
        };
        share.engine.bound_caches(kv_tokens);
        let options = LoopOptions {
            epoch,
            window: Arc::clone(&self.window),
            step_log_every: STEP_LOG_EVERY,
            micro_batches: spec.micro_batches,
            plan_deadline: spec.collective_deadline,
        };
        let LoopEnd { engine, reason } =
            step_loop::run(share.engine, group, commands, report, options);
        self.steps.note_end();
        self.held = Some(Share { engine, ..share });
        let failure = match reason {
            EndReason::Shutdown => None,
            EndReason::Failed(error) => Some(error.to_string()),
        };
        let _ = self.news.blocking_send(News::Ended { epoch, failure });
    }
}

/// Carries what the loop reports off the engine's thread, without ever waiting.
struct Reporter {
    /// None once one was not taken.
    outcomes: Option<mpsc::Sender<StepOutcome>>,
    steps: StepRecord,
    progress: Progress,
}

impl Report for Reporter {
    fn begins(&mut self, prefill_tokens: usize) {
        self.progress.note(match prefill_tokens {
            0 => Phase::Decode,
            _ => Phase::Prefill,
        });
    }

    fn idles(&mut self, kv: KvUse) {
        self.progress.note(Phase::Idle);
        self.steps.note_idle(kv);
    }

    fn outcome(&mut self, outcome: StepOutcome) {
        // A full queue means that the head has not listened for tens of thousands of steps. A token
        // left out would be a gap in an answer: the outcomes end instead, and with them the epoch.
        self.outcomes
            .take_if(|outcomes| outcomes.try_send(outcome).is_err());
    }

    fn timing(&mut self, timing: StepTiming) {
        self.steps.note(&timing);
    }

    /// The end of the loop says it too, when the engine is free again.
    fn failed(&mut self, _: &StepError) {}
}

/// Load, run, load: more only when the head has lost count.
const ORDERS_MAX: usize = 8;
/// Loading reports a few hundred times.
const NEWS_MAX: usize = 1024;
/// One line for an operator every few seconds of decode.
const STEP_LOG_EVERY: u64 = 128;
