//! What a model writes as tool calls, in the way that it was taught, reaches the client as OpenAI's.

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

/// A template as Qwen3's is: it shows how calls are written, looks backwards for the last question, cuts
/// old thoughts off, and closes an empty thought if the client wants none.
const QWEN3: &str = r#"
{%- if tools %}
    {{- '<|im_start|>system\nTools: <tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\nWrite <tool_call>\n{\"name\": NAME, \"arguments\": ARGUMENTS}\n</tool_call>" }}
    {{- "<|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(asking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.asking and message.role == "user" and message.content is string
        and not message.content.startswith('<tool_response>') %}
        {%- set ns.asking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"#;

const QWEN3_CALLS: &str = "<think>\nLook it up.\n</think>\n\nOne moment.\n<tool_call>\n\
    {\"name\": \"weather\", \"arguments\": {\"city\": \"K\u{f6}ln\", \"days\": 3}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

#[tokio::test]
async fn as_json_if_the_template_teaches_that() {
    let scripts = [Script::says(QWEN3_CALLS), Script::says(QWEN3_CALLS)];
    let server = Server::with_template(QWEN3, scripts).await;
    let body = server.answer(json!({"tools": tools()})).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let message = &choice["message"];
    assert_eq!(message["reasoning_content"], "Look it up.");
    assert_eq!(message["content"], "One moment.");
    let weather = json!({"name": "weather", "arguments": "{\"city\":\"K\u{f6}ln\",\"days\":3}"});
    assert_eq!(message["tool_calls"][0]["function"], weather);
    let now = json!({"name": "now", "arguments": "{}"});
    assert_eq!(message["tool_calls"][1]["function"], now);

    let events = server.stream(json!({"tools": tools()})).await;
    assert_eq!(said(&events, 0, "content"), "One moment.");
    assert_eq!(said(&events, 0, "reasoning_content"), "Look it up.");
    let last = &events[events.len() - 2];
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn an_answer_without_thought_has_none() {
    let mut server = Server::with_template(QWEN3, [Script::says("Rain.")]).await;
    let call = json!({"id": "call_1", "type": "function", "function": {
        "name": "weather", "arguments": "{\"days\": 3}"}});
    let body = server
        .answer(json!({"chat_template_kwargs": {"enable_thinking": false}, "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "<think>Hm.</think>\n\nOne moment.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]}))
        .await;
    assert_eq!(body["choices"][0]["message"]["content"], "Rain.");
    assert!(body["choices"][0]["message"]["reasoning_content"].is_null());
    let tokens = server.submitted().await.prompt;
    let bytes = tokens.iter().filter_map(|token| u8::try_from(*token).ok());
    let prompt = String::from_utf8(bytes.collect()).unwrap();
    let turn = "assistant\nOne moment.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": \
                {\"days\": 3}}\n</tool_call>";
    assert!(prompt.contains(turn), "{prompt}");
    assert!(!prompt.contains("Hm."), "{prompt}");
}
