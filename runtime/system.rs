//! This process among the others: its endpoint, its names, and what it knows about its peers.
//!
//! Everything that touches the network runs on one thread of its own (`endpoint.rs`), so that a busy
//! actor never delays a keep-alive, and a busy link never delays an actor.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use std::{fmt, io};

use actix::Recipient;
use futures::FutureExt;
use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{Notify, watch};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::clock;
use crate::door::Door;
use crate::endpoint::{self, Started};
use crate::failure::{CLOSED, Lost, LostReason};
use crate::hello::HandshakeError;
use crate::identity::{Identity, IdentityError};
use crate::limits::Limits;
use crate::link::Link;
use crate::message::{Open, RemoteMessage, StreamMessage};
use crate::name::{ActorPath, ProcessName};
use crate::peer::{Connect, Peer};
use crate::registry::Registry;
use crate::remote::Remote;
use crate::stream::RemoteStream;
use crate::sync::lock;
use crate::trust::Trust;
use crate::watch::{Gone, GoneReason, watch_here, watch_there};

/// What a [`System`] is started with.
pub struct SystemConfig {
    /// This process's name. Its first part must be the identity's node.
    pub process: ProcessName,
    /// The node's key. A child process uses that of its node.
    pub identity: Arc<Identity>,
    /// Whom to talk to.
    pub trust: Trust,
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// This process's incarnation: higher at each start, so that peers can refuse an older one.
    pub boot: u64,
    /// Every bound.
    pub limits: Limits,
}

/// The runtime of this process. Clones are the same system; when the last is dropped, all links are
/// closed at once, and the port a moment later. Use [`shutdown`](Self::shutdown) to let what is
/// under way end first and to wait for the port.
#[derive(Clone)]
pub struct System {
    shared: Arc<Shared>,
    _owner: Arc<Owner>,
}

impl System {
    /// Binds the socket and starts the links' thread. Peers are dialled when they are first used.
    ///
    /// # Errors
    /// [`StartError`], before anything is sent.
    pub async fn start(config: SystemConfig) -> Result<Self, StartError> {
        config.check()?;
        Ok(Self::run(endpoint::start(&config).await?, config))
    }

