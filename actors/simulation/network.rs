//! Links between processes: as a QUIC connection is seen from above. Order within a lane until the link
//! is lost, none between lanes; each side judges by its own detector, and a lost link ends everything
//! that is pending on it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use offbook_protocol::{Epoch, Plan, Rank, StepOutcome};
use offbook_runtime::{Detector, OwnTimer, Patience, Pulse, Standing};

use super::{Event, Local, Pid, Role, World};

/// What the peers of a process call it: it keeps its name when it is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    Node(usize),
    Shard(usize),
}

pub(super) type LinkId = usize;
pub(super) type AskId = u64;

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) link: LinkId,
    pub(super) side: usize,
}

/// What keeps its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    /// Messages of one process to another.
    Messages,
    /// Each on a stream of its own.
    Reply(AskId),
    Outcomes(Epoch),
}

#[derive(Clone, Debug)]
pub(super) enum Packet {
    Hello,
    Close,
    Ask(AskId, Question),
    Reply(AskId, Answer),
    Leave(Epoch),
    Plan(Plan),
    Outcome(StepOutcome),
    OutcomesEnded(Epoch),
}

/// What a node says of its shard.
#[derive(Clone, Copy, Debug)]
pub(super) struct News {
    pub(super) ended: Option<Pid>,
    /// It failed by itself.
    pub(super) failed: bool,
    pub(super) given_up: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Question {
    Announce {
        machine: usize,
        news: News,
    },
    Register {
        machine: usize,
        heard: Epoch,
    },
    StepFailed {
        epoch: Epoch,
        rank: Rank,
        why: String,
    },
    Attach,
    Load {
        epoch: Epoch,
        rank: Rank,
        ranks: usize,
    },
    Join {
        epoch: Epoch,
        rank: Rank,
        members: Vec<Pid>,
    },
    Watch {
        epoch: Epoch,
    },
}

/// `Err` is a refusal that another attempt may not meet.
pub(super) type Answer = Result<(), String>;

/// Who has asked what.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) end: End,
    pub(super) question: Question,
}

/// What a process waits for that the loss of a link ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watch {
    ShardOf { machine: usize, registration: u64 },
    Node { machine: usize, pid: Pid },
    Head,
    OwnNode,
    Attachment { attachments: u64, shard: Pid },
}

pub(super) struct Link {
    sides: [Side; 2],
}

impl Link {
    pub(super) fn pid(&self, side: usize) -> Pid {
        self.sides[side].pid
    }
}

struct Side {
    pid: Pid,
    open: bool,
    detector: Detector,
    pulse: Pulse,
    beats: VecDeque<Duration>,
    /// When the last packet of each lane comes here.
    last: BTreeMap<Lane, Duration>,
    /// What cannot be delivered now: the path is cut, or the process is frozen.
    held: VecDeque<(Lane, Packet)>,
    watches: Vec<Watch>,
}

impl Side {
    fn new(pid: Pid, role: Role, now: Instant) -> Self {
        let patience = match role {
            Role::Node => Patience::default(),
            // A head that stands still for a while costs no step.
            Role::Shard => Patience {
                lose_min: SHARD_SILENCE,
                lose_max: SHARD_SILENCE,
                ..Patience::default()
            },
        };
        Self {
            pid,
            open: false,
            pulse: Pulse::new(&patience, now),
            detector: Detector::new(patience, now),
            beats: VecDeque::new(),
            last: BTreeMap::new(),
            held: VecDeque::new(),
            watches: Vec::new(),
        }
    }
}

impl World {
    /// The link of `from` to `to`: that which stands, or a new one that is being dialled.
    pub(super) fn dial(&mut self, from: Pid, to: Name) -> Option<End> {
        if let Some(end) = self.processes[from as usize].links.get(&to) {
            return Some(*end);
        }
        let peer = match to {
            Name::Node(machine) => self.nodes[machine].pid,
            Name::Shard(machine) => self.nodes[machine].shard?,
        };
        let now = self.instant();
        let link = self.links.len();
        self.links.push(Link {
            sides: [from, peer].map(|pid| Side::new(pid, self.processes[pid as usize].role, now)),
        });
        let end = End { link, side: 0 };
        self.links[link].sides[0].open = true;
        self.processes[from as usize].links.insert(to, end);
        self.transmit(end, Lane::Messages, Packet::Hello);
        Some(end)
    }

