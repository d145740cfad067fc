//! What goes wrong in a run, and how it is made good.

use std::time::Duration;

use super::network::Name;
use super::{Event, FAULTS_UNTIL, Local, Pid, Plot, World};

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    KillShard(usize),
    /// It fails by itself.
    CrashShard(usize),
    /// With its shard; on the head's machine this is the head.
    KillNode(usize),
    FreezeShard(usize),
    FreezeNode(usize),
    /// Both directions.
    Cut(usize, usize),
    CutOneWay(usize, usize),
    /// From all others.
    Isolate(usize),
    /// One side of a link of the head loses it, without any fault of the path.
    LoseLink(usize),
    FailStep(usize),
    LosePlan,
    /// The machine stays away.
    Farewell(usize),
    SlowNetwork,
    ClientLeaves(usize),
}

impl World {
    pub(super) fn plan_faults(&mut self, count: usize, until: Duration) {
        let nodes = self.nodes.len();
        for _ in 0..count {
            let at = Duration::from_millis(500) + until.mul_f64(self.chance.share());
            let machine = self.chance.below(nodes);
            let other = (machine + 1 + self.chance.below(nodes - 1)) % nodes;
            let fault = match self.chance.below(14) {
                0 => Fault::KillShard(machine),
                1 | 2 => Fault::CrashShard(machine),
                3 => Fault::KillNode(machine),
                4 | 5 => Fault::FreezeShard(machine),
                6 => Fault::FreezeNode(machine),
                7 => Fault::Cut(machine, other),
                8 => Fault::CutOneWay(machine, other),
                9 => Fault::Isolate(machine),
                10 => Fault::LoseLink(machine),
                11 => Fault::FailStep(machine),
                12 => Fault::SlowNetwork,
                _ => Fault::LosePlan,
            };
            self.timeline.at(at, Event::Fault(fault));
        }
    }

    /// Clients that do not wait for the end of their answers.
    pub(super) fn plan_departures(&mut self, count: usize, until: Duration) {
        for _ in 0..count {
            let at = until.mul_f64(self.chance.share());
            let client = self.chance.below(self.clients.len());
            self.timeline
                .at(at, Event::Fault(Fault::ClientLeaves(client)));
        }
    }

