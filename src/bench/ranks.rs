//! Rank processes for measurements on this machine: starts them, listens to them, and knows within a
//! moment when one of them fails. `bench` and `doctor` use it.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use offbook_engine::CPU_THREADS;
use offbook_protocol::{FastSynch, Layout, Transport};
use offbook_runtime::{Identity, NodeKey};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use super::prefill_memory::{PrefillFigures, PrefillJob};
use super::wire::Wire;
use crate::local_cluster::{cpu_threads_each, reserve_tcp, reserve_udp};

/// Where the sums of a step happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Collectives {
    /// Nowhere: each rank goes on with what it has
    None,
    /// On MLX's CPU stream
    CpuStream,
    /// On the device's own stream, or not at all
    Delegated,
}

impl Collectives {
    /// As a wish for a group.
    pub(super) fn fast_synch(self) -> Option<FastSynch> {
        match self {
            Self::None => None,
            Self::CpuStream => Some(FastSynch::Off),
            Self::Delegated => Some(FastSynch::Require),
        }
    }
}

/// A group that the ranks are to form: what carries it, and where its operations happen. Without the
/// latter each rank is alone in it.
pub(crate) type Wish = (Wire, Option<FastSynch>);

/// What every rank of a run is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) ranks: usize,
    /// Each rank is in all of them.
    pub(crate) groups: Vec<GroupPlan>,
    /// The key of each rank, by rank.
    pub(crate) keys: Vec<NodeKey>,
    /// How long an operation may take.
    pub(crate) deadline: Duration,
    pub(crate) job: Job,
}

/// How the ranks meet in one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GroupPlan {
    pub(crate) wire: Wire,
    /// Without it each rank is alone.
    pub(crate) fast_synch: Option<FastSynch>,
    /// Where each rank listens, by rank; for `shm` numbers that nobody else on the host has.
    pub(crate) addresses: Vec<SocketAddr>,
}

/// What the ranks do once they have met.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Times sums of these sizes.
    Latency { bytes: Vec<usize>, rounds: u32 },
    /// Compares every operation with plain arithmetic.
    Conformance { elements: Vec<usize> },
    /// Sums without end, until something fails.
    Forever { bytes: usize },
    /// Steps of products, see [`offbook_collectives::measure::Products`].
    Products {
        width: i32,
        depth: usize,
        steps: u32,
        /// Counts the graphs that the device instantiates, which slows every step down.
        count_graphs: bool,
    },
    /// Long prompts through a model with random weights, under a window of layers in flight.
    PrefillMemory(PrefillJob),
    /// Decode steps of a model with random weights, see [`offbook_engine::Trial`].
    Model(ModelJob),
}

/// Which model, and what it works on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ModelJob {
    /// A directory, or [`crate::cli::MINIMAX`].
    pub(crate) model: PathBuf,
    pub(crate) layers: Option<u32>,
    pub(crate) layout: Layout,
    pub(crate) batch: u32,
    pub(crate) context: u32,
    pub(crate) steps: u32,
    /// Tokens of prompts in one step at most.
    pub(crate) chunk: u32,
    /// The groups are as many kinds, one after the other and then again; what each has.
    pub(crate) micro_batches: Vec<Option<NonZeroU32>>,
}

/// What a rank says, as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// All groups are there and have worked once.
    Ready {
        device: String,
    },
    Latency(Latency),
    Conformance {
        /// Which of the groups.
        group: usize,
        operations: usize,
        /// The same on all ranks, or they differ.
        digest: String,
        path: String,
    },
    /// A group that does not keep its promises; the rank goes on with the next.
    Broken {
        group: usize,
        error: String,
    },
    Step(StepTimes),
    PrefillMemory(PrefillFigures),
    Failed(Failed),
    Done,
}

/// What sums of one size take over one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) group: usize,
    pub(crate) bytes: usize,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) chained_us: f64,
    pub(crate) path: String,
}

/// Medians over the steps of one rank, in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StepTimes {
    pub(crate) group: usize,
    pub(crate) path: String,
    pub(crate) total_ms: f64,
    pub(crate) model_ms: f64,
    /// Where the engine tells it apart from `eval_ms`.
    pub(crate) gpu_eval_ms: Option<f64>,
    pub(crate) eval_ms: f64,
    pub(crate) collective_ms: f64,
    /// Of all sequences, where a model decodes.
    pub(crate) tokens_per_second: Option<f64>,
    /// Of prompts, where a model reads some.
    pub(crate) prompt_tokens_per_second: Option<f64>,
    /// Graphs that the device instantiated in all of these steps, where that was to be counted and
    /// can be.
    pub(crate) graphs_instantiated: Option<u64>,
}

