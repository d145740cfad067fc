//! What can be typed.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use offbook_actors::WindowSettings;
use offbook_api::Origin;
use offbook_protocol::{FastSynch, KvBits, Layout, Transport};
use serde::{Deserialize, Serialize};

use crate::bench::ranks::Collectives;
use crate::bench::wire::Wire;
use crate::byte_size::ByteSize;
use crate::settings::Setting;
use crate::stress::{Blow, Target};

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
  offbook doctor                               does this machine do what a cluster needs

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
    /// Show the state of a running cluster: nodes, shards, actors, epoch, restarts, last failures
    Status(Status),
    /// Kill or freeze shards of a cluster on this machine while it answers, and compare every answer.
    /// Exit code 0 only if no token was lost, doubled or wrong
    Stress(Stress),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check this machine: collectives, late ranks, speed. Exit code 0 only if all is well
    Doctor(Doctor),
    /// One rank of a measurement; started by `bench` and `doctor`, never by hand
    #[command(hide = true)]
    Rank(Rank),
    /// The far process of `bench message`; started by it, never by hand
    #[command(hide = true)]
    Callee(Callee),
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
    /// one exchange per layer), pipeline (some layers each), or auto: what is fastest by the numbers
    /// below, which are measured here where they are not given. Without it, pipeline where nodes share
    /// the cores of this machine, else tensor
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) parallel: Option<Parallel>,
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
    /// In how many bits caches keep keys and values: 8, which takes a half to a quarter of the memory and
    /// changes answers a little, or 0 for the type that they are computed in
    #[arg(long, value_name = "8|0", default_value_t = KvBits::AsComputed, hide_default_value = true)]
    pub(crate) kv_bits: KvBits,
    #[command(flatten)]
    pub(crate) hardware: Hardware,
}

/// What layouts are compared by.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "What the layouts are compared by")]
pub(crate) struct Hardware {
    /// What each node may hold, or one number for all, as in 96GiB,96GiB,36GiB; without it, where
    /// the nodes are measured here, this machine's memory in equal parts
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',')]
    pub(crate) memory: Vec<ByteSize>,
    /// What each node reads in a second, or one number for all, as in 800GB,800GB,546GB
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',')]
    pub(crate) bandwidth: Vec<ByteSize>,
    /// How long an exchange of a few kilobytes among all nodes takes, as in 60us
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) exchange: Option<Duration>,
    /// What a node can send in a second, as in 1.2GB
    #[arg(long, value_name = "SIZE")]
    pub(crate) link: Option<ByteSize>,
}

impl Hardware {
    /// Whether the layouts can be compared without a measurement.
    pub(crate) fn is_given(&self) -> bool {
        !self.bandwidth.is_empty() && self.exchange.is_some() && self.link.is_some()
    }
}

/// A layout, or the best one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parallel {
    Auto,
    As(Layout),
}

impl FromStr for Parallel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            AUTO => Ok(Self::Auto),
            _ => match name.parse() {
                Ok(layout) => Ok(Self::As(layout)),
                Err(unknown) => Err(format!("{unknown}, {AUTO}")),
            },
        }
    }
}

impl fmt::Display for Parallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str(AUTO),
            Self::As(layout) => layout.fmt(f),
        }
    }
}

const AUTO: &str = "auto";

