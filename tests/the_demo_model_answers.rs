//! The main job: three nodes compute the demo model together, and a client that speaks OpenAI's API
//! gets right answers from it, streaming or not, with its tools called in form.

mod support;

use serde_json::{Value, json};
use support::{Cluster, offbook};

#[test]
fn what_its_card_promises() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let prompts = include_str!("../demo/prompts.json");
    let prompts: Vec<Value> = serde_json::from_str(prompts).expect("it is JSON");
    let plain = prompts
        .iter()
        .filter(|item| item["tools"].is_null() && item["contains"].is_string());
    let mut asked = 0;
    for item in plain.take(8) {
        let prompt = item["prompt"].as_str().expect("a prompt");
        let (status, answer) = cluster.post("/v1/chat/completions", &chat(prompt));
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        let content = choice["message"]["content"].as_str().expect("an answer");
        let wanted = item["contains"].as_str().expect("what it contains");
        assert!(
            content.contains(wanted),
            "{prompt}: {content:?} lacks {wanted:?}"
        );
        assert_eq!(choice["finish_reason"], "stop");
        asked += 1;
    }
    assert!(asked > 3, "only {asked} prompts were there to ask");
}

#[test]
fn as_a_stream_of_chunks() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let mut request = chat("What is 47 + 85?");
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let events: Vec<Value> = cluster.stream("/v1/chat/completions", &request).collect();
    let (done, chunks) = events.split_last().expect("there are events");
    assert_eq!(done, "[DONE]");
    let mut content = String::new();
    for chunk in chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk", "{chunk}");
        content += chunk["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or_default();
    }
    assert!(content.contains("132"), "{content:?}");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let usage = &chunks.last().expect("it has chunks")["usage"];
    assert!(usage["completion_tokens"].as_u64() > Some(0), "{usage}");
}

#[test]
fn with_a_tool_call_in_form() {
    let cluster = Cluster::up(&["--nodes", "2"]);
    let mut request = chat("What is the weather in Lisbon?");
    request["tools"] = json!([{
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather for a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }]);
    let (status, answer) = cluster.post("/v1/chat/completions", &request);
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let call = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "get_weather");
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().expect("text"))
        .expect("arguments are JSON");
    assert_eq!(arguments, json!({"city": "Lisbon"}));
}

#[test]
fn on_the_command_line() {
    let output = offbook()
        .args(["generate", "--nodes", "2", "--prompt", "What is 47 + 85?"])
        .output()
        .expect("offbook runs");
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).expect("text");
    assert!(said.contains("132"), "{said}");
}

fn chat(prompt: &str) -> Value {
    json!({"messages": [{"role": "user", "content": prompt}], "temperature": 0})
}
