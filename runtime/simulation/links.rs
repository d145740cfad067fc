//! Processes that talk over stock QUIC in virtual time. All of this crate that a link is made of is real, from
//! the endpoint to the mailboxes, and so is quinn; the socket, the clock and the random numbers are
//! not. A run is a pure function of its seed.
//!
//! Processes ask, tell, subscribe and watch, while they are killed, ended in order, started again at
//! the same or another address, cut off, and rained on. `ledger.rs` says what must be true meanwhile,
//! [`World::settle`] what must be when it is over.

mod actors;
mod ledger;
mod scenes;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep, timeout};

use crate::failure::{AskError, LostReason};
use crate::hello::HandshakeError;
use crate::identity::Identity;
use crate::limits::Limits;
use crate::link::Link;
use crate::name::{ActorPath, ProcessName};
use crate::simulation::network::{Network, Packets, Socket, Weather};
use crate::simulation::seeds::{self, Game};
use crate::simulation::start;
use crate::stream::StreamLost;
use crate::system::{System, SystemConfig};
use crate::trust::Trust;
use actors::{EAR, Ear, Note, Numbers, Question, answer_to};
use ledger::{Ledger, Life, Tally};

/// Plays one seed to its end.
fn run(seed: u64, tells: bool) -> Tally {
    actix::System::with_tokio_rt(clock).block_on(World::play(seed, tells))
}

/// A runtime in virtual time.
fn clock() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime can be made")
}

/// All of one run.
struct World {
    seed: u64,
    /// How many sources of random numbers there are.
    sources: Cell<u64>,
    began: Instant,
    ends: Instant,
    network: Arc<Network>,
    ledger: Rc<Ledger>,
    processes: RefCell<Vec<Process>>,
    links: RefCell<Links>,
    questions: Cell<u64>,
}

/// By sender and receiver: the link that notes go over, and its number.
type Links = BTreeMap<(Life, usize), (Arc<Link>, u64)>;

/// One process, dead or alive.
#[derive(Default)]
struct Process {
    boot: u64,
    addr: Option<SocketAddr>,
    /// Mostly one; two while a start has not ended the life before it.
    alive: BTreeMap<Life, Alive>,
}

#[derive(Clone)]
struct Alive {
    system: System,
    socket: Arc<Socket>,
}

impl World {
    async fn play(seed: u64, tells: bool) -> Tally {
        let mut random = StdRng::seed_from_u64(seed);
        let calm = random.random_bool(CALM);
        let weather = weather(&mut random, calm);
        let processes = random.random_range(2..=4);
        let ledger = Rc::new(Ledger::new(tells));
        let world = Rc::new(Self {
            seed,
            sources: Cell::new(0),
            began: Instant::now(),
            ends: Instant::now() + TROUBLE,
            network: Network::new(seed, weather, Packets::Sought),
            ledger,
            processes: RefCell::default(),
            links: RefCell::default(),
            questions: Cell::new(0),
        });
        // Every process knows the others' first addresses from the start, as from a cluster file.
        let fresh = |process| Process {
            addr: Some(addr_of(process, FIRST_PORT)),
            ..Process::default()
        };
        *world.processes.borrow_mut() = (0..processes).map(fresh).collect();
        for process in 0..processes {
            world.start(process, false);
        }
        if !calm {
            actix::spawn(Rc::clone(&world).trouble());
        }
        while Instant::now() < world.ends {
            sleep(Duration::from_millis(100)).await;
            seeds::check();
        }
        world.settle(calm).await;
        let mut tally = world.ledger.tally();
        tally.packets = world.network.packets();
        tally.links = world
            .links
            .borrow()
            .values()
            .map(|(_, number)| number)
            .sum();
        tally
    }

    /// A source of random numbers for one task.
    fn random(&self) -> StdRng {
        self.sources.set(self.sources.get() + 1);
        StdRng::seed_from_u64(self.seed << 16 | self.sources.get())
    }

    fn count(&self) -> usize {
        self.processes.borrow().len()
    }

