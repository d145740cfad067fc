//! What `weights` promises.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use mlx_rs::Dtype;
use mlx_rs::ops::concatenate;
use offbook_protocol::{Layout, NodeWeight};

use super::*;
use crate::config::QkNorm;
use crate::{Checkpoint, ModelConfig, Partition, Precision, RankShare};

const FIXTURES: [&str; 12] = [
    "dense-f32",
    "q4",
    "mixed-bits",
    "bf16-5bit",
    "odd-tied",
    "no-norms-3bit",
    "six-layers-8bit",
    "wide-groups-2bit",
    "qwen3-f32",
    "qwen3-4bit",
    "qwen3-moe-4bit",
    "qwen3-moe-f32",
];

struct Model {
    directory: PathBuf,
    config: ModelConfig,
    checkpoint: Checkpoint,
}

fn model(fixture: &str) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let directory = fixtures.join(fixture);
    Model {
        config: ModelConfig::open(&directory).unwrap(),
        checkpoint: Checkpoint::open(&directory).unwrap(),
        directory,
    }
}

impl Model {
    fn load(&self, share: &RankShare, precision: Precision) -> ShardWeights {
        ShardWeights::load(
            &self.checkpoint,
            &self.config,
            share,
            precision,
            &mut |_, _| {},
        )
        .unwrap()
    }

    fn whole(&self) -> ShardWeights {
        self.load(&RankShare::whole(&self.config), Precision::Float32)
    }

    fn shards(&self, layout: Layout, ranks: usize) -> (Partition, Vec<ShardWeights>) {
        let weights: Vec<_> = (0..ranks)
            .map(|rank| NodeWeight(1.0 + rank as f64))
            .collect();
        let partition = Partition::solve(&self.config, layout, &weights).unwrap();
        let load = |share| self.load(share, Precision::Float32);
        let shards = partition.shares.iter().map(load).collect();
        (partition, shards)
    }

    /// Everything in the directory, read by MLX itself.
    fn read_by_mlx(&self) -> HashMap<String, Array> {
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(&self.directory).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "safetensors")
            {
                tensors.extend(Array::load_safetensors(path).unwrap());
            }
        }
        tensors
    }
}

/// The arrays of a matrix: packed words and floats, or floats.
fn parts(linear: &Linear) -> Vec<&Array> {
    match linear {
        Linear::Quantized {
            weight,
            scales,
            biases,
            ..
        } => vec![weight, scales, biases],
        Linear::Dense { weight } => vec![weight],
    }
}

fn assert_equal(left: &Array, right: &Array, what: &str) {
    assert_eq!(left.shape(), right.shape(), "{what}");
    assert_eq!(left.dtype(), right.dtype(), "{what}");
    assert!(left.eq_values(right).unwrap(), "{what}");
}

/// Whether the pieces, side by side along an axis, are the whole.
fn assert_joined(pieces: &[&Linear], whole: &Linear, axis: i32) {
    let pieces: Vec<Vec<&Array>> = pieces.iter().map(|piece| parts(piece)).collect();
    for (part, whole) in parts(whole).into_iter().enumerate() {
        let pieces: Vec<&Array> = pieces.iter().map(|piece| piece[part]).collect();
        assert_equal(&concatenate(&pieces, axis).unwrap(), whole, "joined");
    }
}

