//! Brings the shards of a cluster together, and notices when one is lost. Head node only.
//!
//! Node agents announce themselves and what became of their shard process; shard processes
//! register; then [`formation`](self::formation) decides, and this actor carries its decisions to
//! the shards and to the scheduler. It never looks at a request or a token.

mod formation;
mod presence;
mod epoch_file;
mod roll_call;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, Recipient, ResponseActFuture,
    ResponseFuture, WrapFuture,
};
use offbook_protocol::{
    ActorReport, ClusterReport, Epoch, FastSynch, GroupMember, GroupSpec, KvBits, Layout,
    LoadProgress, NodeReport, NodeWeight, Rank, RequestFailure, ShardReport, ShardSpec, ShardSteps,
    Transport,
};
use offbook_runtime::supervise::{ActorRef, ActorSpec, Supervisor, SupervisorError, once};
use offbook_runtime::{
    ActorPath, AskError, LostReason, OlderBody, ProcessName, RemoteMessage, System, clock,
};
use serde::{Deserialize, Serialize};

use self::epoch_file::EpochFile;
use self::formation::{Action, Formation, Shard};
use self::presence::Presence;
use self::roll_call::RollCall;
use crate::names;
use crate::node_agent::{PROBE_DEADLINE, Probe};
use crate::scheduler::{BeginEpoch, BlameEpoch, CountRequests, EndEpoch, GiveUp, RequestCounts};
use crate::shard_worker::{JoinGroup, LeaveGroup, LoadRefusal, LoadShard, Loaded, ReadSteps};

/// What all shards of the cluster are told.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// Where clients reach the head, as a URL: for the report alone.
    pub api: String,
    /// In rank order, with the share of the model that each takes.
    pub nodes: Vec<(String, NodeWeight)>,
    pub model: PathBuf,
    pub layout: Layout,
    pub transport: Transport,
    /// By node: which of its RDMA devices leads to which other node.
    pub rdma: BTreeMap<String, BTreeMap<String, String>>,
    pub fast_synch: FastSynch,
    pub prefill_chunk_tokens: u32,
    pub context_tokens: u32,
    pub sequences_max: u32,
    /// Positions that the caches of all sequences hold together; `None` for as many as they may need.
    pub kv_tokens: Option<u32>,
    /// In how many bits these caches keep keys and values.
    pub kv_bits: KvBits,
    /// Whether what a request has computed is kept for those that begin with the same tokens.
    pub prefix_cache: bool,
    /// See [`ShardSpec::micro_batches`].
    pub micro_batches: Option<NonZeroU32>,
    pub collective_deadline: Duration,
    /// How long reading the weights may take.
    pub load_deadline: Duration,
    /// How long a node may be away before the others go on without it.
    pub node_grace: Duration,
}

/// See the module's own words.
pub struct Membership {
    system: System,
    settings: ClusterSettings,
    formation: Formation,
    epochs: EpochFile,
    presence: Presence,
    roll_call: RollCall,
    /// What the ranks said when they had loaded: the same on every rank, but for the positions that
    /// their caches may hold, of which these are the fewest.
    loaded: Option<Loaded>,
    kv_tokens_noted: Option<u32>,
    begin_epoch: Recipient<BeginEpoch>,
    end_epoch: Recipient<EndEpoch>,
    blame_epoch: Recipient<BlameEpoch>,
    give_up: Recipient<GiveUp>,
    count_requests: Recipient<CountRequests>,
}

/// Whom the membership tells about epochs.
pub struct SchedulerLinks {
    pub begin_epoch: Recipient<BeginEpoch>,
    pub end_epoch: Recipient<EndEpoch>,
    pub blame_epoch: Recipient<BlameEpoch>,
    pub give_up: Recipient<GiveUp>,
    pub count_requests: Recipient<CountRequests>,
}

