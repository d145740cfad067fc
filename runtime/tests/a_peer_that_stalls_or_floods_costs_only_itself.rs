//! A process with a good key may be slow on purpose, or send without end, or send again what was sent
//! before. It gets no further than its bounds, and the others are served meanwhile.

mod support;

use std::net::UdpSocket;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use offbook_runtime::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use support::raw::*;
use support::*;

/// b, which lets nobody wait for long and holds little.
async fn victim() -> (Cluster, System) {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let mut config = cluster.config("b");
    config.limits = Limits {
        connect_timeout: Duration::from_millis(300),
        frame_bytes_max: 64 * 1024,
        outbox_frames_max: 64,
        outbox_bytes_max: 64 * 1024,
        asks_in_flight_max: 16,
        subscriptions_max: 8,
        ..Limits::default()
    };
    let b = System::start(config).await.unwrap();
    Subject::new().register(&b, "subject");
    Subject::new().register(&b, "other");
    (cluster, b)
}

/// b lives and answers an honest process at once.
async fn still_serves(cluster: &Cluster, b: &System) {
    let c = cluster.start("c").await;
    c.learn(b.process().clone(), b.local_addr());
    let started = Instant::now();
    let echo = c.remote::<Echo>(&path("b#other"));
    assert_eq!(echo.ask(Echo(vec![1]), LONG).await.unwrap(), [1]);
    assert!(started.elapsed() < Duration::from_secs(2), "it is held up");
    c.shutdown(LONG).await;
}

#[actix::test]
async fn a_hello_that_comes_byte_by_byte() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, _receiving) = connection.open_bi().await.unwrap();
        let started = Instant::now();
        let dripping = async {
            for byte in hello() {
                if sending.write_all(&[byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("it was let in after {:?}", started.elapsed());
        };
        let (code, ()) = futures::join!(close_code(&connection), dripping);
        assert_eq!(code, 0x17);
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn streams_that_say_nothing_or_a_byte_at_a_time() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (_sending, _receiving) = link(&connection).await;
        let mut streams = Vec::new();
        for at in 0..8 {
            let (mut sending, receiving) = connection.open_bi().await.unwrap();
            // Half a length, or the beginning of a long call.
            let begun = if at % 2 == 0 {
                vec![9, 0]
            } else {
                vec![0, 1, 0, 0, 6]
            };
            sending.write_all(&begun).await.unwrap();
            streams.push((sending, receiving));
        }
        // The ninth is refused as long as the others are there, and they are not for long.
        let open = connection.open_bi();
        let refused = tokio::time::timeout(Duration::from_millis(50), open).await;
        assert!(refused.is_err(), "more streams than allowed");
        still_serves(&cluster, &b).await;
        for (sending, _) in &mut streams {
            sending.stopped().await.unwrap();
        }
        drop(streams);
        connection.open_bi().await.unwrap();
        assert!(connection.close_reason().is_none(), "silence is no crime");
    })
    .await;
}

#[actix::test]
async fn more_asks_than_may_be_in_flight() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = link(&connection).await;
        for id in 0..40u64 {
            let wait = call(1, &[], (id, 20_000_000), "wait", &[0]);
            sending.write_all(&wait).await.unwrap();
        }
        for id in 16..40u64 {
            let overloaded = [&[4][..], &id.to_le_bytes(), &[5, 0, 0]].concat();
            assert_eq!(read_frame(&mut receiving).await, overloaded);
        }
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn asks_whose_long_answers_nobody_reads() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = link(&connection).await;
        let body = vec![7; 32_000];
        let body = [&[251][..], &32_000u16.to_le_bytes(), &body].concat();
        let asks = 150;
        for id in 0..asks {
            let echo = call(1, &[], (id, 20_000_000), "echo", &body);
            sending.write_all(&echo).await.unwrap();
        }
        let (mut replies, mut refused) = (0u64, 0u64);
        for _ in 0..asks {
            match read_frame(&mut receiving).await[0] {
                3 => replies += 1,
                4 => refused += 1,
                other => panic!("a frame of kind {other}"),
            }
        }
        // What fits into the windows, the queue and the asks in flight, and no more.
        assert!(replies > 0 && replies * 32_000 < (2 << 20), "{replies}");
        assert!(refused > 0);
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn asks_without_end_whose_answers_nobody_reads() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, connection) = connect(&cluster, &b).await;
        let (mut sending, _receiving) = link(&connection).await;
        let nobody = call(1, &[], (1, 1_000_000), "no such message", &[]);
        let flooding = async { while sending.write_all(&nobody).await.is_ok() {} };
        let (code, ()) = futures::join!(close_code(&connection), flooding);
        assert_eq!(code, 0x20);
        still_serves(&cluster, &b).await;
    })
    .await;
}