    /// The newest life of a process that has one.
    fn newest(&self, process: usize) -> Option<(Life, System)> {
        let processes = self.processes.borrow();
        let (life, alive) = processes[process].alive.last_key_value()?;
        Some((*life, alive.system.clone()))
    }

    fn everybody(&self) -> Vec<(Life, System)> {
        (0..self.count())
            .filter_map(|process| self.newest(process))
            .collect()
    }

    /// Starts a process. Should it have moved, then the others learn of that when it dials them.
    fn start(self: &Rc<Self>, process: usize, moves: bool) {
        let mut random = self.random();
        let (life, addr) = {
            let process_ = &mut self.processes.borrow_mut()[process];
            process_.boot += 1;
            let boot = process_.boot;
            let port = match process_.addr {
                Some(addr) if !moves => addr.port(),
                _ => FIRST_PORT + u16::try_from(boot).expect("few starts"),
            };
            let addr = addr_of(process, port);
            process_.addr = Some(addr);
            (Life { process, boot }, addr)
        };
        self.ledger.tell(format_args!("{life} starts at {addr}"));
        let socket = self.network.bind(process, addr, self.began.elapsed());
        let system = system(life, addr, Arc::clone(&socket), random.random());
        let ear = Ear {
            life,
            ledger: Rc::clone(&self.ledger),
        };
        ear.listen(&system);
        let alive = Alive {
            system: system.clone(),
            socket,
        };
        self.processes.borrow_mut()[process]
            .alive
            .insert(life, alive);
        for other in (0..self.count()).filter(|other| *other != process) {
            if let Some(addr) = self.processes.borrow()[other].addr {
                system.learn(name(other), addr);
            }
            // Nobody is told where it is now: it shows that by dialling.
            if addr.port() != FIRST_PORT {
                let pause = millis(&mut random, 50, 300);
                actix::spawn(Rc::clone(self).keep_linked(life, system.clone(), other, pause));
            }
        }
        actix::spawn(Rc::clone(self).talk(life, system));
    }

    /// What a process does that is not where the others were told: it dials them until it is linked, again
    /// and again.
    async fn keep_linked(self: Rc<Self>, life: Life, system: System, to: usize, pause: Duration) {
        while self.ledger.is_alive(life) && !system.shared().is_closing() {
            if Self::linked(&system, to).is_none() {
                self.link(life, &system, to);
            }
            sleep(pause).await;
        }
    }

    /// A life ends between two packets.
    fn kill(self: &Rc<Self>, life: Life) {
        let alive = self.processes.borrow_mut()[life.process]
            .alive
            .remove(&life);
        if let Some(alive) = alive {
            self.ledger.tell(format_args!("{life} is killed"));
            self.ledger.count(|tally| tally.kills += 1);
            self.network.unplug(&alive.socket);
            alive.system.shared().close();
            self.bury(life);
        }
    }

    /// Notes the end of a life. A while later nobody may wait for it any more.
    fn bury(self: &Rc<Self>, life: Life) {
        self.ledger.died(life);
        let world = Rc::clone(self);
        actix::spawn(async move {
            sleep(TOLD_WITHIN).await;
            world.ledger.nobody_waits_for(life);
        });
    }

    /// A life ends in order.
    async fn end(self: Rc<Self>, life: Life) {
        let alive = self.processes.borrow()[life.process]
            .alive
            .get(&life)
            .cloned();
        let Some(alive) = alive else { return };
        self.ledger.tell(format_args!("{life} is told to end"));
        let began = Instant::now();
        alive.system.shutdown(ENDS_WITHIN).await;
        assert!(began.elapsed() <= ENDS_WITHIN * 2, "{life} does not end");
        self.processes.borrow_mut()[life.process]
            .alive
            .remove(&life);
        self.network.unplug(&alive.socket);
        self.bury(life);
    }

