//! Causal attention of all sequences of a step over their caches, straight from the blocks where these lie:
//! nothing is copied, repeated for the heads of a group, or computed for what a query does not see.
#![allow(unsafe_code)]

mod kernel;

use std::ffi::c_void;
use std::slice;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

use self::kernel::Look;
use crate::batch::KV_BLOCK_TOKENS;
use crate::host::processor::LANES;
use crate::host::{crew, is_on_cpu};
use crate::kv_cache::{Blocks, Coding};

/// Whether [`attend`] is for heads of this width: on another device, and for types other than 32-bit floats,
/// it is MLX that attends.
pub(crate) fn attends(width: usize, dtype: Dtype) -> bool {
    is_on_cpu() && dtype == Dtype::Float32 && attends_heads_of(width)
}

/// Whether heads are so wide that a CPU attends with [`attend`], which keeps no scores.
pub(crate) fn attends_heads_of(width: usize) -> bool {
    width.is_multiple_of(LANES)
}

/// How scores come of what is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    /// Of the products of queries and keys.
    pub(crate) scale: f32,
    /// Of the caches, if they are coded.
    pub(crate) coding: Option<Coding>,
}

/// What some rows of a step look at: those of one sequence.
#[derive(Debug)]
pub(crate) struct Sight<'a> {
    /// How many there are. The last sees all positions of `past`, each before it one less.
    pub(crate) rows: usize,
    pub(crate) positions: usize,
    pub(crate) past: &'a Blocks,
}

