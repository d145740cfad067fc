//! What the tests of whole clusters share: a running `offbook up`, and the ways in and out of it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test file uses another part of it"
)]

#[cfg(target_os = "linux")]
pub mod cables;

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use offbook_runtime::free_port;
use serde_json::{Value, json};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The program under test.
pub fn offbook() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offbook"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// A small random checkpoint made by an independent implementation, with what it answers.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A cluster on this machine. It is killed with the test, whatever becomes of it.
pub struct Cluster {
    up: Child,
    _stdout: BufReader<ChildStdout>,
    /// The line that `offbook up --json` printed.
    pub ready: Value,
    client: reqwest::blocking::Client,
}

impl Cluster {
    /// Starts `offbook up --json` and waits until it says that it is ready.
    pub fn up(arguments: &[&str]) -> Self {
        Self::up_by(offbook(), arguments)
    }

    /// The same, with another beginning of the command.
    pub fn up_by(mut up: Command, arguments: &[&str]) -> Self {
        up.args(["up", "--json", "--http", "127.0.0.1:0"]);
        if !arguments.contains(&"--drain") {
            // Most tests end with answers under way.
            up.args(["--drain", "1s"]);
        }
        let mut up = up.args(arguments).spawn().expect("offbook starts");
        let mut stdout = BufReader::new(up.stdout.take().expect("it is piped"));
        let (said, first_line) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.read_line(&mut line);
            let _ = said.send((read, line, stdout));
        });
        let Ok((read, line, stdout)) = first_line.recv_timeout(PATIENCE) else {
            // Its standard error says what it waits for.
            send_signal(up.id(), "TERM");
            wait_for_exit(&mut up);
            panic!("offbook up {arguments:?} did not come up");
        };
        read.expect("standard output can be read");
        let ready = serde_json::from_str(&line)
            .unwrap_or_else(|_| panic!("offbook up printed no ready line but {line:?}"));
        let client = reqwest::blocking::Client::builder()
            .timeout(PATIENCE)
            .build()
            .expect("a client can be made");
        Self {
            up,
            _stdout: stdout,
            ready,
            client,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!(
            "{}{path}",
            self.ready["api"].as_str().expect("it has an API")
        )
    }

    pub fn up_pid(&self) -> u32 {
        self.up.id()
    }

    /// What it writes there, if it was started with a pipe.
    pub fn standard_error(&mut self) -> ChildStderr {
        self.up.stderr.take().expect("it is piped")
    }

    /// Every process that it started: nodes, then shards, in order.
    pub fn pids(&self) -> Vec<u32> {
        let pid = |entry: &Value| entry["pid"].as_u64().expect("a pid") as u32;
        let entries = |key: &str| self.ready[key].as_array().expect("a list").clone();
        entries("nodes")
            .iter()
            .chain(&entries("shards"))
            .map(pid)
            .collect()
    }

    pub fn node_pid(&self, node: usize) -> u32 {
        self.ready["nodes"][node]["pid"].as_u64().expect("a pid") as u32
    }

    pub fn shard_pid(&self, rank: usize) -> u32 {
        self.ready["shards"][rank]["pid"].as_u64().expect("a pid") as u32
    }

    /// Status and JSON body.
    pub fn get(&self, path: &str) -> (u16, Value) {
        let answer = self
            .client
            .get(self.url(path))
            .send()
            .expect("the API answers");
        (
            answer.status().as_u16(),
            answer.json().unwrap_or(Value::Null),
        )
    }

    pub fn get_text(&self, path: &str) -> String {
        let answer = self.client.get(self.url(path)).send();
        let answer = answer.and_then(reqwest::blocking::Response::text);
        answer.expect("the API answers")
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self
            .client
            .post(self.url(path))
            .json(body)
            .send()
            .expect("the API answers");
        (
            answer.status().as_u16(),
            answer.json().unwrap_or(Value::Null),
        )
    }

    /// Sends a request under a name; its status and body, unless the connection breaks off.
    pub fn try_post_as(&self, name: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
        let asked = self.client.post(self.url(path)).json(body);
        let answer = asked.header("X-Request-Id", name).send().ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.json().ok()?))
    }

    /// Sends a request that streams; its events are read one by one.
    pub fn stream(&self, path: &str, body: &Value) -> Events {
        stream(&self.client, self.url(path), body)
    }

    /// The events of an answer after the one that the client had last.
    pub fn resume(&self, path: &str, last_event: u64) -> Events {
        let asked = self.client.get(self.url(path));
        let asked = asked.header("Last-Event-ID", last_event.to_string());
        let answer = asked.send().expect("the API answers");
        assert_eq!(answer.status().as_u16(), 200);
        Events::of(answer)
    }

    /// The same, unless there is nobody to ask, or nobody who knows the answer yet.
    pub fn try_resume(&self, path: &str, last_event: u64) -> Option<Events> {
        let asked = self.client.get(self.url(path));
        let asked = asked.header("Last-Event-ID", last_event.to_string());
        let answer = asked.send().ok()?;
        answer.status().is_success().then(|| Events::of(answer))
    }

    /// Sends a request that streams, unless there is nobody to take it.
    pub fn try_stream(&self, path: &str, body: &Value) -> Option<Events> {
        let answer = self.client.post(self.url(path)).json(body).send().ok()?;
        answer.status().is_success().then(|| Events::of(answer))
    }

    /// All events of an answer.
    pub fn resume_from_start(&self, path: &str) -> Events {
        let answer = self.client.get(self.url(path)).send();
        let answer = answer.expect("the API answers");
        assert_eq!(answer.status().as_u16(), 200);
        Events::of(answer)
    }

    /// Waits until the cluster's report satisfies `wanted`.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(&self.client, &self.url(""), what, wanted)
    }

    /// Waits for the end of the cluster's first process.
    pub fn wait_for_end(&mut self) -> std::process::ExitStatus {
        wait_for_exit(&mut self.up)
    }

    /// Sends a signal to the cluster's first process and waits for its end.
    pub fn end_with(&mut self, signal: &str) -> std::process::ExitStatus {
        send_signal(self.up.id(), signal);
        wait_for_exit(&mut self.up)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.up.try_wait().is_ok_and(|status| status.is_none()) {
            send_signal(self.up.id(), "TERM");
            wait_for_exit(&mut self.up);
        }
    }
}

