//! What a model writes as MiniMax's tool calls reaches the client as OpenAI's.

mod support;

use serde_json::{Value, json};
use support::{Script, Seen, Server, Step, said};

const CALLS: &str = "Look it up.</think>\n\nOne moment.\n<minimax:tool_call>\n\
    <invoke name=\"weather\">\n<parameter name=\"city\">\"Köln\" & 5</parameter>\n\
    <parameter name=\"days\">3</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n\
    </minimax:tool_call>";

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}},
        {"type": "function", "function": {"name": "now", "strict": false}},
    ])
}

#[tokio::test]
async fn in_one_object() {
    let server = Server::start([Script::says(CALLS)]).await;
    let body = server.answer(json!({"tools": tools()})).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "One moment.");
    let calls = &choice["message"]["tool_calls"];
    assert_eq!(calls[0]["type"], "function");
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    let weather = json!({"name": "weather", "arguments": r#"{"city":"\"Köln\" & 5","days":3}"#});
    assert_eq!(calls[0]["function"], weather);
    assert_eq!(
        calls[1]["function"],
        json!({"name": "now", "arguments": "{}"})
    );
}

#[tokio::test]
async fn in_a_stream() {
    let server = Server::start([Script::says(CALLS)]).await;
    let events = server.stream(json!({"tools": tools()})).await;
    assert_eq!(said(&events, 0, "content"), "One moment.");
    let deltas: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0))
        .collect();
    assert_eq!(
        deltas[0]["function"],
        json!({"name": "weather", "arguments": ""})
    );
    let mut arguments = [String::new(), String::new()];
    for delta in &deltas {
        let index = delta["index"].as_u64().unwrap() as usize;
        arguments[index] += delta["function"]["arguments"].as_str().unwrap();
    }
    assert_eq!(arguments[0], r#"{"city":"\"Köln\" & 5","days":3}"#);
    assert_eq!(arguments[1], "{}");
    assert_eq!(
        deltas
            .iter()
            .filter(|delta| delta["id"].is_string())
            .count(),
        2
    );
    let last = &events[events.len() - 2];
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn none_are_looked_for_when_none_may_be_made() {
    let server = Server::start([Script::says(CALLS), Script::says(CALLS)]).await;
    for parameters in [json!({"tools": tools(), "tool_choice": "none"}), json!({})] {
        let body = server.answer(parameters).await;
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        let content = body["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(content.contains("<minimax:tool_call>"), "{content}");
    }
}

#[tokio::test]
async fn one_at_a_time_if_the_client_wants_it() {
    let call = CALLS.split_once("<invoke name=\"now\">").unwrap().0;
    let mut server = Server::start([Script::says_then(call, Step::Hang)]).await;
    let body = server
        .answer(json!({"tools": tools(), "parallel_tool_calls": false}))
        .await;
    assert_eq!(
        body["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(Seen::Dropped));
}

#[tokio::test]
async fn results_reach_the_model() {
    let mut server = Server::start([Script::says("</think>3 o'clock.")]).await;
    let call = json!({"id": "call_1", "type": "function", "function": {
        "name": "weather", "arguments": "{\"city\": \"Köln\", \"days\": 3}"}});
    server
        .answer(json!({"tools": tools(), "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]}))
        .await;
    let prompt = server.submitted().await.prompt;
    let bytes: Vec<u8> = prompt
        .iter()
        .filter_map(|token| u8::try_from(*token).ok())
        .collect();
    let prompt = String::from_utf8(bytes).unwrap();
    let asked = "<parameter name=\"city\">Köln</parameter>\n<parameter name=\"days\">3</parameter>";
    assert!(prompt.contains(asked), "{prompt}");
    assert!(prompt.contains("<response>rain</response>"), "{prompt}");
}
