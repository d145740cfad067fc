//! A plan is not a step: while the head node, and the scheduler in it, stands still, the shards
//! decode on, for hundreds of steps.

mod support;

use std::time::{Duration, Instant};

use support::{Cluster, long_completion, send_signal, token_ids};

#[test]
fn for_hundreds_of_steps() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let total = 1200;
    let mut events = cluster.stream("/v1/completions", &long_completion(total));
    let mut tokens = 0;
    let decoding = Instant::now();
    while tokens < 100 {
        tokens += token_ids(&events.next().expect("it streams")).len();
    }
    let per_token = decoding.elapsed() / 100;

    // Long enough for many more than are asked for, short enough for no link to be given up.
    let stop = (per_token * HUNDREDS as u32 * 4).min(Duration::from_secs(7));
    send_signal(cluster.node_pid(0), "STOP");
    std::thread::sleep(stop);
    send_signal(cluster.node_pid(0), "CONT");

    let resumed = Instant::now();
    let mut at_once = 0;
    let mut drained = None;
    for event in events {
        assert!(event["error"].is_null(), "{event}");
        at_once += token_ids(&event).len();
        if at_once >= HUNDREDS {
            drained.get_or_insert_with(|| resumed.elapsed());
        }
    }
    assert_eq!(tokens + at_once, total as usize);
    let drained = drained.expect("more were left than that");
    assert!(
        drained < per_token * HUNDREDS as u32 / 2,
        "{HUNDREDS} tokens took {drained:?} after the stop, at {per_token:?} a step: \
         they were not decoded during it"
    );
}

const HUNDREDS: usize = 200;
