//! What goes wrong in a run, and how it is made good.

use std::time::Duration;

use offbook_protocol::Epoch;
use offbook_runtime::simulation::network::Weather;
use offbook_runtime::supervise::Exit;

use super::backstage::Order;
use super::client::ClientId;
use super::{Event, FAULTS_UNTIL, Machine, Pid, Plot, SIGKILL, WINDOW, World};

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    KillShard(usize),
    /// It fails by itself.
    CrashShard(usize),
    /// With its shard; on the head's machine this is the head.
    KillNode(usize),
    /// The same by SIGTERM: it says goodbye.
    EndNode(usize),
    FreezeShard(usize),
    FreezeNode(usize),
    /// Both directions.
    Cut(usize, usize),
    CutOneWay(usize, usize),
    /// From all others.
    Isolate(usize),
    FailStep(usize),
    /// The machine stays away.
    Farewell(usize),
    Storm,
    ClientLeaves(ClientId),
}

impl World {
    /// What goes wrong when.
    pub(super) fn plan_plot(&mut self, clients: usize) {
        let faults = self.chance.below(9);
        match self.plot {
            Plot::Deadly => {}
            Plot::Farewell(machine) => {
                let at = self.chance.ms(500, 2500);
                self.timeline.at(at, Event::Fault(Fault::Farewell(machine)));
                self.plan_faults(faults / 4);
            }
            Plot::Faults | Plot::Haste => {
                self.plan_faults(faults);
                for _ in 0..self.chance.below(clients / 2 + 1) {
                    let at = FAULTS_UNTIL.mul_f64(self.chance.share());
                    let client = self.chance.below(clients);
                    let leaves = Fault::ClientLeaves(client);
                    self.timeline.at(at, Event::Fault(leaves));
                }
            }
        }
    }

    fn plan_faults(&mut self, count: usize) {
        let machines = self.machines.len();
        for _ in 0..count {
            let at = FAULTS_UNTIL.mul_f64(self.chance.share());
            let machine = self.chance.below(machines);
            let other = (machine + 1 + self.chance.below(machines - 1)) % machines;
            let fault = match self.chance.below(14) {
                0 | 1 => Fault::KillShard(machine),
                2 => Fault::CrashShard(machine),
                3 => Fault::KillNode(machine),
                4 => Fault::EndNode(machine),
                5 | 6 => Fault::FreezeShard(machine),
                7 => Fault::FreezeNode(machine),
                8 => Fault::Cut(machine, other),
                9 | 10 => Fault::CutOneWay(machine, other),
                11 => Fault::Isolate(machine),
                12 => Fault::FailStep(machine),
                _ => Fault::Storm,
            };
            self.timeline.at(at, Event::Fault(fault));
        }
    }

    /// An epoch begins. What goes wrong while a group forms meets the most that is under way at once.
    pub(super) fn disturb_formation(&mut self, epoch: Epoch) {
        if epoch <= self.disturbed {
            return;
        }
        self.disturbed = epoch;
        self.note(|| format!("epoch {epoch} begins"));
        let stored = std::fs::read_to_string(self.disk.path().join("epoch"));
        let stored = stored.ok().and_then(|text| text.trim().parse().ok());
        assert!(
            stored.is_some_and(|stored| Epoch(stored) >= epoch),
            "epoch {epoch} is begun, and the disk has {stored:?}"
        );
        let disturbs = matches!(self.plot, Plot::Faults | Plot::Haste) && self.chance.once_in(2);
        if disturbs && self.timeline.now() < FAULTS_UNTIL {
            let machine = self.chance.below(self.machines.len());
            let fault = match self.chance.below(3) {
                0 => Fault::KillShard(machine),
                1 => Fault::FreezeShard(machine),
                _ => Fault::FailStep(machine),
            };
            let pause = self.chance.ms(0, 80);
            self.timeline.after(pause, Event::Fault(fault));
        }
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        self.story.count_fault();
        match fault {
            Fault::KillShard(machine) => self.kill_shard(machine, Exit::Signal(SIGKILL)),
            Fault::CrashShard(machine) => self.kill_shard(machine, Exit::Code(1)),
            Fault::KillNode(machine) | Fault::Farewell(machine) => {
                if let Some(node) = self.machines[machine].node {
                    self.kill(node, Exit::Signal(SIGKILL));
                }
            }
            Fault::EndNode(machine) => {
                if let Some(node) = self.machines[machine].node {
                    self.backstage.order(Order::Terminate(node));
                }
            }
            Fault::FreezeShard(machine) => {
                let (shard, now) = (self.machines[machine].shard, self.timeline.now());
                let pause = self.chance.ms(50, 2000);
                // Or until its node kills it. One that this has hardly heard of has a minute, which is long.
                let process = shard.and_then(|pid| self.processes.get(&pid));
                let is_known = process.is_some_and(|it| it.age(now) > KNOWN_AFTER);
                let for_ever = is_known && self.chance.once_in(3);
                self.freeze(shard, (!for_ever).then_some(pause));
            }
            Fault::FreezeNode(machine) => {
                let pause = self.chance.ms(50, 2000);
                self.freeze(self.machines[machine].node, Some(pause));
            }
            Fault::Cut(machine, other) => self.cut(&[(machine, other), (other, machine)]),
            Fault::CutOneWay(machine, other) => self.cut(&[(machine, other)]),
            Fault::Isolate(machine) => {
                let others = (0..self.machines.len()).filter(|other| *other != machine);
                let ways = others.flat_map(|other| [(machine, other), (other, machine)]);
                self.cut(&ways.collect::<Vec<_>>());
            }
            Fault::FailStep(machine) => {
                if let Some(shard) = self.machines[machine].shard {
                    self.fail_step(shard);
                }
            }
            Fault::Storm => {
                let storm = Weather {
                    loss: 0.3 * self.chance.share(),
                    doubled: 0.1,
                    delay: WINDOW + self.chance.ms(0, 20),
                    jitter: self.chance.ms(0, 60),
                };
                self.network.change_weather(storm);
                let pause = self.chance.ms(200, 2000);
                self.timeline.after(pause, Event::Clear);
            }
            Fault::ClientLeaves(client) => self.clients[client].borrow_mut().leave(),
        }
    }

