//! A cluster in virtual time: the real decisions of the scheduler, the membership, the shard worker, the
//! batch, the failure detector and the restart policy, played against thousands of seeds of faults.
//!
//! One run is a pure function of its seed. Three to five machines with a shard each answer a few
//! requests whose right tokens are known beforehand, while processes are killed and frozen, ways between
//! machines are cut, links are lost and packets are late. After every event the invariants are checked;
//! when the faults have stopped, every request must come to its end and the cluster must serve.
//!
//! What is not played: actors' mailboxes, QUIC itself, MLX, and the API. The network is what a QUIC
//! connection looks like from above (`network.rs`).
//!
//! `OFFBOOK_SIMULATION_SEEDS=n` plays n seeds instead of those of `seeds.rs`; `OFFBOOK_SIMULATION_SEED=s` plays one
//! and tells all that happens.

mod timeline;
mod network;
mod head;
mod node;
mod shard;
mod engine;
mod client;
mod faults;
mod seeds;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use offbook_protocol::{Epoch, Rank, SequenceId, Step};
use offbook_runtime::OwnTimer;

use self::client::{Client, ClientId, Stage};
use self::engine::{Group, Share};
use self::faults::Fault;
use self::head::{Head, Mail};
use self::network::{Answer, AskId, Asked, End, Lane, Link, Name, Packet, Question, Watch};
use self::node::Node;
use self::shard::{Meeting, ReplyTo, Shard};
pub(crate) use self::timeline::Chance;
use self::timeline::Timeline;
use crate::scheduler::SchedulerLimits;

/// A process of the system; numbers are never used twice.
type Pid = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Node,
    Shard,
}

struct Process {
    machine: usize,
    role: Role,
    alive: bool,
    frozen: bool,
    timer: OwnTimer,
    /// The link to each peer that this process knows as standing.
    links: BTreeMap<Name, End>,
    /// The last life of each peer that said hello.
    known: BTreeMap<Name, Pid>,
    /// What became due while it was frozen.
    held: Vec<Local>,
}

impl Process {
    fn runs(&self) -> bool {
        self.alive && !self.frozen
    }

    fn name(&self) -> Name {
        match self.role {
            Role::Node => Name::Node(self.machine),
            Role::Shard => Name::Shard(self.machine),
        }
    }
}

enum Event {
    Tick,
    Arrive(End, Lane, Packet),
    Local(Pid, Local),
    Fault(Fault),
    Heal(usize, usize),
    Thaw(Pid),
    StartNode(usize),
    Operator(Pid),
    Submit(ClientId),
}

