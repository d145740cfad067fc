//! Which layout serves a model fastest on given machines, and why. Pure.
//!
//! Decoding one sequence is bound by what each rank reads: its weights that a token needs, and its
//! part of the KV cache. Ranks that hold parts of the same layers wait for the slowest; the stages of
//! a pipeline work one after the other. To that come the exchanges, each as long as a small one takes,
//! and the operands, which every rank sends to every other.

use std::fmt;

use offbook_protocol::{Layout, NodeWeight, Rank};
use serde::Serialize;

use crate::budget::{Budget, Workload};
use crate::config::ModelConfig;
use crate::partition::{
    FeedForwardSlices, Partition, PartitionError, PlanReport, RankShare, ShareSlices,
};
use crate::precision::Precision;

/// What a node can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// Bytes of weights that a decode step reads in a second: measured, or the device's memory
    /// bandwidth.
    pub bytes_per_second: f64,
    /// Bytes that a shard may take; not looked at without it.
    pub memory_bytes: Option<u64>,
}

/// What lies between the nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// One exchange of a few kilobytes among all ranks.
    pub exchange_seconds: f64,
    /// What a rank can send.
    pub bytes_per_second: f64,
}

/// One way to divide the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    pub layout: Layout,
    /// One per node.
    pub weights: Vec<NodeWeight>,
    pub basis: Basis,
    pub estimate: Estimate,
    /// The first rank that its node cannot hold.
    pub misfit: Option<Misfit>,
}

/// Where a candidate's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    Given,
    Equal,
    /// Each node as much as it reads in a second.
    Speed,
    /// Each node as much as it holds.
    Memory,
}

/// One decoded token of one sequence, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub seconds_per_token: f64,
    /// Reading weights and KV cache.
    pub reading_seconds: f64,
    /// Whom the others wait for; in a pipeline, the stage that takes longest.
    pub slowest: Rank,
    /// Exchanges, whatever they carry.
    pub exchange_seconds: f64,
    pub exchanges: u64,
    /// Sending the operands.
    pub carrying_seconds: f64,
}

/// A rank needs more than its node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Misfit {
    pub rank: Rank,
    pub needed_bytes: u64,
    pub memory_bytes: u64,
}

/// Every candidate, the best first: those that fit before those that do not, each by time. Weights
/// that are given are kept; else equal ones, and ones by speed and by memory, are tried.
///
/// # Errors
/// [`PartitionError`] for weights or machines that no layout can be solved for.
pub fn candidates(
    config: &ModelConfig,
    machines: &[Machine],
    network: &Network,
    workload: &Workload,
    given: Option<&[NodeWeight]>,
) -> Result<Vec<Candidate>, PartitionError> {
    let mut candidates = Vec::new();
    for (basis, weights) in weightings(machines, given) {
        for layout in [Layout::Tensor, Layout::Expert, Layout::Pipeline] {
            let partition = match Partition::solve(config, layout, &weights) {
                Ok(partition) => partition,
                Err(PartitionError::MoreRanksThanLayers { .. }) => continue,
                Err(error) => return Err(error),
            };
            candidates.push(Candidate {
                layout,
                estimate: Estimate::of(config, &partition, machines, network, workload),
                misfit: misfit(config, &partition, machines, workload),
                weights: weights.clone(),
                basis,
            });
        }
    }
    let seconds = |candidate: &Candidate| candidate.estimate.seconds_per_token;
    candidates.sort_by(|a, b| {
        let fits = a.misfit.is_some().cmp(&b.misfit.is_some());
        fits.then(seconds(a).total_cmp(&seconds(b)))
    });
    Ok(candidates)
}

fn weightings(machines: &[Machine], given: Option<&[NodeWeight]>) -> Vec<(Basis, Vec<NodeWeight>)> {
    if let Some(given) = given {
        return vec![(Basis::Given, given.to_vec())];
    }
    let by = |part: fn(&Machine) -> f64| machines.iter().map(part).map(NodeWeight).collect();
    let mut weightings: Vec<(Basis, Vec<NodeWeight>)> = vec![(Basis::Equal, by(|_| 1.0))];
    let differ = |part: fn(&Machine) -> f64| {
        let first = machines.first().map_or(0.0, part);
        // Measurements of equal machines differ by a little.
        machines
            .iter()
            .any(|machine| (part(machine) / first - 1.0).abs() > ALIKE)
    };
    if differ(|machine| machine.bytes_per_second) {
        weightings.push((Basis::Speed, by(|machine| machine.bytes_per_second)));
    }
    let memory = |machine: &Machine| machine.memory_bytes.unwrap_or(0) as f64;
    if machines
        .iter()
        .all(|machine| machine.memory_bytes.is_some())
        && differ(memory)
    {
        weightings.push((Basis::Memory, by(memory)));
    }
    weightings
}