/// Nodes that nobody starts again: each is a process of this test's own, on the f32 checkpoint.
pub struct Nodes {
    /// Begins the command of each.
    launch: Box<dyn Fn(usize) -> Command>,
    folder: tempfile::TempDir,
    http: String,
    nodes: Vec<Option<Child>>,
    client: reqwest::blocking::Client,
}

impl Nodes {
    /// Starts so many, with these lines among the limits of the cluster file.
    pub fn start(count: usize, limits: &[(&str, &str)]) -> Self {
        let free = |_| free_port::udp(LOOPBACK).expect("a port is free");
        let addresses: Vec<_> = (0..count).map(free).collect();
        Self::start_at(&addresses, limits, Box::new(|_| offbook()))
    }

    /// Starts so many, each on its machine. The calling thread has to be on the first.
    #[cfg(target_os = "linux")]
    pub fn on(network: &cables::Network, count: usize, limits: &[(&str, &str)]) -> Self {
        let addresses: Vec<_> = (0..count).map(|node| network.address(node)).collect();
        let machines = network.machines();
        let launch = move |node: usize| {
            let mut command = cables::on(&machines[node]);
            command
                .arg(env!("CARGO_BIN_EXE_offbook"))
                .stdout(Stdio::piped());
            command
        };
        Self::start_at(&addresses, limits, Box::new(launch))
    }

    fn start_at(
        addresses: &[SocketAddr],
        limits: &[(&str, &str)],
        launch: Box<dyn Fn(usize) -> Command>,
    ) -> Self {
        let count = addresses.len();
        let folder = tempfile::tempdir().expect("there is room");
        let mut init = offbook();
        init.args(["cluster", "init"]).arg(folder.path());
        init.arg("--model").arg(fixture("dense-f32"));
        for (node, address) in addresses.iter().enumerate() {
            init.arg("--node")
                .arg(format!("node-{}={address}", node + 1));
        }
        assert!(
            init.stderr(Stdio::null())
                .status()
                .expect("it runs")
                .success()
        );
        let file = folder.path().join("cluster.toml");
        let mut text = std::fs::read_to_string(&file).expect("it is there");
        for (key, value) in limits {
            let (before, rest) = text
                .split_once(&format!("\n{key} = "))
                .unwrap_or_else(|| panic!("the cluster file has no {key}"));
            let (_, after) = rest.split_once('\n').expect("lines end");
            text = format!("{before}\n{key} = {value}\n{after}");
        }
        std::fs::write(&file, text).expect("there is room");
        let http = free_port::tcp(LOOPBACK).expect("a port is free");
        let client = reqwest::blocking::Client::builder().timeout(PATIENCE);
        let mut nodes = Self {
            launch,
            http: http.to_string(),
            folder,
            nodes: (0..count).map(|_| None).collect(),
            client: client.build().expect("a client can be made"),
        };
        for node in 0..count {
            nodes.start_node(node);
        }
        nodes
    }

    pub fn start_node(&mut self, node: usize) {
        let name = format!("node-{}", node + 1);
        let folder = self.folder.path();
        let started = (self.launch)(node)
            .args([
                "node",
                "--supervised",
                "--name",
                &name,
                "--http",
                &self.http,
            ])
            .arg("--cluster")
            .arg(folder.join("cluster.toml"))
            .arg("--data-dir")
            .arg(folder.join(&name))
            // It ends with this pipe.
            .stdin(Stdio::piped())
            .spawn();
        self.nodes[node] = Some(started.expect("offbook starts"));
    }

