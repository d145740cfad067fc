//! What `partition` promises.

use super::*;
use proptest::prelude::*;
use serde_json::json;

/// MiniMax-M2.5 at 5 bits.
fn minimax() -> ModelConfig {
    let config = json!({
        "model_type": "minimax_m2", "hidden_size": 3072, "num_hidden_layers": 62,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64,
        "rope_theta": 5000000, "rms_norm_eps": 1e-6, "intermediate_size": 1536,
        "num_local_experts": 256, "num_experts_per_tok": 8, "vocab_size": 200064,
        "max_position_embeddings": 196608,
        "quantization": {"group_size": 64, "bits": 5}
    });
    ModelConfig::parse(&config, None).unwrap()
}

/// Qwen3-30B-A3B as it was published, unpacked.
fn qwen3_30b() -> ModelConfig {
    let config = json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "rope_theta": 1000000, "rms_norm_eps": 1e-6, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": 151936, "max_position_embeddings": 40960
    });
    ModelConfig::parse(&config, None).unwrap()
}

/// Qwen3-0.6B.
fn qwen3_small() -> ModelConfig {
    let config = json!({
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rope_theta": 1000000, "rms_norm_eps": 1e-6, "intermediate_size": 3072,
        "tie_word_embeddings": true, "vocab_size": 151936, "max_position_embeddings": 40960
    });
    ModelConfig::parse(&config, None).unwrap()
}

fn solve(config: &ModelConfig, layout: Layout, weights: &[f64]) -> Partition {
    let weights: Vec<NodeWeight> = weights.iter().copied().map(NodeWeight).collect();
    Partition::solve(config, layout, &weights).unwrap()
}

fn lengths(partition: &Partition, part: impl Fn(&RankShare) -> &Range<usize>) -> Vec<usize> {
    partition
        .shares
        .iter()
        .map(|share| part(share).len())
        .collect()
}

fn bytes(config: &ModelConfig, partition: &Partition) -> Vec<u64> {
    PlanReport::estimated_weight_bytes(config, partition, crate::Precision::BFloat16)
}

#[test]
fn minimax_divides_over_three_equal_nodes() {
    let config = minimax();
    let partition = solve(&config, Layout::Tensor, &[1.0; 3]);
    assert_eq!(lengths(&partition, |share| &share.kv_heads), [3, 3, 2]);
    assert_eq!(
        lengths(&partition, |share| &share.query_heads),
        [18, 18, 12]
    );
    assert_eq!(lengths(&partition, |share| &share.expert_columns), [512; 3]);
    // The rank with fewer heads computes more of the logits.
    let rows = lengths(&partition, |share| &share.vocabulary_rows);
    assert!(rows[2] > 2 * rows[0], "{rows:?}");
    assert_eq!(partition.sampling_rank(), Rank(0));
    let bytes = bytes(&config, &partition);
    assert!(bytes.iter().max().unwrap() - bytes.iter().min().unwrap() < bytes[0] / 50);
}

#[test]
fn a_decoded_token_reads_the_same_on_each_of_three_equal_nodes() {
    let config = minimax();
    let partition = solve(&config, Layout::Tensor, &[1.0; 3]);
    let cost = Costs::of(&config);
    let reads = partition.shares.iter().map(|share| {
        share.kv_heads.len() as f64 * cost.kv_head
            + share.expert_columns.len() as f64 * cost.expert_column_per_token
            + share.vocabulary_rows.len() as f64 * cost.head / config.vocabulary_size as f64
    });
    let reads: Vec<f64> = reads.collect();
    let largest = reads.iter().copied().fold(0.0, f64::max);
    assert!(
        largest < 1.03 * reads.iter().sum::<f64>() / 3.0,
        "{reads:?}"
    );
}