    pub(super) fn is_open(&self, end: End) -> bool {
        self.links[end.link].sides[end.side].open
    }

    fn is_open_to(&self, machine: usize, other: usize) -> bool {
        !self.cuts[machine][other]
    }

    /// Whether what `from` says reaches `to` now, and is heard.
    pub(super) fn reaches(&self, from: Pid, to: Pid) -> bool {
        let (from, to) = (&self.processes[from as usize], &self.processes[to as usize]);
        let both_run = from.runs() && to.runs();
        both_run && self.is_open_to(from.machine, to.machine)
    }

    fn transmit(&mut self, from: End, lane: Lane, packet: Packet) {
        let latency = self.latency();
        let now = self.timeline.now();
        let to = End {
            side: 1 - from.side,
            ..from
        };
        let last = self.links[to.link].sides[to.side]
            .last
            .entry(lane)
            .or_default();
        *last = (*last).max(now + latency);
        let at = *last;
        self.timeline.at(at, Event::Arrive(to, lane, packet));
    }

    fn latency(&mut self) -> Duration {
        let is_slow = self.timeline.now() < self.slow_until;
        let most = match self.chance.below(20) {
            // A packet that was lost is sent again.
            0 => 60,
            1 => 300,
            _ if is_slow => 200,
            _ => 2,
        };
        self.chance.ms(0, most)
    }

    pub(super) fn tell(&mut self, from: End, lane: Lane, packet: Packet) {
        if self.is_open(from) {
            self.transmit(from, lane, packet);
        }
    }

    /// Asks over a link; the answer, or that there is none, comes as an event of the process.
    pub(super) fn ask(&mut self, from: End, question: Question, deadline: Duration) {
        let pid = self.links[from.link].sides[from.side].pid;
        let ask = self.asks_made;
        self.asks_made += 1;
        let asked = Asked {
            end: from,
            question: question.clone(),
        };
        self.asks.insert(ask, asked);
        if self.is_open(from) {
            self.transmit(from, Lane::Messages, Packet::Ask(ask, question));
            self.local_after(deadline, pid, Local::Answered(ask, None));
        } else {
            self.local_after(Duration::ZERO, pid, Local::Answered(ask, None));
        }
    }

    /// Tells `watch` once when the link is lost; at once when it is lost already.
    pub(super) fn watch(&mut self, end: End, watch: Watch) {
        let side = &mut self.links[end.link].sides[end.side];
        if side.open {
            side.watches.push(watch);
        } else {
            let pid = side.pid;
            self.local_after(Duration::ZERO, pid, Local::LinkLost(watch));
        }
    }

    pub(super) fn arrive(&mut self, to: End, lane: Lane, packet: Packet) {
        let sender = self.links[to.link].sides[1 - to.side].pid;
        let side = &self.links[to.link].sides[to.side];
        let (pid, open) = (side.pid, side.open);
        if !self.processes[pid as usize].alive {
            return;
        }
        let machines = [sender, pid].map(|pid| self.processes[pid as usize].machine);
        let is_cut = !self.is_open_to(machines[0], machines[1]);
        if is_cut && matches!(packet, Packet::Close) {
            return;
        }
        if is_cut || self.processes[pid as usize].frozen || !side.held.is_empty() {
            self.links[to.link].sides[to.side]
                .held
                .push_back((lane, packet));
            return;
        }
        match packet {
            Packet::Hello => self.welcome(to),
            _ if !open => {}
            Packet::Close => self.lose(to),
            packet => self.receive(to, pid, packet),
        }
    }

