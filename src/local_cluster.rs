//! A whole cluster on this machine: every node is a process of its own, as it would be elsewhere.
//! `up`, `generate` and `bench` start one of these.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::future::join_all;
use offbook_engine::CPU_THREADS;
use offbook_protocol::{ClusterReport, FastSynch, LoadProgress, Phase};
use offbook_runtime::free_port;
use offbook_runtime::supervise::{ChildSpec, ChildState, Supervisor};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::cli::{ApiOptions, Division, LocalOptions};
use crate::cluster_file::{ClusterFile, found};
use crate::plan::Divided;
use crate::planner::{self, Assumed, Ground};
use crate::settings::{self, Settings};
use crate::{backend, data_dir, demo_model, fast_synch};

/// A running cluster. Its processes end with this value, and with this process.
pub(crate) struct LocalCluster {
    supervisor: Arc<Supervisor>,
    /// The node that serves the API.
    head: String,
    /// How long it lets answers go on when it is told to stop.
    drain: Duration,
    /// Ends with this value.
    _tending: JoinSet<()>,
    _owned: data_dir::Owned,
    /// Removed at the end, unless the user named a folder.
    _scratch: Option<TempDir>,
    pub(crate) model: PathBuf,
    pub(crate) divided: Divided,
    api: String,
    client: reqwest::Client,
}

impl LocalCluster {
    /// Makes keys and a cluster file, and starts every node, after it has measured what layout is the
    /// best if nobody says so. Must be called on the main thread:
    /// the nodes end with the thread that started them.
    pub(crate) async fn start(options: &LocalOptions, api: &ApiOptions) -> Result<Self> {
        check_weights(&options.division.weights, options.division.nodes)?;
        let fast_synch = fast_synch::chosen(options.fast_synch, FastSynch::default())?;
        let (folder, scratch) = data_folder(options.data_dir.as_deref())?;
        let owned = data_dir::own(&folder).await?;
        let model = match &options.division.model {
            Some(model) => model
                .canonicalize()
                .with_context(|| format!("no model at {}: give its directory", model.display()))?,
            None => demo_model::write_to(&folder)?,
        };
        backend::words(&model)?;
        let earlier = settings::earlier(&folder)?;
        let settings = Settings::chosen(earlier.as_ref(), options)?;
        let ground = Ground {
            transport: options.transport,
            fast_synch,
            gpus: options.gpus.and_then(NonZeroU32::new),
            memory_limit: options.memory_limit,
        };
        let assumed = Assumed::by(&settings.limits);
        let division = Division {
            kv_bits: settings.limits.kv_bits,
            ..options.division.clone()
        };
        let divided = planner::settle(&model, &division, ground, assumed).await?;
        let http = reserve_tcp(api.http)?;
        let names = (1..=options.division.nodes).map(|n| format!("node-{n}"));
        let nodes = names
            .map(|name| Ok((name, reserve_udp()?)))
            .collect::<Result<Vec<_>>>()?;
        let cluster = found(&folder, &nodes, |mut nodes| {
            for (node, weight) in nodes.iter_mut().zip(&divided.weights) {
                node.weight = weight.0;
            }
            for node in &mut nodes {
                let earlier = earlier.as_ref().and_then(|file| file.node(&node.name).ok());
                let earlier = earlier.and_then(|node| node.memory_limit);
                node.memory_limit = options.memory_limit.or(earlier);
            }
            ClusterFile {
                cluster: format!("local-{}", std::process::id()),
                model: model.clone(),
                parallel: divided.layout,
                transport: options.transport,
                fast_synch,
                adaptive_throttle: settings.adaptive_throttle,
                max_active_tasks: settings.max_active_tasks,
                limits: settings.limits.clone(),
                nodes,
            }
        })?;
        let written = ClusterFile::load(&cluster)?;
        let (supervisor, _events) = Supervisor::new(written.restarts());
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        for (number, (name, _)) in (0..).zip(&nodes) {
            let mut spec = ChildSpec::new(name, &program)
                .arg("node")
                .arg("--supervised")
                .arg("--cluster")
                .arg(&cluster)
                .arg("--name")
                .arg(name)
                .arg("--data-dir")
                .arg(folder.join(name))
                .arg("--http")
                .arg(http.to_string());
            for origin in &api.allowed_origins {
                spec = spec.arg("--allowed-origins").arg(origin.to_string());
            }
            if let Some(threads) = cpu_threads_each(nodes.len()) {
                spec = spec.env(CPU_THREADS, threads.to_string());
            }
            if let Some(gpus) = options.gpus {
                let gpu: u32 = number % gpus;
                spec = spec.env("CUDA_VISIBLE_DEVICES", gpu.to_string());
            }
            supervisor.start(spec)?;
        }
        let supervisor = Arc::new(supervisor);
        let mut tending = JoinSet::new();
        let head = nodes[0].0.clone();
        tending.spawn(tend(
            Arc::clone(&supervisor),
            head.clone(),
            format!("http://{http}"),
        ));
        Ok(Self {
            supervisor,
            head,
            drain: written.drain(),
            _tending: tending,
            _owned: owned,
            _scratch: scratch,
            model,
            divided,
            api: format!("http://{http}"),
            client: reqwest::Client::new(),
        })
    }

