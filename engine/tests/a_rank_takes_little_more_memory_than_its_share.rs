//! Peak memory while loading is the share, the largest tensor of it once more, and a few MB.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use offbook_engine::{Checkpoint, ModelConfig, Partition, Precision, ShardWeights};
use offbook_protocol::{Layout, NodeWeight};
use serde_json::{Map, Value, json};

const LAYERS: usize = 12;
const EXPERTS: usize = 32;
const HIDDEN: usize = 512;
const WIDTH: usize = 512;
const VOCABULARY: usize = 2048;
const RANKS: usize = 4;

#[test]
fn a_rank_takes_little_more_memory_than_its_share() {
    let directory = tempfile::tempdir().unwrap();
    let model_bytes = write_model(directory.path());
    assert!(model_bytes > 200_000_000, "{model_bytes}");
    let config = ModelConfig::open(directory.path()).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let weights = [NodeWeight(1.0); RANKS];
    let partition = Partition::solve(&config, Layout::Tensor, &weights).unwrap();
    // MLX's own code and allocator come into memory with the first array.
    let first = mlx_rs::Array::from_f32(1.0);

    let before = peak_bytes();
    let (share, precision) = (&partition.shares[1], Precision::BFloat16);
    let shard = ShardWeights::load(&checkpoint, &config, share, precision, &mut |_, _| {}).unwrap();
    let taken = peak_bytes() - before;

    let largest_tensor = (EXPERTS * WIDTH * HIDDEN * 5 / 8 / RANKS) as u64;
    let allowed = shard.bytes + largest_tensor + 12_000_000;
    println!(
        "model {model_bytes} bytes, share of 1/{RANKS} {}, peak memory taken {taken}",
        shard.bytes
    );
    assert!(shard.bytes < model_bytes / 3);
    assert!(
        taken >= shard.bytes * 9 / 10,
        "the measurement is broken: {taken}"
    );
    assert!(taken < allowed, "{taken} of {allowed}");
    drop((shard, first));
}

/// The most memory that this process ever had resident.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

/// Writes a model of zeros, packed with 5 bits; its size in bytes. The file is sparse.
fn write_model(directory: &Path) -> u64 {
    let config = json!({
        "model_type": "minimax_m2", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "rotary_dim": 32,
        "rope_theta": 1e4, "rms_norm_eps": 1e-6, "intermediate_size": WIDTH,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 4, "vocab_size": VOCABULARY,
        "max_position_embeddings": 512, "quantization": {"group_size": 64, "bits": 5}
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let mut header = Header::default();
    header.packed("model.embed_tokens", &[VOCABULARY, HIDDEN]);
    header.packed("lm_head", &[VOCABULARY, HIDDEN]);
    header.tensor("model.norm.weight", "BF16", &[HIDDEN]);
    for layer in 0..LAYERS {
        let name = |module: &str| format!("model.layers.{layer}.{module}");
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            header.tensor(&name(norm), "BF16", &[HIDDEN]);
        }
        for (module, rows, columns) in [("q", 512, HIDDEN), ("k", 256, HIDDEN), ("v", 256, HIDDEN)]
        {
            header.packed(&name(&format!("self_attn.{module}_proj")), &[rows, columns]);
        }
        header.packed(&name("self_attn.o_proj"), &[HIDDEN, 512]);
        header.tensor(&name("self_attn.q_norm.weight"), "BF16", &[512]);
        header.tensor(&name("self_attn.k_norm.weight"), "BF16", &[256]);
        let moe = |module: &str| name(&format!("block_sparse_moe.{module}"));
        header.packed(&moe("gate"), &[EXPERTS, HIDDEN]);
        header.tensor(&moe("e_score_correction_bias"), "F32", &[EXPERTS]);
        header.packed(&moe("switch_mlp.gate_proj"), &[EXPERTS, WIDTH, HIDDEN]);
        header.packed(&moe("switch_mlp.up_proj"), &[EXPERTS, WIDTH, HIDDEN]);
        header.packed(&moe("switch_mlp.down_proj"), &[EXPERTS, HIDDEN, WIDTH]);
    }
    let text = Value::Object(header.fields).to_string();
    let mut file = File::create(directory.join("model.safetensors")).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len(8 + text.len() as u64 + header.bytes).unwrap();
    header.bytes
}

#[derive(Default)]
struct Header {
    fields: Map<String, Value>,
    bytes: u64,
}

impl Header {
    fn packed(&mut self, module: &str, shape: &[usize]) {
        let (columns, rows) = shape.split_last().unwrap();
        let with = |columns: usize| [rows, &[columns]].concat();
        self.tensor(&format!("{module}.weight"), "U32", &with(columns / 32 * 5));
        self.tensor(&format!("{module}.scales"), "BF16", &with(columns / 64));
        self.tensor(&format!("{module}.biases"), "BF16", &with(columns / 64));
    }

    fn tensor(&mut self, name: &str, dtype: &str, shape: &[usize]) {
        let value_bytes = if dtype == "BF16" { 2 } else { 4 };
        let end = self.bytes + shape.iter().product::<usize>() as u64 * value_bytes;
        let field = json!({"dtype": dtype, "shape": shape, "data_offsets": [self.bytes, end]});
        self.fields.insert(name.to_owned(), field);
        self.bytes = end;
    }
}
