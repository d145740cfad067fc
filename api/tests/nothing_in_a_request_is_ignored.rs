//! A parameter is honoured, or it asks for what is done anyway, or the request is refused and the
//! parameter named. None is accepted and forgotten.

mod support;

use offbook_protocol::LogitBias;
use serde_json::{Value, json};
use support::{ANSWERS_MAX, END, MODEL, Script, Server, question};

async fn refused(server: &Server, path: &str, body: Value) -> (String, String) {
    let response = server.post(path, &body).await;
    let status = response.status();
    let error: Value = response.json().await.unwrap();
    assert_eq!(status, 400, "{body} was answered with {error}");
    let error = &error["error"];
    assert_eq!(error["type"], "invalid_request_error");
    let param = error["param"]
        .as_str()
        .unwrap_or_else(|| panic!("{error} names no parameter"));
    assert!(
        error["message"].as_str().unwrap().contains(param),
        "{error}"
    );
    (param.to_owned(), error["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn what_cannot_be_honoured_in_a_chat_is_refused_by_name() {
    let server = Server::start([]).await;
    let tool = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let cases = [
        (json!({"temperature": 3}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 1.5}), "min_p"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (
            json!({"max_completion_tokens": -1}),
            "max_completion_tokens",
        ),
        (
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "max_tokens",
        ),
        (json!({"min_tokens": -2}), "min_tokens"),
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": 1}), "stop"),
        (json!({"stop_token_ids": [270]}), "stop_token_ids"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {}}), "stream_options"),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            "stream_options.x",
        ),
        (json!({"logprobs": 5}), "logprobs"),
        (json!({"top_logprobs": 5}), "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (json!({"n": 0}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": ANSWERS_MAX + 1}), "n"),
        (json!({"n": 1_u64 << 40}), "n"),
        (json!({"priority": 1001}), "priority"),
        (json!({"priority": -1001}), "priority"),
        (json!({"priority": 0.5}), "priority"),
        (json!({"frequency_penalty": 2.1}), "frequency_penalty"),
        (json!({"presence_penalty": "much"}), "presence_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": {"1": "5"}}), "logit_bias"),
        (json!({"logit_bias": {"270": 5}}), "logit_bias"),
        (json!({"logit_bias": {"a": 5}}), "logit_bias"),
        (json!({"logit_bias": {"1": 5, "01": 6}}), "logit_bias"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (tool(json!({"name": "a b"})), "tools[0].function.name"),
        (
            tool(json!({"name": "f", "strict": true})),
            "tools[0].function.strict",
        ),
        (
            tool(json!({"name": "f", "parameters": []})),
            "tools[0].function.parameters",
        ),
        (
            tool(json!({"name": "f", "colour": "red"})),
            "tools[0].function.colour",
        ),
        (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
        (json!({"store": true}), "store"),
        (json!({"user": 7}), "user"),
        (json!({"service_tier": "flex"}), "service_tier"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (
            json!({"chat_template_kwargs": {"tools": []}}),
            "chat_template_kwargs.tools",
        ),
        (json!({"surprise": 1}), "surprise"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hi"}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"model": 1}), "model"),
    ];
    for (parameters, expected) in cases {
        let (param, _) = refused(&server, "/v1/chat/completions", question(parameters)).await;
        assert_eq!(param, expected);
    }
}

#[tokio::test]
async fn what_cannot_be_honoured_in_a_completion_is_refused_by_name() {
    let server = Server::start([]).await;
    let cases = [
        (json!({}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [270]}), "prompt"),
        (json!({"prompt": {"text": "a"}}), "prompt"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "a", "logprobs": true}), "logprobs"),
        (json!({"prompt": "a", "echo": true}), "echo"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "best_of": 2}), "best_of"),
        (json!({"prompt": "a", "messages": []}), "messages"),
        // Forty-eight answers are what the queue takes.
        (json!({"prompt": vec!["a"; 25], "n": 2}), "prompt"),
    ];
    for (body, expected) in cases {
        assert_eq!(refused(&server, "/v1/completions", body).await.0, expected);
    }
}