impl Membership {
    /// A membership that keeps its epoch number in `epoch_file`, so that a number is never used
    /// twice over restarts of the head.
    ///
    /// # Errors
    /// When that file is there and cannot be read.
    pub fn new(
        system: System,
        settings: ClusterSettings,
        epoch_file: PathBuf,
        scheduler: SchedulerLinks,
    ) -> std::io::Result<Self> {
        let (epochs, last) = EpochFile::open(epoch_file)?;
        let nodes = settings.nodes.iter().map(|(name, _)| name.clone());
        Ok(Self {
            formation: Formation::new(nodes, last),
            system,
            epochs,
            presence: Presence::new(settings.node_grace),
            roll_call: RollCall::default(),
            loaded: None,
            kv_tokens_noted: None,
            begin_epoch: scheduler.begin_epoch,
            end_epoch: scheduler.end_epoch,
            blame_epoch: scheduler.blame_epoch,
            give_up: scheduler.give_up,
            count_requests: scheduler.count_requests,
            settings,
        })
    }

    /// Starts it, and has other processes reach it by its name. It is not to be restarted.
    ///
    /// # Errors
    /// When the supervisor has a membership already.
    pub fn supervised(self, by: &Supervisor) -> Result<ActorRef<Self>, SupervisorError> {
        let system = self.system.clone();
        let spec = ActorSpec::new(names::MEMBERSHIP).mailbox_max(MAILBOX_MAX);
        let membership = by.start_actor(spec, once(self))?;
        system.register::<Announce>(names::MEMBERSHIP, membership.recipient());
        system.register::<RegisterShard>(names::MEMBERSHIP, membership.recipient());
        system.register::<NoteProgress>(names::MEMBERSHIP, membership.recipient());
        system.register::<StepFailed>(names::MEMBERSHIP, membership.recipient());
        Ok(membership)
    }

    fn carry_out(&mut self, actions: Vec<Action>, ctx: &mut Context<Self>) {
        for action in actions {
            match action {
                Action::BeginSoon { fruitless } => {
                    ctx.run_later(begin_pause(fruitless), |this, ctx| this.begin(ctx));
                }
                Action::Load { epoch, rank } => self.load(epoch, rank, ctx),
                Action::Join {
                    epoch,
                    rank,
                    addresses,
                } => self.join(epoch, rank, addresses, ctx),
                Action::Leave { epoch, rank, why } => self.leave(epoch, rank, why),
                Action::Serve { epoch } => self.serve(epoch),
                Action::Suspend { epoch, why } => self.suspend(epoch, &why),
                Action::Blame { epoch } => {
                    if self.blame_epoch.try_send(BlameEpoch { epoch }).is_err() {
                        tracing::error!(%epoch, "the scheduler does not hear of a failure");
                    }
                }
                Action::GiveUp(failure) => self.give_up(failure),
            }
        }
    }

    fn begin(&mut self, ctx: &mut Context<Self>) {
        let actions = self.formation.begin();
        if actions.is_empty() {
            return;
        }
        let epoch = self.formation.epoch();
        self.loaded = None;
        if let Err(error) = self.epochs.store(epoch) {
            tracing::error!(%epoch, %error, "cannot store the epoch: is the disk full?");
        }
        tracing::info!(%epoch, "an epoch begins");
        self.carry_out(actions, ctx);
    }

    fn load(&mut self, epoch: Epoch, rank: Rank, ctx: &mut Context<Self>) {
        let settings = &self.settings;
        let spec = ShardSpec {
            epoch,
            rank,
            model: settings.model.clone(),
            layout: settings.layout,
            weights: self.weights(),
            transport: settings.transport,
            fast_synch: settings.fast_synch,
            prefill_chunk_tokens: settings.prefill_chunk_tokens,
            context_tokens: settings.context_tokens,
            sequences_max: settings.sequences_max,
            kv_tokens: settings.kv_tokens,
            kv_bits: settings.kv_bits,
            prefix_cache: settings.prefix_cache,
            micro_batches: settings.micro_batches,
            collective_deadline: settings.collective_deadline,
        };
        let deadline = settings.load_deadline;
        let asked = self.ask_shard(rank, LoadShard(spec), deadline);
        ctx.spawn(asked.into_actor(self).map(move |reply, this, ctx| {
            let actions = match reply {
                Ok(Ok(loaded)) => {
                    let address = loaded.address;
                    this.note_loaded(epoch, rank, loaded);
                    this.formation.loaded(epoch, rank, address)
                }
                Ok(Err(LoadRefusal {
                    detail,
                    lasting: true,
                })) => {
                    tracing::error!(%epoch, %rank, detail, "a shard cannot hold its share");
                    this.formation.refused(epoch, rank, &detail)
                }
                Ok(Err(LoadRefusal { detail, .. })) => this.formation.failed(epoch, rank, &detail),
                Err(why) => this.formation.failed(epoch, rank, &why),
            };
            this.carry_out(actions, ctx);
        }));
    }