#[test]
fn a_whole_share_is_what_mlx_reads() {
    for fixture in FIXTURES {
        let model = model(fixture);
        let (weights, tensors) = (model.whole(), model.read_by_mlx());
        let same = |linear: &Linear, module: &str| {
            let packed = tensors.contains_key(&format!("{module}.scales"));
            let names = ["weight", "scales", "biases"];
            let arrays = parts(linear);
            assert_eq!(arrays.len(), if packed { 3 } else { 1 }, "{module}");
            for (array, name) in arrays.into_iter().zip(names) {
                let mut tensor = tensors[&format!("{module}.{name}")].clone();
                if tensor.dtype() != Dtype::Uint32 {
                    tensor = tensor.as_dtype(Dtype::Float32).unwrap();
                }
                assert_equal(array, &tensor, &format!("{fixture} {module}.{name}"));
            }
        };
        same(weights.embedding.as_ref().unwrap(), "model.embed_tokens");
        let tied = model.config.tied_embeddings;
        let head = if tied {
            "model.embed_tokens"
        } else {
            "lm_head"
        };
        same(weights.head.as_ref().unwrap(), head);
        for (index, layer) in weights.layers.iter().enumerate() {
            let name = |module: &str| format!("model.layers.{index}.{module}");
            let attention = layer.attention.as_ref().unwrap();
            same(&attention.q, &name("self_attn.q_proj"));
            same(&attention.k, &name("self_attn.k_proj"));
            same(&attention.v, &name("self_attn.v_proj"));
            same(&attention.o, &name("self_attn.o_proj"));
            let feed_forward = if fixture.starts_with("qwen3") {
                "mlp"
            } else {
                "block_sparse_moe"
            };
            let networks = match &layer.feed_forward {
                FeedForwardWeights::Dense(_) => name(feed_forward),
                FeedForwardWeights::Experts(layer) => {
                    same(&layer.router, &name(&format!("{feed_forward}.gate")));
                    let bias = name(&format!("{feed_forward}.e_score_correction_bias"));
                    assert_eq!(layer.router_bias.is_some(), tensors.contains_key(&bias));
                    if let Some(array) = &layer.router_bias {
                        assert_equal(array, &tensors[&bias], "bias");
                    }
                    name(&format!("{feed_forward}.switch_mlp"))
                }
            };
            let columns = layer.feed_forward.columns().unwrap();
            same(&columns.gate, &format!("{networks}.gate_proj"));
            same(&columns.up, &format!("{networks}.up_proj"));
            same(&columns.down, &format!("{networks}.down_proj"));
            let norms = [("q_norm", &attention.q_norm), ("k_norm", &attention.k_norm)];
            for (norm, array) in norms {
                let tensor = tensors.get(&name(&format!("self_attn.{norm}.weight")));
                assert_eq!(array.is_some(), tensor.is_some(), "{fixture} {norm}");
                if let (Some(array), Some(tensor)) = (array, tensor) {
                    let tensor = tensor.as_dtype(Dtype::Float32).unwrap();
                    assert_equal(array, &tensor, &format!("{fixture} {norm}"));
                }
            }
        }
    }
}

#[test]
fn tensor_shards_are_the_whole_when_joined() {
    for (fixture, ranks) in FIXTURES
        .into_iter()
        .flat_map(|f| [2, 3, 5, 7].map(|n| (f, n)))
    {
        let model = model(fixture);
        let whole = model.whole();
        let (_, shards) = model.shards(Layout::Tensor, ranks);
        for (index, whole) in whole.layers.iter().enumerate() {
            let layers: Vec<&LayerWeights> = shards.iter().map(|s| &s.layers[index]).collect();
            let held: Vec<_> = layers.iter().filter_map(|l| l.attention.as_ref()).collect();
            let attention = whole.attention.as_ref().unwrap();
            let join = |part: fn(&AttentionWeights) -> &Linear, axis| {
                let pieces: Vec<&Linear> = held.iter().map(|held| part(held)).collect();
                assert_joined(&pieces, part(attention), axis);
            };
            join(|a| &a.q, 0);
            join(|a| &a.k, 0);
            join(|a| &a.v, 0);
            join(|a| &a.o, 1);
            let norms: [fn(&AttentionWeights) -> Option<Array>; 2] =
                [|a| a.q_norm.clone(), |a| a.k_norm.clone()];
            for norm in norms {
                let Some(whole) = norm(attention) else {
                    continue;
                };
                if model.config.qk_norm == QkNorm::PerHead {
                    // One head's weights, which each rank has.
                    for held in &held {
                        assert_equal(&norm(held).unwrap(), &whole, "norm");
                    }
                } else {
                    let pieces: Vec<Array> = held.iter().filter_map(|held| norm(held)).collect();
                    assert_equal(&concatenate(&pieces, 0).unwrap(), &whole, "norm");
                }
            }
            let held = layers.iter().filter_map(|l| l.feed_forward.columns());
            let held: Vec<_> = held.collect();
            let columns = whole.feed_forward.columns().unwrap();
            let join = |part: fn(&SwigluWeights) -> &Linear, axis| {
                let pieces: Vec<&Linear> = held.iter().map(|held| part(held)).collect();
                assert_joined(&pieces, part(columns), axis);
            };
            join(|c| &c.gate, -2);
            join(|c| &c.up, -2);
            join(|c| &c.down, -1);
        }
        let heads: Vec<&Linear> = shards.iter().filter_map(|s| s.head.as_ref()).collect();
        assert_joined(&heads, whole.head.as_ref().unwrap(), 0);
    }
}

