//! Keeps a node's shard process running, and tells the membership what becomes of it. One per node.

use std::path::PathBuf;
use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, ResponseFuture, StreamHandler,
    WrapFuture,
};
use futures::future;
use offbook_runtime::supervise::{
    ActorRef, ActorSpec, ChildSpec, ChildState, Event, Restart, RestartPolicy, Supervisor,
    SupervisorError,
};
use offbook_runtime::{ActorPath, LostReason, ProcessName, Remote, RemoteMessage, System};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::membership::Announce;
use crate::names;
use crate::roll::Roll;

/// How a node starts its shard process.
#[derive(Clone, Debug)]
pub enum ShardLaunch {
    Program {
        program: PathBuf,
        arguments: Vec<String>,
    },
    /// A simulation plays it.
    #[cfg(test)]
    #[expect(private_interfaces, reason = "nobody else has one")]
    Played(crate::simulation::Launcher),
}

impl ShardLaunch {
    fn start(&self, supervisor: &Supervisor) -> Result<(), SupervisorError> {
        match self {
            Self::Program { program, arguments } => {
                let mut spec = ChildSpec::new(SHARD, program);
                for argument in arguments {
                    spec = spec.arg(argument);
                }
                supervisor.start(spec)
            }
            #[cfg(test)]
            Self::Played(launcher) => {
                supervisor.start_kept(SHARD.to_owned(), Box::new(launcher.clone()))
            }
        }
    }
}

/// How a node keeps its shard process running.
#[derive(Clone, Debug)]
pub struct ShardKeeping {
    pub restarts: RestartPolicy,
    /// How long a new shard process may take until its node hears of it. Whoever was not heard of in time
    /// leaves the next one twice as long, up to eight times: a machine may be short of memory.
    pub first_sign: Duration,
    /// How long a shard process whose link to its node was lost may take to come back before it
    /// counts as frozen and is killed. A lost link costs a pause, a killed process its weights.
    pub frozen_grace: Duration,
}

/// Whom a node tells of itself, and of which actors.
#[derive(Clone, Debug)]
pub struct Reporting {
    pub head: ProcessName,
    pub roll: Roll,
}

/// See the module's own words.
pub struct NodeAgent {
    system: System,
    node: String,
    first_sign: Duration,
    frozen_grace: Duration,
    /// Processes in a row that were not heard of.
    unheard: u32,
    /// Counts how often a shard process has attached.
    attachments: u64,
    supervisor: Supervisor,
    launch: ShardLaunch,
    /// Taken when the actor starts.
    events: Option<mpsc::Receiver<Event>>,
    running_pid: Option<u32>,
    announce: Remote<Announce>,
    roll: Roll,
}

impl NodeAgent {
    /// Starts an agent that answers to the head of the cluster, and keeps it. The shard process starts
    /// with each life of the agent and ends with it.
    ///
    /// # Errors
    /// When the supervisor has an agent already.
    pub fn supervised(
        by: &Supervisor,
        system: &System,
        reporting: Reporting,
        launch: ShardLaunch,
        keeping: ShardKeeping,
    ) -> Result<ActorRef<Self>, SupervisorError> {
        let own = system.clone();
        let agent = by.start_actor(ActorSpec::new(names::NODE_AGENT), move |_| {
            Self::new(&own, reporting.clone(), launch.clone(), keeping.clone())
        })?;
        system.register::<Attach>(names::NODE_AGENT, agent.recipient());
        system.register::<Probe>(names::NODE_AGENT, agent.recipient());
        Ok(agent)
    }

    fn new(
        system: &System,
        reporting: Reporting,
        launch: ShardLaunch,
        keeping: ShardKeeping,
    ) -> Self {
        let Reporting { head, roll } = reporting;
        let (supervisor, events) = Supervisor::new(keeping.restarts);
        Self {
            first_sign: keeping.first_sign,
            frozen_grace: keeping.frozen_grace,
            unheard: 0,
            attachments: 0,
            system: system.clone(),
            node: system.process().node().to_owned(),
            supervisor,
            launch,
            events: Some(events),
            running_pid: None,
            announce: system.remote(&ActorPath::new(head, names::MEMBERSHIP)),
            roll,
        }
    }

