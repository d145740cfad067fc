//! Qwen3, dense and with experts: a norm of each head of q and k, RoPE over whole heads, and either one
//! network in each layer (`qwen3`), or experts in most, chosen by softmax (`qwen3_moe`). The maths is
//! that of the model's reference implementations in transformers and mlx-lm, as are keys and defaults.

use crate::config::{ConfigError, Keys, ModelConfig, QkNorm, Router};
use crate::models::Architecture;

pub(crate) const QWEN3: Architecture = Architecture {
    model_types: &["qwen3"],
    read,
};

pub(crate) const QWEN3_MOE: Architecture = Architecture {
    model_types: &["qwen3_moe"],
    read: read_with_experts,
};

fn read(keys: &Keys<'_>) -> Result<ModelConfig, ConfigError> {
    keys.only_false("attention_bias")?;
    keys.only_false("use_sliding_window")?;
    keys.only_entries("layer_types", &["\"full_attention\""])?;
    // The default is not the same everywhere.
    keys.size("head_dim")?;
    whole_heads(keys)?;
    if let Some(rope) = keys.optional_object("rope_parameters")? {
        whole_heads(&rope)?;
    }
    Ok(ModelConfig {
        qk_norm: QkNorm::PerHead,
        ..ModelConfig::dense(keys)?
    })
}

fn read_with_experts(keys: &Keys<'_>) -> Result<ModelConfig, ConfigError> {
    Ok(ModelConfig {
        expert_width: keys.size("moe_intermediate_size")?,
        experts: keys.size("num_experts")?,
        experts_per_token: keys.size("num_experts_per_tok")?,
        router: if keys.flag("norm_topk_prob", false)? {
            Router::SoftmaxOfChosen
        } else {
            Router::Softmax
        },
        sparse_step: keys.optional_size("decoder_sparse_step")?.unwrap_or(1),
        dense_layers: keys.layers("mlp_only_layers")?,
        ..read(keys)?
    })
}

/// Relatives of Qwen3 turn a part of each head.
fn whole_heads(keys: &Keys<'_>) -> Result<(), ConfigError> {
    let key = "partial_rotary_factor";
    let factor = keys.optional_number(key)?.map(|factor| factor.to_string());
    keys.only(key, factor.as_deref(), &["1"])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::FeedForward;

    /// `config.json` of Qwen3-0.6B, as far as it matters.
    fn dense() -> Value {
        json!({
            "model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
            "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1000000,
            "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false,
            "vocab_size": 151936, "eos_token_id": 151645
        })
    }

    fn with(mut config: Value, key: &str, value: Value) -> Value {
        config[key] = value;
        config
    }

    /// The same with experts.
    fn sparse() -> Value {
        let mut config = with(dense(), "model_type", json!("qwen3_moe"));
        for (key, value) in [
            ("num_experts", json!(128)),
            ("num_experts_per_tok", json!(8)),
            ("moe_intermediate_size", json!(768)),
            ("norm_topk_prob", json!(true)),
            ("decoder_sparse_step", json!(1)),
            ("mlp_only_layers", json!([])),
        ] {
            config[key] = value;
        }
        config
    }

    fn read(config: &Value) -> ModelConfig {
        ModelConfig::parse(config, None).unwrap()
    }

    fn error(config: &Value) -> String {
        ModelConfig::parse(config, None).unwrap_err().to_string()
    }

    fn layers(config: &ModelConfig, kind: FeedForward) -> Vec<usize> {
        let of_kind = |layer: &usize| config.feed_forward(*layer) == kind;
        (0..config.layers).filter(of_kind).collect()
    }

    #[test]
    fn a_dense_model_has_one_network_in_each_layer() {
        let config = read(&dense());
        assert_eq!(config.qk_norm, QkNorm::PerHead);
        assert_eq!((config.rotary_dim, config.rope_theta), (128, 1e6));
        assert_eq!((config.mlp_width, config.experts), (3072, 0));
        assert!(config.tied_embeddings);
        assert_eq!(layers(&config, FeedForward::Dense).len(), 28);
        assert_eq!(config.swiglu_module(3), "model.layers.3.mlp");
    }

    #[test]
    fn experts_are_in_the_layers_that_the_configuration_names() {
        let config = read(&sparse());
        assert_eq!(layers(&config, FeedForward::Experts).len(), 28);
        // No layer is dense: there is no such width to divide.
        assert_eq!((config.mlp_width, config.expert_width), (0, 768));
        assert_eq!(config.router, Router::SoftmaxOfChosen);
        assert_eq!(config.swiglu_module(3), "model.layers.3.mlp.switch_mlp");

        let config = read(&with(sparse(), "mlp_only_layers", json!([0, 27])));
        assert_eq!(layers(&config, FeedForward::Dense), [0, 27]);
        assert_eq!(config.mlp_width, 3072);

        let third = with(sparse(), "decoder_sparse_step", json!(10));
        let config = read(&with(third, "mlp_only_layers", json!([9])));
        assert_eq!(layers(&config, FeedForward::Experts), [19]);

        let config = read(&with(sparse(), "norm_topk_prob", json!(false)));
        assert_eq!(config.router, Router::Softmax);

        let config = read(&with(sparse(), "decoder_sparse_step", json!(29)));
        assert_eq!((config.experts, config.expert_width), (0, 0));
    }

    #[test]
    fn rope_is_read_where_newer_tools_write_it() {
        let nested = json!({"rope_type": "default", "rope_theta": 5e6});
        let mut config = with(dense(), "rope_parameters", nested.clone());
        assert!(error(&config).contains("'rope_parameters.rope_theta' = 5000000"));
        config.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(read(&config).rope_theta, 5e6);
        config["rope_parameters"] = Value::Null;
        assert!(error(&config).contains("lacks 'rope_theta'"));
    }

    #[test]
    fn what_would_be_computed_differently_is_refused_by_name() {
        for (key, value, said) in [
            ("attention_bias", json!(true), "'attention_bias' = true"),
            ("use_sliding_window", json!(true), "'use_sliding_window'"),
            ("hidden_act", json!("gelu"), "'hidden_act' = gelu"),
            ("head_dim", Value::Null, "lacks 'head_dim'"),
            ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
            (
                "rope_scaling",
                json!({"rope_type": "yarn", "factor": 4.0}),
                "'rope_scaling.rope_type' = yarn",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "default", "partial_rotary_factor": 0.25}),
                "'rope_parameters.partial_rotary_factor' = 0.25",
            ),
            (
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
                "'layer_types' = \"sliding_attention\"",
            ),
            ("model_type", json!("qwen3_next"), "'model_type'"),
        ] {
            let error = error(&with(dense(), key, value));
            assert!(error.contains(said), "{error}");
        }
        let error = error(&with(sparse(), "mlp_only_layers", json!(["first"])));
        assert!(error.contains("'mlp_only_layers'"), "{error}");
    }
}