    fn kill_shard(&mut self, machine: usize, exit: Exit) {
        if let Some(shard) = self.machines[machine].shard {
            self.kill(shard, exit);
        }
    }

    /// All for the same time.
    fn cut(&mut self, ways: &[(usize, usize)]) {
        let pause = self.chance.ms(50, 2000);
        for (from, to) in ways.iter().copied() {
            self.cuts[from][to] = true;
            self.network.cut(from, to);
            self.timeline.after(pause, Event::Heal(from, to));
        }
    }

    pub(super) fn heal(&mut self, from: usize, to: usize) {
        self.cuts[from][to] = false;
        self.network.mend(from, to);
        self.note(|| format!("the way from {from} to {to} is whole"));
        self.exchange_all();
    }

    /// For ever, if there is no pause.
    fn freeze(&mut self, pid: Option<Pid>, pause: Option<Duration>) {
        let Some(pid) = pid else { return };
        if let Some(process) = self.processes.get_mut(&pid)
            && !std::mem::replace(&mut process.frozen, true)
            && let Some(pause) = pause
        {
            self.timeline.after(pause, Event::Thaw(pid));
        }
    }

    pub(super) fn thaw(&mut self, pid: Pid) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        process.frozen = false;
        let held = std::mem::take(&mut process.held);
        self.note(|| format!("process {pid} goes on"));
        for event in held {
            self.timeline.after(Duration::ZERO, event);
        }
        self.exchange_all();
    }

    /// A node has died, and is started again unless it has left for good.
    pub(super) fn node_is_gone(&mut self, machine: usize) {
        if machine == 0 {
            self.seen.forget();
        }
        if let (Plot::Farewell(away), 0) = (self.plot, machine) {
            // A new head waits for every node that it has not heard of.
            self.plot = Plot::Faults;
            if self.machines[away].node.is_none() {
                let pause = self.chance.ms(200, 2000);
                self.timeline.after(pause, Event::StartNode(away));
            }
        }
        if self.plot != Plot::Farewell(machine) {
            let pause = self.chance.ms(200, 2000);
            self.timeline.after(pause, Event::StartNode(machine));
        }
    }

    /// Should a node give its shard up, then somebody looks into it and starts the node again.
    pub(super) fn call_operator(&mut self, machine: usize) {
        let Machine { node, starts, .. } = self.machines[machine];
        if let Some(node) = node {
            self.timeline
                .after(OPERATOR_COMES, Event::Operator(node, starts));
        }
    }

    pub(super) fn look_after(&mut self, node: Pid, starts: u32) {
        let Some(process) = self.processes.get(&node) else {
            return;
        };
        if self.machines[process.machine].starts == starts {
            self.note(|| format!("an operator starts node {node} again"));
            self.kill(node, Exit::Signal(SIGKILL));
        }
    }
}

/// A shard has attached to its node by then, in most weathers.
const KNOWN_AFTER: Duration = Duration::from_millis(500);
/// Longer than the longest pause before a restart, and than a node stands still.
const OPERATOR_COMES: Duration = Duration::from_secs(6);