    fn welcome(&mut self, end: End) {
        let side = |side: usize| self.links[end.link].sides[side].pid;
        let (pid, peer) = (side(end.side), side(1 - end.side));
        let name = self.processes[peer as usize].name();
        let known = self.processes[pid as usize].known.entry(name).or_default();
        if peer < *known {
            // An earlier life of it: refused.
            return self.transmit(end, Lane::Reply(u64::MAX), Packet::Close);
        }
        *known = peer;
        // The other side dials although it has had a link: then it has lost that one.
        if let Some(old) = self.processes[pid as usize].links.get(&name).copied() {
            self.lose(old);
        }
        let now = self.instant();
        let role = self.processes[pid as usize].role;
        let side = &mut self.links[end.link].sides[end.side];
        *side = Side {
            open: true,
            last: std::mem::take(&mut side.last),
            ..Side::new(pid, role, now)
        };
        self.processes[pid as usize].links.insert(name, end);
    }

    /// One side has lost the link: what waits for it hears of it, in no order, and so does the other
    /// side if it can.
    pub(super) fn lose(&mut self, end: End) {
        let (pid, peer) = {
            let sides = &self.links[end.link].sides;
            (sides[end.side].pid, sides[1 - end.side].pid)
        };
        let side = &mut self.links[end.link].sides[end.side];
        if !std::mem::take(&mut side.open) {
            return;
        }
        side.held.clear();
        for watch in std::mem::take(&mut side.watches) {
            let pause = self.chance.ms(0, 3);
            self.local_after(pause, pid, Local::LinkLost(watch));
        }
        let peer = self.processes[peer as usize].name();
        let links = &mut self.processes[pid as usize].links;
        if links.get(&peer) == Some(&end) {
            links.remove(&peer);
        }
        let pending = self.asks.iter().filter(|(_, asked)| asked.end == end);
        let pending: Vec<_> = pending.map(|(ask, _)| *ask).collect();
        for ask in pending {
            let pause = self.chance.ms(0, 3);
            self.local_after(pause, pid, Local::Answered(ask, None));
        }
        self.head_lost_stream(end);
        self.transmit(end, Lane::Reply(u64::MAX), Packet::Close);
    }

    /// Heartbeats of all processes that run.
    pub(super) fn tick(&mut self) {
        let now = self.instant();
        for at in 0..self.processes.len() {
            if !self.processes[at].runs() {
                continue;
            }
            let lateness = self.processes[at].timer.ticked(now);
            let ends: Vec<_> = self.processes[at].links.values().copied().collect();
            for end in ends {
                self.beat(end, now, lateness);
            }
        }
        self.timeline.after(OwnTimer::TICK, Event::Tick);
    }

    fn beat(&mut self, end: End, now: Instant, lateness: Duration) {
        let virtual_now = self.timeline.now();
        let side = &mut self.links[end.link].sides[end.side];
        side.detector.excuse(lateness);
        // The timer's task may run before the socket is read: the worse order.
        let standing = side.detector.standing(now);
        let is_due = side.pulse.is_due(now, lateness);
        while side
            .beats
            .pop_front_if(|arrival| *arrival <= virtual_now)
            .is_some()
        {
            side.detector.heard(now);
        }
        if standing == Standing::Lost {
            self.lose(end);
            return;
        }
        let sides = &self.links[end.link].sides;
        let [from, to] = [end.side, 1 - end.side].map(|side| sides[side].pid);
        let machine = |pid: Pid| self.processes[pid as usize].machine;
        if is_due && self.is_open_to(machine(from), machine(to)) && !self.chance.once_in(50) {
            let arrival = virtual_now + self.chance.ms(0, 5);
            self.links[end.link].sides[1 - end.side]
                .beats
                .push_back(arrival);
        }
    }

    /// Delivers what was held back, if it can be now: before all that is still on its way, the links in
    /// any order.
    pub(super) fn release(&mut self) {
        let first = self.chance.below(self.links.len());
        for place in 0..2 * self.links.len() {
            let (link, side) = ((first + place / 2) % self.links.len(), place % 2);
            let sides = &mut self.links[link].sides;
            let held = std::mem::take(&mut sides[side].held);
            if !self.processes[sides[1 - side].pid as usize].alive {
                // Nobody sends again what did not get through.
                continue;
            }
            for (lane, packet) in held {
                let arrival = Event::Arrive(End { link, side }, lane, packet);
                self.timeline.after(Duration::ZERO, arrival);
            }
        }
    }
}

/// How long a shard bears the silence of others: the default of a cluster's file.
const SHARD_SILENCE: Duration = Duration::from_secs(10);