/// What a cluster on this machine is made of.
#[derive(Clone, Debug, Args)]
pub(crate) struct LocalOptions {
    #[command(flatten)]
    pub(crate) division: Division,
    /// What carries tensors between shards: quic (ours, encrypted), shm (ours, memory of this
    /// machine), or MLX's own: ring (plain TCP), nccl (on CUDA), jaccl (RDMA through Thunderbolt)
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// Keep collectives on the device's stream: auto (where it can), on (the same, with a warning
    /// where it cannot), off, require; without it OFFBOOK_FAST_SYNCH, EXO_FAST_SYNCH or
    /// MLX_METAL_FAST_SYNCH, else auto
    #[arg(long, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: Option<FastSynch>,
    /// GPUs of this machine: node n computes on GPU n modulo this number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) gpus: Option<u32>,
    /// Where keys, configuration and state are kept; without it, a folder that is removed at the end.
    /// Limits in a cluster.toml that is there already hold as far as no option here says otherwise
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// What the shard of each node may take of its memory, as in 2GiB; what there is if not given. On
    /// Linux the system refuses its process more than that and some headroom: it ends then, and is
    /// started again
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_limit: Option<ByteSize>,
    /// Requests that are worked on at the same time [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: Option<u32>,
    /// How long a request may take from its arrival to its last token, waits included [default: 10min]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) request_timeout: Option<Duration>,
    /// How long answers that are under way may go on when the cluster is told to stop [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) drain: Option<Duration>,
    /// A process that fails so often within a minute, and once more, is given up; one that is killed has
    /// not failed [default: 5]
    #[arg(long, value_name = "N")]
    pub(crate) restarts: Option<u32>,
    /// The pause before a restart doubles with each failure within a minute, up to this [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) restart_pause_max: Option<Duration>,
    /// Any limit of the cluster file, as often as needed: adaptive_throttle=true,
    /// max_active_tasks.prefill=10, max_active_tasks.decode=50, limits.kv_tokens=65536,
    /// limits.prefill_chunk_tokens=128, limits.queue_max=16, limits.queue_tokens_max=100000,
    /// limits.prefix_cache=false, limits.micro_batches=2, …; an unknown name is told what there is
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) set: Vec<Setting>,
}

/// The API, which only the head of a cluster has, its first node.
#[derive(Clone, Debug, Args)]
pub(crate) struct ApiOptions {
    /// Where the API listens; port 0 takes any free one. Only the head of a cluster, its first node, has one
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub(crate) http: SocketAddr,
    /// Whose web pages may use the API, as in https://chat.example.org, or '*' for every page that is open
    /// in a browser which reaches it. Without it none; other programs need no leave
    #[arg(long, value_name = "ORIGIN,…", value_delimiter = ',')]
    pub(crate) allowed_origins: Vec<Origin>,
}