    /// What goes wrong, until the time for it is over.
    async fn trouble(self: Rc<Self>) {
        let mut random = self.random();
        loop {
            sleep(millis(&mut random, 30, 600)).await;
            if Instant::now() >= self.ends {
                return;
            }
            let process = random.random_range(0..self.count());
            let Some((life, _)) = self.newest(process) else {
                continue;
            };
            let away = millis(&mut random, 0, 1200);
            let moves = random.random_bool(0.3);
            match random.random_range(0..100) {
                0..30 => {
                    self.kill(life);
                    self.start_later(process, away, moves);
                }
                30..40 => {
                    let world = Rc::clone(&self);
                    actix::spawn(async move {
                        Rc::clone(&world).end(life).await;
                        world.start_later(process, away, moves);
                    });
                }
                40..50 => {
                    self.ledger
                        .tell(format_args!("{life} does not notice its successor"));
                    self.start(process, true);
                    let world = Rc::clone(&self);
                    actix::spawn(async move {
                        sleep(away).await;
                        world.kill(life);
                        // The successor may have been killed before.
                        world.start_later(process, Duration::ZERO, false);
                    });
                }
                50..85 => self.cut(&mut random, process),
                _ => self.network.change_weather(weather(&mut random, false)),
            }
        }
    }

    fn start_later(self: &Rc<Self>, process: usize, pause: Duration, moves: bool) {
        let world = Rc::clone(self);
        actix::spawn(async move {
            sleep(pause).await;
            if world.newest(process).is_none() {
                world.start(process, moves);
            }
        });
    }

    /// Cuts a process off from one other or all, in one direction or both, for a while.
    fn cut(self: &Rc<Self>, random: &mut StdRng, process: usize) {
        let others = (0..self.count()).filter(|other| *other != process);
        let others: Vec<_> = match random.random_bool(0.5) {
            true => others.collect(),
            false => others
                .skip(random.random_range(0..self.count() - 1))
                .take(1)
                .collect(),
        };
        let directions = random.random_range(0..3);
        let mut cuts = Vec::new();
        for other in others {
            if directions != 0 {
                cuts.push((process, other));
            }
            if directions != 1 {
                cuts.push((other, process));
            }
        }
        self.ledger.tell(format_args!("cut: {cuts:?}"));
        self.ledger.count(|tally| tally.cuts += 1);
        cuts.iter()
            .for_each(|(from, to)| self.network.cut(*from, *to));
        let (world, pause) = (Rc::clone(self), millis(random, 20, 2500));
        actix::spawn(async move {
            sleep(pause).await;
            world.ledger.tell(format_args!("mended: {cuts:?}"));
            cuts.iter()
                .for_each(|(from, to)| world.network.mend(*from, *to));
        });
    }

    /// What one life of a process says to the others.
    async fn talk(self: Rc<Self>, life: Life, system: System) {
        let mut random = self.random();
        loop {
            sleep(millis(&mut random, 1, 60)).await;
            if Instant::now() >= self.ends || !self.ledger.is_alive(life) {
                return;
            }
            let step = random.random_range(1..self.count());
            let to = (life.process + step) % self.count();
            let (world, system) = (Rc::clone(&self), system.clone());
            match random.random_range(0..100) {
                0..35 => self.tell(&mut random, life, &system, to),
                35..80 => drop(actix::spawn(world.ask(
                    random_of(&mut random),
                    life,
                    system,
                    to,
                ))),
                80..93 => drop(actix::spawn(world.subscribe(
                    random_of(&mut random),
                    life,
                    system,
                    to,
                ))),
                _ => drop(actix::spawn(world.watch(life, system, to))),
            }
        }
    }

    /// The link that the next message from `life` to a process goes over, and its number; one is dialled
    /// where there is none.
    fn link(&self, life: Life, system: &System, to: usize) -> Option<u64> {
        let link = system.shared().link(&name(to)).ok()?;
        let mut links = self.links.borrow_mut();
        let number = match links.get(&(life, to)) {
            Some((known, number)) if Arc::ptr_eq(known, &link) => return Some(*number),
            Some((_, number)) => number + 1,
            None => 1,
        };
        links.insert((life, to), (link, number));
        Some(number)
    }