/// The end of a rank's work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Failed {
    /// Which of the groups, if it was one.
    pub(crate) group: Option<usize>,
    /// Names the rank and the operation.
    pub(crate) error: String,
    /// Whom the group found late or lost.
    pub(crate) culprit: Option<usize>,
    /// How long the operation had taken by then.
    pub(crate) waited: Duration,
    /// The device cannot do what was required of it, and said so before anything was exchanged.
    pub(crate) refused: bool,
}

/// What one rank had to say when a run failed, or what was found out about it.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) rank: usize,
    pub(crate) failed: Failed,
}

/// Running rank processes. They end with this value, and with this process.
pub(crate) struct Ranks {
    children: Vec<Child>,
    heard: mpsc::Receiver<(usize, Heard)>,
    deadline: Duration,
    silence_max: Duration,
    /// Their keys and assignment; removed at the end.
    _scratch: TempDir,
}

/// What reaches us from a rank.
enum Heard {
    Event(Event),
    Ended,
}

impl Ranks {
    /// Starts a process per rank. Must be called on the main thread: they end with the thread that
    /// started them. With `gpus`, rank r sees only GPU r modulo that number.
    pub(crate) fn start(ranks: usize, groups: &[Wish], job: Job, limits: Limits) -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("offbook-").tempdir();
        let scratch = scratch.context("cannot make a temporary folder")?;
        let groups = groups
            .iter()
            .map(|&wish| plan(wish, ranks))
            .collect::<Result<_>>()?;
        let assignment = Assignment {
            ranks,
            groups,
            keys: make_keys(scratch.path(), ranks)?,
            deadline: limits.deadline,
            job,
        };
        let file = scratch.path().join(ASSIGNMENT);
        let text = serde_json::to_vec(&assignment)?;
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let (hear, heard) = mpsc::channel(EVENTS_MAX);
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let children = (0..ranks)
            .map(|rank| {
                let mut command = Command::new(&program);
                command.arg("rank").arg("--folder").arg(scratch.path());
                command.arg("--rank").arg(rank.to_string());
                if let Some(threads) = cpu_threads_each(ranks) {
                    command.env(CPU_THREADS, threads.to_string());
                }
                if let Some(gpus) = limits.gpus {
                    let gpu = rank % gpus.get() as usize;
                    command.env("CUDA_VISIBLE_DEVICES", gpu.to_string());
                }
                start_one(command, rank, hear.clone())
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            children,
            heard,
            deadline: limits.deadline,
            silence_max: SILENCE_MAX,
            _scratch: scratch,
        })
    }

    /// Lets the ranks measure for so much longer before they say anything.
    pub(crate) fn bear(self, silence: Duration) -> Self {
        Self {
            silence_max: self.silence_max + silence,
            ..self
        }
    }

    /// Waits until every rank has said `wanted`, and hands every event to `see`.
    ///
    /// # Errors
    /// [`RunFailed`] with what each rank had to say, within the deadline of an operation of the
    /// first sign that something is wrong.
    pub(crate) async fn run(
        &mut self,
        wanted: Wanted,
        mut see: impl FnMut(usize, &Event),
    ) -> Result<()> {
        let mut watch = Watch::new(self.children.len(), self.deadline, self.silence_max);
        let mut ready = 0;
        while !watch.is_settled() {
            let limit = watch.patience(Instant::now());
            match tokio::time::timeout(limit, self.heard.recv()).await {
                Ok(Some((rank, Heard::Event(event)))) => {
                    see(rank, &event);
                    ready += usize::from(matches!(event, Event::Ready { .. }));
                    if ready == self.children.len() {
                        ready = 0;
                        let pids: Vec<_> = self.children.iter().filter_map(Child::id).collect();
                        tracing::info!(?pids, "the ranks have met");
                    }
                    watch.note_event(rank, event, wanted);
                }
                Ok(Some((rank, Heard::Ended))) => {
                    let how = self.children[rank].wait().await;
                    watch.note_end(rank, how.ok());
                }
                Ok(None) => bail!("no rank process is left"),
                Err(_) => watch.give_up(),
            }
        }
        watch.result()
    }

    /// The process of a rank that runs.
    pub(crate) fn pid(&self, rank: usize) -> Option<rustix::process::Pid> {
        let pid = self.children.get(rank)?.id()?;
        rustix::process::Pid::from_raw(pid.cast_signed())
    }
}

/// What holds for every rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How long an operation may take.
    pub(crate) deadline: Duration,
    /// How many GPUs the ranks share, one each as long as there are enough.
    pub(crate) gpus: Option<std::num::NonZeroU32>,
}

