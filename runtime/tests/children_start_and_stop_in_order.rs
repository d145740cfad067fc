//! Children, actors and processes alike, are started in order and stopped in reverse; and where all
//! share one fate, the end of one restarts all of them in that order.

mod support;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use actix::prelude::*;
use offbook_runtime::supervise::Supervisor;
use offbook_runtime::supervise::*;
use support::worker::{Add, Explode, policy};
use support::{LONG, within};
use tokio::sync::mpsc::Receiver;

type Diary = Arc<Mutex<Vec<String>>>;

/// Notes when it comes and goes.
struct Diarist {
    name: &'static str,
    diary: Diary,
}

impl Diarist {
    fn start(supervisor: &Supervisor, name: &'static str, diary: &Diary) -> ActorRef<Self> {
        let diary = Arc::clone(diary);
        let made = supervisor.start_actor(ActorSpec::new(name), move |_| Self {
            name,
            diary: Arc::clone(&diary),
        });
        made.unwrap()
    }

    fn note(&self, what: &str) {
        self.diary
            .lock()
            .unwrap()
            .push(format!("{what} {}", self.name));
    }
}

impl Actor for Diarist {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Context<Self>) {
        self.note("start");
    }

    fn stopped(&mut self, _: &mut Context<Self>) {
        self.note("stop");
    }
}

impl Handler<Add> for Diarist {
    type Result = u64;

    fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 {
        add.0
    }
}

impl Handler<Explode> for Diarist {
    type Result = ();

    fn handle(&mut self, _: Explode, _: &mut Context<Self>) {
        panic!("as asked");
    }
}

fn entries(diary: &Diary) -> Vec<String> {
    diary.lock().unwrap().drain(..).collect()
}

/// A process that says in a file that it was told to stop.
fn process(name: &str, folder: &Path) -> ChildSpec {
    let (ready, stops) = (ready(name, folder), folder.join("stops"));
    let script = format!(
        "trap 'echo {name} >> {}; exit 0' TERM; : > {}; while :; do sleep 0.01; done",
        stops.display(),
        ready.display()
    );
    ChildSpec::new(name, "/bin/sh").arg("-c").arg(script)
}

fn ready(name: &str, folder: &Path) -> PathBuf {
    folder.join(format!("{name}.ready"))
}

async fn until(mut seen: impl FnMut() -> bool) {
    while !seen() {
        tokio::task::yield_now().await;
    }
}

async fn next_started(news: &mut Receiver<Event>) -> (String, u32) {
    loop {
        if let Event::Started { child, pid } = news.recv().await.unwrap() {
            return (child, pid);
        }
    }
}

#[actix::test]
async fn actors_come_in_order_and_go_in_reverse() {
    within(async {
        for strategy in [Strategy::OneForOne, Strategy::AllForOne] {
            let (supervisor, _news) = Supervisor::with_strategy(strategy, policy(5));
            let diary = Diary::default();
            let mut last = None;
            for name in ["a", "b", "c", "d"] {
                last = Some(Diarist::start(&supervisor, name, &diary));
            }
            last.unwrap().ask(Add(1), LONG).await.unwrap();
            assert_eq!(
                entries(&diary),
                ["start a", "start b", "start c", "start d"]
            );
            supervisor.stop(LONG).await;
            assert_eq!(entries(&diary), ["stop d", "stop c", "stop b", "stop a"]);
            assert!(supervisor.status().is_empty());
        }
    })
    .await;
}

