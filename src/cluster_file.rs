//! `cluster.toml`: what every process of a cluster agrees on. It is equal on every node, and its
//! hash is part of every handshake: but for where the nodes are and which keys they may show, which the
//! handshake proves by itself. So a node that moved, or a key that is replaced, goes through the cluster
//! node by node. The first node in it is the head.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use offbook_actors::{ClusterSettings, SchedulerLimits, ShardKeeping, StallLimits, WindowSettings};
use offbook_engine::batch::KV_BLOCK_TOKENS;
use offbook_protocol::{FastSynch, KvBits, Layout, NodeWeight, Transport};
use offbook_runtime::supervise::RestartPolicy;
use offbook_runtime::{Identity, NodeKey, Patience, ProcessName, Trust, TrustedNode};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::byte_size::ByteSize;
use crate::cli::{ClusterCommand, ClusterInit, Division, Parallel};
use crate::plan::Divided;
use crate::planner::{self, Assumed, Ground};

/// See the module's own words. Unknown keys are errors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClusterFile {
    /// Any text; clusters with another one are refused.
    pub(crate) cluster: String,
    /// The model's directory, on every node.
    pub(crate) model: PathBuf,
    pub(crate) parallel: Layout,
    pub(crate) transport: Transport,
    /// Whether collectives stay on the device's stream: `auto`, `on`, `off` or `require`.
    #[serde(default)]
    pub(crate) fast_synch: FastSynch,
    /// Whether the window of layers in flight shrinks when memory is short, and grows again.
    #[serde(default)]
    pub(crate) adaptive_throttle: bool,
    #[serde(default)]
    pub(crate) max_active_tasks: MaxActiveTasks,
    #[serde(default)]
    pub(crate) limits: Limits,
    pub(crate) nodes: Vec<ClusterNode>,
}

/// The set points of the window: layers submitted to the device and not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MaxActiveTasks {
    /// In steps with rows of prompts.
    pub(crate) prefill: u32,
    /// In others.
    pub(crate) decode: u32,
}

impl Default for MaxActiveTasks {
    fn default() -> Self {
        let WindowSettings {
            prefill, decode, ..
        } = WindowSettings::default();
        Self { prefill, decode }
    }
}

/// One machine of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClusterNode {
    pub(crate) name: String,
    /// Where it listens for messages, UDP.
    pub(crate) address: SocketAddr,
    /// One key, or two while it is being changed.
    pub(crate) keys: Vec<NodeKey>,
    /// Its share of the model, relative to the others.
    #[serde(default = "one")]
    pub(crate) weight: f64,
    /// What its shard may take of its memory, as in "96GiB"; what there is if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_limit: Option<ByteSize>,
    /// For transport `jaccl`: which of its RDMA devices (`ibv_devices`) leads to which other node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) rdma: BTreeMap<String, String>,
}

fn one() -> f64 {
    1.0
}

