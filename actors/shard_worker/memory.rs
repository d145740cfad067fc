//! Whether this machine can hold a share, and how many positions of caches beside it: asked before a
//! byte of it is read.

use std::fmt;

use offbook_engine::batch::KV_BLOCK_TOKENS;
use offbook_engine::budget::Place;
use offbook_engine::{Budget, Checkpoint, DoesNotFit, ModelConfig, Partition, Precision, Workload};
use offbook_protocol::ShardSpec;

use crate::system_memory::SystemMemory;

/// What a share may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    bytes: u64,
    source: Source,
}

/// Where a bound comes from, which says what would raise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// An operator.
    Limit,
    /// The device, or the machine.
    Machine,
}

impl Bound {
    /// The smallest of what an operator allows, what a device with memory of its own has
    /// (`device_bytes`), and, where it has none, what the system could give now. `None` where nobody
    /// says.
    pub(super) fn of(limit_bytes: Option<u64>, device_bytes: Option<u64>) -> Option<Self> {
        let machine = device_bytes.or_else(SystemMemory::loadable_bytes);
        let limit = limit_bytes.map(|bytes| (bytes, Source::Limit));
        let machine = machine.map(|bytes| (bytes, Source::Machine));
        let least = [limit, machine].into_iter().flatten();
        let (bytes, source) = least.min_by_key(|(bytes, _)| *bytes)?;
        Some(Self { bytes, source })
    }
}

/// What would give it more room.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Limit => "raise its memory limit (--memory-limit, or memory_limit of the node)",
            Self::Machine => "free memory there, or raise the limit of its container",
        })
    }
}

/// What would make the largest part of it smaller. Weights alone become less with every node.
fn smaller(budget: &Budget) -> &'static str {
    let others = budget.kv_bytes.max(budget.activation_bytes);
    if budget.weight_bytes >= others {
        "give it a smaller weight, or add nodes"
    } else if budget.activation_bytes >= budget.kv_bytes {
        "lower limits.prefill_chunk_tokens or the context (--context)"
    } else {
        "lower the context (--context), or keep caches in 8 bits (--kv-bits 8)"
    }
}

/// Positions that the caches of this rank may hold together: as many as were asked for, or, where
/// nobody asked for a number, as many of these as there is memory for, in whole blocks. Whatever else
/// is wrong with the model is for the loader to say.
///
/// # Errors
/// Naming the node, the rank, the bytes and what to change, when not even a short conversation would
/// fit, or not the caches that were asked for.
pub(super) fn kv_tokens(spec: &ShardSpec, node: &str, bound: Option<Bound>) -> Result<u32, String> {
    let asked = spec.kv_tokens();
    let (Some(bound), Some(budget)) = (bound, budgets(spec)) else {
        return Ok(asked);
    };
    let place = Place {
        rank: spec.rank,
        node,
    };
    let remedy = |error: &DoesNotFit| format!("{}, or {}", bound.source, smaller(&error.budget));
    let fits = |kv_tokens: u32| budget(kv_tokens).fits(place, bound.bytes);
    let least = spec.context_tokens.min(SHORT_CONTEXT_TOKENS);
    fits(least).map_err(|error| format!("{error}: {}", remedy(&error)))?;
    if let Some(kv_tokens) = spec.kv_tokens {
        return fits(kv_tokens).map(|()| asked).map_err(|error| {
            let remedy = remedy(&error);
            format!(
                "{error}: lower limits.kv_tokens, which is {kv_tokens}, in the cluster file, or \
                 {remedy}"
            )
        });
    }
    if fits(asked).is_ok() {
        return Ok(asked);
    }
    let block = KV_BLOCK_TOKENS as u32;
    // A budget grows with the positions: so many blocks fit, and no more.
    let (mut fit, mut too_many) = (least / block, asked.div_ceil(block));
    while fit + 1 < too_many {
        let middle = fit.midpoint(too_many);
        match fits(middle * block) {
            Ok(()) => fit = middle,
            Err(_) => too_many = middle,
        }
    }
    Ok((fit * block).max(least))
}

/// What this share needs with caches of so many positions; `None` where the model cannot be read.
pub(super) fn share_bytes(spec: &ShardSpec, kv_tokens: u32) -> Option<u64> {
    budgets(spec).map(|budget| budget(kv_tokens).bytes())
}

