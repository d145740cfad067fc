//! `offbook shard`: the process that holds one share of the model. Its node starts it, and it never
//! outlives its node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use offbook_actors::{ShardWorker, ShardWorkerConfig};
use offbook_runtime::supervise::lifeline;
use offbook_runtime::{Identity, ProcessName, System, SystemConfig};
use rustix::process::{Signal, getpid, kill_process};

use crate::byte_size::ByteSize;
use crate::cli::Shard;
use crate::cluster_file::{ClusterFile, identity_file};
use crate::kept_actors::KeptActors;
use crate::node::boot;
use crate::stop_signals::StopSignals;
use crate::throttle;

pub(crate) async fn run(options: Shard) -> Result<()> {
    let mut told = StopSignals::of_a_supervisor()?;
    lifeline()?;
    let cluster = ClusterFile::load(&options.cluster)?;
    let own = cluster.node(&options.name)?;
    let identity = Arc::new(Identity::load(&identity_file(&options.data_dir))?);
    let trust = cluster.trust()?;
    let system = System::start(SystemConfig {
        process: ProcessName::new(&*own.name)?.child("shard-0")?,
        identity: Arc::clone(&identity),
        trust: trust.clone(),
        listen: (own.address.ip(), 0).into(),
        boot: boot(),
        limits: cluster.shard_runtime_limits(),
    })
    .await?;
    system.learn(ProcessName::new(&*own.name)?, own.address);
    let head = ProcessName::new(&*cluster.head().name)?;
    system.learn(head.clone(), cluster.head().address);
    let kept = KeptActors::new(system.process(), &options.data_dir, fail_at_once);
    let config = ShardWorkerConfig {
        node: own.name.clone(),
        head,
        identity,
        trust,
        tensors: own.address.ip(),
        model: options.model,
        window: throttle::chosen(cluster.window_settings())?,
        memory_limit_bytes: options
            .memory_limit
            .or(own.memory_limit)
            .map(ByteSize::bytes),
        stalls: cluster.stall_limits(),
        roll: kept.roll.clone(),
    };
    let worker = ShardWorker::new(system.clone(), config)?;
    worker.supervised(&kept.irreplaceable)?;
    told.next().await;
    // So that nobody takes this end for a loss.
    let _ = tokio::time::timeout(GOODBYE_DEADLINE, system.shutdown(GOODBYE_DEADLINE)).await;
    end_at_once(Signal::KILL)
}

/// A fault of ours: SIGKILL would pass for somebody else's will. The watchdog does the same.
pub(crate) fn fail_at_once() {
    drop(end_at_once(Signal::ALARM));
}

/// Ends this process without its libraries' last words: the engine's thread may be inside a device
/// call that nothing interrupts, and MLX must not be torn down under it. Nothing that a shard holds
/// outlives the process.
fn end_at_once(signal: Signal) -> Result<()> {
    Ok(kill_process(getpid(), signal)?)
}

/// A round trip, and what the system takes to schedule it. The node waits for this process.
const GOODBYE_DEADLINE: Duration = Duration::from_millis(200);
