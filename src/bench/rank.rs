//! `offbook rank`: one rank of a measurement. `bench` and `doctor` start it; it says what it
//! measures as lines of JSON on standard output, and ends when they do.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use offbook_collectives::conformance::{ConformanceError, Exactness, verify};
use offbook_collectives::measure::{self, Probe, Products, Summation};
use offbook_collectives::{CollectiveError, Group};
use offbook_engine::{Engine, ModelConfig, StepTiming, Trial, TrialShare, Window};
use offbook_protocol::NodeWeight;
use offbook_runtime::supervise::lifeline;

use super::form::{MEETING_MAX, form};
use super::prefill_memory;
use super::ranks::{Assignment, Event, Failed, Job, Latency, ModelJob, StepTimes};
use crate::cli::{MINIMAX, Rank, WIDE};
use crate::logging;

pub(crate) fn run(options: &Rank) -> Result<()> {
    lifeline()?;
    logging::start("rank");
    let (assignment, identity) = Assignment::load(&options.folder, options.rank)?;
    // MLX's own transports write the environment, so they are formed before threads of ours are
    // there.
    let mut order: Vec<usize> = (0..assignment.groups.len()).collect();
    order.sort_by_key(|&group| !assignment.groups[group].wire.is_of_mlx());
    let mut groups: Vec<Option<Group>> = order.iter().map(|_| None).collect();
    for group in order {
        match form(
            &assignment.groups[group],
            &assignment,
            options.rank,
            &identity,
        ) {
            Ok(formed) => groups[group] = Some(formed),
            Err(error) => {
                let why = error.downcast_ref();
                let culprit = why.and_then(culprit);
                let refused = matches!(why, Some(CollectiveError::NotDelegated { .. }));
                say(&Event::Failed(Failed {
                    refused,
                    ..failed(Some(group), &format!("{error:#}"), culprit, Duration::ZERO)
                }));
                wait_for_the_end()
            }
        }
    }
    let member = Member {
        assignment: &assignment,
        rank: options.rank,
        groups: groups.into_iter().flatten().collect(),
        watchdog: Watchdog::start()?,
    };
    match member.work() {
        Ok(()) => say(&Event::Done),
        Err(stop) => say(&Event::Failed(*stop)),
    }
    // Groups are left when everybody is done: a rank that leaves early would end the others' last
    // operation over MLX's own transports.
    wait_for_the_end()
}

/// The parent ends this process, or its lifeline does when the parent is gone.
fn wait_for_the_end() -> ! {
    loop {
        thread::park();
    }
}

struct Member<'a> {
    assignment: &'a Assignment,
    rank: usize,
    groups: Vec<Group>,
    watchdog: Watchdog,
}

type Outcome<T> = Result<T, Box<Failed>>;

