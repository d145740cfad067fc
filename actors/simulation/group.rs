//! The collectives as a script: shards meet, come to each step together, and notice who is gone. What must be
//! true of a group is asserted here.

use std::collections::{BTreeMap, BTreeSet};

use offbook_engine::batch::StepBatch;
use offbook_protocol::{Epoch, Rank, Step};

use super::backstage::Meeting;
use super::engine::Doing;
use super::{Event, Pid, World};

/// The shards of one epoch and how far each has come.
pub(super) struct Group {
    members: Vec<Pid>,
    /// Who waits for the others.
    present: BTreeSet<Pid>,
    /// Whose engine has run.
    joined: BTreeSet<Pid>,
    steps: BTreeMap<Step, Rendezvous>,
}

impl Group {
    pub(super) fn new(members: Vec<Pid>) -> Self {
        Self {
            members,
            present: BTreeSet::new(),
            joined: BTreeSet::new(),
            steps: BTreeMap::new(),
        }
    }

    /// The engine of this member runs.
    pub(super) fn join(&mut self, pid: Pid, rank: Rank) {
        let member = self.members.get(rank.index());
        assert_eq!(member, Some(&pid), "an epoch has two groups");
        self.joined.insert(pid);
    }

    /// A rank comes to a step, as it has built it: all must build the same, from the same caches.
    pub(super) fn come(&mut self, pid: Pid, step: Step, batch: StepBatch, tokens: Vec<u32>) {
        let met = self.steps.entry(step).or_insert_with(|| Rendezvous {
            arrived: BTreeSet::new(),
            batch: batch.clone(),
            tokens: tokens.clone(),
            control: 0,
        });
        assert_eq!(met.batch, batch, "ranks build different steps");
        assert_eq!(met.tokens, tokens, "ranks hold different caches");
        met.arrived.insert(pid);
    }

    /// What the rank that samples says with the step.
    pub(super) fn control(&mut self, step: Step, control: u32) {
        let met = self.steps.get_mut(&step).expect("it has come to it");
        met.control = control;
    }
}

/// One step, as the ranks come to it.
struct Rendezvous {
    arrived: BTreeSet<Pid>,
    /// As the first to come has built it.
    batch: StepBatch,
    tokens: Vec<u32>,
    control: u32,
}

impl World {
    /// Lets shards meet that wait for each other.
    pub(super) fn meet(&mut self) {
        for meeting in self.backstage.take_meetings() {
            let members = &meeting.members;
            let first = || Group::new(members.clone());
            let group = self.groups.entry(meeting.epoch).or_insert_with(first);
            assert_eq!(
                group.members, meeting.members,
                "epoch {} has two groups",
                meeting.epoch
            );
            assert_eq!(
                group.members.get(meeting.rank.index()),
                Some(&meeting.pid),
                "process {} takes another's place",
                meeting.pid
            );
            group.present.insert(meeting.pid);
            self.meetings.push(meeting);
        }
        self.meetings.retain(|meeting| !meeting.met.is_closed());
        for meeting in std::mem::take(&mut self.meetings) {
            if self.all_meet(&meeting) {
                let pause = self.chance.ms(0, 4);
                self.timeline.after(pause, Event::Met(meeting));
            } else {
                self.meetings.push(meeting);
            }
        }
    }

    /// Whether this member sees all others wait for it.
    fn all_meet(&self, meeting: &Meeting) -> bool {
        let group = &self.groups[&meeting.epoch];
        group.members.iter().all(|peer| {
            let both = self.reaches(meeting.pid, *peer) && self.reaches(*peer, meeting.pid);
            group.present.contains(peer) && (*peer == meeting.pid || both)
        })
    }

    pub(super) fn met(&self, meeting: Meeting) {
        // It may have lost patience.
        let _ = meeting.met.send(());
    }

    /// A process is dead: its groups are without it.
    pub(super) fn leaves_groups(&mut self, pid: Pid) {
        for epoch in self.groups.keys().copied().collect::<Vec<_>>() {
            if self.groups[&epoch].members.contains(&pid) {
                self.peers_notice(pid, epoch);
            }
        }
    }

    /// A member is gone from its group: the others hear of it, or wait in vain.
    pub(super) fn peers_notice(&mut self, pid: Pid, epoch: Epoch) {
        let members = self.groups[&epoch].members.clone();
        let rank = members.iter().position(|member| *member == pid);
        let rank = rank.expect("it is a member");
        for peer in members.into_iter().filter(|peer| *peer != pid) {
            let pause = match self.reaches(pid, peer) {
                true => self.chance.ms(0, 20),
                false => self.chance.ms(200, 600),
            };
            let gone = Doing::PeerGone(epoch, format!("rank {rank} is gone"));
            self.engine_after(pause, peer, gone);
        }
    }

    /// The collective of a step, if every rank is there and reaches every other.
    pub(super) fn exchange(&mut self, epoch: Epoch, step: Step) {
        let group = &self.groups[&epoch];
        let met = &group.steps[&step];
        let all = group.members.iter().all(|pid| {
            let reached = group.members.iter().all(|peer| self.reaches(*pid, *peer));
            met.arrived.contains(pid) && self.works(*pid, epoch) && reached
        });
        if !all {
            return;
        }
        let last = self.stepped;
        assert!(
            epoch >= last,
            "a step of epoch {epoch} comes after one of epoch {last}"
        );
        self.stepped = epoch;
        let members = group.members.clone();
        let joined = members.iter().all(|pid| group.joined.contains(pid));
        assert!(joined, "epoch {epoch} computes before all have joined");
        // A group of one sends no message.
        let control = (members.len() > 1).then_some(met.control);
        let group = self.groups.get_mut(&epoch).expect("it was there");
        group.steps.remove(&step);
        let took = self.chance.ms(10, 40);
        for pid in members {
            let pause = took + self.chance.ms(0, 3);
            let done = Doing::StepDone {
                epoch,
                step,
                control,
            };
            self.engine_after(pause, pid, done);
        }
    }

    /// What stood still may go on: a path is whole again, or a process.
    pub(super) fn exchange_all(&mut self) {
        let waiting = self
            .groups
            .iter()
            .flat_map(|(epoch, group)| group.steps.keys().map(|step| (*epoch, *step)));
        for (epoch, step) in waiting.collect::<Vec<_>>() {
            self.exchange(epoch, step);
        }
    }

    /// Who has not come to a step.
    pub(super) fn missing(&self, epoch: Epoch, step: Step) -> Option<usize> {
        let group = self.groups.get(&epoch)?;
        let met = group.steps.get(&step)?;
        group
            .members
            .iter()
            .position(|pid| !met.arrived.contains(pid))
    }
}