    /// The life at the other end of a link that stands.
    fn linked(system: &System, to: usize) -> Option<Life> {
        let peer = system.shared().peer(&name(to));
        let boot = peer.boot_of_link()?;
        Some(Life { process: to, boot })
    }

    fn tell(&self, random: &mut StdRng, from: Life, system: &System, to: usize) {
        let ear = system.remote::<Note>(&path(to));
        for _ in 0..random.random_range(1..30) {
            let Some(link) = self.link(from, system, to) else {
                return;
            };
            let number = self.ledger.put(from, link, to);
            let filling = vec![0; random.random_range(0..600)];
            let note = Note {
                from,
                link,
                number,
                filling,
            };
            if let Err(error) = ear.try_tell(note) {
                self.ledger.take_back(from, link, to);
                check(&error.reason);
                return;
            }
        }
    }

    async fn ask(self: Rc<Self>, mut random: StdRng, from: Life, system: System, to: usize) {
        let number = self.questions.get();
        self.questions.set(number + 1);
        let long = random.random_bool(0.1);
        let question = Question {
            from,
            number,
            takes: millis(&mut random, 0, if long { 4000 } else { 150 }),
        };
        let deadline = millis(&mut random, 5, if long { 8000 } else { 1500 });
        let patience = match random.random_bool(0.2) {
            true => millis(&mut random, 0, 200),
            false => deadline * 2,
        };
        let began = Instant::now();
        let ear = system.remote::<Question>(&path(to));
        let asked = self.wait_for(from, &system, to, "an answer", ear.ask(question, deadline));
        // Whoever loses patience drops the ask, and is told nothing.
        let Ok(asked) = timeout(patience, asked).await else {
            return;
        };
        if !self.ledger.is_alive(from) {
            return;
        }
        assert!(
            began.elapsed() <= deadline + SLACK,
            "{from} waits {:?} for an answer, with {deadline:?} to wait",
            began.elapsed()
        );
        match asked {
            Ok(answer) => {
                assert_eq!(answer, answer_to(number), "the answer of another question");
                self.ledger.answered(from, number);
            }
            Err(error) => {
                check(&error);
                self.ledger
                    .refused(from, number, was_not_handled(&error, from.process));
            }
        }
    }

    async fn subscribe(self: Rc<Self>, mut random: StdRng, from: Life, system: System, to: usize) {
        let numbers = Numbers {
            end: random.random_range(0..200),
            pause: millis(&mut random, 0, 8),
            bytes: random.random_range(0..3000),
        };
        let (end, bytes) = (numbers.end, numbers.bytes);
        let ear = system.remote_stream::<Numbers>(&path(to));
        let deadline = millis(&mut random, 20, 1500);
        let opened = ear.subscribe(numbers, deadline).await;
        let leaves = random
            .random_bool(0.2)
            .then(|| random.random_range(0..=end));
        let mut items = match opened {
            Ok(items) => items,
            Err(error) => return check(&error),
        };
        for number in 0..=end {
            if leaves == Some(number) {
                return;
            }
            let next = self
                .wait_for(from, &system, to, "an item", items.next())
                .await;
            if !self.ledger.is_alive(from) {
                return;
            }
            match next {
                Some(Ok((item, filling))) => {
                    assert_eq!(
                        (item, filling.len()),
                        (number, bytes),
                        "an item out of order"
                    );
                    self.ledger.count(|tally| tally.items += 1);
                }
                Some(Err(StreamLost::Link(lost))) => {
                    check_lost(&lost.reason);
                    assert!(items.next().await.is_none(), "it goes on after its end");
                    return;
                }
                Some(Err(error)) => panic!("a subscription broke off: {error}"),
                None => {
                    assert_eq!(number, end, "a subscription ends before its last item");
                    return;
                }
            }
        }
        panic!("a subscription has an item too many");
    }

    async fn watch(self: Rc<Self>, from: Life, system: System, to: usize) {
        let lost = system.watch(&name(to));
        let lost = self.wait_for(from, &system, to, "the end", lost).await;
        check_lost(&lost.reason);
    }

