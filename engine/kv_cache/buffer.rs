//! A layer's cache as one buffer, as MLX's attention kernels want it. It has the positions that the batch has
//! granted, so that what is counted is what there is; a growth copies it.

use std::ops::Range;

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::ops::{concatenate, zeros_dtype};
use mlx_rs::{Array, Dtype};

use super::{Coding, Place};

#[derive(Debug, Default)]
pub(crate) struct Buffer {
    /// `[2 × kv heads, capacity, width of a row]`: all heads' keys, then all heads' values.
    pairs: Option<Array>,
}

/// Keys and values of all positions up to the newest: each `[kv heads, positions, head_dim]`.
#[derive(Debug)]
pub(crate) struct KeysAndValues {
    pub(crate) keys: Array,
    pub(crate) values: Array,
}

impl Buffer {
    pub(super) fn array(&self) -> Option<&Array> {
        self.pairs.as_ref()
    }

    /// Positions that there is room for.
    pub(super) fn capacity(&self) -> usize {
        self.pairs.as_ref().map_or(0, |pairs| pairs.dim(1) as usize)
    }

    /// See [`LayerCache::append`](super::LayerCache::append).
    pub(super) fn append(&mut self, rows: &Array, place: Place) -> Result<(), Exception> {
        let (n, heads, width) = (rows.dim(0), rows.dim(1), rows.dim(2));
        let start = place.start as i32;
        let end = start + n;
        let by_head = rows.transpose_axes(&[1, 0, 2])?;
        let mut pairs = self.room(&[heads, end, width], place, rows.dtype())?;
        pairs.try_index_mut((.., start..end, ..), &by_head)?;
        self.pairs = Some(pairs);
        Ok(())
    }

    /// What is at the first `positions`, unpacked where rows are coded.
    ///
    /// # Errors
    /// When nothing was written.
    pub(crate) fn past(
        &self,
        positions: usize,
        coding: Option<Coding>,
    ) -> Result<KeysAndValues, Exception> {
        let pairs = self.pairs.as_ref();
        let pairs = pairs.ok_or_else(|| Exception::custom("a cache is read before it has rows"))?;
        let (heads, end) = (pairs.dim(0), positions as i32);
        let part = |heads: Range<i32>| {
            let part = pairs.try_index((heads, ..end, ..))?;
            match coding {
                Some(coding) => coding.unpack(&part),
                None => Ok(part),
            }
        };
        Ok(KeysAndValues {
            keys: part(0..heads / 2)?,
            values: part(heads / 2..heads)?,
        })
    }

    /// The first `positions` by themselves, with room for `reserve`.
    pub(super) fn copy(&self, positions: usize, reserve: usize) -> Result<Self, Exception> {
        let Some(pairs) = &self.pairs else {
            return Ok(Self::default());
        };
        let (heads, width, end) = (pairs.dim(0), pairs.dim(2), positions as i32);
        let mut copy = zeros_dtype(&[heads, reserve as i32, width], pairs.dtype())?;
        // A slice by itself would keep the whole buffer.
        let prefix = pairs.try_index((.., ..end, ..))?;
        copy.try_index_mut((.., ..end, ..), &prefix)?;
        Ok(Self { pairs: Some(copy) })
    }

    /// The buffer, grown when `needed` (`[heads, positions, width]`) does not fit. The handle is
    /// taken out of `self`, so that nothing keeps MLX from donating it.
    fn room(&mut self, needed: &[i32; 3], place: Place, dtype: Dtype) -> Result<Array, Exception> {
        let [heads, positions, width] = *needed;
        let held = self.pairs.take();
        let wanted = positions.max(place.reserve as i32);
        let Some(pairs) = held else {
            return zeros_dtype(&[heads, wanted, width], dtype);
        };
        let capacity = pairs.dim(1);
        if capacity >= positions {
            return Ok(pairs);
        }
        let room = zeros_dtype(&[heads, wanted - capacity, width], dtype)?;
        concatenate(&[pairs, room], 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: i32, value: f32) -> Array {
        Array::full::<f32>(&[n, 4, 8], Array::from_f32(value)).unwrap()
    }

    fn column(array: &Array) -> Vec<f32> {
        let column = array.try_index((1, .., 7)).unwrap().contiguous().unwrap();
        column.try_as_slice::<f32>().unwrap().to_vec()
    }

    #[test]
    fn rows_stay_where_they_were_written_through_growth() {
        let mut cache = Buffer::default();
        let place = |start, reserve| Place { start, reserve };
        cache.append(&rows(200, 1.0), place(0, 256)).unwrap();
        assert_eq!(cache.capacity(), 256);
        cache.append(&rows(56, 2.0), place(200, 256)).unwrap();
        cache.append(&rows(1, 3.0), place(256, 512)).unwrap();
        assert_eq!(cache.capacity(), 512);
        let seen = cache.past(257, None).unwrap();
        assert_eq!(seen.keys.shape(), [2, 257, 8]);
        let column = column(&seen.values);
        assert_eq!((column[0], column[199]), (1.0, 1.0));
        assert_eq!((column[200], column[255], column[256]), (2.0, 2.0, 3.0));
    }

    #[test]
    fn a_copy_has_a_buffer_of_its_own() {
        let place = |start, reserve| Place { start, reserve };
        let mut cache = Buffer::default();
        cache.append(&rows(300, 1.0), place(0, 512)).unwrap();
        let mut copy = cache.copy(260, 512).unwrap();
        copy.append(&rows(2, 2.0), place(260, 512)).unwrap();
        let seen = copy.past(262, None).unwrap();
        assert_eq!(column(&seen.keys)[258..], [1.0, 1.0, 2.0, 2.0]);
        cache.append(&rows(1, 3.0), place(300, 512)).unwrap();
        let seen = cache.past(301, None).unwrap();
        assert_eq!(column(&seen.values)[259..][..3], [1.0; 3]);

        let nothing = Buffer::default().copy(5, 256).unwrap();
        assert!(nothing.pairs.is_none(), "a layer without heads");
        let mut cache = cache.copy(256, 256).unwrap();
        assert_eq!(cache.capacity(), 256);
        cache.append(&rows(1, 4.0), place(255, 256)).unwrap();
        assert_eq!(
            column(&cache.past(256, None).unwrap().keys)[254..],
            [1.0, 4.0]
        );
    }
}