#[test]
fn more_ranks_than_heads_still_share_the_experts() {
    let partition = solve(&minimax(), Layout::Tensor, &[1.0; 12]);
    let heads = lengths(&partition, |share| &share.kv_heads);
    assert_eq!(heads.iter().filter(|heads| **heads == 0).count(), 4);
    let columns = lengths(&partition, |share| &share.expert_columns);
    assert!(columns.iter().all(|columns| *columns >= 64), "{columns:?}");
}

#[test]
fn a_rank_with_more_heads_gets_less_of_the_experts() {
    // Attention as heavy as the experts: one head against eight columns of 32.
    let mut config = minimax();
    (config.kv_heads, config.query_heads) = (1, 16);
    (config.experts, config.experts_per_token) = (8, 2);
    let partition = solve(&config, Layout::Tensor, &[1.0, 1.0]);
    assert_eq!(lengths(&partition, |share| &share.kv_heads), [1, 0]);
    let columns = lengths(&partition, |share| &share.expert_columns);
    assert!(columns[0] < columns[1], "{columns:?}");
    let bytes = bytes(&config, &partition);
    let whole: u64 = bytes.iter().sum();
    assert!(
        bytes
            .iter()
            .all(|bytes| bytes.abs_diff(whole / 2) < whole / 10),
        "{bytes:?}"
    );
}

#[test]
fn in_the_expert_layout_attention_is_everywhere_and_one_collective_a_layer() {
    let config = minimax();
    let partition = solve(&config, Layout::Expert, &[2.0, 1.0, 1.0]);
    assert_eq!(lengths(&partition, |share| &share.kv_heads), [8; 3]);
    assert_eq!(
        lengths(&partition, |share| &share.expert_columns),
        [768, 384, 384]
    );
    let report = PlanReport::new(
        &config,
        &partition,
        &bytes(&config, &partition),
        crate::Precision::BFloat16,
    );
    assert_eq!(report.collectives.per_token, 62 + 2);
    assert_eq!(report.kv_bytes_per_token, 3 * 253_952);
}

#[test]
fn memory_decides_between_unequal_nodes() {
    let partition = solve(&minimax(), Layout::Tensor, &[128.0, 128.0, 64.0]);
    let columns = lengths(&partition, |share| &share.expert_columns);
    assert_eq!(columns.iter().sum::<usize>(), 1536);
    assert!(columns[2] < 330 && columns[0] > 590, "{columns:?}");
}

#[test]
fn head_groups_follow_the_packing_of_o_proj() {
    let mut config = minimax();
    (config.query_heads, config.kv_heads, config.head_dim) = (6, 6, 16);
    (config.hidden_size, config.rotary_dim) = (96, 16);
    // Groups of 64 columns are four heads of 16: six heads do not come out even.
    assert_eq!(Units::of(&config).kv_heads, 6);
    config.kv_heads = 8;
    config.query_heads = 8;
    assert_eq!(Units::of(&config).kv_heads, 4);
    config.quantization = None;
    assert_eq!(Units::of(&config).kv_heads, 1);
    assert_eq!(Units::of(&config).expert_columns, 64);
}

#[test]
fn a_pipeline_gives_each_rank_a_layer_and_its_ends_their_extras() {
    let config = minimax();
    let partition = solve(&config, Layout::Pipeline, &[1.0, 1.0, 1e-9]);
    let layers = lengths(&partition, |share| &share.layers);
    assert_eq!(layers[2], 1);
    assert_eq!(layers.iter().sum::<usize>(), 62);
    assert_eq!(partition.sampling_rank(), Rank(2));
    let embeds: Vec<bool> = partition.shares.iter().map(|share| share.embeds).collect();
    assert_eq!(embeds, [true, false, false]);
    assert_eq!(partition.vocabulary_rows(), [0..0, 0..0, 0..200_064]);
}

