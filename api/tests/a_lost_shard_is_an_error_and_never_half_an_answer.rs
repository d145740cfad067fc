//! When a shard dies in the middle of an answer, the client is told. It never gets a finish reason
//! for what was not finished.

mod support;

use offbook_api::StreamError;
use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{Script, Server, Step, events, token};

fn lost() -> Script {
    let detail = "shard 1 on node-2 was killed".to_owned();
    Script::says_then(
        "</think>Half an",
        Step::Fail(StreamError::ShardLost { detail }),
    )
}

#[tokio::test]
async fn a_stream_ends_with_an_error_and_without_done() {
    let server = Server::start([lost(), lost()]).await;
    let chat = server
        .stream(json!({"stream_options": {"include_usage": true}}))
        .await;
    let prompt = json!({"prompt": "a", "stream": true});
    let completion = events(server.post("/v1/completions", &prompt).await).await;
    for events in [chat, completion] {
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last["error"]["code"], "shard_lost");
        assert_eq!(last["error"]["type"], "server_error");
        assert!(
            last["error"]["message"]
                .as_str()
                .unwrap()
                .contains("node-2")
        );
        assert!(before.len() > 1);
        assert!(
            before
                .iter()
                .all(|event| event["choices"][0]["finish_reason"].is_null())
        );
    }
}

#[tokio::test]
async fn a_whole_answer_is_an_error_instead() {
    let server = Server::start([lost(), lost()]).await;
    let chat = server.ask(json!({})).await;
    let completion = server
        .post("/v1/completions", &json!({"prompt": "a"}))
        .await;
    for response in [chat, completion] {
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], "shard_lost");
    }
}

#[tokio::test]
async fn one_lost_choice_ends_them_all() {
    let hangs = Script::says_then("</think>x", Step::Hang);
    let mut server = Server::start([hangs, lost()]).await;
    assert_eq!(server.ask(json!({"n": 2})).await.status(), 503);
    server.submitted().await;
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(support::Seen::Dropped));
    assert_eq!(server.seen.recv().await, Some(support::Seen::Dropped));
}

#[tokio::test]
async fn an_answer_that_the_cluster_dropped_is_an_error_too() {
    let cancelled = Step::Token(token(65, Some(FinishReason::Cancelled)));
    let cancelled = Script::says_then("</think>x", cancelled);
    let vanished = Script::Answer(vec![Step::Token(token(65, None))]);
    let server = Server::start([cancelled, vanished]).await;
    for _ in 0..2 {
        let events = server.stream(json!({})).await;
        assert_eq!(events.last().unwrap()["error"]["code"], "interrupted");
    }
}