#[actix::test]
async fn a_hello_that_was_said_before() {
    within(async {
        let (cluster, b) = victim().await;
        let (_endpoint, first) = connect(&cluster, &b).await;
        let (mut sending, mut receiving) = link(&first).await;
        let (_endpoint_2, second) = connect(&cluster, &b).await;
        let (mut again, _) = second.open_bi().await.unwrap();
        again.write_all(&hello()).await.unwrap();
        assert_eq!(close_code(&second).await, 0x16);
        // The link that stood goes on.
        sending
            .write_all(&ask("echo", 9_000_000, &[1, 5]))
            .await
            .unwrap();
        assert_eq!(read_frame(&mut receiving).await[9..], [1, 5]);
    })
    .await;
}

/// Passes packets on between one client and `to`, and keeps those of the client.
fn relay(to: &System) -> (std::net::SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>) {
    let front = UdpSocket::bind("127.0.0.1:0").unwrap();
    let back = UdpSocket::bind("127.0.0.1:0").unwrap();
    back.connect(to.local_addr()).unwrap();
    let address = front.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let client = Arc::new(Mutex::new(None));
    {
        let (front, back) = (front.try_clone().unwrap(), back.try_clone().unwrap());
        let (seen, client) = (Arc::clone(&seen), Arc::clone(&client));
        std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Ok((bytes, from)) = front.recv_from(&mut buffer) {
                *client.lock().unwrap() = Some(from);
                seen.lock().unwrap().push(buffer[..bytes].to_vec());
                let _ = back.send(&buffer[..bytes]);
            }
        });
    }
    std::thread::spawn(move || {
        let mut buffer = [0; 65_536];
        while let Ok(bytes) = back.recv(&mut buffer) {
            let client: Option<std::net::SocketAddr> = *client.lock().unwrap();
            if let Some(client) = client {
                let _ = front.send_to(&buffer[..bytes], client);
            }
        }
    });
    (address, seen)
}

#[actix::test]
async fn every_packet_of_a_link_once_more_from_elsewhere() {
    within(async {
        let (cluster, b) = victim().await;
        let subject = Subject::new();
        subject.register(&b, "other");
        let (address, seen) = relay(&b);
        let a = cluster.start("a").await;
        a.learn(name("b"), address);
        let note = a.remote::<Note>(&path("b#other"));
        for number in 0..20 {
            note.try_tell(Note(number)).unwrap();
        }
        settle(&a, &b).await;
        let packets = seen.lock().unwrap().clone();
        assert!(packets.len() >= 3, "a handshake has as many");
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        for packet in &packets {
            stranger.send_to(packet, b.local_addr()).unwrap();
        }
        still_serves(&cluster, &b).await;
        settle(&a, &b).await;
        let notes = subject.notes.lock().unwrap().clone();
        assert_eq!(notes, (0..20).collect::<Vec<_>>(), "each exactly once");
    })
    .await;
}

#[actix::test]
async fn packets_of_noise() {
    within(async {
        let (cluster, b) = victim().await;
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut random = StdRng::seed_from_u64(7);
        for round in 0..3000 {
            let mut packet = vec![0; random.random_range(1..1400)];
            random.fill(&mut packet[..]);
            if round % 2 == 0 {
                // As the first packet of a connection of QUIC's version 1 would begin.
                let begin = [0xc3, 0, 0, 0, 1, 8];
                let bytes = packet.len().min(begin.len());
                packet[..bytes].copy_from_slice(&begin[..bytes]);
                packet.resize(1200, 0);
            }
            let _ = socket.send_to(&packet, b.local_addr());
        }
        still_serves(&cluster, &b).await;
    })
    .await;
}
