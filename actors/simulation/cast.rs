//! What runs in the processes: the same actors as in those of `offbook node` and `offbook shard`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future;
use offbook_protocol::{FastSynch, KvBits, Layout, NodeWeight, Phase, Transport};
use offbook_runtime::simulation::network::Socket;
use offbook_runtime::simulation::start;
use offbook_runtime::supervise::{ActorRef, Exit, RestartPolicy, Supervisor};
use offbook_runtime::{Identity, Limits, Patience, ProcessName, System, SystemConfig, Trust};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::backstage::{Backstage, Hall, Launcher, Order};
use super::client::Crowd;
use super::engine::Engine;
use super::process::Process;
use super::story::Story;
use super::{CONTEXT_TOKENS, Event, LIMITS, Pid, World};
use crate::membership::{ClusterSettings, Membership, ReportCluster, SchedulerLinks};
use crate::node_agent::{NodeAgent, Reporting, ShardKeeping, ShardLaunch, StopShard};
use crate::roll::Roll;
use crate::scheduler::{Scheduler, SchedulerLimits};
use crate::shard_worker::engine_thread::{EngineThread, News};
use crate::shard_worker::{ShardWorker, ShardWorkerConfig, StallLimits};
use crate::throttle::WindowSettings;

/// What the head said of itself last.
#[derive(Default)]
pub(super) struct Seen(RefCell<Report>);

#[derive(Default)]
struct Report {
    head: Pid,
    at: Duration,
    ready: bool,
    in_use: usize,
    requests: u32,
    detail: String,
}

impl Seen {
    /// Whether this head has just said that it serves with so many nodes, and that it has nothing to do.
    pub(super) fn serves(&self, head: Pid, nodes: usize) -> bool {
        let report = self.0.borrow();
        let is_fresh = report.head == head && report.ready && report.requests == 0;
        is_fresh && report.in_use == nodes
    }

    /// Nothing that was said before counts.
    pub(super) fn forget(&self) {
        self.0.take();
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0.borrow();
        let (head, at, detail) = (report.head, report.at, &report.detail);
        write!(
            f,
            "head {head} at {at:?} with {} nodes: {detail:?}",
            report.in_use
        )
    }
}

/// What every process is told.
#[derive(Clone)]
struct Place {
    pid: Pid,
    machine: usize,
    machines: usize,
    backstage: Backstage,
    /// Of its random numbers.
    seed: [u8; 32],
}

/// What a head has besides a node.
struct Throne {
    limits: SchedulerLimits,
    epochs: PathBuf,
    crowd: Crowd,
    seen: Rc<Seen>,
    story: Rc<Story>,
}

impl World {
    fn place(&mut self, pid: Pid, machine: usize) -> Place {
        let mut seed = [0; 32];
        seed.fill_with(|| self.chance.below(256) as u8);
        Place {
            pid,
            machine,
            machines: self.machines.len(),
            backstage: self.backstage.clone(),
            seed,
        }
    }

    fn bind(
        &self,
        machine: usize,
        addr: SocketAddr,
    ) -> impl FnOnce(Duration) -> Arc<Socket> + use<> {
        let network = Arc::clone(&self.network);
        move |now| network.bind(machine, addr, now)
    }

    pub(super) fn start_node(&mut self, machine: usize) {
        let pid = self.backstage.next_pid();
        self.note(|| format!("node {machine} starts as process {pid}"));
        let place = self.place(pid, machine);
        let throne = (machine == 0).then(|| Throne {
            limits: self.limits,
            epochs: self.disk.path().join("epoch"),
            crowd: Crowd::new(&self.clients, &self.story, &mut self.chance),
            seen: Rc::clone(&self.seen),
            story: Rc::clone(&self.story),
        });
        let now = self.timeline.now();
        let bind = self.bind(machine, node_addr(machine));
        let main = move |socket, terminate: Arc<Notify>| async move {
            node(place, throne, socket, terminate.notified()).await;
        };
        let process = Process::start(machine, now, bind, main);
        self.processes.insert(pid, process);
        self.machines[machine].node = Some(pid);
    }

    /// A node starts its shard's process.
    pub(super) fn start_shard(&mut self, machine: usize, pid: Pid, ended: oneshot::Sender<Exit>) {
        self.note(|| format!("node {machine} starts its shard as process {pid}"));
        let place = self.place(pid, machine);
        let (engine, news, thread) = EngineThread::played();
        let now = self.timeline.now();
        let port = FIRST_SHARD_PORT + pid as u16;
        let bind = self.bind(machine, SocketAddr::new(host(machine), port));
        // The system starts a program, and that reads its files.
        let starting = self.chance.ms(20, 150);
        let main = move |socket, terminate: Arc<Notify>| async move {
            sleep(starting).await;
            shard(place, socket, (engine, news), terminate.notified()).await;
        };
        let mut process = Process::start(machine, now, bind, main);
        process.ended = Some(ended);
        self.processes.insert(pid, process);
        self.engines.insert(pid, Engine::new(thread));
        let machine = &mut self.machines[machine];
        machine.shard = Some(pid);
        machine.starts += 1;
    }

