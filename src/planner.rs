//! `--parallel auto`, and the times in `offbook plan`: what the nodes can do, as the user says or as
//! it is measured on this machine, and which layout that makes the best one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use offbook_actors::loadable_bytes;
use offbook_engine::{
    Candidate, Machine, ModelConfig, Network, Partition, RankShare, TRIAL_CHUNK_TOKENS, candidates,
};
use offbook_protocol::{FastSynch, Layout, NodeWeight, Transport};
use serde::Serialize;

use crate::bench::ranks::{Event, Job, Latency, Limits, ModelJob, Ranks, StepTimes, Wanted};
use crate::byte_size::ByteSize;
use crate::cli::{Division, Hardware, Parallel};
use crate::cluster_file::Limits as ClusterLimits;
use crate::plan::{Divided, PRECISION, bytes};

/// What was found out about the nodes, and every way to divide the model over them, the best first.
#[derive(Debug, Serialize)]
pub(crate) struct Advice {
    nodes: Vec<NodeFacts>,
    network: NetworkFacts,
    pub(crate) candidates: Vec<Candidate>,
}

#[derive(Debug, Serialize)]
struct NodeFacts {
    bytes_per_second: f64,
    memory_bytes: Option<u64>,
    source: Source,
}

#[derive(Debug, Serialize)]
struct NetworkFacts {
    exchange_seconds: f64,
    exchange_source: Source,
    bytes_per_second: f64,
    link_source: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    Given,
    Measured,
}

/// What measured ranks run on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ground {
    pub(crate) transport: Transport,
    pub(crate) fast_synch: FastSynch,
    pub(crate) gpus: Option<std::num::NonZeroU32>,
    /// What each node is allowed, whatever it has.
    pub(crate) memory_limit: Option<ByteSize>,
}

/// What the nodes are to be planned for, beside the context.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Assumed {
    pub(crate) sequences: u32,
    pub(crate) prefill_chunk_tokens: u32,
    /// Positions that a sequence has, at the most, when the time of its token is estimated.
    pub(crate) cached_tokens: u32,
}

impl Assumed {
    /// What a cluster with these limits is for.
    pub(crate) fn by(limits: &ClusterLimits) -> Self {
        Self {
            sequences: limits.sequences_max,
            prefill_chunk_tokens: limits.prefill_chunk_tokens,
            cached_tokens: CACHED_TOKENS,
        }
    }
}

/// How a model is to be divided: as the user said, or what is best.
///
/// # Errors
/// As [`advise`] and [`Advice::best`].
pub(crate) async fn settle(
    model: &Path,
    division: &Division,
    ground: Ground,
    assumed: Assumed,
) -> Result<Divided> {
    match division.parallel {
        None => {
            let layout = unsaid(&ModelConfig::open(model)?, division.nodes, ground);
            Ok(Divided::as_said(layout, division))
        }
        Some(Parallel::As(layout)) => Ok(Divided::as_said(layout, division)),
        Some(Parallel::Auto) => {
            let advice = advise(model, division, ground, assumed).await?;
            let best = advice.best()?;
            eprint!("{}", advice.words());
            Ok(Divided::by(best, division))
        }
    }
}

/// The layout of nodes that are all on this machine, where nobody said one. They share its cores, so that
/// dividing every layer gains nothing and costs exchanges: each takes some of the layers, and those of one
/// have the cores for themselves meanwhile. GPUs are not shared.
fn unsaid(config: &ModelConfig, nodes: u32, ground: Ground) -> Layout {
    match ground.gpus {
        None if nodes > 1 && nodes as usize <= config.layers => Layout::Pipeline,
        _ => Layout::Tensor,
    }
}

