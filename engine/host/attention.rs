//! Causal attention of one sequence over its cache, straight from where the cache lies: nothing is
//! copied, repeated for the heads of a group, or computed for what a query does not see.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::slice;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

use crate::host::is_on_cpu;
#[cfg(target_arch = "x86_64")]
use crate::host::processor::X86V3;
use crate::host::processor::{LANES, Plain, Processor};

/// What queries look at: each `[kv heads, positions, head_dim]`.
#[derive(Clone, Copy)]
pub(crate) struct Sight<'a> {
    pub(crate) keys: &'a Array,
    pub(crate) values: &'a Array,
    /// Of the scores.
    pub(crate) scale: f32,
}

/// `queries` `[rows, heads, head_dim]`, of which the last sees all positions and each before it one less →
/// `[rows, heads × head_dim]`; heads share keys in groups of neighbours. `None` where MLX is to do it: on another device, and for
/// types other than 32-bit floats.
pub(crate) fn attend(queries: &Array, sight: Sight<'_>) -> Result<Option<Array>, Exception> {
    let Sight {
        keys,
        values,
        scale,
    } = sight;
    let (&[rows, heads, width], &[kv_heads, positions, key_width]) =
        (queries.shape(), keys.shape())
    else {
        return Ok(None);
    };
    let floats = [queries, keys, values];
    let fits = is_on_cpu()
        && floats.iter().all(|array| array.dtype() == Dtype::Float32)
        && values.shape() == keys.shape()
        && key_width == width
        && (width as usize).is_multiple_of(LANES)
        && kv_heads > 0
        && heads % kv_heads == 0
        && (1..=positions).contains(&rows);
    if !fits {
        return Ok(None);
    }
    let sizes = RawAttention {
        rows: rows as usize,
        heads: heads as usize,
        kv_heads: kv_heads as usize,
        positions: positions as usize,
        width: width as usize,
        scale,
        ..RawAttention::default()
    };
    let stream = Stream::thread_local_or_default();
    // SAFETY: all handles are alive during the call, the shim shares what it keeps; the sizes are those of
    // the arrays, and what comes back is an array of ours alone.
    unsafe {
        let ctx = offbook_attention_new(
            &sizes,
            run,
            queries.as_ptr().ctx.cast_const(),
            keys.as_ptr().ctx.cast_const(),
            values.as_ptr().ctx.cast_const(),
            stream.as_ptr().ctx.cast_const(),
        );
        if ctx.is_null() {
            return Err(Exception::custom("no memory for attention"));
        }
        Ok(Some(Array::from_ptr(mlx_sys::mlx_array { ctx })))
    }
}

/// Called by the shim on the stream's thread.
extern "C" fn run(attention: *const RawAttention) {
    // SAFETY: the shim passes sizes that `attend` checked, and arrays of these sizes that it keeps alive;
    // nobody else has the output yet.
    let (attention, queries, out) = unsafe {
        let attention = &*attention;
        let length = attention.rows * attention.heads * attention.width;
        let queries = slice::from_raw_parts(attention.queries, length);
        let out = slice::from_raw_parts_mut(attention.out, length);
        (attention, queries, out)
    };
    #[cfg(target_arch = "x86_64")]
    if X86V3::is_here() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { attend_x86_64_v3(attention, queries, out) };
    }
    attend_with::<Plain>(attention, queries, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn attend_x86_64_v3(attention: &RawAttention, queries: &[f32], out: &mut [f32]) {
    attend_with::<X86V3>(attention, queries, out);
}

#[inline(always)]
fn attend_with<P: Processor>(attention: &RawAttention, queries: &[f32], out: &mut [f32]) {
    let &RawAttention {
        rows,
        heads,
        kv_heads,
        positions,
        width,
        scale,
        ..
    } = attention;
    let mut weights = vec![0.0; positions];
    let rows_of = |row: usize| positions - rows + row + 1;
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        for row in 0..rows {
            let place = (row * heads + head) * width;
            let weights = &mut weights[..rows_of(row)];
            let (query, _) = queries[place..][..width].as_chunks::<LANES>();
            let mut largest = f32::NEG_INFINITY;
            for (position, weight) in weights.iter_mut().enumerate() {
                *weight = scale * dot::<P>(query, attention.key(kv_head, position));
                largest = largest.max(*weight);
            }
            let mut sum = 0.0;
            for weight in weights.iter_mut() {
                *weight = (*weight - largest).exp();
                sum += *weight;
            }
            let (out, _) = out[place..][..width].as_chunks_mut::<LANES>();
            for out in out.iter_mut() {
                *out = [0.0; LANES];
            }
            for (position, weight) in weights.iter().enumerate() {
                add::<P>(*weight / sum, attention.value(kv_head, position), out);
            }
        }
    }
}

