//! A shard's process: what its actors do around their decisions, without actors. The decisions are the
//! real ones; the engine is a script, see `engine.rs`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use offbook_protocol::{Epoch, Plan, Rank, StepOutcome};

use super::engine::{Engine, Order, Share};
use super::network::{Answer, AskId, End, Lane, Name, Packet, Question, Watch};
use super::{Local, Pid, Role, World};
use crate::shard_worker::attendance::Attendance;
use crate::shard_worker::{MEET_DEADLINE, REGISTER_DEADLINE, REGISTER_PAUSE};

pub(super) struct Shard {
    machine: usize,
    attendance: Attendance<Rank>,
    /// The epoch whose peers may be met.
    endpoint: Option<Epoch>,
    /// The epoch whose group can be ended.
    group: Option<Epoch>,
    pub(super) orders: VecDeque<Order>,
    pub(super) engine: Engine,
    pub(super) share: Option<Share>,
    /// The epoch that the share was loaded for last.
    pub(super) loaded_for: Option<Epoch>,
    pub(super) outcomes: BTreeMap<Epoch, Outcomes>,
}

/// What the head is to have of an epoch.
#[derive(Default)]
pub(super) struct Outcomes {
    waiting: VecDeque<StepOutcome>,
    watcher: Option<End>,
    ended: bool,
}

/// Where an answer goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplyTo {
    pub(super) end: End,
    pub(super) ask: AskId,
}

/// A meeting that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meeting {
    pub(super) epoch: Epoch,
    pub(super) rank: Rank,
    pub(super) until: Duration,
    pub(super) reply: ReplyTo,
}

impl World {
    pub(super) fn start_shard_process(&mut self, machine: usize) -> Pid {
        let pid = self.start_process(machine, Role::Shard);
        let shard = Shard {
            machine,
            attendance: Attendance::new(),
            endpoint: None,
            group: None,
            orders: VecDeque::new(),
            engine: Engine::Free,
            share: None,
            loaded_for: None,
            outcomes: BTreeMap::new(),
        };
        self.shards.insert(pid, shard);
        let starting = self.chance.ms(20, 200);
        self.local_after(starting, pid, Local::Register);
        self.local_after(starting, pid, Local::Attach);
        pid
    }

    pub(super) fn shard_mut(&mut self, pid: Pid) -> &mut Shard {
        self.shards
            .get_mut(&pid)
            .expect("only a shard that lives gets its events")
    }

    pub(super) fn register(&mut self, pid: Pid) {
        if let Some(epoch) = self.shard_mut(pid).attendance.leave_all() {
            self.abort(pid, epoch);
        }
        let shard = self.shard_mut(pid);
        let running = shard.attendance.running();
        assert!(
            running.is_none(),
            "shard {pid} registers while it runs {running:?}"
        );
        let question = Question::Register {
            machine: shard.machine,
            heard: shard.attendance.heard(),
        };
        if let Some(end) = self.dial(pid, Name::Node(0)) {
            self.ask(end, question, REGISTER_DEADLINE);
        }
    }

    pub(super) fn attach(&mut self, pid: Pid) {
        let machine = self.shard_mut(pid).machine;
        if let Some(end) = self.dial(pid, Name::Node(machine)) {
            self.ask(end, Question::Attach, REGISTER_DEADLINE);
        }
    }

    /// What has become of a question of a shard's; `None` when there is no answer.
    pub(super) fn shard_heard(
        &mut self,
        pid: Pid,
        end: End,
        question: &Question,
        answer: Option<Answer>,
    ) {
        let is_taken = matches!(answer, Some(Ok(())));
        match question {
            Question::Register { .. } if is_taken => self.watch(end, Watch::Head),
            Question::Register { .. } => self.local_after(REGISTER_PAUSE, pid, Local::Register),
            Question::Attach if is_taken => self.watch(end, Watch::OwnNode),
            Question::Attach => self.local_after(REGISTER_PAUSE, pid, Local::Attach),
            _ => {}
        }
    }

    pub(super) fn shard_lost_link(&mut self, pid: Pid, watch: Watch) {
        match watch {
            Watch::Head => self.register(pid),
            Watch::OwnNode => self.attach(pid),
            _ => unreachable!("a shard watches nobody else"),
        }
    }

    pub(super) fn asked_to_load(&mut self, pid: Pid, epoch: Epoch, share: Share, reply: ReplyTo) {
        let Some(before) = self.shard_mut(pid).attendance.load(epoch) else {
            return self.reply(reply, Err("the epoch is over".into()));
        };
        self.abort(pid, before);
        self.shard_mut(pid).orders.push_back(Order::Load {
            epoch,
            share,
            reply,
        });
        self.next_order(pid);
    }

    /// Each shard works for the epoch that it heard of last, or for none.
    pub(super) fn check_shards(&self) {
        for (pid, shard) in &self.shards {
            if let Some((epoch, _)) = shard.attendance.running() {
                let heard = shard.attendance.heard();
                assert!(
                    epoch >= heard,
                    "shard {pid} runs {epoch} and was to load {heard}"
                );
            }
        }
    }

    /// The share is held: opens the endpoint for the meeting.
    pub(super) fn loaded(&mut self, pid: Pid, epoch: Epoch, reply: ReplyTo) {
        self.shard_mut(pid).endpoint = Some(epoch);
        self.reply(reply, Ok(()));
    }

