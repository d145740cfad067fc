//! Kills nodes that are frozen, so that they are started again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use offbook_protocol::ClusterReport;
use offbook_runtime::supervise::Supervisor;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// Those that the system has stopped (SIGSTOP): their parent is told, so nobody has to guess.
pub(super) async fn replace_stopped(supervisor: Arc<Supervisor>) {
    let mut looks: HashMap<u32, u32> = HashMap::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let nodes = supervisor.status().into_iter();
        let stopped =
            nodes.filter_map(|node| Some((node.name, node.pid.filter(|&pid| is_stopped(pid))?)));
        let stopped: Vec<(String, u32)> = stopped.collect();
        looks.retain(|pid, _| stopped.iter().any(|(_, now)| now == pid));
        for (name, pid) in stopped {
            let looks = looks.entry(pid).or_default();
            *looks += 1;
            if *looks >= STOPPED_MAX {
                kill(&supervisor, &name, pid, "frozen: it is stopped");
            }
        }
    }
}

/// Whether this child of ours is stopped now. Asking changes nothing.
fn is_stopped(pid: u32) -> bool {
    let look = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let status = pid.map(|pid| waitid(WaitId::Pid(pid), look));
    matches!(status, Some(Ok(Some(status))) if status.stopped())
}

/// Those that the head has not heard of for too long, and the head itself when it takes connections and does
/// not answer.
pub(super) async fn replace_silent(supervisor: Arc<Supervisor>, head: String, api: String) {
    let client = reqwest::Client::builder().timeout(ANSWER_MAX).build();
    let Ok(client) = client else { return };
    let mut unanswered = 0;
    let mut silent: HashMap<(String, u32), u32> = HashMap::new();
    loop {
        tokio::time::sleep(ASK_EVERY).await;
        let asked = client.get(format!("{api}/v1/cluster")).send().await;
        let report = match asked {
            Ok(answer) => answer.json::<ClusterReport>().await,
            Err(error) => Err(error),
        };
        let frozen: Vec<(String, u32)> = match report {
            Ok(report) => {
                unanswered = 0;
                let now = report.nodes.into_iter().filter(|node| !node.alive);
                let now: Vec<_> = now.map(|node| (node.name, node.pid)).collect();
                silent.retain(|node, _| now.contains(node));
                for node in now {
                    *silent.entry(node).or_default() += 1;
                }
                let often = silent.iter().filter(|(_, looks)| **looks >= SILENT_MAX);
                often.map(|(node, _)| node.clone()).collect()
            }
            Err(error) if error.is_timeout() => {
                unanswered += 1;
                let all = supervisor.status().into_iter();
                let head = all.filter(|node| unanswered >= UNANSWERED_MAX && node.name == head);
                head.filter_map(|node| Some((node.name, node.pid?)))
                    .collect()
            }
            // It is being started.
            Err(_) => Vec::new(),
        };
        for (name, pid) in frozen {
            kill(&supervisor, &name, pid, "frozen: it does not answer");
        }
    }
}

/// A node that was started again meanwhile has another process, which lives.
fn kill(supervisor: &Supervisor, name: &str, pid: u32, why: &str) {
    if let Err(error) = supervisor.kill_child(name, pid, why) {
        tracing::debug!(%error, "there is no such node to kill");
    }
}

/// How often children are looked at, and how many looks in a row find a stopped one that is not meant to go
/// on: as long as a shard may be frozen.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const STOPPED_MAX: u32 = 4;
/// How often the head is asked what it has heard of the others.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The head answers in milliseconds; so many times in a row it does not, and it is frozen.
const ANSWER_MAX: Duration = Duration::from_secs(2);
const UNANSWERED_MAX: u32 = 5;
/// A node whose link was lost and that is there announces itself within a second; whoever the head has
/// not heard of at so many looks in a row is frozen.
const SILENT_MAX: u32 = 3;
