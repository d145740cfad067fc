//! A layer's cache as a list of blocks. To grow is to add one, to give up is to drop some, and whoever
//! begins with the same tokens holds the same arrays: nothing is copied but a block that two of them hold
//! and one of them writes to, which MLX does by itself, for it donates no array that somebody else holds.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::ops::zeros_dtype;

use crate::batch::KV_BLOCK_TOKENS;

/// All but the last are full.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// Each `[2 × kv heads, KV_BLOCK_TOKENS, width of a row]`, in order: all heads' keys, then all heads'
    /// values.
    blocks: Vec<Array>,
}

impl Blocks {
    pub(crate) fn arrays(&self) -> &[Array] {
        &self.blocks
    }

    /// See [`LayerCache::append`](super::LayerCache::append).
    pub(super) fn append(&mut self, rows: &Array, start: usize) -> Result<(), Exception> {
        let before = start.div_ceil(KV_BLOCK_TOKENS);
        if self.blocks.len() < before {
            return Err(Exception::custom("rows would leave a gap in their cache"));
        }
        self.blocks.truncate(before);
        let (n, heads, width) = (rows.dim(0) as usize, rows.dim(1), rows.dim(2));
        let by_head = rows.transpose_axes(&[1, 0, 2])?;
        let mut written = 0;
        while written < n {
            let first = (start + written) % KV_BLOCK_TOKENS;
            let count = (KV_BLOCK_TOKENS - first).min(n - written);
            let part = match count == n {
                true => by_head.clone(),
                false => by_head.try_index((.., range(written, count), ..))?,
            };
            let block = if count == KV_BLOCK_TOKENS {
                // By itself it would keep all rows of the step.
                part.contiguous()?
            } else {
                // Taken out of the list, so that nothing of ours keeps MLX from donating it.
                let held = (first > 0).then(|| self.blocks.pop()).flatten();
                let mut block = match held {
                    Some(block) => block,
                    None => zeros_dtype(&[heads, KV_BLOCK_TOKENS as i32, width], rows.dtype())?,
                };
                block.try_index_mut((.., range(first, count), ..), &part)?;
                block
            };
            self.blocks.push(block);
            written += count;
        }
        Ok(())
    }

    /// The same blocks, as far as the first `positions` reach.
    pub(super) fn share(&self, positions: usize) -> Self {
        let shared = positions.div_ceil(KV_BLOCK_TOKENS).min(self.blocks.len());
        Self {
            blocks: self.blocks[..shared].to_vec(),
        }
    }

    /// Gives up what lies behind so many positions, whole blocks.
    pub(super) fn trim(&mut self, positions: usize) {
        self.blocks.truncate(positions / KV_BLOCK_TOKENS);
    }
}

fn range(first: usize, count: usize) -> std::ops::Range<i32> {
    first as i32..(first + count) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: i32, value: f32) -> Array {
        Array::full::<f32>(&[n, 4, 8], Array::from_f32(value)).unwrap()
    }

    /// Where each block lies.
    fn places(blocks: &Blocks) -> Vec<*const f32> {
        let place = |block: &Array| {
            block.eval().unwrap();
            block.try_as_slice::<f32>().unwrap().as_ptr()
        };
        blocks.blocks.iter().map(place).collect()
    }

    /// A channel of the last head's values, at all positions that there is room for.
    fn column(blocks: &Blocks) -> Vec<f32> {
        let column = |block: &Array| {
            let column = block.try_index((3, .., 7)).unwrap();
            let column = column.contiguous().unwrap();
            column.try_as_slice::<f32>().unwrap().to_vec()
        };
        blocks.blocks.iter().flat_map(column).collect()
    }

    #[test]
    fn rows_stay_where_they_were_written_and_a_full_block_is_never_moved() {
        let mut blocks = Blocks::default();
        blocks.append(&rows(200, 1.0), 0).unwrap();
        let first = places(&blocks);
        blocks.append(&rows(700, 2.0), 200).unwrap();
        let then = places(&blocks);
        assert_eq!(then.len(), 4);
        assert_eq!(then[0], first[0], "written to in place");
        blocks.append(&rows(300, 3.0), 900).unwrap();
        assert_eq!(places(&blocks)[..4], then, "growth copies nothing");
        let column = column(&blocks);
        assert!(column[..200].iter().all(|value| *value == 1.0));
        assert!(column[200..900].iter().all(|value| *value == 2.0));
        assert!(column[900..1200].iter().all(|value| *value == 3.0));
    }

    #[test]
    fn who_begins_alike_holds_the_same_blocks_and_copies_the_one_that_it_writes_to() {
        let mut one = Blocks::default();
        one.append(&rows(700, 1.0), 0).unwrap();
        let of_one = places(&one);
        let mut other = one.share(600);
        assert_eq!(places(&other), of_one, "nothing is copied");
        other.append(&rows(20, 2.0), 600).unwrap();
        let of_other = places(&other);
        assert_eq!(of_other[..2], of_one[..2]);
        assert_ne!(of_other[2], of_one[2], "the last one is its own by now");
        assert_eq!(column(&other)[599..621], {
            let mut expected = vec![2.0; 22];
            (expected[0], expected[21]) = (1.0, 1.0);
            expected
        });
        assert_eq!(column(&one)[599..701][..101], [1.0; 101]);
        one.append(&rows(1, 3.0), 700).unwrap();
        assert_eq!(places(&one)[2], of_one[2], "nobody else holds it");
        assert_eq!(column(&one)[699..][..2], [1.0, 3.0]);
    }

    #[test]
    fn a_shared_block_is_not_changed_by_who_goes_on_from_before_its_end() {
        let mut one = Blocks::default();
        one.append(&rows(600, 1.0), 0).unwrap();
        let other = one.share(512);
        // As an entry that is taken over a little before its end.
        one.append(&rows(9, 2.0), 500).unwrap();
        assert_eq!(one.arrays().len(), 2, "what lay behind is gone");
        assert_eq!(
            column(&one)[499..509],
            [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        );
        assert!(column(&other).iter().all(|value| *value == 1.0));
    }

    #[test]
    fn to_give_up_blocks_is_to_drop_them() {
        let mut blocks = Blocks::default();
        blocks.append(&rows(600, 1.0), 0).unwrap();
        let all = places(&blocks);
        blocks.trim(1024);
        assert_eq!(places(&blocks), all, "no more than there are");
        blocks.trim(256);
        assert_eq!(places(&blocks), all[..1]);
        assert!(blocks.append(&rows(1, 2.0), 257).is_err(), "a gap");
        blocks.append(&rows(1, 2.0), 256).unwrap();
        assert_eq!(column(&blocks)[255..257], [1.0, 2.0]);
    }
}
