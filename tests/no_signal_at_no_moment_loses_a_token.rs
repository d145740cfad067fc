//! The matrix of ends: every signal, to every kind of process, at every moment of a request's life. Each
//! cell ends with the tokens that the request would have had, and with a cluster that serves.
//!
//! A client of the head loses its connection with it: it reads on by the id of its answer, or asks again
//! if it has not heard of one yet.
//!
//! Three nodes are struck at random besides. `OFFBOOK_CHAOS_STRIKES=n` strikes n times rather than a few,
//! and freezes the head too, which takes longest; `OFFBOOK_CHAOS_SEED=s` decides who, when and how.

mod support;

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use support::{Cluster, Events, send_signal, token_ids};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Whom {
    SamplingShard,
    OtherShard,
    Node,
    Head,
    /// Of the third node, where there is one.
    LastShard,
    LastNode,
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
    // With the defaults: whoever is killed has not failed.
    let cluster = Cluster::up(&["--nodes", "2"]);
    let request = request();
    let undisturbed = cluster.stream(PATH, &request).rest();
    for &whom in whoms {
        for &when in whens {
            let began = Instant::now();
            let tokens = strike_once(&cluster, &request, (signal, whom, when));
            assert_eq!(tokens, undisturbed, "{signal} to {whom:?}, {when:?}");
            println!("{signal} to {whom:?}, {when:?}: {:.1?}", began.elapsed());
        }
    }
}

#[test]
fn nor_a_few_of_them_at_random_in_a_cluster_of_three() {
    let number = |variable| {
        let value = std::env::var(variable).ok()?;
        Some(value.parse::<u64>().expect("it is a number"))
    };
    let seed = number("OFFBOOK_CHAOS_SEED").unwrap_or(1);
    let wanted = number("OFFBOOK_CHAOS_STRIKES");
    let mut chance = StdRng::seed_from_u64(seed);
    let cluster = Cluster::up(&["--nodes", "3"]);
    let request = request();
    let undisturbed = cluster.stream(PATH, &request).rest();
    let mut strikes = 0;
    while strikes < wanted.unwrap_or(STRIKES) {
        let whom = ANYBODY[chance.random_range(0..ANYBODY.len())];
        let when = WHENEVER[chance.random_range(0..WHENEVER.len())];
        let signal = SIGNALS[chance.random_range(0..SIGNALS.len())];
        if wanted.is_none() && (signal, whom) == ("STOP", Whom::Head) {
            continue;
        }
        strikes += 1;
        let began = Instant::now();
        let tokens = strike_once(&cluster, &request, (signal, whom, when));
        let what = format!("strike {strikes} of seed {seed}: {signal} to {whom:?}, {when:?}");
        assert_eq!(tokens, undisturbed, "{what}");
        println!("{what}: {:.1?}", began.elapsed());
    }
}

/// Strikes, and returns the answer to a request that was asked for before, or when that was over. The
/// cluster is whole again then.
fn strike_once(
    cluster: &Cluster,
    request: &Value,
    (signal, whom, when): (&str, Whom, When),
) -> Vec<u64> {
    let before = cluster.wait_for("a whole cluster", is_whole);
    let strike = |report: &Value| send_signal(pid(report, whom), signal);
    let tokens = match when {
        When::Load => {
            strike(&while_loading(cluster, whom));
            answer(cluster, request, 0, || {})
        }
        When::Prefill => answer(cluster, request, 0, || strike(&before)),
        When::Decode => answer(cluster, request, 5, || strike(&before)),
        When::Between => {
            strike(&before);
            answer(cluster, request, 0, || {})
        }
    };
    cluster.wait_for("the end of the process", |report| {
        pid_or_none(report, whom).is_some_and(|now| now != pid(&before, whom)) && is_whole(report)
    });
    tokens
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
            // A head that is told to end leaves what it has no time for to the next one.
            if event["error"]["code"] == "interrupted" {
                break;
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
    let used = |node: &Value| node["in_use"] == true && node["alive"] == true;
    let mut nodes = nodes.peekable();
    report["phase"] == "ready" && nodes.peek().is_some() && nodes.all(used)
}

fn pid_or_none(report: &Value, whom: Whom) -> Option<u32> {
    let entry = match whom {
        Whom::SamplingShard => &report["shards"][0],
        Whom::OtherShard => &report["shards"][1],
        Whom::Head => &report["nodes"][0],
        Whom::Node => &report["nodes"][1],
        Whom::LastShard => &report["shards"][2],
        Whom::LastNode => &report["nodes"][2],
    };
    let pid = entry["pid"].as_u64().filter(|pid| *pid > 0)?;
    (entry["alive"] == true).then_some(pid as u32)
}

fn pid(report: &Value, whom: Whom) -> u32 {
    pid_or_none(report, whom).unwrap_or_else(|| panic!("no {whom:?} in {report}"))
}

/// All but the head.
const OTHERS: [Whom; 3] = [Whom::SamplingShard, Whom::OtherShard, Whom::Node];
const ANYBODY: [Whom; 6] = [
    Whom::SamplingShard,
    Whom::OtherShard,
    Whom::LastShard,
    Whom::Node,
    Whom::LastNode,
    Whom::Head,
];
const SIGNALS: [&str; 3] = ["KILL", "TERM", "STOP"];
/// Of the random ones, where nobody asks for more: they take half a minute.
const STRIKES: u64 = 8;
const WHENEVER: [When; 4] = [When::Load, When::Prefill, When::Decode, When::Between];
const PATH: &str = "/v1/completions";