/// `queries` `[rows, heads, head_dim]`, of which each sight has its own, in order → `[rows, heads ×
/// head_dim]`; heads share keys in groups of neighbours.
///
/// # Errors
/// When the arrays do not fit each other, or are none that [`attends`] speaks of.
pub(crate) fn attend(
    queries: &Array,
    sights: &[Sight<'_>],
    reading: Reading,
) -> Result<Array, Exception> {
    let sizes: Option<Vec<RawAttention>> = sights
        .iter()
        .map(|sight| RawAttention::of(queries, sight, reading))
        .collect();
    let all_rows: usize = sights.iter().map(|sight| sight.rows).sum();
    let fits = all_rows > 0 && all_rows == queries.dim(0) as usize;
    let Some(sizes) = sizes.filter(|_| fits) else {
        return Err(Exception::custom(
            "queries and caches do not fit each other",
        ));
    };
    let blocks = sights.iter().zip(&sizes).flat_map(|(sight, size)| {
        let seen = size.positions.div_ceil(size.block_positions);
        &sight.past.arrays()[..seen]
    });
    let blocks: Vec<*const c_void> = blocks
        .map(|array| array.as_ptr().ctx.cast_const())
        .collect();
    let stream = Stream::thread_local_or_default();
    // SAFETY: all handles are alive during the call, the shim shares what it keeps; there are as many blocks
    // as the positions of the sizes take, which are those of the arrays; and what comes back is an array of
    // ours alone.
    unsafe {
        let ctx = offbook_attention_new(
            sizes.as_ptr(),
            sizes.len(),
            run,
            queries.as_ptr().ctx.cast_const(),
            blocks.as_ptr(),
            stream.as_ptr().ctx.cast_const(),
        );
        if ctx.is_null() {
            return Err(Exception::custom("no memory for attention"));
        }
        Ok(Array::from_ptr(mlx_sys::mlx_array { ctx }))
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
    crew::share(looks.chunks_mut(size).collect(), kernel::attend);
}

/// More than one, so that a thread that is held up is not waited for; rows late in a prompt see more than
/// early ones.
const PIECES_PER_HAND: usize = 4;

/// `offbook_attention` in host.h.
#[repr(C)]
struct RawAttention {
    queries: *const f32,
    blocks: *const *const u32,
    out: *mut f32,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    positions: usize,
    width: usize,
    block_positions: usize,
    row_words: usize,
    group_size: usize,
    scale: f32,
}

// SAFETY: it points to arrays that nobody changes while they are looked at; the output is handed out in
// slices that do not overlap, and not through these pointers.
unsafe impl Sync for RawAttention {}

impl RawAttention {
    /// The sizes alone, if these fit each other.
    fn of(queries: &Array, sight: &Sight<'_>, reading: Reading) -> Option<Self> {
        let &[_, heads, width] = queries.shape() else {
            return None;
        };
        let blocks = sight.past.arrays();
        let &[pairs, block_positions, row_words] = blocks.first()?.shape() else {
            return None;
        };
        let (words, dtype) = match reading.coding {
            Some(coding) => (coding.words(), Dtype::Uint32),
            None => (width as usize, Dtype::Float32),
        };
        let alike = |block: &Array| {
            block.shape() == [pairs, block_positions, row_words] && block.dtype() == dtype
        };
        let fits = attends(width as usize, queries.dtype())
            && blocks.iter().all(alike)
            && block_positions as usize == KV_BLOCK_TOKENS
            && row_words as usize == words
            && pairs >= 2
            && heads % (pairs / 2) == 0
            && sight.positions <= blocks.len() * KV_BLOCK_TOKENS
            && (1..=sight.positions).contains(&sight.rows);
        fits.then(|| Self {
            queries: std::ptr::null(),
            blocks: std::ptr::null(),
            out: std::ptr::null_mut(),
            rows: sight.rows,
            heads: heads as usize,
            kv_heads: pairs as usize / 2,
            positions: sight.positions,
            width: width as usize,
            block_positions: KV_BLOCK_TOKENS,
            row_words: words,
            group_size: reading.coding.map_or(0, Coding::group_size),
            scale: reading.scale,
        })
    }

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

    /// The rows of one head in one block, keys' heads before values', from the first position on.
    #[inline(always)]
    fn rows_of(&self, head: usize, block: usize, positions: usize) -> &[u32] {
        let offset = head * self.block_positions * self.row_words;
        // SAFETY: only asked for heads and positions that there are; see `run`.
        unsafe {
            let block = *self.blocks.add(block);
            slice::from_raw_parts(block.add(offset), positions * self.row_words)
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
        blocks: *const *const c_void,
        stream: *const c_void,
    ) -> *mut c_void;
}

#[cfg(test)]
mod tests {
    use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
    use mlx_rs::ops::indexing::TryIndexOp;
    use mlx_rs::random;

    use super::*;
    use crate::kv_cache::{LayerCache, Place, Placement, SequenceCache};

    const PLAIN: Reading = Reading {
        scale: 0.3,
        coding: None,
    };

    fn normal(shape: &[i32], seed: u64) -> Array {
        let key = random::key(seed).unwrap();
        random::normal::<f32>(shape, None, None, Some(&key)).unwrap()
    }

    /// `[rows, heads × width]`, by MLX's own kernel. `rows` is `[positions, 2 × kv heads, width]`.
    fn by_mlx(queries: &Array, rows: &Array, scale: f32) -> Array {
        let (by_head, half) = (rows.transpose_axes(&[1, 0, 2]).unwrap(), rows.dim(1) / 2);
        let batched = queries.transpose_axes(&[1, 0, 2]).unwrap();
        let attended = scaled_dot_product_attention(
            batched.expand_dims(0).unwrap(),
            by_head.try_index(..half).unwrap().expand_dims(0).unwrap(),
            by_head.try_index(half..).unwrap().expand_dims(0).unwrap(),
            scale,
            Some(ScaledDotProductAttentionMask::Causal),
            None,
        );
        let attended = attended.unwrap().squeeze_axes(&[0]).unwrap();
        let attended = attended.transpose_axes(&[1, 0, 2]).unwrap();
        attended.reshape(&[queries.dim(0), -1]).unwrap()
    }

    /// One sequence's keys and values, as rows and in blocks that were filled in steps of so many.
    struct Past {
        rows: Array,
        blocks: LayerCache,
    }

    impl Past {
        fn new(positions: i32, seed: u64, step: usize) -> Self {
            let rows = normal(&[positions, 6, 32], seed);
            let mut blocks = SequenceCache::new(1, Placement::Blocks).layers.remove(0);
            for start in (0..positions as usize).step_by(step) {
                let end = (start + step).min(positions as usize) as i32;
                let some = rows.try_index(start as i32..end).unwrap();
                blocks.append(&some, Place { start, reserve: 0 }).unwrap();
            }
            Self { rows, blocks }
        }

        fn seen_by(&self, rows: usize) -> Sight<'_> {
            let LayerCache::Blocks(past) = &self.blocks else {
                unreachable!()
            };
            let positions = self.rows.dim(0) as usize;
            Sight {
                rows,
                positions,
                past,
            }
        }
    }

    fn bits(array: &Array) -> Vec<u32> {
        let array = array.contiguous().unwrap();
        let values = array.try_as_slice::<f32>().unwrap();
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn each_sequence_gets_what_mlx_gives_it_alone() {
        // The last one alone is worth more than one thread.
        let lengths = [(1, 37), (37, 37), (5, 300), (1, 1), (2, 512), (300, 1800)];
        let pasts = (1..)
            .zip(&lengths)
            .map(|(seed, &(_, positions))| Past::new(positions, seed, 130));
        let pasts: Vec<Past> = pasts.collect();
        let sights = pasts.iter().zip(&lengths);
        let sights: Vec<Sight> = sights
            .map(|(past, &(rows, _))| past.seen_by(rows))
            .collect();
        let count: usize = sights.iter().map(|sight| sight.rows).sum();
        let queries = normal(&[count as i32, 6, 32], 9);
        let together = attend(&queries, &sights, PLAIN).unwrap();
        assert_eq!(together.shape(), [count as i32, 6 * 32]);
        let mut first = 0;
        for (sight, past) in sights.iter().zip(&pasts) {
            let end = first + sight.rows as i32;
            let own = queries.try_index(first..end).unwrap();
            let theirs = by_mlx(&own, &past.rows, 0.3);
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
        let pasts = [Past::new(700, 4, 700), Past::new(900, 4, 900)];
        let sights = [pasts[0].seen_by(3), pasts[1].seen_by(1)];
        let queries = normal(&[4, 6, 32], 5);
        let together = bits(&attend(&queries, &sights, PLAIN).unwrap());
        let last = queries.try_index(3..).unwrap();
        let alone = bits(&attend(&last, &sights[1..], PLAIN).unwrap());
        assert_eq!(alone, together[3 * 6 * 32..]);
    }

    #[test]
    fn however_a_cache_was_filled_a_row_is_the_same() {
        let queries = normal(&[1, 6, 32], 5);
        let of = |step| {
            let past = Past::new(600, 4, step);
            bits(&attend(&queries, &[past.seen_by(1)], PLAIN).unwrap())
        };
        let at_once = of(600);
        for step in [1, 100, 256] {
            assert_eq!(of(step), at_once, "{step} at a time");
        }
    }

    /// Blocks of codes, and what they stand for.
    fn coded(width: i32, positions: i32, seed: u64) -> (Coding, Past) {
        let coding = Coding::of(width as usize, Dtype::Float32).unwrap();
        let packed = coding.pack(&normal(&[positions, 6, width], seed)).unwrap();
        let mut blocks = SequenceCache::new(1, Placement::Blocks).layers.remove(0);
        let place = Place {
            start: 0,
            reserve: 0,
        };
        blocks.append(&packed, place).unwrap();
        let rows = coding.unpack(&packed).unwrap();
        (coding, Past { rows, blocks })
    }

    #[test]
    fn codes_are_read_as_what_they_stand_for_in_any_company() {
        for width in [32, 64, 96, 128] {
            let (coding, past) = coded(width, 600, 3);
            let (_, other) = coded(width, 40, 4);
            let reading = Reading {
                coding: Some(coding),
                ..PLAIN
            };
            let queries = normal(&[9, 6, width], 5);
            let sights = [past.seen_by(5), other.seen_by(4)];
            let together = attend(&queries, &sights, reading).unwrap();
            let own = queries.try_index(..5).unwrap();
            let theirs = by_mlx(&own, &past.rows, 0.3);
            let ours = together.try_index(..5).unwrap();
            assert!(ours.all_close(theirs, 1e-4, 1e-4, None).unwrap(), "{width}");
            let last = queries.try_index(8..).unwrap();
            let alone = attend(&last, &[other.seen_by(1)], reading).unwrap();
            assert_eq!(bits(&alone), bits(&together.try_index(8..).unwrap()));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let past = Past::new(10, 1, 10);
        let queries = normal(&[3, 6, 32], 2);
        let refused = |sight| attend(&queries, &[sight], PLAIN).is_err();
        assert!(refused(past.seen_by(2)), "a row of nobody");
        assert!(!refused(past.seen_by(3)));
        let further = Sight {
            positions: 257,
            ..past.seen_by(3)
        };
        assert!(refused(further), "positions that there are not");
    }
}