/// What a run waits for from every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Ready,
    Done,
    /// The end of everybody's work by a failure: nothing else settles a rank.
    Failure,
}

/// A run that failed, with what each rank had to say.
#[derive(Debug)]
pub(crate) struct RunFailed(pub(crate) Vec<Failure>);

impl std::error::Error for RunFailed {}

impl fmt::Display for RunFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the ranks did not finish")?;
        let Self(failures) = self;
        failures.iter().try_for_each(|Failure { rank, failed }| {
            write!(f, "; rank {rank} says: {}", failed.error)
        })
    }
}

/// Who has said what; pure but for the clock that it is given.
struct Watch {
    settled: Vec<bool>,
    failures: Vec<Failure>,
    deadline: Duration,
    silence_max: Duration,
    /// When nothing more is waited for.
    ends: Option<Instant>,
}

impl Watch {
    fn new(ranks: usize, deadline: Duration, silence_max: Duration) -> Self {
        Self {
            settled: vec![false; ranks],
            failures: Vec::new(),
            deadline,
            silence_max,
            ends: None,
        }
    }

    fn is_settled(&self) -> bool {
        self.settled.iter().all(|&settled| settled)
    }

    /// How long to wait for the next word. Ranks that measure may be silent for long; once one has
    /// failed, the others fail within their deadline.
    fn patience(&self, now: Instant) -> Duration {
        let ends = self.ends.map(|ends| ends.saturating_duration_since(now));
        ends.unwrap_or(self.silence_max)
    }

    fn note_event(&mut self, rank: usize, event: Event, wanted: Wanted) {
        match event {
            Event::Failed(failed) => {
                // At the deadline the others are at theirs; before it they may need all of it.
                let late = failed.waited >= self.deadline;
                self.end_within(if late { GRACE } else { self.deadline + GRACE });
                if let Some(culprit) = failed.culprit
                    && let Some(settled) = self.settled.get_mut(culprit)
                {
                    *settled = true;
                }
                self.settled[rank] = true;
                self.failures.push(Failure { rank, failed });
            }
            Event::Ready { .. } => self.settled[rank] |= wanted == Wanted::Ready,
            Event::Done => self.settled[rank] |= wanted != Wanted::Failure,
            Event::Latency(_) | Event::Conformance { .. } => {}
            Event::Broken { .. } | Event::Step(_) | Event::PrefillMemory(_) => {}
        }
    }

    fn note_end(&mut self, rank: usize, status: Option<ExitStatus>) {
        let how = status.map_or("for a reason unknown".to_owned(), |status| {
            status.to_string()
        });
        self.end_within(self.deadline + GRACE);
        if !self.settled[rank] {
            self.settled[rank] = true;
            self.failures
                .push(Failure::found(rank, format!("its process ended: {how}")));
        }
    }

    /// Whoever has not spoken by now does not: stopped, or stuck where nothing has a deadline.
    fn give_up(&mut self) {
        for rank in 0..self.settled.len() {
            if !std::mem::replace(&mut self.settled[rank], true) {
                let error = "it says nothing more: stopped, or stuck in an operation";
                self.failures.push(Failure::found(rank, error.to_owned()));
            }
        }
    }

    /// What each rank had to say, in rank order. Who was found out without saying so itself is named
    /// to those who could not tell.
    fn result(mut self) -> Result<()> {
        if self.failures.is_empty() {
            return Ok(());
        }
        let is_found = |failure: &Failure| failure.failed.culprit == Some(failure.rank);
        let found: Vec<Failure> = self
            .failures
            .iter()
            .filter(|one| is_found(one))
            .cloned()
            .collect();
        for Failure { failed, .. } in &mut self.failures {
            for Failure {
                rank,
                failed: silent,
            } in &found
            {
                let name = format!("rank {rank}");
                if failed.culprit.is_none() && !failed.error.contains(&name) {
                    failed.error += &format!("; {name}: {}", silent.error);
                }
            }
        }
        self.failures.sort_by_key(|failure| failure.rank);
        Err(RunFailed(self.failures).into())
    }

    fn end_within(&mut self, limit: Duration) {
        let ends = Instant::now() + limit;
        self.ends = Some(self.ends.map_or(ends, |before| before.min(ends)));
    }
}

impl Failure {
    fn found(rank: usize, error: String) -> Self {
        Self {
            rank,
            failed: Failed {
                group: None,
                error,
                culprit: Some(rank),
                waited: Duration::ZERO,
                refused: false,
            },
        }
    }
}

