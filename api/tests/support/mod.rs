//! A server over real HTTP in front of a scripted cluster, and a model whose tokens are bytes: token
//! 65 is `A`, and every character beyond ASCII takes several tokens.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use offbook_api::text::{Defaults, Text};
use offbook_api::{Backend, Origin, Progress, Service, StreamError, Tokens};
use offbook_protocol::{
    Candidate, ClusterReport, Epoch, FinishReason, KvFigures, Layout, MemoryFigures, Phase, Rank,
    Rejection, Request, SampledToken, SequenceId, ShardSteps, StepHistograms, ThrottleFigures,
    Transport,
};
use reqwest::{Client, Response};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// The end of a turn; the one token at which answers end.
pub(crate) const END: u32 = 258;
pub(crate) const VOCABULARY: u32 = 270;
pub(crate) const CONTEXT: u32 = 4096;
/// What the cluster's queue takes of one client.
pub(crate) const ANSWERS_MAX: u32 = 48;
pub(crate) const MODEL: &str = "tests/bytes";

/// How long answers may go on when the server is asked to stop.
pub(crate) const DRAIN: Duration = Duration::from_secs(20);

/// One thing that the scripted cluster does.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Token(SampledToken),
    Fail(StreamError),
    /// A shard is lost, and comes back after so many seconds.
    Pause(u64),
    /// Nothing comes until it is told to.
    Wait(Arc<Notify>),
    /// Nothing more comes, and yet the stream is open.
    Hang,
}

/// The answer to one request.
#[derive(Clone, Debug)]
pub(crate) enum Script {
    Answer(Vec<Step>),
    Reject(Rejection),
}

impl Script {
    /// This text, byte by byte, and then the token that ends an answer.
    pub(crate) fn says(text: &str) -> Self {
        let mut tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        tokens.push(END);
        Self::tokens(&tokens, FinishReason::Stop)
    }

    /// This text, cut off at the greatest length.
    pub(crate) fn says_until_cut(text: &str) -> Self {
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        Self::tokens(&tokens, FinishReason::Length)
    }

    pub(crate) fn tokens(tokens: &[u32], finish: FinishReason) -> Self {
        let last = tokens.len() - 1;
        let step =
            |(place, id): (usize, &u32)| Step::Token(token(*id, (place == last).then_some(finish)));
        Self::Answer(tokens.iter().enumerate().map(step).collect())
    }

    /// The same, of a cluster that has computed so many tokens of the prompt before.
    pub(crate) fn finding(self, cached_tokens: u32) -> Self {
        let Self::Answer(mut steps) = self else {
            return self;
        };
        if let Some(Step::Token(token)) = steps.first_mut() {
            token.cached_tokens = cached_tokens;
        }
        Self::Answer(steps)
    }

    /// This text, and then what `last` does.
    pub(crate) fn says_then(text: &str, last: Step) -> Self {
        let says = text
            .bytes()
            .map(|byte| Step::Token(token(u32::from(byte), None)));
        Self::Answer(says.chain([last]).collect())
    }
}

pub(crate) fn token(id: u32, finish: Option<FinishReason>) -> SampledToken {
    let top = vec![
        Candidate {
            token: id,
            logprob: -0.25,
        },
        Candidate {
            token: 0xC3,
            logprob: f32::NEG_INFINITY,
        },
    ];
    SampledToken {
        sequence: SequenceId(1),
        token: id,
        logprob: Some(-0.25),
        top,
        cached_tokens: 0,
        finish,
    }
}

/// What the cluster was asked for, and what became of it.
#[derive(Debug, PartialEq)]
pub(crate) enum Seen {
    Submitted(Request),
    /// The tokens were dropped.
    Dropped,
}

struct Scripted {
    scripts: Mutex<VecDeque<Script>>,
    report: Mutex<Result<ClusterReport, String>>,
    seen: UnboundedSender<Seen>,
}

