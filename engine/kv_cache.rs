//! Keys and values of one sequence, per layer. The cache is one buffer per layer that is updated in
//! place: MLX donates the old buffer to the update as long as nobody else holds it, so a step costs
//! the rows it adds, not the rows it has.

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::ops::{concatenate, zeros_dtype};
use mlx_rs::{Array, Dtype};

/// What one sequence keeps on this rank: one cache for each layer that the rank owns.
#[derive(Debug)]
pub(crate) struct SequenceCache {
    pub(crate) layers: Vec<LayerCache>,
}

impl SequenceCache {
    pub(crate) fn new(layers: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| LayerCache { pairs: None }).collect(),
        }
    }
}

/// Keys and values of one layer. Empty until the first rows come.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[2 × kv heads, capacity, head_dim]`: all heads' keys, then all heads' values.
    pairs: Option<Array>,
}

/// Keys and values of all positions up to the newest: each `[kv heads, positions, head_dim]`.
pub(crate) struct KeysAndValues {
    pub(crate) keys: Array,
    pub(crate) values: Array,
}

/// Where new rows go, and the positions that the buffer is to have: whole blocks, as the batch counts
/// them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) start: usize,
    pub(crate) reserve: usize,
}

impl LayerCache {
    /// Writes `rows` (`[n, 2 × kv heads, head_dim]`) to positions `start..start + n`.
    pub(crate) fn append(
        &mut self,
        rows: &Array,
        place: Place,
    ) -> Result<KeysAndValues, Exception> {
        let (n, heads, width) = (rows.dim(0), rows.dim(1), rows.dim(2));
        let start = place.start as i32;
        let end = start + n;
        let by_head = rows.transpose_axes(&[1, 0, 2])?;
        let mut pairs = self.room(&[heads, end, width], place, rows.dtype())?;
        pairs.try_index_mut((.., start..end, ..), &by_head)?;
        let keys = pairs.try_index((..heads / 2, ..end, ..))?;
        let values = pairs.try_index((heads / 2.., ..end, ..))?;
        self.pairs = Some(pairs);
        Ok(KeysAndValues { keys, values })
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

    #[test]
    fn rows_stay_where_they_were_written_through_growth() {
        let mut cache = LayerCache { pairs: None };
        let place = |start, reserve| Place { start, reserve };
        cache.append(&rows(200, 1.0), place(0, 256)).unwrap();
        assert_eq!(cache.pairs.as_ref().unwrap().dim(1), 256);
        cache.append(&rows(56, 2.0), place(200, 256)).unwrap();
        let seen = cache.append(&rows(1, 3.0), place(256, 512)).unwrap();
        assert_eq!(cache.pairs.as_ref().unwrap().dim(1), 512);
        assert_eq!(seen.keys.shape(), [2, 257, 8]);
        let column = seen.values.try_index((1, .., 7)).unwrap();
        let column = column.contiguous().unwrap();
        let column = column.try_as_slice::<f32>().unwrap();
        assert_eq!((column[0], column[199]), (1.0, 1.0));
        assert_eq!((column[200], column[255], column[256]), (2.0, 2.0, 3.0));
    }
}