#[actix::test]
async fn processes_and_actors_go_in_one_order() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let (supervisor, _news) = Supervisor::new(policy(5));
        let diary = Diary::default();
        supervisor.start(process("first", folder.path())).unwrap();
        let actor = Diarist::start(&supervisor, "actor", &diary);
        supervisor.start(process("last", folder.path())).unwrap();
        actor.ask(Add(1), LONG).await.unwrap();
        until(|| ready("first", folder.path()).exists()).await;
        until(|| ready("last", folder.path()).exists()).await;
        let stops = || std::fs::read_to_string(folder.path().join("stops")).unwrap_or_default();
        entries(&diary);
        let (stopping, looking) = futures::join!(supervisor.stop(LONG), async {
            until(|| stops() == "last\n").await;
            // The actor in between is not stopped before the process after it has ended.
            until(|| !entries(&diary).is_empty()).await;
            stops()
        });
        let () = stopping;
        assert_eq!(looking, "last\n");
        assert_eq!(stops(), "last\nfirst\n");
    })
    .await;
}

#[actix::test]
async fn one_for_one_leaves_the_siblings_alone() {
    within(async {
        let (supervisor, _news) = Supervisor::new(policy(5));
        let diary = Diary::default();
        let [a, b] = ["a", "b"].map(|name| Diarist::start(&supervisor, name, &diary));
        a.ask(Explode, LONG).await.unwrap_err();
        a.ask(Add(1), LONG).await.unwrap();
        b.ask(Add(1), LONG).await.unwrap();
        assert_eq!((a.generation(), b.generation()), (2, 1));
    })
    .await;
}

#[actix::test]
async fn all_for_one_restarts_the_siblings_in_order() {
    within(async {
        let (supervisor, _news) = Supervisor::with_strategy(Strategy::AllForOne, policy(5));
        let diary = Diary::default();
        let [a, b, c] = ["a", "b", "c"].map(|name| Diarist::start(&supervisor, name, &diary));
        c.ask(Add(1), LONG).await.unwrap();
        entries(&diary);
        b.try_tell(Explode).unwrap();
        until(|| c.generation() == 2).await;
        c.ask(Add(1), LONG).await.unwrap();
        let entries = entries(&diary);
        let others: Vec<_> = entries.iter().filter(|entry| *entry != "stop b").collect();
        assert_eq!(
            others,
            ["stop c", "stop a", "start a", "start b", "start c"]
        );
        // They keep their mailboxes and references, and the record says why.
        assert_eq!(a.ask(Add(2), LONG).await.unwrap(), 2);
        for (child, why) in [(&a, "its sibling b had ended"), (&b, "")] {
            let status = child.status();
            assert_eq!((status.restarts, status.generation), (1, 2));
            assert_eq!(status.last.unwrap().why, why);
        }
        // One of them may leave for good without the others.
        supervisor.stop_child("b", LONG).await.unwrap();
        assert_eq!((a.generation(), c.generation()), (2, 2));
        assert!(b.is_gone() && !a.is_gone() && !c.is_gone());
    })
    .await;
}

#[actix::test]
async fn a_process_takes_the_actors_that_share_its_fate_with_it() {
    within(async {
        let (supervisor, mut news) = Supervisor::with_strategy(Strategy::AllForOne, policy(1));
        let diary = Diary::default();
        // One that fails: whoever is killed from outside may be started again more often.
        let failing = ChildSpec::new("process", "/bin/sh")
            .arg("-c")
            .arg("sleep 0.3; exit 3");
        supervisor.start(failing).unwrap();
        let actor = Diarist::start(&supervisor, "actor", &diary);
        for life in 1..=2 {
            assert_eq!(next_started(&mut news).await.0, "process");
            assert_eq!(next_started(&mut news).await.0, "actor");
            assert_eq!(actor.generation(), life);
        }
        // Their ends are counted together, and so all are given up together.
        until(|| actor.is_gone()).await;
        let states: Vec<_> = supervisor
            .status()
            .into_iter()
            .map(|child| {
                (
                    child.name,
                    child.state,
                    child.restarts,
                    child.last.unwrap().why,
                )
            })
            .collect();
        let (process, actor) = ("process".to_owned(), "actor".to_owned());
        let why = "its sibling process had ended".to_owned();
        assert_eq!(
            states,
            [
                (process, ChildState::Escalated, 1, String::new()),
                (actor, ChildState::Escalated, 1, why)
            ]
        );
    })
    .await;
}
