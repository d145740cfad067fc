//! `offbook bench step`: what one decode step takes, rank by rank, with collectives and without.

use anyhow::{Result, bail, ensure};
use offbook_protocol::Layout;
use serde_json::json;

use super::collective::{RANKS_MAX, cores};
use super::ranks::{Collectives, Event, Job, Limits, ModelJob, Ranks, StepTimes, Wanted};
use crate::cli::{BenchStep, Workload};

pub(super) async fn run(options: BenchStep) -> Result<()> {
    ensure!(
        (1..=RANKS_MAX).contains(&options.ranks),
        "--ranks must be from 1 to {RANKS_MAX}"
    );
    if options.ranks == 1 && options.collectives != [Collectives::None] {
        bail!("one rank has no one to sum with: add --collectives none");
    }
    if options.transport.is_of_mlx()
        && options
            .collectives
            .iter()
            .filter(|&&kind| kind != Collectives::None)
            .count()
            > 1
    {
        bail!(
            "a process can have one group of MLX's own: measure one kind of --collectives at a time"
        );
    }
    let kinds = options.collectives.len();
    // MLX's own groups are formed once; of ours, each part of the steps has its own, in turns.
    let turns = match options.workload {
        Workload::Model if !options.transport.is_of_mlx() => TURNS,
        Workload::Model | Workload::Products => 1,
    };
    let groups: Vec<_> = (0..turns)
        .flat_map(|_| &options.collectives)
        .map(|&collectives| (options.transport, collectives.fast_synch()))
        .collect();
    ensure!(
        options.parallel != Layout::Pipeline,
        "--parallel is tensor or expert here: the stages of a pipeline do not step together"
    );
    let job = match options.workload {
        Workload::Products => Job::Products {
            width: options.width,
            depth: options.depth,
            steps: options.steps,
        },
        Workload::Model => Job::Model(ModelJob {
            model: options.model.clone(),
            layers: options.layers,
            layout: options.parallel,
            batch: options.batch,
            context: options.context,
            steps: options.steps,
            kinds,
        }),
    };
    let limits = Limits {
        deadline: options.deadline,
        gpus: options.gpus,
    };
    if !options.json {
        println!(
            "{}, {} ranks over {}, {} cores, ms",
            what(&options),
            options.ranks,
            options.transport,
            cores()
        );
        println!(
            "{:<11} {:>4} {:>9} {:>9} {:>9} {:>9} {:>10}  path",
            "collectives", "rank", "total", "model", "gpu_eval", "eval", "collective"
        );
    }
    let mut ranks = Ranks::start(options.ranks, &groups, job, limits)?;
    let kinds = &options.collectives;
    ranks
        .run(Wanted::Done, |rank, event| {
            if let Event::Step(times) = event
                && let Some(&kind) = kinds.get(times.group)
            {
                print(&options, rank, kind, times);
            }
        })
        .await
}

/// What a step computes, in words.
fn what(options: &BenchStep) -> String {
    let BenchStep {
        depth,
        width,
        batch,
        context,
        parallel,
        ..
    } = options;
    match options.workload {
        Workload::Products => {
            format!("{depth} products of [1, {width}] with [{width}, {width}] per step")
        }
        Workload::Model => format!(
            "a decode step of {} of {}, {parallel} layout, batch {batch} at {context} positions",
            options
                .layers
                .map_or("all layers".to_owned(), |layers| format!("{layers} layers")),
            options.model.display(),
        ),
    }
}

fn print(options: &BenchStep, rank: usize, kind: Collectives, times: &StepTimes) {
    let StepTimes {
        path,
        total_ms,
        model_ms,
        gpu_eval_ms,
        eval_ms,
        collective_ms,
        ..
    } = times;
    if options.json {
        let row = json!({
            "workload": options.workload.to_string(), "layers": options.layers,
            "parallel": options.parallel, "batch": options.batch, "collectives": kind, "transport": options.transport,
            "ranks": options.ranks, "rank": rank, "steps": options.steps, "path": path,
            "cores": cores(), "total_ms": total_ms, "model_ms": model_ms,
            "gpu_eval_ms": gpu_eval_ms, "eval_ms": eval_ms, "collective_ms": collective_ms,
        });
        println!("{row}");
        return;
    }
    let kind = kind.to_string();
    let gpu_eval = gpu_eval_ms.map_or("-".to_owned(), |ms| format!("{ms:.2}"));
    println!(
        "{kind:<11} {rank:>4} {total_ms:>9.2} {model_ms:>9.2} {gpu_eval:>9} {eval_ms:>9.2} {collective_ms:>10.2}  {path}"
    );
}

/// How often each kind of collectives comes round.
const TURNS: usize = 3;
