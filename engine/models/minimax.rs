//! MiniMax-M2: norms of q and k over all heads together, RoPE over a part of each head, and experts in
//! every layer, chosen by corrected sigmoids. The maths is that of the model's reference implementations
//! (`minimax_m2` in transformers, `minimax` in mlx-lm); keys and defaults are mlx-lm's.

use crate::config::{ConfigError, Keys, ModelConfig, QkNorm, Router};
use crate::models::Architecture;

pub(crate) const MINIMAX: Architecture = Architecture {
    model_types: &["minimax_m2", "minimax"],
    read,
};

fn read(keys: &Keys<'_>) -> Result<ModelConfig, ConfigError> {
    keys.only_text("scoring_func", &["sigmoid"])?;
    keys.only_text("qk_norm_type", &["per_layer"])?;
    // MiniMax-Text-01 shares the name `minimax` and mixes in linear attention.
    keys.only_entries("attn_type_list", &["1"])?;
    keys.only_entries("layer_types", &["\"full_attention\""])?;
    Ok(ModelConfig {
        rotary_dim: keys.size("rotary_dim")?,
        qk_norm: if keys.flag("use_qk_norm", true)? {
            QkNorm::Whole
        } else {
            QkNorm::None
        },
        expert_width: keys.size("intermediate_size")?,
        experts: keys.size("num_local_experts")?,
        experts_per_token: keys.size("num_experts_per_tok")?,
        router: Router::CorrectedSigmoid,
        feed_forward_name: "block_sparse_moe",
        ..ModelConfig::dense(keys)?
    })
}
