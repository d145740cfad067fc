//! Clients of OpenAI's API read our objects and our streams without knowing us.

mod support;

use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{END, MODEL, Script, Server, said};

#[tokio::test]
async fn an_answer_is_one_object() {
    let server = Server::start([Script::says("Hm…\n</think>\n\nHällo!")]).await;
    let body = server.answer(json!({})).await;
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &body["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"], Value::Null);
    let message = json!({"role": "assistant", "content": "Hällo!", "refusal": null,
                         "reasoning_content": "Hm…"});
    assert_eq!(choice["message"], message);
    // Every byte is a token here, and the two marks, which the script spells out, are eight more.
    let generated = "Hm…\n</think>\n\nHällo!".len() + 1;
    let prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(body["usage"]["completion_tokens"], generated);
    assert_eq!(body["usage"]["total_tokens"], prompt + generated as u64);
}

#[tokio::test]
async fn a_stream_is_role_parts_finish_usage_and_done() {
    let mut server = Server::start([Script::says("Hm.</think>Hi")]).await;
    let options = json!({"stream_options": {"include_usage": true}, "seed": -1});
    let events = server.stream(options).await;
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(
        usage["usage"]["completion_tokens"],
        "Hm.</think>Hi".len() + 1
    );
    let id = &usage["id"];
    for chunk in chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(&chunk["id"], id);
        assert_eq!(chunk["usage"], Value::Null);
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
    }
    let role = json!({"role": "assistant", "content": ""});
    assert_eq!(chunks[0]["choices"][0]["delta"], role);
    let (last, middle) = chunks.split_last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert!(
        middle
            .iter()
            .all(|chunk| chunk["choices"][0]["finish_reason"].is_null())
    );
    assert_eq!(said(middle, 0, "reasoning_content"), "Hm.");
    assert_eq!(said(middle, 0, "content"), "Hi");
    assert_eq!(server.submitted().await.sampling.seed, u64::MAX);
}

#[tokio::test]
async fn usage_comes_only_if_it_was_asked_for() {
    let server = Server::start([Script::says("</think>Hi")]).await;
    let events = server.stream(json!({})).await;
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn the_conversation_reaches_the_model_in_its_own_words() {
    let mut server = Server::start([Script::says("</think>Hi")]).await;
    server.answer(json!({"messages": [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": "!"}]},
    ]}))
    .await;
    let request = server.submitted().await;
    let marks = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    let expected = [
        vec![256, 257],
        marks("system\nBe kind."),
        vec![258],
        marks("\n"),
        vec![257],
        marks("user\nHé!"),
        vec![258],
        marks("\n"),
        vec![257],
        marks("ai\n"),
        vec![259],
        marks("\n"),
    ];
    assert_eq!(request.prompt, expected.concat());
    assert_eq!(request.stop_tokens, [END]);
    assert_eq!(request.sampling.temperature, 0.5, "the model's own default");
    assert_eq!(
        request.max_tokens,
        support::CONTEXT - request.prompt.len() as u32
    );
}

#[tokio::test]
async fn the_reason_for_the_end_is_told() {
    let server = Server::start([Script::says_until_cut("</think>He")]).await;
    let body = server.answer(json!({"max_tokens": 10})).await;
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][0]["message"]["content"], "He");
}

#[tokio::test]
async fn a_thought_that_was_cut_is_still_a_thought() {
    let server = Server::start([Script::says_until_cut("I wonder")]).await;
    let body = server.answer(json!({})).await;
    let message = &body["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "I wonder");
    assert_eq!(message["content"], "");
}

#[tokio::test]
async fn log_probabilities_come_with_the_bytes_of_each_token() {
    let script = || Script::tokens(&[260, 0xC3, 0xA9, END], FinishReason::Stop);
    let mut server = Server::start([script(), script()]).await;
    let wanted = json!({"logprobs": true, "top_logprobs": 2});
    let body = server.answer(wanted.clone()).await;
    assert_eq!(server.submitted().await.sampling.logprobs, Some(2));
    let whole = &body["choices"][0]["logprobs"]["content"];
    assert_eq!(whole.as_array().unwrap().len(), 4);
    assert_eq!(whole[0]["token"], "</think>");
    assert_eq!(whole[1]["bytes"], json!([0xC3]));
    assert_eq!(whole[1]["token"], "\u{FFFD}");
    assert_eq!(whole[1]["logprob"], -0.25);
    let impossible = json!({"token": "\u{FFFD}", "logprob": -9999.0, "bytes": [0xC3]});
    assert_eq!(whole[1]["top_logprobs"][1], impossible);
    let streamed: Vec<Value> = server
        .stream(wanted)
        .await
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
        })
        .flatten()
        .collect();
    assert_eq!(whole, &json!(streamed), "each token is told of once");
}

#[tokio::test]
async fn several_choices_have_seeds_of_their_own() {
    let scripts = || [Script::says("</think>one"), Script::says("</think>two")];
    let mut server = Server::start(scripts().into_iter().chain(scripts())).await;
    let body = server.answer(json!({"n": 2, "seed": 7})).await;
    assert_eq!(body["choices"][0]["message"]["content"], "one");
    assert_eq!(body["choices"][1]["message"]["content"], "two");
    assert_eq!(body["choices"][1]["index"], 1);
    assert_eq!(server.submitted().await.sampling.seed, 7);
    assert_eq!(server.submitted().await.sampling.seed, 8);
    let events = server.stream(json!({"n": 2})).await;
    assert_eq!(said(&events, 0, "content"), "one");
    assert_eq!(said(&events, 1, "content"), "two");
    assert_eq!(events.iter().filter(|event| *event == "[DONE]").count(), 1);
}

#[tokio::test]
async fn token_ids_come_if_they_were_asked_for() {
    let script = || Script::tokens(&[260, 65, END], FinishReason::Stop);
    let server = Server::start([script(), script()]).await;
    let body = server.answer(json!({"return_token_ids": true})).await;
    assert_eq!(body["choices"][0]["token_ids"], json!([260, 65, END]));
    assert_eq!(body["prompt_token_ids"][0], 256);
    let events = server.stream(json!({"return_token_ids": true})).await;
    assert_eq!(events[0]["prompt_token_ids"], body["prompt_token_ids"]);
    let ids: Vec<Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["token_ids"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(json!(ids), json!([260, 65, END]));
}