#[tokio::test]
async fn as_many_answers_as_the_queue_takes_are_given_and_one_more_is_refused_with_the_number() {
    let answers = |n| vec![Script::says("</think>Hi"); n as usize];
    let server = Server::start(answers(ANSWERS_MAX)).await;
    let body = server.answer(json!({"n": ANSWERS_MAX})).await;
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.len(), ANSWERS_MAX as usize);
    let said = |choice: &Value| choice["message"]["content"] == "Hi";
    assert!(choices.iter().all(said), "{choices:?}");

    let refused = server.ask(json!({"n": ANSWERS_MAX + 1})).await;
    let body: Value = refused.json().await.unwrap();
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("from 1 to 48"), "{message}");
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_is_refused_with_numbers() {
    let server = Server::start([]).await;
    let long = json!({"prompt": vec![65; 4096]});
    let (param, code) = refused(&server, "/v1/completions", long.clone()).await;
    assert_eq!((&*param, &*code), ("prompt", "context_length_exceeded"));
    let body: Value = server
        .post("/v1/completions", &long)
        .await
        .json()
        .await
        .unwrap();
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!(
        message,
        "This model's maximum context length is 4096 tokens, but 4096 are in the prompt: shorten the prompt"
    );
    let body: Value = server
        .ask(json!({"max_tokens": 4096}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(body["error"]["param"], "messages");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("are in the prompt and 4096 were asked for: lower max_tokens"),
        "{message}"
    );
}

#[tokio::test]
async fn what_changes_no_answer_is_accepted() {
    let mut server = Server::start([Script::says("</think>Hi")]).await;
    server
        .answer(json!({
            "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
            "logit_bias": {}, "store": false, "user": "me", "metadata": {"a": "b"},
            "service_tier": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
            "tool_choice": "auto", "parallel_tool_calls": true, "n": 1, "stop": null, "seed": null,
            "min_tokens": 0, "top_logprobs": 0, "reasoning_effort": null, "top_k": -1,
        }))
        .await;
    assert_eq!(server.submitted().await.sampling.top_k, 0);
}

#[tokio::test]
async fn what_is_honoured_reaches_the_cluster() {
    let mut server = Server::start([Script::says("</think>Hi"), Script::says("</think>Hi")]).await;
    server
        .answer(json!({
            "temperature": 0.25, "top_p": 0.5, "top_k": 3, "min_p": 0.125, "seed": 42,
            "max_completion_tokens": 9, "stop_token_ids": [66, 67], "min_tokens": 2,
            "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25,
            "logit_bias": {"7": -100, "10": 2.5},
        }))
        .await;
    let request = server.submitted().await;
    let sampling = request.sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.min_p),
        (0.25, 0.5, 0.125)
    );
    assert_eq!(
        (sampling.top_k, sampling.seed, sampling.logprobs),
        (3, 42, None)
    );
    assert_eq!(
        (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.min_tokens
        ),
        (1.5, -0.5, 0.25, 2)
    );
    let biases = [(7, -100.0), (10, 2.5)].map(|(token, bias)| LogitBias { token, bias });
    assert_eq!(sampling.logit_bias, biases);
    assert_eq!(
        (request.max_tokens, request.stop_tokens),
        (9, vec![66, 67, END])
    );
    assert!(!request.max_tokens_by_default);
    assert_eq!(server.seen.recv().await, Some(support::Seen::Dropped));
    server
        .answer(json!({"ignore_eos": true, "min_tokens": 4, "max_tokens": 4}))
        .await;
    assert_eq!(server.submitted().await.stop_tokens, [0u32; 0]);
}

#[tokio::test]
async fn a_model_that_is_not_served_is_not_found() {
    let server = Server::start([Script::says("x"), Script::says("x")]).await;
    let response = server.ask(json!({"model": "gpt-4"})).await;
    assert_eq!(response.status(), 404);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "model_not_found");
    assert_eq!(body["error"]["param"], "model");
    for name in [json!("default"), Value::Null] {
        assert_eq!(server.answer(json!({"model": name})).await["model"], MODEL);
    }
}

#[tokio::test]
async fn clients_are_told_apart_by_key_then_by_user_and_say_their_priority() {
    let mut server = Server::start((0..7).map(|_| Script::says("</think>x"))).await;
    let mut asked = Vec::new();
    for (key, user) in [
        (None, None),
        (Some("Bearer first"), None),
        (Some("Bearer first"), Some("somebody")),
        (Some("bearer second"), None),
        (None, Some("somebody")),
        (None, Some("first")),
        (Some("Basic first"), None),
    ] {
        let url = format!("{}/v1/chat/completions", server.url);
        let body = support::question(json!({"user": user, "priority": -7}));
        let mut request = server.client.post(url).json(&body);
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        assert_eq!(request.send().await.unwrap().status(), 200);
        let request = loop {
            match server.seen.recv().await.unwrap() {
                support::Seen::Submitted(request) => break request,
                support::Seen::Dropped => {}
            }
        };
        assert_eq!(request.priority, -7);
        asked.push(request.client);
    }
    let [nobody, first, first_again, second, user, other_user, basic] = asked[..] else {
        panic!("seven were asked")
    };
    assert_eq!(first, first_again, "the key says it, whatever the user");
    assert_eq!(nobody, basic);
    let mut different = vec![nobody, first, second, user, other_user];
    different.sort();
    different.dedup();
    assert_eq!(different.len(), 5, "a user is not a key of the same name");
}
