//! `offbook bench loss`: the pause that a client sees when a shard is killed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::cli::{ApiOptions, BenchLoss};
use crate::generate::{stream_completion, watch_completion};
use crate::local_cluster::LocalCluster;

pub(super) async fn run(options: BenchLoss) -> Result<()> {
    let cluster = LocalCluster::start(&options.local, &ApiOptions::own()).await?;
    let measured = tokio::select! {
        measured = measure(&cluster, options.runs) => measured,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    cluster.stop().await;
    print(&options, &measured?);
    Ok(())
}

/// The pauses, in the order of the runs.
async fn measure(cluster: &LocalCluster, runs: u32) -> Result<Vec<Duration>> {
    cluster.ready(|_| {}).await?;
    let undisturbed = stream_completion(cluster, &request()).await?;
    let mut pauses = Vec::new();
    for run in 0..runs {
        let report = cluster.ready(|_| {}).await?;
        let rank = run as usize % report.shards.len();
        let pid = Pid::from_raw(report.shards[rank].pid as i32);
        let pid = pid.context("a shard that serves has no process")?;
        let mut before = Duration::ZERO;
        let mut pause = Duration::ZERO;
        let mut killed = false;
        let request = request();
        let disturbed = watch_completion(cluster, &request, |generated| {
            if killed {
                pause = pause.max(generated.last.saturating_sub(before));
            } else if generated.tokens.len() >= KILL_AFTER_TOKENS {
                kill_process(pid, Signal::KILL).context("cannot kill a shard")?;
                killed = true;
            }
            before = generated.last;
            Ok(())
        });
        let disturbed = disturbed.await?;
        ensure!(
            disturbed.tokens == undisturbed.tokens,
            "the answer that lost rank {rank} is another one"
        );
        eprintln!("run {}: rank {rank}, {} ms", run + 1, pause.as_millis());
        pauses.push(pause);
    }
    Ok(pauses)
}

/// Sampled, so that an answer which went on with other noise would be another one.
fn request() -> Value {
    json!({
        "prompt": [5, 11, 17, 23, 29, 31, 37, 41], "max_tokens": TOKENS, "temperature": 0.8,
        "seed": 7, "ignore_eos": true, "return_token_ids": true, "stream": true,
    })
}

fn print(options: &BenchLoss, pauses: &[Duration]) {
    let mut milliseconds: Vec<f64> = pauses.iter().map(|p| p.as_secs_f64() * 1e3).collect();
    let in_order = milliseconds.clone();
    milliseconds.sort_by(f64::total_cmp);
    let (median, max) = (
        milliseconds[milliseconds.len() / 2],
        milliseconds[milliseconds.len() - 1],
    );
    if options.json {
        let line = json!({"median_ms": median, "max_ms": max, "runs_ms": in_order});
        println!("{line}");
        return;
    }
    println!(
        "{} of {} nodes killed in mid-answer, no token lost: pause {median:.0} ms median, {max:.0} ms at most",
        pauses.len(),
        options.local.division.nodes,
    );
}

const TOKENS: u32 = 600;
/// Far enough that the answer has a past, and a future.
const KILL_AFTER_TOKENS: usize = 50;