    /// Notes that one waits for another, where there is a link between them.
    async fn wait_for<T>(
        &self,
        from: Life,
        system: &System,
        to: usize,
        what: &'static str,
        waited: impl Future<Output = T>,
    ) -> T {
        let noted = Self::linked(system, to).map(|whom| self.ledger.waits(from, whom, what));
        let _noted = Noted(&self.ledger, noted);
        waited.await
    }

    /// The troubles are over: in the end all is as if they had never been.
    async fn settle(self: &Rc<Self>, calm: bool) {
        self.ledger.tell(format_args!("the troubles are over"));
        sleep(LONGEST_CUT).await;
        self.network.change_weather(Weather::default());
        sleep(SETTLED_AFTER).await;
        seeds::check();
        let everybody = self.everybody();
        assert_eq!(
            everybody.len(),
            self.count(),
            "every process was started again"
        );
        for (life, system) in &everybody {
            for to in (0..self.count()).filter(|to| *to != life.process) {
                let number = self.questions.replace(self.questions.get() + 1);
                let question = Question {
                    from: *life,
                    number,
                    takes: Duration::ZERO,
                };
                let ear = system.remote::<Question>(&path(to));
                let answer = ear.ask(question, ANSWERED_WITHIN).await;
                assert_eq!(answer, Ok(answer_to(number)), "{life} asks {to} in the end");
            }
        }
        // What crossed is closed, and what was closed forgotten.
        sleep(Duration::from_secs(1)).await;
        seeds::check();
        for (life, system) in &everybody {
            let endpoint = system.shared().endpoint().expect("it is not closed");
            assert_eq!(
                endpoint.open_connections(),
                self.count() - 1,
                "{life} has one connection to each other process"
            );
            for to in (0..self.count()).filter(|to| *to != life.process) {
                let other = self.newest(to).map(|(life, _)| life);
                assert_eq!(Self::linked(system, to), other, "whom {life} is linked to");
                let link = system
                    .shared()
                    .peer(&name(to))
                    .link()
                    .expect("it is linked");
                assert_eq!(
                    link.asks_under_way(),
                    (0, 0),
                    "what {life} and {to} have not done"
                );
                if let Some(number) = self.link(*life, system, to) {
                    assert!(
                        !calm || number == 1,
                        "{life} lost a link to {to} in calm weather"
                    );
                    self.ledger.all_came(*life, number, to);
                }
            }
        }
    }
}

/// What somebody waits for, until that is dropped.
struct Noted<'a>(&'a Ledger, Option<u64>);

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.1 {
            self.0.waits_no_more(number);
        }
    }
}

/// Between honest processes that are who they say, these are all the errors that there are.
fn check(error: &AskError) {
    match error {
        AskError::LinkLost(lost) => check_lost(&lost.reason),
        AskError::Unreachable { source, .. } => check_handshake(source),
        AskError::DeadlinePassed { .. }
        | AskError::Overloaded { .. }
        | AskError::ShuttingDown { .. }
        | AskError::LinkFull { .. } => {}
        other => panic!("an honest process is told: {other}"),
    }
}

fn check_lost(reason: &LostReason) {
    match reason {
        LostReason::PeerMisbehaved(what) => {
            panic!("an honest process is said to misbehave: {what}")
        }
        LostReason::UnknownProcess => panic!("every process is known"),
        LostReason::Unreachable(error) => check_handshake(error),
        LostReason::Closed
        | LostReason::TimedOut
        | LostReason::Silent(_)
        | LostReason::Reset
        | LostReason::Restarted { .. }
        | LostReason::ShutDown => {}
    }
}

fn check_handshake(error: &HandshakeError) {
    match error {
        HandshakeError::NoAnswer(_)
        | HandshakeError::Closing
        | HandshakeError::Duplicate
        // Whoever does not notice its successor.
        | HandshakeError::StaleBoot(_) => {}
        other => panic!("an honest process is refused: {other}"),
    }
}

/// Does the error say that nobody handled the question?
fn was_not_handled(error: &AskError, asker: usize) -> bool {
    match error {
        AskError::Unreachable { .. } | AskError::Overloaded { .. } | AskError::LinkFull { .. } => {
            true
        }
        AskError::ShuttingDown { process } => *process != name(asker),
        _ => false,
    }
}

