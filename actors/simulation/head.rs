//! The head: what the membership and the scheduler do around their decisions, without actors. The
//! decisions are the real ones.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use offbook_protocol::{Epoch, Phase, Plan, Rank, SampledToken, SequenceId, StepOutcome};

use super::client::ClientId;
use super::network::{Answer, End, Lane, Name, News, Packet, Question, Watch};
use super::node::Node;
use super::{CONTEXT_TOKENS, LIMITS, Local, NODE_GRACE, Pid, VOCABULARY, World};
use crate::membership::formation::{Action, Formation, Shard};
use crate::membership::presence::Presence;
use crate::membership::{JOIN_DEADLINE, STANDING_EVERY, begin_pause};
use crate::scheduler::admission::{Admission, Serving};
use crate::scheduler::{SILENCE_GRACE, SUBSCRIBE_DEADLINE, SchedulerLimits};

/// What one life of the head knows.
pub(super) struct Head {
    pub(super) pid: Pid,
    pub(super) formation: Formation,
    presence: Presence,
    pub(super) admission: Admission<ClientId>,
    /// The epoch that was begun last and not ended.
    current: Option<Epoch>,
    shards: Vec<Pid>,
    /// Over which link the outcomes come.
    listening: Option<(Epoch, End)>,
    /// When the last message of the membership to the scheduler comes.
    mail: Duration,
}

/// What the membership tells the scheduler, and the scheduler itself later.
#[derive(Clone, Debug)]
pub(super) enum Mail {
    Begin { epoch: Epoch, shards: Vec<Pid> },
    End { epoch: Epoch },
    Blame { epoch: Epoch },
    GiveUp { why: String },
}

impl Head {
    fn new(pid: Pid, nodes: usize, last_epoch: Epoch, limits: SchedulerLimits) -> Self {
        Self {
            pid,
            formation: Formation::new((0..nodes).map(node_name), last_epoch),
            presence: Presence::new(NODE_GRACE),
            admission: Admission::new(limits),
            current: None,
            shards: Vec::new(),
            listening: None,
            mail: Duration::ZERO,
        }
    }
}

pub(super) fn node_name(machine: usize) -> String {
    format!("node-{machine}")
}

impl World {
    pub(super) fn start_head(&mut self, pid: Pid) {
        self.head = Some(Head::new(
            pid,
            self.nodes.len(),
            self.stored_epoch,
            self.limits,
        ));
        self.local_after(STANDING_EVERY, pid, Local::Standing);
    }

    fn head_mut(&mut self) -> &mut Head {
        self.head
            .as_mut()
            .expect("only a head that lives gets its events")
    }

    pub(super) fn standing(&mut self, pid: Pid) {
        let now = self.instant();
        let head = self.head_mut();
        for (node, alive) in head.presence.standings(now) {
            if let Some(member) = head.formation.member_mut(node) {
                member.node_alive = alive;
            }
        }
        let away = head.presence.away_too_long(head.formation.members(), now);
        for node in away {
            let actions = self.head_mut().formation.leave_behind(&node);
            self.carry_out(actions);
        }
        let head = self.head_mut();
        if head.formation.could_be_more() && head.admission.running() + head.admission.queued() == 0
        {
            let actions = head.formation.take_back();
            self.carry_out(actions);
        }
        self.local_after(STANDING_EVERY, pid, Local::Standing);
    }