impl ApiOptions {
    /// For nobody but the program that starts the cluster.
    pub(crate) fn own() -> Self {
        Self {
            http: ([127, 0, 0, 1], 0).into(),
            allowed_origins: Vec::new(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) local: LocalOptions,
    #[command(flatten)]
    pub(crate) api: ApiOptions,
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
    #[command(flatten)]
    pub(crate) api: ApiOptions,
    /// What the shard of this node may take of its memory, as in 96GiB; without it, what the cluster file
    /// says
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory_limit: Option<ByteSize>,
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
    #[arg(long)]
    pub(crate) memory_limit: Option<ByteSize>,
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
    /// one exchange per layer), pipeline (some layers each), or auto: what is fastest by the numbers
    /// below, and how much each node takes. For nodes that are all on this machine, what is not given is
    /// measured
    #[arg(long, default_value_t = Parallel::As(Layout::Tensor), value_name = "LAYOUT")]
    pub(crate) parallel: Parallel,
    /// What carries tensors between shards: quic, shm (all on one machine), ring, nccl or jaccl
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// Keep collectives on the device's stream: auto (where it can), on, off or require
    #[arg(long, default_value_t = FastSynch::Auto, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: FastSynch,
    #[command(flatten)]
    pub(crate) hardware: Hardware,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The API of the cluster
    #[arg(long, default_value = "http://127.0.0.1:8080", value_name = "URL")]
    pub(crate) api: String,
    /// Print what the cluster says as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Stress {
    #[command(flatten)]
    pub(crate) local: LocalOptions,
    /// Clients that ask at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) clients: u32,
    /// Soak a cluster that runs already, at this API, rather than one of its own
    #[arg(long, value_name = "URL")]
    pub(crate) api: Option<String>,
    /// With --api: strike its processes too, all of which must be on this machine
    #[arg(long, requires = "api")]
    pub(crate) kill_local: bool,
    /// With --api and without --kill-local, where nothing is struck: how long clients ask
    #[arg(long = "for", value_name = "TIME", default_value = "1min", value_parser = duration)]
    pub(crate) watch_for: Duration,
    /// How many processes are struck
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) kills: u32,
    /// Which, at random: shard (of any rank), node (other than the head), head
    #[arg(
        long,
        value_name = "WHOM,…",
        value_delimiter = ',',
        default_value = "shard"
    )]
    pub(crate) strike: Vec<Target>,
    /// With what, at random: kill, stop (until somebody replaces it), term
    #[arg(
        long,
        value_name = "SIGNAL,…",
        value_delimiter = ',',
        default_value = "kill"
    )]
    pub(crate) signals: Vec<Blow>,
    /// The longest pause between a recovery and the next strike
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub(crate) every: Duration,
    /// The longest answer
    #[arg(long, value_name = "TOKENS", default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) tokens: u32,
    /// Decides who is struck, with what, and when
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
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
    /// Print each token with its log-probability below the text; the JSON object has them anyway
    #[arg(long)]
    pub(crate) logprobs: bool,
    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object instead of the text: tokens, their log-probabilities, times, the plan
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
    /// Compare the layouts by what this machine can do: starts its ranks, on random weights
    #[arg(long)]
    pub(crate) measure: bool,
    /// What carries tensors while that is measured: quic or shm (ours), ring, nccl or jaccl (MLX's own)
    #[arg(long, default_value_t = Transport::Quic)]
    pub(crate) transport: Transport,
    /// Sequences at the same time, as far as they take memory
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequences: u32,
    /// Tokens of prompts in a step, as far as they take memory
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prefill_chunk: u32,
    /// Positions that a sequence has, at the most, when the time of its token is estimated
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cached_tokens: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// What a sum over all ranks takes, per transport and size
    ///
    /// Starts the ranks as processes on this machine. All transports are measured in turns in one
    /// run, MLX's own ring among them. Columns: median and 99th percentile of one sum evaluated
    /// alone, and the median of each of 64 sums of which each needs the one before, in microseconds,
    /// as rank 0 sees them. Sizes beyond 256 KiB are measured less often. When a rank fails, the
    /// command ends with what every other rank has to say about it, and an exit code other than 0.
    Collective(BenchCollective),
    /// What one decode step takes, rank by rank, with collectives and without
    ///
    /// Columns: medians over the steps, in milliseconds. total: the whole step; model: building it
    /// and handing it to the device; eval: waiting for the device; collective: what the stream says
    /// it spent in collectives. All kinds of --collectives are measured in turns in one run.
    Step(BenchStep),
    /// What messages take: asks, tells and subscriptions, in this process and over QUIC to another
    ///
    /// Both processes are on this machine, with mutual TLS. Round trips in microseconds. `ask under
    /// bulk`: one ask of 64 bytes after the other while a subscription of 64 KiB items runs over the
    /// same link as fast as it can; its MiB/s are those of the subscription.
    Message(BenchMessage),
    /// What clients of an OpenAI-compatible server wait for, under load
    ///
    /// Sends streaming completions, prompts of words or of token ids that all differ, and asks that
    /// answers do not end early (`ignore_eos`, where the server knows it). Several --url take turns,
    /// block by block, with the same prompts. Columns: requests and tokens per second while requests
    /// were under way; the time to the first text, and from one event with text to the next, in
    /// milliseconds, median and 99th percentile; and how many failed, by status.
    Serve(BenchServe),
    /// What API, scheduler and messages add to a token
    ///
    /// A scripted shard draws a token at each step of a fixed length. Scheduler, messages over QUIC and
    /// API are the real ones, on this machine. Printed, in milliseconds: from the moment at which a token
    /// is drawn to that at which an HTTP client has it, and from token to token as the client sees it.
    Api(BenchApi),
    /// Decode speed of one node, of several, and of mlx-lm if Python has it
    Decode(BenchDecode),
    /// What the window of layers in flight does to memory and speed while a long prompt is read
    ///
    /// A wide model with random weights, alone on this machine, each window in a process of its own.
    /// Columns: what the weights take; the most that was held beyond them at once, by MLX's account and
    /// by the system's; prompt tokens per second; the median of a decode step; the smallest that the
    /// window was, and the chunk of the prompt that a step reads; and how often the window shrank. A
    /// process that runs out of memory has a line that says so.
    PrefillMemory(BenchPrefillMemory),
    /// How long an answer pauses when a shard is killed
    ///
    /// One answer after the other is streamed; in the middle of each, the shard of the next rank is
    /// killed with -9. Printed: the longest time between two tokens from then on, as the client sees
    /// it. It fails if an answer differs from the undisturbed one in any token.
    Loss(BenchLoss),
}