    pub(super) fn asked_to_join(&mut self, pid: Pid, meeting: Meeting, members: Vec<Pid>) {
        let Meeting { epoch, reply, .. } = meeting;
        let endpoint = self
            .shard_mut(pid)
            .endpoint
            .take_if(|bound| *bound == epoch);
        if endpoint.is_none() {
            return self.reply(reply, Err("nothing is bound for the epoch".into()));
        }
        self.present(pid, epoch, members);
        self.meet(pid, meeting);
    }

    /// Looks whether all peers are there; again a moment later if not.
    pub(super) fn meet(&mut self, pid: Pid, meeting: Meeting) {
        let Meeting {
            epoch,
            rank,
            until,
            reply,
        } = meeting;
        if self.all_meet(pid, epoch) {
            let pause = self.chance.ms(0, 4);
            self.local_after(pause, pid, Local::Met { epoch, rank, reply });
        } else if self.timeline.now() >= until {
            self.reply(reply, Err("a peer was not met".into()));
        } else {
            let pause = self.chance.ms(5, 20);
            self.local_after(pause, pid, Local::Meet(meeting));
        }
    }

    pub(super) fn met(&mut self, pid: Pid, epoch: Epoch, rank: Rank, reply: ReplyTo) {
        self.shard_mut(pid)
            .orders
            .push_back(Order::Run { epoch, rank, reply });
        self.next_order(pid);
    }

    /// The engine runs: its group can be ended from now on.
    pub(super) fn begun(&mut self, pid: Pid, epoch: Epoch, rank: Rank, reply: ReplyTo) {
        self.join_group(pid, epoch);
        let shard = self.shard_mut(pid);
        shard.group = Some(epoch);
        if shard.attendance.begin(epoch, rank).is_err() {
            self.abort(pid, epoch);
            return self.reply(reply, Err("the epoch was left while its group met".into()));
        }
        self.reply(reply, Ok(()));
    }

    pub(super) fn asked_to_leave(&mut self, pid: Pid, epoch: Epoch) {
        self.shard_mut(pid).attendance.leave(epoch);
        self.abort(pid, epoch);
    }

    fn abort(&mut self, pid: Pid, epoch: Epoch) {
        let shard = self.shard_mut(pid);
        shard.endpoint.take_if(|bound| *bound <= epoch);
        let group = shard.group.take_if(|group| *group <= epoch);
        let left = shard.attendance.drop_left();
        if let Some(group) = group {
            self.poison(pid, group);
        }
        if let Some((left, _)) = left {
            self.shut_down(pid, left);
        }
    }

    pub(super) fn plan_came(&mut self, pid: Pid, plan: Plan) {
        if self
            .shard_mut(pid)
            .attendance
            .current_mut(plan.epoch)
            .is_some()
        {
            self.command(pid, plan);
        }
    }

    pub(super) fn asked_to_be_watched(&mut self, pid: Pid, epoch: Epoch, end: End, reply: ReplyTo) {
        self.reply(reply, Ok(()));
        let shard = self.shard_mut(pid);
        let is_current = shard.attendance.current_mut(epoch).is_some();
        let outcomes = shard
            .outcomes
            .get_mut(&epoch)
            .filter(|outcomes| outcomes.watcher.is_none());
        match outcomes.filter(|_| is_current) {
            Some(outcomes) => {
                outcomes.watcher = Some(end);
                self.forward(pid, epoch);
            }
            None => self.tell(end, Lane::Outcomes(epoch), Packet::OutcomesEnded(epoch)),
        }
    }

    pub(super) fn report_outcome(&mut self, pid: Pid, outcome: StepOutcome) {
        let epoch = outcome.epoch;
        let outcomes = self.shard_mut(pid).outcomes.entry(epoch).or_default();
        outcomes.waiting.push_back(outcome);
        self.forward(pid, epoch);
    }

    fn forward(&mut self, pid: Pid, epoch: Epoch) {
        let Some(outcomes) = self.shard_mut(pid).outcomes.get_mut(&epoch) else {
            return;
        };
        let Some(end) = outcomes.watcher else { return };
        let ended = outcomes.ended;
        for outcome in std::mem::take(&mut outcomes.waiting) {
            self.tell(end, Lane::Outcomes(epoch), Packet::Outcome(outcome));
        }
        if ended {
            self.tell(end, Lane::Outcomes(epoch), Packet::OutcomesEnded(epoch));
            self.shard_mut(pid).outcomes.remove(&epoch);
        }
    }

    /// News of the engine: its epoch has ended, in an error or because it was told to.
    pub(super) fn epoch_ended(&mut self, pid: Pid, epoch: Epoch, failure: Option<String>) {
        let shard = self.shard_mut(pid);
        if let Some(outcomes) = shard.outcomes.get_mut(&epoch) {
            outcomes.ended = true;
        }
        let ended = shard.attendance.ended(epoch);
        self.forward(pid, epoch);
        let (Some(rank), Some(why)) = (ended, failure) else {
            return;
        };
        self.abort(pid, epoch);
        let failed = Question::StepFailed { epoch, rank, why };
        if let Some(end) = self.dial(pid, Name::Node(0)) {
            self.ask(end, failed, REGISTER_DEADLINE);
        }
    }

    pub(super) fn reply(&mut self, to: ReplyTo, answer: Answer) {
        self.tell(to.end, Lane::Reply(to.ask), Packet::Reply(to.ask, answer));
    }

    pub(super) fn meeting(&self, epoch: Epoch, rank: Rank, reply: ReplyTo) -> Meeting {
        let until = self.timeline.now() + MEET_DEADLINE;
        Meeting {
            epoch,
            rank,
            until,
            reply,
        }
    }
}
