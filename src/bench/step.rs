//! `offbook bench step`: what one decode step takes, rank by rank, with collectives and without.

use std::num::NonZeroU32;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use offbook_protocol::Layout;
use serde_json::json;

use super::collective::{RANKS_MAX, cores};
use super::ranks::{
    Collectives, Event, Failure, Job, Limits, ModelJob, Ranks, RunFailed, StepTimes, Wanted,
};
use super::wire::Wire;
use crate::cli::{BenchStep, MINIMAX, Workload};

pub(super) async fn run(options: BenchStep) -> Result<()> {
    ensure!(
        (1..=RANKS_MAX).contains(&options.ranks),
        "--ranks must be from 1 to {RANKS_MAX}"
    );
    let workload = options.what().map_err(anyhow::Error::msg)?;
    ensure!(
        options.parallel == Layout::Pipeline || options.micro_batches.is_empty(),
        "--micro-batches are of --parallel pipeline"
    );
    ensure!(
        options.parallel != Layout::Pipeline || workload == Workload::Model,
        "--parallel pipeline is for --workload model"
    );
    let mut modes = modes(&options);
    let alone = modes
        .iter()
        .any(|mode| mode.collectives != Collectives::None && mode.wire != Wire::Echo);
    if options.ranks == 1 && alone {
        bail!("one rank has no one to sum with: add --collectives none, or --transport echo");
    }
    if workload == Workload::Model && options.transport.contains(&Wire::Echo) {
        bail!(
            "--transport echo is for --workload products: ranks that hear themselves draw no token"
        );
    }
    if !options.json {
        print_head(&options, workload);
    }
    loop {
        let result = measure(&options, workload, &modes).await;
        let Some(RunFailed(failures)) = result.as_ref().err().and_then(|why| why.downcast_ref())
        else {
            return result;
        };
        print_failures(&options, &modes, failures);
        // What the device refuses it refuses over every transport; the rest can be measured.
        modes.retain(|mode| mode.collectives != Collectives::Delegated);
        let refused = failures.iter().all(|failure| failure.failed.refused);
        if !refused || modes.is_empty() {
            return result;
        }
    }
}

/// Measures all modes in one run.
async fn measure(options: &BenchStep, workload: Workload, modes: &[Mode]) -> Result<()> {
    // MLX's own groups are formed once; of ours, each part of the steps has its own, in turns.
    let turns = match workload {
        Workload::Model if !modes.iter().any(|mode| mode.wire.is_of_mlx()) => TURNS,
        Workload::Model | Workload::Products => 1,
    };
    let groups: Vec<_> = (0..turns)
        .flat_map(|_| modes)
        .map(|mode| (mode.wire, mode.collectives.fast_synch()))
        .collect();
    let job = match workload {
        Workload::Products => Job::Products {
            width: options.width,
            depth: options.depth,
            steps: options.steps,
            count_graphs: false,
        },
        Workload::Model => Job::Model(ModelJob {
            model: model(options).to_owned(),
            layers: options.layers,
            layout: options.parallel,
            batch: options.batch,
            context: options.context,
            steps: options.steps,
            chunk: options.chunk,
            micro_batches: modes.iter().map(|mode| mode.micro_batches).collect(),
        }),
    };
    let limits = Limits {
        deadline: options.deadline,
        gpus: options.gpus,
    };
    let mut ranks = Ranks::start(options.ranks, &groups, job, limits)?;
    ranks
        .run(Wanted::Done, |rank, event| {
            if let Event::Step(times) = event
                && let Some(&mode) = modes.get(times.group)
            {
                print(options, workload, rank, mode, times);
            }
        })
        .await
}

fn model(options: &BenchStep) -> &Path {
    options.model.as_deref().unwrap_or(Path::new(MINIMAX))
}

fn print_head(options: &BenchStep, workload: Workload) {
    println!(
        "{}, {} ranks, {} cores, ms",
        what(options, workload),
        options.ranks,
        cores()
    );
    println!(
        "{:<9} {:<11} {:>4} {:>9} {:>9} {:>9} {:>9} {:>10}{}  path",
        "transport",
        "collectives",
        "rank",
        "total",
        "model",
        "gpu_eval",
        "eval",
        "collective",
        match workload {
            Workload::Model => " tokens/s  prompt/s",
            Workload::Products => "",
        }
    );
}

