//! Keys and values of one sequence, per layer: in blocks that sequences share where our own kernel reads
//! them (`blocks`), else in one buffer, as MLX's kernels want them (`buffer`). Either is updated in place:
//! MLX donates an array to its update as long as nobody else holds it, so a step costs the rows it adds,
//! not the rows it has. What becomes of a cache when its sequence is gone is decided in `prefix_cache`.

mod blocks;
mod buffer;
mod coding;

use std::collections::HashMap;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::transforms::async_eval;
use offbook_protocol::SequenceId;

use crate::batch::{CacheMove, EntryId, Source};

pub(crate) use self::blocks::Blocks;
pub(crate) use self::buffer::{Buffer, KeysAndValues};
pub(crate) use self::coding::Coding;

/// The caches of the sequences that run.
pub(crate) type Caches = HashMap<SequenceId, SequenceCache>;

/// What one sequence keeps on this rank: one cache for each layer that the rank owns.
#[derive(Debug)]
pub(crate) struct SequenceCache {
    pub(crate) layers: Vec<LayerCache>,
}

impl SequenceCache {
    pub(crate) fn new(layers: usize, placement: Placement) -> Self {
        let layer = |_| match placement {
            Placement::Blocks => LayerCache::Blocks(Blocks::default()),
            Placement::OneBuffer => LayerCache::OneBuffer(Buffer::default()),
        };
        Self {
            layers: (0..layers).map(layer).collect(),
        }
    }

    /// The first `positions` by themselves, with room for `reserve`. Of a buffer it is one copy on the
    /// device, which begins at once: it must not wait for a step that needs it, and keep the memory that it
    /// is copied from.
    fn copy(&self, positions: usize, reserve: usize) -> Result<Self, Exception> {
        let copy = |layer: &LayerCache| {
            Ok::<_, Exception>(match layer {
                LayerCache::Blocks(blocks) => LayerCache::Blocks(blocks.share(positions)),
                LayerCache::OneBuffer(buffer) => {
                    LayerCache::OneBuffer(buffer.copy(positions, reserve)?)
                }
            })
        };
        let layers: Vec<LayerCache> = self.layers.iter().map(copy).collect::<Result<_, _>>()?;
        begin(&layers)?;
        Ok(Self { layers })
    }

    /// Gives up what is reserved behind these positions, if there is anything.
    fn trim(&mut self, reserve: usize) -> Result<(), Exception> {
        let mut copies = false;
        for layer in &mut self.layers {
            match layer {
                LayerCache::Blocks(blocks) => blocks.trim(reserve),
                LayerCache::OneBuffer(buffer) if buffer.capacity() > reserve => {
                    *buffer = buffer.copy(reserve, reserve)?;
                    copies = true;
                }
                LayerCache::OneBuffer(_) => {}
            }
        }
        match copies {
            true => begin(&self.layers),
            false => Ok(()),
        }
    }
}

/// Begins to compute what was copied.
fn begin(layers: &[LayerCache]) -> Result<(), Exception> {
    let arrays: Vec<&Array> = layers
        .iter()
        .filter_map(|layer| match layer {
            LayerCache::Blocks(_) => None,
            LayerCache::OneBuffer(buffer) => buffer.array(),
        })
        .collect();
    match arrays.is_empty() {
        true => Ok(()),
        false => async_eval(arrays),
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

/// Where a rank's caches lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// For our own kernel, which reads them from wherever they are.
    Blocks,
    /// For MLX's kernels.
    OneBuffer,
}

/// Keys and values of one layer. Empty until the first rows come.
#[derive(Debug)]
pub(crate) enum LayerCache {
    Blocks(Blocks),
    OneBuffer(Buffer),
}

/// Where new rows go, and the positions that a buffer is to have: whole blocks, as the batch counts
/// them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) start: usize,
    pub(crate) reserve: usize,
}

impl LayerCache {
    /// Writes `rows` (`[n, 2 × kv heads, head_dim]`, or as many words where they are coded) to positions `start..start + n`. What was behind them is
    /// not looked at any more.
    pub(crate) fn append(&mut self, rows: &Array, place: Place) -> Result<(), Exception> {
        match self {
            Self::Blocks(blocks) => blocks.append(rows, place.start),
            Self::OneBuffer(buffer) => buffer.append(rows, place),
        }
    }
}