    /// All ranks are to count alike, so the one with the least memory decides for all.
    fn note_loaded(&mut self, epoch: Epoch, rank: Rank, loaded: Loaded) {
        if epoch != self.formation.epoch() {
            return;
        }
        let kv_tokens = loaded.kv_tokens;
        match &mut self.loaded {
            Some(least) if least.kv_tokens <= kv_tokens => {}
            _ => {
                let node = self.formation.ranked(rank).map(|member| &*member.node);
                tracing::debug!(%epoch, %rank, node, kv_tokens, "what caches may hold");
                self.loaded = Some(loaded);
            }
        }
    }

    fn join(
        &mut self,
        epoch: Epoch,
        rank: Rank,
        addresses: Vec<std::net::SocketAddr>,
        ctx: &mut Context<Self>,
    ) {
        let members = self.formation.group().zip(addresses);
        let members = members
            .filter_map(|(member, address)| {
                Some(GroupMember {
                    process: member.shard.as_ref()?.process.clone(),
                    address,
                    rdma: self.rdma_from(&member.node),
                })
            })
            .collect();
        let spec = GroupSpec {
            epoch,
            rank,
            members,
            kv_tokens: self.loaded.as_ref().map_or(0, |loaded| loaded.kv_tokens),
        };
        let asked = self.ask_shard(rank, JoinGroup(spec), JOIN_DEADLINE);
        ctx.spawn(asked.into_actor(self).map(move |reply, this, ctx| {
            let actions = match reply {
                Ok(Ok(joined)) => this.formation.joined(epoch, rank, joined.collectives),
                Ok(Err(why)) | Err(why) => this.formation.failed(epoch, rank, &why),
            };
            this.carry_out(actions, ctx);
        }));
    }

    /// The devices that lead from a node to those of the group, in rank order.
    fn rdma_from(&self, node: &str) -> Vec<Option<String>> {
        let devices = self.settings.rdma.get(node);
        let to = |other: &str| devices.and_then(|devices| devices.get(other)).cloned();
        self.formation
            .group()
            .map(|member| to(&member.node))
            .collect()
    }

    fn leave(&self, epoch: Epoch, rank: Rank, why: String) {
        if let Some(path) = self.shard_path(rank) {
            let leave = LeaveGroup { epoch, why };
            if let Err(error) = self.system.remote::<LeaveGroup>(&path).try_tell(leave) {
                // Its link is lost: the shard sees that too, and leaves by itself.
                tracing::debug!(%rank, error = %error.reason, "cannot tell a shard to leave");
            }
        }
    }

    fn serve(&mut self, epoch: Epoch) {
        let Some(loaded) = self.loaded.clone() else {
            return;
        };
        self.note_smaller_caches(loaded.kv_tokens);
        let shards = self.formation.group().filter_map(|member| {
            member
                .shard
                .as_ref()
                .and_then(|shard| ProcessName::new(&*shard.process).ok())
        });
        let begin = BeginEpoch {
            epoch,
            shards: shards.collect(),
            sampling_rank: loaded.sampling_rank,
            context_tokens: self.context_tokens(),
            vocabulary: loaded.vocabulary,
        };
        tracing::info!(%epoch, "the cluster serves");
        if self.begin_epoch.try_send(begin).is_err() {
            tracing::error!(%epoch, "the scheduler does not take the new epoch");
        }
    }

