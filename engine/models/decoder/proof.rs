//! Shows that kernels of ours compute what MLX's operations do, on this device and with this model: one layer, a
//! few rows, both ways.

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, random};
use offbook_collectives::Group;
use offbook_protocol::SequenceId;

use super::{Decoder, Divided, Hidden};
use crate::batch::{Input, Segment, StepBatch};
use crate::kv_cache::Caches;
use crate::models::Fault;
use crate::sampler::host;

/// # Errors
/// Why the kernels cannot be used; they are left in place.
pub(super) fn prove(model: &mut Decoder) -> Result<(), Exception> {
    if model.blocks.is_empty() {
        return Ok(());
    }
    let ours = first_layer(model)?;
    let kernels = model.kernels.take();
    let theirs = first_layer(model);
    model.kernels = kernels;
    let tolerance = match model.numerics.dtype {
        // The products that it is compared with round more than they would have to.
        Dtype::Float32 => 1e-2,
        _ => 5e-2,
    };
    let (mut rows, mut different) = (0, 0);
    for (ours, theirs) in ours.iter().zip(&theirs?) {
        for row in 0..theirs.dim(0) {
            let (ours, theirs) = (ours.try_index(row)?, theirs.try_index(row)?);
            let error = norm(&ours.subtract(&theirs)?)? / norm(&theirs)?.max(f32::MIN_POSITIVE);
            rows += 1;
            // Not a number is different, too.
            different += i32::from(error.is_nan() || error > tolerance);
        }
    }
    tracing::info!(
        rows,
        different,
        "kernels of our own were compared with MLX's operations"
    );
    // Experts with nearly the same score may change places.
    match 3 * different <= rows {
        true => Ok(()),
        false => Err(Exception::custom(format!(
            "they compute {different} of {rows} rows differently from MLX"
        ))),
    }
}

/// A prompt and two sequences of one token, then a token for each: the first layer's outputs.
fn first_layer(model: &Decoder) -> Result<[Array; 2], Exception> {
    let solo = Group::solo();
    let mut caches = Caches::new();
    let steps = [[(0, 7), (0, 1), (0, 1)], [(7, 1), (1, 1), (1, 1)]];
    let mut outputs = Vec::with_capacity(steps.len());
    for (key, segments) in steps.iter().enumerate() {
        let segment = |(sequence, &(start, rows)): (usize, &(usize, usize))| Segment {
            sequence: SequenceId(sequence as u64),
            start,
            input: Input::Prompt(vec![0; rows]),
            draw: None,
            reserve: 16,
        };
        let batch = StepBatch {
            lane: 0,
            segments: segments.iter().enumerate().map(segment).collect(),
        };
        for segment in &batch.segments {
            let cache = caches.entry(segment.sequence);
            cache.or_insert_with(|| model.cache());
        }
        let rows = model.rows(&batch, &solo, Divided::default());
        let shape = [rows.count, model.numerics.hidden];
        let key = random::key(key as u64)?;
        let x = random::normal::<f32>(&shape, None, None, Some(&key))?;
        let hidden = Hidden::new(x.as_dtype(model.numerics.dtype)?);
        let hidden = match model.layer(0, hidden, &rows, &mut caches) {
            Ok(hidden) => hidden.whole()?,
            Err(Fault::Device(why)) => return Err(why),
            Err(Fault::Collective(why)) => return Err(Exception::custom(why.to_string())),
        };
        hidden.eval()?;
        outputs.push(hidden);
    }
    let count = "one output for each step";
    outputs.try_into().map_err(|_| Exception::custom(count))
}

fn norm(x: &Array) -> Result<f32, Exception> {
    let squares = x.as_dtype(Dtype::Float32)?.square()?.sum(None)?;
    Ok(host::<f32>(&squares)?.iter().sum::<f32>().sqrt())
}
