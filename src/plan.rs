//! `offbook plan`: who would own what, and how many bytes, before anything is loaded.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use offbook_engine::{
    Candidate, Checkpoint, Collectives, KvFormat, ModelConfig, Partition, PartitionError,
    PlanReport, Precision, RankPlan,
};
use offbook_protocol::{FastSynch, KvBits, Layout, NodeWeight};
use serde::Serialize;

use crate::backend;
use crate::cli::{Division, Parallel, Plan};
use crate::demo_model;
use crate::local_cluster::check_weights;
use crate::planner::{self, Assumed, Ground};

pub(crate) async fn run(options: Plan) -> Result<()> {
    check_weights(&options.division.weights, options.division.nodes)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let model = match &options.division.model {
        Some(model) => model.clone(),
        None => demo_model::write_to(scratch.path())?,
    };
    backend::words(&model)?;
    let division = &options.division;
    let ground = Ground {
        transport: options.transport,
        fast_synch: FastSynch::default(),
        gpus: None,
        memory_limit: None,
    };
    let assumed = Assumed {
        sequences: options.sequences,
        prefill_chunk_tokens: options.prefill_chunk,
        cached_tokens: options.cached_tokens,
    };
    let (divided, advice) = match division.parallel {
        Some(Parallel::Auto) => {
            let advice = planner::advise(&model, division, ground, assumed).await?;
            (Divided::by(advice.best()?, division), Some(advice))
        }
        said => {
            let layout = match said {
                Some(Parallel::As(layout)) => layout,
                _ => Layout::Tensor,
            };
            let advice = match options.measure || division.hardware.is_given() {
                true => Some(planner::advise(&model, division, ground, assumed).await?),
                false => None,
            };
            (Divided::as_said(layout, division), advice)
        }
    };
    let (config, report) = solve(&model, &divided)?;
    let layouts = layouts(&config, &divided)?;
    if options.json {
        let mut json = serde_json::to_value(&report)?;
        json["layouts"] = serde_json::to_value(&layouts)?;
        json["advice"] = serde_json::to_value(&advice)?;
        println!("{json}");
    } else {
        let context = match options.division.context {
            0 => config.context_tokens as u64,
            wanted => u64::from(wanted).min(config.context_tokens as u64),
        };
        print!("{}{}", table(&report, context), choice(&layouts));
        match advice {
            Some(advice) => print!("{}", advice.table()),
            None => println!("\n--measure says how long a token takes with each"),
        }
    }
    Ok(())
}

/// How a model is divided over the nodes, once that is decided.
#[derive(Clone, Debug)]
pub(crate) struct Divided {
    pub(crate) layout: Layout,
    /// One per node.
    pub(crate) weights: Vec<NodeWeight>,
    /// Of their caches.
    pub(crate) kv_bits: KvBits,
}

impl Divided {
    /// As the user said, with equal weights where nothing else was said.
    pub(crate) fn as_said(layout: Layout, division: &Division) -> Self {
        let weights = match &division.weights[..] {
            [] => vec![NodeWeight(1.0); division.nodes as usize],
            given => given.iter().copied().map(NodeWeight).collect(),
        };
        Self {
            layout,
            weights,
            kv_bits: division.kv_bits,
        }
    }

    pub(crate) fn by(candidate: &Candidate, division: &Division) -> Self {
        Self {
            layout: candidate.layout,
            weights: candidate.weights.clone(),
            kv_bits: division.kv_bits,
        }
    }

    fn kv_format(&self) -> KvFormat {
        KvFormat {
            precision: PRECISION,
            bits: self.kv_bits,
        }
    }
}

/// What each layout costs on the network, and in memory on the fullest rank.
#[derive(Serialize)]
struct LayoutCost {
    layout: Layout,
    #[serde(flatten)]
    collectives: Collectives,
    weight_bytes_max: u64,
    kv_bytes_per_token_max: u64,
}