    /// Ends a process at once; a node takes its shard with it, by the drop of what it holds.
    pub(super) fn kill(&mut self, pid: Pid, exit: Exit) {
        let Some(mut process) = self.processes.remove(&pid) else {
            return;
        };
        let machine = process.machine;
        self.note(|| format!("process {pid} on {machine} is dead: {exit}"));
        if let Some(ended) = process.ended.take() {
            self.engines.remove(&pid);
            self.leaves_groups(pid);
            self.machines[machine].shard.take_if(|shard| *shard == pid);
            let pause = self.chance.ms(0, 5);
            self.timeline.after(pause, Event::Exited(pid, exit.clone()));
            self.exits.insert(pid, ended);
            self.call_operator(machine);
        } else {
            self.machines[machine].node = None;
            self.node_is_gone(machine);
        }
        process.end(&self.network);
        self.carry_out();
    }

    /// The kernel says that a shard's process has ended.
    pub(super) fn exited(&mut self, pid: Pid, exit: Exit) {
        if let Some(ended) = self.exits.remove(&pid) {
            // Its node may be gone too.
            let _ = ended.send(exit);
        }
    }
}

/// The process of a node.
async fn node(
    place: Place,
    throne: Option<Throne>,
    socket: Arc<Socket>,
    terminate: impl Future<Output = ()>,
) {
    let addr = node_addr(place.machine);
    let system = system(&place, name(place.machine), addr, socket);
    for other in (0..place.machines).filter(|other| *other != place.machine) {
        system.learn(name(other), node_addr(other));
    }
    let irreplaceable = irreplaceable(&place);
    if let Some(throne) = throne {
        head(&place, throne, &system, &irreplaceable);
    }
    let (replaceable, _news) = Supervisor::new(POLICY);
    ends_with(&replaceable, &place);
    let launcher = Launcher {
        machine: place.machine,
        backstage: place.backstage.clone(),
    };
    let keeping = ShardKeeping {
        restarts: POLICY,
        first_sign: FIRST_SIGN,
        frozen_grace: FROZEN_GRACE,
    };
    let launch = ShardLaunch::Played(launcher);
    let reporting = Reporting {
        head: name(0),
        roll: Roll::new(system.process(), Vec::new()),
    };
    let agent = NodeAgent::supervised(&replaceable, &system, reporting, launch, keeping);
    let agent = agent.expect("a node has one agent");
    terminate.await;
    let _ = agent.ask(StopShard, SHUTDOWN_DEADLINE).await;
    system.shutdown(SHUTDOWN_DEADLINE).await;
    place.backstage.order(Order::Kill(place.pid));
    future::pending::<()>().await;
}

fn head(place: &Place, throne: Throne, system: &System, supervisor: &Supervisor) {
    let scheduler = Scheduler::new(system.clone(), throne.limits);
    let scheduler = scheduler.supervised(supervisor);
    let scheduler = scheduler.expect("a head has one scheduler");
    let links = SchedulerLinks {
        begin_epoch: scheduler.recipient(),
        end_epoch: scheduler.recipient(),
        blame_epoch: scheduler.recipient(),
        give_up: scheduler.recipient(),
        count_requests: scheduler.recipient(),
    };
    let settings = settings(place.machines);
    let membership = Membership::new(system.clone(), settings, throne.epochs, links);
    let membership = membership.expect("the epoch can be read");
    let membership = membership.supervised(supervisor);
    let membership = membership.expect("a head has one membership");
    let (pid, story) = (place.pid, throne.story);
    tokio::task::spawn_local(watch(pid, membership, throne.seen, story));
    throne.crowd.come(system);
}

/// Looks at the cluster as an operator does.
async fn watch(head: Pid, membership: ActorRef<Membership>, seen: Rc<Seen>, story: Rc<Story>) {
    loop {
        sleep(LOOK_EVERY).await;
        let Ok(report) = membership.ask(ReportCluster, LOOK_EVERY).await else {
            continue;
        };
        let running = report.requests_running;
        assert!(running <= LIMITS.sequences_max, "{running} sequences run");
        let report = Report {
            head,
            at: story.now(),
            ready: report.phase == Phase::Ready,
            in_use: report.nodes.iter().filter(|node| node.in_use).count(),
            requests: report.requests_running + report.requests_queued,
            detail: report.detail,
        };
        seen.0.replace(report);
    }
}