    pub(super) fn begin(&mut self) {
        let actions = self.head_mut().formation.begin();
        if !actions.is_empty() {
            let epoch = self.head_mut().formation.epoch();
            assert!(
                epoch > self.stored_epoch,
                "epoch {epoch} is begun a second time"
            );
            self.stored_epoch = epoch;
            self.note(|| format!("epoch {epoch} begins"));
            self.disturb_formation();
        }
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        let pid = self.head_mut().pid;
        for action in actions {
            self.note(|| format!("{action:?}"));
            match action {
                Action::BeginSoon { fruitless } => {
                    self.local_after(begin_pause(fruitless), pid, Local::Begin);
                }
                Action::Load { epoch, rank } => {
                    let ranks = self.head_mut().formation.group().count();
                    self.ask_shard(rank, Question::Load { epoch, rank, ranks }, LOAD_DEADLINE);
                }
                Action::Join { epoch, rank, .. } => {
                    let members = self.members();
                    let question = Question::Join {
                        epoch,
                        rank,
                        members,
                    };
                    self.ask_shard(rank, question, JOIN_DEADLINE);
                }
                Action::Leave { epoch, rank, .. } => {
                    if let Some(end) = self.shard_link(rank) {
                        self.tell(end, Lane::Messages, Packet::Leave(epoch));
                    }
                }
                Action::Serve { epoch } => {
                    let shards = self.members();
                    self.check_joined(epoch);
                    self.mail(Mail::Begin { epoch, shards });
                }
                Action::Suspend { epoch, .. } => self.mail(Mail::End { epoch }),
                Action::Blame { epoch } => self.mail(Mail::Blame { epoch }),
                Action::GiveUp(failure) => self.mail(Mail::GiveUp {
                    why: failure.to_string(),
                }),
            }
        }
    }

    fn members(&mut self) -> Vec<Pid> {
        let group = self.head_mut().formation.group();
        let pid = |shard: &Shard| shard.pid;
        group
            .filter_map(|member| member.shard.as_ref().map(pid))
            .collect()
    }

    fn shard_link(&mut self, rank: Rank) -> Option<End> {
        let head = self.head_mut();
        let shard = head.formation.ranked(rank)?.shard.as_ref()?.pid;
        let head = head.pid;
        let machine = self.processes[shard as usize].machine;
        let links = &self.processes[head as usize].links;
        links.get(&Name::Shard(machine)).copied()
    }

    fn ask_shard(&mut self, rank: Rank, question: Question, deadline: Duration) {
        match self.shard_link(rank) {
            Some(end) => self.ask(end, question, deadline),
            None => {
                let pid = self.head_mut().pid;
                self.local_after(Duration::ZERO, pid, Local::Unasked(question));
            }
        }
    }

    fn mail(&mut self, mail: Mail) {
        let at = self.timeline.now() + self.chance.ms(0, 1);
        let head = self.head_mut();
        head.mail = head.mail.max(at);
        let (at, pid) = (head.mail, head.pid);
        self.local_at(at, pid, Local::Mail(mail));
    }

    pub(super) fn announced(&mut self, end: End, machine: usize, news: News) {
        let pid = self.peer(end);
        if self.take_announcement(pid, machine, news) {
            self.watch(end, Watch::Node { machine, pid });
        }
    }

    /// True when its process is to be watched from now on.
    fn take_announcement(&mut self, pid: Pid, machine: usize, news: News) -> bool {
        let News {
            ended,
            failed,
            given_up,
        } = news;
        let now = self.instant();
        let name = node_name(machine);
        let head = self.head_mut();
        let member = head
            .formation
            .member_mut(&name)
            .expect("the cluster has this node");
        let is_news = member.node_pid != pid || !member.node_alive;
        member.given_up = given_up;
        head.presence.heard(&name, now);
        let mut actions = head.formation.announced(&name, pid);
        if let Some(shard) = ended {
            actions.extend(
                head.formation
                    .lost(&name, shard, "its process ended".into()),
            );
            if failed {
                actions.extend(head.formation.failed_by_itself(&name));
            }
        }
        if given_up {
            actions.extend(head.formation.given_up(&name, "it ends too often"));
        }
        self.carry_out(actions);
        is_news
    }

    pub(super) fn announced_here(&mut self, question: Question) {
        let Question::Announce { news, .. } = question else {
            unreachable!("the head's own node only announces itself");
        };
        let pid = self.head_mut().pid;
        self.take_announcement(pid, 0, news);
    }

    pub(super) fn registered(&mut self, end: End, machine: usize, heard: Epoch) {
        let pid = self.peer(end);
        let name = node_name(machine);
        let shard = Shard {
            process: format!("{name}/{pid}"),
            pid,
        };
        let head = self.head_mut();
        head.formation.heard_of(heard);
        let actions = head.formation.registered(&name, shard);
        let registration = head.formation.registration(&name);
        self.carry_out(actions);
        self.watch(
            end,
            Watch::ShardOf {
                machine,
                registration,
            },
        );
    }