    /// Says once what memory does not allow.
    fn note_smaller_caches(&mut self, kv_tokens: u32) {
        if self.kv_tokens_noted.replace(kv_tokens) == Some(kv_tokens) {
            return;
        }
        let settings = &self.settings;
        let context_tokens = settings.context_tokens;
        let full = context_tokens.saturating_mul(settings.sequences_max);
        let wanted = settings.kv_tokens.unwrap_or(full);
        if kv_tokens < context_tokens {
            tracing::warn!(
                context_tokens = kv_tokens,
                wanted = context_tokens,
                "memory allows no sequence of the full context: longer requests are refused"
            );
        } else if kv_tokens < wanted {
            tracing::info!(
                kv_tokens,
                wanted,
                "memory allows smaller caches than all sequences of the full context would fill: \
                 requests that find no room wait"
            );
        }
    }

    fn suspend(&self, epoch: Epoch, why: &str) {
        // Whoever noticed the cause has logged it, as loudly as it deserves.
        tracing::info!(%epoch, why, "the cluster is suspended");
        if self.end_epoch.try_send(EndEpoch { epoch }).is_err() {
            tracing::error!(%epoch, "the scheduler does not take the end of the epoch");
        }
    }

    fn give_up(&self, failure: RequestFailure) {
        tracing::error!(%failure, "nobody is kept waiting for this cluster");
        if self.give_up.try_send(GiveUp(failure)).is_err() {
            tracing::error!("the scheduler was not told");
        }
    }

    fn ask_shard<M: RemoteMessage>(
        &self,
        rank: Rank,
        message: M,
        deadline: Duration,
    ) -> impl Future<Output = Result<M::Reply, String>> + use<M> {
        let remote = self
            .shard_path(rank)
            .map(|path| self.system.remote::<M>(&path));
        async move {
            let Some(remote) = remote else {
                return Err("its shard is gone".to_owned());
            };
            remote
                .ask(message, deadline)
                .await
                .map_err(|error: AskError| error.to_string())
        }
    }

    fn shard_path(&self, rank: Rank) -> Option<ActorPath> {
        let shard = self.formation.ranked(rank)?.shard.as_ref()?;
        let process = ProcessName::new(&*shard.process).ok()?;
        Some(ActorPath::new(process, names::SHARD_WORKER))
    }

    fn report(&self, requests_running: u32, requests_queued: u32) -> ClusterReport {
        let members = self.formation.members();
        let shard = |member: &formation::Member| ShardReport {
            rank: self.formation.rank_of(&member.node),
            node: member.node.clone(),
            pid: member.shard.as_ref().map_or(0, |shard| shard.pid),
            alive: member.shard.is_some(),
            restarts: member.restarts,
            last_failure: member.last_failure.clone(),
            last_lines: member.last_lines.clone(),
            given_up: member.given_up,
            load: member.load,
            kv: None,
            collectives: member.collectives.clone(),
        };
        let node = |member: &formation::Member| NodeReport {
            name: member.node.clone(),
            pid: member.node_pid,
            alive: member.node_alive,
            in_use: self.formation.rank_of(&member.node).is_some(),
        };
        let apart = |member: &&formation::Member| self.formation.rank_of(&member.node).is_none();
        ClusterReport {
            api: self.settings.api.clone(),
            epoch: self.formation.epoch(),
            phase: self.formation.phase(),
            detail: self.formation.detail().to_owned(),
            model: self.settings.model.display().to_string(),
            layout: self.settings.layout,
            transport: self.settings.transport,
            fast_synch: self.settings.fast_synch,
            context_tokens: self.context_tokens(),
            requests_running,
            requests_queued,
            nodes: members.iter().map(node).collect(),
            shards: (self.formation.group())
                .chain(members.iter().filter(apart))
                .map(shard)
                .collect(),
            actors: (self.roll_call).report(members.iter().map(|member| &*member.node)),
        }
    }

    /// Positions that a sequence may reach; until all have loaded, those that were asked for.
    fn context_tokens(&self) -> u32 {
        let asked = self.settings.context_tokens;
        let held = |loaded: &Loaded| loaded.context_tokens.min(loaded.kv_tokens);
        self.loaded.as_ref().map_or(asked, held)
    }

    /// The share of each rank of the epoch.
    fn weights(&self) -> Vec<NodeWeight> {
        let nodes = self.settings.nodes.iter();
        let used = nodes.filter(|(node, _)| self.formation.rank_of(node).is_some());
        used.map(|(_, weight)| *weight).collect()
    }

