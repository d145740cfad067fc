//! What an operator sees: who is there, who holds what, how often it was restarted.

use serde::{Deserialize, Serialize};

use crate::{Epoch, FastSynch, KvFigures, Layout, LoadProgress, Rank, Transport};

/// The cluster as its head sees it now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterReport {
    /// Where clients reach the head, as a URL.
    pub api: String,
    pub epoch: Epoch,
    pub phase: Phase,
    /// Why the cluster is not ready, in words for an operator; empty when it is.
    pub detail: String,
    pub model: String,
    pub layout: Layout,
    pub transport: Transport,
    pub fast_synch: FastSynch,
    /// Positions that prompt and answer may fill together: fewer than were asked for where memory allows no
    /// more.
    pub context_tokens: u32,
    pub requests_running: u32,
    pub requests_queued: u32,
    pub nodes: Vec<NodeReport>,
    pub shards: Vec<ShardReport>,
    /// Those of each node, in the order of nodes, and behind them those of its shard.
    #[serde(default)]
    pub actors: Vec<ActorReport>,
}

/// How far the cluster is on its way to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Not every node has been heard of.
    Gathering,
    /// Shards start, meet and read their weights.
    Loading,
    Ready,
    /// A shard was given up, or the model cannot be held: an operator has to act.
    Failed,
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    pub name: String,
    /// 0 until the node has been heard of.
    pub pid: u32,
    pub alive: bool,
    /// Its shard has a share of the model in this epoch.
    pub in_use: bool,
}

/// One shard process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardReport {
    /// Nothing while its node is not in use. Those that have one come first, in its order.
    pub rank: Option<Rank>,
    pub node: String,
    /// 0 until the shard has registered.
    pub pid: u32,
    pub alive: bool,
    pub restarts: u32,
    /// Why it was restarted last; empty when it never was.
    pub last_failure: String,
    /// The last lines that the process which failed last wrote to its standard error.
    pub last_lines: Vec<String>,
    /// It failed too often: its node does not start it any more.
    pub given_up: bool,
    pub load: Option<LoadProgress>,
    /// What its caches hold now; nothing where it has not said so in time.
    #[serde(default)]
    pub kv: Option<KvFigures>,
    /// The way that its collectives take: `delegated`, `cpu-stream`, `mlx` or `alone`; empty until it
    /// has joined a group.
    pub collectives: String,
}

/// An actor that its process keeps, and what became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorReport {
    /// A node's name, or that of its shard, as in `node-1/shard-0`.
    pub process: String,
    pub name: String,
    /// How often it was made anew, within its process or with it.
    pub restarts: u32,
    /// How it ended last; empty when it never did.
    pub last_error: String,
    /// When that was, in seconds since 1970 by its own machine's clock.
    pub ended_at: Option<u64>,
    /// So many messages made their handler panic. None of them is handled again.
    pub dead_letters: u64,
    pub last_dead_letter: Option<DeadLetterReport>,
    /// It failed so often, or holds so much, that its process ended with it the last time.
    pub given_up: bool,
}

/// A message whose handler panicked. What it said is kept nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterReport {
    /// Its type.
    pub message: String,
    /// The words of the panic.
    pub cause: String,
}