/// The process of a shard.
async fn shard(
    place: Place,
    socket: Arc<Socket>,
    engine: (EngineThread, mpsc::Receiver<News>),
    terminate: impl Future<Output = ()>,
) {
    let own = name(place.machine);
    let addr = SocketAddr::new(host(place.machine), FIRST_SHARD_PORT + place.pid as u16);
    let child = own.child("shard-0").expect("it is a name");
    let system = system(&place, child, addr, socket);
    system.learn(own.clone(), node_addr(place.machine));
    system.learn(name(0), node_addr(0));
    let config = ShardWorkerConfig {
        node: own.node().to_owned(),
        head: name(0),
        identity: identity(place.machine),
        trust: trust(),
        tensors: host(place.machine),
        model: None,
        window: WindowSettings::default(),
        memory_limit_bytes: None,
        stalls: StallLimits {
            load: Duration::MAX,
            prefill: Duration::MAX,
            decode: Duration::MAX,
        },
        roll: Roll::new(system.process(), Vec::new()),
    };
    let hall = Hall {
        pid: place.pid,
        backstage: place.backstage.clone(),
    };
    let worker = ShardWorker::played(system.clone(), config, hall, engine);
    let worker = worker.expect("it has a name");
    let supervisor = irreplaceable(&place);
    let worker = worker.supervised(&supervisor);
    let _worker = worker.expect("a shard has one worker");
    terminate.await;
    let _ = timeout(GOODBYE_DEADLINE, system.shutdown(GOODBYE_DEADLINE)).await;
    place.backstage.order(Order::Kill(place.pid));
    future::pending::<()>().await;
}

fn system(place: &Place, process: ProcessName, listen: SocketAddr, socket: Arc<Socket>) -> System {
    let lose_min = match process.as_str().contains('/') {
        // A head that stands still for a while costs no step.
        true => SILENCE,
        false => Patience::default().lose_min,
    };
    let config = SystemConfig {
        process,
        identity: identity(place.machine),
        trust: trust(),
        listen,
        boot: u64::from(place.pid),
        limits: Limits {
            patience: Patience {
                lose_min,
                lose_max: SILENCE,
                ..Patience::default()
            },
            idle_timeout: SILENCE,
            spin: Duration::ZERO,
            ..Limits::default()
        },
    };
    start(config, socket, place.seed, place.pid).expect("an endpoint can be made")
}

/// A supervisor of actors that their process cannot go on without.
fn irreplaceable(place: &Place) -> Supervisor {
    let (supervisor, _news) = Supervisor::new(RestartPolicy {
        intensity: 0,
        ..POLICY
    });
    ends_with(&supervisor, place);
    supervisor
}

fn ends_with(supervisor: &Supervisor, place: &Place) {
    let (pid, backstage) = (place.pid, place.backstage.clone());
    supervisor.on_escalation(move |_| backstage.order(Order::Exit(pid, Exit::Code(70))));
}

fn settings(machines: usize) -> ClusterSettings {
    let node = |machine| (name(machine).to_string(), NodeWeight(1.0));
    ClusterSettings {
        api: String::new(),
        nodes: (0..machines).map(node).collect(),
        model: PathBuf::new(),
        layout: Layout::Pipeline,
        transport: Transport::Quic,
        rdma: BTreeMap::new(),
        fast_synch: FastSynch::Off,
        prefill_chunk_tokens: 8,
        context_tokens: CONTEXT_TOKENS,
        sequences_max: LIMITS.sequences_max,
        kv_tokens: None,
        kv_bits: KvBits::AsComputed,
        prefix_cache: true,
        micro_batches: None,
        collective_deadline: super::engine::COLLECTIVE_DEADLINE,
        load_deadline: Duration::from_secs(5),
        node_grace: NODE_GRACE,
    }
}

fn identity(machine: usize) -> Arc<Identity> {
    static IDENTITIES: OnceLock<Vec<Arc<Identity>>> = OnceLock::new();
    let made = |machine| Identity::generate(name(machine).node()).expect("a key can be made");
    let identities = IDENTITIES.get_or_init(|| (0..MACHINES_MAX).map(made).map(Arc::new).collect());
    Arc::clone(&identities[machine])
}

fn trust() -> Trust {
    let nodes: Vec<_> = (0..MACHINES_MAX).map(name).collect();
    let keys = (0..MACHINES_MAX).map(|machine| identity(machine).key());
    Trust::pinned("simulated", nodes.iter().map(ProcessName::node).zip(keys))
}

fn name(machine: usize) -> ProcessName {
    format!("node-{machine}").parse().expect("it is a name")
}

fn host(machine: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, machine as u8 + 1))
}

fn node_addr(machine: usize) -> SocketAddr {
    SocketAddr::new(host(machine), 9000)
}

/// Without chance: the supervisor's is not of the seed.
const POLICY: RestartPolicy = RestartPolicy {
    intensity: 5,
    window: Duration::from_secs(60),
    backoff_min: Duration::from_millis(100),
    backoff_max: Duration::from_secs(10),
    jitter: 0.0,
};
const MACHINES_MAX: usize = 5;
const FIRST_SHARD_PORT: u16 = 10_000;
/// The least that is usual where cables are cut.
const SILENCE: Duration = Duration::from_secs(2);
/// The defaults of a cluster's file.
const FIRST_SIGN: Duration = Duration::from_secs(10);
const FROZEN_GRACE: Duration = Duration::from_secs(1);
const NODE_GRACE: Duration = Duration::from_millis(1500);
const GOODBYE_DEADLINE: Duration = Duration::from_millis(200);
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(100);