/// What a process does by itself; while it is frozen it waits.
enum Local {
    Answered(AskId, Option<Answer>),
    Unasked(Question),
    LinkLost(Watch),
    // The head.
    Standing,
    Begin,
    Mail(Mail),
    Silence(Epoch),
    /// A plan was not sent to one of its shards.
    Unserved(Epoch),
    Late(SequenceId),
    Left(SequenceId),
    AnnounceHere(Question),
    // A node.
    Announce,
    StartShard,
    ShardExited(Pid),
    Unattached {
        attachments: u64,
        shard: Pid,
    },
    // A shard.
    Register,
    Attach,
    Loaded {
        epoch: Epoch,
        share: Share,
        reply: ReplyTo,
    },
    Meet(Meeting),
    Met {
        epoch: Epoch,
        rank: Rank,
        reply: ReplyTo,
    },
    Begun {
        epoch: Epoch,
        rank: Rank,
        reply: ReplyTo,
    },
    StepDone {
        epoch: Epoch,
        step: Step,
        control: Option<u32>,
    },
    StepLate {
        epoch: Epoch,
        step: Step,
    },
    LoopEnds(Epoch),
    Ended {
        epoch: Epoch,
        failure: Option<String>,
    },
    PeerGone(Epoch),
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

struct World {
    plot: Plot,
    limits: SchedulerLimits,
    began: Instant,
    timeline: Timeline<Event>,
    chance: Chance,
    tells: bool,
    processes: Vec<Process>,
    links: Vec<Link>,
    /// `cuts[from][to]`: nothing of what one machine sends reaches the other.
    cuts: Vec<Vec<bool>>,
    slow_until: Duration,
    asks: BTreeMap<AskId, Asked>,
    asks_made: AskId,
    nodes: Vec<Node>,
    head: Option<Head>,
    /// The epoch on the head's disk.
    stored_epoch: Epoch,
    /// The latest epoch of which a client had a token.
    delivered_epoch: Epoch,
    shards: BTreeMap<Pid, Shard>,
    /// Shards that ended by a failure of their own, until their nodes know.
    crashed: BTreeSet<Pid>,
    groups: BTreeMap<Epoch, Group>,
    clients: Vec<Client>,
    /// The next plan does not reach one of its shards.
    loses_plan: bool,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    epochs: u64,
    answered: u64,
    failed: u64,
    tokens: u64,
}

impl World {
    fn new(seed: u64, tells: bool) -> Self {
        let mut chance = Chance::new(seed);
        let machines = 3 + chance.below(3);
        let clients = 3 + chance.below(6);
        let plot = match chance.below(8) {
            0 => Plot::Haste,
            1 => Plot::Farewell(1 + chance.below(machines - 1)),
            2 => Plot::Deadly,
            _ => Plot::Faults,
        };
        let limits = match plot {
            Plot::Haste => SchedulerLimits {
                request_deadline: Duration::from_secs(3),
                ..LIMITS
            },
            _ => LIMITS,
        };
        let mut world = Self {
            plot,
            limits,
            began: Instant::now(),
            timeline: Timeline::new(),
            tells,
            processes: Vec::new(),
            links: Vec::new(),
            cuts: vec![vec![false; machines]; machines],
            slow_until: Duration::ZERO,
            asks: BTreeMap::new(),
            asks_made: 0,
            nodes: Vec::new(),
            head: None,
            stored_epoch: Epoch(0),
            delivered_epoch: Epoch(0),
            shards: BTreeMap::new(),
            crashed: BTreeSet::new(),
            groups: BTreeMap::new(),
            clients: (0..clients + LATE_CLIENTS)
                .map(|_| Client::new(&mut chance))
                .collect(),
            loses_plan: false,
            chance,
        };
        // No process has the number 0: the membership takes that for a node that never came.
        let nobody = world.start_process(0, Role::Node);
        world.processes[nobody as usize].alive = false;
        for machine in 0..machines {
            world.start_node(machine);
        }
        let pid = world.nodes[0].pid;
        world.start_head(pid);
        for client in 0..clients {
            let at = world.chance.ms(0, 10_000);
            world.timeline.at(at, Event::Submit(client));
        }
        for late in 0..LATE_CLIENTS {
            let at = CALM_FROM + world.chance.ms(500, 3000);
            world.timeline.at(at, Event::Submit(clients + late));
        }
        let faults = world.chance.below(30);
        match plot {
            Plot::Deadly => {}
            Plot::Farewell(machine) => {
                let at = world.chance.ms(1000, 8000);
                world
                    .timeline
                    .at(at, Event::Fault(Fault::Farewell(machine)));
                world.plan_faults(faults / 4, FAULTS_UNTIL);
            }
            _ => {
                world.plan_faults(faults, FAULTS_UNTIL);
                let leaving = world.chance.below(clients / 2 + 1);
                world.plan_departures(leaving, FAULTS_UNTIL);
            }
        }
        world.timeline.after(OwnTimer::TICK, Event::Tick);
        world
    }

    fn run(mut self) -> Tally {
        while let Some(event) = self.timeline.next() {
            let is_tick = matches!(event, Event::Tick);
            self.dispatch(event);
            if !is_tick {
                self.check_queues();
                self.check_shards();
            } else if self.is_over() {
                break;
            }
            assert!(self.timeline.now() < END, "no end: {}", self.describe());
        }
        self.check_end()
    }

    /// Everybody has what was asked for, and nothing is left to go wrong.
    fn is_over(&self) -> bool {
        let calm = self.timeline.now() > CALM_FROM;
        calm && self.serves_whole() && self.clients.iter().all(|c| c.is_over() || c.left)
    }