impl Backend for Scripted {
    fn submit(&self, request: Request) -> BoxFuture<'_, Result<Tokens, Rejection>> {
        self.seen.send(Seen::Submitted(request)).unwrap();
        let script = self
            .scripts
            .lock()
            .unwrap()
            .pop_front()
            .expect("an answer is scripted");
        let steps = match script {
            Script::Reject(rejection) => return async { Err(rejection) }.boxed(),
            Script::Answer(steps) => steps,
        };
        let told = TellsWhenDropped(self.seen.clone());
        let mut comes_back = None;
        let tokens = stream::iter(steps).then(move |step| {
            let _told = &told;
            let pause = comes_back.take();
            if let Step::Pause(seconds) = step {
                comes_back = Some(Duration::from_secs(seconds));
            }
            async move {
                if let Step::Wait(told) = &step {
                    told.notified().await;
                }
                if let Some(pause) = pause {
                    tokio::time::sleep(pause).await;
                }
                match step {
                    Step::Token(token) => Ok(Progress::Token(token)),
                    Step::Pause(_) | Step::Wait(_) => Ok(Progress::Paused),
                    Step::Fail(error) => Err(error),
                    Step::Hang => std::future::pending().await,
                }
            }
        });
        async { Ok(tokens.boxed() as Tokens) }.boxed()
    }

    fn cluster(&self) -> BoxFuture<'_, Result<ClusterReport, String>> {
        let report = self.report.lock().unwrap().clone();
        async { report }.boxed()
    }

    fn steps(&self) -> BoxFuture<'_, Vec<ShardSteps>> {
        let mut steps = ShardSteps {
            rank: Rank(0),
            node: "node-1".into(),
            decode: StepHistograms::default(),
            prefill: StepHistograms::default(),
            kv: KvFigures {
                in_use_tokens: 512,
                retained_tokens: 256,
                capacity_tokens: 4096,
                preemptions: 3,
            },
            memory: MemoryFigures {
                active_bytes: 7_000_000_000,
                cache_bytes: 5,
                peak_bytes: 8_000_000_000,
                limit_bytes: 9_000_000_000,
            },
            throttle: ThrottleFigures {
                prefill_window: 15,
                decode_window: 100,
                chunk_permille: 500,
                shrinks: 1,
                cache_clears: 2,
            },
        };
        steps.decode.total.observe(Duration::from_millis(3));
        async { vec![steps] }.boxed()
    }
}

struct TellsWhenDropped(UnboundedSender<Seen>);

impl Drop for TellsWhenDropped {
    fn drop(&mut self) {
        // The test may be over.
        let _ = self.0.send(Seen::Dropped);
    }
}

/// A server for one test.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) client: Client,
    pub(crate) seen: UnboundedReceiver<Seen>,
    backend: Arc<Scripted>,
    stop: tokio::sync::oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// With tokenizer and the demo model's chat template.
    pub(crate) async fn start(scripts: impl IntoIterator<Item = Script>) -> Self {
        Self::of(&bytes_model(), scripts).await
    }

    /// With another chat template.
    pub(crate) async fn with_template(
        template: &str,
        scripts: impl IntoIterator<Item = Script>,
    ) -> Self {
        let model = bytes_model();
        fs::write(model.path().join("chat_template.jinja"), template).unwrap();
        Self::of(&model, scripts).await
    }

    /// For web pages of these origins too.
    pub(crate) async fn open_to(
        origins: &[&str],
        scripts: impl IntoIterator<Item = Script>,
    ) -> Self {
        let origins = origins.iter().map(|origin| origin.parse().unwrap());
        let model = bytes_model();
        let text = Text::open(model.path()).unwrap();
        let defaults = Defaults::open(model.path()).unwrap();
        Self::serve_to(origins.collect(), scripts, Some(text), defaults).await
    }

    async fn of(model: &TempDir, scripts: impl IntoIterator<Item = Script>) -> Self {
        let text = Text::open(model.path()).unwrap();
        Self::serve(scripts, Some(text), Defaults::open(model.path()).unwrap()).await
    }

    pub(crate) async fn without_tokenizer(scripts: impl IntoIterator<Item = Script>) -> Self {
        let defaults = Defaults {
            stop_tokens: vec![END],
            ..Defaults::default()
        };
        Self::serve(scripts, None, defaults).await
    }

    async fn serve(
        scripts: impl IntoIterator<Item = Script>,
        text: Option<Text>,
        defaults: Defaults,
    ) -> Self {
        Self::serve_to(Vec::new(), scripts, text, defaults).await
    }

    async fn serve_to(
        origins: Vec<Origin>,
        scripts: impl IntoIterator<Item = Script>,
        text: Option<Text>,
        defaults: Defaults,
    ) -> Self {
        let (seen_tx, seen) = unbounded_channel();
        let backend = Arc::new(Scripted {
            scripts: Mutex::new(scripts.into_iter().collect()),
            report: Mutex::new(Ok(report(Phase::Ready, ""))),
            seen: seen_tx,
        });
        let service = Service {
            backend: backend.clone(),
            text,
            defaults,
            model_id: MODEL.into(),
            context_tokens: CONTEXT,
            vocabulary: VOCABULARY,
            answers_max: ANSWERS_MAX,
            created: 1_700_000_000,
            journal: None,
            origins,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shutdown = async move { drop(stopped.await) };
        let served = tokio::spawn(offbook_api::serve(
            listener,
            Arc::new(service),
            DRAIN,
            shutdown,
        ));
        Self {
            url,
            client: Client::new(),
            seen,
            backend,
            stop,
            served,
        }
    }

    pub(crate) fn set_cluster(&self, report: Result<ClusterReport, String>) {
        *self.backend.report.lock().unwrap() = report;
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.client
            .get(format!("{}{path}", self.url))
            .send()
            .await
            .unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.client
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// A chat completion with one question, and these parameters besides.
    pub(crate) async fn ask(&self, parameters: Value) -> Response {
        self.post("/v1/chat/completions", &question(parameters))
            .await
    }

    /// The same, which has to succeed.
    pub(crate) async fn answer(&self, parameters: Value) -> Value {
        let response = self.ask(parameters).await;
        let status = response.status();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The same, streamed to its end.
    pub(crate) async fn stream(&self, parameters: Value) -> Vec<Value> {
        let mut parameters = parameters;
        parameters["stream"] = json!(true);
        events(self.ask(parameters).await).await
    }

    /// The request that the cluster was given next.
    pub(crate) async fn submitted(&mut self) -> Request {
        match self.seen.recv().await {
            Some(Seen::Submitted(request)) => request,
            other => panic!("not a request: {other:?}"),
        }
    }

    /// Asks the server to stop, and waits until it has.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.served.await.unwrap().unwrap();
    }
}

pub(crate) fn question(parameters: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
    let Value::Object(parameters) = parameters else {
        panic!("parameters are an object")
    };
    body.as_object_mut().unwrap().extend(parameters);
    body
}

/// The events of a stream; `[DONE]` is a string.
pub(crate) async fn events(response: Response) -> Vec<Value> {
    assert_eq!(response.status(), 200);
    let kind = response.headers()["content-type"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(kind.starts_with("text/event-stream"), "{kind}");
    let body = response.text().await.unwrap();
    let mut ids = body.lines().filter_map(|line| line.strip_prefix("id: "));
    let data: Vec<&str> = body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    for number in 0..data.len() {
        assert_eq!(ids.next(), Some(number.to_string().as_str()));
    }
    let data = data.into_iter();
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)))
        .collect()
}

