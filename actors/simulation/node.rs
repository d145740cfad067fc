//! A machine: the process of its node, and the shard that this keeps running. When a node's process
//! dies, its shard goes with it.

use std::time::{Duration, Instant};

use offbook_runtime::supervise::{RestartHistory, RestartPolicy, Verdict};

use super::network::{Name, News, Question, Watch};
use super::{Local, Pid, Role, World};
use crate::node_agent::{ANNOUNCE_EVERY, ATTACH_DEADLINE};

pub(super) struct Node {
    /// Of the process that runs, or of the last one that did.
    pub(super) pid: Pid,
    history: RestartHistory,
    pub(super) shard: Option<Pid>,
    attachments: u64,
    given_up: bool,
    shard_began: Instant,
    /// How often its shard has failed by itself.
    shard_failures: u32,
}

impl World {
    pub(super) fn start_node(&mut self, machine: usize) {
        let pid = self.start_process(machine, Role::Node);
        let node = Node {
            pid,
            history: RestartHistory::default(),
            shard: None,
            attachments: 0,
            given_up: false,
            shard_began: self.instant(),
            shard_failures: 0,
        };
        match self.nodes.get_mut(machine) {
            Some(old) => *old = node,
            None => self.nodes.push(node),
        }
        self.note(|| format!("node {machine} starts as process {pid}"));
        self.start_shard(machine);
        self.local_after(ANNOUNCE_EVERY, pid, Local::Announce);
    }

    pub(super) fn start_shard(&mut self, machine: usize) {
        let shard = self.start_shard_process(machine);
        let began = self.instant();
        let node = &mut self.nodes[machine];
        node.shard = Some(shard);
        node.shard_began = began;
        let (pid, attachments) = (node.pid, node.attachments);
        self.local_after(
            ATTACH_DEADLINE,
            pid,
            Local::Unattached { attachments, shard },
        );
        self.announce(machine, None, false);
    }

    /// The kernel says that the shard's process has ended.
    pub(super) fn shard_exited(&mut self, machine: usize, shard: Pid) {
        let (now, chance) = (self.instant(), self.chance.share());
        let failed = self.crashed.remove(&shard);
        let node = &mut self.nodes[machine];
        if node.shard != Some(shard) {
            return;
        }
        node.shard = None;
        let pid = node.pid;
        let policy = RestartPolicy::default();
        let verdict = if failed {
            node.shard_failures += 1;
            node.history.failed(&policy, now, chance)
        } else {
            let lived = now - node.shard_began;
            node.history.killed(&policy, now, lived, chance)
        };
        match verdict {
            Verdict::RestartAfter(pause) => self.local_after(pause, pid, Local::StartShard),
            Verdict::Escalate => {
                node.given_up = true;
                let failures = node.shard_failures;
                assert!(
                    failures > policy.intensity,
                    "{failures} failures are enough"
                );
                self.note(|| format!("node {machine} gives its shard up"));
                self.call_operator(machine);
            }
        }
        self.announce(machine, Some(shard), failed);
    }

    pub(super) fn announce(&mut self, machine: usize, ended: Option<Pid>, failed: bool) {
        let Node { pid, given_up, .. } = self.nodes[machine];
        let question = Question::Announce {
            machine,
            news: News {
                ended,
                failed,
                given_up,
            },
        };
        if machine == 0 {
            self.local_after(Duration::ZERO, pid, Local::AnnounceHere(question));
        } else if let Some(end) = self.dial(pid, Name::Node(0)) {
            self.ask(end, question, ANNOUNCE_EVERY * 3);
        }
    }

    pub(super) fn attached(&mut self, machine: usize, end: super::network::End) -> bool {
        let shard = self.peer(end);
        let node = &mut self.nodes[machine];
        if node.shard != Some(shard) {
            return false;
        }
        node.attachments += 1;
        let attachments = node.attachments;
        self.watch(end, Watch::Attachment { attachments, shard });
        true
    }

    pub(super) fn attachment_lost(&mut self, machine: usize, attachments: u64, shard: Pid) {
        let node = &self.nodes[machine];
        if node.attachments == attachments && node.shard == Some(shard) {
            let pid = node.pid;
            self.local_after(FROZEN_GRACE, pid, Local::Unattached { attachments, shard });
        }
    }

    /// Kills a shard that has not attached since.
    pub(super) fn unattached(&mut self, machine: usize, attachments: u64, shard: Pid) {
        let node = &self.nodes[machine];
        if node.attachments == attachments && node.shard == Some(shard) {
            self.note(|| format!("shard {shard} is frozen and is killed"));
            self.kill(shard);
        }
    }
}

/// The default of a cluster's file.
const FROZEN_GRACE: Duration = Duration::from_secs(1);
