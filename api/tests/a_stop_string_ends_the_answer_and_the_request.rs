//! The text before a stop string is the answer; the cluster works no further.

mod support;

use serde_json::{Value, json};
use support::{Script, Seen, Server, Step, events, said};

/// An answer that would go on for ever: only the stop string can end it. Every byte is a token, so
/// every stop string lies across the borders of chunks.
fn endless() -> Script {
    Script::says_then("Say STOP?</think>One, two STOP three", Step::Hang)
}

#[tokio::test]
async fn in_a_chat_it_is_looked_for_in_what_is_said_not_in_what_is_thought() {
    let mut server = Server::start([endless(), endless()]).await;
    let body = server.answer(json!({"stop": "STOP"})).await;
    assert_eq!(body["choices"][0]["message"]["content"], "One, two ");
    assert_eq!(
        body["choices"][0]["message"]["reasoning_content"],
        "Say STOP?"
    );
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
    let events = server.stream(json!({"stop": ["never", "STOP"]})).await;
    assert_eq!(said(&events, 0, "content"), "One, two ");
    assert_eq!(events.last().unwrap(), "[DONE]");
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
}

#[tokio::test]
async fn in_a_completion_it_is_looked_for_everywhere() {
    let server = Server::start([endless(), endless()]).await;
    let request = json!({"prompt": "a", "stop": ["STOP"]});
    let body: Value = server
        .post("/v1/completions", &request)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(body["choices"][0]["text"], "Say ");
    let request = json!({"prompt": "a", "stop": ["STOP"], "stream": true});
    let events = events(server.post("/v1/completions", &request).await).await;
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, "Say ");
    assert_eq!(
        events[events.len() - 2]["choices"][0]["finish_reason"],
        "stop"
    );
}

#[tokio::test]
async fn the_beginning_of_a_stop_string_is_text_if_the_rest_never_comes() {
    let server = Server::start([Script::says("</think>An STO")]).await;
    let body = server.answer(json!({"stop": "STOP"})).await;
    assert_eq!(body["choices"][0]["message"]["content"], "An STO");
}

#[tokio::test]
async fn it_is_not_looked_for_among_the_least_tokens_of_an_answer() {
    // The mark has 8 tokens, "One " 4 more: the next one begins the word.
    let says = || Script::says_then("</think>One STOP, two STOP", Step::Hang);
    for (min_tokens, content) in [
        (0, "One "),
        (12, "One "),
        (13, "One STOP, two "),
        (16, "One STOP, two "),
        (20, "One STOP, two "),
    ] {
        let server = Server::start([says(), says()]).await;
        let parameters = json!({"stop": "STOP", "min_tokens": min_tokens, "max_tokens": 99});
        let body = server.answer(parameters.clone()).await;
        assert_eq!(
            body["choices"][0]["message"]["content"], content,
            "{min_tokens}"
        );
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        let events = server.stream(parameters).await;
        assert_eq!(said(&events, 0, "content"), content, "{min_tokens}");
    }
}