    pub(super) fn head_lost_link(&mut self, watch: Watch) {
        let head = self.head_mut();
        match watch {
            Watch::ShardOf {
                machine,
                registration,
            } => {
                let name = node_name(machine);
                let why = "the link was lost".into();
                let actions = head.formation.unlinked(&name, registration, why);
                self.carry_out(actions);
            }
            Watch::Node { machine, pid } => {
                let name = node_name(machine);
                let member = head
                    .formation
                    .member_mut(&name)
                    .expect("the cluster has this node");
                if member.node_pid == pid {
                    member.node_alive = false;
                    head.presence.link_lost(&name);
                }
            }
            _ => unreachable!("the head watches nobody else"),
        }
    }

    pub(super) fn step_failed(&mut self, epoch: Epoch, rank: Rank, why: &str) {
        let formation = &mut self.head_mut().formation;
        let is_old = epoch != formation.epoch();
        let actions = formation.failed(epoch, rank, why);
        assert!(
            actions.is_empty() || !is_old,
            "epoch {epoch} ends another one"
        );
        self.carry_out(actions);
    }

    /// What has become of a question of the head's; `None` when there is no answer.
    pub(super) fn head_heard(&mut self, question: Question, answer: Option<Answer>) {
        let answer = answer.unwrap_or_else(|| Err("no answer".into()));
        let formation = &mut self.head_mut().formation;
        let actions = match (question, answer) {
            (Question::Load { epoch, rank, .. }, Ok(())) => formation.loaded(epoch, rank, ADDRESS),
            (Question::Join { epoch, rank, .. }, Ok(())) => {
                formation.joined(epoch, rank, String::new())
            }
            (Question::Load { epoch, rank, .. } | Question::Join { epoch, rank, .. }, Err(why)) => {
                formation.failed(epoch, rank, &why)
            }
            (Question::Watch { epoch }, answer) => return self.subscribed(epoch, answer),
            (question, _) => unreachable!("the head does not ask {question:?}"),
        };
        self.carry_out(actions);
    }

