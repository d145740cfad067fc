//! `usage.prompt_tokens_details.cached_tokens` is how much of the prompts the cluster found computed:
//! of each prompt once, however many answers it has, streamed or not.

mod support;

use offbook_protocol::FinishReason;
use serde_json::{Value, json};
use support::{Script, Server, events};

fn cached(usage: &Value) -> &Value {
    &usage["prompt_tokens_details"]["cached_tokens"]
}

#[tokio::test]
async fn of_a_chat() {
    let script = |tokens| Script::says("</think>Hi").finding(tokens);
    let server = Server::start([script(0), script(5), script(6)]).await;
    let first = server.answer(json!({})).await;
    assert_eq!(cached(&first["usage"]), 0);
    let second = server.answer(json!({})).await;
    assert_eq!(cached(&second["usage"]), 5);
    let prompt_tokens = &first["usage"]["prompt_tokens"];
    assert_eq!(&second["usage"]["prompt_tokens"], prompt_tokens);
    let options = json!({"stream_options": {"include_usage": true}});
    let streamed = server.stream(options).await;
    assert_eq!(cached(&streamed[streamed.len() - 2]["usage"]), 6);
}

#[tokio::test]
async fn of_several_answers_to_several_prompts() {
    let found = [0, 2, 3, 1, 0, 2, 3, 1];
    let script = |tokens| Script::tokens(&[7, 8], FinishReason::Length).finding(tokens);
    let server = Server::without_tokenizer(found.map(script)).await;
    let mut request = json!({"prompt": [[1, 2, 3], [1, 2, 3, 4]], "n": 2, "max_tokens": 2});
    let whole = server.post("/v1/completions", &request).await;
    let whole: Value = whole.json().await.unwrap();
    let expected = json!({"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1},
                          "completion_tokens": 8, "total_tokens": 15});
    assert_eq!(whole["usage"], expected);
    request["stream"] = json!(true);
    request["stream_options"] = json!({"include_usage": true});
    let streamed = events(server.post("/v1/completions", &request).await).await;
    assert_eq!(streamed[streamed.len() - 2]["usage"], expected);
}
