//! A cluster in virtual time: the actors themselves, over stock QUIC, against thousands of seeds of faults.
//!
//! Each process is a runtime of its own (`process.rs`) with a real system in it, over a network without a
//! machine's sockets: a head with its scheduler and its membership, a node agent on every machine, with
//! the supervisor that keeps its shard's process, and a shard worker in that. What is played is what they
//! stand on: the engine with its collectives (`engine.rs`, `group.rs`) and the machines' processes
//! (`backstage.rs`).
//!
//! One run is a pure function of its seed. Three to five machines answer a few requests whose right tokens are
//! known beforehand, while processes are killed and frozen, ways between machines are cut, and packets are
//! late, lost and doubled. At every moment the invariants are checked; when the faults have stopped, every
//! request must come to its end and the cluster must serve with every node.
//!
//! `OFFBOOK_SIMULATION_SEEDS=n` plays n seeds instead of the usual ones, from `OFFBOOK_SIMULATION_FIRST` on;
//! `OFFBOOK_SIMULATION_SEED=s` plays one and tells all that happens.

mod timeline;
mod story;
mod process;
mod backstage;
mod cast;
mod engine;
mod group;
mod client;
mod faults;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use offbook_protocol::Epoch;
use offbook_runtime::simulation::network::{Network, Packets, Weather};
use offbook_runtime::simulation::seeds::{self, Game};
use offbook_runtime::supervise::Exit;
use tokio::sync::oneshot;

use self::backstage::{Backstage, Meeting, Order};
pub(crate) use self::backstage::{Hall, Launcher};
use self::cast::Seen;
use self::client::{Client, ClientId, Clients, Stage};
use self::engine::{Doing, Engine};
use self::faults::Fault;
use self::group::Group;
use self::process::Process;
use self::story::Story;
pub(crate) use self::timeline::Chance;
use self::timeline::Timeline;
use crate::scheduler::SchedulerLimits;

/// A process of the system; numbers are never used twice.
type Pid = u32;

enum Event {
    Fault(Fault),
    Heal(usize, usize),
    Clear,
    Thaw(Pid),
    StartNode(usize),
    /// The supervisor of a process hears of its end.
    Exited(Pid, Exit),
    /// Somebody looks after this node, unless it has started more shards than so many by then.
    Operator(Pid, u32),
    Met(Meeting),
    /// The engine of this process.
    Engine(Pid, Doing),
}

/// What a run is about, besides its faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plot {
    Faults,
    /// Requests may take only a moment: some are too late.
    Haste,
    /// This machine goes in the middle of the run and never comes back.
    Farewell(usize),
    /// The first client's request kills every shard that reads it; nothing else goes wrong.
    Deadly,
}

/// A machine, and what runs on it.
#[derive(Clone, Copy, Default)]
struct Machine {
    node: Option<Pid>,
    shard: Option<Pid>,
    /// How many shards its node has started.
    starts: u32,
}

struct World {
    plot: Plot,
    limits: SchedulerLimits,
    timeline: Timeline<Event>,
    chance: Chance,
    story: Rc<Story>,
    network: Arc<Network>,
    weather: Weather,
    /// `cuts[from][to]`: nothing of what one machine sends reaches the other.
    cuts: Vec<Vec<bool>>,
    backstage: Backstage,
    machines: Vec<Machine>,
    processes: BTreeMap<Pid, Process>,
    engines: BTreeMap<Pid, Engine>,
    /// Shards that have ended, until their supervisors hear of it.
    exits: BTreeMap<Pid, oneshot::Sender<Exit>>,
    meetings: Vec<Meeting>,
    groups: BTreeMap<Epoch, Group>,
    /// The last epoch that was begun.
    disturbed: Epoch,
    /// The last epoch of which a step was computed.
    stepped: Epoch,
    clients: Clients,
    /// What the head says of itself.
    seen: Rc<Seen>,
    /// Of the head: where its epochs are.
    disk: tempfile::TempDir,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    epochs: u64,
    answered: u64,
    failed: u64,
    tokens: u64,
    faults: u64,
    seconds: u64,
    packets: u64,
    /// Of one run: of all packets and all that was told.
    digest: u64,
}

impl seeds::Tally for Tally {
    fn add(&mut self, other: Self) {
        self.epochs += other.epochs;
        self.answered += other.answered;
        self.failed += other.failed;
        self.tokens += other.tokens;
        self.faults += other.faults;
        self.seconds += other.seconds;
        self.packets += other.packets;
        self.digest ^= other.digest;
    }
}

