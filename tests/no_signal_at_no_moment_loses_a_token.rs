//! The matrix of ends: every signal, to every kind of process, at every moment of a request's life. Each
//! cell ends with the tokens that the request would have had, and with a cluster that serves.
//!
//! A client of the head loses its connection with it: it reads on by the id of its answer, or asks again
//! if it has not heard of one yet.

mod support;

use std::time::Instant;

use serde_json::{Value, json};
use support::{Cluster, Events, send_signal, token_ids};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Whom {
    SamplingShard,
    OtherShard,
    Node,
    Head,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// A shard that has ended is about to hold its share again.
    Load,
    /// The request is taken and its first token has not come.
    Prefill,
    Decode,
    /// Nothing runs.
    Between,
}

#[test]
fn whoever_gets_it() {
    let all = [&OTHERS[..], &[Whom::Head]].concat();
    // `offbook up` is patient with a head that does not answer: it has a cluster to itself.
    let columns = [
        ("KILL", &all[..], &WHENEVER[..]),
        ("TERM", &all, &WHENEVER),
        ("STOP", &OTHERS, &WHENEVER),
        ("STOP", &[Whom::Head], &WHENEVER[2..]),
    ];
    std::thread::scope(|scope| {
        for (signal, whoms, whens) in columns {
            scope.spawn(move || strike_all(signal, whoms, whens));
        }
    });
}

fn strike_all(signal: &str, whoms: &[Whom], whens: &[When]) {
    let patience = ["--restarts", "1000", "--restart-pause-max", "100ms"];
    let cluster = Cluster::up(&[&["--nodes", "2"], &patience[..]].concat());
    let request = request();
    let undisturbed = cluster.stream(PATH, &request).rest();
    for &whom in whoms {
        for &when in whens {
            let began = Instant::now();
            let before = cluster.wait_for("a whole cluster", is_whole);
            let strike = |report: &Value| send_signal(pid(report, whom), signal);
            let tokens = match when {
                When::Load => {
                    strike(&while_loading(&cluster, whom));
                    answer(&cluster, &request, 0, || {})
                }
                When::Prefill => answer(&cluster, &request, 0, || strike(&before)),
                When::Decode => answer(&cluster, &request, 5, || strike(&before)),
                When::Between => {
                    strike(&before);
                    answer(&cluster, &request, 0, || {})
                }
            };
            assert_eq!(tokens, undisturbed, "{signal} to {whom:?}, {when:?}");
            cluster.wait_for("the end of the process", |report| {
                pid_or_none(report, whom).is_some_and(|now| now != pid(&before, whom))
                    && is_whole(report)
            });
            println!("{signal} to {whom:?}, {when:?}: {:.1?}", began.elapsed());
        }
    }
}

/// Kills a shard, and looks at the cluster while the share is read again. That may be over before
/// anybody looks: then once more.
fn while_loading(cluster: &Cluster, whom: Whom) -> Value {
    loop {
        let before = cluster.wait_for("a whole cluster", is_whole);
        send_signal(pid(&before, Whom::OtherShard), "KILL");
        let report = cluster.wait_for("the share to be held again", |report| {
            let over = is_whole(report) && report["epoch"].as_u64() > before["epoch"].as_u64();
            over || report["phase"] == "loading" && pid_or_none(report, whom).is_some()
        });
        if report["phase"] == "loading" {
            return report;
        }
    }
}

/// Asks, and reads to the end whatever becomes of the connection; disturbs after so many tokens.
fn answer(
    cluster: &Cluster,
    request: &Value,
    tokens_before: usize,
    disturb: impl FnOnce(),
) -> Vec<u64> {
    let mut disturb = Some(disturb);
    let (mut tokens, mut id, mut last) = (Vec::new(), None, 0);
    loop {
        let Some(mut events) = open(cluster, request, id.as_deref(), last) else {
            continue;
        };
        loop {
            if tokens.len() >= tokens_before
                && let Some(disturb) = disturb.take()
            {
                disturb();
            }
            let Some(event) = events.next() else { break };
            if event == "[DONE]" {
                return tokens;
            }
            assert!(event["error"].is_null(), "{event}");
            id = event["id"].as_str().map(str::to_owned).or(id);
            last = events.last_id.unwrap_or(last);
            tokens.extend(token_ids(&event));
        }
    }
}

/// The events of the answer after the last one that came, or of a new one. `None` when there is nobody to
/// ask yet.
fn open(cluster: &Cluster, request: &Value, id: Option<&str>, last: u64) -> Option<Events> {
    cluster.wait_for("somebody to ask", |report| !report.is_null());
    match id {
        Some(id) => cluster.try_resume(&format!("{PATH}/{id}"), last),
        None => cluster.try_stream(PATH, request),
    }
}

/// Long enough for its prompt to be read in several steps.
fn request() -> Value {
    let prompt: Vec<u64> = (0..200).map(|place| place * 37 % 500 + 4).collect();
    let mut request = support::long_completion(40);
    request["prompt"] = json!(prompt);
    request["temperature"] = json!(0.8);
    request["seed"] = json!(7);
    request
}

fn is_whole(report: &Value) -> bool {
    let nodes = report["nodes"].as_array().into_iter().flatten();
    let used = nodes.filter(|node| node["in_use"] == true && node["alive"] == true);
    report["phase"] == "ready" && used.count() == 2
}

fn pid_or_none(report: &Value, whom: Whom) -> Option<u32> {
    let entry = match whom {
        Whom::SamplingShard => &report["shards"][0],
        Whom::OtherShard => &report["shards"][1],
        Whom::Head => &report["nodes"][0],
        Whom::Node => &report["nodes"][1],
    };
    let pid = entry["pid"].as_u64().filter(|pid| *pid > 0)?;
    (entry["alive"] == true).then_some(pid as u32)
}

fn pid(report: &Value, whom: Whom) -> u32 {
    pid_or_none(report, whom).unwrap_or_else(|| panic!("no {whom:?} in {report}"))
}

/// All but the head.
const OTHERS: [Whom; 3] = [Whom::SamplingShard, Whom::OtherShard, Whom::Node];
const WHENEVER: [When; 4] = [When::Load, When::Prefill, When::Decode, When::Between];
const PATH: &str = "/v1/completions";