    /// What goes wrong while a group forms meets the most that is under way at once.
    pub(super) fn disturb_formation(&mut self) {
        let disturbs = matches!(self.plot, Plot::Faults | Plot::Haste) && self.chance.once_in(3);
        if disturbs && self.timeline.now() < FAULTS_UNTIL {
            let machine = self.chance.below(self.nodes.len());
            let fault = match self.chance.below(3) {
                0 => Fault::KillShard(machine),
                1 => Fault::LoseLink(machine),
                _ => Fault::FailStep(machine),
            };
            let pause = self.chance.ms(0, 80);
            self.timeline.after(pause, Event::Fault(fault));
        }
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::KillShard(machine) => {
                if let Some(shard) = self.nodes[machine].shard {
                    self.kill(shard);
                }
            }
            Fault::CrashShard(machine) => {
                if let Some(shard) = self.nodes[machine].shard {
                    self.crash(shard);
                }
            }
            Fault::KillNode(machine) => self.kill(self.nodes[machine].pid),
            Fault::FreezeShard(machine) => {
                if let Some(shard) = self.nodes[machine].shard {
                    self.freeze(shard);
                }
            }
            Fault::FreezeNode(machine) => self.freeze(self.nodes[machine].pid),
            Fault::Cut(machine, other) => {
                self.cut(machine, other);
                self.cut(other, machine);
            }
            Fault::CutOneWay(machine, other) => self.cut(machine, other),
            Fault::Isolate(machine) => {
                for other in (0..self.nodes.len()).filter(|other| *other != machine) {
                    self.cut(machine, other);
                    self.cut(other, machine);
                }
            }
            Fault::LoseLink(machine) => self.lose_link(machine),
            Fault::FailStep(machine) => {
                let running = self.nodes[machine].shard;
                for epoch in self.groups.keys().copied().collect::<Vec<_>>() {
                    if let Some(shard) = running {
                        self.end_loop(shard, epoch, Some("the device failed".into()));
                    }
                }
            }
            Fault::SlowNetwork => {
                self.slow_until = self.timeline.now() + self.chance.ms(200, 4000);
            }
            Fault::LosePlan => self.loses_plan = true,
            Fault::Farewell(machine) => self.kill(self.nodes[machine].pid),
            Fault::ClientLeaves(client) => self.client_leaves(client),
        }
    }

    fn cut(&mut self, from: usize, to: usize) {
        self.cuts[from][to] = true;
        let pause = self.chance.ms(50, 9000);
        self.timeline.after(pause, Event::Heal(from, to));
    }

    pub(super) fn heal(&mut self, from: usize, to: usize) {
        self.cuts[from][to] = false;
        self.note(|| format!("the way from {from} to {to} is whole"));
        self.release();
        self.exchange_all();
    }

    fn lose_link(&mut self, machine: usize) {
        let Some(shard) = self.nodes[machine].shard else {
            return;
        };
        let heads_side = self.chance.once_in(2);
        let (pid, peer) = if heads_side {
            (self.nodes[0].pid, Name::Shard(machine))
        } else {
            (shard, Name::Node(0))
        };
        let link = self.processes[pid as usize].links.get(&peer).copied();
        if let Some(end) = link.filter(|_| self.processes[pid as usize].runs()) {
            self.lose(end);
        }
    }

    fn freeze(&mut self, pid: Pid) {
        if self.processes[pid as usize].runs() {
            self.processes[pid as usize].frozen = true;
            let pause = self.chance.ms(50, 6000);
            self.timeline.after(pause, Event::Thaw(pid));
        }
    }

    pub(super) fn thaw(&mut self, pid: Pid) {
        let process = &mut self.processes[pid as usize];
        process.frozen = false;
        let held = std::mem::take(&mut process.held);
        self.note(|| format!("process {pid} goes on"));
        for local in held {
            self.local_after(Duration::ZERO, pid, local);
        }
        self.release();
        self.exchange_all();
    }

    /// Ends a shard by a failure of its own.
    pub(super) fn crash(&mut self, shard: Pid) {
        if self.processes[shard as usize].alive {
            self.crashed.insert(shard);
            self.kill(shard);
        }
    }

    /// Ends a process at once; a node takes its shard with it.
    pub(super) fn kill(&mut self, pid: Pid) {
        if !self.processes[pid as usize].alive {
            return;
        }
        let process = &mut self.processes[pid as usize];
        process.alive = false;
        process.held.clear();
        process.links.clear();
        let machine = process.machine;
        self.note(|| format!("process {pid} on {machine} is dead"));
        if self.shards.remove(&pid).is_some() {
            for epoch in self.groups.keys().copied().collect::<Vec<_>>() {
                if self.groups[&epoch].has(pid) {
                    self.peers_notice(pid, epoch);
                }
            }
            let node = self.nodes[machine].pid;
            let pause = self.chance.ms(0, 5);
            self.local_after(pause, node, Local::ShardExited(pid));
        }
        if self.nodes[machine].pid == pid {
            if let Some(shard) = self.nodes[machine].shard {
                self.kill(shard);
            }
            if machine == 0 {
                self.head = None;
                self.clients_lost_head();
            }
            if let (Plot::Farewell(away), 0) = (self.plot, machine) {
                // A new head waits for every node that it has not heard of.
                self.plot = Plot::Faults;
                if !self.processes[self.nodes[away].pid as usize].alive {
                    self.timeline
                        .after(Duration::from_secs(8), Event::StartNode(away));
                }
            }
            if self.plot != Plot::Farewell(machine) {
                let pause = self.chance.ms(200, 8000);
                self.timeline.after(pause, Event::StartNode(machine));
            }
        }
    }

    /// A node has given its shard up: somebody looks into it, and starts the node again.
    pub(super) fn call_operator(&mut self, machine: usize) {
        let pid = self.nodes[machine].pid;
        self.timeline
            .after(Duration::from_secs(2), Event::Operator(pid));
    }

    fn client_leaves(&mut self, id: usize) {
        self.clients[id].left = true;
        if let (super::client::Stage::Taken(sequence), Some(head)) =
            (&self.clients[id].stage, &self.head)
        {
            let (sequence, pid) = (*sequence, head.pid);
            self.local_after(Duration::ZERO, pid, Local::Left(sequence));
        }
    }
}