/// Every bound that the nodes agree on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Positions that a sequence may reach, prompt included; 0 takes the model's own limit.
    pub(crate) context_tokens: u32,
    pub(crate) sequences_max: u32,
    /// Positions that the caches of all sequences hold together on each node, of which only whole
    /// blocks of 256 count; 0 takes as many as `sequences_max` sequences of the full context need.
    pub(crate) kv_tokens: u32,
    /// In how many bits caches keep keys and values: 8, or 0 for the type that they are computed in.
    pub(crate) kv_bits: KvBits,
    /// Whether what a request has computed is kept for those that begin with the same tokens, in room
    /// of `kv_tokens` that nobody needs; where that is 0, in no more than 16384 positions.
    pub(crate) prefix_cache: bool,
    /// In the pipeline layout: how many groups of sequences are on their way through the stages at once;
    /// 0 for one per stage, 1 for one step at a time.
    pub(crate) micro_batches: u32,
    pub(crate) queue_max: u32,
    /// Tokens at most of the requests that wait: those of their prompts, and those that may be
    /// generated for them.
    pub(crate) queue_tokens_max: u64,
    /// How long a request may wait for a shard to begin with it.
    pub(crate) queue_deadline_seconds: f64,
    pub(crate) prefill_chunk_tokens: u32,
    pub(crate) collective_deadline_seconds: f64,
    pub(crate) load_deadline_seconds: f64,
    /// How long a process may be silent, at the least and at the most, before it counts as lost: in
    /// between, whoever was late before is given more time.
    pub(crate) silence_min_seconds: f64,
    pub(crate) silence_seconds: f64,
    /// How long a node may be away before the model is divided among the others, if it fits them. One that
    /// is started again says that it is there within half a second, and is waited for from then on.
    pub(crate) node_grace_seconds: f64,
    /// How long a new shard process may take until its node hears of it, which is before it loads anything,
    /// or else it counts as frozen and is killed; the next one may take twice as long, up to eight times.
    pub(crate) first_sign_seconds: f64,
    /// How long a shard process that its node cannot reach may take to come back before it counts as
    /// frozen and is killed.
    pub(crate) frozen_grace_seconds: f64,
    /// How long a shard's engine may make no progress, between two tensors that it loads, in a step
    /// that reads prompts, and in one that does not, before its process is replaced.
    pub(crate) load_stall_seconds: f64,
    pub(crate) prefill_stall_seconds: f64,
    pub(crate) decode_stall_seconds: f64,
    /// A process that fails so often within a minute, and once more, is given up. One that is killed, or
    /// told to end, has not failed.
    pub(crate) restarts_max: u32,
    /// The pause before a restart doubles with each failure within a minute, up to this.
    pub(crate) restart_pause_max_seconds: f64,
    /// How long a request may take from its arrival to its last token, waits included.
    pub(crate) request_deadline_seconds: f64,
    /// A request that runs while shards fail in so many epochs in a row, without a token in between, is
    /// given up. Shards that are killed or cut off count a tenth.
    pub(crate) request_losses_max: u32,
    /// How long a head that is told to stop lets answers under way go on; new ones are refused.
    pub(crate) drain_seconds: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            context_tokens: 0,
            sequences_max: 16,
            kv_tokens: 0,
            kv_bits: KvBits::AsComputed,
            prefix_cache: true,
            micro_batches: 0,
            queue_max: 64,
            queue_tokens_max: 8 << 20,
            queue_deadline_seconds: 120.0,
            prefill_chunk_tokens: 256,
            collective_deadline_seconds: 10.0,
            load_deadline_seconds: 1800.0,
            silence_min_seconds: 0.28,
            silence_seconds: 10.0,
            node_grace_seconds: 1.5,
            first_sign_seconds: 10.0,
            frozen_grace_seconds: 1.0,
            load_stall_seconds: 600.0,
            prefill_stall_seconds: 120.0,
            decode_stall_seconds: 60.0,
            restarts_max: RestartPolicy::default().intensity,
            restart_pause_max_seconds: RestartPolicy::default().backoff_max.as_secs_f64(),
            request_deadline_seconds: 600.0,
            request_losses_max: 3,
            drain_seconds: 30.0,
        }
    }
}

impl Limits {
    pub(crate) fn scheduler(&self) -> SchedulerLimits {
        SchedulerLimits {
            queue_max: self.queue_max,
            queue_tokens_max: self.queue_tokens_max,
            queue_deadline: Duration::from_secs_f64(self.queue_deadline_seconds),
            sequences_max: self.sequences_max,
            request_deadline: Duration::from_secs_f64(self.request_deadline_seconds),
            losses_max: self.request_losses_max,
        }
    }
}