    /// Leaves nodes behind that have been away for too long.
    fn note_absence(&mut self, ctx: &mut Context<Self>) {
        let members = self.formation.members();
        for node in self.presence.away_too_long(members, clock::now()) {
            let actions = self.formation.leave_behind(&node);
            if !actions.is_empty() {
                tracing::warn!(
                    node,
                    "a node does not come back: the others go on without it"
                );
            }
            self.carry_out(actions, ctx);
        }
    }

    /// Takes nodes in again that are back, at a moment in which nothing runs.
    fn take_back(&mut self, ctx: &mut Context<Self>) {
        if !self.formation.could_be_more() {
            return;
        }
        let counted = self.count_requests.send(CountRequests).into_actor(self);
        ctx.spawn(counted.map(|counted, this, ctx| {
            if counted.is_ok_and(|counts| counts == RequestCounts::default()) {
                let actions = this.formation.take_back();
                this.carry_out(actions, ctx);
            }
        }));
    }

    /// Nodes that have been silent for too long count as away. Their shards are watched apart.
    fn note_silence(&mut self) {
        for (node, alive) in self.presence.standings(clock::now()) {
            if let Some(member) = self.formation.member_mut(node)
                && member.node_alive != alive
            {
                tracing::warn!(node, alive, "a node's standing has changed");
                member.node_alive = alive;
            }
        }
    }
}

impl Actor for Membership {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(STANDING_EVERY, |this, ctx| {
            this.note_silence();
            this.note_absence(ctx);
            this.take_back(ctx);
        });
    }
}

/// A node is alive, and this is what its shard process has been through. Sent at each change, and
/// every second.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct Announce {
    pub node: String,
    pub pid: u32,
    pub restarts: u32,
    /// How the shard ended last; empty when it never did.
    pub last_failure: String,
    /// What it last wrote to its standard error, cut to what a message may carry.
    pub last_lines: Vec<String>,
    /// The process that ended, when this is the news of an end.
    pub ended_pid: Option<u32>,
    /// It failed by itself: nobody ended it.
    pub failed: bool,
    /// The node does not start its shard any more.
    pub given_up: bool,
    /// Those that the node's own process keeps.
    pub actors: Vec<ActorReport>,
}

impl RemoteMessage for Announce {
    const NAME: &'static str = "announce";
    const VERSION: u16 = 4;
    type Reply = ();

    fn decode_older(older: &OlderBody<'_>) -> Option<Self> {
        older.read(3).map(AnnounceBefore::into)
    }
}

/// Without the actors: version 3.
#[derive(Serialize, Deserialize)]
pub(crate) struct AnnounceBefore {
    pub(crate) node: String,
    pub(crate) pid: u32,
    pub(crate) restarts: u32,
    pub(crate) last_failure: String,
    pub(crate) last_lines: Vec<String>,
    pub(crate) ended_pid: Option<u32>,
    pub(crate) failed: bool,
    pub(crate) given_up: bool,
}

impl From<AnnounceBefore> for Announce {
    fn from(before: AnnounceBefore) -> Self {
        Self {
            node: before.node,
            pid: before.pid,
            restarts: before.restarts,
            last_failure: before.last_failure,
            last_lines: before.last_lines,
            ended_pid: before.ended_pid,
            failed: before.failed,
            given_up: before.given_up,
            actors: Vec::new(),
        }
    }
}

impl Handler<Announce> for Membership {
    type Result = ();

    fn handle(&mut self, news: Announce, ctx: &mut Context<Self>) {
        let Some(member) = self.formation.member_mut(&news.node) else {
            tracing::warn!(
                node = news.node,
                "a node announced itself that the cluster has not"
            );
            return;
        };
        member.restarts = news.restarts;
        member.last_failure.clone_from(&news.last_failure);
        member.last_lines.clone_from(&news.last_lines);
        member.given_up = news.given_up;
        self.presence.heard(&news.node, clock::now());
        self.roll_call.node_said(&news.node, news.actors);
        if member.node_pid != news.pid || !member.node_alive {
            self.watch_node(&news.node, news.pid, ctx);
        }
        let mut actions = self.formation.announced(&news.node, news.pid);
        if let Some(pid) = news.ended_pid {
            let why = format!("the shard of {} ended: {}", news.node, news.last_failure);
            actions.extend(self.formation.lost(&news.node, pid, why));
            if news.failed {
                actions.extend(self.formation.failed_by_itself(&news.node));
            }
        }
        if news.given_up {
            actions.extend(self.formation.given_up(&news.node, &news.last_failure));
        }
        self.carry_out(actions, ctx);
    }
}