impl Member<'_> {
    fn work(mut self) -> Outcome<()> {
        for (group, formed) in self.groups.iter().enumerate() {
            let probe = self.probe(group, formed, 4)?;
            // Some may still be meeting in the next group.
            self.timed_within(MEETING_MAX, group, || probe.alone())?;
        }
        say(&Event::Ready {
            device: measure::device().to_owned(),
        });
        let assignment = self.assignment;
        match &assignment.job {
            Job::Model(job) => {
                let groups = std::mem::take(&mut self.groups);
                self.model(job, groups)
            }
            Job::PrefillMemory(job) => {
                let figures = prefill_memory::measure(job).map_err(|why| {
                    Box::new(failed(None, &format!("{why:#}"), None, Duration::ZERO))
                })?;
                say(&Event::PrefillMemory(figures));
                Ok(())
            }
            Job::Latency { bytes, rounds } => bytes
                .iter()
                .try_for_each(|&bytes| self.latency(bytes, *rounds)),
            Job::Conformance { elements } => {
                self.conformance(elements);
                Ok(())
            }
            Job::Forever { bytes } => self.forever(*bytes),
            Job::Products {
                width,
                depth,
                steps,
                count_graphs,
            } => self.products((*width, *depth), *steps, *count_graphs),
        }
    }

    /// Groups are timed in turns, so that a machine whose speed drifts is unfair to none. The first
    /// turn only warms up.
    fn latency(&self, bytes: usize, rounds: u32) -> Outcome<()> {
        // Larger operands are measured less often, so that the whole takes a minute at most.
        let rounds = rounds / (1 + u32::try_from(bytes / FULL_ROUNDS_BYTES).unwrap_or(u32::MAX));
        let per_turn = rounds.div_ceil(TURNS).max(1);
        let probes = self
            .groups
            .iter()
            .enumerate()
            .map(|(group, formed)| self.probe(group, formed, bytes))
            .collect::<Outcome<Vec<_>>>()?;
        let mut alone = vec![Vec::new(); probes.len()];
        let mut chained = vec![Vec::new(); probes.len()];
        for turn in 0..=TURNS {
            for (group, probe) in probes.iter().enumerate() {
                for _ in 0..per_turn {
                    alone[group].push(self.timed(group, || probe.alone())?);
                }
                for _ in 0..(per_turn / CHAIN).max(1) {
                    chained[group].push(self.timed(group, || probe.chained(CHAIN))?);
                }
                if turn == 0 {
                    alone[group].clear();
                    chained[group].clear();
                }
            }
        }
        if self.rank == 0 {
            for (group, (alone, chained)) in alone.iter_mut().zip(&mut chained).enumerate() {
                say(&Event::Latency(Latency {
                    group,
                    bytes,
                    p50_us: quantile(alone, 0.5) * 1e6,
                    p99_us: quantile(alone, 0.99) * 1e6,
                    chained_us: quantile(chained, 0.5) * 1e6,
                    path: self.groups[group].path().name().to_owned(),
                }));
            }
        }
        Ok(())
    }

    fn conformance(&self, elements: &[usize]) {
        for (group, formed) in self.groups.iter().enumerate() {
            let (exactness, elements) = match self.assignment.groups[group].wire.is_of_mlx() {
                false => (Exactness::Bits, elements.to_vec()),
                // They have no empty operands.
                true => {
                    let some = elements.iter().copied().filter(|&elements| elements > 0);
                    (Exactness::Rounding, some.collect())
                }
            };
            let verified = verify(formed, &elements, exactness);
            say(&match verified {
                Ok(verified) => Event::Conformance {
                    group,
                    operations: verified.operations,
                    digest: format!("{:016x}", verified.digest),
                    path: formed.path().name().to_owned(),
                },
                Err(error) => {
                    // So that the others do not wait for us.
                    let why = match &error {
                        ConformanceError::Failed { why, .. } => why.clone(),
                        wrong => CollectiveError::Poisoned {
                            why: wrong.to_string(),
                        },
                    };
                    formed.handle().poison(why);
                    Event::Broken {
                        group,
                        error: error.to_string(),
                    }
                }
            });
        }
    }

    fn forever(&self, bytes: usize) -> Outcome<()> {
        let probes = self
            .groups
            .iter()
            .enumerate()
            .map(|(group, formed)| self.probe(group, formed, bytes))
            .collect::<Outcome<Vec<_>>>()?;
        loop {
            for (group, probe) in probes.iter().enumerate() {
                self.timed(group, || probe.alone())?;
            }
        }
    }

    fn products(
        &self,
        (width, depth): (i32, usize),
        steps: u32,
        count_graphs: bool,
    ) -> Outcome<()> {
        let instantiated = || count_graphs.then(measure::graphs_instantiated).flatten();
        let sizes = self
            .assignment
            .groups
            .iter()
            .map(|plan| plan.wire.size(self.assignment.ranks));
        let ranks = sizes.max().unwrap_or(1);
        let products = Products::new(width, depth, ranks)
            .map_err(|why| Box::new(failed(None, &why.to_string(), None, Duration::ZERO)))?;
        let mut timings = vec![Vec::new(); self.groups.len()];
        let mut graphs = vec![0; self.groups.len()];
        // Several steps of a kind at a time, as in decode; the first ones after the other kinds pay
        // for a machine that these left cold.
        let per_turn = steps.div_ceil(TURNS);
        for _ in 0..TURNS {
            for (group, formed) in self.groups.iter().enumerate() {
                let summation = match self.assignment.groups[group].fast_synch {
                    None => Summation::None(ranks),
                    Some(_) => Summation::Over(formed),
                };
                for step in 0..WARM_UP_STEPS + per_turn {
                    let before = instantiated();
                    let timing = self.timed(group, || products.step(summation))?;
                    if step >= WARM_UP_STEPS {
                        timings[group].push(timing);
                        graphs[group] += instantiated().unwrap_or(0) - before.unwrap_or(0);
                    }
                }
            }
        }
        for (group, timings) in timings.iter().enumerate() {
            let median = |part: fn(&measure::ProductsTiming) -> Duration| {
                quantile(&mut timings.iter().map(part).collect::<Vec<_>>(), 0.5) * 1e3
            };
            say(&Event::Step(StepTimes {
                group,
                path: self.groups[group].path().name().to_owned(),
                total_ms: median(|timing| timing.total),
                model_ms: median(|timing| timing.model),
                gpu_eval_ms: None,
                eval_ms: median(|timing| timing.eval),
                collective_ms: median(|timing| timing.collective),
                tokens_per_second: None,
                prompt_tokens_per_second: None,
                graphs_instantiated: instantiated().map(|_| graphs[group]),
            }));
        }
        Ok(())
    }

    /// Each group in turn runs a part of its kind's steps, and is left; then the next of its kind.
    fn model(&self, job: &ModelJob, groups: Vec<Group>) -> Outcome<()> {
        let broken = |group, why: &dyn std::fmt::Display| {
            Box::new(failed(group, &why.to_string(), None, Duration::ZERO))
        };
        let kinds = job.micro_batches.len().max(1);
        let turns = groups.len().div_ceil(kinds).max(1);
        let trial = Trial {
            batch: job.batch as usize,
            context_tokens: job.context as usize,
            steps: (job.steps as usize).div_ceil(turns),
            micro_batches: None,
        };
        let config = match (job.model.to_str(), job.layers) {
            (Some(WIDE), layers) => ModelConfig::wide(layers.unwrap_or(8) as usize),
            (Some(MINIMAX), layers) => ModelConfig::minimax_m2_5(layers.unwrap_or(62) as usize),
            (_, layers) => ModelConfig::open(&job.model).map(|config| match layers {
                Some(layers) => config.with_layers(layers as usize),
                None => config,
            }),
        };
        let share = TrialShare {
            config: config.map_err(|why| broken(None, &why))?,
            layout: job.layout,
            weights: vec![NodeWeight(1.0); self.assignment.ranks],
            rank: offbook_protocol::Rank(self.rank as u32),
            context_tokens: trial.context_needed(),
            prefill_chunk_tokens: job.chunk as usize,
        };
        let mut engine = Engine::random(&share, SEED).map_err(|why| broken(None, &why))?;
        let mut timings = vec![Vec::new(); kinds];
        let mut rates = vec![(Vec::new(), Vec::new()); kinds];
        let mut paths = vec![String::new(); kinds];
        for (index, group) in groups.into_iter().enumerate() {
            let kind = index % kinds;
            let trial = Trial {
                micro_batches: job.micro_batches.get(kind).copied().flatten(),
                ..trial
            };
            paths[kind] = group.path().name().to_owned();
            if engine.has_kernels() {
                paths[kind] += ", own kernels";
            }
            let outcome;
            let window = Arc::new(Window::new(WINDOW_LAYERS, WINDOW_LAYERS));
            (engine, outcome) = trial.run_all(engine, group, window);
            let all = outcome.map_err(|why| broken(Some(index), &why))?;
            let last = &all[all.len().saturating_sub(trial.steps)..];
            let prompts = all.iter().filter(|timing| timing.prefill_tokens > 0);
            rates[kind].0.push(rate(last.iter(), |timing| timing.batch));
            rates[kind]
                .1
                .push(rate(prompts, |timing| timing.prefill_tokens));
            timings[kind].extend_from_slice(last);
        }
        for (kind, (timings, (decoded, read))) in timings.iter().zip(&rates).enumerate() {
            let median = |part: fn(&StepTiming) -> Duration| {
                quantile(&mut timings.iter().map(part).collect::<Vec<_>>(), 0.5) * 1e3
            };
            say(&Event::Step(StepTimes {
                group: kind,
                path: paths[kind].clone(),
                total_ms: median(|timing| timing.total),
                model_ms: median(|timing| timing.model),
                gpu_eval_ms: Some(median(|timing| timing.gpu_eval)),
                eval_ms: median(|timing| timing.eval),
                collective_ms: median(|timing| timing.collective),
                tokens_per_second: middle(decoded),
                prompt_tokens_per_second: middle(read),
                graphs_instantiated: None,
            }));
        }
        Ok(())
    }

    fn probe<'g>(&self, group: usize, formed: &'g Group, bytes: usize) -> Outcome<Probe<'g>> {
        Probe::new(formed, bytes)
            .map_err(|why| Box::new(failed(Some(group), &why.to_string(), None, Duration::ZERO)))
    }

    /// Runs what a group may hang or fail in.
    fn timed<T>(
        &self,
        group: usize,
        operation: impl FnOnce() -> Result<T, CollectiveError>,
    ) -> Outcome<T> {
        self.timed_within(self.assignment.deadline, group, operation)
    }

    /// The limit is for MLX's own transports; ours have the deadline of their group.
    fn timed_within<T>(
        &self,
        limit: Duration,
        group: usize,
        operation: impl FnOnce() -> Result<T, CollectiveError>,
    ) -> Outcome<T> {
        let start = Instant::now();
        let bounded = !self.assignment.groups[group].wire.is_of_mlx();
        if !bounded {
            self.watchdog.enter(group, limit);
        }
        let result = operation();
        if !bounded {
            self.watchdog.leave();
        }
        result.map_err(|why| {
            Box::new(failed(
                Some(group),
                &why.to_string(),
                culprit(&why),
                start.elapsed(),
            ))
        })
    }
}

