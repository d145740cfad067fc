//! A process whose packets come from another address from one moment to the next keeps its link: the
//! other end makes sure that it is there, and goes on.

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::*;

/// Stands between two processes, as a router does that gives a machine another address.
struct Router {
    front: UdpSocket,
    to: SocketAddr,
    /// What the other end sees, and the client.
    back: Mutex<(UdpSocket, Option<SocketAddr>)>,
}

impl Router {
    fn start(to: SocketAddr) -> Arc<Self> {
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let router = Arc::new(Self {
            front,
            to,
            back: Mutex::new((back(to), None)),
        });
        let running = Arc::downgrade(&router);
        std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while let Some(router) = running.upgrade() {
                router.pass(&mut buffer);
            }
        });
        router
    }

    fn pass(&self, buffer: &mut [u8]) {
        if let Ok((bytes, from)) = self.front.recv_from(buffer) {
            let mut back = self.back.lock().unwrap();
            back.1 = Some(from);
            let _ = back.0.send(&buffer[..bytes]);
        }
        let back = self.back.lock().unwrap();
        while let Ok(bytes) = back.0.recv(buffer) {
            if let Some(client) = back.1 {
                let _ = self.front.send_to(&buffer[..bytes], client);
            }
        }
    }

    fn change_address(&self) {
        self.back.lock().unwrap().0 = back(self.to);
    }
}

fn back(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(to).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

#[actix::test]
async fn of_the_one_that_dialled() {
    within(async {
        let cluster = Cluster::new(&["a", "b"]);
        let (a, b) = (cluster.start("a").await, cluster.start("b").await);
        let subject = Subject::new();
        subject.register(&a, "subject");
        Subject::new().register(&b, "subject");
        let router = Router::start(a.local_addr());
        b.learn(name("a"), router.front.local_addr().unwrap());
        let here = b.remote::<Echo>(&path("a#subject"));
        here.ask(Echo(vec![1]), LONG).await.unwrap();
        let lost = a.watch(&name("b"));
        let there = a.remote::<Echo>(&path("b#subject"));
        for round in 0..3u8 {
            router.change_address();
            // a has nothing to say until b does: then it sees where that comes from.
            assert_eq!(here.ask(Echo(vec![round]), LONG).await.unwrap(), [round]);
            assert_eq!(there.ask(Echo(vec![round]), LONG).await.unwrap(), [round]);
        }
        assert!(
            futures::poll!(Box::pin(lost)).is_pending(),
            "the link that stood at first still stands"
        );
    })
    .await;
}