    fn check_end(&self) -> Tally {
        let mut tally = Tally {
            epochs: self.stored_epoch.0,
            ..Tally::default()
        };
        for (id, client) in self.clients.iter().enumerate() {
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
        let admission = &self.head.as_ref().expect("the cluster serves").admission;
        let left = admission.running() + admission.queued();
        assert_eq!(left, 0, "requests are left when all clients are served");
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
        let stages = self
            .clients
            .iter()
            .map(|client| format!("{:?}", client.stage));
        let head = self
            .head
            .as_ref()
            .map_or("no head", |head| head.formation.detail());
        format!("{head:?}, {}", stages.collect::<Vec<_>>().join(", "))
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Tick => self.tick(),
            Event::Arrive(to, lane, packet) => self.arrive(to, lane, packet),
            Event::Local(pid, local) => {
                let process = &mut self.processes[pid as usize];
                if process.frozen {
                    process.held.push(local);
                } else if process.alive {
                    self.act(pid, local);
                }
            }
            Event::Fault(fault) => self.strike(fault),
            Event::Heal(from, to) => self.heal(from, to),
            Event::Thaw(pid) => self.thaw(pid),
            Event::StartNode(machine) => {
                self.start_node(machine);
                if machine == 0 {
                    self.start_head(self.nodes[0].pid);
                }
            }
            Event::Operator(pid) => self.kill(pid),
            Event::Submit(client) => self.submit(client),
        }
    }

    fn act(&mut self, pid: Pid, local: Local) {
        let machine = self.processes[pid as usize].machine;
        match local {
            Local::Answered(ask, answer) => {
                if let Some(asked) = self.asks.remove(&ask) {
                    self.heard(pid, asked, answer);
                }
            }
            Local::Unasked(question) => self.head_heard(question, None),
            Local::LinkLost(watch) => self.link_lost(pid, watch),
            Local::Standing => self.standing(pid),
            Local::Begin => self.begin(),
            Local::Mail(mail) => self.scheduler_mail(mail),
            Local::Silence(epoch) | Local::Unserved(epoch) => self.report_failure(epoch),
            Local::Late(sequence) => {
                if let Some(client) = self.withdraw(sequence) {
                    self.client_failed(client, TIME_WAS_UP);
                }
            }
            Local::Left(sequence) => {
                self.withdraw(sequence);
            }
            Local::AnnounceHere(question) => self.announced_here(question),
            Local::Announce => {
                self.announce(machine, None, false);
                self.local_after(crate::node_agent::ANNOUNCE_EVERY, pid, Local::Announce);
            }
            Local::StartShard => self.start_shard(machine),
            Local::ShardExited(shard) => self.shard_exited(machine, shard),
            Local::Unattached { attachments, shard } => {
                self.unattached(machine, attachments, shard);
            }
            Local::Register => self.register(pid),
            Local::Attach => self.attach(pid),
            Local::Loaded {
                epoch,
                share,
                reply,
            } => self.load_done(pid, epoch, share, reply),
            Local::Meet(meeting) => self.meet(pid, meeting),
            Local::Met { epoch, rank, reply } => self.met(pid, epoch, rank, reply),
            Local::Begun { epoch, rank, reply } => self.begun(pid, epoch, rank, reply),
            Local::StepDone {
                epoch,
                step,
                control,
            } => self.step_done(pid, epoch, step, control),
            Local::StepLate { epoch, step } => self.step_late(pid, epoch, step),
            Local::LoopEnds(epoch) => self.loop_ends(pid, epoch),
            Local::Ended { epoch, failure } => self.epoch_ended(pid, epoch, failure),
            Local::PeerGone(epoch) => self.end_loop(pid, epoch, Some("a peer is gone".into())),
        }
    }

    fn heard(&mut self, pid: Pid, asked: Asked, answer: Option<Answer>) {
        match asked.question {
            question @ (Question::Load { .. } | Question::Join { .. } | Question::Watch { .. }) => {
                self.head_heard(question, answer);
            }
            Question::Announce { .. } => {}
            question => self.shard_heard(pid, asked.end, &question, answer),
        }
    }