impl Assignment {
    /// Reads what [`Ranks::start`] has written, and this rank's key.
    pub(crate) fn load(folder: &Path, rank: usize) -> Result<(Self, Identity)> {
        let file = folder.join(ASSIGNMENT);
        let text = std::fs::read(&file).with_context(|| {
            format!(
                "cannot read {}: ranks are not started by hand",
                file.display()
            )
        })?;
        let identity = Identity::load(&key_file(folder, rank))?;
        Ok((serde_json::from_slice(&text)?, identity))
    }
}

/// The name that a rank's key is for.
pub(crate) fn rank_name(rank: usize) -> String {
    format!("rank-{rank}")
}

fn make_keys(folder: &Path, ranks: usize) -> Result<Vec<NodeKey>> {
    let make = |rank| {
        let identity = Identity::generate(&rank_name(rank))?;
        identity.save(&key_file(folder, rank))?;
        Ok(identity.key())
    };
    (0..ranks).map(make).collect()
}

fn key_file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("{}.pem", rank_name(rank)))
}

fn plan((wire, fast_synch): Wish, ranks: usize) -> Result<GroupPlan> {
    let address = |_| match wire {
        Wire::Over(Transport::Quic) => reserve_udp(),
        Wire::Over(_) | Wire::Echo => reserve_tcp(([127, 0, 0, 1], 0).into()),
    };
    Ok(GroupPlan {
        wire,
        fast_synch,
        addresses: (0..ranks).map(address).collect::<Result<_>>()?,
    })
}

fn start_one(
    mut command: Command,
    rank: usize,
    hear: mpsc::Sender<(usize, Heard)>,
) -> Result<Child> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start a rank process")?;
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    tokio::spawn(async move {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            // MLX may print what it likes in between.
            if let Ok(event) = serde_json::from_str(&line) {
                if hear.send((rank, Heard::Event(event))).await.is_err() {
                    return;
                }
            } else {
                tracing::debug!(rank, line, "a rank said");
            }
        }
        let _ = hear.send((rank, Heard::Ended)).await;
    });
    Ok(child)
}

const ASSIGNMENT: &str = "assignment.json";
/// Ranks that are faster than we listen wait.
const EVENTS_MAX: usize = 64;
/// How much later than the first the other ranks may say that they failed. Together with what the
/// group may exceed its deadline by it stays below 100 ms.
const GRACE: Duration = Duration::from_millis(50);
/// Longer than the largest sizes take on a slow machine.
const SILENCE_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    fn failed(error: &str, culprit: Option<usize>, waited: Duration) -> Event {
        Event::Failed(Failed {
            group: Some(0),
            error: error.to_owned(),
            culprit,
            waited,
            refused: false,
        })
    }

    fn errors(watch: Watch) -> Vec<String> {
        let RunFailed(failures) = watch.result().unwrap_err().downcast().unwrap();
        failures
            .into_iter()
            .map(|failure| failure.failed.error)
            .collect()
    }

    #[test]
    fn nobody_waits_for_a_rank_that_the_others_have_named() {
        let mut watch = Watch::new(3, DEADLINE, SILENCE_MAX);
        for rank in [0, 1] {
            assert!(!watch.is_settled());
            watch.note_event(
                rank,
                failed("rank 2 was late", Some(2), DEADLINE),
                Wanted::Done,
            );
        }
        assert!(watch.is_settled());
        assert_eq!(errors(watch), ["rank 2 was late", "rank 2 was late"]);
    }

    #[test]
    fn a_silent_rank_is_named_to_those_who_could_not_tell() {
        let mut watch = Watch::new(2, DEADLINE, SILENCE_MAX);
        assert_eq!(watch.patience(Instant::now()), SILENCE_MAX);
        watch.note_event(0, failed("waited in vain", None, DEADLINE), Wanted::Done);
        assert!(watch.patience(Instant::now()) <= GRACE);
        watch.give_up();
        let errors = errors(watch);
        assert!(errors[0].starts_with("waited in vain; rank 1: it says nothing more"));
    }

    #[test]
    fn after_an_early_end_the_others_have_their_deadline() {
        let mut watch = Watch::new(2, DEADLINE, SILENCE_MAX);
        watch.note_end(1, None);
        let patience = watch.patience(Instant::now());
        assert!(patience > DEADLINE && patience <= DEADLINE + GRACE);
        watch.note_event(0, Event::Done, Wanted::Failure);
        assert!(!watch.is_settled());
        watch.note_event(0, Event::Done, Wanted::Done);
        assert!(watch.is_settled());
        assert!(errors(watch)[0].contains("its process ended"));
    }
}