    /// Kills a node with -9, and waits for its end.
    pub fn kill_node(&mut self, node: usize) {
        let mut child = self.nodes[node].take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }

    pub fn api(&self) -> String {
        format!("http://{}", self.http)
    }

    pub fn stream(&self, path: &str, body: &Value) -> Events {
        stream(&self.client, format!("{}{path}", self.api()), body)
    }

    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(&self.client, &self.api(), what, wanted)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn stream(client: &reqwest::blocking::Client, url: String, body: &Value) -> Events {
    let answer = client.post(url).json(body).send().expect("the API answers");
    assert_eq!(answer.status().as_u16(), 200);
    Events::of(answer)
}

/// Waits until the cluster's report satisfies `wanted`.
fn wait_for(
    client: &reqwest::blocking::Client,
    api: &str,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let begun = Instant::now();
    loop {
        // The head itself may be away for a moment.
        let answer = client.get(format!("{api}/v1/cluster")).send();
        let report = answer
            .and_then(|answer| answer.json())
            .unwrap_or(Value::Null);
        if wanted(&report) {
            return report;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "waited in vain for {what}: {report}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether the group of `before` is done with: the next may be ready before anybody asks.
pub fn loss_is_seen(before: &Value, now: &Value) -> bool {
    now["phase"] != "ready" || now["epoch"] != before["epoch"]
}

/// The events of a stream.
pub struct Events {
    lines: BufReader<Box<dyn Read + Send>>,
    /// What was said so far that is no event.
    pub comments: Vec<String>,
    /// Of the event that came last.
    pub last_id: Option<u64>,
}

impl Events {
    fn of(answer: reqwest::blocking::Response) -> Self {
        Self {
            lines: BufReader::new(Box::new(answer)),
            comments: Vec::new(),
            last_id: None,
        }
    }

    /// Reads until this many tokens more have come, and returns them.
    pub fn tokens(&mut self, count: usize) -> Vec<u64> {
        let mut tokens = Vec::new();
        while tokens.len() < count {
            let event = self.next().expect("the stream goes on");
            assert!(event["error"].is_null(), "{event}");
            tokens.extend(token_ids(&event));
        }
        tokens
    }

    /// Reads to the end of a stream that has to be complete, and returns the tokens that came.
    pub fn rest(&mut self) -> Vec<u64> {
        let mut events: Vec<Value> = self.collect();
        assert_eq!(events.pop(), Some(json!("[DONE]")), "{:?}", events.last());
        let finish = events
            .iter()
            .rev()
            .find_map(|event| event["choices"][0]["finish_reason"].as_str());
        assert_eq!(finish, Some("length"));
        events.iter().flat_map(token_ids).collect()
    }
}

impl Iterator for Events {
    type Item = Value;

    /// The next event; `"[DONE]"` as a string; nothing when the stream has ended.
    fn next(&mut self) -> Option<Value> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return Some(serde_json::from_str(data).unwrap_or_else(|_| json!(data)));
            }
            if let Some(id) = line.trim_end().strip_prefix("id: ") {
                self.last_id = id.parse().ok();
            }
            if let Some(comment) = line.trim_end().strip_prefix(": ") {
                self.comments.push(comment.to_owned());
            }
        }
    }
}

/// A completion of token ids, greedy, without end of sequence: it runs for `max_tokens`.
pub fn long_completion(max_tokens: u32) -> Value {
    json!({
        "prompt": [5, 11, 17, 23], "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "stream": true,
    })
}

/// The token ids of one chunk or answer.
pub fn token_ids(answer: &Value) -> Vec<u64> {
    let ids = answer["choices"][0]["token_ids"].as_array();
    ids.into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect()
}

pub fn send_signal(pid: u32, signal: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{signal}"))
        .arg(pid.to_string())
        .status();
    assert!(
        sent.expect("kill is there").success(),
        "cannot send {signal} to {pid}"
    );
}

/// Is there such a process, other than as a record of its end?
pub fn is_alive(pid: u32) -> bool {
    if cfg!(target_os = "linux") {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The state follows the program's name, which stands in parentheses.
        let state = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        return !state.is_empty() && !state.starts_with(['Z', 'X']);
    }
    let ps = Command::new("ps")
        .args(["-o", "stat=", "-p", &pid.to_string()])
        .output();
    let stat = String::from_utf8(ps.expect("ps is there").stdout).expect("ps prints text");
    !stat.trim().is_empty() && !stat.trim().starts_with('Z')
}

fn wait_for_exit(child: &mut Child) -> std::process::ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            return status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("offbook up did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Longer than anything takes on a slow machine that runs several tests at once.
pub const PATIENCE: Duration = Duration::from_secs(120);