#[derive(Debug, Args)]
pub(crate) struct BenchCollective {
    /// Numbers of ranks to measure
    #[arg(
        long,
        value_name = "N,N,…",
        value_delimiter = ',',
        default_value = "2,3"
    )]
    pub(crate) ranks: Vec<usize>,
    /// Sizes of the operand, multiples of 4
    #[arg(
        long,
        value_name = "B,B,…",
        value_delimiter = ',',
        default_value = "64,6144,1048576"
    )]
    pub(crate) bytes: Vec<usize>,
    /// What carries the operands: quic and shm (ours), ring and nccl (MLX's own)
    #[arg(
        long,
        value_name = "T,T,…",
        value_delimiter = ',',
        default_value = "quic,ring,shm"
    )]
    pub(crate) transport: Vec<Transport>,
    /// Keep sums on the device's stream: auto (where it can), on (the same, with a warning where it
    /// cannot), off, require; without it OFFBOOK_FAST_SYNCH, EXO_FAST_SYNCH or MLX_METAL_FAST_SYNCH,
    /// else auto
    #[arg(long, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: Option<FastSynch>,
    /// Sums of each kind that are timed alone
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// How long one sum may take, as in 500ms or 5s; a rank that takes longer ends the run
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// GPUs of this machine: rank r computes on GPU r modulo this number
    #[arg(long, value_name = "N")]
    pub(crate) gpus: Option<NonZeroU32>,
    /// Print one JSON object per line: a row each, or an error each with `rank` and `error`
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchMessage {
    /// Lengths of the messages' contents, up to 256 KiB
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', default_value = "64,4096,65536",
        value_parser = clap::value_parser!(u32).range(1..=262_144))]
    pub(crate) bytes: Vec<u32>,
    /// How long each side looks for the next packet before it sleeps, in microseconds; each is
    /// measured in a turn of its own
    #[arg(
        long,
        value_name = "US,US,…",
        value_delimiter = ',',
        default_value = "0,50"
    )]
    pub(crate) spin: Vec<u64>,
    /// Asks of each kind; of long ones fewer
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) asks: u32,
    /// Tells of each kind; of long ones fewer
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tells: u32,
    /// Bytes that each subscription carries
    #[arg(long, value_name = "B", default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) items_bytes: u64,
    /// Print one JSON object per row
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchStep {
    /// How many ranks
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) ranks: usize,
    /// What a step computes; without it a model where --model or --layers is given, else products
    #[arg(long)]
    pub(crate) workload: Option<Workload>,
    /// Of workload model: a directory with a `config.json`, or minimax-m2.5 for that model's shape, which
    /// is meant without it, or wide for a small one of 8 layers; weights are random
    #[arg(long, value_name = "DIR|minimax-m2.5|wide")]
    pub(crate) model: Option<PathBuf>,
    /// Of workload model: how many layers; all of them if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) layers: Option<u32>,
    /// Of workload model: how it is divided; in the pipeline layout a step is of one micro-batch
    #[arg(long, default_value_t = Layout::Tensor, value_name = "LAYOUT")]
    pub(crate) parallel: Layout,
    /// Of workload model: sequences in a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) batch: u32,
    /// Of workload model: positions that each sequence has
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: u32,
    /// Of workload model: tokens of prompts in one step at most
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) chunk: u32,
    /// In the pipeline layout: how many groups of sequences are on their way through the stages at once;
    /// several take turns in one run; one per stage if not given
    #[arg(long, value_name = "N,N,…", value_delimiter = ',')]
    pub(crate) micro_batches: Vec<NonZeroU32>,
    /// Of workload products: how many in a step
    #[arg(long, value_name = "N", default_value_t = 124)]
    pub(crate) depth: usize,
    /// Of workload products: length of the vector, and both sides of the matrices
    #[arg(long, value_name = "N", default_value_t = 3072, value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) width: i32,
    /// What becomes of each product: none, or a sum over all ranks on the CPU stream or delegated to
    /// the device's own
    #[arg(
        long,
        value_name = "C,C,…",
        value_delimiter = ',',
        default_value = "none,cpu-stream"
    )]
    pub(crate) collectives: Vec<Collectives>,
    /// What carries the operands: quic or shm (ours), ring or nccl (MLX's own), or echo, where each
    /// rank hears itself at once; several take turns in one run
    #[arg(
        long,
        value_name = "T,T,…",
        value_delimiter = ',',
        default_value = "shm"
    )]
    pub(crate) transport: Vec<Wire>,
    /// Steps of each kind that are timed
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// How long one sum may take, as in 500ms or 5s
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub(crate) deadline: Duration,
    /// GPUs of this machine: rank r computes on GPU r modulo this number
    #[arg(long, value_name = "N")]
    pub(crate) gpus: Option<NonZeroU32>,
    /// Print one JSON object per line, for each rank and kind of collectives
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a measured step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Products of a vector with matrices, f32 on the CPU and bf16 on a GPU, each followed by a sum
    Products,
    /// A decode step of a model, in the loop that serves
    Model,
}