impl ClusterFile {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the cluster file {}", path.display()))?;
        let file: Self = toml::from_str(&text)
            .with_context(|| format!("{} is not a cluster file", path.display()))?;
        file.check()
            .with_context(|| format!("in {}", path.display()))?;
        Ok(file)
    }

    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).context("cannot write the cluster file")?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.nodes.is_empty(), "a cluster needs at least one node");
        for (index, node) in self.nodes.iter().enumerate() {
            ensure!(
                self.nodes[..index]
                    .iter()
                    .all(|other| other.name != node.name),
                "node '{}' is there twice",
                node.name
            );
            if let Some(other) =
                (self.nodes[..index].iter()).find(|other| other.address == node.address)
            {
                bail!(
                    "'{}' and '{}' have the same address, {}: give each its own",
                    other.name,
                    node.name,
                    node.address
                );
            }
            ensure!(
                node.weight.is_finite() && node.weight > 0.0,
                "the weight of '{}' must be above 0",
                node.name
            );
            for peer in node.rdma.keys() {
                ensure!(
                    self.nodes.iter().any(|other| &other.name == peer),
                    "the rdma of '{}' leads to '{peer}', which is no node",
                    node.name
                );
            }
            ProcessName::new(&*node.name)
                .with_context(|| format!("'{}' cannot be a node's name", node.name))?;
        }
        if self.transport == Transport::Jaccl {
            self.check_rdma()?;
        }
        let MaxActiveTasks { prefill, decode } = self.max_active_tasks;
        ensure!(
            prefill > 0 && decode > 0,
            "max_active_tasks.prefill and .decode must be at least 1"
        );
        let limits = &self.limits;
        ensure!(
            limits.sequences_max > 0,
            "limits.sequences_max must be at least 1"
        );
        ensure!(
            limits.kv_tokens == 0 || limits.kv_tokens as usize >= KV_BLOCK_TOKENS,
            "limits.kv_tokens must be 0, or at least one block of {KV_BLOCK_TOKENS}"
        );
        ensure!(
            limits.prefill_chunk_tokens > 0,
            "limits.prefill_chunk_tokens must be at least 1"
        );
        ensure!(
            limits.micro_batches <= MICRO_BATCHES_MAX,
            "limits.micro_batches must be at most {MICRO_BATCHES_MAX}; 0 takes one per stage"
        );
        ensure!(
            limits.request_losses_max > 0,
            "limits.request_losses_max must be at least 1"
        );
        for (key, seconds) in [
            (
                "collective_deadline_seconds",
                limits.collective_deadline_seconds,
            ),
            ("load_deadline_seconds", limits.load_deadline_seconds),
            ("silence_min_seconds", limits.silence_min_seconds),
            ("silence_seconds", limits.silence_seconds),
            ("node_grace_seconds", limits.node_grace_seconds),
            (
                "restart_pause_max_seconds",
                limits.restart_pause_max_seconds,
            ),
            ("first_sign_seconds", limits.first_sign_seconds),
            ("frozen_grace_seconds", limits.frozen_grace_seconds),
            ("load_stall_seconds", limits.load_stall_seconds),
            ("prefill_stall_seconds", limits.prefill_stall_seconds),
            ("decode_stall_seconds", limits.decode_stall_seconds),
            ("request_deadline_seconds", limits.request_deadline_seconds),
            ("queue_deadline_seconds", limits.queue_deadline_seconds),
            ("drain_seconds", limits.drain_seconds),
        ] {
            ensure!(
                Duration::try_from_secs_f64(seconds).is_ok_and(|d| !d.is_zero()),
                "limits.{key} must be above 0"
            );
        }
        ensure!(
            limits.silence_min_seconds >= 0.1
                && limits.silence_min_seconds <= limits.silence_seconds,
            "limits.silence_min_seconds must be from 0.1 to silence_seconds"
        );
        Ok(())
    }

    /// Whichever nodes make a group, each needs a device towards each.
    fn check_rdma(&self) -> Result<()> {
        for node in &self.nodes {
            for peer in self.nodes.iter().filter(|peer| peer.name != node.name) {
                ensure!(
                    node.rdma.contains_key(&peer.name),
                    "transport jaccl needs `rdma` of node '{}' to say which device leads to '{}', as in \
                     rdma = {{ {} = \"rdma_en5\" }}",
                    node.name,
                    peer.name,
                    peer.name
                );
            }
        }
        Ok(())
    }

    pub(crate) fn head(&self) -> &ClusterNode {
        &self.nodes[0]
    }

    pub(crate) fn node(&self, name: &str) -> Result<&ClusterNode> {
        let known = || {
            self.nodes
                .iter()
                .map(|n| n.name.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("the cluster has no node '{name}': one of {}", known()))
    }

    /// What all nodes must have alike at any time. A node's address is where others look for it, and they
    /// find it by its key; whether a key is pinned each node decides for itself.
    fn agreed(&self) -> Self {
        let mut agreed = self.clone();
        for node in &mut agreed.nodes {
            node.address = SocketAddr::from(([0, 0, 0, 0], 0));
            node.keys.clear();
        }
        agreed
    }

    pub(crate) fn trust(&self) -> Result<Trust> {
        let hash = Sha256::digest(toml::to_string(&self.agreed())?);
        let (first, _) = hash.split_first_chunk().expect("a SHA-256 has 32 bytes");
        let node = |node: &ClusterNode| TrustedNode {
            name: node.name.clone(),
            keys: node.keys.clone(),
        };
        Ok(Trust {
            cluster: self.cluster.clone(),
            config_hash: u64::from_be_bytes(*first),
            nodes: self.nodes.iter().map(node).collect(),
        })
    }

    /// What the shards are told; `model_context` is what the model itself can take.
    pub(crate) fn settings(&self, model_context: u32, api: SocketAddr) -> ClusterSettings {
        let nodes = self
            .nodes
            .iter()
            .map(|node| (node.name.clone(), NodeWeight(node.weight)));
        ClusterSettings {
            api: format!("http://{api}"),
            nodes: nodes.collect(),
            model: self.model.clone(),
            layout: self.parallel,
            transport: self.transport,
            rdma: self
                .nodes
                .iter()
                .map(|node| (node.name.clone(), node.rdma.clone()))
                .collect(),
            fast_synch: self.fast_synch,
            prefill_chunk_tokens: self.limits.prefill_chunk_tokens,
            context_tokens: self.context_tokens(model_context),
            sequences_max: self.limits.sequences_max,
            kv_tokens: (self.limits.kv_tokens > 0).then_some(self.limits.kv_tokens),
            kv_bits: self.limits.kv_bits,
            prefix_cache: self.limits.prefix_cache,
            micro_batches: NonZeroU32::new(self.limits.micro_batches),
            collective_deadline: Duration::from_secs_f64(self.limits.collective_deadline_seconds),
            load_deadline: Duration::from_secs_f64(self.limits.load_deadline_seconds),
            node_grace: Duration::from_secs_f64(self.limits.node_grace_seconds),
        }
    }

    /// Positions that a sequence may reach: never more than the caches hold.
    pub(crate) fn context_tokens(&self, model_context: u32) -> u32 {
        let block = KV_BLOCK_TOKENS as u32;
        let limits = &self.limits;
        [limits.context_tokens, limits.kv_tokens / block * block]
            .into_iter()
            .filter(|wanted| *wanted > 0)
            .fold(model_context, u32::min)
    }

    pub(crate) fn scheduler_limits(&self) -> SchedulerLimits {
        self.limits.scheduler()
    }

    /// How long answers under way may go on when the head is told to stop.
    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs_f64(self.limits.drain_seconds)
    }

    pub(crate) fn shard_keeping(&self) -> ShardKeeping {
        ShardKeeping {
            restarts: self.restarts(),
            first_sign: Duration::from_secs_f64(self.limits.first_sign_seconds),
            frozen_grace: Duration::from_secs_f64(self.limits.frozen_grace_seconds),
        }
    }

    /// For a node's shard, and for the nodes of a cluster on one machine.
    pub(crate) fn restarts(&self) -> RestartPolicy {
        RestartPolicy {
            intensity: self.limits.restarts_max,
            backoff_max: Duration::from_secs_f64(self.limits.restart_pause_max_seconds),
            ..RestartPolicy::default()
        }
    }

    pub(crate) fn stall_limits(&self) -> StallLimits {
        StallLimits {
            load: Duration::from_secs_f64(self.limits.load_stall_seconds),
            prefill: Duration::from_secs_f64(self.limits.prefill_stall_seconds),
            decode: Duration::from_secs_f64(self.limits.decode_stall_seconds),
        }
    }

    pub(crate) fn window_settings(&self) -> WindowSettings {
        WindowSettings {
            prefill: self.max_active_tasks.prefill,
            decode: self.max_active_tasks.decode,
            adaptive: self.adaptive_throttle,
        }
    }

    /// Of a shard's system. It speaks with its own node and with the head: a head that stands still
    /// for a while costs no step, so its silence is borne as long as any silence may last.
    pub(crate) fn shard_runtime_limits(&self) -> offbook_runtime::Limits {
        let limits = self.runtime_limits();
        offbook_runtime::Limits {
            patience: Patience {
                lose_min: limits.patience.lose_max,
                ..limits.patience
            },
            ..limits
        }
    }

    pub(crate) fn runtime_limits(&self) -> offbook_runtime::Limits {
        let silence = Duration::from_secs_f64(self.limits.silence_seconds);
        let silence_min = Duration::from_secs_f64(self.limits.silence_min_seconds);
        offbook_runtime::Limits {
            patience: Patience {
                suspect_min: silence_min.mul_f64(SUSPECT_SHARE),
                lose_min: silence_min,
                lose_max: silence,
                ..Patience::default()
            },
            idle_timeout: silence,
            keep_alive: (silence / 5).min(KEEP_ALIVE_MAX),
            items_queued_max: TOKENS_QUEUED_MAX,
            ..Default::default()
        }
    }
}

