//! `offbook bench step`: what one decode step takes, rank by rank, with collectives and without.

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::collective::{RANKS_MAX, cores};
use super::ranks::{Collectives, Event, Job, Limits, Ranks, StepTimes, Wanted};
use crate::cli::BenchStep;

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
    let groups: Vec<_> = options
        .collectives
        .iter()
        .map(|&collectives| (options.transport, collectives.fast_synch()))
        .collect();
    let job = Job::Products {
        width: options.width,
        depth: options.depth,
        steps: options.steps,
    };
    let limits = Limits {
        deadline: options.deadline,
        gpus: options.gpus,
    };
    if !options.json {
        let BenchStep { depth, width, .. } = options;
        println!(
            "{depth} products of [1, {width}] with [{width}, {width}] per step, {} ranks over {}, {} cores, ms",
            options.ranks,
            options.transport,
            cores()
        );
        println!(
            "{:<11} {:>4} {:>9} {:>9} {:>9} {:>10}  path",
            "collectives", "rank", "total", "model", "eval", "collective"
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
            "workload": "products", "collectives": kind, "transport": options.transport,
            "ranks": options.ranks, "rank": rank, "steps": options.steps, "path": path,
            "cores": cores(), "total_ms": total_ms, "model_ms": model_ms,
            "gpu_eval_ms": gpu_eval_ms, "eval_ms": eval_ms, "collective_ms": collective_ms,
        });
        println!("{row}");
        return;
    }
    let kind = kind.to_string();
    println!(
        "{kind:<11} {rank:>4} {total_ms:>9.2} {model_ms:>9.2} {eval_ms:>9.2} {collective_ms:>10.2}  {path}"
    );
}
