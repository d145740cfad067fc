//! Whatever waits for the other process learns at once that it is gone, and fresh calls dial anew.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use offbook_runtime::*;
use support::*;

#[actix::test]
async fn when_its_system_is_dropped() {
    within(async {
        let (a, b) = pair().await;
        let (subject, producer) = (Subject::new(), Subject::new());
        subject.register(&b, "subject");
        producer.register(&b, "producer");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let count = a.remote_stream::<Count>(&path("b#producer"));
        let mut items = count
            .subscribe(Count { until: u64::MAX }, LONG)
            .await
            .unwrap();
        items.next().await.unwrap().unwrap();
        let lost = a.watch(b.process());
        let ask = wait.ask(Wait(0), LONG);
        let dropping = async {
            subject.begun.acquire().await.unwrap().forget();
            drop(b);
        };
        let (reply, ()) = futures::join!(ask, dropping);
        let lost = lost.await;
        // The goodbye is one packet; if that is lost, the next one we send gets a reset.
        assert!(
            matches!(lost.reason, LostReason::Closed | LostReason::Reset),
            "{lost}"
        );
        assert_eq!(reply, Err(AskError::LinkLost(lost.clone())));
        let last = items
            .filter(|item| futures::future::ready(item.is_err()))
            .next()
            .await;
        assert_eq!(last, Some(Err(StreamLost::Link(lost))));
    })
    .await;
}

#[actix::test]
async fn an_orderly_shutdown_answers_first_and_frees_the_port() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let a = cluster.start("a").await;
        let mut config = cluster.config("b");
        config.listen = own_address();
        let b = System::start(config).await.unwrap();
        a.learn(b.process().clone(), b.local_addr());
        let subject = Subject::new();
        subject.register(&b, "subject");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let ask = wait.ask(Wait(5), LONG);
        let shutdown = async {
            subject.begun.acquire().await.unwrap().forget();
            let gate = async {
                tokio::task::yield_now().await;
                subject.gate.add_permits(1);
            };
            futures::join!(b.shutdown(LONG), gate)
        };
        let (reply, _) = futures::join!(ask, shutdown);
        assert_eq!(reply, Ok(5));
        std::net::UdpSocket::bind(b.local_addr()).unwrap();
        let error = b
            .remote::<Echo>(&path("a#any"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap_err();
        assert_eq!(error, AskError::ShuttingDown { process: name("b") });
    })
    .await;
}

/// An address that no other process picks, where the system allows that: so a port that is taken
/// was not given back by us.
fn own_address() -> std::net::SocketAddr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let host = if cfg!(target_os = "linux") {
        [127, 77, high, low]
    } else {
        [127, 0, 0, 1]
    };
    (host, 0).into()
}

#[actix::test]
async fn a_fresh_call_dials_anew() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let (a, b) = cluster.pair("a", "b").await;
        Subject::new().register(&b, "subject");
        let echo = a.remote::<Echo>(&path("b#subject"));
        echo.ask(Echo(vec![]), LONG).await.unwrap();
        let lost = a.watch(b.process());
        b.shutdown(LONG).await;
        lost.await;
        let mut config = cluster.config("b");
        config.boot = 2;
        let b = System::start(config).await.unwrap();
        Subject::new().register(&b, "subject");
        a.learn(b.process().clone(), b.local_addr());
        assert_eq!(echo.ask(Echo(vec![4]), LONG).await.unwrap(), [4]);
    })
    .await;
}

#[actix::test]
async fn watching_what_cannot_be_reached_ends_at_once() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        let lost = a.watch(&name("x")).await;
        assert_eq!(lost.reason, LostReason::UnknownProcess);
        let own = a.watch(&name("a"));
        a.shutdown(LONG).await;
        assert_eq!(own.await.reason, LostReason::ShutDown);
    })
    .await;
}

/// The other process of the tests below, when they start this file's binary anew.
#[actix::test]
async fn child_process() {
    let Ok(folder) = std::env::var("TEST_CHILD_FOLDER") else {
        return;
    };
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let folder = std::path::PathBuf::from(folder);
    let identity = Arc::new(Identity::load(&folder.join("b.key")).unwrap());
    let keys = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let trust = trust(keys("a.pin").parse().unwrap(), identity.key());
    let system = System::start(SystemConfig {
        process: name("b"),
        identity,
        trust,
        listen: ([127, 0, 0, 1], number("TEST_CHILD_PORT") as u16).into(),
        boot: number("TEST_CHILD_BOOT"),
        limits: Limits::default(),
    });
    let system = system.await.unwrap();
    Subject::new().register(&system, "subject");
    println!("\nport {}", system.local_addr().port());
    std::io::stdout().flush().unwrap();
    supervise::lifeline().unwrap();
    std::future::pending::<()>().await;
}

