//! Who owns what of a model: pure, from the model's configuration and the nodes' weights.
//!
//! Every rank solves the same partition from the same input and takes its own share; `offbook
//! plan` prints it. Shares are contiguous, in rank order, and cover everything exactly once; but in
//! the expert layout every rank holds all of attention. A share may be empty: with more ranks than
//! head groups, a rank holds no heads and still its part of the experts.
//!
//! The expert layout divides the inner width of each expert, as the tensor layout does, and not the
//! experts by number: whichever experts the router picks for a token, every rank reads its part of them
//! and no rank waits for the one that happens to hold the most. The networks of dense layers are divided
//! in the same way, so that a model without experts can be laid out so as well.

mod apportion;
mod cost;
mod units;
mod slices;
mod report;

use std::ops::Range;

use offbook_protocol::{Layout, NodeWeight, Rank};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::ModelConfig;
use apportion::{apportion, fill, ranges};
use cost::Costs;

pub use report::{Collectives, PlanReport, RankPlan};
pub use slices::{
    AttentionSlices, FeedForwardSlices, LayerSlices, MatrixSlice, ShareSlices, SwigluSlices,
    VectorSlice,
};
pub use units::Units;

/// A model divided over ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Partition {
    pub layout: Layout,
    /// One per rank, in rank order; never empty.
    pub shares: Vec<RankShare>,
}

/// What one rank holds and computes. Ranges count from the start of the whole model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankShare {
    pub layers: Range<usize>,
    /// The same in each of `layers`.
    pub kv_heads: Range<usize>,
    /// Those that read `kv_heads`.
    pub query_heads: Range<usize>,
    /// Columns of the experts' intermediate width, of every expert: rows of `gate_proj` and
    /// `up_proj`, input columns of `down_proj`.
    pub expert_columns: Range<usize>,
    /// The same of the network of each dense layer.
    pub mlp_columns: Range<usize>,
    /// Rows of `lm_head`, that is, the tokens whose logits this rank computes.
    pub vocabulary_rows: Range<usize>,
    /// Holds the whole embedding. Looking up rows costs next to nothing and saves a collective, so
    /// in a tensor-parallel group every rank does.
    pub embeds: bool,
    /// Holds the norm that comes before the logits.
    pub final_norm: bool,
}

impl RankShare {
    /// The whole model on one rank.
    pub fn whole(config: &ModelConfig) -> Self {
        Self {
            layers: 0..config.layers,
            kv_heads: 0..config.kv_heads,
            query_heads: 0..config.query_heads,
            expert_columns: 0..config.expert_width,
            mlp_columns: 0..config.mlp_width,
            vocabulary_rows: 0..config.vocabulary_size,
            embeds: true,
            final_norm: true,
        }
    }
}

impl Partition {
    /// Divides a model over `weights.len()` ranks, each taking as much as its weight says, as
    /// nearly as the units of the packed tensors allow.
    pub fn solve(
        config: &ModelConfig,
        layout: Layout,
        weights: &[NodeWeight],
    ) -> Result<Self, PartitionError> {
        let weights = normalised(weights)?;
        let shares = match layout {
            Layout::Tensor => tensor(config, &weights),
            Layout::Expert => expert(config, &weights),
            Layout::Pipeline => pipeline(config, &weights)?,
        };
        Ok(Self { layout, shares })
    }

    pub fn ranks(&self) -> usize {
        self.shares.len()
    }

    /// The rank that samples, broadcasts the tokens and reports them: the first one of a
    /// group whose ranks hold parts of the same layers; the last one of a pipeline, which has the
    /// logits.
    pub fn sampling_rank(&self) -> Rank {
        match self.layout {
            Layout::Tensor | Layout::Expert => Rank(0),
            Layout::Pipeline => Rank(self.shares.len().saturating_sub(1) as u32),
        }
    }

    /// Which rows of the logits each rank computes, in rank order; some may be empty.
    pub fn vocabulary_rows(&self) -> Vec<Range<usize>> {
        let rows = |share: &RankShare| share.vocabulary_rows.clone();
        self.shares.iter().map(rows).collect()
    }
}

/// Every rank a part of every layer. Heads come first, because they are few; the rest fills each rank
/// up to its weight, so a rank with more heads gets less of it.
fn tensor(config: &ModelConfig, weights: &[f64]) -> Vec<RankShare> {
    let units = Units::of(config);
    let heads = apportion(config.kv_heads / units.kv_heads, weights);
    let rest = Rest::divide(config, weights, Some(&heads));
    let group = config.query_heads_per_kv_head();
    let kv_heads = ranges(&heads, units.kv_heads);
    (0..weights.len())
        .map(|rank| RankShare {
            query_heads: kv_heads[rank].start * group..kv_heads[rank].end * group,
            kv_heads: kv_heads[rank].clone(),
            ..rest.share(config, rank)
        })
        .collect()
}

/// Every rank all of attention, and a part of every expert and of the networks of dense layers. What all
/// ranks hold alike decides nothing.
fn expert(config: &ModelConfig, weights: &[f64]) -> Vec<RankShare> {
    let rest = Rest::divide(config, weights, None);
    (0..weights.len())
        .map(|rank| rest.share(config, rank))
        .collect()
}