#[test]
fn impossible_requests_are_named() {
    let mut config = minimax();
    let solve = |config: &ModelConfig, layout, weights: &[f64]| {
        let weights: Vec<NodeWeight> = weights.iter().copied().map(NodeWeight).collect();
        Partition::solve(config, layout, &weights).unwrap_err()
    };
    assert_eq!(solve(&config, Layout::Tensor, &[]), PartitionError::NoRanks);
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = solve(&config, Layout::Tensor, &[1.0, weight]);
        assert!(matches!(
            error,
            PartitionError::Weight { rank: Rank(1), .. }
        ));
    }
    config.layers = 2;
    let error = solve(&config, Layout::Pipeline, &[1.0; 3]);
    assert_eq!(
        error,
        PartitionError::MoreRanksThanLayers {
            ranks: 3,
            layers: 2
        }
    );
}

#[test]
fn the_report_counts_what_facts_say() {
    let config = minimax();
    let partition = solve(&config, Layout::Tensor, &[1.0; 3]);
    let weight_bytes = bytes(&config, &partition);
    let report = PlanReport::new(
        &config,
        &partition,
        &weight_bytes,
        crate::Precision::BFloat16,
    );
    assert_eq!(report.kv_bytes_per_token, 253_952);
    assert_eq!(report.collectives.per_token, 3 * 62 + 2);
    // 228.7 billion parameters at 5.5 bits are 157.2 GB; embedding, norms and router thrice.
    assert!(
        (157.0e9..160.0e9).contains(&(report.weight_bytes as f64)),
        "{}",
        report.weight_bytes
    );
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<PlanReport>(&json).unwrap(), report);
}

#[test]
fn a_model_with_experts_has_the_bytes_that_were_published() {
    let config = qwen3_30b();
    let partition = solve(&config, Layout::Tensor, &[1.0]);
    let bytes = bytes(&config, &partition)[0];
    // 30.5 billion parameters of two bytes; the routers, 12.6 million, are kept in four.
    let routers = 48 * 128 * 2048 * 2;
    assert_eq!(bytes - routers, 61_064_245_248);
}

#[test]
fn norms_of_each_head_need_no_collective() {
    for (config, per_layer) in [(minimax(), 3), (qwen3_30b(), 2), (qwen3_small(), 2)] {
        let partition = solve(&config, Layout::Tensor, &[1.0; 2]);
        let (bytes, precision) = (bytes(&config, &partition), crate::Precision::BFloat16);
        let collectives = PlanReport::new(&config, &partition, &bytes, precision).collectives;
        let layers = config.layers as u64;
        assert_eq!(collectives.per_token, per_layer * layers + 2);
        let sums = (per_layer - 2) * 8 + 2 * 2 * config.hidden_size as u64;
        assert_eq!(collectives.bytes_per_rank, sums * layers + MESSAGE_BYTES);
    }
}

#[test]
fn a_token_travels_behind_three_control_words() {
    let config = minimax();
    let bytes_of = |layout| {
        let partition = solve(&config, layout, &[1.0; 3]);
        let (bytes, precision) = (bytes(&config, &partition), crate::Precision::BFloat16);
        let report = PlanReport::new(&config, &partition, &bytes, precision);
        report.collectives.bytes_per_rank
    };
    let activation = 2 * config.hidden_size as u64;
    let once_a_layer = activation * config.layers as u64;
    assert_eq!(bytes_of(Layout::Expert), once_a_layer + MESSAGE_BYTES);
    assert_eq!(bytes_of(Layout::Pipeline), activation + MESSAGE_BYTES);
}

/// Three words and a token, of four bytes each.
const MESSAGE_BYTES: u64 = 16;

#[test]
fn a_dense_model_is_divided_by_the_width_of_its_networks() {
    let config = qwen3_small();
    let partition = solve(&config, Layout::Tensor, &[1.0; 3]);
    assert_eq!(lengths(&partition, |share| &share.kv_heads), [3, 3, 2]);
    // The rank with fewer heads has more of the networks.
    let columns = lengths(&partition, |share| &share.mlp_columns);
    assert_eq!(columns, [960, 960, 1152]);
    assert_eq!(lengths(&partition, |share| &share.expert_columns), [0; 3]);
    // In the layout that is named after experts too.
    let partition = solve(&config, Layout::Expert, &[2.0, 1.0]);
    let columns = lengths(&partition, |share| &share.mlp_columns);
    assert_eq!(columns, [2048, 1024]);
    assert_eq!(lengths(&partition, |share| &share.kv_heads), [8; 2]);
}

