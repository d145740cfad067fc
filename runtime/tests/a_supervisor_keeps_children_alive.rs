//! A child that ends unasked is started again, not for ever, and every time is on record; a child
//! that is told to stop, stops; and none outlives its parent.

mod support;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use offbook_runtime::supervise::*;
use support::{LONG, within};
use tokio::sync::mpsc::Receiver;

fn policy(intensity: u32) -> RestartPolicy {
    RestartPolicy {
        intensity,
        window: LONG,
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(1),
        jitter: 0.0,
    }
}

fn shell(name: &str, script: &str) -> ChildSpec {
    ChildSpec::new(name, "/bin/sh").arg("-c").arg(script)
}

async fn started(news: &mut Receiver<Event>) -> u32 {
    loop {
        if let Event::Started { pid, .. } = news.recv().await.unwrap() {
            return pid;
        }
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_killed_child_is_started_again() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(5));
        supervisor.start(shell("child", "read never")).unwrap();
        let first = started(&mut news).await;
        let killed = Instant::now();
        kill(first);
        let Event::Exited { child, restart, .. } = news.recv().await.unwrap() else {
            panic!()
        };
        println!("the end was noticed after {:?}", killed.elapsed());
        assert_eq!((child.as_str(), restart.exit), ("child", Exit::Signal(9)));
        let second = started(&mut news).await;
        assert_ne!(first, second);
        let status = &supervisor.status()[0];
        assert_eq!(
            (status.state, status.pid),
            (ChildState::Running, Some(second))
        );
        assert_eq!(status.restarts, 1);
        assert_eq!(status.last.as_ref().unwrap().exit, Exit::Signal(9));
        supervisor.stop(LONG).await;
    })
    .await;
}

/// Of many, so that one in which the machine was busy elsewhere does not count.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_end_is_seen_through_a_pidfd_within_5_ms() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(100));
        supervisor.start(shell("child", "read never")).unwrap();
        let mut took = Vec::new();
        for _ in 0..30 {
            let pid = started(&mut news).await;
            let files = std::fs::read_dir("/proc/self/fd").unwrap();
            let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
            assert!(
                links
                    .into_iter()
                    .any(|link| link.ends_with("anon_inode:[pidfd]")),
                "nothing waits for a pidfd"
            );
            let killed = Instant::now();
            kill(pid);
            let Event::Exited { .. } = news.recv().await.unwrap() else {
                panic!()
            };
            took.push(killed.elapsed());
        }
        took.sort();
        println!(
            "ends were seen after {:?}, at most {:?}",
            took[15], took[29]
        );
        assert!(took[15] <= Duration::from_millis(5), "{took:?}");
        supervisor.stop(LONG).await;
    })
    .await;
}

#[tokio::test]
async fn a_child_that_hangs_is_killed_for_a_reason_that_is_on_record() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(5));
        supervisor.start(shell("child", "read never")).unwrap();
        let pid = started(&mut news).await;
        supervisor
            .kill_child("child", pid + 1, "not this one")
            .unwrap();
        supervisor.kill_child("child", pid, "it hangs").unwrap();
        let Event::Exited { restart, .. } = news.recv().await.unwrap() else {
            panic!()
        };
        assert_eq!(
            (restart.exit, restart.why.as_str()),
            (Exit::Signal(9), "it hangs")
        );
        assert_ne!(started(&mut news).await, pid);
        assert_eq!(
            supervisor.kill_child("nobody", pid, ""),
            Err(SupervisorError::NoSuchChild("nobody".into()))
        );
        supervisor.stop(LONG).await;
    })
    .await;
}

#[tokio::test]
async fn one_that_fails_too_often_is_left_alone_with_its_last_words() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(2));
        let script = "for i in $(seq 60); do echo line $i >&2; done; exit 3";
        supervisor.start(shell("child", script)).unwrap();
        let mut lives = 0;
        let restart = loop {
            match news.recv().await.unwrap() {
                Event::Started { .. } => lives += 1,
                Event::Escalated { restart, .. } => break restart,
                _ => {}
            }
        };
        assert_eq!((lives, restart.exit), (3, Exit::Code(3)));
        let lines: Vec<_> = (11..=60).map(|line| format!("line {line}")).collect();
        assert_eq!(restart.last_lines, lines);
        let status = &supervisor.status()[0];
        assert_eq!((status.state, status.pid), (ChildState::Escalated, None));
        // An operator may try again under the same name.
        supervisor.start(shell("child", "read never")).unwrap();
        started(&mut news).await;
        supervisor.stop(LONG).await;
    })
    .await;
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_a_failure_like_another() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(0));
        supervisor
            .start(ChildSpec::new("child", "/no/such/program"))
            .unwrap();
        let Event::Escalated { restart, .. } = news.recv().await.unwrap() else {
            panic!()
        };
        assert!(matches!(restart.exit, Exit::NotStarted(_)));
    })
    .await;
}

