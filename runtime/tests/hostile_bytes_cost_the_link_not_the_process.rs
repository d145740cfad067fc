//! A process with a good key may still send anything. Whatever it sends ends its own link at most;
//! the one it sends to goes on, and serves the others.

mod support;

use offbook_runtime::*;
use support::raw::*;
use support::*;

/// b lives and answers an honest process.
async fn still_serves(cluster: &Cluster, b: &System) {
    let c = cluster.start("c").await;
    c.learn(b.process().clone(), b.local_addr());
    let echo = c.remote::<Echo>(&path("b#subject"));
    assert_eq!(echo.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
}

async fn victim() -> (Cluster, System) {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let b = cluster.start("b").await;
    Subject::new().register(&b, "subject");
    (cluster, b)
}

#[actix::test]
async fn instead_of_a_hello() {
    within(async {
        let (cluster, b) = victim().await;
        let long = [&5000u32.to_le_bytes()[..], &[0; 100]].concat();
        let later = framed(b"OFBK\x02\0");
        for (bytes, code) in [
            (framed(b"GET / HTTP/1.1"), 0x17),
            (long, 0x17),
            (framed(b""), 0x17),
            (later, 0x10),
        ] {
            let (_endpoint, connection) = connect(&cluster, &b).await;
            let (mut sending, _receiving) = connection.open_bi().await.unwrap();
            sending.write_all(&bytes).await.unwrap();
            assert_eq!(close_code(&connection).await, code);
        }
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn after_the_hello() {
    within(async {
        let (cluster, b) = victim().await;
        let bomb = (1u32 << 31).to_le_bytes().to_vec();
        let unknown = framed(&[99, 0, 0]);
        let short = framed(&[1, 0]);
        let misplaced = framed(&[8, 1, 2, 3]);
        for bytes in [bomb, unknown, short, misplaced, framed(b"")] {
            let (_endpoint, connection) = connect(&cluster, &b).await;
            let (mut sending, mut receiving) = connection.open_bi().await.unwrap();
            sending.write_all(&hello()).await.unwrap();
            receiving.read_exact(&mut [0; 8]).await.unwrap();
            let lost = b.watch(&name("a"));
            sending.write_all(&bytes).await.unwrap();
            assert_eq!(close_code(&connection).await, 0x20, "{bytes:?}");
            assert!(matches!(lost.await.reason, LostReason::PeerMisbehaved(_)));
        }
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn on_a_stream_of_its_own() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = connection.open_bi().await.unwrap();
        sending.write_all(&hello()).await.unwrap();
        receiving.read_exact(&mut [0; 8]).await.unwrap();
        let (mut other, _) = connection.open_bi().await.unwrap();
        other.write_all(&framed(&[1, 2, 3])).await.unwrap();
        assert_eq!(close_code(&connection).await, 0x20);
        still_serves(&cluster, &b).await;
    })
    .await;
}

/// What b answers to an ask: the code of its failure.
async fn failure(cluster: &Cluster, b: &System, ask: &[u8]) -> u8 {
    let (_endpoint, connection) = connect(cluster, b).await;
    let (mut sending, mut receiving) = connection.open_bi().await.unwrap();
    sending.write_all(&hello()).await.unwrap();
    let mut welcome = vec![0; hello().len()];
    receiving.read_exact(&mut welcome).await.unwrap();
    sending.write_all(ask).await.unwrap();
    let mut failed = [0; 16];
    receiving.read_exact(&mut failed).await.unwrap();
    assert_eq!(failed[..13], [12, 0, 0, 0, 4, 42, 0, 0, 0, 0, 0, 0, 0]);
    failed[13]
}

#[actix::test]
async fn an_ask_whose_body_is_a_length_bomb_is_answered() {
    within(async {
        let (cluster, b) = victim().await;
        // `Echo(Vec<u8>)` of 2^63 bytes.
        let bomb = [&[253][..], &(1u64 << 63).to_le_bytes()].concat();
        assert_eq!(
            failure(&cluster, &b, &ask("echo", 1_000_000, &bomb)).await,
            4
        );
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn an_ask_that_is_never_cancelled_is_held_to_its_deadline() {
    within(async {
        let (cluster, b) = victim().await;
        assert_eq!(failure(&cluster, &b, &ask("wait", 20_000, &[0])).await, 7);
        assert_eq!(failure(&cluster, &b, &ask("wait", 0, &[0])).await, 7);
    })
    .await;
}
