//! Single scenes in virtual time, where what must happen has a moment by which it must have.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep, timeout};

use super::actors::{Ear, Question, answer_to};
use super::ledger::{Ledger, Life};
use super::{addr_of, clock, name, path, system};
use crate::failure::{AskError, Lost, LostReason};
use crate::hello::HandshakeError;
use crate::simulation::network::{Network, Packets, Socket, Weather};
use crate::system::System;

/// Plays a scene with a seed of its own.
fn play<T>(scene: impl AsyncFnOnce(Stage) -> T) -> T {
    actix::System::with_tokio_rt(clock).block_on(async {
        scene(Stage {
            began: Instant::now(),
            network: Network::new(7, Weather::default(), Packets::Sought),
            random: StdRng::seed_from_u64(7),
        })
        .await
    })
}

struct Stage {
    began: Instant,
    network: Arc<Network>,
    random: StdRng,
}

/// One life of a process on the stage.
struct Player {
    life: Life,
    system: System,
    socket: Arc<Socket>,
}

impl Stage {
    fn enter(&mut self, process: usize, boot: u64, addr: SocketAddr) -> Player {
        let life = Life { process, boot };
        let socket = self.network.bind(process, addr, self.began.elapsed());
        let system = system(life, addr, Arc::clone(&socket), self.random.random());
        let ledger = std::rc::Rc::new(Ledger::new(false));
        Ear { life, ledger }.listen(&system);
        Player {
            life,
            system,
            socket,
        }
    }

    /// It ends between two packets.
    fn kill(&self, player: Player) {
        self.network.unplug(&player.socket);
        player.system.shared().close();
    }

    fn cut(&self, one: usize, other: usize) {
        self.network.cut(one, other);
        self.network.cut(other, one);
    }

    fn mend(&self, one: usize, other: usize) {
        self.network.mend(one, other);
        self.network.mend(other, one);
    }
}

impl Player {
    async fn ask(&self, to: usize) -> Result<(), AskError> {
        let question = Question {
            from: self.life,
            number: 1,
            takes: Duration::ZERO,
        };
        let ear = self.system.remote::<Question>(&path(to));
        let answer = ear.ask(question, Duration::from_secs(1)).await?;
        assert_eq!(answer, answer_to(1));
        Ok(())
    }

    async fn loses(&self, process: usize, within: Duration) -> Lost {
        let lost = self.system.watch(&name(process));
        timeout(within, lost).await.expect("the link is lost")
    }
}

#[test]
fn a_process_that_moved_and_dials_is_dialled_there() {
    play(async |mut stage: Stage| {
        let old = addr_of(1, 9000);
        let (zero, one) = (stage.enter(0, 1, addr_of(0, 9000)), stage.enter(1, 1, old));
        zero.system.learn(name(1), old);
        zero.ask(1).await.unwrap();
        stage.kill(one);
        zero.loses(1, Duration::from_secs(3)).await;

        // Another port here and another machine's address are the same to those who dial.
        let one = stage.enter(1, 2, addr_of(1, 9100));
        one.system.learn(name(0), addr_of(0, 9000));
        one.ask(0).await.unwrap();
        stage.cut(0, 1);
        zero.loses(1, Duration::from_secs(3)).await;
        one.loses(0, Duration::from_secs(3)).await;
        stage.mend(0, 1);
        // Who is told by the configuration where it was at first is not led astray by that.
        zero.system.learn(name(1), old);
        zero.ask(1).await.unwrap();
    });
}

#[test]
fn a_predecessor_that_goes_on_elsewhere_moves_nobody() {
    play(async |mut stage: Stage| {
        let zero = stage.enter(0, 1, addr_of(0, 9000));
        let [old, new] = [9000, 9100].map(|port| addr_of(1, port));
        let successor = stage.enter(1, 5, new);
        successor.system.learn(name(0), addr_of(0, 9000));
        successor.ask(0).await.unwrap();
        let predecessor = stage.enter(1, 4, old);
        predecessor.system.learn(name(0), addr_of(0, 9000));
        assert!(matches!(
            predecessor.ask(0).await,
            Err(AskError::Unreachable { .. })
        ));
        stage.cut(0, 1);
        zero.loses(1, Duration::from_secs(3)).await;
        stage.mend(0, 1);
        zero.ask(1).await.unwrap();
        assert_eq!(super::World::linked(&zero.system, 1), Some(successor.life));
    });
}

#[test]
fn a_restarted_process_is_seen_within_200_ms() {
    // What lies between its end and its start: nothing, and nearly as much as would be noticed by itself.
    for away in (0..=250).step_by(10).map(Duration::from_millis) {
        let took = play(async |mut stage: Stage| {
            let at = addr_of(1, 9000);
            let others = [0, 2].map(|process| stage.enter(process, 1, addr_of(process, 9000)));
            let killed = stage.enter(1, 1, at);
            for other in &others {
                other.system.learn(name(1), at);
                other.ask(1).await.unwrap();
            }
            // Something is known of its heartbeats.
            sleep(Duration::from_secs(1)).await;
            let watches = others.each_ref().map(|other| other.system.watch(&name(1)));
            stage.kill(killed);
            sleep(away).await;
            let restarted = Instant::now();
            let _again = stage.enter(1, 2, at);
            let mut took = Duration::ZERO;
            for watch in watches {
                let lost = watch.await;
                // Near its bound, silence speaks first.
                let by_itself = matches!(lost.reason, LostReason::Silent(_)) && away > REST;
                assert!(
                    lost.reason == LostReason::Reset || by_itself,
                    "{away:?}: {lost}"
                );
                took = took.max(restarted.elapsed());
            }
            took
        });
        println!("away for {away:?}: seen {took:?} after its start");
        assert!(
            took <= Duration::from_millis(200),
            "away for {away:?}, it is seen {took:?} after its start"
        );
    }
}

#[test]
fn a_node_cannot_fill_the_memory_with_names() {
    play(async |mut stage: Stage| {
        let zero = stage.enter(0, 1, addr_of(0, 9000));
        let shared = zero.system.shared();
        let named = |number| shared.caller(&format!("p1/worker-{number}").parse().unwrap());
        // Of those that are gone, none is left.
        for number in 0..1000 {
            named(number).unwrap();
        }
        let kept: Vec<_> = (1000..).map_while(|number| named(number).ok()).collect();
        assert!((200..=256).contains(&kept.len()), "{}", kept.len());
        let refused = named(0).err();
        assert!(matches!(refused, Some(HandshakeError::Busy(_))));
        assert!(shared.caller(&"p2/worker-1".parse().unwrap()).is_ok());
        drop(kept);
        assert!(named(0).is_ok());
    });
}

/// A process away for less is seen because it is back, not because it was silent.
const REST: Duration = Duration::from_millis(200);
