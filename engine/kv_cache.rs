//! Keys and values of one sequence, per layer. The cache is one buffer per layer that is updated in
//! place: MLX donates the old buffer to the update as long as nobody else holds it, so a step costs
//! the rows it adds, not the rows it has. What becomes of a cache when its sequence is gone is decided
//! in `prefix_cache`.

use std::collections::HashMap;

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::ops::{concatenate, zeros_dtype};
use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Dtype};
use offbook_protocol::SequenceId;

use crate::batch::{CacheMove, EntryId, Source};

/// The caches of the sequences that run.
pub(crate) type Caches = HashMap<SequenceId, SequenceCache>;

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

    /// The first `positions` by themselves, with room for `reserve`. One copy on the device, which begins
    /// at once: it must not wait for a step that needs it, and keep the memory that it is copied from.
    fn copy(&self, positions: usize, reserve: usize) -> Result<Self, Exception> {
        let copies = self.layers.iter().map(|l| l.copy(positions, reserve));
        let layers: Vec<LayerCache> = copies.collect::<Result<_, _>>()?;
        let arrays: Vec<&Array> = layers.iter().filter_map(|l| l.pairs.as_ref()).collect();
        if !arrays.is_empty() {
            async_eval(arrays)?;
        }
        Ok(Self { layers })
    }

    /// Gives up what is reserved behind these positions, if there is anything.
    fn trim(&mut self, reserve: usize) -> Result<(), Exception> {
        let capacity = |layer: &LayerCache| Some(layer.pairs.as_ref()?.dim(1) as usize);
        let is_larger = |layer: &LayerCache| capacity(layer).is_some_and(|have| have > reserve);
        if self.layers.iter().any(is_larger) {
            *self = self.copy(reserve, reserve)?;
        }
        Ok(())
    }
}

/// The caches of sequences that are gone.
#[derive(Debug, Default)]
pub(crate) struct KeptCaches {
    entries: HashMap<EntryId, SequenceCache>,
}

impl KeptCaches {
    /// Does one thing that the batch has decided; `running` are the caches of the sequences that run.
    ///
    /// # Errors
    /// When the device fails, or a cache is not there: the batch decides about none that was never made.
    pub(crate) fn carry_out(
        &mut self,
        to_do: CacheMove,
        running: &mut Caches,
    ) -> Result<(), Exception> {
        match to_do {
            CacheMove::Drop(sequence) => {
                running.remove(&sequence);
            }
            CacheMove::Retain { sequence, entry } => {
                let cache = running.remove(&sequence).ok_or_else(missing)?;
                self.entries.insert(entry, cache);
            }
            CacheMove::Trim { entry, reserve } => {
                let cache = self.entries.get_mut(&entry).ok_or_else(missing)?;
                cache.trim(reserve)?;
            }
            CacheMove::Evict(entry) => {
                self.entries.remove(&entry);
            }
            CacheMove::TakeOver {
                entry,
                sequence,
                reserve,
            } => {
                let mut cache = self.entries.remove(&entry).ok_or_else(missing)?;
                cache.trim(reserve)?;
                running.insert(sequence, cache);
            }
            CacheMove::Copy {
                from,
                sequence,
                positions,
                reserve,
            } => {
                let source = match from {
                    Source::Entry(entry) => self.entries.get(&entry),
                    Source::Sequence(other) => running.get(&other),
                };
                let copy = source.ok_or_else(missing)?.copy(positions, reserve)?;
                running.insert(sequence, copy);
            }
        }
        Ok(())
    }
}

fn missing() -> Exception {
    Exception::custom("a cache is not there that another sequence was to begin with")
}

/// Keys and values of one layer. Empty until the first rows come.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[2 × kv heads, capacity, head_dim]`: all heads' keys, then all heads' values.
    pairs: Option<Array>,
}

/// Keys and values of all positions up to the newest: each `[kv heads, positions, head_dim]`.
#[derive(Debug)]
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

    fn copy(&self, positions: usize, reserve: usize) -> Result<Self, Exception> {
        let Some(pairs) = &self.pairs else {
            return Ok(Self { pairs: None });
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
    #[test]
    fn a_copy_has_a_buffer_of_its_own() {
        let place = |start, reserve| Place { start, reserve };
        let mut cache = SequenceCache::new(2);
        cache.layers[0]
            .append(&rows(300, 1.0), place(0, 512))
            .unwrap();
        let mut copy = cache.copy(260, 512).unwrap();
        assert!(copy.layers[1].pairs.is_none(), "a layer without heads");
        let seen = copy.layers[0]
            .append(&rows(2, 2.0), place(260, 512))
            .unwrap();
        let column = |array: &Array| -> Vec<f32> {
            let column = array.try_index((1, .., 7)).unwrap().contiguous().unwrap();
            column.try_as_slice::<f32>().unwrap().to_vec()
        };
        assert_eq!(column(&seen.keys)[258..], [1.0, 1.0, 2.0, 2.0]);
        let seen = cache.layers[0]
            .append(&rows(1, 3.0), place(300, 512))
            .unwrap();
        assert_eq!(column(&seen.values)[259..][..3], [1.0; 3]);

        let capacity = |cache: &SequenceCache| cache.layers[0].pairs.as_ref().unwrap().dim(1);
        cache.trim(768).unwrap();
        assert_eq!(capacity(&cache), 512, "no more than it had");
        cache.trim(256).unwrap();
        assert_eq!(capacity(&cache), 256);
        let seen = cache.layers[0]
            .append(&rows(1, 4.0), place(255, 256))
            .unwrap();
        assert_eq!(column(&seen.keys)[254..], [1.0, 4.0]);
    }
}
