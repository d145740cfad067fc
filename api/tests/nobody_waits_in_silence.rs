//! A stream shows that it lives while a long prompt is read, and says so when the node stops.

mod support;

use std::sync::Arc;

use futures::StreamExt;
use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{Script, Server, Step, events};
use tokio::sync::Notify;

#[tokio::test(start_paused = true)]
async fn a_stream_without_tokens_is_kept_alive() {
    let server = Server::start([Script::Answer(vec![Step::Hang])]).await;
    let mut stream = server.ask(json!({"stream": true})).await.bytes_stream();
    let role = stream.next().await.unwrap().unwrap();
    let role = String::from_utf8(role.to_vec()).unwrap();
    assert!(role.starts_with("id: 0\ndata: "), "{role}");
    let asked = tokio::time::Instant::now();
    let comment = stream.next().await.unwrap().unwrap();
    assert!(comment.starts_with(b":"), "{comment:?}");
    assert!(!comment.ends_with(b"\n\n"), "an event without data");
    assert!(asked.elapsed().as_secs_f64() < 11.0);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_stops_says_so_to_those_who_wait() {
    let hangs = || Script::says_then("</think>Hi", Step::Hang);
    let mut server = Server::start([hangs(), hangs()]).await;
    let stream = server.ask(json!({"stream": true})).await;
    let url = format!("{}/v1/chat/completions", server.url);
    let whole = server
        .client
        .post(url)
        .json(&support::question(json!({})))
        .send();
    let whole = tokio::spawn(whole);
    server.submitted().await;
    server.submitted().await;
    server.stop().await;
    let last = events(stream).await.pop().unwrap();
    assert_eq!(last["error"]["code"], "interrupted");
    let whole = whole.await.unwrap().unwrap();
    assert_eq!(whole.status(), 503);
    let body: Value = whole.json().await.unwrap();
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("is being stopped")
    );
}

#[tokio::test]
async fn a_node_that_stops_finishes_what_is_under_way_and_refuses_the_rest() {
    let go_on = Arc::new(Notify::new());
    let slow = Script::Answer(vec![
        Step::Token(support::token(u32::from(b'A'), None)),
        Step::Wait(Arc::clone(&go_on)),
        Step::Token(support::token(u32::from(b'B'), Some(FinishReason::Length))),
    ]);
    let mut server = Server::start([slow]).await;
    let stream = server.ask(json!({"stream": true})).await;
    server.submitted().await;
    let (url, client) = (server.url.clone(), server.client.clone());
    let stopped = tokio::spawn(server.stop());
    let health = loop {
        let health = client.get(format!("{url}/health")).send().await.unwrap();
        if health.status() == 503 {
            break health;
        }
    };
    let health: Value = health.json().await.unwrap();
    assert_eq!(health["error"]["code"], "draining");
    let refused = client
        .post(format!("{url}/v1/chat/completions"))
        .json(&support::question(json!({})))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["connection"], "close");
    let retry: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        (1..=support::DRAIN.as_secs() + 5).contains(&retry),
        "{retry}"
    );
    assert!(!stopped.is_finished(), "it waits for the answer");
    go_on.notify_one();
    assert_eq!(events(stream).await.last().unwrap(), "[DONE]");
    stopped.await.unwrap();
    assert!(client.get(format!("{url}/health")).send().await.is_err());
}

#[tokio::test]
async fn an_answer_under_way_may_end_before_the_node_does() {
    let mut server = Server::start([Script::says("</think>Hi")]).await;
    let stream = server.ask(json!({"stream": true})).await;
    server.submitted().await;
    let (events, ()) = tokio::join!(events(stream), server.stop());
    assert_eq!(events.last().unwrap(), "[DONE]");
}