    /// Kills the shard process unless it has attached within `grace`, again or for the first time.
    fn expect_attachment(&self, grace: Duration, why: String, ctx: &mut Context<Self>) {
        let (attachments, expected) = (self.attachments, self.running_pid);
        ctx.run_later(grace, move |this, _| {
            let Some(pid) = this.running_pid.filter(|pid| Some(*pid) == expected) else {
                return;
            };
            if this.attachments != attachments {
                return;
            }
            tracing::error!(
                node = this.node,
                pid,
                why,
                "the shard is frozen and is killed"
            );
            if let Err(error) = this.supervisor.kill_child(SHARD, pid, why) {
                tracing::debug!(%error, "there is no shard to kill");
            }
        });
    }

    /// `ended` is the process whose end is the news, and how it ended.
    fn announce(&self, ended: Option<Ended>, ctx: &mut Context<Self>) {
        let status = self
            .supervisor
            .status()
            .into_iter()
            .find(|child| child.name == SHARD);
        let announce = Announce {
            node: self.node.clone(),
            pid: self.system.pid(),
            restarts: status.as_ref().map_or(0, |status| status.restarts as u32),
            last_failure: status
                .as_ref()
                .and_then(|status| status.last.as_ref())
                .map_or_else(String::new, describe),
            last_lines: status
                .as_ref()
                .and_then(|status| status.last.as_ref())
                .map_or_else(Vec::new, |restart| cut(&restart.last_lines)),
            ended_pid: ended.map(|ended| ended.pid),
            failed: ended.is_some_and(|ended| ended.failed),
            given_up: status.is_some_and(|status| status.state == ChildState::Escalated),
            actors: self.roll.report(),
        };
        let remote = self.announce.clone();
        let asked = async move { remote.ask(announce, ANNOUNCE_EVERY * 3).await };
        ctx.spawn(asked.into_actor(self).map(|reply, this, _| {
            if let Err(error) = reply {
                tracing::debug!(node = this.node, %error, "the head does not answer");
            }
        }));
    }
}

/// A shard process that ended.
#[derive(Clone, Copy)]
struct Ended {
    pid: u32,
    /// Nobody ended it.
    failed: bool,
}

impl NodeAgent {
    /// Whichever process ran does so no more.
    fn ended(&mut self, failed: bool) -> Option<Ended> {
        let pid = self.running_pid.take()?;
        Some(Ended { pid, failed })
    }
}

impl Actor for NodeAgent {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if let Some(events) = self.events.take() {
            ctx.add_stream(futures::stream::unfold(events, |mut events| async {
                events.recv().await.map(|event| (event, events))
            }));
        }
        if let Err(error) = self.launch.start(&self.supervisor) {
            tracing::error!(%error, "cannot start the shard");
        }
        ctx.run_interval(ANNOUNCE_EVERY, |this, ctx| this.announce(None, ctx));
    }
}

impl StreamHandler<Event> for NodeAgent {
    fn handle(&mut self, event: Event, ctx: &mut Context<Self>) {
        let mut ended = None;
        match event {
            Event::Started { pid, .. } => {
                tracing::info!(node = self.node, pid, "the shard process started");
                self.running_pid = Some(pid);
                let patience = self.first_sign * (1 << self.unheard.min(DOUBLED_MAX));
                self.unheard = self.unheard.saturating_add(1);
                let why = format!("frozen: it was not heard of within {patience:?} of its start");
                self.expect_attachment(patience, why, ctx);
            }
            Event::Exited { restart, pause, .. } => {
                let cause = describe(&restart);
                tracing::warn!(node = self.node, cause, ?pause, "the shard process ended");
                ended = self.ended(!restart.exit.is_from_outside());
            }
            Event::Escalated { restart, .. } => {
                let cause = describe(&restart);
                tracing::error!(node = self.node, cause, "the shard process ends too often");
                ended = self.ended(!restart.exit.is_from_outside());
            }
            Event::Stopped { .. } => ended = self.ended(false),
        }
        self.announce(ended, ctx);
    }