/// What each rank had to say where a run failed: as rows, or where the rest goes on, as a remark.
fn print_failures(options: &BenchStep, modes: &[Mode], failures: &[Failure]) {
    for Failure { rank, failed } in failures {
        let mode = failed
            .group
            .and_then(|group| modes.get(group % modes.len()));
        if options.json {
            let row = json!({
                "ranks": options.ranks, "rank": rank,
                "collectives": mode.map(|mode| mode.collectives),
                "transport": mode.map(|mode| mode.wire),
                "error": failed.error,
            });
            println!("{row}");
        } else if failed.refused {
            println!("rank {rank}: {}", failed.error);
        }
    }
}

/// One way of making a step.
#[derive(Clone, Copy)]
struct Mode {
    wire: Wire,
    collectives: Collectives,
    /// One per stage of a pipeline if not given.
    micro_batches: Option<NonZeroU32>,
}

/// What is measured, in turns: steps without sums once, and every kind of sums over every transport.
/// MLX's own transports have but one way to go, whatever is asked for.
fn modes(options: &BenchStep) -> Vec<Mode> {
    let mut modes = Vec::new();
    for &collectives in &options.collectives {
        for &wire in &options.transport {
            let known = |mode: &Mode| match collectives {
                Collectives::None => mode.collectives == Collectives::None,
                _ => {
                    mode.wire == wire
                        && mode.collectives != Collectives::None
                        && (wire.is_of_mlx() || mode.collectives == collectives)
                }
            };
            // A stage alone has no tokens to begin with, or none to end with.
            let useless = options.parallel == Layout::Pipeline && collectives == Collectives::None;
            if useless || modes.iter().any(known) {
                continue;
            }
            let several = options.micro_batches.iter().copied().map(Some);
            let several: Vec<_> = match options.micro_batches.is_empty() {
                true => vec![None],
                false => several.collect(),
            };
            modes.extend(several.into_iter().map(|micro_batches| Mode {
                wire,
                collectives,
                micro_batches,
            }));
        }
    }
    modes
}

/// What a step computes, in words.
fn what(options: &BenchStep, workload: Workload) -> String {
    let BenchStep {
        depth,
        width,
        batch,
        context,
        parallel,
        ..
    } = options;
    match workload {
        Workload::Products => {
            format!("{depth} products of [1, {width}] with [{width}, {width}] per step")
        }
        Workload::Model => format!(
            "a decode step of {} of {}, {parallel} layout, batch {batch} at {context} positions",
            options
                .layers
                .map_or("all layers".to_owned(), |layers| format!("{layers} layers")),
            model(options).display(),
        ),
    }
}

fn print(options: &BenchStep, workload: Workload, rank: usize, mode: Mode, times: &StepTimes) {
    let StepTimes {
        path,
        total_ms,
        model_ms,
        gpu_eval_ms,
        eval_ms,
        collective_ms,
        tokens_per_second,
        prompt_tokens_per_second,
        ..
    } = times;
    let Mode {
        wire,
        collectives,
        micro_batches,
    } = mode;
    let wire = (collectives != Collectives::None).then_some(wire);
    if options.json {
        let row = json!({
            "workload": workload.to_string(), "layers": options.layers,
            "parallel": options.parallel, "batch": options.batch, "collectives": collectives,
            "transport": wire, "ranks": options.ranks, "rank": rank, "steps": options.steps,
            "path": path, "cores": cores(), "total_ms": total_ms, "model_ms": model_ms,
            "gpu_eval_ms": gpu_eval_ms, "eval_ms": eval_ms, "collective_ms": collective_ms,
            "micro_batches": micro_batches, "tokens_per_second": tokens_per_second,
            "prompt_tokens_per_second": prompt_tokens_per_second,
        });
        println!("{row}");
        return;
    }
    let wire = wire.map_or("-".to_owned(), |wire| wire.to_string());
    let collectives = collectives.to_string();
    let gpu_eval = gpu_eval_ms.map_or("-".to_owned(), |ms| format!("{ms:.2}"));
    let rates = match (tokens_per_second, prompt_tokens_per_second) {
        (Some(decoded), Some(read)) => format!(" {decoded:>9.1} {read:>9.1}"),
        _ => String::new(),
    };
    let micro_batches = micro_batches.map_or(String::new(), |of| format!(", {of} micro-batches"));
    println!(
        "{wire:<9} {collectives:<11} {rank:>4} {total_ms:>9.2} {model_ms:>9.2} {gpu_eval:>9} \
         {eval_ms:>9.2} {collective_ms:>10.2}{rates}  {path}{micro_batches}"
    );
}

/// How often each kind of collectives comes round.
const TURNS: usize = 3;
