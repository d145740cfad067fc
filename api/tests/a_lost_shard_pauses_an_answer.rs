//! When a shard dies in the middle of an answer, the client sees a pause, in comments that every
//! client passes over, and then the rest of the answer, as if nothing had happened.

mod support;

use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{END, Script, Server, Step, said, token};

fn paused(before: &str, seconds: u64, after: &str) -> Script {
    let says = |text: &str| -> Vec<Step> {
        text.bytes()
            .map(|byte| Step::Token(token(u32::from(byte), None)))
            .collect()
    };
    let end = Step::Token(token(END, Some(FinishReason::Stop)));
    let steps = [
        says(before),
        vec![Step::Pause(seconds)],
        says(after),
        vec![end],
    ];
    Script::Answer(steps.into_iter().flatten().collect())
}

/// The comments of a stream's body, and its events. Clients that take every empty line for the end of an
/// event, once one had a number, must not find one without data.
fn read(body: &str) -> (Vec<&str>, Vec<Value>) {
    for event in body.trim_end().split("\n\n") {
        assert!(
            event.lines().any(|line| line.starts_with("data: ")),
            "{event:?}"
        );
    }
    let comments = body.lines().filter_map(|line| line.strip_prefix(": "));
    let data = body.lines().filter_map(|line| line.strip_prefix("data: "));
    let events = data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)));
    (comments.collect(), events.collect())
}

#[tokio::test(start_paused = true)]
async fn a_stream_tells_of_it_in_comments() {
    let whole = Script::says("</think>One answer");
    let script = paused("</think>One", 10, " answer");
    let server = Server::start([whole, script]).await;
    let undisturbed = server.stream(json!({})).await;

    let body = server
        .ask(json!({"stream": true}))
        .await
        .text()
        .await
        .unwrap();
    let (comments, events) = read(&body);
    let [first, rest @ ..] = &comments[..] else {
        panic!("nothing was said: {body}")
    };
    assert_eq!(
        *first,
        "a shard was lost, the answer goes on when its successor is ready"
    );
    assert!((2..=5).contains(&rest.len()), "in 10 s: {rest:?}");
    let pieces = |events: &[Value]| {
        let mut pieces = events.to_vec();
        for piece in pieces.iter_mut().filter(|piece| piece.is_object()) {
            piece["id"] = Value::Null;
            piece["created"] = Value::Null;
        }
        pieces
    };
    assert_eq!(pieces(&events), pieces(&undisturbed));
    assert_eq!(said(&events, 0, "content"), "One answer");
}

#[tokio::test(start_paused = true)]
async fn a_whole_answer_is_whole() {
    let whole = Script::says("</think>One answer");
    let server = Server::start([whole, paused("</think>One", 10, " answer")]).await;
    let [undisturbed, disturbed] = [
        server.answer(json!({})).await,
        server.answer(json!({})).await,
    ];
    for part in ["choices", "usage"] {
        assert_eq!(disturbed[part], undisturbed[part]);
    }
}

#[tokio::test(start_paused = true)]
async fn several_choices_pause_once() {
    let script = || paused("</think>a", 2, "b");
    let server = Server::start([script(), script()]).await;
    let response = server.ask(json!({"stream": true, "n": 2})).await;
    let body = response.text().await.unwrap();
    let (comments, events) = read(&body);
    assert_eq!(comments.len(), 1, "{comments:?}");
    for choice in [0, 1] {
        assert_eq!(said(&events, choice, "content"), "ab");
    }
}
