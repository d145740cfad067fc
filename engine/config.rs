//! What a model directory says about its model, as far as the engine computes with it.
//!
//! Everything that slices, budgets or computes asks this struct. This folder reads what all
//! architectures have in common from `config.json` and `generation_config.json`, the files of the
//! architectures in `models/` the rest. A value that the engine cannot honour is an error here, never a
//! wrong answer later.

mod json;
mod quantization;
mod generation;
mod rope;

use std::path::Path;

use serde_json::Value;
use thiserror::Error;

pub use generation::{GenerationConfig, SamplingDefaults};
pub use quantization::{Packing, Quantization};

pub(crate) use json::Keys;

use crate::models::ARCHITECTURES;

/// A decoder of grouped-query attention and SwiGLU networks, in what architectures differ in.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    pub layers: usize,
    /// A multiple of `kv_heads`: query head `i` reads KV head `i / query_heads_per_kv_head`.
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Leading dimensions of a head that RoPE turns; even, at most `head_dim`.
    pub rotary_dim: usize,
    pub rope_theta: f32,
    pub rms_norm_eps: f32,
    pub qk_norm: QkNorm,
    /// Inner width of the network of a dense layer; 0 when no layer is dense.
    pub mlp_width: usize,
    /// Inner width of one expert; 0, as the next two, when no layer has experts.
    pub expert_width: usize,
    pub experts: usize,
    pub experts_per_token: usize,
    pub router: Router,
    /// Layer `i`, from 0, may have experts where this divides `i + 1`; at least 1.
    pub sparse_step: usize,
    /// Layers that have none all the same.
    pub dense_layers: Vec<usize>,
    /// What a checkpoint calls the network or the experts within a layer.
    pub feed_forward_name: &'static str,
    pub vocabulary_size: usize,
    /// The logits are products with the rows of the embedding; there is no `lm_head`.
    pub tied_embeddings: bool,
    /// Positions that the model was made for.
    pub context_tokens: usize,
    /// `None` when `config.json` names none: then no tensor may be packed.
    pub quantization: Option<Quantization>,
    /// Stop tokens of both files, and the sampling that the model's makers advise.
    pub generation: GenerationConfig,
}

/// RMS norms of q and k, between their projections and RoPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkNorm {
    None,
    /// Over the whole width of each, all heads together: ranks that hold some of the heads have to sum.
    Whole,
    /// Each head by itself, all by the same weights.
    PerHead,
}

/// How experts are chosen for a row, and what each counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Router {
    /// The score is the sigmoid of the logit. The highest scores are chosen after a correction of each
    /// expert's own is added; without it they are scaled to a sum of one.
    CorrectedSigmoid,
    /// The score is the softmax over all experts.
    Softmax,
    /// The same, scaled to a sum of one: the softmax over the chosen ones.
    SoftmaxOfChosen,
}

