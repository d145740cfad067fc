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
async fn before_a_whole_answer_is_ready() {
    let mut server = Server::start([Script::says_then("</think>Hi", Step::Hang)]).await;
    let url = format!("{}/v1/chat/completions", server.url);
    let asked = tokio::spawn(server.client.post(url).json(&question(json!({}))).send());
    server.submitted().await;
    asked.abort();
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
}
