//! A peer of a later version that says more than this one knows is understood all the same: what
//! this one does not know is skipped, where the format says that it may be.

mod support;

use support::raw::*;
use support::*;

#[actix::test]
async fn with_more_in_its_hello_its_calls_and_its_frames() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let b = cluster.start("b").await;
        Subject::new().register(&b, "subject");
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = connection.open_bi().await.unwrap();
        let longer = [&hello_body()[..], b"and more"].concat();
        sending.write_all(&framed(&longer)).await.unwrap();
        read_frame(&mut receiving).await;
        // A kind of frame, and a field of a call, that this version does not have.
        sending.write_all(&framed(&[200, 1, 2, 3])).await.unwrap();
        let extension = [77, 2, 1, 2];
        let call = call(1, &extension, (9, 10_000_000), "echo", &[2, 5, 6]);
        sending.write_all(&call).await.unwrap();
        let reply = read_frame(&mut receiving).await;
        assert_eq!(reply, [3, 9, 0, 0, 0, 0, 0, 0, 0, 2, 5, 6]);
    })
    .await;
}

#[actix::test]
async fn and_a_failure_of_a_kind_unknown_here_still_ends_the_ask() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let b = cluster.start("b").await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = link(&connection).await;
        let echo = b.remote::<Echo>(&path("a#any"));
        let answering = async {
            let asked = read_frame(&mut receiving).await;
            assert_eq!(asked[..3], [1, 0, 0]);
            let failed = [&[4][..], &asked[3..11], &[99, 0, 0]].concat();
            sending.write_all(&framed(&failed)).await.unwrap();
        };
        let (reply, ()) = futures::join!(echo.ask(Echo(vec![]), LONG), answering);
        let actor = path("a#any");
        assert_eq!(reply, Err(offbook_runtime::AskError::Closed { actor }));
    })
    .await;
}
