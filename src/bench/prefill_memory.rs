//! `offbook bench prefill-memory`: what the window of layers in flight does to memory and speed, on a
//! wide model with random weights. Each window is measured in a process of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use offbook_actors::{LOOK_EVERY, Sample, WindowKeeper, WindowSettings, limit_data, status_bytes};
use offbook_collectives::Group;
use offbook_engine::memory::{self, DeviceMemory};
use offbook_engine::{
    CHUNK_AS_CONFIGURED, Engine, ModelConfig, StepTiming, Trial, TrialShare, Window, WorkKind,
};
use offbook_protocol::{Layout, NodeWeight, Rank, Transport};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::ranks::{Event, Job, Limits, Ranks, Wanted};
use super::wire::Wire;
use crate::byte_size::ByteSize;
use crate::cli::{BenchPrefillMemory, WindowChoice};

pub(super) async fn run(options: BenchPrefillMemory) -> Result<()> {
    ensure!(
        options.samples.is_none() || options.windows.len() == 1,
        "--samples is for one of --windows at a time"
    );
    if !options.json {
        println!(
            "{:<10} {:>11} {:>11} {:>12} {:>13} {:>10} {:>12} {:>11} {:>7}",
            "window",
            "weights MiB",
            "peak MiB",
            "resident MiB",
            "prefill tok/s",
            "decode ms",
            "least window",
            "least chunk",
            "shrinks"
        );
    }
    for &window in &options.windows {
        let job = PrefillJob {
            layers: options.layers,
            prompt: options.prompt,
            chunk: options.chunk,
            steps: options.steps,
            window,
            headroom: options.headroom,
            hard_limit: options.hard_limit,
            samples: options.samples.clone(),
        };
        let limits = Limits {
            deadline: RANK_DEADLINE,
            gpus: None,
        };
        let wire = Wire::from(Transport::SharedMemory);
        let ranks = Ranks::start(1, &[(wire, None)], Job::PrefillMemory(job), limits)?;
        // It says nothing before all is measured.
        let mut ranks = ranks.bear(options.prompt * SLOWEST_TOKEN);
        let ran = ranks
            .run(Wanted::Done, |_, event| {
                if let Event::PrefillMemory(figures) = event {
                    print(&options, window, figures);
                }
            })
            .await;
        // A process that ran out of memory is a result.
        if let Err(error) = ran {
            let error = error.to_string();
            match options.json {
                true => println!("{}", json!({"window": window.to_string(), "error": error})),
                false => println!("{window:<10} {error}"),
            }
        }
    }
    Ok(())
}

fn print(options: &BenchPrefillMemory, window: WindowChoice, figures: &PrefillFigures) {
    if options.json {
        let figures = json!({"window": window.to_string(), "figures": figures});
        println!("{figures}");
        return;
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{window:<10} {:>11.0} {:>11.1} {:>12.1} {:>13.1} {:>10.2} {:>12} {:>11} {:>7}",
        mib(figures.weight_bytes),
        mib(figures.peak_bytes),
        mib(figures.resident_bytes),
        figures.prefill_tokens_per_second,
        figures.decode_ms,
        figures.window_least,
        figures.chunk_least,
        figures.shrinks,
    );
}

/// What one process measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PrefillJob {
    layers: u32,
    prompt: u32,
    chunk: u32,
    steps: u32,
    window: WindowChoice,
    headroom: Option<ByteSize>,
    hard_limit: Option<ByteSize>,
    samples: Option<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PrefillFigures {
    weight_bytes: u64,
    /// Beyond the weights, by MLX's account: the most at once.
    peak_bytes: u64,
    /// Beyond what the process held with its weights, by the system's account: the most at once; 0
    /// where the system does not say.
    resident_bytes: u64,
    prefill_tokens_per_second: f64,
    /// Median of a decode step.
    decode_ms: f64,
    /// The smallest that the window was in prefill.
    window_least: u32,
    /// Tokens of the prompt that a step read at the least, by what memory allowed.
    chunk_least: u32,
    shrinks: u64,
}

