//! Refuses a share that this machine cannot hold, before a byte of it is read.

use std::process::Command;

use offbook_engine::budget::Place;
use offbook_engine::{Budget, Checkpoint, ModelConfig, Partition, Precision, Workload};
use offbook_protocol::ShardSpec;

/// An error that names the node, the rank and the bytes, when not even a short conversation would
/// fit, or not the caches that were asked for; a warning when the longest sequence would not. Whatever else is wrong with the model is for the
/// loader to say.
pub(super) fn check(spec: &ShardSpec, node: &str) -> Result<(), String> {
    let Some(available) = available_bytes() else {
        return Ok(());
    };
    let Some(budget) = budgets(spec) else {
        return Ok(());
    };
    let place = Place {
        rank: spec.rank,
        node,
    };
    let fits = |context_tokens: u32| {
        let fits = budget(context_tokens).fits(place, available);
        fits.map_err(|error| error.to_string())
    };
    fits(spec.context_tokens.min(SHORT_CONTEXT_TOKENS))?;
    if let Some(kv_tokens) = spec.kv_tokens {
        return fits(kv_tokens).map_err(|error| {
            format!("{error}: lower limits.kv_tokens, which is {kv_tokens}, in the cluster file")
        });
    }
    let (context, kept) = (spec.context_tokens, spec.retained_tokens());
    if let Err(error) = fits(context.saturating_add(kept)) {
        tracing::warn!(
            error,
            context,
            kept,
            "a sequence of the full context will not fit beside what the prefix cache keeps: lower \
             limits.context_tokens, or say with limits.kv_tokens how much there is"
        );
    }
    Ok(())
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
    let context_max = spec.context_tokens;
    Some(move |kv_tokens| {
        let workload = Workload {
            kv_tokens: u64::from(kv_tokens),
            context_tokens: u64::from(context_max.min(kv_tokens)),
            sequences: u64::from(sequences),
            prefill_chunk_tokens: u64::from(chunk),
            precision,
        };
        Budget::of(&config, &share, weight_bytes, &workload)
    })
}

/// What the system could give now, or `None` where it does not say.
fn available_bytes() -> Option<u64> {
    if cfg!(target_os = "macos") {
        // Unified memory, all of it: macOS moves what is idle out of the way.
        let output = Command::new("sysctl")
            .args(["-n", "hw.memsize"])
            .output()
            .ok()?;
        return String::from_utf8(output.stdout).ok()?.trim().parse().ok();
    }
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Below this a model is of no use, so a machine must hold at least as much.
const SHORT_CONTEXT_TOKENS: u32 = 4096;

#[cfg(test)]
mod tests {
    use offbook_protocol::{Epoch, FastSynch, Layout, NodeWeight, Rank, Transport};

    use super::*;

    #[test]
    fn caches_that_cannot_be_held_are_refused_with_the_key_to_lower() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/dense-f32");
        let spec = |kv_tokens| ShardSpec {
            epoch: Epoch(1),
            rank: Rank(0),
            model: model.into(),
            layout: Layout::Tensor,
            weights: vec![NodeWeight(1.0)],
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            prefill_chunk_tokens: 16,
            context_tokens: 64,
            sequences_max: 1,
            kv_tokens: Some(kv_tokens),
            prefix_cache: true,
            collective_deadline: std::time::Duration::from_secs(1),
        };
        check(&spec(256), "a").unwrap();
        let error = check(&spec(u32::MAX), "a").unwrap_err();
        let remedy = "lower limits.kv_tokens, which is 4294967295, in the cluster file";
        assert!(error.contains(remedy), "{error}");
    }

    #[test]
    fn the_system_says_what_it_has() {
        let available = available_bytes().expect("Linux and macOS say so");
        assert!(available > 1 << 20, "{available} bytes");
    }
}