    pub(super) fn scheduler_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Begin { epoch, shards } => self.begin_epoch(epoch, shards),
            Mail::End { epoch } => self.end_epoch(epoch),
            Mail::Blame { epoch } => {
                for (client, failure) in self.head_mut().admission.blame(epoch) {
                    self.client_failed(client, &failure.to_string());
                }
                self.send_plans();
            }
            Mail::GiveUp { why } => {
                let head = self.head_mut();
                head.current = None;
                head.shards.clear();
                for client in head.admission.close(why.clone()) {
                    self.client_failed(client, &why);
                }
            }
        }
    }

    fn begin_epoch(&mut self, epoch: Epoch, shards: Vec<Pid>) {
        let head = self.head_mut();
        head.current = Some(epoch);
        let (pid, sampler) = (head.pid, shards[SAMPLING_RANK.index()]);
        head.shards = shards;
        let sampler = self.processes[sampler as usize].machine;
        let link = self.processes[pid as usize]
            .links
            .get(&Name::Shard(sampler))
            .copied();
        match link {
            Some(end) => {
                self.head_mut().listening = Some((epoch, end));
                self.ask(end, Question::Watch { epoch }, SUBSCRIBE_DEADLINE);
            }
            None => {
                self.local_after(
                    Duration::ZERO,
                    pid,
                    Local::Unasked(Question::Watch { epoch }),
                );
            }
        }
    }

    fn subscribed(&mut self, epoch: Epoch, answer: Answer) {
        let head = self.head_mut();
        if answer.is_err() {
            return self.report_failure(epoch);
        }
        if head.current != Some(epoch) {
            return;
        }
        let serving = Serving {
            epoch,
            context_tokens: CONTEXT_TOKENS,
            vocabulary: VOCABULARY,
        };
        for (client, failure) in head.admission.begin(serving) {
            self.client_failed(client, &failure.to_string());
        }
        self.send_plans();
    }

    fn end_epoch(&mut self, epoch: Epoch) {
        let head = self.head_mut();
        if head.current == Some(epoch) {
            head.current = None;
            head.shards.clear();
        }
        let Some(ended) = head.admission.end(epoch) else {
            return;
        };
        for (client, failure) in ended.given_up {
            self.client_failed(client, &failure.to_string());
        }
    }

    pub(super) fn report_failure(&mut self, epoch: Epoch) {
        if self.head_mut().current == Some(epoch) {
            self.step_failed(
                epoch,
                SAMPLING_RANK,
                "the scheduler does not get on with it",
            );
        }
    }

    /// The link over which outcomes came is lost: their stream ends.
    pub(super) fn head_lost_stream(&mut self, end: End) {
        let Some(head) = &self.head else { return };
        let pid = head.pid;
        if let Some((epoch, over)) = head.listening
            && over == end
        {
            self.local_after(SILENCE_GRACE, pid, Local::Silence(epoch));
        }
    }

    pub(super) fn outcomes_ended(&mut self, epoch: Epoch) {
        let pid = self.head_mut().pid;
        self.local_after(SILENCE_GRACE, pid, Local::Silence(epoch));
    }

    pub(super) fn outcome(&mut self, outcome: StepOutcome) {
        for token in outcome.tokens {
            self.deliver(outcome.epoch, token);
        }
        self.send_plans();
    }

    fn deliver(&mut self, epoch: Epoch, token: SampledToken) {
        let admission = &mut self.head_mut().admission;
        let Some(client) = admission.note(epoch, &token).copied() else {
            return;
        };
        self.only_newer_epochs_deliver(epoch);
        let taken = self.client_got(client, &token);
        let admission = &mut self.head_mut().admission;
        if token.finish.is_some() {
            admission.finish(token.sequence);
        } else if !taken {
            admission.withdraw(token.sequence);
        }
    }

    pub(super) fn withdraw(&mut self, sequence: SequenceId) -> Option<ClientId> {
        let client = self.head_mut().admission.withdraw(sequence)?;
        self.send_plans();
        Some(client)
    }

    pub(super) fn send_plans(&mut self) {
        while let Some(plan) = self.head_mut().admission.next_plan() {
            self.fan_out(&plan);
        }
    }

    fn fan_out(&mut self, plan: &Plan) {
        let head = self.head_mut();
        let (pid, mut shards) = (head.pid, head.shards.clone());
        if std::mem::take(&mut self.loses_plan) {
            // As an outbox that is full does.
            shards.swap_remove(self.chance.below(shards.len()));
            self.local_after(Duration::ZERO, pid, Local::Unserved(plan.epoch));
        }
        for shard in shards {
            let machine = self.processes[shard as usize].machine;
            let links = &self.processes[pid as usize].links;
            if let Some(end) = links.get(&Name::Shard(machine)).copied() {
                self.tell(end, Lane::Messages, Packet::Plan(plan.clone()));
            }
        }
    }

    /// Whether the cluster serves with all the nodes that it can have.
    pub(super) fn serves_whole(&self) -> bool {
        self.head.as_ref().is_some_and(|head| {
            let is_here = |node: &&Node| self.processes[node.pid as usize].alive;
            let here = self.nodes.iter().filter(is_here).count();
            let is_whole = head.formation.group().count() == here;
            is_whole && head.formation.phase() == Phase::Ready
        })
    }

    /// Bounds that hold at every moment.
    pub(super) fn check_queues(&self) {
        let Some(head) = &self.head else { return };
        let running = head.admission.running();
        assert!(running <= LIMITS.sequences_max, "{running} sequences run");
        // Besides those that wait anew come answers that an earlier head had begun: they had their places.
        let queued = head.admission.queued_unbegun();
        assert!(queued <= LIMITS.queue_max, "{queued} wait");
        if let Some(epoch) = head.admission.epoch() {
            assert!(epoch <= self.stored_epoch, "epoch {epoch} was never begun");
        }
    }
}

/// Who samples in every group.
pub(super) const SAMPLING_RANK: Rank = Rank(0);
const LOAD_DEADLINE: Duration = Duration::from_secs(10);
const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