/// What this share needs, by the positions that all caches hold together.
fn budgets(spec: &ShardSpec) -> Option<impl Fn(u32) -> Budget + use<>> {
    let config = ModelConfig::open(&spec.model).ok()?;
    let partition = Partition::solve(&config, spec.layout, &spec.weights).ok()?;
    let share = partition.shares.into_iter().nth(spec.rank.index())?;
    let checkpoint = Checkpoint::open(&spec.model).ok()?;
    // The CPU back-end computes in f32. A CUDA device does not, and needs less than this says.
    let precision = match cfg!(target_os = "macos") {
        true => checkpoint.precision(),
        false => Precision::Float32,
    };
    let weight_bytes = checkpoint.share_bytes(&config, &share, precision);
    let (sequences, chunk) = (spec.sequences_max, spec.prefill_chunk_tokens);
    let (context_max, kv_bits) = (spec.context_tokens, spec.kv_bits);
    Some(move |kv_tokens| {
        let workload = Workload {
            kv_tokens: u64::from(kv_tokens),
            context_tokens: u64::from(context_max.min(kv_tokens)),
            sequences: u64::from(sequences),
            prefill_chunk_tokens: u64::from(chunk),
            cached_tokens: u64::from(context_max),
            precision,
            kv_bits,
        };
        Budget::of(&config, &share, weight_bytes, &workload)
    })
}

/// Below this a model is of no use, so a machine must hold at least as much.
const SHORT_CONTEXT_TOKENS: u32 = 4096;

#[cfg(test)]
mod tests {
    use offbook_protocol::{Epoch, FastSynch, KvBits, Layout, NodeWeight, Rank, Transport};

    use super::*;

    fn spec(context_tokens: u32, kv_tokens: Option<u32>) -> ShardSpec {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/dense-f32");
        ShardSpec {
            epoch: Epoch(1),
            rank: Rank(0),
            model: model.into(),
            layout: Layout::Tensor,
            weights: vec![NodeWeight(1.0)],
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            prefill_chunk_tokens: 16,
            context_tokens,
            sequences_max: 16,
            kv_tokens,
            kv_bits: KvBits::AsComputed,
            prefix_cache: true,
            micro_batches: None,
            collective_deadline: std::time::Duration::from_secs(1),
        }
    }

    fn limited(bytes: u64) -> Option<Bound> {
        let bound = Bound::of(Some(bytes), None);
        assert_eq!(bound.map(|bound| bound.source), Some(Source::Limit));
        bound
    }

    #[test]
    fn caches_that_cannot_be_held_are_refused_with_the_key_to_lower() {
        let bound = Bound::of(None, None);
        assert_eq!(kv_tokens(&spec(64, Some(256)), "a", bound), Ok(256));
        let error = kv_tokens(&spec(64, Some(u32::MAX)), "a", bound).unwrap_err();
        let remedy = "lower limits.kv_tokens, which is 4294967295, in the cluster file";
        assert!(error.contains(remedy), "{error}");
    }

    #[test]
    fn a_share_beyond_the_limit_is_refused_with_rank_node_bytes_and_remedy() {
        let error = kv_tokens(&spec(64, None), "macbook", limited(100_000)).unwrap_err();
        for part in [
            "rank 0 does not fit node 'macbook'",
            "and has 100000",
            "raise its memory limit (--memory-limit, or memory_limit of the node)",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_remedy_is_for_the_largest_part() {
        let remedy = |spec: &ShardSpec| kv_tokens(spec, "a", limited(1000)).unwrap_err();
        let wide = ShardSpec {
            prefill_chunk_tokens: 4096,
            ..spec(64, None)
        };
        let long = ShardSpec {
            prefill_chunk_tokens: 1,
            sequences_max: 1,
            ..spec(4096, None)
        };
        for (spec, part) in [
            (spec(64, None), "give it a smaller weight, or add nodes"),
            (wide, "lower limits.prefill_chunk_tokens"),
            (long, "--kv-bits 8"),
        ] {
            let error = remedy(&spec);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn caches_that_nobody_asked_for_shrink_to_what_fits_and_fill_it() {
        let spec = spec(8192, None);
        let budget = budgets(&spec).unwrap();
        let asked = spec.kv_tokens();
        let bytes = |kv_tokens| budget(kv_tokens).bytes();
        let between = bytes(8192).midpoint(bytes(asked));
        let fit = kv_tokens(&spec, "a", limited(between)).unwrap();
        assert!(fit < asked && fit.is_multiple_of(256), "{fit} of {asked}");
        assert!(bytes(fit) <= between && bytes(fit + 256) > between);
        assert_eq!(kv_tokens(&spec, "a", limited(bytes(asked))), Ok(asked));
        let least = bytes(SHORT_CONTEXT_TOKENS);
        assert_eq!(kv_tokens(&spec, "a", limited(least)), Ok(4096));
        assert!(kv_tokens(&spec, "a", limited(least - 1)).is_err());
    }
}
