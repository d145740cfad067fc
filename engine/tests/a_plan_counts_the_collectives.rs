//! What `offbook plan` says of collectives per token is what a step really takes.

mod support;

use offbook_engine::{ModelConfig, Partition, PlanReport, Precision};
use offbook_protocol::Layout;

use support::fixture::Fixture;
use support::processes::{be_a_rank, play_and_count};
use support::{Cluster, Cue};

#[test]
fn in_every_layout() {
    if be_a_rank() {
        return;
    }
    // Norms over all heads, which take a collective of their own; norms of each head; dense layers.
    for fixture in ["bf16-5bit", "qwen3-4bit", "qwen3-moe-4bit"].map(Fixture::open) {
        for layout in [Layout::Tensor, Layout::Expert, Layout::Pipeline] {
            check(&fixture, layout);
        }
    }
}

fn check(fixture: &Fixture, layout: Layout) {
    let cluster = Cluster::of(&fixture.model).over(layout, &[1.0, 1.0]);
    let planned = planned(&cluster);
    // One sequence, whose prompt is one step: every step draws.
    let mut joins = fixture.joins();
    joins.truncate(1);
    let cues = vec![Cue::start(joins)];
    let (_, counted) = play_and_count(&cluster, cues, "in_every_layout");
    // A rank of a pipeline takes part in its own exchange with the next, and in the broadcast.
    let per_step = match layout {
        Layout::Tensor | Layout::Expert => planned,
        Layout::Pipeline => 2,
    };
    assert!(counted.steps > 5, "{}, {layout}: {counted:?}", fixture.name);
    assert_eq!(
        counted.operations,
        counted.steps * per_step,
        "{}, {layout}: {counted:?}",
        fixture.name
    );
}

fn planned(cluster: &Cluster) -> u64 {
    let config = ModelConfig::open(&cluster.model).unwrap();
    let partition = Partition::solve(&config, cluster.layout, &cluster.weights).unwrap();
    let bytes = PlanReport::estimated_weight_bytes(&config, &partition, Precision::Float32);
    let report = PlanReport::new(&config, &partition, &bytes, Precision::Float32);
    report.collectives.per_token
}
