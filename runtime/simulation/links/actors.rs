//! The actor that every simulated process has, and the messages that it takes. Whatever it gets it tells
//! the ledger.

use std::rc::Rc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use serde::{Deserialize, Serialize};

use super::ledger::{Ledger, Life};
use crate::message::{Open, RemoteMessage, StreamMessage};
use crate::system::System;

/// The actor's name in every process.
pub(super) const EAR: &str = "ear";

/// A tell: the how manieth of those that its sender put on one link.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(super) struct Note {
    pub(super) from: Life,
    pub(super) link: u64,
    pub(super) number: u64,
    pub(super) filling: Vec<u8>,
}

impl RemoteMessage for Note {
    const NAME: &'static str = "note";
    type Reply = ();
}

/// An ask whose answer takes a while.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "u64")]
pub(super) struct Question {
    pub(super) from: Life,
    pub(super) number: u64,
    pub(super) takes: Duration,
}

impl RemoteMessage for Question {
    const NAME: &'static str = "question";
    type Reply = u64;
}

/// The right answer to a question.
pub(super) fn answer_to(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17)
}

/// A subscription to the numbers below `end`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Numbers {
    pub(super) end: u64,
    pub(super) pause: Duration,
    pub(super) bytes: usize,
}

impl StreamMessage for Numbers {
    const NAME: &'static str = "numbers";
    type Item = (u64, Vec<u8>);
}

pub(super) struct Ear {
    pub(super) life: Life,
    pub(super) ledger: Rc<Ledger>,
}

impl Ear {
    /// Starts the actor and makes it reachable.
    pub(super) fn listen(self, system: &System) {
        let addr = self.start();
        system.register::<Note>(EAR, addr.clone().recipient());
        system.register::<Question>(EAR, addr.clone().recipient());
        system.register_stream::<Numbers>(EAR, addr.recipient());
    }
}

impl Actor for Ear {
    type Context = Context<Self>;
}

impl Handler<Note> for Ear {
    type Result = ();

    fn handle(&mut self, note: Note, _: &mut Context<Self>) {
        self.ledger.heard(self.life, &note);
    }
}

impl Handler<Question> for Ear {
    type Result = ResponseFuture<u64>;

    fn handle(&mut self, question: Question, _: &mut Context<Self>) -> ResponseFuture<u64> {
        self.ledger.began(self.life, &question);
        Box::pin(async move {
            tokio::time::sleep(question.takes).await;
            answer_to(question.number)
        })
    }
}

impl Handler<Open<Numbers>> for Ear {
    type Result = ();

    fn handle(&mut self, open: Open<Numbers>, _: &mut Context<Self>) {
        let Numbers { end, pause, bytes } = open.message;
        let items = open.items;
        actix::spawn(async move {
            for number in 0..end {
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                if items.send((number, vec![7; bytes])).await.is_err() {
                    return;
                }
            }
        });
    }
}
