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
fn first_layer(model: &Decoder) -> Result<Vec<Array>, Exception> {
    let segment = |(sequence, &(start, rows)): (usize, &(usize, usize))| Segment {
        sequence: SequenceId(sequence as u64),
        start,
        input: Input::Prompt(vec![0; rows]),
        draw: None,
        reserve: 16,
    };
    let steps = [[(0, 7), (0, 1), (0, 1)], [(7, 1), (1, 1), (1, 1)]];
    let steps = steps.map(|segments| segments.iter().enumerate().map(segment).collect());
    outputs(model, 1, &steps, Divided::default()).map_err(|fault| match fault {
        Fault::Device(why) => why,
        Fault::Collective(why) => Exception::custom(why.to_string()),
    })
}

/// What the first layers make of random rows, in one step after the other: each `[rows, hidden]`.
pub(super) fn outputs(
    model: &Decoder,
    layers: usize,
    steps: &[Vec<Segment>],
    divided: Divided,
) -> Result<Vec<Array>, Fault> {
    let group = Group::solo();
    let mut caches = Caches::new();
    let outputs = steps.iter().enumerate().map(|(step, segments)| {
        let batch = StepBatch {
            lane: 0,
            segments: segments.clone(),
        };
        for segment in segments {
            caches
                .entry(segment.sequence)
                .or_insert_with(|| model.cache());
        }
        let rows = model.rows(&batch, &group, divided);
        let key = random::key(step as u64)?;
        let shape = [rows.count, model.numerics.hidden];
        let x = random::normal::<f32>(&shape, None, None, Some(&key))?;
        let mut hidden = Hidden::new(x.as_dtype(model.numerics.dtype)?);
        for layer in 0..layers {
            hidden = model.layer(layer, hidden, &rows, &mut caches)?;
        }
        Ok(hidden.whole()?)
    });
    outputs.collect()
}

fn norm(x: &Array) -> Result<f32, Exception> {
    let squares = x.as_dtype(Dtype::Float32)?.square()?.sum(None)?;
    Ok(host::<f32>(&squares)?.iter().sum::<f32>().sqrt())
}
