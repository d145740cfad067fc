//! How a group of shards forms, breaks, and forms again: pure, without IO or clock.
//!
//! One epoch is one formation: every node and its shard present → all load → all join → serving,
//! until one is lost or fails. What arrives from an earlier epoch changes nothing.
//!
//! A node that is away for too long is left behind: the next epoch is of the others, among whom the
//! model is divided anew, if it fits them. Once back, it is taken in again when nothing runs.

use std::net::SocketAddr;

use offbook_protocol::{Epoch, LoadProgress, Phase, Rank, RequestFailure};

/// The state of the group. Ranks are those nodes of it that are not left behind, in the order of the
/// cluster file.
#[derive(Debug)]
pub(crate) struct Formation {
    epoch: Epoch,
    /// The highest epoch that any shard has heard of: the head may have lost what it had stored.
    heard: Epoch,
    stage: Stage,
    members: Vec<Member>,
    /// Of which members the epoch is or was, in rank order.
    group: Vec<usize>,
    /// Groups that could not hold the model.
    too_small: Vec<Vec<usize>>,
    /// Formations in a row that did not reach `Serving`.
    fruitless: u32,
    /// Why the group is not serving, for an operator.
    detail: String,
}

/// One node and its shard.
#[derive(Debug, Default)]
pub(crate) struct Member {
    pub(crate) node: String,
    pub(crate) node_pid: u32,
    pub(crate) node_alive: bool,
    /// The shard that registered last and is not known to be lost.
    pub(crate) shard: Option<Shard>,
    /// How often a shard of this node has registered: each time over a link of its own.
    registrations: u64,
    pub(crate) load: Option<LoadProgress>,
    /// The way that its collectives take, in the group that it joined last.
    pub(crate) collectives: String,
    pub(crate) restarts: u32,
    pub(crate) last_failure: String,
    pub(crate) last_lines: Vec<String>,
    pub(crate) given_up: bool,
    /// It was away for too long: epochs begin without it.
    left_behind: bool,
    /// Nodes that reach it while the head does not.
    reached_by: Vec<String>,
}

impl Member {
    fn is_here(&self) -> bool {
        self.node_pid != 0 && self.shard.is_some()
    }
}

/// A shard process that has registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) process: String,
    pub(crate) pid: u32,
}

#[derive(Debug)]
enum Stage {
    Gathering,
    Loading(Vec<Option<SocketAddr>>),
    Joining(Vec<bool>),
    Serving,
    Failed,
}

/// What the actor around this is to do. Actions are to be carried out in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Call [`Formation::begin`] after a pause that grows with the number of fruitless attempts.
    BeginSoon {
        fruitless: u32,
    },
    Load {
        epoch: Epoch,
        rank: Rank,
    },
    Join {
        epoch: Epoch,
        rank: Rank,
        addresses: Vec<SocketAddr>,
    },
    /// Tell a shard to leave its group, whatever it is doing there.
    Leave {
        epoch: Epoch,
        rank: Rank,
        why: String,
    },
    /// The group serves: tell the scheduler.
    Serve {
        epoch: Epoch,
    },
    /// It serves no longer: tell the scheduler.
    Suspend {
        epoch: Epoch,
        why: String,
    },
    /// A shard's own failure has ended it: tell the scheduler.
    Blame {
        epoch: Epoch,
    },
    /// It will not serve before an operator has acted: tell the scheduler.
    GiveUp(RequestFailure),
}

