//! Plain completions, with and without a tokenizer.

mod support;

use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{END, Script, Server, events};

async fn complete(server: &Server, body: Value) -> Value {
    let response = server.post("/v1/completions", &body).await;
    let status = response.status();
    let body: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{body}");
    body
}

#[tokio::test]
async fn a_model_without_tokenizer_continues_token_ids() {
    let script = || Script::tokens(&[7, 8, 9], FinishReason::Length);
    let mut server = Server::without_tokenizer([script(), script()]).await;
    let request = json!({"prompt": [1, 2, 3], "max_tokens": 3, "return_token_ids": true,
                         "logprobs": 0, "ignore_eos": true});
    let body = complete(&server, request.clone()).await;
    assert_eq!(server.submitted().await.prompt, [1, 2, 3]);
    let choice = &body["choices"][0];
    assert_eq!(body["object"], "text_completion");
    assert_eq!(choice["text"], "");
    assert_eq!(choice["token_ids"], json!([7, 8, 9]));
    assert_eq!(choice["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(
        choice["logprobs"]["token_logprobs"],
        json!([-0.25, -0.25, -0.25])
    );
    assert_eq!(choice["logprobs"]["tokens"][0], "token_id:7");
    assert_eq!(body["usage"]["total_tokens"], 6);
    let mut request = request;
    request["stream"] = json!(true);
    let events = events(server.post("/v1/completions", &request).await).await;
    assert_eq!(events.len(), 4, "one event per token, and the end");
    assert_eq!(
        events[0]["choices"][0]["prompt_token_ids"],
        json!([1, 2, 3])
    );
    assert_eq!(events[1]["choices"][0]["token_ids"], json!([8]));
    assert_eq!(events[2]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[3], "[DONE]");
}

#[tokio::test]
async fn a_model_without_tokenizer_says_what_it_cannot_do() {
    let server = Server::without_tokenizer([]).await;
    let text = server
        .post("/v1/completions", &json!({"prompt": "Hi"}))
        .await;
    let chat = server.ask(json!({})).await;
    for (response, param) in [(text, "prompt"), (chat, "messages")] {
        assert_eq!(response.status(), 400);
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["param"], param);
        assert!(
            body["error"]["message"]
                .as_str()
                .unwrap()
                .contains("no tokenizer")
        );
    }
}

#[tokio::test]
async fn text_goes_on_without_any_structure() {
    let mut server = Server::start([Script::says(" up</think> now"), Script::says("é!")]).await;
    let body = complete(&server, json!({"prompt": "Wake"})).await;
    assert_eq!(body["choices"][0]["text"], " up</think> now");
    assert_eq!(server.submitted().await.prompt, b"Wake".map(u32::from));
    let request = json!({"prompt": "Caf", "stream": true, "logprobs": 1,
                         "stream_options": {"include_usage": true}});
    let events = events(server.post("/v1/completions", &request).await).await;
    assert_eq!(events[0]["choices"][0]["text"], "é");
    assert_eq!(
        events[0]["choices"][0]["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        events[1]["choices"][0]["logprobs"]["text_offset"],
        json!([2])
    );
    let usage = &events[events.len() - 2];
    assert_eq!(usage["choices"], json!([]));
    let expected = json!({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0},
                          "completion_tokens": 4, "total_tokens": 7});
    assert_eq!(usage["usage"], expected);
}

#[tokio::test]
async fn several_prompts_have_several_answers() {
    let scripts = ["a1", "a2", "b1", "b2"].map(Script::says);
    let server = Server::start(scripts).await;
    let body = complete(
        &server,
        json!({"prompt": ["A", "BB"], "n": 2, "best_of": 2}),
    )
    .await;
    let texts: Vec<&Value> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| &choice["text"])
        .collect();
    assert_eq!(texts, ["a1", "a2", "b1", "b2"]);
    assert_eq!(body["choices"][3]["index"], 3);
    assert_eq!(body["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn the_token_that_ends_an_answer_is_not_in_its_text() {
    let script = Script::tokens(&[65, 66], FinishReason::Stop);
    let mut server = Server::start([script]).await;
    let request = json!({"prompt": "x", "stop_token_ids": [66], "return_token_ids": true});
    let body = complete(&server, request).await;
    assert_eq!(body["choices"][0]["text"], "A");
    assert_eq!(body["choices"][0]["token_ids"], json!([65, 66]));
    assert_eq!(server.submitted().await.stop_tokens, [66, END]);
}