impl Estimate {
    /// What a token takes under this partition.
    pub fn of(
        config: &ModelConfig,
        partition: &Partition,
        machines: &[Machine],
        network: &Network,
        workload: &Workload,
    ) -> Self {
        let precision = workload.precision;
        let cached = workload.context_tokens.min(workload.cached_tokens);
        let reading = |(share, machine): (&RankShare, &Machine)| {
            let bytes = share.weight_bytes_per_token(config, precision)
                + share.kv_bytes_per_token(config, workload.kv_format()) * cached;
            bytes as f64 / machine.bytes_per_second
        };
        let readings: Vec<f64> = partition.shares.iter().zip(machines).map(reading).collect();
        let slowest = (0..readings.len()).max_by(|&a, &b| readings[a].total_cmp(&readings[b]));
        let slowest = slowest.unwrap_or(0);
        let reading_seconds = match partition.layout {
            Layout::Tensor | Layout::Expert => readings[slowest],
            Layout::Pipeline => readings.iter().sum(),
        };
        let bytes = vec![0; partition.ranks()];
        let collectives = PlanReport::new(config, partition, &bytes, precision).collectives;
        let exchange_seconds = collectives.per_token as f64 * network.exchange_seconds;
        let copies = partition.ranks().saturating_sub(1) as f64;
        let carrying_seconds =
            collectives.bytes_per_rank as f64 * copies / network.bytes_per_second;
        Self {
            seconds_per_token: reading_seconds + exchange_seconds + carrying_seconds,
            reading_seconds,
            slowest: Rank(slowest as u32),
            exchange_seconds,
            exchanges: collectives.per_token,
            carrying_seconds,
        }
    }
}

fn misfit(
    config: &ModelConfig,
    partition: &Partition,
    machines: &[Machine],
    workload: &Workload,
) -> Option<Misfit> {
    let weights = PlanReport::estimated_weight_bytes(config, partition, workload.precision);
    let ranks = partition.shares.iter().zip(weights).zip(machines);
    for (rank, ((share, weight_bytes), machine)) in (0..).map(Rank).zip(ranks) {
        let needed_bytes = Budget::of(config, share, weight_bytes, workload).bytes();
        let Some(memory_bytes) = machine.memory_bytes.filter(|has| needed_bytes > *has) else {
            continue;
        };
        return Some(Misfit {
            rank,
            needed_bytes,
            memory_bytes,
        });
    }
    None
}

impl RankShare {
    /// Bytes of this rank's weights that one decoded token reads: of the experts those that it
    /// chooses, of the embedding one row, which is not counted.
    pub fn weight_bytes_per_token(&self, config: &ModelConfig, precision: Precision) -> u64 {
        let slices = ShareSlices::of(config, self);
        let packing = |module: &str| config.packing_of(module);
        let bytes = |slice: &crate::partition::MatrixSlice| {
            slice.bytes(packing(&slice.module), precision.bytes())
        };
        let experts: u64 = (slices.layers.iter())
            .filter(|layer| matches!(layer.feed_forward, FeedForwardSlices::Experts { .. }))
            .filter_map(|layer| layer.feed_forward.columns())
            .map(|columns| bytes(&columns.gate) + bytes(&columns.up) + bytes(&columns.down))
            .sum();
        let chosen = experts * config.experts_per_token as u64 / config.experts.max(1) as u64;
        let embedding = slices.embedding.as_ref().map_or(0, bytes);
        // A head that is the embedding is read, as far as this rank has its rows.
        let head = if config.tied_embeddings && self.embeds {
            embedding * self.vocabulary_rows.len() as u64 / config.vocabulary_size as u64
        } else {
            0
        };
        slices.bytes(packing, precision.bytes()) - experts + chosen - embedding + head
    }
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Given => "given",
            Self::Equal => "equal",
            Self::Speed => "by speed",
            Self::Memory => "by memory",
        })
    }
}

/// Machines that differ by less than this share count as equal.
const ALIKE: f64 = 0.05;

#[cfg(test)]
mod tests {
    use offbook_protocol::KvBits;

    use super::*;

    const GB: u64 = 1_000_000_000;

    fn minimax() -> ModelConfig {
        ModelConfig::minimax_m2_5(62).unwrap()
    }

    fn workload() -> Workload {
        Workload {
            kv_tokens: 32_768,
            context_tokens: 32_768,
            sequences: 1,
            prefill_chunk_tokens: 512,
            cached_tokens: 4096,
            precision: Precision::BFloat16,
            kv_bits: KvBits::AsComputed,
        }
    }

    fn machine(gigabytes_per_second: f64, gigabytes: u64) -> Machine {
        Machine {
            bytes_per_second: gigabytes_per_second * 1e9,
            memory_bytes: Some(gigabytes * GB),
        }
    }

    fn network(exchange_microseconds: f64) -> Network {
        Network {
            exchange_seconds: exchange_microseconds * 1e-6,
            bytes_per_second: 1.2e9,
        }
    }