#[tokio::test]
async fn a_stop_is_gentle_first_and_firm_after_the_deadline() {
    within(async {
        let (supervisor, mut news) = Supervisor::new(policy(5));
        supervisor.start(shell("gentle", "read never")).unwrap();
        started(&mut news).await;
        // It says when it has become deaf, in the only way that a supervisor listens to.
        let folder = tempfile::tempdir().unwrap();
        let deaf = folder.path().join("deaf");
        let script = format!(
            "trap '' TERM; : > {}; while :; do sleep 0.01; done",
            deaf.display()
        );
        supervisor.start(shell("deaf", &script)).unwrap();
        started(&mut news).await;
        while !deaf.exists() {
            tokio::task::yield_now().await;
        }
        let began = Instant::now();
        supervisor.stop_child("gentle", LONG).await.unwrap();
        assert!(began.elapsed() < LONG / 2);
        let began = Instant::now();
        supervisor
            .stop_child("deaf", Duration::from_millis(50))
            .await
            .unwrap();
        assert!(began.elapsed() >= Duration::from_millis(50));
        assert!(supervisor.status().is_empty());
        let missing = supervisor.stop_child("deaf", LONG).await;
        assert_eq!(missing, Err(SupervisorError::NoSuchChild("deaf".into())));
    })
    .await;
}

#[tokio::test]
async fn a_stop_also_ends_the_pause_before_a_restart() {
    within(async {
        let slow = RestartPolicy {
            backoff_min: LONG * 9,
            backoff_max: LONG * 9,
            ..policy(5)
        };
        let (supervisor, mut news) = Supervisor::new(slow);
        supervisor.start(shell("child", "exit 1")).unwrap();
        while !matches!(news.recv().await.unwrap(), Event::Exited { .. }) {}
        assert_eq!(supervisor.status()[0].state, ChildState::BackingOff);
        let taken = supervisor.start(shell("child", "exit 1"));
        assert_eq!(taken, Err(SupervisorError::NameTaken("child".into())));
        supervisor.stop(LONG).await;
    })
    .await;
}

/// The processes of the tests below, when they start this file's binary anew.
#[tokio::test]
async fn child_process() {
    match std::env::var("TEST_ROLE").as_deref() {
        Ok("parent") => {
            let (supervisor, _news) = Supervisor::new(policy(5));
            supervisor.start(this("child")).unwrap();
            std::future::pending::<()>().await;
        }
        Ok("child") => {
            lifeline().unwrap();
            println!("\nhere");
            std::future::pending::<()>().await;
        }
        _ => {}
    }
}

fn this(role: &str) -> ChildSpec {
    ChildSpec::new(role, std::env::current_exe().unwrap())
        .arg("child_process")
        .arg("--exact")
        .arg("--nocapture")
        .env("TEST_ROLE", role)
}

fn start(role: &str) -> std::process::Child {
    let spec = this(role);
    let mut command = Command::new(spec.program);
    command
        .args(spec.args)
        .envs(spec.env)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command.spawn().unwrap()
}

fn wait_until_here(out: &mut impl Read) {
    let mut text = Vec::new();
    while !text.ends_with(b"\nhere\n") {
        let mut byte = [0];
        out.read_exact(&mut byte).expect("the child ends too early");
        text.push(byte[0]);
    }
}

#[test]
fn a_child_does_not_outlive_a_parent_that_is_killed() {
    let mut parent = start("parent");
    // The child writes to the same pipe: it ends when both have.
    let mut out = parent.stdout.take().unwrap();
    wait_until_here(&mut out);
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(out.read_to_end(&mut Vec::new()).is_ok()));
    assert!(ended.recv_timeout(LONG).expect("the child lives on"));
}

#[test]
fn the_pipe_alone_is_enough() {
    let mut child = start("child");
    wait_until_here(child.stdout.as_mut().unwrap());
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(129));
}
