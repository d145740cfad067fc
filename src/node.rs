//! `offbook node`: one machine of a cluster. It keeps its shard process running; the head, which is
//! the first node of the cluster file, also forms the group, schedules and serves the API.
//!
//! SIGTERM, Ctrl-C or SIGHUP has a head refuse new requests and finish those under way, within the cluster
//! file's `drain_seconds`, before its shard ends; the second one stops it at once. Another node stops at
//! once, and the epoch with it: to stop a whole cluster, stop its head first.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use offbook_actors::{
    Membership, NodeAgent, Reporting, Scheduler, SchedulerLinks, ShardLaunch, StopShard,
};
use offbook_api::Journal;
use offbook_engine::ModelConfig;
use offbook_runtime::supervise::{ActorRef, Supervisor, lifeline};
use offbook_runtime::{Identity, ProcessName, System, SystemConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::backend;
use crate::cli::Node;
use crate::cluster_file::{ClusterFile, identity_file};
use crate::data_dir::{self, Owned};
use crate::fast_synch;
use crate::kept_actors::{KeptActors, exit};
use crate::stop_signals::StopSignals;

pub(crate) async fn run(options: Node) -> Result<()> {
    let mut told = match options.supervised {
        true => StopSignals::of_a_supervisor()?,
        false => StopSignals::of_an_operator()?,
    };
    if options.supervised {
        lifeline()?;
    }
    raise_open_files();
    let launch = launch(&options)?;
    let Running {
        owned: _owned,
        system,
        kept: _kept,
        api,
        agent,
    } = start(&options, launch).await?;
    told.next().await;
    if let Some(api) = api {
        let journal = api.journal.clone();
        tokio::select! {
            () = api.drain() => {}
            // Whoever says it twice means at once.
            () = told.next() => {}
        }
        journal.keep_all();
    }
    stop(&agent, &system).await;
    Ok(())
}

/// A node that runs.
struct Running {
    owned: Owned,
    system: System,
    /// The actors end with this, after everything that uses them.
    kept: KeptActors,
    /// If it is the head.
    api: Option<Api>,
    agent: ActorRef<NodeAgent>,
}

async fn start(options: &Node, launch: ShardLaunch) -> Result<Running> {
    let mut cluster = ClusterFile::load(&options.cluster)?;
    let own = cluster.node(&options.name)?.clone();
    let identity = Identity::load(&identity_file(&options.data_dir))?;
    ensure!(
        own.keys.contains(&identity.key()),
        "the key in {} is not the one that the cluster file has for '{}'",
        options.data_dir.display(),
        own.name
    );
    let owned = data_dir::own(&options.data_dir).await?;
    let system = System::start(SystemConfig {
        process: ProcessName::new(&*own.name)?,
        identity: Arc::new(identity),
        trust: cluster.trust()?,
        listen: own.address,
        boot: boot(),
        limits: cluster.runtime_limits(),
    })
    .await
    .with_context(|| format!("cannot listen on {} (UDP)", own.address))?;
    for node in cluster.nodes.iter().filter(|node| node.name != own.name) {
        system.learn(ProcessName::new(&*node.name)?, node.address);
    }

    let is_head = own.name == cluster.head().name;
    if let Some(model) = &options.model {
        cluster.model.clone_from(model);
    }
    if !options.supervised {
        // Who started this node for a whole cluster has looked already.
        cluster.fast_synch = fast_synch::chosen(None, cluster.fast_synch)?;
    }
    let kept = KeptActors::new(system.process(), &options.data_dir, exit);
    let mut api = None;
    if is_head {
        api = Some(start_head(&system, &cluster, options, &kept.irreplaceable).await?);
    }
    let reporting = Reporting {
        head: ProcessName::new(&*cluster.head().name)?,
        roll: kept.roll.clone(),
    };
    let keeping = cluster.shard_keeping();
    let agent = NodeAgent::supervised(&kept.replaceable, &system, reporting, launch, keeping)?;
    Ok(Running {
        owned,
        system,
        kept,
        api,
        agent,
    })
}

/// The API of a head.
struct Api {
    /// Of the answers under way.
    journal: Journal,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Api {
    /// Has it refuse new requests, and waits until those under way are answered, or out of time.
    async fn drain(self) {
        drop(self.stop);
        if let Err(error) = self.served.await {
            tracing::error!(%error, "the API has ended before its time");
        }
    }
}

/// A client's connection takes a file descriptor, and a streamed answer another. Many systems begin with
/// few and allow more.
fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = OPEN_FILES.map(|files| maximum.map_or(files, |maximum| files.min(maximum)));
    for files in wanted {
        let more = current.is_some_and(|current| current < files);
        let raised = Rlimit {
            current: Some(files),
            maximum,
        };
        if !more || setrlimit(Resource::Nofile, raised).is_ok() {
            return;
        }
    }
    tracing::warn!(
        ?current,
        "the limit of open files could not be raised: fewer clients fit"
    );
}

/// Scheduler, membership and API.
async fn start_head(
    system: &System,
    cluster: &ClusterFile,
    options: &Node,
    supervisor: &Supervisor,
) -> Result<Api> {
    let model = &cluster.model;
    let config = ModelConfig::open(model)
        .with_context(|| format!("cannot serve the model in {}", model.display()))?;
    let listener = TcpListener::bind(options.api.http).await;
    let listener = listener.with_context(|| {
        let http = options.api.http;
        format!("cannot listen on {http}: choose another --http")
    })?;
    let scheduler = Scheduler::new(system.clone(), cluster.scheduler_limits());
    let scheduler = scheduler.supervised(supervisor)?;
    let links = SchedulerLinks {
        begin_epoch: scheduler.recipient(),
        end_epoch: scheduler.recipient(),
        blame_epoch: scheduler.recipient(),
        give_up: scheduler.recipient(),
        count_requests: scheduler.recipient(),
    };
    let epochs = options.data_dir.join("epoch");
    let settings = cluster.settings(config.context_tokens as u32, listener.local_addr()?);
    let membership = Membership::new(system.clone(), settings, epochs.clone(), links)
        .with_context(|| format!("cannot read {}", epochs.display()))?;
    let membership = membership.supervised(supervisor)?;
    let answers = options.data_dir.join("answers");
    let journal = Journal::open(answers.clone())
        .with_context(|| format!("cannot keep answers in {}", answers.display()))?;
    let origins = options.api.allowed_origins.clone();
    let service = backend::service(
        system,
        membership,
        cluster,
        &config,
        journal.clone(),
        origins,
    )?;
    let (stop, stopped) = oneshot::channel::<()>();
    let drain = cluster.drain();
    let served = actix::spawn(async move {
        let stopped = async move { drop(stopped.await) };
        let served = offbook_api::serve(listener, Arc::new(service), drain, stopped).await;
        if let Err(error) = served {
            tracing::error!(%error, "the API has stopped");
        }
    });
    Ok(Api {
        journal,
        stop,
        served,
    })
}

fn launch(options: &Node) -> Result<ShardLaunch> {
    let path = |path: &std::path::Path| path.display().to_string();
    let mut arguments = vec![
        "shard".to_owned(),
        "--cluster".into(),
        path(&options.cluster),
        "--name".into(),
        options.name.clone(),
        "--data-dir".into(),
        path(&options.data_dir),
    ];
    if let Some(model) = &options.model {
        arguments.extend(["--model".into(), path(model)]);
    }
    if let Some(limit) = options.memory_limit {
        arguments.extend(["--memory-limit".into(), limit.to_string()]);
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Ok(ShardLaunch::Program { program, arguments })
}

async fn stop(agent: &ActorRef<NodeAgent>, system: &System) {
    if let Err(error) = agent.ask(StopShard, STOP_SHARD_DEADLINE).await {
        tracing::warn!(%error, "the node agent is gone already");
    }
    system.shutdown(SHUTDOWN_DEADLINE).await;
}

/// Higher at each start of a process on this machine, as long as its clock does not go back by more
/// than the process was away.
pub(crate) fn boot() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Longer than the agent gives its shard.
const STOP_SHARD_DEADLINE: Duration = Duration::from_secs(8);
/// Enough for a crowd; and what macOS allows where it does not allow that.
const OPEN_FILES: [u64; 2] = [65_536, 10_240];
/// What is under way may take a round trip.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
