//! Whatever goes wrong, the status says whose turn it is to act, and the body says why.

mod support;

use offbook_api::StreamError;
use offbook_protocol::{Phase, Rejection, RequestFailure};
use reqwest::Response;
use serde_json::{Value, json};
use support::{Script, Server, Step, report};

async fn failure(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    let error = body["error"].clone();
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| !message.is_empty()),
        "{body}"
    );
    assert!(
        error["type"].is_string() && error.get("param").is_some(),
        "{body}"
    );
    assert!(error.get("code").is_some(), "{body}");
    (status, error)
}

async fn raw(server: &Server, kind: &str, body: String) -> Response {
    let request = server
        .client
        .post(format!("{}/v1/chat/completions", server.url));
    request
        .header("content-type", kind)
        .body(body)
        .send()
        .await
        .unwrap()
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let server = Server::start([]).await;
    let json = "application/json";
    assert_eq!(
        failure(raw(&server, json, "{\"model\": ".into()).await)
            .await
            .0,
        400
    );
    assert_eq!(failure(raw(&server, json, "[]".into()).await).await.0, 400);
    assert_eq!(
        failure(raw(&server, json, "[".repeat(100_000)).await)
            .await
            .0,
        400
    );
    assert_eq!(
        failure(raw(&server, json, "\"\\ud800\"".into()).await)
            .await
            .0,
        400
    );
    assert_eq!(
        failure(raw(&server, "text/plain", "{}".into()).await)
            .await
            .0,
        415
    );
    let large = format!("{{\"user\": \"{}\"}}", "a".repeat(9 << 20));
    assert_eq!(failure(raw(&server, json, large).await).await.0, 413);
}

#[tokio::test]
async fn places_that_do_not_exist() {
    let server = Server::start([]).await;
    assert_eq!(failure(server.get("/v1/nothing").await).await.0, 404);
    let response = server.get("/v1/chat/completions").await;
    assert_eq!(response.headers()["allow"], "POST");
    assert_eq!(failure(response).await.0, 405);
    assert_eq!(
        failure(server.post("/health", &json!({})).await).await.0,
        405
    );
    for path in ["chat/completions/%ff", "completions/%ff", "models/%ff"] {
        let (status, error) = failure(server.get(&format!("/v1/{path}")).await).await;
        assert_eq!(
            (status, &error["code"]),
            (404, &json!("not_found")),
            "{path}"
        );
    }
    let (status, error) = failure(server.get("/v1/models/other/model").await).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
}

fn overloaded(retry_after_seconds: u32) -> Rejection {
    Rejection::Overloaded {
        queued: 64,
        tokens: 64_000,
        retry_after_seconds,
    }
}

#[tokio::test]
async fn who_is_refused_is_told_what_the_scheduler_expects() {
    let server = Server::start([7, 300].map(|seconds| Script::Reject(overloaded(seconds)))).await;
    for seconds in ["7", "300"] {
        let response = server.ask(json!({})).await;
        assert_eq!(response.headers()["retry-after"], seconds);
    }
    let not_begun = || {
        Step::Fail(StreamError::Failed(RequestFailure::NotBegun {
            seconds: 120,
            retry_after_seconds: 11,
        }))
    };
    let scripts = [(); 2].map(|()| Script::Answer(vec![not_begun()]));
    let server = Server::start(scripts).await;
    let response = server.ask(json!({})).await;
    assert_eq!(response.headers()["retry-after"], "11");
    let (status, error) = failure(response).await;
    assert_eq!(
        (status, &error["code"]),
        (503, &json!("queue_deadline_exceeded"))
    );
    let said = server.stream(json!({})).await;
    let last = said.last().unwrap();
    assert_eq!(last["error"]["code"], "queue_deadline_exceeded");
}

#[tokio::test]
async fn a_cluster_that_cannot_take_more_says_when_to_come_back() {
    let not_ready = Rejection::NotReady {
        detail: "the model is still loading".into(),
    };
    let cases = [
        (overloaded(7), 503, "overloaded"),
        (
            Rejection::ShareUsed {
                queued: 48,
                retry_after_seconds: 9,
            },
            429,
            "rate_limit_exceeded",
        ),
        (not_ready, 503, "not_ready"),
        (
            Rejection::TooLong {
                prompt_tokens: 9,
                completion_tokens: Some(7),
                context_tokens: 8,
            },
            400,
            "context_length_exceeded",
        ),
        (
            Rejection::Invalid {
                detail: "no such token".into(),
            },
            400,
            "invalid_value",
        ),
    ];
    for (rejection, expected, code) in cases {
        let rejections = [Script::Reject(rejection.clone()), Script::Reject(rejection)];
        let server = Server::start(rejections).await;
        for stream in [false, true] {
            let response = server.ask(json!({"stream": stream})).await;
            let retry = response.headers().contains_key("retry-after");
            assert_eq!(retry, expected >= 429, "{code}");
            let (status, error) = failure(response).await;
            assert_eq!((status, &error["code"]), (expected, &json!(code)));
        }
    }
}

#[tokio::test]
async fn one_rejected_choice_cancels_the_others() {
    let rejected = Script::Reject(overloaded(1));
    let mut server = Server::start([Script::says("x"), rejected]).await;
    assert_eq!(server.ask(json!({"n": 2})).await.status(), 503);
    server.submitted().await;
    server.submitted().await;
    assert_eq!(server.seen.recv().await, Some(support::Seen::Dropped));
}

#[tokio::test]
async fn health_says_whether_a_request_would_be_answered() {
    let server = Server::start([]).await;
    assert_eq!(server.get("/health").await.status(), 200);
    let gone = Err("the membership does not answer".to_owned());
    for not_ready in [
        Ok(report(Phase::Loading, "shard 1 reads its weights")),
        gone,
    ] {
        server.set_cluster(not_ready);
        let response = server.get("/health").await;
        assert!(response.headers().contains_key("retry-after"));
        let (status, error) = failure(response).await;
        assert_eq!((status, &error["code"]), (503, &json!("not_ready")));
    }
    assert_eq!(failure(server.get("/v1/cluster").await).await.0, 503);
    server.set_cluster(Ok(report(Phase::Failed, "")));
    let body: Value = server.get("/v1/cluster").await.json().await.unwrap();
    assert_eq!(
        (&body["phase"], &body["epoch"]),
        (&json!("failed"), &json!(3))
    );
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let server = Server::start([]).await;
    server.set_cluster(Err("nobody answers".into()));
    let list: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], support::MODEL);
    let max_model_len = &list["data"][0]["max_model_len"];
    assert_eq!(*max_model_len, support::CONTEXT, "nobody knows better");
    server.set_cluster(Ok(report(Phase::Ready, "")));
    let model: Value = server
        .get("/v1/models/tests/bytes")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        model["max_model_len"],
        report(Phase::Ready, "").context_tokens
    );
    let encoded: Value = server
        .get("/v1/models/tests%2Fbytes")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(encoded, model);
    let list: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(list["data"], json!([model]));
}

#[tokio::test]
async fn a_server_that_is_asked_to_stop_stops() {
    let server = Server::start([Script::says("</think>Hi")]).await;
    server.answer(json!({})).await;
    server.stop().await;
}