#[inline(always)]
fn dot<P: Processor>(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> f32 {
    let mut sum = P::splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = P::multiply_add(P::load(a), P::load(b), sum);
    }
    P::sum(sum)
}

/// `sum += weight · values`.
#[inline(always)]
fn add<P: Processor>(weight: f32, values: &[[f32; LANES]], sum: &mut [[f32; LANES]]) {
    let weight = P::splat(weight);
    for (sum, values) in sum.iter_mut().zip(values) {
        P::store(P::multiply_add(weight, P::load(values), P::load(sum)), sum);
    }
}

/// `offbook_attention` in host.h.
#[repr(C)]
struct RawAttention {
    queries: *const f32,
    keys: *const f32,
    values: *const f32,
    out: *mut f32,
    key_head_stride: usize,
    key_stride: usize,
    value_head_stride: usize,
    value_stride: usize,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    positions: usize,
    width: usize,
    scale: f32,
}

impl RawAttention {
    #[inline(always)]
    fn key(&self, head: usize, position: usize) -> &[[f32; LANES]] {
        let offset = head * self.key_head_stride + position * self.key_stride;
        // SAFETY: only asked for heads and positions that there are; see `run`.
        let key = unsafe { slice::from_raw_parts(self.keys.add(offset), self.width) };
        key.as_chunks().0
    }

    #[inline(always)]
    fn value(&self, head: usize, position: usize) -> &[[f32; LANES]] {
        let offset = head * self.value_head_stride + position * self.value_stride;
        // SAFETY: as for `key`.
        let value = unsafe { slice::from_raw_parts(self.values.add(offset), self.width) };
        value.as_chunks().0
    }
}

impl Default for RawAttention {
    fn default() -> Self {
        Self {
            queries: std::ptr::null(),
            keys: std::ptr::null(),
            values: std::ptr::null(),
            out: std::ptr::null_mut(),
            key_head_stride: 0,
            key_stride: 0,
            value_head_stride: 0,
            value_stride: 0,
            rows: 0,
            heads: 0,
            kv_heads: 0,
            positions: 0,
            width: 0,
            scale: 0.0,
        }
    }
}

// SAFETY: the signature is that of host.h.
unsafe extern "C" {
    fn offbook_attention_new(
        sizes: *const RawAttention,
        attend: extern "C" fn(*const RawAttention),
        queries: *const c_void,
        keys: *const c_void,
        values: *const c_void,
        stream: *const c_void,
    ) -> *mut c_void;
}

#[cfg(test)]
mod tests {
    use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
    use mlx_rs::ops::indexing::TryIndexOp;
    use mlx_rs::random;

    use super::*;

    fn normal(shape: &[i32], seed: u64) -> Array {
        let key = random::key(seed).unwrap();
        random::normal::<f32>(shape, None, None, Some(&key)).unwrap()
    }

    #[test]
    fn it_is_that_of_mlx_from_the_middle_of_a_larger_buffer() {
        let buffer = normal(&[6, 50, 32], 1);
        let keys = buffer.try_index((..3, ..37, ..)).unwrap();
        let values = buffer.try_index((3.., ..37, ..)).unwrap();
        for rows in [1, 5, 37] {
            let queries = normal(&[rows, 6, 32], 2);
            let sight = Sight {
                keys: &keys,
                values: &values,
                scale: 0.3,
            };
            let ours = attend(&queries, sight).unwrap().unwrap();
            let batched = queries.transpose_axes(&[1, 0, 2]).unwrap();
            let theirs = scaled_dot_product_attention(
                batched.expand_dims(0).unwrap(),
                keys.expand_dims(0).unwrap(),
                values.expand_dims(0).unwrap(),
                0.3,
                Some(ScaledDotProductAttentionMask::Causal),
                None,
            );
            let theirs = theirs.unwrap().squeeze_axes(&[0]).unwrap();
            let theirs = theirs.transpose_axes(&[1, 0, 2]).unwrap();
            let theirs = theirs.reshape(&[rows, 6 * 32]).unwrap();
            assert!(
                ours.all_close(theirs, 1e-4, 1e-4, None).unwrap(),
                "{rows} rows"
            );
        }
    }
}