impl Formation {
    /// A group of the shards of these nodes, whose first epoch follows `last_epoch`.
    pub(crate) fn new(nodes: impl IntoIterator<Item = String>, last_epoch: Epoch) -> Self {
        let member = |node| Member {
            node,
            ..Member::default()
        };
        let members: Vec<_> = nodes.into_iter().map(member).collect();
        let mut formation = Self {
            group: (0..members.len()).collect(),
            too_small: Vec::new(),
            epoch: last_epoch,
            heard: Epoch(0),
            stage: Stage::Gathering,
            members,
            fruitless: 0,
            detail: String::new(),
        };
        formation.detail = formation.who_is_missing();
        formation
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members of the epoch, in rank order.
    pub(crate) fn group(&self) -> impl Iterator<Item = &Member> {
        self.group.iter().map(|member| &self.members[*member])
    }

    /// The member of a rank of the epoch.
    pub(crate) fn ranked(&self, rank: Rank) -> Option<&Member> {
        self.members.get(*self.group.get(rank.index())?)
    }

    /// The place of a member in the epoch, if it has one.
    pub(crate) fn rank_of(&self, node: &str) -> Option<Rank> {
        let rank = self.group().position(|member| member.node == node)?;
        Some(Rank(rank as u32))
    }

    pub(crate) fn member_mut(&mut self, node: &str) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.node == node)
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.stage {
            Stage::Gathering => Phase::Gathering,
            Stage::Loading(_) | Stage::Joining(_) => Phase::Loading,
            Stage::Serving => Phase::Ready,
            Stage::Failed => Phase::Failed,
        }
    }

    /// The agent of `node` has said that it is there, as process `pid`. Its shard may have been
    /// quicker: no epoch begins with a node of which nothing is known.
    pub(crate) fn announced(&mut self, node: &str, pid: u32) -> Vec<Action> {
        let Some(member) = self.member_mut(node) else {
            return Vec::new();
        };
        member.node_alive = true;
        member.reached_by.clear();
        let first = std::mem::replace(&mut member.node_pid, pid) == 0;
        if member.is_here() {
            member.left_behind = false;
        }
        if first && matches!(self.stage, Stage::Gathering) {
            self.detail = self.who_is_missing();
            return vec![Action::BeginSoon {
                fruitless: self.fruitless,
            }];
        }
        Vec::new()
    }

    /// The head has lost its link to `node`, and another node has not: the way between is cut, and the
    /// node is well. A shard that the head cannot reach is of no use to it all the same, so this names
    /// the cause and changes nothing else.
    pub(crate) fn reached(&mut self, node: &str, by: &str) {
        let Some(member) = self.member_mut(node).filter(|member| !member.node_alive) else {
            return;
        };
        if !member.reached_by.iter().any(|known| known == by) {
            member.reached_by.push(by.to_owned());
        }
        if matches!(self.stage, Stage::Gathering) {
            self.detail = self.who_is_missing();
        }
    }

    /// A shard process of `node` has registered, for the first time or in place of a lost one.
    pub(crate) fn registered(&mut self, node: &str, shard: Shard) -> Vec<Action> {
        let Some(at) = self.members.iter().position(|member| member.node == node) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        if let Some(known) = &self.members[at].shard {
            // A process that registers again has lost its link, and left its group for that.
            let how = if *known == shard {
                "has lost its link"
            } else {
                "was replaced"
            };
            actions = self.lose(at, format!("the shard of {node} {how}"));
        }
        let member = &mut self.members[at];
        member.registrations += 1;
        member.shard = Some(shard);
        member.load = None;
        if member.is_here() {
            member.left_behind = false;
        }
        if matches!(self.stage, Stage::Failed) {
            // A new process may find what the old one missed: a disk, a file, memory.
            self.stage = Stage::Gathering;
        }
        if matches!(self.stage, Stage::Gathering) {
            self.detail = self.who_is_missing();
        }
        let is_due = |action: &Action| matches!(action, Action::BeginSoon { .. });
        if !actions.iter().any(is_due) {
            actions.push(Action::BeginSoon {
                fruitless: self.fruitless,
            });
        }
        actions
    }

    /// A shard has heard of this epoch, and takes part in none up to it again.
    pub(crate) fn heard_of(&mut self, epoch: Epoch) {
        self.heard = self.heard.max(epoch);
    }

    /// The number of the last registration of this node's shard: what [`Formation::unlinked`] asks for.
    pub(crate) fn registration(&self, node: &str) -> u64 {
        let member = self.members.iter().find(|member| member.node == node);
        member.map_or(0, |member| member.registrations)
    }

    /// The link over which a shard registered is lost. Its process may have registered over another one
    /// before this news came: then it changes nothing.
    pub(crate) fn unlinked(&mut self, node: &str, registration: u64, why: String) -> Vec<Action> {
        let lost = self.members.iter().position(|member| {
            let is_last = member.registrations == registration;
            member.node == node && is_last && member.shard.is_some()
        });
        lost.map_or_else(Vec::new, |at| self.lose(at, why))
    }

    /// A shard process has ended. Anything but the one that is registered changes nothing.
    pub(crate) fn lost(&mut self, node: &str, pid: u32, why: String) -> Vec<Action> {
        let lost = self.members.iter().position(|member| {
            member.node == node && member.shard.as_ref().is_some_and(|shard| shard.pid == pid)
        });
        lost.map_or_else(Vec::new, |at| self.lose(at, why))
    }

    /// The shard of `node` has failed by itself: nobody killed it. That may be known later than the end
    /// of the epoch, of which its peers told first.
    pub(crate) fn failed_by_itself(&self, node: &str) -> Vec<Action> {
        let epoch = self.epoch;
        let blame = self.rank_of(node).map(|_| Action::Blame { epoch });
        blame.into_iter().collect()
    }

    fn lose(&mut self, at: usize, why: String) -> Vec<Action> {
        self.members[at].shard = None;
        self.members[at].load = None;
        self.members[at].collectives.clear();
        if !self.group.contains(&at) {
            return Vec::new();
        }
        let actions = self.end_epoch(why);
        if !matches!(self.stage, Stage::Failed) {
            self.stage = Stage::Gathering;
        }
        actions
    }

    /// A node, and its shard with it, has been away for too long: the others go on without it. The
    /// head cannot be away, and a node that never came may be waited for.
    pub(crate) fn leave_behind(&mut self, node: &str) -> Vec<Action> {
        let Some(member) = self.member_mut(node) else {
            return Vec::new();
        };
        if member.node_pid == 0 || member.shard.is_some() || member.left_behind {
            return Vec::new();
        }
        member.left_behind = true;
        if !matches!(self.stage, Stage::Gathering) {
            return Vec::new();
        }
        self.detail = self.who_is_missing();
        vec![Action::BeginSoon {
            fruitless: self.fruitless,
        }]
    }

    /// Is a node back that the epoch which serves is without?
    pub(crate) fn could_be_more(&self) -> bool {
        let group = self.next_group();
        matches!(self.stage, Stage::Serving)
            && group.len() > self.group.len()
            && group.iter().all(|at| self.members[*at].is_here())
    }

    /// Ends an epoch in which nothing runs for one that has those nodes too which are back.
    pub(crate) fn take_back(&mut self) -> Vec<Action> {
        if !self.could_be_more() {
            return Vec::new();
        }
        // It may be another machine, or have other memory, than the one that was too small.
        self.too_small.clear();
        let actions = self.end_epoch("a node is back".into());
        self.stage = Stage::Gathering;
        actions
    }

    /// Of whom the next epoch will be: all but those left behind, unless the others could not hold
    /// the model.
    fn next_group(&self) -> Vec<usize> {
        let all = 0..self.members.len();
        let group: Vec<_> = all
            .clone()
            .filter(|at| !self.members[*at].left_behind)
            .collect();
        if self.too_small.contains(&group) {
            all.collect()
        } else {
            group
        }
    }

    /// Begins an epoch if every node and shard of it is there and none is under way.
    pub(crate) fn begin(&mut self) -> Vec<Action> {
        let group = self.next_group();
        let all_here = group.iter().all(|at| self.members[*at].is_here());
        if !all_here || !matches!(self.stage, Stage::Gathering) {
            return Vec::new();
        }
        self.group = group;
        self.epoch = self.epoch.max(self.heard).next();
        self.stage = Stage::Loading(vec![None; self.group.len()]);
        self.detail = "shards are loading".into();
        let epoch = self.epoch;
        self.ranks()
            .map(|rank| Action::Load { epoch, rank })
            .collect()
    }

    /// A shard holds its weights and can be met at `address`.
    pub(crate) fn loaded(&mut self, epoch: Epoch, rank: Rank, address: SocketAddr) -> Vec<Action> {
        let Stage::Loading(addresses) = &mut self.stage else {
            return Vec::new();
        };
        if epoch != self.epoch {
            return Vec::new();
        }
        addresses[rank.index()] = Some(address);
        let Some(addresses) = addresses.iter().copied().collect::<Option<Vec<_>>>() else {
            return Vec::new();
        };
        self.stage = Stage::Joining(vec![false; addresses.len()]);
        self.detail = "shards are meeting".into();
        let join = |rank| Action::Join {
            epoch,
            rank,
            addresses: addresses.clone(),
        };
        self.ranks().map(join).collect()
    }

    /// A shard cannot hold its share: trying again would not help.
    pub(crate) fn refused(&mut self, epoch: Epoch, rank: Rank, why: &str) -> Vec<Action> {
        if epoch != self.epoch || !matches!(self.stage, Stage::Loading(_)) {
            return Vec::new();
        }
        let node = self.ranked(rank).map_or("", |member| &member.node);
        let why = format!("rank {rank} ({node}): {why}");
        if self.group.len() < self.members.len() {
            // The others cannot do without the one that is away: it is waited for again.
            self.too_small.push(self.group.clone());
            let mut actions = self.end_epoch(why);
            self.stage = Stage::Gathering;
            actions.retain(|action| !matches!(action, Action::BeginSoon { .. }));
            self.detail = format!("{}, without whom: {}", self.who_is_missing(), self.detail);
            return actions;
        }
        self.fail(why, |detail| RequestFailure::ClusterFailed { detail })
    }

    /// A shard has met all its peers; `collectives` is the way that its operations take.
    pub(crate) fn joined(&mut self, epoch: Epoch, rank: Rank, collectives: String) -> Vec<Action> {
        let Stage::Joining(joined) = &mut self.stage else {
            return Vec::new();
        };
        if epoch != self.epoch {
            return Vec::new();
        }
        joined[rank.index()] = true;
        self.members[self.group[rank.index()]].collectives = collectives;
        if !joined.iter().all(|joined| *joined) {
            return Vec::new();
        }
        self.stage = Stage::Serving;
        self.fruitless = 0;
        self.detail.clear();
        vec![Action::Serve { epoch }]
    }

    /// A shard that is still alive could not load, join or step; all may try again.
    pub(crate) fn failed(&mut self, epoch: Epoch, rank: Rank, why: &str) -> Vec<Action> {
        if epoch != self.epoch || matches!(self.stage, Stage::Gathering | Stage::Failed) {
            return Vec::new();
        }
        let actions = self.end_epoch(format!("rank {rank}: {why}"));
        self.stage = Stage::Gathering;
        actions
    }

    /// A shard was given up by its node: an operator has to act.
    pub(crate) fn given_up(&mut self, node: &str, why: &str) -> Vec<Action> {
        let why = format!("the shard of {node} was given up: {why}");
        self.fail(why, |detail| RequestFailure::ShardLost { detail })
    }

    /// Ends the epoch and begins no other.
    fn fail(&mut self, why: String, failure: impl FnOnce(String) -> RequestFailure) -> Vec<Action> {
        let failed_already = matches!(self.stage, Stage::Failed);
        let mut actions = self.end_epoch(why.clone());
        self.stage = Stage::Failed;
        actions.retain(|action| !matches!(action, Action::BeginSoon { .. }));
        if !failed_already {
            actions.push(Action::GiveUp(failure(why)));
        }
        actions
    }

    /// Ends the epoch under way, if any: survivors leave, the scheduler is told, and another
    /// attempt is due.
    fn end_epoch(&mut self, why: String) -> Vec<Action> {
        let epoch = self.epoch;
        let mut actions = Vec::new();
        match self.stage {
            Stage::Gathering | Stage::Failed => {}
            Stage::Serving => actions.push(Action::Suspend {
                epoch,
                why: why.clone(),
            }),
            Stage::Loading(_) | Stage::Joining(_) => self.fruitless += 1,
        }
        if !matches!(self.stage, Stage::Gathering | Stage::Failed) {
            for rank in self.ranks().filter(|rank| {
                self.ranked(*rank)
                    .is_some_and(|member| member.shard.is_some())
            }) {
                actions.push(Action::Leave {
                    epoch,
                    rank,
                    why: why.clone(),
                });
            }
            actions.push(Action::BeginSoon {
                fruitless: self.fruitless,
            });
        }
        // The answers of other nodes may have come first.
        let cut = |member: &Member| !member.is_here() && !member.reached_by.is_empty();
        self.detail = match self.members.iter().any(cut) {
            true => format!("{}: {why}", self.who_is_missing()),
            false => why,
        };
        actions
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.group.len() as u32).map(Rank)
    }

    fn who_is_missing(&self) -> String {
        let group = self.next_group();
        let missing: Vec<_> = group
            .iter()
            .map(|at| &self.members[*at])
            .filter(|member| !member.is_here())
            .map(|member| match member.reached_by.join(", ") {
                by if by.is_empty() => member.node.clone(),
                by => format!(
                    "{} (which {by} can reach, and the head cannot)",
                    member.node
                ),
            })
            .collect();
        if missing.is_empty() {
            "shards are about to load".into()
        } else {
            format!("waiting for {}", missing.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_of_a_link_that_was_replaced_changes_nothing() {
        let mut formation = serving();
        let old = formation.registration("b");
        let actions = formation.registered("b", shard(2));
        let suspends = |action: &Action| matches!(action, Action::Suspend { .. });
        assert!(actions.iter().any(suspends), "its group was left");
        assert!(formation.unlinked("b", old, "late".into()).is_empty());
        assert_eq!(formation.begin().len(), 2, "the shard is still there");
        let new = formation.registration("b");
        assert!(!formation.unlinked("b", new, "lost".into()).is_empty());
        assert!(formation.begin().is_empty());
    }

    #[test]
    fn a_node_that_others_reach_is_waited_for_by_that_name() {
        let mut formation = serving();
        formation.reached("b", "c");
        assert_eq!(formation.detail(), "", "it is alive");
        let registration = formation.registration("b");
        formation.unlinked("b", registration, "silent".into());
        formation.member_mut("b").unwrap().node_alive = false;
        formation.reached("b", "c");
        formation.reached("b", "c");
        let detail = "waiting for b (which c can reach, and the head cannot)";
        assert_eq!(formation.detail(), detail);

        // In the other order too: the node's link is lost before that of its shard.
        let mut early = serving();
        early.member_mut("b").unwrap().node_alive = false;
        early.reached("b", "c");
        let registration = early.registration("b");
        early.unlinked("b", registration, "silent".into());
        assert!(early.detail().starts_with(detail), "{}", early.detail());

        formation.announced("b", 12);
        formation.lost("a", 1, "killed".into());
        formation.leave_behind("b");
        assert!(!formation.detail().contains("which"), "it is back");
    }

    #[test]
    fn a_failure_of_a_shard_is_laid_to_its_epoch_also_when_its_end_is_old_news() {
        let mut formation = serving();
        let epoch = formation.epoch();
        assert!(
            !formation
                .failed(epoch, Rank(0), "its peer is gone")
                .is_empty()
        );
        formation.lost("b", 2, "it ended".into());
        assert_eq!(formation.failed_by_itself("b"), [Action::Blame { epoch }]);
        assert!(formation.failed_by_itself("nobody").is_empty());
    }

    #[test]
    fn an_epoch_that_a_shard_has_heard_of_is_never_begun_again() {
        let mut formation = Formation::new(["a".into()], Epoch(0));
        formation.announced("a", 11);
        formation.heard_of(Epoch(7));
        formation.registered("a", shard(1));
        formation.begin();
        assert_eq!(formation.epoch(), Epoch(8));
    }

    const ADDRESS: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    fn shard(pid: u32) -> Shard {
        Shard {
            process: format!("p{pid}"),
            pid,
        }
    }

    fn serving() -> Formation {
        let mut formation = Formation::new(["a".into(), "b".into()], Epoch(4));
        formation.announced("a", 11);
        formation.announced("b", 12);
        assert_eq!(
            formation.registered("a", shard(1)),
            [Action::BeginSoon { fruitless: 0 }]
        );
        assert!(formation.begin().is_empty(), "one shard is missing");
        formation.registered("b", shard(2));
        let epoch = Epoch(5);
        assert_eq!(
            formation.begin(),
            [
                Action::Load {
                    epoch,
                    rank: Rank(0)
                },
                Action::Load {
                    epoch,
                    rank: Rank(1)
                }
            ]
        );
        assert!(formation.loaded(epoch, Rank(1), ADDRESS).is_empty());
        assert_eq!(formation.loaded(epoch, Rank(0), ADDRESS).len(), 2);
        assert!(formation.joined(epoch, Rank(0), String::new()).is_empty());
        assert_eq!(
            formation.joined(epoch, Rank(1), String::new()),
            [Action::Serve { epoch }]
        );
        assert_eq!(formation.phase(), Phase::Ready);
        formation
    }

    #[test]
    fn a_shard_that_is_quicker_than_its_node_is_waited_with() {
        let mut formation = Formation::new(["a".into()], Epoch(0));
        formation.registered("a", shard(1));
        assert!(formation.begin().is_empty(), "the node is unknown");
        assert!(formation.detail().contains("waiting for a"));
        assert_eq!(
            formation.announced("a", 11),
            [Action::BeginSoon { fruitless: 0 }]
        );
        assert_eq!(formation.begin().len(), 1);
        assert!(formation.announced("a", 11).is_empty(), "only once");
    }

    #[test]
    fn a_lost_shard_suspends_and_its_successor_brings_the_next_epoch() {
        let mut formation = serving();
        let actions = formation.lost("b", 2, "killed".into());
        assert_eq!(
            actions[0],
            Action::Suspend {
                epoch: Epoch(5),
                why: "killed".into()
            }
        );
        assert!(matches!(actions[1], Action::Leave { rank: Rank(0), .. }));
        assert!(formation.begin().is_empty(), "the shard is not back yet");
        assert_eq!(
            formation.registered("b", shard(3)),
            [Action::BeginSoon { fruitless: 0 }]
        );
        assert_eq!(formation.begin().len(), 2);
        assert_eq!(formation.epoch(), Epoch(6));
    }

    #[test]
    fn a_shard_that_registers_anew_before_its_loss_was_seen_ends_the_epoch_too() {
        let mut formation = serving();
        let actions = formation.registered("b", shard(9));
        assert!(matches!(actions[0], Action::Suspend { .. }));
        let begins = |actions: &[Action]| {
            actions
                .iter()
                .filter(|action| matches!(action, Action::BeginSoon { .. }))
                .count()
        };
        assert_eq!(begins(&actions), 1);
        assert!(formation.lost("b", 2, "late news".into()).is_empty());
        assert_eq!(formation.begin().len(), 2);
    }

    #[test]
    fn news_of_an_earlier_epoch_changes_nothing() {
        let mut formation = serving();
        assert!(formation.failed(Epoch(4), Rank(0), "old").is_empty());
        assert!(
            formation
                .joined(Epoch(4), Rank(0), String::new())
                .is_empty()
        );
        assert_eq!(formation.phase(), Phase::Ready);
        assert!(!formation.failed(Epoch(5), Rank(0), "late peer").is_empty());
        assert!(
            formation.failed(Epoch(5), Rank(1), "late peer").is_empty(),
            "only once"
        );
    }

    #[test]
    fn a_shard_that_cannot_hold_its_share_fails_the_group_until_another_registers() {
        let mut formation = serving();
        formation.lost("a", 1, "killed".into());
        formation.registered("a", shard(7));
        formation.begin();
        let actions = formation.refused(Epoch(6), Rank(0), "no such file");
        let (last, leaves) = actions.split_last().unwrap();
        assert!(
            leaves
                .iter()
                .all(|action| matches!(action, Action::Leave { .. }))
        );
        assert!(matches!(
            last,
            Action::GiveUp(RequestFailure::ClusterFailed { detail }) if detail.contains("no such file")
        ));
        assert_eq!(formation.phase(), Phase::Failed);
        assert!(formation.detail().contains("no such file"));
        assert!(formation.begin().is_empty());
        formation.lost("a", 7, "exited".into());
        formation.registered("a", shard(8));
        assert_eq!(formation.begin().len(), 2);
    }

    #[test]
    fn a_shard_that_is_given_up_ends_the_wait_for_it_once() {
        let mut formation = serving();
        let actions = formation.given_up("b", "it ends too often");
        assert!(matches!(actions[0], Action::Suspend { .. }), "first of all");
        assert!(matches!(
            actions.last(),
            Some(Action::GiveUp(RequestFailure::ShardLost { .. }))
        ));
        assert!(formation.given_up("b", "as before").is_empty());
        formation.registered("b", shard(9));
        let again = formation.given_up("b", "as before");
        assert!(matches!(again[..], [Action::GiveUp(_)]));
    }

    /// `a`, `b` and `c` served, and `c` was left behind.
    fn without_c() -> Formation {
        let names = ["a", "b", "c"];
        let mut formation = Formation::new(names.map(String::from), Epoch(0));
        for (pid, node) in (1..).zip(names) {
            formation.announced(node, 10 + pid);
            formation.registered(node, shard(pid));
        }
        serve(&mut formation, 3);
        formation.lost("c", 3, "silent".into());
        assert!(formation.begin().is_empty(), "it may come back");
        assert_eq!(
            formation.leave_behind("c"),
            [Action::BeginSoon { fruitless: 0 }]
        );
        assert!(formation.leave_behind("c").is_empty(), "only once");
        formation
    }

    fn serve(formation: &mut Formation, size: u32) {
        assert_eq!(formation.begin().len(), size as usize);
        let epoch = formation.epoch();
        for rank in (0..size).map(Rank) {
            formation.loaded(epoch, rank, ADDRESS);
        }
        for rank in (0..size).map(Rank) {
            formation.joined(epoch, rank, String::new());
        }
        assert_eq!(formation.phase(), Phase::Ready);
    }

    #[test]
    fn the_others_go_on_without_a_node_and_take_it_back_when_told_to() {
        let mut formation = without_c();
        serve(&mut formation, 2);
        assert_eq!(formation.rank_of("c"), None);
        assert!(!formation.could_be_more());
        assert!(formation.take_back().is_empty(), "it is not there");

        formation.announced("c", 23);
        formation.registered("c", shard(4));
        assert_eq!(formation.phase(), Phase::Ready, "nothing is disturbed");
        assert!(formation.lost("c", 4, "again".into()).is_empty());
        assert_eq!(formation.phase(), Phase::Ready, "nor by its loss");
        formation.registered("c", shard(5));
        assert!(formation.could_be_more());
        assert!(matches!(
            formation.take_back()[..],
            [
                Action::Suspend { .. },
                Action::Leave { .. },
                Action::Leave { .. },
                Action::BeginSoon { .. }
            ]
        ));
        serve(&mut formation, 3);
        assert_eq!(formation.rank_of("c"), Some(Rank(2)));
    }

    #[test]
    fn ranks_are_those_of_the_group() {
        let mut formation = without_c();
        formation.announced("c", 23);
        formation.registered("c", shard(4));
        formation.lost("a", 1, "silent".into());
        formation.leave_behind("a");
        serve(&mut formation, 2);
        assert_eq!(formation.ranked(Rank(0)).unwrap().node, "b");
        assert_eq!(formation.rank_of("c"), Some(Rank(1)));
        let actions = formation.lost("c", 4, "silent".into());
        let left: Vec<_> = actions
            .iter()
            .filter(|action| matches!(action, Action::Leave { .. }))
            .collect();
        assert!(matches!(left[..], [Action::Leave { rank: Rank(0), .. }]));
    }

    #[test]
    fn those_that_cannot_hold_the_model_wait_for_the_other() {
        let mut formation = without_c();
        formation.begin();
        let actions = formation.refused(formation.epoch(), Rank(1), "12 GB are missing");
        assert!(
            actions
                .iter()
                .all(|action| matches!(action, Action::Leave { .. })),
            "nobody is given up: {actions:?}"
        );
        assert!(formation.begin().is_empty(), "not again without it");
        assert_eq!(formation.phase(), Phase::Gathering);
        let detail = formation.detail();
        assert!(
            detail.contains("waiting for c") && detail.contains("12 GB"),
            "{detail}"
        );
        formation.announced("c", 23);
        formation.registered("c", shard(4));
        serve(&mut formation, 3);
    }

    #[test]
    fn a_node_that_never_came_is_not_left_behind() {
        let mut formation = Formation::new(["a".into(), "b".into()], Epoch(0));
        formation.announced("a", 11);
        formation.registered("a", shard(1));
        assert!(formation.leave_behind("b").is_empty());
        assert!(formation.begin().is_empty());
    }

    #[test]
    fn fruitless_attempts_are_counted_until_one_serves() {
        let mut formation = serving();
        formation.failed(Epoch(5), Rank(0), "late");
        formation.begin();
        let actions = formation.failed(Epoch(6), Rank(0), "late");
        assert_eq!(actions.last(), Some(&Action::BeginSoon { fruitless: 1 }));
    }
}