/// All that the deltas of one choice say in this field.
pub(crate) fn said(events: &[Value], choice: usize, field: &str) -> String {
    let choices = events
        .iter()
        .flat_map(|event| event["choices"].as_array().into_iter().flatten());
    let ours = choices.filter(|found| found["index"] == choice);
    ours.filter_map(|found| found["delta"][field].as_str())
        .collect()
}

pub(crate) fn report(phase: Phase, detail: &str) -> ClusterReport {
    ClusterReport {
        api: "http://127.0.0.1:1".into(),
        epoch: Epoch(3),
        phase,
        detail: detail.into(),
        model: MODEL.into(),
        layout: Layout::Tensor,
        transport: Transport::Quic,
        fast_synch: offbook_protocol::FastSynch::Auto,
        context_tokens: 20,
        requests_running: 0,
        requests_queued: 0,
        nodes: Vec::new(),
        shards: Vec::new(),
        actors: Vec::new(),
    }
}

/// A model directory whose tokenizer has one token per byte, and the marks of MiniMax.
pub(crate) fn bytes_model() -> TempDir {
    let model = tempfile::tempdir().unwrap();
    let marks = [
        ("]~!b[", true),
        ("]~b]", true),
        ("[e~[", true),
        ("<think>", false),
        ("</think>", false),
        ("<minimax:tool_call>", false),
        ("</minimax:tool_call>", false),
    ];
    let added = (256..).zip(marks).map(|(id, (content, special))| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": special})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0,
                                         "direction": "Right"},
        "padding": null, "added_tokens": added.collect::<Value>(), "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": alphabet(), "merges": []},
    });
    let write = |name: &str, content: String| fs::write(model.path().join(name), content).unwrap();
    write("tokenizer.json", tokenizer.to_string());
    write(
        "generation_config.json",
        json!({"eos_token_id": END, "temperature": 0.5}).to_string(),
    );
    fs::copy(
        demo_model().join("chat_template.jinja"),
        model.path().join("chat_template.jinja"),
    )
    .unwrap();
    model
}

pub(crate) fn demo_model() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/model"))
}

/// GPT-2's characters for the 256 bytes.
fn alphabet() -> Map<String, Value> {
    let mut others = 256..;
    let character = |byte: u32| match byte {
        33..=126 | 161..=172 | 174..=255 => byte,
        _ => others.next().unwrap(),
    };
    let codes: Vec<u32> = (0..256).map(character).collect();
    let named = codes.into_iter().zip(0..);
    named
        .map(|(code, byte)| (char::from_u32(code).unwrap().into(), json!(byte)))
        .collect()
}
