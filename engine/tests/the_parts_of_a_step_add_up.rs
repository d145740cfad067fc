//! What the step log says of a step: its parts are all of it, and none is made up.

use std::path::Path;
use std::time::Duration;

use offbook_collectives::Group;
use offbook_engine::{Engine, ModelConfig, Trial, TrialShare};
use offbook_protocol::{Layout, NodeWeight, Rank};

#[test]
fn of_every_share_of_a_model_with_random_weights() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let config = ModelConfig::open(&fixtures.join("bf16-5bit")).unwrap();
    let trial = Trial {
        batch: 3,
        context_tokens: 20,
        steps: 25,
        micro_batches: None,
    };
    for layout in [Layout::Tensor, Layout::Expert] {
        for rank in [0, 1] {
            let share = TrialShare {
                config: config.clone(),
                layout,
                weights: vec![NodeWeight(1.0); 2],
                rank: Rank(rank),
                context_tokens: trial.context_needed(),
                prefill_chunk_tokens: 512,
            };
            let engine = Engine::random(&share, 1).unwrap();
            let (engine, timings) = trial.run(engine, Group::solo());
            let timings = timings.unwrap();
            assert_eq!(timings.len(), trial.steps);
            for timing in timings {
                let parts = timing.model + timing.gpu_eval + timing.eval;
                assert_eq!(parts, timing.total, "{timing}");
                assert!(timing.total > Duration::ZERO && timing.model > Duration::ZERO);
                assert!(timing.collective <= timing.total, "{timing}");
                assert_eq!((timing.batch, timing.prefill_tokens), (3, 0));
            }
            // The engine is free for another run.
            let (_, again) = trial.run(engine, Group::solo());
            assert!(again.is_ok());
        }
    }
}

#[test]
fn the_shape_of_minimax_m2_5_is_known_by_name() {
    let config = ModelConfig::minimax_m2_5(62).unwrap();
    assert_eq!((config.query_heads, config.kv_heads), (48, 8));
    let router = config
        .packing_of("model.layers.61.block_sparse_moe.gate")
        .unwrap();
    assert_eq!((router.bits, router.group_size), (8, 64));
    assert_eq!(config.packing_of("lm_head").unwrap().bits, 5);
}
