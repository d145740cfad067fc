//! `offbook status`: what an operator wants to know of a running cluster, in one look.

use anyhow::{Context, Result, bail};
use offbook_protocol::{ActorReport, ClusterReport, NodeReport, Phase, ShardReport, ShardSteps};

use crate::cli::Status;

pub(crate) async fn run(options: Status) -> Result<()> {
    let url = format!("{}/v1/cluster", options.api.trim_end_matches('/'));
    let answer = reqwest::get(&url).await;
    let answer = answer.with_context(|| format!("no cluster answers at {}", options.api))?;
    if !answer.status().is_success() {
        bail!("{url} answers {}", answer.status());
    }
    let text = answer.text().await?;
    if options.json {
        println!("{text}");
        return Ok(());
    }
    let report = serde_json::from_str(&text);
    let report = report.with_context(|| format!("{url} is not the report of a cluster"))?;
    print!("{}", table(&report));
    // Shards that stand still do not answer, and the state of the cluster is worth more than theirs.
    let answer = reqwest::get(format!("{url}/shards")).await;
    if let Ok(answer) = answer
        && let Ok(shards) = answer.json::<Vec<ShardSteps>>().await
        && !shards.is_empty()
    {
        print!("\n{}", holdings(&shards));
    }
    Ok(())
}

/// What the caches and MLX hold, by rank.
fn holdings(shards: &[ShardSteps]) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let mut text = format!(
        "{:>4}  {:>19}  {:>11}  {:>10}  {:>9}  {:>9}  {:>9}  {:>14}\n",
        "rank",
        "KV tokens in use/of",
        "preemptions",
        "active MiB",
        "cache MiB",
        "peak MiB",
        "limit MiB",
        "window pre/dec"
    );
    for shard in shards {
        let (kv, memory, throttle) = (&shard.kv, &shard.memory, &shard.throttle);
        text += &format!(
            "{:>4}  {:>19}  {:>11}  {:>10}  {:>9}  {:>9}  {:>9}  {:>14}\n",
            shard.rank.to_string(),
            format!("{}/{}", kv.in_use_tokens, kv.capacity_tokens),
            kv.preemptions,
            mib(memory.active_bytes),
            mib(memory.cache_bytes),
            mib(memory.peak_bytes),
            mib(memory.limit_bytes),
            format!("{}/{}", throttle.prefill_window, throttle.decode_window),
        );
    }
    text
}

fn table(report: &ClusterReport) -> String {
    let phase = match report.phase {
        Phase::Gathering => "gathering",
        Phase::Loading => "loading",
        Phase::Ready => "ready",
        Phase::Failed => "failed",
    };
    let used = report.nodes.iter().filter(|node| node.in_use).count();
    let mut text = format!(
        "{phase}, epoch {}: {} over {used} of {} nodes ({} over {})\n",
        report.epoch,
        report.model,
        report.nodes.len(),
        report.layout,
        report.transport,
    );
    if !report.detail.is_empty() {
        text += &format!("{}\n", printable(&report.detail));
    }
    text += &format!(
        "context of {} tokens, {} requests run, {} wait\n\n",
        report.context_tokens, report.requests_running, report.requests_queued
    );
    let width = report.nodes.iter().map(|node| node.name.len()).max();
    let width = width.unwrap_or_default().max(4);
    text += &format!(
        "{:<width$}  {:>8}  {:<10}  {:>4}  {:>9}  {:<9}  {:>8}  last failure\n",
        "node", "pid", "state", "rank", "shard pid", "state", "restarts"
    );
    for node in &report.nodes {
        let shard = report.shards.iter().find(|shard| shard.node == node.name);
        text += &row(node, shard, width);
    }
    for shard in report.shards.iter().filter(|shard| shard.given_up) {
        text += &format!(
            "\nThe shard of {} was given up after {} restarts. Its last lines:\n",
            shard.node, shard.restarts
        );
        for line in &shard.last_lines {
            text += &format!("  {}\n", printable(line));
        }
    }
    text + &actors(&report.actors)
}

/// Those that have ended, and how the last time.
fn actors(actors: &[ActorReport]) -> String {
    let ended = |actor: &&ActorReport| actor.restarts > 0 || actor.dead_letters > 0;
    let ended: Vec<_> = actors.iter().filter(ended).collect();
    match (actors.len(), ended.len()) {
        (0, _) => return String::new(),
        (all, 0) => return format!("\n{all} actors, none of which has ended\n"),
        _ => {}
    }
    let width = |name: fn(&ActorReport) -> &str, title: &str| {
        let widths = ended.iter().map(|actor| name(actor).len());
        widths.max().unwrap_or_default().max(title.len())
    };
    let (process, name) = (
        width(|actor| &actor.process, "process"),
        width(|actor| &actor.name, "actor"),
    );
    let mut text = format!(
        "\n{:<process$}  {:<name$}  {:>8}  {:>12}  last error\n",
        "process", "actor", "restarts", "dead letters"
    );
    for actor in ended {
        let row = format!(
            "{:<process$}  {:<name$}  {:>8}  {:>12}  {}",
            printable(&actor.process),
            printable(&actor.name),
            actor.restarts,
            actor.dead_letters,
            printable(&last_error(actor)),
        );
        text += &format!("{}\n", row.trim_end());
    }
    text
}