    fn best(machines: &[Machine], network: &Network) -> Candidate {
        let all = candidates(&minimax(), machines, network, &workload(), None).unwrap();
        all.into_iter().next().unwrap()
    }

    #[test]
    fn a_token_of_minimax_reads_what_its_ten_billion_active_parameters_take() {
        let whole = RankShare::whole(&minimax());
        let bytes = whole.weight_bytes_per_token(&minimax(), Precision::BFloat16);
        // 10.2 billion parameters without the embedding, at 5.5 bits each.
        assert!((6_000_000_000..7_500_000_000).contains(&bytes), "{bytes}");
        // Whatever the division, all ranks together read no less.
        let weights = [NodeWeight(1.0); 3];
        for layout in [Layout::Tensor, Layout::Pipeline] {
            let partition = Partition::solve(&minimax(), layout, &weights).unwrap();
            let read =
                |share: &RankShare| share.weight_bytes_per_token(&minimax(), Precision::BFloat16);
            let sum: u64 = partition.shares.iter().map(read).sum();
            assert!(sum >= bytes && sum < bytes + bytes / 20, "{layout}: {sum}");
        }
    }

    #[test]
    fn quick_exchanges_make_it_tensor_and_slow_ones_a_pipeline() {
        let machines = [machine(500.0, 256); 3];
        assert_eq!(best(&machines, &network(10.0)).layout, Layout::Tensor);
        assert_eq!(best(&machines, &network(2000.0)).layout, Layout::Pipeline);
        // Between the two, the layout with a third of the exchanges.
        let layouts: Vec<Layout> = (1..400)
            .map(|microseconds| best(&machines, &network(f64::from(microseconds))).layout)
            .collect();
        assert!(layouts.contains(&Layout::Expert), "{layouts:?}");
    }

    #[test]
    fn unequal_nodes_share_by_speed_as_long_as_each_can_hold_its_part() {
        let roomy = [
            machine(800.0, 512),
            machine(800.0, 512),
            machine(400.0, 512),
        ];
        let chosen = best(&roomy, &network(10.0));
        assert_eq!(chosen.basis, Basis::Speed, "{chosen:?}");
        // The fast ones are small: only shares by memory fit.
        let tight = [machine(800.0, 48), machine(800.0, 48), machine(400.0, 192)];
        let chosen = best(&tight, &network(10.0));
        assert_eq!(
            (chosen.basis, chosen.misfit),
            (Basis::Memory, None),
            "{chosen:?}"
        );
    }

    #[test]
    fn what_does_not_fit_comes_last_and_says_which_rank() {
        let all = candidates(
            &minimax(),
            &[machine(800.0, 20); 3],
            &network(10.0),
            &workload(),
            None,
        );
        let misfit = all.unwrap()[0].misfit.unwrap();
        assert_eq!(misfit.memory_bytes, 20 * GB);
        assert!(misfit.needed_bytes > 40 * GB, "{misfit:?}");
    }

    #[test]
    fn a_token_of_a_longer_sequence_takes_longer() {
        let seconds = |cached_tokens| {
            let workload = Workload {
                cached_tokens,
                ..workload()
            };
            let machines = [machine(500.0, 256); 3];
            let all = candidates(&minimax(), &machines, &network(10.0), &workload, None);
            all.unwrap()[0].estimate.reading_seconds
        };
        assert!(seconds(32_768) > seconds(4096));
        let beyond = seconds(u64::MAX) - seconds(32_768);
        assert!(beyond.abs() < 1e-12, "never longer than the context");
    }

    #[test]
    fn given_weights_are_kept() {
        let given = [NodeWeight(2.0), NodeWeight(1.0)];
        let machines = [machine(800.0, 512), machine(100.0, 64)];
        let all = candidates(
            &minimax(),
            &machines,
            &network(10.0),
            &workload(),
            Some(&given),
        );
        let all = all.unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|candidate| candidate.weights == given));
    }

    #[test]
    fn an_estimate_is_the_sum_of_its_parts() {
        let machines = [machine(500.0, 256), machine(250.0, 256)];
        let weights = [NodeWeight(1.0); 2];
        for (layout, slowest) in [
            (Layout::Tensor, 1),
            (Layout::Expert, 1),
            (Layout::Pipeline, 1),
        ] {
            let partition = Partition::solve(&minimax(), layout, &weights).unwrap();
            let network = network(20.0);
            let estimate = Estimate::of(&minimax(), &partition, &machines, &network, &workload());
            let parts = estimate.reading_seconds
                + estimate.exchanges as f64 * network.exchange_seconds
                + estimate.carrying_seconds;
            assert!((estimate.seconds_per_token - parts).abs() < 1e-12);
            assert_eq!(estimate.slowest, Rank(slowest));
        }
    }
}
