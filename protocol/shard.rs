//! How a shard comes to hold its share of a model, and to know its peers.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Epoch, KvBits, Rank};

/// What one shard loads. Every rank of an epoch is given the same, but for its rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardSpec {
    pub epoch: Epoch,
    pub rank: Rank,
    /// The model's directory, on this shard's own machine.
    pub model: PathBuf,
    pub layout: Layout,
    /// One per rank, in rank order: the same list on every rank, so that all solve the same
    /// partition.
    pub weights: Vec<NodeWeight>,
    pub transport: Transport,
    pub fast_synch: FastSynch,
    /// Prompt tokens that one step prefills at most.
    pub prefill_chunk_tokens: u32,
    /// Positions that a sequence may reach, prompt included.
    pub context_tokens: u32,
    /// Sequences that are worked on at the same time at most.
    pub sequences_max: u32,
    /// Positions that the caches of all sequences hold together, the same on every rank. `None`: as
    /// many as `sequences_max` sequences of the full context need.
    pub kv_tokens: Option<u32>,
    /// In how many bits these caches keep keys and values.
    pub kv_bits: KvBits,
    /// Whether what a sequence has computed is kept for those that begin with the same tokens.
    pub prefix_cache: bool,
    /// In the pipeline layout: how many groups of sequences are on their way through the stages, each in
    /// steps of its own; `None` for one per stage.
    pub micro_batches: Option<NonZeroU32>,
    /// How long a collective may take.
    pub collective_deadline: Duration,
}

impl ShardSpec {
    /// Positions that the caches of all sequences hold together.
    pub fn kv_tokens(&self) -> u32 {
        let full = self.context_tokens.saturating_mul(self.sequences_max);
        self.kv_tokens.unwrap_or(full.max(self.context_tokens))
    }

    /// How many of these the caches of sequences that are gone may hold while nobody needs them: all,
    /// where somebody said how many there are to be, for then they were found to fit the memory.
    pub fn retained_tokens(&self) -> u32 {
        match (self.prefix_cache, self.kv_tokens) {
            (false, _) => 0,
            (true, Some(kv_tokens)) => kv_tokens,
            (true, None) => self.kv_tokens().min(RETAINED_TOKENS_DEFAULT),
        }
    }
}

/// How much of the model a node takes, relative to the others. Only ratios matter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeWeight(pub f64);

/// How a model is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Every rank holds a part of every layer.
    Tensor,
    /// Every rank holds all of attention and a part of every expert: one exchange per layer.
    Expert,
    /// Every rank holds some of the layers, whole.
    Pipeline,
}

/// What carries the tensors between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Ours: encrypted, direct between every pair, every wait bounded.
    Quic,
    /// Ours, between shards of one host: memory that they share.
    #[serde(rename = "shm")]
    SharedMemory,
    /// MLX's own ring over plain TCP.
    Ring,
    /// MLX over NCCL, on CUDA.
    Nccl,
    /// MLX over RDMA through Thunderbolt, between Macs.
    Jaccl,
}

impl Transport {
    /// Whether it is MLX's own: without deadlines, and left by ending the process.
    pub fn is_of_mlx(self) -> bool {
        matches!(self, Self::Ring | Self::Nccl | Self::Jaccl)
    }
}

/// Whether collectives stay on the device's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FastSynch {
    /// Where the device can; else they go over the CPU stream.
    #[default]
    Auto,
    /// The same, and a warning says so where the device cannot.
    On,
    /// They go over the CPU stream.
    Off,
    /// A device that cannot is an error.
    Require,
}

/// Everything a shard needs to meet its peers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    pub epoch: Epoch,
    pub rank: Rank,
    /// In rank order, this shard included.
    pub members: Vec<GroupMember>,
    /// Positions that the caches of all sequences hold together: what every rank has memory for.
    pub kv_tokens: u32,
}

/// Where one rank can be met.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupMember {
    pub process: String,
    /// Of its tensor endpoint: UDP for `quic` and `jaccl`, TCP for `ring` and `nccl`; for `shm` a port that
    /// nobody else on the host had when the epoch began.
    pub address: SocketAddr,
    /// For `jaccl`: the RDMA device that leads from here to each rank, in rank order, where the cluster
    /// file names one.
    pub rdma: Vec<Option<String>>,
}

/// How far a shard has come in reading its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadProgress {
    pub rank: Rank,
    pub bytes_loaded: u64,
    pub bytes_total: u64,
}

/// A word of the command line or the configuration that names nothing we know.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown {what} '{given}': one of {known}")]
pub struct UnknownName {
    pub what: &'static str,
    pub given: String,
    pub known: &'static str,
}

macro_rules! named {
    ($type:ident, $what:literal, $known:literal, $($name:literal => $variant:ident),+) => {
        impl FromStr for $type {
            type Err = UnknownName;

            fn from_str(given: &str) -> Result<Self, UnknownName> {
                match given {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(UnknownName { what: $what, given: given.to_owned(), known: $known }),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name,)+ })
            }
        }
    };
}

named!(Layout, "layout", "tensor, expert, pipeline",
    "tensor" => Tensor, "expert" => Expert, "pipeline" => Pipeline);
named!(Transport, "transport", "quic, shm, ring, nccl, jaccl",
    "quic" => Quic, "shm" => SharedMemory, "ring" => Ring, "nccl" => Nccl, "jaccl" => Jaccl);
named!(FastSynch, "fast_synch", "auto, on, off, require", "auto" => Auto, "on" => On, "off" => Off, "require" => Require);

/// What is kept where nobody said how much the caches may hold, and so nobody checked that it fits: 4 GB of
/// MiniMax-M2.5 in 16 bits, over all ranks, which is little beside its weights.
const RETAINED_TOKENS_DEFAULT: u32 = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_errors_say_what_is_known() {
        for layout in [Layout::Tensor, Layout::Expert, Layout::Pipeline] {
            assert_eq!(layout.to_string().parse(), Ok(layout));
        }
        let error = "tcp".parse::<Transport>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown transport 'tcp': one of quic, shm, ring, nccl, jaccl"
        );
    }

    #[test]
    fn kept_caches_take_only_memory_that_somebody_measured_or_little() {
        let spec = |kv_tokens, prefix_cache| ShardSpec {
            epoch: Epoch(1),
            rank: Rank(0),
            model: PathBuf::new(),
            layout: Layout::Tensor,
            weights: vec![NodeWeight(1.0)],
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            prefill_chunk_tokens: 256,
            context_tokens: 196_608,
            sequences_max: 16,
            kv_tokens,
            kv_bits: KvBits::AsComputed,
            prefix_cache,
            micro_batches: None,
            collective_deadline: Duration::from_secs(1),
        };
        assert_eq!(spec(Some(65_536), true).retained_tokens(), 65_536);
        assert_eq!(spec(None, true).retained_tokens(), RETAINED_TOKENS_DEFAULT);
        assert_eq!(spec(Some(65_536), false).retained_tokens(), 0);
    }
}
