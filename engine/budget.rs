//! Whether a share fits its node, asked before a byte is loaded. Pure.

use offbook_protocol::{KvBits, Rank};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::ModelConfig;
use crate::host::attends_heads_of;
use crate::partition::RankShare;
use crate::precision::{KvFormat, Precision};

/// What the shards are asked to hold beside their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Positions in the KV cache, all sequences together.
    pub kv_tokens: u64,
    /// Positions that one sequence may reach.
    pub context_tokens: u64,
    /// Sequences worked on at the same time.
    pub sequences: u64,
    /// Prompt tokens of one step.
    pub prefill_chunk_tokens: u64,
    /// Positions that a sequence has, at the most, when the time of its token is estimated. It takes no
    /// memory: the budget is for the whole context.
    pub cached_tokens: u64,
    /// Of activations, and of what the KV cache holds before it is coded.
    pub precision: Precision,
    /// Of the KV cache.
    pub kv_bits: KvBits,
}

impl Workload {
    /// How keys and values are kept.
    pub fn kv_format(&self) -> KvFormat {
        KvFormat {
            precision: self.precision,
            bits: self.kv_bits,
        }
    }
}

/// Bytes that one rank needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    /// An estimate: the largest set of intermediate results that live at the same time.
    pub activation_bytes: u64,
}

impl Budget {
    /// `weight_bytes` comes from the checkpoint: `Checkpoint::share_bytes`.
    pub fn of(
        config: &ModelConfig,
        share: &RankShare,
        weight_bytes: u64,
        workload: &Workload,
    ) -> Self {
        let kv_bytes_per_token = share.kv_bytes_per_token(config, workload.kv_format());
        Self {
            weight_bytes,
            kv_bytes: kv_bytes_per_token.saturating_mul(workload.kv_tokens),
            activation_bytes: activation_bytes(config, share, workload),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.weight_bytes
            .saturating_add(self.kv_bytes)
            .saturating_add(self.activation_bytes)
    }

    /// An error that names the rank, its node and the bytes, unless the node has the memory.
    pub fn fits(&self, place: Place<'_>, memory_bytes: u64) -> Result<(), DoesNotFit> {
        if self.bytes() <= memory_bytes {
            return Ok(());
        }
        Err(DoesNotFit {
            rank: place.rank,
            node: place.node.to_owned(),
            budget: *self,
            memory_bytes,
        })
    }
}

/// Where a rank is to run.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub rank: Rank,
    pub node: &'a str,
}

/// The node is too small for its share: give it a smaller weight, add nodes, or shorten the
/// context.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "rank {rank} does not fit node '{node}': it needs {} bytes ({} weights, {} KV cache, {} \
     activations) and has {memory_bytes}",
    budget.bytes(), budget.weight_bytes, budget.kv_bytes, budget.activation_bytes
)]
pub struct DoesNotFit {
    pub rank: Rank,
    pub node: String,
    pub budget: Budget,
    pub memory_bytes: u64,
}

