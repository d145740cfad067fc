//! Causal attention of all sequences of a step over their caches, straight from where these lie: nothing is
//! copied, repeated for the heads of a group, or computed for what a query does not see.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::slice;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

#[cfg(target_arch = "x86_64")]
use crate::host::processor::X86V3;
use crate::host::processor::{LANES, Plain, Processor};
use crate::host::{crew, is_on_cpu};
use crate::kv_cache::KeysAndValues;

/// What some rows of a step look at: those of one sequence.
#[derive(Debug)]
pub(crate) struct Sight {
    /// How many there are. The last sees all positions of `past`, each before it one less.
    pub(crate) rows: usize,
    pub(crate) past: KeysAndValues,
}

/// `queries` `[rows, heads, head_dim]`, of which each sight has its own, in order → `[rows, heads ×
/// head_dim]`; heads share keys in groups of neighbours. `scale` is that of the scores. `None` where MLX is to
/// do it: on another device, and for types other than 32-bit floats.
pub(crate) fn attend(
    queries: &Array,
    sights: &[Sight],
    scale: f32,
) -> Result<Option<Array>, Exception> {
    let &[rows, heads, width] = queries.shape() else {
        return Ok(None);
    };
    let is_float = |array: &Array| array.dtype() == Dtype::Float32;
    let sized = |sight: &Sight| {
        let KeysAndValues { keys, values } = &sight.past;
        let &[kv_heads, positions, key_width] = keys.shape() else {
            return None;
        };
        let fits = is_float(keys)
            && is_float(values)
            && values.shape() == keys.shape()
            && key_width == width
            && kv_heads > 0
            && heads % kv_heads == 0
            && (1..=positions as usize).contains(&sight.rows);
        fits.then(|| RawAttention {
            rows: sight.rows,
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            positions: positions as usize,
            width: width as usize,
            scale,
            ..RawAttention::default()
        })
    };
    let sizes: Option<Vec<RawAttention>> = sights.iter().map(sized).collect();
    let all_rows: usize = sights.iter().map(|sight| sight.rows).sum();
    let fits = is_on_cpu()
        && is_float(queries)
        && (width as usize).is_multiple_of(LANES)
        && all_rows == rows as usize;
    let Some(sizes) = sizes.filter(|_| fits) else {
        return Ok(None);
    };
    let pasts = sights
        .iter()
        .flat_map(|sight| [&sight.past.keys, &sight.past.values]);
    let pasts: Vec<*const c_void> = pasts.map(|array| array.as_ptr().ctx.cast_const()).collect();
    let stream = Stream::thread_local_or_default();
    // SAFETY: all handles are alive during the call, the shim shares what it keeps; there are two of them for
    // each of the sizes, which are those of the arrays; and what comes back is an array of ours alone.
    unsafe {
        let ctx = offbook_attention_new(
            sizes.as_ptr(),
            sizes.len(),
            run,
            queries.as_ptr().ctx.cast_const(),
            pasts.as_ptr(),
            stream.as_ptr().ctx.cast_const(),
        );
        if ctx.is_null() {
            return Err(Exception::custom("no memory for attention"));
        }
        Ok(Some(Array::from_ptr(mlx_sys::mlx_array { ctx })))
    }
}

/// Called by the shim on the stream's thread.
extern "C" fn run(sequences: *const RawAttention, count: usize) {
    // SAFETY: the shim passes as many as it was given.
    let sequences = unsafe { slice::from_raw_parts(sequences, count) };
    let mut looks: Vec<Look<'_>> = sequences.iter().flat_map(RawAttention::looks).collect();
    let seen: usize = looks.iter().map(Look::positions).sum();
    let width = sequences.first().map_or(0, |attention| attention.width);
    let hands = crew::hands(2 * seen * width);
    let pieces = match hands {
        1 => 1,
        _ => hands * PIECES_PER_HAND,
    };
    let size = looks.len().div_ceil(pieces).max(1);
    crew::share(looks.chunks_mut(size).collect(), some);
}

/// What one head of one row does.
struct Look<'a> {
    of: &'a RawAttention,
    row: usize,
    head: usize,
    query: &'a [[f32; LANES]],
    out: &'a mut [[f32; LANES]],
}

impl Look<'_> {
    /// As many as it sees.
    #[inline(always)]
    fn positions(&self) -> usize {
        self.of.positions - self.of.rows + self.row + 1
    }
}