/// Where a node keeps its key, inside its data directory.
pub(crate) fn identity_file(data: &Path) -> PathBuf {
    data.join("identity.pem")
}

/// Makes a key for every node that has none, in a folder of its own under `folder`, and the cluster file that
/// pins them all.
pub(crate) fn found(
    folder: &Path,
    nodes: &[(String, SocketAddr)],
    template: impl FnOnce(Vec<ClusterNode>) -> ClusterFile,
) -> Result<PathBuf> {
    let mut members = Vec::new();
    for (name, address) in nodes {
        let data = folder.join(name);
        fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
        let identity = Identity::load_or_generate(&identity_file(&data), name)?;
        members.push(ClusterNode {
            name: name.clone(),
            address: *address,
            keys: vec![identity.key()],
            weight: one(),
            memory_limit: None,
            rdma: BTreeMap::new(),
        });
    }
    let file = template(members);
    file.check()?;
    let path = folder.join("cluster.toml");
    file.save(&path)?;
    Ok(path)
}

/// `offbook cluster …`
pub(crate) async fn command(command: ClusterCommand) -> Result<()> {
    let ClusterCommand::Init(options) = command;
    let nodes = options
        .node
        .iter()
        .map(|text| parse_node(text))
        .collect::<Result<Vec<_>>>()?;
    let divided = divided(&options, &nodes).await?;
    let ClusterInit {
        folder,
        model,
        transport,
        fast_synch,
        ..
    } = options;
    if folder.join("cluster.toml").exists() {
        bail!(
            "{} holds a cluster already: choose another folder",
            folder.display()
        );
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let largest = planner::largest(&divided.weights);
    let path = found(&folder, &nodes, |mut nodes| {
        for (node, weight) in nodes.iter_mut().zip(&divided.weights) {
            node.weight = weight.0 / largest;
        }
        ClusterFile {
            cluster: format!("cluster-{}", nodes[0].keys[0].to_string().split_at(12).0),
            model,
            parallel: divided.layout,
            transport,
            fast_synch,
            adaptive_throttle: false,
            max_active_tasks: MaxActiveTasks::default(),
            limits: Limits::default(),
            nodes,
        }
    })?;
    println!("{}", path.display());
    eprintln!("Copy it to every node, with that node's own folder and no other. On each, run:");
    for (name, _) in &nodes {
        eprintln!("  offbook node --cluster cluster.toml --name {name} --data-dir {name}");
    }
    Ok(())
}

/// As the user said, or what is best. Nodes elsewhere cannot be measured from here.
async fn divided(options: &ClusterInit, nodes: &[(String, SocketAddr)]) -> Result<Divided> {
    let hardware = options.hardware.clone();
    let is_here = |(_, address): &(String, SocketAddr)| address.ip().is_loopback();
    if options.parallel == Parallel::Auto && !hardware.is_given() {
        ensure!(
            nodes.iter().all(is_here),
            "--parallel auto needs --bandwidth, --exchange and --link for nodes that are not all on this \
             machine"
        );
    }
    let limits = Limits::default();
    let division = Division {
        nodes: nodes.len() as u32,
        model: None,
        parallel: Some(options.parallel),
        weights: Vec::new(),
        context: limits.context_tokens,
        kv_bits: limits.kv_bits,
        hardware,
    };
    let ground = Ground {
        transport: options.transport,
        fast_synch: options.fast_synch,
        gpus: None,
        memory_limit: None,
    };
    planner::settle(&options.model, &division, ground, Assumed::by(&limits)).await
}

fn parse_node(text: &str) -> Result<(String, SocketAddr)> {
    let (name, address) = text.split_once('=').with_context(|| {
        format!("'{text}' is not NAME=IP:PORT, as in macstudio-1=10.0.0.1:7700")
    })?;
    let address = address
        .parse()
        .with_context(|| format!("'{address}' is not IP:PORT, as in 10.0.0.1:7700"))?;
    Ok((name.to_owned(), address))
}

/// A silent link is probed at least this often, so that a peer that restarted is noticed.
const KEEP_ALIVE_MAX: Duration = Duration::from_millis(500);
/// Of the least silence that counts as a loss, how much is worth a line in the log.
const SUSPECT_SHARE: f64 = 0.45;
/// A client that reads slowly may fall this many tokens behind before it is dropped.
const TOKENS_QUEUED_MAX: usize = 64 * 1024;
/// More than there are machines in a pipeline; each one delays what joins by a step.
const MICRO_BATCHES_MAX: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn founded() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let nodes = [("a".to_owned(), "127.0.0.1:1".parse().unwrap())];
        let path = found(folder.path(), &nodes, |nodes| ClusterFile {
            cluster: "test".into(),
            model: "model".into(),
            parallel: Layout::Tensor,
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            adaptive_throttle: false,
            max_active_tasks: MaxActiveTasks::default(),
            limits: Limits::default(),
            nodes,
        });
        (folder, path.unwrap())
    }

    #[test]
    fn a_founded_cluster_can_be_read_and_pins_the_key_that_lies_beside_it() {
        let (folder, path) = founded();
        let file = ClusterFile::load(&path).unwrap();
        let identity = Identity::load(&identity_file(&folder.path().join("a"))).unwrap();
        assert_eq!(file.head().keys, [identity.key()]);
        assert!(file.node("b").unwrap_err().to_string().contains("one of a"));
    }

    #[test]
    fn no_sequence_may_be_longer_than_the_caches() {
        let (_folder, path) = founded();
        let mut file = ClusterFile::load(&path).unwrap();
        assert_eq!(file.context_tokens(2000), 2000);
        file.limits.kv_tokens = 1100;
        assert_eq!(file.context_tokens(2000), 1024, "whole blocks count");
        file.limits.context_tokens = 700;
        assert_eq!(file.context_tokens(2000), 700);
    }

    #[test]
    fn the_throttle_and_memory_limits_are_read_and_written() {
        let (_folder, path) = founded();
        let mut file = ClusterFile::load(&path).unwrap();
        assert_eq!(file.window_settings(), WindowSettings::default());
        file.adaptive_throttle = true;
        file.max_active_tasks.prefill = 8;
        file.nodes[0].memory_limit = Some("96GiB".parse().unwrap());
        file.save(&path).unwrap();
        let read = ClusterFile::load(&path).unwrap();
        let expected = WindowSettings {
            prefill: 8,
            decode: 100,
            adaptive: true,
        };
        assert_eq!(read.window_settings(), expected);
        let limit = read.nodes[0].memory_limit.map(ByteSize::bytes);
        assert_eq!(limit, Some(96 << 30));
    }

    #[test]
    fn a_folder_that_is_used_again_keeps_its_keys() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("identity.pem");
        let made = Identity::load_or_generate(&file, "a").unwrap();
        assert_eq!(
            Identity::load_or_generate(&file, "a").unwrap().key(),
            made.key()
        );
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let (_folder, path) = founded();
        let good = fs::read_to_string(&path).unwrap();
        for (from, to, named) in [
            ("cluster = ", "colour = 1\ncluster = ", "colour"),
            ("sequences_max = 16", "sequences_max = 0", "sequences_max"),
            ("kv_tokens = 0", "kv_tokens = 255", "kv_tokens"),
            ("kv_bits = 0", "kv_bits = 4", "kept in 8 bits"),
            ("weight = 1.0", "weight = -1.0", "weight"),
            (
                "weight = 1.0",
                "weight = 1.0\nmemory_limit = \"much\"",
                "'much' is no number of bytes",
            ),
            ("prefill = 30", "prefill = 0", "max_active_tasks.prefill"),
            (
                "silence_seconds = 10.0",
                "silence_seconds = 0.0",
                "silence_seconds",
            ),
            (
                "silence_min_seconds = 0.28",
                "silence_min_seconds = 11.0",
                "silence_min_seconds",
            ),
        ] {
            fs::write(&path, good.replace(from, to)).unwrap();
            let error = format!("{:#}", ClusterFile::load(&path).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn two_nodes_at_one_address_are_named() {
        let (_folder, path) = founded();
        let mut file = ClusterFile::load(&path).unwrap();
        file.nodes.push(ClusterNode {
            name: "b".into(),
            ..file.nodes[0].clone()
        });
        let error = file.check().unwrap_err().to_string();
        assert!(
            error.contains("'a' and 'b' have the same address"),
            "{error}"
        );
    }

    #[test]
    fn rdma_must_lead_from_every_node_to_every_other() {
        let (_folder, path) = founded();
        let mut file = ClusterFile::load(&path).unwrap();
        file.transport = Transport::Jaccl;
        let other = ClusterNode {
            name: "b".into(),
            address: ([127, 0, 0, 1], 2).into(),
            rdma: [("a".to_owned(), "rdma_en3".to_owned())].into(),
            ..file.nodes[0].clone()
        };
        file.nodes.push(other);
        let error = file.check().unwrap_err().to_string();
        assert!(
            error.contains("node 'a'") && error.contains("leads to 'b'"),
            "{error}"
        );
        file.nodes[0].rdma.insert("b".into(), "rdma_en5".into());
        file.check().unwrap();
        let text = toml::to_string(&file).unwrap();
        assert_eq!(
            toml::from_str::<ClusterFile>(&text).unwrap().nodes[0].rdma["b"],
            "rdma_en5"
        );
        file.nodes[0].rdma.insert("c".into(), "rdma_en6".into());
        assert!(
            file.check()
                .unwrap_err()
                .to_string()
                .contains("'c', which is no node")
        );
    }

    #[test]
    fn what_the_nodes_must_agree_on_changes_the_hash() {
        let (_folder, path) = founded();
        let file = ClusterFile::load(&path).unwrap();
        let hash = |file: &ClusterFile| file.trust().unwrap().config_hash;
        let changes: [fn(&mut ClusterFile); 8] = [
            |file| file.limits.queue_max += 1,
            |file| file.model = "another".into(),
            |file| file.parallel = Layout::Pipeline,
            |file| file.transport = Transport::Ring,
            |file| file.nodes[0].name = "c".into(),
            |file| file.nodes[0].weight = 2.0,
            |file| file.nodes[0].memory_limit = Some("96GiB".parse().unwrap()),
            |file| file.nodes.push(file.nodes[0].clone()),
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut changed = file.clone();
            change(&mut changed);
            assert_ne!(hash(&changed), hash(&file), "change {at}");
        }
    }

    #[test]
    fn a_node_that_moves_and_a_key_that_is_replaced_go_through_node_by_node() {
        let (_folder, path) = founded();
        let before = ClusterFile::load(&path).unwrap();
        let hash = before.trust().unwrap().config_hash;
        let (old, new) = (
            before.nodes[0].keys[0],
            Identity::generate("a").unwrap().key(),
        );
        // Both keys are pinned everywhere before the node shows the new one; then the old one goes.
        for keys in [vec![old, new], vec![new]] {
            let mut file = before.clone();
            file.nodes[0].keys = keys.clone();
            let trust = file.trust().unwrap();
            assert_eq!(trust.config_hash, hash);
            assert_eq!(trust.nodes[0].keys, keys, "it is pinned all the same");
        }
        let mut file = before.clone();
        file.nodes[0].address = "10.0.0.7:7700".parse().unwrap();
        assert_eq!(file.trust().unwrap().config_hash, hash);
    }
}
