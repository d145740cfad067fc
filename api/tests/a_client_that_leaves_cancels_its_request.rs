//! A cluster does not work for somebody who is gone.

mod support;

use futures::StreamExt;
use serde_json::json;
use support::{Script, Seen, Server, Step, question};

#[tokio::test]
async fn in_the_middle_of_a_stream() {
    let mut server = Server::start([Script::says_then("</think>Hi", Step::Hang)]).await;
    let mut stream = server.ask(json!({"stream": true})).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    server.submitted().await;
    assert!(
        server.seen.try_recv().is_err(),
        "it goes on while somebody reads"
    );
    drop(stream);
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
}

#[tokio::test]
async fn and_whoever_comes_back_for_the_answer_is_told() {
    let scripts = [
        Script::says_then("</think>Hi", Step::Hang),
        Script::says("</think>Hi"),
    ];
    let mut server = Server::start(scripts).await;
    let url = format!("{}/v1/chat/completions", server.url);
    let client = server.client.clone();
    let ask = |name: &str| {
        let body = question(json!({"stream": true}));
        let asked = client.post(&url).header("X-Request-Id", name);
        asked.json(&body).send()
    };
    let answer = ask("mine").await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], "mine");
    let mut stream = answer.bytes_stream();
    stream.next().await.unwrap().unwrap();
    let (status, error) = get(&server, "mine").await;
    assert_eq!((status, &error), (409, &json!("answer_under_way")));
    drop(stream);
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
    let (status, error) = get(&server, "mine").await;
    assert_eq!((status, &error), (410, &json!("request_cancelled")));
    let whole = ask("other").await.unwrap().text().await.unwrap();
    assert!(whole.contains("[DONE]"));
    let (status, error) = get(&server, "other").await;
    assert_eq!((status, &error), (410, &json!("answer_complete")));
    assert_eq!(get(&server, "nobody").await, (404, json!("not_found")));
    // What could not be asked for is refused from the start.
    let refused = ask("a b").await.unwrap();
    assert_eq!(refused.status(), 400);
}

async fn get(server: &Server, id: &str) -> (u16, serde_json::Value) {
    let answer = server.get(&format!("/v1/chat/completions/{id}")).await;
    let status = answer.status().as_u16();
    let body: serde_json::Value = answer.json().await.unwrap();
    (status, body["error"]["code"].clone())
}

#[tokio::test]
async fn before_a_whole_answer_is_ready() {
    let mut server = Server::start([Script::says_then("</think>Hi", Step::Hang)]).await;
    let url = format!("{}/v1/chat/completions", server.url);
    let asked = tokio::spawn(server.client.post(url).json(&question(json!({}))).send());
    server.submitted().await;
    asked.abort();
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
}