fn any_config() -> impl Strategy<Value = ModelConfig> {
    prop_oneof![any_minimax(), any_qwen3()]
}

/// Dense, with experts, or both.
fn any_qwen3() -> impl Strategy<Value = ModelConfig> {
    let heads = (1usize..13, 1usize..7, 1usize..5);
    let networks = (1usize..400, 1usize..400, 1usize..4, 0usize..4);
    let packing = prop_oneof![Just(None), Just(Some(32)), Just(Some(64)), Just(Some(128))];
    (heads, networks, packing, 1usize..20).prop_map(|(heads, networks, group, layers)| {
        let (kv_heads, queries, head_dim) = heads;
        let (width, expert_width, sparse_step, dense_layer) = networks;
        let mut config = json!({
            "model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": layers,
            "num_attention_heads": kv_heads * queries, "num_key_value_heads": kv_heads,
            "head_dim": head_dim * 8, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
            "intermediate_size": width, "moe_intermediate_size": expert_width,
            "num_experts": 7, "num_experts_per_tok": 2, "decoder_sparse_step": sparse_step,
            "mlp_only_layers": [dense_layer], "vocab_size": 300, "max_position_embeddings": 100
        });
        if let Some(group) = group {
            config["quantization"] = json!({"group_size": group, "bits": 4,
                "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 6}});
        }
        ModelConfig::parse(&config, None).unwrap()
    })
}

fn any_minimax() -> impl Strategy<Value = ModelConfig> {
    let heads = (1usize..13, 1usize..7, 1usize..5);
    let experts = (1usize..40, 1usize..400, 1usize..5000);
    let packing = prop_oneof![Just(None), Just(Some(32)), Just(Some(64)), Just(Some(128))];
    (heads, experts, packing, 1usize..20).prop_map(|(heads, experts, group, layers)| {
        let (kv_heads, queries, head_dim) = heads;
        let (count, width, vocabulary) = experts;
        let mut config = json!({
            "model_type": "minimax_m2", "hidden_size": 128, "num_hidden_layers": layers,
            "num_attention_heads": kv_heads * queries, "num_key_value_heads": kv_heads,
            "head_dim": head_dim * 8, "rotary_dim": 8, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
            "intermediate_size": width, "num_local_experts": count, "num_experts_per_tok": 1,
            "vocab_size": vocabulary, "max_position_embeddings": 100
        });
        if let Some(group) = group {
            config["quantization"] = json!({"group_size": group, "bits": 4,
                "model.layers.0.block_sparse_moe.switch_mlp.down_proj":
                    {"group_size": 64, "bits": 6}});
        }
        ModelConfig::parse(&config, None).unwrap()
    })
}

fn any_weights() -> impl Strategy<Value = Vec<f64>> {
    let weight = prop_oneof![0.01f64..100.0, Just(1.0), Just(1e-300), Just(f64::MAX)];
    prop::collection::vec(weight, 1..=12)
}

/// Whether the ranges are neighbours, in order, and cover `0..whole` in multiples of `unit`.
fn tiles(ranges: impl Iterator<Item = Range<usize>>, whole: usize, unit: usize) -> bool {
    let mut end = 0;
    for range in ranges {
        if range.start != end || range.end < range.start || range.len() % unit != 0 {
            return false;
        }
        end = range.end;
    }
    end == whole
}

proptest! {
    #[test]
    fn tensor_shares_cover_everything_once(config in any_config(), weights in any_weights()) {
        let partition = solve(&config, Layout::Tensor, &weights);
        let units = Units::of(&config);
        let part = |part: fn(&RankShare) -> &Range<usize>| {
            partition.shares.iter().map(part).cloned()
        };
        prop_assert_eq!(partition.ranks(), weights.len());
        prop_assert!(tiles(part(|share| &share.kv_heads), config.kv_heads, units.kv_heads));
        prop_assert!(tiles(part(|share| &share.query_heads), config.query_heads, 1));
        let width = config.expert_width;
        prop_assert!(tiles(part(|share| &share.expert_columns), width, units.expert_columns));
        let width = config.mlp_width;
        prop_assert!(tiles(part(|share| &share.mlp_columns), width, units.mlp_columns));
        let rows = config.vocabulary_size;
        prop_assert!(tiles(part(|share| &share.vocabulary_rows), rows, units.vocabulary_rows));
        for share in &partition.shares {
            prop_assert_eq!(&share.layers, &(0..config.layers));
            prop_assert!(share.embeds && share.final_norm);
            let group = config.query_heads_per_kv_head();
            prop_assert_eq!(share.query_heads.start, share.kv_heads.start * group);
        }
    }

    #[test]
    fn expert_shares_cover_experts_once_and_attention_everywhere(
        config in any_config(), weights in any_weights()
    ) {
        let partition = solve(&config, Layout::Expert, &weights);
        let units = Units::of(&config);
        let part = |part: fn(&RankShare) -> &Range<usize>| {
            partition.shares.iter().map(part).cloned()
        };
        let width = config.expert_width;
        prop_assert!(tiles(part(|share| &share.expert_columns), width, units.expert_columns));
        let width = config.mlp_width;
        prop_assert!(tiles(part(|share| &share.mlp_columns), width, units.mlp_columns));
        let rows = config.vocabulary_size;
        prop_assert!(tiles(part(|share| &share.vocabulary_rows), rows, units.vocabulary_rows));
        for share in &partition.shares {
            prop_assert_eq!(&share.kv_heads, &(0..config.kv_heads));
            prop_assert_eq!(&share.layers, &(0..config.layers));
        }
    }

    #[test]
    fn packed_columns_are_whole_groups(config in any_config(), weights in any_weights()) {
        let mut config = config;
        // A packed tensor has whole groups.
        config.expert_width *= 128;
        config.mlp_width *= 128;
        config.head_dim *= 16;
        for share in solve(&config, Layout::Tensor, &weights).shares {
            for layer in ShareSlices::of(&config, &share).layers {
                let matrices = [
                    layer.attention.as_ref().map(|attention| &attention.o),
                    layer.feed_forward.columns().map(|columns| &columns.down),
                ];
                for matrix in matrices.into_iter().flatten() {
                    if let Some(packing) = config.packing_of(&matrix.module) {
                        prop_assert_eq!(matrix.columns.start % packing.group_size, 0);
                        prop_assert_eq!(matrix.columns.len() % packing.group_size, 0);
                    }
                }
            }
        }
    }

    #[test]
    fn pipeline_shares_cover_everything_once(config in any_config(), weights in any_weights()) {
        prop_assume!(weights.len() <= config.layers);
        let partition = solve(&config, Layout::Pipeline, &weights);
        let layers = partition.shares.iter().map(|share| share.layers.clone());
        prop_assert!(tiles(layers, config.layers, 1));
        prop_assert!(partition.shares.iter().all(|share| !share.layers.is_empty()));
        let last = weights.len() - 1;
        for (rank, share) in partition.shares.iter().enumerate() {
            prop_assert_eq!(share.embeds, rank == 0);
            prop_assert_eq!(share.final_norm, rank == last);
            prop_assert_eq!(&share.kv_heads, &(0..config.kv_heads));
        }
    }

    #[test]
    fn equal_ranks_differ_by_one_unit_of_heads(config in any_config(), ranks in 1usize..=12) {
        let partition = solve(&config, Layout::Tensor, &vec![1.0; ranks]);
        let heads = lengths(&partition, |share| &share.kv_heads);
        let spread = heads.iter().max().unwrap() - heads.iter().min().unwrap();
        prop_assert!(spread <= Units::of(&config).kv_heads);
    }
}