/// The larger of a layer's two halves for the longest step, and the logits; twice that, because
/// the allocator keeps freed blocks.
fn activation_bytes(config: &ModelConfig, share: &RankShare, workload: &Workload) -> u64 {
    let tokens = workload.prefill_chunk_tokens.max(workload.sequences);
    let width = workload.precision.bytes();
    let [hidden, head_dim] = [config.hidden_size as u64, config.head_dim as u64];
    let [queries, keys] = [share.query_heads.len() as u64, share.kv_heads.len() as u64];
    // q, k, v and the heads' output, each before and after its transposition; and the scores where MLX attends
    // on a CPU: our own kernel and those for GPUs keep them off memory.
    let heads = 2 * (2 * queries + 2 * keys) * head_dim * width;
    let scores = match workload.precision {
        Precision::Float32 if !attends_heads_of(config.head_dim) => {
            queries * workload.context_tokens * 4
        }
        Precision::Float32 | Precision::BFloat16 | Precision::Float16 => 0,
    };
    // Our own kernel reads codes where they lie; MLX's wants one sequence's unpacked.
    let unpacked = match (workload.kv_bits, workload.precision) {
        (KvBits::Eight, Precision::BFloat16 | Precision::Float16) => {
            let values = 2 * keys * head_dim * (width + 1);
            values.saturating_mul(workload.context_tokens)
        }
        (KvBits::AsComputed, _) | (KvBits::Eight, Precision::Float32) => 0,
    };
    // gate, up and their product, and what each chosen expert returns.
    let columns = share.expert_columns.len() as u64;
    let chosen = config.experts_per_token as u64 * (3 * columns + 2 * hidden) * width;
    let dense = (3 * share.mlp_columns.len() as u64 + hidden) * width;
    let residual = 4 * hidden * width;
    let layer = tokens.saturating_mul(residual + chosen.max(dense).max(heads + scores));
    let layer = layer.saturating_add(unpacked);
    // The logits, their log-probabilities and their order, in f32.
    let logits = workload.sequences * config.vocabulary_size as u64 * 4 * 3;
    layer.saturating_add(logits).saturating_mul(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn small() -> ModelConfig {
        let config = json!({
            "model_type": "minimax_m2", "hidden_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "rotary_dim": 8,
            "rope_theta": 1e4, "rms_norm_eps": 1e-6, "intermediate_size": 32,
            "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128,
            "max_position_embeddings": 512
        });
        ModelConfig::parse(&config, None).unwrap()
    }

    fn workload(precision: Precision) -> Workload {
        Workload {
            kv_tokens: 1000,
            context_tokens: 500,
            sequences: 2,
            prefill_chunk_tokens: 64,
            cached_tokens: 500,
            precision,
            kv_bits: KvBits::AsComputed,
        }
    }

    #[test]
    fn kv_bytes_follow_layers_heads_and_precision() {
        let config = small();
        let whole = RankShare::whole(&config);
        let of = |share: &RankShare, precision| {
            Budget::of(&config, share, 0, &workload(precision)).kv_bytes
        };
        assert_eq!(of(&whole, Precision::Float32), 1000 * 3 * 2 * 3 * 16 * 4);
        assert_eq!(of(&whole, Precision::BFloat16), 1000 * 3 * 2 * 3 * 16 * 2);
        let headless = RankShare {
            kv_heads: 3..3,
            query_heads: 6..6,
            ..whole
        };
        assert_eq!(of(&headless, Precision::BFloat16), 0);
    }

    #[test]
    fn eight_bits_take_half_or_less() {
        let config = ModelConfig::minimax_m2_5(2).unwrap();
        let whole = RankShare::whole(&config);
        let of = |precision, kv_bits| {
            let workload = Workload {
                kv_bits,
                ..workload(precision)
            };
            Budget::of(&config, &whole, 0, &workload).kv_bytes
        };
        let rows = 1000 * 2 * 2 * 8;
        // 128 codes, and in two groups a scale and a bias of 32 bits.
        let eight = of(Precision::Float32, KvBits::Eight);
        assert_eq!(eight, rows * (128 + 2 * 2 * 4));
        assert!(eight * 3 < of(Precision::Float32, KvBits::AsComputed));
        let eight = of(Precision::BFloat16, KvBits::Eight);
        assert_eq!(eight, rows * (128 + 2 * 2 * 2));
        assert_eq!(of(Precision::BFloat16, KvBits::AsComputed), rows * 256);
    }

    #[test]
    fn a_wide_network_of_a_dense_layer_counts() {
        let of_width = |width: usize| {
            let config = json!({
                "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                "rope_theta": 1e4, "rms_norm_eps": 1e-6, "intermediate_size": width,
                "vocab_size": 128, "max_position_embeddings": 512
            });
            let config = ModelConfig::parse(&config, None).unwrap();
            let (share, workload) = (RankShare::whole(&config), workload(Precision::BFloat16));
            Budget::of(&config, &share, 0, &workload).activation_bytes
        };
        // gate, up and their product, in two bytes, for 64 tokens, twice.
        let more = of_width(3000) - of_width(2000);
        assert_eq!(more, 1000 * 3 * 2 * 64 * 2);
    }

    #[test]
    fn a_long_context_takes_no_scores_where_our_kernel_attends() {
        let of = |head_dim: usize, context_tokens: u64| {
            let config = ModelConfig {
                head_dim,
                ..small()
            };
            let workload = Workload {
                context_tokens,
                ..workload(Precision::Float32)
            };
            Budget::of(&config, &RankShare::whole(&config), 0, &workload).activation_bytes
        };
        assert_eq!(of(16, 500), of(16, 50_000));
        assert!(of(12, 500) < of(12, 50_000));
    }

    #[test]
    fn a_refusal_names_the_rank_the_node_and_the_bytes() {
        let config = small();
        let share = RankShare::whole(&config);
        let budget = Budget::of(&config, &share, 7_000_000, &workload(Precision::BFloat16));
        let place = Place {
            rank: Rank(2),
            node: "macbook-m4",
        };
        assert!(budget.fits(place, budget.bytes()).is_ok());
        let error = budget
            .fits(place, budget.bytes() - 1)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("rank 2 does not fit node 'macbook-m4'"),
            "{error}"
        );
        assert!(error.contains("7000000 weights"), "{error}");
    }

    #[test]
    fn absurd_workloads_do_not_overflow() {
        let config = small();
        let endless = Workload {
            kv_tokens: u64::MAX,
            ..workload(Precision::Float32)
        };
        let budget = Budget::of(&config, &RankShare::whole(&config), u64::MAX, &endless);
        assert_eq!(budget.bytes(), u64::MAX);
    }
}