#[test]
fn pipeline_shards_hold_their_layers_and_ends() {
    for fixture in FIXTURES {
        let model = model(fixture);
        let (partition, shards) = model.shards(Layout::Pipeline, 2);
        for (share, shard) in partition.shares.iter().zip(&shards) {
            assert_eq!(shard.layers.len(), share.layers.len());
            assert_eq!(shard.embedding.is_some(), share.embeds);
            assert_eq!(shard.final_norm.is_some(), share.final_norm);
            assert_eq!(shard.head.is_some(), !share.vocabulary_rows.is_empty());
        }
        let whole = model.whole();
        let last = shards[1].layers.last().unwrap();
        let expected = whole.layers.last().unwrap();
        let down = |layer: &LayerWeights| layer.feed_forward.columns().unwrap().down.clone();
        assert_joined(&[&down(last)], &down(expected), 0);
        let (head, expected) = (shards[1].head.as_ref(), whole.head.as_ref());
        assert_joined(&[head.unwrap()], expected.unwrap(), 0);
    }
}

#[test]
fn bytes_are_known_before_and_progress_ends_at_them() {
    for (fixture, precision) in FIXTURES
        .into_iter()
        .flat_map(|f| [Precision::Float32, Precision::BFloat16].map(|p| (f, p)))
    {
        let model = model(fixture);
        let weights = [NodeWeight(3.0), NodeWeight(2.0), NodeWeight(1.0)];
        let partition = Partition::solve(&model.config, Layout::Tensor, &weights).unwrap();
        for share in &partition.shares {
            let expected = model
                .checkpoint
                .share_bytes(&model.config, share, precision);
            let mut calls = Vec::new();
            let progress = &mut |done, total| calls.push((done, total));
            let (checkpoint, config) = (&model.checkpoint, &model.config);
            let weights =
                ShardWeights::load(checkpoint, config, share, precision, progress).unwrap();
            assert_eq!(weights.bytes, expected, "{fixture}");
            assert_eq!(calls.last(), Some(&(expected, expected)), "{fixture}");
            assert!(calls.is_sorted(), "{fixture}");
        }
    }
}

#[test]
fn a_shard_without_heads_or_experts_is_valid() {
    let (_, shards) = model("mixed-bits").shards(Layout::Tensor, 7);
    assert!(
        shards
            .iter()
            .any(|shard| shard.layers[0].attention.is_none())
    );
    let columns = |shard: &ShardWeights| shard.layers[0].feed_forward.columns().is_none();
    assert!(shards.iter().any(columns));
}

#[test]
fn disagreements_of_config_and_checkpoint_are_named() {
    let model = model("bf16-5bit");
    let error = |config: &ModelConfig| {
        let share = RankShare::whole(config);
        let (checkpoint, precision) = (&model.checkpoint, Precision::Float32);
        ShardWeights::load(checkpoint, config, &share, precision, &mut |_, _| {})
            .unwrap_err()
            .to_string()
    };
    let mut config = model.config.clone();
    config.quantization = None;
    let unnamed = error(&config);
    assert!(
        unnamed.contains("model.embed_tokens packed, and config.json names no"),
        "{unnamed}"
    );
    let mut config = model.config.clone();
    config.vocabulary_size += 8;
    assert!(error(&config).contains("model.embed_tokens.weight in "));
    let mut config = model.config.clone();
    config.layers += 1;
    assert!(error(&config).contains("lacks model.layers.2.input_layernorm.weight"));
    config.layers = 1;
    let surplus = error(&config);
    assert!(
        surplus.starts_with("model.layers.1.")
            && surplus.contains("more, have no place in the model"),
        "{surplus}"
    );
}

#[test]
fn nothing_of_a_whole_checkpoint_is_left_over() {
    for fixture in FIXTURES {
        let Model {
            checkpoint, config, ..
        } = model(fixture);
        checkpoint.expect_nothing_else(&config).unwrap();
    }
}

#[test]
fn a_packed_weight_without_its_scales_is_named() {
    let mut model = model("q4");
    model
        .checkpoint
        .forget("model.layers.0.self_attn.k_proj.scales");
    let whole = RankShare::whole(&model.config);
    let (config, precision) = (&model.config, Precision::Float32);
    let error = ShardWeights::load(&model.checkpoint, config, &whole, precision, &mut |_, _| {});
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("lacks model.layers.0.self_attn.k_proj.scales"),
        "{error}"
    );
}
