//! The load generator against a server of a few lines, which answers as a test tells it.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// Reads one request; the body as JSON.
async fn read(connection: &mut TcpStream) -> (String, Value) {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_ascii_lowercase();
            let length = length
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            if body.len() >= length {
                let line = head.lines().next().unwrap().to_owned();
                return (line, serde_json::from_str(body).unwrap_or_default());
            }
        }
        let mut more = [0; 4096];
        let count = connection.read(&mut more).await.unwrap();
        bytes.extend(&more[..count]);
    }
}

/// A server that refuses every fourth request, and streams `max_tokens` tokens to the others.
async fn server(most_at_once: Arc<AtomicU32>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (asked, under_way) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            let (asked, under_way) = (Arc::clone(&asked), Arc::clone(&under_way));
            let most_at_once = Arc::clone(&most_at_once);
            tokio::spawn(async move {
                let (line, body) = read(&mut connection).await;
                let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
                if line.starts_with("GET /v1/models") {
                    let models = format!("{head}{{\"data\":[{{\"id\":\"some\"}}]}}");
                    return connection.write_all(models.as_bytes()).await.unwrap();
                }
                assert_eq!(line, "POST /v1/completions HTTP/1.1");
                assert_eq!(body["model"], "some");
                if asked.fetch_add(1, Ordering::SeqCst) % 4 == 3 {
                    let refusal = "HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\n\r\n";
                    return connection.write_all(refusal.as_bytes()).await.unwrap();
                }
                most_at_once.fetch_max(
                    under_way.fetch_add(1, Ordering::SeqCst) + 1,
                    Ordering::SeqCst,
                );
                connection.write_all(head.as_bytes()).await.unwrap();
                let words = body["prompt"]
                    .as_str()
                    .map_or(0, |words| words.split(' ').count());
                // A long prompt takes a while.
                tokio::time::sleep(Duration::from_millis(if words >= 50 { 100 } else { 0 })).await;
                let tokens = body["max_tokens"].as_u64().unwrap();
                for _ in 0..tokens {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    let event = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
                    connection.write_all(event.as_bytes()).await.unwrap();
                }
                under_way.fetch_sub(1, Ordering::SeqCst);
                let usage = json!({"choices": [], "usage": {"completion_tokens": tokens}});
                let last = format!("data: {usage}\n\ndata: [DONE]\n\n");
                connection.write_all(last.as_bytes()).await.unwrap();
            });
        }
    });
    url
}

fn options(urls: Vec<String>) -> BenchServe {
    BenchServe {
        url: urls,
        model: None,
        requests: 16,
        concurrency: vec![3],
        input_tokens: 8,
        output_tokens: 10,
        token_ids_below: None,
        rate: None,
        beside_prompt: None,
        beside_after: Duration::from_millis(200),
        seed: 1,
        timeout: Duration::from_secs(60),
        json: true,
    }
}

#[tokio::test]
async fn answers_are_counted_timed_and_bounded_and_refusals_told_by_status() {
    let most = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    let urls = vec![
        server(Arc::clone(&most[0])).await,
        server(Arc::clone(&most[1])).await,
    ];
    let options = options(urls.clone());
    let mut servers = Vec::new();
    for url in &urls {
        let found = Server::find(url, None, options.timeout).await.unwrap();
        servers.push(Arc::new(found));
    }
    let measured = measure(&options, &servers, 3).await;
    assert_eq!(measured.len(), 2);
    for (figures, url) in measured.iter().zip(&urls) {
        let figures = figures.json();
        assert_eq!(figures["url"], json!(url));
        assert_eq!(figures["requests"], 12);
        assert_eq!(figures["output_tokens"], 120);
        assert_eq!(figures["errors"], json!({"429": 4}));
        for (what, least) in [("ttft_ms", 5.0), ("itl_ms", 4.0)] {
            let median = figures[what]["p50"].as_f64().unwrap();
            assert!(median >= least, "{figures}");
            assert!(figures[what]["p99"].as_f64().unwrap() >= median);
        }
        // Tokens are 5 ms apart, and at most three answers are under way.
        let speed = figures["output_tokens_per_second"].as_f64().unwrap();
        assert!(speed > 0.0 && speed <= 600.0, "{figures}");
    }
    for most in most {
        assert!((2..=3).contains(&most.load(Ordering::SeqCst)));
    }
}

