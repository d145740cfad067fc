//! Bytes that the parts of a model take, as far as its configuration tells: what balance is
//! measured in. Budgets use the checkpoint's own numbers instead.

use crate::config::{FeedForward, ModelConfig};

/// Bytes of weights. Decoding is bound by memory bandwidth, so bytes read stand for time too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// One KV head and its query heads, in all layers.
    pub(super) kv_head: f64,
    /// One column of the intermediate width, of every expert, in all layers.
    pub(super) expert_column: f64,
    /// The same, of the experts that one token chooses.
    pub(super) expert_column_per_token: f64,
    /// One column of the inner width of dense layers, in all of them.
    pub(super) mlp_column: f64,
    /// `lm_head`.
    pub(super) head: f64,
    pub(super) embedding: f64,
    /// One layer, on average.
    pub(super) layer: f64,
    kv_heads: f64,
    expert_columns: f64,
    mlp_columns: f64,
}

impl Costs {
    pub(super) fn of(config: &ModelConfig) -> Self {
        let per_value = |module: &str| match config.packing_of(module) {
            // A scale and a bias of 16 bits for every group.
            Some(packing) => (packing.bits as f64 + 32.0 / packing.group_size as f64) / 8.0,
            None => 2.0,
        };
        let (mut kv_head, mut expert_column, mut mlp_column) = (0.0, 0.0, 0.0);
        for layer in 0..config.layers {
            let in_layer = |module: &str| per_value(&format!("model.layers.{layer}.{module}"));
            let query_heads = config.query_heads_per_kv_head() as f64;
            kv_head += query_heads * (in_layer("self_attn.q_proj") + in_layer("self_attn.o_proj"));
            kv_head += in_layer("self_attn.k_proj") + in_layer("self_attn.v_proj");
            let module = config.swiglu_module(layer);
            let column = match config.feed_forward(layer) {
                FeedForward::Dense => &mut mlp_column,
                FeedForward::Experts => &mut expert_column,
            };
            for projection in ["gate_proj", "up_proj", "down_proj"] {
                *column += per_value(&format!("{module}.{projection}"));
            }
        }
        kv_head *= (config.head_dim * config.hidden_size) as f64;
        // Of one expert.
        expert_column *= config.hidden_size as f64;
        mlp_column *= config.hidden_size as f64;
        let vocabulary = (config.vocabulary_size * config.hidden_size) as f64;
        let (kv_heads, expert_columns) = (config.kv_heads as f64, config.expert_width as f64);
        let mlp_columns = config.mlp_width as f64;
        let all_experts = expert_column * config.experts as f64;
        let layers = kv_head * kv_heads + all_experts * expert_columns + mlp_column * mlp_columns;
        let embedding = vocabulary * per_value("model.embed_tokens");
        Self {
            kv_head,
            expert_column: all_experts,
            expert_column_per_token: expert_column * config.experts_per_token as f64,
            mlp_column,
            head: if config.tied_embeddings {
                embedding
            } else {
                vocabulary * per_value("lm_head")
            },
            embedding,
            layer: layers / config.layers as f64,
            kv_heads,
            expert_columns,
            mlp_columns,
        }
    }

    /// All heads.
    pub(super) fn heads(&self) -> f64 {
        self.kv_head * self.kv_heads
    }

    /// All columns of all experts.
    pub(super) fn experts(&self) -> f64 {
        self.expert_column * self.expert_columns
    }

    /// The same, of the experts that one token chooses.
    pub(super) fn experts_per_token(&self) -> f64 {
        self.expert_column_per_token * self.expert_columns
    }

    /// All columns of dense layers.
    pub(super) fn mlps(&self) -> f64 {
        self.mlp_column * self.mlp_columns
    }
}