fn system(life: Life, addr: SocketAddr, socket: Arc<Socket>, seed: [u8; 32]) -> System {
    static IDENTITIES: OnceLock<Vec<Arc<Identity>>> = OnceLock::new();
    let identities = IDENTITIES.get_or_init(|| {
        let made = |process| Identity::generate(name(process).node()).expect("a key can be made");
        (0..PROCESSES_MAX).map(made).map(Arc::new).collect()
    });
    let nodes: Vec<_> = (0..PROCESSES_MAX).map(name).collect();
    let keys = identities.iter().map(|identity| identity.key());
    let config = SystemConfig {
        process: name(life.process),
        identity: Arc::clone(&identities[life.process]),
        trust: Trust::pinned("simulated", nodes.iter().map(ProcessName::node).zip(keys)),
        listen: addr,
        boot: life.boot,
        limits: Limits {
            spin: Duration::ZERO,
            ..Limits::default()
        },
    };
    start(config, socket, seed, std::process::id()).expect("an endpoint can be made")
}

fn addr_of(process: usize, port: u16) -> SocketAddr {
    let host = u8::try_from(process + 1).expect("few processes");
    SocketAddr::from(([10, 0, 0, host], port))
}

fn name(process: usize) -> ProcessName {
    format!("p{process}").parse().expect("it is a name")
}

fn path(process: usize) -> ActorPath {
    format!("p{process}#{EAR}").parse().expect("it is a path")
}

fn millis(random: &mut StdRng, from: u64, to: u64) -> Duration {
    Duration::from_millis(random.random_range(from..=to))
}

fn random_of(random: &mut StdRng) -> StdRng {
    StdRng::seed_from_u64(random.random())
}

fn weather(random: &mut StdRng, calm: bool) -> Weather {
    let much = if calm { 0.1 } else { 1.0 };
    let mut up_to = |most: f64| match random.random_bool(0.5) {
        true => 0.0,
        false => random.random::<f64>() * most * much,
    };
    Weather {
        loss: up_to(0.1),
        doubled: up_to(0.1),
        delay: Duration::from_secs_f64(up_to(0.02)),
        jitter: Duration::from_secs_f64(up_to(0.03)),
    }
}

/// So many of the runs have neither kills nor cuts, so that no link may be lost in them.
const CALM: f64 = 0.2;
const PROCESSES_MAX: usize = 4;
/// Where each process is at first, as everybody knows.
const FIRST_PORT: u16 = 9000;
/// How long things go wrong.
const TROUBLE: Duration = Duration::from_secs(4);
/// A cut that began last is mended, and a process that was killed last has started.
const LONGEST_CUT: Duration = Duration::from_millis(2600);
/// The longest pause between dials is over, and the longest question answered.
const SETTLED_AFTER: Duration = Duration::from_millis(3500);
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);
/// A link that stands is lost within QUIC's idle timeout; one that is dialled has the connect timeout.
const TOLD_WITHIN: Duration = Duration::from_millis(2500);
const ENDS_WITHIN: Duration = Duration::from_millis(1500);
/// tokio's timers count milliseconds.
const SLACK: Duration = Duration::from_millis(5);

const GAME: Game<Tally> = Game {
    package: "offbook-runtime",
    play: run,
};

#[test]
fn no_seed_breaks_a_promise() {
    let Some((seeds, tally)) = GAME.play_asked(SEEDS) else {
        return;
    };
    assert!(
        tally.answers > 10 * seeds,
        "most questions are answered: {tally:?}"
    );
    assert!(
        tally.kills > seeds && tally.cuts > seeds,
        "much goes wrong: {tally:?}"
    );
}

#[test]
fn a_seed_is_one_run() {
    for seed in [3, 5, 8] {
        let first = GAME.play(seed, false);
        assert_eq!(first, GAME.play(seed, false), "seed {seed}");
    }
}

/// So many are played where nobody asks for more.
const SEEDS: u64 = 200;