impl World {
    fn new(seed: u64, tells: bool) -> Self {
        let mut chance = Chance::new(seed);
        let machines = [3, 3, 3, 3, 4, 5][chance.below(6)];
        let clients = 3 + chance.below(5);
        let plot = match chance.below(8) {
            0 => Plot::Haste,
            1 => Plot::Farewell(1 + chance.below(machines - 1)),
            2 => Plot::Deadly,
            _ => Plot::Faults,
        };
        let limits = match plot {
            Plot::Haste => SchedulerLimits {
                request_deadline: Duration::from_millis(1500),
                ..LIMITS
            },
            _ => LIMITS,
        };
        let weather = Weather {
            delay: WINDOW,
            jitter: chance.ms(0, 3),
            ..Weather::default()
        };
        let story = Rc::new(Story::new(tells));
        let mut world = Self {
            plot,
            limits,
            timeline: Timeline::new(),
            story,
            network: Network::new(seed, weather, Packets::Short),
            weather,
            cuts: vec![vec![false; machines]; machines],
            backstage: Backstage::default(),
            machines: vec![Machine::default(); machines],
            processes: BTreeMap::new(),
            engines: BTreeMap::new(),
            exits: BTreeMap::new(),
            meetings: Vec::new(),
            groups: BTreeMap::new(),
            disturbed: Epoch(0),
            stepped: Epoch(0),
            clients: Client::crowd(&mut chance, clients, plot),
            seen: Rc::default(),
            disk: tempfile::tempdir().expect("there is a disk"),
            chance,
        };
        for machine in 0..machines {
            world.start_node(machine);
        }
        world.plan_plot(clients);
        world
    }

    fn run(mut self) -> Tally {
        while !self.is_over() {
            let until = self.timeline.now() + WINDOW;
            for pid in self.processes.keys().copied().collect::<Vec<_>>() {
                self.run_process(pid, until);
            }
            seeds::check();
            self.timeline.pass(until);
            self.story.pass(until);
            self.meet();
            self.turn_engines();
            while let Some(event) = self.timeline.next() {
                self.dispatch(event);
            }
            assert!(until < END, "no end: {}", self.describe());
        }
        self.check_end()
    }

    fn run_process(&mut self, pid: Pid, until: Duration) {
        let Some(process) = self.processes.get_mut(&pid).filter(|it| !it.frozen) else {
            return;
        };
        process.run(until);
        self.carry_out();
    }

    /// Does what processes ask of their machines.
    fn carry_out(&mut self) {
        loop {
            let orders = self.backstage.take_orders();
            if orders.is_empty() {
                return;
            }
            for order in orders {
                match order {
                    Order::Start {
                        machine,
                        pid,
                        ended,
                    } => self.start_shard(machine, pid, ended),
                    Order::Kill(pid) => self.kill(pid, Exit::Signal(SIGKILL)),
                    Order::Exit(pid, exit) => self.kill(pid, exit),
                    Order::Terminate(pid) => {
                        if let Some(process) = self.processes.get(&pid) {
                            process.terminate.notify_one();
                        }
                    }
                }
            }
        }
    }

    fn dispatch(&mut self, event: Event) {
        let pid = match &event {
            Event::Engine(pid, _) => Some(*pid),
            Event::Met(meeting) => Some(meeting.pid),
            _ => None,
        };
        if let Some(pid) = pid {
            match self.processes.get_mut(&pid) {
                None => return,
                Some(process) if process.frozen => return process.held.push(event),
                Some(_) => {}
            }
        }
        match event {
            Event::Fault(fault) => self.strike(fault),
            Event::Heal(from, to) => self.heal(from, to),
            Event::Clear => self.network.change_weather(self.weather),
            Event::Thaw(pid) => self.thaw(pid),
            Event::StartNode(machine) => {
                if self.machines[machine].node.is_none() {
                    self.start_node(machine);
                }
            }
            Event::Exited(pid, exit) => self.exited(pid, exit),
            Event::Operator(pid, starts) => self.look_after(pid, starts),
            Event::Met(meeting) => self.met(meeting),
            Event::Engine(pid, doing) => self.engine_does(pid, doing),
        }
    }

    /// Whether what `from` says reaches `to` now, and is heard.
    fn reaches(&self, from: Pid, to: Pid) -> bool {
        let runs = |pid| self.processes.get(&pid).filter(|process| !process.frozen);
        match (runs(from), runs(to)) {
            (Some(from), Some(to)) => !self.cuts[from.machine][to.machine],
            _ => false,
        }
    }

