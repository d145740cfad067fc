//! Bytes that the parts of a model take, as far as its configuration tells: what balance is
//! measured in. Budgets use the checkpoint's own numbers instead.

use crate::config::ModelConfig;

/// Bytes of weights. Decoding is bound by memory bandwidth, so bytes read stand for time too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// One KV head and its query heads, in all layers.
    pub(super) kv_head: f64,
    /// One column of the intermediate width, of every expert, in all layers.
    pub(super) expert_column: f64,
    /// The same, of the experts that one token chooses.
    pub(super) expert_column_per_token: f64,
    /// `lm_head`.
    pub(super) head: f64,
    pub(super) embedding: f64,
    /// One layer, on average.
    pub(super) layer: f64,
    kv_heads: f64,
    expert_columns: f64,
}

impl Costs {
    pub(super) fn of(config: &ModelConfig) -> Self {
        let per_value = |module: &str| match config.packing_of(module) {
            // A scale and a bias of 16 bits for every group.
            Some(packing) => (packing.bits as f64 + 32.0 / packing.group_size as f64) / 8.0,
            None => 2.0,
        };
        let (mut kv_head, mut expert_column) = (0.0, 0.0);
        for layer in 0..config.layers {
            let in_layer = |module: &str| per_value(&format!("model.layers.{layer}.{module}"));
            let query_heads = config.query_heads_per_kv_head() as f64;
            kv_head += query_heads * (in_layer("self_attn.q_proj") + in_layer("self_attn.o_proj"));
            kv_head += in_layer("self_attn.k_proj") + in_layer("self_attn.v_proj");
            for projection in ["gate_proj", "up_proj", "down_proj"] {
                expert_column += in_layer(&format!("block_sparse_moe.switch_mlp.{projection}"));
            }
        }
        kv_head *= (config.head_dim * config.hidden_size) as f64;
        expert_column *= (config.experts * config.hidden_size) as f64;
        let vocabulary = (config.vocabulary_size * config.hidden_size) as f64;
        let (kv_heads, expert_columns) = (config.kv_heads as f64, config.expert_width as f64);
        let embedding = vocabulary * per_value("model.embed_tokens");
        Self {
            kv_head,
            expert_column,
            expert_column_per_token: expert_column * config.experts_per_token as f64
                / config.experts as f64,
            head: if config.tied_embeddings {
                embedding
            } else {
                vocabulary * per_value("lm_head")
            },
            embedding,
            layer: (kv_head * kv_heads + expert_column * expert_columns) / config.layers as f64,
            kv_heads,
            expert_columns,
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
}
