//! Multiplying by weights, quantised or not. Rows are tokens: `x` is `[rows, in]`.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::ops::{concatenate, dequantize, gather_mm, gather_qmm, matmul, quantized_matmul};

use crate::host;
use crate::weights::Linear;

/// `x · weightᵀ`: `[…, in]` → `[…, out]`.
pub(crate) fn project(linear: &Linear, x: &Array) -> Result<Array, Exception> {
    if let Some(product) = host::product(linear, x)? {
        return Ok(product);
    }
    match linear {
        Linear::Quantized {
            weight,
            scales,
            biases,
            group_size,
            bits,
        } => quantized_matmul(x, weight, scales, biases, true, *group_size, *bits),
        Linear::Dense { weight } => matmul(x, weight.t()),
    }
}

/// Each row by the matrix of one expert of a stack `[experts, out, in]`: `x` is `[…, 1, in]`,
/// `indices` broadcasts with `x`'s leading axes; the result is `[…, 1, out]`. `sorted` promises
/// that the indices do not decrease.
pub(crate) fn project_experts(
    linear: &Linear,
    x: &Array,
    indices: &Array,
    order: Order,
) -> Result<Array, Exception> {
    if let Some(product) = host::product_of_each(linear, x, indices)? {
        return Ok(product);
    }
    let sorted = order == Order::Sorted;
    match linear {
        Linear::Quantized {
            weight,
            scales,
            biases,
            group_size,
            bits,
        } => gather_qmm(
            x,
            weight,
            scales,
            biases,
            None,
            indices,
            true,
            *group_size,
            *bits,
            sorted,
        ),
        Linear::Dense { weight } => gather_mm(x, weight.swap_axes(-1, -2)?, None, indices, sorted),
    }
}

/// Whether rows that use the same expert lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Sorted,
    AsTheyCome,
}

/// Rows of an embedding table: `ids` is `[rows]`, the result `[rows, width]`.
pub(crate) fn embed(table: &Linear, ids: &Array) -> Result<Array, Exception> {
    match table {
        Linear::Quantized {
            weight,
            scales,
            biases,
            group_size,
            bits,
        } => dequantize(
            take_axis(weight, ids, 0)?,
            take_axis(scales, ids, 0)?,
            &take_axis(biases, ids, 0)?,
            *group_size,
            *bits,
        ),
        Linear::Dense { weight } => take_axis(weight, ids, 0),
    }
}

/// One matrix in place of several that multiply the same input: outputs one after the other. Gives
/// the parts back when they are not stored alike.
pub(crate) fn fuse(parts: Vec<Linear>) -> Result<Fused, Exception> {
    if !parts.windows(2).all(|pair| alike(&pair[0], &pair[1])) {
        return Ok(Fused::Apart(parts));
    }
    let mut stacks: [Vec<&Array>; 3] = Default::default();
    for part in &parts {
        match part {
            Linear::Quantized {
                weight,
                scales,
                biases,
                ..
            } => {
                for (stack, array) in stacks.iter_mut().zip([weight, scales, biases]) {
                    stack.push(array);
                }
            }
            Linear::Dense { weight } => stacks[0].push(weight),
        }
    }
    let stack = |arrays: &[&Array]| concatenate(arrays, -2);
    let whole = match &parts[0] {
        Linear::Quantized {
            group_size, bits, ..
        } => Linear::Quantized {
            weight: stack(&stacks[0])?,
            scales: stack(&stacks[1])?,
            biases: stack(&stacks[2])?,
            group_size: *group_size,
            bits: *bits,
        },
        Linear::Dense { .. } => Linear::Dense {
            weight: stack(&stacks[0])?,
        },
    };
    Ok(Fused::Whole(whole))
}

/// What became of matrices that [`fuse`] was given.
pub(crate) enum Fused {
    Whole(Linear),
    Apart(Vec<Linear>),
}

fn alike(a: &Linear, b: &Linear) -> bool {
    match (a, b) {
        (
            Linear::Quantized {
                group_size, bits, ..
            },
            Linear::Quantized {
                group_size: other_group,
                bits: other_bits,
                ..
            },
        ) => (group_size, bits) == (other_group, other_bits),
        (Linear::Dense { .. }, Linear::Dense { .. }) => true,
        _ => false,
    }
}

/// The arrays of a matrix, for evaluation.
pub(crate) fn arrays(linear: &Linear) -> Vec<&Array> {
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