impl BenchStep {
    /// What a step computes, as it was said or as other options imply.
    ///
    /// # Errors
    /// Options of the other kind of work, which would otherwise be passed over.
    pub(crate) fn what(&self) -> Result<Workload, String> {
        let of_a_model = self.model.is_some() || self.layers.is_some();
        match self.workload {
            Some(Workload::Products) if of_a_model => {
                Err("--model and --layers are of --workload model".to_owned())
            }
            None if of_a_model => Ok(Workload::Model),
            said => Ok(said.unwrap_or(Workload::Products)),
        }
    }
}

/// The model whose shape is known by name.
pub(crate) const MINIMAX: &str = "minimax-m2.5";
/// A small model of wide layers, known by name.
pub(crate) const WIDE: &str = "wide";

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// How many ranks
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) ranks: usize,
    /// GPUs of this machine: rank r computes on GPU r modulo this number
    #[arg(long, value_name = "N")]
    pub(crate) gpus: Option<NonZeroU32>,
    /// Keep operations on the device's stream: auto (where it can), on, off, require; without it
    /// OFFBOOK_FAST_SYNCH, EXO_FAST_SYNCH or MLX_METAL_FAST_SYNCH, else auto
    #[arg(long, value_name = "auto|on|off|require")]
    pub(crate) fast_synch: Option<FastSynch>,
    /// Print one JSON object: verdict, device, path, and checks with name, transport, ok, detail
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Callee {
    /// Where the keys are
    #[arg(long, value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// How long to look for the next packet, in microseconds
    #[arg(long)]
    pub(crate) spin: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Rank {
    /// Where the assignment and the keys are
    #[arg(long, value_name = "DIR")]
    pub(crate) folder: PathBuf,
    /// Its place, from 0
    #[arg(long)]
    pub(crate) rank: usize,
}

impl fmt::Display for Collectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        pad_value(*self, f)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        pad_value(*self, f)
    }
}

/// As it is typed.
fn pad_value(value: impl ValueEnum, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let typed = value.to_possible_value();
    f.pad(typed.as_ref().map_or("", |typed| typed.get_name()))
}

