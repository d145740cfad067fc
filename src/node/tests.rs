//! What becomes of a node's actors can be read at its API: the real ones, under the real keepers, with a
//! message that only these tests have.

use std::path::Path;
use std::process::Command;

use actix::{Context, Handler, Message};
use offbook_actors::names;
use offbook_protocol::{FastSynch, Layout, Transport};
use offbook_runtime::free_port;
use offbook_runtime::supervise::{CallError, RestartPolicy};
use serde_json::Value;

use super::*;
use crate::cli::ApiOptions;
use crate::cluster_file::{Limits, MaxActiveTasks, found};
use crate::demo_model;

/// Nobody survives it.
#[derive(Message)]
#[rtype(result = "()")]
struct Poison(#[expect(dead_code, reason = "it is said")] &'static str);

impl Handler<Poison> for NodeAgent {
    type Result = ();

    fn handle(&mut self, _: Poison, _: &mut Context<Self>) {
        panic!("poisoned");
    }
}

/// A cluster of one node, the head, in this folder.
fn options(folder: &Path) -> Node {
    options_with(folder, Limits::default())
}

fn options_with(folder: &Path, limits: Limits) -> Node {
    let localhost = [127, 0, 0, 1].into();
    let model = demo_model::write_to(folder).unwrap();
    let nodes = [("node-1".to_owned(), free_port::udp(localhost).unwrap())];
    let cluster = found(folder, &nodes, |nodes| ClusterFile {
        cluster: "poisoned".into(),
        model,
        parallel: Layout::Tensor,
        transport: Transport::Quic,
        fast_synch: FastSynch::Auto,
        adaptive_throttle: false,
        max_active_tasks: MaxActiveTasks::default(),
        limits,
        nodes,
    });
    Node {
        cluster: cluster.unwrap(),
        name: "node-1".into(),
        data_dir: folder.join("node-1"),
        model: None,
        api: ApiOptions {
            http: free_port::tcp(localhost).unwrap(),
            ..ApiOptions::own()
        },
        memory_limit: None,
        supervised: true,
    }
}

/// Its shard does nothing, and ends with the node.
async fn start_idle(options: &Node) -> Running {
    let launch = ShardLaunch::Program {
        program: "cat".into(),
        arguments: Vec::new(),
    };
    start(options, launch).await.unwrap()
}

async fn get(options: &Node, path: &str) -> String {
    let answer = reqwest::get(format!("http://{}{path}", options.api.http)).await;
    answer.unwrap().text().await.unwrap()
}

/// What the cluster's report says of the node agent, once that is `wanted`.
async fn node_agent(options: &Node, wanted: impl Fn(&Value) -> bool) -> (Value, String) {
    let told = async {
        loop {
            let report = get(options, "/v1/cluster").await;
            let agents: Value = serde_json::from_str(&report).unwrap();
            let actors = agents["actors"].as_array().into_iter().flatten();
            let mut agents = actors.filter(|actor| actor["name"] == names::NODE_AGENT);
            if let Some(agent) = agents.next().filter(|agent| wanted(agent)) {
                return (agent.clone(), report);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::time::timeout(DEADLINE, told).await.unwrap()
}

#[actix::test]
async fn an_actor_that_died_of_a_message_is_in_the_report_and_what_it_said_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path());
    let running = start_idle(&options).await;
    let (agent, _) = node_agent(&options, |_| true).await;
    assert_eq!(agent["restarts"], 0, "{agent}");
    assert_eq!(agent["last_dead_letter"], Value::Null);

    let failed = running.agent.ask(Poison(SECRET), DEADLINE).await;
    assert!(matches!(failed, Err(CallError::Panicked(cause)) if cause == "poisoned"));
    let (agent, report) = node_agent(&options, |agent| agent["restarts"] == 1).await;
    assert_eq!(agent["process"], "node-1");
    assert_eq!(agent["last_error"], "panic: poisoned");
    assert_eq!(agent["dead_letters"], 1);
    let letter = &agent["last_dead_letter"];
    assert_eq!(letter["message"], std::any::type_name::<Poison>());
    assert_eq!(letter["cause"], "poisoned");
    assert_eq!(agent["given_up"], false);
    assert!(!report.contains(SECRET), "{report}");
    for other in [names::SCHEDULER, names::MEMBERSHIP] {
        assert!(report.contains(other), "{other} is not in {report}");
    }

    let figures = get(&options, "/metrics").await;
    let labels = "{process=\"node-1\",actor=\"node-agent\"}";
    for figure in ["actor_restarts_total", "actor_dead_letters_total"] {
        let line = format!("offbook_{figure}{labels} 1\n");
        assert!(figures.contains(&line), "{line} is not in {figures}");
    }
    assert!(figures.contains(&format!("offbook_actor_given_up{labels} 0\n")));
}

/// The process of the test below, when it starts this binary anew.
#[test]
fn child_process() {
    let Some(folder) = std::env::var_os("TEST_POISONED_NODE") else {
        return;
    };
    actix::System::new().block_on(async move {
        let running = start_idle(&options(Path::new(&folder))).await;
        for _ in 0..=RestartPolicy::default().intensity {
            let _ = running.agent.ask(Poison(SECRET), DEADLINE).await;
        }
        // Longer than the end takes.
        tokio::time::sleep(DEADLINE).await;
    });
}

#[actix::test]
async fn one_that_its_process_ended_with_is_in_the_report_of_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["node::tests::child_process", "--exact", "--nocapture"]);
    child.stdin(std::process::Stdio::piped());
    let output = child.env("TEST_POISONED_NODE", folder.path()).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{said}");

    let options = options(folder.path());
    let _running = start_idle(&options).await;
    let (agent, report) = node_agent(&options, |_| true).await;
    let lives = RestartPolicy::default().intensity + 1;
    assert_eq!(agent["restarts"], lives, "{agent}");
    assert_eq!(agent["dead_letters"], lives);
    assert_eq!(agent["last_error"], "panic: poisoned");
    assert_eq!(agent["given_up"], true);
    assert!(!report.contains(SECRET), "{report}");
}

/// The process runs and says nothing, as one that was stopped before it could.
#[actix::test]
async fn a_shard_that_is_not_heard_of_is_replaced_and_the_next_one_has_longer() {
    let folder = tempfile::tempdir().unwrap();
    let first_sign_seconds = 0.1;
    let options = options_with(
        folder.path(),
        Limits {
            first_sign_seconds,
            ..Limits::default()
        },
    );
    let _running = start_idle(&options).await;
    for within in ["100ms", "200ms", "400ms"] {
        let killed = format!("for it was frozen: it was not heard of within {within} of its start");
        let told = async {
            while !get(&options, "/v1/cluster").await.contains(&killed) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::time::timeout(DEADLINE, told).await.expect(within);
    }
}

const SECRET: &str = "what nobody else is to read";
/// More than the pauses before a few restarts take together.
const DEADLINE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
