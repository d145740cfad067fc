//! `offbook bench decode`: tokens per second of whole clusters on this machine.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use offbook_protocol::{KvBits, Layout, Transport};
use serde_json::{Value, json};

use crate::cli::{ApiOptions, BenchDecode, Division, Hardware, LocalOptions, Parallel};
use crate::demo_model;
use crate::generate::stream_completion;
use crate::local_cluster::LocalCluster;

/// One thing that is measured, and what was measured of it.
struct Subject {
    name: String,
    what: What,
    tokens_per_second: Vec<f64>,
}

enum What {
    Nodes(u32, Layout),
    MlxLm,
}

/// Decode speed at batch 1. Every kind runs once per round, so that a machine whose speed drifts
/// is unfair to none.
pub(super) async fn run(options: BenchDecode) -> Result<()> {
    ensure!(
        options.tokens >= 2,
        "--tokens must be at least 2: speed is between tokens"
    );
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => demo_model::write_to(scratch.path())?,
    };
    let mut subjects = clusters(&options);
    if options.python.is_some() {
        subjects.push(Subject {
            name: "mlx_lm, 1 process".into(),
            what: What::MlxLm,
            tokens_per_second: Vec::new(),
        });
    }
    for round in 1..=options.runs {
        for subject in &mut subjects {
            let speed = match subject.what {
                What::Nodes(nodes, layout) => one_cluster(&options, &model, nodes, layout).await?,
                What::MlxLm => mlx_lm(&options, &model).await?,
            };
            eprintln!("round {round}: {} {speed:.1} tokens/s", subject.name);
            subject.tokens_per_second.push(speed);
        }
    }
    print(&options, &subjects);
    Ok(())
}

/// Of one node there is one kind, whatever the layout.
fn clusters(options: &BenchDecode) -> Vec<Subject> {
    let named = |nodes, layout, name| Subject {
        name,
        what: What::Nodes(nodes, layout),
        tokens_per_second: Vec::new(),
    };
    let mut subjects = Vec::new();
    for &nodes in &options.nodes {
        if nodes == 1 {
            subjects.push(named(1, Layout::Tensor, "offbook, 1 node".into()));
            continue;
        }
        for &layout in &options.parallel {
            let name = format!("offbook, {nodes} nodes, {layout}");
            subjects.push(named(nodes, layout, name));
        }
    }
    subjects
}

async fn one_cluster(
    options: &BenchDecode,
    model: &Path,
    nodes: u32,
    layout: Layout,
) -> Result<f64> {
    let local = LocalOptions {
        division: Division {
            nodes,
            model: Some(model.to_owned()),
            parallel: Some(Parallel::As(layout)),
            weights: Vec::new(),
            context: 0,
            kv_bits: KvBits::AsComputed,
            hardware: Hardware::default(),
        },
        transport: options.transport,
        fast_synch: None,
        gpus: None,
        data_dir: None,
        memory_limit: None,
        sequences: Some(1),
        request_timeout: None,
        drain: Some(Duration::from_secs(1)),
        restarts: None,
        restart_pause_max: None,
        set: Vec::new(),
    };
    let cluster = LocalCluster::start(&local, &ApiOptions::own()).await?;
    let measured = async {
        cluster.ready(|_| {}).await?;
        // The first request also pays for what is made once: caches, buffers, pages.
        stream_completion(&cluster, &request(PROMPT, 16)).await?;
        let generated = stream_completion(&cluster, &request(PROMPT, options.tokens)).await?;
        ensure!(
            generated.tokens.len() == options.tokens as usize,
            "the answer is too short"
        );
        let seconds = (generated.last - generated.first).as_secs_f64();
        Ok((generated.tokens.len() - 1) as f64 / seconds)
    };
    let measured = measured.await;
    cluster.stop().await;
    measured
}

fn request(prompt: &[u32], tokens: u32) -> Value {
    json!({
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "stream": true,
    })
}

/// The independent implementation's own generation loop, on the same model and prompt.
async fn mlx_lm(options: &BenchDecode, model: &Path) -> Result<f64> {
    let Some(python) = &options.python else {
        bail!("no Python was given")
    };
    let started = Instant::now();
    let output = tokio::process::Command::new(python)
        .arg("-c")
        .arg(MLX_LM)
        .arg(model)
        .arg(options.tokens.to_string())
        .arg(serde_json::to_string(PROMPT)?)
        .output()
        .await
        .with_context(|| format!("cannot run {}", python.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "mlx_lm failed: {}",
        said.lines().last().unwrap_or_default()
    );
    tracing::debug!(elapsed = ?started.elapsed(), "mlx_lm ran");
    let speed = String::from_utf8_lossy(&output.stdout);
    speed.trim().parse().context("mlx_lm printed no speed")
}

fn print(options: &BenchDecode, subjects: &[Subject]) {
    let median = |subject: &Subject| {
        let mut speeds = subject.tokens_per_second.clone();
        speeds.sort_by(f64::total_cmp);
        speeds[speeds.len() / 2]
    };
    if options.json {
        let row = |subject: &Subject| {
            json!({
                "subject": subject.name,
                "tokens_per_second": median(subject),
                "runs": subject.tokens_per_second,
            })
        };
        println!("{}", json!(subjects.iter().map(row).collect::<Vec<_>>()));
        return;
    }
    let transport: Transport = options.transport;
    println!(
        "decode, batch 1, {} tokens, over {transport}, median of {}",
        options.tokens, options.runs
    );
    for subject in subjects {
        println!("{:>26}  {:8.1} tokens/s", subject.name, median(subject));
    }
}

/// Any tokens do: the speed of a step does not depend on what they mean.
const PROMPT: &[u32] = &[
    5, 11, 17, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73,
];

/// Prints tokens per second between the first and the last token, as we count them.
const MLX_LM: &str = r"
import json, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
from mlx_lm.generate import generate_step

model, _ = load_model(Path(sys.argv[1]))
count, prompt = int(sys.argv[2]), mx.array(json.loads(sys.argv[3]))
for _ in generate_step(prompt, model, max_tokens=16):
    pass
times = []
for _ in generate_step(prompt, model, max_tokens=count):
    times.append(time.perf_counter())
print((len(times) - 1) / (times[-1] - times[0]))
";
