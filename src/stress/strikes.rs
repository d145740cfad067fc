//! Who is struck, and how: chosen by chance among the processes that the cluster reports, and never a
//! process that is not what it is taken for.

use std::fmt;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use offbook_protocol::ClusterReport;
use rand::RngExt;
use rand::rngs::StdRng;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// What kind of process is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Target {
    /// A shard that serves, of any rank
    Shard,
    /// A node other than the head; its shard goes with it
    Node,
    /// The head; its clients read on when it is back
    Head,
}

/// What it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Blow {
    /// SIGKILL
    Kill,
    /// SIGSTOP: it is frozen until somebody replaces it
    Stop,
    /// SIGTERM
    Term,
}

impl Target {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Shard => "shard",
            Self::Node => "node",
            Self::Head => "head",
        }
    }
}

impl Blow {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "SIGKILL",
            Self::Stop => "SIGSTOP",
            Self::Term => "SIGTERM",
        }
    }

    fn signal(self) -> Signal {
        match self {
            Self::Kill => Signal::KILL,
            Self::Stop => Signal::STOP,
            Self::Term => Signal::TERM,
        }
    }
}

/// One way to strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) target: Target,
    pub(super) blow: Blow,
}

impl Kind {
    pub(super) fn any(targets: &[Target], blows: &[Blow], chance: &mut StdRng) -> Self {
        Self {
            target: targets[chance.random_range(0..targets.len())],
            blow: blows[chance.random_range(0..blows.len())],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to a {}", self.blow.name(), self.target.name())
    }
}

/// A process of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Victim {
    pub(super) node: String,
    pid: u32,
    /// The word that its command has.
    role: &'static str,
}

impl Victim {
    /// One of those that are there; `None` while there is none.
    pub(super) fn any(report: &ClusterReport, target: Target, chance: &mut StdRng) -> Option<Self> {
        let mut all = Self::all(report, target);
        (!all.is_empty()).then(|| all.swap_remove(chance.random_range(0..all.len())))
    }

    fn all(report: &ClusterReport, target: Target) -> Vec<Self> {
        let of = |node: &str, pid: u32, role| Self {
            node: node.to_owned(),
            pid,
            role,
        };
        let nodes = report.nodes.iter().enumerate();
        match target {
            Target::Shard => {
                let serving = report.shards.iter().filter(|shard| shard.rank.is_some());
                let serving = serving.filter(|shard| shard.pid > 0);
                serving.map(|s| of(&s.node, s.pid, "shard")).collect()
            }
            Target::Node | Target::Head => nodes
                .filter(|(index, _)| (*index == 0) == (target == Target::Head))
                .filter(|(_, node)| node.alive && node.in_use && node.pid > 0)
                .map(|(_, node)| of(&node.name, node.pid, "node"))
                .collect(),
        }
    }

    /// Sends it the signal. False when it had ended before.
    ///
    /// # Errors
    /// When there is a process of that number here, and it is another one: the cluster is, or a part of
    /// it, on another machine.
    pub(super) async fn strike(&self, blow: Blow) -> Result<bool> {
        let Some(command) = command_of(self.pid).await? else {
            return Ok(false);
        };
        ensure!(
            self.is_run_by(&command),
            "process {} of this machine is not the {} of {}: only clusters of this machine can be struck",
            self.pid,
            self.role,
            self.node
        );
        let pid = Pid::from_raw(self.pid as i32).context("a process has a number")?;
        match kill_process(pid, blow.signal()) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(error).context("cannot send a signal to a process of the cluster"),
        }
    }

    fn is_run_by(&self, command: &str) -> bool {
        let words: Vec<&str> = command.split_whitespace().collect();
        let named = words
            .windows(2)
            .any(|pair| pair == ["--name", self.node.as_str()]);
        named && words.contains(&self.role)
    }
}

/// The command line of a process of this machine; `None` when there is none.
async fn command_of(pid: u32) -> Result<Option<String>> {
    let asked = tokio::process::Command::new("ps")
        .args(["-o", "args=", "-p", &pid.to_string()])
        .output();
    let output = asked.await.context("cannot ask ps about a process")?;
    let command = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok((!command.is_empty()).then_some(command))
}

#[cfg(test)]
mod tests {
    use offbook_protocol::{
        Epoch, FastSynch, Layout, NodeReport, Phase, Rank, ShardReport, Transport,
    };
    use rand::SeedableRng;

    use super::*;

    fn report() -> ClusterReport {
        let node = |number: u32| NodeReport {
            name: format!("node-{number}"),
            pid: 10 + number,
            alive: true,
            in_use: number != 3,
        };
        let shard = |number: u32| ShardReport {
            rank: (number != 3).then_some(Rank(number - 1)),
            node: format!("node-{number}"),
            pid: 20 + number,
            alive: true,
            restarts: 0,
            last_failure: String::new(),
            last_lines: Vec::new(),
            given_up: false,
            load: None,
            collectives: String::new(),
            kv: None,
        };
        ClusterReport {
            api: String::new(),
            epoch: Epoch(1),
            phase: Phase::Ready,
            detail: String::new(),
            model: String::new(),
            layout: Layout::Tensor,
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            context_tokens: 1,
            requests_running: 0,
            requests_queued: 0,
            nodes: (1..=3).map(node).collect(),
            shards: (1..=3).map(shard).collect(),
            actors: Vec::new(),
        }
    }

    #[test]
    fn only_those_are_struck_that_serve() {
        let pids = |target| -> Vec<u32> {
            let all = Victim::all(&report(), target);
            all.iter().map(|victim| victim.pid).collect()
        };
        assert_eq!(pids(Target::Shard), [21, 22]);
        assert_eq!(pids(Target::Node), [12]);
        assert_eq!(pids(Target::Head), [11]);
    }

    #[test]
    fn a_seed_decides_who_gets_what() {
        let draw = |seed| {
            let mut chance = StdRng::seed_from_u64(seed);
            let kinds = (0..20).map(|_| {
                let targets = [Target::Shard, Target::Node, Target::Head];
                Kind::any(&targets, &[Blow::Kill, Blow::Stop], &mut chance)
            });
            kinds.collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn another_process_of_the_same_number_is_left_alone() {
        let mut chance = StdRng::seed_from_u64(1);
        let victim = Victim::any(&report(), Target::Node, &mut chance).unwrap();
        assert!(victim.is_run_by("/bin/offbook node --supervised --name node-2 --http x"));
        assert!(!victim.is_run_by("/bin/offbook shard --name node-2"));
        assert!(!victim.is_run_by("/bin/offbook node --name node-22"));
        assert!(!victim.is_run_by("/usr/bin/vi node --name"));
    }
}