    /// The system over an endpoint that waits for it.
    pub(crate) fn run(started: Started, config: SystemConfig) -> Self {
        let (stopped, _) = watch::channel(false);
        let shared = Arc::new(Shared {
            process: config.process,
            trust: config.trust,
            boot: config.boot,
            pid: started.pid,
            registry: Registry::new(config.limits.clone()),
            limits: config.limits,
            addr: started.addr,
            runtime: started.runtime.clone(),
            endpoint: Mutex::new(Some(started.endpoint.clone())),
            peers: Mutex::new(BTreeMap::new()),
            answers: TaskTracker::new(),
            dials: AtomicU64::new(0),
            chances: Mutex::new(StdRng::from_seed(started.seed)),
            door: Door::default(),
            closing: AtomicBool::new(false),
            farewells: AtomicBool::new(false),
            stop: Notify::new(),
            stopped,
            stirred: AtomicBool::new(false),
            stirring: Notify::new(),
        });
        tracing::info!(process = %shared.process, addr = %shared.addr, "listening");
        started.run(Arc::clone(&shared));
        let owner = Arc::new(Owner {
            shared: Arc::clone(&shared),
        });
        Self {
            shared,
            _owner: owner,
        }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Where this process listens, with the port that it got.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// This process's name.
    pub fn process(&self) -> &ProcessName {
        &self.shared.process
    }

    /// This process's id, as its machine knows it.
    pub fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Makes a local actor reachable for one message, under a name that may take several messages.
    /// Registering again replaces, as after a restart with a new address.
    pub fn register<M: RemoteMessage>(&self, actor: &str, recipient: Recipient<M>) {
        self.shared.registry.add(actor, recipient);
    }

    /// Makes a local actor reachable for one subscription.
    pub fn register_stream<M: StreamMessage>(&self, actor: &str, recipient: Recipient<Open<M>>) {
        self.shared.registry.add_stream(actor, recipient);
    }

    /// Takes an actor's name away: callers get `NoSuchActor`.
    pub fn unregister(&self, actor: &str) {
        self.shared.registry.remove(actor);
    }

    /// Notes where a process listens; a new address replaces the old one. A process that dialled
    /// this one is known without, and one that has moved is known to have when it dials from there.
    pub fn learn(&self, process: ProcessName, addr: SocketAddr) {
        self.shared.peer(&process).learn(addr);
    }

    /// How many tells from here that process has said to have put into no mailbox: the actor was not
    /// there, or its mailbox was full, or it did not understand them. It says so within some heartbeats,
    /// over the link that the tells came over; what it had not said when that was lost is not counted.
    pub fn tells_refused(&self, process: &ProcessName) -> u64 {
        let peer = self.shared.peer(process);
        peer.tells_refused.load(Ordering::Relaxed)
    }

    /// How many connections the socket holds now: those of the links, those that have not said hello yet,
    /// and those that were closed a moment ago.
    pub fn open_connections(&self) -> usize {
        let endpoint = self.shared.endpoint();
        endpoint.map_or(0, |endpoint| endpoint.open_connections())
    }

    /// A reference to one message of an actor anywhere. Nothing is sent until it is used; an actor
    /// of this process is reached without the network.
    pub fn remote<M: RemoteMessage>(&self, path: &ActorPath) -> Remote<M> {
        Remote::new(Arc::clone(&self.shared), path.clone())
    }

    /// The same for a subscription.
    pub fn remote_stream<M: StreamMessage>(&self, path: &ActorPath) -> RemoteStream<M> {
        RemoteStream::new(Arc::clone(&self.shared), path.clone())
    }

    /// Resolves once, when the link to that process is lost, or at once when none can be made.
    /// The watch begins with this call, not with the first poll. One's own process is lost when
    /// this system shuts down.
    pub fn watch(&self, process: &ProcessName) -> impl Future<Output = Lost> + Send + use<> {
        let own = *process == self.shared.process;
        let link = if own {
            None
        } else {
            Some(self.shared.link(process))
        };
        let mut stopped = self.shared.stopped.subscribe();
        let process = process.clone();
        async move {
            match link {
                Some(Ok(link)) => link.lost().await,
                Some(Err(reason)) => Lost { process, reason },
                None => {
                    let _ = stopped.wait_for(|stopped| *stopped).await;
                    Lost {
                        process,
                        reason: LostReason::ShutDown,
                    }
                }
            }
        }
    }

    /// Resolves once, when an actor here or elsewhere is gone: it stopped, its name was taken away,
    /// its process or the link to it was lost, or it was never there. The watch begins with this
    /// call; it is of the actor that has the name now, not of one that takes it later. A stop is
    /// noticed within some 10 ms. Dropping the future ends the watch. An actor that watches spawns
    /// this into its own context.
    ///
    /// A watch of another process's actor takes one of the
    /// [`subscriptions_max`](Limits::subscriptions_max) streams of the link.
    pub fn watch_actor(&self, actor: &ActorPath) -> impl Future<Output = Gone> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        let watching = if actor.process == shared.process {
            let watched = shared.registry.watch(&actor.actor);
            watch_here(watched, shared.stopped.subscribe()).boxed()
        } else {
            let link = shared.link(&actor.process);
            let watching = watch_there(Arc::clone(&shared), link, actor.actor.clone());
            let watching = AbortOnDropHandle::new(shared.runtime.spawn(watching));
            let shut_down = |_| GoneReason::Lost(LostReason::ShutDown);
            watching
                .map(move |reason| reason.unwrap_or_else(shut_down))
                .boxed()
        };
        let actor = actor.clone();
        watching.map(|reason| Gone { actor, reason })
    }

    /// Refuses new work, lets asks under way be answered and queues be written, then closes all
    /// links, all within `deadline`.
    pub async fn shutdown(&self, deadline: Duration) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::Release);
        shared.answers.close();
        let drained = tokio::time::timeout(deadline, async {
            shared.answers.wait().await;
            let links: Vec<_> = shared.links();
            links.iter().for_each(|link| link.outbox.finish());
            join_all(links.iter().map(|link| farewell(link))).await;
        })
        .await;
        shared.farewells.store(drained.is_ok(), Ordering::Release);
        shared.close();
        let mut stopped = shared.stopped.subscribe();
        let _ = tokio::time::timeout(STOP_TIMEOUT, stopped.wait_for(|stopped| *stopped)).await;
    }
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "System({} at {})", self.shared.process, self.shared.addr)
    }
}