    /// The supervisor is dropped with this actor, not before.
    fn finished(&mut self, _: &mut Context<Self>) {}
}

/// A shard process is there: as long as its link holds, it is not frozen. The reply says whether the
/// node knows the process as its shard; it may not have noted the start yet.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "bool")]
pub struct Attach {
    pub process: String,
    pub pid: u32,
}

impl RemoteMessage for Attach {
    const NAME: &'static str = "attach";
    type Reply = bool;
}

impl Handler<Attach> for NodeAgent {
    type Result = bool;

    fn handle(&mut self, attach: Attach, ctx: &mut Context<Self>) -> bool {
        let Attach { process, pid } = attach;
        let Ok(process) = ProcessName::new(&*process) else {
            return false;
        };
        if self.running_pid != Some(pid) {
            tracing::debug!(pid, "a process calls itself the shard of this node");
            return false;
        }
        self.attachments += 1;
        self.unheard = 0;
        let attachments = self.attachments;
        let watch = self.system.watch(&process).into_actor(self);
        ctx.spawn(watch.map(move |lost, this, ctx| {
            if this.attachments == attachments && this.running_pid == Some(pid) {
                let grace = this.frozen_grace;
                if lost.reason == LostReason::Closed {
                    tracing::debug!(node = this.node, pid, "the shard says goodbye");
                } else {
                    let reason = &lost.reason;
                    tracing::warn!(node = this.node, pid, %reason, ?grace, "the shard does not answer");
                }
                this.expect_attachment(grace, format!("frozen: {}", lost.reason), ctx);
            }
        }));
        true
    }
}

/// Do you reach this node? The node itself says yes.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "bool")]
pub(crate) struct Probe {
    pub(crate) node: String,
}

impl RemoteMessage for Probe {
    const NAME: &'static str = "probe";
    type Reply = bool;
}

impl Handler<Probe> for NodeAgent {
    type Result = ResponseFuture<bool>;

    fn handle(&mut self, probe: Probe, _: &mut Context<Self>) -> Self::Result {
        if probe.node == self.node {
            return Box::pin(future::ready(true));
        }
        let Ok(process) = ProcessName::new(&*probe.node) else {
            return Box::pin(future::ready(false));
        };
        let agent = ActorPath::new(process, names::NODE_AGENT);
        let asked = self.system.remote::<Probe>(&agent);
        Box::pin(async move {
            asked
                .ask(probe, PROBE_DEADLINE)
                .await
                .is_ok_and(|reached| reached)
        })
    }
}

/// Stops the shard in order, and resolves when its process is gone.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct StopShard;

impl Handler<StopShard> for NodeAgent {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: StopShard, _: &mut Context<Self>) -> Self::Result {
        let (nothing, _) = Supervisor::new(RestartPolicy::default());
        let supervisor = std::mem::replace(&mut self.supervisor, nothing);
        Box::pin(async move { supervisor.stop(STOP_DEADLINE).await })
    }
}

/// The same lines, none so long that fifty of them would not fit a message.
fn cut(lines: &[String]) -> Vec<String> {
    let cut = |line: &String| line.chars().take(LINE_CHARS_MAX).collect();
    lines.iter().map(cut).collect()
}

/// One line for an operator: how it ended, and the last thing it said.
fn describe(restart: &Restart) -> String {
    let how = restart.exit.to_string();
    if !restart.why.is_empty() {
        return format!("{how}, for it was {}", restart.why);
    }
    match restart.last_lines.last() {
        Some(line) => format!("{how}, after: {line}"),
        None => how,
    }
}

/// Two nodes that have no link yet make one in a few round trips.
pub(crate) const PROBE_DEADLINE: Duration = Duration::from_secs(1);
/// As much of a line as an operator reads: fifty take 60 kB at most.
const LINE_CHARS_MAX: usize = 300;
/// The shard's name in the supervisor: a node has one.
const SHARD: &str = "shard-0";
/// Often enough that an operator sees a dead node at once; nothing else depends on it.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);
/// Times that the patience with a new process is doubled.
const DOUBLED_MAX: u32 = 3;
/// A shard ends within a step; the rest is for a device that does not answer.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
