//! When an answer cannot be completed, the client is told why. It never gets a finish reason for what
//! was not finished.

mod support;

use offbook_api::StreamError;
use offbook_protocol::{FinishReason, RequestFailure};
use serde_json::{Value, json};
use support::{Script, Server, Step, events, token};

fn lost() -> Script {
    let detail = "the shard of node-2 was given up".to_owned();
    fails(RequestFailure::ShardLost { detail })
}

fn fails(failure: RequestFailure) -> Script {
    Script::says_then("</think>Half an", Step::Fail(StreamError::Failed(failure)))
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
async fn every_reason_has_a_code_of_its_own() {
    let detail = || "rank 1: no such file".to_owned();
    let reasons = [
        (
            RequestFailure::ShardLost { detail: detail() },
            503,
            "shard_lost",
        ),
        (
            RequestFailure::ClusterFailed { detail: detail() },
            503,
            "cluster_failed",
        ),
        (
            RequestFailure::DeadlineExceeded { seconds: 9 },
            504,
            "deadline_exceeded",
        ),
        (
            RequestFailure::LostRepeatedly { losses: 3 },
            503,
            "request_lost_repeatedly",
        ),
    ];
    for (failure, status, code) in reasons {
        let server = Server::start([fails(failure.clone()), fails(failure.clone())]).await;
        let response = server.ask(json!({})).await;
        assert_eq!(response.status(), status, "{code}");
        let may_be_tried_again = matches!(code, "shard_lost" | "cluster_failed");
        assert_eq!(
            response.headers().contains_key("retry-after"),
            may_be_tried_again,
            "{code}"
        );
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], code);
        assert_eq!(body["error"]["message"], failure.to_string());
        let last = server.stream(json!({})).await.pop().unwrap();
        assert_eq!(last["error"], body["error"]);
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