    /// Waits until the cluster serves. `watch` sees every report on the way.
    ///
    /// # Errors
    /// When the cluster cannot hold the model, or a node of it does not come up.
    pub(crate) async fn ready(
        &self,
        mut watch: impl FnMut(&ClusterReport),
    ) -> Result<ClusterReport> {
        let mut heard = Instant::now();
        let mut stands = (Instant::now(), None);
        loop {
            self.check_nodes()?;
            match self.report().await {
                Ok(report) => {
                    heard = Instant::now();
                    watch(&report);
                    match report.phase {
                        Phase::Ready => return Ok(report),
                        Phase::Failed => bail!("{}", report.detail),
                        Phase::Gathering | Phase::Loading => {}
                    }
                    let loads = report.shards.iter().map(|shard| shard.load);
                    let now = Some((report.detail, loads.collect::<Vec<_>>()));
                    if now != stands.1 {
                        stands = (Instant::now(), now);
                    } else if stands.0.elapsed() > STANDSTILL
                        && let Some((detail, _)) = &stands.1
                    {
                        tracing::warn!(detail, "the cluster is not getting on");
                        stands.0 = Instant::now();
                    }
                }
                Err(error) => {
                    ensure!(
                        heard.elapsed() < HEAD_START_MAX,
                        "the head node does not answer: {error:#}"
                    );
                }
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// # Errors
    /// When a node has ended so often that it is not started again.
    fn check_nodes(&self) -> Result<()> {
        let nodes = self.supervisor.status();
        let given_up = nodes
            .iter()
            .find(|node| node.state == ChildState::Escalated);
        let Some(node) = given_up else {
            return Ok(());
        };
        let name = &node.name;
        match &node.last {
            Some(last) => bail!(
                "{name} ended {} times, the last time with {}, after:\n{}",
                node.restarts + 1,
                last.exit,
                last.last_lines.join("\n")
            ),
            None => bail!("{name} ends again and again"),
        }
    }

    /// What `GET /v1/cluster` says now.
    pub(crate) async fn report(&self) -> Result<ClusterReport> {
        let answer = self
            .client
            .get(format!("{}/v1/cluster", self.api))
            .timeout(ANSWER_MAX)
            .send()
            .await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    pub(crate) fn api(&self) -> &str {
        &self.api
    }

    pub(crate) fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// Stops every process: the head first, which finishes the answers under way, while the others work
    /// for it.
    pub(crate) async fn stop(self) {
        let deadline = self.drain + STOP_DEADLINE;
        if let Err(error) = self.supervisor.stop_child(&self.head, deadline).await {
            tracing::debug!(%error, "the head is gone already");
        }
        let others = self.supervisor.status();
        join_all(others.iter().map(|node| async {
            // It may have been given up.
            let _ = self.supervisor.stop_child(&node.name, STOP_DEADLINE).await;
        }))
        .await;
    }
}

/// Kills nodes that are frozen, so that they are started again: those that the head has not heard of
/// for too long, and the head itself when it takes connections and does not answer.
async fn tend(supervisor: Arc<Supervisor>, head: String, api: String) {
    let client = reqwest::Client::builder().timeout(ANSWER_MAX).build();
    let Ok(client) = client else { return };
    let mut unanswered = 0;
    let mut silent: HashMap<(String, u32), u32> = HashMap::new();
    loop {
        tokio::time::sleep(TEND_EVERY).await;
        let asked = client.get(format!("{api}/v1/cluster")).send().await;
        let report = match asked {
            Ok(answer) => answer.json::<ClusterReport>().await,
            Err(error) => Err(error),
        };
        let frozen: Vec<(String, u32)> = match report {
            Ok(report) => {
                unanswered = 0;
                let now = report.nodes.into_iter().filter(|node| !node.alive);
                let now: Vec<_> = now.map(|node| (node.name, node.pid)).collect();
                silent.retain(|node, _| now.contains(node));
                for node in now {
                    *silent.entry(node).or_default() += 1;
                }
                let often = silent.iter().filter(|(_, looks)| **looks >= SILENT_MAX);
                often.map(|(node, _)| node.clone()).collect()
            }
            Err(error) if error.is_timeout() => {
                unanswered += 1;
                let all = supervisor.status().into_iter();
                let head = all.filter(|node| unanswered >= UNANSWERED_MAX && node.name == head);
                head.filter_map(|node| Some((node.name, node.pid?)))
                    .collect()
            }
            // It is being started.
            Err(_) => Vec::new(),
        };
        for (name, pid) in frozen {
            // A node that was started again meanwhile has another process.
            if let Err(error) = supervisor.kill_child(&name, pid, "frozen: it does not answer") {
                tracing::debug!(%error, "there is no such node to kill");
            }
        }
    }
}

/// Shows on standard error how far each shard's loading has come.
pub(crate) struct LoadBars {
    bars: indicatif::MultiProgress,
    shown: Vec<indicatif::ProgressBar>,
}

impl LoadBars {
    pub(crate) fn new() -> Self {
        Self {
            bars: indicatif::MultiProgress::new(),
            shown: Vec::new(),
        }
    }

    pub(crate) fn show(&mut self, report: &ClusterReport) {
        for (index, shard) in report.shards.iter().enumerate() {
            if index == self.shown.len() {
                let style = indicatif::ProgressStyle::with_template(
                    "{prefix:>12} {bar:32} {bytes}/{total_bytes} {bytes_per_sec}",
                );
                let bar = indicatif::ProgressBar::new(0);
                let bar = bar.with_style(style.expect("the template is well formed"));
                let bar = bar.with_prefix(shard.node.clone());
                self.shown.push(self.bars.add(bar));
            }
            if let Some(LoadProgress {
                bytes_loaded,
                bytes_total,
                ..
            }) = shard.load
            {
                self.shown[index].set_length(bytes_total);
                self.shown[index].set_position(bytes_loaded);
            }
        }
    }

    pub(crate) fn finish(self) {
        for bar in &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// On how many threads each of so many processes of this machine computes, unless the user says so.
pub(crate) fn cpu_threads_each(processes: usize) -> Option<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let said = std::env::var_os(CPU_THREADS).is_some();
    (!said).then_some((cores / processes.max(1)).max(1))
}

/// No weights, or one for each node, every one above 0.
pub(crate) fn check_weights(weights: &[f64], nodes: u32) -> Result<()> {
    ensure!(
        weights.is_empty() || weights.len() == nodes as usize,
        "--weights has {} numbers for {nodes} nodes",
        weights.len()
    );
    ensure!(
        weights
            .iter()
            .all(|weight| weight.is_finite() && *weight > 0.0),
        "every number of --weights must be above 0"
    );
    Ok(())
}

/// The folder to work in. One that the user named stays, and is used again.
fn data_folder(named: Option<&Path>) -> Result<(PathBuf, Option<TempDir>)> {
    match named {
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            Ok((folder.canonicalize()?, None))
        }
        None => {
            let scratch = tempfile::Builder::new().prefix("offbook-").tempdir();
            let scratch = scratch.context("cannot make a temporary folder")?;
            Ok((scratch.path().to_owned(), Some(scratch)))
        }
    }
}

/// Nodes must know each other's ports before the first one starts, so each is asked for now and
/// bound again a moment later.
pub(crate) fn reserve_udp() -> Result<SocketAddr> {
    free_port::udp(LOOPBACK).context("no free UDP port on loopback")
}

pub(crate) fn reserve_tcp(wanted: SocketAddr) -> Result<SocketAddr> {
    let free = match wanted.port() {
        0 => free_port::tcp(wanted.ip()),
        _ => TcpListener::bind(wanted).map(|_| wanted),
    };
    free.with_context(|| format!("cannot listen on {wanted}: choose another --http"))
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// How often the nodes' standing is looked at.
const TEND_EVERY: Duration = Duration::from_secs(1);
/// The head answers in milliseconds; so many times in a row it does not, and it is frozen.
const ANSWER_MAX: Duration = Duration::from_secs(2);
const UNANSWERED_MAX: u32 = 5;
/// A node whose link was lost and that is there announces itself within a second; whoever the head has
/// not heard of at so many looks in a row is frozen.
const SILENT_MAX: u32 = 3;
const POLL_EVERY: Duration = Duration::from_millis(50);
/// Somebody may wait for this cluster: whoever does is told why at such intervals.
const STANDSTILL: Duration = Duration::from_secs(15);
/// A process starts in milliseconds; a machine that is short of memory takes longer.
const HEAD_START_MAX: Duration = Duration::from_secs(30);
/// Longer than a node gives its shard.
const STOP_DEADLINE: Duration = Duration::from_secs(8);
