//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use offbook_protocol::{FastSynch, Layout, Transport};

/// Runs one large language model over a few machines.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  offbook up                                   three nodes on this machine, demo model
  offbook up --nodes 2 --model ~/models/MiniMax-M2.5-5bit
  offbook chat                                 talk to the cluster that runs here
  offbook generate --prompt 'What is 47 + 85?' --temperature 0
  offbook plan --nodes 3 --model DIR           who would own what, without loading anything

Logs go to standard error; OFFBOOK_LOG=info (or debug) says more.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a whole cluster on this machine, API included
    Up(Up),
    /// Run one node of a cluster of several machines
    Node(Node),
    /// Make the keys and the cluster file for several machines
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Talk to a running cluster
    Chat(Chat),
    /// Start a cluster, generate once, print the answer, stop
    Generate(Generate),
    /// Show who would own what, and how many bytes
    Plan(Plan),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// A shard process; started by its node, never by hand
    #[command(hide = true)]
    Shard(Shard),
}

/// Which model, and how it is divided.
#[derive(Clone, Debug, Args)]
pub(crate) struct Division {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) nodes: u32,
    /// Directory of a model in MLX format; without it, the demo model that is part of this program
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// How the model is divided: tensor (every layer), expert (the experts; attention on every node,
    /// one exchange per layer) or pipeline (some layers each)
    #[arg(long, default_value_t = Layout::Tensor, value_name = "LAYOUT")]
    pub(crate) parallel: Layout,
    /// Share of the model that each node takes, relative to the others, as in 2,1,1
    #[arg(long, value_name = "W,W,…", value_delimiter = ',')]
    pub(crate) weights: Vec<f64>,
    /// Positions that a sequence may reach, prompt included; the model's own limit if not given
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 0,
        hide_default_value = true
    )]
    pub(crate) context: u32,
}

/// What a cluster on this machine is made of.
#[derive(Clone, Debug, Args)]
pub(crate) struct LocalOptions {
    #[command(flatten)]
    pub(crate) division: Division,
    /// What carries tensors between shards: quic (ours, encrypted), shm (ours, memory of this
    /// machine), ring (MLX's own, plain TCP) or nccl (MLX's, on CUDA)
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// Keep collectives on the device's stream: auto (where it can), on (the same, with a warning
    /// where it cannot), off, require; without it OFFBOOK_FAST_SYNCH, EXO_FAST_SYNCH or
    /// MLX_METAL_FAST_SYNCH, else auto
    #[arg(long, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: Option<FastSynch>,
    /// Where keys, configuration and state are kept; without it, a folder that is removed at the end
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Requests that are worked on at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) local: LocalOptions,
    /// Where the API listens; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub(crate) http: SocketAddr,
    /// Print one line of JSON on standard output when the cluster is ready, and nothing else
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Node {
    /// The cluster file, equal on every node
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster: PathBuf,
    /// Which of its nodes this is
    #[arg(long)]
    pub(crate) name: String,
    /// Where this node keeps its key (identity.pem) and state
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// Directory of the model on this machine, if it is not where the cluster file says
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Where the API listens; only the head of the cluster, its first node, has one
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub(crate) http: SocketAddr,
    /// Stop when whoever started this process ends
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Shard {
    #[arg(long)]
    pub(crate) cluster: PathBuf,
    #[arg(long)]
    pub(crate) name: String,
    #[arg(long)]
    pub(crate) data_dir: PathBuf,
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Write cluster.toml and a key for every node
    Init(ClusterInit),
}

#[derive(Debug, Args)]
pub(crate) struct ClusterInit {
    /// The folder to write to; made if it is not there
    pub(crate) folder: PathBuf,
    /// A node and where it listens for the others (UDP); the first one is the head
    #[arg(long, required = true, value_name = "NAME=IP:PORT")]
    pub(crate) node: Vec<String>,
    /// Directory of the model, the same path on every node
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// How the model is divided: tensor (every layer), expert (the experts; attention on every node,
    /// one exchange per layer) or pipeline (some layers each)
    #[arg(long, default_value_t = Layout::Tensor, value_name = "LAYOUT")]
    pub(crate) parallel: Layout,
    /// What carries tensors between shards: quic, shm (all on one machine), ring or nccl
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// Keep collectives on the device's stream: auto (where it can), on, off or require
    #[arg(long, default_value_t = FastSynch::Auto, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: FastSynch,
}

#[derive(Debug, Args)]
pub(crate) struct Chat {
    /// The API of the cluster
    #[arg(long, default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub(crate) api: String,
    /// What the model is told before the conversation
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// 0 takes the most likely token; the model's own default if not given
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// How many tokens an answer may have
    #[arg(long)]
    pub(crate) max_tokens: Option<u32>,
}

impl From<Chat> for offbook_api::chat_client::ChatOptions {
    fn from(chat: Chat) -> Self {
        let Chat {
            api,
            system,
            temperature,
            max_tokens,
        } = chat;
        Self {
            api,
            model: None,
            system,
            temperature,
            max_tokens,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    pub(crate) local: LocalOptions,
    #[command(flatten)]
    pub(crate) input: GenerateInput,
    /// How many tokens to generate at most
    #[arg(long, default_value_t = 128, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: u32,
    /// Keep the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub(crate) top_p: f32,
    /// Keep tokens at least this times as likely as the most likely one
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub(crate) min_p: f32,
    /// The same seed draws the same tokens
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Report the log-probability of every token
    #[arg(long)]
    pub(crate) logprobs: bool,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object instead of the text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct GenerateInput {
    /// Text to continue; with the model's chat template it becomes a user's turn
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue, as they are
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub(crate) tokens: Option<Vec<u32>>,
}

#[derive(Debug, Args)]
pub(crate) struct Plan {
    #[command(flatten)]
    pub(crate) division: Division,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Decode speed of one node, of several, and of mlx-lm if Python has it
    Decode(BenchDecode),
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecode {
    /// Directory of a model in MLX format; without it, the demo model
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Numbers of nodes to compare
    #[arg(long, value_delimiter = ',', default_value = "1,3")]
    pub(crate) nodes: Vec<u32>,
    /// Tokens generated in each run
    #[arg(long, default_value_t = 200)]
    pub(crate) tokens: u32,
    /// Runs of each kind, taken in turn; the median is printed
    #[arg(long, default_value_t = 3)]
    pub(crate) runs: u32,
    /// What carries tensors between shards: quic, shm, ring or nccl
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// A Python with mlx-lm, to compare with `mlx_lm.generate`
    #[arg(long, value_name = "FILE")]
    pub(crate) python: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