/// Resolves when the queue of a link is written and the other side knows.
async fn farewell(link: &Link) {
    match tokio::time::timeout(DIALLING_MAX, link.up()).await {
        Ok(_) => drop(link.lost().await),
        Err(_) => link.lose(LostReason::ShutDown),
    }
}

/// Closes the system when the last clone is dropped; references to remote actors do not keep it.
struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// What the references, the links and the endpoint's thread have in common.
pub(crate) struct Shared {
    pub(crate) process: ProcessName,
    pub(crate) trust: Trust,
    pub(crate) boot: u64,
    pid: u32,
    pub(crate) limits: Limits,
    pub(crate) registry: Registry,
    /// The asks of others that actors here are working on.
    pub(crate) answers: TaskTracker,
    /// Wakes the endpoint's thread to end.
    pub(crate) stop: Notify,
    /// True when that thread has ended.
    pub(crate) stopped: watch::Sender<bool>,
    pub(crate) stirred: AtomicBool,
    pub(crate) stirring: Notify,
    addr: SocketAddr,
    runtime: tokio::runtime::Handle,
    endpoint: Mutex<Option<quinn::Endpoint>>,
    peers: Mutex<BTreeMap<ProcessName, Arc<Peer>>>,
    dials: AtomicU64,
    /// Draws the pauses between dials.
    chances: Mutex<StdRng>,
    pub(crate) door: Door,
    closing: AtomicBool,
    /// Every peer has answered our goodbye.
    farewells: AtomicBool,
}

impl Shared {
    /// What is known about a process; nothing, at first.
    pub(crate) fn peer(&self, process: &ProcessName) -> Arc<Peer> {
        let mut peers = lock(&self.peers);
        if let Some(peer) = peers.get(process) {
            return Arc::clone(peer);
        }
        let peer = Arc::new(Peer::new(process.clone()));
        peers.insert(process.clone(), Arc::clone(&peer));
        peer
    }

    /// The same for a process that came by itself. One node can neither fill the memory with names of its
    /// own making, nor have more links than it could have processes.
    pub(crate) fn caller(&self, process: &ProcessName) -> Result<Arc<Peer>, HandshakeError> {
        let node = process.node();
        let mut peers = lock(&self.peers);
        if !peers.contains_key(process) {
            let of_node = |name: &ProcessName| name.node() == node;
            if peers.keys().filter(|name| of_node(name)).count() >= PROCESSES_PER_NODE_MAX {
                // Whoever holds one of them elsewhere, holds the only one.
                peers.retain(|name, peer| {
                    !of_node(name) || Arc::strong_count(peer) > 1 || !peer.is_forgettable()
                });
            }
            if peers.keys().filter(|name| of_node(name)).count() >= PROCESSES_PER_NODE_MAX {
                return Err(HandshakeError::Busy(format!(
                    "{node} has {PROCESSES_PER_NODE_MAX} processes here already"
                )));
            }
        }
        drop(peers);
        Ok(self.peer(process))
    }

    /// The link to a process: that which stands, or a new one that is being dialled.
    pub(crate) fn link(self: &Arc<Self>, process: &ProcessName) -> Result<Arc<Link>, LostReason> {
        self.link_of(&self.peer(process))
    }

    pub(crate) fn link_of(self: &Arc<Self>, peer: &Arc<Peer>) -> Result<Arc<Link>, LostReason> {
        if self.is_closing() {
            return Err(LostReason::ShutDown);
        }
        match peer.connect(&self.limits, clock::now()) {
            Connect::Joined(link) => Ok(link),
            Connect::Dial(link, addr) => {
                let dial =
                    endpoint::dial(Arc::clone(self), Arc::clone(peer), Arc::clone(&link), addr);
                self.runtime.spawn(dial);
                Ok(link)
            }
            Connect::BackingOff(error) => Err(LostReason::Unreachable(error)),
            Connect::UnknownAddress => Err(LostReason::UnknownProcess),
        }
    }