/// An operation under way.
#[derive(Clone, Copy)]
struct Entered {
    group: usize,
    since: Instant,
    limit: Duration,
}

/// Watches over operations that have no deadline of their own, those of MLX's own transports.
struct Watchdog {
    entered: Arc<Mutex<Option<Entered>>>,
}

impl Watchdog {
    fn start() -> Result<Self> {
        let entered = Arc::new(Mutex::new(None::<Entered>));
        let watched = Arc::clone(&entered);
        thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || {
                loop {
                    thread::sleep(WATCHDOG_EVERY);
                    let entered = *watched.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(Entered {
                        group,
                        since,
                        limit,
                    }) = entered
                        && since.elapsed() >= limit
                    {
                        let error = format!(
                            "all_sum waited {limit:?} for another rank, and MLX does not say for which"
                        );
                        say(&Event::Failed(failed(Some(group), &error, None, since.elapsed())));
                        wait_for_the_end()
                    }
                }
            })?;
        Ok(Self { entered })
    }

    fn enter(&self, group: usize, limit: Duration) {
        *self.entered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Entered {
            group,
            since: Instant::now(),
            limit,
        });
    }

    fn leave(&self) {
        *self.entered.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn failed(group: Option<usize>, error: &str, culprit: Option<usize>, waited: Duration) -> Failed {
    Failed {
        group,
        error: error.to_owned(),
        culprit,
        waited,
        refused: false,
    }
}

fn culprit(why: &CollectiveError) -> Option<usize> {
    match why {
        CollectiveError::Late { rank, .. } | CollectiveError::Lost { rank, .. } => Some(*rank),
        _ => None,
    }
}

fn say(event: &Event) {
    let line = serde_json::to_string(event).expect("an event is plain data");
    let mut stdout = std::io::stdout().lock();
    // When the parent is gone, so are we, in a moment.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// How many of what was counted in a second of these steps.
fn rate<'t>(timings: impl Iterator<Item = &'t StepTiming>, count: fn(&StepTiming) -> usize) -> f64 {
    let (counted, seconds) = timings.fold((0, 0.0), |(counted, seconds), timing| {
        (
            counted + count(timing),
            seconds + timing.total.as_secs_f64(),
        )
    });
    counted as f64 / seconds
}

/// The median of a few numbers.
fn middle(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// In seconds; sorts the times.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    let at = (times.len().saturating_sub(1)) as f64 * part;
    times
        .get(at as usize)
        .map_or(f64::NAN, Duration::as_secs_f64)
}

const FULL_ROUNDS_BYTES: usize = 256 << 10;
const TURNS: u32 = 10;
/// As many sums as a decode step of a large model has, about.
const CHAIN: u32 = 64;
const WARM_UP_STEPS: u32 = 3;
/// Far below the 100 ms that a deadline may be exceeded by.
const WATCHDOG_EVERY: Duration = Duration::from_millis(10);

/// As in serving.
const WINDOW_LAYERS: u32 = 100;
/// Every run has the same weights.
const SEED: u64 = 1;