/// Runs the job on this process's device.
pub(super) fn measure(job: &PrefillJob) -> Result<PrefillFigures> {
    let trial = Trial {
        batch: 1,
        context_tokens: job.prompt as usize,
        steps: job.steps as usize,
        micro_batches: None,
    };
    let share = TrialShare {
        config: ModelConfig::wide(job.layers as usize)?,
        layout: Layout::Tensor,
        weights: vec![NodeWeight(1.0)],
        rank: Rank(0),
        context_tokens: trial.context_needed(),
        prefill_chunk_tokens: job.chunk as usize,
    };
    let engine = Engine::random(&share, SEED)?;
    // Streams and threads are made, pages are touched, before anything is counted.
    let warm_up = Trial {
        context_tokens: 32,
        steps: 2,
        ..trial
    };
    let (keeper, window) = WindowKeeper::new(WindowSettings::default());
    drop(keeper);
    let (engine, warm) = warm_up.run_all(engine, Group::solo(), window);
    warm?;
    memory::clear_cache()?;
    memory::forget_peak()?;
    forget_resident_peak();
    let before = DeviceMemory::read()?;
    let resident_before = status_bytes("VmRSS:").unwrap_or(0);
    if let Some(headroom) = job.headroom {
        memory::limit(before.active_bytes + headroom.bytes())?;
    }
    if let Some(limit) = job.hard_limit {
        let limited = limit_data(limit.bytes()).context("the system takes no limit")?;
        ensure!(limited, "--hard-limit needs Linux: take --headroom alone");
    }
    let (keeper, window) = WindowKeeper::new(job.window.settings());
    let watch = Watch::start(keeper, Arc::clone(&window));
    let (engine, timings) = trial.run_all(engine, Group::solo(), window);
    let watched = watch.stop();
    let timings = timings?;
    let peak_bytes = DeviceMemory::read()?.peak_bytes - before.active_bytes;
    let resident_bytes = status_bytes("VmHWM:")
        .unwrap_or(0)
        .saturating_sub(resident_before);
    drop(engine);
    if let Some(file) = &job.samples {
        write_samples(file, &watched.samples)?;
    }
    let prefill: Duration = prefill_of(&timings).map(|timing| timing.total).sum();
    let mut decode: Vec<Duration> = timings[timings.len() - trial.steps..]
        .iter()
        .map(|timing| timing.total)
        .collect();
    decode.sort_unstable();
    Ok(PrefillFigures {
        weight_bytes: before.active_bytes,
        peak_bytes,
        resident_bytes,
        prefill_tokens_per_second: f64::from(job.prompt) / prefill.as_secs_f64(),
        decode_ms: decode[decode.len() / 2].as_secs_f64() * 1e3,
        window_least: watched.window_least,
        chunk_least: (job.chunk * watched.chunk_least_permille / CHUNK_AS_CONFIGURED).max(1),
        shrinks: watched.shrinks,
    })
}

fn prefill_of(timings: &[StepTiming]) -> impl Iterator<Item = &StepTiming> {
    timings.iter().filter(|timing| timing.prefill_tokens > 0)
}

/// A thread that keeps the window, as the throttle does in a shard.
struct Watch {
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<Watched>,
}

struct Watched {
    samples: Vec<Sample>,
    window_least: u32,
    chunk_least_permille: u32,
    shrinks: u64,
}

impl Watch {
    fn start(mut keeper: WindowKeeper, window: Arc<Window>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut watched = Watched {
                samples: Vec::new(),
                window_least: window.layers(WorkKind::Prefill),
                chunk_least_permille: window.chunk_permille(),
                shrinks: 0,
            };
            while !ends.load(Ordering::Relaxed) {
                watched.samples.extend(keeper.look());
                let layers = window.layers(WorkKind::Prefill);
                watched.window_least = watched.window_least.min(layers);
                let chunk = window.chunk_permille();
                watched.chunk_least_permille = watched.chunk_least_permille.min(chunk);
                watched.shrinks = keeper.shrinks();
                thread::sleep(LOOK_EVERY);
            }
            watched
        });
        Self { over, thread }
    }

    fn stop(self) -> Watched {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("it only looks and sleeps")
    }
}

/// One sample a line, as the tests of the controller read them.
fn write_samples(file: &Path, samples: &[Sample]) -> Result<()> {
    let mut text = "at_ms,work,active,cache,limit,available,stalled\n".to_owned();
    for sample in samples {
        let work = match sample.work {
            WorkKind::Prefill => "prefill",
            WorkKind::Decode => "decode",
        };
        text += &format!(
            "{},{work},{},{},{},{},{}\n",
            sample.at.as_millis(),
            sample.active_bytes,
            sample.cache_bytes,
            sample.limit_bytes,
            sample.available_bytes.unwrap_or_default(),
            sample.stalled,
        );
    }
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Linux counts the peak from what is resident now.
fn forget_resident_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// One rank alone has no operation to wait for.
const RANK_DEADLINE: Duration = Duration::from_secs(5);
/// Of a long prompt, on a machine with other things to do.
const SLOWEST_TOKEN: Duration = Duration::from_millis(100);
/// Every run has the same weights.
const SEED: u64 = 1;
