//! What one process sends to one actor arrives in that order, tells and asks alike.

mod support;

use support::*;

#[actix::test]
async fn tells_and_asks_from_one_sender() {
    within(async {
        let (a, b) = pair().await;
        let subject = Subject::new();
        subject.register(&b, "subject");
        let note = a.remote::<Note>(&path("b#subject"));
        for number in 0..500 {
            // Queued before there is even a link.
            note.try_tell(Note(number)).unwrap();
        }
        note.ask(Note(500), LONG).await.unwrap();
        assert_eq!(
            *subject.notes.lock().unwrap(),
            (0..=500).collect::<Vec<_>>()
        );
    })
    .await;
}

#[actix::test]
async fn a_full_actix_mailbox_does_not_reorder() {
    within(async {
        let (a, b) = pair().await;
        let subject = Subject::new();
        subject.register(&b, "subject");
        Subject::new().register(&b, "other");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let note = a.remote::<Note>(&path("b#subject"));
        // The actor is busy, so that far more than its mailbox of 16 waits.
        let waiting = wait.ask(Wait(0), LONG);
        let asks = futures::future::join_all((1..=200).map(|number| note.ask(Note(number), LONG)));
        let opener = async {
            settle(&a, &b).await;
            subject.gate.add_permits(1);
        };
        let (first, replies, ()) = futures::join!(waiting, asks, opener);
        assert_eq!(first, Ok(0));
        assert!(replies.iter().all(Result::is_ok), "{replies:?}");
        assert_eq!(
            *subject.notes.lock().unwrap(),
            (0..=200).collect::<Vec<_>>()
        );
    })
    .await;
}

#[actix::test]
async fn tells_to_a_busy_actor_wait_in_order() {
    within(async {
        let (a, b) = pair().await;
        let subject = Subject::new();
        subject.register(&b, "subject");
        Subject::new().register(&b, "other");
        let wait = a.remote::<Wait>(&path("b#subject"));
        let note = a.remote::<Note>(&path("b#subject"));
        wait.try_tell(Wait(0)).unwrap();
        for number in 1..=200 {
            note.try_tell(Note(number)).unwrap();
        }
        settle(&a, &b).await;
        subject.gate.add_permits(1);
        note.ask(Note(201), LONG).await.unwrap();
        assert_eq!(
            *subject.notes.lock().unwrap(),
            (0..=201).collect::<Vec<_>>()
        );
    })
    .await;
}