fn trust(a: NodeKey, b: NodeKey) -> Trust {
    let node = |name: &str, key| TrustedNode {
        name: name.into(),
        keys: vec![key],
    };
    Trust {
        cluster: "test".into(),
        config_hash: 7,
        nodes: vec![node("a", a), node("b", b)],
    }
}

struct Other {
    folder: tempfile::TempDir,
    a: Arc<Identity>,
    b: NodeKey,
}

impl Other {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let a = Arc::new(Identity::generate("a").unwrap());
        let b = Identity::generate("b").unwrap();
        b.save(&folder.path().join("b.key")).unwrap();
        std::fs::write(folder.path().join("a.pin"), a.key().to_string()).unwrap();
        Self {
            folder,
            a,
            b: b.key(),
        }
    }

    async fn system(&self) -> System {
        System::start(SystemConfig {
            process: name("a"),
            identity: Arc::clone(&self.a),
            trust: trust(self.a.key(), self.b),
            listen: "127.0.0.1:0".parse().unwrap(),
            boot: 1,
            limits: Limits::default(),
        })
        .await
        .unwrap()
    }

    fn start(&self, port: u16, boot: u64) -> (Child, u16) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_process", "--exact", "--nocapture"])
            .env("TEST_CHILD_FOLDER", self.folder.path())
            .env("TEST_CHILD_PORT", port.to_string())
            .env("TEST_CHILD_BOOT", boot.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let port = lines
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("port ").map(|port| port.parse().unwrap()));
        (child, port.expect("the child says its port"))
    }
}

#[actix::test]
async fn when_its_process_is_killed() {
    within(async {
        let other = Other::new();
        let a = other.system().await;
        let (mut child, port) = other.start(0, 1);
        a.learn(name("b"), ([127, 0, 0, 1], port).into());
        let wait = a.remote::<Wait>(&path("b#subject"));
        a.remote::<Echo>(&path("b#subject"))
            .ask(Echo(vec![]), LONG)
            .await
            .unwrap();
        let watching = a.watch(&name("b"));
        let ask = wait.ask(Wait(0), LONG);
        let killing = async {
            child.kill().unwrap();
            Instant::now()
        };
        let (reply, killed, lost) = futures::join!(ask, killing, watching);
        let took = killed.elapsed();
        println!("silence was noticed after {took:?}");
        assert_eq!(
            lost,
            Lost {
                process: name("b"),
                reason: LostReason::TimedOut
            }
        );
        assert_eq!(reply, Err(AskError::LinkLost(lost)));
        assert!(took < Duration::from_secs(3), "{took:?}");
        child.wait().unwrap();
    })
    .await;
}

/// The figure is for a machine that has a core to spare; a crowded one may only be slower.
#[actix::test]
async fn when_its_process_is_frozen() {
    within(async {
        let other = Other::new();
        let a = other.system().await;
        let (mut child, port) = other.start(0, 1);
        a.learn(name("b"), ([127, 0, 0, 1], port).into());
        let echo = a.remote::<Echo>(&path("b#subject"));
        echo.ask(Echo(vec![]), LONG).await.unwrap();
        let mut took = Vec::new();
        for _ in 0..5 {
            // Something must be known of its heartbeats first.
            tokio::time::sleep(Duration::from_millis(800)).await;
            let watching = a.watch(&name("b"));
            signal(&child, "STOP");
            let frozen = Instant::now();
            let lost = watching.await;
            took.push(frozen.elapsed());
            assert!(matches!(lost.reason, LostReason::Silent(_)), "{lost}");
            signal(&child, "CONT");
            // It was there after all: it learns that the link is gone, and the next call makes one.
            while echo.ask(Echo(vec![1]), LONG).await.is_err() {}
        }
        println!("freezes were noticed after {took:?}");
        took.sort();
        assert!(took[2] <= Duration::from_millis(300), "{took:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    })
    .await;
}

fn signal(child: &Child, signal: &str) {
    let sent = Command::new("kill")
        .args([format!("-{signal}"), child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

#[actix::test]
async fn when_its_process_is_killed_and_started_again() {
    within(async {
        let other = Other::new();
        let a = other.system().await;
        let (mut child, port) = other.start(0, 1);
        a.learn(name("b"), ([127, 0, 0, 1], port).into());
        let echo = a.remote::<Echo>(&path("b#subject"));
        echo.ask(Echo(vec![1]), LONG).await.unwrap();
        let watching = a.watch(&name("b"));
        child.kill().unwrap();
        child.wait().unwrap();
        let (mut child, again) = other.start(port, 2);
        assert_eq!(again, port);
        let started = Instant::now();
        // The time-out would say so: this is the next incarnation, which does not know the link.
        assert_eq!(watching.await.reason, LostReason::Reset);
        println!("the restart was noticed after {:?}", started.elapsed());
        assert_eq!(echo.ask(Echo(vec![2]), LONG).await.unwrap(), [2]);
        child.kill().unwrap();
        child.wait().unwrap();
    })
    .await;
}