#[tokio::test]
async fn what_streams_wait_for_before_and_while_a_prompt_is_read_is_told_apart() {
    let url = server(Arc::default()).await;
    let options = BenchServe {
        output_tokens: 200,
        beside_prompt: Some(50),
        ..options(vec![url.clone()])
    };
    let server = Arc::new(Server::find(&url, None, options.timeout).await.unwrap());
    let seen = beside::measure(&options, &server, 2, 50).await.unwrap();
    let seen = seen.json();
    assert_eq!(seen["prompt_tokens"], 50);
    for phase in ["itl_before_ms", "itl_during_ms"] {
        // Tokens are 5 ms apart, whoever asks.
        assert!(seen[phase]["p50"].as_f64().unwrap() >= 4.0, "{seen}");
    }
    assert!(seen["p99_of_p50"].as_f64().unwrap() >= 1.0, "{seen}");
    // The fourth request of this server is refused; and streams must outlast the prompt.
    let refused = beside::measure(&options, &server, 1, 50).await;
    assert!(refused.is_err());
    let short = BenchServe {
        output_tokens: 2,
        ..options
    };
    let error = beside::measure(&short, &server, 1, 50).await.err().unwrap();
    assert!(
        format!("{error:#}").contains("--output-tokens"),
        "{error:#}"
    );
}

#[tokio::test]
async fn half_an_answer_is_none() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for last in ["", "data: {\"error\":{\"code\":\"shard_lost\"}}\n\n"] {
            let (mut connection, _) = listener.accept().await.unwrap();
            read(&mut connection).await;
            let said = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n\
                 data: {{\"choices\":[{{\"text\":\"a\"}}]}}\n\n{last}"
            );
            connection.write_all(said.as_bytes()).await.unwrap();
        }
    });
    let server = Server::find(&url, Some("some"), Duration::from_secs(60))
        .await
        .unwrap();
    for why in ["broken off", "shard_lost"] {
        assert_eq!(server.ask(&json!({})).await, Answer::Failed(why.into()));
    }
}

#[test]
fn prompts_follow_from_the_seed_and_differ_from_each_other() {
    let prompts = |options: &BenchServe| -> Vec<Value> {
        let requests = requests(options, 3);
        requests
            .into_iter()
            .map(|due| due.body["prompt"].clone())
            .collect()
    };
    let words = options(Vec::new());
    assert_eq!(prompts(&words), prompts(&words));
    let tokens = BenchServe {
        token_ids_below: Some(100),
        rate: Some(10.0),
        ..options(Vec::new())
    };
    let mut ids = prompts(&tokens);
    assert!(
        ids.iter()
            .all(|prompt| prompt.as_array().is_some_and(|ids| ids.len() == 8))
    );
    ids.sort_by_key(Value::to_string);
    ids.dedup();
    assert_eq!(ids.len(), 16);
    let paused: Duration = requests(&tokens, 3).iter().map(|due| due.pause).sum();
    assert!(
        (0.2..10.0).contains(&paused.as_secs_f64()),
        "16 at 10 per second"
    );
}

#[test]
fn a_percentile_is_a_value_that_was_measured() {
    let sorted: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
    assert_eq!(figures::percentile(&sorted, 0.5), Some(50.0));
    assert_eq!(figures::percentile(&sorted, 0.99), Some(99.0));
    assert_eq!(figures::percentile(&sorted[..1], 0.99), Some(1.0));
    assert_eq!(figures::percentile(&[], 0.5), None);
}

#[test]
fn a_block_is_long_enough_for_all_that_run_at_once() {
    assert_eq!(per_block(256, 2, 16), 64, "four turns each");
    assert_eq!(per_block(16, 2, 16), 64, "one turn");
    assert_eq!(per_block(16, 2, 1), 4);
    assert_eq!(per_block(16, 1, 1), 16, "nobody to take turns with");
}