/// A time with its unit.
fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(char::is_alphabetic).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let milliseconds = match unit {
        "us" | "µs" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        "min" => 60e3,
        _ => return Err("give a time with its unit, as in 500ms, 5s or 2min".to_owned()),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{number:?} is no number"))?;
    match Duration::try_from_secs_f64(number * milliseconds / 1e3) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("the time must be above 0".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecode {
    /// Directory of a model in MLX format; without it, the demo model
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Numbers of nodes to compare
    #[arg(long, value_delimiter = ',', default_value = "1,3")]
    pub(crate) nodes: Vec<u32>,
    /// How the model is divided where there are several; each is measured
    #[arg(
        long,
        value_name = "LAYOUT,…",
        value_delimiter = ',',
        default_value = "pipeline,tensor"
    )]
    pub(crate) parallel: Vec<Layout>,
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

#[derive(Debug, Args)]
pub(crate) struct BenchServe {
    /// Where a server is, as in http://127.0.0.1:8080; several are compared
    #[arg(long, required = true, value_name = "URL")]
    pub(crate) url: Vec<String>,
    /// The model's name; without it, the first that the server lists
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Requests to each server, at each --concurrency
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) requests: u32,
    /// Requests under way at the same time at most; several are measured one after the other
    #[arg(
        long,
        value_name = "C,C,…",
        value_delimiter = ',',
        default_value = "1,4"
    )]
    pub(crate) concurrency: Vec<u32>,
    /// Words, or token ids, of each prompt
    #[arg(long, value_name = "I", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) input_tokens: u32,
    /// Tokens of each answer at most
    #[arg(long, value_name = "O", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) output_tokens: u32,
    /// Send prompts of token ids below this instead of words
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) token_ids_below: Option<u32>,
    /// Requests that arrive per second, at random; without it, each when another one ends
    #[arg(long, value_name = "R")]
    pub(crate) rate: Option<f64>,
    /// Instead: what those who decode wait for while a prompt of so many words, or token ids, is
    /// read. As many streams as --concurrency says run, then it comes; they have to last longer
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "rate")]
    pub(crate) beside_prompt: Option<u32>,
    /// How long the streams run before that prompt comes
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    pub(crate) beside_after: Duration,
    /// Prompts and arrivals follow from it
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// How long one answer may take
    #[arg(long, value_name = "TIME", default_value = "600s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Print one JSON object per row
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchApi {
    /// How long each step takes
    #[arg(long, value_name = "TIME", default_value = "2.6ms", value_parser = duration)]
    pub(crate) step: Duration,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) tokens: u32,
    /// Answers, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefillMemory {
    /// Layers in flight at most: numbers, none (no bound), or adaptive (30 at most)
    #[arg(
        long,
        value_name = "W,W,…",
        value_delimiter = ',',
        default_value = "1,4,30,none,adaptive"
    )]
    pub(crate) windows: Vec<WindowChoice>,
    /// Layers of the model
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) layers: u32,
    /// Tokens of the prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prompt: u32,
    /// Tokens of it that one step reads
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) chunk: u32,
    /// Decode steps that are timed behind it
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// Memory beyond the weights that MLX is told to keep to, and that adaptive keeps below
    #[arg(long, value_name = "BYTES")]
    pub(crate) headroom: Option<ByteSize>,
    /// Memory beyond the weights at which the system refuses more (Linux, on the CPU)
    #[arg(long, value_name = "BYTES")]
    pub(crate) hard_limit: Option<ByteSize>,
    /// Write what memory looked like every 10 ms, as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub(crate) samples: Option<PathBuf>,
    /// Print one JSON object per row
    #[arg(long)]
    pub(crate) json: bool,
}

/// A window that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WindowChoice {
    Layers(u32),
    None,
    Adaptive,
}

impl WindowChoice {
    pub(crate) fn settings(self) -> WindowSettings {
        let layers = match self {
            Self::Layers(layers) => layers,
            Self::None => u32::MAX,
            Self::Adaptive => {
                return WindowSettings {
                    adaptive: true,
                    ..WindowSettings::default()
                };
            }
        };
        WindowSettings {
            prefill: layers,
            decode: layers,
            adaptive: false,
        }
    }
}

impl FromStr for WindowChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("none", _) => Ok(Self::None),
            ("adaptive", _) => Ok(Self::Adaptive),
            (_, Ok(layers)) if layers > 0 => Ok(Self::Layers(layers)),
            _ => Err("a number of layers from 1, none or adaptive".into()),
        }
    }
}

impl fmt::Display for WindowChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layers(layers) => f.pad(&layers.to_string()),
            Self::None => f.pad("none"),
            Self::Adaptive => f.pad("adaptive"),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchLoss {
    #[command(flatten)]
    pub(crate) local: LocalOptions,
    /// Shards killed
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Print one JSON object instead of text
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

    #[test]
    fn a_time_has_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        for wrong in ["5", "0s", "-1s", "s", "5 parsecs", "nans"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