impl Membership {
    /// Notes at once when the link to a node's process is lost; its next announcement undoes that.
    fn watch_node(&self, node: &str, pid: u32, ctx: &mut Context<Self>) {
        let Ok(process) = ProcessName::new(node) else {
            return;
        };
        if process == *self.system.process() {
            return;
        }
        let watch = self.system.watch(&process).into_actor(self);
        let node = node.to_owned();
        ctx.spawn(watch.map(move |lost, this, ctx| {
            let Some(member) = this.formation.member_mut(&node) else {
                return;
            };
            if member.node_pid == pid {
                if lost.reason == LostReason::Closed {
                    tracing::info!(node, "a node says goodbye");
                } else {
                    tracing::warn!(node, reason = %lost.reason, "the link to a node was lost");
                }
                member.node_alive = false;
                this.presence.link_lost(&node);
                if lost.reason != LostReason::Closed {
                    this.probe(&node, ctx);
                }
            }
        }));
    }

    /// Asks all other nodes whether they reach one that is lost to the head.
    fn probe(&self, node: &str, ctx: &mut Context<Self>) {
        let own = self.system.process().node().to_owned();
        let members = self.formation.members().iter();
        let others = members.filter(|member| member.node_alive && member.node != own);
        for by in others.map(|member| member.node.clone()) {
            let Ok(process) = ProcessName::new(&*by) else {
                continue;
            };
            let agent = ActorPath::new(process, names::NODE_AGENT);
            let asked = self.system.remote::<Probe>(&agent);
            let probe = Probe { node: node.into() };
            let node = node.to_owned();
            let asked = async move { asked.ask(probe, PROBE_DEADLINE * 2).await };
            ctx.spawn(asked.into_actor(self).map(move |reached, this, _| {
                if reached.is_ok_and(|reached| reached) {
                    tracing::warn!(
                        node,
                        by,
                        "a node is lost to the head alone: is a cable cut?"
                    );
                    this.formation.reached(&node, &by);
                }
            }));
        }
    }
}

/// A shard process is there and can be given a share.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct RegisterShard {
    pub node: String,
    pub process: String,
    pub pid: u32,
    /// The highest epoch that it was to load; 0 when there was none.
    pub heard: Epoch,
    /// Those that the process keeps.
    pub actors: Vec<ActorReport>,
}

impl RemoteMessage for RegisterShard {
    const NAME: &'static str = "register-shard";
    const VERSION: u16 = 3;
    type Reply = ();

    fn decode_older(older: &OlderBody<'_>) -> Option<Self> {
        older.read(2).map(RegisterShardBefore::into)
    }
}

/// Without the actors: version 2.
#[derive(Serialize, Deserialize)]
pub(crate) struct RegisterShardBefore {
    pub(crate) node: String,
    pub(crate) process: String,
    pub(crate) pid: u32,
    pub(crate) heard: Epoch,
}

impl From<RegisterShardBefore> for RegisterShard {
    fn from(before: RegisterShardBefore) -> Self {
        Self {
            node: before.node,
            process: before.process,
            pid: before.pid,
            heard: before.heard,
            actors: Vec::new(),
        }
    }
}

impl Handler<RegisterShard> for Membership {
    type Result = ();

    fn handle(&mut self, register: RegisterShard, ctx: &mut Context<Self>) {
        let RegisterShard {
            node,
            process,
            pid,
            heard,
            actors,
        } = register;
        let Ok(name) = ProcessName::new(&*process) else {
            return;
        };
        tracing::info!(node, process, pid, "a shard registered");
        if self.formation.member_mut(&node).is_some() {
            self.roll_call.shard_said(&node, actors);
        }
        let watch = self.system.watch(&name).into_actor(self);
        self.formation.heard_of(heard);
        let actions = self.formation.registered(&node, Shard { process, pid });
        let registration = self.formation.registration(&node);
        self.carry_out(actions, ctx);
        ctx.spawn(watch.map(move |lost, this, ctx| {
            let why = format!("the link to the shard of {node} was lost: {}", lost.reason);
            let actions = this.formation.unlinked(&node, registration, why);
            this.carry_out(actions, ctx);
        }));
    }
}