/// Measures what is not given, and compares the layouts.
///
/// # Errors
/// Numbers that do not fit the nodes; ranks that could not be measured.
pub(crate) async fn advise(
    model: &Path,
    division: &Division,
    ground: Ground,
    assumed: Assumed,
) -> Result<Advice> {
    let config = ModelConfig::open(model)
        .with_context(|| format!("cannot plan the model in {}", model.display()))?;
    let count = division.nodes as usize;
    let Hardware {
        memory,
        bandwidth,
        exchange,
        link,
    } = &division.hardware;
    let memory = for_each("--memory", memory, count)?;
    let given = for_each("--bandwidth", bandwidth, count)?;
    let (speeds, source) = match given {
        Some(given) => (
            given.iter().map(|size| size.bytes() as f64).collect(),
            Source::Given,
        ),
        None => (
            measured_speeds(model, &config, count, ground).await?,
            Source::Measured,
        ),
    };
    let here = match source {
        Source::Given => None,
        Source::Measured => measured_memory(count, ground),
    };
    let node = |(rank, bytes_per_second): (usize, f64)| {
        let given = memory.as_ref().map(|memory| memory[rank].bytes());
        let has = given.or(here);
        let allowed = ground.memory_limit.map(ByteSize::bytes);
        NodeFacts {
            bytes_per_second,
            memory_bytes: [has, allowed].into_iter().flatten().min(),
            source,
        }
    };
    let nodes: Vec<NodeFacts> = speeds.into_iter().enumerate().map(node).collect();
    let network = network(*exchange, *link, &config, count, ground).await?;
    let machine = |node: &NodeFacts| Machine {
        bytes_per_second: node.bytes_per_second,
        memory_bytes: node.memory_bytes,
    };
    let machines: Vec<Machine> = nodes.iter().map(machine).collect();
    let weights: Vec<NodeWeight> = division.weights.iter().copied().map(NodeWeight).collect();
    let candidates = candidates(
        &config,
        &machines,
        &Network {
            exchange_seconds: network.exchange_seconds,
            bytes_per_second: network.bytes_per_second,
        },
        &workload(&config, division, assumed),
        (!weights.is_empty()).then_some(&weights),
    )?;
    ensure!(
        !candidates.is_empty(),
        "no layout divides this model over {count} nodes"
    );
    Ok(Advice {
        nodes,
        network,
        candidates,
    })
}

impl Advice {
    /// The best layout that every node can hold.
    ///
    /// # Errors
    /// None can, and what the least that is missing is.
    pub(crate) fn best(&self) -> Result<&Candidate> {
        let best = &self.candidates[0];
        if let Some(misfit) = best.misfit {
            bail!(
                "no layout fits these nodes: in the best one rank {} needs {} and has {}. Give it more \
                 (--memory, --memory-limit), add nodes, or shorten --context",
                misfit.rank,
                bytes(misfit.needed_bytes),
                bytes(misfit.memory_bytes),
            );
        }
        Ok(best)
    }

