//! Work that nobody waits for any more is not begun, here or there.

mod support;

use std::time::Duration;

use offbook_runtime::*;
use support::*;

const SHORT: Duration = Duration::from_millis(50);

/// `target` is where the busy actor is seen from system `a`.
async fn check(a: &System, b: &System, target: &str) {
    let subject = Subject::new();
    subject.register(b, "subject");
    Subject::new().register(b, "other");
    let wait = a.remote::<Wait>(&path(target));
    let note = a.remote::<Note>(&path(target));

    // One is being handled; the others wait behind it.
    let busy = actix::spawn({
        let wait = wait.clone();
        async move { wait.ask(Wait(0), LONG).await }
    });
    subject.begun.acquire().await.unwrap().forget();
    let late = note.ask(Note(1), SHORT).await.unwrap_err();
    assert_eq!(
        late,
        AskError::DeadlinePassed {
            actor: path(target),
            message: "note"
        }
    );
    let dropped = tokio::time::timeout(SHORT, note.ask(Note(2), LONG)).await;
    assert!(dropped.is_err());
    settle(a, b).await;

    subject.gate.add_permits(1);
    assert_eq!(busy.await.unwrap(), Ok(0));
    note.ask(Note(3), LONG).await.unwrap();
    assert_eq!(*subject.notes.lock().unwrap(), [0, 3]);
}

#[actix::test]
async fn in_another_process() {
    within(async {
        let (a, b) = pair().await;
        check(&a, &b, "b#subject").await;
    })
    .await;
}

#[actix::test]
async fn in_this_process() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        check(&a, &a, "a#subject").await;
    })
    .await;
}

#[actix::test]
async fn a_deadline_also_bounds_the_connecting() {
    within(async {
        let a = Cluster::new(&["a"]).start("a").await;
        let hole = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        a.learn(name("x"), hole.local_addr().unwrap());
        let error = a
            .remote::<Echo>(&path("x#any"))
            .ask(Echo(vec![]), SHORT)
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AskError::DeadlinePassed {
                actor: path("x#any"),
                message: "echo"
            }
        );
    })
    .await;
}