    pub(crate) fn link_ended(&self, link: &Arc<Link>, reason: LostReason) {
        self.peer(&link.peer).ended(link);
        link.lose(reason);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Did every peer answer our goodbye?
    pub(crate) fn all_knew(&self) -> bool {
        self.farewells.load(Ordering::Acquire)
    }

    /// A number for a dial of this process, higher than all before.
    pub(crate) fn next_dial(&self) -> u64 {
        self.dials.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A number from 0 to 1 that nobody else draws.
    pub(crate) fn chance(&self) -> f64 {
        lock(&self.chances).random()
    }

    /// The endpoint, until it is closed.
    pub(crate) fn endpoint(&self) -> Option<quinn::Endpoint> {
        lock(&self.endpoint).clone()
    }

    /// Tells the links' thread that something passed, so that more may follow soon.
    pub(crate) fn stir(&self) {
        if !self.limits.spin.is_zero() && !self.stirred.swap(true, Ordering::AcqRel) {
            self.stirring.notify_one();
        }
    }

    /// Drives what waits for a local actor to its end; a shutdown waits for it.
    pub(crate) fn finish(&self, waiting: impl Future<Output = ()> + Send + 'static) {
        self.answers.spawn_on(waiting, &self.runtime);
    }

    fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.peers)
            .values()
            .filter_map(|peer| peer.link())
            .collect()
    }

    /// Closes every link and the socket, now. May be called again.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        for link in self.links() {
            link.lose(LostReason::ShutDown);
        }
        if let Some(endpoint) = lock(&self.endpoint).take() {
            endpoint.close(CLOSED, b"");
        }
        self.stop.notify_one();
    }
}

impl SystemConfig {
    /// On any port of loopback, with the usual limits. The boot is the time, in milliseconds since
    /// 1970: a machine whose clock goes backwards between two starts needs a count of its own.
    pub fn new(process: ProcessName, identity: Arc<Identity>, trust: Trust) -> Self {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let boot = since_1970.map_or(0, |time| time.as_millis().try_into().unwrap_or(u64::MAX));
        Self {
            process,
            identity,
            trust,
            listen: ([127, 0, 0, 1], 0).into(),
            boot,
            limits: Limits::default(),
        }
    }

    fn check(&self) -> Result<(), StartError> {
        if let Some(fault) = self.limits.fault() {
            return Err(StartError::Limits(fault));
        }
        if self.trust.cluster.len() > CLUSTER_BYTES_MAX {
            return Err(StartError::Cluster);
        }
        let (node, key) = (self.process.node(), self.identity.key());
        if !self.trust.is_pinned(node, &key) {
            return Err(StartError::NotPinned {
                node: node.to_owned(),
                key: key.to_string(),
            });
        }
        Ok(())
    }
}

/// Why a system did not start: the fault is in the configuration or the machine's.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken or not this machine's.
    #[error("cannot listen on {addr}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Every peer would refuse this process.
    #[error("the key {key} of this process is not pinned for node {node:?}: peers would refuse it")]
    NotPinned {
        /// The node that the process's name begins with.
        node: String,
        /// The identity's key.
        key: String,
    },
    /// A bound makes no sense.
    #[error("these limits cannot work: {0}")]
    Limits(&'static str),
    /// The cluster's id does not fit into a hello.
    #[error("the cluster's id is longer than {CLUSTER_BYTES_MAX} bytes")]
    Cluster,
    /// TLS refused the identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The links' thread could not be started.
    #[error("cannot start the links' thread")]
    Thread(#[source] io::Error),
}

/// Processes of one node that may be linked, or remembered for having been. A node has a process for each
/// device and a few for measuring.
const PROCESSES_PER_NODE_MAX: usize = 256;

/// With two names of 127 bytes this leaves room in a hello of 1024.
const CLUSTER_BYTES_MAX: usize = 512;

/// A link is made in a few round trips: at the end nobody waits longer for one that is not there.
const DIALLING_MAX: Duration = Duration::from_millis(250);
/// What the thread may take to tell the peers goodbye and to answer those that missed it.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