    fn link_lost(&mut self, pid: Pid, watch: Watch) {
        match watch {
            Watch::ShardOf { .. } | Watch::Node { .. } => self.head_lost_link(watch),
            Watch::Head | Watch::OwnNode => self.shard_lost_link(pid, watch),
            Watch::Attachment { attachments, shard } => {
                let machine = self.processes[pid as usize].machine;
                self.attachment_lost(machine, attachments, shard);
            }
        }
    }

    /// A packet has come to a process that runs.
    fn receive(&mut self, end: End, pid: Pid, packet: Packet) {
        match packet {
            Packet::Ask(ask, question) => self.asked(end, pid, ReplyTo { end, ask }, question),
            Packet::Reply(ask, answer) => self.act(pid, Local::Answered(ask, Some(answer))),
            Packet::Leave(epoch) => self.asked_to_leave(pid, epoch),
            Packet::Plan(plan) => self.plan_came(pid, plan),
            Packet::Outcome(outcome) => self.outcome(outcome),
            Packet::OutcomesEnded(epoch) => self.outcomes_ended(epoch),
            Packet::Hello | Packet::Close => unreachable!("the network keeps these"),
        }
    }

    fn asked(&mut self, end: End, pid: Pid, reply: ReplyTo, question: Question) {
        match question {
            Question::Announce { machine, news } => {
                self.announced(end, machine, news);
                self.reply(reply, Ok(()));
            }
            Question::Register { machine, heard } => {
                self.registered(end, machine, heard);
                self.reply(reply, Ok(()));
            }
            Question::StepFailed { epoch, rank, why } => {
                self.step_failed(epoch, rank, &why);
                self.reply(reply, Ok(()));
            }
            Question::Attach => {
                let machine = self.processes[pid as usize].machine;
                let is_ours = self.attached(machine, end);
                let refusal = "the node does not know this process yet";
                self.reply(reply, if is_ours { Ok(()) } else { Err(refusal.into()) });
            }
            Question::Load { epoch, rank, ranks } => {
                self.asked_to_load(pid, epoch, Share { rank, ranks }, reply);
            }
            Question::Join {
                epoch,
                rank,
                members,
            } => {
                let meeting = self.meeting(epoch, rank, reply);
                self.asked_to_join(pid, meeting, members);
            }
            Question::Watch { epoch } => self.asked_to_be_watched(pid, epoch, end, reply),
        }
    }

    fn start_process(&mut self, machine: usize, role: Role) -> Pid {
        let pid = self.processes.len() as Pid;
        self.processes.push(Process {
            machine,
            role,
            alive: true,
            frozen: false,
            timer: OwnTimer::new(self.instant()),
            known: BTreeMap::new(),
            links: BTreeMap::new(),
            held: Vec::new(),
        });
        pid
    }

    /// Who is at the other end.
    fn peer(&self, end: End) -> Pid {
        self.links[end.link].pid(1 - end.side)
    }

    fn instant(&self) -> Instant {
        self.began + self.timeline.now()
    }

    fn local_after(&mut self, pause: Duration, pid: Pid, local: Local) {
        self.timeline.after(pause, Event::Local(pid, local));
    }

    fn local_at(&mut self, at: Duration, pid: Pid, local: Local) {
        self.timeline.at(at, Event::Local(pid, local));
    }

    fn only_newer_epochs_deliver(&mut self, epoch: Epoch) {
        let last = self.delivered_epoch;
        assert!(
            epoch >= last,
            "a token of epoch {epoch} comes after one of epoch {last}"
        );
        self.delivered_epoch = epoch;
    }

    fn note(&self, what: impl FnOnce() -> String) {
        if self.tells {
            println!("{:>9.3} {}", self.timeline.now().as_secs_f64(), what());
        }
    }
}

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
const TIME_WAS_UP: &str = "its time was up";
const CONTEXT_TOKENS: u32 = 64;
const VOCABULARY: u32 = 97;
/// The default of a cluster's file.
const NODE_GRACE: Duration = Duration::from_millis(1500);
const FAULTS_UNTIL: Duration = Duration::from_secs(14);
/// By then every fault is made good: the longest lasts 9 s.
const CALM_FROM: Duration = Duration::from_secs(24);
/// A request that waits until then would wait for ever.
const END: Duration = Duration::from_secs(90);
