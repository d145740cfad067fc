//! Which web pages may use the API is said by its operator; unless it is, none may.

mod support;

use reqwest::header::{HeaderMap, HeaderName};
use reqwest::{Method, Response};
use serde_json::json;
use support::{Script, Server, question};

const PAGE: &str = "https://chat.example.org";
const OTHER: &str = "https://other.example.org";
const CHAT: &str = "/v1/chat/completions";

/// What a browser asks before it lets a page send JSON, a key and the usual client's own headers.
async fn preflight(server: &Server, page: &str) -> Response {
    let url = format!("{}{CHAT}", server.url);
    let asked = server.client.request(Method::OPTIONS, url);
    let asked = asked.header("Origin", page);
    let asked = asked.header("Access-Control-Request-Method", "POST");
    let headers = "authorization,content-type,last-event-id,x-request-id,x-stainless-os";
    let asked = asked.header("Access-Control-Request-Headers", headers);
    asked.send().await.unwrap()
}

async fn ask(server: &Server, page: &str) -> Response {
    let asked = server.client.post(format!("{}{CHAT}", server.url));
    let asked = asked.header("Origin", page).bearer_auth("key");
    asked.json(&question(json!({}))).send().await.unwrap()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let name: HeaderName = name.parse().unwrap();
    headers.get(name).map(|value| value.to_str().unwrap())
}

fn allowed(response: &Response) -> Option<&str> {
    header(response.headers(), "access-control-allow-origin")
}

#[tokio::test]
async fn and_has_none_by_default() {
    let server = Server::start([Script::says("</think>Hi")]).await;
    let refused = preflight(&server, PAGE).await;
    assert_eq!((refused.status().as_u16(), allowed(&refused)), (405, None));
    // Other programs do not ask, and need none.
    let answered = ask(&server, PAGE).await;
    assert_eq!(
        (answered.status().as_u16(), allowed(&answered)),
        (200, None)
    );
}

#[tokio::test]
async fn a_page_of_a_named_origin_has_it_and_no_other() {
    let scripts = [Script::says("</think>Hi"), Script::says("</think>Hi")];
    let server = Server::open_to(&[PAGE, "http://localhost:3000"], scripts).await;
    let leave = preflight(&server, PAGE).await;
    assert_eq!(
        (leave.status().as_u16(), allowed(&leave)),
        (200, Some(PAGE))
    );
    let headers = header(leave.headers(), "access-control-allow-headers").unwrap();
    for name in [
        "authorization",
        "content-type",
        "last-event-id",
        "x-request-id",
    ] {
        assert!(headers.contains(name), "{headers}");
    }
    let methods = header(leave.headers(), "access-control-allow-methods").unwrap();
    assert!(
        methods.contains("POST") && methods.contains("GET"),
        "{methods}"
    );
    let credentials = header(leave.headers(), "access-control-allow-credentials");
    assert_eq!(credentials, None, "there are no cookies");

    let answered = ask(&server, PAGE).await;
    assert_eq!(
        (answered.status().as_u16(), allowed(&answered)),
        (200, Some(PAGE))
    );
    let exposed = header(answered.headers(), "access-control-expose-headers").unwrap();
    assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"));
    // A refusal can be read too.
    let missing = server.client.get(format!("{}/v1/models/none", server.url));
    let missing = missing.header("Origin", PAGE).send().await.unwrap();
    assert_eq!(
        (missing.status().as_u16(), allowed(&missing)),
        (404, Some(PAGE))
    );

    assert_eq!(allowed(&preflight(&server, OTHER).await), None);
    assert_eq!(allowed(&ask(&server, OTHER).await), None);
}

#[tokio::test]
async fn or_every_page_has_it() {
    let server = Server::open_to(&["*"], [Script::says("</think>Hi")]).await;
    assert_eq!(allowed(&preflight(&server, OTHER).await), Some("*"));
    assert_eq!(allowed(&ask(&server, OTHER).await), Some("*"));
}