/// Every layout that can divide the model over these nodes.
fn layouts(config: &ModelConfig, divided: &Divided) -> Result<Vec<LayoutCost>> {
    let mut costs = Vec::new();
    for layout in [Layout::Tensor, Layout::Expert, Layout::Pipeline] {
        let partition = match Partition::solve(config, layout, &divided.weights) {
            Ok(partition) => partition,
            Err(PartitionError::MoreRanksThanLayers { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let bytes = PlanReport::estimated_weight_bytes(config, &partition, PRECISION);
        let report = PlanReport::new(config, &partition, &bytes, divided.kv_format());
        let most = |bytes: fn(&RankPlan) -> u64| report.ranks.iter().map(bytes).max();
        costs.push(LayoutCost {
            layout,
            collectives: report.collectives,
            weight_bytes_max: most(|rank| rank.weight_bytes).unwrap_or(0),
            kv_bytes_per_token_max: most(|rank| rank.kv_bytes_per_token).unwrap_or(0),
        });
    }
    Ok(costs)
}

fn choice(layouts: &[LayoutCost]) -> String {
    let mut text = format!(
        "\n{:>9}  {:>21}  {:>20}  {:>16}  {:>14}\n",
        "layout",
        "collectives per token",
        "bytes from each rank",
        "weights, fullest",
        "KV per token"
    );
    for cost in layouts {
        text += &format!(
            "{:>9}  {:>21}  {:>20}  {:>16}  {:>14}\n",
            cost.layout.to_string(),
            cost.collectives.per_token,
            bytes(cost.collectives.bytes_per_rank),
            bytes(cost.weight_bytes_max),
            bytes(cost.kv_bytes_per_token_max),
        );
    }
    text
}

/// The plan of a cluster on this machine.
pub(crate) fn report(model: &Path, divided: &Divided) -> Result<PlanReport> {
    Ok(solve(model, divided)?.1)
}

/// Bytes come from the checkpoint where there is one; a directory with nothing but `config.json`
/// can be planned too.
fn solve(model: &Path, divided: &Divided) -> Result<(ModelConfig, PlanReport)> {
    let config = ModelConfig::open(model)
        .with_context(|| format!("cannot plan the model in {}", model.display()))?;
    let partition = Partition::solve(&config, divided.layout, &divided.weights)?;
    let precision = PRECISION;
    let bytes = match Checkpoint::open(model) {
        Ok(checkpoint) => {
            let bytes = |share| checkpoint.share_bytes(&config, share, precision);
            partition.shares.iter().map(bytes).collect()
        }
        Err(error) => {
            tracing::info!(%error, "no checkpoint to ask: bytes are computed from config.json");
            PlanReport::estimated_weight_bytes(&config, &partition, precision)
        }
    };
    let report = PlanReport::new(&config, &partition, &bytes, divided.kv_format());
    Ok((config, report))
}

fn table(report: &PlanReport, context_tokens: u64) -> String {
    let mut text = format!(
        "{:>4}  {:>9}  {:>11}  {:>9}  {}{:>15}  {:>10}  {:>22}\n",
        "rank",
        "layers",
        "query heads",
        "KV heads",
        widths(report, |kind| kind.name.to_owned()),
        "vocabulary",
        "weights",
        format!("KV of {context_tokens} tokens"),
    );
    for rank in &report.ranks {
        text += &format!(
            "{:>4}  {:>9}  {:>11}  {:>9}  {}{:>15}  {:>10}  {:>22}{}\n",
            rank.rank,
            range(&rank.layers),
            range(&rank.query_heads),
            range(&rank.kv_heads),
            widths(report, |kind| range((kind.columns)(rank))),
            range(&rank.vocabulary_rows),
            bytes(rank.weight_bytes),
            bytes(rank.kv_bytes_per_token * context_tokens),
            if rank.rank == report.sampling_rank {
                "  samples"
            } else {
                ""
            },
        );
    }
    let collectives = &report.collectives;
    text += &format!(
        "\n{} layout, {} of weights, {} of KV cache per token of context\n",
        report.layout,
        bytes(report.weight_bytes),
        bytes(report.kv_bytes_per_token),
    );
    text += &format!(
        "{} collectives per decoded token ({} per layer, {} per step), {} from each rank\n",
        collectives.per_token,
        collectives.per_layer,
        collectives.per_step,
        bytes(collectives.bytes_per_rank),
    );
    text
}

/// A kind of network whose inner width is divided.
struct Width {
    name: &'static str,
    columns: fn(&RankPlan) -> &Range<usize>,
}

const WIDTHS: [Width; 2] = [
    Width {
        name: "expert width",
        columns: |rank| &rank.expert_columns,
    },
    Width {
        name: "dense width",
        columns: |rank| &rank.mlp_columns,
    },
];

/// A cell for each kind that the model has.
fn widths(report: &PlanReport, cell: impl Fn(&Width) -> String) -> String {
    let is_there = |kind: &&Width| {
        let mut ranks = report.ranks.iter();
        ranks.any(|rank| !(kind.columns)(rank).is_empty())
    };
    let kinds = WIDTHS.iter().filter(is_there);
    kinds.map(|kind| format!("{:>13}  ", cell(kind))).collect()
}

fn range(range: &Range<usize>) -> String {
    match range.len() {
        0 => "none".into(),
        1 => range.start.to_string(),
        _ => format!("{}–{}", range.start, range.end - 1),
    }
}

/// Three figures and a unit.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    let decimals = if unit == "B" || value >= 100.0 { 0 } else { 1 };
    format!("{value:.decimals$} {unit}")
}

/// What a shard computes in on a CPU; a GPU keeps the checkpoint's own, and needs less.
pub(crate) const PRECISION: Precision = Precision::Float32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_bytes_are_short() {
        assert_eq!(
            [range(&(3..3)), range(&(3..4)), range(&(3..6))],
            ["none", "3", "3–5"]
        );
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(12_300), "12.3 kB");
        assert_eq!(bytes(154_500_000_000), "154 GB");
    }

    #[test]
    fn codes_of_eight_bits_are_counted_as_what_they_take() {
        let config = ModelConfig::minimax_m2_5(2).unwrap();
        let of = |kv_bits| {
            let divided = Divided {
                layout: Layout::Tensor,
                weights: vec![NodeWeight(1.0); 2],
                kv_bits,
            };
            layouts(&config, &divided).unwrap()[0].kv_bytes_per_token_max
        };
        // Keys and values of four heads in two layers; codes have two groups' scales and biases.
        let rows = 2 * 4 * 2;
        assert_eq!(of(KvBits::AsComputed), rows * 128 * 4);
        assert_eq!(of(KvBits::Eight), rows * (128 + 2 * 2 * 4));
    }
}
