//! However many begin to connect and get no further, what they cost is bounded, and whoever belongs gets
//! in meanwhile.

mod support;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use offbook_runtime::*;
use support::raw::*;
use support::*;

/// b, whose door is watched. It lets nobody stand there for longer than the test takes.
async fn victim() -> (Cluster, System) {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let mut config = cluster.config("b");
    config.limits.connect_timeout = LONG;
    let b = System::start(config).await.unwrap();
    Subject::new().register(&b, "other");
    (cluster, b)
}

async fn still_lets_in(cluster: &Cluster, b: &System, process: &str) {
    let honest = cluster.start(process).await;
    honest.learn(b.process().clone(), b.local_addr());
    let echo = honest.remote::<Echo>(&path("b#other"));
    let began = Instant::now();
    assert_eq!(echo.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
    assert!(began.elapsed() < Duration::from_secs(3), "it is held up");
    honest.shutdown(LONG).await;
}

/// First packets of connections that were never made, each good for one.
async fn first_packets(cluster: &Cluster, count: usize) -> Vec<Vec<u8>> {
    let nowhere = UdpSocket::bind("127.0.0.1:0").unwrap();
    nowhere.set_nonblocking(true).unwrap();
    let client = client(cluster);
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let mut buffer = [0; 2048];
    let mut dials = Vec::new();
    while packets.len() < count {
        // All are kept: one that is dropped says goodbye, and one that is not tries again.
        dials.push(client.connect(nowhere.local_addr().unwrap(), "any.invalid"));
        let bytes = loop {
            match nowhere.recv(&mut buffer) {
                Ok(bytes) => break bytes,
                // The endpoint sends from this very thread.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        // The connection's id tells apart those that are sent once more.
        let id = |packet: &[u8]| packet[6..14].to_vec();
        let packet = buffer[..bytes].to_vec();
        if !packets.iter().any(|known| id(known) == id(&packet)) {
            packets.push(packet);
        }
    }
    packets
}

#[actix::test]
async fn of_first_packets_from_addresses_that_nobody_has() {
    within(async {
        let (cluster, b) = victim().await;
        let packets = first_packets(&cluster, 300).await;
        let mut sockets = Vec::new();
        let mut most = 0;
        for (at, packet) in packets.iter().enumerate() {
            // A sender that never reads is to b what a forged address is.
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.send_to(packet, b.local_addr()).unwrap();
            sockets.push(socket);
            if at % 20 == 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
                most = most.max(b.open_connections());
            }
        }
        still_lets_in(&cluster, &b, "c").await;
        most = most.max(b.open_connections());
        assert!(
            (2..=18).contains(&most),
            "{most} connections for 300 packets"
        );
        still_lets_in(&cluster, &b, "a").await;
    })
    .await;
}

#[actix::test]
async fn of_connections_with_a_good_key_that_never_say_hello() {
    within(async {
        let (cluster, b) = victim().await;
        let mut connections = Vec::new();
        for _ in 0..24 {
            connections.push(connect(&cluster, &b).await);
        }
        for (_, connection) in &connections[8..] {
            assert_eq!(close_code(connection).await, 0x18, "there are enough of it");
        }
        for (_, connection) in &connections[..8] {
            assert!(
                connection.close_reason().is_none(),
                "their time is not over"
            );
        }
        // Those that were closed are forgotten a moment later.
        while b.open_connections() > 8 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        still_lets_in(&cluster, &b, "c").await;
        // Whoever says hello has left the door.
        let _link = link(&connections[0].1).await;
        let (_endpoint, next) = connect(&cluster, &b).await;
        let late = tokio::time::timeout(Duration::from_millis(100), next.closed()).await;
        assert!(late.is_err(), "there is a place again: {late:?}");
    })
    .await;
}