    /// The table that explains the choice.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "\n{:>9}  {:>9}  {:>12}  {:>10}  {:>22}  {:>10}\n",
            "layout", "weights", "ms per token", "reading", "exchanges", "sending"
        );
        for Candidate {
            layout,
            basis,
            estimate,
            misfit,
            ..
        } in &self.candidates
        {
            let exchanges = format!(
                "{} in {:.2}",
                estimate.exchanges,
                estimate.exchange_seconds * 1e3
            );
            text += &format!(
                "{:>9}  {basis:>9}  {:>12.2}  {:>10.2}  {exchanges:>22}  {:>10.2}",
                layout.to_string(),
                estimate.seconds_per_token * 1e3,
                estimate.reading_seconds * 1e3,
                estimate.carrying_seconds * 1e3,
            );
            if let Some(misfit) = misfit {
                text += &format!(
                    "  does not fit: rank {} needs {} and has {}",
                    misfit.rank,
                    bytes(misfit.needed_bytes),
                    bytes(misfit.memory_bytes)
                );
            }
            text.push('\n');
        }
        text + "\n" + &self.facts() + &self.words()
    }

    fn facts(&self) -> String {
        let speeds: Vec<String> = (self.nodes.iter())
            .map(|node| format!("{}/s", bytes(node.bytes_per_second as u64)))
            .collect();
        let network = &self.network;
        let mut text = format!(
            "nodes read {} ({})",
            speeds.join(", "),
            self.nodes.first().map_or("", |node| node.source.name())
        );
        let memory: Option<Vec<String>> = self
            .nodes
            .iter()
            .map(|node| node.memory_bytes.map(bytes))
            .collect();
        if let Some(memory) = memory {
            text += &format!("; they may hold {}", memory.join(", "));
        }
        if self.nodes.len() > 1 {
            text += &format!(
                "; an exchange takes {:.0} µs ({}), a node sends {}/s ({})",
                network.exchange_seconds * 1e6,
                network.exchange_source.name(),
                bytes(network.bytes_per_second as u64),
                network.link_source.name(),
            );
        }
        text + "\n"
    }

    /// Why the first one is the first.
    fn words(&self) -> String {
        let best = &self.candidates[0];
        let rank = best.estimate.slowest;
        let waits = match best.layout {
            Layout::Tensor | Layout::Expert => format!("the others wait for rank {rank}"),
            Layout::Pipeline => format!("rank {rank} takes longest"),
        };
        let weights: Vec<String> = (best.weights.iter())
            .map(|weight| format!("{:.3}", weight.0 / largest(&best.weights)))
            .collect();
        let shared = if weights.len() > 1 {
            format!("; {waits}")
        } else {
            String::new()
        };
        format!(
            "best: --parallel {} --weights {}: {:.1} tokens/s for one sequence{shared}\n",
            best.layout,
            weights.join(","),
            1.0 / best.estimate.seconds_per_token,
        )
    }
}

pub(crate) fn largest(weights: &[NodeWeight]) -> f64 {
    weights.iter().map(|weight| weight.0).fold(0.0, f64::max)
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Measured => "measured here",
        }
    }
}

/// One number for every node, or one that holds for all.
fn for_each(flag: &str, given: &[ByteSize], count: usize) -> Result<Option<Vec<ByteSize>>> {
    match given {
        [] => Ok(None),
        [one] => Ok(Some(vec![*one; count])),
        _ if given.len() == count => Ok(Some(given.to_vec())),
        _ => bail!(
            "{flag} has {} numbers for {count} nodes: give one for each, or one for all",
            given.len()
        ),
    }
}

/// What each of so many nodes on this machine may hold; `None` where a GPU has memory of its own, or the system
/// does not say.
fn measured_memory(nodes: usize, ground: Ground) -> Option<u64> {
    if ground.gpus.is_some() {
        return None;
    }
    Some(loadable_bytes()? / nodes.max(1) as u64)
}

fn workload(
    config: &ModelConfig,
    division: &Division,
    assumed: Assumed,
) -> offbook_engine::Workload {
    let context_tokens = match division.context {
        0 => config.context_tokens as u64,
        wanted => u64::from(wanted).min(config.context_tokens as u64),
    };
    offbook_engine::Workload {
        kv_tokens: context_tokens,
        context_tokens,
        sequences: assumed.sequences.into(),
        prefill_chunk_tokens: assumed.prefill_chunk_tokens.into(),
        cached_tokens: assumed.cached_tokens.into(),
        precision: PRECISION,
        kv_bits: division.kv_bits,
    }
}