    fn head(&self) -> Option<Pid> {
        self.machines[0].node
    }

    /// Everybody has what was asked for, and nothing is left to go wrong.
    fn is_over(&self) -> bool {
        let now = self.timeline.now();
        now > CALM_FROM
            && self.clients.iter().all(|client| client.borrow().is_over())
            && self.serves_whole()
    }

    /// Whether the cluster serves with all the nodes that it can have.
    fn serves_whole(&self) -> bool {
        let here = self.machines.iter().filter(|it| it.node.is_some()).count();
        self.head().is_some_and(|head| self.seen.serves(head, here))
    }

    fn check_end(&self) -> Tally {
        let mut tally = Tally {
            epochs: self.groups.len() as u64,
            faults: self.story.faults(),
            seconds: self.timeline.now().as_secs(),
            packets: self.network.packets(),
            digest: self.story.digest() ^ self.network.digest(),
            ..Tally::default()
        };
        for (id, client) in self.clients.iter().enumerate() {
            let client = client.borrow();
            tally.tokens += client.journal.len() as u64;
            match &client.stage {
                Stage::Answered => tally.answered += 1,
                Stage::Failed(why) => {
                    tally.failed += 1;
                    self.check_failure(id, why);
                }
                stage => assert!(client.left, "client {id} is left as {stage:?}"),
            }
        }
        tally
    }

    /// Nobody fails but for a reason that the run has.
    fn check_failure(&self, id: ClientId, why: &str) {
        let is_late = id + LATE_CLIENTS >= self.clients.len();
        match self.plot {
            Plot::Haste if why.contains(TIME_WAS_UP) => {}
            _ if is_late => panic!("client {id} has met no fault, but {why}"),
            Plot::Deadly => {
                assert!(id == DEADLY_CLIENT, "client {id} pays for another: {why}");
                assert!(why.contains("times in a row"), "client {id}: {why}");
            }
            _ => assert!(!why.contains(TIME_WAS_UP), "client {id} was forgotten"),
        }
    }

    fn describe(&self) -> String {
        let stages = self.clients.iter();
        let stages = stages.map(|client| format!("{:?}", client.borrow().stage));
        let stages = stages.collect::<Vec<_>>().join(", ");
        format!("{}, {stages}", self.seen)
    }

    fn note(&self, what: impl FnOnce() -> String) {
        self.story.note(what);
    }
}

const GAME: Game<Tally> = Game {
    package: "offbook-actors",
    play: |seed, tells| World::new(seed, tells).run(),
};

#[test]
fn no_seed_loses_a_request_or_a_token() {
    let Some((seeds, tally)) = GAME.play_asked(SEEDS) else {
        return;
    };
    assert!(
        tally.answered > 3 * seeds && tally.faults > 2 * seeds,
        "most requests are answered, and much goes wrong: {tally:?}"
    );
}

#[test]
fn a_seed_is_one_story() {
    for seed in 0..8 {
        let first = GAME.play(seed, false);
        assert_eq!(first, GAME.play(seed, false), "seed {seed}");
    }
}

/// So many are played where nobody asks for more.
const SEEDS: u64 = 2000;
/// Processes run by turns for so long: nothing that one says in it reaches another within it, for that is
/// what a packet takes at least.
const WINDOW: Duration = Duration::from_millis(3);
const LIMITS: SchedulerLimits = SchedulerLimits {
    queue_max: 4,
    queue_tokens_max: 400,
    queue_deadline: Duration::from_secs(1000),
    sequences_max: 3,
    request_deadline: Duration::from_secs(1000),
    losses_max: 3,
};
/// Clients that ask when all faults are over.
const LATE_CLIENTS: usize = 2;
/// In a run with the plot of that name.
const DEADLY_CLIENT: ClientId = 0;
const TIME_WAS_UP: &str = "was not complete";
const CONTEXT_TOKENS: u32 = 64;
const VOCABULARY: u32 = 97;
const SIGKILL: i32 = 9;
const FAULTS_UNTIL: Duration = Duration::from_millis(2600);
/// By then every fault is made good, and what it ended is started again.
const CALM_FROM: Duration = Duration::from_millis(4800);
/// A request that waits until then would wait for ever. The longest that anybody has to is for a shard that
/// stands still before its node has heard of it, which has a minute.
const END: Duration = Duration::from_secs(80);