/// What is divided beside the heads.
struct Rest {
    expert_columns: Vec<Range<usize>>,
    mlp_columns: Vec<Range<usize>>,
    vocabulary_rows: Vec<Range<usize>>,
}

impl Rest {
    /// `heads` is how many units of heads each rank holds, where these are divided. Experts come
    /// first, then dense layers; vocabulary rows, the finest units, level what ranks read per decoded
    /// token.
    fn divide(config: &ModelConfig, weights: &[f64], heads: Option<&[usize]>) -> Self {
        let (units, cost) = (Units::of(config), Costs::of(config));
        let held = |rank: usize| match heads {
            Some(heads) => (heads[rank] * units.kv_heads) as f64 * cost.kv_head,
            None => 0.0,
        };
        let all_heads = heads.map_or(0.0, |_| cost.heads());
        let ranks = 0..weights.len();
        let mut memory: Vec<f64> = ranks.clone().map(held).collect();
        let mut reads = memory.clone();
        let whole = all_heads + cost.experts() + cost.mlps() + cost.head;
        let count = config.expert_width / units.expert_columns;
        let experts = fill(count, weights, &memory, whole);
        for rank in ranks.clone() {
            let columns = (experts[rank] * units.expert_columns) as f64;
            memory[rank] += columns * cost.expert_column;
            reads[rank] += columns * cost.expert_column_per_token;
        }
        let count = config.mlp_width / units.mlp_columns;
        let mlps = fill(count, weights, &memory, whole);
        for rank in ranks {
            reads[rank] += (mlps[rank] * units.mlp_columns) as f64 * cost.mlp_column;
        }
        let vocabulary = fill(
            config.vocabulary_size / units.vocabulary_rows,
            weights,
            &reads,
            all_heads + cost.experts_per_token() + cost.mlps() + cost.head,
        );
        Self {
            expert_columns: ranges(&experts, units.expert_columns),
            mlp_columns: ranges(&mlps, units.mlp_columns),
            vocabulary_rows: ranges(&vocabulary, units.vocabulary_rows),
        }
    }

    /// A rank's share, with all heads.
    fn share(&self, config: &ModelConfig, rank: usize) -> RankShare {
        RankShare {
            expert_columns: self.expert_columns[rank].clone(),
            mlp_columns: self.mlp_columns[rank].clone(),
            vocabulary_rows: self.vocabulary_rows[rank].clone(),
            ..RankShare::whole(config)
        }
    }
}

/// Every rank some of the layers, whole; at least one each. The embedding counts against the first
/// rank, `lm_head` against the last.
fn pipeline(config: &ModelConfig, weights: &[f64]) -> Result<Vec<RankShare>, PartitionError> {
    let ranks = weights.len();
    if ranks > config.layers {
        return Err(PartitionError::MoreRanksThanLayers {
            ranks,
            layers: config.layers,
        });
    }
    let cost = Costs::of(config);
    let mut held = vec![1.0; ranks];
    held[0] += cost.embedding / cost.layer;
    held[ranks - 1] += cost.head / cost.layer;
    let whole = config.layers as f64 + (cost.embedding + cost.head) / cost.layer;
    let mut layers = fill(config.layers - ranks, weights, &held, whole);
    layers.iter_mut().for_each(|count| *count += 1);

    let last = ranks - 1;
    let share = |(rank, layers)| RankShare {
        layers,
        vocabulary_rows: if rank == last {
            0..config.vocabulary_size
        } else {
            0..0
        },
        embeds: rank == 0,
        final_norm: rank == last,
        ..RankShare::whole(config)
    };
    Ok(ranges(&layers, 1)
        .into_iter()
        .enumerate()
        .map(share)
        .collect())
}

/// Weights that sum to 1.
fn normalised(weights: &[NodeWeight]) -> Result<Vec<f64>, PartitionError> {
    let largest = weights.iter().map(|weight| weight.0).fold(0.0, f64::max);
    for (rank, weight) in weights.iter().enumerate() {
        if !(weight.0 > 0.0 && weight.0.is_finite()) {
            let rank = Rank(rank as u32);
            return Err(PartitionError::Weight {
                rank,
                weight: weight.0,
            });
        }
    }
    if weights.is_empty() {
        return Err(PartitionError::NoRanks);
    }
    // Divided by the largest first, so that no sum overflows.
    let scaled: Vec<f64> = weights.iter().map(|weight| weight.0 / largest).collect();
    let sum: f64 = scaled.iter().sum();
    Ok(scaled.iter().map(|weight| weight / sum).collect())
}

/// Nobody can divide the model so: a mistake of the configuration.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum PartitionError {
    #[error("a partition needs at least one rank")]
    NoRanks,
    #[error("rank {rank} has weight {weight}: weights must be finite numbers above 0")]
    Weight { rank: Rank, weight: f64 },
    #[error(
        "a pipeline of {ranks} ranks needs as many layers, and the model has {layers}: use fewer \
         ranks, or the tensor layout"
    )]
    MoreRanksThanLayers { ranks: usize, layers: usize },
}

#[cfg(test)]
mod tests;