/// How far a shard's loading has come.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct NoteProgress {
    pub node: String,
    pub load: LoadProgress,
}

impl RemoteMessage for NoteProgress {
    const NAME: &'static str = "note-progress";
    type Reply = ();
}

impl Handler<NoteProgress> for Membership {
    type Result = ();

    fn handle(&mut self, progress: NoteProgress, _: &mut Context<Self>) {
        if let Some(member) = self.formation.member_mut(&progress.node) {
            member.load = Some(progress.load);
        }
    }
}

/// A shard's step ended in an error: its results were not used, its epoch is over.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct StepFailed {
    pub epoch: Epoch,
    pub rank: Rank,
    pub why: String,
}

impl RemoteMessage for StepFailed {
    const NAME: &'static str = "step-failed";
    type Reply = ();
}

impl Handler<StepFailed> for Membership {
    type Result = ();

    fn handle(&mut self, failed: StepFailed, ctx: &mut Context<Self>) {
        let StepFailed { epoch, rank, why } = failed;
        tracing::warn!(%epoch, %rank, why, "a step failed");
        let actions = self.formation.failed(epoch, rank, &why);
        self.carry_out(actions, ctx);
    }
}

/// What the cluster looks like now.
#[derive(Debug, Message)]
#[rtype(result = "ClusterReport")]
pub struct ReportCluster;

impl Handler<ReportCluster> for Membership {
    type Result = ResponseActFuture<Self, ClusterReport>;

    fn handle(&mut self, _: ReportCluster, _: &mut Context<Self>) -> Self::Result {
        let counted: ResponseFuture<_> = Box::pin(self.count_requests.send(CountRequests));
        Box::pin(counted.into_actor(self).map(|counted, this, _| {
            let counts = counted.unwrap_or_default();
            this.report(counts.running, counts.queued)
        }))
    }
}

/// What the steps of every shard have taken, in rank order; without those that do not answer.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Vec<ShardSteps>")]
pub struct ReportSteps;

impl Handler<ReportSteps> for Membership {
    type Result = ResponseFuture<Vec<ShardSteps>>;

    fn handle(&mut self, _: ReportSteps, _: &mut Context<Self>) -> Self::Result {
        let shards = self.formation.group().filter_map(|member| {
            let process = ProcessName::new(&*member.shard.as_ref()?.process).ok()?;
            let path = ActorPath::new(process, names::SHARD_WORKER);
            Some(self.system.remote::<ReadSteps>(&path))
        });
        let asked: Vec<_> = shards
            .map(|shard| async move { shard.ask(ReadSteps, STEPS_DEADLINE).await })
            .collect();
        Box::pin(async move {
            let answers = futures::future::join_all(asked).await;
            answers.into_iter().flatten().flatten().collect()
        })
    }
}

/// The first pause lets the news of one failure arrive together; a group that cannot form is tried
/// less and less often.
fn begin_pause(fruitless: u32) -> Duration {
    BEGIN_PAUSE_MIN
        .saturating_mul(1 << fruitless.min(10))
        .min(BEGIN_PAUSE_MAX)
}

const BEGIN_PAUSE_MIN: Duration = Duration::from_millis(20);
const BEGIN_PAUSE_MAX: Duration = Duration::from_secs(10);
/// A shard that is busy loading answers all the same; one that stands still shall not hold up the
/// others' figures.
const STEPS_DEADLINE: Duration = Duration::from_millis(500);
/// Meeting takes a round trip; the rest is for processes that the system has not scheduled yet.
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
/// How often the nodes' standing is looked at.
const STANDING_EVERY: Duration = Duration::from_millis(100);
/// A cluster has a few nodes, each with a message a second and a few when its shard changes.
const MAILBOX_MAX: usize = 1024;