fn some(looks: &mut [Look<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if X86V3::is_here() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { attend_x86_64_v3(looks) };
    }
    attend_with::<Plain>(looks);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn attend_x86_64_v3(looks: &mut [Look<'_>]) {
    attend_with::<X86V3>(looks);
}

#[inline(always)]
fn attend_with<P: Processor>(looks: &mut [Look<'_>]) {
    let mut weights = Vec::new();
    for look in looks {
        let attention = look.of;
        let kv_head = look.head / (attention.heads / attention.kv_heads);
        weights.resize(look.positions(), 0.0);
        let mut largest = f32::NEG_INFINITY;
        for (position, weight) in weights.iter_mut().enumerate() {
            *weight = attention.scale * dot::<P>(look.query, attention.key(kv_head, position));
            largest = largest.max(*weight);
        }
        let mut sum = 0.0;
        for weight in weights.iter_mut() {
            *weight = (*weight - largest).exp();
            sum += *weight;
        }
        for out in look.out.iter_mut() {
            *out = [0.0; LANES];
        }
        for (position, weight) in weights.iter().enumerate() {
            add::<P>(*weight / sum, attention.value(kv_head, position), look.out);
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

/// More than one, so that a thread that is held up is not waited for; rows late in a prompt see more than
/// early ones.
const PIECES_PER_HAND: usize = 4;

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

// SAFETY: it points to arrays that nobody changes while they are looked at; the output is handed out in
// slices that do not overlap, and not through these pointers.
unsafe impl Sync for RawAttention {}

impl RawAttention {
    /// All that is to be done, by head: those that read the same keys come one after the other.
    fn looks(&self) -> impl Iterator<Item = Look<'_>> {
        let length = self.rows * self.heads * self.width;
        // SAFETY: `attend` checked the sizes, the shim keeps arrays of these sizes alive; nobody else has the
        // output yet, and each sequence has rows of its own of it.
        let (queries, out) = unsafe {
            let queries = slice::from_raw_parts(self.queries, length);
            (queries, slice::from_raw_parts_mut(self.out, length))
        };
        let (queries, _) = queries.as_chunks::<LANES>();
        let (out, _) = out.as_chunks_mut::<LANES>();
        let width = self.width / LANES;
        let pairs = queries.chunks_exact(width).zip(out.chunks_exact_mut(width));
        let mut looks: Vec<_> = pairs
            .enumerate()
            .map(|(place, (query, out))| Look {
                of: self,
                row: place / self.heads,
                head: place % self.heads,
                query,
                out,
            })
            .collect();
        looks.sort_by_key(|look| look.head);
        looks.into_iter()
    }

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
        sequences: *const RawAttention,
        count: usize,
        attend: extern "C" fn(*const RawAttention, usize),
        queries: *const c_void,
        pasts: *const *const c_void,
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

    /// `[rows, heads × width]`, by MLX's own kernel.
    fn by_mlx(queries: &Array, past: &KeysAndValues, scale: f32) -> Array {
        let batched = queries.transpose_axes(&[1, 0, 2]).unwrap();
        let attended = scaled_dot_product_attention(
            batched.expand_dims(0).unwrap(),
            past.keys.expand_dims(0).unwrap(),
            past.values.expand_dims(0).unwrap(),
            scale,
            Some(ScaledDotProductAttentionMask::Causal),
            None,
        );
        let attended = attended.unwrap().squeeze_axes(&[0]).unwrap();
        let attended = attended.transpose_axes(&[1, 0, 2]).unwrap();
        attended.reshape(&[queries.dim(0), -1]).unwrap()
    }

    /// From the middle of a larger buffer.
    fn past(positions: i32, seed: u64) -> KeysAndValues {
        let buffer = normal(&[6, 2000, 32], seed);
        KeysAndValues {
            keys: buffer.try_index((..3, ..positions, ..)).unwrap(),
            values: buffer.try_index((3.., ..positions, ..)).unwrap(),
        }
    }

    #[test]
    fn each_sequence_gets_what_mlx_gives_it_alone() {
        // The last one alone is worth more than one thread.
        let lengths = [(1, 37), (37, 37), (5, 40), (1, 1), (300, 1800)];
        let sights = lengths
            .iter()
            .zip(1..)
            .map(|(&(rows, positions), seed)| Sight {
                rows,
                past: past(positions, seed),
            });
        let sights: Vec<Sight> = sights.collect();
        let count: usize = sights.iter().map(|sight| sight.rows).sum();
        let queries = normal(&[count as i32, 6, 32], 9);
        let together = attend(&queries, &sights, 0.3).unwrap().unwrap();
        assert_eq!(together.shape(), [count as i32, 6 * 32]);
        let mut first = 0;
        for sight in &sights {
            let end = first + sight.rows as i32;
            let own = queries.try_index(first..end).unwrap();
            let theirs = by_mlx(&own, &sight.past, 0.3);
            let ours = together.try_index(first..end).unwrap();
            let rows = sight.rows;
            assert!(
                ours.all_close(theirs, 1e-4, 1e-4, None).unwrap(),
                "{rows} rows"
            );
            first = end;
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_company() {
        let sights = [(3, 700), (1, 900)].map(|(rows, positions)| Sight {
            rows,
            past: past(positions, 4),
        });
        let queries = normal(&[4, 6, 32], 5);
        let bits = |array: Array| -> Vec<u32> {
            let array = array.contiguous().unwrap();
            let values = array.try_as_slice::<f32>().unwrap();
            values.iter().map(|value| value.to_bits()).collect()
        };
        let together = bits(attend(&queries, &sights, 0.3).unwrap().unwrap());
        let last = queries.try_index(3..).unwrap();
        let alone = bits(attend(&last, &sights[1..], 0.3).unwrap().unwrap());
        assert_eq!(alone, together[3 * 6 * 32..]);
    }

    #[test]
    fn what_does_not_fit_is_left_to_mlx() {
        let sight = Sight {
            rows: 2,
            past: past(10, 1),
        };
        let queries = normal(&[3, 6, 32], 2);
        assert!(
            attend(&queries, &[sight], 0.3).unwrap().is_none(),
            "a row of nobody"
        );
    }
}