/// What comes after attention in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// One network for all rows.
    Dense,
    /// A few of many for each row.
    Experts,
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` when there is one.
    pub fn open(directory: &Path) -> Result<Self, ConfigError> {
        let config = json::read(&directory.join("config.json"))?;
        let generation = directory.join("generation_config.json");
        let generation = if generation.exists() {
            Some(json::read(&generation)?)
        } else {
            None
        };
        Self::parse(&config, generation.as_ref())
    }

    /// Reads the same from JSON already in memory.
    pub fn parse(config: &Value, generation: Option<&Value>) -> Result<Self, ConfigError> {
        let keys = Keys::new(config)?;
        let model_type = keys.text("model_type")?;
        let of_type = |name: &str| {
            let mut all = ARCHITECTURES.iter();
            all.find(|architecture| architecture.model_types.contains(&name))
        };
        let Some(architecture) = of_type(&model_type) else {
            let all = ARCHITECTURES.iter().flat_map(|a| a.model_types);
            return Err(ConfigError::Unsupported {
                key: "model_type".to_owned(),
                found: model_type,
                supported: all.copied().collect::<Vec<_>>().join(" or "),
            });
        };
        let mut config = (architecture.read)(&keys)?;
        config.generation = GenerationConfig::parse(&keys, generation)?;
        config.leave_out_what_no_layer_has();
        config.validate()?;
        Ok(config)
    }

    /// The keys that all architectures share, as those of a dense model that turns whole heads and has
    /// no norms of q and k.
    pub(crate) fn dense(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        keys.only_text("hidden_act", &["silu"])?;
        let hidden_size = keys.size("hidden_size")?;
        let query_heads = keys.size("num_attention_heads")?;
        let head_dim = match keys.optional_size("head_dim")? {
            Some(size) => size,
            None => (hidden_size / query_heads).max(1),
        };
        Ok(Self {
            model_type: keys.text("model_type")?,
            hidden_size,
            layers: keys.size("num_hidden_layers")?,
            query_heads,
            kv_heads: keys.size("num_key_value_heads")?,
            head_dim,
            rotary_dim: head_dim,
            rope_theta: rope::theta(keys)?,
            rms_norm_eps: keys.number("rms_norm_eps")?,
            qk_norm: QkNorm::None,
            mlp_width: keys.size("intermediate_size")?,
            expert_width: 0,
            experts: 0,
            experts_per_token: 0,
            router: Router::Softmax,
            sparse_step: 1,
            dense_layers: Vec::new(),
            feed_forward_name: "mlp",
            vocabulary_size: keys.size("vocab_size")?,
            tied_embeddings: keys.flag("tie_word_embeddings", false)?,
            context_tokens: keys.size("max_position_embeddings")?,
            quantization: Quantization::parse(keys)?,
            generation: GenerationConfig::default(),
        })
    }

    /// What comes after attention in layer `layer`, counted from 0.
    pub fn feed_forward(&self, layer: usize) -> FeedForward {
        let sparse = self.experts > 0
            && (layer + 1).is_multiple_of(self.sparse_step)
            && !self.dense_layers.contains(&layer);
        if sparse {
            FeedForward::Experts
        } else {
            FeedForward::Dense
        }
    }

    /// What a checkpoint calls the module after attention.
    pub fn feed_forward_module(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.feed_forward_name)
    }

    /// What it calls the module of `gate_proj`, `up_proj` and `down_proj`.
    pub fn swiglu_module(&self, layer: usize) -> String {
        let module = self.feed_forward_module(layer);
        match self.feed_forward(layer) {
            FeedForward::Dense => module,
            FeedForward::Experts => module + ".switch_mlp",
        }
    }

    /// Layers of one kind.
    pub fn layers_of(&self, kind: FeedForward) -> usize {
        (0..self.layers)
            .filter(|layer| self.feed_forward(*layer) == kind)
            .count()
    }

    /// Query heads that read the same KV head.
    pub fn query_heads_per_kv_head(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Width of q, all heads together.
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Width of k, and of v, all heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// How a module is packed if the checkpoint holds it packed; `None`: it may not be.
    pub fn packing_of(&self, module: &str) -> Option<Packing> {
        self.quantization.as_ref()?.packing_of(module)
    }

    /// So that nobody divides it.
    fn leave_out_what_no_layer_has(&mut self) {
        if self.layers_of(FeedForward::Dense) == 0 {
            self.mlp_width = 0;
        }
        if self.layers_of(FeedForward::Experts) == 0 {
            (self.expert_width, self.experts, self.experts_per_token) = (0, 0, 0);
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let rule = |ok: bool, key, accepts: String| {
            if ok {
                Ok(())
            } else {
                Err(ConfigError::OutOfRange { key, accepts })
            }
        };
        rule(
            self.query_heads.is_multiple_of(self.kv_heads),
            "num_attention_heads",
            format!("a multiple of num_key_value_heads ({})", self.kv_heads),
        )?;
        rule(
            self.rotary_dim <= self.head_dim && self.rotary_dim.is_multiple_of(2),
            "rotary_dim",
            format!("an even number, at most head_dim ({})", self.head_dim),
        )?;
        rule(
            self.experts_per_token <= self.experts,
            "num_experts_per_tok",
            format!("at most the number of experts ({})", self.experts),
        )?;
        for (key, size, max) in [
            ("num_hidden_layers", self.layers, LAYERS_MAX),
            ("hidden_size", self.hidden_size, WIDTH_MAX),
            ("intermediate_size", self.mlp_width, WIDTH_MAX),
            (
                "moe_intermediate_size or intermediate_size",
                self.expert_width,
                WIDTH_MAX,
            ),
            ("num_experts or num_local_experts", self.experts, COUNT_MAX),
            ("num_attention_heads", self.query_heads, COUNT_MAX),
            ("head_dim", self.head_dim, COUNT_MAX),
        ] {
            rule(size <= max, key, format!("at most {max}"))?;
        }
        rule(
            self.rope_theta > 0.0 && self.rms_norm_eps > 0.0,
            "rope_theta and rms_norm_eps",
            "numbers above 0".to_owned(),
        )
    }
}

/// The model directory cannot be used as it is: its fault, or that of who chose it.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("{path} is not what it should be: {detail}")]
    Malformed { path: String, detail: String },
    #[error("the model's configuration lacks '{key}'")]
    Missing { key: String },
    #[error("the model's configuration has '{key}' = {found}, which should be {expected}")]
    WrongType {
        key: String,
        found: String,
        expected: &'static str,
    },
    #[error("the model's configuration has '{key}' = {found}: only {supported} is supported")]
    Unsupported {
        key: String,
        found: String,
        supported: String,
    },
    #[error("the model's configuration has an impossible '{key}': it must be {accepts}")]
    OutOfRange { key: &'static str, accepts: String },
}

/// Far above every published model, and small enough that no count of bytes overflows a `u64`:
/// 2^12 layers of 2^13 experts of three matrices 2^17 · 2^17 of four bytes.
const LAYERS_MAX: usize = 1 << 12;
const WIDTH_MAX: usize = 1 << 17;
/// Of experts, of heads, of a head's dimensions.
const COUNT_MAX: usize = 1 << 13;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// `config.json` of MiniMax-M2.5 at 5 bits, as far as it matters.
    fn minimax() -> Value {
        json!({
            "model_type": "minimax_m2", "hidden_size": 3072, "num_hidden_layers": 62,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
            "rotary_dim": 64, "rope_theta": 5000000, "rms_norm_eps": 1e-6,
            "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8,
            "vocab_size": 200064, "max_position_embeddings": 196608,
            "tie_word_embeddings": false, "scoring_func": "sigmoid", "use_qk_norm": true,
            "attn_type_list": [1, 1, 1], "qk_norm_type": "per_layer", "hidden_act": "silu",
            "eos_token_id": 200020,
            "quantization": {
                "group_size": 64, "bits": 5, "mode": "affine",
                "model.layers.0.block_sparse_moe.gate": {"group_size": 64, "bits": 8},
                "model.layers.1.self_attn.q_proj": false
            }
        })
    }

    fn without(key: &str) -> Value {
        let mut config = minimax();
        config.as_object_mut().unwrap().remove(key);
        config
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = minimax();
        config[key] = value;
        config
    }

    fn error(config: &Value) -> String {
        ModelConfig::parse(config, None).unwrap_err().to_string()
    }

    #[test]
    fn the_real_model_is_understood() {
        let generation = json!({"eos_token_id": [200020, 7], "temperature": 1.0, "top_p": 0.95,
            "top_k": 40, "do_sample": true});
        let config = ModelConfig::parse(&minimax(), Some(&generation)).unwrap();
        assert_eq!(config.query_heads_per_kv_head(), 6);
        assert_eq!(config.query_width(), 6144);
        assert_eq!(config.kv_width(), 1024);
        assert_eq!(config.generation.stop_tokens, [200020, 7]);
        let sampling = config.generation.sampling;
        assert_eq!(sampling.temperature, Some(1.0));
        assert_eq!((sampling.top_p, sampling.top_k), (Some(0.95), Some(40)));
    }

    #[test]
    fn absent_keys_take_mlx_lms_defaults() {
        let mut config = without("head_dim");
        for key in [
            "use_qk_norm",
            "scoring_func",
            "tie_word_embeddings",
            "quantization",
        ] {
            config.as_object_mut().unwrap().remove(key);
        }
        let config = ModelConfig::parse(&config, None).unwrap();
        assert_eq!(config.head_dim, 64);
        assert_eq!(config.qk_norm, QkNorm::Whole);
        assert!(!config.tied_embeddings);
        assert_eq!(config.packing_of("lm_head"), None);
    }

    #[test]
    fn overrides_go_before_the_default() {
        let config = ModelConfig::parse(&minimax(), None).unwrap();
        let packing = |group_size, bits| Some(Packing { group_size, bits });
        assert_eq!(config.packing_of("lm_head"), packing(64, 5));
        assert_eq!(
            config.packing_of("model.layers.0.block_sparse_moe.gate"),
            packing(64, 8)
        );
        assert_eq!(config.packing_of("model.layers.1.self_attn.q_proj"), None);
    }

    #[test]
    fn errors_name_the_key_the_value_and_what_is_supported() {
        assert_eq!(
            error(&with("model_type", json!("llama"))),
            "the model's configuration has 'model_type' = llama: only minimax_m2 or minimax or qwen3 \
             or qwen3_moe is supported"
        );
        assert!(
            error(&with("scoring_func", json!("softmax"))).contains("'scoring_func' = softmax")
        );
        assert!(error(&with("rope_scaling", json!({"type": "yarn"}))).contains("yarn"));
        assert!(error(&with("attn_type_list", json!([1, 0]))).contains("'attn_type_list' = 0"));
        assert!(error(&with("hidden_size", json!("wide"))).contains("'hidden_size' = \"wide\""));
        assert!(error(&with("hidden_size", json!(0))).contains("'hidden_size' = 0"));
        assert!(error(&with("hidden_size", json!(1u64 << 40))).contains("hidden_size"));
        assert!(error(&without("rotary_dim")).contains("lacks 'rotary_dim'"));
        assert!(error(&with("num_key_value_heads", json!(7))).contains("num_attention_heads"));
        assert!(error(&with("rotary_dim", json!(63))).contains("rotary_dim"));
        assert!(error(&with("num_local_experts", json!(1 << 20))).contains("at most 8192"));
        assert!(error(&json!([])).contains("object"));
    }

    #[test]
    fn other_quantisations_are_refused() {
        let mxfp4 = json!({"group_size": 32, "bits": 4, "mode": "mxfp4"});
        assert!(error(&with("quantization", mxfp4)).contains("'quantization.mode' = mxfp4"));
        let odd = json!({"group_size": 48, "bits": 4});
        assert!(error(&with("quantization", odd)).contains("quantization.group_size"));
        for neither in [json!("no"), json!(4)] {
            let module = "model.layers.0.self_attn.q_proj";
            let one = json!({"group_size": 64, "bits": 4, module: neither});
            let refused = error(&with("quantization", one));
            assert!(refused.contains(module), "{refused}");
        }
        let mut fp8 = without("quantization");
        fp8["quantization_config"] =
            json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        assert!(error(&fp8).contains("mlx_lm.convert"));
    }

    #[test]
    fn null_counts_as_absent() {
        let config = with("rope_scaling", Value::Null);
        assert!(ModelConfig::parse(&config, None).is_ok());
    }
}