/// What each of so many ranks on this machine reads in a second while all of them decode: steps of a
/// layer of this shape, with random weights and without exchanges.
async fn measured_speeds(
    model: &Path,
    config: &ModelConfig,
    count: usize,
    ground: Ground,
) -> Result<Vec<f64>> {
    let job = Job::Model(ModelJob {
        model: model.to_owned(),
        layers: Some(LAYERS),
        layout: Layout::Tensor,
        batch: 1,
        context: CONTEXT_TOKENS,
        steps: STEPS,
        chunk: TRIAL_CHUNK_TOKENS as u32,
        micro_batches: vec![None],
    });
    let mut milliseconds = vec![0.0; count];
    let mut ranks = Ranks::start(
        count,
        &[(ground.transport.into(), None)],
        job,
        ground.limits(),
    )?;
    ranks
        .run(Wanted::Done, |rank, event| {
            if let Event::Step(StepTimes { total_ms, .. }) = event {
                milliseconds[rank] = *total_ms;
            }
        })
        .await
        .context("cannot measure what the ranks read: give --bandwidth")?;
    let config = config.clone().with_layers(LAYERS as usize);
    let weights = vec![NodeWeight(1.0); count];
    let partition = Partition::solve(&config, Layout::Tensor, &weights)?;
    let read = |share: &RankShare| {
        share.weight_bytes_per_token(&config, PRECISION)
            + share.kv_bytes_per_token(&config, PRECISION) * u64::from(CONTEXT_TOKENS)
    };
    let speed =
        |(share, milliseconds): (&RankShare, &f64)| read(share) as f64 / (milliseconds * 1e-3);
    Ok(partition
        .shares
        .iter()
        .zip(&milliseconds)
        .map(speed)
        .collect())
}

async fn network(
    exchange: Option<Duration>,
    link: Option<ByteSize>,
    config: &ModelConfig,
    count: usize,
    ground: Ground,
) -> Result<NetworkFacts> {
    let given = (
        exchange.map(|exchange| exchange.as_secs_f64()),
        link.map(|link| link.bytes() as f64),
    );
    let measured = match given {
        (Some(exchange), Some(link)) => (exchange, link),
        // Nobody to exchange anything with.
        _ if count == 1 => (0.0, f64::MAX),
        _ => measured_network(config, count, ground).await?,
    };
    let source = |given: Option<f64>| match given {
        Some(_) => Source::Given,
        None => Source::Measured,
    };
    Ok(NetworkFacts {
        exchange_seconds: given.0.unwrap_or(measured.0),
        exchange_source: source(given.0),
        bytes_per_second: given.1.unwrap_or(measured.1),
        link_source: source(given.1),
    })
}

/// Sums of one activation among so many ranks on this machine, and of a megabyte: seconds of the
/// first, and bytes per second by the difference.
async fn measured_network(
    config: &ModelConfig,
    count: usize,
    ground: Ground,
) -> Result<(f64, f64)> {
    let small = config.hidden_size * PRECISION.bytes() as usize;
    let large = small.max(LARGE_BYTES / 2) * 2;
    let job = Job::Latency {
        bytes: vec![small, large],
        rounds: ROUNDS,
    };
    let (mut seconds, mut carrying) = (0.0, 0.0);
    let group = (ground.transport.into(), Some(ground.fast_synch));
    let mut ranks = Ranks::start(count, &[group], job, ground.limits())?;
    ranks
        .run(Wanted::Done, |rank, event| {
            if let Event::Latency(Latency {
                bytes, chained_us, ..
            }) = event
                && rank == 0
            {
                let place = if *bytes == small {
                    &mut seconds
                } else {
                    &mut carrying
                };
                *place = chained_us * 1e-6;
            }
        })
        .await
        .context("cannot measure an exchange: give --exchange and --link")?;
    let sent = ((large - small) * (count - 1)) as f64;
    Ok((seconds, sent / (carrying - seconds).max(f64::MIN_POSITIVE)))
}

impl Ground {
    fn limits(self) -> Limits {
        Limits {
            deadline: Duration::from_secs(30),
            gpus: self.gpus,
        }
    }
}

/// A conversation of some length, where nobody says otherwise.
const CACHED_TOKENS: u32 = 4096;
/// Enough to have both halves of a layer and the head; the rest is alike.
const LAYERS: u32 = 1;
const CONTEXT_TOKENS: u32 = 128;
const STEPS: u32 = 16;
const ROUNDS: u32 = 50;
const LARGE_BYTES: usize = 1 << 20;
