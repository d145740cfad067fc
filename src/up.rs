//! `offbook up`: a whole cluster on this machine, in the foreground, until it is told to stop: once to
//! finish the answers that are under way, twice to end at once.

use anyhow::{Context, Result};
use offbook_protocol::ClusterReport;
use serde_json::json;

use crate::cli::Up;
use crate::demo_model;
use crate::local_cluster::{LoadBars, LocalCluster};
use crate::logging;
use crate::stop_signals::StopSignals;

pub(crate) async fn run(options: Up) -> Result<()> {
    logging::start("up");
    let mut told = StopSignals::of_an_operator()?;
    let cluster = LocalCluster::start(&options.local, &options.api).await?;
    let mut bars = LoadBars::new();
    let ready = tokio::select! {
        ready = cluster.ready(|report| bars.show(report)) => ready.map(Some),
        () = told.next() => Ok(None),
    };
    bars.finish();
    let outcome = match ready {
        Ok(Some(report)) => {
            if options.json {
                println!("{}", ready_line(cluster.api(), &report));
            } else {
                greet(&cluster, &report);
            }
            told.next().await;
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error).context("the cluster did not come up"),
    };
    tokio::select! {
        () = cluster.stop() => {}
        // Whoever says it twice means at once: the nodes end with this process.
        () = told.next() => {}
    }
    outcome
}

/// What a program that started us needs to know.
fn ready_line(api: &str, report: &ClusterReport) -> serde_json::Value {
    let node = |node: &offbook_protocol::NodeReport| json!({"name": node.name, "pid": node.pid});
    let shard = |shard: &offbook_protocol::ShardReport| json!({"rank": shard.rank, "node": shard.node, "pid": shard.pid});
    json!({
        "api": api,
        "nodes": report.nodes.iter().map(node).collect::<Vec<_>>(),
        "shards": report.shards.iter().map(shard).collect::<Vec<_>>(),
    })
}

fn greet(cluster: &LocalCluster, report: &ClusterReport) {
    let api = cluster.api();
    let model = cluster
        .model
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let question = if model == demo_model::NAME {
        "What is 47 + 85?"
    } else {
        "Who are you?"
    };
    let request = json!({
        "model": model,
        "stream": true,
        "messages": [{"role": "user", "content": question}],
    });
    println!(
        "\nOffbook serves {model} over {} nodes ({} over {}).\n\n  API   {api}/v1\n  Chat  offbook chat --api {api}\n  Try   curl -N {api}/v1/chat/completions -H 'content-type: application/json' -d '{request}'\n\nCtrl-C stops everything.",
        report.nodes.len(),
        report.layout,
        report.transport,
    );
}