fn last_error(actor: &ActorReport) -> String {
    let mut words = actor.last_error.clone();
    if let Some(letter) = &actor.last_dead_letter {
        words += &format!(
            ", by its last dead letter, {}: {}",
            letter.message, letter.cause
        );
    }
    if actor.given_up {
        words += "; its process ended with it";
    }
    words
}

fn row(node: &NodeReport, shard: Option<&ShardReport>, width: usize) -> String {
    let state = match (node.alive, node.in_use) {
        (true, true) => "alive",
        (true, false) => "not in use",
        (false, _) => "away",
    };
    let Some(shard) = shard else {
        return format!("{:<width$}  {:>8}  {state}\n", node.name, node.pid);
    };
    let rank = shard
        .rank
        .map_or_else(|| "–".into(), |rank| rank.to_string());
    let shard_state = match (shard.given_up, shard.alive) {
        (true, _) => "given up",
        (false, true) => "alive",
        (false, false) => "away",
    };
    let row = format!(
        "{:<width$}  {:>8}  {state:<10}  {rank:>4}  {:>9}  {shard_state:<9}  {:>8}  {}",
        node.name,
        node.pid,
        shard.pid,
        shard.restarts,
        printable(&shard.last_failure),
    );
    format!("{}\n", row.trim_end())
}

/// What a process wrote may hold anything: nothing of it shall command the terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use offbook_protocol::{
        DeadLetterReport, Epoch, FastSynch, KvFigures, Layout, MemoryFigures, Rank, StepHistograms,
        ThrottleFigures, Transport,
    };

    use super::*;

    #[test]
    fn every_rank_has_a_row_of_what_it_holds() {
        let shard = ShardSteps {
            rank: Rank(1),
            node: "b".into(),
            decode: StepHistograms::default(),
            prefill: StepHistograms::default(),
            kv: KvFigures {
                in_use_tokens: 512,
                retained_tokens: 256,
                capacity_tokens: 8192,
                preemptions: 3,
            },
            memory: MemoryFigures {
                active_bytes: 77 << 20,
                ..MemoryFigures::default()
            },
            throttle: ThrottleFigures {
                prefill_window: 15,
                decode_window: 100,
                ..ThrottleFigures::default()
            },
        };
        let text = holdings(&[shard]);
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        let expected = ["1", "512/8192", "3", "77", "0", "0", "0", "15/100"];
        assert_eq!(row, expected);
    }

    #[test]
    fn a_shard_that_is_given_up_is_shown_with_its_last_words() {
        let node = |name: &str, alive| NodeReport {
            name: name.into(),
            pid: 7,
            alive,
            in_use: alive,
        };
        let shard = |node: &str, given_up: bool| ShardReport {
            rank: (!given_up).then_some(Rank(0)),
            node: node.into(),
            pid: 8,
            alive: !given_up,
            restarts: 5,
            last_failure: "signal 9".into(),
            last_lines: vec!["\u{1b}[31mno key".into()],
            given_up,
            load: None,
            kv: None,
            collectives: String::new(),
        };
        let report = ClusterReport {
            api: String::new(),
            epoch: Epoch(3),
            phase: Phase::Failed,
            detail: "the shard of b was given up".into(),
            model: "m".into(),
            layout: Layout::Tensor,
            transport: Transport::Quic,
            fast_synch: FastSynch::Auto,
            context_tokens: 4096,
            requests_running: 0,
            requests_queued: 2,
            nodes: vec![node("a", true), node("b", false)],
            shards: vec![shard("a", false), shard("b", true)],
            actors: Vec::new(),
        };
        let text = table(&report);
        for wanted in [
            "failed, epoch 3: m over 1 of 2 nodes (tensor over quic)",
            "context of 4096 tokens, 0 requests run, 2 wait",
            "given up after 5 restarts",
            "  [31mno key\n",
        ] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
        let row = text.lines().find(|line| line.starts_with("b ")).unwrap();
        assert!(row.contains("away") && row.ends_with("signal 9"), "{row}");
    }

    #[test]
    fn an_actor_that_ended_is_shown_with_the_message_that_it_died_of() {
        let quiet = ActorReport {
            process: "node-1".into(),
            name: "scheduler".into(),
            restarts: 0,
            last_error: String::new(),
            ended_at: None,
            dead_letters: 0,
            last_dead_letter: None,
            given_up: false,
        };
        assert_eq!(actors(&[]), "", "an older head says nothing of them");
        let none = actors(&[quiet.clone(), quiet.clone()]);
        assert_eq!(none, "\n2 actors, none of which has ended\n");
        let ended = ActorReport {
            process: "node-2".into(),
            name: "node-agent".into(),
            restarts: 3,
            last_error: "panic: a \u{1b}[31mfault".into(),
            dead_letters: 2,
            last_dead_letter: Some(DeadLetterReport {
                message: "Attach".into(),
                cause: "a fault".into(),
            }),
            given_up: true,
            ..quiet.clone()
        };
        let text = actors(&[quiet, ended]);
        let rows: Vec<_> = text.lines().skip(2).collect();
        let expected = "node-2   node-agent         3             2  panic: a [31mfault, by its last \
            dead letter, Attach: a fault; its process ended with it";
        assert_eq!(rows, [expected]);
    }
}
